import collections
import csv
import datetime
import hashlib
import io
import pathlib
import zipfile

import numpy as np
import pydicom
import pytest
from PIL import Image

from data_prep import base, brain_tumor_mri, depths, dicom, images
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


# DICOM


def _dicom(values, **elements) -> bytes:
  """A file of one image (or of several) with these values."""
  values = np.asarray(values)
  elements = {
    "Modality": "CT",
    "PhotometricInterpretation": "MONOCHROME2",
    "SamplesPerPixel": 1,
    "BitsAllocated": 16,
    "BitsStored": 12,
    "HighBit": 11,
    "PixelRepresentation": 0,
  } | elements
  dataset = pydicom.Dataset()
  dataset.file_meta = pydicom.dataset.FileMetaDataset()
  dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
  dataset.SOPClassUID = pydicom.uid.CTImageStorage
  dataset.SOPInstanceUID = "1.2.3"
  if values.ndim == 3 and elements["SamplesPerPixel"] == 1:
    dataset.NumberOfFrames = len(values)
    dataset.Rows, dataset.Columns = values.shape[1:]
  elif values.size:
    dataset.Rows, dataset.Columns = values.shape[:2]
  for name, value in elements.items():
    setattr(dataset, name, value)
  kind = np.uint8 if elements["BitsAllocated"] == 8 else np.uint16
  dataset.PixelData = values.astype(kind).tobytes()
  buffer = io.BytesIO()
  dataset.save_as(buffer, enforce_file_format=True)
  return buffer.getvalue()


_RAMP = np.arange(64).reshape(8, 8) * 65
_HOUNSFIELD = {"RescaleSlope": 2, "RescaleIntercept": -1024}


def _decoded(*contents, window="file"):
  ranges = depths.set_ranges(
    found
    for content in contents
    if (found := images.value_range(content, window=window))
  )
  return [
    data.decode_image(
      images.encode(
        content, size=8, fit="crop", ranges=ranges, window=window
      ).png
    )[..., 0].astype(int)
    for content in contents
  ]


@pytest.mark.parametrize(
  ("elements", "window", "expected"),
  [
    ({}, "file", _RAMP >> 4),
    (_HOUNSFIELD, "file", _RAMP * 2 >> 5),
    # CENTER,WIDTH of a window: below and above are black and white.
    (
      _HOUNSFIELD | {"WindowCenter": 40, "WindowWidth": 400},
      "file",
      (_RAMP * 2 - 1024 - 39.5) / 399 * 255 + 127.5,
    ),
    (
      _HOUNSFIELD | {"WindowCenter": [9, 5], "WindowWidth": [99, 7]},
      "40,400",
      (_RAMP * 2 - 1024 - 39.5) / 399 * 255 + 127.5,
    ),
    ({"WindowCenter": 40, "WindowWidth": 400}, "full", _RAMP >> 4),
    (
      {
        "WindowCenter": 2000,
        "WindowWidth": 1000,
        "VOILUTFunction": "SIGMOID",
      },
      "file",
      255 / (1 + np.exp(-4 * (_RAMP - 2000) / 1000)),
    ),
    ({"PhotometricInterpretation": "MONOCHROME1"}, "file", 255 - (_RAMP >> 4)),
  ],
)
def test_dicom_values(elements, window, expected):
  (got,) = _decoded(_dicom(_RAMP, **elements), window=window)
  np.testing.assert_allclose(got, np.clip(expected, 0, 255), atol=1)


