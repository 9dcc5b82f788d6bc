"""The yardstick of a comparison and of a run, from end to end."""

import csv
import re

import numpy as np
import pytest

from experiments import (
  cells,
  compare,
  contexts,
  demo,
  jobs,
  run_figures,
  unlearn,
)
from experiments.pages import comparison
from psg_jax import checkpoints, metrics
from tests import compare_test, programs_test
from tests.compare_test import SMALL, data_dir, read

__all__ = ["data_dir"]
METRICS = ("--metrics", "accuracy_test_retain", "mia_loss_auc")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, data_dir):
  """A comparison with as many references as seeds, as they once all were."""
  folder = tmp_path_factory.mktemp("runs")
  given = [*SMALL, f"--runs_dir={folder}", "--name=one", "--methods=finetune"]
  programs_test.call(compare, *given, *METRICS, "--seeds=1", "--references=1")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cells, "unlearn", compare_test.no_cell)
    patch.setattr(jobs, "original", compare_test.no_cell)
    programs_test.call(
      compare, *given, *METRICS, "--seeds=1", "--references=3", "--resume"
    )
  return folder / "one"


@pytest.mark.slow
def test_references_are_added_to_a_finished_run(run_dir):
  assert read(run_dir / "compare.json")["references"] == 3
  for seed in (2023, 2024):
    models = run_dir / "models" / f"seed-{seed}"
    assert set(checkpoints.run_checkpoints(models)) == {"retrained"}
  found = read(run_dir / "results.json")
  assert list(found["summary"]["retrained"]["mia_loss_auc"]["by_seed"]) == [
    "2022",
    "2023",
    "2024",
  ]
  assert found["yardstick"]["false_alarms"]["total"] == 3


def test_normalised_distance_is_that_of_the_logits(run_dir):
  found = read(run_dir / "results.json")["yardstick"]["models"]
  retrained = [
    np.load(run_dir / "models" / f"seed-{seed}" / "retrained.npz")[
      "test_retain"
    ]
    for seed in (2022, 2023, 2024)
  ]
  cell = run_dir / "cells" / "finetune-2022-0" / "logits.npz"
  ours = np.load(cell)["test_retain"]
  floor = np.mean(
    [
      metrics.kl_divergence(retrained[i], retrained[j])
      for i in range(3)
      for j in range(3)
      if i != j
    ]
  )
  far = np.mean([metrics.kl_divergence(x, ours) for x in retrained])
  expected = far / floor
  (each,) = (
    x
    for x in found["finetune"]["distances"]
    if (x["name"], x["split"]) == ("kl_divergence", "test_retain")
  )
  assert each["value"] == pytest.approx(expected)
  assert each["interval"][0] < each["value"] < each["interval"][1]
  (own,) = (
    x
    for x in found["retrained"]["distances"]
    if (x["name"], x["split"]) == ("kl_divergence", "test_retain")
  )
  assert own["value"] == 1
  assert np.mean(own["references"]) == pytest.approx(1)


def test_yardstick_leads_the_tables(run_dir):
  results = read(run_dir / "results.json")
  with open(run_dir / "results.csv", newline="") as file:
    rows = [row for row in csv.DictReader(file) if not row["seed"]]
  assert {row["model"] for row in rows} == {"retrained", "original", "finetune"}
  for row in rows:
    assert bool(row["value"]) != bool(row["not_available"])
  by_key = {(row["model"], row["metric"]): row["value"] for row in rows}
  name = "normalised_kl_divergence_test_forget"
  assert float(by_key["retrained", name]) == 1
  assert float(by_key["finetune", f"{name}_low"]) <= float(
    by_key["finetune", name]
  )
  header = (run_dir / "results.md").read_text().splitlines()[0]
  titles = [title.strip() for title in header.split("|")]
  assert titles[2].startswith("Yardstick")
  assert titles[3].startswith("Normalised KL, forget")
  verdict = results["yardstick"]["models"]["finetune"]["verdict"]
  assert verdict in comparison.text_table(results)
  page = (run_dir / "compare.html").read_text()
  assert "As near as another retraining?" in page
  assert "3 retrained models: two of them predict the same for" in page
  alarms = results["yardstick"]["false_alarms"]
  assert f"reject {alarms['rejected']} of 3 true retrained models" in page
  flags = alarms["attacks"]["mia_loss_auc"]
  assert f"Loss attack (flags {flags} of 3 retrained)" in page


