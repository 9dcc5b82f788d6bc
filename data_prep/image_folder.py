"""`image_folder`: the user's own images, in one folder a class.

    python -m data_prep.prepare image_folder --source my.zip --name my_eyes

A table `metadata.csv` beside the class folders, or `--metadata`, may say more
about each image. Folders `train` and `test` (or Training and Testing) are
taken as the splits; without them the images are split 80/20 by class, and by
group where `--group` names a column of the table. A folder `val` stands for a
missing `test`; beside `test` it is refused, for it would be left out.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from data_prep import image_tree, sources, splits, tables
from psg_jax import checks

SPLIT_NAMES = {
  "train": "train",
  "training": "train",
  "test": "test",
  "testing": "test",
  "val": "val",
  "valid": "val",
  "validation": "val",
}


class PsgImageFolder(image_tree.ImageTreeBuilder):
  """Takes each folder as a class, with the columns of the user's table."""

  OPTIONS = frozenset(
    {
      *image_tree.ImageTreeBuilder.OPTIONS,
      "metadata",
      "encoding",
      "group",
      "seed",
    }
  )
  DESCRIPTION = "Images of a user's own, in one folder a class."
  NEEDED_COLUMNS: tuple[str, ...] = ()
  """Columns that the table must have."""

  def group(self) -> str | None:
    """Returns the column whose images stay together."""
    return self.options.group

  def make_plan(self, source: pathlib.Path) -> image_tree.Plan:
    """Lists the classes, reads the table, and splits where folders do not."""
    tree, headers = image_tree.read_headers(
      sources.strip_wrappers(sources.list_files(source), SPLIT_NAMES)
    )
    class_names, found, notes = _find_images(tree)
    classes = {
      path: class_names[label]
      for pairs in found.values()
      for path, label in pairs
    }
    metadata = self.options.metadata
    table, more = image_tree.read_table(
      tree,
      classes,
      path=None if metadata is None else str(metadata),
      encoding=self.options.encoding,
    )
    table, said = image_tree.add_columns(table, headers, classes)
    groups = self._groups(table, tree)
    if "all" in found:
      found = _split(found["all"], groups, self.seed)
      for split, pairs in found.items():
        if not pairs:
          raise ValueError(
            f"source must have images enough for train and test, got"
            f" {len(classes)} in {tree.name!r}, of which none fell to {split}"
          )
    else:
      notes += _across(found, groups, self.group())
    return image_tree.Plan(
      tree,
      class_names,
      found,
      table,
      (*notes, *more, *said),
      None if metadata is None else image_tree.read_file(str(metadata)),
    )

  def _groups(
    self, table: tables.Table | None, tree: sources.Tree
  ) -> Mapping[str, str | None]:
    """Returns the group of each file that has one."""
    needed = self.NEEDED_COLUMNS
    if table is None and needed:
      raise ValueError(
        f"metadata must be given for {self.public_name!r}: a table with the"
        f" columns file, {', '.join(needed)}, got no"
        f" {image_tree.METADATA_FILE} in {tree.name!r}"
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
  tree: sources.Tree,
) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]], tuple[str, ...]]:
  """Returns classes, images by split ("all" for one to be made), and notes."""
  folders, notes = _split_folders(tree)
  found: dict[str, list[tuple[str, int]]] = {}
  class_names: tuple[str, ...] | None = None
  for split, folder in folders.items():
    images = sources.images_by_class(tree, folder, class_names)
    class_names = tuple(images)
    found[split] = [
      (path, label)
      for label, paths in enumerate(images.values())
      for path in paths
    ]
  assert class_names is not None
  return class_names, found, notes


def _split_folders(
  tree: sources.Tree,
) -> tuple[dict[str, str], tuple[str, ...]]:
  """Returns split -> folder, and notes."""
  top = sorted(name for name in tree.folders if "/" not in name)
  found: dict[str, str] = {}
  for name in top:
    split = SPLIT_NAMES.get(name.lower())
    if split in found:
      raise ValueError(
        f"source must have one folder for {split}, got {found[split]} and"
        f" {name} in {tree.name!r}"
      )
    if split is not None:
      found[split] = name
  if not found:
    return {"all": ""}, ()
  if "train" in found and "test" in found and "val" in found:
    raise ValueError(
      f"source must have the folders {found['train']} and {found['test']}"
      f" alone, got also {found['val']} in {tree.name!r}: join it with one of"
      " them"
    )
  notes: tuple[str, ...] = ()
  if "test" not in found and "val" in found:
    found["test"] = found.pop("val")
    notes = (f"{found['test']} is taken as test",)
  others = [name for name in top if name not in found.values()]
  if set(found) != {"train", "test"} or others:
    got = ", ".join(top)
    raise ValueError(
      "source must have the folders train and test, or class folders, alone,"
      f" got {got} in {tree.name!r}"
    )
  return {split: found[split] for split in ("train", "test")}, notes


def _split(
  pairs: list[tuple[str, int]],
  groups: Mapping[str, str | None],
  seed: int,
) -> dict[str, list[tuple[str, int]]]:
  labels = np.asarray([label for _, label in pairs])
  is_test = splits.choose_test(
    labels, [groups.get(path) for path, _ in pairs], seed=seed
  )
  return {
    split: [pairs[row] for row in np.flatnonzero(is_test == value)]
    for split, value in (("train", False), ("test", True))
  }


def _across(
  found: Mapping[str, list[tuple[str, int]]],
  groups: Mapping[str, str | None],
  group: str | None,
) -> tuple[str, ...]:
  """Says how many groups the user's own folders have on both sides."""
  members = [
    {groups.get(path) for path, _ in pairs} - {None} for pairs in found.values()
  ]
  both = set.intersection(*members)
  if not both:
    return ()
  return (f"{len(both):,} values of {group} are in train and test alike",)
