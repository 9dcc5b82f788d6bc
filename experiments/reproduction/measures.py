"""What is measured in a cell of an experiment: from a bench to figures.

A measure returns records: what tells one from the others of its cell, such as
the number of a step, beside its figures. Values that are None could not be had.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import contexts
from experiments.pages import figures as page_figures
from experiments.reproduction.bench import Bench
from psg_jax import (
  boundary,
  grids,
  inference,
  last_layers,
  metrics,
  optimizers,
  proxies,
  relearning,
  steps,
  training,
  types,
  unlearning,
)

Records: TypeAlias = list[dict[str, Any]]
Measure: TypeAlias = Callable[..., Records]

FORGETTING = (
  *(f"accuracy_{part}" for part in metrics.SPLITS),
  *(f"agreement_{part}" for part in ("train_forget", "test_forget")),
  *(f"kl_divergence_{part}" for part in ("train_forget", "test_forget")),
  "kl_divergence_test_retain",
  "mia_loss_auc",
)
# Of the step sizes and noises whose course is followed.
_NUM_FOLLOWED = 64
_MAX_MAPPED = 300


def forgetting(bench: Bench, *, models: Sequence[str]) -> Records:
  """Measures models on the four parts, beside the retrained model.

  Args:
    bench: The job.
    models: Of `original`, `retrained`, `retrained-1` and `unlearned`.

  Returns:
    A record a model: `model`, the metrics of `FORGETTING`, `seconds`, of
    training or unlearning, and of the unlearned one `speedup`, those of
    retraining over them, and `is_changed`. Where proxies said when to stop,
    their `expected_low`, `expected_accuracy` and `expected_high` on the forget
    set, and `is_inside`, whether the retrained model's accuracy is between.
  """
  records: Records = []
  for name in models:
    expected: dict[str, float] = {}
    if name == "unlearned":
      unlearned = bench.unlearn()
      variables, seconds = unlearned.output.variables, unlearned.seconds
      if unlearned.proxies is not None:
        expected = _expected(bench, unlearned.proxies)
    else:
      variables = bench.trained(name)
      seconds = bench.seconds(name)
    record = bench.figures(name, variables, FORGETTING)
    if name == "unlearned":
      record["speedup"] = bench.seconds("retrained") / seconds
      is_same = jax.tree.map(
        lambda x, y: bool(jnp.array_equal(x, y)),
        steps.plain_variables(variables),
        steps.plain_variables(bench.trained("original")),
      )
      record["is_changed"] = float(not all(jax.tree.leaves(is_same)))
    records.append({"model": name, **record, **expected, "seconds": seconds})
  return records


def _expected(bench: Bench, outcome: proxies.Proxies) -> dict[str, float]:
  """What proxies said of the accuracy, and whether they were right."""
  level = outcome.accuracy
  logits = bench.outputs("retrained").logits["train_forget"]
  accuracy = share_right(logits, bench.context.split.forget.labels)
  return {
    "expected_low": level.low,
    "expected_accuracy": level.value,
    "expected_high": level.high,
    "is_inside": float(level.holds(accuracy)),
  }


def share_right(predicted: np.ndarray, labels: np.ndarray) -> float:
  """Returns the accuracy of logits or probabilities `[N, K]`."""
  return float(np.mean(np.argmax(predicted, -1) == labels))


def _accuracies(
  bench: Bench, logits: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Accuracy on the test images to forget and to retain."""
  parts = bench.parts
  return {
    f"accuracy_{part}": metrics.accuracy(
      logits[f"test_{part}"], parts[f"test_{part}"].labels
    )
    for part in ("forget", "retain")
  }


def _three_models(bench: Bench) -> dict[str, types.Variables]:
  return {
    "original": bench.trained("original"),
    "retrained": bench.trained("retrained"),
    "unlearned": bench.unlearn().output.variables,
  }


