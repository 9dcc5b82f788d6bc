"""What a split takes away and what it leaves, counted before anything runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from psg_jax import types
from psg_jax.forget import columns, requests

_NUM_ROWS_SHOWN = 12
_GROUPED = ("value", "forget_sum", "forget_count")


class Counts(NamedTuple):
  """How many images are on either side."""

  forget: int
  retain: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPreview:
  """What a split does to the groups of a column.

  Attributes:
    column: The metadata column.
    num_groups: Number of groups, without images that stand alone.
    num_forget_groups: Groups with an image in the forget set.
    num_shared_groups: Groups with images on both sides; none if the split was
      made by this column.
    num_without_group: Images without a value, which stand alone.
    num_added: Images forgotten only for their group; None if unknown, without
      a request.
  """

  column: str
  num_groups: int
  num_forget_groups: int
  num_shared_groups: int
  num_without_group: int
  num_added: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
  """What a split takes away and what it leaves; `str` makes a table.

  Attributes:
    num_forget: Size of the forget set.
    num_retain: Size of the retain set.
    classes: Counts for each class name.
    columns: Counts for each value of each column asked for; `(none)` counts
      missing values.
    group: What happens to the groups, where a column was named.
    num_without_metadata: Images that have no value in any metadata column.
    missing: For each column named in the request's condition, the images
      without a value.
    types: For each of these columns, what its values are compared as.
    alike: For each of them and the column of groups, values that differ in
      case or blanks alone, and yet differ.
    num_undecided: Images for which the condition is neither true nor false.
      They do not match by themselves.
  """

  num_forget: int
  num_retain: int
  classes: Mapping[str, Counts]
  columns: Mapping[str, Mapping[str, Counts]]
  group: GroupPreview | None
  num_without_metadata: int
  missing: Mapping[str, int]
  types: Mapping[str, str]
  alike: Mapping[str, tuple[str, ...]]
  num_undecided: int

  def as_dict(self) -> dict[str, Any]:
    """Returns plain dictionaries and numbers, as JSON takes them."""

    def plain(counts: Mapping[str, Counts]) -> dict[str, dict[str, int]]:
      return {name: value._asdict() for name, value in counts.items()}

    return {
      **dataclasses.asdict(self),
      "classes": plain(self.classes),
      "columns": {name: plain(value) for name, value in self.columns.items()},
    }

  def __str__(self) -> str:
    rows = [
      ("", "forget", "retain"),
      ("images", self.num_forget, self.num_retain),
    ]
    for title, counts in [("class", self.classes), *self.columns.items()]:
      rows.append((title, "", ""))
      shown = sorted(counts.items(), key=lambda item: -item[1].forget)
      rows += [(f"  {name}", *count) for name, count in shown[:_NUM_ROWS_SHOWN]]
      if len(shown) > _NUM_ROWS_SHOWN:
        rows.append((f"  and {len(shown) - _NUM_ROWS_SHOWN} more", "", ""))
    if self.group:
      kept = self.group.num_groups - self.group.num_forget_groups
      rows.append(
        (f"groups of {self.group.column}", self.group.num_forget_groups, kept)
      )
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}} {a!s:>9} {b!s:>9}" for name, a, b in rows]
    return "\n".join(line.rstrip() for line in [*lines, *self._notes()])

  def _notes(self) -> list[str]:
    group = self.group
    notes = []
    if group:
      notes = [
        (group.num_added or 0, "forgotten only for their group"),
        (group.num_without_group, f"without {group.column}, standing alone"),
        (group.num_shared_groups, f"groups of {group.column} on both sides"),
      ]
    notes.append((self.num_without_metadata, "without any metadata"))
    notes += [(n, f"without {name}") for name, n in self.missing.items()]
    notes.append((self.num_undecided, "for which the condition is undecided"))
    kinds = [
      f"{name} is compared as {kind}" for name, kind in self.types.items()
    ]
    alike = [
      f"{columns.few(map(repr, values))} of {name} differ in case or blanks"
      " alone: they are not the same here"
      for name, values in self.alike.items()
    ]
    counted = [f"{count} {text}" for count, text in notes if count]
    return [*kinds, *alike, *counted]


def preview(
  dataset: types.Dataset,
  split: types.Split,
  *,
  by: str | Sequence[str] = (),
  group: str | None = None,
  request: requests.Request | None = None,
) -> Preview:
  """Counts what a split of a data set means.

  Args:
    dataset: The data set that was split.
    split: The two parts.
    by: Metadata columns for whose values to count images.
    group: Metadata column of groups; that of the request if not given.
    request: What the split was made by, for what the split itself cannot tell:
      the images added by the group rule and those a condition leaves open.

  Raises:
    ValueError: If the split is not one of the data set, or a column does not
      exist.
  """
  ids = requests.unique_ids(dataset)
  forget = requests.is_in(ids, split.forget.ids)
  retain = requests.is_in(ids, split.retain.ids)
  num_images = len(split.forget) + len(split.retain)
  if not np.array_equal(forget, ~retain) or num_images != len(dataset):
    raise ValueError(
      f"split must part the {len(dataset)} images of dataset, got"
      f" {len(split.forget)} and {len(split.retain)} images"
    )
  match = None
  if request is not None:
    group = request.group if group is None else group
    match = requests.match(dataset, request)
  named = {
    name: dataset.metadata.column(name)
    for name in (match.columns if match else ())
  }
  return Preview(
    num_forget=len(split.forget),
    num_retain=len(split.retain),
    classes=_count_classes(dataset, forget),
    columns={
      name: _count(columns.texts("by", dataset, name), forget)
      for name in ([by] if isinstance(by, str) else by)
    },
    group=None if group is None else _group(dataset, group, forget, match),
    num_without_metadata=_num_without_metadata(dataset),
    missing={
      name: int(columns.is_missing(column).sum())
      for name, column in named.items()
    },
    types={name: columns.kind(column.type) for name, column in named.items()},
    alike=columns.alike(dataset, [*named, *([group] if group else [])]),
    num_undecided=match.num_undecided if match else 0,
  )


def _count(values: pa.Array, forget: np.ndarray) -> dict[str, Counts]:
  """Counts images on either side by value, in order; those without one last."""
  table = pa.table({"value": values, "forget": forget})
  groups = table.group_by("value").aggregate(
    [("forget", "sum"), ("forget", "count")]
  )
  rows = (groups[name].to_pylist() for name in _GROUPED)
  counts = {
    value: Counts(num_forget, num_images - num_forget)
    for value, num_forget, num_images in zip(*rows, strict=True)
  }
  # Arrow gives groups in any order.
  order = pc.unique(values).to_pylist()
  order.sort(key=columns.NO_VALUE.__eq__)
  return {value: counts[value] for value in order}


def _count_classes(
  dataset: types.Dataset, forget: np.ndarray
) -> dict[str, Counts]:
  """Counts by class, also of those without an image."""
  names = np.asarray(dataset.class_names)
  counts = _count(pa.array(names[dataset.labels]), forget)
  return {name: counts.get(name, Counts(0, 0)) for name in dataset.class_names}


def _group(
  dataset: types.Dataset,
  group: str,
  forget: np.ndarray,
  match: requests.Match | None,
) -> GroupPreview:
  values = columns.encode("group", dataset, group)
  is_grouped = np.asarray(values.is_valid())
  texts = values.drop_null().cast(pa.string())
  counts = _count(texts, forget[is_grouped]).values()
  return GroupPreview(
    column=group,
    num_groups=len(counts),
    num_forget_groups=sum(count.forget > 0 for count in counts),
    num_shared_groups=sum(min(count) > 0 for count in counts),
    num_without_group=values.null_count,
    num_added=None if match is None else int((forget & ~match.rows).sum()),
  )


def _num_without_metadata(dataset: types.Dataset) -> int:
  is_bare = np.ones(len(dataset), bool)
  if dataset.metadata is not None:
    table = dataset.metadata
    for name, column in zip(table.column_names, table.columns, strict=True):
      if name != "id":
        is_bare &= columns.is_missing(column)
  return int(is_bare.sum())
