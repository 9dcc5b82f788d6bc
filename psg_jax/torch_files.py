"""Tensors in the files that PyTorch and safetensors write.

PyTorch itself is not needed, and no code in a file is ever run. What a file is,
its first bytes say, not its ending. Names and shapes come first; arrays are
read only for what is wanted.
"""

import contextlib
import io
import math
import mmap
import os
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors

from psg_jax import checks, torch_pickles

# Such as BF16, U8 and BOOL.
_SAFETENSORS_DTYPES = {
  name.replace("float", "F").replace("uint", "U").replace("int", "I").upper(): (
    name
  )
  for name in torch_pickles.DTYPES
}
_MAX_LINE = 300
_MAX_DEPTH = 8
# A stride of 0 repeats an element at no cost in the file; a network of which
# most is repeated is none.
_MAX_REPEATS = 16
# What files of before PyTorch 1.6 start with, in whatever pickle protocol.
_OLD_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_SAVE = "save it with torch.save(model.state_dict(), path)"
_AGAIN = "download or copy it again"
_UNPACK = "unpack it first"
# What files that hold no weights begin with.
_FOREIGN = (
  (rb"<", f"a web page, not the file that was asked for: {_AGAIN}"),
  (rb"[{\[]", "JSON text, not the weights that it may speak of"),
  (rb".{257}ustar", f"a tar archive: {_UNPACK}"),
  (rb"\x08.{0,2}\x12", f"an ONNX model: {_SAVE}"),
  (rb"version https://git-lfs", "a pointer of Git LFS: git lfs pull brings it"),
  (rb"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes: {_SAVE}"),
  (rb"\x93NUMPY", f"a NumPy array: {_SAVE}"),
  (rb"GGUF", f"a GGUF file: {_SAVE}"),
  (rb"\x1f\x8b", f"compressed by gzip: {_UNPACK}"),
  (rb"BZh", f"compressed by bzip2: {_UNPACK}"),
  (rb"\xfd7zXZ", f"compressed by xz: {_UNPACK}"),
  (rb"\x28\xb5\x2f\xfd", f"compressed by zstd: {_UNPACK}"),
  (rb"7z\xbc\xaf", f"a 7z archive: {_UNPACK}"),
  (rb"Rar!", f"a RAR archive: {_UNPACK}"),
  (rb"\x80", f"a plain pickle, not PyTorch's: {_SAVE}"),
)
_WEIGHTS_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors")


class Contents(NamedTuple):
  """What a file holds.

  Attributes:
    dictionaries: The tensors by key of each dictionary with any, under where it
      stands in the file, `""` for the file itself.
    names: Keys of the outermost dictionary.
  """

  dictionaries: dict[str, dict[str, torch_pickles.Tensor]]
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
  tensors: Mapping[str, torch_pickles.Tensor],
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
  arrays: Callable[[Mapping[str, torch_pickles.Tensor]], dict[str, np.ndarray]]


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
  if not head:
    return f"it is empty: {_AGAIN}"
  if not head.strip(b"\0"):
    return f"it begins with zeros, as after a copy that broke off: {_AGAIN}"
  if path.suffix == ".onnx":
    return f"it is an ONNX model: {_SAVE}"
  # Texts may begin with a mark and blanks.
  text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
  for start, name in _FOREIGN:
    if re.match(start, head, re.DOTALL) or re.match(start, text, re.DOTALL):
      return f"it is {name}"
  return None


def _dictionaries(
  where: str, tree: Any, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, dict[str, torch_pickles.Tensor]]]:
  """Walks through what a file holds, the outermost first."""
  # A pickle may hold itself.
  if id(tree) in seen or depth > _MAX_DEPTH:
    return
  seen.add(id(tree))
  if isinstance(tree, dict):
    items: Iterable[tuple[Any, Any]] = tree.items()
  elif isinstance(tree, (list, tuple)) and not isinstance(
    tree, torch_pickles.Tensor
  ):
    items = enumerate(tree)
  else:
    return
  items = list(items)
  tensors = {
    key: value
    for key, value in items
    if isinstance(key, str) and isinstance(value, torch_pickles.Tensor)
  }
  if tensors:
    yield where, tensors
  for key, value in items:
    if isinstance(value, (dict, list, tuple)):
      name = f"{where}.{key}" if where else str(key)
      yield from _dictionaries(name, value, seen, depth + 1)


