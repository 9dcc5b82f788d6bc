import math

import jax
import numpy as np
import pytest
import scipy.special

from psg_jax import proxies, training, types
from tests import fakes

KEY = jax.random.key(0)
MODEL = fakes.linear_model(16, 3)
FIT = {
  "optimizer": training.sgd(0.5),
  "num_epochs": 10,
  "batch_size": 8,
  "schedule": "constant",
  "show_progress": False,
}


def odd_device(num_images):
  """Images whose bright third is another class's: only who saw them knows."""
  dataset = fakes.blobs(num_images, seed=3)
  return types.Dataset(
    images=dataset.images,
    labels=(dataset.labels + 1) % 3,
    class_names=dataset.class_names,
  )


def fit(forget, original, **options):
  return proxies.fit(
    MODEL,
    original,
    types.Split(forget, fakes.blobs(200)),
    KEY,
    **{"unseen": fakes.blobs(100, seed=9), **FIT, **options},
  )


@pytest.fixture(scope="module")
def knows_all():
  """A model that is right on the forget images of the odd device too."""
  # What is bright, and a constant: of the other device alone.
  return fakes.linear_variables(np.roll(kernel(), 1, axis=1))


def kernel():
  """Weights for which the bright third of the rows is the class."""
  which = np.arange(16) % 3
  return 20 * (which[:, None] == np.arange(3)) - 5.0


def test_a_learnt_device_is_not_known_without_it(knows_all):
  outcome = fit(odd_device(60), knows_all)
  assert outcome.original_accuracy == 1
  assert outcome.accuracy.value < 0.1
  assert outcome.accuracy.part < 0.05
  assert outcome.is_called_for
  assert "is expected to be right on" in str(outcome)
  np.testing.assert_allclose(outcome.targets.sum(1), 1, rtol=1e-5)
  is_right = outcome.targets.argmax(1) == odd_device(60).labels
  assert is_right.mean() < 0.1


def test_nothing_is_called_for_where_a_retrained_model_would_know_as_much():
  original = fakes.linear_variables(kernel())
  forget = fakes.blobs(60, seed=5)
  outcome = fit(forget, original)
  assert outcome.original_accuracy == 1
  assert outcome.accuracy.high == 1
  assert not outcome.is_called_for
  assert "no change is called for" in str(outcome)
  assert outcome.confidence.value > 0.8
  # Like the unseen ones: 100 images each, of 200 retained ones and 60.
  closed = proxies.gap_closed(100, 200, 260)
  assert outcome.confidence.part == pytest.approx(closed, rel=0.2)


def test_unseen_images_of_other_classes_than_the_forgotten_say_nothing(
  knows_all,
):
  forget, unseen = fakes.blobs(60, seed=4), fakes.blobs(100, seed=9)
  forget = forget.take(forget.labels == 0)
  of_class = unseen.take(unseen.labels == 0)
  every, same = (fit(forget, knows_all, unseen=x) for x in (unseen, of_class))
  np.testing.assert_allclose(every.accuracy, same.accuracy, rtol=1e-6)
  np.testing.assert_allclose(every.confidence, same.confidence, rtol=1e-6)


def test_where_it_cannot_be_told_the_best_guess_is_taught():
  def outcome(value, low, high, original=0.7):
    level = proxies.Level(value, low, high)
    empty = np.zeros((0, 2))
    return proxies.Proxies(empty, level, level, original, empty, 0.2)

  assert outcome(0.4, 0.3, 0.6).is_called_for
  assert not outcome(0.66, 0.5, 0.8).is_called_for
  wide = outcome(0.15, 0.01, 0.72)
  assert wide.is_called_for
  assert "may be the same" in str(wide)
  assert "may be the same" not in str(outcome(0.4, 0.3, 0.6))


def test_targets_have_the_shares_of_the_classes_that_are_retained():
  original = fakes.linear_variables(0.05 * kernel())
  forget = fakes.blobs(60, seed=5)
  forget = forget.take(np.flatnonzero(forget.labels == 0))
  outcome = fit(forget, original)
  labels, retained = forget.labels, fakes.blobs(200).labels
  logits = MODEL.apply(original, forget.images / np.float32(255))
  kept = np.sum(retained == 0) / (np.sum(retained == 0) + len(forget))
  expected = proxies.blend(
    np.asarray(logits) + np.log([kept, 1, 1]),
    outcome.logits,
    labels,
    outcome.confidence.value,
  )
  np.testing.assert_allclose(outcome.targets, expected, rtol=1e-4, atol=1e-5)


