"""The data of a job: a prepared set, or the user's own folder or zip."""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data_prep import base, dicom, image_folder, sources
from experiments import recipes
from psg_jax import (
  catalog,
  checks,
  data,
  files,
  forget,
  streaming,
  twins,
  types,
)

# Of sets that were prepared otherwise, none is used.
_VERSION = 2
_OPTIONS = ("metadata", "encoding", "window", "skip_corrupt")
"""Options of a job for a folder or zip alone."""


class Loaded(NamedTuple):
  """The data of a job.

  Attributes:
    train: Training set, in memory or streamed.
    test: Test set, likewise.
    source: What became of every file that it was prepared from: `name`,
      `files`, how many were `read`, and those `left_out` by reason and ending;
      of a set whose files are not known one by one, `name` and `read` alone.
  """

  train: types.Dataset
  test: types.Dataset
  source: dict[str, Any]


def load(job: recipes.Job) -> Loaded:
  """Loads the training and the test images of a job.

  A folder or zip is prepared on first use, into the folder of all prepared
  sets, under a name made of its own, of the options and of what is in it.

  Args:
    job: The options.

  Returns:
    The images, and the account of their source.

  Raises:
    ValueError: If the set is unknown, missing, not prepared or damaged.
  """
  check(job)
  is_own = is_path(job.dataset, job.data_dir)
  name = _prepare(job) if is_own else job.dataset
  read = streaming.load if job.streaming else data.load
  train, test = (
    read(name, split, data_dir=job.data_dir) for split in catalog.SPLITS
  )
  builder = data.open_builder(name, catalog.SPLITS[0], data_dir=job.data_dir)
  stored = builder.info.metadata or {}
  if not is_own and catalog.parse(name).is_own:
    _say_stale(job, stored)
  source = {
    "name": str(stored.get("source") or job.dataset),
    **(stored.get("account") or {"read": len(train) + len(test)}),
  }
  if job.weights is not None and catalog.parse(name).is_own:
    train, test = _seen_and_unseen(job, train, test)
  return Loaded(train, test, source)


def _seen_and_unseen(
  job: recipes.Job, train: types.Dataset, test: types.Dataset
) -> tuple[types.Dataset, types.Dataset]:
  """Parts the user's images by what the user's model was trained on.

  A part that was set aside when the images were prepared is not one that the
  model has not seen: only the user's own folders, or a condition, say that.

  Raises:
    ValueError: As `forget.matching`, or if there is no image that was seen.
  """
  folders = {str(id_).partition("/")[0].lower() for id_ in np.asarray(test.ids)}
  has_folders = folders <= image_folder.SPLIT_NAMES.keys()
  if job.unseen is None and has_folders:
    return train, test
  whole = twins.concatenate(train, test)
  is_unseen = np.zeros(len(whole), bool)
  if job.unseen is not None:
    request = forget.Request(where=job.unseen)
    with files.faults("unseen:", ValueError):
      is_unseen = forget.matching(whole, request)
    if is_unseen.all() or not is_unseen.any():
      raise ValueError(
        f"unseen must match some images and not all, got {job.unseen!r}, which"
        f" matches {is_unseen.sum()} of {len(whole)}"
      )
  return whole.take(~is_unseen), whole.take(is_unseen)


def check(job: recipes.Job) -> None:
  """Raises ValueError unless the job names a set, or a folder or zip."""
  is_own = is_path(job.dataset, job.data_dir)
  if job.unseen is not None and not (
    job.weights and (is_own or catalog.parse(job.dataset).is_own)
  ):
    raise ValueError(
      "unseen must be given with weights and with images of one's own alone,"
      f" got {job.unseen!r}"
    )
  if is_own:
    if not files.expanded(job.dataset, "dataset").exists():
      raise ValueError(
        "dataset must be a prepared set or an existing folder or zip, got"
        f" {job.dataset}"
      )
    return
  for option in _OPTIONS:
    if getattr(job, option):
      raise ValueError(
        f"{option} must be given with a folder or zip as dataset alone, got"
        f" {getattr(job, option)} with {job.dataset}"
      )
  # The size is read where the set is looked up.
  name = job.dataset.partition("@")[0]
  checks.one_of("dataset", name, catalog.names(catalog.root_dir(job.data_dir)))
  if pathlib.Path(job.dataset).exists():
    say(
      f"{job.dataset} is taken for the prepared set; ./{job.dataset} is the"
      " folder or file of that name"
    )


