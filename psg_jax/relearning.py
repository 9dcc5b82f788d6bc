"""Relearning: how soon what was forgotten comes back.

A copy of a model is trained on the forget set again. What was only hidden, as
by a changed last layer, is back after a few steps; what was never there takes
as long as for a model retrained without it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import checks, inference, metrics, training, types


def relearn(
  model: types.Model,
  variables: types.Variables,
  forget: types.Dataset,
  key: jax.Array,
  *,
  target_accuracy: float,
  num_steps: int,
  batch_size: int = 64,
  optimizer: optax.GradientTransformation | None = None,
  eval_batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """Trains a copy of a model on the forget set until its accuracy is back.

  The curve is what `metrics.relearn_steps` and `metrics.anamnesis_index` take.
  Models that are compared are given the same arguments, the key among them.

  The papers count minibatches, as here. Their rates differ from one data set to
  the next: that of `optimizer` decides how long all models take, and so which
  differences are seen.

  Args:
    model: The network.
    variables: Where to start; left as they are.
    forget: The forget set, of which all minibatches are full: each image comes
      once before any comes again.
    key: One typed key, for the order of the images and for dropout.
    target_accuracy: In [0, 1]; the first step that reaches it is the last.
      `(1 - margin)` times the original model's, for `metrics.relearn_steps`.
    num_steps: Most steps `T`, positive.
    batch_size: Images a step, positive; all where there are fewer.
    optimizer: Any Optax optimiser; None for `training.sgd(0.01)`.
    eval_batch_size: Images at a time, positive, for the accuracy after each
      step, which is of all images in inference mode.
    mesh: Devices to work on; None for one.

  Returns:
    float64 `[t + 1]`, `t` at most `T`: the accuracy on the forget set before
    the first step, and after each.

  Raises:
    ValueError: If an argument is out of its range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Tarun et al., Fast Yet Effective Machine Unlearning, 2023 (relearn time).
    Chundawat et al., Zero-Shot Machine Unlearning, 2023 (anamnesis index).
  """
  checks.number("target_accuracy", target_accuracy, at_least=0, at_most=1)
  checks.integer("num_steps", num_steps, at_least=1)
  checks.integer("batch_size", batch_size, at_least=1)
  checks.key(key)
  if not len(forget):
    raise ValueError("forget must not be empty, got 0 images")
  optimizer = training.sgd(0.01) if optimizer is None else optimizer
  batch_size = min(batch_size, len(forget))
  order_key, fit_key = jax.random.split(key)
  num_passes = -(-num_steps * batch_size // len(forget))
  order = np.concatenate(
    [
      jax.random.permutation(jax.random.fold_in(order_key, i), len(forget))
      for i in range(num_passes)
    ]
  )

  def accuracy(variables: types.Variables) -> float:
    logits = inference.predict(
      model.apply,
      variables,
      forget.images,
      batch_size=eval_batch_size,
      mesh=mesh,
    )
    return metrics.accuracy(logits, forget.labels) or 0.0

  states: list[training.TrainState] = []

  def keep(state: training.TrainState, record: object) -> None:
    del record
    states[:] = [jax.tree.map(jnp.copy, state)]

  curve = [accuracy(variables)]
  for step in range(num_steps):
    if curve[-1] >= target_accuracy:
      break
    # Each step is an epoch of one minibatch; the state goes on from the last.
    rows = order[step * batch_size : (step + 1) * batch_size]
    variables, _ = training.fit(
      model,
      variables,
      forget.take(rows),
      fit_key,
      optimizer=optimizer,
      num_epochs=step + 1,
      batch_size=batch_size,
      schedule="constant",
      callback=keep,
      state=states[0] if states else None,
      mesh=mesh,
      show_progress=False,
    )
    curve.append(accuracy(variables))
  return np.array(curve)
