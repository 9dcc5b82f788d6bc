"""Retraining from scratch: the reference that the others are measured by."""

from typing import Any

import jax

from psg_jax import engine, training, types
from psg_jax.baselines import common

DEFAULTS = {"num_epochs": 15, "description": "retraining"}


def retrain(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> common.Output:
  """Trains a new network on the retain set alone.

  The weights start from a fresh initialisation: of `variables` nothing but the
  number of classes is used.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the initialisation and the order.
    **options: Those of `training.fit`; by default 15 passes over the retain
      set.

  Returns:
    The new variables, and the history of `training.fit`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.
  """
  common.check(model, variables, split, key)
  init_key, fit_key = jax.random.split(key)
  fresh = common.fresh_variables(model, split, init_key)
  trained, history = training.fit(
    model, fresh, split.retain, fit_key, **engine.filled(options, DEFAULTS)
  )
  return common.Output(variables=trained, history=history)
