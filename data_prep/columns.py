"""Columns of metadata whose values may be missing.

TFDS's features hold no nulls. So these columns are stored as text, empty where
the value is missing, and their types beside them in the set's description.
"""

import datetime
from typing import Any

import pyarrow as pa

TYPES: dict[str, pa.DataType] = {
  str(data_type): data_type
  for data_type in (
    pa.string(),
    pa.bool_(),
    pa.int64(),
    pa.float64(),
    pa.date32(),
    pa.timestamp("s"),
    pa.timestamp("ns"),
    pa.timestamp("s", "UTC"),
    pa.timestamp("ns", "UTC"),
  )
}
"""Stated name -> type, of all types that are restored from text."""


def to_text(value: Any) -> str:
  """Returns the text that stands for a value; None becomes empty."""
  if value is None:
    return ""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, datetime.date | datetime.datetime):
    return value.isoformat()
  # The shortest text that reads back as the same number.
  return repr(float(value)) if isinstance(value, float) else str(value)
