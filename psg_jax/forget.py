"""Which images to forget: requests, their splits, previews and hashes.

A request combines classes, an SQL condition over the metadata, and ids. It can
be stored as a file, and its hash together with the hash of the forgotten ids
states what was asked for and what it meant.
"""

import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import threading
import time
import unicodedata
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from psg_jax import checks, types

_TIME_LIMIT = 30.0
# How long a condition that is interrupted is waited for.
_GRACE = 1.0
_few = functools.partial(checks.few, num_shown=5)
_MAX_TEXT = 120
_MAX_DEPTH = 200
_NUM_ROWS_SHOWN = 12
_NO_VALUE = "(none)"
# The table that a condition sees has these besides the metadata.
_OWN_COLUMNS = ("id", "label", "row")
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
  # One thread: what has no order of its own has that of the table.
  "threads": 1,
  "enable_external_access": "false",
  "autoload_known_extensions": "false",
  "autoinstall_known_extensions": "false",
  "python_enable_replacements": "false",
}
# Times with a zone are compared alike on every machine.
_LOCK = "SET TimeZone = 'UTC'; SET lock_configuration = true"
# Beside what DuckDB itself says of its functions.
_UNSTABLE = frozenset(
  {
    *("current_localtime", "current_localtimestamp", "current_time"),
    *("current_timestamp", "localtime", "localtimestamp", "version"),
    *("reservoir_quantile", "json_serialize_plan"),
  }
)
_TABLE_FUNCTIONS = frozenset(
  {"unnest", "range", "generate_series", "repeat", "json_each", "json_tree"}
)
_KEEPING = frozenset(
  {
    *("trim", "ltrim", "rtrim", "lower", "upper", "lcase", "ucase", "concat"),
    *("||", "min", "max", "first", "last", "any_value", "nullif", "ifnull"),
  }
)
_ORDERED = ("LESSTHAN", "GREATERTHAN", "BETWEEN")
# Each digit a 9: dates that letters sort.
_SORTED_DATES = ("9999-99-99", "9999/99/99", "9999.99.99", "99999999")
_DATE_TEXT = re.compile(
  r"\d{1,4}([-/. ])(\d{1,2}|[^\W\d]{3,9})\1\d{1,4}([ T,].*)?|(19|20)\d{6}"
)
_NUMBER_TEXT = re.compile(r"[+-]?\d+([.,]\d+)*")
_DATE_FORMS = tuple(
  f"{day}{time}"
  for day in (
    *("%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d/%m/%y", "%m/%d/%y"),
    *("%d %b %Y", "%d %B %Y", "%b %d %Y", "%B %d %Y"),
  )
  for time in ("", " %H:%M", " %H:%M:%S", " %I:%M %p", "T%H:%M:%S")
)
_UNKNOWN_COLUMN = re.compile(
  'Referenced column "([^"]+)" not found|column named "([^"]+)"'
)
# Line breaks keep a comment in the condition from reaching further.
_QUERY = "SELECT row FROM metadata WHERE (\n{}\n)"
_DECISION = (
  'SELECT * FROM (SELECT row, (\n{}\n) AS "is true" FROM metadata)'
  ' WHERE "is true" IS DISTINCT FROM FALSE'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What to forget, independent of a data set; equal requests have one form.

  The criteria are combined with AND. A single class or id may be given bare.

  Attributes:
    classes: Indices or names of classes.
    where: An SQL condition over the metadata. The columns `id`, `label` (the
      class name) and `row` are always ours, whatever the metadata has. What it
      is neither true nor false for, as values are missing, does not match.
    ids: Ids of images.
    fraction: Which part of the matching images to forget, in (0, 1], drawn at
      random; with `group`, which part of the matching groups. Drawn from all
      images if there is no other criterion.
    seed: Seed of this draw. A larger fraction contains a smaller one.
    group: A metadata column. As soon as one image of a group is to be
      forgotten, the whole group is; images without a group stand alone.

  Raises:
    ValueError: If there is no criterion, or a value is of the wrong type or
      out of its range.
  """

  classes: tuple[int | str, ...] | None = None
  where: str | None = None
  ids: tuple[str, ...] | None = None
  fraction: float = 1.0
  seed: int = 0
  group: str | None = None

  def __post_init__(self) -> None:
    classes, ids = self.classes, self.ids
    if classes is not None:
      values = [
        value if isinstance(value, str) else _index("classes", value)
        for value in _sequence("classes", classes)
      ]
      numbers = {value for value in values if isinstance(value, int)}
      names = {value for value in values if isinstance(value, str)}
      object.__setattr__(self, "classes", (*sorted(numbers), *sorted(names)))
    if ids is not None:
      texts = {
        str(value) if isinstance(value, str) else str(_index("ids", value))
        for value in _sequence("ids", ids)
      }
      object.__setattr__(self, "ids", tuple(sorted(texts)))
    for name in ("where", "group"):
      text = getattr(self, name)
      if text is not None and not (isinstance(text, str) and text.strip()):
        raise ValueError(
          f"{name} must be a text that says something, got {text!r}"
        )
    fraction = self.fraction
    if isinstance(fraction, bool) or not isinstance(
      fraction, (int, float, np.number)
    ):
      raise ValueError(f"fraction must be a number, got {fraction!r}")
    # Written so that NaN fails.
    if not 0 < fraction <= 1:
      raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    object.__setattr__(self, "fraction", float(fraction))
    checks.integer("seed", self.seed, at_least=0)
    object.__setattr__(self, "seed", int(self.seed))
    criteria = (self.classes, self.where, self.ids)
    if self.fraction == 1 and criteria == (None, None, None):
      raise ValueError(
        "classes, where, ids or a fraction below 1 must be given, got none"
      )

  def to_json(self, path: str | os.PathLike[str]) -> None:
    """Writes the request as a JSON file, whole or not at all."""
    path = pathlib.Path(path)
    if not path.parent.is_dir():
      raise ValueError(f"path must be in an existing folder, got {str(path)!r}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
    try:
      temporary.write_text(text + "\n", encoding="utf-8")
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)

  @classmethod
  def from_json(cls, path: str | os.PathLike[str]) -> "Request":
    """Reads a request that `to_json` or a person has written.

    Raises:
      ValueError: If there is no such file, or it is not a request.
    """
    path = pathlib.Path(path)

    def fields_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
      names = [name for name, _ in pairs]
      twice = [name for name in names if names.count(name) > 1]
      if twice:
        raise ValueError(f"{twice[0]!r} stands in it twice")
      return dict(pairs)

    try:
      text = checks.text("request", path.read_bytes(), str(path))
      fields = json.loads(text, object_pairs_hook=fields_of)
    except OSError as error:
      raise ValueError(
        f"request must be a readable file, got {str(path)!r}: {error.strerror}"
      ) from None
    except (RecursionError, ValueError) as error:
      raise ValueError(
        f"request must be a JSON file, got {str(path)!r}: {error}"
      ) from None
    if not isinstance(fields, dict):
      raise ValueError(f"request must hold a JSON object, got {str(path)!r}")
    for name in fields:
      checks.one_of(
        f"request {str(path)!r}: each field",
        name,
        [field.name for field in dataclasses.fields(cls)],
      )
    try:
      return cls(**fields)
    except ValueError as error:
      raise ValueError(f"request {str(path)!r}: {error}") from None


def split(
  dataset: types.Dataset,
  *,
  classes: int | str | Sequence[int | str] | None = None,
  where: str | None = None,
  ids: str | Sequence[str] | np.ndarray | None = None,
  fraction: float = 1.0,
  seed: int = 0,
  group: str | None = None,
) -> types.Split:
  """Cuts a data set into what to forget and what to retain.

  Both keep the order of the data set.

  Args:
    dataset: Images with unique ids; `where` and `group` need its metadata.
    classes: As in `Request`; one or several.
    where: As in `Request`, such as `"device = 'B' AND quality < 3"`.
    ids: As in `Request`; one or several.
    fraction: As in `Request`.
    seed: As in `Request`.
    group: As in `Request`, such as `"patient_id"`.

  Returns:
    The two parts, neither of them empty.

  Raises:
    ValueError: If a value is of the wrong type or out of its range; if a class,
      an id or a column does not exist; if the condition is not one valid SQL
      condition, takes too long or is true for no or every image; or if one of
      the two parts would be empty.
  """
  given: dict[str, Any] = {"classes": classes, "ids": ids}
  request = Request(
    where=where, fraction=fraction, seed=seed, group=group, **given
  )
  return split_request(dataset, request)


def split_request(dataset: types.Dataset, request: Request) -> types.Split:
  """Cuts a data set as `split` does, by a request."""
  codes = group_codes(dataset, request.group)
  units = np.unique(codes[_met(dataset, request).rows])
  if request.fraction < 1:
    count = max(1, math.floor(request.fraction * len(units) + 0.5))
    order = np.random.default_rng(request.seed).permutation(len(units))
    units = units[order[:count]]
  is_forgotten = np.zeros(codes.max(initial=-1) + 1, bool)
  is_forgotten[units] = True
  rows = is_forgotten[codes]
  if rows.all():
    grouped = f" with group {request.group!r}" if request.group else ""
    raise ValueError(
      f"{_describe(request)}{grouped} takes all {len(dataset)} images: none"
      " would be retained"
    )
  return types.Split(forget=dataset.take(rows), retain=dataset.take(~rows))


def matching(dataset: types.Dataset, request: Request) -> np.ndarray:
  """Finds what a request means in another data set, such as the test images.

  Unlike `split_request` it may match no image, or all; ids that the data set
  does not have match none; and the fraction is left aside, as the images
  wanted are those of the same kind.

  Args:
    dataset: Images with the metadata that the request needs.
    request: The request.

  Returns:
    bool `[N]`.

  Raises:
    ValueError: As `split_request`, for classes, conditions and columns.
  """
  rows = _met(dataset, request, is_strict=False).rows
  if request.group is None or not rows.any():
    return rows
  codes = group_codes(dataset, request.group)
  return np.isin(codes, np.unique(codes[rows]))


def request_hash(request: Request) -> str:
  """Returns the SHA-256 of a request's canonical JSON, in hexadecimal."""
  return _sha256(dataclasses.asdict(request))


def ids_hash(ids: Iterable[str]) -> str:
  """Returns the SHA-256 of the sorted ids as JSON; their order is no matter."""
  array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
  return _sha256(np.sort(array.astype(str)).tolist())


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
      f"{_few([repr(value) for value in values])} of {name} differ in case or"
      " blanks alone: they are not the same here"
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
  request: Request | None = None,
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
  ids = _unique_ids(dataset)
  forget = pc.is_in(ids, value_set=pa.array(split.forget.ids)).to_numpy(
    zero_copy_only=False
  )
  retain = pc.is_in(ids, value_set=pa.array(split.retain.ids)).to_numpy(
    zero_copy_only=False
  )
  if not np.array_equal(forget, ~retain) or len(split.forget) + len(
    split.retain
  ) != len(dataset):
    raise ValueError(
      f"split must part the {len(dataset)} images of dataset, got"
      f" {len(split.forget)} and {len(split.retain)} images"
    )
  matches, missing, kinds, num_undecided = None, {}, {}, 0
  if request is not None:
    group = request.group if group is None else group
    met = _met(dataset, request)
    matches, num_undecided = met.rows, met.num_undecided
    for name in met.columns:
      column = dataset.metadata.column(name)
      missing[name] = int(_is_missing(column).sum())
      kinds[name] = _kind(column.type)
  names = [by] if isinstance(by, str) else list(by)
  return Preview(
    num_forget=len(split.forget),
    num_retain=len(split.retain),
    classes=_count(dataset.labels, dataset.class_names, forget),
    columns={name: _count_column(dataset, name, forget) for name in names},
    group=None if group is None else _group(dataset, group, forget, matches),
    num_without_metadata=_num_without_metadata(dataset),
    missing=missing,
    types=kinds,
    alike=_alike(dataset, [*kinds, *([group] if group else [])]),
    num_undecided=num_undecided,
  )


def _sequence(name: str, value: Any) -> list[Any]:
  """Makes a list of one or several values."""
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, (str, int, np.integer)):
    return [value]
  if not isinstance(value, Iterable):
    raise ValueError(f"{name} must be one or several values, got {value!r}")
  values = list(value)
  if not values:
    raise ValueError(f"{name} must name at least one, got {value!r}")
  return values


