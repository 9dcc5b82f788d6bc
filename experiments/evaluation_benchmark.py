"""Measure what evaluating an unlearned model costs, beside a forward pass.

    python -m experiments.evaluation_benchmark runs/fashion_mnist

takes the three models of a run, predicts all images once with the unlearned
one, logits and features in the same pass, and computes every metric but those
of relearning, which train; then the verification against the retrained model
and the diagnosis. Both are timed after compiling, against a plain pass for the
logits alone. The outputs of the original and the retrained model are made once
for all unlearned ones, and are not in the time.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments import cells, cli, contexts, jobs
from experiments.comparison import summary, verdicts
from psg_jax import (
  checkpoints,
  checks,
  diagnosis,
  evaluation,
  metrics,
  types,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Whose models are evaluated, and how often."""

  run: tyro.conf.Positional[pathlib.Path]
  """Run folder with an original, a retrained and an unlearned model."""
  repeats: int = 3
  """Times that both are measured, in turn."""


def main() -> None:
  """Prints the seconds of a pass and of the evaluation."""
  options = cli.parse(Options, description="Measure the cost of evaluation.")
  rows = measure(options)
  print(f"{'pass s':>10}{'evaluation s':>14}{'of which passes s':>19}")
  for row in rows:
    print(
      f"{row['pass']:>10.1f}{row['evaluation']:>14.1f}{row['prediction']:>19.1f}",
      flush=True,
    )
  missing = rows[-1]["missing"]
  print(
    f"{rows[-1]['num_metrics']} metrics of {rows[-1]['num_images']:,} images"
    + (f", not available: {', '.join(missing)}" if missing else "")
  )


def measure(options: Options) -> list[dict[str, Any]]:
  """Times a forward pass and the evaluation.

  Args:
    options: The options.

  Returns:
    By repeat: seconds of a `pass` and of the `evaluation`, of which
    `prediction`; `num_metrics`, `num_images`, and names that are `missing`.

  Raises:
    ValueError: If the run lacks a model, or `repeats` is not positive.
  """
  checks.integer("repeats", options.repeats, at_least=1)
  job = cli.read_job(options.run)
  names = checkpoints.run_checkpoints(options.run)
  for name in contexts.MODELS:
    if name not in names:
      raise ValueError(
        f"run must have the models {', '.join(contexts.MODELS)}, got"
        f" {options.run} with {', '.join(names) or 'none'}"
      )
  context = jobs.prepare(
    dataclasses.replace(job, resume=True), is_known_run=True, is_read_only=True
  )
  variables: dict[str, types.Variables] = {
    "original": jobs.original(context),
    "retrained": jobs.retrained(context),
  }
  variables["unlearned"] = jobs.unlearned(context, variables["original"])
  variables["random"] = context.model.init(
    jax.random.key(job.seed),
    jnp.zeros((1, *context.train.images.shape[1:])),
  )
  others = {
    name: metrics.Outputs(
      *cells.predict(context, variables[name], feature_splits=metrics.SPLITS),
      params=variables[name]["params"],
      seconds=1.0,
    )
    for name in ("original", "retrained", "random")
  }
  # Compiles what is timed.
  cells.predict(context, variables["unlearned"])
  return [
    _measure(context, variables["unlearned"], others)
    for _ in range(options.repeats)
  ]


def _measure(
  context: contexts.Context,
  variables: types.Variables,
  others: dict[str, metrics.Outputs],
) -> dict[str, Any]:
  start = time.perf_counter()
  cells.predict(context, variables)
  seconds = {"pass": time.perf_counter() - start}
  start = time.perf_counter()
  logits, features = cells.predict(
    context, variables, feature_splits=metrics.SPLITS
  )
  seconds["prediction"] = time.perf_counter() - start
  names = [
    name for name in metrics.METRICS if name not in evaluation.RELEARNING
  ]
  outputs = metrics.Outputs(
    logits, features, params=variables["params"], seconds=1.0
  )
  figures = cells.figures(context, names, outputs, others)
  accuracies = [
    {x: figures[f"accuracy_{x}"]["value"] for x in metrics.SPLITS},
    *(
      {
        x: metrics.accuracy(others[name].logits[x], part.labels)
        for x, part in context.parts.items()
      }
      for name in ("original", "retrained")
    ),
  ]
  diagnosis.diagnose(accuracies[1], accuracies[0], retrained=accuracies[2])
  parts = {x: context.parts[x] for x in summary.SPLITS}
  verdicts.verify(
    verdicts.Logits(
      {x: others["retrained"].logits[x][None] for x in parts},
      {"unlearned": {x: {0: logits[x][None]} for x in parts}},
      {name: part.labels for name, part in parts.items()},
      None,
    ),
    "unlearned",
    [{"status": cells.DONE}],
  )
  seconds["evaluation"] = time.perf_counter() - start
  return {
    **seconds,
    "num_metrics": len(names),
    "num_images": len(context.train) + len(context.test),
    "missing": [x for x, figure in figures.items() if figure["value"] is None],
  }


if __name__ == "__main__":
  cli.run(main)
