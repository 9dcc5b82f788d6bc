"""Labels to move a model to: a search over the forget set, and its targets."""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import (
  augment,
  boundary,
  checks,
  inference,
  levels,
  parallel,
  progress,
  refits,
  steps,
  streaming,
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
SOFT_LABELS = ("soft", "soft_other")
RETAIN_LABELS = ("hard", "soft", "raw_logits")
# Of `relabel`: steps before the slow images are searched alone; growth of the
# steps with which one is enough; and more batches than these, for the slow
# images take one whole batch again at least.
_FIRST_STEPS = 8
_LONG_STEPS = 2
_MANY_BATCHES = 3


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


def relabel(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  dataset: types.Dataset,
  key: jax.Array,
  *,
  search_fn: SearchFn,
  batch_size: int = 128,
  first_steps: int | None = None,
  logits: np.ndarray | None = None,
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
      image. The result is the same. None for 1 where each step is twice as long
      as the one before, and there are batches enough that it saves time, else
      8.
    logits: float `[N, K]`, what the network says of the images, where that is
      known: a `boundary.Search` leaves out those that are across already.
    mesh: Devices that a `boundary.Search` works on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The classes reached and how the search went, `[N]` each.

  Raises:
    ValueError: If an argument is out of its range.
  """
  checks.integer("batch_size", batch_size, at_least=1)
  checks.key(key)
  if not len(dataset):
    raise ValueError("dataset must not be empty, got 0 images")
  num_images = len(dataset)
  results: dict[str, np.ndarray] = {}
  rows = np.arange(num_images)
  if logits is not None and isinstance(search_fn, boundary.Search):
    results = _unmoved(logits, dataset.labels)
    rows = np.flatnonzero(~results["is_crossed"])
  batch_size = min(batch_size, num_images)
  if first_steps is None:
    is_long = isinstance(search_fn, boundary.Search) and (
      float(search_fn.step_growth) >= _LONG_STEPS
    )
    has_many = len(rows) > _MANY_BATCHES * batch_size
    first_steps = 1 if is_long and has_many else _FIRST_STEPS
  checks.integer("first_steps", first_steps, at_least=1)

  def is_unfinished(rows: np.ndarray, last_step: int) -> np.ndarray:
    has_all = results["num_steps"][rows] >= last_step
    return np.asarray(has_all & ~results["is_crossed"][rows])

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
    for start, places, images in zip(
      starts, plan, streaming.batches(dataset.images, plan), strict=True
    ):
      real = places[: len(rows) - start]
      output = fn(
        apply_fn,
        variables,
        steps.to_float(jnp.asarray(images)),
        jnp.asarray(dataset.labels[places]),
        boundary.sample_keys(key, jnp.asarray(places)),
      )
      for name in _RELABELLING_FIELDS:
        values = np.asarray(getattr(output, name))[: len(real)]
        if name not in results:
          shape = (num_images, *values.shape[1:])
          results[name] = np.zeros(shape, values.dtype)
        results[name][real] = values
      num_done = len(real)
      if last_step is not None:
        num_done -= int(is_unfinished(real, last_step).sum())
      bar.advance(num_done, crossed=float(results["is_crossed"][real].mean()))

  with progress.bar(
    "boundary search", num_images, unit="image", is_shown=show_progress
  ) as bar:
    bar.advance(num_images - len(rows), crossed=1.0)
    if (
      isinstance(search_fn, boundary.Search)
      and search_fn.num_steps >= 2 * first_steps
      # This schedule knows the number of steps.
      and search_fn.distance_decay != "linear"
    ):
      run(rows, boundary.cut(search_fn, first_steps), first_steps)
      rows = np.flatnonzero(is_unfinished(rows, first_steps))
    if rows.size:
      run(rows, search_fn)
  return Relabelling(**results)


def _unmoved(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """What a search says of images that make no step."""
  is_label = np.arange(logits.shape[-1]) == np.asarray(labels)[:, None]
  nearest = np.argmax(np.where(is_label, -np.inf, logits), -1)
  is_crossed = np.argmax(logits, -1) != labels
  return {
    "labels": nearest.astype(np.int32),
    "logits": np.array(logits, np.float32),
    "is_crossed": is_crossed & np.isfinite(logits.max(-1)),
    "distance": np.zeros(len(logits), np.float32),
    "num_steps": np.zeros(len(logits), np.int32),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
  """What forget and retain images are taught: a value that checks itself.

  Soft targets are of the geometric mean of the predictions at the boundary
  point and at the image, `softmax((1 - w) z(x + δ) + w z(x))`. Of the image
  itself a model tells more, at the boundary it is less sure of itself: the mean
  of both was never the worst on validation images (docs/targets.md).

  Attributes:
    labels: `"hard"`: the class reached; `"soft"`: a prediction of the frozen
      model; `"soft_other"`: the same among the other classes, so that no
      probability of the old class is taught again, nor, as with hard labels, of
      a class that is forgotten as a whole; `"raw_logits"`: as the
      released code has it, logits where probabilities belong (it can destroy a
      model: for comparison only).
    image_weight: `w` in [0, 1], of soft labels: 0, at the boundary point; 1, at
      the image itself, which needs no search. By default 0.5 with
      `"soft_other"`, else 0.
    retain_labels: Targets of the retain set: `"hard"`, its labels; `"soft"`,
      the frozen model's own predictions; `"raw_logits"`. None for those of
      `labels`, and hard ones with `"soft_other"`.
    top_k: With soft labels, the number of largest entries kept, or None.
    num_refits: Copies of the model whose last layers are drawn anew and trained
      on retained images, and whose mean prediction is half of the targets of
      `"soft_other"` (`refits.predict`); 0 for none. None for 1 where they can
      say something (`refits.count`), as of whole classes, else 0.

  Raises:
    ValueError: If an option is out of its range or does not go with another.
  """

  labels: str = "soft_other"
  image_weight: float | None = None
  retain_labels: str | None = None
  top_k: int | None = None
  num_refits: int | None = None

  def __post_init__(self) -> None:
    check_labels(self.labels, self.top_k)
    is_soft = self.labels in SOFT_LABELS
    weight, retain_labels = self.image_weight, self.retain_labels
    if weight is None:
      weight = 0.5 if self.labels == "soft_other" else 0.0
    checks.number("image_weight", weight, at_least=0, at_most=1)
    if weight > 0 and not is_soft:
      raise ValueError(
        f"image_weight must be 0 with {self.labels} labels, got {weight:g}"
      )
    if retain_labels is None:
      retain_labels = "hard" if self.labels == "soft_other" else self.labels
    checks.one_of("retain_labels", retain_labels, RETAIN_LABELS)
    if self.num_refits is not None:
      checks.integer("num_refits", self.num_refits, at_least=0)
    object.__setattr__(self, "image_weight", float(weight))
    object.__setattr__(self, "retain_labels", retain_labels)

  @property
  def is_searched(self) -> bool:
    """Whether they need the boundary points."""
    return self.image_weight != 1

  def of_forget(
    self,
    relabelling: Relabelling | None,
    image_logits: np.ndarray | None,
    old_labels: np.ndarray,
    gone: np.ndarray | None = None,
    refit_logits: np.ndarray | None = None,
  ) -> np.ndarray:
    """Returns the targets of the forget set that follow from its predictions.

    Args:
      relabelling: What the search found; None where `w` is 1.
      image_logits: float `[N, K]` of the frozen model at the images; None where
        `w` is 0.
      old_labels: int `[N]`, the classes to leave.
      gone: int `[C]`, classes of which no image is retained, which no retrained
        model would name.
      refit_logits: float `[M, N, K]` of models whose last layers were drawn
        anew, at the images, whose mean prediction is half of soft targets;
        None for none.

    Returns:
      int32 classes `[N]` for hard labels, else float32 `[N, K]`.
    """
    weight = np.float32(self.image_weight or 0)
    if self.labels == "hard":
      assert relabelling is not None  # The weight is 0.
      return _among_retained(relabelling, old_labels, gone)
    logits: np.ndarray = np.zeros((len(old_labels), 1), np.float32)
    if relabelling is not None:
      logits = logits + (1 - weight) * relabelling.logits
    if image_logits is not None:
      logits = logits + weight * np.asarray(image_logits)
    form = functools.partial(
      soft_targets,
      labels=self.labels,
      top_k=self.top_k,
      old_labels=old_labels,
      gone=gone,
    )
    if refit_logits is None:
      return form(logits)
    refitted = np.mean([form(x) for x in refit_logits], 0)
    return (form(logits) + refitted) / 2

  def of_retain(self, logits: np.ndarray) -> np.ndarray:
    """Returns those of the retain set from its logits, where they are soft."""
    assert self.retain_labels is not None  # It was settled.
    return soft_targets(logits, labels=self.retain_labels, top_k=self.top_k)


def _among_retained(
  relabelling: Relabelling, old_labels: np.ndarray, gone: np.ndarray | None
) -> np.ndarray:
  """Returns the classes reached, and where one is gone the next that is not.

  That is another than the old class, which stays where there is no other, and
  where it stands itself, as the released code leaves it.
  """
  labels = relabelling.labels
  if gone is None:
    return labels
  logits = np.array(relabelling.logits)
  logits[:, gone] = -np.inf
  logits[np.arange(len(logits)), old_labels] = -np.inf
  next_labels = np.where(
    np.isneginf(logits).all(-1), old_labels, np.argmax(logits, -1)
  )
  is_gone = np.isin(labels, gone) & (labels != old_labels)
  return np.where(is_gone, next_labels, labels).astype(np.int32)


def soft_targets(
  logits: np.ndarray,
  *,
  labels: str = "soft",
  top_k: int | None = None,
  old_labels: np.ndarray | None = None,
  gone: np.ndarray | None = None,
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
    gone: int `[C]`, classes that `"soft_other"` leaves out of all rows; None
      for none. Where they are all but the old class, that is all that is left.

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
    is_gone = jnp.zeros_like(is_old)
    if gone is not None:
      is_gone |= jnp.isin(jnp.arange(num_classes), jnp.asarray(gone))
    is_out = is_old | is_gone
    is_out = jnp.where(is_out.all(-1, keepdims=True), is_gone, is_out)
    targets = jnp.where(is_out, -jnp.inf, targets)
  if labels != "raw_logits":
    targets = jax.nn.softmax(targets)
  if top_k is not None:
    kept = jax.nn.one_hot(jax.lax.top_k(targets, top_k)[1], num_classes).sum(-2)
    targets = targets * kept
    if labels != "raw_logits":
      targets = targets / targets.sum(-1, keepdims=True)
  return np.asarray(targets)


def gone_classes(split: types.Split) -> np.ndarray | None:
  """Returns the classes of which no image is retained, int `[C]`.

  Those that an earlier request took out are among them. None where nothing is
  retained, and any class may be taught.
  """
  if not len(split.retain):
    return None
  num_classes = split.forget.num_classes
  return np.setdiff1d(np.arange(num_classes), np.asarray(split.retain.labels))


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
  """Finds what the forget set is taught: searches, predicts, refits.

  Attributes:
    model: The network.
    variables: The original model's, frozen.
    split: The forget and the retain set.
    key: One typed key, of searches.
    taught: The form of the targets.
    search_fn: See `relabel`.
    accuracy: Up to which targets may name the old class, in [0, 1]; None or 0
      for none of them.
    num_refits: See `refits.count`.
    augment_fn: See `refits.predict`.
    search_batch_size: Images searched at a time.
    eval_batch_size: Images predicted at a time.
    mesh: Devices; None for one.
    show_progress: Whether to show progress bars.
  """

  model: types.Model
  variables: types.Variables
  split: types.Split
  key: jax.Array
  taught: Targets
  search_fn: SearchFn
  accuracy: float | None = None
  num_refits: int = 0
  augment_fn: augment.AugmentFn | None = None
  search_batch_size: int = 128
  eval_batch_size: int = 256
  mesh: jax.sharding.Mesh | None = None
  show_progress: bool = True

  @property
  def is_part(self) -> bool:
    """Whether targets have a level in them, which is not 0."""
    return self.taught.labels == "soft_other" and bool(self.accuracy)

  @functools.cached_property
  def refit_logits(self) -> np.ndarray | None:
    """What refits say of the forget set, the same for all searches."""
    if not self.num_refits:
      return None
    return refits.predict(
      *(self.model, self.variables, self.split, self.key),
      num_models=self.num_refits,
      augment_fn=self.augment_fn,
      eval_batch_size=self.eval_batch_size,
      mesh=self.mesh,
      show_progress=self.show_progress,
    )

  @functools.cached_property
  def image_logits(self) -> np.ndarray:
    """What the original model says of the forget set."""
    return self.predict(self.split.forget.images)

  def predict(
    self, images: np.ndarray, variables: types.Variables | None = None
  ) -> np.ndarray:
    """Returns logits, of the original model or of other variables."""
    return inference.predict(
      *(self.model.apply, self.variables if variables is None else variables),
      images,
      batch_size=self.eval_batch_size,
      mesh=self.mesh,
    )

  def search(self, index: int = 0) -> Relabelling:
    """Searches from the forget images, for one pass."""
    return relabel(
      *(self.model.apply, self.variables, self.split.forget),
      jax.random.fold_in(self.key, index),
      search_fn=self.search_fn,
      batch_size=self.search_batch_size,
      logits=self.image_logits if self.taught.image_weight else None,
      mesh=self.mesh,
      show_progress=self.show_progress,
    )

  def teach(self, index: int = 0) -> tuple[Relabelling | None, np.ndarray]:
    """Returns what a pass's search found, if it needs one, and the targets."""
    outcome = self.search(index) if self.taught.is_searched else None
    labels, gone = self.split.forget.labels, gone_classes(self.split)
    targets = self.taught.of_forget(
      outcome,
      self.image_logits if self.taught.image_weight else None,
      labels,
      gone,
      self.refit_logits,
    )
    if self.accuracy is None or not self.is_part:
      return outcome, targets
    shifted = self.image_logits + levels.prior_shift(self.split)
    return outcome, levels.at_accuracy(targets, shifted, labels, self.accuracy)


def check_labels(
  labels: str, top_k: int | None, num_classes: int | None = None
) -> None:
  """Raises ValueError unless this form of labels exists."""
  checks.one_of("labels", labels, LABELS)
  if top_k is None:
    return
  if labels == "hard":
    raise ValueError(f"top_k must be None with hard labels, got {top_k}")
  checks.integer("top_k", top_k, at_least=1)
  if num_classes is not None and top_k > num_classes:
    raise ValueError(
      f"top_k must be at most the {num_classes} classes, got {top_k}"
    )
