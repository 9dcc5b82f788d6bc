"""PyTorch state dicts as variables of our networks, and back.

PyTorch itself is not needed, and no code in a file is ever run. A network is
found in a file by its own keys, wherever they are and whatever stands beside.
"""

import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from psg_jax import checks, torch_files, torch_layouts, torch_pickles, types

_SHORT = ("float16", "bfloat16")
_FLOATS = (*_SHORT, "float32", "float64")
_MAX_COUNT = np.iinfo(np.int32).max


def load(path: str | os.PathLike[str], *, model_name: str) -> types.Variables:
  """Reads a PyTorch state dict as variables.

  float32 and float64 keep their bits, shorter types are widened to the float32
  that the networks compute in; `save`, told to write `like` the file, gives
  back the same state dict. The keys are those of the paper's released code for
  the All-CNN and torchvision's for the ResNets, under whatever prefix all of
  them have (`module.`, `_orig_mod.`, `model.`), in whatever dictionary of the
  file (`state_dict`, `model`, `ema`); what stands beside is left aside, and
  `describe` names it. The head may be the only linear layer of an
  `nn.Sequential` (`fc.1.weight` for `fc.weight`). Where no layer has a
  `num_batches_tracked`, as in files from before PyTorch 0.4.1, all are 0.

  Args:
    path: A file of `torch.save` or of safetensors, under any name. No code in
      it is run.
    model_name: As in `models.create`.

  Returns:
    Collections `"params"` and `"batch_stats"`, as `models.create` makes them.
    Arrays are on the default device; float64 stays in NumPy unless JAX has
    64-bit types enabled, which would otherwise lose bits.

  Raises:
    ValueError: If the file or the name is unknown, the file holds no state dict
      of this network or several, or if an entry is missing, surplus, of the
      wrong type or of the wrong shape, or has NaN or infinite values.
  """
  weights = torch_layouts.find(path, model_name)
  entries = torch_layouts.spelled(
    torch_layouts.layout(model_name), weights.spelling
  )
  return _variables(path, model_name, entries, weights)


def describe(path: str | os.PathLike[str], *, model_name: str) -> str:
  """Says what `load` takes from a file, and what it leaves aside.

  Args:
    path: As for `load`.
    model_name: As in `models.create`.

  Returns:
    One line.

  Raises:
    ValueError: As `load`, as far as names go.
  """
  weights = torch_layouts.find(path, model_name)
  kinds = {tensor.dtype for tensor in weights.tensors.values()}
  short = [name for name in _SHORT if name in kinds]
  parts = [f"{len(weights.tensors)} entries of {model_name!r}"]
  if torch_layouts.place_name(weights):
    parts.append(f"found as {torch_layouts.place_name(weights)!r}")
  if short:
    parts.append(f"{' and '.join(short)} read as float32")
  if weights.left:
    parts.append(f"left aside: {checks.few(weights.left)}")
  return f"{path}: {'; '.join(parts)}"


def load_backbone(
  path: str | os.PathLike[str],
  variables: types.Variables,
  *,
  model_name: str,
) -> types.Variables:
  """Reads all but the head from a PyTorch state dict.

  For weights learned on other classes, such as torchvision's of ImageNet.

  Args:
    path: As for `load`; the file may have any head or none.
    variables: As `models.create` makes them; they give the head, and the shape
      and type of every array.
    model_name: As in `models.create`.

  Returns:
    Variables with the head of `variables` and the rest of the file, converted
    to the types of `variables`.

  Raises:
    ValueError: As `load`, and if an array differs from that of `variables` in
      shape, or the variables are not those of the network. If there is no such
      file, the line says where torchvision's is to be had.
  """
  layout = torch_layouts.layout(model_name)
  if not pathlib.Path(path).is_file():
    raise ValueError(f"path must be a file, got {str(path)!r}{_hint(layout)}")
  leaves = _leaves(variables, layout, model_name)
  weights = torch_layouts.find(path, model_name, has_head=False)
  entries = [
    entry
    for entry in torch_layouts.spelled(layout, weights.spelling)
    if not torch_layouts.is_head(entry)
  ]
  loaded = _variables(path, model_name, entries, weights)
  return _like_variables(f"path {str(path)!r}", loaded, leaves, entries)


def _hint(layout: torch_layouts.Layout) -> str:
  """Says where torchvision's weights for a network are to be had."""
  if layout.pretrained is None:
    return ""
  weights, name = layout.pretrained
  return (
    f": for torchvision's weights {weights}, get {name} from"
    f" https://download.pytorch.org/models/{name} and pass where it lies as"
    " path"
  )


def _like_variables(
  source: str,
  loaded: types.Variables,
  leaves: dict[str, Any],
  entries: list[torch_layouts.Entry],
) -> types.Variables:
  """Fills variables from those loaded, and from `leaves` where none are."""
  given = {name: np.asarray(leaf) for name, leaf in _flatten(loaded).items()}
  faults = _shape_faults(given, leaves, entries)
  torch_layouts.refuse(f"{source} does not fit variables", checks.few(faults))
  result: dict[str, Any] = {}
  for name, leaf in leaves.items():
    if name in given:
      leaf = _to_jax(given[name].astype(leaf.dtype))
    _insert(result, tuple(name.split("/")), leaf)
  return result


