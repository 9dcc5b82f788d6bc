"""One cell of a comparison: a method, a training seed, an unlearning seed.

A cell is written as a whole or not at all, so that what is there is finished.
"""

import dataclasses
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import compare_recipes, files, jobs, requests
from psg_jax import (
  baselines,
  checkpoints,
  diagnosis,
  inference,
  metrics,
  types,
)

DONE, DIVERGED = "done", "diverged"
# The last part of a key's path: of unlearning, after those of the models.
_UNLEARNING = len(jobs.MODELS)


class Cell(NamedTuple):
  """One run of a method."""

  method: str
  seed: int
  unlearn_seed: int

  @property
  def name(self) -> str:
    """The cell's folder."""
    return f"{self.method}-{self.seed}-{self.unlearn_seed}"


class Reference(NamedTuple):
  """The two models of a training seed; the second may be left out.

  Attributes:
    logits: By model and split.
    seconds: Of the training, by model.
    warm_seconds: Likewise, with an average epoch in the place of the first,
      which compiles; None for fewer than three.
    variables: By model; empty where all is computed already.
  """

  logits: dict[str, dict[str, np.ndarray]]
  seconds: dict[str, float]
  warm_seconds: dict[str, float | None]
  variables: dict[str, types.Variables]


def at_seed(context: jobs.Context, seed: int) -> jobs.Context:
  """Returns the job with another seed, and a folder for its models."""
  folder = context.run_dir / "models" / f"seed-{seed}"
  folder.mkdir(parents=True, exist_ok=True)
  job = dataclasses.replace(context.job, seed=seed)
  return context._replace(job=job, run_dir=folder)


def reference(
  context: jobs.Context, *, needs_variables: bool, is_alone: bool = False
) -> Reference:
  """Trains or restores the models of a seed, and keeps their logits.

  Args:
    context: The job at the seed.
    needs_variables: Whether to restore what is finished.
    is_alone: Whether the seed has a retrained model and no original.

  Returns:
    The models.
  """
  steps = {} if is_alone else {"original": jobs.original}
  if context.job.retrained:
    steps["retrained"] = jobs.retrained
  variables, logits = {}, {}
  for name, step in steps.items():
    path = context.run_dir / f"{name}.npz"
    finished = checkpoints.run_checkpoints(context.run_dir)
    if name not in finished or needs_variables or not path.is_file():
      variables[name] = step(context)
    if not path.is_file():
      files.save_arrays(path, predict(context.of(name), variables[name])[0])
    logits[name] = files.read_arrays(path)
  records = jobs.read_json(context.run_dir / "history.json")
  seconds = {name: records[f"{name}_seconds"] for name in steps}
  warm = {name: _warm_seconds(records[name]) for name in steps}
  return Reference(logits, seconds, warm, variables)


def _warm_seconds(history: Sequence[Mapping[str, Any]]) -> float | None:
  if len(history) < 3:
    return None
  return len(history) * float(np.median([x["seconds"] for x in history[1:]]))


def extra(
  context: jobs.Context, reference: Reference, names: Sequence[str]
) -> dict[str, metrics.Outputs]:
  """What metrics need of the references: logits, and what costs more."""
  found = {
    name: metrics.Outputs(
      logits,
      _features(context.of(name), reference.variables[name], names, name),
      params=reference.variables[name]["params"],
      seconds=reference.seconds[name],
    )
    for name, logits in reference.logits.items()
  }
  if any(need.startswith("random.") for need in _needs(names)):
    fresh = context.model.init(
      jax.random.key(context.job.seed),
      jnp.zeros((1, *context.train.images.shape[1:])),
    )
    found["random"] = metrics.Outputs(
      predict(context, fresh, _splits(names, "random.logits."))[0]
    )
  return found


def _needs(names: Sequence[str]) -> list[str]:
  return [need for name in names for need in metrics.find(name).needs]


def _splits(names: Sequence[str], prefix: str) -> tuple[str, ...]:
  """Returns the parts that metrics need something of."""
  needs = _needs(names)
  return tuple(split for split in metrics.SPLITS if prefix + split in needs)


def _features(
  context: jobs.Context,
  variables: types.Variables,
  names: Sequence[str],
  role: str,
) -> dict[str, np.ndarray] | None:
  """Features of the parts that are asked for, of a model with known logits."""
  return {
    split: inference.predict(
      context.model.features,
      variables,
      context.parts[split].images,
      batch_size=context.job.eval_batch_size,
      mesh=context.mesh,
    )
    for split in _splits(names, f"{role}.features.")
  } or None


def run(
  context: jobs.Context,
  cell: Cell,
  resolved: compare_recipes.Resolved,
  reference: Reference,
  extra: Mapping[str, metrics.Outputs],
  names: Sequence[str],
  folder: pathlib.Path,
  *,
  compiles: bool,
) -> dict[str, Any]:
  """Unlearns once, computes the metrics, and writes the cell as a whole.

  Args:
    context: The job at the cell's training seed.
    cell: What to run.
    resolved: The method's arguments.
    reference: The models of the training seed.
    extra: Their outputs, of `extra`.
    names: Metrics to compute.
    folder: The folder of all cells.
    compiles: Whether it is the method's first run in this process.

  Returns:
    What was written: `status`, and `seconds`, `accuracy`, `history`, `metrics`
    and `diagnosis`, or the `reason` and the `step` where it diverged.

  Raises:
    ValueError: If the method refuses its arguments.
  """
  result: dict[str, Any] = {
    **cell._asdict(),
    "settings": resolved.settings,
    "set": resolved.overrides,
    "arguments": resolved.record,
    "compiles": compiles,
  }
  logits: dict[str, np.ndarray] = {}
  if cell.method == "retrain":
    context = context.of("retrained")
  try:
    output, seconds, target = _unlearn(context, cell, resolved, reference)
    splits = _splits(names, "model.features.")
    logits, features = predict(context, output.variables, feature_splits=splits)
    if not all(np.isfinite(values).all() for values in logits.values()):
      raise FloatingPointError("the logits are not finite after the last step")
  except FloatingPointError as error:
    step = re.search(r"step (\d+)", str(error))
    result |= {
      "status": DIVERGED,
      "reason": f"diverged: {error}",
      "step": None if step is None else int(step.group(1)),
    }
  except ValueError as error:
    raise ValueError(f"{cell.name}: {error}") from error
  else:
    own = metrics.Outputs(
      logits,
      features or None,
      params=output.variables["params"],
      seconds=seconds,
    )
    result |= {
      "status": DONE,
      "seconds": seconds,
      "target_accuracy": target,
      "accuracy": _accuracies(context, logits),
      "history": _history(output.history),
      "metrics": figures(context, names, own, extra),
      "diagnosis": _diagnose(
        context, cell, resolved, reference, output, logits
      ),
    }
  _write_cell(folder / cell.name, result, logits)
  return result


