"""DICOM files, which are read where the extra `dicom` (pydicom) is installed.

Values are those of the modality (slope and intercept applied), and become grey
levels by a window. The header says more about an image: patient, date, device.
"""

import datetime
import functools
import importlib.util
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_prep import depths

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
ADVICE = "; DICOM files are read with pydicom: pip install 'psg_jax[dicom]'"
WINDOWS = ("file", "full")
"""Each file's own window where it states one, or none; or CENTER,WIDTH."""
COLUMNS: Mapping[str, tuple[str, pa.DataType]] = {
  "patient_id": ("PatientID", pa.string()),
  "study_date": ("StudyDate", pa.date32()),
  "manufacturer": ("Manufacturer", pa.string()),
  "model": ("ManufacturerModelName", pa.string()),
}
"""Column of metadata -> the header's element, and its type."""


class Frame(NamedTuple):
  """The first image of a file.

  Attributes:
    values: Float32 `[H, W]`, or colours uint8 `[H, W, 3]`.
    window: Centre, width and function that the file states; None without.
    is_inverted: Whether the lowest value is white.
    modality: Such as `"CT"`.
    num_frames: How many images the file holds.
    is_padding: Where there is no image, bool `[H, W]`; None for nowhere.
  """

  values: np.ndarray
  window: tuple[float, float, str] | None
  is_inverted: bool
  modality: str
  num_frames: int
  is_padding: np.ndarray | None

  def window_for(self, window: str) -> tuple[float, float, str] | None:
    """Returns the window to use; None for the range of the set, or colours.

    Args:
      window: As in `parse_window`.
    """
    if self.values.ndim == 3:
      return None
    parsed = parse_window(window)
    if isinstance(parsed, tuple):
      return (*parsed, "LINEAR")
    return self.window if parsed == "file" else None

  def range(self) -> depths.Range | None:
    """Returns the range of the values; None for colours, which have 8 bits."""
    if self.values.ndim == 3:
      return None
    values = self.values
    if self.is_padding is not None and not self.is_padding.all():
      values = values[~self.is_padding]
    return depths.range_of(f"DICOM {self.modality}", values)

  def pixels(
    self, window: str, ranges: Mapping[str, depths.Range] | None
  ) -> np.ndarray:
    """Makes grey levels uint8 `[H, W]`, or returns the colours.

    Args:
      window: As in `parse_window`.
      ranges: Of the set, where there is no window; None for the file's own.
    """
    limits = self.range()
    if limits is None:
      return np.ascontiguousarray(self.values)
    voi = self.window_for(window)
    if voi is not None:
      share = apply_window(self.values, voi)
      pixels = np.rint(255 * share).astype(np.uint8)
    else:
      known = (ranges or depths.set_ranges([limits]))[limits.kind]
      pixels = depths.to_bytes(self.values, known)
    if self.is_inverted:
      pixels = 255 - pixels
    if self.is_padding is not None:
      pixels[self.is_padding] = 0
    return pixels


@functools.cache
def is_available() -> bool:
  """Whether pydicom is installed."""
  return importlib.util.find_spec("pydicom") is not None


def parse_window(text: str) -> tuple[float, float] | str:
  """Reads the option `window`.

  Args:
    text: One of `WINDOWS`, or the centre and the width, such as `40,400`.

  Returns:
    The name, or centre and width.

  Raises:
    ValueError: If it is neither.
  """
  if text in WINDOWS:
    return text
  try:
    center, width = (float(part) for part in text.split(","))
  except ValueError:
    center, width = 0.0, math.nan
  if not (math.isfinite(center) and 1 < width < math.inf):
    raise ValueError(
      f"window must be file, full, or CENTER,WIDTH such as 40,400, got {text!r}"
    )
  return center, width


