"""Compare unlearning methods on one request, over training seeds.

    python -m experiments.compare --recipe digits --seeds 3

trains an original and a retrained model for each seed, unlearns with every
method, and writes `results.csv`, `results.json`, `results.md` and one page,
`compare.html`, with its figures and tables, into `runs/digits_compare`. What is
finished is kept: after an interruption, or to add methods, seeds or metrics,
the same command with `--resume` goes on.
`--methods psg scrub salun` chooses methods, and
`--set scrub.num_epochs=3 salun.learning_rate=0.05` their arguments.

    runs/<name>/config.json, request.json, data.json    as other programs
    runs/<name>/compare.json                the options of the comparison
    runs/<name>/models/seed-<seed>/         original and retrained model; of
                                            further references, retrained alone
    runs/<name>/cells/<method>-<seed>-<unlearning seed>/
                                            result.json, logits.npz

All methods on the digits take some ten minutes on two cores, most of it the
compiling of a training program each. What to expect is in docs/comparison.md.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments import (
  cells,
  cli,
  compilation,
  contexts,
  files,
  jobs,
  recipes,
  run_folder,
)
from experiments.comparison import recipes as method_recipes
from experiments.comparison import references as reference_models
from experiments.comparison import runs, summary, verdicts
from experiments.pages import comparison as comparison_page
from experiments.pages import tables
from psg_jax import baselines, checks, metrics

DEFAULT_METRICS = (
  *(f"accuracy_{split}" for split in metrics.SPLITS),
  *(
    f"{name}_{split}"
    for name in ("agreement", "kl_divergence")
    for split in summary.SPLITS
  ),
  *("mia_loss_auc", "mia_loss_tpr_at_0.01_fpr", "mia_confidence_auc"),
  *("mia_entropy_auc", "mia_modified_entropy_auc", "mia_logistic"),
  *("tug_of_war", "js_divergence_test_forget", "js_divergence_test_retain"),
  *(f"activation_distance_test_{x}" for x in ("forget", "retain")),
  *("sensitivity", "specificity", "auroc", "calibration_error"),
  *("worst_subgroup", "false_negatives", "harmed_test_retain"),
  "run_time_efficiency",
)
# Of the run folder, which the results repeat.
_RECORDS = ("config", "data", "compare")
SLOW_PIXELS = 10**8


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, and what is to be compared."""

  methods: tuple[str, ...] = ()
  """Methods to compare, of `psg_jax.baselines`; all by default."""
  seeds: int = 3
  """Training seeds, from --seed on; each has models of its own."""
  references: int | None = None  # type: ignore[assignment]
  """Retrained models that all are compared with, of the seeds from --seed on,
  at least as many as --seeds; by default 5, and 3 where training is slow."""
  unlearn_seeds: int = 1
  """Unlearning seeds of each training seed."""
  metrics: tuple[str, ...] = DEFAULT_METRICS
  """Metrics to compute, of `psg_jax.metrics`."""
  settings: Literal["default", "paper"] = "default"
  """Hyper-parameters: for small runs, on one budget, or those of the papers."""
  set: tuple[str, ...] = ()
  """Arguments to change, as METHOD.ARGUMENT=VALUE."""


def main() -> None:
  """Runs what is not finished, and writes tables and the page."""
  options = cli.parse_job(Options, "Compare unlearning methods over seeds.")
  print(run(options))


def run(options: Options) -> pathlib.Path:
  """Compares; see the program's options. Returns the path of the page.

  Raises:
    ValueError: If an option is wrong; nothing is written then.
    FloatingPointError: If the training of an original or retrained model
      diverges.
  """
  options = dataclasses.replace(
    options,
    name=options.name or f"{options.recipe}_compare",
    methods=tuple(dict.fromkeys(options.methods or baselines.METHODS)),
    metrics=tuple(dict.fromkeys(options.metrics)),
  )
  overrides = check(options)
  context = jobs.prepare(options)
  print(jobs.announce(context))
  folder = context.run_dir
  settled = {name: getattr(options, name) for name in _added_fields()}
  settled["references"] = num_references(context, options)
  run_folder.write_json(folder / "compare.json", settled)
  resolved = {
    method: method_recipes.resolve(
      method,
      context,
      settings=options.settings,
      overrides=overrides.get(method),
    )
    for method in options.methods
  }
  _check_arguments(folder, options, resolved)
  references = _run_all(context, options, resolved, settled["references"])
  results = _collect(context, options, resolved, references)
  run_folder.write_json(folder / "results.json", results)
  files.write_text(folder / "results.csv", to_csv(results))
  files.write_text(folder / "results.md", comparison_page.markdown(results))
  print(comparison_page.text_table(results))
  shown = comparison_page.shown_models(results)
  losses = _losses(context, references[options.seed], shown, options.seed)
  return comparison_page.build(folder, results, losses)


