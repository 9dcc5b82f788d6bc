r"""Choose learning rates, batches and passes of a recipe, without test images.

    python -m experiments.tune --recipe digits --rates 0.02 0.05 0.1 0.2
    python -m experiments.tune --recipe digits --part unlearning \
      --forget-classes 1 --rates 0.002 0.005 0.01 0.02 --epochs 3 6

trains on four fifths of the training set, a choice of the seed, and measures on
the fifth that is left. The table is a line a trial and seed; trials that stand
in it are not done again, so that an interrupted search goes on. The first line
of what it prints is the trial to take: for training, of those within a standard
error of the best accuracy, the one with the lowest cross-entropy; for
unlearning, on a request that is not the recipe's own, the one that is nearest
to two retrained models, by their distance to each other. The tables are kept in
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

from experiments import cli, contexts, files, jobs, recipes
from psg_jax import (
  checks,
  data,
  inference,
  metrics,
  training,
  types,
  unlearning,
)

VALIDATION_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, and what is to be tried in its training."""

  part: Literal["training", "unlearning"] = "training"
  """What is tried; unlearning has models trained by the recipe."""
  rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
  """Highest learning rates."""
  batch_sizes: tuple[int, ...] = ()
  """Images a step; the recipe's by default."""
  epochs: tuple[int, ...] = ()
  """Passes; the recipe's by default."""
  seeds: int = 2
  """Trainings of each trial, from --seed on."""
  table: str | None = None
  """CSV file of the trials; <runs_dir>/<recipe>_<part>.csv by default."""


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
    seed: Of training and unlearning.
    figures: Those of `FIGURES`, measured on the validation part; None for one
      that there is not.
  """

  trial: Trial
  seed: int
  figures: dict[str, float | None]


# Accuracies are in [0, 1], losses and divergences in nats. `spread`: KL
# divergence from the model of the first seed. `normalised_*`: KL divergence
# from two retrained models, by theirs from each other. `agreement`: the part of
# the forgotten classes' images on which these two say the same.
FIGURES = {
  "training": ("accuracy", "loss", "spread", "seconds"),
  "unlearning": (
    *("forget_accuracy", "retain_accuracy"),
    *("normalised_forget", "normalised_retain", "seconds", "agreement"),
  ),
}


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
  tried = getattr(options, options.part)
  options = dataclasses.replace(
    options,
    name=f"{options.recipe}_tune",
    batch_sizes=options.batch_sizes or (tried.batch_size,),
    epochs=options.epochs or (tried.num_epochs or 3,),
  )
  for name in ("rates", "batch_sizes", "epochs"):
    if not getattr(options, name):
      raise ValueError(f"{name} must hold a value, got none")
  for rate in options.rates:
    checks.number("rates", rate, above=0)
  for name in ("batch_sizes", "epochs"):
    for value in getattr(options, name):
      checks.integer(name, value, at_least=1)
  checks.integer("seeds", options.seeds, at_least=1)
  path = pathlib.Path(
    options.table or f"{options.runs_dir}/{options.recipe}_{options.part}.csv"
  )
  files.at_end.enter_context(
    files.lock(
      path, argument="table", hint=f"the same command goes on with {path}"
    )
  )
  rows = read(path, options.part)
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

  run_trials = _training_rows if options.part == "training" else _unlearn_rows
  missing = [trial for trial in trials if is_missing(trial)]
  kept = [row for row in rows if row.trial not in missing]
  for row in run_trials(context, missing, seeds):
    kept.append(row)
    files.write_text(path, to_csv(kept, options.part))
  return summary([row for row in kept if row.trial in trials], options.part)


def _training_rows(
  context: contexts.Context, trials: Sequence[Trial], seeds: Sequence[int]
) -> Iterator[Row]:
  """Trains with each of the settings.

  The validation part is that of the first seed for all, so that models of
  several seeds are compared on images that none of them has seen.
  """
  part, validation = _parts(context)
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


def _unlearn_rows(
  context: contexts.Context, trials: Sequence[Trial], seeds: Sequence[int]
) -> Iterator[Row]:
  """Unlearns the job's request with each of the settings."""
  if not trials:
    return
  part, validation = _parts(context)
  ids = np.asarray(context.split.forget.ids)
  is_forgotten = np.isin(np.asarray(part.ids), ids)
  split = types.Split(
    part.take(np.flatnonzero(is_forgotten)),
    part.take(np.flatnonzero(~is_forgotten)),
  )
  if not contexts.is_class_request(context):
    raise ValueError("forget_classes must be what unlearning is tried with")
  is_forgotten = np.isin(validation.labels, np.unique(split.forget.labels))
  held = types.Split(
    validation.take(np.flatnonzero(is_forgotten)),
    validation.take(np.flatnonzero(~is_forgotten)),
  )
  options = context.job.training
  recipe = Trial(
    options.schedule,
    options.learning_rate,
    options.batch_size,
    options.num_epochs,
    len(context.train),
  )
  for seed in seeds:
    original = _fit(context, recipe, part, seed)
    references = [
      [_log_probs(context, variables, dataset) for dataset in held]
      for variables in (
        # Seeds that no original has.
        _fit(context, recipe, split.retain, seed + 1000 * (1 + index))
        for index in range(2)
      )
    ]
    first, second = (reference[0].argmax(-1) for reference in references)
    for trial in trials:
      start = time.perf_counter()
      output = _unlearn(context, trial, original, split, seed)
      figures: dict[str, float | None] = {
        "agreement": float(np.mean(first == second))
      }
      for index, name in enumerate(("forget", "retain")):
        log_probs = _log_probs(context, output, held[index])
        pair = [reference[index] for reference in references]
        floor = (_divergence(*pair) + _divergence(*pair[::-1])) / 2
        distance = np.mean([_divergence(x, log_probs) for x in pair])
        figures |= {
          f"{name}_accuracy": metrics.accuracy(log_probs, held[index].labels),
          f"normalised_{name}": float(distance) / floor,
        }
      figures["seconds"] = time.perf_counter() - start
      yield Row(trial, seed, figures)


