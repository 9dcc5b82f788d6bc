"""Augmentation on the device: pure functions `(key, images) -> images`.

Images are float `[B, H, W, C]` in [0, 1]; each image draws for itself. The
functions are found again for the same arguments, so that a program compiled
with one is not compiled anew.

The parts without chance (`rotate_image`, `adjust_*`, `crop_and_resize`) take
one image `[H, W, C]`, are compiled, and may be mapped and differentiated. They
give what Pillow gives; chance is drawn as torchvision draws it. dm-pix (JAX) is
not used for them: its brightness is added where torchvision's is multiplied,
its contrast takes each channel's mean rather than that of the grey image, its
saturation works on HSV, it has no resized crop, and its rotation blackens the
outer half pixel and took fifty times as long on a CPU (version 0.4.5).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import checks

AugmentFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]

# ITU-R 601 luma, the weights of Pillow's and torchvision's grey images.
_LUMA = (0.299, 0.587, 0.114)
# As often as torchvision draws a crop before it takes the middle.
_NUM_TRIES = 10
# Accelerators would round the pixels of a product to 11 bits.
_PRECISION = jax.lax.Precision.HIGHEST


@functools.lru_cache
def _bound(augment: Callable[..., jax.Array], *options: Any) -> AugmentFn:
  """Gives a function its options; the same ones make the same function."""
  return functools.partial(augment, *options)


def flip() -> AugmentFn:
  """Mirrors each image left to right with probability 1/2."""
  return _bound(_flip, 2)


def vertical_flip() -> AugmentFn:
  """Mirrors each image top to bottom with probability 1/2."""
  return _bound(_flip, 1)


def _flip(axis: int, key: jax.Array, images: jax.Array) -> jax.Array:
  is_flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
  return jnp.where(is_flipped, jnp.flip(images, axis), images)


def crop(padding: int) -> AugmentFn:
  """Pads with black and cuts each image out again at a random place.

  Args:
    padding: Pixels added on each side, positive.

  Raises:
    ValueError: If the padding is not a positive integer.
  """
  checks.integer("padding", padding, at_least=1)
  return _bound(_crop, int(padding))


def _crop(padding: int, key: jax.Array, images: jax.Array) -> jax.Array:
  batch_size, *shape = images.shape
  margin = (padding, padding)
  padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
  corners = jax.random.randint(key, (batch_size, 2), 0, 2 * padding + 1)

  def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

  return jax.vmap(cut)(padded, corners)


def rotate(max_degrees: float = 15.0) -> AugmentFn:
  """Rotates each image by a uniform angle; what comes from outside is black.

  As torchvision's `RandomRotation`, but bilinear: its default, the nearest
  pixel, makes steps of lines.

  Args:
    max_degrees: The largest angle in either direction, in [0, 180].

  Raises:
    ValueError: If it is not a number in this range.
  """
  return _bound(_rotate, _number("max_degrees", max_degrees, at_most=180))


def _rotate(max_degrees: float, key: jax.Array, images: jax.Array) -> jax.Array:
  degrees = jax.random.uniform(
    key, (len(images),), minval=-max_degrees, maxval=max_degrees
  )
  return map_images(rotate_image, images, degrees)


def color_jitter(
  brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2
) -> AugmentFn:
  """Changes brightness, contrast and saturation of each image, in this order.

  As torchvision's `ColorJitter` without hue, but in a fixed order where
  torchvision shuffles it: on a device all orders would have to be computed.

  Args:
    brightness: Its factor is uniform in [1 - x, 1 + x], at least 0.
    contrast: The same for `adjust_contrast`.
    saturation: The same for `adjust_saturation`; grey images stay as they are.

  Raises:
    ValueError: If an argument is not a number of at least 0; on use, if the
      images have neither 1 nor 3 channels.
  """
  spreads = (
    _number("brightness", brightness),
    _number("contrast", contrast),
    _number("saturation", saturation),
  )
  return _bound(_color_jitter, spreads)


def _color_jitter(
  spreads: tuple[float, ...], key: jax.Array, images: jax.Array
) -> jax.Array:
  adjust_fns = (adjust_brightness, adjust_contrast, adjust_saturation)
  keys = jax.random.split(key, len(spreads))
  for spread, adjust_fn, part_key in zip(
    spreads, adjust_fns, keys, strict=True
  ):
    factors = jax.random.uniform(
      part_key, (len(images),), minval=max(0.0, 1 - spread), maxval=1 + spread
    )
    images = jax.vmap(adjust_fn)(images, factors)
  return images


def random_resized_crop(
  scale: Sequence[float] = (0.8, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> AugmentFn:
  """Cuts a random part out of each image and brings it to the image's size.

  As torchvision's `RandomResizedCrop` of the images' own size: area uniform,
  ratio of width to height log-uniform, whole pixels; what does not fit is drawn
  anew, at most ten times, and then it is the middle of the image.

  Args:
    scale: Smallest and largest part of the image's area, in (0, 1].
    ratio: Smallest and largest ratio of width to height, positive.

  Raises:
    ValueError: If an argument is not two ascending numbers in its range.
  """
  limits = _interval("scale", scale, at_most=1), _interval("ratio", ratio)
  return _bound(_random_resized_crop, *limits)


def _random_resized_crop(
  scale: tuple[float, float],
  ratio: tuple[float, float],
  key: jax.Array,
  images: jax.Array,
) -> jax.Array:
  boxes = draw_boxes(key, images.shape, scale, ratio)
  return map_images(_crop_and_resize, images, boxes)


def chain(*augment_fns: AugmentFn) -> AugmentFn:
  """Applies one after the other, each with a key of its own."""
  return _bound(_chain, augment_fns)


def _chain(
  augment_fns: tuple[AugmentFn, ...], key: jax.Array, images: jax.Array
) -> jax.Array:
  keys = jax.random.split(key, len(augment_fns))
  for augment_fn, part_key in zip(augment_fns, keys, strict=True):
    images = augment_fn(part_key, images)
  return images


def medical() -> AugmentFn:
  """The paper's chain for medical images.

  Flip left to right, rotation of up to 15 degrees, colour jitter of 0.2, and a
  resized crop of at least 0.8 of the area.
  """
  return chain(flip(), rotate(), color_jitter(), random_resized_crop())


# On one image, without chance.


@jax.jit
def rotate_image(image: jax.Array, degrees: jax.Array | float) -> jax.Array:
  """Rotates an image counter-clockwise about its centre, bilinearly.

  As Pillow's `Image.rotate`: a pixel whose origin lies outside of the image is
  black, and the outer half pixel takes the value at the edge.

  Args:
    image: `[H, W, C]` float.
    degrees: The angle, a scalar.

  Returns:
    `[H, W, C]`.
  """
  height, width, num_channels = image.shape
  angle = jnp.deg2rad(degrees)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  y = (jnp.arange(height) - (height - 1) / 2)[:, None]
  x = (jnp.arange(width) - (width - 1) / 2)[None, :]
  rows = sin * x + cos * y + (height - 1) / 2
  columns = cos * x - sin * y + (width - 1) / 2
  is_inside = (rows >= -0.5) & (rows < height - 0.5)
  is_inside &= (columns >= -0.5) & (columns < width - 0.5)
  row_sides = _neighbours(rows, height)
  column_sides = _neighbours(columns, width)
  pixels = image.reshape(-1, num_channels)
  rotated = jnp.zeros(image.shape, image.dtype)
  for row, row_weight in row_sides:
    for column, column_weight in column_sides:
      values = pixels.at[row * width + column].get(mode="promise_in_bounds")
      rotated += (row_weight * column_weight)[..., None] * values
  return jnp.where(is_inside[..., None], rotated, 0)


@jax.jit
def adjust_brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Returns `clip(factor * image)`; 0 is black, 1 the image.

  Args:
    image: `[H, W, C]` float in [0, 1].
    factor: A scalar, at least 0.

  Returns:
    `[H, W, C]` in [0, 1].
  """
  return jnp.clip(factor * image, 0, 1)


