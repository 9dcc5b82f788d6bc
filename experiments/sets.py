"""The data of a job: a prepared set, or the user's own folder or zip."""

import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from data_prep import base, image_folder, naming
from experiments import recipes
from psg_jax import checks, data, forget, streaming, twins, types


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
  if job.weights is not None and naming.parse(name).is_own:
    return _seen_and_unseen(job, train, test)
  return train, test


def _seen_and_unseen(
  job: recipes.Job, train: types.Dataset, test: types.Dataset
) -> tuple[types.Dataset, types.Dataset]:
  """Parts the user's images by what the user's model was trained on.

  A part that was set aside when the images were prepared is not one that the
  model has not seen: only the user's own folders, or a condition, say that.

  Raises:
    ValueError: As `forget.matching`, or if there is no image that was seen.
  """
  folders = {
    str(each).partition("/")[0].lower() for each in np.asarray(test.ids)
  }
  has_folders = folders <= image_folder.SPLIT_NAMES.keys()
  if job.unseen is None and has_folders:
    return train, test
  whole = twins.concatenate(train, test)
  is_unseen = np.zeros(len(whole), bool)
  if job.unseen is not None:
    request = forget.Request(where=job.unseen)
    try:
      is_unseen = forget.matching(whole, request)
    except ValueError as error:
      raise ValueError(f"unseen: {error}") from None
    if is_unseen.all() or not is_unseen.any():
      raise ValueError(
        f"unseen must match some images and not all, got {job.unseen!r}, which"
        f" matches {is_unseen.sum()} of {len(whole)}"
      )
  return whole.take(~is_unseen), whole.take(is_unseen)


def check(job: recipes.Job) -> None:
  """Raises ValueError unless the job names a set, or a folder or zip."""
  if job.unseen is not None:
    is_own = is_path(job.dataset) or naming.parse(job.dataset).is_own
    if not (job.weights and is_own):
      raise ValueError(
        "unseen must be given with weights and with images of one's own alone,"
        f" got {job.unseen!r}"
      )
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
