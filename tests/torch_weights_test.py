"""Tests of psg_jax.torch_weights."""

import collections
import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from psg_jax import convolution, models, torch_weights
from tests import torch_files_test

fails = torch_files_test.fails

POSITIONS = (0, 1, 2, 4, 5, 6, 8, 9)


def make_state(
  dtype=np.float32, widths=(2, 2, 3, 3, 3, 3, 3, 3), channels=1, classes=4
):
  """A state dict of the tiniest All-CNN, with every value its own."""
  rng = np.random.default_rng(0)
  state = {}
  inputs = channels
  for i, (position, width) in enumerate(zip(POSITIONS, widths, strict=True)):
    size = 1 if i == 7 else 3
    layer = f"features.{position}"
    shape = (width, inputs, size, size)
    state[f"{layer}.0.weight"] = rng.normal(size=shape).astype(dtype)
    for name in ("weight", "bias", "running_mean", "running_var"):
      state[f"{layer}.1.{name}"] = rng.normal(size=width).astype(dtype)
    state[f"{layer}.1.num_batches_tracked"] = np.array(7 + i, np.int64)
    inputs = width
  state["classifier.0.weight"] = rng.normal(size=(classes, inputs)).astype(
    dtype
  )
  state["classifier.0.bias"] = rng.normal(size=classes).astype(dtype)
  return state


def save_state(path, state):
  safetensors_numpy.save_file(
    {key: np.ascontiguousarray(x) if x.ndim else x for key, x in state.items()},
    path,
  )
  return path


def load(path):
  return torch_weights.load(path, model_name="all_cnn")


def save(path, variables):
  torch_weights.save(path, variables, model_name="all_cnn")
  return safetensors_numpy.load_file(path)


def assert_same_bits(given, expected):
  assert given.keys() == expected.keys()
  for key, array in expected.items():
    assert given[key].dtype == array.dtype, key
    assert given[key].shape == array.shape, key
    assert given[key].tobytes() == array.tobytes(), key


# The layout.


def test_load_puts_every_entry_where_the_network_has_it(tmp_path):
  state = make_state()
  variables = load(save_state(tmp_path / "a.safetensors", state))
  block = variables["params"]["block_3"]
  stats = variables["batch_stats"]["block_3"]
  # PyTorch's [out, in, row, column] at Flax's [row, column, in, out].
  assert block["kernel"].shape == (3, 3, 3, 3)
  np.testing.assert_array_equal(
    block["kernel"][0, 2, 1, 0], state["features.4.0.weight"][0, 1, 0, 2]
  )
  np.testing.assert_array_equal(block["scale"], state["features.4.1.weight"])
  np.testing.assert_array_equal(block["bias"], state["features.4.1.bias"])
  np.testing.assert_array_equal(
    stats["mean"], state["features.4.1.running_mean"]
  )
  np.testing.assert_array_equal(stats["var"], state["features.4.1.running_var"])
  assert stats["count"] == 10
  assert stats["count"].dtype == jnp.int32
  assert stats["count"].shape == ()
  np.testing.assert_array_equal(
    variables["params"]["head"]["kernel"], state["classifier.0.weight"].T
  )
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables))


def test_layout_is_that_of_the_network(tmp_path):
  model = models.create("all_cnn", num_classes=4, width=0.03, mean=0.5, std=0.5)
  expected = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  state = make_state(widths=(2, 2, 5, 5, 5, 5, 5, 5), channels=3)
  loaded = jax.eval_shape(
    lambda: load(save_state(tmp_path / "a.safetensors", state))
  )
  assert loaded == expected


# Round trips.


@pytest.mark.parametrize(
  "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
)
def test_round_trip_from_pytorch_keeps_every_bit(tmp_path, dtype):
  state = make_state(dtype)
  state["features.0.1.bias"][1] = -0.0
  path = save_state(tmp_path / "a.safetensors", state)
  variables = load(path)
  torch_weights.save(
    tmp_path / "b.safetensors", variables, model_name="all_cnn", like=path
  )
  first, second = (
    {
      key: (spec["dtype"], spec["shape"], bytes(spec["data"]))
      for key, spec in safetensors.deserialize((tmp_path / name).read_bytes())
    }
    for name in ("a.safetensors", "b.safetensors")
  )
  assert first == second


