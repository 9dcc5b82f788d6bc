"""Many models of one kind, trained together or one after the other."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from psg_jax import (
  batches,
  checks,
  engine,
  inference,
  optimizers,
  parallel,
  steps,
  training,
  types,
)

MODES = ("map", "vmap", "sharded")


class Context(NamedTuple):
  """What losses of many models are given, as the context of a phase.

  Attributes:
    shared: Arrays for all models.
    per_model: Arrays with an axis `M` in front, of which each has its own.
  """

  shared: chex.ArrayTree = ()
  per_model: chex.ArrayTree = ()


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
  mode: str = "map",
  **options: Any,
) -> tuple[types.Variables, engine.History]:
  """Trains many models together, each on its own part of the images.

  Model `m` becomes what `training.fit(model, model.init(init_key, image),
  dataset.take(membership[m]), fit_key, ...)` makes it, with the keys of
  `model_keys(key, m)`. Images lie on the device once, or are read from disk as
  they are needed. A minibatch holds members alone: images of weight 0 would
  cost as much as others, and move the BatchNorm statistics of networks that
  take no mask.

  Args:
    model: The network, a small one.
    dataset: The images that any model is trained on.
    membership: bool `[M, N]`, such as of `ulira.draw_membership`.
    key: One typed key.
    mode: `"map"`: one model after the other within the program, in the memory
      of one; `"vmap"`: all at once; `"sharded"`: the models are cut over the
      devices of a mesh, one after the other on each. The default is what was
      faster on two CPU cores: 8 All-CNNs of width 0.125 on the digits took
      19 s an epoch mapped and 39 s vmapped, which makes grouped convolutions
      of theirs. Measure anew on an accelerator.
    **options: Those of `training.fit`, but `trainable`. `mesh` is for
      `"sharded"`: the devices; None for all. Arrays of states have an axis of
      models in front.

  Returns:
    The variables, each array with an axis `M` in front, and one record an
    epoch: `epoch` from 1, lists `loss` (nats) and `accuracy` of one mean a
    model over the epoch as it went, and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape or out of its range.
    FloatingPointError: If a loss or a variable is NaN or infinite.
  """
  passes = engine.Passes.of(
    options, {"schedule": "one_cycle", "description": "training ensemble"}
  )
  checks.one_of("mode", mode, MODES)
  checks.key(key)
  passes = on_devices(passes, mode)
  members = _members(membership, len(dataset))
  if passes.trainable is not None:
    raise ValueError("trainable must be None for ensembles, got trees")
  optimizer = passes.optimizer or training.default_optimizer(passes.schedule)
  # Devices that do not divide the models train the first ones twice.
  num_models = len(members)
  models = [
    index % num_models
    for index in range(parallel.padded_size(num_models, passes.mesh))
  ]
  members = [members[index] for index in models]
  init_keys, fit_keys = (
    jnp.stack(part)
    for part in zip(*(model_keys(key, index) for index in models), strict=True)
  )
  state = passes.state
  if state is None:
    state = _fresh_states(model, dataset, optimizer, init_keys, fit_keys)
  else:
    state = jax.tree.map(jnp.copy, state)  # The caller keeps theirs.
  phases, factors = _phases(members, list(fit_keys), passes)
  state, history = engine.run_passes(
    steps.Program(
      model=model,
      optimizer=optimizer,
      loss_fn=steps.mean_cross_entropy,
      augment_fn=passes.augment_fn,
      batch_stats=passes.batch_stats,
      num_parts=passes.num_parts,
    ),
    parallel.shard(state, passes.mesh),
    dataset.images,
    dataset.labels,
    phases,
    passes,
    factors=factors,
    record_fn=functools.partial(_record, num_models=num_models),
    run_fn=functools.partial(run_steps, mode=mode, mesh=passes.mesh),
  )
  variables = jax.tree.map(lambda x: x[:num_models], state.variables)
  return variables, history


def on_devices(passes: engine.Passes, mode: str) -> engine.Passes:
  """Returns the options with the devices that models are cut over, if any.

  Raises:
    ValueError: If there is a mesh where the mode has no use for one.
  """
  if passes.mesh is not None and mode != "sharded":
    raise ValueError(f"mesh must be None with mode={mode!r}, got a mesh")
  if mode == "sharded" and passes.mesh is None:
    return passes.replace(mesh=parallel.create_mesh())
  return passes


def _fresh_states(
  model: types.Model,
  dataset: types.Dataset,
  optimizer: optax.GradientTransformation,
  init_keys: jax.Array,
  fit_keys: jax.Array,
) -> steps.TrainState:
  """Initialises all models, each array with an axis `M` in front."""
  image = jnp.zeros((1, *dataset.images.shape[1:]), jnp.float32)
  variables = jax.lax.map(lambda x: model.init(x, image), init_keys)
  first = jax.tree.map(lambda x: x[0], variables)
  steps.check_classes(model, first, dataset)
  states: steps.TrainState = jax.vmap(
    lambda v, k: steps.init_state(v, optimizer, k)
  )(variables, fit_keys)
  return states


def _phases(
  members: list[np.ndarray], keys: list[jax.Array], passes: engine.Passes
) -> tuple[list[list[engine.Phase]], np.ndarray]:
  """Plans `[S, M, B]` of all epochs, and factors `[S, M]` of all steps.

  Models of fewer images have steps of padding at the end of each epoch.
  """
  steps_of = [-(-len(rows) // passes.batch_size) for rows in members]
  num_steps = max(steps_of)
  order_keys = [training.order_key(None, key) for key in keys]
  phases = []
  for epoch in range(passes.num_epochs):
    plans = [
      _plan(jax.random.fold_in(x, epoch), rows, passes.batch_size, num_steps)
      for x, rows in zip(order_keys, members, strict=True)
    ]
    rows, weights = (np.stack(x, 1) for x in zip(*plans, strict=True))
    plan = batches.Plan(rows, weights, np.zeros(rows.shape, bool))
    phases.append([engine.Phase(steps.mean_cross_entropy, plan)])
  factors = [
    np.pad(
      optimizers.schedule_factors(
        passes.schedule, passes.num_epochs * number
      ).reshape(passes.num_epochs, number),
      ((0, 0), (0, num_steps - number)),
    ).ravel()
    for number in steps_of
  ]
  return phases, np.stack(factors, 1)


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


def _record(report: engine.Report, num_models: int) -> dict[str, Any]:
  """Means of each model over its images of the epoch."""
  is_counted = report.plan.weights[:, :num_models] > 0
  counts = is_counted.sum((0, 2))
  return {
    name: [
      float(x)
      for x in (values[:, :num_models] * is_counted).sum((0, 2)) / counts
    ]
    for name, values in report.figures.items()
  }


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


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("mode", "mesh"),
  donate_argnums=1,
)
def run_steps(
  program: steps.Program,
  state: steps.TrainState,
  images: jax.Array,
  labels: jax.Array,
  minibatches: steps.Steps,
  *,
  factors: jax.Array,
  context: Context | tuple[()] = (),
  masks: chex.ArrayTree | None = None,
  mode: str,
  mesh: jax.sharding.Mesh | None,
) -> tuple[steps.TrainState, steps.Reported]:
  """Takes the steps of all models: a `run_fn` of `engine.run_passes`.

  Args:
    program: As for `steps.run_steps`, and so are the following.
    state: Arrays with an axis `M` in front; donated.
    images: The pool, of all models.
    labels: Its targets, likewise.
    minibatches: `[S, M, B]`.
    factors: float32 `[S, M]`.
    context: What the loss is given, each model its part of `per_model`.
    masks: For all models.
    mode: As for `train`.
    mesh: The devices of `"sharded"`.

  Returns:
    The new state, and reports `[S, M, ...]`.
  """
  shared, per_model = context or Context()

  def one(inputs: Any, whole: Any) -> Any:
    state, minibatches, factors, per_model = inputs
    images, labels, shared, masks = whole
    return steps.run_steps(
      *(program, state, images, labels, minibatches),
      factors=factors,
      context=Context(shared, per_model),
      masks=masks,
    )

  def loop(inputs: Any, whole: Any) -> Any:
    return jax.lax.map(lambda x: one(x, whole), inputs)

  run_fn = loop
  if mode == "vmap":
    run_fn = jax.vmap(one, (0, None))
  elif mesh is not None:
    models, whole = (
      jax.sharding.PartitionSpec(parallel.BATCH_AXIS),
      jax.sharding.PartitionSpec(),
    )
    run_fn = jax.shard_map(
      loop,
      mesh=mesh,
      in_specs=(models, whole),
      out_specs=models,
      check_vma=False,
    )
  minibatches, factors = _swapped((minibatches, factors))
  state, reported = run_fn(
    (state, minibatches, factors, per_model), (images, labels, shared, masks)
  )
  return state, _swapped(reported)


def num_programs() -> int:
  """Returns how many programs of many models this process has compiled."""
  compiled: Any = run_steps
  return int(compiled._cache_size())


def _swapped(tree: Any) -> Any:
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
