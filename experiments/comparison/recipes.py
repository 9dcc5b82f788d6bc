"""Hyper-parameters of the methods that `experiments.compare` compares.

`paper` are the values of the methods' papers, which are the defaults of
`psg_jax.baselines`; most were chosen for ResNets and whole passes over 50,000
images. `default` suits small models and few images, and gives all the same
budget: about as many images are taken through a gradient as PSG takes, that is
`2 x batch size x steps`. Learning rates are rounded values for the All-CNN,
without a search: those of gradient ascent, SCRUB, UNSIR and the two boundary
methods were moved once or twice after a look at the test accuracies of the
digits (seeds 2022 and 2023), where they had diverged, destroyed the model or
forgotten nothing; figures on the digits are to that extent not untouched. PSG
itself has the options of the job, in both.

With `--set METHOD.ARGUMENT=VALUE` any argument of a method can be changed, and
the `learning_rate`, `momentum` and `weight_decay` of its optimiser.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import optax

from experiments import contexts, recipes
from psg_jax import baselines, checks, optimizers, types, unlearning

SETTINGS = ("default", "paper")
# Methods with the options of the job.
OURS = ("psg", "psg_hard", "psg_soft")
_RATES = ("learning_rate", "momentum", "weight_decay")
_COUNTED = ("num_epochs", "batch_size")
# Set by the program, or not to be written on a command line.
_RESERVED = frozenset(
  {
    *("model", "variables", "split", "key", "callback", "mesh", "targets"),
    *("show_progress", "optimizer", "repair_optimizer", "search_fn"),
    *("augment_fn", "validation", "held_out", "trainable", "state"),
    *("description", "step_callback", "stop_fn"),
  }
)
_BATCH_SIZE = 64
# Passes over a small forget set would be many, and each moves the model.
_MAX_FORGET_PASSES = 3

Pool = Literal[
  "retain", "paired", "mixed", "scrub", "forget", "beside", "twice"
]


class Rates(NamedTuple):
  """An optimiser.

  Attributes:
    learning_rate: Positive.
    momentum: In [0, 1), of SGD; None for Adam.
    weight_decay: 0 or more, of SGD.
  """

  learning_rate: float
  momentum: float | None = 0.9
  weight_decay: float = 0.0


class Recipe(NamedTuple):
  """How a method is called.

  Attributes:
    paper: The optimiser of its paper, or None for one without.
    default: The optimiser for small runs; None for the same.
    options: Further arguments for small runs.
    pool: What a pass of it goes over, from which follows how many fit in the
      budget; None where passes are not counted.
  """

  paper: Rates | None = None
  default: Rates | None = None
  options: Mapping[str, Any] = {}
  pool: Pool | None = None


class Resolved(NamedTuple):
  """What a method is called with.

  Attributes:
    method: Its name.
    arguments: Keyword arguments.
    record: The same as numbers and text, for JSON.
    settings: Whose values they are, of `SETTINGS`.
    overrides: What was changed in them.
    note: What to know of them, or None.
  """

  method: str
  arguments: dict[str, Any]
  record: dict[str, Any]
  settings: str
  overrides: dict[str, Any]
  note: str | None = None


_FINETUNE = Rates(0.01, 0.0)
_LABELS = Rates(0.01, 0.9, 5e-4)
_SCRUB = Rates(5e-4, 0.9, 5e-4)
_CHEN = Rates(1e-5)

RECIPES: dict[str, Recipe] = {
  "psg": Recipe(),
  "psg_hard": Recipe(),
  "psg_soft": Recipe(),
  "psg_released": Recipe(_CHEN, Rates(1e-4), pool="forget"),
  "retrain": Recipe(),
  "finetune": Recipe(Rates(0.04, 0.0), pool="retain"),
  # The loss has no bound: with statistics frozen, and no BatchNorm to hold the
  # activations, it overflows within 20 steps.
  "gradient_ascent": Recipe(Rates(1e-4, 0.9, 5e-4), options={"batch_size": 64}),
  "neggrad": Recipe(_FINETUNE, pool="paired"),
  "neggrad_plus": Recipe(_FINETUNE, pool="paired"),
  "random_labels": Recipe(_LABELS, pool="mixed"),
  "l1_sparse": Recipe(_LABELS, pool="retain"),
  "cf_k": Recipe(_FINETUNE, pool="retain"),
  # New layers need more than finetuning does.
  "eu_k": Recipe(_FINETUNE, Rates(0.01), pool="retain"),
  "scrub": Recipe(_SCRUB, Rates(3e-3, 0.9, 5e-4), pool="scrub"),
  "scrub_r": Recipe(_SCRUB, Rates(3e-3, 0.9, 5e-4), pool="scrub"),
  "bad_teacher": Recipe(Rates(1e-4, None), Rates(1e-3, None), pool="mixed"),
  "salun": Recipe(Rates(0.013, 0.9, 5e-4), pool="mixed"),
  # A class of ten is 1 / alpha of the images, of which "all" chooses nothing.
  "ssd": Recipe(options={"reference": "retain"}),
  "unsir": Recipe(Rates(0.02, None), Rates(5e-3, None)),
  "fisher": Recipe(),
  "boundary_shrink": Recipe(
    _CHEN, Rates(3e-5), {"batch_stats": "frozen"}, "forget"
  ),
  "boundary_expanding": Recipe(_CHEN, Rates(3e-5), pool="forget"),
  "amun": Recipe(_LABELS, pool="twice"),
  "delete": Recipe(Rates(1e-4), None, {"batch_stats": "frozen"}, "forget"),
  "trew": Recipe(_LABELS, pool="beside"),
  # A third of the weights are new, of a smaller network in fewer steps.
  "msg": Recipe(Rates(1e-3, 0.9, 5e-4), Rates(0.01, 0.9, 5e-4), pool="retain"),
  "regun": Recipe(Rates(0.01), pool="beside"),
  "bias_shift": Recipe(),
}


# What methods do with unseen images, and which argument takes them.
_UNSEEN = {
  "scrub_r": ("validation", "chooses its pass by"),
  "regun": ("held_out", "takes its references from"),
}


def parse(given: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Reads `METHOD.ARGUMENT=VALUE`.

  Args:
    given: The texts.

  Returns:
    Values of arguments by method.

  Raises:
    ValueError: If a text is not of this form, or a method or an argument does
      not exist.
  """
  overrides: dict[str, dict[str, Any]] = {}
  for text in given:
    place, is_given, literal = text.partition("=")
    method, has_dot, argument = place.partition(".")
    if not (is_given and has_dot):
      raise ValueError(f"set must be METHOD.ARGUMENT=VALUE, got {text!r}")
    baselines.find(method)
    checks.one_of(f"the argument in set of {method}", argument, names(method))
    name, value = f"{place} in set", _literal(literal)
    if argument == "learning_rate":
      checks.number(name, value, above=0)
    elif argument in _RATES:
      most = 1.0 if argument == "momentum" else None
      checks.number(name, value, at_least=0, at_most=most)
    if argument in ("num_epochs", "batch_size"):
      checks.integer(name, value, at_least=1)
    overrides.setdefault(method, {})[argument] = value
  return overrides


