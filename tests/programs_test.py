"""The programs from end to end, on a few of the embedded digits."""

import csv
import dataclasses
import fcntl
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from data_prep import cache
from experiments import (
  cli,
  contexts,
  demo,
  evaluation_benchmark,
  files,
  jobs,
  recipes,
  report,
  run_figures,
  run_folder,
  search_benchmark,
  train,
  unlearn,
)
from psg_jax import (
  boundary,
  checkpoints,
  data,
  metrics,
  models,
  programs,
  torch_weights,
)
from tests import fakes

SMALL = [
  "--num_train=400",
  "--width=0.05",
  "--training.num_epochs=2",
  "--training.learning_rate=0.05",
  "--unlearning.num_epochs=2",
  "--unlearning.num_steps=10",
  "--num_devices=1",
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  with fakes.quick_programs(folder):
    yield folder


def call(program, *arguments):
  """Runs a program's main as its command line would."""
  patch = pytest.MonkeyPatch()
  patch.setattr(sys, "argv", ["experiments/program.py", *arguments])
  try:
    cli.run(program.main)
  finally:
    patch.undo()


def failing(capsys, program, *arguments):
  """Runs a program that must fail, and returns its one line."""
  with pytest.raises(SystemExit) as caught:
    call(program, *arguments)
  assert caught.value.code == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1
  return lines[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
  """A folder with the run `first`: everything in one go."""
  folder = tmp_path_factory.mktemp("runs")
  call(demo, *SMALL, f"--runs_dir={folder}", "--name=first")
  return folder


def read(folder, name):
  return json.loads((folder / name).read_text())


def test_demo_writes_the_run_folder(runs):
  run = runs / "first"
  result = read(run, "metrics.json")
  assert list(result) == ["original", "retrained", "unlearned"]
  for figures in result.values():
    assert set(figures["accuracy"]) == {
      "train_forget",
      "train_retain",
      "test_forget",
      "test_retain",
      "test",
    }
    assert all(0 <= x <= 1 for x in figures["accuracy"].values())
    assert figures["seconds"] > 0
  # A class that was never seen is never predicted after 2 epochs.
  assert result["retrained"]["accuracy"]["train_forget"] == 0
  relabelling = result["unlearned"]["relabelling"]
  counts = read(run, "data.json")["counts"]
  assert sum(relabelling["label_counts"]) == counts["train_forget"]
  assert relabelling["label_counts"][0] == 0
  config = read(run, "config.json")
  assert config["job"]["num_train"] == 400
  assert config["versions"]["jax"] == jax.__version__
  # The digits have two more retrained models, as references.
  assert set(checkpoints.run_checkpoints(run)) == {
    *contexts.MODELS,
    "retrained-1",
    "retrained-2",
  }
  assert (run / "report.html").stat().st_size > 50_000
  flips = (run / "flips.csv").read_text().splitlines()[1:]
  clinical = result["unlearned"]["clinical"]
  assert len(flips) == sum(
    clinical[f"harmed_{part}"]["num_harmed"]
    for part in ("train_retain", "test_retain")
  )
  assert result["unlearned"]["diagnosis"]["findings"]
  assert not list(run.glob("*.partial"))


def test_restored_states_give_the_reported_figures(runs):
  run = runs / "first"
  job = cli.read_job(run)
  context = jobs.prepare(
    dataclasses.replace(job, resume=True), is_known_run=True
  )
  for name in ("original", "retrained"):
    variables = getattr(jobs, name)(context)
    logits = context.of(name).model.apply(
      variables, context.test.images / np.float32(255)
    )
    accuracy = np.mean(np.argmax(logits, 1) == context.test.labels)
    stored = read(run, "metrics.json")[name]["accuracy"]["test"]
    np.testing.assert_allclose(accuracy, stored, atol=1e-6)


def test_cost_of_evaluation_is_of_all_metrics(runs):
  run = runs / "first"
  names = ("metrics.json", "config.json", "data.json", "history.json")
  before = [(run / name).read_bytes() for name in names]
  options = evaluation_benchmark.Options(run=run, repeats=1)
  (row,) = evaluation_benchmark.measure(options)
  assert row["num_metrics"] == len(metrics.METRICS) - 2
  # Digits have no metadata, and few non-members.
  allowed = {"worst_subgroup"} | {x for x in metrics.METRICS if "tpr" in x}
  assert set(row["missing"]) <= allowed
  assert 0 < row["prediction"] < row["evaluation"]
  assert [(run / name).read_bytes() for name in names] == before


def test_cost_of_searches_is_measured_beside_fine_steps(runs, monkeypatch):
  job = cli.read_job(runs / "first")
  monkeypatch.setattr(
    search_benchmark,
    "SEARCHES",
    {
      "fine steps": boundary.Search(num_steps=40, step_size=0.02),
      "growing": boundary.Search(
        num_steps=40, step_size=0.02, step_growth=2.0, num_bisections=4
      ),
    },
  )
  rows = search_benchmark.measure(dataclasses.replace(job, resume=True))
  assert rows["fine steps"]["same"] == 1
  assert rows["growing"]["gradients"] <= rows["fine steps"]["gradients"]
  for row in rows.values():
    assert row["seconds"] > 0
    assert 0 <= row["crossed"] <= 1


def test_resuming_a_run_of_an_earlier_version(runs, tmp_path):
  folder = tmp_path / "first"
  shutil.copytree(runs / "first", folder)
  config = read(folder, "config.json")
  for name in ("by", "twins", "dropout"):
    del config["job"][name]
  for part, name in (
    *(("unlearning", "target"), ("unlearning", "num_parts")),
    ("unlearning", "search_batch_size"),
    ("training", "num_parts"),
  ):
    del config["job"][part][name]
  del config["job"]["eval_batch_size"], config["references_standardise_by"]
  (folder / "config.json").write_text(json.dumps(config))
  job = dataclasses.replace(
    cli.read_job(runs / "first"), runs_dir=str(tmp_path), resume=True
  )
  context = jobs.prepare(job, is_known_run=True, is_read_only=True)
  assert run_folder.has_same_request(folder, job)
  # Its references were trained with the standardisation of the original.
  assert context.of("retrained-1").model is context.model
  # What fits the memory may change.
  smaller = dataclasses.replace(
    job,
    eval_batch_size=7,
    unlearning=dataclasses.replace(job.unlearning, search_batch_size=5),
  )
  jobs.prepare(smaller, is_known_run=True, is_read_only=True)
  config["job"]["seed"] = 1
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="seed must be as in the run"):
    jobs.prepare(job, is_known_run=True)


def test_references_standardise_with_what_is_retained(runs):
  job = dataclasses.replace(
    cli.read_job(runs / "first"), name="measured", mean=None, std=None
  )
  context = jobs.prepare(job, is_read_only=True)
  reference = context.of("retrained").model
  assert reference is context.of("retrained-2").model is not context.model
  assert context.of("unlearned").model is context.model
  expected = data.mean_and_std(context.split.retain)
  assert contexts.standardisation(job, context.split.retain) == expected
  assert expected != data.mean_and_std(context.train)
  # A recipe's own numbers are everyone's.
  fixed = dataclasses.replace(job, mean=(0.5,), std=(0.5,))
  assert contexts.network(fixed, context.train) is contexts.network(
    fixed, context.split.retain
  )


def test_what_is_lost_is_said():
  def figures(test, test_retain):
    accuracy = {"test": test, "test_retain": test_retain, "train_retain": None}
    return {"accuracy": accuracy}

  labels = {
    "test_forget": np.zeros(20, int),
    "test_retain": np.repeat([1, 2], [60, 40]),
  }
  result = {
    "original": figures(0.8, 0.871),
    "retrained": figures(0.5, 0.85),
    "unlearned": figures(0.5, 0.575),
  }
  found = run_figures.warnings(result, labels)
  assert found["original"] == found["retrained"] == []
  chance, lost = found["unlearned"]
  assert "right on 0.575 of the test_retain images, no more than" in chance
  assert "(0.600)" in chance
  assert "test_retain fell from 0.871 to 0.575" in lost
  fine = {**result, "unlearned": figures(0.7, 0.85)}
  assert run_figures.warnings(fine, labels)["unlearned"] == []
  untrained = {"original": figures(0.5, 0.6)}
  assert len(run_figures.warnings(untrained, labels)["original"]) == 1


def test_resuming_a_finished_run_keeps_it(runs):
  run = runs / "first"
  before = read(run, "metrics.json")
  arguments = [*SMALL, f"--runs_dir={runs}", "--name=first", "--resume"]
  call(demo, *arguments)
  after = read(run, "metrics.json")
  assert after == before


def test_unlearning_again_in_a_copy_with_export(runs, tmp_path):
  exported = tmp_path / "unlearned.safetensors"
  call(
    unlearn,
    f"--run={runs / 'first'}",
    "--name=second",
    "--method=no_retain_data",
    "--unlearning.num_steps=10",
    f"--export={exported}",
  )
  first, second = (
    read(runs / name, "metrics.json") for name in ("first", "second")
  )
  assert second["original"]["accuracy"] == first["original"]["accuracy"]
  config = read(runs / "second", "config.json")
  assert config["job"]["unlearning"]["retain_weight"] == 0
  assert "retain_loss" not in read(runs / "second", "history.json")["unlearned"]
  variables = torch_weights.load(exported, model_name="all_cnn")
  restored = checkpoints.restore_run(runs / "second", "unlearned")
  np.testing.assert_array_equal(
    variables["params"]["head"]["kernel"],
    restored["variables"]["params"]["head"]["kernel"],
  )
  assert len(safetensors_numpy.load_file(exported)) == 6 + 2


def test_training_then_unlearning_in_the_same_run(tmp_path, data_dir):
  call(train, *SMALL, f"--runs_dir={tmp_path}", "--name=one", "--no-retrained")
  assert list(read(tmp_path / "one", "metrics.json")) == ["original"]
  call(unlearn, f"--run={tmp_path / 'one'}")
  result = read(tmp_path / "one", "metrics.json")
  assert list(result) == ["original", "unlearned"]
  assert "agreement" not in result["unlearned"]
  assert result["unlearned"]["relabelling"]["agreement_with_retrained"] is None


@pytest.mark.slow
def test_unlearning_pytorch_weights_with_the_released_search(
  runs, tmp_path, data_dir
):
  weights = tmp_path / "original.safetensors"
  restored = checkpoints.restore_run(runs / "first", "original")
  torch_weights.save(weights, restored["variables"], model_name="all_cnn")
  call(
    unlearn,
    *SMALL,
    f"--runs_dir={tmp_path}",
    "--name=imported",
    f"--weights={weights}",
    "--no-retrained",
    "--unlearning.search=released",
  )
  result = read(tmp_path / "imported", "metrics.json")
  assert list(result) == ["original", "unlearned"]
  assert (
    result["original"]["accuracy"]
    == (read(runs / "first", "metrics.json")["original"]["accuracy"])
  )


@pytest.mark.parametrize(
  "program",
  [
    "demo",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("train", "unlearn", "report")
    ),
  ],
)
def test_help_and_typos_from_the_command_line(program):
  command = [sys.executable, "-m", f"experiments.{program}"]
  done = subprocess.run([*command, "--helpp"], capture_output=True, text=True)
  assert done.returncode == 2
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--recipe=digit"], "recipe .* 'digit', did you mean 'digits'"),
    (["--dataset=digitz"], "dataset must be one of .* 'digitz'"),
    (["--model=resnet"], "model must be one of .* 'resnet'"),
    (["--width=0"], "width .* got 0.0"),
    (["--forget_classes=11"], "11"),
    (
      ["--forget_classes"],
      "forget_classes, .* must say what to forget, got none",
    ),
    (["--num_train=0"], "num_train .* got 0"),
    (["--num_train=99999"], "num_train must be at most the 1437 images"),
    (["--num_devices=99"], "num_devices .* got 99"),
    (["--training.learning_rate=-1"], "training.learning_rate .* got -1.0"),
    (["--training.num_epochs=0"], "training.num_epochs .* got 0"),
    (["--unlearning.step_size=0"], "unlearning.step_size .* got 0.0"),
    (["--unlearning.retain_weight=nan"], "unlearning.retain_weight .* got nan"),
    (["--unlearning.max_distance=-1"], "unlearning.max_distance .* got -1"),
    (["--unlearning.confidence=2"], "unlearning.confidence .* got 2.0"),
    (
      ["--unlearning.labels=hard", "--unlearning.top_k=3"],
      "top_k must be None with hard labels, got 3",
    ),
    (
      ["--unlearning.image_weight=2"],
      "unlearning.image_weight must be .* got 2",
    ),
    (
      ["--unlearning.target=proxy", "--unlearning.num_proxies=999"],
      "unlearning.num_proxies must leave each an image a class, got 999",
    ),
    (
      ["--unlearning.num_refits=1", "--unlearning.labels=hard"],
      "unlearning.num_refits must be 0 where labels are hard, got 1",
    ),
    (
      ["--unlearning.layers", "nonsense"],
      "unlearning.layers must be prefixes of parameters .* 'nonsense'",
    ),
    (
      ["--unlearning.layers", "head", "--unlearning.num_layers=2"],
      "unlearning.num_layers must be 0 where unlearning.layers are given",
    ),
    (
      ["--unlearning.search=released", "--unlearning.norm=l2"],
      "unlearning.norm must be linf with the released search, .* got l2",
    ),
    (["--unlearning.noise=gaussian"], "gaussian.*noise"),
    (["--unlearning.norm=l1"], "l1.*norm"),
    (["--width=abc"], "width.*abc"),
    (["--weights=none.pt"], "weights must be a file, got none.pt"),
    (["--recipe=cifar10", "--data_dir=nowhere"], "data_dir .* nowhere"),
    (["--resume", "--overwrite"], "overwrite must be off to resume"),
  ],
)
def test_bad_options_leave_nothing_behind(
  arguments, message, tmp_path, capsys, data_dir
):
  folder = tmp_path / "runs"
  line = failing(capsys, demo, f"--runs_dir={folder}", *arguments)
  assert re.search(message, line), line
  assert line.startswith("error: ")
  assert not folder.exists()


