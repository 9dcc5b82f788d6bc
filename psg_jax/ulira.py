"""U-LiRA and KLOM, of the many small models that they need.

An attack that knows each image well asks for many models that unlearned it and
many that never saw it. `ensembles.train` trains small ones together in one
compiled program. The plan, for a forget set:

1. `draw_membership` and `ensembles.train`: each image is in half of the models.
2. Unlearn, from each model, the images to be audited that it was trained on.
3. `ensembles.predict` and `logit_confidence`: `φ` of each model and image, with
   NaN where it is of the other kind.
4. `attack` on the two kinds; `klom` against models retrained without them.

Steps 3 and 4 are NumPy on the host.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import sklearn.metrics

from psg_jax import checks
from psg_jax.metrics import common

KLOM_METHODS = ("histogram", "gaussian")
# With fewer models a side, one variance is estimated for all images.
_MIN_MODELS_FOR_VARIANCE = 64
# Confidences that do not vary at all would be infinitely telling.
_MIN_STD = 1e-3


def logit_confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Scales the confidence in the true class: `φ = log(p_y / (1 - p_y))`.

  Computed from logits, which does not lose digits where `p_y` is near 1. It is
  the margin of KLOM, too, and near to normally distributed over models. Larger:
  more confident in the true class.

  Args:
    logits: float `[..., N, K]`, `K` 2 or more.
    labels: int `[N]`.

  Returns:
    float64 `[..., N]`.

  Raises:
    ValueError: If the shapes do not fit.

  References:
    Carlini et al., Membership Inference Attacks From First Principles, 2022.
  """
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  if logits.ndim < 2 or logits.shape[-2:-1] != labels.shape:
    raise ValueError(
      f"logits must be [..., N, K] and labels [N], got {list(logits.shape)} and"
      f" {list(labels.shape)}"
    )
  checks.labels(labels, len(labels), logits.shape[-1])
  return common.log_odds(logits)[..., np.arange(len(labels)), labels]


class Gaussians(NamedTuple):
  """A normal distribution an image.

  Attributes:
    mean: float64 `[N]`.
    std: float64 `[N]`, at least 0.001; all the same with a shared variance.
  """

  mean: np.ndarray
  std: np.ndarray


def fit_gaussians(
  confidences: np.ndarray, *, is_variance_shared: bool | None = None
) -> Gaussians:
  """Fits a normal distribution to each image's confidences over models.

  Args:
    confidences: float `[M, N]`, NaN where a model does not count for an image.
    is_variance_shared: Whether all images have the same variance, the mean over
      images of the variance over models; None for fewer than 64 models.

  Returns:
    The distributions; NaN for an image without two models (one, with a shared
    variance).

  Raises:
    ValueError: If the shape is another, or no image has two models.

  References:
    Carlini et al., Membership Inference Attacks From First Principles, 2022.
  """
  moments = _moments("confidences", confidences)
  return _gaussians(moments, _is_shared(moments, is_variance_shared))


def log_likelihood_ratio(
  targets: np.ndarray, unlearned: Gaussians, never_trained: Gaussians
) -> np.ndarray:
  """Scores how much a model looks as if it had unlearned an image.

      score = log N(φ; unlearned) - log N(φ; never trained)

  Larger: more likely trained on and unlearned. After ideal unlearning the two
  distributions, and so the scores of the two kinds of model, are the same.

  Args:
    targets: float `[..., N]`, `φ` of the models under attack.
    unlearned: Of shadow models that unlearned the image.
    never_trained: Of shadow models that were never trained on it.

  Returns:
    float64 `[..., N]`, in nats.

  References:
    Hayes et al., Inexact Unlearning Needs More Careful Evaluations to Avoid a
    False Sense of Privacy, 2024 (U-LiRA).
  """
  targets = np.asarray(targets, np.float64)

  def log_density(to: Gaussians) -> np.ndarray:
    return -0.5 * ((targets - to.mean) / to.std) ** 2 - np.log(to.std)

  return log_density(unlearned) - log_density(never_trained)


