"""Tensors in the files that PyTorch and safetensors write.

PyTorch itself is not needed. The pickle inside a file is read by an unpickler
that knows tensors and puts inert placeholders in the place of all else, so that
no code in the file is ever run. What a file is, its first bytes say, not its
ending. Names and shapes come first; arrays are read only for what is wanted.
"""

import contextlib
import io
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

DTYPES: dict[str, np.dtype] = {
  name: np.dtype(getattr(ml_dtypes if name == "bfloat16" else np, name))
  for name in (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "uint8", "int16", "int32", "int64"),
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
_MAX_LINE = 300
_MAX_DEPTH = 8
_MAX_NAMED = 200
# A stride of 0 repeats an element at no cost in the file; a network of which
# most is repeated is none.
_MAX_REPEATS = 16
# What files of before PyTorch 1.6 start with, in whatever pickle protocol.
_OLD_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_SAVE = "save it with torch.save(model.state_dict(), path)"
_AGAIN = "download or copy it again"
_UNPACK = "unpack it first"
_FOREIGN = (
  (b"version https://git-lfs", "a pointer of Git LFS: git lfs pull brings it"),
  (b"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes: {_SAVE}"),
  (b"\x93NUMPY", f"a NumPy array: {_SAVE}"),
  (b"GGUF", f"a GGUF file: {_SAVE}"),
  (b"\x1f\x8b", f"compressed by gzip: {_UNPACK}"),
  (b"BZh", f"compressed by bzip2: {_UNPACK}"),
  (b"\xfd7zXZ", f"compressed by xz: {_UNPACK}"),
  (b"\x28\xb5\x2f\xfd", f"compressed by zstd: {_UNPACK}"),
  (b"7z\xbc\xaf", f"a 7z archive: {_UNPACK}"),
  (b"Rar!", f"a RAR archive: {_UNPACK}"),
  (b"\x80", f"a plain pickle, not PyTorch's: {_SAVE}"),
)
_WEIGHTS_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors")


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


class Contents(NamedTuple):
  """What a file holds.

  Attributes:
    dictionaries: The tensors by key of each dictionary with any, under where it
      stands in the file, `""` for the file itself.
    names: Keys of the outermost dictionary.
  """

  dictionaries: dict[str, dict[str, Tensor]]
  names: tuple[str, ...]


def read(path: str | os.PathLike[str], argument: str = "path") -> Contents:
  """Finds the tensors of a file, without reading their values.

  Args:
    path: A file of safetensors or of `torch.save`, under any name.
    argument: What messages call the path.

  Returns:
    Its dictionaries of tensors.

  Raises:
    ValueError: If the file is of another kind, is damaged or has no dictionary
      of tensors.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{argument} must be a file, got {str(path)!r}")
  with _one_line(path, argument), _opened(path) as source:
    tree = source.tree
    dictionaries = dict(_dictionaries("", tree, set()))
    if not any(dictionaries.values()):
      raise ValueError(_without_tensors(tree))
    names = map(str, tree) if isinstance(tree, dict) else ()
    return Contents(dictionaries, tuple(names))


def arrays(
  path: str | os.PathLike[str],
  tensors: Mapping[str, Tensor],
  argument: str = "path",
) -> dict[str, np.ndarray]:
  """Reads tensors that `read` has found.

  Args:
    path: The file.
    tensors: Those to read.
    argument: What messages call the path.

  Returns:
    Their values, under the same keys.

  Raises:
    ValueError: If a tensor cannot be read as it is described, or all claim far
      more memory than the file has.
  """
  path = pathlib.Path(path)
  with _one_line(path, argument):
    _check_size(tensors, path.stat().st_size)
    with _opened(path) as source:
      return source.arrays(tensors)


class _Source(NamedTuple):
  """An open file: what it holds, and how tensors in it are read."""

  tree: Any
  arrays: Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]]


@contextlib.contextmanager
def _one_line(path: pathlib.Path, argument: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"{argument} {str(path)!r} cannot be read: {error.strerror or error}"
    ) from None
  # What a damaged or hostile pickle or archive makes the standard library
  # raise is open-ended; no such file may end in anything but one clear line.
  except Exception as error:
    line = " ".join(str(error).split()) or type(error).__name__
    # Messages may quote whole names of a damaged archive.
    line = line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 3]}..."
    raise ValueError(
      f"{argument} must be a PyTorch state dict or a safetensors file, got"
      f" {str(path)!r}: {line}"
    ) from None


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[_Source]:
  """Opens a file as what its first bytes say that it is."""
  with path.open("rb") as file:
    head = file.read(512)
  size = path.stat().st_size
  if head.startswith(b"PK"):
    if not zipfile.is_zipfile(path):
      raise ValueError(f"it is cut short: {_AGAIN}")
    with zipfile.ZipFile(path) as archive:
      yield _archive(archive)
  elif head.startswith(b"\x80") and _OLD_MAGIC in head[:32]:
    with (
      path.open("rb") as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
      yield _old_file(data)
  elif _is_safetensors(head, size) or (
    path.suffix == ".safetensors" and _foreign(path, head) is None
  ):
    with safetensors.safe_open(path, "numpy") as opened:
      yield _safetensors(opened)
  else:
    raise ValueError(
      _foreign(path, head)
      or "it is neither a safetensors file nor a zip archive of torch.save, but"
      f" begins with {head[:12]!r}"
    )


def _is_safetensors(head: bytes, size: int) -> bool:
  return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _foreign(path: pathlib.Path, head: bytes) -> str | None:
  """Says what a file is that holds no weights, as far as its bytes tell."""
  text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
  if not head:
    return f"it is empty: {_AGAIN}"
  if not head.strip(b"\0"):
    return f"it begins with zeros, as after a copy that broke off: {_AGAIN}"
  if text.startswith(b"<"):
    return f"it is a web page, not the file that was asked for: {_AGAIN}"
  if text.startswith((b"{", b"[")):
    return "it is JSON text, not the weights that it may speak of"
  if head[257:262] == b"ustar":
    return f"it is a tar archive: {_UNPACK}"
  if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"\x12" in head[1:4]):
    return f"it is an ONNX model: {_SAVE}"
  for start, name in _FOREIGN:
    if head.startswith(start):
      return f"it is {name}"
  return None


def _dictionaries(
  where: str, tree: Any, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
  """Walks through what a file holds, the outermost first."""
  # A pickle may hold itself.
  if id(tree) in seen or depth > _MAX_DEPTH:
    return
  seen.add(id(tree))
  if isinstance(tree, dict):
    items: Iterable[tuple[Any, Any]] = tree.items()
  elif isinstance(tree, (list, tuple)) and not isinstance(tree, Tensor):
    items = enumerate(tree)
  else:
    return
  items = list(items)
  tensors = {
    key: value
    for key, value in items
    if isinstance(key, str) and isinstance(value, Tensor)
  }
  if tensors:
    yield where, tensors
  for key, value in items:
    if isinstance(value, (dict, list, tuple)):
      name = f"{where}.{key}" if where else str(key)
      yield from _dictionaries(name, value, seen, depth + 1)


def _without_tensors(tree: Any) -> str:
  """Says what a file holds that has no dictionary of tensors."""
  name = _placeholder_name(tree)
  if name:
    return (
      f"it asks for {name[:_MAX_NAMED]!r}, which no state dict needs (save"
      " model.state_dict() alone)"
    )
  parts = []
  if isinstance(tree, dict):
    parts = [
      f"{str(key)[:30]} ({_placeholder_name(value)[:60]})"
      for key, value in tree.items()
      if _placeholder_name(value)
    ]
  has = f", but {', '.join(parts[:3])}" if parts else ""
  return (
    f"it holds no dictionary of tensors{has} (save model.state_dict() alone)"
  )


def _check_size(tensors: Mapping[str, Tensor], size: int) -> None:
  """Raises ValueError before memory is taken for what the file has not got."""
  claimed = 0
  for key, tensor in tensors.items():
    if tensor.fault:
      raise ValueError(f"its tensor {key} {tensor.fault}")
    claimed += math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
  if claimed > _MAX_REPEATS * size:
    raise ValueError(
      f"its tensors claim {claimed} bytes, in a file of {size}: it repeats"
      " elements by strides, and no trained network does so"
    )


def _safetensors(opened: Any) -> _Source:
  tree = {}
  for key in opened.keys():  # noqa: SIM118
    entry = opened.get_slice(key)
    name = entry.get_dtype()
    dtype = _SAFETENSORS_DTYPES.get(name)
    fault = None
    if dtype is None:
      fault = f"is {name}, not one of {', '.join(_SAFETENSORS_DTYPES)}"
    tree[key] = Tensor(dtype or name, tuple(entry.get_shape()), fault=fault)
  return _Source(
    tree, lambda tensors: {key: opened.get_tensor(key) for key in tensors}
  )


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


def _placeholder_name(value: Any) -> str:
  """The name of what a placeholder, or its class, stands for; else nothing."""
  kind = value if isinstance(value, type) else type(value)
  return kind.name if issubclass(kind, _Placeholder) else ""


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
  return _unreadable(f"is a {_placeholder_name(kind)[:_MAX_NAMED]}")


_GLOBALS: dict[str, Any] = {
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


class _Unpickler(pickle.Unpickler):
  """Reads tensors; for all else that a pickle names it has placeholders."""

  def __init__(self, file: Any, dtypes: dict[str, str]) -> None:
    super().__init__(file)
    self._dtypes = dtypes
    self._placeholders: dict[str, Any] = {}

  def find_class(self, module: str, name: str) -> Any:
    full = f"{module}.{name}"
    found = _GLOBALS.get(full) or self._placeholders.get(full)
    if found is None:
      found = type(
        "_Placeholder", (_Placeholder,), {"name": full, "__slots__": ()}
      )
      if re.fullmatch(r"torch\._utils\._rebuild_\w+", full):
        found = _Call(lambda *_: _unreadable(f"is made by {full}"))
      self._placeholders[full] = found
    return found

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


def _unpickle(file: Any, dtypes: dict[str, str] | None = None) -> Any:
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


def _archive(archive: zipfile.ZipFile) -> _Source:
  """A file of PyTorch from 1.6 on."""
  names = archive.namelist()
  pickles = [
    name for name in names if name == "data.pkl" or name.endswith("/data.pkl")
  ]
  if len(pickles) != 1:
    raise ValueError(_foreign_archive(names))
  root = pickles[0].removesuffix("data.pkl")
  if f"{root}constants.pkl" in names:
    raise ValueError(
      "it is a TorchScript archive: save torch.jit.load(path).state_dict() with"
      " torch.save"
    )
  if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
    raise ValueError("the archive must not be compressed")
  order = "little"
  if f"{root}byteorder" in names:
    order = archive.read(f"{root}byteorder").decode()

  def decode(storage: Storage) -> np.ndarray:
    try:
      data = archive.read(f"{root}data/{storage.key}")
    except KeyError:
      raise ValueError(f"it lacks its storage {storage.key!r}") from None
    return _decode(data, storage, order)

  tree = _unpickle(io.BytesIO(archive.read(pickles[0])))
  return _Source(tree, lambda tensors: _views(tensors, decode))


def _foreign_archive(names: list[str]) -> str:
  inner = [name for name in names if name.endswith(_WEIGHTS_ENDINGS)]
  if any(name.endswith(".weights.h5") for name in names):
    return f"it is a Keras model: {_SAVE}"
  if names and all(name.endswith(".npy") for name in names):
    return f"it is a NumPy archive: {_SAVE}"
  if any(name.endswith("archive_format") for name in names):
    return f"it is an archive of torch.export: {_SAVE}"
  if inner:
    return f"it is a zip archive that holds {inner[0]}: {_UNPACK}"
  return "the archive must hold one data.pkl, as torch.save writes it"


def _old_file(data: mmap.mmap) -> _Source:
  """A file of PyTorch before 1.6: pickles, then the storages one by one."""
  _, _, system = (_unpickle(data) for _ in range(3))
  is_little = not isinstance(system, dict) or system.get("little_endian", True)
  order: Literal["little", "big"] = "little" if is_little else "big"
  dtypes: dict[str, str] = {}
  tree = _unpickle(data, dtypes)
  places: dict[str, tuple[int, int]] = {}
  for key in _unpickle(data):
    if key not in dtypes:
      raise ValueError(f"its storage {key!r} has none of the types we know")
    number = int.from_bytes(data.read(8), order)
    itemsize = DTYPES[dtypes[key]].itemsize
    places[key] = data.tell(), number * itemsize
    if sum(places[key]) > len(data):
      raise ValueError(f"it is cut short: {_AGAIN}")
    data.seek(sum(places[key]))

  def decode(storage: Storage) -> np.ndarray:
    start, length = places[storage.key]
    return _decode(data[start : start + length], storage, order)

  return _Source(tree, lambda tensors: _views(tensors, decode))


def _views(
  tensors: Mapping[str, Tensor], decode: Callable[[Storage], np.ndarray]
) -> dict[str, np.ndarray]:
  """Copies tensors out of their storages, each of which is read once."""
  buffers: dict[Storage, np.ndarray] = {}
  result = {}
  for key, tensor in tensors.items():
    assert tensor.storage is not None
    if tensor.storage not in buffers:
      buffers[tensor.storage] = decode(tensor.storage)
    result[key] = _view(buffers[tensor.storage], tensor)
  return result


def _decode(data: bytes, storage: Storage, order: str) -> np.ndarray:
  """Interprets the bytes of a storage, written in the byte order given."""
  dtype = DTYPES[storage.dtype]
  start = storage.first * dtype.itemsize
  if len(data) < start + storage.num_elements * dtype.itemsize:
    raise ValueError(f"its storage {storage.key!r} is cut short")
  words = np.frombuffer(
    data, f"u{dtype.itemsize}", storage.num_elements, offset=start
  )
  return (words if order == sys.byteorder else words.byteswap()).view(dtype)


def _view(buffer: np.ndarray, tensor: Tensor) -> np.ndarray:
  """Copies the elements of a tensor out of its storage."""
  if 0 in tensor.shape:
    return np.zeros(tensor.shape, buffer.dtype)
  view = np.lib.stride_tricks.as_strided(
    buffer[tensor.start :],
    tensor.shape,
    [stride * buffer.itemsize for stride in tensor.strides],
    writeable=False,
  )
  return view.copy()
