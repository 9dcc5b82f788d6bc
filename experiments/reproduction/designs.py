"""Designs of experiments: jobs crossed with requests, methods and seeds."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments import recipes
from experiments.reproduction import bases, measures, taught
from experiments.reproduction.kinds import Cell

AGAIN = "retrained again"
"""The row of a second retrained model: what another retraining is."""


def _beside(
  row: Mapping[str, Any], job: recipes.Job, unlearned: Mapping[str, recipes.Job]
) -> Iterator[Cell]:
  """The original and two retrained models, and unlearned ones by name."""
  yield Cell(
    row, job, measures.forgetting, {"models": ("original", "retrained")}
  )
  again = {**row, "model": AGAIN}
  yield Cell(again, job, measures.forgetting, {"models": ("retrained-1",)})
  for name, changed in unlearned.items():
    options = {"models": ("unlearned",)}
    yield Cell({**row, "model": name}, changed, measures.forgetting, options)


def _forgetting(
  row: Mapping[str, Any],
  job: recipes.Job,
  dataset: str,
  methods: Sequence[str],
) -> Iterator[Cell]:
  """The models of `_beside`, the original unlearned by each method."""
  return _beside(
    row, job, {x: bases.with_method(job, x, dataset) for x in methods}
  )


def _methods(size: str) -> tuple[str, ...]:
  return bases.METHODS[::2] if size == "smoke" else bases.METHODS


def _seeds(size: str, count: int = 2) -> range:
  """Seeds from 1 on: so many, and at size smoke one."""
  return range(1, 2 if size == "smoke" else 1 + count)


def classes(dataset: str) -> Callable[[str], Iterator[Cell]]:
  """Class forgetting, one class after the other."""

  def cells(size: str) -> Iterator[Cell]:
    base = bases.BASES[dataset][size]
    if size == "smoke":
      # Seeds in the place of classes: what differs between them is chance.
      for seed in (1, 2):
        job = bases.asking(base, forget_classes=(0,), seed=seed)
        yield from _forgetting({"class": 0}, job, dataset, _methods(size))
      return
    for number in range(9 if dataset == "pathmnist" else 10):
      job = bases.asking(base, forget_classes=(number,), seed=1)
      yield from _forgetting({"class": number}, job, dataset, _methods(size))

  return cells


def one_class(dataset: str) -> Callable[[str], Iterator[Cell]]:
  """The class that the recipe of a medical set forgets, over seeds."""

  def cells(size: str) -> Iterator[Cell]:
    base = bases.BASES[dataset][size]
    for seed in _seeds(size, 3):
      job = bases.asking(
        base,
        forget_classes=(0,) if size == "smoke" else base.forget_classes,
        seed=seed,
      )
      yield from _forgetting({"seed": seed}, job, dataset, _methods(size))

  return cells


_BY_PROXIES = recipes.Unlearning(target="proxy")
PART_METHODS = ("paper", "recommended", "proxies")
"""Methods of requests that are not for whole classes."""
FRACTIONS = (0.001, 0.01, 0.1, 0.25, 0.5, 0.75)


def fractions(size: str) -> Iterator[Cell]:
  """Selective forgetting of parts of class 0."""
  base = bases.BASES["fashion_mnist"][size]
  values = FRACTIONS if size == "full" else FRACTIONS[2:]
  for fraction in values[2:3] if size == "smoke" else values:
    for seed in _seeds(size):
      job = bases.asking(
        base, forget_classes=(0,), fraction=fraction, seed=seed
      )
      row = {"fraction": fraction, "seed": seed}
      yield from _forgetting(row, job, "fashion_mnist", PART_METHODS)


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
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
"""Requests by metadata: the set of `BASES`, and the condition.

