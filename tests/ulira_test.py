import json
import math

import jax
import numpy as np
import pytest
import scipy.stats

from psg_jax import ensembles, parallel, training, types, ulira
from tests import fakes

KEY = jax.random.key(0)
MODEL = fakes.linear_model(16, 3)


def test_logit_confidence_by_hand():
  logits = np.log([[0.9, 0.1, 1e-300], [0.2, 0.3, 0.5]])
  np.testing.assert_allclose(
    ulira.logit_confidence(logits, np.array([0, 2])),
    [math.log(9), 0.0],
    atol=1e-12,
  )
  # Where p is 1 in floating point, and a leading axis of models.
  logits = np.array([[[1000.0, 0.0]], [[0.0, 1000.0]]])
  found = ulira.logit_confidence(logits, np.array([0]))
  np.testing.assert_allclose(found, [[1000.0], [-1000.0]])
  with pytest.raises(ValueError, match=r"got \[1, 3\] and \[2\]"):
    ulira.logit_confidence(np.zeros((1, 3)), np.array([0, 1]))


def test_gaussians_of_each_image():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(9, 4)) * [1, 2, 3, 4]
  values[5:, 1] = np.nan
  own = ulira.fit_gaussians(values, is_variance_shared=False)
  np.testing.assert_allclose(own.mean, np.nanmean(values, 0))
  np.testing.assert_allclose(own.std, np.nanstd(values, 0, ddof=1))
  shared = ulira.fit_gaussians(values)
  squares = np.nansum((values - np.nanmean(values, 0)) ** 2)
  np.testing.assert_allclose(shared.std, np.sqrt(squares / (3 * 8 + 4)))
  # Many models speak for themselves.
  many = ulira.fit_gaussians(rng.normal(size=(64, 2)) * [1, 9])
  assert many.std[1] > 5 * many.std[0]


def test_likelihood_ratio_by_hand_and_in_its_direction():
  unlearned = ulira.Gaussians(np.array([2.0]), np.array([1.0]))
  never = ulira.Gaussians(np.array([0.0]), np.array([1.0]))
  # log N(φ; 2, 1) - log N(φ; 0, 1) = 2 φ - 2
  targets = np.array([[0.0], [1.0], [3.0]])
  found = ulira.log_likelihood_ratio(targets, unlearned, never)
  np.testing.assert_allclose(found[:, 0], [-2, 0, 4])
  wide = ulira.Gaussians(np.array([0.0]), np.array([math.e]))
  np.testing.assert_allclose(
    ulira.log_likelihood_ratio(np.zeros((1, 1)), wide, never), -1
  )


@pytest.mark.parametrize("is_shared", [True, False])
def test_models_under_attack_are_left_out(is_shared):
  rng = np.random.default_rng(1)
  ours, theirs = rng.normal(size=(2, 6, 5))
  found = ulira.attack(ours, theirs, is_variance_shared=is_shared)

  def fit(values, model):
    rest = np.delete(values, model, 0)
    return ulira.fit_gaussians(rest, is_variance_shared=is_shared)

  for model in range(6):
    kinds = fit(ours, model), fit(theirs, model)
    np.testing.assert_allclose(
      found.positive_scores[model],
      ulira.log_likelihood_ratio(ours[model], *kinds),
    )
    np.testing.assert_allclose(
      found.negative_scores[model],
      ulira.log_likelihood_ratio(theirs[model], *kinds),
    )


def test_attack_on_what_cannot_be_told_apart_is_chance():
  rng = np.random.default_rng(2)
  base = 10 * rng.normal(size=500)
  for num_models in (4, 16):
    ours, theirs = base + rng.normal(size=(2, num_models, 500))
    found = ulira.attack(ours, theirs)
    assert found.auc == pytest.approx(0.5, abs=0.03)
    assert found.accuracy == pytest.approx(0.5, abs=0.04)
    assert found.tpr_at_1_percent == pytest.approx(0.01, abs=0.015)
    assert (found.num_positives, found.num_negatives) == (
      500 * num_models,
      500 * num_models,
    )


def test_attack_reaches_the_known_power_where_images_differ():
  # Two standard deviations apart, up or down by the image, on levels that
  # differ far more: no threshold for all images tells anything.
  rng = np.random.default_rng(3)
  base = 10 * rng.normal(size=300)
  sign = rng.choice([-1, 1], 300)
  ours, theirs = base + rng.normal(size=(2, 80, 300))
  ours += 2 * sign
  found = ulira.attack(ours, theirs)
  normal = scipy.stats.norm
  assert found.auc == pytest.approx(normal.cdf(2 / math.sqrt(2)), abs=0.015)
  assert found.accuracy == pytest.approx(normal.cdf(1), abs=0.015)
  expected = normal.cdf(2 - normal.isf(0.01))
  assert found.tpr_at_1_percent == pytest.approx(expected, abs=0.04)
  expected = normal.cdf(2 - normal.isf(0.001))
  assert found.tpr_at_01_percent == pytest.approx(expected, abs=0.04)
  # The other way round the scores change sign and the area stays.
  assert ulira.attack(theirs, ours).auc == pytest.approx(found.auc, abs=0.01)
  json.dumps(found.as_dict())


