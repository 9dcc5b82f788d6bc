"""One self-contained page that shows what a run did.

    python -m experiments.report runs/digits

writes `runs/digits/report.html`, and its pictures as PNG files into
`runs/digits/figures`; about five seconds on two cores, of which the t-SNE maps
take one or two. The page needs no network and nothing but itself.
"""

import dataclasses
import datetime
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import numpy as np
import tyro

from experiments import (
  cli,
  figures,
  files,
  read_out,
  read_out_page,
  request_page,
  yardstick_page,
)
from psg_jax import forget, judgement

MODELS = figures.MODELS
NOT_AVAILABLE = "not available"
# All example pictures together have at most this many bytes before they are
# compressed, which keeps the page well under 3 MB.
_MAX_EXAMPLE_BYTES = 1_200_000
_TEMPLATE = "report.html.jinja"
_SPLITS = {
  "train_forget": "Forget, training",
  "test_forget": "Forget, test",
  "train_retain": "Retain, training",
  "test_retain": "Retain, test",
}

_FAILED = "is still mostly in"

_Formatter = Callable[[Any], str]


class Run(NamedTuple):
  """What a run folder holds.

  Attributes:
    config: Options, versions, device, command.
    metrics: Figures by model; at least one of `MODELS`.
    history: Curves by model.
    data: Class names, counts and the forget request.
    examples: Arrays of forget images and their boundary images, or None where
      nothing was unlearned.
    features: Penultimate features by model, `labels` and `is_forget`.
    twins: Pictures of the first twins, or None.
    flips: Rows of `flips.csv`, or None.
    flip_images: Pictures of the first of them, or None.
  """

  config: Mapping[str, Any]
  metrics: Mapping[str, Any]
  history: Mapping[str, Any]
  data: Mapping[str, Any]
  examples: Mapping[str, np.ndarray] | None
  features: Mapping[str, np.ndarray]
  twins: Mapping[str, np.ndarray] | None = None
  flips: Sequence[Mapping[str, str]] | None = None
  flip_images: np.ndarray | None = None


class Picture(NamedTuple):
  """A picture of the page and the README.

  Attributes:
    svgs: One element a panel.
    columns: How many stand side by side on a wide screen.
  """

  svgs: list[markupsafe.Markup]
  columns: int


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Options of the program."""

  run: tyro.conf.Positional[pathlib.Path]
  """The run folder."""


def main() -> None:
  """Writes the page of a run folder and prints its path."""
  options = tyro.cli(
    ReportOptions, description="Write the page that shows what a run did."
  )
  print(build(options.run))


def build(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Writes a run's `report.html` and its `figures/*.png`.

  The page appears as a whole or not at all; a page of before is replaced.

  Args:
    run_dir: The run folder.

  Returns:
    The path of the page.

  Raises:
    ValueError: If the folder or one of its files is missing or unreadable.
  """
  folder = pathlib.Path(run_dir)
  run = read(folder)
  pictures = _pictures(run, folder / "figures")
  title, outcome = headline(run)
  path = folder / "report.html"
  files.write_page(
    path,
    _TEMPLATE,
    title=title,
    outcome=outcome,
    warnings=[
      f"{model}: {line}"
      for model, figures_of in run.metrics.items()
      for line in figures_of.get("warnings", ())
    ],
    facts=_facts(run),
    models=_models(run),
    has_reference="retrained" in run.metrics,
    tiles=_tiles(run),
    asked=request_page.asked(run.data),
    source=request_page.source(run.data),
    twins=request_page.twins(run.data, run.twins),
    by_column=request_page.by_column(run.metrics, percent),
    distance=_distance(run),
    read_out=read_out_page.read_out(run.metrics, _class_names(run), percent),
    flips=read_out_page.flips(run.flips, run.flip_images, run.metrics),
    judgement=read_out_page.judgement(run.metrics),
    yardstick=_yardstick(run),
    reasons=read_out_page.reasons(run.metrics),
    non_members=read_out_page.non_members(run.metrics),
    examples=_examples(run),
    relabelling=_relabelling(run),
    groups=_table(run),
    class_rows=_class_rows(run),
    pictures=pictures,
    options=_flatten(run.config.get("job", {})),
    versions=_flatten(run.config.get("versions", {})),
    device=_text(run.config.get("device")),
    command=run.config.get("command"),
    commit=run.config.get("git_commit"),
    created=_date(run.config.get("created")),
  )
  return path


