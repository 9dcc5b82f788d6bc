"""What the steps of a job share: data, request, networks, and what follows."""

import dataclasses
import functools
import pathlib
import types as types_lib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments import (
  files,
  recipes,
  requests,
)
from psg_jax import (
  augment,
  boundary,
  data,
  engine,
  forget,
  inference,
  last_layers,
  levels,
  metrics,
  models,
  optimizers,
  refits,
  types,
  unlearning,
)
from psg_jax import proxies as proxies_lib

MODELS = files.MODELS
_VALIDATION_SEED = 0
# Of accuracy: less is chance, as of which images a random part has.
_LEAST_CHANGE = 0.01
# Parts of a retraining; a little for what rounding adds.
MOST_PROXY_COST = 0.21


class Context(NamedTuple):
  """What the steps of a job share.

  Attributes:
    job: The options.
    run_dir: The run folder.
    train: The training set.
    test: The test set.
    selection: What is to be forgotten: the request, its split and preview.
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
  selection: requests.Selection
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
    return self.selection.split

  @property
  def parts(self) -> dict[str, types.Dataset]:
    """The four parts that figures are computed of."""
    shown, _ = validation(self)
    return {
      "train_forget": self.selection.split.forget,
      "train_retain": self.selection.split.retain,
      "test_forget": shown.forget,
      "test_retain": shown.retain,
    }


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


def network(job: recipes.Job, dataset: types.Dataset) -> types.Model:
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


def is_class_request(context: Context) -> bool:
  """Whether whole classes are forgotten, whose ideal accuracy is 0."""
  return context.selection.is_class_request


def stop_target(context: Context) -> Literal["zero", "unseen", "proxy"]:
  """Returns the unlearning's target with `auto` resolved."""
  target = context.job.unlearning.target
  if target != "auto":
    return target
  if is_class_request(context):
    return "zero"
  options = context.job.unlearning
  # What proxies say is taught in the place of the default labels alone, and how
  # a model was trained that was brought along is not known.
  is_default = options.search == "multi_step" and options.labels == "soft_other"
  can_train = context.job.weights is None and options.retain_weight > 0
  is_cheap = proxy_cost(context) <= MOST_PROXY_COST
  return "proxy" if is_default and can_train and is_cheap else "unseen"


def proxy_cost(context: Context) -> float:
  """What proxies cost, as a part of a retraining; no images cost infinity."""
  job = context.job
  return proxies_lib.cost(
    len(context.split.retain),
    context.split.retain.num_classes,
    num_models=job.unlearning.num_proxies,
    fraction=job.unlearning.proxy_fraction,
    num_epochs=job.training.num_epochs,
    batch_size=job.training.batch_size,
  )


def validation(
  context: Context,
) -> tuple[types.Split, types.Dataset | None]:
  """Sets apart the unseen images that say when unlearning is to stop.

  The original has seen its training images, so that they must be test images:
  a half, of each class or of whole groups where the request has groups, of
  those that match the request, or, where there are not enough, of the others.
  Of the others first where it is proxies that say it, for they have seen
  nothing that matches, unless a part is forgotten of what does. No figure is
  computed of them.

  Args:
    context: What the steps share.

  Returns:
    The test images of which figures are computed, and those set apart; None
    where unlearning does not stop at an accuracy, or there are too few.
  """
  shown, target = context.selection.test_split, stop_target(context)
  if target == "zero":
    return shown, None
  group = context.selection.request.group
  is_of_others = target == "proxy" and context.selection.request.fraction == 1
  names = ("retain", "forget") if is_of_others else ("forget", "retain")
  for name in names:
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
    of its predictions with the frequencies of the classes that are retained
    (`prior_shift`): of a class that is gone none is right. Where these leave it
    less on the forget set, that. None where all is to be forgotten, or there is
    no such image.
  """
  shown, held = validation(context)
  if held is None:
    return None
  forget_set = context.split.forget
  shift = levels.prior_shift(context.split)
  logits, forget_logits = (
    predict(context, original_variables, part.images)
    for part in (held, forget_set)
  )
  logits = logits + shift
  original, most = (
    np.mean(np.argmax(x, -1) == forget_set.labels)
    for x in (forget_logits, forget_logits + shift)
  )
  if original - most < _LEAST_CHANGE:
    most = 1.0
  if len(shown.forget) < len(context.selection.test_split.forget):
    is_right = np.argmax(logits, -1) == held.labels
    return float(min(np.mean(is_right), most))
  by_class = metrics.per_class_accuracy(logits, held.labels)
  accuracies = [
    0.0 if np.isneginf(shift[label]) else by_class[label]
    for label in forget_set.labels
  ]
  known = [value for value in accuracies if value is not None]
  return float(min(np.mean(known), most)) if known else None


class Aim(NamedTuple):
  """What unlearning is to come to.

  Attributes:
    accuracy: That on the forget set to stop at, in [0, 1]; None for none.
    proxies: Those that say it; None where none were trained.
    is_taught: Whether what they say is taught, in the place of labels.
  """

  accuracy: float | None
  proxies: proxies_lib.Proxies | None = None
  is_taught: bool = False

  def options(self) -> dict[str, Any]:
    """Keyword arguments of `unlearning.unlearn`."""
    if self.proxies is None or not self.is_taught:
      return {"target_accuracy": self.accuracy}
    return {
      "target_accuracy": self.accuracy,
      "targets": self.proxies.targets,
    }


def aim(
  context: Context, original_variables: types.Variables, *, show_progress: bool
) -> Aim:
  """Finds out what unlearning is to come to; trains proxies where they say it.

  Raises:
    ValueError: If there are too few retained images for proxies.
  """
  if stop_target(context) != "proxy":
    return Aim(target_accuracy(context, original_variables))
  options, training = context.job.unlearning, context.job.training
  _, held = validation(context)
  outcome = proxies_lib.fit(
    context.model,
    original_variables,
    context.split,
    jax.random.fold_in(model_key(context, "unlearned"), 1),
    unseen=held,
    num_models=options.num_proxies,
    fraction=options.proxy_fraction,
    eval_batch_size=context.job.eval_batch_size,
    optimizer=optimizer(training),
    schedule=training.schedule,
    num_epochs=training.num_epochs,
    batch_size=training.batch_size,
    num_parts=training.num_parts,
    augment_fn=augment_fn(training.augmentation),
    show_progress=show_progress,
    description="training proxies",
  )
  accuracy = outcome.accuracy.value if outcome.is_called_for else 1.0
  return Aim(accuracy, outcome, label_form(context) == "given")


@functools.lru_cache
def augment_fn(name: str) -> augment.AugmentFn | None:
  """Returns the augmentation of this name, the same object each time."""
  return {
    "none": None,
    "flip": augment.flip(),
    "crop_flip": augment.chain(augment.crop(4), augment.flip()),
    "medical": augment.medical(),
  }[name]


def optimizer(
  options: recipes.Training | recipes.Unlearning,
) -> optax.GradientTransformation:
  """Returns the optimiser of a job's training or unlearning."""
  return optimizers.sgd(
    options.learning_rate,
    momentum=options.momentum,
    weight_decay=options.weight_decay,
  )


