"""The steps of a job, each from the run folder to the run folder.

    runs/<name>/config.json     options, versions, device, git commit
    runs/<name>/data.json       classes, counts and the forget request
    runs/<name>/checkpoints/    original, retrained, unlearned; retrained-1 and
                                so on where more references are asked for
    runs/<name>/history.json    curves of the three
    runs/<name>/metrics.json    figures of the three
    runs/<name>/flips.csv       retained images that are wrong now
    runs/<name>/proxies.json    what models say that never saw the forget set
    runs/<name>/*.npz           examples and features for the report
    runs/<name>/report.html

A step that is finished is not done again when the job is resumed.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
  contexts,
  files,
  option_checks,
  recipes,
  requests,
  run_figures,
  run_folder,
  sets,
)
from psg_jax import (
  checkpoints,
  data,
  engine,
  parallel,
  steps,
  torch_weights,
  training,
  types,
  unlearning,
)

# A job under one name, for programs that are not ours.
Context = contexts.Context
MODELS = contexts.MODELS
is_class_request = contexts.is_class_request
standardisation = contexts.standardisation
augment_fn = contexts.augment_fn
check = option_checks.check
stop_target = contexts.stop_target
target_accuracy = contexts.target_accuracy
unlearn_options = contexts.unlearn_options
validation = contexts.validation
evaluate = run_figures.evaluate
table = run_figures.table
REQUEST_FIELDS = run_folder.REQUEST_FIELDS
has_same_request = run_folder.has_same_request
job_options = run_folder.job_options
read_json = run_folder.read_json
run_dir = run_folder.run_dir
write_json = run_folder.write_json

# A long epoch is also kept between its ends.
_SAVE_SECONDS = 120.0
# Of epochs that take less, not each is kept: the last, and one in so long.
EPOCH_SAVE_SECONDS = 5.0


def prepare(
  job: recipes.Job,
  *,
  is_known_run: bool = False,
  may_change: tuple[str, ...] = (),
  source: pathlib.Path | None = None,
  is_read_only: bool = False,
) -> contexts.Context:
  """Loads the data, splits it, and makes the run folder.

  Args:
    job: The options.
    is_known_run: Whether the run folder is expected to exist.
    may_change: Options that may differ from those of the run that exists.
    source: Another run, whose trained models a new run folder starts with.
    is_read_only: Whether to leave the records of the run that exists alone.

  Returns:
    What the steps share.

  Raises:
    ValueError: If an option is wrong, the data is missing, another process
      works on the run folder, or it exists and is not to be resumed; nothing is
      written then.
  """
  check(job)
  folder = run_folder.run_dir(job)
  with contextlib.ExitStack() as stack:
    if not is_read_only:
      hold = stack.enter_context(
        files.lock(
          folder,
          argument="name",
          hint=f"--resume goes on with {folder}",
        )
      )
      stack.callback(run_folder.settle)
      run_folder.settle()
      if sets.is_path(job.dataset, job.data_dir):
        hold.note = (
          f"copies of your images are kept in {data.root_dir(job.data_dir)}:"
          " python -m data_prep.cache lists and removes them"
        )
    context = _prepare(
      job, folder, is_known_run, may_change, source, is_read_only
    )
    files.at_end.push(stack.pop_all())
  return context


def _prepare(
  job: recipes.Job,
  folder: pathlib.Path,
  is_known_run: bool,
  may_change: tuple[str, ...],
  source: pathlib.Path | None,
  is_read_only: bool,
) -> contexts.Context:
  if job.resume and job.overwrite:
    raise ValueError("overwrite must be off to resume a run, got both")
  if folder.exists() and not (job.resume or job.overwrite or is_known_run):
    raise ValueError(
      f"name must be that of a new run, got {folder}, which exists: choose"
      " another name, add --resume to go on, or --overwrite to replace it"
    )
  if job.weights is not None and not pathlib.Path(job.weights).is_file():
    raise ValueError(f"weights must be a file, got {job.weights}")
  is_kept = folder.exists() and not job.overwrite
  is_earlier = run_folder.is_earlier(folder if is_kept else source)
  context, num_read = _loaded(job, folder, is_earlier)
  unlearning.check_labels(
    job.unlearning.labels, job.unlearning.top_k, context.train.num_classes
  )
  if contexts.stop_target(context) == "proxy" and math.isinf(
    contexts.proxy_cost(context)
  ):
    raise ValueError(
      "unlearning.num_proxies must leave each an image a class, got"
      f" {job.unlearning.num_proxies} of {len(context.split.retain)} retained"
      " images"
    )
  contexts.passes(context)
  if job.weights is not None:
    _imported(context)
  if job.pretrained is not None:
    fresh_state(context, "original")
  record = run_figures.data_record(context, num_read)
  if source is not None or is_kept:
    run_folder.check_same_job(source or folder, job, may_change)
    run_folder.check_same_data(source or folder, record, may_change)
  if not is_read_only:
    _write(context, source, record)
  return context


def _loaded(
  job: recipes.Job, folder: pathlib.Path, is_earlier: bool
) -> tuple[contexts.Context, int]:
  """Loads the images and splits them; says how many were read."""
  loaded = sets.load(job)
  num_read = len(loaded.train) + len(loaded.test)
  return assemble(job, folder, loaded, is_earlier=is_earlier), num_read


def assemble(
  job: recipes.Job,
  folder: pathlib.Path,
  loaded: sets.Loaded,
  *,
  is_earlier: bool = False,
) -> contexts.Context:
  """Returns what the steps of a job share, with images that are loaded.

  Args:
    job: The options.
    folder: Of what is to be written.
    loaded: The images.
    is_earlier: Whether references standardise as the original does, as those
      of an earlier version.

  Raises:
    ValueError: If there are fewer images than the job asks for, or the request
      matches none.
  """
  mesh = parallel.create_mesh(job.num_devices)
  train, test, source_files = loaded
  if job.num_train is not None:
    if job.num_train > len(train):
      raise ValueError(
        f"num_train must be at most the {len(train)} images there are, got"
        f" {job.num_train}"
      )
    train = data.subset(train, job.num_train)
  request = requests.ask(job, train, test)
  retrained_model = None
  if not is_earlier:
    # What was to be forgotten must not reach it in a mean either.
    retrained_model = contexts.network(job, request.split.retain)
  return contexts.Context(
    job=job,
    run_dir=folder,
    train=train,
    test=test,
    selection=request,
    model=contexts.network(job, train),
    mesh=mesh if mesh.size > 1 else None,
    source=source_files,
    retrained_model=retrained_model,
  )


def _write(
  context: contexts.Context,
  source: pathlib.Path | None,
  record: dict[str, Any],
) -> None:
  """Makes the run folder, and writes what it is of."""
  job, folder = context.job, context.run_dir
  config = run_folder.config(context)
  if job.overwrite and folder.exists():
    if job.weights is not None and folder.resolve() in (
      pathlib.Path(job.weights).resolve().parents
    ):
      raise ValueError(
        f"weights must not lie in the run to overwrite, got {job.weights}"
      )
    run_folder.set_aside(folder)
  if source is not None and not folder.exists():
    is_same = run_folder.has_same_request(source, job, context.split)
    run_folder.copy_run(source, folder, is_same_request=is_same)
  folder.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(folder / "config.json", config)
  run_folder.write_json(folder / "data.json", record)
  context.selection.request.to_json(folder / "request.json")
  forget_ids = np.asarray(context.split.forget.ids).tolist()
  run_folder.write_json(folder / "forget_ids.json", forget_ids)
  run_figures.save_twins(context)


def announce(context: contexts.Context) -> str:
  """Says what is about to be forgotten, and which images have twins."""
  result = context.selection
  lines = [str(result.preview)]
  if context.job.weights is not None:
    taken = torch_weights.describe(
      context.job.weights, model_name=context.job.model
    )
    lines.insert(0, f"weights: {taken}")
  if result.twins is not None and (result.twins.pairs or result.twins.groups):
    lines.append(str(result.twins))
  num_test = len(result.test_split.forget)
  if num_test:
    lines.append(
      f"{num_test} test images match as well: unseen, they are not forgotten"
    )
  if len(result.moved):
    lines.append(f"{len(result.moved)} twins were moved into the forget set")
  return "\n".join(lines)


def original(context: contexts.Context) -> types.Variables:
  """Trains the original model, or imports it, or finds it in the run."""
  job = context.job
  if job.weights is None:
    return _trained(context, "original", context.train)
  variables = _imported(context)
  optimizer = contexts.optimizer(job.training)
  state = training.init_state(
    variables, optimizer, contexts.model_key(context, "original")
  )
  if not _is_finished(context, "original"):
    save(context, "original", state, [], 0.0)
  return state.variables


def retrained(
  context: contexts.Context, name: str = "retrained"
) -> types.Variables:
  """Trains a reference: a fresh model on the retained images alone.

  Args:
    context: The job.
    name: `retrained`, or `retrained-1` and so on, which is what the retrained
      model is with the seed that many after the job's.
  """
  return _trained(context, name, context.split.retain)


def references(context: contexts.Context) -> dict[str, types.Variables]:
  """Trains all references: `retrained`, and `retrained-1` and so on."""
  numbers = range(1, context.job.references)
  names = ("retrained", *(f"retrained-{number}" for number in numbers))
  return {name: retrained(context, name) for name in names}


def unlearned(
  context: contexts.Context, original_variables: types.Variables
) -> types.Variables:
  """Takes the forget set out of the original model."""
  options = context.job.unlearning
  optimizer = contexts.optimizer(options)
  if _is_finished(context, "unlearned"):
    target = _unmoved(context, original_variables)
    return _restore(context, "unlearned", target).variables
  last_state: list[training.TrainState] = []

  def keep(state: training.TrainState, record: dict[str, Any]) -> None:
    del record
    last_state[:] = [copy_state(state)]

  start = time.perf_counter()
  aim = contexts.aim(context, original_variables, show_progress=True)
  if aim.proxies is not None:
    print(aim.proxies)
    run_folder.write_json(
      context.run_dir / "proxies.json", aim.proxies.as_dict()
    )
  elif aim.accuracy is None and contexts.stop_target(context) == "unseen":
    print(
      "There are no unseen images to tell when to stop: all passes are made"
      " (--unseen names images that the model was not trained on)."
    )
  output = unlearning.unlearn(
    context.model,
    original_variables,
    context.split,
    contexts.model_key(context, "unlearned"),
    **contexts.unlearn_options(context),
    **aim.options(),
    optimizer=optimizer,
    callback=keep,
    mesh=context.mesh,
  )
  seconds = time.perf_counter() - start
  relabelling = output.relabelling
  if relabelling is None:
    # For the report: these targets needed no search.
    relabelling = _searched(context, original_variables)
  files.save_arrays(
    context.run_dir / "relabelling.npz",
    {
      "ids": np.asarray(context.split.forget.ids),
      **dataclasses.asdict(relabelling),
    },
  )
  run_figures.save_examples(context, original_variables)
  if not last_state:
    print(
      f"Nothing was changed: {_reason(aim)} (--unlearning.target zero forgets"
      " them nevertheless)."
    )
    last_state.append(_unmoved(context, output.variables))
  save(context, "unlearned", last_state[-1], output.history, seconds)
  return output.variables


def _unmoved(
  context: contexts.Context, variables: types.Variables
) -> training.TrainState:
  """Initialises the state that unlearning begins with."""
  trainable = contexts.passes(context).trainable
  return steps.init_state(
    variables,
    contexts.optimizer(context.job.unlearning),
    contexts.model_key(context, "unlearned"),
    trainable=engine.read_trainable(trainable, variables)[0],
  )


def _searched(
  context: contexts.Context, original_variables: types.Variables
) -> unlearning.Relabelling:
  """Searches the boundary of the original for all forget images."""
  options = contexts.unlearn_options(context)
  return unlearning.relabel(
    context.model.apply,
    original_variables,
    context.split.forget,
    contexts.model_key(context, "unlearned"),
    search_fn=options["search_fn"] or unlearning.search_of(options),
    batch_size=options["search_batch_size"],
    mesh=context.mesh,
  )


def _reason(aim: contexts.Aim) -> str:
  """Why the original was left as it is."""
  if aim.proxies is not None:
    return (
      f"the original is right on {100 * aim.proxies.original_accuracy:.1f} % of"
      " the images to forget, as a model that never saw them may be"
    )
  return (
    f"the original is right on {100 * (aim.accuracy or 0):.1f} % of unseen"
    " images of the same kind, and no more often on those to forget"
  )


def copy_state(state: training.TrainState) -> training.TrainState:
  """Copies a state out of the reach of donation."""
  return jax.tree.map(jnp.copy, state)


def fresh_state(context: contexts.Context, name: str) -> training.TrainState:
  """Initialises a model and its optimiser."""
  init_key, train_key = jax.random.split(contexts.model_key(context, name))
  shape = (1, *context.train.images.shape[1:])
  variables = context.model.init(init_key, jnp.zeros(shape))
  if context.job.pretrained is not None:
    try:
      variables = torch_weights.load_backbone(
        context.job.pretrained, variables, model_name=context.job.model
      )
    except ValueError as error:
      raise ValueError(f"pretrained: {error}") from None
  return training.init_state(
    variables, contexts.optimizer(context.job.training), train_key
  )


class _Training:
  """A training that is under way, kept beside the finished ones.

  Nobody takes it for one of them, and a resumed run goes on from it.
  """

  def __init__(
    self, path: pathlib.Path, num_steps: int, num_epochs: int
  ) -> None:
    self._path, self._num_steps = path, num_steps
    self._num_epochs = num_epochs
    self._start = self._saved = time.monotonic()
    # Seconds of this epoch before the run was resumed.
    self._before = 0.0
    self.history: training.History = []

  def restore(self, state: training.TrainState) -> training.TrainState:
    """Returns the state that was kept, or this one where there is none."""
    if not checkpoints.exists(self._path):
      return state
    kept: training.TrainState = checkpoints.restore(self._path, target=state)
    metadata = checkpoints.metadata(self._path)
    self.history = metadata["history"]
    self._before = metadata.get("seconds_within", 0.0)
    return kept

  def _save(self, state: training.TrainState, seconds_within: float) -> None:
    checkpoints.save(
      self._path,
      state,
      metadata={"history": self.history, "seconds_within": seconds_within},
      overwrite=True,
    )
    run_folder.settle()
    self._saved = time.monotonic()

  def keep(self, state: training.TrainState, record: dict[str, Any]) -> None:
    """Keeps the state after an epoch."""
    # Of an epoch that was gone on with, also what came before.
    record["seconds"] += self._before
    self.history.append(record)
    is_last = len(self.history) == self._num_epochs
    if is_last or time.monotonic() - self._saved > EPOCH_SAVE_SECONDS:
      self._save(state, 0.0)
    self._before, self._start = 0.0, time.monotonic()

  def keep_within(self, state: training.TrainState) -> None:
    """Keeps the state within an epoch, now and then."""
    # The end of an epoch is kept with its record, by what comes next.
    is_end = int(state.step) % self._num_steps == 0
    if not is_end and time.monotonic() - self._saved > _SAVE_SECONDS:
      seconds = self._before + time.monotonic() - self._start
      self._save(state, seconds)


def _trained(
  context: contexts.Context, name: str, dataset: types.Dataset
) -> types.Variables:
  context, options = context.of(name), context.job.training
  state = fresh_state(context, name)
  partial = context.run_dir / f"{name}.partial"
  if _is_finished(context, name):
    # There is one if the process was killed before it was removed.
    checkpoints.remove(partial, is_missing_ok=True)
    return _restore(context, name, state).variables
  num_steps = -(-len(dataset) // options.batch_size)
  under_way = _Training(partial, num_steps, options.num_epochs)
  state = under_way.restore(state)
  if len(under_way.history) < options.num_epochs:
    training.fit(
      context.model,
      state.variables,
      dataset,
      state.key,
      optimizer=contexts.optimizer(context.job.training),
      num_epochs=options.num_epochs,
      batch_size=options.batch_size,
      schedule=options.schedule,
      augment_fn=augment_fn(options.augmentation),
      callback=under_way.keep,
      step_callback=under_way.keep_within,
      num_parts=options.num_parts,
      state=state,
      mesh=context.mesh,
      description=f"training {name}",
    )
  history = under_way.history
  state = checkpoints.restore(partial, target=fresh_state(context, name))
  seconds = sum(record["seconds"] for record in history)
  save(context, name, state, history, seconds)
  checkpoints.remove(partial)
  return state.variables


def save(
  context: contexts.Context,
  name: str,
  state: training.TrainState,
  history: training.History,
  seconds: float,
) -> None:
  """Keeps a model that is finished, with its history."""
  path = context.run_dir / "history.json"
  records = run_folder.read_json(path)
  records |= {name: history, f"{name}_seconds": seconds}
  run_folder.write_json(path, records)
  checkpoints.save_run(
    context.run_dir,
    name,
    state,
    metadata={
      "job": run_folder.job_options(context.job),
      "class_names": list(context.train.class_names),
    },
    overwrite=True,
  )
  run_folder.settle()


def _restore(
  context: contexts.Context, name: str, target: training.TrainState
) -> training.TrainState:
  state: training.TrainState = checkpoints.restore_run(
    context.run_dir, name, target=target
  )
  return state


def _is_finished(context: contexts.Context, name: str) -> bool:
  return name in checkpoints.run_checkpoints(context.run_dir)


def _imported(context: contexts.Context) -> types.Variables:
  """Loads the weights that the job names, if they are this model's."""
  job = context.job
  assert job.weights is not None
  try:
    variables = torch_weights.load(job.weights, model_name=job.model)
  except ValueError as error:
    raise ValueError(f"weights: {error}") from None
  shape = (1, *context.train.images.shape[1:])
  expected = jax.eval_shape(
    context.model.init, jax.random.key(0), jnp.zeros(shape)
  )
  misfit = torch_weights.misfit(variables, expected, model_name=job.model)
  if misfit is not None:
    raise ValueError(
      f"weights must be those of {job.model} at width {job.width} with"
      f" {context.train.num_classes} classes and {shape[-1]} channels, as the"
      f" data has, got in {job.weights} {misfit}"
    )
  return variables
