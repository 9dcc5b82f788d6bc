"""Comparison with retrained references, with uncertainty, on the host.

Unlearning is right as far as the unlearned model cannot be told from one that
was trained without the forget set. `compare` takes the logits of both kinds of
model on the same images and asks, for each statistic, whether their difference
lies within a margin, given that images, training seeds and unlearning seeds are
samples. It answers "equivalent", "not equivalent" or "cannot tell".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from psg_jax import checks, resampling
from psg_jax.metrics import common

EQUIVALENT = "equivalent"
NOT_EQUIVALENT = "not equivalent"
CANNOT_TELL = "cannot tell"
# Accuracies and agreement as shares of images, the divergence in nats.
DEFAULT_MARGINS = {"accuracy": 0.02, "agreement": 0.02, "kl_divergence": 0.05}
# Which bounds must lie within the margin. A model nearer to the retrained ones
# than they are to each other is no worse for it.
_SIDES = {"agreement": "lower", "kl_divergence": "upper"}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One statistic on one split.

  Attributes:
    statistic: Its name.
    split: The split's name.
    num_images: Images of the split.
    unlearned: Mean over the unlearned models; of a distance, over their pairs
      with the retrained models. None without images.
    retrained: Mean over the retrained models; of a distance, over pairs of
      them, the noise floor. None where it is unknown.
    difference: `unlearned - retrained`, ideally 0.
    interval: Confidence interval of the difference.
    margin: Largest difference that does not matter.
    verdict: `"equivalent"`, `"not equivalent"` or `"cannot tell"`.
    reasons: Why it cannot be told, and what the interval leaves out.
    training_std: Standard deviation of `unlearned` over training seeds, with
      unlearning seeds averaged; None with one.
    unlearning_std: Standard deviation over unlearning seeds within a training
      seed; None with one.
    retrained_std: Standard deviation over retrained seeds; None with one, and
      for distances.
  """

  statistic: str
  split: str
  num_images: int
  unlearned: float | None
  retrained: float | None
  difference: float | None
  interval: tuple[float, float] | None
  margin: float
  verdict: str
  reasons: tuple[str, ...] = ()
  training_std: float | None = None
  unlearning_std: float | None = None
  retrained_std: float | None = None

  def as_dict(self) -> dict[str, Any]:
    """Returns a dictionary for JSON."""
    interval = None if self.interval is None else list(self.interval)
    return {**vars(self), "interval": interval, "reasons": list(self.reasons)}


