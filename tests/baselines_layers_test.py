"""Methods on a network with layers and BatchNorm."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psg_jax import baselines, last_layers, training
from psg_jax.baselines import (
  cf_k,
  eu_k,
  finetune,
  importance,
  salun,
)
from tests import fakes

KEY = jax.random.key(0)
LAST = ("block_1", "head")


@pytest.fixture(scope="module")
def layered():
  return fakes.layered(num_images=30, num_epochs=2)


def run(fn, layered, **options):
  return fn(
    *layered,
    KEY,
    **{"batch_size": 8, "show_progress": False, **options},
  )


def cut(variables, names):
  """The entries of these layers, and the others."""
  inside, outside = {}, {}
  for collection, tree in variables.items():
    for name, value in tree.items():
      (inside if name in names else outside)[collection, name] = value
  return inside, outside


def has_moved(new, old):
  return {
    name: any(
      np.any(np.asarray(x) != np.asarray(y))
      for x, y in zip(
        jax.tree.leaves(new[name]), jax.tree.leaves(old[name]), strict=True
      )
    )
    for name in old
  }


@pytest.mark.parametrize("fn", [cf_k.cf_k, eu_k.eu_k])
def test_only_the_last_layers_move(layered, fn):
  _, variables, _ = layered
  output = run(
    fn,
    layered,
    num_epochs=2,
    optimizer=training.sgd(0.05, momentum=0.9, weight_decay=0.1),
  )
  inside, outside = cut(output.variables, LAST)
  inside_before, outside_before = cut(variables, LAST)
  # Parameters and statistics alike, whatever the optimiser would do.
  chex.assert_trees_all_equal(outside, outside_before)
  assert all(has_moved(inside, inside_before).values())
  assert ("batch_stats", "block_1") in inside
  assert ("batch_stats", "block_0") in outside


def test_conformance_eu_k_resets_the_last_layers(layered):
  model, variables, split = layered
  # Without learning, the last layers are those of a new network.
  options = {"num_epochs": 1, "optimizer": optax.sgd(0.0)}
  output = run(eu_k.eu_k, layered, **options)
  fresh = model.init(jax.random.split(KEY)[0], None)
  params = output.variables["params"]
  for name in LAST:
    chex.assert_trees_all_equal(params[name], fresh["params"][name])
    assert has_moved(params, variables["params"])[name]
  # What they were before does not matter.
  spoiled = fakes.spoiled(variables, LAST)
  options = {"num_epochs": 2, "optimizer": training.sgd(0.05)}
  first = run(eu_k.eu_k, layered, **options)
  second = run(eu_k.eu_k, (model, spoiled, split), **options)
  chex.assert_trees_all_equal(first.variables, second.variables)
  kept = run(cf_k.cf_k, layered, num_epochs=1, optimizer=optax.sgd(0.0))
  chex.assert_trees_all_equal(kept.variables["params"], variables["params"])


def test_layers_are_taken_in_network_order(layered):
  _, variables, _ = layered

  def choose(names, k):
    tree = {"params": dict.fromkeys(names)}
    return last_layers.choose(tree, k, None)

  # Alphabetic, as JAX leaves a tree.
  all_cnn = sorted([*(f"block_{i}" for i in range(12)), "head"])
  assert choose(all_cnn, 4) == ("block_9/", "block_10/", "block_11/", "head/")
  resnet = sorted(
    ["head", "stem", *(f"layer{i}_{j}" for i in (1, 2, 3, 4) for j in (0, 1))]
  )
  assert choose(resnet, 3) == ("layer4_0/", "layer4_1/", "head/")
  assert choose(resnet, 10)[:2] == ("stem/", "layer1_0/")
  with pytest.raises(ValueError, match=r"at most the 10 layers .* got 11"):
    choose(resnet, 11)
  with pytest.raises(ValueError, match="layers must be given"):
    choose(["Dense_0", "head"], 1)
  with pytest.raises(ValueError, match="layers must not be empty"):
    last_layers.choose(variables, 1, ())
  chosen = last_layers.choose(variables, 1, ["block_1/kernel"])
  assert chosen == ("block_1/kernel",)


def by_loop(model, variables, dataset):
  """Squared gradients of the labels and in expectation, and the gradient."""

  def log_probability(params, image, label):
    pixels = training.to_float(image[None])
    logits = model.apply({**variables, "params": params}, pixels)
    return jax.nn.log_softmax(logits[0])[label]

  gradient_fn = jax.jit(jax.value_and_grad(log_probability))
  empirical, expected, mean = [], [], []
  for image, label in zip(dataset.images, dataset.labels, strict=True):
    pairs = [gradient_fn(variables["params"], image, c) for c in range(3)]
    squares = [jax.tree.map(np.square, g) for _, g in pairs]
    shares = [np.exp(value) for value, _ in pairs]
    empirical.append(squares[label])
    mean.append(jax.tree.map(np.negative, pairs[label][1]))
    expected.append(
      jax.tree.map(lambda *x, w=shares: np.tensordot(w, x, 1), *squares)
    )
  return [
    jax.tree.map(lambda *x: sum(x) / len(x), *trees)
    for trees in (empirical, expected, mean)
  ]


def test_importance_equals_a_loop_over_images(layered):
  model, variables, split = layered
  few = split.retain.take(np.arange(6))  # Not a multiple of the parts of 4.
  options = {"batch_size": 4, "show_progress": False}
  found = [
    *(
      importance.fisher(model, variables, few, is_expected=x, **options)
      for x in (False, True)
    ),
    importance.mean_gradient(model, variables, few, **options),
  ]
  for tree, expected in zip(found, by_loop(model, variables, few), strict=True):
    # Single and batched products round differently.
    chex.assert_trees_all_close(tree, expected, rtol=1e-4, atol=1e-6)


def test_importance_of_convolutions():
  model = fakes.small_cnn(
    num_classes=3, num_channels=1, width=0.03, mean=0.5, std=0.5
  )
  few = fakes.blobs(2, size=8)
  variables = model.init(KEY, jnp.zeros((1, 8, 8, 1)))
  found = importance.fisher(
    model, variables, few, is_expected=False, show_progress=False
  )
  expected = by_loop(model, variables, few)[0]
  # Convolutions round differently when they are mapped.
  chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-6)
  assert last_layers.choose(variables, 2, None) == ("block_0/", "head/")


def test_largest_marks_the_count_asked_for():
  tree = {"a": jnp.asarray([0.0, -3.0, 1.0]), "b": jnp.asarray([[2.0], [0.0]])}
  mask = salun.largest(tree, 0.4)
  chex.assert_trees_all_equal(
    mask,
    {
      "a": jnp.asarray([False, True, False]),
      "b": jnp.asarray([[True], [False]]),
    },
  )
  # Half of the entries, though more than half are equal.
  none = salun.largest({"a": jnp.zeros(10)}, 0.5)
  assert int(none["a"].sum()) == 5


@pytest.mark.parametrize("name", ["ssd", "fisher", "boundary_expanding"])
def test_statistics_stay_where_batchnorm_is_frozen(layered, name):
  _, variables, _ = layered
  output = run(baselines.find(name).fn, layered)
  chex.assert_trees_all_equal(
    output.variables["batch_stats"], variables["batch_stats"]
  )
  chex.assert_trees_all_equal_shapes(output.variables, variables)


def test_padding_is_masked_and_a_full_batch_is_not(layered):
  model, variables, split = layered
  seen = []

  def apply_train(variables, images, key, mask=None):
    if mask is not None:
      jax.debug.callback(lambda x: seen.append(int(x)), mask.sum())
    return model.apply_train(variables, images, key)

  masked = model._replace(apply_train=apply_train)
  num_retain = len(split.retain)
  options = {"num_epochs": 1, "show_progress": False}
  for batch_size, last in ((num_retain - 3, 3), (num_retain, None)):
    seen.clear()
    finetune.finetune(
      masked, variables, split, KEY, batch_size=batch_size, **options
    )
    jax.effects_barrier()
    assert sorted(seen) == ([] if last is None else [last, batch_size])
