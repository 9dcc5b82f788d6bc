"""`digits`: the 1,797 handwritten digits that ship with scikit-learn."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from sklearn import datasets, model_selection

from data_prep import base

IMAGE_SIZE = 32
TEST_FRACTION = 0.2
_SEED = 0
# The pixels count set points in 4x4 blocks of the scanned bitmap.
_MAX_PIXEL = 16


class PsgDigits(base.ImageBuilder):
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

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    if self.source is not None:
      raise ValueError(
        "source must not be given for 'digits', which ships with"
        f" scikit-learn, got {str(self.source)!r}"
      )
    digits = datasets.load_digits()
    train, test = model_selection.train_test_split(
      np.arange(len(digits.target)),
      test_size=TEST_FRACTION,
      stratify=digits.target,
      random_state=_SEED,
    )
    return {
      "train": self._generate_examples("train", digits, np.sort(train)),
      "test": self._generate_examples("test", digits, np.sort(test)),
    }

  def _generate_examples(
    self, split: str, digits: Any, rows: np.ndarray
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from self.records(split, _examples(split, digits, rows), len(rows))


def _examples(
  split: str, digits: Any, rows: np.ndarray
) -> Iterator[base.Example]:
  for position, row in enumerate(rows):
    pixels = np.round(digits.images[row] * (255 / _MAX_PIXEL))
    image = base.from_array(pixels.astype(np.uint8))
    yield base.Example(
      image=base.resize(image, (IMAGE_SIZE, IMAGE_SIZE)),
      label=int(digits.target[row]),
      id=f"{split}/{position:06d}",
      columns={"row": int(row)},
    )
