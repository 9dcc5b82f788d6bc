"""The optimiser of the paper, and learning-rate schedules as data."""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import checks

Schedule: TypeAlias = str | optax.Schedule
"""A name in `SCHEDULES`, or a function of the step that gives the factor."""

SCHEDULES = ("one_cycle", "constant")


@functools.lru_cache
def sgd(
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
  """Builds SGD as in PyTorch: weight decay is part of the gradient.

  The same arguments give the same object, so that programs compiled with it
  are found again.

  Args:
    learning_rate: Positive, or an Optax schedule over steps.
    momentum: In [0, 1).
    weight_decay: 0 or more, applied to all parameters.

  Returns:
    The optimiser.

  Raises:
    ValueError: If an argument is out of its range.
  """
  if not callable(learning_rate):
    checks.number("learning_rate", learning_rate, above=0)
  checks.number("momentum", momentum, at_least=0, below=1)
  checks.number("weight_decay", weight_decay, at_least=0)
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(learning_rate, momentum=momentum or None),
  )


@functools.lru_cache
def adam(learning_rate: float) -> optax.GradientTransformation:
  """Builds Adam; the same rate gives the same object, for compiled programs."""
  checks.number("learning_rate", learning_rate, above=0)
  return optax.adam(learning_rate)


def schedule_fn(schedule: Schedule, num_steps: int) -> optax.Schedule:
  """Returns the factor of the learning rate at each step of a run.

  A constant rate stops wherever it happens to be: two runs of one recipe end
  far from each other. One cycle ends at rest.

  Args:
    schedule: `"one_cycle"`: from 1/25 up to 1 in the first 30 % of the steps,
      then down to almost 0 as a cosine; `"constant"`: 1; a function: itself.
    num_steps: All steps of the run, positive.

  Returns:
    The factor, usually in [0, 1], as a function of the step from 0.

  Raises:
    ValueError: If there is no schedule of this name.

  References:
    Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks
    Using Large Learning Rates, 2017.
  """
  check_schedule(schedule)
  if callable(schedule):
    return schedule
  if schedule == "constant":
    return optax.constant_schedule(1.0)
  return optax.cosine_onecycle_schedule(num_steps, 1.0)


def repeated(schedule: Schedule, num_steps: int) -> optax.Schedule:
  """Returns a schedule of so many steps that begins again after each run."""
  factor_fn = schedule_fn(schedule, num_steps)
  return lambda step: factor_fn(step % num_steps)


def check_schedule(schedule: Schedule) -> None:
  """Raises ValueError unless it is a function or a name in `SCHEDULES`."""
  if not callable(schedule):
    checks.one_of("schedule", schedule, SCHEDULES)


def schedule_factors(schedule: Schedule, num_steps: int) -> np.ndarray:
  """Returns `schedule_fn` at all steps of a run, float32 `[num_steps]`."""
  if callable(schedule):
    return _factors(schedule, num_steps)
  return _named_factors(schedule, num_steps)


def _factors(schedule: Schedule, num_steps: int) -> np.ndarray:
  factors = jax.vmap(schedule_fn(schedule, num_steps))(jnp.arange(num_steps))
  return np.asarray(factors, np.float32)


# Half a second each, and references of one recipe have the same.
_named_factors = functools.lru_cache(maxsize=16)(_factors)
