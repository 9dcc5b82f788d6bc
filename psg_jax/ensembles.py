"""Many models of one kind, trained together or one after the other."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import (
  augment,
  batches,
  checks,
  inference,
  optimizers,
  parallel,
  progress,
  steps,
  training,
  types,
)

MODES = ("map", "vmap", "sharded")
_MAX_STEPS_PER_CALL = 32
_LAST_STEP = np.iinfo(np.int32).max


def model_keys(key: jax.Array, model: int) -> tuple[jax.Array, jax.Array]:
  """Returns the keys of one model of an ensemble: for `init` and for `fit`."""
  init_key, fit_key = jax.random.split(jax.random.fold_in(key, model))
  return init_key, fit_key


def train(
  model: types.Model,
  dataset: types.Dataset,
  membership: np.ndarray,
  key: jax.Array,
  *,
  num_epochs: int,
  batch_size: int = 64,
  schedule: training.Schedule = "one_cycle",
  optimizer: optax.GradientTransformation | None = None,
  augment_fn: augment.AugmentFn | None = None,
  mode: str = "map",
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> tuple[types.Variables, training.History]:
  """Trains many models together, each on its own part of the images.

  Model `m` becomes what `training.fit(model, model.init(init_key, image),
  dataset.take(membership[m]), fit_key, ...)` makes it, with the keys of
  `model_keys(key, m)`. Images lie on the device once. A minibatch holds
  members alone: images of weight 0 would cost as much as others, and move the
  BatchNorm statistics of networks that take no mask.

  Args:
    model: The network, a small one.
    dataset: The images that any model is trained on.
    membership: bool `[M, N]`, such as of `ulira.draw_membership`.
    key: One typed key.
    num_epochs: Passes of each model over its images, positive.
    batch_size: Images a step and model, positive.
    schedule: Of the learning rate, as for `training.fit`.
    optimizer: As for `training.fit`.
    augment_fn: Augmentation `(key, images) -> images`.
    mode: `"map"`: one model after the other within the program, in the memory
      of one; `"vmap"`: all at once; `"sharded"`: the models are cut over the
      devices of a mesh, one after the other on each. The default is what was
      faster on two CPU cores: 8 All-CNNs of width 0.125 on the digits took
      19 s an epoch mapped and 39 s vmapped, which makes grouped convolutions
      of theirs. Measure anew on an accelerator.
    mesh: For `"sharded"`: the devices; None for all.
    show_progress: Whether to show a progress bar.

  Returns:
    The variables, each array with an axis `M` in front, and one record an
    epoch: `epoch` from 1, lists `loss` (nats) and `accuracy` of one mean a
    model over the epoch as it went, and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape or out of its range.
    FloatingPointError: If a loss or a variable is NaN or infinite.
  """
  checks.integer("num_epochs", num_epochs, at_least=1)
  checks.integer("batch_size", batch_size, at_least=1)
  checks.one_of("mode", mode, MODES)
  optimizers.check_schedule(schedule)
  checks.key(key)
  members = _members(membership, len(dataset))
  if mesh is not None and mode != "sharded":
    raise ValueError(f"mesh must be None with mode={mode!r}, got a mesh")
  if mode == "sharded" and mesh is None:
    mesh = parallel.create_mesh()
  if optimizer is None:
    optimizer = training.default_optimizer(schedule)
  # Devices that do not divide the models train the first ones twice.
  num_models = len(members)
  padded = parallel.padded_size(num_models, mesh)
  members = [members[index % num_models] for index in range(padded)]
  keys = [model_keys(key, index % num_models) for index in range(padded)]
  init_keys, fit_keys = (jnp.stack(part) for part in zip(*keys, strict=True))
  image = jnp.zeros((1, *dataset.images.shape[1:]), jnp.float32)
  variables = jax.lax.map(lambda each: model.init(each, image), init_keys)
  first = jax.tree.map(lambda x: x[0], variables)
  steps.check_classes(model, first, dataset)
  state = parallel.shard(
    jax.vmap(lambda v, k: steps.init_state(v, optimizer, k))(
      variables, fit_keys
    ),
    mesh,
  )
  images = parallel.replicate(jnp.asarray(dataset.images[:]), mesh)
  labels = parallel.replicate(jnp.asarray(dataset.labels), mesh)
  order_keys = [jax.random.fold_in(each, _LAST_STEP) for each in fit_keys]
  steps_of = [-(-len(rows) // batch_size) for rows in members]
  num_steps = max(steps_of)
  factors = {
    number: optimizers.schedule_factors(schedule, num_epochs * number)
    for number in set(steps_of)
  }
  program = steps.Program(
    model=model,
    optimizer=optimizer,
    loss_fn=steps.mean_cross_entropy,
    augment_fn=augment_fn,
  )
  history: training.History = []
  with progress.bar(
    "training ensemble",
    num_epochs * num_steps,
    unit="step",
    is_shown=show_progress,
  ) as bar:
    for epoch in range(num_epochs):
      start = time.perf_counter()
      plans = [
        _plan(jax.random.fold_in(each, epoch), rows, batch_size, num_steps)
        for each, rows in zip(order_keys, members, strict=True)
      ]
      rates = np.stack(
        [
          np.pad(factors[n][epoch * n : (epoch + 1) * n], (0, num_steps - n))
          for n in steps_of
        ]
      )
      losses, is_correct, weights = [], [], []
      for rows, row_weights, call_rates in _calls(plans, rates):
        minibatches = steps.Steps(
          rows=jnp.asarray(rows),
          weights=jnp.asarray(row_weights),
          is_forget=jnp.zeros(rows.shape, bool),
        )
        state, reported = _run(
          program,
          state,
          images,
          labels,
          parallel.shard(minibatches, mesh),
          parallel.shard(jnp.asarray(call_rates), mesh),
          mode=mode,
          mesh=mesh,
        )
        figures = {
          name: np.asarray(x)[:num_models]
          for name, x in reported.figures.items()
        }
        losses.append(figures["loss"])
        is_correct.append(figures["accuracy"])
        weights.append(row_weights[:num_models] > 0)
        _check_finite("the loss", losses[-1], weights[-1], epoch + 1)
        bar.advance(
          int(weights[-1].any((0, 2)).sum()),
          loss=float(losses[-1][weights[-1]].mean()),
        )
      is_counted = np.concatenate(weights, 1)
      num_counted = is_counted.sum((1, 2))
      history.append(
        {
          "epoch": epoch + 1,
          **{
            name: [
              float(x)
              for x in (np.concatenate(values, 1) * is_counted).sum((1, 2))
              / num_counted
            ]
            for name, values in (("loss", losses), ("accuracy", is_correct))
          },
          "seconds": time.perf_counter() - start,
        }
      )
  variables = jax.tree.map(lambda x: x[:num_models], state.variables)
  for leaf in jax.tree.leaves(variables):
    _check_finite("a variable", np.asarray(leaf), True, num_epochs)
  return variables, history


def fit_many(
  model: types.Model,
  dataset: types.Dataset,
  key: jax.Array,
  *,
  num_models: int,
  mode: str = "auto",
  **options: Any,
) -> types.Variables:
  """Trains several models on the same images, such as retrained references.

  Model `m` is what `training.fit` makes with the keys of `model_keys(key, m)`,
  whatever the mode (with `"vmap"` and on a mesh up to rounding).

  Args:
    model: The network.
    dataset: The training images.
    key: One typed key.
    num_models: `M`, positive.
    mode: `"loop"`: one `training.fit` after the other, whose program is
      compiled once; `"map"`, `"vmap"`, `"sharded"`: one program for all, as for
      `train`; `"auto"`: sharded where there are several devices, else a loop.
      On one CPU core, two epochs of five All-CNNs of width 0.125 on the digits
      took 26 to 27 s of the core in a loop, 27 to 30 s mapped and 56 s vmapped,
      compiling included. Measure anew on an accelerator.
    **options: `num_epochs` and others that both `training.fit` and `train`
      have.

  Returns:
    The variables, each array with an axis `M` in front.

  Raises:
    ValueError: If an argument is out of its range.
    FloatingPointError: If a loss or a variable is NaN or infinite.
  """
  checks.integer("num_models", num_models, at_least=1)
  checks.one_of("mode", mode, ("auto", "loop", *MODES))
  if mode == "auto":
    mode = "sharded" if jax.device_count() > 1 else "loop"
  if mode != "loop":
    membership = np.ones((num_models, len(dataset)), bool)
    return train(model, dataset, membership, key, mode=mode, **options)[0]
  checks.key(key)
  image = jnp.zeros((1, *dataset.images.shape[1:]), jnp.float32)
  fitted = []
  for number in range(num_models):
    init_key, fit_key = model_keys(key, number)
    start = model.init(init_key, image)
    fitted.append(training.fit(model, start, dataset, fit_key, **options)[0])
  stacked: types.Variables = jax.tree.map(lambda *x: jnp.stack(x), *fitted)
  return stacked


def predict(
  model: types.Model,
  variables: types.Variables,
  images: np.ndarray,
  *,
  batch_size: int = 256,
) -> np.ndarray:
  """Applies each model of an ensemble to all images.

  Args:
    model: The network.
    variables: Of `train`, with an axis `M` in front.
    images: uint8 `[N, H, W, C]`.
    batch_size: Images at a time, positive.

  Returns:
    Logits, float32 `[M, N, K]`.

  Raises:
    ValueError: If the images are not uint8 `[N, H, W, C]`.
  """
  num_models = len(jax.tree.leaves(variables)[0])
  return np.stack(
    [
      inference.predict(
        model.apply,
        jax.tree.map(lambda x, m=m: x[m], variables),
        images,
        batch_size=batch_size,
      )
      for m in range(num_models)
    ]
  )


def _members(membership: np.ndarray, num_images: int) -> list[np.ndarray]:
  """Returns the rows of each model."""
  membership = np.asarray(membership)
  if (
    membership.ndim != 2
    or membership.dtype != bool
    or membership.shape[1] != num_images
    or not len(membership)
  ):
    raise ValueError(
      f"membership must be bool [M, {num_images}], got {membership.dtype}"
      f" {list(membership.shape)}"
    )
  members = [np.flatnonzero(row).astype(np.int32) for row in membership]
  for index, rows in enumerate(members):
    if not len(rows):
      raise ValueError(f"membership must give model {index} an image, got none")
  return members


def _plan(
  key: jax.Array, members: np.ndarray, batch_size: int, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows and weights `[num_steps, B]` of an epoch; steps of padding follow."""
  plan = batches.retain_only(key, 0, len(members), batch_size)
  padding = (
    (0, num_steps - len(plan.rows)),
    # As many rows for all models, some of which may have fewer images.
    (0, batch_size - plan.rows.shape[1]),
  )
  rows = np.pad(plan.rows, padding, mode="wrap")
  return members[rows], np.pad(plan.weights, padding)