Devices are in `SOURCES`.
"""


SOURCES: dict[str, tuple[str, str]] = {
  **{
    f"photographs, {x}": ("cfp_os", f"source = '{x}'")
    for x in ("odir", "eyepacs", "cropped-jpg", "hrf-png")
  },
  **{
    f"retinas, {x}": ("retinas", f"device = '{x}'")
    for x in ("Cirrus 800 FA", "Visulux 200", "RetiCam NW6")
  },
  **{
    f"digits, {x}": ("devices", f"device = '{x}'")
    for x in ("turned", "noisy", "dim", "plain")
  },
}
"""Sources and devices: the set of `BASES`, and the condition."""


def sources(size: str) -> Iterator[Cell]:
  """Each source or device of three sets, unlearned to what proxies expect."""
  for name, (dataset, where) in SOURCES.items():
    if size == "smoke" and name != "digits, turned":
      continue
    job = bases.asking(bases.BASES[dataset][size], where=where, seed=1)
    yield from _forgetting({"request": name}, job, dataset, PART_METHODS[1:])


def targets(size: str) -> Iterator[Cell]:
  """What may be taught, for sources, parts of classes and whole ones.

  The seed is in no other experiment: what is recommended was chosen by these.
  """
  requests: dict[str, tuple[str, dict[str, Any]]] = {
    name: (dataset, {"where": where})
    for name, (dataset, where) in SOURCES.items()
  }
  requests |= {
    "half of a class": (
      "fashion_mnist",
      {"forget_classes": (4,), "fraction": 0.5},
    ),
    "three quarters": (
      "fashion_mnist",
      {"forget_classes": (4,), "fraction": 0.75},
    ),
    "random tenth": ("fashion_mnist", {"fraction": 0.1}),
    **{
      f"clothes, {x}": ("fashion_mnist", {"forget_classes": (x,)})
      for x in (0, 1, 4, 8)
    },
    **{f"pictures, {x}": ("cifar10", {"forget_classes": (x,)}) for x in (0, 3)},
    "scans": ("mri", {"forget_classes": ("glioma",)}),
  }
  for name, (dataset, request) in requests.items():
    if size == "smoke" and name not in ("digits, turned", "clothes, 0"):
      continue
    job = bases.asking(bases.BASES[dataset][size], **request, seed=200)
    job = dataclasses.replace(job, unlearning=_BY_PROXIES)
    kind = "whole classes" if bases.is_for_classes(job) else "other requests"
    row = {"kind": kind, "request": name}
    yield Cell(row, job, taught.targets)


def metadata(size: str) -> Iterator[Cell]:
  """Requests by eye, patient, date and measurement, and a random tenth."""
  for name, (dataset, request) in REQUESTS.items():
    if size == "smoke" and name != "random tenth":
      continue
    for seed in _seeds(size):
      job = bases.asking(bases.BASES[dataset][size], **request, seed=seed)
      row = {"request": name, "seed": seed}
      yield from _forgetting(row, job, dataset, PART_METHODS)


GRID = {
  "distance_weight": (0.0, 1e-4, 1e-3, 1e-2, 1e-1),
  "noise_scale": (0.0, 1e-4, 1e-1, 1.0),
}
RETAIN_WEIGHTS = (0.0, 1e-4, 1e-3, 0.1, 0.5)


def grid(size: str) -> Iterator[Cell]:
  """λ by γ as in the paper, and φ by rate, in the paper's form."""
  base = bases.asking(bases.BASES["fashion_mnist"][size], forget_classes=(0,))
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
    for seed in (100,) if size == "smoke" else (100, 101):
      job = bases.with_method(dataclasses.replace(base, seed=seed), "paper", "")
      row = {"grid": name, "seed": seed}
      yield Cell(row, job, measures.grid, {"axes": axes})


LABELLINGS: dict[str, dict[str, Any]] = {
  "hard": {},
  "logits on R": {"retain_labels": "soft"},
  "logits on F": {"labels": "soft", "retain_labels": "hard"},
  "both": {"labels": "soft", "retain_labels": "soft"},
  "both, top 3": {"labels": "soft", "retain_labels": "soft", "top_k": 3},
  "raw logits on F": {"labels": "raw_logits", "retain_labels": "hard"},
  "without the class, half way": {"labels": "soft_other", "num_refits": 0},
  "and half new last layers": {"labels": "soft_other"},
}
"""Options of `recipes.Unlearning` by the ablation's names."""


def labelling(size: str) -> Iterator[Cell]:
  """What forget and retained images are taught."""
  base = bases.BASES["cifar10"][size]
  for seed in _seeds(size):
    job = bases.with_method(
      bases.asking(base, forget_classes=(0,), seed=seed), "paper", "cifar10"
    )
    names = ("hard", "both, top 3") if size == "smoke" else LABELLINGS
    changed = {
      name: dataclasses.replace(
        job,
        unlearning=dataclasses.replace(job.unlearning, **LABELLINGS[name]),
      )
      for name in names
    }
    yield from _beside({"seed": seed}, job, changed)


def single(
  dataset: str,
  measure: measures.Measure,
  options: Callable[[str], Mapping[str, Any]],
  method: str = "recommended",
  seeds: int = 2,
) -> Callable[[str], Iterator[Cell]]:
  """Class 0 of a set, one measure, over seeds."""

  def cells(size: str) -> Iterator[Cell]:
    base = bases.BASES[dataset][size]
    for seed in _seeds(size, seeds):
      job = bases.asking(base, forget_classes=(0,), seed=seed)
      job = bases.with_method(job, method, dataset)
      yield Cell({"seed": seed}, job, measure, options(size))

  return cells


def membership(size: str) -> Iterator[Cell]:
  """Attacks on the forget set after each method, over seeds."""
  base = bases.BASES["fashion_mnist"][size]
  for seed in _seeds(size, 3):
    job = bases.asking(base, forget_classes=(0,), seed=seed)
    yield from _forgetting({"seed": seed}, job, "fashion_mnist", _methods(size))
