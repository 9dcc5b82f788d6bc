"""Whether unlearned models are as another retraining, by the yardstick.

`judge` turns a `yardstick.Measurement` into a verdict and one plain sentence.
`held_out` counts how often the same checks reject true retrained models: a
check that does is no evidence against an unlearned one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from psg_jax import checks, resampling, yardstick

AS_RETRAINED = "as another retraining"
NOT_RETRAINED = "not as retraining"
CANNOT_TELL = "cannot tell"
LEVEL_ONLY = "only the level can be judged"
MARGIN = 1.25
"""Largest normalised distance that counts as near."""
MIN_AGREEMENT = 2 / 3
"""Share of images on which two references must predict the same.

Below, a reference differs from another on more than one image in three: an
unlearned model cannot look right, whatever it says.
"""
LEVEL = 0.05
"""Of all tests of levels together (Bonferroni)."""
# Accuracies by class are not among them: few images of a class make a wide
# interval, and the levels test them.
_JUDGED = ("kl_divergence", "disagreement", "kl_to_mean")
_SPLITS = {
  "test_forget": "test images to forget",
  "train_forget": "training images to forget",
  "test_retain": "test images to keep",
  "train_retain": "training images to keep",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the measurement allows to say.

  Attributes:
    verdict: `AS_RETRAINED`, `NOT_RETRAINED`, `CANNOT_TELL` or `LEVEL_ONLY`.
    is_rejected: Whether a check rejects the model as a retrained one.
    sentence: The verdict in plain words, with its figures.
    against: Names of the checks that reject, as `name/split`.
  """

  verdict: str
  is_rejected: bool
  sentence: str
  against: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FalseAlarms:
  """How often true retrained models are rejected.

  Attributes:
    rejected: References whose verdict rejects them.
    attacks: By attack, references that it flags.
    total: References held out, one at a time.
    num_others: References that are left to each.
  """

  rejected: int
  attacks: dict[str, int]
  total: int
  num_others: int

  def __str__(self) -> str:
    if not self.total:
      return "false alarms unknown: no reference can be held out"
    return (
      f"the same checks reject {self.rejected} of {self.total} true retrained"
      " models held out"
    )


def judge(
  measured: yardstick.Measurement,
  *,
  original: yardstick.Measurement | None = None,
  margin: float = MARGIN,
) -> Verdict:
  """Says whether the models are as another retraining would be.

  They are if every normalised distance lies within the margin with the whole of
  its interval and no level is rejected; they are not if an interval lies beyond
  the margin or a level is rejected. With fewer than three references it cannot
  be told: there is one pair at most. Where the references do not agree, as
  `is_agreed` tells, the levels alone count.

  Args:
    measured: Of the unlearned models.
    original: Of the original model, with the same references.
    margin: Largest normalised distance that is near, above 1.

  Returns:
    The verdict.
  """
  checks.number("margin", margin, above=1)
  split = measured.forget_split
  rejected = _rejected_levels(measured)
  level = _level_words(measured, rejected, split)
  if measured.num_references < 2 or split is None:
    count = "one retrained model" if split else "no image to forget"
    return Verdict(
      CANNOT_TELL,
      False,
      f"With {count} a distance cannot be judged: nobody knows how far two"
      " retrained models are from each other.",
    )
  if not is_agreed(measured, original=original, margin=margin):
    return Verdict(
      LEVEL_ONLY,
      bool(rejected),
      "The references do not agree: only the level can be judged, and it is"
      f" {level}.",
      tuple(f"{x.name}/{x.split}" for x in rejected),
    )
  judged = [
    x for x in measured.distances if x.name in _JUDGED and x.value is not None
  ]
  ranges = [x.interval or (-np.inf, np.inf) for x in judged]
  far = [x for x, (low, _) in zip(judged, ranges, strict=True) if low > margin]
  words = f"{_distance_words(measured, split)}, and the level is {level}."
  if far or rejected:
    places: list[Any] = [*rejected, *far]
    first = far[0] if far else rejected[0]
    near = "further away than another retraining" if far else "off in level"
    return Verdict(
      NOT_RETRAINED,
      True,
      f"The model is {near} ({_words(first.name)} of {_words(first.split)}):"
      f" {words}",
      tuple(f"{x.name}/{x.split}" for x in places),
    )
  num_open = sum(high > margin for _, high in ranges)
  why = None
  if measured.num_references < 3:
    why = "two references make one pair"
  elif not judged:
    why = "the references do not differ"
  elif num_open:
    why = f"{num_open} of {len(judged)} intervals reach beyond {margin:g}"
  if why is not None:
    return Verdict(
      CANNOT_TELL,
      False,
      "It cannot be told whether the model is as near as another retraining"
      f" ({why}): {words}",
    )
  sentence = f"The model is as near as another retraining: {words}"
  return Verdict(AS_RETRAINED, False, sentence)


