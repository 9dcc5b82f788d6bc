"""Checks of arguments: one clear line that names the argument and the value.

Values under a JAX transformation are unknown and pass unchecked: there, bad
input shows as masks and NaN in the result.
"""

import codecs
import difflib
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

_MARKS = (
  # That of UTF-32 begins with that of UTF-16.
  (codecs.BOM_UTF32_LE, "utf-32"),
  (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF8, "utf-8-sig"),
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
_FIRST_BYTES = (
  (b"PK\x03\x04", "an Excel or zip file"),
  (b"\xd0\xcf\x11\xe0", "an Excel file of before 2007"),
  (b"\x1f\x8b", "compressed by gzip"),
  (b"%PDF", "a PDF file"),
  (b"PAR1", "a Parquet file"),
  (b"SQLite format 3", "a database"),
)
# With a name that is near, more than these say less than that one.
_MAX_NAMED = 30


def is_traced(*values: Any) -> bool:
  """Whether any value is known only by shape, as under `jit` or `vmap`."""
  return any(
    isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)
  )


def number(
  name: str,
  value: Any,
  *,
  above: float | None = None,
  at_least: float | None = None,
  at_most: float | None = None,
  below: float | None = None,
) -> None:
  """Raises ValueError unless all of `value` is finite and within the limits."""
  if is_traced(value):
    return
  try:
    values = np.asarray(value, np.float64)
  except (TypeError, ValueError):
    raise ValueError(f"{name} must be a number, got {value!r}") from None
  limits = []
  is_good = np.isfinite(values)
  if above is not None:
    is_good &= values > above
    limits.append("positive" if above == 0 else f"above {above}")
  if at_least is not None:
    is_good &= values >= at_least
    limits.append(f"at least {at_least}")
  if at_most is not None:
    is_good &= values <= at_most
    limits.append(f"at most {at_most}")
  if below is not None:
    is_good &= values < below
    limits.append(f"below {below}")
  if not np.all(is_good):
    raise ValueError(
      f"{name} must be finite"
      + "".join(f", {limit}" for limit in limits)
      + f", got {value}"
    )


def one_value(name: str, value: Any) -> None:
  """Raises ValueError if `value` is an array of several, traced or not."""
  if np.size(value) != 1:
    raise ValueError(
      f"{name} must be one number, got an array {list(np.shape(value))}; for"
      " several, map over them with jax.vmap"
    )


def integer(name: str, value: Any, *, at_least: int) -> None:
  """Raises ValueError unless `value` is an integer of at least `at_least`."""
  if is_traced(value):
    return
  if (
    isinstance(value, bool)
    or not np.issubdtype(np.asarray(value).dtype, np.integer)
    or np.any(np.asarray(value) < at_least)
  ):
    raise ValueError(
      f"{name} must be an integer of at least {at_least}, got {value}"
    )


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
  """Raises ValueError, with the nearest name, unless `value` is allowed."""
  allowed = list(allowed)
  if value in allowed:
    return
  hint = nearest(value, allowed)
  names = ", ".join(allowed)
  if hint and len(allowed) > _MAX_NAMED:
    names = f"{len(allowed)} names"
  raise ValueError(f"{name} must be one of {names}, got {value!r}{hint}")


def nearest(value: Any, allowed: Iterable[str]) -> str:
  """Returns `, did you mean 'x'?` where a name is near, else nothing."""
  close = difflib.get_close_matches(str(value), list(allowed), n=1)
  return f", did you mean {close[0]!r}?" if close else ""


def few(values: Iterable[Any], num_shown: int = 3) -> str:
  """Names the first of many values, and says how many more there are."""
  names = [str(value) for value in values]
  rest = len(names) - num_shown
  return ", ".join(names[:num_shown]) + (f" and {rest} more" * (rest > 0))


def folded(text: str) -> str:
  """Returns a text without case, blanks and forms of letters."""
  return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text(
  argument: str, content: bytes, path: str, *, encoding: str | None = None
) -> str:
  """Decodes a text file that a person has written, without its mark.

  Args:
    argument: What the file is given as.
    content: The file.
    path: Its name, for the message.
    encoding: Of a file without a byte order mark; None for UTF-8.

  Returns:
    The text.

  Raises:
    ValueError: If it is no text, or in another encoding.
  """
  for first, kind in _FIRST_BYTES:
    if content.startswith(first):
      raise ValueError(
        f"{argument} must be a text file, got {path!r}, which is {kind}: save"
        " it as text (CSV)"
      )
  codec = next(
    (name for mark, name in _MARKS if content.startswith(mark)),
    encoding or "utf-8",
  )
  try:
    decoded = content.decode(codec)
  except LookupError:
    raise ValueError(
      f"encoding must be one that Python knows, such as latin-1, got"
      f" {encoding!r}"
    ) from None
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b"\n") + 1
    raise ValueError(
      f"{argument} must be text in {encoding or 'UTF-8 or UTF-16'}, got"
      f" {path!r} with the byte 0x{content[error.start]:02x} in line {line}:"
      " save it as UTF-8 (iconv -f LATIN1 -t UTF-8)"
    ) from None
  if "\0" in decoded:
    raise ValueError(
      f"{argument} must be a text file, got {path!r}, which is binary, or"
      " UTF-16 without its mark"
    )
  return decoded