@dataclasses.dataclass(frozen=True)
class Claims:
  """What can and cannot be said with the models at hand.

  Attributes:
    can: Claims that the models support.
    cannot: Claims that they do not.
  """

  can: tuple[str, ...]
  cannot: tuple[str, ...]

  def as_dict(self) -> dict[str, list[str]]:
    """Returns a dictionary for JSON."""
    return {"can": list(self.can), "cannot": list(self.cannot)}

  def __str__(self) -> str:
    lines = ["Can be claimed:", *(f"  + {claim}" for claim in self.can)]
    lines += ["Cannot be claimed:", *(f"  - {claim}" for claim in self.cannot)]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Verification:
  """All comparisons of an unlearned model with its references.

  Attributes:
    comparisons: One a statistic and split.
    confidence: Of the intervals, in (0.5, 1).
    num_resamples: Bootstrap resamples `B`.
    seed: Of the resampling.
    num_retrained: Retrained models `S`.
    num_training_seeds: Original models `T`.
    num_unlearned: Unlearned models in all.
  """

  comparisons: tuple[Comparison, ...]
  confidence: float
  num_resamples: int
  seed: int
  num_retrained: int
  num_training_seeds: int
  num_unlearned: int

  @property
  def verdict(self) -> str:
    """The verdict on all statistics with images.

    Equivalent if all are, which needs no correction for their number (an
    intersection-union test, Berger 1982); not equivalent as soon as one is not.
    """
    verdicts = {row.verdict for row in self.comparisons if row.num_images}
    if NOT_EQUIVALENT in verdicts:
      return NOT_EQUIVALENT
    return EQUIVALENT if verdicts == {EQUIVALENT} else CANNOT_TELL

  @property
  def claims(self) -> Claims:
    """What these models allow to say; see `claims`."""
    return claims(
      self.num_retrained, num_training_seeds=self.num_training_seeds
    )

  def get(self, statistic: str, split: str) -> Comparison:
    """Returns one comparison.

    Raises:
      ValueError: If there is none of these names.
    """
    for row in self.comparisons:
      if (row.statistic, row.split) == (statistic, split):
        return row
    raise ValueError(f"there is no statistic {statistic!r} of split {split!r}")

  def as_dict(self) -> dict[str, Any]:
    """Returns a dictionary for JSON."""
    return {
      **vars(self),
      "comparisons": [row.as_dict() for row in self.comparisons],
      "verdict": self.verdict,
      "claims": self.claims.as_dict(),
    }

  def __str__(self) -> str:
    rows = [
      (
        *("statistic", "split", "unlearned", "retrained", "difference"),
        *(f"{100 * self.confidence:g} % interval", "margin", "verdict"),
      )
    ]
    rows += [
      (
        *(row.statistic, row.split),
        *(_text("{:.3f}", row.unlearned), _text("{:.3f}", row.retrained)),
        _text("{:+.3f}", row.difference),
        _text("[{:+.3f}, {:+.3f}]", *(row.interval or (None,))),
        *(_text("{:.3f}", row.margin), row.verdict),
      )
      for row in self.comparisons
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      "  ".join(
        cell.ljust(width) for cell, width in zip(row, widths, strict=True)
      ).rstrip()
      for row in rows
    ]
    lines += [f"overall: {self.verdict}", *self._notes()]
    return "\n".join(lines)

  def _notes(self) -> list[str]:
    """Each reason once, with the statistics that it is about."""
    about: dict[str, list[str]] = {}
    for row in self.comparisons:
      for reason in row.reasons:
        name = f"{row.statistic} of {row.split}"
        about.setdefault(reason, []).append(name)
    return [
      f"note, {names[0]}{' and others' * (len(names) > 1)}: {reason}"
      for reason, names in about.items()
    ]


def _text(form: str, *values: float | None) -> str:
  return "-" if None in values else form.format(*values)


# By the fewest retrained models that they need.
_CLAIMS = (
  (
    0,
    "the unlearned model's accuracy on each split",
    "how far it moved from the original model",
    "whether a given membership attack tells the forget images from images"
    " never trained on",
  ),
  (
    1,
    "what a model that never saw the forget set scores on it",
    "whether accuracy lost on retained images is the price of forgetting or"
    " damage by the method",
    "agreement with, and divergence from, a retrained model",
  ),
  (
    2,
    "that the accuracies are, or are not, those of retraining within a margin",
    "how far two retrained models are from each other (the noise floor)",
  ),
  (
    3,
    "that the predictions are, or are not, as near to a retrained model as"
    " retrained models are to each other",
  ),
)
_NEVER = (
  "that no attack can find a trace of the forget set",
  "a formal guarantee, as certified or exact unlearning gives",
  "anything about single images (that needs many models: see `ulira`)",
)
_GENERAL = "that the method does as well on other training runs"


def claims(num_retrained: int, *, num_training_seeds: int = 1) -> Claims:
  """Lists the claims that can and cannot be made with so many models.

  Args:
    num_retrained: Retrained reference models `S` of different seeds, 0 or more.
    num_training_seeds: Original models `T` that were unlearned, 1 or more.

  Returns:
    The claims.

  Raises:
    ValueError: If a number is out of its range.
  """
  checks.integer("num_retrained", num_retrained, at_least=0)
  checks.integer("num_training_seeds", num_training_seeds, at_least=1)
  can: list[str] = []
  cannot = list(_NEVER)
  for number, *texts in _CLAIMS:
    (can if num_retrained >= number else cannot).extend(map(str, texts))
  (can if num_training_seeds >= 2 else cannot).append(_GENERAL)
  return Claims(can=tuple(can), cannot=tuple(cannot))


