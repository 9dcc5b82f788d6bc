"""Figures computed from cached logits, on the host."""

from psg_jax.metrics.evaluation import (
  accuracy,
  agreement,
  confusion_matrix,
  evaluate,
  kl_divergence,
  per_class_accuracy,
)

__all__ = [
  "accuracy",
  "agreement",
  "confusion_matrix",
  "evaluate",
  "kl_divergence",
  "per_class_accuracy",
]
