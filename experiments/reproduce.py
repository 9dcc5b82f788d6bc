"""Rerun the paper's experiments, and compare with what is expected.

    python -m experiments.reproduce --list
    python -m experiments.reproduce fashion_mnist_classes
    python -m experiments.reproduce fashion_mnist_classes --check
    python -m experiments.reproduce --all --check --budget 2h

Each experiment is a data set, a model, a request and a method with all their
options and seeds, at a size: `smoke` for tests, `cpu` for two cores, `full` as
in the paper. What is finished is kept, and shared by experiments: the same
command goes on where it was stopped. `--check` exits with 1, and a table, where
a figure is not within the tolerance of what is expected.

    runs/reproduce/<size>/run.json          version, device, size
    runs/reproduce/<size>/models/           original and retrained models
    runs/reproduce/<size>/cells/            the figures of each cell
    runs/reproduce/<size>/<name>/           experiment.html, results.json,
                                            results.csv, figures/ and tables/
"""

import dataclasses
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

import psg_jax
from experiments import cells, cli, files, run_folder
from experiments.pages import experiment as experiment_page
from experiments.pages import tables
from experiments.reproduction import bench, catalogue, estimates, results
from psg_jax import checks
from psg_jax import files as file_tools

_PROGRAM = "python -m experiments.reproduce"
_LEFT_OUT = ("name", "runs_dir", "resume", "overwrite", "data_dir", "by")


@dataclasses.dataclass(frozen=True)
class Options:
  """What to run, and how large."""

  names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
  """Experiments; --list shows them."""
  list: bool = False
  """Show all experiments with their sources, times and figures; run none."""
  all: bool = False
  """Run all experiments whose data is there."""
  check: bool = False
  """Compare with what is expected; exit with 1 where it differs."""
  record: bool = False
  """Keep what was obtained as what is expected from now on."""
  size: Literal["smoke", "cpu", "full"] = "cpu"
  """smoke: seconds, embedded sets; cpu: minutes on two cores; full: as in the
  paper, for GPUs."""
  budget: str | None = None
  """Time for all, such as 2h or 90m: what will not fit is left out."""
  runs_dir: str = "runs"
  """Folder of the run folders."""
  data_dir: str | None = None
  """Folder of the prepared data sets."""
  overwrite: bool = False
  """Throw away what is finished at this size, and begin anew."""


def main() -> None:
  """Runs experiments; exits with 1 where a checked one is not as expected."""
  options = cli.parse(Options, description="Rerun the paper's experiments.")
  if not run(options):
    raise SystemExit(1)


def run(options: Options) -> bool:
  """Runs what the options name; returns whether all is as expected.

  Raises:
    ValueError: If an option is wrong or the data of a named experiment is
      missing; nothing is written then.
  """
  if options.list:
    print(listing(options.size))
    return True
  names = chosen(options)
  folder = pathlib.Path(options.runs_dir) / "reproduce" / options.size
  with files.lock(folder, argument="runs_dir", hint="the same command goes on"):
    _open_folder(folder, options)
    findings = {
      name: run_one(name, options, folder, f"[{number}/{len(names)}] ")
      for number, name in enumerate(names, 1)
    }
  is_right = True
  if options.check:
    for name, found in findings.items():
      wrong = [x for x in found if not x.is_as_expected]
      is_right = is_right and not wrong
      print(verdict(name, found, options.size))
  return is_right


def chosen(options: Options) -> list[str]:
  """Returns the experiments to run.

  Raises:
    ValueError: If one is unknown, none is named, or the budget takes none.
  """
  for name in options.names:
    checks.one_of("name", name, catalogue.EXPERIMENTS)
  if not options.names and not options.all:
    raise ValueError("names must be given, or --all, got none: see --list")
  names = list(dict.fromkeys(options.names))
  if options.all:
    names = []
    for name, experiment in catalogue.EXPERIMENTS.items():
      reason = catalogue.missing_data(
        experiment, options.size, data_dir=options.data_dir
      )
      if reason is None:
        names.append(name)
      else:
        print(f"{name} is left out: {reason}")
  else:
    for name in names:
      reason = catalogue.missing_data(
        catalogue.EXPERIMENTS[name], options.size, data_dir=options.data_dir
      )
      if reason is not None:
        raise ValueError(f"{name}: {reason}")
  if options.budget is None:
    return names
  return _within(names, results.duration("budget", options.budget), options)


