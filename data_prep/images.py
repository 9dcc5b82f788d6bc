"""From the bytes of any image file to a square RGB image as PNG.

The work on one image is a function; `ordered_map` runs it in threads, since
Pillow lets go of Python's lock while it decodes, resizes and encodes.
"""

import collections
import concurrent.futures
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

FITS = ("letterbox", "stretch", "crop")
"""Ways to make an image square: black bars, another aspect ratio, a cut."""
MAX_PIXELS = 178_000_000
"""Of one image; Pillow refuses to open slightly more than that itself."""
# A file is one of these whatever its name says, and no other decoder (as that
# of PostScript, which starts a program) is offered it.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
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
  """

  png: bytes
  sha256: str
  width: int
  height: int


def encode(content: bytes, *, size: int, fit: str) -> Encoded:
  """Decodes an image file, makes it square and encodes it.

  Transparent parts become black; grey images of 16 bits keep the upper 8.
  JPEG files are decoded at the lowest resolution that is at least twice the
  final one, which is as sharp and faster.

  Args:
    content: The raw file.
    size: Pixels a side.
    fit: One of `FITS`.

  Returns:
    The encoded image and what is known of the raw one.

  Raises:
    ValueError: If the bytes are no image, or a damaged or too large one; the
      message is a phrase that says why.
  """
  try:
    image, raw_size = _decode(content, size, fit)
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
    sha256=hashlib.sha256(content).hexdigest(),
    width=raw_size[0],
    height=raw_size[1],
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


def _decode(
  content: bytes, size: int, fit: str
) -> tuple[Image.Image, tuple[int, int]]:
  """Returns the image, upright and RGB, and the upright raw size."""
  with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
    width, height = image.size
    if width * height > MAX_PIXELS:
      raise _RefusedError(
        f"{width}x{height} pixels are more than {MAX_PIXELS:,}"
      )
    orientation = image.getexif().get(0x0112, 1)
    needed = _target((width, height), size, fit)
    image.draft("RGB", (2 * needed[0], 2 * needed[1]))
    upright = ImageOps.exif_transpose(image)
    is_turned = orientation in (5, 6, 7, 8)
    return _to_rgb(upright), (height, width) if is_turned else (width, height)


def _target(raw: tuple[int, int], size: int, fit: str) -> tuple[int, int]:
  """Returns the size to which the whole raw image is brought."""
  if fit == "stretch":
    return size, size
  scale = size / (min(raw) if fit == "crop" else max(raw))
  return max(1, round(raw[0] * scale)), max(1, round(raw[1] * scale))


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
      raise _RefusedError("its pixels are integers of more than 16 bits")
    image = Image.fromarray((pixels >> 8).astype(np.uint8))
  elif image.mode == "F":
    raise _RefusedError("its pixels are floating point, of unknown range")
  if "A" in image.mode or "transparency" in image.info:
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    image = Image.alpha_composite(black, image)
  return image.convert("RGB")
