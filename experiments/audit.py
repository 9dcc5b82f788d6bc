"""Audit an unlearning method with many small models: U-LiRA and KLOM.

    python -m experiments.audit --recipe digits --num_models 32

asks whether one who knows the audited images well can tell a model that
unlearned an image from one that was never trained on it. Three and a half
minutes on two cores; docs/comparison.md has what it finds.

What is audited are `num_targets` images, drawn at random from the training
images that match the job's request (for the digits, of class 0), so that other
images of their kind are retained. Each is in half of the models, which come in
pairs: of each two models one has a random half of the audited images, and the
other one the other half. All have all other images (with `retain_fraction`, a
random part of them). Every model unlearns the audited images that it has. The
attack on models before unlearning tells the images that a model was trained on
from those it was not; after it, those that a model unlearned from those it
never had. A model that unlearned exactly has seen none of both, so that there
is nothing to tell. The positives and the negatives are the same models, so that
what is common to all images of a model, most of what varies, cancels; so does
damage to all audited images alike, which accuracy and KLOM show. The control is
one half of the never trained, before unlearning, against the other. No further
models are trained.

KLOM compares with models never trained on an image, which have half of the
other audited images, of which an exactly unlearned model has seen none: audited
images ought to be a small part of their kind, and `--method retrain` shows what
is left of this difference. Images are drawn one by one, also where a request is
of groups.

PSG ends, unless the audited images are all there is of their class, at the
original's accuracy on unseen images of the kind, as `experiments.unlearn` does
with requests other than whole classes; `--unlearning.target zero` makes all of
its passes. `--resume` goes on where a run was stopped, and with another
`--method` it audits that with the models that are there.

    runs/<name>/config.json, request.json, data.json    as other programs
    runs/<name>/options.json                options of the audit
    runs/<name>/checkpoints/ensemble/       the models before unlearning
    runs/<name>/unlearned/<method>/         figures and logits of each model
    runs/<name>/audit.json, audit.npz, audit.html       of the last method
"""

import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import scipy.stats
import tyro

from experiments import (
  audit_page,
  cli,
  compare_recipes,
  files,
  jobs,
  recipes,
  requests,
  sets,
)
from psg_jax import (
  baselines,
  checkpoints,
  checks,
  data,
  ensembles,
  inference,
  parallel,
  progress,
  types,
  ulira,
)

