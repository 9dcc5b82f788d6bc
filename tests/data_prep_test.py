import gzip
import hashlib
import io
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import (
  base,
  builder,
  cifar10,
  digits,
  fashion_mnist,
  phantom_digits,
  sources,
)
from data_prep import prepare as prepare_program
from psg_jax import catalog, data

ROOT = pathlib.Path(__file__).resolve().parent.parent
CIFAR_ZIP = ROOT.parent / "shared" / "data" / "cifar10-jpeg.zip"
RNG = np.random.default_rng(0)


# Raw files of every kind, as small as they can be.


def _idx(array: np.ndarray) -> bytes:
  header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
  return header + array.tobytes()


def _write_idx_files(folder: pathlib.Path) -> dict[str, np.ndarray]:
  folder.mkdir(exist_ok=True)
  arrays = {}
  for prefix, count in (("train", 12), ("t10k", 5)):
    arrays[f"{prefix}-images-idx3-ubyte.gz"] = RNG.integers(
      0, 256, (count, 28, 28), dtype=np.uint8
    )
    arrays[f"{prefix}-labels-idx1-ubyte.gz"] = RNG.integers(
      0, 10, count, dtype=np.uint8
    )
  for name, array in arrays.items():
    (folder / name).write_bytes(gzip.compress(_idx(array)))
  return arrays


def _png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


def _image_files() -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
  """Two training images and a test image of each class, as PNG."""
  pixels = {
    f"{split}/{name}/{number}.png": RNG.integers(
      0, 256, (32, 32, 3), dtype=np.uint8
    )
    for split, count in (("train", 2), ("test", 1))
    for name in cifar10.CLASS_NAMES
    for number in range(count)
  }
  return {path: _png(image) for path, image in pixels.items()}, pixels


