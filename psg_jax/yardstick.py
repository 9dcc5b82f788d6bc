"""A yardstick: is an unlearned model as near as another retraining?

`measure` divides each distance to the retrained models by the distance that
these have to one another; 1 means as near as another retraining. A ratio is
not enough where the references disagree among themselves: the original model
may then be no further from them than they are from each other. So the levels
(accuracy, probability of the true class) stand beside it as standardised
differences, with the spread of the references. `judgement.judge`
needs all of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from psg_jax import checks, resampling
from psg_jax.metrics import common

DISTANCES = ("kl_divergence", "disagreement", "kl_to_mean", "class_accuracy")
LEVELS = ("accuracy", "true_class_probability")
_FORGET = ("test_forget", "train_forget")


class Attack(NamedTuple):
  """An attack's figure, such as its AUC, of each model.

  Attributes:
    unlearned: float `[M]`, the models of a training seed side by side, in the
      order of the logits.
    retrained: float `[S]`.
    num_samples: Images a side.
  """

  unlearned: Sequence[float]
  retrained: Sequence[float]
  num_samples: int


@dataclasses.dataclass(frozen=True)
class Distance:
  """A normalised distance.

  Attributes:
    name: In `DISTANCES`, or of an attack.
    split: The split; None for an attack, which takes two.
    value: `unlearned / floor`; 1: as near as another retraining. None where it
      is undefined.
    interval: Confidence interval of the value.
    unlearned: Mean distance of references and unlearned models, in the
      distance's own unit (nats or shares).
    floor: Mean distance over ordered pairs of references.
    references: Of each reference the distance to the others, over the floor;
      their mean is 1.
    reasons: Why something is None, and what the interval leaves out.
  """

  name: str
  split: str | None
  value: float | None = None
  interval: tuple[float, float] | None = None
  unlearned: float | None = None
  floor: float | None = None
  references: tuple[float, ...] = ()
  reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Level:
  """A model's figure among those of the references.

  Attributes:
    name: In `LEVELS`, or of an attack.
    split: The split; None for an attack.
    unlearned: Mean over training seeds.
    retrained: Mean over references; None without.
    sd: Standard deviation over references, at least that of chance over images
      where `reasons` say so.
    difference: `(unlearned - retrained) / sd`.
    p: Of the two-sided test that it is another of the references.
    interval: Where another retrained model lies, with the confidence asked for.
    reasons: Why something is None, and what was assumed.
  """

  name: str
  split: str | None
  unlearned: float
  retrained: float | None = None
  sd: float | None = None
  difference: float | None = None
  p: float | None = None
  interval: tuple[float, float] | None = None
  reasons: tuple[str, ...] = ()

  @property
  def is_flagged(self) -> bool:
    """Whether the model lies outside the interval."""
    if self.interval is None:
      return False
    return not self.interval[0] <= self.unlearned <= self.interval[1]


@dataclasses.dataclass(frozen=True)
class Spread:
  """How far references are from one another on a split.

  Attributes:
    split: The split.
    num_images: Its images.
    kl_divergence: Mean over ordered pairs, in nats; None with one reference.
    agreement: Mean share of same predictions; likewise.
  """

  split: str
  num_images: int
  kl_divergence: float | None
  agreement: float | None


@dataclasses.dataclass(frozen=True)
class Measurement:
  """All that is measured of unlearned models with their references.

  Attributes:
    distances: One a distance and split, and one an attack.
    levels: One a level and split.
    attacks: One an attack, as a level.
    spreads: One a split.
    num_references: `S`.
    num_seeds: Training seeds `T` of the unlearned models.
    confidence: Of the intervals.
  """

  distances: tuple[Distance, ...]
  levels: tuple[Level, ...]
  attacks: tuple[Level, ...]
  spreads: tuple[Spread, ...]
  num_references: int
  num_seeds: int
  confidence: float

  @property
  def forget_split(self) -> str | None:
    """The split to judge by: test images to forget, or training images."""
    known = [row.split for row in self.spreads if row.num_images]
    return next((split for split in _FORGET if split in known), None)

  def distance(self, name: str, split: str | None) -> Distance | None:
    """Returns a distance; None if it was not measured."""
    return _named(self.distances, name, split)

  def level(self, name: str, split: str | None) -> Level | None:
    """Returns a level; None if it was not measured."""
    return _named(self.levels, name, split)

  def spread(self, split: str | None) -> Spread | None:
    """Returns the spread on a split; None if it was not measured."""
    return next((x for x in self.spreads if x.split == split), None)


def _named(rows: Sequence[Any], name: str, split: str | None) -> Any:
  return next((x for x in rows if (x.name, x.split) == (name, split)), None)


def measure(
  retrained: Mapping[str, Any],
  unlearned: Mapping[str, resampling.Unlearned],
  labels: Mapping[str, np.ndarray],
  *,
  attacks: Mapping[str, Attack] | None = None,
  groups: Mapping[str, np.ndarray] | None = None,
  confidence: float = 0.9,
  num_resamples: int = 1000,
  seed: int = 0,
) -> Measurement:
  """Measures unlearned models by what retrained models are to one another.

  The normalised distance of each `D` is

      mean_{s,m} D(retrained_s, unlearned_m)
        / mean_{s≠s'} D(retrained_s, retrained_s')

  1 for a model that is as near as another retraining. `D` is the mean over
  images of `KL(reference ‖ model)` in nats (`kl_divergence`) or of differing
  predictions (`disagreement`), the mean over classes of `|acc - acc'|`
  (`class_accuracy`), or `|a - a'|` of an attack's figure. `kl_to_mean` has the
  references' mean prediction in the place of a reference, that of all others
  but one on both sides, so that 1 is again what a retrained model has.

  The interval is that of the hierarchical bootstrap of `verification.compare`,
  of `log(numerator) - log(denominator)` to first order: resampled denominators
  of few references may come near to 0, and their ratio would have no variance.
  No reference is paired with itself (jackknife pseudo-values). References count
  on both sides of the fraction with the same weights. Images are resampled for
  the first three distances; those of class accuracies and of attacks are taken
  as they are.

  A level has the standardised difference `z = (mean_m θ - mean_s θ) / sd_s θ`
  and Student's test `t = z / sqrt(1/T + 1/S)` with `S - 1` degrees of freedom:
  `T` new values against `S` references. So few references may agree by chance,
  and on images that all get right the deviation is 0; so `sd` is at least
  `sqrt(p (1 - p) / N)`, `p = (N θ + 1) / (N + 2)`: what models have that are
  right on each image with the same probability, independently. It is a bound:
  images that all models find easy, or hard, vary less. For an attack the bound
  is the deviation of an AUC of no skill, `sqrt((2 n + 1) / (12 n²))`, and it
  stands alone where the deviation is 0 or there is one reference, whose
  comparison is then with chance.

  Args:
    retrained: Logits `[S, N, K]`, or `[N, K]` by seed, by split; `S >= 1`.
    unlearned: Logits `[T, U, N, K]`, or `[U, N, K]` by training seed, by split.
    labels: int `[N]` by split, of `train_forget`, `test_forget` and so on.
    attacks: By name.
    groups: `[N]` by split, such as patients, that are drawn as a whole.
    confidence: Of the intervals, in (0.5, 1).
    num_resamples: 100 or more.
    seed: Of the resampling.

  Returns:
    The measurement.

  Raises:
    ValueError: If splits, shapes or numbers do not fit together.
  """
  bootstrap, splits = resampling.prepare(
    retrained,
    unlearned,
    labels,
    groups=groups,
    confidence=confidence,
    num_resamples=num_resamples,
    seed=seed,
  )
  distances: list[Distance] = []
  levels: list[Level] = []
  spreads: list[Spread] = []
  for split in splits:
    measured = _of_split(split, bootstrap)
    distances += measured
    levels += _levels(split, bootstrap)
    floors = {row.name: row.floor for row in measured}
    apart = floors["disagreement"]
    spreads.append(
      Spread(
        *(split.name, len(split.labels), floors["kl_divergence"]),
        None if apart is None else 1 - apart,
      )
    )
  flags = []
  for name, attack in (attacks or {}).items():
    ours, theirs = _checked_attack(name, attack, bootstrap)
    distances.append(
      _figure_distance(name, None, ours[:, None], theirs[:, None], bootstrap)
    )
    flags.append(_attack_level(name, ours, theirs, attack, bootstrap))
  return Measurement(
    distances=tuple(distances),
    levels=tuple(levels),
    attacks=tuple(flags),
    spreads=tuple(spreads),
    num_references=bootstrap.num_retrained,
    num_seeds=len(bootstrap.sizes),
    confidence=confidence,
  )


def _of_split(
  split: resampling.Split, bootstrap: resampling.Bootstrap
) -> list[Distance]:
  """The four distances of a split."""
  if not len(split.labels):
    reasons = ("the split has no images",)
    return [Distance(name, split.name, reasons=reasons) for name in DISTANCES]
  models = split.unlearned, split.retrained
  *names, by_class = DISTANCES
  values = (
    _pairs(common.pairwise_kl, *models),
    _pairs(_disagreement, *models),
    _to_mean(*models),
  )
  statistics = [
    resampling.Statistic(name, x)
    for name, (x, _) in zip(names, values, strict=True)
  ]
  resampled = resampling.resample(statistics, split, len(bootstrap.ours))
  distances = [
    _normalised(name, split.name, means, x, split.num_groups - 1, bootstrap)
    for name, means, (_, x) in zip(names, resampled, values, strict=True)
    if means is not None
  ]
  classes = np.unique(split.labels)
  is_right = (common.is_right(x, split.labels) for x in models)
  ours, theirs = (
    np.stack([x[:, split.labels == y].mean(-1) for y in classes], -1)
    for x in is_right
  )
  distances.append(
    _figure_distance(by_class, split.name, ours, theirs, bootstrap)
  )
  return distances


def _disagreement(logits: np.ndarray, retrained: np.ndarray) -> np.ndarray:
  return 1 - resampling.agreement(logits, retrained)


def _pairs(
  distance: Any, logits: np.ndarray, references: np.ndarray
) -> tuple[resampling.Values, np.ndarray | None]:
  """Values of a distance, and each reference's mean to the others `[S]`."""
  values, between = resampling.pairs(distance, logits, references)
  num = len(between)
  if num < 2:
    return values, None
  off = between.mean(-1) * (1 - np.eye(num))
  return values, off.sum(1) / (num - 1)


