import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import boundary, models, torch_weights
from tests import fakes, tolerances

KEY = jax.random.key(0)


def two_classes(num_pixels, margin, slope=1.0):
  """`z_0 - z_1 = margin` at 0.5 grey, falling by `slope` a pixel unit."""
  kernel = np.zeros((num_pixels, 2))
  kernel[:, 1] = slope
  bias = np.array([margin + 0.5 * slope * num_pixels, 0.0])
  return fakes.linear_variables(kernel, bias)


def one_search(margin):
  """Arguments of a search from one grey image between two classes."""
  return (
    fakes.linear_apply,
    two_classes(16, margin=margin),
    grey(1),
    zeros(1),
    KEY,
  )


def grey(batch_size, size=4, channels=1):
  return jnp.full((batch_size, size, size, channels), 0.5)


def one_nan(batch_size):
  """So many values that XLA's minimum may drop the one that is NaN."""
  return grey(batch_size, size=16).at[0, 5, 5].set(np.nan)


def zeros(batch_size):
  return jnp.zeros(batch_size, jnp.int32)


def test_linear_classifier_is_crossed_at_closed_form_distance():
  # The L-infinity distance to a hyperplane is margin / ||w||_1.
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(16, 2))
  images = jnp.asarray(rng.uniform(0.4, 0.6, (20, 4, 4, 1)), jnp.float32)
  variables = fakes.linear_variables(kernel)
  logits = np.asarray(fakes.linear_apply(variables, images))
  labels = logits.argmax(1)
  margin = np.abs(logits[:, 0] - logits[:, 1])
  expected = margin / np.abs(kernel[:, 0] - kernel[:, 1]).sum()
  step = 1e-3
  output = boundary.search(
    fakes.linear_apply,
    variables,
    images,
    jnp.asarray(labels),
    KEY,
    num_steps=1000,
    step_size=step,
  )
  assert output.is_crossed.all()
  np.testing.assert_array_equal(output.labels, 1 - labels)
  # Whole steps, the first that crosses; 1e-5 for float32 sums of steps.
  excess = np.asarray(output.distance) - expected
  assert excess.min() >= -1e-5
  assert excess.max() <= step + 1e-5
  np.testing.assert_allclose(
    output.distance, np.asarray(output.num_steps) * step, atol=1e-5
  )
  np.testing.assert_allclose(
    output.logits, fakes.linear_apply(variables, output.images), atol=1e-5
  )


def test_nearest_of_several_classes_is_found():
  # Class 2 is nearer than class 1 by the closed form: 0.1 against 0.2.
  kernel = np.stack([np.ones(16), -np.ones(16), np.ones(16)], 1)
  kernel[:8, 2] = -1.0
  bias = np.array([0.0, 16 - 0.4 * 16, 8 - 0.1 * 16])
  variables = fakes.linear_variables(kernel, bias)
  output = boundary.search(
    fakes.linear_apply,
    variables,
    grey(1),
    zeros(1),
    KEY,
    num_steps=100,
    step_size=0.01,
  )
  assert output.is_crossed.all()
  np.testing.assert_array_equal(output.labels, [2])


def test_certain_model_still_moves():
  # p_y is exactly 1 in float32 and the loss's gradient exactly 0.
  variables = two_classes(16, margin=1600.0, slope=1000.0)
  output = boundary.search(
    fakes.linear_apply,
    variables,
    grey(1),
    zeros(1),
    KEY,
    num_steps=20,
    step_size=0.02,
  )
  assert output.is_crossed.all()
  np.testing.assert_allclose(output.distance, 0.1, atol=0.0201)


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_weights_that_are_traced_change_nothing(weight):
  variables = two_classes(16, margin=1600.0, slope=1000.0)

  def search(distance_weight):
    return boundary.search(
      fakes.linear_apply,
      variables,
      grey(1),
      zeros(1),
      KEY,
      num_steps=20,
      step_size=0.02,
      distance_weight=distance_weight,
    )

  known, traced = search(weight), jax.jit(search)(weight)
  chex.assert_trees_all_close(known, traced, atol=1e-6)
  if not weight:
    assert known.is_crossed.all()


def test_network_of_nan_crosses_nothing():
  variables = jax.tree.map(lambda x: x * np.nan, two_classes(16, margin=1.0))
  output = boundary.search(
    fakes.linear_apply,
    variables,
    grey(2),
    jnp.array([0, 1]),
    KEY,
    num_steps=3,
    step_size=0.1,
  )
  assert not output.is_crossed.any()