def _without_tensors(tree: Any) -> str:
  """Says what a file holds that has no dictionary of tensors."""
  name = torch_pickles.placeholder_name(tree)
  if name:
    return (
      f"it asks for {name!r}, which no state dict needs (save"
      " model.state_dict() alone)"
    )
  parts = []
  if isinstance(tree, dict):
    parts = [
      f"{str(key)[:30]} ({torch_pickles.placeholder_name(value)[:60]})"
      for key, value in tree.items()
      if torch_pickles.placeholder_name(value)
    ]
  has = f", but {checks.few(parts)}" if parts else ""
  return (
    f"it holds no dictionary of tensors{has} (save model.state_dict() alone)"
  )


def _check_size(tensors: Mapping[str, torch_pickles.Tensor], size: int) -> None:
  """Raises ValueError before memory is taken for what the file has not got."""
  for key, tensor in tensors.items():
    if tensor.fault:
      raise ValueError(f"its tensor {key} {tensor.fault}")
  claimed = sum(
    math.prod(tensor.shape) * torch_pickles.DTYPES[tensor.dtype].itemsize
    for tensor in tensors.values()
  )
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
    tree[key] = torch_pickles.Tensor(
      dtype or name, tuple(entry.get_shape()), fault=fault
    )
  return _Source(
    tree, lambda tensors: {key: opened.get_tensor(key) for key in tensors}
  )


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

  def decode(storage: torch_pickles.Storage) -> np.ndarray:
    try:
      data = archive.read(f"{root}data/{storage.key}")
    except KeyError:
      raise ValueError(f"it lacks its storage {storage.key!r}") from None
    return _decode(data, storage, order)

  tree = torch_pickles.unpickle(io.BytesIO(archive.read(pickles[0])))
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
  _, _, system = (torch_pickles.unpickle(data) for _ in range(3))
  is_little = not isinstance(system, dict) or system.get("little_endian", True)
  order: Literal["little", "big"] = "little" if is_little else "big"
  dtypes: dict[str, str] = {}
  tree = torch_pickles.unpickle(data, dtypes)
  places: dict[str, tuple[int, int]] = {}
  for key in torch_pickles.unpickle(data):
    if key not in dtypes:
      raise ValueError(f"its storage {key!r} has none of the types we know")
    number = int.from_bytes(data.read(8), order)
    itemsize = torch_pickles.DTYPES[dtypes[key]].itemsize
    places[key] = data.tell(), number * itemsize
    if sum(places[key]) > len(data):
      raise ValueError(f"it is cut short: {_AGAIN}")
    data.seek(sum(places[key]))

  def decode(storage: torch_pickles.Storage) -> np.ndarray:
    start, length = places[storage.key]
    return _decode(data[start : start + length], storage, order)

  return _Source(tree, lambda tensors: _views(tensors, decode))


def _views(
  tensors: Mapping[str, torch_pickles.Tensor],
  decode: Callable[[torch_pickles.Storage], np.ndarray],
) -> dict[str, np.ndarray]:
  """Copies tensors out of their storages, each of which is read once."""
  buffers: dict[torch_pickles.Storage, np.ndarray] = {}
  result = {}
  for key, tensor in tensors.items():
    assert tensor.storage is not None
    if tensor.storage not in buffers:
      buffers[tensor.storage] = decode(tensor.storage)
    result[key] = _view(buffers[tensor.storage], tensor)
  return result


def _decode(
  data: bytes, storage: torch_pickles.Storage, order: str
) -> np.ndarray:
  """Interprets the bytes of a storage, written in the byte order given."""
  dtype = torch_pickles.DTYPES[storage.dtype]
  start = storage.first * dtype.itemsize
  if len(data) < start + storage.num_elements * dtype.itemsize:
    raise ValueError(f"its storage {storage.key!r} is cut short")
  words = np.frombuffer(
    data, f"u{dtype.itemsize}", storage.num_elements, offset=start
  )
  return (words if order == sys.byteorder else words.byteswap()).view(dtype)


def _view(buffer: np.ndarray, tensor: torch_pickles.Tensor) -> np.ndarray:
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
