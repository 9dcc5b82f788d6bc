"""Options of the programs, and recipes: named sets of options that are known.

Learning rates of training were chosen by `experiments.tune`, on a validation
part of the training set; the tables and what they leave open are in
docs/tuning. Where a recipe names none, the rate is not from a table.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from psg_jax import checks, unlearning


def _read_class(texts: list[str]) -> int | str:
  """Reads a class; what is not written as numbers are (01) is a name."""
  (text,) = texts
  return int(text) if re.fullmatch(r"0|-?[1-9][0-9]*", text) else text


_CLASS = tyro.constructors.PrimitiveConstructorSpec[int | str](
  nargs=1,
  metavar="INT|STR",
  instance_from_str=_read_class,
  is_instance=lambda value: isinstance(value, int | str),
  str_from_instance=lambda value: [str(value)],
)


@dataclasses.dataclass(frozen=True)
class Training:
  """How the original and the retrained model are trained."""

  learning_rate: float = 0.05
  """The highest, where the schedule is not constant."""
  schedule: Literal["one_cycle", "constant"] = "one_cycle"
  """Of the learning rate: up and then down to 0, or the paper's constant."""
  momentum: float = 0.9
  weight_decay: float = 1e-4
  num_epochs: int = 15
  batch_size: int = 64
  augmentation: Literal["none", "flip", "crop_flip", "medical"] = "none"
  """medical: flip, rotation to 15 degrees, colour jitter, random crop."""
  num_parts: int = 1
  """Gradient accumulation: parts of a minibatch, one after the other."""


