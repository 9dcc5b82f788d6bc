"""The parts of a run's page that a clinician reads: what changed for whom."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import figures

_MAX_SIDE = 128
_PARTS = {"test_retain": "test", "train_retain": "training"}
_FIGURES = {
  "sensitivity": ("Sensitivity, mean over classes", "↑ ideal: 100%"),
  "specificity": ("Specificity, mean over classes", "↑ ideal: 100%"),
  "auroc": ("AUROC, mean over classes", "↑ ideal: 100%"),
  "calibration_error": ("Calibration error (ECE)", "↓ ideal: 0%"),
}
_BY_CLASS = {
  "sensitivity": "Sensitivity ↑",
  "specificity": "Specificity ↑",
  "auroc": "AUROC ↑",
}
_ATTACKS = {
  "mia_loss_auc": "Threshold on the loss, AUC",
  "mia_confidence_auc": "Threshold on the confidence, AUC",
  "mia_entropy_auc": "Threshold on the entropy, AUC",
  "mia_modified_entropy_auc": "Threshold on the modified entropy, AUC",
  "mia_correctness_auc": "Right or wrong, AUC",
  "mia_logistic": "Logistic regression on the loss, accuracy",
  "mia_svc": "SVC on the confidence, accuracy",
}
_NOT_AVAILABLE = "not available"

Metrics = Mapping[str, Mapping[str, Any]]
Show = Callable[[float | None], str]


def attacks(metrics: Metrics) -> list[dict[str, Any]]:
  """Returns the rows of the membership attacks, with a cell for each model."""
  if not any("membership" in each for each in metrics.values()):
    return []
  return [
    {
      "name": title,
      "cells": [
        _number(_value(each.get("membership"), name))
        for each in metrics.values()
      ],
    }
    for name, title in _ATTACKS.items()
  ]


def attack_ideal(metrics: Metrics) -> str:
  """Says what the attacks should find, and how far chance alone goes.

  The AUC of a coin over `n` images a side has the variance `(2n + 1) / 12n²`
  (Mann and Whitney 1947).
  """
  text = "≈ ideal: as retrained, 0.5"
  for each in metrics.values():
    figure = (each.get("membership") or {}).get("mia_loss_auc") or {}
    count = figure.get("num_samples")
    if count:
      chance = 2 * math.sqrt((2 * count + 1) / (12 * count**2))
      return f"{text}; {count:,} images a side, chance ±{chance:.2f}"
  return text


def reasons(metrics: Metrics) -> list[str]:
  """Returns why figures are not available, each reason once."""
  found: dict[str, None] = {}
  for each in metrics.values():
    clinical = dict(each.get("clinical") or {})
    by_column = clinical.pop("worst_subgroup", {})
    for figure in (
      *clinical.values(),
      *by_column.values(),
      *(each.get("membership") or {}).values(),
    ):
      if figure.get("reason"):
        found[figure["reason"]] = None
  return list(found)


def non_members(metrics: Metrics) -> str | None:
  """Says what the attacks compare with, where it is not the obvious."""
  for each in metrics.values():
    for figure in (each.get("membership") or {}).values():
      if figure.get("non_members") == "test_retain":
        return (
          "No test image matches the request, so that the attacks compare with"
          " retained test images of the same classes, which may differ in more"
          " than membership"
        )
  return None


def read_out(
  metrics: Metrics, class_names: Sequence[str], show: Show
) -> dict[str, Any] | None:
  """Returns the clinical figures on retained test images.

  Args:
    metrics: The content of a run's `metrics.json`.
    class_names: `K` names.
    show: Formats a share or None.

  Returns:
    `rows`, with a cell for each model; `missed`, likewise, one a class;
    `by_class`, groups of such rows. None for a run of before.
  """
  if not any("clinical" in each for each in metrics.values()):
    return None
  rows = [
    {
      "name": f"{title} ({ideal})",
      "cells": [
        show(_value(each.get("clinical"), name)) for each in metrics.values()
      ],
    }
    for name, (title, ideal) in _FIGURES.items()
  ]
  return {
    "rows": [
      *rows,
      *_worst(metrics, show),
      *_harmed(metrics, show),
    ],
    "missed": _missed(metrics, class_names),
    "by_class": [
      {
        "name": title,
        "rows": [
          {
            "name": class_name,
            "cells": [
              show(_of_class(each, name, label)) for each in metrics.values()
            ],
          }
          for label, class_name in enumerate(class_names)
        ],
      }
      for name, title in _BY_CLASS.items()
    ],
  }


def flips(
  rows: Sequence[Mapping[str, str]] | None,
  images: np.ndarray | None,
  metrics: Metrics,
) -> dict[str, Any] | None:
  """Returns the retained images whose right answer turned wrong.

  Args:
    rows: Of `flips.csv`, or None.
    images: uint8 `[P, H, W, C]`, pictures of the first rows.
    metrics: The content of a run's `metrics.json`.

  Returns:
    `counts`, a sentence, and `items`, pictures with captions; None for a run
    that has none.
  """
  if rows is None or images is None or "unlearned" not in metrics:
    return None
  counts = [
    f"{_count(metrics, 'unlearned', part)} {name} images"
    for part, name in _PARTS.items()
    if _count(metrics, "unlearned", part) is not None
  ]
  retrained = _count(metrics, "retrained", "test_retain")
  if not counts:
    return None
  sentence = " and ".join(counts)
  if retrained is not None:
    sentence += f"; of the retrained model, {retrained} test images"
  return {
    "counts": sentence,
    "num_hidden": len(rows) - len(images),
    "is_pixelated": bool(len(images)) and max(images.shape[1:3]) <= 64,
    "items": [
      {
        "image": figures.data_uri(image / np.float32(255), max_side=_MAX_SIDE),
        "label": row["label"],
        "prediction": row["unlearned_prediction"],
        "probability": f"{100 * float(row['unlearned_probability']):.0f}%",
        "name": f"{_PARTS.get(row['part'], row['part'])}: {row['id']}",
      }
      for row, image in zip(rows, images, strict=False)
    ],
  }


def judgement(metrics: Metrics) -> dict[str, Any] | None:
  """Returns the diagnosis and the claims of the unlearned model."""
  own = metrics.get("unlearned") or {}
  if "diagnosis" not in own:
    return None
  return {
    "verdict": own["diagnosis"]["verdict"],
    "findings": [
      {
        "text": f"{each['verdict']}: {each['evidence']}",
        "advice": each["advice"],
      }
      for each in own["diagnosis"]["findings"]
    ],
    **own["claims"],
  }


def _value(found: Mapping[str, Any] | None, name: str) -> float | None:
  value = ((found or {}).get(name) or {}).get("value")
  return None if value is None else float(value)


def _number(value: float | None) -> str:
  return _NOT_AVAILABLE if value is None else f"{value:.3f}"


def _of_class(
  metrics: Mapping[str, Any], name: str, label: int
) -> float | None:
  found = ((metrics.get("clinical") or {}).get(name) or {}).get("per_class")
  return found[label] if found and label < len(found) else None


def _worst(metrics: Metrics, show: Show) -> list[dict[str, Any]]:
  first = next(iter(metrics.values())).get("clinical") or {}
  rows = []
  for column in first.get("worst_subgroup", {}):
    cells = []
    for each in metrics.values():
      found = (each.get("clinical") or {}).get("worst_subgroup", {}).get(column)
      if not found or found["value"] is None:
        cells.append(_NOT_AVAILABLE)
      else:
        cells.append(
          f"{show(found['value'])} ({found['group']}, {found['num_images']:,})"
        )
    rows.append({"name": f"Worst subgroup by {column} (↑)", "cells": cells})
  return rows


def _harmed(metrics: Metrics, show: Show) -> list[dict[str, Any]]:
  """Rows of the right answers turned wrong; the original has none."""
  rows = []
  for part, name in _PARTS.items():
    cells = []
    for model, each in metrics.items():
      figure = (each.get("clinical") or {}).get(f"harmed_{part}")
      cells.append(
        _NOT_AVAILABLE
        if not figure or figure["value"] is None
        else f"{show(figure['value'])} ({figure['num_harmed']:,} of"
        f" {figure['num_right']:,})"
      )
      if model == "original":
        cells[-1] = "reference"
    rows.append(
      {"name": f"Right answers turned wrong, {name} (↓)", "cells": cells}
    )
  return rows


def _missed(
  metrics: Metrics, class_names: Sequence[str]
) -> list[dict[str, Any]]:
  """The images of each class that are taken for another."""
  compared = {
    model: figure["per_class"]
    for model, each in metrics.items()
    if (figure := (each.get("clinical") or {}).get("false_negatives"))
    and figure.get("per_class")
  }
  if not compared:
    return []
  known = next(iter(compared.values()))
  rows = []
  for label, name in enumerate(class_names):
    num_images = known[label]["num_images"]
    if not num_images:
      continue
    cells = []
    for model in metrics:
      if model == "original":
        cells.append(str(known[label]["before"]))
      elif model in compared:
        cells.append(str(compared[model][label]["after"]))
      else:
        cells.append(_NOT_AVAILABLE)
    rows.append({"name": name, "count": f"{num_images:,}", "cells": cells})
  return rows


def _count(metrics: Metrics, model: str, part: str) -> int | None:
  clinical = (metrics.get(model) or {}).get("clinical") or {}
  found = clinical.get(f"harmed_{part}") or {}
  return found.get("num_harmed")