def _write_zip(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def _write_tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with tarfile.open(path, "w:gz") as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


def _python2_pickle(
  pixels: np.ndarray, labels: list[int], files: list[str]
) -> bytes:
  """Pickles a batch as the official archive's Python 2 did (protocol 2)."""

  def text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value

  def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)

  rows, columns = pixels.shape
  array = (
    b"cnumpy.core.multiarray\n_reconstruct\n"
    + (b"cnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R")
    + (b"(" + integer(1) + integer(rows) + integer(columns) + b"\x86")
    + (b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R")
    + (b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) * 2)
    + (integer(0) + b"tb" + b"\x89" + text(pixels.tobytes()) + b"tb")
  )
  return (
    (b"\x80\x02}(" + text(b"data") + array)
    + (text(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e")
    + (text(b"filenames") + b"](")
    + (b"".join(text(file.encode()) for file in files) + b"eu.")
  )


def _batches() -> dict[str, tuple[np.ndarray, list[int], list[str]]]:
  names = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
  return {
    name: (
      RNG.integers(0, 256, (3, 3072), dtype=np.uint8),
      RNG.integers(0, 10, 3).tolist(),
      [f"{name}_s_{row:06d}.png" for row in range(3)],
    )
    for name in names
  }


def _archive_files(batches) -> dict[str, bytes]:
  return {
    f"cifar-10-batches-py/{name}": _python2_pickle(*batch)
    for name, batch in batches.items()
  }


@pytest.fixture
def image_files():
  return _image_files()


def _tree_of(folder: pathlib.Path) -> list[str]:
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Fashion-MNIST


def test_fashion_mnist_known(tmp_path):
  arrays = _write_idx_files(tmp_path / "raw")
  prepared = base.prepare(
    "fashion_mnist", data_dir=tmp_path, source=tmp_path / "raw"
  )
  assert prepared.is_new
  assert prepared.num_images == {"train": 12, "test": 5}
  for split, prefix in (("train", "train"), ("test", "t10k")):
    loaded = data.load("fashion_mnist", split, data_dir=tmp_path)
    expected = [
      np.asarray(
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
      )
      for pixels in arrays[f"{prefix}-images-idx3-ubyte.gz"]
    ]
    np.testing.assert_array_equal(loaded.images[..., 0], expected)
    np.testing.assert_array_equal(
      loaded.labels, arrays[f"{prefix}-labels-idx1-ubyte.gz"]
    )
    assert loaded.ids.tolist() == [
      f"{split}/{row:06d}" for row in range(len(loaded))
    ]
    assert loaded.class_names == fashion_mnist.CLASS_NAMES


@pytest.mark.parametrize(
  ("name", "spoil", "words"),
  [
    ("train-images-idx3", lambda raw: raw[:-1], r"must have 9424 bytes.*9423"),
    ("train-images-idx3", lambda raw: raw + b"0", "must have 9424 bytes"),
    ("t10k-images-idx3", lambda raw: raw[:9], "must have .* bytes, got 9"),
    ("t10k-labels-idx1", lambda raw: b"\0\0\x08\3" + raw[4:], "0x00000803"),
    ("t10k-labels-idx1", lambda raw: b"", "magic number 0x00000801"),
    ("t10k-labels-idx1", lambda raw: _idx(np.uint8([1, 2])), "5 images.*2 lab"),
    ("t10k-labels-idx1", lambda raw: raw[:-1] + b"\x0a", "labels.*9.*got 10"),
  ],
)
def test_idx_bad(tmp_path, name, spoil, words):
  raw = tmp_path / "raw"
  _write_idx_files(raw)
  path = raw / f"{name}-ubyte.gz"
  path.write_bytes(gzip.compress(spoil(gzip.decompress(path.read_bytes()))))
  with pytest.raises(ValueError, match=words) as error:
    base.prepare("fashion_mnist", data_dir=tmp_path / "out", source=raw)
  assert path.name in str(error.value)
  assert _tree_of(tmp_path / "out") == []


def test_idx_truncated_gzip(tmp_path):
  raw = tmp_path / "raw"
  _write_idx_files(raw)
  path = raw / "t10k-images-idx3-ubyte.gz"
  for content in (path.read_bytes()[:-20], b"no gzip at all"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"whole gzip files.*t10k-images"):
      base.prepare("fashion_mnist", data_dir=tmp_path / "out", source=raw)
  path.unlink()
  with pytest.raises(ValueError, match=r"source .*without t10k-images"):
    base.prepare("fashion_mnist", data_dir=tmp_path / "out", source=raw)


def test_fashion_mnist_from_debian():
  if not fashion_mnist.DEBIAN_DIR.is_dir():
    pytest.skip("Debian's package dataset-fashion-mnist is not installed")
  labels = fashion_mnist.read_idx(
    fashion_mnist.DEBIAN_DIR / "train-labels-idx1-ubyte.gz", 0x801
  )
  assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
  assert np.bincount(labels).tolist() == [6000] * 10
  images = fashion_mnist.read_idx(
    fashion_mnist.DEBIAN_DIR / "train-images-idx3-ubyte.gz", 0x803
  )
  assert images.shape == (60000, 28, 28)
  # The top of the first image, an ankle boot, as printed in many tutorials.
  assert images[0, 4, 12:22].tolist() == [3, 0, 36, 136, 127, 62, 54, 0, 0, 0]
  builder = fashion_mnist.PsgFashionMnist(data_dir="/nowhere")
  assert builder.find_files()["train-images-idx3-ubyte.gz"].is_file()


def test_fashion_mnist_downloads(tmp_path, monkeypatch):
  arrays = _write_idx_files(tmp_path / "site")
  hashes = {
    name: hashlib.sha256((tmp_path / "site" / name).read_bytes()).hexdigest()
    for name in arrays
  }
  monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path / "none")
  monkeypatch.setattr(fashion_mnist, "URL", (tmp_path / "site").as_uri())
  monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
  base.prepare("fashion_mnist", data_dir=tmp_path / "out")
  folder = tmp_path / "out" / "downloads" / "fashion_mnist"
  assert _tree_of(folder) == sorted(arrays)
  assert len(data.load("fashion_mnist", "test", data_dir=tmp_path / "out")) == 5


@pytest.mark.parametrize("place", ["debian", "out/downloads/fashion_mnist"])
def test_fashion_mnist_prepares_itself(tmp_path, monkeypatch, place):
  monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path / "debian")
  monkeypatch.setattr(fashion_mnist, "URL", (tmp_path / "none").as_uri())
  (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
  arrays = _write_idx_files(tmp_path / place)
  name = "t10k-labels-idx1-ubyte.gz"
  hidden = (tmp_path / place / name).rename(tmp_path / name)
  (tmp_path / "out").mkdir(exist_ok=True)
  # One file of four: nothing is downloaded unasked.
  with pytest.raises(ValueError, match=r"data_prep.prepare fashion_mnist"):
    data.load("fashion_mnist", "test", data_dir=tmp_path / "out")
  hidden.rename(tmp_path / place / name)
  test = data.load("fashion_mnist", "test", data_dir=tmp_path / "out")
  np.testing.assert_array_equal(test.labels, arrays[name])


# CIFAR-10 from images


@pytest.mark.parametrize("form", ["folder", "zip", "wrapped zip"])
def test_cifar10_images_known(tmp_path, image_files, form):
  files, pixels = image_files
  source = tmp_path / "raw"
  if form == "folder":
    for name, content in files.items():
      (source / name).parent.mkdir(parents=True, exist_ok=True)
      (source / name).write_bytes(content)
    (source / "train" / "cat" / "Thumbs.db").write_bytes(b"")
  elif form == "zip":
    _write_zip(source, files)
  else:
    extra = {"__MACOSX/._cifar": b"", "cifar/.DS_Store": b""}
    wrapped = {f"cifar/{name}": content for name, content in files.items()}
    _write_zip(source, wrapped | extra)
  base.prepare("cifar10", data_dir=tmp_path / "out", source=source)
  for split, count in (("train", 20), ("test", 10)):
    loaded = data.load("cifar10", split, data_dir=tmp_path / "out")
    assert sorted(loaded.ids) == sorted(
      name for name in files if name.startswith(split)
    )
    assert len(loaded) == count
    for row, name in enumerate(loaded.ids):
      np.testing.assert_array_equal(loaded.images[row], pixels[name])
      assert loaded.class_names[loaded.labels[row]] == name.split("/")[1]
    # Shuffled, so that the first rows are not all of one class.
    assert loaded.ids.tolist() != sorted(loaded.ids)
    assert loaded.metadata["file"].to_pylist() == loaded.ids.tolist()


def test_cifar10_order_is_the_same_everywhere(tmp_path, image_files):
  source = _write_zip(tmp_path / "raw.zip", image_files[0])
  backwards = dict(reversed(image_files[0].items()))
  other = _write_zip(tmp_path / "other.zip", backwards)
  base.prepare("cifar10", data_dir=tmp_path / "a", source=source)
  base.prepare("cifar10", data_dir=tmp_path / "b", source=other)
  ids = [
    data.load("cifar10", "train", data_dir=tmp_path / name).ids.tolist()
    for name in ("a", "b")
  ]
  assert ids[0] == ids[1]


def test_cifar10_other_sizes_and_modes(tmp_path, image_files):
  files = dict(image_files[0])
  grey = np.full((64, 48), 77, np.uint8)
  files["test/ship/0.png"] = _png(grey)
  source = _write_zip(tmp_path / "raw.zip", files)
  base.prepare("cifar10", data_dir=tmp_path, source=source)
  loaded = data.load("cifar10", "test", data_dir=tmp_path)
  row = loaded.ids.tolist().index("test/ship/0.png")
  assert np.all(loaded.images[row] == 77)


def _without(name: str):
  return lambda files: {
    path: content for path, content in files.items() if name not in path
  }


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda files: files | {"train/cat/1.png": b"junk"}, "train/cat/1.png in"),
    (
      lambda files: files | {"train/cat/1.png": files["train/cat/1.png"][:99]},
      "cannot be decoded: train/cat/1.png",
    ),
    (lambda files: files | {"../evil.png": b""}, r"outside.*'\.\./evil\.png'"),
    (lambda files: files | {"/etc/evil.png": b""}, "outside.*'/etc/evil.png'"),
    (lambda files: files | {"C:/evil.png": b""}, "outside.*'C:/evil.png'"),
    (lambda files: files | {"a\\..\\..\\b.png": b""}, "outside"),
    (_without("test/"), "folders train, test.* without test"),
    (_without("train/frog/"), "class folder train/frog is missing"),
    (
      lambda files: _without("test/frog/")(files) | {"test/frog/": b""},
      "class folder test/frog is empty",
    ),
    (
      lambda files: _without("test/frog/")(files) | {"test/frog/a.txt": b""},
      r"class folder test/frog holds none, but 1 \.txt \(not an image\)",
    ),
    (lambda files: files | {"train/unicorn/0.png": b""}, "got train/unicorn"),
  ],
)
def test_cifar10_images_bad(tmp_path, image_files, change, words):
  source = _write_zip(tmp_path / "raw.zip", change(image_files[0]))
  with pytest.raises(ValueError, match=words):
    base.prepare("cifar10", data_dir=tmp_path / "out", source=source)
  assert _tree_of(tmp_path / "out") == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_damaged(tmp_path, image_files):
  source = _write_zip(tmp_path / "raw.zip", image_files[0])
  content = bytearray(source.read_bytes())
  # Inside the first image, behind its local header.
  content[200] ^= 0xFF
  source.write_bytes(content)
  with pytest.raises(ValueError, match=r"train/airplane/0\.png.* cannot be r"):
    base.prepare("cifar10", data_dir=tmp_path / "out", source=source)
  with zipfile.ZipFile(source, "w") as archive:
    for name, image in [*image_files[0].items(), *image_files[0].items()]:
      archive.writestr(name, image)
  with pytest.raises(ValueError, match="twice"):
    base.prepare("cifar10", data_dir=tmp_path / "out", source=source)


