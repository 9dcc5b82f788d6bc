"""Metadata tables: CSV files with one row an image.

The column `file` names the image; all others are the user's, and their types
are inferred: integers, numbers (also with a decimal comma), dates and times in
ISO form, dates in one other order, true/false, text.
"""

import csv
import datetime
import difflib
import io
import pathlib
import re
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.csv

from psg_jax import catalog, checks, files

FILE_COLUMN = "file"
LABEL_COLUMN = "label"
RESERVED = ("id", "image", "sha256", "width", "height", "row")
"""Names, in any case, of what every set of images has of its own."""
_NULLS = frozenset(pyarrow.csv.ConvertOptions().null_values)
_ORDERS = {
  "day/month/year": (2, 1, 0),
  "month/day/year": (2, 0, 1),
  "year/month/day": (0, 1, 2),
}
_DATE = re.compile(
  r"(\d{1,4})([-/.])(\d{1,2})\2(\d{1,4})"
  r"(?:[ T](\d{1,2}):(\d{2})(?::(\d{2}))?)?"
)
_SHORT_DATE = re.compile(r"\d{1,2}([-/.])\d{1,2}\1\d{2}([ T].*)?")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})*")


class Table(NamedTuple):
  """A metadata table.

  Attributes:
    name: The file, for messages.
    files: Path of each row's image, with "/", relative to the source.
    types: Column -> one of `catalog.COLUMN_TYPES`; without `file`.
    texts: Column -> text of each row, None for a missing value.
    notes: What the user should know, a phrase each.
  """

  name: str
  files: tuple[str, ...]
  types: Mapping[str, pa.DataType]
  texts: Mapping[str, list[str | None]]
  notes: tuple[str, ...] = ()

  def rows(self) -> dict[str, dict[str, str | None]]:
    """Returns the columns of each file, but for its label."""
    names = [name for name in self.texts if name != LABEL_COLUMN]
    return {
      file: {name: self.texts[name][row] for name in names}
      for row, file in enumerate(self.files)
    }


def read(content: bytes, name: str, *, encoding: str | None = None) -> Table:
  """Reads a CSV file, its fields separated by comma, semicolon or tab.

  Blanks around values are no part of them; empty fields and the usual words for
  missing values (NA, NaN, null) become null; empty rows are left out, and so
  are columns without a name that are empty or, as the first, number the rows.
  Numbers that are written like names (with leading zeros, or too long for 64
  bits) stay text.

  Args:
    content: The file.
    name: Its name, for messages.
    encoding: Of the text; None for UTF-8, or UTF-16 with its mark.

  Returns:
    The table.

  Raises:
    ValueError: If the text cannot be decoded or is no table, a column's name is
      missing, double or taken, or a file is named twice, not at all, or is
      outside the source.
  """
  text = checks.text("metadata", content, name, encoding=encoding)
  rows = _read_rows(text, name)
  _check_names(rows[0], name)
  typed = _infer_types(rows, name)
  types, texts, notes = {}, {}, []
  for title, *values in zip(*rows, strict=True):
    raw = [None if value in _NULLS else value for value in values]
    kind, column, said = _read_column(title, typed[title], raw)
    types[title], texts[title] = kind, column
    notes += said
  paths = _check_files(texts.pop(FILE_COLUMN), name)
  del types[FILE_COLUMN]
  return Table(name, paths, types, texts, tuple(notes))


def same_path(path: str) -> str:
  """Returns what two names of a file have in common that look the same."""
  return unicodedata.normalize("NFC", path)


Column: TypeAlias = tuple[pa.DataType, list[str | None], list[str]]
"""Type and values of a column, and what the user should know."""