def compare(
  retrained: Mapping[str, Any] | None,
  unlearned: Mapping[str, resampling.Unlearned],
  labels: Mapping[str, np.ndarray],
  *,
  statistics: Mapping[str, resampling.StatisticFn] | None = None,
  margins: Mapping[str, float] | None = None,
  groups: Mapping[str, np.ndarray] | None = None,
  confidence: float = 0.9,
  num_resamples: int = 2000,
  seed: int = 0,
) -> Verification:
  """Compares unlearned models with retrained ones, with confidence intervals.

  For a statistic `θ` of a model on the images of a split,

      difference = mean_t mean_u θ(unlearned_tu) - mean_s θ(retrained_s)

  ideally 0. The statistics are the accuracy; `agreement` and `kl_divergence`
  (`KL(retrained ‖ unlearned)`, nats), distances between two models; and those
  given. For distances the yardstick is what two retrained models of different
  seeds have, the noise floor:

      difference = mean_tus d(retrained_s, unlearned_tu)
                   - mean_{s≠s'} d(retrained_s, retrained_s')

  The interval is a paired hierarchical bootstrap. Each resample draws images,
  the same for both sides; retrained seeds; training seeds, which bring their
  unlearning runs; and unlearning seeds within each. Of `n` seeds `n - 1` are
  drawn, which makes the variance unbiased (Rao and Wu), and the percentiles are
  widened from normal to Student's t with Satterthwaite's degrees of freedom,
  since three seeds say little of their spread. Resampling on two levels errs to
  the wide side where the unlearning seeds differ. Shares of images get the rule
  of three: if no image differs, `1 - α^(1/N)` may still. The seeds of the two
  sides are drawn apart: retraining without the forget set shares no more than
  the initialisation.

  The verdict is that of two one-sided tests (Schuirmann): equivalent if the
  interval lies within the margin, not equivalent if it lies outside, and
  otherwise it cannot be told. For distances one side counts, as nothing is
  wrong with a model that is nearer.

  Args:
    retrained: Logits `[S, N, K]`, or `[N, K]` by seed, by split; None if there
      is no reference: then nothing but the values is given.
    unlearned: Logits `[T, U, N, K]`, or `[U, N, K]` by training seed, by split:
      for each of `T` training seeds, the models of `U` unlearning seeds.
    labels: int `[N]` by split, usually `train_forget`, `train_retain`,
      `test_forget` and `test_retain`.
    statistics: More statistics by name.
    margins: By the name of a statistic, or `"<statistic>/<split>"`, which goes
      first; 0.02 for `accuracy` and `agreement` and 0.05 nats for
      `kl_divergence` unless given. Further statistics need one.
    groups: `[N]` by split, such as patients, that are drawn as a whole; splits
      left out have images drawn one by one.
    confidence: Of the intervals, in (0.5, 1); each of the two one-sided tests
      has the level `(1 - confidence) / 2`.
    num_resamples: `B`, 100 or more.
    seed: Of the resampling: the same arguments give the same result.

  Returns:
    The comparisons, in the order of the splits in `labels`.

  Raises:
    ValueError: If splits, shapes, margins or numbers do not fit together.

  References:
    Rao and Wu, Resampling Inference With Complex Survey Data, 1988.
    Hesterberg, What Teachers Should Know About the Bootstrap, 2015.
    Schuirmann, A comparison of the two one-sided tests procedure and the power
    approach for assessing the equivalence of average bioavailability, 1987.
  """
  statistics = dict(statistics or {})
  margins = _checked_margins(margins, statistics, labels)
  bootstrap, splits = resampling.prepare(
    retrained,
    unlearned,
    labels,
    groups=groups,
    confidence=confidence,
    num_resamples=num_resamples,
    seed=seed,
  )
  comparisons = []
  for split in splits:
    measured = _statistics(split, statistics)
    resampled = resampling.resample(measured, split, num_resamples)
    for statistic, means in zip(measured, resampled, strict=True):
      names = (f"{statistic.name}/{split.name}", statistic.name)
      margin = next(margins[name] for name in names if name in margins)
      comparisons.append(_compare(statistic, split, means, bootstrap, margin))
  return Verification(
    comparisons=tuple(comparisons),
    confidence=confidence,
    num_resamples=num_resamples,
    seed=seed,
    num_retrained=bootstrap.num_retrained,
    num_training_seeds=len(bootstrap.sizes),
    num_unlearned=sum(bootstrap.sizes),
  )


