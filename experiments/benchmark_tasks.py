"""What the benchmark times, as the library does it and as PyTorch does."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments import recipes
from psg_jax import (
  batches,
  boundary,
  data,
  engine,
  forget,
  models,
  steps,
  torch_weights,
  training,
  types,
  unlearning,
)

_REFERENCE = recipes.JOBS["reference"]
_RELEASED = recipes.RELEASED
# Of the reference protocol, for every channel.
_MEAN = _STD = 0.5
_NUM_PARTS = 5


@dataclasses.dataclass(frozen=True)
class Options:
  """What is timed, and how often."""

  weights: str | None = None
  """PyTorch state dict of the original model; by default random weights."""
  data_dir: str | None = None
  """Folder of the prepared data sets."""
  dataset: str = _REFERENCE.dataset
  num_train: int | None = _REFERENCE.num_train
  """Use only the first so many training images."""
  forget_class: int = 0
  num_forget: int | None = None
  """Use only the first so many forget images."""
  width: float = _REFERENCE.width
  """Multiplies the model's number of filters."""
  batch_size: int = _RELEASED.forget_batch_size
  num_passes: int = 10
  """Passes over the forget set in the unlearning job."""
  channels_last: bool = False
  """Give PyTorch its faster layout, which the released code does not use."""
  train_steps: int | None = 40
  """Training steps to time, scaled to an epoch; None: the whole epoch."""
  rounds: int = 3
  """Rounds that count, after one that does not."""
  seed: int = 2022
  output: str | None = None
  """Also write the result to this JSON file."""
  profile: str | None = None
  """Also write a jax.profiler trace of one unlearning job to this folder."""


class Setup(NamedTuple):
  """What both sides work on.

  Attributes:
    options: The options.
    train: The training set.
    split: Its forget and its retain set.
    model: The network.
    variables: Its weights.
    rows: Training minibatches, int32 `[S, B]`.
    is_real: bool `[S, B]`, False where a row is padding.
    forget_rows: Whole minibatches of the forget set, int32 `[T, B]`.
  """

  options: Options
  train: types.Dataset
  split: types.Split
  model: types.Model
  variables: types.Variables
  rows: np.ndarray
  is_real: np.ndarray
  forget_rows: np.ndarray


class Task(NamedTuple):
  """Something to time, on each side.

  Attributes:
    name: In the result.
    title: In the table.
    jax_fn: Does it with the library, and waits until it is done.
    torch_fn: Does it with PyTorch; None where there is no counterpart.
    scale: Multiplies the seconds.
  """

  name: str
  title: str
  jax_fn: Callable[[], Any]
  torch_fn: Callable[[], Any] | None
  scale: float = 1.0


