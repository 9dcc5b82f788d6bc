"""Splitting images in two, by group and by class."""

from collections.abc import Sequence

import numpy as np

TEST_FRACTION = 0.2


def choose_test(
  labels: np.ndarray,
  groups: Sequence[str | None],
  *,
  seed: int,
  test_fraction: float = TEST_FRACTION,
) -> np.ndarray:
  """Chooses the test images so that no group is on both sides.

  Groups come in random order, the larger ones first. One goes to the test set
  if that brings the number of test images of each class nearer to the wanted
  part of the images seen so far, in the sum of squares. So each class is split
  nearly as wanted, and exactly (to rounding) where images stand alone.

  Args:
    labels: int `[N]`.
    groups: One name an image; None stands alone.
    seed: Of the order.
    test_fraction: In (0, 1).

  Returns:
    bool `[N]`, whether the image is a test image.
  """
  members: dict[object, list[int]] = {}
  for row, group in enumerate(groups):
    members.setdefault((row,) if group is None else group, []).append(row)
  units = [np.asarray(rows) for rows in members.values()]
  order = np.random.default_rng(seed).permutation(len(units))
  sizes = np.asarray([len(units[index]) for index in order])
  num_classes = int(labels.max()) + 1
  seen, taken = np.zeros(num_classes), np.zeros(num_classes)
  is_test = np.zeros(len(labels), bool)
  for index in order[np.argsort(-sizes, kind="stable")]:
    counts = np.bincount(labels[units[index]], minlength=num_classes)
    seen += counts
    missing = test_fraction * seen - taken
    if np.sum((missing - counts) ** 2) < np.sum(missing**2):
      taken += counts
      is_test[units[index]] = True
  return is_test
