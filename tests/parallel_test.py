import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import boundary, inference, parallel, training, unlearning
from tests import fakes

KEY = jax.random.key(0)

pytestmark = pytest.mark.skipif(
  jax.device_count() < 8, reason="needs eight (fake) devices"
)


@pytest.fixture(scope="module")
def job():
  """A small network and data whose sizes eight devices do not divide."""
  dataset = fakes.blobs(37, size=8)
  model = fakes.small_cnn(
    num_classes=3, num_channels=1, width=0.05, mean=0.5, std=0.25
  )
  variables = model.init(KEY, jnp.zeros((1, 8, 8, 1)))
  variables, _ = training.fit(
    model,
    variables,
    dataset,
    KEY,
    optimizer=training.sgd(0.05),
    num_epochs=40,
    show_progress=False,
  )
  return model, variables, dataset


def searched(job, search, **options):
  model, variables, dataset = job
  images = training.to_float(jnp.asarray(dataset.images))
  labels = jnp.argmax(model.apply(variables, images), -1)
  return search(
    model.apply,
    variables,
    images,
    labels,
    KEY,
    num_steps=30,
    step_size=0.1,
    noise_scale=0.01,
    **options,
  )


def test_search_on_eight_devices_equals_one(job):
  one = searched(job, boundary.search)
  eight = searched(job, parallel.search, mesh=parallel.create_mesh(8))
  assert one.is_crossed.any()
  np.testing.assert_array_equal(one.labels, eight.labels)
  np.testing.assert_array_equal(one.num_steps, eight.num_steps)
  # Convolutions of another batch size may differ in the last bits.
  np.testing.assert_allclose(one.images, eight.images, atol=1e-5)


@pytest.mark.slow
def test_search_equals_pmap_of_the_vmapped_search(job):
  model, variables, dataset = job
  images = training.to_float(jnp.asarray(dataset.images[:32]))
  labels = jnp.argmax(model.apply(variables, images), -1)
  keys = boundary.sample_keys(KEY, jnp.arange(32))

  def search(images, labels, keys):
    return boundary.search(
      model.apply,
      variables,
      images,
      labels,
      keys,
      num_steps=30,
      step_size=0.02,
    )

  mapped = jax.pmap(search)(
    *(x.reshape(8, 4, *x.shape[1:]) for x in (images, labels, keys))
  )
  sharded = parallel.search(
    model.apply,
    variables,
    images,
    labels,
    keys,
    num_steps=30,
    step_size=0.02,
    mesh=parallel.create_mesh(8),
  )
  np.testing.assert_array_equal(mapped.labels.reshape(-1), sharded.labels)
  np.testing.assert_allclose(
    mapped.images.reshape(images.shape), sharded.images, atol=1e-5
  )


