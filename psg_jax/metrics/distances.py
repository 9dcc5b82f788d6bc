"""How far a model is from a reference, mostly the retrained model.

Distances of predictions take logits of the same images in the same order. All
divergences are in nats and averaged over images, never divided by the number
of classes.
"""

from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import scipy.special
import sklearn.linear_model
import sklearn.model_selection
import sklearn.pipeline
import sklearn.preprocessing

from psg_jax import checks
from psg_jax.metrics import common

RELEARN_MARGIN = 0.05
"""Share of the original accuracy that may be missing when it is back."""


def js_divergence(logits: np.ndarray, reference: np.ndarray) -> float:
  """Mean Jensen-Shannon divergence of two models' predictions, in nats.

  `JS(p, q) = KL(p ‖ m) / 2 + KL(q ‖ m) / 2` with `m = (p + q) / 2`. Symmetric.
  Two predictions that are sure of different classes are ln 2 = 0.693 apart,
  whatever the number of classes.

  Direction: down, to the retrained model. Ideal: 0. Range: [0, ln 2].

  Args:
    logits: float `[N, K]`, the model's.
    reference: float `[N, K]`, the other model's.

  Returns:
    The divergence.

  Raises:
    ValueError: If the shapes differ.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Lin, Divergence Measures Based on the Shannon Entropy, 1991.
  """
  common.check_pair(logits, reference)
  p = np.exp(common.log_probabilities(logits))
  q = np.exp(common.log_probabilities(reference))
  middle = (p + q) / 2
  # rel_entr(0, 0) is 0, so that probabilities which underflow do no harm.
  divergences = scipy.special.rel_entr(p, middle) / 2
  divergences += scipy.special.rel_entr(q, middle) / 2
  return float(np.mean(np.sum(divergences, -1)))


def zrf(logits: np.ndarray, random_logits: np.ndarray) -> float:
  """Zero retrain forgetting: likeness to a model that has learnt nothing.

  `1 - mean JS(model, random)` over the forget set. Released code divides the
  divergence by the number of classes, which makes every model look forgetful;
  the paper's formula does not, and neither does this.

  Direction: as retrained; higher than the retrained model's means that the
  forget set is treated more at random than unseen images are. Ideal: the
  retrained model's. Range: [1 - ln 2, 1], that is [0.307, 1].

  Args:
    logits: float `[N, K]`, the model's, on the forget set.
    random_logits: float `[N, K]`, a randomly initialised model's.

  Returns:
    The score.

  Raises:
    ValueError: If the shapes differ.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Chundawat et al., Can Bad Teaching Induce Forgetting? Unlearning in Deep
    Networks Using an Incompetent Teacher, 2023.
  """
  return 1.0 - js_divergence(logits, random_logits)


def total_variation(logits: np.ndarray, reference: np.ndarray) -> float:
  """Mean total variation distance `Σ_k |p_k - q_k| / 2` of two models.

  Direction: down, to the retrained model. Ideal: 0. Range: [0, 1].

  Args:
    logits: float `[N, K]`, the model's.
    reference: float `[N, K]`, the other model's.

  Returns:
    The distance.

  Raises:
    ValueError: If the shapes differ.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Levin and Peres, Markov Chains and Mixing Times, 2017, chapter 4.
  """
  return float(np.mean(np.sum(np.abs(_difference(logits, reference)), -1)) / 2)


def activation_distance(logits: np.ndarray, reference: np.ndarray) -> float:
  """Mean Euclidean distance `‖p - q‖₂` of two models' softmax outputs.

  Direction: down, to the retrained model. Ideal: 0. Range: [0, √2].

  Args:
    logits: float `[N, K]`, the model's.
    reference: float `[N, K]`, the other model's.

  Returns:
    The distance.

  Raises:
    ValueError: If the shapes differ.
    NotAvailableError: If there are no images or logits are not finite.

  References:
    Golatkar et al., Mixed-Privacy Forgetting in Deep Networks, 2021.
  """
  return float(np.mean(np.linalg.norm(_difference(logits, reference), axis=-1)))


def linear_cka(
  features: np.ndarray,
  reference: np.ndarray,
  *,
  max_rows: int | None = 10_000,
  seed: int = 0,
) -> float:
  """Linear centred kernel alignment of two models' features.

  `‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)` in Frobenius norms, of features with their column
  means taken off. Unchanged by rotation and by a common scale, so features of
  models from different initialisations can be compared.

  Direction: up, to the retrained model. Ideal: 1; two retrained models stay
  below that, and are the yardstick. Range: [0, 1].

  Args:
    features: float `[N, D]`, the model's.
    reference: float `[N, E]`, the other model's, of the same images.
    max_rows: Most images, drawn at random; None for all.
    seed: Seed of the draw.

  Returns:
    The alignment.

  Raises:
    ValueError: If the shapes do not fit.
    NotAvailableError: If there are fewer than two images, or features are not
      finite or the same for all images.

  References:
    Kornblith et al., Similarity of Neural Network Representations Revisited,
    2019.
  """
  if features.ndim != 2 or reference.ndim != 2:
    raise ValueError(
      f"features must be [N, D] and [N, E], got {list(features.shape)} and"
      f" {list(reference.shape)}"
    )
  if len(features) != len(reference):
    raise ValueError(
      f"features must be of the same images, got {len(features)} and"
      f" {len(reference)}"
    )
  rng = np.random.default_rng(seed)
  rows = common.choose_rows(len(features), max_rows, rng)
  if len(rows) < 2:
    raise common.NotAvailableError(f"{len(rows)} images are too few to compare")
  x, y = _centred(features[rows]), _centred(reference[rows])
  scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
  return float(np.linalg.norm(y.T @ x) ** 2 / scale)


