"""PathMNIST and SVHN, from files like the official ones."""

import numpy as np
import pytest
import scipy.io

from data_prep import base, pathmnist
from psg_jax import catalog, data

RNG = np.random.default_rng(0)


def _patches(number: int) -> np.ndarray:
  return RNG.integers(0, 256, (number, 28, 28, 3), dtype=np.uint8)


def _archive(path, **changes):
  arrays = {
    "train_images": _patches(9),
    "train_labels": np.arange(9, dtype=np.uint8)[:, None],
    "val_images": _patches(2),
    "val_labels": np.zeros((2, 1), np.uint8),
    "test_images": _patches(3),
    "test_labels": np.array([[8], [0], [4]], np.uint8),
  }
  np.savez(path, **arrays | changes)
  return arrays


def test_pathmnist_known(tmp_path):
  source = tmp_path / "pathmnist.npz"
  arrays = _archive(source)
  base.prepare("pathmnist", data_dir=tmp_path, source=source)
  train, test = (
    data.load("pathmnist", split, data_dir=tmp_path) for split in catalog.SPLITS
  )
  assert train.class_names == pathmnist.CLASS_NAMES
  assert train.labels.tolist() == list(range(9))
  assert test.labels.tolist() == [8, 0, 4]
  assert train.images.shape == (9, 32, 32, 3)
  # Resized, an image keeps its mean, and its colours their order.
  means = arrays["train_images"].mean((1, 2))
  np.testing.assert_allclose(train.images.mean((1, 2)), means, atol=4)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"test_labels": np.array([[9], [0], [4]], np.uint8)}, "from 0 to 9"),
    ({"train_labels": np.zeros((8, 1), np.uint8)}, "9 images and labels"),
    ({"train_images": np.zeros((9, 28, 28), np.uint8)}, r"\[9, 28, 28\]"),
    ({"test_labels": np.array([1, "a", None], object)}, "cannot be read"),
  ],
)
def test_what_is_no_pathmnist(tmp_path, changes, words):
  source = tmp_path / "pathmnist.npz"
  _archive(source, **changes)
  with pytest.raises(ValueError, match=words):
    base.prepare("pathmnist", data_dir=tmp_path / "out", source=source)
  assert not (tmp_path / "out" / "psg_pathmnist").exists()


def test_pathmnist_is_cut_off(tmp_path):
  source = tmp_path / "pathmnist.npz"
  _archive(source)
  source.write_bytes(source.read_bytes()[:2000])
  with pytest.raises(ValueError, match=r"pathmnist\.npz.*cannot be read"):
    base.prepare("pathmnist", data_dir=tmp_path / "out", source=source)


def _digits(folder, labels=(1, 10, 3), number=None):
  folder.mkdir(exist_ok=True)
  images = {}
  for name in ("train", "test"):
    count = len(labels) if number is None else number
    images[name] = RNG.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    scipy.io.savemat(
      folder / f"{name}_32x32.mat",
      {"X": images[name], "y": np.array(labels, np.uint8)[:, None]},
    )
  return images


def test_svhn_known(tmp_path):
  images = _digits(tmp_path / "raw")
  base.prepare("svhn", data_dir=tmp_path, source=tmp_path / "raw")
  train = data.load("svhn", "train", data_dir=tmp_path)
  # The digit 0 is written as 10.
  assert train.labels.tolist() == [1, 0, 3]
  np.testing.assert_array_equal(
    train.images, images["train"].transpose(3, 0, 1, 2)
  )


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"labels": (0, 1, 2)}, "labels from 0 to 2"),
    ({"number": 2}, "3 labels"),
  ],
)
def test_what_is_no_svhn(tmp_path, options, words):
  _digits(tmp_path / "raw", **options)
  with pytest.raises(ValueError, match=words):
    base.prepare("svhn", data_dir=tmp_path / "out", source=tmp_path / "raw")


def test_svhn_lacks_a_file(tmp_path):
  _digits(tmp_path / "raw")
  (tmp_path / "raw" / "test_32x32.mat").unlink()
  with pytest.raises(ValueError, match=r"without test_32x32\.mat"):
    base.prepare("svhn", data_dir=tmp_path / "out", source=tmp_path / "raw")


@pytest.mark.parametrize("name", ["pathmnist", "svhn"])
def test_only_the_user_has_the_files(tmp_path, name):
  with pytest.raises(ValueError, match=rf"data_prep\.prepare {name} --source"):
    data.load(name, "train", data_dir=tmp_path)
