"""What the methods share: passes over a pool of images, as compiled scans.

A method gives a loss and says which images make up each minibatch; the scan,
the padding, frozen layers and masked weights, the devices, the progress bar,
the history and the check of the loss are here. Loss functions belong to the
compiled program: they are functions of a module, not fresh closures.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import (
  checks,
  parallel,
  progress,
  streaming,
  training,
  types,
  unlearning,
)
from psg_jax.baselines import _layers

Callback: TypeAlias = Callable[[training.TrainState, dict[str, Any]], None]
# Sum over the rows of a minibatch, and how many were added.
Figures: TypeAlias = dict[str, tuple[jax.Array, jax.Array]]


@types.pytree
class Output:
  """What a method returns.

  Attributes:
    variables: The unlearned model's, new arrays.
    history: One record a pass: `epoch` from 1, `seconds` (without callbacks),
      and the method's own figures.
  """

  variables: types.Variables
  history: training.History


@types.pytree
class Batch:
  """A minibatch, as a loss sees it.

  Attributes:
    images: float32 `[B, H, W, C]` in [0, 1].
    targets: The pool's targets of these rows, `[B, ...]`.
    weights: float32 `[B]`, each row's part of the mean over its set, 0 for
      padding.
    is_forget: bool `[B]`, whether the row belongs to the forget set.
  """

  images: jax.Array
  targets: jax.Array
  weights: jax.Array
  is_forget: jax.Array


ApplyFn: TypeAlias = Callable[
  [types.Variables, Batch], tuple[jax.Array, types.Variables]
]


class LossFn(Protocol):
  """The objective of a step."""

  def __call__(
    self,
    apply_fn: ApplyFn,
    variables: types.Variables,
    batch: Batch,
    context: chex.ArrayTree,
  ) -> tuple[jax.Array, tuple[types.Variables, Figures]]:
    """Returns the loss `[]`, the variables after `apply_fn`, and figures."""
    ...


class Phase(NamedTuple):
  """Minibatches that are taken one after the other with one loss.

  Attributes:
    loss_fn: The objective.
    rows: int32 `[S, B]`, places in the pool.
    weights: float32 `[S, B]`, as in `Batch`.
    is_forget: bool `[S, B]`, as in `Batch`.
    context: Arrays that the loss is given.
  """

  loss_fn: LossFn
  rows: np.ndarray
  weights: np.ndarray
  is_forget: np.ndarray
  context: chex.ArrayTree = ()


@types.pytree
class _Steps:
  """A `Phase` on the device."""

  rows: jax.Array
  weights: jax.Array
  is_forget: jax.Array


def check(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  batch_size: int,
  num_epochs: int = 1,
  batch_stats: str = "update",
  needs_retain: bool = True,
) -> None:
  """Raises ValueError for arguments that no method can work with."""
  unlearning.check_split(split, float(needs_retain))
  for part in split:
    if len(part):
      training.check_classes(model, variables, part)
  checks.key(key)
  checks.integer("batch_size", batch_size, at_least=1)
  checks.integer("num_epochs", num_epochs, at_least=1)
  checks.one_of("batch_stats", batch_stats, unlearning.BATCH_STATS)


@functools.lru_cache
def adam(learning_rate: float) -> optax.GradientTransformation:
  """Builds Adam; the same rate gives the same object, for compiled programs."""
  checks.number("learning_rate", learning_rate, above=0)
  return optax.adam(learning_rate)


def run(
  model: types.Model,
  variables: types.Variables,
  images: np.ndarray | streaming.Images,
  targets: np.ndarray,
  passes: Sequence[Sequence[Phase]],
  key: jax.Array,
  *,
  optimizer: optax.GradientTransformation,
  layers: tuple[str, ...] | None = None,
  mask: chex.ArrayTree | None = None,
  batch_stats: str = "update",
  callback: Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  description: str = "unlearning",
  first_epoch: int = 1,
  show_progress: bool = True,
) -> Output:
  """Trains a copy of the variables, pass by pass.

  Args:
    model: The network.
    variables: Where to start; left as they are.
    images: uint8 `[N, H, W, C]`, in memory or on disk.
    targets: `[N, ...]`, whatever the losses expect.
    passes: The phases of each pass; a record and a callback follow each pass.
    key: One typed key, for the network's own randomness.
    optimizer: Any Optax optimiser, whose state lasts over all passes.
    layers: Prefixes of the paths of the parameters to train and of the
      statistics to move; all others stay as they are. None for all.
    mask: A tree of bool like the parameters: where False they stay as they are,
      whatever momentum or weight decay the optimiser has. None for all.
    batch_stats: `"update"` or `"frozen"`, as for `training.run_steps`.
    callback: Called after each pass with the state (to be copied or saved
      before it returns) and the pass's record.
    mesh: Devices to cut each minibatch over; None for one.
    description: Name of the progress bar.
    first_epoch: Number of the first record.
    show_progress: Whether to show the bar.

  Returns:
    The trained variables and the history: the means of the figures over the
    images of the pass as it went, `step_losses`, the objective, one a step,
    and `seconds`, without the callback.

  Raises:
    FloatingPointError: If a loss is NaN or infinite, with the step.
  """
  state = training.init_state(variables, optimizer, key)
  if layers is not None:
    trained, _ = _layers.cut(state.variables["params"], layers)
    state = state.replace(opt_state=optimizer.init(trained))  # type: ignore[attr-defined]
  state = parallel.replicate(state, mesh)
  options = {"layers": layers, "batch_stats": batch_stats}
  phases = [phase for phases in passes for phase in phases]
  history: training.History = []
  with (
    training.open_pool(
      images, targets, (rows for x in phases for rows in x.rows), mesh
    ) as pool,
    progress.bar(
      description,
      sum(len(x.rows) for x in phases),
      unit="step",
      is_shown=show_progress,
    ) as bar,
  ):
    mask = parallel.replicate(mask, mesh)
    for epoch, phases_of_pass in enumerate(passes, first_epoch):
      start = time.perf_counter()
      record: dict[str, Any] = {"epoch": epoch, "step_losses": []}
      for phase in phases_of_pass:
        state, losses, figures = _run_phase(
          model, optimizer, state, pool, phase, mask, mesh, bar, options
        )
        record["step_losses"] += [round(float(x), 5) for x in losses]
        record |= figures
      record["seconds"] = time.perf_counter() - start
      history.append(record)
      if callback is not None:
        callback(state, record)
  training.check_variables(state)
  return Output(variables=state.variables, history=history)


def _run_phase(
  model: types.Model,
  optimizer: optax.GradientTransformation,
  state: training.TrainState,
  pool: training.Pool,
  phase: Phase,
  mask: chex.ArrayTree | None,
  mesh: jax.sharding.Mesh | None,
  bar: progress.Bar,
  options: dict[str, Any],
) -> tuple[training.TrainState, np.ndarray, dict[str, float]]:
  """Runs a phase in equal calls of one program."""
  context = parallel.replicate(phase.context, mesh)
  is_masked = phase.rows.shape[1] % parallel.size(mesh) > 0 or bool(
    np.any(phase.weights == 0)
  )
  losses, sums = [], []
  for rows, weights, is_forget, num_real in _calls(phase, pool, mesh):
    images, targets, places = pool.fetch(rows, num_real)
    steps = _Steps(
      rows=jnp.asarray(places),
      weights=jnp.asarray(weights),
      is_forget=jnp.asarray(is_forget),
    )
    state, (loss, figures) = _jitted_run_steps(
      model,
      optimizer,
      phase.loss_fn,
      state,
      images,
      targets,
      parallel.shard(steps, mesh, axis=1),
      context,
      mask,
      is_masked=is_masked,
      **options,
    )
    losses.append(np.asarray(loss))
    training.check_finite(
      losses[-1][:, None], weights.max(1, keepdims=True), int(state.step)
    )
    sums.append(jax.tree.map(lambda x: np.asarray(x).sum(0), figures))
    bar.advance(num_real, loss=float(losses[-1][:num_real].mean()))
  totals = jax.tree.map(lambda *values: np.sum(values), *sums)
  return (
    state,
    np.concatenate(losses)[: len(phase.rows)],
    {
      name: float(total / count)
      for name, (total, count) in totals.items()
      if count > 0
    },
  )


def _calls(
  phase: Phase, pool: training.Pool, mesh: jax.sharding.Mesh | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
  """Cuts a phase into calls of the same shape, with the steps to be taken."""
  num_steps, batch_size = phase.rows.shape
  num_calls = -(-num_steps // pool.max_steps)
  steps_per_call = -(-num_steps // num_calls)
  padding = (
    (0, num_calls * steps_per_call - num_steps),
    (0, -batch_size % parallel.size(mesh)),
  )
  # Padding repeats images, for the sake of networks without a mask.
  rows = np.pad(phase.rows, padding, mode="wrap")
  is_forget = np.pad(phase.is_forget, padding, mode="wrap")
  weights = np.pad(phase.weights, padding)
  for call in range(num_calls):
    part = slice(call * steps_per_call, (call + 1) * steps_per_call)
    num_real = min(steps_per_call, num_steps - call * steps_per_call)
    yield rows[part], weights[part], is_forget[part], num_real


def _run_steps(
  model: types.Model,
  optimizer: optax.GradientTransformation,
  loss_fn: LossFn,
  state: training.TrainState,
  images: jax.Array,
  targets: jax.Array,
  steps: _Steps,
  context: chex.ArrayTree,
  mask: chex.ArrayTree | None,
  *,
  layers: tuple[str, ...] | None,
  batch_stats: str,
  is_masked: bool,
) -> tuple[training.TrainState, tuple[jax.Array, Figures]]:
  """Takes one optimiser step a minibatch, as a scan; pure."""

  def take(state: training.TrainState, step: _Steps) -> Any:
    key = jax.random.fold_in(state.key, state.step)
    old = {k: v for k, v in state.variables.items() if k != "params"}
    params = state.variables["params"]
    trained, frozen = _layers.cut(params, layers)
    batch = Batch(
      images=training.to_float(images[step.rows]),
      targets=targets[step.rows],
      weights=step.weights,
      is_forget=step.is_forget,
    )

    def apply_fn(variables: types.Variables, batch: Batch) -> Any:
      if batch_stats == "frozen":
        return model.apply(variables, batch.images), variables
      is_real = batch.weights > 0 if is_masked else None
      return training.apply_train(model, variables, batch.images, key, is_real)

    def objective(trained: chex.ArrayTree) -> Any:
      variables = {
        **old,
        "params": _layers.join(params, trained, frozen, layers),
      }
      return loss_fn(apply_fn, variables, batch, context)

    (loss, (updated, figures)), gradients = jax.value_and_grad(
      objective, has_aux=True
    )(trained)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    moved = optax.apply_updates(trained, updates)
    if mask is not None:
      # A choice, not a product, so that what is masked keeps every bit.
      moved = jax.tree.map(jnp.where, mask, moved, trained)
    others = {
      k: _layers.take(updated[k], old[k], layers) for k in old if k in updated
    }
    others = training.of_types(training.plain_variables({**old, **others}), old)
    state = training.TrainState(
      variables={
        **others,
        "params": _layers.join(params, moved, frozen, layers),
      },
      opt_state=training.of_types(opt_state, state.opt_state),
      key=state.key,
      step=state.step + 1,
    )
    return state, (loss, figures)

  def skip(state: training.TrainState, step: _Steps) -> Any:
    shapes = jax.eval_shape(take, state, step)[1]
    return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def step(state: training.TrainState, step: _Steps) -> Any:
    return jax.lax.cond(jnp.any(step.weights > 0), take, skip, state, step)

  return jax.lax.scan(step, state, steps)


_jitted_run_steps = jax.jit(
  _run_steps,
  static_argnums=(0, 1, 2),
  static_argnames=("layers", "batch_stats", "is_masked"),
  donate_argnames="state",
)


def by_set(batch: Batch, **values: jax.Array) -> Figures:
  """Sums values `[B]` over the forget and over the retain images, as figures.

  Args:
    batch: The minibatch.
    **values: By name; the figures are `forget_<name>` and `retain_<name>`.

  Returns:
    Sums and counts.
  """
  figures = {}
  is_real = batch.weights > 0
  for which, is_part in (
    ("forget", is_real & batch.is_forget),
    ("retain", is_real & ~batch.is_forget),
  ):
    for name, value in values.items():
      total = jnp.where(is_part, value, 0).sum()
      figures[f"{which}_{name}"] = (total, is_part.sum())
  return figures


def mean_cross_entropy(
  apply_fn: ApplyFn,
  variables: types.Variables,
  batch: Batch,
  context: chex.ArrayTree,
) -> tuple[jax.Array, tuple[types.Variables, Figures]]:
  """The plain loss, `Σ_i weight_i CE(f(x_i), target_i)`."""
  del context
  logits, variables = apply_fn(variables, batch)
  losses = training.cross_entropy(logits, batch.targets)
  is_correct = is_predicted(logits, batch.targets)
  return jnp.sum(losses * batch.weights), (
    variables,
    by_set(batch, loss=losses, accuracy=is_correct),
  )


def is_predicted(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Whether `[B]` the target's (largest) class is predicted."""
  classes = targets if targets.ndim == 1 else jnp.argmax(targets, -1)
  return jnp.argmax(logits, -1) == classes


def fresh_variables(
  model: types.Model, split: types.Split, key: jax.Array
) -> types.Variables:
  """Draws a new initialisation for the images of the split."""
  image = jnp.zeros((1, *split.forget.images.shape[1:]), jnp.float32)
  return dict(model.init(key, image))


def finish(
  variables: types.Variables,
  key: jax.Array,
  record: dict[str, Any],
  callback: Callback | None,
) -> Output:
  """Ends a method that takes no step: one record, one callback."""
  state = training.TrainState(
    variables=variables, opt_state=(), key=key, step=jnp.int32(0)
  )
  training.check_variables(state)
  if callback is not None:
    callback(state, record)
  return Output(variables=variables, history=[record])