def grid(bench: Bench, *, axes: Mapping[str, Sequence[Any]]) -> Records:
  """Unlearns with all combinations of hyper-parameters, as one program.

  Everything is measured on a validation part of the training set; the pair that
  is nearest to retraining there is chosen.

  Args:
    bench: The job.
    axes: Values by hyper-parameter, of `unlearning.grid_of`.

  Returns:
    A record a combination: its values, `accuracy_forget` and
    `accuracy_retain`, `kl_divergence_forget` and `kl_divergence_retain` (nats,
    from the retrained model), and `is_chosen`.
  """
  bench = bench.validated()
  context = bench.context
  grid = grids.unlearn_grid(
    context.model,
    bench.trained("original"),
    context.split,
    contexts.model_key(context, "unlearned"),
    cells=grids.grid_of(**axes),
    **_shared_options(context, axes),
  )
  retrained = bench.outputs("retrained").logits
  records: Records = []
  for number, cell in enumerate(grid.cells):
    variables = grid.output(number).variables
    logits = bench.outputs_of(variables).logits
    record = {name: cell[name] for name in axes} | _accuracies(bench, logits)
    for part in ("forget", "retain"):
      name = f"test_{part}"
      record[f"kl_divergence_{part}"] = metrics.kl_divergence(
        retrained[name], logits[name]
      )
    records.append(record)
  distances = [
    max(x["kl_divergence_forget"], x["kl_divergence_retain"]) for x in records
  ]
  for number, record in enumerate(records):
    record["is_chosen"] = float(number == int(np.argmin(distances)))
  return records


