r"""Choose learning rates, batches and passes of a recipe, without test images.

    python -m experiments.tune --recipe digits --rates 0.02 0.05 0.1 0.2
    python -m experiments.tune --recipe digits --part unlearning \
      --forget-classes 1 --seed 100 --methods psg eu_k scrub --trials 4

trains on four fifths of the training set, a choice of the seed, and measures on
the fifth that is left. The table is a line a trial and seed; trials that stand
in it are not done again, so that an interrupted search goes on. The first line
of what it prints is the trial to take: of those within a standard error of the
best accuracy, the one with the lowest cross-entropy. The settings of unlearning
methods are chosen by `experiments.tune_methods`. The tables are kept in
docs/tuning.
"""

import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from experiments import cli, contexts, files, jobs, recipes, tune_methods
from psg_jax import checks, data, inference, metrics, training, types

_RATES = (0.02, 0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, and what is to be tried in its training or after it."""

  part: Literal["training", "unlearning"] = "training"
  """What is tried; unlearning has models trained by the recipe."""
  rates: tuple[float, ...] = ()
  """Training: highest learning rates; 0.02, 0.05, 0.1 and 0.2 by default."""
  batch_sizes: tuple[int, ...] = ()
  """Training: images a step; the recipe's by default."""
  epochs: tuple[int, ...] = ()
  """Training: passes; the recipe's by default."""
  methods: tuple[str, ...] = ()
  """Unlearning: methods, of `psg_jax.baselines`; all by default."""
  trials: int = 6
  """Unlearning: trials of each method, the same number for all."""
  grid: tuple[str, ...] = ()
  """Unlearning: values to try, as METHOD.ARGUMENT=V1,V2; several of a method
  are multiplied. By default the learning rate and the passes are varied."""
  references: int = 2
  """Unlearning: retrained models of each seed, at least 2."""
  seeds: int = 2
  """Trainings, and unlearnings, of each trial, from --seed on."""
  table: str | None = None
  """CSV file of the trials; by default <runs_dir>/<recipe>_training.csv, and
  of unlearning trials.csv in the run folder."""


class Trial(NamedTuple):
  """What is tried, as it stands in the table."""

  schedule: str
  learning_rate: float
  batch_size: int
  num_epochs: int
  num_images: int


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    trial: The settings.
    seed: Of the training.
    figures: Those of `FIGURES`, measured on the validation part; None for one
      that there is not.
  """

  trial: Trial
  seed: int
  figures: dict[str, float | None]


# The accuracy is in [0, 1], the loss in nats, and so is `spread`, the KL
# divergence from the model of the first seed.
FIGURES = ("accuracy", "loss", "spread", "seconds")
_FIELDS = (*Trial._fields, "seed", *FIGURES)


def main() -> None:
  """Runs the trials that are missing, and prints them, the best first."""
  print(run(cli.parse_job(Options, "Choose the settings of a recipe.")))


def run(options: Options) -> str:
  """Tries all settings; see the program's options.

  Args:
    options: The options.

  Returns:
    The trials as a table in text, the best first.

  Raises:
    ValueError: If an option is wrong; nothing is trained then.
  """
  tries_training = options.part == "training"
  others = ("methods", "grid")
  for name in others if tries_training else ("rates", "batch_sizes", "epochs"):
    if getattr(options, name):
      raise ValueError(
        f"{name} must not be given with part {options.part}, got"
        f" {getattr(options, name)}"
      )
  if not tries_training:
    search = tune_methods.Search(
      options.methods,
      options.trials,
      options.seeds,
      options.grid,
      options.table,
    )
    return tune_methods.run(options, search)
  return _tune_training(options)


def _tune_training(options: Options) -> str:
  tried = options.training
  options = dataclasses.replace(
    options,
    name=f"{options.recipe}_tune",
    rates=options.rates or _RATES,
    batch_sizes=options.batch_sizes or (tried.batch_size,),
    epochs=options.epochs or (tried.num_epochs,),
  )
  for rate in options.rates:
    checks.number("rates", rate, above=0)
  for name in ("batch_sizes", "epochs"):
    for value in getattr(options, name):
      checks.integer(name, value, at_least=1)
  checks.integer("seeds", options.seeds, at_least=1)
  path = pathlib.Path(
    options.table or f"{options.runs_dir}/{options.recipe}_training.csv"
  )
  files.at_end.enter_context(
    files.lock(
      path, argument="table", hint=f"the same command goes on with {path}"
    )
  )
  rows = read(path)
  context = jobs.prepare(options, is_read_only=True)
  trials = [
    Trial(tried.schedule, rate, batch_size, epochs, len(context.train))
    for epochs, batch_size, rate in itertools.product(
      options.epochs, options.batch_sizes, options.rates
    )
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  seeds = range(options.seed, options.seed + options.seeds)

  def is_missing(trial: Trial) -> bool:
    return not {row.seed for row in rows if row.trial == trial} >= set(seeds)

  missing = [trial for trial in trials if is_missing(trial)]
  kept = [row for row in rows if row.trial not in missing]
  for row in _rows(context, missing, seeds):
    kept.append(row)
    files.write_text(path, to_csv(kept))
  return summary([row for row in kept if row.trial in trials])


def _rows(
  context: contexts.Context, trials: Sequence[Trial], seeds: Sequence[int]
) -> Iterator[Row]:
  """Trains with each of the settings.

  The validation part is that of the first seed for all, so that models of
  several seeds are compared on images that none of them has seen.
  """
  part, validation = data.hold_out(
    context.train, tune_methods.VALIDATION_FRACTION, context.job.seed
  )
  for trial in trials:
    first: np.ndarray | None = None
    for seed in seeds:
      start = time.perf_counter()
      variables = _fit(context, trial, part, seed)
      seconds = time.perf_counter() - start
      log_probs = _log_probs(context, variables, validation)
      labels = validation.labels
      losses = -log_probs[np.arange(len(labels)), labels]
      figures = {
        "accuracy": metrics.accuracy(log_probs, labels),
        "loss": float(losses.mean()),
        "spread": None if first is None else _divergence(first, log_probs),
        "seconds": seconds,
      }
      first = log_probs if first is None else first
      yield Row(trial, seed, figures)


def _divergence(reference: np.ndarray, log_probs: np.ndarray) -> float:
  """KL divergence from log probabilities `[N, K]` in nats, mean over images."""
  terms = np.exp(reference) * (reference - log_probs)
  return float(terms.sum(-1).mean())


def _log_probs(
  context: contexts.Context, variables: types.Variables, dataset: types.Dataset
) -> np.ndarray:
  logits = inference.predict(
    context.model.apply,
    variables,
    dataset.images,
    batch_size=context.job.eval_batch_size,
    mesh=context.mesh,
  )
  return scipy.special.log_softmax(np.asarray(logits, np.float64), -1)


def _optimizer_and_schedule(
  trial: Trial, options: recipes.Training, num_rows: int
) -> dict[str, Any]:
  """The rate is part of the schedule: one program serves all rates."""
  steps = -(-num_rows // min(trial.batch_size, num_rows)) * trial.num_epochs
  factor_fn = training.schedule_fn(trial.schedule, steps)
  return {
    "optimizer": training.sgd(
      1.0, momentum=options.momentum, weight_decay=options.weight_decay
    ),
    "schedule": lambda step: trial.learning_rate * factor_fn(step),
    "num_epochs": trial.num_epochs,
    "batch_size": trial.batch_size,
    "num_parts": options.num_parts,
  }


def _fit(
  context: contexts.Context, trial: Trial, dataset: types.Dataset, seed: int
) -> types.Variables:
  """Trains a fresh model."""
  options = context.job.training
  init_key, fit_key = jax.random.split(jax.random.key(seed))
  variables, _ = training.fit(
    context.model,
    context.model.init(init_key, jnp.zeros((1, *dataset.images.shape[1:]))),
    dataset,
    fit_key,
    **_optimizer_and_schedule(trial, options, len(dataset)),
    augment_fn=jobs.augment_fn(options.augmentation),
    mesh=context.mesh,
    description=f"rate {trial.learning_rate:g}, batch {trial.batch_size}",
  )
  return variables


def read(path: pathlib.Path) -> list[Row]:
  """Reads a table of trainings; empty where there is none.

  Raises:
    ValueError: If the file is no such table.
  """
  if not path.exists():
    return []
  names, lines = files.read_csv(path)
  if tuple(names) != _FIELDS:
    raise ValueError(f"table must have the columns {_FIELDS}, got {path}")
  try:
    return [_row(line) for line in lines]
  except ValueError as error:
    raise ValueError(f"table must hold numbers, got {path}: {error}") from None


def _row(line: dict[str, str]) -> Row:
  return Row(
    Trial(
      line["schedule"],
      float(line["learning_rate"]),
      *(int(line[name]) for name in Trial._fields[2:]),
    ),
    int(line["seed"]),
    {name: float(line[name]) if line[name] else None for name in FIGURES},
  )


def to_csv(rows: Sequence[Row]) -> str:
  """Returns the table as text, with a line of names."""
  table: list[Sequence[Any]] = [_FIELDS]
  for row in rows:
    values = [row.figures[name] for name in FIGURES]
    texts = ["" if value is None else f"{value:.4f}" for value in values]
    table.append([*row.trial, row.seed, *texts])
  return files.to_csv(table)


def summary(rows: Sequence[Row]) -> str:
  """Returns one line a trial, first the one to take.

  Of those whose mean validation accuracy is within a standard error (binomial,
  of all seeds' validation images) of the best, it is the one with the lowest
  cross-entropy. The others follow in the order of their accuracy.
  """
  lines: list[tuple[float, float, str]] = []
  for trial in dict.fromkeys(row.trial for row in rows):
    same = [row for row in rows if row.trial == trial]
    means = {
      name: float(np.mean(values))
      for name in FIGURES
      if (values := [x for row in same if (x := row.figures[name]) is not None])
    }
    lines.append(
      (
        means.get("accuracy", 0.0),
        means.get("loss", 0.0),
        f"rate {trial.learning_rate:<6g} batch {trial.batch_size:<4}"
        f" epochs {trial.num_epochs:<3} {trial.schedule}: "
        + ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        + f"; {len(same)} seeds of {trial.num_images} images",
      )
    )
  lines.sort(reverse=True)
  if lines:
    best = lines[0][0]
    # Two accuracies of about `best` differ by so much by chance.
    num_images = sum(row.trial.num_images for row in rows) / len(lines)
    num_held = tune_methods.VALIDATION_FRACTION * num_images
    error = math.sqrt(best * (1 - best) / num_held)
    near = [line for line in lines if line[0] >= best - error]
    taken = min(near, key=lambda line: line[1])
    lines.remove(taken)
    lines.insert(0, taken)
  return "\n".join(text for *_, text in lines)


if __name__ == "__main__":
  cli.run(main)
