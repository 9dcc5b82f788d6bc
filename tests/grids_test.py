"""A grid against single runs: the numbers vary, the program is one."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import (
  augment,
  boundary,
  engine,
  ensembles,
  grids,
  last_layers,
  optimizers,
  parallel,
  training,
  types,
  unlearning,
)
from tests import fakes

KEY = jax.random.key(7)
BASE_RATE = 2e-2
# The order of sums differs between the programs. A variable of magnitude 1 goes
# through 8 steps, whose sums of a few hundred products are each off by some
# ε = 1e-7 of their size; BatchNorm divides by deviations of about 0.1.
TOLERANCE = 2e-5
CELLS = [
  {"distance_weight": 0.5, "noise_scale": 0.3, "seed": 3},
  {"distance_weight": 0.5, "noise_scale": 0.3, "seed": 4},
  {"retain_weight": 0.0, "learning_rate": 1e-2},
  {"retain_weight": 0.5, "image_weight": 0.2, "seed": 3},
  {"image_weight": 1.0},
]
OPTIONS = {"num_epochs": 2, "batch_size": 5, "show_progress": False}


@pytest.fixture(scope="module")
def parts():
  """A small convolutional network that knows three classes."""
  dataset = fakes.blobs(60, size=8)
  model = fakes.small_cnn(like=dataset, width=0.05)
  variables, _ = training.fit(
    model,
    model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1))),
    dataset,
    jax.random.key(2),
    optimizer=training.sgd(0.1),
    num_epochs=6,
    batch_size=20,
    show_progress=False,
  )
  return model, variables, fakes.split_class(dataset)


def test_the_grid_is_offered_beside_unlearn():
  assert unlearning.unlearn_grid is grids.unlearn_grid
  assert unlearning.grid_of is grids.grid_of
  with pytest.raises(AttributeError, match="unlearn_grids"):
    _ = unlearning.unlearn_grids


def unlearn_grid(parts, cells=CELLS, **options):
  options = {**OPTIONS, "mode": "map", "learning_rate": BASE_RATE, **options}
  return grids.unlearn_grid(*parts, KEY, cells=cells, **options)


def unlearn(parts, cell, **options):
  """The run that a cell stands for."""
  cell = {"learning_rate": BASE_RATE, "seed": 0, **cell}
  key = jax.random.fold_in(KEY, cell.pop("seed"))
  rate = cell.pop("learning_rate")
  options = {"optimizer": training.sgd(rate), **OPTIONS, **options, **cell}
  return unlearning.unlearn(*parts, key, **options)


@pytest.fixture(scope="module")
def grid(parts):
  """The cells one after the other, and how many programs were compiled."""
  before = boundary.num_programs(), ensembles.num_programs()
  output = unlearn_grid(parts)
  after = boundary.num_programs(), ensembles.num_programs()
  return output, np.subtract(after, before)


def assert_close(actual, expected):
  chex.assert_trees_all_close(actual, expected, rtol=0, atol=TOLERANCE)


def difference(one, other):
  leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return max(float(np.abs(x - y).max()) for x, y in leaves)


def assert_same(actual, expected):
  """Asserts that a cell is what `unlearn` returned."""
  assert_close(dict(actual.variables), dict(expected.variables))
  assert_close(actual.targets, expected.targets)
  assert (actual.relabelling is None) == (expected.relabelling is None)
  if expected.relabelling is not None:
    assert_close(actual.relabelling, expected.relabelling)
  assert len(actual.history) == len(expected.history)
  for ours, theirs in zip(actual.history, expected.history, strict=True):
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"seconds", "search_seconds"}:
      np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


@pytest.mark.parametrize("index", range(len(CELLS)))
def test_a_cell_is_what_a_run_makes(parts, grid, index):
  assert_same(grid[0].output(index), unlearn(parts, CELLS[index]))


def test_every_number_changes_the_model(parts, grid):
  models = [grid[0].output(x).variables for x in range(len(CELLS))]
  for index, model in enumerate(models):
    assert difference(model, parts[1]) > 100 * TOLERANCE
    for other in models[:index]:
      assert difference(model, other) > 10 * TOLERANCE


def test_all_cells_at_once_are_the_same(parts, grid):
  output = unlearn_grid(parts, mode="vmap")
  assert_close(output.variables, grid[0].variables)


def test_one_program_for_all_cells_and_one_search_for_like_ones(grid):
  output, num_programs = grid
  np.testing.assert_array_equal(num_programs, [1, 1])
  # Noise makes a search the seed's own; without it a seed is of no account,
  # nor is what is done with the outcome.
  np.testing.assert_array_equal(output.search_of_cell, [0, 1, 2, 2, -1])
  np.testing.assert_array_equal(output.target_of_cell, [0, 1, 2, 3, 4])
  assert len(output.relabellings) == 3
  assert len(output.targets) == 5


def test_each_seed_has_new_last_layers_of_its_own(parts):
  cells = [{"seed": 0}, {"seed": 1}, {"seed": 0, "retain_weight": 0.5}]
  output = unlearn_grid(parts, cells)
  np.testing.assert_array_equal(output.search_of_cell, [0, 0, 0])
  np.testing.assert_array_equal(output.target_of_cell, [0, 1, 0])
  assert difference(*output.targets) > 1e-3
  plain = unlearn_grid(parts, cells, num_refits=0)
  np.testing.assert_array_equal(plain.target_of_cell, [0, 0, 0])


def test_cells_are_augmented_as_runs_are(parts):
  options = {"augment_fn": augment.flip()}
  cell = {"seed": 3}
  output = unlearn_grid(parts, [cell], **options).output(0)
  assert_same(output, unlearn(parts, cell, **options))
  assert difference(output.targets, unlearn(parts, cell).targets) > 1e-3


def test_cells_are_completed(grid):
  assert grid[0].cells[2] == {
    **{"num_steps": 50, "step_size": 0.03, "step_growth": 2.0},
    **{"max_distance": None, "confidence": None},
    **{"distance_weight": 0.0, "noise_scale": 0.0, "image_weight": 0.5},
    **{"retain_weight": 0.0, "learning_rate": 1e-2, "seed": 0},
  }


@pytest.fixture
def calls(monkeypatch):
  """Number of models and mode of each call of the loop."""
  run_passes, calls = engine.run_passes, []

  def counted(*args, **options):
    # One model at a time are new last layers.
    if "run_fn" in options:
      mode = options["run_fn"].keywords["mode"]
      calls.append((len(options["factors"][0]), mode))
    return run_passes(*args, **options)

  monkeypatch.setattr(engine, "run_passes", counted)
  return calls


def test_chunks_of_cells_are_the_same(parts, grid, calls, monkeypatch):
  with pytest.raises(ValueError, match=r"got 1$") as info:
    unlearn_grid(parts, memory_limit=1)
  num_bytes = int(re.search(r"at least (\d+) bytes", str(info.value)).group(1))
  # Parameters, momentum of those that are moved, statistics, a key and a step:
  # read, written.
  params, statistics = (
    sum(x.nbytes for x in jax.tree.leaves(parts[1][name]))
    for name in ("params", "batch_stats")
  )
  num_layers = last_layers.check(last_layers.NUM_LAYERS, parts[1])
  moved = sum(
    x.nbytes
    for name in last_layers.choose(parts[1], num_layers, None)
    for x in jax.tree.leaves(parts[1]["params"][name.strip("/")])
  )
  assert num_bytes == 2 * (params + moved + statistics + 8 + 4)
  before = ensembles.num_programs()
  output = unlearn_grid(parts, memory_limit=3 * num_bytes - 1)
  assert_close(output.variables, grid[0].variables)
  assert_same(output.output(4), grid[0].output(4))
  # The last one is filled up, and has padding where the others have none.
  assert calls == [(2, "map")] * 3
  assert ensembles.num_programs() == before + 1
  # Half of what is free.
  monkeypatch.setattr(parallel, "free_bytes", lambda mesh: 4 * num_bytes)
  calls.clear()
  unlearn_grid(parts)
  assert calls == [(2, "map")] * 3


class _Device:
  def __init__(self, stats):
    self.memory_stats = lambda: stats


@pytest.mark.parametrize(
  ("stats", "expected"),
  [(None, None), ({"bytes_limit": 10, "bytes_in_use": 4}, 6), ({}, None)],
)
def test_free_memory_is_what_the_device_says(stats, expected, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [_Device(stats)])
  assert parallel.free_bytes(None) == expected


@pytest.fixture(scope="module")
def linear():
  dataset = fakes.blobs(60)
  model = fakes.linear_model(16, 3)
  variables, _ = training.fit(
    model,
    fakes.linear_variables(np.zeros((16, 3))),
    dataset,
    KEY,
    optimizer=training.sgd(0.5),
    num_epochs=3,
    show_progress=False,
  )
  return model, variables, fakes.split_class(dataset)


def centred(linear):
  """Images less the minibatch's mean, which is kept; it takes no mask."""
  model, variables, split = linear

  def apply_train(variables, images, key):
    mean = images.mean(0)
    logits, _ = model.apply_train(variables, images - mean, key)
    return logits, {**variables, "batch_stats": {"mean": mean}}

  statistics = {"mean": jnp.zeros((4, 4, 1))}
  changed = model._replace(apply_train=apply_train)
  # All minibatches are full: nothing else is padding.
  split = split._replace(forget=split.forget.take(range(10)))
  return changed, {**variables, "batch_stats": statistics}, split


