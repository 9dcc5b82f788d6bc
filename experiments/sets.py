"""The data of a job: a prepared set, or the user's own folder or zip."""

import hashlib
import json
import os
import pathlib
import re
from typing import Any

from data_prep import base
from experiments import recipes
from psg_jax import checks, data, streaming, types


def load(job: recipes.Job) -> tuple[types.Dataset, types.Dataset]:
  """Loads the training and the test images of a job.

  A folder or zip is prepared on first use, into the folder of all prepared
  sets, under a name made of its own and of the options.

  Args:
    job: The options.

  Returns:
    Training and test set, in memory or streamed.

  Raises:
    ValueError: If the set is unknown, missing, not prepared or damaged.
  """
  check(job)
  name = _prepare(job) if is_path(job.dataset) else job.dataset
  read = streaming.load if job.streaming else data.load
  train, test = (
    read(name, split, data_dir=job.data_dir) for split in data.SPLITS
  )
  return train, test


def check(job: recipes.Job) -> None:
  """Raises ValueError unless the job names a set, or a folder or zip."""
  if is_path(job.dataset):
    if not pathlib.Path(job.dataset).expanduser().exists():
      raise ValueError(
        "dataset must be a prepared set or an existing folder or zip, got"
        f" {job.dataset}"
      )
    return
  if job.metadata is not None:
    raise ValueError(
      "metadata must be given with a folder or zip as dataset alone, got"
      f" {job.metadata} with {job.dataset}"
    )
  # The size is read where the set is looked up.
  name = job.dataset.partition("@")[0]
  checks.one_of("dataset", name, data.names(data.root_dir(job.data_dir)))


def is_path(dataset: str) -> bool:
  """Whether a data set is named by its path rather than by its name."""
  return os.sep in dataset or dataset.endswith(".zip") or dataset in (".", "..")


def _prepare(job: recipes.Job) -> str:
  """Prepares a folder or zip; returns the name of the set."""
  source = pathlib.Path(job.dataset).expanduser().resolve()
  options: dict[str, Any] = {"size": job.image_size, "group": job.group}
  if job.metadata is not None:
    options["metadata"] = str(pathlib.Path(job.metadata).resolve())
  # What was made of other content or with other options has another name.
  stated = [str(source), source.stat().st_mtime_ns, options]
  digest = hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:10]
  stem = re.sub(r"[^a-z0-9]+", "_", source.stem.lower()).strip("_")
  name = f"own_{stem}_{digest}"
  base.prepare(
    "image_folder",
    data_dir=job.data_dir,
    source=source,
    set_name=name,
    is_shown=True,
    **options,
  )
  return name
