"""The steps of a job, each from the run folder to the run folder.

    runs/<name>/config.json     options, versions, device, git commit
    runs/<name>/data.json       classes, counts and the forget request
    runs/<name>/checkpoints/    original, retrained, unlearned; retrained-1 and
                                so on where more references are asked for
    runs/<name>/history.json    curves of the three
    runs/<name>/metrics.json    figures of the three
    runs/<name>/flips.csv       retained images that are wrong now
    runs/<name>/*.npz           examples and features for the report
    runs/<name>/report.html

A step that is finished is not done again when the job is resumed.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
import types as types_lib
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import psg_jax
from experiments import (
  files,
  read_out,
  recipes,
  requests,
  sets,
)
from experiments.pages import yardstick as yardstick_page
from psg_jax import (
  augment,
  boundary,
  checkpoints,
  checks,
  data,
  evaluation,
  forget,
  inference,
  metrics,
  models,
  parallel,
  torch_weights,
  training,
  types,
  unlearning,
)

MODELS = ("original", "retrained", "unlearned")
# What is to be forgotten: another request can be made of the same original.
REQUEST_FIELDS = (
  "forget_classes",
  "where",
  "ids",
  "fraction",
  "request_seed",
  "group",
  "request",
  "twins",
  "by",
)
_NUM_EXAMPLES = 8
_NUM_FEATURES = 600
_NUM_TWINS = 8
_VALIDATION_SEED = 0
_RETAINED = "retained images"
# More of the accuracy on retained images than this is not lost unsaid.
_GREAT_LOSS = 0.05
# A long epoch is also kept between its ends.
_SAVE_SECONDS = 120.0
# Of epochs that take less, not each is kept: the last, and one in so long.
EPOCH_SAVE_SECONDS = 5.0
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "tensorflow-datasets",
  "numpy",
)


class Context(NamedTuple):
  """What the steps of a job share.

  Attributes:
    job: The options.
    run_dir: The run folder.
    train: The training set.
    test: The test set.
    asked: What is to be forgotten: the request, its split and preview.
    model: The network.
    mesh: The devices; None for one.
    source: What became of every file of the data set; see `sets.Loaded`.
    retrained_model: The references' network, where its standardisation, that of
      the retained images, is another; None for `model`.
  """

  job: recipes.Job
  run_dir: pathlib.Path
  train: types.Dataset
  test: types.Dataset
  asked: requests.Asked
  model: types.Model
  mesh: jax.sharding.Mesh | None
  source: Mapping[str, Any] = types_lib.MappingProxyType({})
  retrained_model: types.Model | None = None

  def of(self, name: str) -> "Context":
    """Returns the context with the network of this model."""
    if self.retrained_model is None or not name.startswith("retrained"):
      return self
    return self._replace(model=self.retrained_model)

  @property
  def split(self) -> types.Split:
    """Forget and retain set of the training set."""
    return self.asked.split

  @property
  def parts(self) -> dict[str, types.Dataset]:
    """The four parts that figures are computed of."""
    shown, _ = validation(self)
    return {
      "train_forget": self.asked.split.forget,
      "train_retain": self.asked.split.retain,
      "test_forget": shown.forget,
      "test_retain": shown.retain,
    }


def run_dir(job: recipes.Job) -> pathlib.Path:
  """Returns the job's run folder."""
  return pathlib.Path(job.runs_dir) / (job.name or job.recipe)


def check(job: recipes.Job) -> None:
  """Raises ValueError for what can be seen wrong before any work."""
  checks.one_of("model", job.model, models.names())
  checks.number("width", job.width, above=0)
  checks.integer("seed", job.seed, at_least=0)
  for name in ("num_train", "num_devices", "references", "eval_batch_size"):
    if getattr(job, name) is not None:
      checks.integer(name, getattr(job, name), at_least=1)
  for part in ("training", "unlearning"):
    options = getattr(job, part)
    checks.number(f"{part}.learning_rate", options.learning_rate, above=0)
    checks.number(f"{part}.momentum", options.momentum, at_least=0, below=1)
    checks.number(f"{part}.weight_decay", options.weight_decay, at_least=0)
    if options.num_epochs is not None:
      checks.integer(f"{part}.num_epochs", options.num_epochs, at_least=1)
    checks.integer(f"{part}.batch_size", options.batch_size, at_least=1)
    checks.integer(f"{part}.num_parts", options.num_parts, at_least=1)
  options = job.unlearning
  for name in ("num_steps", "search_batch_size"):
    checks.integer(f"unlearning.{name}", getattr(options, name), at_least=1)
  checks.number("unlearning.step_size", options.step_size, above=0)
  for name in ("distance_weight", "noise_scale", "retain_weight"):
    value = getattr(options, name)
    checks.number(f"unlearning.{name}", value, at_least=0)
  if options.max_distance is not None:
    checks.number("unlearning.max_distance", options.max_distance, above=0)
  if options.confidence is not None:
    confidence = options.confidence
    checks.number("unlearning.confidence", confidence, at_least=0, below=1)
  sets.check(job)
  requests.build(job)


