"""PyTorch state dicts as variables of our networks, and back.

PyTorch itself is not needed: `.safetensors` files hold plain arrays, and the
pickle inside a `.pt` file is read by an unpickler that admits only what a state
dict consists of, so that no code in the file is ever run.
"""

import io
import os
import pathlib
import pickle
import pickletools
import re
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from psg_jax import checks, types

_FLOATS: dict[str, Any] = {
  "float16": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
  "float32": np.float32,
  "float64": np.float64,
}
_DTYPES: dict[str, np.dtype] = {
  name: np.dtype(dtype)
  for name, dtype in (
    *_FLOATS.items(),
    ("int8", np.int8),
    ("uint8", np.uint8),
    ("int16", np.int16),
    ("int32", np.int32),
    ("int64", np.int64),
    ("bool", np.bool_),
  )
}
_SAFETENSORS_DTYPES = {
  "F16": "float16",
  "BF16": "bfloat16",
  "F32": "float32",
  "F64": "float64",
  "I8": "int8",
  "U8": "uint8",
  "I16": "int16",
  "I32": "int32",
  "I64": "int64",
  "BOOL": "bool",
}
_STORAGES = {
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "FloatStorage": "float32",
  "DoubleStorage": "float64",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "ShortStorage": "int16",
  "IntStorage": "int32",
  "LongStorage": "int64",
  "BoolStorage": "bool",
}
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIX = "module."
_COUNT = ".num_batches_tracked"
_NUM_SHOWN = 3
_MAX_LINE = 300
_MAX_COUNT = np.iinfo(np.int32).max


class _Entry(NamedTuple):
  """One array of a network, in both worlds.

  Attributes:
    key: Its key in the state dict.
    path: Its path in the variables.
    kind: How the two differ: `"conv"` (OIHW, HWIO), `"linear"` (transposed),
      `"vector"` (nothing), `"count"` (int64, int32).
    shape: PyTorch's shape; a name stands for a length that must be the same
      wherever the name occurs.
  """

  key: str
  path: tuple[str, ...]
  kind: str
  shape: tuple[int | str, ...]


class _Layout(NamedTuple):
  """A network in both worlds.

  Attributes:
    entries: Its arrays, under the keys that `save` gives them by default.
    head: Start of the keys of the linear head.
    pretrained: Name of torchvision's weights and their file, if there are any.
  """

  entries: tuple[_Entry, ...]
  head: str
  pretrained: tuple[str, str] | None = None


class _Spelling(NamedTuple):
  """How one file spells the keys of a network.

  Attributes:
    prefix: What all keys start with.
    head: Start of the keys of the linear head, after the prefix.
    has_counts: Whether it has `num_batches_tracked`, which files from before
      PyTorch 0.4.1 lack.
  """

  prefix: str
  head: str
  has_counts: bool


def _conv_block(
  block: tuple[str, ...],
  conv: str,
  norm: str,
  lengths: tuple[str, str],
  size: int,
) -> list[_Entry]:
  """A convolution without bias and its batch normalisation.

  Args:
    block: Path of the block in a collection.
    conv: Key of the convolution.
    norm: Key of the normalisation.
    lengths: Names of the numbers of input and of output channels.
    size: Rows and columns of the kernel.
  """
  inputs, outputs = lengths
  params, stats = ("params", *block), ("batch_stats", *block)
  return [
    _Entry(
      f"{conv}.weight",
      (*params, "kernel"),
      "conv",
      (outputs, inputs, size, size),
    ),
    _Entry(f"{norm}.weight", (*params, "scale"), "vector", (outputs,)),
    _Entry(f"{norm}.bias", (*params, "bias"), "vector", (outputs,)),
    _Entry(f"{norm}.running_mean", (*stats, "mean"), "vector", (outputs,)),
    _Entry(f"{norm}.running_var", (*stats, "var"), "vector", (outputs,)),
    _Entry(f"{norm}.num_batches_tracked", (*stats, "count"), "count", ()),
  ]


def _head(linear: str, inputs: str) -> list[_Entry]:
  params = ("params", "head")
  return [
    _Entry(
      f"{linear}.weight", (*params, "kernel"), "linear", ("classes", inputs)
    ),
    _Entry(f"{linear}.bias", (*params, "bias"), "vector", ("classes",)),
  ]


