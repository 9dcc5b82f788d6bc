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
import scipy.special
import scipy.stats

from psg_jax import checks, resampling

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
  value: float | None
  interval: tuple[float, float] | None
  unlearned: float | None
  floor: float | None
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
  retrained: float | None
  sd: float | None
  difference: float | None
  p: float | None
  interval: tuple[float, float] | None
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
    known = [each.split for each in self.spreads if each.num_images]
    return next((split for split in _FORGET if split in known), None)

  def distance(self, name: str, split: str | None) -> Distance | None:
    """Returns a distance; None if it was not measured."""
    return next(
      (x for x in self.distances if (x.name, x.split) == (name, split)), None
    )

  def level(self, name: str, split: str | None) -> Level | None:
    """Returns a level; None if it was not measured."""
    return next(
      (x for x in self.levels if (x.name, x.split) == (name, split)), None
    )

  def spread(self, split: str | None) -> Spread | None:
    """Returns the spread on a split; None if it was not measured."""
    return next((x for x in self.spreads if x.split == split), None)


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
  checks.integer("num_resamples", num_resamples, at_least=100)
  checks.integer("seed", seed, at_least=0)
  checks.number("confidence", confidence, above=0.5)
  if confidence >= 1:
    raise ValueError(f"confidence must be below 1, got {confidence}")
  resampling.check_splits(
    labels, {"unlearned": unlearned, "retrained": retrained}
  )
  streams = np.random.SeedSequence(seed).spawn(1 + len(labels))
  sides: dict[str, tuple[resampling.Runs, np.ndarray, np.ndarray]] = {}
  for split in labels:
    truth = np.asarray(labels[split])
    runs = resampling.checked_runs(split, unlearned[split], truth)
    references = resampling.checked_reference(split, retrained[split], runs)
    sides[split] = (runs, references, truth)
  sizes = resampling.common(
    "unlearned", [x.sizes for x, _, _ in sides.values()]
  )
  num_references = resampling.common(
    "retrained", [len(x) for _, x, _ in sides.values()]
  )
  rng = np.random.default_rng(streams[0])
  bootstrap = _Bootstrap(
    resampling.unlearned_weights(rng, sizes, num_resamples),
    resampling.drawn_weights(rng, num_references, num_resamples),
    sizes,
    num_references,
    confidence,
  )
  distances: list[Distance] = []
  levels: list[Level] = []
  spreads: list[Spread] = []
  for (split, data), stream in zip(sides.items(), streams[1:], strict=True):
    group = resampling.checked_groups(split, (groups or {}).get(split), data[2])
    generator = np.random.default_rng(stream)
    found = _of_split(split, data, group, bootstrap, generator)
    distances += found
    levels += _levels(split, data, bootstrap)
    floors = {each.name: each.floor for each in found}
    apart = floors.get("disagreement")
    spreads.append(
      Spread(
        split,
        len(data[2]),
        floors.get("kl_divergence"),
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
    num_references=num_references,
    num_seeds=len(sizes),
    confidence=confidence,
  )


class _Bootstrap(NamedTuple):
  """What all statistics are resampled with."""

  ours: np.ndarray  # [B, M]
  theirs: np.ndarray  # [B, S]
  sizes: tuple[int, ...]
  num_references: int
  confidence: float


def _of_split(
  split: str,
  data: tuple[resampling.Runs, np.ndarray, np.ndarray],
  groups: np.ndarray,
  bootstrap: _Bootstrap,
  rng: np.random.Generator,
) -> list[Distance]:
  """The four distances of a split."""
  runs, references, truth = data
  if not len(truth):
    reason = ("the split has no images",)
    return [
      Distance(name, split, None, None, None, None, (), reason)
      for name in DISTANCES
    ]
  values = dict(
    zip(
      DISTANCES[:3],
      (
        _pairs(resampling.kl_divergence, runs.logits, references),
        _pairs(_disagreement, runs.logits, references),
        _to_mean(runs.logits, references),
      ),
      strict=True,
    )
  )
  resampled = resampling.resample(
    [
      resampling.Statistic(name, x, None, False)
      for name, (x, _) in values.items()
    ],
    (runs.logits, references, truth),
    groups,
    len(bootstrap.ours),
    rng,
  )
  found = [
    _normalised(
      name, split, means, of_reference, len(np.unique(groups)) - 1, bootstrap
    )
    for (name, (_, of_reference)), means in zip(
      values.items(), resampled, strict=True
    )
    if means is not None
  ]
  classes = np.unique(truth)
  ours, theirs = (
    np.stack(
      [
        np.mean(np.argmax(logits[:, truth == label], -1) == label, -1)
        for label in classes
      ],
      -1,
    )
    for logits in (runs.logits, references)
  )
  found.append(
    _figure_distance("class_accuracy", split, ours, theirs, bootstrap)
  )
  return found


def _disagreement(logits: np.ndarray, retrained: np.ndarray) -> np.ndarray:
  return 1 - resampling.agreement(logits, retrained)


def _pairs(
  distance: Any, logits: np.ndarray, references: np.ndarray
) -> tuple[resampling.Values, np.ndarray | None]:
  """Values of a distance, and each reference's mean to the others `[S]`."""
  between = distance(references, references)
  return (
    resampling.Values(
      distance(logits, references), resampling.pseudo_values(between)
    ),
    _to_others(between.mean(-1)),
  )


def _to_others(between: np.ndarray) -> np.ndarray | None:
  """Mean over the others of distances `[S, S]` that a model has to them."""
  num = len(between)
  if num < 2:
    return None
  off = between * (1 - np.eye(num))
  return np.asarray(off.sum(1) / (num - 1))


def _to_mean(
  logits: np.ndarray, references: np.ndarray
) -> tuple[resampling.Values, np.ndarray | None]:
  """Divergence from the mean prediction of all references but one."""
  num = len(references)
  if num < 2:
    return resampling.Values(
      np.zeros((len(logits), 1, logits.shape[1])), None
    ), None
  p = scipy.special.softmax(np.asarray(references, np.float64), -1)
  # A mean of probabilities has no logits; a floor keeps the logarithm finite.
  means = np.maximum((p.sum(0) - p) / (num - 1), np.finfo(np.float64).tiny)
  log_means = np.log(means)
  ours = resampling.kl_divergence(logits, log_means)
  theirs = np.einsum("ssn->sn", resampling.kl_divergence(references, log_means))
  return resampling.Values(ours, theirs), theirs.mean(-1)


def _figure_distance(
  name: str,
  split: str | None,
  ours: np.ndarray,
  theirs: np.ndarray,
  bootstrap: _Bootstrap,
) -> Distance:
  """Mean absolute difference of figures `[M, C]` and `[S, C]`."""

  def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x[:, None] - y[None]).mean(-1, keepdims=True)

  values, of_reference = _pairs(distance, ours, theirs)
  found = _normalised(name, split, (values, values), of_reference, 1, bootstrap)
  if found.interval is None:
    return found
  reason = "the interval is over seeds alone: images are taken as they are"
  return dataclasses.replace(found, reasons=(*found.reasons, reason))


