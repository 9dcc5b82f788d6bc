import jax
import numpy as np
import pytest

from psg_jax import levels, relabelling, types


def test_targets_at_an_accuracy_known():
  # Of two classes, the old one is right with .9, .8, .7 and .6.
  sure = np.array([0.9, 0.8, 0.7, 0.6])
  logits = np.log(np.stack([sure, 1 - sure], -1))
  labels = np.zeros(4, int)
  others = np.tile([0.0, 1.0], (4, 1))

  def moved(level):
    return levels.at_accuracy(others, logits, labels, level)

  assert np.argmax(moved(0.5), -1).tolist() == [0, 0, 1, 1]

  def less(odds):
    return sure * odds / (sure * odds + 1 - sure)

  # That of .7 is then half: the first of the two that had to change.
  np.testing.assert_allclose(moved(0.5)[:, 0], less(3 / 7), atol=1e-6)
  np.testing.assert_allclose(moved(1.0)[:, 0], sure, atol=1e-6)
  np.testing.assert_allclose(moved(0.0)[:, 0], less(1 / 9), atol=1e-6)
  # A class that is gone is named by none, whatever is right elsewhere.
  logits[:, 0] = -np.inf
  np.testing.assert_array_equal(moved(1.0), others)


def test_targets_at_an_accuracy_leave_what_is_sure():
  # One image in ten is in doubt: the others stay what they were.
  logits = np.zeros((20, 3))
  logits[:, 0] = np.where(np.arange(20) % 10 == 0, 0.1, 8.0)
  labels = np.zeros(20, int)
  others = np.tile([0.0, 0.5, 0.5], (20, 1))
  taught = levels.at_accuracy(others, logits, labels, 0.9)
  assert np.mean(taught.argmax(-1) == 0) == 0.9
  was = jax.nn.softmax(logits)[:, 0]
  np.testing.assert_allclose(taught[1:10, 0], was[1:10], atol=1e-4)
  # Half of those that are all but sure, and a little surer ones.
  logits[:, 0] = 60.0 + np.arange(20)
  taught = levels.at_accuracy(others, logits, labels, 0.5)
  assert (taught.argmax(-1) == 0).tolist() == [False] * 10 + [True] * 10


def test_prior_shift_known():
  def split(forget, retain):
    parts = [
      types.Dataset(
        images=np.zeros((len(labels), 2, 2, 1), np.uint8),
        labels=np.array(labels, np.int32),
        ids=np.array([str(x) for x in range(len(labels))]),
        class_names=tuple("abcd"),
      )
      for labels in (forget, retain)
    ]
    return types.Split(*parts)

  # A third of class 0, all of class 1, nothing of class 2; of 3 there is none.
  shift = levels.prior_shift(split([0, 1, 1], [0, 0, 2]))
  np.testing.assert_allclose(np.exp(shift), [2 / 3, 0, 1, 1], rtol=1e-6)
  assert not levels.prior_shift(split([0, 1], [])).any()


def test_targets_at_an_accuracy_name_no_class_that_is_gone():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
  gone = np.array([2])
  others = relabelling.soft_targets(
    logits, labels="soft_other", old_labels=labels, gone=gone
  )
  logits[:, gone] = -np.inf
  taught = levels.at_accuracy(others, logits, labels, 0.2)
  np.testing.assert_allclose(taught.sum(-1), 1, rtol=1e-5)
  assert taught[:, 2].max() == 0
  assert np.mean(taught.argmax(-1) == labels) == pytest.approx(0.2, abs=0.021)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_any_level_can_be_taught_however_sure_the_original_is(scale):
  logits = np.zeros((10, 2))
  logits[:, 0] = scale * (1 + np.arange(10))
  others = np.tile([0.0, 1.0], (10, 1))
  for number in range(11):
    taught = levels.at_accuracy(others, logits, np.zeros(10, int), number / 10)
    assert np.sum(taught.argmax(-1) == 0) == number
    np.testing.assert_allclose(taught.sum(-1), 1, rtol=1e-6)


def test_a_class_that_is_left_alone_is_taught():
  # The other of two is gone, and nothing can be taught in its place.
  logits = np.array([[3.0, -np.inf], [-np.inf, 2.0]])
  taught = levels.at_accuracy(np.eye(2), logits, np.array([0, 0]), 0.0)
  np.testing.assert_array_equal(taught, np.eye(2))


def test_a_level_is_reached_within_the_chance_of_so_many_images():
  def is_reached(share, level=0.5, **options):
    return levels.is_reached(share, level, 100, **options)

  # A standard deviation is 5 of 100.
  assert is_reached(0.4)
  assert is_reached(0.54)
  assert not is_reached(0.56)
  assert is_reached(0.5, is_taught=False)
  assert not is_reached(0.51, is_taught=False)
  # Nothing is by chance where none is to be right, or all.
  assert is_reached(0.0, level=0.0)
  assert not is_reached(0.01, level=0.0)
  assert is_reached(1.0, level=1.0)


def test_a_cycle_that_brings_a_model_no_nearer_is_the_last():
  labels = np.zeros(100, int)

  def logits(share):
    return np.eye(2)[(np.arange(100) >= 100 * share).astype(int)]

  is_last = levels.stop_fn(labels, 0.5, True)
  # What the first cycle brought is no reason to stop.
  assert not is_last(logits(0.9), True)
  assert not is_last(logits(0.9), False)
  assert not is_last(logits(0.8), False)
  assert is_last(logits(0.76), False)
  # Nor is it where the level is in no target.
  is_last = levels.stop_fn(labels, 0.5, False)
  assert not is_last(logits(0.9), False)
  assert not is_last(logits(0.9), False)
  assert is_last(logits(0.5), False)