def test_round_trip_from_flax_keeps_every_bit(tmp_path):
  model = models.create("all_cnn", num_classes=4, width=0.05, mean=0.5, std=0.5)
  shapes = jax.eval_shape(
    model.init, jax.random.key(1), jnp.zeros((1, 32, 32, 3))
  )
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.uniform(0, 9, x.shape), x.dtype), shapes
  )
  torch_weights.save(
    tmp_path / "a.safetensors", variables, model_name="all_cnn"
  )
  again = load(tmp_path / "a.safetensors")
  assert jax.tree.structure(again) == jax.tree.structure(dict(variables))
  for given, expected in zip(
    jax.tree.leaves(again), jax.tree.leaves(variables), strict=True
  ):
    assert given.dtype == expected.dtype
    assert np.asarray(given).tobytes() == np.asarray(expected).tobytes()


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
  widths=st.tuples(*[st.integers(1, 4)] * 8),
  channels=st.integers(1, 4),
  classes=st.integers(2, 4),
)
def test_round_trip_for_any_widths(tmp_path_factory, widths, channels, classes):
  folder = tmp_path_factory.mktemp("widths")
  state = make_state(np.float32, widths, channels, classes)
  variables = load(save_state(folder / "a.safetensors", state))
  assert_same_bits(save(folder / "b.safetensors", variables), state)


@pytest.mark.parametrize("name", ["original.pt", "original.safetensors"])
def test_reference_round_trip(tmp_path, reference_dir, name):
  expected = safetensors_numpy.load_file(reference_dir / "original.safetensors")
  variables = load(reference_dir / name)
  assert_same_bits(save(tmp_path / "b.safetensors", variables), expected)


def test_reference_logits(reference_dir):
  with np.load(reference_dir / "fgsm.npz") as stored:
    images, expected = stored["x"][:32], stored["logits"][:32]
  model = models.create(
    "all_cnn", num_classes=10, num_channels=1, width=0.25, mean=0.5, std=0.5
  )
  # Stored as (p / 255 - 0.5) / 0.5 in [N, C, H, W].
  pixels = np.transpose(images, (0, 2, 3, 1)) * 0.5 + 0.5
  logits = model.apply(load(reference_dir / "original.pt"), jnp.asarray(pixels))
  # Two float32 convolution libraries over eight layers.
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


# The ResNets, in torchvision's layout.

COUNT = "num_batches_tracked"


def add_conv(state, rng, conv, norm, shape):
  state[f"{conv}.weight"] = rng.normal(size=shape).astype(np.float32)
  for name in ("weight", "bias", "running_mean", "running_var"):
    state[f"{norm}.{name}"] = rng.normal(size=shape[0]).astype(np.float32)
  state[f"{norm}.{COUNT}"] = np.array(len(state), np.int64)


def make_resnet_state(name, classes=4):
  """A state dict of a narrow ResNet, of 2, 4, 8 and 16 filters."""
  rng = np.random.default_rng(0)
  state = {}
  add_conv(state, rng, "conv1", "bn1", (2, 3, 7, 7))
  inputs = 2
  blocks = (2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3)
  for i, number in enumerate(blocks):
    for j in range(number):
      layer, filters = f"layer{i + 1}.{j}", 2 ** (i + 1)
      shapes = [(filters, inputs, 3, 3), (filters, filters, 3, 3)]
      if name == "resnet50":
        shapes = [(filters, inputs, 1, 1), (filters, filters, 3, 3)]
        shapes.append((4 * filters, filters, 1, 1))
      for n, shape in enumerate(shapes, 1):
        add_conv(state, rng, f"{layer}.conv{n}", f"{layer}.bn{n}", shape)
      outputs = shapes[-1][0]
      if j == 0 and (i > 0 or name == "resnet50"):
        shortcut = f"{layer}.downsample"
        add_conv(
          state, rng, f"{shortcut}.0", f"{shortcut}.1", (outputs, inputs, 1, 1)
        )
      inputs = outputs
  state["fc.weight"] = rng.normal(size=(classes, inputs)).astype(np.float32)
  state["fc.bias"] = rng.normal(size=classes).astype(np.float32)
  return state


def respelled(state, prefix="", head="fc", has_counts=True):
  return {
    prefix + (head + key[2:] if key.startswith("fc.") else key): array
    for key, array in state.items()
    if has_counts or not key.endswith(COUNT)
  }


@pytest.fixture(params=["resnet18", "resnet50"])
def resnet(request):
  return request.param


def test_number_of_keys_is_torchvisions(resnet):
  # Counted on torchvision's state dicts.
  expected = {"resnet18": 122, "resnet50": 320}
  assert len(make_resnet_state(resnet)) == expected[resnet]