def _normalised(
  name: str,
  split: str | None,
  means: tuple[resampling.Values, resampling.Values],
  of_reference: np.ndarray | None,
  image_freedom: int,
  bootstrap: _Bootstrap,
) -> Distance:
  """The ratio of both sides, and its interval on the scale of logarithms."""
  whole, resampled = means
  num = bootstrap.num_references
  uniform = resampling.uniform_weights(bootstrap.sizes)
  equal = np.full((1, num), 1 / num)
  both = resampling.sides(whole, uniform, equal)
  if both is None or of_reference is None:
    mean = float(uniform[0] @ whole.unlearned.mean((1, 2)))
    reason = "one retrained model: it has no other to be compared with"
    value = None if name == "kl_to_mean" else mean
    return Distance(name, split, None, None, value, None, (), (reason,))
  ours, floor = (float(side[0]) for side in both)
  # Of pseudo-values, whose rounding must not make a floor of nothing.
  if floor <= 1e-12 * max(1.0, ours):
    reason = "the references do not differ from one another"
    return Distance(name, split, None, None, ours, floor, (), (reason,))
  value = ours / floor
  references = tuple(float(x) for x in of_reference / floor)
  if num < 3:
    reason = (
      "two retrained models make one pair: how much pairs differ is unknown"
    )
    return Distance(
      name, split, value, None, ours, floor, references, (reason,)
    )

  def combine(
    values: resampling.Values, ours_w: np.ndarray, theirs_w: np.ndarray
  ) -> np.ndarray:
    assert values.retrained is not None
    scaled = resampling.Values(
      values.unlearned / ours, values.retrained / floor
    )
    logs = resampling.combine(scaled, ours_w, theirs_w)
    assert logs is not None
    return logs

  low, high = resampling.interval(
    0.0,
    combine(resampled, bootstrap.ours, bootstrap.theirs),
    [
      (combine(whole, uniform, bootstrap.theirs), num - 1),
      (
        combine(whole, bootstrap.ours, equal),
        resampling.seed_freedom(bootstrap.sizes),
      ),
    ],
    image_freedom,
    bootstrap.confidence,
  )
  reasons: tuple[str, ...] = ()
  if len(bootstrap.sizes) == 1:
    reasons = ("one training seed was unlearned: this model alone",)
  return Distance(
    name,
    split,
    value,
    (value * math.exp(low), value * math.exp(min(high, 700.0))),
    ours,
    floor,
    references,
    reasons,
  )