def test_each_device_stops_when_its_own_images_are_done():
  # Eight devices with one image each; the first needs 1 step, the last 8.
  counts = []

  def counted(variables, images):
    jax.debug.callback(lambda: counts.append(1))
    return fakes.linear_apply(variables, images)

  kernel = np.zeros((4, 2))
  kernel[:, 1] = 1.0
  variables = fakes.linear_variables(kernel, [2.0, 0.0])
  # The sum of four pixels must exceed 2, in steps of 0.01.
  margins = (np.arange(8) + 0.5) * 0.01
  images = jnp.asarray(
    np.broadcast_to(0.5 - margins[:, None, None, None], (8, 2, 2, 1)),
    jnp.float32,
  )
  output = parallel.search(
    counted,
    variables,
    images,
    jnp.zeros(8, jnp.int32),
    KEY,
    num_steps=100,
    step_size=0.01,
    mesh=parallel.create_mesh(8),
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(output.num_steps, np.arange(1, 9))
  # Two evaluations a step, of which one with a gradient: 2 + 4 + ... + 16.
  assert len(counts) == 72


def test_training_on_eight_devices_equals_one(job):
  model, variables, dataset = job

  def fit(mesh):
    return training.fit(
      model,
      variables,
      dataset,
      KEY,
      optimizer=training.sgd(0.01),
      num_epochs=2,
      batch_size=12,
      mesh=mesh,
      show_progress=False,
    )

  one, history = fit(None)
  eight, other = fit(parallel.create_mesh(8))
  chex.assert_trees_all_close(one, eight, atol=1e-5)
  np.testing.assert_allclose(history[-1]["loss"], other[-1]["loss"], atol=1e-4)
  assert len(eight["params"]["head"]["kernel"].sharding.device_set) == 8


def test_unlearning_on_eight_devices_equals_one(job):
  model, variables, dataset = job
  split = fakes.split_class(dataset)

  def unlearn(mesh):
    return unlearning.unlearn(
      model,
      variables,
      split,
      KEY,
      num_steps=30,
      step_size=0.02,
      optimizer=training.sgd(0.01),
      num_epochs=2,
      batch_size=5,
      mesh=mesh,
      show_progress=False,
    )

  one, eight = unlearn(None), unlearn(parallel.create_mesh(8))
  np.testing.assert_allclose(one.targets, eight.targets, atol=1e-6)
  chex.assert_trees_all_close(one.variables, eight.variables, atol=1e-5)


def test_work_is_cut_over_the_devices(job, monkeypatch):
  """Each device holds an eighth of every batch, and the search is mapped."""
  model, variables, dataset = job
  shard, shapes = parallel.shard, []

  def spy(tree, mesh, **options):
    placed = shard(tree, mesh, **options)
    shapes.extend(
      (leaf.shape, leaf.addressable_shards[0].data.shape)
      for leaf in jax.tree.leaves(placed)
      if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
    return placed

  monkeypatch.setattr(parallel, "shard", spy)
  unlearning.unlearn(
    model,
    variables,
    fakes.split_class(dataset),
    KEY,
    num_steps=2,
    step_size=0.02,
    optimizer=training.sgd(0.01),
    num_epochs=1,
    batch_size=8,
    mesh=parallel.create_mesh(8),
    show_progress=False,
  )
  searched = [both for both in shapes if len(both[0]) == 4]
  assert searched
  assert all(whole[0] == 8 * part[0] for whole, part in searched)
  updated = [both for both in shapes if len(both[0]) == 2]
  assert updated
  # 8 forget and 24 retained images a step; new last layers take 16.
  assert {whole[1] for whole, _ in updated} == {16, 32}
  assert all(whole[1] == 8 * part[1] for whole, part in updated)


def test_prediction_on_eight_devices_equals_one(job):
  model, variables, dataset = job
  one = inference.predict(model.apply, variables, dataset.images)
  eight = inference.predict(
    model.apply,
    variables,
    dataset.images,
    batch_size=10,
    mesh=parallel.create_mesh(8),
  )
  np.testing.assert_allclose(one, eight, atol=1e-5)


def test_mesh_of_some_devices():
  assert parallel.create_mesh().size == jax.device_count()
  assert parallel.create_mesh(3).size == 3
  assert parallel.padded_size(10, parallel.create_mesh(4)) == 12
  assert parallel.padded_size(10, None) == 10


@pytest.mark.parametrize("num_devices", [0, -1, 10**6, 1.5])
def test_bad_number_of_devices(num_devices):
  with pytest.raises(ValueError, match=f"num_devices .* got {num_devices}"):
    parallel.create_mesh(num_devices)


def test_meshes_of_other_axes():
  """`jax.make_mesh` makes Explicit axes, of any names and number."""
  mesh = jax.make_mesh(
    (2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
  )
  dataset = fakes.blobs(13)
  variables = fakes.linear_variables(np.eye(16, 3))
  images = training.to_float(jnp.asarray(dataset.images))
  labels = jnp.argmax(fakes.linear_apply(variables, images), -1)
  arguments = (fakes.linear_apply, variables, images, labels, KEY)
  options = {"num_steps": 5, "step_size": 0.1}
  one = boundary.search(*arguments, **options)
  many = parallel.search(*arguments, mesh=mesh, **options)
  np.testing.assert_array_equal(one.labels, many.labels)
  np.testing.assert_array_equal(one.num_steps, many.num_steps)
  # As they come from another's program.
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  placed = jax.device_put((images[:12], labels[:12]), rows)
  again = parallel.search(*arguments[:2], *placed, KEY, mesh=mesh, **options)
  np.testing.assert_array_equal(one.labels[:12], again.labels)
  logits = [
    inference.predict(fakes.linear_apply, variables, dataset.images, mesh=each)
    for each in (None, mesh)
  ]
  # Sums of another batch size may differ in the last bits.
  np.testing.assert_allclose(*logits, atol=1e-5)


def test_no_image_at_all():
  dataset = fakes.blobs(8).take([])
  variables = fakes.linear_variables(np.eye(16, 3))
  output = parallel.search(
    fakes.linear_apply,
    variables,
    training.to_float(jnp.asarray(dataset.images)),
    jnp.asarray(dataset.labels),
    KEY,
    num_steps=2,
    step_size=0.1,
  )
  assert output.logits.shape == (0, 3)
  mesh = parallel.create_mesh()
  logits = inference.predict(
    fakes.linear_apply, variables, dataset.images, mesh=mesh
  )
  assert logits.shape == (0, 3)
