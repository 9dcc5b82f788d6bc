"""Tests of psg_jax.torch_files and psg_jax.torch_pickles."""

import argparse
import collections
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from psg_jax import torch_files, torch_pickles


class Raw(bytes):
  """Opcodes of a pickle, to be written as they are."""


def dump(value):
  """Pickles by hand what PyTorch's pickles consist of, without PyTorch."""
  if isinstance(value, Raw):
    return value
  if isinstance(value, dict):
    pairs = (dump(key) + dump(x) for key, x in value.items())
    return b"}(" + b"".join(pairs) + b"u"
  if isinstance(value, tuple):
    return b"(" + b"".join(map(dump, value)) + b"t"
  if isinstance(value, str):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
  # Without its first two and last bytes: the protocol and the end.
  return pickle.dumps(value, 2)[2:-1]


def named(name):
  """A class or function of this name."""
  module, _, name = name.rpartition(".")
  return Raw(f"c{module}\n{name}\n".encode())


def called(name, *arguments):
  """What a function of this name returns."""
  return Raw(named(name) + dump(arguments) + b"R")


STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "float64": "DoubleStorage",
  "int64": "LongStorage",
}


def tensor(key, array, *, shape=None, strides=None, start=0, number=None):
  """A tensor whose storage is the array, as `torch.save` refers to it."""
  kind = named(f"torch.{STORAGES[array.dtype.name]}")
  size = array.size if number is None else number
  storage = Raw(dump(("storage", kind, key, "cpu", size)) + b"Q")
  if strides is None:
    strides = tuple(x // array.itemsize for x in array.strides)
  return called(
    "torch._utils._rebuild_tensor_v2",
    storage,
    start,
    array.shape if shape is None else shape,
    strides,
    False,
    called("collections.OrderedDict"),
  )


def tensors(state):
  """A state dict of arrays, the storages of which are named by their place."""
  return {
    key: tensor(str(number), array)
    for number, (key, array) in enumerate(state.items())
  }


def write_pt(path, tree, state):
  """Writes what `torch.save` writes."""
  storages = {str(i): x.tobytes() for i, x in enumerate(state.values())}
  return write_archive(path, b"\x80\x02" + dump(tree) + b".", **storages)


def write_old_pt(path, tree, state, *, order="<"):
  """Writes what `torch.save` wrote before PyTorch 1.6."""
  parts = [
    pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    pickle.dumps(1001, 2),
    pickle.dumps({"little_endian": order == "<"}, 2),
    b"\x80\x02" + dump(tree) + b".",
    pickle.dumps([str(i) for i in range(len(state))], 2),
  ]
  for array in state.values():
    parts.append(struct.pack(f"{order}q", array.size))
    parts.append(array.astype(array.dtype.newbyteorder(order)).tobytes())
  path.write_bytes(b"".join(parts))
  return path


def load(path):
  """Reads all tensors of the first dictionary."""
  found = next(iter(torch_files.read(path).dictionaries.values()))
  return torch_files.arrays(path, found)


def fails(call, *parts):
  with pytest.raises(ValueError, match=r".") as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  assert len(message) < 600
  for part in parts:
    assert part in message, message


STATE = {
  "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
  "a.count": np.array(7, np.int64),
}


def assert_is_state(arrays, state=STATE):
  assert arrays.keys() == state.keys()
  for key, array in state.items():
    assert arrays[key].dtype == array.dtype
    np.testing.assert_array_equal(arrays[key], array)


# What stands beside the weights.


@pytest.mark.parametrize(
  "extra",
  [
    collections.Counter({10: 1}),
    np.float64(91.2),
    np.arange(3),
    np.dtype("float32"),
    collections.defaultdict(list, loss=[0.1]),
    argparse.Namespace(lr=0.1),
    {1, 2},
    b"bytes",
    called("torch.device", "cuda", 0),
    called("torch.Size", (2, 3)),
    named("torch.float32"),
    named("__main__.train_one_epoch"),
    Raw(named("__main__.Settings") + b")\x81" + dump({"lr": 0.1}) + b"b"),
    called("functools.partial", named("torch.optim.adam.Adam")),
    {Raw(named("__main__.Phase") + dump((1,)) + b"R"): 3},
    Raw(named("torch.nn.Linear") + b")\x81" + dump({"training": True}) + b"b"),
    called("torch._utils._rebuild_qtensor", 1),
    tensor("gone", np.zeros(3, np.float32)),
    tensor("0", np.zeros(3, np.float32), shape=(9, 9), strides=(9, 1)),
    tensor("0", np.zeros(3, np.float32), shape=(3,), strides=(-1,)),
    Raw(dump(("module", named("a.B"), "b.py", "class B: ...")) + b"Q)\x81"),
  ],
)
def test_what_stands_beside_the_weights_is_left(tmp_path, extra):
  tree = {"epoch": 3, "best": extra, "state": tensors(STATE), "lr": 0.1}
  path = write_pt(tmp_path / "a.pt", tree, STATE)
  found = torch_files.read(path)
  assert found.names == ("epoch", "best", "state", "lr")
  arrays = torch_files.arrays(path, found.dictionaries["state"])
  assert_is_state(arrays)


@pytest.mark.parametrize(
  "container", ["collections.OrderedDict", "collections.defaultdict", "a.Dict"]
)
def test_dictionaries_of_any_class(tmp_path, container):
  items = dump(tensors(STATE))[1:]
  path = write_pt(tmp_path / "a.pt", Raw(called(container) + items), STATE)
  assert_is_state(load(path))


def test_lists_and_dictionaries_within_others(tmp_path):
  tree = (3, {"net": {"weights": tensors(STATE)}})
  path = write_pt(tmp_path / "a.pt", tree, STATE)
  found = torch_files.read(path)
  assert list(found.dictionaries) == ["1.net.weights"]
  assert found.names == ()


def test_a_file_that_holds_itself(tmp_path):
  # An empty dictionary, remembered and put into itself.
  data = b"}q\0" + dump("self") + b"h\0s."
  fails(lambda: load(write_archive(tmp_path / "a.pt", data)), "no dictionary")


# Views.


def test_views(tmp_path):
  base = np.arange(12, dtype=np.float32)
  tree = {
    "transposed": tensor("0", base, shape=(4, 3), strides=(1, 4)),
    "part": tensor("0", base, shape=(2, 2), strides=(4, 1), start=5),
    "overlapping": tensor("0", base, shape=(3, 2), strides=(1, 1)),
    "repeated": tensor("0", base, shape=(3,), strides=(0,), start=2),
    "scalar": tensor("0", base, shape=(), strides=(), start=11),
    "empty": tensor("0", base, shape=(0, 3), strides=(3, 1)),
    "subclass": called(
      "torch._tensor._rebuild_from_type_v2",
      named("torch._utils._rebuild_parameter"),
      named("fastai.torch_core.TensorImage"),
      (tensor("0", base), True, {}),
      {},
    ),
    "old": Raw(
      tensor("0", base).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
    ),
  }
  arrays = load(write_pt(tmp_path / "a.pt", tree, {"base": base}))
  grid = base.reshape(3, 4)
  expected = {
    "transposed": grid.T,
    "part": grid[1:, 1:3],
    "overlapping": [[0, 1], [1, 2], [2, 3]],
    "repeated": [2, 2, 2],
    "scalar": 11,
    "empty": np.zeros((0, 3)),
    "subclass": base,
    "old": base,
  }
  assert arrays.keys() == expected.keys()
  for key, array in expected.items():
    np.testing.assert_array_equal(arrays[key], array, key)


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"shape": (2**31, 2), "strides": (0, 0)}, "claim 17179869184 bytes"),
    ({"shape": (2**70,), "strides": (0,)}, "claim"),
    ({"shape": (4, 2), "strides": (1, 1)}, "beyond its storage"),
    ({"shape": (2,), "strides": (1,), "start": 3}, "beyond its storage"),
    ({"shape": (2**40,), "number": 2**40, "strides": (1,)}, "claim"),
    ({"number": 5}, "cut short"),
    ({"strides": (-1,)}, "stride that is none"),
    ({"shape": (-2,), "strides": (1,)}, "shape or stride"),
    ({"strides": (1, 1)}, "shape or stride"),
    ({"start": -1}, "shape or stride"),
  ],
)
def test_tensors_that_are_not_there(tmp_path, changes, part):
  base = np.arange(4, dtype=np.float32)
  tree = {"x": tensor("0", base, **changes)}
  path = write_pt(tmp_path / "a.pt", tree, {"base": base})
  tracemalloc.start()
  fails(lambda: load(path), "path", part)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2**22


