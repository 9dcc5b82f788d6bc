"""Sparsity-aware unlearning: finetuning with an l1 penalty that fades."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import checks, training, types
from psg_jax.baselines import _engine, finetune


def l1_sparse(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  penalty: float = 5e-4,
  num_plain_epochs: int = 0,
  num_epochs: int = 10,
  batch_size: int = 256,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Finetunes on the retain set while weights are drawn to zero.

      loss = mean CE(f_w(x_R), y_R) + γ_t ‖w‖_1,   γ_t = γ max(0, 1 - t / E')

  in pass `t = 0..E-1`, with `E' = E - num_plain_epochs`: the linear decay of
  the paper, which found it better than a constant or a growing penalty.

  Args:
    model: As for `finetune.finetune`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the order.
    penalty: `γ`, 0 or more.
    num_plain_epochs: Passes at the end without penalty, below `num_epochs`.
    num_epochs: `E`, passes over the retain set, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 0.01,
      momentum 0.9 and weight decay 5e-4.
    batch_stats: `"update"` or `"frozen"`.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The variables, and the records of `finetune.finetune` with `penalty`, the
    `γ_t` of the pass.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Jia et al., Model Sparsity Can Simplify Machine Unlearning, 2023.
  """
  checks.number("penalty", penalty, at_least=0)
  checks.integer("num_epochs", num_epochs, at_least=1)
  checks.integer("num_plain_epochs", num_plain_epochs, at_least=0)
  if num_plain_epochs >= num_epochs:
    raise ValueError(
      f"num_plain_epochs must be below num_epochs={num_epochs}, got"
      f" {num_plain_epochs}"
    )
  fall = np.arange(num_epochs) / (num_epochs - num_plain_epochs)
  return finetune.on_retain_set(
    model,
    variables,
    split,
    key,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer or training.sgd(0.01, weight_decay=5e-4),
    loss_fn=_loss,
    coefficients=penalty * np.maximum(0.0, 1.0 - fall),
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="l1-sparse",
    show_progress=show_progress,
  )


def _loss(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
  loss, (updated, figures) = _engine.mean_cross_entropy(
    apply_fn, variables, batch, ()
  )
  norm = sum(jnp.abs(x).sum() for x in jax.tree.leaves(variables["params"]))
  figures["penalty"] = (context, jnp.float32(1))
  return loss + context * norm, (updated, figures)
