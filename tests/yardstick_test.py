"""The yardstick, on models whose distances are known."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from psg_jax import judgement, metrics, yardstick

FORGET, RETAIN = "test_forget", "test_retain"


def draw(rng, num_models, base, noise=0.5):
  """Models of one kind: noise an image and model, of a scale of the model."""
  scales = noise * np.exp(0.2 * rng.normal(size=(num_models, 1, 1)))
  return base + scales * rng.normal(size=(num_models, *base.shape))


def measure(retrained, unlearned, labels, **options):
  """On one split, the forget set's test images."""
  return yardstick.measure(
    {FORGET: retrained},
    {FORGET: unlearned},
    {FORGET: labels},
    **{"num_resamples": 200, **options},
  )


@pytest.fixture(scope="module")
def problem():
  """References that agree, in two splits, and labels they mostly get."""
  rng = np.random.default_rng(0)
  base = {FORGET: 2 * rng.normal(size=(300, 4)), RETAIN: None}
  base[RETAIN] = 2 * rng.normal(size=(400, 4))
  labels = {split: x.argmax(-1) for split, x in base.items()}
  return rng, base, labels


def test_distances_by_hand():
  # Three references that are right on 4, 3 and 2 of four images, and one more
  # model that is right on all.
  labels = np.zeros(4, int)
  right, wrong = np.log([0.8, 0.2]), np.log([0.4, 0.6])
  references = np.array([[right] * n + [wrong] * (4 - n) for n in (4, 3, 2)])
  unlearned = np.array([[right] * 4])[None]
  found = measure(references, unlearned, labels)
  far = found.distance("disagreement", FORGET)
  # To the model: 0, 1/4, 2/4; between references: 1/4, 2/4, 1/4.
  assert far.unlearned == pytest.approx(1 / 4)
  assert far.floor == pytest.approx(1 / 3)
  assert far.value == pytest.approx(3 / 4)
  np.testing.assert_allclose(far.references, [9 / 8, 3 / 4, 9 / 8])
  accuracy = found.distance("class_accuracy", FORGET)
  assert accuracy.value == pytest.approx(3 / 4)
  assert any("seeds alone" in reason for reason in accuracy.reasons)
  # KL of a reference that is wrong on an image and a model that is right.
  one = 0.4 * math.log(0.4 / 0.8) + 0.6 * math.log(0.6 / 0.2)
  other = 0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6)
  kl = found.distance("kl_divergence", FORGET)
  assert kl.unlearned == pytest.approx((0 + 1 + 2) * one / 4 / 3)
  assert kl.floor == pytest.approx((1 + 2 + 1) * (one + other) / 4 / 6)
  spread = found.spread(FORGET)
  assert spread.agreement == pytest.approx(2 / 3)
  assert spread.kl_divergence == pytest.approx(kl.floor)


def test_distance_to_the_mean_leaves_one_out():
  rng = np.random.default_rng(1)
  logits, model = rng.normal(size=(3, 5, 4)), rng.normal(size=(5, 4))
  found = measure(logits, model[None, None], np.zeros(5, int))
  each = found.distance("kl_to_mean", FORGET)
  p = scipy.special.softmax(logits, -1)
  q = scipy.special.softmax(model, -1)
  means = [np.delete(p, s, 0).mean(0) for s in range(3)]
  ours = [scipy.special.rel_entr(m, q).sum(-1).mean() for m in means]
  theirs = [
    scipy.special.rel_entr(m, own).sum(-1).mean()
    for m, own in zip(means, p, strict=True)
  ]
  assert each.unlearned == pytest.approx(np.mean(ours))
  assert each.floor == pytest.approx(np.mean(theirs))
  np.testing.assert_allclose(each.references, theirs / np.mean(theirs))


