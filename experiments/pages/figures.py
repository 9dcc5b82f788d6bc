"""Pictures of a run, rendered as SVG (page), and as PNG and PDF (papers).

A picture is a row of panels. The page shows every panel as its own inline SVG,
so that a phone stacks what a desktop sets side by side; the files have all
panels in one image. Colours mean the same everywhere: the three models, and
what was to be forgotten or kept. They are distinct under colour blindness, and
text or line style repeats what they say. In the SVGs they are CSS variables, so
that the page can choose lighter ones for a dark screen.
"""

import base64
import html
import io
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import matplotlib as mpl
import numpy as np
import sklearn.manifold
import threadpoolctl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib.backends import backend_agg, backend_pdf, backend_svg
from PIL import Image

from experiments import files

MODELS = files.MODELS
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
DASHES = (0, (4, 1.5))
"""The line style of the retrained model."""
MAX_EMBEDDED = 600
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
  # Whole fonts, which publishers ask for, and in which text can be found.
  "pdf.fonttype": 42,
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


class Picture(NamedTuple):
  """Panels of a page.

  Attributes:
    svgs: One element a panel.
    columns: How many stand side by side on a wide screen.
  """

  svgs: list[markupsafe.Markup]
  columns: int


def write(
  pictures: Mapping[str, Sequence[Panel]],
  folder: pathlib.Path | None = None,
  *,
  columns: Mapping[int, int],
) -> dict[str, Picture]:
  """Draws pictures for a page, and as `NAME.png` and `NAME.pdf`.

  Args:
    pictures: Panels by name.
    folder: Of the files, which is made; None for none.
    columns: How many columns a number of panels has; two by default.
  """
  drawn = {}
  for name, panels in pictures.items():
    num_columns = columns.get(len(panels), 2)
    svgs = [render_svg(panel, f"{name}{i}") for i, panel in enumerate(panels)]
    drawn[name] = Picture(svgs, num_columns)
    if panels and folder is not None:
      folder.mkdir(exist_ok=True)
      save(panels, folder / name, num_columns=num_columns)
  return drawn


def render_svg(panel: Panel, name: str) -> markupsafe.Markup:
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
  # Matplotlib has escaped the names in it.
  return markupsafe.Markup(
    f'<svg {view_box.group()} role="img" aria-label="{html.escape(panel.alt)}"'
    # Text grows with the picture, and should not outgrow the page's.
    f' style="max-width: {panel.width * 123:.0f}px">'
    + re.sub(r"\n\s*", "\n", body)
  )


def save(
  panels: Sequence[Panel], path: pathlib.Path, *, num_columns: int
) -> None:
  """Writes panels into one image, as PNG and as PDF, on white.

  Args:
    panels: At least one.
    path: The files without their endings.
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
    _save(figure, path)


def embed(features: np.ndarray) -> np.ndarray | None:
  """Computes a t-SNE map, the same each time.

  Args:
    features: float `[N, D]`.

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
    random_state=0,
  )
  # Threads gain nothing on so few points, and lose much on a busy machine.
  with threadpoolctl.threadpool_limits(limits=1):
    return model.fit_transform(np.asarray(features, np.float32))


def choose_embedded(
  is_forget: np.ndarray, *, max_points: int = MAX_EMBEDDED
) -> np.ndarray:
  """Chooses the images to map; rare forget images are not thinned out.

  Args:
    is_forget: bool `[M]`.
    max_points: The most images.

  Returns:
    int `[N]` indices in ascending order, `N <= max_points`.
  """
  if len(is_forget) <= max_points:
    return np.arange(len(is_forget))
  rng = np.random.default_rng(0)
  forget = rng.permutation(np.flatnonzero(is_forget))
  retain = rng.permutation(np.flatnonzero(~is_forget))
  share = round(max_points * len(forget) / len(is_forget))
  num_forget = min(len(forget), max(share, max_points // 6))
  rows = [forget[:num_forget], retain[: max_points - num_forget]]
  return np.sort(np.concatenate(rows))


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
  """Writes forget images, boundary images and differences into one image.

  Args:
    path: The PNG and the PDF file without their endings.
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
        picture = np.clip(pictures[column], 0, 1)
        axes.imshow(
          picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for spine in axes.spines.values():
          spine.set_visible(False)
      grid[row, 0].set_ylabel(name, color=COLORS["ink"])
    for axes, caption in zip(grid[0], captions, strict=False):
      axes.set_title(caption, fontsize=8.5, fontweight="normal", loc="center")
    _save(figure, path)


def _figure(width: float, height: float) -> mpl_figure.Figure:
  return mpl_figure.Figure(figsize=(width, height), layout="constrained")


def _print(write: Callable[..., None], target: Any, **options: Any) -> None:
  with warnings.catch_warnings():
    # Names in scripts that the font lacks are boxes in the files and right on
    # the page.
    warnings.filterwarnings("ignore", message="Glyph .* missing")
    write(target, **options)


def _save(figure: mpl_figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure to a PNG and a PDF file, the same bytes each time."""
  figure.set_facecolor("white")
  figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
  # The PDF has a resolution of its own, and must come last.
  figure.set_dpi(130)
  with files.replacing(path.with_name(f"{path.name}.png")) as partial:
    _print(backend_agg.FigureCanvasAgg(figure).print_png, partial)
  undated: Any = {"metadata": {"CreationDate": None}}
  with files.replacing(path.with_name(f"{path.name}.pdf")) as partial:
    _print(backend_pdf.FigureCanvasPdf(figure).print_pdf, partial, **undated)