SIDES, STEPS = audit_page.SIDES, audit_page.STEPS
# Four pairs in each half of those never trained on an image: three to attack
# with, and one to leave out.
_MIN_MODELS = 16
_MIN_SIDE = _MIN_MODELS // 4
# With 32 models enough pairs for a false positive rate of 0.1 %. A larger part
# of a class would change its share, and the attack would find that instead.
_NUM_TARGETS = 64
_MAX_TEST = 1000
_MIN_HISTOGRAM_MODELS = 100
_MAX_GROUPS = 20
_PLAN_FIELDS = ("num_models", "num_targets", "retain_fraction")


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, and how its method is audited."""

  # `cli.parse_job` takes a field `method` for a recipe of unlearning.
  method_name: Annotated[str, tyro.conf.arg(name="method")] = "psg"
  """Method to audit, of `psg_jax.baselines`."""
  num_models: int = 32
  """Models, half of them trained on each audited image; a multiple of 4."""
  num_targets: int | None = None
  """Audited images, an even number; by default a quarter of those that match
  the request, at most 64."""
  retain_fraction: float = 1.0
  """Part of all other images that a model is trained on, drawn for each pair of
  models."""
  settings: Literal["default", "paper"] = "default"
  """Hyper-parameters: for small runs, on one budget, or those of the papers."""
  set: tuple[str, ...] = ()
  """Arguments to change, as METHOD.ARGUMENT=VALUE."""
  mode: Literal["map", "vmap", "sharded"] = "map"
  """How models are trained together; see `psg_jax.ensembles.train`."""


class Plan(NamedTuple):
  """Who is trained on what.

  Attributes:
    targets: int `[T]`, rows of the audited images in the training set.
    is_trained: bool `[M, T]`, which model is trained on which of them: models
      `2 k` and `2 k + 1` on one half each.
    others: int `[M, R]`, rows of the other images of each model, the same in
      both models of a pair.
    test: int, rows of the test images that accuracies are computed of.
  """

  targets: np.ndarray
  is_trained: np.ndarray
  others: np.ndarray
  test: np.ndarray

  def membership(self, num_images: int) -> np.ndarray:
    """Returns bool `[M, N]`, which model is trained on which image."""
    is_member = np.zeros((len(self.others), num_images), bool)
    np.put_along_axis(is_member, self.others, True, 1)
    is_member[:, self.targets] = self.is_trained
    return is_member

  def by_pair(self, values: np.ndarray, *, is_trained: bool) -> np.ndarray:
    """Takes from each pair the model trained on an image, or the other one.

    Args:
      values: float `[M, T]`.
      is_trained: Whether the one trained on it.

    Returns:
      float `[M / 2, T]`.
    """
    first = self.is_trained[::2] == is_trained
    return np.where(first, values[::2], values[1::2])


class Unlearned(NamedTuple):
  """The models after unlearning.

  Attributes:
    logits: float32 `[M, T + test, K]`, NaN where a model diverged.
    seconds: Of unlearning, of each of the others.
    predict_seconds: Of the predictions, all together.
    diverged: `model`, `step` and `reason` of the others.
  """

  logits: np.ndarray
  seconds: list[float]
  predict_seconds: float
  diverged: list[dict[str, Any]]


def main() -> None:
  """Trains, unlearns, attacks, and writes the page."""
  print(run(cli.parse_job(Options, "Audit an unlearning method.")))


def run(options: Options) -> pathlib.Path:
  """Audits; see the program's options.

  Args:
    options: The options.

  Returns:
    The path of the page.

  Raises:
    ValueError: If an option is wrong; nothing is written then.
    FloatingPointError: If the training of the models diverges.
  """
  options = dataclasses.replace(
    options, name=options.name or f"{options.recipe}_audit"
  )
  overrides = check(options)
  context = jobs.prepare(options)
  print(jobs.announce(context))
  stated = {name: getattr(options, name) for name in _PLAN_FIELDS}
  jobs.write_json(context.run_dir / "options.json", stated)
  plan = draw(options, context)
  variables, history = _ensemble(context, options, plan)
  start = time.perf_counter()
  images = np.concatenate(
    [context.train.images[plan.targets], context.test.images[plan.test]]
  )
  logits = ensembles.predict(context.model, variables, images)
  predict_seconds = time.perf_counter() - start
  resolved = _resolve(context, options, plan, overrides)
  unlearned = _unlearn_all(context, options, resolved, plan, variables, images)
  start = time.perf_counter()
  labels = context.train.labels[plan.targets]
  confidences = _confidences(logits, unlearned.logits, plan, labels)
  found = evaluate(**confidences)
  seconds = {
    "train": sum(record["seconds"] for record in history),
    "unlearn": sum(unlearned.seconds),
    "predict": predict_seconds + unlearned.predict_seconds,
    "attack": time.perf_counter() - start,
  }
  audit = {
    "method": _method_record(options, resolved),
    "scale": _scale(context, options, plan),
    **as_dict(found),
    "accuracy": _accuracy(context, plan, logits, unlearned.logits),
    "diverged": unlearned.diverged,
    "seconds": {**seconds, "total": sum(seconds.values())},
    "unlearn_seconds": unlearned.seconds,
  }
  audit["statements"] = audit_page.statements(audit)
  files.save_arrays(
    context.run_dir / "audit.npz",
    {
      **confidences,
      "ids": np.asarray(context.train.ids)[plan.targets],
      "labels": labels,
      "is_trained": plan.is_trained,
      **_arrays(found),
    },
  )
  jobs.write_json(context.run_dir / "audit.json", audit)
  print("\n".join(audit["statements"]))
  return audit_page.build(context.run_dir, audit, found)


def check(options: Options) -> dict[str, Any]:
  """Raises ValueError for what is wrong before any work.

  Returns:
    The arguments to change.
  """
  jobs.check(options)
  checks.one_of("method", options.method_name, baselines.METHODS)
  checks.integer("num_models", options.num_models, at_least=_MIN_MODELS)
  if options.num_models % 4:
    raise ValueError(
      "num_models must be a multiple of 4, for two halves of those never"
      f" trained on an image, got {options.num_models}"
    )
  if options.num_targets is not None:
    checks.integer("num_targets", options.num_targets, at_least=2)
    if options.num_targets % 2:
      raise ValueError(
        "num_targets must be even, for a half in each model, got"
        f" {options.num_targets}"
      )
  fraction = options.retain_fraction
  checks.number("retain_fraction", fraction, above=0, at_most=1)
  checks.one_of("settings", options.settings, compare_recipes.SETTINGS)
  checks.one_of("mode", options.mode, ensembles.MODES)
  for name in ("weights", "pretrained"):
    if getattr(options, name) is not None:
      raise ValueError(
        f"{name} must be None, as an audit trains many models from the start,"
        f" got {getattr(options, name)}"
      )
  if options.training.num_parts > 1:
    raise ValueError(
      "training.num_parts must be 1 for small models, got"
      f" {options.training.num_parts}"
    )
  overrides = compare_recipes.parse(options.set)
  for method in overrides:
    if method != options.method_name:
      raise ValueError(f"set must be of the method audited, got {method!r}")
  folder = jobs.run_dir(options)
  if folder.is_dir() and options.resume:
    before = jobs.read_json(folder / "options.json")
    if not before and (folder / "checkpoints").exists():
      raise ValueError(
        f"name must be that of an audit to resume, got {folder}: no"
        " options.json"
      )
    for name, value in before.items():
      if value != getattr(options, name):
        raise ValueError(
          f"{name} must be as in the audit that is resumed, {value}, got"
          f" {getattr(options, name)}"
        )
  _check_pool(options)
  return overrides.get(options.method_name, {})


def _check_pool(options: Options) -> None:
  """Counts what can be audited, before a run folder is made."""
  train, test, _ = sets.load(options)
  if options.num_train is not None:
    checks.integer("num_train", options.num_train, at_least=1)
    train = data.subset(train, min(options.num_train, len(train)))
  asked = requests.ask(
    dataclasses.replace(options, twins="ignore"), train, test
  )
  _sizes(options, len(asked.split.forget), len(train))


def _sizes(options: Options, num_pool: int, num_train: int) -> tuple[int, int]:
  """Returns how many images are audited, and how many others a model has."""
  num_targets = options.num_targets
  if num_targets is None:
    num_targets = min(_NUM_TARGETS, num_pool // 8 * 2)
  if not 2 <= num_targets <= num_pool:
    raise ValueError(
      "num_targets must be at least 2 and at most the training images that"
      f" match the request, {num_pool}, got {num_targets}"
    )
  num_others = round(options.retain_fraction * (num_train - num_targets))
  if num_others < 2:
    raise ValueError(
      "num_targets and retain_fraction must leave each model 2 other images of"
      f" {num_train}, got {num_targets} and {options.retain_fraction}"
    )
  return num_targets, num_others


def draw(options: Options, context: jobs.Context) -> Plan:
  """Draws the audited images, and the other images of each model.

  All models have as many of both, so that one compiled program serves all.

  Args:
    options: The options.
    context: The job's.

  Returns:
    The plan; the same for the same seed.
  """
  rng = np.random.default_rng(options.seed)
  ids = np.asarray(context.train.ids)
  pool = np.flatnonzero(np.isin(ids, np.asarray(context.split.forget.ids)))
  num_targets, num_others = _sizes(options, len(pool), len(ids))
  targets = np.sort(rng.permutation(pool)[:num_targets])
  others = np.setdiff1d(np.arange(len(ids)), targets)
  chosen = [
    np.sort(rng.permutation(others)[:num_others])
    for _ in range(options.num_models // 2)
  ]
  test = np.sort(rng.permutation(len(context.test))[:_MAX_TEST])
  first = [
    np.isin(np.arange(num_targets), rng.permutation(num_targets)[::2])
    for _ in chosen
  ]
  is_trained = np.stack([half for each in first for half in (each, ~each)])
  return Plan(targets, is_trained, np.repeat(chosen, 2, 0), test)


def _ensemble(
  context: jobs.Context, options: Options, plan: Plan
) -> tuple[types.Variables, list[dict[str, Any]]]:
  """Trains the models, or finds them in the run."""
  name = "ensemble"
  found = checkpoints.run_checkpoints(context.run_dir)
  if name in found:
    variables: Any = checkpoints.restore(found[name])
    return variables, checkpoints.metadata(found[name])["history"]
  is_sharded = options.mode == "sharded"
  variables, history = ensembles.train(
    context.model,
    context.train,
    plan.membership(len(context.train)),
    jax.random.fold_in(jax.random.key(options.seed), 0),
    # What the comparison retrains with is what the job trains with.
    **compare_recipes.resolve("retrain", context).arguments,
    mode=options.mode,
    mesh=parallel.create_mesh(options.num_devices) if is_sharded else None,
  )
  checkpoints.save_run(
    context.run_dir, name, variables, metadata={"history": history}
  )
  return variables, history


def _of_model(context: jobs.Context, plan: Plan, index: int) -> jobs.Context:
  """Returns the job of one model: to forget its targets, to keep the others."""
  split = types.Split(
    context.train.take(plan.targets[plan.is_trained[index]]),
    context.train.take(plan.others[index]),
  )
  here = context._replace(asked=context.asked._replace(split=split))
  unlearning = dataclasses.replace(
    context.job.unlearning, target=jobs.stop_target(here)
  )
  job = dataclasses.replace(context.job, unlearning=unlearning)
  return here._replace(job=job)


def _resolve(
  context: jobs.Context,
  options: Options,
  plan: Plan,
  overrides: Mapping[str, Any],
) -> compare_recipes.Resolved:
  """Returns the method's arguments, the same for all models.

  They and the sizes are all that a compiled update depends on.
  """
  here = _of_model(context, plan, 0)
  resolved = compare_recipes.resolve(
    options.method_name,
    here,
    settings=options.settings,
    overrides=overrides,
  )
  if _is_aimed(options, resolved):
    resolved.record["target"] = here.job.unlearning.target
  path = context.run_dir / "unlearned" / options.method_name / "arguments.json"
  before = jobs.read_json(path)
  now = json.loads(json.dumps(resolved.record))
  if before and before != now:
    name = next(x for x in {**before, **now} if before.get(x) != now.get(x))
    raise ValueError(
      f"{name} of {options.method_name} must be as in the models that have"
      f" unlearned, {before.get(name)}, got {now.get(name)}: choose another"
      f" name, or remove {path.parent}"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  jobs.write_json(path, now)
  return resolved


def _is_aimed(options: Options, resolved: compare_recipes.Resolved) -> bool:
  """Whether unlearning ends at an accuracy that depends on the model."""
  return (
    options.method_name in compare_recipes.OURS
    and "target_accuracy" not in resolved.record
  )


def _unlearn_all(
  context: jobs.Context,
  options: Options,
  resolved: compare_recipes.Resolved,
  plan: Plan,
  variables: types.Variables,
  images: np.ndarray,
) -> Unlearned:
  """Unlearns from each model the targets that it has, if not done."""
  folder = context.run_dir / "unlearned" / options.method_name
  num_models = len(plan.others)
  with progress.bar(
    f"unlearning by {options.method_name}",
    num_models,
    unit="model",
    is_shown=True,
  ) as bar:
    for index in range(num_models):
      if not (folder / f"{index:04}.json").exists():
        own = jax.tree.map(lambda x, i=index: x[i], variables)
        here = _of_model(context, plan, index)
        _unlearn(here, options, resolved, own, images, folder, index)
      bar.advance(1)
  records = [
    jobs.read_json(folder / f"{index:04}.json") for index in range(num_models)
  ]
  done = [record for record in records if record["reason"] is None]
  shape = (num_models, len(images), context.train.num_classes)
  logits = np.full(shape, np.nan, np.float32)
  for index in (record["model"] for record in done):
    logits[index] = files.read_arrays(folder / f"{index:04}.npz", "logits")[
      "logits"
    ]
  return Unlearned(
    logits=logits,
    seconds=[record["seconds"] for record in done],
    predict_seconds=sum(record["predict_seconds"] for record in done),
    diverged=[
      {name: record[name] for name in ("model", "step", "reason")}
      for record in records
      if record["reason"] is not None
    ],
  )


def _unlearn(
  context: jobs.Context,
  options: Options,
  resolved: compare_recipes.Resolved,
  variables: types.Variables,
  images: np.ndarray,
  folder: pathlib.Path,
  index: int,
) -> None:
  """Unlearns from one model; its record is written last, when all is there."""
  method = baselines.find(options.method_name)
  key = jax.random.fold_in(jax.random.key(options.seed), 1)
  record: dict[str, Any] = {"model": index, "step": None, "reason": None}
  start = time.perf_counter()
  try:
    arguments = dict(resolved.arguments)
    if _is_aimed(options, resolved):
      arguments["target_accuracy"] = jobs.target_accuracy(context, variables)
    output = method.fn(
      context.model,
      variables,
      context.split,
      jax.random.fold_in(key, index),
      **arguments,
      mesh=context.mesh,
      show_progress=False,
    )
    jax.block_until_ready(output.variables)
    record["seconds"] = time.perf_counter() - start
    logits = inference.predict(
      context.model.apply,
      output.variables,
      images,
      batch_size=context.job.eval_batch_size,
    )
    if not np.isfinite(logits).all():
      raise FloatingPointError("the logits are not finite after the last step")
    record["predict_seconds"] = time.perf_counter() - start - record["seconds"]
    files.save_arrays(folder / f"{index:04}.npz", {"logits": logits})
  except FloatingPointError as error:
    step = re.search(r"step (\d+)", str(error))
    record["reason"] = f"diverged: {error}"
    record["step"] = None if step is None else int(step.group(1))
  except ValueError as error:
    raise ValueError(f"{method.name}: {error}") from error
  jobs.write_json(folder / f"{index:04}.json", record)


def _confidences(
  logits: np.ndarray, unlearned: np.ndarray, plan: Plan, labels: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns confidences in the audited images, the arguments of `evaluate`."""
  before, after = (
    ulira.logit_confidence(part[:, : len(labels)], labels)
    for part in (logits, unlearned)
  )
  return {
    "original": plan.by_pair(before, is_trained=True),
    "unlearned": plan.by_pair(after, is_trained=True),
    "never_trained": plan.by_pair(before, is_trained=False),
    "never_unlearned": plan.by_pair(after, is_trained=False),
  }


