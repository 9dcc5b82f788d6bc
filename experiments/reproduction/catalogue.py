"""The paper's experiments: data set, model, request and method of each cell.

Three sizes: `smoke`, seconds, on embedded sets, for tests; `cpu`, minutes on
two cores, on parts of the real sets; `full`, as in the paper, for GPUs. Where a
size has another data set than the paper, the experiment's page says which.
"""

from collections.abc import Mapping
from typing import Any

from experiments.reproduction import designs, kinds, measures
from psg_jax import catalog, data

SIZES = ("smoke", "cpu", "full")
PAPER = "Nahass et al., 2025"


Cell = kinds.Cell
Drawing = kinds.Drawing
Published = kinds.Published
Experiment = kinds.Experiment


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
_EXPECTED = ("expected_low", "expected_accuracy", "expected_high", "is_inside")
_TIMES = ("seconds", "speedup")
_NEARNESS = tuple(
  f"normalised_{x}"
  for x in (
    *("kl_divergence_test_forget", "kl_divergence_test_retain"),
    "disagreement_test_forget",
  )
)
_NEARNESS_TRAIN = tuple(
  x.replace("test_forget", "train_forget") for x in _NEARNESS
)
_SCATTER = Drawing(
  "scatter",
  "accuracy_test_forget",
  "accuracy_test_retain",
  "model",
  "Forget against retain accuracy, test images",
)
_DIVERGENCES = Drawing(
  "bars",
  "class",
  "kl_divergence_test_forget",
  "model",
  "Divergence from the retrained model on forgotten images",
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


def _over_models(
  drawings: tuple[Drawing, ...] = (_SCATTER,), **fields: Any
) -> Experiment:
  """An experiment whose rows are models, measured on test images."""
  return Experiment(
    by=("model",),
    figures=(*_TEST, *_NEARNESS, *_TIMES),
    checked=_TEST,
    drawings=drawings,
    **fields,
  )


def _over_requests(**fields: Any) -> Experiment:
  """An experiment whose rows are requests and models, on training images."""
  return Experiment(
    by=("request", "model"),
    figures=(*_TRAIN, *_NEARNESS_TRAIN, *_EXPECTED, "is_changed", *_TIMES),
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
    **fields,
  )


EXPERIMENTS: dict[str, Experiment] = {
  "fashion_mnist_classes": _over_models(
    title="Each of the ten classes of Fashion-MNIST forgotten",
    source="class forgetting",
    cells=designs.classes("fashion_mnist"),
    drawings=(_SCATTER, _DIVERGENCES),
    published=_published({"released": (0.084, 0.890)}, 0.942),
  ),
  "cifar10_classes": _over_models(
    title="Each of the ten classes of CIFAR-10 forgotten",
    source="class forgetting",
    cells=designs.classes("cifar10"),
    drawings=(_SCATTER, _DIVERGENCES),
    published=_published({"released": (0.091, 0.809)}, 0.899),
    note="The published pair (λ, γ) is (1e-3, 0.1), the released code's choice"
    " (1e-3, 1e-2).",
  ),
  "mri": _over_models(
    title="Glioma forgotten by a classifier of brain MRI",
    source="class forgetting, MRI",
    cells=designs.one_class("mri"),
    published=_published({"released": (0.025, 0.721)}, 0.975),
    note="At size smoke the images are digits, and the class is 0.",
  ),
  "cfp_os": _over_models(
    title="A disease forgotten by a classifier of fundus photographs",
    source="class forgetting, CFP-OS",
    cells=designs.one_class("cfp_os"),
    published=_published({"released": (0.042, 0.990)}, 1.0),
    note="The photographs are another public collection than the paper's; at"
    " size smoke they are digits.",
  ),
  "fractions": Experiment(
    title="Parts of a class forgotten",
    source="selective forgetting, training images",
    cells=designs.fractions,
    by=("fraction", "model"),
    figures=(*_TRAIN, *_NEARNESS_TRAIN, "is_changed", *_TIMES),
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
  "metadata": _over_requests(
    title="Eyes, patients, dates and anatomy forgotten",
    source="anatomical forgetting",
    cells=designs.metadata,
    note="The paper's clinical images are private: these retinas are drawn"
    " (`phantom_fundus`). Devices are in `sources`.",
  ),
  "sources": _over_requests(
    title="Each source or device of three sets forgotten",
    source="device forgetting",
    cells=designs.sources,
    note="What proxies expect is the retrained model's accuracy on the"
    " forgotten images; that model is the check, and is not looked at. The"
    " paper's clinical images are private: these retinas are drawn"
    " (`phantom_fundus`), and the digits were taken by four devices, of which"
    " one turns its pictures (`phantom_digits`).",
  ),
  "targets": Experiment(
    title="What may be taught, beside what a retrained model says",
    source="beyond the paper",
    cells=designs.targets,
    by=("kind", "model"),
    figures=(
      *("kl_divergence", "normalised_kl_divergence", "level_error", "cost"),
    ),
    checked=("kl_divergence", "level_error"),
    drawings=(
      Drawing(
        "bars",
        "request",
        "kl_divergence",
        "model",
        "Divergence of targets from the retrained model's predictions",
      ),
    ),
    note="Nothing is unlearned: these are predictions on the images to forget."
    " Sources and devices, parts of a class, a random tenth and whole classes,"
    " of a seed that is in no other table: it chose what is recommended.",
  ),
  "grid": Experiment(
    title="λ by γ, and φ by learning rate, in one program each",
    source="grid of hyper-parameters",
    cells=designs.grid,
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
  "labelling": _over_models(
    title="What forget and retained images are taught",
    source="ablation of the labelling, CIFAR-10",
    cells=designs.labelling,
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
    cells=designs.single(
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
    cells=designs.single(
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
    cells=designs.single(
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
    cells=designs.single(
      "fashion_mnist", measures.feature_maps, lambda size: {}
    ),
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
    cells=designs.membership,
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
    cells=designs.single(
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
    cells=designs.single(
      "fashion_mnist",
      measures.convergence,
      lambda size: {
        "step_decays": ("constant", "sqrt"),
        "noise_scales": designs.GRID["noise_scale"][
          :: 2 if size == "smoke" else 1
        ],
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
  "pathmnist_classes": _over_models(
    title="Each of the nine classes of PathMNIST forgotten",
    source="class forgetting, MedMNIST",
    cells=designs.classes("pathmnist"),
    note="MedMNIST's archives carry no patient ids: no request by patient can"
    " be made of them.",
  ),
  "svhn_classes": _over_models(
    title="Each of the ten classes of SVHN forgotten",
    source="class forgetting, SVHN",
    cells=designs.classes("svhn"),
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
