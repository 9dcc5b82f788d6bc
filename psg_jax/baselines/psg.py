"""The method of this package, in the form of the others."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from psg_jax import (
  boundary,
  checks,
  engine,
  optimizers,
  relabelling,
  types,
  unlearning,
)
from psg_jax.baselines import common

HARD_DEFAULTS = {"labels": "hard"}
SOFT_DEFAULTS = {"labels": "soft_other", "image_weight": 0.0, "num_refits": 0}
RELEASED_DEFAULTS = {
  "num_epochs": 10,
  "batch_size": 64,
  "labels": "hard",
  "optimizer": optimizers.sgd(1e-5, weight_decay=0.0),
  "schedule": "constant",
  "retain_weight": 0.0,
}

psg = unlearning.unlearn


def psg_hard(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> common.Output:
  """`psg` with the class across the boundary as the label (Algorithm 2).

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key.
    **options: Those of `unlearning.unlearn`; `labels` must be hard.

  Returns:
    As `unlearning.unlearn`, with its errors.

  References:
    Nahass et al., Targeted Unlearning Using Perturbed Sign Gradient Methods
    With Applications On Medical Images, 2025.
  """
  options = engine.filled(options, HARD_DEFAULTS)
  checks.one_of("labels", options["labels"], ("hard",))
  return psg(model, variables, split, key, **options)


def psg_soft(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> common.Output:
  """`psg` with soft labels at the boundary (Algorithm 3).

  Each forget image is taught the frozen model's prediction at its boundary
  point, by default less the old class, and not the nearest class alone: a model
  that never saw the image is seldom sure of it. With `labels="soft"`, for
  requests other than whole classes, the old class is kept: the model is to be
  undecided.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key.
    **options: Those of `unlearning.unlearn`; `labels` must be soft, and
      `image_weight` and `num_refits` are 0 by default.

  Returns:
    As `unlearning.unlearn`, with its errors.

  References:
    Nahass et al., Targeted Unlearning Using Perturbed Sign Gradient Methods
    With Applications On Medical Images, 2025.
  """
  options = engine.filled(options, SOFT_DEFAULTS)
  checks.one_of("labels", options["labels"], relabelling.SOFT_LABELS)
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
  **options: Any,
) -> common.Output:
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
    **options: Those of `unlearning.unlearn`; by default hard labels, 10 passes
      over the forget set in minibatches of 64, SGD with a constant learning
      rate of 1e-5 and momentum 0.9, without weight decay, and `φ` of 0.

  Returns:
    As `unlearning.unlearn`, with its errors.

  References:
    Nahass et al., Targeted Unlearning Using Perturbed Sign Gradient Methods
    With Applications On Medical Images, 2025.
  """
  search_fn = functools.partial(
    boundary.released_code_search,
    model_mean=model_mean,
    model_std=model_std,
    step_size=step_size,
    distance_weight=distance_weight,
    noise_scale=noise_scale,
  )
  options = engine.filled(
    options, {**RELEASED_DEFAULTS, "refresh_labels": noise_scale > 0}
  )
  # Its gradient is that of the minibatch's mean loss, beside λ and γ.
  options.setdefault("search_batch_size", options["batch_size"])
  return psg(model, variables, split, key, search_fn=search_fn, **options)
