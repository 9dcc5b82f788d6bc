"""Random labels for the forget set, and training on them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import checks, training, types
from psg_jax.baselines import _engine, _plans


def random_labels(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_weight: float = 1.0,
  num_epochs: int = 10,
  batch_size: int = 256,
  optimizer: optax.GradientTransformation | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Trains on all images, the forget set with labels drawn at random.

      loss = mean_i w_i CE(f_w(x_i), y_i'),   w = 1 on F, φ on R

  over minibatches of both sets shuffled together; `y'` is uniform among the
  other classes on F, drawn once, and the label on R. Released codes draw among
  all classes: of ten images one then keeps its label.

  Args:
    model: As for `finetune.finetune`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the labels and the order.
    retain_weight: `φ`, positive.
    num_epochs: Passes over all images, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 0.01,
      momentum 0.9 and weight decay 5e-4.
    batch_stats: `"update"` or `"frozen"`.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

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
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
    batch_stats=batch_stats,
  )
  return train(
    model,
    variables,
    split,
    key,
    retain_weight=retain_weight,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer or training.sgd(0.01, weight_decay=5e-4),
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description="random labels",
    show_progress=show_progress,
  )


def train(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_weight: float,
  num_epochs: int,
  batch_size: int,
  optimizer: optax.GradientTransformation,
  mask: chex.ArrayTree | None = None,
  batch_stats: str = "update",
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  description: str,
  show_progress: bool,
) -> _engine.Output:
  """Trains on random labels, all weights or those of a mask.

  Args:
    model: As for `random_labels`, and so are those that are not named here.
    variables: As for `random_labels`.
    split: As for `random_labels`.
    key: As for `random_labels`.
    retain_weight: As for `random_labels`.
    num_epochs: As for `random_labels`.
    batch_size: As for `random_labels`.
    optimizer: Any Optax optimiser.
    mask: As for `_engine.run`.
    batch_stats: As for `random_labels`.
    callback: As for `random_labels`.
    mesh: As for `random_labels`.
    description: Name of the progress bar.
    show_progress: As for `random_labels`.

  Returns:
    As `random_labels`.

  Raises:
    FloatingPointError: If the loss is NaN or infinite.
  """
  label_key, plan_key, run_key = jax.random.split(key, 3)
  sizes = len(split.forget), len(split.retain), batch_size
  plans = _plans.each_pass(
    plan_key, num_epochs, lambda key: _plans.mixed(key, *sizes)
  )
  labels = other_labels(
    label_key, split.forget.labels, split.forget.num_classes
  )
  weight = jnp.float32(retain_weight)
  return _engine.run(
    model,
    variables,
    *_plans.pool(split, labels),
    [[_engine.Phase(_loss, *plan, weight)] for plan in plans],
    run_key,
    optimizer=optimizer,
    mask=mask,
    batch_stats=batch_stats,
    callback=callback,
    mesh=mesh,
    description=description,
    show_progress=show_progress,
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


def _loss(
  apply_fn: _engine.ApplyFn,
  variables: types.Variables,
  batch: _engine.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
  logits, variables = apply_fn(variables, batch)
  losses = training.cross_entropy(logits, batch.targets)
  weights = batch.weights * jnp.where(batch.is_forget, 1.0, context)
  is_correct = _engine.is_predicted(logits, batch.targets)
  return jnp.sum(losses * weights), (
    variables,
    _engine.by_set(batch, loss=losses, accuracy=is_correct),
  )