def read(folder: pathlib.Path) -> Run:
  """Reads a run folder.

  Args:
    folder: The folder.

  Returns:
    Its contents.

  Raises:
    ValueError: If it is not a run folder or a file is missing or unreadable.
  """
  if not folder.is_dir():
    raise ValueError(f"run must be a folder, got {folder}: not found")
  if not (folder / "config.json").is_file():
    raise ValueError(f"run must be a run folder, got {folder}: no config.json")
  metrics = files.read_json(folder / "metrics.json")
  metrics = {name: metrics[name] for name in MODELS if name in metrics}
  if not metrics:
    raise ValueError(
      f"metrics.json must have one of {', '.join(MODELS)}, got none in {folder}"
    )
  run = Run(
    config=files.read_json(folder / "config.json"),
    metrics=metrics,
    history=files.read_json(folder / "history.json"),
    data=files.read_json(folder / "data.json"),
    examples=(
      files.read_arrays(
        folder / "examples.npz",
        "images",
        "boundary",
        "old_labels",
        "new_labels",
        "distance",
        "is_crossed",
      )
      if "unlearned" in metrics
      else None
    ),
    features=files.read_arrays(folder / "features.npz", "labels", "is_forget"),
    twins=(
      files.read_arrays(folder / "twins.npz", "left", "right")
      if (folder / "twins.npz").is_file()
      else None
    ),
    flips=read_out.read_flips(folder),
    flip_images=(
      files.read_arrays(folder / "flips.npz", "images")["images"]
      if (folder / "flips.npz").is_file()
      else None
    ),
  )
  for key in ("class_names", "counts"):
    if key not in run.data:
      raise ValueError(f"data.json must have {key!r}, got none in {folder}")
  return run


def headline(run: Run) -> tuple[str, str]:
  """Says in plain words what was forgotten from what, and the outcome.

  The verb follows the forget images' test accuracy: of what the original has
  above the retrained model, what remains decides between "was taken out of"
  (up to a tenth), "was partly taken out of" (up to a half) and "is still
  mostly in". Without a retrained model, or where it is as good as the
  original on these images, accuracy proves nothing and the verb claims
  nothing.

  Where several references are there, the yardstick leads: the verdict stands in
  the headline, and its figures, the references' spread and the false alarms in
  the first sentences.

  Args:
    run: The run.

  Returns:
    The headline and the sentences under it.
  """
  job = run.config.get("job", {})
  subject = _subject(run)
  trained = (
    f"{job.get('model', 'a model')} trained on {job.get('dataset', 'its data')}"
  )
  if "unlearned" not in run.metrics:
    title = f"{_upper(trained)}: {subject} has not been taken out yet"
  elif _verdict(run) is not None:
    title = f"{_upper(subject)} unlearned from {trained}: {_verdict(run)}"
  else:
    title = f"{_upper(subject)} {_verb(run)} {trained}{_pace(run)}"
  split = _forget_split(run)
  where = "test" if split == "test_forget" else "training"
  sentences = [
    _sentence(
      run,
      split,
      f"On the {where} images to forget, accuracy",
      "a model retrained without them",
    ),
    _sentence(
      run, split.replace("forget", "retain"), "On all others it", "retrained"
    ),
  ]
  found = _get(run, "unlearned", "yardstick")
  if found is not None:
    sentences = [*yardstick_page.sentences(found), *sentences]
  return title, " ".join(filter(None, sentences))


def _verdict(run: Run) -> str | None:
  """The verdict of the yardstick; None with fewer than two references."""
  found = _get(run, "unlearned", "yardstick", "models", "unlearned")
  if found is None or found["num_references"] < 2:
    return None
  if found["verdict"] == judgement.LEVEL_ONLY:
    level = "not that" if found["is_rejected"] else "that"
    return f"only its level can be judged, and is {level} of retraining"
  return {
    judgement.AS_RETRAINED: "as near as another retraining",
    judgement.NOT_RETRAINED: "not as a retrained model",
    judgement.CANNOT_TELL: "it cannot be told from the references there are",
  }[found["verdict"]]


def _yardstick(run: Run) -> dict[str, Any] | None:
  """The normalised distances, levels and attacks, so far as they are known."""
  found = _get(run, "unlearned", "yardstick")
  if found is None:
    return None
  return {
    **yardstick_page.table(found, {x: x.capitalize() for x in _models(run)}),
    "has_distances": _verdict(run) is not None,
  }


