"""The contracts that every module of the library shares."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import (
  Any,
  NamedTuple,
  TypeAlias,
  TypeVar,
  dataclass_transform,
)

import chex
import jax
import numpy as np

Variables: TypeAlias = Mapping[str, chex.ArrayTree]
"""Collections of a network: `"params"` and others (BatchNorm statistics)."""

ApplyFn: TypeAlias = Callable[[Variables, jax.Array], jax.Array]
"""`(variables, images [B, H, W, C] float32 in [0, 1]) -> logits [B, K]`.

Inference mode, pure, each row independent of the others.
"""


_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[_T]) -> type[_T]:
  """Makes a frozen `chex.dataclass`, in a form that type checkers follow."""
  return chex.dataclass(frozen=True)(cls)


def no_features(variables: Variables, images: jax.Array) -> jax.Array:
  """Stands for the features of a network that has none to show."""
  del variables, images
  raise ValueError("model must have features for this, got none")


class Model(NamedTuple):
  """A network as a bundle of pure functions.

  Images are `[B, H, W, C]` float32 in [0, 1]; standardisation lives inside.

  Attributes:
    init: `(key, images) -> variables`.
    apply: Inference, `(variables, images) -> logits [B, K]`.
    apply_train: `(variables, images, key) -> (logits [B, K], variables)`, with
      the BatchNorm statistics moved by this batch in the variables returned.
      May take a fourth argument `mask` (bool `[B]` or None): rows where it is
      False are padding and leave the statistics alone. None for networks that
      do the same in training as in inference.
    features: `(variables, images) -> [B, D]`, the input of the last layer;
      `no_features` where there are none.
  """

  init: Callable[[jax.Array, jax.Array], Variables]
  apply: ApplyFn
  apply_train: Callable[..., tuple[jax.Array, Variables]] | None = None
  features: Callable[[Variables, jax.Array], jax.Array] = no_features


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Labelled images, never changed in place.

  Attributes:
    images: uint8 `[N, H, W, C]`, an array, or `streaming.Images` on disk, which
      are typed as an array since they are used as one.
    labels: int32 `[N]`, in `[0, len(class_names))`.
    class_names: One name a class.
    ids: str `[N]`, one unique name an image; row numbers where none are given.
    metadata: None or a `pyarrow.Table` of `N` rows in the order of the images,
      whose column `"id"` equals `ids`.

  Raises:
    ValueError: If a shape, type, length or range is not as above.
  """

  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  ids: np.ndarray | None = None
  metadata: Any = None

  def __post_init__(self) -> None:
    labels = np.asarray(self.labels)
    # What can choose rows without reading them must not be read here.
    is_lazy = not hasattr(self.images, "__array__") and hasattr(
      self.images, "take"
    )
    images = self.images if is_lazy else np.asarray(self.images)
    if images.ndim != 4 or images.dtype != np.uint8:
      raise ValueError(
        "images must be uint8 [N, H, W, C], got"
        f" {images.dtype} {list(images.shape)}"
      )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f"labels must be integers [N], got {labels.dtype} {list(labels.shape)}"
      )
    if len(labels) != len(images):
      raise ValueError(
        f"labels must be as many as images: got {len(labels)} labels for"
        f" {len(images)} images"
      )
    num_classes = len(self.class_names)
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
      raise ValueError(
        f"labels must be in [0, {num_classes}), got {labels[outside[0]]} at"
        f" row {outside[0]}"
      )
    ids = (
      np.arange(len(images)).astype(str)
      if self.ids is None
      else np.asarray(self.ids).astype(str)
    )
    if ids.shape != labels.shape:
      raise ValueError(
        f"ids must be as many as images: got {list(ids.shape)} ids for"
        f" {len(images)} images"
      )
    if self.metadata is not None and self.metadata.num_rows != len(images):
      raise ValueError(
        f"metadata must have one row an image: got {self.metadata.num_rows}"
        f" rows for {len(images)} images"
      )
    object.__setattr__(self, "images", images)
    object.__setattr__(self, "labels", labels.astype(np.int32))
    object.__setattr__(self, "class_names", tuple(self.class_names))
    object.__setattr__(self, "ids", ids)

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def num_classes(self) -> int:
    """Number of classes, with or without images."""
    return len(self.class_names)

  def take(self, rows: np.ndarray | Sequence[int]) -> "Dataset":
    """Returns the data set of these rows (integer indices or a bool mask)."""
    rows = np.asarray(rows)
    rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
    return Dataset(
      images=(
        self.images[rows]
        if isinstance(self.images, np.ndarray)
        else self.images.take(rows)
      ),
      labels=self.labels[rows],
      class_names=self.class_names,
      ids=None if self.ids is None else self.ids[rows],
      metadata=None if self.metadata is None else self.metadata.take(rows),
    )


class Split(NamedTuple):
  """A data set cut in two.

  Attributes:
    forget: What the model must stop relying on.
    retain: The rest, whose behaviour must stay.
  """

  forget: Dataset
  retain: Dataset

  def is_of_classes(self) -> bool:
    """Whether all images of their classes are forgotten.

    However the request was put: as classes, as a condition or as ids, with or
    without groups. The ideal accuracy is 0 then.
    """
    return not np.isin(self.forget.labels, self.retain.labels).any()
