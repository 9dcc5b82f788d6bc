"""Tests of psg_jax.augment: known answers, Pillow's answers, and chance."""

import gzip
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn import datasets

from psg_jax import augment
from tests import tolerances

KEY = jax.random.key(0)
FASHION = pathlib.Path(
  "/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz"
)
# One of 256 levels, for pictures that Pillow rounds.
LEVEL = 1 / 255


@pytest.fixture(scope="module", params=["china", "flower"])
def photograph(request):
  """A real photograph, uint8 `[90, 128, 3]`: not square."""
  image = datasets.load_sample_image(f"{request.param}.jpg")
  return np.asarray(Image.fromarray(image).resize((128, 90)))


@pytest.fixture(scope="module")
def garments():
  if not FASHION.is_file():
    pytest.skip("Fashion-MNIST is not on this machine")
  with gzip.open(FASHION) as file:
    pixels = np.frombuffer(file.read(16 + 8 * 784), np.uint8)
  return pixels[16:].reshape(8, 28, 28, 1)


def to_float(image):
  return jnp.asarray(image, jnp.float32) / 255


def by_channel(image, pillow_fn):
  """Applies Pillow to float channels, which it does not round."""
  channels = [
    np.asarray(pillow_fn(Image.fromarray(channel)))
    for channel in np.moveaxis(np.asarray(to_float(image)), -1, 0)
  ]
  return np.stack(channels, axis=-1)


def crop_with_pillow(image, box):
  top, left, height, width = box
  corners = (left, top, left + width, top + height)
  return by_channel(
    image,
    lambda channel: channel.crop(corners).resize(
      channel.size, Image.Resampling.BILINEAR
    ),
  )


def rotate_with_pillow(image, degrees):
  return by_channel(
    image, lambda channel: channel.rotate(degrees, Image.Resampling.BILINEAR)
  )


# Known answers.


def test_rotation_by_right_angles_is_exact():
  image = jax.random.uniform(KEY, (5, 5, 3))
  for turns in range(-2, 4):
    rotated = augment.rotate_image(image, 90.0 * turns)
    # Sines of float32 angles are off by 1e-7 of a pixel or so.
    np.testing.assert_allclose(rotated, jnp.rot90(image, turns), atol=1e-5)


def test_a_rotation_blackens_corners_only():
  rotated = augment.rotate_image(jnp.ones((9, 9, 1)), 45.0)[..., 0]
  np.testing.assert_allclose(rotated[2:7, 2:7], 1, atol=1e-6)
  assert rotated[0, 0] == rotated[0, 8] == rotated[8, 0] == rotated[8, 8] == 0


def test_colours_known_answers():
  # Grey values 0.299 and 0.587, their mean 0.443.
  image = jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
  np.testing.assert_allclose(
    augment.adjust_brightness(image, 0.5), image / 2, atol=1e-7
  )
  assert float(augment.adjust_brightness(image, 3.0).max()) == 1
  np.testing.assert_allclose(
    augment.adjust_contrast(image, 0.0), np.full((1, 2, 3), 0.443), atol=1e-6
  )
  np.testing.assert_allclose(
    augment.adjust_saturation(image, 0.5),
    [[[0.6495, 0.1495, 0.1495], [0.2935, 0.7935, 0.2935]]],
    atol=1e-6,
  )
  grey = image[..., :1]
  np.testing.assert_array_equal(augment.adjust_saturation(grey, 0.0), grey)
  np.testing.assert_allclose(augment.adjust_contrast(grey, 0.0), 0.5, atol=1e-6)
  for adjust_fn in (
    augment.adjust_brightness,
    augment.adjust_contrast,
    augment.adjust_saturation,
  ):
    np.testing.assert_allclose(adjust_fn(image, 1.0), image, atol=1e-6)


