"""Checks of unlearned models, each with the false alarms that it raises.

A check is a number that a model is given beside retrained models. Each
retrained model is given it as well, beside the others; a model is rejected
where it lies outside what these have. That is done to each retrained model in
turn too: how many are rejected is what the check's verdict is worth. Numbers
of different checks are never averaged.

    assess(retrained, {"psg": models}, labels, traces.CHECKS)

The checks themselves are in `traces`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats

from psg_jax import checks, judgement, metrics
from psg_jax.metrics import common

LEVEL = 0.05
"""Share of retrained models that a check rejects by design."""
MIN_REFERENCES = 3
NOT_REJECTED = "not told from retraining"
NEAR_RETRAINED = "nearer to retrained"
NEAR_ORIGINAL = "nearer to the original"
_FEW = f"fewer than {MIN_REFERENCES} retrained models"


class Check(NamedTuple):
  """What is asked of a model, the same of each.

  Attributes:
    name: Its name, one for each split.
    split: The split it is about.
    title: For tables.
    read: `(outputs, labels by split) -> reading`: what it takes of one model,
      read once. May raise `metrics.NotAvailableError`.
    statistic: `(reading, readings of references, reading of the original) ->
      float`, where there is one reference or more. May raise it likewise.
    resolution: `(readings of references, reading of the original) -> float`,
      positive: the least standard deviation that is believed of references,
      such as what one image makes.
    direction: Which side is evidence against a model: `"above"` or `"both"`.
    is_position: Whether 0 is a retrained model's place and 1 the original's.
    needs_original: Whether it takes the original model; its reading is None
      otherwise.
    source: Authors and year of what it is from.
  """

  name: str
  split: str
  title: str
  read: Callable[[metrics.Outputs, Mapping[str, np.ndarray]], Any]
  statistic: Callable[[Any, Sequence[Any], Any], float]
  resolution: Callable[[Sequence[Any], Any], float]
  direction: Literal["above", "both"] = "above"
  is_position: bool = False
  needs_original: bool = False
  source: str = ""


class Subject(NamedTuple):
  """A model to check.

  Attributes:
    outputs: What is known of it.
    original: Of the original model of the same training seed, or of another
      where there is none of that; None for checks that need none.
  """

  outputs: metrics.Outputs
  original: metrics.Outputs | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check says of the models of one method.

  Attributes:
    values: One a model; empty where it is not available.
    is_rejected: One a model; empty where it cannot be told.
    verdict: `judgement.NOT_RETRAINED` where more than half of the models are
      rejected, `NOT_REJECTED` where none is, else `judgement.CANNOT_TELL`.
    nearer: Of a position: `NEAR_RETRAINED` or `NEAR_ORIGINAL` where that holds
      for all models beside each single reference, else
      `judgement.CANNOT_TELL`; None of other checks.
    reason: Why it cannot be told, or None.
  """

  values: tuple[float, ...] = ()
  is_rejected: tuple[bool, ...] = ()
  verdict: str = judgement.CANNOT_TELL
  nearer: str | None = None
  reason: str | None = None

  @property
  def value(self) -> float | None:
    """Mean over the models."""
    return common.mean(self.values)


@dataclasses.dataclass(frozen=True)
class Examination:
  """What a check says of all models.

  Attributes:
    name: The check's name.
    split: Its split.
    title: Its title.
    references: Of each retrained model, its value beside the others.
    limits: Where a retrained model lies, but for `LEVEL` of them; the lower one
      is None for checks that have no lower side. None with fewer than three.
    false_alarms: Of each retrained model, whether the others reject it.
    references_nearer: Of a position, what the others say of each.
    models: By method.
    reason: Why there are no values or limits, or None.
  """

  name: str
  split: str
  title: str
  references: tuple[float, ...] = ()
  limits: tuple[float | None, float] | None = None
  false_alarms: tuple[bool, ...] = ()
  references_nearer: tuple[str, ...] = ()
  models: Mapping[str, Finding] = dataclasses.field(default_factory=dict)
  reason: str | None = None


class _Reading(NamedTuple):
  """What a check takes of a model, and of its original."""

  model: Any
  original: Any


