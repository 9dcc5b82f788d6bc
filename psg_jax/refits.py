"""What would a model say whose last layers never saw the forget set?

A trained network knows its images by heart in its last layers first; what the
others compute is mostly of use to any class. A copy whose last layers are drawn
anew, and trained on every other retained image, says of a class that is gone
what a retrained model would, at a small part of its cost: the network is taken
through a gradient but at its end.
"""

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import (
  augment,
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
# Another key of data than those of passes and models.
_ROWS = 1
_BATCH_SIZE = 16
_MIN_STEPS = 140
# Of a pass over the retained images, where that is more.
_PART = 0.5


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
    "not all images of their classes are forgotten": not split.is_of_classes(),
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
  num_layers: int = last_layers.NUM_LAYERS,
  num_steps: int | None = None,
  learning_rate: float = 0.05,
  augment_fn: augment.AugmentFn | None = None,
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
    num_steps: Of 16 retained images, positive: of as many images as these
      take, drawn once, in one pass, or of all in several. None for half a pass,
      or about 140, in whole passes, where that is more.
    learning_rate: Of SGD, the highest of its one cycle, positive.
    augment_fn: Augmentation of retained images, as the original was trained
      with; None for none.
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
  checks.integer("eval_batch_size", eval_batch_size, at_least=1)
  key = jax.random.fold_in(key, _KEY)
  num_images = len(split.retain)
  if num_steps is None:
    num_steps = max(_MIN_STEPS, round(_PART * num_images / _BATCH_SIZE))
  checks.integer("num_steps", num_steps, at_least=1)
  trainable = last_layers.at_end(variables, num_layers)
  image = jnp.zeros((1, *split.retain.images.shape[1:]), jnp.float32)
  retained = split.retain
  if num_steps * _BATCH_SIZE < num_images:
    order = jax.random.permutation(jax.random.fold_in(key, _ROWS), num_images)
    retained = retained.take(np.sort(order[: num_steps * _BATCH_SIZE]))
  num_epochs = max(1, round(num_steps / -(-len(retained) // _BATCH_SIZE)))
  logits = []
  for number in range(num_models):
    init_key, fit_key = jax.random.split(jax.random.fold_in(key, number))
    fitted, _ = training.fit(
      model,
      last_layers.redrawn(variables, model.init(init_key, image), trainable),
      retained,
      fit_key,
      num_epochs=num_epochs,
      batch_size=_BATCH_SIZE,
      optimizer=optimizers.sgd(learning_rate),
      augment_fn=augment_fn,
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
