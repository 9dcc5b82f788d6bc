"""What the builders of images in class folders share.

Such a builder makes a `Plan` of the source before anything is decoded; the
rest, from reading the files to writing the records, is the same for all.
"""

import collections
import functools
import pathlib
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data_prep import (
  builder,
  depths,
  dicom,
  images,
  sources,
  tables,
  threads,
  trees,
)
from psg_jax import checks

_DEFAULT_SEED = 0


class Plan(NamedTuple):
  """What is made of a source.

  Attributes:
    tree: The raw files.
    class_names: In the order of the labels.
    splits: Split -> its images.
    table: Metadata of the user, if any.
    notes: What the user should know, a phrase each.
    metadata: Of a table of the user beside the source, its content.
  """

  tree: trees.Tree
  class_names: tuple[str, ...]
  splits: Mapping[str, sources.Pairs]
  table: tables.Table | None = None
  notes: tuple[str, ...] = ()
  metadata: bytes | None = None

  @property
  def paths(self) -> list[str]:
    """The path of each image."""
    return [path for pairs in self.splits.values() for path, _ in pairs]

  @property
  def left_out(self) -> dict[str, str]:
    """Every file that is no image of the set -> why."""
    used = {*self.paths}
    if self.table is not None and self.metadata is None:
      used.add(trees.METADATA_FILE)
    rest = [path for path in self.tree.entries if path not in used]
    reasons = {path: self.tree.reason(path) for path in rest}
    return dict(self.tree.without(reasons).left_out)


