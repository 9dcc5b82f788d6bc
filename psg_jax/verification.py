"""Comparison with retrained references, with uncertainty, on the host.

Unlearning is right as far as the unlearned model cannot be told from one that
was trained without the forget set. `compare` takes the logits of both kinds of
model on the same images and asks, for each statistic, whether their difference
lies within a margin, given that images, training seeds and unlearning seeds are
samples. It answers "equivalent", "not equivalent" or "cannot tell".
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.special
import scipy.stats

from psg_jax import checks

EQUIVALENT = "equivalent"
NOT_EQUIVALENT = "not equivalent"
CANNOT_TELL = "cannot tell"
# Accuracies and agreement as shares of images, the divergence in nats.
DEFAULT_MARGINS = {"accuracy": 0.02, "agreement": 0.02, "kl_divergence": 0.05}
# Which bounds must lie within the margin. A model nearer to the retrained ones
# than they are to each other is no worse for it.
_SIDES = {"agreement": "lower", "kl_divergence": "upper"}
# Counts of resampled images that lie in memory at a time.
_MAX_COUNTS = 2**22

StatisticFn: TypeAlias = Callable[[np.ndarray, np.ndarray], Any]
"""`(logits [N, K], labels [N])` -> one value an image `[N]`, or a number.

Values of images are averaged, which takes no time. A function that gives a
number is called anew for each model and resample.
"""

Unlearned: TypeAlias = np.ndarray | Mapping[Any, np.ndarray]
"""`[T, U, N, K]`, or `[U, N, K]` by training seed, with any `U` for each."""


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
    result = dataclasses.asdict(self)
    result["interval"] = None if self.interval is None else list(self.interval)
    result["reasons"] = list(self.reasons)
    return result


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
    verdicts = {each.verdict for each in self.comparisons if each.num_images}
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
    for each in self.comparisons:
      if (each.statistic, each.split) == (statistic, split):
        return each
    raise ValueError(f"there is no statistic {statistic!r} of split {split!r}")

  def as_dict(self) -> dict[str, Any]:
    """Returns a dictionary for JSON."""
    return {
      **{
        field.name: getattr(self, field.name)
        for field in dataclasses.fields(self)
      },
      "comparisons": [each.as_dict() for each in self.comparisons],
      "verdict": self.verdict,
      "claims": self.claims.as_dict(),
    }

  def __str__(self) -> str:
    interval = f"{100 * self.confidence:g} % interval"
    rows = [
      (
        *("statistic", "split", "unlearned", "retrained", "difference"),
        *(interval, "margin", "verdict"),
      )
    ]
    for each in self.comparisons:
      bounds = each.interval
      rows.append(
        (
          each.statistic,
          each.split,
          _text(each.unlearned),
          _text(each.retrained),
          _text(each.difference, "+.3f"),
          "-" if bounds is None else f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]",
          _text(each.margin),
          each.verdict,
        )
      )
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
    for each in self.comparisons:
      for reason in each.reasons:
        name = f"{each.statistic} of {each.split}"
        about.setdefault(reason, []).append(name)
    return [
      f"note, {names[0]}{' and others' * (len(names) > 1)}: {reason}"
      for reason, names in about.items()
    ]


def _text(value: float | None, form: str = ".3f") -> str:
  return "-" if value is None else format(value, form)


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
  can = [
    "the unlearned model's accuracy on each split",
    "how far it moved from the original model",
    "whether a given membership attack tells the forget images from images"
    " never trained on",
  ]
  cannot = [
    "that no attack can find a trace of the forget set",
    "a formal guarantee, as certified or exact unlearning gives",
    "anything about single images (that needs many models: see `ulira`)",
  ]
  needed: list[tuple[int, list[str]]] = [
    (
      1,
      [
        "what a model that never saw the forget set scores on it",
        "whether accuracy lost on retained images is the price of forgetting or"
        " damage by the method",
        "agreement with, and divergence from, a retrained model",
      ],
    ),
    (
      2,
      [
        "that the accuracies are, or are not, those of retraining within a"
        " margin",
        "how far two retrained models are from each other (the noise floor)",
      ],
    ),
    (
      3,
      [
        "that the predictions are, or are not, as near to a retrained model as"
        " retrained models are to each other",
      ],
    ),
  ]
  for number, these in needed:
    (can if num_retrained >= number else cannot).extend(these)
  general = "that the method does as well on other training runs"
  (can if num_training_seeds >= 2 else cannot).append(general)
  return Claims(can=tuple(can), cannot=tuple(cannot))


class _Runs(NamedTuple):
  """The unlearned models of a split in a row, those of a seed together."""

  logits: np.ndarray  # [M, N, K]
  sizes: tuple[int, ...]  # [T], of sum M


class _Values(NamedTuple):
  """A statistic of each model: of each image, or of resampled images.

  For a distance, `unlearned` holds it to each retrained model, and `retrained`
  the jackknife pseudo-values of the mean over pairs of retrained models.
  """

  unlearned: np.ndarray  # [M, 1 or S, X]
  retrained: np.ndarray | None  # [S, X]


class _Statistic(NamedTuple):
  name: str
  values: _Values | None  # By image; None for a function to be called anew.
  fn: StatisticFn | None
  is_share: bool


def compare(
  retrained: Mapping[str, Any] | None,
  unlearned: Mapping[str, Unlearned],
  labels: Mapping[str, np.ndarray],
  *,
  statistics: Mapping[str, StatisticFn] | None = None,
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
  checks.integer("num_resamples", num_resamples, at_least=100)
  checks.integer("seed", seed, at_least=0)
  checks.number("confidence", confidence, above=0.5)
  if confidence >= 1:
    raise ValueError(f"confidence must be below 1, got {confidence}")
  statistics = dict(statistics or {})
  margins = _checked_margins(margins, statistics, labels)
  _check_splits(labels, {"unlearned": unlearned, "retrained": retrained})
  references, runs, group_of = {}, {}, {}
  for split in labels:
    where = np.asarray(labels[split])
    runs[split] = _checked_runs(split, unlearned[split], where)
    references[split] = _checked_reference(
      split, None if retrained is None else retrained[split], runs[split]
    )
    group_of[split] = _checked_groups(split, (groups or {}).get(split), where)
  sizes = _common("unlearned", [each.sizes for each in runs.values()])
  num_retrained = _common("retrained", [len(x) for x in references.values()])
  # Streams of their own: a further split changes no other's resamples.
  streams = np.random.SeedSequence(seed).spawn(1 + len(labels))
  rng = np.random.default_rng(streams[0])
  weights = (
    _unlearned_weights(rng, sizes, num_resamples),
    _drawn_weights(rng, max(num_retrained, 1), num_resamples),
  )
  comparisons = []
  for split, stream in zip(labels, streams[1:], strict=True):
    here = np.asarray(labels[split])
    found = _statistics(runs[split].logits, references[split], here, statistics)
    resampled = _resample(
      found,
      (runs[split].logits, references[split], here),
      group_of[split],
      num_resamples,
      np.random.default_rng(stream),
    )
    for statistic, means in zip(found, resampled, strict=True):
      comparisons.append(
        _compare(
          statistic,
          split,
          means,
          weights,
          sizes=sizes,
          num_retrained=num_retrained,
          num_images=len(here),
          num_groups=len(np.unique(group_of[split])),
          confidence=confidence,
          margin=margins.get(
            f"{statistic.name}/{split}", margins.get(statistic.name, math.nan)
          ),
        )
      )
  return Verification(
    comparisons=tuple(comparisons),
    confidence=confidence,
    num_resamples=num_resamples,
    seed=seed,
    num_retrained=num_retrained,
    num_training_seeds=len(sizes),
    num_unlearned=sum(sizes),
  )


def _compare(
  statistic: _Statistic,
  split: str,
  means: tuple[_Values, _Values] | None,
  weights: tuple[np.ndarray, np.ndarray],
  *,
  sizes: tuple[int, ...],
  num_retrained: int,
  num_images: int,
  num_groups: int,
  confidence: float,
  margin: float,
) -> Comparison:
  """Turns the values on all images and on resampled ones into a verdict."""
  name = statistic.name
  is_distance = name in _SIDES
  if means is None:
    reason = (
      "the split has no images"
      if not num_images
      else ("there is no retrained reference")
    )
    return Comparison(
      *(name, split, num_images, None, None, None, None, margin, CANNOT_TELL),
      reasons=(reason,),
    )
  whole, resampled = means
  uniform = _uniform_weights(sizes)
  equal = np.full((1, max(num_retrained, 1)), 1 / max(num_retrained, 1))
  theirs = whole.unlearned[:, :, 0].mean(1)
  estimate = _combine(whole, uniform, equal)
  value = float(uniform[0] @ theirs)
  reasons = _reasons(num_retrained, sizes, num_groups, is_distance=is_distance)
  is_blocked = bool(reasons) and reasons[0] != _ONE_ORIGINAL
  difference, interval = None, None
  if estimate is not None:
    difference = float(estimate[0])
    replicates = _combine(resampled, *weights)
    assert replicates is not None
    is_finite = np.isfinite(replicates)
    if not is_finite.all():
      reasons.append("undefined on some resamples, which were left out")
    if is_finite.mean() > 0.5:
      interval = _interval(
        difference,
        replicates[is_finite],
        # Seeds alone, on all images.
        [
          (_combine(whole, uniform, weights[1]), num_retrained - 1),
          (_combine(whole, weights[0], equal), _seed_freedom(sizes)),
        ],
        num_groups - 1,
        confidence,
      )
      if statistic.is_share:
        slack = 1 - ((1 - confidence) / 2) ** (1 / num_groups)
        interval = (
          min(interval[0], difference - slack),
          max(interval[1], difference + slack),
        )
  verdict = CANNOT_TELL
  if interval is not None and not is_blocked:
    verdict = _verdict(interval, margin, _SIDES.get(name, "both"))
    if verdict == CANNOT_TELL:
      reasons.append("the interval reaches across the margin")
  training_std, unlearning_std = _seed_stds(theirs, sizes)
  return Comparison(
    statistic=name,
    split=split,
    num_images=num_images,
    unlearned=value,
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
      if whole.retrained is not None and num_retrained > 1 and not is_distance
      else None
    ),
  )


_ONE_ORIGINAL = (
  "one training seed was unlearned: the verdict is about this model alone"
)


def _reasons(
  num_retrained: int,
  sizes: tuple[int, ...],
  num_groups: int,
  *,
  is_distance: bool,
) -> list[str]:
  """Says what is unknown; what forbids a verdict comes first."""
  reasons = []
  if num_retrained == 0:
    reasons.append("there is no retrained reference")
  elif num_retrained == 1:
    reasons.append("one retrained seed: how much seeds differ is unknown")
  elif num_retrained == 2 and is_distance:
    reasons.append(
      "two retrained seeds make one pair: how much pairs differ is unknown"
    )
  if num_groups < 2:
    reasons.append("one image or group: how much they differ is unknown")
  if len(sizes) == 1:
    reasons.append(_ONE_ORIGINAL)
  return reasons


def _combine(
  values: _Values, ours: np.ndarray, theirs: np.ndarray
) -> np.ndarray | None:
  """Differences `[B]`, from values `[.., B or 1]` and weights `[B or 1, ..]`.

  Returns None where there is nothing to compare with.
  """
  if values.retrained is None:
    return None
  columns = theirs.T if values.unlearned.shape[1] > 1 else np.ones((1, 1))
  unlearned = np.sum(values.unlearned * ours.T[:, None] * columns, (0, 1))
  return unlearned - np.sum(values.retrained * theirs.T, 0)


def _interval(
  estimate: float,
  replicates: np.ndarray,
  seeds: Sequence[tuple[np.ndarray | None, int]],
  image_freedom: int,
  confidence: float,
) -> tuple[float, float]:
  """Percentiles, widened from the normal to Student's t distribution."""
  parts = [
    (float(np.var(alone)), freedom)
    for alone, freedom in seeds
    if alone is not None and freedom > 0
  ]
  rest = float(np.var(replicates)) - sum(variance for variance, _ in parts)
  parts.append((max(rest, 0.0), max(image_freedom, 1)))
  total = sum(variance for variance, _ in parts)
  tail = (1 - confidence) / 2
  factor = 1.0
  if total > 0:
    freedom = total**2 / sum(variance**2 / n for variance, n in parts)
    factor = scipy.stats.t.isf(tail, freedom) / scipy.stats.norm.isf(tail)
  low, high = np.quantile(replicates, [tail, 1 - tail])
  return (
    float(min(estimate, estimate + factor * (low - estimate))),
    float(max(estimate, estimate + factor * (high - estimate))),
  )


