import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psg_jax import (
  baselines,
  batches,
  boundary,
  forget,
  inference,
  relabelling,
  steps,
  training,
  twins,
  types,
  unlearning,
)
from tests import fakes, tolerances

KEY = jax.random.key(0)
SEARCH = {
  "num_steps": 60,
  "step_size": 0.02,
  "step_growth": 1.0,
  "num_bisections": 0,
}


@pytest.fixture(scope="module")
def trained():
  """A linear model that knows three separable classes."""
  dataset = fakes.blobs(120)
  model = fakes.linear_model(16, 3)
  variables, _ = training.fit(
    model,
    fakes.linear_variables(np.zeros((16, 3))),
    dataset,
    KEY,
    optimizer=training.sgd(0.5),
    num_epochs=10,
    batch_size=16,
    schedule="constant",
    show_progress=False,
  )
  return model, variables, fakes.split_class(dataset)


def accuracy(model, variables, dataset):
  logits = inference.predict(model.apply, variables, dataset.images)
  return np.mean(logits.argmax(1) == dataset.labels)


def unlearn(trained, **options):
  model, variables, split = trained
  return unlearning.unlearn(
    model,
    variables,
    split,
    KEY,
    **{
      **SEARCH,
      "labels": "hard",
      "optimizer": training.sgd(0.2),
      "num_epochs": 6,
      "batch_size": 16,
      "show_progress": False,
      **options,
    },
  )


def test_forgets_a_class_and_keeps_the_rest(trained):
  model, variables, split = trained
  assert accuracy(model, variables, split.forget) == 1
  before = jax.tree.map(np.array, variables)
  output = unlearn(trained)
  assert accuracy(model, output.variables, split.forget) == 0
  assert accuracy(model, output.variables, split.retain) > 0.95
  chex.assert_trees_all_equal(variables, before)
  assert output.relabelling.is_crossed.all()
  assert not np.any(output.targets == split.forget.labels)
  assert output.history[-1]["label_accuracy"] > 0.8
  assert output.history[0]["search_seconds"] > 0
  assert len(output.history[0]["forget_step_losses"]) == -(
    -len(split.forget) // 16
  )


def test_targets_are_the_classes_that_the_search_reaches(trained):
  model, variables, split = trained
  output = unlearn(trained)
  direct = boundary.search(
    model.apply,
    variables,
    training.to_float(jnp.asarray(split.forget.images)),
    jnp.asarray(split.forget.labels),
    KEY,
    **SEARCH,
  )
  np.testing.assert_array_equal(output.targets, direct.labels)
  np.testing.assert_allclose(
    output.relabelling.distance, direct.distance, atol=1e-5
  )


def test_first_step_equals_the_formula(trained):
  """One batch of everything: gradient of CE_F + φ CE_R by hand."""
  model, variables, split = trained
  num_forget = len(split.forget)
  retain = split.retain.take(np.arange(num_forget))
  targets = np.full(num_forget, 2)
  state, history = unlearning.update(
    model,
    variables,
    split._replace(retain=retain),
    targets,
    KEY,
    optimizer=optax.sgd(0.1),
    num_epochs=1,
    batch_size=num_forget,
    schedule="constant",
    retain_weight=0.25,
    show_progress=False,
  )
  kernel = np.asarray(variables["params"]["kernel"])
  bias = np.asarray(variables["params"]["bias"])
  gradient, losses = np.zeros_like(kernel), []
  for weight, dataset, labels in (
    (1.0, split.forget, targets),
    (0.25, retain, retain.labels),
  ):
    flat = dataset.images.reshape(num_forget, -1) / 255.0
    logits = flat @ kernel + bias
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient += weight * flat.T @ (soft - np.eye(3)[labels]) / num_forget
    losses.append(-np.log(soft[np.arange(num_forget), labels]).mean())
  np.testing.assert_allclose(
    state.variables["params"]["kernel"], kernel - 0.1 * gradient, atol=1e-5
  )
  np.testing.assert_allclose(
    [history[0]["forget_loss"], history[0]["retain_loss"]], losses, rtol=1e-4
  )


def test_without_retain_weight_no_retained_image_is_used(trained):
  _, _, split = trained
  spoiled = split.retain.take(np.arange(5))
  other = (trained[0], trained[1], split._replace(retain=spoiled))
  empty = (trained[0], trained[1], split._replace(retain=spoiled.take([])))
  outputs = [
    unlearn(each, retain_weight=0.0).variables
    for each in (trained, other, empty)
  ]
  chex.assert_trees_all_equal(outputs[0], outputs[1])
  chex.assert_trees_all_equal(outputs[0], outputs[2])


