"""One optimiser step a minibatch, with any loss, as a compiled scan.

A loss belongs to the compiled program: it is a function of a module, not a
fresh closure.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from psg_jax import augment, checks, types

Figures: TypeAlias = dict[str, jax.Array]
"""What a loss reports: `[B]`, one a row, or `[]`, one a step."""


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


@types.pytree
class Steps:
  """A `batches.Plan` on the device, in the places of a pool's call."""

  rows: jax.Array
  weights: jax.Array
  is_forget: jax.Array


@types.pytree
class Reported:
  """What steps report, before each update.

  Attributes:
    loss: float32 `[S]`, the objective.
    figures: Those of the loss, `[S, B]` or `[S]`.
  """

  loss: jax.Array
  figures: Figures


ApplyFn: TypeAlias = Callable[
  [types.Variables, Batch], tuple[jax.Array, types.Variables]
]


class LossFn(Protocol):
  """The objective of a step: a sum over rows, weighted by `batch.weights`."""

  def __call__(
    self,
    apply_fn: ApplyFn,
    variables: types.Variables,
    batch: Batch,
    context: chex.ArrayTree,
  ) -> tuple[jax.Array, tuple[types.Variables, Figures]]:
    """Returns the loss `[]`, the variables after `apply_fn`, and figures."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What a compiled program of steps is made of; the static argument of jit.

  Attributes:
    model: The network.
    optimizer: Any Optax optimiser.
    loss_fn: The objective.
    trainable: Whether each leaf of the variables, in order, is trained; None
      for all.
    augment_fn: As for `engine.Passes`.
    batch_stats: As for `engine.Passes`.
    is_masked: Whether minibatches may hold padding among their rows.
    num_parts: As for `engine.Passes`; divides `B`.
  """

  model: types.Model
  optimizer: optax.GradientTransformation
  loss_fn: LossFn
  trainable: tuple[bool, ...] | None = None
  augment_fn: augment.AugmentFn | None = None
  batch_stats: str = "update"
  is_masked: bool = True
  num_parts: int = 1


