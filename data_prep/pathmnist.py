"""`pathmnist`: 97,176 patches of colorectal tissue of nine kinds, MedMNIST v2.

From MedMNIST's `pathmnist.npz`, at 28 pixels a side or another of its sizes
(`pathmnist_64.npz`), named by `--source`. Its archives carry no patient ids:
which patches are of one person cannot be told, and no request by patient can
be made.

References:
  J. Yang et al. MedMNIST v2: a large-scale lightweight benchmark for 2D and 3D
  biomedical image classification. 2023.
"""

import zipfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from data_prep import builder
from psg_jax import files

CLASS_NAMES = (
  *("adipose", "background", "debris", "lymphocytes", "mucus"),
  *("smooth_muscle", "normal_colon_mucosa", "cancer_associated_stroma"),
  "colorectal_adenocarcinoma_epithelium",
)
IMAGE_SIZE = 32
_SPLITS = ("train", "test")


class PsgPathmnist(builder.ImageBuilder):
  """Resizes to 32x32, as the paper's networks take them.

  The archive's validation part is left out, as there.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    return self.image_info(
      description="Patches of colorectal tissue of nine kinds.",
      class_names=CLASS_NAMES,
      image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
      origin=str(self.source or "pathmnist.npz"),
      homepage="https://medmnist.com",
      license="CC BY 4.0",
    )

  def splits(self) -> builder.Splits:
    """Reads the archive."""
    start = f"source must be MedMNIST's pathmnist.npz, got {str(self.source)!r}"
    faults = (
      *(OSError, ValueError, KeyError, EOFError, TypeError, AttributeError),
      zipfile.BadZipFile,
    )
    # A single array, or pickles, are refused.
    with (
      files.faults(f"{start}, which cannot be read:", *faults),
      np.load(str(self.source), allow_pickle=False) as stored,
    ):
      arrays = {
        f"{split}_{what}": stored[f"{split}_{what}"]
        for split in _SPLITS
        for what in ("images", "labels")
      }
    for split in _SPLITS:
      images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
      _check(images, labels, f"{start}, whose {split} part has")
    return {
      split: (
        _examples(
          split, arrays[f"{split}_images"], arrays[f"{split}_labels"].ravel()
        ),
        len(arrays[f"{split}_images"]),
      )
      for split in _SPLITS
    }


def _check(images: np.ndarray, labels: np.ndarray, start: str) -> None:
  """Raises ValueError unless these are pictures, and a class for each."""
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"{start} images {images.dtype} {list(images.shape)}")
  is_integer = np.issubdtype(labels.dtype, np.integer)
  if not is_integer or labels.size != len(images) or not len(images):
    raise ValueError(
      f"{start} {len(images)} images and labels {labels.dtype}"
      f" {list(labels.shape)}"
    )
  if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
    raise ValueError(
      f"{start} labels from {labels.min()} to {labels.max()}, not 0 to"
      f" {len(CLASS_NAMES) - 1}"
    )


def _examples(
  split: str, images: np.ndarray, labels: np.ndarray
) -> Iterator[builder.Example]:
  for row, (image, label) in enumerate(zip(images, labels, strict=True)):
    yield builder.Example(
      image=builder.from_array(image, IMAGE_SIZE),
      label=int(label),
      id=f"{split}/{row:06d}",
    )
