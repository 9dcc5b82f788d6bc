"""Gradient ascent on the forget set."""

import chex
import jax
import optax

from psg_jax import training, types
from psg_jax.baselines import _engine, _plans


def gradient_ascent(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_epochs: int = 5,
  batch_size: int = 256,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Takes steps that raise the loss on the forget set.

      loss = - mean CE(f_w(x_F), y_F)

  The loss has no lower bound: too many or too large steps destroy the model.
  No retained image is used.

  Args:
    model: As for `finetune.finetune`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget set, and the retain set, which is not used.
    key: One typed key, for the order.
    num_epochs: Passes over the forget set, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 1e-4,
      momentum 0.9 and weight decay 5e-4, as in Jia et al. (2023).
    batch_stats: `"update"`, BatchNorm in training mode, is what the released
      codes have; `"frozen"` keeps it from adapting to the forget set.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The variables, and one record a pass: `epoch` from 1, `forget_loss` (nats)
    and `forget_accuracy` as it went, `step_losses` and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Thudi et al., Unrolling SGD: Understanding Factors Influencing Machine
    Unlearning, 2022.
  """
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
    batch_stats=batch_stats,
    needs_retain=False,
  )
  plan_key, run_key = jax.random.split(key)
  plans = _plans.each_pass(
    plan_key,
    num_epochs,
    lambda key: _plans.forget_only(key, len(split.forget), batch_size),
  )
  return _engine.run(
    model,
    variables,
    split.forget.images,
    split.forget.labels,
    [[_engine.Phase(_loss, *plan)] for plan in plans],
    run_key,
    optimizer=optimizer or training.sgd(1e-4, weight_decay=5e-4),
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="gradient ascent",
    show_progress=show_progress,
  )


def _loss(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
  loss, aux = _engine.mean_cross_entropy(apply_fn, variables, batch, context)
  return -loss, aux