def test_resnet_layout_is_that_of_the_network(tmp_path, resnet):
  model = models.create(resnet, num_classes=4, width=1 / 32, mean=0.5, std=0.5)
  expected = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  state = make_resnet_state(resnet)
  path = save_state(tmp_path / "a.safetensors", state)
  loaded = torch_weights.load(path, model_name=resnet)
  assert jax.eval_shape(lambda: loaded) == expected
  np.testing.assert_array_equal(
    loaded["params"]["layer2_0"]["downsample"]["kernel"][0, 0, 1],
    state["layer2.0.downsample.0.weight"][:, 1, 0, 0],
  )
  stats = loaded["batch_stats"]["layer3_1"]["conv2"]
  np.testing.assert_array_equal(
    stats["mean"], state["layer3.1.bn2.running_mean"]
  )


@pytest.mark.parametrize("head", ["fc", "fc.1", "fc.0"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("has_counts", [True, False])
def test_resnet_round_trip(tmp_path, resnet, head, prefix, has_counts):
  state = make_resnet_state(resnet)
  given = respelled(state, prefix, head, has_counts)
  path = save_state(tmp_path / "a.safetensors", given)
  variables = torch_weights.load(path, model_name=resnet)
  torch_weights.save(
    tmp_path / "b.safetensors", variables, model_name=resnet, like=path
  )
  assert_same_bits(
    safetensors_numpy.load_file(tmp_path / "b.safetensors"), given
  )
  # Without a model to follow: torchvision's own keys.
  torch_weights.save(tmp_path / "c.safetensors", variables, model_name=resnet)
  if not has_counts:
    state = {
      key: np.array(0) if key.endswith(COUNT) else array
      for key, array in state.items()
    }
  assert_same_bits(
    safetensors_numpy.load_file(tmp_path / "c.safetensors"), state
  )


def test_all_cnn_is_saved_like_a_wrapped_one(tmp_path):
  given = {f"module.{key}": array for key, array in make_state().items()}
  path = save_state(tmp_path / "a.safetensors", given)
  torch_weights.save(
    tmp_path / "b.safetensors", load(path), model_name="all_cnn", like=path
  )
  assert_same_bits(
    safetensors_numpy.load_file(tmp_path / "b.safetensors"), given
  )


def test_like_takes_no_other_network(tmp_path):
  path = save_state(tmp_path / "a.safetensors", make_state())
  variables = load(path)
  other = save_state(tmp_path / "b.safetensors", make_resnet_state("resnet18"))

  def save_like(like):
    torch_weights.save(
      tmp_path / "c.safetensors", variables, model_name="all_cnn", like=like
    )

  fails(lambda: save_like(other), "like", "missing features.0.0.weight")
  fails(lambda: save_like(tmp_path / "no.pt"), "like must be a file", "no.pt")
  assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    (lambda s: s.pop("fc.bias"), ["missing fc.bias"]),
    (lambda s: s.pop("bn1.num_batches_tracked"), ["missing bn1.num_batches"]),
    (
      lambda s: s.update({"fc.3.weight": s["fc.weight"]}),
      ["unexpected fc.3.weight"],
    ),
    (
      lambda s: s.update(
        {
          f"fc.{i}.{n}": s[f"fc.{n}"]
          for i in (0, 2)
          for n in ("weight", "bias")
        }
      ),
      ["unexpected fc.0.bias"],
    ),
    (
      lambda s: s.update({"layer1.0.conv1.weight": s["conv1.weight"]}),
      ["layer1.0.conv1.weight has shape [2, 3, 7, 7]", "3, 3] is due"],
    ),
    (
      lambda s: s.update(
        {"layer1.1.conv2.weight": np.zeros((3, 2, 3, 3), np.float32)}
      ),
      ["layer1.1.conv2.weight has shape [3, 2, 3, 3]", "[2, 2, 3, 3]"],
    ),
    (
      lambda s: s.update({"layer1.0.downsample.0.weight": s["conv1.weight"]}),
      ["unexpected layer1.0.downsample.0.weight"],
    ),
  ],
)
def test_resnet_load_names_the_entry_that_is_wrong(tmp_path, change, parts):
  state = make_resnet_state("resnet18")
  change(state)
  path = save_state(tmp_path / "a.safetensors", state)
  fails(lambda: torch_weights.load(path, model_name="resnet18"), "path", *parts)