def _shared_options(
  context: contexts.Context, axes: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
  """Options of the job that all cells of a grid have."""
  options = contexts.unlearn_options(context)
  # Cells have no stop of their own, and a search of their own.
  left_out = {"max_cycles", "refresh_labels", "search_fn", *axes}
  shared = {
    name: value
    for name, value in options.items()
    if name not in left_out and value is not None
  }
  rate = context.job.unlearning.learning_rate
  return {
    **shared,
    "optimizer": contexts.optimizer(context.job.unlearning),
    "learning_rate": rate,
    "show_progress": False,
  }


def composition(
  bench: Bench, *, epochs: Sequence[int], weights: Sequence[float]
) -> Records:
  """Composes a model that forgets well with one that retains well.

  The one is unlearned without retained images, the other is the original: its
  features with the head of the former, then up to so many epochs of Adam (1e-4)
  on retained images; a straight line between them; and task arithmetic, the
  original plus a multiple of what unlearning changed.

  Args:
    bench: The job, whose options are those of the model that forgets well.
    epochs: Of finetuning, in ascending order.
    weights: Of the model that forgets well, on the line and beyond it.

  Returns:
    A record a model: `kind`, `amount`, `accuracy_forget`, `accuracy_retain`.
  """
  context = bench.context
  original = steps.plain_variables(bench.trained("original"))
  forgetful = bench.unlearn().output.variables
  head = last_layers.trainable(original, 1, ("head",))
  composed = jax.tree.map(
    lambda is_head, x, y: y if is_head else x, head, original, forgetful
  )
  records: Records = []

  def add(kind: str, amount: float, variables: types.Variables) -> None:
    logits = bench.outputs_of(variables).logits
    record = {"kind": kind, "amount": float(amount)}
    records.append(record | _accuracies(bench, logits))

  key = contexts.model_key(context, "unlearned")
  done, current = 0, composed
  for number in epochs:
    if number > done:
      current, _ = training.fit(
        context.model,
        current,
        context.split.retain,
        jax.random.fold_in(key, number),
        optimizer=optimizers.adam(1e-4),
        schedule="constant",
        num_epochs=number - done,
        batch_size=context.job.training.batch_size,
        show_progress=False,
      )
      done = number
    add("head of one, features of the other", number, current)
  for weight in weights:
    mixed = jax.tree.map(
      lambda x, y, w=weight: x + w * (y - x), original, forgetful
    )
    add("interpolation" if weight <= 1 else "task arithmetic", weight, mixed)
  return records


def sequential(bench: Bench, *, classes: Sequence[int]) -> Records:
  """Forgets classes one request after the other, and all of them at once.

  Args:
    bench: The job.
    classes: In their order.

  Returns:
    A record a request and way (`one by one`, `at once`): `num_classes`,
    `accuracy_forget`, `accuracy_retain`, and `kl_divergence_forget` from the
    model that was retrained without all of them.
  """
  records: Records = []
  variables = None
  for number in range(1, len(classes) + 1):
    whole = bench.asking(forget_classes=tuple(classes[:number]))
    retrained = whole.outputs("retrained").logits
    last = bench.asking(forget_classes=(classes[number - 1],))
    # What went before is retained by no request that comes later.
    earlier = whole.context.split.forget
    if number > 1:
      gone = np.isin(earlier.labels, classes[: number - 1])
      last = last.without(earlier.take(gone))
    before = variables or bench.trained("original")
    variables = last.unlearn(before).output.variables
    at_once = whole.unlearn().output.variables
    for way, model in (("one by one", variables), ("at once", at_once)):
      logits = whole.outputs_of(model).logits
      divergence = metrics.kl_divergence(
        retrained["test_forget"], logits["test_forget"]
      )
      records.append(
        {
          "way": way,
          "num_classes": number,
          **_accuracies(whole, logits),
          "kl_divergence_forget": divergence,
        }
      )
  return records


def relearned(bench: Bench, *, num_steps: int, every: int) -> Records:
  """Trains models on the forget set again, beside two anchors.

  Args:
    bench: The job.
    num_steps: Of minibatches.
    every: Steps from one record to the next.

  Returns:
    A record a model and so many steps: `model`, `step`, `accuracy`.
  """
  context = bench.context
  models = _three_models(bench)
  records: Records = []
  for name, variables in models.items():
    curve = relearning.relearn(
      context.of(name).model,
      variables,
      context.split.forget,
      contexts.model_key(context, "unlearned"),
      target_accuracy=1.0,
      num_steps=num_steps,
    )
    # Where all is right again, it stays so.
    curve = np.pad(curve, (0, num_steps + 1 - len(curve)), mode="edge")
    records += [
      {"model": name, "step": step, "accuracy": float(curve[step])}
      for step in range(0, num_steps + 1, every)
    ]
  return records


def feature_maps(bench: Bench) -> Records:
  """Maps features of the three models by t-SNE.

  Returns:
    A record a model: `purity`, how many of 10 neighbours in feature space of a
    forget image are forget images; and `points` `[N, 2]`, `labels` and
    `is_forget` `[N]` of the map.
  """
  context = bench.context
  test = {x: bench.parts[x] for x in ("test_forget", "test_retain")}
  labels = np.concatenate([part.labels for part in test.values()])
  is_forget = np.arange(len(labels)) < len(test["test_forget"])
  rows = page_figures.choose_embedded(is_forget, max_points=_MAX_MAPPED)
  images = np.concatenate([np.asarray(x.images[:]) for x in test.values()])
  models = _three_models(bench)
  records: Records = []
  for name, variables in models.items():
    _, features = inference.predict_both(
      context.of(name).model, variables, images[rows]
    )
    points = page_figures.embed(features)
    record: dict[str, Any] = {
      "model": name,
      "purity": purity(features, is_forget[rows]),
    }
    if points is not None:
      record |= {
        "points": np.round(points, 2).tolist(),
        "labels": labels[rows].tolist(),
        "is_forget": is_forget[rows].tolist(),
      }
    records.append(record)
  return records


def purity(features: np.ndarray, is_forget: np.ndarray) -> float:
  """Share of forget images among the 10 neighbours of forget images."""
  unit = features / np.maximum(
    np.linalg.norm(features, axis=1, keepdims=True), 1e-9
  )
  likeness = unit @ unit.T
  np.fill_diagonal(likeness, -np.inf)
  count = min(10, len(features) - 1)
  nearest = np.argsort(-likeness[is_forget], axis=1)[:, :count]
  return float(is_forget[nearest].mean())


def convergence(
  bench: Bench,
  *,
  step_decays: Sequence[str],
  noise_scales: Sequence[float],
  num_steps: int,
  step_size: float = 0.01,
) -> Records:
  """Follows the inner search step by step.

  The gradient is that of the loss by the image, in the frozen model, at the
  point that the search has come to after so many steps.

  Args:
    bench: The job.
    step_decays: Of `boundary.Search`.
    noise_scales: γ.
    num_steps: Steps to follow.
    step_size: First step, in pixels of [0, 1].

  Returns:
    A record a step decay, noise (`search` names both) and step, means over
    images:
    `gradient_norm` (L1, nats per pixel), `loss` (nats), `crossed` (share) and
    `distance` (L∞, pixels).
  """
  context, variables = bench.context, bench.trained("original")
  images = steps.to_float(
    jnp.asarray(context.split.forget.images[:_NUM_FOLLOWED])
  )
  labels = jnp.asarray(context.split.forget.labels[:_NUM_FOLLOWED])
  key = contexts.model_key(context, "unlearned")
  look = jax.jit(functools.partial(_look, context.model.apply))
  records: Records = []
  for decay, noise in itertools.product(step_decays, noise_scales):
    for step in range(num_steps + 1):
      points, crossed = images, jnp.zeros(len(images), bool)
      if step:
        outcome = boundary.search(
          context.model.apply,
          variables,
          images,
          labels,
          key,
          num_steps=step,
          step_size=step_size,
          step_decay=decay,
          noise_scale=noise,
        )
        points, crossed = outcome.images, outcome.is_crossed
      loss, norm = look(variables, points, labels)
      records.append(
        {
          "search": f"{decay} steps, γ = {noise:g}",
          "step_decay": decay,
          "noise_scale": noise,
          "step": step,
          "gradient_norm": float(norm.mean()),
          "loss": float(loss.mean()),
          "crossed": float(crossed.mean()),
          "distance": float(
            jnp.abs(points - images).reshape(len(images), -1).max(1).mean()
          ),
        }
      )
  return records


def _look(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns loss and L1 norm of its gradient, `[N]` each."""

  def loss_of(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses = steps.cross_entropy(apply_fn(variables, images), labels)
    return losses.sum(), losses

  (_, losses), gradients = jax.value_and_grad(loss_of, has_aux=True)(images)
  return losses, jnp.abs(gradients).reshape(len(images), -1).sum(1)


def search_time(bench: Bench, *, sizes: Sequence[int]) -> Records:
  """Times search and unlearning on forget sets of growing size.

  Programs are compiled before.

  Args:
    bench: The job.
    sizes: Forget images, at most those of the request.

  Returns:
    A record a size: `num_forget`, `seconds` of unlearning, `retrain_seconds`.
  """
  context = bench.context
  original, options = (
    bench.trained("original"),
    contexts.unlearn_options(context),
  )
  bench.trained("retrained")
  records: Records = []
  # Each size is a program of its own: the first run of it compiles.
  for number, size in enumerate(np.repeat(sizes, 2).tolist()):
    split = context.split._replace(
      forget=context.split.forget.take(np.arange(size))
    )
    start = time.perf_counter()
    output = unlearning.unlearn(
      context.model,
      original,
      split,
      contexts.model_key(context, "unlearned"),
      **options,
      optimizer=contexts.optimizer(context.job.unlearning),
      show_progress=False,
    )
    jax.block_until_ready(output.variables)
    if number % 2 == 0:
      continue
    records.append(
      {
        "num_forget": size,
        "seconds": time.perf_counter() - start,
        "retrain_seconds": bench.seconds("retrained"),
      }
    )
  return records