def test_image_already_across_takes_no_step():
  output = boundary.search(
    fakes.linear_apply,
    two_classes(16, margin=-1.0),
    grey(2),
    zeros(2),
    KEY,
    num_steps=5,
    step_size=0.1,
  )
  assert output.is_crossed.all()
  np.testing.assert_array_equal(output.num_steps, 0)
  np.testing.assert_array_equal(output.distance, 0)
  np.testing.assert_array_equal(output.images, grey(2))


def test_where_nothing_is_crossed_the_runner_up_is_the_label():
  kernel = np.zeros((16, 3))
  variables = fakes.linear_variables(kernel, [3.0, 1.0, 2.0])
  output = boundary.search(
    fakes.linear_apply,
    variables,
    grey(2),
    zeros(2),
    KEY,
    num_steps=3,
    step_size=0.1,
  )
  assert not output.is_crossed.any()
  np.testing.assert_array_equal(output.labels, 2)
  np.testing.assert_array_equal(output.num_steps, 3)


def test_loop_ends_when_all_are_done():
  # A billion steps would never end.
  output = boundary.search(
    fakes.linear_apply,
    two_classes(16, margin=1.6),
    grey(3),
    zeros(3),
    KEY,
    num_steps=10**9,
    step_size=0.03,
  )
  np.testing.assert_array_equal(output.num_steps, 4)


@pytest.fixture(scope="module")
def nonlinear():
  """A small network on random images, of which some are hard to move."""
  rng = np.random.default_rng(1)
  first = jnp.asarray(rng.normal(size=(48, 32)), jnp.float32)
  second = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)

  def apply_fn(variables, images):
    hidden = jnp.tanh(images.reshape(len(images), -1) @ variables["first"])
    return hidden @ variables["second"]

  images = jnp.asarray(rng.uniform(0, 1, (24, 4, 4, 3)), jnp.float32)
  variables = {"first": first, "second": second}
  labels = jnp.argmax(apply_fn(variables, images), -1)
  return apply_fn, variables, images, labels


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("noise", sorted(boundary.NOISES))
def test_points_stay_in_the_ball_and_in_the_range(nonlinear, norm, noise):
  apply_fn, variables, images, labels = nonlinear
  radius = {"linf": 0.03, "l2": 0.1}[norm]
  output = boundary.search(
    apply_fn,
    variables,
    images,
    labels,
    KEY,
    num_steps=12,
    step_size=0.02,
    max_distance=radius,
    norm=norm,
    distance_weight=0.1,
    noise_scale=0.5,
    noise=noise,
  )
  delta = np.asarray(output.images - images).reshape(len(images), -1)
  length = {
    "linf": np.abs(delta).max(1),
    "l2": np.sqrt(np.square(delta).sum(1)),
  }[norm]
  # 1e-6 for the float32 difference of the images.
  assert length.max() <= radius + 1e-6
  assert length.max() > 0.9 * radius
  np.testing.assert_allclose(output.distance, length, atol=1e-6)
  assert float(output.images.min()) >= 0
  assert float(output.images.max()) <= 1
  predicted = np.argmax(apply_fn(variables, output.images), -1)
  is_crossed = np.asarray(output.is_crossed)
  np.testing.assert_array_equal(is_crossed, predicted != labels)
  np.testing.assert_array_equal(
    np.asarray(output.labels)[is_crossed], predicted[is_crossed]
  )
  assert not np.any(output.labels == labels)


def test_images_do_not_depend_on_their_batch(nonlinear):
  apply_fn, variables, images, labels = nonlinear
  options = {"num_steps": 20, "step_size": 0.02, "noise_scale": 0.05}
  together = boundary.search(
    apply_fn, variables, images, labels, KEY, **options
  )
  keys = boundary.sample_keys(KEY, jnp.arange(len(images)))
  for i in (0, 7, 23):
    alone = boundary.search(
      apply_fn,
      variables,
      images[i : i + 1],
      labels[i : i + 1],
      keys[i : i + 1],
      **options,
    )
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], together)
    # Sums of another batch size may differ in the last bits.
    chex.assert_trees_all_close(alone, one, atol=1e-5)


def test_works_under_jit_and_vmap(nonlinear):
  apply_fn, variables, images, labels = nonlinear
  search = functools.partial(boundary.search, apply_fn, num_steps=15)
  expected = [
    search(variables, images, labels, KEY, step_size=size)
    for size in (0.01, 0.05)
  ]
  assert np.any(expected[0].distance != expected[1].distance)

  @jax.jit
  def sweep(sizes):
    return jax.vmap(
      lambda size: search(variables, images, labels, KEY, step_size=size)
    )(sizes)

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *expected)
  chex.assert_trees_all_close(
    sweep(jnp.array([0.01, 0.05])), stacked, atol=1e-5
  )


