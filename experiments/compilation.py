"""How programs compile: kept between runs, and without a fault of XLA's."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import jaxlib

# YNNPACK's fusions give wrong sums for tall matrices and crash on seven
# dimensions (tests/xla_test.py): from the first version on that has them by
# default, to the first that was tested and is right.
_FAULTY = ((0, 10, 2), (0, 12))
_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"
# Below it, reading takes as long as compiling.
_MIN_SECONDS = 0.05
_MAPPINGS = pathlib.Path("/proc/self/maps")
_MOST_MAPPINGS = pathlib.Path("/proc/sys/vm/max_map_count")


def set_up() -> None:
  """Prepares JAX; to be called where a program starts, before any array.

  What the user has set, in the environment or in JAX's configuration, stays.
  """
  avoid_faults()
  keep_programs()


def avoid_faults() -> None:
  """Switches YNNPACK's fusions off in the versions of XLA that get them wrong.

  It has an effect before JAX's first computation alone.
  """
  first, fixed = _FAULTY
  flags = os.environ.get("XLA_FLAGS", "")
  # Other versions may not know the flag, and XLA ends on unknown ones.
  if first <= jaxlib.version.__version_info__ < fixed and _FUSIONS not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_FUSIONS}=".strip()


def keep_programs() -> None:
  """Keeps compiled programs in the user's cache folder, for the next run.

  JAX names an entry by the program, its own version, XLA's flags and the CPU's
  features, so that none is loaded where it would not run. Where the folder
  cannot be written, nothing is kept.
  """
  # What JAX adds to its configuration, its types do not tell.
  config: Any = jax.config
  if config.jax_compilation_cache_dir is not None:
    return
  folder = cache_dir()
  if folder is None:
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update(
      "jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS
    )


def make_room() -> bool:
  """Forgets the compiled programs of this process where they have become many.

  JAX keeps all, each takes some of the mappings of memory that Linux gives a
  process (65,530), and without any left LLVM ends it. To be called between the
  parts of long work; what is needed again is read from the cache folder.

  Returns:
    Whether they were forgotten.
  """
  try:
    with _MAPPINGS.open() as lines:
      count = sum(1 for _ in lines)
    most = int(_MOST_MAPPINGS.read_text())
  except (OSError, ValueError):  # Not on Linux.
    return False
  are_many = count > most / 2
  if are_many:
    jax.clear_caches()
  return are_many


def cache_dir() -> pathlib.Path | None:
  """Returns the folder of compiled programs, made where it is missing.

  Returns:
    `psg_jax/xla` in `XDG_CACHE_HOME`, or else in `~/.cache`; None where there
    is no home or the folder cannot be written.
  """
  try:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(base).expanduser().resolve() / "psg_jax" / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    # Permissions do not tell of a disk that is full or read-only.
    with tempfile.TemporaryFile(dir=folder):
      return folder
  # RuntimeError: there is no home.
  except (OSError, RuntimeError):
    return None
