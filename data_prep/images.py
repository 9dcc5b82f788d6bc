"""From the bytes of any image file to a square RGB image as PNG.

The work on one image is a function; `ordered_map` runs it in threads, since
Pillow lets go of Python's lock while it decodes, resizes and encodes.
"""

import collections
import concurrent.futures
import io
import itertools
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, ImagePalette

from data_prep import dicom, trees
from psg_jax import files

FITS = ("letterbox", "stretch", "crop")
"""Ways to make an image square: black bars, another aspect ratio, a cut."""
MAX_PIXELS = 178_000_000
"""Of one image; Pillow refuses to open slightly more than that itself."""
# A file is one of these whatever its name says, and no other decoder (as that
# of PostScript, which starts a program) is offered it.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Of these, further pages are no previews.
_PAGED_FORMATS = ("GIF", "PNG", "TIFF", "WEBP")
_ORIENTATION, _PHOTOMETRIC, _COLOR_MAP, _SAMPLE_FORMAT = 274, 262, 320, 339
_DEPTH_AND_KIND = slice(24, 26)
"""Of a PNG: bits, and 4 for grey with transparency, 6 for colour with it."""
# Loads the decoders now, and not in several threads at once.
Image.init()
# Higher levels take several times as long and save a tenth.
_COMPRESS_LEVEL = 1
_MAX_WORKERS = 16
_LOOK_AHEAD = 4

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Encoded(NamedTuple):
  """An image ready to be stored.

  Attributes:
    png: The square RGB image.
    sha256: Of the raw file, in hexadecimal digits.
    width: Of the raw image, upright, in pixels.
    height: Likewise.
    num_pages: How many images the file holds, of which this is the first.
  """

  png: bytes
  sha256: str
  width: int
  height: int
  num_pages: int = 1


class Range(NamedTuple):
  """The values of an image of more than 8 bits, or of all of them in a set.

  Attributes:
    kind: What is scaled alike, such as `"16-bit colour"`, `"DICOM CT"`.
    low: The lowest value, or the one that becomes black.
    high: The highest, or the one that becomes white.
  """

  kind: str
  low: float
  high: float

  @property
  def num_bits(self) -> int | None:
    """How many bits there are from black to white; None for fractions."""
    if self.kind.startswith("floating") and self.high <= 1:
      return None
    return max(1, math.ceil(math.log2(math.ceil(self.high - self.low) + 1)))


def may_be_deep(head: bytes) -> bool:
  """Whether a file may have pixels of more than 8 bits, by its first bytes."""
  if head.startswith(b"\x89PNG"):
    return head[24:25] == b"\x10"
  return head[:2] in (b"II", b"MM") or _is_dicom(head)


def value_range(content: bytes, *, window: str = "file") -> Range | None:
  """Returns the values of an image of more than 8 bits.

  Args:
    content: The raw file.
    window: As in `encode`.

  Returns:
    The range; None where it does not matter, because pixels are of 8 bits or
    the image has a window, or is not known, because the file is damaged.
  """
  try:
    if _is_dicom(content):
      return _dicom_range(content, dicom.parse_window(window))
    with _open(content) as image:
      values, kind = _values(image, content)
  # What is wrong with the file is said when it is encoded.
  except Exception:
    return None
  return None if kind is None else _range(kind, values)


def set_ranges(ranges: Iterable[Range]) -> dict[str, Range]:
  """Finds what becomes black and white in all images of a set.

  Black is 0, or the lowest value where there are negative ones; white is above
  it by the largest number of the bits that are really used. Fractions keep the
  range from 0 (or -1) to 1.

  Args:
    ranges: Those of the images.

  Returns:
    By kind.
  """
  found: dict[str, Range] = {}
  for kind, low, high in ranges:
    before = found.get(kind, Range(kind, 0, 0))
    found[kind] = Range(kind, min(before.low, low), max(before.high, high))
  for kind, each in found.items():
    if each.num_bits is None and each.low >= -1:
      found[kind] = Range(kind, -1 if each.low < 0 else 0, 1)
    else:
      low = math.floor(each.low)
      bits = Range("", low, each.high).num_bits or 0
      found[kind] = Range(kind, low, low + 2**bits - 1)
  return found