@pytest.mark.parametrize(
  "arguments",
  [
    ["--unlearning.step_size=0"],
    ["--forget_classes=11"],
    ["--width=0.1"],
    ["--export=/nowhere/model.safetensors"],
    ["--method=releasd"],
  ],
)
def test_bad_options_leave_no_copy_of_a_run(arguments, runs, capsys):
  line = failing(
    capsys, unlearn, f"--run={runs / 'first'}", "--name=copy", *arguments
  )
  assert line.startswith("error: ")
  assert not list(runs.glob("*copy*"))


def test_a_finished_run_keeps_its_options(runs, capsys):
  line = failing(
    capsys, unlearn, f"--run={runs / 'first'}", "--resume", "--method=released"
  )
  assert "unlearning must be as in the run" in line
  job = read(runs / "first", "config.json")["job"]
  assert job["unlearning"]["search"] == "multi_step"


def test_interrupted_training_goes_on(tmp_path, data_dir, monkeypatch):
  arguments = [*SMALL, f"--runs_dir={tmp_path}", "--no-retrained"]
  call(train, *arguments, "--name=whole")
  save, calls = checkpoints.save, []

  def stop(*args, **kwargs):
    save(*args, **kwargs)
    calls.append(1)
    raise KeyboardInterrupt

  monkeypatch.setattr(checkpoints, "save", stop)
  monkeypatch.setattr(jobs, "EPOCH_SAVE_SECONDS", 0.0)
  with pytest.raises(SystemExit) as caught:
    call(train, *arguments, "--name=parts")
  assert caught.value.code == 130
  assert len(calls) == 1
  monkeypatch.undo()
  # As if within the second epoch, of which 1,000 seconds had gone by.
  found = checkpoints.metadata(tmp_path / "parts" / "original.partial")
  assert found["seconds_within"] == 0
  within = {**found, "seconds_within": 1e3}
  monkeypatch.setattr(checkpoints, "metadata", lambda path: within)
  monkeypatch.setenv("PSG_JAX_DATA", str(data_dir))
  call(train, *arguments, "--name=parts", "--resume")
  whole, parts = (
    checkpoints.restore_run(tmp_path / name, "original")
    for name in ("whole", "parts")
  )
  jax.tree.map(
    np.testing.assert_array_equal, whole["variables"], parts["variables"]
  )
  history = read(tmp_path / "parts", "history.json")
  assert [x["seconds"] > 1e3 for x in history["original"]] == [False, True]
  assert history["original_seconds"] > 1e3


