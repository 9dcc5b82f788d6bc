"""Checks of models, on numbers and predictions with known answers."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from psg_jax import judgement, metrics, model_checks, traces

SPLITS = {"train_forget": 60, "test_forget": 40, "test_retain": 100}
NUM_CLASSES = 5


def number_check(direction="above", *, resolution=0.1, **options):
  """A check whose reading is a model's time, and its value the excess."""
  return model_checks.Check(
    *("number", "test_forget", "A number"),
    lambda outputs, labels: outputs.seconds,
    lambda model, references, original: model - np.mean(references),
    lambda references, original: resolution,
    direction=direction,
    **options,
  )


def subjects(*numbers):
  return [model_checks.Subject(metrics.Outputs({}, seconds=x)) for x in numbers]


def by_number(check, retrained, *numbers, **options):
  """Examines models that are numbers."""
  models = {"one": subjects(*numbers)}
  return model_checks.examine(
    check, subjects(*retrained), models, {}, **options
  )


def of_logits(split, *models, original=None):
  """Models of one split."""
  return [
    model_checks.Subject(
      metrics.Outputs({split: np.asarray(x)}),
      None if original is None else metrics.Outputs({split: original}),
    )
    for x in models
  ]


def draw(rng, base):
  """Another model of a kind: a scale of noise and a bias of its own."""
  scale = 0.7 * np.exp(0.2 * rng.normal())
  bias = 0.5 * rng.normal(size=NUM_CLASSES)
  return metrics.Outputs(
    {k: x + bias + scale * rng.normal(size=x.shape) for k, x in base.items()}
  )


def world(seed, num_retrained):
  """Retrained models, an original that knows all labels, and the labels."""
  rng = np.random.default_rng(seed)
  labels = {k: rng.integers(0, NUM_CLASSES, n) for k, n in SPLITS.items()}
  base = {k: 2 * rng.normal(size=(n, NUM_CLASSES)) for k, n in SPLITS.items()}
  known = {k: x + 6 * np.eye(NUM_CLASSES)[labels[k]] for k, x in base.items()}
  original = draw(rng, known)
  retrained = [
    model_checks.Subject(draw(rng, base), original)
    for _ in range(num_retrained)
  ]
  return retrained, original, labels


def test_limits_by_hand():
  found = by_number(number_check(), (1, 2, 3), 2 + 5.1, 2 + 5.0)
  np.testing.assert_allclose(found.references, [-1.5, 0, 1.5])
  # Student's t of two degrees of freedom, 0.95: 2.919986.
  assert found.limits[0] is None
  assert found.limits[1] == pytest.approx(2.919986 * 1.5 * math.sqrt(4 / 3))
  finding = found.models["one"]
  # Beside two references at a time, all of them in turn: beside their mean.
  np.testing.assert_allclose(finding.values, [5.1, 5.0])
  assert finding.value == pytest.approx(5.05)
  assert finding.is_rejected == (True, False)
  assert finding.verdict == judgement.CANNOT_TELL
  assert finding.reason == "1 of 2 models are rejected"
  both = by_number(number_check("both"), (1, 2, 3), 2 - 7.5, 2 + 7.5, 2)
  # 4.302653 of both sides.
  high = 4.302653 * 1.5 * math.sqrt(4 / 3)
  np.testing.assert_allclose(both.limits, [-high, high], rtol=1e-6)
  assert both.models["one"].is_rejected == (True, True, False)
  assert both.models["one"].verdict == judgement.NOT_RETRAINED
  assert by_number(number_check(), (1, 2, 3), -50).models["one"].verdict == (
    model_checks.NOT_REJECTED
  )


def test_false_alarms_by_hand():
  found = by_number(number_check(resolution=1.0), (0, 0, 0, 10), 0)
  # Beside three of 0 the fourth is 10 away, of a limit of 2.92 * sqrt(4 / 3).
  assert found.false_alarms == (False, False, False, True)
  # One image more or less is believed of references that are all alike.
  limit = 2.353363 * math.sqrt(5 / 4)
  alike = by_number(number_check(resolution=1.0), (4,) * 4, 4 + 0.99 * limit)
  assert alike.limits[1] == pytest.approx(limit)
  assert alike.models["one"].is_rejected == (False,)
  assert alike.false_alarms == (False,) * 4
  # Two make the limits of a third.
  three = by_number(number_check(resolution=1.0), (0, 0, 100), 0)
  assert three.false_alarms == (False, False, True)


