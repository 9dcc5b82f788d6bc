"""The released step against a rewrite of it in NumPy, in any clone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import baselines, boundary, training, types
from tests import fakes, released_numpy, tolerances

KEY = jax.random.key(3)
MEAN, STD = np.array([0.41, 0.52, 0.6]), np.array([0.23, 0.31, 0.27])
NUM_IMAGES, SIZE, NUM_CLASSES, WIDTH = 6, 5, 3, 0.05
NUM_FILTERS = int(96 * WIDTH)
# An input meets the products and sums of the convolution, of the mean over
# pixels and of the head, in training those of the batch statistics too, and all
# again on the way back.
SEARCH_ROUNDINGS = 2 * (27 + SIZE**2 + NUM_FILTERS + NUM_CLASSES)
TRAINING_ROUNDINGS = SEARCH_ROUNDINGS + 2 * NUM_IMAGES * SIZE**2
SEARCHES = [
  {},
  {"distance_weight": 0.02},
  {"noise_scale": 0.02},
  {"distance_weight": 0.01, "noise_scale": 0.01, "step_size": 0.03},
]


def make_model():
  return fakes.small_cnn(
    num_classes=NUM_CLASSES, width=WIDTH, mean=MEAN, std=STD
  )


@pytest.fixture(scope="module")
def tiny():
  """A network with statistics of its own, in float64, and images."""
  rng = np.random.default_rng(8)
  variables = {
    "params": {
      "block_0": {
        "kernel": rng.normal(size=(3, 3, 3, NUM_FILTERS)) / 5,
        "scale": rng.uniform(0.5, 1.5, NUM_FILTERS),
        "bias": np.zeros(NUM_FILTERS),
      },
      "head": {
        "kernel": rng.normal(size=(NUM_FILTERS, NUM_CLASSES)),
        "bias": np.zeros(NUM_CLASSES),
      },
    },
    "batch_stats": {
      "block_0": {
        "mean": rng.normal(size=NUM_FILTERS) / 5,
        "var": rng.uniform(0.5, 2, NUM_FILTERS),
        "count": np.int32(4),
      }
    },
  }
  images = rng.integers(0, 256, (NUM_IMAGES, SIZE, SIZE, 3)).astype(np.uint8)
  labels = np.arange(NUM_IMAGES) % NUM_CLASSES
  return variables, images, labels


def to_float32(variables):
  return jax.tree.map(
    lambda x: jnp.asarray(x, None if x.dtype == np.int32 else jnp.float32),
    variables,
  )


def numpy_search(tiny, **options):
  variables, images, labels = tiny
  keys = boundary.sample_keys(KEY, jnp.arange(NUM_IMAGES))
  shape = images.shape[1:]
  noise = [np.asarray(jax.random.normal(key, shape), float) for key in keys]
  return released_numpy.search(
    variables,
    images / 255,
    labels,
    np.stack(noise),
    mean=MEAN,
    std=STD,
    **options,
  )


@pytest.mark.parametrize("options", SEARCHES)
def test_search_equals_numpy(tiny, options):
  variables, images, labels = tiny
  expected, logits, pixels, moved, direction = numpy_search(tiny, **options)
  # Neither a sign nor a rounding hangs on the last bits of float32.
  largest = np.abs(direction).max()
  margin = tolerances.float32(SEARCH_ROUNDINGS, largest)
  assert np.abs(direction).min() > margin
  step = np.sign(direction) * options.get("step_size", 0.1)
  levels = np.clip(pixels + step, 0, 1) * 255
  is_clipped = (levels == 0) | (levels == 255)
  to_half = np.abs(np.abs(levels - np.round(levels)) - 0.5)
  assert to_half[~is_clipped].min() > tolerances.float32(6, 255)

  output = boundary.released_code_search(
    make_model().apply,
    to_float32(variables),
    jnp.asarray(images / np.float32(255)),
    jnp.asarray(labels),
    KEY,
    model_mean=MEAN,
    model_std=STD,
    **options,
  )
  # A division and three products and sums a side, of values up to 1 / 0.2.
  np.testing.assert_allclose(
    output.images, expected, rtol=0, atol=tolerances.float32(8, 5)
  )
  np.testing.assert_array_equal(output.labels, logits.argmax(1))
  np.testing.assert_array_equal(output.is_crossed, logits.argmax(1) != labels)
  np.testing.assert_allclose(
    output.logits,
    logits,
    rtol=0,
    atol=tolerances.float32(SEARCH_ROUNDINGS, np.abs(logits).max()),
  )
  np.testing.assert_allclose(
    output.distance,
    np.abs(moved - pixels).max((1, 2, 3)),
    rtol=0,
    atol=tolerances.float32(8),
  )


def test_options_of_the_search_turn_signs(tiny):
  signs = [np.sign(numpy_search(tiny, **x)[-1]) for x in SEARCHES]
  for other in signs[1:]:
    # Else the cases above would say nothing of λ and γ.
    assert 0.02 < np.mean(other != signs[0]) < 0.98


@pytest.mark.parametrize("learning_rate", [None, 0.1])
def test_update_equals_numpy(tiny, learning_rate):
  variables, images, labels = tiny
  num_steps = 3
  targets = numpy_search(tiny)[1].argmax(1)
  assert np.any(targets != labels)
  expected = released_numpy.update(
    variables,
    images / 255,
    targets,
    mean=MEAN,
    std=STD,
    learning_rate=learning_rate or 1e-5,
    num_steps=num_steps,
  )
  names = ("a", "b", "c")
  forget = types.Dataset(images=images, labels=labels, class_names=names)
  optimizer = None
  if learning_rate is not None:
    optimizer = training.sgd(learning_rate, weight_decay=0.0)
  output = baselines.find("psg_released").fn(
    make_model(),
    to_float32(variables),
    types.Split(forget, forget.take([])),
    KEY,
    model_mean=MEAN,
    model_std=STD,
    num_epochs=num_steps,
    optimizer=optimizer,
    show_progress=False,
  )

  def check(actual, start, end):
    # The start is rounded to float32, and so is it after every step; biases
    # start at 0, so that of them every digit of the move counts.
    np.testing.assert_allclose(
      np.asarray(actual, float) - start,
      end - start,
      rtol=0,
      atol=tolerances.float32(num_steps + 1, np.abs(start).max())
      + tolerances.float32(
        num_steps * TRAINING_ROUNDINGS, np.abs(end - start).max()
      ),
    )

  jax.tree.map(check, output.variables, variables, expected)