def _verdict(interval: tuple[float, float], margin: float, side: str) -> str:
  low, high = interval
  if side == "upper":
    inside, outside = high <= margin, low > margin
  elif side == "lower":
    inside, outside = low >= -margin, high < -margin
  else:
    inside = low >= -margin and high <= margin
    outside = low > margin or high < -margin
  return EQUIVALENT if inside else NOT_EQUIVALENT if outside else CANNOT_TELL


def _drawn_weights(
  rng: np.random.Generator, num_seeds: int, num_resamples: int
) -> np.ndarray:
  """Weights `[B, n]` of `n - 1` draws from `n` seeds (one of one)."""
  num_draws = max(num_seeds - 1, 1)
  draws = rng.integers(0, num_seeds, (num_resamples, num_draws))
  return _counts(draws, num_seeds) / num_draws


def _unlearned_weights(
  rng: np.random.Generator, sizes: tuple[int, ...], num_resamples: int
) -> np.ndarray:
  """Weights `[B, M]`: training seeds, and unlearning seeds within each."""
  all_sizes = np.asarray(sizes)
  starts = np.cumsum(all_sizes) - all_sizes
  num_draws = max(len(sizes) - 1, 1)
  chosen = rng.integers(0, len(sizes), (num_resamples, num_draws))
  size = all_sizes[chosen][..., None]
  num_within = np.maximum(size - 1, 1)
  slots = np.arange(max(num_within.max(), 1))
  within = np.floor(rng.random((*chosen.shape, len(slots))) * size)
  models = starts[chosen][..., None] + within.astype(np.int64)
  shares = (slots < num_within) / (num_within * num_draws)
  weights = np.zeros((num_resamples, sum(sizes)))
  rows = np.arange(num_resamples)[:, None, None]
  np.add.at(weights, (rows, models), shares)
  return weights


