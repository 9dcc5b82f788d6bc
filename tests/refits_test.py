import dataclasses
import math

import chex
import jax
import numpy as np
import pytest

from psg_jax import (
  augment,
  inference,
  last_layers,
  refits,
  relabelling,
  training,
  types,
  unlearning,
)
from tests import fakes

KEY = jax.random.key(0)
LAST = ("block_1", "head")


@pytest.fixture(scope="module")
def layered():
  """A network of three layers, and three classes of which one is to go."""
  return fakes.layered(num_images=90, num_epochs=6)


def predict(layered, **options):
  return refits.predict(*layered, KEY, show_progress=False, **options)


def test_only_new_last_layers_are_trained_and_on_retained_images(
  layered, monkeypatch
):
  _, variables, split = layered
  fit, starts, ends = training.fit, [], []

  def spy(model, start, dataset, key, **options):
    assert set(dataset.ids) == set(split.retain.ids)
    starts.append(start)
    output = fit(model, start, dataset, key, **options)
    ends.append(output[0])
    return output

  monkeypatch.setattr(training, "fit", spy)
  logits = predict(layered, num_models=2)
  assert logits.shape == (2, len(split.forget), 3)
  for start, end in zip(starts, ends, strict=True):
    for collection, tree in variables.items():
      for name, value in tree.items():
        if name in LAST:
          with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(start[collection][name], value)
        else:
          chex.assert_trees_all_equal(end[collection][name], value)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(starts[0], starts[1])


def test_their_images_are_augmented_as_those_of_the_update(
  layered, monkeypatch
):
  seen, fit = [], training.fit

  def spy(*arguments, **options):
    seen.append(options["augment_fn"])
    return fit(*arguments, **options)

  monkeypatch.setattr(training, "fit", spy)
  flip = augment.flip()
  options = {"num_epochs": 1, "num_steps": 1, "show_progress": False}
  plain = unlearning.unlearn(*layered, KEY, **options)
  flipped = unlearning.unlearn(*layered, KEY, augment_fn=flip, **options)
  assert seen == [None, flip]
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(plain.targets, flipped.targets)