def test_dicom_range_is_that_of_the_set_without_padding():
  padded = _RAMP.copy()
  padded[0, 0] = 65535
  contents = [
    _dicom(padded, BitsStored=16, HighBit=15, PixelPaddingValue=65535),
    _dicom(_RAMP // 64),
    _dicom(_RAMP // 8, Modality="MR"),
  ]
  got = _decoded(*contents)
  assert got[0][0, 0] == 0
  assert got[0].max() == 255
  assert got[1].max() == 63 >> 4
  assert got[2].max() == 255


def test_dicom_colours_and_frames():
  colours = RNG.integers(0, 256, (8, 8, 3))
  content = _dicom(
    colours,
    PhotometricInterpretation="RGB",
    SamplesPerPixel=3,
    PlanarConfiguration=0,
    BitsAllocated=8,
    BitsStored=8,
    HighBit=7,
  )
  np.testing.assert_array_equal(_decoded(content)[0], colours[..., 0])
  several = _dicom(np.stack([_RAMP, _RAMP * 0]))
  assert images.encode(several, size=8, fit="crop").num_pages == 2
  np.testing.assert_array_equal(_decoded(several)[0], _RAMP >> 4)


def _dicom_files() -> dict[str, bytes]:
  return {
    f"{label}/{number}{ending}": _dicom(
      RNG.integers(0, 4096, (8, 8)),
      PatientID=f"p{number // 2}",
      StudyDate="20160102" if number else "",
      Manufacturer="A",
      ManufacturerModelName=f"{label} 1",
    )
    for label in ("ill", "well")
    for number, ending in enumerate((".dcm", "", ".DCM", ".ima", ".bin", ""))
  }


def test_dicom_set(tmp_path):
  report = _dicom([])
  files = _dicom_files() | {
    "DICOMDIR": report,
    "ill/report.dcm": report,
    "ill/two.dcm": _dicom(np.stack([_RAMP, _RAMP])),
    "well/a.jpg": _jpeg(),
    "metadata.csv": b"file,Model\nill/1,mine\n",
  }
  source = _zip(tmp_path / "raw.zip", files)
  options = {"data_dir": tmp_path / "out", "source": source, "size": 8}
  prepared = base.prepare(
    "image_folder", set_name="a", group="patient_id", **options
  )
  rows = {
    row["id"]: row
    for split in data.SPLITS
    for row in data.load("a", split, data_dir=tmp_path / "out")
    .metadata.drop(["sha256"])
    .to_pylist()
  }
  assert len(rows) == 14
  assert rows["ill/1"] == {
    **{"id": "ill/1", "file": "ill/1", "label": "ill", "width": 8, "height": 8},
    **{"patient_id": "p0", "study_date": datetime.date(2016, 1, 2)},
    **{"manufacturer": "A", "Model": "mine"},
  }
  assert rows["well/0.dcm"]["study_date"] is None
  assert rows["well/a.jpg"]["patient_id"] is None
  said = "; ".join(prepared.notes)
  for words in (
    "DICOM without an image",
    "1 further pages of 1 files (ill/two.dcm)",
    "patient_id, study_date, manufacturer of 13 images from DICOM headers",
    "13 images in DICOM CT: 0 becomes black and 4095 white (12 bits)",
  ):
    assert words in said
  builder = data.open_builder("a", "train", data_dir=tmp_path / "out")
  assert builder.info.metadata["settings"]["window"] == "file"
  with pytest.raises(ValueError, match="window must be file, full, or CENTER"):
    base.prepare("image_folder", set_name="b", window="40;400", **options)


def test_dicom_without_pydicom_is_said(tmp_path, monkeypatch):
  monkeypatch.setattr(dicom, "is_available", lambda: False)
  files = _dicom_files()
  options = {"data_dir": tmp_path / "out", "set_name": "a", "size": 8}
  source = _zip(tmp_path / "raw.zip", files)
  with pytest.raises(ValueError, match=r"holds none, but .*pip install 'psg_j"):
    base.prepare("image_folder", source=source, **options)
  files |= {
    f"{name}/{n}.jpg": _jpeg() for name in ("ill", "well") for n in "ab"
  }
  files |= {f"{name}/c.jpg": _jpeg() for name in ("ill", "well")}
  source = _zip(tmp_path / "raw.zip", files)
  prepared = base.prepare("image_folder", source=source, **options)
  assert any("4 .dcm (DICOM, without pydicom)" in x for x in prepared.notes)
  assert any("pip install 'psg_jax[dicom]'" in x for x in prepared.notes)


def test_damaged_dicom_is_named(tmp_path):
  files = _dicom_files()
  files["ill/0.dcm"] = files["ill/0.dcm"][:-40]
  source = _zip(tmp_path / "raw.zip", files)
  with pytest.raises(ValueError, match=r"1 of 12 .*ill/0\.dcm \(DICOM: "):
    base.prepare(
      "image_folder", source=source, set_name="a", data_dir=tmp_path, size=8
    )