def _uniform_weights(sizes: tuple[int, ...]) -> np.ndarray:
  """Weights `[1, M]`: each training seed counts the same."""
  return np.repeat(1 / (len(sizes) * np.asarray(sizes)), sizes)[None]


def _seed_freedom(sizes: tuple[int, ...]) -> int:
  return len(sizes) - 1 if len(sizes) > 1 else sizes[0] - 1


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


def _counts(draws: np.ndarray, size: int) -> np.ndarray:
  """How often each of `size` things is in each row of draws."""
  offsets = np.arange(len(draws))[:, None] * size
  counts = np.bincount((draws + offsets).ravel(), minlength=len(draws) * size)
  return counts.reshape(len(draws), size)


def _statistics(
  unlearned: np.ndarray,
  retrained: np.ndarray,
  labels: np.ndarray,
  extra: Mapping[str, StatisticFn],
) -> list[_Statistic]:
  """Computes the statistics of a split, image by image where possible."""
  if not len(labels):
    names = (*DEFAULT_MARGINS, *extra)
    return [_Statistic(name, None, None, False) for name in names]
  found = [
    _Statistic(
      "accuracy",
      _Values(
        (np.argmax(unlearned, -1) == labels)[:, None].astype(np.float64),
        (np.argmax(retrained, -1) == labels).astype(np.float64)
        if len(retrained)
        else None,
      ),
      None,
      True,
    )
  ]
  for name, distance, is_share in (
    ("agreement", _agreement, True),
    ("kl_divergence", _kl_divergence, False),
  ):
    values = None
    if len(retrained):
      values = _Values(
        distance(unlearned, retrained),
        _pseudo_values(distance(retrained, retrained)),
      )
    found.append(_Statistic(name, values, None, is_share))
  for name, fn in extra.items():
    first = _checked_value(name, fn(unlearned[0], labels), len(labels))
    if not first.ndim:
      found.append(_Statistic(name, None, fn, False))
      continue
    ours, theirs = (
      np.stack(
        [_checked_value(name, fn(x, labels), len(labels)) for x in logits]
      )
      if len(logits)
      else None
      for logits in (unlearned, retrained)
    )
    assert ours is not None  # There is at least one unlearned model.
    every = ours if theirs is None else np.concatenate([ours, theirs])
    is_share = bool(np.all((every >= 0) & (every <= 1)))
    found.append(
      _Statistic(name, _Values(ours[:, None], theirs), None, is_share)
    )
  return found