def test_they_are_trained_on_a_part_of_many_images(layered, monkeypatch):
  model, variables, split = layered
  sizes, fit = [], training.fit

  def spy(model, start, dataset, key, **options):
    sizes.append((len(dataset), options["num_epochs"]))
    assert len(set(dataset.ids)) == len(dataset)
    return fit(model, start, dataset, key, **options)

  monkeypatch.setattr(training, "fit", spy)
  predict(layered, num_steps=2)
  many = split.retain.take(np.arange(6000) % len(split.retain))
  many = dataclasses.replace(many, ids=np.arange(6000).astype(str))
  predict((model, variables, types.Split(split.forget.take([0]), many)))
  predict(layered, num_steps=8)
  num_batches = -(-len(split.retain) // 16)
  assert sizes == [
    (32, 1),
    (16 * round(6000 / 32), 1),
    (len(split.retain), round(8 / num_batches)),
  ]
  with pytest.raises(ValueError, match=r"^num_steps must .* got 0"):
    predict(layered, num_steps=0)


def test_what_the_last_layers_knew_is_of_no_account(layered):
  model, variables, split = layered
  spoiled = fakes.spoiled(variables, LAST)
  first = predict(layered, num_models=1)
  np.testing.assert_array_equal(
    first, predict((model, spoiled, split), num_models=1)
  )
  # The same model whatever their number, and another with another key.
  np.testing.assert_array_equal(first[0], predict(layered, num_models=2)[0])
  assert np.any(first[0] != predict(layered, num_models=2)[1])


def test_they_know_retained_classes_and_not_the_one_that_is_gone(layered):
  model, variables, split = layered
  known = types.Split(split.retain, split.retain)
  is_right = (
    predict((model, variables, known)).argmax(-1) == known.forget.labels
  )
  assert is_right.mean(1).min() > 0.9
  assert np.all(predict(layered).argmax(-1) != 0)


def test_they_are_half_of_the_targets_by_default(layered):
  model, variables, split = layered
  options = {"image_weight": 1, "num_epochs": 1, "show_progress": False}
  output, plain, two = (
    unlearning.unlearn(*layered, KEY, num_refits=number, **options)
    for number in (None, 0, 2)
  )
  search_key = jax.random.split(KEY)[0]
  logits = refits.predict(
    *layered, search_key, num_models=2, show_progress=False
  )
  shared = {"labels": "soft_other", "old_labels": split.forget.labels}
  near = relabelling.soft_targets(
    inference.predict(model.apply, variables, split.forget.images), **shared
  )
  others = [relabelling.soft_targets(x, **shared) for x in logits]
  np.testing.assert_allclose(plain.targets, near, atol=1e-6)
  np.testing.assert_allclose(
    two.targets, (near + np.mean(others, 0)) / 2, atol=1e-6
  )
  np.testing.assert_allclose(output.targets, (near + others[0]) / 2, atol=1e-6)
  assert np.all(output.targets[:, 0] == 0)


def test_they_are_made_where_they_can_say_something(layered):
  _, variables, split = layered
  retain = split.retain
  half = types.Split(retain.take([0, 1]), retain.take(range(2, len(retain))))
  one_class = types.Split(
    split.forget, retain.take(np.flatnonzero(retain.labels == 1))
  )

  def count(number, variables=variables, split=split, **options):
    options = {"labels": "soft_other", "retain_weight": 1.0, **options}
    return refits.count(number, variables, split, **options)

  assert count(None) == refits.NUM_MODELS
  assert count(5) == 5
  linear = fakes.linear_variables(np.zeros((64, 3)))
  for words, changes in {
    "labels are hard": {"labels": "hard"},
    "retain_weight is 0": {"retain_weight": 0.0},
    "not all images of their classes are forgotten": {"split": half},
    "one class is retained": {"split": one_class},
    "the network has no last layers": {"variables": linear},
  }.items():
    assert count(None, **changes) == count(0, **changes) == 0
    with pytest.raises(ValueError, match=f"^num_refits .* {words}.* got 2$"):
      count(2, **changes)
  with pytest.raises(ValueError, match=r"^num_refits must .* got -1"):
    count(-1)


@pytest.mark.parametrize(
  ("names", "expected"),
  [(["block_0", "head"], 2), (["head", "stem", "layer1_0"], 3), (["w"], 0)],
)
def test_layers_of_known_names_are_counted(names, expected):
  assert last_layers.count({"params": dict.fromkeys(names)}) == expected


def test_networks_of_other_libraries_have_no_layers_that_are_known():
  assert last_layers.count({"params": object()}) == 0
  assert last_layers.count({"weights": {"head": 1}}) == 0


def moved_layers(layered, split=None, **options):
  """Returns the layers of which something was moved, statistics included."""
  model, variables, given = layered
  options = {"num_epochs": 1, "show_progress": False, **options}
  output = unlearning.unlearn(
    *(model, variables, given if split is None else split, KEY), **options
  )
  return {
    name
    for collection, tree in variables.items()
    for name, value in tree.items()
    if any(
      np.any(x != y)
      for x, y in zip(
        jax.tree.leaves(value),
        jax.tree.leaves(output.variables[collection][name]),
        strict=True,
      )
    )
  }


def test_the_last_layers_are_moved_where_whole_classes_go(layered):
  _, variables, split = layered
  everything = set(variables["params"])
  assert moved_layers(layered) == set(LAST)
  assert moved_layers(layered, num_layers=1) == {"head"}
  assert moved_layers(layered, num_layers=1, num_refits=0) == {"head"}
  assert moved_layers(layered, retain_weight=0) == set(LAST)
  assert moved_layers(layered, num_layers=0) == everything
  assert moved_layers(layered, labels="hard") == everything
  half = types.Split(
    split.forget.take([0, 1]),
    split.retain.take(range(len(split.retain))),
  )
  labels = np.append(half.retain.labels[:-1], split.forget.labels[0])
  half = half._replace(
    retain=dataclasses.replace(half.retain, labels=labels.astype(np.int32))
  )
  assert moved_layers(layered, half) == everything


def test_statistics_are_frozen_where_the_last_layers_are_moved(layered):
  default, frozen, update = (
    unlearning.unlearn(
      *(*layered, KEY),
      batch_stats=mode,
      num_epochs=1,
      show_progress=False,
    ).variables
    for mode in (None, "frozen", "update")
  )
  chex.assert_trees_all_equal(default, frozen)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(default, update)


def test_minibatches_are_smaller_where_the_last_layers_are_moved(layered):
  _, _, split = layered

  def num_steps(**options):
    output = unlearning.unlearn(
      *(*layered, KEY), num_epochs=1, show_progress=False, **options
    )
    return len(output.history[0]["forget_step_losses"])

  num_images = len(split.forget)
  assert num_images > 4
  assert num_steps() == math.ceil(num_images / 4)
  assert num_steps(num_layers=0) == math.ceil(num_images / 8)
  assert num_steps(batch_size=2) == math.ceil(num_images / 2)


def test_layers_to_move_are_checked(layered):
  _, variables, _ = layered
  head = last_layers.trainable(variables, 1, None)
  assert moved_layers(layered, trainable=head) >= {"head"}
  with pytest.raises(ValueError, match=r"^num_layers must be 0 .* got 2"):
    moved_layers(layered, trainable=head, num_layers=2)
  with pytest.raises(ValueError, match=r"^num_layers must .* got -1"):
    moved_layers(layered, num_layers=-1)
  linear = fakes.linear_variables(np.zeros((64, 3)))
  with pytest.raises(ValueError, match=r"^num_layers must be 0 for .* got 3"):
    last_layers.check(3, linear)
