"""Time the library against an eager PyTorch version of the released code.

    python -m experiments.benchmark --weights original.safetensors

on the reference protocol: class 0 of the first 12,000 training images of
Fashion-MNIST, All-CNN at quarter width. Both sides work on the same images and
weights with as many threads as there are cores, and take turns, so that what
else the machine does falls on both. Six minutes on two cores. On a GPU the
library is timed alone: PyTorch's side computes on the CPU.
"""

import dataclasses
import os
import pathlib
import platform
import statistics
import time
from importlib import metadata
from typing import Any

import jax
import numpy as np

import psg_jax
from experiments import benchmark_tasks, cli, run_folder
from psg_jax import (
  checks,
  data,
  inference,
  progress,
)

# Two implementations round differently, and few images lie on a boundary.
_LEAST_AGREEMENT = 0.99
_SIDES = ("psg_jax", "pytorch")
_IDLE_LOAD = 0.5


def main() -> None:
  """Times, compares what comes out, and prints both."""
  options = cli.parse(
    benchmark_tasks.Options, description="Time psg_jax against PyTorch."
  )
  check(options)
  torch_version = None
  if benchmark_tasks.is_compared():
    # Before any work, since this says what to do where PyTorch is missing.
    from experiments import torch_loop

    torch_loop.set_threads(_num_cores())
    torch_version = torch_loop.version()
  load_average = os.getloadavg()[0]
  setup = benchmark_tasks.prepare(options)
  tasks = benchmark_tasks.tasks(setup)
  # One that has to wait for a core keeps the other threads of PyTorch waiting,
  # which makes it up to ten times slower, and XLA less than two.
  if (
    benchmark_tasks.is_compared()
    and _num_cores() > 1
    and load_average > _IDLE_LOAD
  ):
    print(
      f"The machine is busy (load {load_average:.1f}), which PyTorch suffers"
      " from more: wait, or compare on one core (taskset -c 0).",
    )
  print(
    f"{len(setup.split.forget)} forget images of {len(setup.train)}, width"
    f" {options.width:g}, {_num_cores()} threads, {options.rounds} rounds"
  )
  timings, outputs = measure(tasks, options.rounds)
  result: dict[str, Any] = {
    "options": dataclasses.asdict(options),
    "device": f"{platform.processor() or platform.machine()} cpu"
    if benchmark_tasks.is_compared()
    else jax.devices()[0].device_kind,
    "num_threads": _num_cores(),
    "load_average": load_average,
    "versions": {
      "python": platform.python_version(),
      "psg_jax": psg_jax.__version__,
      "torch": torch_version,
      **{name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    },
    "num_forget": len(setup.split.forget),
    "num_train_steps": len(setup.rows),
    "timings": timings,
    "agreement": _agreement(setup, outputs)
    if benchmark_tasks.is_compared()
    else {},
  }
  print(table(tasks, timings))
  print(notes(setup, timings, result["agreement"]))
  if options.profile is not None:
    with jax.profiler.trace(options.profile):
      tasks[0].jax_fn()
    print(f"trace of one unlearning job: {options.profile}")
  if options.output is not None:
    run_folder.write_json(pathlib.Path(options.output), result)
    print(options.output)


def check(options: benchmark_tasks.Options) -> None:
  """Raises ValueError for what can be seen wrong before any work."""
  checks.one_of("dataset", options.dataset, data.names())
  checks.number("width", options.width, above=0)
  checks.integer("seed", options.seed, at_least=0)
  for name in ("rounds", "batch_size", "num_passes"):
    checks.integer(name, getattr(options, name), at_least=1)
  for name in ("num_train", "num_forget", "train_steps"):
    if getattr(options, name) is not None:
      checks.integer(name, getattr(options, name), at_least=1)
  if options.output is not None:
    output = pathlib.Path(options.output)
    if output.suffix != ".json" or not output.parent.is_dir():
      raise ValueError(
        f"output must be a .json file in an existing folder, got {output}"
      )


def measure(
  tasks: list[benchmark_tasks.Task], rounds: int
) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
  """Times all tasks in turn, in one round that is not counted and `rounds`.

  Args:
    tasks: What to time. A program that several share is compiled in the first
      call of the first.
    rounds: How often, positive.

  Returns:
    By name, for `psg_jax` and `pytorch`: `first`, the seconds of the first
    call, `seconds` of each counted one, and their `median` and `minimum`; and
    `ratio` and `ratio_of_minima`, PyTorch's seconds to ours; None where PyTorch
    has no counterpart. Then, by name and side, what the last calls returned.
  """
  calls = [
    (task, side, fn)
    for task in tasks
    for side, fn in zip(_SIDES, (task.jax_fn, task.torch_fn), strict=True)
    if fn is not None
  ]
  taken: dict[tuple[str, str], list[float]] = {}
  outputs: dict[tuple[str, str], Any] = {}
  with progress.bar(
    "timing", (rounds + 1) * len(calls), unit="call", is_shown=True
  ) as bar:
    for _ in range(rounds + 1):
      for task, side, fn in calls:
        start = time.perf_counter()
        outputs[task.name, side] = fn()
        seconds = (time.perf_counter() - start) * task.scale
        taken.setdefault((task.name, side), []).append(seconds)
        bar.advance(1)
  return {task.name: _summary(task.name, taken) for task in tasks}, outputs


def _summary(
  name: str, taken: dict[tuple[str, str], list[float]]
) -> dict[str, Any]:
  row: dict[str, Any] = dict.fromkeys((*_SIDES, "ratio", "ratio_of_minima"))
  for side in _SIDES:
    if (name, side) in taken:
      first, *seconds = taken[name, side]
      row[side] = {
        "first": first,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "minimum": min(seconds),
      }
  ours, theirs = (row[side] for side in _SIDES)
  if theirs is not None:
    row["ratio"] = theirs["median"] / ours["median"]
    row["ratio_of_minima"] = theirs["minimum"] / ours["minimum"]
  return row


def table(tasks: list[benchmark_tasks.Task], timings: dict[str, Any]) -> str:
  """Formats the timings as text, in seconds."""
  width = max(len(task.title) for task in tasks) + 2
  groups = f"{'psg_jax, seconds':>27}{'PyTorch':>18}{'PyTorch/psg_jax':>18}"
  names = ("first", "median", "min", "median", "min", "median", "min")
  lines = [
    " " * width + groups,
    " " * width + "".join(f"{name:>9}" for name in names),
  ]
  for task in tasks:
    row = timings[task.name]
    ours, theirs = (row[side] for side in _SIDES)
    cells = [ours["first"], ours["median"], ours["minimum"]]
    if theirs is not None:
      cells += [theirs["median"], theirs["minimum"]]
      cells += [row["ratio"], row["ratio_of_minima"]]
    lines.append(
      f"{task.title:{width}}" + "".join(f"{cell:9.4g}" for cell in cells)
    )
  return "\n".join(lines)


def notes(
  setup: benchmark_tasks.Setup,
  timings: dict[str, Any],
  agreement: dict[str, float],
) -> str:
  """Says where the job's time goes, and whether both sides agree."""
  median = {name: row["psg_jax"]["median"] for name, row in timings.items()}
  passes = setup.options.num_passes
  job, search, update = median["job"], median["search"], median["update"]
  theirs = timings["job"]["pytorch"]
  again = job + (passes - 1) * search
  ratio = ""
  if theirs is not None:
    ratio = f", a ratio of {theirs['median'] / again:.2f}"
  lines = [
    f"psg_jax's job of {job:.3g} s: search {search:.3g}, {passes} passes"
    f" {passes * update:.3g}, the rest {job - search - passes * update:.2g}.",
    "It searches once, since the labels of a frozen model cannot change; a"
    f" search a pass, as PyTorch does it, would make it {again:.3g} s{ratio}.",
  ]
  if len(setup.rows) < benchmark_tasks.num_steps(setup):
    lines.append(
      f"The training epoch is scaled from {len(setup.rows)} of its"
      f" {benchmark_tasks.num_steps(setup)} steps."
    )
  for name, share in agreement.items():
    verdict = "" if share >= _LEAST_AGREEMENT else ", which is less than 99 %"
    lines.append(f"The same {name} on both sides: {share:.2%}{verdict}.")
  return "\n".join(lines)


def _agreement(
  setup: benchmark_tasks.Setup, outputs: dict[tuple[str, str], Any]
) -> dict[str, float]:
  """Compares the labels, and the unlearned models on the forget images."""
  from experiments import torch_loop

  images = setup.split.forget.images
  ours = inference.predict(setup.model.apply, outputs["job", "psg_jax"], images)
  theirs = torch_loop.predict(
    outputs["job", "pytorch"], benchmark_tasks.to_inputs(setup, images)
  )
  labels = [outputs["search", side] for side in _SIDES]
  return {
    "labels of the search": float(np.mean(labels[0] == labels[1])),
    "predictions after unlearning": float(
      np.mean(ours.argmax(1) == theirs.argmax(1))
    ),
  }


def _num_cores() -> int:
  """Returns the cores that this process may use, as XLA counts them."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


if __name__ == "__main__":
  cli.run(main)
