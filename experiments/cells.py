"""Runs of a method, kept when they are finished: of `compare` and `audit`."""

import json
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import contexts, files, requests, run_folder
from experiments.comparison import recipes
from psg_jax import baselines, inference, metrics, types
from psg_jax import proxies as proxies_lib

DONE, DIVERGED = "done", "diverged"


class Store(NamedTuple):
  """Where a run is kept: its record is written last, when all is there.

  Attributes:
    record: The file of the record.
    logits: The file of the logits, which what diverged has not.
  """

  record: pathlib.Path
  logits: pathlib.Path

  def is_done(self) -> bool:
    """Whether the run is finished."""
    return self.record.is_file()

  def read(self) -> dict[str, Any]:
    """Returns the record; an empty one where the run is not finished."""
    return run_folder.read_json(self.record)

  def read_logits(self) -> dict[str, np.ndarray]:
    """Returns the logits by name."""
    return files.read_arrays(self.logits)

  def write(
    self, record: Mapping[str, Any], logits: Mapping[str, np.ndarray]
  ) -> None:
    """Writes a finished run."""
    self.record.parent.mkdir(parents=True, exist_ok=True)
    if logits:
      files.save_arrays(self.logits, logits)
    run_folder.write_json(self.record, record)


class Unlearned(NamedTuple):
  """A model that has unlearned.

  Attributes:
    output: Of the method.
    seconds: That it took.
    target: The accuracy it was to stop at, if any.
    proxies: Those that said it, if any.
  """

  output: baselines.Output
  seconds: float
  target: float | None
  proxies: proxies_lib.Proxies | None = None


def unlearn(
  context: contexts.Context,
  resolved: recipes.Resolved,
  variables: types.Variables,
  key: jax.Array,
  *,
  show_progress: bool,
) -> Unlearned:
  """Unlearns once.

  Raises:
    FloatingPointError: If it diverges.
    ValueError: If the method refuses its arguments.
  """
  start = time.perf_counter()
  arguments = dict(resolved.arguments)
  proxies = None
  if is_aimed(resolved):
    aim = contexts.aim(context, variables, show_progress=show_progress)
    options, proxies = aim.options(), aim.proxies
    if resolved.method != "psg":
      options.pop("targets", None)  # They are not of these labels.
    arguments |= options
  output = baselines.find(resolved.method).fn(
    context.model,
    variables,
    context.split,
    key,
    **arguments,
    mesh=context.mesh,
    show_progress=show_progress,
  )
  jax.block_until_ready(output.variables)
  seconds = time.perf_counter() - start
  target = arguments.get("target_accuracy")
  return Unlearned(output, seconds, target, proxies)


def is_aimed(resolved: recipes.Resolved) -> bool:
  """Whether unlearning ends at an accuracy that depends on the model.

  So it does for requests whose right answer is not 0.
  """
  arguments = resolved.arguments
  return resolved.method in recipes.OURS and "target_accuracy" not in arguments


def check_finite(*logits: np.ndarray) -> None:
  """Raises FloatingPointError for logits of a model that is lost."""
  if not all(np.isfinite(values).all() for values in logits):
    raise FloatingPointError("the logits are not finite after the last step")


def divergence(error: FloatingPointError) -> dict[str, Any]:
  """Returns the `reason` and the `step` of a run that diverged."""
  step = re.search(r"step (\d+)", str(error))
  return {
    "reason": f"diverged: {error}",
    "step": None if step is None else int(step.group(1)),
  }


def change(
  before: Mapping[str, Any] | None, record: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
  """Returns the first argument that is not as it was, and its two values.

  Args:
    before: The arguments of a finished run; None where there is none.
    record: What they are to be now.
  """
  now = json.loads(json.dumps(record))
  names = () if before is None else {**before, **now}
  for name in names:
    if before is not None and before.get(name) != now.get(name):
      return name, before.get(name), now.get(name)
  return None


def predict(
  context: contexts.Context,
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
  """
  logits, features = {}, {}
  model, batch_size = context.model, context.job.eval_batch_size
  options: Any = {"batch_size": batch_size, "mesh": context.mesh}
  for name in splits:
    data = (variables, context.parts[name].images)
    if name in feature_splits:
      both = inference.predict_both(model, *data, **options)
      logits[name], features[name] = both
    else:
      logits[name] = inference.predict(model.apply, *data, **options)
  return logits, features


def figures(
  context: contexts.Context,
  names: Sequence[str],
  model: metrics.Outputs,
  others: Mapping[str, metrics.Outputs],
) -> dict[str, Any]:
  """Computes metrics, as `metrics.compute`, of a model.

  Args:
    context: The job.
    names: Names of metrics.
    model: The model in question.
    others: Any of `original`, `retrained` and `random`.
  """
  parts, column = context.parts, next(iter(context.selection.columns), None)
  inputs = metrics.Inputs(
    labels={name: part.labels for name, part in parts.items()},
    model=model,
    retrained=others.get("retrained"),
    original=others.get("original"),
    random=others.get("random"),
    groups=None
    if column is None
    else {name: requests.values(part, column) for name, part in parts.items()},
  )
  return metrics.compute(names, inputs)
