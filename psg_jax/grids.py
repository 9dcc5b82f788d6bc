"""Many unlearnings of one request, as one compiled program.

The cells of a grid differ in numbers alone: those of the search are arguments
of its program, `φ` is in the weights of the minibatches, and the learning rate
in the factors of the steps. So nothing is compiled anew from cell to cell.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import (
  batches,
  boundary,
  checks,
  engine,
  ensembles,
  grid_cells,
  optimizers,
  parallel,
  refits,
  relabelling,
  steps,
  streaming,
  training,
  types,
  unlearning,
)

Cell = grid_cells.Cell
HYPER_PARAMETERS = grid_cells.HYPER_PARAMETERS
grid_of = grid_cells.grid_of

MODES = ("auto", *ensembles.MODES)
# Of the free memory, for the states of the cells.
_MEMORY_SHARE = 0.5


@types.pytree
class Grid:
  """The unlearned models of a grid, on the host.

  Attributes:
    cells: The hyper-parameters of each cell, all of `HYPER_PARAMETERS`;
      `learning_rate` is None where an optimiser was given without its rate.
    variables: The unlearned models', each array with an axis `M` in front.
    histories: Of each cell what `unlearn` returns as its history. `seconds` are
      the cell's share of a pass over all cells that went through it together,
      and `search_seconds` those of its search, which other cells may share.
    targets: Distinct targets of the forget set, `[N]` or `[N, K]` each.
    target_of_cell: int `[M]`, places in them.
    relabellings: What distinct searches found.
    search_of_cell: int `[M]`, places in them; -1 of cells without a search.
  """

  cells: tuple[dict[str, Any], ...]
  variables: types.Variables
  histories: tuple[engine.History, ...]
  targets: tuple[np.ndarray, ...]
  target_of_cell: np.ndarray
  relabellings: tuple[relabelling.Relabelling, ...]
  search_of_cell: np.ndarray

  def output(self, index: int) -> unlearning.UnlearnOutput:
    """Returns a cell as `unlearn` does, with arrays on the host.

    Raises:
      IndexError: If there is no such cell.
    """
    search = int(self.search_of_cell[index])
    return unlearning.UnlearnOutput(
      variables=jax.tree.map(lambda x: x[index], self.variables),
      history=self.histories[index],
      targets=self.targets[int(self.target_of_cell[index])],
      relabelling=None if search < 0 else self.relabellings[search],
    )


def unlearn_grid(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  cells: Sequence[Cell],
  mode: str = "auto",
  memory_limit: int | None = None,
  **options: Any,
) -> Grid:
  """Unlearns once for each cell of a grid, without compiling for each.

  A cell becomes what `unlearning.unlearn` makes of its hyper-parameters with
  the key `jax.random.fold_in(key, seed)` and `training.sgd(learning_rate)`, up
  to rounding, since sums of another program have another order. Cells that
  need the same search share it: those of the same numbers and, where there is
  noise, of the same seed.

  Args:
    model: The network.
    variables: The original model's, frozen and left as they are.
    split: The forget and the retain set.
    key: One typed key.
    cells: Hyper-parameters by name, one mapping a cell, such as of `grid_of`:
      the numbers of `boundary.Search` (`λ` is `distance_weight`, `γ` is
      `noise_scale`), `retain_weight` (`φ`), `learning_rate`, `image_weight`,
      and `seed`, an integer of 0 or more, by default 0. What a cell does not
      name, or has as None, is the option's, or the default.
    mode: `"map"`: one cell after the other within the program; `"vmap"`: all at
      once; `"sharded"`: cut over the devices of `mesh`, by default all, one
      after the other on each; `"auto"`: sharded where there are several
      devices, else mapped. On one core of a busy CPU, 20 cells of one pass over
      a class of the digits without a search took 36.5 s of the core mapped and
      99.7 s vmapped, compiling included (docs/speed.md), and no variable of the
      one was further than 0.0035 from the other's. Measure anew on an
      accelerator.
    memory_limit: Bytes on a device for the states of cells that go through the
      program together; others wait for the next call of it. None for half of
      what the device says is free; it is not limited where it says nothing, as
      on a CPU.
    **options: Those of `unlearn`, for all cells, but those that look at one
      model in the course of the work (`refresh_labels`, `target_accuracy`,
      `max_cycles`, `state`, callbacks) or bring a program (`search_fn`), and
      the defaults of hyper-parameters. `optimizer` is at the rate of the option
      `learning_rate`, which must be given with it where cells have rates of
      their own; its updates must be linear in it, as those of SGD and Adam are.

  Returns:
    The unlearned models, on the host.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss of a cell is NaN or infinite.
  """
  checks.key(key)
  checks.one_of("mode", mode, MODES)
  if mode == "auto":
    is_sharded = jax.device_count() > 1 or options.get("mesh") is not None
    mode = "sharded" if is_sharded else "map"
  shared, completed = grid_cells.read(model, variables, split, cells, options)
  passes = ensembles.on_devices(shared.passes, mode)
  shared = shared._replace(passes=passes)
  most = _most_at_a_time(shared, key, memory_limit)
  search_keys, update_keys = zip(
    *(
      jax.random.split(jax.random.fold_in(key, cell["seed"]))
      for cell in completed
    ),
    strict=True,
  )
  taught = _teach(shared, completed, search_keys)
  models, histories = _empty(shared, key, len(completed))
  for group in _groups(shared, completed):
    cut = _cut(group, most, passes.mesh)
    for chunk, state, records in _update(
      shared, completed, update_keys, taught, cut, mode
    ):
      _keep(models, chunk, state)
      for place, cell in enumerate(chunk):
        histories[cell] = _history(records, place, len(chunk))
        histories[cell][0]["search_seconds"] = taught.seconds_of(cell)
  return Grid(
    cells=tuple(completed),
    variables=models,
    histories=tuple(histories),
    targets=taught.targets,
    target_of_cell=taught.target_of_cell,
    relabellings=taught.relabellings,
    search_of_cell=taught.search_of_cell,
  )


class _Taught(NamedTuple):
  """What the cells are to say: the fields of `Grid`, and some more.

  Attributes:
    targets: See `Grid`, and so are the following.
    target_of_cell: See there.
    relabellings: See there.
    search_of_cell: See there.
    search_seconds: One a relabelling.
    retain_targets: Of the retain set, in the form of `targets`.
  """

  targets: tuple[np.ndarray, ...]
  target_of_cell: np.ndarray
  relabellings: tuple[relabelling.Relabelling, ...]
  search_of_cell: np.ndarray
  search_seconds: list[float]
  retain_targets: np.ndarray

  def seconds_of(self, cell: int) -> float:
    """Returns the seconds of a cell's search."""
    search = int(self.search_of_cell[cell])
    return 0.0 if search < 0 else self.search_seconds[search]