def test_a_crop_known_answers():
  image = jax.random.uniform(KEY, (4, 6, 2))
  whole = augment.crop_and_resize(image, (0, 0, 4, 6))
  np.testing.assert_allclose(whole, image, atol=1e-6)
  point = augment.crop_and_resize(image, (2, 3, 1, 1))
  np.testing.assert_allclose(
    point, jnp.broadcast_to(image[2, 3], image.shape), atol=1e-6
  )
  ramp = jnp.arange(4.0).reshape(1, 4, 1)
  half = augment.crop_and_resize(ramp, (0, 1, 1, 2))
  np.testing.assert_allclose(half[0, :, 0], [1, 1.25, 1.75, 2], atol=1e-6)


# Pillow, on real pictures.


@pytest.mark.parametrize("degrees", [-15.0, -3.7, 0.0, 8.25, 15.0, 100.0])
def test_rotation_equals_pillow(photograph, degrees):
  rotated = augment.rotate_image(to_float(photograph), degrees)
  # Places are float32 here, float64 there: off by 1e-5 pixels.
  np.testing.assert_allclose(
    rotated, rotate_with_pillow(photograph, degrees), atol=5e-5
  )


@pytest.mark.parametrize(
  "box", [(0, 0, 90, 128), (3, 5, 80, 111), (10, 28, 80, 100), (0, 1, 89, 40)]
)
def test_crop_equals_pillow(photograph, box):
  cropped = augment.crop_and_resize(to_float(photograph), box)
  np.testing.assert_allclose(
    cropped, crop_with_pillow(photograph, box), atol=1e-5
  )
  # With `box`, Pillow also sees pixels around it: the inside is the same.
  top, left, height, width = box
  corners = (left, top, left + width, top + height)
  inside = by_channel(
    photograph,
    lambda channel: channel.resize(
      channel.size, Image.Resampling.BILINEAR, box=corners
    ),
  )
  np.testing.assert_allclose(cropped[3:-3, 3:-3], inside[3:-3, 3:-3], atol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 0.8, 1.0, 1.2, 2.0])
@pytest.mark.parametrize(
  ("adjust_fn", "enhancer"),
  [
    (augment.adjust_brightness, ImageEnhance.Brightness),
    (augment.adjust_contrast, ImageEnhance.Contrast),
    (augment.adjust_saturation, ImageEnhance.Color),
  ],
)
def test_colours_equal_pillow(photograph, adjust_fn, enhancer, factor):
  adjusted = adjust_fn(to_float(photograph), factor)
  expected = enhancer(Image.fromarray(photograph)).enhance(factor)
  # Pillow cuts the result to whole levels, and before that rounds the grey
  # image and its mean, which counts |1 - factor| times: half a level each.
  tolerance = LEVEL * (1 + abs(1 - factor)) + 1e-5
  np.testing.assert_allclose(adjusted, to_float(expected), atol=tolerance)


def test_garments_equal_pillow(garments):
  for image in garments:
    pixels = to_float(image)
    np.testing.assert_allclose(
      augment.rotate_image(pixels, 7.3),
      rotate_with_pillow(image, 7.3),
      atol=5e-5,
    )
    np.testing.assert_allclose(
      augment.crop_and_resize(pixels, (1, 2, 25, 24)),
      crop_with_pillow(image, (1, 2, 25, 24)),
      atol=1e-5,
    )
    contrast = ImageEnhance.Contrast(Image.fromarray(image[..., 0]))
    np.testing.assert_allclose(
      augment.adjust_contrast(pixels, 1.2)[..., 0],
      to_float(contrast.enhance(1.2)),
      atol=1.2 * LEVEL + 1e-5,
    )


# Chance.

FACTORIES = {
  "vertical_flip": augment.vertical_flip,
  "rotate": augment.rotate,
  "color_jitter": augment.color_jitter,
  "random_resized_crop": augment.random_resized_crop,
  "medical": augment.medical,
}


@pytest.fixture(params=FACTORIES)
def augment_fn(request):
  return FACTORIES[request.param]()