def _index(name: str, value: Any) -> int:
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise ValueError(f"{name} must be texts or integers, got {value!r}")
  return int(value)


def _sha256(content: Any) -> str:
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode("ascii")).hexdigest()


def _short(text: str) -> str:
  """One line, not too long, to be quoted in a message."""
  line = " ".join(text.split())
  return line if len(line) <= _MAX_TEXT else f"{line[: _MAX_TEXT - 3]}..."


def _describe(request: Request) -> str:
  """The criteria of a request, for a message."""
  parts = []
  if request.classes is not None:
    parts.append(f"classes {_few(request.classes)}")
  if request.where is not None:
    parts.append(f"where {_short(request.where)!r}")
  if request.ids is not None:
    parts.append(f"ids {_few(request.ids)}")
  return " and ".join(parts) or f"fraction {request.fraction}"


def _unique_ids(dataset: types.Dataset) -> pa.Array:
  ids = pa.array(dataset.ids)
  num_unique = pc.count_distinct(ids).as_py()
  if num_unique != len(ids):
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    raise ValueError(
      "dataset must have unique ids, got several times:"
      f" {_few(repeated.field('values').to_pylist())}"
    )
  return ids


class _Met(NamedTuple):
  """Which images meet a request, and what its condition is about.

  Attributes:
    rows: bool `[N]`, whether all criteria are met.
    columns: The metadata columns that the condition names.
    num_undecided: Images for which it is neither true nor false.
  """

  rows: np.ndarray
  columns: tuple[str, ...] = ()
  num_undecided: int = 0