def _all_cnn() -> _Layout:
  """Eight blocks; PyTorch's indices 3 and 7 are its dropout layers."""
  entries, inputs = [], "channels"
  for i, position in enumerate((0, 1, 2, 4, 5, 6, 8, 9)):
    name, layer = f"block_{i}", f"features.{position}"
    size = 1 if i == 7 else 3
    entries += _conv_block(
      (name,), f"{layer}.0", f"{layer}.1", (inputs, name), size
    )
    inputs = name
  head = "classifier.0"
  return _Layout((*entries, *_head(head, inputs)), head)


def _resnet(
  num_blocks: tuple[int, ...],
  kernel_sizes: tuple[int, ...],
  pretrained: tuple[str, str],
) -> _Layout:
  """The layout of torchvision: a stem and four layers of residual blocks.

  Args:
    num_blocks: Blocks of each layer.
    kernel_sizes: Of the convolutions of a block.
    pretrained: As in `_Layout`.
  """
  entries = _conv_block(
    ("stem", "conv1"), "conv1", "bn1", ("channels", "stem"), 7
  )
  inputs = "stem"
  is_bottleneck = len(kernel_sizes) == 3
  for i, number in enumerate(num_blocks, 1):
    # The first layer of a ResNet-18 adds its blocks to what the stem gives.
    outputs = inputs if i == 1 and not is_bottleneck else f"layer{i}"
    for j in range(number):
      key = f"layer{i}.{j}"
      entries += _residual_block(key, (inputs, outputs), kernel_sizes)
      inputs = outputs
  return _Layout((*entries, *_head("fc", inputs)), "fc", pretrained)


def _residual_block(
  key: str, lengths: tuple[str, str], kernel_sizes: tuple[int, ...]
) -> list[_Entry]:
  name = key.replace(".", "_")
  inner = [f"{key}.conv{n}" for n in range(1, len(kernel_sizes))]
  channels = [lengths[0], *inner, lengths[1]]
  entries = []
  for n, size in enumerate(kernel_sizes, 1):
    entries += _conv_block(
      (name, f"conv{n}"),
      f"{key}.conv{n}",
      f"{key}.bn{n}",
      (channels[n - 1], channels[n]),
      size,
    )
  if lengths[0] != lengths[1]:
    shortcut = f"{key}.downsample"
    entries += _conv_block(
      (name, "downsample"), f"{shortcut}.0", f"{shortcut}.1", lengths, 1
    )
  return entries


_NETWORKS: dict[str, Callable[[], _Layout]] = {
  "all_cnn": _all_cnn,
  "resnet18": lambda: _resnet(
    (2, 2, 2, 2), (3, 3), ("IMAGENET1K_V1", "resnet18-f37072fd.pth")
  ),
  "resnet50": lambda: _resnet(
    (3, 4, 6, 3), (1, 3, 1), ("IMAGENET1K_V2", "resnet50-11ad3fa6.pth")
  ),
}


def load(path: str | os.PathLike[str], *, model_name: str) -> types.Variables:
  """Reads a PyTorch state dict as variables.

  Every value keeps its bits; `save` gives back the same state dict. The keys
  are those of the paper's released code for the All-CNN and torchvision's for
  the ResNets. A prefix `module.` on all keys is dropped, the head may be the
  only linear layer of an `nn.Sequential` (`fc.1.weight` for `fc.weight`), and
  a dictionary that holds the state dict under `state_dict`,
  `model_state_dict`, `model` or `net` is opened. Where no layer has a
  `num_batches_tracked`, as in files from before PyTorch 0.4.1, all are 0.

  Args:
    path: A `.safetensors` file, or a `.pt` or `.pth` file written by
      `torch.save` of PyTorch 1.6 or newer. No code in it is run.
    model_name: As in `models.create`.

  Returns:
    Collections `"params"` and `"batch_stats"`, as `models.create` makes them.
    Arrays are on the default device; float64 stays in NumPy unless JAX has
    64-bit types enabled, which would otherwise lose bits.

  Raises:
    ValueError: If the file or the name is unknown, the file is not a state
      dict or asks for anything else than one, or if an entry is missing,
      surplus, of the wrong type or of the wrong shape.
  """
  layout = _layout(model_name)
  state = _read(path)
  spelling = _spelling(state, layout)
  source = f"path {str(path)!r} is not a state dict of {model_name!r}"
  return _variables(
    source, _spelled(layout, spelling), state, spelling.has_counts
  )


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
  layout = _layout(model_name)
  if not pathlib.Path(path).is_file():
    raise ValueError(f"path must be a file, got {str(path)!r}{_hint(layout)}")
  leaves = _leaves(variables, layout, model_name)
  state = _read(path)
  spelling = _spelling(state, layout)
  root = f"{spelling.prefix}{layout.head.partition('.')[0]}."
  state = {k: array for k, array in state.items() if not k.startswith(root)}
  entries = [
    entry for entry in _spelled(layout, spelling) if entry.path[1] != "head"
  ]
  source = f"path {str(path)!r} is not a state dict of {model_name!r}"
  loaded = _variables(source, entries, state, spelling.has_counts)
  return _like_variables(f"path {str(path)!r}", loaded, leaves, entries)


