"""AMUN: finetuning beside the nearest adversarial images of the forget set."""

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import (
  batches,
  boundary,
  checks,
  optimizers,
  parallel,
  progress,
  relabelling,
  steps,
  streaming,
  types,
)
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 10,
  "batch_size": 128,
  "optimizer": optimizers.sgd(0.01, weight_decay=5e-4),
  "description": "AMUN",
}
# A step is a tenth of the radius.
_STEP = 0.1


class Adversarial(NamedTuple):
  """Adversarial images, one for each image.

  Attributes:
    images: uint8 `[N, H, W, C]`; the image itself where none was found.
    labels: int32 `[N]`, what the model predicts there.
    radii: float32 `[N]`, of the ball it was found in, in pixel units; infinite
      where none was found.
  """

  images: np.ndarray
  labels: np.ndarray
  radii: np.ndarray


def amun(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  retain_fraction: float = 1.0,
  start_radius: float = 0.04,
  num_steps: int = 50,
  search_batch_size: int = 128,
  **options: Any,
) -> common.Output:
  """Finetunes on forget images, their adversarial images and retained ones.

      loss = mean CE(f_w(x), y)   over   A ∪ F ∪ R

  in minibatches of all, shuffled together. `A` are the nearest adversarial
  images of the forget set with the *wrong* classes that the original model
  sees in them; the forget images `F` keep their *true* labels, in the form
  with retained images as in that without (`retain_fraction=0`). So the model
  is less sure of them, and not wrong.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget and the retain set.
    key: One typed key, for the choice and the order.
    retain_fraction: Part of the retain set that is used, drawn at random, in
      [0, 1]; 0 for the form without retained images.
    start_radius: As for `nearest_adversarial`, and likewise `num_steps`.
    num_steps: See there.
    search_batch_size: Images searched at a time, positive.
    **options: Those of `engine.Passes`; by default 10 passes over all these
      images in minibatches of 128, and SGD with a learning rate of 0.01,
      momentum 0.9 and weight decay 5e-4. The authors choose the rate, and
      whether it falls to a tenth after 1, 5 or all of the 10 passes.

  Returns:
    The variables, and one record a pass: `epoch` from 1, loss (nats) and
    accuracy as it went, `forget_loss` and `forget_accuracy` of `A` and `F`
    together, `retain_loss` and `retain_accuracy`, `step_losses` and `seconds`;
    the first has `search_seconds`, spent before it, and `num_adversarial`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range, or no
      forget image has an adversarial one.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Ebrahimpour-Boroojeny et al., AMUN: Adversarial Machine UNlearning (Not All
    Wrong is Bad: Using Adversarial Examples for Unlearning), 2025.
  """
  checks.number("retain_fraction", retain_fraction, at_least=0, at_most=1)
  has_retain = retain_fraction > 0
  passes = common.passes(
    *(model, variables, split, key, options, DEFAULTS), needs_retain=has_retain
  )
  search_key, choice_key, *keys = jax.random.split(key, 4)
  start = time.perf_counter()
  adversarial = nearest_adversarial(
    *(model, variables, split.forget, search_key),
    start_radius=start_radius,
    num_steps=num_steps,
    batch_size=search_batch_size,
    mesh=passes.mesh,
    show_progress=passes.show_progress,
  )
  search_seconds = time.perf_counter() - start
  rows = np.flatnonzero(np.isfinite(adversarial.radii))
  if not rows.size:
    raise ValueError(
      "split.forget must have images that the model sees another class near,"
      f" got none of {len(split.forget)}"
    )
  images: Any = streaming.concatenate(
    [adversarial.images[rows], split.forget.images]
  )
  forget = types.Dataset(
    images=images,
    labels=np.concatenate([adversarial.labels[rows], split.forget.labels]),
    class_names=split.forget.class_names,
  )
  retain = split.retain
  if has_retain:
    retain = batches.take_fraction(retain, retain_fraction, choice_key)
  output = common.train(
    *(model, variables, types.Split(forget, retain), keys, passes),
    plan_fn=batches.mixed if has_retain else batches.forget_only,
  )
  if output.history:
    output.history[0]["search_seconds"] = search_seconds
    output.history[0]["num_adversarial"] = rows.size
  return output


def nearest_adversarial(
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  key: jax.Array,
  *,
  start_radius: float = 0.04,
  num_steps: int = 50,
  batch_size: int = 128,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> Adversarial:
  """Finds for each image a near one that the model predicts otherwise.

  By projected gradient ascent of the loss in a ball (L2), in steps of a tenth
  of its radius, which stops where the prediction is not the label. The radius
  is doubled for the images that did not get there, from the image again, until
  all did or the ball has all images in it. The points lie on grey levels, as
  the pixels of a data set do: in the smallest balls there is none but the
  image, and the authors' floats are somewhat nearer. An image that the model
  has wrong already is its own.

  Args:
    model: The network.
    variables: Its variables.
    dataset: The images and the labels to leave.
    key: One typed key.
    start_radius: The first radius, in pixel units, positive.
    num_steps: Steps in each ball, positive.
    batch_size: Images at a time, positive.
    mesh: Devices to cut each batch over; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    The images.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
  """
  checks.number("start_radius", start_radius, above=0)
  checks.integer("num_steps", num_steps, at_least=1)
  checks.integer("batch_size", batch_size, at_least=1)
  if not len(dataset):
    raise ValueError("dataset must not be empty, got 0 images")
  images = np.asarray(dataset.images[:])
  result = Adversarial(
    images=images.copy(),
    labels=np.array(dataset.labels, np.int32),
    radii=np.full(len(dataset), np.inf, np.float32),
  )
  farthest = math.sqrt(math.prod(images.shape[1:]))
  # Batches of one size, with little to fill up.
  num_batches = -(-len(dataset) // batch_size)
  batch_size = -(-len(dataset) // num_batches)
  radius, rows = start_radius, np.arange(len(dataset))
  with progress.bar(
    "adversarial images", len(rows), unit="image", is_shown=show_progress
  ) as bar:
    while rows.size and radius < 2 * farthest:
      fn = _search(radius, num_steps, mesh)
      for start in range(0, len(rows), batch_size):
        # The last batch is filled up: one program for all.
        places = rows[np.arange(start, start + batch_size) % len(rows)]
        output = fn(
          model.apply,
          variables,
          steps.to_float(jnp.asarray(images[places])),
          jnp.asarray(dataset.labels[places]),
          key,
        )
        is_across = np.asarray(output.is_crossed)
        across = places[is_across]
        levels = np.rint(np.asarray(output.images)[is_across] * 255)
        result.images[across] = levels.astype(np.uint8)
        result.labels[across] = np.asarray(output.labels)[is_across]
        result.radii[across] = radius
      num_before, rows = len(rows), rows[np.isinf(result.radii[rows])]
      bar.advance(num_before - len(rows), radius=radius)
      radius *= 2
  return result


def _search(
  radius: float, num_steps: int, mesh: jax.sharding.Mesh | None
) -> relabelling.SearchFn:
  search = boundary.Search(
    num_steps=num_steps,
    step_size=_STEP * radius,
    max_distance=radius,
    norm="l2",
    is_rounded=True,
  )
  if mesh is None:
    return search
  return functools.partial(parallel.search, mesh=mesh, search=search)