def test_rates_that_too_few_negatives_cannot_show_are_none():
  rng = np.random.default_rng(4)
  found = ulira.attack(*rng.normal(size=(2, 4, 10)))
  assert found.tpr_at_1_percent is None
  found = ulira.attack(*rng.normal(size=(2, 4, 50)))
  assert found.tpr_at_1_percent is not None
  assert found.tpr_at_01_percent is None


def test_one_ensemble_with_both_kinds():
  rng = np.random.default_rng(5)
  is_member = ulira.draw_membership(12, 200, rng)
  values = rng.normal(size=(12, 200)) + 3 * is_member
  found = ulira.attack(
    np.where(is_member, values, np.nan), np.where(is_member, np.nan, values)
  )
  assert found.num_positives == found.num_negatives == 6 * 200
  assert np.array_equal(np.isnan(found.positive_scores), ~is_member)
  expected = scipy.stats.norm.cdf(3 / math.sqrt(2))
  assert found.auc == pytest.approx(expected, abs=0.03)


def test_klom_by_hand():
  # Four bins of width 1: p is (1/2, 1/2, 0, 0), q is (1/4, 1/4, 1/4, 1/4).
  p = np.array([[0.1], [0.2], [1.1], [1.2]])
  q = np.array([[0.0], [1.5], [2.5], [4.0]])
  np.testing.assert_allclose(ulira.klom(p, q, num_bins=4), math.log(2))
  # The other direction meets empty bins, at their floor.
  floor = 1e-5 / (1 + 2e-5)
  np.testing.assert_allclose(
    ulira.klom(q, p, num_bins=4),
    np.log(0.25 / (0.5 / (1 + 2e-5))) / 2 + np.log(0.25 / floor) / 2,
    rtol=1e-6,
  )
  np.testing.assert_array_equal(ulira.klom(q, q), 0)
  # Beyond the clip all margins are the same.
  np.testing.assert_array_equal(ulira.klom(p + 200, q + 300), 0)
  # log 2 + (1 + 1) / 8 - 1/2, from samples of just these moments.
  unit = np.array([[-1.0], [1.0]]) / math.sqrt(2)
  np.testing.assert_allclose(
    ulira.klom(1 + unit, 2 * unit, method="gaussian"), math.log(2) + 0.25 - 0.5
  )


def test_klom_of_normal_margins_nears_the_formula():
  rng = np.random.default_rng(6)
  p, q = 1 + rng.normal(size=(20_000, 3)), 2 * rng.normal(size=(20_000, 3))
  expected = math.log(2) + 0.25 - 0.5
  for method in ulira.KLOM_METHODS:
    found = ulira.klom(p, q, method=method)
    assert found.shape == (3,)
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_membership_is_balanced_and_seeded():
  found = ulira.draw_membership(8, 500, np.random.default_rng(0))
  assert found.dtype == bool
  assert set(found.sum(0)) == {4}
  assert found.sum(1).min() > 200
  again = ulira.draw_membership(8, 500, np.random.default_rng(0))
  np.testing.assert_array_equal(found, again)
  quarter = ulira.draw_membership(8, 9, np.random.default_rng(0), fraction=0.25)
  assert set(quarter.sum(0)) == {2}
  with pytest.raises(ValueError, match="fraction must leave"):
    ulira.draw_membership(2, 5, np.random.default_rng(0), fraction=0.1)


OPTIONS = {
  "num_epochs": 2,
  "batch_size": 8,
  "optimizer": training.sgd(0.5),
  "show_progress": False,
}


@pytest.fixture(scope="module")
def ensemble():
  """Models of unequal numbers of images, and each trained by itself."""
  dataset = fakes.blobs(60)
  rng = np.random.default_rng(0)
  membership = rng.random((4, 60)) < np.array([0.2, 0.5, 0.7, 0.9])[:, None]
  image = np.zeros((1, 4, 4, 1), np.float32)
  alone = []
  for index, row in enumerate(membership):
    init_key, fit_key = ensembles.model_keys(KEY, index)
    start = MODEL.init(init_key, image)
    alone.append(
      training.fit(MODEL, start, dataset.take(row), fit_key, **OPTIONS)
    )
  return dataset, membership, alone