def test_cifar10_real_subset(tmp_path):
  if not CIFAR_ZIP.is_file():
    pytest.skip(f"no raw data: {CIFAR_ZIP} is missing")
  with zipfile.ZipFile(CIFAR_ZIP) as archive:
    names = archive.namelist()
    files = {
      name: archive.read(name)
      for name in names
      if name.endswith(("0000.jpg", "0001.jpg"))
    }
  assert len(names) == 60000
  source = _write_zip(tmp_path / "part.zip", files)
  base.prepare("cifar10", data_dir=tmp_path, source=source)
  loaded = data.load("cifar10", "test", data_dir=tmp_path)
  assert np.bincount(loaded.labels).tolist() == [2] * 10
  name = "test/frog/0001.jpg"
  with Image.open(io.BytesIO(files[name])) as image:
    expected = np.asarray(image.convert("RGB"))
  row = loaded.ids.tolist().index(name)
  np.testing.assert_array_equal(loaded.images[row], expected)


# CIFAR-10 from the official archive


def test_cifar10_archive_known(tmp_path):
  batches = _batches()
  files = _archive_files(batches) | {"cifar-10-batches-py/readme.html": b"<p>"}
  source = _write_tar(tmp_path / "cifar-10-python.tar.gz", files)
  base.prepare("cifar10", data_dir=tmp_path, source=source)
  train = data.load("cifar10", "train", data_dir=tmp_path)
  test = data.load("cifar10", "test", data_dir=tmp_path)
  assert (len(train), len(test)) == (15, 3)
  assert train.ids[14] == "train/000014"
  # Row 14 is the last of the fifth batch, channel by channel there.
  pixels, labels, names = batches["data_batch_5"]
  assert train.labels[14] == labels[2]
  assert train.metadata["file"][14].as_py() == names[2]
  assert train.images[14, 0, 1].tolist() == [
    pixels[2, 1],
    pixels[2, 1024 + 1],
    pixels[2, 2048 + 1],
  ]
  assert train.images[14, 3, 0, 0] == pixels[2, 96]
  assert test.labels.tolist() == batches["test_batch"][1]


