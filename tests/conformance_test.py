"""What is known to be wrong in other unlearning code, and must not be here.

Each test names the mistake. Ours is right where the test passes.
"""

import numpy as np
import pytest

from psg_jax import forget, inference, metrics
from tests import fakes


def test_js_divergence_is_not_divided_by_the_number_of_classes():
  for num_classes in (2, 10, 100):
    a, b = np.zeros((2, 4, num_classes))
    a[:, 0] = b[:, 1] = 1000
    assert metrics.js_divergence(a, b) == pytest.approx(0.693147, abs=1e-6)
    assert metrics.zrf(a, b) == pytest.approx(0.306853, abs=1e-6)


def test_kl_divergence_goes_from_the_retrained_to_the_model():
  retrained, model = np.log([[0.5, 0.5]] * 9), np.log([[0.9, 0.1]] * 9)
  everywhere = dict.fromkeys(metrics.SPLITS, np.zeros(9, int))
  inputs = metrics.Inputs(
    everywhere,
    metrics.Outputs(dict.fromkeys(metrics.SPLITS, model)),
    metrics.Outputs(dict.fromkeys(metrics.SPLITS, retrained)),
  )
  found = metrics.compute(["kl_divergence_train_forget"], inputs)
  # 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1); the other direction gives 0.368.
  assert found["kl_divergence_train_forget"]["value"] == pytest.approx(
    0.510826, abs=1e-6
  )


def test_modified_entropy_takes_the_label_of_each_row_alone():
  logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
  labels = np.array([0, 1, 2])
  together = metrics.modified_entropies(logits, labels)
  alone = [
    metrics.modified_entropies(logits[i : i + 1], labels[i : i + 1])[0]
    for i in range(3)
  ]
  np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_modified_entropy_uses_the_logarithm_of_the_complement():
  # Label 0: -0.3 ln 0.7 - 0.2 ln 0.8 - 0.1 ln 0.9; with log p in place of
  # log(1 - p) it would be 0.66.
  found = metrics.modified_entropies(np.log([[0.7, 0.2, 0.1]]), np.array([0]))
  assert found[0] == pytest.approx(0.162167, abs=1e-6)


def forgotten_class(rng, *, of_member, of_unseen, of_retained):
  """A model's outputs: means of the right class's lead by kind of image."""
  sizes = {
    "train_forget": (1500, of_member, 0),
    "test_forget": (1500, of_unseen, 0),
    "train_retain": (300, of_retained, 1),
    "test_retain": (300, of_retained, 1),
  }
  logits, labels = {}, {}
  for split, (size, lead, label) in sizes.items():
    logits[split] = rng.normal(size=(size, 3))
    logits[split][:, label] += lead
    labels[split] = np.full(size, label)
  return metrics.Inputs(labels, metrics.Outputs(logits))


ATTACKS = [
  name
  for name in metrics.METRICS
  if name.startswith("mia_") and "tpr" not in name
]


def test_membership_inference_has_members_so_that_retraining_scores_one_half():
  # The retrained model has never seen the class, and is sure of the others:
  # an attack on forget images against all test images would find them at once.
  rng = np.random.default_rng(0)
  inputs = forgotten_class(rng, of_member=-3, of_unseen=-3, of_retained=5)
  for name, result in metrics.compute(ATTACKS, inputs).items():
    assert result["value"] == pytest.approx(0.5, abs=0.04), name
    assert result["non_members"] == "test_forget"
    assert result["num_samples"] <= 1500


def test_membership_inference_finds_the_members_of_the_original_model():
  rng = np.random.default_rng(1)
  inputs = forgotten_class(rng, of_member=6, of_unseen=1, of_retained=5)
  for name, result in metrics.compute(ATTACKS, inputs).items():
    assert result["value"] > 0.6, name


@pytest.mark.parametrize("label", [0, 1, 2])
def test_forget_counts_are_of_the_class_that_was_asked_for(label):
  dataset = fakes.blobs(60)
  split = forget.split(dataset, classes=[label])
  count = int(np.sum(dataset.labels == label))
  assert len(split.forget) == count
  assert set(split.forget.labels) == {label}
  # A model that is right about this class only.
  logits = np.zeros((60, 3))
  logits[:, label] = 1
  figures = metrics.per_class_accuracy(logits, dataset.labels)
  assert figures == [float(each == label) for each in range(3)]
  matrix = metrics.confusion_matrix(logits, dataset.labels)
  assert matrix[label, label] == count


@pytest.mark.parametrize("batch_size", [4, 7, 64])
def test_evaluation_keeps_the_last_partial_batch_and_the_images_as_they_are(
  batch_size,
):
  dataset = fakes.blobs(10)
  rng = np.random.default_rng(0)
  variables = fakes.linear_variables(rng.normal(size=(16, 3)))
  found = inference.predict(
    fakes.linear_apply, variables, dataset.images, batch_size=batch_size
  )
  # The plain product, without any augmentation.
  expected = (
    dataset.images.reshape(10, -1) / 255 @ variables["params"]["kernel"]
  )
  assert found.shape == (10, 3)
  # float32 on both sides, summed in different orders.
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_missing_metric_is_not_zero():
  logits = np.zeros((30, 3))
  inputs = metrics.Inputs(
    {"train_forget": np.zeros(30, int)},
    metrics.Outputs({"train_forget": logits}),
  )
  found = metrics.compute(None, inputs)
  assert found.pop("accuracy_train_forget") == {"value": 1.0}
  for name, result in found.items():
    assert result["value"] is None, name
    assert result["reason"], name


def test_errors_during_evaluation_are_not_swallowed():
  inputs = metrics.Inputs(
    {"train_forget": np.full(30, 7)},
    metrics.Outputs({"train_forget": np.zeros((30, 3))}),
  )
  with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 7"):
    metrics.compute(["accuracy_train_forget"], inputs)


def test_the_seed_is_the_one_that_was_given():
  rng = np.random.default_rng(2)
  inputs = forgotten_class(rng, of_member=1, of_unseen=0, of_retained=5)
  inputs.model.logits["test_forget"] = inputs.model.logits["test_forget"][:200]
  inputs.labels["test_forget"] = inputs.labels["test_forget"][:200]

  def value(seed):
    # The global generator must not matter.
    np.random.seed(0)
    given = inputs._replace(seed=seed)
    return metrics.compute(["mia_logistic"], given)["mia_logistic"]["value"]

  assert value(1) == value(1)
  assert value(1) != value(2)
