"""A paired bootstrap over images, training seeds and unlearning seeds.

What `verification` and `yardstick` share: values of each image and model, the
weights that resampled seeds have, and intervals from both. NumPy, on the host.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.special
import scipy.stats

from psg_jax import checks

# Counts of resampled images that lie in memory at a time.
_MAX_COUNTS = 2**22

StatisticFn: TypeAlias = Callable[[np.ndarray, np.ndarray], Any]
"""`(logits [N, K], labels [N])` -> one value an image `[N]`, or a number.

Values of images are averaged, which takes no time. A function that gives a
number is called anew for each model and resample.
"""

Unlearned: TypeAlias = np.ndarray | Mapping[Any, np.ndarray]
"""`[T, U, N, K]`, or `[U, N, K]` by training seed, with any `U` for each."""


class Runs(NamedTuple):
  """The unlearned models of a split in a row, those of a seed together."""

  logits: np.ndarray  # [M, N, K]
  sizes: tuple[int, ...]  # [T], of sum M


class Values(NamedTuple):
  """A statistic of each model: of each image, or of resampled images.

  For a distance, `unlearned` holds it to each retrained model, and `retrained`
  the jackknife pseudo-values of the mean over pairs of retrained models.
  """

  unlearned: np.ndarray  # [M, 1 or S, X]
  retrained: np.ndarray | None  # [S, X]


class Statistic(NamedTuple):
  """What is asked of the models on one split."""

  name: str
  values: Values | None  # By image; None for a function to be called anew.
  fn: StatisticFn | None
  is_share: bool


def sides(
  values: Values, ours: np.ndarray, theirs: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
  """Both sides `[B]`, from values `[.., B or 1]` and weights `[B or 1, ..]`.

  Returns None where there is nothing to compare with.
  """
  if values.retrained is None:
    return None
  columns = theirs.T if values.unlearned.shape[1] > 1 else np.ones((1, 1))
  unlearned = np.sum(values.unlearned * ours.T[:, None] * columns, (0, 1))
  return unlearned, np.sum(values.retrained * theirs.T, 0)


def combine(
  values: Values, ours: np.ndarray, theirs: np.ndarray
) -> np.ndarray | None:
  """Differences `[B]` of `sides`."""
  both = sides(values, ours, theirs)
  return None if both is None else both[0] - both[1]


def interval(
  estimate: float,
  replicates: np.ndarray,
  seeds: Sequence[tuple[np.ndarray | None, int]],
  image_freedom: int,
  confidence: float,
) -> tuple[float, float]:
  """Percentiles, widened from the normal to Student's t distribution."""
  parts = [
    (float(np.var(alone)), freedom)
    for alone, freedom in seeds
    if alone is not None and freedom > 0
  ]
  rest = float(np.var(replicates)) - sum(variance for variance, _ in parts)
  parts.append((max(rest, 0.0), max(image_freedom, 1)))
  total = sum(variance for variance, _ in parts)
  tail = (1 - confidence) / 2
  factor = 1.0
  if total > 0:
    freedom = total**2 / sum(variance**2 / n for variance, n in parts)
    factor = scipy.stats.t.isf(tail, freedom) / scipy.stats.norm.isf(tail)
  low, high = np.quantile(replicates, [tail, 1 - tail])
  return (
    float(min(estimate, estimate + factor * (low - estimate))),
    float(max(estimate, estimate + factor * (high - estimate))),
  )


def drawn_weights(
  rng: np.random.Generator, num_seeds: int, num_resamples: int
) -> np.ndarray:
  """Weights `[B, n]` of `n - 1` draws from `n` seeds (one of one)."""
  num_draws = max(num_seeds - 1, 1)
  draws = rng.integers(0, num_seeds, (num_resamples, num_draws))
  return _counts(draws, num_seeds) / num_draws


def unlearned_weights(
  rng: np.random.Generator, sizes: tuple[int, ...], num_resamples: int
) -> np.ndarray:
  """Weights `[B, M]`: training seeds, and unlearning seeds within each."""
  all_sizes = np.asarray(sizes)
  starts = np.cumsum(all_sizes) - all_sizes
  num_draws = max(len(sizes) - 1, 1)
  chosen = rng.integers(0, len(sizes), (num_resamples, num_draws))
  size = all_sizes[chosen][..., None]
  num_within = np.maximum(size - 1, 1)
  slots = np.arange(max(num_within.max(), 1))
  within = np.floor(rng.random((*chosen.shape, len(slots))) * size)
  models = starts[chosen][..., None] + within.astype(np.int64)
  shares = (slots < num_within) / (num_within * num_draws)
  weights = np.zeros((num_resamples, sum(sizes)))
  rows = np.arange(num_resamples)[:, None, None]
  np.add.at(weights, (rows, models), shares)
  return weights