def test_soft_targets_known_answers():
  logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]]))
  np.testing.assert_allclose(
    unlearning.soft_targets(logits), [[0.1, 0.2, 0.3, 0.4]], atol=1e-6
  )
  np.testing.assert_allclose(
    unlearning.soft_targets(logits, top_k=2), [[0, 0, 3 / 7, 4 / 7]], atol=1e-6
  )
  np.testing.assert_allclose(
    unlearning.soft_targets(logits, labels="raw_logits"), logits, atol=1e-6
  )


def test_soft_other_drops_the_old_class():
  logits = np.log(np.array([[0.4, 0.4, 0.1, 0.1]]))
  targets = unlearning.soft_targets(
    logits, labels="soft_other", old_labels=np.array([0])
  )
  np.testing.assert_allclose(targets, [[0, 2 / 3, 1 / 6, 1 / 6]], atol=1e-6)
  with pytest.raises(ValueError, match="old_labels must be given"):
    unlearning.soft_targets(logits, labels="soft_other")


def test_soft_other_drops_all_classes_that_are_gone():
  logits = np.log(np.array([[0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.4, 0.3]]))
  targets = unlearning.soft_targets(
    logits,
    labels="soft_other",
    old_labels=np.array([0, 1]),
    gone=np.array([0, 1]),
  )
  np.testing.assert_allclose(
    targets, [[0, 0, 1 / 2, 1 / 2], [0, 0, 4 / 7, 3 / 7]], atol=1e-6
  )
  # A class of which a part is forgotten, where it is all that is retained.
  left = unlearning.soft_targets(
    np.zeros((2, 2)),
    labels="soft_other",
    old_labels=np.array([0, 1]),
    gone=np.array([0]),
  )
  assert left.tolist() == [[0, 1], [0, 1]]


def test_a_class_that_went_before_is_gone_as_well(trained):
  _, _, split = trained
  left = split.retain.take(split.retain.labels == 1)
  first = types.Split(split.forget, left)
  assert unlearning.gone_classes(first).tolist() == [0, 2]
  none = types.Split(split.forget, split.retain.take([]))
  assert unlearning.gone_classes(none) is None


def test_hard_labels_are_of_classes_that_are_retained():
  found = unlearning.Relabelling(
    labels=np.array([1, 0, 2], np.int32),
    logits=np.array([[0, 9, 5, 7], [9, 0, 8, 1], [9, 1, 5, 0]], np.float32),
    is_crossed=np.array([True, True, False]),
    distance=np.zeros(3, np.float32),
    num_steps=np.ones(3, np.int32),
  )
  taught = unlearning.Targets(labels="hard")
  old = np.array([0, 1, 2])
  gone = np.array([0, 1, 2])
  # The next of those that are left; what the released search left stays.
  assert taught.of_forget(found, None, old, gone).tolist() == [3, 3, 2]
  assert taught.of_forget(found, None, old, np.array([0])).tolist() == [1, 2, 2]
  assert taught.of_forget(found, None, old).tolist() == [1, 0, 2]
  # The old class is no label where another is left, though it is the nearest.
  near = dataclasses.replace(
    found,
    labels=np.array([2], np.int32),
    logits=np.array([[0, 2.9, 3, 1]], np.float32),
  )
  for gone, expected in (([2], 3), ([0, 2, 3], 1)):
    labels = taught.of_forget(near, None, np.array([1]), np.array(gone))
    assert labels.tolist() == [expected]


@pytest.mark.parametrize(
  ("num_forget", "expected"),
  [(1, 120), (64, 120), (65, 60), (1280, 6), (9999, 1)],
)
def test_small_forget_sets_get_more_passes(num_forget, expected):
  assert unlearning.default_num_epochs(num_forget, 64) == expected
  # Of four images at a time twice as many steps: 960 images at least.
  assert unlearning.default_num_epochs(200, 4) == 5
  assert unlearning.default_num_epochs(961, 4) == 1
  # Steps on the last layers cost half.
  of_last = functools.partial(
    unlearning.default_num_epochs, is_of_last_layers=True
  )
  assert [of_last(961, 4), of_last(200, 4)] == [2, 5]