@pytest.mark.parametrize("head", ["fc", "fc.1", "module", None])
def test_backbone_keeps_the_head_of_the_variables(tmp_path, resnet, head):
  state = make_resnet_state(resnet, classes=7)
  if head == "module":
    given = respelled(state, "module.")
  elif head is None:
    given = {k: x for k, x in state.items() if not k.startswith("fc.")}
  else:
    given = respelled(state, head=head)
  path = save_state(tmp_path / "a.safetensors", given)
  whole = torch_weights.load(
    save_state(tmp_path / "b.safetensors", state), model_name=resnet
  )
  fresh = jax.tree.map(lambda x: jnp.full(x.shape, 3, x.dtype), dict(whole))
  fresh["params"]["head"] = {
    "kernel": jnp.full((len(whole["params"]["head"]["kernel"]), 2), 5.0),
    "bias": jnp.full(2, 6.0),
  }
  loaded = torch_weights.load_backbone(path, fresh, model_name=resnet)
  expected = {
    **whole,
    "params": {**whole["params"], "head": fresh["params"]["head"]},
  }
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)
  assert jax.tree.map(jnp.dtype, loaded) == jax.tree.map(jnp.dtype, expected)


def test_backbone_takes_the_types_of_the_variables(tmp_path):
  state = make_state()
  variables = load(save_state(tmp_path / "a.safetensors", state))
  half = {
    key: x.astype(np.float16) if x.ndim else x for key, x in state.items()
  }
  path = save_state(tmp_path / "b.safetensors", half)
  loaded = torch_weights.load_backbone(path, variables, model_name="all_cnn")
  bias = loaded["params"]["block_0"]["bias"]
  assert bias.dtype == jnp.float32
  np.testing.assert_array_equal(bias, half["features.0.1.bias"])


def test_backbone_says_what_is_wrong(tmp_path, resnet):
  state = make_resnet_state(resnet)
  path = save_state(tmp_path / "a.safetensors", state)
  variables = torch_weights.load(path, model_name=resnet)

  def load_backbone(path, variables=variables):
    torch_weights.load_backbone(path, variables, model_name=resnet)

  name, weights = {
    "resnet18": ("resnet18-f37072fd.pth", "IMAGENET1K_V1"),
    "resnet50": ("resnet50-11ad3fa6.pth", "IMAGENET1K_V2"),
  }[resnet]
  fails(
    lambda: load_backbone(tmp_path / "no.pth"),
    "path must be a file",
    "no.pth",
    f"https://download.pytorch.org/models/{name}",
    weights,
  )
  other = {**state, "conv1.weight": np.zeros((2, 1, 7, 7), np.float32)}
  grey = save_state(tmp_path / "b.safetensors", other)
  fails(
    lambda: load_backbone(grey),
    "conv1.weight has shape [2, 1, 7, 7] where variables have [2, 3, 7, 7]",
  )
  fails(
    lambda: load_backbone(path, {"params": variables["params"]}),
    "variables",
    "missing batch_stats/stem/conv1/mean",
  )
  del other["bn1.bias"]
  broken = save_state(tmp_path / "c.safetensors", other)
  fails(lambda: load_backbone(broken), "path", "missing bn1.bias")


# Files as people have them.


@pytest.mark.parametrize(
  "prefix",
  [
    *("model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."),
    *("module.model.", "net.", "backbone.", "0.encoder_q."),
  ],
)
def test_any_prefix_that_all_keys_share(tmp_path, prefix):
  state = make_state()
  given = {prefix + key: array for key, array in state.items()}
  # Of an averaged model, a loss and a counter of operations.
  given["n_averaged"] = np.array(3)
  given["criterion.weight"] = np.ones(4, np.float32)
  given[f"{prefix}total_ops"] = np.zeros(1)
  path = save_state(tmp_path / "a.safetensors", given)
  variables = load(path)
  assert_same_bits(save(tmp_path / "b.safetensors", variables), state)
  said = torch_weights.describe(path, model_name="all_cnn")
  for part in (prefix[:-1], "n_averaged", "criterion", f"{prefix}total_ops"):
    assert part in said


@pytest.mark.parametrize(
  "where", ["", "state_dict", "model_state_dict", "model", "net", "ema", "a.b"]
)
def test_any_dictionary_of_the_file(tmp_path, where):
  state = make_state()
  tree = torch_files_test.tensors(
    {f"module.{key}": array for key, array in state.items()}
  )
  for name in reversed(where.split(".") if where else []):
    tree = {"epoch": 3, name: tree, "optimizer": {"state": {0: {}}}}
  path = torch_files_test.write_pt(tmp_path / "a.ckpt", tree, state)
  torch_weights.save(
    tmp_path / "b.safetensors", load(path), model_name="all_cnn", like=path
  )
  assert_same_bits(
    safetensors_numpy.load_file(tmp_path / "b.safetensors"),
    {f"module.{key}": array for key, array in state.items()},
  )
  said = torch_weights.describe(path, model_name="all_cnn")
  assert ("left aside: epoch, optimizer" in said) == bool(where)