def test_a_grid_of_searches_is_one_program(nonlinear):
  searches = [
    boundary.Search(
      num_steps=num_steps,
      step_size=size,
      distance_weight=weight,
      noise_scale=noise,
    )
    for num_steps in (3, 9)
    for size in (0.01, 0.05)
    for weight, noise in ((0.0, 0.0), (0.5, 0.1))
  ]
  apply_fn, *arguments = nonlinear

  @jax.jit
  @chex.assert_max_traces(n=1)
  def sweep(grid):
    return jax.vmap(lambda search: search(apply_fn, *arguments, KEY))(grid)

  expected = [search(apply_fn, *arguments, KEY) for search in searches]
  assert len({float(output.distance.sum()) for output in expected}) > 4
  chex.assert_trees_all_close(
    sweep(boundary.stack(searches)),
    jax.tree.map(lambda *x: jnp.stack(x), *expected),
    atol=1e-5,
  )


def test_a_search_is_a_value():
  search = boundary.Search(num_steps=5, step_size=0.1)
  assert search == boundary.Search(num_steps=5, step_size=0.1)
  leaves, structure = jax.tree.flatten(search)
  assert jax.tree.unflatten(structure, leaves) == search
  # A part of a tree with no numbers in it, as transformations make them.
  empty = jax.tree.unflatten(structure, [None] * len(leaves))
  assert empty.num_steps is None
  # What follows from the numbers follows from new ones.
  assert search.is_plain
  assert not dataclasses.replace(search, noise_scale=0.1).is_plain
  with pytest.raises(ValueError, match=r"step_size .* got -1"):
    dataclasses.replace(search, step_size=-1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ([], "searches must not be empty"),
    ([{}, {"norm": "l2"}], "searches must have one norm, got 'linf', 'l2'"),
    ([{}, {"confidence": 0.1}], "all have confidence or none"),
  ],
)
def test_searches_that_are_no_grid(options, message):
  searches = [
    boundary.Search(num_steps=5, step_size=0.1, **more) for more in options
  ]
  with pytest.raises(ValueError, match=message):
    boundary.stack(searches)


def test_options_that_are_numbers_share_one_program(nonlinear):
  apply_fn, variables, images, labels = nonlinear

  @chex.assert_max_traces(n=4)  # Shapes, the start, and a step: two points.
  def counted(variables, images):
    return apply_fn(variables, images)

  for num_steps, step_size in ((3, 0.1), (5, 0.2), (7, 0.3)):
    boundary.search(
      counted,
      variables,
      images,
      labels,
      KEY,
      num_steps=num_steps,
      step_size=step_size,
      max_distance=step_size,
    )


def test_growing_steps_take_few_gradients_and_bisection_comes_back():
  # The distance is 1 / 16; steps of 0.01, 0.02, 0.04 and so on sum to 0.07.
  arguments = one_search(margin=1.0)
  options = {"num_steps": 50, "step_size": 0.01, "step_growth": 2.0}
  output = boundary.search(*arguments, **options)
  np.testing.assert_array_equal(output.num_steps, [3])
  np.testing.assert_allclose(output.distance, 0.07, atol=1e-6)
  for number in (1, 2, 6):
    nearer = boundary.search(*arguments, **options, num_bisections=number)
    assert nearer.is_crossed.all()
    np.testing.assert_array_equal(nearer.num_steps, [3])
    # The last step was 0.04.
    excess = float(nearer.distance[0]) - 1 / 16
    assert -1e-6 <= excess <= 0.04 / 2**number + 1e-6
    np.testing.assert_allclose(
      nearer.logits,
      fakes.linear_apply(arguments[1], nearer.images),
      atol=1e-5,
    )


def test_a_search_that_gave_up_is_not_bisected():
  arguments = one_search(margin=1e3)
  options = {"num_steps": 3, "step_size": 0.01, "step_growth": 1.5}
  output = boundary.search(*arguments, **options, num_bisections=4)
  assert not output.is_crossed.any()
  np.testing.assert_allclose(output.distance, 0.01 + 0.015 + 0.0225, atol=1e-6)


@pytest.mark.parametrize("norm", boundary.NORMS)
def test_growing_steps_do_not_overflow(norm):
  output = boundary.search(
    *one_search(margin=1e3),
    num_steps=300,
    step_size=0.01,
    step_growth=2.0,
    norm=norm,
  )
  # All pixels are at the end of their range.
  np.testing.assert_allclose(output.images, 1.0)
  assert np.isfinite(output.logits).all()