def images(value: Any, *, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
  """Raises ValueError unless images are `[B, H, W, C]` floats in `bounds`."""
  span = f"in [{bounds[0]:g}, {bounds[1]:g}]"
  if (
    value.ndim != 4
    or not jax.numpy.issubdtype(value.dtype, jax.numpy.floating)
    or value.dtype.itemsize < 2
  ):
    raise ValueError(
      f"images must be floating point [B, H, W, C] {span}, got"
      f" {value.dtype} {list(value.shape)}"
    )
  if is_traced(value) or not value.size:
    return
  # The values are known even where a program is being traced around them.
  with jax.ensure_compile_time_eval():
    # The smallest and the largest say nothing of NaN: XLA may drop it.
    on_host = isinstance(value, np.ndarray)
    is_finite = bool((np if on_host else jax.numpy).isfinite(value).all())
    low, high = float(value.min()), float(value.max())
  if not is_finite:
    raise ValueError(
      f"images must be finite and {span}, got values from"
      f" {np.asarray(value).min()} to {np.asarray(value).max()}"
    )
  if low < bounds[0] or high > bounds[1]:
    raise ValueError(
      f"images must be finite and {span}, got values from {low} to {high}"
    )


def logits(
  apply_fn: Callable[..., Any],
  variables: Any,
  image_shape: tuple[int, ...],
  dtype: Any = np.float32,
) -> int:
  """Returns the number of classes of a network, by its shapes alone.

  Args:
    apply_fn: The network in inference mode.
    variables: Its variables.
    image_shape: `(H, W, C)`.
    dtype: Of the images.

  Raises:
    ValueError: If it does not return logits `[B, K]` of two classes or more.
  """
  image = jax.ShapeDtypeStruct((1, *image_shape), dtype)
  try:
    hash(apply_fn)
    output = jax.eval_shape(apply_fn, variables, image)
  # Not what a network itself raises, but what JAX does.
  except TypeError as error:
    raise ValueError(
      "apply_fn must be a hashable function that JAX can trace, of variables"
      f" and one image {list(image.shape)}, got"
      f" {type(error).__name__}: {str(error).splitlines()[0]:.200}"
    ) from error
  shape: tuple[int, ...] = getattr(output, "shape", ())
  if (
    len(shape) != 2
    or shape[0] != 1
    or shape[1] < 2
    or not jax.numpy.issubdtype(output.dtype, jax.numpy.floating)
  ):
    what = (
      f"{output.dtype} {list(shape)}"
      if hasattr(output, "shape")
      else f"a {type(output).__name__}"
    )
    raise ValueError(
      "apply_fn must return logits, floating point [B, K] with K of at least"
      f" 2, got {what} for one image {list(image.shape)}"
    )
  return int(shape[1])


def variables(value: Any, name: str = "variables") -> None:
  """Raises ValueError unless `value` is a mapping with `"params"`."""
  if isinstance(value, Mapping) and "params" in value:
    return
  content = (
    f"the keys {', '.join(map(str, value))}"
    if isinstance(value, Mapping)
    else f"a {type(value).__name__}"
  )
  raise ValueError(
    f'{name} must be a mapping with "params", and other collections beside'
    f" it, got {content}"
  )


def labels(value: Any, num_images: int, num_classes: int | None = None) -> None:
  """Raises ValueError unless labels are integers `[B]`, one an image."""
  if value.ndim != 1 or not jax.numpy.issubdtype(
    value.dtype, jax.numpy.integer
  ):
    raise ValueError(
      f"labels must be integers [B], got {value.dtype} {list(value.shape)}"
    )
  if len(value) != num_images:
    raise ValueError(
      f"labels must be as many as images: got {len(value)} labels for"
      f" {num_images} images"
    )
  if is_traced(value) or num_classes is None or not value.size:
    return
  with jax.ensure_compile_time_eval():
    low, high = int(value.min()), int(value.max())
  if low < 0 or high >= num_classes:
    raise ValueError(
      f"labels must be in [0, {num_classes}), got values from {low} to {high}"
    )


def key(value: Any, name: str = "key") -> None:
  """Raises ValueError unless `value` is a typed key or an array of them."""
  if not hasattr(value, "dtype") or not jax.numpy.issubdtype(
    value.dtype, jax.dtypes.prng_key
  ):
    raise ValueError(
      f"{name} must be made by jax.random.key, got {type(value).__name__}"
      f" {getattr(value, 'dtype', '')}".rstrip()
    )