def test_which_of_several_is_meant(tmp_path):
  state = make_state()
  other = {key: np.asarray(array + 1) for key, array in state.items()}
  both = state | {f"other {key}": array for key, array in other.items()}
  every = torch_files_test.tensors(both)
  first = {key: every[key] for key in state}
  second = {key: every[f"other {key}"] for key in state}

  def write(tree):
    return torch_files_test.write_pt(tmp_path / "a.pt", tree, both)

  # The usual names come first, whatever the order in the file.
  path = write({"ema": second, "model": first})
  assert_same_bits(save(tmp_path / "b.safetensors", load(path)), state)
  assert "left aside: ema" in torch_weights.describe(path, model_name="all_cnn")
  path = write({"teacher": second, "student": first})
  fails(lambda: load(path), "2 times", "'teacher', 'student'")
  path = write(
    {f"{name}.{key}": x for name in ("a", "b") for key, x in second.items()}
  )
  assert_same_bits(save(tmp_path / "b.safetensors", load(path)), other)
  path = write(
    {f"net.{key}": x for key, x in first.items()}
    | {f"ema.{key}": x for key, x in second.items()}
  )
  fails(lambda: load(path), "2 times", "'net', 'ema'")
  # Of safetensors, the values say whether two are one.
  for prefix in ("", "model."):
    named = {f"{prefix}{key}": x for key, x in state.items()}
    path = save_state(
      tmp_path / "c.safetensors",
      named | {f"ema.{key}": x for key, x in other.items()},
    )
    fails(lambda path=path: load(path), "2 times", "'ema'")
    path = save_state(
      tmp_path / "c.safetensors",
      named | {f"ema.{key}": x for key, x in state.items()},
    )
    assert_same_bits(save(tmp_path / "b.safetensors", load(path)), state)


def test_weights_of_another_network_are_named(tmp_path):
  path = save_state(tmp_path / "a.safetensors", make_resnet_state("resnet18"))
  fails(
    lambda: torch_weights.load(path, model_name="resnet50"),
    "missing layer1.0.conv3.weight",
    "it is a state dict of 'resnet18'",
  )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_computed_in_float32(tmp_path, dtype):
  state = make_state(dtype)
  # Some halve everything: a count of 70,000 is infinite then.
  for key in [key for key in state if key.endswith(COUNT)]:
    state[key] = state[key].astype(dtype)
  state[f"features.0.1.{COUNT}"] = np.array(np.inf, dtype)
  path = save_state(tmp_path / "a.safetensors", state)
  variables = load(path)
  for leaf in jax.tree.leaves(variables):
    assert isinstance(leaf, jax.Array)
    assert leaf.dtype == (jnp.float32 if leaf.ndim else jnp.int32)
  np.testing.assert_array_equal(
    variables["params"]["head"]["bias"],
    state["classifier.0.bias"].astype(np.float32),
  )
  said = torch_weights.describe(path, model_name="all_cnn")
  assert f"{np.dtype(dtype).name} read as float32" in said
  torch_weights.save(
    tmp_path / "b.safetensors", variables, model_name="all_cnn", like=path
  )
  again = safetensors_numpy.load_file(tmp_path / "b.safetensors")
  assert {x.dtype for x in again.values()} == {np.dtype(dtype)}
  assert again["classifier.0.bias"].tobytes() == (
    state["classifier.0.bias"].tobytes()
  )


def test_values_too_large_for_the_type_of_like(tmp_path):
  path = save_state(tmp_path / "a.safetensors", make_state(np.float16))
  variables = load(path)
  variables["params"]["head"]["bias"] = jnp.full(4, 1e6)
  fails(
    lambda: torch_weights.save(
      tmp_path / "b.safetensors", variables, model_name="all_cnn", like=path
    ),
    "params/head/bias",
    "float16 of like",
  )


def test_float64_computes_as_float32(tmp_path):
  state = make_state(np.float64)
  kernel = load(save_state(tmp_path / "a.safetensors", state))["params"][
    "block_0"
  ]["kernel"]
  images = jnp.ones((1, 4, 4, 1))
  np.testing.assert_array_equal(
    convolution.conv2d(images, kernel),
    convolution.conv2d(images, jnp.asarray(kernel, jnp.float32)),
  )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
  state = make_state(dtype)
  state["features.4.1.running_var"][1] = value
  path = save_state(tmp_path / "a.safetensors", state)
  parts = "features.4.1.running_var has NaN or infinity in 1 of 3 values", "a.s"
  fails(lambda: load(path), *parts)
  good = load(save_state(tmp_path / "b.safetensors", make_state()))
  fails(
    lambda: torch_weights.load_backbone(path, good, model_name="all_cnn"),
    *parts,
  )


