"""The cells of a grid of unlearnings: read, filled up and checked."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from psg_jax import (
  boundary,
  checks,
  engine,
  inference,
  refits,
  relabelling,
  training,
  types,
  unlearning,
)

Cell: TypeAlias = Mapping[str, Any]

HYPER_PARAMETERS = (
  *boundary.NUMBERS,
  *("retain_weight", "learning_rate", "image_weight", "seed"),
)
# Options of `unlearn` that ask what a model is like before it is done, or bring
# a program of their own.
_REFUSED = (
  *("search_fn", "refresh_labels", "target_accuracy", "max_cycles"),
  *("state", "callback", "step_callback", "stop_fn"),
)
_SIZES = ("search_batch_size", "eval_batch_size", "retain_batch_size")


def grid_of(**axes: Sequence[Any]) -> list[dict[str, Any]]:
  """Returns the cells of a grid: each value of each axis with all others.

      grid_of(distance_weight=[0, 1e-3], noise_scale=[0, 0.1])

  Args:
    **axes: Values of hyper-parameters, by name; the last changes first.

  Raises:
    ValueError: If there is no such hyper-parameter, or no value of one.
  """
  for name, values in axes.items():
    checks.one_of("axes", name, HYPER_PARAMETERS)
    if not len(values):
      raise ValueError(f"{name} must have a value, got none")
  return [
    dict(zip(axes, values, strict=True))
    for values in itertools.product(*axes.values())
  ]


class Shared(NamedTuple):
  """What all cells have in common.

  Attributes:
    model: The network.
    variables: The original's.
    split: The forget and the retain set.
    passes: Options of the loop; the optimiser is at the rate `rate`.
    rate: None where cells have no rate of their own.
    search_options: Those of `boundary.Search`.
    target_options: Those of `relabelling.Targets`.
    given_targets: Of the forget set, in place of those of a search.
    sizes: Batch sizes by name: `search_batch_size`, `eval_batch_size` and
      `retain_batch_size`.
  """

  model: types.Model
  variables: types.Variables
  split: types.Split
  passes: engine.Passes
  rate: float | None
  search_options: dict[str, Any]
  target_options: dict[str, Any]
  given_targets: np.ndarray | None
  sizes: dict[str, int]

  def search(self, cell: Cell) -> boundary.Search:
    """Returns the search of a cell, which checks itself."""
    numbers = {name: cell[name] for name in boundary.NUMBERS}
    return boundary.Search(**self.search_options | numbers)

  def taught(self, cell: Cell) -> relabelling.Targets:
    """Returns the targets of a cell, which check themselves."""
    weight = {"image_weight": cell["image_weight"]}
    return relabelling.Targets(**self.target_options | weight)

  def form(self, taught: relabelling.Targets) -> str:
    """The labels, as `refits.count` names them."""
    return taught.labels if self.given_targets is None else "given"

  def num_refits_of(self, cell: Cell) -> int:
    """Returns how many refits a cell has."""
    taught = self.taught(cell)
    return refits.count(
      *(taught.num_refits, self.variables, self.split),
      labels=self.form(taught),
      retain_weight=cell["retain_weight"],
    )

  def predict(self, images: np.ndarray) -> np.ndarray:
    """Returns the original's logits."""
    return inference.predict(
      *(self.model.apply, self.variables, images),
      batch_size=self.sizes["eval_batch_size"],
      mesh=self.passes.mesh,
    )


