"""Measure a grid of unlearnings against as many runs, one after the other.

    python -m experiments.grid_benchmark --recipe digits --no-retrained

trains the original, or finds it in the run, and unlearns with the paper's 5
values of lambda times 4 of gamma: as one grid, mapped and vmapped; by a call of
`unlearn` for each cell with JAX's programs cleared before it, so that each
compiles as a run of its own does; and by calls in one process, of which the
first compiles. All are made in turn, and each begins without programs; those
kept in the cache folder are not used unless `--cache` says so. Medians of
seconds, and ratios to those of runs of their own; core seconds are those that
the process computed, which other work on the machine changes less.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from experiments import cli, contexts, jobs, recipes
from psg_jax import checks, grids, types, unlearning

WEIGHTS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
NOISES = (0.0, 1e-4, 1e-1, 1.0)
WAYS = (
  *("grid", "grid again", "vmapped", "vmapped again"),
  *("runs", "loop", "loop again"),
)
# Seconds and core seconds, and the models of the cells that are compared.
_Taken: TypeAlias = tuple[np.ndarray, list[types.Variables]]


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, whose request is unlearned in 20 ways."""

  repeats: int = 3
  """Times that each way is measured, in turn."""
  singles: int = 20
  """Cells that are unlearned one by one, at even distances among the 20, 3 or
  more; the time is scaled to all, but for what a loop compiles."""
  ways: tuple[str, ...] = WAYS
  """What is measured: again is a second time, with nothing to compile."""
  cache: bool = False
  """Load programs from the user's cache folder, and keep them there."""


def main() -> None:
  """Prints a line for each way."""
  options = cli.parse_job(Options, "Measure a grid against single runs.")
  options = dataclasses.replace(
    options, name=options.name or f"{options.recipe}_grid", resume=True
  )
  config: Any = jax.config
  config.update("jax_enable_compilation_cache", options.cache)
  rows, difference = measure(options)
  print(
    f"{'20 cells':<14}{'seconds':>9}{'of runs':>9}{'core s':>9}{'of runs':>9}"
    "  all core seconds"
  )
  medians = {way: np.median(row, axis=0) for way, row in rows.items()}
  for way, (seconds, core) in medians.items():
    of_runs = medians[way] / medians.get("runs", np.nan)
    print(
      f"{way:<14}{seconds:>9.1f}{of_runs[0]:>9.2f}{core:>9.1f}{of_runs[1]:>9.2f}"
      f"  {', '.join(f'{x:.1f}' for _, x in rows[way])}"
    )
  print(f"Largest difference of a variable between the ways: {difference:.1e}")


def cells() -> list[dict[str, Any]]:
  """Returns the 20 cells."""
  return grids.grid_of(distance_weight=WEIGHTS, noise_scale=NOISES)


def measure(options: Options) -> tuple[dict[str, list[np.ndarray]], float]:
  """Unlearns all cells in each way.

  Args:
    options: The job, and what is measured.

  Returns:
    By way the seconds and the core seconds of each repeat, and the largest
    difference of a variable between the ways.

  Raises:
    ValueError: If a way is unknown, or a number is out of its range.
  """
  checks.integer("repeats", options.repeats, at_least=1)
  checks.integer("singles", options.singles, at_least=3)
  for way in options.ways:
    checks.one_of("ways", way, WAYS)
  context = jobs.prepare(options)
  variables = jobs.original(context)
  key = contexts.model_key(context, "unlearned")
  shared = contexts.unlearn_options(context) | {"show_progress": False}
  # What the cells say, and what needs a target, of which there is none.
  for name in ("distance_weight", "noise_scale", "search_fn", "max_cycles"):
    del shared[name]
  arguments = (context.model, variables, context.split)

  num_cells = len(cells())
  singles = np.linspace(0, num_cells - 1, options.singles).astype(int)

  def grid(mode: str) -> _Taken:
    options = shared | {"cells": cells(), "mode": mode}
    row, output = _timed(lambda: grids.unlearn_grid(*arguments, key, **options))
    return row, [output.output(x).variables for x in singles]

  def run(cell: dict[str, Any]) -> types.Variables:
    options = shared | cell
    cell_key = jax.random.fold_in(key, 0)
    output = unlearning.unlearn(*arguments, cell_key, **options)
    return jax.block_until_ready(output.variables)

  def loop(num_compiling: int, *, is_cleared: bool = False) -> _Taken:
    rows, models = [], []
    for place in singles:
      if is_cleared:
        jax.clear_caches()
      row, unlearned = _timed(functools.partial(run, cells()[place]))
      rows.append(row)
      models.append(unlearned)
    first, rest = rows[:num_compiling], rows[num_compiling:]
    mean = np.mean(rest, axis=0)
    return np.sum(first, axis=0) + mean * (num_cells - len(first)), models

  ways: dict[str, Callable[[], _Taken]] = {
    "grid": lambda: grid("map"),
    "grid again": lambda: grid("map"),
    "vmapped": lambda: grid("vmap"),
    "vmapped again": lambda: grid("vmap"),
    "runs": lambda: loop(0, is_cleared=True),
    # The first is searched from without λ and γ, by a program of its own.
    "loop": lambda: loop(2),
    "loop again": lambda: loop(0),
  }
  rows: dict[str, list[np.ndarray]] = {way: [] for way in options.ways}
  models = []
  for _ in range(options.repeats):
    for way in options.ways:
      if "again" not in way:
        jax.clear_caches()
      row, outcome = ways[way]()
      rows[way].append(row)
      models.append(outcome)
      print(f"{way}: {row[0]:.1f} s, {row[1]:.1f} core s", flush=True)
  difference = max(
    float(np.abs(np.asarray(x) - np.asarray(y)).max())
    for outcome in models
    for x, y in zip(*map(jax.tree.leaves, (outcome, models[0])), strict=True)
  )
  return rows, difference


def _timed(fn: Callable[[], Any]) -> tuple[np.ndarray, Any]:
  """Returns the seconds and the core seconds of a call, and its result."""
  start = np.array([time.perf_counter(), time.process_time()])
  result = fn()
  return np.array([time.perf_counter(), time.process_time()]) - start, result


if __name__ == "__main__":
  cli.run(main)
