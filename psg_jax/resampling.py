"""A paired bootstrap over images, training seeds and unlearning seeds.

What `verification` and `yardstick` share: values of each image and model, the
weights that resampled seeds have, and intervals from both. NumPy, on the host.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.stats

from psg_jax import checks
from psg_jax.metrics import common

# Counts of resampled images that lie in memory at a time.
_MAX_COUNTS = 2**22

StatisticFn: TypeAlias = Callable[[np.ndarray, np.ndarray], Any]
"""`(logits [N, K], labels [N])` -> one value an image `[N]`, or a number.

Values of images are averaged, which takes no time. A function that gives a
number is called anew for each model and resample.
"""

Unlearned: TypeAlias = np.ndarray | Mapping[Any, np.ndarray]
"""`[T, U, N, K]`, or `[U, N, K]` by training seed, with any `U` for each."""


class Split(NamedTuple):
  """What the models predict for the images of a split.

  Attributes:
    name: The split's name.
    unlearned: Logits `[M, N, K]`, those of a training seed together.
    retrained: Logits `[S, N, K]`; `S` may be 0.
    labels: int `[N]`.
    groups: int `[N]`, the number of each image's group.
    stream: Of its resamples, its own: a further split changes no other's.
  """

  name: str
  unlearned: np.ndarray
  retrained: np.ndarray
  labels: np.ndarray
  groups: np.ndarray
  stream: np.random.SeedSequence

  @property
  def num_groups(self) -> int:
    """Groups that are drawn as a whole."""
    return len(np.unique(self.groups))


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
  values: Values | None = None  # By image; None for a function called anew.
  fn: StatisticFn | None = None
  is_share: bool = False


class Bootstrap(NamedTuple):
  """The models of all splits, and the weights that resampled ones have.

  Attributes:
    sizes: Unlearned models of each training seed `[T]`, of sum `M`.
    num_retrained: Retrained models `S`.
    ours: float `[B, M]`, weights of the unlearned models.
    theirs: float `[B, max(S, 1)]`, weights of the retrained ones.
    confidence: Of the intervals.
  """

  sizes: tuple[int, ...]
  num_retrained: int
  ours: np.ndarray
  theirs: np.ndarray
  confidence: float

  @property
  def uniform(self) -> np.ndarray:
    """Weights `[1, M]`: each training seed counts the same."""
    sizes = np.asarray(self.sizes)
    return np.repeat(1 / (len(sizes) * sizes), sizes)[None]

  @property
  def equal(self) -> np.ndarray:
    """Weights `[1, max(S, 1)]`, all the same."""
    num = max(self.num_retrained, 1)
    return np.full((1, num), 1 / num)

  def replicates(self, resampled: Values) -> np.ndarray:
    """Differences `[B]`, of images and seeds resampled together."""
    return _difference(resampled, self.ours, self.theirs)

  def interval(
    self,
    estimate: float,
    replicates: np.ndarray,
    whole: Values,
    image_freedom: int,
  ) -> tuple[float, float]:
    """Percentiles, widened from the normal to Student's t distribution.

    Args:
      estimate: The difference on all images and seeds.
      replicates: Of resamples, `[b]`.
      whole: The values on all images.
      image_freedom: Degrees of freedom of the images.
    """
    # Of training seeds, if there are several, else of unlearning seeds.
    num_seeds = len(self.sizes) if len(self.sizes) > 1 else self.sizes[0]
    alone = (
      (_difference(whole, self.uniform, self.theirs), self.num_retrained - 1),
      (_difference(whole, self.ours, self.equal), num_seeds - 1),
    )
    # Satterthwaite: the variance that each has alone, and what is left.
    parts = [(float(np.var(x)), freedom) for x, freedom in alone if freedom > 0]
    rest = float(np.var(replicates)) - sum(variance for variance, _ in parts)
    parts.append((max(rest, 0.0), max(image_freedom, 1)))
    total = sum(variance for variance, _ in parts)
    tail = (1 - self.confidence) / 2
    factor = 1.0
    if total > 0:
      freedom = total**2 / sum(variance**2 / n for variance, n in parts)
      factor = scipy.stats.t.isf(tail, freedom) / scipy.stats.norm.isf(tail)
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return (
      float(min(estimate, estimate + factor * (low - estimate))),
      float(max(estimate, estimate + factor * (high - estimate))),
    )


def prepare(
  retrained: Mapping[str, Any] | None,
  unlearned: Mapping[str, Unlearned],
  labels: Mapping[str, np.ndarray],
  *,
  groups: Mapping[str, np.ndarray] | None,
  confidence: float,
  num_resamples: int,
  seed: int,
) -> tuple[Bootstrap, list[Split]]:
  """Checks what is to be compared, and draws the weights of the models.

  Args:
    retrained: Logits `[S, N, K]`, or `[N, K]` by seed, by split, or None.
    unlearned: Logits `[T, U, N, K]`, or `[U, N, K]` by training seed, by split.
    labels: int `[N]` by split.
    groups: `[N]` by split, that are drawn as a whole.
    confidence: In (0.5, 1).
    num_resamples: `B`, 100 or more.
    seed: Of the resampling.

  Returns:
    The weights, and the splits in the order of the labels.

  Raises:
    ValueError: If splits, shapes or numbers do not fit together.
  """
  checks.integer("num_resamples", num_resamples, at_least=100)
  checks.integer("seed", seed, at_least=0)
  checks.number("confidence", confidence, above=0.5)
  if confidence >= 1:
    raise ValueError(f"confidence must be below 1, got {confidence}")
  _check_splits(labels, {"unlearned": unlearned, "retrained": retrained})
  streams = np.random.SeedSequence(seed).spawn(1 + len(labels))
  splits, sizes = [], []
  for (name, truth), stream in zip(labels.items(), streams[1:], strict=True):
    truth = np.asarray(truth)
    runs, sizes_of = _checked_runs(name, unlearned[name], truth)
    reference = None if retrained is None else retrained[name]
    splits.append(
      Split(
        name,
        runs,
        _checked_reference(name, reference, runs),
        truth,
        _checked_groups(name, (groups or {}).get(name), truth),
        stream,
      )
    )
    sizes.append(sizes_of)
  num_retrained = _common("retrained", [len(x.retrained) for x in splits])
  rng = np.random.default_rng(streams[0])
  bootstrap = Bootstrap(
    sizes=_common("unlearned", sizes),
    num_retrained=num_retrained,
    ours=_unlearned_weights(rng, sizes[0], num_resamples),
    theirs=_drawn_weights(rng, max(num_retrained, 1), num_resamples),
    confidence=confidence,
  )
  return bootstrap, splits


def sides(
  values: Values, ours: np.ndarray, theirs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Both sides `[B]`, from values `[.., B or 1]` and weights `[B or 1, ..]`."""
  assert values.retrained is not None
  columns = theirs.T if values.unlearned.shape[1] > 1 else np.ones((1, 1))
  unlearned = np.sum(values.unlearned * ours.T[:, None] * columns, (0, 1))
  return unlearned, np.sum(values.retrained * theirs.T, 0)