@pytest.mark.parametrize("mode", ensembles.MODES)
def test_ensemble_equals_one_by_one(mode, ensemble):
  dataset, membership, alone = ensemble
  # Three devices for four models.
  mesh = parallel.create_mesh(3) if mode == "sharded" else None
  variables, history = ensembles.train(
    MODEL, dataset, membership, KEY, mode=mode, mesh=mesh, **OPTIONS
  )
  for index, (expected, records) in enumerate(alone):
    # The order of sums differs between the programs.
    jax.tree.map(
      lambda x, y, i=index: np.testing.assert_allclose(x[i], y, atol=1e-5),
      variables,
      expected,
    )
    for ours, theirs in zip(history, records, strict=True):
      assert ours["loss"][index] == pytest.approx(theirs["loss"], abs=1e-5)
      assert ours["accuracy"][index] == pytest.approx(theirs["accuracy"])
  assert [record["epoch"] for record in history] == [1, 2]
  assert len(history[0]["loss"]) == 4


def test_images_that_are_not_members_do_not_matter(ensemble):
  dataset, membership, _ = ensemble
  model = membership[1]
  other = types.Dataset(
    images=np.where(model[:, None, None, None], dataset.images, 0),
    labels=np.where(model, dataset.labels, 2),
    class_names=dataset.class_names,
  )
  ours, theirs = (
    ensembles.train(MODEL, x, membership, KEY, **OPTIONS)[0]["params"]
    for x in (dataset, other)
  )
  np.testing.assert_array_equal(ours["kernel"][1], theirs["kernel"][1])
  assert not np.array_equal(ours["kernel"][3], theirs["kernel"][3])


def test_predictions_of_an_ensemble(ensemble):
  dataset, membership, alone = ensemble
  variables, _ = ensembles.train(MODEL, dataset, membership, KEY, **OPTIONS)
  logits = ensembles.predict(MODEL, variables, dataset.images)
  assert logits.shape == (4, 60, 3)
  expected = MODEL.apply(alone[2][0], dataset.images / np.float32(255))
  np.testing.assert_allclose(logits[2], expected, atol=1e-4)


@pytest.mark.slow
def test_models_that_learn_by_heart_are_found_out():
  # Random labels: nothing but memory tells a member.
  rng = np.random.default_rng(0)
  dataset = types.Dataset(
    images=rng.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8),
    labels=rng.integers(0, 3, 60),
    class_names=("a", "b", "c"),
  )
  model = fakes.linear_model(64, 3)
  membership = ulira.draw_membership(16, 60, rng)
  variables, history = ensembles.train(
    model, dataset, membership, KEY, **{**OPTIONS, "num_epochs": 40}
  )
  assert np.mean(history[-1]["accuracy"]) > 0.8
  logits = ensembles.predict(model, variables, dataset.images)
  values = ulira.logit_confidence(logits, dataset.labels)
  found = ulira.attack(
    np.where(membership, values, np.nan), np.where(membership, np.nan, values)
  )
  assert found.auc > 0.9
  # A half of the models of each kind against the other half of the same.
  first = ulira.draw_membership(16, 60, np.random.default_rng(1))
  chance = ulira.attack(
    np.where(first, values, np.nan), np.where(first, np.nan, values)
  )
  assert chance.auc == pytest.approx(0.5, abs=0.1)


def test_divergence_names_the_model(ensemble):
  dataset, membership, _ = ensemble
  optimizer = training.sgd(1e38)
  with pytest.raises(FloatingPointError, match=r"of model \d is not finite at"):
    ensembles.train(
      MODEL, dataset, membership, KEY, **{**OPTIONS, "optimizer": optimizer}
    )


def test_bad_input(ensemble):
  dataset, membership, _ = ensemble
  for argument, options, message in [
    (membership.astype(int), {}, r"membership must be bool \[M, 60\], got int"),
    (membership[:, :9], {}, r"got bool \[4, 9\]"),
    (membership & False, {}, "give model 0 an image"),
    (membership, {"mode": "vmaps"}, "did you mean 'vmap'"),
    (membership, {"num_epochs": 0}, "num_epochs must be"),
    (membership, {"mesh": parallel.create_mesh(2), "mode": "map"}, "mesh must"),
  ]:
    with pytest.raises(ValueError, match=message):
      ensembles.train(MODEL, dataset, argument, KEY, **{**OPTIONS, **options})
  good = np.zeros((4, 5))
  for call, message in [
    (lambda: ulira.attack(good, good[:, :4]), "must have the same images"),
    (lambda: ulira.attack(good[:1], good), "unlearned must have two models"),
    (
      lambda: ulira.attack(good[:2], good[:2], is_variance_shared=True),
      "three",
    ),
    (lambda: ulira.klom(good, good, method="kde"), "method must be one of"),
    (lambda: ulira.klom(good, good * np.nan), "retrained must have two models"),
    (lambda: ulira.klom(good + np.inf, good), "finite or NaN"),
  ]:
    with pytest.raises(ValueError, match=message):
      call()
