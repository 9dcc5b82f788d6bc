"""UNSIR: impairs with noise that maximises the error, and repairs."""

import functools
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import batches, checks, engine, optimizers, steps, types
from psg_jax.baselines import common

# A pixel is grey plus so much of the noise: noise in the units of networks
# whose images are standardised, as the authors' is.
_GREY, _CONTRAST = 0.5, 0.25


DEFAULTS = {
  "num_epochs": 1,
  "batch_size": 256,
  "optimizer": optimizers.adam(0.02),
}


def unsir(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_noise_steps: int = 40,
  noise_step_size: float = 0.1,
  noise_penalty: float = 0.1,
  retain_fraction: float = 0.2,
  num_impair_epochs: int = 1,
  repair_optimizer: optax.GradientTransformation | None = None,
  **options: Any,
) -> common.Output:
  """Unlearns classes by error-maximising noise, without any forget image.

  1. Noise: for the classes of the forget set, images are found on which the
     original model errs most, `min_z - CE(f(x(z)), y) + λ mean ‖z‖²`, by Adam
     from `z ~ N(0, I)`. Here `x = 0.5 + z / 4` in pixel units, unclipped.
  2. Impair: passes over part of the retain set, with these images, labelled
     with the forget classes, beside each minibatch.
  3. Repair: passes over the same part of the retain set alone.

  It is a method for whole classes: for other requests it forgets all images of
  the classes that occur in the forget set.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, of which the classes are used, and the retain set.
    key: One typed key, for the noise, the choice and the order.
    num_noise_steps: Steps of Adam on the noise, positive.
    noise_step_size: Its learning rate, positive.
    noise_penalty: `λ`, 0 or more.
    retain_fraction: Part of the retain set that is used, in (0, 1]; about the
      authors' 1000 images a class of CIFAR-10.
    num_impair_epochs: Passes of step 2, positive.
    repair_optimizer: Likewise, to repair; None for Adam with 0.01.
    **options: Those of `engine.Passes`, of both kinds of passes: `num_epochs`
      of step 3, by default 1; `batch_size` retain images, by default 256, and
      noise images where there are as many retain images; `optimizer` to impair,
      by default Adam with a learning rate of 0.02. `num_parts` must be 1.

  Returns:
    The variables, and one record a pass: `epoch` from 1, `phase` (`"impair"`
    or `"repair"`), `retain_loss` (nats) and `retain_accuracy` as it went, in
    `"impair"` `noise_loss` too, `step_losses` and `seconds`; the first has
    `noise_seconds`, spent before it.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Tarun et al., Fast Yet Effective Machine Unlearning, 2023.
  """
  checks.integer("num_noise_steps", num_noise_steps, at_least=1)
  checks.number("noise_step_size", noise_step_size, above=0)
  checks.number("noise_penalty", noise_penalty, at_least=0)
  checks.number("retain_fraction", retain_fraction, above=0, at_most=1)
  checks.integer("num_impair_epochs", num_impair_epochs, at_least=1)
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  if passes.num_parts != 1:
    raise ValueError(f"num_parts must be 1 for UNSIR, got {passes.num_parts}")
  noise_key, choice_key, plan_key, *run_keys = jax.random.split(key, 5)
  retain = batches.take_fraction(split.retain, retain_fraction, choice_key)
  start = time.perf_counter()
  classes = np.unique(split.forget.labels)
  size = max(min(passes.batch_size, len(retain)), len(classes))
  labels = jnp.asarray(np.resize(classes, size))
  images = maximise_error(
    model.apply,
    optimizers.adam(noise_step_size),
    variables,
    noise_key,
    labels,
    jnp.float32(noise_penalty),
    image_shape=retain.images.shape[1:],
    num_steps=num_noise_steps,
  )
  noise = (jax.block_until_ready(images), labels)
  noise_seconds = time.perf_counter() - start
  plans = batches.each_pass(
    plan_key,
    num_impair_epochs + passes.num_epochs,
    lambda key: batches.retain_only(key, 0, len(retain), passes.batch_size),
  )
  variables, history = _impair_and_repair(
    (model, variables, retain.images, retain.labels),
    [
      [engine.Phase(_impair_loss, plan, noise)]
      for plan in plans[:num_impair_epochs]
    ],
    [
      [engine.Phase(steps.mean_cross_entropy, plan)]
      for plan in plans[num_impair_epochs:]
    ],
    run_keys,
    passes,
    repair_optimizer or optimizers.adam(0.01),
  )
  if history:
    history[0]["noise_seconds"] = noise_seconds
  return common.Output(variables=variables, history=history)