def test_levels_by_hand():
  # On many images, so that the deviation is that of the references.
  labels = np.zeros(1000, int)
  shares = (0.2, 0.3, 0.4)
  references = np.array(
    [
      np.where(np.arange(1000)[:, None] < 1000 * share, [1.0, 0], [0, 1.0])
      for share in shares
    ]
  )
  unlearned = np.tile([1.0, 0.0], (1, 1, 1000, 1))
  each = measure(references, unlearned, labels).level("accuracy", FORGET)
  assert (each.unlearned, each.retrained) == (1.0, pytest.approx(0.3))
  assert each.sd == pytest.approx(0.1)
  assert each.difference == pytest.approx(7)
  t = 7 / math.sqrt(1 + 1 / 3)
  # Student's t with two degrees of freedom in closed form.
  assert each.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
  # Two training seeds make a mean of two values.
  two = np.concatenate([unlearned, unlearned])
  each = measure(references, two, labels).level("accuracy", FORGET)
  t = 7 / math.sqrt(1 / 2 + 1 / 3)
  assert each.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
  probability = measure(references, two, labels).level(
    "true_class_probability", FORGET
  )
  high = math.e / (1 + math.e)
  assert probability.unlearned == pytest.approx(high)
  assert probability.retrained == pytest.approx(0.3 * high + 0.7 * (1 - high))


def test_references_without_deviation_have_that_of_chance():
  labels = np.zeros(50, int)
  references = np.tile([3.0, 0.0], (3, 50, 1))
  unlearned = references[None, :1].copy()
  unlearned[0, 0, 0] = [0.0, 3.0]
  found = measure(references, unlearned, labels)
  each = found.level("accuracy", FORGET)
  share = 51 / 52
  assert each.sd == pytest.approx(math.sqrt(share * (1 - share) / 50))
  assert "chance" in each.reasons[0]
  # One image of fifty is no reason to reject.
  assert each.p > 0.2
  far = found.distance("kl_divergence", FORGET)
  assert (far.value, far.interval) == (None, None)
  assert "do not differ" in far.reasons[0]
  verdict = judgement.judge(found)
  assert verdict.verdict == judgement.CANNOT_TELL
  assert "do not differ" in verdict.sentence


def test_another_retraining_is_at_one_and_covered():
  # Over repetitions: the mean ratio, and how often the interval holds 1.
  rng = np.random.default_rng(2)
  num_repetitions = 80
  values, num_covered = [], 0
  for _ in range(num_repetitions):
    base = 2 * rng.normal(size=(60, 4))
    models = draw(rng, 9, base)
    found = measure(models[:5], models[5:, None], base.argmax(-1))
    each = found.distance("kl_divergence", FORGET)
    values.append(
      [found.distance(x, FORGET).value for x in yardstick.DISTANCES[:3]]
    )
    num_covered += each.interval[0] <= 1 <= each.interval[1]
  mean, error = np.mean(values, 0), np.std(values, 0) / np.sqrt(len(values))
  # Four standard errors, and the bias of a ratio of means: that of 1 / floor,
  # the squared coefficient of variation of the floor, some 0.02 of 5 seeds.
  np.testing.assert_array_less(np.abs(mean - 1), 4 * error + 0.03)
  # Nominally 0.9: no fewer than a binomial of that share has in 999 of 1,000.
  assert num_covered >= scipy.stats.binom.ppf(0.001, num_repetitions, 0.9)
  # Nor are all covered by intervals that say nothing.
  assert each.interval[1] / each.interval[0] < 3


