"""Training as pure functions: an epoch is one compiled scan.

`run_steps` is the engine of training and of unlearning alike: minibatches are
rows of a pool of images that lies on the device as uint8, each row with a
target and a weight in the loss. A row of weight 0 is padding.
"""

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import augment, checks, parallel, progress, streaming, types

# An epoch is cut into calls of one program, so that the bar moves and the
# program can be interrupted.
_MAX_STEPS_PER_CALL = 32
# Images from disk that wait on the device for one call, and what a pool may
# take to be padded.
_STREAM_BYTES = 2**26

History: TypeAlias = list[dict[str, Any]]
Schedule: TypeAlias = str | optax.Schedule
"""A name in `SCHEDULES`, or a function of the step that gives the factor."""

SCHEDULES = ("one_cycle", "constant")


@types.pytree
class TrainState:
  """All that the next step depends on, besides the data.

  Attributes:
    variables: The network's variables.
    opt_state: The optimiser's state.
    key: Typed key of the run; never advanced, folded with the step.
    step: int32 `[]`, steps taken.
  """

  variables: types.Variables
  opt_state: chex.ArrayTree
  key: jax.Array
  step: jax.Array


@types.pytree
class Batches:
  """Minibatches as rows of the pool of images.

  Attributes:
    rows: int32 `[S, B]`.
    weights: float32 `[S, B]`, each row's weight in the loss, 0 for padding. A
      step whose weights are all 0 is skipped.
  """

  rows: jax.Array
  weights: jax.Array


@types.pytree
class StepMetrics:
  """What the steps report, per row of the minibatch and before the update.

  Attributes:
    loss: float32 `[S, B]`, cross-entropy with the row's target, unweighted.
    is_correct: bool `[S, B]`, whether the target's largest class is predicted.
  """

  loss: jax.Array
  is_correct: jax.Array


@functools.lru_cache
def sgd(
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
  """Builds SGD as in PyTorch: weight decay is part of the gradient.

  The same arguments give the same object, so that programs compiled with it
  are found again.

  Args:
    learning_rate: Positive, or an Optax schedule over steps.
    momentum: In [0, 1).
    weight_decay: 0 or more, applied to all parameters.

  Returns:
    The optimiser.

  Raises:
    ValueError: If an argument is out of its range.
  """
  if not callable(learning_rate):
    checks.number("learning_rate", learning_rate, above=0)
  checks.number("momentum", momentum, at_least=0, below=1)
  checks.number("weight_decay", weight_decay, at_least=0)
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(learning_rate, momentum=momentum or None),
  )


def schedule_fn(schedule: Schedule, num_steps: int) -> optax.Schedule:
  """Returns the factor of the learning rate at each step of a run.

  A constant rate stops wherever it happens to be: two runs of one recipe end
  far from each other. One cycle ends at rest.

  Args:
    schedule: `"one_cycle"`: from 1/25 up to 1 in the first 30 % of the steps,
      then down to almost 0 as a cosine; `"constant"`: 1; a function: itself.
    num_steps: All steps of the run, positive.

  Returns:
    The factor, usually in [0, 1], as a function of the step from 0.

  Raises:
    ValueError: If there is no schedule of this name.

  References:
    Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks
    Using Large Learning Rates, 2017.
  """
  check_schedule(schedule)
  if callable(schedule):
    return schedule
  if schedule == "constant":
    return optax.constant_schedule(1.0)
  return optax.cosine_onecycle_schedule(num_steps, 1.0)


def check_schedule(schedule: Schedule) -> None:
  """Raises ValueError unless it is a function or a name in `SCHEDULES`."""
  if not callable(schedule):
    checks.one_of("schedule", schedule, SCHEDULES)


def default_optimizer(schedule: Schedule) -> optax.GradientTransformation:
  """Returns what `fit` trains with: the paper's rate where it is constant."""
  return sgd(0.01 if schedule == "constant" else 0.05)


