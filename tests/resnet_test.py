"""Tests of the ResNets against PyTorch, in torchvision's layout."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import models, torch_weights, types

KEY = jax.random.key(0)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
NUM_ROWS = 4
SMALL = {"num_classes": 16, "width": 1 / 32, "mean": 0.5, "std": 0.25}


def compiled(fn, *args):
  """Compiles for once: less time goes into it, more into running."""
  options = {"xla_backend_optimization_level": 0}
  return jax.jit(fn).lower(*args).compile(options)


def make_network(torch, name, num_classes, width=1.0):
  """A ResNet as torchvision lays it out, written down anew."""
  nn = torch.nn
  is_bottleneck = name == "resnet50"

  def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

  class Block(nn.Module):
    def __init__(self, inputs, filters, stride):
      super().__init__()
      if is_bottleneck:
        convs = (
          conv(inputs, filters, 1),
          conv(filters, filters, 3, stride),
          conv(filters, 4 * filters, 1),
        )
      else:
        convs = conv(inputs, filters, 3, stride), conv(filters, filters, 3)
      self.num_convs = len(convs)
      for i, layer in enumerate(convs, 1):
        setattr(self, f"conv{i}", layer)
        setattr(self, f"bn{i}", nn.BatchNorm2d(layer.out_channels))
      outputs = convs[-1].out_channels
      self.downsample = None
      if stride != 1 or inputs != outputs:
        self.downsample = nn.Sequential(
          conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
        )

    def forward(self, x):
      hidden = x
      for i in range(1, self.num_convs + 1):
        hidden = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(hidden))
        hidden = torch.relu(hidden) if i < self.num_convs else hidden
      return torch.relu(hidden + (self.downsample or nn.Identity())(x))

  class ResNet(nn.Module):
    def __init__(self):
      super().__init__()
      inputs = int(64 * width)
      self.conv1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False)
      self.bn1 = nn.BatchNorm2d(inputs)
      for i, number in enumerate((3, 4, 6, 3) if is_bottleneck else [2] * 4):
        filters, blocks = int(64 * 2**i * width), []
        for j in range(number):
          blocks.append(Block(inputs, filters, 2 if i and not j else 1))
          inputs = filters * (4 if is_bottleneck else 1)
        setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
      self.fc = nn.Linear(inputs, num_classes)
      for layer in self.modules():
        if isinstance(layer, nn.Conv2d):
          nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def features(self, x):
      hidden = torch.relu(self.bn1(self.conv1(x)))
      hidden = nn.functional.max_pool2d(hidden, 3, 2, 1)
      for i in range(1, 5):
        hidden = getattr(self, f"layer{i}")(hidden)
      return hidden.mean((2, 3))

    def forward(self, x):
      return self.fc(self.features(x))

  return ResNet()


def randomise(torch, network, images):
  """Gives a network statistics of real activations, and then shakes them.

  Without them the activations of fifty random layers overflow.
  """
  norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
  with torch.no_grad():
    for norm in norms:
      norm.weight.uniform_(0.2, 0.8)
      norm.bias.normal_(0, 0.1)
      norm.momentum = None
    network.train()(images)
    for norm in norms:
      norm.momentum = 0.1
      norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
      norm.running_var.mul_(0.8 + 0.4 * torch.rand_like(norm.running_var))
      norm.num_batches_tracked.fill_(7)


def to_torch(torch, images):
  standard = (images - np.array(MEAN)) / np.array(STD)
  return torch.tensor(standard.transpose(0, 3, 1, 2), dtype=torch.float32)


class Case(NamedTuple):
  """What both sides make of the same weights and images."""

  logits: Any
  features: Any
  train_logits: Any
  train_variables: Any


def run_flax(name, variables, images):
  """One program for everything, with two rows of padding in training."""
  model = models.create(name, num_classes=5, mean=MEAN, std=STD)
  padded = jnp.concatenate([images, jnp.full_like(images[:2], 1e3)])
  mask = jnp.arange(len(padded)) < len(images)

  def run(variables):
    logits, updated = model.apply_train(variables, padded, KEY, mask)
    return Case(
      model.apply(variables, images),
      model.features(variables, images),
      logits[: len(images)],
      updated,
    )

  return compiled(run, variables)(variables)


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def both(request, tmp_path_factory):
  torch = pytest.importorskip("torch", reason="PyTorch is a development extra")
  torch.manual_seed(0)
  name = request.param
  folder = tmp_path_factory.mktemp(name)
  rng = np.random.default_rng(0)
  images = rng.random((NUM_ROWS, 64, 64, 3), np.float32)
  inputs = to_torch(torch, images)
  network = make_network(torch, name, 5)
  randomise(torch, network, inputs)
  torch.save(network.state_dict(), folder / "a.pt")
  variables = torch_weights.load(folder / "a.pt", model_name=name)
  given = run_flax(name, variables, jnp.asarray(images))
  with torch.no_grad():
    logits = network.eval()(inputs)
    features = network.features(inputs)
    train_logits = network.train()(inputs)
  torch.save(network.state_dict(), folder / "b.pt")
  updated = torch_weights.load(folder / "b.pt", model_name=name)
  return given, Case(
    logits.numpy(), features.numpy(), train_logits.numpy(), updated
  )


def test_inference_equals_pytorch(both):
  given, expected = both
  assert np.ptp(expected.logits) > 0.1
  np.testing.assert_allclose(given.logits, expected.logits, rtol=0, atol=1e-4)
  # Float32 sums in another order, through up to fifty layers.
  np.testing.assert_allclose(
    given.features,
    expected.features,
    rtol=0,
    atol=1e-4 * expected.features.max(),
  )


def test_training_equals_pytorch_and_ignores_padding(both):
  given, expected = both
  # The last layers normalise by 16 values a channel, which magnifies roundings.
  np.testing.assert_allclose(
    given.train_logits, expected.train_logits, rtol=0, atol=1e-3
  )
  assert jax.tree.structure(given.train_variables) == jax.tree.structure(
    expected.train_variables
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    given.train_variables,
    expected.train_variables,
  )
  assert given.train_variables["batch_stats"]["stem"]["conv1"]["count"] == 8


@pytest.mark.parametrize(
  ("name", "expected"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)]
)
def test_number_of_parameters_is_torchvisions(name, expected):
  model = models.create(name, num_classes=1000, mean=0.5, std=0.25)
  shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))
  sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])]
  assert sum(sizes) == expected


@pytest.mark.parametrize(
  "name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("size", [32, 45])
def test_any_input_size(name, size):
  model = models.create(name, **SMALL)
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  variables = jax.eval_shape(model.init, KEY, images)
  num_features = 16 if name == "resnet18" else 64
  assert jax.eval_shape(model.apply, variables, images).shape == (2, 16)
  assert jax.eval_shape(model.features, variables, images).shape == (
    2,
    num_features,
  )


# One small network for all that follows.


@pytest.fixture(scope="module")
def images() -> jax.Array:
  return jax.random.uniform(KEY, (8, 32, 32, 3))


@pytest.fixture(scope="module")
def variables(images: jax.Array) -> types.Variables:
  """Random values of a good size; compiling `init` would take longer."""
  model = models.create("resnet18", **SMALL)
  rng = np.random.default_rng(0)

  def make(path, leaf):
    name = path[-1].key
    if name == "kernel":
      size = np.prod(leaf.shape[:-2]) * leaf.shape[-1]
      values = rng.normal(size=leaf.shape) * np.sqrt(2 / size)
    else:
      values = np.full(leaf.shape, name in ("scale", "var"))
    return jnp.asarray(values, leaf.dtype)

  shapes = jax.eval_shape(model.init, KEY, images)
  return jax.tree_util.tree_map_with_path(make, dict(shapes))


def train_step(model, images):
  """Loss, updated variables and gradients with respect to the parameters."""

  def loss(params, variables):
    logits, updated = model.apply_train(
      {**variables, "params": params}, images, KEY
    )
    return jnp.square(logits).mean(), updated

  def step(variables):
    return jax.value_and_grad(loss, has_aux=True)(
      variables["params"], variables
    )

  return step


def test_initial_values_are_torchvisions(images):
  model = models.create("resnet18", **SMALL)

  def init(key):
    params = model.init(key, images)["params"]
    block = params["layer4_0"]
    # The rest is never computed.
    return block["conv1"]["kernel"], block["conv2"], params["head"]["kernel"]

  *convs, head = compiled(init, KEY)(KEY)
  # By the outputs: 2 / (3 * 3 * 16); 1,152 and 2,304 values.
  std = np.sqrt(2 / (9 * 16))
  for kernel in (convs[0], convs[1]["kernel"]):
    np.testing.assert_allclose(kernel.std(), std, rtol=0.1)
    # A normal distribution, neither uniform nor cut off.
    assert np.abs(kernel).max() > 2.5 * std
  np.testing.assert_array_equal(convs[1]["scale"], 1)
  bound = 1 / np.sqrt(16)
  assert 0.9 * bound < np.abs(head).max() <= bound


@pytest.mark.slow
def test_rematerialised_step_is_equal(images, variables):
  def run(is_rematerialised):
    model = models.create(
      "resnet18", **SMALL, is_rematerialised=is_rematerialised
    )
    return compiled(train_step(model, images), variables)(variables)

  # The same operations, fused in another way.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    run(True),
    run(False),
  )


@pytest.mark.parametrize(
  "name", ["all_cnn", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_rematerialisation_stores_less(name):
  def count_residuals(is_rematerialised):
    model = models.create(name, **SMALL, is_rematerialised=is_rematerialised)
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, images)

    def residuals(variables, images):
      _, vjp_fn = jax.vjp(
        lambda params: model.apply_train(
          {**variables, "params": params}, images, KEY
        )[0],
        variables["params"],
      )
      return vjp_fn

    kept = jax.eval_shape(residuals, variables, images)
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(kept))

  assert count_residuals(True) < 0.5 * count_residuals(False)


@pytest.mark.slow
def test_bfloat16_is_close_and_keeps_float32(images, variables):
  plain = models.create("resnet18", **SMALL)
  model = models.create("resnet18", **SMALL, dtype="bfloat16")
  made = jax.eval_shape(model.init, KEY, images)
  (_, updated), gradients = jax.eval_shape(train_step(model, images), variables)
  assert jax.tree.map(jnp.dtype, dict(made)) == jax.tree.map(
    jnp.dtype, variables
  )
  assert jax.tree.map(jnp.dtype, dict(updated)) == jax.tree.map(
    jnp.dtype, variables
  )
  assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("f4")}

  def forward(model):
    return compiled(
      lambda variables: (
        model.apply(variables, images),
        model.apply_train(variables, images, KEY)[1]["batch_stats"],
      ),
      variables,
    )(variables)

  (logits, stats), (plain_logits, plain_stats) = forward(model), forward(plain)
  # Eight bits of mantissa, through eighteen layers.
  scale = np.abs(plain_logits).max()
  np.testing.assert_allclose(logits, plain_logits, rtol=0, atol=0.03 * scale)
  assert np.abs(logits - plain_logits).max() > 1e-5 * scale
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.05),
    stats,
    plain_stats,
  )


@pytest.mark.parametrize(
  "name", ["all_cnn", pytest.param("resnet50", marks=pytest.mark.slow)]
)
def test_bfloat16_reaches_every_convolution(name):
  model = models.create(name, **SMALL, dtype="bfloat16")
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, KEY, images)
  for fn in (model.apply, model.features):
    assert jax.eval_shape(fn, variables, images).dtype == jnp.float32
  program = jax.jit(model.apply).lower(variables, images).as_text()
  lines = [x for x in program.splitlines() if "stablehlo.convolution" in x]
  assert lines
  assert all("bf16" in line and "f32" not in line for line in lines)


def test_dropout_before_the_head(images, variables):
  # The head of this network returns its inputs.
  head = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
  variables = {**variables, "params": {**variables["params"], "head": head}}
  plain = models.create("resnet18", **SMALL)
  model = models.create("resnet18", **SMALL, dropout=0.25)
  keys = jax.random.split(KEY, 500)

  def run(variables):
    logits = jax.vmap(lambda key: model.apply_train(variables, images, key)[0])(
      keys
    )
    expected = plain.apply_train(variables, images, KEY)[0]
    inference = model.apply(variables, images), plain.apply(variables, images)
    return logits, expected, inference

  logits, expected, inference = compiled(run, variables)(variables)
  is_kept = np.asarray(logits != 0)
  scaled = np.broadcast_to(expected / 0.75, logits.shape)
  np.testing.assert_allclose(logits[is_kept], scaled[is_kept], rtol=1e-4)
  is_alive = np.asarray(expected > 0)
  share = is_kept[:, is_alive].mean(0)
  # Five standard deviations of 500 draws, for each of up to 128 features.
  np.testing.assert_allclose(share, 0.75, atol=5 * np.sqrt(0.75 * 0.25 / 500))
  assert (is_kept[0] != is_kept[1]).any()
  np.testing.assert_allclose(*inference, atol=1e-5)
