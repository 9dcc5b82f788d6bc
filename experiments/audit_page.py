"""The page and the sentences of an audit."""

import datetime
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import markupsafe
import numpy as np
from matplotlib import axes as mpl_axes

from experiments import (
  compare_figures,
  figures,
  files,
  jobs,
  report,
  request_page,
)
from psg_jax import ulira

SIDES = ("original", "unlearned", "control")
STEPS = ("train", "unlearn", "predict", "attack")
_TEMPLATE = "audit.html.jinja"
_TITLES = {
  "original": "Original",
  "unlearned": "Unlearned",
  "control": "Never trained",
}
# The reference's colour and line style go to the control.
_ROLES = {
  "original": "original",
  "unlearned": "unlearned",
  "control": "retrained",
}


class Figures(NamedTuple):
  """What the attack and KLOM find, by side; what is not available is left out.

  Attributes:
    attacks: Of `original` and `unlearned` models, each against those never
      trained on an image, and of `control`, half of the latter against the
      other half.
    intervals: 90 % intervals of the AUCs over models.
    klom: `[T]`, of as many models a side each, so that sides are comparable.
    klom_method: `"histogram"` or `"gaussian"`.
    change: 90 % interval of the AUC after unlearning less that before, by the
      same models.
  """

  attacks: dict[str, ulira.AttackResult]
  intervals: dict[str, tuple[float, float]]
  klom: dict[str, np.ndarray]
  klom_method: str
  change: tuple[float, float] | None = None


def statements(audit: Mapping[str, Any]) -> list[str]:
  """Says in plain words what the attack finds, and at what price.

  Args:
    audit: The content of `audit.json`.

  Returns:
    Sentences: the finding, the control, the scale.
  """
  attacks, scale = audit["attack"], audit["scale"]
  total = report.seconds(audit["seconds"]["total"])
  num_images = round(scale["image_passes"] / scale["models"] / scale["epochs"])
  price = (
    f"{scale['models']} models × {num_images:,} images × {scale['epochs']}"
    f" epochs, {scale['audited_images']} of the images audited, in {total}."
  )
  title = audit["method"]["title"]
  before, after, control = (attacks[side] for side in SIDES)
  if after is None:
    num = len(audit["diverged"])
    return [
      f"{title} diverged in {num} of {scale['models']} models: too few are"
      " left to attack.",
      price,
    ]
  is_found, was_found = (x["auc_interval"][0] > 0.5 for x in (after, before))
  told = "models that unlearned an image from models that never had it"
  low, high = audit["change"]
  if is_found:
    finding = f"After {title} the attack tells {told}"
    if high < 0:
      finding += ", less surely than trained from never trained before"
    elif low > 0:
      finding += ", more surely than trained from never trained before"
  else:
    highest = after["auc_interval"][1]
    finding = (
      f"After {title} the attack does not find what tells {told} (an AUC of up"
      f" to {highest:.3f} is possible)"
    )
    if not was_found:
      finding += ", but nor can it before: these models remember too little"
  return [
    f"{finding}: AUC {_auc(after)}, without unlearning {_auc(before)}, a change"
    f" of {low:+.3f} to {high:+.3f}; guessing is 0.5.",
    f"The control, models never trained on an image against each other, has"
    f" {_auc(control)}. Intervals are of 90% over models.",
    price,
  ]


def _auc(attack: Mapping[str, Any]) -> str:
  low, high = attack["auc_interval"]
  return f"{attack['auc']:.3f} [{low:.3f}, {high:.3f}]"


def build(
  folder: pathlib.Path, audit: Mapping[str, Any], found: Figures
) -> pathlib.Path:
  """Writes `audit.html` into a run folder, as a whole or not at all.

  Args:
    folder: The run folder.
    audit: The content of its `audit.json`.
    found: The figures.

  Returns:
    The path of the page.
  """
  config = jobs.read_json(folder / "config.json")
  panels = _panels(audit, found)
  path = folder / "audit.html"
  files.write_page(
    path,
    _TEMPLATE,
    title=f"{audit['method']['title']} audited on {config['job']['dataset']}",
    audit=audit,
    facts=_facts(audit, config),
    asked=request_page.asked(jobs.read_json(folder / "data.json")),
    sides=[(_ROLES[side], _TITLES[side]) for side in SIDES],
    rows=table(audit),
    pictures={
      # Made by figures.py, which escapes the names in it.
      name: [
        markupsafe.Markup(figures.render_svg(panel, f"{name}{i}"))
        for i, panel in enumerate(drawn)
      ]
      for name, drawn in panels.items()
    },
    config=config,
  )
  return path


