import dataclasses
import datetime
import hashlib
import io
import os
import pathlib
import shutil
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import (
  base,
  builder,
  depths,
  image_folder,
  images,
  listing,
  metadata,
  prepare,
  tables,
  threads,
)
from experiments import cli, recipes, sets
from experiments.pages import request as request_page
from psg_jax import data

RNG = np.random.default_rng(0)


def _png(width=20, height=20, value=None, mode="RGB", form="PNG") -> bytes:
  if value is None:
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
  else:
    image = Image.new(mode, (width, height), value)
  buffer = io.BytesIO()
  image.save(buffer, form)
  return buffer.getvalue()


def _files(count=5, classes=("cat", "dog"), prefix="") -> dict[str, bytes]:
  return {
    f"{prefix}{name}/{number}.png": _png()
    for name in classes
    for number in range(count)
  }


def _zip(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def _folder(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  for name, content in files.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return path


def _prepare(tmp_path, files, **options):
  options = {"size": 8, "set_name": "mine"} | options
  source = _zip(tmp_path / "raw.zip", files)
  return base.prepare(
    "image_folder", source=source, data_dir=tmp_path / "out", **options
  )


def _load(tmp_path, name="mine"):
  out = tmp_path / "out"
  return [data.load(name, split, data_dir=out) for split in ("train", "test")]


def _rows(tmp_path) -> dict[str, dict]:
  return {
    row["id"]: row
    for part in _load(tmp_path)
    for row in part.metadata.to_pylist()
  }


def _is_empty(folder: pathlib.Path) -> bool:
  return not any(folder.rglob("*"))


# Pixels


def test_letterbox_known():
  content = _png(40, 20, (200, 100, 50))
  encoded = images.encode(content, size=8, fit="letterbox")
  pixels = data.decode_image(encoded.png)
  assert pixels.shape == (8, 8, 3)
  assert np.all(pixels[2:6] == (200, 100, 50))
  assert not pixels[:2].any()
  assert not pixels[6:].any()
  assert (encoded.width, encoded.height) == (40, 20)
  assert encoded.sha256 == hashlib.sha256(content).hexdigest()
  tall = data.decode_image(
    images.encode(_png(20, 40, "white"), size=8, fit="letterbox").png
  )
  assert tall[0, :, 0].tolist() == [0, 0, 255, 255, 255, 255, 0, 0]


def test_crop_and_stretch_known():
  pixels = np.zeros((20, 60, 3), np.uint8)
  pixels[:, 20:40] = 255
  wide = io.BytesIO()
  Image.fromarray(pixels).save(wide, "PNG")
  cropped = images.encode(wide.getvalue(), size=8, fit="crop")
  assert data.decode_image(cropped.png).min() == 255
  stretched = images.encode(wide.getvalue(), size=12, fit="stretch")
  row = data.decode_image(stretched.png)[5, :, 0]
  assert row[:3].max() < 30
  assert row[5:7].min() > 225
  assert row[9:].max() < 30


def test_downsampling_is_antialiased():
  # A checkerboard of single pixels must become grey, not black or white.
  board = np.indices((64, 64)).sum(0) % 2 * 255
  buffer = io.BytesIO()
  Image.fromarray(board.astype(np.uint8)).save(buffer, "PNG")
  encoded = images.encode(buffer.getvalue(), size=8, fit="letterbox")
  pixels = data.decode_image(encoded.png).astype(int)
  assert np.abs(pixels - 127).max() <= 20


def test_large_jpeg_is_as_sharp_as_its_full_decode():
  smooth = Image.fromarray(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8))
  smooth = smooth.resize((900, 600), Image.Resampling.BICUBIC)
  buffer = io.BytesIO()
  smooth.save(buffer, "JPEG", quality=95)
  encoded = images.encode(buffer.getvalue(), size=30, fit="stretch")
  assert (encoded.width, encoded.height) == (900, 600)
  got = data.decode_image(encoded.png).astype(int)
  with Image.open(buffer) as full:
    wanted = np.asarray(full.resize((30, 30), Image.Resampling.LANCZOS))
  # JPEG's own scaling, a box, comes before the filter.
  assert np.abs(got - wanted).mean() < 3


@pytest.mark.parametrize(
  ("mode", "value", "expected"),
  [
    ("L", 77, (77, 77, 77)),
    ("RGBA", (200, 100, 50, 0), (0, 0, 0)),
    ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
    ("LA", (90, 255), (90, 90, 90)),
    ("1", 1, (255, 255, 255)),
    ("P", 3, None),
    ("I;16", 0x8000, (128, 128, 128)),
  ],
)
def test_modes(mode, value, expected):
  encoded = images.encode(_png(value=value, mode=mode), size=8, fit="crop")
  pixels = data.decode_image(encoded.png)
  assert pixels.shape == (8, 8, 3)
  if expected is not None:
    assert np.all(pixels == expected)


def test_cmyk_and_other_formats():
  for form in ("JPEG", "BMP", "GIF", "TIFF", "WEBP"):
    content = _png(24, 24, (10, 200, 30), form=form)
    pixels = data.decode_image(images.encode(content, size=8, fit="crop").png)
    assert np.abs(pixels.astype(int) - (10, 200, 30)).max() <= 40, form
  content = _png(24, 24, (0, 255, 255, 0), mode="CMYK", form="JPEG")
  pixels = data.decode_image(images.encode(content, size=8, fit="crop").png)
  assert pixels[4, 4, 0] > 200
  assert pixels[4, 4, 1] < 60


def test_exif_turns_the_image():
  image = Image.new("RGB", (40, 20))
  image.paste((255, 255, 255), (0, 0, 20, 20))
  exif = Image.Exif()
  exif[0x0112] = 6  # To be turned by 90 degrees clockwise.
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", exif=exif, quality=95)
  encoded = images.encode(buffer.getvalue(), size=8, fit="letterbox")
  assert (encoded.width, encoded.height) == (20, 40)
  pixels = data.decode_image(encoded.png)[..., 0]
  assert pixels[:3, 3:5].min() > 200
  assert pixels[5:].max() < 60


def test_postscript_is_not_opened():
  content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
  with pytest.raises(ValueError, match="not an image of a known format"):
    images.encode(content, size=8, fit="crop")


def test_too_many_pixels(monkeypatch):
  monkeypatch.setattr(images, "MAX_PIXELS", 399)
  with pytest.raises(ValueError, match="20x20 pixels are more than 399"):
    images.encode(_png(), size=8, fit="crop")


def test_pillows_own_guard():
  # A header that promises 10 gigapixels, which Pillow refuses to open.
  content = bytearray(_png())
  content[16:24] = (100_000).to_bytes(4, "big") * 2
  content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
  with pytest.raises(ValueError, match="decompression bomb"):
    images.encode(bytes(content), size=8, fit="crop")


def test_ordered_map_is_ordered_and_looks_ahead_a_little(monkeypatch):
  started = []

  def function(item):
    started.append(item)
    return item * 2

  results = threads.ordered_map(function, range(1000))
  assert [next(results) for _ in range(3)] == [(0, 0), (1, 2), (2, 4)]
  results.close()
  limit = threads.MAX_WORKERS * threads.LOOK_AHEAD + 4
  assert len(started) <= limit
  assert [result for _, result in threads.ordered_map(function, range(50))] == (
    list(range(0, 100, 2))
  )


# Splits


def test_split_is_exact_without_groups():
  labels = np.repeat([0, 1, 2], [100, 50, 10])
  is_test = image_folder.choose_test(labels, [None] * 160, seed=0)
  assert np.bincount(labels[is_test]).tolist() == [20, 10, 2]
  again = image_folder.choose_test(labels, [None] * 160, seed=0)
  np.testing.assert_array_equal(is_test, again)
  other = image_folder.choose_test(labels, [None] * 160, seed=1)
  assert not np.array_equal(is_test, other)


def test_split_by_group():
  labels = RNG.integers(0, 3, 600)
  groups = [
    None if draw == 0 else f"p{draw}" for draw in RNG.integers(0, 120, 600)
  ]
  is_test = image_folder.choose_test(labels, groups, seed=3)
  sides: dict[str, set] = {}
  for group, side in zip(groups, is_test, strict=True):
    if group is not None:
      sides.setdefault(group, set()).add(bool(side))
  assert all(len(values) == 1 for values in sides.values())
  share = np.bincount(labels[is_test]) / np.bincount(labels)
  np.testing.assert_allclose(share, 0.2, atol=0.03)


# Whole sets


@pytest.mark.parametrize("form", ["folder", "zip", "wrapped"])
def test_set_known(tmp_path, form):
  files = _files(10)
  if form == "folder":
    source = _folder(tmp_path / "raw", files | {".DS_Store": b""})
  else:
    prefix = "a/b/" if form == "wrapped" else ""
    source = _zip(
      tmp_path / "raw.zip", {prefix + name: raw for name, raw in files.items()}
    )
  prepared = base.prepare(
    "image_folder", source=source, set_name="mine", data_dir=tmp_path / "out"
  )
  assert prepared.folder == tmp_path / "out" / "psg_mine" / "1.0.0"
  assert prepared.num_images == {"train": 16, "test": 4}
  train, test = _load(tmp_path)
  assert train.images.shape == (16, 224, 224, 3)
  assert np.bincount(test.labels).tolist() == [2, 2]
  assert train.class_names == ("cat", "dog")
  assert sorted([*train.ids, *test.ids]) == sorted(files)
  # Not sorted by class.
  assert len(set(np.diff(train.labels))) > 2
  for part in (train, test):
    for row, name in enumerate(part.ids):
      record = {
        key: part.metadata[key][row].as_py()
        for key in ("file", "sha256", "width", "label")
      }
      assert record == {
        "file": name,
        "sha256": hashlib.sha256(files[name]).hexdigest(),
        "width": 20,
        "label": name.split("/")[0],
      }


def test_same_rows_from_any_order(tmp_path):
  files = _files(6)
  ids = []
  for name, names in (("a", list(files)), ("b", list(reversed(files)))):
    (tmp_path / name).mkdir()
    _prepare(tmp_path / name, {each: files[each] for each in names})
    ids.append([part.ids.tolist() for part in _load(tmp_path / name)])
  assert ids[0] == ids[1]
  (tmp_path / "c").mkdir()
  _prepare(tmp_path / "c", files, seed=1)
  assert [part.ids.tolist() for part in _load(tmp_path / "c")] != ids[0]


def test_columns_stand_in_the_order_of_the_table(tmp_path):
  text = "file,zeta,alpha,mid\n" + "".join(f"{x},1,b,c\n" for x in _files())
  _prepare(tmp_path, _files() | {"metadata.csv": text.encode()})
  assert _load(tmp_path)[0].metadata.column_names == [
    *("id", "label", "file", "height", "sha256", "width"),
    *("zeta", "alpha", "mid"),
  ]


def test_more_than_one_shard(tmp_path, monkeypatch):
  monkeypatch.setattr(builder, "EXAMPLES_PER_SHARD", 7)
  monkeypatch.setattr(builder, "EXAMPLES_PER_WRITE", 3)
  files = _files(20)
  folder = _prepare(tmp_path, files).folder
  assert len(list(folder.glob("*train.array_record*"))) > 3
  train, test = _load(tmp_path)
  assert sorted([*train.ids, *test.ids]) == sorted(files)


_BIG = "12345678901234567890"
TABLE = f"""file,name,age,score,seen,at,on,code,big,empty,first word (é)
cat/0.png,x,1,1.5,2012-01-02,2012-01-02 03:04:05,true,007,{_BIG},,a
cat/1.png,,,,,,,,,,
cat/2.png,"y, z",3,1e-3,2020-12-31,,false,7,,,b
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_table_types(tmp_path, encoding, delimiter):
  text = TABLE.replace('"y, z"', "y").replace(",", delimiter)
  files = _files(5) | {"metadata.csv": text.encode(encoding)}
  prepared = _prepare(tmp_path, files)
  assert any("7 of 10 images have no row" in note for note in prepared.notes)
  train, test = _load(tmp_path)
  assert train.metadata.schema == test.metadata.schema
  kinds = {field.name: field.type for field in train.metadata.schema}
  assert kinds == {
    "id": pa.string(),
    "label": pa.string(),
    "file": pa.string(),
    "sha256": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "name": pa.string(),
    "age": pa.int64(),
    "score": pa.float64(),
    "seen": pa.date32(),
    "at": pa.timestamp("s"),
    "on": pa.bool_(),
    "code": pa.string(),
    "big": pa.string(),
    "empty": pa.string(),
    "first word (é)": pa.string(),
  }
  rows = _rows(tmp_path)
  own = TABLE.splitlines()[0].split(",")[1:]
  assert [rows["cat/0.png"][name] for name in own] == [
    "x",
    1,
    1.5,
    datetime.date(2012, 1, 2),
    datetime.datetime(2012, 1, 2, 3, 4, 5),
    True,
    "007",
    _BIG,
    None,
    "a",
  ]
  for path in ("cat/1.png", "dog/3.png"):
    assert [rows[path][name] for name in own] == [None] * 10
  assert rows["cat/2.png"]["score"] == 1e-3
  assert rows["cat/2.png"]["on"] is False


def read_table(text, encoding="utf-8"):
  return tables.read(text.encode(encoding), "m.csv")


def test_tables_as_people_write_them():
  table = read_table(
    "sep=;\r\n;File name;file;patient;note;\r\n"
    "0;x;a\\0.png; P03 ;caf\u0065\u0301;\r\n"
    ";;;;;\r\n"
    "1;y;./a/1.png;p03;NULL;\r\n",
    "utf-16",
  )
  assert table.files == ("a/0.png", "a/1.png")
  assert table.texts == {
    "File name": ["x", "y"],
    "patient": ["P03", "p03"],
    "note": ["caf\u00e9", None],
  }


@pytest.mark.parametrize(
  ("values", "expected", "said"),
  [
    (["14/02/2018", "27/12/2015"], "2018-02-14", "day/month/year"),
    (["2/14/2018", "12/1/2015"], "2018-02-14", "month/day/year"),
    (["14.2.2018", ""], "2018-02-14", "day/month/year"),
    (["2018/2/14", "2015/12/01"], "2018-02-14", "year/month/day"),
    (["03/02/2018", "04/05/2015"], None, "may be day/month/year or month"),
    (["14/02/2018", "2/14/2018"], None, None),
    (["14/02/2018", "unknown"], None, None),
    (["31/02/2018", "1/1/2018"], None, None),
    (["14/02/18", "27/12/15"], None, "years of two digits, such as 14/02/18"),
    (["1.2.18 10:00", "2.1.15 11:00"], None, "years of two digits"),
    (["14/02/2018 25:00", "1/1/2018"], None, None),
  ],
)
def test_dates_of_one_other_order(values, expected, said):
  rows = [f"{i}.png,{value}" for i, value in enumerate(values)]
  table = read_table("\n".join(["file,seen", *rows]))
  is_date = table.types["seen"] == pa.date32()
  assert is_date == (expected is not None)
  assert table.texts["seen"][0] == (expected or values[0])
  assert [said in note for note in table.notes] == ([True] if said else [])


def test_times_of_one_other_order():
  rows = [
    "a.png,14/02/2018 9:05",
    "b.png,27/12/2015T23:59:01",
    "c.png,1/1/2018",
  ]
  table = read_table("\n".join(["file,seen", *rows]))
  assert table.types["seen"] == pa.timestamp("s")
  assert table.texts["seen"] == [
    "2018-02-14 09:05:00",
    "2015-12-27 23:59:01",
    "2018-01-01 00:00:00",
  ]
  assert "day/month/year, such as 14/02/2018 9:05" in table.notes[0]


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    (["3,5", "12"], ["3.5", "12.0"]),
    (["1,250", "2,500"], ["1,250", "2,500"]),
    (["007,5", "1,5"], ["007,5", "1,5"]),
    (["007", "012"], ["007", "012"]),
  ],
)
def test_decimal_commas(values, expected):
  rows = [f"{i}.png;{value}" for i, value in enumerate(values)]
  assert read_table("\n".join(["file;x", *rows])).texts["x"] == expected


@pytest.mark.parametrize(
  ("values", "kind"),
  [
    (["1E5", "10E4"], pa.string()),
    (["12", "7E2"], pa.string()),
    (["1.5e3", "7E2"], pa.float64()),
    (["1e-05", "2e-07"], pa.float64()),
  ],
)
def test_names_with_an_e_between_digits_are_no_numbers(values, kind):
  rows = [f"{i}.png,{value}" for i, value in enumerate(values)]
  table = read_table("\n".join(["file,patient", *rows]))
  assert table.types["patient"] == kind
  if kind == pa.string():
    assert table.texts["patient"] == values


def test_columns_called_like_ours_in_any_case():
  for name in ("ID", "row", "Row", "SHA256"):
    with pytest.raises(ValueError, match=f"the column '{name}'"):
      read_table(f"file,{name}\na/0.png,1\n")
  assert read_table("FILE,x\na/0.png,1\n").files == ("a/0.png",)
  assert read_table("File,file\nx,a/0.png\n").texts == {"File": ["x"]}
  table = read_table("file,Label\na/0.png,b\n")
  with pytest.raises(ValueError, match="the class folder's name"):
    metadata.check_labels(table, {"a/0.png": "a"})


def test_paths_that_look_the_same_are_the_same():
  composed, decomposed = "caf\u00e9/0.png", "cafe\u0301/0.png"
  for written, named in ((composed, decomposed), (decomposed, composed)):
    table = read_table(f"file,x\n{written},1\n")
    assert metadata.match(table, [named]) == {named: 0}
    # Where both are there, the one that is written so.
    assert metadata.match(table, [composed, decomposed]) == {composed: 0}
  for written, path in (("a/0.PNG", "a/0.png"), ("0.png", "long/way/0.png")):
    with pytest.raises(ValueError, match=f"did you mean '{path}'"):
      metadata.match(read_table(f"file,x\n{written},1\n"), ["b.png", path])


def test_table_elsewhere_and_latin1(tmp_path):
  table = tmp_path / "m.csv"
  table.write_bytes("file,name\ncat/0.png,Müller\n".encode("latin-1"))
  files = _files() | {"metadata.csv": b"file,other\n"}
  with pytest.raises(ValueError, match=r"m\.csv' with the byte 0xfc in line 2"):
    _prepare(tmp_path, files, metadata=table)
  assert _is_empty(tmp_path / "out")
  _prepare(tmp_path, files, metadata=table, encoding="latin-1")
  assert _rows(tmp_path)["cat/0.png"]["name"] == "Müller"


def test_split_by_named_group(tmp_path):
  files = _files(12)
  lines = [f"{name},{number % 5}" for number, name in enumerate(files)]
  files["metadata.csv"] = "\n".join(["file,who", *lines]).encode()
  _prepare(tmp_path, files, group="who")
  train, test = _load(tmp_path)
  who = [set(part.metadata["who"].to_pylist()) for part in (train, test)]
  assert not who[0] & who[1]
  assert len(who[0] | who[1]) == 5


@pytest.mark.parametrize(
  ("train", "test", "note"),
  [
    ("train", "test", None),
    ("Training", "Testing", None),
    ("train", "val", "val is taken as test"),
  ],
)
def test_split_by_folders(tmp_path, train, test, note):
  files = _files(3, prefix=f"{train}/") | _files(2, prefix=f"{test}/")
  files[f"{test}/cat/0.png"] = files[f"{train}/cat/0.png"]
  prepared = _prepare(tmp_path, files)
  assert prepared.num_images == {"train": 6, "test": 4}
  parts = _load(tmp_path)
  assert all(name.startswith(train) for name in parts[0].ids)
  assert all(name.startswith(test) for name in parts[1].ids)
  assert (note in prepared.notes) == (note is not None)
  assert (
    "1 files are there more than once, 1 of them in train and test alike"
    " (equal sha256)" in prepared.notes
  )


def test_group_on_both_sides_is_told(tmp_path):
  files = _files(2, prefix="train/") | _files(2, prefix="test/")
  lines = [f"{name},{int('cat' in name)}" for name in files]
  files["metadata.csv"] = "\n".join(["file,who", *lines]).encode()
  prepared = _prepare(tmp_path, files, group="who")
  assert "2 values of who are in train and test alike" in prepared.notes


# Corrupt images


def _corrupt(files):
  # One whose pixels are cut off, and one that is no image.
  return files | {
    "cat/0.png": files["cat/0.png"][:200],
    "dog/1.png": b"no image",
  }


def test_corrupt_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"2 of 20 images that cannot") as error:
    _prepare(tmp_path, _corrupt(_files(10)))
  message = str(error.value)
  for word in ("source", "raw.zip", "cat/0.png", "dog/1.png", "--skip_corrupt"):
    assert word in message
  assert _is_empty(tmp_path / "out")


def test_corrupt_is_left_out(tmp_path):
  prepared = _prepare(tmp_path, _corrupt(_files(10)), is_skipping_corrupt=True)
  train, test = _load(tmp_path)
  assert len(train) + len(test) == 18
  assert not {"cat/0.png", "dog/1.png"} & {*train.ids, *test.ids}
  (note,) = prepared.notes
  assert note.startswith("left out 2 of 20 images")
  builder = data.open_builder("mine", "train", data_dir=tmp_path / "out")
  assert sorted(
    name.split()[0] for name in builder.info.metadata["skipped"]
  ) == (["cat/0.png", "dog/1.png"])


def test_corrupt_truncated_jpeg_and_all_of_a_class(tmp_path):
  files = _files(5)
  jpeg = _png(64, 64, form="JPEG")
  files["cat/0.png"] = jpeg[: len(jpeg) // 2]
  with pytest.raises(ValueError, match=r"1 of 10 images.*cat/0\.png"):
    _prepare(tmp_path, files)
  files |= {f"cat/{number}.png": b"junk" for number in range(5)}
  with pytest.raises(ValueError, match=r"every class in train.*'cat'"):
    _prepare(tmp_path, files, is_skipping_corrupt=True)
  files = dict.fromkeys(files, b"junk")
  with pytest.raises(ValueError, match="10 of 10 images"):
    _prepare(tmp_path, files)
  assert _is_empty(tmp_path / "out")


def test_unreadable_zip_entry_is_corrupt(tmp_path):
  files = _files(5)
  source = _zip(tmp_path / "raw.zip", files)
  content = bytearray(source.read_bytes())
  content[100] ^= 0xFF
  source.write_bytes(content)
  with pytest.raises(ValueError, match=r"1 of 10 images.*cat/0\.png"):
    base.prepare("image_folder", source=source, set_name="a", data_dir=tmp_path)


# Bad input


def _with_table(text: str):
  return lambda files: files | {"metadata.csv": text.encode()}


@pytest.mark.parametrize(
  ("change", "options", "words"),
  [
    (_with_table("file\ncat/0.png\ncat/0.png\n"), {}, "once, got cat/0.png tw"),
    (_with_table("file\ncat/7.png\n"), {}, r"'cat/7.png'.*did you mean 'cat/"),
    (_with_table("file\n../cat/0.png\n"), {}, r"inside the source, got '\.\./"),
    (_with_table("file\n/cat/0.png\n"), {}, "inside the source, got '/cat/0"),
    (_with_table("file\nC:\\cat\\0.png\n"), {}, "inside the source, got 'C:"),
    (_with_table("Files,a\ncat/0.png,1\n"), {}, "did you mean 'Files'"),
    (
      _with_table("path,a\ncat/0.png,1\n"),
      {},
      "column 'file'.*columns path, a",
    ),
    (_with_table(""), {}, "must have a header line"),
    (_with_table("file,a\n"), {}, "must have rows"),
    (_with_table("file,a\n,1\n"), {}, "a file in every row, got none in row 1"),
    (_with_table("file,a,a\ncat/0.png,1,2\n"), {}, "the column 'a' twice"),
    (_with_table("file,\ncat/0.png,1\n"), {}, "a column without a name"),
    (_with_table("file,id\ncat/0.png,1\n"), {}, "the column 'id', which every"),
    (_with_table("file,a\ncat/0.png\n"), {}, "must be a CSV table.*[Rr]ow #2"),
    (_with_table("file\0"), {}, "must be a text file"),
    (
      _with_table("file,label\ncat/0.png,dog\ncat/1.png,cat\n"),
      {},
      r"column 'label', got cat/0\.png \('dog'\)",
    ),
    (None, {"metadata": "no/such.csv"}, "metadata must be a CSV file.*no/such"),
    (None, {"encoding": "latin-1"}, "encoding must not be given without meta"),
    (_with_table("file\n"), {"encoding": "x-y"}, "encoding must be.*'x-y'"),
    (None, {"group": "who"}, "group must not be given without metadata.*'who'"),
    (
      _with_table("file,patient\ncat/0.png,1\n"),
      {"group": "patent"},
      "group must be one of patient.*did you mean 'patient'",
    ),
    (None, {"size": 7}, "size .* from 8 to 4096, got 7"),
    (None, {"size": 4097}, "size .* from 8 to 4096, got 4097"),
    (None, {"size": 64.0}, "size .* got 64.0"),
    (None, {"fit": "lettrebox"}, "fit must be.*did you mean 'letterbox'"),
    (None, {"seed": -1}, "seed must be .* at least 0, got -1"),
    (None, {"set_name": None}, r"set_name \(--name\) must be given"),
    (None, {"set_name": "My eyes"}, r"set_name .*'My eyes'"),
    (None, {"set_name": "1eye"}, r"set_name .*'1eye'"),
    (None, {"set_name": ""}, r"set_name .*''"),
    (None, {"set_name": "digits"}, r"set_name .*'digits', which is that of"),
    (None, {"set_name": "fundus_64"}, r"set_name .*'fundus_64', which is that"),
    (lambda files: files | {"../a.png": b""}, {}, r"outside.*'\.\./a\.png'"),
    (lambda files: files | {"eel/": b""}, {}, "class folder eel is empty"),
    (lambda files: _files(5, ("cat",)), {}, "two classes, got only 'cat'"),
    (lambda files: {"a.txt": b""}, {}, "one folder a class"),
    (lambda files: _files(5, ("cat", "a\nb")), {}, r"printable.*'a\\nb'"),
    (lambda files: _files(1), {}, "of which none fell to test"),
    (
      lambda files: _files(2, prefix="train/") | files,
      {},
      "train and test, or class folders, alone",
    ),
    (
      lambda files: {
        name: raw
        for part in ("train", "test", "val")
        for name, raw in _files(2, prefix=f"{part}/").items()
      },
      {},
      "got also val",
    ),
    (
      lambda files: (
        _files(2, prefix="train/") | _files(2, ("cat",), prefix="test/")
      ),
      {},
      "class folder test/dog is missing",
    ),
    (
      lambda files: (
        _files(2, prefix="train/")
        | _files(2, ("cat", "dog", "eel"), prefix="test/")
      ),
      {},
      "got test/eel",
    ),
  ],
)
def test_bad_input(tmp_path, change, options, words):
  files = _files()
  with pytest.raises(ValueError, match=words) as error:
    _prepare(tmp_path, files if change is None else change(files), **options)
  assert "\n" not in str(error.value)
  assert _is_empty(tmp_path / "out")


def test_zip_bombs(tmp_path, monkeypatch):
  files = _files() | {"cat/9.bmp": _png(300, 300, 0, form="BMP")}
  monkeypatch.setattr(listing, "MIN_RATIO_BYTES", 1000)
  monkeypatch.setattr(listing, "MAX_RATIO", 5)
  with pytest.raises(ValueError, match=r"source .* 5 times its size.*raw\.zip"):
    _prepare(tmp_path, files)
  monkeypatch.undo()
  monkeypatch.setattr(listing, "MAX_FILE_BYTES", 100_000)
  with pytest.raises(ValueError, match=r"at most 100,000 bytes.*cat/9\.bmp"):
    _prepare(tmp_path, files)
  monkeypatch.undo()
  monkeypatch.setattr(listing, "MAX_TOTAL_BYTES", 100_000)
  with pytest.raises(ValueError, match="unpack to at most 100,000 bytes"):
    _prepare(tmp_path, files)
  assert _is_empty(tmp_path / "out")
  # What is not read cannot hurt.
  _prepare(tmp_path, _files() | {"cat/film.avi": bytes(200_000)})


def test_large_file_in_a_folder_is_corrupt(tmp_path, monkeypatch):
  monkeypatch.setattr(listing, "MAX_FILE_BYTES", 5000)
  files = _files() | {"cat/9.bmp": _png(64, 64, form="BMP")}
  source = _folder(tmp_path / "raw", files)
  with pytest.raises(ValueError, match=r"1 of 11.*cat/9\.bmp.*5,000 bytes"):
    base.prepare(
      "image_folder", source=source, set_name="a", data_dir=tmp_path / "out"
    )


# Names


def test_listed_names(tmp_path):
  _prepare(tmp_path, _files(), set_name="my_eyes")
  (tmp_path / "out" / "psg_half").mkdir()
  listed = data.names(tmp_path / "out")
  assert listed == (*data.names(), "my_eyes")
  assert "image_folder" in data.names()


def test_not_prepared_says_what_to_run(tmp_path):
  command = "run: python -m data_prep.prepare"
  for name, words in (
    ("fundus@64", f"{command} fundus@64 --source PATH --data_dir {tmp_path}"),
    ("my_eyes", f"{command} image_folder --source PATH --name my_eyes"),
    ("image_folder", f"{command} image_folder --source PATH --name NAME"),
  ):
    with pytest.raises(ValueError, match="name") as error:
      data.load(name, "train", data_dir=tmp_path)
    assert words in str(error.value)
  _prepare(tmp_path, _files(), set_name="my_eyes")
  with pytest.raises(ValueError, match="did you mean 'my_eyes'"):
    data.load("my_eye", "train", data_dir=tmp_path / "out")


def test_damaged_says_how_it_was_prepared(tmp_path):
  folder = _prepare(tmp_path, _files(), fit="crop").folder
  next(folder.glob("*test.array_record*")).unlink()
  with pytest.raises(ValueError, match="damaged 'mine'") as error:
    data.load("mine", "test", data_dir=tmp_path / "out")
  source = (tmp_path / "raw.zip").resolve()
  assert (
    f"image_folder --source {source} --name mine --size 8 --fit crop --seed 0"
    f" --data_dir {tmp_path / 'out'} --overwrite"
  ) in str(error.value)


def test_again_with_other_options(tmp_path):
  files = _files()
  assert _prepare(tmp_path, files).is_new
  assert not _prepare(tmp_path, files).is_new
  assert not _prepare(tmp_path, files, size=None, seed=0).is_new
  for option, value in (("size", 16), ("fit", "crop"), ("seed", 1)):
    with pytest.raises(ValueError, match=f"{option} must be .*--overwrite"):
      _prepare(tmp_path, files, **{option: value})
  other = _zip(tmp_path / "other.zip", files)
  with pytest.raises(
    ValueError, match=r"source must be .*raw\.zip.*other\.zip"
  ):
    base.prepare(
      "image_folder", source=other, set_name="mine", data_dir=tmp_path / "out"
    )
  assert _load(tmp_path)[0].images.shape[1] == 8
  assert _prepare(tmp_path, files, size=16, is_overwriting=True).is_new
  assert _load(tmp_path)[0].images.shape[1] == 16


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("digits", {"size": 64}, "size must not be given for 'digits'"),
    ("digits", {"fit": "crop"}, "fit must not be given for 'digits'.*'crop'"),
    ("digits", {"set_name": "a"}, "must not be given for 'digits', got 'a'"),
    ("phantom_fundus", {"fit": "crop"}, "fit must not be given"),
    ("brain_tumor_mri", {"group": "a"}, "group must not be given"),
    ("brain_tumor_mri", {}, "source must be given.*kaggle"),
    ("image_folder", {"set_name": "a"}, "source must be given"),
    ("fundus@64", {"size": 32}, "size must be 64 as in the name.*got 32"),
    ("fundus@9999", {}, "size of 'fundus'"),
  ],
)
def test_options_of_other_sets(tmp_path, name, options, words):
  with pytest.raises(ValueError, match=words):
    base.prepare(name, data_dir=tmp_path, **options)
  assert _is_empty(tmp_path)


# The program


def _run(monkeypatch, capsys, *arguments):
  monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
  try:
    prepare.main()
    status = 0
  except SystemExit as stop:
    status = stop.code
  output = capsys.readouterr()
  return status, output.out, output.err


def test_program(tmp_path, monkeypatch, capsys):
  table = tmp_path / "m.csv"
  table.write_text("file,patient_id\ncat/3.png,p1\ncat/4.png,p1\n")
  source = _zip(tmp_path / "raw.zip", _corrupt(_files()))
  arguments = ("image_folder", "--source", source, "--data_dir", tmp_path)
  arguments += ("--name", "my_eyes", "--size", 16, "--metadata", table)
  arguments += ("--group", "patient_id", "--seed", 0)
  status, out, err = _run(monkeypatch, capsys, *arguments)
  assert (status, out) == (2, "")
  (line,) = [each for each in err.splitlines() if each.startswith("error")]
  assert "--skip_corrupt" in line
  assert not list(tmp_path.glob("*psg*"))
  status, out, _ = _run(monkeypatch, capsys, *arguments, "--skip_corrupt")
  assert status == 0
  assert out.startswith("prepared my_eyes (6 train, 2 test)")
  assert out.count("\n") == 1
  assert "8 of 10 images have no row" in out
  assert "left out 2 of 10 images" in out
  assert data.load("my_eyes", "test", data_dir=tmp_path).images.shape[1] == 16


def test_program_interrupted_midway(tmp_path, monkeypatch, capsys):
  original = images.encode

  def encode(content, **options):
    if content == files["dog/2.png"]:
      raise KeyboardInterrupt
    return original(content, **options)

  files = _files()
  source = _zip(tmp_path / "raw.zip", files)
  monkeypatch.setattr(images, "encode", encode)
  out = tmp_path / "out"
  status, _, err = _run(
    monkeypatch,
    capsys,
    *("image_folder", "--source", source, "--name", "a", "--data_dir", out),
  )
  assert status == 130
  assert "interrupted: nothing was changed" in err
  assert _is_empty(out)


# What is read, and what is left out


def _account(tmp_path, name="mine"):
  builder = data.open_builder(name, "train", data_dir=tmp_path / "out")
  return builder.info.metadata["account"]


def _from_folder(tmp_path, source, **options):
  options = {"size": 8, "set_name": "mine"} | options
  return base.prepare(
    "image_folder", source=source, data_dir=tmp_path / "out", **options
  )


def test_every_file_is_accounted_for(tmp_path):
  files = _files(4) | {
    "cat/new.jfif": _png(form="JPEG"),
    "cat/none": _png(form="WEBP"),
    "dog/LOUD.JPE": _png(form="JPEG"),
    "dog/shot.nef": _png(form="TIFF"),
    "dog/notes.txt": b"BM is how this begins",
    "dog/.hidden.png": _png(),
    "dog/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg": _png(form="JPEG"),
    "$RECYCLE.BIN/old.png": _png(),
    "README.md": b"",
    "lone.png": _png(),
    "metadata.csv": b"file,who\ncat/none,x\n",
  }
  pages = io.BytesIO()
  Image.new("L", (8, 8)).save(
    pages, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8))] * 2
  )
  source = _folder(
    tmp_path / "raw", files | {"cat/pages.tif": pages.getvalue()}
  )
  elsewhere = _folder(tmp_path / "nas", {"far/1.png": _png()})
  (source / "dog" / "more").symlink_to(elsewhere)
  (source / "dog" / "again").symlink_to(elsewhere / "far")
  (source / "dog" / "loop").symlink_to(tmp_path)
  (source / "dog" / "gone.png").symlink_to("nowhere")
  (source / "dog" / "self.png").symlink_to("self.png")
  os.mkfifo(source / "cat" / "pipe.png")
  prepared = _from_folder(tmp_path, source)
  found = _account(tmp_path)
  left_out = {
    (item["why"], item["ending"]): item["count"] for item in found["left_out"]
  }
  assert left_out == {
    ("not an image", ".nef"): 1,
    ("not an image", ".txt"): 1,
    ("not an image", ".md"): 1,
    ("hidden", ".png"): 1,
    ("system folder", ".jpg"): 1,
    ("system folder", ".png"): 1,
    ("outside class folders", ".png"): 1,
    ("link that leads back", ""): 1,
    ("link to a folder that is read already", ""): 1,
    ("broken link", ".png"): 2,
    ("pipe or other special file", ".png"): 1,
  }
  train, test = _load(tmp_path)
  ids = {*train.ids, *test.ids}
  assert {"cat/none", "dog/LOUD.JPE", "dog/again/1.png"} <= ids
  assert found["read"] == len(ids) == 13
  assert found["files"] == found["read"] + sum(left_out.values())
  assert found["further_pages"] == {"pages": 2, "files": 1}
  said = "; ".join(prepared.notes)
  assert "1 .nef (not an image)" in said
  assert "2 further pages of 1 files (cat/pages.tif)" in said


def test_class_without_images_says_what_is_there(tmp_path):
  files = _files() | {"eel/a.mp4": b"", "eel/b.mp4": b"", "eel/.c.png": _png()}
  with pytest.raises(ValueError, match=r"eel holds none, but 2 \.mp4 \(not an"):
    _prepare(tmp_path, files)


@pytest.mark.parametrize(
  "names",
  [
    ("cat\\0.png", "dog\\0.png", "cat\\1.png", "dog\\1.png", "dog\\"),
    ("./cat/0.png", "./dog/0.png", "./cat/1.png", ".//dog/1.png"),
  ],
)
def test_names_in_zips(tmp_path, names):
  path = tmp_path / "RAW.ZIP"
  with zipfile.ZipFile(path, "w") as archive:
    for name in names:
      entry = zipfile.ZipInfo("x")
      entry.filename = name
      archive.writestr(entry, b"" if name.endswith("\\") else _png())
  tree = listing.list_files(path)
  paths = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
  assert list(tree.entries) == paths
  assert tree.folders == {"cat", "dog"}
  assert tree.read("dog/1.png").startswith(b"\x89PNG")
  assert tree.read("dog/1.png", 4) == b"\x89PNG"


def test_images_outside_class_folders_are_said_to_be_there(tmp_path):
  with pytest.raises(ValueError, match=r"but 2 \.png \(outside class folders"):
    _prepare(tmp_path, {"1.png": _png(), "2.png": _png()})


def test_classes_that_look_alike_are_named(tmp_path):
  prepared = _prepare(tmp_path, _files(classes=("Cat", "cat", "dog")))
  assert "'Cat' and 'cat' differ in case" in prepared.notes[0]


@pytest.mark.parametrize("prefix", ["", "scans/", "new/scans/"])
def test_lone_folder_beside_files(tmp_path, prefix):
  files = _files(4, prefix="new/scans/") | {"README.md": b""}
  files["metadata.csv"] = f"file,who\n{prefix}cat/2.png,me\n".encode()
  _prepare(tmp_path, files)
  assert _rows(tmp_path)["cat/2.png"]["who"] == "me"
  assert _account(tmp_path)["left_out"][0]["first"] == "README.md"


def test_other_archives_are_named(tmp_path):
  path = tmp_path / "raw.tgz"
  with tarfile.open(path, "w:gz") as archive:
    archive.add(__file__)
  plain = tmp_path / "raw.tar"
  with tarfile.open(plain, "w") as archive:
    archive.add(__file__)
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  whole = _zip(tmp_path / "raw.zip", _files(1)).read_bytes()
  cut, locked = tmp_path / "cut.zip", tmp_path / "locked.zip"
  cut.write_bytes(whole[:-30])
  # The flag of encryption, in the list of entries.
  flag = whole.index(b"PK\1\2") + 8
  locked.write_bytes(
    whole[:flag] + bytes([whole[flag] | 1]) + whole[flag + 1 :]
  )
  for source, words in (
    (path, "a gzip file, such as a tar archive: unpack it"),
    (plain, "a tar archive: unpack it"),
    (_folder(tmp_path, {"a.png": _png()}) / "a.png", "which is an image"),
    (pipe, "which is neither"),
    (cut, "which is a zip without its end"),
    (locked, "source must be a zip without a password"),
  ):
    with pytest.raises(ValueError, match=words):
      listing.list_files(source)


# Prepared again


def test_changed_source_is_not_taken_for_the_same(tmp_path):
  source = _folder(tmp_path / "raw", _files() | {"notes.txt": b"1"})
  table = tmp_path / "m.csv"
  table.write_text("file,who\ncat/0.png,a\n")
  options = {"metadata": table}
  assert _from_folder(tmp_path, source, **options).is_new
  # What is no image may change, and what systems add may come.
  (source / "notes.txt").write_bytes(b"22")
  (source / ".DS_Store").write_bytes(b"")
  assert not _from_folder(tmp_path, source, **options).is_new
  table.write_text("file,who\ncat/0.png,b\n")
  with pytest.raises(ValueError, match=r"metadata must be as it was.*--overwr"):
    _from_folder(tmp_path, source, **options)
  table.write_text("file,who\ncat/0.png,a\n")
  os.utime(source / "dog" / "1.png", ns=(0, 5))
  with pytest.raises(ValueError, match=r"source must be as it was.*--overwr"):
    _from_folder(tmp_path, source, **options)
  assert _from_folder(tmp_path, source, is_overwriting=True, **options).is_new
  assert not _from_folder(tmp_path, source, **options).is_new


def test_job_uses_what_is_there_now(tmp_path, capsys):
  source = _folder(tmp_path / "my scans", _files(5))
  (source / "metadata.csv").write_text("file,who\ncat/0.png,a\n")
  job = recipes.Job(
    dataset=str(source), image_size=8, data_dir=str(tmp_path / "out")
  )

  def who(job):
    train, test, account = sets.load(job)
    rows = [*train.metadata.to_pylist(), *test.metadata.to_pylist()]
    assert account["read"] == len(rows)
    return len(rows), {row["id"]: row["who"] for row in rows}["cat/0.png"]

  assert who(job) == (10, "a")
  assert who(job) == (10, "a")
  assert "changed" not in capsys.readouterr().err
  (source / "metadata.csv").write_text("file,who\ncat/0.png,b\n")
  assert who(job) == (10, "b")
  assert "has changed: it is prepared anew" in capsys.readouterr().err
  (source / "dog" / "new.png").write_bytes(_png())
  assert who(job) == (11, "b")
  assert "changed" in capsys.readouterr().err
  (source / "dog" / "new.png").write_bytes(b"junk")
  with pytest.raises(ValueError, match=r"new\.png"):
    sets.load(job)
  assert who(dataclasses.replace(job, skip_corrupt=True)) == (10, "b")
  assert "cannot be decoded" in capsys.readouterr().err


def test_a_named_set_says_that_its_source_has_changed(tmp_path, capsys):
  source = _folder(tmp_path / "raw", _files(5))
  _from_folder(tmp_path, source, set_name="scans")
  job = recipes.Job(dataset="scans", data_dir=str(tmp_path / "out"))
  capsys.readouterr()
  assert sets.load(job).source["read"] == 10
  assert not capsys.readouterr().err
  (source / "dog" / "new.png").write_bytes(_png())
  assert sets.load(job).source["read"] == 10
  (line,) = capsys.readouterr().err.splitlines()
  assert "has changed since the set 'scans' was prepared" in line
  assert f"--data_dir {tmp_path / 'out'} --overwrite prepares" in line
  shutil.rmtree(source)
  assert sets.load(job).source["read"] == 10
  assert not capsys.readouterr().err


def test_names_and_paths_of_jobs(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  _folder(tmp_path / "scans", _files())
  _zip(tmp_path / "archive", _files())
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in ("scans", "archive", "./scans", "SCANS.ZIP", "~/scans", "~"):
    assert sets.is_path(name, tmp_path / "out")
  for name in ("other", "digits", "fundus@64"):
    assert not sets.is_path(name, tmp_path / "out")
  # Who gave a set the name of its folder means the set.
  _from_folder(tmp_path, "~/scans", set_name="scans")
  assert not sets.is_path("scans", tmp_path / "out")
  sets.check(recipes.Job(dataset="scans", data_dir=str(tmp_path / "out")))
  assert "./scans is the folder" in capsys.readouterr().err
  with pytest.raises(ValueError, match="window must be given with a folder"):
    sets.check(recipes.Job(dataset="digits", window="full"))


def test_report_accounts_for_every_file():
  source = {
    "name": "scans",
    "files": 14,
    "read": 11,
    "left_out": [{"why": "hidden", "ending": "", "count": 3, "first": ".a"}],
    "further_pages": {"pages": 2, "files": 1},
  }
  counts = {"forget": 1, "retain": 4, "test": 4, "not used (num_train)": 2}
  record = {"source": source, "images": {"read": 11, **counts}}
  assert request_page.source(record) == [
    ("Files of scans", "14"),
    ("forgotten", "1"),
    ("retained", "4"),
    ("test images", "4"),
    ("read, and not used", "2"),
    ("left out: no ending, hidden", "3"),
    ("besides, further pages of files that were read", "2"),
  ]
  # Of a run of before.
  assert request_page.source({"counts": counts}) == []


def test_home_in_options(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  arguments = ["--runs_dir=~/runs", "--data", "~/scans", "--where=a ~ 'b'"]
  monkeypatch.setattr("sys.argv", ["program", *arguments])
  job = cli.parse_job(recipes.Job, "test")
  assert (job.runs_dir, job.dataset) == ("/home/me/runs", "/home/me/scans")
  assert job.where == "a ~ 'b'"


# Grey levels


def _tiff(pixels, **options) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "TIFF", **options)
  return buffer.getvalue()


def _grey(*contents):
  """The first channel of each, scaled by the range of all."""
  ranges = depths.set_ranges(filter(None, map(images.value_range, contents)))
  return [
    data.decode_image(
      images.encode(each, size=8, fit="crop", ranges=ranges).png
    )[..., 0].astype(int)
    for each in contents
  ]


_RAMP = np.arange(64).reshape(8, 8)


@pytest.mark.parametrize(
  ("pixels", "expected"),
  [
    ((_RAMP * 65).astype(np.uint16), _RAMP * 65 >> 4),
    ((_RAMP * 1040).astype(np.uint16), _RAMP * 1040 >> 8),
    ((_RAMP * 4).astype(np.uint16), _RAMP * 4),
    ((_RAMP % 2).astype(np.uint16), _RAMP % 2 * 255),
    ((_RAMP * 65 - 1024).astype(np.int32), _RAMP * 65 >> 4),
    ((_RAMP * 66_000).astype(np.int32), _RAMP * 66_000 >> 14),
    ((_RAMP / 63).astype(np.float32), np.rint(_RAMP * (255 / 63))),
    ((_RAMP * 65.0).astype(np.float32), _RAMP * 65 >> 4),
  ],
)
def test_grey_levels_of_a_set(pixels, expected):
  (got,) = _grey(_tiff(pixels))
  np.testing.assert_allclose(got, expected, atol=1)


def test_one_range_for_the_whole_set():
  dim, bright = _RAMP.astype(np.uint16), (_RAMP * 65).astype(np.uint16)
  got = _grey(_tiff(dim), _tiff(bright), _png(8, 8, 77, mode="L"))
  np.testing.assert_array_equal(got[0], dim >> 4)
  assert got[2].max() == 77


@pytest.mark.parametrize(("kind", "num_channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_keeps_its_levels(kind, num_channels):
  pixels = RNG.integers(0, 4096, (8, 8, num_channels)).astype(np.uint16)
  if num_channels != 3:
    pixels[..., -1] = 0xFFFF
  raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  content = b"\x89PNG\r\n\x1a\n"
  for name, part in (
    (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)),
    (b"IDAT", zlib.compress(raw)),
    (b"IEND", b""),
  ):
    checksum = struct.pack(">I", zlib.crc32(name + part))
    content += struct.pack(">I", len(part)) + name + part + checksum
  np.testing.assert_array_equal(_grey(content)[0], pixels[..., 0] >> 4)


def _raw_tiff(pixels, sample_format) -> bytes:
  """Grey, in types that Pillow does not write."""
  height, width = pixels.shape
  bits, size = 8 * pixels.itemsize, pixels.nbytes
  values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 134}
  values |= {277: 1, 278: height, 279: size, 339: sample_format}
  content = (
    b"II*\0"
    + struct.pack("<IH", 8, len(values))
    + b"".join(
      struct.pack("<HHII", tag, 4 if tag == 279 else 3, 1, value)
      for tag, value in values.items()
    )
  )
  return content.ljust(134, b"\0") + pixels.tobytes() + bytes(8)


def test_integers_with_and_without_sign():
  (got,) = _grey(_raw_tiff((_RAMP - 32).astype(np.int8), 2))
  assert got[0, 0] == 0
  assert (np.diff(got.ravel()) > 0).all()
  (got,) = _grey(_raw_tiff((_RAMP * 2**26).astype("<u4"), 1))
  np.testing.assert_array_equal(got, _RAMP * 4)


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_white_is_zero(kind):
  pixels = _RAMP.astype(kind) if kind == np.uint16 else _RAMP.astype(kind) / 63
  # Pillow writes the tag and leaves these pixels as they are.
  black, white = _tiff(pixels), _tiff(pixels, tiffinfo={262: 0})
  got = _grey(black, white)
  np.testing.assert_array_equal(got[1], 255 - got[0])


def test_palette_of_eight_bits():
  image = Image.fromarray((_RAMP % 2).astype(np.uint8), "P")
  image.putpalette([0, 0, 0, 200, 100, 50])
  buffer = io.BytesIO()
  image.save(buffer, "TIFF")
  small = buffer.getvalue()
  colors = np.array([200 << 8, 100 << 8, 50 << 8], "<u2")
  # In the file of 16 bits, which some programs fill with 8.
  for color in colors:
    small = small.replace(color.tobytes(), (color >> 8).tobytes())
  for content in (buffer.getvalue(), small):
    pixels = data.decode_image(images.encode(content, size=8, fit="crop").png)
    assert pixels[0, 1].tolist() == [200, 100, 50]


def test_not_a_number_is_named(tmp_path):
  bad = np.full((8, 8), np.nan, np.float32)
  with pytest.raises(ValueError, match=r"cat/9\.tif.*not all finite"):
    _prepare(tmp_path, _files() | {"cat/9.tif": _tiff(bad)})


def test_range_is_recorded_and_said(tmp_path):
  deep = {f"cat/d{n}.tif": _tiff((_RAMP + n).astype(np.uint16)) for n in (0, 1)}
  hot = np.full((8, 8), 4000, np.uint16)
  files = _files() | deep | {"cat/d2.tif": _tiff(hot)}
  prepared = _prepare(tmp_path, files)
  (said,) = prepared.notes
  assert (
    "3 images in grey of more than 8 bits: 0 becomes black and 4095" in said
  )
  assert "(12 bits), half of them stay below 64 and come out dark" in said
  builder = data.open_builder("mine", "train", data_dir=tmp_path / "out")
  assert builder.info.metadata["settings"]["ranges"] == {
    "grey of more than 8 bits": [0, 4095]
  }
