"""Lists the files of a folder or zip, and reads them where they are."""

import collections
import os
import pathlib
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data_prep import trees
from psg_jax import files

MAX_FILE_BYTES = 512 << 20
"""Of one image or table, whether in a folder or unpacked from a zip."""
MAX_TOTAL_BYTES = 1 << 40
"""Of all images and tables in a zip, unpacked."""
MAX_RATIO = 200
"""Unpacked to packed bytes of a zip of more than `MIN_RATIO_BYTES`; files of
images are compressed themselves, so that a zip makes them hardly smaller."""
MIN_RATIO_BYTES = 256 << 20
_ARCHIVES = {
  b"7z\xbc\xaf\x27\x1c": "a 7z archive",
  b"Rar!": "a rar archive",
  b"\x1f\x8b": "a gzip file, such as a tar archive",
  b"BZh": "a bzip2 file, such as a tar archive",
  b"\xfd7zXZ": "an xz file, such as a tar archive",
}


def list_files(source: pathlib.Path) -> trees.Tree:
  """Lists a folder or zip of images.

  Raises:
    ValueError: If it is neither, cannot be read, has an entry that leaves its
      folder, or would unpack to too much.
  """
  if source.is_dir():
    return _folder_tree(source)
  # Anything else, such as a pipe, would be waited for.
  if source.is_file() and zipfile.is_zipfile(source):
    return _zip_tree(source)
  raise ValueError(
    f"source must be a folder or a zip of images, got {str(source)!r}"
    f"{_what_it_is(source)}"
  )


def check_entry(name: str, archive: str) -> None:
  """Raises ValueError if an archive's entry would leave its folder."""
  path = pathlib.PurePosixPath(name.replace("\\", "/"))
  first = path.parts[0] if path.parts else ""
  if path.is_absolute() or ".." in path.parts or first.endswith(":"):
    raise ValueError(
      f"source must hold no entry outside its own folder, got {name!r} in"
      f" {archive}"
    )


def _what_it_is(source: pathlib.Path) -> str:
  """Says what a file is instead of a zip, where its first bytes tell."""
  if not source.is_file():
    return ", which is neither"
  with source.open("rb") as file:
    head = file.read(512)
  kinds = [_ARCHIVES[start] for start in _ARCHIVES if head.startswith(start)]
  if head[257:262] == b"ustar":
    kinds = ["a tar archive"]
  if head.startswith(b"PK\x03\x04"):
    return ", which is a zip without its end: copy or download it again"
  if kinds:
    return f", which is {kinds[0]}: unpack it, and name the folder"
  if trees.kind_of(head):
    return ", which is an image: name the folder around the class folders"
  return ""


def _check_size(path: str, size: int, source: str) -> None:
  if size > MAX_FILE_BYTES:
    raise ValueError(
      f"source must hold files of at most {MAX_FILE_BYTES:,} bytes, got"
      f" {path!r} of {size:,} in {source!r}"
    )


# Folders. Names are bytes, in UTF-8 whatever the locale says.


class _Walk(NamedTuple):
  """What a walk through a folder came upon, by path with "/"; see `trees.Tree`.

  Attributes:
    stamps: File -> size in bytes and time of change in nanoseconds.
    folders: All folders.
    left_out: What is not read -> why.
  """

  stamps: dict[str, tuple[int, int]]
  folders: set[str]
  left_out: dict[str, str]


def _folder_tree(source: pathlib.Path) -> trees.Tree:
  top = os.fsencode(source)

  def content(path: str, num_bytes: int) -> bytes:
    full = os.path.join(top, _encoded(path))
    if num_bytes < 0:
      _check_size(path, os.stat(full).st_size, str(source))
    with open(full, "rb") as file:
      return file.read(num_bytes)

  walk = _walk(top)
  kind = trees.kinds(content)
  listing = []
  for path in sorted({*walk.stamps, *walk.left_out}):
    stamp: Any = None
    if path in walk.stamps and kind(path):
      stamp = walk.stamps[path]
    elif path in walk.stamps and trees.is_table(path):
      stamp = files.digest(content(path, -1))
    # What systems add comes and goes.
    if walk.left_out.get(path) not in trees.SYSTEM_REASONS:
      listing.append([path, stamp])
  return trees.Tree(
    name=str(source),
    entries={path: path for path in sorted(walk.stamps)},
    folders=frozenset(walk.folders),
    content=content,
    entry_kind=kind,
    left_out=walk.left_out,
    fingerprint=files.digest(listing),
  )


def _encoded(path: str) -> bytes:
  return path.encode("utf-8", "surrogateescape")


def _walk(top: bytes) -> _Walk:
  """Lists a folder and, after all else, the folders behind links in it.

  A folder is read once: links that lead back, or to what is read already, are
  left out.
  """
  walk = _Walk({}, set(), {})
  around = os.path.realpath(top)
  known: set[tuple[int, int]] = set()
  waiting, links = collections.deque([""]), collections.deque[str]()
  while waiting or links:
    folder = waiting.popleft() if waiting else links.popleft()
    full = os.path.join(top, _encoded(folder))
    try:
      status = os.stat(full)
      if (status.st_dev, status.st_ino) in known:
        walk.left_out[folder] = "link to a folder that is read already"
        continue
      known.add((status.st_dev, status.st_ino))
      entries = sorted(os.scandir(full), key=lambda entry: entry.name)
    except OSError:
      walk.left_out[folder] = "folder that cannot be read"
      continue
    for entry in entries:
      name = entry.name.decode("utf-8", "surrogateescape")
      path = f"{folder}/{name}" if folder else name
      why = trees.hidden_reason(name)
      if why:
        walk.left_out.update((x, why) for x in _files_below(entry, path))
      elif not _is_folder(entry):
        _add_file(walk, entry, path)
      elif not entry.is_symlink():
        walk.folders.add(path)
        waiting.append(path)
      elif _is_around(os.path.realpath(entry.path), around):
        walk.left_out[path] = "link that leads back"
      else:
        walk.folders.add(path)
        links.append(path)
  return walk


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
  try:
    return entry.is_dir()
  # A link to itself.
  except OSError:
    return False