def uniform_weights(sizes: tuple[int, ...]) -> np.ndarray:
  """Weights `[1, M]`: each training seed counts the same."""
  return np.repeat(1 / (len(sizes) * np.asarray(sizes)), sizes)[None]


def seed_freedom(sizes: tuple[int, ...]) -> int:
  """Degrees of freedom of the unlearned side, of training seeds if any."""
  return len(sizes) - 1 if len(sizes) > 1 else sizes[0] - 1


def _counts(draws: np.ndarray, size: int) -> np.ndarray:
  """How often each of `size` things is in each row of draws."""
  offsets = np.arange(len(draws))[:, None] * size
  counts = np.bincount((draws + offsets).ravel(), minlength=len(draws) * size)
  return counts.reshape(len(draws), size)


def agreement(logits: np.ndarray, retrained: np.ndarray) -> np.ndarray:
  """Whether predictions are the same, `[M, S, N]`."""
  ours, theirs = np.argmax(logits, -1), np.argmax(retrained, -1)
  return (ours[:, None] == theirs[None]).astype(np.float64)


def kl_divergence(logits: np.ndarray, retrained: np.ndarray) -> np.ndarray:
  """`KL(retrained_s ‖ model_m)` of each image in nats, `[M, S, N]`."""
  log_q = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
  log_p = scipy.special.log_softmax(np.asarray(retrained, np.float64), -1)
  p = np.exp(log_p)
  entropies = np.sum(p * log_p, -1)
  return entropies[None] - np.einsum("snk,mnk->msn", p, log_q)


def pseudo_values(distances: np.ndarray) -> np.ndarray | None:
  """Makes values `[S, N]` of seeds from distances of pairs `[S, S, N]`.

  Their mean is the mean over pairs, and weighing them as seeds are drawn gives
  the variance of the jackknife: a pair drawn twice would have no distance.
  """
  num_seeds = len(distances)
  if num_seeds < 2:
    return None
  diagonal = np.einsum("ssn->sn", distances)
  of_seed = distances.sum(0) + distances.sum(1) - 2 * diagonal
  total = of_seed.sum(0) / 2
  mean = total / (num_seeds * (num_seeds - 1))
  if num_seeds == 2:
    return np.stack([mean, mean])
  without = (total - of_seed) / ((num_seeds - 1) * (num_seeds - 2))
  return num_seeds * mean - (num_seeds - 1) * without


