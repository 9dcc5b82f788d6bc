"""Membership inference: can the forget set be told from unseen images?

Members are *training images of the forget set*, which the original model has
seen; non-members are *test images of the same classes*, which no model has.
For a model that was retrained without the forget set both are unseen, so every
attack scores 0.5 up to noise. Above 0.5 the model remembers. An AUC below 0.5
says that it treats the forget set as odder than unseen images, which gives it
away as well. (Other code reports the share of forget images that an attack
calls unseen; that figure goes up where ours goes to 0.5.)

Every attack sees as many members as non-members of each class: a seeded
subsample is drawn class by class, without weights. So 0.5 is chance, accuracy
is balanced accuracy, and no attack profits from a class being rarer or harder
on one side.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import sklearn.linear_model
import sklearn.metrics
import sklearn.model_selection
import sklearn.pipeline
import sklearn.preprocessing
import sklearn.svm

from psg_jax import checks
from psg_jax.metrics import common

_MIN_SAMPLES = 20
_NUM_ROC_POINTS = 100


class Attack(NamedTuple):
  """How well an attack tells members from non-members.

  Attributes:
    accuracy: Share of right decisions on images that did not take part in
      choosing the threshold or fitting the classifier (cross-fitted), in
      [0, 1]; balanced accuracy, as both sides are equally many. Ideal: 0.5.
    auc: Area under the ROC curve, in [0, 1]. Ideal: 0.5.
    tpr: Share of members found at a false positive rate of at most 1 % and
      0.1 %, under the keys `"0.01"` and `"0.001"`. Ideal: the rate itself.
      None where the non-members are too few to have such a rate. None as a
      whole for classifiers, whose folds have no common scale.
    roc: None, or the false and true positive rates `[P]`, `P` at most 202, for
      a plot on linear or logarithmic axes.
    num_samples: Members, and as many non-members.
  """

  accuracy: float
  auc: float
  tpr: dict[str, float | None] | None
  roc: tuple[np.ndarray, np.ndarray] | None
  num_samples: int


def match(
  member_labels: np.ndarray,
  non_member_labels: np.ndarray,
  *,
  max_samples: int | None = None,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Chooses rows so that both sides have the same number of each class.

  Args:
    member_labels: int `[M]`.
    non_member_labels: int `[N]`.
    max_samples: Most rows a side, drawn at random from the matched pairs; None
      for all.
    seed: Seed of the draw.

  Returns:
    Sorted rows of the members, and as many of the non-members. Images of a
    class that only one side has are left out.

  Raises:
    ValueError: If `seed` is out of range.
    NotAvailableError: If fewer than 20 can be matched.
  """
  checks.integer("seed", seed, at_least=0)
  rng = np.random.default_rng(seed)
  members, others = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
  for label in np.intersect1d(member_labels, non_member_labels):
    rows = rng.permutation(np.flatnonzero(member_labels == label))
    other_rows = rng.permutation(np.flatnonzero(non_member_labels == label))
    count = min(len(rows), len(other_rows))
    members.append(rows[:count])
    others.append(other_rows[:count])
  left, right = np.concatenate(members), np.concatenate(others)
  if len(left) < _MIN_SAMPLES:
    raise common.NotAvailableError(
      f"{len(member_labels)} members and {len(non_member_labels)} non-members"
      f" have {len(left)} images of the same classes in common, and"
      f" {_MIN_SAMPLES} are needed"
    )
  drawn = common.choose_rows(len(left), max_samples, rng)
  return np.sort(left[drawn]), np.sort(right[drawn])


def label_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Cross-entropy `-log p_y` of each image, in nats.

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    float64 `[N]`, 0 or more.
  """
  common.check_logits(logits, labels)
  return -common.log_probabilities(logits)[np.arange(len(labels)), labels]


def entropies(logits: np.ndarray) -> np.ndarray:
  """Entropy `-Σ_k p_k log p_k` of each prediction, in nats.

  Args:
    logits: float `[N, K]`.

  Returns:
    float64 `[N]`, in [0, log K].
  """
  common.check_logits(logits)
  log_p = common.log_probabilities(logits)
  return -np.sum(np.exp(log_p) * log_p, -1)


def modified_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Modified entropy of each prediction, in nats.

  `-(1 - p_y) log p_y - Σ_{k≠y} p_k log(1 - p_k)`: 0 for a certain and right
  prediction, and growing without bound for a certain and wrong one, which
  plain entropy cannot tell apart. Where the paper's code cuts probabilities off
  at 1e-30, the logarithms here are exact, so that saturated predictions keep
  their order.

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    float64 `[N]`, 0 or more.

  References:
    Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning
    Models, 2021.
  """
  common.check_logits(logits, labels)
  log_p = common.log_probabilities(logits)
  log_rest = common.log_complements(logits)
  rows = np.arange(len(labels))
  terms = np.exp(log_p) * log_rest
  terms[rows, labels] = np.exp(log_rest[rows, labels]) * log_p[rows, labels]
  return -np.sum(terms, -1)


