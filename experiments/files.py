"""Files of runs: in one hand, and holding what a run writes.

`lock` keeps other processes from what one works on. All else about files, for
programs as for the library, is in `psg_jax.files`.
"""

import atexit
import contextlib
import dataclasses
import io
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np

from psg_jax import files
from psg_jax.files import read_csv as read_csv
from psg_jax.files import replacing as replacing
from psg_jax.files import save_arrays as save_arrays
from psg_jax.files import to_csv as to_csv
from psg_jax.files import write_text as write_text

try:
  import fcntl
except ImportError:  # Not on Windows, where nothing is locked.
  fcntl = None  # type: ignore[assignment]

MODELS = ("original", "retrained", "unlearned")
# What files of a run hold by name, as far as others rely on it; a name with a
# dot stands after that before the dot.
_KINDS: dict[str, dict[str, type]] = {
  "config.json": {"job": dict, "job.training": dict, "job.unlearning": dict},
  "history.json": dict.fromkeys(MODELS, list),
  "data.json": {
    **{"class_names": list, "counts": dict, "request": dict},
    **{"preview": dict, "source": dict, "images": dict},
  },
  "metrics.json": {
    name: dict for model in MODELS for name in (model, f"{model}.accuracy")
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


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file of a run; see `psg_jax.files.read_json`.

  Raises:
    ValueError: Also if it holds what no run writes.
  """
  _check_there(path)
  content = files.read_json(path)
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
  """Reads an npz file of a run; see `psg_jax.files.read_arrays`."""
  _check_there(path)
  return files.read_arrays(path, *names)


def _check_there(path: pathlib.Path) -> None:
  if not path.exists():
    raise ValueError(f"run must be complete, got no {path}")