def percent(value: float | None) -> str:
  """Formats a share, one decimal."""
  return _finite(value, lambda x: f"{100 * x:.1f}%")


def seconds(value: float | None) -> str:
  """Formats a time, three digits or whole minutes and seconds."""

  def text(x: float) -> str:
    if x < 9.995:
      return f"{x:.2f} s"
    if x < 99.95:
      return f"{x:.1f} s"
    minutes, rest = divmod(round(x), 60)
    if minutes < 60:
      return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"

  return _finite(value, text)


def number(value: float | None) -> str:
  """Formats a distance or a divergence, three significant digits."""
  return _finite(value, lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}")


def ratio(value: float | None) -> str:
  """Formats how many times something is as large, two digits."""
  return _finite(value, lambda x: f"{x:.1f}×" if x < 9.95 else f"{x:.0f}×")


def _finite(value: float | None, text: _Formatter) -> str:
  if value is None:
    return NOT_AVAILABLE
  return text(value) if math.isfinite(value) else "not finite"


def _text(value: Any) -> str:
  return NOT_AVAILABLE if value is None else str(value)


def _date(value: Any) -> str:
  try:
    moment = datetime.datetime.fromisoformat(value)
  except (TypeError, ValueError):
    return _text(value)
  return moment.strftime("%Y-%m-%d %H:%M %Z").strip()


def _upper(text: str) -> str:
  """Capitalises a sentence, but no identifier such as `all_cnn`."""
  first = text.split(" ", 1)[0]
  return text if "_" in first else text[:1].upper() + text[1:]


def _models(run: Run) -> list[str]:
  return list(run.metrics)


def _get(run: Run, model: str, *keys: str) -> Any:
  """Returns a figure, or None where a part of its path is missing."""
  value: Any = run.metrics.get(model)
  for key in keys:
    value = None if value is None else value.get(key)
  return value


def _class_name(run: Run, label: int) -> str:
  names = run.data["class_names"]
  return str(names[label]) if 0 <= label < len(names) else f"class {label}"


def _class_names(run: Run) -> list[str]:
  lengths = [len(m.get("confusion_matrix") or []) for m in run.metrics.values()]
  count = max(len(run.data["class_names"]), *lengths)
  return [_class_name(run, label) for label in range(count)]


def _forget_classes(run: Run) -> list[int]:
  """Returns the classes of the request, which may give names, as numbers."""
  asked = run.data.get("request", {}).get("classes") or []
  return forget.class_indices(run.data["class_names"], asked)


def _subject(run: Run) -> str:
  """Describes the forget request, to begin or continue a sentence."""
  request = run.data.get("request", {})
  names = [f"“{_class_name(run, label)}”" for label in _forget_classes(run)]
  if len(names) > 4:
    names = [*names[:3], f"{len(names) - 3} more"]
  if names:
    words = "class " if len(names) == 1 else "classes "
    words += " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if request.get("where"):
      words += f" where {request['where']}"
  elif request.get("where"):
    words = f"the part where {request['where']}"
  else:
    words = f"a set of {run.data['counts'].get('train_forget')} images"
  if request.get("fraction", 1.0) not in (None, 1.0):
    words = f"{100 * request['fraction']:g}% of {words}"
  return words


def _forget_split(run: Run) -> str:
  """Returns the split to judge by: a request may match no test image."""
  has_test = any(
    _get(run, model, "accuracy", "test_forget") is not None
    for model in run.metrics
  )
  return "test_forget" if has_test else "train_forget"


def _verb(run: Run) -> str:
  before, reference, after = (
    _get(run, model, "accuracy", _forget_split(run))
    for model in ("original", "retrained", "unlearned")
  )
  if None in (before, reference, after) or before - reference < 0.05:
    return "was unlearned from"
  remains = (after - reference) / (before - reference)
  if remains > 0.5:
    return _FAILED
  return "was partly taken out of" if remains > 0.1 else "was taken out of"


def _speed(run: Run) -> float | None:
  """Returns how many times the retraining took as long as the unlearning."""
  own, retraining = (
    _get(run, model, "seconds") for model in ("unlearned", "retrained")
  )
  return retraining / own if own and retraining else None