def model_key(context: Context, name: str) -> jax.Array:
  """Returns the key of a model, which is its own: retraining is no rerun."""
  model, _, number = name.partition("-")
  return jax.random.fold_in(
    jax.random.key(context.job.seed + int(number or 0)), MODELS.index(model)
  )


def predict(
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


@functools.lru_cache(maxsize=8)
def _shapes(model: types.Model, image: tuple[int, ...]) -> Any:
  return jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, *image), np.float32),
  )


def shapes(context: Context) -> Any:
  """Returns the shapes of the network's variables."""
  return _shapes(context.model, tuple(context.train.images.shape[1:]))


def label_form(context: Context) -> str:
  """Returns the form of what the forget set is taught: `given` by proxies.

  They say it in the place of the default labels; others stay as they are.
  """
  labels: str = context.job.unlearning.labels
  is_given = labels == "soft_other" and stop_target(context) == "proxy"
  return "given" if is_given else labels


def passes(context: Context, **changes: Any) -> engine.Passes:
  """Returns the passes that `unlearning.unlearn` makes of the job's options.

  Args:
    context: What the steps share.
    **changes: Options that are not the job's.

  Raises:
    ValueError: If an option does not fit the network or the request.
  """
  options = unlearn_options(context) | changes
  form = changes.get("labels", label_form(context))
  given = {
    field.name: options[field.name]
    for field in dataclasses.fields(engine.Passes)
    if field.name in options
  }
  weight, variables = options["retain_weight"], shapes(context)
  try:
    refits.count(
      *(options["num_refits"], variables, context.split),
      labels=form,
      retain_weight=weight,
    )
    return unlearning.read_passes(
      *(context.model, variables, context.split, weight, given),
      labels=form,
      num_layers=options["num_layers"],
    )
  except ValueError as error:
    raise ValueError(f"unlearning.{error}") from None


def augmentation_of_original(job: recipes.Job) -> str:
  """Returns the name of it; of a model that was brought along none is known."""
  return job.training.augmentation if job.weights is None else "none"


def augmentation_of_update(job: recipes.Job) -> str:
  """Returns the name of it, by default that of the original."""
  return job.unlearning.augmentation or augmentation_of_original(job)


def unlearn_options(context: Context) -> dict[str, Any]:
  """Keyword arguments of `unlearning.unlearn` that the job sets."""
  options = dataclasses.asdict(context.job.unlearning)
  for name in ("learning_rate", "momentum", "weight_decay"):
    del options[name]
  # The released search depends on its minibatch, which is that of its update.
  for name in ("target", "num_proxies", "proxy_fraction"):
    del options[name]
  if options.pop("search") == "released":
    options["search_batch_size"] = context.job.unlearning.forget_batch_size
  taught = unlearning.Targets(
    labels=options["labels"], image_weight=options["image_weight"]
  )
  layers = options.pop("layers")
  del options["augmentation"]
  trainable = None
  if layers:
    try:
      trainable = last_layers.trainable(shapes(context), 1, layers)
    except ValueError as error:
      raise ValueError(f"unlearning.{error}") from None
  return {
    **options,
    "trainable": trainable,
    "image_weight": taught.image_weight,
    "search_fn": search_fn(context),
    "augment_fn": augment_fn(augmentation_of_update(context.job)),
    "eval_batch_size": context.job.eval_batch_size,
  }
