"""How much of the forget set a retrained model still knows: the level.

Of a class that is gone it knows nothing. Of a camera, a patient or a part of a
class it is right about some images: targets have that level, and unlearning
stops at it.
"""

import math

import numpy as np
import scipy.special

from psg_jax import types

# Of the interval in which `at_accuracy` looks for the factor of the odds.
_HALVINGS = 40
_MOST_LOG_ODDS = 700.0


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
  num_classes = split.forget.num_classes
  num_forget, num_retain = (
    np.bincount(np.asarray(part.labels, int), minlength=num_classes)
    for part in split
  )
  if not num_retain.sum():
    return np.zeros(num_classes, np.float32)
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
  is_gone = np.isneginf(logits[rows, old_labels])
  # In float64, for what is left beside a class that is all but sure.
  near = scipy.special.softmax(np.asarray(logits, np.float64), -1)
  near = np.where(is_gone[:, None], targets, near)
  old = near[rows, old_labels]
  near_others = near.copy()
  near_others[rows, old_labels] = 0
  others = np.maximum(near_others.sum(-1), np.finfo(float).tiny)

  def mixed(log_odds: float) -> np.ndarray:
    factor = np.exp(-log_odds)
    part = ((1 - factor) * others / (others + factor * old))[:, None]
    return ((1 - part) * near + part * targets).astype(np.float32)

  low, high = 0.0, _MOST_LOG_ODDS
  for _ in range(_HALVINGS):
    middle = (low + high) / 2
    is_old = np.argmax(mixed(middle), -1) == old_labels
    low, high = (middle, high) if is_old.mean() > accuracy else (low, middle)
  return mixed(high)


def is_reached(
  logits: np.ndarray,
  original_logits: np.ndarray,
  labels: np.ndarray,
  accuracy: float,
) -> bool:
  """Returns whether a model that was taught a level may stop.

  Where its accuracy is no more than a standard deviation of so many images
  above the level: on which side of it a model ends is chance. Nor does it go on
  where it is no less right than the original was: what it is taught, such as
  what is in doubt of random images, then costs it no accuracy.

  Args:
    logits: float `[N, K]`, the model's at the forget images.
    original_logits: float `[N, K]`, the original's.
    labels: int `[N]`.
    accuracy: The level, in [0, 1].
  """
  right, was = (
    float(np.mean(np.argmax(x, -1) == labels))
    for x in (logits, original_logits)
  )
  deviation = math.sqrt(accuracy * (1 - accuracy) / len(labels))
  return right <= accuracy + deviation or right >= was
