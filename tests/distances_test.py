import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special

from psg_jax import metrics

P, Q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
PAIRWISE = (
  metrics.js_divergence,
  metrics.total_variation,
  metrics.activation_distance,
  metrics.zrf,
)


def random_logits(num_classes=5, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(0, 3, (2, 40, num_classes))


def test_js_divergence_by_hand_and_against_scipy():
  # Half of 0.5 ln(5/7) + 0.5 ln(5/3), and half of 0.9 ln(9/7) + 0.1 ln(1/3).
  assert metrics.js_divergence(P, Q) == pytest.approx(0.1017493, abs=1e-7)
  a, b = random_logits()
  softmax = scipy.special.softmax
  expected = scipy.spatial.distance.jensenshannon(
    softmax(a, -1), softmax(b, -1), axis=-1
  )
  assert metrics.js_divergence(a, b) == pytest.approx(np.mean(expected**2))


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_sure_and_different_predictions_are_at_the_far_end(num_classes):
  a, b = np.zeros((2, 3, num_classes), np.float32)
  a[:, 0] = b[:, 1] = 2000
  assert metrics.js_divergence(a, b) == pytest.approx(np.log(2))
  assert metrics.zrf(a, b) == pytest.approx(1 - np.log(2))
  assert metrics.total_variation(a, b) == pytest.approx(1)
  assert metrics.activation_distance(a, b) == pytest.approx(np.sqrt(2))


def test_total_variation_and_activation_distance_by_hand():
  assert metrics.total_variation(P, Q) == pytest.approx(0.4)
  # The square root of 0.4² + 0.4².
  assert metrics.activation_distance(P, Q) == pytest.approx(0.5656854)
  assert metrics.zrf(P, Q) == pytest.approx(0.8982507, abs=1e-7)


@pytest.mark.parametrize("fn", PAIRWISE)
def test_distances_are_symmetric_and_do_not_see_a_common_shift(fn):
  a, b = random_logits()
  assert fn(a, b) == pytest.approx(fn(b, a))
  assert fn(a, b) == pytest.approx(fn(a + 3, b - 40))
  at_itself = 1 if fn is metrics.zrf else 0
  assert fn(a, a) == pytest.approx(at_itself, abs=1e-12)
  assert abs(fn(a, b) - at_itself) > 0.1
  with pytest.raises(ValueError, match="for both models, got"):
    fn(a, b[:3])
  with pytest.raises(metrics.NotAvailableError, match="there are no images"):
    fn(a[:0], b[:0])


def test_linear_cka_against_the_kernel_form():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(30, 4))
  y = np.concatenate([x[:, :2], rng.normal(size=(30, 5))], -1) + 7
  centre = np.eye(30) - 1 / 30

  def hsic(a, b):
    return np.trace(centre @ a @ a.T @ centre @ b @ b.T)

  expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
  assert 0.1 < expected < 0.9
  assert metrics.linear_cka(x, y) == pytest.approx(expected)
  rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
  assert metrics.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
  assert metrics.linear_cka(x, y, max_rows=12) != pytest.approx(expected)


def test_linear_cka_without_a_value():
  x = np.random.default_rng(0).normal(size=(5, 3))
  with pytest.raises(metrics.NotAvailableError, match="same for all images"):
    metrics.linear_cka(x, np.ones((5, 2)))
  with pytest.raises(metrics.NotAvailableError, match="1 images are too few"):
    metrics.linear_cka(x[:1], x[:1])
  with pytest.raises(ValueError, match="of the same images, got 5 and 4"):
    metrics.linear_cka(x, x[:4])


def test_weight_distance_by_hand():
  a = {"layer": {"kernel": jnp.zeros((2, 2)), "bias": jnp.ones(2)}}
  b = {"layer": {"kernel": jnp.full((2, 2), 1.5), "bias": jnp.array([1, 5])}}
  # 4 · 1.5² + 4² = 25
  assert metrics.weight_distance(a, b) == pytest.approx(5)
  assert metrics.weight_distance(a, a) == 0
  with pytest.raises(ValueError, match="the structure of reference"):
    metrics.weight_distance(a, {"layer": {"kernel": jnp.zeros((2, 2))}})
  other = {"layer": {"kernel": jnp.zeros((2, 1)), "bias": jnp.ones(2)}}
  with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2, 1\)"):
    metrics.weight_distance(a, other)


def test_tug_of_war_by_hand():
  # 0.9 · 0.8 · 0.95
  found = metrics.tug_of_war((0.1, 0.7, 0.85), (0.0, 0.9, 0.9))
  assert found == pytest.approx(0.684)
  assert metrics.tug_of_war((0.2, 0.9, 0.8), (0.2, 0.9, 0.8)) == 1
  with pytest.raises(ValueError, match="accuracies must be finite"):
    metrics.tug_of_war((10.0, 90.0, 80.0), (0.0, 0.9, 0.9))


def test_run_time_efficiency_by_hand():
  assert metrics.run_time_efficiency(4.0, 120.0) == 30
  with pytest.raises(ValueError, match="seconds must be finite, positive"):
    metrics.run_time_efficiency(0.0, 120.0)


def test_relearning_by_hand():
  curve = [0.0, 0.5, 0.75, 0.8, 0.6]
  # Back at 95 % of 0.8, that is 0.76, after three steps; at half after one.
  assert metrics.relearn_steps(curve, 0.8) == 3
  assert metrics.relearn_steps(curve, 0.8, margin=0.5) == 1
  assert metrics.relearn_steps([0.9], 0.8) == 0
  slow = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
  assert metrics.anamnesis_index(curve, slow, 0.8) == pytest.approx(0.5)
  assert metrics.anamnesis_index([0.8], slow, 0.8) == 0
  with pytest.raises(metrics.NotAvailableError, match="within 4 steps: it"):
    metrics.relearn_steps(curve, 0.9)
  with pytest.raises(metrics.NotAvailableError, match="needs no step"):
    metrics.anamnesis_index(slow, [0.8], 0.8)
  with pytest.raises(ValueError, match="original_accuracy must be finite"):
    metrics.relearn_steps(curve, 0.0)


def test_linear_probe_finds_what_is_there_and_nothing_else():
  rng = np.random.default_rng(2)
  labels = rng.integers(0, 3, 300)
  noise = rng.normal(size=(300, 20))
  signal = noise + 4 * np.eye(20)[labels]
  probe = metrics.linear_probe(signal, labels)
  assert probe.accuracy > 0.95
  assert np.array_equal(probe.rows, np.arange(300))
  assert np.mean(probe.predictions == labels) == probe.accuracy
  # Judged on the images it was fitted to, 20 columns would give 0.45 or more;
  # three standard errors around a third.
  assert metrics.linear_probe(noise, labels).accuracy == pytest.approx(
    1 / 3, abs=0.09
  )
  few = metrics.linear_probe(signal, labels, max_rows=50)
  assert len(few.rows) == 50


def test_linear_probe_of_one_class():
  features = np.random.default_rng(0).normal(size=(30, 2))
  labels = np.zeros(30, int)
  labels[0] = 1
  with pytest.raises(metrics.NotAvailableError, match="fewer than two classes"):
    metrics.linear_probe(features, labels)
