"""Sparsity-aware unlearning: finetuning with an l1 penalty that fades."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import batches, checks, optimizers, steps, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 10,
  "batch_size": 256,
  "optimizer": optimizers.sgd(0.01, weight_decay=5e-4),
  "description": "l1-sparse",
}


def l1_sparse(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  penalty: float = 5e-4,
  num_plain_epochs: int = 0,
  **options: Any,
) -> common.Output:
  """Finetunes on the retain set while weights are drawn to zero.

      loss = mean CE(f_w(x_R), y_R) + γ_t ‖w‖_1,   γ_t = γ max(0, 1 - t / E')

  in pass `t = 0..E-1`, with `E' = E - num_plain_epochs`: the linear decay of
  the paper, which found it better than a constant or a growing penalty.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the order.
    penalty: `γ`, 0 or more.
    num_plain_epochs: Passes at the end without penalty, below `num_epochs`.
    **options: Those of `engine.Passes`; by default `E` of 10 passes over the
      retain set in minibatches of 256, and SGD with a learning rate of 0.01,
      momentum 0.9 and weight decay 5e-4.

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
  checks.integer("num_plain_epochs", num_plain_epochs, at_least=0)
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  num_epochs = passes.num_epochs
  if num_plain_epochs >= num_epochs:
    raise ValueError(
      f"num_plain_epochs must be below num_epochs={num_epochs}, got"
      f" {num_plain_epochs}"
    )
  fall = np.arange(num_epochs) / (num_epochs - num_plain_epochs)
  penalties = penalty * np.maximum(0.0, 1.0 - fall)
  return common.train(
    *(model, variables, split, jax.random.split(key), passes),
    plan_fn=batches.retain_only,
    loss_fn=_loss,
    contexts=list(jnp.asarray(penalties, jnp.float32)),
  )


def _loss(
  apply_fn: steps.ApplyFn,
  variables: types.Variables,
  batch: steps.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, steps.Figures]]:
  loss, (updated, figures) = steps.mean_cross_entropy(
    apply_fn, variables, batch, ()
  )
  norm = sum(jnp.abs(x).sum() for x in jax.tree.leaves(variables["params"]))
  # The share of the minibatch, where it is computed in parts.
  share = jnp.sum(batch.weights)
  figures["penalty"] = jnp.asarray(context)
  return loss + context * norm * share, (updated, figures)