@dataclasses.dataclass(frozen=True)
class AttackResult:
  """How well models that unlearned an image are told from those without it.

  Attributes:
    auc: Area under the ROC curve, in [0, 1], ideally 0.5.
    accuracy: Largest share of right answers, each kind counting half, in
      [0.5, 1], ideally 0.5.
    tpr_at_1_percent: True positive rate at a false positive rate of at most
      1 %, ideally 0.01; None with fewer than 100 negatives.
    tpr_at_01_percent: Likewise at 0.1 %, ideally 0.001; None with fewer than
      1,000.
    num_positives: Pairs of a model and an image that it unlearned.
    num_negatives: Pairs of a model and an image it was never trained on.
    fpr: `[P]`, false positive rates of the ROC curve.
    tpr: `[P]`, true positive rates.
    positive_scores: Scores like the array given for the unlearned models.
    negative_scores: Likewise for those never trained on the image.
  """

  auc: float
  accuracy: float
  tpr_at_1_percent: float | None
  tpr_at_01_percent: float | None
  num_positives: int
  num_negatives: int
  fpr: np.ndarray
  tpr: np.ndarray
  positive_scores: np.ndarray
  negative_scores: np.ndarray

  def as_dict(self) -> dict[str, Any]:
    """Returns the figures for JSON, without the curve and the scores."""
    arrays = ("fpr", "tpr", "positive_scores", "negative_scores")
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in arrays
    }


def attack(
  unlearned: np.ndarray,
  never_trained: np.ndarray,
  *,
  is_variance_shared: bool | None = None,
) -> AttackResult:
  """Attacks each model in turn, with all others as shadow models (U-LiRA).

  Leave-one-model-out: the model under attack has no part in the distributions
  that it is scored with, and of the other kind one model is left out, too, so
  that neither side is fitted better. All models and images make one ROC curve,
  with the positives those that unlearned the image.

  Args:
    unlearned: float `[M, N]`, `φ` (`logit_confidence`) of models that were
      trained on the image and unlearned it; NaN where one did not.
    never_trained: float `[M', N]`, of models never trained on it, likewise. If
      one ensemble gives both, row `m` is model `m` in both.
    is_variance_shared: As for `fit_gaussians`.

  Returns:
    The curve and its figures.

  Raises:
    ValueError: If the shapes differ, or no image has enough models.

  References:
    Hayes et al., Inexact Unlearning Needs More Careful Evaluations to Avoid a
    False Sense of Privacy, 2024. Carlini et al., Membership Inference Attacks
    From First Principles, 2022 (low false positive rates).
  """
  ours = _moments("unlearned", unlearned)
  theirs = _moments("never_trained", never_trained)
  if ours.values.shape[1] != theirs.values.shape[1]:
    raise ValueError(
      "unlearned and never_trained must have the same images, got"
      f" {list(ours.values.shape)} and {list(theirs.values.shape)}"
    )
  is_shared = _is_shared(ours, is_variance_shared) or (
    _is_shared(theirs, is_variance_shared)
  )
  positives = _held_out_scores(ours, ours, theirs, is_shared)
  negatives = _held_out_scores(theirs, ours, theirs, is_shared)
  scores = [x[np.isfinite(x)] for x in (positives, negatives)]
  if not all(map(len, scores)):
    raise ValueError(
      "unlearned and never_trained must have three models of some image each"
    )
  fpr, tpr, _ = sklearn.metrics.roc_curve(
    np.repeat([1, 0], [len(x) for x in scores]),
    np.concatenate(scores),
    drop_intermediate=True,
  )
  percent, per_mille = (
    common.true_positive_rate(fpr, tpr, rate, len(scores[1]))
    for rate in (0.01, 0.001)
  )
  return AttackResult(
    auc=float(sklearn.metrics.auc(fpr, tpr)),
    accuracy=float(np.max(1 + tpr - fpr) / 2),
    tpr_at_1_percent=percent,
    tpr_at_01_percent=per_mille,
    num_positives=len(scores[0]),
    num_negatives=len(scores[1]),
    fpr=fpr,
    tpr=tpr,
    positive_scores=positives,
    negative_scores=negatives,
  )