def is_agreed(
  measured: yardstick.Measurement,
  *,
  original: yardstick.Measurement | None = None,
  margin: float = MARGIN,
) -> bool:
  """Whether the references agree on forget images as far as needed to judge.

  They do not where two of them predict the same for less than `MIN_AGREEMENT`
  of the images; nor where even the original model is within the margin of
  another retraining by its distance, although its level is rejected.
  """
  split = measured.forget_split
  spread = measured.spread(split)
  if spread is None or spread.agreement is None:
    return True
  if spread.agreement < MIN_AGREEMENT:
    return False
  if original is None:
    return True
  distance = original.distance("kl_divergence", split)
  is_rejected = any(x.split == split for x in _rejected_levels(original))
  value = None if distance is None else distance.value
  is_near = value is not None and value <= margin
  return not (is_near and is_rejected)


def record(measured: yardstick.Measurement, verdict: Verdict) -> dict[str, Any]:
  """Returns a measurement and the verdict on it as a dictionary for JSON."""
  result = dataclasses.asdict(measured)
  for row, level in zip(result["attacks"], measured.attacks, strict=True):
    row["is_flagged"] = level.is_flagged
  return {
    **result,
    "forget_split": measured.forget_split,
    **dataclasses.asdict(verdict),
  }


def assess(
  retrained: Mapping[str, Any],
  models: Mapping[str, Mapping[str, resampling.Unlearned]],
  labels: Mapping[str, np.ndarray],
  *,
  attacks: Mapping[str, Mapping[str, yardstick.Attack]],
  **options: Any,
) -> dict[str, Any]:
  """Measures and judges several models by the same references.

  Args:
    retrained: As for `yardstick.measure`.
    models: By name what `yardstick.measure` takes; the `original` among them
      tells whether the references agree.
    labels: As for `yardstick.measure`.
    attacks: By model, `retrained` among them.
    **options: Others of `yardstick.measure`.

  Returns:
    A dictionary for JSON: `models`, by name what `record` gives, and for
    `retrained` what each is to the others; `false_alarms`, and their
    `statement`.
  """
  measured = {
    name: yardstick.measure(
      retrained, logits, labels, attacks=attacks[name], **options
    )
    for name, logits in models.items()
  }
  original = measured["original"]
  alarms = held_out(
    retrained,
    labels,
    attacks=attacks["retrained"],
    original=original,
    **options,
  )
  return {
    "models": {
      "retrained": _leave_one_out(original),
      **{
        name: record(one, judge(one, original=original))
        for name, one in measured.items()
      },
    },
    "false_alarms": dataclasses.asdict(alarms),
    "statement": str(alarms),
  }