def check(options: Options) -> dict[str, dict[str, Any]]:
  """Raises ValueError for what can be seen wrong before any work.

  Returns:
    The arguments to change, by method.
  """
  jobs.check(options)
  for method in options.methods:
    checks.one_of("methods", method, baselines.METHODS)
  checks.integer("seeds", options.seeds, at_least=1)
  checks.integer("unlearn_seeds", options.unlearn_seeds, at_least=1)
  if options.references is not None and options.references < options.seeds:
    raise ValueError(
      f"references must be at least the {options.seeds} seeds, got"
      f" {options.references}"
    )
  if not options.metrics:
    raise ValueError("metrics must name at least one, got none")
  for name in options.metrics:
    checks.one_of("metrics", name, metrics.METRICS)
  overrides = method_recipes.parse(options.set)
  for method in overrides:
    if method not in options.methods:
      raise ValueError(f"set must be of a method compared, got {method!r}")
  if options.weights is not None and options.seeds > 1:
    raise ValueError(
      f"seeds must be 1 with weights, of one original model, got"
      f" {options.seeds}"
    )
  folder = run_folder.run_dir(options)
  if folder.is_dir() and options.resume:
    _check_same(folder, options, overrides)
  return overrides


def num_references(context: contexts.Context, options: Options) -> int:
  """Returns how many retrained models there are to be.

  Five, and three where training is slow: where it takes more than 10⁸ pixels,
  of all retained images and epochs. Six epochs of 12,000 images of 28 pixels a
  side take half of that. By default no fewer than training seeds.
  """
  if not options.retrained:
    return 0
  if options.references is not None:
    return options.references
  num_pixels = math.prod(context.train.images.shape[1:])
  passes = len(context.split.retain) * options.training.num_epochs
  return max(5 if passes * num_pixels <= SLOW_PIXELS else 3, options.seeds)


def _check_same(
  folder: pathlib.Path, options: Options, overrides: Mapping[str, Any]
) -> None:
  """Methods with finished cells must be called as they were."""
  others = ("checkpoints", "metrics.json")
  if not (folder / "compare.json").exists() and any(
    (folder / name).exists() for name in others
  ):
    raise ValueError(
      f"name must be that of a comparison to resume, got {folder}: no"
      " compare.json"
    )
  for cell in _cells(options):
    before = cell.store(folder).read()
    changes = dict(overrides.get(cell.method, {}))
    now = {"settings": options.settings, "set": changes}
    was = {name: before[name] for name in now} if before else None
    difference = cells.change(was, now)
    if difference is not None:
      name, held, value = difference
      raise ValueError(
        f"{name} must be as in the finished cell {cell.name}, {held!r}, got"
        f" {value!r}"
      )


def _check_arguments(
  folder: pathlib.Path,
  options: Options,
  resolved: Mapping[str, method_recipes.Resolved],
) -> None:
  """Finished cells of another version must not be mixed with new ones."""
  for cell in _cells(options):
    store = cell.store(folder)
    before = store.read().get("arguments")
    difference = cells.change(before, resolved[cell.method].record)
    if difference is not None:
      name, held, value = difference
      raise ValueError(
        f"{name} of {cell.method} must be as in its finished cell, {held}, got"
        f" {value}: choose another name, or remove {store.record.parent}"
      )


def _added_fields() -> list[str]:
  names = [field.name for field in dataclasses.fields(Options)]
  return [x for x in names if x not in recipes.Job.__dataclass_fields__]


def _run_all(
  context: contexts.Context,
  options: Options,
  resolved: Mapping[str, method_recipes.Resolved],
  num_retrained: int,
) -> dict[int, reference_models.Reference]:
  """Runs the cells that are missing; returns the models of each seed."""
  total = _cells(options)
  todo = [x for x in total if not x.store(context.run_dir).is_done()]
  begin = time.perf_counter()
  started: set[str] = set()
  references = {}
  for seed in range(options.seed, options.seed + options.seeds):
    missing = [cell for cell in todo if cell.seed == seed]
    at_seed = reference_models.at_seed(context, seed)
    reference = reference_models.reference(
      at_seed, needs_variables=bool(missing)
    )
    references[seed] = reference._replace(variables={})
    if missing:
      others = reference_models.outputs(at_seed, reference, options.metrics)
    for cell in missing:
      if compilation.make_room():
        started.clear()
      record = runs.run(
        at_seed,
        cell,
        resolved[cell.method],
        reference,
        others,
        options.metrics,
        cell.store(context.run_dir),
        compiles=cell.method not in started,
      )
      started.add(cell.method)
      num_left = len(todo) - todo.index(cell) - 1
      taken = (time.perf_counter() - begin) / (len(todo) - num_left)
      line = f"[{len(total) - num_left}/{len(total)}] {_line(cell, record)}"
      if num_left:
        line += f"; about {tables.seconds(num_left * taken)} left"
      print(line, flush=True)
  for seed in range(options.seed, options.seed + num_retrained):
    if seed not in references:
      at_seed = reference_models.at_seed(context, seed)
      references[seed] = reference_models.reference(
        at_seed, needs_variables=False, is_alone=True
      )._replace(variables={})
  return references


