"""Tensors in PyTorch's pickles, of which no code is ever run.

The unpickler knows tensors, and puts inert placeholders in the place of all
else that a pickle may name.
"""

import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
  name: np.dtype(getattr(ml_dtypes if name == "bfloat16" else np, name))
  for name in (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "uint8", "int16", "int32", "int64"),
  )
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
# Names in messages are cut, since damaged files may have very long ones.
_MAX_NAMED = 200


class Storage(NamedTuple):
  """A buffer of a file, not yet read.

  Attributes:
    key: Its name in the file.
    dtype: Name of its type, a key of `DTYPES`.
    num_elements: How many elements it has.
    first: Which element of the buffer is its first.
  """

  key: str
  dtype: str
  num_elements: int
  first: int = 0


class Tensor(NamedTuple):
  """A view of a storage, not yet read.

  Attributes:
    dtype: Name of its type, one of `DTYPES` unless there is a fault.
    shape: Its lengths.
    storage: What it is a view of, or None where it lies in the file as it is.
    start: Its first element in the storage.
    strides: Elements of the storage between two of an axis.
    fault: Why it cannot be read, or None.
  """

  dtype: str
  shape: tuple[int, ...]
  storage: Storage | None = None
  start: int = 0
  strides: tuple[int, ...] = ()
  fault: str | None = None


class _StorageType(NamedTuple):
  """Stands for PyTorch's class of a typed storage."""

  dtype: str


class _Call(NamedTuple):
  """Stands for a function of a pickle.

  Immutable, so that a pickle's instructions to set attributes fail.
  """

  function: Callable[..., Any]

  def __call__(self, *args: Any) -> Any:
    return self.function(*args)


class _Placeholder(dict):
  """Stands for an instance of any class, and does nothing.

  It keeps the items that a pickle gives to dictionaries of any kind. Nothing
  from the file becomes an attribute.
  """

  __slots__ = ()
  name = ""
  # As a key of a dictionary, it is the same as itself alone.
  __hash__ = object.__hash__  # type: ignore[assignment]
  __eq__ = object.__eq__

  def __new__(cls, *args: Any, **kwargs: Any) -> "_Placeholder":
    del args, kwargs
    return super().__new__(cls)

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    del args, kwargs
    super().__init__()

  def __call__(self, *args: Any, **kwargs: Any) -> "_Placeholder":
    del args, kwargs
    return self

  def __setstate__(self, state: Any) -> None:
    del state

  def append(self, item: Any) -> None:
    """Takes an item of a list, and drops it."""
    del item

  extend = add = append


class _OrderedDict(_Placeholder):
  """Stands for `collections.OrderedDict`, of which state dicts are made."""

  __slots__ = ()

  def __init__(self, items: Any = ()) -> None:
    super().__init__()
    self.update(items)


def placeholder_name(value: Any) -> str:
  """The name of what a placeholder, or its class, stands for; else nothing."""
  kind = value if isinstance(value, type) else type(value)
  return kind.name[:_MAX_NAMED] if issubclass(kind, _Placeholder) else ""


def _is_lengths(values: Any) -> bool:
  return isinstance(values, tuple) and all(
    type(value) is int and value >= 0 for value in values
  )


def _unreadable(fault: str) -> Tensor:
  return Tensor("", (), fault=fault)


def _rebuild_tensor(
  storage: Any, start: Any, shape: Any, strides: Any, *_: Any
) -> Tensor:
  """Takes the arguments of PyTorch's function; the rest is about gradients."""
  if not isinstance(storage, Storage):
    return _unreadable(f"has no values of a type among {', '.join(DTYPES)}")
  if not (
    _is_lengths((start,))
    and _is_lengths(shape)
    and _is_lengths(strides)
    and len(shape) == len(strides)
  ):
    return _unreadable("has a shape or stride that is none")
  last = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if 0 not in shape and last >= storage.num_elements:
    return _unreadable("reaches beyond its storage")
  return Tensor(storage.dtype, shape, storage, start, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
  """Takes the arguments of PyTorch's function; the rest is about gradients."""
  return tensor


def _rebuild_subclass(function: Any, kind: Any, args: Any, *_: Any) -> Any:
  """Makes the tensor of which the file has a subclass."""
  if isinstance(function, _Call) and isinstance(args, tuple):
    return function(*args)
  return _unreadable(f"is a {placeholder_name(kind)}")


GLOBALS: dict[str, Any] = {
  "collections.OrderedDict": _Call(_OrderedDict),
  "torch._utils._rebuild_tensor": _Call(_rebuild_tensor),
  "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
  "torch._utils._rebuild_parameter": _Call(_rebuild_parameter),
  "torch._utils._rebuild_parameter_with_state": _Call(_rebuild_parameter),
  "torch._tensor._rebuild_from_type_v2": _Call(_rebuild_subclass),
  **{
    f"{module}.{name}": _StorageType(dtype)
    for module in ("torch", "torch.cuda")
    for name, dtype in _STORAGES.items()
  },
}
"""What stands for the names of a pickle that a tensor is made of."""


class _Unpickler(pickle.Unpickler):
  """Reads tensors; for all else that a pickle names it has placeholders."""

  def __init__(self, file: Any, dtypes: dict[str, str]) -> None:
    super().__init__(file)
    self._dtypes = dtypes
    self._placeholders: dict[str, Any] = {}

  def find_class(self, module: str, name: str) -> Any:
    full = f"{module}.{name}"
    value = GLOBALS.get(full) or self._placeholders.get(full)
    if value is None:
      value = type(
        "_Placeholder", (_Placeholder,), {"name": full, "__slots__": ()}
      )
      if re.fullmatch(r"torch\._utils\._rebuild_\w+", full):
        value = _Call(lambda *_: _unreadable(f"is made by {full}"))
      self._placeholders[full] = value
    return value

  def persistent_load(self, pid: Any) -> Any:
    # Of a whole network, the old format keeps the source beside the class.
    if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
      return pid[1]
    if not isinstance(pid, tuple) or not 5 <= len(pid) <= 6:
      return _Placeholder()
    tag, kind, key, _, number, *view = pid
    if (
      tag != "storage"
      or not isinstance(kind, _StorageType)
      or not isinstance(key, str)
      or not _is_lengths((number,))
    ):
      return _Placeholder()
    self._dtypes[key] = kind.dtype
    # Before PyTorch 0.4, a storage could be a part of another.
    if view and isinstance(view[0], tuple) and _is_lengths(view[0][1:]):
      _, first, number = view[0]
      return Storage(key, kind.dtype, number, first)
    return Storage(key, kind.dtype, number)


def unpickle(file: Any, dtypes: dict[str, str] | None = None) -> Any:
  """Reads one pickle, from where the file stands to where that ends.

  Args:
    file: The file.
    dtypes: Takes the type of each storage that the pickle names.
  """
  start, highest = file.tell(), 0
  # The unpickler makes room for the highest memo index named, however few
  # there are: a file of ten bytes could otherwise claim all memory.
  for opcode, argument, _ in pickletools.genops(file):
    if opcode.name.endswith("PUT"):
      highest = max(highest, int(argument or 0))
  if highest > file.tell() - start:
    raise ValueError("its pickle has an impossible memo index")
  file.seek(start)
  return _Unpickler(file, {} if dtypes is None else dtypes).load()
