"""Trials of a method's settings: which there are, their table, the choice.

Without values of one's own every method gets the same number of trials from
one plan: what it has in small runs, and multiples of it, in the order of
`STEPS`. Which arguments are varied is in `ARGUMENTS`, and for all others it is
the learning rate and then the passes.
"""

import itertools
import json
import math
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import cells, contexts, files
from experiments.comparison import recipes
from psg_jax import baselines, checks

STEPS = (
  *((1, 1), (1 / 3, 1), (3, 1), (1 / 10, 1), (10, 1)),
  *((1, 2), (1 / 3, 2), (3, 2), (1 / 10, 2), (10, 2)),
)
"""Factors of the first argument and of the second, one pair a trial."""
_STEPS_ALONE = (1, 1 / 3, 3, 1 / 10, 10, 1 / 30, 30, 1 / 100, 100, 1 / 300)
_RATE_AND_PASSES = ("learning_rate", "num_epochs")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
  "ssd": ("selection_weight", "dampening"),
  "fisher": ("noise_scale",),
  "bias_shift": ("margin",),
  # It is what all are measured by.
  "retrain": (),
}
"""What is varied in methods that have no learning rate to vary."""
FIGURES = (
  *("forget_accuracy", "retain_accuracy"),
  *("normalised_forget", "normalised_retain"),
  *("agreement", "reference_agreement", "seconds", "cost"),
)
"""Those of `tune_methods.measure`; `seconds` of unlearning, compiling included;
and `cost`, these over the mean seconds of a retrained model, whose program the
original has compiled before."""


