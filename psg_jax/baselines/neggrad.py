"""NegGrad: finetuning on the retain set against the gradient of the other."""

import chex
import jax
import jax.numpy as jnp
import optax

from psg_jax import checks, training, types
from psg_jax.baselines import _engine, _plans


def neggrad(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_share: float = 0.9999,
  num_epochs: int = 5,
  batch_size: int = 64,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Lowers the loss on the retain set and raises it on the forget set.

      loss = α mean CE(f_w(x_R), y_R) - (1 - α) mean CE(f_w(x_F), y_F)

  for each minibatch of the retain set, with one of the forget set beside it.
  The defaults are those of the experiments of Nahass et al. (2025), whose α
  makes it nearly a finetuning; `neggrad_plus` has those of Kurmanji et al.

  Args:
    model: As for `finetune.finetune`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order.
    retain_share: `α`, in [0, 1].
    num_epochs: Passes over the retain set, positive.
    batch_size: Retain images a step, and as many forget images (or all, where
      they are fewer).
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 0.01,
      without momentum and weight decay.
    batch_stats: `"update"` or `"frozen"`.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The variables, and one record a pass: `epoch` from 1, loss (nats) and
    accuracy on either set as it went, as `forget_loss` and so on,
    `step_losses` and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Golatkar et al., Eternal Sunshine of the Spotless Net, 2020; Kurmanji et
    al., Towards Unbounded Machine Unlearning, 2023.
  """
  checks.number("retain_share", retain_share, at_least=0, at_most=1)
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
    batch_stats=batch_stats,
  )
  plan_key, run_key = jax.random.split(key)
  sizes = len(split.forget), len(split.retain), batch_size
  plans = _plans.each_pass(
    plan_key, num_epochs, lambda key: _plans.paired(key, *sizes)
  )
  share = jnp.float32(retain_share)
  return _engine.run(
    model,
    variables,
    *_plans.pool(split),
    [[_engine.Phase(_loss, *plan, share)] for plan in plans],
    run_key,
    optimizer=optimizer or training.sgd(0.01, momentum=0.0, weight_decay=0.0),
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="NegGrad",
    show_progress=show_progress,
  )


def neggrad_plus(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_share: float = 0.95,
  num_epochs: int = 10,
  batch_size: int = 64,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """NegGrad+: the loss of `neggrad` with an α that is tuned.

  Args:
    model: As for `neggrad`, and so are all others.
    variables: As for `neggrad`.
    split: As for `neggrad`.
    key: As for `neggrad`.
    retain_share: `α`, in [0, 1]; the paper tunes it for each data set.
    num_epochs: As for `neggrad`.
    batch_size: As for `neggrad`.
    optimizer: As for `neggrad`.
    batch_stats: As for `neggrad`.
    callback: As for `neggrad`.
    mesh: As for `neggrad`.
    show_progress: As for `neggrad`.

  Returns:
    As `neggrad`.

  Raises:
    ValueError: As `neggrad`.
    FloatingPointError: As `neggrad`.

  References:
    Kurmanji et al., Towards Unbounded Machine Unlearning, 2023.
  """
  return neggrad(
    model,
    variables,
    split,
    key,
    retain_share=retain_share,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer,
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    show_progress=show_progress,
  )


def _loss(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
  logits, variables = apply_fn(variables, batch)
  losses = training.cross_entropy(logits, batch.targets)
  signs = jnp.where(batch.is_forget, context - 1, context)
  is_correct = _engine.is_predicted(logits, batch.targets)
  return jnp.sum(signs * losses * batch.weights), (
    variables,
    _engine.by_set(batch, loss=losses, accuracy=is_correct),
  )
