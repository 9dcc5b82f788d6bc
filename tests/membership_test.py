import numpy as np
import pytest
import sklearn.metrics

from psg_jax import metrics
from psg_jax.metrics import membership

NUM_CLASSES = 4


def model(rng, num_images, *, margin=3.0, spread=2.0, label=None):
  """Logits whose right class leads by `margin` on average."""
  labels = (
    rng.integers(0, NUM_CLASSES, num_images)
    if label is None
    else np.full(num_images, label)
  )
  logits = rng.normal(size=(num_images, NUM_CLASSES))
  logits[np.arange(num_images), labels] += rng.normal(
    margin, spread, num_images
  )
  return logits, labels


def binary(margins):
  """Logits of two classes with the label 0 ahead by `margins`."""
  margins = np.asarray(margins, float)
  return (
    np.stack([margins, np.zeros_like(margins)], -1),
    np.zeros(len(margins), int),
  )


def all_attacks():
  found = {
    f"threshold {score}": lambda *a, score=score, **k: (
      membership.threshold_attack(*a, score=score, **k)
    )
    for score in membership.SCORES
  }
  found["logistic"] = membership.logistic_attack
  found["svc"] = membership.svc_attack
  return found


def test_entropies_by_hand():
  logits = np.log([[0.7, 0.2, 0.1]] * 2)
  labels = np.array([0, 1])
  np.testing.assert_allclose(
    metrics.label_losses(logits, labels), [0.356675, 1.609438], atol=1e-6
  )
  np.testing.assert_allclose(metrics.entropies(logits), 0.801819, atol=1e-6)
  # -0.3 ln 0.7 - 0.2 ln 0.8 - 0.1 ln 0.9 and
  # -0.8 ln 0.2 - 0.7 ln 0.3 - 0.1 ln 0.9
  np.testing.assert_allclose(
    metrics.modified_entropies(logits, labels), [0.162167, 2.140867], atol=1e-6
  )


def test_modified_entropy_of_saturated_predictions():
  logits = np.array([[100.0, 0, 0], [200.0, 0, 0], [1000.0, 0, 0]], np.float32)
  values = metrics.modified_entropies(logits, np.array([0, 0, 1]))
  assert values[0] > values[1] > 0
  # log p_1 is -1000, and log(1 - p_0) is -1000 + ln 2.
  np.testing.assert_allclose(values[2], 2000 - np.log(2), rtol=1e-12)


@pytest.mark.parametrize("name", all_attacks())
def test_a_retrained_model_scores_one_half(name):
  rng = np.random.default_rng(0)
  attack = all_attacks()[name](*model(rng, 1500), *model(rng, 1500))
  # Three standard errors of an accuracy or an AUC over 2,000 images or more.
  assert attack.accuracy == pytest.approx(0.5, abs=0.035)
  assert attack.auc == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("name", all_attacks())
def test_an_overfitted_model_is_found(name):
  rng = np.random.default_rng(1)
  attack = all_attacks()[name](
    *model(rng, 800, margin=8.0, spread=1.0), *model(rng, 400, margin=2.5)
  )
  assert attack.accuracy >= 0.6
  assert attack.auc >= 0.6


def test_a_model_that_forgot_too_much_is_found_too():
  rng = np.random.default_rng(2)
  sides = (*model(rng, 600, margin=-2.0), *model(rng, 600, margin=3.0))
  assert metrics.threshold_attack(*sides).auc < 0.2
  assert metrics.threshold_attack(*sides).accuracy == pytest.approx(
    0.5, abs=0.03
  )
  assert metrics.logistic_attack(*sides).accuracy > 0.8
  assert metrics.svc_attack(*sides).accuracy > 0.8


def test_thresholds_are_not_chosen_on_the_images_they_are_judged_by():
  rng = np.random.default_rng(3)
  found = [
    metrics.threshold_attack(*model(rng, 40), *model(rng, 40)).accuracy
    for _ in range(60)
  ]
  # The standard error of the mean is 0.008; the best threshold of the same
  # images would score about 0.58.
  assert np.mean(found) == pytest.approx(0.5, abs=0.03)


def test_classes_of_unequal_share_and_difficulty_give_nothing_away():
  rng = np.random.default_rng(4)
  easy, hard = {"margin": 6.0, "label": 0}, {"margin": 0.0, "label": 1}

  def side(num_easy, num_hard):
    parts = model(rng, num_easy, **easy), model(rng, num_hard, **hard)
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))

  sides = (*side(1800, 600), *side(600, 1800))
  attack = metrics.threshold_attack(*sides)
  assert attack.num_samples == 1200
  assert attack.auc == pytest.approx(0.5, abs=0.04)
  assert metrics.logistic_attack(*sides).accuracy == pytest.approx(
    0.5, abs=0.04
  )