def _met(
  dataset: types.Dataset, request: Request, *, is_strict: bool = True
) -> _Met:
  """Finds the images that meet all criteria.

  Raises:
    ValueError: If a criterion is wrong; if strict, also if an id is unknown,
      the condition holds for all images, or no image meets the criteria.
  """
  ids = _unique_ids(dataset)
  met = _Met(np.ones(len(dataset), bool))
  if request.classes is not None:
    wanted = class_indices(dataset.class_names, request.classes)
    met.rows[:] &= np.isin(dataset.labels, wanted)
  if request.ids is not None:
    met.rows[:] &= _has_id(ids, request.ids, is_strict=is_strict)
  if request.where is not None:
    where = _nfc(request.where)
    columns = _columns(dataset, where)
    is_true, num_undecided = _decide(dataset, where)
    if is_strict and is_true.all() and len(is_true):
      raise ValueError(
        f"where is true for all {len(dataset)} images, got {_short(where)!r}"
      )
    met = _Met(met.rows & is_true, tuple(columns), num_undecided)
  if is_strict and not met.rows.any():
    raise ValueError(f"{_describe(request)} matches no image")
  return met


def class_indices(
  class_names: Sequence[str], classes: Iterable[int | str]
) -> list[int]:
  """Finds the classes that a request names.

  Args:
    class_names: One name a class.
    classes: Names or numbers; where classes have numbers for names, a number is
      looked for among the names first.

  Returns:
    The numbers of the classes, in the order of the request.

  Raises:
    ValueError: If there is no such class, or a number is the name of one class
      and stands for another.
  """
  num = len(class_names)
  span = f"classes must be in [0, {num}) or names of classes"
  wanted: list[int] = []
  for value in classes:
    if isinstance(value, str):
      found = [
        i for i, name in enumerate(class_names) if _nfc(name) == _nfc(value)
      ]
      if not found:
        raise ValueError(f"{span}, got {value!r}{_hint(value, class_names)}")
    else:
      found = [
        i for i, name in enumerate(class_names) if _is_number(name, value)
      ]
      if 0 <= value < num and found not in ([], [value]):
        named, numbered = class_names[found[0]], class_names[value]
        raise ValueError(
          f"classes must say which class is meant, got {value}, the name of"
          f" {named!r} and the number of {numbered!r}: ask with where"
          f" \"label = '{named}'\" or \"label = '{numbered}'\""
        )
      found = found or [value]
      if not 0 <= found[0] < num:
        raise ValueError(f"{span}, got {value}")
    wanted += found
  return wanted