def test_retained_images_of_other_cells_are_not_in_statistics(linear):
  parts = centred(linear)
  cells = [{"retain_weight": 1.0}, {"retain_weight": 0.0}]
  output = unlearn_grid(parts, cells)
  for index, cell in enumerate(cells):
    assert_same(output.output(index), unlearn(parts, cell))


# One class is not trained.
TRAINABLE = {"params": {"kernel": np.arange(3) != 1, "bias": False}}


@pytest.mark.parametrize(
  "options",
  [
    {
      **{"labels": "hard", "retain_batch_size": 7, "num_parts": 2},
      **{"batch_stats": "frozen"},
    },
    {
      **{"labels": "soft", "top_k": 2, "num_steps": 30, "confidence": 0.4},
      **{"max_distance": 0.05, "distance_decay": "linear"},
    },
    {
      **{"targets": np.arange(19) % 2 + 1, "trainable": TRAINABLE},
      **{"schedule": "constant"},
    },
  ],
)
def test_shared_options_are_those_of_single_runs(linear, options):
  cells = [
    {"learning_rate": 0.2, "step_size": 0.02},
    {"learning_rate": 0.2, "retain_weight": 0.5, "seed": 1},
  ]
  output = unlearn_grid(linear, cells, **options)
  for index, cell in enumerate(cells):
    assert_same(output.output(index), unlearn(linear, cell, **options))
    assert difference(output.output(index).variables, linear[1]) > 1e-2


