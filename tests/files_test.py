"""Tests of psg_jax.files, and of experiments.files, which goes on from it."""

import csv
import fcntl
import hashlib
import io
import json
import os
import pathlib

import numpy as np
import pytest

from experiments import cli, compare, read_out, report, run_folder, tune
from experiments import files as run_files
from psg_jax import files

_TEXTS = [
  "=1+1",
  "+49 30 1234",
  "-2+3",
  "@SUM(A1)",
  "\t=1",
  "\r=1",
  "\n=1",
  "＝1+1",
  "'=1",
  "''-x",
  "'quoted'",
  "plain, with a comma",
  "ü\n",
  "",
]


def fails(call, *parts):
  with pytest.raises(ValueError, match=r".") as caught:
    call()
  for part in parts:
    assert part in str(caught.value)


def test_no_cell_is_a_formula_and_all_are_read_back(tmp_path):
  rows = [[text, -1.5, -3, None] for text in _TEXTS]
  text = files.to_csv([["text", "float", "int", "none"], *rows])
  (tmp_path / "a.csv").write_text(text, newline="")
  for cells in csv.reader(io.StringIO(text, newline="")):
    assert cells[0][:1] not in tuple("=+-@\t\r\n＝")
    assert cells[1:] in (["float", "int", "none"], ["-1.5", "-3", ""])
  fields, lines = files.read_csv(tmp_path / "a.csv")
  assert fields == ["text", "float", "int", "none"]
  assert [line["text"] for line in lines] == _TEXTS


def test_numbers_of_a_comparison_stay_numbers():
  metric = {"a": {"value": -0.25}, "b": {"value": None, "reason": "-none"}}
  row = {"model": "=x", "seed": 1, "unlearn_seed": 0, "metrics": metric}
  assert compare.to_csv({"rows": [row]}).splitlines()[1:] == [
    "'=x,1,0,a,-0.25,",
    "'=x,1,0,b,,'-none",
  ]


@pytest.mark.parametrize(
  "content",
  [b'{"a": [}', b'{"a\xb7": 1}', b"", b"[1]", b"\x00\x01", b"3", b"[" * 9999],
)
@pytest.mark.parametrize(
  "read",
  [run_folder.read_json, lambda path: cli.read_job(path.parent)],
)
def test_damaged_json_is_named(tmp_path, content, read):
  path = tmp_path / "config.json"
  path.write_bytes(content)
  fails(lambda: read(path), str(path))


def test_what_json_lacks_is_named(tmp_path):
  path = tmp_path / "data.json"
  path.write_text('{"counts": {"test": 3}, "list": [{"x": 1}]}')
  content = run_files.read_json(path)
  assert content["counts"]["test"] == 3
  assert content.get("other") is None
  fails(lambda: content["classes"], f"{path} must have 'classes'")
  fails(lambda: content["counts"]["train"], f"{path} must have 'train'")
  fails(lambda: content["list"][0]["y"], f"{path} must have 'y'")
  fails(lambda: run_files.read_json(tmp_path / "no.json"), "no.json")
  assert run_folder.read_json(tmp_path / "no.json") == {}


@pytest.mark.parametrize(
  ("name", "content", "what"),
  [
    ("config.json", {"job": 3}, "a dict as 'job', got 3"),
    ("config.json", {"job": {"training": []}}, "as 'job.training', got []"),
    ("history.json", {"original": "x"}, "a list as 'original', got 'x'"),
    ("history.json", {"unlearned": [3]}, "objects in 'unlearned', got [3]"),
    ("data.json", {"class_names": None}, "a list as 'class_names', got None"),
    ("data.json", {"counts": [1]}, "a dict as 'counts', got [1]"),
    ("metrics.json", {"original": []}, "a dict as 'original', got []"),
    ("metrics.json", {"original": {"accuracy": 1}}, "'original.accuracy'"),
  ],
)
def test_values_of_other_types_are_named(tmp_path, name, content, what):
  path = tmp_path / name
  path.write_text(json.dumps(content))
  fails(lambda: run_files.read_json(path), f"{path} must have", what)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_arrays_are_named(tmp_path, damage):
  path = tmp_path / "a.npz"
  files.save_arrays(path, {"x": np.arange(100)})
  content = path.read_bytes()
  path.write_bytes(
    {
      "cut": content[:200],
      "flipped": content[:300] + b"?" + content[301:],
      "empty": b"",
      "text": b"x = 1",
    }[damage]
  )
  fails(lambda: files.read_arrays(path), str(path))


def test_arrays_that_are_missing_are_named(tmp_path):
  files.save_arrays(tmp_path / "a.npz", {"x": np.arange(3)})
  assert files.read_arrays(tmp_path / "a.npz", "x")["x"].tolist() == [0, 1, 2]
  fails(lambda: files.read_arrays(tmp_path / "a.npz", "y"), "a.npz", "'y'")
  fails(lambda: files.read_arrays(tmp_path / "b.npz"), "b.npz")


@pytest.mark.parametrize(
  "content",
  [b"", b"a,b\n1\n", b"a,b\n1,2,3\n", b"a\xb7,b\n", b"a,b\n1," + b"x" * 140000],
)
def test_damaged_tables_are_named(tmp_path, content):
  path = tmp_path / "flips.csv"
  path.write_bytes(content)
  fails(lambda: read_out.read_flips(tmp_path), str(path))


