"""What a clinician asks about a model that was revised.

Accuracy hides who is harmed: these figures say which disease is now missed,
whether the stated confidence holds, which group of patients fares worst, and
which retained images lost their right answer. All are computed one class
against the rest. Ideal values are those of the original model on what is
retained; what was to be forgotten belongs to another split.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sklearn.metrics

from psg_jax import checks
from psg_jax.metrics import common, evaluation


def sensitivity(logits: np.ndarray, labels: np.ndarray) -> list[float | None]:
  """Share of each class's images that are found, `TP / (TP + FN)`.

  Direction: up. Ideal: 1. Range: [0, 1].

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    `K` values; None for a class without images.

  Raises:
    ValueError: If the shapes or labels are wrong.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Altman and Bland, Diagnostic Tests 1: Sensitivity and Specificity, 1994.
  """
  common.check_logits(logits, labels)
  matrix = evaluation.confusion_matrix(logits, labels)
  return _ratios(np.diag(matrix), matrix.sum(1))


def specificity(logits: np.ndarray, labels: np.ndarray) -> list[float | None]:
  """Share of the other images that are not taken for a class, `TN / (TN + FP)`.

  Direction: up. Ideal: 1. Range: [0, 1].

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    `K` values; None for a class that all images have.

  Raises:
    ValueError: If the shapes or labels are wrong.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Altman and Bland, Diagnostic Tests 1: Sensitivity and Specificity, 1994.
  """
  common.check_logits(logits, labels)
  matrix = evaluation.confusion_matrix(logits, labels)
  negatives = matrix.sum() - matrix.sum(1)
  false_positives = matrix.sum(0) - np.diag(matrix)
  return _ratios(negatives - false_positives, negatives)


class Auroc(NamedTuple):
  """Areas under the ROC curves.

  Attributes:
    macro: The mean over the classes that have one.
    per_class: `K` areas, each class against the rest; None for a class that
      none or all of the images have.
  """

  macro: float
  per_class: list[float | None]


def auroc(logits: np.ndarray, labels: np.ndarray) -> Auroc:
  """Area under the ROC curve, each class against the rest, and the mean.

  Images are ranked by the log-odds of the class, which has the order of its
  probability, but no ties where that rounds to 1.

  Direction: up. Ideal: 1; 0.5 is chance. Range: [0, 1].

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    The areas.

  Raises:
    ValueError: If the shapes or labels are wrong.
    NotAvailableError: If all images are of one class, there are none, or
      logits are not finite.

  References:
    Hanley and McNeil, The Meaning and Use of the Area under a Receiver
    Operating Characteristic (ROC) Curve, 1982.
  """
  common.check_logits(logits, labels)
  odds = common.log_odds(logits)

  def area(label: int) -> float | None:
    is_positive = labels == label
    if not is_positive.any() or is_positive.all():
      return None
    return float(sklearn.metrics.roc_auc_score(is_positive, odds[:, label]))

  per_class = [area(label) for label in range(logits.shape[1])]
  known = [area for area in per_class if area is not None]
  if not known:
    raise common.NotAvailableError("all images are of one class")
  return Auroc(float(np.mean(known)), per_class)


def calibration_error(
  logits: np.ndarray, labels: np.ndarray, *, num_bins: int = 15
) -> float:
  """Expected calibration error (ECE) of the largest probability.

  `Σ_b (n_b / N) |accuracy_b - confidence_b|` over bins `((b - 1) / B, b / B]`
  of equal width in the confidence, with the mean confidence of each bin.

  Direction: down. Ideal: 0. Range: [0, 1].

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.
    num_bins: `B`, positive.

  Returns:
    The error.

  Raises:
    ValueError: If the shapes, labels or number of bins are wrong.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Guo et al., On Calibration of Modern Neural Networks, 2017.
  """
  common.check_logits(logits, labels)
  checks.integer("num_bins", num_bins, at_least=1)
  confidence = np.exp(common.log_probabilities(logits).max(-1))
  is_right = common.is_right(logits, labels)
  # The upper edge belongs to a bin; rounding may carry a confidence past 1.
  bins = np.ceil(confidence * num_bins).astype(int).clip(1, num_bins) - 1
  gaps = np.bincount(bins, is_right - confidence, minlength=num_bins)
  return float(np.sum(np.abs(gaps)) / len(labels))


class WorstSubgroup(NamedTuple):
  """The group that fares worst.

  Attributes:
    group: Its value in the metadata column.
    accuracy: Its accuracy, in [0, 1].
    num_images: Its images.
    num_groups: Groups that were compared.
    num_small: Groups left out, as they have too few images.
  """

  group: str
  accuracy: float
  num_images: int
  num_groups: int
  num_small: int


def worst_subgroup(
  logits: np.ndarray,
  labels: np.ndarray,
  groups: np.ndarray,
  *,
  min_count: int = 10,
) -> WorstSubgroup:
  """The lowest accuracy of any group of images, such as those of a device.

  The minimum of many noisy figures is low by chance as well: compare it with
  the same group of the original model.

  Direction: up. Ideal: 1. Range: [0, 1].

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.
    groups: str `[N]`, the value of each image in a metadata column.
    min_count: Fewest images of a group that is looked at, positive.

  Returns:
    The group; the first in the alphabet among equals.

  Raises:
    ValueError: If the shapes or labels are wrong.
    NotAvailableError: If no group has `min_count` images, or logits are not
      finite.

  References:
    Oakden-Rayner et al., Hidden Stratification Causes Clinically Meaningful
    Failures in Machine Learning for Medical Imaging, 2020.
  """
  common.check_logits(logits, labels)
  checks.integer("min_count", min_count, at_least=1)
  groups = np.asarray(groups)
  if groups.shape != labels.shape:
    raise ValueError(
      f"groups must be [{len(labels)}], one an image, got {list(groups.shape)}"
    )
  names, group_of = np.unique(groups.astype(str), return_inverse=True)
  counts = np.bincount(group_of)
  is_right = common.is_right(logits, labels)
  accuracies = np.bincount(group_of, is_right) / counts
  large = np.flatnonzero(counts >= min_count)
  if not len(large):
    raise common.NotAvailableError(
      f"none of {len(names)} groups has {min_count} images"
    )
  worst = large[np.argmin(accuracies[large])]
  return WorstSubgroup(
    group=str(names[worst]),
    accuracy=float(accuracies[worst]),
    num_images=int(counts[worst]),
    num_groups=len(large),
    num_small=len(names) - len(large),
  )


class Flips(NamedTuple):
  """Images whose answer changed between right and wrong.

  Attributes:
    harmed_rows: int `[H]`, right before and wrong after, sorted.
    harmed_before: int `[H]`, the class predicted before.
    harmed_after: int `[H]`, the class predicted after.
    helped_rows: int `[G]`, wrong before and right after, sorted.
    helped_before: int `[G]`.
    helped_after: int `[G]`.
    num_right: Images that were right before.
  """

  harmed_rows: np.ndarray
  harmed_before: np.ndarray
  harmed_after: np.ndarray
  helped_rows: np.ndarray
  helped_before: np.ndarray
  helped_after: np.ndarray
  num_right: int


def flips(
  logits: np.ndarray, original: np.ndarray, labels: np.ndarray
) -> Flips:
  """Finds the images whose right answer turned wrong, and the reverse.

  Two models of one accuracy may be right about different patients.

  Direction: down, for the harmed. Ideal: none. Range: 0 to `N`.

  Args:
    logits: float `[N, K]`, the unlearned model's, on retained images.
    original: float `[N, K]`, the original model's.
    labels: int `[N]`.

  Returns:
    The rows, with both predictions.

  Raises:
    ValueError: If the shapes or labels are wrong.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Yan et al., Positive-Congruent Training: Towards Regression-Free Model
    Updates, 2021 (negative and positive flips).
  """
  common.check_pair(logits, original)
  common.check_labels(logits, labels)
  before, after = np.argmax(original, -1), np.argmax(logits, -1)
  was_right, is_right = before == labels, after == labels
  harmed = np.flatnonzero(was_right & ~is_right)
  helped = np.flatnonzero(~was_right & is_right)
  return Flips(
    harmed_rows=harmed,
    harmed_before=before[harmed],
    harmed_after=after[harmed],
    helped_rows=helped,
    helped_before=before[helped],
    helped_after=after[helped],
    num_right=int(was_right.sum()),
  )


class FalseNegatives(NamedTuple):
  """Missed images of a class, before and after.

  Attributes:
    label: The class.
    num_images: Its images; none leaves its false negatives at 0 of 0.
    before: Those that the original model took for another class.
    after: Those that the unlearned model does.
  """

  label: int
  num_images: int
  before: int
  after: int


def false_negatives(
  logits: np.ndarray,
  original: np.ndarray,
  labels: np.ndarray,
  *,
  positive: int | str | None = None,
  class_names: Sequence[str] | None = None,
) -> list[FalseNegatives]:
  """Counts the missed images of a disease before and after unlearning.

  Direction: down. Ideal: no more than before. Range: 0 to `num_images`.

  Args:
    logits: float `[N, K]`, the unlearned model's, on retained images.
    original: float `[N, K]`, the original model's.
    labels: int `[N]`.
    positive: The class, by index or by name; None for each class.
    class_names: `K` names, needed to give a name.

  Returns:
    One entry for `positive`, or `K`.

  Raises:
    ValueError: If the shapes, labels or class are wrong.
    NotAvailableError: If there are no images, none of the class asked for, or
      logits are not finite.

  References:
    Altman and Bland, Diagnostic Tests 1: Sensitivity and Specificity, 1994.
  """
  common.check_pair(logits, original)
  common.check_labels(logits, labels)
  missed = [~common.is_right(x, labels) for x in (original, logits)]
  classes = _classes(positive, class_names, logits.shape[1])
  if positive is not None and not np.any(labels == classes[0]):
    raise common.NotAvailableError(f"there are no images of class {positive!r}")
  return [
    FalseNegatives(
      *(label, int(np.sum(labels == label))),
      *(int(np.sum(is_missed[labels == label])) for is_missed in missed),
    )
    for label in classes
  ]


def _classes(
  positive: int | str | None,
  class_names: Sequence[str] | None,
  num_classes: int,
) -> list[int]:
  if class_names is not None and len(class_names) != num_classes:
    raise ValueError(
      f"class_names must be {num_classes}, got {len(class_names)}"
    )
  if positive is None:
    return list(range(num_classes))
  if isinstance(positive, str):
    names = list(class_names or ())
    checks.one_of("positive", positive, names)
    return [names.index(positive)]
  checks.integer("positive", positive, at_least=0)
  if positive >= num_classes:
    raise ValueError(f"positive must be below {num_classes}, got {positive}")
  return [int(positive)]


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> list[float | None]:
  return [
    float(part / whole) if whole else None
    for part, whole in zip(parts, wholes, strict=True)
  ]