def test_bisection_keeps_to_the_ball_the_grid_and_the_confidence(nonlinear):
  options = {"num_steps": 20, "step_size": 0.05, "step_growth": 1.5}
  output = boundary.search(
    *nonlinear,
    KEY,
    **options,
    num_bisections=5,
    max_distance=0.2,
    is_rounded=True,
    confidence=0.6,
  )
  # Rounding may leave the ball by half a grey level.
  assert output.distance.max() <= 0.2 + 0.5 / 255 + 1e-6
  levels = np.asarray(output.images) * 255
  np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
  probabilities = jax.nn.softmax(output.logits)
  labels = nonlinear[-1]
  is_ended = output.num_steps < 20
  assert is_ended.any()
  assert (probabilities[jnp.arange(len(labels)), labels][is_ended] <= 0.6).all()


def test_step_decay():
  options = {"num_steps": 4, "step_size": 0.01}
  arguments = one_search(margin=1e3)
  constant = boundary.search(*arguments, **options)
  decayed = boundary.search(*arguments, **options, step_decay="sqrt")
  np.testing.assert_allclose(constant.distance, 0.04, atol=1e-6)
  # 0.01 (1 + 1/√2 + 1/√3 + 1/√4)
  np.testing.assert_allclose(decayed.distance, 0.0278446, atol=1e-6)


@pytest.mark.parametrize(
  ("decay", "term", "excess", "expected"),
  [
    # In the second of two steps λ_2 ε against the gradient decides: back to
    # the image, or a second step away.
    ("constant", "penalty", 1.5, 0.0),
    ("constant", "penalty", 0.9, 0.02),
    ("constant", "reward", 1.5, 0.02),
    ("inverse", "penalty", 1.5, 0.02),
    ("inverse", "penalty", 2.2, 0.0),
    ("linear", "penalty", 1.5, 0.02),
    ("linear", "penalty", 2.2, 0.0),
    ("exponential", "penalty", 1.05, 0.02),  # exp(-0.1) = 0.905
    ("exponential", "penalty", 1.2, 0.0),
  ],
)
def test_distance_weight(decay, term, excess, expected):
  slope, step = 0.01, 0.01
  gradient = slope / 2  # 1 - p_y is 1/2 where the two classes are level.
  output = boundary.search(
    fakes.linear_apply,
    two_classes(16, margin=0.01, slope=slope),
    grey(1),
    zeros(1),
    KEY,
    num_steps=2,
    step_size=step,
    distance_weight=excess * gradient / step,
    distance_decay=decay,
    distance_term=term,
  )
  np.testing.assert_allclose(output.distance, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("noise", "expected"),
  [
    # P(z > 1) for the standard distributions.
    ("normal", 0.1587),
    ("cauchy", 0.25),
    ("laplace", 0.1839),
    ("uniform", 0.0),
  ],
)
def test_noise_turns_signs_as_often_as_its_distribution_says(noise, expected):
  slope = 1e-4
  image = grey(1, size=100)
  output = boundary.search(
    fakes.linear_apply,
    two_classes(image.size, margin=0.05, slope=slope),
    image,
    zeros(1),
    KEY,
    num_steps=1,
    step_size=0.01,
    # 1 - p_y = sigmoid(-0.05) = 0.4875
    noise_scale=0.4875 * slope,
    noise=noise,
  )
  turned = np.mean(np.asarray(output.images) < 0.5)
  # Three standard deviations of 10,000 draws.
  assert abs(turned - expected) <= 0.013
  assert np.all(np.asarray(output.images) != 0.5)


def test_noise_follows_the_key(nonlinear):
  apply_fn, variables, images, labels = nonlinear
  search = functools.partial(
    boundary.search,
    apply_fn,
    variables,
    images,
    labels,
    num_steps=3,
    step_size=0.001,
    noise_scale=1.0,
  )
  first, again, other = search(KEY), search(KEY), search(jax.random.key(1))
  np.testing.assert_array_equal(first.images, again.images)
  assert np.mean(np.asarray(first.images != other.images)) > 0.5


def test_confidence_stops_before_the_boundary():
  arguments = one_search(margin=2.0)
  options = {"num_steps": 1000, "step_size": 1e-3}
  output = boundary.search(*arguments, **options, confidence=0.6)
  # p_y = 0.6 at a margin of ln 1.5, after (2 - ln 1.5) / 16 of distance.
  np.testing.assert_allclose(output.distance, 0.09966, atol=1.1e-3)
  assert not output.is_crossed.any()
  np.testing.assert_array_equal(output.labels, 1)
  crossed = boundary.search(*arguments, **options, confidence=0.1)
  assert crossed.is_crossed.all()


def test_rounded_points_are_grey_levels():
  options = {"num_steps": 200, "step_size": 0.0007}
  arguments = one_search(margin=0.5)
  output = boundary.search(*arguments, **options, is_rounded=True)
  levels = np.asarray(output.images) * 255
  np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
  # Steps smaller than half a grey level add up all the same.
  assert output.is_crossed.all()
  free = np.asarray(boundary.search(*arguments, **options).images) * 255
  assert np.abs(free - np.round(free)).max() > 1e-2