def test_targets_at_the_image_are_the_prediction_without_the_old_class(trained):
  model, variables, split = trained
  output = unlearning.unlearn(
    *(model, variables, split, KEY),
    image_weight=1,
    num_epochs=1,
    show_progress=False,
  )
  assert output.relabelling is None  # Nothing had to be searched.
  logits = inference.predict(model.apply, variables, split.forget.images)
  # The forgotten class is 0, and the other two sum to 1.
  first = 1 / (1 + np.exp(logits[:, 2] - logits[:, 1]))
  expected = np.stack([np.zeros_like(first), first, 1 - first], 1)
  np.testing.assert_allclose(output.targets, expected, atol=1e-6)


def test_soft_targets_lie_between_the_boundary_and_the_image(trained):
  model, variables, split = trained
  image = inference.predict(model.apply, variables, split.forget.images)
  for weight in (0.0, 0.25, 1.0):
    output = unlearn(
      trained, labels="soft_other", image_weight=weight, num_epochs=1
    )
    if weight == 1:
      assert output.relabelling is None
      logits = image
    else:
      edge = output.relabelling.logits
      logits = (1 - weight) * edge + weight * image
    first = 1 / (1 + np.exp(logits[:, 2] - logits[:, 1]))
    np.testing.assert_allclose(output.targets[:, 1], first, atol=1e-5)
  # By default they lie in the middle.
  middle = unlearn(trained, labels="soft_other", num_epochs=1)
  np.testing.assert_allclose(
    middle.targets,
    unlearning.soft_targets(
      (middle.relabelling.logits + image) / 2,
      labels="soft_other",
      old_labels=split.forget.labels,
    ),
    atol=1e-6,
  )


def test_targets_that_are_given_are_taught(trained):
  _, _, split = trained
  targets = np.tile(np.float32([0.0, 0.9, 0.1]), (len(split.forget), 1))
  output = unlearn(trained, targets=targets, num_epochs=30)
  np.testing.assert_array_equal(output.targets, targets)
  assert output.relabelling is None
  model, _, _ = trained
  logits = inference.predict(model.apply, output.variables, split.forget.images)
  assert (logits.argmax(1) == 1).mean() > 0.9
  with pytest.raises(ValueError, match=r"targets must be int"):
    unlearn(trained, targets=targets[:-1])


def test_passes_begin_again_until_the_target_is_reached(trained):
  slow = {"optimizer": training.sgd(2e-3), "num_epochs": 2}
  once = unlearn(trained, target_accuracy=0.5, **slow)
  assert len(once.history) == 2
  again = unlearn(trained, target_accuracy=0.5, max_cycles=200, **slow)
  model, _, split = trained
  assert accuracy(model, once.variables, split.forget) > 0.5
  assert accuracy(model, again.variables, split.forget) <= 0.5
  assert 2 < len(again.history) < 400
  # The rate is that of one cycle of two passes, again and again.
  with pytest.raises(ValueError, match=r"max_cycles .* got 0"):
    unlearn(trained, max_cycles=0)


def test_retain_images_beside_each_minibatch(trained):
  plans = [
    batches.beside_forget(KEY, 10, 50, 4, 1.0, number) for number in (None, 12)
  ]
  assert [plan.rows.shape for plan in plans] == [(3, 8), (3, 16)]
  for plan in plans:
    is_retain = plan.rows >= 10
    np.testing.assert_array_equal(is_retain, ~plan.is_forget)
    np.testing.assert_allclose((plan.weights * is_retain).sum(1), 1, rtol=1e-6)
  with pytest.raises(ValueError, match=r"retain_batch_size .* got 0"):
    unlearn(trained, retain_batch_size=0)


def test_soft_labels_are_probabilities_at_the_boundary(trained):
  output = unlearn(trained, labels="soft", top_k=2)
  assert output.targets.shape == output.relabelling.logits.shape
  np.testing.assert_allclose(output.targets.sum(1), 1, atol=1e-5)
  np.testing.assert_array_equal((output.targets > 0).sum(1), 2)
  np.testing.assert_array_equal(
    output.targets.argmax(1), output.relabelling.labels
  )


