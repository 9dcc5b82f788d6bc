"""What pages show: bars, curves, maps and distributions, as panels."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import patheffects, ticker

from experiments.pages import figures, tables

MAX_BARS = 20
"""More classes are not legible as bars: the ones that matter are chosen."""
_COLORS = figures.COLORS
_DASHES = (0, (4, 1.5))
_MAX_CURVE_POINTS = 200
# Losses below are as good as none, and have no place on a logarithmic axis.
_LOSSES = np.geomspace(1e-5, 50, 37)
_SIDES = {
  "train_forget": ("forget", "forget, training"),
  "test_forget": ("dim", "forget, test"),
}

Axes = mpl_axes.Axes
Rows = Sequence[Mapping[str, Any]]


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


class Point(NamedTuple):
  """A model between forgetting and retaining.

  Attributes:
    forget: Accuracy on forget images, in [0, 1].
    retain: Accuracy on retain images, in [0, 1].
    forget_sd: Its standard deviation over seeds; 0 where unknown.
    retain_sd: Likewise.
  """

  forget: float
  retain: float
  forget_sd: float = 0.0
  retain_sd: float = 0.0


def summary(tile: Tile) -> figures.Panel:
  """Shows one figure of several models as bars with their values."""

  def draw(axes: Axes) -> None:
    _bars(axes, tile, tile.values, tile.values)

  return figures.Panel(
    draw, _spoken(tile, tile.values), 4.2, 0.9 + 0.3 * len(tile.values)
  )


def run_times(tile: Tile, search_seconds: float | None) -> figures.Panel:
  """Shows each model's time, the unlearned one's in its two parts.

  Args:
    tile: The times.
    search_seconds: The part of the unlearned model's time that went into the
      boundary search, or None.
  """

  def draw(axes: Axes) -> None:
    _bars(axes, tile, tile.values, tile.values)
    if search_seconds is not None and "unlearned" in tile.values:
      row = list(tile.values).index("unlearned")
      axes.barh(
        row,
        search_seconds,
        height=0.62,
        facecolor="none",
        edgecolor=_COLORS["card"],
        hatch="/////",
        linewidth=0,
      )
      axes.set_xlabel("hatched: boundary search", loc="left")

  return figures.Panel(draw, _spoken(tile, tile.values))


def times(
  tile: Tile, titles: Mapping[str, str], roles: Mapping[str, str]
) -> figures.Panel:
  """Shows the time of many models.

  Args:
    tile: The times.
    titles: Names by model.
    roles: Colours by model, of `figures.COLORS`; the others are grey.
  """
  colors = {model: roles.get(model, "dim") for model in tile.values}
  names = [titles[model] for model in tile.values]

  def draw(axes: Axes) -> None:
    _bars(axes, tile, names, colors.values(), fontsize=8.5)

  alt = _spoken(tile._replace(title="Time"), names)
  return figures.Panel(draw, alt, 4.6, max(1.4, 0.7 + 0.2 * len(names)))


def choose_classes(
  values: Mapping[str, Sequence[float | None]], forget_classes: Sequence[int]
) -> list[int]:
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
  change = np.full(num_classes, -1.0)
  known = table[:, is_known]
  change[is_known] = np.nanmax(known, 0) - np.nanmin(known, 0)
  order = np.argsort(-change, kind="stable").tolist()
  forgotten = [c for c in forget_classes if c < num_classes]
  return sorted(list(dict.fromkeys([*forgotten, *order]))[:MAX_BARS])


def classes(
  values: Mapping[str, Sequence[float | None]],
  class_names: Sequence[str],
  forget_classes: Sequence[int],
) -> figures.Panel:
  """Shows the test accuracy of each class, all models side by side.

  Args:
    values: `K` accuracies in [0, 1] by model.
    class_names: `K` names.
    forget_classes: Classes of the request; they are marked.
  """
  shown = choose_classes(values, forget_classes)
  rows = {x: 100 * _floats(column)[shown] for x, column in values.items()}

  def draw(axes: Axes) -> None:
    _grouped_bars(axes, rows, [class_names[c] for c in shown], 100.0)
    for tick, label in zip(axes.get_yticklabels(), shown, strict=True):
      if label in forget_classes:
        tick.set_color(_COLORS["forget"])
        tick.set_fontweight("bold")
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy, %")
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
  rows = {"unlearned": shares[0, shown]}
  if retrained is not None:
    rows = {"retrained": shares[1, shown], **rows}
  names = {
    "retrained": "retrained model's prediction",
    "unlearned": "new label",
  }

  def draw(axes: Axes) -> None:
    title = [class_names[c] for c in shown]
    _grouped_bars(axes, rows, title, shares.max(), names)
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
    axes.set_title("Training accuracy, %")
    _finish_curve(axes, "lower right")

  def ends(key: str) -> str:
    values = ((m, history[m][-1].get(key)) for m in models)
    return ", ".join(f"{m} ends at {tables.decimals(x)}" for m, x in values)

  return [
    figures.Panel(draw_loss, f"Training loss by epoch: {ends('loss')}"),
    figures.Panel(
      draw_accuracy, f"Training accuracy by epoch: {ends('accuracy')}"
    ),
  ]


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

  ends = ", ".join(
    f"{p} {tables.decimals(rows[-1].get(f'{p}_loss'))}" for p in parts
  )
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

  def draw(axes: Axes) -> None:
    kept, forgotten = points[~is_forget].T, points[is_forget].T
    axes.plot(*kept, "o", ms=4, mew=0, color=_COLORS["dim"])
    style: Any = {"mec": _COLORS["card"], "color": _COLORS["forget"]}
    axes.plot(*forgotten, "^", ms=5.5, mew=0.4, **style)
    names = np.unique(labels)
    for label in names if len(names) <= 12 else []:
      of_class = labels == label
      # A label in the middle of a cluster and not between two of them.
      middle = np.median(points[of_class], axis=0)
      nearest = np.argmin(np.sum((points[of_class] - middle) ** 2, -1))
      axes.annotate(
        _shorten(class_names[label], 14),
        points[of_class][nearest],
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
        fontweight="bold" if is_forget[of_class].any() else "normal",
        path_effects=halo,
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

  def draw(axes: Axes) -> None:
    color = np.broadcast_to(
      mpl.colors.to_rgb(_COLORS[model]), (*shares.shape, 3)
    )
    image = np.concatenate([color, shares[..., None]], -1)
    axes.imshow(image, interpolation="none", aspect="equal")
    for row, column in np.argwhere(counts > 0) if num_classes <= 12 else []:
      axes.text(
        column,
        row,
        f"{counts[row, column]:.0f}",
        ha="center",
        va="center",
        fontsize=7.5,
        color="white" if shares[row, column] > 0.55 else _COLORS["ink"],
      )
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


def scatter(
  points: Mapping[str, Point],
  titles: Mapping[str, str],
  roles: Mapping[str, str],
  split: str,
) -> figures.Panel:
  """Shows what each method forgets against what it keeps.

  Args:
    points: By model.
    titles: Names by model.
    roles: Colours by model, of `figures.COLORS`; the others are grey.
    split: `"test"` or `"training"`, of the forget images.
  """
  # Names stand in a column beside the picture, in the order of the points, so
  # that they never lie on each other.
  order = sorted(points, key=lambda m: (points[m].retain, points[m].forget))
  places = np.linspace(0.01, 0.99, len(order)) if len(order) > 1 else [0.5]

  def draw(axes: Axes) -> None:
    for model, place in zip(order, places, strict=True):
      forget, retain, forget_sd, retain_sd = (100 * x for x in points[model])
      is_named = model in roles
      color = _COLORS[roles.get(model, "muted")]
      axes.errorbar(
        forget,
        retain,
        xerr=forget_sd or None,
        yerr=retain_sd or None,
        fmt={"original": "s", "retrained": "D"}.get(model, "o"),
        color=color,
        markersize=7 if is_named else 5,
        elinewidth=0.9,
        zorder=4 if is_named else 3,
      )
      axes.annotate(
        titles[model],
        (forget, retain),
        xytext=(1.1, place),
        textcoords="axes fraction",
        va="center",
        fontsize=9,
        color=color if is_named else _COLORS["ink"],
        fontweight="bold" if is_named else "normal",
        arrowprops={
          "arrowstyle": "-",
          "color": _COLORS["dim"],
          "linewidth": 0.6,
          # From the beginning of the name, not from its middle.
          "relpos": (0, 0.5),
          "shrinkA": 1,
          "shrinkB": 3,
        },
        annotation_clip=False,
      )
    axes.margins(0.06)
    axes.set_xlabel(f"accuracy on forget images ({split}), %")
    axes.set_ylabel("accuracy on retain images (test), %")
    axes.set_title("What is forgotten, and what is kept")

  alt = "Accuracy on forget and on retain images: " + ", ".join(
    f"{titles[m]} {100 * p.forget:.0f}% and {100 * p.retain:.0f}%"
    for m, p in points.items()
  )
  return figures.Panel(draw, alt, 5.8, max(3.6, 1.2 + 0.19 * len(order)))


def losses(
  title: str, role: str, values: Mapping[str, np.ndarray]
) -> figures.Panel:
  """Shows the losses of forget images in training and test.

  Args:
    title: The model.
    role: Colour of the title, of `figures.COLORS`.
    values: Nats by split, `train_forget` and, if there are any, `test_forget`.
  """
  kinds = {
    f"{_SIDES[split][1]} ({len(x):,})": (x, _COLORS[_SIDES[split][0]])
    for split, x in values.items()
  }

  def draw(axes: Axes) -> None:
    _histograms(axes, kinds, _LOSSES)
    _logarithmic(axes, "x")
    axes.set_xlabel("cross-entropy of the label, nats")
    axes.set_ylabel("share of images, %")
    axes.set_title(title, color=_COLORS[role])
    axes.legend(loc="upper left")

  medians = ", ".join(
    f"{_SIDES[split][1]} {np.median(x):.3g}"
    for split, x in values.items()
    if len(x)
  )
  return figures.Panel(draw, f"Losses of {title}; medians: {medians}")


def distributions(
  title: str,
  x_label: str,
  y_label: str,
  kinds: Mapping[str, tuple[np.ndarray, str]],
) -> figures.Panel:
  """Shows distributions over each other; the outermost are at the ends.

  Args:
    title: The title.
    x_label: Of the values.
    y_label: Of their shares.
    kinds: Values of any shape, and their colour, by name.
  """
  flat = {name: (x.ravel(), color) for name, (x, color) in kinds.items()}
  every = np.concatenate([x for x, _ in flat.values()])
  low, high = np.percentile(every, (1, 99))
  bins = np.linspace(low, max(high, low + 1e-6), 31)

  def draw(axes: Axes) -> None:
    _histograms(axes, flat, bins)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title)
    axes.legend(loc="upper right", fontsize=8.5)

  medians = ", ".join(f"{k} {np.median(x):.3g}" for k, (x, _) in flat.items())
  return figures.Panel(draw, f"{title}; medians: {medians}", 4.6, 3.4)


def roc(
  curves: Mapping[str, tuple[Any, Any]],
  titles: Mapping[str, str],
  roles: Mapping[str, str],
  num_samples: int,
  words: tuple[str, str, str] = (
    *("Membership attack on the loss", "unseen images called members"),
    "members found",
  ),
) -> figures.Panel:
  """Shows an attack, both axes logarithmic.

  Args:
    curves: False and true positive rates by model.
    titles: Names by model.
    roles: Colours by model; the others are thin and grey.
    num_samples: Members, and as many non-members.
    words: The title, and what stands at the axes.
  """
  lowest = 0.7 / num_samples
  guessing: Any = {
    "color": _COLORS["muted"],
    "linewidth": 1.2,
    "label": "guessing",
  }

  def draw(axes: Axes) -> None:
    for model, (fpr, tpr) in sorted(
      curves.items(), key=lambda x: x[0] in roles
    ):
      is_named = model in roles
      axes.plot(
        np.maximum(fpr, lowest),
        np.maximum(tpr, lowest),
        color=_COLORS[roles.get(model, "dim")],
        linewidth=2 if is_named else 0.8,
        linestyle=_DASHES if model == "retrained" else "-",
        label=titles[model] if is_named else None,
        drawstyle="steps-post",
      )
    axes.plot([lowest, 1], [lowest, 1], ":", **guessing)
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    axes.set(xlim=(lowest, 1.05), ylim=(lowest, 1.05))
    axes.set(xlabel=words[1], ylabel=words[2])
    axes.set_title(words[0])
    axes.legend(loc="lower right", fontsize=8.5)

  alt = f"ROC curves of the loss attack on {num_samples} members, " + ", ".join(
    titles[model] for model in curves
  )
  return figures.Panel(draw, alt, 4.6, 4.2)


def roles(models: Sequence[str]) -> dict[str, str]:
  """Colours of the models that are shown apart: ours, and one other."""
  others = [x for x in models if x not in ("original", "retrained")]
  colors = dict(zip(others, ("unlearned", "retain"), strict=False))
  return {model: colors.get(model, model) for model in models}


def _spoken(tile: Tile, names: Any) -> str:
  pairs = zip(names, tile.texts.values(), strict=True)
  return f"{tile.title}: " + ", ".join(f"{name} {text}" for name, text in pairs)


def _bars(
  axes: Axes, tile: Tile, names: Any, colors: Any, fontsize: float | None = None
) -> None:
  """Draws a bar a model, with its value at the end."""
  room: Any = {"va": "center", "fontsize": fontsize}
  for row, (model, color) in enumerate(zip(tile.values, colors, strict=True)):
    value = tile.values[model]
    length = max(value, 0.004 * tile.top)
    axes.barh(row, length, color=_COLORS[color], height=0.62)
    axes.text(value + 0.015 * tile.top, row, tile.texts[model], **room)
  axes.set_yticks(range(len(tile.values)), names)
  axes.set_ylim(len(tile.values) - 0.4, -0.6)
  axes.set(xlim=(0, 1.28 * tile.top), xticks=[])
  axes.tick_params(length=0)
  axes.spines["bottom"].set_visible(False)
  axes.grid(visible=False)
  axes.set_title(tile.title)


def _grouped_bars(
  axes: Axes,
  rows: Mapping[str, np.ndarray],
  names: Sequence[str],
  top: float,
  legend: Mapping[str, str] | None = None,
) -> None:
  """Draws horizontal bars, one group a name and one bar a model."""
  height = 0.8 / len(rows)
  positions = np.arange(len(names))
  for place, (model, values) in enumerate(rows.items()):
    middle = positions + (place - (len(rows) - 1) / 2) * height
    # A bar of length 0 stays visible; one without a figure says so.
    lengths = np.nan_to_num(np.maximum(values, 0.006 * top))
    label = model if legend is None else legend[model]
    axes.barh(middle, lengths, height * 0.9, color=_COLORS[model], label=label)
    style: Any = {"va": "center", "fontsize": 6, "color": _COLORS["muted"]}
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


def _histograms(
  axes: Axes, kinds: Mapping[str, tuple[np.ndarray, str]], bins: np.ndarray
) -> None:
  """Draws distributions as shares; what is outside is at the ends."""
  for name, (values, color) in kinds.items():
    axes.hist(
      np.clip(values, bins[0], bins[-1]),
      bins=bins.tolist(),
      weights=np.full(len(values), 100 / max(len(values), 1)),
      histtype="stepfilled",
      color=color,
      alpha=0.55,
      label=name,
    )


def _frame(axes: Axes, model: str) -> None:
  """Frames a picture that has no axes of numbers."""
  axes.grid(visible=False)
  for spine in axes.spines.values():
    spine.set(visible=True, color=_COLORS["grid"])
  axes.set_title(model.capitalize(), color=_COLORS[model])


def _logarithmic(axes: Axes, name: str) -> None:
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
  steps: str | None = None,
  factor: float = 1.0,
) -> None:
  """Draws a figure by epoch, over its steps in a fainter line."""
  # A mean over the steps of an epoch belongs to its middle.
  shift = 0.0
  if steps is not None and _has(rows, steps):
    shift = 0.5
    style: Any = {"color": _COLORS[role], "linewidth": 0.9, "alpha": 0.45}
    axes.plot(*_steps(rows, steps), **style)
  kept = [row for row in rows if row.get(key) is not None]
  axes.plot(
    [row["epoch"] - shift for row in kept],
    [factor * row[key] for row in kept],
    color=_COLORS[role],
    linestyle=_DASHES if role == "retrained" else "-",
    linewidth=2,
    marker="s" if role in ("retrained", "retain") else "o",
    markersize=4 if len(kept) <= 15 else 0,
    label=label,
  )


def _steps(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns epoch and value of all steps, averaged in bins if many."""
  epochs, values = [np.zeros(0)], [np.zeros(0)]
  for row in rows:
    steps = _floats(row.get(key) or [])
    ends = np.arange(1, len(steps) + 1) / max(len(steps), 1)
    epochs.append(row["epoch"] - 1 + ends)
    values.append(steps)
  epoch, value = np.concatenate(epochs), np.concatenate(values)
  if len(value) <= _MAX_CURVE_POINTS:
    return epoch, value
  edges = np.linspace(0, len(value), _MAX_CURVE_POINTS + 1).astype(int)[:-1]
  counts = np.diff([*edges, len(value)])
  return (
    np.add.reduceat(epoch, edges) / counts,
    np.add.reduceat(value, edges) / counts,
  )


def _finish_loss(axes: Axes, title: str) -> None:
  values = np.concatenate([line.get_ydata() for line in axes.lines] or [[]])
  values = values[np.isfinite(values) & (values > 0)]
  is_wide = len(values) > 0 and values.max() > 30 * values.min()
  if is_wide:
    _logarithmic(axes, "y")
  else:
    axes.set_ylim(bottom=0)
  axes.set_title(title + (" (logarithmic)" if is_wide else ""))
  _finish_curve(axes, "best")


def _finish_curve(axes: Axes, place: Any) -> None:
  axes.set_xlabel("epoch")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.legend(loc=place)


def _floats(values: Sequence[float | None]) -> np.ndarray:
  return np.array([np.nan if x is None else x for x in values], float)


def _has(rows: Rows, key: str) -> bool:
  return any(row.get(key) is not None for row in rows)


def _shorten(name: str, length: int) -> str:
  return name if len(name) <= length else name[: length - 1] + "…"