def test_other_bounds():
  output = boundary.search(
    fakes.linear_apply,
    two_classes(16, margin=1e3),
    grey(1) - 1.5,
    zeros(1),
    KEY,
    num_steps=10,
    step_size=0.5,
    bounds=(-1.0, 2.0),
  )
  np.testing.assert_allclose(output.images, 2.0)


def test_released_step_on_a_linear_classifier():
  # p = (x - 0.5) / 0.5 * 0.2 + 0.4 = 0.44 at x = 0.6; one step up to 0.54,
  # rounded to 138 / 255, and back.
  image = jnp.full((1, 4, 4, 1), 0.6)
  output = boundary.released_code_search(
    fakes.linear_apply,
    two_classes(16, margin=10.0, slope=0.1),
    image,
    zeros(1),
    KEY,
    model_mean=0.5,
    model_std=0.5,
    attack_mean=0.4,
    attack_std=0.2,
  )
  expected = (138 / 255 - 0.4) / 0.2 * 0.5 + 0.5
  np.testing.assert_allclose(output.images, expected, atol=1e-6)
  # Nothing is crossed, and the label stays: a quirk of the released code.
  assert not output.is_crossed.any()
  np.testing.assert_array_equal(output.labels, 0)


def test_released_distance_weight_acts_through_the_two_normalisations():
  # u - p = -0.6 - (-0.6 * 0.2 + 0.4) = -0.88 at x = 0.2, against the gradient.
  arguments = (
    fakes.linear_apply,
    two_classes(16, margin=0.5, slope=0.1),
    jnp.full((1, 4, 4, 1), 0.2),
    zeros(1),
    KEY,
  )
  options = {
    "model_mean": 0.5,
    "model_std": 0.5,
    "attack_mean": 0.4,
    "attack_std": 0.2,
  }
  plain = boundary.released_code_search(*arguments, **options)
  weighted = boundary.released_code_search(
    *arguments, **options, distance_weight=10.0
  )
  assert float(plain.images.min()) > 0.2
  assert float(weighted.images.max()) < 0.2


