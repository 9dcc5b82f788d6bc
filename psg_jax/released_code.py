"""The search of the paper's released code, as it is."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psg_jax import checks, search_inputs, types


def search(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
  *,
  model_mean: float | Sequence[float],
  model_std: float | Sequence[float],
  attack_mean: float | Sequence[float] = (0.4914, 0.4822, 0.2265),
  attack_std: float | Sequence[float] = (0.2023, 0.1994, 0.2010),
  step_size: float | jax.Array = 0.1,
  distance_weight: float | jax.Array = 0.0,
  noise_scale: float | jax.Array = 0.0,
) -> search_inputs.SearchOutput:
  """Takes the single step of the released code, quirks included.

  The released code de-normalises the network's input `u` with constants of
  its own, whatever the data was normalised with, and works on
  `p = u attack_std + attack_mean`:

      p' = round(clip(p + ε sign(g + λ (u - p) + γ z), 0, 1))

  with `g` the gradient of the batch's mean loss, so that λ acts through the
  difference of the two normalisations alone and γ is large relative to `g`.
  The label is the class predicted there, even where it is still `y`: such
  images have `is_crossed` False, and unlike those of `boundary.search` keep
  that class.

  Args:
    apply_fn: The network in inference mode.
    variables: Its variables, frozen.
    images: float `[B, H, W, C]` in [0, 1].
    labels: int `[B]`.
    key: One typed key, or one an image `[B]`.
    model_mean: The network's own standardisation, one value or one a channel.
    model_std: As `model_mean`, positive.
    attack_mean: What the attack assumes instead; of more values than there are
      channels the first are used.
    attack_std: As `attack_mean`, positive.
    step_size: `ε`, in the attack's pixel units, positive.
    distance_weight: `λ`, 0 or more.
    noise_scale: `γ`, 0 or more.

  Returns:
    The points and classes. `images` is in the units of the argument and may
    leave [0, 1], as the two normalisations differ; `distance` is the L∞
    distance in the attack's pixel units.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.

  References:
    Chen et al., Boundary Unlearning, CVPR 2023; Nahass et al., 2025.
  """
  images, labels = search_inputs.checked(apply_fn, variables, images, labels)
  scalars = {
    "step_size": step_size,
    "distance_weight": distance_weight,
    "noise_scale": noise_scale,
  }
  for name, value in scalars.items():
    checks.one_value(name, value)
  checks.number("step_size", step_size, above=0)
  checks.number("distance_weight", distance_weight, at_least=0)
  checks.number("noise_scale", noise_scale, at_least=0)
  checks.number("model_std", model_std, above=0)
  checks.number("attack_std", attack_std, above=0)
  num_channels, num_images = images.shape[-1], len(images)
  keys = search_inputs.keys_of(key, num_images)
  if not num_images:
    # Networks need not take a batch of none, whose mean loss is none either.
    images, labels = (
      jnp.zeros((1, *x.shape[1:]), x.dtype) for x in (images, labels)
    )
    keys = search_inputs.sample_keys(jax.random.key(0), labels)
  output: search_inputs.SearchOutput = _jitted_search(
    apply_fn,
    variables,
    images,
    labels,
    keys,
    _channels("model_mean", model_mean, num_channels),
    _channels("model_std", model_std, num_channels),
    _channels("attack_mean", attack_mean, num_channels),
    _channels("attack_std", attack_std, num_channels),
    *(
      search_inputs.to_type(x, search_inputs.working_type(images))
      for x in scalars.values()
    ),
  )
  return output if num_images else jax.tree.map(lambda x: x[:0], output)


@functools.partial(jax.jit, static_argnums=0)
def _jitted_search(
  apply_fn: types.ApplyFn, *arguments: Any
) -> search_inputs.SearchOutput:
  fn = functools.partial(_search, apply_fn)
  return search_inputs.on_automatic_axes(fn, *arguments)


def _search(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
  keys: jax.Array,
  model_mean: jax.Array,
  model_std: jax.Array,
  attack_mean: jax.Array,
  attack_std: jax.Array,
  step_size: jax.Array,
  distance_weight: jax.Array,
  noise_scale: jax.Array,
) -> search_inputs.SearchOutput:
  dtype = search_inputs.working_type(images)
  normalised = (images.astype(dtype) - model_mean) / model_std
  pixels = normalised * attack_std + attack_mean

  def to_images(pixels: jax.Array) -> jax.Array:
    moved = (pixels - attack_mean) / attack_std * model_std + model_mean
    return moved.astype(images.dtype)

  def mean_loss(pixels: jax.Array) -> jax.Array:
    logits = apply_fn(variables, to_images(pixels))
    return jax.vmap(_cross_entropy)(logits, labels).mean()

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, pixels.shape[1:], pixels.dtype)

  direction = (
    jax.grad(mean_loss)(pixels)
    + distance_weight * (normalised - pixels)
    + noise_scale * jax.vmap(draw)(keys)
  )
  moved = jnp.clip(pixels + step_size * jnp.sign(direction), 0.0, 1.0)
  moved = search_inputs.round_to_grey_levels(moved)
  logits = apply_fn(variables, to_images(moved))
  reached = jnp.argmax(logits, -1).astype(jnp.int32)
  return search_inputs.SearchOutput(
    images=to_images(moved),
    labels=reached,
    logits=logits,
    is_crossed=reached != labels,
    distance=jnp.abs(moved - pixels).max((1, 2, 3)),
    num_steps=jnp.ones_like(reached),
  )


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  return jax.nn.logsumexp(logits) - search_inputs.at(logits, label)


def _channels(
  name: str, values: float | Sequence[float], num_channels: int
) -> jax.Array:
  given = jnp.asarray(values, jnp.float32).reshape(-1)[:num_channels]
  if len(given) not in (1, num_channels):
    raise ValueError(
      f"{name} must be one value or {num_channels}, got {values}"
    )
  return jnp.broadcast_to(given, (num_channels,))
