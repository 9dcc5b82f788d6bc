"""2-D convolution whose gradients are fast on a CPU, inside loops as well.

XLA rewrites convolutions to the layout of its fast CPU kernel only in the entry
computation of a program. Within the body of a `scan` or a `while_loop` the two
gradients of a convolution therefore fall to a scalar loop, up to forty times
slower; outside of one they are still two to five times slower than a matrix
product. On a CPU, `conv2d` states its gradients in forms that are fast in both
places:

*   For the images, a convolution once more, with stride 1, of the output
    gradient with the flipped kernel, written out in the layout of the fast CPU
    kernel. A stride splits the kernel into `stride * stride` phases that become
    output channels, so that no product with an inserted zero is formed. For a
    few input channels or a kernel of one pixel: one matrix product, whose
    `K * L` column blocks are then added at their shifted positions.
*   For the kernel, the `K * L` shifted views of the images are put side by side
    and multiplied with the output gradient, or multiplied one by one when there
    are many channels; parts of the batch, small enough to stay in the cache,
    take turns.

Static shapes alone choose between them. The forward pass, and everything on
other platforms, is the native convolution, of padded images where these are
smaller than the kernel.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# Measured on two AVX-512 cores at batch 64, on 3x3 and 1x1 kernels of 1 to 192
# channels and maps of 8 to 32 pixels a side. A factor of two in a size changes
# a time by a tenth to a third.
_FEW_CHANNELS = 8
MANY_CHANNELS = 64
PATCH_PART_BYTES = 4 * 2**20
IMAGE_PART_BYTES = 2**20


def conv2d(
  images: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0
) -> jax.Array:
  """Convolve images with a kernel, as PyTorch's `conv2d` without a bias.

  `outputs[b, y, x, o] = sum_{i, j, c} kernel[i, j, c, o] *
  padded[b, y * stride + i, x * stride + j, c]`

  Works under `jit`, `vmap` (over images, kernels or both), `scan`,
  `while_loop`, `checkpoint` and `shard_map`. Differentiable in reverse mode and
  once only: there is no forward mode, and so no Hessian. A `shard_map` that
  differentiates it needs `check_vma=False`, or images and kernel that vary over
  the same axes of the mesh (`jax.lax.pcast`).

  Args:
    images: `[B, H, W, C]`, float32 or a shorter float type.
    kernel: `[K, L, C, O]`, of the same type.
    stride: Step between two outputs in pixels, for both axes, at least 1.
    padding: Zeros around the images in pixels, the same on all four sides.

  Returns:
    `[B, (H + 2 * padding - K) // stride + 1,
    (W + 2 * padding - L) // stride + 1, O]`, of the type of the images.

  Raises:
    ValueError: If a rank, the number of channels, the type, the stride or the
      padding is not as above, or the kernel exceeds the padded images.
  """
  # NumPy's float64 is what JAX makes of it, as under jit.
  images, kernel = jnp.asarray(images), jnp.asarray(kernel)
  if images.ndim != 4:
    raise ValueError(f"images must be [B, H, W, C], got {images.shape}")
  if kernel.ndim != 4:
    raise ValueError(f"kernel must be [K, L, C, O], got {kernel.shape}")
  if images.shape[3] != kernel.shape[2]:
    raise ValueError(
      f"kernel must have {images.shape[3]} input channels as the images, got"
      f" {kernel.shape}"
    )
  if images.dtype != kernel.dtype:
    raise ValueError(f"kernel must be {images.dtype}, got {kernel.dtype}")
  if stride < 1:
    raise ValueError(f"stride must be at least 1, got {stride}")
  if padding < 0:
    raise ValueError(f"padding must not be negative, got {padding}")
  if any(kernel.shape[i] > images.shape[i + 1] + 2 * padding for i in range(2)):
    raise ValueError(
      f"kernel must fit into the padded images {images.shape}, padding"
      f" {padding}, got {kernel.shape}"
    )
  return _conv2d(images, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(
  images: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> jax.Array:
  """Convolution proper, `conv2d` without the checks."""
  sides = (padding, padding)
  return _convolve(images, kernel, stride, (sides, sides))


def _convolve(
  images: jax.Array,
  kernel: jax.Array,
  stride: int,
  padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
  """XLA's convolution, with the padding of small images done before it.

  With images smaller than the kernel XLA exchanges the two, which is off its
  fast path on a CPU: 2 x 2 pixels of 512 channels, as a ResNet has them of 64
  pixels, took 60 times as long. The barrier keeps the padding out of it.
  """
  if images.shape[1] < kernel.shape[0] or images.shape[2] < kernel.shape[1]:
    margins = [(0, 0, 0), *((*pair, 0) for pair in padding), (0, 0, 0)]
    zero = jnp.zeros((), images.dtype)
    images = lax.optimization_barrier(lax.pad(images, zero, margins))
    padding = ((0, 0), (0, 0))
  return lax.conv_general_dilated(
    images,
    kernel,
    window_strides=(stride, stride),
    padding=padding,
    dimension_numbers=_DIMENSIONS,
  )


def _native(
  images: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> jax.Array:
  """XLA's convolution."""
  return lax.conv_general_dilated(
    images,
    kernel,
    window_strides=(stride, stride),
    padding=((padding, padding), (padding, padding)),
    dimension_numbers=_DIMENSIONS,
  )