class Trial(NamedTuple):
  """What is tried.

  Attributes:
    method: A name in `baselines.METHODS`.
    settings: The arguments that are set, as JSON, sorted by name.
  """

  method: str
  settings: str

  @classmethod
  def of(cls, method: str, overrides: Mapping[str, Any]) -> "Trial":
    """Returns the trial of these arguments."""
    return cls(method, json.dumps(overrides, sort_keys=True))

  @property
  def overrides(self) -> dict[str, Any]:
    """The arguments, by name."""
    values: dict[str, Any] = json.loads(self.settings)
    return values

  @property
  def options(self) -> list[str]:
    """The arguments, as `--set` of `experiments.compare` takes them."""
    return [
      shlex.quote(f"{self.method}.{name}={value}")
      for name, value in self.overrides.items()
    ]


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    trial: The method and its settings.
    seed: Of training and unlearning.
    budget: Most trials that the method was given.
    job: Digits that say what it was measured on.
    status: `cells.DONE` or `cells.DIVERGED`.
    figures: Those of `FIGURES`; empty for what diverged.
  """

  trial: Trial
  seed: int
  budget: int
  job: str
  status: str
  figures: Mapping[str, float] = {}


_COLUMNS = ("method", "settings", "seed", "budget", "job", "status", *FIGURES)


def planned(
  method: str, context: contexts.Context, num_trials: int
) -> list[Trial]:
  """Returns the trials of a method that nobody gave values for.

  Args:
    method: A name in `baselines.METHODS`.
    context: The job, whose sizes the small-run values follow.
    num_trials: How many, at most as many as `STEPS`.

  Returns:
    The small-run values first; a single trial where there is nothing to vary.

  Raises:
    ValueError: If there are not so many, or the method is unknown.
  """
  checks.integer("trials", num_trials, at_least=1)
  if num_trials > len(STEPS):
    raise ValueError(
      f"trials must be at most {len(STEPS)} without a grid, got {num_trials}"
    )
  record = recipes.resolve(method, context).record
  names = ARGUMENTS.get(method)
  if names is None:
    names = _RATE_AND_PASSES if "learning_rate" in record else ()
    names = tuple(x for x in names if x in recipes.names(method))
  if not names:
    return [Trial.of(method, {})]
  defaults = baselines.parameters(method)
  starts: list[Any] = [record.get(name, defaults.get(name)) for name in names]
  steps = STEPS if len(names) > 1 else [(factor, 1) for factor in _STEPS_ALONE]
  trials = []
  for factor, second in steps[:num_trials]:
    overrides = {names[0]: float(f"{factor * starts[0]:.3g}")}
    if second != 1:
      overrides[names[1]] = second * starts[1]
    trials.append(Trial.of(method, overrides))
  return trials


def read_grid(
  given: Sequence[str], methods: Sequence[str], num_trials: int
) -> dict[str, list[Trial]]:
  """Reads `METHOD.ARGUMENT=V1,V2,...`; several of a method are multiplied.

  Args:
    given: The texts.
    methods: That are tried.
    num_trials: Most trials of a method.

  Returns:
    The trials of each method that has a grid.

  Raises:
    ValueError: If a text is not of this form or empty, a method is not tried,
      an argument or value is wrong, or there are more trials than `num_trials`.
  """
  grids: dict[str, dict[str, list[Any]]] = {}
  for text in given:
    place, is_given, values = text.partition("=")
    method, has_dot, argument = place.partition(".")
    if not (is_given and has_dot):
      raise ValueError(f"grid must be METHOD.ARGUMENT=V1,V2,..., got {text!r}")
    baselines.find(method)
    if method not in methods:
      raise ValueError(f"grid must be of a method tried, got {method!r}")
    literals = values.split(",")
    if not all(x.strip() for x in literals):
      raise ValueError(f"grid must hold values between commas, got {text!r}")
    for literal in literals:
      try:
        value = recipes.parse([f"{place}={literal.strip()}"])[method][argument]
      except ValueError as error:
        raise ValueError(f"grid: {error}") from None
      grids.setdefault(method, {}).setdefault(argument, []).append(value)
  trials = {}
  for method, grid in grids.items():
    products = itertools.product(*grid.values())
    all_of = [
      Trial.of(method, dict(zip(grid, x, strict=True))) for x in products
    ]
    trials[method] = list(dict.fromkeys(all_of))
    if len(trials[method]) > num_trials:
      raise ValueError(
        f"grid must make at most the {num_trials} trials that each method has,"
        f" got {len(trials[method])} of {method}"
      )
  return trials


def check_budget(
  rows: Sequence[Row], trials: Sequence[Trial], num_trials: int
) -> None:
  """Raises ValueError if a method had, with these, more trials than others.

  Args:
    rows: What is in the table.
    trials: What is to be there.
    num_trials: Most trials of a method.
  """
  for method in dict.fromkeys(x.method for x in trials):
    both = {*(row.trial for row in rows), *trials}
    count = sum(x.method == method for x in both)
    if count > num_trials:
      raise ValueError(
        f"trials must be at least the {count} that {method} has in the table,"
        f" with those to run, got {num_trials}"
      )


def read(path: pathlib.Path, job: str) -> list[Row]:
  """Reads a table; empty where there is none.

  Args:
    path: The file.
    job: What the rows are to be measured on.

  Raises:
    ValueError: If the file is no such table, or of another job.
  """
  if not path.exists():
    return []
  names, lines = files.read_csv(path)
  if tuple(names) != _COLUMNS:
    raise ValueError(f"table must have the columns {_COLUMNS}, got {path}")
  try:
    rows = [_row(line) for line in lines]
  except ValueError as error:
    raise ValueError(f"table must hold numbers, got {path}: {error}") from None
  others = [row.job for row in rows if row.job != job]
  if others:
    raise ValueError(
      f"table must be of this job, {job}, got {path} of {others[0]}: the"
      " images, the model, the request, the seed or the references are others"
    )
  return rows


def _row(line: Mapping[str, str]) -> Row:
  return Row(
    Trial.of(line["method"], json.loads(line["settings"])),
    int(line["seed"]),
    int(line["budget"]),
    line["job"],
    line["status"],
    {name: float(line[name]) for name in FIGURES if line[name]},
  )


def to_csv(rows: Sequence[Row]) -> str:
  """Returns the table as text, with a line of names."""
  table: list[Sequence[Any]] = [_COLUMNS]
  for row in rows:
    values = [row.figures.get(name) for name in FIGURES]
    texts = ["" if value is None else f"{value:.6g}" for value in values]
    table.append([*row.trial, *row[1:-1], *texts])
  return files.to_csv(table)


def score(rows: Sequence[Row]) -> float:
  """Returns how far a trial is from retraining, the smaller the better.

  The mean over seeds of the larger of the two normalised distances: a method
  that keeps the retained classes by forgetting nothing gains nothing by it.

  Args:
    rows: All seeds of a trial.

  Returns:
    1 for what is as near as another retraining; infinity where a seed diverged.
  """
  if any(row.status != cells.DONE for row in rows):
    return math.inf
  return float(
    np.mean(
      [
        max(row.figures["normalised_forget"], row.figures["normalised_retain"])
        for row in rows
      ]
    )
  )


def summary(rows: Sequence[Row]) -> str:
  """Returns the trial to take of each method, and then the others.

  Of the trials of which all seeds were finished, the one with the lowest
  `score` is taken; of equal ones, the first.

  Args:
    rows: The trials that were compared.
  """
  by_trial = {
    trial: [row for row in rows if row.trial == trial]
    for trial in dict.fromkeys(row.trial for row in rows)
  }
  taken, lost = [], []
  for method in dict.fromkeys(trial.method for trial in by_trial):
    trials = [x for x in by_trial if x.method == method]
    nearest = min(trials, key=lambda x: score(by_trial[x]))
    if math.isfinite(score(by_trial[nearest])):
      taken.append(nearest)
    else:
      lost.append(f"{method}: no trial to take, a seed of each diverged")
  others = [trial for trial in by_trial if trial not in taken]
  others.sort(key=lambda x: score(by_trial[x]))
  lines = ["To take:", *(_line(x, by_trial[x]) for x in taken), *lost]
  options = [option for trial in taken for option in trial.options]
  if options:
    lines.append(f"--set {' '.join(options)}")
  if others:
    lines += ["The others:", *(_line(x, by_trial[x]) for x in others)]
  return "\n".join(lines)


def _line(trial: Trial, rows: Sequence[Row]) -> str:
  num_lost = sum(row.status != cells.DONE for row in rows)
  parts = [f"{num_lost} of {len(rows)} seeds diverged"] if num_lost else []
  if not num_lost:
    parts = list(_means(rows))
  settings = ", ".join(f"{k} {x}" for k, x in trial.overrides.items())
  return f"{trial.method} ({settings or 'as it is'}): {', '.join(parts)}"


def _means(rows: Sequence[Row]) -> Iterator[str]:
  yield f"larger distance {score(rows):.3f}"
  for name in FIGURES:
    yield f"{name} {np.mean([row.figures[name] for row in rows]):.3f}"
  yield f"{len(rows)} seeds"