def names(method: str) -> tuple[str, ...]:
  """Returns the arguments of a method that can be set."""
  parameters = baselines.parameters(method)
  rates = _RATES if "optimizer" in parameters else ()
  return (*(x for x in parameters if x not in _RESERVED), *rates)


def resolve(
  method: str,
  context: contexts.Context,
  *,
  settings: str = "default",
  overrides: Mapping[str, Any] | None = None,
) -> Resolved:
  """Returns what a method is called with in a job.

  Args:
    method: A name in `baselines.METHODS`.
    context: The job's.
    settings: One of `SETTINGS`.
    overrides: Arguments to change.

  Returns:
    The arguments, less those that every method has.

  Raises:
    ValueError: If a name is unknown or a rate is out of its range.
  """
  checks.one_of("settings", settings, SETTINGS)
  baselines.find(method)
  # A method that was added later has the values of its own.
  recipe = RECIPES.get(method, Recipe())
  is_paper = settings == "paper"
  rates = recipe.paper if is_paper else recipe.default or recipe.paper
  options, objects, note = _of_job(method, context)
  if not is_paper and method not in (*OURS, "retrain"):
    options |= {**recipe.options, **_budget(method, recipe, context)}
  if method in OURS:
    rates = _job_rates(context.job.unlearning)
  elif method == "retrain":
    rates = _job_rates(context.job.training)
  changed = dict(overrides or {})
  is_changed = any(name in changed for name in _RATES)
  if rates is None and is_changed:
    rates = Rates(0.01)
  if rates is not None:
    rates = rates._replace(
      **{name: changed.pop(name) for name in _RATES if name in changed}
    )
  options |= changed
  record = dict(options)
  if method in OURS:
    changes = dict(options)
    if method == "psg" and "labels" not in changed:
      del changes["labels"]  # Proxies may say what is taught.
    passes = contexts.passes(context, **changes)
    record |= {name: getattr(passes, name) for name in _COUNTED}
  if method in OURS and "target_accuracy" not in options and _aim(context):
    # The accuracy to stop at follows from each original model.
    record["target"] = context.job.unlearning.target
  arguments = {**options, **objects}
  has_own = method in (*OURS, "psg_released")
  augmentation = contexts.augmentation_of_original(context.job)
  if method == "retrain":
    augmentation = context.job.training.augmentation
  if method in OURS:
    augmentation = contexts.augmentation_of_update(context.job)
  elif not has_own and "augment_fn" in baselines.parameters(method):
    # As in training, for all.
    arguments["augment_fn"] = contexts.augment_fn(augmentation)
  if "augment_fn" in arguments:
    record["augmentation"] = augmentation
  # SCRUB's own optimiser has a schedule, which these rates begin with.
  is_scheduled = is_paper and method.startswith("scrub") and not is_changed
  if rates is not None:
    record |= {k: v for k, v in rates._asdict().items() if v is not None}
  if rates is not None and not is_scheduled:
    arguments["optimizer"] = _optimizer(rates)
    if method == "unsir":
      # The authors repair at half the rate.
      half = rates._replace(learning_rate=rates.learning_rate / 2)
      arguments["repair_optimizer"] = _optimizer(half)
  return Resolved(
    method, arguments, record, settings, dict(overrides or {}), note
  )


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _job_rates(options: recipes.Training | recipes.Unlearning) -> Rates:
  return Rates(options.learning_rate, options.momentum, options.weight_decay)


