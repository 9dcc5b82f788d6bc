"""The programs from end to end, on a few of the embedded digits."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments import (
  cli,
  demo,
  evaluation_benchmark,
  jobs,
  recipes,
  report,
  train,
  unlearn,
)
from psg_jax import checkpoints, data, metrics, torch_weights

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
  patch = pytest.MonkeyPatch()
  patch.setenv("PSG_JAX_DATA", str(folder))
  data.load("digits", "test")
  yield folder
  patch.undo()


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
    *jobs.MODELS,
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
  assert jobs.has_same_request(folder, job)
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
  job = dataclasses.replace(cli.read_job(runs / "first"), resume=True)
  context = jobs.prepare(job, is_known_run=True, is_read_only=True)
  reference = context.of("retrained").model
  assert reference is context.of("retrained-2").model is not context.model
  assert context.of("unlearned").model is context.model
  expected = data.mean_and_std(context.split.retain)
  assert jobs.standardisation(job, context.split.retain) == expected
  assert expected != data.mean_and_std(context.train)
  # A recipe's own numbers are everyone's.
  fixed = dataclasses.replace(job, mean=(0.5,), std=(0.5,))
  assert jobs._model(fixed, context.train) is jobs._model(
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
  found = jobs._warnings(result, labels)
  assert found["original"] == found["retrained"] == []
  chance, lost = found["unlearned"]
  assert "right on 0.575 of the test_retain images, no more than" in chance
  assert "(0.600)" in chance
  assert "test_retain fell from 0.871 to 0.575" in lost
  fine = {**result, "unlearned": figures(0.7, 0.85)}
  assert jobs._warnings(fine, labels)["unlearned"] == []
  untrained = {"original": figures(0.5, 0.6)}
  assert len(jobs._warnings(untrained, labels)["original"]) == 1


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
  assert len(safetensors_numpy.load_file(exported)) == 8 * 6 + 2


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


@pytest.mark.parametrize("program", ["train", "unlearn", "demo", "report"])
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
    (["--unlearning.top_k=3"], "top_k must be None with hard labels, got 3"),
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
    model=jobs.models.create(
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
