"""Files: written whole or not at all, and read with a line that names them."""

import contextlib
import csv
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from psg_jax import checks

# What a spreadsheet takes for a formula at the start of a cell, also behind the
# apostrophe that says otherwise.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")


@contextlib.contextmanager
def faults(
  start: str, *kinds: type[Exception], end: str = ""
) -> Iterator[None]:
  """Says in one line what is wrong with a file, whatever reading it raises.

  Args:
    start: What must be and what is, up to the reason.
    *kinds: Which errors the file can be blamed for; `OSError` if none is named.
    end: What follows the reason, such as how to go on.

  Raises:
    ValueError: `start`, the reason, and `end`.
  """
  blamed = kinds or (OSError,)
  try:
    yield
  except MemoryError:
    raise
  except blamed as error:
    raise ValueError(f"{start} {reason(error)}{end}") from error


def reason(error: Exception) -> str:
  """Returns what an error says, in one line, with its type if that says more.

  Args:
    error: Of the system, of our own, or of somebody else's library.
  """
  text = " ".join((getattr(error, "strerror", None) or str(error)).split())
  if not text:
    return type(error).__name__
  is_plain = isinstance(error, OSError | ValueError)
  return text if is_plain else f"{type(error).__name__}: {text}"


def expanded(path: str | os.PathLike[str], name: str) -> pathlib.Path:
  """Returns a path with a `~` in front replaced.

  Args:
    path: The path.
    name: Of the argument, for the message.

  Raises:
    ValueError: If there is no such home.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise ValueError(
      f"{name} must be given where there is no home, got {os.fspath(path)!r}"
    ) from error


# Writing.


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a file to write beside `path`, and moves it there when it is whole.

  Args:
    path: The file; one of before stays until then.

  Yields:
    A hidden file of the same ending, which is removed after an error.

  Raises:
    OSError: If the disk is full or read-only; it names the file.
  """
  # The number lets two processes write one file; the last of them wins.
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
  try:
    yield partial
    os.replace(partial, path)
  # What a network raises is not the file's.
  except (ConnectionError, TimeoutError):
    raise
  except OSError as error:
    text = error.strerror or str(error)
    raise OSError(error.errno, text, str(path)) from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def replace_folder(
  new: pathlib.Path, folder: pathlib.Path, old: pathlib.Path
) -> None:
  """Puts one folder in the place of another, which stays if that fails.

  Args:
    new: The folder to be put there.
    folder: The place, whether there is one or not.
    old: Where the one of before goes.
  """
  folder.parent.mkdir(exist_ok=True)
  is_replacing = folder.exists()
  if is_replacing:
    folder.rename(old)
  try:
    new.rename(folder)
  except BaseException:
    if is_replacing:
      old.rename(folder)
    raise


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file; one of before is replaced."""
  with replacing(path) as partial:
    # Names of files need not be text.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes an npz file; one of before is replaced."""
  with replacing(path) as partial:
    try:
      np.savez(partial, **arrays)
    # A zip file cannot always be closed on a disk that is full.
    except ValueError as error:
      raise OSError(f"it cannot be written: {error}") from error


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
  """Returns a table as text, in which no cell is a formula to a spreadsheet.

  Args:
    rows: Cells by row. Text that begins with what a spreadsheet would run
      (`=`, `+`, `-`, `@`, tab, new line) gets an apostrophe in front; numbers
      stay as they are.
  """
  return "".join(",".join(map(_to_cell, row)) + "\n" for row in rows)


def _to_cell(value: Any) -> str:
  text = "" if value is None else str(value)
  if isinstance(value, str) and _FORMULA.match(value):
    text = f"'{value}"
  # Python's own writer leaves a lone carriage return unquoted.
  if any(character in text for character in ',"\r\n'):
    text = '"' + text.replace('"', '""') + '"'
  return text


# Reading.


def read_text(argument: str, path: pathlib.Path) -> str:
  """Reads a text file that a person has written, without its mark.

  Args:
    argument: What the file is given as.
    path: The file.

  Raises:
    ValueError: If there is none, or it is no text; see `checks.text`.
  """
  with faults(f"{argument} must be a readable file, got {str(path)!r}:"):
    content = path.read_bytes()
  return checks.text(argument, content, str(path))


class _MissingError(KeyError, ValueError):
  """A name that a JSON file should have."""

  def __str__(self) -> str:
    return str(self.args[0])


class _Object(dict[str, Any]):
  """A JSON object that says which file it is from when a name is missing."""

  path: pathlib.Path

  def __missing__(self, name: str) -> Any:
    raise _MissingError(
      f"{self.path} must have {name!r}, got {sorted(self)!r:.200}"
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file that holds an object.

  Args:
    path: The file, written by a program.

  Returns:
    The object.

  Raises:
    ValueError: If there is none or it is damaged; also later, where a name is
      looked up that it lacks. All lines name the file.
  """

  def convert(content: dict[str, Any]) -> _Object:
    converted = _Object(content)
    converted.path = path
    return converted

  start = f"{path} must be JSON, got"
  with faults(start, OSError, ValueError, RecursionError):
    content = json.loads(path.read_text("utf-8"), object_hook=convert)
  if not isinstance(content, dict):
    raise ValueError(f"{path} must be a JSON object, got {content!r:.40}")
  return content


def read_arrays(path: pathlib.Path, *names: str) -> dict[str, np.ndarray]:
  """Reads an npz file.

  Args:
    path: The file.
    *names: Arrays that must be there.

  Raises:
    ValueError: If there is none, it is damaged or lacks an array; the line
      names the file.
  """
  # What damaged files make NumPy and zlib raise is open-ended.
  start = f"{path} must be an npz file, got"
  with faults(start, Exception), np.load(path) as stored:
    arrays = {name: stored[name] for name in stored.files}
  for name in names:
    if name not in arrays:
      raise ValueError(f"{path} must have {name!r}, got {sorted(arrays)}")
  return arrays


def read_csv(path: pathlib.Path) -> tuple[list[str], list[dict[str, str]]]:
  """Reads a table that `to_csv` wrote.

  Returns:
    The names of the columns, and the cells of each row by them.

  Raises:
    ValueError: If it is damaged; the line names the file.
  """
  start = f"{path} must be a CSV table, got"
  with (
    faults(start, OSError, ValueError, csv.Error),
    path.open(encoding="utf-8", newline="") as file,
  ):
    fields, *rows = csv.reader(file)
  for number, row in enumerate(rows, 2):
    if len(row) != len(fields):
      raise ValueError(
        f"{path} must have {len(fields)} cells a row, got {len(row)} in row"
        f" {number}"
      )
  return fields, [
    {
      name: cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell
      for name, cell in zip(fields, row, strict=True)
    }
    for row in rows
  ]


# What is in files.


def digest(content: Any, **options: Any) -> str:
  """Returns the SHA-256 of bytes, or of the JSON of anything else, as digits.

  Args:
    content: Bytes, or what JSON takes.
    **options: To `json.dumps`; they are part of what is digested.
  """
  if not isinstance(content, bytes):
    content = json.dumps(content, **options).encode()
  return hashlib.sha256(content).hexdigest()


def num_bytes(folder: pathlib.Path) -> int:
  """Returns the size of all files in a folder together."""
  return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
