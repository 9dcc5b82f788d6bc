"""The search for methods' settings, from end to end on a few digits."""

import csv
import math
import re
import shlex

import numpy as np
import pytest

from experiments import cells, compare, jobs, tune, tune_methods
from experiments.comparison import recipes, trials
from psg_jax import baselines, training
from tests import compare_test, programs_test
from tests.programs_test import data_dir

__all__ = ["data_dir"]
REQUEST = ("--recipe=digits", "--forget-classes", "1")
COMMAND = (*compare_test.SMALL, *REQUEST, "--part=unlearning", "--seeds=1")


def search(folder, *arguments):
  programs_test.call(
    tune, *COMMAND, f"--runs_dir={folder}", "--name=one", *arguments
  )


def table(folder):
  with open(folder / "one" / "trials.csv", newline="") as file:
    return list(csv.DictReader(file))


def row(method, forget, retain, *, seed=100, status=cells.DONE, **overrides):
  figures = dict.fromkeys(trials.FIGURES, 0.5)
  figures |= {"normalised_forget": forget, "normalised_retain": retain}
  trial = trials.Trial.of(method, overrides)
  if status != cells.DONE:
    figures = {}
  return trials.Row(trial, seed, 3, "abc", status, figures)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
  options = compare.Options(
    runs_dir=str(tmp_path_factory.mktemp("runs")),
    num_train=400,
    width=0.05,
    num_devices=1,
    twins="ignore",
    forget_classes=(1,),
    fraction=0.5,
    seed=100,
  )
  return jobs.prepare(options)


@pytest.fixture(scope="module")
def context(whole):
  return tune_methods.held_out(whole)


@pytest.mark.slow
def test_trials_are_kept_and_models_trained_once(
  tmp_path, data_dir, monkeypatch, capsys
):
  asked = ("--trials=2", "--methods", "bias_shift", "finetune")
  search(tmp_path, *asked, "--grid", "finetune.learning_rate=1e30,0.01")
  before = table(tmp_path)
  assert [(x["method"], x["status"]) for x in before] == [
    ("bias_shift", "done"),
    ("bias_shift", "done"),
    ("finetune", "diverged"),
    ("finetune", "done"),
  ]
  assert {(x["budget"], x["seed"]) for x in before} == {("2", "2022")}
  assert before[2]["normalised_forget"] == ""
  good = before[3]
  assert float(good["seconds"]) > 0
  assert float(good["normalised_forget"]) > 0
  # No class that is shut off is predicted.
  assert float(before[0]["forget_accuracy"]) == 0
  said = capsys.readouterr().out
  assert "finetune (learning_rate 0.01)" in said.partition("The others")[0]
  assert "finetune.learning_rate=0.01\n" in said
  models = tmp_path / "one" / "validation" / "models" / "seed-2022"
  assert {x.name for x in (models / "checkpoints").iterdir()} >= {
    *("original", "retrained", "retrained-1")
  }

  monkeypatch.setattr(training, "fit", compare_test.no_cell)
  methods = ("--methods", "ssd", "bias_shift", "eu_k")
  search(tmp_path, "--trials=2", *methods, "--grid", "eu_k.num_epochs=1")
  after = table(tmp_path)
  assert after[:4] == before
  assert [x["method"] for x in after[4:]] == ["ssd", "ssd", "eu_k"]
  assert "finetune" not in capsys.readouterr().out
  # Two have been tried, and two others are planned.
  line = programs_test.failing(
    *(capsys, tune, *COMMAND, f"--runs_dir={tmp_path}", "--name=one"),
    *("--trials=2", "--methods", "finetune"),
  )
  assert "trials must be at least the 4 that finetune has" in line
  # Other models would be mixed in.
  line = programs_test.failing(
    *(capsys, tune, *COMMAND, f"--runs_dir={tmp_path}", "--name=one"),
    *("--trials=2", "--methods=ssd", "--references=3"),
  )
  assert "table must be of this job" in line


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--methods", "scrubb"], "methods must be .* did you mean 'scrub'"),
    (["--trials=0"], "trials must be an integer of at least 1, got 0"),
    (["--trials=11"], "trials must be at most 10 without a grid, got 11"),
    (["--references=1"], "references must be an integer of at least 2"),
    (["--grid=psg"], "grid must be METHOD.ARGUMENT=V1,V2,..., got 'psg'"),
    (["--grid=pgs.num_epochs=1"], "did you mean 'psg'"),
    (["--grid=psg.num_epoch=1"], "grid: .* did you mean 'num_epochs'"),
    (["--grid=psg.learning_rate=0.1,-1"], "grid: psg.learning_rate .* -1"),
    (["--grid=psg.learning_rate=0.1,"], "grid must hold values .* got 'psg"),
    (
      ["--methods=ssd", "--grid=psg.num_epochs=1"],
      "grid must be of a method tried, got 'psg'",
    ),
    (
      ["--trials=3", "--grid", "psg.num_epochs=1,2", "psg.learning_rate=1,2"],
      "at most the 3 trials that each method has, got 4 of psg",
    ),
    (["--rates=0.1"], "rates must not be given with part unlearning"),
    (["--forget-classes=0"], "forget_classes must ask for other images"),
    (["--seed=5"], "seed must leave out those of the published tables"),
    (["--seed=0"], "got 0 to 1"),
    (["--weights=model.pt"], "weights must"),
  ],
)
def test_bad_options(arguments, message, tmp_path, capsys, data_dir):
  line = programs_test.failing(
    capsys, tune, *COMMAND, f"--runs_dir={tmp_path}", *arguments
  )
  assert re.search(message, line), line
  assert not list(tmp_path.rglob("trials.csv"))
  assert not list(tmp_path.rglob("models"))


