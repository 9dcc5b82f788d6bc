"""Metadata tables: CSV files with one row an image.

The column `file` names the image; all others are the user's, and their types
are inferred: integers, numbers, dates and times in ISO form, true/false, text.
"""

import codecs
import csv
import difflib
import io
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv

from data_prep import columns

FILE_COLUMN = "file"
LABEL_COLUMN = "label"
RESERVED = ("id", "image", "sha256", "width", "height")
"""Columns that every set of images has of its own."""
_DELIMITERS = ",;\t"
_NUM_SHOWN = 3


class Table(NamedTuple):
  """A metadata table.

  Attributes:
    name: The file, for messages.
    files: Path of each row's image, with "/", relative to the source.
    types: Column -> one of `columns.TYPES`; without `file`.
    texts: Column -> text of each row, None for a missing value.
  """

  name: str
  files: tuple[str, ...]
  types: Mapping[str, pa.DataType]
  texts: Mapping[str, list[str | None]]


def read(content: bytes, name: str, *, encoding: str | None = None) -> Table:
  """Reads a CSV file, its fields separated by comma, semicolon or tab.

  Empty fields and the usual words for missing values (NA, NaN, null) become
  null. Numbers that are written like names (with leading zeros, or too long for
  64 bits) stay text.

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
  text = _decode(content, name, encoding)
  delimiter, header = _read_header(text, name)
  names = [column.strip() for column in header]
  _check_names(names, name)
  raw = _parse(text, delimiter, header, name, is_inferring=False)
  typed = _parse(text, delimiter, header, name, is_inferring=True)
  types, texts = {}, {}
  for column, title in zip(header, names, strict=True):
    values = raw[column].combine_chunks()
    kind = typed[column].type
    if _is_kept_as_text(kind, values):
      kind = pa.string()
    else:
      values = typed[column].cast(pa.string())
    types[title], texts[title] = kind, values.to_pylist()
  files = _check_files(texts.pop(FILE_COLUMN), name)
  del types[FILE_COLUMN]
  return Table(name, files, types, texts)


def match(table: Table, paths: Iterable[str]) -> dict[str, int]:
  """Finds the row of each image.

  Args:
    table: The table.
    paths: Of all images of the source.

  Returns:
    Path -> row, of the images that have one.

  Raises:
    ValueError: If a row names a file that is not among them.
  """
  known = dict.fromkeys(paths)
  missing = [file for file in table.files if file not in known]
  if missing:
    close = difflib.get_close_matches(missing[0], known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"metadata must name images of the source, got {missing[0]!r} in"
      f" {table.name!r}, which is not there ({len(missing):,} of"
      f" {len(table.files):,} rows name such files){hint}"
    )
  return {file: row for row, file in enumerate(table.files)}


def check_labels(table: Table, classes: Mapping[str, str]) -> None:
  """Checks that a column `label` agrees with the class folders.

  Args:
    table: The table.
    classes: Path of an image -> its class.

  Raises:
    ValueError: If a row says otherwise.
  """
  wrong = [
    f"{file} ({label!r})"
    for file, label in zip(
      table.files, table.texts.get(LABEL_COLUMN, ()), strict=False
    )
    if label is not None and label != classes[file]
  ]
  if wrong:
    raise ValueError(
      f"metadata must have the class folder's name in its column 'label', got"
      f" {first(wrong)} in {table.name!r}"
    )


def first(names: list[str]) -> str:
  """Returns the first few names and how many more there are."""
  more = len(names) - _NUM_SHOWN
  shown = ", ".join(names[:_NUM_SHOWN])
  return f"{shown} and {more:,} more" if more > 0 else shown


def _decode(content: bytes, name: str, encoding: str | None) -> str:
  if encoding is not None:
    try:
      codecs.lookup(encoding)
    except LookupError:
      raise ValueError(
        f"encoding must be one that Python knows, such as latin-1, got"
        f" {encoding!r}"
      ) from None
    codec = encoding
  elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    codec = "utf-16"
  else:
    codec = "utf-8-sig"
  try:
    text = content.decode(codec)
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b"\n") + 1
    raise ValueError(
      f"metadata must be text in {encoding or 'UTF-8 or UTF-16'}, got {name!r}"
      f" with the byte 0x{content[error.start]:02x} in line {line}: name its"
      " encoding (--encoding latin-1), or convert it: iconv -f LATIN1 -t UTF-8"
    ) from None
  if "\0" in text:
    raise ValueError(
      f"metadata must be a text file (CSV), got {name!r}, which is binary, or"
      " UTF-16 without its mark (--encoding utf-16-le)"
    )
  return text


def _read_header(text: str, name: str) -> tuple[str, list[str]]:
  """Returns the delimiter, and the names as they are written."""
  headers = {}
  for delimiter in _DELIMITERS:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    headers[delimiter] = next((row for row in reader if row), [])
    if FILE_COLUMN in [column.strip() for column in headers[delimiter]]:
      return delimiter, headers[delimiter]
  names = headers[","]
  if not names:
    raise ValueError(f"metadata must have a header line, got {name!r} without")
  lower = {column.strip().lower(): column.strip() for column in names}
  close = difflib.get_close_matches(FILE_COLUMN, lower, n=1, cutoff=0.5)
  hint = f", did you mean {lower[close[0]]!r}?" if close else ""
  raise ValueError(
    f"metadata must have the column {FILE_COLUMN!r} (the image's path in the"
    f" source), got the columns {', '.join(names)} in {name!r}{hint}"
  )


def _check_names(names: list[str], name: str) -> None:
  for column in names:
    if not column:
      problem = "a column without a name"
    elif names.count(column) > 1:
      problem = f"the column {column!r} twice"
    elif column in RESERVED:
      problem = f"the column {column!r}, which every set has of its own"
    else:
      continue
    raise ValueError(
      f"metadata must have columns of different names, got {problem} in"
      f" {name!r}: rename it"
    )


def _parse(
  text: str,
  delimiter: str,
  header: list[str],
  name: str,
  *,
  is_inferring: bool,
) -> pa.Table:
  """Parses the rows as text, or infers the types of all but two columns."""
  content = text.encode()
  kept = (FILE_COLUMN, LABEL_COLUMN)
  is_text = {
    column: pa.string()
    for column in header
    if not is_inferring or column.strip() in kept
  }
  try:
    return pyarrow.csv.read_csv(
      io.BytesIO(content),
      # One block, so that types are inferred from every row.
      pyarrow.csv.ReadOptions(use_threads=False, block_size=len(content) + 1),
      pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
      pyarrow.csv.ConvertOptions(
        column_types=is_text, strings_can_be_null=True
      ),
    )
  except pa.ArrowInvalid as error:
    raise ValueError(
      f"metadata must be a CSV table, got {name!r}: {error}"
    ) from error


def _is_kept_as_text(kind: pa.DataType, values: pa.Array) -> bool:
  if str(kind) not in columns.TYPES or kind == pa.string():
    return True
  texts = [text for text in values.to_pylist() if text is not None]
  if kind == pa.int64():
    return any(re.match(r"[+-]?0[0-9]", text.strip()) for text in texts)
  if kind == pa.float64():
    # All whole, yet no 64-bit integers: names of many digits.
    return all(re.fullmatch(r"[+-]?[0-9]+", text.strip()) for text in texts)
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
    if file in seen:
      twice.append(file)
    seen.add(file)
    files.append(file)
  if twice:
    raise ValueError(
      f"metadata must name each file once, got {first(twice)} twice in {name!r}"
    )
  if not files:
    raise ValueError(f"metadata must have rows, got none in {name!r}")
  return tuple(files)
