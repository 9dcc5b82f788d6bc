"""Images on disk give what images in memory give."""

import multiprocessing
import sys
import types as types_lib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import (
  augment,
  batches,
  data,
  forget,
  inference,
  steps,
  streaming,
  training,
  types,
  unlearning,
)
from tests import fakes

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  data.load("digits", "test", data_dir=folder)
  return folder


@pytest.fixture(scope="module")
def pair(data_dir):
  """The same images in memory and on disk."""
  return (
    data.load("digits", "train", data_dir=data_dir),
    streaming.load("digits", "train", data_dir=data_dir, num_workers=0),
  )


def linear(dataset):
  size = int(np.prod(dataset.images.shape[1:]))
  model = fakes.linear_model(size, dataset.num_classes)
  return model, model.init(KEY, None)


def test_opens_without_reading(pair):
  memory, disk = pair
  assert streaming.is_streamed(disk.images)
  assert not streaming.is_streamed(memory.images)
  assert disk.images.shape == memory.images.shape
  np.testing.assert_array_equal(disk.labels, memory.labels)
  np.testing.assert_array_equal(disk.ids, memory.ids)
  assert disk.metadata.equals(memory.metadata)
  assert disk.class_names == memory.class_names


@pytest.mark.parametrize(
  "rows", [np.array([5, 2, 2, 900]), slice(3, 40, 7), [0], 17, slice(0, 0)]
)
def test_reads_rows_as_an_array_does(pair, rows):
  memory, disk = pair
  np.testing.assert_array_equal(disk.images[rows], memory.images[rows])


def test_bool_masks_and_choices(pair):
  memory, disk = pair
  mask = memory.labels == 3
  taken = disk.take(mask).take(np.arange(5)[::-1])
  assert streaming.is_streamed(taken.images)
  expected = memory.images[np.flatnonzero(mask)[:5][::-1]]
  np.testing.assert_array_equal(taken.images[:], expected)


def test_batches_follow_the_plan(pair):
  memory, disk = pair
  plan = [np.array([4, 1]), np.array([0, 0, 9]), np.array([700])]
  found = list(streaming.batches(disk.images, plan))
  for images, rows in zip(found, plan, strict=True):
    np.testing.assert_array_equal(images, memory.images[rows])


def test_concatenation_of_disk_and_memory(pair):
  memory, disk = pair
  joined = streaming.concatenate(
    [disk.images.take(np.arange(3)), memory.images[:2], disk.images]
  )
  assert streaming.is_streamed(joined)
  expected = np.concatenate(
    [memory.images[:3], memory.images[:2], memory.images]
  )
  np.testing.assert_array_equal(joined[np.arange(8)], expected[:8])
  assert len(joined) == len(expected)
  plain = streaming.concatenate([memory.images[:1], memory.images[:2]])
  assert isinstance(plain, np.ndarray)


def test_worker_processes_keep_the_order(data_dir, pair, monkeypatch):
  memory, _ = pair
  monkeypatch.setattr(streaming, "MIN_IMAGES_FOR_WORKERS", 1)
  disk = streaming.load("digits", "train", data_dir=data_dir, num_workers=2)
  plan = [np.arange(i, i + 4) for i in range(0, 36, 4)]
  found = np.concatenate(list(streaming.batches(disk.images, plan)))
  np.testing.assert_array_equal(found, memory.images[:36])


def test_training_gives_the_same_weights(pair):
  memory, disk = (part.take(np.arange(150)) for part in pair)
  model, variables = linear(memory)
  # Few enough bytes for several calls an epoch, the last one not full.
  options = {
    "optimizer": training.sgd(0.1),
    "num_epochs": 2,
    "batch_size": 16,
    "augment_fn": augment.flip(),
    "show_progress": False,
  }
  expected, _ = training.fit(model, variables, memory, KEY, **options)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches, "STREAM_BYTES", 4 * 16 * 32 * 32)
    found, _ = training.fit(model, variables, disk, KEY, **options)
  chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_streamed_training_compiles_once(pair):
  disk = pair[1].take(np.arange(70))
  model, variables = linear(disk)
  before = steps.num_programs()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches, "STREAM_BYTES", 2 * 16 * 32 * 32)
    training.fit(
      model,
      variables,
      disk,
      KEY,
      optimizer=training.sgd(0.01),
      num_epochs=2,
      batch_size=16,
      show_progress=False,
    )
  assert steps.num_programs() == before + 1


