"""What the programs share: reading options, and ending when they are wrong."""

import argparse
import contextlib
import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from experiments import compilation, files, recipes, sets
from psg_jax import programs

_CRITERIA = ("forget_classes", "where", "ids", "request")
_JobT = TypeVar("_JobT", bound=recipes.Job)
_OptionsT = TypeVar("_OptionsT")


def run(main: Callable[[], None]) -> None:
  """Runs a program; what the user can mend is one line, not a traceback.

  Args:
    main: The program, which parses its own options.

  Raises:
    SystemExit: As `programs.run`.
  """
  compilation.set_up()
  programs.run(main, memory_hint=_memory_hint, at_end=_let_go)


def _memory_hint() -> str:
  # Programs that hold nothing have no such options.
  return (
    "a larger --training.num_parts and --unlearning.num_parts, smaller"
    " --training.batch_size and --unlearning.batch_size, --rematerialise and"
    " --precision bfloat16 take less"
    if files.held
    else ""
  )


def _let_go(is_done: bool) -> list[str]:
  """Lets go of what the program works on; see `programs.run`."""
  held = list(files.held.values())
  files.at_end.close()
  if is_done:
    return [hold.note for hold in held if hold.note]
  return [hold.hint for hold in held if hold.path.exists()]


def parse_job(options: type[_JobT], description: str) -> _JobT:
  """Reads the options of a job, whose defaults are those of its recipe.

  `--recipe NAME` sets the defaults, `--run FOLDER` those of an earlier run,
  and `--method NAME` those of the unlearning; all others can then be set.

  Args:
    options: The job or a dataclass that extends it.
    description: What the program does, for `--help`.

  Returns:
    The options.

  Raises:
    ValueError: If a name is unknown or the run cannot be read.
  """
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  for name in ("recipe", "run", "method"):
    first.add_argument(f"--{name}")
  first.add_argument("--data", "--dataset")
  first.add_argument("--data_dir", "--data-dir")
  for name in _CRITERIA:
    first.add_argument(f"--{name}", nargs="*")
  first.add_argument("--fraction")
  given, _ = first.parse_known_args(_underscored(programs.arguments()))
  extends = {field.name for field in dataclasses.fields(options)}
  recipe = given.recipe or options().recipe
  if given.recipe is None and given.data:
    is_own = sets.is_path(given.data, given.data_dir)
    recipe = "own" if is_own else recipe
  job = recipes.find(recipe)
  if given.run is not None and "run" in extends:
    job = read_job(pathlib.Path(given.run))
  if given.method is not None and "method" in extends:
    job = dataclasses.replace(job, unlearning=recipes.method(given.method))
  # What a program declares anew has a default of its own.
  declared = set() if options is recipes.Job else set(options.__annotations__)
  values = {
    field.name: getattr(job, field.name)
    for field in dataclasses.fields(job)
    if field.name not in declared
  }
  is_part = given.fraction is not None and not _is_whole(given.fraction)
  if is_part or any(getattr(given, name) is not None for name in _CRITERIA):
    # A request of one's own takes the place of the recipe's.
    for name in (*_CRITERIA, "group", "fraction"):
      default = recipes.Job.__dataclass_fields__[name].default
      values[name] = () if name == "forget_classes" else default
  return parse(options, default=options(**values), description=description)


def _underscored(arguments: Sequence[str]) -> list[str]:
  """Writes names of options with underscores, which may have hyphens."""
  result = []
  for argument in arguments:
    name, is_given, value = argument.partition("=")
    if re.fullmatch(r"--[\w.-]+", name):
      name = f"--{name[2:].replace('-', '_')}"
    result.append(f"{name}{is_given}{value}")
  return result


def _is_whole(fraction: str) -> bool:
  """Whether all that matches is asked for, which is no request by itself."""
  try:
    return float(fraction) == 1
  except ValueError:
    return False


def parse(
  options: type[_OptionsT],
  *,
  default: _OptionsT | None = None,
  description: str,
) -> _OptionsT:
  """Reads options from the command line; what is wrong there is one line.

  Args:
    options: A dataclass.
    default: The values of what is not given.
    description: What the program does, for `--help`.

  Returns:
    The options.

  Raises:
    ValueError: If an option does not exist or its value cannot be read.
  """
  said = io.StringIO()
  defaults: dict[str, Any] = {} if default is None else {"default": default}
  try:
    with contextlib.redirect_stderr(said):
      given: _OptionsT = tyro.cli(
        options,
        prog=programs.command(),
        args=programs.arguments(),
        description=description,
        use_underscores=True,
        **defaults,
      )
      return given
  except SystemExit as stop:
    if not stop.code:
      raise
    # Tyro draws a box, of which this is what it says.
    plain = re.sub(r"[^\x20-\x7e]+|-{3,}", " ", said.getvalue())
    words = " ".join(plain.split())
    raise ValueError(words or "the options cannot be read") from None


def read_job(run_dir: pathlib.Path) -> recipes.Job:
  """Reads the job of a run folder.

  Args:
    run_dir: The folder.

  Returns:
    Its options, with this folder as theirs.

  Raises:
    ValueError: If there is no such run.
  """
  path = run_dir / "config.json"
  if not path.is_file():
    raise ValueError(f"run must be a run folder, got {run_dir}: no config.json")
  try:
    return _job(files.read_json(path)["job"], run_dir)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"run must be a run folder of this version, got {run_dir}: its"
      f" config.json cannot be read ({error})"
    ) from None


def _job(stored: dict[str, Any], run_dir: pathlib.Path) -> recipes.Job:
  for name, value in stored.items():
    if isinstance(value, list):
      stored[name] = tuple(value)
  stored |= {
    "training": recipes.Training(**stored["training"]),
    "unlearning": recipes.Unlearning(**recipes.upgraded(stored["unlearning"])),
    "runs_dir": str(run_dir.parent),
    "name": run_dir.name,
    "resume": False,
    "overwrite": False,
  }
  return recipes.Job(**stored)
