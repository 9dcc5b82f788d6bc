"""Which images to forget: requests, their splits, previews and hashes.

A request combines classes, an SQL condition over the metadata, and ids. It can
be stored as a file, and its hash together with the hash of the forgotten ids
states what was asked for and what it meant.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from psg_jax import checks, types

_TIME_LIMIT = 30.0
_NUM_SHOWN = 5
_MAX_TEXT = 120
_MAX_DEPTH = 200
_NUM_ROWS_SHOWN = 12
_NO_VALUE = "(none)"
# The table that a condition sees has these besides the metadata.
_OWN_COLUMNS = ("id", "label", "row")
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
  "enable_external_access": "false",
  "autoload_known_extensions": "false",
  "autoinstall_known_extensions": "false",
  "python_enable_replacements": "false",
}
_LOCK = "SET lock_configuration = true"
_UNKNOWN_COLUMN = re.compile(
  'Referenced column "([^"]+)" not found|column named "([^"]+)"'
)
# Line breaks keep a comment in the condition from reaching further.
_QUERY = "SELECT row FROM metadata WHERE (\n{}\n)"


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
    try:
      fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
      raise ValueError(
        f"path must be a readable file, got {str(path)!r}: {error.strerror}"
      ) from None
    except ValueError as error:
      raise ValueError(
        f"path must be a JSON file, got {str(path)!r}: {error}"
      ) from None
    if not isinstance(fields, dict):
      raise ValueError(f"path must hold a JSON object, got {str(path)!r}")
    for name in fields:
      checks.one_of(
        f"path {str(path)!r}: each field",
        name,
        [field.name for field in dataclasses.fields(cls)],
      )
    try:
      return cls(**fields)
    except ValueError as error:
      raise ValueError(f"path {str(path)!r}: {error}") from None


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
  matches = _matches(dataset, request)
  if request.group is None:
    codes = np.arange(len(dataset))
  else:
    codes = _group_codes(dataset, request.group)
  units = np.unique(codes[matches])
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
  rows = np.ones(len(dataset), bool)
  for mask in _masks(dataset, request, _unique_ids(dataset), is_strict=False):
    rows &= mask
  if request.group is None or not rows.any():
    return rows
  codes = _group_codes(dataset, request.group)
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
    return [f"{count} {text}" for count, text in notes if count]


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
  matches, missing, num_undecided = None, {}, 0
  if request is not None:
    group = request.group if group is None else group
    matches = _matches(dataset, request)
    if request.where is not None:
      with _open(dataset) as connection:
        columns = _columns(connection, dataset, request.where)
        num_undecided = _num_undecided(connection, request.where)
      missing = {
        name: int(_is_missing(dataset.metadata.column(name)).sum())
        for name in columns
      }
  names = [by] if isinstance(by, str) else list(by)
  return Preview(
    num_forget=len(split.forget),
    num_retain=len(split.retain),
    classes=_count(dataset.labels, dataset.class_names, forget),
    columns={name: _count_column(dataset, name, forget) for name in names},
    group=None if group is None else _group(dataset, group, forget, matches),
    num_without_metadata=_num_without_metadata(dataset),
    missing=missing,
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


def _few(values: Sequence[Any]) -> str:
  rest = len(values) - _NUM_SHOWN
  shown = ", ".join(str(value) for value in values[:_NUM_SHOWN])
  return shown + (f" and {rest} more" if rest > 0 else "")


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


def _matches(dataset: types.Dataset, request: Request) -> np.ndarray:
  """Returns a bool for each image: whether all criteria are met, `[N]`."""
  matches = np.ones(len(dataset), bool)
  for mask in _masks(dataset, request, _unique_ids(dataset)):
    matches &= mask
  if not matches.any():
    raise ValueError(f"{_describe(request)} matches no image")
  return matches


def _masks(
  dataset: types.Dataset,
  request: Request,
  ids: pa.Array,
  *,
  is_strict: bool = True,
) -> list[np.ndarray]:
  """Returns a bool `[N]` for each criterion.

  Raises:
    ValueError: If a criterion is wrong; if strict, also if an id is unknown or
      the condition holds for all images.
  """
  masks = []
  if request.classes is not None:
    wanted = _class_indices(dataset, request.classes)
    masks.append(np.isin(dataset.labels, wanted))
  if request.ids is not None:
    masks.append(_has_id(ids, request.ids, is_strict=is_strict))
  if request.where is not None:
    with _open(dataset) as connection:
      _columns(connection, dataset, request.where)
      rows = _run(connection, dataset, request.where)
    if is_strict and len(rows) == len(dataset) > 0:
      raise ValueError(
        f"where is true for all {len(dataset)} images, got"
        f" {_short(request.where)!r}"
      )
    masks.append(np.zeros(len(dataset), bool))
    masks[-1][rows] = True
  return masks


def _class_indices(
  dataset: types.Dataset, classes: tuple[int | str, ...]
) -> list[int]:
  names, num = dataset.class_names, dataset.num_classes
  span = f"classes must be in [0, {num}) or names of classes"
  wanted = []
  for value in classes:
    if isinstance(value, int):
      if not 0 <= value < num:
        raise ValueError(f"{span}, got {value}")
      wanted.append(value)
      continue
    found = [i for i, name in enumerate(names) if name == value]
    if not found:
      raise ValueError(f"{span}, got {value!r}{_hint(value, names)}")
    wanted += found
  return wanted


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
  if is_strict and len(unknown):
    raise ValueError(
      f"ids must be ids of the data set, got {len(unknown)} that are not:"
      f" {_few(unknown.to_pylist())}"
    )
  return pc.is_in(ids, value_set=values).to_numpy(zero_copy_only=False)


# Conditions.


@contextlib.contextmanager
def _open(dataset: types.Dataset) -> Iterator[duckdb.DuckDBPyConnection]:
  """Opens a database in memory that sees one table and nothing else."""
  if dataset.metadata is None:
    raise ValueError("where needs metadata, and dataset has none")
  columns = {
    name: dataset.metadata.column(i)
    for i, name in enumerate(dataset.metadata.column_names)
    if name.casefold() not in _OWN_COLUMNS
  }
  columns["id"] = pa.array(dataset.ids)
  columns["label"] = pa.DictionaryArray.from_arrays(
    dataset.labels, pa.array(dataset.class_names, pa.string())
  )
  columns["row"] = pa.array(np.arange(len(dataset)))
  connection = duckdb.connect(":memory:", config=_CONFIG)
  try:
    connection.register("metadata", pa.table(columns))
    connection.execute(_LOCK)
    yield connection
  finally:
    connection.close()


def _columns(
  connection: duckdb.DuckDBPyConnection, dataset: types.Dataset, where: str
) -> list[str]:
  """Checks that `where` is one condition; returns the columns it names.

  Around the condition the parsed statement must be what it is around `true`:
  so it cannot have closed the parenthesis to go on with something else.
  """
  start = f"where must be one SQL condition, got {_short(where)!r}"
  # The parser's time grows with the square of the depth or worse.
  if _depth(where) > _MAX_DEPTH:
    raise ValueError(f"{start}: its parentheses are deeper than {_MAX_DEPTH}")
  try:
    parsed = _parse(connection, where)
  except (duckdb.Error, RecursionError, ValueError) as error:
    raise ValueError(f"{start}: {_short(str(error))}") from None
  if parsed["error"]:
    raise ValueError(f"{start}: {_short(parsed['error_message'])}")
  conditions = [
    statement["node"].pop("where_clause", None)
    for statement in parsed["statements"]
  ]
  frame = _parse(connection, "true")
  frame["statements"][0]["node"].pop("where_clause")
  if parsed != frame or not where.strip():
    raise ValueError(f"{start}: it goes beyond a condition")
  named, called = set(), set()
  for node in _nodes(conditions[0]):
    path = node.get("column_names")
    if path:
      named.add(
        path[1] if path[0].casefold() == "metadata" and path[1:] else path[0]
      )
    called.add(str(node.get("function_name", "")).casefold())
  known: dict[str, list[str]] = {}
  for name in (*dataset.metadata.column_names, *_OWN_COLUMNS):
    if name not in known.setdefault(name.casefold(), []):
      known[name.casefold()].append(name)
  folded = {name.casefold() for name in named}
  for name in sorted(folded):
    if len(known.get(name, [])) > 1:
      raise ValueError(
        f"{start}: the columns {' and '.join(known[name])} differ only in case"
      )
  changing = (called | folded.difference(known)) & _changing(connection)
  if changing:
    raise ValueError(
      f"{start}: {_few(sorted(changing))} depends on more than the metadata"
    )
  return sorted(
    known[name][0]
    for name in folded
    if name in known and known[name][0] in dataset.metadata.column_names
  )


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


def _changing(connection: duckdb.DuckDBPyConnection) -> set[str]:
  """Functions, like random and today, that no split can be repeated with."""
  rows = connection.execute(
    "SELECT DISTINCT function_name FROM duckdb_functions() WHERE"
    " function_type = 'scalar' AND stability <> 'CONSISTENT'"
  ).fetchall()
  return {name for (name,) in rows}


def _run(
  connection: duckdb.DuckDBPyConnection, dataset: types.Dataset, where: str
) -> np.ndarray:
  """Returns the rows for which a checked condition is true."""
  start = f"where must be one SQL condition, got {_short(where)!r}"
  try:
    with _limit_time(connection, where):
      described = connection.execute(
        f"DESCRIBE SELECT (\n{where}\n) FROM metadata"
      ).fetchone()
      kind = described[1] if described else ""
      if kind not in ("BOOLEAN", '"NULL"'):
        raise ValueError(f"{start}: it is of type {kind}, not true or false")
      result = connection.execute(_QUERY.format(where)).fetchnumpy()
  except duckdb.Error as error:
    names = [*dataset.metadata.column_names, *_OWN_COLUMNS]
    raise ValueError(f"{start}: {_explain(error, names)}") from None
  return np.asarray(result["row"], np.int64)


def _num_undecided(connection: duckdb.DuckDBPyConnection, where: str) -> int:
  with _limit_time(connection, where):
    found = connection.execute(
      f"SELECT count(*) FROM metadata WHERE (\n{where}\n) IS NULL"
    ).fetchone()
  return int(found[0]) if found else 0


@contextlib.contextmanager
def _limit_time(
  connection: duckdb.DuckDBPyConnection, where: str
) -> Iterator[None]:
  timer = threading.Timer(_TIME_LIMIT, connection.interrupt)
  timer.daemon = True
  timer.start()
  try:
    yield
  except duckdb.InterruptException:
    raise ValueError(
      f"where must be decided within {_TIME_LIMIT:g} s, got {_short(where)!r}"
    ) from None
  finally:
    timer.cancel()
    # An interrupt must not meet a connection that is closed.
    timer.join()


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


def _group_codes(dataset: types.Dataset, group: str) -> np.ndarray:
  """Returns a group number for each image; those without one get their own."""
  codes, values = _encode("group", dataset, group)
  alone = np.flatnonzero(codes == len(values) - 1)
  codes[alone] += np.arange(len(alone))
  return codes


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
