"""From the bytes of any image file to a square RGB image as PNG."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image, ImageOps, ImagePalette

from data_prep import depths, dicom, trees
from psg_jax import files

FITS = ("letterbox", "stretch", "crop")
"""Ways to make an image square: black bars, another aspect ratio, a cut."""
MAX_PIXELS = 178_000_000
"""Of one image; Pillow refuses to open slightly more than that itself."""
# Of these, further pages are no previews.
_PAGED_FORMATS = ("GIF", "PNG", "TIFF", "WEBP")
_COLOR_MAP = 320
# Higher levels take several times as long and save a tenth.
_COMPRESS_LEVEL = 1


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


def may_be_deep(head: bytes) -> bool:
  """Whether a file may have pixels of more than 8 bits, by its first bytes."""
  if head.startswith(b"\x89PNG"):
    return head[24:25] == b"\x10"
  return head[:2] in (b"II", b"MM") or _is_dicom(head)


def value_range(content: bytes, *, window: str = "file") -> depths.Range | None:
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
      frame = dicom.read_frame(content)
      is_windowed = frame.window_for(window) is not None
      return None if is_windowed else frame.range()
    with depths.open_image(content) as image:
      values, kind = depths.values_of(image, content)
  # What is wrong with the file is said when it is encoded.
  except Exception:
    return None
  return None if kind is None else depths.range_of(kind, values)


def encode(
  content: bytes,
  *,
  size: int,
  fit: str,
  ranges: Mapping[str, depths.Range] | None = None,
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
  except depths.RefusedError:
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


def _decode(
  content: bytes,
  size: int,
  fit: str,
  ranges: Mapping[str, depths.Range] | None,
  window: str,
) -> tuple[Image.Image, tuple[int, int], int]:
  """Returns the image, upright and RGB, the upright raw size, and the pages."""
  if dicom.is_available() and _is_dicom(content):
    frame = dicom.read_frame(content)
    height, width = frame.values.shape[:2]
    _check_size(width, height)
    image = Image.fromarray(frame.pixels(window, ranges)).convert("RGB")
    return image, (width, height), frame.num_frames
  with depths.open_image(content) as image:
    width, height = image.size
    _check_size(width, height)
    # Before all that loads the image, for then its raw form is not known.
    values, kind = depths.values_of(image, content)
    num_pages = 1
    if image.format in _PAGED_FORMATS:
      num_pages = getattr(image, "n_frames", 1)
    orientation = image.getexif().get(depths.ORIENTATION, 1)
    needed = _target((width, height), size, fit)
    image.draft("RGB", (2 * needed[0], 2 * needed[1]))
    is_tiff = image.format == "TIFF"
    if kind is not None:
      image = depths.scaled(image, values, kind, ranges)
    _mend_palette(image)
    upright = ImageOps.exif_transpose(image)
    # Of a TIFF, Pillow turns the size itself.
    is_turned = orientation in (5, 6, 7, 8) and not is_tiff
    raw_size = (height, width) if is_turned else (width, height)
    return _to_rgb(upright), raw_size, num_pages


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise depths.RefusedError(
      f"{width}x{height} pixels are more than {MAX_PIXELS:,}"
    )


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


def _is_dicom(content: bytes) -> bool:
  head = content[: trees.HEAD_BYTES]
  kind = trees.kind_of(head)
  # Older files begin with their first element, of group 2 or 8.
  is_bare = head[1:2] == b"\0" and head[:1] in (b"\2", b"\x08")
  return kind == "DICOM" or (not kind and is_bare)


def _mend_palette(image: Image.Image) -> None:
  """Takes a TIFF's colours of 8 bits for what they are.

  They should have 16, of which Pillow takes the upper ones.
  """
  tags: Any = getattr(image, "tag_v2", {})
  colors = tags.get(_COLOR_MAP, ())
  if image.mode == "P" and colors and max(colors) < 256:
    image.load()
    image.palette = ImagePalette.raw("RGB;L", bytes(colors))