@jax.jit
def adjust_contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Returns `clip(factor * image + (1 - factor) * mean(grey(image)))`.

  Pillow rounds the mean to one of 256 levels, torchvision does not, nor do we.

  Args:
    image: `[H, W, C]` float in [0, 1], 1 or 3 channels.
    factor: A scalar, at least 0; 0 is plain grey, 1 the image.

  Returns:
    `[H, W, C]` in [0, 1].

  Raises:
    ValueError: If there are neither 1 nor 3 channels.
  """
  mean = _grey(image).mean()
  return jnp.clip(factor * image + (1 - factor) * mean, 0, 1)


@jax.jit
def adjust_saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Returns `clip(factor * image + (1 - factor) * grey(image))`.

  Args:
    image: `[H, W, C]` float in [0, 1], 1 or 3 channels.
    factor: A scalar, at least 0; 0 is the grey image, 1 the image itself.

  Returns:
    `[H, W, C]` in [0, 1]; with one channel the image itself.

  Raises:
    ValueError: If there are neither 1 nor 3 channels.
  """
  grey = _grey(image)
  if image.shape[-1] == 1:
    return image
  return jnp.clip(factor * image + (1 - factor) * grey, 0, 1)


def crop_and_resize(
  image: jax.Array, box: jax.Array | Sequence[int]
) -> jax.Array:
  """Cuts a box out and brings it to the image's size, bilinearly.

  As Pillow's `image.crop(box).resize(image.size, BILINEAR)`: nothing outside of
  the box is seen. A crop is only ever enlarged, so antialiasing, which Pillow
  has and plain bilinear resizing lacks, makes no difference.

  Args:
    image: `[H, W, C]` float.
    box: Top, left, height and width in whole pixels, `[4]`.

  Returns:
    `[H, W, C]`.

  Raises:
    ValueError: If the box is known and does not lie within the image.
  """
  box = jnp.asarray(box)
  if not checks.is_traced(box):
    is_good = box.shape == (4,)
    if is_good:
      top, left, *size = np.asarray(box).tolist()
      ends = (top + size[0], left + size[1])
      is_good = min(top, left) >= 0 and min(size) >= 1
      is_good &= ends[0] <= image.shape[0] and ends[1] <= image.shape[1]
    if not is_good:
      raise ValueError(
        "box must be top, left, height and width within"
        f" {image.shape[0]} x {image.shape[1]} pixels, got {box.tolist()}"
      )
  return _crop_and_resize(image, box)