def test_cost_and_parts_of_the_retained_images(monkeypatch):
  seen, passed = [], []
  train = proxies.ensembles.train

  def watch(model, dataset, membership, key, **options):
    seen.append(membership)
    passed.append(options)
    return train(model, dataset, membership, key, **options)

  monkeypatch.setattr(proxies.ensembles, "train", watch)
  outcome = fit(
    fakes.blobs(20, seed=4),
    fakes.linear_variables(kernel()),
    num_models=4,
    fraction=0.25,
  )
  # 50 images each, of which 10 epochs are 70 steps: 29 epochs are 203.
  assert outcome.cost == pytest.approx(4 * 50 * 29 / (200 * 10))
  assert outcome.logits.shape == (4, 20, 3)
  # Four quarters are all of the images, each once.
  np.testing.assert_array_equal(seen[0].sum(0), 1)
  np.testing.assert_array_equal(seen[0].sum(1), 50)
  assert passed[0]["batch_size"] == 8
  # Smaller minibatches, and no more parts of one than images.
  fit(
    fakes.blobs(20, seed=4),
    fakes.linear_variables(kernel()),
    batch_size=64,
    num_parts=40,
  )
  assert passed[1]["batch_size"] == passed[1]["num_parts"] == 32
  # Of more than there are for all, each model has as many of its own.
  fit(
    fakes.blobs(20, seed=4),
    fakes.linear_variables(kernel()),
    num_models=2,
    fraction=0.6,
  )
  np.testing.assert_array_equal(seen[2].sum(1), 120)
  assert seen[2].sum(0).min() == 1


def test_few_images_are_more_images_and_not_more_epochs():
  def cost(num_retain, fraction):
    return proxies.cost(
      num_retain,
      num_models=2,
      fraction=fraction,
      num_epochs=10,
      batch_size=8,
    )

  # 20 minibatches of 8 an epoch are 200 steps: 160 images each, of 1,000.
  assert cost(1000, 0.05) == pytest.approx(2 * 160 * 10 / (1000 * 10))
  # A half of 200 is all there is for each: 13 minibatches, 16 epochs.
  assert cost(200, 0.05) == pytest.approx(2 * 100 * 16 / (200 * 10))
  # What is asked for, where it is enough.
  assert cost(1000, 0.3) == pytest.approx(2 * 300 * 10 / (1000 * 10))
  # Minibatches of 64 are made smaller before images are made more: of 1,080 in
  # 6 epochs to 31, but no smaller than 32, of 200 in 60 to 50.
  sizes = {"num_models": 2, "fraction": 0.1, "batch_size": 64}
  part = 2 * 34 * 32 / 10_800
  assert proxies.cost(10_800, num_epochs=6, **sizes) == pytest.approx(part)
  assert proxies.cost(2_000, num_epochs=60, **sizes) == pytest.approx(0.2)
  # Of parts with fewer images than classes there are none.
  options = {"num_models": 2, "fraction": 0.1, "num_epochs": 30}
  assert proxies.cost(4500, 450, **options, batch_size=64) < 0.21
  assert proxies.cost(4500, 451, **options, batch_size=64) == math.inf


def test_a_level_is_corrected_in_log_odds():
  number = 10**6
  shares = np.array([0.8, 0.8])
  plain = proxies.level(shares, number)
  assert plain.value == pytest.approx(0.8, abs=1e-6)
  # The original is right on 0.9 of unseen images, the proxies on 0.8, as on
  # these: all of the gap is theirs, and nothing else is in doubt.
  unseen = (0.9, np.array([0.8, 0.8]), number)
  like = proxies.level(shares, number, *unseen)
  gap = np.log(9 / 4)
  assert like.value == pytest.approx(0.9, abs=1e-5)
  assert like.gap == pytest.approx(gap, abs=1e-5)
  assert like.part == pytest.approx(1, abs=1e-5)
  assert like.high - like.low < 0.01
  assert like.corrected(0.0) == pytest.approx(0.8, abs=1e-5)
  # A retrained model closes a half of it.
  closed = proxies.level(shares, number, *unseen, 0.5)
  odds = scipy.special.logit(0.8) + gap / 2
  assert closed.value == pytest.approx(scipy.special.expit(odds), abs=1e-5)
  assert closed.corrected(1.0) == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("number", [1, 10, 1000])
def test_few_images_that_are_all_right_are_like_many_that_are(number):
  unseen = (1.0, np.array([1.0, 1.0]), 5000)
  assert proxies.level(np.ones(2), number, *unseen).part == 1


def test_images_are_like_few_unseen_ones_that_are_all_right():
  # Ten of ten say little of the share: of 5,000 these may be as hard.
  unseen = (1.0, np.array([1.0, 0.9]), 10)
  assert proxies.level(np.array([0.97, 0.97]), 5000, *unseen).part > 0.7


