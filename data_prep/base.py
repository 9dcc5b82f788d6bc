"""Preparing a data set in one step, from its name to its folder.

A new set is one module here with one `builder.ImageBuilder`, and one line in
`psg_jax.catalog`. The class of the set `my_set` is `PsgMySet`: TFDS then names
its folder `psg_my_set`, which clashes with none of TFDS's own sets.
"""

import importlib
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_prep import builder, sources
from psg_jax import catalog, checks, files


class Prepared(NamedTuple):
  """What `prepare` did.

  Attributes:
    folder: Where the data set is.
    is_new: False if it was there before.
    source: What it was made from.
    num_images: By split.
    name: What `psg_jax.data.load` knows it by.
    notes: What the user should know about the raw files, a phrase each.
  """

  folder: pathlib.Path
  is_new: bool
  source: str
  num_images: Mapping[str, int]
  name: str
  notes: tuple[str, ...] = ()


def prepare(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  source: str | os.PathLike[str] | None = None,
  is_overwriting: bool = False,
  is_shown: bool = False,
  set_name: str | None = None,
  **choices: Any,
) -> Prepared:
  """Prepares a data set, whole or not at all.

  The set is written into a temporary folder beside its place and then renamed,
  so that an error or Ctrl-C leaves what was there before.

  Args:
    name: A builder, one of `catalog.names()`, or a builder with `@SIZE`.
    data_dir: Folder of all prepared sets; see `catalog.root_dir`.
    source: Raw file or folder; None looks where the builder says.
    is_overwriting: Whether to redo a set that is already there.
    is_shown: Whether to show progress.
    set_name: What to call the user's own set; for `image_folder` alone.
    **choices: The attributes of `builder.Options`.

  Returns:
    Where the set is, and whether it is new.

  Raises:
    ValueError: If a name is unknown, `data_dir` cannot be written, the source
      is missing or not of the right form, an option does not fit the builder
      or its value is wrong, or the set is already there with other options.
  """
  builder_name, full_name, options = _resolve(
    name, set_name, builder.Options(**choices)
  )
  if options.metadata is not None:
    metadata = files.expanded(options.metadata, "metadata")
    options = options._replace(metadata=metadata)
  if source is not None:
    source = files.expanded(source, "source")
    if not source.exists():
      raise ValueError(
        f"source must be an existing file or folder, got {os.fspath(source)!r}"
      )
  made_by = builder_class(builder_name)
  _check_options(builder_name, made_by, options)
  root = catalog.root_dir(data_dir)
  folder = catalog.set_dir(full_name, data_dir) / str(made_by.VERSION)
  if catalog.is_prepared(folder) and not is_overwriting:
    _check_same(full_name, folder, options, source)
    return _describe(full_name, folder, is_new=False)
  with files.faults(
    f"data_dir must be a folder that can be written, got {str(root)!r}:"
  ):
    root.mkdir(parents=True, exist_ok=True)
    work = tempfile.TemporaryDirectory(prefix=f".{builder_name}-", dir=root)
  with work as work_dir:
    made = made_by(
      data_dir=work_dir,
      file_format="array_record",
      source=source,
      download_dir=_download_dir(builder_name, root),
      is_shown=is_shown,
      options=options,
    )
    made.write(root)
    if not is_overwriting and catalog.is_prepared(folder):
      # Another process was faster, and somebody may be reading its files.
      return _describe(full_name, folder, is_new=False)
    with builder.writing(root):
      old = pathlib.Path(work_dir) / "old"
      files.replace_folder(pathlib.Path(made.data_dir), folder, old)
  return _describe(full_name, folder, is_new=True)


