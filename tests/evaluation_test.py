"""The table of figures, from Python to its end."""

import dataclasses

import jax
import numpy as np
import pytest

import psg_jax as psg
from psg_jax import evaluation, metrics, types
from tests import fakes

MODEL = fakes.linear_model(16, 3)
TRAIN = fakes.blobs(90)
TEST = dataclasses.replace(
  fakes.blobs(60, seed=1), ids=np.array([f"test {i}" for i in range(60)])
)


@pytest.fixture(scope="module")
def models():
  def fit(dataset):
    return psg.fit(
      MODEL, dataset, jax.random.key(0), num_epochs=5, show_progress=False
    )[0]

  parts = psg.evaluation.parts(TRAIN, TEST, classes="class 1")
  return parts, fit(TRAIN), fit(parts.split.retain)


def test_parts_are_of_one_request(models):
  parts = models[0].datasets()
  assert list(parts) == list(metrics.SPLITS)
  assert sum(map(len, parts.values())) == len(TRAIN) + len(TEST)
  for name, part in parts.items():
    assert set(part.labels) == ({1} if name.endswith("forget") else {0, 2})
  # Ids are of training images: no test image is of their kind.
  some = evaluation.parts(TRAIN, TEST, ids=[TRAIN.ids[4], TRAIN.ids[7]])
  assert [len(part) for part in some.datasets().values()] == [2, 88, 0, 60]


def test_table_has_the_figures_of_all_models(models):
  parts, original, retrained = models
  table = psg.evaluate(
    MODEL, parts, original=original, retrained=retrained, random=None
  )
  assert {row.model for row in table} == {"original", "retrained"}
  assert len(table) == 2 * len(evaluation.HEADLINE)
  for name, part in parts.datasets().items():
    logits = MODEL.apply(original, part.images / np.float32(255))
    expected = np.mean(np.argmax(logits, 1) == part.labels)
    assert table.value("original", "accuracy", name) == pytest.approx(expected)
  # Nothing to be compared with: said, and not a number.
  (row,) = (
    x for x in table if x[:3] == ("retrained", "test_forget", "kl_divergence")
  )
  assert row.value is None
  assert row.reason
  assert table.value("original", "kl_divergence", "test_forget") > 0
  head, first, *lines = str(table).splitlines()
  assert head.split() == ["original", "retrained"]
  assert first.split()[:2] == ["accuracy", "train_forget"]
  assert len(lines) == len(evaluation.HEADLINE) - 1
  with pytest.raises(ValueError, match="must be of the table, got 'other'"):
    table.value("other", "accuracy", "test_forget")


def test_features_and_parameters_where_a_metric_needs_them(models):
  parts, original, retrained = models
  names = ("linear_cka_test_retain", "weight_distance")
  table = psg.evaluate(
    MODEL, parts, names=names, original=original, retrained=retrained
  )
  assert [row[:3] for row in table][:2] == [
    ("original", "test_retain", "linear_cka"),
    ("original", "", "weight_distance"),
  ]
  assert table.value("original", "weight_distance") > 0
  with pytest.raises(ValueError, match="one model or more, got none"):
    psg.evaluate(MODEL, parts, original=None)


@pytest.mark.parametrize(
  ("forget", "retain", "expected"),
  [([1, 1], [0, 2], True), ([1, 0], [0, 2], False), ([0, 1], [2], True)],
)
def test_class_requests(forget, retain, expected):
  split = types.Split(
    *(
      TRAIN.take(
        [np.flatnonzero(TRAIN.labels == label)[i] for i, label in rows]
      )
      for rows in (list(enumerate(forget)), list(enumerate(retain, 5)))
    )
  )
  assert split.is_of_classes() is expected


def test_names_of_the_package():
  assert {"unlearn", "search", "models", "evaluation"} <= set(dir(psg))
  assert psg.search is psg.boundary.search
  with pytest.raises(AttributeError, match="no attribute 'serch'"):
    psg.serch  # noqa: B018


def test_networks_without_features_lack_their_figures_alone(models):
  parts, original, retrained = models
  plain = types.Model(MODEL.init, MODEL.apply)
  table = psg.evaluate(
    plain,
    parts,
    names=("accuracy_test_retain", "linear_probe"),
    original=original,
    retrained=retrained,
  )
  assert table.value("original", "accuracy", "test_retain") > 0.9
  rows = [row for row in table if row.metric == "linear_probe"]
  assert [row.value for row in rows] == [None, None]
  assert all("features" in row.reason for row in rows)
