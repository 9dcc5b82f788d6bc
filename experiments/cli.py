"""What the programs share: reading options, and ending when they are wrong."""

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from experiments import compilation, recipes, sets

_CRITERIA = ("forget_classes", "where", "ids", "request")
_JobT = TypeVar("_JobT", bound=recipes.Job)
_OptionsT = TypeVar("_OptionsT")


def run(main: Callable[[], None]) -> None:
  """Runs a program; what the user can mend is one line, not a traceback.

  Args:
    main: The program, which parses its own options.

  Raises:
    SystemExit: With 2 where the input is wrong, with 1 where training or
      unlearning diverged, with 130 on Ctrl-C.
  """
  compilation.set_up()
  try:
    main()
  except ValueError as error:
    _leave(2, f"error: {error}")
  except OSError as error:
    _leave(2, f"error: {error}")
  except FloatingPointError as error:
    _leave(1, f"error: {error}")
  except KeyboardInterrupt:
    _leave(130, "interrupted")


def _leave(status: int, message: str) -> None:
  print(" ".join(message.split()), file=sys.stderr)
  raise SystemExit(status)


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
  for name in _CRITERIA:
    first.add_argument(f"--{name}", nargs="*")
  first.add_argument("--fraction")
  given, _ = first.parse_known_args(_underscored(sys.argv[1:]))
  extends = {field.name for field in dataclasses.fields(options)}
  recipe = given.recipe or options().recipe
  if given.recipe is None and given.data and sets.is_path(given.data):
    recipe = "own"
  job = recipes.find(recipe)
  if given.run is not None and "run" in extends:
    job = read_job(pathlib.Path(given.run))
  if given.method is not None and "method" in extends:
    job = dataclasses.replace(job, unlearning=recipes.method(given.method))
  # What a program declares anew has a default of its own.
  own = set() if options is recipes.Job else set(options.__annotations__)
  values = {
    field.name: getattr(job, field.name)
    for field in dataclasses.fields(job)
    if field.name not in own
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
  found = []
  for argument in arguments:
    name, is_given, value = argument.partition("=")
    if re.fullmatch(r"--[\w.-]+", name):
      name = f"--{name[2:].replace('-', '_')}"
    found.append(f"{name}{is_given}{value}")
  return found


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
        options, description=description, use_underscores=True, **defaults
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
    stored = json.loads(path.read_text())["job"]
    return _job(stored, run_dir)
  except (KeyError, TypeError, json.JSONDecodeError) as error:
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
    "unlearning": recipes.Unlearning(**stored["unlearning"]),
    "runs_dir": str(run_dir.parent),
    "name": run_dir.name,
    "resume": False,
    "overwrite": False,
  }
  return recipes.Job(**stored)