def prepare_at_once(
  name: str, *, data_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path | None:
  """Prepares a set if that takes neither a source nor a network.

  Args:
    name: A builder, or a builder with `@SIZE`.
    data_dir: Folder of all prepared sets.

  Returns:
    The set's folder; None where the raw files are not on this machine.

  Raises:
    ValueError: As `prepare`.
  """
  builder_name = catalog.parse(name).builder
  folder = _download_dir(builder_name, catalog.root_dir(data_dir))
  if not (
    catalog.BUILDERS[builder_name].is_embedded
    or builder_class(builder_name).has_files(folder)
  ):
    return None
  return prepare(name, data_dir=data_dir).folder


def builder_class(name: str) -> Any:
  """Imports the builder of a data set, one of `catalog.BUILDERS`."""
  module = importlib.import_module(f"data_prep.{name}")
  return getattr(module, "Psg" + name.title().replace("_", ""))


def _download_dir(builder_name: str, root: pathlib.Path) -> pathlib.Path:
  return root / "downloads" / builder_name


def _resolve(
  name: str, set_name: str | None, options: builder.Options
) -> tuple[str, str, builder.Options]:
  """Returns the builder, the set's full name, and the options with its size."""
  builder_name, has_size, _ = name.partition("@")
  checks.one_of("name", builder_name, catalog.BUILDERS)
  parsed = catalog.parse(name)
  if options.size is not None:
    size = catalog.check_size(builder_name, options.size)
    if has_size and size != parsed.size:
      raise ValueError(
        f"size must be {parsed.size} as in the name {name!r}, or not given, got"
        f" {options.size}"
      )
    parsed = catalog.parse(f"{builder_name}@{size}")
  # A size by default is not one that was chosen: what is prepared may stay.
  is_chosen = bool(has_size) or options.size is not None
  options = options._replace(size=parsed.size if is_chosen else None)
  if builder_name == catalog.OWN_BUILDER:
    if set_name is None:
      raise ValueError(
        "set_name (--name) must be given for 'image_folder': what to call the"
        " set, such as my_eyes"
      )
    catalog.check_own(set_name)
    return builder_name, set_name, options
  if set_name is not None:
    raise ValueError(
      f"set_name (--name) must not be given for {name!r}, got {set_name!r}"
    )
  return builder_name, catalog.from_key(parsed.key), options


def _check_options(
  builder_name: str, made_by: Any, options: builder.Options
) -> None:
  """Raises ValueError if an option is not for this builder, or negative."""
  for option, value in options.given().items():
    if option not in made_by.OPTIONS:
      raise ValueError(
        f"{option} must not be given for {builder_name!r}, got {value!r}"
      )
  if options.seed is not None:
    checks.integer("seed", options.seed, at_least=0)


def _check_same(
  name: str,
  folder: pathlib.Path,
  options: builder.Options,
  source: str | os.PathLike[str] | None,
) -> None:
  """Raises ValueError if a set was prepared otherwise than is now wished."""
  stored = catalog.read_builder(folder).info.metadata or {}
  settings = stored.get("settings") or {}
  # What it leaves out, if anything, the notes tell.
  wished = options._replace(is_skipping_corrupt=False).given()
  # Of a user's own set, the source says which images it holds.
  if source is not None and catalog.parse(name).is_own:
    wished["source"] = builder.absolute(source)
  for option, value in wished.items():
    if settings and settings.get(option) != value:
      raise ValueError(
        f"{option} must be {settings.get(option)!r}, as {name!r} is prepared in"
        f" {folder}, got {value!r}; --overwrite prepares it anew"
      )
  recorded = stored.get("fingerprint")
  if recorded and source and settings.get("source") == builder.absolute(source):
    _check_unchanged(name, recorded, source, settings.get("metadata"))


def _check_unchanged(
  name: str,
  recorded: Mapping[str, str | None],
  source: str | os.PathLike[str],
  metadata: str | None,
) -> None:
  """Raises ValueError if a source or its table is not as it was."""
  now = sources.fingerprint(pathlib.Path(source), metadata)
  if now["files"] != recorded["files"]:
    what = f"source must be as it was, got {os.fspath(source)!r}"
  elif now != recorded:
    what = f"metadata must be as it was, got {metadata!r}"
  else:
    return
  raise ValueError(
    f"{what}, which has changed since {name!r} was prepared from it;"
    " --overwrite prepares it anew"
  )


def _describe(name: str, folder: pathlib.Path, *, is_new: bool) -> Prepared:
  info = catalog.read_builder(folder).info
  metadata = info.metadata or {}
  return Prepared(
    folder=folder,
    is_new=is_new,
    source=metadata.get("source", "an unknown source"),
    num_images={
      split: info.splits[split].num_examples for split in catalog.SPLITS
    },
    name=name,
    notes=tuple(metadata.get("notes") or ()),
  )
