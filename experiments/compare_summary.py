"""Statistics over the cells of a comparison: means, the best, the verdicts.

A row is a dictionary with `model` (a method, `original` or `retrained`),
`seed`, `unlearn_seed` (None for the references) and `metrics`, by name a
dictionary with `value`, and a `reason` where the value is None.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from psg_jax import verification

# Exact unlearning is what the others are measured by, and cannot win.
_NOT_RANKED = frozenset({"original", "retrained", "retrain"})
SPLITS = ("train_forget", "test_forget", "test_retain")
"""The parts that verdicts are about: those a retrained model has not seen."""
DISTANCES = (
  "kl_divergence_{}",
  "kl_divergence_test_retain",
  "agreement_{}",
  "mia_loss_auc",
  "mia_entropy_auc",
)
"""What methods are placed by: accuracy alone cannot rank them."""
CONFIDENCE = 0.9
_NUM_RESAMPLES = 1000


def summarise(
  rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Averages the metrics of each model.

  Args:
    rows: The cells and the references.
    names: Names of metrics.

  Returns:
    By model and metric: `mean`; `sd`, the standard deviation over training
    seeds, unlearning seeds averaged, or with one training seed over these, and
    None for a single value; `by_seed`, the mean of each training seed that has
    one; `count` of `total` cells with a value; and `reason`, why others have
    none.
  """
  found: dict[str, dict[str, dict[str, Any]]] = {}
  for model in dict.fromkeys(row["model"] for row in rows):
    own = [row for row in rows if row["model"] == model]
    found[model] = {name: _summary(own, name) for name in names}
  return found