def _difference(
  values: Values, ours: np.ndarray, theirs: np.ndarray
) -> np.ndarray:
  unlearned, retrained = sides(values, ours, theirs)
  return unlearned - retrained


def _drawn_weights(
  rng: np.random.Generator, num_seeds: int, num_resamples: int
) -> np.ndarray:
  """Weights `[B, n]` of `n - 1` draws from `n` seeds (one of one)."""
  num_draws = max(num_seeds - 1, 1)
  draws = rng.integers(0, num_seeds, (num_resamples, num_draws))
  return _counts(draws, num_seeds) / num_draws


def _unlearned_weights(
  rng: np.random.Generator, sizes: tuple[int, ...], num_resamples: int
) -> np.ndarray:
  """Weights `[B, M]`: training seeds, and unlearning seeds within each."""
  all_sizes = np.asarray(sizes)
  starts = np.cumsum(all_sizes) - all_sizes
  num_draws = max(len(sizes) - 1, 1)
  seeds = rng.integers(0, len(sizes), (num_resamples, num_draws))
  size = all_sizes[seeds][..., None]
  num_within = np.maximum(size - 1, 1)
  slots = np.arange(max(num_within.max(), 1))
  within = np.floor(rng.random((*seeds.shape, len(slots))) * size)
  models = starts[seeds][..., None] + within.astype(np.int64)
  shares = (slots < num_within) / (num_within * num_draws)
  weights = np.zeros((num_resamples, sum(sizes)))
  rows = np.arange(num_resamples)[:, None, None]
  np.add.at(weights, (rows, models), shares)
  return weights


def _counts(draws: np.ndarray, size: int) -> np.ndarray:
  """How often each of `size` things is in each row of draws."""
  offsets = np.arange(len(draws))[:, None] * size
  counts = np.bincount((draws + offsets).ravel(), minlength=len(draws) * size)
  return counts.reshape(len(draws), size)


def agreement(logits: np.ndarray, retrained: np.ndarray) -> np.ndarray:
  """Whether predictions are the same, 0 or 1, `[M, S, N]`."""
  return common.is_same(logits[:, None], retrained[None]).astype(np.float64)


def pairs(
  distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
  unlearned: np.ndarray,
  retrained: np.ndarray,
) -> tuple[Values, np.ndarray]:
  """Values of a distance of two models.

  Args:
    distance: Of `[M, ...]` and `[S, ...]` to `[M, S, N]`.
    unlearned: What it takes of the unlearned models.
    retrained: Of the retrained ones.

  Returns:
    The values, and the distances `[S, S, N]` between retrained models.
  """
  between = distance(retrained, retrained)
  ours = distance(unlearned, retrained)
  return Values(ours, _pseudo_values(between)), between


