"""What metrics are computed from, and what a metric is."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import numpy as np

from psg_jax import checks

SPLITS = ("train_forget", "train_retain", "test_forget", "test_retain")
"""The parts of the data that arrays are given for."""


class Outputs(NamedTuple):
  """What is known of one model.

  Attributes:
    logits: float `[N, K]` by split.
    features: float `[N, D]` by split, the input of the last layer, or None.
    params: The parameters, `variables["params"]`, or None.
    seconds: Time of the training or unlearning without evaluation, or None.
    relearn_accuracy: float `[T + 1]`, the accuracy on the forget set before and
      after each step of training on it again (`relearning.relearn`), or None.
  """

  logits: Mapping[str, np.ndarray]
  features: Mapping[str, np.ndarray] | None = None
  params: chex.ArrayTree | None = None
  seconds: float | None = None
  relearn_accuracy: np.ndarray | None = None


class Inputs(NamedTuple):
  """What metrics are computed from.

  Attributes:
    labels: int `[N]` by split, of `SPLITS`.
    model: The model in question, mostly the unlearned one.
    retrained: The model trained without the forget set, or None.
    original: The model before unlearning, or None.
    random: A freshly initialised model, or None.
    groups: str `[N]` by split, the values of a metadata column, or None.
    seed: Seed of subsamples and folds.
  """

  labels: Mapping[str, np.ndarray]
  model: Outputs
  retrained: Outputs | None = None
  original: Outputs | None = None
  random: Outputs | None = None
  groups: Mapping[str, np.ndarray] | None = None
  seed: int = 0


Direction = Literal["up", "down", "as_retrained"]


class Metric(NamedTuple):
  """A figure with its name and meaning.

  Attributes:
    name: Its key in `METRICS`.
    title: For tables.
    direction: Whether more is better (`"up"`), less is (`"down"`), or what the
      retrained model has (`"as_retrained"`).
    ideal: The best value, `"retrained"` for the retrained model's.
    unit: `"share"` (in [0, 1]), `"nats"`, `"steps"` or `"ratio"`; `""` for a
      number of its own kind.
    source: Authors and year of what it is from; `""` for common knowledge.
    needs: Paths into `Inputs`, such as `"retrained.logits.train_forget"`.
    fn: `(Inputs) -> value`, or a dictionary for JSON with `"value"` and what
      else there is to say. May raise `NotAvailableError`.
  """

  name: str
  title: str
  direction: Direction
  ideal: float | Literal["retrained"]
  unit: str
  source: str
  needs: tuple[str, ...]
  fn: Callable[[Inputs], float | dict[str, Any] | None]


def get(inputs: Inputs, path: str) -> Any:
  """Follows a path such as `"model.logits.train_forget"`; None if it ends."""
  value: Any = inputs
  for part in path.split("."):
    if isinstance(value, Mapping):
      value = value.get(part)
    else:
      value = getattr(value, part)
    if value is None:
      return None
  return value


def check(inputs: Inputs) -> None:
  """Raises ValueError unless all arrays of a split have one row a label."""
  checks.integer("seed", inputs.seed, at_least=0)
  kinds = [
    f"{model}.{kind}"
    for model in ("model", "retrained", "original", "random")
    for kind in ("logits", "features")
  ]
  for path in (*kinds, "labels", "groups"):
    for split, array in (get(inputs, path) or {}).items():
      checks.one_of(f"{path} split", split, SPLITS)
      if split not in inputs.labels:
        raise ValueError(f"labels must have the split {split!r} of {path}")
      if len(array) != len(inputs.labels[split]):
        raise ValueError(
          f"{path}.{split} must be as many as labels: got {len(array)} for"
          f" {len(inputs.labels[split])}"
        )