def _pace(run: Run) -> str:
  own = _get(run, "unlearned", "seconds")
  if own is None:
    return ""
  if _verb(run) == _FAILED:
    return f" after {seconds(own)} of unlearning"
  text = f" in {seconds(own)}"
  speed = _speed(run)
  if speed is None:
    return text
  if speed >= 1.05:
    return f"{text}, {ratio(speed)} faster than retraining"
  if speed <= 1 / 1.05:
    return f"{text}, {ratio(1 / speed)} slower than retraining"
  return f"{text}, as long as retraining"


def _sentence(run: Run, split: str, start: str, rival: str) -> str:
  """Says how an accuracy moved, and what the retrained model has."""
  before, reference, after = (
    _get(run, model, "accuracy", split)
    for model in ("original", "retrained", "unlearned")
  )
  if before is None or (after is None and "unlearned" in run.metrics):
    return ""
  if after is None:
    text = f"{start} is {percent(before)}"
  else:
    text = f"{start} went from {percent(before)} to {percent(after)}"
  if reference is not None:
    text += f" ({rival}: {percent(reference)})"
  return text + "."


def _distance(run: Run) -> str:
  """Says how far the unlearned model is from the right answer."""
  split = _forget_split(run)
  reference, after = (
    _get(run, model, "accuracy", split) for model in ("retrained", "unlearned")
  )
  if reference is None or after is None:
    return ""
  text = (
    f"The right answer on the forget images is the retrained model’s accuracy,"
    f" {percent(reference)}"
  )
  # Runs of earlier versions do not say it.
  if not run.data.get("is_class_request", _forget_classes(run)):
    text += (
      ", and not zero: a model that never saw them still knows others of their"
      " kind"
    )
  points = 100 * (after - reference)
  text += f". The unlearned model is {points:+.1f} points from it."
  if _get(run, "unlearned", "num_passes") == 0:
    text += (
      " Nothing was changed: the original was right no more often on the forget"
      " images than on unseen ones of their kind."
    )
  return text


def _facts(run: Run) -> list[tuple[str, str]]:
  counts = run.data["counts"]
  job = run.config.get("job", {})

  def pair(split: str) -> str:
    found = [counts.get(f"{part}_{split}") for part in ("train", "test")]
    return " + ".join(NOT_AVAILABLE if n is None else f"{n:,}" for n in found)

  return [
    ("Recipe", _text(job.get("recipe"))),
    ("To forget (training + test)", pair("forget")),
    ("To keep (training + test)", pair("retain")),
    ("Seed", _text(job.get("seed"))),
    ("Written", _date(run.config.get("created"))),
  ]


def _tiles(run: Run) -> list[dict[str, Any]]:
  """Returns the key figures, each with a bar a model."""
  split = _forget_split(run)
  kept = split.replace("forget", "retain")
  where = "Test" if split == "test_forget" else "Training"
  is_reference = "retrained" in run.metrics
  ideal = f"{where} images; ideal: "
  return [
    tile
    for tile in (
      _tile(
        run,
        ("accuracy", split),
        "Forget images: accuracy",
        f"{ideal}as retrained" if is_reference else f"{where} images",
      ),
      _tile(
        run,
        ("accuracy", kept),
        "Retain images: accuracy",
        ideal + ("as retrained" if is_reference else "high"),
      ),
      _tile(
        run,
        ("agreement", split),
        "Agreement with retrained",
        f"Forget images, {where.lower()}; ideal: 100%",
      ),
      _tile(run, ("seconds",), "Time", "Ideal: short"),
    )
    if tile["bars"]
  ]


def _tile(
  run: Run, keys: tuple[str, ...], title: str, ideal: str
) -> dict[str, Any]:
  values = {
    model: _get(run, model, *keys)
    for model in run.metrics
    if _get(run, model, *keys) is not None
  }
  is_time = keys == ("seconds",)
  top = max([*values.values(), 1e-9]) if is_time else 1.0
  show = seconds if is_time else percent
  return {
    "title": title,
    "ideal": ideal,
    "top": top,
    "values": values,
    "bars": [
      {
        "model": model,
        "text": show(value),
        "width": f"{100 * min(max(value / top, 0), 1):.2f}",
      }
      for model, value in values.items()
    ],
  }


