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
    runs/<name>/figures/, tables/           what the page shows, for papers
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from experiments import (
  attack,
  cells,
  cli,
  compilation,
  contexts,
  files,
  jobs,
  recipes,
  requests,
  run_folder,
  sets,
)
from experiments.comparison import recipes as method_recipes
from experiments.pages import audit as audit_page
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

# With 32 models enough pairs for a false positive rate of 0.1 %. A larger part
# of a class would change its share, and the attack would find that instead.
_NUM_TARGETS = 64
_MAX_TEST = 1000
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

    From float `[M, T]` come float `[M / 2, T]`.
    """
    first = self.is_trained[::2] == is_trained
    return np.where(first, values[::2], values[1::2])

  def confidences(
    self, logits: np.ndarray, unlearned: np.ndarray, labels: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Returns confidences in the audited images, as `attack.evaluate` takes.

    Args:
      logits: float `[M, T + test, K]`, of the models before unlearning.
      unlearned: Likewise, after it.
      labels: int `[T]`, of the audited images.
    """
    before, after = (
      ulira.logit_confidence(part[:, : len(labels)], labels)
      for part in (logits, unlearned)
    )
    return {
      "original": self.by_pair(before, is_trained=True),
      "unlearned": self.by_pair(after, is_trained=True),
      "never_trained": self.by_pair(before, is_trained=False),
      "never_unlearned": self.by_pair(after, is_trained=False),
    }


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
  """Audits; see the program's options. Returns the path of the page.

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
  settled = {name: getattr(options, name) for name in _PLAN_FIELDS}
  run_folder.write_json(context.run_dir / "options.json", settled)
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
  confidences = plan.confidences(logits, unlearned.logits, labels)
  figures = attack.evaluate(**confidences)
  seconds = {
    "train": sum(record["seconds"] for record in history),
    "unlearn": sum(unlearned.seconds),
    "predict": predict_seconds + unlearned.predict_seconds,
    "attack": time.perf_counter() - start,
  }
  audit = {
    "method": _method_record(resolved),
    "scale": _scale(context, options, plan),
    **figures.as_dict(),
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
      **figures.arrays(),
    },
  )
  run_folder.write_json(context.run_dir / "audit.json", audit)
  print("\n".join(audit["statements"]))
  return audit_page.build(context.run_dir, audit, figures)


def check(options: Options) -> dict[str, Any]:
  """Raises ValueError for what is wrong before any work.

  Returns:
    The arguments to change.
  """
  jobs.check(options)
  checks.one_of("method", options.method_name, baselines.METHODS)
  checks.integer("num_models", options.num_models, at_least=attack.MIN_MODELS)
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
  checks.one_of("settings", options.settings, method_recipes.SETTINGS)
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
  overrides = method_recipes.parse(options.set)
  for method in overrides:
    if method != options.method_name:
      raise ValueError(f"set must be of the method audited, got {method!r}")
  folder = run_folder.run_dir(options)
  if folder.is_dir() and options.resume:
    before = run_folder.read_json(folder / "options.json")
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
  job = dataclasses.replace(options, twins="ignore")
  num_pool = len(requests.ask(job, train, test).split.forget)
  _sizes(options, num_pool, len(train))


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


def draw(options: Options, context: contexts.Context) -> Plan:
  """Draws the audited images, and the other images of each model.

  All models have as many of both, so that one compiled program serves all. The
  plan is the same for the same seed.
  """
  rng = np.random.default_rng(options.seed)
  ids = np.asarray(context.train.ids)
  pool = np.flatnonzero(np.isin(ids, np.asarray(context.split.forget.ids)))
  num_targets, num_others = _sizes(options, len(pool), len(ids))
  targets = np.sort(rng.permutation(pool)[:num_targets])
  others = np.setdiff1d(np.arange(len(ids)), targets)
  num_pairs = options.num_models // 2
  rows = [
    np.sort(rng.permutation(others)[:num_others]) for _ in range(num_pairs)
  ]
  test = np.sort(rng.permutation(len(context.test))[:_MAX_TEST])
  halves = [
    np.isin(np.arange(num_targets), rng.permutation(num_targets)[::2])
    for _ in range(num_pairs)
  ]
  is_trained = np.stack([x for half in halves for x in (half, ~half)])
  return Plan(targets, is_trained, np.repeat(rows, 2, 0), test)


def _ensemble(
  context: contexts.Context, options: Options, plan: Plan
) -> tuple[types.Variables, list[dict[str, Any]]]:
  """Trains the models, or finds them in the run."""
  name = "ensemble"
  finished = checkpoints.run_checkpoints(context.run_dir)
  if name in finished:
    variables: Any = checkpoints.restore(finished[name])
    return variables, checkpoints.metadata(finished[name])["history"]
  is_sharded = options.mode == "sharded"
  variables, history = ensembles.train(
    context.model,
    context.train,
    plan.membership(len(context.train)),
    jax.random.fold_in(jax.random.key(options.seed), 0),
    # What the comparison retrains with is what the job trains with.
    **method_recipes.resolve("retrain", context).arguments,
    mode=options.mode,
    mesh=parallel.create_mesh(options.num_devices) if is_sharded else None,
  )
  checkpoints.save_run(
    context.run_dir, name, variables, metadata={"history": history}
  )
  return variables, history


def of_model(
  context: contexts.Context, plan: Plan, index: int
) -> contexts.Context:
  """Returns the job of one model: to forget its targets, to keep the others."""
  split = types.Split(
    context.train.take(plan.targets[plan.is_trained[index]]),
    context.train.take(plan.others[index]),
  )
  of_split = context._replace(selection=context.selection._replace(split=split))
  target = contexts.stop_target(of_split)
  if target != context.job.unlearning.target and target == "proxy":
    target = "unseen"  # Proxies of each model would cost as much as all models.
  unlearning = dataclasses.replace(context.job.unlearning, target=target)
  job = dataclasses.replace(context.job, unlearning=unlearning)
  return of_split._replace(job=job)


def _resolve(
  context: contexts.Context,
  options: Options,
  plan: Plan,
  overrides: Mapping[str, Any],
) -> method_recipes.Resolved:
  """Returns the method's arguments, the same for all models.

  They and the sizes are all that a compiled update depends on.
  """
  first = of_model(context, plan, 0)
  resolved = method_recipes.resolve(
    options.method_name, first, settings=options.settings, overrides=overrides
  )
  if cells.is_aimed(resolved):
    resolved.record["target"] = first.job.unlearning.target
  path = context.run_dir / "unlearned" / resolved.method / "arguments.json"
  before = run_folder.read_json(path) or None
  difference = cells.change(before, resolved.record)
  if difference is not None:
    name, held, value = difference
    raise ValueError(
      f"{name} of {resolved.method} must be as in the models that have"
      f" unlearned, {held}, got {value}: choose another name, or remove"
      f" {path.parent}"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(path, resolved.record)
  return resolved


def _unlearn_all(
  context: contexts.Context,
  options: Options,
  resolved: method_recipes.Resolved,
  plan: Plan,
  variables: types.Variables,
  images: np.ndarray,
) -> Unlearned:
  """Unlearns from each model the targets that it has, if not done."""
  folder = context.run_dir / "unlearned" / resolved.method
  num_models = len(plan.others)
  stores = [
    cells.Store(folder / f"{index:04}.json", folder / f"{index:04}.npz")
    for index in range(num_models)
  ]
  title = f"unlearning by {resolved.method}"
  with progress.bar(title, num_models, unit="model", is_shown=True) as bar:
    for index, store in enumerate(stores):
      if not store.is_done():
        model = jax.tree.map(lambda x, i=index: x[i], variables)
        job = of_model(context, plan, index)
        unlearn(job, options.seed, resolved, model, images, store, index)
      bar.advance(1)
  records = [store.read() for store in stores]
  done = [record for record in records if record["reason"] is None]
  shape = (num_models, len(images), context.train.num_classes)
  logits = np.full(shape, np.nan, np.float32)
  for index in (record["model"] for record in done):
    logits[index] = stores[index].read_logits()["logits"]
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


def unlearn(
  context: contexts.Context,
  seed: int,
  resolved: method_recipes.Resolved,
  variables: types.Variables,
  images: np.ndarray,
  store: cells.Store,
  index: int,
) -> None:
  """Unlearns from the model `index`, and keeps its logits of images."""
  compilation.make_room()
  key = jax.random.fold_in(jax.random.key(seed), 1)
  record: dict[str, Any] = {"model": index, "step": None, "reason": None}
  logits: dict[str, Any] = {}
  try:
    unlearned = cells.unlearn(
      context,
      resolved,
      variables,
      jax.random.fold_in(key, index),
      show_progress=False,
    )
    record["seconds"] = unlearned.seconds
    start = time.perf_counter()
    predicted = inference.predict(
      context.model.apply,
      unlearned.output.variables,
      images,
      batch_size=context.job.eval_batch_size,
    )
    cells.check_finite(predicted)
    record["predict_seconds"] = time.perf_counter() - start
    logits = {"logits": predicted}
  except FloatingPointError as error:
    record |= cells.divergence(error)
  except ValueError as error:
    raise ValueError(f"{resolved.method}: {error}") from error
  store.write(record, logits)


def _accuracy(
  context: contexts.Context,
  plan: Plan,
  logits: np.ndarray,
  unlearned: np.ndarray,
) -> dict[str, dict[str, float | None]]:
  """Mean accuracies over models, on the audited and on test images."""
  num_targets = len(plan.targets)
  labels = np.concatenate(
    [context.train.labels[plan.targets], context.test.labels[plan.test]]
  )
  accuracies = {}
  sides = zip(attack.SIDES, (logits, unlearned, logits), strict=True)
  for side, values in sides:
    # What diverged is neither right nor wrong.
    is_lost = np.isnan(values[..., 0])
    is_right = np.where(is_lost, np.nan, values.argmax(-1) == labels)
    is_trained = side != "control"
    audited = plan.by_pair(is_right[:, :num_targets], is_trained=is_trained)
    # Before unlearning all models are of both kinds.
    parts = {"audited": audited, "test": is_right[:, num_targets:]}
    accuracies[side] = {
      name: None if np.isnan(part).all() else float(np.nanmean(part))
      for name, part in parts.items()
    }
  return accuracies


def _method_record(resolved: method_recipes.Resolved) -> dict[str, Any]:
  method = baselines.find(resolved.method)
  return {
    "name": method.name,
    "title": method.title,
    "paper": method.paper,
    "settings": resolved.settings,
    "arguments": resolved.record,
    "note": resolved.note,
  }


def _scale(
  context: contexts.Context, options: Options, plan: Plan
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
