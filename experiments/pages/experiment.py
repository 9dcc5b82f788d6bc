"""The page of a reproduced experiment: pictures, figures, what is expected."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes as mpl_axes

from experiments import files
from experiments.pages import exports, figures, panels, tables
from experiments.reproduction import catalogue, results

_COLORS = figures.COLORS
# Of what is no model of ours: distinct under colour blindness.
_OTHERS = ("#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#8c7a1f", "#7a5fb0")
_NAMES = {
  "original": "original",
  "retrained": "retrained",
  "recommended": "unlearned",
  "unlearned": "unlearned",
}
_MARKS = "os^Dv<>P"
_TITLES = {
  "accuracy": "Accuracy",
  "agreement": "Agreement",
  "disagreement": "disagreement",
  "kl_divergence": "KL",
  "test_forget": "forget, test",
  "test_retain": "retain, test",
  "train_forget": "forget, training",
  "train_retain": "retain, training",
}
_WORDS = {
  "mia_loss_auc": "Loss attack, AUC",
  "seconds": "Time",
  "retrain_seconds": "Retraining",
  "speedup": "Times faster than retraining",
  "is_chosen": "Chosen",
  "kl_divergence": "KL, forget, training",
  "level_error": "Accuracy, off by",
  "cost": "Cost, of a retraining",
  "expected_low": "Proxies: low",
  "expected_accuracy": "Proxies: expect",
  "expected_high": "Proxies: high",
  "is_inside": "Retrained is inside",
  "is_changed": "Changed at all",
}

Axes = mpl_axes.Axes
Records = Sequence[Mapping[str, Any]]


def build(
  folder: pathlib.Path,
  name: str,
  size: str,
  content: Mapping[str, Any],
  records: Records,
  obtained: Sequence[results.Row],
  expected: Mapping[str, Any] | None,
  findings: Sequence[results.Finding],
) -> pathlib.Path:
  """Writes `experiment.html`, `results.csv`, pictures and tables.

  Args:
    folder: Where to.
    name: Of the experiment.
    size: Of it.
    content: `origin` and `seconds` of what was obtained.
    records: Of all cells.
    obtained: The rows of the table.
    expected: As `results.read`.
    findings: What was compared.

  Returns:
    The path of the page.
  """
  experiment = catalogue.EXPERIMENTS[name]
  drawn = {
    f"picture{number}": _panels(drawing, records)
    for number, drawing in enumerate(experiment.drawings)
  }
  table = _table(experiment, obtained)
  files.write_text(folder / "results.csv", _csv(experiment, records))
  path = folder / "experiment.html"
  exports.write_page(
    path,
    "pages/experiment.html.jinja",
    kind="Reproduced experiment",
    title=experiment.title,
    outcome=[*statements(obtained), *_verdict(findings)],
    facts=_facts(experiment, name, size, content),
    pictures=drawn,
    columns={1: 1, 3: 3},
    titles={
      f"picture{number}": drawing.title
      for number, drawing in enumerate(experiment.drawings)
    },
    figures=table,
    expected=_expected(findings),
    expected_note=_expected_note(expected),
    published=_published(experiment, obtained),
    options=_origin(content["origin"]),
  )
  return path


def text_table(
  experiment: catalogue.Experiment, rows: Sequence[results.Row]
) -> str:
  """Returns the figures as lines for a terminal."""
  return tables.aligned(lines(experiment, rows))


def statements(rows: Sequence[results.Row]) -> list[str]:
  """Says which of our methods is nearer to the retrained model."""
  sentences = []
  for name in ("kl_divergence_test_forget", "kl_divergence_train_forget"):
    by_model = {
      row.key["model"]: row.figures[name].mean
      for row in rows
      if set(row.key) == {"model"} and name in row.figures
    }
    ours, theirs = by_model.get("recommended"), by_model.get("released")
    if ours is None or theirs is None:
      continue
    order = "nearer to" if ours < theirs else "no nearer to"
    sentences.append(
      f"The recommended settings are {order} the retrained model than the"
      f" released code: {ours:.3f} against {theirs:.3f} nats on forgotten"
      f" images ({title(name)})."
    )
    break
  for row in rows:
    if row.key.get("model") == "recommended" and set(row.key) == {"model"}:
      sentences += _nearness(row)
  readings = [
    row.figures["is_inside"] for row in rows if "is_inside" in row.figures
  ]
  total = sum(x.number for x in readings)
  if total:
    inside = sum((x.mean or 0.0) * x.number for x in readings)
    sentences.append(
      f"In {inside:.0f} of {total:.0f} readings the retrained model's accuracy"
      " is inside the interval that proxies expect."
    )
  return sentences


def _nearness(row: results.Row) -> list[str]:
  """Says how far a model is, in distances of retrained models."""
  parts = []
  for part in ("forget", "retain"):
    name = f"{results.NORMALISED}kl_divergence_test_{part}"
    figure = row.figures.get(name)
    if figure is not None and figure.mean is not None:
      parts.append(f"{mean_sd(name, figure)} on {part} images")
  if not parts:
    return []
  return [
    "The recommended settings' divergence from the retrained model, over that"
    f" of a second retrained model: {' and '.join(parts)}."
  ]


def title(name: str) -> str:
  """Returns a figure's name in words."""
  if name in _WORDS:
    return _WORDS[name]
  if name.startswith(results.NORMALISED):
    return f"Normalised {title(name.removeprefix(results.NORMALISED))}"
  for part in ("test_forget", "test_retain", "train_forget", "train_retain"):
    if name.endswith(part):
      kind = name.removesuffix(f"_{part}")
      return f"{_TITLES.get(kind, kind)}, {_TITLES[part]}"
  return name.replace("_", " ").capitalize()


