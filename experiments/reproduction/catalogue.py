"""The paper's experiments: data set, model, request and method of each cell.

Three sizes: `smoke`, seconds, on embedded sets, for tests; `cpu`, minutes on
two cores, on parts of the real sets; `full`, as in the paper, for GPUs. Where a
size has another data set than the paper, the experiment's page says which.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import recipes
from experiments.reproduction import measures
from psg_jax import catalog, data

SIZES = ("smoke", "cpu", "full")
PAPER = "Nahass et al., 2025"
# The released choices of λ and γ by data set.
RELEASED_CHOICES = {
  "cifar10": (1e-3, 1e-2),
  "cfp_os": (1e-3, 1e-2),
  "mri": (0.1, 0.1),
}
_OTHER_CHOICE = (0.0, 1e-4)


class Cell(NamedTuple):
  """What is computed at once, and kept when it is.

  Attributes:
    row: What tells it from the others of the experiment.
    job: The options of its models and of its unlearning.
    measure: What is measured, of `measures`.
    options: Arguments of the measure.
  """

  row: Mapping[str, Any]
  job: recipes.Job
  measure: measures.Measure
  options: Mapping[str, Any] = {}


class Drawing(NamedTuple):
  """A picture of the figures; see `pages.experiment`.

  Attributes:
    kind: `lines`, `bars`, `heat`, `scatter`, `front` or `maps`.
    x: Column of the x axis, or of the groups of bars.
    y: Figure of the y axis, or of the colour of a heat map.
    by: Column of what has one colour; of a heat map, its rows.
    title: What it shows.
    is_log: Whether the x axis is logarithmic.
  """

  kind: str
  x: str
  y: str
  by: str
  title: str
  is_log: bool = False


class Published(NamedTuple):
  """A figure from elsewhere.

  Attributes:
    row: Columns that name the row it belongs to.
    figure: Its name.
    value: As published.
    source: Where.
  """

  row: Mapping[str, Any]
  figure: str
  value: float
  source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """One experiment.

  Attributes:
    title: What is asked, in a line.
    source: Which part of the paper it is.
    cells: Its cells by size.
    by: Columns whose rows are told apart in the table; the others (seeds,
      classes) are averaged over.
    figures: Figures of the table.
    checked: Those of them that are compared with what is expected; times are
      not, which are the machine's.
    drawings: Its pictures.
    published: Figures from elsewhere.
    note: What to know of it.
  """

  title: str
  source: str
  cells: Callable[[str], Iterator[Cell]]
  by: tuple[str, ...]
  figures: tuple[str, ...]
  checked: tuple[str, ...]
  drawings: tuple[Drawing, ...] = ()
  published: tuple[Published, ...] = ()
  note: str = ""


def _of(job: recipes.Job, **changes: Any) -> recipes.Job:
  return dataclasses.replace(job, **changes)


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
_COLOURS = _of(_CIFAR, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


# By data set of the paper and size.
BASES: dict[str, dict[str, recipes.Job]] = {
  "fashion_mnist": {
    "smoke": _TINY,
    "cpu": _of(_FASHION, num_train=2500, width=0.125, training=_SMALL),
    "full": _of(
      _FASHION,
      training=dataclasses.replace(
        _PAPER_TRAINING, num_epochs=15, augmentation="flip"
      ),
    ),
  },
  "cifar10": {
    "smoke": _TINY,
    "cpu": _of(
      _CIFAR,
      num_train=2500,
      width=0.125,
      training=dataclasses.replace(_SMALL, augmentation="flip"),
    ),
    "full": _of(_CIFAR, training=_PAPER_TRAINING),
  },
  "mri": {
    "smoke": _TINY,
    "cpu": _of(
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
    "cpu": _of(
      recipes.JOBS["fundus_class"],
      dataset="fundus@32",
      twins="ignore",
      num_train=1500,
      training=dataclasses.replace(_SMALL_MEDICAL, learning_rate=0.2),
    ),
    "full": _of(
      recipes.JOBS["fundus_camera_resnet50"],
      where=None,
      forget_classes=("diabetic_retinopathy",),
    ),
  },
  "retinas": {
    "smoke": _TINY,
    "cpu": _of(
      recipes.JOBS["phantom_patient"],
      dataset="phantom_fundus@32",
      twins="ignore",
      num_train=800,
      training=dataclasses.replace(
        recipes.JOBS["phantom_patient"].training, num_epochs=10
      ),
    ),
    "full": _of(recipes.JOBS["phantom_patient"], width=1.0),
  },
  "devices": {
    "smoke": _of(_TINY, dataset="phantom_digits"),
    "cpu": _of(
      recipes.JOBS["digits"], dataset="phantom_digits", twins="ignore"
    ),
    "full": _of(recipes.JOBS["digits"], dataset="phantom_digits", width=1.0),
  },
  "pathmnist": {
    "smoke": _TINY,
    "cpu": _of(
      _COLOURS,
      dataset="pathmnist",
      num_train=2500,
      width=0.125,
      training=dataclasses.replace(_SMALL, augmentation="flip"),
    ),
    "full": _of(
      _COLOURS,
      dataset="pathmnist",
      training=dataclasses.replace(
        _PAPER_TRAINING, num_epochs=15, augmentation="flip"
      ),
    ),
  },
  "svhn": {
    "smoke": _TINY,
    "cpu": _of(
      _COLOURS, dataset="svhn", num_train=2500, width=0.125, training=_SMALL
    ),
    "full": _of(
      _COLOURS,
      dataset="svhn",
      training=dataclasses.replace(_PAPER_TRAINING, num_epochs=15),
    ),
  },
}


def _asked(job: recipes.Job, **request: Any) -> recipes.Job:
  """Returns a job with a request of its own in the place of the recipe's."""
  nothing = {
    "forget_classes": (),
    "where": None,
    "ids": None,
    "group": None,
    "fraction": 1.0,
  }
  return _of(job, **nothing | request)


