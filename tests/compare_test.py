"""The comparison from end to end on a few digits, and its statistics."""

import csv
import dataclasses
import json
import math
import re

import jax
import numpy as np
import pandas as pd
import pytest

from experiments import cells, compare, contexts, files, jobs, run_folder
from experiments.comparison import recipes, summary, trials, verdicts
from experiments.pages import comparison
from psg_jax import baselines, checkpoints, twins, types
from tests import programs_test
from tests.programs_test import data_dir

__all__ = ["data_dir"]
SMALL = [
  "--num_train=250",
  "--width=0.05",
  "--training.num_epochs=1",
  "--training.learning_rate=0.05",
  "--unlearning.num_epochs=1",
  "--unlearning.num_steps=3",
  "--num_devices=1",
  "--twins=ignore",
]
METHODS = ("psg", "finetune", "neggrad")
ASKED = [
  "--seeds=2",
  "--references=2",
  *("--methods", *METHODS),
  *("--set", "neggrad.learning_rate=1e30", "neggrad.num_epochs=3"),
]
METRICS = (
  *("accuracy_train_forget", "accuracy_test_forget", "accuracy_test_retain"),
  *("agreement_test_forget", "kl_divergence_test_forget", "mia_loss_auc"),
  *("tug_of_war", "run_time_efficiency", "relearn_steps"),
)


