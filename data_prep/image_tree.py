"""What the builders of images in class folders share.

Such a builder makes a `Plan` of the source before anything is decoded; the
rest, from reading the files to writing the records, is the same for all.
"""

import functools
import pathlib
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data_prep import base, images, registry, sources, tables
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
  """

  tree: sources.Tree
  class_names: tuple[str, ...]
  splits: Mapping[str, list[tuple[str, int]]]
  table: tables.Table | None = None
  notes: tuple[str, ...] = ()


class ImageTreeBuilder(base.ImageBuilder):
  """Base of the builders of images in class folders.

  The columns of every set are `file` (the path in the source), `sha256` (of
  the raw file), `width` and `height` (of the raw image, upright, in pixels),
  and then those of the user's table.
  """

  OPTIONS = frozenset({"size", "fit", "is_skipping_corrupt"})
  DESCRIPTION = ""
  FACTS: Mapping[str, str] = types.MappingProxyType({})
  """To `tfds.core.DatasetInfo`: homepage, citation, license."""

  def __init__(self, **kwargs: Any) -> None:
    self._corrupt: list[str] = []
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
    plan = self.make_plan(self._found_source())
    if len(plan.class_names) < 2:
      raise ValueError(
        "source must have at least two classes, got only"
        f" {plan.class_names[0]!r} in {plan.tree.name!r}"
      )
    _check_text(plan)
    return plan

  def write(self) -> None:
    """Writes all splits, as any builder, without Pillow's warnings."""
    with warnings.catch_warnings():
      # They name no file, and what is wrong with one is said in the end.
      warnings.filterwarnings("ignore", module=r"PIL\.")
      super().write()

  def finish(self) -> Sequence[str]:
    """Says what was left out and what is there twice.

    Returns:
      A phrase each.

    Raises:
      ValueError: If images could not be decoded and were not to be left out,
        or a class has no image for training.
    """
    num_images = sum(len(pairs) for pairs in self.plan.splits.values())
    corrupt = f"{len(self._corrupt):,} of {num_images:,} images"
    if self._corrupt and not self.options.is_skipping_corrupt:
      raise ValueError(
        f"source must hold images that can be decoded, got {corrupt} that"
        f" cannot in {self.plan.tree.name!r}: {tables.first(self._corrupt)};"
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
      notes.append(
        f"left out {corrupt} that cannot be decoded:"
        f" {tables.first(self._corrupt)}"
      )
      self.info.metadata["skipped"] = self._corrupt
    return [*notes, *self._copy_notes()]

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
        self._corrupt.append(f"{path} ({encoded})")
        continue
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
      return images.encode(content, size=self.size, fit=self.fit)
    except (OSError, ValueError) as error:
      return " ".join(str(error).split())


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
    content, name = _read_file(path), path
  elif METADATA_FILE in tree.paths:
    content, name = tree.read(METADATA_FILE), f"{tree.name}/{METADATA_FILE}"
  else:
    if encoding is not None:
      raise ValueError(
        f"encoding must not be given without metadata, got {encoding!r}"
      )
    return None, ()
  table = tables.read(content, name, encoding=encoding)
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


METADATA_FILE = "metadata.csv"


def _read_file(path: str) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
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
