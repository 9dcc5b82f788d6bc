"""Selective synaptic dampening: shrinks weights, and trains nothing."""

import time

import jax
import jax.numpy as jnp

from psg_jax import checks, engine, types
from psg_jax.baselines import common, importance


def ssd(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  selection_weight: float = 10.0,
  dampening: float = 1.0,
  reference: str = "all",
  batch_size: int = 64,
  callback: engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> common.Output:
  """Dampens the weights that matter to the forget set beyond proportion.

      w_i ← β_i w_i   where I_F,i > α I_D,i,   β_i = min(λ I_D,i / I_F,i, 1)

  with the importance `I` the mean squared gradient of the log-likelihood of
  single images, the diagonal of the empirical Fisher information, in inference
  mode. (The released code squares the gradients of whole batches.) Statistics
  of normalisation stay as they are. With `"all"` a forget set of more than
  `1 / α` of the images has no weight chosen, since then `I_F ≤ α I_D`.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key; nothing is drawn.
    selection_weight: `α`, 0 or more.
    dampening: `λ`, 0 or more.
    reference: `D`: `"all"`, both sets, as in the paper, or `"retain"`.
    batch_size: Images read at a time, positive.
    callback: Called once, with a state and the record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The variables, and one record: `epoch` 1, `num_dampened` (of the weights),
    `dampened_fraction` and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If a gradient is NaN or infinite.

  References:
    Foster et al., Fast Machine Unlearning Without Retraining Through Selective
    Synaptic Dampening, 2024.
  """
  checks.number("selection_weight", selection_weight, at_least=0)
  checks.number("dampening", dampening, at_least=0)
  checks.one_of("reference", reference, ("all", "retain"))
  checks.integer("batch_size", batch_size, at_least=1)
  common.check(model, variables, split, key)
  start = time.perf_counter()
  forget, retain = (
    importance.fisher(
      model,
      variables,
      part,
      is_expected=False,
      batch_size=batch_size,
      mesh=mesh,
      show_progress=show_progress,
    )
    for part in split
  )
  whole = retain
  if reference == "all":
    share = len(split.forget) / (len(split.forget) + len(split.retain))
    whole = jax.tree.map(
      lambda x, y: share * x + (1 - share) * y, forget, retain
    )
  is_chosen = jax.tree.map(lambda x, y: x > selection_weight * y, forget, whole)

  def dampen(
    weight: jax.Array, is_chosen: jax.Array, of: jax.Array, by: jax.Array
  ) -> jax.Array:
    # Where nothing was chosen the forget set's importance may be 0.
    ratio = dampening * by / jnp.where(is_chosen, of, 1.0)
    return jnp.where(is_chosen, jnp.minimum(ratio, 1.0) * weight, weight)

  params = jax.tree.map(dampen, variables["params"], is_chosen, forget, whole)
  num_dampened = sum(int(x.sum()) for x in jax.tree.leaves(is_chosen))
  num_weights = sum(x.size for x in jax.tree.leaves(params))
  record = {
    "epoch": 1,
    "num_dampened": num_dampened,
    "dampened_fraction": num_dampened / num_weights,
    "seconds": time.perf_counter() - start,
  }
  return common.finish(variables, params, key, record, callback)
