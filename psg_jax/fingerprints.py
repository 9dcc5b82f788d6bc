"""Fingerprints of images: what tells copies of them without the images."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import scipy.fft
import scipy.sparse
import scipy.sparse.csgraph
from PIL import Image

from psg_jax import types

READ_SIZE = 256
"""Images that are read at a time."""
HASH_SIZE = 8
"""Bits a side of the perceptual hash."""
# The reduced image, four times as wide as the hash, as ImageHash makes it.
_GREY_SIZE = 32
_FILE_COLUMN = "sha256"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Fingerprints:
  """What is compared of the images of a set; about 1.2 kB an image.

  Attributes:
    ids: The ids of the data set, `[N]`.
    pixels: SHA-256 of shape and pixels in hexadecimal, `S64` `[N]`.
    files: SHA-256 of the files, `S64` `[N]`, empty where unknown.
    hashes: Perceptual hashes, uint64 `[N]`.
    greys: Reduced grey images, uint8 `[N, 32, 32]`.
  """

  ids: np.ndarray
  pixels: np.ndarray
  files: np.ndarray
  hashes: np.ndarray
  greys: np.ndarray

  def __len__(self) -> int:
    return len(self.ids)

  def __add__(self, other: "Fingerprints") -> "Fingerprints":
    return Fingerprints(
      **{
        name: np.concatenate([values, getattr(other, name)])
        for name, values in vars(self).items()
      }
    )

  def take(self, rows: np.ndarray) -> "Fingerprints":
    """Returns those of these rows (integer indices or a bool mask)."""
    return Fingerprints(**{x: y[rows] for x, y in vars(self).items()})


def fingerprint(dataset: types.Dataset) -> Fingerprints:
  """Reads the images once, a few hundred at a time.

  The perceptual hash is `phash` of the ImageHash library bit for bit, except
  for images so plain or symmetric that its bits are rounding errors; a whole
  chunk at a time it takes half the library's time.

  Args:
    dataset: Images uint8 `[N, H, W, C]`, in memory or read on demand.

  Returns:
    The fingerprints, in the order of the images.
  """
  pixels, hashes, greys = [], [], []
  # Not `streaming.batches`: its processes would run a caller's program again
  # unless it is guarded by `if __name__ == "__main__"`.
  for start in range(0, len(dataset), READ_SIZE):
    chunk = dataset.images[start : start + READ_SIZE]
    shape = str(chunk.shape[1:]).encode()
    pixels += [
      hashlib.sha256(shape + image.tobytes()).hexdigest() for image in chunk
    ]
    greys.append(_reduce(chunk))
    hashes.append(_hash(greys[-1]))
  size = (_GREY_SIZE, _GREY_SIZE)
  return Fingerprints(
    ids=np.asarray(dataset.ids),
    pixels=np.array(pixels, "S64"),
    files=_files(dataset),
    hashes=np.concatenate([np.zeros(0, np.uint64), *hashes]),
    greys=np.concatenate([np.zeros((0, *size), np.uint8), *greys]),
  )


def _reduce(images: np.ndarray) -> np.ndarray:
  """Makes grey images of 32 x 32, uint8, as ImageHash does before its hash."""
  num_channels = images.shape[-1]
  if num_channels not in (1, 3):
    images = images.mean(axis=-1, keepdims=True).round().astype(np.uint8)
  if images.shape[-1] == 1:
    images = images[..., 0]
  size = (_GREY_SIZE, _GREY_SIZE)
  return np.stack(
    [
      np.asarray(
        Image.fromarray(image)
        .convert("L")
        .resize(size, Image.Resampling.LANCZOS)
      )
      for image in np.ascontiguousarray(images)
    ]
  )


def _hash(greys: np.ndarray) -> np.ndarray:
  """Whether each low frequency is above their median, as 64 bits."""
  waves = scipy.fft.dct(greys.astype(np.float64), axis=1)[:, :HASH_SIZE]
  waves = scipy.fft.dct(waves, axis=2)[:, :, :HASH_SIZE]
  waves = waves.reshape(len(greys), -1)
  median = np.median(waves, axis=1, keepdims=True)
  # What is equal must not differ by rounding: a plain image has but one wave.
  bits = np.packbits(waves - median > 1e-6, axis=1)
  return bits.view(">u8")[:, 0].astype(np.uint64)


def _files(dataset: types.Dataset) -> np.ndarray:
  table = dataset.metadata
  if table is None or _FILE_COLUMN not in table.column_names:
    return np.zeros(len(dataset), "S64")
  values = table.column(_FILE_COLUMN).to_pylist()
  return np.array([(value or "").lower() for value in values], "S64")


def contents(prints: Sequence[Fingerprints]) -> list[np.ndarray]:
  """Numbers what images show: equal in exact twins, across all sets.

  Args:
    prints: Those of each set.

  Returns:
    A number an image for each set, int `[N]`.
  """
  pixels = np.concatenate([part.pixels for part in prints])
  files = np.concatenate([part.files for part in prints])
  _, codes = np.unique(pixels, return_inverse=True)
  if (files != b"").any():
    # Equal pixels of one pair and equal files of the next join all three.
    _, file_codes = np.unique(files, return_inverse=True)
    num_pixels, known = codes.max() + 1, files != b""
    nodes = (codes[known], num_pixels + file_codes[known])
    size = num_pixels + file_codes.max() + 1
    graph = scipy.sparse.coo_matrix(
      (np.ones(len(nodes[0]), bool), nodes), shape=(size, size)
    )
    _, joined = scipy.sparse.csgraph.connected_components(graph, directed=False)
    codes = joined[codes]
  ends = np.cumsum([len(part) for part in prints])
  return np.split(codes, ends[:-1])