def _parts(context: contexts.Context) -> tuple[types.Dataset, types.Dataset]:
  return data.hold_out(context.train, VALIDATION_FRACTION, context.job.seed)


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
  trial: Trial, options: recipes.Training | recipes.Unlearning, num_rows: int
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


def _unlearn(
  context: contexts.Context,
  trial: Trial,
  variables: types.Variables,
  split: types.Split,
  seed: int,
) -> types.Variables:
  options = {
    **contexts.unlearn_options(context),
    **_optimizer_and_schedule(trial, context.job.unlearning, len(split.forget)),
  }
  output = unlearning.unlearn(
    context.model,
    variables,
    split,
    jax.random.key(seed),
    **options,
    mesh=context.mesh,
  )
  return output.variables


def read(path: pathlib.Path, part: str) -> list[Row]:
  """Reads a table; empty where there is none.

  Raises:
    ValueError: If the file is no such table. The last columns may be missing:
      older tables have no `agreement`.
  """
  if not path.exists():
    return []
  fields = _fields(part)
  names, lines = files.read_csv(path)
  if len(names) < len(fields) - 1 or tuple(names) != fields[: len(names)]:
    raise ValueError(f"table must have the columns {fields}, got {path}")
  try:
    return [_row(line, part) for line in lines]
  except ValueError as error:
    raise ValueError(f"table must hold numbers, got {path}: {error}") from None


def _fields(part: str) -> tuple[str, ...]:
  return (*Trial._fields, "seed", *FIGURES[part])


def _row(line: dict[str, str], part: str) -> Row:
  return Row(
    Trial(
      line["schedule"],
      float(line["learning_rate"]),
      *(int(line[name]) for name in Trial._fields[2:]),
    ),
    int(line["seed"]),
    {
      name: float(line[name]) if line.get(name) else None
      for name in FIGURES[part]
    },
  )


def to_csv(rows: Sequence[Row], part: str) -> str:
  """Returns the table as text, with a line of names."""
  table: list[Sequence[Any]] = [_fields(part)]
  for row in rows:
    values = [row.figures[name] for name in FIGURES[part]]
    texts = ["" if value is None else f"{value:.4f}" for value in values]
    table.append([*row.trial, row.seed, *texts])
  return files.to_csv(table)


def summary(rows: Sequence[Row], part: str) -> str:
  """Returns one line a trial, first the one to take.

  For training, of those whose mean validation accuracy is within a standard
  error (binomial, of all seeds' validation images) of the best, the one with
  the lowest cross-entropy; for unlearning, the one with the lowest mean of the
  normalised distances. The others follow in the order of their figure.
  """
  lines: list[tuple[float, float, str]] = []
  for trial in dict.fromkeys(row.trial for row in rows):
    same = [row for row in rows if row.trial == trial]
    means = {
      name: float(np.mean(values))
      for name in FIGURES[part]
      if (values := [x for row in same if (x := row.figures[name]) is not None])
    }
    score, tie = means.get("accuracy", 0.0), means.get("loss", 0.0)
    if part == "unlearning":
      score = -(means["normalised_forget"] + means["normalised_retain"]) / 2
    lines.append(
      (
        score,
        tie,
        f"rate {trial.learning_rate:<6g} batch {trial.batch_size:<4}"
        f" epochs {trial.num_epochs:<3} {trial.schedule}: "
        + ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        + f"; {len(same)} seeds of {trial.num_images} images",
      )
    )
  lines.sort(reverse=True)
  if lines and part == "training":
    best = lines[0][0]
    # Two accuracies of about `best` differ by so much by chance.
    num_held = VALIDATION_FRACTION * sum(row.trial.num_images for row in rows)
    num_held /= len(lines)
    error = math.sqrt(best * (1 - best) / num_held)
    near = [line for line in lines if line[0] >= best - error]
    taken = min(near, key=lambda line: line[1])
    lines.remove(taken)
    lines.insert(0, taken)
  return "\n".join(text for *_, text in lines)


if __name__ == "__main__":
  cli.run(main)