def prepare(
  job: recipes.Job,
  *,
  is_known_run: bool = False,
  may_change: tuple[str, ...] = (),
  source: pathlib.Path | None = None,
  is_read_only: bool = False,
) -> Context:
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
  folder = run_dir(job)
  with contextlib.ExitStack() as stack:
    if not is_read_only:
      hold = stack.enter_context(
        files.lock(
          folder,
          argument="name",
          hint=f"--resume goes on with {folder}",
        )
      )
      stack.callback(_settle)
      _settle()
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
) -> Context:
  if job.resume and job.overwrite:
    raise ValueError("overwrite must be off to resume a run, got both")
  if folder.exists() and not (job.resume or job.overwrite or is_known_run):
    raise ValueError(
      f"name must be that of a new run, got {folder}, which exists: choose"
      " another name, add --resume to go on, or --overwrite to replace it"
    )
  if job.weights is not None and not pathlib.Path(job.weights).is_file():
    raise ValueError(f"weights must be a file, got {job.weights}")
  mesh = parallel.create_mesh(job.num_devices)
  train, test, source_files = sets.load(job)
  num_read = len(train) + len(test)
  if job.num_train is not None:
    if job.num_train > len(train):
      raise ValueError(
        f"num_train must be at most the {len(train)} images there are, got"
        f" {job.num_train}"
      )
    train = data.subset(train, job.num_train)
  asked = requests.ask(job, train, test)
  is_kept = folder.exists() and not job.overwrite
  is_earlier = _is_earlier(folder if is_kept else source)
  context = Context(
    job=job,
    run_dir=folder,
    train=train,
    test=test,
    asked=asked,
    model=_model(job, train),
    mesh=mesh if mesh.size > 1 else None,
    source=source_files,
    # What was to be forgotten must not reach it in a mean either.
    retrained_model=None if is_earlier else _model(job, asked.split.retain),
  )
  unlearning.check_labels(
    job.unlearning.labels, job.unlearning.top_k, train.num_classes
  )
  if job.weights is not None:
    _imported(context)
  if job.pretrained is not None:
    _fresh_state(context, "original")
  record = _data_record(context, num_read)
  if source is not None or (folder.exists() and not job.overwrite):
    _check_same_job(source or folder, job, may_change)
    _check_same_data(source or folder, record, may_change)
  if is_read_only:
    return context
  config = _config(context)
  if job.overwrite and folder.exists():
    if job.weights is not None and folder.resolve() in (
      pathlib.Path(job.weights).resolve().parents
    ):
      raise ValueError(
        f"weights must not lie in the run to overwrite, got {job.weights}"
      )
    _set_aside(folder)
  if source is not None and not folder.exists():
    is_same = has_same_request(source, job, context.split)
    _copy_run(source, folder, is_same_request=is_same)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", config)
  write_json(folder / "data.json", record)
  context.asked.request.to_json(folder / "request.json")
  forget_ids = np.asarray(context.split.forget.ids).tolist()
  write_json(folder / "forget_ids.json", forget_ids)
  _save_twins(context)
  return context