def schedule_factors(schedule: Schedule, num_steps: int) -> np.ndarray:
  """Returns `schedule_fn` at all steps of a run, float32 `[num_steps]`."""
  if callable(schedule):
    return _factors(schedule, num_steps)
  return _named_factors(schedule, num_steps)


def _factors(schedule: Schedule, num_steps: int) -> np.ndarray:
  factors = jax.vmap(schedule_fn(schedule, num_steps))(jnp.arange(num_steps))
  return np.asarray(factors, np.float32)


# Half a second each, and references of one recipe have the same.
_named_factors = functools.lru_cache(maxsize=16)(_factors)


def init_state(
  variables: types.Variables,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
) -> TrainState:
  """Starts a state from a copy of the variables, which are left alone.

  The copy is of plain dictionaries, whatever mappings the network had.
  """
  checks.key(key)
  checks.variables(variables)
  variables = jax.tree.map(
    lambda x: jnp.array(x, copy=True), plain_variables(variables)
  )
  return TrainState(
    variables=variables,
    opt_state=optimizer.init(variables["params"]),
    # The state is donated to each step, and the caller keeps the key.
    key=jax.random.wrap_key_data(
      jnp.array(jax.random.key_data(key), copy=True),
      impl=jax.random.key_impl(key),
    ),
    step=jnp.int32(0),
  )


def plain_variables(variables: Any) -> Any:
  """Returns a tree whose mappings (such as Flax's FrozenDict) are dicts."""
  if not isinstance(variables, Mapping):
    return variables
  return {key: plain_variables(value) for key, value in variables.items()}


def of_types(tree: Any, like: Any) -> Any:
  """Returns a tree with the dtypes of another of its structure.

  What a step makes of its state must be of the state's types, which 64-bit
  types, or mixed ones, would change.
  """
  return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), tree, like)