def test_released_code_is_reproduced(reference_dir):
  stored = np.load(reference_dir / "fgsm.npz")
  model = models.create(
    "all_cnn", num_classes=10, num_channels=1, width=0.25, mean=0.5, std=0.5
  )
  variables = torch_weights.load(
    reference_dir / "original.safetensors", model_name="all_cnn"
  )
  images = jnp.asarray(stored["x"].transpose(0, 2, 3, 1) * 0.5 + 0.5)
  logits = model.apply(variables, images)
  # Float32 sums in another order.
  np.testing.assert_allclose(logits, stored["logits"], atol=1e-4)
  output = boundary.released_code_search(
    model.apply,
    variables,
    images,
    jnp.asarray(stored["y"], jnp.int32),
    KEY,
    model_mean=0.5,
    model_std=0.5,
  )
  expected = stored["logits_adv"].argmax(-1)
  assert np.mean(np.asarray(output.labels) == expected) >= 0.99
  moved = (np.asarray(output.images) - 0.5) / 0.5
  differs = np.abs(moved - stored["x_adv"].transpose(0, 2, 3, 1)) > 1e-4
  # Pixels whose gradient is 0 but for rounding.
  assert differs.mean() < 1e-3


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"step_size": 0.0}, "step_size must be finite, positive, got 0.0"),
    ({"step_size": float("nan")}, "step_size .* got nan"),
    ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ({"num_steps": 2.5}, "num_steps .* got 2.5"),
    ({"max_distance": -1.0}, "max_distance .* got -1.0"),
    ({"distance_weight": -0.1}, "distance_weight .* got -0.1"),
    ({"noise_scale": float("inf")}, "noise_scale .* got inf"),
    ({"noise": "gaussian"}, "noise must be one of .* got 'gaussian'"),
    ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
    ({"step_decay": "sqr"}, "did you mean 'sqrt'"),
    ({"distance_decay": "step"}, "distance_decay must be one of"),
    ({"distance_term": "plus"}, "distance_term must be one of"),
    ({"confidence": 1.5}, "confidence .* got 1.5"),
    ({"confidence": 1.0}, "confidence .* below 1, got 1.0"),
    ({"step_size": np.ones(1 + 1)}, r"step_size must be one number.*\[2\]"),
    ({"step_size": jnp.ones(3)}, r"step_size must be one number.*\[3\]"),
    ({"num_steps": np.ones(2, int)}, "num_steps must be one number"),
    ({"max_distance": [0.1, 0.2]}, "max_distance must be one number"),
    ({"distance_weight": jnp.ones((4, 4, 1))}, "distance_weight must be one"),
    ({"noise_scale": np.ones(2)}, "noise_scale must be one number"),
    ({"confidence": np.zeros(2)}, "confidence must be one number"),
    ({"bounds": (1.0, 0.0)}, r"bounds .* got \(1.0, 0.0\)"),
    ({"bounds": (0, 0.5, 1)}, r"bounds must be two numbers.* got \(0, 0.5, 1"),
    ({"bounds": None}, "bounds must be two numbers.* got None"),
    ({"bounds": ("a", "b")}, "bounds must be two numbers"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    boundary.search(
      fakes.linear_apply,
      two_classes(16, margin=1.0),
      grey(1),
      zeros(1),
      KEY,
      **{"num_steps": 5, "step_size": 0.1, **options},
    )


@pytest.mark.parametrize(
  ("images", "labels", "key", "message"),
  [
    (grey(1)[0], zeros(1), KEY, r"images .* got float32 \[4, 4, 1\]"),
    (grey(1) * np.nan, zeros(1), KEY, "images .* from nan to nan"),
    (one_nan(64), zeros(64), KEY, "images must be finite .* from nan to nan"),
    (np.asarray(one_nan(64)), zeros(64), KEY, "images must be finite"),
    (one_nan(2) + np.inf, zeros(2), KEY, "images must be finite"),
    (grey(1) * 300, zeros(1), KEY, "images .* from 150.0 to 150.0"),
    (jnp.ones((1, 4, 4, 1), jnp.uint8), zeros(1), KEY, "images .* got uint8"),
    (grey(2), zeros(1), KEY, "got 1 labels for 2 images"),
    (grey(1), zeros(1) + 2, KEY, r"labels must be in \[0, 2\), got .* 2 to 2"),
    (grey(1), zeros(1) - 1, KEY, r"labels must be in \[0, 2\)"),
    (grey(1), zeros(1) * 0.5, KEY, "labels must be integers"),
    # 32 bits of it would be 1.
    (grey(1), np.array([2**32 + 1]), KEY, "labels .* to 4294967297"),
    (grey(1), ["a"], KEY, "labels must be integers"),
    (grey(1), None, KEY, "labels must be integers"),
    (grey(1).astype(jnp.float8_e4m3fn), zeros(1), KEY, "images .* got float8"),
    (grey(1), zeros(1), jax.random.PRNGKey(0), "key must be made by"),
    (grey(2), zeros(2), jax.random.split(KEY, 3), "got .3. keys for 2 images"),
  ],
)
def test_bad_data(images, labels, key, message):
  with pytest.raises(ValueError, match=message):
    boundary.search(
      fakes.linear_apply,
      two_classes(16, margin=1.0),
      images,
      labels,
      key,
      num_steps=5,
      step_size=0.1,
    )


@pytest.mark.parametrize(
  ("apply_fn", "found"),
  [
    (lambda v, x: x.reshape(len(x), -1)[:, :1], r"float32 \[1, 1\]"),
    (lambda v, x: x.sum((1, 2, 3)), r"float32 \[1\]"),
    (lambda v, x: x.reshape(len(x), -1).T, r"float32 \[16, 1\]"),
    (lambda v, x: jnp.argsort(x.reshape(len(x), -1)), r"int32 \[1, 16\]"),
    (lambda v, x: (x.reshape(len(x), -1), {}), "a tuple"),
    (lambda v, x: {"logits": x.reshape(len(x), -1)}, "a dict"),
  ],
)
def test_networks_without_logits_of_classes(apply_fn, found):
  for search, options in (
    (boundary.search, {"num_steps": 5, "step_size": 0.1}),
    (boundary.released_code_search, {"model_mean": 0.5, "model_std": 0.5}),
  ):
    with pytest.raises(ValueError, match=f"must return logits.* got {found}"):
      search(apply_fn, {}, grey(1), zeros(1), KEY, **options)


@pytest.mark.parametrize(
  ("apply_fn", "found"),
  [
    (lambda v, x: np.asarray(x).reshape(len(x), -1), "TracerArrayConversion"),
    (lambda v, x: x.reshape(4, 16), "cannot reshape"),
    (None, "got None"),
    ([], "unhashable"),
  ],
)
def test_networks_that_jax_cannot_trace(apply_fn, found):
  with pytest.raises(ValueError, match=f"apply_fn must be a .*{found}"):
    boundary.search(
      apply_fn, {}, grey(4), zeros(4), KEY, num_steps=5, step_size=0.1
    )


def test_classes_that_are_ruled_out():
  variables = two_classes(16, margin=0.5)

  def apply(variables, images):
    logits = fakes.linear_apply(variables, images)
    return jnp.pad(logits, ((0, 0), (0, 1)), constant_values=-jnp.inf)

  options = {"num_steps": 50, "step_size": 0.1}
  found, expected = (
    boundary.search(each, variables, grey(1), zeros(1), KEY, **options)
    for each in (apply, fakes.linear_apply)
  )
  assert expected.is_crossed.all()
  assert found.is_crossed.all()
  np.testing.assert_array_equal(found.labels, expected.labels)
  np.testing.assert_array_equal(found.distance, expected.distance)


def test_no_transfer_and_no_promotion_that_nobody_asked_for():
  arguments = two_classes(16, margin=0.5), grey(1), zeros(1), KEY[None]
  options = {"distance_weight": 0.1, "distance_decay": "linear"}
  with jax.transfer_guard("disallow"), jax.numpy_dtype_promotion("strict"):
    found = boundary.search(
      fakes.linear_apply, *arguments, num_steps=50, step_size=0.1, **options
    )
  assert found.is_crossed.all()


@pytest.fixture
def wide_types():
  """64-bit types, as `JAX_ENABLE_X64=1` has them."""
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)


