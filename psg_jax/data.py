"""Reading prepared data sets into memory.

`python -m data_prep.prepare NAME` writes a set once as a TFDS folder
(array_record files of PNG images); here it becomes a `types.Dataset`. Names and
folders are those of `catalog`.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from PIL import PngImagePlugin

from psg_jax import catalog, checks, files, types

names = catalog.names
root_dir = catalog.root_dir
SPLITS = catalog.SPLITS
_READ_SIZE = 2048
# Few enough images that the squares stay in the cache.
_STATISTICS_SIZE = 64


@dataclasses.dataclass(frozen=True)
class OpenSet:
  """A split of a prepared set; what is not asked for is not read.

  It may be sent to another process, which opens the files for itself.

  Attributes:
    folder: Of the set's version.
    split: `"train"` or `"test"`.
    num_images: How many there are, `N`.
    image_shape: `(H, W, C)`.
    time: Of its preparation, in nanoseconds.
  """

  folder: pathlib.Path
  split: str
  num_images: int
  image_shape: tuple[int, int, int]
  time: int

  def __len__(self) -> int:
    return self.num_images

  def read(self, rows: np.ndarray) -> np.ndarray:
    """Reads images, uint8 `[len(rows), H, W, C]`, in any order."""
    images = np.empty((len(rows), *self.image_shape), np.uint8)
    for i, record in enumerate(self._records(rows)):
      images[i] = decode_image(record["image"])
    return images

  def dataset(self, images: Any) -> types.Dataset:
    """Joins images with the labels, ids and metadata, which are read.

    Args:
      images: An array `[N, H, W, C]`, which the pixels are read into, or what
        reads them when they are asked for.

    Raises:
      ValueError: If the set is damaged.
    """
    with catalog.faults(self.folder):
      builder, _ = _open(self)
      features = builder.info.features
      columns: dict[str, list[Any]] = {x: [] for x in features if x != "image"}
      for start in range(0, self.num_images, _READ_SIZE):
        rows = np.arange(start, min(start + _READ_SIZE, self.num_images))
        for row, record in zip(rows, self._records(rows), strict=True):
          if isinstance(images, np.ndarray):
            images[row] = decode_image(record["image"])
          for name, values in columns.items():
            values.append(record[name])
      metadata = to_table(builder, columns)
    return types.Dataset(
      images=images,
      labels=np.asarray(columns["label"], np.int32),
      class_names=tuple(features["label"].names),
      ids=np.asarray(metadata["id"].to_pylist()),
      metadata=metadata,
    )

  def _records(self, rows: np.ndarray) -> Sequence[Mapping[str, Any]]:
    _, source = _open(self)
    records: Sequence[Mapping[str, Any]] = source.__getitems__(rows.tolist())
    return records


@functools.lru_cache(maxsize=8)
def _open(opened: OpenSet) -> Any:
  """Opens a split's files once a process; anew if it is prepared anew."""
  builder = tfds.builder_from_directory(opened.folder)
  decoders = {"image": tfds.decode.SkipDecoding()}
  return builder, builder.as_data_source(opened.split, decoders=decoders)


@overload
def load(
  name: str,
  split: None = None,
  *,
  data_dir: str | os.PathLike[str] | None = None,
) -> tuple[types.Dataset, types.Dataset]: ...


@overload
def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
) -> types.Dataset: ...


def load(
  name: str,
  split: str | None = None,
  *,
  data_dir: str | os.PathLike[str] | None = None,
) -> types.Dataset | tuple[types.Dataset, types.Dataset]:
  """Reads a prepared data set into memory, or one split of it.

  Sets that need no file (`digits`, `phantom_fundus`) prepare themselves on
  first use, and so does `fashion_mnist` where its files are on this machine.
  Rows stand in the order in which they were written, the same on every machine.

  Args:
    name: Of a builder, with or without a size, or of a set of the user's own.
    split: `"train"` or `"test"`; None for both.
    data_dir: Where the sets were prepared; see `root_dir`.

  Returns:
    The split, or training and test images where None is given:
    the images, uint8 `[N, H, W, C]`, with labels and metadata: the columns
    `"id"`, `"label"` (the class's name) and what the set's builder knows. Text
    that was left empty is null.

  Raises:
    ValueError: If `name` or `split` is unknown, `data_dir` is no folder, or
      the set is not prepared there or damaged.
  """
  if split is None:
    train, test = (load(name, part, data_dir=data_dir) for part in SPLITS)
    return train, test
  opened = open_set(name, split, data_dir=data_dir)
  images = np.empty((len(opened), *opened.image_shape), np.uint8)
  return opened.dataset(images)