def _table(run: Run) -> list[dict[str, Any]]:
  """Returns the comparison: groups of rows with a cell for each model."""

  def row(name: str, keys: tuple[str, ...], show: _Formatter) -> dict[str, Any]:
    cells = [show(_get(run, model, *keys)) for model in run.metrics]
    return {"name": name, "cells": cells}

  def group(
    name: str, ideal: str, key: str, show: _Formatter
  ) -> dict[str, Any]:
    rows = [row(text, (key, split), show) for split, text in _SPLITS.items()]
    return {"name": name, "ideal": ideal, "rows": rows}

  is_reference = "retrained" in run.metrics
  accuracy = group(
    "Accuracy",
    "ideal: as retrained" if is_reference else "retain: ↑ high",
    "accuracy",
    percent,
  )
  accuracy["rows"].append(row("All, test", ("accuracy", "test"), percent))
  compared = []
  if is_reference and len(run.metrics) > 1:
    compared = [
      group(
        "Same prediction as the retrained model",
        "↑ ideal: 100%",
        "agreement",
        percent,
      ),
      group(
        "KL divergence from the retrained model, nats",
        "↓ ideal: 0",
        "kl_divergence",
        number,
      ),
    ]
    for each in (row for group in compared for row in group["rows"]):
      each["cells"][_models(run).index("retrained")] = "reference"
  attacks = read_out_page.attacks(run.metrics)
  if attacks:
    compared.append(
      {
        "name": "Membership attacks: forget images in training or not",
        "ideal": read_out_page.attack_ideal(run.metrics),
        "rows": attacks,
      }
    )
  time = {"name": "Time", "ideal": "↓ short", "rows": _time_rows(run, row)}
  return [accuracy, *compared, time]