def _unlearn(
  context: jobs.Context,
  cell: Cell,
  resolved: compare_recipes.Resolved,
  reference: Reference,
) -> tuple[baselines.Output, float, float | None]:
  """Returns the output, seconds, and the accuracy to stop at, if any."""
  key = jax.random.fold_in(jax.random.key(cell.seed), _UNLEARNING)
  start = time.perf_counter()
  arguments = dict(resolved.arguments)
  is_ours = cell.method in compare_recipes.OURS
  if is_ours and "target_accuracy" not in arguments:
    # Where it stops, for requests whose right answer is not 0.
    arguments["target_accuracy"] = jobs.target_accuracy(
      context, reference.variables["original"]
    )
  output = baselines.find(cell.method).fn(
    context.model,
    reference.variables["original"],
    context.split,
    jax.random.fold_in(key, cell.unlearn_seed),
    **arguments,
    mesh=context.mesh,
    show_progress=sys.stderr.isatty(),
  )
  jax.block_until_ready(output.variables)
  seconds = time.perf_counter() - start
  return output, seconds, arguments.get("target_accuracy")


def predict(
  context: jobs.Context,
  variables: types.Variables,
  splits: Sequence[str] = metrics.SPLITS,
  feature_splits: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Predicts logits and, of some parts and in the same pass, features.

  Args:
    context: The job.
    variables: A model's.
    splits: The parts.
    feature_splits: Those of them whose features are wanted.

  Returns:
    Logits and features, by part.
  """
  logits, features = {}, {}
  options: dict[str, Any] = {
    "batch_size": context.job.eval_batch_size,
    "mesh": context.mesh,
  }
  parts = context.parts
  for name in splits:
    images = parts[name].images
    if name in feature_splits:
      logits[name], features[name] = inference.predict_both(
        context.model, variables, images, **options
      )
    else:
      logits[name] = inference.predict(
        context.model.apply, variables, images, **options
      )
  return logits, features


def labels(context: jobs.Context) -> dict[str, np.ndarray]:
  """Returns the labels of the four parts."""
  return {name: part.labels for name, part in context.parts.items()}


def _accuracies(
  context: jobs.Context, logits: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
  return {
    name: metrics.accuracy(logits[name], labels)
    for name, labels in labels(context).items()
  }


def figures(
  context: jobs.Context,
  names: Sequence[str],
  model: metrics.Outputs,
  others: Mapping[str, metrics.Outputs],
) -> dict[str, Any]:
  """Computes metrics.

  Args:
    context: The job.
    names: Names of metrics.
    model: The model in question.
    others: Any of `original`, `retrained` and `random`.

  Returns:
    As `metrics.compute`.
  """
  columns = context.asked.columns
  groups = {
    name: requests.values(part, columns[0])
    for name, part in context.parts.items()
    if columns
  }
  inputs = metrics.Inputs(
    labels=labels(context),
    model=model,
    retrained=others.get("retrained"),
    original=others.get("original"),
    random=others.get("random"),
    groups=groups or None,
  )
  return metrics.compute(names, inputs)


def _history(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The number of passes, and the last of them less its lists."""
  last = history[-1] if history else {}
  return {
    "num_passes": len(history),
    "last": {
      name: value
      for name, value in last.items()
      if isinstance(value, (int, float, str))
    },
  }


def _diagnose(
  context: jobs.Context,
  cell: Cell,
  resolved: compare_recipes.Resolved,
  reference: Reference,
  output: baselines.Output,
  logits: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Says what went wrong; of PSG alone the options and the passes are known."""
  is_known = cell.method in compare_recipes.OURS
  retrained = reference.logits.get("retrained")
  accuracies = [
    None if each is None else _accuracies(context, each)
    for each in (reference.logits["original"], logits, retrained)
  ]
  return diagnosis.diagnose(
    accuracies[0],  # type: ignore[arg-type]
    accuracies[1],  # type: ignore[arg-type]
    retrained=accuracies[2],
    history=output.history if is_known else (),
    options=resolved.arguments if is_known else None,
    scope="class" if jobs.is_class_request(context) else "samples",
    num_classes=context.train.num_classes,
  ).as_dict()


def _write_cell(
  folder: pathlib.Path,
  result: Mapping[str, Any],
  logits: Mapping[str, np.ndarray],
) -> None:
  """Writes the cell beside its place, and then moves it there."""
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  if result["status"] == DONE:
    files.save_arrays(partial / "logits.npz", logits)
  jobs.write_json(partial / "result.json", result)
  # What is there has no result, or it would not have been run.
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)
