"""SCRUB and SCRUB+R: away from the teacher on one set, close on the other."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import checks, inference, training, types
from psg_jax.baselines import _engine, _plans


def scrub(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_max_epochs: int = 3,
  retain_weight: float = 1.0,
  teacher_weight: float = 0.5,
  temperature: float = 4.0,
  decay_epochs: Sequence[int] = (3, 5, 9),
  num_epochs: int = 5,
  batch_size: int = 64,
  forget_batch_size: int | None = None,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Disobeys a teacher on the forget set and obeys it on the retain set.

  The teacher is the original model, frozen, in inference mode; the student
  starts from a copy of it. A pass takes, in the first `num_max_epochs` passes,
  max steps over the forget set, and then min steps over the retain set:

      max: loss = - d(x_F)
      min: loss = γ mean CE(f_w(x_R), y_R) + α d(x_R)
      d(x) = T² mean KL(softmax(teacher(x) / T) ‖ softmax(f_w(x) / T))

  As the student starts as its teacher, where the gradient of `d` is 0, the min
  steps part the two first. The defaults are those of the experiments of Nahass
  et al. (2025), whose code however gives the student as its own teacher.

  Args:
    model: As for `finetune.finetune`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order.
    num_max_epochs: How many passes have max steps, 0 or more.
    retain_weight: `γ`, 0 or more.
    teacher_weight: `α`, 0 or more.
    temperature: `T`, positive.
    decay_epochs: After these passes the learning rate falls to a tenth, unless
      `optimizer` is given.
    num_epochs: Passes, positive.
    batch_size: Retain images a min step, positive.
    forget_batch_size: Forget images a max step; None for `batch_size`.
    optimizer: Any Optax optimiser, shared by all steps; None for SGD with a
      learning rate of 5e-4, momentum 0.9 and weight decay 5e-4.
    batch_stats: `"update"` or `"frozen"`, of the student.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The student, and one record a pass: `epoch` from 1, `retain_loss` (the
    cross-entropy, nats), accuracy and `distance` (`d`) of the sets that were
    used, such as `retain_accuracy`, `step_losses` and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Kurmanji et al., Towards Unbounded Machine Unlearning, 2023.
  """
  checks.integer("num_max_epochs", num_max_epochs, at_least=0)
  checks.number("retain_weight", retain_weight, at_least=0)
  checks.number("teacher_weight", teacher_weight, at_least=0)
  checks.number("temperature", temperature, above=0)
  if forget_batch_size is None:
    forget_batch_size = batch_size
  checks.integer("forget_batch_size", forget_batch_size, at_least=1)
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
  num_forget, num_retain = len(split.forget), len(split.retain)
  context = jnp.asarray(
    [retain_weight, teacher_weight, temperature], jnp.float32
  )
  passes = []
  for epoch in range(num_epochs):
    max_key, min_key = jax.random.split(jax.random.fold_in(plan_key, epoch))
    phases = []
    if epoch < num_max_epochs:
      plan = _plans.forget_only(max_key, num_forget, forget_batch_size)
      phases.append(_engine.Phase(_max_loss, *plan, context))
    plan = _plans.retain_only(min_key, num_forget, num_retain, batch_size)
    phases.append(_engine.Phase(_min_loss, *plan, context))
    passes.append(phases)
  if optimizer is None:
    ends = np.cumsum([sum(len(x.rows) for x in phases) for phases in passes])
    steps = [int(ends[x - 1]) for x in decay_epochs if 1 <= x <= num_epochs]
    optimizer = training.sgd(_decayed(5e-4, tuple(steps)), weight_decay=5e-4)
  images, labels = _plans.pool(split)
  # Without augmentation the teacher says the same in every pass.
  teacher = inference.predict(model.apply, variables, images, mesh=mesh)
  one_hot = np.eye(teacher.shape[1], dtype=np.float32)[labels]
  return _engine.run(
    model,
    variables,
    images,
    np.stack([one_hot, teacher], 1),
    passes,
    run_key,
    optimizer=optimizer,
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="SCRUB",
    show_progress=show_progress,
  )