@pytest.mark.parametrize("num_references", [1, 2])
def test_few_references_cannot_tell(num_references):
  retrained, original, labels = world(0, num_references)
  models = {"original": [model_checks.Subject(original, original)]}
  found = model_checks.assess(retrained, models, labels, traces.CHECKS)
  assert (found["total"], found["false_alarms"]) == (0, 0)
  assert found["against"] == {"original": []}
  for row in found["examinations"]:
    finding = row["models"]["original"]
    assert (row["limits"], row["false_alarms"]) == (None, ())
    assert finding["verdict"] == judgement.CANNOT_TELL
    assert finding["nearer"] in (None, judgement.CANNOT_TELL)
    assert "retrained model" in finding["reason"]
    assert (finding["value"] is None) == (num_references == 1)


def test_identical_models_are_not_rejected():
  retrained, original, labels = world(1, 1)
  models = {"same": retrained[:1]}
  found = model_checks.assess(retrained * 4, models, labels, traces.CHECKS)
  assert len(found["examinations"]) == len(traces.CHECKS) == 7
  assert found["false_alarms"] == 0
  assert found["total"] == 4
  for row in found["examinations"]:
    finding = row["models"]["same"]
    assert finding["value"] == pytest.approx(0, abs=1e-12)
    assert finding["verdict"] == model_checks.NOT_REJECTED
    assert finding["nearer"] in (None, model_checks.NEAR_RETRAINED)
  # Where the original is the same as well, no side is nearer.
  same = [model_checks.Subject(original, original)]
  found = model_checks.assess(same * 4, {"same": same}, labels, traces.CHECKS)
  assert found["against"] == {"same": []}
  (first, *_) = [x for x in found["examinations"] if x["name"] == "nearness"]
  assert first["models"]["same"]["verdict"] == judgement.CANNOT_TELL
  assert "does not differ" in first["reason"]


def test_original_is_rejected():
  retrained, original, labels = world(2, 5)
  models = {"original": [model_checks.Subject(original, original)]}
  found = model_checks.assess(retrained, models, labels, traces.CHECKS)
  json.dumps(found, allow_nan=False)
  assert set(found["against"]["original"]) >= {
    "destination/train_forget",
    "destination/test_forget",
    "nearness/train_forget",
    "nearness/test_forget",
    "most_memorised/train_forget",
  }
  for row in found["examinations"]:
    if row["name"] == "nearness":
      finding = row["models"]["original"]
      assert finding["value"] == pytest.approx(1)
      assert finding["nearer"] == model_checks.NEAR_ORIGINAL
      assert row["references_nearer"] == (model_checks.NEAR_RETRAINED,) * 5


def test_false_alarms_are_as_many_as_stated():
  """Of exchangeable models, the held-out one and the references alike."""
  num_worlds, table = 100, traces.CHECKS[:4]
  rejected, alarms = np.zeros(4, int), np.zeros(4, int)
  for seed in range(num_worlds):
    retrained, _, labels = world(100 + seed, 6)
    models = {"held_out": retrained[:1]}
    found = model_checks.assess(retrained[1:], models, labels, table)
    rows = found["examinations"]
    rejected += [x["models"]["held_out"]["is_rejected"][0] for x in rows]
    alarms += [sum(x["false_alarms"]) for x in rows]
  # The values have a longer tail than the normal distribution: no more than a
  # binomial of twice the level has in 999 of 1,000 cases.
  share = 2 * model_checks.LEVEL
  most = scipy.stats.binom.ppf(0.999, num_worlds, share)
  assert (rejected <= most).all(), rejected
  # Five of a world, judged by one another, count as one.
  assert (alarms <= 5 * most).all(), alarms
  # And the limits are not so wide that nothing can be rejected.
  assert rejected.sum() > 0
  assert alarms.sum() > 0


def test_together_the_checks_raise_more_alarms_than_one():
  check = number_check(resolution=1.0)

  def odd_at(number):
    """A check that one model alone fails."""
    return check._replace(
      read=lambda outputs, labels: 50.0 * (outputs.seconds == number)
    )

  table = [odd_at(0), odd_at(3), odd_at(3), odd_at(9)]
  labels = {"test_forget": np.zeros(3)}
  models = {"one": subjects(3, 3, 2), "other": subjects(2)}
  found = model_checks.assess(subjects(*range(5)), models, labels, table)
  alarms = [sum(x["false_alarms"]) for x in found["examinations"]]
  assert alarms == [1, 1, 1, 0]
  assert (found["false_alarms"], found["total"]) == (2, 5)
  # The limits are those of all references, the odd one among them.
  assert found["against"] == {"one": [], "other": []}
  found = model_checks.assess(subjects(0, 1, 2), models, labels, table)
  assert found["against"] == {"one": ["number/test_forget"] * 2, "other": []}
  # A split that has no images is left out.
  found = model_checks.assess(subjects(1, 2, 3), {}, {}, table)
  assert found["examinations"] == []