@dataclasses.dataclass(frozen=True)
class Unlearning:
  """How the forget set is taken out; see `psg_jax.unlearning.unlearn`."""

  search: Literal["multi_step", "released"] = "multi_step"
  """Multi-step search, or the single step of the paper's released code."""
  num_steps: int = 50
  """Most steps of the search (T)."""
  search_batch_size: int = 128
  """Images searched at a time; fewer take less memory, for the same result."""
  step_size: float = 0.03
  """First step of the search (epsilon), in pixels of [0, 1]; released: 0.1.
  With the norm l2 it is the length of the whole step, and must be larger."""
  step_growth: float = 2.0
  """Each step of the search is so many times as long as the one before."""
  num_bisections: int = 3
  """So often the step that crossed the boundary is halved, back towards it."""
  step_decay: Literal["constant", "sqrt"] = "constant"
  max_distance: float | None = None
  """Radius of the ball around each image, in pixels of [0, 1]."""
  norm: Literal["linf", "l2"] = "linf"
  """Of the steps, the ball and the distance."""
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
  """kappa: ends a search at this probability of the old class, before the
  boundary; it can only stop earlier."""
  is_rounded: bool = False
  learning_rate: float = 1e-2
  """The highest, where the schedule is not constant."""
  schedule: Literal["one_cycle", "constant"] = "one_cycle"
  momentum: float = 0.9
  weight_decay: float = 1e-4
  num_epochs: int | None = None
  """Passes over the forget set; None: 1, 2 where the last layers alone are
  moved, or as many as make 120 steps, of 960 images at least."""
  batch_size: int | None = None
  """Forget images a step; None: 4 where the last layers alone are moved, else
  8."""
  retain_batch_size: int | None = None
  """Retained images beside them; None: three for each."""
  retain_weight: float = 1.0
  """phi; 0 uses no retained image."""
  labels: Literal["hard", "soft", "soft_other", "raw_logits"] = "soft_other"
  """hard: the class across the boundary; soft: a prediction of the original;
  soft_other: the same without the old class; raw_logits: as released."""
  image_weight: float | None = None
  """Where soft labels are taken: 0, at the boundary; 1, at the image itself;
  None: 0.5 with soft_other, else 0."""
  num_refits: int | None = None
  """Copies with new last layers, trained on half a pass over the retained
  images, some 140 steps at least, whose mean prediction is half of soft_other
  targets; None: 1 for whole classes where they can be trained, else 0."""
  retain_labels: Literal["hard", "soft", "raw_logits"] | None = None
  top_k: int | None = None
  batch_stats: Literal["update", "frozen"] | None = None
  """None: frozen where the last layers alone are moved, else update."""
  num_layers: int | None = None
  """The last so many layers are moved; 0: all; None: 4 for whole classes with
  soft_other labels, else 0."""
  layers: tuple[str, ...] = ()
  """Layers that are moved, by the beginning of their names (head, layer4),
  instead of so many at the end."""
  refresh_labels: bool = False
  target: Literal["auto", "zero", "unseen", "proxy"] = "auto"
  """When to stop: zero, after all passes; unseen, when the accuracy on the
  forget set is that of the original on unseen images of the same kind, a part
  of the test images that is in no figure; proxy, when it is what models say
  that never saw the forget set and are trained on a part of the retained one,
  whose predictions are the targets then; auto, zero for whole classes, else
  proxy where that costs a fifth of a retraining at most, or unseen."""
  num_proxies: int = 2
  """Such models, at least 2."""
  proxy_fraction: float = 0.1
  """Part of the retained images that each of them is trained on. Where it makes
  less than 200 steps, minibatches are smaller, down to 32, then images more."""
  max_cycles: int = 4
  """How often all passes are made at most to come to the target."""
  augmentation: Literal["none", "flip", "crop_flip", "medical"] | None = None
  """Of the images of the update; None: as in training."""
  num_parts: int = 1
  """Gradient accumulation: parts of a minibatch, one after the other."""

  @property
  def forget_batch_size(self) -> int:
    """Forget images a step, by default those where all layers are moved."""
    return self.batch_size or unlearning.BATCH_SIZE


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
  dataset: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "digits"
  """A prepared set (name, or name@size), or a folder or zip of images by
  class, which is prepared on first use."""
  data_dir: str | None = None
  """Folder of the prepared data sets."""
  metadata: str | None = None
  """CSV with a column `file`, for a folder or zip that has none in it."""
  encoding: str | None = None
  """Of that file, such as latin-1; UTF-8 or UTF-16 where not given."""
  window: str | None = None
  """How DICOM files become grey levels: file (the window that each states,
  else the range of all), full (that range), or CENTER,WIDTH."""
  skip_corrupt: bool = False
  """Leave out images of a folder or zip that cannot be decoded."""
  image_size: int = 224
  """Pixels a side, for a folder or zip."""
  streaming: bool = False
  """Read images from disk as they are needed, in worker processes."""
  num_train: int | None = None
  """Use only the first so many training images."""
  model: str = "all_cnn"
  width: float = 1.0
  """Multiplies the model's number of filters."""
  dropout: float = 0.0
  """Before the linear head, in training."""
  precision: Literal["float32", "bfloat16"] = "float32"
  """Of the computation; weights and logits are float32."""
  eval_batch_size: int = 256
  """Images predicted at a time; fewer take less memory, for the same result."""
  rematerialise: bool = False
  """Compute activations twice instead of keeping them: less memory."""
  pretrained: str | None = None
  """PyTorch state dict to start training from, all but the head."""
  weights: str | None = None
  """PyTorch state dict of the original model, instead of training it. Of images
  of one's own it has seen all, but those in a folder test or of --unseen."""
  unseen: str | None = None
  """SQL condition, such as "split = 'test'", for the images of one's own that
  the model of --weights has not seen."""
  mean: tuple[float, ...] | None = None
  """The model's standardisation per channel; that of the images that a model
  is trained on by default."""
  std: tuple[float, ...] | None = None
  forget_classes: tuple[Annotated[int | str, _CLASS], ...] = (0,)
  """Classes to forget, by name or number; with what follows: AND."""
  where: str | None = None
  """SQL condition over the metadata, such as "device = 'B' AND year < 2016"."""
  ids: str | None = None
  """File with an image id a line."""
  fraction: float = 1.0
  """Part of the matching images (with group: of the groups) to forget; alone,
  of all images."""
  request_seed: int = 0
  """Of the random choice that a fraction needs."""
  group: str | None = None
  """Column, such as patient_id, whose groups are forgotten as a whole."""
  request: str | None = None
  """JSON file of a request, instead of the options above."""
  twins: Literal["ignore", "report", "move"] = "report"
  """Duplicates of forget images: report them, or forget them too."""
  by: tuple[str, ...] = ()
  """Columns to show results by; by default those with a few values."""
  retrained: bool = True
  """Also train the reference: a fresh model on the retained images alone."""
  references: int = 1
  """Retrained models, of the seeds from --seed on: one cannot say how far two
  are from each other, and with three a distance can be judged."""
  seed: int = 2022
  num_devices: int | None = None
  """Devices to work on; all by default."""
  training: Training = dataclasses.field(default_factory=Training)
  unlearning: Unlearning = dataclasses.field(default_factory=Unlearning)


