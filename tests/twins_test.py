"""Tests of psg_jax.twins: known answers on real pictures, then properties."""

import gzip
import hashlib
import io
import json
import pathlib
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance
from sklearn import datasets

from psg_jax import fingerprints, twins, types

FASHION = pathlib.Path(
  "/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz"
)
BRAIN_TUMOR_MRI = (
  pathlib.Path(__file__).parents[2] / "shared/data/brain-tumor-mri.zip"
)
SIZE = 64


def make_dataset(images, prefix="", files=None):
  images = np.asarray(images, np.uint8)
  ids = np.array([f"{prefix}{i}" for i in range(len(images))], "U20")
  table = None if files is None else pa.table({"id": ids, "sha256": files})
  return types.Dataset(
    images=images,
    labels=np.arange(len(images), dtype=np.int32) % 3,
    class_names=("a", "b", "c"),
    ids=ids,
    metadata=table,
  )


def tile(name, row, column):
  """A piece of one of scikit-learn's photographs, 64 x 64."""
  image = Image.fromarray(datasets.load_sample_image(name))
  left, top = column * 128, row * 128
  piece = image.crop((left, top, left + 128, top + 128))
  return np.asarray(piece.resize((SIZE, SIZE)))


@pytest.fixture(scope="module")
def pictures():
  """20 different pieces of photographs, uint8 `[20, 64, 64, 3]`."""
  pieces = [
    tile(name, row, column)
    for name in ("china.jpg", "flower.jpg")
    for row in range(3)
    for column in range(4)
  ]
  # Plain sky is noise, in which no picture can be found again.
  return np.stack([piece for piece in pieces if contrast(piece) > 20])[:20]


def contrast(image):
  return np.asarray(Image.fromarray(image).convert("L")).std()


@pytest.fixture(scope="module")
def garments():
  if not FASHION.is_file():
    pytest.skip("Fashion-MNIST is not on this machine")
  with gzip.open(FASHION) as file:
    pixels = np.frombuffer(file.read(16 + 1000 * 784), np.uint8)
  return pixels[16:].reshape(-1, 28, 28, 1)


def encode(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, "JPEG", quality=85)
  return np.asarray(Image.open(stream))


