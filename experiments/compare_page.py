"""The page and the printed table of a comparison."""

import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

import markupsafe
import numpy as np

from experiments import (
  compare_figures,
  compare_recipes,
  figures,
  files,
  report,
  request_page,
  yardstick_page,
)

NOT_AVAILABLE = report.NOT_AVAILABLE
seconds = report.seconds
_TEMPLATE = "compare.html.jinja"
_OURS = "psg"
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
  ("seconds_without_compiling", "Time"),
)
_FORGET_SPLITS = ("test_forget", "train_forget")
_STATISTICS = {
  "kl_divergence": "KL divergence from",
  "agreement": "agreement with",
}


def build(
  folder: pathlib.Path,
  results: Mapping[str, Any],
  losses: Mapping[str, Mapping[str, np.ndarray]],
) -> pathlib.Path:
  """Writes `compare.html` and `figures/*.png` into a run folder.

  The page appears as a whole or not at all.

  Args:
    folder: The run folder.
    results: The content of its `results.json`.
    losses: Losses of the forget images of `shown_models`, by split.

  Returns:
    The path of the page.
  """
  job = results["config"]["job"]
  num_methods = len(results["methods"])
  path = folder / "compare.html"
  files.write_page(
    path,
    _TEMPLATE,
    title=f"{num_methods} unlearning method{'s' * (num_methods > 1)} compared"
    f" on {job['dataset']}",
    outcome=[*yardstick_sentences(results), *statements(results)],
    facts=_facts(results),
    asked=request_page.asked(results["data"]),
    short=_short_table(results),
    reasons=_reasons(results),
    standing=standing(results),
    yardstick=_yardstick(results),
    full=_full_table(results),
    missing=_missing(results),
    pictures=_pictures(folder / "figures", results, losses),
    diagnoses=_diagnoses(results),
    methods=_methods(results),
    versions=list(results["config"]["versions"].items()),
    device=results["config"]["device"],
    command=results["config"]["command"],
    commit=results["config"]["git_commit"],
    num_seeds=results["compare"]["seeds"],
  )
  return path


def text_table(results: Mapping[str, Any]) -> str:
  """Returns the short table as text, the retrained model first."""
  table = _short_table(results)
  rows = [["", *(column["plain"] for column in table["columns"]), "verdict"]]
  for row in table["rows"]:
    cells = [cell["text"] + "*" * cell["is_best"] for cell in row["cells"]]
    rows.append([row["model"], *cells, row["verdict"] or ""])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  if any(results["best"].values()):
    lines.append("* surely better than every other method, given the seeds")
  compiled = "without" if _time_name(results) != "seconds" else "with"
  lines.append(f"times are {compiled} compiling, and without evaluation")
  return "\n".join(
    [*lines, *yardstick_sentences(results), *statements(results)]
  )


def markdown(results: Mapping[str, Any]) -> str:
  """Returns the short table and our place in Markdown, to be quoted."""
  table = _short_table(results)
  titles = [f"{x['title']} {x['arrow']}" for x in table["columns"]]
  lines = [
    f"| | {' | '.join(titles)} | as retrained? |",
    f"|{'---|' * (len(titles) + 2)}",
  ]
  for row in table["rows"]:
    cells = [
      f"**{cell['text']}**" if cell["is_best"] else cell["text"]
      for cell in row["cells"]
    ]
    name = f"**{row['title']}**" if row["is_ours"] else row["title"]
    lines.append(f"| {name} | {' | '.join(cells)} | {row['verdict'] or ''} |")
  lines += ["", *yardstick_sentences(results), *statements(results)]
  rows = standing(results)
  rows = [{k: v.replace("|", "\\|") for k, v in x.items()} for x in rows]
  if rows:
    lines += ["", "| | by | place | first | behind the first |"]
    lines.append("|---|---|---|---|---|")
    lines += [
      f"| {x['method']} | {x['title']} | {x['place']} | {x['first']} |"
      f" {x['gap']} |"
      for x in rows
    ]
  return "\n".join([*lines, ""])


def standing(results: Mapping[str, Any]) -> list[dict[str, str]]:
  """Returns our places by each distance to the retrained model, in words."""
  rows = []
  found = results.get("standing", {})
  for each in (x for name in compare_recipes.OURS for x in found.get(name, [])):
    if each["gap"] is None:
      gap = NOT_AVAILABLE
    elif each["rank"] == 1:
      gap = "–"
    else:
      low, high = each["gap"]
      gap = f"{low:+.3f} to {high:+.3f}" + (
        ", may be chance" if each["is_within"] else ""
      )
    metric = results["metrics"][each["metric"]]
    rows.append(
      {
        "method": _title(results, each["method"]),
        "title": f"{metric['title']} {_ARROWS[metric['direction']]}",
        "place": f"{each['rank']} of {each['num_methods']}",
        "first": _title(results, each["first"]),
        "gap": gap,
      }
    )
  return rows


