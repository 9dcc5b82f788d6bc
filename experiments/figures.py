"""Pictures of a run, drawn once and rendered as SVG (page) or PNG (README).

A picture is a row of panels. The page shows every panel as its own inline SVG,
so that a phone stacks what a desktop sets side by side; the PNG has all panels
in one image. Colours mean the same everywhere: the three models, and what was
to be forgotten or kept. They are distinct under colour blindness, and text or
line style repeats what they say. In the SVGs they are CSS variables, so that
the page can choose lighter ones for a dark screen.
"""

import base64
import io
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import sklearn.manifold
import threadpoolctl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import patheffects, ticker
from matplotlib.backends import backend_agg, backend_svg
from PIL import Image

MODELS = ("original", "retrained", "unlearned")
COLORS = {
  "ink": "#1c2330",
  "muted": "#5a6474",
  "grid": "#dfe3e8",
  "card": "#fefefe",
  "dim": "#b4bdc8",
  "original": "#697482",
  "retrained": "#cc8400",
  "unlearned": "#0072b2",
  "forget": "#c2307a",
  "retain": "#0b8f6a",
}
# More classes than this are not legible as bars: the ones that matter are
# chosen.
MAX_BARS = 20
MAX_EMBEDDED = 600
_MAX_CURVE_POINTS = 200
_LINE_STYLES = {"original": "-", "retrained": (0, (4, 1.5)), "unlearned": "-"}
_STYLE: Any = {
  "font.family": "sans-serif",
  "font.sans-serif": ["DejaVu Sans"],
  "font.size": 9.5,
  "axes.titlesize": 10.5,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": COLORS["muted"],
  "axes.labelcolor": COLORS["muted"],
  "axes.titlecolor": COLORS["ink"],
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.facecolor": "none",
  "figure.facecolor": "none",
  "grid.color": COLORS["grid"],
  "grid.linewidth": 0.8,
  "legend.frameon": False,
  "legend.handlelength": 1.4,
  "legend.labelcolor": COLORS["ink"],
  "text.color": COLORS["ink"],
  "xtick.color": COLORS["muted"],
  "ytick.color": COLORS["muted"],
  "xtick.labelcolor": COLORS["ink"],
  "ytick.labelcolor": COLORS["ink"],
  "text.parse_math": False,
  "svg.fonttype": "none",
}


class Panel(NamedTuple):
  """One drawing.

  Attributes:
    draw: Draws it on an empty `Axes`.
    alt: What it shows, in words.
    width: Inches.
    height: Inches.
  """

  draw: Callable[[mpl_axes.Axes], None]
  alt: str
  width: float = 4.5
  height: float = 3.0


def render_svg(panel: Panel, name: str) -> str:
  """Renders a panel as an SVG element to be put into a page.

  Namespaces, metadata and fonts are removed: the page supplies the font, and
  nothing in the result looks like an address.

  Args:
    panel: The panel.
    name: Unique on the page; keeps the identifiers of two SVGs apart.

  Returns:
    The element, from `<svg` to `</svg>`.
  """
  buffer = io.StringIO()
  with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
    figure = _figure(panel.width, panel.height)
    panel.draw(figure.subplots())
    _print(backend_svg.FigureCanvasSVG(figure).print_svg, buffer)
  text = buffer.getvalue()
  text = text[text.index("<svg") :].strip()
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
  # Groups are numbered alike in every SVG, and nothing refers to them.
  text = re.sub(r'<g id="[^"]*"', "<g", text)
  text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
  for role, color in COLORS.items():
    text = text.replace(color, f"var(--{role})")
  text = text.replace("xlink:href=", "href=")
  view_box = re.search(r'viewBox="[^"]*"', text)
  assert view_box is not None
  body = text[text.index(">") + 1 :]
  return (
    f'<svg {view_box.group()} role="img" aria-label="{_attribute(panel.alt)}"'
    # Text grows with the picture, and should not outgrow the page's.
    f' style="max-width: {panel.width * 123:.0f}px">'
    + re.sub(r"\n\s*", "\n", body)
  )