def _agreement(logits: np.ndarray, retrained: np.ndarray) -> np.ndarray:
  """Whether predictions are the same, `[M, S, N]`."""
  ours, theirs = np.argmax(logits, -1), np.argmax(retrained, -1)
  return (ours[:, None] == theirs[None]).astype(np.float64)


def _kl_divergence(logits: np.ndarray, retrained: np.ndarray) -> np.ndarray:
  """`KL(retrained_s ‖ model_m)` of each image in nats, `[M, S, N]`."""
  log_q = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
  log_p = scipy.special.log_softmax(np.asarray(retrained, np.float64), -1)
  p = np.exp(log_p)
  entropies = np.sum(p * log_p, -1)
  return entropies[None] - np.einsum("snk,mnk->msn", p, log_q)


def _pseudo_values(distances: np.ndarray) -> np.ndarray | None:
  """Makes values `[S, N]` of seeds from distances of pairs `[S, S, N]`.

  Their mean is the mean over pairs, and weighing them as seeds are drawn gives
  the variance of the jackknife: a pair drawn twice would have no distance.
  """
  num_seeds = len(distances)
  if num_seeds < 2:
    return None
  diagonal = np.einsum("ssn->sn", distances)
  of_seed = distances.sum(0) + distances.sum(1) - 2 * diagonal
  total = of_seed.sum(0) / 2
  mean = total / (num_seeds * (num_seeds - 1))
  if num_seeds == 2:
    return np.stack([mean, mean])
  without = (total - of_seed) / ((num_seeds - 1) * (num_seeds - 2))
  return num_seeds * mean - (num_seeds - 1) * without