def _optimizer(rates: Rates) -> optax.GradientTransformation:
  if rates.momentum is None:
    return optimizers.adam(rates.learning_rate)
  return optimizers.sgd(
    rates.learning_rate,
    momentum=rates.momentum,
    weight_decay=rates.weight_decay,
  )


def _of_job(
  method: str, context: contexts.Context
) -> tuple[dict[str, Any], dict[str, Any], str | None]:
  """Arguments of the job: for the record, and beside it, and what to know."""
  job = context.job
  if method in OURS:
    options = contexts.unlearn_options(context)
    names = ("search_fn", "trainable", "augment_fn")
    objects = {name: options.pop(name) for name in names}
    if method == "psg_soft":
      return {**options, **_soft(context)}, objects, None
    if method == "psg_hard":
      others = dict.fromkeys(
        ("image_weight", "num_refits", "retain_labels", "top_k")
      )
      options = {**options, "labels": "hard", **others}
      return options, objects, _aim(context)
    return options, objects, _aim(context)
  if method == "retrain":
    names = ("num_epochs", "batch_size", "schedule")
    options = {name: getattr(job.training, name) for name in names}
    return options, {}, None
  if method == "psg_released":
    mean, std = contexts.standardisation(job, context.train)
    return {}, {"model_mean": mean, "model_std": std}, None
  if method == "scrub_r" and contexts.is_class_request(context):
    # A retrained model has no image of a class right that it never saw; that of
    # SCRUB, where it has forgotten the class, has none right either.
    return {"reference_error": 1.0}, {}, None
  if method in _UNSEEN:
    argument, use = _UNSEEN[method]
    held, words = _unseen(context)
    shown = context.parts["test_forget"]
    if contexts.stop_target(context) == "proxy" and len(shown):
      # Those set apart are of another kind.
      held, words = shown, "test_forget: no images of its kind are set apart"
    return {}, {argument: held}, f"{use} {words}"
  return {}, {}, None