def _within(names: Sequence[str], budget: float, options: Options) -> list[str]:
  """Returns those that fit, in their order; says which are left out."""
  taken: list[str] = []
  left, needed = budget, {}
  for name in names:
    expected = results.read(name, options.size)
    needed[name] = 0.0 if expected is None else float(expected["seconds"])
    if needed[name] <= left:
      taken.append(name)
      left -= needed[name]
    else:
      print(
        f"{name} is left out: it takes about {tables.seconds(needed[name])},"
        f" and {tables.seconds(left)} of the budget are left"
      )
  if not taken:
    shortest = min(needed.values())
    raise ValueError(
      f"budget must be at least {tables.seconds(shortest)}, the shortest of"
      f" {checks.few(names)}, got {options.budget}"
    )
  return taken


def _open_folder(folder: pathlib.Path, options: Options) -> None:
  """Makes the folder of a size, unless it is another version's."""
  record = {
    "size": options.size,
    "psg_jax": psg_jax.__version__,
    **_machine(),
  }
  path = folder / "run.json"
  if options.overwrite and folder.exists():
    if not path.is_file():
      raise ValueError(
        f"runs_dir must hold a run to overwrite, got {folder}: no run.json"
      )
    shutil.rmtree(folder)
  before = run_folder.read_json(path)
  for name in ("size", "psg_jax"):
    if before and before.get(name) != record[name]:
      raise ValueError(
        f"runs_dir must be of {name} {record[name]}, got {folder} of"
        f" {before.get(name)}: choose another, or --overwrite"
      )
  if folder.exists() and not before and any(folder.iterdir()):
    raise ValueError(
      f"runs_dir must hold a run of this program, got {folder}: no run.json"
    )
  folder.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(path, {**before, **record})