def _method(job: recipes.Job, name: str, dataset: str) -> recipes.Job:
  """Returns a job with the unlearning options of this name.

  Those of the paper and of the released code have their λ and γ of the data
  set.
  """
  options = {
    "recommended": recipes.Unlearning(),
    "all_layers": dataclasses.replace(recipes.NO_RETAIN_DATA, layers=()),
  }.get(name) or recipes.method(name)
  if name in ("paper", "released"):
    weight, noise = RELEASED_CHOICES.get(dataset, _OTHER_CHOICE)
    options = dataclasses.replace(
      options, distance_weight=weight, noise_scale=noise
    )
  is_class = bool(job.forget_classes) and job.fraction == 1 and not job.where
  if is_class:
    options = dataclasses.replace(options, target="zero")
  elif name == "recommended":
    # On sets as small as these it is not the default: what it costs is shown.
    options = dataclasses.replace(options, target="proxy")
  return _of(job, unlearning=options)


METHODS = ("released", "paper", "recommended")


def _forgetting(
  row: Mapping[str, Any],
  job: recipes.Job,
  dataset: str,
  methods: Sequence[str] = METHODS,
) -> Iterator[Cell]:
  """The two models, and the original unlearned by each method."""
  yield Cell(
    row, job, measures.forgetting, {"models": ("original", "retrained")}
  )
  for method in methods:
    yield Cell(
      {**row, "model": method},
      _method(job, method, dataset),
      measures.forgetting,
      {"models": ("unlearned",)},
    )


def _methods(size: str) -> tuple[str, ...]:
  return METHODS[::2] if size == "smoke" else METHODS


def _seeds(count: int = 2) -> range:
  return range(1, 1 + count)


def classes(dataset: str) -> Callable[[str], Iterator[Cell]]:
  """Class forgetting, one class after the other."""

  def cells(size: str) -> Iterator[Cell]:
    base = BASES[dataset][size]
    if size == "smoke":
      # Seeds in the place of classes: what differs between them is chance.
      for seed in _seeds():
        job = _asked(base, forget_classes=(0,), seed=seed)
        yield from _forgetting({"class": 0}, job, dataset, _methods(size))
      return
    for number in range(9 if dataset == "pathmnist" else 10):
      job = _asked(base, forget_classes=(number,), seed=1)
      yield from _forgetting({"class": number}, job, dataset, _methods(size))

  return cells


def one_class(dataset: str) -> Callable[[str], Iterator[Cell]]:
  """The class that the recipe of a medical set forgets, over seeds."""

  def cells(size: str) -> Iterator[Cell]:
    base = BASES[dataset][size]
    for seed in _seeds():
      job = _asked(
        base,
        forget_classes=(0,) if size == "smoke" else base.forget_classes,
        seed=seed,
      )
      yield from _forgetting({"seed": seed}, job, dataset, _methods(size))

  return cells


FRACTIONS = (0.001, 0.01, 0.1, 0.25, 0.5, 0.75)