def test_short_epochs_are_not_kept_one_by_one(tmp_path, data_dir, monkeypatch):
  save = checkpoints.save
  kept = {"each": [], "last": []}

  def count(path, state, **options):
    if path.name.endswith(".partial"):
      kept[path.parent.name].append(int(state.step))
    save(path, state, **options)

  monkeypatch.setattr(checkpoints, "save", count)
  arguments = [*SMALL, "--no-retrained", "--training.num_epochs=3"]
  for seconds, name in ((0.0, "each"), (1e9, "last")):
    monkeypatch.setattr(jobs, "EPOCH_SAVE_SECONDS", seconds)
    call(train, *arguments, f"--runs_dir={tmp_path}", f"--name={name}")
  epoch, *_ = kept["each"]
  assert kept == {"each": [epoch, 2 * epoch, 3 * epoch], "last": [3 * epoch]}


def test_runs_that_exist_or_do_not(runs, tmp_path, capsys):
  same = [f"--runs_dir={runs}", "--name=first"]
  assert "which exists" in failing(capsys, demo, *SMALL, *same)
  changed = [*SMALL, *same, "--resume", "--seed=7"]
  assert "seed must be as in the run" in failing(capsys, demo, *changed)
  first = f"--run={runs / 'first'}"
  assert "must not have been unlearned" in failing(capsys, unlearn, first)
  missing = f"--run={tmp_path / 'none'}"
  assert "run must be a run folder" in failing(capsys, unlearn, missing)
  assert "error: " in failing(capsys, report, str(tmp_path / "none"))
  assert "export must end in" in failing(
    capsys, unlearn, first, "--name=third", "--export=model.pt"
  )
  assert not (runs / "third").exists()
  other = tmp_path / "other"
  other.mkdir()
  (other / "keep.txt").write_text("mine")
  line = failing(
    capsys, demo, f"--runs_dir={tmp_path}", "--name=other", "--overwrite"
  )
  assert "no config.json" in line
  assert (other / "keep.txt").read_text() == "mine"


