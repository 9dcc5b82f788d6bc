"""What would a model say whose last layers never saw the forget set?

A trained network knows its images by heart in its last layers first; what the
others compute is mostly of use to any class. A copy whose last layers are drawn
anew, and trained in one pass over the retained images, says of a class that is
gone what a retrained model would, at a small part of its cost: the network is
taken through a gradient but at its end.
"""

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import (
  checks,
  inference,
  last_layers,
  optimizers,
  training,
  types,
)

NUM_MODELS = 1
# No pass's search has it.
_KEY = np.iinfo(np.int32).max
_BATCH_SIZE = 16
# Of fewer images there are more passes.
_MIN_STEPS = 140


def count(
  num_refits: int | None,
  variables: types.Variables,
  split: types.Split,
  *,
  labels: str,
  retain_weight: float,
) -> int:
  """Returns how many there are to be.

  Args:
    num_refits: 0 or more; None for 1 where they can say something, else 0.
    variables: The network's.
    split: The forget and the retain set.
    labels: The form of the targets, of `relabelling.LABELS`, or other words.
    retain_weight: `φ`.

  Raises:
    ValueError: If there are to be some where they can say nothing: of images
      whose class is retained (the layers before the last ones remember too
      much), without retained images of two classes, for a network without
      several layers of names that `last_layers.choose` knows, or where targets
      are not `soft_other`.
  """
  reasons = {
    f"labels are {labels}": labels != "soft_other",
    "retain_weight is 0": retain_weight == 0,
    "not all images of their classes are forgotten": not np.isin(
      split.forget.labels, split.whole_classes()
    ).all(),
    "one class is retained": len(np.unique(split.retain.labels)) < 2,
    "the network has no last layers of names that are known": (
      last_layers.count(variables) < 2
    ),
  }
  reason = next((x for x, holds in reasons.items() if holds), None)
  if num_refits is None:
    return NUM_MODELS if reason is None else 0
  checks.integer("num_refits", num_refits, at_least=0)
  if num_refits and reason is not None:
    raise ValueError(f"num_refits must be 0 where {reason}, got {num_refits}")
  return num_refits


def predict(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_models: int = NUM_MODELS,
  num_layers: int = 4,
  num_epochs: int = 1,
  learning_rate: float = 0.05,
  eval_batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> np.ndarray:
  """Trains new last layers on retained images, and predicts the forget set.

  All other layers stay as they are. Goel et al. (2022) call it exact unlearning
  of the last `k` layers, EU-k (`baselines.eu_k`), and train longer; here it is
  a witness alone. The defaults were found on validation classes
  (docs/targets.md).

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set; see `count`.
    key: One typed key, that of a search, from which others are folded.
    num_models: `M`, positive; their mean says a little more than one of them.
    num_layers: The last so many are new, positive, but never the first.
    num_epochs: Passes over the retained images, 16 a step, positive; more where
      these would be fewer than 140 steps.
    learning_rate: Of SGD, the highest of its one cycle, positive.
    eval_batch_size: Images predicted at a time.
    mesh: Devices; None for one.
    show_progress: Whether to show progress bars.

  Returns:
    Logits, float32 `[M, N, K]`.

  Raises:
    ValueError: If an argument is out of its range, or the network has no names
      of layers that are known.
    FloatingPointError: If the loss is NaN or infinite.
  """
  checks.integer("num_models", num_models, at_least=1)
  key = jax.random.fold_in(key, _KEY)
  checks.integer("num_layers", num_layers, at_least=1)
  checks.integer("num_epochs", num_epochs, at_least=1)
  num_layers = min(num_layers, last_layers.count(variables) - 1)
  trainable = last_layers.trainable(variables, num_layers, None)
  image = jnp.zeros((1, *split.retain.images.shape[1:]), jnp.float32)
  num_batches = -(-len(split.retain) // _BATCH_SIZE)
  num_epochs = max(num_epochs, round(_MIN_STEPS / num_batches))
  logits = []
  for number in range(num_models):
    init_key, fit_key = jax.random.split(jax.random.fold_in(key, number))
    fitted, _ = training.fit(
      model,
      last_layers.redrawn(variables, model.init(init_key, image), trainable),
      split.retain,
      fit_key,
      num_epochs=num_epochs,
      batch_size=_BATCH_SIZE,
      optimizer=optimizers.sgd(learning_rate),
      trainable=trainable,
      mesh=mesh,
      description=f"new last layers {number + 1}/{num_models}",
      show_progress=show_progress,
    )
    logits.append(
      inference.predict(
        model.apply,
        fitted,
        split.forget.images,
        batch_size=eval_batch_size,
        mesh=mesh,
      )
    )
  return np.stack(logits)
