"""Pictures of a comparison, in the style of `figures`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import ticker

from experiments import figures

# Losses below are as good as none, and have no place on a logarithmic axis.
_MIN_LOSS = 1e-5
_NUM_BINS = 36
_SIDES = {
  "train_forget": ("forget", "forget, training"),
  "test_forget": ("dim", "forget, test"),
}


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


def scatter_panel(
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

  def draw(axes: mpl_axes.Axes) -> None:
    for model, place in zip(order, places, strict=True):
      point = points[model]
      color = figures.COLORS[roles.get(model, "muted")]
      axes.errorbar(
        100 * point.forget,
        100 * point.retain,
        xerr=100 * point.forget_sd or None,
        yerr=100 * point.retain_sd or None,
        fmt={"original": "s", "retrained": "D"}.get(model, "o"),
        color=color,
        markersize=7 if model in roles else 5,
        elinewidth=0.9,
        zorder=4 if model in roles else 3,
      )
      axes.annotate(
        titles[model],
        (100 * point.forget, 100 * point.retain),
        xytext=(1.1, place),
        textcoords="axes fraction",
        va="center",
        fontsize=9,
        color=color if model in roles else figures.COLORS["ink"],
        fontweight="bold" if model in roles else "normal",
        arrowprops={
          "arrowstyle": "-",
          "color": figures.COLORS["dim"],
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


def loss_panel(
  title: str,
  role: str,
  losses: Mapping[str, np.ndarray],
) -> figures.Panel:
  """Shows the losses of forget images in training and test.

  Args:
    title: The model.
    role: Colour of the title, of `figures.COLORS`.
    losses: Nats by split, `train_forget` and, if there are any, `test_forget`.
  """
  bins = np.geomspace(_MIN_LOSS, 50, _NUM_BINS + 1).tolist()

  def draw(axes: mpl_axes.Axes) -> None:
    for split, values in losses.items():
      color, label = _SIDES[split]
      axes.hist(
        np.clip(values, bins[0], bins[-1]),
        bins=bins,
        weights=np.full(len(values), 100 / max(len(values), 1)),
        histtype="stepfilled",
        color=figures.COLORS[color],
        alpha=0.55,
        label=f"{label} ({len(values):,})",
      )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("cross-entropy of the label, nats")
    axes.set_ylabel("share of images, %")
    axes.set_title(title, color=figures.COLORS[role])
    axes.legend(loc="upper left")

  medians = ", ".join(
    f"{_SIDES[split][1]} {np.median(values):.3g}"
    for split, values in losses.items()
    if len(values)
  )
  return figures.Panel(draw, f"Losses of {title}; medians: {medians}")


def roc_panel(
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  titles: Mapping[str, str],
  roles: Mapping[str, str],
  num_samples: int,
) -> figures.Panel:
  """Shows the attack on the loss, both axes logarithmic.

  Args:
    curves: False and true positive rates by model.
    titles: Names by model.
    roles: Colours by model; the others are thin and grey.
    num_samples: Members, and as many non-members.
  """
  lowest = 0.7 / num_samples

  def draw(axes: mpl_axes.Axes) -> None:
    for model, (fpr, tpr) in sorted(
      curves.items(), key=lambda x: x[0] in roles
    ):
      is_named = model in roles
      axes.plot(
        np.maximum(fpr, lowest),
        np.maximum(tpr, lowest),
        color=figures.COLORS[roles.get(model, "dim")],
        linewidth=2 if is_named else 0.8,
        linestyle=(0, (4, 1.5)) if model == "retrained" else "-",
        label=titles[model] if is_named else None,
        drawstyle="steps-post",
      )
    axes.plot(
      [lowest, 1],
      [lowest, 1],
      ":",
      color=figures.COLORS["muted"],
      linewidth=1.2,
      label="guessing",
    )
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1.05))
    axes.set_ylim(lowest, 1.05)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
      axis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("unseen images called members")
    axes.set_ylabel("members found")
    axes.set_title("Membership attack on the loss")
    axes.legend(loc="lower right", fontsize=8.5)

  alt = f"ROC curves of the loss attack on {num_samples} members, " + ", ".join(
    titles[model] for model in curves
  )
  return figures.Panel(draw, alt, 4.6, 4.2)


def time_panel(
  seconds: Mapping[str, float],
  texts: Mapping[str, str],
  titles: Mapping[str, str],
  roles: Mapping[str, str],
  *,
  is_compiled: bool,
) -> figures.Panel:
  """Shows the time of each method beside that of retraining.

  Args:
    seconds: By model.
    texts: The same as text.
    titles: Names by model.
    roles: Colours by model; the others are grey.
    is_compiled: Whether the times are of programs compiled before.
  """
  top = max([*seconds.values(), 1e-9])

  def draw(axes: mpl_axes.Axes) -> None:
    for row, (model, value) in enumerate(seconds.items()):
      color = figures.COLORS[roles.get(model, "dim")]
      axes.barh(row, max(value, 0.004 * top), color=color, height=0.66)
      axes.text(
        value + 0.015 * top, row, texts[model], va="center", fontsize=8.5
      )
    axes.set_yticks(range(len(seconds)), [titles[m] for m in seconds])
    axes.set_ylim(len(seconds) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * top)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    axes.set_title(
      "Time, compiled before" if is_compiled else "Time, compiling included"
    )

  alt = "Time: " + ", ".join(f"{titles[m]} {texts[m]}" for m in seconds)
  return figures.Panel(draw, alt, 4.6, max(1.4, 0.7 + 0.2 * len(seconds)))


def roles(chosen: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
  """Colours of the models that are shown apart: ours, and one other."""
  colors = ["unlearned", "retain"]
  named = {"original": "original", "retrained": "retrained"}
  found = {}
  for model in chosen:
    found[model] = named[model] if model in named else colors.pop(0)
  return found
