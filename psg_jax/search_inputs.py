"""What searches across the boundary share: their arguments and output."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import checks, types

_GREY_LEVELS = 255.0


@types.pytree
class SearchOutput:
  """Where the search ended for each image.

  Attributes:
    images: `[B, H, W, C]`, the last point visited, in the image's type and
      units.
    labels: int32 `[B]`, the class reached; where nothing was crossed, the
      runner-up class at the last point.
    logits: float32 `[B, K]` at the last point.
    is_crossed: bool `[B]`, whether the predicted class there differs from the
      label given.
    distance: float32 `[B]`, from the image to the last point, in the norm of
      the search and in pixel units.
    num_steps: int32 `[B]`, steps taken; 0 where the image was already across.
  """

  images: jax.Array
  labels: jax.Array
  logits: jax.Array
  is_crossed: jax.Array
  distance: jax.Array
  num_steps: jax.Array


def check_bounds(bounds: tuple[float, float]) -> None:
  """Raises ValueError unless these are a lowest and a highest pixel value."""
  try:
    low, high = map(float, bounds)
    is_good = math.isfinite(high - low) and low < high
  except (TypeError, ValueError):
    is_good = False
  if not is_good:
    raise ValueError(
      f"bounds must be two numbers, finite and increasing, got {bounds!r}"
    )


def checked(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
  bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[jax.Array, jax.Array]:
  """Returns images and labels as arrays that this network can be asked of."""
  if isinstance(images, np.ndarray):
    # As they are on the device, but where nothing loses a NaN.
    images = images.astype(jax.dtypes.canonicalize_dtype(images.dtype))
  else:
    images = jnp.asarray(images)
  checks.images(images, bounds=bounds)
  num_classes = checks.logits(
    apply_fn, variables, images.shape[1:], images.dtype
  )
  if not isinstance(labels, jax.Array):
    # Before numbers of 64 bits lose half of them.
    labels = np.asarray(labels)
  checks.labels(labels, len(images), num_classes)
  return jnp.asarray(images), jnp.asarray(labels)


def working_type(images: jax.Array) -> jnp.dtype:
  """The images' type, or float32: half precision would lose small steps."""
  return jnp.promote_types(images.dtype, jnp.float32)


def to_type(value: Any, dtype: Any) -> jax.typing.ArrayLike:
  """Makes a number of this type, with no axes, on the host where it is known.

  Else it would change the type of what the loop carries.
  """
  if checks.is_traced(value):
    return jnp.reshape(value, ()).astype(dtype)
  number = np.asarray(value).reshape(())
  if jnp.issubdtype(dtype, jnp.integer):
    number = np.minimum(number, jnp.iinfo(dtype).max)
  # By name, for those who forbid transfers that nobody asked for.
  return jax.device_put(number.astype(dtype))


def sample_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns one key a row, `fold_in(key, row)`.

  A sample's noise then depends on its row alone, not on the batch that it is
  searched in or on the number of devices.
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def keys_of(key: jax.Array, num_images: int) -> jax.Array:
  """Returns one key an image, of one key or as they are."""
  checks.key(key)
  if key.ndim and key.shape != (num_images,):
    raise ValueError(
      f"key must be one key or one an image, got {list(key.shape)} keys for"
      f" {num_images} images"
    )
  return key if key.ndim else sample_keys(key, jnp.arange(num_images))


def on_automatic_axes(
  fn: Callable[..., SearchOutput],
  variables: types.Variables,
  images: jax.Array,
  *others: Any,
) -> SearchOutput:
  """Calls `fn`; on a mesh with Explicit axes the compiler shards the inside.

  The network then need not name the sharding of anything that it computes.
  """
  for leaf in jax.tree.leaves((images, variables, others)):
    mesh = jax.typeof(leaf).sharding.mesh
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
      spec = jax.typeof(images).sharding.spec
      rows = jax.sharding.PartitionSpec(spec[0] if spec else None)
      fn = jax.sharding.auto_axes(
        fn, out_sharding=jax.sharding.NamedSharding(mesh, rows)
      )
      break
  return fn(variables, images, *others)


def round_to_grey_levels(images: jax.Array) -> jax.Array:
  """Rounds pixels in [0, 1] to the values that 8 bits can have."""
  return jnp.round(images * _GREY_LEVELS) / _GREY_LEVELS


def is_zero(value: float | jax.Array) -> bool:
  """Whether a value is known to be 0 when the program is built."""
  return isinstance(value, (int, float)) and value == 0


def at(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Returns `logits[label]`, also where JAX will not gather: sharded arrays."""
  is_label = jnp.arange(len(logits)) == label
  return jnp.where(is_label, logits, 0).sum()
