"""The page and the printed table of a comparison."""

import pathlib
from collections.abc import Mapping
from typing import Any

import markupsafe
import numpy as np

from experiments.comparison import recipes
from experiments.pages import (
  distributions,
  exports,
  figures,
  model_checks,
  panels,
  request,
  tables,
  yardstick,
)

_REFERENCES = ("retrained", "original")
_ARROWS = {"up": "↑", "down": "↓", "as_retrained": "≈"}
# What stands in the short table; those of forget images by their test images
# where there are any.
_SHORT = (
  ("accuracy_{}", "Forget accuracy"),
  ("accuracy_test_retain", "Retain accuracy"),
  ("agreement_{}", "Agreement, forget"),
  ("kl_divergence_{}", "KL, forget"),
  ("kl_divergence_test_retain", "KL, retain"),
  ("mia_loss_auc", "Loss attack, AUC"),
)
_FORGET_SPLITS = {"test_forget": "test", "train_forget": "training"}
_STATISTICS = {
  "kl_divergence": "KL divergence from",
  "agreement": "agreement with",
}
_VERDICTS = {
  "equivalent": "yes",
  "not equivalent": "no",
  "diverged": "no",
  "cannot tell": "open",
}
_METHOD = markupsafe.Markup("{} <code>{}</code>")

Results = Mapping[str, Any]


def build(
  folder: pathlib.Path,
  results: Results,
  losses: Mapping[str, Mapping[str, np.ndarray]],
) -> pathlib.Path:
  """Writes `compare.html`, and its figures and tables beside it.

  The page appears as a whole or not at all.

  Args:
    folder: The run folder.
    results: The content of its `results.json`.
    losses: Losses of the forget images of `shown_models`, by split.

  Returns:
    The path of the page.
  """
  config, measured = results["config"], results.get("yardstick")
  examined = results.get("checks")
  num_methods = len(results["methods"])
  heads = {x: tables.Cell(title) for x, title in results["titles"].items()}
  path = folder / "compare.html"
  exports.write_page(
    path,
    "pages/compare.html.jinja",
    pictures=_panels(results, losses),
    columns={0: 1, 1: 1},
    kind="Comparison of unlearning methods",
    title=f"{num_methods} unlearning method{'s' * (num_methods > 1)} compared"
    f" on {config['job']['dataset']}",
    outcome=[*yardstick_sentences(results), *statements(results)],
    facts=[*_facts(results), *request.criteria(results["data"])],
    short=_short_table(results),
    reasons=[
      (results["titles"][method], record["verdict"], why)
      for method, record in results["verification"].items()
      if (why := _why(record))
    ],
    standing=_standing(results),
    yardstick=measured and yardstick.table(measured, heads),
    verdicts=_yardstick_verdicts(results),
    checks=examined and model_checks.table(examined, heads),
    checks_statement=examined and model_checks.statement(examined),
    full=_full_table(results),
    missing=_missing(results),
    diagnoses=_diagnoses(results),
    methods=_methods(results),
    config=config,
    num_seeds=results["compare"]["seeds"],
  )
  return path


def text_table(results: Results) -> str:
  """Returns the short table as text, the retrained model first."""
  table = _short_table(results)
  lines = [["", *(cell.text.lower() for cell in table.heads[1:])]]
  for model, row in zip(results["titles"], table.groups[0].rows, strict=True):
    cells = (cell.text + "*" * (cell.style == "best") for cell in row.cells)
    lines.append([model, *cells])
  text = [tables.aligned(lines)]
  if any(results["best"].values()):
    text.append("* surely better than every other method, given the seeds")
  compiled = "without" if _time_name(results) != "seconds" else "with"
  text.append(f"times are {compiled} compiling, and without evaluation")
  return "\n".join([*text, *yardstick_sentences(results), *statements(results)])


def markdown(results: Results) -> str:
  """Returns the short table and our place in Markdown, to be quoted."""
  table = _short_table(results)
  unnamed = table._replace(heads=[tables.Cell(""), *table.heads[1:]])
  text = [exports.markdown(unnamed)]
  text += [*yardstick_sentences(results), *statements(results)]
  places = standing(results)
  if places:
    heads = ("", "by", "place", "first", "behind the first")
    text += ["", exports.markdown(tables.table(heads, places))]
  return "\n".join(text).rstrip("\n") + "\n"


