"""Comparison with retrained references, with uncertainty, on the host.

Unlearning is right as far as the unlearned model cannot be told from one that
was trained without the forget set. `compare` takes the logits of both kinds of
model on the same images and asks, for each statistic, whether their difference
lies within a margin, given that images, training seeds and unlearning seeds are
samples. It answers "equivalent", "not equivalent" or "cannot tell".
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from psg_jax import checks, resampling

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
  checks.integer("num_resamples", num_resamples, at_least=100)
  checks.integer("seed", seed, at_least=0)
  checks.number("confidence", confidence, above=0.5)
  if confidence >= 1:
    raise ValueError(f"confidence must be below 1, got {confidence}")
  statistics = dict(statistics or {})
  margins = _checked_margins(margins, statistics, labels)
  resampling.check_splits(
    labels, {"unlearned": unlearned, "retrained": retrained}
  )
  references, runs, group_of = {}, {}, {}
  for split in labels:
    where = np.asarray(labels[split])
    runs[split] = resampling.checked_runs(split, unlearned[split], where)
    references[split] = resampling.checked_reference(
      split, None if retrained is None else retrained[split], runs[split]
    )
    group_of[split] = resampling.checked_groups(
      split, (groups or {}).get(split), where
    )
  sizes = resampling.common("unlearned", [each.sizes for each in runs.values()])
  num_retrained = resampling.common(
    "retrained", [len(x) for x in references.values()]
  )
  # Streams of their own: a further split changes no other's resamples.
  streams = np.random.SeedSequence(seed).spawn(1 + len(labels))
  rng = np.random.default_rng(streams[0])
  weights = (
    resampling.unlearned_weights(rng, sizes, num_resamples),
    resampling.drawn_weights(rng, max(num_retrained, 1), num_resamples),
  )
  comparisons = []
  for split, stream in zip(labels, streams[1:], strict=True):
    here = np.asarray(labels[split])
    found = _statistics(runs[split].logits, references[split], here, statistics)
    resampled = resampling.resample(
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
  statistic: resampling.Statistic,
  split: str,
  means: tuple[resampling.Values, resampling.Values] | None,
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
  uniform = resampling.uniform_weights(sizes)
  equal = np.full((1, max(num_retrained, 1)), 1 / max(num_retrained, 1))
  theirs = whole.unlearned[:, :, 0].mean(1)
  estimate = resampling.combine(whole, uniform, equal)
  value = float(uniform[0] @ theirs)
  reasons = _reasons(num_retrained, sizes, num_groups, is_distance=is_distance)
  is_blocked = bool(reasons) and reasons[0] != _ONE_ORIGINAL
  difference, interval = None, None
  if estimate is not None:
    difference = float(estimate[0])
    replicates = resampling.combine(resampled, *weights)
    assert replicates is not None
    is_finite = np.isfinite(replicates)
    if not is_finite.all():
      reasons.append("undefined on some resamples, which were left out")
    if is_finite.mean() > 0.5:
      interval = resampling.interval(
        difference,
        replicates[is_finite],
        # Seeds alone, on all images.
        [
          (resampling.combine(whole, uniform, weights[1]), num_retrained - 1),
          (
            resampling.combine(whole, weights[0], equal),
            resampling.seed_freedom(sizes),
          ),
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
  unlearned: np.ndarray,
  retrained: np.ndarray,
  labels: np.ndarray,
  extra: Mapping[str, resampling.StatisticFn],
) -> list[resampling.Statistic]:
  """Computes the statistics of a split, image by image where possible."""
  if not len(labels):
    names = (*DEFAULT_MARGINS, *extra)
    return [resampling.Statistic(name, None, None, False) for name in names]
  found = [
    resampling.Statistic(
      "accuracy",
      resampling.Values(
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
    ("agreement", resampling.agreement, True),
    ("kl_divergence", resampling.kl_divergence, False),
  ):
    values = None
    if len(retrained):
      values = resampling.Values(
        distance(unlearned, retrained),
        resampling.pseudo_values(distance(retrained, retrained)),
      )
    found.append(resampling.Statistic(name, values, None, is_share))
  for name, fn in extra.items():
    first = _checked_value(name, fn(unlearned[0], labels), len(labels))
    if not first.ndim:
      found.append(resampling.Statistic(name, None, fn, False))
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
      resampling.Statistic(
        name, resampling.Values(ours[:, None], theirs), None, is_share
      )
    )
  return found


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