def _pseudo_values(distances: np.ndarray) -> np.ndarray | None:
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
  statistics: Sequence[Statistic], split: Split, num_resamples: int
) -> list[tuple[Values, Values] | None]:
  """Gives each statistic on all images, and on the resamples, shared by all."""
  if not len(split.labels):
    return [None] * len(statistics)
  sizes = np.bincount(split.groups).astype(np.float64)
  num_groups = len(sizes)
  order = np.argsort(split.groups, kind="stable")
  starts = np.flatnonzero(np.diff(split.groups[order], prepend=-1))
  sums = [
    _map(lambda x: np.add.reduceat(x[..., order], starts, -1), statistic.values)
    for statistic in statistics
  ]

  def evaluate(counts: np.ndarray) -> list[Values | None]:
    """Evaluates where groups are drawn so often, `[b, G]`."""
    mean = functools.partial(_weighted_mean, counts.astype(np.float64), sizes)
    return [
      _map(mean, values)
      if statistic.fn is None
      else _call(statistic.fn, split, counts[:, split.groups])
      for statistic, values in zip(statistics, sums, strict=True)
    ]

  whole = evaluate(np.ones((1, num_groups), np.int64))
  for statistic, values in zip(statistics, whole, strict=True):
    if values is not None and not np.isfinite(values.unlearned).all():
      raise ValueError(
        f"statistic {statistic.name!r} must be finite on all images"
      )
  rng = np.random.default_rng(split.stream)
  chunk = max(1, _MAX_COUNTS // num_groups)
  parts = []
  for start in range(0, num_resamples, chunk):
    shape = (min(chunk, num_resamples - start), num_groups)
    draws = rng.integers(0, num_groups, shape)
    parts.append(evaluate(_counts(draws, num_groups)))
  return [
    None if values is None else (values, _joined(drawn))
    for values, drawn in zip(whole, zip(*parts, strict=True), strict=True)
  ]


def _weighted_mean(
  weights: np.ndarray, sizes: np.ndarray, sums: np.ndarray
) -> np.ndarray:
  """Means `[.., b]` of sums over groups `[.., G]`, by weights `[b, G]`."""
  # The long side first: on busy cores OpenBLAS takes ten times as long, and
  # NumPy longer still over stacks, for the transposed product.
  flat = weights @ sums.reshape(-1, len(sizes)).T / (weights @ sizes)[:, None]
  return flat.T.reshape(*sums.shape[:-1], -1)


def _joined(parts: Iterable[Values | None]) -> Values:
  """Joins the resamples of a statistic."""
  ours, theirs = zip(*(part for part in parts if part is not None), strict=True)
  return Values(
    np.concatenate(ours, -1),
    None if theirs[0] is None else np.concatenate(theirs, -1),
  )


def _map(
  fn: Callable[[np.ndarray], np.ndarray], values: Values | None
) -> Values | None:
  """Applies a function to both sides."""
  if values is None:
    return None
  theirs = None if values.retrained is None else fn(values.retrained)
  return Values(fn(values.unlearned), theirs)


def _call(fn: StatisticFn, split: Split, counts: np.ndarray) -> Values:
  """Calls a function of all images for each model and row of counts."""
  ours = np.zeros((len(split.unlearned), 1, len(counts)))
  theirs = np.zeros((len(split.retrained), len(counts)))
  for index, count in enumerate(counts):
    rows = np.repeat(np.arange(len(split.labels)), count)
    labels = split.labels[rows]
    ours[:, 0, index] = [fn(x[rows], labels) for x in split.unlearned]
    theirs[:, index] = [fn(x[rows], labels) for x in split.retrained]
  return Values(ours, theirs if len(theirs) else None)


def _check_splits(
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


def _checked_runs(
  split: str, logits: Unlearned, labels: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]]:
  """Returns the unlearned models `[M, N, K]`, and how many each seed has."""
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
  return np.concatenate(parts), tuple(len(part) for part in parts)


def _checked_reference(split: str, logits: Any, runs: np.ndarray) -> np.ndarray:
  """Returns the references `[S, N, K]`, none for None, or raises."""
  if logits is None:
    return np.zeros((0, *runs.shape[1:]))
  name = f"retrained[{split!r}]"
  if isinstance(logits, Mapping):
    logits = list(logits.values())
  if not len(logits):
    raise ValueError(
      f"{name} must have a model, or retrained be None, got none"
    )
  shapes = {np.shape(model) for model in logits}
  if shapes != {runs.shape[1:]}:
    raise ValueError(
      f"{name} must be [S, {runs.shape[1]}, {runs.shape[2]}], as"
      f" the unlearned models', got models of {sorted(shapes)}"
    )
  reference = np.stack([np.asarray(model) for model in logits])
  _check_finite(name, [reference])
  return reference


def _check_finite(name: str, parts: Iterable[np.ndarray]) -> None:
  if not all(np.isfinite(part).all() for part in parts):
    raise ValueError(f"{name} must be finite, got NaN or infinity")


def _checked_groups(
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


def _common(name: str, values: Sequence[Any]) -> Any:
  """Returns the one value that all splits have, or raises ValueError."""
  if len(set(values)) > 1:
    raise ValueError(
      f"{name} must have the same models in all splits, got {values}"
    )
  return values[0]