def _read_column(
  title: str, typed: pa.ChunkedArray, raw: list[str | None]
) -> Column:
  """Chooses the type of a column.

  Args:
    title: Its name.
    typed: Its values by the type that was inferred.
    raw: Their text as it is written.
  """
  texts = [text for text in raw if text is not None]
  if not _is_kept_as_text(typed.type, texts):
    return typed.type, typed.cast(pa.string()).to_pylist(), []
  if title in (FILE_COLUMN, LABEL_COLUMN) or not texts:
    return pa.string(), raw, []
  return (
    _read_dates(title, raw)
    or _read_commas(title, raw)
    or (
      pa.string(),
      raw,
      [],
    )
  )


def _read_dates(title: str, raw: list[str | None]) -> Column | None:
  """Reads a column whose values are all dates of one order."""
  texts = [text for text in raw if text is not None]
  parts = [_DATE.fullmatch(text) for text in texts]
  orders = {name for name in _ORDERS if all(_date(x, name) for x in parts)}
  doubt = ""
  if all(map(_SHORT_DATE.fullmatch, texts)):
    doubt = "has years of two digits"
  elif len(orders) > 1:
    doubt = f"may be {' or '.join(sorted(orders))}"
  if doubt:
    said = "it stays text, write its dates as year-month-day"
    return pa.string(), raw, [f"{title} {doubt}, such as {texts[0]}: {said}"]
  if not orders:
    return None
  (order,) = orders
  has_times = any(x is not None and x.group(5) for x in parts)
  end = 19 if has_times else 10
  dates = [
    text and str(_date(_DATE.fullmatch(text), order))[:end] for text in raw
  ]
  said = f"{title} is read as dates, {order}, such as {texts[0]}"
  return pa.timestamp("s") if has_times else pa.date32(), dates, [said]


def _read_commas(title: str, raw: list[str | None]) -> Column | None:
  """Reads a column whose values are all numbers with a decimal comma."""
  texts = [text for text in raw if text is not None]
  is_decimal = (
    any("," in text for text in texts)
    and all(map(_DECIMAL_COMMA.fullmatch, texts))
    and not all(map(_THOUSANDS.fullmatch, texts))
  )
  if not is_decimal or any(re.match(r"[+-]?0\d", text) for text in texts):
    return None
  numbers = [text and str(float(text.replace(",", "."))) for text in raw]
  said = f"{title} is read as numbers with a decimal comma, such as {texts[0]}"
  return pa.float64(), numbers, [said]


def _date(parts: re.Match[str] | None, order: str) -> datetime.datetime | None:
  """The date and time that a text is in an order; None if it is none."""
  if parts is None:
    return None
  numbers = parts.group(1, 3, 4)
  year, month, day = (numbers[place] for place in _ORDERS[order])
  if len(year) != 4 or len(day) > 2:
    return None
  try:
    hour, minute, second = (int(x or 0) for x in parts.group(5, 6, 7))
    return datetime.datetime(
      int(year), int(month), int(day), hour, minute, second
    )
  except ValueError:
    return None


def _read_rows(text: str, name: str) -> list[list[str]]:
  """Splits a text into its header and rows, without blanks and empty rows.

  Raises:
    ValueError: If there is no header, or it has no column `file`.
  """
  said = re.match(r'"?sep=(.)"?\s*?(\r\n|\n|\r)', text, re.IGNORECASE)
  text = text[said.end() :] if said else text
  delimiters = dict.fromkeys([*(said.groups()[:1] if said else ()), *",;\t"])
  first: list[str] = []
  for delimiter in delimiters:
    start = f"metadata must be a CSV table, got {name!r}:"
    with files.faults(start, csv.Error, TypeError):
      read = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
      rows = [
        [unicodedata.normalize("NFC", x).strip() for x in y] for y in read
      ]
    rows = [row for row in rows if any(row)]
    if rows and FILE_COLUMN in map(str.casefold, rows[0]):
      return _named(rows)
    first = first or (rows[0] if rows else [])
  if not first:
    raise ValueError(f"metadata must have a header line, got {name!r} without")
  lower = {column.lower(): column for column in first}
  close = difflib.get_close_matches(FILE_COLUMN, lower, n=1, cutoff=0.5)
  hint = f", did you mean {lower[close[0]]!r}?" if close else ""
  raise ValueError(
    f"metadata must have the column {FILE_COLUMN!r} (the image's path in the"
    f" source), got the columns {', '.join(first)} in {name!r}{hint}"
  )


