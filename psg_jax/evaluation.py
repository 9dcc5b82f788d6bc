"""Evaluation of models on the four parts of the data, as one tidy table."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from psg_jax import checks, forget, inference, metrics, relearning, types

HEADLINE = (
  *(f"accuracy_{part}" for part in metrics.SPLITS),
  *("agreement_test_forget", "agreement_test_retain"),
  *("kl_divergence_test_forget", "kl_divergence_test_retain"),
  "mia_loss_auc",
)
"""The metrics that `evaluate` computes where none are named."""
RELEARNING = ("relearn_steps", "anamnesis_index")
"""The metrics that train: `evaluate` computes them where it is told to."""


class Parts(NamedTuple):
  """The data of a request.

  Attributes:
    split: The training images to forget, and those to retain.
    test_split: The test images of the same kind, which may be none, and the
      others.
  """

  split: types.Split
  test_split: types.Split

  def datasets(self) -> dict[str, types.Dataset]:
    """Returns the parts by their names in `metrics.SPLITS`."""
    parts = (*self.split, *self.test_split)
    return dict(zip(metrics.SPLITS, parts, strict=True))


def parts(train: types.Dataset, test: types.Dataset, **request: Any) -> Parts:
  """Cuts training and test images by one request.

  Args:
    train: What the model was trained on.
    test: What it has not seen.
    **request: Arguments of `forget.Request`: `classes`, `where`, `ids`, `group`
      and others.

  Raises:
    ValueError: As `forget.split`, for the training images.
  """
  query = forget.Request(**request)
  is_match = forget.matching(test, query)
  return Parts(
    forget.split_request(train, query),
    types.Split(test.take(is_match), test.take(~is_match)),
  )


class Row(NamedTuple):
  """One figure.

  Attributes:
    model: Name of the model.
    part: Of `metrics.SPLITS`; empty for a metric of several parts.
    metric: Its name, without the part.
    value: None where there is none.
    reason: Why there is none; else empty.
  """

  model: str
  part: str
  metric: str
  value: float | None
  reason: str


class Table(tuple[Row, ...]):
  """All figures, a row each; printed with a column for each model."""

  __slots__ = ()

  def value(self, model: str, metric: str, part: str = "") -> float | None:
    """Returns one figure.

    Raises:
      ValueError: If it is not in the table.
    """
    rows = {row[:3]: row.value for row in self}
    if (model, part, metric) not in rows:
      raise ValueError(
        f"model, metric and part must be of the table, got {model!r},"
        f" {metric!r} and {part!r}"
      )
    return rows[model, part, metric]

  def __str__(self) -> str:
    models = dict.fromkeys(row.model for row in self)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in self:
      text = "–" if row.value is None else f"{row.value:.3f}"
      lines.setdefault((row.metric, row.part), {})[row.model] = text
    head = f"{'':16}{'':14}" + "".join(f"{model:>12}" for model in models)
    return "\n".join(
      [head]
      + [
        f"{metric:16}{part:14}"
        + "".join(f"{cells.get(model, ''):>12}" for model in models)
        for (metric, part), cells in lines.items()
      ]
    )


def evaluate(
  model: types.Model,
  parts: Parts,
  *,
  names: Iterable[str] = HEADLINE,
  num_relearn_steps: int = 0,
  batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
  **variables: types.Variables | None,
) -> Table:
  """Computes the figures of models, each in one pass over the data.

  Args:
    model: The network.
    parts: The data of the request.
    names: Metrics, of `metrics.METRICS`.
    num_relearn_steps: Most steps of training each model but the original on the
      forget set again, for `relearn_steps` and `anamnesis_index`, which are
      then computed beside the others; 0 for none, as it takes time.
    batch_size: Images at a time, positive.
    mesh: Devices to work on; None for one.
    **variables: The variables of each model, by any name; `original` and
      `retrained` are what the others are compared with. None for a model that
      there is not.

  Returns:
    A row for each model and metric. Print it, or give it to
    `pandas.DataFrame`.

  Raises:
    ValueError: If a metric is unknown, or no model is given.
  """
  names = tuple(names)
  if num_relearn_steps:
    names = tuple(dict.fromkeys((*names, *RELEARNING)))
  needs = {need for name in names for need in metrics.find(name).needs}
  models = {name: tree for name, tree in variables.items() if tree is not None}
  checks.integer("num_relearn_steps", num_relearn_steps, at_least=0)
  checks.integer("batch_size", batch_size, at_least=1)
  if not models:
    raise ValueError("variables must be of one model or more, got none")
  has_features = model.features is not types.no_features and any(
    ".features." in need for need in needs
  )
  outputs = {
    name: _outputs(model, tree, parts, has_features, batch_size, mesh)
    for name, tree in models.items()
  }
  labels = {part: x.labels for part, x in parts.datasets().items()}
  if num_relearn_steps and "original" in models:
    logits = outputs["original"].logits["train_forget"]
    accuracy = metrics.accuracy(logits, labels["train_forget"]) or 0.0
    for name in models.keys() - {"original"}:
      curve = relearning.relearn(
        *(model, models[name], parts.split.forget, jax.random.key(0)),
        target_accuracy=(1 - metrics.RELEARN_MARGIN) * accuracy,
        num_steps=num_relearn_steps,
        eval_batch_size=batch_size,
        mesh=mesh,
      )
      outputs[name] = outputs[name]._replace(relearn_accuracy=curve)
  return Table(
    row for name in models for row in _rows(name, names, outputs, labels)
  )


def _rows(
  name: str,
  names: tuple[str, ...],
  outputs: Mapping[str, metrics.Outputs],
  labels: Mapping[str, np.ndarray],
) -> Iterator[Row]:
  """Gives the figures of a model, beside those of the others."""
  others = {other: x for other, x in outputs.items() if other != name}
  inputs = metrics.Inputs(
    labels, outputs[name], others.get("retrained"), others.get("original")
  )
  for metric, result in metrics.compute(names, inputs).items():
    part = next((x for x in metrics.SPLITS if metric.endswith(f"_{x}")), "")
    short = metric.removesuffix(f"_{part}")
    yield Row(name, part, short, result["value"], result.get("reason", ""))


def _outputs(
  model: types.Model,
  variables: types.Variables,
  parts: Parts,
  has_features: bool,
  batch_size: int,
  mesh: jax.sharding.Mesh | None,
) -> metrics.Outputs:
  """Predicts all parts, with features where they are needed."""
  options: dict[str, Any] = {"batch_size": batch_size, "mesh": mesh}
  logits, features = {}, {}
  for part, dataset in parts.datasets().items():
    if has_features:
      logits[part], features[part] = inference.predict_both(
        model, variables, dataset.images, **options
      )
    else:
      logits[part] = inference.predict(
        model.apply, variables, dataset.images, **options
      )
  return metrics.Outputs(logits, features or None, params=variables["params"])
