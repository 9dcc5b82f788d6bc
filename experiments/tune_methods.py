"""Choose the settings of unlearning methods, all by the same search.

    python -m experiments.tune --recipe digits --part unlearning \
      --forget-classes 1 --seed 100 --seeds 2 --methods psg eu_k scrub

Each method has `--trials` trials, ours too. The originals are trained on four
fifths of the training set, the request is taken out of them, and all is
measured on the fifth that is left, against models that were trained on the
retained part of the four fifths. No test image is looked at, and the recipe's
own request and the seeds of the published tables are refused. Of `--grid
METHOD.ARGUMENT=V1,V2` the product of a method's values is tried; without it,
what `experiments.comparison.trials` plans.

    runs/<name>/config.json, request.json, data.json    as other programs
    runs/<name>/validation/models/seed-<seed>/          original and references
    runs/<name>/trials.csv                              a line a trial and seed

What is there is not done again: the same command goes on, also with more
methods.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import (
  cells,
  compilation,
  contexts,
  files,
  jobs,
  recipes,
  requests,
  run_folder,
)
from experiments.comparison import recipes as method_recipes
from experiments.comparison import references as reference_models
from experiments.comparison import trials as trials_lib
from psg_jax import baselines, checks, data, forget, metrics, types
from psg_jax import files as library_files

VALIDATION_FRACTION = 0.2
PUBLISHED_SEEDS = range(1, 6)
PARTS = ("test_forget", "test_retain")
# Those of which a model's weights are made.
_MODEL_OPTIONS = (
  *("model", "width", "dropout", "precision", "pretrained", "mean", "std"),
  *("training", "references"),
)
# As two models of one seed may be, but for rounding.
_LEAST_DISTANCE = 1e-12


class Search(NamedTuple):
  """What is tried.

  Attributes:
    methods: Names in `baselines.METHODS`; all where there is none.
    num_trials: Of each method, at most.
    num_seeds: Of each trial, from the job's on.
    grid: Values, as `trials.read_grid` takes them.
    table: The file of the trials; None for that of the run folder.
  """

  methods: tuple[str, ...] = ()
  num_trials: int = 6
  num_seeds: int = 1
  grid: tuple[str, ...] = ()
  table: str | None = None


class Yardstick(NamedTuple):
  """The retrained models of a seed.

  Attributes:
    logits: Of each of them `[N, K]`, by the names in `PARTS`.
    seconds: Of a training, their mean.
  """

  logits: Sequence[Mapping[str, np.ndarray]]
  seconds: float


def run(job: recipes.Job, search: Search) -> str:
  """Runs the trials that are missing.

  Args:
    job: The job, with the request to try and the number of references.
    search: What to try.

  Returns:
    The trials as text, the one to take of each method first; see
    `trials.summary`.

  Raises:
    ValueError: If an option is wrong; nothing is trained then.
    FloatingPointError: If the training of an original or retrained model
      diverges.
  """
  job = dataclasses.replace(job, name=job.name or f"{job.recipe}_tune_methods")
  methods = tuple(dict.fromkeys(search.methods or baselines.METHODS))
  _check(job, search, methods)
  grids = trials_lib.read_grid(search.grid, methods, search.num_trials)
  folder = run_folder.run_dir(job)
  path = pathlib.Path(search.table or folder / "trials.csv")
  # The options are compared with those of the run that is there.
  is_kept = folder.exists() and not job.overwrite
  job = dataclasses.replace(job, resume=job.resume or is_kept)
  context = held_out(jobs.prepare(job))
  hint = f"the same command goes on with {path}"
  files.at_end.enter_context(files.lock(path, argument="table", hint=hint))
  job_digest = _digest(context)
  rows = trials_lib.read(path, job_digest)
  trials = [
    trial
    for method in methods
    for trial in grids.get(method)
    or trials_lib.planned(method, context, search.num_trials)
  ]
  trials_lib.check_budget(rows, trials, search.num_trials)
  path.parent.mkdir(parents=True, exist_ok=True)
  seeds = range(job.seed, job.seed + search.num_seeds)
  finished = {(row.trial, row.seed): row for row in rows}
  # The budget is that of the last search a line was part of.
  for place, row in finished.items():
    if row.trial in trials:
      finished[place] = row._replace(budget=search.num_trials)
  missing = [(x, y) for y in seeds for x in trials if (x, y) not in finished]
  for trial, seed, status, figures in _run_all(context, missing):
    finished[trial, seed] = trials_lib.Row(
      trial, seed, search.num_trials, job_digest, status, figures
    )
    files.write_text(path, trials_lib.to_csv(list(finished.values())))
  return trials_lib.summary([finished[x, y] for x in trials for y in seeds])


def _check(job: recipes.Job, search: Search, methods: Sequence[str]) -> None:
  """Raises ValueError for what can be seen wrong before any work."""
  for method in methods:
    checks.one_of("methods", method, baselines.METHODS)
  checks.integer("trials", search.num_trials, at_least=1)
  checks.integer("seeds", search.num_seeds, at_least=1)
  checks.integer("references", job.references, at_least=2)
  jobs.check(job)
  if job.weights is not None:
    raise ValueError(
      "weights must not be given: that model has seen what is measured on, got"
      f" {job.weights}"
    )
  published = recipes.find(job.recipe)
  if all(
    getattr(job, name) == getattr(published, name)
    for name in run_folder.REQUEST_FIELDS
    if name not in ("twins", "by")
  ):
    raise ValueError(
      f"forget_classes must ask for other images than the recipe"
      f" {job.recipe} does, whose figures are published, got"
      f" {job.forget_classes}"
    )
  # References have the seeds after that of their original.
  last = job.seed + search.num_seeds + job.references - 2
  if job.seed <= PUBLISHED_SEEDS[-1] and last >= PUBLISHED_SEEDS[0]:
    raise ValueError(
      "seed must leave out those of the published tables, 1 to 5, got"
      f" {job.seed} to {last}"
    )


def held_out(context: contexts.Context) -> contexts.Context:
  """Returns the job on four fifths of its training set, a fifth to test it.

  Args:
    context: The job on all of it.

  Returns:
    The job with the part of its forget set that is among the four fifths, and
    of the fifth, as test images, those that match the request. Its models have
    a folder of their own.

  Raises:
    ValueError: If a part has no image to forget or none to retain.
  """
  job = context.job
  part, validation = data.hold_out(context.train, VALIDATION_FRACTION, job.seed)
  ids = np.asarray(context.split.forget.ids)
  selection = context.selection._replace(
    split=_split(part, np.isin(np.asarray(part.ids), ids)),
    test_split=_split(
      validation, forget.matching(validation, context.selection.request)
    ),
  )
  for split in (selection.split, selection.test_split):
    if not (len(split.forget) and len(split.retain)):
      raise ValueError(
        "the request must leave images to forget and to retain in four fifths"
        f" and in a fifth of the training set, got {len(split.forget)} and"
        f" {len(split.retain)} in one of them"
      )
  retrained_model = None
  if context.retrained_model is not None:
    retrained_model = contexts.network(job, selection.split.retain)
  return context._replace(
    run_dir=context.run_dir / "validation",
    train=part,
    test=validation,
    selection=selection,
    model=contexts.network(job, part),
    retrained_model=retrained_model,
  )


def _split(dataset: types.Dataset, is_forgotten: np.ndarray) -> types.Split:
  return types.Split(
    dataset.take(np.flatnonzero(is_forgotten)),
    dataset.take(np.flatnonzero(~is_forgotten)),
  )


def _digest(context: contexts.Context) -> str:
  """Says in few digits what figures are measured on, and with what models."""
  options = run_folder.job_options(context.job)
  parts = [*context.split, *context.selection.test_split]
  content = {
    "images": [requests.images_hash([x]) for x in parts],
    **{name: options[name] for name in _MODEL_OPTIONS},
  }
  return library_files.digest(content)[:8]


def _run_all(
  context: contexts.Context, missing: Sequence[tuple[trials_lib.Trial, int]]
) -> Iterator[tuple[trials_lib.Trial, int, str, dict[str, float]]]:
  """Runs trials, those of a seed after one another.

  Yields:
    The trial, its seed, the status and the figures.
  """
  seed, at_seed = None, context
  for number, (trial, next_seed) in enumerate(missing, 1):
    if next_seed != seed:
      seed = next_seed
      at_seed = reference_models.at_seed(context, seed)
      original = jobs.original(at_seed)
      yardstick = _yardstick(at_seed)
    status, figures = _run(at_seed, trial, original, yardstick)
    nearness = (
      f"{figures['normalised_forget']:.3g} from retraining where forgotten,"
      f" {figures['normalised_retain']:.3g} elsewhere"
      if figures
      else status
    )
    line = f"{trial.method} {trial.settings}, seed {seed}: {nearness}"
    print(f"[{number}/{len(missing)}] {line}", flush=True)
    yield trial, seed, status, figures


def _yardstick(context: contexts.Context) -> Yardstick:
  """Trains or restores the retrained models of a seed."""
  models = jobs.references(context)
  times = run_folder.read_json(context.run_dir / "history.json")
  return Yardstick(
    [
      cells.predict(context.of(name), variables, PARTS)[0]
      for name, variables in models.items()
    ],
    float(np.mean([times[f"{name}_seconds"] for name in models])),
  )


def _run(
  context: contexts.Context,
  trial: trials_lib.Trial,
  original: types.Variables,
  yardstick: Yardstick,
) -> tuple[str, dict[str, float]]:
  """Unlearns once; gives the status and the figures."""
  compilation.make_room()
  if trial.method == "retrain":
    context = context.of("retrained")
  resolved = method_recipes.resolve(
    trial.method, context, overrides=trial.overrides
  )
  key = contexts.model_key(context, "unlearned")
  try:
    unlearned = cells.unlearn(
      context, resolved, original, key, show_progress=sys.stderr.isatty()
    )
    logits, _ = cells.predict(context, unlearned.output.variables, PARTS)
    cells.check_finite(*logits.values())
  except FloatingPointError:
    return cells.DIVERGED, {}
  except ValueError as error:
    raise ValueError(f"{trial.method} {trial.settings}: {error}") from error
  labels = {name: context.parts[name].labels for name in PARTS}
  return cells.DONE, {
    **measure(logits, yardstick.logits, labels),
    "seconds": unlearned.seconds,
    "cost": unlearned.seconds / yardstick.seconds,
  }


def measure(
  logits: Mapping[str, np.ndarray],
  references: Sequence[Mapping[str, np.ndarray]],
  labels: Mapping[str, np.ndarray],
) -> dict[str, float]:
  """Measures a model by retrained ones.

  A normalised distance is the mean `KL(reference ‖ model)` over references, by
  the mean over their ordered pairs: 1 for another retraining.

  Args:
    logits: The model's `[N, K]`, by the names in `PARTS`.
    references: Likewise of retrained models, two or more.
    labels: int `[N]`, likewise.

  Returns:
    `forget_accuracy`, `retain_accuracy` in [0, 1]; `normalised_forget`,
    `normalised_retain`; and, of the images to forget, `agreement`, the mean
    share of predictions that are those of a reference, and
    `reference_agreement`, that of references with one another.
  """
  figures: dict[str, float] = {}
  others = [(x, y) for x in references for y in references if x is not y]
  for name, part in zip(("forget", "retain"), PARTS, strict=True):
    figures[f"{name}_accuracy"] = _mean(
      [metrics.accuracy(logits[part], labels[part])]
    )
    distance = _mean(
      [metrics.kl_divergence(x[part], logits[part]) for x in references]
    )
    floor = _mean([metrics.kl_divergence(x[part], y[part]) for x, y in others])
    figures[f"normalised_{name}"] = distance / max(floor, _LEAST_DISTANCE)
  part = PARTS[0]
  figures["agreement"] = _mean(
    [metrics.agreement(logits[part], x[part]) for x in references]
  )
  figures["reference_agreement"] = _mean(
    [metrics.agreement(y[part], x[part]) for x, y in others]
  )
  return figures


def _mean(values: Sequence[Any]) -> float:
  return float(np.mean(values))