def _soft(context: contexts.Context) -> dict[str, Any]:
  """Labels of a forgotten class leave it out; else it stays one of two.

  A model that never saw a camera or a patient may well know others of their
  kind: at the boundary point it is undecided, and no accuracy to stop at has to
  be known.
  """
  if contexts.is_class_request(context):
    return {"labels": "soft_other", "image_weight": 0.0, "num_refits": 0}
  return {
    "labels": "soft",
    "image_weight": 0.0,
    "num_refits": 0,
    "retain_labels": "hard",
    "target_accuracy": None,
  }


def _aim(context: contexts.Context) -> str | None:
  """Says what the accuracy to stop at is taken from, where there is one."""
  _, held = contexts.validation(context)
  if held is None:
    return None
  what = "the original's accuracy on"
  if contexts.stop_target(context) == "proxy":
    what = "the accuracy that proxies expect, corrected by"
  return f"stops at {what} {_unseen(context)[1]}"


def _unseen(context: contexts.Context) -> tuple[types.Dataset, str]:
  """Images that were not trained on, those set apart if any, and which."""
  shown, held = contexts.validation(context)
  if held is None:
    name = "test_forget" if len(shown.forget) else "test_retain"
    part = shown.forget if len(shown.forget) else shown.retain
    return part, f"{name}: no validation images are set apart"
  is_same_kind = len(shown.forget) < len(context.selection.test_split.forget)
  name = "test_forget" if is_same_kind else "test_retain"
  return held, (
    f"{len(held)} images of {name} that are set apart and in no figure"
  )


def _budget(
  method: str, recipe: Recipe, context: contexts.Context
) -> dict[str, Any]:
  """Passes and batches that take as many images as PSG takes."""
  options = context.job.unlearning
  num_forget, num_retain = len(context.split.forget), len(context.split.retain)
  passes = contexts.passes(context)
  size = passes.batch_size
  beside = options.retain_batch_size or unlearning.RETAIN_SHARE * size
  images = (size + beside) * passes.num_epochs * math.ceil(num_forget / size)
  # As many an image as where all layers are moved.
  batch_size = min(
    _BATCH_SIZE, (1 + unlearning.RETAIN_SHARE) * options.forget_batch_size
  )
  if method == "unsir":
    # One pass beside noise images, and one without.
    share = min(1.0, images / (3 * num_retain))
    return {"batch_size": batch_size, "retain_fraction": round(share, 3)}
  if recipe.pool is None:
    return {}
  if method == "bad_teacher":
    num_retain = math.ceil(0.3 * num_retain)
  cost = {
    "retain": num_retain,
    "paired": 2 * num_retain,
    "mixed": num_forget + num_retain,
    "scrub": num_forget + num_retain,
    "forget": num_forget,
    "beside": 2 * num_forget,
    "twice": 2 * num_forget + num_retain,
  }[recipe.pool]
  num_epochs = max(1, round(images / cost))
  if recipe.pool == "forget":
    num_epochs = min(num_epochs, _MAX_FORGET_PASSES)
  return {"num_epochs": num_epochs, "batch_size": batch_size}