def go_on(runs, *arguments):
  """Calls the program on the module's run once more."""
  names = [] if "--metrics" in arguments else ["--metrics", *METRICS]
  programs_test.call(
    compare,
    *(*SMALL, f"--runs_dir={runs}", "--name=one", "--resume"),
    *(*ASKED, *names, *arguments),
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
  """A folder with the run `one`: three methods, one of which diverges."""
  folder = tmp_path_factory.mktemp("runs")
  programs_test.call(
    compare,
    *(*SMALL, f"--runs_dir={folder}", "--name=one", *ASKED),
    *("--metrics", *METRICS),
  )
  return folder


@pytest.fixture
def run_dir(runs):
  return runs / "one"


def read(path):
  return json.loads(path.read_text())


def no_cell(*args, **kwargs):
  raise AssertionError("a finished cell was run again")


def test_run_folder(run_dir):
  cells = {path.name for path in (run_dir / "cells").iterdir()}
  assert cells == {f"{m}-{s}-0" for m in METHODS for s in (2022, 2023)}
  for name in ("config", "data", "request", "compare", "results"):
    assert read(run_dir / f"{name}.json")
  lines = (run_dir / "results.md").read_text().splitlines()
  assert any(line.startswith("| **PSG** |") for line in lines)
  assert any("| 1 of 2 |" in line or "| 2 of 2 |" in line for line in lines)
  for seed in (2022, 2023):
    models = run_dir / "models" / f"seed-{seed}"
    assert set(checkpoints.run_checkpoints(models)) == {
      "original",
      "retrained",
    }
  first, second = (
    checkpoints.restore_run(run_dir / "models" / f"seed-{seed}", "original")
    for seed in (2022, 2023)
  )
  different = jax.tree.map(
    lambda x, y: bool(np.any(x != y)), first["variables"], second["variables"]
  )
  assert different["params"]["head"]["kernel"]
  assert {path.name for path in (run_dir / "figures").iterdir()} >= {
    f"{name}.{kind}"
    for name in ("scatter", "losses", "time")
    for kind in ("png", "pdf")
  }
  names = ("short", "standing", "full", "diagnoses", "methods")
  assert {path.name for path in (run_dir / "tables").iterdir()} >= {
    f"{name}.{kind}" for name in names for kind in ("csv", "md", "tex")
  }
  # What is quoted is the table of the page, but for one head.
  shown = (run_dir / "tables" / "short.md").read_text().splitlines()
  assert shown[0].removeprefix("| Method") == lines[0].removeprefix("| ")
  assert shown[1:] == lines[1 : len(shown)]
  methods = (run_dir / "tables" / "methods.csv").read_text()
  assert "\nPSG psg," in methods
  assert not list(run_dir.rglob("*.partial*"))


def test_cell_is_what_its_logits_say(run_dir):
  counts = read(run_dir / "data.json")["counts"]
  cell = run_dir / "cells" / "finetune-2023-0"
  result = read(cell / "result.json")
  assert result["status"] == "done"
  assert result["seconds"] > 0
  assert result["arguments"]["learning_rate"] == 0.04
  assert result["history"]["num_passes"] == result["arguments"]["num_epochs"]
  assert result["diagnosis"]["verdict"]
  with np.load(cell / "logits.npz") as logits:
    assert {k: len(v) for k, v in logits.items()} == counts
    assert all(v.dtype == np.float32 for v in logits.values())
    predicted = logits["test_forget"].argmax(1)
  # The class to forget is the digit 0.
  figures = result["metrics"]
  assert figures["accuracy_test_forget"]["value"] == np.mean(predicted == 0)
  retrained = np.load(run_dir / "models" / "seed-2023" / "retrained.npz")
  agreement = np.mean(retrained["test_forget"].argmax(1) == predicted)
  np.testing.assert_allclose(
    figures["agreement_test_forget"]["value"], agreement
  )


def test_what_is_missing_says_why(run_dir):
  result = read(run_dir / "cells" / "psg-2022-0" / "result.json")
  assert result["metrics"]["relearn_steps"] == {
    "value": None,
    "reason": "needs model.relearn_accuracy",
  }
  page = (run_dir / "compare.html").read_text()
  assert "needs model.relearn_accuracy" in page


def test_diverged_method(run_dir):
  result = read(run_dir / "cells" / "neggrad-2022-0" / "result.json")
  assert result["status"] == "diverged"
  assert 1 <= result["step"] <= 20
  assert f"step {result['step']}" in result["reason"]
  assert not (run_dir / "cells" / "neggrad-2022-0" / "logits.npz").exists()
  results = read(run_dir / "results.json")
  found = results["summary"]["neggrad"]["tug_of_war"]
  assert (found["mean"], found["count"], found["total"]) == (None, 0, 2)
  assert results["verification"]["neggrad"]["verdict"] == "diverged"
  assert results["verification"]["finetune"]["verdict"] != "diverged"


def test_csv_has_a_row_a_cell_and_metric(run_dir):
  results = read(run_dir / "results.json")
  with open(run_dir / "results.csv", newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["seed"]]
  names = [*METRICS, "seconds", "seconds_without_compiling"]
  assert len(rows) == 2 * (2 + len(METHODS)) * len(names)
  for row in rows:
    # A value or a reason, and never both.
    assert bool(row["value"]) != bool(row["not_available"])
  by_key = {
    (x["model"], x["seed"], x["unlearn_seed"], x["metric"]): x for x in rows
  }
  assert len(by_key) == len(rows)
  psg = [
    float(by_key["psg", seed, "0", "accuracy_test_retain"]["value"])
    for seed in ("2022", "2023")
  ]
  means = results["summary"]["psg"]["accuracy_test_retain"]
  np.testing.assert_allclose(means["mean"], np.mean(psg))
  np.testing.assert_allclose(means["sd"], np.std(psg, ddof=1))
  lost = by_key["neggrad", "2022", "0", "tug_of_war"]
  assert lost["not_available"].startswith("diverged: ")
  assert by_key["retrained", "2022", "", "accuracy_train_forget"]
  first, second = (
    by_key["finetune", seed, "0", "seconds_without_compiling"]
    for seed in ("2022", "2023")
  )
  assert not first["value"]
  assert float(second["value"]) > 0


def test_noise_floor_is_between_retrained_models(run_dir):
  results = read(run_dir / "results.json")
  logits = [
    np.load(run_dir / "models" / f"seed-{seed}" / "retrained.npz")
    for seed in (2022, 2023)
  ]
  first, second = (each["test_forget"].argmax(1) for each in logits)
  found = results["summary"]["retrained"]["agreement_test_forget"]["by_seed"]
  np.testing.assert_allclose(
    list(found.values()), 2 * [np.mean(first == second)]
  )


def test_ours_stops_at_the_target_of_the_request(
  tmp_path, data_dir, monkeypatch
):
  # The original is never above this.
  monkeypatch.setattr(contexts, "target_accuracy", lambda *_: 1.0)
  programs_test.call(
    compare,
    *(*SMALL, f"--runs_dir={tmp_path}", "--name=aimed", "--no-retrained"),
    *("--seeds=1", "--methods", "psg", "--metrics", "accuracy_test_retain"),
  )
  folder = tmp_path / "aimed"
  unlearned = files.read_arrays(folder / "cells/psg-2022-0/logits.npz")
  original = files.read_arrays(folder / "models/seed-2022/original.npz")
  result = read(folder / "cells/psg-2022-0/result.json")
  assert result["target_accuracy"] == 1.0
  for split, values in original.items():
    np.testing.assert_array_equal(unlearned[split], values)


def test_resuming_runs_nothing(runs, run_dir, monkeypatch, capsys):
  before = (run_dir / "results.csv").read_text()
  monkeypatch.setattr(cells, "unlearn", no_cell)
  monkeypatch.setattr(jobs, "original", no_cell)
  monkeypatch.setattr(jobs, "retrained", no_cell)
  go_on(runs)
  assert (run_dir / "results.csv").read_text() == before
  assert not re.search(r"^\[\d", capsys.readouterr().out, re.MULTILINE)


def test_killed_cell_does_not_count(runs, run_dir, monkeypatch, capsys):
  cell = run_dir / "cells" / "finetune-2023-0"
  before = dict(np.load(cell / "logits.npz"))
  (cell / "result.json").unlink()
  write = run_folder.write_json

  def kill(path, content):
    if path.name == "result.json":
      raise KeyboardInterrupt
    write(path, content)

  with monkeypatch.context() as patch:
    patch.setattr(run_folder, "write_json", kill)
    with pytest.raises(SystemExit) as caught:
      go_on(runs)
  assert caught.value.code == 130
  assert not (cell / "result.json").exists()
  capsys.readouterr()
  unlearn, calls = cells.unlearn, []

  def count(context, resolved, *args, **options):
    calls.append(f"{resolved.method}-{context.job.seed}")
    return unlearn(context, resolved, *args, **options)

  monkeypatch.setattr(cells, "unlearn", count)
  go_on(runs)
  assert calls == ["finetune-2023"]
  assert re.search(
    r"^\[6/6\] finetune-2023-0: .* s, accuracy .* test_forget, .* test_retain$",
    capsys.readouterr().out,
    re.MULTILINE,
  )
  assert not list((run_dir / "cells").glob(".*"))
  after = np.load(cell / "logits.npz")
  for name, values in before.items():
    np.testing.assert_array_equal(values, after[name])


def test_metrics_are_added_to_finished_cells(runs, run_dir, monkeypatch):
  monkeypatch.setattr(cells, "unlearn", no_cell)
  go_on(runs, "--metrics", *METRICS, "auroc")
  found = read(run_dir / "cells" / "psg-2022-0" / "result.json")["metrics"]
  assert 0 <= found["auroc"]["value"] <= 1
  assert read(run_dir / "results.json")["summary"]["psg"]["auroc"]["count"] == 2


def test_page(run_dir):
  page = (run_dir / "compare.html").read_text()
  assert "://" not in page
  assert "3 unlearning methods compared on digits" in page
  for title in ("Retrained", "Original", "PSG", "Finetune", "NegGrad"):
    assert title in page
  retrained, original, psg = (
    page.index(f'<th scope="row"{note}>{title}</th>')
    for title, note in (
      ("Retrained", ""),
      ("Original", ""),
      ("PSG", ' title="Nahass et al., TMLR 2025"'),
    )
  )
  assert retrained < original < psg
  assert re.search(r'class="verdict no"[^>]*>diverged<', page)
  assert re.search(r'class="none"[^>]*>not available<', page)
  assert page.count("<svg") >= 6
  assert "is nearest, then" in page
  assert "cross-entropy of the label" in page
  assert "lower the learning rate" in page
  assert "Forget accuracy ≈" in page
  assert "KL, forget ↓" in page


def test_finished_cells_keep_their_arguments(runs, run_dir, capsys):
  before = read(run_dir / "compare.json")
  given = [*SMALL, f"--runs_dir={runs}", "--name=one", "--resume"]
  line = programs_test.failing(
    capsys, compare, *given, "--methods=psg", "--settings=paper"
  )
  assert "settings must be as in the finished cell psg-2022-0, 'd" in line
  line = programs_test.failing(
    capsys, compare, *given, "--methods=finetune", "--set=finetune.num_epochs=9"
  )
  assert "set must be as in the finished cell finetune-2022-0, {}" in line
  line = programs_test.failing(capsys, compare, *given, *ASKED, "--width=0.1")
  assert "width must be as in the run that is resumed" in line
  assert read(run_dir / "compare.json") == before


def test_without_retrained_model_and_two_unlearning_seeds(runs, capsys):
  programs_test.call(
    compare,
    *(*SMALL, f"--runs_dir={runs}", "--name=alone", "--no-retrained"),
    *("--seeds=1", "--unlearn_seeds=2", "--methods=finetune"),
    *("--metrics", *METRICS),
  )
  out = capsys.readouterr().out
  assert "There is no retrained model to measure the methods by" in out
  results = read(runs / "alone" / "results.json")
  cells = {path.name for path in (runs / "alone" / "cells").iterdir()}
  assert cells == {"finetune-2022-0", "finetune-2022-1"}
  first, second = (
    np.load(runs / "alone" / "cells" / name / "logits.npz")["test_retain"]
    for name in sorted(cells)
  )
  assert np.any(first != second)
  found = results["summary"]["finetune"]
  assert found["accuracy_test_retain"]["count"] == 2
  assert found["tug_of_war"]["mean"] is None
  assert "needs retrained.logits" in found["tug_of_war"]["reason"]
  assert results["verification"]["finetune"]["verdict"] == "cannot tell"
  assert "retrained" not in results["summary"]


def test_cells_of_other_defaults_are_not_mixed_in(runs, monkeypatch, capsys):
  other = recipes.Recipe(default=recipes.Rates(0.5))
  monkeypatch.setitem(recipes.RECIPES, "finetune", other)
  with pytest.raises(SystemExit) as caught:
    go_on(runs)
  assert caught.value.code == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert re.search(r"of finetune must be as in its finished cell", line), line


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--methods=scrubb"], "methods .* 'scrubb', did you mean 'scrub'"),
    (["--metrics=tug_of_wars"], "metrics .* did you mean 'tug_of_war'"),
    (["--metrics"], "metrics must name at least one"),
    (["--seeds=0"], "seeds .* got 0"),
    (["--unlearn_seeds=0"], "unlearn_seeds .* got 0"),
    (["--settings=papers"], "papers"),
    (["--recipe=digit"], "did you mean 'digits'"),
    (["--set=psg"], "set must be METHOD.ARGUMENT=VALUE, got 'psg'"),
    (["--set=ssd.dampning=2"], "of ssd .* did you mean 'dampening'"),
    (["--set=finetune.learning_rate=0"], "learning_rate .* positive"),
    (["--set=finetune.num_epochs=1.5"], "num_epochs .* got 1.5"),
    (["--set=finetune.mesh=1"], "argument in set of finetune .* 'mesh'"),
    (["--methods=psg", "--set=ssd.dampening=2"], "of a method compared"),
    (["--num_train=99999"], "num_train must be at most"),
    (["--weights=none.pt"], "seeds must be 1 with weights"),
    (["--helpp"], "helpp"),
  ],
)
def test_bad_options(arguments, message, tmp_path, capsys, data_dir):
  folder = tmp_path / "runs"
  line = programs_test.failing(
    capsys, compare, f"--runs_dir={folder}", *arguments
  )
  assert re.search(message, line), line
  assert line.startswith("error: ")
  assert not folder.exists()