def open_set(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
) -> OpenSet:
  """Opens a split after all checks; arguments and errors are as in `load`."""
  builder = open_builder(name, split, data_dir=data_dir)
  height, width, num_channels = builder.info.features["image"].shape
  return OpenSet(
    folder=pathlib.Path(builder.data_dir),
    split=split,
    num_images=builder.info.splits[split].num_examples,
    image_shape=(height, width, num_channels),
    time=(pathlib.Path(builder.data_dir) / catalog.INFO).stat().st_mtime_ns,
  )


def open_builder(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
) -> tfds.core.DatasetBuilder:
  """Opens a prepared data set after all checks; arguments are those of `load`.

  Returns:
    The TFDS builder, whose `as_data_source` reads the records in any order.

  Raises:
    ValueError: As `load`.
  """
  catalog.parse(name)
  checks.one_of("split", split, SPLITS)
  version_dir = _find_version(name, data_dir)
  builder = catalog.read_builder(version_dir)
  shards = builder.info.splits[split].filepaths
  missing = [path.name for path in shards if not path.exists()]
  if missing:
    raise ValueError(
      f"data_dir holds a damaged {name!r}: {missing[0]} is missing in"
      f" {version_dir}; run:"
      f" {catalog.command(name, data_dir, builder.info.metadata)} --overwrite"
    )
  return builder


def decode_image(content: bytes) -> np.ndarray:
  """Reads the pixels of a prepared image, uint8 `[H, W, C]`.

  Args:
    content: A PNG file, grey or RGB, as the builders write it.

  Returns:
    The pixels; `C` is 1 or 3.
  """
  # The class itself, since Image.open asks each format in turn.
  with PngImagePlugin.PngImageFile(io.BytesIO(content)) as image:
    pixels = np.asarray(image)
  return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def to_table(
  builder: tfds.core.DatasetBuilder, columns: Mapping[str, Sequence[Any]]
) -> pa.Table:
  """Makes the metadata table of what was read from the records.

  Args:
    builder: From `open_builder`.
    columns: Feature -> its values in the records, one a row, of all features
      but the image: class numbers in `"label"`, text as bytes.

  Returns:
    The columns `"id"`, `"label"` (the class's name), those that the builder
    makes, and those of the user's table, each in one order; with the types that
    the builder states and empty text as null.
  """
  class_names = builder.info.features["label"].names
  kinds = (builder.info.metadata or {}).get("columns", {})
  table = {
    "id": _column(columns["id"], None),
    "label": pa.array(
      [class_names[label] for label in columns["label"]], pa.string()
    ),
  }
  # TFDS keeps features in no order; those of a user's table have its own.
  for name in (*sorted(columns.keys() - kinds.keys()), *kinds):
    if name in columns and name not in table:
      table[name] = _column(columns[name], kinds.get(name))
  return pa.table(table)


