"""SCRUB and SCRUB+R: away from the teacher on one set, close on the other."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import (
  batches,
  checks,
  engine,
  inference,
  optimizers,
  steps,
  types,
)
from psg_jax.baselines import common

DEFAULTS = {"num_epochs": 5, "description": "SCRUB"}


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
  forget_batch_size: int | None = None,
  **options: Any,
) -> common.Output:
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
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order.
    num_max_epochs: How many passes have max steps, 0 or more.
    retain_weight: `γ`, 0 or more.
    teacher_weight: `α`, 0 or more.
    temperature: `T`, positive.
    decay_epochs: After these passes the learning rate falls to a tenth, unless
      `optimizer` is given.
    forget_batch_size: Forget images a max step; None for `batch_size`.
    **options: Those of `engine.Passes`; by default 5 passes, `batch_size`
      retain images a min step, and SGD with a learning rate of 5e-4, momentum
      0.9 and weight decay 5e-4.

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
  common.check(model, variables, split, key)
  passes = engine.Passes.of(options, DEFAULTS)
  if forget_batch_size is None:
    forget_batch_size = passes.batch_size
  checks.integer("forget_batch_size", forget_batch_size, at_least=1)
  plan_key, run_key = jax.random.split(key)
  num_forget, num_retain = len(split.forget), len(split.retain)
  context = {
    "retain_weight": jnp.float32(retain_weight),
    "teacher_weight": jnp.float32(teacher_weight),
    "temperature": jnp.float32(temperature),
  }
  max_loss, min_loss = (
    common.as_seen(loss, model, [variables], context, passes)
    for loss in (_max_loss, _min_loss)
  )
  phases = []
  for epoch in range(passes.num_epochs):
    max_key, min_key = jax.random.split(jax.random.fold_in(plan_key, epoch))
    up = batches.forget_only(max_key, num_forget, forget_batch_size)
    down = batches.retain_only(
      min_key, num_forget, num_retain, passes.batch_size
    )
    has_max = epoch < num_max_epochs
    phases.append(
      [engine.Phase(max_loss[0], up, max_loss[1])] * has_max
      + [engine.Phase(min_loss[0], down, min_loss[1])]
    )
  if passes.optimizer is None:
    passes = passes.replace(optimizer=_decayed_sgd(phases, decay_epochs))
  images, labels = batches.join(split)
  # Where images are augmented it looks at each minibatch.
  teacher = inference.predict(model.apply, variables, images, mesh=passes.mesh)
  one_hot = np.eye(teacher.shape[1], dtype=np.float32)[labels]
  targets = np.stack([one_hot, teacher], 1)
  state, history = engine.run(
    model, variables, images, targets, phases, run_key, passes
  )
  return common.Output(variables=state.variables, history=history)


def scrub_r(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  validation: types.Dataset | None = None,
  reference_error: float | None = None,
  **options: Any,
) -> common.Output:
  """SCRUB+R: goes back to the pass whose forget error is as it should be.

  A forget error above that of a model that never saw the images gives them
  away. Of the models after each pass, the one is returned whose error on the
  forget set is nearest to the reference: the error of the last model, that of
  SCRUB, on images like the forget set that were not trained on. Of two as near
  it is the earlier, as in the authors' code: with the later, the model is that
  of SCRUB whenever the error stays where it should be. To be like the forget
  set the images are those of its classes, each class with the weight that it
  has there; the authors weigh the images alike.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order.
    validation: Images that were not trained on, some of a class of the forget
      set; of other classes they count for nothing.
    reference_error: The reference itself, in [0, 1], instead of `validation`:
      1.0 for a whole class, which a retrained model never predicts.
    **options: Those of `scrub`, without `state`: models of passes that were
      made before are not at hand.

  Returns:
    The model chosen, and the records of `scrub` with `forget_error` after the
    pass and whether it `is_chosen`; the last also has `rewind_seconds`.

  Raises:
    ValueError: As `scrub`, and unless one reference is given.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Kurmanji et al., Towards Unbounded Machine Unlearning, 2023.
  """
  if options.get("state") is not None:
    raise ValueError("state must be None for scrub_r, got a state")
  if (validation is None) == (reference_error is None):
    raise ValueError(
      "either validation or reference_error must be given, got"
      f" validation={validation} and reference_error={reference_error}"
    )
  if validation is not None:
    weights = _class_weights(validation.labels, split.forget.labels)
  if reference_error is not None:
    checks.number("reference_error", reference_error, at_least=0, at_most=1)
  callback, mesh = options.pop("callback", None), options.get("mesh")
  models: list[types.Variables] = []

  def keep(state: steps.TrainState, record: dict[str, Any]) -> None:
    models.append(jax.tree.map(jnp.copy, state.variables))
    if callback is not None:
      callback(state, record)

  output = scrub(model, variables, split, key, callback=keep, **options)
  start = time.perf_counter()
  if reference_error is None:
    assert validation is not None  # One of the two is given.
    logits = inference.predict(
      model.apply, output.variables, validation.images, mesh=mesh
    )
    is_wrong = logits.argmax(1) != validation.labels
    reference_error = float(is_wrong @ weights)
  errors = [_error(model, x, split.forget, mesh) for x in models]
  gaps = np.abs(np.asarray(errors) - reference_error)
  nearest = int(gaps.argmin())
  history = [
    {**record, "forget_error": error, "is_chosen": i == nearest}
    for i, (record, error) in enumerate(
      zip(output.history, errors, strict=True)
    )
  ]
  history[-1]["rewind_seconds"] = time.perf_counter() - start
  return common.Output(variables=models[nearest], history=history)


def _class_weights(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Weights `[N]` of a mean in which classes count as in the reference."""
  size = max(labels.max(initial=0), reference.max(initial=0)) + 1
  shares = np.bincount(reference, minlength=size) / np.maximum(
    np.bincount(labels, minlength=size), 1
  )
  weights = shares[labels]
  if not weights.sum():
    raise ValueError(
      "validation must have an image of a class of the forget set, got"
      f" {len(labels)} images of others"
    )
  return weights / weights.sum()