def test_cifar10_archive_by_python3(tmp_path):
  batches = _batches()
  keys = (b"data", b"labels", b"filenames")
  files = {
    f"cifar-10-batches-py/{name}": pickle.dumps(
      {
        key: [file.encode() for file in value] if key == b"filenames" else value
        for key, value in zip(keys, batch, strict=True)
      },
      protocol=3,
    )
    for name, batch in batches.items()
  }
  source = _write_tar(tmp_path / "cifar.tar.gz", files)
  for name, (pixels, labels, _) in cifar10.read_archive(source).items():
    np.testing.assert_array_equal(pixels, batches[name][0])
    assert labels == batches[name][1]


class _Evil:
  def __init__(self, path: pathlib.Path) -> None:
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_cifar10_pickle_runs_nothing(tmp_path):
  witness = tmp_path / "witness"
  files = _archive_files(_batches())
  content = pickle.dumps({b"data": _Evil(witness)})
  source = _write_tar(
    tmp_path / "raw.tar.gz",
    files | {"cifar-10-batches-py/data_batch_3": content},
  )
  with pytest.raises(ValueError, match=r"data_batch_3.*asks for pathlib"):
    base.prepare("cifar10", data_dir=tmp_path / "out", source=source)
  assert not witness.exists()
  pickle.loads(content)
  assert witness.exists()