def init_state(
  variables: types.Variables,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  trainable: tuple[bool, ...] | None = None,
  step: int = 0,
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
    opt_state=optimizer.init(partition(variables, trainable, True)["params"]),
    # The state is donated to each step, and the caller keeps the key.
    key=jax.random.wrap_key_data(
      jnp.array(jax.random.key_data(key), copy=True),
      impl=jax.random.key_impl(key),
    ),
    step=jnp.int32(step),
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


def is_predicted(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Whether `[B]` the target's (largest) class is predicted."""
  classes = targets if targets.ndim == 1 else jnp.argmax(targets, -1)
  return jnp.argmax(logits, -1) == classes


def row_loss(
  fn: Callable[[jax.Array, Batch, Any], tuple[jax.Array, Figures]],
) -> LossFn:
  """Makes a loss of a function of the logits: `Σ_i weight_i fn(logits_i)`.

  Args:
    fn: `(logits [B, K], batch, context) -> (losses [B], figures)`.

  Returns:
    The loss, of the function's name.
  """

  @functools.wraps(fn)
  def loss_fn(
    apply_fn: ApplyFn,
    variables: types.Variables,
    batch: Batch,
    context: chex.ArrayTree,
  ) -> tuple[jax.Array, tuple[types.Variables, Figures]]:
    logits, variables = apply_fn(variables, batch)
    losses, figures = fn(logits, batch, context)
    return jnp.sum(losses * batch.weights), (variables, figures)

  return loss_fn


@row_loss
def mean_cross_entropy(
  logits: jax.Array, batch: Batch, context: chex.ArrayTree
) -> tuple[jax.Array, Figures]:
  """The plain loss, `Σ_i weight_i CE(f(x_i), target_i)`."""
  del context
  losses = cross_entropy(logits, batch.targets).astype(jnp.float32)
  is_correct = is_predicted(logits, batch.targets)
  return losses, {"loss": losses, "accuracy": is_correct}


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
  if model.apply_train is None:
    return model.apply(variables, images), variables
  if mask is None or not takes_mask(model.apply_train):
    return model.apply_train(variables, images, key)
  return model.apply_train(variables, images, key, mask)


@functools.lru_cache
def takes_mask(apply_train: Callable[..., Any]) -> bool:
  """Whether a network's `apply_train` is told which rows are padding."""
  return "mask" in inspect.signature(apply_train).parameters


def partition(
  variables: types.Variables,
  trainable: tuple[bool, ...] | None,
  is_trained: bool,
) -> Any:
  """Returns the trained leaves, or the others, with None for those left out.

  Optax passes over None, so that frozen weights have neither momentum nor
  weight decay.
  """
  if trainable is None:
    return variables
  leaves, structure = jax.tree.flatten(variables)
  return jax.tree.unflatten(
    structure,
    [
      x if on == is_trained else None
      for x, on in zip(leaves, trainable, strict=True)
    ],
  )


def combine(trained: Any, others: Any) -> Any:
  """Puts back into the trained leaves what `partition` left out of them."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    trained,
    others,
    is_leaf=lambda x: x is None,
  )


def run_steps(
  program: Program,
  state: TrainState,
  images: jax.Array,
  targets: jax.Array,
  steps: Steps,
  *,
  factors: jax.Array | None = None,
  context: chex.ArrayTree = (),
  masks: chex.ArrayTree | None = None,
) -> tuple[TrainState, Reported]:
  """Takes one optimiser step a minibatch, as a scan; pure.

  Args:
    program: What the steps are made of.
    state: Where to start.
    images: uint8 `[N, H, W, C]`, the pool.
    targets: `[N, ...]`, whatever the loss expects, such as int `[N]` classes or
      float `[N, K]` probabilities.
    steps: The minibatches.
    factors: float32 `[S]`, what each step's update is multiplied by: a learning
      rate schedule as data, so that runs of any length share one program. None
      for 1.
    context: Arrays that the loss is given.
    masks: A tree of bool arrays like the trained parameters: where False they
      stay as they are.

  Returns:
    The new state and what the steps report.
  """

  def take(state: TrainState, step: Steps, factor: jax.Array | None) -> Any:
    key = jax.random.fold_in(state.key, state.step)
    gradient_fn = functools.partial(
      _gradient, program, state.variables, images, targets, context
    )
    if program.num_parts == 1:
      gradients, others, reported = gradient_fn(
        _others(state.variables), step, key
      )
    else:
      gradients, others, reported = _accumulate(
        gradient_fn, state.variables, program, step, key
      )
    return _moved(program, state, gradients, others, factor, masks), reported

  def skip(state: TrainState, step: Steps, factor: jax.Array | None) -> Any:
    shapes = jax.eval_shape(take, state, step, factor)[1]
    return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def step_fn(
    state: TrainState, inputs: tuple[Steps, jax.Array | None]
  ) -> tuple[TrainState, Reported]:
    is_real = jnp.any(inputs[0].weights > 0)
    return jax.lax.cond(is_real, take, skip, state, *inputs)

  return jax.lax.scan(step_fn, state, (steps, factors))


compiled_run_steps = jax.jit(
  run_steps, static_argnums=0, donate_argnames="state"
)


def num_programs() -> int:
  """Returns how many programs of steps have been compiled in this process."""
  compiled: Any = compiled_run_steps
  return int(compiled._cache_size())


def _others(variables: types.Variables) -> types.Variables:
  """Returns all collections but the parameters."""
  return {k: v for k, v in variables.items() if k != "params"}


def _gradient(
  program: Program,
  variables: types.Variables,
  images: jax.Array,
  targets: jax.Array,
  context: chex.ArrayTree,
  others: types.Variables,
  step: Steps,
  key: jax.Array,
) -> tuple[chex.ArrayTree, types.Variables, Reported]:
  """Differentiates the loss of a minibatch by the trained parameters.

  `others` are the collections to start from, which accumulation has moved.
  """
  model = program.model
  augment_key, apply_key = jax.random.split(key)
  pixels = to_float(images[step.rows])
  if program.augment_fn is not None:
    pixels = program.augment_fn(augment_key, pixels)
  batch = Batch(
    images=pixels,
    targets=targets[step.rows],
    weights=step.weights,
    is_forget=step.is_forget,
  )
  frozen = partition(variables, program.trainable, False)["params"]

  def apply_fn(variables: types.Variables, batch: Batch) -> Any:
    if program.batch_stats == "frozen":
      return model.apply(variables, batch.images), variables
    mask = batch.weights > 0 if program.is_masked else None
    return apply_train(model, variables, batch.images, apply_key, mask)

  def objective(trained: chex.ArrayTree) -> Any:
    params = trained if program.trainable is None else combine(trained, frozen)
    loss, (updated, figures) = program.loss_fn(
      apply_fn, {**others, "params": params}, batch, context
    )
    moved = plain_variables({k: updated.get(k, v) for k, v in others.items()})
    return loss, (of_types(moved, others), figures)

  trained = partition(variables, program.trainable, True)["params"]
  (loss, (others, figures)), gradients = jax.value_and_grad(
    objective, has_aux=True
  )(trained)
  return gradients, others, Reported(loss=loss, figures=figures)


def _accumulate(
  gradient_fn: Callable[..., Any],
  variables: types.Variables,
  program: Program,
  step: Steps,
  key: jax.Array,
) -> tuple[chex.ArrayTree, types.Variables, Reported]:
  """Adds up the gradients of the parts of a minibatch."""
  num_parts = program.num_parts

  def add(carry: Any, inputs: tuple[Steps, jax.Array]) -> tuple[Any, Any]:
    total, others = carry
    part, index = inputs
    gradients, others, reported = gradient_fn(
      others, part, jax.random.fold_in(key, index)
    )
    return (jax.tree.map(jnp.add, total, gradients), others), reported

  # Strided, so that forget and retain images, which lie side by side, are in
  # every part.
  parts = jax.tree.map(lambda x: x.reshape(-1, num_parts).T, step)
  trained = partition(variables, program.trainable, True)["params"]
  (gradients, others), reported = jax.lax.scan(
    add,
    (jax.tree.map(jnp.zeros_like, trained), _others(variables)),
    (parts, jnp.arange(num_parts)),
  )
  figures = {
    name: x.mean(0) if x.ndim == 1 else x.T.reshape(-1)
    for name, x in reported.figures.items()
  }
  return gradients, others, Reported(loss=reported.loss.sum(), figures=figures)


def _moved(
  program: Program,
  state: TrainState,
  gradients: chex.ArrayTree,
  others: types.Variables,
  factor: jax.Array | None,
  masks: chex.ArrayTree | None,
) -> TrainState:
  """Takes the optimiser's step."""
  trained = partition(state.variables, program.trainable, True)["params"]
  updates, opt_state = program.optimizer.update(
    gradients, state.opt_state, trained
  )
  if factor is not None:
    updates = jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)
  params = optax.apply_updates(trained, updates)
  if masks is not None:
    # A choice, not a product, so that what is masked keeps every bit.
    params = jax.tree.map(jnp.where, masks, params, trained)
  variables: types.Variables = {**others, "params": params}
  if program.trainable is not None:
    # Statistics of frozen layers are moved by the network, and put back.
    moved = partition(
      {**others, "params": state.variables["params"]}, program.trainable, True
    )
    variables = combine({**moved, "params": params}, state.variables)
  return TrainState(
    variables=variables,
    opt_state=of_types(opt_state, state.opt_state),
    key=state.key,
    step=state.step + 1,
  )


def check_variables(state: TrainState) -> None:
  """Raises FloatingPointError if the last step left NaN or infinity."""
  for leaf in jax.tree.leaves(state.variables):
    if not bool(jnp.isfinite(leaf).all()):
      raise FloatingPointError(
        f"the variables are not finite after step {int(state.step.max())}:"
        " lower the learning rate"
      )


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
