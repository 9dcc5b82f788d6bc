import json
import math

import numpy as np
import pytest

from psg_jax import metrics, verification

SPLIT = "test_retain"


def logits_of(predictions, num_classes=3, scale=5.0):
  """Logits whose largest is at the predictions, of any shape."""
  return scale * np.eye(num_classes)[np.asarray(predictions)]


def noisy(labels, error_rate, rng, base=None, flip_rate=0.0):
  """Predictions that are wrong at a rate, or a base with some flipped."""
  if base is None:
    base = np.where(rng.random(labels.shape) < error_rate, 1 - labels, labels)
  return np.where(rng.random(base.shape) < flip_rate, 1 - base, base)


def compare(retrained, unlearned, labels, **options):
  return verification.compare(
    None if retrained is None else {SPLIT: retrained},
    {SPLIT: unlearned},
    {SPLIT: labels},
    **{"num_resamples": 500, **options},
  )


def test_identical_logits_are_equivalent_in_all():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 400)
  logits = rng.normal(size=(400, 3))
  result = compare([logits] * 3, np.array([[logits, logits]] * 2), labels)
  assert result.verdict == verification.EQUIVALENT
  for each in result.comparisons:
    assert each.difference == pytest.approx(0, abs=1e-12)
    assert each.verdict == verification.EQUIVALENT
  accuracy = result.get("accuracy", SPLIT)
  assert accuracy.unlearned == metrics.accuracy(logits, labels)
  # The rule of three: no image of 400 differs, 1 - 0.05^(1/400) may.
  np.testing.assert_allclose(accuracy.interval, [-0.00746, 0.00746], atol=1e-5)
  assert accuracy.training_std == accuracy.unlearning_std == 0
  assert result.get("agreement", SPLIT).retrained == pytest.approx(1)
  json.dumps(result.as_dict())
  assert "overall: equivalent" in str(result)


def test_shifted_accuracy_is_not_equivalent():
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 2, 2000)
  retrained = logits_of([noisy(labels, 0.1, rng) for _ in range(3)])
  unlearned = logits_of([[noisy(labels, 0.3, rng)] for _ in range(3)])
  result = compare(retrained, unlearned, labels)
  each = result.get("accuracy", SPLIT)
  assert each.verdict == verification.NOT_EQUIVALENT
  assert result.verdict == verification.NOT_EQUIVALENT
  assert each.difference == pytest.approx(-0.2, abs=0.03)
  assert each.interval[0] < each.difference < each.interval[1] < -0.02
  # The same difference within another margin.
  wide = compare(retrained, unlearned, labels, margins={"accuracy": 0.5})
  assert wide.get("accuracy", SPLIT).verdict == verification.EQUIVALENT
  one = {"accuracy": 0.01, f"accuracy/{SPLIT}": 0.5}
  wide = compare(retrained, unlearned, labels, margins=one)
  assert wide.get("accuracy", SPLIT).verdict == verification.EQUIVALENT


def test_few_images_cannot_tell_even_where_nothing_differs():
  labels = np.zeros(20, int)
  logits = logits_of(labels)
  each = compare([logits] * 3, np.array([[logits]] * 3), labels).get(
    "accuracy", SPLIT
  )
  assert each.difference == 0
  assert each.verdict == verification.CANNOT_TELL
  assert each.interval[1] == pytest.approx(1 - 0.05 ** (1 / 20))
  assert any("across the margin" in reason for reason in each.reasons)


def test_one_retrained_seed_cannot_tell_and_says_so():
  labels = np.zeros(5000, int)
  logits = logits_of(labels)
  result = compare([logits], np.array([[logits]] * 3), labels)
  for each in result.comparisons:
    assert each.verdict == verification.CANNOT_TELL
    assert "one retrained seed" in each.reasons[0]
  assert result.get("accuracy", SPLIT).difference == 0
  assert result.get("agreement", SPLIT).unlearned == 1
  assert result.get("agreement", SPLIT).retrained is None
  assert "one retrained seed" in str(result)
  # However far it is off.
  wrong = logits_of(np.ones((3, 1, 5000), int))
  assert compare([logits], wrong, labels).verdict == verification.CANNOT_TELL