# Files by what is in them.


@pytest.mark.parametrize(
  "name", ["a.pt", "a.ckpt", "a.pth.tar", "a.bin", "a.safetensors", "weights"]
)
def test_the_content_decides(tmp_path, name):
  path = tmp_path / name
  assert_is_state(load(write_pt(path, tensors(STATE), STATE)))
  assert_is_state(load(write_old_pt(path, tensors(STATE), STATE)))
  safetensors_numpy.save_file(STATE, path)
  assert_is_state(load(path))


def test_old_files_of_either_byte_order_and_of_views(tmp_path):
  path = tmp_path / "a.pt"
  assert_is_state(load(write_old_pt(path, tensors(STATE), STATE, order=">")))
  # Before PyTorch 0.4, a storage could be a part of another.
  kind = named("torch.FloatStorage")
  storage = dump(("storage", kind, "0", "cpu", 6, ("1", 2, 3))) + b"Q"
  tree = {
    "a": called("torch._utils._rebuild_tensor", Raw(storage), 1, (2,), (1,))
  }
  state = {"a": np.arange(6, dtype=np.float32)}
  write_old_pt(path, tree, state)
  np.testing.assert_array_equal(load(path)["a"], [3, 4])
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  fails(lambda: load(path), "cut short")


@pytest.mark.parametrize(
  ("content", "part"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"\n  <?xml version='1.0'?><Error>", "web page"),
    (b'\xef\xbb\xbf{"error": "not found"}', "JSON"),
    (b"", "empty"),
    (bytes(1000), "zeros"),
    (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "ONNX"),
    (b"\x93NUMPY\x01\0", "NumPy"),
    (b"\x1f\x8b\x08", "gzip"),
    (bytes([1]) * 257 + b"ustar\x0000", "tar archive"),
    (b"PK\x03\x04" + bytes(100), "cut short"),
    (pickle.dumps({"a": 1}), "plain pickle"),
    (b"some text", "path must be"),
  ],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_other_files_are_named_as_what_they_are(tmp_path, name, content, part):
  path = tmp_path / name
  path.write_bytes(content)
  fails(lambda: load(path), f"got {str(path)!r}", part)


