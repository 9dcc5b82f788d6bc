"""What the metrics share: "not available", checks, and values image by image.

Whatever averages over images or models takes its values from here, each of
which is written once: right answers, same answers, log-odds, divergences.
"""

from collections.abc import Sequence

import numpy as np
import scipy.special


class NotAvailableError(ValueError):
  """A metric cannot be had from this data, which is not the same as 0.

  Attributes:
    reason: Why, in words for a table's footnote.
  """

  def __init__(self, reason: str) -> None:
    super().__init__(reason)
    self.reason = reason


def check_rows(
  name: str, values: np.ndarray, labels: np.ndarray, axis: str = "K"
) -> None:
  """Raises ValueError unless values are `[N, axis]` and labels `[N]`."""
  if values.ndim != 2 or labels.shape != values.shape[:1]:
    raise ValueError(
      f"{name} must be [N, {axis}] and labels [N], got {list(values.shape)} and"
      f" {list(labels.shape)}"
    )


def check_logits(logits: np.ndarray, labels: np.ndarray | None = None) -> None:
  """Checks logits `[N, K]`, and labels `[N]` if they are given.

  Raises:
    ValueError: If a shape or a label is wrong.
    NotAvailableError: If there are no rows, or logits are not finite.
  """
  if logits.ndim != 2 or logits.shape[1] < 2:
    raise ValueError(
      f"logits must be [N, K] of two classes or more, got {list(logits.shape)}"
    )
  if labels is not None:
    check_labels(logits, labels)
  if not len(logits):
    raise NotAvailableError("there are no images")
  num_bad = int(np.sum(~np.isfinite(logits).all(-1)))
  if num_bad:
    raise NotAvailableError(
      f"logits are not finite in {num_bad} of {len(logits)} rows"
    )


def check_labels(logits: np.ndarray, labels: np.ndarray) -> None:
  """Raises ValueError unless labels are `[N]` integers below `K`."""
  if labels.shape != logits.shape[:1] or not np.issubdtype(
    labels.dtype, np.integer
  ):
    raise ValueError(
      f"labels must be integers [{len(logits)}], got {labels.dtype}"
      f" {list(labels.shape)}"
    )
  outside = np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))
  if outside.size:
    raise ValueError(
      f"labels must be in [0, {logits.shape[1]}), got {labels[outside[0]]} at"
      f" row {outside[0]}"
    )


def check_same(logits: np.ndarray, reference: np.ndarray) -> None:
  """Raises ValueError unless the logits of both models are `[N, K]`."""
  if logits.ndim != 2 or logits.shape != reference.shape:
    raise ValueError(
      f"logits must be [N, K] for both models, got {list(logits.shape)} and"
      f" {list(reference.shape)}"
    )


def check_pair(logits: np.ndarray, reference: np.ndarray) -> None:
  """Checks two models' logits for the same images.

  Raises:
    ValueError: If the shapes are wrong or differ.
    NotAvailableError: If there are no rows, or logits are not finite.
  """
  check_same(logits, reference)
  check_logits(logits)
  check_logits(reference)


def is_right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Whether the largest logit is the label's: `[..., N, K]` to `[..., N]`."""
  return np.asarray(np.argmax(logits, -1) == labels)


def is_same(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Whether two models predict the same: two `[..., K]` to `[...]`."""
  return np.asarray(np.argmax(logits, -1) == np.argmax(reference, -1))


def mean(values: np.ndarray | Sequence[float]) -> float | None:
  """Mean of some values; None where there is none."""
  return float(np.mean(values)) if len(values) else None


def log_probabilities(logits: np.ndarray) -> np.ndarray:
  """Log-softmax `[..., K]` in float64."""
  return scipy.special.log_softmax(np.asarray(logits, np.float64), -1)


def probabilities(logits: np.ndarray) -> np.ndarray:
  """Softmax `[..., K]` in float64."""
  return scipy.special.softmax(np.asarray(logits, np.float64), -1)


def log_complements(logits: np.ndarray) -> np.ndarray:
  """`log(1 - p_k)` `[..., K]` in float64, exact where `p_k` rounds to 1.

  Subtracting a probability of 1 - 1e-20 from 1 would give 0 and a logarithm of
  minus infinity. The largest class has the sum of the others instead; `p_k` is
  at most 1/2 for every other one.
  """
  others = log_probabilities(logits)
  top = np.argmax(others, -1)[..., None]
  np.put_along_axis(others, top, -np.inf, -1)
  complements = np.log1p(-np.exp(others))
  rest = scipy.special.logsumexp(others, -1, keepdims=True)
  np.put_along_axis(complements, top, rest, -1)
  return complements


def log_odds(logits: np.ndarray) -> np.ndarray:
  """`log(p_k / (1 - p_k))` `[..., K]`, which has no ties where `p_k` is 1."""
  return log_probabilities(logits) - log_complements(logits)


def pairwise_kl(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """`KL(reference_s ‖ model_m)` of each image in nats, `[M, S, N]`.

  As a product, since the differences of logarithms of all pairs of models
  would take `K` times the memory.

  Args:
    logits: float `[M, N, K]`.
    reference: float `[S, N, K]`.
  """
  log_q, log_p = log_probabilities(logits), log_probabilities(reference)
  p = np.exp(log_p)
  entropies = np.sum(p * log_p, -1)
  return entropies[None] - np.einsum("snk,mnk->msn", p, log_q)


def true_positive_rate(
  fpr: np.ndarray, tpr: np.ndarray, rate: float, num_negatives: int
) -> float | None:
  """Largest true positive rate at a false positive rate of at most `rate`.

  Args:
    fpr: float `[P]`, ascending, of a ROC curve.
    tpr: float `[P]`, likewise.
    rate: In (0, 1).
    num_negatives: Negatives of the curve; where they are too few to have such
      a rate, the result is None.
  """
  if num_negatives * rate < 1:
    return None
  return float(tpr[np.searchsorted(fpr, rate, side="right") - 1])


def choose_rows(
  num_rows: int, max_rows: int | None, rng: np.random.Generator
) -> np.ndarray:
  """Sorted int rows, `max_rows` of them drawn at random if there are more."""
  if max_rows is None or num_rows <= max_rows:
    return np.arange(num_rows)
  return np.sort(rng.choice(num_rows, max_rows, replace=False))