class _Moments(NamedTuple):
  """Confidences `[M, N]` and, of each image, count, mean and squares `[N]`.

  The squares are summed about the mean, to lose no digits.
  """

  values: np.ndarray
  counts: np.ndarray
  mean: np.ndarray
  squares: np.ndarray


def _moments(name: str, confidences: np.ndarray) -> _Moments:
  values = np.asarray(confidences, np.float64)
  is_there = ~np.isnan(values)
  if values.ndim != 2 or not np.all(np.isfinite(values[is_there])):
    raise ValueError(
      f"{name} must be [M, N], finite or NaN, got {list(values.shape)}"
    )
  count = is_there.sum(0)
  if not np.any(count >= 2):
    raise ValueError(f"{name} must have two models of some image, got fewer")
  total = np.where(is_there, values, 0.0).sum(0)
  mean = np.divide(
    total, count, out=np.full(len(count), np.nan), where=count > 0
  )
  squares = np.where(is_there, (values - mean) ** 2, 0.0).sum(0)
  return _Moments(values, count, mean, squares)


def _is_shared(moments: _Moments, given: bool | None) -> bool:
  if given is not None:
    return given
  return bool(moments.counts.max() < _MIN_MODELS_FOR_VARIANCE)


def _gaussians(moments: _Moments, is_shared: bool) -> Gaussians:
  """Means and standard deviations from moments."""
  freedom = moments.counts - 1
  with np.errstate(divide="ignore", invalid="ignore"):
    if is_shared:
      variance = np.full_like(
        moments.mean, np.nansum(moments.squares) / np.maximum(freedom, 0).sum()
      )
    else:
      variance = np.where(freedom > 0, moments.squares / freedom, np.nan)
  return Gaussians(moments.mean, np.sqrt(np.maximum(variance, _MIN_STD**2)))


def _without(moments: _Moments, model: int) -> _Moments:
  """The moments without one model, in closed form."""
  value = moments.values[model]
  is_there = ~np.isnan(value)
  count = moments.counts - is_there
  delta = np.where(is_there, value - moments.mean, 0.0)
  with np.errstate(divide="ignore", invalid="ignore"):
    mean = np.where(count > 0, moments.mean - delta / count, np.nan)
    lost = delta**2 * moments.counts / count
  squares = moments.squares - np.where(is_there & (count > 0), lost, 0.0)
  # Rounding may leave a little less than nothing.
  return _Moments(moments.values, count, mean, np.maximum(squares, 0.0))


def _held_out_scores(
  targets: _Moments, ours: _Moments, theirs: _Moments, is_shared: bool
) -> np.ndarray:
  """Scores `[M, N]` of the targets, each with distributions without it."""
  scores = np.empty_like(targets.values)
  for model, values in enumerate(targets.values):
    kinds = (
      _gaussians(_without(moments, model % len(moments.values)), is_shared)
      for moments in (ours, theirs)
    )
    scores[model] = log_likelihood_ratio(values, *kinds)
  return scores