def _error(
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  mesh: jax.sharding.Mesh | None,
) -> float:
  logits = inference.predict(model.apply, variables, dataset.images, mesh=mesh)
  return float(np.mean(logits.argmax(1) != dataset.labels))


def _decayed_sgd(
  passes: Sequence[Sequence[engine.Phase]], decay_epochs: Sequence[int]
) -> optax.GradientTransformation:
  """SGD whose rate falls to a tenth after these passes."""
  ends = np.cumsum([sum(len(x.plan.rows) for x in phases) for phases in passes])
  falls = [int(ends[x - 1]) for x in decay_epochs if 1 <= x <= len(passes)]
  return optimizers.sgd(decayed(5e-4, tuple(falls)), weight_decay=5e-4)


@functools.lru_cache
def decayed(learning_rate: float, falls: tuple[int, ...]) -> optax.Schedule:
  """Divides the rate by ten after these steps; cached for compiled programs."""
  return optax.piecewise_constant_schedule(
    learning_rate, dict.fromkeys(falls, 0.1)
  )


def _measures(
  logits: jax.Array, batch: steps.Batch, temperature: jax.Array
) -> steps.Figures:
  """Cross-entropy and `T² KL(teacher ‖ student)`, of targets `[B, 2, K]`."""
  labels = batch.targets[:, 0]
  student = jax.nn.log_softmax(logits / temperature)
  teacher = jax.nn.log_softmax(batch.targets[:, 1] / temperature)
  divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), -1)
  return {
    "loss": steps.cross_entropy(logits, labels),
    "distance": jnp.square(temperature) * divergence,
    "accuracy": steps.is_predicted(logits, labels),
  }


@steps.row_loss
def _max_loss(
  logits: jax.Array, batch: steps.Batch, context: dict[str, jax.Array]
) -> tuple[jax.Array, steps.Figures]:
  figures = _measures(logits, batch, context["temperature"])
  return -figures["distance"], figures


@steps.row_loss
def _min_loss(
  logits: jax.Array, batch: steps.Batch, context: dict[str, jax.Array]
) -> tuple[jax.Array, steps.Figures]:
  figures = _measures(logits, batch, context["temperature"])
  near = context["teacher_weight"] * figures["distance"]
  return context["retain_weight"] * figures["loss"] + near, figures