def test_misfit_names_classes_channels_and_arrays(tmp_path):
  model = models.create("all_cnn", num_classes=4, width=0.03, mean=0.5, std=0.5)
  expected = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )

  def misfit(**options):
    state = make_state(widths=(2, 2, 5, 5, 5, 5, 5, 5), **options)
    variables = load(save_state(tmp_path / "a.safetensors", state))
    return torch_weights.misfit(variables, expected, model_name="all_cnn")

  assert misfit(channels=3, classes=4) is None
  assert misfit(channels=1).startswith(
    "others, of 4 classes and 1 channel: features.0.0.weight has shape [2, 1,"
  )
  assert "1 class and 3 channels: classifier" in misfit(channels=3, classes=1)


def test_the_umask_decides_the_mode_of_a_file(tmp_path):
  variables = load(save_state(tmp_path / "a.safetensors", make_state()))
  before = os.umask(0o027)
  try:
    save(tmp_path / "b.safetensors", variables)
  finally:
    os.umask(before)
  assert (tmp_path / "b.safetensors").stat().st_mode & 0o777 == 0o640


# The .pt reader, against PyTorch itself.


@pytest.fixture
def torch():
  return pytest.importorskip("torch", reason="PyTorch is not installed")


def to_torch(torch, state):
  return collections.OrderedDict(
    (key, torch.from_numpy(np.array(array))) for key, array in state.items()
  )


def test_pt_equals_safetensors(torch, tmp_path):
  state = make_state()
  torch.save(to_torch(torch, state), tmp_path / "a.pt")
  variables = load(tmp_path / "a.pt")
  assert_same_bits(save(tmp_path / "b.safetensors", variables), state)
  loaded = pytest.importorskip("safetensors.torch").load_file(
    tmp_path / "b.safetensors"
  )
  for key, tensor in to_torch(torch, state).items():
    assert loaded[key].dtype == tensor.dtype
    assert torch.equal(loaded[key], tensor)


def test_pt_of_a_resnet_and_of_parameters(torch, tmp_path, resnet):
  state = make_resnet_state(resnet)
  tensors = to_torch(torch, respelled(state, "module.", "fc.1"))
  # Some published files hold parameters where others hold tensors.
  for key, tensor in tensors.items():
    if key.endswith((".weight", ".bias")):
      tensors[key] = torch.nn.Parameter(tensor)
  torch.save(tensors, tmp_path / "a.pt")
  variables = torch_weights.load(tmp_path / "a.pt", model_name=resnet)
  torch_weights.save(
    tmp_path / "b.safetensors",
    variables,
    model_name=resnet,
    like=tmp_path / "a.pt",
  )
  loaded = pytest.importorskip("safetensors.torch").load_file(
    tmp_path / "b.safetensors"
  )
  assert loaded.keys() == tensors.keys()
  for key, tensor in tensors.items():
    assert loaded[key].dtype == tensor.dtype
    assert torch.equal(loaded[key], tensor)


def test_pt_with_views_of_a_shared_storage(torch, tmp_path):
  state = make_state()
  tensors = to_torch(torch, state)
  shared = torch.arange(40, dtype=torch.float32)
  tensors["features.0.1.bias"] = shared[5:7]
  tensors["features.0.1.weight"] = shared[1::30]
  tensors["classifier.0.weight"] = shared[:12].reshape(3, 4).T
  tensors["features.0.1.running_var"] = torch.ones(1).expand(2)
  torch.save(tensors, tmp_path / "a.pth")
  params = load(tmp_path / "a.pth")["params"]
  np.testing.assert_array_equal(params["block_0"]["bias"], [5, 6])
  np.testing.assert_array_equal(params["block_0"]["scale"], [1, 31])
  np.testing.assert_array_equal(
    params["head"]["kernel"], np.arange(12).reshape(3, 4)
  )
  np.testing.assert_array_equal(
    load(tmp_path / "a.pth")["batch_stats"]["block_0"]["var"], [1, 1]
  )