def to_float(images: jax.Array) -> jax.Array:
  """Scales uint8 images to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255.0


def run_steps(
  model: types.Model,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  images: jax.Array,
  targets: jax.Array,
  batches: Batches,
  *,
  factors: jax.Array | None = None,
  augment_fn: augment.AugmentFn | None = None,
  batch_stats: str = "update",
  is_masked: bool = True,
  num_parts: int = 1,
) -> tuple[TrainState, StepMetrics]:
  """Takes one optimiser step a minibatch, as a scan; pure.

      loss = Σ_i weight_i CE(f_w(x_i), target_i)

  Args:
    model: The network.
    optimizer: Any Optax optimiser.
    state: Where to start.
    images: uint8 `[N, H, W, C]`, the pool.
    targets: int `[N]` classes, or float `[N, K]` probabilities.
    batches: The minibatches.
    factors: float32 `[S]`, what each step's update is multiplied by: a learning
      rate schedule as data, so that runs of any length share one program. None
      for 1.
    augment_fn: Augmentation `(key, images) -> images`.
    batch_stats: `"update"`: BatchNorm normalises with the minibatch and moves
      its statistics; `"frozen"`: inference mode.
    is_masked: Whether minibatches may hold padding among their rows.
    num_parts: Gradient accumulation: parts of a minibatch that are computed one
      after the other, to save memory; divides `B`. Part `p` has the rows `p`,
      `p + num_parts`, and so on. The gradient is the same, but that BatchNorm
      normalises each part by itself.

  Returns:
    The new state and what the steps report.
  """

  def take(
    state: TrainState, batch: Batches, factor: jax.Array | None
  ) -> tuple[TrainState, StepMetrics]:
    key = jax.random.fold_in(state.key, state.step)

    def loss_fn(
      params: chex.ArrayTree,
      others: types.Variables,
      part: Batches,
      key: jax.Array,
    ) -> tuple[jax.Array, tuple[types.Variables, StepMetrics]]:
      augment_key, apply_key = jax.random.split(key)
      pixels = to_float(images[part.rows])
      if augment_fn is not None:
        pixels = augment_fn(augment_key, pixels)
      target = targets[part.rows]
      variables: types.Variables = {**others, "params": params}
      if batch_stats == "frozen":
        logits = model.apply(variables, pixels)
      else:
        mask = part.weights > 0 if is_masked else None
        logits, variables = apply_train(
          model, variables, pixels, apply_key, mask
        )
      losses = cross_entropy(logits, target).astype(jnp.float32)
      classes = target if target.ndim == 1 else jnp.argmax(target, -1)
      is_correct = jnp.argmax(logits, -1) == classes
      moved = plain_variables(
        {k: variables.get(k, v) for k, v in others.items()}
      )
      others = of_types(moved, others)
      reported = StepMetrics(loss=losses, is_correct=is_correct)
      return jnp.sum(losses * part.weights), (others, reported)

    params = state.variables["params"]
    others: types.Variables = {
      k: v for k, v in state.variables.items() if k != "params"
    }
    gradient_fn = jax.grad(loss_fn, has_aux=True)
    if num_parts == 1:
      gradients, (others, reported) = gradient_fn(params, others, batch, key)
    else:
      gradients, others, reported = _accumulate(
        gradient_fn, params, others, batch, key, num_parts
      )
    updates, opt_state = optimizer.update(gradients, state.opt_state, params)
    if factor is not None:
      updates = jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)
    state = TrainState(
      variables={**others, "params": optax.apply_updates(params, updates)},
      opt_state=of_types(opt_state, state.opt_state),
      key=state.key,
      step=state.step + 1,
    )
    return state, reported

  def skip(
    state: TrainState, batch: Batches, factor: jax.Array | None
  ) -> tuple[TrainState, StepMetrics]:
    del factor
    losses = jnp.zeros_like(batch.weights)
    return state, StepMetrics(loss=losses, is_correct=losses > 0)

  def step(
    state: TrainState, inputs: tuple[Batches, jax.Array | None]
  ) -> tuple[TrainState, StepMetrics]:
    is_real = jnp.any(inputs[0].weights > 0)
    return jax.lax.cond(is_real, take, skip, state, *inputs)

  return jax.lax.scan(step, state, (batches, factors))


_jitted_run_steps = jax.jit(
  run_steps,
  static_argnames=(
    "model",
    "optimizer",
    "augment_fn",
    "batch_stats",
    "is_masked",
    "num_parts",
  ),
  donate_argnames="state",
)


def _accumulate(
  gradient_fn: Callable[..., Any],
  params: chex.ArrayTree,
  others: types.Variables,
  batch: Batches,
  key: jax.Array,
  num_parts: int,
) -> tuple[chex.ArrayTree, types.Variables, StepMetrics]:
  """Adds up the gradients of the parts of a minibatch."""

  def add(carry: Any, inputs: tuple[Batches, jax.Array]) -> tuple[Any, Any]:
    total, others = carry
    part, index = inputs
    gradients, (others, reported) = gradient_fn(
      params, others, part, jax.random.fold_in(key, index)
    )
    return (jax.tree.map(jnp.add, total, gradients), others), reported

  # Strided, so that forget and retain images, which lie side by side, are in
  # every part.
  parts = jax.tree.map(lambda x: x.reshape(-1, num_parts).T, batch)
  (gradients, others), reported = jax.lax.scan(
    add,
    (jax.tree.map(jnp.zeros_like, params), others),
    (parts, jnp.arange(num_parts)),
  )
  return gradients, others, jax.tree.map(lambda x: x.T.reshape(-1), reported)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy per row, `-Σ_k target_k log softmax(logits)_k`.

  Args:
    logits: float `[B, K]`.
    targets: int `[B]` classes or float `[B, K]` probabilities.

  Returns:
    float `[B]`, in nats.
  """
  if targets.ndim == 1:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return optax.softmax_cross_entropy(logits, targets)


def apply_train(
  model: types.Model,
  variables: types.Variables,
  images: jax.Array,
  key: jax.Array,
  mask: jax.Array | None,
) -> tuple[jax.Array, types.Variables]:
  """Passes the mask on to networks that take one.

  For the others padding rows are ordinary images in the statistics, which is
  why batches are padded with images and not with zeros.
  """
  if mask is None or not _takes_mask(model.apply_train):
    return model.apply_train(variables, images, key)
  return model.apply_train(variables, images, key, mask)


