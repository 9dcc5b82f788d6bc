"""Networks, as bundles of pure functions.

Flax stays inside this module and `networks`: everything else sees a
`types.Model`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import checks, data, networks, types

NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "all_cnn": networks.AllCNN,
  "resnet18": networks.ResNet18,
  "resnet50": networks.ResNet50,
}
_DTYPES = ("float32", "bfloat16")


def names() -> tuple[str, ...]:
  """Returns the names that `create` knows."""
  return tuple(NETWORKS)


def create(
  name: str,
  *,
  like: types.Dataset | None = None,
  num_classes: int | None = None,
  num_channels: int | None = None,
  width: float = 1.0,
  mean: float | Sequence[float] | None = None,
  std: float | Sequence[float] | None = None,
  dropout: float = 0.0,
  dtype: str = "float32",
  is_rematerialised: bool = False,
) -> types.Model:
  """Builds a network.

  The same arguments give the same functions, so that programs compiled for one
  are found again for the other.

  Args:
    name: `"all_cnn"`: eight convolutions of 96 and 192 filters.
      `"resnet18"`, `"resnet50"`: residual networks of 18 and 50 layers in
      torchvision's form (the bottleneck's 3x3 convolution takes the stride, He
      initialisation by fan-out). All end in global average pooling and a linear
      head, and take images of 32 pixels or more.
    like: Images that the network is for, whose classes, channels, mean and
      standard deviation hold where others are not given.
    num_classes: Number of classes `K`, 2 or more.
    num_channels: Number of image channels `C`; 3 where nothing says otherwise.
    width: Multiplies the number of filters, positive.
    mean: Per channel or one for all, in [0, 1] pixel units: the network
      computes on `(images - mean) / std`.
    std: As `mean`, positive. Both are given, or neither.
    dropout: Probability in [0, 1) that `apply_train` drops an activation, by
      its key: before the linear head of a ResNet, after the convolutions with
      a stride of the All-CNN.
    dtype: Type that the convolutions compute in, `"float32"` or `"bfloat16"`.
      Parameters, normalisation and its statistics, features and logits are
      float32 in either case.
    is_rematerialised: Whether a gradient computes the inside of each block
      anew: the same values from fewer stored activations, in more time. For
      accelerators: XLA's CPU compiler merges the two computations in part and
      needs no less memory.

  Returns:
    The network's functions, on images in [0, 1].

  Raises:
    ValueError: If the name is unknown or an argument is out of its range.

  References:
    Springenberg et al., Striving for Simplicity: The All Convolutional Net,
    2015. He et al., Deep Residual Learning for Image Recognition, 2016.
  """
  checks.one_of("name", name, NETWORKS)
  if like is not None:
    num_classes = like.num_classes if num_classes is None else num_classes
    if num_channels is None:
      num_channels = like.images.shape[-1]
    if mean is None and std is None:
      mean, std = data.mean_and_std(like)
  num_channels = 3 if num_channels is None else num_channels
  if num_classes is None or mean is None or std is None:
    raise ValueError(
      "num_classes, mean and std must be given, or like, got"
      f" {num_classes}, {mean} and {std}"
    )
  checks.integer("num_classes", num_classes, at_least=2)
  checks.integer("num_channels", num_channels, at_least=1)
  checks.number("width", width, above=0)
  checks.number("dropout", dropout, at_least=0)
  if dropout >= 1:
    raise ValueError(f"dropout must be below 1, got {dropout}")
  checks.one_of("dtype", dtype, _DTYPES)
  channel_mean = _per_channel("mean", mean, num_channels)
  channel_std = _per_channel("std", std, num_channels)
  if min(channel_std) <= 0:
    raise ValueError(f"std must be positive, got {std}")
  return create_cached(
    name,
    num_channels,
    num_classes=num_classes,
    width=float(width),
    mean=channel_mean,
    std=channel_std,
    dropout=float(dropout),
    dtype=dtype,
    is_rematerialised=bool(is_rematerialised),
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
def create_cached(name: str, num_channels: int, **options: Any) -> types.Model:
  """Builds a network of checked options, the same object each time."""
  network = NETWORKS[name](**options)
  has_dropout = options["dropout"] > 0

  def check(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != num_channels:
      raise ValueError(
        f"images must be [B, H, W, {num_channels}], got {list(images.shape)}"
      )

  # Random numbers for each kernel are long to compile and run once.
  quick_init = jax.jit(
    network.init, compiler_options={"xla_backend_optimization_level": 0}
  )

  def init(key: jax.Array, images: jax.Array) -> types.Variables:
    check(images)
    # Options are for whole programs, not for a part of somebody else's.
    if isinstance(key, jax.core.Tracer) or isinstance(images, jax.core.Tracer):
      return network.init(key, images)
    return quick_init(key, images)

  def apply(variables: types.Variables, images: jax.Array) -> jax.Array:
    check(images)
    return jnp.asarray(network.apply(variables, images))

  def apply_train(
    variables: types.Variables,
    images: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, types.Variables]:
    check(images)
    logits, updated = network.apply(
      variables,
      images,
      mask,
      is_training=True,
      mutable=["batch_stats"],
      rngs={"dropout": key} if has_dropout else None,
    )
    return logits, {**variables, **updated}

  def features(variables: types.Variables, images: jax.Array) -> jax.Array:
    check(images)
    return jnp.asarray(network.apply(variables, images, features_only=True))

  return types.Model(init, apply, apply_train, features)
