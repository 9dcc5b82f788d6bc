"""The original and retrained models that a comparison measures by."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cells, contexts, files, jobs, run_folder
from psg_jax import checkpoints, metrics, types

MODELS = ("retrained", "original")


class Reference(NamedTuple):
  """The two models of a training seed; one of them may be left out.

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

  def outputs(self) -> dict[str, metrics.Outputs]:
    """Returns what metrics take of the models, without their weights."""
    return {
      name: metrics.Outputs(logits, seconds=self.seconds[name])
      for name, logits in self.logits.items()
    }


def at_seed(context: contexts.Context, seed: int) -> contexts.Context:
  """Returns the job with another seed, and a folder for its models."""
  folder = context.run_dir / "models" / f"seed-{seed}"
  folder.mkdir(parents=True, exist_ok=True)
  job = dataclasses.replace(context.job, seed=seed)
  return context._replace(job=job, run_dir=folder)


def reference(
  context: contexts.Context, *, needs_variables: bool, is_alone: bool = False
) -> Reference:
  """Trains or restores the models of a seed, and keeps their logits.

  Args:
    context: The job at the seed.
    needs_variables: Whether to restore what is finished.
    is_alone: Whether the seed has a retrained model and no original.
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
      predicted, _ = cells.predict(context.of(name), variables[name])
      files.save_arrays(path, predicted)
    logits[name] = files.read_arrays(path)
  records = run_folder.read_json(context.run_dir / "history.json")
  seconds = {name: records[f"{name}_seconds"] for name in steps}
  warm = {name: _warm_seconds(records[name]) for name in steps}
  return Reference(logits, seconds, warm, variables)


def _warm_seconds(history: Sequence[Mapping[str, Any]]) -> float | None:
  if len(history) < 3:
    return None
  return len(history) * float(np.median([x["seconds"] for x in history[1:]]))


def outputs(
  context: contexts.Context, reference: Reference, names: Sequence[str]
) -> dict[str, metrics.Outputs]:
  """Returns what metrics take of the references, and what costs more."""
  outputs = {}
  for name, output in reference.outputs().items():
    variables = reference.variables[name]
    splits = needed_splits(names, f"{name}.features.")
    features = cells.predict(context.of(name), variables, splits, splits)[1]
    outputs[name] = output._replace(
      features=features or None, params=variables["params"]
    )
  splits = needed_splits(names, "random.logits.")
  if splits:
    fresh = context.model.init(
      jax.random.key(context.job.seed),
      jnp.zeros((1, *context.train.images.shape[1:])),
    )
    outputs["random"] = metrics.Outputs(
      cells.predict(context, fresh, splits)[0]
    )
  return outputs


def needed_splits(names: Sequence[str], prefix: str) -> tuple[str, ...]:
  """Returns the parts that metrics need something of."""
  needs = {need for name in names for need in metrics.find(name).needs}
  return tuple(split for split in metrics.SPLITS if prefix + split in needs)


def rows(
  context: contexts.Context,
  names: Sequence[str],
  references: Mapping[int, Reference],
) -> list[dict[str, Any]]:
  """Returns the figures of the original and retrained models of each seed.

  Where a figure is a distance to the retrained model, the retrained model has
  that to the one of the next seed: what chance alone makes.

  Args:
    context: The job.
    names: Metrics.
    references: By seed, the ones without an original last.

  Returns:
    As `summary` takes them, with the times of training.
  """
  rows: list[dict[str, Any]] = []
  models = list(references.values())
  originals = [x.logits["original"] for x in models if "original" in x.logits]
  for model in MODELS:
    for place, (seed, reference) in enumerate(references.items()):
      if model not in reference.logits:
        continue
      others = reference.outputs()
      output = others[model]
      # Further references are compared with one of the originals.
      original = originals[place % len(originals)]
      others.setdefault("original", metrics.Outputs(original))
      if model == "original":
        output = output._replace(seconds=None)
      elif len(models) > 1:
        other = models[(place + 1) % len(models)].logits[model]
        others[model] = metrics.Outputs(other, seconds=output.seconds)
      else:
        del others[model]
      figures = cells.figures(context, names, output, others)
      if model not in others:
        figures |= _alone(names)
      figures["seconds"] = {"value": reference.seconds[model]}
      figures["seconds_without_compiling"] = {
        "value": reference.warm_seconds[model],
        "reason": "fewer than 3 epochs, of which the first compiles",
      }
      rows.append(
        {"model": model, "seed": seed, "unlearn_seed": None, "metrics": figures}
      )
  return rows


def _alone(names: Sequence[str]) -> dict[str, Any]:
  """What cannot be said of the only retrained model."""
  reason = "one retrained model: it has no other to be compared with"
  return {
    name: {"value": None, "reason": reason}
    for name in names
    if any("retrained." in need for need in metrics.find(name).needs)
  }