@pytest.mark.parametrize(
  ("batch", "words"),
  [
    ((np.zeros((2, 3071), np.uint8), [0, 1], ["a", "b"]), r"\[2, 3071\]"),
    ((np.zeros((2, 3072), np.uint8), [0], ["a", "b"]), "1 labels"),
    ((np.zeros((2, 3072), np.uint8), [0, 1], ["a"]), "1 file names"),
    ((np.zeros((2, 3072), np.uint8), [0, 10], ["a", "b"]), "0 to 10"),
    ((np.zeros((2, 3072), np.uint8), [-1, 1], ["a", "b"]), "-1 to 1"),
    ((np.zeros((0, 3072), np.uint8), [], []), "0 labels"),
  ],
)
def test_cifar10_archive_bad_batch(tmp_path, batch, words):
  files = _archive_files(_batches() | {"test_batch": batch})
  source = _write_tar(tmp_path / "raw.tar.gz", files)
  with pytest.raises(ValueError, match=f"{words}.*test_batch"):
    base.prepare("cifar10", data_dir=tmp_path / "out", source=source)


def test_cifar10_archive_bad(tmp_path):
  path = tmp_path / "raw.tar.gz"
  files = _archive_files(_batches())
  outside = files | {"cifar-10-batches-py/../../evil": b""}
  with pytest.raises(ValueError, match=r"outside.*evil"):
    cifar10.read_archive(_write_tar(path, outside))
  junk = files | {"cifar-10-batches-py/data_batch_1": b"\x80\x02junk"}
  with pytest.raises(ValueError, match=r"data_batch_1.*cannot be read"):
    cifar10.read_archive(_write_tar(path, junk))
  floats = pickle.dumps({b"data": np.zeros((1, 3072))}, protocol=3)
  with pytest.raises(ValueError, match="not a C-ordered array of bytes"):
    cifar10.read_archive(_write_tar(path, {"x/test_batch": floats}))
  with pytest.raises(ValueError, match="without test_batch"):
    cifar10.read_archive(_write_tar(path, _without("test_batch")(files)))
  path.write_bytes(_write_tar(path, files).read_bytes()[:-3000])
  with pytest.raises(ValueError, match=r"must be cifar-10-python\.tar\.gz"):
    cifar10.read_archive(path)
  path.write_bytes(b"not an archive")
  with pytest.raises(ValueError, match=r"must be cifar-10-python\.tar\.gz"):
    cifar10.read_archive(path)


