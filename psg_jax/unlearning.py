"""Algorithms 2 and 3: move a trained model to the relabelled forget set.

`unlearn` is the whole job; its parts are `relabel` (Algorithm 1 over a data
set, and the targets that follow) and `update` (the outer loop), for those who
bring labels of their own.
"""

import dataclasses
import importlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import (
  batches,
  boundary,
  checks,
  engine,
  last_layers,
  levels,
  optimizers,
  refits,
  relabelling,
  steps,
  streaming,
  training,
  types,
)

Relabelling = relabelling.Relabelling
SearchFn = relabelling.SearchFn
check_labels = relabelling.check_labels
gone_classes = relabelling.gone_classes
relabel = relabelling.relabel
soft_targets = relabelling.soft_targets
Targets = relabelling.Targets
# Fewer steps leave a small model between the old labels and the new; small
# minibatches need as many images.
_MIN_STEPS = 120
_MIN_IMAGES = 960
SCHEDULE = "one_cycle"
# Small minibatches, of which retained images are the most: of the mixtures that
# were tried at one cost, nearest to retrained models (docs/targets.md).
BATCH_SIZE = 8
# Where the last layers alone are moved, with the statistics as they are.
LAST_LAYERS_BATCH_SIZE = 4
RETAIN_SHARE = 3
LEARNING_RATE = 1e-2
SEARCH_DEFAULTS = {
  "num_steps": 50,
  "step_size": 0.03,
  "step_growth": 2.0,
  "num_bisections": 3,
}
SEARCH_NAMES, TARGET_NAMES = (
  tuple(field.name for field in dataclasses.fields(value) if field.init)
  for value in (boundary.Search, relabelling.Targets)
)