def weight_distance(params: chex.ArrayTree, reference: chex.ArrayTree) -> float:
  """Euclidean distance of two models' parameters, `‖θ - θ'‖₂`.

  Networks that compute the same may be far apart, so this is small evidence;
  give `variables["params"]`, without BatchNorm statistics.

  Direction: down. Ideal: 0, which a second retrained model does not reach
  either. Range: [0, ∞).

  Args:
    params: The model's parameters.
    reference: The other model's, of the same structure and shapes.

  Returns:
    The distance.

  Raises:
    ValueError: If the structures or shapes differ.
    NotAvailableError: If parameters are not finite.

  References:
    Wu et al., DeltaGrad: Rapid Retraining of Machine Learning Models, 2020.
  """
  structures: list[Any] = [jax.tree.structure(x) for x in (params, reference)]
  if structures[0] != structures[1]:
    raise ValueError("params must have the structure of reference, got another")
  total = 0.0
  leaves = jax.tree.leaves(params), jax.tree.leaves(reference)
  for leaf, other in zip(*leaves, strict=True):
    if np.shape(leaf) != np.shape(other):
      raise ValueError(
        f"params must have the shapes of reference, got {np.shape(leaf)} and"
        f" {np.shape(other)}"
      )
    difference = np.asarray(leaf, np.float64) - np.asarray(other, np.float64)
    total += float(np.sum(difference**2))
  if not np.isfinite(total):
    raise common.NotAvailableError("parameters are not finite")
  return float(np.sqrt(total))


def tug_of_war(
  accuracies: tuple[float, float, float],
  retrained: tuple[float, float, float],
) -> float:
  """ToW: closeness to the retrained model in three accuracies at once.

  `(1 - |Δ_forget|) (1 - |Δ_retain|) (1 - |Δ_test|)`, each Δ the difference of
  an accuracy to the retrained model's.

  Direction: up. Ideal: 1. Range: [0, 1].

  Args:
    accuracies: The model's on the forget, the retain and the test images, in
      [0, 1].
    retrained: The retrained model's.

  Returns:
    The product.

  Raises:
    ValueError: If an accuracy is not in [0, 1].

  References:
    Zhao et al., What Makes Unlearning Hard and What to Do About It, 2024.
  """
  for name, values in (("accuracies", accuracies), ("retrained", retrained)):
    if len(values) != 3:
      raise ValueError(f"{name} must be three, got {len(values)}")
    checks.number(name, values, at_least=0, at_most=1)
  gaps = np.abs(np.subtract(accuracies, retrained))
  return float(np.prod(1 - gaps))


def run_time_efficiency(seconds: float, retrain_seconds: float) -> float:
  """How many times faster than retraining, `retrain / unlearn`.

  Both times without evaluation, on the same machine.

  Direction: up. Ideal: as high as can be; retraining is 1. Range: (0, ∞).

  Args:
    seconds: Time of unlearning, in seconds, positive.
    retrain_seconds: Time of retraining, in seconds, positive.

  Returns:
    The ratio.

  Raises:
    ValueError: If a time is not positive.

  References:
    Jia et al., Model Sparsity Can Simplify Machine Unlearning, 2023 (run-time
    efficiency, there the seconds themselves).
  """
  checks.number("seconds", seconds, above=0)
  checks.number("retrain_seconds", retrain_seconds, above=0)
  return float(retrain_seconds / seconds)


def relearn_steps(
  accuracies: np.ndarray,
  original_accuracy: float,
  *,
  margin: float = RELEARN_MARGIN,
) -> int:
  """Steps of training on the forget set until its accuracy is back.

  The first step `t` with `accuracies[t] >= (1 - margin) · original_accuracy`.

  Direction: as retrained; few steps show that what was to be forgotten was
  only hidden. Ideal: the retrained model's. Range: 0 or more.

  Args:
    accuracies: float `[T + 1]` in [0, 1], on the forget set, before the first
      step, and after each of `T`.
    original_accuracy: The original model's, in (0, 1].
    margin: α, the share of it that may be missing, in [0, 1).

  Returns:
    The number of steps; 0 if nothing had to be learnt.

  Raises:
    ValueError: If a value is out of its range.
    NotAvailableError: If the accuracy does not come back within the curve.

  References:
    Tarun et al., Fast Yet Effective Machine Unlearning, 2023.
    Chundawat et al., Zero-Shot Machine Unlearning, 2023 (the margin).
  """
  curve = np.asarray(accuracies, np.float64)
  if curve.ndim != 1 or not len(curve):
    raise ValueError(
      f"accuracies must be [T + 1], one a step, got {list(curve.shape)}"
    )
  checks.number("accuracies", curve, at_least=0, at_most=1)
  checks.number("original_accuracy", original_accuracy, above=0, at_most=1)
  checks.number("margin", margin, at_least=0, below=1)
  target = (1 - margin) * original_accuracy
  reached = np.flatnonzero(curve >= target)
  if not len(reached):
    raise common.NotAvailableError(
      f"the accuracy did not come back to {target:.3f} within"
      f" {len(curve) - 1} steps: it reached {curve.max():.3f}"
    )
  return int(reached[0])


