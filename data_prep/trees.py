"""What builders see of a source: its files by path, and what they are."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from data_prep import dicom

METADATA_FILE = "metadata.csv"
HEAD_BYTES = 132
"""From them the kind of a file is known."""
IMAGE_SUFFIXES = frozenset(
  {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
SYSTEM_FOLDERS = frozenset(
  {
    *("#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot"),
    *("@recycle", "@tmp", "__macosx", "lost+found"),
    "system volume information",
  }
)
"""What systems and network drives put among files; in lower case."""
SYSTEM_REASONS = ("hidden", "system folder")
"""Why a file is left out that comes and goes with the system."""
# The preview in them, which is all that a decoder finds, is not the image.
_RAW_SUFFIXES = frozenset(
  {
    *(".3fr", ".arw", ".cr2", ".dng", ".erf", ".iiq", ".nef", ".nrw"),
    *(".orf", ".pef", ".rw2", ".sr2", ".srw"),
    *(".ndpi", ".scn", ".svs"),
  }
)


class Tree(NamedTuple):
  """The files of a folder or of a zip, which is never unpacked.

  Attributes:
    name: The folder or zip, for messages.
    entries: Every file's path with "/", relative to the root -> its path in
      the folder or zip; sorted, without those that are left out.
    folders: Every folder's path, empty ones too.
    content: Path in the folder or zip, and how many bytes at most (-1 for all)
      -> content.
    entry_kind: Path in the folder or zip -> as `kind`.
    left_out: Path in the folder or zip -> why it is not read, such as
      `"hidden"`.
    fingerprint: A SHA-256 that changes with the files: of a folder by path,
      size and time of change, of a zip by path, size and checksum.
    root: Path of the root in the folder or zip, with a slash behind, or "".
  """

  name: str
  entries: Mapping[str, str]
  folders: frozenset[str]
  content: Callable[[str, int], bytes]
  entry_kind: Callable[[str], str]
  left_out: Mapping[str, str]
  fingerprint: str
  root: str = ""

  def read(self, path: str, num_bytes: int = -1) -> bytes:
    """Reads a file, or so many bytes of it; raises ValueError or OSError."""
    return self.content(self.entries[path], num_bytes)

  def kind(self, path: str) -> str:
    """What a file is, by its ending or else by its first bytes.

    Returns:
      `"image"`, `"DICOM"` or `""`.
    """
    return self.entry_kind(self.entries[path])

  def is_read(self, path: str) -> bool:
    """Whether a file is an image that can be read here."""
    kind = self.kind(path)
    return bool(kind) and (kind != "DICOM" or dicom.is_available())

  def without(self, left_out: Mapping[str, str]) -> "Tree":
    """Leaves files out, path -> why."""
    named = {self.root + path: why for path, why in left_out.items()}
    return self._replace(
      entries={
        path: entry
        for path, entry in self.entries.items()
        if path not in left_out
      },
      left_out={**self.left_out, **named},
    )

  def reason(self, path: str) -> str:
    """Returns why a file outside all that is read is left out."""
    if self.is_read(path):
      return "outside class folders"
    return "DICOM, without pydicom" if self.kind(path) else "not an image"


def hidden_reason(path: str) -> str:
  """Returns why a path is left out by its names, or ""."""
  for name in path.split("/"):
    if name.lower() in SYSTEM_FOLDERS:
      return SYSTEM_REASONS[1]
    if name.startswith("."):
      return SYSTEM_REASONS[0]
  return ""


def kinds(content: Callable[[str, int], bytes]) -> Callable[[str], str]:
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
      return kind_of(content(path, HEAD_BYTES))
    except (OSError, ValueError):
      return ""

  return kind


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


def is_table(path: str) -> bool:
  """Whether a file is called like a table of metadata."""
  return path.rpartition("/")[2] == METADATA_FILE


def sum_up(left_out: Mapping[str, str]) -> list[dict[str, Any]]:
  """Counts what is left out, path -> why, by reason and ending.

  Returns:
    For each of them `why`, `ending`, `count` and `first`, a path; the commonest
    first.
  """
  groups: dict[tuple[str, str], list[str]] = {}
  for path in sorted(left_out):
    ending = pathlib.PurePosixPath(path).suffix.lower()
    groups.setdefault((left_out[path], ending), []).append(path)
  items = [
    {"why": why, "ending": ending, "count": len(paths), "first": paths[0]}
    for (why, ending), paths in groups.items()
  ]
  return sorted(items, key=lambda item: -item["count"])


def describe(left_out: Mapping[str, str]) -> str:
  """Returns what `sum_up` counts as a phrase; `""` for nothing."""
  items = sum_up(left_out)
  phrase = ", ".join(
    f"{item['count']:,} {item['ending'] or 'without ending'} ({item['why']})"
    for item in items
  )
  needs_pydicom = any("pydicom" in item["why"] for item in items)
  return phrase + dicom.ADVICE * needs_pydicom
