"""Twins: images that stand in two parts of the data, exactly or nearly.

A forgotten image whose copy is retained is not forgotten, and a test image that
was trained on tests nothing. `find` lists such pairs before anything runs, and
`move` takes the retained twins of forgotten images into the forget set.

Exact twins have equal pixels, or equal SHA-256 of their files where the
metadata has a column `sha256`. Near twins are the same picture encoded, scaled
or lit otherwise; mirrored, rotated and cropped ones are not searched for, and
of colours only the grey image is compared. Pictures of next to no contrast,
such as plain sky, are noise after any change: as near twins they may be missed.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa

from psg_jax import checks, fingerprints, streaming, types

Fingerprints = fingerprints.Fingerprints
fingerprint = fingerprints.fingerprint
Kind: TypeAlias = Literal["exact", "near"]

# Chosen by looking at pairs. In the brain MRI set those that correlate by 0.995
# or more are one picture, in part with another contrast; from 0.98 to 0.99
# there are many neighbouring slices. In Fashion-MNIST, test against training,
# 24 pairs reach 0.995, 17 of them 0.997: these are the same photographs; below
# are also different plain trousers. Of the MRI pairs above 0.995, 99.8 %
# differ in at most 6 bits.
MAX_DISTANCE = 6
MIN_CORRELATION = 0.995

MATCH_SIZE = (256, 16_384)
"""Images of two sets that are compared at once, as many as fit in the cache."""
CONFIRM_SIZE = 8192
"""Pairs whose images are correlated at once."""
MAX_PAIRS = 1_000_000
# Of two groups of equal images, above which not each is paired with each.
_MAX_GRID = 100
_NUM_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
  """Two images that are the same, or nearly.

  Attributes:
    kind: `"exact"` or `"near"`.
    between: The names of the two parts.
    ids: The id in each.
    rows: The row in each.
    distance: Differing bits of the perceptual hash, of 64.
    correlation: Of the reduced grey images, in [-1, 1]; 0 for a plain image.
  """

  kind: Kind
  between: tuple[str, str]
  ids: tuple[str, str]
  rows: tuple[int, int]
  distance: int
  correlation: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twins:
  """Twins in a set of parts; `str` makes a table.

  Attributes:
    pairs: Between the parts that were compared: in the order of `between`,
      exact before near, by rows. Of large groups of equal images, each is there
      with one of the other part, and `groups` has all.
    between: The pairs of parts that were compared.
    groups: All groups of two or more exact twins, also within a part, as part
      and id.
    fingerprints: Those of each part, to go on with without reading images.
    max_distance: As given to `find`.
    min_correlation: As given to `find`.
  """

  pairs: tuple[Pair, ...]
  between: tuple[tuple[str, str], ...]
  groups: tuple[tuple[tuple[str, str], ...], ...]
  fingerprints: Mapping[str, Fingerprints] = dataclasses.field(repr=False)
  max_distance: int
  min_correlation: float

  def counts(self) -> dict[tuple[str, str], dict[str, int]]:
    """Returns the number of exact and near pairs for each pair of parts."""
    counts = {names: {"exact": 0, "near": 0} for names in self.between}
    for pair in self.pairs:
      counts[pair.between][pair.kind] += 1
    return counts

  def as_dict(self) -> dict[str, Any]:
    """Returns plain dictionaries, lists and numbers, as JSON takes them."""
    return {
      "max_distance": self.max_distance,
      "min_correlation": self.min_correlation,
      "num_images": {k: len(v) for k, v in self.fingerprints.items()},
      "counts": [
        {"between": list(names), **count}
        for names, count in self.counts().items()
      ],
      "groups": [[list(image) for image in group] for group in self.groups],
      "pairs": [
        dataclasses.asdict(pair)
        | {x: list(getattr(pair, x)) for x in ("between", "ids", "rows")}
        for pair in self.pairs
      ],
    }

  def __str__(self) -> str:
    rows = [("twins between", "exact", "near")]
    for names, count in self.counts().items():
      exact, near = str(count["exact"]), str(count["near"])
      rows.append((f"  {names[0]} and {names[1]}", exact, near))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}} {a:>7} {b:>7}" for name, a, b in rows]
    lines.append(f"{len(self.groups)} groups of exact twins in all")
    lines += [
      f"  {pair.kind:<5}  {pair.between[0]} {pair.ids[0]}  ="
      f"  {pair.between[1]} {pair.ids[1]}"
      for pair in self.pairs[:_NUM_SHOWN]
    ]
    if len(self.pairs) > _NUM_SHOWN:
      lines.append(f"  and {len(self.pairs) - _NUM_SHOWN} more")
    return "\n".join(lines)


def exact_groups(prints: Fingerprints) -> list[np.ndarray]:
  """Returns the rows of each group of two or more exact twins in a set."""
  (codes,) = fingerprints.contents([prints])
  return _groups(codes)


def find(
  parts: Mapping[str, types.Dataset | Fingerprints],
  *,
  pairs: Iterable[tuple[str, str]] | None = None,
  max_distance: int = MAX_DISTANCE,
  min_correlation: float = MIN_CORRELATION,
) -> Twins:
  """Finds exact and near twins between parts of the data.

  Time grows with the product of two parts' sizes (60,000 with 10,000: seconds),
  memory only with their sum.

  Args:
    parts: Data sets, or what `fingerprint` made of them, by name, such as
      `{"forget": ..., "retain": ..., "test": ...}`.
    pairs: The parts to compare; each with each other if not given. A part with
      itself is compared without regard to order.
    max_distance: Bits of the hash that near twins may differ in, 0 to 64.
    min_correlation: How much their reduced grey images must correlate at
      least, in (0, 1]; a measure that light and contrast do not change.

  Returns:
    The twins, with the fingerprints of all parts.

  Raises:
    ValueError: If a name or value is out of its range, or there are more than
      a million pairs.
  """
  if not parts:
    raise ValueError(f"parts must name at least one, got {parts!r}")
  between = (
    tuple(itertools.combinations(parts, 2)) if pairs is None else tuple(pairs)
  )
  for names in between:
    if isinstance(names, str) or len(names) != 2:
      raise ValueError(f"pairs must be of two names each, got {names!r}")
    for name in names:
      checks.one_of("pairs: each name", name, parts)
  between = tuple(dict.fromkeys((a, b) for a, b in between))
  checks.integer("max_distance", max_distance, at_least=0)
  if max_distance > fingerprints.HASH_SIZE**2:
    raise ValueError(f"max_distance must be at most 64, got {max_distance}")
  checks.number("min_correlation", min_correlation, above=0, at_most=1)
  prints = {
    name: part if isinstance(part, Fingerprints) else fingerprint(part)
    for name, part in parts.items()
  }
  codes = dict(
    zip(prints, fingerprints.contents(list(prints.values())), strict=True)
  )
  listed: list[Pair] = []
  for names in between:
    a, b = ((prints[name], codes[name]) for name in names)
    kinds: dict[Kind, np.ndarray] = {
      "exact": _equal(a[1], b[1]),
      "near": _near_images(a, b, max_distance, min_correlation),
    }
    for kind, rows in kinds.items():
      if names[0] == names[1]:
        rows = rows[:, rows[0] < rows[1]]
      listed += _pairs(kind, names, a[0], b[0], rows)
  images = [(name, str(id_)) for name in prints for id_ in prints[name].ids]
  return Twins(
    pairs=tuple(listed),
    between=between,
    groups=tuple(
      tuple(images[row] for row in group)
      for group in _groups(np.concatenate(list(codes.values())))
    ),
    fingerprints=prints,
    max_distance=int(max_distance),
    min_correlation=float(min_correlation),
  )


def moved_rows(
  duplicates: Twins,
  *,
  near: bool = False,
  groups: Mapping[str, int] | None = None,
) -> np.ndarray:
  """Returns the retained images that must be forgotten as twins.

  Twins of twins count as well, and with `groups` all images of a group and
  their twins, until there are none.

  Args:
    duplicates: Twins of parts that include `"forget"` and `"retain"`.
    near: Whether near twins count, by the limits of `found`.
    groups: The number of each image's group, by id, such as those of
      `forget.group_codes`.

  Returns:
    Rows of the retain set in ascending order.

  Raises:
    ValueError: If `found` lacks one of the two parts.
  """
  for name in ("forget", "retain"):
    if name not in duplicates.fingerprints:
      raise ValueError(
        f"found must have the parts forget and retain, got"
        f" {list(duplicates.fingerprints)}"
      )
  forget, retain = (
    duplicates.fingerprints[name] for name in ("forget", "retain")
  )
  kinds = [fingerprints.contents([forget, retain])]
  if groups is not None:
    kinds.append(
      [np.array([groups[x] for x in part.ids]) for part in (forget, retain)]
    )
  everything = forget + retain
  contents = np.concatenate(kinds[0])
  is_moved = np.zeros(len(retain), bool)
  newest = np.arange(len(forget))
  while len(newest):
    before = is_moved.copy()
    for forgotten, codes in kinds:
      is_moved |= np.isin(codes, np.append(forgotten, codes[is_moved]))
    if near:
      added = len(forget) + np.flatnonzero(is_moved & ~before)
      newest = np.append(newest, added)
      rest = np.flatnonzero(~is_moved)
      # Equal images are compared as one; the next turn takes the others.
      newest = newest[_firsts(contents[newest])]
      rest = rest[_firsts(kinds[0][1][rest])]
      _, matches = _near(
        everything.take(newest),
        retain.take(rest),
        duplicates.max_distance,
        duplicates.min_correlation,
      )
      is_moved[rest[matches]] = True
    newest = len(forget) + np.flatnonzero(is_moved & ~before)
  return np.flatnonzero(is_moved)


def move(
  split: types.Split,
  duplicates: Twins | None = None,
  *,
  near: bool = False,
  groups: Mapping[str, int] | None = None,
  dataset: types.Dataset | None = None,
) -> types.Split:
  """Takes the retained twins of forgotten images into the forget set.

  Args:
    split: The two parts.
    duplicates: Twins of parts that include these two as `"forget"` and
      `"retain"`;
      looked for with the default limits if not given.
    near: Whether near twins move as well; see `moved_rows`.
    groups: What is forgotten as a whole; see `moved_rows`.
    dataset: The set that was split, in whose order both parts are then. If not
      given, the moved images stand behind those that were forgotten.

  Returns:
    The parts, the same objects if nothing moves.

  Raises:
    ValueError: If `found` or `dataset` is not of this split, or no image would
      be retained.
  """
  if duplicates is None:
    duplicates = find(split._asdict())
  rows = moved_rows(duplicates, near=near, groups=groups)
  for name, part in split._asdict().items():
    if not np.array_equal(duplicates.fingerprints[name].ids, part.ids):
      raise ValueError(f"found must be of this split, got other ids in {name}")
  if not len(rows):
    return split
  if len(rows) == len(split.retain):
    raise ValueError(
      f"split must retain an image, got twins of all {len(rows)} retained"
    )
  if dataset is None:
    is_moved = np.isin(np.arange(len(split.retain)), rows)
    return types.Split(
      forget=concatenate(split.forget, split.retain.take(rows)),
      retain=split.retain.take(~is_moved),
    )
  ids, forgotten, retained = (
    np.asarray(part.ids) for part in (dataset, split.forget, split.retain)
  )
  if not np.array_equal(
    np.sort(ids), np.sort(np.concatenate([forgotten, retained]))
  ):
    raise ValueError(
      f"dataset must be what was split, got {len(ids)} images for"
      f" {len(forgotten)} and {len(retained)}, or other ids"
    )
  is_forgotten = np.isin(ids, np.concatenate([forgotten, retained[rows]]))
  return types.Split(
    forget=dataset.take(is_forgotten), retain=dataset.take(~is_forgotten)
  )


def _groups(codes: np.ndarray) -> list[np.ndarray]:
  """The rows of each number that occurs twice or more, by first row."""
  order = np.argsort(codes, kind="stable")
  starts = np.flatnonzero(np.diff(codes[order])) + 1
  groups = [rows for rows in np.split(order, starts) if len(rows) > 1]
  return sorted(groups, key=lambda rows: int(rows[0]))


# Comparisons; each gives rows of both sets, `[2, P]`, in order.


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  codes = np.intersect1d(a, b)
  return _spread(a, b, np.stack([codes, codes]))


def _spread(a: np.ndarray, b: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Returns the images of pairs of codes.

  Of small groups it is each with each; of others, such as a thousand blank
  images, each with the first of the other side, so that their number grows as
  that of the images.

  Args:
    a: The codes of one set.
    b: Those of the other.
    pairs: Codes of both, `[2, P]`.
  """
  sides = _rows_by_code(a), _rows_by_code(b)
  matches = [np.zeros((2, 0), np.int64)]
  number = 0
  for codes in zip(*pairs.tolist(), strict=True):
    left, right = (side[code] for side, code in zip(sides, codes, strict=True))
    if len(left) * len(right) <= _MAX_GRID:
      rows = [np.repeat(left, len(right)), np.tile(right, len(left))]
    else:
      rows = [
        np.append(left, np.full(len(right) - 1, left[0])),
        np.append(np.full(len(left), right[0]), right[1:]),
      ]
    matches.append(np.stack(rows))
    number += len(rows[0])
    _check_number(number)
  return _in_order(matches)


