"""Bad Teacher: a competent teacher on one set, a random one on the other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import checks, inference, types
from psg_jax.baselines import _engine, _plans


def bad_teacher(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_fraction: float = 0.3,
  temperature: float = 1.0,
  num_epochs: int = 1,
  batch_size: int = 256,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Learns from the original model on R and from a random network on F.

      loss = mean_i KL(softmax(t_i / T) ‖ softmax(f_w(x_i) / T))

  with `t` the logits of the original model on the retain set, and of a freshly
  initialised one on the forget set; both are frozen, in inference mode. The
  minibatches are of both sets shuffled together. The released code takes the
  mean over classes too, which scales the loss by `1 / K`.

  Args:
    model: As for `finetune.finetune`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the incompetent teacher, the choice and the order.
    retain_fraction: Part of the retain set that is used, drawn at random, in
      (0, 1].
    temperature: `T`, positive.
    num_epochs: Passes over these images, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for Adam with a learning rate of 1e-4.
    batch_stats: `"update"` or `"frozen"`, of the student.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

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
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
    batch_stats=batch_stats,
  )
  init_key, choice_key, plan_key, run_key = jax.random.split(key, 4)
  retain = _plans.take_fraction(split.retain, retain_fraction, choice_key)
  incompetent = _engine.fresh_variables(model, split, init_key)
  teachers = ((incompetent, split.forget), (variables, retain))
  targets = np.concatenate(
    [
      inference.predict(model.apply, teacher, part.images, mesh=mesh)
      for teacher, part in teachers
    ]
  )
  sizes = len(split.forget), len(retain), batch_size
  plans = _plans.each_pass(
    plan_key, num_epochs, lambda key: _plans.mixed(key, *sizes)
  )
  context = jnp.float32(temperature)
  return _engine.run(
    model,
    variables,
    _plans.pool(split._replace(retain=retain))[0],
    targets,
    [[_engine.Phase(_loss, *plan, context)] for plan in plans],
    run_key,
    optimizer=optimizer or _engine.adam(1e-4),
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="Bad Teacher",
    show_progress=show_progress,
  )


def _loss(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
  logits, variables = apply_fn(variables, batch)
  student = jax.nn.log_softmax(logits / context)
  teacher = jax.nn.log_softmax(batch.targets / context)
  losses = jnp.sum(jnp.exp(teacher) * (teacher - student), -1)
  is_same = _engine.is_predicted(logits, batch.targets)
  return jnp.sum(losses * batch.weights), (
    variables,
    _engine.by_set(batch, loss=losses, accuracy=is_same),
  )
