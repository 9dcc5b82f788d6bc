"""What data sets there are: their names, sizes, columns and folders.

`NAME@SIZE` is the set of the builder NAME with images of SIZE pixels a side,
such as `brain_tumor_mri@64`. A user's own images, which the builder
`image_folder` prepares, have a name of the user's choice, such as `my_eyes`.

Sets live in `<data_dir>/psg_<key>/<version>/`, where `data_dir` is an argument,
else the environment variable `PSG_JAX_DATA`, else `~/.cache/psg_jax`.
"""

import contextlib
import datetime
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import tensorflow_datasets as tfds

from psg_jax import checks, files

SPLITS = ("train", "test")
DATA_DIR_VARIABLE = "PSG_JAX_DATA"
OWN_BUILDER = "image_folder"
MIN_SIZE = 8
MAX_SIZE = 4096
INFO = "dataset_info.json"
"""The file of the description of a set."""
# Without it, `cifar10` here and TFDS's own would share a folder.
_PREFIX = "psg_"
_OWN_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Builder(NamedTuple):
  """What is known of the sets of a builder before it is imported.

  Attributes:
    size: Pixels a side where none is given; None where images have one size.
    is_embedded: Whether it needs neither a file nor a network, so that its sets
      prepare themselves.
    needs_source: Whether only the user can name its raw files.
    source: These files, and whose they are; empty where any will do.
  """

  size: int | None = None
  is_embedded: bool = False
  needs_source: bool = False
  source: str = ""


BUILDERS = {
  "digits": Builder(is_embedded=True),
  "phantom_digits": Builder(is_embedded=True),
  "phantom_fundus": Builder(size=64, is_embedded=True),
  "fashion_mnist": Builder(),
  "cifar10": Builder(),
  "pathmnist": Builder(
    needs_source=True, source="pathmnist.npz of MedMNIST v2 (medmnist.com)"
  ),
  "svhn": Builder(
    needs_source=True,
    source="the folder of train_32x32.mat and test_32x32.mat, format 2 of"
    " ufldl.stanford.edu/housenumbers",
  ),
  "brain_tumor_mri": Builder(
    size=224,
    needs_source=True,
    source="the zip of Kaggle's Brain Tumor MRI Dataset (M. Nickparvar)",
  ),
  "fundus": Builder(
    size=224,
    needs_source=True,
    source="a folder or zip of images in one folder a class, with a"
    " metadata.csv of file, label, source, patient_id and eye (CFP-OS)",
  ),
  OWN_BUILDER: Builder(size=224, needs_source=True),
}
"""Name -> what is known; the module `data_prep.NAME` has its class."""

