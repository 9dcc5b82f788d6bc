"""Work on several devices: a one-axis mesh over the batch.

The search is mapped with `jax.shard_map`, so that each device stops when its
own samples are done; training and updates are `jit` programs whose batch is
sharded and whose variables are replicated. What `jax.pmap` would do is, since
JAX 0.10, the same thing in maintenance mode.
"""

import functools
from typing import Any

import chex
import jax
import numpy as np

from psg_jax import boundary, checks, types

BATCH_AXIS = "batch"
_P = jax.sharding.PartitionSpec


def create_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
  """Builds the mesh of the first devices of this machine.

  Args:
    num_devices: How many devices to use; None for all.

  Returns:
    A mesh with the axis `"batch"`.

  Raises:
    ValueError: If there are not so many devices.
  """
  devices = jax.devices()
  if num_devices is None:
    num_devices = len(devices)
  checks.integer("num_devices", num_devices, at_least=1)
  if num_devices > len(devices):
    raise ValueError(
      f"num_devices must be at most the {len(devices)} devices there are, got"
      f" {num_devices}"
    )
  return jax.sharding.Mesh(
    np.asarray(devices[:num_devices]),
    (BATCH_AXIS,),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


@functools.lru_cache
def _batch_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """Returns the devices of any mesh as one Auto axis over the batch.

  `jax.make_mesh` makes Explicit axes, on which every gather of the network
  would have to name its sharding.
  """
  return jax.sharding.Mesh(
    mesh.devices.reshape(-1),
    (BATCH_AXIS,),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def size(mesh: jax.sharding.Mesh | None) -> int:
  """Returns the number of devices; 1 without a mesh."""
  return 1 if mesh is None else mesh.size


def free_bytes(mesh: jax.sharding.Mesh | None) -> int | None:
  """Returns the memory free on the first device; None where it does not say."""
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  stats = device.memory_stats()
  if not stats or "bytes_limit" not in stats:
    return None
  return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def padded_size(num_rows: int, mesh: jax.sharding.Mesh | None) -> int:
  """Returns the next size from `num_rows` up that the devices divide."""
  return -(-num_rows // size(mesh)) * size(mesh)


def replicate(
  tree: chex.ArrayTree, mesh: jax.sharding.Mesh | None
) -> chex.ArrayTree:
  """Puts a copy of every array on each device; as it is without a mesh."""
  if mesh is None:
    return tree
  return jax.device_put(
    tree, jax.sharding.NamedSharding(_batch_mesh(mesh), _P())
  )


def shard(
  tree: chex.ArrayTree, mesh: jax.sharding.Mesh | None, *, axis: int = 0
) -> chex.ArrayTree:
  """Cuts every array along `axis` over the devices, which must divide it."""
  if mesh is None:
    return tree
  spec = _P(*([None] * axis), BATCH_AXIS)
  return jax.device_put(
    tree, jax.sharding.NamedSharding(_batch_mesh(mesh), spec)
  )


def search(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
  *,
  mesh: jax.sharding.Mesh | None = None,
  search: boundary.Search | None = None,
  **options: Any,
) -> boundary.SearchOutput:
  """Runs `boundary.search` over the devices of a mesh.

  The batch is padded to a size that the devices divide with its first images,
  whose results are dropped; each device leaves its loop when its own images
  are done. The result equals that of one device.

  Args:
    apply_fn: As for `boundary.search`, and so are the following.
    variables: The network's variables.
    images: float `[B, H, W, C]`.
    labels: int `[B]`.
    key: One typed key or one an image.
    mesh: The devices, of whatever axes; None for all there are.
    search: The options as one value; None for those that follow.
    **options: Those of `boundary.Search`.

  Returns:
    The points reached, `[B, ...]`, sharded where `B` divides evenly.

  Raises:
    ValueError: As `boundary.search`, which checks the arguments.
  """
  mesh = create_mesh() if mesh is None else _batch_mesh(mesh)
  # Inside the mapped program values are traced and escape these checks.
  search = boundary.Search(**options) if search is None else search
  prepared = search.prepare(apply_fn, variables, images, labels, key)
  num_rows = len(prepared.labels)
  batch = (prepared.images, prepared.labels, prepared.keys)
  rows = np.resize(np.arange(num_rows), padded_size(num_rows, mesh))
  if len(rows) > num_rows:
    # What comes sharded cannot always be gathered as it lies.
    batch = jax.tree.map(lambda x: x[rows], replicate(batch, mesh))
  output = _sharded_search(
    apply_fn,
    replicate(variables, mesh),
    *shard(batch, mesh),
    replicate(prepared.search, mesh),
    mesh=mesh,
  )
  if len(rows) == num_rows:
    return output
  return jax.tree.map(lambda x: x[:num_rows], output)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh")
def _sharded_search(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
  keys: jax.Array,
  search: boundary.Search,
  *,
  mesh: jax.sharding.Mesh,
) -> boundary.SearchOutput:
  mapped = jax.shard_map(
    functools.partial(boundary.search_batch, apply_fn),
    mesh=mesh,
    in_specs=(_P(), _P(BATCH_AXIS), _P(BATCH_AXIS), _P(BATCH_AXIS), _P()),
    out_specs=_P(BATCH_AXIS),
    check_vma=False,
  )
  return mapped(variables, images, labels, keys, search)
