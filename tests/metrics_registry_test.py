import json
import re

import numpy as np
import pytest

from psg_jax import metrics

SIZES = dict(zip(metrics.SPLITS, (120, 200, 60, 90), strict=True))


def outputs(seed, *, margin=3.0, **more):
  rng = np.random.default_rng(seed)
  logits, features = {}, {}
  for split, size in SIZES.items():
    logits[split] = rng.normal(size=(size, 3))
    logits[split][np.arange(size), labels()[split]] += margin
    features[split] = rng.normal(size=(size, 4))
  return metrics.Outputs(logits, features, **more)


def labels():
  return {
    split: np.zeros(size, int)
    if split.endswith("forget")
    else np.arange(size) % 2 + 1
    for split, size in SIZES.items()
  }


def full_inputs():
  return metrics.Inputs(
    labels=labels(),
    model=outputs(
      0,
      params={"a": np.zeros(3)},
      seconds=2.0,
      relearn_accuracy=np.array([0.1, 0.5, 1.0]),
    ),
    retrained=outputs(
      1,
      params={"a": np.full(3, 2.0)},
      seconds=30.0,
      relearn_accuracy=np.array([0.0, 0.1, 0.2, 0.3, 1.0]),
    ),
    original=outputs(2),
    random=outputs(3, margin=0.0),
    groups={"test_retain": np.array(["a", "b", "c"] * 30)},
  )


def test_every_metric_has_a_value_that_json_can_hold():
  found = metrics.compute(None, full_inputs())
  assert list(found) == list(metrics.METRICS)
  without = [name for name, result in found.items() if result["value"] is None]
  # 60 non-members have no rate of 1 % or 0.1 %.
  assert without == [
    "mia_loss_tpr_at_0.01_fpr",
    "mia_loss_tpr_at_0.001_fpr",
  ]
  assert "60 non-members are too few" in found[without[0]]["reason"]
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  curves = [name for name, result in found.items() if "roc" in result]
  assert curves == [
    name for name in found if name.startswith("mia") and name.endswith("auc")
  ]
  assert found["mia_loss_auc"]["roc"]["fpr"][-1] == 1


def test_values_are_those_of_the_functions():
  inputs = full_inputs()
  names = ["zrf", "run_time_efficiency", "anamnesis_index", "weight_distance"]
  found = metrics.compute([*names, "kl_divergence_test_retain"], inputs)
  forget = "train_forget"
  assert found["zrf"]["value"] == metrics.zrf(
    inputs.model.logits[forget], inputs.random.logits[forget]
  )
  assert found["run_time_efficiency"] == {"value": 15.0}
  assert found["anamnesis_index"] == {"value": 0.5}
  assert found["weight_distance"]["value"] == pytest.approx(np.sqrt(12))
  assert found["kl_divergence_test_retain"]["value"] == metrics.kl_divergence(
    inputs.retrained.logits["test_retain"], inputs.model.logits["test_retain"]
  )


def test_tug_of_war_takes_all_test_images():
  inputs = full_inputs()

  def accuracies(model):
    parts = [inputs.labels[name] for name in metrics.SPLITS]
    right = [
      np.argmax(model.logits[name], -1) == part
      for name, part in zip(metrics.SPLITS, parts, strict=True)
    ]
    test = np.concatenate(right[2:])
    return (right[0].mean(), right[1].mean(), test.mean())

  expected = metrics.tug_of_war(
    accuracies(inputs.model), accuracies(inputs.retrained)
  )
  assert metrics.compute(["tug_of_war"], inputs)["tug_of_war"] == {
    "value": pytest.approx(expected)
  }
  assert expected < 1


def test_what_is_missing_is_named():
  inputs = full_inputs()._replace(retrained=None, groups=None)
  found = metrics.compute(["worst_subgroup", "tug_of_war", "mia_loss"], inputs)
  assert found["worst_subgroup"] == {
    "value": None,
    "reason": "needs groups.test_retain",
  }
  assert "needs retrained.logits.train_forget" in found["tug_of_war"]["reason"]
  assert found["mia_loss"]["value"] is not None


def test_members_of_a_request_without_test_images_meet_their_classes():
  inputs = full_inputs()
  empty = {"test_forget": np.zeros((0, 3))}
  kept = inputs._replace(
    labels={
      **inputs.labels,
      "train_forget": np.arange(120) % 2 + 1,
      "test_forget": np.zeros(0, int),
    },
    model=metrics.Outputs({**inputs.model.logits, **empty}),
    retrained=None,
    original=None,
    random=None,
  )
  found = metrics.compute(["mia_loss", "accuracy_test_forget"], kept)
  assert found["mia_loss"]["non_members"] == "test_retain"
  assert found["mia_loss"]["num_samples"] == 90
  assert found["accuracy_test_forget"]["reason"] == "there are no images"


def test_every_metric_states_what_it_is():
  for name, metric in metrics.METRICS.items():
    assert metric.name == name
    assert metric.title
    assert metric.needs
    assert metric.direction in ("up", "down", "as_retrained")
    assert metric.ideal == "retrained" or metric.ideal >= 0
    assert metric.unit in ("share", "nats", "steps", "ratio", "")
    is_plain = name.startswith(("accuracy_", "agreement_", "kl_divergence_"))
    assert bool(re.fullmatch(r".+, \d{4}( \(.+\))?", metric.source)) != is_plain
  titles = [metric.title for metric in metrics.METRICS.values()]
  assert len(set(titles)) == len(titles)


def test_bad_names_and_arrays():
  inputs = full_inputs()
  with pytest.raises(ValueError, match="did you mean 'mia_entropy'"):
    metrics.find("mia_entrpy")
  with pytest.raises(ValueError, match="name must be one of"):
    metrics.compute(["accuracy"], inputs)
  short = {**inputs.labels, "test_retain": np.zeros(5, int)}
  with pytest.raises(ValueError, match="test_retain must be as many as labels"):
    metrics.compute(["zrf"], inputs._replace(labels=short))
  odd = inputs._replace(groups={"test": np.array(["a"])})
  with pytest.raises(ValueError, match="groups split must be one of"):
    metrics.compute(["zrf"], odd)


def test_one_near_name_says_more_than_all_names():
  with pytest.raises(ValueError, match="one of 57 names, got 'mia_los', did"):
    metrics.find("mia_los")
  with pytest.raises(ValueError, match=r"accuracy_train_forget, .*got 'qqqq'$"):
    metrics.find("qqqq")