def test_soft_labels_keep_the_frozen_predictions_on_retained_images(trained):
  # With the frozen model's own predictions as targets and a forget weight
  # that is nothing beside theirs, there is hardly anything to learn.
  model, variables, split = trained
  output = unlearn(
    trained, labels="soft", retain_weight=1e4, optimizer=optax.sgd(1e-6)
  )
  chex.assert_trees_all_close(output.variables, variables, atol=1e-3)
  logits = inference.predict(model.apply, variables, split.retain.images)
  entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(1).mean()
  np.testing.assert_allclose(
    output.history[0]["retain_loss"], entropy, rtol=0.2
  )


def test_labels_are_searched_once_unless_noise_can_change_them(trained):
  calls = []

  def counting(apply_fn, variables, images, labels, key):
    calls.append(tuple(np.ravel(jax.random.key_data(key))))
    return boundary.search(
      apply_fn, variables, images, labels, key, noise_scale=0.5, **SEARCH
    )

  def records(**options):
    return ["search_seconds" in x for x in unlearn(trained, **options).history]

  once = [True, False, False]
  assert records(num_epochs=3) == once
  assert records(num_epochs=3, refresh_labels=True) == once
  assert records(num_epochs=3, refresh_labels=True, noise_scale=0.1) == [
    True,
    True,
    True,
  ]
  unlearn(trained, num_epochs=3, search_fn=counting)
  num_once = len(calls)
  unlearn(trained, num_epochs=3, search_fn=counting, refresh_labels=True)
  assert len(calls) == num_once * 4
  # Each pass draws its own noise.
  assert len(set(calls)) == num_once * 3


def test_refreshing_continues_one_run(trained):
  # With labels that happen not to change, refreshing changes nothing.
  search_fn = functools.partial(boundary.search, **SEARCH)
  once = unlearn(trained, search_fn=search_fn)
  again = unlearn(trained, search_fn=search_fn, refresh_labels=True)
  chex.assert_trees_all_equal(once.variables, again.variables)


def test_relabelling_does_not_depend_on_the_batch_size(trained):
  model, variables, split = trained
  found = [
    unlearning.relabel(
      model.apply,
      variables,
      split.forget,
      KEY,
      search_fn=functools.partial(
        boundary.search, noise_scale=0.3, noise="cauchy", **SEARCH
      ),
      batch_size=batch_size,
      show_progress=False,
    )
    for batch_size in (7, 1000)
  ]
  np.testing.assert_array_equal(found[0].labels, found[1].labels)
  np.testing.assert_allclose(found[0].distance, found[1].distance, atol=1e-5)


@pytest.fixture(scope="module")
def small_cnn():
  dataset = fakes.blobs(40, size=8)
  model = fakes.small_cnn(
    num_classes=3, num_channels=1, width=0.05, mean=0.5, std=0.5
  )
  variables = model.init(KEY, jnp.zeros((1, 8, 8, 1)))
  return model, variables, fakes.split_class(dataset)


def test_batch_statistics_frozen_or_updated(small_cnn):
  _, variables, _ = small_cnn
  options = {"num_steps": 2, "num_epochs": 1}
  frozen = unlearn(small_cnn, batch_stats="frozen", **options).variables
  moved = unlearn(small_cnn, batch_stats="update", **options).variables
  chex.assert_trees_all_equal(frozen["batch_stats"], variables["batch_stats"])
  mean = moved["batch_stats"]["block_0"]["mean"]
  assert np.any(mean != variables["batch_stats"]["block_0"]["mean"])
  kernels = [x["params"]["block_0"]["kernel"] for x in (variables, frozen)]
  assert np.any(kernels[0] != kernels[1])