def statements(results: Mapping[str, Any]) -> list[str]:
  """Says which method is nearest to the retrained model, with intervals."""
  found = []
  for nearest in results["nearest"]:
    if nearest is None:
      continue
    first, *others = (_place(results, nearest, x) for x in nearest["methods"])
    part = "test" if nearest["split"] == "test_forget" else "training"
    text = (
      f"By {_STATISTICS[nearest['statistic']]} the retrained model on forget"
      f" images ({part}), {first} is nearest"
    )
    if others:
      text += f", then {others[0]}; {_order(nearest)}"
    found.append(text + ".")
  if not found:
    return ["There is no retrained model to measure the methods by."]
  if any(x is not None and x["gap"] is not None for x in results["nearest"]):
    found.append("Intervals are of 90% over training seeds.")
  return found


def yardstick_sentences(results: Mapping[str, Any]) -> list[str]:
  """Returns our verdict, whether references agree, and the false alarms."""
  found = results.get("yardstick")
  if found is None:
    return []
  models = found["models"]
  said = [
    f"{_title(results, name)}: {models[name]['sentence']}"
    for name in compare_recipes.OURS
    if name in models
  ]
  return [each for each in (*said, yardstick_page.around(found)) if each]


def _yardstick(results: Mapping[str, Any]) -> dict[str, Any] | None:
  """The table of all normalised distances and levels."""
  found = results.get("yardstick")
  if found is None:
    return None
  return yardstick_page.table(
    found,
    {model: _title(results, model) for model in _models(results)},
  )


def shown_models(results: Mapping[str, Any]) -> list[str]:
  """Returns the models whose losses are shown: references, ours, one other."""
  first = results["config"]["job"]["seed"]
  done = [
    cell["method"]
    for cell in results["cells"]
    if (cell["seed"], cell["unlearn_seed"]) == (first, 0)
    and cell["status"] == "done"
  ]
  near = [
    each["method"]
    for found in results["nearest"]
    if found is not None
    for each in found["methods"]
  ]
  methods = [name for name in (_OURS, *near, *done) if name in done]
  references = [x for x in reversed(_REFERENCES) if x in results["summary"]]
  return [*references, *list(dict.fromkeys(methods))[:2]]


def _order(nearest: Mapping[str, Any]) -> str:
  """Says whether the first is surely nearer than the second."""
  means = [each["mean"] for each in nearest["methods"]]
  if means[0] == means[1]:
    return "they are equally near"
  if nearest["gap"] is None:
    return "with one training seed the order may be chance"
  is_share = nearest["statistic"] == "agreement"
  low, high = (100 * x if is_share else x for x in nearest["gap"])
  unit = "points" if is_share else "nats"
  width = f"{low:.1f} to {high:.1f}" if is_share else f"{low:.3f} to {high:.3f}"
  verb = "decides" if nearest["is_decided"] else "does not decide"
  return f"their difference, {width} {unit}, {verb} the order"


def _place(
  results: Mapping[str, Any],
  nearest: Mapping[str, Any],
  each: Mapping[str, Any],
) -> str:
  is_share = nearest["statistic"] == "agreement"
  show = report.percent if is_share else lambda x: f"{x:.3f}"
  text = f"{_title(results, each['method'])} ({show(each['mean'])}"
  if each["interval"] is not None:
    low, high = map(show, each["interval"])
    text += f" [{low}, {high}]"
  return text + ("" if is_share else " nats") + ")"


def _title(results: Mapping[str, Any], model: str) -> str:
  if model in _REFERENCES:
    return model.capitalize()
  return str(results["methods"][model]["title"])


def _models(results: Mapping[str, Any]) -> list[str]:
  references = [x for x in _REFERENCES if x in results["summary"]]
  return [*references, *results["methods"]]


def _show(name: str, figure: Mapping[str, Any]) -> str:
  """Formats a mean and the standard deviation over seeds."""
  mean, sd = figure["mean"], figure["sd"]
  if mean is None:
    return NOT_AVAILABLE
  if name.startswith(("accuracy_", "agreement_")):
    spread = "" if sd is None else f" ± {100 * sd:.1f}"
    return f"{100 * mean:.1f}{spread}%"
  if name.startswith("seconds"):
    spread = "" if sd is None else f" ± {sd:.1f}"
    return f"{mean:.1f}{spread} s"
  digits = 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 3
  spread = "" if sd is None else f" ± {sd:.{digits}f}"
  return f"{mean:.{digits}f}{spread}"