@pytest.mark.parametrize(
  ("names", "part"),
  [
    (["a/data.pkl", "a/constants.pkl"], "TorchScript"),
    (["a/data.pkl", "b/data.pkl"], "one data.pkl"),
    (["config.json", "model.weights.h5"], "Keras"),
    (["a.npy", "b.npy"], "NumPy"),
    (["x/archive_format", "x/data/weights/0"], "torch.export"),
    (["weights/best.pth"], "holds weights/best.pth"),
    (["readme.txt"], "one data.pkl"),
    ([], "one data.pkl"),
  ],
)
def test_other_archives_are_named_as_what_they_are(tmp_path, names, part):
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    for name in names:
      archive.writestr(name, b"}.")
  fails(lambda: load(tmp_path / "a.pt"), "path", part)


def test_a_cut_download_of_an_archive(tmp_path):
  path = write_pt(tmp_path / "a.pt", tensors(STATE), STATE)
  path.write_bytes(path.read_bytes()[:-30])
  fails(lambda: load(path), "cut short")


# safetensors.


def write_safetensors(path, header, data=b"", *, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  size = len(text) if length is None else length
  path.write_bytes(struct.pack("<Q", size) + text + data)
  return path


def entry(dtype, shape, start, stop):
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
  ("header", "length"),
  [
    (b"{}", 2**40),
    (b"{}", 2**64 - 1),
    (b"{]", None),
    (b"\xff\xfe", None),
    ({"a": entry("F32", [2], 0, 4)}, None),
    ({"a": entry("F32", [2**62, 4], 0, 8)}, None),
    ({"a": entry("F32", [-2], 0, 8)}, None),
    ({"a": entry("F32", [2], 8, 16)}, None),
    ({"a": entry("F32", [3], 0, 12)}, None),
    ({"a": entry("F32", [1], 0, 4)}, None),
    ({"a": {"dtype": "F32"}}, None),
    ({"a": entry("F99", [2], 0, 8)}, None),
    ({}, None),
  ],
)
def test_damaged_safetensors(tmp_path, header, length):
  path = write_safetensors(
    tmp_path / "a.safetensors", header, bytes(8), length=length
  )
  fails(lambda: load(path), "path must be")