def test_one_compilation_for_each_phase(small_cnn):
  searches = boundary.num_programs()
  updates = steps.num_programs()
  # Batches that do not divide evenly, and several passes.
  unlearn(
    small_cnn,
    num_steps=3,
    search_batch_size=5,
    batch_size=3,
    num_epochs=2,
    optimizer=training.sgd(0.011),
  )
  assert boundary.num_programs() == searches + 1
  assert steps.num_programs() == updates + 1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"retain_weight": -1.0}, "retain_weight .* got -1.0"),
    ({"retain_weight": float("nan")}, "retain_weight .* got nan"),
    ({"labels": "softt"}, "labels .* 'softt', did you mean 'soft'"),
    ({"retain_labels": "none"}, "retain_labels must be one of"),
    ({"image_weight": 0.5}, "image_weight must be 0 with hard labels, got 0.5"),
    (
      {"labels": "soft", "image_weight": 1.5},
      "image_weight must be finite, .* got 1.5",
    ),
    ({"top_k": 2}, "top_k must be None with hard labels, got 2"),
    ({"labels": "soft", "top_k": 9}, "top_k .* 3 classes, got 9"),
    ({"batch_stats": "on"}, "batch_stats must be one of"),
    ({"num_epochs": 0}, "num_epochs .* got 0"),
    ({"batch_size": 0}, "batch_size .* got 0"),
    ({"search_batch_size": 0}, "search_batch_size .* got 0"),
    ({"eval_batch_size": 0}, "eval_batch_size .* got 0"),
    ({"confidence": 1.0}, "confidence .* got 1.0"),
    ({"step_size": -0.1}, "step_size .* got -0.1"),
    ({"noise_scale": -0.1}, "noise_scale .* got -0.1"),
    ({"norm": "l0"}, "norm must be one of"),
    ({"trainable": {"params": {"x": True}}}, "trainable must be trees like"),
  ],
)
def test_bad_options(trained, options, message, monkeypatch):
  def never(*args, **kwargs):
    raise AssertionError("the search began before the options were checked")

  monkeypatch.setattr(relabelling, "relabel", never)
  with pytest.raises(ValueError, match=message):
    unlearn(trained, **options)


def test_an_option_of_unlearn_is_none_of_update(trained):
  model, variables, split = trained
  with pytest.raises(TypeError, match="no argument 'num_layers'") as error:
    unlearning.update(
      *(model, variables, split, split.forget.labels, KEY), num_layers=1
    )
  assert "did you mean 'num_layers'" not in str(error.value)


def test_bad_splits_and_targets(trained):
  model, variables, split = trained
  none = split.forget.take([])
  with pytest.raises(ValueError, match="the forget set must not be empty"):
    unlearn((model, variables, split._replace(forget=none)))
  with pytest.raises(ValueError, match="the retain set must not be empty"):
    unlearn((model, variables, split._replace(retain=none)))
  for targets, message in (
    (np.zeros(3, int), r"targets must be int \[\d+\] or float"),
    (np.full(len(split.forget), 3), r"targets must be in \[0, 3\)"),
    (np.full((len(split.forget), 3), np.nan), "targets must be finite"),
  ):
    with pytest.raises(ValueError, match=message):
      unlearning.update(model, variables, split, targets, KEY)


@pytest.fixture
def calls(monkeypatch):
  """Steps and images of each call of a search."""
  calls = []
  call = boundary.Search.__call__

  def counted(search, *args):
    calls.append((search.num_steps, len(args[2])))
    return call(search, *args)

  monkeypatch.setattr(boundary.Search, "__call__", counted)
  return calls


