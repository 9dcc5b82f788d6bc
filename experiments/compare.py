"""Compare unlearning methods on one request, over training seeds.

    python -m experiments.compare --recipe digits --seeds 3

trains an original and a retrained model for each seed, unlearns with every
method, and writes `results.csv`, `results.json`, `results.md` and one page,
`compare.html`, into `runs/digits_compare`. What is finished is kept: after an
interruption, or to add methods, seeds or metrics, the same command with
`--resume` goes on.
`--methods psg scrub salun` chooses methods, and
`--set scrub.num_epochs=3 salun.learning_rate=0.05` their arguments.

    runs/<name>/config.json, request.json, data.json    as other programs
    runs/<name>/compare.json                the options of the comparison
    runs/<name>/models/seed-<seed>/         original and retrained model; of
                                            further references, retrained alone
    runs/<name>/cells/<method>-<seed>-<unlearning seed>/
                                            result.json, logits.npz

All 21 methods on the digits take eight minutes on two cores, most of it the
compiling of 21 training programs. What to expect is in docs/comparison.md.
"""

import dataclasses
import json
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments import (
  cli,
  compare_cells,
  compare_page,
  compare_recipes,
  compare_summary,
  compare_verdicts,
  files,
  jobs,
  recipes,
)
from psg_jax import (
  baselines,
  checks,
  metrics,
)