# Downloads


def test_download(tmp_path):
  (tmp_path / "a.bin").write_bytes(b"abc")
  url = (tmp_path / "a.bin").as_uri()
  digest = hashlib.sha256(b"abc").hexdigest()
  path = sources.download(url, digest, tmp_path / "to" / "here")
  assert path == tmp_path / "to" / "here" / "a.bin"
  assert path.read_bytes() == b"abc"
  # What is there, perhaps by hand, is not downloaded again.
  path.write_bytes(b"mine")
  assert sources.download(url, digest, path.parent).read_bytes() == b"mine"


def test_download_wrong_content(tmp_path):
  (tmp_path / "a.bin").write_bytes(b"abd")
  with pytest.raises(ValueError, match="must have the SHA-256 00, got"):
    sources.download((tmp_path / "a.bin").as_uri(), "00", tmp_path / "to")
  assert _tree_of(tmp_path / "to") == []


def test_download_fails(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10, "URL", (tmp_path / "x.tar.gz").as_uri())
  with pytest.raises(ValueError, match=r"x\.tar\.gz.*put x\.tar\.gz in") as e:
    base.prepare("cifar10", data_dir=tmp_path)
  assert str(tmp_path / "downloads" / "cifar10") in str(e.value)
  assert "--source" in str(e.value)
  assert _tree_of(tmp_path) == []


# All sets


def test_prepare_twice_does_nothing(tmp_path):
  first = base.prepare("digits", data_dir=tmp_path)
  stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
  second = base.prepare("digits", data_dir=tmp_path)
  assert (first.is_new, second.is_new) == (True, False)
  assert second.folder == first.folder == tmp_path / "psg_digits" / "1.0.0"
  assert stamps == {
    path: path.stat().st_mtime_ns for path in first.folder.iterdir()
  }
  assert sorted(path.name for path in tmp_path.iterdir()) == ["psg_digits"]


def test_overwrite_replaces(tmp_path):
  _write_idx_files(tmp_path / "raw")
  options = {"data_dir": tmp_path / "out", "source": tmp_path / "raw"}
  base.prepare("fashion_mnist", **options)
  labels = data.load("fashion_mnist", "train", data_dir=tmp_path / "out").labels
  arrays = _write_idx_files(tmp_path / "raw")
  assert not base.prepare("fashion_mnist", **options).is_new
  unchanged = data.load("fashion_mnist", "train", data_dir=tmp_path / "out")
  np.testing.assert_array_equal(unchanged.labels, labels)
  assert base.prepare("fashion_mnist", **options, is_overwriting=True).is_new
  changed = data.load("fashion_mnist", "train", data_dir=tmp_path / "out")
  np.testing.assert_array_equal(
    changed.labels, arrays["train-labels-idx1-ubyte.gz"]
  )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("is_overwriting", [False, True])
def test_interrupted(tmp_path, monkeypatch, error, is_overwriting):
  if is_overwriting:
    base.prepare("digits", data_dir=tmp_path)
  before = _tree_of(tmp_path)
  original = digits.examples

  def examples(split, raw, rows):
    for number, example in enumerate(original(split, raw, rows)):
      if split == "test" and number == 50:
        raise error("in the middle")
      yield example

  monkeypatch.setattr(digits, "examples", examples)
  with pytest.raises(error, match="in the middle"):
    base.prepare("digits", data_dir=tmp_path, is_overwriting=is_overwriting)
  assert _tree_of(tmp_path) == before
  if is_overwriting:
    assert len(data.load("digits", "test", data_dir=tmp_path)) == 360


