"""Tests of psg_jax.checkpoints."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from psg_jax import checkpoints


class State(NamedTuple):
  params: dict
  opt_state: tuple
  key: jax.Array
  step: int


def make_state(value=1.0, *, optimizer=None):
  params = {
    "block_0": {"kernel": jnp.full((3, 3, 1, 2), value), "bias": jnp.zeros(2)},
    "head": {"kernel": jnp.full((2, 4), value, jnp.bfloat16)},
  }
  optimizer = optimizer or optax.adamw(1e-3)
  key = jax.random.key(3)
  return State(params, optimizer.init(params), key, 17)


def bits(leaf):
  if jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
    impl = str(jax.random.key_impl(leaf))
    return impl, leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
  if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
  return type(leaf), repr(leaf)


def container(leaf):
  return jax.Array if isinstance(leaf, jax.Array) else type(leaf)


def assert_same(given, expected):
  assert jax.tree.structure(given) == jax.tree.structure(expected)
  for one, other in zip(
    jax.tree.leaves(given), jax.tree.leaves(expected), strict=True
  ):
    assert bits(one) == bits(other)
    assert container(one) == container(other)


def fails(call, *parts):
  with pytest.raises(ValueError, match=r".") as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


# Exact restoration.


def test_round_trip_with_a_target(tmp_path):
  state = make_state()
  checkpoints.save(tmp_path / "a", state)
  restored = checkpoints.restore(tmp_path / "a", target=make_state(0.0))
  assert_same(restored, state)
  # The key goes on where it stopped.
  np.testing.assert_array_equal(
    jax.random.normal(restored.key, 3), jax.random.normal(state.key, 3)
  )


def test_round_trip_with_shapes_as_target(tmp_path):
  state = make_state()._replace(step=jnp.int32(3))
  checkpoints.save(tmp_path / "a", state)
  target = jax.eval_shape(lambda: state)
  assert_same(checkpoints.restore(tmp_path / "a", target=target), state)


def test_without_a_target_there_are_dictionaries(tmp_path):
  state = make_state(optimizer=optax.sgd(0.1, momentum=0.9))
  checkpoints.save(tmp_path / "a", state)
  restored = checkpoints.restore(tmp_path / "a")
  assert set(restored) == {"params", "opt_state", "key", "step"}
  assert restored["step"] == 17
  assert_same(restored["params"], state.params)
  assert_same(restored["key"], state.key)
  trace = restored["opt_state"]["0"]["trace"]
  assert_same(trace, state.opt_state[0].trace)


@pytest.mark.parametrize("has_target", [True, False])
def test_values_of_every_kind(tmp_path, has_target):
  state = {
    "bfloat16": jnp.arange(3, dtype=jnp.bfloat16),
    "int4": jnp.arange(3, dtype=jnp.int4),
    "float8": jnp.arange(3, dtype=jnp.float8_e4m3fn),
    "empty": jnp.zeros((0, 3)),
    "numpy": {
      "float64": np.array([1e-300, -0.0, np.inf]),
      "nan": np.array([0x7FC0BEEF, 0xFFC00001], np.uint32).view(np.float32),
      "bfloat16": np.arange(3).astype(ml_dtypes.bfloat16),
      "bool": np.array([True, False]),
      "complex": np.array([1 + 2j]),
      "int64": np.array(2**60),
      "scalar": np.float32(0.1),
      "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
      "strided": np.arange(10)[::3],
      "empty": np.zeros((2, 0), np.int8),
    },
    "int": -(3**100),
    "float": 0.1,
    "infinite": float("inf"),
    "nan": float("nan"),
    "true": True,
    "text": "ü\n",
    "odd names": {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}, "": 3, "é": 4},
    "a/b": jnp.full(1, 2.0),
    "a": {"b": jnp.full(1, 3.0)},
  }
  checkpoints.save(tmp_path / "a", state)
  target = state if has_target else None
  assert_same(checkpoints.restore(tmp_path / "a", target=target), state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_keep_their_implementation(tmp_path, impl):
  state = {
    "one": jax.random.key(7, impl=impl),
    "many": jax.random.split(jax.random.key(7, impl=impl), (2, 3)),
    "none": jax.random.split(jax.random.key(7, impl=impl), 0),
  }
  checkpoints.save(tmp_path / "a", state)
  assert_same(checkpoints.restore(tmp_path / "a"), state)
  assert_same(checkpoints.restore(tmp_path / "a", target=state), state)
  shapes = jax.eval_shape(lambda: state)
  assert_same(checkpoints.restore(tmp_path / "a", target=shapes), state)
  target = {name: jax.random.key_data(key) for name, key in state.items()}
  fails(
    lambda: checkpoints.restore(tmp_path / "a", target=target), "many", "key<"
  )


@pytest.mark.parametrize(
  "state", [jnp.arange(3), 3, {}, {"a": 1}, [], (jnp.zeros(0),)]
)
def test_small_states(tmp_path, state):
  checkpoints.save(tmp_path / "a", state)
  assert_same(checkpoints.restore(tmp_path / "a", target=state), state)


def test_target_decides_between_jax_and_numpy(tmp_path):
  checkpoints.save(
    tmp_path / "a", {"x": jnp.arange(3.0), "y": np.arange(3, dtype=np.int32)}
  )
  target = {"x": np.zeros(3, np.float32), "y": jnp.zeros(3, jnp.int32)}
  expected = {"x": np.arange(3, dtype=np.float32), "y": jnp.arange(3)}
  restored = checkpoints.restore(tmp_path / "a", target=target)
  assert_same(restored, expected)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
  st.recursive(
    st.one_of(
      st.integers(),
      st.floats(),
      st.booleans(),
      st.text(max_size=3),
      st.builds(
        np.full,
        st.lists(st.integers(0, 3), max_size=2),
        st.integers(0, 9),
        st.sampled_from(["f4", "i8", "u1"]),
      ),
    ),
    lambda children: st.one_of(
      st.lists(children, max_size=3),
      st.dictionaries(st.text(max_size=3), children, max_size=3),
    ),
    max_leaves=6,
  )
)
def test_any_tree_is_restored(tmp_path_factory, state):
  path = tmp_path_factory.mktemp("tree") / "a"
  checkpoints.save(path, state)
  assert_same(checkpoints.restore(path, target=state), state)


# Shardings.


@pytest.fixture
def mesh():
  if jax.device_count() < 2:
    pytest.skip("there is only one device")
  return jax.make_mesh(
    (jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,)
  )


def test_sharded_arrays(tmp_path, mesh):
  spec = jax.sharding.PartitionSpec
  split = jax.sharding.NamedSharding(mesh, spec("batch"))
  whole = jax.sharding.NamedSharding(mesh, spec())
  values = jnp.arange(8.0 * jax.device_count()).reshape(-1, 4)
  keys = jax.random.split(jax.random.key(0), jax.device_count())
  state = {
    "split": jax.device_put(values, split),
    "whole": jax.device_put(values, whole),
    "keys": jax.device_put(keys, split),
    "plain": values,
  }
  checkpoints.save(tmp_path / "a", state)
  # Each onto another sharding than the one it was saved with.
  target = {
    "split": jax.device_put(jnp.zeros_like(values), whole),
    "whole": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=split),
    "keys": jax.device_put(keys, whole),
    "plain": jax.device_put(values, split),
  }
  restored = checkpoints.restore(tmp_path / "a", target=target)
  for name, leaf in restored.items():
    assert bits(leaf) == bits(state[name])
    assert leaf.sharding.is_equivalent_to(target[name].sharding, leaf.ndim)
  # Without a target nothing depends on the devices of then.
  for leaf in checkpoints.restore(tmp_path / "a").values():
    assert leaf.devices() == {jax.devices()[0]}


def test_restored_arrays_can_join_sharded_ones(tmp_path, mesh):
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("batch")
  )
  batch = jax.device_put(jnp.ones((jax.device_count(), 2)), sharding)
  state = {"kernel": jnp.ones(2), "key": jax.random.key(0)}
  checkpoints.save(tmp_path / "a", state)
  for target in (None, state, jax.eval_shape(lambda: state)):
    kernel = checkpoints.restore(tmp_path / "a", target=target)["kernel"]
    assert not kernel.committed
    np.testing.assert_array_equal(jax.jit(jnp.matmul)(batch, kernel), 2)


def test_another_machine_restores_a_sharded_checkpoint(tmp_path, mesh):
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("batch")
  )
  values = jnp.arange(2.0 * jax.device_count())
  checkpoints.save(tmp_path / "a", {"x": jax.device_put(values, sharding)})
  code = (
    "import sys, jax; from psg_jax import checkpoints;"
    "assert jax.device_count() == 1;"
    "print(checkpoints.restore(sys.argv[1])['x'].sum())"
  )
  environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "a")],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert float(result.stdout) == float(values.sum())


# Differences from the target.


@pytest.mark.parametrize(
  ("target", "parts"),
  [
    ({"a": {"x": np.zeros(3, np.float32)}}, ["leaf b", "too much"]),
    (
      {"a": {"x": np.zeros(3, np.float32)}, "b": 1, "c": 2},
      ["no leaf c", "a Python int"],
    ),
    ({"a": {"y": np.zeros(3, np.float32)}, "b": 1}, ["no leaf a/y"]),
    (
      {"a": {"x": np.zeros(3, np.float16)}, "b": 1},
      ["leaf a/x is float32 [3]", "float16 [3]"],
    ),
    (
      {"a": {"x": jnp.zeros(3, jnp.int32)}, "b": 1},
      ["leaf a/x is float32 [3]", "int32 [3]"],
    ),
    (
      {"a": {"x": np.zeros(4, np.float32)}, "b": 1},
      ["leaf a/x is float32 [3]", "float32 [4]"],
    ),
    (
      {"a": {"x": np.zeros((3, 1), np.float32)}, "b": 1},
      ["leaf a/x is float32 [3]", "float32 [3, 1]"],
    ),
    ({"a": {"x": 1.0}, "b": 1}, ["leaf a/x", "a Python float"]),
    (
      {"a": {"x": np.zeros(3, np.float32)}, "b": 1.0},
      ["leaf b is a Python int, due as a Python float"],
    ),
    (
      {"a": {"x": np.zeros(3, np.float32)}, "b": jnp.int32(1)},
      ["leaf b is a Python int, due as int32 []"],
    ),
    ({"a": {"x": jax.random.key(0)}, "b": 1}, ["leaf a/x", "key<fry> []"]),
    ({"a": {"x": object()}, "b": 1}, ["target", "object at a/x"]),
  ],
)
def test_differences_name_the_first_leaf(tmp_path, target, parts):
  checkpoints.save(tmp_path / "a", {"a": {"x": jnp.zeros(3)}, "b": 1})
  fails(lambda: checkpoints.restore(tmp_path / "a", target=target), *parts)


def test_checkpoint_of_another_network(tmp_path):
  checkpoints.save(tmp_path / "a", make_state())
  other = make_state(optimizer=optax.sgd(0.1, momentum=0.9))
  fails(
    lambda: checkpoints.restore(tmp_path / "a", target=other),
    "path",
    "opt_state/0/trace",
  )


def test_keys_of_another_implementation(tmp_path):
  checkpoints.save(tmp_path / "a", {"key": jax.random.key(0)})
  target = {"key": jax.random.key(0, impl="rbg")}
  fails(
    lambda: checkpoints.restore(tmp_path / "a", target=target),
    "leaf key is key<fry> [], due as key<rbg> []",
  )


def test_64_bit_arrays_are_not_cast(tmp_path):
  checkpoints.save(tmp_path / "a", {"x": np.arange(3.0)})
  target = {"x": jax.ShapeDtypeStruct((3,), np.float64)}
  fails(
    lambda: checkpoints.restore(tmp_path / "a", target=target),
    "leaf x",
    "jax_enable_x64",
  )


# Bad input.


@pytest.mark.parametrize(
  ("state", "parts"),
  [
    ({"a": {"b": object()}}, ["object", "a/b"]),
    ({"a": [1, b"x"]}, ["bytes", "a/1"]),
    ({"a": np.array(["x"])}, ["<U1", " a"]),
    ({"a": np.array([None])}, ["object", " a"]),
    ({"a": np.zeros(2, ">f4")}, [">f4", " a"]),
    ({"a": np.zeros(2, "datetime64[s]")}, ["datetime64", " a"]),
  ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, state, parts):
  fails(lambda: checkpoints.save(tmp_path / "a", state), "state", *parts)
  assert not list(tmp_path.iterdir())


@jax.tree_util.register_pytree_with_keys_class
class _Pair:
  """A tree whose two leaves have the same name."""

  def __init__(self, one, two):
    self.values = one, two

  def tree_flatten_with_keys(self):
    key = jax.tree_util.DictKey("0")
    return [(key, value) for value in self.values], None

  @classmethod
  def tree_unflatten(cls, _, values):
    return cls(*values)


def test_leaves_with_one_path_are_refused(tmp_path):
  fails(lambda: checkpoints.save(tmp_path / "a", _Pair(1, 2)), "state", "two")


def test_traced_arrays_are_refused(tmp_path):
  def run(x):
    checkpoints.save(tmp_path / "a", {"x": x})
    return x

  fails(lambda: jax.jit(run)(jnp.zeros(1)), "state", "traced")


def test_bad_paths(tmp_path):
  fails(lambda: checkpoints.restore(tmp_path / "no"), "path", "no'")
  fails(lambda: checkpoints.metadata(tmp_path / "no"), "path", "no'")
  fails(lambda: checkpoints.restore(tmp_path), "path")
  fails(lambda: checkpoints.save("gs://bucket/a", 1), "path", "gs://")
  fails(lambda: checkpoints.save("", 1), "path")
  (tmp_path / "file").write_text("x")
  fails(lambda: checkpoints.restore(tmp_path / "file"), "path")
  fails(lambda: checkpoints.save(tmp_path / "file", 1), "path", "exists")


def test_checkpoints_of_others_are_refused(tmp_path):
  checkpoints.ocp.save(tmp_path / "a", {"x": jnp.zeros(3)})
  fails(lambda: checkpoints.restore(tmp_path / "a"), "path", "psg_jax")


@pytest.mark.parametrize("is_marker_kept", [True, False])
def test_damaged_checkpoints(tmp_path, is_marker_kept):
  checkpoints.save(tmp_path / "a", make_state())
  for file in (tmp_path / "a").rglob("*"):
    is_marker = file.parent == tmp_path / "a"
    if file.is_file() and not (is_marker and is_marker_kept):
      file.write_bytes(file.read_bytes()[:10])
  fails(lambda: checkpoints.restore(tmp_path / "a"), "path", "damaged")


def flip(path, position, bit):
  content = bytearray(path.read_bytes())
  content[position] ^= 1 << bit
  path.write_bytes(content)


@pytest.mark.parametrize("name", ["a", "b/noise"])
def test_damaged_values_are_named(tmp_path, name):
  rng = np.random.default_rng(0)
  # Noise, which is stored as it is and not compressed.
  noise = rng.integers(0, 256, (2, 5000)).astype(np.uint8)
  state = {"a": jnp.asarray(noise[0]), "b": {"noise": noise[1]}, "n": 3}
  checkpoints.save(tmp_path / "a", state)
  values = noise[int(name != "a")].tobytes()
  (file,) = (
    file
    for file in (tmp_path / "a").rglob("*")
    if file.is_file() and values in file.read_bytes()
  )
  flip(file, file.read_bytes().index(values) + 1234, 3)
  for target in (state, None):
    fails(
      lambda target=target: checkpoints.restore(tmp_path / "a", target=target),
      f"damaged checkpoint: leaf {name} is not what was saved",
    )


def test_any_flipped_bit_is_harmless_or_told(tmp_path):
  rng = np.random.default_rng(0)
  state = {"x": rng.random(300), "n": 17, "key": jax.random.key(1)}
  metadata = {"history": [{"loss": 0.5}]}
  checkpoints.save(tmp_path / "a", state, metadata=metadata)
  told = 0
  for file in sorted((tmp_path / "a").rglob("*")):
    for _ in range(2 * (file.is_file() and file.stat().st_size > 0)):
      where = rng.integers(file.stat().st_size), rng.integers(8)
      flip(file, *where)
      with contextlib.suppress(ValueError):
        told += 1
        restored = checkpoints.restore(tmp_path / "a")
        given = checkpoints.metadata(tmp_path / "a")
        told -= 1
        assert_same(restored, state)
        assert given == metadata
      flip(file, *where)
  assert told > 3


def as_first_version(folder):
  """Takes out of a checkpoint what the first version did not write."""
  path = folder / "_CHECKPOINT_METADATA"
  content = json.loads(path.read_text())
  own = content["custom_metadata"]
  del own["digest"]
  own["psg_jax"] = 1
  own["leaves"] = [leaf[:6] for leaf in own["leaves"]]
  path.write_text(json.dumps(content))


def test_checkpoints_without_digests_are_read(tmp_path):
  state = {"x": jnp.arange(3.0), "n": 17}
  checkpoints.save(tmp_path / "a", state, metadata={"seed": 3})
  as_first_version(tmp_path / "a")
  assert_same(checkpoints.restore(tmp_path / "a", target=state), state)
  assert checkpoints.metadata(tmp_path / "a") == {"seed": 3}


# Metadata, overwriting, failures.


def test_metadata(tmp_path):
  checkpoints.save(tmp_path / "a", {"x": 1}, metadata={"seed": 3, "y": [1.5]})
  assert checkpoints.metadata(tmp_path / "a") == {"seed": 3, "y": [1.5]}
  checkpoints.save(tmp_path / "b", {"x": 1})
  assert checkpoints.metadata(tmp_path / "b") == {}
  fails(
    lambda: checkpoints.save(tmp_path / "c", 1, metadata={"x": object()}),
    "metadata",
    "object",
  )


def test_relative_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoints.save("runs/../a", {"x": jnp.ones(2)})
  assert_same(checkpoints.restore("a"), {"x": jnp.ones(2)})


def test_overwriting_must_be_asked_for(tmp_path):
  path = tmp_path / "a"
  checkpoints.save(path, {"x": jnp.ones(2)})
  fails(lambda: checkpoints.save(path, {"y": 1}), "path", "overwrite=True")
  assert_same(checkpoints.restore(path), {"x": jnp.ones(2)})
  checkpoints.save(path, {"y": jnp.zeros(3)}, overwrite=True)
  assert_same(checkpoints.restore(path), {"y": jnp.zeros(3)})
  assert list(tmp_path.iterdir()) == [path]


def test_only_checkpoints_are_overwritten(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "thesis.txt").write_text("x")
  fails(
    lambda: checkpoints.save(tmp_path / "a", 1, overwrite=True),
    "path",
    "not a checkpoint",
  )
  assert (tmp_path / "a" / "thesis.txt").is_file()


def test_remove(tmp_path):
  checkpoints.save(tmp_path / "a", {"x": jnp.ones(2)})
  checkpoints.remove(tmp_path / "a")
  assert not list(tmp_path.iterdir())
  fails(lambda: checkpoints.remove(tmp_path / "a"), "path", "checkpoint")
  (tmp_path / "thesis.txt").write_text("x")
  fails(lambda: checkpoints.remove(tmp_path), "path", "checkpoint")
  assert (tmp_path / "thesis.txt").is_file()


@pytest.mark.parametrize("is_late", [True, False])
def test_a_failed_save_leaves_the_old_checkpoint(
  tmp_path, monkeypatch, is_late
):
  path = tmp_path / "a"
  checkpoints.save(path, {"x": jnp.ones(2)})
  save = checkpoints.ocp.save

  def fail(staging, *args, **kwargs):
    if is_late:
      save(staging, *args, **kwargs)
    else:
      half = staging.with_name(staging.name + ".orbax-checkpoint-tmp")
      half.mkdir()
      (half / "data").write_text("x")
    raise OSError("the disk is full")

  monkeypatch.setattr(checkpoints.ocp, "save", fail)
  with pytest.raises(OSError, match="full"):
    checkpoints.save(path, {"x": jnp.zeros(2)}, overwrite=True)
  assert list(tmp_path.iterdir()) == [path]
  assert_same(checkpoints.restore(path), {"x": jnp.ones(2)})


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
  half = tmp_path / ".a.saving.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "data").write_text("x")
  checkpoints.save(tmp_path / "a", {"x": jnp.ones(2)})
  assert list(tmp_path.iterdir()) == [tmp_path / "a"]


class Killed(BaseException):
  """Stands for the end of the process: nothing is done after it."""


def killed_at(step, call, written=None):
  """Runs a call and ends it before its nth change of a folder, as SIGKILL.

  What Orbax is to write is copied from `written`, which is faster.
  """
  done = []

  def counted(real, *args, **kwargs):
    if len(done) == step:
      done.append("killed")
      if real is shutil.rmtree and os.path.exists(args[0]):
        # Half of it is gone already.
        for file in pathlib.Path(args[0]).rglob("_CHECKPOINT_METADATA"):
          file.unlink()
    if len(done) > step:
      raise Killed
    done.append(real)
    return real(*args, **kwargs)

  def copy(staging, arrays, **metadata):
    del arrays, metadata
    shutil.copytree(written, staging)

  with pytest.MonkeyPatch.context() as patch:
    for module, name in (
      (os, "rename"),
      (shutil, "rmtree"),
      (checkpoints.ocp, "save"),
    ):
      real = getattr(module, name)
      if name == "save":
        real = copy
      patch.setattr(module, name, functools.partial(counted, real))
    try:
      call()
    except Killed:
      return True
  return False


def test_a_kill_at_any_step_leaves_a_checkpoint(tmp_path):
  written = [tmp_path / "old", tmp_path / "new"]
  for value, path in enumerate(written):
    checkpoints.save(path, {"x": np.full(2, value)})
  is_killed, step = True, 0
  while is_killed:
    run = tmp_path / str(step)
    path = run / "checkpoints" / "a"
    shutil.copytree(written[0], path)

    def replace(path=path):
      checkpoints.save(path, {}, overwrite=True)

    is_killed = killed_at(step, replace, written[1])
    # Reading changes nothing, and finds it by its name, too.
    assert checkpoints.exists(path)
    assert list(checkpoints.run_checkpoints(run)) == ["a"]
    restored = checkpoints.restore(path)
    assert_same(checkpoints.restore_run(run, "a"), restored)
    assert restored["x"][0] in ((0, 1) if is_killed else (1,))
    assert not killed_at(99, replace, written[1])
    assert checkpoints.restore(path)["x"][0] == 1
    assert list(path.parent.iterdir()) == [path]
    step += 1
  assert step > 6


def test_a_kill_while_removing_leaves_all_or_nothing(tmp_path):
  is_killed, step = True, 0
  while is_killed:
    path = tmp_path / str(step) / "a"
    checkpoints.save(path, {"x": 1})
    is_killed = killed_at(step, lambda path=path: checkpoints.remove(path))
    assert checkpoints.exists(path) == path.exists()
    if path.exists():
      assert_same(checkpoints.restore(path), {"x": 1})
    checkpoints.remove(path, is_missing_ok=True)
    assert not list(path.parent.iterdir())
    step += 1
  assert step > 3


def test_a_failure_between_the_renames_puts_the_old_one_back(
  tmp_path, monkeypatch
):
  path = tmp_path / "a"
  checkpoints.save(path, {"x": 1})
  rename = os.rename

  def fail(source, target):
    if os.fspath(source).endswith(".saving") and os.fspath(target) == str(path):
      raise PermissionError("no")
    rename(source, target)

  monkeypatch.setattr(os, "rename", fail)
  with pytest.raises(PermissionError):
    checkpoints.save(path, {"x": 2}, overwrite=True)
  assert_same(checkpoints.restore(path), {"x": 1})
  assert list(tmp_path.iterdir()) == [path]


def test_what_was_replaced_is_not_overwritten_unasked(tmp_path):
  path = tmp_path / "a"
  checkpoints.save(path, {"x": 1})
  path.rename(tmp_path / ".a.replaced")
  fails(lambda: checkpoints.save(path, {"x": 2}), "overwrite=True")
  assert_same(checkpoints.restore(path), {"x": 1})


def test_a_disk_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise RuntimeError("UNAVAILABLE:\nNo space left on device")

  monkeypatch.setattr(checkpoints.ocp, "save", fail)
  with pytest.raises(OSError, match=r"a' cannot be written: .* No space left"):
    checkpoints.save(tmp_path / "a", {"x": 1})
  assert not list(tmp_path.iterdir())


def test_saving_neither_donates_nor_changes(tmp_path):
  state = make_state()
  before = jax.tree.map(bits, state)
  checkpoints.save(tmp_path / "a", state)
  chex.assert_trees_all_equal(jax.tree.map(bits, state), before)


# The folder of a run.


def test_run_folder(tmp_path):
  run = tmp_path / "runs" / "demo"
  path = checkpoints.save_run(run, "original", {"x": jnp.ones(2)})
  assert path == run / "checkpoints" / "original"
  checkpoints.save_run(run, "unlearned", {"x": jnp.zeros(2)}, metadata={"n": 1})
  assert checkpoints.run_checkpoints(run) == {
    "original": path,
    "unlearned": run / "checkpoints" / "unlearned",
  }
  assert checkpoints.metadata(run / "checkpoints" / "unlearned") == {"n": 1}
  restored = checkpoints.restore_run(
    run, "original", target={"x": jnp.zeros(2)}
  )
  assert_same(restored, {"x": jnp.ones(2)})
  fails(
    lambda: checkpoints.restore_run(run, "retraind"),
    "name",
    "original, unlearned",
    "'retraind'",
  )
  fails(
    lambda: checkpoints.save_run(run, "original", {"x": 1}), "overwrite=True"
  )


def test_run_folder_bad_input(tmp_path):
  fails(lambda: checkpoints.run_checkpoints(tmp_path / "no"), "run_dir", "no'")
  fails(
    lambda: checkpoints.restore_run(tmp_path / "no", "original"),
    "run_dir",
    "no'",
  )
  assert checkpoints.run_checkpoints(tmp_path) == {}
  fails(
    lambda: checkpoints.restore_run(tmp_path, "original"),
    "run_dir",
    "no checkpoints",
  )
  for name in ("", "../a", "a/b", ".a", "a b"):
    fails(
      lambda name=name: checkpoints.save_run(tmp_path, name, 1),
      "name",
      repr(name),
    )
