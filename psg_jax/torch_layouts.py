"""Which array of our networks is which entry of a PyTorch state dict.

The keys are those of the paper's released code for the All-CNN, and those of
torchvision for the ResNets. A file may have them in a dictionary within others,
after any prefix, and beside much else: they are found by themselves.
"""

import collections
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from psg_jax import checks, torch_files, torch_pickles

_COUNT = ".num_batches_tracked"
_PARTS = ("weight", "bias", "running_mean", "running_var")
# Of several dictionaries that hold the network, the first of these is meant.
_WRAPPERS = ("", "state_dict", "model_state_dict", "model", "net")
# What a loss keeps in the same module, such as the weights of its classes.
_LOSSES = ("criterion", "loss", "loss_fn")


class Entry(NamedTuple):
  """One array of a network, in both worlds.

  Attributes:
    key: Its key in the state dict.
    path: Its path in the variables.
    kind: How the two differ: `"conv"` (OIHW, HWIO), `"linear"` (transposed),
      `"vector"` (nothing), `"count"` (int64, int32).
    shape: PyTorch's shape; a name stands for a length that must be the same
      wherever the name occurs.
  """

  key: str
  path: tuple[str, ...]
  kind: str
  shape: tuple[int | str, ...]


class Layout(NamedTuple):
  """A network in both worlds.

  Attributes:
    entries: Its arrays, under the keys that `save` gives them by default.
    head: Start of the keys of the linear head.
    pretrained: Name of torchvision's weights and their file, if there are any.
  """

  entries: tuple[Entry, ...]
  head: str
  pretrained: tuple[str, str] | None = None


class Spelling(NamedTuple):
  """How one file spells the keys of a network.

  Attributes:
    prefix: What all keys start with.
    head: Start of the keys of the linear head, after the prefix.
    has_counts: Whether it has `num_batches_tracked`, which files from before
      PyTorch 0.4.1 lack.
  """

  prefix: str
  head: str
  has_counts: bool


class Found(NamedTuple):
  """A network in a file.

  Attributes:
    where: Its dictionary, as in `torch_files.Contents`.
    spelling: How its keys are spelled there.
    tensors: Its entries there, by key.
    left: What else the file holds, by name.
  """

  where: str
  spelling: Spelling
  tensors: dict[str, torch_pickles.Tensor]
  left: tuple[str, ...]


def conv_block(
  block: tuple[str, ...],
  conv: str,
  norm: str,
  lengths: tuple[str, str],
  size: int,
) -> list[Entry]:
  """A convolution without bias and its batch normalisation.

  Args:
    block: Path of the block in a collection.
    conv: Key of the convolution.
    norm: Key of the normalisation.
    lengths: Names of the numbers of input and of output channels.
    size: Rows and columns of the kernel.
  """
  inputs, outputs = lengths
  params, stats = ("params", *block), ("batch_stats", *block)
  return [
    Entry(
      f"{conv}.weight",
      (*params, "kernel"),
      "conv",
      (outputs, inputs, size, size),
    ),
    Entry(f"{norm}.weight", (*params, "scale"), "vector", (outputs,)),
    Entry(f"{norm}.bias", (*params, "bias"), "vector", (outputs,)),
    Entry(f"{norm}.running_mean", (*stats, "mean"), "vector", (outputs,)),
    Entry(f"{norm}.running_var", (*stats, "var"), "vector", (outputs,)),
    Entry(f"{norm}.num_batches_tracked", (*stats, "count"), "count", ()),
  ]


def linear_head(linear: str, inputs: str) -> list[Entry]:
  """A linear layer with bias: its key, and the name of its length."""
  params = ("params", "head")
  return [
    Entry(
      f"{linear}.weight", (*params, "kernel"), "linear", ("classes", inputs)
    ),
    Entry(f"{linear}.bias", (*params, "bias"), "vector", ("classes",)),
  ]


def _all_cnn() -> Layout:
  """Eight blocks; PyTorch's indices 3 and 7 are its dropout layers."""
  entries, inputs = [], "channels"
  for i, position in enumerate((0, 1, 2, 4, 5, 6, 8, 9)):
    name, layer = f"block_{i}", f"features.{position}"
    size = 1 if i == 7 else 3
    entries += conv_block(
      (name,), f"{layer}.0", f"{layer}.1", (inputs, name), size
    )
    inputs = name
  head = "classifier.0"
  return Layout((*entries, *linear_head(head, inputs)), head)


def _resnet(
  num_blocks: tuple[int, ...],
  kernel_sizes: tuple[int, ...],
  pretrained: tuple[str, str],
) -> Layout:
  """The layout of torchvision: a stem and four layers of residual blocks.

  Args:
    num_blocks: Blocks of each layer.
    kernel_sizes: Of the convolutions of a block.
    pretrained: As in `Layout`.
  """
  entries = conv_block(
    ("stem", "conv1"), "conv1", "bn1", ("channels", "stem"), 7
  )
  inputs = "stem"
  is_bottleneck = len(kernel_sizes) == 3
  for i, number in enumerate(num_blocks, 1):
    # The first layer of a ResNet-18 adds its blocks to what the stem gives.
    outputs = inputs if i == 1 and not is_bottleneck else f"layer{i}"
    for j in range(number):
      key = f"layer{i}.{j}"
      entries += _residual_block(key, (inputs, outputs), kernel_sizes)
      inputs = outputs
  return Layout((*entries, *linear_head("fc", inputs)), "fc", pretrained)