def _time_rows(
  run: Run, row: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
  rows = [row("Total", ("seconds",), seconds)]
  if "unlearned" in run.metrics:
    for name, key in (
      ("– boundary search", "search_seconds"),
      ("– update", "update_seconds"),
    ):
      part = row(name, (key,), seconds)
      part["cells"] = [
        cell if model == "unlearned" else ""
        for model, cell in zip(run.metrics, part["cells"], strict=True)
      ]
      rows.append(part)
  retraining = _get(run, "retrained", "seconds")
  if retraining:
    rows.append(
      row(
        "Share of retraining",
        ("seconds",),
        lambda own: percent(None if own is None else own / retraining),
      )
    )
  return rows


def _relabelling(run: Run) -> list[tuple[str, str]]:
  """Returns the figures of the search over all forget images."""
  found = _get(run, "unlearned", "relabelling")
  if found is None:
    return []
  facts = [
    ("Reached another class", percent(found.get("crossed"))),
    ("Median distance (largest pixel change)", number(found["median_distance"]))
    if "median_distance" in found
    else ("Median distance", NOT_AVAILABLE),
  ]
  if "retrained" in run.metrics:
    facts.append(
      (
        "New label is the retrained model’s prediction",
        percent(found.get("agreement_with_retrained")),
      )
    )
  return facts


def _class_rows(run: Run) -> list[dict[str, Any]]:
  columns = [
    _get(run, model, "per_class_accuracy") or [] for model in run.metrics
  ]
  forgotten = set(_forget_classes(run))
  return [
    {
      "name": name,
      "is_forget": label in forgotten,
      "cells": [
        percent(column[label] if label < len(column) else None)
        for column in columns
      ],
    }
    for label, name in enumerate(_class_names(run))
  ]


def _captions(run: Run) -> list[dict[str, Any]]:
  found = run.examples
  assert found is not None
  return [
    {
      "old": _class_name(run, int(old)),
      "new": _class_name(run, int(new)),
      "distance": number(float(distance)),
      "is_crossed": bool(is_crossed),
    }
    for old, new, distance, is_crossed in zip(
      found["old_labels"],
      found["new_labels"],
      found["distance"],
      found["is_crossed"],
      strict=True,
    )
  ]


def _examples(run: Run) -> dict[str, Any] | None:
  """Returns the forget images beside their boundary images, encoded."""
  if run.examples is None or not len(run.examples["images"]):
    return None
  images, moved = run.examples["images"], run.examples["boundary"]
  factor = figures.amplification(images, moved)
  amplified = figures.difference(images, moved, factor)
  pixels = _MAX_EXAMPLE_BYTES / (3 * len(images) * images.shape[-1])
  max_side = max(16, math.isqrt(int(pixels)))

  def encode(image: np.ndarray) -> str:
    return figures.data_uri(image, max_side=max_side)

  return {
    "factor": f"{factor:g}",
    "is_pixelated": max(images.shape[1:3]) <= 64,
    "is_reduced": max(images.shape[1:3]) > max_side,
    "items": [
      {
        **caption,
        "image": encode(images[i]),
        "moved": encode(moved[i]),
        "difference": encode(amplified[i]),
      }
      for i, caption in enumerate(_captions(run))
    ],
  }


def _pictures(run: Run, folder: pathlib.Path) -> dict[str, Picture]:
  """Draws all pictures, as PNG files and for the page."""
  folder.mkdir(exist_ok=True)
  names = _class_names(run)
  summary = [
    figures.summary_panel(
      tile["title"],
      tile["values"],
      {bar["model"]: bar["text"] for bar in tile["bars"]},
      tile["top"],
    )
    for tile in _tiles(run)
  ]
  if summary:
    figures.save_png(summary, folder / "summary.png", num_columns=2)
  if run.examples is not None and len(run.examples["images"]):
    figures.save_examples(
      folder / "examples.png",
      run.examples["images"],
      run.examples["boundary"],
      [
        f"{each['old']} → {each['new']}\n{each['distance']}"
        for each in _captions(run)
      ],
      figures.amplification(run.examples["images"], run.examples["boundary"]),
    )
  panels = {
    "classes": _class_panels(run, names),
    "features": _feature_panels(run, names),
    "curves": _curve_panels(run),
    "confusion": [
      figures.confusion_panel(model, matrix, names)
      for model, metrics in run.metrics.items()
      if (matrix := metrics.get("confusion_matrix"))
    ],
  }
  pictures = {}
  for name, drawn in panels.items():
    columns = 3 if len(drawn) == 3 else 2
    pictures[name] = Picture(
      [
        # Made by figures.py, which escapes the names in it.
        markupsafe.Markup(figures.render_svg(panel, f"{name}{i}"))
        for i, panel in enumerate(drawn)
      ],
      columns,
    )
    if drawn:
      figures.save_png(drawn, folder / f"{name}.png", num_columns=columns)
  return pictures


def _class_panels(run: Run, names: list[str]) -> list[figures.Panel]:
  forgotten = _forget_classes(run)
  values = {
    model: metrics["per_class_accuracy"]
    for model, metrics in run.metrics.items()
    if metrics.get("per_class_accuracy")
  }
  panels = []
  if values:
    panels.append(figures.class_panel(values, names, forgotten))
  found = _get(run, "unlearned", "relabelling") or {}
  if found.get("label_counts"):
    panels.append(
      figures.label_panel(
        found["label_counts"], found.get("retrained_prediction_counts"), names
      )
    )
  return panels


def _feature_panels(run: Run, names: list[str]) -> list[figures.Panel]:
  is_forget = run.features["is_forget"].astype(bool)
  labels = run.features["labels"]
  chosen = figures.choose_embedded(is_forget)
  panels = []
  for model in MODELS:
    if model not in run.features:
      continue
    points = figures.embed(run.features[model][chosen])
    if points is not None:
      panels.append(
        figures.feature_panel(
          model, points, labels[chosen], is_forget[chosen], names
        )
      )
  return panels


def _curve_panels(run: Run) -> list[figures.Panel]:
  times = {
    model: metrics["seconds"]
    for model, metrics in run.metrics.items()
    if metrics.get("seconds") is not None
  }
  panels = [
    *figures.training_panels(run.history),
    *figures.unlearning_panels(run.history.get("unlearned") or []),
  ]
  if times:
    panels.append(
      figures.time_panel(
        times,
        {model: seconds(value) for model, value in times.items()},
        _get(run, "unlearned", "search_seconds"),
      )
    )
  return panels


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
  """Returns nested options as rows of a dotted name and a value."""
  if not isinstance(tree, Mapping):
    return [(prefix, _value(tree))]
  return [
    row
    for key, value in tree.items()
    for row in _flatten(value, f"{prefix}.{key}" if prefix else str(key))
  ]


def _value(value: Any) -> str:
  if value is None:
    return "none"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, Sequence) and not isinstance(value, str):
    text = ", ".join(str(each) for each in value)
    # A long list of images or classes says no more than its beginning.
    return text if len(text) <= 300 else f"{text[:300]} …"
  return str(value)


if __name__ == "__main__":
  cli.run(main)
