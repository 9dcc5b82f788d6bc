"""Finetuning on the retain set, and what else differs from it by little."""

from typing import Any

import jax

from psg_jax import batches, optimizers, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 10,
  "optimizer": optimizers.sgd(0.04, momentum=0.0, weight_decay=0.0),
  "description": "finetuning",
}


def finetune(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> common.Output:
  """Goes on training on the retain set, and counts on catastrophic forgetting.

  The defaults are those of the experiments of Nahass et al. (2025).

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the order.
    **options: Those of `engine.Passes`; by default 10 passes over the retain
      set, and SGD with a learning rate of 0.04, without momentum and weight
      decay.

  Returns:
    The finetuned variables, and one record a pass: `epoch` from 1,
    `retain_loss` (nats) and `retain_accuracy` as it went, `step_losses` and
    `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Golatkar et al., Eternal Sunshine of the Spotless Net: Selective Forgetting
    in Deep Networks, 2020.
  """
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  return common.train(
    *(model, variables, split, jax.random.split(key), passes),
    plan_fn=batches.retain_only,
  )
