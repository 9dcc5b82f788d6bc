"""Raw files: folders and zips of images by class, and downloads."""

import collections
import functools
import hashlib
import http.client
import json
import os
import pathlib
import stat
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_prep import dicom
from psg_jax import progress

METADATA_FILE = "metadata.csv"

IMAGE_SUFFIXES = frozenset(
  {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
SYSTEM_FOLDERS = frozenset(
  {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@tmp",
    "__macosx",
    "lost+found",
    "system volume information",
  }
)
"""What systems and network drives put among files; in lower case."""
# The preview in them, which is all that a decoder finds, is not the image.
_RAW_SUFFIXES = frozenset(
  {
    *(".3fr", ".arw", ".cr2", ".dng", ".erf", ".iiq", ".nef", ".nrw"),
    *(".orf", ".pef", ".rw2", ".sr2", ".srw"),
    *(".ndpi", ".scn", ".svs"),
  }
)
HEAD_BYTES = 132
"""From them the kind of a file is known."""
_ARCHIVES = {
  b"7z\xbc\xaf\x27\x1c": "a 7z archive",
  b"Rar!": "a rar archive",
  b"\x1f\x8b": "a gzip file, such as a tar archive",
  b"BZh": "a bzip2 file, such as a tar archive",
  b"\xfd7zXZ": "an xz file, such as a tar archive",
}
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
    paths: Every file's path with "/", relative to the root, sorted; without
      those that are left out.
    folders: Every folder's path, empty ones too.
    read: Path, and how many bytes at most (-1 for all) -> content.
    kind: Path -> `"image"`, `"DICOM"` or `""`, by its ending, or else by its
      first bytes.
    left_out: Path in the folder or zip -> why it is not read, such as
      `"hidden"`.
    fingerprint: A SHA-256 that changes with the files: of a folder by path,
      size and time of change, of a zip by path, size and checksum.
    root: Path of the root in the folder or zip, with a slash behind, or "".
  """

  name: str
  paths: tuple[str, ...]
  folders: frozenset[str]
  read: Callable[..., bytes]
  kind: Callable[[str], str]
  left_out: Mapping[str, str]
  fingerprint: str
  root: str = ""

  def is_read(self, path: str) -> bool:
    """Whether a file is an image that can be read here."""
    kind = self.kind(path)
    return bool(kind) and (kind != "DICOM" or dicom.is_available())

  def without(self, left_out: Mapping[str, str]) -> "Tree":
    """Leaves files out, path -> why."""
    named = {self.root + path: why for path, why in left_out.items()}
    return self._replace(
      paths=tuple(path for path in self.paths if path not in left_out),
      left_out={**self.left_out, **named},
    )

  def reason(self, path: str) -> str:
    """Returns why a file outside all that is read is left out."""
    if self.is_read(path):
      return "outside class folders"
    return "DICOM, without pydicom" if self.kind(path) else "not an image"


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
  # Anything else, such as a pipe, would be waited for.
  if source.is_file() and zipfile.is_zipfile(source):
    return _zip_tree(source)
  raise ValueError(
    f"source must be a folder or a zip of images, got {str(source)!r}"
    f"{_what_it_is(source)}"
  )


def _what_it_is(source: pathlib.Path) -> str:
  """Says what a file is instead of a zip, where its first bytes tell."""
  if not source.is_file():
    return ", which is neither"
  with source.open("rb") as file:
    head = file.read(512)
  found = [_ARCHIVES[start] for start in _ARCHIVES if head.startswith(start)]
  if head[257:262] == b"ustar":
    found = ["a tar archive"]
  if head.startswith(b"PK\x03\x04"):
    return ", which is a zip without its end: copy or download it again"
  if found:
    return f", which is {found[0]}: unpack it, and name the folder"
  if kind_of(head):
    return ", which is an image: name the folder around the class folders"
  return ""


def kind_of(head: bytes) -> str:
  """Returns what a file is by its first bytes: `"image"`, `"DICOM"` or `""`."""
  if head[128:132] == b"DICM":
    return "DICOM"
  is_image = (
    head.startswith(
      (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
    )
    or head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))
    or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
    # Text may begin with BM, too.
    or (head.startswith(b"BM") and head[6:10] == bytes(4))
  )
  return "image" if is_image else ""


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
    outer = {path.partition("/")[0] for path in tree.folders}
    is_class = any(
      path.count("/") == 1 and tree.kind(path) for path in tree.paths
    )
    if is_class or {name.lower() for name in outer} & set(top_folders):
      return tree
    inner = _strip_root(tree, ())
    if inner is tree or not inner.paths:
      return tree
    tree = inner


def images_by_class(
  tree: Tree, folder: str, class_names: Sequence[str] | None = None
) -> dict[str, list[str]]:
  """Finds the images of each class folder.

  Files that are no images by their ending or content are left out.

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
    if path.startswith(prefix) and rest and tree.is_read(path):
      images[class_name].append(path)
  for name, paths in images.items():
    if not paths:
      state = _state(tree, f"{prefix}{name}") if name in found else "is missing"
      raise ValueError(
        f"source must have images of every class, got {tree.name!r} where the"
        f" class folder {prefix}{name} {state}"
      )
  if not images:
    raise ValueError(
      f"source must have one folder a class in {folder!r}, got none in"
      f" {tree.name!r}, which {_state(tree, folder)}"
    )
  return images


def _state(tree: Tree, folder: str) -> str:
  """Says what a folder without images holds instead."""
  prefix = f"{folder}/" if folder else ""
  there = {
    path: tree.reason(path) for path in tree.paths if path.startswith(prefix)
  }
  there |= {
    path: why
    for path, why in tree.left_out.items()
    if f"{path}/".startswith(tree.root + prefix)
  }
  if not there:
    return "is empty"
  items = sum_up(there)
  more = dicom.ADVICE if any("pydicom" in each["why"] for each in items) else ""
  return f"holds none, but {describe(items)}{more}"


def sum_up(left_out: Mapping[str, str]) -> list[dict[str, Any]]:
  """Counts what is left out by reason and ending.

  Args:
    left_out: Path -> why.

  Returns:
    For each reason and ending `why`, `ending`, `count` and `first`, a path; the
    commonest first.
  """
  found: dict[tuple[str, str], list[str]] = {}
  for path in sorted(left_out):
    ending = pathlib.PurePosixPath(path).suffix.lower()
    found.setdefault((left_out[path], ending), []).append(path)
  items = [
    {"why": why, "ending": ending, "count": len(paths), "first": paths[0]}
    for (why, ending), paths in found.items()
  ]
  return sorted(items, key=lambda item: -item["count"])


def describe(items: Iterable[Mapping[str, Any]]) -> str:
  """Returns what `sum_up` counted as a phrase."""
  return ", ".join(
    f"{item['count']:,} {item['ending'] or 'without ending'} ({item['why']})"
    for item in items
  )


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


class _Found(NamedTuple):
  """What a walk through a folder found, by path with "/"; see `Tree`.

  Attributes:
    stamps: File -> size in bytes and time of change in nanoseconds.
    folders: All folders.
    left_out: What is not read -> why.
  """

  stamps: dict[str, tuple[int, int]]
  folders: set[str]
  left_out: dict[str, str]


def _folder_tree(source: pathlib.Path) -> Tree:
  # Bytes: names are UTF-8 whatever the locale says.
  top = os.fsencode(source)

  def read(path: str, num_bytes: int = -1) -> bytes:
    full = os.path.join(top, path.encode("utf-8", "surrogateescape"))
    size = os.stat(full).st_size
    if size > MAX_FILE_BYTES and num_bytes < 0:
      raise ValueError(
        f"source must hold files of at most {MAX_FILE_BYTES:,} bytes, got"
        f" {path!r} of {size:,} in {str(source)!r}"
      )
    with open(full, "rb") as file:
      return file.read(num_bytes)

  found = _walk(top)
  kind = _kinds(read)
  listing = []
  for path in sorted({*found.stamps, *found.left_out}):
    stamp: Any = None
    if path in found.stamps and kind(path):
      stamp = found.stamps[path]
    elif path in found.stamps and _is_metadata(path):
      stamp = hashlib.sha256(read(path)).hexdigest()
    # What systems add comes and goes.
    if found.left_out.get(path) not in _SYSTEM_REASONS:
      listing.append([path, stamp])
  return Tree(
    name=str(source),
    paths=tuple(sorted(found.stamps)),
    folders=frozenset(found.folders),
    read=read,
    kind=kind,
    left_out=found.left_out,
    fingerprint=_digest(listing),
  )


def _walk(top: bytes) -> _Found:
  """Lists a folder and, after all else, the folders behind links in it.

  A folder is read once: links that lead back, or to what is read already, are
  left out.
  """
  found = _Found({}, set(), {})
  around = os.path.realpath(top)
  seen: set[tuple[int, int]] = set()
  waiting, links = collections.deque([""]), collections.deque[str]()
  while waiting or links:
    folder = waiting.popleft() if waiting else links.popleft()
    full = os.path.join(top, folder.encode("utf-8", "surrogateescape"))
    try:
      status = os.stat(full)
      if (status.st_dev, status.st_ino) in seen:
        found.left_out[folder] = "link to a folder that is read already"
        continue
      seen.add((status.st_dev, status.st_ino))
      entries = sorted(os.scandir(full), key=lambda entry: entry.name)
    except OSError:
      found.left_out[folder] = "folder that cannot be read"
      continue
    for entry in entries:
      name = entry.name.decode("utf-8", "surrogateescape")
      path = f"{folder}/{name}" if folder else name
      if _reason(name):
        found.left_out.update(_hidden(entry, path, _reason(name)))
      elif not _is_folder(entry):
        _add_file(found, entry, path)
      elif not entry.is_symlink():
        found.folders.add(path)
        waiting.append(path)
      elif _is_around(os.path.realpath(entry.path), around):
        found.left_out[path] = "link that leads back"
      else:
        found.folders.add(path)
        links.append(path)
  return found


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
  try:
    return entry.is_dir()
  # A link to itself.
  except OSError:
    return False


def _is_around(folder: bytes, inner: bytes) -> bool:
  return os.path.join(inner, b"").startswith(os.path.join(folder, b""))


def _add_file(found: _Found, entry: os.DirEntry[bytes], path: str) -> None:
  try:
    status = entry.stat()
  except OSError:
    found.left_out[path] = "broken link"
    return
  if stat.S_ISREG(status.st_mode):
    found.stamps[path] = (status.st_size, status.st_mtime_ns)
  else:
    found.left_out[path] = "pipe or other special file"


def _hidden(
  entry: os.DirEntry[bytes], path: str, reason: str
) -> Iterator[tuple[str, str]]:
  """Yields each file of a hidden entry, and why it is left out."""
  if not entry.is_dir(follow_symlinks=False):
    yield path, reason
    return
  for folder, _, names in os.walk(entry.path):
    inner = os.path.relpath(folder, entry.path)
    for name in names:
      below = os.path.normpath(os.path.join(inner, name))
      yield f"{path}/{below.decode('utf-8', 'surrogateescape')}", reason


_SYSTEM_REASONS = ("hidden", "system folder")


def _reason(path: str) -> str:
  """Returns why a path is left out by its names, or ""."""
  for name in path.split("/"):
    if name.lower() in SYSTEM_FOLDERS:
      return _SYSTEM_REASONS[1]
    if name.startswith("."):
      return _SYSTEM_REASONS[0]
  return ""


def _kinds(read: Callable[..., bytes]) -> Callable[[str], str]:
  """Returns the function that tells what a file is, and remembers it."""

  @functools.cache
  def kind(path: str) -> str:
    suffix = pathlib.PurePosixPath(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
      return "image"
    if suffix in dicom.SUFFIXES:
      return "DICOM"
    if suffix in _RAW_SUFFIXES:
      return ""
    try:
      return kind_of(read(path, HEAD_BYTES))
    except (OSError, ValueError):
      return ""

  return kind


def _is_metadata(path: str) -> bool:
  return path.rpartition("/")[2] == METADATA_FILE


def _digest(listing: Any) -> str:
  return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _zip_tree(source: pathlib.Path) -> Tree:
  try:
    archive = zipfile.ZipFile(source)
  except (OSError, zipfile.BadZipFile) as error:
    raise ValueError(
      f"source must be a whole zip, got {str(source)!r}: {error}"
    ) from error
  named = _named_entries(archive)
  folders = {path.rstrip("/") for path, _ in named if path.endswith("/")}
  files = [(path, info) for path, info in named if not path.endswith("/")]
  for path in [*folders, *(path for path, _ in files)]:
    parents = pathlib.PurePosixPath(path).parents
    folders.update(str(parent) for parent in parents if str(parent) != ".")
  entries = dict(files)

  def read(path: str, num_bytes: int = -1) -> bytes:
    try:
      with archive.open(entries[path]) as file:
        return file.read(num_bytes)
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

  left_out = {path: _reason(path) for path in entries if _reason(path)}
  left_out |= {
    path: "link in a zip"
    for path, info in files
    if stat.S_ISLNK(info.external_attr >> 16)
  }
  kind = _kinds(read)
  wanted = [
    info
    for path, info in files
    if path not in left_out and (kind(path) or path.lower().endswith(".csv"))
  ]
  if any(info.flag_bits & 1 for info in wanted):
    raise ValueError(
      f"source must be a zip without a password, got {str(source)!r}: unpack"
      " it, and name the folder"
    )
  _check_sizes(wanted, str(source))
  return Tree(
    name=str(source),
    # One that is there twice is found later.
    paths=tuple(sorted(path for path, _ in files if path not in left_out)),
    folders=frozenset(path for path in folders if not _reason(path)),
    read=read,
    kind=kind,
    left_out=left_out,
    fingerprint=_digest(
      sorted([path, info.file_size, info.CRC] for path, info in files)
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


def _check_sizes(wanted: Sequence[zipfile.ZipInfo], archive: str) -> None:
  """Raises ValueError if what is read of a zip would unpack to too much."""
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


def _strip_root(tree: Tree, top_folders: Sequence[str]) -> Tree:
  """Makes a lone folder the root, if it is not a wanted one.

  Files may stand beside it; a table there stays, unless there is one inside.
  """
  outer = {path.partition("/")[0] for path in tree.folders}
  if len(outer) != 1 or outer & set(top_folders):
    return tree
  (root,) = outer
  prefix, read, kind = f"{root}/", tree.read, tree.kind
  inside = [path for path in tree.paths if path.startswith(prefix)]
  beside = {path for path in tree.paths if not path.startswith(prefix)}
  is_outer_table = (
    METADATA_FILE in beside and f"{prefix}{METADATA_FILE}" not in inside
  )
  paths = [path.removeprefix(prefix) for path in inside]
  if is_outer_table:
    beside.remove(METADATA_FILE)
    paths.append(METADATA_FILE)

  def full(path: str) -> str:
    is_outer = is_outer_table and path == METADATA_FILE
    return path if is_outer else prefix + path

  tree = tree.without({path: tree.reason(path) for path in beside})
  return Tree(
    name=tree.name,
    paths=tuple(sorted(paths)),
    folders=frozenset(
      path.removeprefix(prefix) for path in tree.folders if path != root
    ),
    read=lambda path, num_bytes=-1: read(full(path), num_bytes),
    kind=lambda path: kind(full(path)),
    left_out=tree.left_out,
    fingerprint=tree.fingerprint,
    root=tree.root + prefix,
  )