def run_one(
  name: str, options: Options, folder: pathlib.Path, progress: str = ""
) -> list[results.Finding]:
  """Runs an experiment, and writes its tables and its page.

  Args:
    name: One of `catalogue.EXPERIMENTS`.
    options: The program's.
    folder: Of the size.
    progress: Before each line that is printed.

  Returns:
    What was compared with what is expected; nothing where nothing is.

  Raises:
    FloatingPointError: If the training of an original or retrained model
      diverges.
  """
  experiment = catalogue.EXPERIMENTS[name]
  todo = list(experiment.cells(options.size))
  print(f"{progress}{name}: {experiment.title}, {len(todo)} cells", flush=True)
  begin, records, seconds = time.perf_counter(), [], 0.0
  for number, cell in enumerate(todo, 1):
    kept = run_cell(cell, folder, data_dir=options.data_dir)
    seconds += kept["seconds"]
    records += [{**record, **cell.row} for record in kept["records"]]
    taken = time.perf_counter() - begin
    if taken > 1:
      print(
        f"{progress}{name} {number}/{len(todo)}: {_words(cell.row)}, about"
        f" {tables.seconds(taken / number * (len(todo) - number))} left",
        flush=True,
      )
  obtained = results.rows(experiment, records)
  expected = results.read(name, options.size)
  found = (
    results.compare(experiment, options.size, obtained, expected["rows"])
    if expected is not None
    else []
  )
  content = {
    "name": name,
    "size": options.size,
    "origin": origin(),
    "seconds": round(seconds, 1),
    "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "rows": results.as_json(obtained),
  }
  if options.record:
    path = results.path(name, options.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(path, content)
  place = folder / name
  place.mkdir(exist_ok=True)
  run_folder.write_json(place / "results.json", {**content, "records": records})
  page = experiment_page.build(
    place, name, options.size, content, records, obtained, expected, found
  )
  print(experiment_page.text_table(experiment, obtained))
  print(f"{page}\n", flush=True)
  return found


def run_cell(
  cell: catalogue.Cell, folder: pathlib.Path, *, data_dir: str | None = None
) -> dict[str, Any]:
  """Computes the figures of a cell, or finds them.

  Cells of the same job and measure are the same, whatever experiment they are
  of.

  Args:
    cell: The cell.
    folder: Of the size.
    data_dir: Folder of the prepared data sets.

  Returns:
    `records`, of its measure, and `seconds`, with those of the models that it
    had to train.
  """
  options = {
    k: v
    for k, v in run_folder.job_options(cell.job).items()
    if k not in _LEFT_OUT
  }
  what = {
    "job": options,
    "measure": cell.measure.__name__,
    "options": dict(cell.options),
  }
  digest = file_tools.digest(what, sort_keys=True, default=list)[:20]
  path = folder / "cells" / f"{digest}.json"
  if path.is_file():
    return run_folder.read_json(path)
  job = dataclasses.replace(cell.job, data_dir=data_dir)
  start = time.perf_counter()
  try:
    made = bench.open_bench(job, folder / "models")
    records = cell.measure(made, **cell.options)
  except FloatingPointError as error:
    # A method that diverges has no figures; what it is measured by must not.
    if (
      "models" not in cell.options or "unlearned" not in cell.options["models"]
    ):
      raise
    records = [{"model": "unlearned", **cells.divergence(error)}]
  kept = {
    **what,
    "records": records,
    "seconds": round(time.perf_counter() - start, 2),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(path, kept)
  return kept


def _words(row: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in row.items()) or "all"


def origin() -> dict[str, Any]:
  """Says where and when figures were measured."""
  return {
    "date": time.strftime("%Y-%m-%d"),
    "git_commit": run_folder.git_commit(),
    "command": " ".join([_PROGRAM, *sys.argv[1:]]),
    **_machine(),
  }


def _machine() -> dict[str, Any]:
  return {"device": run_folder.device(), "versions": run_folder.versions()}


def verdict(name: str, found: Sequence[results.Finding], size: str) -> str:
  """Says whether an experiment is as expected, with what is not in a table."""
  if not found:
    return (
      f"{name}: nothing is expected at size {size}: --record keeps what was"
      " obtained"
    )
  wrong = [x for x in found if not x.is_as_expected]
  if not wrong:
    return f"{name}: all {len(found)} figures as expected"
  lines = [("row", "figure", "obtained", "expected", "tolerance", "")]
  for x in wrong:
    lines.append(
      (
        _words(x.key),
        x.figure,
        tables.decimals(x.obtained),
        tables.decimals(x.expected),
        tables.decimals(x.tolerance),
        "",
      )
    )
  table = tables.aligned(lines)
  return (
    f"{name}: {len(wrong)} of {len(found)} figures are not as expected\n{table}"
  )


def listing(size: str) -> str:
  """Returns all experiments with their source, cells, time and figures."""
  lines = [("name", "what", "cells", "time", "memory", "expected")]
  for name, experiment in catalogue.EXPERIMENTS.items():
    expected = results.read(name, size)
    memory, when, took = "–", "not measured", "–"
    if expected is not None:
      memory = f"{expected['bytes'] / 2**30:.1f} GiB"
      took = tables.seconds(expected["seconds"])
      when = f"measured {expected['origin']['date']}"
    elif size == "full":
      largest = max(
        estimates.training_bytes(job)
        for job in {cell.job for cell in experiment.cells(size)}
      )
      memory = f"~{largest / 2**30:.1f} GiB"
    if experiment.published:
      when += ", published"
    lines.append(
      (
        name,
        experiment.title,
        str(catalogue.num_cells(experiment, size)),
        took,
        memory,
        when,
      )
    )
  return tables.aligned(lines)


if __name__ == "__main__":
  cli.run(main)