# TFDS's features hold no nulls. So columns with missing values are stored as
# text, empty where there is none, and their types beside them.
COLUMN_TYPES: dict[str, pa.DataType] = {
  str(data_type): data_type
  for data_type in (
    *(pa.string(), pa.bool_(), pa.int64(), pa.float64(), pa.date32()),
    *(pa.timestamp("s"), pa.timestamp("ns")),
    *(pa.timestamp("s", "UTC"), pa.timestamp("ns", "UTC")),
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


# Names.


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
  if builder in BUILDERS:
    default = BUILDERS[builder].size
    size = check_size(builder, text) if has_size else default
    key = builder if size == default else f"{builder}_{size}"
    return SetName(builder, size, key, is_own=False)
  if not _OWN_NAME.fullmatch(builder) or from_key(builder) != builder:
    checks.one_of("name", builder if has_size else name, BUILDERS)
  if has_size:
    sized = [key for key, known in BUILDERS.items() if known.size]
    raise ValueError(
      f"name must be one of {', '.join(sized)} where a size follows, got"
      f" {name!r}"
    )
  return SetName(OWN_BUILDER, None, builder, is_own=True)


def from_key(key: str) -> str:
  """Returns the name of the set whose folder has this name after the prefix."""
  builder, _, size = key.rpartition("_")
  is_sized = builder in BUILDERS and BUILDERS[builder].size is not None
  return f"{builder}@{size}" if is_sized and size.isdecimal() else key


def check_own(name: str) -> None:
  """Raises ValueError unless a user's set may have this name."""
  is_taken = name in BUILDERS or from_key(name) != name
  if not _OWN_NAME.fullmatch(name) or is_taken:
    reason = (
      "is that of another set" if is_taken else "has other characters or none"
    )
    raise ValueError(
      "set_name (--name) must start with a-z, go on with a-z, 0-9 and _, and be"
      f" none of the sets {', '.join(BUILDERS)}, got {name!r}, which {reason}"
    )


def check_size(builder: str, size: Any) -> int:
  """Returns a size, a number or its text, as a number of pixels.

  Raises:
    ValueError: If it is not from `MIN_SIZE` to `MAX_SIZE`, or the builder has
      but one size.
  """
  if BUILDERS[builder].size is None:
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


def command(
  name: str,
  data_dir: str | os.PathLike[str] | None = None,
  metadata: Mapping[str, Any] | None = None,
) -> str:
  """Returns the line for the shell that prepares a set.

  Args:
    name: Of the set.
    data_dir: Folder of all prepared sets, if it was named.
    metadata: What a prepared set says of itself; the line then prepares it as
      it was.

  Returns:
    The line; words in capitals are for the user to fill in.
  """
  parsed = parse(name)
  settings = (metadata or {}).get("settings") or {}
  words = ["python", "-m", "data_prep.prepare"]
  words.append(parsed.builder if parsed.is_own else name)
  source = settings.get("source")
  if source or BUILDERS[parsed.builder].needs_source:
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
  line = shlex.join(words)
  return line if data_dir is None else f"{line} --data_dir {data_dir}"


# Folders.


def root_dir(
  data_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
  """Returns the folder of all prepared sets.

  Args:
    data_dir: The folder; None for that of the environment variable
      `PSG_JAX_DATA`, or else `~/.cache/psg_jax`.

  Returns:
    Its absolute path, whether it exists or not.
  """
  if data_dir is None:
    data_dir = os.environ.get(DATA_DIR_VARIABLE) or "~/.cache/psg_jax"
  argument = f"data_dir (or {DATA_DIR_VARIABLE})"
  return files.expanded(data_dir, argument).resolve()


def set_dir(
  name: str, data_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Returns the folder that holds every version of a set, prepared or not.

  Args:
    name: Of a builder, with or without a size, or of a set of the user's own.
    data_dir: Folder of all prepared sets; see `root_dir`.

  Returns:
    Its absolute path.

  Raises:
    ValueError: If `name` has not the form of a name.
  """
  return root_dir(data_dir) / f"{_PREFIX}{parse(name).key}"


def set_dirs(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the folders of sets in a folder of sets, by the set's name."""
  return {
    from_key(folder.name.removeprefix(_PREFIX)): folder
    for folder in sorted(root.glob(f"{_PREFIX}*"))
  }


def is_prepared(version_dir: pathlib.Path) -> bool:
  """Whether this folder of one version holds a prepared set."""
  names = (INFO, "features.json")
  return all((version_dir / name).is_file() for name in names)


def versions(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of prepared versions in the folder of a set."""
  return [path for path in folder.glob("*.*.*") if is_prepared(path)]


def names(
  data_dir: str | os.PathLike[str] | None = None,
) -> tuple[str, ...]:
  """Returns the names of the data sets that there are.

  Args:
    data_dir: Folder of prepared sets; None lists the builders alone.

  Returns:
    The builders, and then what else is prepared in `data_dir`, sorted: other
    sizes, and sets of the user's own.
  """
  prepared = [] if data_dir is None else set_dirs(root_dir(data_dir)).items()
  others = [
    name
    for name, folder in prepared
    if name not in BUILDERS and versions(folder)
  ]
  return (*BUILDERS, *others)


def read_builder(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
  """Reads the description of a prepared set from the folder of its version.

  Raises:
    ValueError: If the description is damaged.
  """
  with faults(folder):
    builder = tfds.builder_from_directory(folder)
    class_names = list(builder.info.features["label"].names)
    metadata = dict(builder.info.metadata or {})
    if metadata.get("class_names", class_names) != class_names:
      raise ValueError("the names of the classes are not those it had")
    for split in SPLITS:
      assert builder.info.splits[split].num_examples
  return builder


def faults(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Says which set is damaged, whatever reading it raises."""
  # TFDS, ArrayRecord and Pillow differ in what they raise.
  return files.faults(
    f"data_dir holds a damaged set: {folder} cannot be read:",
    Exception,
    end="; prepare it anew with --overwrite, or remove that folder",
  )
