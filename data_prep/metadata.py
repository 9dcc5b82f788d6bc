"""What is known of the images of a source: the user's table, DICOM headers."""

import csv
import difflib
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence

from data_prep import dicom, tables, threads, trees
from psg_jax import checks, files


def read(
  tree: trees.Tree,
  classes: Mapping[str, str],
  *,
  content: bytes | None,
  name: str,
  encoding: str | None,
) -> tuple[tables.Table | None, tuple[str, ...]]:
  """Reads the table of a source and holds it against the images.

  Args:
    tree: The raw files; their `metadata.csv`, if any, is read where there is no
      `content`.
    classes: Path of each image -> its class.
    content: Of another CSV file.
    name: Of that file, for messages.
    encoding: Of the table; None to find out.

  Returns:
    The table, or None where there is none, and what the user should know.

  Raises:
    ValueError: If the table is not of the right form, or names files that do
      not exist or are in the folder of another class.
  """
  if content is None:
    if trees.METADATA_FILE not in tree.entries:
      if encoding is not None:
        raise ValueError(
          f"encoding must not be given without metadata, got {encoding!r}"
        )
      return None, ()
    content = tree.read(trees.METADATA_FILE)
    name = f"{tree.name}/{trees.METADATA_FILE}"
  with files.faults(f"metadata must be a CSV table, got {name!r}:", csv.Error):
    table = tables.read(content, name, encoding=encoding)
  paths = _below_root(table.files, tree.root, classes)
  if len(set(paths)) < len(paths):
    raise ValueError(
      f"metadata must name each file once, got some of {tree.root!r} with and"
      f" without that folder in {name!r}"
    )
  rows = match(table._replace(files=paths), classes)
  # As the files are called, whatever form of Unicode the table has.
  table = table._replace(files=tuple(rows))
  check_labels(table, classes)
  without = [path for path in classes if path not in rows]
  if not without:
    return table, table.notes
  return table, (
    *table.notes,
    f"{len(without):,} of {len(classes):,} images have no row in {name}:"
    f" {checks.few(without)}",
  )


def match(table: tables.Table, paths: Iterable[str]) -> dict[str, int]:
  """Returns the row of each image that has one, by its path.

  Raises:
    ValueError: If a row names a file that is not among `paths`, which are those
      of all images of the source.
  """
  paths = list(paths)
  known = {tables.same_path(path): path for path in paths}
  # One that is written just so goes before one that looks the same.
  known |= {path: path for path in paths if tables.same_path(path) == path}
  keys = [tables.same_path(file) for file in table.files]
  missing = [
    file
    for file, key in zip(table.files, keys, strict=True)
    if key not in known
  ]
  if missing:
    hint = _path_hint(missing[0], list(known.values()))
    raise ValueError(
      f"metadata must name images of the source, got {missing[0]!r} in"
      f" {table.name!r}, which is not there ({len(missing):,} of"
      f" {len(table.files):,} rows name such files){hint}"
    )
  return {known[key]: row for row, key in enumerate(keys)}


def _path_hint(file: str, paths: list[str]) -> str:
  """Suggests the path that has the same name, or a like one."""
  alike = [path for path in paths if path.casefold() == file.casefold()] or [
    path for path in paths if path.split("/")[-1] == file.split("/")[-1]
  ]
  close = alike or difflib.get_close_matches(file, paths, n=1)
  return f", did you mean {close[0]!r}?" if close else ""


def check_labels(table: tables.Table, classes: Mapping[str, str]) -> None:
  """Raises ValueError if a column `label` denies a class folder.

  Args:
    table: The table.
    classes: Path of an image -> its class.
  """
  labels = table.texts.get(tables.LABEL_COLUMN, ())
  wrong = [
    f"{file} ({label!r})"
    for file, label in zip(table.files, labels, strict=False)
    if label is not None
    and tables.same_path(label) != tables.same_path(classes[file])
  ]
  if wrong:
    raise ValueError(
      f"metadata must have the class folder's name in its column 'label', got"
      f" {checks.few(wrong)} in {table.name!r}"
    )


def _below_root(
  paths: Sequence[str], root: str, known: Container[str]
) -> tuple[str, ...]:
  """Takes the folders that were made the root from the paths of a table."""
  starts = [root[end:] for end, c in enumerate(f"/{root}") if c == "/"][:-1]

  def below(path: str) -> str:
    shorter = (path.removeprefix(start) for start in ("", *starts))
    return next((x for x in shorter if x in known), path)

  return tuple(map(below, paths))


def read_headers(
  tree: trees.Tree,
) -> tuple[trees.Tree, dict[str, dict[str, str | None]]]:
  """Reads the headers of DICOM files.

  Returns:
    The files without those that hold no image, and path -> columns.
  """
  if not dicom.is_available():
    return tree, {}
  paths = [path for path in tree.entries if tree.kind(path) == "DICOM"]
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    headers = dict(
      threads.ordered_map(
        lambda path: dicom.read_columns(tree.read(path)), paths
      )
    )
  empty = [path for path, columns in headers.items() if columns is None]
  return (
    tree.without(dict.fromkeys(empty, "DICOM without an image")),
    {path: columns for path, columns in headers.items() if columns is not None},
  )


def add_headers(
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
  before = table or tables.Table("the DICOM headers", (), {}, {})
  taken = {name.casefold() for name in before.texts}
  names = [name for name in dicom.COLUMNS if name not in taken]
  if not headers or not names:
    return table, ()
  listed = set(before.files)
  added = [path for path in headers if path not in listed]
  rows = (*before.files, *added)
  texts = {
    name: [*values, *[None] * len(added)]
    for name, values in before.texts.items()
  }
  for name in names:
    texts[name] = [headers.get(path, {}).get(name) for path in rows]
  kinds = {name: dicom.COLUMNS[name][1] for name in names}
  return (
    tables.Table(before.name, rows, {**before.types, **kinds}, texts),
    (f"{', '.join(names)} of {len(headers):,} images from DICOM headers",),
  )