def _residual_block(
  key: str, lengths: tuple[str, str], kernel_sizes: tuple[int, ...]
) -> list[Entry]:
  name = key.replace(".", "_")
  inner = [f"{key}.conv{n}" for n in range(1, len(kernel_sizes))]
  channels = [lengths[0], *inner, lengths[1]]
  entries = []
  for n, size in enumerate(kernel_sizes, 1):
    entries += conv_block(
      (name, f"conv{n}"),
      f"{key}.conv{n}",
      f"{key}.bn{n}",
      (channels[n - 1], channels[n]),
      size,
    )
  if lengths[0] != lengths[1]:
    shortcut = f"{key}.downsample"
    entries += conv_block(
      (name, "downsample"), f"{shortcut}.0", f"{shortcut}.1", lengths, 1
    )
  return entries


NETWORKS: dict[str, Callable[[], Layout]] = {
  "all_cnn": _all_cnn,
  "resnet18": lambda: _resnet(
    (2, 2, 2, 2), (3, 3), ("IMAGENET1K_V1", "resnet18-f37072fd.pth")
  ),
  "resnet50": lambda: _resnet(
    (3, 4, 6, 3), (1, 3, 1), ("IMAGENET1K_V2", "resnet50-11ad3fa6.pth")
  ),
}


def layout(model_name: str) -> Layout:
  """Returns the layout of a network.

  Args:
    model_name: As in `models.create`.

  Raises:
    ValueError: If the name is unknown.
  """
  checks.one_of("model_name", model_name, NETWORKS)
  return NETWORKS[model_name]()


def spelled(network: Layout, spelling: Spelling) -> list[Entry]:
  """Returns the entries of a network under the keys of a file."""

  def renamed(entry: Entry) -> Entry:
    key = entry.key
    if is_head(entry):
      key = spelling.head + key.removeprefix(network.head)
    return entry._replace(key=spelling.prefix + key)

  return [renamed(entry) for entry in network.entries]


def is_head(entry: Entry) -> bool:
  """Whether an entry belongs to the linear head."""
  return entry.path[1] == "head"


def axes(entry: Entry, rank: int) -> tuple[int, ...]:
  """PyTorch's order of the axes of an array of ours, where the rank fits."""
  kinds = {("conv", 4): (3, 2, 0, 1), ("linear", 2): (1, 0)}
  return kinds.get((entry.kind, rank), tuple(range(rank)))


def expected_keys(entries: Iterable[Entry], *, has_counts: bool) -> list[str]:
  """Returns the keys of the entries that a file must have."""
  return [entry.key for entry in entries if has_counts or entry.kind != "count"]


def refuse(source: str, *faults: str, hint: str = "") -> None:
  """Raises ValueError in one line, if there are any faults."""
  if any(faults):
    raise ValueError(f"{source}: {'; '.join(filter(None, faults))}{hint}")


def check_names(
  source: str, given: Iterable[str], expected: list[str], hint: str = ""
) -> None:
  """Raises ValueError naming what is missing and what is too much."""
  given = set(given)
  missing = [name for name in expected if name not in given]
  extra = sorted(given.difference(expected))
  refuse(
    source,
    f"missing {checks.few(missing)}" if missing else "",
    f"unexpected {checks.few(extra)}" if extra else "",
    hint=hint,
  )


def find(
  path: str | os.PathLike[str],
  model_name: str,
  argument: str = "path",
  *,
  has_head: bool = True,
) -> Found:
  """Finds a network in a file.

  Args:
    path: As for `torch_files.read`.
    model_name: As in `models.create`.
    argument: What messages call the path.
    has_head: Whether the head is wanted too; else it is among what is left.

  Returns:
    Where it is, in a dictionary and after a prefix under which all its keys
    are.

  Raises:
    ValueError: As `torch_files.read`; if there is no such place, or there are
      several and none is the usual one; or if the place has more parameters
      than the network.
  """
  contents = torch_files.read(path, argument)
  source = f"{argument} {str(path)!r}"
  search = _Search(contents, layout(model_name), has_head)
  places = search.candidates()
  whole = [place for place in places if search.is_whole(place)]
  if len(whole) > 1:
    _check_one(path, source, whole)
  if not whole:
    others = [
      name
      for name in NETWORKS
      if _Search(contents, layout(name), has_head=True).has_whole()
    ]
    check_names(
      f"{source} is not a state dict of {model_name!r}",
      places[0].tensors,
      search.wanted(places[0].spelling),
      f"; it is a state dict of {others[0]!r}" if others else "",
    )
  return whole[0]