def test_unlearning_and_evaluation_give_the_same(pair):
  memory, disk = (part.take(np.arange(300)) for part in pair)
  model, variables = linear(memory)
  variables, _ = training.fit(
    model, variables, memory, KEY, num_epochs=3, show_progress=False
  )
  outputs = [
    unlearning.unlearn(
      model,
      variables,
      forget.split(part, classes=0),
      KEY,
      num_epochs=2,
      batch_size=16,
      labels="soft",
      show_progress=False,
    )
    for part in (memory, disk)
  ]
  np.testing.assert_array_equal(outputs[0].targets, outputs[1].targets)
  chex.assert_trees_all_close(
    outputs[0].variables, outputs[1].variables, atol=1e-6
  )
  logits = [
    inference.predict(model.apply, variables, part.images, batch_size=128)
    for part in (memory, disk)
  ]
  np.testing.assert_array_equal(*logits)
  assert data.mean_and_std(memory) == data.mean_and_std(disk)


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_going_on_within_an_epoch(pair, is_on_disk):
  dataset = pair[is_on_disk].take(np.arange(130))
  model, variables = linear(dataset)
  options = {
    "optimizer": training.sgd(0.1),
    "num_epochs": 3,
    "batch_size": 16,
    "augment_fn": augment.flip(),
    "show_progress": False,
  }
  kept = []

  def keep(state):
    kept.append(jax.tree.map(jnp.copy, state))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches, "MAX_STEPS_PER_CALL", 4)
    expected, _ = training.fit(
      model, variables, dataset, KEY, step_callback=keep, **options
    )
  # 9 steps an epoch in calls of 3, so that the fourth is in the second epoch.
  state = kept[3]
  assert int(state.step) % 9 != 0
  found, history = training.fit(
    model, variables, dataset, KEY, state=state, **options
  )
  assert [record["epoch"] for record in history] == [2, 3]
  assert len(history[0]["step_losses"]) == 18 - int(state.step)
  chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_accumulation_adds_up_to_the_same_step():
  # 13 images: the last minibatch is padded, and parts do not divide it.
  dataset = fakes.blobs(29)
  model = fakes.linear_model(16, 3)
  variables = model.init(KEY, None)
  results = [
    training.fit(
      model,
      variables,
      dataset,
      KEY,
      optimizer=training.sgd(0.3),
      num_epochs=2,
      batch_size=8,
      num_parts=num_parts,
      show_progress=False,
    )
    for num_parts in (1, 2, 3)
  ]
  for found, history in results[1:]:
    chex.assert_trees_all_close(found, results[0][0], atol=1e-6)
    np.testing.assert_allclose(
      history[1]["step_losses"], results[0][1][1]["step_losses"], atol=1e-4
    )


@pytest.mark.slow
def test_accumulation_needs_less_memory():
  model = fakes.small_cnn(
    num_classes=3, num_channels=1, width=0.05, mean=0.5, std=0.25
  )
  dataset = fakes.blobs(32, size=16)
  optimizer = training.sgd(0.1)
  state = training.init_state(
    model.init(KEY, jnp.zeros((1, 16, 16, 1))), optimizer, KEY
  )
  minibatch = steps.Steps(
    rows=jnp.arange(32)[None],
    weights=jnp.full((1, 32), 1 / 32),
    is_forget=jnp.zeros((1, 32), bool),
  )

  def num_bytes(num_parts):
    program = steps.Program(
      model=model,
      optimizer=optimizer,
      loss_fn=steps.mean_cross_entropy,
      is_masked=False,
      num_parts=num_parts,
    )
    compiled = steps.compiled_run_steps.lower(
      program,
      state,
      jnp.asarray(dataset.images),
      jnp.asarray(dataset.labels),
      minibatch,
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert num_bytes(8) < 0.5 * num_bytes(1)


def test_forget_and_retain_images_are_in_every_part():
  # BatchNorm must not see a part of forget images alone.
  seen = []

  def apply_train(variables, images, key):
    jax.debug.callback(
      lambda x: seen.append(np.array(x)), images.max((1, 2, 3))
    )
    return fakes.linear_apply(variables, images), variables

  base = fakes.linear_model(16, 3)
  model = types.Model(base.init, base.apply, apply_train, base.features)
  dark = types.Dataset(
    images=np.zeros((16, 4, 4, 1), np.uint8),
    labels=np.zeros(16, np.int32),
    class_names=("a", "b", "c"),
  )
  bright = types.Dataset(
    images=np.full((16, 4, 4, 1), 255, np.uint8),
    labels=np.ones(16, np.int32),
    class_names=("a", "b", "c"),
  )
  unlearning.update(
    model,
    model.init(KEY, None),
    types.Split(dark, bright),
    np.full(16, 2),
    KEY,
    num_epochs=1,
    batch_size=8,
    retain_batch_size=16,
    num_parts=4,
    show_progress=False,
  )
  jax.effects_barrier()
  assert len(seen) == 2 * 4
  for part in seen:
    assert sorted(part.tolist()) == [0, 0, 1, 1, 1, 1]


def test_bad_number_of_workers(data_dir):
  with pytest.raises(ValueError, match=r"num_workers .* got -1"):
    streaming.load("digits", "train", data_dir=data_dir, num_workers=-1)


def test_bad_number_of_parts():
  dataset = fakes.blobs(8)
  model = fakes.linear_model(16, 3)
  with pytest.raises(ValueError, match=r"num_parts .* got 0"):
    training.fit(
      model,
      model.init(KEY, None),
      dataset,
      KEY,
      num_epochs=1,
      num_parts=0,
    )


def test_threads_read_where_no_process_can_start(data_dir, monkeypatch):
  disk = streaming.load("digits", "train", data_dir=data_dir, num_workers=2)
  schedule = [np.arange(2)] * (streaming.MIN_IMAGES_FOR_WORKERS // 2)

  def forbid(*args, **kwargs):
    raise AssertionError("a process was started")

  monkeypatch.setattr(streaming.grain, "MultiprocessingOptions", forbid)
  with pytest.raises(AssertionError):
    next(disk.images.batches(schedule))
  process = multiprocessing.current_process()
  with monkeypatch.context() as patch:
    patch.setitem(process._config, "daemon", True)
    next(disk.images.batches(schedule))
  # A script from standard input.
  main = types_lib.ModuleType("__main__")
  main.__file__, main.__spec__ = "<stdin>", None
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "__main__", main)
    next(disk.images.batches(schedule))
