"""EU-k: the last layers are drawn anew and trained."""

from collections.abc import Sequence
from typing import Any

import jax

from psg_jax import engine, last_layers, types
from psg_jax.baselines import cf_k, common, finetune

DEFAULTS = {**cf_k.DEFAULTS, "description": "EU-k"}


def eu_k(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_layers: int = 2,
  layers: Sequence[str] | None = None,
  **options: Any,
) -> common.Output:
  """Initialises the last `k` layers anew and trains them on the retain set.

  Exact unlearning of the last `k` layers: their parameters and the statistics
  of their normalisation start as those of a new network (released codes exist
  that copy the trained layer onto itself instead). All others stay exactly as
  they were.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the initialisation and the order.
    num_layers: `k`, positive.
    layers: Prefixes of paths, instead of `num_layers`.
    **options: Those of `engine.Passes`; by default those of `cf_k.cf_k`.

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
  common.check(model, variables, split, key)
  init_key, train_key = jax.random.split(key)
  fresh = common.fresh_variables(model, split, init_key)
  start = last_layers.redrawn(variables, fresh, trainable)
  options = engine.filled(options, {"trainable": trainable, **DEFAULTS})
  return finetune.finetune(model, start, split, train_key, **options)
