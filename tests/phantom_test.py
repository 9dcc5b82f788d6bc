import datetime

import numpy as np
import pyarrow as pa
import pytest
from PIL import ImageStat

from data_prep import base, phantom_fundus
from psg_jax import data


def _exam(**changes):
  exam = phantom_fundus.Exam(
    label=phantom_fundus.CLASS_NAMES.index("healthy"),
    columns={},
    eye="OD",
    device="Cirrus 800 FA",
    cup_to_disc=0.3,
    patient_seed=1,
    seed=2,
  )
  return exam._replace(**changes)


def _pixels(size=64, **changes) -> np.ndarray:
  return np.asarray(phantom_fundus.draw(_exam(**changes), size), np.float64)


@pytest.fixture(scope="module")
def exams():
  return phantom_fundus.make_exams()


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("phantom")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(phantom_fundus, "NUM_PATIENTS", {"train": 12, "test": 5})
    for name in ("phantom_fundus", "phantom_fundus@16"):
      data.load(name, "train", data_dir=folder)
  return folder


def test_prepares_itself(small_dir):
  train = data.load("phantom_fundus", "train", data_dir=small_dir)
  test = data.load("phantom_fundus", "test", data_dir=small_dir)
  assert train.images.shape[1:] == (64, 64, 3)
  assert train.class_names == phantom_fundus.CLASS_NAMES
  for part, count in ((train, 12), (test, 5)):
    assert 2 * count <= len(part) <= 6 * count
  small = data.load("phantom_fundus@16", "train", data_dir=small_dir)
  assert small.images.shape == (len(train), 16, 16, 3)
  np.testing.assert_array_equal(small.labels, train.labels)


def test_types(small_dir):
  for split in data.SPLITS:
    table = data.load("phantom_fundus", split, data_dir=small_dir).metadata
    kinds = {field.name: field.type for field in table.schema}
    assert kinds == {
      "id": pa.string(),
      "label": pa.string(),
      "device": pa.string(),
      "patient_id": pa.string(),
      "eye": pa.string(),
      "exam_date": pa.date32(),
      "left_vert_pf": pa.float64(),
      "right_vert_pf": pa.float64(),
      "cup_to_disc": pa.float64(),
    }
  expected = [
    exam.columns["exam_date"] for exam in phantom_fundus.make_exams()["test"]
  ]
  assert None in expected
  assert table["exam_date"].null_count


def test_records(exams):
  assert {split: len(rows) for split, rows in exams.items()} == {
    # Pinned: another draw would make stored results incomparable.
    "train": 1466,
    "test": 406,
  }
  sides = {
    split: {exam.columns["patient_id"] for exam in rows} - {None}
    for split, rows in exams.items()
  }
  assert not sides["train"] & sides["test"]
  assert len(sides["train"]) > 360
  rows = [*exams["train"], *exams["test"]]
  for name, chance in phantom_fundus.MISSING.items():
    missing = np.mean([row.columns[name] is None for row in rows])
    # Three standard deviations of 1,872 draws.
    assert missing == pytest.approx(chance, abs=0.025), name
  days = [row.columns["exam_date"] for row in rows]
  days = [day for day in days if day is not None]
  assert min(days) >= datetime.date(2012, 1, 1)
  assert max(days) <= datetime.date(2020, 12, 31)
  openings = [row.columns["left_vert_pf"] for row in rows]
  openings = [value for value in openings if value is not None]
  assert np.mean(openings) == pytest.approx(9, abs=0.2)
  assert np.std(openings) == pytest.approx(1.5, abs=0.2)
  counts: dict[str, int] = {}
  for row in rows:
    patient = row.columns["patient_id"]
    counts[patient] = counts.get(patient, 0) + 1
  counts.pop(None)
  assert set(counts.values()) <= {1, 2, 3, 4, 5, 6}
  for label in range(3):
    for device in phantom_fundus.DEVICES:
      both = [row.label == label and row.device == device for row in rows]
      assert 0.08 < np.mean(both) < 0.15


def test_cup_says_glaucoma(exams):
  glaucoma = phantom_fundus.CLASS_NAMES.index("glaucoma")
  agrees = [
    (row.cup_to_disc > 0.53) == (row.label == glaucoma)
    for row in exams["train"]
  ]
  # Clear in most eyes, and not in all.
  assert 0.9 < np.mean(agrees) < 0.99
  small, large = _pixels(cup_to_disc=0.3), _pixels(cup_to_disc=0.8)
  bright = [(image.min(-1) > 140).sum() for image in (small, large)]
  assert bright[1] > 2 * bright[0]


def test_disc_is_on_the_side_of_the_nose():
  for eye, is_right in (("OD", True), ("OS", False)):
    blue = _pixels(eye=eye)[..., 2]
    _, column = np.unravel_index(blue.argmax(), blue.shape)
    assert (column > 32) == is_right, eye


def test_lesions_show():
  diseased = phantom_fundus.CLASS_NAMES.index("diabetic_retinopathy")
  healthy, ill = (
    np.concatenate(
      [_pixels(label=label, patient_seed=seed) for seed in range(8)]
    )
    for label in (_exam().label, diseased)
  )
  # Yellow, and darker than any vessel.
  yellow = [
    ((image[..., 1] > 170) & (image[..., 2] < 150)).sum()
    for image in (healthy, ill)
  ]
  assert yellow[1] > yellow[0] + 10
  inside = np.tile(np.hypot(*(np.indices((64, 64)) - 31.5)) < 28, (8, 1))
  dark = [(image[inside].sum(-1) < 150).sum() for image in (healthy, ill)]
  assert dark[1] > dark[0] + 10


def test_devices_look_different():
  means = {}
  for device in phantom_fundus.DEVICES:
    image = phantom_fundus.draw(_exam(device=device), 64)
    red, green, blue = ImageStat.Stat(image).mean
    means[device] = (green / red, blue / red)
  values = np.asarray(list(means.values()))
  for first in range(3):
    for second in range(first):
      assert np.abs(values[first] - values[second]).max() > 0.05


def test_same_eye_of_another_day_is_the_same_eye():
  first, again = _pixels(seed=5), _pixels(seed=6)
  other = _pixels(seed=5, patient_seed=9)
  assert np.array_equal(first, _pixels(seed=5))
  assert 0 < np.abs(first - again).mean() < np.abs(first - other).mean()


def test_round_and_black_outside():
  image = _pixels(size=40)
  corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
  assert not corners.any()
  assert image[20, 20].min() > 10


def test_bad_input(tmp_path):
  with pytest.raises(ValueError, match=r"source must not be given.*generated"):
    base.prepare("phantom_fundus", source=tmp_path, data_dir=tmp_path / "out")
  with pytest.raises(ValueError, match=r"phantom_fundus.* got '5000'"):
    data.load("phantom_fundus@5000", "train", data_dir=tmp_path)
  assert not list((tmp_path / "out").rglob("*"))