def _hint(layout: _Layout) -> str:
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
  entries: list[_Entry],
) -> types.Variables:
  """Fills variables from those loaded, and from `leaves` where none are."""
  given = {name: np.asarray(leaf) for name, leaf in _flatten((), loaded)}
  faults = []
  for entry in entries:
    name = "/".join(entry.path)
    have, want = (
      list(_to_torch(entry, np.asarray(tree[name])).shape)
      for tree in (given, leaves)
    )
    if have != want:
      faults.append(f"{entry.key} has shape {have} where variables have {want}")
  if faults:
    raise ValueError(f"{source} does not fit variables: {_few(faults)}")
  result: dict[str, Any] = {}
  for name, leaf in leaves.items():
    if name in given:
      leaf = _to_jax(given[name].astype(leaf.dtype))
    _insert(result, tuple(name.split("/")), leaf)
  return result


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
      is used: a prefix `module.`, where the head is, and whether there is a
      `num_batches_tracked`. Its values play no part.

  Raises:
    ValueError: If the name is unknown, the path has another ending or no
      folder, or an entry is missing, surplus, of the wrong type or of the
      wrong shape, or if `like` is no state dict of this network.
  """
  layout = _layout(model_name)
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise ValueError(
      "path must end in .safetensors (for a .pt file, torch.save what"
      f" safetensors.torch.load_file reads from it), got {str(path)!r}"
    )
  if not path.parent.is_dir():
    raise ValueError(f"path must be in an existing folder, got {str(path)!r}")
  spelling = _Spelling("", layout.head, True)
  if like is not None:
    spelling = _spelling_of_file(like, layout, model_name)
  leaves = _leaves(variables, layout, model_name)
  state = {
    entry: _to_torch(entry, np.asarray(leaves["/".join(entry.path)]))
    for entry in _spelled(layout, spelling)
  }
  source = f"variables are not those of {model_name!r}"
  _check_arrays(source, state, by_path=True)
  keys = _expected_keys(state, spelling.has_counts)
  _write(
    path, {entry.key: state[entry] for entry in state if entry.key in keys}
  )


def _layout(model_name: str) -> _Layout:
  checks.one_of("model_name", model_name, _NETWORKS)
  return _NETWORKS[model_name]()


def _read(
  path: str | os.PathLike[str], argument: str = "path"
) -> dict[str, np.ndarray]:
  """Reads the arrays of a state dict, under the keys of the file."""
  path = pathlib.Path(path)
  readers = {".safetensors": _read_safetensors, ".pt": _read_pt}
  readers[".pth"] = _read_pt
  if path.suffix not in readers:
    raise ValueError(
      f"{argument} must end in {', '.join(readers)}, got {str(path)!r}"
    )
  if not path.is_file():
    raise ValueError(f"{argument} must be a file, got {str(path)!r}")
  return readers[path.suffix](path)


def _spelling(keys: Iterable[str], layout: _Layout) -> _Spelling:
  """Finds out how a file spells the keys of a network."""
  keys = list(keys)
  is_prefixed = keys and all(key.startswith(_PREFIX) for key in keys)
  prefix = _PREFIX if is_prefixed else ""
  names = {key.removeprefix(prefix) for key in keys}
  pattern = re.compile(rf"({re.escape(layout.head)}\.\d+)\.(weight|bias)")
  nested = {found[1] for found in map(pattern.fullmatch, names) if found}
  has_plain = not names.isdisjoint(
    {f"{layout.head}.weight", f"{layout.head}.bias"}
  )
  # Two linear layers are another head than ours, to be named as unexpected.
  is_nested = len(nested) == 1 and not has_plain
  head = nested.pop() if is_nested else layout.head
  has_counts = any(name.endswith(_COUNT) for name in names)
  return _Spelling(prefix, head, has_counts)


def _spelling_of_file(
  like: str | os.PathLike[str], layout: _Layout, model_name: str
) -> _Spelling:
  keys = _read(like, "like").keys()
  spelling = _spelling(keys, layout)
  expected = _expected_keys(_spelled(layout, spelling), spelling.has_counts)
  _check_names(
    f"like {str(like)!r} is not a state dict of {model_name!r}", keys, expected
  )
  return spelling


def _spelled(layout: _Layout, spelling: _Spelling) -> list[_Entry]:
  """The entries of a network under the keys of a file."""

  def spelled(entry: _Entry) -> _Entry:
    key = entry.key
    if entry.path[1] == "head":
      key = spelling.head + key.removeprefix(layout.head)
    return entry._replace(key=spelling.prefix + key)

  return [spelled(entry) for entry in layout.entries]


def _expected_keys(entries: Iterable[_Entry], has_counts: bool) -> list[str]:
  return [entry.key for entry in entries if has_counts or entry.kind != "count"]


def _variables(
  source: str,
  entries: list[_Entry],
  state: dict[str, np.ndarray],
  has_counts: bool,
) -> types.Variables:
  """Checks the arrays of a file and puts them where the network has them."""
  _check_names(source, state, _expected_keys(entries, has_counts))
  none = np.zeros((), np.int64)
  arrays = {entry: state.get(entry.key, none) for entry in entries}
  _check_arrays(source, arrays)
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
  variables: types.Variables, layout: _Layout, model_name: str
) -> dict[str, Any]:
  """The leaves of variables by their path, if they are this network's."""
  leaves = dict(_flatten((), variables))
  _check_names(
    f"variables are not those of {model_name!r}",
    leaves,
    ["/".join(entry.path) for entry in layout.entries],
  )
  return leaves