def _summary(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
  values: dict[str, list[float]] = {}
  reasons: dict[str, None] = {}
  for row in rows:
    result = row["metrics"].get(name, {"value": None, "reason": "not computed"})
    if result["value"] is None:
      reasons[result["reason"]] = None
    else:
      values.setdefault(str(row["seed"]), []).append(result["value"])
  by_seed = {seed: float(np.mean(each)) for seed, each in values.items()}
  spread = list(by_seed.values())
  if len(spread) == 1:
    spread = next(iter(values.values()))
  return {
    "mean": float(np.mean(list(by_seed.values()))) if by_seed else None,
    "sd": float(np.std(spread, ddof=1)) if len(spread) > 1 else None,
    "by_seed": by_seed,
    "count": sum(map(len, values.values())),
    "total": len(rows),
    "reason": "; ".join(reasons) or None,
  }


def interval(
  values: Sequence[float], *, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
  """Returns Student's interval of a mean; None for fewer than two values."""
  if len(values) < 2:
    return None
  width = scipy.stats.t.isf((1 - confidence) / 2, len(values) - 1)
  half = width * np.std(values, ddof=1) / math.sqrt(len(values))
  return float(np.mean(values) - half), float(np.mean(values) + half)


def losses(
  summary: Mapping[str, Any], name: str, direction: str, ideal: Any
) -> dict[str, dict[str, float]]:
  """Returns how far each method is from the ideal, by training seed.

  Args:
    summary: Of `summarise`.
    name: A metric.
    direction: As in `metrics.Metric`; what should be as in the retrained model
      is measured by the difference to that of the same seed.
    ideal: As in `metrics.Metric`, for want of a retrained model.

  Returns:
    By method and seed, the smaller the better. Methods that lack the value of
    a seed are left out, and so is exact unlearning.
  """
  target = summary.get("retrained", {}).get(name, {}).get("by_seed", {})
  found = {}
  for model, figures in summary.items():
    figure = figures[name]
    if model in _NOT_RANKED or figure["count"] < figure["total"]:
      continue
    values = figure["by_seed"]
    if direction == "as_retrained":
      fallback = None if isinstance(ideal, str) else ideal
      known = {
        seed: abs(value - target.get(seed, fallback))
        for seed, value in values.items()
        if target.get(seed, fallback) is not None
      }
    else:
      sign = -1.0 if direction == "up" else 1.0
      known = {seed: sign * value for seed, value in values.items()}
    if known:
      found[model] = known
  return found


def best(by_method: Mapping[str, Mapping[str, float]]) -> list[str]:
  """Returns the method that is surely better than every other.

  Surely better is one whose paired difference over training seeds has an
  interval that lies on one side of 0.

  Args:
    by_method: Of `losses`.

  Returns:
    Its name, and of those that equal it at every seed; none where the interval
    does not decide, or there are fewer than two seeds.
  """
  if len(by_method) < 2:
    return []
  first = min(by_method, key=lambda name: _mean(by_method[name]))
  kept = []
  for name, values in by_method.items():
    found = interval(differences(values, by_method[first]))
    if found is None:
      return []
    if found == (0.0, 0.0):
      kept.append(name)
    elif found[0] <= 0:
      return []
  return kept if len(kept) < len(by_method) else []


def differences(
  values: Mapping[str, float], others: Mapping[str, float]
) -> list[float]:
  """Returns the differences of the seeds that both have."""
  return [values[seed] - others[seed] for seed in values if seed in others]


def _mean(values: Mapping[str, float]) -> float:
  return float(np.mean(list(values.values())))


def nearest(
  summary: Mapping[str, Any], statistic: str, *, is_share: bool
) -> dict[str, Any] | None:
  """Finds the method that is nearest to the retrained model.

  Args:
    summary: Of `summarise`.
    statistic: `"kl_divergence"` or `"agreement"`, on the forget set's test
      images or, where there are none, its training images.
    is_share: Whether more is nearer.

  Returns:
    `split`; `methods`, the first two with `mean` and `interval` over training
    seeds; `difference` of the two by its `interval`; `is_decided`, whether the
    interval excludes 0. None where there is nothing to compare.
  """
  for split in ("test_forget", "train_forget"):
    name = f"{statistic}_{split}"
    if not all(name in figures for figures in summary.values()):
      continue
    ranked = losses(summary, name, "up" if is_share else "down", 0.0)
    if ranked:
      break
  else:
    return None
  order = sorted(ranked, key=lambda model: _mean(ranked[model]))[:2]
  limits = (0.0, 1.0) if is_share else (0.0, math.inf)
  methods = [
    {
      "method": model,
      "mean": summary[model][name]["mean"],
      "interval": _clipped(
        interval(list(summary[model][name]["by_seed"].values())), limits
      ),
    }
    for model in order
  ]
  gap = None
  if len(order) == 2:
    gap = interval(differences(ranked[order[1]], ranked[order[0]]))
  return {
    "statistic": statistic,
    "split": split,
    "methods": methods,
    "gap": None if gap is None else list(gap),
    "is_decided": gap is not None and gap[0] > 0,
  }


def standing(
  summary: Mapping[str, Any], method: str, info: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Places a method among all by its distances to the retrained model.

  Args:
    summary: Of `summarise`.
    method: The method in question.
    info: By metric, its `direction` and `ideal`.

  Returns:
    One entry for each of `DISTANCES` that was computed: `method`; `metric`;
    `rank` of `num_methods`; the `first` method; `gap`, the interval of the
    paired difference to it over training seeds, in which more is worse, None
    for fewer than two; and `is_within`, whether the method is the first, or the
    interval holds 0. None without a retrained model; a method that diverged at
    a seed is not placed.
  """
  if "retrained" not in summary:
    return []
  found = []
  for pattern in DISTANCES:
    for split in ("test_forget", "train_forget"):
      name = pattern.format(split)
      if name not in info:
        continue
      ranked = losses(summary, name, info[name]["direction"], 0.0)
      if method in ranked:
        break
    else:
      continue
    order = sorted(ranked, key=lambda model: _mean(ranked[model]))
    gap = interval(differences(ranked[method], ranked[order[0]]))
    is_first = _mean(ranked[method]) == _mean(ranked[order[0]])
    found.append(
      {
        "method": method,
        "metric": name,
        "rank": 1 if is_first else 1 + order.index(method),
        "num_methods": len(order),
        "first": order[0],
        "gap": None if gap is None else list(gap),
        "is_within": is_first or (gap is not None and gap[0] <= 0),
      }
    )
  return found


def _clipped(
  found: tuple[float, float] | None, limits: tuple[float, float]
) -> list[float] | None:
  return None if found is None else np.clip(found, *limits).tolist()


def verify(
  retrained: Mapping[str, np.ndarray] | None,
  unlearned: Mapping[str, Mapping[Any, np.ndarray]],
  labels: Mapping[str, np.ndarray],
  *,
  num_diverged: int,
  num_cells: int,
  groups: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
  """Compares a method with the retrained models; see `verification.compare`.

  Args:
    retrained: Logits `[S, N, K]` by split, or None.
    unlearned: Logits `[U, N, K]` by training seed and split, of the cells that
      did not diverge.
    labels: int `[N]` by split.
    num_diverged: Cells without a model.
    num_cells: All cells.
    groups: `[N]` by split: images that belong together.

  Returns:
    `verdict`, `reasons`, the statistics that are `against` it, and the whole
    of it as `comparisons` and so on.
  """
  lost = f"{num_diverged} of {num_cells} runs diverged"
  if num_diverged == num_cells:
    return {"verdict": "diverged", "reasons": [lost], "against": []}
  found = verification.compare(
    retrained,
    unlearned,
    labels,
    groups=groups,
    confidence=CONFIDENCE,
    num_resamples=_NUM_RESAMPLES,
  )
  verdict = found.verdict
  reasons = []
  if num_diverged:
    reasons.append(f"{lost}, and are left out")
    if verdict == verification.EQUIVALENT:
      verdict = verification.CANNOT_TELL
  against = [
    each
    for each in found.comparisons
    if each.num_images and each.verdict == verdict != verification.EQUIVALENT
  ]
  reasons += dict.fromkeys(
    reason for each in against for reason in each.reasons
  )
  return {
    **found.as_dict(),
    "verdict": verdict,
    "reasons": reasons,
    "against": [_against(each) for each in against],
  }


def _against(comparison: verification.Comparison) -> str:
  """Names a statistic that a verdict rests on, with its figures."""
  name = f"{comparison.statistic} of {comparison.split}"
  if comparison.interval is None:
    return name
  low, high = comparison.interval
  return (
    f"{name}: {comparison.difference:+.3f} [{low:+.3f}, {high:+.3f}],"
    f" margin {comparison.margin:g}"
  )