# The released code's own update: labels of its single step, no retain data.
RELEASED = Unlearning(
  search="released",
  step_size=0.1,
  step_growth=1.0,
  num_bisections=0,
  labels="hard",
  batch_size=64,
  target="unseen",
  max_cycles=1,
  learning_rate=1e-5,
  schedule="constant",
  weight_decay=0.0,
  num_epochs=10,
  retain_weight=0.0,
  augmentation="none",
)

# Without any retained image nothing holds features and statistics in place:
# only the head is moved, on validation images the nearest to retraining. What
# the features know of the old class stays in them.
NO_RETAIN_DATA = Unlearning(
  learning_rate=0.01,
  retain_weight=0.0,
  batch_stats="frozen",
  layers=("head",),
)

# The paper's own form: a search of constant steps, and the class it reaches.
PAPER = Unlearning(
  step_size=0.01,
  step_growth=1.0,
  num_bisections=0,
  labels="hard",
  learning_rate=2e-3,
  num_epochs=3,
  batch_size=64,
  retain_batch_size=64,
  target="unseen",
  max_cycles=1,
  augmentation="none",
)

UNLEARNING: dict[str, Unlearning] = {
  "default": Unlearning(),
  "paper": PAPER,
  "released": RELEASED,
  "no_retain_data": NO_RETAIN_DATA,
}

# Medical sets at a size that two cores train in minutes; from docs/tuning.
_SMALL_MEDICAL = Training(
  learning_rate=0.2, num_epochs=30, batch_size=32, augmentation="flip"
)
_PHANTOM = Training(num_epochs=12, batch_size=32, augmentation="flip")
_PAPER_MEDICAL = Training(
  learning_rate=1e-3,
  schedule="constant",
  num_epochs=15,
  batch_size=16,
  augmentation="medical",
)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_REFERENCE = Job(
  recipe="reference",
  dataset="fashion_mnist",
  num_train=12000,
  width=0.25,
  mean=(0.5,),
  std=(0.5,),
  training=Training(learning_rate=0.1, num_epochs=6),
)

