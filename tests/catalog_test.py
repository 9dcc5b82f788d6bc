"""Tests of psg_jax.catalog."""

import datetime
import pathlib

import pyarrow as pa
import pytest

from psg_jax import catalog, data


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("digits", ("digits", None, "digits", False)),
    ("fundus", ("fundus", 224, "fundus", False)),
    ("fundus@224", ("fundus", 224, "fundus", False)),
    ("fundus@64", ("fundus", 64, "fundus_64", False)),
    ("my_eyes", ("image_folder", None, "my_eyes", True)),
    ("my_eyes_64", ("image_folder", None, "my_eyes_64", True)),
  ],
)
def test_names(name, expected):
  assert catalog.parse(name) == expected


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("digits@64", "size must not be given for 'digits'.*64"),
    ("fundus@7", "size of 'fundus' .* 8 to 4096, got '7'"),
    ("fundus@", "size of 'fundus' .* got ''"),
    ("fundus@6x", "got '6x'"),
    ("my_eyes@64", "name must be one of .* a size follows, got 'my_eyes@64'"),
    ("fundus_64", "name must be one of .*'fundus_64'"),
    ("Fundus", "did you mean 'fundus'"),
    ("../fundus", "name must be one of"),
  ],
)
def test_names_bad(tmp_path, name, words):
  for function in (
    catalog.parse,
    lambda name: data.load(name, "train", data_dir=tmp_path),
  ):
    with pytest.raises(ValueError, match=words):
      function(name)


def test_folders_and_names_are_one_to_one(tmp_path):
  for name in ("digits", "fundus", "fundus@64", "my_eyes", "my_eyes_64"):
    catalog.set_dir(name, tmp_path).mkdir()
  folders = catalog.set_dirs(tmp_path)
  assert set(folders) == {
    *("digits", "fundus", "fundus@64", "my_eyes", "my_eyes_64")
  }
  assert folders["fundus@64"].name == "psg_fundus_64"
  # Nothing is in them.
  assert catalog.names(tmp_path) == catalog.names()


def test_the_command_prepares_a_set_as_it_was():
  settings = {
    "size": 64,
    "fit": "crop",
    "source": "/a b",
    "is_skipping_corrupt": True,
  }
  assert catalog.command("my_eyes", "there", {"settings": settings}) == (
    "python -m data_prep.prepare image_folder --source '/a b' --name my_eyes"
    " --size 64 --fit crop --skip_corrupt --data_dir there"
  )
  assert catalog.command("fundus@64") == (
    "python -m data_prep.prepare fundus@64 --source PATH"
  )


@pytest.mark.parametrize(
  ("kind", "values"),
  [
    ("string", ["a", None]),
    ("bool", [True, False, None]),
    ("int64", [-(2**63), None]),
    ("double", [0.1, 1e-300, None]),
    ("date32[day]", [datetime.date(2019, 2, 28), None]),
    ("timestamp[s]", [datetime.datetime(2019, 2, 28, 1, 2, 3), None]),
  ],
)
def test_values_come_back_from_text(kind, values):
  texts = pa.array([catalog.to_text(value) or None for value in values])
  column = texts.cast(catalog.COLUMN_TYPES[kind])
  assert column.to_pylist() == values


def test_no_home(monkeypatch):
  def fail(path):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv(catalog.DATA_DIR_VARIABLE, raising=False)
  monkeypatch.setattr(pathlib.Path, "expanduser", fail)
  with pytest.raises(ValueError, match=r"data_dir \(or PSG_JAX_DATA\) must be"):
    catalog.root_dir()
