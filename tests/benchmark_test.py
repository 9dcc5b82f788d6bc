"""The benchmark, and that its PyTorch side does the same work as ours."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments
from experiments import benchmark, benchmark_tasks, cli
from psg_jax import (
  batches,
  boundary,
  data,
  engine,
  models,
  steps,
  torch_weights,
  training,
)
from tests import fakes

KEY = jax.random.key(0)
MEAN = STD = 0.5


@pytest.fixture
def torch_loop():
  pytest.importorskip("torch", reason="PyTorch is a development extra")
  from experiments import torch_loop

  return torch_loop


def smooth_images(num_images, *, channels=1, seed=0):
  """Random uint8 images whose neighbouring pixels are alike."""
  shape = (num_images, 5, 5, channels)
  coarse = jax.random.uniform(jax.random.key(seed), shape)
  fine = jax.image.resize(coarse, (num_images, 32, 32, channels), "cubic")
  return np.asarray(255 * jnp.clip(fine, 0, 1)).astype(np.uint8)


@functools.cache
def varied_model(channels=1):
  """A small network that does not give all images the same class."""
  model = models.create(
    "all_cnn",
    num_classes=4,
    num_channels=channels,
    width=0.05,
    mean=MEAN,
    std=STD,
  )
  pixels = to_pixels(smooth_images(64, channels=channels, seed=1))
  variables = model.init(KEY, pixels)
  # Statistics of real activations, and logits around the same mean: at first
  # all images are nearly alike.
  for _ in range(30):
    _, variables = train_mode(model.apply_train, variables, pixels)
  head = variables["params"]["head"]
  centred = head["bias"] - model.apply(variables, pixels).mean(0)
  params = {**variables["params"], "head": {**head, "bias": centred}}
  return model, {**variables, "params": params}


@functools.partial(jax.jit, static_argnums=0)
def train_mode(apply_train, variables, pixels):
  return apply_train(variables, pixels, KEY)


def to_pixels(images):
  return training.to_float(jnp.asarray(images))


def exported(torch_loop, folder, variables, **options):
  path = folder / "weights.safetensors"
  torch_weights.save(path, variables, model_name="all_cnn")
  return torch_loop.load(path, **options)


def inputs_of(torch_loop, images, **options):
  standard = np.full(images.shape[-1], 0.5, np.float32)
  return torch_loop.to_inputs(images, mean=standard, std=standard, **options)


@pytest.mark.parametrize("is_channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_network_gives_the_same_logits(
  torch_loop, tmp_path, channels, is_channels_last
):
  model, variables = varied_model(channels)
  images = smooth_images(20, channels=channels)
  options = {"is_channels_last": is_channels_last}
  network = exported(torch_loop, tmp_path, variables, **options)
  inputs = inputs_of(torch_loop, images, **options)
  # An output channel has one place in memory after the other in one layout.
  assert inputs.stride(1) == (1 if is_channels_last else 32 * 32)
  np.testing.assert_allclose(
    torch_loop.predict(network, inputs),
    model.apply(variables, to_pixels(images)),
    atol=1e-4,
  )


@pytest.mark.parametrize("channels", [1, 3])
def test_search_reaches_the_same_labels(torch_loop, tmp_path, channels):
  model, variables = varied_model(channels)
  images = smooth_images(200, channels=channels)
  pixels = to_pixels(images)
  labels = np.asarray(model.apply(variables, pixels).argmax(-1), np.int32)
  ours = boundary.released_code_search(
    model.apply, variables, pixels, labels, KEY, model_mean=MEAN, model_std=STD
  )
  theirs = torch_loop.search(
    torch_loop.freeze(exported(torch_loop, tmp_path, variables)),
    inputs_of(torch_loop, images),
    torch_loop.to_integers(labels),
    batch_size=64,
  )
  # A gradient near 0 may differ in sign, and an image lie on the boundary.
  assert np.mean(theirs == np.asarray(ours.labels)) >= 0.99
  assert np.mean(theirs != labels) > 0.05
  assert len(np.unique(theirs)) > 1


def test_update_gives_the_same_weights(torch_loop, tmp_path):
  model, variables = varied_model()
  images = smooth_images(50)
  labels = np.arange(50, dtype=np.int32) % 4
  network = exported(torch_loop, tmp_path, variables)
  sgd = {"learning_rate": 1e-3, "momentum": 0.9, "weight_decay": 1e-2}
  optimizer = training.sgd(**sgd)
  rows = np.resize(np.arange(50, dtype=np.int32), (4, 16))
  # The last minibatch has 2 images.
  is_real = np.arange(64).reshape(4, 16) < 50
  weights = is_real / is_real.sum(1, keepdims=True)
  plan = batches.Plan(
    rows, weights.astype(np.float32), np.zeros(rows.shape, bool)
  )
  loss_fn = steps.mean_cross_entropy
  state, _ = engine.run_phase(
    steps.Program(model=model, optimizer=optimizer, loss_fn=loss_fn),
    training.init_state(variables, optimizer, KEY),
    batches.resident_pool(images, labels),
    engine.Phase(loss_fn, plan),
  )
  minibatches = [
    torch_loop.to_integers(row[real])
    for row, real in zip(rows, is_real, strict=True)
  ]
  trained = torch_loop.train(
    network,
    inputs_of(torch_loop, images),
    torch_loop.to_integers(labels),
    minibatches,
    **sgd,
  )
  before, after = (net.state_dict() for net in (network, trained))
  path = tmp_path / "ours.safetensors"
  torch_weights.save(path, state.variables, model_name="all_cnn")
  ours = torch_loop.load(path).state_dict()
  assert ours.keys() == after.keys()
  for name, value in after.items():
    # Four steps of float32 sums in another order; the weights move 1e-3.
    np.testing.assert_allclose(
      ours[name].numpy(), value.numpy(), atol=2e-5, rtol=1e-4, err_msg=name
    )
  kernel = "features.4.0.weight"
  assert np.abs((after[kernel] - before[kernel]).numpy()).max() > 2e-4


def test_unlearning_is_training_on_the_labels_found(torch_loop, tmp_path):
  _, variables = varied_model()
  inputs = inputs_of(torch_loop, smooth_images(20))
  labels = torch_loop.to_integers(np.zeros(20))
  network = exported(torch_loop, tmp_path, variables)
  before = {name: x.clone() for name, x in network.state_dict().items()}
  unlearned = torch_loop.unlearn(
    network,
    inputs,
    labels,
    learning_rate=1e-3,
    num_epochs=2,
    batch_size=8,
    seed=3,
  )
  found = torch_loop.search(
    torch_loop.freeze(network), inputs, labels, batch_size=8
  )
  batches = [
    rows
    for epoch in range(2)
    for rows in torch_loop.shuffle(20, 8, seed=3 + epoch)
  ]
  trained = torch_loop.train(
    network,
    inputs,
    torch_loop.to_integers(found),
    batches,
    learning_rate=1e-3,
    momentum=0.9,
    weight_decay=0.0,
  )
  for name, value in unlearned.state_dict().items():
    # The same operations, but sums may be cut differently over threads.
    np.testing.assert_allclose(
      value.numpy(), trained.state_dict()[name].numpy(), atol=1e-5, rtol=1e-4
    )
    np.testing.assert_array_equal(network.state_dict()[name], before[name])


@pytest.fixture
def synthetic(monkeypatch):
  """Stands for the prepared data: 3 classes of 60 images."""
  dataset = fakes.blobs(60, size=32)
  monkeypatch.setattr(data, "load", lambda name, split, *, data_dir: dataset)


def call(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
  cli.run(benchmark.main)


SMALL = [
  "--num_train=50",
  "--num_forget=10",
  "--width=0.05",
  "--batch_size=8",
  "--num_passes=2",
  "--train_steps=2",
  "--rounds=1",
]


@pytest.mark.slow
def test_benchmark_writes_what_it_measured(
  torch_loop, synthetic, monkeypatch, tmp_path, capsys
):
  output, profile = tmp_path / "result.json", tmp_path / "trace"
  call(monkeypatch, *SMALL, f"--output={output}", f"--profile={profile}")
  result = json.loads(output.read_text())
  assert result["num_forget"] == 10
  assert result["num_train_steps"] == 2
  assert result["versions"]["jax"] == jax.__version__
  assert result["versions"]["torch"] == torch_loop.version()
  assert result["num_threads"] >= 1
  timings = result["timings"]
  assert list(timings)[:5] == [
    "job",
    "search",
    "search_multi_step",
    "update",
    "epoch",
  ]
  for name, row in timings.items():
    assert row["psg_jax"]["minimum"] > 0
    assert (row["pytorch"] is None) == (name == "search_multi_step")
    if row["pytorch"] is not None:
      ratio = row["pytorch"]["median"] / row["psg_jax"]["median"]
      np.testing.assert_allclose(row["ratio"], ratio)
  # Ten images, of which rounding may put one on the other side.
  assert all(share >= 0.9 for share in result["agreement"].values())
  printed = capsys.readouterr().out
  assert "The training epoch is scaled from 2 of its 7 steps" in printed
  assert list(profile.rglob("*.xplane.pb"))


def test_measure_counts_all_rounds_but_the_first():
  calls = []
  tasks = [
    benchmark_tasks.Task("a", "a", lambda: calls.append("ours"), None),
    benchmark_tasks.Task(
      "b", "b", lambda: "ours", lambda: calls.append("theirs"), scale=1e6
    ),
  ]
  timings, outputs = benchmark.measure(tasks, 3)
  assert calls == ["ours", "theirs"] * 4
  assert timings["a"]["pytorch"] is None
  assert timings["a"]["ratio"] is None
  assert len(timings["b"]["pytorch"]["seconds"]) == 3
  assert outputs["b", "psg_jax"] == "ours"
  # A call takes far less than a second and more than a nanosecond.
  assert timings["b"]["psg_jax"]["minimum"] > 1e-3
  assert timings["a"]["psg_jax"]["median"] < 1


class NoTorch:
  """Finds no PyTorch; a None in `sys.modules` would halt tyro's look at it."""

  @staticmethod
  def find_spec(name, path=None, target=None):
    del path, target
    if name == "torch":
      raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_without_pytorch_there_is_one_line(monkeypatch, capsys):
  monkeypatch.delitem(sys.modules, "torch", raising=False)
  monkeypatch.setattr(sys, "meta_path", [NoTorch, *sys.meta_path])
  monkeypatch.delitem(sys.modules, "experiments.torch_loop", raising=False)
  monkeypatch.delattr(experiments, "torch_loop", raising=False)
  with pytest.raises(SystemExit) as caught:
    call(monkeypatch)
  assert caught.value.code == 2
  error = capsys.readouterr().err
  assert error == (
    "error: benchmark needs PyTorch: install the extra `torch`\n"
  )


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--rounds=0", "rounds must be an integer of at least 1, got 0"),
    ("--train_steps=0", "train_steps must be an integer of at least 1"),
    ("--width=0", "width must be finite, positive, got 0"),
    ("--dataset=digit", "did you mean 'digits'"),
    ("--output=result.txt", "output must be a .json file"),
    ("--output=none/result.json", "in an existing folder"),
  ],
)
def test_bad_options(monkeypatch, capsys, argument, message):
  with pytest.raises(SystemExit) as caught:
    call(monkeypatch, argument)
  assert caught.value.code == 2
  assert message in capsys.readouterr().err


def test_weights_of_another_width(
  torch_loop, synthetic, monkeypatch, tmp_path, capsys
):
  _, variables = varied_model()
  path = tmp_path / "weights.safetensors"
  torch_weights.save(path, variables, model_name="all_cnn")
  with pytest.raises(SystemExit):
    call(monkeypatch, *SMALL, f"--weights={path}", "--width=0.1")
  assert "weights must be those of all_cnn at width 0.1" in (
    capsys.readouterr().err
  )