def _impair_and_repair(
  start: tuple[types.Model, types.Variables, Any, np.ndarray],
  impairing: list[list[engine.Phase]],
  repairing: list[list[engine.Phase]],
  keys: list[jax.Array],
  passes: engine.Passes,
  repair_optimizer: optax.GradientTransformation,
) -> tuple[types.Variables, engine.History]:
  """Makes the passes of steps 2 and 3, each with an optimiser of its own."""
  model, variables, images, labels = start
  num_impair_steps = sum(len(x.plan.rows) for (x,) in impairing)
  history: engine.History = []
  state = passes.state
  num_done = 0 if state is None else int(state.step)
  if num_done < num_impair_steps:
    state, history = engine.run(
      *(model, variables, images, labels, impairing, keys[0]),
      passes.replace(description="UNSIR, impair"),
    )
  if state is not None and num_done <= num_impair_steps:
    # Repairing starts anew from there, with an optimiser of its own.
    variables, state = state.variables, None
  state, repaired = engine.run(
    *(model, variables, images, labels, repairing, keys[1]),
    passes.replace(
      optimizer=repair_optimizer, description="UNSIR, repair", state=state
    ),
    first_epoch=len(impairing),
    first_step=num_impair_steps,
  )
  return state.variables, [
    {**record, "phase": phase}
    for phase, records in (("impair", history), ("repair", repaired))
    for record in records
  ]


@functools.partial(
  jax.jit, static_argnums=(0, 1), static_argnames=("image_shape", "num_steps")
)
def maximise_error(
  apply_fn: types.ApplyFn,
  optimizer: optax.GradientTransformation,
  variables: types.Variables,
  key: jax.Array,
  labels: jax.Array,
  penalty: jax.Array,
  *,
  image_shape: tuple[int, ...],
  num_steps: int,
) -> jax.Array:
  """Finds images `[N, H, W, C]` on which the model errs most."""

  def loss(noise: jax.Array) -> jax.Array:
    logits = apply_fn(variables, _GREY + _CONTRAST * noise)
    sizes = jnp.square(noise).sum((1, 2, 3))
    losses = steps.cross_entropy(logits, labels)
    return jnp.mean(penalty * sizes - losses)

  def step(_: jax.Array, carry: tuple) -> tuple:
    noise, state = carry
    updates, state = optimizer.update(jax.grad(loss)(noise), state)
    return optax.apply_updates(noise, updates), state

  noise = jax.random.normal(key, (len(labels), *image_shape))
  noise, _ = jax.lax.fori_loop(
    0, num_steps, step, (noise, optimizer.init(noise))
  )
  return _GREY + _CONTRAST * noise


def _impair_loss(
  apply_fn: steps.ApplyFn,
  variables: types.Variables,
  batch: steps.Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, steps.Figures]]:
  """The mean cross-entropy over retain and noise images together."""
  images, labels = context
  num_retain, num_noise = len(batch.images), len(images)
  is_real = jnp.concatenate([batch.weights > 0, jnp.ones(num_noise, bool)])
  joined = steps.Batch(
    images=jnp.concatenate([batch.images, images]),
    targets=jnp.concatenate([batch.targets, labels]),
    weights=is_real / is_real.sum(),
    is_forget=jnp.arange(num_retain + num_noise) >= num_retain,
  )
  loss, (variables, figures) = steps.mean_cross_entropy(
    apply_fn, variables, joined, ()
  )
  return loss, (
    variables,
    {
      "loss": figures["loss"][:num_retain],
      "accuracy": figures["accuracy"][:num_retain],
      "noise_loss": figures["loss"][num_retain:].mean(),
    },
  )