def test_types_of_safetensors(tmp_path):
  state = {
    name: np.array([0, 1, 3], dtype)
    for name, dtype in torch_pickles.DTYPES.items()
  }
  safetensors_numpy.save_file(state, tmp_path / "a.safetensors")
  assert_is_state(load(tmp_path / "a.safetensors"), state)


def test_a_type_beside_the_weights_that_nobody_reads(tmp_path):
  header = {"a": entry("F8_E4M3", [4], 0, 4), "b": entry("BF16", [2], 4, 8)}
  values = np.array([1, -2], ml_dtypes.bfloat16)
  path = write_safetensors(
    tmp_path / "a.safetensors", header, bytes(4) + values.tobytes()
  )
  found = torch_files.read(path).dictionaries[""]
  fails(lambda: torch_files.arrays(path, found), "its tensor a is F8_E4M3")
  del found["a"]
  assert_is_state(torch_files.arrays(path, found), {"b": values})


# Hostile and damaged .pt files.


def write_archive(path, data, *, compression=zipfile.ZIP_STORED, **files):
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", data)
    for name, content in files.items():
      archive.writestr(f"archive/data/{name}", content)
  return path


class _Evil:
  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_no_code_is_run(tmp_path, protocol):
  marker = tmp_path / "ran"
  data = pickle.dumps(_Evil(os.mkdir, str(marker)), protocol)
  path = write_archive(tmp_path / "a.pt", data)
  fails(lambda: load(path), "path", "mkdir", "no state dict needs")
  assert not marker.exists()