@pytest.mark.parametrize("num_channels", [1, 3])
def test_each_image_draws_for_itself(augment_fn, num_channels):
  augment_fn = jax.jit(augment_fn)
  image = jax.random.uniform(KEY, (1, 8, 10, num_channels))
  images = jnp.tile(image, (12, 1, 1, 1))
  first = augment_fn(KEY, images)
  chex.assert_equal_shape([images, first])
  assert first.dtype == images.dtype
  assert bool(jnp.all((first >= 0) & (first <= 1)))
  assert len(np.unique(np.asarray(first), axis=0)) > 1
  np.testing.assert_array_equal(first, augment_fn(KEY, images))
  other = augment_fn(jax.random.key(1), images)
  assert not np.array_equal(first, other)


@pytest.mark.slow
def test_compiled_once_and_the_same():
  augment_fn = augment.medical()
  images = jax.random.uniform(KEY, (4, 8, 8, 3))
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(keys):
    def step(images, key):
      return augment_fn(key, images), None

    return jax.lax.scan(step, images, keys)[0]

  for seed in range(2):
    keys = jax.random.split(jax.random.key(seed), 2)
    expected = images
    for key in keys:
      expected = augment_fn(key, expected)
    # Compiled together, sums are rounded otherwise.
    np.testing.assert_allclose(run(keys), expected, atol=2e-5)


def test_mapped_and_looped_are_the_same():
  images = jax.random.uniform(KEY, (3, 8, 8, 3))
  degrees = jnp.array([-9.0, 0.0, 12.0])
  np.testing.assert_allclose(
    augment.map_images(augment.rotate_image, images, degrees),
    jax.vmap(augment.rotate_image)(images, degrees),
    atol=1e-6,
  )


def test_the_same_arguments_give_the_same_function():
  assert augment.rotate() is augment.rotate(max_degrees=15)
  assert augment.color_jitter(0.1) is augment.color_jitter(brightness=0.1)
  assert augment.random_resized_crop() is augment.random_resized_crop(
    scale=[0.8, 1], ratio=(3 / 4, 4 / 3)
  )
  assert augment.medical() is augment.medical()
  assert augment.rotate(5) is not augment.rotate(6)


def test_medical_is_the_four_in_order():
  images = jax.random.uniform(KEY, (4, 8, 8, 3))
  expected = images
  parts = (
    augment.flip(),
    augment.rotate(15.0),
    augment.color_jitter(0.2, 0.2, 0.2),
    augment.random_resized_crop((0.8, 1.0), (3 / 4, 4 / 3)),
  )
  for part, key in zip(parts, jax.random.split(KEY, 4), strict=True):
    expected = part(key, expected)
  np.testing.assert_array_equal(augment.medical()(KEY, images), expected)


def test_vertical_flip_mirrors_half_of_the_images():
  images = jnp.tile(jnp.arange(3.0).reshape(1, 3, 1, 1) / 2, (200, 1, 1, 1))
  flipped = augment.vertical_flip()(KEY, images)
  is_flipped = np.all(flipped == images[:, ::-1], axis=(1, 2, 3))
  assert np.all(is_flipped | np.all(flipped == images, axis=(1, 2, 3)))
  # Six standard deviations of 200 draws.
  assert abs(is_flipped.mean() - 0.5) < 6 * 0.5 / 200**0.5


def test_angles_are_uniform():
  # A point far out on the right; its height tells the angle.
  size, radius = 201, 90
  image = np.zeros((size, size, 1), np.float32)
  image[98:103, 98 + radius : 103 + radius] = 1
  images = jnp.tile(jnp.asarray(image), (64, 1, 1, 1))
  rotated = np.asarray(augment.rotate(15.0)(KEY, images))[..., 0]
  places = np.arange(size) - 100
  mass = rotated.sum(axis=(1, 2))
  sine = -(rotated.sum(axis=2) @ places) / mass / radius
  degrees = np.rad2deg(np.arcsin(sine))
  # The blurred point's centre is good to a tenth of a pixel, 0.1 degrees.
  assert np.abs(degrees).max() < 15.1
  assert degrees.min() < -10
  assert degrees.max() > 10
  # Six standard errors of the mean of 64.
  assert abs(degrees.mean()) < 6 * 15 / 3**0.5 / 8