def fractions(size: str) -> Iterator[Cell]:
  """Selective forgetting of parts of class 0."""
  base = BASES["fashion_mnist"][size]
  chosen = FRACTIONS if size == "full" else FRACTIONS[2:]
  for fraction in chosen[2:3] if size == "smoke" else chosen:
    for seed in _seeds():
      job = _asked(base, forget_classes=(0,), fraction=fraction, seed=seed)
      row = {"fraction": fraction, "seed": seed}
      yield from _forgetting(row, job, "fashion_mnist", _methods(size)[1:])


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
  "device": ("retinas", {"where": "device = 'Cirrus 800 FA'"}),
  "learnt device": ("devices", {"where": "device = 'turned'"}),
  "random tenth": ("fashion_mnist", {"fraction": 0.1}),
  "eye": ("retinas", {"where": "eye = 'OS'"}),
  "patient": (
    "retinas",
    {"where": "patient_id IN ('P0014', 'P0015', 'P0016')"},
  ),
  "date": (
    "retinas",
    {
      "where": "device = 'Cirrus 800 FA' AND exam_date < DATE '2016-01-01'",
    },
  ),
  "anatomy": ("retinas", {"where": "(left_vert_pf + right_vert_pf) / 2 > 11"}),
}
"""Requests by metadata: the set of `BASES`, and the condition."""


def metadata(size: str) -> Iterator[Cell]:
  """Requests by device, eye, patient, date and measurement."""
  for name, (dataset, request) in REQUESTS.items():
    if size == "smoke" and name != "learnt device":
      continue
    for seed in _seeds():
      job = _asked(BASES[dataset][size], **request, seed=seed)
      row = {"request": name, "seed": seed}
      yield from _forgetting(row, job, dataset, _methods(size)[1:])


GRID = {
  "distance_weight": (0.0, 1e-4, 1e-3, 1e-2, 1e-1),
  "noise_scale": (0.0, 1e-4, 1e-1, 1.0),
}
RETAIN_WEIGHTS = (0.0, 1e-4, 1e-3, 0.1, 0.5)


def grid(size: str) -> Iterator[Cell]:
  """λ by γ as in the paper, and φ by rate, in the paper's form."""
  base = _asked(BASES["fashion_mnist"][size], forget_classes=(0,))
  grids: dict[str, dict[str, tuple[float, ...]]] = {
    "λ, γ": GRID,
    "φ, rate": {
      "retain_weight": RETAIN_WEIGHTS,
      "learning_rate": (5e-4, 2e-3, 8e-3),
    },
  }
  if size == "smoke":
    grids = {
      "λ, φ": {"distance_weight": (0.0, 1e-2), "retain_weight": (0.0, 0.5)}
    }
  for name, axes in grids.items():
    for seed in (100, 101):
      job = _method(_of(base, seed=seed), "paper", "")
      row = {"grid": name, "seed": seed}
      yield Cell(row, job, measures.grid, {"axes": axes})


LABELLINGS: dict[str, dict[str, Any]] = {
  "hard": {},
  "logits on R": {"retain_labels": "soft"},
  "logits on F": {"labels": "soft", "retain_labels": "hard"},
  "both": {"labels": "soft", "retain_labels": "soft"},
  "both, top 3": {"labels": "soft", "retain_labels": "soft", "top_k": 3},
  "raw logits on F": {"labels": "raw_logits", "retain_labels": "hard"},
  "without the class, half way": {"labels": "soft_other", "image_weight": 0.5},
}
"""Options of `recipes.Unlearning` by the ablation's names."""


def labelling(size: str) -> Iterator[Cell]:
  """What forget and retained images are taught."""
  base = BASES["cifar10"][size]
  for seed in _seeds(1 if size == "smoke" else 2):
    job = _method(
      _asked(base, forget_classes=(0,), seed=seed), "paper", "cifar10"
    )
    row = {"seed": seed}
    yield Cell(
      row, job, measures.forgetting, {"models": ("original", "retrained")}
    )
    for name, changes in LABELLINGS.items():
      if size == "smoke" and name not in ("hard", "both, top 3"):
        continue
      options = dataclasses.replace(job.unlearning, **changes)
      yield Cell(
        {**row, "model": name},
        _of(job, unlearning=options),
        measures.forgetting,
        {"models": ("unlearned",)},
      )