def _nfc(text: str) -> str:
  """One form of texts that look the same."""
  return unicodedata.normalize("NFC", text)


def _is_number(name: str, value: int) -> bool:
  """Whether a class's name is this number, such as 01 or 1.0 for 1."""
  try:
    return float(name) == value
  except ValueError:
    return False


def _hint(value: str, names: Iterable[str]) -> str:
  """Suggests the nearest name, whatever the case of its letters."""
  folded = {name.casefold(): name for name in names}
  close = difflib.get_close_matches(value.casefold(), folded, n=1)
  if close:
    return f", did you mean {folded[close[0]]!r}?"
  return f" (known: {_few(list(folded.values()))})"


def _has_id(
  ids: pa.Array, wanted: tuple[str, ...], *, is_strict: bool
) -> np.ndarray:
  values = pa.array(wanted, ids.type)
  unknown = values.filter(pc.invert(pc.is_in(values, value_set=ids)))
  if len(unknown):
    # Names of one look: accents written otherwise.
    normal = pc.utf8_normalize(ids, form="NFC")
    same = pc.utf8_normalize(unknown, form="NFC")
    values = pa.concat_arrays(
      [values, ids.filter(pc.is_in(normal, value_set=same))]
    )
    unknown = unknown.filter(pc.invert(pc.is_in(same, value_set=normal)))
  if is_strict and len(unknown):
    names = unknown.to_pylist()
    raise ValueError(
      f"ids must be ids of the data set, got {len(unknown)} that are not:"
      f" {_few(names)}{_hint(names[0], ids.to_pylist())}"
    )
  return pc.is_in(ids, value_set=values).to_numpy(zero_copy_only=False)


# Conditions.


def _table(dataset: types.Dataset) -> pa.Table:
  """The table that a condition sees."""
  if dataset.metadata is None:
    raise ValueError("where needs metadata, and dataset has none")
  columns = {
    _nfc(name): dataset.metadata.column(i)
    for i, name in enumerate(dataset.metadata.column_names)
    if name.casefold() not in _OWN_COLUMNS
  }
  columns = {
    name: pc.utf8_normalize(column, form="NFC")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    else column
    for name, column in columns.items()
  }
  columns["id"] = pc.utf8_normalize(pa.array(dataset.ids), form="NFC")
  columns["label"] = pa.DictionaryArray.from_arrays(
    dataset.labels, pa.array(map(_nfc, dataset.class_names), pa.string())
  )
  columns["row"] = pa.array(np.arange(len(dataset)))
  return pa.table(columns)


