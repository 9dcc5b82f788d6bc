"""What would a retrained model say? Small models that never saw the forget set.

A model that was retrained without a camera or a patient knows others of their
kind: how well, no part of the original model tells, since its features remember
what it saw. A few models trained on a part of the retained images tell it, once
they are corrected for being worse than a model of all images.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from psg_jax import (
  checks,
  engine,
  ensembles,
  inference,
  levels,
  steps,
  types,
  unlearning,
)

# Of a normal distribution, 95 in 100 lie within so many deviations.
_QUANTILE = 1.96
# Of accuracy: no nearer does an update bring a model.
_NEAR = 0.05
# In fewer a small network has learnt nothing that could be corrected.
_MIN_STEPS = 200
# Of which minibatches are made smaller for that, down to this size.
_MIN_BATCH_SIZE = 32


class Level(NamedTuple):
  """A share that is expected of a retrained model.

  Attributes:
    value: In [0, 1].
    low: Lower end of the interval, 95 in 100 retrained models are to be in.
    high: Upper end.
    gap: How much better the original is than the proxies on unseen images, in
      log-odds.
    part: Of the gap, in [0, 1], that is in the value.
  """

  value: float
  low: float
  high: float
  gap: float = 0.0
  part: float = 0.0

  def corrected(self, part: float) -> float:
    """Returns the share with another part of the gap."""
    odds = scipy.special.logit(self.value) + (part - self.part) * self.gap
    return float(scipy.special.expit(odds))

  def holds(self, value: float) -> bool:
    """Whether a share is within the interval."""
    return self.low <= value <= self.high


class Proxies(NamedTuple):
  """What models say of the forget set that never saw it.

  Attributes:
    logits: float32 `[M, N, K]`, each proxy's at the forget images.
    accuracy: The accuracy on the forget set that a retrained model is to have.
    confidence: Its mean probability of the true class there.
    original_accuracy: The original's accuracy on the forget set.
    targets: float32 `[N, K]`, for `unlearning.unlearn`: predictions between the
      original's and the proxies', whose mean probability of the true class is
      `confidence.value`.
    cost: Images taken through a gradient, as a part of a retraining's.
  """

  logits: np.ndarray
  accuracy: Level
  confidence: Level
  original_accuracy: float
  targets: np.ndarray
  cost: float

  @property
  def is_called_for(self) -> bool:
    """Whether a retrained model is expected to differ from the original.

    Not where the original's accuracy is within the interval and near the value:
    far from it, in an interval that is too wide to tell, the value is still the
    best guess.
    """
    was, level = self.original_accuracy, self.accuracy
    return not level.holds(was) or abs(was - level.value) > _NEAR

  def as_dict(self) -> dict[str, float | bool]:
    """Returns the accuracy that is expected, and what it cost, for JSON."""
    return {
      "accuracy": self.accuracy.value,
      "low": self.accuracy.low,
      "high": self.accuracy.high,
      "original_accuracy": self.original_accuracy,
      "is_called_for": self.is_called_for,
      "cost": self.cost,
    }

  def __str__(self) -> str:
    """What is expected, in words."""
    expected = (
      f"a model that never saw them is expected to be right on"
      f" {100 * self.accuracy.value:.1f} % of the images to forget"
      f" ({100 * self.accuracy.low:.1f} to {100 * self.accuracy.high:.1f} %);"
      f" the original is on {100 * self.original_accuracy:.1f} %"
    )
    if not self.is_called_for:
      return f"{expected}: no change is called for that these proxies could see"
    if self.accuracy.holds(self.original_accuracy):
      return f"{expected}, which may be the same: what is expected is taught"
    return expected


def fit(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  unseen: types.Dataset | None = None,
  num_models: int = 2,
  fraction: float = 0.1,
  eval_batch_size: int = 256,
  **options: Any,
) -> Proxies:
  """Trains proxies, and says what a retrained model would of the forget set.

  Each is trained on a part of the retained images of its own. Being worse than
  a model of all images, it is corrected by a part of its gap to the original on
  images that neither has seen, in log-odds:

      logit a(F) = logit a_m(F) + w (logit a_original(V) - logit a_m(V))

  Where the forget images are like the others, `w` is what a model of all
  retained images closes of it (`gap_closed`); where they are of a kind that no
  retained image is of, next to nothing. How much harder they are for proxies
  than unseen ones tells the two apart (`likeness`). Unseen images, and what is
  closed, count by class, in the mixture of the forget images. The interval goes
  over what is in doubt of that, beside the differences between proxies and the
  numbers of images.

  Args:
    model: The network, of the original and of the proxies.
    variables: The original model's.
    split: The forget and the retain set.
    key: One typed key.
    unseen: `V`, images like the retained ones that the original has not seen,
      and on which no result is reported; without any, nothing is corrected.
    num_models: `M`, at least 2, whose differences are needed.
    fraction: Part of the retained images that each is trained on, in (0, 1).
      Where these would make fewer than 200 steps in the epochs of a
      retraining, minibatches are smaller, down to 32, and then images more,
      but no image is seen by two of them.
    eval_batch_size: Images predicted at a time.
    **options: Those of `training.fit` but `mesh`, for they are trained on one
      device; `num_epochs`, of a retraining, are more here where they still make
      fewer than 200 steps.

  Returns:
    Levels, targets and cost.

  Raises:
    ValueError: If an argument is out of its range, or there is not an image a
      class for each.
    FloatingPointError: If the loss is NaN or infinite.
  """
  checks.integer("num_models", num_models, at_least=2)
  checks.number("fraction", fraction, above=0, below=1)
  checks.integer("eval_batch_size", eval_batch_size, at_least=1)
  unlearning.check_parts(model, variables, split, 1.0)
  if unseen is not None and len(unseen):
    steps.check_classes(model, variables, unseen)
  checks.key(key)
  if options.get("mesh") is not None:
    raise ValueError("mesh must be None for proxies, got a mesh")
  passes = engine.Passes.of(options)
  num_retain, num_classes = len(split.retain), split.retain.num_classes
  num_rows, planned = _plan(
    *(num_retain, num_classes, num_models, fraction, passes)
  )
  if not num_rows:
    raise ValueError(
      f"num_models must leave each an image a class, got {num_models} with"
      f" fraction {fraction} of {num_retain} retained images, of"
      f" {num_classes} classes"
    )
  choice_key, fit_key = jax.random.split(key)
  rows = _parts(choice_key, num_retain, num_models, num_rows)
  membership = np.zeros((num_models, num_retain), bool)
  np.put_along_axis(membership, rows, True, axis=1)
  names = ("num_epochs", "batch_size", "num_parts")
  changed = {name: getattr(planned, name) for name in names}
  fitted, _ = ensembles.train(
    *(model, split.retain, membership, fit_key), **{**options, **changed}
  )

  def predict(dataset: types.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the original `[N, K]` and of the proxies `[M, N, K]`."""
    images = dataset.images
    return (
      np.asarray(
        inference.predict(
          model.apply, variables, images, batch_size=eval_batch_size
        )
      ),
      ensembles.predict(model, fitted, images, batch_size=eval_batch_size),
    )

  original, logits = predict(split.forget)
  held = None
  if unseen is not None and len(unseen):
    weights = class_weights(split.forget.labels, unseen.labels)
    held = (*predict(unseen), unseen.labels, weights)
  closed = part_closed(split, num_rows)

  def expected(measure: Callable[..., np.ndarray]) -> Level:
    shares = measure(logits, split.forget.labels)
    if held is None:
      return level(shares, len(split.forget))
    held_original, held_proxies, *labels_and_weights = held
    return level(
      *(shares, len(split.forget)),
      float(measure(held_original, *labels_and_weights)),
      measure(held_proxies, *labels_and_weights),
      1 / float(np.square(held[-1]).sum()),
      closed,
    )

  accuracy, confidence = expected(_accuracy), expected(_confidence)
  return Proxies(
    logits=logits,
    accuracy=accuracy,
    confidence=confidence,
    original_accuracy=float(_accuracy(original, split.forget.labels)),
    targets=blend(
      original + levels.prior_shift(split),
      logits,
      split.forget.labels,
      confidence.value,
    ),
    cost=cost(
      num_retain,
      num_models=num_models,
      fraction=fraction,
      num_epochs=passes.num_epochs,
      batch_size=passes.batch_size,
    ),
  )