def table(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns rows of a measure, its direction and ideal, and a cell a side.

  Args:
    audit: The content of `audit.json`.
  """
  attacks, klom, accuracy = audit["attack"], audit["klom"], audit["accuracy"]

  def cells(values: Mapping[str, Any], *names: str) -> list[str]:
    found = []
    for side in SIDES:
      value = values[side]
      for name in names:
        value = None if value is None else value[name]
      found.append(report.NOT_AVAILABLE if value is None else f"{value:.3f}")
    return found

  aucs = [
    report.NOT_AVAILABLE if attacks[side] is None else _auc(attacks[side])
    for side in SIDES
  ]
  never = accuracy["control"]["audited"]
  rows = [
    ("AUC of the attack", "↓ 0.5", aucs),
    (
      "Balanced accuracy, best threshold",
      f"↓ {attacks['control']['accuracy']:.3f}",
      cells(attacks, "accuracy"),
    ),
    (
      "True positives at 1% false ones",
      "↓ 0.01",
      cells(attacks, "tpr_at_1_percent"),
    ),
    (
      "True positives at 0.1% false ones",
      "↓ 0.001",
      cells(attacks, "tpr_at_01_percent"),
    ),
    (
      "KLOM, median image, nats",
      f"↓ {klom['control']['median']:.3f}",
      cells(klom, "median"),
    ),
    (
      "KLOM, 95th percentile, nats",
      f"↓ {klom['control']['percentile_95']:.3f}",
      cells(klom, "percentile_95"),
    ),
    (
      "Accuracy on audited images",
      f"≈ {never:.3f}",
      cells(accuracy, "audited"),
    ),
    ("Accuracy on test images", "↑ 1", cells(accuracy, "test")),
  ]
  return [
    {"title": title, "ideal": ideal, "cells": texts}
    for title, ideal, texts in rows
  ]


def _facts(
  audit: Mapping[str, Any], config: Mapping[str, Any]
) -> list[tuple[str, str]]:
  scale, written = audit["scale"], config["created"]
  moment = datetime.datetime.fromisoformat(written)
  return [
    ("Method", f"{audit['method']['title']}, {audit['method']['paper']}"),
    ("Recipe", config["job"]["recipe"]),
    ("Models", f"{scale['models']}, half of them with each audited image"),
    (
      "Audited images",
      f"{scale['audited_images']} of {scale['pool']} that match",
    ),
    ("Other images a model", f"{scale['other_images']:,}"),
    ("Epochs", str(scale["epochs"])),
    ("Hyper-parameters", audit["method"]["settings"]),
    ("Written", moment.strftime("%Y-%m-%d %H:%M %Z").strip()),
  ]


def _panels(
  audit: Mapping[str, Any], found: Figures
) -> dict[str, list[figures.Panel]]:
  seconds = {name: audit["seconds"][name] for name in STEPS}
  titles = {name: name.capitalize() for name in STEPS}
  return {
    "roc": [_roc_panel(found)],
    "scores": [
      _score_panel(side, found.attacks[side])
      for side in SIDES[:2]
      if side in found.attacks
    ],
    "klom": [_klom_panel(found)],
    "time": [
      compare_figures.time_panel(
        seconds,
        {name: report.seconds(value) for name, value in seconds.items()},
        titles,
        {"unlearn": "unlearned"},
        is_compiled=False,
      )
    ],
  }


def _roc_panel(found: Figures) -> figures.Panel:
  """The panel of the comparison, with words for this attack."""
  curves: dict[str, Any] = {
    _ROLES[side]: (each.fpr, each.tpr) for side, each in found.attacks.items()
  }
  names = {_ROLES[side]: title for side, title in _TITLES.items()}
  most = max(each.num_negatives for each in found.attacks.values())
  panel = compare_figures.roc_panel(
    curves, names, {role: role for role in curves}, most
  )

  def draw(axes: mpl_axes.Axes) -> None:
    panel.draw(axes)
    axes.set_title("U-LiRA")
    axes.set_xlabel("never trained, but called unlearned")
    axes.set_ylabel("unlearned, and called so")

  alt = "ROC curves of U-LiRA, AUC " + ", ".join(
    f"{_TITLES[side]} {each.auc:.3f}" for side, each in found.attacks.items()
  )
  return panel._replace(draw=draw, alt=alt)


def _score_panel(side: str, result: ulira.AttackResult) -> figures.Panel:
  """Shows the likelihood ratios of both kinds of model."""
  name = "unlearned" if side == "unlearned" else "trained"
  kinds = {
    f"{name} on the image" if name == "trained" else "unlearned the image": (
      result.positive_scores,
      figures.COLORS[_ROLES[side]],
    ),
    "never trained on it" if name == "trained" else "never had it": (
      result.negative_scores,
      figures.COLORS["retrained"],
    ),
  }
  return _histogram(
    f"Likelihood ratios, {_TITLES[side].lower()} models",
    "log likelihood ratio, nats",
    kinds,
    "share of pairs, %",
  )


def _klom_panel(found: Figures) -> figures.Panel:
  kinds = {
    _TITLES[side]: (values, figures.COLORS[_ROLES[side]])
    for side, values in found.klom.items()
  }
  return _histogram("KLOM", "KL divergence, nats", kinds, "share of images, %")


def _histogram(
  title: str,
  x_label: str,
  kinds: Mapping[str, tuple[np.ndarray, str]],
  y_label: str,
) -> figures.Panel:
  """Shows distributions over each other; the outermost are at the ends."""
  flat = {name: values.ravel() for name, (values, _) in kinds.items()}
  low, high = np.percentile(np.concatenate(list(flat.values())), (1, 99))
  bins = np.linspace(low, max(high, low + 1e-6), 31)

  def draw(axes: mpl_axes.Axes) -> None:
    for name, (_, color) in kinds.items():
      axes.hist(
        np.clip(flat[name], bins[0], bins[-1]),
        bins=bins.tolist(),
        weights=np.full(len(flat[name]), 100 / len(flat[name])),
        histtype="stepfilled",
        color=color,
        edgecolor=color,
        alpha=0.5,
        label=name,
      )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.legend(loc="upper right", fontsize=8.5)

  medians = ", ".join(f"{k} {np.median(v):.3g}" for k, v in flat.items())
  return figures.Panel(draw, f"{title}; medians: {medians}", 4.6, 3.4)
