"""One loop: passes over a pool of images, for all that trains.

Training, unlearning and every method to compare with give a loss and say which
images make up each minibatch; the calls of the compiled program, padding, the
devices, resuming, the progress bar, the history and the check of the loss are
here.
"""

import dataclasses
import time
import types as types_lib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import (
  augment,
  batches,
  checks,
  optimizers,
  parallel,
  progress,
  steps,
  streaming,
  types,
)

History: TypeAlias = list[dict[str, Any]]
BATCH_STATS = ("update", "frozen")
RunFn: TypeAlias = Callable[..., tuple[steps.TrainState, steps.Reported]]
Callback: TypeAlias = Callable[[steps.TrainState, dict[str, Any]], None]


class Phase(NamedTuple):
  """Minibatches that are taken one after the other with one loss.

  Attributes:
    loss_fn: The objective.
    plan: The minibatches.
    context: Arrays that the loss is given.
    is_masked: Whether the program is to be that of plans with padding, though
      this one may have none.
  """

  loss_fn: steps.LossFn
  plan: batches.Plan
  context: chex.ArrayTree = ()
  is_masked: bool = False


def filled(
  options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the options with these defaults, which None stands for, too."""
  given = {name: x for name, x in options.items() if x is not None}
  return {**defaults, **given}


def field_defaults(cls: Any) -> dict[str, Any]:
  """Returns the defaults of a dataclass's options, None of those without."""
  return {
    field.name: None if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(cls)
    if field.init
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
  """The options that training, unlearning and all methods share.

  Attributes:
    num_epochs: Passes over the images, positive.
    batch_size: Images a step, and of each set where a step takes both (or all,
      where a set is smaller).
    optimizer: Any Optax optimiser, whose learning rate is the highest; None for
      the method's own. It is given the trained parameters alone: what
      `trainable` excludes is None in its tree.
    schedule: Of the learning rate, as for `optimizers.schedule_fn`;
      `"constant"` for an optimiser with a schedule of its own.
    batch_stats: `"update"`: BatchNorm normalises with the minibatch and moves
      its statistics; `"frozen"`: inference mode.
    augment_fn: Augmentation `(key, images) -> images`, on float images.
    num_parts: Gradient accumulation: parts of a minibatch that are computed one
      after the other, to save memory. Part `p` has the rows `p`, `p +
      num_parts`, and so on. The gradient is the same, but that BatchNorm
      normalises each part by itself.
    trainable: Collections of the variables (`"params"`, `"batch_stats"`), as
      trees of bool, or of bool arrays among the parameters: where False they
      stay as they are, whatever momentum or weight decay the optimiser has.
      None, and collections that are not named, for all.
    state: A state of an earlier run with the same arguments, from which to go
      on, within a pass too: its step is the position in the data. `variables`
      and the key of the steps are then taken from it.
    callback: Called after each pass with the state (to be copied or saved
      before it returns: the next step takes its memory) and the pass's record;
      its time does not count.
    step_callback: Called with the state every few steps, likewise.
    stop_fn: Called with the variables after each pass; where it says so, that
      was the last.
    mesh: Devices to cut each minibatch over; None for one.
    description: Name of the progress bar.
    show_progress: Whether to show progress bars.

  Raises:
    ValueError: If an option is out of its range.
  """

  num_epochs: int
  batch_size: int = 64
  optimizer: optax.GradientTransformation | None = None
  schedule: optimizers.Schedule = "constant"
  batch_stats: str = "update"
  augment_fn: augment.AugmentFn | None = None
  num_parts: int = 1
  trainable: Mapping[str, chex.ArrayTree] | None = None
  state: steps.TrainState | None = None
  callback: Callback | None = None
  step_callback: Callable[[steps.TrainState], None] | None = None
  stop_fn: Callable[[types.Variables], bool] | None = None
  mesh: jax.sharding.Mesh | None = None
  description: str = "unlearning"
  show_progress: bool = True

  def __post_init__(self) -> None:
    for name in ("num_epochs", "batch_size", "num_parts"):
      checks.integer(name, getattr(self, name), at_least=1)
    checks.one_of("batch_stats", self.batch_stats, BATCH_STATS)
    optimizers.check_schedule(self.schedule)

  @classmethod
  def of(
    cls,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] = types_lib.MappingProxyType({}),
    *,
    others: Sequence[str] = (),
  ) -> "Passes":
    """Reads a function's keyword arguments.

    Args:
      options: Those given; None stands for a default.
      defaults: The function's own values.
      others: Names of its other arguments, to tell a misspelt one.

    Returns:
      The options.

    Raises:
      TypeError: If there is no such option, with the nearest name.
      ValueError: If an option is out of its range.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for name in options:
      if name not in names:
        hint = checks.nearest(name, [*names, *others])
        raise TypeError(f"there is no argument {name!r}{hint}")
    return cls(**filled(options, defaults))

  def replace(self, **changes: Any) -> "Passes":
    """Returns these options with changes."""
    return dataclasses.replace(self, **changes)


class Report(NamedTuple):
  """What the steps of a phase reported.

  Attributes:
    losses: float32 `[S]`, the objective.
    figures: Those of the loss, `[S, B]` or `[S]`.
    plan: The minibatches.
  """

  losses: np.ndarray
  figures: dict[str, np.ndarray]
  plan: batches.Plan


def run(
  model: types.Model,
  variables: types.Variables,
  images: np.ndarray | streaming.Images,
  targets: np.ndarray,
  passes: Sequence[Sequence[Phase]],
  key: jax.Array,
  options: Passes,
  *,
  record_fn: Callable[[Report], dict[str, Any]] | None = None,
  first_epoch: int = 0,
  first_step: int = 0,
) -> tuple[steps.TrainState, History]:
  """Trains a copy of the variables, pass by pass.

  Args:
    model: The network.
    variables: Where to start; left as they are.
    images: uint8 `[N, H, W, C]`: an array goes onto the device as a whole,
      images on disk are read some minibatches at a time.
    targets: `[N, ...]`, whatever the losses expect.
    passes: The phases of each pass; a record and a callback follow each pass.
    key: One typed key, for augmentation and the network's own randomness.
    options: The shared ones, of which `optimizer` must be given.
    record_fn: Turns what a phase reported into the pass's record, whose lists
      are joined over phases; None for `by_set`.
    first_epoch: Passes before these, made by another call.
    first_step: Steps before these, likewise.

  Returns:
    The final state, and one record a pass: `epoch` from 1, what `record_fn`
    says, and `seconds`. Passes that `options.state` has behind it have none,
    and of a pass that was gone on with, the record counts from there.

  Raises:
    ValueError: If `options.trainable` is not a tree like the variables.
    FloatingPointError: If a loss or a variable is NaN or infinite.
  """
  assert options.optimizer is not None
  trainable, masks = read_trainable(options.trainable, variables)
  program = steps.Program(
    model=model,
    optimizer=options.optimizer,
    loss_fn=steps.mean_cross_entropy,
    trainable=trainable,
    augment_fn=options.augment_fn,
    batch_stats=options.batch_stats,
    num_parts=options.num_parts,
  )
  if options.state is None:
    state = steps.init_state(
      variables, options.optimizer, key, trainable=trainable, step=first_step
    )
  else:
    state = jax.tree.map(jnp.copy, options.state)  # The caller keeps theirs.
  lengths = [len(x.plan.rows) for phases in passes for x in phases]
  state, masks = parallel.replicate((state, masks), options.mesh)
  return run_passes(
    program,
    state,
    images,
    targets,
    passes,
    options,
    factors=optimizers.schedule_factors(options.schedule, sum(lengths)),
    masks=masks,
    record_fn=record_fn or by_set,
    first_epoch=first_epoch,
    first_step=first_step,
  )


def run_passes(
  program: steps.Program,
  state: steps.TrainState,
  images: np.ndarray | streaming.Images,
  targets: np.ndarray,
  passes: Sequence[Sequence[Phase]],
  options: Passes,
  *,
  factors: np.ndarray,
  masks: chex.ArrayTree | None = None,
  record_fn: Callable[[Report], dict[str, Any]],
  first_epoch: int = 0,
  first_step: int = 0,
  run_fn: RunFn = steps.compiled_run_steps,
) -> tuple[steps.TrainState, History]:
  """Goes on from a state, pass by pass; `run` without its preparation.

  An axis of models may stand behind the steps in plans, factors and reports,
  and in front in the state, with a `run_fn` that follows them.

  Args:
    program: What the steps are made of, but for the loss and `is_masked`.
    state: Where to start, on its devices; donated, and deleted.
    images: uint8 `[N, H, W, C]`, in memory or on disk.
    targets: `[N, ...]`, whatever the losses expect.
    passes: The phases of each pass.
    options: Callbacks, devices and progress; the rest is in `program`.
    factors: float32 `[S]`, of all steps of all passes.
    masks: Bool arrays like the trained parameters, or None.
    record_fn: Turns what a phase reported into the pass's record.
    first_epoch: Passes before these, made by another call.
    first_step: Steps before these, likewise.
    run_fn: The compiled program of the steps.

  Returns:
    The final state, and one record a pass.

  Raises:
    FloatingPointError: If a loss or a variable is NaN or infinite.
  """
  place = int(np.max(state.step)) - first_step
  todo = _remaining(passes, place)
  history: History = []
  phases = [phase for phases in todo for phase in phases]
  rows = (rows.ravel() for phase in phases for rows in phase.plan.rows)
  with (
    batches.open_pool(images, targets, rows, options.mesh) as pool,
    progress.bar(
      options.description,
      sum(len(phase.plan.rows) for phase in phases),
      unit="step",
      is_shown=options.show_progress,
    ) as bar,
  ):
    for epoch, phases in enumerate(todo, first_epoch + 1):
      if not phases:
        continue
      start = time.perf_counter()
      record: dict[str, Any] = {"epoch": epoch}
      for phase in phases:
        num_steps = len(phase.plan.rows)
        state, report = run_phase(
          program,
          state,
          pool,
          phase,
          factors=factors[place : place + num_steps],
          masks=masks,
          mesh=options.mesh,
          bar=bar,
          step_callback=options.step_callback,
          run_fn=run_fn,
        )
        place += num_steps
        for name, value in record_fn(report).items():
          is_joined = isinstance(value, list) and name in record
          record[name] = record[name] + value if is_joined else value
      record["seconds"] = time.perf_counter() - start
      history.append(record)
      if options.callback is not None:
        options.callback(state, record)
      if options.stop_fn is not None and options.stop_fn(state.variables):
        break
  steps.check_variables(state)
  return state, history


def _remaining(
  passes: Sequence[Sequence[Phase]], num_done: int
) -> list[list[Phase]]:
  """Returns what is left of the phases of each pass after so many steps."""
  todo = []
  for phases in passes:
    left = []
    for phase in phases:
      num_steps = len(phase.plan.rows)
      if num_done < num_steps:
        plan = batches.Plan(*(x[max(num_done, 0) :] for x in phase.plan))
        left.append(phase._replace(plan=plan))
      num_done = max(num_done - num_steps, 0)
    todo.append(left)
  return todo


def read_trainable(
  trainable: Mapping[str, chex.ArrayTree] | None, variables: types.Variables
) -> tuple[tuple[bool, ...] | None, chex.ArrayTree | None]:
  """Separates what is known of the program from masks within arrays."""
  if trainable is None:
    return None, None
  variables = steps.plain_variables(variables)
  marks = {
    name: trainable.get(name, jax.tree.map(lambda _: True, tree))
    for name, tree in variables.items()
  }
  structures: list[Any] = [jax.tree.structure(x) for x in (marks, variables)]
  if set(trainable) - set(variables) or structures[0] != structures[1]:
    raise ValueError(
      "trainable must be trees like the variables' collections"
      f" {', '.join(variables)}, got other ones in {', '.join(trainable)}"
    )
  flags = tuple(
    bool(x) if np.ndim(x) == 0 else True for x in jax.tree.leaves(marks)
  )
  if all(np.ndim(x) == 0 for x in jax.tree.leaves(marks["params"])):
    return flags, None
  masks = jax.tree.map(
    lambda mark, x: jnp.broadcast_to(jnp.asarray(mark, bool), jnp.shape(x)),
    marks["params"],
    variables["params"],
  )
  if all(flags):
    return None, masks
  return flags, steps.partition({**variables, "params": masks}, flags, True)[
    "params"
  ]


def run_phase(
  program: steps.Program,
  state: steps.TrainState,
  pool: batches.Pool,
  phase: Phase,
  *,
  factors: np.ndarray | None = None,
  masks: chex.ArrayTree | None = None,
  mesh: jax.sharding.Mesh | None = None,
  bar: progress.Bar | None = None,
  step_callback: Callable[[steps.TrainState], None] | None = None,
  run_fn: RunFn = steps.compiled_run_steps,
) -> tuple[steps.TrainState, Report]:
  """Runs the minibatches of a phase through the compiled `run_steps`.

  Args:
    program: What the steps are made of, but for the loss and `is_masked`.
    state: Where to start; donated, and deleted.
    pool: Images and targets, of `batches.open_pool`.
    phase: The loss's context and the minibatches.
    factors: float32 `[S]` of the learning rate, as for `run_steps`.
    masks: Bool arrays like the trained parameters, or None.
    mesh: Devices to cut each minibatch over; None for one.
    bar: Moved by each step.
    step_callback: Called with the state after each call of the program, which
      takes up to 32 steps.
    run_fn: The compiled program of the steps.

  Returns:
    The new state, and what the steps reported.

  Raises:
    FloatingPointError: If the loss is NaN or infinite, with the step.
  """
  num_steps, *models, batch_size = phase.plan.rows.shape
  # Steps of padding are skipped: one program for passes of any length.
  size = pool.max_steps
  num_calls = -(-num_steps // size)
  # Minibatches are cut over the devices, or the models are.
  unit = program.num_parts * (1 if models else parallel.size(mesh))
  ahead = (0, num_calls * size - num_steps)
  padding = (ahead, *[(0, 0)] * len(models), (0, -batch_size % unit))
  is_masked = phase.is_masked or bool(
    padding[-1][1] or np.any(phase.plan.weights == 0)
  )
  program = dataclasses.replace(
    program, is_masked=is_masked, loss_fn=phase.loss_fn
  )
  # Padding repeats images, for the sake of networks without a mask.
  rows = np.pad(phase.plan.rows, padding, mode="wrap")
  is_forget = np.pad(phase.plan.is_forget, padding, mode="wrap")
  weights = np.pad(phase.plan.weights, padding)
  if factors is None:
    factors = np.ones(num_steps, np.float32)
  factors = np.pad(factors, padding[: factors.ndim])
  context = parallel.replicate(phase.context, mesh)
  reports = []
  for call in range(num_calls):
    part = slice(call * size, (call + 1) * size)
    num_real = min(size, num_steps - call * size)
    images, targets, places = pool.fetch(rows[part], num_real)
    minibatches = steps.Steps(
      rows=jnp.asarray(places),
      weights=jnp.asarray(weights[part]),
      is_forget=jnp.asarray(is_forget[part]),
    )
    state, reported = run_fn(
      program,
      state,
      images,
      targets,
      parallel.shard(minibatches, mesh, axis=1),
      factors=jnp.asarray(factors[part]),
      context=context,
      masks=masks,
    )
    reported = _real(reported, num_real)
    check_finite(np.asarray(reported.loss), int(np.max(state.step)))
    reports.append(reported)
    if bar is not None:
      bar.advance(num_real, **_shown(reported, weights[part][:num_real]))
    if step_callback is not None:
      step_callback(state)
  joined = jax.tree.map(lambda *x: np.concatenate(x), *reports)
  figures = {
    # Those of a row have the rows of padding behind.
    name: x[..., :batch_size] if x.ndim == len(padding) else x
    for name, x in joined.figures.items()
  }
  return state, Report(joined.loss, figures, phase.plan)


def _real(reported: steps.Reported, num_real: int) -> steps.Reported:
  """Brings what the steps reported to the host, without those of padding."""
  return jax.tree.map(lambda x: np.asarray(x)[:num_real], reported)


def _shown(reported: steps.Reported, weights: np.ndarray) -> dict[str, float]:
  """What the progress bar shows: the objective, and accuracy if it is known."""
  shown = {"loss": float(np.mean(reported.loss))}
  if "accuracy" in reported.figures:
    is_correct = np.asarray(reported.figures["accuracy"])
    shown["accuracy"] = float(is_correct[weights > 0].mean())
  return shown


def by_set(report: Report) -> dict[str, Any]:
  """Means of the figures over the forget and over the retain images.

  Returns:
    `forget_<name>` and `retain_<name>` of the sets that were used, `<name>` of
    figures that are one a step, and `step_losses`, the objective, one a step.
  """
  record: dict[str, Any] = {"step_losses": _rounded(report.losses)}
  is_real = report.plan.weights > 0
  for name, values in report.figures.items():
    if values.ndim == 1:
      record[name] = float(values.mean())
  for which, is_part in (
    ("forget", is_real & report.plan.is_forget),
    ("retain", is_real & ~report.plan.is_forget),
  ):
    for name, values in report.figures.items():
      if values.ndim == 2 and is_part.any():
        record[f"{which}_{name}"] = float(values[is_part].mean())
  return record


def summarise(report: Report, is_counted: np.ndarray) -> dict[str, Any]:
  """Means of loss and accuracy over rows `[S, B]`, and each step's loss."""
  losses = report.figures["loss"]
  counts = np.maximum(is_counted.sum(1), 1)
  return {
    "loss": float(losses[is_counted].mean()),
    "accuracy": float(report.figures["accuracy"][is_counted].mean()),
    "step_losses": _rounded((losses * is_counted).sum(1) / counts),
  }


def _rounded(losses: np.ndarray) -> list[float]:
  return [round(float(x), 5) for x in losses]


def check_finite(losses: np.ndarray, last_step: int) -> None:
  """Raises FloatingPointError, with the step, where a loss is not finite.

  Args:
    losses: float `[S]`, or `[S, M]` of several models.
    last_step: Number of the last step, from 1.
  """
  is_bad = ~np.isfinite(losses)
  if is_bad.any():
    place, *model = np.argwhere(is_bad)[0].tolist()
    step = last_step - len(losses) + place + 1
    whose = f" of model {model[0]}" if model else ""
    raise FloatingPointError(
      f"the loss{whose} is not finite at step {step}: lower the learning rate"
    )