def test_methods_are_of_unlearning_alone(capsys, data_dir):
  line = programs_test.failing(capsys, tune, "--methods", "psg")
  assert "methods must not be given with part training, got ('psg',)" in line


def test_a_fifth_is_held_out_and_no_test_image_is_seen(whole, context):
  ids = {name: set(x.ids) for name, x in context.parts.items()}
  assert set().union(*ids.values()) <= set(whole.train.ids)
  assert len(context.train) == len(whole.train) - len(context.test)
  assert len(context.test) == pytest.approx(0.2 * len(whole.train), abs=5)
  assert not set(context.train.ids) & set(context.test.ids)
  # Half of the class, so far as it is in the four fifths.
  asked = set(whole.split.forget.ids)
  assert ids["train_forget"] == asked & set(context.train.ids)
  is_one = context.test.labels == 1
  assert set(context.selection.test_split.forget.ids) == set(
    np.asarray(context.test.ids)[is_one]
  )
  assert not context.selection.is_class_request


def test_every_method_has_as_many_trials(context):
  for method in baselines.METHODS:
    planned = trials.planned(method, context, 6)
    count = 1 if method == "retrain" else 6
    assert len(set(planned)) == count, method
    assert trials.planned(method, context, 3) == planned[:3]
    record = recipes.resolve(method, context).record
    parameters = baselines.parameters(method)
    for name, value in planned[0].overrides.items():
      assert value == record.get(name, parameters.get(name)), method
    for trial in planned:
      given = [shlex.split(option)[0] for option in trial.options]
      assert recipes.parse(given).get(method, {}) == trial.overrides


def test_rates_and_passes_of_the_plan(context):
  rate = recipes.RECIPES["scrub"].default.learning_rate
  planned = [x.overrides for x in trials.planned("scrub", context, 6)]
  assert [x["learning_rate"] for x in planned] == pytest.approx(
    [rate, rate / 3, 3 * rate, rate / 10, 10 * rate, rate]
  )
  passes = recipes.resolve("scrub", context).record["num_epochs"]
  assert planned[5]["num_epochs"] == 2 * passes
  assert not any("num_epochs" in x for x in planned[:5])
  # Where the passes follow from the forget set.
  num_batches = math.ceil(len(context.split.forget) / 8)
  last = trials.planned("psg", context, 6)[5].overrides
  assert last["num_epochs"] == 2 * math.ceil(120 / num_batches)
  ssd = trials.planned("ssd", context, 3)[2]
  assert ssd.overrides == {"selection_weight": 30.0}


def test_a_grid_is_a_product():
  given = ["psg.num_epochs=1,2", "psg.labels=hard", "psg.learning_rate=1e-3,1"]
  grid = trials.read_grid(given, ("psg", "ssd"), 4)
  assert list(grid) == ["psg"]
  assert [x.overrides for x in grid["psg"]] == [
    {"num_epochs": passes, "labels": "hard", "learning_rate": rate}
    for passes in (1, 2)
    for rate in (1e-3, 1)
  ]


