"""`phantom_digits`: the embedded digits, as four devices might have taken them.

For requests by device whose right answer differs: a model that never saw the
device that turns its pictures is lost there (the original has learnt them by
heart), one that never saw the lens that is a little out of focus hardly is.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from data_prep import builder, digits

DEVICES = ("plain", "turned", "noisy", "dim")
"""A quarter of the images each: as they are; turned by 90 degrees; with noise;
darker."""
_SEED = 0
_NOISE = 80.0
_DIMMING = 0.6


class PsgPhantomDigits(digits.PsgDigits):
  """The digits with a column `device`, drawn for each image, seeded."""

  def _info(self) -> tfds.core.DatasetInfo:
    return self.image_info(
      description="Handwritten digits, as four devices might have taken them.",
      class_names=[str(digit) for digit in range(10)],
      image_shape=(digits.IMAGE_SIZE, digits.IMAGE_SIZE, 1),
      origin="scikit-learn's load_digits",
      columns={"row": np.int64, "device": tfds.features.Text()},
      homepage="https://archive.ics.uci.edu/dataset/80",
    )

  def splits(self) -> builder.Splits:
    """Draws a device for each digit of scikit-learn."""
    return {
      split: (taken(examples), number)
      for split, (examples, number) in super().splits().items()
    }


def taken(examples: Iterable[builder.Example]) -> Iterator[builder.Example]:
  """Takes each picture anew with a device."""
  for example in examples:
    rng = np.random.default_rng([_SEED, int(example.columns["row"])])
    device = DEVICES[rng.integers(len(DEVICES))]
    yield example._replace(
      image=builder.from_array(
        seen_by(device, np.asarray(example.image), rng), digits.IMAGE_SIZE
      ),
      columns={**example.columns, "device": device},
    )


def seen_by(
  device: str, pixels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Returns the picture uint8 `[H, W]` that a device takes of another."""
  if device == "turned":
    return np.rot90(pixels).copy()
  if device == "noisy":
    noise = rng.normal(0, _NOISE, pixels.shape)
    return np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8)
  if device == "dim":
    return np.round(pixels * _DIMMING).astype(np.uint8)
  return pixels
