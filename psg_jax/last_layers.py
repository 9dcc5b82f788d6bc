"""Some layers of a network, by the names in its variables."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax

from psg_jax import checks, steps, types

NUM_LAYERS = 4
"""Of whole classes, the layers that are moved, and those of refits."""

# In network order: the stem, numbered blocks, the head.
_NAME = re.compile(r"(stem|block_(\d+)|layer(\d+)_(\d+)|head)")


def count(variables: types.Variables) -> int:
  """Returns how many layers `choose` can name; 0 where it knows no name."""
  params = variables.get("params")
  # Of other libraries' networks they are an object.
  names = list(params) if isinstance(params, Mapping) else []
  is_known = all(_NAME.fullmatch(str(name)) for name in names)
  return len(names) if is_known else 0


def check(num_layers: int, variables: types.Variables) -> int:
  """Returns how many layers at the end are meant, never the first.

  Args:
    num_layers: Positive.
    variables: The network's variables.

  Raises:
    ValueError: If it is not positive, or the network has not several layers of
      names that are known.
  """
  checks.integer("num_layers", num_layers, at_least=1)
  num_known = count(variables)
  if num_known < 2:
    raise ValueError(
      "num_layers must be 0 for a network without several layers of names that"
      f" are known, got {num_layers}"
    )
  return min(num_layers, num_known - 1)


def choose(
  variables: types.Variables, num_layers: int, layers: Sequence[str] | None
) -> tuple[str, ...]:
  """Names the layers to train, as prefixes of paths in the variables.

  A layer is a top-level entry of the parameters: a convolution block of the
  All-CNN (`block_0` to `block_7`), the stem or a residual block of a ResNet
  (`stem`, `layer1_0` to `layer4_2`), or the linear `head`, in this order.
  Trees with other names need `layers`.

  Args:
    variables: The network's variables.
    num_layers: `k`, how many layers at the end.
    layers: Prefixes of paths, such as `("layer4", "head")` or
      `("dense_3/kernel",)`, instead of the rule.

  Returns:
    The prefixes.

  Raises:
    ValueError: If a prefix names nothing, the tree has other names, or there
      are not so many layers.
  """
  if layers is not None:
    return _checked(variables, tuple(layers))
  checks.integer("num_layers", num_layers, at_least=1)
  names = list(variables["params"])
  unknown = [name for name in names if not _NAME.fullmatch(name)]
  if unknown:
    raise ValueError(
      "layers must be given for a network whose layers are not named stem,"
      f" block_i, layer{{i}}_{{j}} and head, got {unknown[0]!r}"
    )
  if num_layers > len(names):
    raise ValueError(
      f"num_layers must be at most the {len(names)} layers there are, got"
      f" {num_layers}"
    )
  # The slash keeps block_1 from naming block_10.
  last = sorted(names, key=_position)[-num_layers:]
  return tuple(f"{name}/" for name in last)


def _position(name: str) -> tuple[int, ...]:
  rank = {"stem": 0, "head": 2}.get(name, 1)
  return (rank, *map(int, re.findall(r"\d+", name)))


def _checked(
  variables: types.Variables, layers: tuple[str, ...]
) -> tuple[str, ...]:
  paths = _leaf_names(variables["params"])
  for prefix in layers:
    if not any(path.startswith(prefix) for path in paths):
      raise ValueError(
        f"layers must be prefixes of parameters such as {paths[-1]!r}, got"
        f" {prefix!r}"
      )
  if not layers:
    raise ValueError("layers must not be empty, got no prefix")
  return layers


def _path_name(path: Any) -> str:
  """Names a leaf, as `"block_7/kernel"`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaf_names(tree: chex.ArrayTree) -> list[str]:
  """Names all leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [_path_name(path) for path, _ in leaves]


def trainable(
  variables: types.Variables, num_layers: int, layers: Sequence[str] | None
) -> dict[str, chex.ArrayTree]:
  """Marks the leaves of some layers, for `engine.Passes`.

  Args:
    variables: The network's variables.
    num_layers: As for `choose`.
    layers: As for `choose`.

  Returns:
    A tree of bool like the variables, parameters and statistics alike.

  Raises:
    ValueError: As `choose`.
  """
  prefixes = choose(variables, num_layers, layers)
  return {
    name: jax.tree_util.tree_map_with_path(
      lambda path, _: _path_name(path).startswith(prefixes), tree
    )
    for name, tree in steps.plain_variables(variables).items()
  }


def at_end(
  variables: types.Variables, num_layers: int
) -> dict[str, chex.ArrayTree]:
  """Marks the last layers as `trainable` does, but never the first.

  Args:
    variables: The network's variables.
    num_layers: How many, positive; as many as there are behind the first where
      these are fewer.

  Raises:
    ValueError: As `check`.
  """
  return trainable(variables, check(num_layers, variables), None)


def moved(
  variables: types.Variables,
  split: types.Split,
  labels: str,
  num_layers: int | None = None,
  trainable: Mapping[str, Any] | None = None,
) -> Mapping[str, Any] | None:
  """Returns what `unlearning.unlearn` moves, a tree as for `engine.Passes`.

  Args:
    variables: The network's.
    split: The forget and the retain set.
    labels: The form of the targets, or `"given"`.
    num_layers: See there.
    trainable: Where it is given, what is moved.

  Raises:
    ValueError: If the number is out of its range, or both are given.
  """
  if num_layers is None:
    is_default = (
      labels == "soft_other" and split.is_of_classes() and count(variables) > 1
    )
    num_layers = NUM_LAYERS if is_default and trainable is None else 0
  checks.integer("num_layers", num_layers, at_least=0)
  if not num_layers:
    return trainable
  if trainable is not None:
    raise ValueError(
      f"num_layers must be 0 where trainable is given, got {num_layers}"
    )
  return at_end(variables, num_layers)


def redrawn(
  variables: types.Variables,
  fresh: types.Variables,
  trainable: dict[str, chex.ArrayTree],
) -> types.Variables:
  """Returns the variables, those of a new network where marked.

  Args:
    variables: The network's.
    fresh: Those of a new initialisation.
    trainable: The leaves that are new, of `trainable`.
  """
  mixed: types.Variables = jax.tree.map(
    lambda is_new, new, old: new if is_new else old,
    trainable,
    steps.plain_variables(fresh),
    steps.plain_variables(variables),
  )
  return mixed


def kernels(
  params: chex.ArrayTree, layers: Sequence[str] | None
) -> chex.ArrayTree:
  """Marks the weights of convolutions, or of some layers.

  Args:
    params: The network's parameters.
    layers: Prefixes of paths, of whose arrays those of two axes or more are
      marked; None for all arrays of four axes.

  Returns:
    A tree of bool like the parameters.

  Raises:
    ValueError: If no array is marked, or a prefix names nothing.
  """
  prefixes = (
    None if layers is None else _checked({"params": params}, tuple(layers))
  )

  def is_kernel(path: Any, value: jax.Array) -> bool:
    if prefixes is None:
      return value.ndim == 4
    return value.ndim >= 2 and _path_name(path).startswith(prefixes)

  marks = jax.tree_util.tree_map_with_path(is_kernel, params)
  if not any(jax.tree.leaves(marks)):
    raise ValueError(
      "layers must name arrays of two axes or more where there is no"
      f" convolution, got {layers}"
    )
  return marks


def bias(
  variables: types.Variables, layers: Sequence[str] | None, num_classes: int
) -> chex.ArrayTree:
  """Marks the bias of the last layer.

  Args:
    variables: The network's variables.
    layers: A prefix of its path; None for the last by `choose`.
    num_classes: How many entries it has.

  Returns:
    A tree of bool like the parameters, True for one array.

  Raises:
    ValueError: If there is no such array, or more than one.
  """
  prefixes = choose(variables, 1, layers)
  marks = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x.shape == (num_classes,) and _path_name(path).startswith(prefixes)
    ),
    variables["params"],
  )
  if sum(jax.tree.leaves(marks)) != 1:
    raise ValueError(
      f"layers must name one bias of {num_classes} entries, got {prefixes}"
    )
  return marks