def read_columns(content: bytes) -> dict[str, str | None] | None:
  """Reads what the header says about an image.

  Args:
    content: The file.

  Returns:
    The text of `COLUMNS`, None for what is not known; or None for a file that
    holds no image.
  """
  import pydicom

  try:
    header = pydicom.dcmread(
      io.BytesIO(content), stop_before_pixels=True, force=True
    )
    if "Rows" not in header:
      return None
    return {
      column: _text(header.get(element), kind)
      for column, (element, kind) in COLUMNS.items()
    }
  # pydicom differs in what it raises on damaged files.
  except Exception:
    return None


def read_frame(content: bytes) -> Frame:
  """Decodes the first image of a file.

  Args:
    content: The file.

  Returns:
    Its values, slope and intercept (or the modality's table) applied.

  Raises:
    ValueError: If it is damaged, or its compression cannot be decoded.
  """
  import pydicom
  from pydicom import pixels

  try:
    file = pydicom.dcmread(io.BytesIO(content), force=True)
    kind = str(file.PhotometricInterpretation)
    num_frames = int(file.get("NumberOfFrames") or 1)
    stored = pixels.pixel_array(file, index=0)
    if stored.ndim == 3:
      return _colours(stored, num_frames, str(file.get("Modality", "")))
    if kind == "PALETTE COLOR":
      stored = pixels.apply_color_lut(stored, file)
      return _colours(stored, num_frames, str(file.get("Modality", "")))
    values = np.asarray(pixels.apply_modality_lut(stored, file), np.float32)
  # pydicom and its decoders differ in what they raise on damaged files.
  except Exception as error:
    raise ValueError(f"DICOM: {error or type(error).__name__}") from error
  return Frame(
    values=values,
    window=_window(file),
    is_inverted=kind == "MONOCHROME1",
    modality=str(file.get("Modality", "")),
    num_frames=num_frames,
    is_padding=_padding(file, stored),
  )


def apply_window(
  values: np.ndarray, window: tuple[float, float, str]
) -> np.ndarray:
  """Brings values to [0, 1] as DICOM's VOI functions do (PS3.3 C.11.2).

  Args:
    values: Float `[H, W]`.
    window: Centre, width, and LINEAR, LINEAR_EXACT or SIGMOID.

  Returns:
    Float `[H, W]`.
  """
  center, width, function = window
  if function == "SIGMOID":
    return 1 / (1 + np.exp(-4 * (values - center) / width))
  if function == "LINEAR":
    # Of integers: the window of width 1 is a threshold.
    center, width = center - 0.5, max(width - 1, 1e-6)
  return np.clip((values - center) / width + 0.5, 0, 1)


def _colours(stored: np.ndarray, num_frames: int, modality: str) -> Frame:
  if stored.dtype != np.uint8:
    stored = (stored >> 8).astype(np.uint8)
  return Frame(stored, None, False, modality, num_frames, None)


def _window(file: Any) -> tuple[float, float, str] | None:
  """Returns the first window that a file states."""
  try:
    center, width = (
      float(value[0] if isinstance(value, list | tuple) else value)
      for value in map(_listed, (file.WindowCenter, file.WindowWidth))
    )
  except (AttributeError, IndexError, TypeError, ValueError):
    return None
  if not (math.isfinite(center) and 0 < width < math.inf):
    return None
  return center, width, str(file.get("VOILUTFunction") or "LINEAR").upper()


def _listed(value: Any) -> Any:
  # pydicom's own list of several windows.
  return list(value) if hasattr(value, "__iter__") else value


def _padding(file: Any, stored: np.ndarray) -> np.ndarray | None:
  value = file.get("PixelPaddingValue")
  return None if value is None else stored == int(value)


def _text(value: Any, kind: pa.DataType) -> str | None:
  text = " ".join(str(value or "").replace("\0", " ").split())
  if kind != pa.date32():
    return text or None
  try:
    return datetime.datetime.strptime(text.replace(".", ""), "%Y%m%d").strftime(
      "%Y-%m-%d"
    )
  except ValueError:
    return None