# All that enters the loop and could be of another type than the images.
EVERYTHING = {
  "num_steps": 30,
  "step_size": np.float64(0.001),
  "step_decay": "sqrt",
  "max_distance": np.float64(0.05),
  "distance_weight": np.float64(1e-5),
  "distance_decay": "linear",
  "noise_scale": np.float64(1e-5),
  "noise": "cauchy",
}


def search_in(dtype, apply_fn=fakes.linear_apply, **options):
  variables = two_classes(16, margin=0.1)
  images = jnp.asarray(grey(2), dtype)
  return boundary.search(
    apply_fn, variables, images, zeros(2), KEY, **{**EVERYTHING, **options}
  )


def test_half_precision():
  """A network that takes its own type alone; steps that it cannot resolve."""

  def strict(variables, images):
    assert images.dtype == jnp.bfloat16
    return fakes.linear_apply(variables, images)

  output = search_in(jnp.bfloat16, strict)
  assert output.images.dtype == jnp.bfloat16
  assert output.distance.dtype == jnp.float32
  # 0.1 / 16 away: less than the steps at 0.5 of bfloat16 add up to by ones.
  assert output.is_crossed.all()
  assert np.all(np.asarray(output.num_steps) > 1)
  np.testing.assert_array_equal(
    output.distance,
    np.abs(np.asarray(output.images, np.float32) - 0.5).max((1, 2, 3)),
  )


@pytest.mark.parametrize("norm", boundary.NORMS)
def test_types_of_all_options(norm):
  """By shapes alone: old processors have no float16."""

  def search(images):
    return boundary.search(
      fakes.linear_apply,
      two_classes(16, margin=0.1),
      images,
      zeros(2),
      KEY,
      **EVERYTHING,
      norm=norm,
    )

  for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    image = jax.ShapeDtypeStruct((2, 4, 4, 1), dtype)
    assert jax.eval_shape(search, image).images.dtype == dtype