def _leave_one_out(measured: yardstick.Measurement) -> dict[str, Any]:
  """What each reference is to the others: 1 on average."""
  reason = "1 by definition; the interval is the range over references"
  distances = [
    dataclasses.asdict(
      dataclasses.replace(
        row,
        value=1.0,
        interval=(min(row.references), max(row.references)),
        unlearned=row.floor,
        reasons=(reason,),
      )
      if row.references
      else row
    )
    for row in measured.distances
  ]
  return {
    "distances": distances,
    "levels": [],
    "attacks": [],
    "num_references": measured.num_references,
    "forget_split": measured.forget_split,
    "spreads": [dataclasses.asdict(row) for row in measured.spreads],
  }


def _rejected_levels(measured: yardstick.Measurement) -> list[yardstick.Level]:
  """The levels that are not those of another retraining, all tests together."""
  tested = [(x, x.p) for x in measured.levels if x.p is not None]
  return [x for x, p in tested if p * len(tested) < LEVEL]


def held_out(
  retrained: Mapping[str, Any],
  labels: Mapping[str, np.ndarray],
  *,
  attacks: Mapping[str, yardstick.Attack] | None = None,
  original: yardstick.Measurement | None = None,
  margin: float = MARGIN,
  **options: Any,
) -> FalseAlarms:
  """Judges each reference as if it were the unlearned model of the others.

  Args:
    retrained: As for `measure`.
    labels: As for `measure`.
    attacks: As for `measure`, of which `retrained` counts.
    original: As for `judge`.
    margin: As for `judge`.
    **options: Others of `measure`.

  Returns:
    How many are rejected. With three references two are left to each, and only
    levels can reject; with one an attack is compared with chance.
  """
  models = {
    split: list(x.values() if isinstance(x, Mapping) else x)
    for split, x in retrained.items()
  }
  total = len(next(iter(models.values())))
  attacks = attacks or {}
  flags = dict.fromkeys(attacks, 0)
  if total < 2:
    for name, attack in attacks.items():
      null = yardstick.null_std(attack.num_samples)
      width = scipy.stats.norm.isf((1 - options.get("confidence", 0.9)) / 2)
      outside = np.abs(np.asarray(attack.retrained) - 0.5) > width * null
      flags[name] = int(outside.sum())
    return FalseAlarms(0, flags, 0, 0)
  rejected = 0
  for place in range(total):
    others = [s for s in range(total) if s != place]
    measured = yardstick.measure(
      {split: [x[s] for s in others] for split, x in models.items()},
      {split: np.asarray(x[place])[None, None] for split, x in models.items()},
      labels,
      attacks={
        name: attack._replace(
          unlearned=[attack.retrained[place]],
          retrained=[attack.retrained[s] for s in others],
        )
        for name, attack in attacks.items()
      },
      **options,
    )
    rejected += judge(measured, original=original, margin=margin).is_rejected
    for level in measured.attacks:
      flags[level.name] += level.is_flagged
  return FalseAlarms(rejected, flags, total, total - 1)


def _words(name: str | None) -> str:
  """A name of a split or a figure in words."""
  return _SPLITS.get(name or "", (name or "an attack").replace("_", " "))


def _distance_words(measured: yardstick.Measurement, split: str) -> str:
  row = measured.distance("kl_divergence", split)
  if row is None or row.value is None:
    return "its normalised distance is undefined"
  text = f"its normalised distance on {_words(split)} is {row.value:.2f}"
  if row.interval is not None:
    text += f" [{row.interval[0]:.2f}, {row.interval[1]:.2f}]"
  return text


def _level_words(
  measured: yardstick.Measurement,
  rejected: Sequence[yardstick.Level],
  split: str | None,
) -> str:
  row = rejected[0] if rejected else measured.level("accuracy", split)
  if row is None or row.retrained is None or row.sd is None:
    return "not judged"
  verb = "not that" if rejected else "within that"
  return (
    f"{verb} of retraining ({_words(row.name)} on"
    f" {_words(row.split)} {row.unlearned:.3f} against"
    f" {row.retrained:.3f} ± {row.sd:.3f})"
  )
