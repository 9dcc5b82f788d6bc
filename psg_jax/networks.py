"""The networks themselves, as Flax modules: what `models.create` builds from.

Images enter as `[B, H, W, C]` in [0, 1] and logits leave as `[B, K]`. Kernels,
normalisation constants and statistics, features and logits are float32 whatever
type the convolutions compute in.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from psg_jax import convolution

# PyTorch's constants and its default initialisation, within 1 / sqrt(fan_in):
# a third of LeCun's variance.
_MOMENTUM = 0.1
_EPSILON = 1e-5
_uniform_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# He et al. (2015) by the outputs, as torchvision initialises its ResNets.
_he_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

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
_RESNET_FILTERS = (64, 128, 256, 512)
_BOTTLENECK_EXPANSION = 4


def scaled(filters: int, width: float) -> int:
  """Returns the number of filters at a width, at least 1."""
  return max(1, int(filters * width))


def _shorten(array: jax.Array, dtype: str) -> jax.Array:
  """Casts to a short type to compute in; other types stay as they are."""
  return array if dtype == "float32" else array.astype(dtype)


def _widen(array: jax.Array) -> jax.Array:
  """Casts short types to float32; wider ones stay as they are."""
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


class ConvBlock(nn.Module):
  """Convolution without bias, batch normalisation, ReLU if `is_activated`.

  The normalisation has PyTorch's semantics: unlike Flax's own layer, the
  running variance is the unbiased one and the number of updates is kept, so
  that a PyTorch state dict survives a round trip. Rows that `mask` marks as
  padding leave the statistics alone.
  """

  num_filters: int
  kernel_size: int
  stride: int
  dtype: str
  is_activated: bool = True
  kernel_init: Callable[..., jax.Array] = _uniform_init

  @nn.compact
  def __call__(
    self, inputs: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    """Returns the activations; see `Network.__call__`."""
    filters, size = self.num_filters, self.kernel_size
    kernel = self.param(
      "kernel", self.kernel_init, (size, size, inputs.shape[-1], filters)
    )
    scale = self.param("scale", nn.initializers.ones, (filters,))
    bias = self.param("bias", nn.initializers.zeros, (filters,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (filters,))
    var = self.variable("batch_stats", "var", jnp.ones, (filters,))
    count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
    kernel = _shorten(kernel, self.dtype)
    outputs = convolution.conv2d(
      # Of other types where 64-bit ones are on.
      _shorten(inputs, self.dtype).astype(kernel.dtype),
      kernel,
      stride=self.stride,
      padding=size // 2,
    )
    outputs = _widen(outputs)
    used_mean, used_var = mean.value, var.value
    if is_training:
      used_mean, used_var, num_values = _moments(outputs, mask)
      # A channel with a single value has no unbiased variance.
      unbiased = used_var * num_values / jnp.maximum(num_values - 1, 1)
      mean.value = (1 - _MOMENTUM) * mean.value + _MOMENTUM * used_mean
      var.value = (1 - _MOMENTUM) * var.value + _MOMENTUM * unbiased
      count.value = count.value + 1
    outputs = _normalise(outputs, used_mean, used_var, scale, bias)
    outputs = nn.relu(outputs) if self.is_activated else outputs
    return _shorten(outputs, self.dtype)


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


class _Stem(nn.Module):
  """The first layers of a ResNet, which quarter the size of the images."""

  num_filters: int
  dtype: str

  @nn.compact
  def __call__(
    self, inputs: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    conv = functools.partial(_conv, self.dtype, mask, is_training)
    hidden = conv(inputs, self.num_filters, 7, 2, "conv1")
    return nn.max_pool(hidden, (3, 3), (2, 2), ((1, 1), (1, 1)))


class _BasicBlock(nn.Module):
  """Residual block of two 3x3 convolutions (ResNet-18)."""

  num_filters: int
  stride: int
  dtype: str

  @nn.compact
  def __call__(
    self, inputs: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    conv = functools.partial(_conv, self.dtype, mask, is_training)
    hidden = conv(inputs, self.num_filters, 3, self.stride, "conv1")
    hidden = conv(hidden, self.num_filters, 3, 1, "conv2", is_activated=False)
    return _add_shortcut(conv, inputs, hidden, self.stride)


class _Bottleneck(nn.Module):
  """Residual block of 1x1, 3x3 and 1x1 convolutions (ResNet-50).

  As in torchvision, and unlike in the paper, the 3x3 convolution takes the
  stride ("version 1.5").
  """

  num_filters: int
  stride: int
  dtype: str

  @nn.compact
  def __call__(
    self, inputs: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    conv = functools.partial(_conv, self.dtype, mask, is_training)
    hidden = conv(inputs, self.num_filters, 1, 1, "conv1")
    hidden = conv(hidden, self.num_filters, 3, self.stride, "conv2")
    num_outputs = _BOTTLENECK_EXPANSION * self.num_filters
    hidden = conv(hidden, num_outputs, 1, 1, "conv3", is_activated=False)
    return _add_shortcut(conv, inputs, hidden, self.stride)


def _conv(
  dtype: str,
  mask: jax.Array | None,
  is_training: bool,
  inputs: jax.Array,
  num_filters: int,
  kernel_size: int,
  stride: int,
  name: str,
  *,
  is_activated: bool = True,
) -> jax.Array:
  """A convolution block of a ResNet; belongs to the module that calls it."""
  block = ConvBlock(
    num_filters, kernel_size, stride, dtype, is_activated, _he_init, name=name
  )
  return block(inputs, mask, is_training)


def _add_shortcut(
  conv: Callable[..., jax.Array],
  inputs: jax.Array,
  hidden: jax.Array,
  stride: int,
) -> jax.Array:
  """Adds the block's inputs, projected where the shapes differ."""
  if stride != 1 or inputs.shape[-1] != hidden.shape[-1]:
    inputs = conv(
      inputs, hidden.shape[-1], 1, stride, "downsample", is_activated=False
    )
  return nn.relu(hidden + inputs)


