"""One pass of a network over a data set, for everything computed from it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import checks, parallel, steps, streaming, types


def predict_both(
  model: types.Model,
  variables: types.Variables,
  images: np.ndarray | streaming.Images,
  *,
  batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Computes logits and penultimate features in one pass.

  Args:
    model: The network.
    variables: Its variables.
    images: uint8 `[N, H, W, C]`, in memory or on disk.
    batch_size: Images at a time, positive.
    mesh: Devices to cut each batch over; None for one.

  Returns:
    Logits, float32 `[N, K]`, and features, float32 `[N, D]`.

  Raises:
    ValueError: If the images are not uint8 `[N, H, W, C]`.
  """
  both: tuple[np.ndarray, np.ndarray] = predict(
    logits_and_features(model),
    variables,
    images,
    batch_size=batch_size,
    mesh=mesh,
  )
  return both


@functools.lru_cache(maxsize=128)
def logits_and_features(model: types.Model) -> Callable[..., Any]:
  """The same function each time: compiled programs are found again by it."""

  def both(
    variables: types.Variables, images: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    # The compiler computes what they have in common once.
    return model.apply(variables, images), model.features(variables, images)

  return both


def predict(
  fn: Callable[[types.Variables, jax.Array], Any],
  variables: types.Variables,
  images: np.ndarray | streaming.Images,
  *,
  batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
) -> Any:
  """Applies a function to all images, in batches of one compiled program.

  Args:
    fn: `Model.apply`, for logits, `Model.features`, or another function to an
      array `[B, ...]` or a pytree of such.
    variables: The network's variables.
    images: uint8 `[N, H, W, C]`, in memory or on disk.
    batch_size: Images at a time, positive.
    mesh: Devices to cut each batch over; None for one.

  Returns:
    float32 `[N, K]`, or `[N, D]` for features; a pytree where `fn` returns one.

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
    outputs.append(_rows(output, len(batch)))
  if not outputs:
    # Networks need not take a batch of none.
    one = np.zeros((1, *images.shape[1:]), np.uint8)
    shapes = jax.eval_shape(functools.partial(_predict, fn), variables, one)
    return jax.tree.map(
      lambda x: np.zeros((0, *x.shape[1:]), np.float32), shapes
    )
  return jax.tree.map(
    lambda *parts: np.concatenate([np.asarray(part) for part in parts]),
    *outputs,
  )


def _rows(tree: Any, count: int) -> Any:
  return jax.tree.map(lambda x: x[:count], tree)


@functools.partial(jax.jit, static_argnums=0)
def _predict(
  fn: Callable[[types.Variables, jax.Array], Any],
  variables: types.Variables,
  images: jax.Array,
) -> Any:
  return fn(variables, steps.to_float(images))