def _cell(results: Mapping[str, Any], model: str, name: str) -> dict[str, Any]:
  figure = results["summary"][model][name]
  text = _show(name, figure)
  note = None
  if figure["mean"] is None:
    note = figure["reason"]
  elif figure["count"] < figure["total"] and not name.startswith("seconds"):
    text += f" ({figure['count']} of {figure['total']})"
    note = figure["reason"]
  return {
    "text": text,
    "note": note,
    "is_missing": figure["mean"] is None,
    "is_best": model in results["best"][name],
  }


def _short_columns(results: Mapping[str, Any]) -> list[tuple[str, str]]:
  columns = []
  for pattern, title in _SHORT:
    for split in _FORGET_SPLITS:
      name = pattern.format(split)
      if name == "seconds_without_compiling":
        name = _time_name(results)
        title = "Time" if name == "seconds" else "Time, compiled"
      if name not in results["metrics"]:
        continue
      values = [x[name]["mean"] for x in results["summary"].values()]
      if any(value is not None for value in values) or split == "train_forget":
        part = ", training" if name.endswith("train_forget") else ""
        columns.append((name, title + part))
        break
  return list(dict.fromkeys(columns))


def _time_name(results: Mapping[str, Any]) -> str:
  """The time without compiling where all have it, else the whole."""
  name = "seconds_without_compiling"
  is_known = all(
    figures[name]["mean"] is not None
    for figures in results["summary"].values()
    if figures["seconds"]["mean"] is not None
  )
  return name if is_known else "seconds"


def _short_table(results: Mapping[str, Any]) -> dict[str, Any]:
  """Methods as rows, the columns that matter most, and the verdict."""
  columns = _short_columns(results)
  measured = (results.get("yardstick") or {"models": {}})["models"]
  leading = yardstick_page.columns(measured)
  rows = []
  for model in _models(results):
    found = results["verification"].get(model)
    rows.append(
      {
        "model": model,
        "title": _title(results, model),
        "paper": results["methods"].get(model, {}).get("paper"),
        "is_ours": model in compare_recipes.OURS,
        "cells": [
          *yardstick_page.cells(measured.get(model), leading),
          *(_cell(results, model, name) for name, _ in columns),
        ],
        "verdict": None if found is None else found["verdict"],
        "why": None if found is None else "; ".join(_why(found)),
      }
    )
  return {
    "columns": [
      *(each.header for each in leading),
      *(
        {
          "title": title,
          "plain": title.lower(),
          "arrow": _ARROWS[results["metrics"][name]["direction"]],
        }
        for name, title in columns
      ),
    ],
    "rows": rows,
  }


def _why(found: Mapping[str, Any]) -> list[str]:
  return [*found["against"], *found["reasons"]]


