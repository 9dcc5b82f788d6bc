"""Figures computed from cached logits and features, on the host."""

# ruff: noqa: F401

from psg_jax.metrics.clinical import (
  auroc,
  calibration_error,
  false_negatives,
  flips,
  sensitivity,
  specificity,
  worst_subgroup,
)
from psg_jax.metrics.common import NotAvailableError
from psg_jax.metrics.distances import (
  RELEARN_MARGIN,
  activation_distance,
  anamnesis_index,
  js_divergence,
  linear_cka,
  linear_probe,
  relearn_steps,
  run_time_efficiency,
  total_variation,
  tug_of_war,
  weight_distance,
  zrf,
)
from psg_jax.metrics.evaluation import (
  accuracy,
  accuracy_by,
  agreement,
  confusion_matrix,
  evaluate,
  kl_divergence,
  per_class_accuracy,
)
from psg_jax.metrics.inputs import SPLITS, Inputs, Metric, Outputs
from psg_jax.metrics.membership import (
  entropies,
  label_losses,
  logistic_attack,
  modified_entropies,
  svc_attack,
  threshold_attack,
)
from psg_jax.metrics.registry import METRICS, compute, find, result_of
