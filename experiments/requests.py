"""From a job's options to the images to forget, with a preview and twins."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from experiments import recipes
from psg_jax import files, forget, twins, types
from psg_jax.forget import columns

_MAX_VALUES = 12
_MAX_COLUMNS = 4
_NUM_KEPT = 200
# Unique to an image, or said elsewhere.
_NOT_GROUPS = frozenset({"id", "label", "file", "sha256"})


class Selection(NamedTuple):
  """What is to be forgotten, and all that is known of it before any work.

  Attributes:
    request: The request.
    split: Forget and retain set of the training images.
    test_split: The test images of the same kind, and the others.
    preview: Counts of the split.
    twins: Duplicates across the parts; None where they were not looked for.
    moved: Ids of twins that were moved into the forget set.
    columns: Metadata columns by which results are shown.
  """

  request: forget.Request
  split: types.Split
  test_split: types.Split
  preview: forget.Preview
  twins: twins.Twins | None
  moved: np.ndarray
  columns: tuple[str, ...]

  @property
  def is_class_request(self) -> bool:
    """Whether whole classes are asked for; what twins add changes nothing."""
    is_moved = np.isin(np.asarray(self.split.forget.ids), self.moved)
    labels = self.split.forget.labels
    kept = np.concatenate([self.split.retain.labels, labels[is_moved]])
    return not np.isin(labels[~is_moved], kept).any()


def build(job: recipes.Job) -> forget.Request:
  """Returns the request that a job's options make.

  Raises:
    ValueError: If an option is out of range, a file cannot be read, or nothing
      is asked for.
  """
  if job.request is not None:
    others = (job.forget_classes, job.where, job.ids, job.group)
    if any(others) or job.fraction != 1:
      raise ValueError(
        "request must be the only criterion, got others beside the file"
        f" {job.request}"
      )
    return forget.Request.from_json(job.request)
  ids = None
  if job.ids is not None:
    ids = _read_ids(pathlib.Path(job.ids))
  classes: Any = tuple(job.forget_classes) or None
  if (classes, job.where, ids) == (None, None, None) and job.fraction == 1:
    raise ValueError(
      "forget_classes, where, ids, fraction or request must say what to forget,"
      " got none"
    )
  return forget.Request(
    classes=classes,
    where=job.where,
    ids=ids,
    fraction=job.fraction,
    seed=job.request_seed,
    group=job.group,
  )


def ask(
  job: recipes.Job, train: types.Dataset, test: types.Dataset
) -> Selection:
  """Splits the data by a job's request, and looks for twins.

  Args:
    job: The options.
    train: The training images.
    test: The test images.

  Returns:
    What is to be forgotten.

  Raises:
    ValueError: As `forget.split`, and for unknown columns.
  """
  request = build(job)
  is_asked = forget.matching(test, request)
  try:
    split = forget.split_request(train, request)
  except ValueError as error:
    num_test = int(np.isin(np.asarray(test.ids), request.ids or ()).sum())
    if not forget.matching(train, request).any():
      num_test = int(is_asked.sum())
    if not num_test:
      raise
    raise ValueError(
      f"{error}; {num_test} test images match, which the model is not trained"
      " on: there is nothing to forget of them"
    ) from None
  names = tuple(job.by) or group_columns(train)
  for name in names:
    columns.read("by", train, name)
  duplicates, moved = None, np.zeros(0, str)
  if job.twins != "ignore":
    duplicates = twins.find(
      {"forget": split.forget, "retain": split.retain, "test": test}
    )
    if job.twins == "move":
      before = np.asarray(split.forget.ids)
      codes = forget.group_codes(train, request.group)
      groups = dict(zip(np.asarray(train.ids), codes, strict=True))
      split = twins.move(split, duplicates, groups=groups)
      moved = np.setdiff1d(np.asarray(split.forget.ids), before)
  return Selection(
    request=request,
    split=split,
    test_split=types.Split(test.take(is_asked), test.take(~is_asked)),
    preview=forget.preview(train, split, by=names, request=request),
    twins=duplicates,
    moved=moved,
    columns=names,
  )


def request_fields(request: forget.Request) -> dict[str, Any]:
  """Returns a request for JSON, with the number of ids for the ids."""
  fields = dataclasses.asdict(request)
  ids = fields.pop("ids")
  return {**fields, "num_ids": None if ids is None else len(ids)}


def images_hash(parts: Sequence[types.Dataset]) -> str:
  """Returns the SHA-256 of ids, labels and, where known, files of images."""
  texts = []
  for part in parts:
    fields: list[Any] = [np.asarray(part.ids).tolist(), part.labels.tolist()]
    table = part.metadata
    if table is not None and "sha256" in table.column_names:
      fields.append(table.column("sha256").to_pylist())
    texts.append(json.dumps(fields))
  return files.digest("".join(texts).encode())


def record(result: Selection) -> dict[str, Any]:
  """Returns what a run folder keeps of the request, for JSON."""
  return {
    "request": request_fields(result.request),
    "is_class_request": result.is_class_request,
    "request_sha256": forget.request_hash(result.request),
    "forget_ids_sha256": forget.ids_hash(np.asarray(result.split.forget.ids)),
    "preview": result.preview.as_dict(),
    "preview_text": str(result.preview),
    "twins": None if result.twins is None else _twins_record(result.twins),
    "num_twins_moved": len(result.moved),
    "columns": list(result.columns),
  }


def _twins_record(duplicates: twins.Twins) -> dict[str, Any]:
  """Returns the counts and the first pairs and groups."""
  content = duplicates.as_dict()
  return {
    **content,
    "num_groups": len(content["groups"]),
    "groups": content["groups"][:_NUM_KEPT],
    "num_pairs": len(content["pairs"]),
    "pairs": content["pairs"][:_NUM_KEPT],
  }


def group_columns(dataset: types.Dataset) -> tuple[str, ...]:
  """Finds columns whose few values make groups to show results by."""
  if dataset.metadata is None:
    return ()
  names = []
  for name in dataset.metadata.column_names:
    column = dataset.metadata.column(name)
    is_named = columns.is_text(column.type) or pa.types.is_boolean(column.type)
    if name in _NOT_GROUPS or not is_named:
      continue
    if 2 <= pc.count_distinct(column).as_py() <= _MAX_VALUES:
      names.append(name)
  return tuple(names[:_MAX_COLUMNS])


def values(dataset: types.Dataset, column: str) -> np.ndarray:
  """Returns a column's value of each image as text, `(none)` where missing.

  Raises:
    ValueError: If there is no such column.
  """
  return np.array(columns.texts("by", dataset, column).to_pylist(), str)


def _read_ids(path: pathlib.Path) -> tuple[str, ...]:
  lines = map(str.strip, files.read_text("ids", path).splitlines())
  ids = tuple(line for line in lines if line)
  if not ids:
    raise ValueError(
      f"ids must be a file with an id a line, got none in {path}"
    )
  return ids
