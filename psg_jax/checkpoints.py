"""Checkpoints of any pytree, restored to the bit.

Orbax stays inside this module. It writes the arrays; beside them goes a list of
all leaves with path, type and shape, against which a target is checked before
anything is read, since Orbax itself casts silently where types differ, and with
a digest of the values, since it keeps none. Typed keys are stored as their data
and made anew, Python numbers as text.

A checkpoint is written beside its place and renamed. What a killed process has
left there is found by all that read, and cleared away by the next `save`.
"""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from psg_jax import checks

_FORMAT = 2
_FORMATS = (1, _FORMAT)  # The first had no digests.
_MARKER = "orbax.checkpoint"
_EMPTY = {"empty": np.zeros(1, np.uint8)}  # Orbax takes no empty tree.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_BESIDE = re.compile(r"^\.(.*)\.(?:saving|replaced)$")
_SCALARS: dict[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
  "bool": (lambda value: "01"[value], lambda text: text == "1"),
  "int": (str, int),
  "float": (float.hex, float.fromhex),
  "str": (str, str),
}
_DTYPES = {
  "bool",
  *(f"{sign}int{size}" for sign in ("", "u") for size in (4, 8, 16, 32, 64)),
  *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
  *("float8_e4m3fn", "float8_e5m2"),
}


class _Leaf(NamedTuple):
  """What is known of a leaf without its values.

  Attributes:
    path: One text for each level.
    kind: `"array"`, `"key"` or the name of a Python type.
    dtype: Name of the element type, `""` for a Python scalar.
    shape: Shape; of a key array without the lengths of the keys' own data.
    container: `"jax"`, `"numpy"`, `"scalar"` (of NumPy) or `"python"`.
    value: A key's implementation, the text of a Python scalar, else `""`.
    digest: Of the stored values; `""` where there are none, and of an array
      whose parts are spread over several processes.
  """

  path: tuple[str, ...]
  kind: str
  dtype: str
  shape: tuple[int, ...]
  container: str
  value: str = ""
  digest: str = ""

  @property
  def name(self) -> str:
    return "/".join(self.path) or "the state itself"

  @property
  def stored_name(self) -> str:
    """A flat name; Orbax takes dots for levels and would mix leaves up."""
    parts = [urllib.parse.quote(part, safe="") for part in self.path]
    return "/".join(parts).replace(".", "%2E") or "state"

  @property
  def is_stored(self) -> bool:
    """Whether Orbax holds values; it does not take arrays without elements."""
    return self.container != "python" and 0 not in self.shape

  def __str__(self) -> str:
    if self.container == "python":
      return f"a Python {self.kind}"
    return f"{self.dtype} {list(self.shape)}"


