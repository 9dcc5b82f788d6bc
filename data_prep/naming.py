"""Names of data sets: builders, other image sizes, and sets of one's own.

`NAME@SIZE` is the set of the builder NAME with images of SIZE pixels a side.
A user's own images, which the builder `image_folder` prepares, have a name of
the user's choice.
"""

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_prep import registry
from psg_jax import checks

OWN_BUILDER = "image_folder"
MIN_SIZE = 8
MAX_SIZE = 4096
_OWN_NAME = re.compile(r"[a-z][a-z0-9_]*")


class SetName(NamedTuple):
  """What the name of a data set says.

  Attributes:
    builder: What prepares it.
    size: Of the images, in pixels a side; None where the name leaves it open.
    key: What its folder is called, after the prefix.
    is_own: Whether the user gave the name.
  """

  builder: str
  size: int | None
  key: str
  is_own: bool


def parse(name: str) -> SetName:
  """Reads a name; whether such a set is prepared is not looked up.

  Args:
    name: A builder, a builder with `@SIZE`, or the name of one's own set.

  Returns:
    What it says.

  Raises:
    ValueError: If it has none of these forms, or the size is out of range or
      given for a builder whose images have one size.
  """
  builder, has_size, text = str(name).partition("@")
  if builder in registry.MODULES:
    size = check_size(builder, text) if has_size else registry.SIZES.get(name)
    is_default = size == registry.SIZES.get(builder)
    key = builder if is_default else f"{builder}_{size}"
    return SetName(builder, size, key, is_own=False)
  if has_size and not _OWN_NAME.fullmatch(builder):
    checks.one_of("name", builder, registry.MODULES)
  if has_size:
    raise ValueError(
      f"name must be one of {', '.join(registry.SIZES)} where a size follows,"
      f" got {name!r}"
    )
  if not _OWN_NAME.fullmatch(builder) or from_key(builder) != builder:
    checks.one_of("name", name, registry.MODULES)
  return SetName(OWN_BUILDER, None, builder, is_own=True)


def from_key(key: str) -> str:
  """Returns the name of the set whose folder has this name after the prefix."""
  builder, _, size = key.rpartition("_")
  if builder in registry.SIZES and size.isdecimal():
    return f"{builder}@{size}"
  return key


def check_own(name: str) -> None:
  """Raises ValueError unless a user's set may have this name."""
  is_taken = name in registry.MODULES or from_key(name) != name
  if not _OWN_NAME.fullmatch(name) or is_taken:
    reason = (
      "is that of another set" if is_taken else "has other characters or none"
    )
    raise ValueError(
      "set_name (--name) must start with a-z, go on with a-z, 0-9 and _, and be"
      f" none of the sets {', '.join(registry.MODULES)}, got {name!r}, which"
      f" {reason}"
    )


def check_size(builder: str, size: Any) -> int:
  """Returns a size as a number of pixels.

  Args:
    builder: Whose images they are.
    size: A number or its text.

  Returns:
    The size, from `MIN_SIZE` to `MAX_SIZE`.

  Raises:
    ValueError: If it is out of range, or the builder has but one size.
  """
  if builder not in registry.SIZES:
    raise ValueError(
      f"size must not be given for {builder!r}, whose images have one size, got"
      f" {size}"
    )
  is_number = (
    bool(re.fullmatch(r"[0-9]{1,9}", size))
    if isinstance(size, str)
    else isinstance(size, int) and not isinstance(size, bool)
  )
  if not is_number or not MIN_SIZE <= int(size) <= MAX_SIZE:
    raise ValueError(
      f"size of {builder!r} must be an integer from {MIN_SIZE} to {MAX_SIZE},"
      f" got {size!r}"
    )
  return int(size)


def command(name: str, settings: Mapping[str, Any] | None = None) -> str:
  """Returns the command that prepares a set, without its folder.

  Args:
    name: Of the set.
    settings: How it was prepared before, where known.

  Returns:
    A line for the shell; words in capitals are for the user to fill in.
  """
  parsed = parse(name)
  settings = settings or {}
  words = ["python", "-m", "data_prep.prepare"]
  words.append(parsed.builder if parsed.is_own else name)
  source = settings.get("source")
  if source or parsed.builder in registry.NEED_SOURCE:
    words += ["--source", os.fspath(source or "PATH")]
  if parsed.builder == OWN_BUILDER:
    words += ["--name", parsed.key if parsed.is_own else "NAME"]
    if "size" in settings:
      words += ["--size", str(settings["size"])]
  for option in ("fit", "metadata", "encoding", "group", "seed", "window"):
    if option in settings:
      words += [f"--{option}", str(settings[option])]
  if settings.get("is_skipping_corrupt"):
    words.append("--skip_corrupt")
  return shlex.join(words)