def show(name: str, value: float | None) -> str:
  """Formats a figure by its kind."""
  if value is None:
    return tables.NOT_AVAILABLE
  if name.endswith("seconds"):
    return tables.seconds(value)
  if name == "speedup":
    return tables.ratio(value)
  if name == "is_chosen":
    return "chosen" if value else ""
  if name.startswith(("accuracy", "agreement", "expected_")) or name in (
    *("cost", "level_error"),
    "is_inside",
    "is_changed",
    "crossed",
    "purity",
  ):
    return tables.percent(value)
  if name.startswith(results.NORMALISED):
    return f"{value:.2f}"
  return tables.decimals(value)


def mean_sd(name: str, figure: results.Figure) -> str:
  """Formats a mean with its deviation, or, of a ratio, its interval."""
  text = show(name, figure.mean)
  if figure.sd is None or figure.mean is None or name == "is_chosen":
    return text
  if name.startswith(results.NORMALISED):
    low, high = results.interval(figure.mean, figure.sd, figure.number)
    return f"{figure.mean:.2f} [{max(low, 0):.2f}, {high:.2f}]"
  if text.endswith("%"):
    return f"{100 * figure.mean:.1f} ± {100 * figure.sd:.1f}%"
  return f"{text} ± {show(name, figure.sd)}"


def _columns(rows: Sequence[results.Row]) -> list[str]:
  """The columns of the keys that any row has."""
  return list(dict.fromkeys(name for row in rows for name in row.key))


def lines(
  experiment: catalogue.Experiment, rows: Sequence[results.Row]
) -> list[tuple[str, ...]]:
  """Returns the figures as text, the heads first."""
  columns = _columns(rows)
  heads = (*columns, *(title(x) for x in experiment.figures))
  return [
    heads,
    *(
      (
        *(_value(row.key.get(x)) for x in columns),
        *(
          mean_sd(x, row.figures.get(x, results.NOTHING))
          for x in experiment.figures
        ),
      )
      for row in rows
    ),
  ]


def _value(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:g}" if isinstance(value, float) else str(value)


def _table(
  experiment: catalogue.Experiment, rows: Sequence[results.Row]
) -> tables.Table:
  heads, *rest = lines(experiment, rows)
  return tables.table(heads, rest)


def _csv(experiment: catalogue.Experiment, records: Records) -> str:
  names = dict.fromkeys(
    name
    for record in records
    for name, value in record.items()
    if not isinstance(value, list)
  )
  return files.to_csv(
    [list(names), *([record.get(x) for x in names] for record in records)]
  )


def _facts(
  experiment: catalogue.Experiment,
  name: str,
  size: str,
  content: Mapping[str, Any],
) -> list[tuple[str, str]]:
  jobs = [cell.job for cell in experiment.cells(size)]
  job = jobs[0]
  images = dict.fromkeys(
    f"{x.dataset} ({x.num_train or 'all'} training images)" for x in jobs
  )
  facts = [
    ("Experiment", name),
    ("In the paper", f"{experiment.source} ({catalogue.PAPER})"),
    ("Size", size),
    ("Data set", "; ".join(images)),
    ("Network", f"{job.model}, width {job.width:g}"),
    (
      "Training",
      f"{job.training.num_epochs} epochs of batch {job.training.batch_size},"
      f" rate {job.training.learning_rate:g}, {job.training.schedule}",
    ),
    ("Time", tables.seconds(content["seconds"])),
  ]
  if experiment.note:
    facts.append(("Note", experiment.note))
  return facts


def _verdict(findings: Sequence[results.Finding]) -> list[str]:
  if not findings:
    return []
  wrong = sum(not x.is_as_expected for x in findings)
  if wrong:
    return [f"{wrong} of {len(findings)} figures are not as expected."]
  return [f"All {len(findings)} figures are as expected."]


