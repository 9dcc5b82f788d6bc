"""Accuracies, and the distance of one model's predictions to another's.

Everything follows from logits `[N, K]` that were computed once. Where there is
nothing to average over, a figure is None and never 0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special
import sklearn.metrics


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float | None:
  """Share of images whose largest logit is their label's, in [0, 1].

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    The accuracy; None without images. On a forget class the ideal is the
    retrained model's, which is 0.

  Raises:
    ValueError: If the lengths differ.
  """
  _check(logits, labels)
  if not len(labels):
    return None
  return float(np.mean(np.argmax(logits, -1) == labels))


def per_class_accuracy(
  logits: np.ndarray, labels: np.ndarray
) -> list[float | None]:
  """Accuracy of each class, None for a class without images.

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    `K` accuracies in [0, 1].

  Raises:
    ValueError: If the lengths differ.
  """
  _check(logits, labels)
  return [
    accuracy(logits[labels == label], labels[labels == label])
    for label in range(logits.shape[1])
  ]


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Counts images by label (rows) and prediction (columns).

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.

  Returns:
    int `[K, K]`, of sum `N`.

  Raises:
    ValueError: If the lengths differ.
  """
  _check(logits, labels)
  num_classes = logits.shape[1]
  if not len(labels):
    return np.zeros((num_classes, num_classes), np.int64)
  return sklearn.metrics.confusion_matrix(
    labels, np.argmax(logits, -1), labels=np.arange(num_classes)
  )


def accuracy_by(
  logits: np.ndarray, labels: np.ndarray, values: np.ndarray
) -> dict[str, dict[str, float | int | None]]:
  """Accuracy of each group of images, such as those of a device.

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`.
    values: str `[N]`, the group of each image.

  Returns:
    For each value that occurs, sorted: `accuracy` in [0, 1] and `count`.

  Raises:
    ValueError: If the lengths differ.
  """
  _check(logits, labels)
  if len(values) != len(labels):
    raise ValueError(
      f"values must be as many as labels: got {len(values)} values for"
      f" {len(labels)} labels"
    )
  groups: dict[str, dict[str, float | int | None]] = {}
  for value in np.unique(values):
    here = values == value
    groups[str(value)] = {
      "accuracy": accuracy(logits[here], labels[here]),
      "count": int(here.sum()),
    }
  return groups


def agreement(logits: np.ndarray, reference: np.ndarray) -> float | None:
  """Share of images for which two models predict the same class, in [0, 1].

  Args:
    logits: float `[N, K]`, the model's.
    reference: float `[N, K]`, the retrained model's.

  Returns:
    The agreement, ideally 1; None without images.

  Raises:
    ValueError: If the shapes differ.
  """
  _check_pair(logits, reference)
  if not len(logits):
    return None
  return float(np.mean(np.argmax(logits, -1) == np.argmax(reference, -1)))


def kl_divergence(reference: np.ndarray, logits: np.ndarray) -> float | None:
  """Mean `KL(reference ‖ model) = Σ_k p_k (log p_k - log q_k)`, in nats.

  Args:
    reference: float `[N, K]`, the retrained model's logits (`p`).
    logits: float `[N, K]`, the model's (`q`).

  Returns:
    The divergence, 0 or more, ideally 0; None without images.

  Raises:
    ValueError: If the shapes differ.
  """
  _check_pair(logits, reference)
  if not len(logits):
    return None
  log_p = scipy.special.log_softmax(np.asarray(reference, np.float64), -1)
  log_q = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
  return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1)))


def evaluate(
  logits: Mapping[str, np.ndarray],
  labels: Mapping[str, np.ndarray],
  reference: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
  """Computes all figures of a model from its logits, one array a split.

  Args:
    logits: float `[N, K]` by split: `train_forget`, `train_retain`,
      `test_forget` and `test_retain`.
    labels: int `[N]` by split.
    reference: The retrained model's logits by split, or None.

  Returns:
    A dictionary for JSON: `accuracy` by split and for `test` as a whole,
    `per_class_accuracy` and `confusion_matrix` on the test images, and, with a
    reference, `agreement` and `kl_divergence` to it by split.

  Raises:
    ValueError: If splits are missing or lengths differ.
  """
  for name in ("test_forget", "test_retain"):
    if name not in logits or name not in labels:
      raise ValueError(f"logits and labels must have the split {name!r}")
  parts = ("test_forget", "test_retain")
  test_logits = np.concatenate([logits[name] for name in parts])
  test_labels = np.concatenate([labels[name] for name in parts])
  result: dict[str, Any] = {
    "accuracy": {
      **{name: accuracy(logits[name], labels[name]) for name in logits},
      "test": accuracy(test_logits, test_labels),
    },
    "per_class_accuracy": per_class_accuracy(test_logits, test_labels),
    "confusion_matrix": confusion_matrix(test_logits, test_labels).tolist(),
  }
  if reference is not None:
    result["agreement"] = {
      name: agreement(logits[name], reference[name]) for name in logits
    }
    result["kl_divergence"] = {
      name: kl_divergence(reference[name], logits[name]) for name in logits
    }
  return result


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
  if logits.ndim != 2 or labels.shape != logits.shape[:1]:
    raise ValueError(
      f"logits must be [N, K] and labels [N], got {list(logits.shape)} and"
      f" {list(labels.shape)}"
    )


def _check_pair(logits: np.ndarray, reference: np.ndarray) -> None:
  if logits.ndim != 2 or logits.shape != reference.shape:
    raise ValueError(
      f"logits must be [N, K] for both models, got {list(logits.shape)} and"
      f" {list(reference.shape)}"
    )
