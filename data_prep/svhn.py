"""`svhn`: 99,289 house numbers' digits in colour, cropped.

From the official `train_32x32.mat` and `test_32x32.mat`, in the folder that
`--source` names.

References:
  Y. Netzer et al. Reading digits in natural images with unsupervised feature
  learning. 2011.
"""

import pathlib
from collections.abc import Iterator

import numpy as np
import scipy.io
import tensorflow_datasets as tfds

from data_prep import builder
from psg_jax import files

IMAGE_SIZE = 32
_FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
# The digit 0 has this label.
_ZERO = 10


class PsgSvhn(builder.ImageBuilder):
  """Keeps the archive's order; the digit 0 is class 0."""

  def _info(self) -> tfds.core.DatasetInfo:
    return self.image_info(
      description="Digits of house numbers, in colour.",
      class_names=[str(digit) for digit in range(10)],
      image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
      origin=str(self.source or "the official .mat files"),
      homepage="http://ufldl.stanford.edu/housenumbers",
    )

  def splits(self) -> builder.Splits:
    """Reads the two files."""
    folder = pathlib.Path(self.source or "")
    missing = [x for x in _FILES.values() if not (folder / x).is_file()]
    if missing:
      raise ValueError(
        f"source must be a folder with {' and '.join(_FILES.values())}, got"
        f" {str(folder)!r} without {missing[0]}"
      )
    parts = {split: _read(folder / name) for split, name in _FILES.items()}
    return {
      split: (_examples(split, *arrays), len(arrays[1]))
      for split, arrays in parts.items()
    }


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns images uint8 `[N, 32, 32, 3]` and digits `[N]`."""
  start = f"source must hold SVHN's cropped digits, got {path}"
  # What damaged files make SciPy raise is open-ended.
  with files.faults(f"{start}, which cannot be read:", Exception):
    content = scipy.io.loadmat(path, variable_names=["X", "y"])
    images, labels = content["X"], content["y"].ravel()
  shape = (IMAGE_SIZE, IMAGE_SIZE, 3, len(labels))
  if images.dtype != np.uint8 or images.shape != shape or not len(labels):
    raise ValueError(
      f"{start} with images {images.dtype} {list(images.shape)} and"
      f" {len(labels)} labels"
    )
  if labels.min() < 1 or labels.max() > _ZERO:
    raise ValueError(
      f"{start} with labels from {labels.min()} to {labels.max()}, not 1 to 10"
    )
  return images.transpose(3, 0, 1, 2), labels.astype(int) % _ZERO


def _examples(
  split: str, images: np.ndarray, digits: np.ndarray
) -> Iterator[builder.Example]:
  for row, (image, digit) in enumerate(zip(images, digits, strict=True)):
    yield builder.Example(
      image=builder.from_array(np.ascontiguousarray(image)),
      label=int(digit),
      id=f"{split}/{row:06d}",
    )