def mean_and_std(
  dataset: types.Dataset,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Computes the statistics that a model standardises its input with.

  The sums are exact, and taken over a part of the pixels at a time, so that no
  float copy of the set is made.

  Args:
    dataset: The images, uint8 `[N, H, W, C]`; at least one.

  Returns:
    Mean and (population) standard deviation of each channel, `C` numbers each,
    for pixels in [0, 1].

  Raises:
    ValueError: If the set is empty.
  """
  images = dataset.images
  if not images.size:
    raise ValueError(
      f"dataset must have at least one image, got {list(images.shape)}"
    )
  num_channels = images.shape[-1]
  num_values = math.prod(images.shape[1:])
  total = np.zeros(num_values, np.int64)
  total_squares = np.zeros(num_values, np.int64)
  for start in range(0, len(images), _STATISTICS_SIZE):
    # Images on disk are read here, a part at a time.
    part = images[start : start + _STATISTICS_SIZE].reshape(-1, num_values)
    total += part.sum(axis=0, dtype=np.uint32)
    # 255² fits in 16 bits.
    squares = np.square(part, dtype=np.uint16)
    total_squares += squares.sum(axis=0, dtype=np.uint32)
  # Python's integers: the products below exceed 64 bits in large sets.
  sums = [
    by_place.reshape(-1, num_channels).sum(axis=0).tolist()
    for by_place in (total, total_squares)
  ]
  count = images.size // num_channels
  means = tuple(value / count / 255 for value in sums[0])
  stds = tuple(
    math.sqrt(count * squares - value**2) / count / 255
    for value, squares in zip(*sums, strict=True)
  )
  return means, stds


def subset(
  dataset: types.Dataset, num_images: int, seed: int | None = None
) -> types.Dataset:
  """Takes a part of a data set, in the order of the whole.

  Args:
    dataset: The whole.
    num_images: How many images, from 1 to all.
    seed: Of the random choice; None takes the first rows.

  Returns:
    The part.

  Raises:
    ValueError: If `num_images` is out of range or `seed` is negative.
  """
  checks.integer("num_images", num_images, at_least=1)
  if num_images > len(dataset):
    raise ValueError(
      f"num_images must be at most {len(dataset)}, the number of images, got"
      f" {num_images}"
    )
  if seed is None:
    return dataset.take(np.arange(num_images))
  checks.integer("seed", seed, at_least=0)
  generator = np.random.default_rng(seed)
  rows = generator.choice(len(dataset), num_images, replace=False)
  return dataset.take(np.sort(rows))


def hold_out(
  dataset: types.Dataset,
  fraction: float,
  seed: int,
  groups: np.ndarray | None = None,
) -> tuple[types.Dataset, types.Dataset]:
  """Sets images apart for validation, of each class the same share.

  Args:
    dataset: The training set.
    fraction: Share to set apart, above 0 and below 1.
    seed: Of the choice, 0 or more.
    groups: `[N]`, such as patients, that stay on one side; the shares are then
      those of all images alone, and as near as whole groups come.

  Returns:
    What is left to train on, and the validation part, both in the order of the
    whole.

  Raises:
    ValueError: If an argument is out of its range, or a part is empty.
  """
  checks.number("fraction", fraction, above=0, at_most=1)
  checks.integer("seed", seed, at_least=0)
  rng = np.random.default_rng(seed)
  is_held = np.zeros(len(dataset), bool)
  if groups is None:
    order = rng.permutation(len(dataset))
    for label in range(dataset.num_classes):
      rows = order[dataset.labels[order] == label]
      is_held[rows[: round(fraction * len(rows))]] = True
  else:
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    number = int((middles <= fraction * len(dataset)).sum())
    # One at least on either side, where there are two.
    number = max(1, min(number, len(sizes) - 1))
    is_held = np.isin(codes, order[:number])
  if is_held.all() or not is_held.any():
    raise ValueError(
      f"fraction must leave images on both sides of {len(dataset)}, got"
      f" {fraction}"
    )
  return (
    dataset.take(np.flatnonzero(~is_held)),
    dataset.take(np.flatnonzero(is_held)),
  )


def _find_version(
  name: str, data_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
  """Returns the newest prepared version, preparing it first if it can be."""
  root = catalog.root_dir(data_dir)
  versions = catalog.versions(catalog.set_dir(name, data_dir))
  if versions:
    return max(versions, key=lambda path: tfds.core.Version(path.name))
  parsed = catalog.parse(name)
  if not catalog.BUILDERS[parsed.builder].needs_source:
    folder = _prepare(name, data_dir)
    if folder is not None:
      return folder
  line = catalog.command(name, data_dir)
  if source := catalog.BUILDERS[parsed.builder].source:
    line += f", where PATH is {source}"
  if parsed.is_own:
    known = [x for x in catalog.names(root) if x != catalog.OWN_BUILDER]
    try:
      checks.one_of("name", name, known)
    except ValueError as error:
      raise ValueError(
        f"{error}; for images of your own, run: {line}"
      ) from None
  if not root.is_dir():
    raise ValueError(
      f"data_dir must be a folder of prepared sets, got {str(root)!r}, which"
      f" {'is a file' if root.exists() else 'does not exist'}; to make it,"
      f" run: {line}"
    )
  raise ValueError(
    f"name must be a set prepared in data_dir {str(root)!r}, got {name!r};"
    f" run: {line}"
  )


def _prepare(
  name: str, data_dir: str | os.PathLike[str] | None
) -> pathlib.Path | None:
  """Prepares a set if all that it is made from is on this machine.

  Raises:
    ValueError: If the package `data_prep` that Python has is not ours.
  """
  try:
    # Late: reading a set takes none of what making one does.
    from data_prep import base

    prepare = base.prepare_at_once
  except (ImportError, AttributeError) as error:
    package = sys.modules.get("data_prep")
    place = next(iter(getattr(package, "__path__", ["no folder"])))
    raise ValueError(
      f"name {name!r} needs psg_jax's package data_prep to be prepared, got the"
      f" one in {place}: {files.reason(error)}"
    ) from error
  return prepare(name, data_dir=data_dir)


def _column(values: Sequence[Any], kind: str | None) -> pa.Array:
  """Makes a column of text (empty as null), of its kind type, or numbers."""
  if len(values) and isinstance(values[0], bytes):
    text = pa.array([value.decode() or None for value in values], pa.string())
    return text if kind is None else text.cast(catalog.COLUMN_TYPES[kind])
  return pa.array(np.asarray(values))
