import collections
import csv
import hashlib
import io
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import base, brain_tumor_mri
from psg_jax import data

RAW = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)


def _jpeg(width=24, height=16) -> bytes:
  buffer = io.BytesIO()
  pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(buffer, "JPEG")
  return buffer.getvalue()


def _zip(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def _raw(name: str) -> zipfile.ZipFile:
  if not (RAW / name).is_file():
    pytest.skip(f"no raw data: {RAW / name} is missing")
  return zipfile.ZipFile(RAW / name)


def _mri_files() -> dict[str, bytes]:
  return {
    f"{split}/{name}/{number}.jpg": _jpeg()
    for split, count in (("Training", 3), ("Testing", 2))
    for name in brain_tumor_mri.CLASS_NAMES
    for number in range(count)
  }


def _fundus_files() -> dict[str, bytes]:
  lines = ["file,label,source,patient_id,eye"]
  files = {}
  for number in range(40):
    label = ("glaucoma", "normal")[number % 2]
    file = f"{label}/{number}.jpg"
    files[file] = _jpeg()
    # Pairs of eyes, of which every fifth has no patient.
    patient = "" if number % 20 >= 16 else f"p{number // 4}"
    lines.append(f"{file},{label},cam{number % 3},{patient},OS")
  return files | {"metadata.csv": "\n".join(lines).encode()}


def test_brain_tumor_mri_known(tmp_path):
  files = _mri_files()
  files["Testing/glioma/0.jpg"] = files["Training/glioma/0.jpg"]
  source = _zip(tmp_path / "archive.zip", files)
  prepared = base.prepare("brain_tumor_mri", source=source, data_dir=tmp_path)
  assert prepared.folder == tmp_path / "psg_brain_tumor_mri" / "1.0.0"
  assert prepared.num_images == {"train": 12, "test": 8}
  assert prepared.notes[0].startswith("1 files are there more than once, 1 of")
  train = data.load("brain_tumor_mri@224", "train", data_dir=tmp_path)
  assert train.images.shape == (12, 224, 224, 3)
  # A letterbox of 24x16: black above and below.
  assert not train.images[:, :37].any()
  assert not train.images[:, -37:].any()
  assert train.images[:, 38:-38].reshape(12, -1).any(1).all()
  for row, name in enumerate(train.ids):
    digest = train.metadata["sha256"][row].as_py()
    assert digest == hashlib.sha256(files[name]).hexdigest()
    assert train.class_names[train.labels[row]] == name.split("/")[1]
  assert train.metadata["width"].to_pylist() == [24] * 12
  assert train.metadata["height"].to_pylist() == [16] * 12
  assert train.labels.tolist() != sorted(train.labels)


def test_sizes_stand_side_by_side(tmp_path):
  source = _zip(tmp_path / "archive.zip", _mri_files())
  for name, size, options in (
    ("brain_tumor_mri@16", 16, {}),
    ("brain_tumor_mri", 24, {"size": 24, "fit": "stretch"}),
  ):
    base.prepare(name, source=source, data_dir=tmp_path, **options)
    loaded = data.load(f"brain_tumor_mri@{size}", "test", data_dir=tmp_path)
    assert loaded.images.shape == (8, size, size, 3)
  assert loaded.images[:, 0].any(axis=(1, 2)).all()
  assert data.names(tmp_path)[-2:] == (
    "brain_tumor_mri@16",
    "brain_tumor_mri@24",
  )
  with pytest.raises(ValueError, match=r"prepare brain_tumor_mri --source PA"):
    data.load("brain_tumor_mri", "test", data_dir=tmp_path)
  with pytest.raises(ValueError, match=r"fit must be 'stretch'.*got 'crop'"):
    base.prepare("brain_tumor_mri@24", fit="crop", data_dir=tmp_path)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (
      lambda files: {name: files[name] for name in files if "Tr" in name},
      "Training, Testing.*without Testing",
    ),
    (
      lambda files: {
        name: files[name] for name in files if "g/pituitary" not in name
      },
      "class folder Training/pituitary is missing",
    ),
    (
      lambda files: files | {"Training/other/0.jpg": b""},
      "got Training/other",
    ),
    (
      lambda files: files | {"Training/glioma/1.jpg": b"junk"},
      r"1 of 20 images.*Training/glioma/1\.jpg",
    ),
  ],
)
def test_brain_tumor_mri_bad(tmp_path, change, words):
  source = _zip(tmp_path / "archive.zip", change(_mri_files()))
  with pytest.raises(ValueError, match=words):
    base.prepare("brain_tumor_mri@8", source=source, data_dir=tmp_path / "out")
  assert not list((tmp_path / "out").rglob("*"))