def say(message: str) -> None:
  """Tells the user, beside the results of a program."""
  print(message, file=sys.stderr, flush=True)


def is_path(
  dataset: str, data_dir: str | os.PathLike[str] | None = None
) -> bool:
  """Whether a data set is named by its path rather than by its name.

  Args:
    dataset: The data set. One without a slash is a path if it exists and no
      set has that name.
    data_dir: Folder of all prepared sets.
  """
  if os.sep in dataset or dataset in (".", "..", "~"):
    return True
  if dataset.lower().endswith(".zip"):
    return True
  if dataset.partition("@")[0] in catalog.BUILDERS or not dataset:
    return False
  return pathlib.Path(dataset).exists() and dataset not in catalog.names(
    catalog.root_dir(data_dir)
  )


def _prepare(job: recipes.Job) -> str:
  """Prepares a folder or zip; returns the name of the set."""
  source = files.expanded(job.dataset, "dataset").resolve()
  metadata = None
  if job.metadata is not None:
    metadata = str(files.expanded(job.metadata, "metadata").resolve())
  options: dict[str, Any] = {
    "size": job.image_size,
    "group": job.group,
    "metadata": metadata,
    "encoding": job.encoding,
    "window": job.window,
    "is_skipping_corrupt": job.skip_corrupt,
  }
  # What was made of other content or with other options has another name.
  content = sources.fingerprint(source, metadata)
  identity = [_VERSION, str(source), options, content, dicom.is_available()]
  digest = files.digest(identity)[:10]
  stem = re.sub(r"[^a-z0-9]+", "_", source.stem.lower()).strip("_")
  prefix = f"own_{stem}_"
  if not catalog.set_dir(prefix + digest, job.data_dir).exists():
    _say_changed(source, prefix, content, job.data_dir)
  prepared = base.prepare(
    "image_folder",
    data_dir=job.data_dir,
    source=source,
    set_name=prefix + digest,
    is_shown=True,
    **options,
  )
  for note in prepared.notes:
    say(f"{source}: {note}")
  return prefix + digest


def _say_stale(job: recipes.Job, stored: Mapping[str, Any]) -> None:
  """Says so where what a named set was prepared from is not as it was."""
  settings = stored.get("settings") or {}
  source, before = settings.get("source"), stored.get("fingerprint")
  if source is None or before is None:
    return
  try:
    now = sources.fingerprint(pathlib.Path(source), settings.get("metadata"))
  except (OSError, ValueError):
    # It need not be kept.
    return
  if now != before:
    command = catalog.command(job.dataset, job.data_dir, stored)
    say(
      f"{source} or its metadata has changed since the set {job.dataset!r} was"
      f" prepared, which is used as it is: {command} --overwrite prepares it"
      " anew"
    )


def _say_changed(
  source: pathlib.Path,
  prefix: str,
  content: Mapping[str, Any],
  data_dir: str | None,
) -> None:
  """Says so where a source was prepared before and has changed since."""
  for path in catalog.root_dir(data_dir).glob(f"psg_{prefix}*/*/metadata.json"):
    # Other sets, and damaged ones, say nothing of this source.
    with contextlib.suppress(TypeError, ValueError):
      stored = files.read_json(path)
      is_same = stored["settings"]["source"] == str(source)
      if is_same and stored["fingerprint"] != content:
        say(f"{source} or its metadata has changed: it is prepared anew")
        return
