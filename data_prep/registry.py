"""Which builder makes which data set.

A new set is one module with one `base.ImageBuilder`, and one line here. The
class of the set `my_set` is `PsgMySet`: TFDS then names its folder
`psg_my_set`, which clashes with none of TFDS's own sets.
"""

import importlib
import pathlib
from typing import Any

MODULES = {
  "digits": ("data_prep.digits", "PsgDigits"),
  "phantom_fundus": ("data_prep.phantom_fundus", "PsgPhantomFundus"),
  "fashion_mnist": ("data_prep.fashion_mnist", "PsgFashionMnist"),
  "cifar10": ("data_prep.cifar10", "PsgCifar10"),
  "brain_tumor_mri": ("data_prep.brain_tumor_mri", "PsgBrainTumorMri"),
  "fundus": ("data_prep.fundus", "PsgFundus"),
  "image_folder": ("data_prep.image_folder", "PsgImageFolder"),
}
"""Public name -> module and class of its builder, imported when needed."""

EMBEDDED = frozenset({"digits", "phantom_fundus"})
"""Sets that need neither a file nor a network, so prepare themselves."""

NEED_SOURCE = frozenset({"brain_tumor_mri", "fundus", "image_folder"})
"""Sets whose raw files only the user can name."""

SIZES = {
  "phantom_fundus": 64,
  "brain_tumor_mri": 224,
  "fundus": 224,
  "image_folder": 224,
}
"""Sets whose images can have any size -> pixels a side where none is given."""


def builder_class(name: str) -> Any:
  """Imports the builder of a data set, one of `MODULES`."""
  module_name, class_name = MODULES[name]
  return getattr(importlib.import_module(module_name), class_name)


def download_dir(name: str, root: pathlib.Path) -> pathlib.Path:
  """Returns where a builder's downloads are, of the folder of prepared sets."""
  return root / "downloads" / name


def is_complete(name: str, root: pathlib.Path) -> bool:
  """Whether a set can be prepared at once, without a source or a network.

  Args:
    name: One of `MODULES`.
    root: Folder of all prepared sets.

  Returns:
    True for embedded sets, and where all raw files are on this machine.
  """
  if name in EMBEDDED:
    return True
  return builder_class(name).has_files(download_dir(name, root))