class _Head(nn.Module):
  """Dropout and the linear classifier on top of the features."""

  num_classes: int
  dropout: float

  @nn.compact
  def __call__(self, features: jax.Array, is_training: bool) -> jax.Array:
    features = nn.Dropout(self.dropout, deterministic=not is_training)(features)
    fan_in = features.shape[-1]
    bound = 1 / math.sqrt(fan_in)

    def bias_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    kernel = self.param("kernel", _uniform_init, (fan_in, self.num_classes))
    return features @ kernel + self.param(
      "bias", bias_init, (self.num_classes,)
    )


class Network(nn.Module):
  """What the networks share: standardisation, pooling and the head.

  Attributes:
    num_classes: Number of classes `K`.
    width: Multiplies the number of filters.
    mean: Per channel, subtracted from the images.
    std: Per channel, divides what is left.
    dropout: Probability that an activation is dropped in training.
    dtype: Type of the convolutions, `"float32"` or `"bfloat16"`.
    is_rematerialised: Whether the backward pass computes the inside of each
      block anew instead of storing it.
  """

  num_classes: int
  width: float
  mean: tuple[float, ...]
  std: tuple[float, ...]
  dropout: float
  dtype: str
  is_rematerialised: bool

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_training: bool = False,
    features_only: bool = False,
  ) -> jax.Array:
    """Returns logits `[B, K]`, or features `[B, D]`, of images in [0, 1]."""
    hidden = (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    hidden = self._backbone(hidden, mask, is_training)
    features = _widen(hidden).mean((1, 2))
    if features_only:
      return features
    return self._head(features, is_training)

  def _backbone(
    self, hidden: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    raise NotImplementedError

  def _head(self, features: jax.Array, is_training: bool) -> jax.Array:
    return _Head(self.num_classes, self.dropout, name="head")(
      features, is_training
    )

  def _block(self, block_type: Any) -> Any:
    """The type of a block, rematerialised if asked for."""
    if not self.is_rematerialised:
      return block_type
    # Counted from `self`: `is_training`.
    return nn.remat(block_type, static_argnums=(3,))


class AllCNN(Network):
  """All-convolutional network (Springenberg et al., 2015) with BatchNorm.

  Dropout stands after the two convolutions with a stride, as in the paper.
  """

  def _backbone(
    self, hidden: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    block = self._block(ConvBlock)
    for i, (filters, kernel_size, stride) in enumerate(_ALL_CNN_BLOCKS):
      hidden = block(
        scaled(filters, self.width),
        kernel_size,
        stride,
        self.dtype,
        name=f"block_{i}",
      )(hidden, mask, is_training)
      if stride > 1:
        hidden = nn.Dropout(self.dropout, deterministic=not is_training)(hidden)
    return hidden

  def _head(self, features: jax.Array, is_training: bool) -> jax.Array:
    del is_training
    return _Head(self.num_classes, 0.0, name="head")(features, False)


class _ResNet(Network):
  """Residual network (He et al., 2016) in torchvision's form."""

  block_type: Any = _BasicBlock
  num_blocks: tuple[int, ...] = (2, 2, 2, 2)

  def _backbone(
    self, hidden: jax.Array, mask: jax.Array | None, is_training: bool
  ) -> jax.Array:
    stem = self._block(_Stem)
    hidden = stem(
      scaled(_RESNET_FILTERS[0], self.width), self.dtype, name="stem"
    )(hidden, mask, is_training)
    block = self._block(self.block_type)
    for i, num_blocks in enumerate(self.num_blocks):
      for j in range(num_blocks):
        hidden = block(
          scaled(_RESNET_FILTERS[i], self.width),
          2 if i > 0 and j == 0 else 1,
          self.dtype,
          name=f"layer{i + 1}_{j}",
        )(hidden, mask, is_training)
    return hidden


class ResNet18(_ResNet):
  """ResNet-18."""


class ResNet50(_ResNet):
  """ResNet-50, version 1.5."""

  block_type: Any = _Bottleneck
  num_blocks: tuple[int, ...] = (3, 4, 6, 3)
