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
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

import psg_jax
from experiments import cells, cli, compilation, files, run_folder
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
  """Time for all, such as 2h or 90m: the shortest that fit are run."""
  runs_dir: str = "runs"
  """Folder of the run folders."""
  data_dir: str | None = None
  """Folder of the prepared data sets."""
  pretrained: str | None = None
  """PyTorch state dict of a ResNet-50 that those of size full start from."""
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
    is_right, verdicts = True, []
    for number, name in enumerate(names, 1):
      try:
        findings = run_one(name, options, folder, f"[{number}/{len(names)}] ")
      except FloatingPointError as error:
        # The others go on.
        is_right = False
        print(f"{name}: {error}\n", flush=True)
        continue
      if options.check:
        is_asked = bool(catalogue.EXPERIMENTS[name].checked)
        is_right &= all(x.is_as_expected for x in findings)
        is_right &= bool(findings) or not is_asked
        verdicts.append(verdict(name, findings, options.size))
  print("\n".join(verdicts))
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
  for name in catalogue.EXPERIMENTS if options.all else list(names):
    reason = _lacking(name, options)
    if reason is None and options.all:
      names = [*dict.fromkeys([*names, name])]
    elif reason is not None and name in options.names:
      raise ValueError(f"{name}: {reason}")
    elif reason is not None:
      print(f"{name} is left out: {reason}")
  if not names:
    raise ValueError("no experiment has its data: see what is left out")
  if options.budget is None:
    return names
  return _within(names, results.duration("budget", options.budget), options)


def _lacking(name: str, options: Options) -> str | None:
  """Says what an experiment cannot be run without; None where all is there."""
  experiment = catalogue.EXPERIMENTS[name]
  jobs = [cell.job for cell in experiment.cells(options.size)]
  if options.pretrained is None and any(x.model == "resnet50" for x in jobs):
    return (
      "pretrained must name torchvision's weights of a ResNet-50, trained on"
      " ImageNet, which the paper starts from"
    )
  before = results.read(name, options.size) if options.check else None
  digests = [_digest(cell) for cell in experiment.cells(options.size)]
  if before is not None and before["cells"] != digests:
    return (
      f"size {options.size} was measured with other options, of another"
      " version: --record keeps what they give now"
    )
  return catalogue.missing_data(
    experiment, options.size, data_dir=options.data_dir
  )