def test_checks_stand_beside_the_yardstick(run_dir):
  results = read(run_dir / "results.json")["checks"]
  assert results["total"] == 3
  assert set(results["against"]) == {"original", "finetune"}
  examined = {(x["name"], x["split"]): x for x in results["examinations"]}
  retrained = [
    np.load(run_dir / "models" / f"seed-{seed}" / "retrained.npz")
    for seed in (2022, 2023, 2024)
  ]
  ours = np.load(run_dir / "cells" / "finetune-2022-0" / "logits.npz")
  split = "test_forget"
  counts = [
    np.bincount(x[split].argmax(1), minlength=10) for x in (*retrained, ours)
  ]
  # All are of one class. Beside two references at a time, each pair in turn.
  num = counts[0].sum()
  expected = [
    np.abs(counts[3] - (counts[i] + counts[j]) / 2).sum() / (2 * num)
    for i, j in ((0, 1), (0, 2), (1, 2))
  ]
  row = examined["destination", split]
  finding = row["models"]["finetune"]
  assert finding["value"] == pytest.approx(np.mean(expected))
  assert len(row["references"]) == len(row["false_alarms"]) == 3
  # The original is at its own place, with that of the seed beside it.
  row = examined["nearness", split]
  assert row["models"]["original"]["value"] == pytest.approx(1)
  with open(run_dir / "results.csv", newline="") as file:
    by_key = {
      (row["model"], row["metric"]): row["value"]
      for row in csv.DictReader(file)
    }
  name = f"check_destination_{split}"
  assert float(by_key["finetune", name]) == finding["value"]
  assert by_key["finetune", f"{name}_rejected"] == str(
    float(finding["is_rejected"][0])
  )
  assert float(by_key["original", f"check_nearness_{split}"]) == pytest.approx(
    1
  )
  page = (run_dir / "compare.html").read_text()
  alarms = sum(examined["destination", split]["false_alarms"])
  assert (
    f"Predictions go elsewhere, forget, test (rejects {alarms} of 3 retrained)"
  ) in page
  assert f"{results['false_alarms']} of 3 of them are rejected" in page
  text = f"{finding['value']:.2f}" + "*" * finding["is_rejected"][0]
  assert f">{text}<" in page.replace("\n", "")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (
      ["--seeds=3", "--references=2"],
      "references must be at least the 3 seeds",
    ),
    (["--references=0"], "references .* got 0"),
  ],
)
def test_bad_references(given, message, tmp_path, capsys, data_dir):
  line = programs_test.failing(
    capsys, compare, f"--runs_dir={tmp_path / 'runs'}", *given
  )
  assert re.search(message, line), line
  assert not (tmp_path / "runs").exists()


def test_number_of_references_follows_the_cost(run_dir, data_dir):
  options = compare.Options(
    runs_dir=str(run_dir.parent / "cost"), num_train=400, num_devices=1
  )
  context = jobs.prepare(options)
  assert compare.num_references(context, options) == 5
  pixels = len(context.split.retain) * 32 * 32 * options.training.num_epochs
  few = compare.Options(seeds=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compare, "SLOW_PIXELS", pixels)
    assert compare.num_references(context, few) == 5
    patch.setattr(compare, "SLOW_PIXELS", pixels - 1)
    assert compare.num_references(context, few) == 3
    assert compare.num_references(context, compare.Options(seeds=4)) == 4


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
  """A run with three references, the last two added later."""
  folder = tmp_path_factory.mktemp("run")
  given = [*SMALL, f"--runs_dir={folder}", "--name=one"]
  programs_test.call(demo, *given)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_figures, "save_examples", compare_test.no_cell)
    programs_test.call(demo, *given, "--references=3", "--resume")
  return folder / "one"


@pytest.mark.slow
def test_run_with_several_references(run, run_dir):
  assert set(checkpoints.run_checkpoints(run)) == {
    *contexts.MODELS,
    "retrained-1",
    "retrained-2",
  }
  found = read(run / "metrics.json")
  assert list(found) == list(contexts.MODELS)
  measured = found["unlearned"]["yardstick"]
  assert measured["models"]["unlearned"]["num_references"] == 3
  # The same models as those of a comparison, seed by seed.
  other = read(run_dir / "results.json")["yardstick"]["models"]["original"]
  for ours, theirs in zip(
    measured["models"]["original"]["spreads"], other["spreads"], strict=True
  ):
    assert ours["kl_divergence"] == pytest.approx(theirs["kl_divergence"])
  page = (run / "report.html").read_text()
  assert measured["models"]["unlearned"]["sentence"] in page
  assert "3 retrained models: two of them predict the same for" in page
  assert "As near as another retraining?" in page
  assert "3 retrained models" in run_figures.table(found)


@pytest.mark.slow
def test_references_stay_with_their_request(run):
  """A copy of the run has them for the same request, and not for another."""
  given = ["--num_devices=1", f"--run={run}", f"--runs_dir={run.parent}"]
  programs_test.call(
    unlearn, *given, "--name=again", "--unlearning.learning_rate=1e-3"
  )
  again = read(run.parent / "again" / "metrics.json")["unlearned"]["yardstick"]
  assert again["models"]["unlearned"]["num_references"] == 3
  programs_test.call(
    *(unlearn, *given, "--name=other", "--forget_classes", "1"),
    *("--no-retrained",),
  )
  names = checkpoints.run_checkpoints(run.parent / "other")
  assert set(names) == {"original", "unlearned"}
  history = read(run.parent / "other" / "history.json")
  assert not [name for name in history if name.startswith("retrained")]


@pytest.mark.slow
def test_one_reference_cannot_judge(tmp_path, run):
  """As the page of the run was before further references were trained."""
  programs_test.call(
    unlearn,
    *("--num_devices=1", f"--run={run}", f"--runs_dir={tmp_path}"),
    *("--name=alone", "--references=1", "--unlearning.learning_rate=1e-3"),
  )
  page = (tmp_path / "alone" / "report.html").read_text()
  assert "With one retrained model a distance cannot be judged" in page
  assert "As near as another retraining?" not in page
