"""Fisher forgetting: noise on weights that the retain set does not need."""

import time

import jax
import jax.numpy as jnp

from psg_jax import checks, engine, types
from psg_jax.baselines import common, importance

# Keeps the inverse finite where a weight has no influence.
_FLOOR = 1e-8


def fisher(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  noise_scale: float = 1e-6,
  power: float = 1.0,
  max_inverse: float = 1e3,
  batch_size: int = 64,
  callback: engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> common.Output:
  """Adds Gaussian noise along the directions that do not hurt the retain set.

      w_i ← w_i + sqrt(α min((F_i + 1e-8)^-p, c)) n_i,   n ~ N(0, I)

  with `F` the diagonal of the Fisher information of the original model on the
  retain set, in the mean over the model's own predictions. The released code
  has `p = 1`, and so have the published values of `α`; the paper's equation
  (noise that goes with `F^-1/4`) is `p = 0.5`. The released code besides
  averages the variance over input channels, raises it for normalisation and
  for the last layer, and sets the forgotten class's weights to zero; all
  weights are treated alike here. Statistics of normalisation stay as they are.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the noise.
    noise_scale: `α`, 0 or more.
    power: `p`, positive.
    max_inverse: `c`, positive.
    batch_size: Images read at a time, positive.
    callback: Called once, with a state and the record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The variables, and one record: `epoch` 1, `mean_noise` (the mean standard
    deviation of the noise) and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If a gradient is NaN or infinite.

  References:
    Golatkar et al., Eternal Sunshine of the Spotless Net: Selective Forgetting
    in Deep Networks, 2020.
  """
  checks.number("noise_scale", noise_scale, at_least=0)
  checks.number("power", power, above=0)
  checks.number("max_inverse", max_inverse, above=0)
  checks.integer("batch_size", batch_size, at_least=1)
  common.check(model, variables, split, key)
  start = time.perf_counter()
  information = importance.fisher(
    model,
    variables,
    split.retain,
    is_expected=True,
    batch_size=batch_size,
    mesh=mesh,
    show_progress=show_progress,
  )
  deviations = jax.tree.map(
    lambda x: jnp.sqrt(
      noise_scale * jnp.minimum((x + _FLOOR) ** -power, max_inverse)
    ),
    information,
  )
  leaves, structure = jax.tree.flatten(variables["params"])
  keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
  params = jax.tree.map(
    lambda x, scale, key: x + scale * jax.random.normal(key, x.shape, x.dtype),
    variables["params"],
    deviations,
    keys,
  )
  scales = jax.tree.leaves(deviations)
  total = sum(float(x.sum()) for x in scales)
  record = {
    "epoch": 1,
    "mean_noise": total / sum(x.size for x in scales),
    "seconds": time.perf_counter() - start,
  }
  return common.finish(variables, params, key, record, callback)
