"""What all builders share: features, encoding, and preparing in one step.

A builder states its features in `_info` (through `image_info`) and yields
`Example`s in `_generate_examples` (through `records`).
"""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from data_prep import columns as columns_lib
from data_prep import naming, registry
from psg_jax import checks, data, progress

# Some hundred megabytes at 224 pixels.
_EXAMPLES_PER_SHARD = 4096
# Few enough to stay in memory at any size.
_EXAMPLES_PER_WRITE = 64


class Example(NamedTuple):
  """One labelled image on its way to disk.

  Attributes:
    image: Of the size and number of channels that the builder states, or the
      PNG file of such an image.
    label: Index of the class.
    id: Unique in the data set.
    columns: Further metadata by column; text may be empty for unknown, and
      None stands for it in columns of a stated type.
  """

  image: Image.Image | bytes
  label: int
  id: str
  columns: Mapping[str, Any] = {}


class Options(NamedTuple):
  """What a user may choose about a set; None leaves the choice to its builder.

  Attributes:
    size: Pixels a side of the images.
    fit: One of `images.FITS`.
    metadata: A CSV file of metadata by image.
    encoding: Of that file.
    group: Column of it whose images stay on one side of the split.
    seed: Of the split and of the order of the rows.
    window: How DICOM files become grey levels: `"file"` by the window that each
      states and else by the range of all, `"full"` by that range, or
      `"CENTER,WIDTH"`.
    is_skipping_corrupt: Whether to leave out images that cannot be decoded.
  """

  size: int | None = None
  fit: str | None = None
  metadata: str | os.PathLike[str] | None = None
  encoding: str | None = None
  group: str | None = None
  seed: int | None = None
  window: str | None = None
  is_skipping_corrupt: bool = False

  def given(self) -> dict[str, Any]:
    """Returns what was chosen, in the form in which it is stored."""
    return {
      name: value if isinstance(value, bool | int | str) else absolute(value)
      for name, value in self._asdict().items()
      if value is not None and value is not False
    }


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


