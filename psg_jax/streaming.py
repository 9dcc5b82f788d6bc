"""Images that stay on disk and are read when a batch needs them.

`load` gives a `types.Dataset` whose images are `Images`: an array-like with the
shape, the rows and the slices of an array, and nothing of it in memory. Splits,
training, search, unlearning and evaluation take it as they take an array.

Batches come from a grain pipeline. Their rows are fixed beforehand by the
caller's seed, so that a step's number is the position in the stream: a state
restored from a checkpoint goes on with the batch that was next.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from psg_jax import checks, data, types

MIN_IMAGES_FOR_WORKERS = 2000
"""Below this, threads are done before worker processes have started."""
_NUM_THREADS = 4
_MAX_WORKERS = 8


class _Source(Protocol):
  """Where images come from: a prepared split, or an array."""

  def __len__(self) -> int: ...

  def read(self, rows: np.ndarray) -> np.ndarray:
    """Returns uint8 `[len(rows), H, W, C]`."""
    ...


@dataclasses.dataclass(frozen=True)
class InMemory:
  """Images in memory, beside others that are not."""

  images: np.ndarray

  def __len__(self) -> int:
    return len(self.images)

  def read(self, rows: np.ndarray) -> np.ndarray:
    """Reads these rows."""
    return self.images[rows]


class Images:
  """Images on disk, uint8 `[N, H, W, C]`, in any order and choice of rows.

  Attributes:
    shape: `(N, H, W, C)`.
    dtype: uint8.
    ndim: 4.
  """

  dtype = np.dtype(np.uint8)
  ndim = 4

  def __init__(
    self,
    sources: Sequence[_Source],
    rows: np.ndarray,
    shape: tuple[int, int, int],
    num_workers: int,
  ) -> None:
    """Chooses `rows` of the sources, counted through all of them."""
    self._sources = tuple(sources)
    self._rows = np.asarray(rows, np.int64)
    self._starts = np.cumsum([0, *map(len, sources)])
    self._num_workers = num_workers
    self.shape = (len(self._rows), *shape)

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def size(self) -> int:
    """Number of values."""
    return int(np.prod(self.shape))

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Reads these rows: a slice, integers, a bool mask, or one integer."""
    places = self._rows[rows]
    images = self._read(np.atleast_1d(places))
    return images if np.ndim(places) else images[0]

  def take(self, rows: np.ndarray) -> "Images":
    """Chooses rows without reading them."""
    places = self._rows[rows]
    return Images(self._sources, places, self.shape[1:], self._num_workers)

  def batches(self, schedule: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Reads batches ahead of their use.

    Args:
      schedule: The rows of each batch, int `[B]`.

    Yields:
      uint8 `[B, H, W, C]`, one for each entry.
    """
    pipeline = grain.MapDataset.source(_Batches(self, schedule))
    threads = min(_NUM_THREADS, max(1, len(schedule)))
    stream = pipeline.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    num_images = sum(map(len, schedule))
    is_worth_it = num_images >= MIN_IMAGES_FOR_WORKERS
    if self._num_workers and is_worth_it and _can_have_workers():
      if getattr(multiprocessing.current_process(), "_inheriting", False):
        # Each worker would start the script, and with it workers, again.
        raise RuntimeError(
          "reading in worker processes needs the script's own code under"
          ' `if __name__ == "__main__":`, or num_workers=0'
        )
      if not flags.FLAGS.is_parsed():
        # Grain's processes read flags, which programs with others never parse.
        flags.FLAGS.mark_as_parsed()
      stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self._num_workers, per_worker_buffer_size=2
        )
      )
    iterator = iter(stream)
    with contextlib.closing(iterator):
      for batch in iterator:
        # A copy, so that the worker's shared memory is free again.
        yield np.array(batch)

  def _read(self, rows: np.ndarray) -> np.ndarray:
    images = np.empty((len(rows), *self.shape[1:]), np.uint8)
    which = np.searchsorted(self._starts, rows, side="right") - 1
    for i, source in enumerate(self._sources):
      places = np.flatnonzero(which == i)
      if places.size:
        images[places] = source.read(rows[places] - self._starts[i])
    return images


def _can_have_workers() -> bool:
  """Whether Python can start processes here; else threads do their work.

  A daemonic process may have none, and a new one runs the script's file first,
  which one that is read from standard input lacks.
  """
  if multiprocessing.current_process().daemon:
    return False
  main = sys.modules.get("__main__")
  if getattr(main, "__spec__", None) is not None:
    return True
  file = getattr(main, "__file__", None)
  return file is None or os.path.exists(file)


class _Batches:
  """A schedule as grain's random access source."""

  def __init__(self, images: Images, schedule: Sequence[np.ndarray]) -> None:
    self._images, self._schedule = images, schedule

  def __len__(self) -> int:
    return len(self._schedule)

  def __getitem__(self, index: Any) -> np.ndarray:
    return self._images[self._schedule[int(index)]]

  def __repr__(self) -> str:
    return f"{len(self)} batches"


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  num_workers: int | None = None,
) -> types.Dataset:
  """Opens one split of a prepared data set without reading its images.

  A script that reads in worker processes must have its own code under `if
  __name__ == "__main__":`, as with all of Python's multiprocessing.

  Args:
    name: As for `data.load`.
    split: `"train"` or `"test"`.
    data_dir: As for `data.load`.
    num_workers: Processes that read and decode; 0 for threads alone, None for
      as many as there are cores, up to 8. Where there can be none, in a
      daemonic process or a script from standard input, threads read.

  Returns:
    As `data.load`; labels, ids and metadata are in memory, `images` are
    `Images`.

  Raises:
    ValueError: As `data.load`, and if `num_workers` is negative.
  """
  if num_workers is None:
    num_workers = min(os.cpu_count() or 1, _MAX_WORKERS)
  checks.integer("num_workers", num_workers, at_least=0)
  opened = data.open_set(name, split, data_dir=data_dir)
  rows = np.arange(len(opened))
  return opened.dataset(Images([opened], rows, opened.image_shape, num_workers))


def is_streamed(images: Any) -> bool:
  """Whether images are read from disk when they are asked for."""
  return isinstance(images, Images)


def batches(
  images: np.ndarray | Images, schedule: Iterable[np.ndarray]
) -> Generator[np.ndarray, None, None]:
  """Yields uint8 `[B, H, W, C]` for the rows `[B]` of each batch."""
  if isinstance(images, Images):
    yield from images.batches(list(schedule))
  else:
    for rows in schedule:
      yield images[rows]


def concatenate(
  parts: Sequence[np.ndarray | Images],
) -> np.ndarray | Images:
  """Joins images along the first axis; nothing that is on disk is read."""
  arrays = [part for part in parts if isinstance(part, np.ndarray)]
  if len(arrays) == len(parts):
    return np.concatenate(arrays)
  sources: list[_Source] = []
  rows, num_workers, start = [], 0, 0
  for part in parts:
    if not isinstance(part, Images):
      part = Images([InMemory(part)], np.arange(len(part)), part.shape[1:], 0)
    rows.append(start + part._rows)
    sources += part._sources
    start += int(part._starts[-1])
    num_workers = max(num_workers, part._num_workers)
  return Images(sources, np.concatenate(rows), parts[0].shape[1:], num_workers)