def examine(
  check: Check,
  retrained: Sequence[Subject],
  models: Mapping[str, Sequence[Subject]],
  labels: Mapping[str, np.ndarray],
  *,
  level: float = LEVEL,
) -> Examination:
  """Asks one question of all models, retrained ones among them.

  With the statistic `T(model; references)` and retrained models `1..S`, a
  model has `mean_s T(model; all but s)` and the retrained model `s` has
  `T(s; all but s)`: as many references on both sides, so that the two are
  alike for a model that is another retraining. Limits are those of Student's
  test of one new value with `S - 1` degrees of freedom,

      mean ± t · max(sd, resolution) · sqrt(1 + 1 / S)

  A false alarm is a retrained model outside the limits that all others make,
  found in the same way. Values that have a longer tail than the normal
  distribution make more of them than `level`; that is what counting is for.

  Args:
    check: The question.
    retrained: `S` of them. With fewer than three nothing is rejected; with
      three, two make the limits for the third.
    models: By method, of any training seeds.
    labels: int `[N]` by split.
    level: Share of retrained models that lie outside the limits, in (0, 0.5].

  Returns:
    The values, verdicts and false alarms. What is not available has a reason.

  Raises:
    ValueError: If there is no retrained model, `level` is out of its range, or
      arrays do not fit the labels.

  References:
    Hahn and Meeker, Statistical Intervals, 1991 (of one new value).
  """
  checks.number("level", level, above=0, at_most=0.5)
  if not len(retrained):
    raise ValueError("retrained must have a model or more, got none")
  read = _reader(check, labels)
  empty = Examination(check.name, check.split, check.title)
  try:
    references = [read(subject) for subject in retrained]
    if len(references) < 2:
      raise metrics.NotAvailableError(
        "one retrained model: it has no other to be compared with"
      )
    values = _values_alone(check, references)
    limits: tuple[float | None, float] | None = _limits(
      check, values, references, level
    )
    alarms = _false_alarms(check, references, level)
  except metrics.NotAvailableError as error:
    lost = Finding(reason=error.reason)
    return dataclasses.replace(
      empty, models=dict.fromkeys(models, lost), reason=error.reason
    )
  reason = None
  if len(references) < MIN_REFERENCES:
    # Values are known of two; limits of one pair would say nothing.
    limits, reason = None, _FEW
  return dataclasses.replace(
    empty,
    references=tuple(values),
    limits=limits,
    false_alarms=tuple(alarms),
    references_nearer=tuple(_references_nearer(check, references)),
    models={
      name: _finding(check, subjects, read, references, limits)
      for name, subjects in models.items()
    },
    reason=reason,
  )


def assess(
  retrained: Sequence[Subject],
  models: Mapping[str, Sequence[Subject]],
  labels: Mapping[str, np.ndarray],
  table: Sequence[Check],
  *,
  level: float = LEVEL,
) -> dict[str, Any]:
  """Asks all questions of all models.

  Args:
    retrained: As for `examine`.
    models: As for `examine`.
    labels: As for `examine`.
    table: The checks.
    level: Of each check, as for `examine`.

  Returns:
    A dictionary for JSON: `level`; `examinations`, of each check what
    `Examination` has, with the mean `value` of each method, less those of
    splits that have no image; `against`, by method the checks that reject it,
    as `name/split`; and of `total` retrained models the number of
    `false_alarms`, rejected by one check or more.
  """
  examinations = [
    examine(check, retrained, models, labels, level=level)
    for check in table
    if len(labels.get(check.split, ()))
  ]
  alarms = [x.false_alarms for x in examinations if x.false_alarms]
  return {
    "level": level,
    "examinations": [_record(x) for x in examinations],
    "against": {
      name: [
        f"{x.name}/{x.split}"
        for x in examinations
        if x.models[name].verdict == judgement.NOT_RETRAINED
      ]
      for name in models
    },
    "false_alarms": sum(map(any, zip(*alarms, strict=True))),
    "total": len(alarms[0]) if alarms else 0,
  }


def _record(examination: Examination) -> dict[str, Any]:
  record = dataclasses.asdict(examination)
  for name, finding in examination.models.items():
    record["models"][name]["value"] = finding.value
  return record


def _reader(
  check: Check, labels: Mapping[str, np.ndarray]
) -> Callable[[Subject], _Reading]:
  """Reads a subject; what several share, such as an original, once."""
  readings: dict[int, Any] = {}

  def read(outputs: metrics.Outputs | None) -> Any:
    if outputs is None:
      raise metrics.NotAvailableError("needs the original model")
    if id(outputs) not in readings:
      readings[id(outputs)] = check.read(outputs, labels)
    return readings[id(outputs)]

  def read_both(subject: Subject) -> _Reading:
    original = read(subject.original) if check.needs_original else None
    return _Reading(read(subject.outputs), original)

  return read_both