def _to_mean(
  logits: np.ndarray, references: np.ndarray
) -> tuple[resampling.Values, np.ndarray | None]:
  """Divergence from the mean prediction of all references but one."""
  num = len(references)
  if num < 2:
    return resampling.Values(
      np.zeros((len(logits), 1, logits.shape[1])), None
    ), None
  p = common.probabilities(references)
  # A mean of probabilities has no logits; a floor keeps the logarithm finite.
  means = np.maximum((p.sum(0) - p) / (num - 1), np.finfo(np.float64).tiny)
  log_means = np.log(means)
  ours = common.pairwise_kl(logits, log_means)
  theirs = np.einsum("ssn->sn", common.pairwise_kl(references, log_means))
  return resampling.Values(ours, theirs), theirs.mean(-1)


def _figure_distance(
  name: str,
  split: str | None,
  ours: np.ndarray,
  theirs: np.ndarray,
  bootstrap: resampling.Bootstrap,
) -> Distance:
  """Mean absolute difference of figures `[M, C]` and `[S, C]`."""

  def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x[:, None] - y[None]).mean(-1, keepdims=True)

  values, of_reference = _pairs(distance, ours, theirs)
  measured = _normalised(
    name, split, (values, values), of_reference, 1, bootstrap
  )
  if measured.interval is None:
    return measured
  reason = "the interval is over seeds alone: images are taken as they are"
  return dataclasses.replace(measured, reasons=(*measured.reasons, reason))


