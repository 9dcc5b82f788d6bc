"""The method of this package, in the form of the others."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax

from psg_jax import boundary, checks, training, types, unlearning
from psg_jax.baselines import _engine

SOFT_LABELS = ("soft", "soft_other")


def psg(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> _engine.Output:
  """Unlearns by perturbed sign gradients: `unlearning.unlearn`.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key.
    **options: Those of `unlearning.unlearn`.

  Returns:
    The variables and the history of `unlearning.unlearn`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Nahass et al., Targeted Unlearning Using Perturbed Sign Gradient Methods
    With Applications On Medical Images, 2025.
  """
  output = unlearning.unlearn(model, variables, split, key, **options)
  return _engine.Output(variables=output.variables, history=output.history)


def psg_soft(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> _engine.Output:
  """`psg` with soft labels, by default `labels="soft_other"` (Algorithm 3).

  Each forget image is taught the frozen model's prediction at its boundary
  point, less the old class, and not the nearest class alone: a model that never
  saw the image is seldom sure of it. With `labels="soft"`, for requests other
  than whole classes, the old class is kept: the model is to be undecided.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key.
    **options: Those of `unlearning.unlearn`; `labels` must be soft.

  Returns:
    The variables and the history of `unlearning.unlearn`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    As `psg`.
  """
  options = {"labels": "soft_other", **options}
  checks.one_of("labels", options["labels"], SOFT_LABELS)
  return psg(model, variables, split, key, **options)


def psg_released(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  model_mean: float | Sequence[float],
  model_std: float | Sequence[float],
  step_size: float = 0.1,
  distance_weight: float = 0.0,
  noise_scale: float = 0.0,
  num_epochs: int = 10,
  batch_size: int = 64,
  optimizer: optax.GradientTransformation | None = None,
  retain_weight: float = 0.0,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """The method as its authors' released code has it, quirks included.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key.
    model_mean: The network's own standardisation, as for
      `boundary.released_code_search`.
    model_std: Likewise.
    step_size: `ε`, in the attack's pixel units.
    distance_weight: `λ`.
    noise_scale: `γ`; the labels are then drawn anew in each pass.
    num_epochs: Passes over the forget set, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 1e-5
      and momentum 0.9, without weight decay.
    retain_weight: `φ`.
    batch_stats: `"update"` or `"frozen"`.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show progress bars.

  Returns:
    The variables and the history of `unlearning.unlearn`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    As `psg`.
  """
  search_fn = functools.partial(
    boundary.released_code_search,
    model_mean=model_mean,
    model_std=model_std,
    step_size=step_size,
    distance_weight=distance_weight,
    noise_scale=noise_scale,
  )
  return psg(
    model,
    variables,
    split,
    key,
    search_fn=search_fn,
    # Its gradient is that of the minibatch's mean loss, beside λ and γ.
    search_batch_size=batch_size,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer or training.sgd(1e-5, weight_decay=0.0),
    schedule="constant",
    retain_weight=retain_weight,
    batch_stats=batch_stats,
    refresh_labels=noise_scale > 0,
    callback=callback,
    mesh=mesh,
    show_progress=show_progress,
  )
