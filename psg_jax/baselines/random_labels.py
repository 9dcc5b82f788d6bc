"""Random labels for the forget set, and training on them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import batches, checks, optimizers, steps, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 10,
  "batch_size": 256,
  "optimizer": optimizers.sgd(0.01, weight_decay=5e-4),
  "description": "random labels",
}


def random_labels(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_weight: float = 1.0,
  **options: Any,
) -> common.Output:
  """Trains on all images, the forget set with labels drawn at random.

      loss = mean_i w_i CE(f_w(x_i), y_i'),   w = 1 on F, φ on R

  over minibatches of both sets shuffled together; `y'` is uniform among the
  other classes on F, drawn once, and the label on R. Released codes draw among
  all classes: of ten images one then keeps its label.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the labels and the order.
    retain_weight: `φ`, positive.
    **options: Those of `engine.Passes`; by default 10 passes over all images in
      minibatches of 256, and SGD with a learning rate of 0.01, momentum 0.9 and
      weight decay 5e-4.

  Returns:
    The variables, and the records of `neggrad.neggrad`, where the accuracy on
    the forget set is that of its new labels.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Golatkar et al., Eternal Sunshine of the Spotless Net, 2020.
  """
  checks.number("retain_weight", retain_weight, above=0)
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  label_key, *keys = jax.random.split(key, 3)
  labels = other_labels(
    label_key, split.forget.labels, split.forget.num_classes
  )
  return common.train(
    *(model, variables, split, keys, passes),
    plan_fn=batches.mixed,
    loss_fn=_loss,
    contexts=[jnp.float32(retain_weight)] * passes.num_epochs,
    targets=np.concatenate([labels, split.retain.labels]),
  )


def other_labels(
  key: jax.Array, labels: np.ndarray, num_classes: int
) -> np.ndarray:
  """Draws for each label, uniformly, another one.

  Args:
    key: One typed key.
    labels: int `[N]`, in `[0, num_classes)`.
    num_classes: 2 or more.

  Returns:
    int32 `[N]`.

  Raises:
    ValueError: If there is no other class.
  """
  checks.integer("num_classes", num_classes, at_least=2)
  # A step of 1 to K - 1 around the circle of classes.
  steps = jax.random.randint(key, labels.shape, 1, num_classes)
  return ((labels + np.asarray(steps)) % num_classes).astype(np.int32)


@steps.row_loss
def _loss(
  logits: jax.Array, batch: steps.Batch, context: chex.ArrayTree
) -> tuple[jax.Array, steps.Figures]:
  losses = steps.cross_entropy(logits, batch.targets)
  return losses * jnp.where(batch.is_forget, 1.0, context), {
    "loss": losses,
    "accuracy": steps.is_predicted(logits, batch.targets),
  }