def scrub_r(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  validation: types.Dataset | None = None,
  reference_error: float | None = None,
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  **options: Any,
) -> _engine.Output:
  """SCRUB+R: goes back to the pass whose forget error is as it should be.

  A forget error above that of a model that never saw the images gives them
  away. Of the models after each pass, the one is returned whose error on the
  forget set is nearest to the reference: the error of the last model on images
  like the forget set that were not trained on. Of two as near, the later.

  Args:
    model: As for `scrub`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order.
    validation: Images of the forget set's distribution, not trained on.
    reference_error: The reference itself, in [0, 1], instead of `validation`:
      1.0 for a whole class, which a retrained model never predicts.
    callback: As for `scrub`.
    mesh: As for `scrub`.
    **options: Those of `scrub`.

  Returns:
    The model chosen, and the records of `scrub` with `forget_error` after the
    pass and whether it `is_chosen`; the last also has `rewind_seconds`.

  Raises:
    ValueError: As `scrub`, and unless one reference is given.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Kurmanji et al., Towards Unbounded Machine Unlearning, 2023.
  """
  if (validation is None) == (reference_error is None):
    raise ValueError(
      "either validation or reference_error must be given, got"
      f" validation={validation} and reference_error={reference_error}"
    )
  if validation is not None and not len(validation):
    raise ValueError("validation must not be empty, got 0 images")
  if reference_error is not None:
    checks.number("reference_error", reference_error, at_least=0, at_most=1)
  found: list[types.Variables] = []

  def keep(state: training.TrainState, record: dict[str, Any]) -> None:
    found.append(jax.tree.map(jnp.copy, state.variables))
    if callback is not None:
      callback(state, record)

  output = scrub(
    model, variables, split, key, callback=keep, mesh=mesh, **options
  )
  start = time.perf_counter()
  if reference_error is None:
    assert validation is not None  # One of the two is given.
    reference_error = _error(model, output.variables, validation, mesh)
  errors = [_error(model, each, split.forget, mesh) for each in found]
  gaps = np.abs(np.asarray(errors) - reference_error)
  chosen = int(np.flatnonzero(gaps == gaps.min())[-1])
  history = [
    {**record, "forget_error": error, "is_chosen": i == chosen}
    for i, (record, error) in enumerate(
      zip(output.history, errors, strict=True)
    )
  ]
  history[-1]["rewind_seconds"] = time.perf_counter() - start
  return _engine.Output(variables=found[chosen], history=history)


def _error(
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  mesh: jax.sharding.Mesh | None,
) -> float:
  logits = inference.predict(model.apply, variables, dataset.images, mesh=mesh)
  return float(np.mean(logits.argmax(1) != dataset.labels))


@functools.lru_cache
def _decayed(learning_rate: float, steps: tuple[int, ...]) -> optax.Schedule:
  """Divides the rate by ten after these steps; cached for compiled programs."""
  return optax.piecewise_constant_schedule(
    learning_rate, dict.fromkeys(steps, 0.1)
  )


def _distances(
  logits: jax.Array, teacher: jax.Array, temperature: jax.Array
) -> jax.Array:
  """Returns `T² KL(teacher ‖ student)`, `[B]`."""
  student = jax.nn.log_softmax(logits / temperature)
  teacher = jax.nn.log_softmax(teacher / temperature)
  divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), -1)
  return jnp.square(temperature) * divergence


def _evaluate(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  temperature: jax.Array,
) -> tuple[jax.Array, jax.Array, tuple[types.Variables, _engine.Figures]]:
  """Cross-entropy and distance `[B]`, of targets `[B, 2, K]`."""
  logits, variables = apply_fn(variables, batch)
  labels, teacher = batch.targets[:, 0], batch.targets[:, 1]
  losses = training.cross_entropy(logits, labels)
  distances = _distances(logits, teacher, temperature)
  figures = _engine.by_set(
    batch,
    loss=losses,
    distance=distances,
    accuracy=_engine.is_predicted(logits, labels),
  )
  return losses, distances, (variables, figures)


def _max_loss(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
  _, distances, aux = _evaluate(apply_fn, variables, batch, context[2])
  return -jnp.sum(distances * batch.weights), aux


def _min_loss(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
  losses, distances, aux = _evaluate(apply_fn, variables, batch, context[2])
  total = context[0] * losses + context[1] * distances
  return jnp.sum(total * batch.weights), aux
