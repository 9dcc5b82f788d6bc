"""Columns of metadata, by names and values that are what they look like."""

import difflib
import functools
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from psg_jax import checks, types

NO_VALUE = "(none)"
_MAX_TEXT = 120
few = functools.partial(checks.few, num_shown=5)
"""Names the first of many values."""


def nfc(text: str) -> str:
  """Returns one form of texts that look the same."""
  return unicodedata.normalize("NFC", text)


def short(text: str) -> str:
  """Returns one line, not too long, to be quoted in a message."""
  line = " ".join(text.split())
  return line if len(line) <= _MAX_TEXT else f"{line[: _MAX_TEXT - 3]}..."


def hint(value: str, names: Iterable[str]) -> str:
  """Suggests the nearest name, whatever the case of its letters."""
  folded = {name.casefold(): name for name in names}
  close = difflib.get_close_matches(value.casefold(), folded, n=1)
  if close:
    return f", did you mean {folded[close[0]]!r}?"
  return f" (known: {few(list(folded.values()))})"


def read(argument: str, dataset: types.Dataset, name: str) -> pa.ChunkedArray:
  """Returns a metadata column, its values themselves and not their numbers.

  Args:
    argument: What names the column, for the message.
    dataset: Images with metadata.
    name: The column, in any form of Unicode.

  Raises:
    ValueError: If there is no such column.
  """
  if dataset.metadata is None:
    raise ValueError(
      f"{argument} needs metadata, and dataset has none: got {name!r}"
    )
  names = dataset.metadata.column_names
  if name not in names:
    names, name = [nfc(other) for other in names], nfc(name)
  if name not in names:
    raise ValueError(
      f"{argument} must be a metadata column, got {name!r}{hint(name, names)}"
    )
  return plain(dataset.metadata.column(names.index(name)))


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
  """Returns a column of the values that a dictionary's numbers stand for."""
  if pa.types.is_dictionary(column.type):
    return column.cast(column.type.value_type)
  return column


def is_text(data_type: pa.DataType) -> bool:
  """Whether values of a type are texts."""
  return pa.types.is_string(data_type) or pa.types.is_large_string(data_type)


def kind(data_type: pa.DataType) -> str:
  """Returns what values of a type are compared as, in words."""
  if pa.types.is_dictionary(data_type):
    data_type = data_type.value_type
  names = (
    (is_text, "text"),
    (pa.types.is_boolean, "true or false"),
    (pa.types.is_date, "a date"),
    (pa.types.is_timestamp, "a time"),
    (pa.types.is_integer, "a number"),
    (pa.types.is_floating, "a number"),
    (pa.types.is_decimal, "a number"),
  )
  return next(
    (name for is_type, name in names if is_type(data_type)), str(data_type)
  )


def is_missing(column: pa.ChunkedArray) -> np.ndarray:
  """Whether a value is null, not a number or an empty text, bool `[N]`."""
  column = plain(column)
  missing = pc.is_null(column, nan_is_null=True)
  if is_text(column.type):
    is_blank = pc.equal(pc.utf8_trim_whitespace(column), "")
    missing = pc.or_(missing, pc.fill_null(is_blank, False))
  return np.asarray(missing.to_numpy(), bool)


def encode(
  argument: str, dataset: types.Dataset, name: str
) -> pa.DictionaryArray:
  """Returns the values of a column as text, null where they are missing.

  Args:
    argument: What names the column, for the message.
    dataset: Images with metadata.
    name: The column.

  Raises:
    ValueError: If there is no such column, or it has no single values.
  """
  column = read(argument, dataset, name)
  try:
    encoded = pa.chunked_array([column.combine_chunks()]).dictionary_encode()
  except pa.ArrowNotImplementedError:
    raise ValueError(
      f"{argument} must be a column of single values, got {name!r} of type"
      f" {column.type}"
    ) from None
  encoded = encoded.combine_chunks()
  texts = [str(value) for value in encoded.dictionary.to_pylist()]
  return pa.DictionaryArray.from_arrays(
    encoded.indices.fill_null(0).to_numpy(),
    pa.array(texts, pa.string()),
    mask=is_missing(column),
  )


def texts(argument: str, dataset: types.Dataset, name: str) -> pa.Array:
  """Returns the values of a column as `encode`, `NO_VALUE` where missing."""
  values = encode(argument, dataset, name).cast(pa.string())
  return values.fill_null(NO_VALUE)


def group_codes(dataset: types.Dataset, group: str | None) -> np.ndarray:
  """Numbers what is forgotten as a whole.

  Args:
    dataset: Images, with metadata if there is a group.
    group: As in `Request`.

  Returns:
    The group's number of each image, `[N]`; images without one get their own.

  Raises:
    ValueError: If there is no such column, or it has no single values.
  """
  if group is None:
    return np.arange(len(dataset))
  values = encode("group", dataset, group)
  codes = values.indices.fill_null(0).to_numpy().astype(np.int64)
  alone = np.flatnonzero(values.is_null())
  codes[alone] = len(values.dictionary) + np.arange(len(alone))
  return codes


def alike(
  dataset: types.Dataset, names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
  """Returns values of text that look the same and are not, by column.

  Args:
    dataset: Images with metadata.
    names: The columns.
  """
  groups = {}
  for name in dict.fromkeys(names):
    column = read("group", dataset, name)
    if not is_text(column.type):
      continue
    values = pc.unique(column).drop_null()
    folded = [checks.folded(value) for value in values.to_pylist()]
    _, codes, counts = np.unique(
      folded, return_inverse=True, return_counts=True
    )
    rows = np.flatnonzero((counts > 1)[codes] & (np.array(folded) != ""))
    if len(rows):
      rows = rows[np.argsort(codes[rows], kind="stable")]
      groups[name] = tuple(values.take(rows).to_pylist())
  return groups