def _write(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
  """Writes beside `path`, then renames, so that no half file is ever seen."""
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    # Readers in PyTorch look for this note on the origin.
    safetensors_numpy.save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _flatten(path: tuple[str, ...], tree: Any) -> Iterable[tuple[str, Any]]:
  if not isinstance(tree, Mapping):
    yield "/".join(path), tree
    return
  for name, child in tree.items():
    yield from _flatten((*path, str(name)), child)


def _to_jax(array: np.ndarray) -> Any:
  is_exact = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
  return jnp.asarray(array) if is_exact else array


def _from_torch(entry: _Entry, array: np.ndarray) -> np.ndarray:
  """Brings a checked array into our layout."""
  if entry.kind == "conv":
    return array.transpose(2, 3, 1, 0)
  if entry.kind == "linear":
    return array.T
  return array.astype(np.int32) if entry.kind == "count" else array


def _to_torch(entry: _Entry, array: np.ndarray) -> np.ndarray:
  """Brings an array into PyTorch's layout, where its rank allows it."""
  if entry.kind == "conv" and array.ndim == 4:
    array = array.transpose(3, 2, 0, 1)
  elif entry.kind == "linear" and array.ndim == 2:
    array = array.T
  elif entry.kind == "count" and array.dtype == np.int32:
    array = array.astype(np.int64)
  # The writer takes the buffer as it lies in memory.
  return array if array.ndim == 0 else np.ascontiguousarray(array)


def _few(items: Iterable[str]) -> str:
  items = list(items)
  rest = len(items) - _NUM_SHOWN
  return ", ".join(items[:_NUM_SHOWN]) + (f" and {rest} more" * (rest > 0))


def _check_names(
  source: str, given: Iterable[str], expected: list[str]
) -> None:
  """Raises ValueError naming what is missing and what is too much."""
  given = set(given)
  missing = [name for name in expected if name not in given]
  extra = sorted(given.difference(expected))
  faults = [f"missing {_few(missing)}"] if missing else []
  faults += [f"unexpected {_few(extra)}"] if extra else []
  if faults:
    raise ValueError(f"{source}: {'; '.join(faults)}")


def _check_arrays(
  source: str, arrays: dict[_Entry, np.ndarray], *, by_path: bool = False
) -> None:
  """Raises ValueError naming arrays of a wrong type, shape or range."""
  lengths: dict[str, int] = {}
  faults = []
  for entry, array in arrays.items():
    name = "/".join(entry.path) if by_path else entry.key
    fault = _fault(entry, array, lengths)
    if fault:
      faults.append(f"{name} {fault}")
  if faults:
    raise ValueError(f"{source}: {_few(faults)}")


def _fault(
  entry: _Entry, array: np.ndarray, lengths: dict[str, int]
) -> str | None:
  """Says what is wrong with an array; learns the lengths seen first."""
  is_bound = [isinstance(n, int) or n in lengths for n in entry.shape]
  expected = [
    lengths.get(n, n) if isinstance(n, str) else n for n in entry.shape
  ]
  is_equal = array.ndim == len(expected) and all(
    not bound or have == want
    for have, want, bound in zip(array.shape, expected, is_bound, strict=True)
  )
  if not is_equal or 0 in array.shape:
    wanted = ", ".join(map(str, expected))
    return f"has shape {list(array.shape)} where [{wanted}] is due"
  for name, length in zip(entry.shape, array.shape, strict=True):
    if isinstance(name, str):
      lengths[name] = length
  if entry.kind != "count":
    allowed = ", ".join(_FLOATS)
    is_float = array.dtype.name in _FLOATS
    return None if is_float else f"is {array.dtype}, not one of {allowed}"
  if array.dtype != np.int64:
    return f"is {array.dtype}, not an integer of PyTorch's int64, our int32"
  if not 0 <= int(array) <= _MAX_COUNT:
    return f"is {int(array)}, not in [0, {_MAX_COUNT}]"
  return None


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    tensors = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"path must be a safetensors file, got {str(path)!r}: {error}"
    ) from None
  state = {}
  for key, tensor in tensors:
    name = _SAFETENSORS_DTYPES.get(tensor["dtype"])
    if name is None:
      raise ValueError(
        f"path {str(path)!r}: {key} is {tensor['dtype']}, which is not one of"
        f" {', '.join(_SAFETENSORS_DTYPES)}"
      )
    array = np.frombuffer(tensor["data"], _little_endian(_DTYPES[name]))
    state[key] = array.reshape(tensor["shape"]).astype(_DTYPES[name])
  return state


