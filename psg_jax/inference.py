"""One pass of a network over a data set, for everything computed from it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import checks, parallel, streaming, training, types


def predict(
  fn: Callable[[types.Variables, jax.Array], jax.Array],
  variables: types.Variables,
  images: np.ndarray | streaming.Images,
  *,
  batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """Applies a function to all images, in batches of one compiled program.

  Args:
    fn: `Model.apply`, for logits, or `Model.features`.
    variables: The network's variables.
    images: uint8 `[N, H, W, C]`, in memory or on disk.
    batch_size: Images at a time, positive.
    mesh: Devices to cut each batch over; None for one.

  Returns:
    float32 `[N, K]`, or `[N, D]` for features.

  Raises:
    ValueError: If the images are not uint8 `[N, H, W, C]`.
  """
  if images.ndim != 4 or images.dtype != np.uint8:
    raise ValueError(
      "images must be uint8 [N, H, W, C], got"
      f" {images.dtype} {list(images.shape)}"
    )
  checks.integer("batch_size", batch_size, at_least=1)
  batch_size = parallel.padded_size(batch_size, mesh)
  variables = parallel.replicate(variables, mesh)
  outputs = []
  plan = [
    np.arange(start, min(start + batch_size, len(images)))
    for start in range(0, len(images), batch_size)
  ]
  for batch in streaming.batches(images, plan):
    padding = batch_size - len(batch)
    padded = np.pad(batch, ((0, padding), (0, 0), (0, 0), (0, 0)))
    output = _predict(fn, variables, parallel.shard(jnp.asarray(padded), mesh))
    # Kept on the device until the end, so that the next batch need not wait.
    outputs.append(output[: len(batch)])
  if not outputs:
    none = np.zeros(images.shape, np.uint8)
    shape = jax.eval_shape(functools.partial(_predict, fn), variables, none)
    return np.zeros(shape.shape, np.float32)
  return np.concatenate([np.asarray(output) for output in outputs])


@functools.partial(jax.jit, static_argnums=0)
def _predict(
  fn: Callable[[types.Variables, jax.Array], jax.Array],
  variables: types.Variables,
  images: jax.Array,
) -> jax.Array:
  return fn(variables, training.to_float(images))