def read(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  cells: Sequence[Cell],
  options: Mapping[str, Any],
) -> tuple[Shared, list[dict[str, Any]]]:
  """Checks the arguments of `grids.unlearn_grid` and completes its cells.

  Args:
    model: As for `unlearn_grid`, and so are the following.
    variables: The original model's.
    split: The forget and the retain set.
    cells: Hyper-parameters of each cell, those that it names.
    options: All others.

  Returns:
    What the cells share, and all of `HYPER_PARAMETERS` of each cell.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
  """
  options, defaults = dict(options), unlearning.defaults()
  cells = _checked_names(cells)
  for name in _REFUSED:
    if options.pop(name, None) not in (None, defaults[name]):
      raise ValueError(f"{name} must not be given for a grid")

  def taken(*names: str) -> dict[str, Any]:
    values = {name: options.pop(name, None) for name in names}
    return {name: x for name, x in values.items() if x is not None}

  others: dict[str, Any] = dict.fromkeys(
    ("learning_rate", "targets", "num_layers")
  )
  others["retain_weight"] = 1.0
  others |= taken(*others)
  rate = _rate(options, others["learning_rate"], cells)
  if options.get("optimizer") is None:
    options["optimizer"] = training.sgd(rate)
  shared = Shared(
    *(model, variables, split, engine.Passes(num_epochs=1), rate),
    search_options=unlearning.SEARCH_DEFAULTS | taken(*unlearning.SEARCH_NAMES),
    target_options=taken(*unlearning.TARGET_NAMES),
    given_targets=others["targets"],
    sizes={name: defaults[name] for name in _SIZES} | taken(*_SIZES),
  )
  completed = _completed(shared, cells, others["retain_weight"])
  passes = unlearning.read_passes(
    *(model, variables, split),
    max(cell["retain_weight"] for cell in completed),
    options,
    labels=shared.form(shared.taught(completed[0])),
    num_layers=others["num_layers"],
  )
  if shared.sizes["retain_batch_size"] is None:
    share = unlearning.RETAIN_SHARE * passes.batch_size
    shared.sizes["retain_batch_size"] = share
  for name, size in shared.sizes.items():
    checks.integer(name, size, at_least=1)
  if shared.given_targets is not None:
    targets = unlearning.checked_targets(
      "targets", shared.given_targets, split.forget
    )
    shared = shared._replace(given_targets=targets)
  return shared._replace(passes=passes), completed


def _checked_names(cells: Sequence[Cell]) -> list[Cell]:
  """Returns the cells, which name nothing but hyper-parameters."""
  cells = list(cells)
  if not cells:
    raise ValueError("cells must not be empty, got none")
  for index, cell in enumerate(cells):
    if not isinstance(cell, Mapping):
      raise ValueError(
        f"cells[{index}] must be a mapping of hyper-parameters, got {cell!r}"
      )
    for name in cell:
      checks.one_of(f"cells[{index}]", name, HYPER_PARAMETERS)
  return cells


def _rate(
  options: Mapping[str, Any], rate: float | None, cells: Sequence[Cell]
) -> float | None:
  """Returns the rate of the optimiser; None of one whose rate is unknown."""
  if rate is not None:
    checks.number("learning_rate", rate, above=0)
    return rate
  if options.get("optimizer") is None:
    schedule = options.get("schedule") or unlearning.SCHEDULE
    return unlearning.default_rate(schedule)
  if any(cell.get("learning_rate") is not None for cell in cells):
    raise ValueError(
      "learning_rate must be given, that of optimizer, where cells have rates"
      " of their own, got None"
    )
  return None


def _completed(
  shared: Shared, cells: Sequence[Cell], retain_weight: float
) -> list[dict[str, Any]]:
  """Fills up the cells from what is shared, and checks their values."""
  search = boundary.Search(**shared.search_options)
  targets = relabelling.Targets(**shared.target_options)
  num_classes = shared.split.forget.num_classes
  relabelling.check_labels(targets.labels, targets.top_k, num_classes)
  checks.number("retain_weight", retain_weight, at_least=0)
  defaults = {name: getattr(search, name) for name in boundary.NUMBERS} | {
    "retain_weight": retain_weight,
    "learning_rate": shared.rate,
    "image_weight": targets.image_weight,
    "seed": 0,
  }
  completed = []
  for index, cell in enumerate(cells):
    values = engine.filled(cell, defaults)
    try:
      shared.search(values)
      shared.num_refits_of(values)
      for name, value in values.items():
        if value is not None:
          checks.one_value(name, value)
      checks.number("retain_weight", values["retain_weight"], at_least=0)
      if values["learning_rate"] is not None:
        checks.number("learning_rate", values["learning_rate"], above=0)
      checks.integer("seed", values["seed"], at_least=0)
    except ValueError as error:
      raise ValueError(f"cells[{index}]: {error}") from None
    completed.append(
      {
        x: None if y is None else np.asarray(y).item()
        for x, y in values.items()
      }
    )
  for name in ("max_distance", "confidence"):
    if len({cell[name] is None for cell in completed}) > 1:
      raise ValueError(f"cells must all have {name} or none, got both")
  return completed