def _calls(
  plans: list[tuple[np.ndarray, np.ndarray]], rates: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Cuts an epoch into equal calls of one program, `[M, S, B]` each.

  Args:
    plans: Rows and weights `[S, B]` of each model.
    rates: Factors of the learning rate `[M, S]`.
  """
  num_steps = rates.shape[1]
  rows, weights = (np.stack(part) for part in zip(*plans, strict=True))
  num_calls = -(-num_steps // _MAX_STEPS_PER_CALL)
  size = -(-num_steps // num_calls)
  padding = ((0, 0), (0, num_calls * size - num_steps), (0, 0))
  rows, weights = np.pad(rows, padding, mode="wrap"), np.pad(weights, padding)
  rates = np.pad(rates, padding[:2])
  parts = [
    slice(start, start + size) for start in range(0, num_calls * size, size)
  ]
  return [(rows[:, part], weights[:, part], rates[:, part]) for part in parts]


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("mode", "mesh"),
  donate_argnums=1,
)
def _run(
  program: steps.Program,
  state: steps.TrainState,
  images: jax.Array,
  labels: jax.Array,
  minibatches: steps.Steps,
  factors: jax.Array,
  *,
  mode: str,
  mesh: jax.sharding.Mesh | None,
) -> tuple[steps.TrainState, steps.Reported]:
  """Takes the steps of all models, each array with an axis `M` in front."""

  def one(
    inputs: tuple[steps.TrainState, steps.Steps, jax.Array],
    images: jax.Array,
    labels: jax.Array,
  ) -> tuple[steps.TrainState, steps.Reported]:
    state, minibatches, factors = inputs
    return steps.run_steps(
      program, state, images, labels, minibatches, factors=factors
    )

  def loop(
    inputs: tuple[steps.TrainState, steps.Steps, jax.Array],
    images: jax.Array,
    labels: jax.Array,
  ) -> tuple[steps.TrainState, steps.Reported]:
    return jax.lax.map(lambda x: one(x, images, labels), inputs)

  inputs = (state, minibatches, factors)
  if mode == "vmap":
    return jax.vmap(one, (0, None, None))(inputs, images, labels)
  if mesh is None:
    return loop(inputs, images, labels)
  models, whole = (
    jax.sharding.PartitionSpec(parallel.BATCH_AXIS),
    jax.sharding.PartitionSpec(),
  )
  mapped = jax.shard_map(
    loop,
    mesh=mesh,
    in_specs=(models, whole, whole),
    out_specs=models,
    check_vma=False,
  )
  return mapped(inputs, images, labels)


def _check_finite(
  name: str, values: np.ndarray, is_real: np.ndarray | bool, epoch: int
) -> None:
  is_bad = (~np.isfinite(values) & is_real).reshape(len(values), -1).any(1)
  if is_bad.any():
    raise FloatingPointError(
      f"{name} of model {int(np.argmax(is_bad))} is not finite in epoch"
      f" {epoch}: lower the learning rate"
    )