def test_twice_as_far_is_two():
  # References at the corners of a square, in an attack's figure: known ratio.
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(4, 30, 3))
  attack = yardstick.Attack([0.7 + 0.2], [0.4, 0.6, 0.6, 0.4], 500)
  found = measure(
    logits, logits[:1, None], np.zeros(30, int), attacks={"loss": attack}
  )
  each = found.distance("loss", None)
  # Pairs: 8 of 12 ordered ones are .2 apart; to the model .5 and .3.
  assert each.floor == pytest.approx(8 * 0.2 / 12)
  assert each.unlearned == pytest.approx(0.4)
  assert each.value == pytest.approx(3)
  assert each.interval[0] < 3 < each.interval[1]
  # KL to second order is a squared distance: noise of sqrt(3) times the
  # deviation puts a model at (1 + 3) / (1 + 1) = 2.
  base = rng.normal(size=(4000, 3))
  references = base + 0.02 * rng.normal(size=(5, 4000, 3))
  model = base + 0.02 * math.sqrt(3) * rng.normal(size=base.shape)
  found = measure(references, model[None, None], base.argmax(-1))
  each = found.distance("kl_divergence", FORGET)
  # 4,000 images of two degrees of freedom: a relative error of some 2 %.
  assert each.value == pytest.approx(2, abs=0.15)
  assert each.interval[0] > judgement.MARGIN
  verdict = judgement.judge(found)
  assert verdict.verdict == judgement.NOT_RETRAINED
  assert "kl_divergence/test_forget" in verdict.against


def test_another_retraining_is_told_to_be_one(problem):
  rng, base, labels = problem
  retrained = {s: draw(rng, 5, x, 0.2) for s, x in base.items()}
  # Near to all of them, with several training seeds.
  ours = {s: draw(rng, 6, x, 0.1)[:, None] for s, x in base.items()}
  found = yardstick.measure(retrained, ours, labels, num_resamples=200)
  verdict = judgement.judge(found)
  assert verdict.verdict == judgement.AS_RETRAINED
  assert not verdict.is_rejected
  assert "as near as another retraining" in verdict.sentence


def test_references_that_disagree_leave_the_level_alone():
  rng = np.random.default_rng(4)
  labels = np.zeros(200, int)
  # Each retrained model has classes of its own for most images; the original
  # is right on all, and no further from them than they from each other.
  references = 6 * np.eye(10)[rng.integers(0, 10, (3, 200))]
  original = 6 * np.eye(10)[labels][None, None]
  found = measure(references, original, labels)
  assert found.distance("kl_divergence", FORGET).value < judgement.MARGIN
  assert found.spread(FORGET).kl_divergence > 4
  verdict = judgement.judge(found)
  assert verdict.verdict == judgement.LEVEL_ONLY
  assert verdict.is_rejected
  assert "accuracy/test_forget" in verdict.against
  assert "only the level can be judged" in verdict.sentence
  # A model like the others is not rejected.
  other = 6 * np.eye(10)[rng.integers(0, 10, (1, 1, 200))]
  verdict = judgement.judge(measure(references, other, labels))
  assert (verdict.verdict, verdict.is_rejected) == (judgement.LEVEL_ONLY, False)


def test_references_agree_unless_the_original_is_as_near():
  rng = np.random.default_rng(5)
  base = 3 * rng.normal(size=(200, 4))
  labels = rng.integers(0, 4, 200)
  found = measure(draw(rng, 4, base, 0.3), draw(rng, 1, base)[None], labels)
  assert found.spread(FORGET).agreement > judgement.MIN_AGREEMENT
  assert judgement.is_agreed(found)
  is_near = {"value": 1.1, "interval": (0.9, 1.3)}
  rejected = {"p": 1e-6}
  original = dataclasses.replace(
    found,
    distances=tuple(dataclasses.replace(x, **is_near) for x in found.distances),
    levels=tuple(dataclasses.replace(x, **rejected) for x in found.levels),
  )
  assert not judgement.is_agreed(found, original=original)
  # One that is as near with its level within is as retrained: all is well.
  within = dataclasses.replace(
    original,
    levels=tuple(dataclasses.replace(x, p=0.5) for x in found.levels),
  )
  assert judgement.is_agreed(found, original=within)


@pytest.mark.parametrize("num_references", [1, 2])
def test_few_references_cannot_tell(num_references):
  rng = np.random.default_rng(6)
  base = 3 * rng.normal(size=(50, 3))
  references = draw(rng, num_references, base, 0.3)
  found = measure(references, draw(rng, 1, base, 0.3)[None], base.argmax(-1))
  verdict = judgement.judge(found)
  assert verdict.verdict == judgement.CANNOT_TELL
  each = found.distance("kl_divergence", FORGET)
  assert each.interval is None
  assert (each.value is None) == (num_references == 1)
  assert each.reasons