def encode(
  content: bytes,
  *,
  size: int,
  fit: str,
  ranges: Mapping[str, Range] | None = None,
  window: str = "file",
) -> Encoded:
  """Decodes an image file, makes it square and encodes it.

  Transparent parts become black; of several pages the first is taken. Pixels of
  more than 8 bits are scaled by the range of the set. JPEG files are decoded at
  the lowest resolution that is at least twice the final one, which is as sharp
  and faster.

  Args:
    content: The raw file.
    size: Pixels a side.
    fit: One of `FITS`.
    ranges: From `set_ranges`; without it, grey images of 16 bits and colour
      keep the upper 8, and others of more than 8 bits are refused.
    window: Of DICOM files: `"file"` takes what each file states and else the
      range, `"full"` the range, and `"CENTER,WIDTH"` these.

  Returns:
    The encoded image and what is known of the raw one.

  Raises:
    ValueError: If the bytes are no image, or a damaged or too large one; the
      message is a phrase that says why.
  """
  try:
    image, raw_size, num_pages = _decode(content, size, fit, ranges, window)
    buffer = io.BytesIO()
    make_square(image, size, fit).save(
      buffer, "PNG", compress_level=_COMPRESS_LEVEL
    )
  except _RefusedError:
    raise
  except Image.UnidentifiedImageError:
    raise ValueError("not an image of a known format") from None
  # Pillow's decoders differ in what they raise on damaged files.
  except Exception as error:
    raise ValueError(str(error) or type(error).__name__) from error
  return Encoded(
    png=buffer.getvalue(),
    sha256=files.digest(content),
    width=raw_size[0],
    height=raw_size[1],
    num_pages=num_pages,
  )