def standing(results: Results) -> list[tuple[str, ...]]:
  """Returns our places by each distance to the retrained model, in words."""
  rows: list[tuple[str, ...]] = []
  places = results.get("standing", {})
  for place in (x for name in recipes.OURS for x in places.get(name, [])):
    gap = tables.NOT_AVAILABLE
    if place["gap"] is not None and place["rank"] == 1:
      gap = "–"
    elif place["gap"] is not None:
      gap = "{:+.3f} to {:+.3f}".format(*place["gap"])
      gap += ", may be chance" if place["is_within"] else ""
    rows.append(
      (
        results["titles"][place["method"]],
        _measure(results, place["metric"]),
        f"{place['rank']} of {place['num_methods']}",
        results["titles"][place["first"]],
        gap,
      )
    )
  return rows


def statements(results: Results) -> list[str]:
  """Says which method is nearest to the retrained model, with intervals."""
  lines = []
  ranked = [x for x in results["nearest"] if x is not None]
  for nearest in ranked:
    first, *others = (_place(results, nearest, x) for x in nearest["methods"])
    text = (
      f"By {_STATISTICS[nearest['statistic']]} the retrained model on forget"
      f" images ({_FORGET_SPLITS[nearest['split']]}), {first} is nearest"
    )
    if others:
      text += f", then {others[0]}; {_order(nearest)}"
    lines.append(text + ".")
  if not lines:
    return ["There is no retrained model to measure the methods by."]
  if any(x["gap"] is not None for x in ranked):
    lines.append("Intervals are of 90% over training seeds.")
  return lines


def yardstick_sentences(results: Results) -> list[str]:
  """Returns our verdict, whether references agree, and the false alarms."""
  record = results.get("yardstick")
  if record is None:
    return []
  models = record["models"]
  lines = [
    f"{results['titles'][name]}: {models[name]['sentence']}"
    for name in recipes.OURS
    if name in models
  ]
  return [line for line in (*lines, yardstick.around(record)) if line]


def shown_models(results: Results) -> list[str]:
  """Returns the models whose losses are shown: references, ours, one other."""
  first = results["config"]["job"]["seed"]
  done = [
    cell["method"]
    for cell in results["cells"]
    if (cell["seed"], cell["unlearn_seed"]) == (first, 0)
    and cell["status"] == "done"
  ]
  near = [
    place["method"]
    for nearest in results["nearest"]
    if nearest is not None
    for place in nearest["methods"]
  ]
  methods = [name for name in (recipes.OURS[0], *near, *done) if name in done]
  references = [x for x in reversed(_REFERENCES) if x in results["summary"]]
  return [*references, *list(dict.fromkeys(methods))[:2]]


def mean_sd(name: str, figure: Mapping[str, Any]) -> str | None:
  """Formats a mean and the standard deviation over seeds.

  Args:
    name: The metric.
    figure: Its `mean`, None where there is none, and `sd`, None for one value.
  """
  mean, sd = figure["mean"], figure["sd"]
  if mean is None:
    return None
  factor, digits, unit = 1, 3, ""
  if name.startswith(("accuracy_", "agreement_")):
    factor, digits, unit = 100, 1, "%"
  elif name.startswith("seconds"):
    digits, unit = 1, " s"
  elif abs(mean) >= 10:
    digits = 1 if abs(mean) >= 100 else 2
  spread = "" if sd is None else f" ± {factor * sd:.{digits}f}"
  return f"{factor * mean:.{digits}f}{spread}{unit}"


def _order(nearest: Mapping[str, Any]) -> str:
  """Says whether the first is surely nearer than the second."""
  first, second = (place["mean"] for place in nearest["methods"])
  if first == second:
    return "they are equally near"
  if nearest["gap"] is None:
    return "with one training seed the order may be chance"
  low, high = nearest["gap"]
  width = f"{low:.3f} to {high:.3f} nats"
  if nearest["statistic"] == "agreement":
    width = f"{100 * low:.1f} to {100 * high:.1f} points"
  verb = "decides" if nearest["is_decided"] else "does not decide"
  return f"their difference, {width}, {verb} the order"


def _place(
  results: Results, nearest: Mapping[str, Any], place: Mapping[str, Any]
) -> str:
  is_share = nearest["statistic"] == "agreement"
  show = tables.percent if is_share else tables.decimals
  text = f"{results['titles'][place['method']]} ({show(place['mean'])}"
  if place["interval"] is not None:
    text += f" [{', '.join(map(show, place['interval']))}]"
  return text + ("" if is_share else " nats") + ")"


