"""The run folder: its records, and whether it may be gone on with."""

import dataclasses
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

import jax
import numpy as np

import psg_jax
from experiments import (
  contexts,
  files,
  recipes,
)
from psg_jax import (
  checkpoints,
  forget,
  types,
)

# What is to be forgotten: another request can be made of the same original.
REQUEST_FIELDS = (
  "forget_classes",
  "where",
  "ids",
  "fraction",
  "request_seed",
  "group",
  "request",
  "twins",
  "by",
)
RETAINED = "retained images"
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "tensorflow-datasets",
  "numpy",
)


def run_dir(job: recipes.Job) -> pathlib.Path:
  """Returns the job's run folder."""
  return pathlib.Path(job.runs_dir) / (job.name or job.recipe)


def job_options(job: recipes.Job) -> dict[str, Any]:
  """Returns the options of a job, less what a program adds to them."""
  options = dataclasses.asdict(job)
  fields = [field.name for field in dataclasses.fields(recipes.Job)]
  return {name: options[name] for name in fields}


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file at once or not at all."""
  files.write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """As `files.read_json`; an empty dictionary where there is none."""
  return files.read_json(path) if path.exists() else {}


def _stored_job(folder: pathlib.Path) -> dict[str, Any] | None:
  """The options of a run; one of an earlier version lacks the later ones."""
  before = read_json(folder / "config.json").get("job")
  if before is None:
    return None
  defaults = json.loads(json.dumps(job_options(recipes.Job())))
  # Until there were schedules, rates were constant.
  options = recipes.upgraded(before.get("unlearning", {}))
  before = {**before, "unlearning": options}
  nested = {
    name: {**defaults[name], "schedule": "constant", **before.get(name, {})}
    for name in ("training", "unlearning")
  }
  return {**defaults, **before, **nested}


def has_same_request(
  run: pathlib.Path, job: recipes.Job, split: types.Split | None = None
) -> bool:
  """Whether a run forgets what this job asks for, and these very images."""
  before = _stored_job(run) or {}
  now = json.loads(json.dumps(job_options(job)))
  digest = read_json(run / "data.json").get("forget_ids_sha256")
  return all(before.get(name) == now[name] for name in REQUEST_FIELDS) and (
    split is None
    or digest in (None, forget.ids_hash(np.asarray(split.forget.ids)))
  )


def copy_run(
  source: pathlib.Path, folder: pathlib.Path, *, is_same_request: bool
) -> None:
  """Copies the trained models of a run, wholly or not at all.

  The retrained model belongs to its request, the original to any.
  """
  # All retrained models, too: a name begins with its kind.
  left_out = ("unlearned",) if is_same_request else ("unlearned", "retrained")
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  for name, path in checkpoints.run_checkpoints(source).items():
    if not name.startswith(left_out):
      shutil.copytree(path, partial / "checkpoints" / name)
  history = read_json(source / "history.json")
  write_json(
    partial / "history.json",
    {
      name: value
      for name, value in history.items()
      if not name.startswith(left_out)
    },
  )
  partial.rename(folder)


def set_aside(folder: pathlib.Path) -> None:
  """Moves a run away, and nothing that does not look like one."""
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"name must be that of a run to overwrite, got {folder}: no config.json"
    )
  folder.rename(_replaced(folder))


def _replaced(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f".{folder.name}.replaced")


def settle() -> None:
  """Decides between the runs this process holds and those they overwrite.

  The one of before goes as soon as the new one has a model, and comes back
  where the new one ended, in this process or an earlier one, without.
  """
  for hold in files.held.values():
    folder, before = hold.path, _replaced(hold.path)
    if not before.exists():
      continue
    if checkpoints.has_any(folder):
      shutil.rmtree(before, ignore_errors=True)
      continue
    shutil.rmtree(folder, ignore_errors=True)
    before.rename(folder)
    hold.hint = f"{folder} is what it was before --overwrite"


def check_same_job(
  folder: pathlib.Path, job: recipes.Job, may_change: tuple[str, ...]
) -> None:
  """Options that made what is in the folder must be the same as now."""
  before = _stored_job(folder)
  if before is None:
    raise ValueError(
      f"name must be that of a run, got {folder}: no config.json"
    )
  now = json.loads(json.dumps(job_options(job)))
  free = {
    "resume",
    "overwrite",
    "runs_dir",
    "name",
    "num_devices",
    "data_dir",
    # More of them are trained, and fewer are used.
    "references",
    # As much as fits the memory, for the same result.
    "eval_batch_size",
    *may_change,
  }
  for options in (before, now):
    options["unlearning"] = {
      k: v for k, v in options["unlearning"].items() if k != "search_batch_size"
    }
  changed = sorted(
    name for name in now if name not in free and before.get(name) != now[name]
  )
  if changed:
    name = changed[0]
    raise ValueError(
      f"{name} must be as in the run that is resumed,"
      f" {before.get(name)}, got {now[name]}"
    )


def is_earlier(folder: pathlib.Path | None) -> bool:
  """Whether a run has references that standardise as the original does."""
  config = {} if folder is None else read_json(folder / "config.json")
  return bool(config) and config.get("references_standardise_by") != RETAINED


def check_same_data(
  folder: pathlib.Path, record: dict[str, Any], may_change: tuple[str, ...]
) -> None:
  """What options mean must be the same as well: files can be edited."""
  before = read_json(folder / "data.json")

  def is_other(name: str) -> bool:
    return before.get(name) not in (None, record[name])

  if is_other("images_sha256"):
    raise ValueError(
      f"dataset must hold the images of the run {folder}, got others, or other"
      " labels: it was prepared anew since; choose another name"
    )
  if "ids" not in may_change and is_other("forget_ids_sha256"):
    request = record["request"]
    given = [name for name in ("classes", "where") if request[name]]
    raise ValueError(
      f"{'ids or request' if request['num_ids'] else ' and '.join(given)} must"
      f" mean the {before['counts']['train_forget']} images to forget of the"
      f" run {folder}, got {record['counts']['train_forget']}, not the same:"
      " what it reads was edited since; choose another name"
    )


def config(context: contexts.Context) -> dict[str, Any]:
  """Returns what `config.json` says of a run: options, versions, device."""
  is_own = context.retrained_model is not None
  return {
    "job": job_options(context.job),
    "references_standardise_by": RETAINED if is_own else "training images",
    "versions": versions(),
    "device": device(),
    "git_commit": git_commit(),
    "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    "command": " ".join(["python", "-m", *_module_arguments()]),
  }


def versions() -> dict[str, str]:
  """Returns the versions of Python, this library and what it stands on."""
  return {
    "python": platform.python_version(),
    "psg_jax": psg_jax.__version__,
    **{name: metadata.version(name) for name in _PACKAGES},
  }


def device() -> str:
  """Says how many devices of which kind there are."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _module_arguments() -> list[str]:
  program = pathlib.Path(sys.argv[0])
  return [f"{program.parent.name}.{program.stem}", *sys.argv[1:]]


def git_commit() -> str | None:
  """The commit of this program's own checkout; None where it is no checkout.

  It may be installed inside somebody else's.
  """
  file = pathlib.Path(__file__).resolve()
  ours = [name for name in os.environ if not name.startswith("GIT_")]

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", *arguments],
      cwd=file.parent,
      env={name: os.environ[name] for name in ours},
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", file.name)
    root = pathlib.Path(git("rev-parse", "--show-toplevel"))
    is_own = root.resolve() == file.parents[1]
    return git("rev-parse", "HEAD") if is_own else None
  except (OSError, subprocess.SubprocessError):
    return None