@contextlib.contextmanager
def _open(table: pa.Table) -> Iterator[duckdb.DuckDBPyConnection]:
  """Opens a database in memory that sees one table and nothing else."""
  connection = duckdb.connect(":memory:", config=_CONFIG)
  try:
    connection.register("metadata", table)
    connection.execute(_LOCK)
    yield connection
  finally:
    connection.close()


def _columns(dataset: types.Dataset, where: str) -> list[str]:
  """Checks that `where` is one condition; returns the columns it names.

  Around the condition the parsed statement must be what it is around `true`:
  so it cannot have closed the parenthesis to go on with something else. In it,
  only what makes the same of the same table is let in.
  """
  start = f"where must be one SQL condition, got {_short(where)!r}"
  condition = _condition(where, start)
  named, called = set(), set()
  for node in _nodes(condition):
    path = node.get("column_names")
    if path:
      named |= set(path)
    name = str(node.get("function_name", "")).casefold()
    arguments = node.get("arguments", node.get("children")) or []
    # The age of one date is that of today.
    called.add("today" if name == "age" and len(arguments) == 1 else name)
  known: dict[str, list[str]] = {}
  names = [] if dataset.metadata is None else dataset.metadata.column_names
  for name in (*names, *_OWN_COLUMNS):
    if name not in known.setdefault(_nfc(name).casefold(), []):
      known[_nfc(name).casefold()].append(name)
  folded = {name.casefold() for name in named}
  for name in sorted(folded):
    if len(known.get(name, [])) > 1:
      raise ValueError(
        f"{start}: the columns {' and '.join(known[name])} differ only in case"
        " or in the form of their accents"
      )
  _check_sources(condition, start)
  # Some have no parentheses, as columns have none.
  bare = {
    x for x in folded.difference(known) if x.startswith(("curr", "local"))
  }
  changing = (called | bare) & _changing()
  if changing:
    raise ValueError(
      f"{start}: {_few(sorted(changing))} depends on more than the metadata"
    )
  found = sorted(
    known[name][0]
    for name in folded
    if name in known and known[name][0] in names
  )
  _check_texts(dataset, condition, found, start)
  return found


@functools.lru_cache(maxsize=16)
def _condition(where: str, start: str) -> Any:
  """Returns the parsed condition, if it is one and no more."""
  # The parser's time grows with the square of the depth or worse.
  if _depth(where) > _MAX_DEPTH:
    raise ValueError(f"{start}: its parentheses are deeper than {_MAX_DEPTH}")
  with contextlib.closing(
    duckdb.connect(":memory:", config=_CONFIG)
  ) as connection:
    try:
      parsed = _parse(connection, where)
    except (duckdb.Error, RecursionError, ValueError) as error:
      raise ValueError(f"{start}: {_short(str(error))}") from None
    if parsed["error"]:
      raise ValueError(f"{start}: {_short(parsed['error_message'])}")
    frame = _parse(connection, "true")
  conditions = [
    statement["node"].pop("where_clause", None)
    for statement in parsed["statements"]
  ]
  frame["statements"][0]["node"].pop("where_clause")
  if parsed != frame or not where.strip():
    raise ValueError(f"{start}: it goes beyond a condition")
  return conditions[0]


def _check_sources(condition: Any, start: str) -> None:
  """Raises ValueError for a random sample, or tables beside the metadata."""
  named = {"metadata"}
  for node in _nodes(condition):
    defined = (node.get("cte_map") or {}).get("map") or []
    named |= {str(item["key"]).casefold() for item in defined}
  for node in _nodes(condition):
    kind = "" if "class" in node else str(node.get("type", ""))
    table = str(node.get("table_name", ""))
    schema = node.get("schema_name") or "main"
    is_known = table.casefold() in named and schema in ("main", "temp")
    function = (node.get("function") or {}) if kind == "TABLE_FUNCTION" else {}
    called = str(function.get("function_name", ""))
    if node.get("sample"):
      raise ValueError(f"{start}: its sample is drawn at random")
    if kind == "BASE_TABLE" and not is_known:
      raise ValueError(
        f"{start}: the table {table} does not exist, metadata alone does"
      )
    if called and called.casefold() not in _TABLE_FUNCTIONS:
      raise ValueError(f"{start}: the table function {called} is disabled")
    if kind in ("SHOW_REF", "PIVOT"):
      raise ValueError(f"{start}: DESCRIBE, SUMMARIZE and PIVOT are disabled")


