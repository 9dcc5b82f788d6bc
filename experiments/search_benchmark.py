"""Measure what searches cost and how near they come, on a job's forget images.

    python -m experiments.search_benchmark --recipe digits --forget_classes 6 \
      --seed 100 --no-retrained

trains the original, or finds it in the run, and searches from up to 256 forget
images with steps of 0.01, with the defaults, and with steps of 0.001, whose
class and distance are the yardstick. A gradient is taken for each step. Each
search is timed after compiling, in turn, three times: medians.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from experiments import cli, jobs, recipes
from psg_jax import boundary, unlearning

NUM_IMAGES = 256
_REPEATS = 3
SEARCHES = {
  "fine steps": boundary.Search(num_steps=1000, step_size=0.001),
  "constant steps": boundary.Search(num_steps=50, step_size=0.01),
  "default": unlearning.search_of({}),
}


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, whose forget images are searched from."""


def main() -> None:
  """Prints a line a search."""
  options = cli.parse_job(Options, "Measure the cost of searches.")
  options = dataclasses.replace(
    options, name=options.name or f"{options.recipe}_search", resume=True
  )
  print(
    f"{'search':<16}{'gradients':>10}{'median':>9}{'mean':>9}{'crossed':>9}"
    f"{'same class':>12}{'seconds':>9}"
  )
  for name, row in measure(options).items():
    print(
      f"{name:<16}{row['gradients']:>10.2f}{row['median']:>9.4f}"
      f"{row['mean']:>9.4f}{row['crossed']:>9.3f}{row['same']:>12.3f}"
      f"{row['seconds']:>9.2f}",
      flush=True,
    )


def measure(options: recipes.Job) -> dict[str, dict[str, Any]]:
  """Searches with each of `SEARCHES`.

  Args:
    options: The job.

  Returns:
    By search: `gradients` an image, `median` and `mean` distance in pixels,
    the share that `crossed`, the share with the `same` class as the search in
    fine steps, and `seconds`.
  """
  context = jobs.prepare(options)
  variables = jobs.original(context)
  forget = context.split.forget
  forget = forget.take(np.arange(min(NUM_IMAGES, len(forget))))

  def search(search_fn: boundary.Search) -> unlearning.Relabelling:
    return unlearning.relabel(
      context.model.apply,
      variables,
      forget,
      jax.random.key(options.seed),
      search_fn=search_fn,
      mesh=context.mesh,
      show_progress=False,
    )

  outcomes = {name: search(fn) for name, fn in SEARCHES.items()}
  seconds: dict[str, list[float]] = {name: [] for name in SEARCHES}
  for _ in range(_REPEATS):
    for name, fn in SEARCHES.items():
      start = time.perf_counter()
      search(fn)
      seconds[name].append(time.perf_counter() - start)
  fine = outcomes["fine steps"]
  return {
    name: {
      "gradients": float(outcome.num_steps.mean()),
      "median": float(np.median(outcome.distance)),
      "mean": float(outcome.distance.mean()),
      "crossed": float(outcome.is_crossed.mean()),
      "same": float(np.mean(outcome.labels == fine.labels)),
      "seconds": statistics.median(seconds[name]),
    }
    for name, outcome in outcomes.items()
  }


if __name__ == "__main__":
  cli.run(main)