def cost(
  num_retain: int,
  num_classes: int = 1,
  *,
  num_models: int,
  fraction: float,
  num_epochs: int,
  batch_size: int,
) -> float:
  """Returns what proxies cost, as a part of a retraining's images.

  Infinity where there is not an image a class for each.

  Args:
    num_retain: Retained images.
    num_classes: Of how many classes.
    num_models: As for `fit`, and likewise the others.
    fraction: See there.
    num_epochs: Of a retraining.
    batch_size: Images a step.
  """
  passes = engine.Passes(num_epochs=num_epochs, batch_size=batch_size)
  num_rows, planned = _plan(
    *(num_retain, num_classes, num_models, fraction, passes)
  )
  if not num_rows:
    return math.inf
  num_images = num_models * num_rows * planned.num_epochs
  return num_images / (num_retain * num_epochs)


def _plan(
  num_retain: int,
  num_classes: int,
  num_models: int,
  fraction: float,
  passes: engine.Passes,
) -> tuple[int, engine.Passes]:
  """Images of each model, and its passes, in which they make enough steps.

  Minibatches are made smaller first; then there are more images rather than
  more epochs of few; and these last. No images where they are not one a class,
  of its own for each.
  """
  enough = -(-_MIN_STEPS // passes.num_epochs)
  size = max(int(fraction * num_retain / enough), _MIN_BATCH_SIZE)
  size = min(passes.batch_size, size)
  most = max(num_retain // num_models, round(fraction * num_retain))
  num_rows = min(max(round(fraction * num_retain), enough * size), most)
  least = max(num_classes, 1)
  if num_rows < least or num_retain < num_models * least:
    return 0, passes
  num_epochs = -(-_MIN_STEPS // -(-num_rows // size))
  return num_rows, dataclasses.replace(
    passes,
    num_epochs=max(passes.num_epochs, num_epochs),
    batch_size=size,
    num_parts=min(passes.num_parts, size),
  )


def _parts(
  key: jax.Array, num_images: int, num_models: int, num_rows: int
) -> np.ndarray:
  """Rows `[M, R]` of each model, of which as few as can be are shared.

  They go on from the last model's, in one order over and over again: none has a
  row twice.
  """
  order = jax.random.permutation(jax.random.split(key, 1)[0], num_images)
  places = np.arange(num_models * num_rows).reshape(num_models, num_rows)
  return np.asarray(order)[places % num_images]


def class_weights(labels: np.ndarray, unseen_labels: np.ndarray) -> np.ndarray:
  """Weighs unseen images by class, so that each counts as among the others.

  Args:
    labels: int `[N]`, of the forget images.
    unseen_labels: int `[V]`.

  Returns:
    Weights float `[V]` of sum 1. Classes without any unseen image are left out;
    the weights are even where that leaves none.
  """
  num_classes = 1 + max(np.max(labels), np.max(unseen_labels))
  counts, unseen_counts = (
    np.bincount(x, minlength=num_classes) for x in (labels, unseen_labels)
  )
  weights = (counts / np.maximum(unseen_counts, 1))[unseen_labels]
  if not weights.any():
    weights = np.ones(len(unseen_labels))
  return weights / weights.sum()


def _accuracy(
  logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Accuracy over images, of one model or of each of several."""
  is_right = np.argmax(logits, -1) == labels
  return np.average(is_right, axis=-1, weights=weights)


def _confidence(
  logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Mean probability of the true class, likewise."""
  probabilities = scipy.special.softmax(np.asarray(logits, np.float64), -1)
  of_true = probabilities[..., np.arange(len(labels)), labels]
  return np.average(of_true, axis=-1, weights=weights)


def level(
  shares: np.ndarray,
  num_images: int,
  original_unseen: float | None = None,
  shares_unseen: np.ndarray | None = None,
  num_unseen: float = 0,
  closed: float = 1.0,
) -> Level:
  """Corrects shares of proxies to that of a retrained model, with an interval.

  Args:
    shares: float `[M]` in [0, 1], each proxy's on the forget images.
    num_images: How many these are, positive.
    original_unseen: The original's share on unseen images; None for none.
    shares_unseen: float `[M]`, each proxy's there.
    num_unseen: How many these are, or, where they have weights, count for.
    closed: Part of the gap, in [0, 1], that a retrained model closes on images
      like the unseen ones: see `gap_closed`.

  Returns:
    The share in [0, 1].
  """
  odds, variance = _log_odds(shares, num_images)
  gap, like = np.zeros_like(odds), 0.0
  if original_unseen is not None and shares_unseen is not None:
    original, original_variance = _log_odds(
      np.asarray(original_unseen), num_unseen
    )
    proxies, proxies_variance = _log_odds(shares_unseen, num_unseen)
    gap = original - proxies
    # Of as many images: where all are right, odds grow with their number.
    fewest = min(num_images, num_unseen)
    (of_unseen, _), (of_forget, _) = (
      _log_odds(x, fewest) for x in (shares_unseen, shares)
    )
    like = likeness(float(np.mean(of_unseen - of_forget)))
    variance = variance + original_variance + proxies_variance
  values = odds + like * closed * gap
  # A retrained model differs from the proxies' mean as these from each other.
  between = values.var(ddof=1) * (1 + 1 / len(values))
  # To be corrected or not, with these chances: at one half, 95 in 100 are from
  # not at all to all that a retrained model closes.
  doubt = like * (1 - like) * np.square(closed * gap.mean() / _QUANTILE)
  deviation = np.sqrt(between + variance.mean() + doubt)
  ends = values.mean() + _QUANTILE * deviation * np.array([0.0, -1.0, 1.0])
  # Without the half images, so that all of them can be right, or none.
  hits = scipy.special.expit(ends) * (num_images + 1) - 0.5
  value, low, high = np.clip(hits / num_images, 0, 1).tolist()
  return Level(value, low, high, float(gap.mean()), like * closed)


def gap_closed(num_images: float, num_retain: float, num_all: float) -> float:
  """Returns which part of proxies' gap to the original retraining closes.

  Log-odds of being right grow about evenly with the logarithm of the number of
  images that a model was trained on:

      log(R / P) / log(A / P)

  Args:
    num_images: `P`, of a class, that a proxy was trained on, positive.
    num_retain: `R`, retained ones, at least as many.
    num_all: `A`, that the original was trained on, more than these.

  Returns:
    In [0, 1].
  """
  return math.log(num_retain / num_images) / math.log(num_all / num_images)


def part_closed(split: types.Split, num_images: int) -> float:
  """Mean of `gap_closed` over the forget images, each by its class.

  Of a class that is gone a retrained model knows no more than proxies.

  Args:
    split: The forget and the retain set.
    num_images: That each proxy was trained on, retained ones drawn at random.

  Returns:
    In [0, 1].
  """
  forgotten, retained = levels.class_counts(split)
  share = num_images / len(split.retain)
  parts = [
    gap_closed(share * kept, kept, kept + gone) if kept and gone else 0.0
    for kept, gone in zip(retained.tolist(), forgotten.tolist(), strict=True)
  ]
  return float(np.average(parts, weights=forgotten))


def likeness(harder: float) -> float:
  """Returns how like unseen images others are, from how much harder they are.

      exp(-max(d, 0))

  Args:
    harder: `d`, by how much proxies are worse on them than on unseen images,
      in log-odds.

  Returns:
    In [0, 1]; 1 for images that are no harder.
  """
  return math.exp(-max(harder, 0.0))


def _log_odds(
  shares: np.ndarray, number: float
) -> tuple[np.ndarray, np.ndarray]:
  """Log-odds of shares of so many images, and their variance by chance."""
  hits = np.asarray(shares, np.float64) * number
  # Half an image on each side: no share is 0 or 1.
  right, wrong = hits + 0.5, number - hits + 0.5
  return np.log(right / wrong), 1 / right + 1 / wrong


def blend(
  original: np.ndarray, proxies: np.ndarray, labels: np.ndarray, share: float
) -> np.ndarray:
  """Predictions between the original's and the proxies', of a given level.

      (1 - a) p_original + a mean_m p_m

  with `a` in [0, 1] for which the mean probability of the true class is
  `share`, or the nearest to it.

  Args:
    original: float `[N, K]`, logits.
    proxies: float `[M, N, K]`, logits.
    labels: int `[N]`, true classes.
    share: In [0, 1].

  Returns:
    float32 `[N, K]`.
  """
  near = scipy.special.softmax(np.asarray(original, np.float64), -1)
  far = scipy.special.softmax(np.asarray(proxies, np.float64), -1).mean(0)
  rows = np.arange(len(labels))
  above, below = near[rows, labels].mean(), far[rows, labels].mean()
  part = 0.0 if above == below else (above - share) / (above - below)
  part = min(max(part, 0.0), 1.0)
  return ((1 - part) * near + part * far).astype(np.float32)