def standardisation(
  job: recipes.Job, dataset: types.Dataset
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns mean and deviation that a model of this data standardises with."""
  if job.mean is not None and job.std is not None:
    return job.mean, job.std
  mean, std = data.mean_and_std(dataset)
  return (
    mean if job.mean is None else job.mean,
    std if job.std is None else job.std,
  )


def _model(job: recipes.Job, dataset: types.Dataset) -> types.Model:
  """Returns the network of a model that is trained on this data."""
  mean, std = standardisation(job, dataset)
  return models.create(
    job.model,
    num_classes=dataset.num_classes,
    num_channels=dataset.images.shape[-1],
    width=job.width,
    dropout=job.dropout,
    dtype=job.precision,
    is_rematerialised=job.rematerialise,
    mean=mean,
    std=std,
  )


def announce(context: Context) -> str:
  """Says what is about to be forgotten, and which images have twins."""
  asked = context.asked
  lines = [str(asked.preview)]
  if context.job.weights is not None:
    taken = torch_weights.describe(
      context.job.weights, model_name=context.job.model
    )
    lines.insert(0, f"weights: {taken}")
  if asked.twins is not None and (asked.twins.pairs or asked.twins.groups):
    lines.append(str(asked.twins))
  num_test = len(asked.test_split.forget)
  if num_test:
    lines.append(
      f"{num_test} test images match as well: unseen, they are not forgotten"
    )
  if len(asked.moved):
    lines.append(f"{len(asked.moved)} twins were moved into the forget set")
  return "\n".join(lines)


def original(context: Context) -> types.Variables:
  """Trains the original model, or imports it, or finds it in the run."""
  job = context.job
  if job.weights is None:
    return _trained(context, "original", context.train)
  variables = _imported(context)
  optimizer = _training_optimizer(job)
  state = training.init_state(variables, optimizer, _key(context, "original"))
  if not _is_finished(context, "original"):
    _save(context, "original", state, [], 0.0)
  return state.variables


def retrained(context: Context) -> types.Variables:
  """Trains the reference: a fresh model on the retained images alone."""
  return _trained(context, "retrained", context.split.retain)


def references(context: Context) -> dict[str, types.Variables]:
  """Trains all references: `retrained`, and `retrained-1` and so on.

  The last ones are what the retrained model is with the seeds after the job's.
  """
  names = [f"retrained-{number}" for number in range(context.job.references)]
  return {
    name: _trained(context, name, context.split.retain)
    for name in ("retrained", *names[1:])
  }


def unlearned(
  context: Context, original_variables: types.Variables
) -> types.Variables:
  """Takes the forget set out of the original model."""
  options = context.job.unlearning
  optimizer = training.sgd(
    options.learning_rate,
    momentum=options.momentum,
    weight_decay=options.weight_decay,
  )
  if _is_finished(context, "unlearned"):
    target = training.init_state(
      original_variables, optimizer, _key(context, "unlearned")
    )
    return _restore(context, "unlearned", target).variables
  last_state: list[training.TrainState] = []

  def keep(state: training.TrainState, record: dict[str, Any]) -> None:
    del record
    last_state[:] = [copy_state(state)]

  start = time.perf_counter()
  aim = target_accuracy(context, original_variables)
  if aim is None and stop_target(context) == "unseen":
    print(
      "There are no unseen images to tell when to stop: all passes are made"
      " (--unseen names images that the model was not trained on)."
    )
  output = unlearning.unlearn(
    context.model,
    original_variables,
    context.split,
    _key(context, "unlearned"),
    **unlearn_options(context),
    target_accuracy=aim,
    optimizer=optimizer,
    callback=keep,
    mesh=context.mesh,
  )
  seconds = time.perf_counter() - start
  relabelling = output.relabelling
  assert relabelling is not None  # This method searches.
  files.save_arrays(
    context.run_dir / "relabelling.npz",
    {
      "ids": np.asarray(context.split.forget.ids),
      **dataclasses.asdict(relabelling),
    },
  )
  _save_examples(context, original_variables)
  if not last_state:
    print(
      "Nothing was changed: the original is right on"
      f" {100 * (aim or 0):.1f} % of unseen images of the same kind, and no"
      " more often on those to forget (--unlearning.target zero forgets them"
      " nevertheless)."
    )
    key = _key(context, "unlearned")
    last_state.append(training.init_state(output.variables, optimizer, key))
  _save(context, "unlearned", last_state[-1], output.history, seconds)
  return output.variables


def is_class_request(context: Context) -> bool:
  """Whether whole classes are forgotten, whose ideal accuracy is 0."""
  return context.asked.is_class_request


def stop_target(context: Context) -> Literal["zero", "unseen"]:
  """Returns the unlearning's target with `auto` resolved: zero or unseen."""
  target = context.job.unlearning.target
  if target != "auto":
    return target
  return "zero" if is_class_request(context) else "unseen"


def validation(
  context: Context,
) -> tuple[types.Split, types.Dataset | None]:
  """Sets apart the unseen images that say when unlearning is to stop.

  The original has seen its training images, so that they must be test images:
  a half, of each class or of whole groups where the request has groups, of
  those that match the request, or, where there are not enough, of the others.
  No figure is computed of them.

  Args:
    context: What the steps share.

  Returns:
    The test images of which figures are computed, and those set apart; None
    where unlearning does not stop at an accuracy, or there are too few.
  """
  shown = context.asked.test_split
  if stop_target(context) == "zero":
    return shown, None
  group = context.asked.request.group
  for name in ("forget", "retain"):
    part = getattr(shown, name)
    if group is None:
      units, can_part = None, np.bincount(part.labels, minlength=1).max() > 1
    else:
      units = forget.group_codes(part, group)
      can_part = len(np.unique(units)) > 1
    if can_part:
      rest, held = data.hold_out(part, 0.5, _VALIDATION_SEED, units)
      return shown._replace(**{name: rest}), held
  return shown, None


def target_accuracy(
  context: Context, original_variables: types.Variables
) -> float | None:
  """Returns the accuracy on the forget set that unlearning is to stop at.

  Args:
    context: What the steps share.
    original_variables: The original model's.

  Returns:
    The original's accuracy on the images of `validation`: those that match the
    request, or, where there are none, in the forget set's mixture of classes;
    of a class that is not retained at all, none is to be right. None where all
    is to be forgotten, or there is no such image.
  """
  shown, held = validation(context)
  if held is None:
    return None
  whole = evaluation.whole_classes(context.split)
  logits = _predict(context, original_variables, held.images)
  if len(shown.forget) < len(context.asked.test_split.forget):
    is_right = np.argmax(logits, -1) == held.labels
    return float(np.mean(is_right & ~np.isin(held.labels, whole)))
  by_class = metrics.per_class_accuracy(logits, held.labels)
  found = [
    0.0 if label in whole else by_class[label]
    for label in context.split.forget.labels
  ]
  known = [value for value in found if value is not None]
  return float(np.mean(known)) if known else None


def _predict(
  context: Context, variables: types.Variables, images: np.ndarray
) -> np.ndarray:
  """Computes logits, as many images at a time as the job says."""
  logits: np.ndarray = inference.predict(
    context.model.apply,
    variables,
    images,
    batch_size=context.job.eval_batch_size,
    mesh=context.mesh,
  )
  return logits


def search_fn(context: Context) -> unlearning.SearchFn | None:
  """The released code's search where the job asks for it, else None."""
  options = context.job.unlearning
  if options.search != "released":
    return None
  mean, std = standardisation(context.job, context.train)
  return functools.partial(
    boundary.released_code_search,
    model_mean=mean,
    model_std=std,
    step_size=options.step_size,
    distance_weight=options.distance_weight,
    noise_scale=options.noise_scale,
  )


def unlearn_options(context: Context) -> dict[str, Any]:
  """Keyword arguments of `unlearning.unlearn` that the job sets."""
  options = dataclasses.asdict(context.job.unlearning)
  for name in ("learning_rate", "momentum", "weight_decay"):
    del options[name]
  # The released search depends on its minibatch, which is that of its update.
  del options["target"]
  if options.pop("search") == "released":
    options["search_batch_size"] = options["batch_size"]
  return {
    **options,
    "search_fn": search_fn(context),
    "eval_batch_size": context.job.eval_batch_size,
  }


def evaluate(
  context: Context, variables: dict[str, types.Variables]
) -> dict[str, Any]:
  """Computes and writes the figures of the models, and the features.

  Args:
    context: What the steps share.
    variables: The models' variables, by name; of further references
      (`references`) the yardstick alone is computed.

  Returns:
    The content of `metrics.json`.
  """
  parts = context.parts
  labels = {name: part.labels for name, part in parts.items()}
  logits = {
    name: {
      part: _predict(context.of(name), each, dataset.images)
      for part, dataset in parts.items()
    }
    for name, each in variables.items()
  }
  reference = logits.get("retrained")
  retrained = [x for name, x in logits.items() if name.startswith("retrained")]
  variables = {name: variables[name] for name in MODELS if name in variables}
  logits = {name: logits[name] for name in variables}
  values = {
    (name, column): requests.values(part, column)
    for name, part in parts.items()
    for column in context.asked.columns
  }
  records = read_json(context.run_dir / "history.json")
  result = {}
  for name in variables:
    compared = reference if name != "retrained" else None
    result[name] = {
      **metrics.evaluate(logits[name], labels, compared),
      "by": _accuracy_by(logits[name], labels, values),
      "seconds": records[f"{name}_seconds"],
    }
  if "unlearned" in result:
    searches = [x for x in records["unlearned"] if "search_seconds" in x]
    result["unlearned"] |= {
      "search_seconds": sum(x["search_seconds"] for x in searches),
      "update_seconds": sum(x["seconds"] for x in records["unlearned"]),
      "num_passes": len(records["unlearned"]),
      "relabelling": _relabelling_record(
        context, None if reference is None else reference["train_forget"]
      ),
    }
  for name, lines in _warnings(result, labels).items():
    result[name]["warnings"] = lines
  if "original" in logits:
    _read_out(context, logits, records, result)
  if retrained and {"original", "unlearned"} <= set(logits):
    result["unlearned"]["yardstick"] = read_out.yardstick(
      parts,
      {name: logits[name] for name in ("original", "unlearned")},
      retrained,
      context.asked.request.group,
    )
  _save_features(context, variables)
  write_json(context.run_dir / "metrics.json", result)
  return result


def table(result: dict[str, Any]) -> str:
  """Formats the accuracies and times of the models as text."""
  splits = (
    "train_forget",
    "train_retain",
    "test_forget",
    "test_retain",
    "test",
  )

  def cell(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"

  lines = [
    f"{'':12}" + "".join(f"{name:>14}" for name in splits) + f"{'seconds':>10}"
  ]
  for name, figures in result.items():
    cells = [cell(figures["accuracy"][split]) for split in splits]
    lines.append(
      f"{name:12}"
      + "".join(f"{text:>14}" for text in cells)
      + f"{figures['seconds']:>10.1f}"
    )
  for name, figures in result.items():
    for title, of in (
      ("same prediction as the retrained model", "agreement"),
      ("KL(retrained || model), nats", "kl_divergence"),
    ):
      if of in figures:
        lines.append(
          f"{name}: {title}, test forget {cell(figures[of]['test_forget'])},"
          f" test retain {cell(figures[of]['test_retain'])}"
        )
  for name, figures in result.items():
    lines += [f"warning: {name}: {x}" for x in figures.get("warnings", ())]
  measured = result.get("unlearned", {}).get("yardstick")
  if measured is not None:
    lines += yardstick_page.sentences(measured)
  return "\n".join(lines)


def _warnings(
  result: dict[str, Any], labels: dict[str, np.ndarray]
) -> dict[str, list[str]]:
  """Says which models are at chance, and whether what is retained was lost.

  Args:
    result: The figures by model.
    labels: By part.
  """
  found: dict[str, list[str]] = {name: [] for name in result}
  every = np.concatenate([labels["test_forget"], labels["test_retain"]])
  for name, figures in result.items():
    # A model that was made without a class is not asked for it.
    split = "test" if name == "original" else "test_retain"
    truth = every if name == "original" else labels["test_retain"]
    accuracy, shares = figures["accuracy"][split], np.bincount(truth)
    if accuracy is None or np.count_nonzero(shares) < 2:
      continue
    chance = float(shares.max() / len(truth))
    error = np.sqrt(chance * (1 - chance) / len(truth))
    if accuracy <= chance + 2 * error:
      found[name].append(
        f"right on {accuracy:.3f} of the {split} images, no more than who"
        f" always says the most frequent class ({chance:.3f})"
      )
  for split in ("test_retain", "train_retain"):
    if not {"original", "unlearned"} <= set(result):
      break
    before, after = (
      result[name]["accuracy"][split] for name in ("original", "unlearned")
    )
    if before is not None and before - after > _GREAT_LOSS:
      found["unlearned"].append(
        f"accuracy on {split} fell from {before:.3f} to {after:.3f}: what was"
        " to be kept was lost too"
      )
      break
  return found


def job_options(job: recipes.Job) -> dict[str, Any]:
  """Returns the options of a job, less what a program adds to them."""
  options = dataclasses.asdict(job)
  fields = [field.name for field in dataclasses.fields(recipes.Job)]
  return {name: options[name] for name in fields}


def copy_state(state: training.TrainState) -> training.TrainState:
  """Copies a state out of the reach of donation."""
  return jax.tree.map(jnp.copy, state)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file at once or not at all."""
  files.write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """As `files.read_json`; an empty dictionary where there is none."""
  return files.read_json(path) if path.exists() else {}


def _key(context: Context, name: str) -> jax.Array:
  # Each model has a seed of its own: the retrained model is no rerun.
  model, _, number = name.partition("-")
  return jax.random.fold_in(
    jax.random.key(context.job.seed + int(number or 0)), MODELS.index(model)
  )


def _training_optimizer(job: recipes.Job) -> Any:
  return training.sgd(
    job.training.learning_rate,
    momentum=job.training.momentum,
    weight_decay=job.training.weight_decay,
  )


def _fresh_state(context: Context, name: str) -> training.TrainState:
  init_key, train_key = jax.random.split(_key(context, name))
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
    variables, _training_optimizer(context.job), train_key
  )


@functools.lru_cache
def augment_fn(name: str) -> augment.AugmentFn | None:
  """Returns the augmentation of this name, the same object each time."""
  return {
    "none": None,
    "flip": augment.flip(),
    "crop_flip": augment.chain(augment.crop(4), augment.flip()),
    "medical": augment.medical(),
  }[name]


class _Clock:
  """When an epoch began, what it took before a resume, and the last save."""

  def __init__(self) -> None:
    self.start = self.saved = time.monotonic()
    self.before = 0.0


def _trained(
  context: Context, name: str, dataset: types.Dataset
) -> types.Variables:
  context, options = context.of(name), context.job.training
  state = _fresh_state(context, name)
  # Beside the finished ones, so that nobody takes it for one of them.
  partial = context.run_dir / f"{name}.partial"
  if _is_finished(context, name):
    # There is one if the process was killed before it was removed.
    checkpoints.remove(partial, is_missing_ok=True)
    return _restore(context, name, state).variables
  history: training.History = []
  num_steps = -(-len(dataset) // options.batch_size)
  clock = _Clock()
  if checkpoints.exists(partial):
    state = checkpoints.restore(partial, target=state)
    found = checkpoints.metadata(partial)
    history = found["history"]
    clock.before = found.get("seconds_within", 0.0)

  def save(state: training.TrainState, seconds_within: float = 0.0) -> None:
    checkpoints.save(
      partial,
      state,
      metadata={"history": history, "seconds_within": seconds_within},
      overwrite=True,
    )
    _settle()
    clock.saved = time.monotonic()

  def keep(state: training.TrainState, record: dict[str, Any]) -> None:
    # Of an epoch that was gone on with, also what came before.
    record["seconds"] += clock.before
    history.append(record)
    is_last = len(history) == options.num_epochs
    if is_last or time.monotonic() - clock.saved > EPOCH_SAVE_SECONDS:
      save(state)
    clock.before, clock.start = 0.0, time.monotonic()

  def keep_within(state: training.TrainState) -> None:
    # The end of an epoch is kept with its record, by what comes next.
    is_end = int(state.step) % num_steps == 0
    if not is_end and time.monotonic() - clock.saved > _SAVE_SECONDS:
      save(state, clock.before + time.monotonic() - clock.start)

  if len(history) < options.num_epochs:
    training.fit(
      context.model,
      state.variables,
      dataset,
      state.key,
      optimizer=_training_optimizer(context.job),
      num_epochs=options.num_epochs,
      batch_size=options.batch_size,
      schedule=options.schedule,
      augment_fn=augment_fn(options.augmentation),
      callback=keep,
      step_callback=keep_within,
      num_parts=options.num_parts,
      state=state,
      mesh=context.mesh,
      description=f"training {name}",
    )
  state = checkpoints.restore(partial, target=_fresh_state(context, name))
  seconds = sum(record["seconds"] for record in history)
  _save(context, name, state, history, seconds)
  checkpoints.remove(partial)
  return state.variables


def _save(
  context: Context,
  name: str,
  state: training.TrainState,
  history: training.History,
  seconds: float,
) -> None:
  path = context.run_dir / "history.json"
  records = read_json(path)
  records |= {name: history, f"{name}_seconds": seconds}
  write_json(path, records)
  checkpoints.save_run(
    context.run_dir,
    name,
    state,
    metadata={
      "job": job_options(context.job),
      "class_names": list(context.train.class_names),
    },
    overwrite=True,
  )
  _settle()


def _restore(
  context: Context, name: str, target: training.TrainState
) -> training.TrainState:
  state: training.TrainState = checkpoints.restore_run(
    context.run_dir, name, target=target
  )
  return state


def _is_finished(context: Context, name: str) -> bool:
  return name in checkpoints.run_checkpoints(context.run_dir)


def _imported(context: Context) -> types.Variables:
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


def _stored_job(folder: pathlib.Path) -> dict[str, Any] | None:
  """The options of a run; one of an earlier version lacks the later ones."""
  before = read_json(folder / "config.json").get("job")
  if before is None:
    return None
  defaults = json.loads(json.dumps(job_options(recipes.Job())))
  # Until there were schedules, rates were constant.
  nested = {
    name: {**defaults[name], "schedule": "constant", **before.get(name, {})}
    for name in ("training", "unlearning")
  }
  return {**defaults, **before, **nested}


def has_same_request(
  run: pathlib.Path, job: recipes.Job, split: types.Split | None = None
) -> bool:
  """Whether a run forgets what this job asks for, and these very images."""
  before = _stored_job(run) or {}
  now = json.loads(json.dumps(job_options(job)))
  stated = read_json(run / "data.json").get("forget_ids_sha256")
  return all(before.get(name) == now[name] for name in REQUEST_FIELDS) and (
    split is None
    or stated in (None, forget.ids_hash(np.asarray(split.forget.ids)))
  )


def _copy_run(
  source: pathlib.Path, folder: pathlib.Path, *, is_same_request: bool
) -> None:
  """Copies the trained models of a run, wholly or not at all.

  The retrained model belongs to its request, the original to any.
  """
  # All retrained models, too: a name begins with its kind.
  left_out = ("unlearned",) if is_same_request else ("unlearned", "retrained")
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  for name, path in checkpoints.run_checkpoints(source).items():
    if not name.startswith(left_out):
      shutil.copytree(path, partial / "checkpoints" / name)
  history = read_json(source / "history.json")
  write_json(
    partial / "history.json",
    {
      name: value
      for name, value in history.items()
      if not name.startswith(left_out)
    },
  )
  partial.rename(folder)


def _set_aside(folder: pathlib.Path) -> None:
  """Moves a run away, and nothing that does not look like one."""
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"name must be that of a run to overwrite, got {folder}: no config.json"
    )
  folder.rename(_replaced(folder))


def _replaced(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f".{folder.name}.replaced")


def _settle() -> None:
  """Decides between the runs this process holds and those they overwrite.

  The one of before goes as soon as the new one has a model, and comes back
  where the new one ended, in this process or an earlier one, without.
  """
  for hold in files.held.values():
    folder, before = hold.path, _replaced(hold.path)
    if not before.exists():
      continue
    if checkpoints.has_any(folder):
      shutil.rmtree(before, ignore_errors=True)
      continue
    shutil.rmtree(folder, ignore_errors=True)
    before.rename(folder)
    hold.hint = f"{folder} is what it was before --overwrite"


def _check_same_job(
  folder: pathlib.Path, job: recipes.Job, may_change: tuple[str, ...]
) -> None:
  """Options that made what is in the folder must be the same as now."""
  before = _stored_job(folder)
  if before is None:
    raise ValueError(
      f"name must be that of a run, got {folder}: no config.json"
    )
  now = json.loads(json.dumps(job_options(job)))
  free = {
    "resume",
    "overwrite",
    "runs_dir",
    "name",
    "num_devices",
    "data_dir",
    # More of them are trained, and fewer are used.
    "references",
    # As much as fits the memory, for the same result.
    "eval_batch_size",
    *may_change,
  }
  for each in (before, now):
    each["unlearning"] = {
      k: v for k, v in each["unlearning"].items() if k != "search_batch_size"
    }
  changed = sorted(
    name for name in now if name not in free and before.get(name) != now[name]
  )
  if changed:
    name = changed[0]
    raise ValueError(
      f"{name} must be as in the run that is resumed,"
      f" {before.get(name)}, got {now[name]}"
    )


def _is_earlier(folder: pathlib.Path | None) -> bool:
  """Whether a run has references that standardise as the original does."""
  config = {} if folder is None else read_json(folder / "config.json")
  return bool(config) and config.get("references_standardise_by") != _RETAINED


def _check_same_data(
  folder: pathlib.Path, record: dict[str, Any], may_change: tuple[str, ...]
) -> None:
  """What options mean must be the same as well: files can be edited."""
  before = read_json(folder / "data.json")

  def is_other(name: str) -> bool:
    return before.get(name) not in (None, record[name])

  if is_other("images_sha256"):
    raise ValueError(
      f"dataset must hold the images of the run {folder}, got others, or other"
      " labels: it was prepared anew since; choose another name"
    )
  if "ids" not in may_change and is_other("forget_ids_sha256"):
    request = record["request"]
    given = [name for name in ("classes", "where") if request[name]]
    raise ValueError(
      f"{'ids or request' if request['num_ids'] else ' and '.join(given)} must"
      f" mean the {before['counts']['train_forget']} images to forget of the"
      f" run {folder}, got {record['counts']['train_forget']}, not the same:"
      " what it reads was edited since; choose another name"
    )


def _config(context: Context) -> dict[str, Any]:
  device = jax.devices()[0]
  is_own = context.retrained_model is not None
  return {
    "job": job_options(context.job),
    "references_standardise_by": _RETAINED if is_own else "training images",
    "versions": {
      "python": platform.python_version(),
      "psg_jax": psg_jax.__version__,
      **{name: metadata.version(name) for name in _PACKAGES},
    },
    "device": f"{jax.device_count()} x {device.device_kind}",
    "git_commit": _git_commit(),
    "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    "command": " ".join(["python", "-m", *_module_arguments()]),
  }


def _module_arguments() -> list[str]:
  program = pathlib.Path(sys.argv[0])
  return [f"{program.parent.name}.{program.stem}", *sys.argv[1:]]


def _git_commit() -> str | None:
  """The commit of this program's own checkout; None where it is no checkout.

  It may be installed inside somebody else's.
  """
  file = pathlib.Path(__file__).resolve()
  ours = [name for name in os.environ if not name.startswith("GIT_")]

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", *arguments],
      cwd=file.parent,
      env={name: os.environ[name] for name in ours},
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", file.name)
    root = pathlib.Path(git("rev-parse", "--show-toplevel"))
    is_own = root.resolve() == file.parents[1]
    return git("rev-parse", "HEAD") if is_own else None
  except (OSError, subprocess.SubprocessError):
    return None


def _data_record(context: Context, num_read: int) -> dict[str, Any]:
  counts = {name: len(part) for name, part in context.parts.items()}
  num_used = len(context.train) + len(context.test)
  _, held = validation(context)
  if held is not None:
    counts["validation"] = len(held)
  return {
    "class_names": list(context.train.class_names),
    "source": dict(context.source),
    # All images; those of `validation`, of the test images, say when to stop.
    "counts": counts,
    # Their sum is what was read.
    "images": {
      "read": num_read,
      "forget": counts["train_forget"],
      "retain": counts["train_retain"],
      "test": len(context.test),
      "not used (num_train)": num_read - num_used,
    },
    "images_sha256": requests.images_hash([context.train, context.test]),
    **requests.record(context.asked),
  }


def _save_twins(context: Context) -> None:
  """Keeps a few twins as pictures."""
  found = context.asked.twins
  pairs = [] if found is None else found.pairs[:_NUM_TWINS]
  parts = {
    "forget": context.split.forget,
    "retain": context.split.retain,
    "test": context.test,
  }
  rows = {
    name: {each: row for row, each in enumerate(np.asarray(part.ids))}
    for name, part in parts.items()
  }

  def image(part: str, image_id: str) -> np.ndarray:
    # A twin that was moved is in the forget set now.
    names = [part, "forget"] if image_id not in rows[part] else [part]
    row = rows[names[-1]][image_id]
    return np.asarray(parts[names[-1]].images[[row]])[0]

  if pairs:
    files.save_arrays(
      context.run_dir / "twins.npz",
      {
        "left": np.stack([image(x.between[0], x.ids[0]) for x in pairs]),
        "right": np.stack([image(x.between[1], x.ids[1]) for x in pairs]),
      },
    )


def _accuracy_by(
  logits: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
  values: dict[tuple[str, str], np.ndarray],
) -> dict[str, Any]:
  """Accuracies by the values of the columns asked for, train and test.

  Args:
    logits: By part.
    labels: By part.
    values: By part and column.
  """
  columns = dict.fromkeys(column for _, column in values)
  result: dict[str, Any] = {}
  for side in ("train", "test"):
    names = (f"{side}_forget", f"{side}_retain")
    joined, truth = (
      np.concatenate([arrays[name] for name in names])
      for arrays in (logits, labels)
    )
    result[side] = {
      column: metrics.accuracy_by(
        joined,
        truth,
        np.concatenate([values[name, column] for name in names]),
      )
      for column in columns
    }
  return result


def _save_examples(
  context: Context, original_variables: types.Variables
) -> None:
  """Searches a few forget images again, to keep their boundary images."""
  options = context.job.unlearning
  forget_set = context.split.forget
  rows = np.linspace(
    0, len(forget_set) - 1, min(_NUM_EXAMPLES, len(forget_set))
  ).astype(int)
  images = training.to_float(jnp.asarray(forget_set.images[rows]))
  search = search_fn(context)
  if search is None:
    names = inspect.signature(boundary.Search).parameters
    search = boundary.Search(
      **{k: v for k, v in dataclasses.asdict(options).items() if k in names}
    )
  key, _ = jax.random.split(_key(context, "unlearned"))
  labels = jnp.asarray(forget_set.labels[rows])
  keys = boundary.sample_keys(jax.random.fold_in(key, 0), jnp.asarray(rows))
  size = options.search_batch_size
  found = [
    search(
      context.model.apply,
      original_variables,
      *(x[start : start + size] for x in (images, labels, keys)),
    )
    for start in range(0, len(rows), size)
  ]
  output = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
  files.save_arrays(
    context.run_dir / "examples.npz",
    {
      "images": np.asarray(images),
      "boundary": np.asarray(output.images),
      "old_labels": forget_set.labels[rows],
      "new_labels": np.asarray(output.labels),
      "distance": np.abs(np.asarray(output.images - images)).max((1, 2, 3)),
      "is_crossed": np.asarray(output.is_crossed),
    },
  )


def _relabelling_record(
  context: Context, reference: np.ndarray | None
) -> dict[str, Any]:
  num_classes = context.train.num_classes

  def count(classes: np.ndarray) -> list[int]:
    return np.bincount(classes, minlength=num_classes).tolist()

  found = _relabelling(context)
  record = {
    "crossed": float(found.is_crossed.mean()),
    "median_distance": float(np.median(found.distance)),
    "label_counts": count(found.labels),
    "agreement_with_retrained": None,
    "retrained_prediction_counts": None,
  }
  if reference is not None:
    predicted = np.argmax(reference, -1)
    record["agreement_with_retrained"] = float(
      np.mean(predicted == found.labels)
    )
    record["retrained_prediction_counts"] = count(predicted)
  return record


def _read_out(
  context: Context,
  logits: dict[str, dict[str, np.ndarray]],
  records: dict[str, Any],
  result: dict[str, Any],
) -> None:
  """Adds the clinical figures, the attacks and the diagnosis to `result`."""
  found = read_out.figures(context.parts, logits, context.asked.columns)
  for name, figures in found.items():
    result[name] |= figures
  if "unlearned" not in logits:
    return
  read_out.save_flips(context.run_dir, context.parts, logits)
  retrained_logits = logits.get("retrained", {}).get("train_forget")
  result["unlearned"] |= read_out.judge(
    {name: each["accuracy"] for name, each in result.items()},
    _relabelling(context),
    retrained_logits,
    history=records["unlearned"],
    options=unlearn_options(context),
    is_class=is_class_request(context),
    num_classes=context.train.num_classes,
  )


def _relabelling(context: Context) -> unlearning.Relabelling:
  names = ("labels", "logits", "is_crossed", "distance", "num_steps")
  found = files.read_arrays(context.run_dir / "relabelling.npz", *names)
  return unlearning.Relabelling(**{name: found[name] for name in names})


def _save_features(
  context: Context, variables: dict[str, types.Variables]
) -> None:
  """Keeps penultimate features of test images, many of them to forget.

  Where no test image is to be forgotten, training images stand for them.
  """
  rng = np.random.default_rng(context.job.seed)
  parts = context.parts
  forgotten = parts["test_forget"]
  if not len(forgotten):
    forgotten = parts["train_forget"]
  chosen = []
  num_test = max(1, len(context.test))
  for part in (forgotten, parts["test_retain"]):
    share = max(_NUM_FEATURES // 4, _NUM_FEATURES * len(part) // num_test)
    chosen.append(part.take(np.sort(rng.permutation(len(part))[:share])))
  images = np.concatenate([part.images[:] for part in chosen])
  features = {
    name: inference.predict(
      context.of(name).model.features,
      each,
      images,
      batch_size=context.job.eval_batch_size,
      mesh=context.mesh,
    )
    for name, each in variables.items()
  }
  arrays: dict[str, Any] = {
    **features,
    "labels": np.concatenate([part.labels for part in chosen]),
    "is_forget": np.arange(len(images)) < len(chosen[0]),
  }
  files.save_arrays(context.run_dir / "features.npz", arrays)