def test_a_table_of_trials_must_hold_numbers(tmp_path):
  path = tmp_path / "trials.csv"
  text = tune.to_csv([])
  path.write_text(text + "constant,x,1,1,1,0,0.5,0.5,0.5,1.0\n")
  fails(lambda: tune.read(path), str(path), "'x'")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError()])
def test_a_disk_that_cannot_be_written_is_named(tmp_path, monkeypatch, error):
  def fail(file, **arrays):
    pathlib.Path(file).write_bytes(b"half")
    raise error

  path = tmp_path / "a.npz"
  path.write_bytes(b"before")
  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError, match=r"a\.npz"):
    files.save_arrays(path, {})
  assert path.read_bytes() == b"before"
  assert list(tmp_path.iterdir()) == [path]


def hold(path):
  return run_files.lock(path, argument="name", hint="")


def other_process(path):
  """Locks as another process would: each opened file has a lock of its own."""
  path.parent.mkdir(parents=True, exist_ok=True)
  file = path.with_name(f".{path.name}.lock").open("w")
  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  file.write("process 17 on there\n")
  file.flush()
  return file


def test_a_lock_leaves_nothing_behind(tmp_path):
  run = tmp_path / "runs" / "a"
  with hold(run) as first, hold(run) as second:
    assert first is second
    text = (tmp_path / "runs" / ".a.lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ")
  assert not list(tmp_path.iterdir())
  with hold(run):
    run.mkdir()
  assert list((tmp_path / "runs").iterdir()) == [run]


def test_the_holder_of_a_lock_is_named(tmp_path):
  file = other_process(tmp_path / "a")

  def take():
    with hold(tmp_path / "a"):
      pass

  fails(take, f"name must not be in use, got {tmp_path / 'a'}", "process 17 on")
  # It has ended without a word; what it wrote says nothing any more.
  file.close()
  take()
  assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
  flock, removed = fcntl.flock, []

  def slow(file, operation):
    flock(file, operation)
    if not removed:
      # The holder of before ends between the opening and the locking here.
      removed.append(pathlib.Path(file.name))
      removed[0].unlink()

  monkeypatch.setattr(run_files.fcntl, "flock", slow)
  with hold(tmp_path / "a"):
    assert removed[0].is_file()
    monkeypatch.undo()
    with pytest.raises(BlockingIOError):
      other_process(tmp_path / "a")


def test_a_disk_without_locks_locks_nothing(tmp_path, monkeypatch):
  def refuse(file, operation):
    raise OSError(95, "not supported")

  monkeypatch.setattr(run_files.fcntl, "flock", refuse)
  with hold(tmp_path / "a"):
    pass
  assert not list(tmp_path.iterdir())


def test_reports_name_what_is_missing(tmp_path):
  for name in ("config", "metrics", "history", "data"):
    (tmp_path / f"{name}.json").write_text("{}")
  fails(lambda: report.read(tmp_path), "metrics.json")


def test_names_that_are_no_text_are_written(tmp_path):
  files.write_text(tmp_path / "a.csv", files.to_csv([["a", "scan\udcff.png"]]))
  fields, _ = files.read_csv(tmp_path / "a.csv")
  assert fields == ["a", "scan\\udcff.png"]


def test_a_full_disk_can_be_locked(tmp_path, monkeypatch):
  def fail(*arguments):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "write", fail)
  with hold(tmp_path / "a"):
    pass
  assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_file_is_one_line(tmp_path):
  def read(error):
    with files.faults("source must be whole, got x:", OSError, KeyError):
      raise error

  start = "source must be whole, got x: "
  fails(lambda: read(FileNotFoundError(2, "No such file", "x")), "x: No such")
  fails(lambda: read(KeyError("a")), f"{start}KeyError: 'a'")
  fails(lambda: read(OSError("a\n  b")), f"{start}a b")
  fails(lambda: read(OSError()), f"{start}OSError")
  with pytest.raises(RuntimeError):
    read(RuntimeError("of our own making"))
  with pytest.raises(MemoryError), files.faults("x", Exception):
    raise MemoryError


def test_a_text_file_is_read_without_its_mark(tmp_path):
  path = tmp_path / "ids.txt"
  path.write_bytes(b"\xef\xbb\xbfa\n")
  assert files.read_text("ids", path) == "a\n"
  fails(
    lambda: files.read_text("ids", tmp_path / "no"), "ids must be", "No such"
  )


def test_a_failed_replacement_keeps_the_folder(tmp_path):
  for name in ("new", "place"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text(name)
  old = tmp_path / "old"
  with pytest.raises(FileNotFoundError):
    files.replace_folder(tmp_path / "no", tmp_path / "place", old)
  assert (tmp_path / "place" / "file").read_text() == "place"
  assert not old.exists()
  files.replace_folder(tmp_path / "new", tmp_path / "place", old)
  assert (tmp_path / "place" / "file").read_text() == "new"
  assert (old / "file").read_text() == "place"
  assert files.num_bytes(tmp_path) == 8


def test_digests_are_those_of_bytes_and_of_json():
  # Of b"abc", as the standard (FIPS 180-2) has it; and of b"[1, 2]".
  assert files.digest(b"abc") == (
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
  )
  assert files.digest([1, 2]) == hashlib.sha256(b"[1, 2]").hexdigest()
  compact = files.digest({"b": 1, "a": 2}, sort_keys=True, separators=",:")
  assert compact == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()