def anamnesis_index(
  accuracies: np.ndarray,
  retrained_accuracies: np.ndarray,
  original_accuracy: float,
  *,
  margin: float = RELEARN_MARGIN,
) -> float:
  """AIN: steps to relearn, as a ratio to the retrained model's.

  Direction: as retrained; well below 1 the forgotten is still there, well
  above 1 the model resists relearning, which shows as well. Ideal: 1. Range:
  [0, ∞).

  Args:
    accuracies: float `[T + 1]`, the model's curve, as for `relearn_steps`.
    retrained_accuracies: float `[S + 1]`, the retrained model's, from the same
      training.
    original_accuracy: The original model's on the forget set, in (0, 1].
    margin: α, as for `relearn_steps`.

  Returns:
    The ratio.

  Raises:
    ValueError: If a value is out of its range.
    NotAvailableError: If a curve does not reach the accuracy, or the retrained
      model has it before the first step.

  References:
    Chundawat et al., Zero-Shot Machine Unlearning, 2023.
  """
  steps = relearn_steps(accuracies, original_accuracy, margin=margin)
  base = relearn_steps(retrained_accuracies, original_accuracy, margin=margin)
  if base == 0:
    raise common.NotAvailableError(
      "the retrained model needs no step to the original accuracy"
    )
  return steps / base


class Probe(NamedTuple):
  """What a linear classifier makes of features.

  Attributes:
    accuracy: Cross-validated, in [0, 1].
    rows: int `[P]`, the images it was asked about, sorted.
    predictions: int `[P]`, the class for each, by a classifier that has not
      seen the image.
  """

  accuracy: float
  rows: np.ndarray
  predictions: np.ndarray


def linear_probe(
  features: np.ndarray,
  labels: np.ndarray,
  *,
  num_folds: int = 3,
  max_rows: int | None = 3000,
  seed: int = 0,
) -> Probe:
  """Fits a linear classifier to frozen features, cross-validated.

  Where the last layer alone was changed, the classes can still be read from
  the features, and so be had back at once.

  Direction: as retrained. Ideal: the retrained model's. Range: [0, 1].

  Args:
    features: float `[N, D]`, the input of the last layer, of images that were
      not trained on.
    labels: int `[N]`.
    num_folds: Stratified folds, at least 2.
    max_rows: Most images, drawn at random; None for all.
    seed: Seed of the draw and the folds.

  Returns:
    The probe. Images of classes with fewer images than folds are left out.

  Raises:
    ValueError: If the shapes do not fit.
    NotAvailableError: If there are not two classes with `num_folds` images, or
      features are not finite.

  References:
    Alain and Bengio, Understanding Intermediate Layers Using Linear Classifier
    Probes, 2016.
  """
  common.check_rows("features", features, labels, "D")
  checks.integer("num_folds", num_folds, at_least=2)
  if not np.all(np.isfinite(features)):
    raise common.NotAvailableError("features are not finite")
  rng = np.random.default_rng(seed)
  rows = common.choose_rows(len(labels), max_rows, rng)
  classes, counts = np.unique(labels[rows], return_counts=True)
  rows = rows[np.isin(labels[rows], classes[counts >= num_folds])]
  if np.sum(counts >= num_folds) < 2:
    raise common.NotAvailableError(
      f"fewer than two classes have {num_folds} images"
    )
  predictions = sklearn.model_selection.cross_val_predict(
    sklearn.pipeline.make_pipeline(
      sklearn.preprocessing.StandardScaler(),
      sklearn.linear_model.LogisticRegression(C=0.1, max_iter=500),
    ),
    np.asarray(features[rows], np.float64),
    labels[rows],
    cv=sklearn.model_selection.StratifiedKFold(
      num_folds, shuffle=True, random_state=seed
    ),
  )
  accuracy = float(np.mean(predictions == labels[rows]))
  return Probe(accuracy, rows, predictions)


def _difference(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
  common.check_pair(logits, reference)
  return np.exp(common.log_probabilities(logits)) - np.exp(
    common.log_probabilities(reference)
  )


def _centred(features: np.ndarray) -> np.ndarray:
  """Columns of mean 0, at the scale of 1 so that no square can overflow."""
  if not np.all(np.isfinite(features)):
    raise common.NotAvailableError("features are not finite")
  values = np.asarray(features, np.float64)
  values = values - values.mean(0)
  norm = np.linalg.norm(values)
  if norm == 0:
    raise common.NotAvailableError("features are the same for all images")
  return values / norm