def _in_order(parts: Sequence[np.ndarray]) -> np.ndarray:
  rows = np.concatenate(parts, axis=1)
  return rows[:, np.lexsort(rows[::-1])]


def _rows_by_code(codes: np.ndarray) -> dict[int, np.ndarray]:
  order = np.argsort(codes, kind="stable")
  known, starts = np.unique(codes[order], return_index=True)
  return dict(zip(known.tolist(), np.split(order, starts[1:]), strict=False))


def _firsts(codes: np.ndarray) -> np.ndarray:
  """The first row of each code, in order."""
  return np.sort(np.unique(codes, return_index=True)[1])


def _near_images(
  a: tuple[Fingerprints, np.ndarray],
  b: tuple[Fingerprints, np.ndarray],
  max_distance: int,
  min_correlation: float,
) -> np.ndarray:
  """Compares two sets with their codes; equal images are compared as one."""
  sides = [(prints, codes, _firsts(codes)) for prints, codes in (a, b)]
  first, second = (prints.take(rows) for prints, _, rows in sides)
  near = _near(first, second, max_distance, min_correlation)
  pairs = np.stack(
    [
      codes[rows[places]]
      for (_, codes, rows), places in zip(sides, near, strict=True)
    ]
  )
  return _spread(a[1], b[1], pairs[:, pairs[0] != pairs[1]])


