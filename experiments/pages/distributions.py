"""What comparisons and audits show: many models, and how they spread."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.pages import figures, panels, tables

_COLORS = figures.COLORS
# Losses below are as good as none, and have no place on a logarithmic axis.
_LOSSES = np.geomspace(1e-5, 50, 37)
_SIDES = {"train_forget": "forget", "test_forget": "dim"}


class Cast(NamedTuple):
  """The models of a comparison.

  Attributes:
    titles: Their names.
    roles: Colours, of `figures.COLORS`, of those that are shown apart; the
      others are grey.
  """

  titles: Mapping[str, str]
  roles: Mapping[str, str]

  @classmethod
  def of(cls, titles: Mapping[str, str], shown: Sequence[str]) -> "Cast":
    """Shows apart the references, ours and one other."""
    others = [x for x in shown if x not in ("original", "retrained")]
    colors = dict(zip(others, ("unlearned", "retain"), strict=False))
    return cls(titles, {model: colors.get(model, model) for model in shown})

  def color(self, model: str, other: str = "dim") -> str:
    """Returns the colour of a model."""
    return _COLORS[self.roles.get(model, other)]


def times(tile: panels.Tile, cast: Cast) -> figures.Panel:
  """Shows the time of many models."""
  names = [cast.titles[model] for model in tile.values]
  colors = [cast.color(model) for model in tile.values]

  def draw(axes: panels.Axes) -> None:
    panels.bars(axes, tile, names, colors, fontsize=8.5)

  alt = tile._replace(title="Time").alt(names)
  return figures.Panel(draw, alt, 4.6, max(1.4, 0.7 + 0.2 * len(names)))


def scatter(
  points: Mapping[str, tuple[float, float, float, float]],
  cast: Cast,
  split: str,
) -> figures.Panel:
  """Shows what each method forgets against what it keeps.

  Args:
    points: By model, the accuracies in [0, 1] on forget and on retain images,
      and their standard deviations over seeds, 0 where unknown.
    cast: The models.
    split: `"test"` or `"training"`, of the forget images.
  """
  # Names stand in a column beside the picture, in the order of the points, so
  # that they never lie on each other.
  order = sorted(points, key=lambda m: (points[m][1], points[m][0]))
  places = np.linspace(0.01, 0.99, len(order)) if len(order) > 1 else [0.5]
  # From the beginning of the name, not from its middle.
  line = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5)}
  line |= {"color": _COLORS["dim"], "shrinkA": 1, "shrinkB": 3}
  text: Any = {"textcoords": "axes fraction", "va": "center", "fontsize": 9}

  def draw(axes: panels.Axes) -> None:
    for model, place in zip(order, places, strict=True):
      forget, retain, forget_sd, retain_sd = (100 * x for x in points[model])
      is_named = model in cast.roles
      axes.errorbar(
        forget,
        retain,
        xerr=forget_sd or None,
        yerr=retain_sd or None,
        fmt={"original": "s", "retrained": "D"}.get(model, "o"),
        color=cast.color(model, "muted"),
        markersize=7 if is_named else 5,
        elinewidth=0.9,
        zorder=4 if is_named else 3,
      )
      axes.annotate(
        cast.titles[model],
        (forget, retain),
        xytext=(1.1, place),
        color=cast.color(model, "ink"),
        fontweight="bold" if is_named else "normal",
        arrowprops=line,
        annotation_clip=False,
        **text,
      )
    axes.margins(0.06)
    axes.set(
      title="What is forgotten, and what is kept",
      xlabel=f"accuracy on forget images ({split}), %",
      ylabel="accuracy on retain images (test), %",
    )

  alt = "Accuracy on forget and on retain images: " + ", ".join(
    f"{cast.titles[m]} {100 * p[0]:.0f}% and {100 * p[1]:.0f}%"
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
    f"{tables.PARTS[split]} ({len(x):,})": (x, _COLORS[_SIDES[split]])
    for split, x in values.items()
  }

  def draw(axes: panels.Axes) -> None:
    _histograms(axes, kinds, _LOSSES)
    panels.logarithmic(axes, "x")
    axes.set(
      xlabel="cross-entropy of the label, nats", ylabel="share of images, %"
    )
    axes.set_title(title, color=_COLORS[role])
    axes.legend(loc="upper left")

  medians = ", ".join(
    f"{tables.PARTS[split]} {np.median(x):.3g}"
    for split, x in values.items()
    if len(x)
  )
  return figures.Panel(draw, f"Losses of {title}; medians: {medians}")


def histograms(
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
  values = np.concatenate([x for x, _ in flat.values()])
  low, high = np.percentile(values, (1, 99))
  bins = np.linspace(low, max(high, low + 1e-6), 31)

  def draw(axes: panels.Axes) -> None:
    _histograms(axes, flat, bins)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.legend(loc="upper right", fontsize=8.5)

  medians = ", ".join(f"{k} {np.median(x):.3g}" for k, (x, _) in flat.items())
  return figures.Panel(draw, f"{title}; medians: {medians}", 4.6, 3.4)


def roc(
  curves: Mapping[str, tuple[Any, Any]],
  cast: Cast,
  num_samples: int,
  **words: str,
) -> figures.Panel:
  """Shows an attack, both axes logarithmic.

  Args:
    curves: False and true positive rates by model.
    cast: The models.
    num_samples: Members, and as many non-members.
    **words: `title`, `xlabel` and `ylabel`.
  """
  lowest = 0.7 / num_samples
  guessing: Any = {"color": _COLORS["muted"], "linewidth": 1.2}

  def draw(axes: panels.Axes) -> None:
    for model in sorted(curves, key=lambda model: model in cast.roles):
      is_named = model in cast.roles
      axes.plot(
        *(np.maximum(rates, lowest) for rates in curves[model]),
        color=cast.color(model),
        linewidth=2 if is_named else 0.8,
        linestyle=figures.DASHES if model == "retrained" else "-",
        label=cast.titles[model] if is_named else None,
        drawstyle="steps-post",
      )
    axes.plot([lowest, 1], [lowest, 1], ":", label="guessing", **guessing)
    panels.logarithmic(axes, "x")
    panels.logarithmic(axes, "y")
    axes.set(xlim=(lowest, 1.05), ylim=(lowest, 1.05), **words)
    axes.legend(loc="lower right", fontsize=8.5)

  names = ", ".join(cast.titles[model] for model in curves)
  alt = f"ROC curves of the loss attack on {num_samples} members, {names}"
  return figures.Panel(draw, alt, 4.6, 4.2)


def _histograms(
  axes: panels.Axes,
  kinds: Mapping[str, tuple[np.ndarray, str]],
  bins: np.ndarray,
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
