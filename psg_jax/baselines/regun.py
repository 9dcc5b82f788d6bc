"""ReGUn: forget images are to look like images that were never seen."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np

from psg_jax import batches, checks, engine, inference, optimizers, steps, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 10,
  "batch_size": 128,
  "optimizer": optimizers.sgd(0.01, weight_decay=0.0),
  "description": "ReGUn",
}


def regun(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  held_out: types.Dataset,
  retain_weight: float = 0.5,
  temperature: float = 1.0,
  **options: Any,
) -> common.Output:
  """Distils the forget set towards the predictions on unseen images.

      loss = (1 - λ) mean KL(q(B) ‖ softmax(f_w(x_F) / T)) + λ mean CE(x_R, y_R)
      q(B) = mean over h of softmax(f_0(h) / T)

  with the original model `f_0`, frozen, in inference mode. For each forget
  minibatch `B` as many held-out images `h` are drawn, with replacement, of the
  same classes. `q` is one distribution for all of `B`, not one for each class:
  where classes are mixed it is broad. A pass goes over the forget set, with as
  many retain images beside each minibatch, in one batch (the authors': two).

  It is a method for single images. The original model knows unseen images of a
  class that it was trained on, so that a whole class is hardly forgotten.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the order and the draws.
    held_out: Images that were not trained on, at least one; those of all
      classes stand in for a class without any.
    retain_weight: `λ`, in [0, 1).
    temperature: `T`, positive.
    **options: Those of `engine.Passes`; by default 10 passes over the forget
      set in minibatches of 128, and SGD with a learning rate of 0.01, momentum
      0.9 and no weight decay.

  Returns:
    The variables, and one record a pass: `epoch` from 1, `forget_loss` (the
    divergence) and `retain_loss` (the cross-entropy, nats), `forget_accuracy`
    and `retain_accuracy` as it went, `step_losses` and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Mirlach et al., Reference-Guided Machine Unlearning, 2026.
  """
  checks.number("retain_weight", retain_weight, at_least=0, below=1)
  checks.number("temperature", temperature, above=0)
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  if not len(held_out):
    raise ValueError("held_out must not be empty, got 0 images")
  plan_key, draw_key, run_key = jax.random.split(key, 3)
  num_forget, num_retain = len(split.forget), len(split.retain)
  logits = inference.predict(
    model.apply, variables, held_out.images, mesh=passes.mesh
  )
  shares = np.asarray(jax.nn.softmax(logits / temperature))
  plans = batches.each_pass(
    plan_key,
    passes.num_epochs,
    lambda key: batches.beside_forget(
      key, num_forget, num_retain, passes.batch_size, retain_weight
    ),
  )
  contexts = [
    {
      **_references(
        *(jax.random.fold_in(draw_key, epoch), plan, split.forget.labels),
        *(held_out.labels, shares),
      ),
      "forget_weight": jnp.float32(1 - retain_weight),
      "temperature": jnp.float32(temperature),
    }
    for epoch, plan in enumerate(plans)
  ]
  images, labels = batches.join(split)
  # Its place says of which minibatch a forget image is.
  places = np.arange(len(labels)) % num_forget
  state, history = engine.run(
    *(model, variables, images),
    np.stack([labels, places], 1).astype(np.int32),
    [
      [engine.Phase(_loss, plan, context)]
      for plan, context in zip(plans, contexts, strict=True)
    ],
    *(run_key, passes),
  )
  return common.Output(variables=state.variables, history=history)


def _references(
  key: jax.Array,
  plan: batches.Plan,
  labels: np.ndarray,
  pool: np.ndarray,
  shares: np.ndarray,
) -> dict[str, jax.Array]:
  """The `q` of each minibatch, and of which minibatch each forget image is."""
  is_real = plan.is_forget & (plan.weights > 0)
  rows, (step, _) = plan.rows[is_real], np.nonzero(is_real)
  sums = np.zeros((len(plan.rows), shares.shape[1]), np.float32)
  np.add.at(sums, step, shares[matched_rows(key, labels[rows], pool)])
  step_of = np.zeros(len(labels), np.int32)
  step_of[rows] = step
  return {
    "references": jnp.asarray(sums / is_real.sum(1, keepdims=True)),
    "step_of": jnp.asarray(step_of),
  }


def matched_rows(
  key: jax.Array, labels: np.ndarray, pool: np.ndarray
) -> np.ndarray:
  """Draws for each label a row of the pool of the same label.

  Args:
    key: One typed key.
    labels: int `[N]`.
    pool: int `[M]`, labels to draw from, with replacement, at least one.

  Returns:
    int `[N]`, in `[0, M)`; any row for a label that the pool does not have.
  """
  order = np.argsort(pool, kind="stable")
  first, end = (
    np.searchsorted(pool[order], labels, side) for side in ("left", "right")
  )
  is_missing = first == end
  first, end = (
    np.where(is_missing, 0, first),
    np.where(is_missing, len(pool), end),
  )
  place = np.asarray(jax.random.uniform(key, labels.shape), np.float64)
  return order[first + np.floor(place * (end - first)).astype(int)]


@steps.row_loss
def _loss(
  logits: jax.Array, batch: steps.Batch, context: dict[str, jax.Array]
) -> tuple[jax.Array, steps.Figures]:
  labels, places = batch.targets[:, 0], batch.targets[:, 1]
  references = context["references"][context["step_of"][places]]
  log_shares = jax.nn.log_softmax(logits / context["temperature"])
  terms = jax.scipy.special.xlogy(references, references)
  divergence = jnp.sum(terms - references * log_shares, -1)
  retain_loss = steps.cross_entropy(logits, labels)
  scaled = context["forget_weight"] * divergence
  return jnp.where(batch.is_forget, scaled, retain_loss), {
    "loss": jnp.where(batch.is_forget, divergence, retain_loss),
    "accuracy": steps.is_predicted(logits, labels),
  }