@pytest.mark.parametrize(
  ("module", "name"),
  [
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("os", "system"),
    ("numpy", "dtype"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("psg_jax.torch_files", "_archive"),
    ("torch", "load"),
    ("x" * 10_000, "y"),
  ],
)
def test_globals_are_refused_by_name(tmp_path, module, name):
  data = f"c{module}\n{name}\n.".encode()
  path = write_archive(tmp_path / "a.pt", data)
  fails(lambda: load(path), "path", f"{module}.{name}"[:100])


# Opcodes that set attributes of the stand-ins: with a state dict (`}`) as the
# first or as the second part.
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = (
  b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
)


@pytest.mark.parametrize(
  "data",
  [
    pytest.param(TENSOR + b"}X\x01\0\0\0aK\x01sb.", id="attribute"),
    pytest.param(TENSOR + b"N}X\x0c\0\0\0__defaults__K\x01s\x86b.", id="slot"),
    pytest.param(b"ccollections\nOrderedDict\n)\x81.", id="newobj"),
    pytest.param(TENSOR + b"(N)))tR.", id="no storage"),
    pytest.param(STORAGE + b"J\xff\xff\xff\xfftQ.", id="negative length"),
    pytest.param(STORAGE + b"K\x02tQ.", id="bare storage"),
    pytest.param(
      b"}X\x01\0\0\0a" + TENSOR + b"(" + STORAGE + b"K\x02tQK\x01K\x02\x85"
      b"K\x01\x85tRs.",
      id="beyond the storage",
    ),
    pytest.param(b"}X\x01\0\0\0aK\x01Q.", id="persistent id"),
    pytest.param(b"}r\xff\xff\xff\x7f.", id="memo"),
    pytest.param(b"", id="empty"),
    pytest.param(b"}", id="cut short"),
    pytest.param(b"}.", id="no entries"),
    pytest.param(b"K\x01.", id="number"),
    pytest.param(b"]" + b"]a" * 10 + b".", id="list"),
    pytest.param(b"\x82\x01.", id="extension"),
    pytest.param(b"(" * 100_000 + b".", id="marks"),
  ],
)
def test_odd_pickles_are_refused(tmp_path, data):
  path = write_archive(tmp_path / "a.pt", data)
  fails(lambda: load(path), "path must be a PyTorch state dict")
  stand_in = torch_pickles.GLOBALS["torch._utils._rebuild_tensor_v2"]
  assert stand_in.function.__defaults__ is None


def test_odd_archives_are_refused(tmp_path):
  no_storage = b"}X\x01\0\0\0a" + TENSOR + b"(" + STORAGE
  no_storage += b"K\x02tQK\x00K\x02\x85K\x01\x85tRs."
  path = write_archive(tmp_path / "a.pt", no_storage)
  fails(lambda: load(path), "path")
  path = write_archive(tmp_path / "b.pt", no_storage, **{"0": b"\0" * 7})
  fails(lambda: load(path), "cut short")
  path = write_archive(
    tmp_path / "c.pt", b"}.", compression=zipfile.ZIP_DEFLATED
  )
  fails(lambda: load(path), "compressed")
  with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
    archive.writestr("other", b"")
  fails(lambda: load(tmp_path / "d.pt"), "data.pkl")


def test_big_endian_storages(tmp_path):
  data = b"}X\x01\0\0\0a" + TENSOR + b"(" + STORAGE
  data += b"K\x02tQK\x00K\x02\x85K\x01\x85tRs."
  path = tmp_path / "a.pt"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    archive.writestr("archive/byteorder", "big")
    archive.writestr("archive/data/0", struct.pack(">2f", 1.5, -2.0))
  np.testing.assert_array_equal(load(path)["a"], [1.5, -2.0])


def small_archive(folder):
  tensor = b"}X\x01\0\0\0a" + TENSOR + b"(" + STORAGE
  tensor += b"K\x02tQK\x00K\x02\x85K\x01\x85tRs."
  path = write_archive(folder / "a.pt", tensor, **{"0": bytes(8)})
  return path.read_bytes()


def test_names_that_a_damaged_file_quotes_are_cut(tmp_path):
  damaged = bytearray(small_archive(tmp_path))
  damaged[177] ^= 1
  (tmp_path / "a.pt").write_bytes(damaged)
  fails(lambda: load(tmp_path / "a.pt"), "path", "...")


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.data())
def test_damaged_files_give_one_line(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("damaged")
  whole = small_archive(folder)
  place = data.draw(st.integers(0, len(whole) - 1))
  damaged = bytearray(whole)
  damaged[place] ^= data.draw(st.integers(1, 255))
  if data.draw(st.booleans()):
    damaged = damaged[:place]
  (folder / "a.pt").write_bytes(damaged)
  said = ""
  # Not every byte of an archive has a meaning.
  try:
    load(folder / "a.pt")
  except ValueError as error:
    said = str(error)
  assert "\n" not in said
  assert said.startswith("path") or not said