def test_two_retrained_seeds_tell_accuracies_but_no_distances():
  labels = np.zeros(5000, int)
  logits = logits_of(labels)
  result = compare([logits] * 2, np.array([[logits]] * 3), labels)
  assert result.get("accuracy", SPLIT).verdict == verification.EQUIVALENT
  each = result.get("agreement", SPLIT)
  assert each.verdict == verification.CANNOT_TELL
  assert "one pair" in each.reasons[0]
  assert each.retrained == 1


def test_noise_floor_and_distances_by_hand():
  rng = np.random.default_rng(2)
  labels = rng.integers(0, 3, 50)
  retrained = rng.normal(size=(3, 50, 3))
  unlearned = rng.normal(size=(2, 2, 50, 3))
  result = compare(retrained, unlearned, labels)
  flat = unlearned.reshape(4, 50, 3)
  pairs = [(s, t) for s in range(3) for t in range(3) if s != t]
  kl = result.get("kl_divergence", SPLIT)
  assert kl.unlearned == pytest.approx(
    np.mean([metrics.kl_divergence(r, u) for r in retrained for u in flat])
  )
  assert kl.retrained == pytest.approx(
    np.mean(
      [metrics.kl_divergence(retrained[s], retrained[t]) for s, t in pairs]
    )
  )
  agreement = result.get("agreement", SPLIT)
  assert agreement.unlearned == pytest.approx(
    np.mean([metrics.agreement(u, r) for r in retrained for u in flat])
  )
  assert agreement.retrained == pytest.approx(
    np.mean([metrics.agreement(retrained[s], retrained[t]) for s, t in pairs])
  )
  assert kl.difference == pytest.approx(kl.unlearned - kl.retrained)


def test_nearer_than_the_noise_floor_is_no_fault():
  rng = np.random.default_rng(3)
  labels = rng.integers(0, 2, 3000)
  base = noisy(labels, 0.2, rng)
  retrained = [noisy(labels, 0, rng, base, 0.1) for _ in range(4)]
  # The base is nearer to each of them than they are to each other.
  result = compare(
    logits_of(retrained), logits_of([[base]] * 3), labels, num_resamples=200
  )
  agreement = result.get("agreement", SPLIT)
  assert agreement.difference > 0.05 > agreement.margin
  assert agreement.verdict == verification.EQUIVALENT
  kl = result.get("kl_divergence", SPLIT)
  assert kl.difference < -0.05
  assert kl.verdict == verification.EQUIVALENT
  # Further away than they are, it is.
  far = [[noisy(labels, 0, rng, base, 0.3)] for _ in range(3)]
  result = compare(
    logits_of(retrained), logits_of(far), labels, num_resamples=200
  )
  for name in ("agreement", "kl_divergence"):
    assert result.get(name, SPLIT).verdict == verification.NOT_EQUIVALENT


def test_pairing_by_image_narrows_the_interval():
  rng = np.random.default_rng(4)
  labels = rng.integers(0, 2, 2000)
  base = noisy(labels, 0.3, rng)
  retrained = logits_of([base] * 3)
  unlearned = logits_of([[noisy(labels, 0, rng, base, 0.01)]] * 3)
  each = compare(retrained, unlearned, labels).get("accuracy", SPLIT)
  # Two independent samples of accuracy 0.7 would differ by this much.
  unpaired = 2 * 1.645 * math.sqrt(2 * 0.3 * 0.7 / 2000)
  assert each.interval[1] - each.interval[0] < unpaired / 3


def test_seeds_far_apart_widen_the_interval():
  rng = np.random.default_rng(5)
  labels = rng.integers(0, 2, 3000)
  good, bad = (logits_of(noisy(labels, rate, rng)) for rate in (0.1, 0.2))
  calm = np.array([[good, good], [good, good], [good, good]])

  def width(retrained, unlearned):
    low, high = (
      compare(retrained, unlearned, labels).get("accuracy", SPLIT).interval
    )
    return high - low

  narrow = width([good] * 3, calm)
  assert narrow < 0.01
  assert width([good, good, bad], calm) > 10 * narrow
  by_training_seed = np.array([[good, good], [good, good], [bad, bad]])
  assert width([good] * 3, by_training_seed) > 10 * narrow
  # With one training seed, unlearning seeds alone; six say more than two.
  two = width([good] * 3, np.array([[good, bad]]))
  six = width([good] * 3, np.array([[good, bad] * 3]))
  assert two > 2 * six > 5 * narrow


