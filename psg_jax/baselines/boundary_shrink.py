"""Boundary shrink: relabels by one adversarial step, and finetunes."""

import functools
from typing import Any

import jax

from psg_jax import boundary, checks, engine, optimizers, types, unlearning
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 10,
  "batch_size": 64,
  "labels": "hard",
  "optimizer": optimizers.sgd(1e-5, weight_decay=0.0),
  "retain_weight": 0.0,
}


def boundary_shrink(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  step_size: float = 0.1,
  **options: Any,
) -> common.Output:
  """Splits the forget images among their neighbours across the boundary.

      y' = argmax f(x + ε sign(∇_x CE(f(x), y)))

  clipped to [0, 1] and rounded to grey levels, with the original model in
  inference mode; a copy of it is then trained on the forget set with `y'`,
  and without any retained image. An image that the step does not carry across
  keeps its class, as in the paper: `unlearning.unlearn` does better.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, and the retain set, which is not used.
    key: One typed key, for the order.
    step_size: `ε`, in pixel units, positive.
    **options: Those of `unlearning.unlearn`; by default hard labels, 10 passes
      over the forget set in minibatches of 64, and SGD with a learning rate of
      1e-5 and momentum 0.9, without weight decay. BatchNorm in training mode is
      as released.

  Returns:
    The variables, and the history of `unlearning.unlearn`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Chen et al., Boundary Unlearning: Rapid Forgetting of Deep Networks via
    Shifting the Decision Boundary, 2023.
  """
  checks.number("step_size", step_size, above=0)
  # With the same constants on both sides, the step is one in pixel units.
  search_fn = functools.partial(
    boundary.released_code_search,
    model_mean=0.0,
    model_std=1.0,
    attack_mean=0.0,
    attack_std=1.0,
    step_size=step_size,
  )
  return unlearning.unlearn(
    *(model, variables, split, key),
    search_fn=search_fn,
    **engine.filled(options, DEFAULTS),
  )