def _check_texts(
  dataset: types.Dataset, condition: Any, columns: list[str], start: str
) -> None:
  """Refuses dates and numbers that would be compared by their letters.

  Raises:
    ValueError: If a column of text is put in an order with dates or numbers,
      unless all are dates in ISO form; or if texts such as 14/02/2018 are held
      against a date in ISO form.
  """
  compared = [each for each in _nodes(condition) if _operands(each)]
  for name in columns:
    nodes = [
      (is_ordered, [text for each in operands for text in _literals(each)])
      for node in compared
      for operands in [_operands(node)]
      for is_ordered in [any(word in str(node["type"]) for word in _ORDERED)]
      if _nfc(name).casefold() in map(_name, operands)
    ]
    column = dataset.metadata.column(name)
    if not nodes or _kind(column.type) != "text":
      continue
    texts = _texts(column)
    is_date = all(map(_DATE_TEXT.fullmatch, texts))
    shapes = {_shape(text) for text in texts}
    is_number = all(map(_NUMBER_TEXT.fullmatch, texts)) and len(shapes) > 1
    is_sorted = shapes.issubset(_SORTED_DATES) and len(shapes) == 1
    for is_ordered, literals in nodes:
      dates = {_shape(x) for x in literals if _DATE_TEXT.fullmatch(x)}
      is_other = bool(dates) and not (is_sorted and dates == shapes)
      is_read_wrong = is_other or (is_date and not is_sorted)
      if is_ordered:
        is_wrong = is_read_wrong or (is_number and bool(literals))
      else:
        is_wrong = is_date and is_other and bool(dates - shapes)
      if is_wrong:
        hint = f"TRY_CAST({name} AS DATE) < DATE '2016-01-31'"
        if is_number and not is_date:
          hint = f"replace({name}, ',', '.')::DOUBLE > 3"
        elif is_date and not is_sorted:
          form = _date_form(texts)
          hint = f"strptime({name}, '{form}') < TIMESTAMP '2016-01-31'"
        raise ValueError(
          f"{start}: the column {name} is text, such as {_short(texts[0])!r},"
          " and would be compared by its letters: say how to read it, such as"
          f" {hint}"
        )


def _texts(column: pa.ChunkedArray) -> list[str]:
  """The different texts of a column without outer blanks; one at least."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  texts = pc.unique(pc.utf8_trim_whitespace(column)).drop_null().to_pylist()
  return [text for text in texts if text] or [""]


def _date_form(texts: Sequence[str]) -> str:
  """Returns how dates are written, as `strptime` takes it; a guess."""
  separator = next((x for x in "/-. " if x in texts[0]), "/")
  for form in _DATE_FORMS:
    form = form.replace("/", separator)
    with contextlib.suppress(ValueError):
      for text in texts:
        datetime.datetime.strptime(text, form)
      return form
  return "%d/%m/%Y"


def _shape(text: str) -> str:
  """The form of a date's text."""
  return re.sub(r"\d", "9", text.strip()[:10])


def _operands(node: Mapping[str, Any]) -> list[Any]:
  """What a comparison compares; nothing of another node."""
  if node.get("class") == "COMPARISON":
    return [node["left"], node["right"]]
  if node.get("class") == "BETWEEN":
    return [node["input"], node["lower"], node["upper"]]
  if node.get("type") in ("COMPARE_IN", "COMPARE_NOT_IN"):
    return list(node["children"])
  return []


def _name(operand: Mapping[str, Any]) -> str:
  """The column that an operand is, but for functions that keep its form."""
  while str(operand.get("function_name", "")).casefold() in _KEEPING:
    arguments = operand.get("arguments", operand.get("children")) or [{}]
    operand = arguments[0].get("expression", arguments[0])
  return str((operand.get("column_names") or [""])[-1]).casefold()


def _literals(operand: Mapping[str, Any]) -> list[str]:
  """The text that an operand is, if it is one."""
  literal = operand.get("literal") or operand.get("value") or {}
  text = literal.get("text", literal.get("value"))
  is_number = literal.get("kind", "STRING") != "STRING"
  return [text] if isinstance(text, str) and not is_number else []


def _depth(where: str) -> int:
  """How deep parentheses are at most; those in texts count as well."""
  steps = [1 if c in "([{" else -1 for c in where if c in "([{}])"]
  return max(itertools.accumulate(steps), default=0)


def _parse(connection: duckdb.DuckDBPyConnection, where: str) -> dict[str, Any]:
  query = _QUERY.format(where)
  found = connection.execute(
    "SELECT json_serialize_sql(?::VARCHAR)", [query]
  ).fetchone()
  return json.loads(found[0]) if found else {"error": True}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
  """Yields all objects of a parsed statement, however deep."""
  waiting = [tree]
  while waiting:
    node = waiting.pop()
    if isinstance(node, dict):
      yield node
      waiting += node.values()
    elif isinstance(node, list):
      waiting += node


