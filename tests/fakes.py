"""Networks with known answers, and small data sets."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pages import figures
from psg_jax import data, models, networks, torch_layouts, training, types


def linear_apply(variables, images):
  """Logits `flatten(x) @ kernel + bias`."""
  flat = images.reshape(len(images), -1)
  return flat @ variables["params"]["kernel"] + variables["params"]["bias"]


def linear_variables(kernel, bias=None):
  kernel = jnp.asarray(kernel, jnp.float32)
  bias = jnp.zeros(kernel.shape[1]) if bias is None else jnp.asarray(bias)
  return {"params": {"kernel": kernel, "bias": bias.astype(jnp.float32)}}


def linear_model(num_features, num_classes):
  """A linear classifier that takes no mask in training."""

  def init(key, images):
    del images
    kernel = 0.01 * jax.random.normal(key, (num_features, num_classes))
    return linear_variables(kernel)

  def apply_train(variables, images, key):
    del key
    return linear_apply(variables, images), variables

  def features(variables, images):
    del variables
    return images.reshape(len(images), -1)

  return types.Model(init, linear_apply, apply_train, features)


class _OneBlock(networks.Network):
  """One of the All-CNN's blocks in place of eight."""

  stride = 1

  def _backbone(self, hidden, mask, is_training):
    filters = networks.scaled(96, self.width)
    block = self._block(networks.ConvBlock)
    return block(filters, 3, self.stride, self.dtype, name="block_0")(
      hidden, mask, is_training
    )


def normalised_model():
  """Two dense layers with BatchNorm and a head, named as in `networks`."""
  sizes = {"block_0": (64, 6), "block_1": (6, 5), "head": (5, 3)}

  def init(key, images):
    del images
    params, stats = {}, {}
    for i, (name, (fan_in, size)) in enumerate(sizes.items()):
      draw = jax.random.normal(jax.random.fold_in(key, i), (fan_in, size))
      params[name] = {
        "kernel": draw / np.sqrt(fan_in),
        "bias": jnp.full(size, 0.1),
      }
      if name != "head":
        stats[name] = {"mean": jnp.zeros(size), "var": jnp.ones(size)}
    return {"params": params, "batch_stats": stats}

  def forward(variables, images, is_training):
    hidden = images.reshape(len(images), -1)
    moved = {}
    for name, stats in variables["batch_stats"].items():
      layer = variables["params"][name]
      hidden = hidden @ layer["kernel"]
      if is_training:
        used = {"mean": hidden.mean(0), "var": hidden.var(0)}
        moved[name] = jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, stats, used)
        stats = used
      hidden = (hidden - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-3)
      hidden = jax.nn.relu(hidden + layer["bias"])
    return hidden, moved

  def head(variables, hidden):
    layer = variables["params"]["head"]
    return hidden @ layer["kernel"] + layer["bias"]

  def apply(variables, images):
    return head(variables, forward(variables, images, False)[0])

  def apply_train(variables, images, key):
    del key
    hidden, moved = forward(variables, images, True)
    return head(variables, hidden), {**variables, "batch_stats": moved}

  def features(variables, images):
    return forward(variables, images, False)[0]

  return types.Model(init, apply, apply_train, features)


def layered(num_images, num_epochs):
  """A trained `normalised_model`, and blobs whose first class is to go."""
  model, key = normalised_model(), jax.random.key(0)
  dataset = blobs(num_images, size=8)
  variables, _ = training.fit(
    *(model, model.init(key, None), dataset, key),
    num_epochs=num_epochs,
    batch_size=16,
    show_progress=False,
  )
  return model, variables, split_class(dataset)


def spoiled(variables, names):
  """Variables whose layers of these names are others."""
  return {
    collection: {
      name: jax.tree.map(lambda x: x + 7, value) if name in names else value
      for name, value in tree.items()
    }
    for collection, tree in variables.items()
  }


def small_cnn(**options):
  """The library's convolution, BatchNorm and head, for an eighth of a compile.

  Takes the options of `models.create`.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.NETWORKS, "one_block", _OneBlock)
    return models.create("one_block", **options)


class _QuickCNN(_OneBlock):
  """One block and a linear layer of all its values: learns in a few steps."""

  stride = 4

  def _backbone(self, hidden, mask, is_training):
    hidden = super()._backbone(hidden, mask, is_training)
    return hidden.reshape(len(hidden), 1, 1, -1)


def _quick_layout():
  block = torch_layouts.conv_block(
    ("block_0",), "features.0.0", "features.0.1", ("channels", "block_0"), 3
  )
  head = torch_layouts.linear_head("classifier.0", "features")
  return torch_layouts.Layout((*block, *head), "classifier.0")


@contextlib.contextmanager
def quick_programs(data_dir, dataset="digits"):
  """Programs with a network that compiles quickly, and maps without t-SNE.

  `whole_network_test` runs a job with all of the All-CNN.

  Args:
    data_dir: Where data sets are kept.
    dataset: The set that the programs use, prepared here.
  """
  models.create_cached.cache_clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PSG_JAX_DATA", str(data_dir))
    patch.setitem(models.NETWORKS, "all_cnn", _QuickCNN)
    patch.setitem(torch_layouts.NETWORKS, "all_cnn", _quick_layout)
    patch.setattr(figures, "embed", lambda features: features[:, :2])
    data.load(dataset, "test")
    yield data_dir
  models.create_cached.cache_clear()


def blobs(num_images, *, num_classes=3, size=4, channels=1, seed=0):
  """Images whose class is the bright third of the rows; separable."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, num_classes, num_images)
  images = rng.integers(0, 100, (num_images, size, size, channels))
  which = np.arange(size * size).reshape(size, size) % num_classes
  bright = which[None, :, :, None] == labels[:, None, None, None]
  return types.Dataset(
    images=(images + 120 * bright).astype(np.uint8),
    labels=labels,
    class_names=tuple(f"class {i}" for i in range(num_classes)),
  )


def split_class(dataset, label=0):
  is_forget = dataset.labels == label
  return types.Split(dataset.take(is_forget), dataset.take(~is_forget))