def test_weights_of_another_model(runs, tmp_path, capsys):
  weights = tmp_path / "original.safetensors"
  restored = checkpoints.restore_run(runs / "first", "original")
  torch_weights.save(weights, restored["variables"], model_name="all_cnn")
  arguments = [f"--runs_dir={tmp_path}", "--name=x", f"--weights={weights}"]
  line = failing(capsys, unlearn, *arguments, "--width=0.1")
  assert "weights must be those of all_cnn at width 0.1" in line
  assert not (tmp_path / "x").exists()


def test_checkpoint_of_another_model(runs):
  context = jobs.prepare(cli.read_job(runs / "first"), is_known_run=True)
  other = dataclasses.replace(context.job, width=0.1)
  wider = context._replace(job=other)._replace(
    model=models.create(
      "all_cnn",
      num_classes=10,
      num_channels=1,
      width=0.1,
      mean=0.5,
      std=0.5,
    )
  )
  with pytest.raises(ValueError, match="block_0"):
    jobs.original(wider)


def test_recipes_are_complete():
  for name, job in recipes.JOBS.items():
    assert job.recipe == name
    if name == "own":
      # What to forget of one's own images is for the user to say.
      with pytest.raises(ValueError, match="must say what to forget"):
        jobs.check(job)
      job = dataclasses.replace(job, where="site = 'B'")
    jobs.check(job)
  assert recipes.UNLEARNING["released"].retain_weight == 0