DEFAULT_METRICS = (
  *(f"accuracy_{split}" for split in metrics.SPLITS),
  *(
    f"{name}_{split}"
    for name in ("agreement", "kl_divergence")
    for split in compare_summary.SPLITS
  ),
  "mia_loss_auc",
  "mia_loss_tpr_at_0.01_fpr",
  "mia_confidence_auc",
  "mia_entropy_auc",
  "mia_modified_entropy_auc",
  "mia_logistic",
  "tug_of_war",
  "js_divergence_test_forget",
  "js_divergence_test_retain",
  "activation_distance_test_forget",
  "activation_distance_test_retain",
  "sensitivity",
  "specificity",
  "auroc",
  "calibration_error",
  "worst_subgroup",
  "false_negatives",
  "harmed_test_retain",
  "run_time_efficiency",
)
REFERENCES = ("original", "retrained")
_SLOW_PIXELS = 10**8
SECONDS = ("seconds", "seconds_without_compiling")


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
  """Compares; see the program's options.

  Args:
    options: The options.

  Returns:
    The path of the page.

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
  stated = {field: getattr(options, field) for field in _own_fields()}
  stated["references"] = num_references(context, options)
  jobs.write_json(context.run_dir / "compare.json", stated)
  resolved = {
    method: compare_recipes.resolve(
      method,
      context,
      settings=options.settings,
      overrides=overrides.get(method),
    )
    for method in options.methods
  }
  _check_arguments(context.run_dir, options, resolved)
  references = _run_all(context, options, resolved, stated["references"])
  results = _collect(context, options, resolved, references)
  folder = context.run_dir
  jobs.write_json(folder / "results.json", results)
  files.write_text(folder / "results.csv", to_csv(results))
  files.write_text(folder / "results.md", compare_page.markdown(results))
  print(compare_page.text_table(results))
  chosen = compare_page.shown_models(results)
  return compare_page.build(
    folder, results, _losses(context, references, chosen, options.seed)
  )


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
  overrides = compare_recipes.parse(options.set)
  for method in overrides:
    if method not in options.methods:
      raise ValueError(f"set must be of a method compared, got {method!r}")
  if options.weights is not None and options.seeds > 1:
    raise ValueError(
      f"seeds must be 1 with weights, of one original model, got"
      f" {options.seeds}"
    )
  folder = jobs.run_dir(options)
  if folder.is_dir() and options.resume:
    _check_same(folder, options, overrides)
  return overrides


def num_references(context: jobs.Context, options: Options) -> int:
  """Returns how many retrained models there are to be.

  Five, and three where training is slow: where it takes more than 10⁸ pixels,
  of all retained images and epochs. Six epochs of 12,000 images of 28 pixels a
  side take half of that.

  Args:
    context: The job.
    options: The options.

  Returns:
    The number asked for, or by default no fewer than training seeds.
  """
  if not options.retrained:
    return 0
  if options.references is not None:
    return options.references
  num_pixels = math.prod(context.train.images.shape[1:])
  passes = len(context.split.retain) * options.training.num_epochs
  return max(5 if passes * num_pixels <= _SLOW_PIXELS else 3, options.seeds)


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
    before = jobs.read_json(folder / "cells" / cell.name / "result.json")
    now = {
      "settings": options.settings,
      "set": dict(overrides.get(cell.method, {})),
    }
    for name, value in json.loads(json.dumps(now)).items():
      if before and before[name] != value:
        raise ValueError(
          f"{name} must be as in the finished cell {cell.name},"
          f" {before[name]!r}, got {value!r}"
        )


def _check_arguments(
  folder: pathlib.Path,
  options: Options,
  resolved: Mapping[str, compare_recipes.Resolved],
) -> None:
  """Finished cells of another version must not be mixed with new ones."""
  for cell in _cells(options):
    path = folder / "cells" / cell.name
    before = jobs.read_json(path / "result.json").get("arguments")
    now = json.loads(json.dumps(resolved[cell.method].record))
    if before is not None and before != now:
      name = next(x for x in {**before, **now} if before.get(x) != now.get(x))
      raise ValueError(
        f"{name} of {cell.method} must be as in its finished cell,"
        f" {before.get(name)}, got {now.get(name)}: choose another name, or"
        f" remove {path}"
      )


def _own_fields() -> list[str]:
  inherited = recipes.Job.__dataclass_fields__
  return [
    field.name
    for field in dataclasses.fields(Options)
    if field.name not in inherited
  ]


class _Clock:
  """Estimates the time left from what has been measured."""

  def __init__(
    self, num_models: int, cells: Sequence[compare_cells.Cell]
  ) -> None:
    self._num_models = num_models
    self._left = [cell.method for cell in cells]
    self._models: list[float] = []
    self._cells: dict[str, list[float]] = {}

  def models(self, seconds: float) -> None:
    """Notes that the models of a seed are there."""
    self._num_models -= 1
    self._models.append(seconds)

  def cell(self, method: str, seconds: float) -> str:
    """Notes a finished cell, and returns the time left, if any, in words."""
    self._left.remove(method)
    if not self._left:
      return ""
    self._cells.setdefault(method, []).append(seconds)
    every = [x for each in self._cells.values() for x in each]
    left = sum(
      float(np.mean(self._cells.get(method, every))) for method in self._left
    )
    left += self._num_models * float(np.mean(self._models or [0.0]))
    return f"; about {compare_page.seconds(left)} left"


def _run_all(
  context: jobs.Context,
  options: Options,
  resolved: Mapping[str, compare_recipes.Resolved],
  num_retrained: int,
) -> dict[int, compare_cells.Reference]:
  """Runs the cells that are missing; returns the models of each seed."""
  folder = context.run_dir / "cells"
  folder.mkdir(exist_ok=True)
  for partial in folder.glob(".*.partial"):
    shutil.rmtree(partial)
  seeds = range(options.seed, options.seed + options.seeds)
  cells = _cells(options)
  todo = [c for c in cells if not (folder / c.name / "result.json").is_file()]
  clock = _Clock(len({cell.seed for cell in todo}), todo)
  started: set[str] = set()
  references = {}
  num_done = len(cells) - len(todo)
  for seed in seeds:
    own = [cell for cell in todo if cell.seed == seed]
    here = compare_cells.at_seed(context, seed)
    start = time.perf_counter()
    reference = compare_cells.reference(here, needs_variables=bool(own))
    references[seed] = reference._replace(variables={})
    if own:
      clock.models(time.perf_counter() - start)
    extra = compare_cells.extra(here, reference, options.metrics) if own else {}
    for cell in own:
      start = time.perf_counter()
      result = compare_cells.run(
        here,
        cell,
        resolved[cell.method],
        reference,
        extra,
        options.metrics,
        folder,
        compiles=cell.method not in started,
      )
      started.add(cell.method)
      num_done += 1
      left = clock.cell(cell.method, time.perf_counter() - start)
      print(
        f"[{num_done}/{len(cells)}] {_line(cell, result)}{left}",
        flush=True,
      )
  for seed in range(seeds.stop, options.seed + num_retrained):
    references[seed] = compare_cells.reference(
      compare_cells.at_seed(context, seed), needs_variables=False, is_alone=True
    )._replace(variables={})
  return references


def _cells(options: Options) -> list[compare_cells.Cell]:
  return [
    compare_cells.Cell(method, options.seed + i, j)
    for i in range(options.seeds)
    for j in range(options.unlearn_seeds)
    for method in options.methods
  ]


def _line(cell: compare_cells.Cell, result: Mapping[str, Any]) -> str:
  if result["status"] == compare_cells.DIVERGED:
    return f"{cell.name}: {result['reason']}"
  values = result["accuracy"]
  split = "test_forget" if values["test_forget"] is not None else "train_forget"
  return (
    f"{cell.name}: {compare_page.seconds(result['seconds'])}, accuracy"
    f" {values[split]:.3f} {split}, {values['test_retain'] or 0.0:.3f}"
    " test_retain"
  )


def _collect(
  context: jobs.Context,
  options: Options,
  resolved: Mapping[str, compare_recipes.Resolved],
  references: Mapping[int, compare_cells.Reference],
) -> dict[str, Any]:
  """Gathers the cells, and all that follows from them."""
  cells, rows = [], _reference_rows(context, options, references)
  for cell in _cells(options):
    result = _finished(context, options, cell, references[cell.seed])
    figures = _figures(result, options.metrics)
    cells.append({**result, "metrics": figures})
    rows.append(
      {
        "model": cell.method,
        "seed": cell.seed,
        "unlearn_seed": cell.unlearn_seed,
        "metrics": figures,
      }
    )
  names = [*options.metrics, *SECONDS]
  summary = compare_summary.summarise(rows, names)
  info = _info(names)
  return {
    "config": jobs.read_json(context.run_dir / "config.json"),
    "data": jobs.read_json(context.run_dir / "data.json"),
    "compare": jobs.read_json(context.run_dir / "compare.json"),
    "methods": {
      name: {
        "title": baselines.find(name).title,
        "paper": baselines.find(name).paper,
        "arguments": each.record,
        "note": each.note,
      }
      for name, each in resolved.items()
    },
    "metrics": info,
    "summary": summary,
    "best": {
      name: compare_summary.best(
        compare_summary.losses(summary, name, each["direction"], each["ideal"])
      )
      for name, each in info.items()
    },
    "nearest": [
      compare_summary.nearest(summary, "kl_divergence", is_share=False),
      compare_summary.nearest(summary, "agreement", is_share=True),
    ],
    "standing": {
      method: compare_summary.standing(summary, method, info)
      for method in options.methods
    },
    "verification": {
      method: compare_verdicts.verify(context, method, cells, references)
      for method in options.methods
    },
    "yardstick": compare_verdicts.yardstick_of(
      context, options.methods, rows, cells, references
    ),
    "rows": rows,
    "cells": [{k: v for k, v in c.items() if k != "metrics"} for c in cells],
  }


def _info(names: Sequence[str]) -> dict[str, dict[str, Any]]:
  titles = dict(
    zip(
      SECONDS,
      ("Time, compiling included", "Time, compiled before"),
      strict=True,
    )
  )
  found: dict[str, dict[str, Any]] = {}
  for name in names:
    if name in titles:
      found[name] = {"title": titles[name], "direction": "down", "ideal": 0.0}
      continue
    metric = metrics.find(name)
    # JSON has no infinity.
    is_finite = isinstance(metric.ideal, str) or np.isfinite(metric.ideal)
    found[name] = {
      "title": metric.title,
      "direction": metric.direction,
      "ideal": metric.ideal if is_finite else None,
    }
  return found


def _finished(
  context: jobs.Context,
  options: Options,
  cell: compare_cells.Cell,
  reference: compare_cells.Reference,
) -> dict[str, Any]:
  """Reads a cell; metrics that it lacks are computed from its logits."""
  folder = context.run_dir / "cells" / cell.name
  result: dict[str, Any] = jobs.read_json(folder / "result.json")
  if result["status"] == compare_cells.DIVERGED:
    return result
  missing = [x for x in options.metrics if x not in result["metrics"]]
  if missing:
    # Without the weights, which are not kept.
    own = metrics.Outputs(
      files.read_arrays(folder / "logits.npz"), seconds=result["seconds"]
    )
    others = {
      name: metrics.Outputs(logits, seconds=reference.seconds[name])
      for name, logits in reference.logits.items()
    }
    result["metrics"] |= compare_cells.figures(context, missing, own, others)
    jobs.write_json(folder / "result.json", result)
  return result


def _figures(
  result: Mapping[str, Any], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """The metrics of a cell, with its time, in the order asked for."""
  if result["status"] == compare_cells.DIVERGED:
    lost = {"value": None, "reason": result["reason"]}
    return dict.fromkeys([*names, *SECONDS], lost)
  warm: dict[str, Any] = {"value": result["seconds"]}
  if result["compiles"]:
    warm = {
      "value": None,
      "reason": "the first run of a method in a process compiles it",
    }
  times = ({"value": result["seconds"]}, warm)
  return {
    **{name: result["metrics"][name] for name in names},
    **dict(zip(SECONDS, times, strict=True)),
  }


def _reference_rows(
  context: jobs.Context,
  options: Options,
  references: Mapping[int, compare_cells.Reference],
) -> list[dict[str, Any]]:
  """The figures of the original and retrained models of each seed.

  Where a figure is a distance to the retrained model, the retrained model has
  that to the one of the next seed: what chance alone makes.
  """
  rows: list[dict[str, Any]] = []
  seeds = list(references)
  for model in reversed(REFERENCES):
    for place, seed in enumerate(seeds):
      here = references[seed]
      if model not in here.logits:
        continue
      others = {
        name: metrics.Outputs(logits, seconds=here.seconds[name])
        for name, logits in here.logits.items()
      }
      # Further references are compared with one of the originals.
      first = references[seeds[place % options.seeds]]
      others.setdefault("original", metrics.Outputs(first.logits["original"]))
      own = others[model]._replace(seconds=None)
      if model == "retrained":
        own = others.pop(model)
        if len(seeds) > 1:
          other = references[seeds[(place + 1) % len(seeds)]]
          others[model] = metrics.Outputs(
            other.logits[model], seconds=own.seconds
          )
      figures = compare_cells.figures(context, options.metrics, own, others)
      if model == "retrained" and len(seeds) == 1:
        figures = _one_reference(figures)
      figures["seconds"] = {"value": here.seconds[model]}
      figures["seconds_without_compiling"] = {
        "value": here.warm_seconds[model],
        "reason": "fewer than 3 epochs, of which the first compiles",
      }
      rows.append(
        {"model": model, "seed": seed, "unlearn_seed": None, "metrics": figures}
      )
  return rows


def _one_reference(figures: Mapping[str, Any]) -> dict[str, Any]:
  reason = "one retrained model: it has no other to be compared with"
  return {
    name: {"value": None, "reason": reason}
    if any("retrained." in need for need in metrics.find(name).needs)
    else figure
    for name, figure in figures.items()
  }


def _losses(
  context: jobs.Context,
  references: Mapping[int, compare_cells.Reference],
  models: Sequence[str],
  seed: int,
) -> dict[str, dict[str, np.ndarray]]:
  """Losses of the forget images in training and test, of the first seed."""
  labels = compare_cells.labels(context)
  found = {}
  for model in models:
    if model in REFERENCES:
      logits = references[seed].logits[model]
    else:
      name = compare_cells.Cell(model, seed, 0).name
      logits = files.read_arrays(
        context.run_dir / "cells" / name / "logits.npz"
      )
    found[model] = {
      split: metrics.label_losses(logits[split], labels[split])
      for split in ("train_forget", "test_forget")
      if len(labels[split])
    }
  return found


def to_csv(results: Mapping[str, Any]) -> str:
  """Returns one line a cell and metric.

  Args:
    results: The content of `results.json`.

  Returns:
    Text with the columns `model`, `seed`, `unlearn_seed` (empty for the
    original and the retrained model), `metric`, `value` (empty where it is not
    available) and `not_available`, the reason. The figures of the yardstick,
    which are of all seeds together, follow without either seed.
  """
  table: list[list[Any]] = [
    ["model", "seed", "unlearn_seed", "metric", "value", "not_available"]
  ]
  for row in results["rows"]:
    start = [row["model"], row["seed"], row["unlearn_seed"]]
    for name, figure in row["metrics"].items():
      value = figure["value"]
      reason = figure.get("reason") if value is None else None
      table.append([*start, name, value, reason])
  for model, name, value, reason in compare_verdicts.csv_rows(
    results.get("yardstick")
  ):
    table.append([model, None, None, name, value, reason])
  return files.to_csv(table)


if __name__ == "__main__":
  cli.run(main)