def prepare(options: Options) -> Setup:
  """Loads the images and the weights.

  Args:
    options: The options.

  Returns:
    What both sides work on.

  Raises:
    ValueError: If the data is missing or the weights are another model's.
  """
  train = data.load(options.dataset, "train", data_dir=options.data_dir)
  if options.num_train is not None:
    train = data.subset(train, options.num_train)
  split = forget.split(train, classes=options.forget_class)
  if options.num_forget is not None:
    split = split._replace(forget=data.subset(split.forget, options.num_forget))
  model = models.create(
    _REFERENCE.model,
    num_classes=train.num_classes,
    num_channels=train.images.shape[-1],
    width=options.width,
    mean=_MEAN,
    std=_STD,
  )
  key = jax.random.key(options.seed)
  variables = model.init(key, jnp.zeros((1, *train.images.shape[1:])))
  if options.weights is not None:
    expected = jax.tree.map(jnp.shape, dict(variables))
    variables = torch_weights.load(options.weights, model_name=_REFERENCE.model)
    if jax.tree.map(jnp.shape, dict(variables)) != expected:
      raise ValueError(
        f"weights must be those of {_REFERENCE.model} at width"
        f" {options.width:g} for {options.dataset}, got others in"
        f" {options.weights}"
      )
  size = options.batch_size
  rows, is_real = batches.shuffled_rows(key, len(train), size)
  # The last steps of the epoch, so that the one with padding is among them.
  kept = slice(-(options.train_steps or len(rows)), None)
  num_whole = max(1, len(split.forget) // size)
  return Setup(
    options=options,
    train=train,
    split=split,
    model=model,
    variables=variables,
    rows=rows[kept],
    is_real=is_real[kept],
    forget_rows=np.resize(
      np.arange(len(split.forget), dtype=np.int32), (num_whole, size)
    ),
  )


def is_compared() -> bool:
  """Whether both sides work on the same device, PyTorch's, the CPU."""
  return bool(jax.default_backend() == "cpu")


def num_steps(setup: Setup) -> int:
  """Returns the minibatches of a training epoch."""
  return -(-len(setup.train) // setup.options.batch_size)


def tasks(setup: Setup) -> list[Task]:
  """The whole job comes first: its first call is that of a new process."""
  ours = _jax_side(setup)
  theirs = _torch_side(setup) if is_compared() else {}
  titles = {
    "job": f"unlearning job, {setup.options.num_passes} passes",
    "search": "search, released single step",
    "search_multi_step": "search, multi-step",
    "update": "update, one pass",
    "epoch": "training epoch",
    "forward": "one minibatch: forward",
    "forward_input_gradient": "  with the gradient of the images",
    "forward_training": "one minibatch: forward in training mode",
    "forward_weight_gradient": "  with the gradient of the weights",
    "update_step": "  with the optimiser, as in the update",
  }
  scales = {
    name: 1 / len(setup.forget_rows) for name in list(titles)[-_NUM_PARTS:]
  }
  scales["epoch"] = len(setup.train) / int(setup.is_real.sum())
  return [
    Task(name, title, ours[name], theirs.get(name), scales.get(name, 1.0))
    for name, title in titles.items()
  ]


def _sgd(recipe: recipes.Training | recipes.Unlearning) -> dict[str, float]:
  return {
    "learning_rate": recipe.learning_rate,
    "momentum": recipe.momentum,
    "weight_decay": recipe.weight_decay,
  }


def _jax_side(setup: Setup) -> dict[str, Callable[[], Any]]:
  """Returns the tasks as the library does them, by name."""
  options, model, split = setup.options, setup.model, setup.split
  variables, key = setup.variables, jax.random.key(options.seed)
  released = functools.partial(
    boundary.released_code_search,
    model_mean=_MEAN,
    model_std=_STD,
    step_size=_RELEASED.step_size,
  )
  defaults = recipes.Unlearning()
  multi_step = functools.partial(
    boundary.search,
    num_steps=defaults.num_steps,
    step_size=defaults.step_size,
  )
  update_options: dict[str, Any] = {
    "optimizer": training.sgd(**_sgd(_RELEASED)),
    "batch_size": options.batch_size,
    "retain_weight": 0.0,
    "show_progress": False,
  }

  def job() -> types.Variables:
    output = unlearning.unlearn(
      model,
      variables,
      split,
      key,
      search_fn=released,
      num_epochs=options.num_passes,
      **update_options,
    )
    return jax.block_until_ready(output.variables)

  def search(search_fn: unlearning.SearchFn) -> np.ndarray:
    return unlearning.relabel(
      model.apply,
      variables,
      split.forget,
      key,
      search_fn=search_fn,
      show_progress=False,
    ).labels

  def update() -> None:
    state, _ = unlearning.update(
      model,
      variables,
      split,
      split.forget.labels,
      key,
      num_epochs=1,
      **update_options,
    )
    jax.block_until_ready(state.variables)

  return {
    "job": job,
    "search": functools.partial(search, released),
    "search_multi_step": functools.partial(search, multi_step),
    "update": update,
    "epoch": _jax_steps(
      setup,
      setup.train,
      setup.rows,
      setup.is_real,
      _sgd(_REFERENCE.training),
    ),
    **_jax_parts(setup),
  }


def _jax_steps(
  setup: Setup,
  dataset: types.Dataset,
  rows: np.ndarray,
  is_real: np.ndarray,
  sgd_options: dict[str, float],
) -> Callable[[], None]:
  """Returns steps on these rows, with the images on the device already."""
  optimizer = training.sgd(**sgd_options)
  pool = batches.resident_pool(dataset.images, dataset.labels)
  is_forget = np.zeros(rows.shape, bool)
  plan = batches.Plan(rows, batches.mean_weights(is_real), is_forget)
  program = steps.Program(
    model=setup.model, optimizer=optimizer, loss_fn=steps.mean_cross_entropy
  )
  key = jax.random.key(setup.options.seed)

  def run() -> None:
    # The state is donated to the steps, so each call starts from a copy.
    state = training.init_state(setup.variables, optimizer, key)
    state, _ = engine.run_phase(
      program, state, pool, engine.Phase(program.loss_fn, plan)
    )
    jax.block_until_ready(state.variables)

  return run


def _jax_parts(setup: Setup) -> dict[str, Callable[[], Any]]:
  """Returns parts of a step, each a scan over whole minibatches."""
  model, forget_set = setup.model, setup.split.forget
  images, labels = map(jnp.asarray, (forget_set.images, forget_set.labels))
  rows = jnp.asarray(setup.forget_rows)
  key = jax.random.key(setup.options.seed)

  def apply_train(variables: types.Variables, pixels: jax.Array) -> jax.Array:
    return steps.apply_train(model, variables, pixels, key, None)[0]

  def gradient(
    apply_fn: types.ApplyFn, argnums: int
  ) -> Callable[..., chex.ArrayTree]:
    def loss(
      params: chex.ArrayTree,
      pixels: jax.Array,
      variables: types.Variables,
      labels: jax.Array,
    ) -> jax.Array:
      logits = apply_fn({**variables, "params": params}, pixels)
      return training.cross_entropy(logits, labels).mean()

    gradient_fn = jax.grad(loss, argnums)
    return lambda variables, pixels, labels: gradient_fn(
      variables["params"], pixels, variables, labels
    )

  def scan(part_fn: Callable[..., chex.ArrayTree]) -> Callable[[], jax.Array]:
    @jax.jit
    def run(
      variables: types.Variables,
      images: jax.Array,
      labels: jax.Array,
      rows: jax.Array,
    ) -> jax.Array:
      def step(total: jax.Array, batch: jax.Array) -> tuple[jax.Array, None]:
        pixels = training.to_float(images[batch])
        output = part_fn(variables, pixels, labels[batch])
        # Something of everything, or XLA would leave out what is not used.
        sums = [jnp.abs(leaf).sum() for leaf in jax.tree.leaves(output)]
        return total + sum(sums), None

      return jax.lax.scan(step, jnp.float32(0), rows)[0]

    return lambda: run(
      setup.variables, images, labels, rows
    ).block_until_ready()

  return {
    "forward": scan(
      lambda variables, pixels, _: model.apply(variables, pixels)
    ),
    "forward_input_gradient": scan(gradient(model.apply, 1)),
    "forward_training": scan(
      lambda variables, pixels, _: apply_train(variables, pixels)
    ),
    "forward_weight_gradient": scan(gradient(apply_train, 0)),
    "update_step": _jax_steps(
      setup,
      forget_set,
      setup.forget_rows,
      np.ones(setup.forget_rows.shape, bool),
      _sgd(_RELEASED),
    ),
  }


def to_inputs(setup: Setup, images: np.ndarray) -> Any:
  """Standardises as the network in JAX does inside."""
  from experiments import torch_loop

  num_channels = images.shape[-1]
  return torch_loop.to_inputs(
    images,
    mean=np.full(num_channels, _MEAN, np.float32),
    std=np.full(num_channels, _STD, np.float32),
    is_channels_last=setup.options.channels_last,
  )


def _torch_side(setup: Setup) -> dict[str, Callable[[], Any]]:
  """Returns the tasks as PyTorch does them, by name."""
  from experiments import torch_loop

  size = setup.options.batch_size
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "weights.safetensors"
    torch_weights.save(path, setup.variables, model_name=_REFERENCE.model)
    network = torch_loop.load(
      path, is_channels_last=setup.options.channels_last
    )
  frozen = torch_loop.freeze(network)
  inputs, labels = (
    to_inputs(setup, setup.split.forget.images),
    torch_loop.to_integers(setup.split.forget.labels),
  )
  train_inputs, train_labels = (
    to_inputs(setup, setup.train.images),
    torch_loop.to_integers(setup.train.labels),
  )
  train_batches = [
    torch_loop.to_integers(rows[is_real])
    for rows, is_real in zip(setup.rows, setup.is_real, strict=True)
  ]
  return {
    "job": lambda: torch_loop.unlearn(
      network,
      inputs,
      labels,
      learning_rate=_RELEASED.learning_rate,
      momentum=_RELEASED.momentum,
      num_epochs=setup.options.num_passes,
      batch_size=size,
      seed=setup.options.seed,
    ),
    "search": lambda: torch_loop.search(
      frozen, inputs, labels, batch_size=size
    ),
    "update": lambda: torch_loop.train(
      network,
      inputs,
      labels,
      torch_loop.shuffle(len(inputs), size, seed=setup.options.seed),
      **_sgd(_RELEASED),
    ),
    "epoch": lambda: torch_loop.train(
      network,
      train_inputs,
      train_labels,
      train_batches,
      **_sgd(_REFERENCE.training),
    ),
    **torch_loop.parts(
      network,
      inputs,
      labels,
      [torch_loop.to_integers(rows) for rows in setup.forget_rows],
    ),
  }
