"""The page and the sentences of an audit."""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import attack, run_folder
from experiments.pages import (
  distributions,
  exports,
  figures,
  panels,
  request,
  tables,
)
from psg_jax import ulira

STEPS = ("train", "unlearn", "predict", "attack")
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


def statements(audit: Mapping[str, Any]) -> list[str]:
  """Says in plain words what the attack finds, and at what price.

  Args:
    audit: The content of `audit.json`.

  Returns:
    Sentences: the finding, the control, the scale.
  """
  attacks, scale = audit["attack"], audit["scale"]
  total = tables.seconds(audit["seconds"]["total"])
  num_images = round(scale["image_passes"] / scale["models"] / scale["epochs"])
  price = (
    f"{scale['models']} models × {num_images:,} images × {scale['epochs']}"
    f" epochs, {scale['audited_images']} of the images audited, in {total}."
  )
  title = audit["method"]["title"]
  before, after, control = (attacks[side] for side in attack.SIDES)
  if after is None:
    num = len(audit["diverged"])
    return [
      f"{title} diverged in {num} of {scale['models']} models: too few are"
      " left to attack.",
      price,
    ]
  low, high = audit["change"]
  return [
    f"{_finding(title, before, after, audit['change'])}: AUC {_auc(after)},"
    f" without unlearning {_auc(before)}, a change of {low:+.3f} to"
    f" {high:+.3f}; guessing is 0.5.",
    f"The control, models never trained on an image against each other, has"
    f" {_auc(control)}. Intervals are of 90% over models.",
    price,
  ]


def _finding(
  title: str,
  before: Mapping[str, Any],
  after: Mapping[str, Any],
  change: tuple[float, float],
) -> str:
  is_told, was_told = (x["auc_interval"][0] > 0.5 for x in (after, before))
  told = "models that unlearned an image from models that never had it"
  if is_told:
    text = f"After {title} the attack tells {told}"
    if change[1] < 0:
      text += ", less surely than trained from never trained before"
    elif change[0] > 0:
      text += ", more surely than trained from never trained before"
    return text
  text = (
    f"After {title} the attack does not find what tells {told} (an AUC of up"
    f" to {after['auc_interval'][1]:.3f} is possible)"
  )
  if not was_told:
    text += ", but nor can it before: these models remember too little"
  return text


def _auc(result: Mapping[str, Any]) -> str:
  low, high = result["auc_interval"]
  return f"{result['auc']:.3f} [{low:.3f}, {high:.3f}]"


def build(
  folder: pathlib.Path, audit: Mapping[str, Any], results: attack.Figures
) -> pathlib.Path:
  """Writes `audit.html`, and its figures and tables beside it.

  The page appears as a whole or not at all.

  Args:
    folder: The run folder.
    audit: The content of its `audit.json`.
    results: The figures.

  Returns:
    The path of the page.
  """
  config, data = (
    run_folder.read_json(folder / f"{x}.json") for x in ("config", "data")
  )
  path = folder / "audit.html"
  exports.write_page(
    path,
    "pages/audit.html.jinja",
    pictures=_panels(audit, results),
    columns={1: 1},
    kind="Audit of an unlearning method",
    title=f"{audit['method']['title']} audited on {config['job']['dataset']}",
    outcome=audit["statements"],
    audit=audit,
    facts=[*_facts(audit, config), *request.criteria(data)],
    summary=_table(audit),
    arguments=tables.table((), audit["method"]["arguments"].items()),
    config=config,
  )
  return path