def test_destination_by_hand():
  labels = {"test_forget": np.array([0, 0, 0, 0, 1, 1])}

  def predictions(*classes):
    return np.eye(3)[list(classes)]

  # One of six goes elsewhere; a swap within a class changes nothing, the same
  # swap between classes does.
  references = (predictions(1, 1, 2, 2, 0, 2),) * 3
  models = {
    "one": of_logits("test_forget", predictions(1, 1, 1, 2, 0, 2)),
    "same": of_logits("test_forget", predictions(2, 1, 2, 1, 2, 0)),
    "swapped": of_logits("test_forget", predictions(0, 1, 2, 2, 1, 2)),
  }
  found = model_checks.examine(
    *(traces.destination("test_forget"), of_logits("test_forget", *references)),
    *(models, labels),
  )
  assert found.models["one"].value == pytest.approx(1 / 6)
  assert found.models["same"].value == pytest.approx(0)
  assert found.models["swapped"].value == pytest.approx(2 / 6)
  assert found.references == (0, 0, 0)
  # One image of six is the least deviation.
  assert found.limits[1] == pytest.approx(2.919986 * math.sqrt(4 / 3) / 6)


def test_nearness_by_hand():
  labels = {"test_forget": np.zeros(4, int)}

  def sure(p):
    return np.tile(np.log([p, 1 - p]), (4, 1))

  def kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

  retrained = of_logits(
    "test_forget", *map(sure, (0.2, 0.25, 0.3)), original=sure(0.9)
  )
  places = (0.22, 0.5, 0.8, 0.9)
  models = {
    str(p): of_logits("test_forget", sure(p), original=sure(0.9))
    for p in places
  }
  found = model_checks.examine(
    traces.nearness("test_forget"), retrained, models, labels
  )

  def place(p, *others):
    near = np.mean([kl(x, p) for x in others])
    return near / (near + kl(0.9, p))

  pairs = ((0.2, 0.25), (0.2, 0.3), (0.25, 0.3))
  for p in places:
    expected = np.mean([place(p, *pair) for pair in pairs])
    assert found.models[str(p)].value == pytest.approx(expected)
  np.testing.assert_allclose(
    found.references,
    [place(0.2, 0.25, 0.3), place(0.25, 0.2, 0.3), place(0.3, 0.2, 0.25)],
  )
  assert found.models["0.9"].value == pytest.approx(1)
  nearer = [found.models[str(p)].nearer for p in places]
  assert nearer[0] == model_checks.NEAR_RETRAINED
  assert nearer[2:] == [model_checks.NEAR_ORIGINAL] * 2
  # Nearer to a reference of 0.3 than the original is, and not to one of 0.2.
  middle = 0.57
  assert place(middle, 0.3) < 0.5 < place(middle, 0.2)
  models = {
    "middle": of_logits("test_forget", sure(middle), original=sure(0.9))
  }
  found = model_checks.examine(
    traces.nearness("test_forget"), retrained, models, labels
  )
  assert found.models["middle"].nearer == judgement.CANNOT_TELL


def test_memorised_by_hand():
  labels = {"train_forget": np.zeros(20, int)}

  def confident(values):
    p = np.asarray(values)
    return np.log(np.stack([p, 1 - p], -1))

  # The original memorised the first five; the last five it knows less well
  # than models that never saw them.
  retrained = np.full(20, 0.5)
  original = np.repeat([0.95, 0.6, 0.6, 0.4], 5)
  model = np.repeat([0.8, 0.9, 0.1, 0.48], 5)

  def examine(check):
    return model_checks.examine(
      check,
      of_logits(
        "train_forget",
        *([confident(retrained)] * 4),
        original=confident(original),
      ),
      {
        "one": of_logits(
          "train_forget", confident(model), original=confident(original)
        )
      },
      labels,
    )

  found = examine(traces.memorised())
  assert found.models["one"].value == pytest.approx(0.3)
  # 3.182446 of three degrees of freedom, of the least deviation.
  high = 3.182446 * math.sqrt(5 / 4) * traces.RESOLUTION
  np.testing.assert_allclose(found.limits, [-high, high], rtol=1e-6)
  control = examine(traces.memorised(is_control=True))
  assert control.models["one"].value == pytest.approx(-0.02)
  assert control.models["one"].verdict == model_checks.NOT_REJECTED
  few = {"train_forget": np.zeros(19, int)}
  short = of_logits("train_forget", confident(retrained)[:19])
  found = model_checks.examine(
    *(traces.memorised(), [x._replace(original=x.outputs) for x in short] * 3),
    *({"one": short}, few),
  )
  assert found.reason == "19 images, and 20 are needed"