def test_fundus_known(tmp_path):
  files = _fundus_files()
  source = _zip(tmp_path / "fundus.zip", files)
  prepared = base.prepare("fundus@16", source=source, data_dir=tmp_path)
  assert sum(prepared.num_images.values()) == 40
  assert prepared.num_images["test"] == pytest.approx(8, abs=2)
  wanted = {
    row["file"]: row
    for row in csv.DictReader(io.StringIO(files["metadata.csv"].decode()))
  }
  patients = []
  for split in data.SPLITS:
    loaded = data.load("fundus@16", split, data_dir=tmp_path)
    assert set(loaded.metadata.column_names) == {
      *("id", "label", "file", "sha256", "source", "patient_id", "eye"),
      *("width", "height"),
    }
    patients.append(set(loaded.metadata["patient_id"].to_pylist()) - {None})
    for row in loaded.metadata.to_pylist():
      for column in ("label", "source", "patient_id", "eye"):
        assert row[column] == (wanted[row["file"]][column] or None)
  assert not patients[0] & patients[1]
  assert len(patients[0] | patients[1]) == 8


@pytest.mark.parametrize(
  ("old", "new", "words"),
  [
    (
      "patient_id",
      "patient",
      "metadata must have the columns.*without patient",
    ),
    ("0.jpg,glaucoma", "0.jpg,normal", r"glaucoma/0\.jpg \('normal'\)"),
    ("eye", "side", "without eye"),
  ],
)
def test_fundus_bad(tmp_path, old, new, words):
  files = _fundus_files()
  text = files["metadata.csv"].decode().replace(old, new, 1)
  files["metadata.csv"] = text.encode()
  source = _zip(tmp_path / "fundus.zip", files)
  with pytest.raises(ValueError, match=words):
    base.prepare("fundus@8", source=source, data_dir=tmp_path / "out")
  del files["metadata.csv"]
  with pytest.raises(ValueError, match=r"metadata must be given for 'fundus'"):
    base.prepare(
      "fundus@8",
      source=_zip(source, files),
      data_dir=tmp_path / "out",
    )
  assert not list((tmp_path / "out").rglob("*"))


# The real archives, of which a few images are taken.


def _first_of_each(names: list[str], count: int) -> list[str]:
  by_folder: dict[str, list[str]] = {}
  for name in sorted(names):
    by_folder.setdefault(name.rpartition("/")[0], []).append(name)
  return [name for part in by_folder.values() for name in part[:count]]


def test_real_brain_tumor_mri(tmp_path):
  with _raw("brain-tumor-mri.zip") as archive:
    names = [name for name in archive.namelist() if name.endswith(".jpg")]
    files = {name: archive.read(name) for name in _first_of_each(names, 5)}
  assert len(names) == 7019
  source = _zip(tmp_path / "part.zip", files)
  base.prepare("brain_tumor_mri@64", source=source, data_dir=tmp_path)
  train = data.load("brain_tumor_mri@64", "train", data_dir=tmp_path)
  assert np.bincount(train.labels).tolist() == [5, 5, 5, 5]
  for row, name in enumerate(train.ids):
    with Image.open(io.BytesIO(files[name])) as image:
      assert train.metadata["width"][row].as_py() == image.width
      average = np.asarray(image.convert("RGB").resize((1, 1), Image.BOX))
    is_square = image.width == image.height
    # The mean survives every filter, but for rounding and the black bars.
    assert not is_square or train.images[row].mean() == pytest.approx(
      average.mean(), abs=2
    )


def test_real_fundus(tmp_path):
  with _raw("fundus.zip") as archive:
    names = [name for name in archive.namelist() if "/" in name]
    chosen = (
      _first_of_each(names, 8)
      + [name for name in names if name.endswith(".png")][:2]
    )
    files = {name: archive.read(name) for name in chosen}
    text = archive.read("metadata.csv").decode()
  assert len(names) == 3179
  lines = text.splitlines()
  kept = [line for line in lines[1:] if line.split(",")[0] in files]
  files["metadata.csv"] = "\n".join([lines[0], *kept]).encode()
  source = _zip(tmp_path / "part.zip", files)
  prepared = base.prepare("fundus@64", source=source, data_dir=tmp_path)
  assert not [note for note in prepared.notes if "no row" in note]
  tables = [
    data.load("fundus@64", split, data_dir=tmp_path).metadata.to_pylist()
    for split in data.SPLITS
  ]
  counts = collections.Counter(
    row["label"] for table in tables for row in table
  )
  assert counts["diabetic_retinopathy"] == counts["normal"] == 8
  assert counts["glaucoma"] == 10
  patients = [{row["patient_id"] for row in table} - {None} for table in tables]
  assert not patients[0] & patients[1]
