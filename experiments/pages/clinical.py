"""The parts of a run's page that a clinician reads: what changed for whom."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.pages import request, tables

_MAX_SIDE = 128
_PARTS = {"test_retain": "test", "train_retain": "training"}
_FIGURES = {
  "sensitivity": "Sensitivity, mean over classes (↑ ideal: 100%)",
  "specificity": "Specificity, mean over classes (↑ ideal: 100%)",
  "auroc": "AUROC, mean over classes (↑ ideal: 100%)",
  "calibration_error": "Calibration error (ECE) (↓ ideal: 0%)",
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


def attacks(
  models: tables.Models,
) -> dict[tuple[str, str], list[tables.Row]]:
  """Returns the membership attacks as a group, or none where none were made."""
  if not models.known("membership"):
    return {}
  rows = [
    models.row(title, "membership", name, "value", show=tables.decimals)
    for name, title in _ATTACKS.items()
  ]
  title = "Membership attacks: forget images in training or not"
  return {(title, attack_ideal(models)): rows}


def attack_ideal(models: tables.Models) -> str:
  """Says what the attacks should find, and how far chance alone goes.

  The AUC of a coin over `n` images a side has the variance `(2n + 1) / 12n²`
  (Mann and Whitney 1947).
  """
  text = "≈ ideal: as retrained, 0.5"
  sizes = models.known("membership", "mia_loss_auc", "num_samples").values()
  for count in filter(None, sizes):
    chance = 2 * math.sqrt((2 * count + 1) / (12 * count**2))
    return f"{text}; {count:,} images a side, chance ±{chance:.2f}"
  return text


def reasons(models: tables.Models) -> list[str]:
  """Returns why figures are not available, each reason once."""
  lines = (
    figure["reason"]
    for name in models.figures
    for figure in _figures(models, name)
    if figure.get("reason")
  )
  return list(dict.fromkeys(lines))


def non_members(models: tables.Models) -> str | None:
  """Says what the attacks compare with, where it is not the obvious."""
  for figures in models.known("membership").values():
    if any(x.get("non_members") == "test_retain" for x in figures.values()):
      return (
        "No test image matches the request, so that the attacks compare with"
        " retained test images of the same classes, which may differ in more"
        " than membership"
      )
  return None


def read_out(
  models: tables.Models, class_names: Sequence[str]
) -> dict[str, Any] | None:
  """Returns the clinical figures on retained test images.

  Args:
    models: The content of a run's `metrics.json`.
    class_names: `K` names.

  Returns:
    The tables `summary`, `missed` (or None) and `by_class`, and `reasons` of
    what is not available. None for a run of before.
  """
  if not models.known("clinical"):
    return None
  rows = [
    models.row(title, "clinical", name, "value")
    for name, title in _FIGURES.items()
  ]
  columns = models.get(next(iter(models.figures)), "clinical", "worst_subgroup")
  rows += [
    models.row(
      f"Worst subgroup by {column} (↑)",
      *("clinical", "worst_subgroup", column),
      show=_worst,
    )
    for column in columns or ()
  ]
  rows += [
    models.row(
      f"Right answers turned wrong, {name} (↓)",
      *("clinical", f"harmed_{part}"),
      show=_harmed,
      instead={"original": tables.REFERENCE},
    )
    for part, name in _PARTS.items()
  ]
  groups = {
    title: [
      models.row(class_name, "clinical", name, "per_class", label)
      for label, class_name in enumerate(class_names)
    ]
    for name, title in _BY_CLASS.items()
  }
  return {
    "summary": models.table(rows, "Measure"),
    "missed": _missed(models, class_names),
    "by_class": models.table(groups, "Class"),
    "reasons": reasons(models),
  }


def flips(
  rows: Sequence[Mapping[str, str]] | None,
  images: np.ndarray | None,
  models: tables.Models,
) -> dict[str, Any] | None:
  """Returns the retained images whose right answer turned wrong.

  Args:
    rows: Of `flips.csv`, or None.
    images: uint8 `[P, H, W, C]`, pictures of the first rows.
    models: The content of a run's `metrics.json`.

  Returns:
    `counts`, a sentence, and `pictures`; None for a run that has none.
  """
  if rows is None or images is None:
    return None
  numbers = {
    part: models.known("clinical", f"harmed_{part}", "num_harmed")
    for part in _PARTS
  }
  counts = [
    f"{numbers[part]['unlearned']} {name} images"
    for part, name in _PARTS.items()
    if "unlearned" in numbers[part]
  ]
  if not counts:
    return None
  sentence = " and ".join(counts)
  if "retrained" in numbers["test_retain"]:
    count = numbers["test_retain"]["retrained"]
    sentence += f"; of the retrained model, {count} test images"
  is_pixelated = bool(len(images)) and max(images.shape[1:3]) <= 64
  return {
    "counts": sentence,
    "num_hidden": len(rows) - len(images),
    "style": " pixelated" if is_pixelated else "",
    "pictures": [
      {
        "images": [
          (
            request.encode(image, _MAX_SIDE),
            f"Retained image of class {row['label']}",
          )
        ],
        "name": f"{row['label']} → {row['unlearned_prediction']}",
        "text": f"{100 * float(row['unlearned_probability']):.0f}% sure ·"
        f" {_PARTS.get(row['part'], row['part'])}: {row['id']}",
      }
      for row, image in zip(rows, images, strict=False)
    ],
  }


def _figures(models: tables.Models, name: str) -> Iterator[Mapping[str, Any]]:
  """All figures of a model that may have a reason to be missing."""
  clinical = models.get(name, "clinical") or {}
  yield from (x for key, x in clinical.items() if key != "worst_subgroup")
  yield from clinical.get("worst_subgroup", {}).values()
  yield from (models.get(name, "membership") or {}).values()


def _worst(figure: Mapping[str, Any]) -> str | None:
  if figure["value"] is None:
    return None
  share, count = tables.percent(figure["value"]), figure["num_images"]
  return f"{share} ({figure['group']}, {count:,})"


def _harmed(figure: Mapping[str, Any]) -> str | None:
  if figure["value"] is None:
    return None
  share = tables.percent(figure["value"])
  return f"{share} ({figure['num_harmed']:,} of {figure['num_right']:,})"


def _missed(
  models: tables.Models, class_names: Sequence[str]
) -> tables.Table | None:
  """The images of each class that are taken for another."""
  path = ("clinical", "false_negatives", "per_class")
  compared = models.known(*path)
  if not any(compared.values()):
    return None
  known = next(x for x in compared.values() if x)
  rows = [
    models.row(
      name,
      *(*path, label, "after"),
      show=str,
      instead={"original": str(known[label]["before"])},
    ).led_by(f"{known[label]['num_images']:,}")
    for label, name in enumerate(class_names)
    if known[label]["num_images"]
  ]
  title = "Missed (false negatives), test ↓"
  return models.table(rows, title, "Images")