def _little_endian(dtype: np.dtype) -> np.dtype:
  return dtype if sys.byteorder == "little" else dtype.newbyteorder("<")


class _StorageType(NamedTuple):
  """Stands for PyTorch's class of a typed storage."""

  dtype: str


class _DType(NamedTuple):
  """Stands for a `torch.dtype`."""

  name: str


class _Storage(NamedTuple):
  """A buffer in the archive, not yet read."""

  key: str
  dtype: str
  num_elements: int


class _Tensor(NamedTuple):
  """A view of a storage; offset and strides count elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Call(NamedTuple):
  """Stands for a function of a pickle.

  Immutable, so that a pickle's instructions to set attributes fail.
  """

  function: Callable[..., Any]

  def __call__(self, *args: Any) -> Any:
    return self.function(*args)


class _OrderedDict(dict):
  """Stands for `collections.OrderedDict`.

  PyTorch sets an attribute with version numbers on a state dict. It is not
  needed, and nothing from the file may become an attribute.
  """

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    del state


def _lengths(values: Any) -> tuple[int, ...]:
  if not isinstance(values, tuple) or not all(
    type(value) is int and value >= 0 for value in values
  ):
    raise ValueError("it has a tensor with a shape or stride that is none")
  return values


def _rebuild_tensor(
  storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> _Tensor:
  """Takes the arguments of PyTorch's function; the rest is about gradients."""
  (start,), shape, strides = (
    _lengths((offset,)),
    _lengths(shape),
    _lengths(strides),
  )
  if not isinstance(storage, _Storage) or len(shape) != len(strides):
    raise ValueError("it has a tensor without a storage or with odd strides")
  last = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if 0 not in shape and last >= storage.num_elements:
    raise ValueError("it has a tensor that reaches beyond its storage")
  return _Tensor(storage, start, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
  """Takes the arguments of PyTorch's function; the rest is about gradients."""
  return tensor


_GLOBALS: dict[str, Any] = {
  "collections.OrderedDict": _Call(_OrderedDict),
  "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
  "torch._utils._rebuild_parameter": _Call(_rebuild_parameter),
  **{f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()},
  **{f"torch.{name}": _DType(name) for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
  """Reads a state dict; anything else that a pickle may ask for is refused."""

  def find_class(self, module: str, name: str) -> Any:
    found = _GLOBALS.get(f"{module}.{name}")
    if found is None:
      raise ValueError(
        f"it asks for {f'{module}.{name}'[:200]!r}, which no state dict needs"
        " (save model.state_dict() alone)"
      )
    return found

  def persistent_load(self, pid: Any) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
      raise ValueError("it refers to something that is not a storage")
    _, storage_type, key, _, num_elements = pid
    if not isinstance(storage_type, _StorageType) or not isinstance(key, str):
      raise ValueError("it has a storage of an unknown type")
    return _Storage(key, storage_type.dtype, *_lengths((num_elements,)))


def _read_pt(path: pathlib.Path) -> dict[str, np.ndarray]:
  refusal = f"path must be a PyTorch state dict, got {str(path)!r}"
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"{refusal}: it is no zip archive (save it with PyTorch 1.6 or newer)"
    )
  try:
    with zipfile.ZipFile(path) as archive:
      return _read_archive(archive)
  # What a damaged or hostile pickle or archive makes the standard library
  # raise is open-ended; no such file may end in anything but one clear line.
  except Exception as error:
    line = " ".join(str(error).split()) or type(error).__name__
    # Messages may quote whole names of a damaged archive.
    line = line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 3]}..."
    raise ValueError(f"{refusal}: {line}") from None