def klom(
  unlearned: np.ndarray,
  retrained: np.ndarray,
  *,
  method: str = "histogram",
  num_bins: int = 20,
  clip: float = 100.0,
  min_probability: float = 1e-5,
) -> np.ndarray:
  """KL divergence of margins, `KL(unlearned ‖ retrained)` of each image.

      KL = Σ_bins p log(p / q)    or    log(σ_q/σ_p) + (σ_p² + (μ_p - μ_q)²)
                                        / (2 σ_q²) - 1/2

  over models, of the margins `φ` (`logit_confidence`) on one image, with `p` of
  the unlearned and `q` of the retrained models; 0 or more, ideally what two
  halves of the retrained models have (above 0 with few models). The direction,
  the bins (from the smallest to the largest margin of both) and the floor of
  `q` are those of the authors' released code, which loses the largest margin;
  here it is in the last bin. Histograms ask for a hundred models a side, the
  normal distributions for ten.

  Args:
    unlearned: float `[M, N]`.
    retrained: float `[M', N]`.
    method: `"histogram"` or `"gaussian"`.
    num_bins: Bins of a histogram.
    clip: Largest absolute margin; what lies beyond is moved there.
    min_probability: Smallest `q` of a bin where `p` is positive. `q` is then
      normalised again.

  Returns:
    float64 `[N]`, in nats.

  Raises:
    ValueError: If a shape or an argument is out of its range.

  References:
    Georgiev et al., Attribute-to-Delete: Machine Unlearning via Datamodel
    Matching, 2024, appendix E.1.
  """
  checks.one_of("method", method, KLOM_METHODS)
  checks.integer("num_bins", num_bins, at_least=2)
  checks.number("clip", clip, above=0)
  checks.number("min_probability", min_probability, above=0, at_most=1)
  sides = []
  for name, values in (("unlearned", unlearned), ("retrained", retrained)):
    moments = _moments(name, values)
    if np.isnan(moments.values).any():
      raise ValueError(f"{name} must have each model on each image, got NaN")
    sides.append(np.clip(moments.values, -clip, clip))
  p, q = sides
  if p.shape[1] != q.shape[1]:
    raise ValueError(
      "unlearned and retrained must have the same images, got"
      f" {list(p.shape)} and {list(q.shape)}"
    )
  if method == "gaussian":
    ours, theirs = (fit_gaussians(x, is_variance_shared=False) for x in sides)
    ratio = ours.std / theirs.std
    distance = (ours.mean - theirs.mean) / theirs.std
    return (ratio**2 + distance**2 - 1) / 2 - np.log(ratio)
  low = np.minimum(p.min(0), q.min(0))
  span = np.maximum(p.max(0), q.max(0)) - low
  # All the same: one bin.
  span = np.where(span > 0, span, 1.0)
  p, q = (_bin_shares((x - low) / span, num_bins) for x in sides)
  q = np.where(p > 0, np.maximum(q, min_probability), q)
  q = q / q.sum(1, keepdims=True)
  return scipy.special.rel_entr(p, q).sum(1)


def _bin_shares(values: np.ndarray, num_bins: int) -> np.ndarray:
  """Shares of models `[N, bins]` from values `[M, N]` in [0, 1]."""
  bins = np.floor(values * num_bins).astype(np.int64)
  bins = np.minimum(bins, num_bins - 1)
  places = bins + num_bins * np.arange(values.shape[1])
  counts = np.bincount(places.ravel(), minlength=num_bins * values.shape[1])
  return counts.reshape(-1, num_bins) / len(values)


def draw_membership(
  num_models: int,
  num_images: int,
  rng: np.random.Generator,
  *,
  fraction: float = 0.5,
) -> np.ndarray:
  """Draws which model is trained on which image.

  Args:
    num_models: `M`, 2 or more.
    num_images: `N`.
    rng: NumPy's generator.
    fraction: Share of the models that each image is in, in (0, 1).

  Returns:
    bool `[M, N]`; each image is in the same number of models, so that none is
    without models of either kind.

  Raises:
    ValueError: If an argument is out of its range.
  """
  checks.integer("num_models", num_models, at_least=2)
  checks.integer("num_images", num_images, at_least=1)
  checks.number("fraction", fraction, above=0)
  num_in = round(fraction * num_models)
  if not 0 < num_in < num_models:
    raise ValueError(
      f"fraction must leave models of both kinds among {num_models}, got"
      f" {fraction}"
    )
  ranks = np.argsort(rng.random((num_models, num_images)), 0)
  return ranks < num_in