def _near(
  a: Fingerprints, b: Fingerprints, max_distance: int, min_correlation: float
) -> np.ndarray:
  matches = [np.zeros((2, 0), np.int64)]
  number = 0
  for rows in _candidates(a.hashes, b.hashes, max_distance):
    is_near = _correlate(a, b, rows) >= min_correlation
    matches.append(rows[:, is_near])
    number += int(is_near.sum())
    _check_number(number)
  return _in_order(matches)


def _candidates(
  a: np.ndarray, b: np.ndarray, max_distance: int
) -> Iterator[np.ndarray]:
  """Yields rows whose hashes are close.

  Counting bits takes 1 ns a pair, a sixth of what products of ±1 take.
  """
  height, width = MATCH_SIZE
  for top in range(0, len(a), height):
    for left in range(0, len(b), width):
      part = a[top : top + height, None] ^ b[None, left : left + width]
      flat = np.flatnonzero(np.bitwise_count(part) <= max_distance)
      rows, columns = np.unravel_index(flat, part.shape)
      yield np.stack([rows + top, columns + left])


def _correlate(
  a: Fingerprints, b: Fingerprints, rows: np.ndarray
) -> np.ndarray:
  """Correlates reduced images pair by pair; 0 where one is plain."""
  correlations = [np.zeros(0, np.float32)]
  for start in range(0, rows.shape[1], CONFIRM_SIZE):
    part = rows[:, start : start + CONFIRM_SIZE]
    x, y = _centre(a.greys[part[0]]), _centre(b.greys[part[1]])
    products = np.einsum("pd,pd->p", x, y)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    correlations.append(products / np.maximum(norms, 1e-6))
  return np.concatenate(correlations)