def _normalised(
  name: str,
  split: str | None,
  means: tuple[resampling.Values, resampling.Values],
  of_reference: np.ndarray | None,
  image_freedom: int,
  bootstrap: resampling.Bootstrap,
) -> Distance:
  """The ratio of both sides, and its interval on the scale of logarithms."""
  whole = means[0]
  if whole.retrained is None or of_reference is None:
    mean = float(bootstrap.uniform[0] @ whole.unlearned.mean((1, 2)))
    reason = "one retrained model: it has no other to be compared with"
    value = None if name == "kl_to_mean" else mean
    return Distance(name, split, unlearned=value, reasons=(reason,))
  ours, floor = (
    float(side[0])
    for side in resampling.sides(whole, bootstrap.uniform, bootstrap.equal)
  )
  # Of pseudo-values, whose rounding must not make a floor of nothing.
  if floor <= 1e-12 * max(1.0, ours):
    reason = "the references do not differ from one another"
    return Distance(name, split, unlearned=ours, floor=floor, reasons=(reason,))
  value = ours / floor
  interval, reasons = None, []
  if bootstrap.num_retrained < 3:
    reasons = [
      "two retrained models make one pair: how much pairs differ is unknown"
    ]
  else:
    # To first order, the logarithm of the ratio.
    scaled, drawn = (
      resampling.Values(x.unlearned / ours, x.retrained / floor)
      for x in means
      if x.retrained is not None
    )
    low, high = bootstrap.interval(
      0.0, bootstrap.replicates(drawn), scaled, image_freedom
    )
    interval = (value * math.exp(low), value * math.exp(min(high, 700.0)))
    if len(bootstrap.sizes) == 1:
      reasons = ["one training seed was unlearned: this model alone"]
  return Distance(
    *(name, split, value, interval, ours, floor),
    tuple(float(x) for x in of_reference / floor),
    tuple(reasons),
  )