@pytest.mark.parametrize("first_steps", [1, 6, 7])
def test_searching_slow_images_again_changes_nothing(
  trained, first_steps, calls
):
  model, variables, split = trained

  def relabel(first_steps):
    return unlearning.relabel(
      model.apply,
      variables,
      split.forget,
      KEY,
      search_fn=boundary.Search(num_steps=14, step_size=0.05, noise_scale=0.3),
      batch_size=7,
      first_steps=first_steps,
      show_progress=False,
    )

  # More than half of the steps: at once.
  once = relabel(8)
  assert set(calls) == {(14, 7)}
  num_batches = len(calls)
  assert once.num_steps.max() > 11 > once.num_steps.min() > 1
  calls.clear()
  staged = relabel(first_steps)
  chex.assert_trees_all_close(staged, once, atol=1e-6)
  num_slow = int((once.num_steps > first_steps).sum())
  assert calls.count((first_steps, 7)) == num_batches
  assert calls.count((14, 7)) == -(-num_slow // 7)


@pytest.mark.parametrize(
  ("growth", "batch_size", "first"), [(2.0, 5, 1), (1.5, 5, 8), (2.0, 20, 8)]
)
def test_after_one_long_step_slow_images_are_searched_alone(
  trained, growth, batch_size, first, calls
):
  model, variables, split = trained
  relabelling = unlearning.relabel(
    *(model.apply, variables, split.forget, KEY),
    search_fn=boundary.Search(num_steps=16, step_size=0.26, step_growth=growth),
    batch_size=batch_size,
    show_progress=False,
  )
  assert relabelling.is_crossed.all()
  num_batches = -(-len(split.forget) // batch_size)
  num_slow = int((relabelling.num_steps > first).sum())
  assert 0 < int((relabelling.num_steps > 1).sum()) < len(split.forget)
  rest = [(16, batch_size)] * -(-num_slow // batch_size)
  assert calls == [(first, batch_size)] * num_batches + rest


def test_images_that_are_across_already_are_not_searched(trained, calls):
  model, variables, split = trained
  # As many of another class, which the network is right about.
  wrong = dataclasses.replace(
    split.retain, labels=np.zeros_like(split.retain.labels)
  )
  both = twins.concatenate(wrong, split.forget)
  logits = inference.predict(model.apply, variables, both.images)

  def relabel(**options):
    calls.clear()
    return unlearning.relabel(
      *(model.apply, variables, both, KEY),
      search_fn=boundary.Search(num_steps=14, step_size=0.05),
      batch_size=6,
      show_progress=False,
      **options,
    )

  known, num_known = relabel(logits=logits), sum(x for _, x in calls)
  searched, num_searched = relabel(), sum(x for _, x in calls)
  chex.assert_trees_all_close(known, searched, atol=1e-5)
  is_across = logits.argmax(-1) != both.labels
  assert is_across.sum() > len(wrong) - 6
  assert num_known == -(-(~is_across).sum() // 6) * 6 < num_searched
  calls.clear()
  unlearning.unlearn(
    *(model, variables, split._replace(forget=both), KEY),
    search_batch_size=6,
    num_epochs=1,
    show_progress=False,
  )
  assert sum(x for _, x in calls) < len(both)


def forget_accuracy(trained, variables):
  model, _, split = trained
  images = training.to_float(jnp.asarray(split.forget.images))
  predicted = np.argmax(model.apply(variables, images), -1)
  return np.mean(predicted == split.forget.labels)


def test_stops_at_the_target_accuracy(trained):
  # A rate that needs several passes, the same however many there are.
  options = {
    "optimizer": training.sgd(0.02),
    "num_epochs": 40,
    "schedule": "constant",
  }
  whole = unlearn(trained, **options)
  assert forget_accuracy(trained, whole.variables) == 0
  part = unlearn(trained, target_accuracy=0.5, **options)
  assert 0 < len(part.history) < 40
  assert forget_accuracy(trained, part.variables) <= 0.5
  before = unlearn(trained, **{**options, "num_epochs": len(part.history) - 1})
  assert forget_accuracy(trained, before.variables) > 0.5


def test_passes_of_one_cycle_are_those_of_its_schedule(trained):
  """Refreshed labels are searched between calls, each of one more pass."""
  options = {"search_fn": fixed_search, "num_epochs": 4, "batch_size": 16}
  cycle = unlearn(trained, **options)
  # The labels are the same each time, so that it should make no difference.
  refreshed = unlearn(trained, refresh_labels=True, **options)
  chex.assert_trees_all_equal(cycle.variables, refreshed.variables)
  constant = unlearn(trained, schedule="constant", **options)
  kernels = [x.variables["params"]["kernel"] for x in (cycle, constant)]
  assert np.abs(np.subtract(*kernels)).max() > 1e-3
  num_steps = 4 * len(cycle.history[0]["forget_step_losses"])
  stated = unlearn(
    trained,
    optimizer=training.sgd(
      optax.cosine_onecycle_schedule(num_steps, peak_value=0.2)
    ),
    schedule="constant",
    **options,
  )
  chex.assert_trees_all_close(
    cycle.variables, stated.variables, rtol=1e-5, atol=1e-6
  )


def fixed_search(apply_fn, variables, images, labels, key):
  output = boundary.search(
    apply_fn, variables, images, labels, jax.random.key(0), **SEARCH
  )
  return output


def test_nothing_changes_where_the_target_is_reached(trained):
  _, variables, _ = trained
  output = unlearn(trained, target_accuracy=1.0)
  assert output.history == []
  chex.assert_trees_all_equal(output.variables, variables)
  assert len(output.targets) == len(output.relabelling.labels)
  refreshed = unlearn(
    trained, target_accuracy=1.0, refresh_labels=True, noise_scale=0.1
  )
  assert refreshed.history == []


def test_a_part_of_a_class_is_taught_its_smaller_prior(trained):
  model, variables, split = trained
  # Half of the class that goes is retained.
  half = np.arange(len(split.forget)) % 2 == 0
  rest = split.forget.take(np.flatnonzero(~half))
  part = types.Split(
    split.forget.take(np.flatnonzero(half)),
    twins.concatenate(split.retain, rest),
  )
  teacher = relabelling.Teacher(
    *(model, variables, part, jax.random.key(0)),
    taught=relabelling.Targets(image_weight=1.0),
    search_fn=boundary.Search(num_steps=1, step_size=0.1),
    accuracy=1.0,
    show_progress=False,
  )
  _, targets = teacher.teach()
  logits = np.array(teacher.predict(part.forget.images), np.float64)
  logits[:, part.forget.labels[0]] += np.log(len(rest) / len(split.forget))
  expected = jax.nn.softmax(logits)
  np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-6)


def test_the_level_of_soft_targets_is_looked_at_after_a_cycle(trained):
  _, _, split = trained
  soft = np.zeros((len(split.forget), 3), np.float32)
  soft[:, 1:] = 0.5
  options = {"target_accuracy": 0.4, "num_epochs": 4, "max_cycles": 3}
  # It is reached in the second pass; a cycle has four.
  hard = unlearn(trained, targets=soft.argmax(-1), **options)
  assert len(hard.history) < 4
  output = unlearn(trained, targets=soft, **options)
  assert len(output.history) == 4
  whole = unlearn(trained, targets=soft, num_epochs=4)
  chex.assert_trees_all_equal(output.variables, whole.variables)
  # Where it comes no nearer the second cycle is the last, of one search.
  kept = np.tile(np.float32([1, 0, 0]), (len(split.forget), 1))
  never = unlearn(trained, targets=kept, **options).history
  assert len(never) == 8
  assert ["search_seconds" in x for x in never] == [True] + [False] * 7
  # What the user asks for ends it at once.
  asked = unlearn(trained, targets=soft, stop_fn=lambda _: True, **options)
  assert len(asked.history) == 1
  # It is asked once a pass.
  calls = []
  unlearn(trained, targets=soft, stop_fn=calls.append, **options)
  assert len(calls) == 4


def test_a_run_that_is_resumed_within_a_pass_is_not_at_its_end(trained):
  _, _, split = trained
  soft = np.full((len(split.forget), 3), 1 / 3, np.float32)
  states = []

  def keep(state):
    states.append(jax.tree.map(jnp.copy, state))

  options = {"num_epochs": 4, "batch_size": 1}
  unlearn(trained, targets=soft, step_callback=keep, **options)
  middle = states[0]
  assert 0 < int(middle.step) < len(split.forget)
  # Whatever it is right on is few enough, where it is looked at.
  options |= {"target_accuracy": 1.0, "state": middle}
  assert len(unlearn(trained, targets=soft, **options).history) == 4
  hard = np.zeros(len(split.forget), np.int32)
  assert len(unlearn(trained, targets=hard, **options).history) == 1


def test_new_labels_in_each_pass_leave_the_cycle_whole(trained):
  output = unlearn(
    trained,
    labels="soft_other",
    optimizer=training.sgd(0.1),
    refresh_labels=True,
    noise_scale=0.1,
    target_accuracy=0.4,
    num_epochs=4,
    max_cycles=2,
  )
  assert len(output.history) == 4
  assert all("search_seconds" in record for record in output.history)


def test_no_schedule_is_cut_off_where_nothing_is_to_be_right(trained):
  options = {"labels": "soft_other", "optimizer": training.sgd(0.1)}
  output, whole = (
    unlearn(trained, target_accuracy=target, num_epochs=4, **options)
    for target in (0.0, None)
  )
  # It is there in the first pass, at the height of the schedule.
  assert len(output.history) == 4
  chex.assert_trees_all_equal(output.variables, whole.variables)


def test_a_part_of_a_class_is_not_taught_to_be_wrong(trained):
  model, variables, _ = trained
  dataset = fakes.blobs(120)
  noise = np.random.default_rng(0).normal(0, 90, dataset.images.shape)
  images = np.clip(dataset.images + noise, 0, 255).astype(np.uint8)
  noisy = dataclasses.replace(dataset, images=images)
  half = forget.split(noisy, classes=(0,), fraction=0.5)
  level = 0.75
  assert accuracy(model, variables, half.forget) > level
  options = {"labels": "soft_other", "optimizer": training.sgd(0.1)}
  output = unlearn((model, variables, half), target_accuracy=level, **options)
  named = output.targets.argmax(-1) == half.forget.labels
  assert named.mean() <= level
  assert named.mean() > level - 2 / len(named)
  # All were driven out before, by targets without their class.
  got = accuracy(model, output.variables, half.forget)
  deviation = np.sqrt(level * (1 - level) / len(named))
  assert 0.3 < got <= level + deviation


def test_a_state_of_no_step_is_where_the_original_is(trained):
  _, variables, split = trained
  right = accuracy(*trained[:2], split.forget)
  soft = np.zeros((len(split.forget), 3), np.float32)
  soft[:, 1:] = 0.5
  # Within a standard deviation of the level, but not at it.
  options = {"target_accuracy": right - 1e-3, "num_epochs": 4}
  whole = unlearn(trained, targets=soft, **options)
  assert len(whole.history) == 4
  state = steps.init_state(
    variables, training.sgd(unlearning.LEARNING_RATE), jax.random.key(1)
  )
  begun = unlearn(trained, targets=soft, state=state, **options)
  assert len(begun.history) == 4


def test_bad_target_accuracy(trained):
  with pytest.raises(ValueError, match=r"target_accuracy .* got 1.5"):
    unlearn(trained, target_accuracy=1.5)


def test_labels_returned_are_those_of_the_last_pass(trained):
  """With an early stop too, and no search is made for nothing."""
  calls = []

  def search_fn(apply_fn, variables, images, labels, key):
    calls.append(1)
    output = fixed_search(apply_fn, variables, images, labels, key)
    # Two searches never agree.
    return output.replace(logits=output.logits + len(calls))

  output = unlearn(
    trained,
    search_fn=search_fn,
    search_batch_size=1000,
    refresh_labels=True,
    optimizer=training.sgd(0.02),
    schedule="constant",
    num_epochs=40,
    target_accuracy=0.5,
  )
  assert 0 < len(output.history) < 40
  assert len(calls) == len(output.history)
  fixed = unlearn(
    trained, search_fn=fixed_search, num_epochs=1, search_batch_size=1000
  )
  np.testing.assert_allclose(
    output.relabelling.logits - fixed.relabelling.logits,
    len(calls),
    atol=tolerances.float32(4, 100),
  )


def test_batch_sizes_of_search_and_prediction_change_nothing(trained):
  options = {"labels": "soft", "target_accuracy": 0.1, "noise_scale": 0.1}
  few, many = (
    unlearn(trained, search_batch_size=a, eval_batch_size=b, **options)
    for a, b in ((5, 3), (1000, 500))
  )
  np.testing.assert_array_equal(few.relabelling.labels, many.relabelling.labels)
  assert len(few.history) == len(many.history)
  # Sums of another batch size may differ in the last bits.
  chex.assert_trees_all_close(few.variables, many.variables, atol=1e-4)


def test_released_search_with_noise_has_the_update_s_minibatch(trained):
  model, variables, split = trained
  sizes = []

  def counted(variables, images):
    sizes.append(len(images))
    return fakes.linear_apply(variables, images)

  baselines.find("psg_released").fn(
    model._replace(apply=counted),
    variables,
    split,
    KEY,
    model_mean=0.5,
    model_std=0.5,
    noise_scale=0.1,
    num_epochs=1,
    batch_size=16,
    show_progress=False,
  )
  # One image where shapes alone are asked for.
  assert set(sizes) == {1, 16}


def test_variables_without_params_are_refused_before_the_search(
  trained, monkeypatch
):
  model, variables, split = trained
  monkeypatch.setattr(unlearning, "relabel", None)
  for bad in (variables["params"], {"weights": variables["params"]}):
    for fn in (unlearning.unlearn, baselines.find("finetune").fn):
      with pytest.raises(ValueError, match=r'variables must .* with "params"'):
        fn(model, bad, split, KEY)


@pytest.mark.parametrize("labels", ["soft_other", "hard"])
def test_no_class_that_is_forgotten_is_taught(trained, labels):
  model, variables, _ = trained
  dataset = fakes.blobs(120)
  is_forget = dataset.labels != 2
  split = types.Split(dataset.take(is_forget), dataset.take(~is_forget))
  targets = unlearn((model, variables, split), labels=labels).targets
  # Of three classes one is left, for both.
  classes = targets if targets.ndim == 1 else targets.argmax(1)
  assert (classes == 2).all()
  assert targets.ndim == (2 if labels == "soft_other" else 1)
  if targets.ndim == 2:
    assert (targets[:, :2] == 0).all()