def misfit(
  variables: types.Variables, expected: types.Variables, *, model_name: str
) -> str | None:
  """Says how variables differ in shape from those that a model has.

  Args:
    variables: As `load` returns them.
    expected: As `models.create` makes them; their shapes are enough.
    model_name: As in `models.create`.

  Returns:
    Their numbers of classes and channels, and the first arrays that differ; or
    None where none does.
  """
  layout = torch_layouts.layout(model_name)
  given, wanted = _flatten(variables), _flatten(expected)
  faults = _shape_faults(given, wanted, layout.entries)
  if not faults:
    return None
  first = np.shape(given["/".join(layout.entries[0].path)])
  (num_classes,) = np.shape(given["params/head/bias"])
  return (
    f"others, of {num_classes} class{'es' * (num_classes != 1)} and"
    f" {first[2]} channel{'s' * (first[2] != 1)}: {checks.few(faults)}"
  )


def _shape_faults(
  given: Mapping[str, Any],
  expected: Mapping[str, Any],
  entries: Iterable[torch_layouts.Entry],
) -> list[str]:
  """Names the arrays of two sets of leaves that differ in shape."""
  faults = []
  for entry in entries:
    shapes = (np.shape(x["/".join(entry.path)]) for x in (given, expected))
    have, want = (
      [shape[i] for i in torch_layouts.axes(entry, len(shape))]
      for shape in shapes
    )
    if have != want:
      faults.append(f"{entry.key} has shape {have} where variables have {want}")
  return faults


def save(
  path: str | os.PathLike[str],
  variables: types.Variables,
  *,
  model_name: str,
  like: str | os.PathLike[str] | None = None,
) -> None:
  """Writes variables as a PyTorch state dict.

  `torch_model.load_state_dict(safetensors.torch.load_file(path))` reads it. The
  file appears whole or not at all.

  Args:
    path: A file name ending in `.safetensors`, in an existing folder; a file
      of this name is replaced.
    variables: As `models.create` makes them.
    model_name: As in `models.create`.
    like: A file as for `load`, of the same network, whose spelling of the keys
      and whose types are used: the prefix, where the head is, whether there is
      a `num_batches_tracked`, and half precision. Its values play no part.

  Raises:
    ValueError: If the name is unknown, the path has another ending or no
      folder, or an entry is missing, surplus, of the wrong type or of the
      wrong shape, or beyond the type of `like`, or if that is no state dict of
      this network.
    OSError: If the file cannot be written; it has the path.
  """
  layout = torch_layouts.layout(model_name)
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise ValueError(
      "path must end in .safetensors (for a .pt file, torch.save what"
      f" safetensors.torch.load_file reads from it), got {str(path)!r}"
    )
  if not path.parent.is_dir():
    raise ValueError(f"path must be in an existing folder, got {str(path)!r}")
  spelling, dtypes = torch_layouts.Spelling("", layout.head, True), {}
  if like is not None:
    weights = torch_layouts.find(like, model_name, "like")
    spelling = weights.spelling
    dtypes = {key: tensor.dtype for key, tensor in weights.tensors.items()}
  leaves = _leaves(variables, layout, model_name)
  state = {
    entry: _to_torch(entry, np.asarray(leaves["/".join(entry.path)]))
    for entry in torch_layouts.spelled(layout, spelling)
  }
  source = f"variables are not those of {model_name!r}"
  _check_arrays(source, state, by_path=True)
  keys = torch_layouts.expected_keys(state, has_counts=spelling.has_counts)
  _write(
    path,
    {
      entry.key: _typed(entry, array, dtypes.get(entry.key))
      for entry, array in state.items()
      if entry.key in keys
    },
  )


def _typed(
  entry: torch_layouts.Entry, array: np.ndarray, name: str | None
) -> np.ndarray:
  """Converts an array to the type that a file had it in."""
  if name is None or name == array.dtype.name:
    return array
  with np.errstate(over="ignore"):
    typed = array.astype(torch_pickles.DTYPES[name])
  if entry.kind != "count" and np.any(_is_finite(array) & ~_is_finite(typed)):
    raise ValueError(
      f"variables have values in {'/'.join(entry.path)} that are too large for"
      f" the {name} of like"
    )
  return typed


def _variables(
  path: str | os.PathLike[str],
  model_name: str,
  entries: list[torch_layouts.Entry],
  weights: torch_layouts.Found,
) -> types.Variables:
  """Checks the arrays of a file and puts them where the network has them."""
  state = torch_files.arrays(path, weights.tensors)
  none = np.zeros((), np.int64)
  arrays = {
    entry: _widened(entry, state.get(entry.key, none)) for entry in entries
  }
  _check_arrays(f"path {str(path)!r} as weights of {model_name!r}", arrays)
  variables: dict[str, Any] = {}
  for entry, array in arrays.items():
    _insert(variables, entry.path, _to_jax(_from_torch(entry, array)))
  return variables


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  """Puts a leaf into nested dictionaries, making those on the way."""
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = leaf


