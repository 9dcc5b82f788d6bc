"""DELETE: distils what the original says of the other classes, and no more."""

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
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 20,
  "batch_size": 128,
  "optimizer": optimizers.sgd(1e-4, weight_decay=0.0),
  "schedule": "constant",
  "description": "DELETE",
}


def delete(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> common.Output:
  """Learns from the original model, its own class masked, on the forget set.

      loss = mean_i KL(q_i ‖ softmax(f_w(x_i))),   q_i = other_classes(t_i, y_i)

  with `t` the logits of the original model, frozen, in inference mode. Only the
  target is masked: the student's softmax has all classes, so that the old one
  is pushed down. No retained image is used. The divergence has the gradient of
  the cross-entropy with `q`, which is what the records have.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, and the retain set, which is not used.
    key: One typed key, for the order.
    **options: Those of `engine.Passes`; by default 20 passes over the forget
      set in minibatches of 128, and SGD with a learning rate of 1e-4, momentum
      0.9 and no weight decay, as released for CIFAR-10 (5e-5 for others).
      BatchNorm in training mode is as released.

  Returns:
    The variables, the targets, and the history of `unlearning.update`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Zhou et al., Decoupled Distillation to Erase: A General Unlearning Method
    for Any Class-centric Tasks, 2025.
  """
  passes = common.passes(
    *(model, variables, split, key, options, DEFAULTS), needs_retain=False
  )
  logits = inference.predict(
    model.apply, variables, split.forget.images, mesh=passes.mesh
  )
  targets = other_classes(logits, split.forget.labels)
  state, history = unlearning.update(
    *(model, variables, split, targets, key),
    retain_weight=0.0,
    **engine.filled(options, DEFAULTS),
  )
  return common.Output(
    variables=state.variables, history=history, targets=targets
  )


def other_classes(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the prediction among the classes other than the label.

      q_k = exp(z_k) / Σ_{j ≠ y} exp(z_j),   q_y = 0

  The logit is masked, and not the probability, of which nothing is left to
  divide by where the model is sure.

  Args:
    logits: float `[N, K]`.
    labels: int `[N]`, in `[0, K)`.

  Returns:
    float32 `[N, K]`; each row sums to 1.

  Raises:
    ValueError: If a label is out of its range, or there is one class.
  """
  num_classes = logits.shape[-1]
  checks.integer("num_classes", num_classes, at_least=2)
  checks.labels(labels, len(logits), num_classes)
  return unlearning.soft_targets(logits, labels="soft_other", old_labels=labels)
