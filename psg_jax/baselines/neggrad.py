"""NegGrad: finetuning on the retain set against the gradient of the other."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from psg_jax import batches, checks, engine, optimizers, steps, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 5,
  "optimizer": optimizers.sgd(0.01, momentum=0.0, weight_decay=0.0),
  "description": "NegGrad",
}
PLUS_DEFAULTS = {**DEFAULTS, "num_epochs": 10}


def neggrad(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_share: float = 0.9999,
  **options: Any,
) -> common.Output:
  """Lowers the loss on the retain set and raises it on the forget set.

      loss = α mean CE(f_w(x_R), y_R) - (1 - α) mean CE(f_w(x_F), y_F)

  for each minibatch of the retain set, with one of the forget set beside it.
  The defaults are those of the experiments of Nahass et al. (2025), whose α
  makes it nearly a finetuning; `neggrad_plus` has those of Kurmanji et al.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order.
    retain_share: `α`, in [0, 1].
    **options: Those of `engine.Passes`; by default 5 passes over the retain
      set, and SGD with a learning rate of 0.01, without momentum and weight
      decay.

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
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  return common.train(
    *(model, variables, split, jax.random.split(key), passes),
    plan_fn=batches.beside_retain,
    loss_fn=_loss,
    contexts=[jnp.float32(retain_share)] * passes.num_epochs,
  )


def neggrad_plus(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_share: float = 0.95,
  **options: Any,
) -> common.Output:
  """NegGrad+: `neggrad` with an `α` that the paper tunes for each data set.

  By default there are 10 passes.

  References:
    Kurmanji et al., Towards Unbounded Machine Unlearning, 2023.
  """
  options = engine.filled(options, PLUS_DEFAULTS)
  return neggrad(
    model, variables, split, key, retain_share=retain_share, **options
  )


@steps.row_loss
def _loss(
  logits: jax.Array, batch: steps.Batch, context: chex.ArrayTree
) -> tuple[jax.Array, steps.Figures]:
  losses = steps.cross_entropy(logits, batch.targets)
  signs = jnp.where(batch.is_forget, context - 1, context)
  return signs * losses, {
    "loss": losses,
    "accuracy": steps.is_predicted(logits, batch.targets),
  }