def rescale(image):
  large = Image.fromarray(image).resize((SIZE * 3 // 2, SIZE * 3 // 2))
  return np.asarray(large.resize((SIZE, SIZE)))


def lighten(image):
  return np.asarray(
    ImageEnhance.Brightness(Image.fromarray(image)).enhance(1.02)
  )


def kinds(a, b, **options):
  found = twins.find(
    {"a": make_dataset(a), "b": make_dataset(b)}, **options
  ).pairs
  return {pair.rows: pair.kind for pair in found}


# Known answers.


def test_a_copy_is_exact(pictures):
  assert kinds(pictures, pictures[[5, 2]]) == {
    (5, 0): "exact",
    (2, 1): "exact",
  }
  changed = pictures.copy()
  changed[3, 0, 0, 0] ^= 1
  found = kinds(pictures, changed)
  assert found.pop((3, 3)) == "near"
  assert found == {(i, i): "exact" for i in range(20) if i != 3}


@pytest.mark.parametrize("change_fn", [encode, rescale, lighten])
def test_the_same_picture_otherwise_is_near(pictures, change_fn):
  changed = np.stack([change_fn(image) for image in pictures])
  assert not np.any(np.all(changed == pictures, axis=(1, 2, 3)))
  found = kinds(pictures, changed)
  # All of them, and no picture with another.
  assert found == {(i, i): "near" for i in range(20)}


def test_different_and_mirrored_pictures_are_not_twins(pictures):
  assert kinds(pictures[:12], pictures[12:]) == {}
  assert kinds(pictures, pictures[:, :, ::-1]) == {}
  assert kinds(pictures, pictures[:, ::-1]) == {}


def test_garments_of_one_kind_are_not_twins(garments):
  # None of these thousand was photographed twice.
  assert kinds(garments[:500], garments[500:]) == {}


def test_limits_are_obeyed(pictures):
  encoded = np.stack([encode(image) for image in pictures])
  assert kinds(pictures, encoded, min_correlation=1.0) == {}
  loose = kinds(pictures, encoded, max_distance=64, min_correlation=1e-6)
  assert len(loose) > 20
  found = twins.find({"a": make_dataset(pictures), "b": make_dataset(encoded)})
  distances = [pair.distance for pair in found.pairs]
  farthest = max(distances)
  assert farthest > 0
  closer = kinds(pictures, encoded, max_distance=farthest - 1)
  assert len(closer) == 20 - distances.count(farthest)


def test_plain_images_are_only_exact_twins():
  plain = np.stack([np.full((8, 8, 1), value) for value in (0, 9, 9, 200)])
  found = twins.find({"a": make_dataset(plain)}, pairs=[("a", "a")])
  assert [(pair.kind, pair.rows) for pair in found.pairs] == [("exact", (1, 2))]
  assert found.pairs[0].correlation == 0


def test_equal_files_are_exact_and_join_groups(pictures):
  # Rows 0 and 1 have one file, 1 and 2 the same pixels, 3 stands alone.
  dataset = make_dataset(
    pictures[[0, 1, 1, 2, 3]], files=["F" * 64, "f" * 64, None, "e" * 64, ""]
  )
  groups = twins.exact_groups(twins.fingerprint(dataset))
  assert [rows.tolist() for rows in groups] == [[0, 1, 2]]


def test_equal_bytes_of_another_shape_are_no_twins(pictures):
  wide = pictures.reshape(20, SIZE // 2, SIZE * 2, 3)
  assert kinds(pictures, wide) == {}


def test_counts_groups_and_report(pictures):
  changed = encode(pictures[7])
  forget = make_dataset(pictures[[0, 1, 7]], "f")
  retain = make_dataset(pictures[[3, 0, 4, 0]], "r")
  test = make_dataset([pictures[4], changed, pictures[9]], "t")
  found = twins.find({"forget": forget, "retain": retain, "test": test})
  assert found.counts() == {
    ("forget", "retain"): {"exact": 2, "near": 0},
    ("forget", "test"): {"exact": 0, "near": 1},
    ("retain", "test"): {"exact": 1, "near": 0},
  }
  assert [(pair.between, pair.ids) for pair in found.pairs] == [
    (("forget", "retain"), ("f0", "r1")),
    (("forget", "retain"), ("f0", "r3")),
    (("forget", "test"), ("f2", "t1")),
    (("retain", "test"), ("r2", "t0")),
  ]
  assert found.groups == (
    (("forget", "f0"), ("retain", "r1"), ("retain", "r3")),
    (("retain", "r2"), ("test", "t0")),
  )
  plain = json.loads(json.dumps(found.as_dict()))
  assert plain["num_images"] == {"forget": 3, "retain": 4, "test": 3}
  assert plain["counts"][0] == {
    "between": ["forget", "retain"],
    "exact": 2,
    "near": 0,
  }
  assert plain["pairs"][2]["ids"] == ["f2", "t1"]
  assert plain["groups"][1] == [["retain", "r2"], ["test", "t0"]]
  lines = str(found).split("\n")
  assert lines[1].split() == ["forget", "and", "retain", "2", "0"]
  assert lines[4] == "2 groups of exact twins in all"
  assert len(lines) == 9
  only = twins.find(found.fingerprints, pairs=[("retain", "test")])
  assert only.pairs == found.pairs[3:]


# Parity with ImageHash.


def test_hashes_are_those_of_imagehash(pictures, garments):
  imagehash = pytest.importorskip("imagehash")
  for images in (pictures, garments[:300]):
    prints = twins.fingerprint(make_dataset(images))
    expected = [
      str(imagehash.phash(Image.fromarray(image.squeeze()))) for image in images
    ]
    assert [f"{value:016x}" for value in prints.hashes] == expected


# Properties.


def test_order_and_side_do_not_matter(pictures):
  rng = np.random.default_rng(0)
  other = np.stack([*map(encode, pictures[:8]), *pictures[8:16]])
  expected = kinds(pictures, other)
  assert len(expected) == 16
  mirrored = kinds(other, pictures)
  assert mirrored == {(b, a): kind for (a, b), kind in expected.items()}
  order = rng.permutation(20)
  shuffled = kinds(pictures[order], other)
  assert {(order[a], b): kind for (a, b), kind in shuffled.items()} == expected


def test_blocks_do_not_matter(garments, monkeypatch):
  lighter = (garments // 2).astype(np.uint8)
  expected = kinds(garments[:60], lighter[:90])
  assert len(expected) >= 60
  monkeypatch.setattr(fingerprints, "READ_SIZE", 7)
  monkeypatch.setattr(twins, "MATCH_SIZE", (11, 13))
  monkeypatch.setattr(twins, "CONFIRM_SIZE", 5)
  assert kinds(garments[:60], lighter[:90]) == expected


class Lazy:
  """Images that may only be read a few at a time."""

  dtype = np.dtype(np.uint8)
  ndim = 4

  def __init__(self, images):
    self._images = images
    self.shape = images.shape

  def __len__(self):
    return len(self._images)

  def __getitem__(self, rows):
    images = self._images[rows]
    assert len(images) <= 300
    return images

  def take(self, rows):
    return Lazy(self._images[rows])


def test_images_are_read_in_parts(garments):
  dataset = make_dataset(garments)
  lazy = types.Dataset(
    images=Lazy(garments),
    labels=dataset.labels,
    class_names=dataset.class_names,
    ids=dataset.ids,
  )
  here, there = (twins.fingerprint(each) for each in (dataset, lazy))
  for name in ("ids", "pixels", "files", "hashes", "greys"):
    np.testing.assert_array_equal(getattr(here, name), getattr(there, name))


@pytest.mark.parametrize("num_images", [0, 1])
def test_few_images(pictures, num_images):
  few = make_dataset(pictures[:num_images])
  found = twins.find({"a": few, "b": make_dataset(pictures)})
  assert len(found.pairs) == num_images
  assert len(found.groups) == num_images
  assert twins.find({"a": few}, pairs=[("a", "a")]).pairs == ()
  assert twins.exact_groups(twins.fingerprint(few)) == []


@pytest.mark.parametrize("num_images", [3, 30])
def test_blank_images_cost_what_images_do(pictures, num_images, monkeypatch):
  monkeypatch.setattr(twins, "MAX_PAIRS", 100)
  blank = np.zeros((num_images, *pictures.shape[1:]), np.uint8)
  parts = {
    "forget": make_dataset(np.concatenate([blank, pictures[:2]])),
    "retain": make_dataset(np.concatenate([blank, pictures[1:4]])),
  }
  found = twins.find(parts)
  assert len(found.pairs) <= max(10, 2 * num_images)
  for side in (0, 1):
    rows = {pair.rows[side] for pair in found.pairs}
    # The one picture that both have is the last or the first.
    assert rows == {*range(num_images), num_images + 1 - side}
  assert [len(group) for group in found.groups] == [2 * num_images, 2]
  moved = [*range(num_images), num_images]
  for near in (False, True):
    assert twins.moved_rows(found, near=near).tolist() == moved


# Moving.


def make_split(forget, retain):
  """Parts of one data set, whose rows are given."""
  images = np.concatenate([forget, retain])
  files = [f"{i:064x}" for i in range(len(images))]
  dataset = make_dataset(images, files=files)
  is_forgotten = np.arange(len(images)) < len(forget)
  return dataset, types.Split(
    forget=dataset.take(is_forgotten), retain=dataset.take(~is_forgotten)
  )


def test_exact_twins_move(pictures):
  _, split = make_split(pictures[[0, 1]], pictures[[2, 1, 3, 0, 1]])
  moved = twins.move(split)
  assert moved.forget.ids.tolist() == ["0", "1", "3", "5", "6"]
  assert moved.retain.ids.tolist() == ["2", "4"]
  np.testing.assert_array_equal(moved.forget.images, pictures[[0, 1, 1, 0, 1]])
  np.testing.assert_array_equal(moved.retain.images, pictures[[2, 3]])
  for part in moved:
    assert part.metadata.column("id").to_pylist() == part.ids.tolist()
    np.testing.assert_array_equal(part.labels, part.ids.astype(int) % 3)
  assert twins.find(moved._asdict()).pairs == ()
  assert twins.move(moved) is moved


def test_near_twins_move_if_asked_and_so_do_theirs(pictures):
  # Each step is a near twin of the next; the last is none of the first.
  levels = [pictures[0]]
  for shift in range(1, 5):
    levels.append(np.roll(pictures[0], shift, axis=1))
  options = {"max_distance": 20, "min_correlation": 0.9}
  first, last = make_dataset(levels[:1]), make_dataset(levels[-1:])
  assert not twins.find({"a": first, "b": last}, **options).pairs
  _, split = make_split(
    levels[:1], np.stack([pictures[5], *levels[:0:-1], levels[-1]])
  )
  found = twins.find(split._asdict(), **options)
  assert twins.moved_rows(found).tolist() == []
  assert twins.moved_rows(found, near=True).tolist() == [1, 2, 3, 4, 5]
  moved = twins.move(split, found, near=True)
  assert moved.retain.ids.tolist() == ["1"]
  again = twins.find(moved._asdict(), **options)
  assert twins.move(moved, again, near=True) is moved


def test_moving_keeps_the_order_of_the_data_set(pictures):
  dataset = make_dataset(pictures[[4, 0, 1, 0, 2]])
  rows = np.array([False, False, False, True, False])
  split = types.Split(forget=dataset.take(rows), retain=dataset.take(~rows))
  moved = twins.move(split, dataset=dataset)
  assert moved.forget.ids.tolist() == ["1", "3"]
  assert moved.retain.ids.tolist() == ["0", "2", "4"]


# Bad arguments.


def test_bad_arguments_are_named(pictures):
  few = make_dataset(pictures[:2])
  for options, message in (
    ({"pairs": [("a", "tset")]}, "pairs.*'tset'"),
    ({"pairs": [("a",)]}, r"pairs.*\('a',\)"),
    ({"pairs": ["ab"]}, "pairs.*'ab'"),
    ({"max_distance": -1}, "max_distance.*-1"),
    ({"max_distance": 65}, "max_distance.*65"),
    ({"max_distance": 1.5}, "max_distance.*1.5"),
    ({"min_correlation": 0}, "min_correlation.*got 0"),
    ({"min_correlation": 1.5}, "min_correlation.*1.5"),
  ):
    with pytest.raises(ValueError, match=message):
      twins.find({"a": few, "b": few}, **options)
  with pytest.raises(ValueError, match="parts must"):
    twins.find({})
  with pytest.raises(ValueError, match=r"forget and retain.*\['a'\]"):
    twins.moved_rows(twins.find({"a": few}))


def test_moving_checks_its_arguments(pictures, monkeypatch):
  dataset, split = make_split(pictures[[0]], pictures[[0, 1]])
  found = twins.find(split._asdict())
  other = types.Split(forget=split.forget, retain=split.retain.take([0]))
  with pytest.raises(ValueError, match="found must be of this split"):
    twins.move(other, found)
  with pytest.raises(ValueError, match="twins of all 1 retained"):
    twins.move(other)
  with pytest.raises(ValueError, match="dataset must be what was split"):
    twins.move(split, dataset=dataset.take([0, 1]))
  monkeypatch.setattr(twins, "MAX_PAIRS", 3)
  same = make_dataset(pictures[[0, 0]])
  with pytest.raises(ValueError, match="at most 3 pairs of twins, got 4"):
    twins.find({"a": same, "b": same})


# Real duplicates.


def test_brain_tumor_mri_has_twins_across_its_split():
  if not BRAIN_TUMOR_MRI.is_file():
    pytest.skip("the brain MRI archive is not on this machine")
  parts = {}
  with zipfile.ZipFile(BRAIN_TUMOR_MRI) as archive:
    for part in ("Training", "Testing"):
      folder = f"{part}/meningioma/"
      names = [name for name in archive.namelist() if name.startswith(folder)]
      images, files = [], []
      for name in names:
        content = archive.read(name)
        files.append(hashlib.sha256(content).hexdigest())
        image = Image.open(io.BytesIO(content))
        image.draft("L", (SIZE, SIZE))
        images.append(image.convert("L").resize((SIZE, SIZE)))
      parts[part] = make_dataset(
        np.stack([np.asarray(image)[..., None] for image in images]),
        files=files,
      )
  found = twins.find(parts)
  by_file = {
    (i, j)
    for i, a in enumerate(parts["Training"].metadata["sha256"].to_pylist())
    for j, b in enumerate(parts["Testing"].metadata["sha256"].to_pylist())
    if a == b
  }
  exact = {pair.rows for pair in found.pairs if pair.kind == "exact"}
  assert len(by_file) > 100
  assert exact == by_file
  assert len(found.pairs) > len(exact)
  # With the pixels alone it is the same.
  for name, part in parts.items():
    parts[name] = make_dataset(part.images)
  pixels = twins.find(parts)
  assert {(p.kind, p.rows) for p in pixels.pairs} == {
    (p.kind, p.rows) for p in found.pairs
  }


def test_brain_tumor_mri_has_300_groups_of_equal_files():
  if not BRAIN_TUMOR_MRI.is_file():
    pytest.skip("the brain MRI archive is not on this machine")
  with zipfile.ZipFile(BRAIN_TUMOR_MRI) as archive:
    names = [name for name in archive.namelist() if name.endswith(".jpg")]
    files = [hashlib.sha256(archive.read(name)).hexdigest() for name in names]
  # Other pixels in each, so that only the files can be the same.
  numbers = np.arange(len(names), dtype="<u4").view(np.uint8)
  dataset = make_dataset(numbers.reshape(-1, 2, 2, 1), files=files)
  groups = twins.exact_groups(twins.fingerprint(dataset))
  assert len(groups) == 300
  folders = [{names[row].split("/")[0] for row in rows} for rows in groups]
  assert sum(len(each) == 2 for each in folders) == 189
