"""What the methods share: checks, a pool for each kind of plan, one output."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psg_jax import (
  batches,
  checks,
  engine,
  steps,
  types,
  unlearning,
)

Output = unlearning.UnlearnOutput


def passes(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  options: Mapping[str, Any],
  defaults: Mapping[str, Any],
  *,
  needs_retain: bool = True,
) -> engine.Passes:
  """Checks what no method can work without, and reads the shared options.

  Args:
    model: The network.
    variables: The original model's.
    split: The forget and the retain set.
    key: One typed key.
    options: What the caller gave.
    defaults: The method's own values, `optimizer` among them.
    needs_retain: Whether there must be retained images.

  Returns:
    The options, with an optimiser.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
  """
  check(model, variables, split, key, needs_retain=needs_retain)
  return engine.Passes.of(options, defaults)


def check(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  needs_retain: bool = True,
) -> None:
  """Raises ValueError for arguments that no method can work with."""
  unlearning.check_parts(model, variables, split, float(needs_retain))
  checks.key(key)


def train(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  keys: Sequence[jax.Array] | jax.Array,
  options: engine.Passes,
  *,
  plan_fn: Callable[..., batches.Plan],
  loss_fn: steps.LossFn = steps.mean_cross_entropy,
  contexts: Sequence[chex.ArrayTree] | None = None,
  targets: np.ndarray | None = None,
) -> Output:
  """Trains with one loss on one kind of minibatches; most methods do no more.

  Args:
    model: The network.
    variables: Where to start; left as they are.
    split: The forget and the retain set.
    keys: One for the plans and one for the steps.
    options: The shared ones.
    plan_fn: One of `batches`: `forget_only` and `retain_only` have pools of one
      set, `mixed` and `beside_retain` of both.
    loss_fn: The objective.
    contexts: What the loss is given in each pass; None for nothing.
    targets: Of the pool; None for the labels.

  Returns:
    The variables and the history of `engine.run`.

  Raises:
    FloatingPointError: If a loss or a variable is NaN or infinite.
  """
  sizes: tuple[int, ...] = len(split.forget), len(split.retain)
  pool = batches.join(split) if plan_fn in _OF_BOTH else None
  if plan_fn is batches.forget_only:
    sizes = sizes[:1]
    pool = split.forget.images, split.forget.labels
  elif plan_fn is batches.retain_only:
    sizes = 0, sizes[1]
    pool = split.retain.images, split.retain.labels
  assert pool is not None
  plans = batches.each_pass(
    keys[0],
    options.num_epochs,
    lambda key: plan_fn(key, *sizes, options.batch_size),
  )
  if contexts is None:
    contexts = [()] * len(plans)
  state, history = engine.run(
    model,
    variables,
    pool[0],
    pool[1] if targets is None else targets,
    [
      [engine.Phase(loss_fn, plan, context)]
      for plan, context in zip(plans, contexts, strict=True)
    ],
    keys[1],
    options,
  )
  return Output(variables=state.variables, history=history)


_OF_BOTH = (batches.mixed, batches.beside_retain)


def as_seen(
  loss_fn: steps.LossFn,
  model: types.Model,
  teachers: Sequence[types.Variables],
  context: chex.ArrayTree,
  options: engine.Passes,
) -> tuple[steps.LossFn, chex.ArrayTree]:
  """Lets teachers see images as the student does, where they are augmented.

  Args:
    loss_fn: The objective, of targets `[B, ..., K]` whose last rows are a
      teacher's logits at images as they are.
    model: The network.
    teachers: Frozen variables: of one teacher, or of one for the forget set and
      one for the retain set.
    context: What the loss is given.
    options: The passes.

  Returns:
    The loss and what it is given, as they were without augmentation.
  """
  if options.augment_fn is None:
    return loss_fn, context
  seen_by = tuple(steps.plain_variables(teacher) for teacher in teachers)
  fn: Any = loss_fn
  return _as_seen(fn, model.apply), (context, seen_by)


@functools.lru_cache
def _as_seen(loss_fn: Any, apply: Callable[..., jax.Array]) -> steps.LossFn:
  """The same object each time: compiled programs are found again by it."""

  @functools.wraps(loss_fn)
  def seeing(
    apply_fn: steps.ApplyFn,
    variables: types.Variables,
    batch: steps.Batch,
    context: chex.ArrayTree,
  ) -> Any:
    context, teachers = context
    logits = [apply(teacher, batch.images) for teacher in teachers]
    taught = jnp.where(batch.is_forget[:, None], logits[0], logits[-1])
    targets = batch.targets
    targets = taught if targets.ndim == 2 else targets.at[:, -1].set(taught)
    batch = dataclasses.replace(batch, targets=targets)
    return loss_fn(apply_fn, variables, batch, context)

  return seeing


def fresh_variables(
  model: types.Model, split: types.Split, key: jax.Array
) -> types.Variables:
  """Draws a new initialisation for the images of the split."""
  image = jnp.zeros((1, *split.forget.images.shape[1:]), jnp.float32)
  return dict(model.init(key, image))


def finish(
  variables: types.Variables,
  params: chex.ArrayTree,
  key: jax.Array,
  record: dict[str, Any],
  callback: engine.Callback | None,
) -> Output:
  """Ends a method that takes no step: new weights, one record, one callback."""
  variables = {**jax.tree.map(jnp.copy, dict(variables)), "params": params}
  state = steps.TrainState(
    variables=variables, opt_state=(), key=key, step=jnp.int32(0)
  )
  steps.check_variables(state)
  if callback is not None:
    callback(state, record)
  return Output(variables=variables, history=[record])
