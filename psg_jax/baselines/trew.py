"""TREW: distils the other classes, tilted to those that are like the old."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from psg_jax import (
  checks,
  engine,
  inference,
  optimizers,
  types,
  unlearning,
)
from psg_jax.baselines import common, delete

DEFAULTS = {
  "num_epochs": 10,
  "batch_size": 128,
  "optimizer": optimizers.sgd(0.01, weight_decay=5e-4),
  "schedule": "constant",
  "description": "TREW",
}


def trew(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  strength: float = 10.0,
  layer: str = "head/kernel",
  num_components: int | None = None,
  temperature: float | None = None,
  retain_weight: float = 1.0,
  **options: Any,
) -> common.Output:
  """Tilted reweighting: teaches forget images what retraining might say.

      loss = mean CE(f_w(x_F), q) + φ mean CE(f_w(x_R), y_R)
      q_k ∝ p_k(x) exp(β s(k, y)) for k ≠ y,   q_y = 0

  with `p` the prediction of the original model and `s` the likeness of classes
  by its last layer: `tilted` and `class_similarity`. With `β = 0` and `φ = 0`
  it is DELETE. With several classes to forget, each image leaves out its own.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order.
    strength: `β`, finite; the paper's is 10.
    layer: Path in the parameters of the last layer's weights `[..., K]`.
    num_components: As for `class_similarity`, and likewise `temperature`; the
      paper has both.
    temperature: See there.
    retain_weight: `φ`, 0 or more; 0 uses no retain image.
    **options: Those of `engine.Passes`; by default 10 passes over the forget
      set in minibatches of 128, and SGD with a learning rate of 0.01, momentum
      0.9 and weight decay 5e-4: those of AMUN, by the same authors.

  Returns:
    The variables, the targets, and the history of `unlearning.update`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Ebrahimpour-Boroojeny et al., Unlearning Isn't Forgetting: Revealing Hidden
    Leakage in Class Unlearning Evaluations, 2026.
  """
  checks.number("strength", strength)
  checks.number("retain_weight", retain_weight, at_least=0)
  passes = common.passes(
    *(model, variables, split, key, options, DEFAULTS),
    needs_retain=retain_weight > 0,
  )
  weights = _weights(variables, layer, split.forget.num_classes)
  similarity = class_similarity(
    weights, num_components=num_components, temperature=temperature
  )
  logits = inference.predict(
    model.apply, variables, split.forget.images, mesh=passes.mesh
  )
  targets = tilted(logits, split.forget.labels, similarity, strength)
  state, history = unlearning.update(
    *(model, variables, split, targets, key),
    retain_weight=retain_weight,
    **engine.filled(options, DEFAULTS),
  )
  return common.Output(
    variables=state.variables, history=history, targets=targets
  )


def tilted(
  logits: np.ndarray,
  labels: np.ndarray,
  similarity: np.ndarray,
  strength: float,
) -> np.ndarray:
  """Returns the prediction among the other classes, tilted to the similar.

      q_k = exp(z_k + β s(y, k)) / Σ_{j ≠ y} exp(z_j + β s(y, j)),   q_y = 0

  Of all distributions without `y` whose mean similarity is at least some
  level, it is the nearest to the prediction without `y`, in the divergence
  `KL(q ‖ p)`.

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`, the classes `y` to leave, in `[0, K)`.
    similarity: float `[K, K]`, `s(y, k)` in row `y`; the diagonal is not used.
    strength: `β`, finite; 0 is `delete.other_classes`.

  Returns:
    float32 `[N, K]`; each row sums to 1.

  Raises:
    ValueError: If an argument is of the wrong shape or range.
  """
  num_classes = logits.shape[-1]
  if np.shape(similarity) != (num_classes, num_classes):
    raise ValueError(
      f"similarity must be [{num_classes}, {num_classes}] for the classes of"
      f" the logits, got {list(np.shape(similarity))}"
    )
  checks.number("similarity", similarity)
  checks.number("strength", strength)
  checks.labels(labels, len(logits), num_classes)
  return delete.other_classes(logits + strength * similarity[labels], labels)


def class_similarity(
  weights: np.ndarray,
  *,
  num_components: int | None = None,
  temperature: float | None = None,
) -> np.ndarray:
  """Returns how alike classes are by the weights of the last layer.

      s(y, k) = cos(w_y - w̄, w_k - w̄)

  The mean over classes `w̄` goes: what all classes share, no prediction shows.

  Args:
    weights: float `[..., K]`, one vector a class.
    num_components: Compare the leading principal components alone, so many,
      positive; None for all.
    temperature: `τ`, positive: `softmax_{k ≠ y}(s(y, k) / τ)` in place of `s`,
      with a diagonal of 0; None for `s` itself.

  Returns:
    float32 `[K, K]`, in [-1, 1], 0 for a class whose weights are the mean.

  Raises:
    ValueError: If an argument is of the wrong shape or range.
  """
  num_classes = weights.shape[-1]
  checks.integer("num_classes", num_classes, at_least=2)
  checks.number("weights", weights)
  vectors = np.asarray(weights, np.float64).reshape(-1, num_classes).T
  vectors = vectors - vectors.mean(0)
  if num_components is not None:
    checks.integer("num_components", num_components, at_least=1)
    left, sizes, _ = np.linalg.svd(vectors, full_matrices=False)
    vectors = (left * sizes)[:, :num_components]
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  # What is left of a class at the mean is rounding, without a direction.
  is_zero = lengths <= 1e-6 * lengths.max()
  units = np.where(is_zero, 0.0, vectors / np.where(is_zero, 1.0, lengths))
  similarity = np.clip(units @ units.T, -1.0, 1.0)
  if temperature is not None:
    checks.number("temperature", temperature, above=0)
    return delete.other_classes(
      similarity / temperature, np.arange(num_classes)
    )
  return similarity.astype(np.float32)


def _weights(
  variables: types.Variables, layer: str, num_classes: int
) -> np.ndarray:
  """Finds the weights of the last layer by their path."""
  weights: Any = variables["params"]
  for name in layer.split("/"):
    weights = weights.get(name) if isinstance(weights, Mapping) else None
  shape = np.shape(weights)
  if isinstance(weights, Mapping) or len(shape) < 2 or shape[-1] != num_classes:
    raise ValueError(
      f"layer must be the path of weights [..., {num_classes}] such as"
      f" 'head/kernel', got {layer!r}"
    )
  return np.asarray(weights)
