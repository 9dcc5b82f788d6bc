"""How much of the forget set a retrained model still knows: the level.

Of a class that is gone it knows nothing. Of a camera, a patient or a part of a
class it is right about some images: targets have that level, and unlearning
stops at it.
"""

import math
from collections.abc import Callable

import numpy as np
import scipy.special

from psg_jax import types

# Of the interval in which `at_accuracy` looks for the factor of the odds, which
# goes so far beyond the surest image.
_HALVINGS = 60
_MOST_LOG_ODDS = 40.0


def class_counts(split: types.Split) -> tuple[np.ndarray, np.ndarray]:
  """Returns how many forget and retained images each class has, int `[K]`."""
  forgotten, retained = (
    np.bincount(
      np.asarray(part.labels, int), minlength=split.forget.num_classes
    )
    for part in split
  )
  return forgotten, retained


def prior_shift(split: types.Split) -> np.ndarray:
  """Returns what retraining changes of each class's log prior.

  Of a class of which a part is forgotten there are fewer images to train on, so
  that a retrained model names it less often. A classifier's logits are adjusted
  to other frequencies of the classes by adding the logarithms of their ratios
  (Saerens, Latinne and Decaestecker, 2002).

  Args:
    split: The forget and the retain set.

  Returns:
    float32 `[K]`, at most 0: `log(n_retain / (n_retain + n_forget))` by class,
    minus infinity for one that is gone, and 0 for one without any image. All
    are 0 where nothing is retained.
  """
  num_forget, num_retain = class_counts(split)
  if not num_retain.sum():
    return np.zeros(len(num_retain), np.float32)
  part = np.where(
    num_forget > 0, num_retain / np.maximum(num_retain + num_forget, 1), 1.0
  )
  with np.errstate(divide="ignore"):
    return np.log(part).astype(np.float32)


def at_accuracy(
  targets: np.ndarray,
  logits: np.ndarray,
  old_labels: np.ndarray,
  accuracy: float,
) -> np.ndarray:
  """Moves targets back to the original's predictions, as far as they may.

      (1 - a) p_original + a target

  with an `a` for each image by which the odds of its old class are multiplied
  by the same factor, the largest in (0, 1] for which no more than `accuracy` of
  the targets name it. What a retrained model still knows of the forget set is
  taught as well, the images of which the original is least sure change first,
  and those of which it is sure hardly do.

  Args:
    targets: float `[N, K]`, probabilities, without the old class.
    logits: float `[N, K]`, the original's at the images, best with
      `prior_shift`; minus infinity of classes that no target may name.
    old_labels: int `[N]`.
    accuracy: In [0, 1].

  Returns:
    float32 `[N, K]`; rows of which the old class may not be named are as they
    were.
  """
  rows = np.arange(len(logits))
  logits = np.asarray(logits, np.float64)
  is_gone = np.isneginf(logits[rows, old_labels])
  near = np.where(is_gone[:, None], targets, scipy.special.softmax(logits, -1))
  # In log-odds, for what is left beside a class that is all but sure.
  others = logits.copy()
  others[rows, old_labels] = -np.inf
  others = scipy.special.logsumexp(others, -1)
  is_open = ~is_gone & ~np.isneginf(others)
  odds = np.zeros(len(logits))
  odds[is_open] = (logits[rows, old_labels] - others)[is_open]

  def mixed(less: float) -> np.ndarray:
    # By which all odds of the old class are smaller, a power of e.
    part = -np.expm1(-less) * scipy.special.expit(less - odds)
    return ((1 - part) * near.T + part * targets.T).T.astype(np.float32)

  low, high = 0.0, max(float(odds.max()), 0.0) + _MOST_LOG_ODDS
  for _ in range(_HALVINGS):
    middle = (low + high) / 2
    is_old = np.argmax(mixed(middle), -1) == old_labels
    low, high = (middle, high) if is_old.mean() > accuracy else (low, middle)
  return mixed(high)


def is_reached(
  right: float,
  accuracy: float,
  num_images: int,
  *,
  is_taught: bool = True,
  before: float | None = None,
) -> bool:
  """Returns whether a model is at a level, or as near as more steps bring it.

  Where it was taught it, it is there also at a standard deviation of so many
  images above: on which side of it a model ends is chance. And a cycle that
  brought it no nearer by as much is the last.

  Args:
    right: The model's accuracy on the forget set, in [0, 1].
    accuracy: The level, in [0, 1].
    num_images: Of the forget set, positive.
    is_taught: Whether the model's targets have the level in them.
    before: Its accuracy a cycle before; None for none.
  """
  if not is_taught:
    return right <= accuracy
  deviation = math.sqrt(accuracy * (1 - accuracy) / num_images)
  is_still = before is not None and before - right <= deviation
  return right <= accuracy + deviation or is_still


def stop_fn(
  labels: np.ndarray, accuracy: float, is_taught: bool
) -> Callable[[np.ndarray, bool], bool]:
  """Returns what tells after each cycle whether it is the last.

  Args:
    labels: int `[N]`, of the forget set.
    accuracy: The level, in [0, 1].
    is_taught: As for `is_reached`.

  Returns:
    A function of a model's logits, float `[N, K]`, and of whether it is the
    original's, which was taught nothing.
  """
  before: float | None = None

  def is_last(logits: np.ndarray, is_original: bool) -> bool:
    nonlocal before
    right = float(np.mean(np.argmax(logits, -1) == labels))
    was, before = before, None if is_original else right
    return is_reached(
      *(right, accuracy, len(labels)),
      is_taught=is_taught and not is_original,
      before=was,
    )

  return is_last