def _named(rows: list[list[str]]) -> list[list[str]]:
  """Leaves out columns without a name: empty ones, and a first that counts.

  Columns that are called `file` and `label`, but for case, are these.
  """
  header, *rest = rows
  left_out = set()
  for column, title in enumerate(header):
    values = [row[column] for row in rest if column < len(row)]
    numbers = [str(number) for number in range(len(rest) + 1)]
    is_index = column == 0 and values in (numbers[:-1], numbers[1:])
    if not title and (is_index or not any(values)):
      left_out.add(column)
  header = [LABEL_COLUMN if x.casefold() == LABEL_COLUMN else x for x in header]
  if FILE_COLUMN not in header:
    header = [FILE_COLUMN if x.casefold() == FILE_COLUMN else x for x in header]
  return [
    [value for column, value in enumerate(row) if column not in left_out]
    for row in (header, *rest)
  ]


def _check_names(names: list[str], name: str) -> None:
  for column in names:
    if not column:
      problem = "a column without a name"
    elif names.count(column) > 1:
      problem = f"the column {column!r} twice"
    elif column.casefold() in RESERVED:
      problem = f"the column {column!r}, which every set has of its own"
    else:
      continue
    raise ValueError(
      f"metadata must have columns of different names, got {problem} in"
      f" {name!r}: rename it"
    )


def _infer_types(rows: list[list[str]], name: str) -> pa.Table:
  """Parses the rows, and infers the types of all but two columns."""
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator="\n").writerows(rows)
  content = buffer.getvalue().encode()
  is_text = dict.fromkeys((FILE_COLUMN, LABEL_COLUMN), pa.string())
  start = f"metadata must be a CSV table, got {name!r}:"
  with files.faults(start, pa.ArrowInvalid):
    return pyarrow.csv.read_csv(
      io.BytesIO(content),
      # One block, so that types are inferred from every row.
      pyarrow.csv.ReadOptions(use_threads=False, block_size=len(content) + 1),
      pyarrow.csv.ParseOptions(newlines_in_values=True),
      pyarrow.csv.ConvertOptions(
        column_types=is_text, strings_can_be_null=True
      ),
    )


def _is_kept_as_text(kind: pa.DataType, texts: list[str]) -> bool:
  if str(kind) not in catalog.COLUMN_TYPES or kind == pa.string():
    return True
  if kind == pa.int64():
    return any(re.match(r"[+-]?0[0-9]", text) for text in texts)
  if kind == pa.float64():
    # All whole, yet no 64-bit integers: names of many digits, or with an E
    # between their digits.
    name = re.compile(r"[+-]?[0-9]+|[0-9]+[eE][0-9]+")
    return all(map(name.fullmatch, texts))
  return False


def _check_files(values: list[str | None], name: str) -> tuple[str, ...]:
  seen: set[str] = set()
  twice = []
  files = []
  for row, value in enumerate(values, start=1):
    if value is None:
      raise ValueError(
        f"metadata must name a file in every row, got none in row {row:,} of"
        f" {name!r}"
      )
    file = str(pathlib.PurePosixPath(value.strip().replace("\\", "/")))
    parts = file.split("/")
    if file.startswith("/") or ".." in parts or parts[0].endswith(":"):
      raise ValueError(
        f"metadata must name files inside the source, got {value!r} in row"
        f" {row:,} of {name!r}"
      )
    if same_path(file) in seen:
      twice.append(file)
    seen.add(same_path(file))
    files.append(file)
  if twice:
    raise ValueError(
      f"metadata must name each file once, got {checks.few(twice)} twice in"
      f" {name!r}"
    )
  if not files:
    raise ValueError(f"metadata must have rows, got none in {name!r}")
  return tuple(files)
