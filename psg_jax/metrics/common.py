"""What the metrics share: "not available", checks, exact log probabilities."""

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


def check_pair(logits: np.ndarray, reference: np.ndarray) -> None:
  """Checks two models' logits for the same images.

  Raises:
    ValueError: If the shapes are wrong or differ.
    NotAvailableError: If there are no rows, or logits are not finite.
  """
  if logits.shape != reference.shape:
    raise ValueError(
      f"logits must be [N, K] for both models, got {list(logits.shape)} and"
      f" {list(reference.shape)}"
    )
  check_logits(logits)
  check_logits(reference)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
  """Log-softmax `[N, K]` in float64."""
  return scipy.special.log_softmax(np.asarray(logits, np.float64), -1)


def log_complements(logits: np.ndarray) -> np.ndarray:
  """`log(1 - p_k)` `[N, K]` in float64, exact where `p_k` rounds to 1.

  Subtracting a probability of 1 - 1e-20 from 1 would give 0 and a logarithm of
  minus infinity. The largest class has the sum of the others instead; `p_k` is
  at most 1/2 for every other one.
  """
  log_p = log_probabilities(logits)
  rows, top = np.arange(len(log_p)), np.argmax(log_p, -1)
  others = log_p.copy()
  others[rows, top] = -np.inf
  complements = np.log1p(-np.exp(others))
  complements[rows, top] = scipy.special.logsumexp(others, -1)
  return complements


def choose_rows(
  num_rows: int, max_rows: int | None, rng: np.random.Generator
) -> np.ndarray:
  """Sorted int rows, `max_rows` of them drawn at random if there are more."""
  if max_rows is None or num_rows <= max_rows:
    return np.arange(num_rows)
  return np.sort(rng.choice(num_rows, max_rows, replace=False))
