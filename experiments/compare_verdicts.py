"""What a comparison says of each method, all seeds together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import compare_cells, compare_summary, files, jobs, read_out
from psg_jax import judgement, yardstick

_NUM_RESAMPLES = 1000


def verify(
  context: jobs.Context,
  method: str,
  cells: Sequence[Mapping[str, Any]],
  references: Mapping[int, compare_cells.Reference],
) -> dict[str, Any]:
  """Compares a method with the retrained models, all seeds together.

  Args:
    context: The job.
    method: The method.
    cells: All cells.
    references: The models of each seed.

  Returns:
    As `compare_summary.verify`.
  """
  own = [cell for cell in cells if cell["method"] == method]
  done = [cell for cell in own if cell["status"] == compare_cells.DONE]
  return compare_summary.verify(
    _retrained(references),
    _by_split(_logits(context, done)),
    _labels(context),
    num_diverged=len(own) - len(done),
    num_cells=len(own),
    groups=_groups(context),
  )


def yardstick_of(
  context: jobs.Context,
  methods: Sequence[str],
  rows: Sequence[Mapping[str, Any]],
  cells: Sequence[Mapping[str, Any]],
  references: Mapping[int, compare_cells.Reference],
) -> dict[str, Any] | None:
  """Measures the original and all methods; see `psg_jax.yardstick`.

  Args:
    context: The job.
    methods: The methods.
    rows: The figures of the references and of the cells.
    cells: All cells.
    references: The models of each seed.

  Returns:
    As `judgement.assess`; None without a retrained model.
  """
  retrained = _retrained(references)
  if retrained is None:
    return None
  labels, groups = _labels(context), _groups(context)
  logits = {}
  for model in ("original", *methods):
    done = [
      cell
      for cell in cells
      if cell["method"] == model and cell["status"] == compare_cells.DONE
    ]
    by_seed = _logits(context, done)
    if model == "original":
      by_seed = {
        seed: [each.logits[model]]
        for seed, each in references.items()
        if model in each.logits
      }
    if by_seed:
      logits[model] = _by_split(by_seed)
  return judgement.assess(
    retrained,
    logits,
    labels,
    attacks={model: _attacks(rows, model) for model in ("retrained", *logits)},
    groups=groups,
    confidence=compare_summary.CONFIDENCE,
    num_resamples=_NUM_RESAMPLES,
  )


def csv_rows(
  found: Mapping[str, Any] | None,
) -> Iterator[tuple[str, str, float | None, str | None]]:
  """Gives model, name, value and why there is none, of each figure.

  Args:
    found: Of `yardstick_of`.

  Yields:
    `normalised_<distance>` with its `_low` and `_high`, and
    `standardised_<level>` with its `_p`.
  """
  for model, each in (found or {"models": {}})["models"].items():
    for row in each["distances"]:
      name = "_".join(filter(None, ["normalised", row["name"], row["split"]]))
      reason = "; ".join(row["reasons"])
      bounds = row["interval"] or (None, None)
      ends = ("", "_low", "_high")
      for end, value in zip(ends, (row["value"], *bounds), strict=True):
        yield model, name + end, value, None if value is not None else reason
    for row in (*each["levels"], *each["attacks"]):
      name = "_".join(filter(None, ["standardised", row["name"], row["split"]]))
      reason = "; ".join(row["reasons"])
      for end, key in (("", "difference"), ("_p", "p")):
        value = row[key]
        yield model, name + end, value, None if value is not None else reason


def _attacks(
  rows: Sequence[Mapping[str, Any]], model: str
) -> dict[str, yardstick.Attack]:
  """The attacks that all runs of a model and all references have."""
  ours, theirs = (
    # What diverged has no time either.
    [
      row["metrics"]
      for row in rows
      if row["model"] == name and row["metrics"]["seconds"]["value"] is not None
    ]
    for name in (model, "retrained")
  )
  found = {}
  for name in theirs[0]:
    if not (name.startswith("mia_") and name.endswith("_auc")):
      continue
    if all(x[name]["value"] is not None for x in (*ours, *theirs)):
      found[name] = yardstick.Attack(
        [x[name]["value"] for x in ours],
        [x[name]["value"] for x in theirs],
        theirs[0][name]["num_samples"],
      )
  return found


def _retrained(
  references: Mapping[int, compare_cells.Reference],
) -> dict[str, np.ndarray] | None:
  """Logits `[S, N, K]` of all retrained models by split."""
  found = [each.logits.get("retrained") for each in references.values()]
  known = [each for each in found if each is not None]
  if not known:
    return None
  return {x: np.stack([y[x] for y in known]) for x in compare_summary.SPLITS}


def _logits(
  context: jobs.Context, done: Sequence[Mapping[str, Any]]
) -> dict[int, list[dict[str, np.ndarray]]]:
  """Logits by training seed, one entry an unlearning seed."""
  by_seed: dict[int, list[dict[str, np.ndarray]]] = {}
  for cell in done:
    name = compare_cells.Cell(
      cell["method"], cell["seed"], cell["unlearn_seed"]
    ).name
    path = context.run_dir / "cells" / name / "logits.npz"
    by_seed.setdefault(cell["seed"], []).append(files.read_arrays(path))
  return by_seed


def _by_split(
  logits: Mapping[int, Sequence[Mapping[str, np.ndarray]]],
) -> dict[str, dict[int, np.ndarray]]:
  return {
    split: {
      seed: np.stack([each[split] for each in arrays])
      for seed, arrays in logits.items()
    }
    for split in compare_summary.SPLITS
  }


def _labels(context: jobs.Context) -> dict[str, np.ndarray]:
  labels = compare_cells.labels(context)
  return {split: labels[split] for split in compare_summary.SPLITS}


def _groups(context: jobs.Context) -> dict[str, np.ndarray] | None:
  """What is drawn as a whole: the groups of the request, such as patients."""
  column = context.asked.request.group
  if column is None:
    return None
  return {
    split: read_out.group_names(context.parts[split], column)
    for split in compare_summary.SPLITS
  }