def test_probe_sees_what_features_keep():
  rng = np.random.default_rng(3)
  labels = {"test_forget": np.zeros(30, int), "test_retain": np.ones(90, int)}

  def subject(distance):
    features = {k: rng.normal(size=(len(x), 4)) for k, x in labels.items()}
    features["test_forget"] = features["test_forget"] + distance
    return model_checks.Subject(metrics.Outputs({}, features))

  check = traces.probe()
  retrained = [subject(1.0) for _ in range(5)]
  found = model_checks.examine(
    check,
    retrained,
    {"kept": [subject(6.0)], "lost": [subject(0.0)]},
    labels,
  )
  # The probe knows all images; those of the references are known in part.
  parts = [
    np.concatenate([x.outputs.features[k] for k in labels]) for x in retrained
  ]
  truth = np.repeat([1, 0], [30, 90])
  recalls = [
    [
      (probe.predictions == i)[truth == i].mean()
      for probe in [metrics.linear_probe(x, truth)]
      for i in (0, 1)
    ]
    for x in parts
  ]
  assert found.models["kept"].value == pytest.approx(1 - np.mean(recalls))
  assert found.models["kept"].verdict == judgement.NOT_RETRAINED
  assert found.models["lost"].verdict == judgement.NOT_RETRAINED
  assert found.models["lost"].value < 0
  found = model_checks.examine(check, subjects(1, 2, 3), {}, labels)
  assert found.reason == "needs features of test_forget"


def curve(num_steps):
  return np.append(np.zeros(num_steps), 1.0)


def relearned(num_steps, original=1):
  return model_checks.Subject(
    *(
      metrics.Outputs({}, relearn_accuracy=curve(x))
      for x in (num_steps, original)
    )
  )


def test_relearning_by_hand():
  retrained = [relearned(x) for x in (9, 10, 11, 10)]
  models = {
    "hidden": [relearned(2)],
    "half": [relearned(6)],
    "alike": [relearned(10)],
    "resists": [relearned(30)],
  }
  check = traces.relearning(0.9)
  found = model_checks.examine(check, retrained, models, {})

  def place(num_steps, *others):
    return (np.mean(others) - num_steps) / (np.mean(others) - 1)

  triples = ((10, 11, 10), (9, 11, 10), (9, 10, 10), (9, 10, 11))
  expected = [np.mean([place(2, *x) for x in triples])]
  np.testing.assert_allclose(found.models["hidden"].values, expected)
  assert found.references[0] == pytest.approx(place(9, 10, 11, 10))
  verdicts = {name: x.verdict for name, x in found.models.items()}
  assert verdicts == {
    "hidden": judgement.NOT_RETRAINED,
    "half": judgement.NOT_RETRAINED,
    "alike": model_checks.NOT_REJECTED,
    "resists": judgement.NOT_RETRAINED,
  }
  assert found.models["hidden"].nearer == model_checks.NEAR_ORIGINAL
  assert found.models["alike"].nearer == model_checks.NEAR_RETRAINED
  # Of 10 steps the middle is 5.5, of 9 it is 5.
  found = model_checks.examine(check, retrained, {"x": [relearned(5)]}, {})
  assert found.models["x"].nearer == judgement.CANNOT_TELL
  # Within one step no deviation is believed.
  alike = [relearned(10)] * 3
  found = model_checks.examine(check, alike, {"x": [relearned(9)]}, {})
  assert found.limits[1] == pytest.approx(4.302653 * math.sqrt(4 / 3) / 9)
  no_way = [relearned(1)] * 3
  found = model_checks.examine(check, no_way, {"x": no_way}, {})
  assert "does not learn the forget set sooner" in found.reason
  assert found.models["x"].verdict == judgement.CANNOT_TELL


def test_what_is_not_available_has_a_reason():
  retrained, original, labels = world(4, 4)
  broken = metrics.Outputs({k: x * np.nan for k, x in original.logits.items()})
  models = {
    "broken": [model_checks.Subject(broken, original)],
    "alone": [model_checks.Subject(original)],
  }
  found = model_checks.assess(retrained, models, labels, traces.CHECKS)
  for row in found["examinations"]:
    assert "not finite" in row["models"]["broken"]["reason"]
    assert row["models"]["broken"]["value"] is None
    assert len(row["false_alarms"]) == 4
    needs = row["name"] != "destination"
    reason = row["models"]["alone"]["reason"]
    assert reason == ("needs the original model" if needs else None)


def test_bad_input():
  retrained, _, labels = world(5, 3)
  with pytest.raises(ValueError, match=r"retrained must have a model .* none"):
    model_checks.examine(traces.CHECKS[0], [], {}, labels)
  for level in (0.0, 0.6):
    with pytest.raises(ValueError, match=f"level must be .* got {level}"):
      model_checks.examine(traces.CHECKS[0], retrained, {}, labels, level=level)
  with pytest.raises(ValueError, match=r"target_accuracy .* got 0\.0"):
    traces.relearning(0.0)
  fewer = {k: x[:-1] for k, x in labels.items()}
  with pytest.raises(ValueError, match="labels must be"):
    model_checks.examine(traces.CHECKS[0], retrained, {}, fewer)