def _reasons(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [
    {
      "title": _title(results, method),
      "verdict": found["verdict"],
      "reasons": _why(found),
    }
    for method, found in results["verification"].items()
    if _why(found)
  ]


def _full_table(results: Mapping[str, Any]) -> dict[str, Any]:
  """Metrics as rows, models as columns, the retrained one first."""
  models = _models(results)
  return {
    "models": [
      {"name": model, "title": _title(results, model)} for model in models
    ],
    "rows": [
      {
        "title": info["title"],
        "arrow": _ARROWS[info["direction"]],
        "cells": [_cell(results, model, name) for model in models],
      }
      for name, info in results["metrics"].items()
    ],
  }


def _missing(results: Mapping[str, Any]) -> list[str]:
  """Says once why figures are missing, and of whom."""
  about: dict[str, dict[str, None]] = {}
  for model in _models(results):
    for name, figure in results["summary"][model].items():
      if figure["reason"] is not None and name != "seconds_without_compiling":
        about.setdefault(figure["reason"], {})[_title(results, model)] = None
  num_models = len(_models(results))
  return [
    f"{'All' if len(who) == num_models else ', '.join(who)}: {reason}."
    for reason, who in about.items()
  ]


def _diagnoses(results: Mapping[str, Any]) -> list[dict[str, str]]:
  """The worst finding of each method's first run."""
  found: dict[str, dict[str, str]] = {}
  for cell in results["cells"]:
    if cell["method"] in found:
      continue
    row = {"title": _title(results, cell["method"]), "seed": str(cell["seed"])}
    if cell["status"] == "diverged":
      row |= {"verdict": "diverged", "text": cell["reason"]}
    else:
      worst = cell["diagnosis"]["findings"][0]
      row |= {
        "verdict": cell["diagnosis"]["verdict"],
        "text": f"{worst['evidence']}: {worst['advice']}",
      }
    found[cell["method"]] = row
  return list(found.values())


def _methods(results: Mapping[str, Any]) -> list[dict[str, str]]:
  rows = []
  for name, method in results["methods"].items():
    arguments = ", ".join(f"{k}={v}" for k, v in method["arguments"].items())
    rows.append(
      {
        "name": name,
        "title": method["title"],
        "paper": method["paper"],
        "arguments": arguments or "its defaults",
        "note": method["note"] or "",
      }
    )
  return rows


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
  counts, stated = results["data"]["counts"], results["compare"]
  job = results["config"]["job"]

  def pair(split: str) -> str:
    return f"{counts[f'train_{split}']:,} + {counts[f'test_{split}']:,}"

  return [
    ("Recipe", job["recipe"]),
    ("To forget (training + test)", pair("forget")),
    ("To keep (training + test)", pair("retain")),
    ("Training seeds", f"{stated['seeds']}, from {job['seed']}"),
    ("Unlearning seeds each", str(stated["unlearn_seeds"])),
    ("Hyper-parameters", stated["settings"]),
    ("Written", _date(results["config"]["created"])),
  ]


def _date(text: str) -> str:
  moment = datetime.datetime.fromisoformat(text)
  return moment.strftime("%Y-%m-%d %H:%M %Z").strip()


def _pictures(
  folder: pathlib.Path,
  results: Mapping[str, Any],
  losses: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, report.Picture]:
  """Draws the pictures, as PNG files and for the page."""
  folder.mkdir(exist_ok=True)
  roles = compare_figures.roles(shown_models(results))
  titles = {model: _title(results, model) for model in _models(results)}
  panels = {
    "scatter": _scatter(results, titles, roles),
    "losses": [
      compare_figures.loss_panel(titles[model], roles[model], by_split)
      for model, by_split in losses.items()
    ],
    "attack": _attack(results, titles, roles),
    "time": _times(results, titles, roles),
  }
  pictures = {}
  for name, drawn in panels.items():
    columns = min(2, max(len(drawn), 1))
    svgs = [
      # Made by figures.py, which escapes the names in it.
      markupsafe.Markup(figures.render_svg(panel, f"{name}{i}"))
      for i, panel in enumerate(drawn)
    ]
    pictures[name] = report.Picture(svgs, columns)
    if drawn:
      figures.save_png(drawn, folder / f"{name}.png", num_columns=columns)
  return pictures


def _scatter(
  results: Mapping[str, Any],
  titles: Mapping[str, str],
  roles: Mapping[str, str],
) -> list[figures.Panel]:
  for split in _FORGET_SPLITS:
    points = {}
    for model in titles:
      found = [
        results["summary"][model].get(name) or {"mean": None}
        for name in (f"accuracy_{split}", "accuracy_test_retain")
      ]
      if all(figure["mean"] is not None for figure in found):
        points[model] = compare_figures.Point(
          found[0]["mean"],
          found[1]["mean"],
          found[0]["sd"] or 0.0,
          found[1]["sd"] or 0.0,
        )
    if points:
      part = "test" if split == "test_forget" else "training"
      return [compare_figures.scatter_panel(points, titles, roles, part)]
  return []


def _attack(
  results: Mapping[str, Any],
  titles: Mapping[str, str],
  roles: Mapping[str, str],
) -> list[figures.Panel]:
  """Draws the curves of the first seed."""
  seed = results["config"]["job"]["seed"]
  curves, num_samples = {}, 0
  for row in results["rows"]:
    figure = row["metrics"].get("mia_loss_auc", {})
    is_first = row["seed"] == seed and not row["unlearn_seed"]
    if is_first and figure.get("roc"):
      curves[row["model"]] = (figure["roc"]["fpr"], figure["roc"]["tpr"])
      num_samples = figure["num_samples"]
  if not curves:
    return []
  return [compare_figures.roc_panel(curves, titles, roles, num_samples)]


def _times(
  results: Mapping[str, Any],
  titles: Mapping[str, str],
  roles: Mapping[str, str],
) -> list[figures.Panel]:
  name = _time_name(results)
  found = {
    model: results["summary"][model][name]["mean"]
    for model in titles
    if model != "original"
    and results["summary"][model][name]["mean"] is not None
  }
  if not found:
    return []
  texts = {model: seconds(value) for model, value in found.items()}
  return [
    compare_figures.time_panel(
      found, texts, titles, roles, is_compiled=name != "seconds"
    )
  ]