def _teach(
  shared: grid_cells.Shared, cells: Sequence[Cell], keys: Sequence[jax.Array]
) -> _Taught:
  """Finds the targets of all cells, each that is distinct once."""
  split, given = shared.split, shared.given_targets
  is_searched = [
    given is None and shared.taught(cell).is_searched for cell in cells
  ]
  search_of_cell, firsts = _distinct(
    [
      _search_name(x) if on else None
      for x, on in zip(cells, is_searched, strict=True)
    ]
  )
  relabellings, seconds = _relabel(
    shared,
    [shared.search(cells[first]) for first in firsts],
    [keys[first] for first in firsts],
  )
  num_refits = [shared.num_refits_of(cell) for cell in cells]
  target_of_cell, firsts = _distinct(
    [
      (
        int(search),
        None if given is not None else cell["image_weight"],
        *((number, cell["seed"]) if number else ()),
      )
      for search, cell, number in zip(
        search_of_cell, cells, num_refits, strict=True
      )
    ]
  )

  @functools.cache
  def refit(seed: int) -> np.ndarray:
    place = [cell["seed"] for cell in cells].index(seed)
    return refits.predict(
      *(shared.model, shared.variables, split, keys[place]),
      num_models=max(num_refits),
      augment_fn=shared.passes.augment_fn,
      eval_batch_size=shared.sizes["eval_batch_size"],
      mesh=shared.passes.mesh,
      show_progress=shared.passes.show_progress,
    )

  logits = None
  if given is None and any(cells[first]["image_weight"] for first in firsts):
    logits = shared.predict(split.forget.images)
  targets = (
    [given]
    if given is not None
    else [
      shared.taught(cells[first]).of_forget(
        relabellings[search_of_cell[first]] if is_searched[first] else None,
        logits if cells[first]["image_weight"] else None,
        split.forget.labels,
        unlearning.gone_classes(split),
        refit(cells[first]["seed"]) if num_refits[first] else None,
      )
      for first in firsts
    ]
  )
  targets = [
    unlearning.checked_targets("targets", x, split.forget) for x in targets
  ]
  retain_targets = split.retain.labels
  taught = shared.taught(cells[0])
  has_retain = any(cell["retain_weight"] > 0 for cell in cells)
  if has_retain and taught.retain_labels != "hard":
    retain_targets = taught.of_retain(shared.predict(split.retain.images))
  return _Taught(
    *(tuple(targets), target_of_cell, tuple(relabellings), search_of_cell),
    *(seconds, retain_targets),
  )