def _compare(
  statistic: resampling.Statistic,
  split: resampling.Split,
  means: tuple[resampling.Values, resampling.Values] | None,
  bootstrap: resampling.Bootstrap,
  margin: float,
) -> Comparison:
  """Turns the values on all images and on resampled ones into a verdict."""
  name, num_images = statistic.name, len(split.labels)
  if means is None:
    reason = _NO_REFERENCE if num_images else "the split has no images"
    return Comparison(
      *(name, split.name, num_images, None, None, None, None, margin),
      *(CANNOT_TELL, (reason,)),
    )
  whole, is_distance = means[0], name in _SIDES
  values = whole.unlearned[:, :, 0].mean(1)
  value = float(bootstrap.uniform[0] @ values)
  blocks = _blocks(bootstrap.num_retrained, split.num_groups, is_distance)
  reasons = list(blocks)
  if len(bootstrap.sizes) == 1:
    reasons.append(_ONE_ORIGINAL)
  difference, interval = None, None
  if whole.retrained is not None:
    difference, interval, is_complete = _interval(
      statistic, means, bootstrap, split.num_groups
    )
    if not is_complete:
      reasons.append("undefined on some resamples, which were left out")
  verdict = CANNOT_TELL
  if interval is not None and not blocks:
    verdict = _verdict(interval, margin, _SIDES.get(name, "both"))
    if verdict == CANNOT_TELL:
      reasons.append("the interval reaches across the margin")
  training_std, unlearning_std = _seed_stds(values, bootstrap.sizes)
  has_spread = bootstrap.num_retrained > 1 and not is_distance
  return Comparison(
    *(name, split.name, num_images, value),
    retrained=None if difference is None else value - difference,
    difference=difference,
    interval=interval,
    margin=margin,
    verdict=verdict,
    reasons=tuple(reasons),
    training_std=training_std,
    unlearning_std=unlearning_std,
    retrained_std=(
      float(np.std(whole.retrained[:, 0], ddof=1))
      if whole.retrained is not None and has_spread
      else None
    ),
  )


_NO_REFERENCE = "there is no retrained reference"
_ONE_ORIGINAL = (
  "one training seed was unlearned: the verdict is about this model alone"
)


def _blocks(
  num_retrained: int, num_groups: int, is_distance: bool
) -> list[str]:
  """Says what is unknown and forbids a verdict."""
  rules = (
    (num_retrained == 0, _NO_REFERENCE),
    (
      num_retrained == 1,
      "one retrained seed: how much seeds differ is unknown",
    ),
    (
      num_retrained == 2 and is_distance,
      "two retrained seeds make one pair: how much pairs differ is unknown",
    ),
    (num_groups < 2, "one image or group: how much they differ is unknown"),
  )
  return [message for is_met, message in rules if is_met]


def _interval(
  statistic: resampling.Statistic,
  means: tuple[resampling.Values, resampling.Values],
  bootstrap: resampling.Bootstrap,
  num_groups: int,
) -> tuple[float, tuple[float, float] | None, bool]:
  """The difference, its interval, and whether all resamples have one."""
  whole, resampled = means
  ours, theirs = resampling.sides(whole, bootstrap.uniform, bootstrap.equal)
  difference = float((ours - theirs)[0])
  replicates = bootstrap.replicates(resampled)
  is_finite = np.isfinite(replicates)
  if is_finite.mean() <= 0.5:
    return difference, None, False
  low, high = bootstrap.interval(
    difference, replicates[is_finite], whole, num_groups - 1
  )
  if statistic.is_share:
    # The rule of three.
    slack = 1 - ((1 - bootstrap.confidence) / 2) ** (1 / num_groups)
    low, high = min(low, difference - slack), max(high, difference + slack)
  return difference, (low, high), bool(is_finite.all())


