"""The page of a run: what it holds, as tables, facts and panels."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import files, read_out
from experiments.pages import (
  clinical,
  exports,
  figures,
  headline,
  panels,
  request,
  tables,
  yardstick,
)

# All example pictures together have at most this many bytes before they are
# compressed, which keeps the page well under 3 MB.
_MAX_EXAMPLE_BYTES = 1_200_000
_MAX_OPTION = 300
_COMPARED = {
  "agreement": (
    "Same prediction as the retrained model",
    "↑ ideal: 100%",
    tables.percent,
  ),
  "kl_divergence": (
    "KL divergence from the retrained model, nats",
    "↓ ideal: 0",
    tables.number,
  ),
}


class Run(NamedTuple):
  """What a run folder holds.

  Attributes:
    config: Options, versions, device, command.
    models: Figures by model; at least one of `figures.MODELS`.
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
  models: tables.Models
  history: Mapping[str, Any]
  data: Mapping[str, Any]
  examples: Mapping[str, np.ndarray] | None
  features: Mapping[str, np.ndarray]
  twins: Mapping[str, np.ndarray] | None = None
  flips: Sequence[Mapping[str, str]] | None = None
  flip_images: np.ndarray | None = None
  proxies: Mapping[str, Any] | None = None

  @property
  def job(self) -> Mapping[str, Any]:
    """The options."""
    job: Mapping[str, Any] = self.config.get("job", {})
    return job

  @property
  def has_reference(self) -> bool:
    """Whether there is a retrained model."""
    return "retrained" in self.models.figures

  def class_names(self) -> list[str]:
    """Returns the names of all classes that the data or the network have."""
    sizes = map(len, self.models.known("confusion_matrix").values())
    count = max(len(self.data["class_names"]), *sizes, 0)
    return [headline.class_name(self.data, label) for label in range(count)]


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
  metrics = {name: metrics[name] for name in figures.MODELS if name in metrics}
  if not metrics:
    raise ValueError(
      f"metrics.json must have one of {', '.join(figures.MODELS)}, got none in"
      f" {folder}"
    )

  def arrays(name: str, *names: str) -> dict[str, np.ndarray] | None:
    path = folder / name
    return files.read_arrays(path, *names) if path.is_file() else None

  examples = None
  if "unlearned" in metrics:
    names = ("images", "boundary", "old_labels", "new_labels")
    path = folder / "examples.npz"
    examples = files.read_arrays(path, *names, "distance", "is_crossed")
  path = folder / "proxies.json"
  run = Run(
    config=files.read_json(folder / "config.json"),
    models=tables.Models(metrics),
    history=files.read_json(folder / "history.json"),
    data=files.read_json(folder / "data.json"),
    examples=examples,
    features=files.read_arrays(folder / "features.npz", "labels", "is_forget"),
    twins=arrays("twins.npz", "left", "right"),
    flips=read_out.read_flips(folder),
    proxies=files.read_json(path) if path.is_file() else None,
    flip_images=(arrays("flips.npz", "images") or {}).get("images"),
  )
  for key in ("class_names", "counts"):
    if key not in run.data:
      raise ValueError(f"data.json must have {key!r}, got none in {folder}")
  return run