# What ends a program.


def outcome(code, *, shell="{}"):
  """Status, output and errors of a program of a few lines, run by bash."""
  script = f"import os, sys\nfrom psg_jax import programs\n{code}"
  words = [sys.executable, "-c", script]
  done = subprocess.run(
    ["bash", "-c", shell.format(shlex.join(words))],
    capture_output=True,
    text=True,
    encoding="utf-8",
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done.returncode, done.stdout, done.stderr


def raising(error):
  def main():
    raise error

  return main


class JaxRuntimeError(RuntimeError):
  pass


@pytest.mark.parametrize(
  ("error", "status", "line"),
  [
    (ValueError("a must be\n 1"), 2, "error: a must be 1"),
    (OSError(28, "No space left", "x.npz"), 2, "No space left: 'x.npz'; hint"),
    (FileNotFoundError(2, "none", "x"), 2, "error: [Errno 2] none: 'x'\n"),
    (FloatingPointError("diverged"), 1, "error: diverged"),
    (MemoryError(), 2, "error: memory is used up: ; less"),
    (
      JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
      2,
      "error: memory is used up: RESOURCE_EXHAUSTED: Out of memory allocating"
      " 9 bytes.; less",
    ),
    (
      OSError("RESOURCE_EXHAUSTED: write failed: No space left on device"),
      2,
      "error: RESOURCE_EXHAUSTED: write failed: No space left on device; hint",
    ),
    (OSError(12, "Cannot allocate memory"), 2, "memory is used up"),
    (RuntimeError("array_record"), 2, "error: RuntimeError: array_record ("),
    (RuntimeError("Could not determine home directory."), 2, "PSG_JAX_DATA"),
    (csv.Error("field larger"), 2, "error: Error: field larger ("),
    (EOFError("short"), 2, "error: EOFError: short ("),
    (KeyboardInterrupt(), 130, "interrupted; hint"),
  ],
)
def test_errors_end_in_one_line(error, status, line, capsys, monkeypatch):
  monkeypatch.delenv("PSG_JAX_TRACEBACK", raising=False)
  with pytest.raises(SystemExit) as caught:
    programs.run(
      raising(error),
      memory_hint=lambda: "less",
      at_end=lambda is_done: ["hint"] * (not is_done),
    )
  assert caught.value.code == status
  said = capsys.readouterr().err
  assert line in said
  assert said.count("\n") == 1


def test_mistakes_of_ours_are_shown_in_full(monkeypatch):
  with pytest.raises(TypeError):
    programs.run(raising(TypeError("ours")))
  monkeypatch.setenv("PSG_JAX_TRACEBACK", "1")
  with pytest.raises(RuntimeError, match="others"):
    programs.run(raising(RuntimeError("others")))


def test_devices_that_are_not_there_are_named(monkeypatch, capsys):
  def assert_there():
    raise AssertionError

  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setattr(jax, "devices", assert_there)
  with pytest.raises(SystemExit):
    programs.run(raising(AssertionError()))
  assert "JAX_PLATFORMS must name devices" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("shell", "status", "line"),
  [
    ("{} > /dev/full", 2, "error: standard output cannot be written: No space"),
    ("{} | head -c 0; exit ${{PIPESTATUS[0]}}", 141, ""),
    ("LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {}", 0, ""),
    ("{} >&-", 0, ""),
    ("{} 2>&-", 0, ""),
  ],
)
def test_output_that_cannot_be_written(shell, status, line):
  code = "programs.run(lambda: print('\\xfc\\u4e2d' * 9 * 10**4))"
  found, output, errors = outcome(code, shell=shell)
  assert (found, errors.count("\n")) == (status, bool(line))
  assert line in errors
  assert output[:1] in (("\\",) if "ascii" in shell else ("", "\\", "\xfc"))