def resample(
  statistics: Sequence[Statistic],
  data: tuple[np.ndarray, np.ndarray, np.ndarray],
  groups: np.ndarray,
  num_resamples: int,
  rng: np.random.Generator,
) -> list[tuple[Values, Values] | None]:
  """Gives each statistic on all images, and on the resamples, shared by all."""
  labels = data[-1]
  if not len(labels):
    return [None] * len(statistics)
  sizes = np.bincount(groups).astype(np.float64)
  num_groups = len(sizes)
  order = np.argsort(groups, kind="stable")
  starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
  sums = [
    _map(lambda x: np.add.reduceat(x[..., order], starts, -1), each.values)
    for each in statistics
  ]

  def evaluate(counts: np.ndarray) -> list[Values | None]:
    """Evaluates where groups are drawn so often, `[b, G]`."""
    weights = counts.astype(np.float64)
    totals = weights @ sizes

    def mean(values: np.ndarray) -> np.ndarray:
      # The long side first: on busy cores OpenBLAS takes ten times as long, and
      # NumPy longer still over stacks, for the transposed product.
      flat = weights @ values.reshape(-1, num_groups).T / totals[:, None]
      return flat.T.reshape(*values.shape[:-1], -1)

    return [
      _call(each.fn, data, counts[:, groups])
      if each.fn is not None
      else _map(mean, values)
      for each, values in zip(statistics, sums, strict=True)
    ]

  whole = evaluate(np.ones((1, num_groups), np.int64))
  for each, values in zip(statistics, whole, strict=True):
    if values is not None and not np.isfinite(values.unlearned).all():
      raise ValueError(f"statistic {each.name!r} must be finite on all images")
  chunk = max(1, _MAX_COUNTS // num_groups)
  parts = []
  for start in range(0, num_resamples, chunk):
    shape = (min(chunk, num_resamples - start), num_groups)
    draws = rng.integers(0, num_groups, shape)
    parts.append(evaluate(_counts(draws, num_groups)))
  result: list[tuple[Values, Values] | None] = []
  for index, values in enumerate(whole):
    if values is None:
      result.append(None)
      continue
    drawn = [part[index] for part in parts]
    joined = Values(
      np.concatenate([x.unlearned for x in drawn if x is not None], -1),
      None
      if values.retrained is None
      else np.concatenate(
        [x.retrained for x in drawn if x and x.retrained is not None], -1
      ),
    )
    result.append((values, joined))
  return result


def _map(
  fn: Callable[[np.ndarray], np.ndarray], values: Values | None
) -> Values | None:
  """Applies a function to both sides."""
  if values is None:
    return None
  theirs = None if values.retrained is None else fn(values.retrained)
  return Values(fn(values.unlearned), theirs)


def _call(
  fn: StatisticFn,
  data: tuple[np.ndarray, np.ndarray, np.ndarray],
  counts: np.ndarray,
) -> Values:
  """Calls a function of all images for each model and row of counts."""
  unlearned, retrained, labels = data
  ours = np.zeros((len(unlearned), 1, len(counts)))
  theirs = np.zeros((len(retrained), len(counts)))
  for index, count in enumerate(counts):
    rows = np.repeat(np.arange(len(labels)), count)
    ours[:, 0, index] = [fn(logits[rows], labels[rows]) for logits in unlearned]
    theirs[:, index] = [fn(logits[rows], labels[rows]) for logits in retrained]
  return Values(ours, theirs if len(retrained) else None)


def check_splits(
  labels: Mapping[str, np.ndarray], sides: Mapping[str, Any]
) -> None:
  """Raises ValueError unless both sides have the splits of the labels."""
  if not labels:
    raise ValueError("labels must have at least one split, got none")
  for name, side in sides.items():
    if side is not None and set(side) != set(labels):
      raise ValueError(
        f"{name} must have the splits of labels, {sorted(labels)}, got"
        f" {sorted(side)}"
      )


def checked_runs(split: str, logits: Unlearned, labels: np.ndarray) -> Runs:
  """Returns the unlearned models of a split, or raises ValueError."""
  name = f"unlearned[{split!r}]"
  parts = list(logits.values() if isinstance(logits, Mapping) else logits)
  parts = [np.asarray(part) for part in parts]
  if not parts or any(part.ndim != 3 or not len(part) for part in parts):
    raise ValueError(
      f"{name} must be [T, U, N, K], or [U, N, K] by training seed, got"
      f" {[list(part.shape) for part in parts]}"
    )
  shapes = {part.shape[1:] for part in parts}
  if len(shapes) > 1 or labels.shape != parts[0].shape[1:2]:
    raise ValueError(
      f"{name} must have as many images as labels {list(labels.shape)}, got"
      f" {sorted(shapes)}"
    )
  _check_finite(name, parts)
  checks.labels(labels, len(labels), parts[0].shape[-1])
  return Runs(np.concatenate(parts), tuple(len(part) for part in parts))


def checked_reference(split: str, logits: Any, runs: Runs) -> np.ndarray:
  """Returns the references `[S, N, K]`, none for None, or raises."""
  if logits is None:
    return np.zeros((0, *runs.logits.shape[1:]))
  name = f"retrained[{split!r}]"
  if isinstance(logits, Mapping):
    logits = list(logits.values())
  if not len(logits):
    raise ValueError(
      f"{name} must have a model, or retrained be None, got none"
    )
  shapes = {np.shape(model) for model in logits}
  if shapes != {runs.logits.shape[1:]}:
    raise ValueError(
      f"{name} must be [S, {runs.logits.shape[1]}, {runs.logits.shape[2]}], as"
      f" the unlearned models', got models of {sorted(shapes)}"
    )
  reference = np.stack([np.asarray(model) for model in logits])
  _check_finite(name, [reference])
  return reference


def _check_finite(name: str, parts: Iterable[np.ndarray]) -> None:
  if not all(np.isfinite(part).all() for part in parts):
    raise ValueError(f"{name} must be finite, got NaN or infinity")


def checked_groups(
  split: str, groups: np.ndarray | None, labels: np.ndarray
) -> np.ndarray:
  """Returns the number of each image's group `[N]`."""
  if groups is None:
    return np.arange(len(labels))
  groups = np.asarray(groups)
  if groups.shape != labels.shape:
    raise ValueError(
      f"groups[{split!r}] must be {list(labels.shape)}, got"
      f" {list(groups.shape)}"
    )
  return np.unique(groups, return_inverse=True)[1]


def common(name: str, values: Sequence[Any]) -> Any:
  """Returns the one value that all splits have, or raises ValueError."""
  if len(set(values)) > 1:
    raise ValueError(
      f"{name} must have the same models in all splits, got {values}"
    )
  return values[0]
