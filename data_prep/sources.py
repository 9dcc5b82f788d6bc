"""Raw files: folders and zips of images by class, and downloads."""

import hashlib
import http.client
import os
import pathlib
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from psg_jax import progress

IMAGE_SUFFIXES = frozenset(
  {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
MAX_FILE_BYTES = 512 << 20
"""Of one image or table, whether in a folder or unpacked from a zip."""
MAX_TOTAL_BYTES = 1 << 40
"""Of all images and tables in a zip, unpacked."""
MAX_RATIO = 200
"""Unpacked to packed bytes of a zip of more than `MIN_RATIO_BYTES`; files of
images are compressed themselves, so that a zip makes them hardly smaller."""
MIN_RATIO_BYTES = 256 << 20
_CHUNK = 1 << 20
_TIMEOUT = 30.0


class Tree(NamedTuple):
  """The files of a folder or of a zip, which is never unpacked.

  Attributes:
    name: The folder or zip, for messages.
    paths: Every file's path with "/", relative to the root, sorted; hidden
      files are left out.
    folders: Every folder's path, empty ones too.
    read: Path -> content.
  """

  name: str
  paths: tuple[str, ...]
  folders: frozenset[str]
  read: Callable[[str], bytes]


def check_entry(name: str, archive: str) -> None:
  """Raises ValueError if an archive's entry would leave its folder."""
  path = pathlib.PurePosixPath(name.replace("\\", "/"))
  first = path.parts[0] if path.parts else ""
  if path.is_absolute() or ".." in path.parts or first.endswith(":"):
    raise ValueError(
      f"source must hold no entry outside its own folder, got {name!r} in"
      f" {archive}"
    )


def open_tree(source: pathlib.Path, top_folders: Sequence[str]) -> Tree:
  """Lists a folder or zip of images.

  Where the wanted folders stand in one folder that holds all else, as in many
  archives, that one is taken as the root.

  Args:
    source: The folder or zip.
    top_folders: The folders that must stand at the root.

  Returns:
    Its files.

  Raises:
    ValueError: If it is neither, cannot be read, has an entry that leaves its
      folder, would unpack to too much, or lacks one of `top_folders`.
  """
  tree = _strip_root(list_files(source), top_folders)
  missing = [name for name in top_folders if name not in tree.folders]
  if missing:
    raise ValueError(
      f"source must have the folders {', '.join(top_folders)}, got"
      f" {tree.name!r} without {missing[0]}"
    )
  return tree


def list_files(source: pathlib.Path) -> Tree:
  """Lists a folder or zip, as `open_tree` without a look at its form."""
  if source.is_dir():
    return _folder_tree(source)
  if zipfile.is_zipfile(source):
    return _zip_tree(source)
  raise ValueError(
    f"source must be a folder or a zip of images, got {str(source)!r}"
  )


def strip_wrappers(tree: Tree, top_folders: Iterable[str]) -> Tree:
  """Makes lone outer folders the root, down to the folders of classes.

  Args:
    tree: The files.
    top_folders: Names, in lower case, of folders that stay; so does one that
      has images directly in it, which is a class.

  Returns:
    The files below.
  """
  while True:
    outer = {path.partition("/")[0] for path in (*tree.paths, *tree.folders)}
    is_class = any(
      path.count("/") == 1 and is_image(path) for path in tree.paths
    )
    if is_class or {name.lower() for name in outer} & set(top_folders):
      return tree
    inner = _strip_root(tree, ())
    if inner is tree or not inner.paths:
      return tree
    tree = inner


def is_image(path: str) -> bool:
  """Whether a file is an image by its suffix."""
  return pathlib.PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def images_by_class(
  tree: Tree, folder: str, class_names: Sequence[str] | None = None
) -> dict[str, list[str]]:
  """Finds the images of each class folder.

  Files that are no images by their suffix are left out.

  Args:
    tree: The files.
    folder: The folder that holds one folder a class; "" for the root.
    class_names: The classes that must be there, and no others; None takes all
      folders as classes, sorted.

  Returns:
    Class name -> sorted paths, at least one each.

  Raises:
    ValueError: If a class folder is empty, missing or not one of
      `class_names`.
  """
  prefix = f"{folder}/" if folder else ""
  found = sorted(
    path.removeprefix(prefix)
    for path in tree.folders
    if path.startswith(prefix) and "/" not in path.removeprefix(prefix)
  )
  expected = found if class_names is None else list(class_names)
  unknown = [name for name in found if name not in expected]
  if unknown:
    raise ValueError(
      f"source must have the class folders {', '.join(expected)} in"
      f" {folder!r}, got {prefix}{unknown[0]} in {tree.name!r}"
    )
  images: dict[str, list[str]] = {name: [] for name in expected}
  for path in tree.paths:
    class_name, _, rest = path.removeprefix(prefix).partition("/")
    if path.startswith(prefix) and rest and is_image(path):
      images[class_name].append(path)
  for name, paths in images.items():
    if not paths:
      state = "is empty" if name in found else "is missing"
      raise ValueError(
        f"source must have images of every class, got {tree.name!r} where the"
        f" class folder {prefix}{name} {state}"
      )
  if not images:
    raise ValueError(
      f"source must have one folder a class in {folder!r}, got none in"
      f" {tree.name!r}"
    )
  return images


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
      with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as work:
        part = pathlib.Path(work) / name
        digest = _copy(response, part, name, is_shown)
        if digest != sha256:
          raise ValueError(
            f"source {url} must have the SHA-256 {sha256}, got {digest}"
          )
        part.rename(path)
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


def _folder_tree(source: pathlib.Path) -> Tree:
  def read(path: str) -> bytes:
    size = (source / path).stat().st_size
    if size > MAX_FILE_BYTES:
      raise ValueError(
        f"source must hold files of at most {MAX_FILE_BYTES:,} bytes, got"
        f" {path!r} of {size:,} in {str(source)!r}"
      )
    return (source / path).read_bytes()

  paths, folders = [], []
  for folder, subfolders, files in os.walk(source):
    relative = pathlib.Path(folder).relative_to(source)
    paths += [(relative / name).as_posix() for name in files]
    folders += [(relative / name).as_posix() for name in subfolders]
  return Tree(
    name=str(source),
    paths=_visible(paths),
    folders=frozenset(_visible(folders)),
    read=read,
  )


def _zip_tree(source: pathlib.Path) -> Tree:
  try:
    archive = zipfile.ZipFile(source)
  except (OSError, zipfile.BadZipFile) as error:
    raise ValueError(
      f"source must be a whole zip, got {str(source)!r}: {error}"
    ) from error
  entries = archive.infolist()
  for entry in entries:
    check_entry(entry.filename, str(source))
  _check_sizes(entries, str(source))
  folders = {entry.filename.rstrip("/") for entry in entries if entry.is_dir()}
  paths = [entry.filename for entry in entries if not entry.is_dir()]
  for path in [*paths, *folders]:
    parents = pathlib.PurePosixPath(path).parents
    folders.update(str(parent) for parent in parents if str(parent) != ".")

  def read(path: str) -> bytes:
    try:
      return archive.read(path)
    # RuntimeError: encrypted. NotImplementedError: an unknown compression.
    except (
      OSError,
      EOFError,
      RuntimeError,
      NotImplementedError,
      zipfile.BadZipFile,
      zlib.error,
    ) as error:
      raise ValueError(
        f"source must be a readable zip, got {str(source)!r}, whose entry"
        f" {path!r} cannot be read: {error}"
      ) from error

  return Tree(str(source), _visible(paths), frozenset(_visible(folders)), read)


def _check_sizes(entries: Iterable[zipfile.ZipInfo], archive: str) -> None:
  """Raises ValueError if what is read of a zip would unpack to too much."""
  wanted = [
    entry
    for entry in entries
    if is_image(entry.filename) or entry.filename.lower().endswith(".csv")
  ]
  for entry in wanted:
    if entry.file_size > MAX_FILE_BYTES:
      raise ValueError(
        f"source must hold files of at most {MAX_FILE_BYTES:,} bytes, got"
        f" {entry.filename!r} of {entry.file_size:,} in {archive!r}"
      )
  total = sum(entry.file_size for entry in wanted)
  packed = sum(entry.compress_size for entry in wanted)
  if total > MAX_TOTAL_BYTES:
    raise ValueError(
      f"source must unpack to at most {MAX_TOTAL_BYTES:,} bytes, got {total:,}"
      f" in {archive!r}"
    )
  if total > max(MIN_RATIO_BYTES, MAX_RATIO * packed):
    raise ValueError(
      f"source must unpack to at most {MAX_RATIO} times its size, got"
      f" {total:,} bytes from {packed:,} in {archive!r}"
    )


def _visible(paths: Iterable[str]) -> tuple[str, ...]:
  """Sorts, and leaves out hidden files and what macOS adds to its zips."""
  return tuple(
    sorted(
      path
      for path in paths
      if not any(
        part.startswith(".") or part == "__MACOSX" for part in path.split("/")
      )
    )
  )


def _strip_root(tree: Tree, top_folders: Sequence[str]) -> Tree:
  """Makes a lone outer folder the root, if no wanted folder stands beside."""
  outer = {path.partition("/")[0] for path in (*tree.paths, *tree.folders)}
  if len(outer) != 1 or outer & set(top_folders):
    return tree
  (root,) = outer
  prefix, read = f"{root}/", tree.read
  if root in tree.paths:
    return tree
  return Tree(
    name=tree.name,
    paths=tuple(path.removeprefix(prefix) for path in tree.paths),
    folders=frozenset(
      path.removeprefix(prefix) for path in tree.folders if path != root
    ),
    read=lambda path: read(prefix + path),
  )
