"""Choose the learning rate, batch and passes of a recipe, without test images.

    python -m experiments.tune --recipe digits --rates 0.02 0.05 0.1 0.2

trains on four fifths of the training set, a choice of the seed, and measures on
the fifth that is left. The table is a line a trial and seed; trials that stand
in it are not done again, so that an interrupted search goes on. What the
recipes take is the first line of what it prints: of the trials within a
standard error of the best accuracy, the one with the lowest cross-entropy.
Their tables are kept in docs/tuning.
"""

import csv
import dataclasses
import io
import itertools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from experiments import cli, files, jobs, recipes
from psg_jax import checks, data, inference, metrics, training

VALIDATION_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, and what is to be tried in its training."""

  rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
  """Highest learning rates."""
  batch_sizes: tuple[int, ...] = ()
  """Images a step; the recipe's by default."""
  epochs: tuple[int, ...] = ()
  """Passes; the recipe's by default."""
  seeds: int = 2
  """Trainings of each trial, from --seed on."""
  table: str | None = None
  """CSV file of the trials; <runs_dir>/<recipe>_tune.csv by default."""


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
    seed: Of training and of the validation part.
    accuracy: On the validation part, in [0, 1].
    loss: Cross-entropy there, in nats.
    spread: KL divergence to the model of the first seed on images that neither
      was trained on, in nats; None for the first.
    seconds: Of the training.
  """

  trial: Trial
  seed: int
  accuracy: float
  loss: float
  spread: float | None
  seconds: float


FIELDS = (*Trial._fields, *Row._fields[1:])


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
  training_options = options.training
  options = dataclasses.replace(
    options,
    name=f"{options.recipe}_tune",
    batch_sizes=options.batch_sizes or (training_options.batch_size,),
    epochs=options.epochs or (training_options.num_epochs,),
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
    options.table or f"{options.runs_dir}/{options.recipe}_tune.csv"
  )
  rows = read(path)
  context = jobs.prepare(options, is_read_only=True)
  trials = [
    Trial(
      training_options.schedule, rate, batch_size, epochs, len(context.train)
    )
    for epochs, batch_size, rate in itertools.product(
      options.epochs, options.batch_sizes, options.rates
    )
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  seeds = range(options.seed, options.seed + options.seeds)
  for trial in trials:
    if {row.seed for row in rows if row.trial == trial} >= set(seeds):
      continue
    rows = [row for row in rows if row.trial != trial]
    first: np.ndarray | None = None
    for seed in seeds:
      row, log_probs = _train(context, trial, seed, first)
      first = log_probs if first is None else first
      rows.append(row)
    files.write_text(path, to_csv(rows))
  return summary([row for row in rows if row.trial in trials])


def _train(
  context: jobs.Context, trial: Trial, seed: int, first: np.ndarray | None
) -> tuple[Row, np.ndarray]:
  """Trains once; returns the line, and log probabilities for validation.

  The validation part is that of the first seed for all, so that models of
  several seeds are compared on images that none of them has seen.
  """
  options = context.job.training
  part, validation = data.hold_out(
    context.train, VALIDATION_FRACTION, context.job.seed
  )
  # The rate in the schedule and not in the optimiser: one program for all.
  num_steps = trial.num_epochs * -(-len(part) // trial.batch_size)
  factor_fn = training.schedule_fn(trial.schedule, num_steps)
  init_key, fit_key = jax.random.split(jax.random.key(seed))
  shape = (1, *part.images.shape[1:])
  start = time.perf_counter()
  variables, _ = training.fit(
    context.model,
    context.model.init(init_key, jnp.zeros(shape)),
    part,
    fit_key,
    optimizer=training.sgd(
      1.0, momentum=options.momentum, weight_decay=options.weight_decay
    ),
    num_epochs=trial.num_epochs,
    batch_size=trial.batch_size,
    schedule=lambda step: trial.learning_rate * factor_fn(step),
    augment_fn=jobs.augment_fn(options.augmentation),
    num_parts=options.num_parts,
    mesh=context.mesh,
    description=f"rate {trial.learning_rate:g}, batch {trial.batch_size}",
  )
  seconds = time.perf_counter() - start
  logits = inference.predict(
    context.model.apply, variables, validation.images, mesh=context.mesh
  )
  log_probs = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
  spread = None
  if first is not None:
    spread = float((np.exp(first) * (first - log_probs)).sum(-1).mean())
  accuracy = metrics.accuracy(logits, validation.labels)
  assert accuracy is not None
  loss = -log_probs[np.arange(len(validation)), validation.labels].mean()
  return Row(trial, seed, accuracy, float(loss), spread, seconds), log_probs


def read(path: pathlib.Path) -> list[Row]:
  """Reads a table; empty where there is none.

  Raises:
    ValueError: If the file is no such table.
  """
  if not path.exists():
    return []
  with path.open(newline="") as file:
    reader = csv.DictReader(file)
    if tuple(reader.fieldnames or ()) != FIELDS:
      raise ValueError(f"table must have the columns {FIELDS}, got {path}")
    return [_row(line) for line in reader]


def _row(line: dict[str, str]) -> Row:
  return Row(
    Trial(
      line["schedule"],
      float(line["learning_rate"]),
      *(int(line[name]) for name in Trial._fields[2:]),
    ),
    int(line["seed"]),
    float(line["accuracy"]),
    float(line["loss"]),
    float(line["spread"]) if line["spread"] else None,
    float(line["seconds"]),
  )


def to_csv(rows: Sequence[Row]) -> str:
  """Returns the table as text, with a line of names."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(FIELDS)
  for row in rows:
    spread = "" if row.spread is None else f"{row.spread:.4f}"
    figures: list[Any] = [row.seed, f"{row.accuracy:.4f}", f"{row.loss:.4f}"]
    writer.writerow([*row.trial, *figures, spread, f"{row.seconds:.1f}"])
  return buffer.getvalue()


def summary(rows: Sequence[Row]) -> str:
  """Returns one line a trial, first the one to take.

  That is, of those whose mean validation accuracy is within a standard error
  (binomial, of all seeds' validation images) of the best, the one with the
  lowest cross-entropy. The others follow by their accuracy.
  """
  lines: list[tuple[float, float, str]] = []
  for trial in dict.fromkeys(row.trial for row in rows):
    same = [row for row in rows if row.trial == trial]
    spreads = [row.spread for row in same if row.spread is not None]
    accuracy = float(np.mean([row.accuracy for row in same]))
    loss = float(np.mean([row.loss for row in same]))
    spread = f"{np.mean(spreads):.3f}" if spreads else "n/a"
    lines.append(
      (
        accuracy,
        loss,
        f"rate {trial.learning_rate:<6g} batch {trial.batch_size:<4}"
        f" epochs {trial.num_epochs:<3} {trial.schedule}: accuracy"
        f" {accuracy:.4f}, loss {loss:.4f},"
        f" KL between seeds {spread},"
        f" {np.mean([row.seconds for row in same]):.0f} s,"
        f" {len(same)} seeds of {trial.num_images} images",
      )
    )
  lines.sort(reverse=True)
  if lines:
    best = lines[0][0]
    # Two accuracies of about `best` differ by so much by chance.
    num_held = VALIDATION_FRACTION * rows[0].trial.num_images * len(same)
    error = math.sqrt(best * (1 - best) / num_held)
    near = [line for line in lines if line[0] >= best - error]
    taken = min(near, key=lambda line: line[1])
    lines.remove(taken)
    lines.insert(0, taken)
  return "\n".join(text for *_, text in lines)


if __name__ == "__main__":
  cli.run(main)