def _leaves(
  variables: types.Variables, layout: torch_layouts.Layout, model_name: str
) -> dict[str, Any]:
  """The leaves of variables by their path, if they are this network's."""
  leaves = _flatten(variables)
  torch_layouts.check_names(
    f"variables are not those of {model_name!r}",
    leaves,
    ["/".join(entry.path) for entry in layout.entries],
  )
  return leaves


def _write(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
  """Writes beside `path`, then renames, so that no half file is ever seen."""
  # Readers in PyTorch look for this note on the origin.
  content = safetensors_numpy.save(state, metadata={"format": "pt"})
  temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
  try:
    # Unlike the writer of safetensors, this leaves the mode to the umask.
    with temporary.open("xb") as file:
      file.write(content)
    os.replace(temporary, path)
  except OSError as error:
    # A full disk is told without a name.
    raise OSError(
      error.errno, error.strerror or str(error), str(path)
    ) from None
  finally:
    temporary.unlink(missing_ok=True)


def _flatten(tree: Any) -> dict[str, Any]:
  """Leaves by their path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _to_jax(array: np.ndarray) -> Any:
  is_exact = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
  return jnp.asarray(array) if is_exact else array


def _widened(entry: torch_layouts.Entry, array: np.ndarray) -> np.ndarray:
  """Brings an array of a file into a type of ours, where that loses nothing."""
  if entry.kind != "count":
    return array.astype(np.float32) if array.dtype.name in _SHORT else array
  if array.dtype.name not in _FLOATS or array.ndim:
    return array.astype(np.int64) if array.dtype.kind in "iu" else array
  # Some halve all entries. What a count has lost by it plays no part.
  count = float(array)
  is_whole = count.is_integer() or count == np.inf
  return np.array(min(count, _MAX_COUNT), np.int64) if is_whole else array


def _from_torch(entry: torch_layouts.Entry, array: np.ndarray) -> np.ndarray:
  """Brings a checked array into our layout."""
  array = array.transpose(np.argsort(torch_layouts.axes(entry, array.ndim)))
  return array.astype(np.int32) if entry.kind == "count" else array


def _to_torch(entry: torch_layouts.Entry, array: np.ndarray) -> np.ndarray:
  """Brings an array into PyTorch's layout, where its rank allows it."""
  array = array.transpose(torch_layouts.axes(entry, array.ndim))
  if entry.kind == "count" and array.dtype == np.int32:
    array = array.astype(np.int64)
  # The writer takes the buffer as it lies in memory.
  return array if array.ndim == 0 else np.ascontiguousarray(array)


def _check_arrays(
  source: str,
  arrays: dict[torch_layouts.Entry, np.ndarray],
  *,
  by_path: bool = False,
) -> None:
  """Raises ValueError naming arrays of a wrong type, shape or range."""
  lengths: dict[str, int] = {}
  faults = []
  for entry, array in arrays.items():
    name = "/".join(entry.path) if by_path else entry.key
    fault = _fault(entry, array, lengths)
    if fault is None and not by_path and not np.all(_is_finite(array)):
      number = array.size - np.count_nonzero(_is_finite(array))
      fault = f"has NaN or infinity in {number} of {array.size} values"
    if fault:
      faults.append(f"{name} {fault}")
  torch_layouts.refuse(source, checks.few(faults))


def _is_finite(array: np.ndarray) -> np.ndarray:
  # NumPy cannot ask this of bfloat16.
  return np.isfinite(array.astype(np.float64))


def _fault(
  entry: torch_layouts.Entry, array: np.ndarray, lengths: dict[str, int]
) -> str | None:
  """Says what is wrong with an array; learns the lengths seen first."""
  # A name stands for any length until one has been seen.
  expected = [lengths.get(str(n), n) for n in entry.shape]
  is_equal = array.ndim == len(expected) and all(
    isinstance(want, str) or have == want
    for have, want in zip(array.shape, expected, strict=True)
  )
  if not is_equal or 0 in array.shape:
    wanted = ", ".join(map(str, expected))
    return f"has shape {list(array.shape)} where [{wanted}] is due"
  lengths |= {
    name: length
    for name, length in zip(entry.shape, array.shape, strict=True)
    if isinstance(name, str)
  }
  if entry.kind != "count":
    allowed = ", ".join(_FLOATS)
    is_float = array.dtype.name in _FLOATS
    return None if is_float else f"is {array.dtype}, not one of {allowed}"
  if array.dtype != np.int64:
    return f"is {array.dtype}, not an integer of PyTorch's int64, our int32"
  if not 0 <= int(array) <= _MAX_COUNT:
    return f"is {int(array)}, not in [0, {_MAX_COUNT}]"
  return None
