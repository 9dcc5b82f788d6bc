"""One cell of a comparison: a method, a training seed, an unlearning seed.

A cell with a record is finished: what is there is all there is to it.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments import cells, contexts, run_folder
from experiments.comparison import recipes, references
from psg_jax import diagnosis, metrics

SECONDS = ("seconds", "seconds_without_compiling")
"""The times among the figures of a cell."""
# The last part of a key's path: of unlearning, after those of the models.
_UNLEARNING = len(contexts.MODELS)


class Cell(NamedTuple):
  """One run of a method."""

  method: str
  seed: int
  unlearn_seed: int

  @classmethod
  def of(cls, record: Mapping[str, Any]) -> "Cell":
    """Returns the cell of a record."""
    return cls(*(record[name] for name in cls._fields))

  @property
  def name(self) -> str:
    """The cell's folder."""
    return f"{self.method}-{self.seed}-{self.unlearn_seed}"

  def store(self, run_dir: pathlib.Path) -> cells.Store:
    """Returns where the cell is kept in a run folder."""
    folder = run_dir / "cells" / self.name
    return cells.Store(folder / "result.json", folder / "logits.npz")


def run(
  context: contexts.Context,
  cell: Cell,
  resolved: recipes.Resolved,
  reference: references.Reference,
  others: Mapping[str, metrics.Outputs],
  names: Sequence[str],
  store: cells.Store,
  *,
  compiles: bool,
) -> dict[str, Any]:
  """Unlearns once, computes the metrics, and keeps the cell.

  Args:
    context: The job at the cell's training seed.
    cell: What to run.
    resolved: The method's arguments.
    reference: The models of the training seed.
    others: What metrics take of them, of `references.outputs`.
    names: Metrics to compute.
    store: Where to keep it.
    compiles: Whether it is the method's first run in this process.

  Returns:
    The record: `status`, and `seconds`, `accuracy`, `history`, `metrics` and
    `diagnosis`, or the `reason` and the `step` where it diverged.

  Raises:
    ValueError: If the method refuses its arguments.
  """
  record: dict[str, Any] = {
    **cell._asdict(),
    "settings": resolved.settings,
    "set": resolved.overrides,
    "arguments": resolved.record,
    "compiles": compiles,
  }
  logits: dict[str, Any] = {}
  if cell.method == "retrain":
    context = context.of("retrained")
  key = jax.random.fold_in(jax.random.key(cell.seed), _UNLEARNING)
  try:
    unlearned = cells.unlearn(
      context,
      resolved,
      reference.variables["original"],
      jax.random.fold_in(key, cell.unlearn_seed),
      show_progress=sys.stderr.isatty(),
    )
    variables = unlearned.output.variables
    splits = references.needed_splits(names, "model.features.")
    logits, features = cells.predict(context, variables, feature_splits=splits)
    cells.check_finite(*logits.values())
  except FloatingPointError as error:
    logits = {}
    record |= {"status": cells.DIVERGED, **cells.divergence(error)}
  except ValueError as error:
    raise ValueError(f"{cell.name}: {error}") from error
  else:
    model = metrics.Outputs(
      logits,
      features or None,
      params=variables["params"],
      seconds=unlearned.seconds,
    )
    record |= {
      "status": cells.DONE,
      "seconds": unlearned.seconds,
      "target_accuracy": unlearned.target,
      "accuracy": _accuracies(context, model),
      "history": _history(unlearned.output.history),
      "metrics": cells.figures(context, names, model, others),
      "diagnosis": _diagnose(context, resolved, others, unlearned, model),
    }
  store.write(record, logits)
  return record


def complete(
  context: contexts.Context,
  record: dict[str, Any],
  names: Sequence[str],
  reference: references.Reference,
) -> dict[str, Any]:
  """Computes metrics that a finished cell lacks, from its logits."""
  missing = [x for x in names if x not in record.get("metrics", names)]
  if missing:
    store = Cell.of(record).store(context.run_dir)
    # Without the weights, which are not kept.
    model = metrics.Outputs(store.read_logits(), seconds=record["seconds"])
    record["metrics"] |= cells.figures(
      context, missing, model, reference.outputs()
    )
    run_folder.write_json(store.record, record)
  return record


def figures(
  record: Mapping[str, Any], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Returns the metrics of a cell, with its time, in the order of `names`."""
  if record["status"] == cells.DIVERGED:
    lost = {"value": None, "reason": record["reason"]}
    return dict.fromkeys([*names, *SECONDS], lost)
  warm: dict[str, Any] = {"value": record["seconds"]}
  if record["compiles"]:
    reason = "the first run of a method in a process compiles it"
    warm = {"value": None, "reason": reason}
  times = dict(zip(SECONDS, ({"value": record["seconds"]}, warm), strict=True))
  return {name: record["metrics"][name] for name in names} | times


def _accuracies(
  context: contexts.Context, model: metrics.Outputs
) -> dict[str, float | None]:
  return {
    name: metrics.accuracy(model.logits[name], part.labels)
    for name, part in context.parts.items()
  }


def _history(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The number of passes, and the last of them less its lists."""
  last = history[-1] if history else {}
  kept = {k: x for k, x in last.items() if isinstance(x, (int, float, str))}
  return {"num_passes": len(history), "last": kept}


def _diagnose(
  context: contexts.Context,
  resolved: recipes.Resolved,
  others: Mapping[str, metrics.Outputs],
  unlearned: cells.Unlearned,
  model: metrics.Outputs,
) -> dict[str, Any]:
  """Says what went wrong; of PSG alone the options and the passes are known."""
  is_known = resolved.method in recipes.OURS
  retrained = others.get("retrained")
  return diagnosis.diagnose(
    _accuracies(context, others["original"]),
    _accuracies(context, model),
    retrained=None if retrained is None else _accuracies(context, retrained),
    history=unlearned.output.history if is_known else (),
    options=resolved.arguments if is_known else None,
    scope="class" if contexts.is_class_request(context) else "samples",
    num_classes=context.train.num_classes,
  ).as_dict()
