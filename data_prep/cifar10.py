"""`cifar10`: 60,000 colour pictures of ten kinds of things.

From the official python archive `cifar-10-python.tar.gz`, whose pickles are
read without running what they ask for, or from a folder or zip of images
`train/<class>/*`, `test/<class>/*`.

References:
  A. Krizhevsky. Learning multiple layers of features from tiny images. 2009.
"""

import io
import math
import pathlib
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_prep import builder, listing, sources, trees
from psg_jax import files

CLASS_NAMES = (
  *("airplane", "automobile", "bird", "cat", "deer"),
  *("dog", "frog", "horse", "ship", "truck"),
)
IMAGE_SIZE = 32
ARCHIVE = "cifar-10-python.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_BATCHES = {
  "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
  "test": ("test_batch",),
}
_NUM_VALUES = 3 * IMAGE_SIZE * IMAGE_SIZE
_SEED = 0

Batch = tuple[np.ndarray, list[int], list[str]]
"""Pixels uint8 `[N, 3072]`, labels and file names."""


class PsgCifar10(builder.ImageBuilder):
  """Keeps the archive's order; images by class are shuffled, with a fixed seed.

  The column `file` is the file name that CIFAR-10's authors gave (archive), or
  the path in the folder or zip.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    return self.image_info(
      description="Colour pictures of ten kinds of animals and vehicles.",
      class_names=CLASS_NAMES,
      image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
      origin=str(self.source or ARCHIVE),
      columns={"file": tfds.features.Text()},
      homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    )

  def splits(self) -> builder.Splits:
    """Reads the archive, or lists the images by class."""
    source = self.source or sources.download(
      URL, SHA256, self.download_dir, is_shown=self.is_shown
    )
    if source.is_dir() or zipfile.is_zipfile(source):
      tree = sources.open_tree(source, tuple(_BATCHES))
      pairs = {
        split: sources.labelled_images(tree, split, CLASS_NAMES)[1]
        for split in _BATCHES
      }
      return {
        split: (_tree_examples(tree, pairs[split]), len(pairs[split]))
        for split in _BATCHES
      }
    batches = read_archive(source)
    return {
      split: (
        _archive_examples(split, batches),
        sum(len(batches[name][1]) for name in names),
      )
      for split, names in _BATCHES.items()
    }


def read_archive(path: pathlib.Path) -> dict[str, Batch]:
  """Reads the official archive without unpacking it.

  Args:
    path: `cifar-10-python.tar.gz`.

  Returns:
    The six batches, by name.

  Raises:
    ValueError: If it is no tar archive, has an entry that leaves its folder,
      lacks a batch, or a batch is not as in the official one.
  """
  wanted = {name for names in _BATCHES.values() for name in names}
  batches = {}
  start = (
    f"source must be {ARCHIVE}, or a folder or zip of images by class, got"
    f" {str(path)!r}, which is damaged or no archive:"
  )
  with (
    files.faults(start, OSError, EOFError, tarfile.TarError, zlib.error),
    tarfile.open(path) as archive,
  ):
    for member in archive:
      listing.check_entry(member.name, str(path))
      name = pathlib.PurePosixPath(member.name).name
      file = archive.extractfile(member) if member.isreg() else None
      if name in wanted and file is not None:
        batches[name] = _read_batch(file.read(), name, path)
  missing = sorted(wanted - batches.keys())
  if missing:
    raise ValueError(
      f"source must be {ARCHIVE} with all its batches, got {str(path)!r}"
      f" without {missing[0]}"
    )
  return batches


class _Dtype:
  """Stands for `numpy.dtype` while unpickling: keeps the type's code."""

  def __init__(self, code: str | bytes, *unused: object) -> None:
    self.code = code.decode("latin1") if isinstance(code, bytes) else code

  def __setstate__(self, state: object) -> None:
    """Leaves out byte order and fields, which single bytes do not have."""


class _Array:
  """Stands for `numpy.ndarray` while unpickling: keeps the raw bytes."""

  pixels: np.ndarray

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    """Reads NumPy's (version, shape, dtype, is_fortran, bytes)."""
    _, shape, dtype, is_fortran, content = state
    if dtype.code != "u1" or is_fortran or math.prod(shape) != len(content):
      raise pickle.UnpicklingError("not a C-ordered array of bytes")
    self.pixels = np.frombuffer(content, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
  """Reads a batch's pickle; imports and calls nothing that it names.

  NumPy's names are answered with the inert classes above, all others refused.
  """

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in {
      ("numpy.core.multiarray", "_reconstruct"),
      ("numpy._core.multiarray", "_reconstruct"),
    }:
      return lambda *unused: _Array()
    if (module, name) == ("numpy", "ndarray"):
      return _Array
    if (module, name) == ("numpy", "dtype"):
      return _Dtype
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_batch(content: bytes, name: str, path: pathlib.Path) -> Batch:
  # A damaged pickle can raise nearly anything.
  with files.faults(
    f"source must hold CIFAR-10's pickles, got {name} in {path}, which cannot"
    " be read:",
    Exception,
  ):
    # The archive was written by Python 2, whose strings are bytes here.
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    pixels = batch[b"data"].pixels
    labels = [int(label) for label in batch[b"labels"]]
    names = [file.decode() for file in batch[b"filenames"]]
  count = len(labels)
  if not count or pixels.shape != (count, _NUM_VALUES) or len(names) != count:
    raise ValueError(
      f"source must hold {_NUM_VALUES} values, a label and a file name an"
      f" image, got {list(pixels.shape)} values, {count} labels and"
      f" {len(names)} file names in {name} of {path}"
    )
  if min(labels) < 0 or max(labels) >= len(CLASS_NAMES):
    raise ValueError(
      f"source must hold labels from 0 to {len(CLASS_NAMES) - 1}, got"
      f" {min(labels)} to {max(labels)} in {name} of {path}"
    )
  return pixels, labels, names


def _archive_examples(
  split: str, batches: Mapping[str, Batch]
) -> Iterator[builder.Example]:
  row = 0
  for name in _BATCHES[split]:
    pixels, labels, files = batches[name]
    # Channel by channel in the archive.
    images = pixels.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = images.transpose(0, 2, 3, 1)
    for image, label, file in zip(images, labels, files, strict=True):
      yield builder.Example(
        image=builder.from_array(image),
        label=label,
        id=f"{split}/{row:06d}",
        columns={"file": file},
      )
      row += 1


def _tree_examples(
  tree: trees.Tree, pairs: sources.Pairs
) -> Iterator[builder.Example]:
  # Sorted by class, the first rows would be of one class.
  for index in np.random.default_rng(_SEED).permutation(len(pairs)):
    path, label = pairs[index]
    name = f"{path} in {tree.name}"
    image = builder.decode(tree.read(path), name, mode="RGB")
    yield builder.Example(
      image=builder.resize(image, (IMAGE_SIZE, IMAGE_SIZE)),
      label=label,
      id=path,
      columns={"file": path},
    )
