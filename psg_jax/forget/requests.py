"""Requests, and the images that they mean."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from psg_jax import checks, files, types
from psg_jax.forget import columns, sql


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
    if self.classes is not None:
      classes = set(_values("classes", self.classes))
      numbers = sorted(x for x in classes if isinstance(x, int))
      names = sorted(x for x in classes if isinstance(x, str))
      object.__setattr__(self, "classes", (*numbers, *names))
    if self.ids is not None:
      ids = {str(value) for value in _values("ids", self.ids)}
      object.__setattr__(self, "ids", tuple(sorted(ids)))
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
    text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
    files.write_text(path, text + "\n")

  @classmethod
  def from_json(cls, path: str | os.PathLike[str]) -> "Request":
    """Reads a request that `to_json` or a person has written.

    Raises:
      ValueError: If there is no such file, or it is not a request.
    """
    path = pathlib.Path(path)
    text = files.read_text("request", path)
    start = f"request must be a JSON file, got {str(path)!r}:"
    with files.faults(start, RecursionError, ValueError):
      fields = json.loads(text, object_pairs_hook=_fields_once)
    if not isinstance(fields, dict):
      raise ValueError(f"request must hold a JSON object, got {str(path)!r}")
    for name in fields:
      checks.one_of(
        f"request {str(path)!r}: each field",
        name,
        [field.name for field in dataclasses.fields(cls)],
      )
    with files.faults(f"request {str(path)!r}:", ValueError):
      return cls(**fields)


def _criteria(request: Request) -> str:
  """The criteria of a request, to begin a message with."""
  parts = []
  if request.classes is not None:
    parts.append(f"classes {columns.few(request.classes)}")
  if request.where is not None:
    parts.append(f"where {columns.short(request.where)!r}")
  if request.ids is not None:
    parts.append(f"ids {columns.few(request.ids)}")
  return " and ".join(parts) or f"fraction {request.fraction}"


def _values(name: str, value: Any) -> list[int | str]:
  """Makes a list of one or several texts and integers."""
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, (str, int, np.integer)):
    value = [value]
  if not isinstance(value, Iterable):
    raise ValueError(f"{name} must be one or several values, got {value!r}")
  values = list(value)
  if not values:
    raise ValueError(f"{name} must name at least one, got {value!r}")
  for item in values:
    if isinstance(item, bool) or not isinstance(item, (str, int, np.integer)):
      raise ValueError(f"{name} must be texts or integers, got {item!r}")
  return [str(x) if isinstance(x, str) else int(x) for x in values]


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  names = [name for name, _ in pairs]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise ValueError(f"{twice[0]!r} stands in it twice")
  return dict(pairs)


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
  codes = columns.group_codes(dataset, request.group)
  units = np.unique(codes[match(dataset, request).rows])
  if request.fraction < 1:
    count = max(1, math.floor(request.fraction * len(units) + 0.5))
    order = np.random.default_rng(request.seed).permutation(len(units))
    units = units[order[:count]]
  rows = np.isin(codes, units)
  if rows.all():
    grouped = f" with group {request.group!r}" if request.group else ""
    raise ValueError(
      f"{_criteria(request)}{grouped} takes all {len(dataset)} images: none"
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
  rows = match(dataset, request, is_strict=False).rows
  if request.group is None or not rows.any():
    return rows
  codes = columns.group_codes(dataset, request.group)
  return np.isin(codes, codes[rows])


def request_hash(request: Request) -> str:
  """Returns the SHA-256 of a request's canonical JSON, in hexadecimal."""
  return _canonical_hash(dataclasses.asdict(request))


def ids_hash(ids: Iterable[str]) -> str:
  """Returns the SHA-256 of the sorted ids as JSON; their order is no matter."""
  array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
  return _canonical_hash(np.sort(array.astype(str)).tolist())


def _canonical_hash(content: Any) -> str:
  return files.digest(content, sort_keys=True, separators=(",", ":"))


class Match(NamedTuple):
  """Which images meet a request, and what its condition is about.

  Attributes:
    rows: bool `[N]`, whether all criteria are met.
    columns: The metadata columns that the condition names.
    num_undecided: Images for which it is neither true nor false.
  """

  rows: np.ndarray
  columns: tuple[str, ...] = ()
  num_undecided: int = 0


def match(
  dataset: types.Dataset, request: Request, *, is_strict: bool = True
) -> Match:
  """Finds the images that meet all criteria, whatever their group.

  Args:
    dataset: Images with the metadata that the request needs.
    request: The request.
    is_strict: Whether all ids must be known, and some images and not all must
      match.

  Raises:
    ValueError: If a criterion is wrong, or as `is_strict` says.
  """
  ids = unique_ids(dataset)
  rows = np.ones(len(dataset), bool)
  names: tuple[str, ...] = ()
  num_undecided = 0
  if request.classes is not None:
    wanted = class_indices(dataset.class_names, request.classes)
    rows &= np.isin(dataset.labels, wanted)
  if request.ids is not None:
    rows &= _has_id(ids, request.ids, is_strict=is_strict)
  if request.where is not None:
    where = columns.nfc(request.where)
    names = sql.check(dataset, where)
    is_true, num_undecided = sql.decide(dataset, where)
    if is_strict and is_true.all() and len(is_true):
      raise ValueError(
        f"where is true for all {len(dataset)} images, got"
        f" {columns.short(where)!r}"
      )
    rows &= is_true
  if is_strict and not rows.any():
    raise ValueError(f"{_criteria(request)} matches no image")
  return Match(rows, names, num_undecided)


def unique_ids(dataset: types.Dataset) -> pa.Array:
  """Returns the ids; raises ValueError if one is there several times."""
  ids = pa.array(dataset.ids)
  counts = pc.value_counts(ids)
  if len(counts) != len(ids):
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    raise ValueError(
      "dataset must have unique ids, got several times:"
      f" {columns.few(repeated.field('values').to_pylist())}"
    )
  return ids


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
  indices: list[int] = []
  for value in classes:
    named = [i for i in range(num) if _is_name(class_names[i], value)]
    if not isinstance(value, str):
      if 0 <= value < num and named not in ([], [value]):
        name, other = class_names[named[0]], class_names[value]
        raise ValueError(
          f"classes must say which class is meant, got {value}, the name of"
          f" {name!r} and the number of {other!r}: ask with where"
          f" \"label = '{name}'\" or \"label = '{other}'\""
        )
      named = named or [value] * (0 <= value < num)
    if not named:
      near = columns.hint(value, class_names) if isinstance(value, str) else ""
      raise ValueError(f"{span}, got {value!r}{near}")
    indices += named
  return indices


def _is_name(name: str, value: int | str) -> bool:
  """Whether a class has this name, or this number for one: 01 or 1.0 for 1."""
  if isinstance(value, str):
    return columns.nfc(name) == columns.nfc(value)
  try:
    return float(name) == value
  except ValueError:
    return False


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
      f" {columns.few(names)}{columns.hint(names[0], ids.to_pylist())}"
    )
  return is_in(ids, values)


def is_in(ids: pa.Array, values: pa.Array | np.ndarray) -> np.ndarray:
  """Whether an id is one of these, bool `[N]`."""
  mask = pc.is_in(ids, value_set=pa.array(values, ids.type))
  return np.asarray(mask.to_numpy(zero_copy_only=False))
