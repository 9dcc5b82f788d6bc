"""Relearning, on a network of one number whose steps are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import psg_jax as psg
from psg_jax import metrics, relearning, training, types

KEY = jax.random.key(0)


def apply(variables, images):
  """Logits `[w, 0]` for every image."""
  lead = jnp.full(len(images), variables["params"]["w"])
  return jnp.stack([lead, jnp.zeros_like(lead)], -1)


MODEL = types.Model(
  init=lambda key, images: start(0.0),
  apply=apply,
  apply_train=lambda variables, images, key: (
    apply(variables, images),
    variables,
  ),
  features=lambda variables, images: images.reshape(len(images), -1),
)


def start(w):
  return {"params": {"w": jnp.float32(w)}}


def images_of(label, num_images=6):
  return types.Dataset(
    np.zeros((num_images, 2, 2, 1), np.uint8),
    np.full(num_images, label),
    ("a", "b"),
  )


def plain_sgd(rate=1.0):
  return training.sgd(rate, momentum=0.0, weight_decay=0.0)


def steps_by_hand(w):
  """Gradient steps of rate 1 on `-log σ(w)` until `w` is not negative."""
  steps = 0
  while w < 0:
    w += 1 / (1 + np.exp(w))
    steps += 1
  return steps


@pytest.mark.parametrize(("w", "expected"), [(0.5, 0), (-1.0, 2), (-3.0, 4)])
def test_steps_are_those_by_hand(w, expected):
  variables = start(w)
  curve = relearning.relearn(
    MODEL,
    variables,
    images_of(0),
    KEY,
    target_accuracy=0.95,
    num_steps=9,
    batch_size=4,
    optimizer=plain_sgd(),
  )
  assert steps_by_hand(w) == expected
  # Accuracies are of all images, which are alike: back at once or not at all.
  assert curve.tolist() == [0.0] * expected + [1.0]
  assert metrics.relearn_steps(curve, 1.0) == expected
  # The model is left as it is.
  assert float(variables["params"]["w"]) == w


def test_the_optimizer_goes_on_from_step_to_step():
  # With momentum 0.9 the second step repeats nine tenths of the first.
  options = {
    "target_accuracy": 1.0,
    "num_steps": 3,
    "optimizer": training.sgd(0.4, momentum=0.9, weight_decay=0.0),
  }
  curve = relearning.relearn(MODEL, start(-1.0), images_of(0), KEY, **options)
  w, velocity, expected = -1.0, 0.0, [0.0]
  for _ in range(3):
    velocity = 0.9 * velocity + 1 / (1 + np.exp(w))
    w += 0.4 * velocity
    expected.append(float(w >= 0))
  assert curve.tolist() == expected == [0.0, 0.0, 0.0, 1.0]
  # Without it the three steps are not enough.
  options["optimizer"] = plain_sgd(0.4)
  curve = relearning.relearn(MODEL, start(-1.0), images_of(0), KEY, **options)
  assert curve.tolist() == [0.0] * 4
  with pytest.raises(metrics.NotAvailableError, match="within 3 steps"):
    metrics.relearn_steps(curve, 1.0)


def test_each_image_is_seen_before_any_is_seen_again():
  # A number for each image, which one step on the image puts right.
  def lookup(variables, images):
    rows = jnp.round(images[:, 0, 0, 0] * 255).astype(int)
    lead = variables["params"]["w"][rows]
    return jnp.stack([lead, jnp.zeros_like(lead)], -1)

  model = MODEL._replace(
    apply=lookup,
    apply_train=lambda variables, images, key: (
      lookup(variables, images),
      variables,
    ),
  )
  images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
  dataset = types.Dataset(images, np.zeros(6, int), ("a", "b"))
  curve = relearning.relearn(
    model,
    {"params": {"w": jnp.full(6, -0.3)}},
    dataset,
    KEY,
    target_accuracy=1.0,
    num_steps=9,
    batch_size=2,
    optimizer=plain_sgd(2.0),
  )
  np.testing.assert_allclose(curve, [0, 1 / 3, 2 / 3, 1])


def test_table_has_the_steps_where_it_is_told_to():
  train, test = (
    types.Dataset(
      np.zeros((8, 2, 2, 1), np.uint8), np.arange(8) % 2, ("a", "b")
    )
    for _ in range(2)
  )
  parts = psg.evaluation.parts(train, test, classes="a")
  models = {
    name: start(w)
    for name, w in {"original": 2.0, "hidden": -0.02, "retrained": -0.1}.items()
  }
  table = psg.evaluate(MODEL, parts, num_relearn_steps=40, **models)
  curves = {
    name: relearning.relearn(
      MODEL, models[name], parts.split.forget, KEY, **options
    )
    for options in [{"target_accuracy": 0.95, "num_steps": 40}]
    for name in ("hidden", "retrained")
  }
  steps = {name: len(curve) - 1 for name, curve in curves.items()}
  assert 0 < steps["hidden"] < steps["retrained"]
  for name, number in steps.items():
    assert table.value(name, "relearn_steps") == number
  assert table.value("hidden", "anamnesis_index") == (
    steps["hidden"] / steps["retrained"]
  )
  # The original has nothing to relearn, and is not trained.
  (row,) = (x for x in table if x[:3] == ("original", "", "relearn_steps"))
  assert row.value is None
  assert "original" in row.reason
  with pytest.raises(ValueError, match="num_relearn_steps must be"):
    psg.evaluate(MODEL, parts, num_relearn_steps=-1, **models)
  names = {x.metric for x in psg.evaluate(MODEL, parts, **models)}
  assert not names & set(psg.evaluation.RELEARNING)


def test_bad_input():
  good = {"target_accuracy": 1.0, "num_steps": 1}
  for dataset, options, message in [
    (images_of(0, 0), {}, "forget must not be empty"),
    (images_of(0), {"target_accuracy": 95}, "target_accuracy must be finite"),
    (images_of(0), {"num_steps": 0}, "num_steps must be an integer"),
    (images_of(0), {"batch_size": 0}, "batch_size must be an integer"),
  ]:
    with pytest.raises(ValueError, match=message):
      relearning.relearn(MODEL, start(0.0), dataset, KEY, **{**good, **options})
