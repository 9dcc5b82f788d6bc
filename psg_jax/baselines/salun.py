"""SalUn: random labels, learnt by the salient weights alone."""

import time
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import checks, engine, optimizers, types
from psg_jax.baselines import common, importance, random_labels

DEFAULTS = {
  **random_labels.DEFAULTS,
  "optimizer": optimizers.sgd(0.013, weight_decay=5e-4),
  "description": "SalUn",
}


def salun(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  salient_fraction: float = 0.5,
  retain_weight: float = 1.0,
  **options: Any,
) -> common.Output:
  """Trains on random labels the weights that the forget set depends on most.

      m_S = 1(|∇_w mean CE(f_w(x_F), y_F)| ≥ γ)    at the original weights

  and then `random_labels` where `m_S` is 1; the other weights keep every bit,
  whatever the momentum or weight decay. The gradient is that of the original
  model in inference mode; the released code takes optimiser steps meanwhile.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the labels and the order.
    salient_fraction: Part of the weights that is trained, in (0, 1], those of
      the largest gradient: 0.5 sets `γ` to the median, as in the paper.
    retain_weight: `α`, positive.
    **options: Those of `engine.Passes`; by default those of
      `random_labels.random_labels`, but a learning rate of 0.013. Statistics of
      normalisation are never masked.

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
  checks.number("salient_fraction", salient_fraction, above=0, at_most=1)
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  start = time.perf_counter()
  gradient = importance.mean_gradient(
    *(model, variables, split.forget),
    batch_size=passes.batch_size,
    mesh=passes.mesh,
    show_progress=passes.show_progress,
  )
  mask = largest(gradient, salient_fraction)
  seconds = time.perf_counter() - start
  options = engine.filled(options, {"trainable": {"params": mask}, **DEFAULTS})
  output = random_labels.random_labels(
    model, variables, split, key, retain_weight=retain_weight, **options
  )
  if output.history:
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
