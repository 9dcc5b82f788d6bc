"""Bad Teacher: a competent teacher on one set, a random one on the other."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import batches, checks, inference, optimizers, steps, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 1,
  "batch_size": 256,
  "optimizer": optimizers.adam(1e-4),
  "description": "Bad Teacher",
}


def bad_teacher(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_fraction: float = 0.3,
  temperature: float = 1.0,
  **options: Any,
) -> common.Output:
  """Learns from the original model on R and from a random network on F.

      loss = mean_i KL(softmax(t_i / T) ‖ softmax(f_w(x_i) / T))

  with `t` the logits of the original model on the retain set, and of a freshly
  initialised one on the forget set; both are frozen, in inference mode. The
  minibatches are of both sets shuffled together. The released code takes the
  mean over classes too, which scales the loss by `1 / K`.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the incompetent teacher, the choice and the order.
    retain_fraction: Part of the retain set that is used, drawn at random, in
      (0, 1].
    temperature: `T`, positive.
    **options: Those of `engine.Passes`; by default one pass over these images
      in minibatches of 256, and Adam with a learning rate of 1e-4.

  Returns:
    The student, and one record a pass: `epoch` from 1, `forget_loss` and
    `retain_loss` (the divergence, nats), `forget_accuracy` and
    `retain_accuracy` (share of images predicted as by the teacher) as it went,
    `step_losses` and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Chundawat et al., Can Bad Teaching Induce Forgetting? Unlearning in Deep
    Networks Using an Incompetent Teacher, 2023.
  """
  checks.number("retain_fraction", retain_fraction, above=0, at_most=1)
  checks.number("temperature", temperature, above=0)
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  init_key, choice_key, *keys = jax.random.split(key, 4)
  retain = batches.take_fraction(split.retain, retain_fraction, choice_key)
  incompetent = common.fresh_variables(model, split, init_key)
  teachers = ((incompetent, split.forget), (variables, retain))
  targets = np.concatenate(
    [
      inference.predict(model.apply, teacher, part.images, mesh=passes.mesh)
      for teacher, part in teachers
    ]
  )
  loss_fn, context = common.as_seen(
    _loss, model, [incompetent, variables], jnp.float32(temperature), passes
  )
  return common.train(
    *(model, variables, split._replace(retain=retain), keys, passes),
    plan_fn=batches.mixed,
    loss_fn=loss_fn,
    contexts=[context] * passes.num_epochs,
    targets=targets,
  )


@steps.row_loss
def _loss(
  logits: jax.Array, batch: steps.Batch, context: chex.ArrayTree
) -> tuple[jax.Array, steps.Figures]:
  student = jax.nn.log_softmax(logits / context)
  teacher = jax.nn.log_softmax(batch.targets / context)
  losses = jnp.sum(jnp.exp(teacher) * (teacher - student), -1)
  return losses, {
    "loss": losses,
    "accuracy": steps.is_predicted(logits, batch.targets),
  }
