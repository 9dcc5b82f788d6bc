"""Training as pure functions: cross-entropy over shuffled images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import batches, checks, engine, optimizers, steps, types

# What a training program needs beside `fit`, under one name.
TrainState = steps.TrainState
History = engine.History
Schedule = optimizers.Schedule
SCHEDULES = optimizers.SCHEDULES
cross_entropy = steps.cross_entropy
init_state = steps.init_state
schedule_factors = optimizers.schedule_factors
schedule_fn = optimizers.schedule_fn
sgd = optimizers.sgd
to_float = steps.to_float

# Of the keys folded from a run's: the last cannot be a step's.
_ORDER = np.iinfo(np.int32).max


def default_optimizer(schedule: Schedule) -> optax.GradientTransformation:
  """Returns what `fit` trains with: the paper's rate where it is constant."""
  return sgd(0.01 if schedule == "constant" else 0.05)


def order_key(state: TrainState | None, key: jax.Array) -> jax.Array:
  """Returns the key of the order of images, which lasts over a resumed run."""
  return jax.random.fold_in(key if state is None else state.key, _ORDER)


def train(
  model: types.Model,
  dataset: types.Dataset,
  key: jax.Array,
  **options: Any,
) -> tuple[types.Variables, History]:
  """Trains from a fresh initialisation.

  Args:
    model: The network.
    dataset: The training images.
    key: One typed key, for initialisation, order and augmentation.
    **options: Those of `fit`; `num_epochs` must be given.

  Returns:
    The trained variables, and a record for each pass; see `fit`.

  Raises:
    ValueError: As `fit`, and for images that the network does not take.
  """
  checks.key(key)
  init_key, fit_key = jax.random.split(key)
  images = jnp.zeros((1, *dataset.images.shape[1:]), jnp.float32)
  variables = model.init(init_key, images)
  return fit(model, variables, dataset, fit_key, **options)


def fit(
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  key: jax.Array,
  **options: Any,
) -> tuple[types.Variables, History]:
  """Trains with cross-entropy. The same arguments give the same weights.

  Args:
    model: The network.
    variables: Where to start; left as they are.
    dataset: The training images, put on the device as uint8, or read from disk
      as they are needed (`streaming.load`); the result is the same.
    key: One typed key, for order and augmentation.
    **options: Those of `engine.Passes`, of which `num_epochs` must be given; by
      default `schedule="one_cycle"`, and `sgd(0.05)`, or `sgd(0.01)` with a
      constant rate, as in the paper.

  Returns:
    The trained variables, and one record an epoch: `epoch` from 1, mean `loss`
    (nats) and `accuracy` over the epoch as it went, `seconds`, and
    `step_losses`, one a step. An epoch that was gone on with counts from there.

  Raises:
    ValueError: If an argument is out of its range.
    FloatingPointError: If the loss is NaN or infinite.
  """
  passes = engine.Passes.of(
    options, {"schedule": "one_cycle", "description": "training"}
  )
  checks.key(key)
  if not len(dataset):
    raise ValueError("dataset must not be empty, got 0 images")
  steps.check_classes(model, variables, dataset)
  if passes.optimizer is None:
    passes = passes.replace(optimizer=default_optimizer(passes.schedule))
  plans = batches.each_pass(
    order_key(passes.state, key),
    passes.num_epochs,
    lambda key: batches.retain_only(key, 0, len(dataset), passes.batch_size),
  )
  state, history = engine.run(
    model,
    variables,
    dataset.images,
    dataset.labels,
    [[engine.Phase(steps.mean_cross_entropy, plan)] for plan in plans],
    key,
    passes,
    record_fn=lambda report: engine.summarise(report, report.plan.weights > 0),
  )
  return state.variables, history
