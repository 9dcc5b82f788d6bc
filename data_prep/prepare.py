"""Prepares a data set for `psg_jax.data.load`.

    python -m data_prep.prepare digits
    python -m data_prep.prepare fashion_mnist            # about 20 seconds
    python -m data_prep.prepare cifar10 --source cifar10-jpeg.zip

Raw files are downloaded where the network allows; else the message says which
file to put where. Prepared sets go to `--data_dir`, else to the folder of the
environment variable PSG_JAX_DATA, else to ~/.cache/psg_jax.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Annotated

import tyro

from data_prep import base


@dataclasses.dataclass(frozen=True)
class Options:
  """Prepares a data set for training and unlearning.

  Attributes:
    name: The data set: digits, fashion_mnist or cifar10.
    source: Raw file or folder; looked for or downloaded where not given.
    data_dir: Folder of all prepared sets; the environment variable
      PSG_JAX_DATA, or else ~/.cache/psg_jax, where not given.
    overwrite: Redo a set that is already prepared.
  """

  name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
  source: pathlib.Path | None = None
  data_dir: pathlib.Path | None = None
  overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main() -> None:
  """Runs the program; wrong input ends it with one line and status 2."""
  options = tyro.cli(
    Options, prog="python -m data_prep.prepare", use_underscores=True
  )
  start = time.monotonic()
  try:
    prepared = base.prepare(
      options.name,
      data_dir=options.data_dir,
      source=options.source,
      is_overwriting=options.overwrite,
      is_shown=True,
    )
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from None
  except KeyboardInterrupt:
    print("interrupted: nothing was changed", file=sys.stderr)
    raise SystemExit(130) from None
  counts = ", ".join(
    f"{count:,} {split}" for split, count in prepared.num_images.items()
  )
  if prepared.is_new:
    seconds = time.monotonic() - start
    print(
      f"prepared {options.name} ({counts}) from {prepared.source} in"
      f" {seconds:.1f} s: {prepared.folder}"
    )
  else:
    print(
      f"{options.name} ({counts}) is already prepared from {prepared.source}:"
      f" {prepared.folder}; --overwrite redoes it"
    )


if __name__ == "__main__":
  main()
