"""Figures of an experiment, and whether they are what is expected.

A row of the table has the mean of each figure over what the table does not tell
apart, seeds or classes, with its standard deviation and how many there are.
What is expected are such rows, measured before and kept in
`experiments/expected`, with where and when.

A mean is as expected within

    floor + times sqrt(sd² / n + sd'² / n')

of the mean that is expected, where `sd` and `sd'` are those of what is expected
and of what was obtained, over seeds or classes. Of fewer than five values they
are known badly: they are then no less than that of all rows that are expected,
and `times` is larger. Another processor is as another seed: rounding decides
where training ends. The floor is what an image or two more or less make. A mean
over another number of values is not as expected: some have diverged.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments import files
from experiments.reproduction import catalogue, designs

NORMALISED = "normalised_"
"""Before the name of a distance over that of two retrained models."""
EXPECTED = pathlib.Path(__file__).parent.parent / "expected"
FEW = 5
TIMES = {True: 4.0, False: 3.0}
"""How many standard errors, of fewer than `FEW` values and of others: of some
hundred figures none is to be further by chance alone."""
FLOORS = {"kl_divergence": 0.05, "distance": 0.003}
"""By the beginning of a figure's name."""
_FLOOR = 0.02
_SMOKE = 0.25, 0.6
"""Floors at size smoke, absolute and as a part of the mean: what so little
training makes differs from one processor to the next as from seed to seed, and
two seeds do not tell how much."""
_KEPT = ("mean", "sd", "number")


class Figure(NamedTuple):
  """A figure of a row.

  Attributes:
    mean: Over seeds or classes; None where there is none.
    sd: Standard deviation over them; None for one value.
    number: How many values.
  """

  mean: float | None
  sd: float | None
  number: int


NOTHING = Figure(None, None, 0)


class Row(NamedTuple):
  """A row of an experiment's table.

  Attributes:
    key: Values of the columns that tell it from others, by column.
    figures: By name.
  """

  key: Mapping[str, Any]
  figures: Mapping[str, Figure]


class Finding(NamedTuple):
  """A figure that is compared with what is expected.

  Attributes:
    key: Of the row.
    figure: Its name.
    obtained: The mean; None where there is none.
    expected: The mean that is expected, likewise.
    tolerance: Largest difference.
    numbers: How many values there are, and were.
  """

  key: Mapping[str, Any]
  figure: str
  obtained: float | None
  expected: float | None
  tolerance: float
  numbers: tuple[int, int] = (1, 1)

  @property
  def is_as_expected(self) -> bool:
    """Whether it is within the tolerance; two that are missing are."""
    if self.numbers[0] != self.numbers[1]:
      return False
    if self.obtained is None or self.expected is None:
      return self.obtained is self.expected
    return abs(self.obtained - self.expected) <= self.tolerance


def rows(
  experiment: catalogue.Experiment, records: Iterable[Mapping[str, Any]]
) -> list[Row]:
  """Averages records to the rows of an experiment's table, in their order.

  Args:
    experiment: The experiment.
    records: Of its cells, each with the columns of its row.
  """
  groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
  for record in records:
    key = tuple((x, record[x]) for x in experiment.by if x in record)
    groups.setdefault(key, []).append(record)
  return [
    Row(
      dict(key),
      {
        name: _normalised(name, group, groups.get(_again(key), []))
        if name.startswith(NORMALISED)
        else _figure([x.get(name) for x in group])
        for name in experiment.figures
      },
    )
    for key, group in groups.items()
  ]


