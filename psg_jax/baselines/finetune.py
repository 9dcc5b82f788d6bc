"""Finetuning on the retain set, and what else differs from it by little."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import training, types
from psg_jax.baselines import _engine, _plans


def finetune(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_epochs: int = 10,
  batch_size: int = 64,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Goes on training on the retain set, and counts on catastrophic forgetting.

  The defaults are those of the experiments of Nahass et al. (2025).

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the order.
    num_epochs: Passes over the retain set, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 0.04,
      without momentum and weight decay.
    batch_stats: `"update"`: BatchNorm in training mode; `"frozen"`: in
      inference mode.
    callback: Called after each pass with the state (to be copied or saved
      before it returns) and the pass's record; its time does not count.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

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
  optimizer = optimizer or training.sgd(0.04, momentum=0.0, weight_decay=0.0)
  return on_retain_set(
    model,
    variables,
    split,
    key,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer,
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="finetuning",
    show_progress=show_progress,
  )


def on_retain_set(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_epochs: int,
  batch_size: int,
  optimizer: optax.GradientTransformation,
  start: types.Variables | None = None,
  loss_fn: _engine.LossFn = _engine.mean_cross_entropy,
  coefficients: np.ndarray | None = None,
  layers: tuple[str, ...] | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  description: str = "unlearning",
  show_progress: bool = True,
) -> _engine.Output:
  """Trains on the retain set with any loss; for the methods that do so.

  Args:
    model: As for `finetune`, and so are those that are not named here.
    variables: As for `finetune`.
    split: As for `finetune`.
    key: As for `finetune`.
    num_epochs: As for `finetune`.
    batch_size: As for `finetune`.
    optimizer: Any Optax optimiser.
    start: Where to start; None for `variables`.
    loss_fn: The loss of a step.
    coefficients: float `[num_epochs]`, the context of the loss in each pass.
    layers: As for `_engine.run`.
    batch_stats: As for `finetune`.
    callback: As for `finetune`.
    mesh: As for `finetune`.
    description: Name of the progress bar.
    show_progress: As for `finetune`.

  Returns:
    As `finetune`.

  Raises:
    ValueError: As `finetune`.
    FloatingPointError: As `finetune`.
  """
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
    batch_stats=batch_stats,
  )
  if coefficients is None:
    coefficients = np.zeros(num_epochs)
  plan_key, run_key = jax.random.split(key)
  plans = _plans.each_pass(
    plan_key,
    num_epochs,
    lambda key: _plans.retain_only(key, 0, len(split.retain), batch_size),
  )
  return _engine.run(
    model,
    variables if start is None else start,
    split.retain.images,
    split.retain.labels,
    [
      [_engine.Phase(loss_fn, *plan, jnp.float32(coefficient))]
      for plan, coefficient in zip(plans, coefficients, strict=True)
    ],
    run_key,
    optimizer=optimizer,
    layers=layers,
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description=description,
    show_progress=show_progress,
  )
