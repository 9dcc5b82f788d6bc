"""Which images make up each minibatch of a pass.

The pool is the forget set followed by the retain set, or the retain set alone
(`num_forget` 0). The weights of a minibatch sum to 1 over each set that the
loss takes a mean of; minibatches of a set smaller than `batch_size` hold the
whole set.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from psg_jax import streaming, training, types


class Plan(NamedTuple):
  """Minibatches of a pass.

  Attributes:
    rows: int32 `[S, B]`, places in the pool.
    weights: float32 `[S, B]`, 0 for padding.
    is_forget: bool `[S, B]`.
  """

  rows: np.ndarray
  weights: np.ndarray
  is_forget: np.ndarray


def pool(
  split: types.Split, forget_targets: np.ndarray | None = None
) -> tuple[np.ndarray | streaming.Images, np.ndarray]:
  """Joins the forget and the retain set, whose targets are its labels.

  Args:
    split: The forget and the retain set.
    forget_targets: int `[N]` of the forget set; None for its labels.

  Returns:
    The images and targets.
  """
  if forget_targets is None:
    forget_targets = split.forget.labels
  return (
    streaming.concatenate([split.forget.images, split.retain.images]),
    np.concatenate([forget_targets, split.retain.labels]).astype(np.int32),
  )


def mixed(
  key: jax.Array, num_forget: int, num_retain: int, batch_size: int
) -> Plan:
  """Shuffles all images together."""
  num_rows = num_forget + num_retain
  rows, weights = training.epoch_batches(
    key, num_rows, min(batch_size, num_rows)
  )
  return Plan(rows, weights, rows < num_forget)


def forget_only(key: jax.Array, num_forget: int, batch_size: int) -> Plan:
  """Shuffles the forget set."""
  return mixed(key, num_forget, 0, batch_size)


def retain_only(
  key: jax.Array, num_forget: int, num_retain: int, batch_size: int
) -> Plan:
  """Shuffles the retain set."""
  plan = mixed(key, 0, num_retain, batch_size)
  return plan._replace(rows=plan.rows + num_forget)


def paired(
  key: jax.Array, num_forget: int, num_retain: int, batch_size: int
) -> Plan:
  """Shuffles the retain set, and puts as many forget images beside each step.

  The forget set is gone through as often as needed, so that each image is
  taken as often as any other.
  """
  forget_key, retain_key = jax.random.split(key)
  retain = retain_only(retain_key, num_forget, num_retain, batch_size)
  num_steps, size = len(retain.rows), min(batch_size, num_forget)
  rounds = -(-num_steps * size // num_forget)
  orders = [
    np.asarray(jax.random.permutation(each, num_forget), np.int32)
    for each in jax.random.split(forget_key, rounds)
  ]
  rows = np.concatenate(orders)[: num_steps * size].reshape(num_steps, size)
  return Plan(
    np.concatenate([rows, retain.rows], 1),
    np.concatenate(
      [np.full(rows.shape, 1 / size, np.float32), retain.weights], 1
    ),
    np.concatenate([np.ones(rows.shape, bool), retain.is_forget], 1),
  )


def each_pass(
  key: jax.Array, num_epochs: int, plan_fn: Callable[[jax.Array], Plan]
) -> list[Plan]:
  """Draws a plan a pass, each from a key of its own."""
  return [plan_fn(jax.random.fold_in(key, i)) for i in range(num_epochs)]


def take_fraction(
  dataset: types.Dataset, fraction: float, key: jax.Array
) -> types.Dataset:
  """Draws a part of a data set, at least one image; nothing is read."""
  if fraction >= 1:
    return dataset
  count = max(1, round(len(dataset) * fraction))
  order = np.asarray(jax.random.permutation(key, len(dataset)))
  return dataset.take(np.sort(order[:count]))