def build(run_dir: str | pathlib.Path) -> pathlib.Path:
  """Writes a run's `report.html`, and its figures and tables beside it.

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
  models, data, names = run.models, run.data, run.class_names()
  tiles, examples = _tiles(run), _examples(run)
  title, outcome = headline.headline(run.job, data, models)
  measured = models.get("unlearned", "yardstick")
  forgotten = headline.forget_classes(data)
  diagnosis = models.get("unlearned", "diagnosis")
  path = folder / "report.html"
  _save_examples(run, examples, folder / "figures")
  exports.write_page(
    path,
    "pages/report.html.jinja",
    pictures=_panels(run, tiles),
    columns={3: 3},
    kind="Unlearning report",
    title=title,
    outcome=[outcome],
    warnings=[
      f"{model}: {line}"
      for model, lines in models.known("warnings").items()
      for line in lines
    ],
    facts=_facts(run),
    has_reference=run.has_reference,
    tiles=tiles,
    request=request.overview(data),
    source=request.source(data),
    twins=request.twins(data, run.twins),
    by_column=request.by_column(models),
    distance=headline.distance(data, models),
    clinical=clinical.read_out(models, names),
    flips=clinical.flips(run.flips, run.flip_images, models),
    judgement=diagnosis and models.figures["unlearned"],
    yardstick=measured and yardstick.table(measured, models.heads()),
    has_distances=headline.verdict(models) is not None,
    non_members=clinical.non_members(models),
    examples=examples,
    relabelling=_relabelling(run),
    comparison=models.table(_comparison(run), "Measure"),
    classes=models.table(_classes(run, names, forgotten), "Class"),
    num_classes=len(names),
    has_forget_classes=bool(forgotten),
    options=_options(run),
    command=run.config.get("command"),
  )
  return path


def _facts(run: Run) -> list[tuple[str, str]]:
  return [
    ("Recipe", tables.words(run.job.get("recipe"))),
    *request.sizes(run.data),
    *_expected(run.proxies),
    ("Seed", tables.words(run.job.get("seed"))),
    ("Written", tables.date(run.config.get("created"))),
  ]


def _tiles(run: Run) -> list[panels.Tile]:
  """Returns the key figures, each with a bar a model."""
  split = headline.forget_split(run.models)
  kept = split.replace("forget", "retain")
  where = "Test" if split == "test_forget" else "Training"
  ideal, is_compared = f"{where} images; ideal: ", run.has_reference
  tiles = [
    (
      *(("accuracy", split), "Forget images: accuracy"),
      f"{ideal}as retrained" if is_compared else f"{where} images",
    ),
    (
      *(("accuracy", kept), "Retain images: accuracy"),
      ideal + ("as retrained" if is_compared else "high"),
    ),
    (
      *(("agreement", split), "Agreement with retrained"),
      f"Forget images, {where.lower()}; ideal: 100%",
    ),
    (("seconds",), "Time", "Ideal: short"),
  ]
  return [
    panels.Tile.of(title, text, values, is_time=path == ("seconds",))
    for path, title, text in tiles
    if (values := run.models.known(*path))
  ]


def _comparison(run: Run) -> dict[tuple[str, str], list[tables.Row]]:
  """Returns the rows of the comparison by the name and note of their group."""
  models, is_compared = run.models, run.has_reference

  def rows(key: str, show: tables.Show, **options: Any) -> list[tables.Row]:
    return [
      models.row(text[:1].upper() + text[1:], key, part, show=show, **options)
      for part, text in tables.PARTS.items()
    ]

  ideal = "ideal: as retrained" if is_compared else "retain: ↑ high"
  groups = {
    ("Accuracy", ideal): [
      *rows("accuracy", tables.percent),
      models.row("All, test", "accuracy", "test"),
    ]
  }
  if is_compared and len(models.figures) > 1:
    reference = {"retrained": tables.REFERENCE}
    for key, (name, note, show) in _COMPARED.items():
      groups[name, note] = rows(key, show, instead=reference)
  groups |= clinical.attacks(models)
  return {**groups, ("Time", "↓ short"): _time_rows(models)}


def _time_rows(models: tables.Models) -> list[tables.Row]:
  rows = [models.row("Total", "seconds", show=tables.seconds)]
  if "unlearned" in models.figures:
    others = dict.fromkeys(("original", "retrained"), "")
    for name, key in (("boundary search", "search"), ("update", "update")):
      path, show = f"{key}_seconds", tables.seconds
      rows.append(models.row(f"– {name}", path, show=show, instead=others))
  retraining = models.get("retrained", "seconds")
  if retraining:

    def share(taken: float) -> str:
      return tables.percent(taken / retraining)

    rows.append(models.row("Share of retraining", "seconds", show=share))
  return rows


def _expected(proxies: Mapping[str, Any] | None) -> list[tuple[str, str]]:
  """What models say of the forget set that never saw it."""
  if proxies is None:
    return []
  value, low, high = (
    tables.percent(proxies.get(name)) for name in ("accuracy", "low", "high")
  )
  text = f"{value} ({low} to {high})"
  if not proxies.get("is_called_for"):
    text += ", as the original: no change is called for"
  return [("Accuracy expected on images to forget", text)]


def _relabelling(run: Run) -> list[tuple[str, str]]:
  """Returns the figures of the search over all forget images."""
  record = run.models.get("unlearned", "relabelling")
  if record is None:
    return []
  facts = [("Reached another class", tables.percent(record.get("crossed")))]
  if "median_distance" in record:
    text = tables.number(record["median_distance"])
    facts.append(("Median distance (largest pixel change)", text))
  else:
    facts.append(("Median distance", tables.NOT_AVAILABLE))
  if run.has_reference:
    text = tables.percent(record.get("agreement_with_retrained"))
    facts.append(("New label is the retrained model’s prediction", text))
  return facts


def _classes(
  run: Run, names: Sequence[str], forgotten: Sequence[int]
) -> list[tables.Row]:
  heads = [
    tables.Cell(f"{name} (forget)", style="forget")
    if label in forgotten
    else name
    for label, name in enumerate(names)
  ]
  return [
    run.models.row(head, "per_class_accuracy", label)
    for label, head in enumerate(heads)
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
  pictures = []
  for i in range(len(images)):
    old, new = (
      headline.class_name(run.data, int(run.examples[f"{name}_labels"][i]))
      for name in ("old", "new")
    )
    alts = (
      f"Forget image of class {old}",
      f"The same image moved to {new}",
      f"The difference, amplified {factor:g} times",
    )
    sources = (
      figures.data_uri(kind[i], max_side=max_side)
      for kind in (images, moved, amplified)
    )
    distance = tables.number(float(run.examples["distance"][i]))
    is_crossed = run.examples["is_crossed"][i]
    pictures.append(
      {
        "images": list(zip(sources, alts, strict=True)),
        "name": f"{old} → {new}",
        "distance": distance,
        "text": f"distance {distance}"
        + ("" if is_crossed else " · not reached: runner-up class"),
      }
    )
  return {
    "factor": f"{factor:g}",
    "style": " pixelated" if max(images.shape[1:3]) <= 64 else "",
    "is_reduced": max(images.shape[1:3]) > max_side,
    "pictures": pictures,
  }


def _save_examples(
  run: Run, examples: Mapping[str, Any] | None, folder: pathlib.Path
) -> None:
  """Writes the first forget images as files."""
  if run.examples is not None and examples is not None:
    folder.mkdir(exist_ok=True)
    figures.save_examples(
      folder / "examples",
      run.examples["images"],
      run.examples["boundary"],
      [f"{x['name']}\n{x['distance']}" for x in examples["pictures"]],
      float(examples["factor"]),
    )


def _panels(
  run: Run, tiles: Sequence[panels.Tile]
) -> dict[str, list[figures.Panel]]:
  names = run.class_names()
  return {
    # On the page these are bars of its own.
    "summary": [panels.summary(tile) for tile in tiles],
    "classes": _class_panels(run, names),
    "features": _feature_panels(run, names),
    "curves": _curve_panels(run),
    "confusion": [
      panels.confusion(model, matrix, names)
      for model, matrix in run.models.known("confusion_matrix").items()
      if matrix
    ],
  }


def _class_panels(run: Run, names: list[str]) -> list[figures.Panel]:
  values = run.models.known("per_class_accuracy")
  values = {model: column for model, column in values.items() if column}
  drawn = []
  if values:
    forgotten = headline.forget_classes(run.data)
    drawn.append(panels.classes(values, names, forgotten))
  record = run.models.get("unlearned", "relabelling") or {}
  if record.get("label_counts"):
    others = record.get("retrained_prediction_counts")
    drawn.append(panels.labels(record["label_counts"], others, names))
  return drawn


def _feature_panels(run: Run, names: list[str]) -> list[figures.Panel]:
  is_forget = run.features["is_forget"].astype(bool)
  rows = figures.choose_embedded(is_forget)
  labels, is_forget = run.features["labels"][rows], is_forget[rows]
  maps = {
    model: figures.embed(run.features[model][rows])
    for model in figures.MODELS
    if model in run.features
  }
  return [
    panels.feature_map(model, points, labels, is_forget, names)
    for model, points in maps.items()
    if points is not None
  ]


def _curve_panels(run: Run) -> list[figures.Panel]:
  times = run.models.known("seconds")
  drawn = [
    *panels.training(run.history),
    *panels.unlearning(run.history.get("unlearned") or []),
  ]
  if times:
    search = run.models.get("unlearned", "search_seconds")
    tile = panels.Tile.of("Time", "", times, is_time=True)
    drawn.append(panels.run_times(tile, search))
  return drawn


def _options(run: Run) -> tables.Table:
  config = run.config
  groups = {
    "Where it ran": [
      ("device", tables.words(config.get("device"))),
      ("git commit", tables.words(config.get("git_commit") or None)),
      ("written", tables.date(config.get("created"))),
    ],
    "Options": _flatten(run.job),
    "Versions": _flatten(config.get("versions", {})),
  }
  return tables.table(("Name", "Value"), groups)


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
    text = ", ".join(map(str, value))
    # A long list of images or classes says no more than its beginning.
    return text if len(text) <= _MAX_OPTION else f"{text[:_MAX_OPTION]} …"
  return str(value)