def test_both_sides_get_the_same_number_of_each_class():
  members, others = np.repeat([0, 1, 2], [50, 10, 9]), np.repeat([1, 0], 30)
  here, there = membership.match(members, others)
  assert np.bincount(members[here]).tolist() == [30, 10]
  assert np.bincount(others[there]).tolist() == [30, 10]
  assert len(np.unique(here)) == len(np.unique(there)) == 40
  again = membership.match(members, others, seed=1)
  assert not np.array_equal(here, again[0])
  few = membership.match(members, others, max_samples=25)
  assert [len(x) for x in few] == [25, 25]


def test_area_equals_sklearns_on_the_losses():
  rng = np.random.default_rng(5)
  sides = (*model(rng, 200, margin=4.0, label=2), *model(rng, 200, label=2))
  losses = [
    metrics.label_losses(sides[0], sides[1]),
    metrics.label_losses(sides[2], sides[3]),
  ]
  expected = sklearn.metrics.roc_auc_score(
    np.repeat([1, 0], 200), -np.concatenate(losses)
  )
  attack = metrics.threshold_attack(*sides)
  assert attack.auc == pytest.approx(expected, abs=1e-12)
  # The curve that is kept for plots has all of the area but its thinning.
  fpr, tpr = attack.roc
  assert len(fpr) <= 202
  assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
  assert np.all(np.diff(fpr) >= 0)
  assert np.all(np.diff(tpr) >= 0)
  assert np.trapezoid(tpr, fpr) == pytest.approx(expected, abs=0.02)


def test_members_found_at_low_false_positive_rates_by_hand():
  # 50 members lead, 5 non-members follow, then 100 members; the rest tie.
  members = np.repeat([10.0, 8.0, 0.0], [50, 100, 850])
  others = np.repeat([9.0, 0.0], [5, 995])
  attack = metrics.threshold_attack(*binary(members), *binary(others))
  assert attack.tpr == {"0.01": 0.15, "0.001": 0.05}
  # A rate of just 1 % counts as at most 1 %.
  others = np.repeat([9.0, 0.0], [10, 990])
  attack = metrics.threshold_attack(*binary(members), *binary(others))
  assert attack.tpr == {"0.01": 0.15, "0.001": 0.05}
  # A rate of 0.1 % is less than one of 200 images.
  attack = metrics.threshold_attack(
    *binary(members[:200]), *binary(others[-200:])
  )
  assert attack.tpr == {"0.01": 0.75, "0.001": None}


def test_the_same_seed_gives_the_same_figures():
  rng = np.random.default_rng(6)
  sides = (*model(rng, 300), *model(rng, 120))
  for attack in all_attacks().values():
    first, second = attack(*sides, seed=3), attack(*sides, seed=3)
    assert (first.accuracy, first.auc) == (second.accuracy, second.auc)
    assert first.accuracy != attack(*sides, seed=4).accuracy


@pytest.mark.parametrize("name", all_attacks())
def test_too_few_images_are_no_zero(name):
  rng = np.random.default_rng(7)
  attack = all_attacks()[name]
  with pytest.raises(metrics.NotAvailableError, match="0 images of the same"):
    attack(*model(rng, 100, label=0), *model(rng, 100, label=1))
  with pytest.raises(metrics.NotAvailableError) as caught:
    attack(*model(rng, 100, label=0), *model(rng, 19, label=0))
  assert caught.value.reason == (
    "100 members and 19 non-members have 19 images of the same classes in"
    " common, and 20 are needed"
  )
  broken = model(rng, 30, label=0)
  broken[0][4, 1] = np.nan
  with pytest.raises(metrics.NotAvailableError, match="in 1 of 30 rows"):
    attack(*broken, *model(rng, 30, label=0))


def test_bad_arguments():
  rng = np.random.default_rng(8)
  sides = (*model(rng, 30), *model(rng, 30))
  with pytest.raises(ValueError, match="did you mean 'confidence'"):
    metrics.threshold_attack(*sides, score="confidense")
  with pytest.raises(ValueError, match="num_folds must be an integer"):
    metrics.logistic_attack(*sides, num_folds=1)
  with pytest.raises(ValueError, match=r"labels must be in \[0, 4\), got 4"):
    metrics.label_losses(sides[0], np.full(30, 4))
  with pytest.raises(ValueError, match="two classes or more"):
    metrics.entropies(np.zeros((3, 1)))
