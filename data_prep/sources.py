"""Raw files: folders and zips of images by class, and downloads."""

import hashlib
import http.client
import pathlib
import urllib.request
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from data_prep import listing, trees
from psg_jax import files, progress

_CHUNK = 1 << 20
_TIMEOUT = 30.0

Pairs: TypeAlias = list[tuple[str, int]]
"""Path and label of each image, sorted by label and path."""


def open_tree(source: pathlib.Path, top_folders: Sequence[str]) -> trees.Tree:
  """Lists a folder or zip in which these folders must stand at the root.

  Where they stand in one folder that holds all else, as in many archives, that
  one is taken as the root.

  Raises:
    ValueError: As `listing.list_files`, or if it lacks one of `top_folders`.
  """
  tree = _strip_root(listing.list_files(source), top_folders)
  missing = [name for name in top_folders if name not in tree.folders]
  if missing:
    raise ValueError(
      f"source must have the folders {', '.join(top_folders)}, got"
      f" {tree.name!r} without {missing[0]}"
    )
  return tree


def strip_wrappers(tree: trees.Tree, top_folders: Iterable[str]) -> trees.Tree:
  """Makes lone outer folders the root, down to the folders of classes.

  Folders called as `top_folders`, in lower case, stay; so does one that has
  images directly in it, which is a class.
  """
  while True:
    outer = {path.partition("/")[0] for path in tree.folders}
    is_class = any(
      path.count("/") == 1 and tree.kind(path) for path in tree.entries
    )
    if is_class or {name.lower() for name in outer} & set(top_folders):
      return tree
    inner = _strip_root(tree, ())
    if inner is tree or not inner.entries:
      return tree
    tree = inner


def _strip_root(tree: trees.Tree, top_folders: Sequence[str]) -> trees.Tree:
  """Makes a lone folder the root, if it is not a wanted one.

  Files may stand beside it; a table there stays, unless there is one inside.
  """
  outer = {path.partition("/")[0] for path in tree.folders}
  if len(outer) != 1 or outer & set(top_folders):
    return tree
  prefix = f"{outer.pop()}/"
  inside = {
    path.removeprefix(prefix): entry
    for path, entry in tree.entries.items()
    if path.startswith(prefix)
  }
  beside = [path for path in tree.entries if not path.startswith(prefix)]
  table = trees.METADATA_FILE
  if table in beside and table not in inside:
    beside.remove(table)
    inside[table] = tree.entries[table]
  return tree.without({path: tree.reason(path) for path in beside})._replace(
    entries=dict(sorted(inside.items())),
    folders=frozenset(
      path.removeprefix(prefix)
      for path in tree.folders
      if path.startswith(prefix)
    ),
    root=tree.root + prefix,
  )


def labelled_images(
  tree: trees.Tree, folder: str, class_names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Pairs]:
  """Finds the images of each class folder.

  Files that are no images by their ending or content are left out.

  Args:
    tree: The files.
    folder: The folder that holds one folder a class; "" for the root.
    class_names: The classes that must be there, and no others; None takes all
      folders as classes, sorted.

  Returns:
    The classes, and their images, at least one each.

  Raises:
    ValueError: If a class folder is empty, missing or not one of
      `class_names`.
  """
  prefix = f"{folder}/" if folder else ""
  present = sorted(
    path.removeprefix(prefix)
    for path in tree.folders
    if path.startswith(prefix) and "/" not in path.removeprefix(prefix)
  )
  expected = tuple(present if class_names is None else class_names)
  unknown = [name for name in present if name not in expected]
  if unknown:
    raise ValueError(
      f"source must have the class folders {', '.join(expected)} in"
      f" {folder!r}, got {prefix}{unknown[0]} in {tree.name!r}"
    )
  images: dict[str, list[str]] = {name: [] for name in expected}
  for path in tree.entries:
    class_name, _, rest = path.removeprefix(prefix).partition("/")
    if path.startswith(prefix) and rest and tree.is_read(path):
      images[class_name].append(path)
  for name, paths in images.items():
    if not paths:
      is_there = name in present
      state = _state(tree, f"{prefix}{name}/") if is_there else "is missing"
      raise ValueError(
        f"source must have images of every class, got {tree.name!r} where the"
        f" class folder {prefix}{name} {state}"
      )
  if not images:
    raise ValueError(
      f"source must have one folder a class in {folder!r}, got none in"
      f" {tree.name!r}, which {_state(tree, prefix)}"
    )
  return expected, [
    (path, label)
    for label, name in enumerate(expected)
    for path in images[name]
  ]


def _state(tree: trees.Tree, prefix: str) -> str:
  """Says what a folder without images holds instead."""
  there = {
    path: tree.reason(path) for path in tree.entries if path.startswith(prefix)
  }
  there |= {
    path: why
    for path, why in tree.left_out.items()
    if f"{path}/".startswith(tree.root + prefix)
  }
  return f"holds none, but {trees.describe(there)}" if there else "is empty"


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
  content = None if metadata is None else read_table(metadata)
  return fingerprint_of(listing.list_files(source), content)


def fingerprint_of(
  tree: trees.Tree, metadata: bytes | None
) -> dict[str, str | None]:
  """Returns what `fingerprint` does, of what was read already."""
  digest = None if metadata is None else files.digest(metadata)
  return {"files": tree.fingerprint, "metadata": digest}


def read_table(path: str) -> bytes:
  """Reads the user's table; raises ValueError if it cannot be read."""
  with files.faults(f"metadata must be a CSV file, got {path!r}:"):
    return pathlib.Path(path).expanduser().read_bytes()


def download(
  url: str,
  sha256: str,
  folder: pathlib.Path,
  *,
  advice: str = "",
  is_shown: bool = False,
) -> pathlib.Path:
  """Downloads a file unless it is there, whole or not at all.

  Args:
    url: Where it is; the last part is the file's name.
    sha256: Of its content, in hexadecimal digits.
    folder: Where to keep it, or where the user put it.
    advice: Another way to get it, for the message.
    is_shown: Whether to show progress.

  Returns:
    The file.

  Raises:
    ValueError: If it cannot be downloaded, saying which file to put where, or
      is not the expected one.
  """
  name = url.rpartition("/")[2]
  path = folder / name
  if path.is_file():
    return path
  try:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
      folder.mkdir(parents=True, exist_ok=True)
      with files.replacing(path) as partial:
        digest = _copy(response, partial, name, is_shown)
        if digest != sha256:
          raise ValueError(
            f"source {url} must have the SHA-256 {sha256}, got {digest}"
          )
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, "reason", None) or error
    raise ValueError(
      f"source cannot be downloaded from {url} ({reason}): put {name} in"
      f" {folder}, or say where it is with --source{advice and ', '}{advice}"
    ) from error
  return path


def _copy(
  response: http.client.HTTPResponse,
  path: pathlib.Path,
  name: str,
  is_shown: bool,
) -> str:
  """Saves a response and returns its SHA-256."""
  length = int(response.headers.get("Content-Length") or 0)
  digest = hashlib.sha256()
  with (
    path.open("wb") as file,
    progress.bar(name, length, unit="B", is_shown=is_shown) as bar,
  ):
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      digest.update(chunk)
      bar.advance(len(chunk))
  return digest.hexdigest()