@functools.cache
def _changing() -> frozenset[str]:
  """Functions, like random and today, that no split can be repeated with."""
  with contextlib.closing(
    duckdb.connect(":memory:", config=_CONFIG)
  ) as connection:
    rows = connection.execute(
      "SELECT function_name, function_type, stability, macro_definition"
      " FROM duckdb_functions()"
    ).fetchall()
  found = _UNSTABLE | {
    name
    for name, kind, stability, _ in rows
    if kind == "scalar" and stability != "CONSISTENT"
  }
  words = {
    name: set(re.findall(r"\w+", definition.casefold())) - {name}
    for name, kind, _, definition in rows
    if kind == "macro" and definition
  }
  found |= {name for name, used in words.items() if "from" in used}
  size = 0
  while size < len(found):
    size = len(found)
    found |= {name for name, used in words.items() if used & found}
  return found


_decided: weakref.WeakKeyDictionary[types.Dataset, dict[str, Any]] = (
  weakref.WeakKeyDictionary()
)


def _decide(dataset: types.Dataset, where: str) -> tuple[np.ndarray, int]:
  """Decides a checked condition for each image, once, in the time limit.

  Returns:
    Whether it is true, `[N]`, and for how many images it is undecided.
  """
  known = _decided.setdefault(dataset, {})
  if where not in known:
    try:
      known[where] = _decide_in_time(dataset, where)
    except ValueError as error:
      known[where] = error
  if isinstance(known[where], ValueError):
    raise known[where].with_traceback(None)
  found: tuple[np.ndarray, int] = known[where]
  return found


def _decide_in_time(
  dataset: types.Dataset, where: str
) -> tuple[np.ndarray, int]:
  results: list[Any] = []
  connections: list[duckdb.DuckDBPyConnection] = []
  tables = _table(dataset)

  def work() -> None:
    try:
      with _open(tables) as connection:
        connections.append(connection)
        results.append(_run(connection, tables, where))
    except Exception as error:
      results.append(error)

  # What does not heed the interrupt is left behind, and ends with the program.
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(_TIME_LIMIT)
  end = time.monotonic() + _GRACE
  is_late = thread.is_alive()
  while thread.is_alive() and time.monotonic() < end:
    # It may have ended meanwhile.
    with contextlib.suppress(duckdb.Error):
      for connection in connections:
        connection.interrupt()
    thread.join(0.05)
  if is_late:
    raise ValueError(
      f"where must be decided within {_TIME_LIMIT:g} s, got {_short(where)!r}"
    )
  if isinstance(results[0], Exception):
    raise results[0]
  rows, num_undecided = results[0]
  is_true = np.zeros(len(dataset), bool)
  is_true[rows] = True
  return is_true, num_undecided


def _run(
  connection: duckdb.DuckDBPyConnection, table: pa.Table, where: str
) -> tuple[np.ndarray, int]:
  """Returns the rows for which a condition is true, and how many it leaves."""
  start = f"where must be one SQL condition, got {_short(where)!r}"
  try:
    # What must not stand in a condition, such as sums, is refused here.
    connection.execute(f"DESCRIBE {_QUERY.format(where)}")
    described = connection.execute(
      f"DESCRIBE SELECT (\n{where}\n) FROM metadata"
    ).fetchone()
    kind = described[1] if described else ""
    if kind not in ("BOOLEAN", '"NULL"'):
      raise ValueError(f"{start}: it is of type {kind}, not true or false")
    found = connection.execute(_DECISION.format(where)).fetchnumpy()
  except duckdb.Error as error:
    raise ValueError(
      f"{start}: {_explain(error, table.column_names)}"
    ) from None
  rows = np.asarray(found["row"], np.int64)
  is_true = np.ma.filled(found["is true"], False).astype(bool)
  return rows[is_true], len(rows) - int(is_true.sum())


def _explain(error: Exception, names: Sequence[str]) -> str:
  """Shortens DuckDB's message; for an unknown column, suggests a name."""
  line = str(error).split("\n")[0]
  unknown = _UNKNOWN_COLUMN.search(line)
  if unknown:
    name = unknown[1] or unknown[2]
    return (
      f"there is no column {name}{_hint(name, names)} (text stands in single"
      " quotes)"
    )
  return _short(line)


# Columns and groups.


def _column(argument: str, dataset: types.Dataset, name: str) -> Any:
  if dataset.metadata is None:
    raise ValueError(
      f"{argument} needs metadata, and dataset has none: got {name!r}"
    )
  names = dataset.metadata.column_names
  if name not in names:
    names = [_nfc(each) for each in names]
    name = _nfc(name)
  if name not in names:
    raise ValueError(
      f"{argument} must be a metadata column, got {name!r}{_hint(name, names)}"
    )
  return dataset.metadata.column(names.index(name))