def _is_around(folder: bytes, inner: bytes) -> bool:
  return os.path.join(inner, b"").startswith(os.path.join(folder, b""))


def _add_file(walk: _Walk, entry: os.DirEntry[bytes], path: str) -> None:
  try:
    status = entry.stat()
  except OSError:
    walk.left_out[path] = "broken link"
    return
  if stat.S_ISREG(status.st_mode):
    walk.stamps[path] = (status.st_size, status.st_mtime_ns)
  else:
    walk.left_out[path] = "pipe or other special file"


def _files_below(entry: os.DirEntry[bytes], path: str) -> Iterator[str]:
  """Yields a file, or each file of a folder."""
  if not entry.is_dir(follow_symlinks=False):
    yield path
    return
  for folder, _, names in os.walk(entry.path):
    inner = os.path.relpath(folder, entry.path)
    for name in names:
      below = os.path.normpath(os.path.join(inner, name))
      yield f"{path}/{below.decode('utf-8', 'surrogateescape')}"


# Zips.


def _zip_tree(source: pathlib.Path) -> trees.Tree:
  with files.faults(
    f"source must be a whole zip, got {str(source)!r}:",
    *(OSError, zipfile.BadZipFile),
  ):
    archive = zipfile.ZipFile(source)
  named = _named_entries(archive)
  folders = {path.rstrip("/") for path, _ in named if path.endswith("/")}
  infos = {path: info for path, info in named if not path.endswith("/")}
  for path in (*folders, *infos):
    parents = pathlib.PurePosixPath(path).parents
    folders.update(str(parent) for parent in parents if str(parent) != ".")

  def content(path: str, num_bytes: int) -> bytes:
    with (
      files.faults(
        f"source must be a readable zip, got {str(source)!r}, whose entry"
        f" {path!r} cannot be read:",
        # RuntimeError: encrypted. NotImplementedError: unknown compression.
        *(OSError, EOFError, RuntimeError, NotImplementedError),
        *(zipfile.BadZipFile, zlib.error),
      ),
      archive.open(infos[path]) as file,
    ):
      return file.read(num_bytes)

  left_out = {x: why for x in infos if (why := trees.hidden_reason(x))}
  left_out |= {
    path: "link in a zip"
    for path, info in infos.items()
    if stat.S_ISLNK(info.external_attr >> 16)
  }
  kind = trees.kinds(content)
  paths = sorted(infos.keys() - left_out.keys())
  images = [path for path in paths if kind(path)]
  counts = collections.Counter(path for path, _ in named)
  twice = [path for path in images if counts[path] > 1]
  if twice:
    raise ValueError(f"source holds {twice[0]!r} twice")
  tables = (path for path in paths if path.lower().endswith(".csv"))
  _check_zip([infos[path] for path in (*images, *tables)], str(source))
  return trees.Tree(
    name=str(source),
    entries={path: path for path in paths},
    folders=frozenset(x for x in folders if not trees.hidden_reason(x)),
    content=content,
    entry_kind=kind,
    left_out=left_out,
    fingerprint=files.digest(
      sorted(
        [path, info.file_size, info.CRC]
        for path, info in named
        if path in infos
      )
    ),
  )


def _named_entries(
  archive: zipfile.ZipFile,
) -> list[tuple[str, zipfile.ZipInfo]]:
  """Returns each entry with its path; that of a folder ends in a slash.

  Raises:
    ValueError: If one would leave its folder.
  """
  infos = archive.infolist()
  # Some programs for Windows write backslashes.
  is_windows = not any("/" in info.filename for info in infos)
  named = []
  for info in infos:
    path = _utf8_name(info)
    if is_windows:
      path = path.replace("\\", "/")
    check_entry(path, str(archive.filename))
    # Without "./" in front and double slashes.
    plain = str(pathlib.PurePosixPath(path))
    named.append((f"{plain}/" if path.endswith("/") else plain, info))
  return [(path, info) for path, info in named if path != "./"]


def _utf8_name(info: zipfile.ZipInfo) -> str:
  """Returns an entry's name, also where UTF-8 is not flagged, as on a Mac."""
  if info.flag_bits & 0x800:
    return info.filename
  try:
    return info.filename.encode("cp437").decode("utf-8")
  except UnicodeError:
    return info.filename


def _check_zip(wanted: Sequence[zipfile.ZipInfo], archive: str) -> None:
  """Raises ValueError for a password, or if it would unpack to too much."""
  if any(info.flag_bits & 1 for info in wanted):
    raise ValueError(
      f"source must be a zip without a password, got {archive!r}: unpack it,"
      " and name the folder"
    )
  for info in wanted:
    _check_size(info.filename, info.file_size, archive)
  total = sum(info.file_size for info in wanted)
  packed = sum(info.compress_size for info in wanted)
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