@jax.jit
def _crop_and_resize(image: jax.Array, box: jax.Array) -> jax.Array:
  # Rows by reading two of each, columns by a product: looped over on a CPU, one
  # and a half to two times as fast as two products.
  rows = _stretch(box[0], box[2], image.shape[0])
  columns = _stretch(box[1], box[3], image.shape[1])
  resized = jnp.zeros(image.shape, image.dtype)
  for index, weight in _neighbours(rows, image.shape[0]):
    resized += weight[:, None, None] * image[index]
  places = jnp.arange(image.shape[1])
  weights = jnp.maximum(0, 1 - jnp.abs(columns[:, None] - places))
  return jnp.einsum("xw,ywc->yxc", weights, resized, precision=_PRECISION)


def _stretch(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
  """Where the `size` pixels of a stretched part of a line come from."""
  origins = start + (jnp.arange(size) + 0.5) * length / size - 0.5
  return jnp.clip(origins, start, start + length - 1)


@functools.partial(jax.jit, static_argnums=0)
def map_images(
  image_fn: Callable[..., jax.Array], images: jax.Array, values: jax.Array
) -> jax.Array:
  """Applies a function to each image with its value.

  XLA for CPUs computes what it can fuse anew for each reader, as a rotation
  for each channel of the grey image after it. A loop is never fused: on two
  cores, looping over the rotation alone made `medical` 3 to 6 times as fast.
  """
  return jax.lax.platform_dependent(
    images,
    values,
    cpu=lambda *rows: jax.lax.map(lambda row: image_fn(*row), rows),
    default=jax.vmap(image_fn),
  )


def _neighbours(
  places: jax.Array, size: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """The pixels before and after each place, and their weights."""
  before = jnp.floor(places)
  weight = places - before
  index = before.astype(jnp.int32)
  return (
    (jnp.clip(index, 0, size - 1), 1 - weight),
    (jnp.clip(index + 1, 0, size - 1), weight),
  )


def _grey(image: jax.Array) -> jax.Array:
  """The grey image, `[H, W, 1]`."""
  num_channels = image.shape[-1]
  if num_channels == 1:
    return image
  if num_channels != 3:
    raise ValueError(f"images must have 1 or 3 channels, got {num_channels}")
  grey = jnp.dot(image, jnp.array(_LUMA, image.dtype), precision=_PRECISION)
  return grey[..., None]


@functools.partial(jax.jit, static_argnames=("shape", "scale", "ratio"))
def draw_boxes(
  key: jax.Array,
  shape: tuple[int, ...],
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> jax.Array:
  """Draws top, left, height and width for each image, int32 `[B, 4]`."""
  batch_size, height, width, _ = shape
  keys = jax.random.split(key, 3)
  tries = (batch_size, _NUM_TRIES)
  low, high = (math.log(value) for value in ratio)
  aspect = jnp.exp(jax.random.uniform(keys[0], tries, minval=low, maxval=high))
  area = (height * width) * jax.random.uniform(
    keys[1], tries, minval=scale[0], maxval=scale[1]
  )
  sizes = jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)], axis=-1)
  sizes = jnp.round(sizes).astype(jnp.int32)
  limits = jnp.array([height, width])
  fits = jnp.all((sizes > 0) & (sizes <= limits), axis=-1)
  first = jnp.argmax(fits, axis=1)
  size = jnp.take_along_axis(sizes, first[:, None, None], axis=1)[:, 0]
  corner = jnp.floor(
    jax.random.uniform(keys[2], (batch_size, 2)) * (limits - size + 1)
  ).astype(jnp.int32)
  middle = _middle_box(height, width, ratio)
  drawn = jnp.concatenate([corner, size], axis=1)
  return jnp.where(fits.any(axis=1)[:, None], drawn, jnp.array(middle))


def _middle_box(
  height: int, width: int, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
  """The largest box in the middle whose ratio is allowed."""
  size = (height, width)
  if width / height < ratio[0]:
    size = (round(width / ratio[0]), width)
  elif width / height > ratio[1]:
    size = (height, round(height * ratio[1]))
  return (height - size[0]) // 2, (width - size[1]) // 2, *size


def _number(name: str, value: float, *, at_most: float | None = None) -> float:
  checks.number(name, value, at_least=0, at_most=at_most)
  if np.ndim(value):
    raise ValueError(f"{name} must be one number, got {value!r}")
  return float(value)


def _interval(
  name: str, value: Sequence[float], *, at_most: float | None = None
) -> tuple[float, float]:
  checks.number(name, value, above=0, at_most=at_most)
  if np.shape(value) != (2,) or value[0] > value[1]:
    raise ValueError(f"{name} must be two ascending numbers, got {value!r}")
  return float(value[0]), float(value[1])