def _search_name(cell: Cell) -> tuple[Any, ...]:
  """Returns what makes the search of a cell another one's."""
  numbers = tuple(cell[name] for name in boundary.NUMBERS)
  return (*numbers, cell["seed"] if cell["noise_scale"] > 0 else None)


def _distinct(names: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
  """Returns each name's place among the distinct ones, and their firsts.

  None has the place -1.
  """
  firsts: dict[Any, int] = {}
  for index, name in enumerate(names):
    if name is not None:
      firsts.setdefault(name, index)
  places = {None: -1} | {name: place for place, name in enumerate(firsts)}
  return np.array([places[x] for x in names]), list(firsts.values())


def _relabel(
  shared: grid_cells.Shared,
  searches: Sequence[boundary.Search],
  keys: Sequence[jax.Array],
) -> tuple[list[relabelling.Relabelling], list[float]]:
  """Makes searches one after the other, with one program."""
  outcomes, seconds = [], []
  if searches:
    searches = boundary.alike(searches)
  for search, key in zip(searches, keys, strict=True):
    start = time.perf_counter()
    outcome = relabelling.relabel(
      *(shared.model.apply, shared.variables, shared.split.forget),
      jax.random.fold_in(key, 0),
      search_fn=search,
      batch_size=shared.sizes["search_batch_size"],
      mesh=shared.passes.mesh,
      show_progress=shared.passes.show_progress,
    )
    seconds.append(time.perf_counter() - start)
    outcomes.append(outcome)
  return outcomes, seconds


def _trainable(shared: grid_cells.Shared) -> tuple[Any, Any]:
  return engine.read_trainable(shared.passes.trainable, shared.variables)


def _fresh(shared: grid_cells.Shared, key: jax.Array) -> steps.TrainState:
  """The state that a cell starts from."""
  assert shared.passes.optimizer is not None
  return steps.init_state(
    *(shared.variables, shared.passes.optimizer, key),
    trainable=_trainable(shared)[0],
  )


def _empty(
  shared: grid_cells.Shared, key: jax.Array, num_cells: int
) -> tuple[types.Variables, list[engine.History]]:
  """Returns where the cells' variables and histories go, on the host."""
  fresh = jax.eval_shape(functools.partial(_fresh, shared), key)
  models = jax.tree.map(
    lambda x: np.empty((num_cells, *x.shape), x.dtype), fresh.variables
  )
  return models, [[] for _ in range(num_cells)]


def _most_at_a_time(
  shared: grid_cells.Shared, key: jax.Array, memory_limit: int | None
) -> int | None:
  """Returns for how many cells there is memory, None where all may go."""
  state = jax.eval_shape(functools.partial(_fresh, shared), key)
  # The program reads the states of all cells and writes new ones.
  num_bytes = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  mesh = shared.passes.mesh
  if memory_limit is None:
    free = parallel.free_bytes(mesh)
    if free is None:
      return None
    memory_limit = max(int(_MEMORY_SHARE * free), num_bytes)
  checks.integer("memory_limit", memory_limit, at_least=1)
  if memory_limit < num_bytes:
    raise ValueError(
      f"memory_limit must be at least {num_bytes} bytes, what one cell takes,"
      f" got {memory_limit}"
    )
  return memory_limit // num_bytes * parallel.size(mesh)


def _groups(
  shared: grid_cells.Shared, cells: Sequence[Cell]
) -> list[np.ndarray]:
  """Returns the cells that can go through one program, as their numbers.

  Where only some use retained images, these are padding in the minibatches of
  the others, which BatchNorm must be told.
  """
  has_retain = np.array([cell["retain_weight"] > 0 for cell in cells])
  apply_train = shared.model.apply_train
  if (
    apply_train is None
    or shared.passes.batch_stats == "frozen"
    or steps.takes_mask(apply_train)
  ):
    return [np.arange(len(cells))]
  parts = [np.flatnonzero(x) for x in (has_retain, ~has_retain)]
  return [part for part in parts if part.size]


def _cut(
  group: np.ndarray, most: int | None, mesh: jax.sharding.Mesh | None
) -> list[np.ndarray]:
  """Cuts cells into chunks of one size, but for the last."""
  num_chunks = 1 if most is None else -(-len(group) // most)
  size = parallel.padded_size(-(-len(group) // num_chunks), mesh)
  return [group[x : x + size] for x in range(0, len(group), size)]


def _update(
  shared: grid_cells.Shared,
  cells: Sequence[Cell],
  keys: Sequence[jax.Array],
  taught: _Taught,
  chunks: Sequence[np.ndarray],
  mode: str,
) -> Iterator[tuple[np.ndarray, steps.TrainState, engine.History]]:
  """Moves the cells of one program to their targets, chunk by chunk."""
  passes, split = shared.passes, shared.split
  numbers = np.concatenate(chunks)
  has_retain = any(cells[x]["retain_weight"] > 0 for x in numbers)
  images: np.ndarray | streaming.Images = split.forget.images
  if has_retain:
    images = streaming.concatenate([images, split.retain.images])
  tables = _tables(taught, has_retain, split.forget.num_classes)
  plans = {x: _plans(shared, cells[x], keys[x], has_retain) for x in numbers}
  size = parallel.padded_size(len(chunks[0]), passes.mesh)
  num_steps = sum(len(plan.rows) for plan in plans[numbers[0]])
  # One program for all chunks, though only some have padding.
  is_masked = len(chunks[-1]) < size or any(
    np.any(plan.weights == 0) for x in plans.values() for plan in x
  )
  trainable, masks = _trainable(shared)
  init = jax.vmap(functools.partial(_fresh, shared))
  for chunk in chunks:
    members = np.pad(chunk, (0, size - len(chunk)), mode="edge")
    places = jnp.asarray(taught.target_of_cell[members])
    context = ensembles.Context(tables, places)
    state = init(jnp.stack([keys[x] for x in members]))
    try:
      state, records = engine.run_passes(
        _program(passes, shared.model, trainable),
        parallel.shard(state, passes.mesh),
        images,
        np.arange(len(images), dtype=np.int32),
        [
          [engine.Phase(_mean_cross_entropy, plan, context, is_masked)]
          for plan in _beside([plans[x] for x in members], len(chunk))
        ],
        passes,
        factors=_factors(shared, [cells[x] for x in members], num_steps),
        masks=parallel.replicate(masks, passes.mesh),
        record_fn=functools.partial(_records, num_cells=len(chunk)),
        run_fn=functools.partial(
          ensembles.run_steps, mode=mode, mesh=passes.mesh
        ),
      )
    except FloatingPointError as error:
      raise FloatingPointError(
        f"{error} (from model 0 on these are cells {checks.few(chunk, 8)})"
      ) from None
    yield chunk, state, records


def _program(
  passes: engine.Passes, model: types.Model, trainable: Any
) -> steps.Program:
  assert passes.optimizer is not None
  return steps.Program(
    model=model,
    optimizer=passes.optimizer,
    loss_fn=_mean_cross_entropy,
    trainable=trainable,
    augment_fn=passes.augment_fn,
    batch_stats=passes.batch_stats,
    num_parts=passes.num_parts,
  )


class _Tables(NamedTuple):
  """Targets by row of the pool, which holds the forget set first.

  Attributes:
    forget: Of each distinct search, `[T, N_F]` or `[T, N_F, K]`.
    retain: `[N_R]` or `[N_R, K]`; None where no cell retains.
  """

  forget: jax.Array
  retain: jax.Array | None


def _tables(taught: _Taught, has_retain: bool, num_classes: int) -> _Tables:
  """Puts the targets onto the device, those of both sets in one form."""
  forget, retain = list(taught.targets), taught.retain_targets
  if not has_retain:
    return _Tables(jnp.asarray(np.stack(forget)), None)
  if forget[0].ndim != retain.ndim:
    *forget, retain = (
      unlearning.as_probabilities(x, num_classes) for x in (*forget, retain)
    )
  return _Tables(jnp.asarray(np.stack(forget)), jnp.asarray(retain))


def _mean_cross_entropy(
  apply_fn: steps.ApplyFn,
  variables: types.Variables,
  batch: steps.Batch,
  context: Any,
) -> tuple[jax.Array, tuple[types.Variables, steps.Figures]]:
  """The plain loss, of targets that the cell looks up by the pool's rows."""
  forget, retain = context.shared
  num_forget = forget.shape[1]
  targets = forget[
    context.per_model, jnp.minimum(batch.targets, num_forget - 1)
  ]
  if retain is not None:
    others = retain[jnp.maximum(batch.targets - num_forget, 0)]
    is_forget = batch.is_forget.reshape(-1, *[1] * (targets.ndim - 1))
    targets = jnp.where(is_forget, targets, others)
  return steps.mean_cross_entropy(
    apply_fn, variables, dataclasses.replace(batch, targets=targets), ()
  )


def _plans(
  shared: grid_cells.Shared, cell: Cell, key: jax.Array, has_retain: bool
) -> list[batches.Plan]:
  """The minibatches of a cell, those that `unlearning.update` draws."""
  split, passes = shared.split, shared.passes
  weight = cell["retain_weight"]
  plans = batches.each_pass(
    training.order_key(None, key),
    passes.num_epochs,
    lambda key: batches.beside_forget(
      *(key, len(split.forget), len(split.retain), passes.batch_size),
      # Where others retain, so many rows of padding.
      *(weight or float(has_retain), shared.sizes["retain_batch_size"]),
    ),
  )
  if weight > 0:
    return plans
  return [x._replace(weights=x.weights * x.is_forget) for x in plans]


def _beside(
  plans: Sequence[Sequence[batches.Plan]], num_real: int
) -> list[batches.Plan]:
  """Joins plans `[S, B]` to one `[S, M, B]` a pass; the last cells skip all."""
  joined = []
  for parts in zip(*plans, strict=True):
    plan = batches.Plan(*(np.stack(x, 1) for x in zip(*parts, strict=True)))
    plan.weights[:, num_real:] = 0
    joined.append(plan)
  return joined


def _factors(
  shared: grid_cells.Shared, cells: Sequence[Cell], num_steps: int
) -> np.ndarray:
  """Factors of the optimiser's rate `[S, M]`: the schedule's, the cell's."""
  factors = optimizers.schedule_factors(shared.passes.schedule, num_steps)
  rates = [
    1.0 if shared.rate is None else cell["learning_rate"] / shared.rate
    for cell in cells
  ]
  return (factors[:, None] * np.asarray(rates)).astype(np.float32)


def _records(report: engine.Report, num_cells: int) -> dict[str, Any]:
  """What `unlearning.update` records of a pass, of each cell."""
  return {
    "cells": [
      unlearning.read_report(
        engine.Report(
          report.losses[:, place],
          {name: x[:, place] for name, x in report.figures.items()},
          batches.Plan(*(x[:, place] for x in report.plan)),
        )
      )
      for place in range(num_cells)
    ]
  }


def _history(
  records: engine.History, place: int, num_cells: int
) -> engine.History:
  """Returns the history of one cell of a chunk."""
  return [
    {
      "epoch": record["epoch"],
      **record["cells"][place],
      "seconds": record["seconds"] / num_cells,
    }
    for record in records
  ]


def _keep(
  models: types.Variables, chunk: np.ndarray, state: steps.TrainState
) -> None:
  """Writes the variables of a chunk into those of all cells."""

  def write(whole: np.ndarray, part: jax.Array) -> None:
    whole[chunk] = np.asarray(part)[: len(chunk)]

  jax.tree.map(write, models, state.variables)
