"""What the builders of images in class folders share.

Such a builder makes a `Plan` of the source before anything is decoded; the
rest, from reading the files to writing the records, is the same for all.
"""

import csv
import functools
import hashlib
import pathlib
import types
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data_prep import base, dicom, images, registry, sources, tables
from psg_jax import checks, data

_DEFAULT_SEED = 0


class Plan(NamedTuple):
  """What is made of a source.

  Attributes:
    tree: The raw files.
    class_names: In the order of the labels.
    splits: Split -> path and label of each image, sorted by path.
    table: Metadata of the user, if any.
    notes: What the user should know, a phrase each.
    metadata: Of a table of the user beside the source, its content.
  """

  tree: sources.Tree
  class_names: tuple[str, ...]
  splits: Mapping[str, list[tuple[str, int]]]
  table: tables.Table | None = None
  notes: tuple[str, ...] = ()
  metadata: bytes | None = None

  @property
  def fingerprint(self) -> dict[str, str | None]:
    """What tells whether the source is as it was; see `fingerprint`."""
    return _fingerprint(self.tree, self.metadata)


class ImageTreeBuilder(base.ImageBuilder):
  """Base of the builders of images in class folders.

  The columns of every set are `file` (the path in the source), `sha256` (of
  the raw file), `width` and `height` (of the raw image, upright, in pixels),
  and then those of the user's table.
  """

  OPTIONS = frozenset({"size", "fit", "window", "is_skipping_corrupt"})
  DESCRIPTION = ""
  FACTS: Mapping[str, str] = types.MappingProxyType({})
  """To `tfds.core.DatasetInfo`: homepage, citation, license."""

  def __init__(self, **kwargs: Any) -> None:
    # Path -> why.
    self._corrupt: dict[str, str] = {}
    # Path -> number of images in the file, where there are several.
    self._pages: dict[str, int] = {}
    self._ranges: dict[str, images.Range] = {}
    self._range_notes: list[str] = []
    # SHA-256 -> split -> number of files.
    self._copies: dict[str, dict[str, int]] = {}
    self._num_kept: dict[tuple[str, int], int] = {}
    super().__init__(**kwargs)

  @property
  def public_name(self) -> str:
    """The builder's name without TFDS's prefix."""
    return self.name.removeprefix("psg_")

  @property
  def size(self) -> int:
    """Pixels a side of the images."""
    return self.options.size or registry.SIZES[self.public_name]

  @property
  def fit(self) -> str:
    """How images are made square, one of `images.FITS`."""
    return self.options.fit or images.FITS[0]

  @property
  def window(self) -> str:
    """How DICOM files become grey levels; see `images.encode`."""
    return self.options.window or dicom.WINDOWS[0]

  @property
  def seed(self) -> int:
    """Of the split and of the order of the rows."""
    seed = self.options.seed
    return _DEFAULT_SEED if seed is None else seed

  def settings(self) -> dict[str, Any]:
    """Returns the options with those by default, and the source."""
    resolved = {"size": self.size, "fit": self.fit, "seed": self.seed}
    return self.options.given() | {
      "source": base.absolute(self._found_source()),
      **{name: resolved[name] for name in resolved if name in self.OPTIONS},
    }

  def make_plan(self, source: pathlib.Path) -> Plan:
    """Says what to make of the source; raises ValueError if it cannot be."""
    raise NotImplementedError

  @functools.cached_property
  def plan(self) -> Plan:
    """The plan, checked."""
    checks.one_of("fit", self.fit, images.FITS)
    dicom.parse_window(self.window)
    plan = self.make_plan(self._found_source())
    if len(plan.class_names) < 2:
      raise ValueError(
        "source must have at least two classes, got only"
        f" {plan.class_names[0]!r} in {plan.tree.name!r}"
      )
    _check_text(plan)
    return plan._replace(notes=(*plan.notes, *_alike(plan.class_names)))

  def write(self, root: pathlib.Path) -> None:
    """Writes all splits, as any builder, without the decoders' warnings."""
    with warnings.catch_warnings():
      # They name no file, and what is wrong with one is said in the end.
      warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\.")
      self._find_ranges()
      super().write(root)

  def _find_ranges(self) -> None:
    """Looks for the values of all images of more than 8 bits."""
    plan = self.plan
    found: dict[str, list[images.Range]] = {}
    for _, each in images.ordered_map(self._value_range, _paths(plan)):
      if each is not None:
        found.setdefault(each.kind, []).append(each)
    ranges = [each for group in found.values() for each in group]
    self._ranges = images.set_ranges(ranges)
    self._range_notes = [
      _say_range(self._ranges[kind], group) for kind, group in found.items()
    ]

  def _value_range(self, path: str) -> images.Range | None:
    read = self.plan.tree.read
    try:
      if not images.may_be_deep(read(path, sources.HEAD_BYTES)):
        return None
      return images.value_range(read(path), window=self.window)
    # What is wrong with the file is said when it is encoded.
    except (OSError, ValueError):
      return None

  def finish(self) -> Sequence[str]:
    """Says what was left out and what is there twice.

    Returns:
      A phrase each.

    Raises:
      ValueError: If images could not be decoded and were not to be left out,
        or a class has no image for training.
    """
    num_images = len(_paths(self.plan))
    corrupt = f"{len(self._corrupt):,} of {num_images:,} images"
    shown = tables.first(
      [f"{path} ({why})" for path, why in self._corrupt.items()]
    )
    if self._corrupt and not self.options.is_skipping_corrupt:
      raise ValueError(
        f"source must hold images that can be decoded, got {corrupt} that"
        f" cannot in {self.plan.tree.name!r}: {shown};"
        " --skip_corrupt leaves them out"
      )
    for label, name in enumerate(self.plan.class_names):
      if not self._num_kept.get(("train", label)):
        raise ValueError(
          f"source must have images of every class in train, got none of"
          f" {name!r} in {self.plan.tree.name!r}"
        )
    notes = list(self.plan.notes)
    if self._corrupt:
      notes.append(f"left out {corrupt} that cannot be decoded: {shown}")
      self.info.metadata["skipped"] = [
        f"{path} ({why})" for path, why in self._corrupt.items()
      ]
    return [
      *notes,
      *self._account(),
      *self._range_notes,
      *self._copy_notes(),
    ]

  def _account(self) -> list[str]:
    """Records what became of every file of the source, and says it."""
    plan, root = self.plan, self.plan.tree.root
    kept = [path for path in _paths(plan) if path not in self._corrupt]
    left_out = _left_out(plan)
    items = sources.sum_up(left_out)
    num_files = len(kept) + len(left_out) + len(self._corrupt)
    num_pages = sum(self._pages.values()) - len(self._pages)
    self.info.metadata["account"] = {
      "files": num_files,
      "read": len(kept),
      "left_out": sources.sum_up(
        left_out | {root + path: "cannot be decoded" for path in self._corrupt}
      ),
      "further_pages": {"pages": num_pages, "files": len(self._pages)},
    }
    self.info.metadata["fingerprint"] = plan.fingerprint
    settings = self.info.metadata["settings"]
    if any(plan.tree.kind(path) == "DICOM" for path in kept):
      settings["window"] = self.window
    if self._ranges:
      settings["ranges"] = {
        kind: [each.low, each.high] for kind, each in self._ranges.items()
      }
    notes = []
    if items:
      advice = ""
      if any("pydicom" in item["why"] for item in items):
        advice = dicom.ADVICE
      notes.append(f"left out: {sources.describe(items)}{advice}")
    if num_pages:
      notes.append(
        f"left out: {num_pages:,} further pages of {len(self._pages):,} files"
        f" ({tables.first(list(self._pages))})"
      )
    return notes

  def _copy_notes(self) -> list[str]:
    groups = [
      splits for splits in self._copies.values() if sum(splits.values()) > 1
    ]
    if not groups:
      return []
    num_across = sum(len(splits) > 1 for splits in groups)
    return [
      f"{len(groups):,} files are there more than once, {num_across:,} of them"
      " in train and test alike (equal sha256)"
    ]

  def _found_source(self) -> pathlib.Path:
    if self.source is None:
      raise ValueError(
        f"source must be given for {self.public_name!r}: a folder or zip of"
        f" images{self.advice()}"
      )
    return self.source

  def advice(self) -> str:
    """Returns where the raw files are to be had, to follow a message."""
    return ""

  def _info(self) -> tfds.core.DatasetInfo:
    table = self.plan.table
    types = {} if table is None else dict(table.types)
    types.pop(tables.LABEL_COLUMN, None)
    return self.image_info(
      description=self.DESCRIPTION,
      class_names=self.plan.class_names,
      image_shape=(self.size, self.size, 3),
      origin=str(self.source),
      columns={
        "file": tfds.features.Text(),
        "sha256": tfds.features.Text(),
        "width": np.int64,
        "height": np.int64,
        **types,
      },
      **self.FACTS,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    return {
      split: self._generate_examples(split, self.plan.splits[split])
      for split in data.SPLITS
    }

  def _generate_examples(
    self, split: str, pairs: list[tuple[str, int]]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from self.records(split, self._examples(split, pairs), len(pairs))

  def _examples(
    self, split: str, pairs: list[tuple[str, int]]
  ) -> Iterator[base.Example]:
    # Sorted by class, the first rows would be of one class.
    order = np.random.default_rng(self.seed).permutation(len(pairs))
    rows = row_columns(self.plan.table)
    empty = dict.fromkeys(next(iter(rows.values()), {}))
    for (path, label), encoded in images.ordered_map(
      self._encode, [pairs[index] for index in order]
    ):
      if isinstance(encoded, str):
        self._corrupt[path] = encoded
        continue
      if encoded.num_pages > 1:
        self._pages[path] = encoded.num_pages
      copies = self._copies.setdefault(encoded.sha256, {})
      copies[split] = copies.get(split, 0) + 1
      key = (split, label)
      self._num_kept[key] = self._num_kept.get(key, 0) + 1
      yield base.Example(
        image=encoded.png,
        label=label,
        id=path,
        columns={
          "file": path,
          "sha256": encoded.sha256,
          "width": encoded.width,
          "height": encoded.height,
          **rows.get(path, empty),
        },
      )

  def _encode(self, pair: tuple[str, int]) -> images.Encoded | str:
    """Reads and encodes an image, or returns why that is not possible."""
    try:
      content = self.plan.tree.read(pair[0])
      return images.encode(
        content,
        size=self.size,
        fit=self.fit,
        ranges=self._ranges,
        window=self.window,
      )
    except (OSError, ValueError) as error:
      return " ".join(str(error).split())


def fingerprint(
  source: pathlib.Path, metadata: str | None = None
) -> dict[str, str | None]:
  """Returns what changes with a source and its table.

  Args:
    source: The folder or zip.
    metadata: A table beside it.

  Returns:
    `files` and `metadata`, a SHA-256 each; None without a table.

  Raises:
    ValueError: If one of them cannot be read.
  """
  content = None if metadata is None else read_file(metadata)
  return _fingerprint(sources.list_files(source), content)


def _fingerprint(
  tree: sources.Tree, metadata: bytes | None
) -> dict[str, str | None]:
  digest = None if metadata is None else hashlib.sha256(metadata).hexdigest()
  return {"files": tree.fingerprint, "metadata": digest}


def _alike(class_names: Sequence[str]) -> list[str]:
  """Says which classes may be meant to be one."""
  groups: dict[str, list[str]] = {}
  for name in class_names:
    groups.setdefault(checks.folded(name), []).append(name)
  return [
    f"the classes {' and '.join(map(ascii, names))} differ in case, blanks or"
    " the form of letters alone: join their folders if they are one"
    for names in groups.values()
    if len(names) > 1
  ]


def _paths(plan: Plan) -> list[str]:
  return [path for pairs in plan.splits.values() for path, _ in pairs]


def _left_out(plan: Plan) -> dict[str, str]:
  """Returns every file that is no image of the set -> why."""
  tree, used = plan.tree, {*_paths(plan)}
  if plan.table is not None and plan.metadata is None:
    used.add(METADATA_FILE)
  rest = {path: tree.reason(path) for path in tree.paths if path not in used}
  return dict(tree.without(rest).left_out)


def _say_range(known: images.Range, group: Sequence[images.Range]) -> str:
  bits = "" if known.num_bits is None else f" ({known.num_bits} bits)"
  said = (
    f"{len(group):,} images in {known.kind}: {known.low:g} becomes black and"
    f" {known.high:g} white{bits}"
  )
  middle = float(np.median([each.high for each in group]))
  if middle - known.low < (known.high - known.low) / 8:
    said += f", half of them stay below {middle:g} and come out dark"
  return said


def read_headers(
  tree: sources.Tree,
) -> tuple[sources.Tree, dict[str, dict[str, str | None]]]:
  """Reads the headers of DICOM files.

  Args:
    tree: The raw files.

  Returns:
    The files without those that hold no image, and path -> columns.
  """
  if not dicom.is_available():
    return tree, {}
  paths = [path for path in tree.paths if tree.kind(path) == "DICOM"]
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    found = dict(
      images.ordered_map(
        lambda path: dicom.read_columns(tree.read(path)), paths
      )
    )
  empty = {path for path, columns in found.items() if columns is None}
  return (
    tree.without(dict.fromkeys(empty, "DICOM without an image")),
    {path: columns for path, columns in found.items() if columns is not None},
  )


def add_columns(
  table: tables.Table | None,
  headers: Mapping[str, Mapping[str, str | None]],
  paths: Container[str],
) -> tuple[tables.Table | None, tuple[str, ...]]:
  """Adds what DICOM headers say to the user's table, which goes before.

  Args:
    table: The table, if any.
    headers: Path -> columns, as `read_headers` returns them.
    paths: Of the images; other headers are left out.

  Returns:
    The table, and what the user should know.
  """
  headers = {path: headers[path] for path in headers if path in paths}
  table = table or tables.Table("the DICOM headers", (), {}, {})
  own = {name.casefold() for name in table.texts}
  names = [name for name in dicom.COLUMNS if name not in own]
  if not headers or not names:
    return (table if table.files else None), ()
  listed = set(table.files)
  files = (*table.files, *(path for path in headers if path not in listed))
  more = len(files) - len(table.files)
  texts = {
    name: [*values, *[None] * more] for name, values in table.texts.items()
  }
  for name in names:
    texts[name] = [headers.get(file, {}).get(name) for file in files]
  kinds = {name: dicom.COLUMNS[name][1] for name in names}
  return (
    tables.Table(table.name, files, {**table.types, **kinds}, texts),
    (f"{', '.join(names)} of {len(headers):,} images from DICOM headers",),
  )


def row_columns(
  table: tables.Table | None,
) -> dict[str, dict[str, str | None]]:
  """Returns the columns of each file in a table, but for its label."""
  if table is None:
    return {}
  names = [name for name in table.texts if name != tables.LABEL_COLUMN]
  values = zip(*(table.texts[name] for name in names), strict=True)
  if not names:
    return {}
  return {
    file: dict(zip(names, row, strict=True))
    for file, row in zip(table.files, values, strict=True)
  }


def read_table(
  tree: sources.Tree,
  classes: Mapping[str, str],
  *,
  path: str | None,
  encoding: str | None,
) -> tuple[tables.Table | None, tuple[str, ...]]:
  """Reads the metadata of a source and holds it against the images.

  Args:
    tree: The raw files; its `metadata.csv`, if any, is read where `path` is
      None.
    classes: Path of each image -> its class.
    path: Another CSV file.
    encoding: Of the table; None to find out.

  Returns:
    The table, or None where there is none, and what the user should know.

  Raises:
    ValueError: If the table is not of the right form, or names files that do
      not exist or are in the folder of another class.
  """
  if path is not None:
    content, name = read_file(path), path
  elif METADATA_FILE in tree.paths:
    content, name = tree.read(METADATA_FILE), f"{tree.name}/{METADATA_FILE}"
  else:
    if encoding is not None:
      raise ValueError(
        f"encoding must not be given without metadata, got {encoding!r}"
      )
    return None, ()
  try:
    table = tables.read(content, name, encoding=encoding)
  except csv.Error as error:
    raise ValueError(
      f"metadata must be a CSV table, got {name!r}: {error}"
    ) from error
  files = _below_root(table.files, tree.root, classes)
  if len(set(files)) < len(files):
    raise ValueError(
      f"metadata must name each file once, got some of {tree.root!r} with and"
      f" without that folder in {name!r}"
    )
  table = table._replace(files=files)
  rows = tables.match(table, classes)
  # As the files are called, whatever form of Unicode the table has.
  table = table._replace(files=tuple(rows))
  tables.check_labels(table, classes)
  without = [file for file in classes if file not in rows]
  if not without:
    return table, table.notes
  return table, (
    *table.notes,
    f"{len(without):,} of {len(classes):,} images have no row in {name}:"
    f" {tables.first(without)}",
  )


METADATA_FILE = sources.METADATA_FILE


def _below_root(
  files: Sequence[str], root: str, paths: Container[str]
) -> tuple[str, ...]:
  """Takes the folders that were made the root from the paths of a table."""
  starts = [root[end:] for end, c in enumerate(f"/{root}") if c == "/"][:-1]

  def below(file: str) -> str:
    if file in paths:
      return file
    found = [file.removeprefix(each) for each in starts]
    return next((each for each in found if each in paths), file)

  return tuple(below(file) for file in files)


def read_file(path: str) -> bytes:
  """Reads the user's table; raises ValueError if it cannot be read."""
  try:
    return pathlib.Path(path).expanduser().read_bytes()
  except OSError as error:
    raise ValueError(
      f"metadata must be a CSV file, got {path!r}: {error.strerror}"
    ) from error


def _check_text(plan: Plan) -> None:
  """Raises ValueError if a name cannot be stored."""
  for name in (*plan.class_names, *plan.tree.paths):
    try:
      name.encode()
    except UnicodeEncodeError:
      raise ValueError(
        f"source must have names in UTF-8, got {name!r} in {plan.tree.name!r}"
      ) from None
  for name in plan.class_names:
    if not name.isprintable() or name != name.strip():
      raise ValueError(
        "source must have classes of printable names without spaces around"
        f" them, got {name!r} in {plan.tree.name!r}"
      )