def test_pt_channels_last(torch, tmp_path):
  state = make_state(channels=3)
  tensors = {
    key: tensor.to(memory_format=torch.channels_last)
    if tensor.ndim == 4
    else tensor
    for key, tensor in to_torch(torch, state).items()
  }
  torch.save(tensors, tmp_path / "a.pt")
  variables = load(tmp_path / "a.pt")
  assert_same_bits(save(tmp_path / "b.safetensors", variables), state)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_pt_types(torch, tmp_path, name):
  tensors = {
    key: tensor.to(getattr(torch, name))
    if tensor.is_floating_point()
    else tensor
    for key, tensor in to_torch(torch, make_state()).items()
  }
  torch.save(tensors, tmp_path / "a.pt")
  kernel = load(tmp_path / "a.pt")["params"]["block_0"]["kernel"]
  assert kernel.dtype.name == {"float64": "float64"}.get(name, "float32")
  np.testing.assert_array_equal(
    np.asarray(kernel, np.float64).transpose(3, 2, 0, 1),
    tensors["features.0.0.weight"].double().numpy(),
  )


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_pt_wrapper_and_module_prefix(torch, tmp_path, key):
  state = make_state()
  tensors = {
    f"module.{name}": tensor for name, tensor in to_torch(torch, state).items()
  }
  wrapper = {"epoch": 3, key: tensors, "lr": 0.1, "dtype": torch.float32}
  torch.save(wrapper, tmp_path / "a.pt")
  variables = load(tmp_path / "a.pt")
  assert_same_bits(save(tmp_path / "b.safetensors", variables), state)


def test_torch_network_reads_what_is_saved(torch, tmp_path):
  layers = torch.nn.ModuleDict()
  blocks, inputs = [], 1
  for position in range(10):
    width = 2 if position < 2 else 3
    size = 1 if position == 9 else 3
    if position in (3, 7):
      blocks.append(torch.nn.Dropout())
      continue
    convolution = torch.nn.Conv2d(inputs, width, size, bias=False)
    blocks.append(torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(width)))
    inputs = width
  layers["features"] = torch.nn.Sequential(*blocks)
  layers["classifier"] = torch.nn.Sequential(torch.nn.Linear(inputs, 4))
  before = {key: x.clone() for key, x in layers.state_dict().items()}
  torch.save(layers.state_dict(), tmp_path / "a.pt")
  save(tmp_path / "b.safetensors", load(tmp_path / "a.pt"))
  loaded = pytest.importorskip("safetensors.torch").load_file(
    tmp_path / "b.safetensors"
  )
  with torch.no_grad():
    for parameter in layers.parameters():
      parameter.zero_()
  layers.load_state_dict(loaded, strict=True)
  for key, tensor in layers.state_dict().items():
    assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("is_new", [True, False])
def test_training_checkpoint(torch, tmp_path, is_new):
  state = make_state()
  checkpoint = {
    "state_dict": to_torch(torch, state),
    "optimizer": {
      "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2)}},
      "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
    },
    "scheduler": {"milestones": collections.Counter([3, 5])},
    "best": np.float64(0.5),
    "device": torch.device("cpu"),
    "generator": torch.get_rng_state(),
    "loss": torch.nn.CrossEntropyLoss(),
    "sparse": torch.eye(2).to_sparse(),
    "args": torch.Size([2]),
  }
  path = tmp_path / "a.pth.tar"
  torch.save(checkpoint, path, _use_new_zipfile_serialization=is_new)
  assert_same_bits(save(tmp_path / "b.safetensors", load(path)), state)


def test_a_scripted_network_is_named(torch, tmp_path):
  torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
  fails(lambda: load(tmp_path / "a.pt"), "TorchScript", "state_dict()")


def test_pt_of_a_whole_network_is_refused(torch, tmp_path):
  torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
  fails(
    lambda: load(tmp_path / "a.pt"),
    "path",
    "torch.nn.modules.linear.Linear",
    "state_dict",
  )


# Bad input.


