import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_prep import base
from psg_jax import data, streaming, types
from tests import fakes


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("digits")
  data.load("digits", "train", data_dir=folder)
  return folder


def _dataset(images: np.ndarray) -> types.Dataset:
  return types.Dataset(
    images=images,
    labels=np.arange(len(images)) % 2,
    class_names=("a", "b"),
    ids=np.array([f"id{row}" for row in range(len(images))]),
  )


def test_names():
  assert {"digits", "fashion_mnist", "cifar10"} <= set(data.names())


def test_digits_prepare_themselves(digits_dir):
  train = data.load("digits", "train", data_dir=digits_dir)
  test = data.load("digits", "test", data_dir=digits_dir)
  assert train.images.shape == (1437, 32, 32, 1)
  assert test.images.shape == (360, 32, 32, 1)
  assert train.class_names == tuple("0123456789")
  # Of the 1,797: 178, 182, 177, 183, 181, 182, 181, 179, 174, 180.
  np.testing.assert_array_equal(
    np.bincount(test.labels), [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
  )
  rows = train.metadata["row"].to_pylist() + test.metadata["row"].to_pylist()
  assert sorted(rows) == list(range(1797))
  # Pinned: another split would make stored results incomparable.
  assert test.metadata["row"].to_pylist()[:3] == [21, 24, 28]


def test_digits_pixels(digits_dir):
  from sklearn import datasets

  train = data.load("digits", "train", data_dir=digits_dir)
  row = train.metadata["row"][5].as_py()
  digits = datasets.load_digits()
  assert train.labels[5] == digits.target[row]
  # Bilinear enlargement by 4 of a 4x4 block's mean keeps the picture's mean,
  # but for the rounding of pixels and what the border repeats.
  assert train.images[5].mean() == pytest.approx(
    digits.images[row].mean() * 255 / 16, abs=2.0
  )
  # Between two equal neighbours nothing changes: the blank corner.
  assert digits.images[row][0, 0] == 0
  assert train.images[5][:2, :2].max() == 0
  assert train.images.max() == 255


def test_metadata(digits_dir):
  test = data.load("digits", "test", data_dir=digits_dir)
  assert test.metadata.column_names[:2] == ["id", "label"]
  assert test.metadata["id"].to_pylist() == test.ids.tolist()
  assert test.ids[7] == "test/000007"
  assert len(set(test.ids)) == len(test)
  assert test.metadata["label"].to_pylist() == [
    test.class_names[label] for label in test.labels
  ]


def test_same_on_every_load(digits_dir, tmp_path):
  first = data.load("digits", "test", data_dir=digits_dir)
  again = data.load("digits", "test", data_dir=tmp_path)
  np.testing.assert_array_equal(first.images, again.images)
  np.testing.assert_array_equal(first.ids, again.ids)


def test_environment_variable(digits_dir, monkeypatch):
  monkeypatch.setenv("PSG_JAX_DATA", str(digits_dir))
  assert data.root_dir() == digits_dir.resolve()
  assert len(data.load("digits", "test")) == 360
  monkeypatch.delenv("PSG_JAX_DATA")
  assert data.root_dir() == (
    pathlib.Path("~/.cache/psg_jax").expanduser().resolve()
  )


def test_newest_version_is_read(digits_dir, tmp_path):
  shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / "psg_digits"
  (folder / "1.0.0").rename(folder / "0.9.0")
  (folder / "0.10.0").mkdir()
  # 0.10.0 is empty: not prepared.
  assert len(data.load("digits", "test", data_dir=tmp_path)) == 360
  assert not (folder / "1.0.0").exists()


@pytest.mark.parametrize(
  ("name", "split", "words"),
  [
    ("cifar", "train", ["name", "'cifar'", "did you mean 'cifar10'"]),
    ("digits", "valid", ["split", "'valid'", "train, test"]),
    ("cifar10", "train", ["'cifar10'", "python -m data_prep.prepare cifar10"]),
  ],
)
def test_load_bad_input(tmp_path, name, split, words):
  with pytest.raises(ValueError, match=words[0]) as error:
    data.load(name, split, data_dir=tmp_path)
  assert all(word in str(error.value) for word in words)


def test_load_missing_folder(tmp_path):
  missing = tmp_path / "nowhere"
  with pytest.raises(ValueError, match=r"data_dir.*nowhere.*does not exist"):
    data.load("cifar10", "train", data_dir=missing)
  assert not missing.exists()
  missing.write_text("")
  with pytest.raises(ValueError, match=r"data_dir.*nowhere.*is a file"):
    data.load("cifar10", "train", data_dir=missing)


def test_load_damaged(digits_dir, tmp_path):
  shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
  next(tmp_path.glob("**/*test.array_record*")).unlink()
  with pytest.raises(ValueError, match=r"test\.array_record.*--overwrite"):
    data.load("digits", "test", data_dir=tmp_path)


def test_empty_text_is_null(tmp_path, monkeypatch):
  from data_prep import digits

  original = digits.examples

  def examples(split, raw, rows):
    for example in original(split, raw, rows[:3]):
      yield example._replace(columns={**example.columns, "note": ""})

  def info(self):
    return self.image_info(
      description="Digits.",
      class_names=list("0123456789"),
      image_shape=(32, 32, 1),
      origin="a test",
      columns={"row": np.int64, "note": digits.tfds.features.Text()},
    )

  monkeypatch.setattr(digits, "examples", examples)
  monkeypatch.setattr(digits.PsgDigits, "_info", info)
  base.prepare("digits", data_dir=tmp_path)
  table = data.load("digits", "test", data_dir=tmp_path).metadata
  assert table["note"].to_pylist() == [None, None, None]
  assert table["row"].null_count == 0


def test_import_needs_no_builders():
  code = (
    "import sys; from psg_jax import data;"
    " assert not any(name.startswith('data_prep') for name in sys.modules);"
    " import data_prep.base;"
    " assert 'tensorflow' not in sys.modules and 'tyro' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_data_prep_of_somebody_else_is_named(tmp_path):
  theirs = tmp_path / "here" / "data_prep"
  theirs.mkdir(parents=True)
  (theirs / "__init__.py").touch()
  code = (
    f"import sys; sys.path.insert(0, {str(theirs.parent)!r});"
    " from psg_jax import data\n"
    f"try: data.load('digits', 'test', data_dir={str(tmp_path)!r})\n"
    "except ValueError as error: print(error)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True
  )
  assert done.stdout.startswith("name 'digits' needs psg_jax's package")
  assert f"got the one in {theirs}" in done.stdout
  assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("num_channels", [1, 3])
def test_mean_and_std(num_channels):
  generator = np.random.default_rng(0)
  shape = (150, 5, 4, num_channels)
  images = generator.integers(0, 256, shape, dtype=np.uint8)
  images[..., 0] //= 2
  mean, std = data.mean_and_std(_dataset(images))
  scaled = images.astype(np.float64) / 255
  # Float64 sums against exact ones.
  np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-12)
  assert all(type(value) is float for value in (*mean, *std))


def test_mean_and_std_known():
  images = np.zeros((2, 1, 1, 2), np.uint8)
  images[1, ..., 0] = 255
  images[..., 1] = 51
  assert data.mean_and_std(_dataset(images)) == ((0.5, 0.2), (0.5, 0.0))


def test_mean_and_std_empty():
  with pytest.raises(ValueError, match=r"dataset .*\[0, 2, 2, 1\]"):
    data.mean_and_std(_dataset(np.zeros((0, 2, 2, 1), np.uint8)))


def test_subset():
  images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
  whole = _dataset(images)
  first = data.subset(whole, 4)
  np.testing.assert_array_equal(first.images.ravel(), [0, 1, 2, 3])
  chosen = data.subset(whole, 8, seed=3)
  rows = chosen.images.ravel()
  assert len(np.unique(rows)) == 8
  assert np.all(np.diff(rows) > 0)
  assert not np.array_equal(rows, np.arange(8))
  assert chosen.ids.tolist() == [f"id{row}" for row in rows]
  np.testing.assert_array_equal(chosen.labels, rows % 2)
  np.testing.assert_array_equal(
    rows, data.subset(whole, 8, seed=3).images.ravel()
  )
  assert not np.array_equal(rows, data.subset(whole, 8, seed=4).images.ravel())


@pytest.mark.parametrize(
  ("num_images", "seed", "words"),
  [
    (0, None, "num_images .*0"),
    (21, None, "num_images .*20.*21"),
    (2.5, None, r"num_images .*2\.5"),
    (2, -1, "seed .*-1"),
  ],
)
def test_subset_bad_input(num_images, seed, words):
  whole = _dataset(np.zeros((20, 1, 1, 1), np.uint8))
  with pytest.raises(ValueError, match=words):
    data.subset(whole, num_images, seed=seed)


def test_open_builder_reads_what_load_reads(digits_dir):
  builder = data.open_builder("digits", "test", data_dir=digits_dir)
  source = builder.as_data_source(
    "test", decoders={"image": data.tfds.decode.SkipDecoding()}
  )
  loaded = data.load("digits", "test", data_dir=digits_dir)
  assert len(source) == len(loaded)
  records = source.__getitems__([3, 70])
  for record, row in zip(records, (3, 70), strict=True):
    pixels = data.decode_image(record["image"])
    np.testing.assert_array_equal(pixels, loaded.images[row])
  columns = {
    key: [record[key] for record in records] for key in ("row", "label", "id")
  }
  table = data.to_table(builder, columns)
  assert table.equals(loaded.metadata.take([3, 70]).select(table.column_names))
  with pytest.raises(ValueError, match="split"):
    data.open_builder("digits", "val", data_dir=digits_dir)


def test_open_set_reads_what_is_asked_for(digits_dir, monkeypatch):
  loaded = data.load("digits", "test", data_dir=digits_dir)
  opened = data.open_set("digits", "test", data_dir=digits_dir)
  assert (len(opened), opened.image_shape) == (360, (32, 32, 1))
  rows = np.array([70, 3, 3])
  np.testing.assert_array_equal(opened.read(rows), loaded.images[rows])
  again = pickle.loads(pickle.dumps(opened))
  np.testing.assert_array_equal(again.read(rows), loaded.images[rows])
  monkeypatch.setattr(data, "decode_image", None)
  images = streaming.Images([opened], np.arange(360), (32, 32, 1), 0)
  dataset = opened.dataset(images)
  np.testing.assert_array_equal(dataset.labels, loaded.labels)
  np.testing.assert_array_equal(dataset.ids, loaded.ids)
  assert dataset.class_names == loaded.class_names
  assert dataset.metadata.equals(loaded.metadata)


def test_a_set_that_is_prepared_anew_is_read_anew(tmp_path):
  base.prepare("digits", data_dir=tmp_path)
  opened = data.open_set("digits", "test", data_dir=tmp_path)
  before = opened.read(np.arange(3))
  base.prepare("digits", data_dir=tmp_path, is_overwriting=True)
  again = data.open_set("digits", "test", data_dir=tmp_path)
  assert again != opened
  np.testing.assert_array_equal(again.read(np.arange(3)), before)


def test_validation_part_is_apart_and_of_all_classes():
  dataset = fakes.blobs(60)
  left, held = data.hold_out(dataset, 0.25, seed=3)
  assert not set(left.ids) & set(held.ids)
  assert set(left.ids) | set(held.ids) == set(dataset.ids)
  counts = np.bincount(held.labels, minlength=3)
  np.testing.assert_array_equal(
    counts, np.round(0.25 * np.bincount(dataset.labels))
  )
  again = data.hold_out(dataset, 0.25, seed=3)[1]
  np.testing.assert_array_equal(held.ids, again.ids)
  other = data.hold_out(dataset, 0.25, seed=4)[1]
  assert set(held.ids) != set(other.ids)


@pytest.mark.parametrize("fraction", [0.001, 0.999, 1.5, 0])
def test_validation_part_must_leave_both_sides(fraction):
  with pytest.raises(ValueError, match=f"fraction .* got {fraction}"):
    data.hold_out(fakes.blobs(60), fraction, seed=0)
