"""`image_folder`: the user's own images, in one folder a class.

    python -m data_prep.prepare image_folder --source my.zip --name my_eyes

A table `metadata.csv` beside the class folders, or `--metadata`, may say more
about each image. Folders `train` and `test` (or Training and Testing) are
taken as the splits; without them the images are split 80/20 by class, and by
group where `--group` names a column of the table. A folder `val` stands for a
missing `test`; beside `test` it is refused, for it would be left out.
"""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep import (
  image_tree,
  listing,
  metadata,
  sources,
  tables,
  trees,
)
from psg_jax import checks

TEST_FRACTION = 0.2
SPLIT_NAMES = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("test", "testing"), "test"),
  **dict.fromkeys(("val", "valid", "validation"), "val"),
}


class PsgImageFolder(image_tree.ImageTreeBuilder):
  """Takes each folder as a class, with the columns of the user's table."""

  OPTIONS = image_tree.ImageTreeBuilder.OPTIONS | {
    *("metadata", "encoding", "group", "seed")
  }
  DESCRIPTION = "Images of a user's own, in one folder a class."
  NEEDED_COLUMNS: tuple[str, ...] = ()
  """Columns that the table must have."""

  def group(self) -> str | None:
    """Returns the column whose images stay together."""
    return self.options.group

  def make_plan(self, source: pathlib.Path) -> image_tree.Plan:
    """Lists the classes, reads the table, and splits where folders do not."""
    tree, headers = metadata.read_headers(
      sources.strip_wrappers(listing.list_files(source), SPLIT_NAMES)
    )
    class_names, pairs, notes = _find_images(tree)
    classes = {
      path: class_names[label]
      for part in pairs.values()
      for path, label in part
    }
    path = self.options.metadata
    content = None if path is None else sources.read_table(str(path))
    table, more = metadata.read(
      tree,
      classes,
      content=content,
      name=str(path),
      encoding=self.options.encoding,
    )
    table, said = metadata.add_headers(table, headers, classes)
    groups = self._groups(table, tree)
    if "all" in pairs:
      pairs = _split(pairs["all"], groups, self.seed)
      for split, part in pairs.items():
        if not part:
          raise ValueError(
            f"source must have images enough for train and test, got"
            f" {len(classes)} in {tree.name!r}, of which none fell to {split}"
          )
    else:
      notes += _across(pairs, groups, self.group())
    notes = (*notes, *more, *said)
    return image_tree.Plan(tree, class_names, pairs, table, notes, content)

  def _groups(
    self, table: tables.Table | None, tree: trees.Tree
  ) -> Mapping[str, str | None]:
    """Returns the group of each file that has one."""
    needed = self.NEEDED_COLUMNS
    if table is None and needed:
      raise ValueError(
        f"metadata must be given for {self.public_name!r}: a table with the"
        f" columns file, {', '.join(needed)}, got no"
        f" {trees.METADATA_FILE} in {tree.name!r}"
      )
    for column in needed:
      if table is not None and column not in table.texts:
        raise ValueError(
          f"metadata must have the columns file, {', '.join(needed)}, got"
          f" {table.name!r} without {column}"
        )
    group = self.group()
    if group is None:
      return {}
    if table is None:
      raise ValueError(
        f"group must not be given without metadata, got {group!r}"
      )
    checks.one_of("group", group, table.texts)
    return dict(zip(table.files, table.texts[group], strict=True))


def _find_images(
  tree: trees.Tree,
) -> tuple[tuple[str, ...], dict[str, sources.Pairs], tuple[str, ...]]:
  """Returns classes, images by split ("all" for one to be made), and notes."""
  folders, notes = _split_folders(tree)
  pairs: dict[str, sources.Pairs] = {}
  class_names: tuple[str, ...] | None = None
  for split, folder in folders.items():
    class_names, pairs[split] = sources.labelled_images(
      tree, folder, class_names
    )
  assert class_names is not None
  return class_names, pairs, notes


def _split_folders(
  tree: trees.Tree,
) -> tuple[dict[str, str], tuple[str, ...]]:
  """Returns split -> folder, and notes."""
  top = sorted(name for name in tree.folders if "/" not in name)
  named: dict[str, str] = {}
  for name in top:
    split = SPLIT_NAMES.get(name.lower())
    if split in named:
      raise ValueError(
        f"source must have one folder for {split}, got {named[split]} and"
        f" {name} in {tree.name!r}"
      )
    if split is not None:
      named[split] = name
  if not named:
    return {"all": ""}, ()
  if "train" in named and "test" in named and "val" in named:
    raise ValueError(
      f"source must have the folders {named['train']} and {named['test']}"
      f" alone, got also {named['val']} in {tree.name!r}: join it with one of"
      " them"
    )
  notes: tuple[str, ...] = ()
  if "test" not in named and "val" in named:
    named["test"] = named.pop("val")
    notes = (f"{named['test']} is taken as test",)
  others = [name for name in top if name not in named.values()]
  if set(named) != {"train", "test"} or others:
    got = ", ".join(top)
    raise ValueError(
      "source must have the folders train and test, or class folders, alone,"
      f" got {got} in {tree.name!r}"
    )
  return {split: named[split] for split in ("train", "test")}, notes


def _split(
  pairs: sources.Pairs, groups: Mapping[str, str | None], seed: int
) -> dict[str, sources.Pairs]:
  labels = np.asarray([label for _, label in pairs])
  is_test = choose_test(
    labels, [groups.get(path) for path, _ in pairs], seed=seed
  )
  return {
    split: [pairs[row] for row in np.flatnonzero(is_test == value)]
    for split, value in (("train", False), ("test", True))
  }


def choose_test(
  labels: np.ndarray,
  groups: Sequence[str | None],
  *,
  seed: int,
  test_fraction: float = TEST_FRACTION,
) -> np.ndarray:
  """Chooses the test images so that no group is on both sides.

  Groups come in random order, the larger ones first. One goes to the test set
  if that brings the number of test images of each class nearer to the wanted
  part of the images seen so far, in the sum of squares. So each class is split
  nearly as wanted, and exactly (to rounding) where images stand alone.

  Args:
    labels: int `[N]`.
    groups: One name an image; None stands alone.
    seed: Of the order.
    test_fraction: In (0, 1).

  Returns:
    bool `[N]`, whether the image is a test image.
  """
  members: dict[object, list[int]] = {}
  for row, group in enumerate(groups):
    members.setdefault((row,) if group is None else group, []).append(row)
  units = [np.asarray(rows) for rows in members.values()]
  order = np.random.default_rng(seed).permutation(len(units))
  sizes = np.asarray([len(units[index]) for index in order])
  num_classes = int(labels.max()) + 1
  seen, taken = np.zeros(num_classes), np.zeros(num_classes)
  is_test = np.zeros(len(labels), bool)
  for index in order[np.argsort(-sizes, kind="stable")]:
    counts = np.bincount(labels[units[index]], minlength=num_classes)
    seen += counts
    missing = test_fraction * seen - taken
    if np.sum((missing - counts) ** 2) < np.sum(missing**2):
      taken += counts
      is_test[units[index]] = True
  return is_test


def _across(
  parts: Mapping[str, sources.Pairs],
  groups: Mapping[str, str | None],
  group: str | None,
) -> tuple[str, ...]:
  """Says how many groups the user's own folders have on both sides."""
  members = [
    {groups.get(path) for path, _ in pairs} - {None} for pairs in parts.values()
  ]
  both = set.intersection(*members)
  if not both:
    return ()
  return (f"{len(both):,} values of {group} are in train and test alike",)