@pytest.mark.parametrize("has_rate", [True, False])
def test_an_optimiser_has_the_rate_that_it_is_given_with(linear, has_rate):
  cells = [{"retain_weight": 0.5}, {"retain_weight": 1.0}]
  rates = {"learning_rate": None}
  if has_rate:
    cells[0]["learning_rate"], rates = 0.02, {"learning_rate": 0.01}
  output = unlearn_grid(linear, cells, optimizer=optimizers.adam(0.01), **rates)
  assert [cell["learning_rate"] for cell in output.cells] == (
    [0.02, 0.01] if has_rate else [None, None]
  )
  expected = unlearn(
    linear,
    {"retain_weight": 0.5},
    optimizer=optimizers.adam(0.02 if has_rate else 0.01),
  )
  assert_same(output.output(0), expected)


def test_several_devices_are_used(linear, calls):
  assert jax.device_count() == 8
  cells = [CELLS[0], CELLS[3], {"learning_rate": 0.1}]
  output = unlearn_grid(linear, cells, mode="auto")
  mapped = unlearn_grid(linear, cells)
  assert_close(output.variables, mapped.variables)
  assert calls == [(8, "sharded"), (3, "map")]


def test_a_cell_that_diverges_is_named(linear):
  cells = [{}, {}, {"learning_rate": 1e30}]
  with pytest.raises(FloatingPointError, match=r"of model 0 .* are cells 2\)"):
    unlearn_grid(linear, cells, memory_limit=1000)


