"""Tests of the convolution against XLA's own."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from psg_jax import convolution

# Sums of a few thousand products in another order: a few hundred roundings of
# 6e-8 each, relative to the largest entry.
_RTOL = 2e-5

_P = jax.sharding.PartitionSpec


@pytest.fixture(scope="module", autouse=True)
def _optimised() -> Iterator[None]:
  """Compiles as users do, unlike the other tests."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, False)
  yield
  jax.config.update(name, before)


def _assert_close(actual: chex.ArrayTree, expected: chex.ArrayTree) -> None:
  def check(a: jax.Array, e: jax.Array) -> None:
    assert a.shape == e.shape
    assert a.dtype == e.dtype
    np.testing.assert_allclose(
      a, e, rtol=0, atol=_RTOL * np.abs(np.asarray(e)).max()
    )

  jax.tree.map(check, actual, expected)


def _native(
  images: jax.Array, kernel: jax.Array, *, stride: int, padding: int
) -> jax.Array:
  return lax.conv_general_dilated(
    images,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _gradients(
  conv_fn: Callable[..., jax.Array], stride: int = 1, padding: int = 1
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Gradients of a loss with a cotangent that differs at every output."""

  def loss(images: jax.Array, kernel: jax.Array) -> jax.Array:
    outputs = conv_fn(images, kernel, stride=stride, padding=padding)
    return jnp.square(outputs).sum() / 2

  return jax.jit(jax.grad(loss, argnums=(0, 1)))


def _inputs(
  *,
  batch: int = 4,
  size: tuple[int, int] = (9, 9),
  kernel: tuple[int, int] = (3, 3),
  channels: int = 12,
  filters: int = 5,
) -> tuple[jax.Array, jax.Array]:
  rng = np.random.default_rng(0)
  shapes = (batch, *size, channels), (*kernel, channels, filters)
  images, kernels = (
    jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes
  )
  return images, kernels


@pytest.fixture(params=[False, True], ids=["few", "many"])
def many_channels(
  request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> bool:
  """Run with each form of the kernel gradient, two images to a part."""
  if request.param:
    monkeypatch.setattr(convolution, "MANY_CHANNELS", 1)
  monkeypatch.setattr(convolution, "IMAGE_PART_BYTES", 2 * 9 * 9 * 12 * 4)
  monkeypatch.setattr(convolution, "PATCH_PART_BYTES", 2 * 9 * 9 * 9 * 12 * 4)
  return request.param


@pytest.mark.parametrize(
  ("size", "kernel", "stride", "padding", "channels"),
  [
    ((8, 8), (3, 3), 1, 1, 1),
    ((8, 8), (3, 3), 1, 1, 12),
    ((9, 7), (3, 3), 2, 1, 8),
    ((7, 8), (3, 3), 2, 0, 12),
    ((7, 8), (3, 3), 2, 3, 12),
    ((11, 9), (7, 7), 2, 3, 3),
    ((11, 9), (7, 7), 2, 3, 12),
    ((11, 9), (7, 7), 1, 2, 12),
    ((9, 9), (3, 3), 3, 2, 12),
    ((7, 7), (3, 2), 2, 1, 12),
    ((7, 7), (2, 5), 1, 2, 12),
    ((8, 7), (1, 1), 1, 0, 12),
    ((8, 7), (1, 1), 2, 0, 12),
    ((8, 7), (1, 1), 2, 2, 3),
    ((3, 3), (3, 3), 1, 0, 12),
    ((2, 2), (3, 3), 1, 1, 12),
    ((2, 2), (3, 3), 2, 1, 12),
    ((1, 2), (3, 3), 1, 1, 3),
  ],
)
def test_equals_native(
  size: tuple[int, int],
  kernel: tuple[int, int],
  stride: int,
  padding: int,
  channels: int,
) -> None:
  args = _inputs(size=size, kernel=kernel, channels=channels)

  @functools.partial(jax.jit, static_argnums=0)
  def run(conv_fn: Callable[..., jax.Array], *args: jax.Array) -> tuple:
    outputs = conv_fn(*args, stride=stride, padding=padding)
    return outputs, _gradients(conv_fn, stride, padding)(*args)

  _assert_close(run(convolution.conv2d, *args), run(_native, *args))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_images_stay_on_the_fast_path(size: int) -> None:
  """XLA takes the larger of the two for the images, turned, and is slow."""
  images, kernel = _inputs(size=(size, size), channels=12)

  def both(images: jax.Array, kernel: jax.Array) -> tuple:
    outputs, vjp_fn = jax.vjp(
      lambda x: convolution.conv2d(x, kernel, padding=1), images
    )
    return outputs, vjp_fn(outputs)

  compiled = jax.jit(both).lower(images, kernel).compile().as_text()
  windows = re.findall(r"convolution\(.*?window={(.*?)}", compiled)
  assert len(windows) == 2
  assert all("size=3x3" in window for window in windows)
  assert not any("rhs_reversal" in window for window in windows)


def test_literal_values() -> None:
  images = jnp.arange(9.0).reshape(1, 3, 3, 1)
  kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])[:, :, None, None]
  outputs, vjp_fn = jax.vjp(
    functools.partial(convolution.conv2d, stride=2, padding=1), images, kernel
  )
  np.testing.assert_array_equal(outputs[0, :, :, 0], [[0, 11], [30, 67]])
  image_grad, kernel_grad = vjp_fn(
    jnp.array([[1, 2], [3, 4.0]])[None, ..., None]
  )
  np.testing.assert_array_equal(
    image_grad[0, :, :, 0], [[4, 6, 8], [6, 4, 8], [12, 12, 16]]
  )
  np.testing.assert_array_equal(kernel_grad[:, :, 0, 0], [[16, 29], [30, 54]])


@pytest.mark.parametrize("batch", [1, 5, 7])
def test_batch_that_parts_do_not_divide(
  many_channels: bool, batch: int
) -> None:
  args = _inputs(batch=batch)
  _assert_close(
    _gradients(convolution.conv2d)(*args), _gradients(_native)(*args)
  )


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("channels", [3, 12])
def test_vmap(in_axes: tuple[int | None, int | None], channels: int) -> None:
  images, kernel = (
    array if axis is None else jnp.stack([array, 1 - array])
    for array, axis in zip(_inputs(channels=channels), in_axes, strict=True)
  )

  @functools.partial(jax.jit, static_argnums=0)
  def mapped(conv_fn: Callable[..., jax.Array], *args: jax.Array) -> tuple:
    gradients = jax.vmap(_gradients(conv_fn, 2), in_axes)
    outputs = jax.vmap(functools.partial(conv_fn, stride=2, padding=1), in_axes)
    return outputs(*args), gradients(*args)

  _assert_close(
    mapped(convolution.conv2d, images, kernel),
    mapped(_native, images, kernel),
  )


def test_gradient_of_vmap() -> None:
  images, kernel = _inputs()
  kernels = jnp.stack([kernel, 1 - kernel])

  def mapped(conv_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(images: jax.Array, kernels: jax.Array, **options: Any) -> jax.Array:
      run_one = functools.partial(conv_fn, **options)
      return jax.vmap(run_one, (None, 0))(images, kernels)

    return run

  _assert_close(
    _gradients(mapped(convolution.conv2d))(images, kernels),
    _gradients(mapped(_native))(images, kernels),
  )


def test_loops_and_checkpoint(many_channels: bool) -> None:
  args = _inputs()
  expected = _gradients(_native)(*args)

  def checkpointed(
    images: jax.Array, kernel: jax.Array, **options: Any
  ) -> jax.Array:
    run = functools.partial(convolution.conv2d, **options)
    return jax.checkpoint(run)(images, kernel)

  @jax.jit
  def scanned(*args: jax.Array) -> tuple[jax.Array, ...]:
    _, gradients = lax.scan(
      lambda carry, _: (carry, _gradients(convolution.conv2d)(*carry)),
      args,
      None,
      length=2,
    )
    return jax.tree.map(lambda x: x[1], gradients)

  @jax.jit
  def looped(*args: jax.Array) -> tuple[jax.Array, ...]:
    return lax.while_loop(
      lambda state: state[0] < 1,
      lambda state: (state[0] + 1, _gradients(convolution.conv2d)(*args)),
      (0, args),
    )[1]

  _assert_close(scanned(*args), expected)
  _assert_close(looped(*args), expected)
  _assert_close(_gradients(checkpointed)(*args), expected)


@pytest.mark.parametrize(("platform", "expected"), [("cpu", 1), ("cuda", 2)])
def test_kernel_gradient_is_native_off_cpu_only(
  platform: str, expected: int
) -> None:
  @jax.jit
  def gradient(images: jax.Array, kernel: jax.Array) -> jax.Array:
    return _gradients(convolution.conv2d)(images, kernel)[1]

  lowered = gradient.trace(*_inputs()).lower(lowering_platforms=(platform,))
  # One is the forward pass. The unused gradient of the images is dead code.
  assert lowered.as_text().count("stablehlo.convolution") == expected


def test_compiles_once() -> None:
  chex.clear_trace_counter()
  step = jax.jit(
    chex.assert_max_traces(
      lambda *args: _gradients(convolution.conv2d)(*args), n=1
    )
  )
  args = _inputs()
  step(*args)
  step(*jax.tree.map(jnp.negative, args))


@pytest.mark.parametrize("channels", [3, 12])
def test_bfloat16(channels: int) -> None:
  args = _inputs(channels=channels)
  short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)
  actual = _gradients(convolution.conv2d)(*short)
  expected = _gradients(_native)(*args)
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    # Rounding errors of 2**-9 in the inputs, the outputs and the gradients.
    np.testing.assert_allclose(
      a.astype(jnp.float32), e, rtol=0, atol=0.02 * float(jnp.abs(e).max())
    )


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_sharded_equals_single(many_channels: bool) -> None:
  args = _inputs(batch=8)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:2]),
    ("batch",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  gradients_fn = _gradients(convolution.conv2d)
  expected = _gradients(_native)(*args)
  sharded = (
    jax.device_put(args[0], jax.sharding.NamedSharding(mesh, _P("batch"))),
    jax.device_put(args[1], jax.sharding.NamedSharding(mesh, _P())),
  )
  _assert_close(jax.jit(gradients_fn)(*sharded), expected)

  def mapped(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
    image_grad, kernel_grad = gradients_fn(*args)
    return image_grad, lax.psum(kernel_grad, "batch")

  def cast(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mapped(args[0], lax.pcast(args[1], "batch", to="varying"))

  for function, check_vma in ((mapped, False), (cast, True)):
    shard_mapped = jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(_P("batch"), _P()),
      out_specs=(_P("batch"), _P()),
      check_vma=check_vma,
    )
    _assert_close(jax.jit(shard_mapped)(*sharded), expected)


@pytest.mark.parametrize(
  ("images", "kernel", "stride", "padding", "match"),
  [
    ((8, 8, 3), (3, 3, 3, 2), 1, 1, r"images .*\(8, 8, 3\)"),
    ((1, 8, 8, 3), (3, 3, 3), 1, 1, r"kernel .*\(3, 3, 3\)"),
    ((1, 8, 8, 3), (3, 3, 4, 2), 1, 1, r"kernel .*3 .*\(3, 3, 4, 2\)"),
    ((1, 8, 8, 3), (3, 3, 3, 2), 0, 1, "stride .*0"),
    ((1, 8, 8, 3), (3, 3, 3, 2), 1, -1, "padding .*-1"),
    ((1, 8, 1, 3), (3, 3, 3, 2), 1, 0, r"kernel .*\(3, 3, 3, 2\)"),
  ],
)
def test_bad_arguments(
  images: tuple[int, ...],
  kernel: tuple[int, ...],
  stride: int,
  padding: int,
  match: str,
) -> None:
  with pytest.raises(ValueError, match=match):
    convolution.conv2d(
      jnp.zeros(images), jnp.zeros(kernel), stride=stride, padding=padding
    )


def test_bad_type() -> None:
  with pytest.raises(ValueError, match=r"kernel .*bfloat16"):
    convolution.conv2d(
      jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 2), jnp.bfloat16)
    )
