"""`digits`: the 1,797 handwritten digits that ship with scikit-learn."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from sklearn import datasets, model_selection

from data_prep import builder

IMAGE_SIZE = 32
TEST_FRACTION = 0.2
_SEED = 0
# The pixels count set points in 4x4 blocks of the scanned bitmap.
_MAX_PIXEL = 16


class PsgDigits(builder.ImageBuilder):
  """Resizes the 8x8 digits to 32x32 and splits them 80/20 by class.

  The split is stratified and seeded, the same on every machine. The column
  `row` is the digit's row in `sklearn.datasets.load_digits`.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    return self.image_info(
      description="Handwritten digits of 43 people, from NIST forms.",
      class_names=[str(digit) for digit in range(10)],
      image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1),
      origin="scikit-learn's load_digits",
      columns={"row": np.int64},
      homepage="https://archive.ics.uci.edu/dataset/80",
    )

  def splits(self) -> builder.Splits:
    """Splits the digits of scikit-learn."""
    self.refuse_source("ships with scikit-learn")
    digits = datasets.load_digits()
    train, test = model_selection.train_test_split(
      np.arange(len(digits.target)),
      test_size=TEST_FRACTION,
      stratify=digits.target,
      random_state=_SEED,
    )
    return {
      split: (examples(split, digits, np.sort(rows)), len(rows))
      for split, rows in (("train", train), ("test", test))
    }


def examples(
  split: str, digits: Any, rows: np.ndarray
) -> Iterator[builder.Example]:
  """Makes an example of each of these rows of scikit-learn's set."""
  for position, row in enumerate(rows):
    pixels = np.round(digits.images[row] * (255 / _MAX_PIXEL))
    yield builder.Example(
      image=builder.from_array(pixels.astype(np.uint8), IMAGE_SIZE),
      label=int(digits.target[row]),
      id=f"{split}/{position:06d}",
      columns={"row": int(row)},
    )