def _verdict(interval: tuple[float, float], margin: float, side: str) -> str:
  low, high = interval
  least = -math.inf if side == "upper" else -margin
  most = math.inf if side == "lower" else margin
  if least <= low and high <= most:
    return EQUIVALENT
  return NOT_EQUIVALENT if low > most or high < least else CANNOT_TELL


def _seed_stds(
  values: np.ndarray, sizes: tuple[int, ...]
) -> tuple[float | None, float | None]:
  """Standard deviations over training seeds, and within them."""
  parts = np.split(values, np.cumsum(sizes)[:-1])
  between = None
  if len(sizes) > 1:
    between = float(np.std([part.mean() for part in parts], ddof=1))
  freedom = sum(sizes) - len(sizes)
  within = None
  if freedom:
    squares = sum(float(np.sum((part - part.mean()) ** 2)) for part in parts)
    within = math.sqrt(squares / freedom)
  return between, within


def _statistics(
  split: resampling.Split, extra: Mapping[str, resampling.StatisticFn]
) -> list[resampling.Statistic]:
  """Computes the statistics of a split, image by image where possible."""
  if not len(split.labels):
    names = (*DEFAULT_MARGINS, *extra)
    return [resampling.Statistic(name) for name in names]
  accuracy = _of_images(
    functools.partial(common.is_right, labels=split.labels), split
  )
  statistics = [resampling.Statistic("accuracy", accuracy, is_share=True)]
  for name, distance, is_share in (
    ("agreement", resampling.agreement, True),
    ("kl_divergence", common.pairwise_kl, False),
  ):
    values = None
    if len(split.retrained):
      values, _ = resampling.pairs(distance, split.unlearned, split.retrained)
    statistics.append(resampling.Statistic(name, values, is_share=is_share))
  return statistics + [_extra(name, fn, split) for name, fn in extra.items()]


def _extra(
  name: str, fn: resampling.StatisticFn, split: resampling.Split
) -> resampling.Statistic:
  """A statistic that was given: of each image, or a number."""

  def checked(logits: np.ndarray) -> np.ndarray:
    value = fn(logits, split.labels)
    return _checked_value(name, value, len(split.labels))

  if not checked(split.unlearned[0]).ndim:
    return resampling.Statistic(name, fn=fn)
  values = _of_images(lambda x: np.stack([checked(y) for y in x]), split)
  is_share = all(
    bool(np.all((x >= 0) & (x <= 1))) for x in values if x is not None
  )
  return resampling.Statistic(name, values, is_share=is_share)


def _of_images(
  fn: Callable[[np.ndarray], np.ndarray], split: resampling.Split
) -> resampling.Values:
  """Values of images `[M, N]` from logits `[M, N, K]`, of both sides."""
  theirs = None
  if len(split.retrained):
    theirs = fn(split.retrained).astype(np.float64)
  ours = fn(split.unlearned).astype(np.float64)
  return resampling.Values(ours[:, None], theirs)


def _checked_value(name: str, value: Any, num_images: int) -> np.ndarray:
  result = np.asarray(value, np.float64)
  if result.shape not in ((), (num_images,)):
    raise ValueError(
      f"statistic {name!r} must give a number or [{num_images}], got"
      f" {list(result.shape)}"
    )
  if result.ndim and not np.isfinite(result).all():
    raise ValueError(f"statistic {name!r} must be finite for each image")
  return result


def _checked_margins(
  margins: Mapping[str, float] | None,
  statistics: Mapping[str, resampling.StatisticFn],
  labels: Mapping[str, np.ndarray],
) -> dict[str, float]:
  """Returns the margins with the defaults, after checking all names."""
  for name in statistics:
    if name in DEFAULT_MARGINS:
      raise ValueError(f"statistics must have other names, got {name!r}")
  result = {**DEFAULT_MARGINS, **(margins or {})}
  names = (*DEFAULT_MARGINS, *statistics)
  allowed = [*names, *(f"{name}/{split}" for name in names for split in labels)]
  for name, margin in result.items():
    checks.one_of("the name in margins", name, allowed)
    checks.number(f"the margin of {name}", margin, above=0)
  for name in statistics:
    if not all({name, f"{name}/{split}"} & set(result) for split in labels):
      raise ValueError(f"margins must have one for {name!r}, got none")
  return result