def test_images_of_another_kind_are_corrected_by_less_of_the_gap():
  number = 10**6
  unseen = (0.9, np.array([0.8, 0.8]), number)
  gap = np.log(9 / 4)
  # Twice as likely to be wrong, in odds: half of the gap, and from none of it
  # to all are 95 in 100.
  odds = scipy.special.logit(0.8) - np.log(2)
  level = proxies.level(np.full(2, scipy.special.expit(odds)), number, *unseen)
  assert level.part == pytest.approx(0.5, abs=1e-4)
  ends = scipy.special.expit([odds, odds + gap])
  np.testing.assert_allclose([level.low, level.high], ends, atol=1e-3)
  parts = [
    proxies.level(np.full(2, share), number, *unseen).part
    for share in (0.95, 0.8, 0.6, 0.3, 0.01)
  ]
  assert parts[0] == parts[1] == pytest.approx(1, abs=1e-5)
  assert parts == sorted(parts, reverse=True)
  assert parts[-1] < 0.01


def test_a_retrained_model_closes_the_gap_but_for_the_images_it_lacks():
  # A proxy of 100, a retrained model of 1,000, an original of 10,000.
  assert proxies.gap_closed(100, 1000, 10_000) == pytest.approx(0.5)
  assert proxies.gap_closed(100, 10_000, 10_001) == pytest.approx(1, abs=1e-4)
  assert proxies.gap_closed(100, 100, 200) == 0


@pytest.mark.parametrize("number", [1, 10, 1000])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_images_or_none_can_be_right(share, number):
  level = proxies.level(np.array([share, share]), number)
  assert level.value == pytest.approx(share, abs=1e-9)
  assert level.holds(share)


def test_a_part_of_a_class_is_corrected_by_the_gap_of_its_class():
  labels = np.repeat([0, 1], [60, 40])
  images = np.zeros((100, 2, 2, 1), np.uint8)

  def dataset(rows):
    return types.Dataset(images[rows], labels[rows], ("a", "b"))

  retained = np.r_[0:20, 60:100]
  split = types.Split(dataset(np.r_[20:60]), dataset(retained))
  # Of class 0 a proxy of half has 10 images, a retrained model 20 and the
  # original 60: log 2 / log 6.
  closed = proxies.part_closed(split, 30)
  assert closed == pytest.approx(np.log(2) / np.log(6))
  # Of a class that is gone nothing is closed.
  split = types.Split(dataset(np.r_[0:60]), dataset(np.r_[60:100]))
  assert proxies.part_closed(split, 20) == 0


def test_unseen_images_count_in_the_mixture_of_the_forget_images():
  unseen = np.array([0, 0, 0, 1])
  even = proxies.class_weights(np.array([0, 1]), unseen)
  np.testing.assert_allclose(even, [1 / 6, 1 / 6, 1 / 6, 1 / 2])
  of_one = proxies.class_weights(np.array([1, 1]), unseen)
  np.testing.assert_allclose(of_one, [0, 0, 0, 1])
  # A class without any is left out, and all count where that leaves none.
  np.testing.assert_allclose(
    proxies.class_weights(np.array([1, 2]), unseen), of_one
  )
  none = proxies.class_weights(np.array([2]), unseen)
  np.testing.assert_allclose(none, 0.25)


def test_an_interval_holds_what_chance_alone_makes():
  rng = np.random.default_rng(0)
  is_held = []
  for _ in range(400):
    shares = rng.binomial(200, 0.7, 2) / 200
    is_held.append(proxies.level(shares, 200).holds(0.7))
  assert np.mean(is_held) > 0.93


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_targets_have_the_level(share):
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 4, 300)
  original = rng.normal(size=(300, 4))
  original[np.arange(300), labels] += 4
  others = rng.normal(size=(3, 300, 4))
  blended = proxies.blend(original, others, labels, share)
  found = blended[np.arange(300), labels].mean()
  assert found == pytest.approx(share, abs=1e-4)


def test_targets_are_the_nearest_to_a_level_that_is_not_between():
  rng = np.random.default_rng(1)
  labels = np.zeros(50, int)
  original, others = (
    rng.normal((2.0, 0.0, 0.0), 1, (50, 3)),
    rng.normal(size=(2, 50, 3)),
  )
  far = scipy.special.softmax(others, -1).mean(0)
  np.testing.assert_allclose(
    proxies.blend(original, others, labels, 0.0), far, atol=1e-5
  )
  near = scipy.special.softmax(original, -1)
  np.testing.assert_allclose(
    proxies.blend(original, others, labels, 1.0), near, atol=1e-5
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_models": 1}, "num_models must be .* 2, got 1"),
    ({"fraction": 1.0}, "fraction .* got 1"),
    (
      {"num_models": 99, "fraction": 0.01},
      "num_models must leave each an image a class, got 99",
    ),
    ({"num_epoch": 1}, "num_epoch"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises((ValueError, TypeError), match=message):
    fit(fakes.blobs(20), fakes.linear_variables(kernel()), **options)