def _read_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
  infos = {info.filename: info for info in archive.infolist()}
  pickles = [name for name in infos if name.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ValueError("the archive must hold one data.pkl")
  if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
    raise ValueError("the archive must not be compressed")
  root = pickles[0].removesuffix("data.pkl")
  order = "little"
  if f"{root}byteorder" in infos:
    order = archive.read(f"{root}byteorder").decode()
  tensors = _find_tensors(_unpickle(archive.read(pickles[0])))
  buffers: dict[_Storage, np.ndarray] = {}
  state = {}
  for key, tensor in tensors.items():
    storage = tensor.storage
    if storage not in buffers:
      data = archive.read(f"{root}data/{storage.key}")
      buffers[storage] = _decode(data, storage, order)
    state[key] = _view(buffers[storage], tensor)
  return state


def _unpickle(data: bytes) -> Any:
  # The unpickler makes room for the highest memo index named, however few
  # there are: a file of ten bytes could otherwise claim all memory.
  for opcode, argument, _ in pickletools.genops(data):
    if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
      raise ValueError("its pickle has an impossible memo index")
  return _Unpickler(io.BytesIO(data)).load()


def _find_tensors(loaded: Any) -> dict[str, _Tensor]:
  """Finds the state dict in what the pickle held."""
  candidates = [loaded]
  if isinstance(loaded, dict):
    candidates += [loaded.get(name) for name in _WRAPPERS]
  for tree in candidates:
    if (
      isinstance(tree, dict)
      and tree
      and all(
        isinstance(key, str) and isinstance(value, _Tensor)
        for key, value in tree.items()
      )
    ):
      return dict(tree)
  raise ValueError(
    f"it holds no dictionary of tensors, at the top or as {_WRAPPERS[0]!r}"
  )


def _decode(data: bytes, storage: _Storage, order: str) -> np.ndarray:
  """Interprets the bytes of a storage, written in the byte order given."""
  dtype = _DTYPES[storage.dtype]
  if len(data) < storage.num_elements * dtype.itemsize:
    raise ValueError(f"its storage {storage.key!r} is cut short")
  words = np.frombuffer(data, f"u{dtype.itemsize}", storage.num_elements)
  return (words if order == sys.byteorder else words.byteswap()).view(dtype)


def _view(buffer: np.ndarray, tensor: _Tensor) -> np.ndarray:
  """Copies the elements of a tensor out of its storage."""
  if 0 in tensor.shape:
    return np.zeros(tensor.shape, buffer.dtype)
  view = np.lib.stride_tricks.as_strided(
    buffer[tensor.offset :],
    tensor.shape,
    [stride * buffer.itemsize for stride in tensor.strides],
    writeable=False,
  )
  return view.copy()