def test_held_out_counts_what_the_checks_reject(problem):
  rng, base, labels = problem
  retrained = {s: draw(rng, 5, x, 0.3) for s, x in base.items()}
  attack = yardstick.Attack([0.5], [0.5, 0.52, 0.48, 0.51, 0.9], 100)
  found = judgement.held_out(
    retrained, labels, attacks={"loss": attack}, num_resamples=200
  )
  assert (found.total, found.num_others) == (5, 4)
  # The last lies outside the interval of the others, and none of these does.
  assert found.attacks == {"loss": 1}
  # The same as by hand, of the first.
  one = yardstick.measure(
    {s: x[1:] for s, x in retrained.items()},
    {s: x[:1, None] for s, x in retrained.items()},
    labels,
    num_resamples=200,
  )
  assert found.rejected >= judgement.judge(one).is_rejected
  assert f"{found.rejected} of 5" in str(found)
  # A reference that is far from all others is a false alarm.
  far = {s: np.concatenate([x[:4], -x[:1]]) for s, x in retrained.items()}
  assert judgement.held_out(far, labels, num_resamples=200).rejected >= 1


def test_attack_with_one_reference_is_compared_with_chance():
  logits = np.random.default_rng(7).normal(size=(1, 20, 3))
  attack = yardstick.Attack([0.6], [0.9], 200)
  found = measure(
    logits, logits[None], np.zeros(20, int), attacks={"loss": attack}
  )
  (each,) = found.attacks
  # The deviation of Mann and Whitney's statistic, of 200 images a side.
  half = 1.6449 * math.sqrt(401 / (12 * 200 * 200))
  np.testing.assert_allclose(each.interval, [0.5 - half, 0.5 + half], rtol=1e-4)
  assert each.is_flagged
  alarms = judgement.held_out(
    {FORGET: logits}, {FORGET: np.zeros(20, int)}, attacks={"loss": attack}
  )
  assert alarms.attacks == {"loss": 1}
  json.dumps(dataclasses.asdict(alarms))
  assert "unknown" in str(alarms)


def test_levels_are_those_of_metrics():
  rng = np.random.default_rng(8)
  logits, labels = rng.normal(size=(4, 40, 3)), rng.integers(0, 3, 40)
  found = measure(logits[:3], logits[3:, None], labels)
  assert found.level("accuracy", FORGET).unlearned == metrics.accuracy(
    logits[3], labels
  )
  assert found.distance("kl_divergence", FORGET).unlearned == pytest.approx(
    np.mean([metrics.kl_divergence(x, logits[3]) for x in logits[:3]])
  )


def test_split_without_images():
  rng = np.random.default_rng(9)
  logits, labels = rng.normal(size=(3, 30, 3)), rng.integers(0, 3, 30)
  found = yardstick.measure(
    {"train_forget": logits, FORGET: logits[:, :0]},
    {"train_forget": logits[None, :1], FORGET: logits[None, :1, :0]},
    {"train_forget": labels, FORGET: labels[:0]},
    num_resamples=100,
  )
  assert found.forget_split == "train_forget"
  assert found.distance("kl_divergence", FORGET).value is None


def test_bad_input():
  logits, labels = np.zeros((3, 5, 2)), np.zeros(5, int)
  attack = yardstick.Attack([0.5], [0.5], 10)
  with pytest.raises(ValueError, match="attack loss must have a finite"):
    measure(logits, logits[:1, None], labels, attacks={"loss": attack})
  with pytest.raises(ValueError, match="confidence must be below 1"):
    measure(logits, logits[:1, None], labels, confidence=1.0)
  with pytest.raises(ValueError, match="retrained"):
    measure(logits[:, :4], logits[:1, None], labels)
  found = measure(logits, logits[:1, None], labels)
  with pytest.raises(ValueError, match="margin must be"):
    judgement.judge(found, margin=1.0)