def test_run_of_another_program_is_not_resumed(tmp_path, capsys, data_dir):
  (tmp_path / "other" / "checkpoints").mkdir(parents=True)
  line = programs_test.failing(
    capsys, compare, f"--runs_dir={tmp_path}", "--name=other", "--resume"
  )
  assert "name must be that of a comparison" in line


@pytest.fixture(scope="module")
def context(tmp_path_factory, data_dir):
  options = compare.Options(
    runs_dir=str(tmp_path_factory.mktemp("recipes")),
    num_train=400,
    width=0.05,
    num_devices=1,
    twins="ignore",
  )
  return jobs.prepare(options)


@pytest.mark.parametrize("settings", recipes.SETTINGS)
def test_methods_take_their_arguments(settings, context):
  assert set(recipes.RECIPES) == set(baselines.METHODS)
  for name, method in baselines.METHODS.items():
    found = recipes.resolve(name, context, settings=settings)
    json.dumps(found.record)
    assert set(found.arguments) <= set(baselines.parameters(name))
    assert all(
      set(need.split()) & set(found.arguments) or name == "scrub_r"
      for need in method.needs
    )


def test_all_methods_augment_as_training_does(context):
  def augment_fn(name, changed):
    return recipes.resolve(name, changed).arguments.get("augment_fn")

  def changed(part, **options):
    old = getattr(context.job, part)
    job = dataclasses.replace(
      context.job, **{part: dataclasses.replace(old, **options)}
    )
    return context._replace(job=job)

  flip = jobs.augment_fn("flip")
  flipped = changed("training", augmentation="flip")
  for name in ("psg", "psg_hard", "psg_soft", "eu_k", "scrub", "retrain"):
    assert augment_fn(name, context) is None
    assert augment_fn(name, flipped) is flip
  # As the released code has it, whatever the model was trained with.
  assert augment_fn("psg_released", flipped) is None
  # An own choice of the update stands before that of training.
  own = changed("unlearning", augmentation="flip")
  assert augment_fn("psg", own) is flip
  assert augment_fn("eu_k", own) is None
  # Of a model that was brought along none is known, and retraining has its own.
  job = dataclasses.replace(flipped.job, weights="model.pt")
  brought = context._replace(job=job)
  assert augment_fn("psg", brought) is augment_fn("eu_k", brought) is None
  assert augment_fn("retrain", brought) is flip
  # Finished cells say it, and how many passes there were.
  for changed_job, name in ((flipped, "flip"), (context, "none")):
    for method in ("psg", "eu_k", "retrain"):
      record = recipes.resolve(method, changed_job).record
      assert record["augmentation"] == name
  passes = recipes.resolve("psg", context).record["num_epochs"]
  assert passes == math.ceil(240 / math.ceil(41 / 4))
  others = recipes.resolve("psg", context, overrides={"num_layers": 0}).record
  assert (others["num_epochs"], others["batch_size"]) == (20, 8)


