"""Lists the prepared sets, which hold copies of images, and removes them.

python -m data_prep.cache
python -m data_prep.cache --remove own_scans_0a1b2c3d4e
"""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Sequence

import tyro

from psg_jax import catalog, checks, files, programs


@dataclasses.dataclass(frozen=True)
class Options:
  """Lists the prepared sets, and removes some.

  Attributes:
    data_dir: Folder of all prepared sets; the environment variable
      PSG_JAX_DATA, or else ~/.cache/psg_jax, where not given.
    remove: Names of sets to remove, as they are listed.
  """

  data_dir: pathlib.Path | None = None
  remove: tuple[str, ...] = ()


def main() -> None:
  """Runs the program."""
  options = tyro.cli(
    Options,
    prog=programs.command(),
    args=programs.arguments(),
    use_underscores=True,
  )
  root = catalog.root_dir(options.data_dir)
  remove(root, options.remove)
  print(table(root))


def find(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Finds what is kept in the folder of all prepared sets.

  Args:
    root: The folder.

  Returns:
    Folders by name: those of sets, then those that a preparation left which
    was killed, or has not ended.
  """
  unfinished = {
    folder.name: folder
    for name in (*catalog.BUILDERS, "removed")
    for folder in sorted(root.glob(f".{name}-*"))
  }
  return {**catalog.set_dirs(root), **unfinished}


def remove(root: pathlib.Path, names: Sequence[str]) -> None:
  """Removes sets; each goes whole.

  Args:
    root: Folder of all prepared sets.
    names: Of `find`.

  Raises:
    ValueError: If there is no such set; nothing is removed then.
  """
  folders = find(root)
  for name in names:
    checks.one_of("remove", name, folders)
  for name in dict.fromkeys(names):
    # Half of a set must not be taken for one.
    moved = root / f".removed-{folders[name].name.lstrip('.')}"
    if folders[name] != moved:
      shutil.rmtree(moved, ignore_errors=True)
      folders[name].rename(moved)
    shutil.rmtree(moved)


def table(root: pathlib.Path) -> str:
  """Returns name, size and source of each set as text."""
  lines = []
  total = 0
  for name, folder in find(root).items():
    size = files.num_bytes(folder)
    total += size
    lines.append(f"{name:40} {size / 1e6:10,.1f} MB  {_source(folder)}")
  return "\n".join(
    [*lines, f"{len(lines)} sets, {total / 1e6:,.1f} MB: {root}"]
  )


def _source(folder: pathlib.Path) -> str:
  for path in sorted(folder.glob("*/metadata.json")):
    with contextlib.suppress(ValueError):
      return str(files.read_json(path)["source"])
  return "not a finished set"


if __name__ == "__main__":
  programs.run(main)