def _expected(findings: Sequence[results.Finding]) -> tables.Table | None:
  if not findings:
    return None
  rows = []
  for x in findings:
    key = ", ".join(f"{name} {_value(value)}" for name, value in x.key.items())
    cells = [
      tables.Cell(title(x.figure)),
      tables.Cell(show(x.figure, x.obtained)),
      tables.Cell(show(x.figure, x.expected)),
      tables.Cell(show(x.figure, x.tolerance)),
      tables.Cell("yes" if x.is_as_expected else "no"),
    ]
    style = "" if x.is_as_expected else "wrong"
    rows.append(tables.Row(tables.Cell(key), cells, style))
  heads = ("Row", "Figure", "Obtained", "Expected", "Tolerance", "As expected")
  return tables.table(heads, rows)


def _expected_note(expected: Mapping[str, Any] | None) -> str:
  if expected is None:
    return ""
  origin = expected["origin"]
  return (
    f"Expected: measured on {origin['date']} on {origin['device']}, JAX"
    f" {origin['versions']['jax']}, commit {origin['git_commit'] or 'unknown'}."
    " The tolerance follows from the standard deviations."
  )


def _published(
  experiment: catalogue.Experiment, rows: Sequence[results.Row]
) -> tables.Table | None:
  lines = []
  for published in experiment.published:
    for row in rows:
      if dict(row.key) == dict(published.row):
        key = ", ".join(f"{k} {_value(v)}" for k, v in row.key.items())
        mean = row.figures[published.figure].mean
        lines.append(
          (
            key,
            title(published.figure),
            show(published.figure, mean),
            show(published.figure, published.value),
            published.source,
          )
        )
  if not lines:
    return None
  return tables.table(
    ("Row", "Figure", "Obtained", "Published", "Where"), lines
  )


def _origin(origin: Mapping[str, Any]) -> tables.Table:
  pairs = [(x, tables.words(origin[x])) for x in ("command", "date", "device")]
  pairs += [("git commit", tables.words(origin["git_commit"]))]
  pairs += sorted(origin["versions"].items())
  return tables.table(("Name", "Value"), pairs)


def _panels(
  drawing: catalogue.Drawing, records: Records
) -> list[figures.Panel]:
  needed = (drawing.x, drawing.y, drawing.by)
  records = [
    x for x in records if all(x.get(name) is not None for name in needed)
  ]
  if not records:
    return []
  return _KINDS[drawing.kind](drawing, records)


def _groups(
  drawing: catalogue.Drawing, records: Records
) -> dict[Any, list[Mapping[str, Any]]]:
  groups: dict[Any, list[Mapping[str, Any]]] = {}
  for record in records:
    groups.setdefault(record[drawing.by], []).append(record)
  return groups