def _is_missing(column: pa.ChunkedArray) -> np.ndarray:
  """Whether a value is null, not a number or an empty text, `[N]`."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  missing = pc.is_null(column, nan_is_null=True)
  if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
    is_blank = pc.equal(pc.utf8_trim_whitespace(column), "")
    missing = pc.or_(missing, pc.fill_null(is_blank, False))
  return np.asarray(missing.to_numpy(), bool)


def _encode(
  argument: str, dataset: types.Dataset, name: str
) -> tuple[np.ndarray, list[str]]:
  """Numbers the values of a column; the last number stands for none."""
  column = _column(argument, dataset, name)
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  try:
    encoded = pa.chunked_array([column.combine_chunks()]).dictionary_encode()
  except pa.ArrowNotImplementedError:
    raise ValueError(
      f"{argument} must be a column of single values, got {name!r} of type"
      f" {column.type}"
    ) from None
  encoded = encoded.combine_chunks()
  values = [str(value) for value in encoded.dictionary.to_pylist()]
  codes = encoded.indices.fill_null(len(values)).to_numpy()
  codes = np.where(_is_missing(column), len(values), codes).astype(np.int64)
  return codes, [*values, _NO_VALUE]


def group_codes(dataset: types.Dataset, group: str | None) -> np.ndarray:
  """Numbers what is forgotten as a whole.

  Args:
    dataset: Images, with metadata if there is a group.
    group: As in `Request`.

  Returns:
    The group's number of each image, `[N]`; images without one get their own.

  Raises:
    ValueError: If there is no such column, or it has no single values.
  """
  if group is None:
    return np.arange(len(dataset))
  codes, values = _encode("group", dataset, group)
  alone = np.flatnonzero(codes == len(values) - 1)
  codes[alone] += np.arange(len(alone))
  return codes


def _alike(
  dataset: types.Dataset, columns: Sequence[str]
) -> dict[str, tuple[str, ...]]:
  """Finds values of text that look the same, by column."""
  found = {}
  for name in dict.fromkeys(columns):
    column = _column("group", dataset, name)
    if _kind(column.type) != "text":
      continue
    if pa.types.is_dictionary(column.type):
      column = column.cast(column.type.value_type)
    values = pc.unique(column).drop_null()
    folded = [checks.folded(value) for value in values.to_pylist()]
    _, codes, counts = np.unique(
      folded, return_inverse=True, return_counts=True
    )
    rows = np.flatnonzero((counts > 1)[codes] & (np.array(folded) != ""))
    if len(rows):
      rows = rows[np.argsort(codes[rows], kind="stable")]
      found[name] = tuple(values.take(rows).to_pylist())
  return found


def _kind(data_type: pa.DataType) -> str:
  """What values of a type are compared as, in words."""
  if pa.types.is_dictionary(data_type):
    data_type = data_type.value_type
  names = (
    (pa.types.is_string, "text"),
    (pa.types.is_large_string, "text"),
    (pa.types.is_boolean, "true or false"),
    (pa.types.is_date, "a date"),
    (pa.types.is_timestamp, "a time"),
    (pa.types.is_integer, "a number"),
    (pa.types.is_floating, "a number"),
    (pa.types.is_decimal, "a number"),
  )
  found = [name for is_type, name in names if is_type(data_type)]
  return found[0] if found else str(data_type)


def _count(
  codes: np.ndarray, names: Sequence[str], forget: np.ndarray
) -> dict[str, Counts]:
  """Counts images on either side by name; names may occur twice."""
  sides = [
    np.bincount(codes[side], minlength=len(names)) for side in (forget, ~forget)
  ]
  counts: dict[str, Counts] = {}
  for name, *pair in zip(names, *sides, strict=True):
    before = counts.get(name, Counts(0, 0))
    counts[name] = Counts(
      before.forget + int(pair[0]), before.retain + int(pair[1])
    )
  return counts


def _count_column(
  dataset: types.Dataset, name: str, forget: np.ndarray
) -> dict[str, Counts]:
  """Counts by the values that occur."""
  counts = _count(*_encode("by", dataset, name), forget)
  return {value: count for value, count in counts.items() if any(count)}


def _group(
  dataset: types.Dataset,
  group: str,
  forget: np.ndarray,
  matches: np.ndarray | None,
) -> GroupPreview:
  codes, values = _encode("group", dataset, group)
  # Blank texts have a number of their own that no image refers to.
  num_images = np.bincount(codes, minlength=len(values))[:-1]
  num_forget = np.bincount(codes[forget], minlength=len(values))[:-1]
  return GroupPreview(
    column=group,
    num_groups=int((num_images > 0).sum()),
    num_forget_groups=int((num_forget > 0).sum()),
    num_shared_groups=int(((num_forget > 0) & (num_forget < num_images)).sum()),
    num_without_group=int((codes == len(values) - 1).sum()),
    num_added=None if matches is None else int((forget & ~matches).sum()),
  )


def _num_without_metadata(dataset: types.Dataset) -> int:
  if dataset.metadata is None:
    return len(dataset)
  is_bare = np.ones(len(dataset), bool)
  for i, name in enumerate(dataset.metadata.column_names):
    if name != "id":
      is_bare &= _is_missing(dataset.metadata.column(i))
  return int(is_bare.sum())