def save_png(
  panels: Sequence[Panel], path: pathlib.Path, *, num_columns: int = 3
) -> None:
  """Writes panels into one PNG file, on white.

  Args:
    panels: At least one.
    path: The file.
    num_columns: The most panels in a row.
  """
  columns = min(num_columns, len(panels))
  rows = math.ceil(len(panels) / columns)
  with mpl.rc_context(_STYLE):
    figure = _figure(
      columns * max(panel.width for panel in panels),
      rows * max(panel.height for panel in panels),
    )
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
      panel.draw(axes)
    for axes in list(grid)[len(panels) :]:
      axes.set_axis_off()
    write_png(figure, path)


def write_png(figure: mpl_figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure to a PNG file, on white.

  Args:
    figure: The figure.
    path: The file.
  """
  figure.set_facecolor("white")
  figure.set_dpi(130)
  figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
  _print(backend_agg.FigureCanvasAgg(figure).print_png, path)


def summary_panel(
  title: str, values: Mapping[str, float], texts: Mapping[str, str], top: float
) -> Panel:
  """Shows one figure of several models as bars with their values.

  Args:
    title: What is shown.
    values: Value by model, 0 or more.
    texts: What is written at the bar's end, by model.
    top: The value of a bar of full length.
  """
  models = list(values)

  def draw(axes: mpl_axes.Axes) -> None:
    for row, model in enumerate(models):
      axes.barh(
        row,
        max(values[model], 0.004 * top),
        color=COLORS[model],
        height=0.62,
      )
      axes.text(values[model] + 0.015 * top, row, texts[model], va="center")
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.set_xlim(0, 1.28 * top)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    axes.set_title(title)

  alt = f"{title}: " + ", ".join(f"{m} {texts[m]}" for m in models)
  return Panel(draw, alt, 4.2, 0.9 + 0.3 * len(models))


def time_panel(
  seconds: Mapping[str, float],
  texts: Mapping[str, str],
  search_seconds: float | None,
) -> Panel:
  """Shows each model's time, the unlearned one's in its two parts.

  Args:
    seconds: Total by model.
    texts: The same as text.
    search_seconds: The part of the unlearned model's time that went into the
      boundary search, or None.
  """
  panel = summary_panel(
    "Time",
    seconds,
    texts,
    max([*seconds.values(), 1e-9]),
  )

  def draw(axes: mpl_axes.Axes) -> None:
    panel.draw(axes)
    if search_seconds is not None and "unlearned" in seconds:
      row = list(seconds).index("unlearned")
      axes.barh(
        row,
        search_seconds,
        height=0.62,
        facecolor="none",
        edgecolor=COLORS["card"],
        hatch="/////",
        linewidth=0,
      )
      axes.set_xlabel("hatched: boundary search", loc="left")

  return Panel(draw, panel.alt)


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
  num_classes = max(len(column) for column in values.values())
  if num_classes <= MAX_BARS:
    return list(range(num_classes))
  table = np.array(
    [[np.nan if v is None else v for v in row] for row in values.values()]
  )
  seen = np.isfinite(table).any(0)
  change = np.full(num_classes, -1.0)
  change[seen] = np.nanmax(table[:, seen], 0) - np.nanmin(table[:, seen], 0)
  order = np.argsort(-change, kind="stable").tolist()
  forgotten = [c for c in forget_classes if c < num_classes]
  chosen = dict.fromkeys([*forgotten, *order])
  return sorted(list(chosen)[:MAX_BARS])


def class_panel(
  values: Mapping[str, Sequence[float | None]],
  class_names: Sequence[str],
  forget_classes: Sequence[int],
) -> Panel:
  """Shows the test accuracy of each class, all models side by side.

  Args:
    values: `K` accuracies in [0, 1] by model.
    class_names: `K` names.
    forget_classes: Classes of the request; they are marked.
  """
  classes = choose_classes(values, forget_classes)
  rows = {model: [values[model][c] for c in classes] for model in values}
  rows_as_percent = {
    model: [None if v is None else 100 * v for v in row]
    for model, row in rows.items()
  }

  def draw(axes: mpl_axes.Axes) -> None:
    _grouped_bars(
      axes, rows_as_percent, [class_names[c] for c in classes], 100.0
    )
    for tick, label in zip(axes.get_yticklabels(), classes, strict=True):
      if label in forget_classes:
        tick.set_color(COLORS["forget"])
        tick.set_fontweight("bold")
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy, %")
    axes.set_title("Accuracy by class", pad=24)

  alt = (
    f"Test accuracy of {len(classes)} classes by model, as bars. The same"
    " figures are in the table below."
  )
  return Panel(draw, alt, height=1.1 + 0.34 * len(classes))


def label_panel(
  new: Sequence[int],
  retrained: Sequence[int] | None,
  class_names: Sequence[str],
) -> Panel:
  """Shows which classes the forget images were given.

  Args:
    new: `K` counts of new labels.
    retrained: `K` counts of the retrained model's predictions, or None.
    class_names: `K` names.
  """
  counts = np.array([new] if retrained is None else [new, retrained], float)
  shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
  order = np.argsort(-shares.max(0), kind="stable")[:MAX_BARS]
  classes = sorted(order.tolist())
  rows = {"unlearned": [float(shares[0, c]) for c in classes]}
  if retrained is not None:
    rows = {"retrained": [float(shares[1, c]) for c in classes], **rows}
  names = {
    "retrained": "retrained model's prediction",
    "unlearned": "new label",
  }

  def draw(axes: mpl_axes.Axes) -> None:
    _grouped_bars(
      axes, rows, [class_names[c] for c in classes], shares.max(), names
    )
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
  return Panel(draw, alt, height=1.1 + 0.34 * len(classes))


def training_panels(
  history: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Panel]:
  """Shows loss and accuracy of the trained models.

  Args:
    history: Rows by model with `epoch`, `loss`, `accuracy` and perhaps
      `step_losses`; empty ones are left out.
  """
  models = [m for m in ("original", "retrained") if history.get(m)]
  if not models:
    return []

  def draw_loss(axes: mpl_axes.Axes) -> None:
    for model in models:
      _curve(axes, history[model], "loss", "step_losses", model, model)
    _finish_loss(axes, "Training loss")

  def draw_accuracy(axes: mpl_axes.Axes) -> None:
    for model in models:
      _curve(axes, history[model], "accuracy", None, model, model, factor=100.0)
    axes.set_ylim(top=101)
    axes.set_title("Training accuracy, %")
    axes.set_xlabel("epoch")
    _integer_ticks(axes)
    axes.legend(loc="lower right")

  ends = ", ".join(
    f"{m} ends at {_number(history[m][-1], 'loss')}" for m in models
  )
  shares = ", ".join(
    f"{m} ends at {_number(history[m][-1], 'accuracy')}" for m in models
  )
  return [
    Panel(draw_loss, f"Training loss by epoch: {ends}"),
    Panel(draw_accuracy, f"Training accuracy by epoch: {shares}"),
  ]


def unlearning_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
  """Shows the loss on forget and retain images while unlearning.

  Args:
    rows: Rows with `epoch`, `forget_loss`, and perhaps `forget_step_losses`
      and the same for `retain`.
  """
  if not rows:
    return []
  parts = [p for p in ("forget", "retain") if _has(rows, f"{p}_loss")]
  labels = {"forget": "forget images, new labels", "retain": "retain images"}

  def draw(axes: mpl_axes.Axes) -> None:
    for part in parts:
      _curve(
        axes, rows, f"{part}_loss", f"{part}_step_losses", part, labels[part]
      )
    _finish_loss(axes, "Unlearning loss")

  ends = ", ".join(f"{p} {_number(rows[-1], f'{p}_loss')}" for p in parts)
  return [Panel(draw, f"Loss while unlearning; at the end: {ends}")]


def embed(features: np.ndarray, *, seed: int = 0) -> np.ndarray | None:
  """Computes a t-SNE map.

  Args:
    features: float `[N, D]`.
    seed: Makes it repeatable.

  Returns:
    float `[N, 2]`; None where there is no map, for fewer than 5 images,
    features that are not finite, or all alike.
  """
  if len(features) < 5 or not np.isfinite(features).all():
    return None
  if features.ndim != 2 or not np.ptp(features, axis=0).any():
    return None
  model = sklearn.manifold.TSNE(
    perplexity=min(30.0, (len(features) - 1) / 3),
    init="pca" if features.shape[1] > 1 else "random",
    max_iter=750,
    random_state=seed,
  )
  # Threads gain nothing on so few points, and lose much on a busy machine.
  with threadpoolctl.threadpool_limits(limits=1):
    return model.fit_transform(np.asarray(features, np.float32))


def choose_embedded(
  is_forget: np.ndarray, *, max_points: int = MAX_EMBEDDED, seed: int = 0
) -> np.ndarray:
  """Chooses the images to map; rare forget images are not thinned out.

  Args:
    is_forget: bool `[M]`.
    max_points: The most images.
    seed: Makes it repeatable.

  Returns:
    int `[N]` indices in ascending order, `N <= max_points`.
  """
  if len(is_forget) <= max_points:
    return np.arange(len(is_forget))
  rng = np.random.default_rng(seed)
  forget = rng.permutation(np.flatnonzero(is_forget))
  retain = rng.permutation(np.flatnonzero(~is_forget))
  share = round(max_points * len(forget) / len(is_forget))
  num_forget = min(len(forget), max(share, max_points // 6))
  chosen = [forget[:num_forget], retain[: max_points - num_forget]]
  return np.sort(np.concatenate(chosen))


def feature_panel(
  model: str,
  points: np.ndarray,
  labels: np.ndarray,
  is_forget: np.ndarray,
  class_names: Sequence[str],
) -> Panel:
  """Shows a t-SNE map of a model's features, the forget images highlighted.

  Args:
    model: `original`, `retrained` or `unlearned`.
    points: float `[N, 2]`.
    labels: int `[N]`; up to 12 classes are named in the map.
    is_forget: bool `[N]`.
    class_names: `K` names.
  """

  def draw(axes: mpl_axes.Axes) -> None:
    axes.plot(*points[~is_forget].T, "o", ms=4, mew=0, color=COLORS["dim"])
    axes.plot(
      *points[is_forget].T,
      "^",
      ms=5.5,
      mew=0.4,
      mec=COLORS["card"],
      color=COLORS["forget"],
    )
    halo = [patheffects.withStroke(linewidth=2.4, foreground=COLORS["card"])]
    classes = np.unique(labels)
    for label in classes if len(classes) <= 12 else []:
      chosen = labels == label
      # A label in the middle of a cluster and not between two of them.
      middle = np.median(points[chosen], axis=0)
      nearest = np.argmin(np.sum((points[chosen] - middle) ** 2, -1))
      axes.annotate(
        _shorten(class_names[label], 14),
        points[chosen][nearest],
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
        fontweight="bold" if is_forget[chosen].any() else "normal",
        path_effects=halo,
      )
    axes.margins(0.07)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
      spine.set(visible=True, color=COLORS["grid"])
    axes.set_title(model.capitalize(), color=COLORS[model])

  alt = (
    f"t-SNE map of the {model} model's features of {len(points)} test images,"
    f" {int(is_forget.sum())} forget images highlighted"
  )
  return Panel(draw, alt, 3.6, 3.6)


def confusion_panel(
  model: str, matrix: Sequence[Sequence[int]], class_names: Sequence[str]
) -> Panel:
  """Shows a confusion matrix, shaded by the share of each row.

  Args:
    model: `original`, `retrained` or `unlearned`.
    matrix: `[K, K]` counts, rows are labels.
    class_names: `K` names; written for up to 20 classes, counts up to 12.
  """
  counts = np.asarray(matrix, float)
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  num_classes = len(counts)

  def draw(axes: mpl_axes.Axes) -> None:
    color = mpl.colors.to_rgb(COLORS[model])
    image = np.empty((*shares.shape, 4))
    image[..., :3] = color
    image[..., 3] = shares
    axes.imshow(image, interpolation="none", aspect="equal")
    if num_classes <= 12:
      for row, column in np.argwhere(counts > 0):
        axes.text(
          column,
          row,
          f"{counts[row, column]:.0f}",
          ha="center",
          va="center",
          fontsize=7.5,
          color="white" if shares[row, column] > 0.55 else COLORS["ink"],
        )
    if num_classes <= MAX_BARS:
      names = [_shorten(name, 12) for name in class_names[:num_classes]]
      turned = max(map(len, names)) > 2
      axes.set_xticks(range(num_classes), names, rotation=90 * turned)
      axes.set_yticks(range(num_classes), names)
    axes.grid(visible=False)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
      spine.set(visible=True, color=COLORS["grid"])
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title(model.capitalize(), color=COLORS[model])

  correct = np.trace(counts)
  alt = (
    f"Confusion matrix of the {model} model on the test images:"
    f" {correct:.0f} of {counts.sum():.0f} on the diagonal"
  )
  return Panel(draw, alt, 4.0, 4.0)


def amplification(images: np.ndarray, moved: np.ndarray) -> float:
  """Chooses by how much to amplify differences so that they can be seen.

  The typical image's largest change is brought to at most half the range.

  Args:
    images: float `[E, H, W, C]` in [0, 1].
    moved: float `[E, H, W, C]` in [0, 1].

  Returns:
    1, 2 or 5 times a power of ten, at least 1.
  """
  if not len(images):
    return 1.0
  change = np.abs(moved - images).reshape(len(images), -1).max(1)
  typical = float(np.median(change))
  if not typical > 0:
    return 1.0
  # The tolerance keeps a change of exactly 0.05 at ten times.
  limit = 0.5 / typical * (1 + 1e-5)
  power = 10.0 ** math.floor(math.log10(max(limit, 1.0)))
  return max(m * power for m in (1, 2, 5) if m * power <= max(limit, 1.0))


def difference(
  images: np.ndarray, moved: np.ndarray, factor: float
) -> np.ndarray:
  """Computes differences to look at: mid-grey is no change.

  Args:
    images: float `[..., C]` in [0, 1].
    moved: float, the same shape.
    factor: The amplification.

  Returns:
    float, the same shape: `0.5 + factor * (moved - images)` clipped to [0, 1].
  """
  return np.clip(0.5 + factor * (moved - images), 0.0, 1.0)


def data_uri(image: np.ndarray, *, max_side: int) -> str:
  """Encodes an image for a page.

  Args:
    image: float `[H, W, C]` in [0, 1], `C` 1 or 3.
    max_side: A larger image is made smaller, to this many pixels.

  Returns:
    A `data:` address of a PNG.
  """
  pixels = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
  picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  if max(picture.size) > max_side:
    picture.thumbnail((max_side, max_side), Image.Resampling.BOX)
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", optimize=True)
  encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f"data:image/png;base64,{encoded}"


def save_examples(
  path: pathlib.Path,
  images: np.ndarray,
  moved: np.ndarray,
  captions: Sequence[str],
  factor: float,
) -> None:
  """Writes forget images, boundary images and differences into one PNG file.

  Args:
    path: The file.
    images: float `[E, H, W, C]` in [0, 1]; up to 8 are drawn.
    moved: float `[E, H, W, C]` in [0, 1].
    captions: `E` titles.
    factor: The amplification of the difference.
  """
  count = min(len(images), 8)
  rows = {
    "forget image": images,
    "at the boundary": moved,
    f"difference × {factor:g}": difference(images, moved, factor),
  }
  with mpl.rc_context(_STYLE):
    figure = _figure(1.0 + 1.25 * count, 4.2)
    grid = figure.subplots(3, count, squeeze=False)
    for row, (name, pictures) in enumerate(rows.items()):
      for column in range(count):
        axes = grid[row, column]
        axes.imshow(
          np.squeeze(np.clip(pictures[column], 0, 1), -1)
          if pictures.shape[-1] == 1
          else np.clip(pictures[column], 0, 1),
          cmap="gray",
          vmin=0,
          vmax=1,
          interpolation="nearest",
        )
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for spine in axes.spines.values():
          spine.set_visible(False)
      grid[row, 0].set_ylabel(name, color=COLORS["ink"])
    for axes, caption in zip(grid[0], captions, strict=False):
      axes.set_title(caption, fontsize=8.5, fontweight="normal", loc="center")
    write_png(figure, path)


def _figure(width: float, height: float) -> mpl_figure.Figure:
  return mpl_figure.Figure(figsize=(width, height), layout="constrained")


def _print(write: Callable[..., None], target: Any) -> None:
  with warnings.catch_warnings():
    # Names in scripts that the font lacks are boxes in the PNG and right on
    # the page.
    warnings.filterwarnings("ignore", message="Glyph .* missing")
    write(target)


def _attribute(text: str) -> str:
  for character, name in (
    ("&", "&amp;"),
    ('"', "&quot;"),
    ("<", "&lt;"),
    (">", "&gt;"),
  ):
    text = text.replace(character, name)
  return text


def _shorten(name: str, length: int) -> str:
  return name if len(name) <= length else name[: length - 1] + "…"


def _number(row: Mapping[str, Any], key: str) -> str:
  value = row.get(key)
  return "not available" if value is None else f"{value:.3f}"


def _has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
  return any(row.get(key) is not None for row in rows)


def _grouped_bars(
  axes: mpl_axes.Axes,
  rows: Mapping[str, Sequence[float | None]],
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
    lengths = [0.0 if v is None else max(v, 0.006 * top) for v in values]
    label = model if legend is None else legend[model]
    axes.barh(middle, lengths, height * 0.9, color=COLORS[model], label=label)
    for y, value in zip(middle, values, strict=True):
      if value is None:
        axes.text(
          0.01 * top, y, "n/a", va="center", fontsize=6, color=COLORS["muted"]
        )
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


def _steps(
  rows: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns epoch and value of all steps, averaged in bins if many."""
  epochs, values = [np.zeros(0)], [np.zeros(0)]
  for row in rows:
    steps = [np.nan if v is None else v for v in row.get(key) or []]
    ends = np.arange(1, len(steps) + 1) / max(len(steps), 1)
    epochs.append(row["epoch"] - 1 + ends)
    values.append(np.array(steps, float))
  epoch, value = np.concatenate(epochs), np.concatenate(values)
  if len(value) <= _MAX_CURVE_POINTS:
    return epoch, value
  edges = np.linspace(0, len(value), _MAX_CURVE_POINTS + 1).astype(int)[:-1]
  counts = np.diff([*edges, len(value)])
  return (
    np.add.reduceat(epoch, edges) / counts,
    np.add.reduceat(value, edges) / counts,
  )


def _curve(
  axes: mpl_axes.Axes,
  rows: Sequence[Mapping[str, Any]],
  key: str,
  step_key: str | None,
  role: str,
  label: str,
  *,
  factor: float = 1.0,
) -> None:
  """Draws a figure by epoch, over its steps in a fainter line."""
  if step_key is not None and _has(rows, step_key):
    axes.plot(
      *_steps(rows, step_key), color=COLORS[role], linewidth=0.9, alpha=0.45
    )
  kept = [row for row in rows if row.get(key) is not None]
  # A mean over the steps of an epoch belongs to its middle.
  shift = 0.5 if step_key is not None and _has(rows, step_key) else 0.0
  axes.plot(
    [row["epoch"] - shift for row in kept],
    [factor * row[key] for row in kept],
    color=COLORS[role],
    linestyle=_LINE_STYLES.get(role, "-"),
    linewidth=2,
    marker="s" if role in ("retrained", "retain") else "o",
    markersize=4 if len(kept) <= 15 else 0,
    label=label,
  )


def _finish_loss(axes: mpl_axes.Axes, title: str) -> None:
  values = np.concatenate([line.get_ydata() for line in axes.lines] or [[]])
  values = values[np.isfinite(values) & (values > 0)]
  is_wide = len(values) > 0 and values.max() > 30 * values.min()
  if is_wide:
    axes.set_yscale("log")
    # The default writes powers in mathematical notation, which is switched off
    # for the sake of class names.
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  else:
    axes.set_ylim(bottom=0)
  axes.set_title(title + (" (logarithmic)" if is_wide else ""))
  axes.set_xlabel("epoch")
  _integer_ticks(axes)
  axes.legend(loc="best")


def _integer_ticks(axes: mpl_axes.Axes) -> None:
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
