"""Minibatches: where their images come from, and which images make up each.

A pool holds images and targets; a plan says, step by step, which rows of the
pool a minibatch takes, and with what weight in the loss. A row of weight 0 is
padding. In pools of both sets the forget set comes first.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import parallel, streaming, types

# A pass is cut into calls of one program, so that the bar moves and the program
# can be interrupted.
MAX_STEPS_PER_CALL = 32
# Images from disk that wait on the device for one call, and what a pool may
# take to be padded.
STREAM_BYTES = 2**26


class Pool(Protocol):
  """Where the minibatches of a pass get their images and targets from."""

  @property
  def max_steps(self) -> int:
    """How many minibatches to fetch at most at a time."""
    ...

  def fetch(
    self, rows: np.ndarray, num_real: int
  ) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Returns images, targets and the places of `rows` `[S, B]` in them.

    Only the first `num_real` steps are asked for; those behind are padding.
    """
    ...


class _Resident(NamedTuple):
  """All images on the device."""

  images: jax.Array
  targets: jax.Array
  max_steps: int

  def fetch(
    self, rows: np.ndarray, num_real: int
  ) -> tuple[jax.Array, jax.Array, np.ndarray]:
    del num_real
    return self.images, self.targets, rows


class _Streamed:
  """Images from disk, some minibatches at a time, in the order of a plan."""

  def __init__(
    self,
    images: streaming.Images,
    targets: np.ndarray,
    plan: Sequence[np.ndarray],
    mesh: jax.sharding.Mesh | None,
  ) -> None:
    self._shape, self._targets, self._mesh = images.shape[1:], targets, mesh
    self._batches = streaming.batches(images, plan)
    size = max((len(rows) for rows in plan), default=1)
    num_bytes = size * math.prod(self._shape)
    self.max_steps = min(MAX_STEPS_PER_CALL, max(1, STREAM_BYTES // num_bytes))

  def fetch(
    self, rows: np.ndarray, num_real: int
  ) -> tuple[jax.Array, jax.Array, np.ndarray]:
    shape, num_steps = rows.shape, len(rows)
    rows = rows.reshape(num_steps, -1)
    batch_size = rows.shape[1]
    # As many places as the steps could need: one program for all calls.
    pool = np.zeros((num_steps, batch_size, *self._shape), np.uint8)
    places = np.arange(rows.size, dtype=np.int32).reshape(rows.shape)
    for step in range(num_real):
      batch = next(self._batches)
      pool[step, : len(batch)] = batch
      # Devices that the batch does not divide get its first rows again.
      places[step] = places[step, np.arange(batch_size) % len(batch)]
    images = pool.reshape(-1, *self._shape)
    return (
      parallel.replicate(jnp.asarray(images), self._mesh),
      parallel.replicate(jnp.asarray(self._targets[rows.ravel()]), self._mesh),
      places.reshape(shape),
    )

  def close(self) -> None:
    """Ends the readers."""
    self._batches.close()


def resident_pool(
  images: np.ndarray | jax.Array,
  targets: np.ndarray | jax.Array,
  mesh: jax.sharding.Mesh | None = None,
) -> Pool:
  """Puts all images and targets onto the device, or on each of a mesh."""
  images, targets = np.asarray(images), np.asarray(targets)
  if images.nbytes <= STREAM_BYTES:
    # To a power of two: what is left of a small set when a class is taken out
    # has the shape, and so the program, of the whole. No step asks for more.
    num_padding = (1 << (len(images) - 1).bit_length()) - len(images)
    images, targets = (
      np.pad(x, ((0, num_padding), *((0, 0),) * (x.ndim - 1)))
      for x in (images, targets)
    )
  return _Resident(
    parallel.replicate(jnp.asarray(images), mesh),
    parallel.replicate(jnp.asarray(targets), mesh),
    MAX_STEPS_PER_CALL,
  )


@contextlib.contextmanager
def open_pool(
  images: np.ndarray | streaming.Images,
  targets: np.ndarray,
  plan: Iterable[np.ndarray],
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Pool]:
  """Puts images and targets where the steps take them from.

  Args:
    images: uint8 `[N, H, W, C]`: an array goes onto the device as a whole,
      images on disk are read some minibatches at a time.
    targets: int `[N]` or float `[N, K]`.
    plan: The rows `[B]` of each minibatch of all epochs to come, in order; of
      use for images on disk alone.
    mesh: Devices; None for one.

  Yields:
    The pool.
  """
  if not isinstance(images, streaming.Images):
    yield resident_pool(images, targets, mesh)
    return
  with contextlib.closing(
    _Streamed(images, np.asarray(targets), list(plan), mesh)
  ) as pool:
    yield pool


class Plan(NamedTuple):
  """Minibatches of a pass.

  Their weights sum to 1 over each set that the loss takes a mean of.
  Minibatches of a set smaller than the batch size hold the whole set.

  Attributes:
    rows: int32 `[S, B]`, places in the pool.
    weights: float32 `[S, B]`, each row's weight in the loss, 0 for padding. A
      step whose weights are all 0 is skipped.
    is_forget: bool `[S, B]`, whether the row is of the forget set.
  """

  rows: np.ndarray
  weights: np.ndarray
  is_forget: np.ndarray


def shuffled_rows(
  key: jax.Array, num_rows: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Shuffles rows into minibatches; the last is filled up from the first.

  Args:
    key: One typed key.
    num_rows: How many rows, positive.
    batch_size: Rows a minibatch `B`.

  Returns:
    int32 rows `[S, B]` and bool `[S, B]`, False where a row is padding.
  """
  order = np.asarray(jax.random.permutation(key, num_rows), np.int32)
  num_steps = -(-num_rows // batch_size)
  rows = np.resize(order, num_steps * batch_size)
  is_real = np.arange(rows.size) < num_rows
  shape = (num_steps, batch_size)
  return rows.reshape(shape), is_real.reshape(shape)


def mixed(
  key: jax.Array, num_forget: int, num_retain: int, batch_size: int
) -> Plan:
  """Shuffles all images together, into minibatch means."""
  num_rows = num_forget + num_retain
  rows, is_real = shuffled_rows(key, num_rows, min(batch_size, num_rows))
  return Plan(rows, mean_weights(is_real), rows < num_forget)


def mean_weights(is_real: np.ndarray) -> np.ndarray:
  """Returns the weights float32 `[S, B]` of the mean over each step's rows."""
  weights = is_real / is_real.sum(1, keepdims=True)
  return weights.astype(np.float32)


def forget_only(key: jax.Array, num_forget: int, batch_size: int) -> Plan:
  """Shuffles the forget set."""
  return mixed(key, num_forget, 0, batch_size)


def retain_only(
  key: jax.Array, num_forget: int, num_retain: int, batch_size: int
) -> Plan:
  """Shuffles the retain set, which lies behind `num_forget` others."""
  plan = mixed(key, 0, num_retain, batch_size)
  return plan._replace(rows=plan.rows + num_forget)


def beside_retain(
  key: jax.Array, num_forget: int, num_retain: int, batch_size: int
) -> Plan:
  """A pass over the retain set, with as many forget images beside each step."""
  forget_key, retain_key = jax.random.split(key)
  retain = retain_only(retain_key, num_forget, num_retain, batch_size)
  size = min(batch_size, num_forget)
  return _beside(
    _cycled(forget_key, num_forget, len(retain.rows), size, 1.0), retain
  )


def beside_forget(
  key: jax.Array,
  num_forget: int,
  num_retain: int,
  batch_size: int,
  retain_weight: float,
  retain_batch_size: int | None = None,
) -> Plan:
  """A pass over the forget set, with retain images beside each minibatch.

  They are `retain_batch_size`, by default `batch_size`, and their weights sum
  to `retain_weight`; with 0 there are none.
  """
  forget_key, retain_key = jax.random.split(key)
  forget = forget_only(forget_key, num_forget, batch_size)
  if retain_weight == 0:
    return forget
  retain = _cycled(
    retain_key,
    num_retain,
    len(forget.rows),
    retain_batch_size or batch_size,
    retain_weight,
  )
  return _beside(
    forget,
    retain._replace(rows=num_forget + retain.rows, is_forget=~retain.is_forget),
  )


def _cycled(
  key: jax.Array, num_rows: int, num_steps: int, size: int, weight: float
) -> Plan:
  """Goes through rows as often as needed, so that each is taken as often."""
  num_needed = num_steps * size
  orders = [
    np.asarray(jax.random.permutation(round_key, num_rows), np.int32)
    for round_key in jax.random.split(key, -(-num_needed // num_rows))
  ]
  rows = np.concatenate(orders)[:num_needed].reshape(num_steps, size)
  weights = np.full(rows.shape, weight / size, np.float32)
  return Plan(rows, weights, np.ones(rows.shape, bool))


def _beside(left: Plan, right: Plan) -> Plan:
  return Plan(*(np.concatenate(x, 1) for x in zip(left, right, strict=True)))


def each_pass(
  key: jax.Array, num_epochs: int, plan_fn: Callable[[jax.Array], Plan]
) -> list[Plan]:
  """Draws a plan a pass, each from a key of its own."""
  return [plan_fn(jax.random.fold_in(key, i)) for i in range(num_epochs)]


def join(
  split: types.Split, forget_targets: np.ndarray | None = None
) -> tuple[np.ndarray | streaming.Images, np.ndarray]:
  """Joins the forget and the retain set to the images and targets of a pool.

  Args:
    split: The forget and the retain set, whose targets are its labels.
    forget_targets: int `[N]` of the forget set; None for its labels.

  Returns:
    The images, and int32 targets.
  """
  if forget_targets is None:
    forget_targets = split.forget.labels
  return (
    streaming.concatenate([split.forget.images, split.retain.images]),
    np.concatenate([forget_targets, split.retain.labels]).astype(np.int32),
  )


def take_fraction(
  dataset: types.Dataset, fraction: float, key: jax.Array
) -> types.Dataset:
  """Draws a part of a data set, at least one image; nothing is read."""
  if fraction >= 1:
    return dataset
  count = max(1, round(len(dataset) * fraction))
  order = np.asarray(jax.random.permutation(key, len(dataset)))
  return dataset.take(np.sort(order[:count]))