def _confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  return np.exp(-label_losses(logits, labels))


def _correctness(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  common.check_logits(logits, labels)
  return common.is_right(logits, labels).astype(np.float64)


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "loss": lambda logits, labels: -label_losses(logits, labels),
  "confidence": _confidence,
  "correctness": _correctness,
  "entropy": lambda logits, labels: -entropies(logits),
  "modified_entropy": lambda logits, labels: (
    -modified_entropies(logits, labels)
  ),
}
"""What a threshold attack looks at; the larger, the more likely a member."""


def _matched(
  score: Callable[[np.ndarray, np.ndarray], np.ndarray],
  sides: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
  seed: int,
  max_samples: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Scores of the matched images, members first, and which are members."""
  logits, labels, other_logits, other_labels = sides
  rows, others = match(labels, other_labels, max_samples=max_samples, seed=seed)
  values = [
    score(logits, labels)[rows],
    score(other_logits, other_labels)[others],
  ]
  return np.concatenate(values), np.repeat([1, 0], len(rows))


def threshold_attack(
  member_logits: np.ndarray,
  member_labels: np.ndarray,
  non_member_logits: np.ndarray,
  non_member_labels: np.ndarray,
  *,
  score: str = "loss",
  num_folds: int = 5,
  seed: int = 0,
) -> Attack:
  """Calls an image a member if its score reaches a threshold.

  The threshold is the best one of the other folds, so that the accuracy has
  no optimism. The attack has one direction, stated by `SCORES`; it is the same
  threshold for all classes, where Song and Mittal choose one a class.

  Direction: as retrained. Ideal: 0.5. Range: [0, 1].

  Args:
    member_logits: float `[M, K]`, of training images of the forget set.
    member_labels: int `[M]`.
    non_member_logits: float `[N, K]`, of test images.
    non_member_labels: int `[N]`.
    score: One of `SCORES`: minus the `loss`, the `confidence` in the label,
      `correctness`, minus the `entropy` or the `modified_entropy`.
    num_folds: Folds, at least 2.
    seed: Seed of the subsample and the folds.

  Returns:
    The attack.

  Raises:
    ValueError: If an argument is wrong.
    NotAvailableError: If too few images of the same classes are on both sides.

  References:
    Yeom et al., Privacy Risk in Machine Learning, 2018 (loss, correctness).
    Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning
    Models, 2021 (confidence, entropy, modified entropy).
    Carlini et al., Membership Inference Attacks From First Principles, 2022
    (true positives at a low false positive rate).
  """
  checks.one_of("score", score, SCORES)
  sides = (member_logits, member_labels, non_member_logits, non_member_labels)
  values, is_member = _matched(SCORES[score], sides, seed)
  hits = []
  for train, test in _folds(values, is_member, num_folds, seed):
    threshold = _best_threshold(values[train], is_member[train])
    hits.append(
      sklearn.metrics.balanced_accuracy_score(
        is_member[test], values[test] >= threshold
      )
    )
  fpr, tpr, _ = sklearn.metrics.roc_curve(
    is_member, values, drop_intermediate=False
  )
  num_samples = len(values) // 2
  return Attack(
    accuracy=float(np.mean(hits)),
    auc=float(sklearn.metrics.roc_auc_score(is_member, values)),
    tpr={
      str(rate): common.true_positive_rate(fpr, tpr, rate, num_samples)
      for rate in (0.01, 0.001)
    },
    roc=_thinned(fpr, tpr, num_samples),
    num_samples=num_samples,
  )


def logistic_attack(
  member_logits: np.ndarray,
  member_labels: np.ndarray,
  non_member_logits: np.ndarray,
  non_member_labels: np.ndarray,
  *,
  num_folds: int = 10,
  seed: int = 0,
) -> Attack:
  """Logistic regression on the loss of an image, cross-validated.

  The common attack of the unlearning benchmarks. Unlike theirs, the loss is
  standardised: losses of a sure model are so small that the default
  regularisation would leave them unused. It learns its direction, so that a
  model that forgot too much is found too.

  Direction: as retrained. Ideal: 0.5. Range: [0, 1].

  Args:
    member_logits: float `[M, K]`, of training images of the forget set.
    member_labels: int `[M]`.
    non_member_logits: float `[N, K]`, of test images.
    non_member_labels: int `[N]`.
    num_folds: Stratified folds, at least 2.
    seed: Seed of the subsample and the folds.

  Returns:
    The attack: the means over the folds.

  Raises:
    ValueError: If an argument is wrong.
    NotAvailableError: If too few images of the same classes are on both sides.

  References:
    Kurmanji et al., Towards Unbounded Machine Unlearning, 2023.
  """
  sides = (member_logits, member_labels, non_member_logits, non_member_labels)
  classifier = sklearn.pipeline.make_pipeline(
    sklearn.preprocessing.StandardScaler(),
    sklearn.linear_model.LogisticRegression(),
  )
  matched = _matched(label_losses, sides, seed)
  return _classify(classifier, *matched, num_folds, seed)


def svc_attack(
  member_logits: np.ndarray,
  member_labels: np.ndarray,
  non_member_logits: np.ndarray,
  non_member_labels: np.ndarray,
  *,
  num_folds: int = 5,
  max_samples: int | None = 1000,
  seed: int = 0,
) -> Attack:
  """Support vector classifier on the confidence in the label, cross-validated.

  The radial kernel can use confidences that are too high as well as too low.
  Where the paper's code fits it on retain images against test images and asks
  it about the forget set, it is fitted here on the very question, on other
  folds.

  Direction: as retrained. Ideal: 0.5. Range: [0, 1].

  Args:
    member_logits: float `[M, K]`, of training images of the forget set.
    member_labels: int `[M]`.
    non_member_logits: float `[N, K]`, of test images.
    non_member_labels: int `[N]`.
    num_folds: Stratified folds, at least 2.
    max_samples: Most images a side, drawn at random, as the time grows with
      the square; None for all.
    seed: Seed of the subsample and the folds.

  Returns:
    The attack: the means over the folds.

  Raises:
    ValueError: If an argument is wrong.
    NotAvailableError: If too few images of the same classes are on both sides.

  References:
    Jia et al., Model Sparsity Can Simplify Machine Unlearning, 2023.
  """
  sides = (member_logits, member_labels, non_member_logits, non_member_labels)
  # The kernel and the C of the paper's code; its gamma would leave the small
  # spread of confidences unused.
  classifier = sklearn.svm.SVC(C=3.0, kernel="rbf", gamma="scale")
  matched = _matched(_confidence, sides, seed, max_samples)
  return _classify(classifier, *matched, num_folds, seed)


def _classify(
  classifier: Any,
  values: np.ndarray,
  is_member: np.ndarray,
  num_folds: int,
  seed: int,
) -> Attack:
  """Cross-validates a classifier on one value an image."""
  features = values[:, None]
  hits, areas = [], []
  for train, test in _folds(values, is_member, num_folds, seed):
    classifier.fit(features[train], is_member[train])
    hits.append(
      sklearn.metrics.balanced_accuracy_score(
        is_member[test], classifier.predict(features[test])
      )
    )
    # An AUC a fold: scores of differently fitted classifiers cannot be ranked
    # together, and pooling them would push chance below 0.5.
    areas.append(
      sklearn.metrics.roc_auc_score(
        is_member[test], classifier.decision_function(features[test])
      )
    )
  return Attack(
    accuracy=float(np.mean(hits)),
    auc=float(np.mean(areas)),
    tpr=None,
    roc=None,
    num_samples=len(values) // 2,
  )


def _folds(
  values: np.ndarray, is_member: np.ndarray, num_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
  checks.integer("num_folds", num_folds, at_least=2)
  if 2 * num_folds > len(values):
    raise common.NotAvailableError(
      f"{len(values) // 2} matched images a side are too few for {num_folds}"
      " folds"
    )
  splitter = sklearn.model_selection.StratifiedKFold(
    num_folds, shuffle=True, random_state=seed
  )
  return list(splitter.split(values, is_member))


def _best_threshold(values: np.ndarray, is_member: np.ndarray) -> float:
  """The threshold `values >= t` of the best balanced accuracy."""
  fpr, tpr, thresholds = sklearn.metrics.roc_curve(is_member, values)
  return float(thresholds[np.argmax(tpr - fpr)])


def _thinned(
  fpr: np.ndarray, tpr: np.ndarray, num_non_members: int
) -> tuple[np.ndarray, np.ndarray]:
  """The best points of the curve at rates even in size and in logarithm."""
  rates = np.concatenate(
    [
      np.linspace(0, 1, _NUM_ROC_POINTS),
      np.geomspace(1 / num_non_members, 1, _NUM_ROC_POINTS),
    ]
  )
  best = np.searchsorted(fpr, rates, side="right") - 1
  rows = np.unique([0, *best, len(fpr) - 1])
  return fpr[rows], tpr[rows]