def _cells(options: Options) -> list[runs.Cell]:
  return [
    runs.Cell(method, options.seed + i, j)
    for i in range(options.seeds)
    for j in range(options.unlearn_seeds)
    for method in options.methods
  ]


def _line(cell: runs.Cell, record: Mapping[str, Any]) -> str:
  if record["status"] == cells.DIVERGED:
    return f"{cell.name}: {record['reason']}"
  values = record["accuracy"]
  split = "test_forget" if values["test_forget"] is not None else "train_forget"
  return (
    f"{cell.name}: {tables.seconds(record['seconds'])}, accuracy"
    f" {values[split]:.3f} {split}, {values['test_retain'] or 0.0:.3f}"
    " test_retain"
  )


def _collect(
  context: contexts.Context,
  options: Options,
  resolved: Mapping[str, method_recipes.Resolved],
  references: Mapping[int, reference_models.Reference],
) -> dict[str, Any]:
  """Gathers the cells, and all that follows from them."""
  folder, names = context.run_dir, options.metrics
  records = [
    runs.complete(
      context, cell.store(folder).read(), names, references[cell.seed]
    )
    for cell in _cells(options)
  ]
  rows = reference_models.rows(context, names, references)
  rows += [
    {
      "model": record["method"],
      "seed": record["seed"],
      "unlearn_seed": record["unlearn_seed"],
      "metrics": runs.figures(record, names),
    }
    for record in records
  ]
  logits = verdicts.gather(context, records, references)
  return {
    **{x: run_folder.read_json(folder / f"{x}.json") for x in _RECORDS},
    "titles": _titles(options, references),
    "methods": {
      name: {
        "title": baselines.find(name).title,
        "paper": baselines.find(name).paper,
        "arguments": x.record,
        "note": x.note,
      }
      for name, x in resolved.items()
    },
    **_statistics(rows, options),
    "verification": {
      method: verdicts.verify(
        logits, method, [x for x in records if x["method"] == method]
      )
      for method in options.methods
    },
    "yardstick": verdicts.measure(logits, rows),
    "checks": verdicts.examine(logits),
    "rows": rows,
    "cells": [
      {k: x for k, x in record.items() if k != "metrics"} for record in records
    ],
  }


def _titles(
  options: Options, references: Mapping[int, reference_models.Reference]
) -> dict[str, str]:
  """The names of all models, in the order of tables."""
  logits = references[options.seed].logits
  first = {x: x.capitalize() for x in reference_models.MODELS if x in logits}
  return first | {x: baselines.find(x).title for x in options.methods}


def _statistics(
  rows: Sequence[Mapping[str, Any]], options: Options
) -> dict[str, Any]:
  """What follows from the figures of all rows."""
  means = summary.summarise(summary.tidy(rows))
  info = _info(options.metrics)
  return {
    "metrics": info,
    "summary": means,
    "best": {
      name: summary.best(
        summary.losses(means, name, x["direction"], x["ideal"])
      )
      for name, x in info.items()
    },
    "nearest": [
      summary.nearest(means, "kl_divergence", is_share=False),
      summary.nearest(means, "agreement", is_share=True),
    ],
    "standing": {
      method: summary.standing(means, method, info)
      for method in options.methods
    },
  }


def _info(names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """The title of each metric, its direction and its ideal."""
  info: dict[str, dict[str, Any]] = {}
  for name in names:
    metric = metrics.find(name)
    # JSON has no infinity.
    is_finite = isinstance(metric.ideal, str) or math.isfinite(metric.ideal)
    info[name] = {
      "title": metric.title,
      "direction": metric.direction,
      "ideal": metric.ideal if is_finite else None,
    }
  titles = ("Time, compiling included", "Time, compiled before")
  for name, title in zip(runs.SECONDS, titles, strict=True):
    info[name] = {"title": title, "direction": "down", "ideal": 0.0}
  return info


def _losses(
  context: contexts.Context,
  reference: reference_models.Reference,
  models: Sequence[str],
  seed: int,
) -> dict[str, dict[str, np.ndarray]]:
  """Losses of the forget images in training and test, of the first seed."""
  logits = {
    model: reference.logits[model]
    if model in reference_models.MODELS
    else runs.Cell(model, seed, 0).store(context.run_dir).read_logits()
    for model in models
  }
  labels = {
    split: context.parts[split].labels
    for split in ("train_forget", "test_forget")
    if len(context.parts[split])
  }
  return {
    model: {x: metrics.label_losses(values[x], labels[x]) for x in labels}
    for model, values in logits.items()
  }


def to_csv(results: Mapping[str, Any]) -> str:
  """Returns one line a cell and metric, with the columns `summary.COLUMNS`.

  The original and the retrained model have no `unlearn_seed`; the figures of
  the yardstick and the checks, which are of all seeds together, follow without
  either seed.
  """
  rows = summary.tidy(results["rows"]).itertuples(index=False, name=None)
  measured = verdicts.csv_rows(results.get("yardstick"))
  examined = verdicts.check_rows(results.get("checks"))
  return files.to_csv([summary.COLUMNS, *rows, *measured, *examined])


if __name__ == "__main__":
  cli.run(main)
