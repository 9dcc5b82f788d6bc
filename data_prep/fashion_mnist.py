"""`fashion_mnist`: 70,000 pictures of clothes, from four idx files.

The files are looked for in `--source`, where Debian's package
`dataset-fashion-mnist` puts them, and in the download folder; else they are
downloaded from the official site.

References:
  H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a novel image dataset for
  benchmarking machine learning algorithms. 2017.
"""

import gzip
import math
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from data_prep import builder, sources
from psg_jax import files

CLASS_NAMES = (
  *("t_shirt_top", "trouser", "pullover", "dress", "coat"),
  *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
)
IMAGE_SIZE = 32
DEBIAN_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# Of the official files; Debian's are compressed anew.
SHA256 = {
  "train-images-idx3-ubyte.gz": (
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
  ),
  "train-labels-idx1-ubyte.gz": (
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
  ),
  "t10k-images-idx3-ubyte.gz": (
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
  ),
  "t10k-labels-idx1-ubyte.gz": (
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
  ),
}
_PREFIXES = {"train": "train", "test": "t10k"}
# idx magic numbers: unsigned bytes (8) in three and in one dimension.
_IMAGES_MAGIC = 0x00000803
_LABELS_MAGIC = 0x00000801


class PsgFashionMnist(builder.ImageBuilder):
  """Resizes the 28x28 images to 32x32 with Pillow's bilinear filter."""

  def _info(self) -> tfds.core.DatasetInfo:
    return self.image_info(
      description="Grey pictures of ten kinds of clothes.",
      class_names=CLASS_NAMES,
      image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1),
      origin=str(self.source or "the four official idx files"),
      homepage="https://github.com/zalandoresearch/fashion-mnist",
      license="MIT",
    )

  def splits(self) -> builder.Splits:
    """Reads the four files."""
    paths = self.find_files()
    return {split: _read_split(split, paths) for split in _PREFIXES}

  @classmethod
  def has_files(cls, download_dir: pathlib.Path) -> bool:
    """Whether all four are in Debian's or in the download folder."""
    return _local_files(download_dir) is not None

  def find_files(self) -> dict[str, pathlib.Path]:
    """Returns the four files, which are downloaded where they are nowhere."""
    if self.source is not None:
      missing = [name for name in SHA256 if not (self.source / name).is_file()]
      if missing:
        raise ValueError(
          "source must be a folder with the four files"
          f" {', '.join(SHA256)}, got {str(self.source)!r} without"
          f" {missing[0]}"
        )
      return {name: self.source / name for name in SHA256}
    paths = _local_files(self.download_dir)
    return paths or {
      name: sources.download(
        f"{URL}/{name}",
        sha256,
        self.download_dir,
        advice="or install Debian's package dataset-fashion-mnist",
        is_shown=self.is_shown,
      )
      for name, sha256 in SHA256.items()
    }


def _read_split(
  split: str, paths: dict[str, pathlib.Path]
) -> tuple[Iterator[builder.Example], int]:
  """Reads the images and labels of a split, and holds them together."""
  images_path = paths[f"{_PREFIXES[split]}-images-idx3-ubyte.gz"]
  labels_path = paths[f"{_PREFIXES[split]}-labels-idx1-ubyte.gz"]
  images = read_idx(images_path, _IMAGES_MAGIC)
  labels = read_idx(labels_path, _LABELS_MAGIC)
  if len(images) != len(labels) or not len(images):
    raise ValueError(
      f"source must hold one label an image, got {len(images)} images in"
      f" {images_path} and {len(labels)} labels in {labels_path}"
    )
  if labels.max() >= len(CLASS_NAMES):
    raise ValueError(
      f"source must hold labels from 0 to {len(CLASS_NAMES) - 1}, got"
      f" {labels.max()} in {labels_path}"
    )
  return _examples(split, images, labels), len(labels)


def _local_files(download_dir: pathlib.Path) -> dict[str, pathlib.Path] | None:
  for folder in (DEBIAN_DIR, download_dir):
    paths = {name: folder / name for name in SHA256}
    if all(path.is_file() for path in paths.values()):
      return paths
  return None


def read_idx(path: pathlib.Path, magic: int) -> np.ndarray:
  """Reads a gzipped idx file of unsigned bytes.

  Args:
    path: The file.
    magic: The number that it must start with; its last byte is the number of
      dimensions.

  Returns:
    The array, uint8.

  Raises:
    ValueError: If the file is no gzip file, starts with another number, or is
      shorter or longer than it states.
  """
  start = f"source must hold whole gzip files, got {path}:"
  with files.faults(start, OSError, EOFError, zlib.error):
    content = gzip.decompress(path.read_bytes())
  number = int.from_bytes(content[:4], "big")
  if len(content) < 4 or number != magic:
    raise ValueError(
      f"source must hold idx files: {path} must start with the magic number"
      f" 0x{magic:08x}, got 0x{number:08x}"
    )
  offset = 4 + 4 * (magic & 0xFF)
  shape = [
    int.from_bytes(content[start : start + 4], "big")
    for start in range(4, offset, 4)
  ]
  expected = offset + math.prod(shape)
  if len(content) != expected:
    raise ValueError(
      f"source must hold whole idx files: {path} of shape {shape} must have"
      f" {expected} bytes, got {len(content)}"
    )
  return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)


def _examples(
  split: str, images: np.ndarray, labels: np.ndarray
) -> Iterator[builder.Example]:
  for row, (pixels, label) in enumerate(zip(images, labels, strict=True)):
    yield builder.Example(
      image=builder.from_array(pixels, IMAGE_SIZE),
      label=int(label),
      id=f"{split}/{row:06d}",
    )
