"""Methods that are a finetuning on images and targets of their own making."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psg_jax import boundary, models, streaming, types
from psg_jax.baselines import amun, delete, trew
from tests import fakes

KEY = jax.random.key(0)
MODEL = fakes.linear_model(16, 3)


@pytest.fixture(scope="module")
def known():
  """A linear model that knows three classes by their thirds of the rows."""
  thirds = np.arange(16)[:, None] % 3 == np.arange(3)
  kernel = thirds + np.random.default_rng(1).normal(0, 0.1, (16, 3))
  return fakes.linear_variables(kernel), fakes.split_class(fakes.blobs(60))


def run(fn, known, key=KEY, **options):
  variables, split = known
  return fn(MODEL, variables, split, key, **{"show_progress": False, **options})


find = functools.partial(
  amun.nearest_adversarial, show_progress=False, num_steps=50
)


def flat(dataset):
  return dataset.images.reshape(len(dataset), -1) / 255.0


def softmax(logits):
  shifted = np.exp(logits - logits.max(1, keepdims=True))
  return shifted / shifted.sum(1, keepdims=True)


def logits_of(variables, dataset):
  kernel, bias = (
    np.asarray(variables["params"][x], float) for x in ("kernel", "bias")
  )
  return flat(dataset) @ kernel + bias


def errors_of(variables, dataset, targets):
  """What the gradient of the summed cross-entropy is the images times of."""
  return flat(dataset).T @ (softmax(logits_of(variables, dataset)) - targets)


def one_hot(labels):
  return np.eye(3)[labels]


def spoiled(dataset):
  return types.Dataset(
    255 - dataset.images, (dataset.labels + 1) % 3, dataset.class_names
  )


def boundary_distances(variables, dataset):
  """How far the nearest plane between two classes is, in closed form."""
  kernel = np.asarray(variables["params"]["kernel"], float)
  logits, labels = logits_of(variables, dataset), dataset.labels
  rows = np.arange(len(labels))
  margins = logits[rows, labels][:, None] - logits
  lengths = np.linalg.norm(kernel.T[labels][:, :, None] - kernel, axis=1)
  lengths[rows, labels] = np.inf
  margins[rows, labels] = np.inf
  return (margins / np.where(np.isinf(lengths), 1, lengths)).min(1)


def test_adversarial_images_are_the_nearest_that_grey_levels_allow(known):
  variables, split = known
  adversarial = find(MODEL, variables, split.forget, KEY, start_radius=0.05)
  moved = types.Dataset(
    adversarial.images, adversarial.labels, split.forget.class_names
  )
  predicted = logits_of(variables, moved).argmax(1)
  np.testing.assert_array_equal(predicted, adversarial.labels)
  assert not np.any(adversarial.labels == split.forget.labels)
  distances = np.linalg.norm(flat(moved) - flat(split.forget), axis=1)
  nearest = boundary_distances(variables, split.forget)
  # Half a grey level in each of 16 pixels.
  slack = 0.5 / 255 * 4
  assert np.all(distances >= nearest)
  assert np.all(distances <= adversarial.radii + slack)
  # The gradient follows both other classes, and the last step of a tenth of
  # the radius goes past the plane.
  assert np.all(distances <= 1.35 * nearest + slack)
  doublings = np.log2(adversarial.radii / 0.05)
  np.testing.assert_allclose(doublings, np.round(doublings), atol=1e-5)
  assert np.all(adversarial.radii < 2.7 * nearest + 2 * slack)
  assert len(np.unique(doublings)) > 1


def test_adversarial_images_do_not_depend_on_the_batch_or_where_images_are(
  known,
):
  variables, split = known
  whole = find(MODEL, variables, split.forget, KEY)
  num_programs = boundary.num_programs()
  parts = find(MODEL, variables, split.forget, KEY, batch_size=7)
  # One for all radii, however many images are left.
  assert boundary.num_programs() == num_programs + 1
  chex.assert_trees_all_equal(parts, whole)
  stored = streaming.Images(
    [streaming.InMemory(split.forget.images)],
    np.arange(len(split.forget)),
    split.forget.images.shape[1:],
    0,
  )
  lazy = types.Dataset(stored, split.forget.labels, split.forget.class_names)
  chex.assert_trees_all_equal(find(MODEL, variables, lazy, KEY), whole)


def test_an_image_that_is_wrong_already_is_its_own_adversarial(known):
  variables, split = known
  wrong = types.Dataset(
    split.retain.images,
    np.zeros(len(split.retain), np.int32),
    split.retain.class_names,
  )
  adversarial = find(MODEL, variables, wrong, KEY, start_radius=0.5)
  np.testing.assert_array_equal(adversarial.images, wrong.images)
  np.testing.assert_array_equal(adversarial.labels, split.retain.labels)
  np.testing.assert_array_equal(adversarial.radii, np.float32(0.5))


def test_a_model_that_sees_one_class_everywhere_has_no_adversarial(known):
  _, split = known
  constant = fakes.linear_variables(np.zeros((16, 3)), [1.0, 0.0, 0.0])
  adversarial = find(MODEL, constant, split.forget, KEY, num_steps=2)
  assert np.all(np.isinf(adversarial.radii))
  np.testing.assert_array_equal(adversarial.images, split.forget.images)
  with pytest.raises(ValueError, match=r"split\.forget must .* got none of"):
    run(amun.amun, (constant, split), num_steps=2)


def amun_by_hand(variables, split, rate, has_retain):
  """One step of SGD on the adversarial, the forget and the retain images."""
  adversarial = find(MODEL, variables, split.forget, KEY)
  parts = [
    types.Dataset(
      adversarial.images, adversarial.labels, split.forget.class_names
    ),
    split.forget,
    *[split.retain] * has_retain,
  ]
  gradient = sum(errors_of(variables, x, one_hot(x.labels)) for x in parts)
  kernel = np.asarray(variables["params"]["kernel"])
  return kernel - rate * gradient / sum(map(len, parts))


@pytest.mark.parametrize("has_retain", [True, False])
def test_conformance_amun_keeps_the_true_labels_beside_the_wrong_ones(
  known, has_retain
):
  variables, split = known
  output = run(
    amun.amun,
    known,
    retain_fraction=float(has_retain),
    num_epochs=1,
    batch_size=1000,
    optimizer=optax.sgd(0.5),
  )
  expected = amun_by_hand(variables, split, 0.5, has_retain)
  np.testing.assert_allclose(
    output.variables["params"]["kernel"], expected, atol=1e-6
  )
  assert output.history[0]["num_adversarial"] == len(split.forget)
  assert output.history[0]["search_seconds"] > 0
  assert ("retain_loss" in output.history[0]) == has_retain


def test_amun_without_retained_images_reads_none(known):
  variables, split = known
  options = {"retain_fraction": 0.0, "num_epochs": 2}
  other = split._replace(retain=spoiled(split.retain))
  empty = split._replace(retain=split.retain.take([]))
  first, second, third = (
    run(amun.amun, (variables, x), **options).variables
    for x in (split, other, empty)
  )
  chex.assert_trees_all_equal(first, second, third)


def test_amun_makes_the_model_less_sure_of_forget_images(known):
  variables, split = known
  output = run(
    amun.amun, known, num_epochs=20, batch_size=16, optimizer=optax.sgd(0.03)
  )
  rows = np.arange(len(split.forget))
  before, after = (
    softmax(logits_of(x, split.forget))[rows, split.forget.labels].mean()
    for x in (variables, output.variables)
  )
  assert after < before - 0.04
  kept = logits_of(output.variables, split.retain).argmax(1)
  assert np.mean(kept == split.retain.labels) > 0.95


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"retain_fraction": 1.5}, r"retain_fraction .* got 1\.5"),
    ({"start_radius": 0.0}, r"start_radius .* got 0\.0"),
    ({"num_steps": 0}, r"num_steps .* got 0"),
    ({"search_batch_size": 0}, r"batch_size .* got 0"),
  ],
)
def test_amun_says_what_is_wrong(known, options, message):
  with pytest.raises(ValueError, match=message):
    run(amun.amun, known, **options)
  variables, split = known
  with pytest.raises(ValueError, match=r"dataset must not be empty"):
    find(MODEL, variables, split.forget.take([]), KEY)


def test_other_classes_share_what_the_label_leaves():
  logits = np.log([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
  found = delete.other_classes(logits, np.array([0, 2]))
  assert found.dtype == np.float32
  expected = [[0.0, 0.6, 0.4], [1 / 9, 8 / 9, 0.0]]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  # Of a probability of exp(-200) nothing is left, of its logit all.
  sure = delete.other_classes(np.array([[200.0, 1.0, 0.0]]), np.array([0]))
  share = 1 / (1 + np.exp(-1))
  np.testing.assert_allclose(sure, [[0.0, share, 1 - share]], atol=1e-6)
  with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
    delete.other_classes(logits, np.array([0, 3]))
  with pytest.raises(ValueError, match=r"num_classes .* got 1"):
    delete.other_classes(np.zeros((1, 1)), np.array([0]))


def delete_by_hand(variables, split, rate, num_steps):
  """Steps from the original, whose targets stay what they were."""
  targets = softmax(logits_of(variables, split.forget))
  targets[:, 0] = 0  # The forget set is class 0.
  targets /= targets.sum(1, keepdims=True)
  params = jax.tree.map(lambda x: np.asarray(x, float), variables["params"])
  for _ in range(num_steps):
    errors = softmax(logits_of({"params": params}, split.forget)) - targets
    gradient = flat(split.forget).T @ errors / len(targets)
    params = {
      "kernel": params["kernel"] - rate * gradient,
      "bias": params["bias"] - rate * errors.mean(0),
    }
  return {"params": params}


def test_conformance_delete_masks_the_teacher_and_not_the_student(known):
  variables, split = known
  options = {"num_epochs": 3, "optimizer": optax.sgd(0.5)}
  output = run(delete.delete, known, **options)
  expected = delete_by_hand(variables, split, 0.5, 3)
  chex.assert_trees_all_close(output.variables, expected, atol=1e-5)
  # A student that is masked too is at its target from the start.
  moved = output.variables["params"]["kernel"] - variables["params"]["kernel"]
  assert np.abs(moved).max() > 0.1
  other = split._replace(retain=spoiled(split.retain))
  again = run(delete.delete, (variables, other), **options)
  chex.assert_trees_all_equal(again.variables, output.variables)


def test_delete_forgets_the_class_and_keeps_the_order_of_the_others(known):
  variables, split = known
  output = run(delete.delete, known, num_epochs=200, optimizer=optax.sgd(0.5))
  before = logits_of(variables, split.forget)
  after = logits_of(output.variables, split.forget)
  assert not np.any(after.argmax(1) == 0)
  np.testing.assert_array_equal(after.argmax(1), before[:, 1:].argmax(1) + 1)
  # What is left of the divergence from the targets.
  logs = np.log(softmax(after))
  targets = np.maximum(output.targets, 1e-12)
  distances = np.sum(output.targets * (np.log(targets) - logs), 1)
  assert distances.mean() < 0.05


def test_similarity_is_the_cosine_about_the_mean_of_classes():
  angles = np.deg2rad([0.0, 120.0, 240.0])
  weights = np.stack([np.cos(angles), np.sin(angles)])
  expected = 1.5 * np.eye(3) - 0.5
  found = trew.class_similarity(weights)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, atol=1e-6)
  # What all classes share changes no prediction, nor does it the likeness.
  shifted = trew.class_similarity(4.0 * weights + np.array([[30.0], [-7.0]]))
  np.testing.assert_allclose(shifted, expected, atol=1e-6)
  kernel = np.random.default_rng(0).normal(size=(3, 3, 5, 4))
  np.testing.assert_array_equal(
    trew.class_similarity(kernel), trew.class_similarity(kernel.reshape(-1, 4))
  )


def test_similarity_of_principal_components():
  # Apart by 4 along the first axis and by 1 along the second.
  weights = np.array([[2.0, 2.0, -2.0, -2.0], [0.5, -0.5, 0.5, -0.5]])
  signs = np.array([1.0, 1.0, -1.0, -1.0])
  first = trew.class_similarity(weights, num_components=1)
  np.testing.assert_allclose(first, np.outer(signs, signs), atol=1e-6)
  cosine = (4 - 0.25) / (4 + 0.25)
  found = trew.class_similarity(weights)
  np.testing.assert_allclose(found[0], [1, cosine, -cosine, -1], atol=1e-6)
  for count in (2, 9):
    np.testing.assert_allclose(
      trew.class_similarity(weights, num_components=count), found, atol=1e-6
    )
  # Classes that are all alike have no direction.
  assert not trew.class_similarity(np.ones((2, 3))).any()


def test_similarity_sharpened_by_a_softmax():
  weights = np.array([[2.0, 2.0, -2.0, -2.0], [0.5, -0.5, 0.5, -0.5]])
  found = trew.class_similarity(weights, temperature=0.5)
  raw = np.exp(trew.class_similarity(weights) / 0.5) * (1 - np.eye(4))
  np.testing.assert_allclose(found, raw / raw.sum(1)[:, None], atol=1e-6)


def test_tilted_multiplies_the_prediction_and_leaves_out_the_label():
  logits = np.log([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
  similarity = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
  labels = np.array([0, 2])
  found = trew.tilted(logits, labels, similarity, np.log(2))
  # 0.3 twice against 0.2, and 0.2 four times against 0.2.
  np.testing.assert_allclose(
    found, [[0.0, 0.75, 0.25], [0.8, 0.2, 0.0]], atol=1e-6
  )
  np.testing.assert_array_equal(
    trew.tilted(logits, labels, similarity, 0.0),
    delete.other_classes(logits, labels),
  )


def test_tilted_is_nearest_among_those_that_are_as_similar():
  rng = np.random.default_rng(0)
  logits, scores = rng.normal(size=(1, 5)), rng.normal(size=5)
  labels = np.array([0])
  similarity = np.tile(scores, (5, 1))
  plain = delete.other_classes(logits, labels)[0, 1:].astype(float)
  tilted = trew.tilted(logits, labels, similarity, 1.5)[0, 1:].astype(float)
  rest = scores[1:]
  assert tilted @ rest > plain @ rest

  def divergence(other):
    return np.sum(other * np.log(other / plain))

  # Directions in which neither the sum nor the mean similarity changes.
  basis = np.linalg.svd(np.stack([np.ones(4), rest]))[2][2:]
  for direction in rng.normal(size=(20, 2)) @ basis:
    size = 0.5 * tilted.min() / np.abs(direction).max()
    other = tilted + size * direction
    assert divergence(other) > divergence(tilted)


def test_conformance_trew_tilts_the_models_own_prediction(known):
  variables, split = known
  output = run(
    trew.trew,
    known,
    layer="kernel",
    strength=0.7,
    retain_weight=0.5,
    num_epochs=1,
    # One step, of all images of both sets.
    batch_size=len(split.retain),
    optimizer=optax.sgd(0.5),
  )
  kernel = np.asarray(variables["params"]["kernel"], float)
  centred = kernel - kernel.mean(1, keepdims=True)
  lengths = np.linalg.norm(centred, axis=0)
  similarity = centred.T @ centred / np.outer(lengths, lengths)
  targets = softmax(logits_of(variables, split.forget))
  targets *= np.exp(0.7 * similarity[0])
  targets[:, 0] = 0
  targets /= targets.sum(1, keepdims=True)
  np.testing.assert_allclose(output.targets, targets, atol=1e-5)
  # One row for all images of a class would be the similarity alone.
  assert np.ptp(output.targets[:, 1]) > 0.05
  gradient = errors_of(variables, split.forget, targets) / len(split.forget)
  retain = one_hot(split.retain.labels)
  # A batch takes 1000 retained images: 1000 / 41 rounds of them, not a whole
  # number, so that single images count once more or less.
  gradient += (
    0.5 * errors_of(variables, split.retain, retain) / len(split.retain)
  )
  np.testing.assert_allclose(
    output.variables["params"]["kernel"], kernel - 0.5 * gradient, atol=1e-6
  )


def test_trew_without_tilt_and_retained_images_is_delete(known):
  options = {
    "num_epochs": 3,
    "batch_size": 8,
    "optimizer": optax.sgd(0.3),
    "schedule": "constant",
  }
  plain = run(delete.delete, known, **options)
  output = run(
    trew.trew, known, layer="kernel", strength=0.0, retain_weight=0.0, **options
  )
  chex.assert_trees_all_equal(output.variables, plain.variables)
  np.testing.assert_array_equal(output.targets, plain.targets)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, r"layer must .* got 'head/kernel'"),
    ({"layer": "bias"}, r"layer must .* got 'bias'"),
    ({"layer": "kernel", "strength": np.inf}, r"strength .* got inf"),
    ({"layer": "kernel", "num_components": 0}, r"num_components .* got 0"),
    ({"layer": "kernel", "temperature": 0.0}, r"temperature .* got 0\.0"),
    ({"layer": "kernel", "retain_weight": -1.0}, r"retain_weight .* got -1"),
  ],
)
def test_trew_says_what_is_wrong(known, options, message):
  with pytest.raises(ValueError, match=message):
    run(trew.trew, known, **options)
  with pytest.raises(ValueError, match=r"similarity must be \[3, 3\]"):
    trew.tilted(np.zeros((1, 3)), np.array([0]), np.eye(2), 1.0)


@pytest.mark.parametrize("name", list(models.NETWORKS))
def test_the_networks_have_their_last_weights_where_trew_looks(name):
  model = models.create(name, num_classes=7, num_channels=3, mean=0.5, std=0.5)
  shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))
  assert shapes["params"]["head"]["kernel"].shape[-1] == 7
