"""Experiments of the paper: rows, tolerances, choices, and what is kept."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import recipes, reproduce
from experiments.pages import experiment as experiment_page
from experiments.reproduction import (
  bases,
  bench,
  catalogue,
  designs,
  estimates,
  measures,
  results,
)
from psg_jax import data, unlearning

_CALLS: list[int] = []
_JOB = dataclasses.replace(
  bases.BASES["fashion_mnist"]["smoke"], num_train=100, seed=1
)


def _measure(made: bench.Bench, *, values: list[float]) -> list[dict]:
  """Gives what it is told to, and counts."""
  assert len(made.context.train) == 100
  _CALLS.append(1)
  return [{"model": "ours", "accuracy": x, "seconds": 1.0} for x in values]


def _experiment(values, **changes) -> catalogue.Experiment:
  def cells(size):
    for seed, value in enumerate(values):
      job = dataclasses.replace(_JOB, seed=seed)
      yield catalogue.Cell({"seed": seed}, job, _measure, {"values": [value]})

  fields = {
    "title": "Two seeds",
    "source": "none",
    "cells": cells,
    "by": ("model",),
    "figures": ("accuracy", "seconds"),
    "checked": ("accuracy",),
    "drawings": (
      catalogue.Drawing("lines", "seed", "accuracy", "model", "Accuracy"),
    ),
  }
  return catalogue.Experiment(**fields | changes)


@pytest.fixture
def program(tmp_path, monkeypatch):
  """The program with one experiment, expecting nothing yet."""
  monkeypatch.setattr(
    catalogue, "EXPERIMENTS", {"two_seeds": _experiment([0.4, 0.6])}
  )
  monkeypatch.setattr(results, "EXPECTED", tmp_path / "expected")
  _CALLS.clear()

  def run(*names, **options):
    return reproduce.run(
      reproduce.Options(
        names=names or ("two_seeds",),
        size="smoke",
        runs_dir=str(tmp_path / "runs"),
        **options,
      )
    )

  return run


# Figures


def test_rows_are_means_over_what_is_not_told_apart():
  records = [
    {"model": "a", "seed": 1, "accuracy": 0.4, "seconds": 2.0},
    {"model": "b", "seed": 1, "accuracy": None, "seconds": 3.0},
    {"model": "a", "seed": 2, "accuracy": 0.8, "seconds": 4.0},
  ]
  first, second = results.rows(_experiment([]), records)
  assert first.key == {"model": "a"}
  mean, sd, count = first.figures["accuracy"]
  assert (mean, count) == (pytest.approx(0.6), 2)
  assert sd == pytest.approx(0.2 * 2**0.5)
  assert second.figures["accuracy"] == (None, None, 0)
  assert second.figures["seconds"] == (3.0, None, 1)


def _row(model, mean, sd=None, count=1):
  return results.Row(
    {"model": model}, {"accuracy": results.Figure(mean, sd, count)}
  )


def test_tolerance_follows_from_seeds():
  expected = [_row("a", 0.5, 0.03, 4), _row("b", 0.9, 0.01, 4)]
  found = results.compare(
    _experiment([]),
    "cpu",
    [_row("a", 0.58, 0.0, 4), _row("b", 0.9, 0.0, 4)],
    expected,
  )
  first, second = found
  pooled = ((0.03**2 + 0.01**2) / 2) ** 0.5
  assert first.tolerance == pytest.approx(
    0.02 + 4 * (0.03**2 / 4 + pooled**2 / 4) ** 0.5
  )
  assert second.tolerance == pytest.approx(0.02 + 4 * pooled * 0.5**0.5)
  assert first.is_as_expected
  assert second.is_as_expected
  further = results.compare(
    _experiment([]), "cpu", [_row("a", 0.7, 0.0, 4), expected[1]], expected
  )
  assert [x.is_as_expected for x in further] == [False, True]


def test_tolerance_of_many_values_is_their_own():
  expected = [_row("a", 0.5, 0.0, 10), _row("b", 0.5, 0.4, 10)]
  first, _ = results.compare(
    _experiment([]), "cpu", [_row("a", 0.5, 0.1, 10), expected[1]], expected
  )
  assert first.tolerance == pytest.approx(0.02 + 3 * 0.1 * 0.1**0.5)


def test_few_values_borrow_from_other_rows():
  def row(part, mean, sd, number):
    figure = results.Figure(mean, sd, number)
    return results.Row({"model": "a", "part": part}, {"accuracy": figure})

  expected = [row(1, 0.5, None, 1), row(2, 0.5, 0.03, 2), row(3, 0.5, 0.04, 2)]
  first, second, _ = results.compare(_experiment([]), "cpu", expected, expected)
  pooled = ((0.03**2 + 0.04**2) / 2) ** 0.5
  assert first.tolerance == pytest.approx(0.02 + 4 * pooled * 2**0.5)
  assert second.tolerance == pytest.approx(0.02 + 4 * pooled)


def test_values_that_are_missing_are_found():
  (finding,) = results.compare(
    _experiment([]), "cpu", [_row("a", 0.5, 0.0, 3)], [_row("a", 0.5, 0.0, 4)]
  )
  assert not finding.is_as_expected


def test_rows_that_one_side_lacks_are_found():
  found = results.compare(
    _experiment([]), "cpu", [_row("new", 0.5)], [_row("old", 0.5)]
  )
  assert [(x.key["model"], x.obtained, x.expected) for x in found] == [
    ("old", None, 0.5),
    ("new", 0.5, None),
  ]
  assert not any(x.is_as_expected for x in found)


def test_front_known():
  points = np.array([[1, 4], [2, 2], [4, 1], [3, 3], [2, 5], [2, 2]])
  assert experiment_page.front(points).tolist() == [
    *(True, True, True),
    *(False, False, True),
  ]


@pytest.mark.parametrize(
  ("text", "seconds"),
  [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("300s", 300), ("45", 45)],
)
def test_durations(text, seconds):
  assert results.duration("budget", text) == seconds


@pytest.mark.parametrize("text", ["", "0", "2 hours", "-3m", "h"])
def test_what_is_no_duration(text):
  with pytest.raises(ValueError, match="budget must be a time such as 2h"):
    results.duration("budget", text)


def _distances(*models):
  """Records of models `(name, KL, agreement)` over seeds."""
  return [
    {
      **{"model": name, "seed": seed},
      "kl_divergence_test_forget": divergence,
      "agreement_test_forget": agreement,
    }
    for name, *pairs in models
    for seed, (divergence, agreement) in enumerate(pairs)
  ]


def _normalised_rows(*models):
  experiment = _experiment(
    [],
    figures=(
      "normalised_kl_divergence_test_forget",
      "normalised_disagreement_test_forget",
    ),
  )
  rows = results.rows(experiment, _distances(*models))
  return {row.key["model"]: list(row.figures.values()) for row in rows}


def test_distances_over_those_of_a_second_retrained_model():
  rows = _normalised_rows(
    (designs.AGAIN, (1.0, 0.9), (3.0, 0.7)), ("ours", (2.0, 0.8), (4.0, 0.8))
  )
  assert rows[designs.AGAIN] == [(1.0, 0.0, 2), (pytest.approx(1), 0.0, 2)]
  divergence, disagreement = rows["ours"]
  # (2 + 4) / (1 + 3), and what is left of each pair: ±(2 - 1.5) / 2.
  assert divergence == (1.5, pytest.approx(0.25 * 2**0.5), 2)
  assert disagreement.mean == pytest.approx((0.2 + 0.2) / (0.1 + 0.3))


def test_no_second_retrained_model_no_normalised_distance():
  nothing = (None, None, 0)
  assert _normalised_rows(("ours", (2.0, 0.8)))["ours"] == [nothing] * 2
  # One of them diverged, and nothing tells which pair is left.
  few = _normalised_rows(
    (designs.AGAIN, (1.0, 0.9), (3.0, 0.7)), ("ours", (2.0, 0.8))
  )
  assert few["ours"] == [nothing] * 2
  same = _normalised_rows((designs.AGAIN, (0.0, 1.0)), ("ours", (2.0, 0.8)))
  assert same["ours"] == [nothing] * 2


def test_interval_known():
  # Student's 95 % point of one degree of freedom is 6.314.
  low, high = results.interval(1.0, 0.2, 2)
  half = 6.3138 * 0.2 / 2**0.5
  assert (low, high) == (
    pytest.approx(1 - half, abs=1e-4),
    pytest.approx(1 + half, abs=1e-4),
  )


def test_page_says_how_near_and_how_often_inside():
  def row(**figures):
    return results.Row(
      {"model": "recommended"},
      {name: results.Figure(*x) for name, x in figures.items()},
    )

  near = row(normalised_kl_divergence_test_forget=(1.2, 0.1, 4))
  (sentence,) = experiment_page.statements([near])
  assert "1.20 [1.08, 1.32] on forget images." in sentence
  inside = [row(is_inside=(0.5, 0.7, 2)), row(is_inside=(1.0, None, 1))]
  (sentence,) = experiment_page.statements(inside)
  assert sentence.startswith("In 2 of 3 readings")


# The catalogue


@pytest.mark.parametrize("size", catalogue.SIZES)
@pytest.mark.parametrize("name", catalogue.EXPERIMENTS)
def test_every_experiment_has_cells_of_its_own(name, size):
  experiment = catalogue.EXPERIMENTS[name]
  cells = list(experiment.cells(size))
  assert cells
  # No two cells are the same computation under another name.
  whats = [(x.job, x.measure, json.dumps(dict(x.options))) for x in cells]
  assert len(set(whats)) == len(cells)
  assert set(experiment.checked) <= set(experiment.figures)


def test_the_released_choices_are_in_the_cells():
  cells = catalogue.EXPERIMENTS["cifar10_classes"].cells("full")
  by_model = {x.row.get("model"): x.job.unlearning for x in cells}
  released = by_model["released"]
  assert (released.distance_weight, released.noise_scale) == (1e-3, 1e-2)
  assert (released.learning_rate, released.num_epochs) == (1e-5, 10)
  assert released.retain_weight == 0
  assert by_model["recommended"] == recipes.Unlearning(target="zero")


def test_all_sources_are_asked_for():
  for size, number in (("smoke", 1), ("cpu", 11), ("full", 11)):
    cells = list(catalogue.EXPERIMENTS["sources"].cells(size))
    wheres = {x.job.where for x in cells if x.row.get("model") == "recommended"}
    assert len(wheres) == number
    assert {x.job.unlearning.target for x in cells} >= {"proxy"}


def test_labellings_teach_different_things():
  taught = set()
  for changes in designs.LABELLINGS.values():
    names = ("labels", "image_weight", "retain_labels", "top_k")
    options = {"labels": "hard"} | changes
    targets = unlearning.Targets(**{x: options.get(x) for x in names})
    taught.add((targets, options.get("num_refits")))
  assert len(taught) == len(designs.LABELLINGS)


def test_shapes_of_all_full_jobs():
  jobs = {
    x.job
    for experiment in catalogue.EXPERIMENTS.values()
    for x in experiment.cells("full")
  }
  # Networks and images repeat; requests do not matter here.
  distinct = {
    (x.dataset, x.model, x.width, x.training.batch_size): x for x in jobs
  }
  sizes = {key: estimates.training_bytes(x) for key, x in distinct.items()}
  # What a GPU of 80 GB has room for, images included.
  assert all(10**6 < x < 6 * 10**10 for x in sizes.values())


def test_parameters_known():
  # 23,508,032 of the layers before the head (He et al., 2016), and the head.
  job = recipes.JOBS["mri_resnet50"]
  assert estimates.num_parameters(job) == 23_508_032 + 4 * 2048 + 4


def test_memory_grows_with_the_minibatch():
  job = bases.BASES["cifar10"]["full"]
  half = dataclasses.replace(
    job, training=dataclasses.replace(job.training, batch_size=32)
  )
  whole, part = map(estimates.training_bytes, (job, half))
  weights = 16 * estimates.num_parameters(job)
  # But for the statistics, which are no parameters.
  assert (part - weights) / (whole - weights) == pytest.approx(0.5, abs=0.01)


# The program


def test_cells_are_kept_and_shared(program, monkeypatch):
  assert program()
  assert len(_CALLS) == 2
  assert program()
  assert len(_CALLS) == 2
  # Another experiment of which one cell is the same.
  both = {
    "two_seeds": _experiment([0.4, 0.6]),
    "other": _experiment([0.4, 0.7]),
  }
  monkeypatch.setattr(catalogue, "EXPERIMENTS", both)
  assert program("other")
  assert len(_CALLS) == 3


def test_what_was_recorded_is_expected(program, monkeypatch, capsys, tmp_path):
  assert not program(check=True)
  assert "nothing is expected at size smoke" in capsys.readouterr().out
  program(record=True)
  content = results.read("two_seeds", "smoke")
  assert content["rows"][0].figures["accuracy"].mean == 0.5
  assert content["origin"]["versions"]["jax"]
  assert program(check=True)
  assert "all 1 figures as expected" in capsys.readouterr().out
  path = results.path("two_seeds", "smoke")
  content = json.loads(path.read_text())
  content["rows"][0]["figures"]["accuracy"]["mean"] = -1.5
  path.write_text(json.dumps(content))
  # 4 standard errors of 0.14 each are not enough for this.
  assert not program(check=True)
  out = capsys.readouterr().out
  assert "1 of 1 figures are not as expected" in out
  assert "model ours" in out
  assert "-1.500" in out
  # Expected of another recipe.
  others = {"two_seeds": _experiment([0.4, 0.7])}
  monkeypatch.setattr(catalogue, "EXPERIMENTS", others)
  with pytest.raises(ValueError, match="measured with other options"):
    program(check=True)


def test_images_that_were_prepared_anew(program, tmp_path):
  program()
  path = tmp_path / "runs" / "reproduce" / "smoke" / "data.json"
  path.write_text(json.dumps({"digits": "others"}))
  with pytest.raises(ValueError, match="runs_dir must be of the images of dig"):
    program()
  assert program(overwrite=True)


def test_one_that_diverges_does_not_end_the_others(
  program, monkeypatch, capsys
):
  def diverge(made):
    raise FloatingPointError("the loss is not finite at step 3")

  def cells(size):
    yield catalogue.Cell({}, _JOB, diverge)

  both = {
    "lost": _experiment([], cells=cells),
    "two_seeds": _experiment([0.4, 0.6]),
  }
  monkeypatch.setattr(catalogue, "EXPERIMENTS", both)
  assert not program("lost", "two_seeds")
  out = capsys.readouterr().out
  assert "lost: the loss is not finite at step 3" in out
  assert "50.0 ± 14.1%" in out


def test_the_papers_size_needs_its_weights(program, monkeypatch):
  monkeypatch.undo()
  with pytest.raises(ValueError, match="mri: pretrained must name"):
    reproduce.run(reproduce.Options(names=("mri",), size="full"))


def test_what_is_left_in_the_folder(program, tmp_path):
  program(record=True)
  program()
  folder = tmp_path / "runs" / "reproduce" / "smoke" / "two_seeds"
  page = (folder / "experiment.html").read_text("utf-8")
  assert "<svg" in page
  assert "50.0 ± 14.1%" in page
  assert len(page) < 5_000_000
  table = (folder / "results.csv").read_text("utf-8").splitlines()
  assert table[0] == "model,accuracy,seconds,seed"
  assert table[1:] == ["ours,0.4,1.0,0", "ours,0.6,1.0,1"]
  for ending in ("md", "tex", "csv"):
    text = (folder / "tables" / f"figures.{ending}").read_text("utf-8")
    assert "50.0" in text
  assert (folder / "figures" / "picture0.pdf").read_bytes()[:4] == b"%PDF"


def test_unknown_experiment(program):
  with pytest.raises(ValueError, match="did you mean 'two_seeds'"):
    program("two_seed")


def test_no_experiment(program):
  with pytest.raises(ValueError, match="names must be given, or --all"):
    reproduce.run(reproduce.Options())


def test_budget(program, monkeypatch, capsys, tmp_path):
  program(record=True)
  path = results.path("two_seeds", "smoke")
  path.write_text(
    json.dumps({**json.loads(path.read_text()), "seconds": 100.0})
  )
  with pytest.raises(ValueError, match="budget must be at least 1 min 40 s"):
    program(budget="60s")
  assert program(budget="2m")
  # What fits is run, what does not is named.
  both = {"two_seeds": _experiment([0.4]), "other": _experiment([0.1])}
  monkeypatch.setattr(catalogue, "EXPERIMENTS", both)
  capsys.readouterr()
  program("other", record=True)
  path = results.path("other", "smoke")
  path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 50.0}))
  # The shorter, though the longer is named first and would fit as well.
  assert program("two_seeds", "other", budget="120s")
  assert "two_seeds is left out: it takes about" in capsys.readouterr().out


def test_data_that_is_missing(program, monkeypatch, capsys, tmp_path):
  def cells(size):
    job = dataclasses.replace(_JOB, dataset="svhn")
    yield catalogue.Cell({}, job, _measure, {"values": [1.0]})

  both = {
    "two_seeds": _experiment([0.4]),
    "numbers": _experiment([], cells=cells),
  }
  monkeypatch.setattr(catalogue, "EXPERIMENTS", both)
  empty = {"data_dir": str(tmp_path / "data")}
  with pytest.raises(ValueError, match=r"numbers: .*prepare svhn --source"):
    program("numbers", **empty)
  reproduce.run(
    reproduce.Options(
      all=True, size="smoke", runs_dir=str(tmp_path / "runs"), **empty
    )
  )
  out = capsys.readouterr().out
  assert "numbers is left out" in out
  assert "two_seeds" in out


def test_folder_of_another_version(program, tmp_path):
  program()
  path = tmp_path / "runs" / "reproduce" / "smoke" / "run.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "psg_jax": "0"}))
  with pytest.raises(ValueError, match=r"runs_dir must be of psg_jax .* of 0"):
    program()
  assert program(overwrite=True)
  assert json.loads(path.read_text())["psg_jax"] != "0"


def test_folder_that_is_no_run(program, tmp_path):
  folder = tmp_path / "runs" / "reproduce" / "smoke"
  folder.mkdir(parents=True)
  (folder / "thesis.txt").write_text("years of work")
  for overwrite in (False, True):
    with pytest.raises(
      ValueError, match=r"runs_dir must hold a run .*run\.json"
    ):
      program(overwrite=overwrite)
  assert (folder / "thesis.txt").exists()


def test_list_shows_all(capsys):
  assert reproduce.run(reproduce.Options(list=True, size="smoke"))
  out = capsys.readouterr().out
  assert all(name in out for name in catalogue.EXPERIMENTS)


# Models


def test_embedded_sets_have_the_shapes_of_estimates():
  for name in ("digits", "phantom_digits", "phantom_fundus"):
    train = data.load(name, "train")
    job = dataclasses.replace(recipes.Job(), dataset=name)
    shape, num_classes = estimates.shapes(job)
    assert shape[1:] == train.images.shape[1:]
    assert num_classes == train.num_classes


def test_all_methods_are_measured_on_the_same_images(tmp_path):
  job = dataclasses.replace(_JOB, forget_classes=(0,), fraction=0.5)
  parts = []
  for target in ("zero", "unseen", "proxy"):
    options = dataclasses.replace(job.unlearning, target=target)
    changed = dataclasses.replace(job, unlearning=options)
    made = bench.open_bench(changed, tmp_path)
    parts.append({x: np.asarray(y.ids) for x, y in made.parts.items()})
    # What says when to stop is in no figure.
    shown = made.context.parts
    for name, ids in parts[-1].items():
      assert np.isin(ids, np.asarray(shown[name].ids)).all()
  for other in parts[1:]:
    for name, ids in parts[0].items():
      np.testing.assert_array_equal(ids, other[name])
  assert len(parts[0]["test_forget"]) > 5


@pytest.mark.slow
def test_originals_are_shared_between_requests(tmp_path):
  job = dataclasses.replace(
    _JOB, training=recipes.Training(num_epochs=1, batch_size=50)
  )
  made = bench.open_bench(job, tmp_path)
  made.trained("original")
  made.trained("retrained")
  other = made.asking(forget_classes=(3,))
  other.trained("original")
  folders = sorted(x.name.split("-")[0] for x in tmp_path.iterdir())
  assert folders == ["original", "retrained"]
  other.trained("retrained")
  assert len(list(tmp_path.iterdir())) == 3
  # Another retraining is not the same one.
  first, again = (
    other.outputs(name).logits["test_retain"]
    for name in ("retrained", "retrained-1")
  )
  assert np.abs(again - first).max() > 1e-3
  assert len(list(tmp_path.iterdir())) == 4
  # Another seed has models of its own.
  made.asking(seed=2).trained("original")
  assert len(list(tmp_path.iterdir())) == 5


def test_validation_images_are_no_test_images(tmp_path):
  made = bench.open_bench(_JOB, tmp_path)
  validated = made.validated()
  train = set(np.asarray(validated.context.train.ids))
  held = set(np.asarray(validated.context.test.ids))
  assert not train & held
  assert train | held == set(np.asarray(made.context.train.ids))
  assert not held & set(np.asarray(made.context.test.ids))


def test_purity_known():
  # Two clusters of twelve: neighbours are of one's own kind, or of the other.
  features = np.concatenate(
    [np.tile([1.0, 0.01], (12, 1)), np.tile([0.01, 1.0], (12, 1))]
  )
  first = np.arange(24) < 12
  assert measures.purity(features, first) == 1.0
  mixed = np.arange(24) % 2 == 0
  assert measures.purity(features, mixed) == pytest.approx(0.5, abs=0.06)