@pytest.mark.parametrize(
  ("signal", "status", "word"),
  [("TERM", 143, "terminated"), ("INT", 130, "interrupted")],
)
@pytest.mark.parametrize("is_begun", [True, False])
def test_signals_end_in_one_line(signal, status, word, is_begun):
  kill = f"os.kill(os.getpid(), signal.SIG{signal}); time.sleep(9)"
  # A shell's background jobs are started deaf to SIGINT.
  hear = "signal.signal(signal.SIGINT, signal.default_int_handler)"
  code = f"import signal, time\n{hear}\ndef main():\n  {kill}\n"
  code += (
    "programs.run(main, at_end=lambda is_done: ['go on'])"
    if is_begun
    else f"sys.argv = ['-m']; programs.expect_signals(); {kill}"
  )
  assert outcome(code) == (
    status,
    "",
    f"{word}; go on\n" if is_begun else f"{word}: nothing was begun\n",
  )


def test_homes_in_arguments(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  given = ["--runs_dir=~/x", "~/y", "~", "--where=a = '~/z'", "--n=~", "a~/b"]
  monkeypatch.setattr(sys, "argv", ["program", *given])
  assert programs.arguments() == [
    *("--runs_dir=/home/me/x", "/home/me/y", "/home/me", "--where=a = '~/z'"),
    *("--n=/home/me", "a~/b"),
  ]


def test_commands_run_where_others_have_our_names(tmp_path, monkeypatch):
  root = pathlib.Path(programs.__file__).parents[1]
  scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]
  assert set(scripts["scripts"].values()) == {"psg_jax.programs:start"}
  for name in scripts["scripts"]:
    module = name.removeprefix("psg-")
    folders = ("experiments", "data_prep")
    assert any((root / x / f"{module}.py").is_file() for x in folders)
  # An installed command has not the working folder in its path.
  run = []
  monkeypatch.setattr(
    programs.runpy, "run_module", lambda name, **_: run.append(name)
  )
  monkeypatch.setattr(programs, "quit_on_signals", lambda: None)
  for name in ("psg-unlearn", "psg-prepare"):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / name)])
    programs.start()
  assert run == ["experiments.unlearn", "data_prep.prepare"]


