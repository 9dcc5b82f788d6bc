"""SalUn: random labels, learnt by the salient weights alone."""

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import checks, training, types
from psg_jax.baselines import _engine, _importance, random_labels


def salun(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  salient_fraction: float = 0.5,
  retain_weight: float = 1.0,
  num_epochs: int = 10,
  batch_size: int = 256,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Trains on random labels the weights that the forget set depends on most.

      m_S = 1(|∇_w mean CE(f_w(x_F), y_F)| ≥ γ)    at the original weights

  and then `random_labels` where `m_S` is 1; the other weights keep every bit,
  whatever the momentum or weight decay. The gradient is that of the original
  model in inference mode; the released code takes optimiser steps meanwhile.

  Args:
    model: As for `random_labels.random_labels`, and so are those not named
      here.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the labels and the order.
    salient_fraction: Part of the weights that is trained, in (0, 1], those of
      the largest gradient: 0.5 sets `γ` to the median, as in the paper.
    retain_weight: `α`, positive.
    num_epochs: Passes over all images, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 0.013,
      momentum 0.9 and weight decay 5e-4.
    batch_stats: `"update"` or `"frozen"`; statistics are never masked.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The variables, and the records of `random_labels.random_labels`, of which
    the first has `saliency_seconds`, spent before it.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Fan et al., SalUn: Empowering Machine Unlearning via Gradient-based Weight
    Saliency in Both Image Classification and Generation, 2024.
  """
  checks.number("retain_weight", retain_weight, above=0)
  checks.number("salient_fraction", salient_fraction, above=0, at_most=1)
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
    batch_stats=batch_stats,
  )
  start = time.perf_counter()
  gradient = _importance.mean_gradient(
    model,
    variables,
    split.forget,
    batch_size=batch_size,
    mesh=mesh,
    show_progress=show_progress,
  )
  mask = largest(gradient, salient_fraction)
  seconds = time.perf_counter() - start
  output = random_labels.train(
    model,
    variables,
    split,
    key,
    retain_weight=retain_weight,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer or training.sgd(0.013, weight_decay=5e-4),
    mask=mask,
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="SalUn",
    show_progress=show_progress,
  )
  output.history[0]["saliency_seconds"] = seconds
  return output


def largest(tree: chex.ArrayTree, fraction: float) -> chex.ArrayTree:
  """Marks the entries of largest magnitude, over all arrays together.

  Args:
    tree: Arrays.
    fraction: How many of all entries, in (0, 1]; at least one is marked.

  Returns:
    A tree of bool; of equal entries the first are marked.
  """
  leaves, structure = jax.tree.flatten(tree)
  sizes = np.abs(np.concatenate([np.ravel(x) for x in leaves]))
  count = max(1, round(fraction * sizes.size))
  is_large = np.zeros(sizes.size, bool)
  is_large[np.argsort(-sizes, kind="stable")[:count]] = True
  parts = np.split(is_large, np.cumsum([x.size for x in leaves])[:-1])
  return jax.tree.unflatten(
    structure,
    [
      jnp.asarray(part.reshape(x.shape))
      for part, x in zip(parts, leaves, strict=True)
    ],
  )
