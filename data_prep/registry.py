"""Which builder makes which data set.

A new set is one module with one `base.ImageBuilder`, and one line here. The
class of the set `my_set` is `PsgMySet`: TFDS then names its folder
`psg_my_set`, which clashes with none of TFDS's own sets.
"""

import importlib
from typing import Any

MODULES = {
  "digits": ("data_prep.digits", "PsgDigits"),
  "fashion_mnist": ("data_prep.fashion_mnist", "PsgFashionMnist"),
  "cifar10": ("data_prep.cifar10", "PsgCifar10"),
}
"""Public name -> module and class of its builder, imported when needed."""

EMBEDDED = frozenset({"digits"})
"""Sets that need neither a file nor a network, so prepare themselves."""


def builder_class(name: str) -> Any:
  """Imports the builder of a data set, one of `MODULES`."""
  module_name, class_name = MODULES[name]
  return getattr(importlib.import_module(module_name), class_name)
