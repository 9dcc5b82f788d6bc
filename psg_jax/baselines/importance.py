"""Gradients over a whole data set, of a frozen network in inference mode.

Images on disk are read batch by batch. The squares of the gradients of single
images are taken a few images at a time, since each has the size of the network.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import parallel, progress, steps, streaming, types

# Images whose gradients are in memory at a time.
_PART_SIZE = 4


def mean_gradient(
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  *,
  batch_size: int = 64,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> chex.ArrayTree:
  """Computes the gradient of the mean cross-entropy with the labels.

  Args:
    model: The network.
    variables: Its variables.
    dataset: Images and labels, at least one.
    batch_size: Images at a time, positive.
    mesh: Devices to cut each batch over; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    A tree like the parameters.
  """
  return _sum_over(
    _add_gradients, model, variables, dataset, batch_size, mesh, show_progress
  )


def fisher(
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  *,
  is_expected: bool,
  batch_size: int = 64,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> chex.ArrayTree:
  """Computes the diagonal of the Fisher information, a mean over the images.

      F = mean_x Σ_y q_y(x) (∇_w log p_y(x))²

  Args:
    model: The network.
    variables: Its variables.
    dataset: Images and labels, at least one.
    is_expected: Whether `q` is the network's own prediction (the Fisher
      information proper, `K` gradients an image) or the image's label (the
      empirical one, one gradient).
    batch_size: Images at a time, positive.
    mesh: Devices to cut each batch over; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    A tree like the parameters, 0 or more.
  """
  add_fn = _add_expected_squares if is_expected else _add_squares
  return _sum_over(
    add_fn, model, variables, dataset, batch_size, mesh, show_progress
  )


def _sum_over(
  add_fn: Callable[..., chex.ArrayTree],
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  batch_size: int,
  mesh: jax.sharding.Mesh | None,
  show_progress: bool,
) -> chex.ArrayTree:
  """Adds up a gradient's function over the images, and divides by them."""
  num_images = len(dataset)
  width = parallel.padded_size(min(_PART_SIZE, num_images), mesh)
  depth = max(1, min(batch_size, num_images) // width)
  variables = parallel.replicate(variables, mesh)
  total = jax.tree.map(jnp.zeros_like, variables["params"])
  # The last batch is filled up from the first image on: one program.
  plan = [
    np.arange(start, start + width * depth) % num_images
    for start in range(0, num_images, width * depth)
  ]
  with progress.bar(
    "importance", num_images, unit="image", is_shown=show_progress
  ) as bar:
    for i, (rows, images) in enumerate(
      zip(plan, streaming.batches(dataset.images, plan), strict=True)
    ):
      num_real = min(len(rows), num_images - i * len(rows))
      parts = (images, dataset.labels[rows], np.arange(len(rows)) < num_real)
      total = add_fn(
        model.apply,
        variables,
        total,
        *parallel.shard(
          tuple(
            jnp.asarray(x.reshape(depth, width, *x.shape[1:])) for x in parts
          ),
          mesh,
          axis=1,
        ),
      )
      bar.advance(num_real)
  return jax.tree.map(lambda x: x / num_images, total)


def _log_probability(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  params: chex.ArrayTree,
  image: jax.Array,
  label: jax.Array,
) -> jax.Array:
  """The log-probability of a class for one image `[H, W, C]`."""
  logits = apply_fn({**variables, "params": params}, image[None])[0]
  return jax.nn.log_softmax(logits)[label]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_gradients(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  total: chex.ArrayTree,
  images: jax.Array,
  labels: jax.Array,
  is_real: jax.Array,
) -> chex.ArrayTree:
  """Adds the gradients of the cross-entropy of images `[D, W, ...]`."""

  def loss(params: chex.ArrayTree) -> jax.Array:
    pixels = steps.to_float(images.reshape(-1, *images.shape[2:]))
    logits = apply_fn({**variables, "params": params}, pixels)
    losses = steps.cross_entropy(logits, labels.reshape(-1))
    return jnp.sum(losses * is_real.reshape(-1))

  return jax.tree.map(jnp.add, total, jax.grad(loss)(variables["params"]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_squares(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  total: chex.ArrayTree,
  images: jax.Array,
  labels: jax.Array,
  is_real: jax.Array,
) -> chex.ArrayTree:
  """Adds the squared gradients of the labels' log-probabilities."""
  gradient_fn = jax.grad(functools.partial(_log_probability, apply_fn), 1)

  def square(image: jax.Array, label: jax.Array) -> chex.ArrayTree:
    gradient = gradient_fn(variables, variables["params"], image, label)
    return jax.tree.map(jnp.square, gradient)

  return _add_parts(square, total, images, labels, is_real)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_expected_squares(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  total: chex.ArrayTree,
  images: jax.Array,
  labels: jax.Array,
  is_real: jax.Array,
) -> chex.ArrayTree:
  """Adds squared gradients, in the mean over the network's prediction."""
  params = variables["params"]
  gradient_fn = jax.grad(functools.partial(_log_probability, apply_fn), 1)

  def square(image: jax.Array, label: jax.Array) -> chex.ArrayTree:
    del label
    probabilities = jax.nn.softmax(apply_fn(variables, image[None])[0])

    def add_class(index: jax.Array, total: chex.ArrayTree) -> chex.ArrayTree:
      gradient = gradient_fn(variables, params, image, index)
      return jax.tree.map(
        lambda x, y: x + probabilities[index] * jnp.square(y), total, gradient
      )

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, len(probabilities), add_class, zeros)

  return _add_parts(square, total, images, labels, is_real)


def _add_parts(
  fn: Callable[..., chex.ArrayTree],
  total: chex.ArrayTree,
  images: jax.Array,
  labels: jax.Array,
  is_real: jax.Array,
) -> chex.ArrayTree:
  """Adds `fn` of each real image, part by part `[D, W]`."""

  def add(total: chex.ArrayTree, part: tuple[jax.Array, ...]) -> tuple:
    pixels, classes, is_counted = part
    values = jax.vmap(fn)(steps.to_float(pixels), classes)
    return jax.tree.map(
      lambda x, y: x + jnp.tensordot(is_counted.astype(y.dtype), y, 1),
      total,
      values,
    ), None

  return jax.lax.scan(add, total, (images, labels, is_real))[0]
