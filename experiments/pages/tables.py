"""What pages are made of: figures in words, cells, rows and tables."""

import datetime
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

NOT_AVAILABLE = "not available"
REFERENCE = "reference"
"""Of a model that others are compared with, in place of a figure."""
PARTS = {
  "train_forget": "forget, training",
  "test_forget": "forget, test",
  "train_retain": "retain, training",
  "test_retain": "retain, test",
}
"""The parts of the data in words."""

Show = Callable[[Any], str | None]


class Cell(NamedTuple):
  """A cell of a table.

  Attributes:
    text: What it says.
    note: What is read where a pointer rests on it.
    style: Names of CSS classes; of a head, that of the dot before it.
  """

  text: str
  note: str | None = None
  style: str = ""


class Row(NamedTuple):
  """A row: its head, its cells, and its CSS classes."""

  head: Cell
  cells: list[Cell]
  style: str = ""

  def led_by(self, value: Any) -> "Row":
    """Returns the row with one more cell before the others."""
    return self._replace(cells=[_as_cell(value), *self.cells])


class Group(NamedTuple):
  """Rows under a name, with a note beside it."""

  rows: list[Row]
  name: str = ""
  note: str = ""


class Table(NamedTuple):
  """A table: a head for each column, that of the rows first, and groups."""

  heads: list[Cell]
  groups: list[Group]


def table(heads: Iterable[Any], rows: Any) -> Table:
  """Returns a table.

  Args:
    heads: Cells, or their text; that of the rows first.
    rows: Rows, or the cells of each or their text, its head first; where there
      are several groups, by the name of each, or its name and note.
  """
  groups = []
  for key, lines in (rows if isinstance(rows, Mapping) else {"": rows}).items():
    words = (key,) if isinstance(key, str) else key
    groups.append(Group([_as_row(line) for line in lines], *words))
  return Table([_as_cell(head) for head in heads], groups)


def _as_row(value: Any) -> Row:
  if isinstance(value, Row):
    return value
  head, *cells = map(_as_cell, value)
  return Row(head, cells)


def _as_cell(value: Any) -> Cell:
  if isinstance(value, Cell):
    return value
  # Markup stays what it is.
  return Cell(value if isinstance(value, str) else str(value))


def cell(
  value: Any, show: Show = str, note: str | None = None, style: str = ""
) -> Cell:
  """Returns a figure as a cell.

  Args:
    value: The figure; None for one that is not available.
    show: Its text; None from it, too, says that it is not available.
    note: The reason, or what to know.
    style: Names of CSS classes.
  """
  text = None if value is None else show(value)
  if text is None:
    return Cell(NOT_AVAILABLE, note or None, f"{style} none".strip())
  return Cell(text, note or None, style)


class Models(NamedTuple):
  """Figures of models, each found by the names on the way to it."""

  figures: Mapping[str, Mapping[str, Any]]

  def get(self, model: str, *path: Any) -> Any:
    """Returns a figure, or None where a part of its path is missing."""
    value: Any = self.figures.get(model)
    for key in path:
      if isinstance(value, Mapping):
        value = value.get(key)
      elif isinstance(value, list) and key in range(len(value)):
        value = value[key]
      else:
        return None
    return value

  def known(self, *path: Any) -> dict[str, Any]:
    """Returns a figure by model, of those that have it."""
    values = {model: self.get(model, *path) for model in self.figures}
    return {name: value for name, value in values.items() if value is not None}

  def row(
    self,
    head: Cell | str,
    *path: Any,
    show: Show | None = None,
    instead: Mapping[str, str] | None = None,
  ) -> Row:
    """Returns a row with a figure of each model.

    Args:
      head: The name of the row.
      *path: The way to the figure.
      show: Its text, by default a percentage.
      instead: Words by model that has no figure by its nature.
    """
    cells = []
    for model in self.figures:
      if instead and model in instead:
        text = instead[model]
        style = f"{model} none" if text in ("", REFERENCE) else model
        cells.append(Cell(text, style=style))
      else:
        figure = self.get(model, *path)
        cells.append(cell(figure, show or percent, style=model))
    return Row(_as_cell(head), cells)

  def heads(self) -> dict[str, Cell]:
    """Returns the heads of the columns, by model."""
    return {x: Cell(x.capitalize(), style=x) for x in self.figures}

  def table(self, rows: Any, *heads: str) -> Table:
    """Returns rows of these models as a table, after these heads."""
    return table([*heads, *self.heads().values()], rows)


def _finite(show: Callable[[float], str]) -> Callable[[float | None], str]:
  """Says of a figure, too, that there is none, or that it is not finite."""

  @functools.wraps(show)
  def text(value: float | None) -> str:
    if value is None:
      return NOT_AVAILABLE
    return show(value) if math.isfinite(value) else "not finite"

  return text


@_finite
def percent(value: float) -> str:
  """Formats a share, one decimal."""
  return f"{100 * value:.1f}%"


@_finite
def seconds(value: float) -> str:
  """Formats a time, three digits or whole minutes and seconds."""
  if value < 9.995:
    return f"{value:.2f} s"
  if value < 99.95:
    return f"{value:.1f} s"
  minutes, rest = divmod(round(value), 60)
  if minutes < 60:
    return f"{minutes} min {rest} s"
  return f"{minutes // 60} h {minutes % 60} min"


@_finite
def number(value: float) -> str:
  """Formats a distance or a divergence, three significant digits."""
  return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


@_finite
def ratio(value: float) -> str:
  """Formats how many times something is as large, two digits."""
  return f"{value:.1f}×" if value < 9.95 else f"{value:.0f}×"


@_finite
def decimals(value: float) -> str:
  """Formats a figure with three decimals."""
  return f"{value:.3f}"


def words(value: Any) -> str:
  """Formats what may be missing."""
  return NOT_AVAILABLE if value is None else str(value)


def date(value: Any) -> str:
  """Formats a moment, to the minute."""
  try:
    moment = datetime.datetime.fromisoformat(value)
  except (TypeError, ValueError):
    return words(value)
  return moment.strftime("%Y-%m-%d %H:%M %Z").strip()


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Returns rows as lines, all columns but the outermost to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  outer = (0, len(widths) - 1)
  lines = [
    "  ".join(
      cell.ljust(width) if i in outer else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  return "\n".join(lines)