def changed(**replaced):
  state = make_state()
  for key, array in replaced.items():
    if array is None:
      del state[key]
    else:
      state[key] = array
  return state


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    ({"classifier.0.bias": None}, ["missing classifier.0.bias"]),
    (
      {
        f"features.{i}.1.{name}": None
        for i in POSITIONS
        for name in ("bias", "weight")
      },
      ["missing features.0.1.weight, features.0.1.bias", "13 more"],
    ),
    ({"fc.bias": np.zeros(3)}, ["unexpected fc.bias"]),
    (
      {"features.0.0.weight": np.zeros((2, 1, 5, 5), np.float32)},
      ["features.0.0.weight has shape [2, 1, 5, 5]", "3, 3] is due"],
    ),
    (
      {"features.9.0.weight": np.zeros((3, 3, 3, 3), np.float32)},
      ["features.9.0.weight", "1, 1] is due"],
    ),
    (
      {"features.1.0.weight": np.zeros((2, 3, 3, 3), np.float32)},
      ["features.1.0.weight has shape [2, 3, 3, 3]", "2, 3, 3] is due"],
    ),
    (
      {"features.2.1.running_var": np.zeros(2, np.float32)},
      ["features.2.1.running_var has shape [2]", "[3]"],
    ),
    (
      {"classifier.0.weight": np.zeros((4, 2), np.float32)},
      ["classifier.0.weight has shape [4, 2]", "3] is due"],
    ),
    (
      {"classifier.0.bias": np.zeros(5, np.float32)},
      ["classifier.0.bias has shape [5]", "[4]"],
    ),
    (
      {"features.0.1.num_batches_tracked": np.zeros(1, np.int64)},
      ["features.0.1.num_batches_tracked has shape [1]", "[]"],
    ),
    (
      {"features.0.1.num_batches_tracked": np.array(2**31)},
      ["features.0.1.num_batches_tracked", "2147483648"],
    ),
    (
      {"features.0.1.num_batches_tracked": np.array(1.5)},
      ["features.0.1.num_batches_tracked", "float64"],
    ),
    (
      {"classifier.0.bias": np.zeros(4, np.int64)},
      ["classifier.0.bias is int64", "float32"],
    ),
    (
      {"classifier.0.bias": np.zeros(4, np.uint32)},
      ["classifier.0.bias is U32"],
    ),
  ],
)
def test_load_names_the_entry_that_is_wrong(tmp_path, change, parts):
  path = save_state(tmp_path / "a.safetensors", changed(**change))
  fails(lambda: load(path), "path", *parts)


@pytest.mark.parametrize(
  ("change", "part"),
  [
    (lambda v: v["params"].pop("head"), "missing params/head/kernel"),
    (lambda v: v.update(extra=np.zeros(3)), "unexpected extra"),
    (
      lambda v: v["params"]["block_0"].update(bias=np.zeros(5, np.float32)),
      "params/block_0/bias has shape [5]",
    ),
    (
      lambda v: v["params"]["block_0"].update(kernel=np.zeros(5, np.float32)),
      "params/block_0/kernel has shape [5]",
    ),
    (
      lambda v: v["batch_stats"]["block_0"].update(count=np.zeros((), "f4")),
      "batch_stats/block_0/count is float32",
    ),
    (
      lambda v: v["batch_stats"]["block_0"].update(count=np.int32(-1)),
      "batch_stats/block_0/count is -1",
    ),
    (
      lambda v: v["params"]["head"].update(bias=np.zeros(4, np.int32)),
      "params/head/bias is int32",
    ),
  ],
)
def test_save_names_the_entry_that_is_wrong(tmp_path, change, part):
  variables = load(save_state(tmp_path / "a.safetensors", make_state()))
  change(variables)
  fails(lambda: save(tmp_path / "b.safetensors", variables), "variables", part)
  assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_bad_paths_and_names(tmp_path):
  path = save_state(tmp_path / "a.safetensors", make_state())
  variables = load(path)
  fails(
    lambda: torch_weights.load(path, model_name="allcnn"),
    "model_name",
    "'allcnn'",
    "did you mean 'all_cnn'?",
  )
  fails(
    lambda: torch_weights.save(path, variables, model_name="vgg"),
    "model_name",
    "'vgg'",
  )
  fails(lambda: load(tmp_path / "no.safetensors"), "path", "no.safetensors")
  fails(lambda: load(tmp_path / "a.ckpt"), "path must be a file", "a.ckpt")
  fails(lambda: load(tmp_path), "path")
  fails(lambda: save(tmp_path / "a.pt", variables), "path", ".safetensors")
  fails(lambda: save(tmp_path / "no" / "a.safetensors", variables), "path")
  (tmp_path / "b.safetensors").write_bytes(b"\xff" * 100)
  fails(lambda: load(tmp_path / "b.safetensors"), "path", "safetensors file")
  (tmp_path / "c.pt").write_bytes(b"text")
  fails(lambda: load(tmp_path / "c.pt"), "path", "zip")


def test_save_replaces_whole_files_only(tmp_path, monkeypatch):
  path = save_state(tmp_path / "a.safetensors", make_state())
  before = path.read_bytes()
  variables = load(path)

  def fail(*_, **__):
    raise OSError("the disk is full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match=r"full.*a\.safetensors"):
    torch_weights.save(path, variables, model_name="all_cnn")
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_library_needs_no_torch():
  code = (
    "import sys; from psg_jax import torch_weights;"
    " sys.exit('torch' in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
