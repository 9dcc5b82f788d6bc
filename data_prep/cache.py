"""Lists the prepared sets, which hold copies of images, and removes them.

python -m data_prep.cache
python -m data_prep.cache --remove own_scans_0a1b2c3d4e
"""

import argparse
import json
import pathlib
import shutil
from collections.abc import Sequence

from data_prep import naming, registry
from psg_jax import checks, data, programs


def main() -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.cache", description=__doc__.partition("\n")[0]
  )
  parser.add_argument("--data_dir", help="folder of all prepared sets")
  parser.add_argument(
    "--remove", nargs="+", default=[], metavar="NAME", help="sets to remove"
  )
  options = parser.parse_args(programs.arguments())
  root = data.root_dir(options.data_dir)
  if options.remove:
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
  sets = {
    naming.from_key(folder.name.removeprefix("psg_")): folder
    for folder in sorted(root.glob("psg_*"))
  }
  unfinished = {
    folder.name: folder
    for name in (*registry.MODULES, "removed")
    for folder in sorted(root.glob(f".{name}-*"))
  }
  return {**sets, **unfinished}


def remove(root: pathlib.Path, names: Sequence[str]) -> None:
  """Removes sets; each goes whole.

  Args:
    root: Folder of all prepared sets.
    names: Of `find`.

  Raises:
    ValueError: If there is no such set; nothing is removed then.
  """
  found = find(root)
  for name in names:
    checks.one_of("remove", name, found)
  for name in dict.fromkeys(names):
    # Half of a set must not be taken for one.
    moved = root / f".removed-{found[name].name.lstrip('.')}"
    if found[name] != moved:
      shutil.rmtree(moved, ignore_errors=True)
      found[name].rename(moved)
    shutil.rmtree(moved)


def table(root: pathlib.Path) -> str:
  """Returns name, size and source of each set as text."""
  lines = []
  total = 0
  for name, folder in find(root).items():
    size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    total += size
    lines.append(f"{name:40} {size / 1e6:10,.1f} MB  {_source(folder)}")
  return "\n".join(
    [*lines, f"{len(lines)} sets, {total / 1e6:,.1f} MB: {root}"]
  )


def _source(folder: pathlib.Path) -> str:
  for path in sorted(folder.glob("*/metadata.json")):
    try:
      return str(json.loads(path.read_bytes())["source"])
    except (OSError, ValueError, TypeError, KeyError):
      continue
  return "not a finished set"


if __name__ == "__main__":
  programs.run(main)