def test_interrupted_while_swapping(tmp_path, monkeypatch):
  base.prepare("digits", data_dir=tmp_path)
  before = _tree_of(tmp_path)
  original = pathlib.Path.rename

  def rename(path, target):
    # The old set has just been moved away; the new one comes next.
    if not str(path).startswith(str(tmp_path / "psg_digits")) and (
      pathlib.Path(target).name == "1.0.0" and path.name != "old"
    ):
      raise KeyboardInterrupt
    return original(path, target)

  monkeypatch.setattr(pathlib.Path, "rename", rename)
  with pytest.raises(KeyboardInterrupt):
    base.prepare("digits", data_dir=tmp_path, is_overwriting=True)
  assert _tree_of(tmp_path) == before


def test_another_process_was_faster(tmp_path, monkeypatch):
  ready = base.prepare("digits", data_dir=tmp_path / "a").folder
  original = digits.examples

  def examples(split, raw, rows):
    if split == "test":
      target = tmp_path / "b" / "psg_digits" / "1.0.0"
      shutil.copytree(ready, target)
      (target / "mark").touch()
    yield from original(split, raw, rows)

  monkeypatch.setattr(digits, "examples", examples)
  prepared = base.prepare("digits", data_dir=tmp_path / "b")
  assert not prepared.is_new
  assert (prepared.folder / "mark").exists()


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("fashion-mnist", {}, "name .*did you mean 'fashion_mnist'"),
    ("cifar10", {"source": "/no/such"}, "source must be an existing.*/no/such"),
    ("digits", {"source": "."}, "source must not be given for 'digits'"),
    ("cifar10", {"source": __file__}, "source must be cifar.*data_prep_test"),
    ("fashion_mnist", {"source": __file__}, "source must be a folder with"),
  ],
)
def test_prepare_bad_input(tmp_path, name, options, words):
  with pytest.raises(ValueError, match=words):
    base.prepare(name, data_dir=tmp_path, **options)
  assert _tree_of(tmp_path) == []


def test_data_dir_is_a_file(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match=r"data_dir must be a folder.*file"):
    base.prepare("digits", data_dir=tmp_path / "file")


def test_names_do_not_clash_with_tfds():
  import tensorflow_datasets as tfds

  for name in catalog.BUILDERS:
    builder_class = base.builder_class(name)
    assert builder_class.name == f"psg_{name}"
    assert tfds.builder_cls(builder_class.name) is builder_class


# The program


def _run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
  monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
  try:
    prepare_program.main()
    status = 0
  except SystemExit as stop:
    status = stop.code
  output = capsys.readouterr()
  return status, output.out, output.err


def test_program(tmp_path, monkeypatch, capsys):
  arguments = ("digits", "--data_dir", tmp_path)
  status, out, err = _run(monkeypatch, capsys, *arguments)
  assert status == 0
  assert out.startswith("prepared digits (1,437 train, 360 test)")
  assert str(tmp_path / "psg_digits" / "1.0.0") in out
  assert "psg_digits train: 100%" in err
  status, out, _ = _run(monkeypatch, capsys, *arguments)
  assert status == 0
  assert "already prepared" in out
  assert "--overwrite" in out
  status, out, _ = _run(monkeypatch, capsys, *arguments, "--overwrite")
  assert status == 0
  assert out.startswith("prepared digits")


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("cifar11",), "error: name must be one of"),
    (("digits", "--source", "."), "error: source must not be given"),
    (("cifar10", "--source", "no/such.zip"), "error: source must be an exist"),
  ],
)
def test_program_bad_input(tmp_path, monkeypatch, capsys, arguments, words):
  status, out, err = _run(
    monkeypatch, capsys, *arguments, "--data_dir", tmp_path
  )
  assert status == 2
  assert not out
  assert err.startswith(words)
  assert err.count("\n") == 1


