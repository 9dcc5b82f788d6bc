"""Augmentation on the device: pure functions `(key, images) -> images`.

Images are float `[B, H, W, C]` in [0, 1]; each image draws for itself. The
functions are found again for the same arguments, so that a program compiled
with one is not compiled anew.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from psg_jax import checks

AugmentFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


@functools.lru_cache
def flip() -> AugmentFn:
  """Mirrors each image left to right with probability 1/2."""

  def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    is_flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(is_flipped, images[:, :, ::-1], images)

  return augment


@functools.lru_cache
def crop(padding: int) -> AugmentFn:
  """Pads with black and cuts each image out again at a random place.

  Args:
    padding: Pixels added on each side, positive.

  Raises:
    ValueError: If the padding is not a positive integer.
  """
  checks.integer("padding", padding, at_least=1)

  def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    batch_size, *shape = images.shape
    margin = (padding, padding)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
    corners = jax.random.randint(key, (batch_size, 2), 0, 2 * padding + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    return jax.vmap(cut)(padded, corners)

  return augment


@functools.lru_cache
def chain(*augment_fns: AugmentFn) -> AugmentFn:
  """Applies one after the other, each with a key of its own."""

  def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    for each, augment_fn in zip(
      jax.random.split(key, len(augment_fns)), augment_fns, strict=True
    ):
      images = augment_fn(each, images)
    return images

  return augment
