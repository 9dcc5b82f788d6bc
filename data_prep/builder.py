"""What all builders share: options, features, encoding and writing.

A builder states its features in `_info` (through `image_info`) and gives its
`Example`s in `splits`.
"""

import contextlib
import io
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from psg_jax import catalog, files, progress

# Some hundred megabytes at 224 pixels.
EXAMPLES_PER_SHARD = 4096
# Few enough to stay in memory at any size.
EXAMPLES_PER_WRITE = 64


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


Splits: TypeAlias = Mapping[str, tuple[Iterable[Example], int]]
"""Split -> its examples, in the order to be kept, and how many there are."""


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

  @property
  def public_name(self) -> str:
    """The builder's name without TFDS's prefix."""
    return self.name.removeprefix("psg_")

  @property
  def size(self) -> int:
    """Pixels a side of the images, where it can be chosen."""
    return self.options.size or catalog.BUILDERS[self.public_name].size or 0

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
        `catalog.COLUMN_TYPES`, whose values may be missing.
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

  def splits(self) -> Splits:
    """Gives the examples; raises ValueError if the raw files are wrong."""
    raise NotImplementedError

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    return {
      split: self._generate_examples(split, examples, total)
      for split, (examples, total) in self.splits().items()
    }

  def _generate_examples(
    self, split: str, examples: Iterable[Example], total: int
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields row number and features of each example.

    Raises:
      ValueError: If two examples have the same id.
    """
    ids = set()
    typed = self.info.metadata["columns"]
    with progress.bar(
      f"{self.name} {split}", total, unit="image", is_shown=self.is_shown
    ) as bar:
      for row, example in enumerate(examples):
        if example.id in ids:
          raise ValueError(f"source holds {example.id!r} twice")
        ids.add(example.id)
        image = example.image
        features = {
          "image": image if isinstance(image, bytes) else encode_png(image),
          "label": example.label,
          "id": example.id,
        }
        for name, value in example.columns.items():
          features[name] = catalog.to_text(value) if name in typed else value
        yield row, features
        bar.advance(1)

  def refuse_source(self, origin: str) -> None:
    """Raises ValueError if the user named a source where there is none."""
    if self.source is not None:
      raise ValueError(
        f"source must not be given for {self.public_name!r}, which {origin},"
        f" got {str(self.source)!r}"
      )

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
    with writing(root):
      folder.mkdir(parents=True)
      writer = tfds.core.SequentialWriter(
        self.info, EXAMPLES_PER_SHARD, file_format="array_record"
      )
      writer.initialize_splits(list(splits))
    empty = []
    for split, generated in splits.items():
      records = (record for _, record in generated)
      num_records = 0
      while part := list(itertools.islice(records, EXAMPLES_PER_WRITE)):
        num_records += len(part)
        with writing(root):
          writer.add_examples({split: part})
      if not num_records:
        empty.append(split)
    self.info.metadata["notes"] = list(self.finish())
    if empty:
      raise ValueError(f"source must have images in {empty[0]}, got none")
    with writing(root):
      writer.close_all()


def writing(root: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Says which folder is full or read-only, whatever writing raises."""
  return files.faults(
    "data_dir must be a folder that can be written and has room, got"
    f" {str(root)!r}:",
    OSError,
    # Of ArrayRecord.
    RuntimeError,
  )


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
  start = f"source holds an image that cannot be decoded: {name}:"
  # Pillow's decoders differ in what they raise on damaged files.
  with (
    files.faults(start, Exception),
    Image.open(io.BytesIO(content)) as image,
  ):
    return ImageOps.exif_transpose(image).convert(mode)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  """Resizes to `(width, height)` with Pillow's bilinear filter."""
  if image.size == size:
    return image
  return image.resize(size, Image.Resampling.BILINEAR)


def from_array(pixels: np.ndarray, size: int | None = None) -> Image.Image:
  """Makes an image of uint8 pixels `[H, W]` or `[H, W, 3]`.

  Args:
    pixels: The pixels.
    size: Pixels a side of the image, if it is to be resized.
  """
  image = Image.fromarray(np.ascontiguousarray(pixels))
  return image if size is None else resize(image, (size, size))


def absolute(path: str | os.PathLike[str]) -> str:
  """Returns a path as it is recorded."""
  return str(pathlib.Path(path).resolve())
