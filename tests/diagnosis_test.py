import json

import numpy as np
import pytest

from psg_jax import diagnosis, unlearning

ORIGINAL = {"train_forget": 0.95, "test_forget": 0.9, "test_retain": 0.9}
RETRAINED = {"train_forget": 0.0, "test_forget": 0.0, "test_retain": 0.91}
UNTOUCHED = ORIGINAL
HALF = {"train_forget": 0.5, "test_forget": 0.45, "test_retain": 0.9}
FINE = {"train_forget": 0.01, "test_forget": 0.0, "test_retain": 0.9}
DAMAGED = {"train_forget": 0.01, "test_forget": 0.0, "test_retain": 0.7}
DESTROYED = {"train_forget": 0.0, "test_forget": 0.0, "test_retain": 0.15}


def relabelling(crossed=1.0, counts=(0, 40, 30, 30), agreement=None):
  return diagnosis.RelabellingStatistics(
    num_images=100,
    crossed_share=crossed,
    label_counts=counts,
    largest_share=max(counts) / 100,
    agreement=agreement,
  )


def passes(forget_losses, label_accuracy, retain_losses=None):
  retain_losses = retain_losses or [0.3] * len(forget_losses)
  return [
    {
      "epoch": index + 1,
      "forget_loss": forget,
      "label_accuracy": label_accuracy,
      "retain_loss": retain,
    }
    for index, (forget, retain) in enumerate(
      zip(forget_losses, retain_losses, strict=True)
    )
  ]


def diagnose(unlearned, **arguments):
  return diagnosis.diagnose(
    ORIGINAL, unlearned, **{"retrained": RETRAINED, **arguments}
  )


@pytest.mark.parametrize(
  ("unlearned", "verdict"),
  [
    (UNTOUCHED, diagnosis.NOTHING),
    (HALF, diagnosis.PARTLY),
    (FINE, diagnosis.FINE),
    (DAMAGED, diagnosis.DAMAGED),
    (DESTROYED, diagnosis.DESTROYED),
  ],
)
@pytest.mark.parametrize("retrained", [RETRAINED, None])
def test_verdicts(unlearned, verdict, retrained):
  found = diagnose(unlearned, retrained=retrained)
  assert found.verdict == verdict
  assert (found.setting is None) == (verdict == diagnosis.FINE)
  assert "accuracy" in found.findings[0].evidence
  assert verdict in str(found)
  json.dumps(found.as_dict())


def test_target_of_samples_is_that_of_unseen_images_of_the_kind():
  # A camera that is harder than the others: 0.7 is right, and not 0.93.
  original = {
    "train_forget": 0.95,
    "test_forget": 0.7,
    "train_retain": 0.95,
    "test_retain": 0.93,
  }
  found = diagnosis.diagnose(
    original, {**original, "train_forget": 0.71}, scope="samples"
  )
  assert found.verdict == diagnosis.FINE


def test_two_verdicts_at_once():
  found = diagnose({**HALF, "test_retain": 0.6})
  verdicts = [each.verdict for each in found.findings]
  assert verdicts == [diagnosis.PARTLY, diagnosis.DAMAGED]


TOO_LITTLE = (UNTOUCHED, HALF)
HARM = (DAMAGED, DESTROYED)


@pytest.mark.parametrize(
  ("rule", "cases", "arguments", "setting"),
  [
    (
      "raw logits as targets",
      (*TOO_LITTLE, *HARM),
      {"options": {"labels": "raw_logits"}},
      "labels",
    ),
    (
      "few crossed within the ball",
      TOO_LITTLE,
      {"relabelling": relabelling(0.4), "options": {"max_distance": 0.01}},
      "max_distance",
    ),
    (
      "few crossed",
      TOO_LITTLE,
      {"relabelling": relabelling(0.4), "options": {"num_steps": 5}},
      "num_steps",
    ),
    (
      "targets not learned, still learning",
      TOO_LITTLE,
      {"history": passes([3.0, 1.0], 0.5)},
      "num_epochs",
    ),
    (
      "targets not learned",
      TOO_LITTLE,
      {"history": passes([3.0, 2.95], 0.1)},
      "optimizer",
    ),
    (
      "retained images outweigh",
      TOO_LITTLE,
      {"options": {"retain_weight": 10.0}},
      "retain_weight",
    ),
    (
      "old class in the targets",
      TOO_LITTLE,
      {"options": {"labels": "soft"}},
      "labels",
    ),
    (
      "statistics of the minibatch",
      TOO_LITTLE,
      {"history": passes([3.0, 0.1], 0.97), "options": {}},
      "batch_stats",
    ),
    (
      "statistics of forget images",
      (*TOO_LITTLE, *HARM),
      {"options": {"retain_weight": 0.0}},
      "batch_stats",
    ),
    (
      "retained images hardly used",
      HARM,
      {"options": {"retain_weight": 0.0, "batch_stats": "frozen"}},
      "retain_weight",
    ),
    (
      "one class takes all",
      HARM,
      {"relabelling": relabelling(counts=(0, 10, 77, 13))},
      "step_size",
    ),
    (
      "labels unlike the retrained model's",
      HARM,
      {"relabelling": relabelling(agreement=0.12)},
      "step_size",
    ),
    (
      "unstable",
      HARM,
      {"history": passes([3, 1], 1.0, [0.3, 2.0])},
      "optimizer",
    ),
    ("too little training", TOO_LITTLE, {}, "num_epochs"),
    ("too much training", HARM, {}, "optimizer"),
  ],
)
def test_each_rule_names_its_setting(rule, cases, arguments, setting):
  for unlearned in cases:
    found = diagnose(unlearned, **arguments)
    assert found.findings[0].rule == rule
    assert found.setting == setting
  # It stays silent where all is well.
  assert diagnose(FINE, **arguments).verdict == diagnosis.FINE