class ImageBuilder(  # type: ignore[call-arg]
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Base of the builders of labelled images.

  Attributes:
    source: File or folder that the user named, or None.
    download_dir: Where downloaded or hand-placed raw files are.
    is_shown: Whether to show progress.
    options: What the user chose; None leaves all to the builder.
  """

  VERSION = tfds.core.Version("1.0.0")
  OPTIONS: frozenset[str] = frozenset()
  """Which of `Options` there are for this set."""
  # Leads TFDS to a file of checksums, which we do not use; looking for it needs
  # importlib_resources, which TFDS does not install.
  code_path = None

  def __init__(
    self,
    *,
    source: str | os.PathLike[str] | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    is_shown: bool = False,
    options: Options | None = None,
    **kwargs: Any,
  ) -> None:
    self.source = None if source is None else pathlib.Path(source)
    self.download_dir = pathlib.Path(download_dir or "downloads")
    self.is_shown = is_shown
    self.options = options or Options()
    super().__init__(**kwargs)

  def image_info(
    self,
    *,
    description: str,
    class_names: Sequence[str],
    image_shape: tuple[int, int, int],
    origin: str,
    columns: Mapping[str, Any] | None = None,
    **kwargs: Any,
  ) -> tfds.core.DatasetInfo:
    """Describes the data set to TFDS.

    Args:
      description: One sentence.
      class_names: In the order of the labels.
      image_shape: `(height, width, channels)` of every image.
      origin: What the set is made from, for messages and records.
      columns: Further metadata, column -> TFDS feature, NumPy type, or one of
        the types `columns.TYPES`, whose values may be missing.
      **kwargs: To `tfds.core.DatasetInfo`: homepage, citation, license.

    Returns:
      The description.
    """
    typed = {
      name: str(kind)
      for name, kind in (columns or {}).items()
      if isinstance(kind, pa.DataType)
    }
    features = dict(columns or {}) | {
      name: tfds.features.Text() for name in typed
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=description,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=image_shape, encoding_format="png"
          ),
          "label": tfds.features.ClassLabel(names=list(class_names)),
          "id": tfds.features.Text(),
          **features,
        }
      ),
      # Keeps the order of the rows.
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(
        source=origin,
        class_names=list(class_names),
        columns=typed,
        settings=self.settings(),
        notes=[],
      ),
      **kwargs,
    )

  def records(
    self, split: str, examples: Iterable[Example], total: int
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Encodes the examples of a split for TFDS.

    Args:
      split: Its name, for the progress bar.
      examples: In the order to be kept.
      total: How many there are.

    Yields:
      Row number and features.

    Raises:
      ValueError: If two examples have the same id.
    """
    seen = set()
    typed = self.info.metadata["columns"]
    with progress.bar(
      f"{self.name} {split}", total, unit="image", is_shown=self.is_shown
    ) as bar:
      for row, example in enumerate(examples):
        if example.id in seen:
          raise ValueError(f"source holds {example.id!r} twice")
        seen.add(example.id)
        yield (
          row,
          {
            "image": example.image
            if isinstance(example.image, bytes)
            else encode_png(example.image),
            "label": example.label,
            "id": example.id,
            **{
              name: columns_lib.to_text(value) if name in typed else value
              for name, value in example.columns.items()
            },
          },
        )
        bar.advance(1)

  @classmethod
  def has_files(cls, download_dir: pathlib.Path) -> bool:
    """Whether all raw files are where the builder looks without a source."""
    return False

  def settings(self) -> dict[str, Any]:
    """Returns the options, with the values by default, that are recorded."""
    return self.options.given()

  def finish(self) -> Sequence[str]:
    """Checks the whole after its last example.

    Returns:
      What the user should know about the raw files, a phrase each.

    Raises:
      ValueError: If the set must not be kept.
    """
    return ()

  def write(self, root: pathlib.Path) -> None:
    """Writes all splits in their order, a few examples at a time.

    TFDS's own `download_and_prepare` keeps a split in memory, and from 1 GB on
    needs TensorFlow.

    Args:
      root: The folder that the user named, for messages.

    Raises:
      ValueError: If the raw files are not of the right form, a split is empty,
        or the folder cannot be written.
    """
    folder = pathlib.Path(self.data_dir)
    splits = self._split_generators(None)
    with _writing(root):
      folder.mkdir(parents=True)
      writer = tfds.core.SequentialWriter(
        self.info, _EXAMPLES_PER_SHARD, file_format="array_record"
      )
      writer.initialize_splits(list(splits))
    empty = []
    for split, records in splits.items():
      num_records = 0
      part: list[dict[str, Any]] = []
      for _, record in records:
        part.append(record)
        num_records += 1
        if len(part) == _EXAMPLES_PER_WRITE:
          with _writing(root):
            writer.add_examples({split: part})
          part = []
      with _writing(root):
        writer.add_examples({split: part})
      if not num_records:
        empty.append(split)
    self.info.metadata["notes"] = list(self.finish())
    if empty:
      raise ValueError(f"source must have images in {empty[0]}, got none")
    with _writing(root):
      writer.close_all()


def prepare(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  source: str | os.PathLike[str] | None = None,
  is_overwriting: bool = False,
  is_shown: bool = False,
  set_name: str | None = None,
  **options: Any,
) -> Prepared:
  """Prepares a data set, whole or not at all.

  The set is written into a temporary folder beside its place and then renamed,
  so that an error or Ctrl-C leaves what was there before.

  Args:
    name: A builder, one of `psg_jax.data.names()`, or a builder with `@SIZE`.
    data_dir: Folder of all prepared sets; see `psg_jax.data.root_dir`.
    source: Raw file or folder; None looks where the builder says.
    is_overwriting: Whether to redo a set that is already there.
    is_shown: Whether to show progress.
    set_name: What to call the user's own set; for `image_folder` alone.
    **options: The attributes of `Options`.

  Returns:
    Where the set is, and whether it is new.

  Raises:
    ValueError: If a name is unknown, `data_dir` cannot be written, the source
      is missing or not of the right form, an option does not fit the builder
      or its value is wrong, or the set is already there with other options.
  """
  builder, full_name, chosen = _resolve(name, set_name, Options(**options))
  if source is not None:
    source = data.expanded(source, "source")
  if chosen.metadata is not None:
    chosen = chosen._replace(
      metadata=data.expanded(chosen.metadata, "metadata")
    )
  if source is not None and not pathlib.Path(source).exists():
    raise ValueError(
      f"source must be an existing file or folder, got {os.fspath(source)!r}"
    )
  builder_class = registry.builder_class(builder)
  _check_options(builder, builder_class, chosen)
  root = data.root_dir(data_dir)
  folder = data.set_dir(full_name, data_dir) / str(builder_class.VERSION)
  if data.is_prepared(folder) and not is_overwriting:
    _check_same(full_name, folder, chosen, source)
    return _describe(full_name, folder, is_new=False)
  try:
    root.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(prefix=f".{builder}-", dir=root)
  except OSError as error:
    raise ValueError(
      f"data_dir must be a folder that can be written, got {str(root)!r}:"
      f" {error.strerror}"
    ) from error
  with temporary as work_dir:
    made = builder_class(
      data_dir=work_dir,
      file_format="array_record",
      source=source,
      download_dir=registry.download_dir(builder, root),
      is_shown=is_shown,
      options=chosen,
    )
    made.write(root)
    if not is_overwriting and data.is_prepared(folder):
      # Another process was faster, and somebody may be reading its files.
      return _describe(full_name, folder, is_new=False)
    with _writing(root):
      _swap(pathlib.Path(made.data_dir), folder, pathlib.Path(work_dir) / "old")
  return _describe(full_name, folder, is_new=True)


@contextlib.contextmanager
def _writing(root: pathlib.Path) -> Iterator[None]:
  """Says which folder is full or read-only, whatever writing raises."""
  try:
    yield
  # RuntimeError: of ArrayRecord.
  except (OSError, RuntimeError) as error:
    reason = getattr(error, "strerror", None) or str(error)
    raise ValueError(
      "data_dir must be a folder that can be written and has room, got"
      f" {str(root)!r}: {' '.join(reason.split())}"
    ) from error


def encode_png(image: Image.Image) -> bytes:
  """Encodes an image as a PNG file, without loss."""
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return buffer.getvalue()


def decode(content: bytes, name: str, *, mode: str) -> Image.Image:
  """Decodes an image file.

  Args:
    content: Bytes of the file.
    name: Its name, for the message.
    mode: Pillow's mode to convert to: `"L"` or `"RGB"`.

  Returns:
    The image, upright where the file's EXIF data says how to turn it.

  Raises:
    ValueError: If the bytes are no image, or a damaged one.
  """
  try:
    with Image.open(io.BytesIO(content)) as image:
      return ImageOps.exif_transpose(image).convert(mode)
  # Pillow's decoders differ in what they raise on damaged files.
  except (
    Image.DecompressionBombError,
    EOFError,
    OSError,
    SyntaxError,
    ValueError,
  ) as error:
    raise ValueError(
      f"source holds an image that cannot be decoded: {name}"
    ) from error


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  """Resizes to `(width, height)` with Pillow's bilinear filter."""
  if image.size == size:
    return image
  return image.resize(size, Image.Resampling.BILINEAR)


def from_array(pixels: np.ndarray) -> Image.Image:
  """Makes an image of uint8 pixels `[H, W]` or `[H, W, 3]`."""
  return Image.fromarray(np.ascontiguousarray(pixels))


def absolute(path: str | os.PathLike[str]) -> str:
  """Returns a path as it is recorded."""
  return str(pathlib.Path(path).resolve())


def _resolve(
  name: str, set_name: str | None, options: Options
) -> tuple[str, str, Options]:
  """Returns the builder, the set's full name, and the options with its size."""
  builder, has_size, _ = name.partition("@")
  checks.one_of("name", builder, registry.MODULES)
  parsed = naming.parse(name)
  if options.size is not None:
    size = naming.check_size(builder, options.size)
    if has_size and size != parsed.size:
      raise ValueError(
        f"size must be {parsed.size} as in the name {name!r}, or not given, got"
        f" {options.size}"
      )
    parsed = naming.parse(f"{builder}@{size}")
  # A size by default is not one that was chosen: what is prepared may stay.
  is_chosen = bool(has_size) or options.size is not None
  if builder != naming.OWN_BUILDER:
    if set_name is not None:
      raise ValueError(
        f"set_name (--name) must not be given for {name!r}, got {set_name!r}"
      )
    options = options._replace(size=parsed.size if is_chosen else None)
    return builder, naming.from_key(parsed.key), options
  if set_name is None:
    raise ValueError(
      "set_name (--name) must be given for 'image_folder': what to call the"
      " set, such as my_eyes"
    )
  naming.check_own(set_name)
  options = options._replace(size=parsed.size if is_chosen else None)
  return builder, set_name, options


def _check_options(builder: str, builder_class: Any, options: Options) -> None:
  """Raises ValueError if an option is not for this builder, or negative."""
  for option, value in options.given().items():
    if option not in builder_class.OPTIONS:
      raise ValueError(
        f"{option} must not be given for {builder!r}, got {value!r}"
      )
  if options.seed is not None:
    checks.integer("seed", options.seed, at_least=0)


def _check_same(
  name: str,
  folder: pathlib.Path,
  options: Options,
  source: str | os.PathLike[str] | None,
) -> None:
  """Raises ValueError if a set was prepared otherwise than is now wished."""
  stored = data.read_builder(folder).info.metadata or {}
  settings = stored.get("settings") or {}
  # What it leaves out, if anything, the notes tell.
  wished = options._replace(is_skipping_corrupt=False).given()
  # Of a user's own set, the source says which images it holds.
  if source is not None and naming.parse(name).is_own:
    wished["source"] = absolute(source)
  for option, value in wished.items():
    if settings and settings.get(option) != value:
      raise ValueError(
        f"{option} must be {settings.get(option)!r}, as {name!r} is prepared in"
        f" {folder}, got {value!r}; --overwrite prepares it anew"
      )
  recorded = stored.get("fingerprint")
  if recorded and source and settings.get("source") == absolute(source):
    _check_unchanged(name, recorded, source, settings.get("metadata"))


def _check_unchanged(
  name: str,
  recorded: Mapping[str, str | None],
  source: str | os.PathLike[str],
  metadata: str | None,
) -> None:
  """Raises ValueError if a source or its table is not as it was."""
  from data_prep import image_tree

  now = image_tree.fingerprint(pathlib.Path(source), metadata)
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
  info = data.read_builder(folder).info
  metadata = info.metadata or {}
  return Prepared(
    folder=folder,
    is_new=is_new,
    source=metadata.get("source", "an unknown source"),
    num_images={
      split: info.splits[split].num_examples for split in data.SPLITS
    },
    name=name,
    notes=tuple(metadata.get("notes") or ()),
  )


def _swap(new: pathlib.Path, folder: pathlib.Path, old: pathlib.Path) -> None:
  """Puts `new` in the place of `folder`, which moves to `old` if it exists."""
  folder.parent.mkdir(exist_ok=True)
  is_replacing = folder.exists()
  if is_replacing:
    folder.rename(old)
  try:
    new.rename(folder)
  except BaseException:
    if is_replacing:
      old.rename(folder)
    raise
