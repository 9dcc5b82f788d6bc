"""Options of the programs, and recipes: named sets of options that are known.

A recipe's docstring-like comment gives what it measured, on two CPU cores.
"""

import dataclasses
from typing import Literal

from psg_jax import checks


@dataclasses.dataclass(frozen=True)
class Training:
  """How the original and the retrained model are trained."""

  learning_rate: float = 0.01
  momentum: float = 0.9
  weight_decay: float = 1e-4
  num_epochs: int = 15
  batch_size: int = 64
  augmentation: Literal["none", "flip", "crop_flip"] = "none"


@dataclasses.dataclass(frozen=True)
class Unlearning:
  """How the forget set is taken out; see `psg_jax.unlearning.unlearn`."""

  search: Literal["multi_step", "released"] = "multi_step"
  """Multi-step search, or the single step of the paper's released code."""
  num_steps: int = 50
  """Most steps of the search (T)."""
  step_size: float = 0.01
  """Step of the search (epsilon), in pixels of [0, 1]; released: 0.1."""
  step_decay: Literal["constant", "sqrt"] = "constant"
  max_distance: float | None = None
  """Radius of the ball around each image, in pixels of [0, 1]."""
  norm: Literal["linf", "l2"] = "linf"
  distance_weight: float = 0.0
  """lambda"""
  distance_decay: Literal["constant", "inverse", "exponential", "linear"] = (
    "constant"
  )
  distance_term: Literal["penalty", "reward"] = "penalty"
  noise_scale: float = 0.0
  """gamma"""
  noise: Literal["normal", "cauchy", "laplace", "uniform"] = "normal"
  confidence: float | None = None
  """kappa"""
  is_rounded: bool = False
  learning_rate: float = 1e-3
  momentum: float = 0.9
  weight_decay: float = 1e-4
  num_epochs: int | None = None
  """Passes over the forget set; None: 3, or as many as make 60 steps."""
  batch_size: int = 64
  retain_weight: float = 1.0
  """phi; 0 uses no retained image."""
  labels: Literal["hard", "soft", "soft_other", "raw_logits"] = "hard"
  retain_labels: Literal["hard", "soft", "raw_logits"] | None = None
  top_k: int | None = None
  batch_stats: Literal["update", "frozen"] = "update"
  refresh_labels: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
  """One job: a data set, a model, a forget request, and how to do it."""

  recipe: str = "digits"
  """The recipe whose values are the defaults of all other options."""
  name: str | None = None
  """Name of the run folder; the recipe's by default."""
  runs_dir: str = "runs"
  """Folder of the run folders."""
  resume: bool = False
  """Go on in a run folder that exists: what is finished is kept."""
  overwrite: bool = False
  """Replace a run folder that exists."""
  dataset: str = "digits"
  data_dir: str | None = None
  """Folder of the prepared data sets."""
  num_train: int | None = None
  """Use only the first so many training images."""
  model: str = "all_cnn"
  width: float = 1.0
  """Multiplies the model's number of filters."""
  weights: str | None = None
  """PyTorch state dict of the original model, instead of training it."""
  mean: tuple[float, ...] | None = None
  """The model's standardisation per channel; the training set's by default."""
  std: tuple[float, ...] | None = None
  forget_classes: tuple[int, ...] = (0,)
  retrained: bool = True
  """Also train the reference: a fresh model on the retained images alone."""
  seed: int = 2022
  num_devices: int | None = None
  """Devices to work on; all by default."""
  training: Training = dataclasses.field(default_factory=Training)
  unlearning: Unlearning = dataclasses.field(default_factory=Unlearning)


# The released code's own update: labels of its single step, no retain data.
RELEASED = Unlearning(
  search="released",
  step_size=0.1,
  learning_rate=1e-5,
  weight_decay=0.0,
  num_epochs=10,
  retain_weight=0.0,
)

# Without any retained image: what the original model says of the forget
# images, the old class apart, is all that holds the other classes in place, and
# statistics and weights move little.
NO_RETAIN_DATA = Unlearning(
  learning_rate=1e-4,
  num_epochs=2,
  retain_weight=0.0,
  labels="soft_other",
  batch_stats="frozen",
)

UNLEARNING: dict[str, Unlearning] = {
  "default": Unlearning(),
  "released": RELEASED,
  "no_retain_data": NO_RETAIN_DATA,
}

JOBS: dict[str, Job] = {
  "digits": Job(
    recipe="digits",
    dataset="digits",
    width=0.125,
    training=Training(num_epochs=5, learning_rate=0.01, batch_size=32),
  ),
  "fashion_mnist": Job(
    recipe="fashion_mnist",
    dataset="fashion_mnist",
    width=0.25,
    mean=(0.5,),
    std=(0.5,),
    training=Training(num_epochs=6, augmentation="flip"),
  ),
  "reference": Job(
    recipe="reference",
    dataset="fashion_mnist",
    num_train=12000,
    width=0.25,
    mean=(0.5,),
    std=(0.5,),
    training=Training(num_epochs=6),
  ),
  "cifar10": Job(
    recipe="cifar10",
    dataset="cifar10",
    num_train=10000,
    width=0.25,
    training=Training(num_epochs=8, augmentation="flip"),
  ),
}


def find(name: str) -> Job:
  """Returns the recipe of this name.

  Args:
    name: One of `JOBS`.

  Raises:
    ValueError: If there is none, with the nearest name.
  """
  checks.one_of("recipe", name, JOBS)
  return JOBS[name]


def method(name: str) -> Unlearning:
  """Returns the unlearning options of this name.

  Args:
    name: One of `UNLEARNING`.

  Raises:
    ValueError: If there is none, with the nearest name.
  """
  checks.one_of("method", name, UNLEARNING)
  return UNLEARNING[name]