def test_soft_labels_keep_the_old_class_unless_all_of_it_is_forgotten(context):
  found = recipes.resolve("psg_soft", context)
  assert found.record["labels"] == "soft_other"
  assert found.note is None
  forgotten, retained = context.split
  half = types.Split(
    forgotten.take(np.arange(len(forgotten) // 2)),
    twins.concatenate(
      forgotten.take(np.arange(len(forgotten) // 2, len(forgotten))), retained
    ),
  )
  part = context._replace(selection=context.selection._replace(split=half))
  found = recipes.resolve("psg_soft", part)
  assert (found.record["labels"], found.record["retain_labels"]) == (
    "soft",
    "hard",
  )
  assert found.arguments["target_accuracy"] is None
  # PSG itself stops at the accuracy on unseen images, and says which.
  found = recipes.resolve("psg", part)
  assert "target_accuracy" not in found.arguments
  assert found.record["target"] == "auto"
  held = contexts.validation(part)[1]
  assert found.note == (
    f"stops at the original's accuracy on {len(held)} images of test_forget"
    " that are set apart and in no figure"
  )
  options = dataclasses.replace(part.job.unlearning, target="proxy")
  part = part._replace(job=dataclasses.replace(part.job, unlearning=options))
  held = contexts.validation(part)[1]
  assert recipes.resolve("psg", part).note == (
    f"stops at the accuracy that proxies expect, corrected by {len(held)}"
    " images of test_retain that are set apart and in no figure"
  )


def test_budget_is_that_of_psg(context):
  num_forget, num_retain = len(context.split.forget), len(context.split.retain)
  assert (num_forget, num_retain) == (41, 359)
  # 120 steps of 8 forget and 24 retain images: 3840.
  expected = {
    "finetune": 11,  # 3840 / 359
    "neggrad": 5,  # 3840 / 718
    "random_labels": 10,  # 3840 / 400
    "bad_teacher": 26,  # 3840 / (41 + 108)
    "boundary_shrink": 3,
  }
  found = {
    name: recipes.resolve(name, context).arguments["num_epochs"]
    for name in expected
  }
  assert found == expected
  # Two passes of 8 + 24 over 1,000 images, where last layers alone are moved.
  split = context.split
  many = split.forget.take(np.arange(1000) % num_forget)
  many = dataclasses.replace(many, ids=np.arange(1000).astype(str))
  selection = context.selection._replace(split=split._replace(forget=many))
  large = context._replace(selection=selection)
  for num_layers, images in ((None, 8000), (0, 4000)):
    options = dataclasses.replace(context.job.unlearning, num_layers=num_layers)
    job = dataclasses.replace(context.job, unlearning=options)
    changed = large._replace(job=job)
    finetune = recipes.resolve("finetune", changed)
    assert finetune.arguments["num_epochs"] == round(images / 359)
    # Twice those passes are what a search tries last.
    last = trials.planned("psg", changed, 6)[5]
    assert last.overrides["num_epochs"] == 2 * images // 4000
    # Of hard labels all layers are moved.
    hard = trials.planned("psg_hard", changed, 6)[5]
    assert hard.overrides["num_epochs"] == 2
  paper = recipes.resolve("finetune", context, settings="paper")
  assert "num_epochs" not in paper.arguments


def test_arguments_can_be_set(context):
  given = recipes.parse(
    ["scrub.num_epochs=2", "scrub.momentum=0.5", "ssd.reference=all"]
  )
  assert given == {
    "scrub": {"num_epochs": 2, "momentum": 0.5},
    "ssd": {"reference": "all"},
  }
  found = recipes.resolve("scrub", context, overrides=given["scrub"])
  assert found.arguments["num_epochs"] == 2
  assert "momentum" not in found.arguments
  assert found.record["momentum"] == 0.5
  plain = recipes.resolve("scrub", context)
  assert plain.arguments["optimizer"] is not found.arguments["optimizer"]
  again = recipes.resolve("scrub", context, overrides=given["scrub"])
  assert again.arguments["optimizer"] is found.arguments["optimizer"]


def test_rewinding_by_what_is_known(context):
  found = recipes.resolve("scrub_r", context)
  assert found.arguments["reference_error"] == 1.0
  assert found.note is None
  part = context.selection.split
  rows = np.arange(len(part.forget)) < 20
  split = part._replace(
    forget=part.forget.take(rows),
    retain=dataclasses.replace(
      part.retain,
      labels=np.where(np.arange(len(part.retain)) < 9, 0, part.retain.labels),
    ),
  )
  mixed = context._replace(selection=context.selection._replace(split=split))
  assert not contexts.is_class_request(mixed)
  found = recipes.resolve("scrub_r", mixed)
  # Images that are in no figure, as those that PSG stops by.
  held = contexts.validation(mixed)[1]
  words = (
    f"{len(held)} images of test_forget that are set apart and in no figure"
  )
  np.testing.assert_array_equal(
    found.arguments["validation"].labels, held.labels
  )
  assert found.note == f"chooses its pass by {words}"
  found = recipes.resolve("regun", mixed)
  assert len(found.arguments["held_out"]) == len(held)
  assert found.note == f"takes its references from {words}"
  # Of a whole class there are none set apart.
  found = recipes.resolve("regun", context)
  shown = context.parts["test_forget"]
  assert len(found.arguments["held_out"]) == len(shown)
  assert found.note.endswith("test_forget: no validation images are set apart")
  assert "held_out" not in recipes.names("regun")


def rows_of(**values):
  """Rows with the metric `m`, from values `[seeds][unlearning seeds]`."""
  return [
    {
      "model": model,
      "seed": seed,
      "unlearn_seed": each,
      "metrics": {
        "m": {"value": value, **({} if value is not None else {"reason": "no"})}
      },
    }
    for model, by_seed in values.items()
    for seed, inner in enumerate(by_seed)
    for each, value in enumerate(inner)
  ]


def means_of(rows):
  return summary.summarise(summary.tidy(rows))


def test_means_over_seeds():
  found = means_of(
    rows_of(a=[[1.0, 3.0], [5.0, 7.0]], b=[[1.0, 3.0]], c=[[None], [4.0]])
  )
  a, b, c = (found[name]["m"] for name in "abc")
  # Unlearning seeds are averaged first: 2 and 6.
  assert (a["mean"], a["count"]) == (4.0, 4)
  np.testing.assert_allclose(a["sd"], math.sqrt(8))
  np.testing.assert_allclose(b["sd"], math.sqrt(2))
  assert (c["mean"], c["sd"], c["count"], c["total"]) == (4.0, None, 1, 2)
  assert c["reason"] == "no"


def test_interval_of_student():
  # t(0.95, 2) = 2.9200; the standard error is 1 / sqrt(3).
  low, high = summary.interval([1.0, 2.0, 3.0])
  np.testing.assert_allclose(
    [low, high], [2 - 2.92 / math.sqrt(3), 2 + 2.92 / math.sqrt(3)], atol=1e-4
  )
  assert summary.interval([1.0]) is None


@pytest.mark.parametrize(
  ("direction", "expected"),
  [("up", []), ("down", ["c"]), ("as_retrained", ["a"])],
)
def test_best_where_the_interval_decides(direction, expected):
  means = means_of(
    rows_of(
      retrained=[[0.80], [0.90], [0.99]],
      # Exact unlearning is what the others are measured by.
      retrain=[[0.80], [0.90], [0.99]],
      # Of the same seed `a` is next to the retrained model, `b` is not, though
      # their means are the same.
      a=[[0.81], [0.90], [0.98]],
      b=[[0.99], [0.80], [0.90]],
      c=[[0.10], [0.11], [0.10]],
    )
  )
  losses = summary.losses(means, "m", direction, "retrained")
  assert set(losses.index) == {"a", "b", "c"}
  if direction == "as_retrained":
    np.testing.assert_allclose(losses.loc["b", "0"], 0.19)
  assert summary.best(losses) == expected


def test_ties_and_single_seeds():
  def best(**losses):
    return summary.best(pd.DataFrame.from_dict(losses, orient="index"))

  tied = {"a": [0.0, 0.0], "b": [0.0, 0.0]}
  assert best(**tied) == []
  assert best(**tied, c=[1.0, 1.1]) == ["a", "b"]
  assert best(**tied, c=[1.0, -0.5]) == []
  assert best(a=[1.0], b=[9.0]) == []


def test_nearest_to_the_retrained_model():
  rows = rows_of(far=[[2.0], [2.1], [2.2]], near=[[1.0], [1.2], [1.1]])
  for row in rows:
    row["metrics"] = {"kl_divergence_test_forget": row["metrics"]["m"]}
  means = means_of(rows)
  found = summary.nearest(means, "kl_divergence", is_share=False)
  assert [each["method"] for each in found["methods"]] == ["near", "far"]
  assert found["is_decided"]
  # Differences 1.0, 0.9, 1.1: mean 1, standard error 0.1 / sqrt(3).
  half = 2.92 * 0.1 / math.sqrt(3)
  np.testing.assert_allclose(found["gap"], [1 - half, 1 + half], atol=1e-4)
  assert summary.nearest(means, "agreement", is_share=True) is None


def test_standing_by_distance_to_the_retrained_model():
  def rows(model, values):
    return [
      {
        "model": model,
        "seed": seed,
        "unlearn_seed": 0,
        "metrics": {
          "kl_divergence_test_forget": {"value": value},
          "mia_loss_auc": {"value": 0.5 + value / 10},
        },
      }
      for seed, value in enumerate(values)
    ]

  names = ("kl_divergence_test_forget", "mia_loss_auc")
  found = means_of(
    [
      *rows("retrained", [0.0, 0.0, 0.0]),
      *rows("psg", [0.5, 0.6, 0.55]),
      *rows("near", [0.4, 0.7, 0.5]),
      *rows("far", [2.0, 2.1, 2.05]),
      *rows("retrain", [0.1, 0.1, 0.1]),
    ]
  )
  info = {
    names[0]: {"direction": "down", "ideal": 0.0},
    names[1]: {"direction": "as_retrained", "ideal": 0.5},
  }
  for name, each in zip(
    names, summary.standing(found, "psg", info), strict=True
  ):
    assert each["metric"] == name
    # Exact unlearning is not placed.
    assert (each["rank"], each["num_methods"]) == (2, 3)
    assert each["first"] == "near"
    # +0.1, -0.1 and +0.05: which of them is nearer, three seeds do not say.
    assert each["is_within"]
  far = summary.standing(found, "far", info)[0]
  assert (far["rank"], far["is_within"]) == (3, False)
  # The differences 1.6, 1.4 and 1.55, by hand: mean 1.5167, sd 0.1041, t 2.92.
  np.testing.assert_allclose(far["gap"], [1.3412, 1.6921], atol=1e-3)
  assert summary.standing(found, "near", info)[0]["rank"] == 1
  assert summary.standing(found, "near", {}) == []


def test_markdown_rows_have_as_many_cells_as_the_head():
  results = {
    "standing": {
      "psg": [
        {
          "method": "psg",
          "metric": "kl",
          "rank": 2,
          "num_methods": 3,
          "first": "psg",
          "gap": [0.1, 0.2],
          "is_within": False,
        }
      ]
    },
    "titles": {"psg": "PSG"},
    "methods": {"psg": {"title": "PSG", "paper": ""}},
    "metrics": {"kl": {"title": "KL(retrained || model)", "direction": "down"}},
    "summary": {},
    "verification": {},
    "nearest": [],
    "best": {},
  }
  lines = comparison.markdown(results).splitlines()
  row = next(x for x in lines if "KL(retrained" in x).replace("\\|", "")
  assert row.count("|") == lines[lines.index("|---|---|---|---|---|")].count(
    "|"
  )


def test_verdict():
  rng = np.random.default_rng(0)
  labels = {split: np.zeros(400, int) for split in summary.SPLITS}
  right, wrong = np.array([3.0, 0.0]), np.array([0.0, 3.0])

  def models(logits, count):
    noise = 0.01 * rng.normal(size=(count, 400, 2))
    return dict.fromkeys(labels, logits + noise)

  retrained = models(right, 3)

  def verify(logits, num_diverged=0, num_cells=3):
    unlearned = {
      split: {seed: each[None] for seed, each in enumerate(values)}
      for split, values in models(logits, 3).items()
    }
    held = verdicts.Logits(retrained, {"a": unlearned}, labels, None)
    lost = num_diverged * [{"status": cells.DIVERGED}]
    done = (num_cells - num_diverged) * [{"status": cells.DONE}]
    return verdicts.verify(held, "a", [*lost, *done])

  assert verify(right)["verdict"] == "equivalent"
  found = verify(wrong)
  assert found["verdict"] == "not equivalent"
  assert any(
    re.match(r"accuracy of test_forget: -1.000 \[", x) for x in found["against"]
  )
  some = verify(right, num_diverged=1, num_cells=4)
  assert some["verdict"] == "cannot tell"
  assert "1 of 4 runs diverged" in some["reasons"][0]
  assert verify(right, num_diverged=3)["verdict"] == "diverged"


@pytest.mark.parametrize(
  ("name", "mean", "sd", "text"),
  [
    ("accuracy_test_forget", 0.1234, 0.01, "12.3 ± 1.0%"),
    ("accuracy_test_forget", 0.0, None, "0.0%"),
    ("kl_divergence_test_forget", 0.12345, 0.002, "0.123 ± 0.002"),
    ("seconds", 3.21, 0.14, "3.2 ± 0.1 s"),
    ("run_time_efficiency", 12.34, None, "12.34"),
    ("tug_of_war", None, None, None),
  ],
)
def test_figures_as_text(name, mean, sd, text):
  figure = {"mean": mean, "sd": sd}
  assert comparison.mean_sd(name, figure) == text