def test_the_commit_is_that_of_our_own_checkout(tmp_path, monkeypatch):
  def git(*arguments, cwd):
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(
      ["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True
    )

  theirs = tmp_path / "theirs"
  file = theirs / "lib" / "experiments" / "jobs.py"
  file.parent.mkdir(parents=True)
  file.write_text("")
  monkeypatch.setattr(run_folder, "__file__", str(file))
  assert run_folder.git_commit() is None
  git("init", cwd=theirs)
  (theirs / "own.txt").write_text("")
  git("add", "own.txt", cwd=theirs)
  git("commit", "-m", "x", cwd=theirs)
  assert run_folder.git_commit() is None
  git("add", "lib", cwd=theirs)
  git("commit", "-m", "x", cwd=theirs)
  assert run_folder.git_commit() is None
  git("init", cwd=theirs / "lib")
  git("add", ".", cwd=theirs / "lib")
  git("commit", "-m", "x", cwd=theirs / "lib")
  assert re.fullmatch("[0-9a-f]{40}", run_folder.git_commit())


# Who works on a run, and what it replaces.


def prepared(folder, data_dir, **options):
  """Makes a run folder, as programs do before they train."""
  job = dataclasses.replace(
    recipes.find("digits"), num_train=400, width=0.05, num_devices=1
  )
  job = dataclasses.replace(job, runs_dir=str(folder.parent), name=folder.name)
  return jobs.prepare(dataclasses.replace(job, **options))


@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite"]])
def test_a_run_that_another_process_works_on(
  options, tmp_path, capsys, data_dir
):
  run = tmp_path / "one"
  prepared(run, data_dir)
  files.at_end.close()
  before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
  with (tmp_path / ".one.lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("process 17 on there")
    file.flush()
    arguments = [*SMALL, f"--runs_dir={tmp_path}", "--name=one", *options]
    line = failing(capsys, demo, *arguments)
  assert "name must not be in use" in line
  assert "process 17 on there" in line
  assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("is_killed", [True, False])
def test_overwriting_keeps_the_run_until_there_is_a_model(
  is_killed, tmp_path, data_dir, capsys
):
  run = tmp_path / "one"
  prepared(run, data_dir)
  checkpoints.save_run(run, "original", {"x": 1})
  files.at_end.close()
  before = (run / "config.json").read_bytes()

  def main():
    prepared(run, data_dir, overwrite=True, seed=5)
    assert not checkpoints.run_checkpoints(run)
    if is_killed:
      # As SIGKILL leaves it: the next process finds what there is.
      shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    raise ValueError("training failed")

  with pytest.raises(SystemExit):
    cli.run(main)
  if is_killed:
    shutil.rmtree(tmp_path)
    tmp_path.with_name("killed").rename(tmp_path)
    with pytest.raises(ValueError, match="which exists"):
      prepared(run, data_dir)
    files.at_end.close()
  assert checkpoints.restore_run(run, "original") == {"x": 1}
  assert (run / "config.json").read_bytes() == before
  assert list(tmp_path.iterdir()) == [run]
  # What has a model stays, and the one of before goes at once.
  context = prepared(run, data_dir, overwrite=True, seed=5)
  jobs.save(context, "original", {"x": 2}, [], 0.0)
  assert not (tmp_path / ".one.replaced").exists()
  files.at_end.close()
  assert checkpoints.restore_run(run, "original") == {"x": 2}
  assert list(tmp_path.iterdir()) == [run]


def test_what_a_kill_left_of_training_goes(tmp_path, data_dir):
  context = prepared(tmp_path / "one", data_dir)
  state = jobs.fresh_state(context, "original")
  checkpoints.save(tmp_path / "one" / "original.partial", state)
  jobs.save(context, "original", state, [], 0.0)
  (tmp_path / "one" / ".original.partial.replaced").mkdir()
  jobs.original(context)
  files.at_end.close()
  assert not list((tmp_path / "one").glob("*.partial*"))


def test_names_with_slashes(tmp_path, data_dir):
  run = tmp_path / "group" / "one"
  context = prepared(tmp_path / "x", data_dir, runs_dir=str(tmp_path))
  files.at_end.close()
  job = dataclasses.replace(context.job, name="group/one")
  jobs.prepare(job)
  files.at_end.close()
  jobs.prepare(dataclasses.replace(job, resume=True))
  files.at_end.close()
  assert cli.read_job(run).name == "one"
  copy = dataclasses.replace(job, name="group/two/three")
  jobs.prepare(copy, source=run)
  files.at_end.close()
  assert (tmp_path / "group/two/three/history.json").is_file()


def test_prepared_sets_are_listed_and_removed(tmp_path, monkeypatch, capsys):
  for name in ("digits", "own_scans", "own_other"):
    folder = tmp_path / f"psg_{name}" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(f'{{"source": "of {name}"}}')
    (folder / "data").write_bytes(b"x" * 3 * 10**6)
  (tmp_path / ".image_folder-half").mkdir()

  def say(*arguments):
    monkeypatch.setattr(
      sys, "argv", ["cache", f"--data_dir={tmp_path}", *arguments]
    )
    programs.run(cache.main)
    return capsys.readouterr().out

  listed = say()
  assert re.search(r"own_scans +3\.0 MB  of own_scans\n", listed)
  assert ".image_folder-half" in listed
  assert "4 sets, 9.0 MB" in listed
  with pytest.raises(SystemExit):
    say("--remove", "own_scans", "none")
  assert "none" in capsys.readouterr().err
  assert (tmp_path / "psg_own_scans").is_dir()
  listed = say("--remove", "own_scans", ".image_folder-half")
  assert "2 sets, 6.0 MB" in listed
  assert sorted(x.name for x in tmp_path.iterdir()) == [
    "psg_digits",
    "psg_own_other",
  ]