JOBS: dict[str, Job] = {
  "digits": Job(
    recipe="digits",
    dataset="digits",
    width=0.125,
    # Not the images' own: one program serves the original and the retrained.
    mean=(0.3,),
    std=(0.3,),
    references=3,
    # docs/tuning/digits.csv.
    training=Training(learning_rate=0.1, num_epochs=8, batch_size=16),
  ),
  "fashion_mnist": Job(
    recipe="fashion_mnist",
    dataset="fashion_mnist",
    width=0.25,
    mean=(0.5,),
    std=(0.5,),
    # The rate of docs/tuning/reference.csv.
    training=Training(learning_rate=0.1, num_epochs=4, augmentation="flip"),
  ),
  "reference": _REFERENCE,
  # The same at the paper's rate.
  "reference_constant": dataclasses.replace(
    _REFERENCE,
    recipe="reference_constant",
    training=Training(learning_rate=0.01, schedule="constant", num_epochs=6),
    unlearning=dataclasses.replace(
      PAPER, learning_rate=1e-3, schedule="constant"
    ),
  ),
  "cifar10": Job(
    recipe="cifar10",
    dataset="cifar10",
    num_train=10000,
    width=0.25,
    training=Training(num_epochs=8, batch_size=16, augmentation="flip"),
  ),
  "mri": Job(
    recipe="mri",
    dataset="brain_tumor_mri@64",
    width=0.125,
    forget_classes=("glioma",),
    twins="move",
    training=dataclasses.replace(
      _SMALL_MEDICAL, learning_rate=0.1, num_epochs=20
    ),
  ),
  "fundus_class": Job(
    recipe="fundus_class",
    dataset="fundus@64",
    width=0.125,
    forget_classes=("diabetic_retinopathy",),
    training=_SMALL_MEDICAL,
  ),
  "fundus_camera": Job(
    recipe="fundus_camera",
    dataset="fundus@64",
    width=0.125,
    forget_classes=(),
    where="source = 'hrf-png'",
    training=_SMALL_MEDICAL,
  ),
  "phantom_patient": Job(
    recipe="phantom_patient",
    dataset="phantom_fundus",
    width=0.125,
    forget_classes=(),
    where="patient_id = 'P0014'",
    group="patient_id",
    training=_PHANTOM,
  ),
  "phantom_dates": Job(
    recipe="phantom_dates",
    dataset="phantom_fundus",
    width=0.125,
    forget_classes=(),
    where="device = 'Cirrus 800 FA' AND exam_date < DATE '2016-01-01'",
    training=_PHANTOM,
  ),
  "phantom_threshold": Job(
    recipe="phantom_threshold",
    dataset="phantom_fundus",
    width=0.125,
    forget_classes=(),
    where="(left_vert_pf + right_vert_pf) / 2 > 11",
    training=_PHANTOM,
  ),
  # Images of one's own, chosen where --data is a folder or zip: torchvision's
  # network and standardisation, as most PyTorch checkpoints have them. The last
  # batch is filled up: of few images a large one is mostly filling.
  "own": Job(
    recipe="own",
    model="resnet50",
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    dropout=0.5,
    eval_batch_size=64,
    forget_classes=(),
    training=_PAPER_MEDICAL,
    unlearning=Unlearning(search_batch_size=32),
  ),
  # The paper's own sizes, for a GPU: the weights are torchvision's, given with
  # --pretrained resnet50.safetensors.
  "mri_resnet50": Job(
    recipe="mri_resnet50",
    dataset="brain_tumor_mri@512",
    model="resnet50",
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    dropout=0.5,
    streaming=True,
    eval_batch_size=32,
    forget_classes=("glioma",),
    training=_PAPER_MEDICAL,
    unlearning=Unlearning(search_batch_size=16),
  ),
  "fundus_camera_resnet50": Job(
    recipe="fundus_camera_resnet50",
    dataset="fundus@512",
    model="resnet50",
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    dropout=0.5,
    streaming=True,
    eval_batch_size=32,
    forget_classes=(),
    where="source = 'hrf-png'",
    training=_PAPER_MEDICAL,
    unlearning=Unlearning(search_batch_size=16),
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


def upgraded(unlearning: Mapping[str, Any]) -> dict[str, Any]:
  """Adds to options of an earlier version what it did without saying."""
  if not unlearning:
    return {}
  earlier: dict[str, Any] = {
    **{"num_refits": 0, "num_layers": 0},
    "augmentation": "none",
  }
  if "step_growth" not in unlearning:
    earlier |= {
      "step_growth": 1.0,
      "num_bisections": 0,
      "retain_batch_size": unlearning.get("batch_size", 64),
      "max_cycles": 1,
    }
  return {**earlier, **unlearning}


def method(name: str) -> Unlearning:
  """Returns the unlearning options of this name.

  Args:
    name: One of `UNLEARNING`.

  Raises:
    ValueError: If there is none, with the nearest name.
  """
  checks.one_of("method", name, UNLEARNING)
  return UNLEARNING[name]