def __getattr__(name: str) -> Any:
  """Offers the grid, which stands on this module, under its name as well."""
  if name in ("unlearn_grid", "grid_of"):
    return getattr(importlib.import_module("psg_jax.grids"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@types.pytree
class UnlearnOutput:
  """What unlearning returns, by this method or another.

  Attributes:
    variables: The unlearned model's, new arrays.
    history: One record a pass: `epoch` from 1, `seconds` (without callbacks),
      and the method's own figures; see `update`. The first also says how many
      `search_seconds` went before it, on search and new last layers.
    targets: Targets of the forget set in the last pass: int32 classes `[N]`
      for hard labels, float32 `[N, K]` for soft ones. None of other methods.
    relabelling: What the search found, in the last pass. None of other methods.
  """

  variables: types.Variables
  history: engine.History
  targets: np.ndarray | None = None
  relabelling: Relabelling | None = None


def unlearn(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  search_fn: SearchFn | None = None,
  search_batch_size: int = 128,
  eval_batch_size: int = 256,
  retain_weight: float = 1.0,
  retain_batch_size: int | None = None,
  targets: np.ndarray | None = None,
  refresh_labels: bool = False,
  target_accuracy: float | None = None,
  max_cycles: int = 1,
  num_layers: int | None = None,
  **options: Any,
) -> UnlearnOutput:
  """Takes the forget set out of a trained model.

  Says for each forget image what a model that never saw it would, from the
  frozen model's predictions at the image and at a point across the decision
  boundary (Algorithm 1), then moves a copy of the model to these targets while
  it stays right on retained images (Algorithms 2 and 3). The defaults are those
  that came nearest to retrained models, not those of the released code.

  Args:
    model: The network.
    variables: The original model's, frozen and left as they are.
    split: The forget and the retain set.
    key: One typed key.
    search_fn: A `boundary.Search` or another search, in place of its options;
      None for those.
    search_batch_size: Images searched at a time, and likewise
      `eval_batch_size`, images predicted at a time: what fits the memory; the
      result is the same, but that of a `search_fn` that looks at its batch.
    eval_batch_size: See there.
    retain_weight: `φ`, 0 or more; 0 uses no retain image.
    retain_batch_size: Retain images a step, positive; by default three for
      each forget image.
    targets: float `[N, K]` or int `[N]` of the forget set, in place of those
      of `labels`, such as of `proxies.fit`; nothing is searched then.
    refresh_labels: Whether to search again before each pass, with new noise.
      Without noise the labels cannot change and are searched once.
    target_accuracy: Stop as soon as the accuracy on the forget set, by its true
      labels, is at or below this, in [0, 1]; None to make all passes. A model
      that was retrained without a class has 0, but one retrained without a
      camera or a patient knows others of their kind, and is right about as
      often as on unseen images of the kind: that is the target then. Where the
      original model is there already, it is returned, with the targets of a
      first pass and an empty history. Above 0, the targets of `soft_other` are
      moved back to the original's predictions until as many of them name the
      old class (`levels.at_accuracy`). Soft targets have it in them: they stop
      after whole cycles, where it is at a standard deviation of so many images
      above, or a cycle brings it no nearer by as much (`levels.is_reached`).
    max_cycles: Where a target accuracy is not reached in all passes, they are
      made again, so often in all, each with a schedule of its own.
    num_layers: The last so many layers are moved (`last_layers.choose`), never
      the first; the others stay as they are, and BatchNorm is in inference mode
      unless `batch_stats` says otherwise; 0 moves all. None for 4 where whole
      classes are forgotten by `soft_other` labels and the layers have names
      that are known, which is as near to retraining at half the cost of a
      step, else 0.
    **options: Those of `relabelling.Targets`, such as `labels`; of
      `boundary.Search`, by default those of `SEARCH_DEFAULTS`; and of
      `engine.Passes`, by default those of `update`, but for 2 passes at least
      where the last layers alone are moved. `augment_fn` had better be that of
      training; new last layers are trained with it as well. Where
      `retain_weight` is 0 and all layers are moved, `batch_stats="frozen"` is
      the better choice.

  Returns:
    The unlearned variables, the targets, and the history.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Nahass et al., Targeted Unlearning Using Perturbed Sign Gradient Methods
    With Applications On Medical Images, 2025, Algorithms 1 to 3.
  """
  named = dict(options)
  target_options = _taken(options, TARGET_NAMES)
  _taken(options, SEARCH_NAMES)
  taught = relabelling.Targets(**target_options)
  check_labels(taught.labels, taught.top_k, split.forget.num_classes)
  form = taught.labels if targets is None else "given"
  passes = read_passes(
    *(model, variables, split, retain_weight, options),
    labels=form,
    num_layers=num_layers,
    others=tuple(defaults()),
  )
  cycle = passes.num_epochs
  checks.integer("search_batch_size", search_batch_size, at_least=1)
  checks.integer("eval_batch_size", eval_batch_size, at_least=1)
  checks.integer("max_cycles", max_cycles, at_least=1)
  if retain_batch_size is not None:
    checks.integer("retain_batch_size", retain_batch_size, at_least=1)
  if target_accuracy is not None:
    checks.number("target_accuracy", target_accuracy, at_least=0, at_most=1)
    num_steps = passes.num_epochs * _num_steps(split, passes.batch_size)
    if max_cycles > 1:
      passes = passes.replace(
        num_epochs=max_cycles * passes.num_epochs,
        schedule=optimizers.repeated(passes.schedule, num_steps),
      )
  if targets is not None:
    targets = checked_targets("targets", targets, split.forget)
  checks.key(key)
  search_fn = search_of(named) if search_fn is None else search_fn
  is_searched = targets is None and taught.is_searched
  if is_searched and isinstance(search_fn, boundary.Search):
    _check_search(search_fn, model, variables, split.forget, key)
    refresh_labels = refresh_labels and bool(search_fn.noise_scale > 0)
  refresh_labels = refresh_labels and is_searched
  num_refits = refits.count(
    *(taught.num_refits, variables, split),
    labels=form,
    retain_weight=retain_weight,
  )
  search_key, update_key = jax.random.split(key)
  teacher = relabelling.Teacher(
    *(model, variables, split, search_key, taught, search_fn),
    accuracy=target_accuracy,
    num_refits=num_refits,
    augment_fn=passes.augment_fn,
    search_batch_size=search_batch_size,
    eval_batch_size=eval_batch_size,
    mesh=passes.mesh,
    show_progress=passes.show_progress,
  )
  retain_targets = split.retain.labels
  if taught.retain_labels != "hard" and retain_weight > 0:
    retain_targets = taught.of_retain(teacher.predict(split.retain.images))

  def search(index: int) -> tuple[Relabelling | None, np.ndarray]:
    return (None, targets) if targets is not None else teacher.teach(index)

  has_level = form == "soft_other" if targets is None else targets.ndim == 2

  reached = levels.stop_fn(split.forget.labels, target_accuracy or 0, has_level)

  def is_reached(current: types.Variables) -> bool:
    if target_accuracy is None:
      return False
    if current is variables:
      return reached(teacher.image_logits, True)
    return reached(teacher.predict(split.forget.images, current), False)

  def move(targets: np.ndarray, changed: engine.Passes) -> Any:
    return _update(
      *(model, variables, split, targets, update_key, changed),
      retain_targets=retain_targets,
      retain_weight=retain_weight,
      retain_batch_size=retain_batch_size,
    )

  return _search_and_move(
    *(variables, split, passes, search, move, is_reached),
    is_refreshed=refresh_labels,
    every=cycle if has_level and target_accuracy is not None else 1,
  )


def search_of(options: Mapping[str, Any]) -> boundary.Search:
  """Returns the search that `unlearn` makes of its options, with defaults."""
  return boundary.Search(
    **SEARCH_DEFAULTS | _taken(dict(options), SEARCH_NAMES)
  )


def _taken(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
  """Takes the options of these names out of all."""
  return {name: options.pop(name) for name in names if name in options}


def defaults() -> dict[str, Any]:
  """Returns all options of `unlearn` by name, with their defaults.

  None stands for what depends on the data or on another option.
  """
  parameters = inspect.signature(unlearn).parameters.values()
  return {
    **engine.field_defaults(boundary.Search),
    **SEARCH_DEFAULTS,
    **engine.field_defaults(relabelling.Targets),
    **engine.field_defaults(engine.Passes),
    "schedule": SCHEDULE,
    "batch_size": None,
    **{x.name: x.default for x in parameters if x.kind is x.KEYWORD_ONLY},
  }


def _search_and_move(
  variables: types.Variables,
  split: types.Split,
  passes: engine.Passes,
  search: Callable[[int], tuple[Relabelling | None, np.ndarray]],
  move: Callable[..., tuple[steps.TrainState, engine.History]],
  is_reached: Callable[[types.Variables], bool],
  *,
  is_refreshed: bool,
  every: int,
) -> UnlearnOutput:
  """Searches once and makes all passes, or searches before each of them.

  The target is looked for after `every` passes each: soft targets have the
  level in them, and a schedule cut off at its height ends far from them.
  """
  num_steps = _num_steps(split, passes.batch_size)
  num_epochs, state = passes.num_epochs, passes.state
  step = 0 if state is None else int(state.step)
  next_pass = step // num_steps + 1
  numbers = itertools.count(next_pass)
  is_done = step % (every * num_steps) == 0 and is_reached(
    variables if state is None or step == 0 else state.variables
  )

  def is_last(current: types.Variables) -> bool:
    nonlocal is_done
    is_stopped = passes.stop_fn is not None and passes.stop_fn(current)
    is_end = next(numbers) % every == 0
    is_done = bool(is_stopped) or (is_end and is_reached(current))
    return is_done

  ends: Iterable[int] = [num_epochs]
  shared = passes.replace(stop_fn=is_last)
  if is_refreshed:
    # Each call knows but the passes until then.
    ends = range(min(next_pass, num_epochs), num_epochs + 1)
    rates = optimizers.schedule_fn(passes.schedule, num_epochs * num_steps)
    shared = shared.replace(schedule=rates)
  history: engine.History = []
  for number, end in enumerate(ends):
    is_searched = is_refreshed or number == 0
    start = time.perf_counter()
    if is_searched:
      relabelling, targets = search(end - 1 if is_refreshed else 0)
    seconds = time.perf_counter() - start
    if is_done:
      break
    state, records = move(targets, shared.replace(num_epochs=end, state=state))
    if records and is_searched:
      records[0]["search_seconds"] = seconds
    history += records
    # The targets returned are those of the last pass.
    if is_done:
      break
  if state is None:
    variables = jax.tree.map(jnp.copy, steps.plain_variables(variables))
  return UnlearnOutput(
    variables=variables if state is None else state.variables,
    targets=targets,
    history=history,
    relabelling=relabelling,
  )


def _check_search(
  search: boundary.Search,
  model: types.Model,
  variables: types.Variables,
  forget_set: types.Dataset,
  key: jax.Array,
) -> None:
  """Checks a search on one image, which is enough, before any work."""
  one = forget_set.take([0])
  images = steps.to_float(jnp.asarray(one.images))
  search.prepare(model.apply, variables, images, jnp.asarray(one.labels), key)


def default_num_epochs(
  num_forget: int, batch_size: int, *, is_of_last_layers: bool = False
) -> int:
  """1 pass, of last layers alone 2, or what makes 120 steps of 960 images."""
  num_steps = max(_MIN_STEPS, -(-_MIN_IMAGES // batch_size))
  num_epochs = -(-num_steps // -(-num_forget // batch_size))
  return max(num_epochs, 1 + is_of_last_layers)


def update(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  targets: np.ndarray,
  key: jax.Array,
  *,
  retain_targets: np.ndarray | None = None,
  retain_weight: float = 1.0,
  retain_batch_size: int | None = None,
  **options: Any,
) -> tuple[steps.TrainState, engine.History]:
  """Moves a copy of the model to the targets of the forget set.

  For each minibatch of the forget set, with one of the retain set beside it:

      loss = mean CE(f_w(x_F), target_F) + φ mean CE(f_w(x_R), target_R)

  Args:
    model: The network.
    variables: Where to start; left as they are.
    split: The forget and the retain set.
    targets: Of the forget set: int `[N]` classes or float `[N, K]`.
    key: One typed key, for the order.
    retain_targets: Of the retain set, likewise; None for its labels.
    retain_weight: `φ`, 0 or more; 0 uses no retain image.
    retain_batch_size: Retain images a step, positive; by default three for
      each forget image.
    **options: Those of `engine.Passes`, by default `batch_size=8`, of forget
      images, `num_epochs` of 1, or as many as make 120 steps of 960 images at
      least, over the forget set, `schedule="one_cycle"`, and
      `training.sgd(1e-2)`, or `sgd(1e-3)` with a constant rate.

  Returns:
    The final state, and one record a pass: `epoch` from 1, `forget_loss` and
    `retain_loss` (nats) and `label_accuracy` and `retain_accuracy` (share of
    forget images predicted as their new labels, and of retained images as
    theirs) as it went, `seconds`, and
    `forget_step_losses` and `retain_step_losses`, one a step.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.
  """
  passes = read_passes(
    *(model, variables, split, retain_weight, options),
    others=("retain_targets", "retain_weight", "retain_batch_size"),
  )
  checks.key(key)
  return _update(
    *(model, variables, split, targets, key, passes),
    retain_targets=retain_targets,
    retain_weight=retain_weight,
    retain_batch_size=retain_batch_size,
  )


def read_passes(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  retain_weight: float,
  options: Mapping[str, Any],
  *,
  labels: str = "given",
  num_layers: int | None = None,
  others: Sequence[str] = (),
) -> engine.Passes:
  """Checks what `unlearn` and `update` share, and fills up the options."""
  check_parts(model, variables, split, retain_weight)
  given = options.get("trainable")
  trainable = last_layers.moved(variables, split, labels, num_layers, given)
  fixed: dict[str, Any] = {}
  if trainable is not given:
    fixed = {
      "batch_stats": "frozen",
      "trainable": trainable,
      "batch_size": LAST_LAYERS_BATCH_SIZE,
    }
  # Replaced below, where the size of the minibatches is known.
  passes = engine.Passes.of(
    options,
    {"schedule": SCHEDULE, "num_epochs": 1, "batch_size": BATCH_SIZE} | fixed,
    others=others,
  )
  engine.read_trainable(passes.trainable, variables)
  if options.get("num_epochs") is None:
    num_epochs = default_num_epochs(
      len(split.forget), passes.batch_size, is_of_last_layers=bool(fixed)
    )
    passes = passes.replace(num_epochs=num_epochs)
  if passes.optimizer is None:
    rate = default_rate(passes.schedule)
    passes = passes.replace(optimizer=training.sgd(rate))
  return passes


def default_rate(schedule: optimizers.Schedule) -> float:
  """Returns the learning rate of the default optimiser, the highest."""
  return 1e-3 if schedule == "constant" else LEARNING_RATE


def _update(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  targets: np.ndarray,
  key: jax.Array,
  passes: engine.Passes,
  *,
  retain_targets: np.ndarray | None,
  retain_weight: float,
  retain_batch_size: int | None,
) -> tuple[steps.TrainState, engine.History]:
  """`update`, with its options checked."""
  images: np.ndarray | streaming.Images = split.forget.images
  targets = checked_targets("targets", targets, split.forget)
  if retain_weight > 0:
    if retain_targets is None:
      retain_targets = split.retain.labels
    retain_targets = checked_targets(
      "retain_targets", retain_targets, split.retain
    )
    images = streaming.concatenate([images, split.retain.images])
    if targets.ndim != retain_targets.ndim:
      num_classes = split.forget.num_classes
      targets = as_probabilities(targets, num_classes)
      retain_targets = as_probabilities(retain_targets, num_classes)
    targets = np.concatenate([targets, retain_targets])
  if retain_batch_size is None:
    retain_batch_size = RETAIN_SHARE * passes.batch_size
  checks.integer("retain_batch_size", retain_batch_size, at_least=1)
  sizes = len(split.forget), len(split.retain), passes.batch_size
  plans = batches.each_pass(
    training.order_key(passes.state, key),
    passes.num_epochs,
    lambda key: batches.beside_forget(
      key, *sizes, retain_weight, retain_batch_size
    ),
  )
  return engine.run(
    model,
    variables,
    images,
    targets,
    [[engine.Phase(steps.mean_cross_entropy, plan)] for plan in plans],
    key,
    passes,
    record_fn=read_report,
  )


def read_report(report: engine.Report) -> dict[str, Any]:
  """Loss and accuracy on the new labels, and on retained images."""
  record: dict[str, Any] = {}
  is_real, is_forget = report.plan.weights > 0, report.plan.is_forget
  for name, is_part in (("forget", is_forget), ("retain", ~is_forget)):
    if (is_real & is_part).any():
      summary = engine.summarise(report, is_real & is_part)
      record |= {f"{name}_{what}": x for what, x in summary.items()}
  # Of the new labels: it rises as the forget set is forgotten.
  record["label_accuracy"] = record.pop("forget_accuracy")
  return record


def _num_steps(split: types.Split, batch_size: int) -> int:
  """Minibatches of a pass over the forget set."""
  return -(-len(split.forget) // min(batch_size, len(split.forget)))


def as_probabilities(targets: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns targets float32 `[N, K]`, of classes `[N]` where they are that."""
  if targets.ndim == 2:
    return targets
  return np.eye(num_classes, dtype=np.float32)[targets]


def check_parts(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  retain_weight: float,
) -> None:
  """Raises ValueError unless the split is one that the model can unlearn."""
  check_split(split, retain_weight)
  for part in split:
    if len(part):
      steps.check_classes(model, variables, part)


def check_split(split: types.Split, retain_weight: float) -> None:
  """Raises ValueError unless there is something to forget and to retain."""
  checks.number("retain_weight", retain_weight, at_least=0)
  if not len(split.forget):
    raise ValueError("the forget set must not be empty, got 0 images")
  if not len(split.retain) and retain_weight > 0:
    raise ValueError(
      "the retain set must not be empty with"
      f" retain_weight={retain_weight}, got 0 images"
    )


def checked_targets(
  name: str, targets: np.ndarray, dataset: types.Dataset
) -> np.ndarray:
  """Returns the targets as int32 `[N]` or float32 `[N, K]`."""
  targets = np.asarray(targets)
  num_images, num_classes = len(dataset), dataset.num_classes
  is_integer = np.issubdtype(targets.dtype, np.integer)
  if targets.shape == (num_images,) and is_integer:
    if targets.min() < 0 or targets.max() >= num_classes:
      raise ValueError(
        f"{name} must be in [0, {num_classes}), got values from"
        f" {targets.min()} to {targets.max()}"
      )
    return targets.astype(np.int32)
  if targets.shape != (num_images, num_classes) or is_integer:
    raise ValueError(
      f"{name} must be int [{num_images}] or float"
      f" [{num_images}, {num_classes}], got"
      f" {targets.dtype} {list(targets.shape)}"
    )
  if not np.isfinite(targets).all():
    raise ValueError(f"{name} must be finite, got NaN or infinity")
  return targets.astype(np.float32)
