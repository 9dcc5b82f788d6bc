"""Parts of the report that show what was asked for, twins, and groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import figures
from psg_jax import forget

_NUM_ROWS = 15
_MAX_SIDE = 160
_SIDES = {"test": "Test images", "train": "Training images"}


def asked(data: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the request and its preview, or None for a run without them.

  Args:
    data: The content of a run's `data.json`.

  Returns:
    `criteria`, pairs of a name and a text; `images`, pairs of a part and its
    number, the first of all that were read; `groups` of rows with counts to
    forget and to keep; `notes`; and `hashes`.
  """
  if "preview" not in data:
    return None
  preview = data["preview"]
  groups = [
    {
      "name": "Images",
      "rows": [_count("all", preview["num_forget"], preview["num_retain"])],
      "num_hidden": 0,
    },
    _counts("By class", preview["classes"]),
  ]
  groups += [
    _counts(f"By {name}", counts) for name, counts in preview["columns"].items()
  ]
  return {
    "criteria": _criteria(data["request"], data["class_names"]),
    # Runs of earlier versions do not count them.
    "images": [
      (name, f"{count:,}") for name, count in data.get("images", {}).items()
    ],
    "groups": groups,
    "notes": [*_lacking(data), *_notes(data)],
    "hashes": [
      ("SHA-256 of the request", data["request_sha256"]),
      ("SHA-256 of the ids to forget", data["forget_ids_sha256"]),
    ],
  }