def test_every_rule_has_a_test():
  marks = test_each_rule_names_its_setting.pytestmark[0].args[1]
  tested = {rule for rule, *_ in marks} | {"pushed too far"}
  assert tested == {rule.name for rule in diagnosis.RULES}


@pytest.mark.parametrize(
  ("arguments", "silent"),
  [
    ({"relabelling": relabelling(0.95)}, "few crossed"),
    ({"history": passes([3.0, 1.0], 0.95)}, "targets not learned"),
    ({"options": {}}, "retained images outweigh"),
    (
      {
        "history": passes([3.0, 0.1], 0.97),
        "options": {"batch_stats": "frozen"},
      },
      "statistics of the minibatch",
    ),
    # The retrained model itself would give most images to this class.
    (
      {"relabelling": relabelling(counts=(0, 5, 90, 5), agreement=0.8)},
      "one class takes all",
    ),
    # With two classes there is but one other.
    ({"relabelling": relabelling(counts=(0, 100))}, "one class takes all"),
  ],
)
def test_rules_stay_silent(arguments, silent):
  for unlearned in (UNTOUCHED, HALF, DAMAGED, DESTROYED):
    found = diagnose(unlearned, **arguments)
    assert not any(each.rule.startswith(silent) for each in found.findings)


def test_forgotten_samples_need_not_become_wrong():
  # Some images of a class: a model that never saw them is right on most.
  found = diagnosis.diagnose(
    {"train_forget": 1.0, "test_retain": 0.9},
    {"train_forget": 0.91, "test_retain": 0.9},
    scope="samples",
  )
  assert found.verdict == diagnosis.FINE
  found = diagnosis.diagnose(
    {"train_forget": 1.0, "test_retain": 0.9},
    {"train_forget": 0.2, "test_retain": 0.9},
    scope="samples",
  )
  assert found.verdict == diagnosis.TOO_MUCH
  assert found.findings[0].rule == "pushed too far"
  assert found.setting == "num_epochs"
  # A model that has learned nothing by heart.
  found = diagnosis.diagnose(
    {"train_forget": 0.9, "test_retain": 0.9},
    {"train_forget": 0.9, "test_retain": 0.9},
    scope="samples",
  )
  assert found.verdict == diagnosis.CANNOT_TELL
  assert found.setting is None
  assert "membership" in found.findings[0].advice


def test_retrained_model_sets_the_target():
  # 0.5 is where retraining ends, too.
  similar = {**RETRAINED, "train_forget": 0.48, "test_forget": 0.45}
  assert diagnose(HALF, retrained=similar).verdict == diagnosis.FINE
  # A retrained model that is no better on retained images excuses the loss.
  worse = {**RETRAINED, "test_retain": 0.7}
  assert diagnose(DAMAGED, retrained=worse).verdict == diagnosis.FINE


def test_missing_splits_fall_back():
  found = diagnosis.diagnose(
    {"test_forget": 0.9, "train_retain": 0.99, "test_retain": None},
    {"test_forget": 0.9, "train_retain": 0.99},
  )
  assert found.verdict == diagnosis.NOTHING
  assert "test_forget accuracy 0.900" in found.findings[0].evidence


def test_relabelling_is_counted():
  found = unlearning.Relabelling(
    labels=np.array([1, 1, 1, 2]),
    logits=np.zeros((4, 3), np.float32),
    is_crossed=np.array([True, True, True, False]),
    distance=np.zeros(4),
    num_steps=np.ones(4, int),
  )
  retrained = np.eye(3)[[1, 2, 1, 2]]
  assert diagnosis.summarise_relabelling(found, retrained).as_dict() == {
    "num_images": 4,
    "crossed_share": 0.75,
    "label_counts": [0, 3, 1],
    "largest_share": 0.75,
    "agreement": 0.75,
  }
  assert diagnosis.summarise_relabelling(found).agreement is None
  with pytest.raises(ValueError, match=r"retrained_logits must be \[4, 3\]"):
    diagnosis.summarise_relabelling(found, retrained[:2])


def test_bad_input():
  for arguments, message in [
    ({"scope": "clas"}, "did you mean 'class'"),
    ({"num_classes": 1}, "num_classes must be"),
    ({"options": {"num_epoch": 1}}, "did you mean 'num_epochs'"),
    ({"retrained": {"train_forget": 0.0}}, "test_retain or train_retain"),
    ({"retrained": {"train_forgot": 0.0}}, "did you mean 'train_forget'"),
  ]:
    with pytest.raises(ValueError, match=message):
      diagnose(FINE, **arguments)
  with pytest.raises(ValueError, match=r"unlearned\['train_forget'\] must be"):
    diagnose({**FINE, "train_forget": 95.0})


def test_histories_of_earlier_versions_are_read():
  now = passes([3.0, 2.95], 0.1)
  before = [
    {
      ("forget_accuracy" if k == "label_accuracy" else k): v
      for k, v in x.items()
    }
    for x in now
  ]
  found = [diagnose(UNTOUCHED, history=history) for history in (now, before)]
  assert found[0].setting == "optimizer"
  assert found[0] == found[1]