def test_factors_are_uniform_and_not_negative():
  images = jnp.full((500, 2, 2, 1), 0.25)
  bright = augment.color_jitter(2.0, 0.0, 0.0)(KEY, images)[:, 0, 0, 0] / 0.25
  # Uniform in [0, 3], not [-1, 3].
  assert float(bright.min()) < 0.1
  assert float((bright == 0).mean()) < 0.01
  assert 2.9 < float(bright.max()) <= 3
  assert abs(float(bright.mean()) - 1.5) < 6 * 3 / 12**0.5 / 500**0.5


@pytest.mark.parametrize("size", [(64, 64), (40, 64)])
def test_boxes_are_those_of_torchvision(size):
  height, width = size
  scale, ratio = (0.8, 1.0), (3 / 4, 4 / 3)
  boxes = np.asarray(
    augment.draw_boxes(KEY, (4000, height, width, 1), scale, ratio)
  )
  top, left, h, w = boxes.T
  assert top.min() >= 0
  assert left.min() >= 0
  assert np.all(top + h <= height)
  assert np.all(left + w <= width)
  # Sides are whole pixels: half a pixel each way.
  assert np.all((w + 0.5) / (h - 0.5) >= ratio[0])
  assert np.all((w - 0.5) / (h + 0.5) <= ratio[1])
  expected = _boxes_one_by_one(height, width, scale, ratio)
  for ours, theirs in zip(boxes.T, expected.T, strict=True):
    error = np.hypot(ours.std(), theirs.std()) / 4000**0.5
    # Where all are the same the error is 0, and only the pairwise sums round.
    rounding = tolerances.float32(12, float(np.abs(theirs).max()))
    assert abs(ours.mean() - theirs.mean()) < 6 * error + rounding
    np.testing.assert_allclose(
      np.quantile(ours, [0.1, 0.9]), np.quantile(theirs, [0.1, 0.9]), atol=2
    )


def _boxes_one_by_one(height, width, scale, ratio):
  """What torchvision's documentation says, in a loop."""
  rng = np.random.default_rng(0)
  boxes = []
  for _ in range(4000):
    for _ in range(10):
      area = height * width * rng.uniform(*scale)
      aspect = np.exp(rng.uniform(*np.log(ratio)))
      w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
      if 0 < w <= width and 0 < h <= height:
        box = rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
        break
    else:
      w = min(width, round(height * ratio[1]))
      box = 0, (width - w) // 2, height, w
    boxes.append(box)
  return np.array(boxes)


# Bad arguments.


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: augment.rotate(-1), "max_degrees .* got -1"),
    (lambda: augment.rotate(181), "max_degrees .* got 181"),
    (lambda: augment.rotate([1, 2]), r"max_degrees .* got \[1, 2\]"),
    (lambda: augment.rotate(float("nan")), "max_degrees .* got nan"),
    (lambda: augment.color_jitter(-0.1), "brightness .* got -0.1"),
    (lambda: augment.color_jitter(contrast="x"), "contrast .* got 'x'"),
    (lambda: augment.color_jitter(saturation=-2), "saturation .* got -2"),
    (lambda: augment.random_resized_crop((0, 1)), r"scale .* got \(0, 1\)"),
    (lambda: augment.random_resized_crop((0.5, 2)), r"scale .* got \(0.5, 2\)"),
    (lambda: augment.random_resized_crop(0.5), "scale .* got 0.5"),
    (
      lambda: augment.random_resized_crop(ratio=(2, 1)),
      r"ratio .* got \(2, 1\)",
    ),
    (
      lambda: augment.color_jitter()(KEY, jnp.zeros((1, 2, 2, 4))),
      "channels, got 4",
    ),
    (
      lambda: augment.crop_and_resize(jnp.zeros((4, 4, 1)), (1, 1, 4, 3)),
      r"box .* got \[1, 1, 4, 3\]",
    ),
    (
      lambda: augment.crop_and_resize(jnp.zeros((4, 4, 1)), (0, 0, 4)),
      r"box .* got \[0, 0, 4\]",
    ),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