class ImageTreeBuilder(builder.ImageBuilder):
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
    # Path -> why it cannot be decoded.
    self._corrupt: dict[str, str] = {}
    # Path -> what is known of the image, without its pixels.
    self._kept: dict[str, images.Encoded] = {}
    self._ranges: dict[str, depths.Range] = {}
    self._range_notes: list[str] = []
    super().__init__(**kwargs)

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
      "source": builder.absolute(self._named_source()),
      **{name: resolved[name] for name in resolved if name in self.OPTIONS},
    }

  def make_plan(self, source: pathlib.Path) -> Plan:
    """Says what to make of the source; raises ValueError if it cannot be."""
    raise NotImplementedError

  def advice(self) -> str:
    """Returns where the raw files are to be had, to follow a message."""
    return ""

  @functools.cached_property
  def plan(self) -> Plan:
    """The plan, checked."""
    checks.one_of("fit", self.fit, images.FITS)
    dicom.parse_window(self.window)
    plan = self.make_plan(self._named_source())
    if len(plan.class_names) < 2:
      raise ValueError(
        "source must have at least two classes, got only"
        f" {plan.class_names[0]!r} in {plan.tree.name!r}"
      )
    _check_text(plan)
    return plan._replace(notes=(*plan.notes, *_alike(plan.class_names)))

  def _named_source(self) -> pathlib.Path:
    if self.source is None:
      raise ValueError(
        f"source must be given for {self.public_name!r}: a folder or zip of"
        f" images{self.advice()}"
      )
    return self.source

  def _info(self) -> tfds.core.DatasetInfo:
    table = self.plan.table
    kinds = {} if table is None else dict(table.types)
    kinds.pop(tables.LABEL_COLUMN, None)
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
        **kinds,
      },
      **self.FACTS,
    )

  def write(self, root: pathlib.Path) -> None:
    """Writes all splits, as any builder, without the decoders' warnings."""
    with warnings.catch_warnings():
      # They name no file, and what is wrong with one is said in the end.
      warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\.")
      self._find_ranges()
      super().write(root)

  def _find_ranges(self) -> None:
    """Looks for the values of all images of more than 8 bits."""
    groups: dict[str, list[depths.Range]] = {}
    for _, values in threads.ordered_map(self._value_range, self.plan.paths):
      if values is not None:
        groups.setdefault(values.kind, []).append(values)
    self._ranges = depths.set_ranges(
      values for group in groups.values() for values in group
    )
    self._range_notes = [
      _say_range(self._ranges[kind], group) for kind, group in groups.items()
    ]

  def _value_range(self, path: str) -> depths.Range | None:
    read = self.plan.tree.read
    try:
      if not images.may_be_deep(read(path, trees.HEAD_BYTES)):
        return None
      return images.value_range(read(path), window=self.window)
    # What is wrong with the file is said when it is encoded.
    except (OSError, ValueError):
      return None

  def splits(self) -> builder.Splits:
    """Encodes the images of the plan."""
    return {
      split: (self._examples(self.plan.splits[split]), len(pairs))
      for split, pairs in self.plan.splits.items()
    }

  def _examples(self, pairs: sources.Pairs) -> Iterator[builder.Example]:
    # Sorted by class, the first rows would be of one class.
    order = np.random.default_rng(self.seed).permutation(len(pairs))
    table = self.plan.table
    rows = {} if table is None else table.rows()
    empty = dict.fromkeys(next(iter(rows.values()), {}))
    for (path, label), encoded in threads.ordered_map(
      self._encode, [pairs[index] for index in order]
    ):
      if isinstance(encoded, str):
        self._corrupt[path] = encoded
        continue
      self._kept[path] = encoded._replace(png=b"")
      yield builder.Example(
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
      return images.encode(
        self.plan.tree.read(pair[0]),
        size=self.size,
        fit=self.fit,
        ranges=self._ranges,
        window=self.window,
      )
    except (OSError, ValueError) as error:
      return " ".join(str(error).split())

  def finish(self) -> Sequence[str]:
    """Says what was left out and what is there twice.

    Returns:
      A phrase each.

    Raises:
      ValueError: If images could not be decoded and were not to be left out,
        or a class has no image for training.
    """
    plan = self.plan
    skipped = [f"{path} ({why})" for path, why in self._corrupt.items()]
    corrupt = f"{len(skipped):,} of {len(plan.paths):,} images"
    shown = checks.few(skipped)
    if skipped and not self.options.is_skipping_corrupt:
      raise ValueError(
        f"source must hold images that can be decoded, got {corrupt} that"
        f" cannot in {plan.tree.name!r}: {shown}; --skip_corrupt leaves them"
        " out"
      )
    trained = {x for path, x in plan.splits["train"] if path in self._kept}
    for label, name in enumerate(plan.class_names):
      if label not in trained:
        raise ValueError(
          f"source must have images of every class in train, got none of"
          f" {name!r} in {plan.tree.name!r}"
        )
    notes = list(plan.notes)
    if skipped:
      notes.append(f"left out {corrupt} that cannot be decoded: {shown}")
      self.info.metadata["skipped"] = skipped
    return [
      *notes,
      *self._account(),
      *self._range_notes,
      *self._copy_notes(),
    ]

  def _account(self) -> list[str]:
    """Records what became of every file of the source, and says it."""
    plan, metadata = self.plan, self.info.metadata
    left_out = plan.left_out
    pages = {x: y.num_pages for x, y in self._kept.items() if y.num_pages > 1}
    num_pages = sum(pages.values()) - len(pages)
    corrupt = {plan.tree.root + x: "cannot be decoded" for x in self._corrupt}
    metadata["account"] = {
      "files": len(self._kept) + len(left_out) + len(corrupt),
      "read": len(self._kept),
      "left_out": trees.sum_up(left_out | corrupt),
      "further_pages": {"pages": num_pages, "files": len(pages)},
    }
    metadata["fingerprint"] = sources.fingerprint_of(plan.tree, plan.metadata)
    if any(plan.tree.kind(path) == "DICOM" for path in self._kept):
      metadata["settings"]["window"] = self.window
    if self._ranges:
      metadata["settings"]["ranges"] = {
        kind: [values.low, values.high] for kind, values in self._ranges.items()
      }
    notes = []
    if left_out:
      notes.append(f"left out: {trees.describe(left_out)}")
    if num_pages:
      notes.append(
        f"left out: {num_pages:,} further pages of {len(pages):,} files"
        f" ({checks.few(pages)})"
      )
    return notes

  def _copy_notes(self) -> list[str]:
    splits = collections.defaultdict(list)
    for split, pairs in self.plan.splits.items():
      for path, _ in pairs:
        if path in self._kept:
          splits[self._kept[path].sha256].append(split)
    copies = [group for group in splits.values() if len(group) > 1]
    if not copies:
      return []
    num_across = sum(len(set(group)) > 1 for group in copies)
    return [
      f"{len(copies):,} files are there more than once, {num_across:,} of them"
      " in train and test alike (equal sha256)"
    ]


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


def _say_range(known: depths.Range, group: Sequence[depths.Range]) -> str:
  bits = "" if known.num_bits is None else f" ({known.num_bits} bits)"
  said = (
    f"{len(group):,} images in {known.kind}: {known.low:g} becomes black and"
    f" {known.high:g} white{bits}"
  )
  middle = float(np.median([values.high for values in group]))
  if middle - known.low < (known.high - known.low) / 8:
    said += f", half of them stay below {middle:g} and come out dark"
  return said


def _check_text(plan: Plan) -> None:
  """Raises ValueError if a name cannot be stored."""
  for name in (*plan.class_names, *plan.tree.entries):
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