def test_a_grid_has_all_combinations():
  cells = grids.grid_of(noise_scale=[0.0, 0.1], seed=range(2))
  assert cells == [
    {"noise_scale": 0.0, "seed": 0},
    {"noise_scale": 0.0, "seed": 1},
    {"noise_scale": 0.1, "seed": 0},
    {"noise_scale": 0.1, "seed": 1},
  ]
  with pytest.raises(ValueError, match="did you mean 'noise_scale'"):
    grids.grid_of(noise_scales=[0.0])
  with pytest.raises(ValueError, match="seed must have a value, got none"):
    grids.grid_of(seed=[])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"cells": []}, "cells must not be empty, got none"),
    ({"cells": [3]}, r"cells\[0\] must be a mapping .* got 3"),
    (
      {"cells": [{}, {"lambda": 1}]},
      r"cells\[1\] must be one of num_steps, .* got 'lambda'",
    ),
    (
      {"cells": [{"learning_rates": 1}]},
      r"cells\[0\] .* did you mean 'learning_rate'\?",
    ),
    (
      {"cells": [{}, {"distance_weight": -1}]},
      r"^cells\[1\]: distance_weight must be .* got -1$",
    ),
    ({"cells": [{"num_steps": 1.5}]}, r"^cells\[0\]: num_steps .* got 1.5$"),
    ({"cells": [{"retain_weight": -1}]}, r"^cells\[0\]: retain_weight .*-1$"),
    ({"cells": [{"learning_rate": 0}]}, r"^cells\[0\]: learning_rate .* 0$"),
    ({"cells": [{"image_weight": 2}]}, r"^cells\[0\]: image_weight .* 2$"),
    ({"cells": [{"seed": 0.5}]}, r"^cells\[0\]: seed must be an integer"),
    (
      {"cells": [{"seed": np.arange(2)}]},
      r"^cells\[0\]: seed must be one number",
    ),
    (
      {"cells": [{"image_weight": 0.5}], "labels": "hard"},
      r"^cells\[0\]: image_weight must be 0 with hard labels",
    ),
    (
      {"cells": [{}, {"max_distance": 0.1}]},
      "^cells must all have max_distance or none, got both$",
    ),
    (
      {"cells": [{"confidence": 0.1}, {}]},
      "^cells must all have confidence or none, got both$",
    ),
    ({"retain_weight": -1}, "^retain_weight must be .* got -1$"),
    ({"learning_rate": -1}, "^learning_rate must be .* got -1$"),
    ({"noise_scale": -1}, "^noise_scale must be .* got -1$"),
    ({"retain_batch_size": 0}, "^retain_batch_size must be .* got 0$"),
    ({"search_batch_size": 0}, "^search_batch_size must be .* got 0$"),
    ({"targets": np.zeros(3, int)}, "^targets must be int"),
    ({"mode": "maps"}, "mode .* did you mean 'map'"),
    ({"memory_limit": 0}, "memory_limit must be .* got 0"),
    (
      {"mesh": functools.partial(parallel.create_mesh, 2)},
      "mesh must be None with mode='map'",
    ),
    (
      {
        "optimizer": optimizers.adam(0.01),
        "learning_rate": None,
        "cells": [{"learning_rate": 0.1}],
      },
      "learning_rate must be given, that of optimizer",
    ),
    *(
      ({name: value}, f"^{name} must not be given for a grid")
      for name, value in {
        "search_fn": boundary.Search(num_steps=1, step_size=0.1),
        "refresh_labels": True,
        "target_accuracy": 0.1,
        "max_cycles": 2,
        "state": 1,
        "callback": print,
        "step_callback": print,
        "stop_fn": print,
      }.items()
    ),
  ],
)
def test_bad_input(linear, options, message):
  if callable(options.get("mesh")):
    options = {"mesh": options["mesh"]()}
  with pytest.raises(ValueError, match=message):
    unlearn_grid(linear, **{"cells": [{}], **options})


def test_unknown_options_and_other_keys(linear):
  with pytest.raises(TypeError, match="did you mean 'batch_size'"):
    unlearn_grid(linear, batch_sizes=3)
  with pytest.raises(ValueError, match=r"key must be made by jax.random.key"):
    grids.unlearn_grid(*linear, np.zeros(2, np.uint32), cells=[{}])
  *network, split = linear
  bare = (*network, types.Split(split.forget, split.retain.take([])))
  with pytest.raises(ValueError, match="retain set must not be empty"):
    unlearn_grid(bare, [{"retain_weight": 0.0}, {}])
