"""Reading prepared data sets into memory.

`python -m data_prep.prepare NAME` writes a set once as a TFDS folder
(array_record files of PNG images); here it becomes a `types.Dataset`. Sets
live in `<data_dir>/psg_<name>/<version>/`, where `data_dir` is the argument,
else the environment variable `PSG_JAX_DATA`, else `~/.cache/psg_jax`.
"""

import io
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from PIL import PngImagePlugin

from psg_jax import checks, types

SPLITS = ("train", "test")
DATA_DIR_VARIABLE = "PSG_JAX_DATA"
# Without it, `cifar10` here and TFDS's own would share a folder.
_PREFIX = "psg_"
_READ_SIZE = 2048
# Few enough images that the squares stay in the cache.
_STATISTICS_SIZE = 64


def names() -> tuple[str, ...]:
  """Returns the names of the data sets that `load` and `prepare` know."""
  from data_prep import registry

  return tuple(registry.MODULES)


def root_dir(
  data_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
  """Returns the folder of all prepared sets.

  Args:
    data_dir: The folder; None for that of the environment variable
      `PSG_JAX_DATA`, or else `~/.cache/psg_jax`.

  Returns:
    Its absolute path, whether it exists or not.
  """
  if data_dir is None:
    data_dir = os.environ.get(DATA_DIR_VARIABLE) or "~/.cache/psg_jax"
  return pathlib.Path(data_dir).expanduser().resolve()


def set_dir(
  name: str, data_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Returns the folder that holds every version of a prepared set."""
  return root_dir(data_dir) / f"{_PREFIX}{name}"


def is_prepared(version_dir: pathlib.Path) -> bool:
  """Whether this folder of one version holds a prepared set."""
  files = ("dataset_info.json", "features.json")
  return all((version_dir / name).is_file() for name in files)


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
) -> types.Dataset:
  """Reads one split of a prepared data set into memory.

  Sets that need no file (`digits`) prepare themselves on first use. Rows stand
  in the order in which they were written, the same on every machine.

  Args:
    name: One of `names()`.
    split: `"train"` or `"test"`.
    data_dir: Where the sets were prepared; see `root_dir`.

  Returns:
    The images, uint8 `[N, H, W, C]`, with labels and metadata: the columns
    `"id"`, `"label"` (the class's name) and what the set's builder knows. Text
    that was left empty is null.

  Raises:
    ValueError: If `name` or `split` is unknown, `data_dir` is no folder, or
      the set is not prepared there or damaged.
  """
  checks.one_of("name", name, names())
  checks.one_of("split", split, SPLITS)
  version_dir = _find_version(name, data_dir)
  builder = tfds.builder_from_directory(version_dir)
  shards = builder.info.splits[split].filepaths
  missing = [path.name for path in shards if not path.exists()]
  if missing:
    raise ValueError(
      f"data_dir holds a damaged {name!r}: {missing[0]} is missing in"
      f" {version_dir}; run: {_command(name, data_dir)} --overwrite"
    )
  return _read(builder, split)


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
  rows = images.reshape(len(images), -1)
  total = np.zeros(rows.shape[1], np.int64)
  total_squares = np.zeros(rows.shape[1], np.int64)
  for start in range(0, len(rows), _STATISTICS_SIZE):
    part = rows[start : start + _STATISTICS_SIZE]
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


def _find_version(
  name: str, data_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
  """Returns the newest prepared version, preparing an embedded set first."""
  from data_prep import registry

  root = root_dir(data_dir)
  folder = set_dir(name, data_dir)
  versions = [path for path in folder.glob("*.*.*") if is_prepared(path)]
  if versions:
    return max(versions, key=lambda path: tfds.core.Version(path.name))
  if name in registry.EMBEDDED:
    from data_prep import base

    return base.prepare(name, data_dir=data_dir).folder
  if not root.is_dir():
    raise ValueError(
      f"data_dir must be a folder of prepared sets, got {str(root)!r}, which"
      f" {'is a file' if root.exists() else 'does not exist'}; to make it,"
      f" run: {_command(name, data_dir)}"
    )
  raise ValueError(
    f"name must be a set prepared in data_dir {str(root)!r}, got {name!r};"
    f" run: {_command(name, data_dir)}"
  )


def _command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
  place = "" if data_dir is None else f" --data_dir {os.fspath(data_dir)}"
  return f"python -m data_prep.prepare {name}{place}"


def _read(builder: tfds.core.DatasetBuilder, split: str) -> types.Dataset:
  """Reads a split, a part of the records at a time."""
  features = builder.info.features
  source = builder.as_data_source(
    split, decoders={"image": tfds.decode.SkipDecoding()}
  )
  images = np.empty((len(source), *features["image"].shape), np.uint8)
  columns: dict[str, list[Any]] = {
    key: [] for key in features if key != "image"
  }
  for start in range(0, len(source), _READ_SIZE):
    rows = range(start, min(start + _READ_SIZE, len(source)))
    records = source.__getitems__(list(rows))
    for row, record in zip(rows, records, strict=True):
      images[row] = _decode(record["image"]).reshape(images.shape[1:])
      for key, values in columns.items():
        values.append(record[key])
  class_names = tuple(features["label"].names)
  labels = np.asarray(columns.pop("label"), np.int32)
  ids = _column(columns.pop("id"))
  table = {
    "id": ids,
    "label": pa.array([class_names[label] for label in labels], pa.string()),
    **{key: _column(values) for key, values in columns.items()},
  }
  return types.Dataset(
    images=images,
    labels=labels,
    class_names=class_names,
    ids=np.asarray(ids.to_pylist()),
    metadata=pa.table(table),
  )


def _decode(content: bytes) -> np.ndarray:
  """Reads the pixels of a PNG file."""
  # The class itself, since Image.open asks each format in turn.
  with PngImagePlugin.PngImageFile(io.BytesIO(content)) as image:
    return np.asarray(image)


def _column(values: Sequence[Any]) -> pa.Array:
  """Makes a column of text (empty as null) or of numbers."""
  if isinstance(values[0], bytes):
    return pa.array([value.decode() or None for value in values], pa.string())
  return pa.array(np.asarray(values))
