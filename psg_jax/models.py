"""Networks, as bundles of pure functions.

Flax stays inside this module: everything else sees a `types.Model`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import checks, convolution, types

# PyTorch's constants and default initialisation: weights and the head's bias
# are uniform within 1 / sqrt(fan_in), a third of LeCun's variance.
_MOMENTUM = 0.1
_EPSILON = 1e-5
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Filters (as a multiple of the full width), kernel size and stride.
_ALL_CNN_BLOCKS = (
  (96, 3, 1),
  (96, 3, 1),
  (192, 3, 2),
  (192, 3, 1),
  (192, 3, 1),
  (192, 3, 2),
  (192, 3, 1),
  (192, 1, 1),
)


class _ConvBlock(nn.Module):
  """Convolution without bias, batch normalisation, ReLU.

  The normalisation has PyTorch's semantics: unlike Flax's own layer, the
  running variance is the unbiased one and the number of updates is kept, so
  that a PyTorch state dict survives a round trip. Rows that `mask` marks as
  padding leave the statistics alone.
  """

  num_filters: int
  kernel_size: int
  stride: int

  @nn.compact
  def __call__(
    self, inputs: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    filters, size = self.num_filters, self.kernel_size
    kernel = self.param(
      "kernel", _kernel_init, (size, size, inputs.shape[-1], filters)
    )
    scale = self.param("scale", nn.initializers.ones, (filters,))
    bias = self.param("bias", nn.initializers.zeros, (filters,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (filters,))
    var = self.variable("batch_stats", "var", jnp.ones, (filters,))
    count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
    outputs = convolution.conv2d(
      inputs, kernel, stride=self.stride, padding=size // 2
    )
    if not is_training:
      return nn.relu(_normalise(outputs, mean.value, var.value, scale, bias))
    batch_mean, batch_var, num_values = _moments(outputs, mask)
    # A channel with a single value has no unbiased variance.
    unbiased = batch_var * num_values / jnp.maximum(num_values - 1, 1)
    mean.value = (1 - _MOMENTUM) * mean.value + _MOMENTUM * batch_mean
    var.value = (1 - _MOMENTUM) * var.value + _MOMENTUM * unbiased
    count.value = count.value + 1
    return nn.relu(_normalise(outputs, batch_mean, batch_var, scale, bias))


def _moments(
  inputs: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mean, biased variance and count per channel, over rows set in `mask`."""
  batch_size, height, width, _ = inputs.shape
  weights = jnp.ones((batch_size, 1, 1, 1), inputs.dtype)
  if mask is not None:
    weights = mask.astype(inputs.dtype)[:, None, None, None]
  num_values = jnp.maximum(weights.sum(), 1) * (height * width)
  mean = (inputs * weights).sum((0, 1, 2)) / num_values
  var = (jnp.square(inputs - mean) * weights).sum((0, 1, 2)) / num_values
  return mean, var, num_values


def _normalise(
  inputs: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
) -> jax.Array:
  slope = scale * jax.lax.rsqrt(var + _EPSILON)
  return inputs * slope + (bias - mean * slope)


class _Head(nn.Module):
  """The linear classifier on top of the features."""

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    fan_in = features.shape[-1]
    bound = 1 / math.sqrt(fan_in)

    def bias_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    kernel = self.param("kernel", _kernel_init, (fan_in, self.num_classes))
    return features @ kernel + self.param(
      "bias", bias_init, (self.num_classes,)
    )


class _AllCNN(nn.Module):
  """All-convolutional network (Springenberg et al., 2015) with BatchNorm."""

  num_classes: int
  width: float
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_training: bool = False,
    features_only: bool = False,
  ) -> jax.Array:
    hidden = (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    for i, (filters, kernel_size, stride) in enumerate(_ALL_CNN_BLOCKS):
      hidden = _ConvBlock(
        max(1, int(filters * self.width)),
        kernel_size,
        stride,
        name=f"block_{i}",
      )(hidden, mask, is_training)
    features = hidden.mean((1, 2))
    if features_only:
      return features
    return _Head(self.num_classes, name="head")(features)


_NETWORKS: dict[str, Callable[..., nn.Module]] = {"all_cnn": _AllCNN}


def names() -> tuple[str, ...]:
  """Returns the names that `create` knows."""
  return tuple(_NETWORKS)


def create(
  name: str,
  *,
  num_classes: int,
  num_channels: int = 3,
  width: float = 1.0,
  mean: float | Sequence[float],
  std: float | Sequence[float],
) -> types.Model:
  """Builds a network.

  The same arguments give the same functions, so that programs compiled for one
  are found again for the other.

  Args:
    name: `"all_cnn"`: eight convolutions of 96 and 192 filters, global average
      pooling, a linear head; for images of 32 pixels or more.
    num_classes: Number of classes `K`, 2 or more.
    num_channels: Number of image channels `C`.
    width: Multiplies the number of filters, positive.
    mean: Per channel or one for all, in [0, 1] pixel units: the network
      computes on `(images - mean) / std`.
    std: As `mean`, positive.

  Returns:
    The network's functions, on images in [0, 1].

  Raises:
    ValueError: If the name is unknown or an argument is out of its range.

  References:
    Springenberg et al., Striving for Simplicity: The All Convolutional Net,
    2015.
  """
  checks.one_of("name", name, _NETWORKS)
  checks.integer("num_classes", num_classes, at_least=2)
  checks.integer("num_channels", num_channels, at_least=1)
  checks.number("width", width, above=0)
  channel_mean = _per_channel("mean", mean, num_channels)
  channel_std = _per_channel("std", std, num_channels)
  if min(channel_std) <= 0:
    raise ValueError(f"std must be positive, got {std}")
  return _create(
    name, num_classes, num_channels, float(width), channel_mean, channel_std
  )


def _per_channel(
  name: str, values: float | Sequence[float], num_channels: int
) -> tuple[float, ...]:
  checks.number(name, values)
  channels = tuple(float(value) for value in np.ravel(values))
  if len(channels) == 1:
    channels = channels * num_channels
  if len(channels) != num_channels:
    raise ValueError(
      f"{name} must be finite, one value or {num_channels}, got {values}"
    )
  return channels


@functools.lru_cache(maxsize=128)
def _create(
  name: str,
  num_classes: int,
  num_channels: int,
  width: float,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> types.Model:
  network = _NETWORKS[name](num_classes, width, mean, std)

  def check(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != num_channels:
      raise ValueError(
        f"images must be [B, H, W, {num_channels}], got {list(images.shape)}"
      )

  @jax.jit
  def init(key: jax.Array, images: jax.Array) -> types.Variables:
    check(images)
    return network.init(key, images)

  def apply(variables: types.Variables, images: jax.Array) -> jax.Array:
    check(images)
    return jnp.asarray(network.apply(variables, images))

  def apply_train(
    variables: types.Variables,
    images: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, types.Variables]:
    del key  # No dropout in this network.
    check(images)
    logits, updated = network.apply(
      variables, images, mask, is_training=True, mutable=["batch_stats"]
    )
    return logits, {**variables, **updated}

  def features(variables: types.Variables, images: jax.Array) -> jax.Array:
    check(images)
    return jnp.asarray(network.apply(variables, images, features_only=True))

  return types.Model(init, apply, apply_train, features)
