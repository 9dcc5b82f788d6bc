"""Boundary expanding: a shadow class takes the forget images, and is pruned."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from psg_jax import training, types
from psg_jax.baselines import _engine, _plans


def boundary_expanding(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_epochs: int = 10,
  batch_size: int = 64,
  optimizer: optax.GradientTransformation | None = None,
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
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
    num_epochs: Passes over the forget set, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser; None for SGD with a learning rate of 1e-5
      and momentum 0.9, without weight decay.
    callback: Called after each pass with the state, without the shadow class,
      and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

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
  _engine.check(
    model,
    variables,
    split,
    key,
    batch_size=batch_size,
    num_epochs=num_epochs,
    needs_retain=False,
  )
  shadow_key, plan_key, run_key = jax.random.split(key, 3)
  plans = _plans.each_pass(
    plan_key,
    num_epochs,
    lambda key: _plans.forget_only(key, len(split.forget), batch_size),
  )

  def without_shadow(
    state: training.TrainState, record: dict[str, Any]
  ) -> None:
    if callback is not None:
      pruned = training.TrainState(
        variables=_prune(state.variables),
        opt_state=state.opt_state,
        key=state.key,
        step=state.step,
      )
      callback(pruned, record)

  output = _engine.run(
    model,
    _widen(model, variables, split, shadow_key),
    split.forget.images,
    split.forget.labels,
    [[_engine.Phase(_loss_fn(model), *plan)] for plan in plans],
    run_key,
    optimizer=optimizer or training.sgd(1e-5, weight_decay=0.0),
    batch_stats="frozen",
    callback=without_shadow,
    mesh=mesh,
    description="boundary expanding",
    show_progress=show_progress,
  )
  return _engine.Output(
    variables=_prune(output.variables), history=output.history
  )


def _widen(
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


def _prune(variables: types.Variables) -> types.Variables:
  """Removes the shadow class."""
  return {**variables, "params": variables["params"]["network"]}


@functools.lru_cache
def _loss_fn(model: types.Model) -> _engine.LossFn:
  """The loss of the widened network; one object a model, as it is compiled."""

  def loss_fn(
    apply_fn: _engine.ApplyFn,
    variables: types.Variables,
    batch: _engine.Batch,
    context: chex.ArrayTree,
  ) -> tuple[jax.Array, tuple[types.Variables, _engine.Figures]]:
    del apply_fn, context
    network, shadow = _prune(variables), variables["params"]["shadow"]
    logits = model.apply(network, batch.images)
    features = model.features(network, batch.images)
    extra = features @ shadow["kernel"] + shadow["bias"]
    widened = jnp.concatenate([logits, extra[:, None]], 1)
    targets = jnp.full(len(extra), logits.shape[1])
    losses = training.cross_entropy(widened, targets)
    is_correct = _engine.is_predicted(widened, targets)
    return jnp.sum(losses * batch.weights), (
      variables,
      _engine.by_set(batch, loss=losses, accuracy=is_correct),
    )

  return loss_fn