def _measure(results: Results, name: str) -> str:
  info = results["metrics"][name]
  return f"{info['title']} {_ARROWS[info['direction']]}"


def _cell(results: Results, model: str, name: str) -> tables.Cell:
  figure = results["summary"][model][name]
  is_part = figure["count"] < figure["total"] and not name.startswith("seconds")

  def show(figure: Mapping[str, Any]) -> str | None:
    text = mean_sd(name, figure)
    count = f" ({figure['count']} of {figure['total']})" if is_part else ""
    return text and text + count

  is_missing = figure["mean"] is None
  note = figure["reason"] if is_part or is_missing else None
  style = "best" if model in results["best"][name] else ""
  return tables.cell(figure, show, note, style)


def _time_name(results: Results) -> str:
  """The time without compiling where all have it, else the whole."""
  name = "seconds_without_compiling"
  is_known = all(
    figures[name]["mean"] is not None
    for figures in results["summary"].values()
    if figures["seconds"]["mean"] is not None
  )
  return name if is_known else "seconds"


def _short_columns(results: Results) -> dict[str, str]:
  """The metrics of the short table that were computed, with their titles."""
  columns = {}
  for pattern, title in _SHORT:
    for split in _FORGET_SPLITS:
      name = pattern.format(split)
      if name not in results["metrics"]:
        continue
      means = [x[name]["mean"] for x in results["summary"].values()]
      if any(x is not None for x in means) or split == "train_forget":
        part = ", training" if name.endswith("train_forget") else ""
        columns[name] = title + part
        break
  name = _time_name(results)
  if name in results["metrics"]:
    columns[name] = "Time" if name == "seconds" else "Time, compiled"
  return columns


def _measured(results: Results) -> Mapping[str, Any]:
  """What the yardstick measured, by model."""
  models: Mapping[str, Any] = (results.get("yardstick") or {}).get("models", {})
  return models


def _short_table(results: Results) -> tables.Table:
  """Methods as rows, the yardstick, what matters most, and the verdict."""
  measured, columns = _measured(results), _short_columns(results)
  leading = yardstick.columns(measured)
  arrows = {x: _ARROWS[results["metrics"][x]["direction"]] for x in columns}
  heads = [f"{column.title} {column.arrow}".strip() for column in leading]
  heads += [f"{title} {arrows[name]}" for name, title in columns.items()]
  rows = []
  for model in results["titles"]:
    style = "ours" if model in recipes.OURS else ""
    if model in _REFERENCES:
      style = f"reference {model}"
    paper = results["methods"].get(model, {}).get("paper")
    record = results["verification"].get(model)
    verdict = tables.Cell("", style="verdict")
    if record is not None:
      color = f"verdict {_VERDICTS[record['verdict']]}"
      verdict = tables.Cell(record["verdict"], _why(record) or None, color)
    cells = [column.cell(measured.get(model)) for column in leading]
    cells += [_cell(results, model, name) for name in columns]
    head = tables.Cell(results["titles"][model], paper)
    rows.append(tables.Row(head, [*cells, verdict], style))
  return tables.table(("Method", *heads, "As retrained?"), rows)


def _why(record: Mapping[str, Any]) -> str:
  return "; ".join([*record["against"], *record["reasons"]])


def _yardstick_verdicts(results: Results) -> list[tuple[str, str, str]]:
  models = _measured(results)
  return [
    (results["titles"][name], models[name]["verdict"], models[name]["sentence"])
    for name in results["titles"]
    if "verdict" in models.get(name, ())
  ]


def _standing(results: Results) -> tables.Table | None:
  heads = ("Method", "Distance", "Place", "First", "Behind the first")
  rows = standing(results)
  return tables.table(heads, rows) if rows else None


def _full_table(results: Results) -> tables.Table:
  """Metrics as rows, models as columns, the retrained one first."""
  models = results["titles"]
  heads = [
    tables.Cell(title, style=x if x in _REFERENCES else "")
    for x, title in models.items()
  ]
  rows = [
    [
      _measure(results, name),
      *(_cell(results, model, name) for model in models),
    ]
    for name in results["metrics"]
  ]
  return tables.table(("Measure", *heads), rows)


