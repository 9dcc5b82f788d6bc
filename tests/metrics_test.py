import numpy as np
import pytest

from psg_jax import metrics

# Predictions 1, 0, 2, 2 for labels 1, 1, 2, 0.
LOGITS = np.array(
  [[0.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [0.0, 1.0, 2.0]]
)
LABELS = np.array([1, 1, 2, 0])


def test_accuracy_by_hand():
  assert metrics.accuracy(LOGITS, LABELS) == 0.5
  assert metrics.per_class_accuracy(LOGITS, LABELS) == [0.0, 0.5, 1.0]
  assert metrics.confusion_matrix(LOGITS, LABELS).tolist() == [
    [0, 0, 1],
    [1, 1, 0],
    [0, 0, 1],
  ]


def test_what_is_not_there_is_none_and_not_zero():
  assert metrics.accuracy(LOGITS[:0], LABELS[:0]) is None
  assert metrics.per_class_accuracy(LOGITS[:2], LABELS[:2]) == [
    None,
    0.5,
    None,
  ]
  assert metrics.agreement(LOGITS[:0], LOGITS[:0]) is None
  assert metrics.kl_divergence(LOGITS[:0], LOGITS[:0]) is None


def test_agreement_by_hand():
  other = LOGITS.copy()
  other[0] = [9.0, 0.0, 0.0]
  assert metrics.agreement(LOGITS, LOGITS + 5) == 1.0
  assert metrics.agreement(LOGITS, other) == 0.75


def test_kl_divergence_by_hand_and_in_its_direction():
  p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
  # 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1)
  np.testing.assert_allclose(
    metrics.kl_divergence(np.log(p), np.log(q)), 0.510826, atol=1e-6
  )
  # 0.9 ln(0.9 / 0.5) + 0.1 ln(0.1 / 0.5)
  np.testing.assert_allclose(
    metrics.kl_divergence(np.log(q), np.log(p)), 0.368064, atol=1e-6
  )
  assert metrics.kl_divergence(LOGITS, LOGITS + 7) == pytest.approx(0)


def test_evaluation_of_all_splits():
  names = ("train_forget", "train_retain", "test_forget", "test_retain")
  logits = dict.fromkeys(names, LOGITS)
  labels = dict.fromkeys(names, LABELS)
  logits["test_forget"], labels["test_forget"] = LOGITS[:2], LABELS[:2]
  result = metrics.evaluate(logits, labels, logits)
  assert result["accuracy"] == {
    "train_forget": 0.5,
    "train_retain": 0.5,
    "test_forget": 0.5,
    "test_retain": 0.5,
    "test": 0.5,
  }
  assert np.sum(result["confusion_matrix"]) == 6
  assert result["agreement"] == dict.fromkeys(names, 1.0)
  assert set(result["kl_divergence"].values()) == {0.0}
  assert "agreement" not in metrics.evaluate(logits, labels)


def test_bad_shapes():
  with pytest.raises(ValueError, match=r"got \[4, 3\] and \[3\]"):
    metrics.accuracy(LOGITS, LABELS[:3])
  with pytest.raises(ValueError, match="for both models"):
    metrics.agreement(LOGITS, LOGITS[:3])
  with pytest.raises(ValueError, match="must have the split 'test_forget'"):
    metrics.evaluate({}, {})