def _table(audit: Mapping[str, Any]) -> tables.Table:
  """A measure a row: its ideal, and a cell a side."""
  parts = ("attack", "klom", "accuracy")
  sides = tables.Models(
    {side: {x: audit[x][side] for x in parts} for side in attack.SIDES}
  )

  def row(title: str, ideal: str, *path: str, show: Any = None) -> tables.Row:
    # What is as good as it can be has the figure of the control.
    figure = tables.decimals(sides.get("control", *path)) if path[1:] else ""
    cell = tables.Cell(ideal.format(figure), style="ideal")
    shown = sides.row(title, *path, show=show or tables.decimals)
    return shown.led_by(cell)

  rows = [
    row("AUC of the attack", "↓ 0.5", "attack", show=_auc),
    row("Balanced accuracy, best threshold", "↓ {}", "attack", "accuracy"),
    row(
      "True positives at 1% false ones",
      *("↓ 0.01", "attack", "tpr_at_1_percent"),
    ),
    row(
      "True positives at 0.1% false ones",
      *("↓ 0.001", "attack", "tpr_at_01_percent"),
    ),
    row("KLOM, median image, nats", "↓ {}", "klom", "median"),
    row("KLOM, 95th percentile, nats", "↓ {}", "klom", "percentile_95"),
    row("Accuracy on audited images", "≈ {}", "accuracy", "audited"),
    row("Accuracy on test images", "↑ 1", "accuracy", "test"),
  ]
  heads = (tables.Cell(_TITLES[x], style=_ROLES[x]) for x in attack.SIDES)
  return tables.table(("Measure", "Ideal", *heads), rows)


def _facts(
  audit: Mapping[str, Any], config: Mapping[str, Any]
) -> list[tuple[str, str]]:
  scale, method = audit["scale"], audit["method"]
  num_audited, num_others = scale["audited_images"], scale["other_images"]
  return [
    ("Method", f"{method['title']}, {method['paper']}"),
    ("Recipe", config["job"]["recipe"]),
    ("Models", f"{scale['models']}, half of them with each audited image"),
    ("Audited images", f"{num_audited} of {scale['pool']} that match"),
    ("Other images a model", f"{num_others:,}"),
    ("Epochs", str(scale["epochs"])),
    ("Hyper-parameters", method["settings"]),
    ("Written", tables.date(config["created"])),
  ]


def _panels(
  audit: Mapping[str, Any], results: attack.Figures
) -> dict[str, list[figures.Panel]]:
  seconds = {name: audit["seconds"][name] for name in STEPS}
  steps = distributions.Cast(
    {name: name.capitalize() for name in STEPS}, {"unlearn": "unlearned"}
  )
  title = "Time, compiling included"
  tile = panels.Tile.of(title, "", seconds, is_time=True)
  klom = {_TITLES[x]: (y, _color(x)) for x, y in results.klom.items()}
  labels = ("KLOM", "KL divergence, nats", "share of images, %")
  return {
    "roc": [_roc(results)],
    "scores": [
      _scores(side, results.attacks[side])
      for side in attack.SIDES[:2]
      if side in results.attacks
    ],
    "klom": [distributions.histograms(*labels, klom)],
    "time": [distributions.times(tile, steps)],
  }


def _color(side: str) -> str:
  return figures.COLORS[_ROLES[side]]


def _roc(results: attack.Figures) -> figures.Panel:
  """The panel of the comparison, with words for this attack."""
  curves = {_ROLES[x]: (y.fpr, y.tpr) for x, y in results.attacks.items()}
  titles = {_ROLES[side]: title for side, title in _TITLES.items()}
  panel = distributions.roc(
    curves,
    distributions.Cast(titles, {role: role for role in curves}),
    max(x.num_negatives for x in results.attacks.values()),
    title="U-LiRA",
    xlabel="never trained, but called unlearned",
    ylabel="unlearned, and called so",
  )
  alt = "ROC curves of U-LiRA, AUC " + ", ".join(
    f"{_TITLES[side]} {x.auc:.3f}" for side, x in results.attacks.items()
  )
  return panel._replace(alt=alt)


def _scores(side: str, result: ulira.AttackResult) -> figures.Panel:
  """Shows the likelihood ratios of both kinds of model."""
  ours, others = "trained on the image", "never trained on it"
  if side == "unlearned":
    ours, others = "unlearned the image", "never had it"
  return distributions.histograms(
    f"Likelihood ratios, {_TITLES[side].lower()} models",
    "log likelihood ratio, nats",
    "share of pairs, %",
    {
      ours: (result.positive_scores, _color(side)),
      others: (result.negative_scores, _color("control")),
    },
  )
