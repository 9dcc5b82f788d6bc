"""Images of more than 8 bits: what becomes black, and what white."""

import io
import math
import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ORIENTATION = 274
"""EXIF's tag."""
# A file is one of these whatever its name says, and no other decoder (as that
# of PostScript, which starts a program) is offered it.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339
_DEPTH_AND_KIND = slice(24, 26)
"""Of a PNG: bits, and 4 for grey with transparency, 6 for colour with it."""
# Loads the decoders now, and not in several threads at once.
Image.init()


class RefusedError(ValueError):
  """An image that could be decoded, but must not be."""


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


def open_image(content: bytes) -> Image.Image:
  """Opens an image without decoding it; raises what Pillow raises."""
  return Image.open(io.BytesIO(content), formats=_FORMATS)


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
  whole: dict[str, Range] = {}
  for kind, low, high in ranges:
    before = whole.get(kind, Range(kind, 0, 0))
    whole[kind] = Range(kind, min(before.low, low), max(before.high, high))
  for kind, known in whole.items():
    if known.num_bits is None and known.low >= -1:
      whole[kind] = Range(kind, -1 if known.low < 0 else 0, 1)
    else:
      low = math.floor(known.low)
      bits = Range("", low, known.high).num_bits or 0
      whole[kind] = Range(kind, low, low + 2**bits - 1)
  return whole


def values_of(image: Any, content: bytes) -> tuple[Any, str | None]:
  """Returns the values of an image of more than 8 bits and their kind, or None.

  Raises:
    ValueError: If they are not all finite.
  """
  if image.mode == "F":
    values = np.asarray(image)
    if not np.isfinite(values).all():
      raise RefusedError("its pixels are not all finite numbers")
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
  with open_image(content) as again:
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
  with open_image(content[:12] + header + check + content[33:]) as image:
    parts = np.asarray(image).astype(np.int64)
  grey, alpha = ((parts[..., i] << 8) + parts[..., i + 1] for i in (0, 2))
  return np.stack([grey, grey, grey, alpha], -1)


def range_of(kind: str, values: np.ndarray) -> Range:
  """Returns the range of an image's values, without those of transparency."""
  if values.ndim == 3:
    values = values[..., :3]
  return Range(kind, float(values.min()), float(values.max()))


def scaled(
  image: Image.Image,
  values: np.ndarray,
  kind: str,
  ranges: Mapping[str, Range] | None,
) -> Image.Image:
  """Brings values of more than 8 bits to 8."""
  if ranges is None and kind.startswith("floating"):
    raise RefusedError("its pixels are floating point, of unknown range")
  if ranges is None and (values.min() < 0 or values.max() > 0xFFFF):
    raise RefusedError("its pixels are integers of more than 16 bits")
  known = (ranges or {}).get(kind) or Range(kind, 0, 0xFFFF)
  pixels = to_bytes(values, known)
  if values.ndim == 3 and values.shape[-1] == 4:
    pixels[..., 3] = values[..., 3] >> 8
  tags: Any = getattr(image, "tag_v2", {})
  # Of 8 bits, Pillow inverts such images itself.
  if values.ndim == 2 and tags.get(_PHOTOMETRIC) == 0:
    pixels = 255 - pixels
  scaled = Image.fromarray(pixels)
  scaled.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
  return scaled


def to_bytes(values: np.ndarray, known: Range) -> np.ndarray:
  """Scales values to uint8; whole bits that are too many are cut off."""
  span = known.high - known.low
  num_bits = known.num_bits
  if num_bits is not None and num_bits >= 8 and span == 2**num_bits - 1:
    scaled = np.floor((values - known.low) * (256 / (span + 1)))
  else:
    scaled = np.rint((values - known.low) * (255 / span))
  return np.clip(scaled, 0, 255).astype(np.uint8)