def _missing(results: Results) -> list[str]:
  """Says once why figures are missing, and of whom."""
  models = results["titles"]
  lacking: dict[str, dict[str, None]] = {}
  for model in models:
    for name, figure in results["summary"][model].items():
      if figure["reason"] is not None and name != "seconds_without_compiling":
        names = lacking.setdefault(figure["reason"], {})
        names[models[model]] = None
  return [
    f"{'All' if len(names) == len(models) else ', '.join(names)}: {reason}."
    for reason, names in lacking.items()
  ]


def _diagnoses(results: Results) -> tables.Table:
  """The worst finding of each method's first run."""
  rows: dict[str, tuple[str, str, str]] = {}
  for cell in results["cells"]:
    verdict, text = "diverged", cell.get("reason")
    if cell["status"] != "diverged":
      verdict = cell["diagnosis"]["verdict"]
      text = "{evidence}: {advice}".format(**cell["diagnosis"]["findings"][0])
    method = cell["method"]
    rows.setdefault(method, (results["titles"][method], verdict, text))
  return tables.table(
    ("Method", "Finding", "Evidence and advice"), rows.values()
  )


def _methods(results: Results) -> tables.Table:
  rows = []
  for name, method in results["methods"].items():
    text = ", ".join(f"{k}={v}" for k, v in method["arguments"].items())
    text = text or "its defaults"
    text += f" ({method['note']})" if method["note"] else ""
    title = _METHOD.format(method["title"], name)
    rows.append((title, method["paper"], text))
  return tables.table(("Method", "Source", "Called with"), rows)


def _facts(results: Results) -> list[tuple[str, str]]:
  config, options = results["config"], results["compare"]
  return [
    ("Recipe", config["job"]["recipe"]),
    *request.sizes(results["data"]),
    ("Training seeds", f"{options['seeds']}, from {config['job']['seed']}"),
    ("Unlearning seeds each", str(options["unlearn_seeds"])),
    ("Hyper-parameters", options["settings"]),
    ("Written", tables.date(config["created"])),
  ]


def _panels(
  results: Results, losses: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, list[figures.Panel]]:
  titles = results["titles"]
  cast = distributions.Cast.of(titles, shown_models(results))
  return {
    "scatter": _scatter(results, cast),
    "losses": [
      distributions.losses(titles[model], cast.roles[model], by_split)
      for model, by_split in losses.items()
    ],
    "attack": _attack(results, cast),
    "time": _times(results, cast),
  }


def _scatter(results: Results, cast: distributions.Cast) -> list[figures.Panel]:
  none = {"mean": None}
  for split, part in _FORGET_SPLITS.items():
    names = (f"accuracy_{split}", "accuracy_test_retain")
    points = {}
    for model in cast.titles:
      forget, retain = (results["summary"][model].get(x, none) for x in names)
      if forget["mean"] is not None and retain["mean"] is not None:
        sds = (forget["sd"] or 0.0, retain["sd"] or 0.0)
        points[model] = (forget["mean"], retain["mean"], *sds)
    if points:
      return [distributions.scatter(points, cast, part)]
  return []


def _attack(results: Results, cast: distributions.Cast) -> list[figures.Panel]:
  """Draws the curves of the first seed."""
  first = results["config"]["job"]["seed"]
  attacks = {
    row["model"]: row["metrics"].get("mia_loss_auc", {})
    for row in results["rows"]
    if row["seed"] == first and not row["unlearn_seed"]
  }
  known = {model: x for model, x in attacks.items() if x.get("roc")}
  if not known:
    return []
  rates = {m: (x["roc"]["fpr"], x["roc"]["tpr"]) for m, x in known.items()}
  panel = distributions.roc(
    rates,
    cast,
    list(known.values())[-1]["num_samples"],
    title="Membership attack on the loss",
    xlabel="unseen images called members",
    ylabel="members found",
  )
  return [panel]


def _times(results: Results, cast: distributions.Cast) -> list[figures.Panel]:
  name = _time_name(results)
  means = {
    model: results["summary"][model][name]["mean"]
    for model in cast.titles
    if model != "original"
  }
  known = {model: mean for model, mean in means.items() if mean is not None}
  title = results["metrics"][name]["title"]
  tile = panels.Tile.of(title, "", known, is_time=True)
  return [distributions.times(tile, cast)] if known else []
