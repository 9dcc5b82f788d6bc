"""Prepares a data set for `psg_jax.data.load`.

    python -m data_prep.prepare digits
    python -m data_prep.prepare fashion_mnist            # about 20 seconds
    python -m data_prep.prepare cifar10 --source cifar10-jpeg.zip
    python -m data_prep.prepare brain_tumor_mri@64 --source brain-tumor-mri.zip
    python -m data_prep.prepare image_folder --source my.zip --name my_eyes

Raw files are downloaded where the network allows; else the message says which
file to put where. Prepared sets go to `--data_dir`, else to the folder of the
environment variable PSG_JAX_DATA, else to ~/.cache/psg_jax.
"""

import dataclasses
import os
import pathlib
import sys
import time
from typing import Annotated

import tyro

from data_prep import base
from psg_jax import programs

_UNCHANGED = ["nothing was changed"]


@dataclasses.dataclass(frozen=True)
class Options:
  """Prepares a data set for training and unlearning.

  Attributes:
    dataset: The data set: digits, phantom_digits, phantom_fundus,
      fashion_mnist, cifar10, pathmnist, svhn, brain_tumor_mri, fundus, or
      image_folder for images of your own; all but the first two and those of 32
      pixels may be followed by @SIZE.
    source: Raw file or folder; looked for or downloaded where not given.
    data_dir: Folder of all prepared sets; the environment variable
      PSG_JAX_DATA, or else ~/.cache/psg_jax, where not given.
    overwrite: Redo a set that is already prepared.
    name: What to call a set of your own.
    size: Pixels a side of the images, from 8 to 4096.
    fit: How images become square: letterbox (black bars), stretch or crop.
    metadata: CSV file with the column file (the image's path in the source) and
      any others; metadata.csv in the source where not given.
    encoding: Of that file, such as latin-1; UTF-8 or UTF-16 where not given.
    group: Column of it whose images stay on one side of the split, such as
      patient_id.
    seed: Of the split and of the order of the images.
    window: How DICOM files become grey levels: file (the window that each
      states, else the range of all), full (that range), or CENTER,WIDTH.
    skip_corrupt: Leave out images that cannot be decoded.
  """

  dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
  source: pathlib.Path | None = None
  data_dir: pathlib.Path | None = None
  overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
  name: str | None = None
  size: int | None = None
  fit: str | None = None
  metadata: pathlib.Path | None = None
  encoding: str | None = None
  group: str | None = None
  seed: int | None = None
  window: str | None = None
  skip_corrupt: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main() -> None:
  """Runs the program; wrong input ends it with one line and status 2."""
  options = tyro.cli(
    Options,
    prog=programs.command(),
    args=programs.arguments(),
    use_underscores=True,
  )
  try:
    _print(_run(options))
  except (OSError, ValueError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from None
  except KeyboardInterrupt:
    print("interrupted: nothing was changed", file=sys.stderr)
    raise SystemExit(130) from None


def _print(text: str) -> None:
  """Prints a result; raises OSError if the output is full or closed."""
  try:
    print(text, flush=True)
  except OSError as error:
    # Else Python tries again when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise OSError(f"the output cannot be written: {error.strerror}") from error


def _run(options: Options) -> str:
  """Prepares the set and says what was done."""
  start = time.monotonic()
  prepared = base.prepare(
    options.dataset,
    data_dir=options.data_dir,
    source=options.source,
    is_overwriting=options.overwrite,
    is_shown=True,
    set_name=options.name,
    size=options.size,
    fit=options.fit,
    metadata=options.metadata,
    encoding=options.encoding,
    group=options.group,
    seed=options.seed,
    window=options.window,
    is_skipping_corrupt=options.skip_corrupt,
  )
  counts = ", ".join(
    f"{count:,} {split}" for split, count in prepared.num_images.items()
  )
  notes = "".join(f"; {note}" for note in prepared.notes)
  if prepared.is_new:
    seconds = time.monotonic() - start
    return (
      f"prepared {prepared.name} ({counts}) from {prepared.source} in"
      f" {seconds:.1f} s: {prepared.folder}{notes}"
    )
  return (
    f"{prepared.name} ({counts}) is already prepared from {prepared.source}:"
    f" {prepared.folder}; --overwrite redoes it{notes}"
  )


if __name__ == "__main__":
  programs.run(main, at_end=lambda is_done: _UNCHANGED[is_done:])