def test_program_interrupted(tmp_path, monkeypatch, capsys):
  def interrupted(*unused, **unused_options):
    raise KeyboardInterrupt

  monkeypatch.setattr(base, "prepare", interrupted)
  status, _, err = _run(monkeypatch, capsys, "digits")
  assert (status, err) == (130, "interrupted: nothing was changed\n")


def test_program_as_a_process():
  result = subprocess.run(
    [sys.executable, "-m", "data_prep.prepare", "digits", "--sauce", "x"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert "--sauce" in result.stderr
  assert "Traceback" not in result.stderr


# Damaged sets, and places that cannot be written.


@pytest.fixture(scope="module")
def prepared_digits(tmp_path_factory):
  root = tmp_path_factory.mktemp("digits")
  return root, base.prepare("digits", data_dir=root).folder


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("dataset_info.json", b"{"),
    ("features.json", b"[1]"),
    ("metadata.json", b"[1]"),
    ("label.labels.txt", b"one"),
    ("psg_digits-train.array_record-00000", b""),
  ],
)
def test_damaged_set_is_named(tmp_path, prepared_digits, name, content):
  root, folder = prepared_digits
  shutil.copytree(root, tmp_path, dirs_exist_ok=True)
  copy = tmp_path / folder.relative_to(root)
  (copy / name).write_bytes(content)
  with pytest.raises(ValueError, match="data_dir holds a damaged set") as error:
    data.load("digits", "train", data_dir=tmp_path)
  assert str(copy) in str(error.value)
  assert "\n" not in str(error.value)


def test_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
  def fail(*unused, **options):
    raise RuntimeError("write() failed: No space left on device;\nwriting x")

  monkeypatch.setattr(builder.tfds.core, "SequentialWriter", fail)
  monkeypatch.setattr(
    "sys.argv", ["prepare", "digits", "--data_dir", str(tmp_path / "new")]
  )
  with pytest.raises(SystemExit, match="2"):
    prepare_program.main()
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith("error: data_dir must be a folder that can be written")
  assert f"{tmp_path / 'new'}" in said
  assert "No space left on device; writing x" in said
  assert not _tree_of(tmp_path / "new")


def test_full_output_is_one_line(prepared_digits):
  if not pathlib.Path("/dev/full").exists():
    pytest.skip("no /dev/full on this system")
  command = [sys.executable, "-m", "data_prep.prepare", "digits", "--data_dir"]
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [*command, prepared_digits[0]], stdout=full, stderr=-1, cwd=ROOT
    )
  assert done.returncode == 2
  assert done.stderr.splitlines() == [
    b"error: the output cannot be written: No space left on device"
  ]


def test_phantom_digits_are_taken_by_four_devices():
  rng = np.random.default_rng(3)
  pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
  plain = [
    builder.Example(
      image=builder.from_array(pixels),
      label=1,
      id=str(row),
      columns={"row": row},
    )
    for row in range(200)
  ]
  taken = list(phantom_digits.taken(plain))
  devices = [example.columns["device"] for example in taken]
  # A quarter each, within four deviations of chance.
  for device in phantom_digits.DEVICES:
    assert abs(devices.count(device) - 50) < 4 * np.sqrt(200 * 0.25 * 0.75)
  images = {
    device: np.asarray(example.image)
    for device, example in zip(devices, taken, strict=True)
  }
  np.testing.assert_array_equal(images["plain"], pixels)
  # The first column, from its top, is the last row of the turned picture.
  np.testing.assert_array_equal(images["turned"][-1], pixels[:, 0])
  np.testing.assert_array_equal(images["dim"], np.round(pixels * 0.6))
  noise = images["noisy"].astype(float) - pixels
  assert 40 < noise.std() < 90
  # The same on every machine, whatever was drawn before.
  again = list(phantom_digits.taken(plain[5:]))
  np.testing.assert_array_equal(again[0].image, taken[5].image)
  assert [x.id for x in taken] == [x.id for x in plain]