def _again(key: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
  """The key of the second retrained models beside a row's."""
  return tuple((x, designs.AGAIN if x == "model" else y) for x, y in key)


def _normalised(
  name: str,
  group: Sequence[Mapping[str, Any]],
  again: Sequence[Mapping[str, Any]],
) -> Figure:
  """The mean over that of second retrained models, paired.

  1 is as near to the retrained model as another retraining. The deviation is
  that of the ratio of two means to first order, so that over the root of the
  number it is the mean's error.
  """
  if len(group) != len(again):
    return NOTHING
  name = name.removeprefix(NORMALISED)
  ours, theirs = (
    [_distance(name, record) for record in side] for side in (group, again)
  )
  pairs = [x for x in zip(ours, theirs, strict=True) if None not in x]
  x, y = np.array(pairs, float).reshape(-1, 2).T
  if not len(y) or y.mean() <= 0:
    return NOTHING
  ratio = x.mean() / y.mean()
  terms = (x - ratio * y) / y.mean()
  sd = float(np.std(terms, ddof=1)) if len(terms) > 1 else None
  return Figure(float(ratio), sd, len(terms))


def _distance(name: str, record: Mapping[str, Any]) -> float | None:
  """A distance of a record; disagreement is what is left of agreement."""
  if not name.startswith("disagreement"):
    return record.get(name)
  agreement = record.get(name.removeprefix("dis"))
  return None if agreement is None else 1 - agreement


def interval(
  mean: float, sd: float, number: int, confidence: float = 0.9
) -> tuple[float, float]:
  """Returns Student's interval of the mean of two values or more."""
  half = stats.t.ppf((1 + confidence) / 2, number - 1) * sd / math.sqrt(number)
  return mean - half, mean + half


def _figure(values: Sequence[float | None]) -> Figure:
  known = [x for x in values if x is not None]
  if not known:
    return NOTHING
  sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
  return Figure(float(np.mean(known)), sd, len(known))


def compare(
  experiment: catalogue.Experiment,
  size: str,
  obtained: Sequence[Row],
  expected: Sequence[Row],
) -> list[Finding]:
  """Compares the checked figures of all rows with what is expected.

  A row that one side lacks has a finding without a figure on that side.
  """
  before = {_key(row): row for row in expected}
  now = {_key(row): row for row in obtained}
  findings = []
  for key in dict.fromkeys([*before, *now]):
    row = before.get(key) or now[key]
    for name in experiment.checked:
      old, new = (
        side[key].figures.get(name, NOTHING) if key in side else NOTHING
        for side in (before, now)
      )
      if old.number or new.number:
        findings.append(
          Finding(
            row.key,
            name,
            new.mean,
            old.mean,
            _tolerance(name, size, old, new, _pooled(expected, name)),
            (new.number, old.number),
          )
        )
  return findings


def _tolerance(
  name: str, size: str, old: Figure, new: Figure, pooled: float
) -> float:
  """Returns the largest difference of two means that is as expected."""
  floor = next((y for x, y in FLOORS.items() if name.startswith(x)), _FLOOR)
  if size == "smoke":
    floor = max(_SMOKE[0], _SMOKE[1] * abs(old.mean or 0.0))
  is_few = old.number < FEW
  least = pooled if is_few else 0.0
  variance = sum(
    max(figure.sd or 0.0, least) ** 2 / max(figure.number, 1)
    for figure in (old, new)
  )
  return floor + TIMES[is_few] * math.sqrt(variance)


def _pooled(rows: Sequence[Row], name: str) -> float:
  """The root mean square of the sds of a figure, over rows."""
  spreads = [row.figures[name].sd for row in rows if name in row.figures]
  known = [sd for sd in spreads if sd is not None]
  return float(np.sqrt(np.mean(np.square(known)))) if known else 0.0


def _key(row: Row) -> str:
  # Numbers that came from a file and numbers that did not are alike there.
  return json.dumps(row.key, sort_keys=True)


def path(name: str, size: str) -> pathlib.Path:
  """Returns the file of what an experiment is expected to give."""
  return EXPECTED / size / f"{name}.json"


def read(name: str, size: str) -> dict[str, Any] | None:
  """Returns what is expected: `rows`, `seconds`, `bytes` and `origin`.

  None where it was never measured at this size.
  """
  file = path(name, size)
  if not file.is_file():
    return None
  content = files.read_json(file)
  content["rows"] = [
    Row(x["row"], {name: Figure(**y) for name, y in x["figures"].items()})
    for x in content["rows"]
  ]
  return content


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Returns rows as they are kept, six digits each."""
  return [
    {
      "row": dict(row.key),
      "figures": {
        name: {what: _rounded(getattr(figure, what)) for what in _KEPT}
        for name, figure in row.figures.items()
      },
    }
    for row in rows
  ]


def _rounded(value: float | None) -> float | None:
  return None if value is None else float(f"{value:.6g}")


def duration(name: str, text: str) -> float:
  """Reads a time such as `2h`, `90m`, `1h30m` or `300s`; returns seconds.

  Raises:
    ValueError: If it is none, or not above 0.
  """
  match = re.fullmatch(
    r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text
  )
  parts = [float(x or 0) for x in match.groups()] if match else [0.0]
  seconds = sum(x * y for x, y in zip(parts, (3600, 60, 1), strict=False))
  if seconds <= 0:
    raise ValueError(
      f"{name} must be a time such as 2h, 90m or 300s, got {text}"
    )
  return seconds