def evaluate(
  original: np.ndarray,
  unlearned: np.ndarray,
  never_trained: np.ndarray,
  never_unlearned: np.ndarray | None = None,
) -> audit_page.Figures:
  """Attacks the models before and after unlearning, and a control.

  Args:
    original: float `[P, T]`, confidences (`ulira.logit_confidence`) in the
      audited images of the model of each pair that was trained on the image.
    unlearned: float `[P, T]`, of the same models after unlearning. Pairs with
      NaN are left out, and with too few pairs what needs more.
    never_trained: float `[P, T]`, of the other model of each pair.
    never_unlearned: float `[P, T]`, of the other model after unlearning what it
      had; the same as before by default. Models that unlearned exactly have
      seen none of the audited images, and cannot differ from these; from those
      before unlearning they do, which have half of the others of its kind.

  Returns:
    The figures.
  """
  # Both halves of the control have images of each model, as both sides of the
  # attack have.
  is_first = np.random.default_rng(0).random((len(never_trained) // 2, 1)) < 0.5
  is_first = is_first ^ (np.arange(never_trained.shape[1]) % 2 == 0)
  first, second = (
    np.where(choice, never_trained[::2], never_trained[1::2])
    for choice in (is_first, ~is_first)
  )
  if never_unlearned is None:
    never_unlearned = never_trained
  is_done = np.isfinite(unlearned + never_unlearned).all(1)
  unlearned = unlearned[is_done]
  pairs = {
    "original": (original, never_trained),
    "unlearned": (unlearned, never_unlearned[is_done]),
    "control": (first, second),
  }
  attacks = {
    side: ulira.attack(*pair)
    for side, pair in pairs.items()
    if len(pair[0]) >= _MIN_SIDE
  }
  is_large = len(first) >= _MIN_HISTOGRAM_MODELS
  klom_method = "histogram" if is_large else "gaussian"

  def klom(halves: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    each = [ulira.klom(*pair, method=klom_method) for pair in halves]
    result: np.ndarray = np.mean(each, 0)
    return result

  # With few models KLOM is far above 0, so that all sides have as many models
  # as the control: halves.
  divergences = {
    side: klom([(p, q) for p in (x[::2], x[1::2]) for q in (first, second)])
    for side, x in (("original", original), ("unlearned", unlearned))
    if len(x) >= 2 * _MIN_SIDE
  }
  divergences["control"] = klom([(first, second), (second, first)])
  change = None
  if "unlearned" in attacks:
    before = (original[is_done], never_trained[is_done])
    change = auc_interval(*pairs["unlearned"], less=before)
  return audit_page.Figures(
    attacks=attacks,
    intervals={side: auc_interval(*pairs[side]) for side in attacks},
    klom=divergences,
    klom_method=klom_method,
    change=change,
  )


def auc_interval(
  positives: np.ndarray,
  negatives: np.ndarray,
  *,
  less: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, float]:
  """Returns the 90 % interval of the attack's AUC over models (jackknife).

  The images stay, and one pair of models is left out at a time (of many, one of
  20 groups), as all images of a model move together. The attack is made anew
  without it: the distributions that it fits vary as much as what it scores, and
  resampling scores would miss that (intervals of 90 % then covered 60 to 80 %
  of simulated ones).

  Args:
    positives: float `[P, T]`, confidences; `P` 4 or more.
    negatives: float `[P, T]`, likewise.
    less: Positives and negatives of the same models, whose AUC is subtracted.
  """

  def auc(group: np.ndarray) -> float:
    left = [np.delete(x, group, 0) for x in (positives, negatives)]
    value = ulira.attack(*left).auc
    if less is not None:
      value -= ulira.attack(*(np.delete(x, group, 0) for x in less)).auc
    return value

  rows = np.arange(len(positives))
  groups = np.array_split(rows, min(_MAX_GROUPS, len(rows)))
  total = (len(groups) - 1) * float(np.var([auc(group) for group in groups]))
  half = scipy.stats.norm.ppf(0.95) * math.sqrt(total)
  value, lowest = auc(rows[:0]), 0.0 if less is None else -1.0
  return max(lowest, value - half), min(1.0, value + half)


def as_dict(found: audit_page.Figures) -> dict[str, Any]:
  """Returns the figures for JSON; None where one is not available."""
  attacks: dict[str, Any] = dict.fromkeys(SIDES)
  divergences: dict[str, Any] = dict.fromkeys(SIDES)
  for side, each in found.attacks.items():
    interval = list(found.intervals[side])
    attacks[side] = {**each.as_dict(), "auc_interval": interval}
  for side, values in found.klom.items():
    divergences[side] = {
      "median": float(np.median(values)),
      "percentile_95": float(np.percentile(values, 95)),
    }
  return {
    "attack": attacks,
    "change": None if found.change is None else list(found.change),
    "klom": {"method": found.klom_method, **divergences},
  }


def _arrays(found: audit_page.Figures) -> dict[str, np.ndarray]:
  names = ("fpr", "tpr", "positive_scores", "negative_scores")
  return {
    **{
      f"{side}_{name}": getattr(each, name)
      for side, each in found.attacks.items()
      for name in names
    },
    **{f"{side}_klom": values for side, values in found.klom.items()},
  }


def _accuracy(
  context: jobs.Context, plan: Plan, logits: np.ndarray, unlearned: np.ndarray
) -> dict[str, dict[str, float | None]]:
  """Mean accuracies over models, on the audited and on test images."""
  num_targets = len(plan.targets)
  labels = context.train.labels[plan.targets]
  test_labels = context.test.labels[plan.test]

  def mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None

  def is_right(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    right: np.ndarray = np.where(
      np.isnan(values[..., 0]), np.nan, values.argmax(-1) == truth
    )
    return right

  return {
    side: {
      "audited": mean(
        plan.by_pair(
          is_right(values[:, :num_targets], labels),
          is_trained=side != "control",
        )
      ),
      # Before unlearning all models are of both kinds.
      "test": mean(is_right(values[:, num_targets:], test_labels)),
    }
    for side, values in zip(SIDES, (logits, unlearned, logits), strict=True)
  }


def _method_record(
  options: Options, resolved: compare_recipes.Resolved
) -> dict[str, Any]:
  method = baselines.find(options.method_name)
  return {
    "name": method.name,
    "title": method.title,
    "paper": method.paper,
    "settings": resolved.settings,
    "arguments": resolved.record,
    "note": resolved.note,
  }


def _scale(
  context: jobs.Context, options: Options, plan: Plan
) -> dict[str, Any]:
  """How much was trained: models, images and epochs."""
  num_models, num_others = plan.others.shape
  num_targets, num_epochs = len(plan.targets), options.training.num_epochs
  images = num_models * (num_others + num_targets // 2)
  return {
    "models": num_models,
    "audited_images": num_targets,
    "pool": len(context.split.forget),
    "other_images": num_others,
    "epochs": num_epochs,
    "image_passes": images * num_epochs,
  }


if __name__ == "__main__":
  cli.run(main)
