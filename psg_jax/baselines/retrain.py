"""Retraining from scratch: the reference that the others are measured by."""

import jax
import optax

from psg_jax import augment, training, types
from psg_jax.baselines import _engine


def retrain(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_epochs: int = 15,
  batch_size: int = 64,
  schedule: training.Schedule = "one_cycle",
  optimizer: optax.GradientTransformation | None = None,
  augment_fn: augment.AugmentFn | None = None,
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Trains a new network on the retain set alone.

  The weights start from a fresh initialisation: of `variables` nothing but the
  number of classes is used.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the initialisation and the order.
    num_epochs: Passes over the retain set, positive.
    batch_size: Images a step, positive.
    schedule: Of the learning rate, as for `training.fit`.
    optimizer: As for `training.fit`.
    augment_fn: Augmentation, as for `training.fit`.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to train on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The new variables, and the history of `training.fit`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.
  """
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
  )
  init_key, fit_key = jax.random.split(key)
  trained, history = training.fit(
    model,
    _engine.fresh_variables(model, split, init_key),
    split.retain,
    fit_key,
    optimizer=optimizer,
    num_epochs=num_epochs,
    batch_size=batch_size,
    schedule=schedule,
    augment_fn=augment_fn,
    callback=callback,
    mesh=mesh,
    description="retraining",
    show_progress=show_progress,
  )
  return _engine.Output(variables=trained, history=history)
