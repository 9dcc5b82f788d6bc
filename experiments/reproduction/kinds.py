"""What experiments are made of."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from experiments import recipes
from experiments.reproduction import measures


class Cell(NamedTuple):
  """What is computed at once, and kept when it is.

  Attributes:
    row: What tells it from the others of the experiment.
    job: The options of its models and of its unlearning.
    measure: What is measured, of `measures`.
    options: Arguments of the measure.
  """

  row: Mapping[str, Any]
  job: recipes.Job
  measure: measures.Measure
  options: Mapping[str, Any] = {}


class Drawing(NamedTuple):
  """A picture of the figures; see `pages.experiment`.

  Attributes:
    kind: `lines`, `bars`, `heat`, `scatter`, `front` or `maps`.
    x: Column of the x axis, or of the groups of bars.
    y: Figure of the y axis, or of the colour of a heat map.
    by: Column of what has one colour; of a heat map, its rows.
    title: What it shows.
  """

  kind: str
  x: str
  y: str
  by: str
  title: str


class Published(NamedTuple):
  """A figure from elsewhere.

  Attributes:
    row: Columns that name the row it belongs to.
    figure: Its name.
    value: As published.
    source: Where.
  """

  row: Mapping[str, Any]
  figure: str
  value: float
  source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """One experiment.

  Attributes:
    title: What is asked, in a line.
    source: Which part of the paper it is.
    cells: Its cells by size.
    by: Columns whose rows are told apart in the table; the others (seeds,
      classes) are averaged over.
    figures: Figures of the table.
    checked: Those of them that are compared with what is expected; times are
      not, which are the machine's.
    drawings: Its pictures.
    published: Figures from elsewhere.
    note: What to know of it.
  """

  title: str
  source: str
  cells: Callable[[str], Iterator[Cell]]
  by: tuple[str, ...]
  figures: tuple[str, ...]
  checked: tuple[str, ...]
  drawings: tuple[Drawing, ...] = ()
  published: tuple[Published, ...] = ()
  note: str = ""