def _resample(
  statistics: Sequence[_Statistic],
  data: tuple[np.ndarray, np.ndarray, np.ndarray],
  groups: np.ndarray,
  num_resamples: int,
  rng: np.random.Generator,
) -> list[tuple[_Values, _Values] | None]:
  """Gives each statistic on all images, and on the resamples, shared by all."""
  labels = data[-1]
  if not len(labels):
    return [None] * len(statistics)
  sizes = np.bincount(groups).astype(np.float64)
  num_groups = len(sizes)
  order = np.argsort(groups, kind="stable")
  starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
  sums = [
    _map(lambda x: np.add.reduceat(x[..., order], starts, -1), each.values)
    for each in statistics
  ]

  def evaluate(counts: np.ndarray) -> list[_Values | None]:
    """Evaluates where groups are drawn so often, `[b, G]`."""
    weights = counts.astype(np.float64)
    totals = weights @ sizes

    def mean(values: np.ndarray) -> np.ndarray:
      # The long side first: on busy cores OpenBLAS takes ten times as long, and
      # NumPy longer still over stacks, for the transposed product.
      flat = weights @ values.reshape(-1, num_groups).T / totals[:, None]
      return flat.T.reshape(*values.shape[:-1], -1)

    return [
      _call(each.fn, data, counts[:, groups])
      if each.fn is not None
      else _map(mean, values)
      for each, values in zip(statistics, sums, strict=True)
    ]

  whole = evaluate(np.ones((1, num_groups), np.int64))
  for each, values in zip(statistics, whole, strict=True):
    if values is not None and not np.isfinite(values.unlearned).all():
      raise ValueError(f"statistic {each.name!r} must be finite on all images")
  chunk = max(1, _MAX_COUNTS // num_groups)
  parts = []
  for start in range(0, num_resamples, chunk):
    shape = (min(chunk, num_resamples - start), num_groups)
    draws = rng.integers(0, num_groups, shape)
    parts.append(evaluate(_counts(draws, num_groups)))
  result: list[tuple[_Values, _Values] | None] = []
  for index, values in enumerate(whole):
    if values is None:
      result.append(None)
      continue
    drawn = [part[index] for part in parts]
    joined = _Values(
      np.concatenate([x.unlearned for x in drawn if x is not None], -1),
      None
      if values.retrained is None
      else np.concatenate(
        [x.retrained for x in drawn if x and x.retrained is not None], -1
      ),
    )
    result.append((values, joined))
  return result


def _map(
  fn: Callable[[np.ndarray], np.ndarray], values: _Values | None
) -> _Values | None:
  """Applies a function to both sides."""
  if values is None:
    return None
  theirs = None if values.retrained is None else fn(values.retrained)
  return _Values(fn(values.unlearned), theirs)


def _call(
  fn: StatisticFn,
  data: tuple[np.ndarray, np.ndarray, np.ndarray],
  counts: np.ndarray,
) -> _Values:
  """Calls a function of all images for each model and row of counts."""
  unlearned, retrained, labels = data
  ours = np.zeros((len(unlearned), 1, len(counts)))
  theirs = np.zeros((len(retrained), len(counts)))
  for index, count in enumerate(counts):
    rows = np.repeat(np.arange(len(labels)), count)
    ours[:, 0, index] = [fn(logits[rows], labels[rows]) for logits in unlearned]
    theirs[:, index] = [fn(logits[rows], labels[rows]) for logits in retrained]
  return _Values(ours, theirs if len(retrained) else None)


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
  statistics: Mapping[str, StatisticFn],
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


def _check_splits(
  labels: Mapping[str, np.ndarray], sides: Mapping[str, Any]
) -> None:
  if not labels:
    raise ValueError("labels must have at least one split, got none")
  for name, side in sides.items():
    if side is not None and set(side) != set(labels):
      raise ValueError(
        f"{name} must have the splits of labels, {sorted(labels)}, got"
        f" {sorted(side)}"
      )


def _checked_runs(split: str, logits: Unlearned, labels: np.ndarray) -> _Runs:
  name = f"unlearned[{split!r}]"
  parts = list(logits.values() if isinstance(logits, Mapping) else logits)
  parts = [np.asarray(part) for part in parts]
  if not parts or any(part.ndim != 3 or not len(part) for part in parts):
    raise ValueError(
      f"{name} must be [T, U, N, K], or [U, N, K] by training seed, got"
      f" {[list(part.shape) for part in parts]}"
    )
  shapes = {part.shape[1:] for part in parts}
  if len(shapes) > 1 or labels.shape != parts[0].shape[1:2]:
    raise ValueError(
      f"{name} must have as many images as labels {list(labels.shape)}, got"
      f" {sorted(shapes)}"
    )
  _check_finite(name, parts)
  checks.labels(labels, len(labels), parts[0].shape[-1])
  return _Runs(np.concatenate(parts), tuple(len(part) for part in parts))


def _checked_reference(split: str, logits: Any, runs: _Runs) -> np.ndarray:
  if logits is None:
    return np.zeros((0, *runs.logits.shape[1:]))
  name = f"retrained[{split!r}]"
  if isinstance(logits, Mapping):
    logits = list(logits.values())
  if not len(logits):
    raise ValueError(
      f"{name} must have a model, or retrained be None, got none"
    )
  shapes = {np.shape(model) for model in logits}
  if shapes != {runs.logits.shape[1:]}:
    raise ValueError(
      f"{name} must be [S, {runs.logits.shape[1]}, {runs.logits.shape[2]}], as"
      f" the unlearned models', got models of {sorted(shapes)}"
    )
  reference = np.stack([np.asarray(model) for model in logits])
  _check_finite(name, [reference])
  return reference


def _check_finite(name: str, parts: Iterable[np.ndarray]) -> None:
  if not all(np.isfinite(part).all() for part in parts):
    raise ValueError(f"{name} must be finite, got NaN or infinity")


def _checked_groups(
  split: str, groups: np.ndarray | None, labels: np.ndarray
) -> np.ndarray:
  """Returns the number of each image's group `[N]`."""
  if groups is None:
    return np.arange(len(labels))
  groups = np.asarray(groups)
  if groups.shape != labels.shape:
    raise ValueError(
      f"groups[{split!r}] must be {list(labels.shape)}, got"
      f" {list(groups.shape)}"
    )
  return np.unique(groups, return_inverse=True)[1]


def _common(name: str, values: Sequence[Any]) -> Any:
  if len(set(values)) > 1:
    raise ValueError(
      f"{name} must have the same models in all splits, got {values}"
    )
  return values[0]
