"""Parts of a page that show what was asked for, twins, and groups."""

from collections.abc import Mapping
from typing import Any

import markupsafe
import numpy as np

from experiments.pages import figures, tables
from psg_jax import forget

_NUM_ROWS = 15
_MAX_SIDE = 160
_SIDES = {"test": "Test images", "train": "Training images"}
_CODE = markupsafe.Markup("<code>{}</code>")


def overview(data: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the request and its preview, or None for a run without them.

  Args:
    data: The content of a run's `data.json`.

  Returns:
    `criteria`, `images` (the first of all that were read) and `hashes`, pairs
    of a name and a text; `preview`, a table of counts; and `notes`.
  """
  if "preview" not in data:
    return None
  preview = data["preview"]
  whole = {"forget": preview["num_forget"], "retain": preview["num_retain"]}
  counts: dict[Any, Any] = {"Images": {"all": whole}}
  # A column may be called class, too: its key is another.
  counts[("By class",)] = preview["classes"]
  counts |= {f"By {name}": x for name, x in preview["columns"].items()}
  heads = ("Training images", "Forget", "Retain")
  return {
    "criteria": criteria(data),
    # Runs of earlier versions do not count them.
    "images": [
      (name, f"{count:,}") for name, count in data.get("images", {}).items()
    ],
    "preview": tables.table(
      heads, {name: _counts(x) for name, x in counts.items()}
    ),
    "notes": _notes(data),
    "hashes": [
      ("SHA-256 of the request", _CODE.format(data["request_sha256"])),
      ("SHA-256 of the ids to forget", _CODE.format(data["forget_ids_sha256"])),
    ],
  }


def criteria(data: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns what was asked for, as pairs; none for a run without a preview."""
  if "preview" not in data:
    return []
  request, names = data["request"], data["class_names"]
  numbers = forget.class_indices(names, request.get("classes") or [])
  part, num_ids = request.get("fraction", 1.0), request.get("num_ids")
  pairs = {
    "classes": ", ".join(names[number] for number in numbers),
    "where": request.get("where"),
    "ids": num_ids and f"a list of {num_ids:,}",
    "fraction": None if part == 1 else f"{part:g}, seed {request['seed']}",
    "whole groups of": request.get("group"),
  }
  return [(name, _CODE.format(text)) for name, text in pairs.items() if text]


def sizes(data: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns how many images are forgotten and kept, in training and test."""

  def text(split: str) -> str:
    parts = (data["counts"].get(f"{x}_{split}") for x in ("train", "test"))
    return " + ".join(
      tables.NOT_AVAILABLE if n is None else f"{n:,}" for n in parts
    )

  return [
    ("To forget (training + test)", text("forget")),
    ("To keep (training + test)", text("retain")),
  ]


def source(data: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns what became of every file that the data set was prepared from.

  Args:
    data: The content of a run's `data.json`.

  Returns:
    Pairs of a name and a count, of which those after the first are its parts;
    none for a run without them.
  """
  record, counts = data.get("source"), data.get("images")
  if not record or not counts:
    return []
  used = {
    "forgotten": counts["forget"],
    "retained": counts["retain"],
    "test images": counts["test"],
    "read, and not used": counts["not used (num_train)"],
  }
  used |= {
    f"left out: {item['ending'] or 'no ending'}, {item['why']}": item["count"]
    for item in record.get("left_out", ())
  }
  rows = [(f"Files of {record['name']}", sum(used.values())), *used.items()]
  pages = record.get("further_pages", {}).get("pages", 0)
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
    `counts`, a table; `num_moved`; and `pictures` of pairs.
  """
  record = data.get("twins")
  if record is None:
    return None
  shown = pictures or {"left": np.zeros(0), "right": np.zeros(0)}
  return {
    "counts": tables.table(
      ("Between", "Exact", "Near"),
      (
        (" and ".join(x["between"]), f"{x['exact']:,}", f"{x['near']:,}")
        for x in record["counts"]
      ),
    ),
    "num_moved": data.get("num_twins_moved", 0),
    "pictures": [
      {
        "images": [
          (encode(left, _MAX_SIDE), "First of a pair of twins"),
          (encode(right, _MAX_SIDE), "Second of the pair"),
        ],
        "name": pair["kind"],
        "text": " / ".join(
          f"{part}: {name}"
          for part, name in zip(pair["between"], pair["ids"], strict=True)
        ),
      }
      for pair, left, right in zip(
        record["pairs"], shown["left"], shown["right"], strict=False
      )
    ],
  }


def by_column(models: tables.Models) -> tables.Table:
  """Returns the accuracies by the values of metadata columns.

  Args:
    models: The content of a run's `metrics.json`.

  Returns:
    A group for each column and side, the largest values first.
  """
  first = next(iter(models.figures))
  groups = {}
  for side, title in _SIDES.items():
    for column, values in (models.get(first, "by", side) or {}).items():
      largest = sorted(values, key=lambda x: -values[x]["count"])[:_NUM_ROWS]
      groups[f"{title} by {column}"] = [
        models.row(value, "by", side, column, value, "accuracy").led_by(
          values[value]["count"]
        )
        for value in largest
      ]
  return models.table(groups, "Group", "Images")


def encode(image: np.ndarray, max_side: int) -> str:
  """Encodes an image uint8 `[H, W, C]` for a page."""
  return figures.data_uri(image / np.float32(255), max_side=max_side)


def _counts(values: Mapping[str, Mapping[str, int]]) -> list[list[Any]]:
  """The values with most images to forget, and how many are left out."""
  order = sorted(
    values, key=lambda x: (-values[x]["forget"], -values[x]["retain"])
  )
  rows: list[list[Any]] = []
  for name in order[:_NUM_ROWS]:
    forgotten, kept = values[name]["forget"], values[name]["retain"]
    style = "forget" if forgotten else ""
    cell = tables.Cell(f"{forgotten:,}", style=style)
    rows.append([name, cell, f"{kept:,}"])
  if len(order) > _NUM_ROWS:
    rows.append([f"and {len(order) - _NUM_ROWS} more", "", ""])
  return rows


def _notes(data: Mapping[str, Any]) -> list[str]:
  preview = data["preview"]
  group = preview.get("group") or {}
  column = group.get("column")
  counted = {
    f"groups of {column} have images to forget": group.get("num_forget_groups"),
    "images are forgotten only for their group": group.get("num_added"),
    f"groups of {column} are on both sides": group.get("num_shared_groups"),
    f"images have no {column}: each is alone": group.get("num_without_group"),
    "images have no metadata: kept": preview.get("num_without_metadata"),
    "images leave the condition open: kept": preview.get("num_undecided"),
    "twins of forget images were moved into the forget set": data.get(
      "num_twins_moved"
    ),
    "test images say when to stop, and are in no figure": data.get(
      "counts", {}
    ).get("validation"),
  }
  lines = []
  if not data.get("images", {}).get("test", 1):
    lines.append(
      "there are no unseen images: all figures of test images are missing, and"
      " no accuracy on them says when to stop"
    )
  lines += [
    f"{name} is compared as {kind}"
    for name, kind in (preview.get("types") or {}).items()
  ]
  lines += [
    f"{', '.join(map(repr, values[:_NUM_ROWS]))} of {name} differ in case or"
    " blanks alone"
    for name, values in (preview.get("alike") or {}).items()
  ]
  lines += [f"{count:,} {text}" for text, count in counted.items() if count]
  lines += [
    f"{count:,} images have no {name}"
    for name, count in (preview.get("missing") or {}).items()
    if count
  ]
  return lines
