"""CF-k: finetuning of the last layers alone."""

from collections.abc import Sequence
from typing import Any

import jax

from psg_jax import engine, last_layers, optimizers, types
from psg_jax.baselines import common, finetune

DEFAULTS = {
  "num_epochs": 10,
  "optimizer": optimizers.sgd(0.01, momentum=0.0, weight_decay=0.0),
  "description": "CF-k",
}


def cf_k(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_layers: int = 2,
  layers: Sequence[str] | None = None,
  **options: Any,
) -> common.Output:
  """Finetunes the last `k` layers on the retain set: catastrophic forgetting-k.

  All other parameters, and the statistics of their normalisation, stay exactly
  as they were. BatchNorm is in training mode. The defaults are those of the
  experiments of Nahass et al. (2025): the last block and the head.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the order.
    num_layers: `k`, positive: convolution or residual blocks, the stem and the
      linear head count as a layer each, from the head backwards. For networks
      whose layers are not named as those of `models.create` see `layers`.
    layers: Prefixes of the paths of the parameters to train, such as
      `("layer4", "head")`, instead of `num_layers`.
    **options: Those of `engine.Passes`; by default 10 passes over the retain
      set, and SGD with a learning rate of 0.01, without momentum and weight
      decay.

  Returns:
    As `finetune.finetune`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Goel et al., Towards Adversarial Evaluations for Inexact Machine Unlearning,
    2022.
  """
  trainable = last_layers.trainable(variables, num_layers, layers)
  options = engine.filled(options, {"trainable": trainable, **DEFAULTS})
  return finetune.finetune(model, variables, split, key, **options)