def save(
  path: str | os.PathLike[str],
  state: chex.ArrayTree,
  *,
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a checkpoint; it appears whole or not at all.

  Call it on all processes of a distributed program.

  Args:
    path: The folder to make, on a local or shared disk.
    state: A pytree of JAX and NumPy arrays, typed keys, and Python `bool`,
      `int`, `float` and `str`. Sharded arrays are written in parts.
    metadata: What JSON can hold, for `metadata` to give back.
    overwrite: Whether a checkpoint at `path` may be replaced; it is removed
      only after the new one is complete.

  Raises:
    ValueError: If a leaf cannot be stored, two leaves have one path, the
      metadata is not JSON, or the path exists already.
  """
  folder = _absolute(path)
  leaves, values = _describe(state, "state")
  try:
    user = json.loads(json.dumps(dict(metadata or {})))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"metadata must be what JSON can hold, got {metadata!r}: {error}"
    ) from None
  start = f"path {str(folder)!r}"
  if overwrite and folder.exists() and not _is_checkpoint(folder):
    raise ValueError(f"{start} is not a checkpoint and is not overwritten")
  is_taken = folder.exists() or _is_checkpoint(_beside(folder, "replaced"))
  if is_taken and not overwrite:
    raise ValueError(f"{start} exists already (overwrite=True replaces it)")
  arrays = {
    leaf.stored_name: _to_stored(leaf, value)
    for leaf, value in zip(leaves, values, strict=True)
    if leaf.is_stored
  }
  digests = {name: _digest(value) for name, value in arrays.items()}
  content: dict[str, Any] = {"psg_jax": _FORMAT, "metadata": user}
  content["leaves"] = [
    [*leaf[:-1], digests.get(leaf.stored_name, "")] for leaf in leaves
  ]
  content["digest"] = _content_digest(content)
  _write(folder, arrays or _EMPTY, content)


def restore(
  path: str | os.PathLike[str], *, target: chex.ArrayTree | None = None
) -> chex.ArrayTree:
  """Reads a checkpoint.

  Args:
    path: What `save` was given.
    target: A pytree of the same structure, whose leaves may be
      `jax.ShapeDtypeStruct`s. Its arrays say where the values go: JAX arrays
      onto their sharding, NumPy arrays into NumPy.

  Returns:
    The state as it was saved, in the containers of the target. Without a
    target it consists of dictionaries with text as keys, for any container,
    and JAX arrays are on the default device.

  Raises:
    ValueError: If there is no checkpoint or it is damaged, or if a leaf is
      missing, surplus, of another type or shape than the target's, or of other
      values than were saved; the line names the first such leaf.
  """
  folder = _find(_absolute(path))
  leaves = [
    _Leaf(tuple(path), kind, dtype, tuple(shape), *rest)
    for path, kind, dtype, shape, *rest in _content(folder)["leaves"]
  ]
  placed, places = leaves, [None] * len(leaves)
  if target is not None:
    placed, places = _describe(target, "target")
    _check_same(folder, leaves, placed)
    # Flattening orders leaves by container; the list is in the saved order.
    saved = {leaf.path: leaf for leaf in leaves}
    leaves = [saved[leaf.path] for leaf in placed]
  abstract = {
    leaf.stored_name: _abstract(leaf, place.container, like)
    for leaf, place, like in zip(leaves, placed, places, strict=True)
    if leaf.is_stored
  }
  with _reading(folder):
    arrays = ocp.load(folder, abstract or _EMPTY)
  _check_values(folder, leaves, arrays)
  values = [
    _from_stored(leaf, place.container, like, arrays.get(leaf.stored_name))
    for leaf, place, like in zip(leaves, placed, places, strict=True)
  ]
  if target is not None:
    return jax.tree.unflatten(jax.tree.structure(target), values)
  return _nest(leaves, values)


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the metadata that `save` was given; empty where there was none.

  Raises:
    ValueError: If there is no checkpoint, or it is damaged.
  """
  return _content(_find(_absolute(path)))["metadata"]


def exists(path: str | os.PathLike[str]) -> bool:
  """Whether `restore` would find a checkpoint."""
  return _is_checkpoint(_find(_absolute(path)))


def has_any(folder: str | os.PathLike[str]) -> bool:
  """Whether a checkpoint lies anywhere in a folder."""
  return any(_absolute(folder, "folder").rglob(_MARKER))


def remove(
  path: str | os.PathLike[str], *, is_missing_ok: bool = False
) -> None:
  """Removes a checkpoint; it goes whole, as it came.

  Args:
    path: What `save` was given.
    is_missing_ok: Whether there may be none; what a killed process has left of
      one is cleared away all the same.

  Raises:
    ValueError: If there is no checkpoint.
  """
  folder = _absolute(path)
  if not (exists(folder) or is_missing_ok):
    raise ValueError(f"path must be a checkpoint, got {str(folder)!r}")
  _barrier(f"{folder}: found")
  if jax.process_index() == 0:
    _tidy(folder)
    if _is_checkpoint(folder):
      _delete(folder, folder)
  _barrier(f"{folder}: removed")


def run_checkpoints(
  run_dir: str | os.PathLike[str],
) -> dict[str, pathlib.Path]:
  """Returns name and path of the checkpoints in the folder of a run.

  Raises:
    ValueError: If there is no such folder.
  """
  folder = _absolute(run_dir, "run_dir") / "checkpoints"
  if not folder.parent.is_dir():
    raise ValueError(f"run_dir must be a folder, got {str(folder.parent)!r}")
  markers = folder.glob(f"*/{_MARKER}")
  names = {_BESIDE.sub(r"\1", marker.parent.name) for marker in markers}
  return {
    name: _find(folder / name)
    for name in sorted(names)
    if _NAME.fullmatch(name)
  }


def save_run(
  run_dir: str | os.PathLike[str],
  name: str,
  state: chex.ArrayTree,
  *,
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> pathlib.Path:
  """Saves a checkpoint in the folder of a run and returns its path.

  Args:
    run_dir: Folder of the run, made if it is missing.
    name: Such as `"original"`, `"retrained"` or `"unlearned"`.
    state: As in `save`.
    metadata: As in `save`.
    overwrite: As in `save`.

  Raises:
    ValueError: As in `save`, or if the name is not letters, digits, `_`, `-`
      and `.`.
  """
  if not _NAME.fullmatch(name):
    raise ValueError(
      f"name must consist of letters, digits, '_', '-' and '.', got {name!r}"
    )
  path = _absolute(run_dir, "run_dir") / "checkpoints" / name
  save(path, state, metadata=metadata, overwrite=overwrite)
  return path


def restore_run(
  run_dir: str | os.PathLike[str],
  name: str,
  *,
  target: chex.ArrayTree | None = None,
) -> chex.ArrayTree:
  """Restores a checkpoint from the folder of a run, as `restore` does.

  Raises:
    ValueError: As in `restore`; for an unknown name, with those that exist.
  """
  paths = run_checkpoints(run_dir)
  if not paths:
    raise ValueError(f"run_dir {str(run_dir)!r} has no checkpoints")
  checks.one_of("name", name, paths)
  return restore(paths[name], target=target)


def _absolute(
  path: str | os.PathLike[str], argument: str = "path"
) -> pathlib.Path:
  text = os.fspath(path)
  if not text or "://" in text:
    raise ValueError(f"{argument} must be a folder on a disk, got {text!r}")
  return pathlib.Path(os.path.abspath(text))


def _describe(
  tree: chex.ArrayTree, argument: str
) -> tuple[list[_Leaf], list[Any]]:
  """Lists the leaves of a tree, with their values."""
  if checks.is_traced(tree):
    raise ValueError(f"{argument} must hold values, got arrays being traced")
  leaves: dict[tuple[str, ...], _Leaf] = {}
  entries = jax.tree_util.tree_leaves_with_path(tree)
  for keys, value in entries:
    path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    leaf = _describe_leaf(path, value, argument)
    if leaves.setdefault(path, leaf) is not leaf:
      raise ValueError(f"{argument} has two leaves with the path {leaf.name}")
  return list(leaves.values()), [value for _, value in entries]


def _describe_leaf(path: tuple[str, ...], value: Any, argument: str) -> _Leaf:
  kind = type(value).__name__
  if type(value) in (bool, int, float, str):
    return _Leaf(path, kind, "", (), "python", _SCALARS[kind][0](value))
  if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
    container = "jax"
  elif isinstance(value, (np.ndarray, np.generic)):
    container = "numpy" if isinstance(value, np.ndarray) else "scalar"
  else:
    name = "/".join(path) or "the state itself"
    raise ValueError(
      f"{argument} must hold arrays, keys and Python scalars, got {kind} at"
      f" {name}"
    )
  shape = tuple(value.shape)
  if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    is_key = isinstance(value, jax.Array)
    impl = str(jax.random.key_impl(value)) if is_key else ""
    return _Leaf(path, "key", str(value.dtype), shape, container, impl)
  leaf = _Leaf(path, "array", np.dtype(value.dtype).name, shape, container)
  if leaf.dtype not in _DTYPES or not np.dtype(value.dtype).isnative:
    raise ValueError(
      f"{argument} must hold numbers in this machine's byte order, got"
      f" {value.dtype} at {leaf.name}"
    )
  return leaf


def _check_same(
  folder: pathlib.Path, saved: list[_Leaf], target: list[_Leaf]
) -> None:
  """Raises ValueError for the first leaf in which the target differs."""
  have, want = ({x.path: x for x in leaves} for leaves in (saved, target))
  start = f"path {str(folder)!r} does not match target: "
  for leaf in target:
    stored = have.get(leaf.path)
    if stored is None:
      raise ValueError(f"{start}it has no leaf {leaf.name}, due as {leaf}")
    if str(leaf) != str(stored):
      raise ValueError(f"{start}leaf {leaf.name} is {stored}, due as {leaf}")
  for leaf in saved:
    if leaf.path not in want:
      raise ValueError(f"{start}it has a leaf {leaf.name} too much, {leaf}")


def _to_stored(leaf: _Leaf, value: Any) -> jax.Array | np.ndarray:
  if leaf.kind == "key":
    return jax.random.key_data(value)
  return value if leaf.container == "jax" else np.asarray(value)


def _abstract(leaf: _Leaf, container: str, like: Any) -> Any:
  """Says to Orbax what to read and where to put it."""
  if leaf.kind == "key":
    key = jax.eval_shape(lambda: jax.random.key(0, impl=leaf.value))
    data = jax.eval_shape(jax.random.key_data, key)
    return np.empty((*leaf.shape, *data.shape), data.dtype)
  dtype = jnp.dtype(leaf.dtype)
  if container == "jax" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError(
      f"path has a leaf {leaf.name}, {leaf}, that JAX cannot hold: 64-bit types"
      " are disabled (jax_enable_x64)"
    )
  sharding = _sharding(like) if container == "jax" else None
  if sharding is None:
    return np.empty(leaf.shape, dtype)
  return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _sharding(like: Any) -> jax.sharding.Sharding | None:
  """Where the target wants an array; None if JAX may move it as needed.

  The sharding in the checkpoint is no answer: its devices may not be there.
  """
  is_placed = getattr(like, "committed", True)
  return getattr(like, "sharding", None) if is_placed else None


def _from_stored(leaf: _Leaf, container: str, like: Any, stored: Any) -> Any:
  """Makes a leaf from what Orbax gave, in the container asked for."""
  if container == "python":
    return _SCALARS[leaf.kind][1](leaf.value)
  if stored is None:
    expected = _abstract(leaf, container, like)
    stored = np.empty(expected.shape, expected.dtype)
  if leaf.kind == "key":
    stored = jax.random.wrap_key_data(jnp.asarray(stored), impl=leaf.value)
  if str(stored.dtype) != leaf.dtype or stored.shape != leaf.shape:
    raise ValueError(
      f"path has a damaged leaf {leaf.name}: it is {stored.dtype}"
      f" {list(stored.shape)}, listed as {leaf}"
    )
  if container in ("scalar", "numpy"):
    return stored[()] if container == "scalar" else stored
  sharding = _sharding(like)
  # Arrays with a sharding came onto it as they were read; this is for others.
  return jax.device_put(stored, sharding) if sharding else jnp.asarray(stored)


def _nest(leaves: list[_Leaf], values: list[Any]) -> chex.ArrayTree:
  """Puts leaves into dictionaries of dictionaries by their paths."""
  root: dict[str, Any] = {}
  for leaf, value in zip(leaves, values, strict=True):
    node = root
    # The state itself, where it is a leaf, has no path.
    *parts, last = ("", *leaf.path)
    for part in parts:
      node = node.setdefault(part, {})
    node[last] = value
  return root.get("", {})


def _write(
  folder: pathlib.Path, arrays: dict[str, Any], content: dict[str, Any]
) -> None:
  """Writes beside `folder`, then renames.

  Orbax's own `overwrite` removes the old checkpoint first, and a failure while
  writing would leave neither.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  staging, replaced = _beside(folder, "saving"), _beside(folder, "replaced")
  if jax.process_index() == 0:
    _tidy(folder)
  _barrier(f"{folder}: cleaned")
  try:
    _save(folder, staging, arrays, content)
    _barrier(f"{folder}: written")
    if jax.process_index() == 0:
      if folder.exists():
        os.rename(folder, replaced)
      os.rename(staging, folder)
      _tidy(folder)
  except BaseException:
    if jax.process_index() == 0:
      _delete(folder, staging)
      _tidy(folder)
    raise
  _barrier(f"{folder}: complete")


def _save(
  folder: pathlib.Path,
  staging: pathlib.Path,
  arrays: dict[str, Any],
  content: dict[str, Any],
) -> None:
  try:
    ocp.save(staging, arrays, custom_metadata=content)
  # What a disk that is full or read-only makes Orbax raise is open-ended, and
  # need not name the file.
  except Exception as error:
    line = " ".join(str(error).split())[:300]
    raise OSError(f"path {str(folder)!r} cannot be written: {line}") from error


def _beside(folder: pathlib.Path, step: str) -> pathlib.Path:
  """Where a checkpoint is before or after its time at `folder`.

  Args:
    folder: The checkpoint's own place.
    step: `"saving"`, which Orbax makes by renaming what is complete;
      `"replaced"`, the one of before; `"removed"`, which nobody wants.
  """
  return folder.with_name(f".{folder.name}.{step}")


def _is_checkpoint(folder: pathlib.Path) -> bool:
  return (folder / _MARKER).is_file()


def _find(folder: pathlib.Path) -> pathlib.Path:
  """Returns where the checkpoint of a path is; the path where there is none.

  It is beside its place if the process was killed between two renames.
  """
  places = (folder, *(_beside(folder, x) for x in ("saving", "replaced")))
  return next(filter(_is_checkpoint, places), folder)


def _tidy(folder: pathlib.Path) -> None:
  """Moves a checkpoint to its place, and clears away what is beside it."""
  if not folder.exists() and (place := _find(folder)) != folder:
    os.rename(place, folder)
  for step in ("saving", "replaced", "removed"):
    _delete(folder, _beside(folder, step))
  # Orbax works in a folder with this beginning.
  start = glob.escape(f"{_beside(folder, 'saving').name}.")
  for leftover in list(folder.parent.glob(f"{start}*")):
    shutil.rmtree(leftover, ignore_errors=True)


def _delete(folder: pathlib.Path, place: pathlib.Path) -> None:
  """Removes a folder whole, so that no half of it is taken for a checkpoint."""
  removed = _beside(folder, "removed")
  shutil.rmtree(removed, ignore_errors=True)
  if place.exists():
    os.rename(place, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _digest(value: jax.Array | np.ndarray) -> str:
  """Digest of bytes, type and shape; `""` where the values are not all here."""
  if isinstance(value, jax.Array) and not (
    value.is_fully_addressable or value.is_fully_replicated
  ):
    return ""
  array = np.asarray(value)
  # Types that are not NumPy's own do not lend their bytes.
  flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return _hash(f"{array.dtype.name} {array.shape}", flat.data)


def _content_digest(content: Mapping[str, Any]) -> str:
  return _hash(json.dumps(content, sort_keys=True))


def _hash(text: str, data: bytes | memoryview = b"") -> str:
  result = hashlib.blake2b(text.encode(), digest_size=16)
  result.update(data)
  return result.hexdigest()


def _check_values(
  folder: pathlib.Path, leaves: list[_Leaf], arrays: Mapping[str, Any]
) -> None:
  """Raises ValueError for the first leaf that is not what was saved."""
  for leaf in leaves:
    stored = arrays.get(leaf.stored_name) if leaf.digest else None
    if stored is not None and _digest(stored) not in ("", leaf.digest):
      raise _damaged(folder, f"leaf {leaf.name} is not what was saved")


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _content(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the list of leaves and the user's metadata."""
  if not _is_checkpoint(folder):
    raise ValueError(f"path must be a checkpoint, got {str(folder)!r}")
  with _reading(folder):
    content = ocp.metadata(folder).custom_metadata
  if not isinstance(content, dict) or content.get("psg_jax") not in _FORMATS:
    raise ValueError(
      f"path must be a checkpoint written by psg_jax, got {str(folder)!r}"
    )
  digest = content.pop("digest", None)
  if content["psg_jax"] == _FORMAT and digest != _content_digest(content):
    what = "its list of leaves or its metadata"
    raise _damaged(folder, f"{what} is not what was saved")
  return content


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
  """Gives what Orbax raises of damaged files, which is open-ended, one form."""
  try:
    yield
  except Exception as error:
    raise _damaged(folder, error) from None


def _damaged(folder: pathlib.Path, error: Exception | str) -> ValueError:
  line = " ".join(str(error).split())[:300]
  return ValueError(f"path {str(folder)!r} is a damaged checkpoint: {line}")
