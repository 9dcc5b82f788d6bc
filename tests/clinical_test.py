import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from psg_jax import metrics

# Predictions 1, 0, 2, 2, 1 for labels 1, 1, 2, 0, 1.
LOGITS = np.array(
  [
    [0.0, 1.0, 0.0],
    [2.0, 1.0, 0.0],
    [0.0, 0.0, 3.0],
    [0.0, 1.0, 2.0],
    [0.0, 1.0, 0.0],
  ]
)
LABELS = np.array([1, 1, 2, 0, 1])


def random_model(num_images=300, num_classes=4, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, num_classes, num_images)
  logits = rng.normal(size=(num_images, num_classes))
  logits[np.arange(num_images), labels] += 1
  return logits, labels


def test_sensitivity_and_specificity_by_hand():
  assert metrics.sensitivity(LOGITS, LABELS) == [0, pytest.approx(2 / 3), 1]
  assert metrics.specificity(LOGITS, LABELS) == [0.75, 1, 0.75]
  assert metrics.sensitivity(LOGITS[:2], LABELS[:2]) == [None, 0.5, None]
  assert metrics.specificity(LOGITS[:2], LABELS[:2]) == [0.5, None, 1]


def test_sensitivity_and_specificity_against_sklearn():
  logits, labels = random_model()
  predicted = np.argmax(logits, -1)
  for label in range(4):
    for fn, positive in ((metrics.sensitivity, 1), (metrics.specificity, 0)):
      expected = sklearn.metrics.recall_score(
        labels == label, predicted == label, pos_label=positive
      )
      assert fn(logits, labels)[label] == pytest.approx(expected)


def test_auroc_against_sklearn():
  logits, labels = random_model()
  area = metrics.auroc(logits, labels)
  expected = sklearn.metrics.roc_auc_score(
    labels, scipy.special.softmax(logits, -1), multi_class="ovr"
  )
  assert area.macro == pytest.approx(expected)
  assert np.mean(area.per_class) == pytest.approx(expected)


def test_auroc_of_saturated_predictions_has_no_ties():
  # Each probability of class 0 rounds to 1; the order is perfect.
  logits = np.array([[80.0, 0], [81, 0], [90, 0], [91, 0]])
  area = metrics.auroc(logits, np.array([1, 1, 0, 0]))
  assert area.per_class == [1.0, 1.0]


def test_auroc_leaves_out_classes_that_are_not_there():
  logits, labels = random_model()
  kept = labels != 2
  area = metrics.auroc(logits[kept], labels[kept])
  assert area.per_class[2] is None
  known = [area.per_class[label] for label in (0, 1, 3)]
  assert area.macro == pytest.approx(np.mean(known))
  with pytest.raises(metrics.NotAvailableError, match="are of one class"):
    metrics.auroc(logits[labels == 1], labels[labels == 1])


def test_calibration_error_by_hand():
  confidences = np.array([0.62, 0.65, 0.9, 0.92, 0.97])
  logits = np.log(np.stack([confidences, 1 - confidences], -1))
  labels = np.array([0, 1, 0, 0, 1])
  # Of 15 bins, 0.62 and 0.65 are in (9/15, 10/15], 0.9 and 0.92 in
  # (13/15, 14/15], and 0.97 is alone: accuracies 1/2, 1 and 0 against
  # confidences 0.635, 0.91 and 0.97.
  expected = (2 * 0.135 + 2 * 0.09 + 1 * 0.97) / 5
  assert expected == pytest.approx(0.284)
  found = metrics.calibration_error(logits, labels)
  assert found == pytest.approx(0.284)
  # One bin: 3/5 right against 0.812 on average.
  assert metrics.calibration_error(logits, labels, num_bins=1) == pytest.approx(
    0.212
  )


def test_calibration_error_of_sure_models_and_of_edges():
  sure = np.array([[1000.0, 0.0]] * 4)
  assert metrics.calibration_error(sure, np.array([0, 0, 0, 0])) == 0
  assert metrics.calibration_error(sure, np.array([0, 1, 1, 1])) == 0.75
  # 0.5 is the upper edge of the first of two bins and 0.75 is in the second:
  # a wrong and a right answer do not make up for each other.
  logits = np.log([[0.5, 0.5], [0.75, 0.25]])
  found = metrics.calibration_error(logits, np.array([1, 0]), num_bins=2)
  assert found == pytest.approx((0.5 + 0.25) / 2)


def test_worst_subgroup_by_hand():
  groups = np.array(["a", "a", "b", "c", "b"])
  found = metrics.worst_subgroup(LOGITS, LABELS, groups, min_count=2)
  assert found == ("a", 0.5, 2, 2, 1)
  found = metrics.worst_subgroup(LOGITS, LABELS, groups, min_count=1)
  assert (found.group, found.accuracy, found.num_images) == ("c", 0, 1)
  with pytest.raises(metrics.NotAvailableError, match="of 3 groups has 10"):
    metrics.worst_subgroup(LOGITS, LABELS, groups)
  with pytest.raises(ValueError, match=r"groups must be \[5\]"):
    metrics.worst_subgroup(LOGITS, LABELS, groups[:4])


def test_flips_by_hand():
  after = LOGITS.copy()
  after[0], after[1] = [5.0, 0, 0], [0, 5.0, 0]
  found = metrics.flips(after, LOGITS, LABELS)
  assert found.harmed_rows.tolist() == [0]
  assert (found.harmed_before[0], found.harmed_after[0]) == (1, 0)
  assert found.helped_rows.tolist() == [1]
  assert (found.helped_before[0], found.helped_after[0]) == (0, 1)
  assert found.num_right == 3
  # From one wrong class to another is neither.
  other = LOGITS.copy()
  other[3] = [0, 5.0, 0]
  same = metrics.flips(other, LOGITS, LABELS)
  assert not len(same.harmed_rows) + len(same.helped_rows)


def test_false_negatives_by_hand():
  after = LOGITS.copy()
  after[0] = after[4] = [5.0, 0, 0]
  found = metrics.false_negatives(after, LOGITS, LABELS)
  assert found == [(0, 1, 1, 1), (1, 3, 1, 3), (2, 1, 0, 0)]
  names = ("normal", "glaucoma", "other")
  one = metrics.false_negatives(
    after, LOGITS, LABELS, positive="glaucoma", class_names=names
  )
  assert one == found[1:2]
  assert metrics.false_negatives(after, LOGITS, LABELS, positive=1) == one
  with pytest.raises(ValueError, match="did you mean 'glaucoma'"):
    metrics.false_negatives(
      after, LOGITS, LABELS, positive="glaukoma", class_names=names
    )
  with pytest.raises(metrics.NotAvailableError, match="no images of class 2"):
    metrics.false_negatives(after[:2], LOGITS[:2], LABELS[:2], positive=2)