def _single(
  dataset: str,
  measure: measures.Measure,
  options: Callable[[str], Mapping[str, Any]],
  method: str = "recommended",
  seeds: int = 2,
) -> Callable[[str], Iterator[Cell]]:
  """Class 0 of a set, one measure, over seeds."""

  def cells(size: str) -> Iterator[Cell]:
    base = BASES[dataset][size]
    for seed in _seeds(seeds):
      job = _asked(base, forget_classes=(0,), seed=seed)
      job = _method(job, method, dataset)
      yield Cell({"seed": seed}, job, measure, options(size))

  return cells


def membership(size: str) -> Iterator[Cell]:
  """Attacks on the forget set after each method, over seeds."""
  base = BASES["fashion_mnist"][size]
  for seed in _seeds(2 if size == "smoke" else 3):
    job = _asked(base, forget_classes=(0,), seed=seed)
    yield from _forgetting({"seed": seed}, job, "fashion_mnist", _methods(size))


_TEST = (
  *("accuracy_test_forget", "accuracy_test_retain"),
  *("agreement_test_forget", "kl_divergence_test_forget"),
  "kl_divergence_test_retain",
)
_TRAIN = (
  *("accuracy_train_forget", "accuracy_test_retain"),
  *("agreement_train_forget", "kl_divergence_train_forget"),
  "kl_divergence_test_retain",
)
_TIMES = ("seconds", "speedup")
_SCATTER = Drawing(
  "scatter",
  "accuracy_test_forget",
  "accuracy_test_retain",
  "model",
  "Forget against retain accuracy, test images",
)
_STATE = "the authors' plots of October 2024, test images"


def _published(
  figures: Mapping[str, tuple[float, float]], retrained: float
) -> tuple[Published, ...]:
  """Forget and retain accuracy by model, and the retrained model's."""
  rows = [
    Published({"model": model}, f"accuracy_test_{part}", value, _STATE)
    for model, pair in figures.items()
    for part, value in zip(("forget", "retain"), pair, strict=True)
  ]
  return (
    *rows,
    Published(
      {"model": "retrained"}, "accuracy_test_retain", retrained, _STATE
    ),
  )


_FORGET_SIZES = {
  "smoke": (8, 32),
  "cpu": (25, 50, 100, 200),
  "full": (6, 60, 600, 1500, 3000, 6000),
}
# Retain accuracy after so many epochs.
_COMPOSED = {0.0: 0.234, 1.0: 0.907, 2.0: 0.905, 5.0: 0.913}

