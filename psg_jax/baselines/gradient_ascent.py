"""Gradient ascent on the forget set."""

from typing import Any

import chex
import jax

from psg_jax import batches, optimizers, steps, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 5,
  "batch_size": 256,
  "optimizer": optimizers.sgd(1e-4, weight_decay=5e-4),
  "description": "gradient ascent",
}


def gradient_ascent(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> common.Output:
  """Takes steps that raise the loss on the forget set.

      loss = - mean CE(f_w(x_F), y_F)

  The loss has no lower bound: too many or too large steps destroy the model.
  No retained image is used.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, and the retain set, which is not used.
    key: One typed key, for the order.
    **options: Those of `engine.Passes`; by default 5 passes over the forget set
      in minibatches of 256, and SGD with a learning rate of 1e-4, momentum 0.9
      and weight decay 5e-4, as in Jia et al. (2023). BatchNorm in training mode
      is what the released codes have; `batch_stats="frozen"` keeps it from
      adapting to the forget set.

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
  passes = common.passes(
    *(model, variables, split, key, options, DEFAULTS), needs_retain=False
  )
  return common.train(
    *(model, variables, split, jax.random.split(key), passes),
    plan_fn=batches.forget_only,
    loss_fn=_loss,
  )


@steps.row_loss
def _loss(
  logits: jax.Array, batch: steps.Batch, context: chex.ArrayTree
) -> tuple[jax.Array, steps.Figures]:
  del context
  losses = steps.cross_entropy(logits, batch.targets)
  return -losses, {
    "loss": losses,
    "accuracy": steps.is_predicted(logits, batch.targets),
  }