def _value(
  check: Check, subject: _Reading, references: Sequence[_Reading]
) -> float:
  """The statistic beside all references but one, the mean over which one."""
  others = [x.model for x in references]
  if len(others) == 1:
    return check.statistic(subject.model, others, subject.original)
  return float(
    np.mean(
      [
        check.statistic(
          subject.model, others[:s] + others[s + 1 :], subject.original
        )
        for s in range(len(others))
      ]
    )
  )


def _values_alone(check: Check, references: Sequence[_Reading]) -> list[float]:
  """The value of each reference beside all others."""
  models = [x.model for x in references]
  return [
    check.statistic(x.model, models[:s] + models[s + 1 :], x.original)
    for s, x in enumerate(references)
  ]


def _limits(
  check: Check,
  values: Sequence[float],
  references: Sequence[_Reading],
  level: float,
) -> tuple[float | None, float]:
  """Where one more value lies, of two references or more."""
  models = [x.model for x in references]
  least = max(check.resolution(models, x.original) for x in references)
  sd = max(float(np.std(values, ddof=1)), least)
  num, mean = len(values), float(np.mean(values))
  is_both = check.direction == "both"
  quantile = scipy.stats.t.isf(level / (2 if is_both else 1), num - 1)
  half = float(quantile) * sd * math.sqrt(1 + 1 / num)
  return (mean - half if is_both else None, mean + half)


def _is_outside(value: float, limits: tuple[float | None, float]) -> bool:
  low, high = limits
  return value > high or (low is not None and value < low)


def _false_alarms(
  check: Check, references: Sequence[_Reading], level: float
) -> list[bool]:
  """Judges each reference by all others; none where one would be left."""
  if len(references) < MIN_REFERENCES:
    return []
  alarms = []
  for s, reference in enumerate(references):
    others = [*references[:s], *references[s + 1 :]]
    limits = _limits(check, _values_alone(check, others), others, level)
    alarms.append(_is_outside(_value(check, reference, others), limits))
  return alarms


def _finding(
  check: Check,
  subjects: Sequence[Subject],
  read: Callable[[Subject], _Reading],
  references: Sequence[_Reading],
  limits: tuple[float | None, float] | None,
) -> Finding:
  """Judges the models of one method."""
  try:
    models = [read(subject) for subject in subjects]
    values = tuple(_value(check, x, references) for x in models)
    nearer = _nearer(check, models, references)
  except metrics.NotAvailableError as error:
    return Finding(reason=error.reason)
  if limits is None:
    return Finding(values, nearer=nearer, reason=_FEW)
  is_rejected = tuple(_is_outside(value, limits) for value in values)
  num = sum(is_rejected)
  if 2 * num > len(values):
    return Finding(values, is_rejected, judgement.NOT_RETRAINED, nearer)
  if not num:
    return Finding(values, is_rejected, NOT_REJECTED, nearer)
  reason = f"{num} of {len(values)} models are rejected"
  return Finding(values, is_rejected, judgement.CANNOT_TELL, nearer, reason)


def _nearer(
  check: Check, models: Sequence[_Reading], references: Sequence[_Reading]
) -> str | None:
  """On which side of the middle all models are, beside each reference alone."""
  if not check.is_position:
    return None
  places = [
    check.statistic(model.model, [reference.model], model.original)
    for model in models
    for reference in references
  ]
  if len(references) < MIN_REFERENCES:
    return judgement.CANNOT_TELL
  return _side(places)


def _side(places: Sequence[float]) -> str:
  if max(places) < 0.5:
    return NEAR_RETRAINED
  return NEAR_ORIGINAL if min(places) > 0.5 else judgement.CANNOT_TELL


def _references_nearer(
  check: Check, references: Sequence[_Reading]
) -> list[str]:
  """What the others say of each reference, of which two are enough."""
  if not check.is_position or len(references) < MIN_REFERENCES:
    return []
  models = [x.model for x in references]
  answers = []
  for s, x in enumerate(references):
    places = [
      check.statistic(x.model, [other], x.original)
      for other in models[:s] + models[s + 1 :]
    ]
    answers.append(_side(places))
  return answers