def test_figures_of_two_references():
  half, more = np.log([[0.5, 0.5]]), np.log([[0.8, 0.2]])
  parts = tune_methods.PARTS
  references = [dict.fromkeys(parts, half), dict.fromkeys(parts, more)]
  labels = dict.fromkeys(parts, np.array([1]))
  logits = {parts[0]: np.log([[0.2, 0.8]]), parts[1]: more}
  figures = tune_methods.measure(logits, references, labels)
  # Of one another: KL 0.2231 and 0.1927 nats.
  assert figures == pytest.approx(
    {
      "forget_accuracy": 1.0,
      "retain_accuracy": 0.0,
      # (0.2231 + 0.8318) / 2 over 0.2079, and (0.2231 + 0) / 2 over it.
      "normalised_forget": 2.5364,
      "normalised_retain": 0.5366,
      # Ties go to the first class.
      "agreement": 0.0,
      "reference_agreement": 1.0,
    },
    abs=1e-3,
  )


def test_the_nearest_by_the_larger_distance_is_taken():
  rows = [
    # The lowest sum, and means over seeds that hide a bad one.
    row("scrub", 0.1, 3.0, learning_rate=0.1),
    row("scrub", 3.0, 0.1, learning_rate=0.1, seed=101),
    row("scrub", 2.0, 2.0, learning_rate=0.2),
    row("scrub", 2.5, 2.0, learning_rate=0.2, seed=101),
    # The nearest, but for a seed that is lost.
    row("scrub", 1.0, 1.0, learning_rate=0.3),
    row("scrub", 1.0, 1.0, learning_rate=0.3, seed=101, status=cells.DIVERGED),
    row("psg", 1.0, 2.0, labels="hard"),
    row("ssd", 1.0, 1.0, dampening=2.0, status=cells.DIVERGED),
    row("retrain", 1.0, 1.0),
  ]
  lines = trials.summary(rows).splitlines()
  assert lines[1].startswith(
    "scrub (learning_rate 0.2): larger distance 2.250, forget_accuracy 0.500"
  )
  assert [line.split(" (")[0] for line in lines[2:4]] == ["psg", "retrain"]
  assert lines[4:6] == [
    "ssd: no trial to take, a seed of each diverged",
    "--set scrub.learning_rate=0.2 psg.labels=hard",
  ]
  assert [line.partition(":")[0] for line in lines[6:]] == [
    "The others",
    "scrub (learning_rate 0.1)",
    "scrub (learning_rate 0.3)",
    "ssd (dampening 2.0)",
  ]
  assert lines[8].endswith("1 of 2 seeds diverged")


def test_tables_are_read_as_they_were_written(tmp_path):
  rows = [
    row("psg", 1.25, 2.0, labels="hard", learning_rate=1e-3),
    row("ssd", 1.0, 1.0, status=cells.DIVERGED),
  ]
  path = tmp_path / "trials.csv"
  assert trials.read(path, "abc") == []
  path.write_text(trials.to_csv(rows))
  assert trials.read(path, "abc") == rows
  with pytest.raises(ValueError, match="table must be of this job, abd"):
    trials.read(path, "abd")
  path.write_text(trials.to_csv(rows).replace("1.25", "near"))
  with pytest.raises(ValueError, match="table must hold numbers"):
    trials.read(path, "abc")
  path.write_text("a,b\n1,2\n")
  with pytest.raises(ValueError, match="table must have the columns"):
    trials.read(path, "abc")


def test_no_method_has_more_trials_than_others():
  rows = [row("psg", 1, 1, num_epochs=x) for x in (1, 2, 3)]
  known, other = rows[0].trial, trials.Trial.of("psg", {"num_epochs": 4})
  trials.check_budget(rows, [known], 3)
  trials.check_budget(rows, [other], 4)
  with pytest.raises(ValueError, match="at least the 4 that psg has in the"):
    trials.check_budget(rows, [other], 3)
  # Another method's trials are no matter.
  trials.check_budget(rows, [trials.Trial.of("ssd", {})], 1)