def _forward(
  images: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Forward pass of the custom derivative."""
  return _conv2d(images, kernel, stride, padding), (images, kernel)


def _backward(
  stride: int,
  padding: int,
  residuals: tuple[jax.Array, jax.Array],
  cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Gradients with respect to the images and the kernel."""
  images, kernel = residuals

  def native_image_gradient(
    kernel: jax.Array, cotangent: jax.Array
  ) -> jax.Array:
    _, vjp_fn = jax.vjp(lambda x: _native(x, kernel, stride, padding), images)
    return vjp_fn(cotangent)[0]

  def native_kernel_gradient(
    images: jax.Array, cotangent: jax.Array
  ) -> jax.Array:
    _, vjp_fn = jax.vjp(lambda k: _native(images, k, stride, padding), kernel)
    return vjp_fn(cotangent)[0]

  # Two choices, so that a gradient nobody uses can be removed.
  image_gradient = lax.platform_dependent(
    kernel,
    cotangent,
    cpu=functools.partial(
      _image_gradient,
      height=images.shape[1],
      width=images.shape[2],
      stride=stride,
      padding=padding,
    ),
    default=native_image_gradient,
  )
  kernel_gradient = lax.platform_dependent(
    images,
    cotangent,
    cpu=functools.partial(
      _kernel_gradient,
      kernel_size=(kernel.shape[0], kernel.shape[1]),
      stride=stride,
      padding=padding,
    ),
    default=native_kernel_gradient,
  )
  return image_gradient, kernel_gradient


_conv2d.defvjp(_forward, _backward)


def _image_gradient(
  kernel: jax.Array,
  cotangent: jax.Array,
  *,
  height: int,
  width: int,
  stride: int,
  padding: int,
) -> jax.Array:
  """Gradient with respect to the images.

  Args:
    kernel: `[K, L, C, O]`.
    cotangent: `[B, P, Q, O]`.
    height: Rows `H` of the images.
    width: Columns `W` of the images.
    stride: As for `conv2d`.
    padding: As for `conv2d`.

  Returns:
    `[B, H, W, C]`.
  """
  rows, columns, channels, _ = kernel.shape
  if channels <= _FEW_CHANNELS or rows == columns == 1:
    gradient_fn = _image_gradient_by_product
  else:
    gradient_fn = _image_gradient_by_phases
  return gradient_fn(kernel, cotangent, height, width, stride, padding)


def _image_gradient_by_phases(
  kernel: jax.Array,
  cotangent: jax.Array,
  height: int,
  width: int,
  stride: int,
  padding: int,
) -> jax.Array:
  """Image gradient as a convolution with stride 1.

  With `s` the stride, pixel `s * q + a` of the padded images receives
  `sum_r cotangent[q - r] * kernel[s * r + a]`, on both axes: a convolution over
  `q` for each phase `a` in `[0, s)`. Arguments as for `_image_gradient`.
  """
  rows, columns, channels, filters = kernel.shape
  batch, out_rows, out_columns, _ = cotangent.shape
  taps = -(-rows // stride), -(-columns // stride)
  kernel = jnp.pad(
    kernel,
    (
      (0, stride * taps[0] - rows),
      (0, stride * taps[1] - columns),
      (0, 0),
      (0, 0),
    ),
  )
  kernel = kernel.reshape(taps[0], stride, taps[1], stride, channels, filters)[
    ::-1, :, ::-1
  ]
  kernel = kernel.transpose(0, 2, 5, 1, 3, 4)
  kernel = kernel.reshape(*taps, filters, stride * stride * channels)
  # The barrier keeps XLA from folding the flip and the transposition into the
  # convolution, which would take it off the fast path.
  kernel = lax.optimization_barrier(kernel)
  # Only `q` in `[first, last)` reaches into the images.
  first = padding // stride
  last = -(-(padding + height) // stride), -(-(padding + width) // stride)
  phases = _convolve(
    cotangent,
    kernel,
    1,
    (
      (taps[0] - 1 - first, last[0] - out_rows),
      (taps[1] - 1 - first, last[1] - out_columns),
    ),
  )
  size = last[0] - first, last[1] - first
  phases = phases.reshape(batch, *size, stride, stride, channels)
  padded = phases.transpose(0, 1, 3, 2, 4, 5).reshape(
    batch, size[0] * stride, size[1] * stride, channels
  )
  start = padding - stride * first
  return padded[:, start : start + height, start : start + width]


def _image_gradient_by_product(
  kernel: jax.Array,
  cotangent: jax.Array,
  height: int,
  width: int,
  stride: int,
  padding: int,
) -> jax.Array:
  """Image gradient as one product and shifted sums, as `_image_gradient`."""
  rows, columns, _, _ = kernel.shape
  _, out_rows, out_columns, _ = cotangent.shape
  total_type = _total_type(cotangent)
  # `[B, P, Q, K, L, C]`: what an output adds to each pixel of its window.
  terms = jnp.einsum(
    "bpqo,klco->bpqklc", cotangent, kernel, preferred_element_type=total_type
  )
  # Negative margins cut off what falls into the padding.
  placed = (
    lax.pad(
      terms[:, :, :, i, j],
      jnp.zeros((), total_type),
      (
        (0, 0, 0),
        _margins(i, out_rows, height, stride, padding),
        _margins(j, out_columns, width, stride, padding),
        (0, 0, 0),
      ),
    )
    for i, j in itertools.product(range(rows), range(columns))
  )
  return functools.reduce(jnp.add, placed).astype(cotangent.dtype)


def _margins(
  offset: int, out_size: int, size: int, stride: int, padding: int
) -> tuple[int, int, int]:
  """Zeros (low, high, between) that put outputs at their pixels."""
  low = offset - padding
  return low, size - low - (stride * (out_size - 1) + 1), stride - 1


def _kernel_gradient(
  images: jax.Array,
  cotangent: jax.Array,
  *,
  kernel_size: tuple[int, int],
  stride: int,
  padding: int,
) -> jax.Array:
  """Gradient with respect to the kernel by matrix products.

  Args:
    images: `[B, H, W, C]`.
    cotangent: `[B, P, Q, O]`.
    kernel_size: Rows `K` and columns `L` of the kernel.
    stride: As for `conv2d`.
    padding: As for `conv2d`.

  Returns:
    `[K, L, C, O]`.
  """
  rows, columns = kernel_size
  batch, height, width, channels = images.shape
  _, out_rows, out_columns, filters = cotangent.shape
  total_type = _total_type(images)
  many_channels = channels >= MANY_CHANNELS

  def product(view: jax.Array, cotangent: jax.Array) -> jax.Array:
    return jnp.einsum(
      "bpqc,bpqo->co", view, cotangent, preferred_element_type=total_type
    )

  def part_gradient(images: jax.Array, cotangent: jax.Array) -> jax.Array:
    sides = (padding, padding)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
    # `[b, P, Q, C]` each: the pixel under one kernel tap, for every output.
    views = [
      padded[
        :,
        i : i + stride * (out_rows - 1) + 1 : stride,
        j : j + stride * (out_columns - 1) + 1 : stride,
      ]
      for i, j in itertools.product(range(rows), range(columns))
    ]
    if many_channels:
      gradient = jnp.stack([product(view, cotangent) for view in views])
    else:
      gradient = product(jnp.concatenate(views, axis=-1), cotangent)
    return gradient.reshape(rows, columns, channels, filters)

  if many_channels:
    image_size = height * width * channels
    part_bytes = IMAGE_PART_BYTES
  else:
    image_size = out_rows * out_columns * rows * columns * channels
    part_bytes = PATCH_PART_BYTES
  part_size = part_bytes // (image_size * images.dtype.itemsize)
  # Without views to keep in the cache there is nothing to gain from parts.
  if part_size >= batch or rows == columns == 1:
    return part_gradient(images, cotangent).astype(images.dtype)

  parts = _parts(images, part_size), _parts(cotangent, part_size)
  gradients = lax.map(lambda part: part_gradient(*part), parts)
  return gradients.sum(axis=0).astype(images.dtype)


def _total_type(array: jax.Array) -> jnp.dtype:
  """Type to add up in: short floats would lose the sum of many terms."""
  return jnp.promote_types(array.dtype, jnp.float32)


def _parts(array: jax.Array, size: int) -> jax.Array:
  """Split `[B, ...]` into `[B / b, b, ...]`, `b` at most `max(size, 1)`."""
  batch = array.shape[0]
  size = max(b for b in range(1, max(size, 1) + 1) if batch % b == 0)
  return array.reshape(batch // size, size, *array.shape[1:])
