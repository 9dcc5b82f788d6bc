"""Algorithms 2 and 3: move a trained model to the relabelled forget set.

`unlearn` is the whole job; its parts are `relabel` (Algorithm 1 over a data
set, and the targets that follow) and `update` (the outer loop), for those who
bring labels of their own.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import (
  boundary,
  checks,
  inference,
  parallel,
  progress,
  streaming,
  training,
  types,
)

_RELABELLING_FIELDS = (
  "labels",
  "logits",
  "is_crossed",
  "distance",
  "num_steps",
)
LABELS = ("hard", "soft", "soft_other", "raw_logits")
RETAIN_LABELS = ("hard", "soft", "raw_logits")
# Fewer steps leave a small model between the old labels and the new.
_MIN_STEPS = 60
_MIN_EPOCHS = 3
BATCH_STATS = ("update", "frozen")
SEARCH_DEFAULTS = {"num_steps": 50, "step_size": 0.01}


class SearchFn(Protocol):
  """A search with its options bound, such as a partial of `boundary.search`."""

  def __call__(
    self,
    apply_fn: types.ApplyFn,
    variables: types.Variables,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
  ) -> boundary.SearchOutput:
    """Searches from float images `[B, H, W, C]`; `key` is one or `[B]`."""
    ...


@types.pytree
class Relabelling:
  """The outcome of the search over the forget set.

  Attributes:
    labels: int32 `[N]`, the class reached, or the runner-up.
    logits: float32 `[N, K]` at the last point.
    is_crossed: bool `[N]`, whether the boundary was crossed.
    distance: float32 `[N]`, in pixel units.
    num_steps: int32 `[N]`.
  """

  labels: np.ndarray
  logits: np.ndarray
  is_crossed: np.ndarray
  distance: np.ndarray
  num_steps: np.ndarray


@types.pytree
class UnlearnOutput:
  """What unlearning returns.

  Attributes:
    variables: The unlearned model's.
    targets: Targets of the forget set in the last pass: int32 classes `[N]`
      for hard labels, float32 `[N, K]` for soft ones.
    history: One record a pass; see `update`. The first also says how many
      `search_seconds` went before it.
    relabelling: What the search found, in the last pass.
  """

  variables: types.Variables
  targets: np.ndarray
  history: training.History
  relabelling: Relabelling


def unlearn(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  search_fn: SearchFn | None = None,
  search_batch_size: int = 128,
  eval_batch_size: int = 256,
  optimizer: optax.GradientTransformation | None = None,
  num_epochs: int | None = None,
  batch_size: int = 64,
  schedule: training.Schedule = "one_cycle",
  retain_weight: float = 1.0,
  labels: str = "hard",
  retain_labels: str | None = None,
  top_k: int | None = None,
  batch_stats: str = "update",
  refresh_labels: bool = False,
  target_accuracy: float | None = None,
  num_parts: int = 1,
  callback: Callable[[training.TrainState, dict[str, Any]], None] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
  **search_options: Any,
) -> UnlearnOutput:
  """Takes the forget set out of a trained model.

  Searches a near class across the decision boundary of the frozen model for
  each forget image (Algorithm 1), then moves a copy of the model to these
  labels while it stays right on retained images (Algorithms 2 and 3). The
  defaults are those that worked best, not those of the released code.

  Args:
    model: The network.
    variables: The original model's, frozen and left as they are.
    split: The forget and the retain set.
    key: One typed key.
    search_fn: A `boundary.Search` or another search, in place of
      `search_options`; None for those.
    search_batch_size: Images searched at a time, and likewise
      `eval_batch_size`, images predicted at a time: what fits the memory; the
      result is the same, but that of a `search_fn` that looks at its batch.
    eval_batch_size: See there.
    optimizer: Any Optax optimiser, whose learning rate is the highest; None for
      `training.sgd(2e-3)`, and `training.sgd(1e-3)` with a constant rate.
    num_epochs: Passes over the forget set, positive; None for 3, or as many
      as make 60 steps.
    batch_size: Forget images, and as many retain images, a step.
    schedule: Of the learning rate, as for `training.schedule_fn`.
    retain_weight: `φ`, 0 or more; 0 uses no retain image.
    labels: `"hard"`: the class reached; `"soft"`: the prediction at the
      boundary point; `"soft_other"`: the same among the other classes, so that
      no probability of the old class is taught again; `"raw_logits"`: as the
      released code has it, logits where probabilities belong (it can destroy a
      model: for comparison only).
    retain_labels: Targets of the retain set: `"hard"`, its labels; `"soft"`,
      the frozen model's own predictions; `"raw_logits"`. None for those of
      `labels`, and hard ones with `"soft_other"`.
    top_k: With soft labels, the number of largest entries kept, or None.
    batch_stats: `"update"`: BatchNorm in training mode, on forget and retain
      images together; `"frozen"`: inference mode, the better choice where
      `retain_weight` is 0.
    refresh_labels: Whether to search again before each pass, with new noise.
      Without noise the labels cannot change and are searched once.
    target_accuracy: Stop as soon as the accuracy on the forget set, by its true
      labels, is at or below this, in [0, 1]; None to make all passes. A model
      that was retrained without a class has 0, but one retrained without a
      camera or a patient knows others of their kind, and is right about as
      often as on unseen images of the kind: that is the target then. Where the
      original model is there already, it is returned as it is, and the history
      is empty; the targets are then those that a first pass would have used.
    num_parts: Gradient accumulation; see `training.run_steps`.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show progress bars.
    **search_options: Those of `boundary.Search`, by default `num_steps=50` and
      `step_size=0.01`.

  Returns:
    The unlearned variables, the targets, and the history.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Nahass et al., Targeted Unlearning Using Perturbed Sign Gradient Methods
    With Applications On Medical Images, 2025, Algorithms 1 to 3.
  """
  check_split(split, retain_weight)
  for part in split:
    if len(part):
      training.check_classes(model, variables, part)
  check_labels(labels, top_k, split.forget.num_classes)
  if retain_labels is None:
    retain_labels = "hard" if labels == "soft_other" else labels
  checks.one_of("retain_labels", retain_labels, RETAIN_LABELS)
  checks.one_of("batch_stats", batch_stats, BATCH_STATS)
  checks.key(key)
  checks.integer("batch_size", batch_size, at_least=1)
  checks.integer("num_parts", num_parts, at_least=1)
  if num_epochs is None:
    num_epochs = default_num_epochs(len(split.forget), batch_size)
  checks.integer("num_epochs", num_epochs, at_least=1)
  training.check_schedule(schedule)
  checks.integer("search_batch_size", search_batch_size, at_least=1)
  checks.integer("eval_batch_size", eval_batch_size, at_least=1)
  if target_accuracy is not None:
    checks.number("target_accuracy", target_accuracy, at_least=0, at_most=1)
  if search_fn is None:
    search_fn = boundary.Search(**{**SEARCH_DEFAULTS, **search_options})
  can_change = True
  if isinstance(search_fn, boundary.Search):
    can_change = bool(search_fn.noise_scale > 0)
    # One image is enough to check before any work.
    one = split.forget.take([0])
    images = training.to_float(jnp.asarray(one.images))
    search_fn.prepare(
      model.apply, variables, images, jnp.asarray(one.labels), key
    )
  search_key, update_key = jax.random.split(key)
  predict = functools.partial(
    inference.predict, model.apply, batch_size=eval_batch_size, mesh=mesh
  )
  retain_targets = split.retain.labels
  if retain_labels != "hard" and retain_weight > 0:
    logits = predict(variables, split.retain.images)
    retain_targets = soft_targets(logits, labels=retain_labels, top_k=top_k)
  is_refreshed = refresh_labels and can_change
  if is_refreshed:
    # Each call of `update` knows but the passes until then.
    schedule = training.schedule_fn(
      schedule, num_epochs * _num_steps(split, batch_size)
    )

  def is_reached(current: types.Variables) -> bool:
    if target_accuracy is None:
      return False
    logits = predict(current, split.forget.images)
    is_right = np.argmax(logits, -1) == split.forget.labels
    return bool(is_right.mean() <= target_accuracy)

  state: training.TrainState | None = None
  history: training.History = []
  is_done = is_reached(variables)
  for first_epoch in range(num_epochs if is_refreshed else 1):
    start = time.perf_counter()
    found = relabel(
      model.apply,
      variables,
      split.forget,
      jax.random.fold_in(search_key, first_epoch),
      search_fn=search_fn,
      batch_size=search_batch_size,
      mesh=mesh,
      show_progress=show_progress,
    )
    search_seconds = time.perf_counter() - start
    targets = found.labels
    if labels != "hard":
      targets = soft_targets(
        found.logits,
        labels=labels,
        top_k=top_k,
        old_labels=split.forget.labels,
      )
    if is_done:
      break
    state, records = update(
      model,
      variables,
      split,
      targets,
      update_key,
      retain_targets=retain_targets,
      optimizer=optimizer,
      num_epochs=first_epoch + 1 if is_refreshed else num_epochs,
      batch_size=batch_size,
      schedule=schedule,
      retain_weight=retain_weight,
      batch_stats=batch_stats,
      num_parts=num_parts,
      callback=callback,
      # One pass a call is asked about below, where it also ends the search.
      stop_fn=None if is_refreshed else is_reached,
      state=state,
      mesh=mesh,
      show_progress=show_progress,
    )
    records[0]["search_seconds"] = search_seconds
    history += records
    # The targets returned are those of the last pass.
    if is_refreshed and is_reached(state.variables):
      break
  if state is None:
    variables = jax.tree.map(jnp.copy, training.plain_variables(variables))
  else:
    variables = state.variables
  return UnlearnOutput(
    variables=variables,
    targets=targets,
    history=history,
    relabelling=found,
  )


def relabel(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  dataset: types.Dataset,
  key: jax.Array,
  *,
  search_fn: SearchFn,
  batch_size: int = 128,
  first_steps: int = 8,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> Relabelling:
  """Searches a near class across the boundary for a whole data set.

  Args:
    apply_fn: The frozen network in inference mode.
    variables: Its variables.
    dataset: The forget set.
    key: One typed key; image `i` draws with `fold_in(key, i)`, whatever the
      batch size.
    search_fn: A `boundary.Search`, or another search with its options bound.
    batch_size: Images at a time, positive; the last batch is filled up.
    first_steps: Of a `boundary.Search` with twice as many or more. Most images
      are across the boundary by then: only those that are not are searched
      again, from the start, so that a batch does not wait for its slowest
      image. The result is the same.
    mesh: Devices that a `boundary.Search` works on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The classes reached and how the search went, `[N]` each.

  Raises:
    ValueError: If an argument is out of its range.
  """
  checks.integer("batch_size", batch_size, at_least=1)
  checks.integer("first_steps", first_steps, at_least=1)
  checks.key(key)
  if not len(dataset):
    raise ValueError("dataset must not be empty, got 0 images")
  num_images = len(dataset)
  batch_size = min(batch_size, num_images)
  found: dict[str, np.ndarray] = {}

  def run(
    rows: np.ndarray, search: SearchFn, last_step: int | None = None
  ) -> None:
    """Searches these rows, and keeps what was found."""
    fn = search
    if mesh is not None and isinstance(search, boundary.Search):
      fn = functools.partial(parallel.search, mesh=mesh, search=search)
    # The last batch is filled up from the first image on: one program.
    plan = [
      rows[np.arange(start, start + batch_size) % len(rows)]
      for start in range(0, len(rows), batch_size)
    ]
    starts = range(0, len(rows), batch_size)
    for start, chosen, images in zip(
      starts, plan, streaming.batches(dataset.images, plan), strict=True
    ):
      real = chosen[: len(rows) - start]
      output = fn(
        apply_fn,
        variables,
        training.to_float(jnp.asarray(images)),
        jnp.asarray(dataset.labels[chosen]),
        boundary.sample_keys(key, jnp.asarray(chosen)),
      )
      for name in _RELABELLING_FIELDS:
        values = np.asarray(getattr(output, name))[: len(real)]
        if name not in found:
          shape = (num_images, *values.shape[1:])
          found[name] = np.zeros(shape, values.dtype)
        found[name][real] = values
      num_done = len(real)
      if last_step is not None:
        num_done = int((found["num_steps"][real] < last_step).sum())
      bar.advance(num_done, crossed=float(found["is_crossed"][real].mean()))

  with progress.bar(
    "boundary search", num_images, unit="image", is_shown=show_progress
  ) as bar:
    rows = np.arange(num_images)
    if (
      isinstance(search_fn, boundary.Search)
      and search_fn.num_steps >= 2 * first_steps
      # This schedule knows the number of steps.
      and search_fn.distance_decay != "linear"
    ):
      short = dataclasses.replace(search_fn, num_steps=first_steps)
      run(rows, short, first_steps)
      rows = np.flatnonzero(found["num_steps"] >= first_steps)
    if rows.size:
      run(rows, search_fn)
  return Relabelling(**found)


def default_num_epochs(num_forget: int, batch_size: int) -> int:
  """Returns 3 passes, or as many as make 60 steps."""
  return max(_MIN_EPOCHS, -(-_MIN_STEPS // -(-num_forget // batch_size)))


def soft_targets(
  logits: np.ndarray,
  *,
  labels: str = "soft",
  top_k: int | None = None,
  old_labels: np.ndarray | None = None,
) -> np.ndarray:
  """Turns predictions into targets (Algorithm 3).

  Args:
    logits: float `[N, K]`.
    labels: `"soft"`: the softmax; `"soft_other"`: the softmax over the classes
      other than `old_labels`; `"raw_logits"`: the logits themselves, as in the
      released code, which feeds them where probabilities belong.
    top_k: Number of largest entries kept, the others becoming 0; probabilities
      are then normalised again. None keeps all.
    old_labels: int `[N]`, needed for `"soft_other"`.

  Returns:
    float32 `[N, K]`; probabilities sum to 1 in each row.

  Raises:
    ValueError: If an argument is missing or out of its range.
  """
  num_classes = logits.shape[-1]
  check_labels(labels, top_k, num_classes)
  targets = jnp.asarray(logits, jnp.float32)
  if labels == "soft_other":
    if old_labels is None:
      raise ValueError("old_labels must be given with soft_other, got None")
    is_old = jnp.asarray(old_labels)[:, None] == jnp.arange(num_classes)
    targets = jnp.where(is_old, -jnp.inf, targets)
  if labels != "raw_logits":
    targets = jax.nn.softmax(targets)
  if top_k is not None:
    kept = jax.nn.one_hot(jax.lax.top_k(targets, top_k)[1], num_classes).sum(-2)
    targets = targets * kept
    if labels != "raw_logits":
      targets = targets / targets.sum(-1, keepdims=True)
  return np.asarray(targets)


def update(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  targets: np.ndarray,
  key: jax.Array,
  *,
  retain_targets: np.ndarray | None = None,
  optimizer: optax.GradientTransformation | None = None,
  num_epochs: int | None = None,
  batch_size: int = 64,
  schedule: training.Schedule = "one_cycle",
  retain_weight: float = 1.0,
  batch_stats: str = "update",
  num_parts: int = 1,
  callback: Callable[[training.TrainState, dict[str, Any]], None] | None = None,
  stop_fn: Callable[[types.Variables], bool] | None = None,
  state: training.TrainState | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> tuple[training.TrainState, training.History]:
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
    optimizer: As for `unlearn`.
    num_epochs: Passes over the forget set, as for `unlearn`.
    batch_size: Forget images (or all, where they are fewer), and retain images,
      a step.
    schedule: Of the learning rate, as for `training.schedule_fn`.
    retain_weight: `φ`, 0 or more; 0 uses no retain image.
    batch_stats: `"update"` or `"frozen"`, as for `unlearn`.
    num_parts: Gradient accumulation; see `training.run_steps`.
    callback: Called after each pass with the state (to be copied or saved
      before it returns) and the pass's record.
    stop_fn: Called with the variables after each pass; where it says so, that
      was the last.
    state: A state of an earlier run with the same arguments, to go on from.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

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
  check_split(split, retain_weight)
  checks.integer("batch_size", batch_size, at_least=1)
  checks.integer("num_parts", num_parts, at_least=1)
  if num_epochs is None:
    num_epochs = default_num_epochs(len(split.forget), batch_size)
  checks.integer("num_epochs", num_epochs, at_least=1)
  training.check_schedule(schedule)
  checks.one_of("batch_stats", batch_stats, BATCH_STATS)
  checks.key(key)
  num_classes = split.forget.num_classes
  targets = _checked_targets("targets", targets, split.forget)
  for part in split if retain_weight > 0 else split[:1]:
    training.check_classes(model, variables, part)
  if optimizer is None:
    optimizer = training.sgd(1e-3 if schedule == "constant" else 2e-3)
  pool_images: np.ndarray | streaming.Images = split.forget.images
  pool_targets = targets
  if retain_weight > 0:
    if retain_targets is None:
      retain_targets = split.retain.labels
    retain_targets = _checked_targets(
      "retain_targets", retain_targets, split.retain
    )
    pool_images = streaming.concatenate([pool_images, split.retain.images])
    if targets.ndim != retain_targets.ndim:
      targets = _as_probabilities(targets, num_classes)
      retain_targets = _as_probabilities(retain_targets, num_classes)
    pool_targets = np.concatenate([targets, retain_targets])
  if state is None:
    state = training.init_state(variables, optimizer, key)
  else:
    state = jax.tree.map(jnp.copy, state)  # The caller keeps theirs.
  num_forget, num_retain = len(split.forget), len(split.retain)
  # A patient's few images need no batch of padding.
  forget_size = min(batch_size, num_forget)
  num_steps = _num_steps(split, batch_size)
  factors = training.schedule_factors(schedule, num_epochs * num_steps)
  first_epoch = int(state.step) // num_steps
  order_key = jax.random.fold_in(state.key, np.iinfo(np.int32).max)

  def plan(epoch: int) -> tuple[np.ndarray, np.ndarray]:
    forget_key, retain_key = jax.random.split(
      jax.random.fold_in(order_key, epoch)
    )
    rows, weights = training.epoch_batches(forget_key, num_forget, forget_size)
    if retain_weight == 0:
      return rows, weights
    retain_rows = _retain_rows(retain_key, num_retain, num_steps, batch_size)
    retain_weights = np.full(
      (num_steps, batch_size), retain_weight / batch_size, np.float32
    )
    return (
      np.concatenate([rows, num_forget + retain_rows], 1),
      np.concatenate([weights, retain_weights], 1),
    )

  epochs = range(first_epoch, num_epochs)
  all_rows = (rows for epoch in epochs for rows in plan(epoch)[0])
  state = parallel.replicate(state, mesh)
  history: training.History = []
  total = (num_epochs - first_epoch) * num_steps
  with (
    training.open_pool(pool_images, pool_targets, all_rows, mesh) as pool,
    progress.bar(
      "unlearning", total, unit="step", is_shown=show_progress
    ) as bar,
  ):
    for epoch in epochs:
      start = time.perf_counter()
      rows, weights = plan(epoch)
      state, reported = training.run_epoch(
        model,
        optimizer,
        state,
        pool,
        rows,
        weights,
        factors=factors[epoch * num_steps : (epoch + 1) * num_steps],
        batch_stats=batch_stats,
        num_parts=num_parts,
        mesh=mesh,
        bar=bar,
      )
      record: dict[str, Any] = {"epoch": epoch + 1}
      is_forget = np.arange(rows.shape[1]) < forget_size
      for name, is_part in (("forget", is_forget), ("retain", ~is_forget)):
        is_counted = (weights > 0) & is_part
        if is_counted.any():
          summary = training.summarise(reported, is_counted)
          record |= {f"{name}_{what}": x for what, x in summary.items()}
      # Of the new labels: it rises as the forget set is forgotten.
      record["label_accuracy"] = record.pop("forget_accuracy")
      record["seconds"] = time.perf_counter() - start
      history.append(record)
      if callback is not None:
        callback(state, record)
      if stop_fn is not None and stop_fn(state.variables):
        break
  training.check_variables(state)
  return state, history


def _num_steps(split: types.Split, batch_size: int) -> int:
  """Minibatches of a pass over the forget set."""
  return -(-len(split.forget) // min(batch_size, len(split.forget)))


def _retain_rows(
  key: jax.Array, num_rows: int, num_steps: int, batch_size: int
) -> np.ndarray:
  """Draws `[num_steps, batch_size]` rows, each as often as any other."""
  num_needed = num_steps * batch_size
  num_rounds = -(-num_needed // num_rows)
  orders = [
    np.asarray(jax.random.permutation(each, num_rows), np.int32)
    for each in jax.random.split(key, num_rounds)
  ]
  return np.concatenate(orders)[:num_needed].reshape(num_steps, batch_size)


def _as_probabilities(targets: np.ndarray, num_classes: int) -> np.ndarray:
  if targets.ndim == 2:
    return targets
  return np.eye(num_classes, dtype=np.float32)[targets]


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


def check_labels(labels: str, top_k: int | None, num_classes: int) -> None:
  """Raises ValueError unless this form of labels exists."""
  checks.one_of("labels", labels, LABELS)
  if top_k is None:
    return
  if labels == "hard":
    raise ValueError(f"top_k must be None with hard labels, got {top_k}")
  checks.integer("top_k", top_k, at_least=1)
  if top_k > num_classes:
    raise ValueError(
      f"top_k must be at most the {num_classes} classes, got {top_k}"
    )


def _checked_targets(
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