def test_training_and_unlearning_seeds_are_kept_apart():
  labels = np.zeros(100, int)

  def model(num_wrong):
    return logits_of((np.arange(100) < num_wrong).astype(int))

  # Means over unlearning seeds 0.95 and 0.85; ± 0.05 within.
  unlearned = np.array([[model(0), model(10)], [model(10), model(20)]])
  each = compare([model(0)] * 3, unlearned, labels).get("accuracy", SPLIT)
  assert each.unlearned == pytest.approx(0.9)
  assert each.training_std == pytest.approx(np.std([0.95, 0.85], ddof=1))
  assert each.unlearning_std == pytest.approx(math.sqrt(0.01 / 2))
  assert each.retrained_std == 0
  # A training seed counts the same, however many unlearning runs it has.
  ragged = {7: np.array([model(0)]), 9: np.array([model(10), model(20)])}
  each = compare([model(0)] * 3, ragged, labels).get("accuracy", SPLIT)
  assert each.unlearned == pytest.approx((1 + 0.85) / 2)


def test_one_original_is_a_verdict_about_this_model():
  labels = np.zeros(1000, int)
  logits = logits_of(labels)
  result = compare([logits] * 3, np.array([[logits]]), labels)
  assert result.verdict == verification.EQUIVALENT
  assert "this model alone" in result.comparisons[0].reasons[0]


@pytest.mark.parametrize("num_training_seeds", [1, 3])
def test_interval_covers_the_truth(num_training_seeds):
  # Accuracies with image noise, of seeds that differ: models' error rates vary
  # by ± 0.03 around 0.2 and 0.25, so that the true difference is -0.05.
  rng = np.random.default_rng(6)
  num_runs, num_images, is_covered = 150, 300, []
  labels = np.zeros(num_images, int)
  for _ in range(num_runs):
    difficulty = rng.random(num_images)

    def model(rate, difficulty=difficulty):
      rate = rate + 0.03 * rng.normal()
      flipped = rng.random(num_images) < 0.1
      new = rng.random(num_images)
      return logits_of((np.where(flipped, new, difficulty) < rate).astype(int))

    retrained = np.array([model(0.2) for _ in range(3)])
    unlearned = np.array(
      [[model(0.25)] for _ in range(3)]
      if num_training_seeds == 3
      else [[model(0.25) for _ in range(3)]]
    )
    low, high = (
      compare(retrained, unlearned, labels, num_resamples=200)
      .get("accuracy", SPLIT)
      .interval
    )
    is_covered.append(low <= -0.05 <= high)
  # 90 % is asked for; the standard error of the estimate is 2.5 %.
  assert 0.84 <= np.mean(is_covered) <= 0.985


def test_groups_are_drawn_as_a_whole():
  # Each patient has 20 images of the same outcome: 50 things, not 1000.
  rng = np.random.default_rng(7)
  patients = rng.permutation(np.repeat(np.arange(50), 20))
  wrong = rng.random(50) < 0.3
  labels = np.zeros(1000, int)
  unlearned = logits_of([[wrong[patients].astype(int)]] * 3)
  retrained = logits_of([labels] * 3)

  def width(groups):
    each = compare(retrained, unlearned, labels, groups=groups).get(
      "accuracy", SPLIT
    )
    assert each.difference == pytest.approx(-wrong.mean())
    return each.interval[1] - each.interval[0]

  ratio = width({SPLIT: patients}) / width(None)
  assert ratio == pytest.approx(math.sqrt(20), rel=0.2)


def test_user_statistics_by_image_and_as_a_number():
  rng = np.random.default_rng(8)
  labels = rng.integers(0, 2, 300)
  retrained = logits_of([noisy(labels, 0.1, rng) for _ in range(3)])
  unlearned = logits_of([[noisy(labels, 0.3, rng)] for _ in range(2)])

  def by_image(logits, labels):
    return np.argmax(logits, -1) == labels

  def as_number(logits, labels):
    return np.mean(by_image(logits, labels))

  result = compare(
    retrained,
    unlearned,
    labels,
    statistics={"by_image": by_image, "as_number": as_number},
    margins={"by_image": 0.02, "as_number": 0.02},
  )
  accuracy, first, second = (
    result.get(name, SPLIT) for name in ("accuracy", "by_image", "as_number")
  )
  for each in (first, second):
    assert each.difference == pytest.approx(accuracy.difference)
    # All share the resamples.
    np.testing.assert_allclose(each.interval, accuracy.interval)
    assert each.verdict == accuracy.verdict