def source(data: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns what became of every file that the data set was prepared from.

  Args:
    data: The content of a run's `data.json`.

  Returns:
    Pairs of a name and a count, of which those after the first are its parts;
    none for a run without them.
  """
  found, counts = data.get("source"), data.get("images")
  if not found or not counts:
    return []
  used = {
    "forgotten": counts["forget"],
    "retained": counts["retain"],
    "test images": counts["test"],
    "read, and not used": counts["not used (num_train)"],
  }
  used |= {
    f"left out: {item['ending'] or 'no ending'}, {item['why']}": item["count"]
    for item in found.get("left_out", ())
  }
  rows = [(f"Files of {found['name']}", sum(used.values())), *used.items()]
  pages = found.get("further_pages", {}).get("pages", 0)
  rows.append(("besides, further pages of files that were read", pages))
  return [(name, f"{count:,}") for name, count in rows if count]


def twins(
  data: Mapping[str, Any], pictures: Mapping[str, np.ndarray] | None
) -> dict[str, Any] | None:
  """Returns the twins that were found, or None where none were looked for.

  Args:
    data: The content of a run's `data.json`.
    pictures: Arrays `left` and `right` of the first pairs, or None.

  Returns:
    `rows`: parts, exact and near pairs; `num_moved`; `items`: pairs of encoded
    images with their ids.
  """
  found = data.get("twins")
  if found is None:
    return None
  items = []
  for i, pair in enumerate(found["pairs"][: _length(pictures)]):
    assert pictures is not None
    items.append(
      {
        "left": _encode(pictures["left"][i]),
        "right": _encode(pictures["right"][i]),
        "kind": pair["kind"],
        "names": " / ".join(
          f"{part}: {each}"
          for part, each in zip(pair["between"], pair["ids"], strict=True)
        ),
      }
    )
  return {
    "rows": [
      {
        "name": " and ".join(counts["between"]),
        "exact": f"{counts['exact']:,}",
        "near": f"{counts['near']:,}",
      }
      for counts in found["counts"]
    ],
    "num_moved": data.get("num_twins_moved", 0),
    "items": items,
  }


def by_column(metrics: Mapping[str, Any], show: Any) -> list[dict[str, Any]]:
  """Returns the accuracies by the values of metadata columns.

  Args:
    metrics: The content of a run's `metrics.json`.
    show: Formats an accuracy or None.

  Returns:
    One table for each column and side, with rows of a name, a count and a cell
    for each model.
  """
  tables = []
  first = next(iter(metrics.values())).get("by") or {}
  for side, title in _SIDES.items():
    for column, values in first.get(side, {}).items():
      rows = []
      for value, group in values.items():
        cells = [
          show(_accuracy(figures_of, side, column, value))
          for figures_of in metrics.values()
        ]
        rows.append({"name": value, "count": group["count"], "cells": cells})
      rows.sort(key=lambda row: -row["count"])
      tables.append({"name": f"{title} by {column}", "rows": rows[:_NUM_ROWS]})
  return tables


def _accuracy(
  figures_of: Mapping[str, Any], side: str, column: str, value: str
) -> float | None:
  group = (figures_of.get("by") or {}).get(side, {}).get(column, {})
  found = group.get(value, {}).get("accuracy")
  return None if found is None else float(found)


def _criteria(
  request: Mapping[str, Any], class_names: Sequence[str]
) -> list[tuple[str, str]]:
  found = []
  if request.get("classes"):
    numbers = forget.class_indices(class_names, request["classes"])
    names = [class_names[number] for number in numbers]
    found.append(("classes", ", ".join(names)))
  if request.get("where"):
    found.append(("where", request["where"]))
  if request.get("num_ids"):
    found.append(("ids", f"a list of {request['num_ids']:,}"))
  if request.get("fraction", 1.0) != 1.0:
    found.append(
      ("fraction", f"{request['fraction']:g}, seed {request['seed']}")
    )
  if request.get("group"):
    found.append(("whole groups of", request["group"]))
  return found


def _count(name: str, forget: int, retain: int) -> dict[str, Any]:
  return {"name": name, "forget": f"{forget:,}", "retain": f"{retain:,}"}


def _counts(
  name: str, counts: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
  ordered = sorted(
    counts.items(), key=lambda item: (-item[1]["forget"], -item[1]["retain"])
  )
  return {
    "name": name,
    "rows": [
      _count(value, count["forget"], count["retain"])
      for value, count in ordered[:_NUM_ROWS]
    ],
    "num_hidden": max(0, len(ordered) - _NUM_ROWS),
  }


def _lacking(data: Mapping[str, Any]) -> list[str]:
  """What cannot be told without unseen images."""
  if data.get("images", {}).get("test", 1):
    return []
  return [
    "there are no unseen images: all figures of test images are missing, and no"
    " accuracy on them says when to stop"
  ]


def _notes(data: Mapping[str, Any]) -> list[str]:
  preview = data["preview"]
  group = preview.get("group") or {}
  column = group.get("column")
  counted = [
    (
      group.get("num_forget_groups"),
      f"groups of {column} have images to forget",
    ),
    (group.get("num_added"), "images are forgotten only for their group"),
    (group.get("num_shared_groups"), f"groups of {column} are on both sides"),
    (group.get("num_without_group"), f"images have no {column}: each is alone"),
    (preview.get("num_without_metadata"), "images have no metadata: kept"),
    (preview.get("num_undecided"), "images leave the condition open: kept"),
    (
      data.get("num_twins_moved"),
      "twins of forget images were moved into the forget set",
    ),
    (
      data.get("counts", {}).get("validation"),
      "test images say when to stop, and are in no figure",
    ),
  ]
  counted += [
    (count, f"images have no {name}")
    for name, count in (preview.get("missing") or {}).items()
  ]
  said = [
    f"{name} is compared as {kind}"
    for name, kind in (preview.get("types") or {}).items()
  ]
  said += [
    f"{', '.join(map(repr, values[:_NUM_ROWS]))} of {name} differ in case or"
    " blanks alone"
    for name, values in (preview.get("alike") or {}).items()
  ]
  found = [f"{count:,} {text}" for count, text in counted if count]
  return [*said, *found]


def _length(pictures: Mapping[str, np.ndarray] | None) -> int:
  return 0 if pictures is None else len(pictures["left"])


def _encode(image: np.ndarray) -> str:
  return figures.data_uri(image / np.float32(255), max_side=_MAX_SIDE)
