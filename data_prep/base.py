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
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from data_prep import registry
from psg_jax import checks, data, progress


class Example(NamedTuple):
  """One labelled image on its way to disk.

  Attributes:
    image: Of the size and number of channels that the builder states.
    label: Index of the class.
    id: Unique in the data set.
    columns: Further metadata by column; text may be empty for unknown.
  """

  image: Image.Image
  label: int
  id: str
  columns: Mapping[str, str | int | float] = {}


class Prepared(NamedTuple):
  """What `prepare` did.

  Attributes:
    folder: Where the data set is.
    is_new: False if it was there before.
    source: What it was made from.
    num_images: By split.
  """

  folder: pathlib.Path
  is_new: bool
  source: str
  num_images: Mapping[str, int]


class ImageBuilder(  # type: ignore[call-arg]
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Base of the builders of labelled images.

  Attributes:
    source: File or folder that the user named, or None.
    download_dir: Where downloaded or hand-placed raw files are.
    is_shown: Whether to show progress.
  """

  VERSION = tfds.core.Version("1.0.0")
  # Leads TFDS to a file of checksums, which we do not use; looking for it needs
  # importlib_resources, which TFDS does not install.
  code_path = None

  def __init__(
    self,
    *,
    source: str | os.PathLike[str] | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    is_shown: bool = False,
    **kwargs: Any,
  ) -> None:
    self.source = None if source is None else pathlib.Path(source)
    self.download_dir = pathlib.Path(download_dir or "downloads")
    self.is_shown = is_shown
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
      columns: Further metadata, column -> TFDS feature or NumPy type.
      **kwargs: To `tfds.core.DatasetInfo`: homepage, citation, license.

    Returns:
      The description.
    """
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
          **(columns or {}),
        }
      ),
      # Keeps the order of the rows.
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(source=origin),
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
            "image": encode_png(example.image),
            "label": example.label,
            "id": example.id,
            **example.columns,
          },
        )
        bar.advance(1)


def prepare(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  source: str | os.PathLike[str] | None = None,
  is_overwriting: bool = False,
  is_shown: bool = False,
) -> Prepared:
  """Prepares a data set, whole or not at all.

  The set is written into a temporary folder beside its place and then renamed,
  so that an error or Ctrl-C leaves what was there before.

  Args:
    name: One of `psg_jax.data.names()`.
    data_dir: Folder of all prepared sets; see `psg_jax.data.root_dir`.
    source: Raw file or folder; None looks where the builder says.
    is_overwriting: Whether to redo a set that is already there.
    is_shown: Whether to show progress.

  Returns:
    Where the set is, and whether it is new.

  Raises:
    ValueError: If the name is unknown, `data_dir` cannot be written, or the
      source is missing or not of the right form.
  """
  checks.one_of("name", name, registry.MODULES)
  if source is not None and not pathlib.Path(source).exists():
    raise ValueError(
      f"source must be an existing file or folder, got {os.fspath(source)!r}"
    )
  builder_class = registry.builder_class(name)
  root = data.root_dir(data_dir)
  folder = data.set_dir(name, data_dir) / str(builder_class.VERSION)
  if data.is_prepared(folder) and not is_overwriting:
    return _describe(folder, is_new=False)
  try:
    root.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root)
  except OSError as error:
    raise ValueError(
      f"data_dir must be a folder that can be written, got {str(root)!r}:"
      f" {error.strerror}"
    ) from error
  with temporary as work_dir:
    builder = builder_class(
      data_dir=work_dir,
      file_format="array_record",
      source=source,
      download_dir=root / "downloads" / name,
      is_shown=is_shown,
    )
    with _quiet_tfds():
      builder.download_and_prepare()
    if not is_overwriting and data.is_prepared(folder):
      # Another process was faster, and somebody may be reading its files.
      return _describe(folder, is_new=False)
    _swap(
      pathlib.Path(builder.data_dir), folder, pathlib.Path(work_dir) / "old"
    )
  return _describe(folder, is_new=True)


def encode_png(image: Image.Image) -> bytes:
  """Encodes an image without loss."""
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


def _describe(folder: pathlib.Path, *, is_new: bool) -> Prepared:
  info = tfds.builder_from_directory(folder).info
  return Prepared(
    folder=folder,
    is_new=is_new,
    source=(info.metadata or {}).get("source", "an unknown source"),
    num_images={
      split: info.splits[split].num_examples for split in data.SPLITS
    },
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


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Silences TFDS, whose messages name the temporary folder."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