def test_seed_decides_and_a_further_split_changes_nothing():
  rng = np.random.default_rng(9)
  labels = rng.integers(0, 2, 100)
  retrained = logits_of([noisy(labels, 0.2, rng) for _ in range(3)])
  unlearned = logits_of([[noisy(labels, 0.2, rng)]])
  first = compare(retrained, unlearned, labels)
  assert first == compare(retrained, unlearned, labels)
  assert first != compare(retrained, unlearned, labels, seed=1)
  both = verification.compare(
    {SPLIT: retrained, "test_forget": retrained[:, :0]},
    {SPLIT: unlearned, "test_forget": unlearned[:, :, :0]},
    {SPLIT: labels, "test_forget": labels[:0]},
    num_resamples=500,
  )
  assert both.get("accuracy", SPLIT) == first.get("accuracy", SPLIT)
  empty = both.get("accuracy", "test_forget")
  assert empty.unlearned is None
  assert empty.reasons == ("the split has no images",)
  assert both.verdict == first.verdict


def test_without_a_reference_values_and_claims_remain():
  labels = np.zeros(50, int)
  logits = logits_of(labels)
  result = compare(None, np.array([[logits]]), labels)
  each = result.get("accuracy", SPLIT)
  assert (each.unlearned, each.retrained, each.interval) == (1, None, None)
  assert each.reasons[0] == "there is no retrained reference"
  assert result.verdict == verification.CANNOT_TELL
  assert "no retrained reference" in str(result)
  json.dumps(result.as_dict())
  assert any("agreement with" in claim for claim in result.claims.cannot)
  assert "Cannot be claimed" in str(result.claims)


def test_claims_grow_with_the_references():
  def holds(words, claims):
    return any(words in claim for claim in claims.can)

  for number, expected in enumerate(
    [(False,) * 3, (True, False, False), (True, True, False), (True,) * 3]
  ):
    claims = verification.claims(number)
    found = tuple(
      holds(words, claims)
      for words in ("agreement with", "noise floor", "as near to")
    )
    assert found == expected
    assert not set(claims.can) & set(claims.cannot)
    assert any("formal guarantee" in claim for claim in claims.cannot)
  assert not holds("other training runs", verification.claims(3))
  assert holds(
    "other training runs", verification.claims(3, num_training_seeds=3)
  )
  with pytest.raises(ValueError, match="num_retrained must be"):
    verification.claims(-1)


def test_bad_input():
  labels = np.zeros(10, int)
  logits = logits_of(labels)
  good = ([logits] * 2, np.array([[logits]]), labels)
  for arguments, options, message in [
    ((good[0], logits, labels), {}, r"unlearned\['test_retain'\] must be"),
    (([logits[:5]], good[1], labels), {}, r"retrained\['test_retain'\] must"),
    ((*good[:2], labels[:5]), {}, "must have as many images"),
    ((*good[:2], labels + 5), {}, r"labels must be in \[0, 3\)"),
    (([logits * np.nan] * 2, *good[1:]), {}, "must be finite, got NaN"),
    (good, {"margins": {"acuracy": 0.1}}, "did you mean 'accuracy'"),
    (good, {"margins": {"accuracy": 0}}, "the margin of accuracy must be"),
    (good, {"confidence": 1.0}, "confidence must be below 1, got 1.0"),
    (good, {"num_resamples": 10}, "num_resamples must be"),
    (good, {"groups": {SPLIT: labels[:3]}}, "groups"),
    (good, {"statistics": {"mine": lambda x, y: 0.0}}, "one for 'mine'"),
    (
      good,
      {"statistics": {"mine": lambda x, y: x}, "margins": {"mine": 1.0}},
      r"'mine' must give a number or \[10\], got \[10, 3\]",
    ),
  ]:
    with pytest.raises(ValueError, match=message):
      compare(*arguments, **options)
  with pytest.raises(ValueError, match="retrained must have the splits"):
    verification.compare({}, {SPLIT: good[1]}, {SPLIT: labels})
  with pytest.raises(ValueError, match="there is no statistic 'auc'"):
    compare(*good).get("auc", SPLIT)
