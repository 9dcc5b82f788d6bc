"""Boundary expanding: a shadow class takes the forget images, and is pruned."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from psg_jax import batches, optimizers, steps, types
from psg_jax.baselines import common

DEFAULTS = {
  "num_epochs": 10,
  "optimizer": optimizers.sgd(1e-5, weight_decay=0.0),
  "description": "boundary expanding",
}


def boundary_expanding(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  **options: Any,
) -> common.Output:
  """Trains the forget images into a class of their own, and removes it.

      loss = mean CE([f_w(x_F), u · h_w(x_F) + b], K + 1)

  with `h` the features before the linear head and `u`, `b` the shadow class's
  own weights, drawn as in the released code (Xavier normal). No retained image
  is used. BatchNorm is in inference mode: the features of training mode are
  not at hand, and it would adapt to the forget set alone.

  Args:
    model: The network, whose logits are a linear function of its `features`.
    variables: The original model's, left as they are.
    split: The forget set, and the retain set, which is not used.
    key: One typed key, for the shadow class and the order.
    **options: Those of `engine.Passes`, but `batch_stats`; by default 10 passes
      over the forget set, and SGD with a learning rate of 1e-5 and momentum
      0.9, without weight decay. States of callbacks are without the shadow
      class, which lies beside the optimiser's state.

  Returns:
    The variables, of the original number of classes, and one record a pass:
    `epoch` from 1, `forget_loss` (nats) and `forget_accuracy`, those of the
    shadow class as it went, `step_losses` and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Chen et al., Boundary Unlearning: Rapid Forgetting of Deep Networks via
    Shifting the Decision Boundary, 2023.
  """
  passes = common.passes(
    *(model, variables, split, key, options, DEFAULTS), needs_retain=False
  )
  callback, start = passes.callback, passes.state
  shadow_key, *keys = jax.random.split(key, 3)

  def without_shadow(state: steps.TrainState, record: dict[str, Any]) -> None:
    if callback is not None:
      callback(_pruned(state), record)

  output = common.train(
    *(model, widen(model, variables, split, shadow_key), split, keys),
    passes.replace(
      batch_stats="frozen",
      callback=without_shadow,
      state=None if start is None else _widened(start),
    ),
    plan_fn=batches.forget_only,
    loss_fn=_loss_fn(model),
  )
  return common.Output(
    variables=_prune(output.variables), history=output.history
  )


def widen(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
) -> types.Variables:
  """Adds the weights of the shadow class."""
  image = jnp.zeros((1, *split.forget.images.shape[1:]), jnp.float32)
  size = jax.eval_shape(model.features, variables, image).shape[1]
  num_classes = jax.eval_shape(model.apply, variables, image).shape[1]
  draw = jax.nn.initializers.glorot_normal()(key, (size, num_classes + 1))
  shadow = {"kernel": draw[:, -1], "bias": jnp.zeros(())}
  return {
    **variables,
    "params": {"network": variables["params"], "shadow": shadow},
  }


def _pruned(state: steps.TrainState) -> steps.TrainState:
  """Puts the shadow class beside the optimiser's state."""
  return steps.TrainState(
    variables=_prune(state.variables),
    opt_state=(state.opt_state, state.variables["params"]["shadow"]),
    key=state.key,
    step=state.step,
  )


def _widened(state: steps.TrainState) -> steps.TrainState:
  """Undoes `_pruned`."""
  opt_state, shadow = state.opt_state
  params = {"network": state.variables["params"], "shadow": shadow}
  return steps.TrainState(
    variables={**state.variables, "params": params},
    opt_state=opt_state,
    key=state.key,
    step=state.step,
  )


def _prune(variables: types.Variables) -> types.Variables:
  """Removes the shadow class."""
  return {**variables, "params": variables["params"]["network"]}


@functools.lru_cache
def _loss_fn(model: types.Model) -> steps.LossFn:
  """The loss of the widened network; one object a model, as it is compiled."""

  def loss_fn(
    apply_fn: steps.ApplyFn,
    variables: types.Variables,
    batch: steps.Batch,
    context: chex.ArrayTree,
  ) -> tuple[jax.Array, tuple[types.Variables, steps.Figures]]:
    del apply_fn, context
    network, shadow = _prune(variables), variables["params"]["shadow"]
    logits = model.apply(network, batch.images)
    features = model.features(network, batch.images)
    extra = features @ shadow["kernel"] + shadow["bias"]
    widened = jnp.concatenate([logits, extra[:, None]], 1)
    targets = jnp.full(len(extra), logits.shape[1])
    losses = steps.cross_entropy(widened, targets)
    is_correct = steps.is_predicted(widened, targets)
    return jnp.sum(losses * batch.weights), (
      variables,
      {"loss": losses, "accuracy": is_correct},
    )

  return loss_fn