def _palette(names: Sequence[Any]) -> dict[Any, str]:
  """A colour a name: that of our models where it is one."""
  others = iter(_OTHERS * (len(names) // len(_OTHERS) + 1))
  return {x: _COLORS[_NAMES[x]] if x in _NAMES else next(others) for x in names}


def _means(
  drawing: catalogue.Drawing, group: Records
) -> tuple[list[Any], np.ndarray, np.ndarray]:
  """Values of x in their order, and mean and range of y at each."""
  at: dict[Any, list[float]] = {}
  for record in group:
    at.setdefault(record[drawing.x], []).append(record[drawing.y])
  xs = sorted(at) if not any(isinstance(x, str) for x in at) else list(at)
  return (
    xs,
    np.array([np.mean(at[x]) for x in xs]),
    np.array([[min(at[x]), max(at[x])] for x in xs]).T,
  )


def _alt(drawing: catalogue.Drawing, records: Records) -> str:
  ends = [
    f"{name} {_means(drawing, group)[1][-1]:.3g}"
    for name, group in _groups(drawing, records).items()
  ]
  return f"{drawing.title}; at the end: {', '.join(ends)}"


def _lines_panel(
  drawing: catalogue.Drawing, records: Records
) -> list[figures.Panel]:
  groups = _groups(drawing, records)
  colors = _palette(list(groups))

  def draw(axes: Axes) -> None:
    for number, (name, group) in enumerate(groups.items()):
      xs, means, (low, high) = _means(drawing, group)
      style: Any = {"color": colors[name], "label": str(name)}
      if name == "retrained":
        style["ls"] = figures.DASHES
      mark = _MARKS[number % len(_MARKS)] if len(xs) < 13 else ""
      axes.plot(xs, means, marker=mark, ms=4, **style)
      axes.fill_between(xs, low, high, color=colors[name], alpha=0.15, lw=0)
    axes.set(xlabel=drawing.x.replace("_", " "))
    axes.legend(fontsize=8)

  return [figures.Panel(draw, _alt(drawing, records), 6.0, 3.4)]


def _bars_panel(
  drawing: catalogue.Drawing, records: Records
) -> list[figures.Panel]:
  groups = _groups(drawing, records)
  colors = _palette(list(groups))
  names = list(dict.fromkeys(x[drawing.x] for x in records))
  inches = min(12.0, 4.0 + 0.2 * len(names) * len(groups))

  def draw(axes: Axes) -> None:
    width = 0.8 / len(groups)
    for place, (name, group) in enumerate(groups.items()):
      xs, means, _ = _means(drawing, group)
      at = np.array([names.index(x) for x in xs])
      middle = at + (place - (len(groups) - 1) / 2) * width
      axes.bar(middle, means, width * 0.9, color=colors[name], label=str(name))
    axes.set_xticks(range(len(names)), [str(x) for x in names])
    axes.set(xlabel=drawing.x.replace("_", " "))
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=8, ncols=min(len(groups), int(inches // 2)))

  return [figures.Panel(draw, _alt(drawing, records), inches, 3.4)]


def _points(
  axes: Axes, drawing: catalogue.Drawing, records: Records, alpha: float = 1.0
) -> None:
  """Draws a point a record, one colour and mark a group."""
  groups = _groups(drawing, records)
  colors = _palette(list(groups))
  for number, (name, group) in enumerate(groups.items()):
    axes.plot(
      [x[drawing.x] for x in group],
      [x[drawing.y] for x in group],
      _MARKS[number % len(_MARKS)],
      ms=5,
      mew=0,
      alpha=alpha,
      color=colors[name],
      label=str(name),
    )
  axes.set(xlabel=title(drawing.x), ylabel=title(drawing.y))


def _scatter_panel(
  drawing: catalogue.Drawing, records: Records
) -> list[figures.Panel]:
  def draw(axes: Axes) -> None:
    _points(axes, drawing, records, alpha=0.8)
    axes.margins(0.08)
    axes.legend(fontsize=8)

  return [figures.Panel(draw, _alt(drawing, records), 6.0, 3.8)]


def front(points: np.ndarray) -> np.ndarray:
  """Returns which points `[N, 2]` are on the Pareto front, less being better.

  None is at most as large in both coordinates, and less in one.
  """
  points = np.asarray(points, float)
  no_more = (points[:, None] <= points[None]).all(-1)
  less = (points[:, None] < points[None]).any(-1)
  is_beaten: np.ndarray = np.any(no_more & less, axis=0)
  return ~is_beaten


def _front_panel(
  drawing: catalogue.Drawing, records: Records
) -> list[figures.Panel]:
  all_points = np.array([[x[drawing.x], x[drawing.y]] for x in records])
  best = all_points[front(all_points)]
  best = best[np.argsort(best[:, 0])]

  def draw(axes: Axes) -> None:
    _points(axes, drawing, records)
    axes.plot(*best.T, "-", color=_COLORS["ink"], lw=1, label="front")
    axes.legend(fontsize=8)

  alt = f"{drawing.title}; {len(best)} of {len(all_points)} are on the front"
  return [figures.Panel(draw, alt, 6.0, 3.8)]


def _heat_panel(
  drawing: catalogue.Drawing, records: Records
) -> list[figures.Panel]:
  columns = sorted({x[drawing.x] for x in records})
  rows = sorted({x[drawing.by] for x in records})
  values = np.full((len(rows), len(columns)), np.nan)
  for record in records:
    place = rows.index(record[drawing.by]), columns.index(record[drawing.x])
    values[place] = record[drawing.y]

  def draw(axes: Axes) -> None:
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
      if np.isfinite(value):
        color = "#ffffff" if value < 0.5 else "#000000"
        axes.text(
          column, row, f"{value:.3f}", ha="center", va="center", color=color
        )
    axes.set_xticks(range(len(columns)), [_value(x) for x in columns])
    axes.set_yticks(range(len(rows)), [_value(x) for x in rows])
    axes.set(
      xlabel=drawing.x.replace("_", " "), ylabel=drawing.by.replace("_", " ")
    )
    axes.grid(visible=False)

  alt = (
    f"{drawing.title}: from {np.nanmin(values):.3f} to {np.nanmax(values):.3f}"
  )
  return [figures.Panel(draw, alt, 5.4, 3.6)]


def _maps_panel(
  drawing: catalogue.Drawing, records: Records
) -> list[figures.Panel]:
  shown = []
  for name, group in _groups(drawing, records).items():
    record = group[0]
    names = [str(x) for x in range(max(record["labels"]) + 1)]
    shown.append(
      panels.feature_map(
        name,
        np.array(record["points"]),
        np.array(record["labels"]),
        np.array(record["is_forget"], bool),
        names,
      )
    )
  return shown


_KINDS = {
  "lines": _lines_panel,
  "bars": _bars_panel,
  "scatter": _scatter_panel,
  "front": _front_panel,
  "heat": _heat_panel,
  "maps": _maps_panel,
}
