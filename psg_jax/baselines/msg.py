"""MSG: weights of small gradients are drawn anew, and learn faster."""

import time
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import batches, checks, last_layers, optimizers, steps, types
from psg_jax.baselines import common, importance

DEFAULTS = {
  "num_epochs": 5,
  "optimizer": optimizers.sgd(1e-3, weight_decay=5e-4),
  "description": "MSG",
}


def msg(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  reset_fraction: float = 0.3,
  kept_rate: float = 0.1,
  layers: Sequence[str] | None = None,
  **options: Any,
) -> common.Output:
  """Draws weights anew that tell the two sets least apart, and finetunes.

      g = ∇_w mean CE(x_R', y_R') - ∇_w mean CE(x_F, y_F)

  at the original weights, with `R'` as many retain images as there are forget
  images. In each convolution the weights of *smallest* `|g|` are drawn anew: on
  them both sets pull alike. All weights are then finetuned on the retain set,
  those that a convolution kept with a tenth of their gradient (weight decay is
  not scaled). The learning rate goes up, pass by pass, until half of the
  passes, and down again, along straight lines.

  The gradients are in inference mode. Biases, normalisation and the head keep
  their weights and have the whole gradient. New weights are those of a new
  network, for a ResNet the authors' He initialisation by fan-out. It is the
  second of the NeurIPS 2023 competition, as benchmarked under this name.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the choice, the new weights and the order.
    reset_fraction: Part of each kernel that is drawn anew, in (0, 1].
    kept_rate: Factor of the gradient of kept weights, 0 or more.
    layers: Prefixes of the paths of parameters, such as `("block_0",)`, whose
      arrays of two axes or more are treated so; None for the kernels of all
      convolutions, the arrays of four axes.
    **options: Those of `engine.Passes`; by default 5 passes over the retain
      set, and SGD with a learning rate of 1e-3, momentum 0.9 and weight decay
      5e-4. `schedule` is by default as above.

  Returns:
    The variables, and the records of `finetune.finetune`, of which the first
    has `num_reset` (weights) and `reset_seconds`, spent before it.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range, or None of
      `layers` is given and there is no convolution.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Cadet et al., Deep Unlearn: Benchmarking Machine Unlearning for Image
    Classification, 2024.
    Triantafillou et al., Are We Making Progress in Unlearning? Findings from
    the First NeurIPS Unlearning Competition, 2024.
  """
  checks.number("reset_fraction", reset_fraction, above=0, at_most=1)
  checks.number("kept_rate", kept_rate, at_least=0)
  passes = common.passes(model, variables, split, key, options, DEFAULTS)
  is_kernel = last_layers.kernels(variables["params"], layers)
  choice_key, init_key, *keys = jax.random.split(key, 4)
  start = time.perf_counter()
  share = len(split.forget) / len(split.retain)
  retain = batches.take_fraction(split.retain, share, choice_key)
  of_retain, of_forget = (
    importance.mean_gradient(
      *(model, variables, part),
      batch_size=passes.batch_size,
      mesh=passes.mesh,
      show_progress=passes.show_progress,
    )
    for part in (retain, split.forget)
  )
  is_new = jax.tree.map(
    lambda x, y, is_reset: smallest(x - y, reset_fraction * is_reset),
    *(of_retain, of_forget, is_kernel),
  )
  fresh = common.fresh_variables(model, split, init_key)["params"]
  params = jax.tree.map(jnp.where, is_new, fresh, variables["params"])
  is_kept = jax.tree.map(lambda new, x: ~new & x, is_new, is_kernel)
  seconds = time.perf_counter() - start
  if options.get("schedule") is None:
    num_steps = -(-len(split.retain) // passes.batch_size)
    passes = passes.replace(schedule=triangle(passes.num_epochs, num_steps))
  output = common.train(
    *(model, {**variables, "params": params}, split, keys, passes),
    plan_fn=batches.retain_only,
    loss_fn=_loss,
    contexts=[(is_kept, jnp.float32(kept_rate))] * passes.num_epochs,
  )
  if output.history:
    num_reset = sum(int(x.sum()) for x in jax.tree.leaves(is_new))
    output.history[0] |= {"num_reset": num_reset, "reset_seconds": seconds}
  return output


def smallest(values: jax.Array, fraction: float) -> jax.Array:
  """Marks the entries of smallest magnitude.

  Args:
    values: An array.
    fraction: How many of its entries, in [0, 1].

  Returns:
    bool, like the values; of equal entries the first are marked.
  """
  sizes = np.abs(np.ravel(values))
  is_small = np.zeros(sizes.size, bool)
  count = round(fraction * sizes.size)
  is_small[np.argsort(sizes, kind="stable")[:count]] = True
  return jnp.asarray(is_small.reshape(np.shape(values)))


def triangle(num_epochs: int, num_steps: int) -> optimizers.Schedule:
  """Returns factors that go up until half of the passes, and down again.

  Args:
    num_epochs: Passes `E`, positive.
    num_steps: Of a pass.

  Returns:
    The factor as a function of the step from 0: in pass `e = 1..E`, with
    `A = (E + 1) // 2`, `e / A` up to `A` and `(E + 1 - e) / (E + 1 - A)` then.
  """
  top = (num_epochs + 1) // 2

  def schedule(step: chex.Numeric) -> chex.Numeric:
    epoch = 1 + step // num_steps
    rest = (num_epochs + 1 - epoch) / (num_epochs + 1 - top)
    return jnp.minimum(epoch / top, rest)

  return schedule


def _loss(
  apply_fn: steps.ApplyFn,
  variables: types.Variables,
  batch: steps.Batch,
  context: tuple[chex.ArrayTree, jax.Array],
) -> tuple[jax.Array, tuple[types.Variables, steps.Figures]]:
  """The mean cross-entropy, of which kept weights have part of the gradient."""
  is_kept, rate = context

  def scale(weight: jax.Array, is_kept: jax.Array) -> jax.Array:
    # The value is the weight's to the last bit; the slope is the rate.
    still = jax.lax.stop_gradient(weight)
    return still + jnp.where(is_kept, rate, 1.0) * (weight - still)

  params = jax.tree.map(scale, variables["params"], is_kept)
  return steps.mean_cross_entropy(
    apply_fn, {**variables, "params": params}, batch, ()
  )