def _levels(
  split: str,
  data: tuple[resampling.Runs, np.ndarray, np.ndarray],
  bootstrap: _Bootstrap,
) -> list[Level]:
  """Accuracy and mean probability of the true class, among the references."""
  runs, references, truth = data
  if not len(truth):
    return []
  rows = np.arange(len(truth))

  def probability(logits: np.ndarray) -> np.ndarray:
    p = scipy.special.softmax(np.asarray(logits, np.float64), -1)
    return np.asarray(p[:, rows, truth].mean(-1))

  def accuracy(logits: np.ndarray) -> np.ndarray:
    return np.asarray(np.mean(np.argmax(logits, -1) == truth, -1))

  found = []
  for name, fn in zip(LEVELS, (accuracy, probability), strict=True):
    theirs = fn(references)
    share = (len(truth) * theirs.mean() + 1) / (len(truth) + 2)
    least = math.sqrt(share * (1 - share) / len(truth))
    found.append(_level(name, split, fn(runs.logits), theirs, least, bootstrap))
  return found


def _level(
  name: str,
  split: str | None,
  ours: np.ndarray,
  theirs: np.ndarray,
  least: float,
  bootstrap: _Bootstrap,
) -> Level:
  """Student's test of new values against the references."""
  mean = float(resampling.uniform_weights(bootstrap.sizes)[0] @ ours)
  num = len(theirs)
  if num < 2:
    reason = "one retrained model: how much they vary is unknown"
    return Level(
      name, split, mean, float(theirs.mean()), None, None, None, None, (reason,)
    )
  reasons = []
  sd = float(np.std(theirs, ddof=1))
  if sd < least:
    sd = least
    reasons.append("the deviation is that of chance over images")
  difference = (mean - float(theirs.mean())) / sd
  width = math.sqrt(1 / len(bootstrap.sizes) + 1 / num)
  half = scipy.stats.t.isf((1 - bootstrap.confidence) / 2, num - 1) * width * sd
  return Level(
    name,
    split,
    mean,
    float(theirs.mean()),
    sd,
    difference,
    float(2 * scipy.stats.t.sf(abs(difference) / width, num - 1)),
    (float(theirs.mean() - half), float(theirs.mean() + half)),
    tuple(reasons),
  )


def _attack_level(
  name: str,
  ours: np.ndarray,
  theirs: np.ndarray,
  attack: Attack,
  bootstrap: _Bootstrap,
) -> Level:
  """Where an attack's figure lies among the references', or beside chance."""
  null = null_std(attack.num_samples)
  if len(theirs) > 1:
    # All are attacked with the same images: chance over these is no bound.
    least = null if np.std(theirs) == 0 else 0.0
    return _level(name, None, ours, theirs, least, bootstrap)
  found = _level(name, None, ours, theirs, null, bootstrap)
  half = scipy.stats.norm.isf((1 - bootstrap.confidence) / 2) * null
  reason = "one retrained model: compared with chance"
  return dataclasses.replace(
    found, interval=(0.5 - half, 0.5 + half), reasons=(reason,)
  )


def null_std(num_samples: int) -> float:
  """Standard deviation of the AUC of an attack without skill."""
  return math.sqrt((2 * num_samples + 1) / 12) / num_samples


def _checked_attack(
  name: str, attack: Attack, bootstrap: _Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
  checks.integer(f"num_samples of {name}", attack.num_samples, at_least=1)
  ours = np.asarray(attack.unlearned, np.float64)
  theirs = np.asarray(attack.retrained, np.float64)
  expected = ((sum(bootstrap.sizes),), (bootstrap.num_references,))
  if (ours.shape, theirs.shape) != expected or not (
    np.isfinite(ours).all() and np.isfinite(theirs).all()
  ):
    raise ValueError(
      f"attack {name} must have a finite figure of each model, {expected}, got"
      f" {ours.shape} and {theirs.shape}"
    )
  return ours, theirs