def make_square(image: Image.Image, size: int, fit: str) -> Image.Image:
  """Resizes an RGB image to `size` pixels a side with an antialiasing filter.

  Args:
    image: Of any size.
    size: Pixels a side of the result.
    fit: `"letterbox"` keeps the aspect ratio and adds black bars, `"crop"`
      takes the square in the middle, `"stretch"` changes the aspect ratio.

  Returns:
    The square image.
  """
  if fit == "crop":
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
  inner = _target(image.size, size, fit)
  if image.size != inner:
    # First an exact reduction by a whole number where it is very large.
    image = image.resize(inner, Image.Resampling.LANCZOS, reducing_gap=3.0)
  if inner == (size, size):
    return image
  square = Image.new("RGB", (size, size))
  square.paste(image, ((size - inner[0]) // 2, (size - inner[1]) // 2))
  return square


def ordered_map(
  function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[tuple[_Item, _Result]]:
  """Runs a function on items in threads, a few of them ahead.

  Args:
    function: Safe to run in several threads at once.
    items: What to run it on.

  Yields:
    Item and result, in the order of the items.
  """
  num_workers = min(_num_cores(), _MAX_WORKERS)
  waiting: collections.deque[
    tuple[_Item, concurrent.futures.Future[_Result]]
  ] = collections.deque()
  iterator = iter(items)
  with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
    try:
      for item in itertools.islice(iterator, num_workers * _LOOK_AHEAD):
        waiting.append((item, pool.submit(function, item)))
      while waiting:
        item, future = waiting.popleft()
        result = future.result()
        for later in itertools.islice(iterator, 1):
          waiting.append((later, pool.submit(function, later)))
        yield item, result
    finally:
      # On Ctrl-C nobody waits for what is no longer wanted.
      pool.shutdown(wait=False, cancel_futures=True)


class _RefusedError(ValueError):
  """An image that could be decoded, but must not be."""


def _num_cores() -> int:
  """Returns how many cores this process may use, where the system tells."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _open(content: bytes) -> Image.Image:
  return Image.open(io.BytesIO(content), formats=_FORMATS)


def _decode(
  content: bytes,
  size: int,
  fit: str,
  ranges: Mapping[str, Range] | None,
  window: str,
) -> tuple[Image.Image, tuple[int, int], int]:
  """Returns the image, upright and RGB, the upright raw size, and the pages."""
  if dicom.is_available() and _is_dicom(content):
    return _decode_dicom(content, ranges, dicom.parse_window(window))
  with _open(content) as image:
    width, height = image.size
    if width * height > MAX_PIXELS:
      raise _RefusedError(
        f"{width}x{height} pixels are more than {MAX_PIXELS:,}"
      )
    # Before all that loads the image, for then its raw form is not known.
    values, kind = _values(image, content)
    num_pages = 1
    if image.format in _PAGED_FORMATS:
      num_pages = getattr(image, "n_frames", 1)
    orientation = image.getexif().get(_ORIENTATION, 1)
    needed = _target((width, height), size, fit)
    image.draft("RGB", (2 * needed[0], 2 * needed[1]))
    is_tiff = image.format == "TIFF"
    if kind is not None:
      image = _scaled(image, values, kind, ranges)
    _mend_palette(image)
    upright = ImageOps.exif_transpose(image)
    # Of a TIFF, Pillow turns the size itself.
    is_turned = orientation in (5, 6, 7, 8) and not is_tiff
    raw_size = (height, width) if is_turned else (width, height)
    return _to_rgb(upright), raw_size, num_pages


def _target(raw: tuple[int, int], size: int, fit: str) -> tuple[int, int]:
  """Returns the size to which the whole raw image is brought."""
  if fit == "stretch":
    return size, size
  scale = size / (min(raw) if fit == "crop" else max(raw))
  return max(1, round(raw[0] * scale)), max(1, round(raw[1] * scale))


def _to_rgb(image: Image.Image) -> Image.Image:
  if "A" in image.mode or "transparency" in image.info:
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    image = Image.alpha_composite(black, image)
  return image.convert("RGB")


def _values(image: Any, content: bytes) -> tuple[Any, str | None]:
  """Returns the values of an image of more than 8 bits and their kind, or None.

  Raises:
    ValueError: If they are not all finite.
  """
  if image.mode == "F":
    values = np.asarray(image)
    if not np.isfinite(values).all():
      raise _RefusedError("its pixels are not all finite numbers")
    return values, "floating-point grey"
  if image.mode.startswith("I"):
    values = np.asarray(image).astype(np.int64)
    # Pillow knows no unsigned integers of 32 bits.
    is_unsigned = _sample_format(image) == 1 and values.min(initial=0) < 0
    values = values & 0xFFFFFFFF if is_unsigned else values
    return values, "grey of more than 8 bits"
  if image.mode == "L" and _sample_format(image) == 2:
    return np.asarray(image).view(np.int8).astype(np.int64), "signed 8-bit grey"
  if image.mode in ("RGB", "RGBA") and ";16" in str(image.tile):
    return _wide_colour(image, content), "16-bit colour"
  return None, None


def _sample_format(image: Any) -> int:
  """Of a TIFF: 1 for unsigned integers, 2 for signed, 3 for floats; else 0."""
  tags: Any = getattr(image, "tag_v2", {})
  return int(tags.get(_SAMPLE_FORMAT, (1 if tags else 0,))[0])


def _wide_colour(image: Any, content: bytes) -> np.ndarray:
  """Reads colours of 16 bits `[H, W, C]`, of which Pillow gives the upper 8.

  In the other order of bytes, it gives the lower ones.
  """
  if content.startswith(b"\x89PNG") and content[_DEPTH_AND_KIND] == b"\x10\4":
    return _wide_grey_with_alpha(content)
  native = "L" if sys.byteorder == "little" else "B"
  other = {"L": "B", "B": "L"}

  def swap(arguments: Any) -> Any:
    if isinstance(arguments, tuple):
      return (swap(arguments[0]), *arguments[1:])
    order = arguments[-1].replace("N", native)
    return arguments[:-1] + other[order]

  again: Any
  with _open(content) as again:
    again.tile = [part._replace(args=swap(part.args)) for part in again.tile]
    high = np.asarray(image).astype(np.int64)
    low = np.asarray(again)
  return (high << 8) + low


def _wide_grey_with_alpha(content: bytes) -> np.ndarray:
  """Reads a PNG of grey and transparency of 16 bits as colours `[H, W, 4]`.

  Pillow gives the upper 8 bits. With another header, the four bytes of a pixel
  are four channels.
  """
  header = bytearray(content[12:29])
  header[12:14] = b"\x08\6"
  check = zlib.crc32(header).to_bytes(4, "big")
  with _open(content[:12] + header + check + content[33:]) as image:
    parts = np.asarray(image).astype(np.int64)
  grey, alpha = ((parts[..., i] << 8) + parts[..., i + 1] for i in (0, 2))
  return np.stack([grey, grey, grey, alpha], -1)


def _range(kind: str, values: np.ndarray) -> Range:
  if values.ndim == 3:
    values = values[..., :3]
  return Range(kind, float(values.min()), float(values.max()))


def _scaled(
  image: Image.Image,
  values: np.ndarray,
  kind: str,
  ranges: Mapping[str, Range] | None,
) -> Image.Image:
  """Brings values of more than 8 bits to 8."""
  if ranges is None and kind.startswith("floating"):
    raise _RefusedError("its pixels are floating point, of unknown range")
  if ranges is None and (values.min() < 0 or values.max() > 0xFFFF):
    raise _RefusedError("its pixels are integers of more than 16 bits")
  known = (ranges or {}).get(kind) or Range(kind, 0, 0xFFFF)
  pixels = _to_bytes(values, known)
  if values.ndim == 3 and values.shape[-1] == 4:
    pixels[..., 3] = values[..., 3] >> 8
  tags: Any = getattr(image, "tag_v2", {})
  # Of 8 bits, Pillow inverts such images itself.
  if values.ndim == 2 and tags.get(_PHOTOMETRIC) == 0:
    pixels = 255 - pixels
  scaled = Image.fromarray(pixels)
  scaled.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
  return scaled


def _to_bytes(values: np.ndarray, known: Range) -> np.ndarray:
  """Scales values to uint8; whole bits that are too many are cut off."""
  span = known.high - known.low
  num_bits = known.num_bits
  if num_bits is not None and num_bits >= 8 and span == 2**num_bits - 1:
    scaled = np.floor((values - known.low) * (256 / (span + 1)))
  else:
    scaled = np.rint((values - known.low) * (255 / span))
  return np.clip(scaled, 0, 255).astype(np.uint8)


def _mend_palette(image: Image.Image) -> None:
  """Takes a TIFF's colours of 8 bits for what they are.

  They should have 16, of which Pillow takes the upper ones.
  """
  tags: Any = getattr(image, "tag_v2", {})
  colors = tags.get(_COLOR_MAP, ())
  if image.mode == "P" and colors and max(colors) < 256:
    image.load()
    image.palette = ImagePalette.raw("RGB;L", bytes(colors))


def _is_dicom(content: bytes) -> bool:
  head = content[: trees.HEAD_BYTES]
  kind = trees.kind_of(head)
  # Older files begin with their first element, of group 2 or 8.
  is_bare = head[1:2] == b"\0" and head[:1] in (b"\2", b"\x08")
  return kind == "DICOM" or (not kind and is_bare)


def _decode_dicom(
  content: bytes,
  ranges: Mapping[str, Range] | None,
  window: tuple[float, float] | str,
) -> tuple[Image.Image, tuple[int, int], int]:
  frame = dicom.read_frame(content)
  height, width = frame.values.shape[:2]
  if width * height > MAX_PIXELS:
    raise _RefusedError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
  if frame.values.ndim == 3:
    pixels = frame.values
  else:
    chosen = _window(frame, window)
    if chosen is not None:
      share = dicom.apply_window(frame.values, chosen)
      pixels = np.rint(255 * share).astype(np.uint8)
    else:
      own = {each.kind: each for each in [_frame_range(frame)]}
      known = (ranges or set_ranges(own.values()))[f"DICOM {frame.modality}"]
      pixels = _to_bytes(frame.values, known)
    if frame.is_inverted:
      pixels = 255 - pixels
    if frame.is_padding is not None:
      pixels[frame.is_padding] = 0
  image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
  return image, (width, height), frame.num_frames


def _window(
  frame: dicom.Frame, window: tuple[float, float] | str
) -> tuple[float, float, str] | None:
  """Returns the window to use, or None for the range of the set."""
  if isinstance(window, tuple):
    return (*window, "LINEAR")
  return frame.window if window == "file" else None


def _dicom_range(
  content: bytes, window: tuple[float, float] | str
) -> Range | None:
  frame = dicom.read_frame(content)
  if frame.values.ndim == 3 or _window(frame, window) is not None:
    return None
  return _frame_range(frame)


def _frame_range(frame: dicom.Frame) -> Range:
  values = frame.values
  if frame.is_padding is not None and not frame.is_padding.all():
    values = values[~frame.is_padding]
  return _range(f"DICOM {frame.modality}", values)
