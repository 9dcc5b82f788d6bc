"""The jobs that experiments stand on: data, network, training, by size."""

import dataclasses
from typing import Any

from experiments import recipes

# The released choices of λ and γ by data set.
RELEASED_CHOICES = {
  "cifar10": (1e-3, 1e-2),
  "cfp_os": (1e-3, 1e-2),
  "mri": (0.1, 0.1),
}
_OTHER_CHOICE = (0.0, 1e-4)


_TINY = recipes.Job(
  recipe="digits",
  dataset="digits",
  width=0.125,
  mean=(0.3,),
  std=(0.3,),
  num_train=400,
  twins="ignore",
  training=recipes.Training(learning_rate=0.1, num_epochs=4, batch_size=32),
)
_SMALL = recipes.Training(learning_rate=0.1, num_epochs=6, batch_size=32)
_PAPER_TRAINING = recipes.Training(
  learning_rate=0.01,
  schedule="constant",
  num_epochs=25,
  augmentation="crop_flip",
)
_SMALL_FLIPPED = dataclasses.replace(_SMALL, augmentation="flip")
_PAPER_FLIPPED = dataclasses.replace(
  _PAPER_TRAINING, num_epochs=15, augmentation="flip"
)
_SMALL_MEDICAL = dataclasses.replace(
  recipes.JOBS["mri"].training, num_epochs=10
)

_FASHION = recipes.Job(
  recipe="fashion_mnist",
  dataset="fashion_mnist",
  mean=(0.5,),
  std=(0.5,),
  twins="ignore",
)
# Constants, and not the images' own: one program serves all models.
_CIFAR = recipes.Job(
  recipe="cifar10",
  dataset="cifar10",
  mean=(0.4914, 0.4822, 0.4465),
  std=(0.2470, 0.2435, 0.2616),
  twins="ignore",
)
_COLOURS = dataclasses.replace(
  _CIFAR, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)


def _of_all_cnn(
  job: recipes.Job, small: recipes.Training, paper: recipes.Training
) -> dict[str, recipes.Job]:
  """The sizes of a set that the paper trains its All-CNN on."""
  return {
    "smoke": _TINY,
    "cpu": dataclasses.replace(
      job, num_train=2500, width=0.125, training=small
    ),
    "full": dataclasses.replace(job, training=paper),
  }


# By data set of the paper and size.
BASES: dict[str, dict[str, recipes.Job]] = {
  "fashion_mnist": _of_all_cnn(_FASHION, _SMALL, _PAPER_FLIPPED),
  "cifar10": _of_all_cnn(_CIFAR, _SMALL_FLIPPED, _PAPER_TRAINING),
  "mri": {
    "smoke": _TINY,
    "cpu": dataclasses.replace(
      recipes.JOBS["mri"],
      dataset="brain_tumor_mri@32",
      twins="ignore",
      num_train=1500,
      training=_SMALL_MEDICAL,
    ),
    "full": recipes.JOBS["mri_resnet50"],
  },
  "cfp_os": {
    "smoke": _TINY,
    "cpu": dataclasses.replace(
      recipes.JOBS["fundus_class"],
      dataset="fundus@32",
      twins="ignore",
      num_train=1500,
      training=dataclasses.replace(_SMALL_MEDICAL, learning_rate=0.2),
    ),
    "full": dataclasses.replace(
      recipes.JOBS["fundus_camera_resnet50"],
      where=None,
      forget_classes=("diabetic_retinopathy",),
    ),
  },
  "retinas": {
    "smoke": _TINY,
    "cpu": dataclasses.replace(
      recipes.JOBS["phantom_patient"],
      dataset="phantom_fundus@32",
      twins="ignore",
      num_train=800,
      training=dataclasses.replace(
        recipes.JOBS["phantom_patient"].training, num_epochs=10
      ),
    ),
    "full": dataclasses.replace(recipes.JOBS["phantom_patient"], width=1.0),
  },
  "devices": {
    "smoke": dataclasses.replace(_TINY, dataset="phantom_digits"),
    "cpu": dataclasses.replace(
      recipes.JOBS["digits"], dataset="phantom_digits", twins="ignore"
    ),
    "full": dataclasses.replace(
      recipes.JOBS["digits"], dataset="phantom_digits", width=1.0
    ),
  },
  "pathmnist": _of_all_cnn(
    dataclasses.replace(_COLOURS, dataset="pathmnist"),
    _SMALL_FLIPPED,
    _PAPER_FLIPPED,
  ),
  "svhn": _of_all_cnn(
    dataclasses.replace(_COLOURS, dataset="svhn"),
    _SMALL,
    dataclasses.replace(_PAPER_TRAINING, num_epochs=15),
  ),
}


def asking(job: recipes.Job, **request: Any) -> recipes.Job:
  """Returns a job with a request of its own in the place of the recipe's."""
  nothing = {
    "forget_classes": (),
    "where": None,
    "ids": None,
    "group": None,
    "fraction": 1.0,
  }
  return dataclasses.replace(job, **nothing | request)


def is_for_classes(job: recipes.Job) -> bool:
  """Whether a job of these experiments forgets whole classes."""
  return bool(job.forget_classes) and job.fraction == 1 and not job.where


def with_method(job: recipes.Job, name: str, dataset: str) -> recipes.Job:
  """Returns a job with the unlearning options of this name.

  Those of the paper and of the released code have their λ and γ of the data
  set. `proxies` has them train, which on sets as small as those of size cpu is
  not the default.
  """
  options = {
    "recommended": recipes.Unlearning(),
    "proxies": recipes.Unlearning(target="proxy"),
    "all_layers": dataclasses.replace(
      recipes.NO_RETAIN_DATA, layers=(), num_layers=0
    ),
  }.get(name) or recipes.method(name)
  if name in ("paper", "released"):
    weight, noise = RELEASED_CHOICES.get(dataset, _OTHER_CHOICE)
    options = dataclasses.replace(
      options, distance_weight=weight, noise_scale=noise
    )
  if is_for_classes(job):
    options = dataclasses.replace(options, target="zero")
  return dataclasses.replace(job, unlearning=options)


METHODS = ("released", "paper", "recommended")