class _Search(NamedTuple):
  """A search for a network in a file."""

  contents: torch_files.Contents
  network: Layout
  has_head: bool

  def places(self) -> list[tuple[str, str]]:
    """Dictionaries and prefixes with all of a network but its head.

    Where there is none, the one with the most of it. The usual ones come first.
    """
    body = {
      entry.key
      for entry in self.network.entries
      if not is_head(entry) and entry.kind != "count"
    }
    numbers: collections.Counter[tuple[str, str]] = collections.Counter()
    for where, tensors in self.contents.dictionaries.items():
      numbers[where, ""] = 0
      for key in tensors:
        parts = key.split(".")
        for i in range(len(parts)):
          if ".".join(parts[i:]) in body:
            numbers[where, "".join(f"{part}." for part in parts[:i])] += 1
    whole = [place for place, number in numbers.items() if number == len(body)]
    order = {where: i for i, where in enumerate(_WRAPPERS)}
    whole.sort(key=lambda place: order.get(place[0], len(order)))
    return whole or [numbers.most_common(1)[0][0]]

  def candidates(self) -> list[Found]:
    """What is at each place, beside which are none of the others."""
    places = self.places()
    return [
      self._found(
        where,
        prefix,
        tuple(
          other
          for name, other in places
          if name == where and other != prefix and other.startswith(prefix)
        ),
      )
      for where, prefix in places
    ]

  def wanted(self, spelling: Spelling) -> list[str]:
    """The keys that a place must have."""
    entries = [
      entry
      for entry in spelled(self.network, spelling)
      if self.has_head or not is_head(entry)
    ]
    return expected_keys(entries, has_counts=spelling.has_counts)

  def is_whole(self, candidate: Found) -> bool:
    """Whether a place has these and no others."""
    return candidate.tensors.keys() == set(self.wanted(candidate.spelling))

  def has_whole(self) -> bool:
    """Whether any place has."""
    return any(map(self.is_whole, self.candidates()))

  def _spelling(self, prefix: str, names: list[str]) -> Spelling:
    root = self.network.head.partition(".")[0]
    layers = {
      name.rpartition(".")[0]
      for name in names
      if name.partition(".")[0] == root and name.endswith((".weight", ".bias"))
    }
    # Two linear layers are another head than ours, to be named as unexpected.
    head = layers.pop() if len(layers) == 1 else self.network.head
    return Spelling(prefix, head, any(name.endswith(_COUNT) for name in names))

  def _found(self, where: str, prefix: str, inner: tuple[str, ...]) -> Found:
    """Divides a dictionary into what is the network's and what is left."""
    every = self.contents.dictionaries[where]
    names = [
      key.removeprefix(prefix) for key in every if key.startswith(prefix)
    ]
    spelling = self._spelling(prefix, names)
    wanted = set(self.wanted(spelling))
    root = self.network.head.partition(".")[0]

    def is_kept(key: str) -> bool:
      if not key.startswith(prefix):
        return False
      parts = key.removeprefix(prefix).split(".")
      if not self.has_head and parts[0] == root:
        return False
      # Another copy of the network, such as an average.
      if key.startswith(inner):
        return key in wanted
      # A number that is no parameter of a layer, such as `n_averaged`.
      is_number = every[key].shape in ((), (1,)) and parts[-1] not in _PARTS
      return key in wanted or not (is_number or parts[0] in _LOSSES)

    kept = {key: tensor for key, tensor in every.items() if is_kept(key)}
    outer = where.partition(".")[0] if where else None
    left = [x for x in self.contents.names if x not in every and x != outer]
    left += [
      key if key.startswith(prefix) else key.partition(".")[0]
      for key in every
      if key not in kept
    ]
    return Found(where, spelling, kept, tuple(dict.fromkeys(left)))


def _check_one(
  path: str | os.PathLike[str], source: str, whole: list[Found]
) -> None:
  """Raises ValueError where it is left open which network is meant."""
  first, *others = whole
  rivals = [
    other
    for other in others
    if other.where == first.where or first.where not in _WRAPPERS
    # One module may be registered under two names.
    if not _are_same(path, first, other)
  ]
  if rivals:
    names = checks.few(
      repr(place_name(candidate)) for candidate in (first, *rivals)
    )
    raise ValueError(
      f"{source} holds the network {len(rivals) + 1} times, as {names}: save"
      " the state dict of one of them alone"
    )


def _are_same(path: str | os.PathLike[str], *candidates: Found) -> bool:
  """Whether two places have the same tensors, or equal ones."""
  tensors = [set(candidate.tensors.values()) for candidate in candidates]
  if tensors[0] != tensors[1]:
    return False
  # Files of safetensors do not say which are one.
  if all(tensor.storage is not None for tensor in tensors[0]):
    return True
  first, second = (
    {
      key.removeprefix(candidate.spelling.prefix): array
      for key, array in torch_files.arrays(path, candidate.tensors).items()
    }
    for candidate in candidates
  )
  return first.keys() == second.keys() and all(
    np.array_equal(first[key], second[key]) for key in first
  )


def place_name(candidate: Found) -> str:
  """Says where in a file a network is."""
  place = [candidate.where, candidate.spelling.prefix.removesuffix(".")]
  return ".".join(name for name in place if name)