@pytest.mark.parametrize("norm", boundary.NORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wide_types(wide_types, norm, dtype):
  output = search_in(dtype, norm=norm, max_distance=0.5, step_size=0.01)
  assert output.is_crossed.all()
  assert output.images.dtype == output.distance.dtype == dtype


def explicit_mesh():
  return jax.make_mesh(
    (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
  )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_sharded_over_explicit_axes(nonlinear):
  apply_fn, variables, images, labels = nonlinear
  mesh = explicit_mesh()

  def search(images, labels):
    return boundary.search(
      apply_fn,
      variables,
      images,
      labels,
      KEY,
      num_steps=5,
      step_size=0.02,
      noise_scale=0.1,
    )

  one = search(images, labels)
  spec = jax.sharding.PartitionSpec("a")
  sharded = jax.device_put(images, jax.sharding.NamedSharding(mesh, spec))
  many = search(sharded, labels)
  assert len(many.images.sharding.device_set) == 8
  chex.assert_trees_all_close(
    jax.device_get(many), jax.device_get(one), atol=1e-5
  )
  options = {"model_mean": 0.5, "model_std": 0.5}
  released = [
    jax.device_get(
      boundary.released_code_search(
        apply_fn, variables, x, labels, KEY, **options
      ).labels
    )
    for x in (images, sharded)
  ]
  np.testing.assert_array_equal(*released)


def test_no_image_at_all():
  arguments = (fakes.linear_apply, two_classes(16, margin=1.0), grey(0))
  output = boundary.search(
    *arguments, zeros(0), KEY, num_steps=2, step_size=0.1
  )
  assert output.images.shape == (0, 4, 4, 1)
  assert output.logits.shape == (0, 2)
  released = boundary.released_code_search(
    *arguments, zeros(0), KEY, model_mean=0.5, model_std=0.5
  )
  assert released.images.shape == (0, 4, 4, 1)


@pytest.fixture(scope="module")
def random_linear():
  """A linear network of 10 classes, and closed-form distances to each."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(64, 10))
  images = rng.uniform(0.4, 0.6, (200, 8, 8, 1)).astype(np.float32)
  logits = images.reshape(200, -1) @ kernel
  labels = logits.argmax(1)
  margins = logits.max(1, keepdims=True) - logits
  others = kernel[:, labels].T[:, None] - kernel.T
  is_label = np.arange(10) == labels[:, None]
  distances = {
    norm: np.where(is_label, np.inf, margins / np.where(is_label, 1, lengths))
    for norm, lengths in (
      ("linf", np.abs(others).sum(-1)),
      ("l2", np.sqrt(np.square(others).sum(-1))),
    )
  }
  return fakes.linear_variables(kernel), images, labels, logits, distances


@pytest.mark.parametrize(("norm", "step"), [("linf", 0.001), ("l2", 0.004)])
def test_a_near_class_is_found(random_linear, norm, step):
  """The nearest for most images, and no other much farther: see the README.

  Measured: the nearest for .91 (linf) and .975 (l2), where the runner-up at
  the image is the nearest for .91 and .96; the median distance is 1.12 and 1.09
  times that of the nearest, the largest 1.23 and 1.16.
  """
  variables, images, labels, _, distances = random_linear
  output = boundary.search(
    fakes.linear_apply,
    variables,
    images,
    labels,
    KEY,
    num_steps=400,
    step_size=step,
    norm=norm,
  )
  nearest = distances[norm].argmin(1)
  share = np.mean(np.asarray(output.labels) == nearest)
  assert 0.85 < share < 1.0
  assert output.is_crossed.all()
  # Float32 sums of so many steps.
  least = distances[norm].min(1) - tolerances.float32(400, 0.6)
  assert np.all(output.distance >= least)
  assert np.quantile(output.distance / distances[norm].min(1), 0.95) < 1.25


def test_l2_steps_reach_the_closed_form_distance():
  # Of two classes: margin / ||w||_2. Signs would need √(π / 2) as much.
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(64, 2))
  images = rng.uniform(0.4, 0.6, (60, 8, 8, 1)).astype(np.float32)
  logits = images.reshape(60, -1) @ kernel
  margins = np.abs(logits[:, 0] - logits[:, 1])
  exact = margins / np.linalg.norm(kernel[:, 0] - kernel[:, 1])
  step = 0.002

  def search(**options):
    return boundary.search(
      fakes.linear_apply,
      fakes.linear_variables(kernel),
      images,
      logits.argmax(1),
      KEY,
      num_steps=500,
      step_size=step,
      norm="l2",
      **options,
    )

  output = search()
  assert output.is_crossed.all()
  tolerance = tolerances.float32(500, 0.6)
  excess = np.asarray(output.distance) - exact
  assert excess.min() >= -tolerance
  assert excess.max() <= step + tolerance
  # A ball holds a boundary or it does not.
  radius = float(np.median(exact)) + 1e-4
  is_inside = exact < radius - tolerance
  found = search(max_distance=radius)
  assert 0.3 < is_inside.mean() < 0.7
  np.testing.assert_array_equal(found.is_crossed, is_inside)


@pytest.mark.parametrize("slope", [1e-25, 1e3])
def test_l2_steps_have_their_length_whatever_the_gradient(slope):
  output = boundary.search(
    fakes.linear_apply,
    two_classes(16, margin=1e6 * slope, slope=slope),
    grey(1),
    zeros(1),
    KEY,
    num_steps=3,
    step_size=0.1,
    norm="l2",
  )
  np.testing.assert_allclose(output.distance, 0.3, atol=tolerances.float32(20))


@pytest.mark.parametrize("confidence", [0.3, 0.499, 0.7])
def test_confidence_can_only_stop_earlier(confidence):
  arguments = one_search(margin=2.0)
  options = {"num_steps": 1000, "step_size": 0.01}
  without = boundary.search(*arguments, **options)
  output = boundary.search(*arguments, **options, confidence=confidence)
  if confidence < 0.5:  # Of two classes the larger has half or more.
    np.testing.assert_array_equal(output.images, without.images)
  else:
    assert output.num_steps[0] < without.num_steps[0]
    assert not output.is_crossed.any()