EXPERIMENTS: dict[str, Experiment] = {
  "fashion_mnist_classes": Experiment(
    title="Each of the ten classes of Fashion-MNIST forgotten",
    source="class forgetting",
    cells=classes("fashion_mnist"),
    by=("model",),
    figures=(*_TEST, *_TIMES),
    checked=_TEST,
    drawings=(
      _SCATTER,
      Drawing(
        "bars",
        "class",
        "kl_divergence_test_forget",
        "model",
        "Divergence from the retrained model on forgotten images",
      ),
    ),
    published=_published({"released": (0.084, 0.890)}, 0.942),
  ),
  "cifar10_classes": Experiment(
    title="Each of the ten classes of CIFAR-10 forgotten",
    source="class forgetting",
    cells=classes("cifar10"),
    by=("model",),
    figures=(*_TEST, *_TIMES),
    checked=_TEST,
    drawings=(
      _SCATTER,
      Drawing(
        "bars",
        "class",
        "kl_divergence_test_forget",
        "model",
        "Divergence from the retrained model on forgotten images",
      ),
    ),
    published=_published({"released": (0.091, 0.809)}, 0.899),
    note="The published pair (λ, γ) is (1e-3, 0.1), the released code's choice"
    " (1e-3, 1e-2).",
  ),
  "mri": Experiment(
    title="Glioma forgotten by a classifier of brain MRI",
    source="class forgetting, MRI",
    cells=one_class("mri"),
    by=("model",),
    figures=(*_TEST, *_TIMES),
    checked=_TEST,
    drawings=(_SCATTER,),
    published=_published({"released": (0.025, 0.721)}, 0.975),
    note="At size smoke the images are digits, and the class is 0.",
  ),
  "cfp_os": Experiment(
    title="A disease forgotten by a classifier of fundus photographs",
    source="class forgetting, CFP-OS",
    cells=one_class("cfp_os"),
    by=("model",),
    figures=(*_TEST, *_TIMES),
    checked=_TEST,
    drawings=(_SCATTER,),
    published=_published({"released": (0.042, 0.990)}, 1.0),
    note="The photographs are another public collection than the paper's; at"
    " size smoke they are digits.",
  ),
  "fractions": Experiment(
    title="Parts of a class forgotten",
    source="selective forgetting, training images",
    cells=fractions,
    by=("fraction", "model"),
    figures=(*_TRAIN, "is_changed", *_TIMES),
    checked=_TRAIN,
    drawings=(
      Drawing(
        "lines",
        "fraction",
        "accuracy_train_forget",
        "model",
        "Accuracy on the forgotten part, training images",
      ),
    ),
  ),
  "metadata": Experiment(
    title="Devices, eyes, patients, dates and anatomy forgotten",
    source="device and anatomical forgetting",
    cells=metadata,
    by=("request", "model"),
    figures=(
      *(*_TRAIN, "expected_low", "expected_accuracy", "expected_high"),
      *("is_inside", "is_changed", *_TIMES),
    ),
    checked=_TRAIN,
    drawings=(
      Drawing(
        "bars",
        "request",
        "accuracy_train_forget",
        "model",
        "Accuracy on the forgotten images",
      ),
    ),
    note="The paper's clinical images are private: these retinas are drawn"
    " (`phantom_fundus`), and the digits were taken by four devices, of which"
    " one turns its pictures (`phantom_digits`).",
  ),
  "grid": Experiment(
    title="λ by γ, and φ by learning rate, in one program each",
    source="grid of hyper-parameters",
    cells=grid,
    by=(
      *("grid", "distance_weight", "noise_scale"),
      *("retain_weight", "learning_rate"),
    ),
    figures=(
      *("accuracy_forget", "accuracy_retain"),
      *("kl_divergence_forget", "kl_divergence_retain", "is_chosen"),
    ),
    checked=("accuracy_forget", "accuracy_retain"),
    drawings=(
      Drawing(
        "heat",
        "noise_scale",
        "accuracy_forget",
        "distance_weight",
        "Forget accuracy by λ (rows) and γ",
      ),
      Drawing(
        "heat",
        "noise_scale",
        "accuracy_retain",
        "distance_weight",
        "Retain accuracy by λ (rows) and γ",
      ),
      Drawing(
        "front",
        "kl_divergence_forget",
        "kl_divergence_retain",
        "grid",
        "Divergence from the retrained model; the front is marked",
      ),
    ),
    note="All on a validation part of the training images.",
  ),
  "labelling": Experiment(
    title="What forget and retained images are taught",
    source="ablation of the labelling, CIFAR-10",
    cells=labelling,
    by=("model",),
    figures=(*_TEST, *_TIMES),
    checked=_TEST,
    drawings=(_SCATTER,),
    published=(
      *_published({"logits on R": (0.490, 0.872)}, 0.899),
      *_published({"raw logits on F": (0.001, 0.183)}, 0.899)[:2],
      *_published({"both, top 3": (0.521, 0.890)}, 0.899)[:2],
    ),
    note="The published rows have φ = 1e-2 and raw logits in the place of"
    " probabilities.",
  ),
  "composition": Experiment(
    title="A model that forgets well composed with one that retains well",
    source="composition",
    cells=_single(
      "cifar10",
      measures.composition,
      lambda size: {
        "epochs": (0, 1) if size == "smoke" else (0, 1, 2, 5),
        "weights": (0.5, 1.5) if size == "smoke" else (0.25, 0.5, 0.75, 1, 1.5),
      },
      # All layers, or there would be nothing to compose.
      method="all_layers",
    ),
    by=("kind", "amount"),
    figures=("accuracy_forget", "accuracy_retain"),
    checked=("accuracy_forget", "accuracy_retain"),
    drawings=(
      Drawing("lines", "amount", "accuracy_retain", "kind", "Retain accuracy"),
      Drawing("lines", "amount", "accuracy_forget", "kind", "Forget accuracy"),
    ),
    published=tuple(
      Published(
        {"kind": "head of one, features of the other", "amount": amount},
        "accuracy_retain",
        value,
        "arXiv version, CIFAR-10",
      )
      for amount, value in _COMPOSED.items()
    ),
  ),
  "sequential": Experiment(
    title="Three requests one after the other, and as one",
    source="beyond the paper",
    cells=_single(
      "fashion_mnist",
      measures.sequential,
      lambda size: {"classes": (0, 1) if size == "smoke" else (0, 3, 6)},
    ),
    by=("way", "num_classes"),
    figures=("accuracy_forget", "accuracy_retain", "kl_divergence_forget"),
    checked=("accuracy_forget", "accuracy_retain", "kl_divergence_forget"),
    drawings=(
      Drawing(
        "lines",
        "num_classes",
        "kl_divergence_forget",
        "way",
        "Divergence from the retrained model on forgotten images",
      ),
    ),
  ),
  "relearning": Experiment(
    title="How soon the class comes back",
    source="relearning",
    cells=_single(
      "fashion_mnist",
      measures.relearned,
      lambda size: {
        "num_steps": 8 if size == "smoke" else 40,
        "every": 4,
      },
    ),
    by=("model", "step"),
    figures=("accuracy",),
    checked=("accuracy",),
    drawings=(
      Drawing(
        "lines", "step", "accuracy", "model", "Accuracy on the forget set"
      ),
    ),
  ),
  "tsne": Experiment(
    title="Where features of forgotten images lie",
    source="t-SNE of penultimate features",
    cells=_single("fashion_mnist", measures.feature_maps, lambda size: {}),
    by=("model",),
    figures=("purity",),
    checked=("purity",),
    drawings=(Drawing("maps", "points", "labels", "model", "t-SNE maps"),),
    note="Purity: how many of the ten nearest neighbours, in feature space, of"
    " an image to forget are images to forget.",
  ),
  "membership": Experiment(
    title="Whether an attack tells that images were trained on",
    source="membership inference",
    cells=membership,
    by=("model",),
    figures=("mia_loss_auc", "accuracy_train_forget", "accuracy_test_forget"),
    checked=("mia_loss_auc",),
    drawings=(
      Drawing("bars", "seed", "mia_loss_auc", "model", "AUC, ideally .5"),
    ),
  ),
  "forget_size": Experiment(
    title="Time against the size of the forget set",
    source="unlearning time",
    cells=_single(
      "fashion_mnist",
      measures.search_time,
      lambda size: {"sizes": _FORGET_SIZES[size]},
      seeds=1,
    ),
    by=("num_forget",),
    figures=("seconds", "retrain_seconds"),
    checked=(),
    drawings=(
      Drawing("lines", "num_forget", "seconds", "seed", "Seconds, compiled"),
    ),
  ),
  "convergence": Experiment(
    title="How the inner search converges",
    source="the guarantee of the inner search, looked at",
    cells=_single(
      "fashion_mnist",
      measures.convergence,
      lambda size: {
        "step_decays": ("constant", "sqrt"),
        "noise_scales": GRID["noise_scale"][:: 2 if size == "smoke" else 1],
        "num_steps": 4 if size == "smoke" else 24,
      },
    ),
    by=("step_decay", "noise_scale", "step"),
    figures=("gradient_norm", "loss", "crossed", "distance"),
    checked=("crossed", "distance"),
    drawings=tuple(
      Drawing("lines", "step", figure, "search", title)
      for figure, title in (
        ("crossed", "Share across the boundary"),
        ("distance", "Mean distance, pixels of [0, 1]"),
        ("loss", "Mean loss, nats"),
        ("gradient_norm", "Mean L1 norm of the gradient"),
      )
    ),
  ),
  "pathmnist_classes": Experiment(
    title="Each of the nine classes of PathMNIST forgotten",
    source="class forgetting, MedMNIST",
    cells=classes("pathmnist"),
    by=("model",),
    figures=(*_TEST, *_TIMES),
    checked=_TEST,
    drawings=(_SCATTER,),
    note="MedMNIST's archives carry no patient ids: no request by patient can"
    " be made of them.",
  ),
  "svhn_classes": Experiment(
    title="Each of the ten classes of SVHN forgotten",
    source="class forgetting, SVHN",
    cells=classes("svhn"),
    by=("model",),
    figures=(*_TEST, *_TIMES),
    checked=_TEST,
    drawings=(_SCATTER,),
  ),
}


def num_cells(experiment: Experiment, size: str) -> int:
  """Returns how many cells an experiment has."""
  return sum(1 for _ in experiment.cells(size))


def missing_data(
  experiment: Experiment, size: str, *, data_dir: str | None = None
) -> str | None:
  """Says which data set of an experiment is not there; None where all are."""
  for name in dict.fromkeys(x.job.dataset for x in experiment.cells(size)):
    try:
      for split in catalog.SPLITS:
        data.open_builder(name, split, data_dir=data_dir)
    except ValueError as error:
      return str(error)
  return None
