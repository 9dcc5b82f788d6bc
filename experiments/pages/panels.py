"""What pages show: bars, curves, maps and distributions, as panels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import patheffects, ticker

from experiments.pages import figures, tables

MAX_BARS = 20
"""More classes are not legible as bars: the ones that matter are chosen."""
_COLORS = figures.COLORS
_MAX_CURVE_POINTS = 200

Axes = mpl_axes.Axes
Rows = Sequence[Mapping[str, Any]]
# Accuracies in [0, 1], or None, of each class by model.
Classes = Mapping[str, Sequence[float | None]]


class Tile(NamedTuple):
  """One figure of several models.

  Attributes:
    title: What is shown.
    ideal: What would be ideal.
    values: Value by model, 0 or more.
    texts: The same as text.
    top: The value of a bar of full length.
  """

  title: str
  ideal: str
  values: Mapping[str, float]
  texts: Mapping[str, str]
  top: float

  @classmethod
  def of(
    cls, title: str, ideal: str, values: Mapping[str, float], *, is_time: bool
  ) -> "Tile":
    """Returns the tile of times, or of shares."""
    show = tables.seconds if is_time else tables.percent
    top = max([*values.values(), 1e-9]) if is_time else 1.0
    texts = {model: show(value) for model, value in values.items()}
    return cls(title, ideal, values, texts, top)

  def alt(self, titles: Iterable[str]) -> str:
    """Returns the figures in words."""
    pairs = zip(titles, self.texts.values(), strict=True)
    return f"{self.title}: " + ", ".join(f"{x} {text}" for x, text in pairs)


def summary(tile: Tile) -> figures.Panel:
  """Shows one figure of several models as bars with their values."""
  models = list(tile.values)

  def draw(axes: Axes) -> None:
    bars(axes, tile, models, [_COLORS[model] for model in models])

  return figures.Panel(draw, tile.alt(models), 4.2, 0.9 + 0.3 * len(models))


def run_times(tile: Tile, search_seconds: float | None) -> figures.Panel:
  """Shows each model's time, the unlearned one's in its two parts.

  Args:
    tile: The times.
    search_seconds: The part of the unlearned model's time that went into the
      boundary search and new last layers, or None.
  """
  panel = summary(tile)

  def draw(axes: Axes) -> None:
    panel.draw(axes)
    if search_seconds is not None and "unlearned" in tile.values:
      row = list(tile.values).index("unlearned")
      style: Any = {"facecolor": "none", "edgecolor": _COLORS["card"]}
      axes.barh(
        row, search_seconds, height=0.62, hatch="/////", linewidth=0, **style
      )
      axes.set_xlabel("hatched: search, new last layers", loc="left")

  return figures.Panel(draw, panel.alt)


def choose_classes(values: Classes, forget_classes: Sequence[int]) -> list[int]:
  """Chooses the classes to show: those forgotten, then those that changed most.

  Args:
    values: `K` accuracies by model.
    forget_classes: Classes of the request.

  Returns:
    At most `MAX_BARS` class indices in ascending order.
  """
  num_classes = max(map(len, values.values()))
  if num_classes <= MAX_BARS:
    return list(range(num_classes))
  table = np.array([_floats(column) for column in values.values()])
  is_known = np.isfinite(table).any(0)
  known = table[:, is_known]
  change = np.full(num_classes, -1.0)
  change[is_known] = np.nanmax(known, 0) - np.nanmin(known, 0)
  order = np.argsort(-change, kind="stable").tolist()
  forgotten = [c for c in forget_classes if c < num_classes]
  return sorted(list(dict.fromkeys([*forgotten, *order]))[:MAX_BARS])


def classes(
  values: Classes, class_names: Sequence[str], forget_classes: Sequence[int]
) -> figures.Panel:
  """Shows the test accuracy of each class, all models side by side.

  Args:
    values: `K` accuracies by model.
    class_names: `K` names.
    forget_classes: Classes of the request; they are marked.
  """
  shown = choose_classes(values, forget_classes)
  rows = {x: 100 * _floats(column)[shown] for x, column in values.items()}

  def draw(axes: Axes) -> None:
    _grouped_bars(axes, rows, [class_names[c] for c in shown], 100.0)
    for tick, label in zip(axes.get_yticklabels(), shown, strict=True):
      if label in forget_classes:
        tick.set(color=_COLORS["forget"], fontweight="bold")
    axes.set(xlim=(0, 100), xlabel="test accuracy, %")
    axes.set_title("Accuracy by class", pad=24)

  alt = (
    f"Test accuracy of {len(shown)} classes by model, as bars. The same"
    " figures are in the table below."
  )
  return figures.Panel(draw, alt, height=1.1 + 0.34 * len(shown))


def labels(
  new: Sequence[int],
  retrained: Sequence[int] | None,
  class_names: Sequence[str],
) -> figures.Panel:
  """Shows which classes the forget images were given.

  Args:
    new: `K` counts of new labels.
    retrained: `K` counts of the retrained model's predictions, or None.
    class_names: `K` names.
  """
  counts = np.array([new] if retrained is None else [new, retrained], float)
  shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
  order = np.argsort(-shares.max(0), kind="stable")[:MAX_BARS]
  shown = sorted(order.tolist())
  # The new labels stand below what they should be.
  titles = {
    "unlearned": "new label",
    "retrained": "retrained model's prediction",
  }
  pairs = list(zip(titles, shares[:, shown], strict=False))
  rows = dict(reversed(pairs))

  def draw(axes: Axes) -> None:
    names = [class_names[c] for c in shown]
    _grouped_bars(axes, rows, names, shares.max(), titles)
    axes.set_xlim(0, 1.02 * max(shares.max(), 1))
    axes.set_xlabel("share of the forget images (training), %")
    axes.set_title("Where the forget images go", pad=24)

  alt = "Share of forget images by new label" + (
    "" if retrained is None else " and by the retrained model's prediction"
  )
  alt += ": " + ", ".join(
    f"{class_names[c]} " + " / ".join(f"{s:.0f}%" for s in shares[:, c])
    for c in order[:5]
  )
  return figures.Panel(draw, alt, height=1.1 + 0.34 * len(shown))


def training(history: Mapping[str, Rows]) -> list[figures.Panel]:
  """Shows loss and accuracy of the trained models.

  Args:
    history: Rows by model with `epoch`, `loss`, `accuracy` and perhaps
      `step_losses`; empty ones are left out.
  """
  models = [m for m in ("original", "retrained") if history.get(m)]
  if not models:
    return []

  def draw_loss(axes: Axes) -> None:
    for model in models:
      _curve(axes, history[model], "loss", model, model, steps="step_losses")
    _finish_loss(axes, "Training loss")

  def draw_accuracy(axes: Axes) -> None:
    for model in models:
      _curve(axes, history[model], "accuracy", model, model, factor=100.0)
    axes.set_ylim(top=101)
    _finish_curve(axes, "Training accuracy, %", "lower right")

  panels = []
  for draw, key in ((draw_loss, "loss"), (draw_accuracy, "accuracy")):
    last = ((m, history[m][-1].get(key)) for m in models)
    ends = ", ".join(f"{m} ends at {tables.decimals(x)}" for m, x in last)
    panels.append(figures.Panel(draw, f"Training {key} by epoch: {ends}"))
  return panels


def unlearning(rows: Rows) -> list[figures.Panel]:
  """Shows the loss on forget and retain images while unlearning.

  Args:
    rows: Rows with `epoch`, `forget_loss`, and perhaps `forget_step_losses`
      and the same for `retain`.
  """
  if not rows:
    return []
  parts = {"forget": "forget images, new labels", "retain": "retain images"}
  parts = {p: x for p, x in parts.items() if _has(rows, f"{p}_loss")}

  def draw(axes: Axes) -> None:
    for part, label in parts.items():
      steps = f"{part}_step_losses"
      _curve(axes, rows, f"{part}_loss", part, label, steps=steps)
    _finish_loss(axes, "Unlearning loss")

  last = ((p, rows[-1].get(f"{p}_loss")) for p in parts)
  ends = ", ".join(f"{p} {tables.decimals(x)}" for p, x in last)
  return [figures.Panel(draw, f"Loss while unlearning; at the end: {ends}")]


def feature_map(
  model: str,
  points: np.ndarray,
  labels: np.ndarray,
  is_forget: np.ndarray,
  class_names: Sequence[str],
) -> figures.Panel:
  """Shows a t-SNE map of a model's features, the forget images highlighted.

  Args:
    model: `original`, `retrained` or `unlearned`.
    points: float `[N, 2]`.
    labels: int `[N]`; up to 12 classes are named in the map.
    is_forget: bool `[N]`.
    class_names: `K` names.
  """
  halo = [patheffects.withStroke(linewidth=2.4, foreground=_COLORS["card"])]
  place: Any = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
  marks: Any = {"mec": _COLORS["card"], "color": _COLORS["forget"]}

  def draw(axes: Axes) -> None:
    kept, forgotten = points[~is_forget].T, points[is_forget].T
    axes.plot(*kept, "o", ms=4, mew=0, color=_COLORS["dim"])
    axes.plot(*forgotten, "^", ms=5.5, mew=0.4, **marks)
    names = np.unique(labels)
    for label in names if len(names) <= 12 else []:
      is_own = labels == label
      # A label in the middle of a cluster and not between two of them.
      middle = np.median(points[is_own], axis=0)
      nearest = np.argmin(np.sum((points[is_own] - middle) ** 2, -1))
      axes.annotate(
        _shorten(class_names[label], 14),
        points[is_own][nearest],
        xytext=(0, 5),
        fontsize=8.5,
        fontweight="bold" if is_forget[is_own].any() else "normal",
        path_effects=halo,
        **place,
      )
    axes.margins(0.07)
    axes.set(xticks=[], yticks=[])
    _frame(axes, model)

  alt = (
    f"t-SNE map of the {model} model's features of {len(points)} test images,"
    f" {int(is_forget.sum())} forget images highlighted"
  )
  return figures.Panel(draw, alt, 3.6, 3.6)


def confusion(
  model: str, matrix: Sequence[Sequence[int]], class_names: Sequence[str]
) -> figures.Panel:
  """Shows a confusion matrix, shaded by the share of each row.

  Args:
    model: `original`, `retrained` or `unlearned`.
    matrix: `[K, K]` counts, rows are labels.
    class_names: `K` names; written for up to 20 classes, counts up to 12.
  """
  counts = np.asarray(matrix, float)
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  num_classes = len(counts)
  color = np.array(mpl.colors.to_rgb(_COLORS[model]))
  place: Any = {"ha": "center", "va": "center", "fontsize": 7.5}

  def draw(axes: Axes) -> None:
    image = np.empty((*shares.shape, 4))
    image[..., :3], image[..., 3] = color, shares
    axes.imshow(image, interpolation="none", aspect="equal")
    for row, column in np.argwhere(counts > 0) if num_classes <= 12 else []:
      ink = "white" if shares[row, column] > 0.55 else _COLORS["ink"]
      text = f"{counts[row, column]:.0f}"
      axes.text(column, row, text, color=ink, **place)
    if num_classes <= MAX_BARS:
      names = [_shorten(name, 12) for name in class_names[:num_classes]]
      turned = max(map(len, names)) > 2
      axes.set_xticks(range(num_classes), names, rotation=90 * turned)
      axes.set_yticks(range(num_classes), names)
    axes.tick_params(length=0, labelsize=8)
    axes.set(xlabel="prediction", ylabel="label")
    _frame(axes, model)

  alt = (
    f"Confusion matrix of the {model} model on the test images:"
    f" {np.trace(counts):.0f} of {counts.sum():.0f} on the diagonal"
  )
  return figures.Panel(draw, alt, 4.0, 4.0)


def bars(
  axes: Axes,
  tile: Tile,
  names: Sequence[str],
  colors: Sequence[str],
  fontsize: float | None = None,
) -> None:
  """Draws a bar a model, with its value at the end."""
  lengths = np.array(list(tile.values.values()))
  rows = range(len(lengths))
  axes.barh(rows, np.maximum(lengths, 0.004 * tile.top), 0.62, color=colors)
  for row, text in zip(rows, tile.texts.values(), strict=True):
    end = lengths[row] + 0.015 * tile.top
    axes.text(end, row, text, va="center", fontsize=fontsize)
  axes.set_yticks(rows, names)
  axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.28 * tile.top), xticks=[])
  axes.tick_params(length=0)
  axes.spines["bottom"].set_visible(False)
  axes.grid(visible=False)
  axes.set_title(tile.title)


def _grouped_bars(
  axes: Axes,
  rows: Mapping[str, np.ndarray],
  names: Sequence[str],
  top: float,
  titles: Mapping[str, str] | None = None,
) -> None:
  """Draws horizontal bars, one group a name and one bar a model."""
  height = 0.8 / len(rows)
  positions = np.arange(len(names))
  style: Any = {"va": "center", "fontsize": 6, "color": _COLORS["muted"]}
  for place, (model, values) in enumerate(rows.items()):
    middle = positions + (place - (len(rows) - 1) / 2) * height
    # A bar of length 0 stays visible; one without a figure says so.
    lengths = np.nan_to_num(np.maximum(values, 0.006 * top))
    title = model if titles is None else titles[model]
    axes.barh(middle, lengths, height * 0.9, color=_COLORS[model], label=title)
    for y in middle[np.isnan(values)]:
      axes.text(0.01 * top, y, "n/a", **style)
  axes.set_yticks(positions, [_shorten(name, 20) for name in names])
  axes.set_ylim(len(names) - 0.45, -0.55)
  axes.grid(visible=False, axis="y")
  axes.tick_params(axis="y", length=0)
  axes.legend(
    # On the right, where it may reach over the names of the classes.
    loc="lower right",
    bbox_to_anchor=(1, 1),
    ncols=len(rows),
    borderpad=0,
    borderaxespad=0.4,
    columnspacing=1.2,
  )


def _frame(axes: Axes, model: str) -> None:
  """Frames a picture that has no axes of numbers."""
  axes.grid(visible=False)
  for spine in axes.spines.values():
    spine.set(visible=True, color=_COLORS["grid"])
  axes.set_title(model.capitalize(), color=_COLORS[model])


def logarithmic(axes: Axes, name: str) -> None:
  """Makes the axis `x` or `y` logarithmic."""
  axes.set(**{f"{name}scale": "log"})
  axis = axes.xaxis if name == "x" else axes.yaxis
  # The default writes powers in mathematical notation, which is switched off
  # for the sake of class names.
  axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axis.set_minor_formatter(ticker.NullFormatter())


def _curve(
  axes: Axes,
  rows: Rows,
  key: str,
  role: str,
  label: str,
  *,
  steps: str = "",
  factor: float = 1.0,
) -> None:
  """Draws a figure by epoch, over its steps in a fainter line."""
  # A mean over the steps of an epoch belongs to its middle.
  shift = 0.5 if _has(rows, steps) else 0.0
  if shift:
    points = _steps(rows, steps)
    axes.plot(*points, color=_COLORS[role], linewidth=0.9, alpha=0.45)
  kept = [row for row in rows if row.get(key) is not None]
  axes.plot(
    [row["epoch"] - shift for row in kept],
    [factor * row[key] for row in kept],
    color=_COLORS[role],
    linestyle=figures.DASHES if role == "retrained" else "-",
    linewidth=2,
    marker="s" if role in ("retrained", "retain") else "o",
    markersize=4 if len(kept) <= 15 else 0,
    label=label,
  )


def _steps(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns epoch and value of all steps, averaged in bins if many."""
  steps = [(row["epoch"] - 1, _floats(row.get(key) or [])) for row in rows]
  value = np.concatenate([values for _, values in steps])
  epoch = np.concatenate(
    [
      start + np.arange(1, len(values) + 1) / max(len(values), 1)
      for start, values in steps
    ]
  )
  if len(value) <= _MAX_CURVE_POINTS:
    return epoch, value
  edges = np.linspace(0, len(value), _MAX_CURVE_POINTS + 1).astype(int)[:-1]
  counts = np.diff([*edges, len(value)])
  means = [np.add.reduceat(x, edges) / counts for x in (epoch, value)]
  return means[0], means[1]


def _finish_loss(axes: Axes, title: str) -> None:
  values = np.concatenate([line.get_ydata() for line in axes.lines] or [[]])
  values = values[np.isfinite(values) & (values > 0)]
  is_wide = len(values) > 0 and values.max() > 30 * values.min()
  if is_wide:
    logarithmic(axes, "y")
  else:
    axes.set_ylim(bottom=0)
  _finish_curve(axes, title + (" (logarithmic)" if is_wide else ""), "best")


def _finish_curve(axes: Axes, title: str, place: Any) -> None:
  axes.set(title=title, xlabel="epoch")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.legend(loc=place)


def _floats(values: Sequence[float | None]) -> np.ndarray:
  return np.array([np.nan if x is None else x for x in values], float)


def _has(rows: Rows, key: str) -> bool:
  return any(row.get(key) is not None for row in rows)


def _shorten(name: str, length: int) -> str:
  return name if len(name) <= length else name[: length - 1] + "…"
