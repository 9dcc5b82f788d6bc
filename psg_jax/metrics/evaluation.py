"""Accuracies, and the distance of one model's predictions to another's.

Everything follows from logits `[N, K]` that were computed once. Where there is
nothing to average over, a figure is None and never 0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import sklearn.metrics

from psg_jax.metrics import common


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
  common.check_rows("logits", logits, labels)
  return common.mean(common.is_right(logits, labels))


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
  common.check_rows("logits", logits, labels)
  is_right = common.is_right(logits, labels)
  return [
    common.mean(is_right[labels == label]) for label in range(logits.shape[1])
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
  common.check_rows("logits", logits, labels)
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
  common.check_rows("logits", logits, labels)
  if len(values) != len(labels):
    raise ValueError(
      f"values must be as many as labels: got {len(values)} values for"
      f" {len(labels)} labels"
    )
  is_right = common.is_right(logits, labels)
  groups = {value: is_right[values == value] for value in np.unique(values)}
  return {
    str(value): {"accuracy": common.mean(group), "count": len(group)}
    for value, group in groups.items()
  }


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
  common.check_same(logits, reference)
  return common.mean(common.is_same(logits, reference))


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
  common.check_same(logits, reference)
  log_p = common.log_probabilities(reference)
  log_q = common.log_probabilities(logits)
  return common.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))


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
  parts = ("test_forget", "test_retain")
  for name in parts:
    if name not in logits or name not in labels:
      raise ValueError(f"logits and labels must have the split {name!r}")
  test = [np.concatenate([x[name] for name in parts]) for x in (logits, labels)]
  result: dict[str, Any] = {
    "accuracy": {
      **{name: accuracy(logits[name], labels[name]) for name in logits},
      "test": accuracy(*test),
    },
    "per_class_accuracy": per_class_accuracy(*test),
    "confusion_matrix": confusion_matrix(*test).tolist(),
  }
  if reference is not None:
    result["agreement"] = {
      name: agreement(logits[name], reference[name]) for name in logits
    }
    result["kl_divergence"] = {
      name: kl_divergence(reference[name], logits[name]) for name in logits
    }
  return result