def _levels(
  split: resampling.Split, bootstrap: resampling.Bootstrap
) -> list[Level]:
  """Accuracy and mean probability of the true class, among the references."""
  labels = split.labels
  if not len(labels):
    return []
  rows = np.arange(len(labels))

  def probability(logits: np.ndarray) -> np.ndarray:
    return np.asarray(common.probabilities(logits)[:, rows, labels].mean(-1))

  def accuracy(logits: np.ndarray) -> np.ndarray:
    return np.asarray(common.is_right(logits, labels).mean(-1))

  levels = []
  for name, fn in zip(LEVELS, (accuracy, probability), strict=True):
    ours, theirs = fn(split.unlearned), fn(split.retrained)
    share = (len(labels) * theirs.mean() + 1) / (len(labels) + 2)
    least = math.sqrt(share * (1 - share) / len(labels))
    levels.append(_level(name, split.name, ours, theirs, least, bootstrap))
  return levels


def _level(
  name: str,
  split: str | None,
  ours: np.ndarray,
  theirs: np.ndarray,
  least: float,
  bootstrap: resampling.Bootstrap,
) -> Level:
  """Student's test of new values against the references."""
  mean, expected = float(bootstrap.uniform[0] @ ours), float(theirs.mean())
  num = len(theirs)
  if num < 2:
    reason = "one retrained model: how much they vary is unknown"
    return Level(name, split, mean, expected, reasons=(reason,))
  sd, reasons = float(np.std(theirs, ddof=1)), []
  if sd < least:
    sd, reasons = least, ["the deviation is that of chance over images"]
  difference = (mean - expected) / sd
  width = math.sqrt(1 / len(bootstrap.sizes) + 1 / num)
  half = scipy.stats.t.isf((1 - bootstrap.confidence) / 2, num - 1) * width * sd
  return Level(
    *(name, split, mean, expected, sd, difference),
    p=float(2 * scipy.stats.t.sf(abs(difference) / width, num - 1)),
    interval=(float(expected - half), float(expected + half)),
    reasons=tuple(reasons),
  )


def _attack_level(
  name: str,
  ours: np.ndarray,
  theirs: np.ndarray,
  attack: Attack,
  bootstrap: resampling.Bootstrap,
) -> Level:
  """Where an attack's figure lies among the references', or beside chance."""
  null = null_std(attack.num_samples)
  if len(theirs) > 1:
    # All are attacked with the same images: chance over these is no bound.
    least = null if np.std(theirs) == 0 else 0.0
    return _level(name, None, ours, theirs, least, bootstrap)
  level = _level(name, None, ours, theirs, null, bootstrap)
  half = scipy.stats.norm.isf((1 - bootstrap.confidence) / 2) * null
  reason = "one retrained model: compared with chance"
  return dataclasses.replace(
    level, interval=(0.5 - half, 0.5 + half), reasons=(reason,)
  )


def null_std(num_samples: int) -> float:
  """Standard deviation of the AUC of an attack without skill."""
  return math.sqrt((2 * num_samples + 1) / 12) / num_samples


def _checked_attack(
  name: str, attack: Attack, bootstrap: resampling.Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
  checks.integer(f"num_samples of {name}", attack.num_samples, at_least=1)
  ours = np.asarray(attack.unlearned, np.float64)
  theirs = np.asarray(attack.retrained, np.float64)
  expected = ((sum(bootstrap.sizes),), (bootstrap.num_retrained,))
  if (ours.shape, theirs.shape) != expected or not (
    np.isfinite(ours).all() and np.isfinite(theirs).all()
  ):
    raise ValueError(
      f"attack {name} must have a finite figure of each model, {expected}, got"
      f" {ours.shape} and {theirs.shape}"
    )
  return ours, theirs