def _within(names: Sequence[str], budget: float, options: Options) -> list[str]:
  """Returns those that fit, the shortest first; says which are left out."""
  taken: list[str] = []
  left, needed = budget, dict[str, float]()
  for name in names:
    expected = results.read(name, options.size)
    if expected is None:
      print(f"{name} is left out: how long it takes was never measured")
      continue
    needed[name] = float(expected["seconds"])
  for name in sorted(needed, key=lambda x: needed[x]):
    if needed[name] <= left:
      taken.append(name)
      left -= needed[name]
    else:
      print(
        f"{name} is left out: it takes about {tables.seconds(needed[name])},"
        f" and {tables.seconds(left)} of the budget are left"
      )
  if not needed:
    raise ValueError(
      "budget must not be given where nothing was measured, got"
      f" {options.budget} at size {options.size}"
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
  path, aside = folder / "run.json", folder.with_name(f".{folder.name}.old")
  # What a program that was killed left.
  shutil.rmtree(aside, ignore_errors=True)
  if options.overwrite and folder.exists():
    if not path.is_file():
      raise ValueError(
        f"runs_dir must hold a run to overwrite, got {folder}: no run.json"
      )
    folder.rename(aside)
    shutil.rmtree(aside)
  before = run_folder.read_json(path)
  for name in ("size", "psg_jax"):
    if before and before.get(name) != record[name]:
      raise ValueError(
        f"runs_dir must be of {name} {record[name]}, got {folder} of"
        f" {before.get(name)}: choose another, or --overwrite"
      )
  kept = folder.glob("[!.]*") if folder.exists() else ()
  if not before and any(kept):
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
  _check_data(todo, folder, options)
  print(f"{progress}{name}: {experiment.title}, {len(todo)} cells", flush=True)
  begin, records, seconds = time.perf_counter(), [], 0.0
  origins: list[Mapping[str, Any]] = []
  most_bytes = 0
  for number, cell in enumerate(todo, 1):
    kept = run_cell(cell, folder, options)
    seconds += kept["seconds"]
    origins.append(kept["origin"])
    most_bytes = max(most_bytes, kept["bytes"])
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
  findings = (
    results.compare(experiment, options.size, obtained, expected["rows"])
    if expected is not None
    else []
  )
  content = {
    "name": name,
    "size": options.size,
    # Of the cell that was computed last; cells may be of several.
    "origin": max(origins, key=lambda x: x["date"]),
    "commits": sorted({str(x["git_commit"]) for x in origins}),
    "seconds": round(seconds, 1),
    "bytes": most_bytes,
    "cells": [_digest(cell) for cell in todo],
    "rows": results.as_json(obtained),
  }
  if options.record:
    if content["commits"] == ["None"]:
      raise ValueError(
        f"record must be of figures of a commit, got {name} of none: run from"
        " a checkout"
      )
    path = results.path(name, options.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(path, content)
  place = folder / name
  place.mkdir(exist_ok=True)
  run_folder.write_json(place / "results.json", {**content, "records": records})
  page = experiment_page.build(
    place, name, options.size, content, records, obtained, expected, findings
  )
  print(experiment_page.text_table(experiment, obtained))
  print(f"{page}\n", flush=True)
  return findings


def _check_data(
  cells: Sequence[catalogue.Cell], folder: pathlib.Path, options: Options
) -> None:
  """Raises ValueError where images are not those of the cells that are kept."""
  path = folder / "data.json"
  known = run_folder.read_json(path)
  for job in {x.job.dataset: x.job for x in cells}.values():
    digest = bench.data_digest(
      dataclasses.replace(job, data_dir=options.data_dir)
    )
    if known.setdefault(job.dataset, digest) != digest:
      raise ValueError(
        f"runs_dir must be of the images of {job.dataset} that are there, got"
        f" {folder} of others: they were prepared anew since; choose another,"
        " or --overwrite"
      )
  run_folder.write_json(path, known)


def _digest(cell: catalogue.Cell) -> str:
  return file_tools.digest(_what(cell), sort_keys=True, default=list)[:20]


def _what(cell: catalogue.Cell) -> dict[str, Any]:
  """Returns all that a cell's figures depend on, but images and versions."""
  options = run_folder.job_options(cell.job)
  return {
    "job": {k: v for k, v in options.items() if k not in _LEFT_OUT},
    "measure": cell.measure.__name__,
    "options": dict(cell.options),
  }


def run_cell(
  cell: catalogue.Cell, folder: pathlib.Path, options: Options
) -> dict[str, Any]:
  """Computes the figures of a cell, or finds them.

  Cells of the same job and measure are the same, whatever experiment they are
  of.

  Args:
    cell: The cell.
    folder: Of the size.
    options: The program's.

  Returns:
    `records`, of its measure; `seconds`, with those of the models that it had
    to train; `bytes`, most memory of the process until then; and `origin`.
  """
  path = folder / "cells" / f"{_digest(cell)}.json"
  if path.is_file():
    return run_folder.read_json(path)
  compilation.make_room()
  job = dataclasses.replace(cell.job, data_dir=options.data_dir)
  if job.model == "resnet50":
    job = dataclasses.replace(job, pretrained=options.pretrained)
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
    **_what(cell),
    "records": records,
    "seconds": round(time.perf_counter() - start, 2),
    "bytes": _most_bytes(),
    "origin": origin(),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(path, kept)
  return kept


def _most_bytes() -> int:
  """Returns the most memory that this process has had; 0 where none says."""
  try:
    import resource
  except ImportError:  # Not on Windows.
    return 0
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _words(row: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in row.items()) or "all"


def origin() -> dict[str, Any]:
  """Says where and when figures were measured."""
  return {
    "date": time.strftime("%Y-%m-%d %H:%M"),
    "git_commit": run_folder.git_commit(),
    "command": " ".join([_PROGRAM, *sys.argv[1:]]),
    **_machine(),
  }


def _machine() -> dict[str, Any]:
  return {"device": run_folder.device(), "versions": run_folder.versions()}


def verdict(name: str, findings: Sequence[results.Finding], size: str) -> str:
  """Says whether an experiment is as expected, with what is not in a table."""
  if not catalogue.EXPERIMENTS[name].checked:
    return f"{name}: nothing is checked, times are the machine's"
  if not findings:
    return (
      f"{name}: nothing is expected at size {size}: --record keeps what was"
      " obtained"
    )
  wrong = [x for x in findings if not x.is_as_expected]
  if not wrong:
    return f"{name}: all {len(findings)} figures as expected"
  lines = [("row", "figure", "obtained", "expected", "tolerance", "")]
  for x in wrong:
    lines.append(
      (
        _words(x.key),
        x.figure,
        tables.decimals(x.obtained),
        tables.decimals(x.expected),
        tables.decimals(x.tolerance),
        "" if x.numbers[0] == x.numbers[1] else f"{x.numbers[0]} values",
      )
    )
  table = tables.aligned(lines)
  count = f"{len(wrong)} of {len(findings)}"
  return f"{name}: {count} figures are not as expected\n{table}"


def listing(size: str) -> str:
  """Returns all experiments with their source, cells, time and figures."""
  lines = [("name", "what", "cells", "time", "memory", "expected")]
  for name, experiment in catalogue.EXPERIMENTS.items():
    expected = results.read(name, size)
    memory, when, took = "–", "not measured", "–"
    if expected is not None:
      if expected["bytes"]:
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
