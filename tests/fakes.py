"""Networks with known answers, and small data sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import models, networks, types


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


class _OneBlock(networks._Network):
  """One of the All-CNN's blocks in place of eight."""

  def _backbone(self, hidden, mask, is_training):
    filters = networks._scaled(96, self.width)
    block = self._block(networks._ConvBlock)
    return block(filters, 3, 1, self.dtype, name="block_0")(
      hidden, mask, is_training
    )


def small_cnn(**options):
  """The library's convolution, BatchNorm and head, for an eighth of a compile.

  Takes the options of `models.create`.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models._NETWORKS, "one_block", _OneBlock)
    return models.create("one_block", **options)


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