def _centre(greys: np.ndarray) -> np.ndarray:
  flat = greys.reshape(len(greys), -1).astype(np.float32)
  return flat - flat.mean(axis=1, keepdims=True)


def _pairs(
  kind: Kind,
  names: tuple[str, str],
  a: Fingerprints,
  b: Fingerprints,
  rows: np.ndarray,
) -> list[Pair]:
  distances = np.bitwise_count(a.hashes[rows[0]] ^ b.hashes[rows[1]])
  correlations = _correlate(a, b, rows)
  return [
    Pair(
      kind=kind,
      between=names,
      ids=(str(a.ids[i]), str(b.ids[j])),
      rows=(int(i), int(j)),
      distance=int(distance),
      correlation=round(float(correlation), 6),
    )
    for i, j, distance, correlation in zip(
      *rows, distances, correlations, strict=True
    )
  ]


def concatenate(a: types.Dataset, b: types.Dataset) -> types.Dataset:
  """Joins two sets of the same classes; what is on disk is not read."""
  has_metadata = a.metadata is not None and b.metadata is not None
  return types.Dataset(
    images=cast(np.ndarray, streaming.concatenate([a.images, b.images])),
    labels=np.concatenate([a.labels, b.labels]),
    class_names=a.class_names,
    ids=np.concatenate([a.ids, b.ids]),
    metadata=(
      pa.concat_tables([a.metadata, b.metadata]) if has_metadata else None
    ),
  )


def _check_number(number: int) -> None:
  if number > MAX_PAIRS:
    raise ValueError(
      f"parts must have at most {MAX_PAIRS} pairs of twins, got {number}: are"
      " there plain images?"
    )