@functools.lru_cache
def _takes_mask(apply_train: Callable[..., Any]) -> bool:
  return "mask" in inspect.signature(apply_train).parameters


def shuffled_rows(
  key: jax.Array, num_rows: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Shuffles rows into minibatches; the last is filled up from the first.

  Args:
    key: One typed key.
    num_rows: How many rows, positive.
    batch_size: Rows a minibatch `B`.

  Returns:
    int32 rows `[S, B]` and bool `[S, B]`, False where a row is padding.
  """
  order = np.asarray(jax.random.permutation(key, num_rows), np.int32)
  num_steps = -(-num_rows // batch_size)
  rows = np.resize(order, num_steps * batch_size)
  is_real = np.arange(rows.size) < num_rows
  shape = (num_steps, batch_size)
  return rows.reshape(shape), is_real.reshape(shape)


def epoch_batches(
  key: jax.Array, num_rows: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Shuffles an epoch: rows and weights `[S, B]` of minibatch means."""
  rows, is_real = shuffled_rows(key, num_rows, batch_size)
  weights = is_real / is_real.sum(1, keepdims=True)
  return rows, weights.astype(np.float32)


class Pool(Protocol):
  """Where the minibatches of an epoch get their images and targets from."""

  @property
  def max_steps(self) -> int:
    """How many minibatches to fetch at most at a time."""
    ...

  def fetch(
    self, rows: np.ndarray, num_real: int
  ) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Returns images, targets and the places of `rows` `[S, B]` in them.

    Only the first `num_real` steps are asked for; those behind are padding.
    """
    ...


class _Resident(NamedTuple):
  """All images on the device."""

  images: jax.Array
  targets: jax.Array
  max_steps: int

  def fetch(
    self, rows: np.ndarray, num_real: int
  ) -> tuple[jax.Array, jax.Array, np.ndarray]:
    del num_real
    return self.images, self.targets, rows


class _Streamed:
  """Images from disk, some minibatches at a time, in the order of a plan."""

  def __init__(
    self,
    images: streaming.Images,
    targets: np.ndarray,
    plan: Sequence[np.ndarray],
    mesh: jax.sharding.Mesh | None,
  ) -> None:
    self._shape, self._targets, self._mesh = images.shape[1:], targets, mesh
    self._batches = streaming.batches(images, plan)
    size = max((len(rows) for rows in plan), default=1)
    num_bytes = size * math.prod(self._shape)
    self.max_steps = min(
      _MAX_STEPS_PER_CALL, max(1, _STREAM_BYTES // num_bytes)
    )

  def fetch(
    self, rows: np.ndarray, num_real: int
  ) -> tuple[jax.Array, jax.Array, np.ndarray]:
    num_steps, batch_size = rows.shape
    # As many places as the steps could need: one program for all calls.
    pool = np.zeros((num_steps, batch_size, *self._shape), np.uint8)
    places = np.arange(rows.size, dtype=np.int32).reshape(rows.shape)
    for step in range(num_real):
      batch = next(self._batches)
      pool[step, : len(batch)] = batch
      # Devices that the batch does not divide get its first rows again.
      places[step] = places[step, np.arange(batch_size) % len(batch)]
    images = pool.reshape(-1, *self._shape)
    return (
      parallel.replicate(jnp.asarray(images), self._mesh),
      parallel.replicate(jnp.asarray(self._targets[rows.ravel()]), self._mesh),
      places,
    )

  def close(self) -> None:
    """Ends the readers."""
    self._batches.close()


def resident_pool(
  images: np.ndarray | jax.Array,
  targets: np.ndarray | jax.Array,
  mesh: jax.sharding.Mesh | None = None,
) -> Pool:
  """Puts all images and targets onto the device, or on each of a mesh."""
  images, targets = np.asarray(images), np.asarray(targets)
  if images.nbytes <= _STREAM_BYTES:
    # To a power of two: what is left of a small set when a class is taken out
    # has the shape, and so the program, of the whole. No step asks for more.
    num_padding = (1 << (len(images) - 1).bit_length()) - len(images)
    images, targets = (
      np.pad(x, ((0, num_padding), *((0, 0),) * (x.ndim - 1)))
      for x in (images, targets)
    )
  return _Resident(
    parallel.replicate(jnp.asarray(images), mesh),
    parallel.replicate(jnp.asarray(targets), mesh),
    _MAX_STEPS_PER_CALL,
  )


@contextlib.contextmanager
def open_pool(
  images: np.ndarray | streaming.Images,
  targets: np.ndarray,
  plan: Iterable[np.ndarray],
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Pool]:
  """Puts images and targets where `run_epoch` takes them from.

  Args:
    images: uint8 `[N, H, W, C]`: an array goes onto the device as a whole,
      images on disk are read some minibatches at a time.
    targets: int `[N]` or float `[N, K]`.
    plan: The rows `[B]` of each minibatch of all epochs to come, in order; of
      use for images on disk alone.
    mesh: Devices; None for one.

  Yields:
    The pool.
  """
  if not isinstance(images, streaming.Images):
    yield resident_pool(images, targets, mesh)
    return
  with contextlib.closing(
    _Streamed(images, np.asarray(targets), list(plan), mesh)
  ) as pool:
    yield pool


def run_epoch(
  model: types.Model,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  pool: Pool,
  rows: np.ndarray,
  weights: np.ndarray,
  *,
  factors: np.ndarray | None = None,
  augment_fn: augment.AugmentFn | None = None,
  batch_stats: str = "update",
  num_parts: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  bar: progress.Bar | None = None,
  step_callback: Callable[[TrainState], None] | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
  """Runs the minibatches of an epoch through the compiled `run_steps`.

  Args:
    model: The network.
    optimizer: Any Optax optimiser.
    state: Where to start; donated, and deleted.
    pool: Images and targets, of `open_pool`.
    rows: int32 `[S, B]`.
    weights: float32 `[S, B]`.
    factors: float32 `[S]` of the learning rate, as for `run_steps`.
    augment_fn: As for `run_steps`.
    batch_stats: As for `run_steps`.
    num_parts: As for `run_steps`.
    mesh: Devices to cut each minibatch over; None for one.
    bar: Moved by each step.
    step_callback: Called with the state after each call of the program, which
      takes up to 32 steps.

  Returns:
    The new state, and `loss` and `is_correct` `[S, B]` per row.

  Raises:
    FloatingPointError: If the loss is NaN or infinite, with the step.
  """
  num_steps, batch_size = rows.shape
  # Steps of padding are skipped: one program for epochs of any length.
  steps_per_call = pool.max_steps
  num_calls = -(-num_steps // steps_per_call)
  unit = parallel.size(mesh) * num_parts
  padding = (
    (0, num_calls * steps_per_call - num_steps),
    (0, -batch_size % unit),
  )
  is_masked = bool(padding[1][1] or np.any(weights == 0))
  # Padding repeats images, for the sake of networks without a mask.
  rows = np.pad(rows, padding, mode="wrap")
  weights = np.pad(weights, padding)
  if factors is None:
    factors = np.ones(num_steps, np.float32)
  factors = np.pad(factors, padding[0])
  reported = []
  for call in range(num_calls):
    part = slice(call * steps_per_call, (call + 1) * steps_per_call)
    num_real = min(steps_per_call, num_steps - call * steps_per_call)
    images, targets, places = pool.fetch(rows[part], num_real)
    batches = Batches(
      rows=jnp.asarray(places), weights=jnp.asarray(weights[part])
    )
    state, metrics = _jitted_run_steps(
      model,
      optimizer,
      state,
      images,
      targets,
      parallel.shard(batches, mesh, axis=1),
      factors=jnp.asarray(factors[part]),
      augment_fn=augment_fn,
      batch_stats=batch_stats,
      is_masked=is_masked,
      num_parts=num_parts,
    )
    numbers = jax.tree.map(np.asarray, metrics)
    check_finite(numbers.loss, weights[part], int(state.step))
    reported.append(numbers)
    if bar is not None:
      real = weights[part] > 0
      bar.advance(
        num_real,
        loss=float(numbers.loss[real].mean()),
        accuracy=float(numbers.is_correct[real].mean()),
      )
    if step_callback is not None:
      step_callback(state)

  def join(name: str) -> np.ndarray:
    parts = np.concatenate([getattr(numbers, name) for numbers in reported])
    return parts[:num_steps, :batch_size]

  return state, {"loss": join("loss"), "is_correct": join("is_correct")}


def check_finite(
  losses: np.ndarray, weights: np.ndarray, last_step: int
) -> None:
  """Raises FloatingPointError, with the step, where a loss is not finite.

  Args:
    losses: float `[S, B]`.
    weights: float `[S, B]`, 0 for rows that do not count.
    last_step: Number of the last step, from 1.
  """
  is_bad = (~np.isfinite(losses) & (weights > 0)).any(1)
  if is_bad.any():
    num_steps = int((weights > 0).any(1).sum())
    step = last_step - num_steps + int(np.argmax(is_bad)) + 1
    raise FloatingPointError(
      f"the loss is not finite at step {step}: lower the learning rate"
    )


def train(
  model: types.Model,
  dataset: types.Dataset,
  key: jax.Array,
  **options: Any,
) -> tuple[types.Variables, History]:
  """Trains from a fresh initialisation.

  Args:
    model: The network.
    dataset: The training images.
    key: One typed key, for initialisation, order and augmentation.
    **options: Those of `fit`; `num_epochs` must be given.

  Returns:
    The trained variables, and a record for each pass; see `fit`.

  Raises:
    ValueError: As `fit`, and for images that the network does not take.
  """
  checks.key(key)
  init_key, fit_key = jax.random.split(key)
  images = jnp.zeros((1, *dataset.images.shape[1:]), jnp.float32)
  variables = model.init(init_key, images)
  return fit(model, variables, dataset, fit_key, **options)


def fit(
  model: types.Model,
  variables: types.Variables,
  dataset: types.Dataset,
  key: jax.Array,
  *,
  optimizer: optax.GradientTransformation | None = None,
  num_epochs: int,
  batch_size: int = 64,
  schedule: Schedule = "one_cycle",
  augment_fn: augment.AugmentFn | None = None,
  callback: Callable[[TrainState, dict[str, Any]], None] | None = None,
  step_callback: Callable[[TrainState], None] | None = None,
  num_parts: int = 1,
  state: TrainState | None = None,
  mesh: jax.sharding.Mesh | None = None,
  description: str = "training",
  show_progress: bool = True,
) -> tuple[types.Variables, History]:
  """Trains with cross-entropy. The same arguments give the same weights.

  Args:
    model: The network.
    variables: Where to start; left as they are.
    dataset: The training images, put on the device as uint8, or read from disk
      as they are needed (`streaming.load`); the result is the same.
    key: One typed key, for order and augmentation.
    optimizer: Any Optax optimiser, whose learning rate is the highest; None for
      `sgd(0.05)`, and `sgd(0.01)` with a constant rate, as in the paper.
    num_epochs: Passes over the data, positive.
    batch_size: Images a step, positive.
    schedule: Of the learning rate, as for `schedule_fn`; `"constant"` for an
      optimiser with a schedule of its own.
    augment_fn: Augmentation `(key, images) -> images`, on float images.
    callback: Called after each epoch with the state (to be copied or saved
      before it returns: the next step takes its memory) and the epoch's record.
    step_callback: Called with the state every few steps, likewise.
    num_parts: Gradient accumulation; see `run_steps`.
    state: A state of an earlier run with the same arguments, from which to go
      on, within an epoch too: its step is the position in the data.
      `variables` and `key` are then taken from it.
    mesh: Devices to train on; None for one.
    description: Name of the progress bar.
    show_progress: Whether to show the bar.

  Returns:
    The trained variables, and one record an epoch: `epoch` from 1, mean `loss`
    (nats) and `accuracy` over the epoch as it went, `seconds`, and
    `step_losses`, one a step. An epoch that was gone on with counts from there.

  Raises:
    ValueError: If an argument is out of its range.
    FloatingPointError: If the loss is NaN or infinite.
  """
  checks.integer("num_epochs", num_epochs, at_least=1)
  checks.integer("batch_size", batch_size, at_least=1)
  checks.integer("num_parts", num_parts, at_least=1)
  check_schedule(schedule)
  checks.key(key)
  if not len(dataset):
    raise ValueError("dataset must not be empty, got 0 images")
  check_classes(model, variables, dataset)
  if optimizer is None:
    optimizer = default_optimizer(schedule)
  if state is None:
    state = init_state(variables, optimizer, key)
  else:
    state = jax.tree.map(jnp.copy, state)  # The caller keeps theirs.
  num_steps = -(-len(dataset) // batch_size)
  order_key = jax.random.fold_in(state.key, np.iinfo(np.int32).max)
  first_epoch, first_step = divmod(int(state.step), num_steps)
  factors = schedule_factors(schedule, num_epochs * num_steps)

  def plan(epoch: int) -> tuple[np.ndarray, np.ndarray]:
    rows, weights = epoch_batches(
      jax.random.fold_in(order_key, epoch), len(dataset), batch_size
    )
    start = first_step if epoch == first_epoch else 0
    return rows[start:], weights[start:]

  epochs = range(first_epoch, num_epochs)
  all_rows = (rows for epoch in epochs for rows in plan(epoch)[0])
  state = parallel.replicate(state, mesh)
  history: History = []
  total = num_epochs * num_steps - int(state.step)
  with (
    open_pool(dataset.images, dataset.labels, all_rows, mesh) as pool,
    progress.bar(
      description, total, unit="step", is_shown=show_progress
    ) as bar,
  ):
    for epoch in epochs:
      start = time.perf_counter()
      rows, weights = plan(epoch)
      last_step = (epoch + 1) * num_steps
      state, reported = run_epoch(
        model,
        optimizer,
        state,
        pool,
        rows,
        weights,
        factors=factors[last_step - len(rows) : last_step],
        augment_fn=augment_fn,
        num_parts=num_parts,
        mesh=mesh,
        bar=bar,
        step_callback=step_callback,
      )
      history.append(
        {
          "epoch": epoch + 1,
          **summarise(reported, weights > 0),
          "seconds": time.perf_counter() - start,
        }
      )
      if callback is not None:
        callback(state, history[-1])
  check_variables(state)
  return state.variables, history


def check_classes(
  model: types.Model, variables: types.Variables, dataset: types.Dataset
) -> None:
  """Raises ValueError unless these are a model's variables and its classes.

  Args:
    model: The network.
    variables: With `"params"`.
    dataset: The data, of which no label may be outside the model's classes.
  """
  checks.variables(variables)
  num_classes = checks.logits(model.apply, variables, dataset.images.shape[1:])
  checks.labels(dataset.labels, len(dataset), num_classes)


def check_variables(state: TrainState) -> None:
  """Raises FloatingPointError if the last step left NaN or infinity."""
  for leaf in jax.tree.leaves(state.variables):
    if not bool(jnp.isfinite(leaf).all()):
      raise FloatingPointError(
        f"the variables are not finite after step {int(state.step)}: lower the"
        " learning rate"
      )


def summarise(
  reported: dict[str, np.ndarray], is_counted: np.ndarray
) -> dict[str, Any]:
  """Means over the counted rows, and the mean loss of each step."""
  counts = np.maximum(is_counted.sum(1), 1)
  return {
    "loss": float(reported["loss"][is_counted].mean()),
    "accuracy": float(reported["is_correct"][is_counted].mean()),
    "step_losses": [
      round(float(x), 5)
      for x in (reported["loss"] * is_counted).sum(1) / counts
    ],
  }
