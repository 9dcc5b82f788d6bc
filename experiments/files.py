"""Files of programs: whole or not there, read with their name, in one hand.

What is written replaces its file at once; what cannot be read is said with the
file's name; `lock` keeps other processes from what one works on.
"""

import atexit
import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

try:
  import fcntl
except ImportError:  # Not on Windows, where nothing is locked.
  fcntl = None  # type: ignore[assignment]

# What a spreadsheet takes for a formula at the start of a cell, also behind the
# apostrophe that says otherwise.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_MODELS = ("original", "retrained", "unlearned")
# What files of a run hold by name, as far as others rely on it; a name with a
# dot stands after that before the dot.
_KINDS: dict[str, dict[str, type]] = {
  "config.json": {"job": dict, "job.training": dict, "job.unlearning": dict},
  "history.json": dict.fromkeys(_MODELS, list),
  "data.json": {
    **{"class_names": list, "counts": dict, "request": dict},
    **{"preview": dict, "source": dict, "images": dict},
  },
  "metrics.json": {
    name: dict for model in _MODELS for name in (model, f"{model}.accuracy")
  },
}

at_end = contextlib.ExitStack()
"""What is done when a program ends, such as letting go of its locks."""
atexit.register(at_end.close)


@dataclasses.dataclass
class Hold:
  """What this process works on, alone.

  Attributes:
    path: The file or folder.
    hint: How to go on if the program is stopped, a phrase.
    note: What to know when the program is done, a line; `""` for nothing.
  """

  path: pathlib.Path
  hint: str
  note: str = ""


held: dict[pathlib.Path, Hold] = {}
"""What this process has locked, by absolute path."""


@contextlib.contextmanager
def lock(path: pathlib.Path, *, argument: str, hint: str) -> Iterator[Hold]:
  """Keeps other processes from a file or folder, which need not exist.

  The lock is a hidden file beside it. It is the operating system's, which takes
  it back when the process ends in any way. Where the disk knows no locks,
  nothing is locked.

  Args:
    path: The file or folder.
    argument: What named it, for the message.
    hint: As in `Hold`.

  Yields:
    What is held; the same where this process holds it already.

  Raises:
    ValueError: If another process holds it.
  """
  place = path.resolve()
  if place in held:
    yield held[place]
    return
  made = [x for x in place.parents if not x.exists()]
  place.parent.mkdir(parents=True, exist_ok=True)
  name = place.with_name(f".{place.name}.lock")
  file = _locked(name, path, argument)
  held[place] = Hold(path, hint)
  try:
    yield held[place]
  finally:
    del held[place]
    with contextlib.suppress(OSError):
      name.unlink(missing_ok=True)
      # What was made for the lock alone is taken away with it.
      for folder in made:
        folder.rmdir()
    file.close()


def _locked(
  name: pathlib.Path, path: pathlib.Path, argument: str
) -> io.TextIOBase:
  while True:
    file = name.open("a+", encoding="utf-8")
    try:
      if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip() or "another process"
      file.close()
      raise ValueError(
        f"{argument} must not be in use, got {path}, which {holder} works on:"
        " wait for its end, or choose another"
      ) from None
    except OSError:
      return file
    # The one before may have removed the file after it was opened here.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), name.stat()):
        break
    file.close()
  # A full disk does not keep anybody from holding it.
  with contextlib.suppress(OSError):
    os.ftruncate(file.fileno(), 0)
    holder = f"process {os.getpid()} on {socket.gethostname()}\n"
    os.write(file.fileno(), holder.encode())
  return file


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file; one of before is replaced."""
  with _replacing(path, f"{path.suffix}.partial") as partial:
    # Names of files need not be text.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes an npz file; one of before is replaced."""
  with _replacing(path, ".partial.npz") as partial:
    np.savez(partial, **arrays)


@contextlib.contextmanager
def _replacing(path: pathlib.Path, ending: str) -> Iterator[pathlib.Path]:
  """Gives a file to write beside `path`, and moves it there.

  Raises:
    OSError: If the disk is full or read-only; it names the file.
  """
  partial = path.with_suffix(ending)
  try:
    yield partial
    os.replace(partial, path)
  # A zip file cannot always be closed on a disk that is full.
  except (OSError, ValueError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise OSError(f"{path} cannot be written: {error}") from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


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

  Raises:
    ValueError: If there is none, it is damaged, or a file of a run holds what
      no run writes; also later, where a name is looked up that it lacks. All
      lines name the file.
  """

  def convert(content: dict[str, Any]) -> _Object:
    found = _Object(content)
    found.path = path
    return found

  try:
    content = json.loads(path.read_text("utf-8"), object_hook=convert)
  except FileNotFoundError:
    raise ValueError(f"run must be complete, got no {path}") from None
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{path} must be JSON, got {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} must be a JSON object, got {content!r:.40}")
  for name, kind in _KINDS.get(path.name, {}).items():
    outer, _, last = name.rpartition(".")
    inner = content.get(outer, {}) if outer else content
    if not isinstance(inner.get(last, kind()), kind):
      raise ValueError(
        f"{path} must have a {kind.__name__} as {name!r}, got"
        f" {inner[last]!r:.40}"
      )
    is_table = path.name == "history.json"
    if is_table and not all(isinstance(x, dict) for x in inner.get(last, ())):
      raise ValueError(
        f"{path} must have objects in {name!r}, got {inner[last]!r:.40}"
      )
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
  try:
    with np.load(path) as found:
      arrays = {name: found[name] for name in found.files}
  except FileNotFoundError:
    raise ValueError(f"run must be complete, got no {path}") from None
  # What damaged files make NumPy and zlib raise is open-ended.
  except Exception as error:
    raise ValueError(f"{path} must be an npz file, got {error}") from error
  for name in names:
    if name not in arrays:
      raise ValueError(f"{path} must have {name!r}, got {sorted(arrays)}")
  return arrays


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


def read_csv(path: pathlib.Path) -> tuple[list[str], list[dict[str, str]]]:
  """Reads a table that `to_csv` wrote.

  Returns:
    The names of the columns, and the cells of each row by them.

  Raises:
    ValueError: If it is damaged; the line names the file.
  """
  try:
    with path.open(encoding="utf-8", newline="") as file:
      fields, *rows = csv.reader(file)
  except (OSError, ValueError, csv.Error) as error:
    raise ValueError(f"{path} must be a CSV table, got {error}") from error
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


def write_page(path: pathlib.Path, template: str, **values: Any) -> None:
  """Fills a template of this folder, escaping values, and writes the page.

  Args:
    path: The page.
    template: The template's file name.
    **values: What it names; all of it must be given.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  write_text(path, environment.get_template(template).render(**values))
