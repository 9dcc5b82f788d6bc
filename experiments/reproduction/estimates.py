"""What a job takes, from shapes alone: no image is read, nothing is trained."""

import functools
import math

import jax
import jax.numpy as jnp

from experiments import recipes
from psg_jax import models, types

# Convolution, normalisation and activation each keep their output for the
# gradients, in training.
_KEPT_PER_LAYER = 3
# Weights, momentum, gradients and the update.
_COPIES = 4
# Of sets that need not be there: pixels a side, channels, classes.
_SHAPES = {
  "digits": (32, 1, 10),
  "phantom_digits": (32, 1, 10),
  "fashion_mnist": (32, 1, 10),
  "cifar10": (32, 3, 10),
  "pathmnist": (32, 3, 9),
  "svhn": (32, 3, 10),
  "brain_tumor_mri": (224, 3, 4),
  "fundus": (224, 3, 3),
  "phantom_fundus": (64, 3, 3),
}


def shapes(job: recipes.Job) -> tuple[tuple[int, int, int, int], int]:
  """Returns the shape of a minibatch in training, and how many classes."""
  name, _, size = job.dataset.partition("@")
  side, channels, num_classes = _SHAPES[name]
  side = int(size) if size else side
  batch = job.training.batch_size // job.training.num_parts
  return (batch, side, side, channels), num_classes


def num_parameters(job: recipes.Job) -> int:
  """Returns how many trained numbers the job's network has."""
  variables, _ = _traced(job)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))


def training_bytes(job: recipes.Job) -> int:
  """Estimates the memory of training, without the images.

  Four times the weights, and three times what the network's convolutions give
  for a minibatch: an upper bound where the compiler keeps less.
  """
  variables, num_outputs = _traced(job)
  weights = sum(math.prod(x.shape) for x in jax.tree.leaves(variables))
  width = 2 if job.precision == "bfloat16" else 4
  return 4 * _COPIES * weights + width * _KEPT_PER_LAYER * num_outputs


@functools.lru_cache
def _traced(job: recipes.Job) -> tuple[types.Variables, int]:
  """Returns the shapes of variables, and how much all convolutions give."""
  shape, num_classes = shapes(job)
  model = models.create(
    job.model,
    num_classes=num_classes,
    num_channels=shape[-1],
    width=job.width,
    dropout=job.dropout,
    mean=(0.5,) * shape[-1],
    std=(0.5,) * shape[-1],
  )
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  key = jax.random.key(0)
  variables = jax.eval_shape(model.init, key, image)
  program = jax.make_jaxpr(model.apply)(variables, image)
  return variables, _outputs(program.jaxpr)


def _outputs(jaxpr: object) -> int:
  """Sums what convolutions and products give, in calls as well."""
  total = 0
  for equation in getattr(jaxpr, "eqns", ()):
    if equation.primitive.name in ("conv_general_dilated", "dot_general"):
      total += sum(math.prod(x.aval.shape) for x in equation.outvars)
      continue
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      total += _outputs(inner)
  return total
