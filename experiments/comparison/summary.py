"""Statistics over the cells of a comparison: means, the best, the nearest.

A row is a dictionary with `model` (a method, `original` or `retrained`),
`seed`, `unlearn_seed` (None for the references) and `metrics`, by name a
dictionary with `value`, and a `reason` where the value is None.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

# Exact unlearning is what the others are measured by, and cannot win.
_NOT_RANKED = frozenset({"original", "retrained", "retrain"})
SPLITS = ("train_forget", "test_forget", "test_retain")
"""The parts that verdicts are about: those a retrained model has not seen."""
COLUMNS = ("model", "seed", "unlearn_seed", "metric", "value", "not_available")
"""Of a table of figures, the last the reason of a value that is None."""
DISTANCES = (
  "kl_divergence_{}",
  "kl_divergence_test_retain",
  "agreement_{}",
  "mia_loss_auc",
  "mia_entropy_auc",
)
"""What methods are placed by: accuracy alone cannot rank them."""
CONFIDENCE = 0.9
_FORGET = ("test_forget", "train_forget")


def tidy(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
  """Returns one line a cell and metric, with the columns `COLUMNS`."""
  lines = []
  for row in rows:
    start = (row["model"], row["seed"], row["unlearn_seed"])
    for name, figure in row["metrics"].items():
      value = figure["value"]
      reason = figure.get("reason") if value is None else None
      lines.append((*start, name, value, reason))
  return pd.DataFrame(lines, columns=list(COLUMNS), dtype=object)


def summarise(table: pd.DataFrame) -> dict[str, dict[str, dict[str, Any]]]:
  """Averages the metrics of each model.

  Args:
    table: Of `tidy`.

  Returns:
    By model and metric: `mean`; `sd`, the standard deviation over training
    seeds, unlearning seeds averaged, or with one training seed over these, and
    None for a single value; `by_seed`, the mean of each training seed that has
    one; `count` of `total` cells with a value; and `reason`, why others have
    none.
  """
  summary: dict[str, dict[str, dict[str, Any]]] = {}
  for (model, name), cells in table.groupby(["model", "metric"], sort=False):
    values = cells["value"].astype(float)
    by_seed = values.groupby(cells["seed"], sort=False).mean().dropna()
    spread = values if len(by_seed) == 1 else by_seed
    summary.setdefault(model, {})[name] = {
      "mean": _number(by_seed.mean()),
      "sd": _number(spread.std()),
      "by_seed": {str(seed): float(x) for seed, x in by_seed.items()},
      "count": int(values.count()),
      "total": len(cells),
      "reason": "; ".join(cells["not_available"].dropna().unique()) or None,
    }
  return summary


def interval(values: Sequence[float]) -> tuple[float, float] | None:
  """Returns Student's interval of a mean; None for fewer than two values."""
  if len(values) < 2:
    return None
  width = scipy.stats.t.isf((1 - CONFIDENCE) / 2, len(values) - 1)
  half = width * np.std(values, ddof=1) / math.sqrt(len(values))
  return float(np.mean(values) - half), float(np.mean(values) + half)


def losses(
  summary: Mapping[str, Any], name: str, direction: str, ideal: Any
) -> pd.DataFrame:
  """Returns how far each method is from the ideal, by training seed.

  Args:
    summary: Of `summarise`.
    name: A metric.
    direction: As in `metrics.Metric`; what should be as in the retrained model
      is measured by the difference to that of the same seed.
    ideal: As in `metrics.Metric`, for want of a retrained model.

  Returns:
    A row a method and a column a seed, the smaller the better. Methods that
    lack the value of a seed are left out, and so is exact unlearning.
  """
  complete = {
    model: figures[name]["by_seed"]
    for model, figures in summary.items()
    if model not in _NOT_RANKED
    and figures[name]["count"] == figures[name]["total"]
  }
  values = pd.DataFrame.from_dict(complete, orient="index", dtype=float)
  if direction != "as_retrained":
    return -values if direction == "up" else values
  retrained = summary.get("retrained", {}).get(name, {}).get("by_seed", {})
  target = pd.Series(retrained, index=values.columns, dtype=float)
  if ideal is not None and not isinstance(ideal, str):
    target = target.fillna(ideal)
  return (values - target).abs().dropna(how="all")


def ranking(losses: pd.DataFrame) -> pd.DataFrame:
  """Orders methods, and compares each with the first.

  Args:
    losses: Of `losses`.

  Returns:
    A row a method, the best first: `mean`, and `low` and `high`, the interval
    of the paired difference to the first over training seeds, in which more is
    worse; NaN for fewer than two seeds.
  """
  means = losses.mean(axis=1).sort_values(kind="stable")
  gaps = [
    interval((losses.loc[model] - losses.loc[means.index[0]]).dropna().tolist())
    for model in means.index
  ]
  none = (math.nan, math.nan)
  bounds = np.reshape([gap or none for gap in gaps], (-1, 2))
  return pd.DataFrame(
    {"mean": means, "low": bounds[:, 0], "high": bounds[:, 1]}
  )


def best(losses: pd.DataFrame) -> list[str]:
  """Returns the method that is surely better than every other.

  Surely better is one whose paired difference over training seeds has an
  interval that lies on one side of 0.

  Args:
    losses: Of `losses`.

  Returns:
    Its name, and of those that equal it at every seed; none where the interval
    does not decide, or there are fewer than two seeds.
  """
  order = ranking(losses)
  is_equal = (order["low"] == 0) & (order["high"] == 0)
  is_decided = (is_equal | (order["low"] > 0)).all() and not is_equal.all()
  return list(order.index[is_equal]) if is_decided else []


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
  direction = "up" if is_share else "down"
  for split in _FORGET:
    name = f"{statistic}_{split}"
    if not all(name in figures for figures in summary.values()):
      continue
    ranked = losses(summary, name, direction, 0.0)
    if len(ranked):
      break
  else:
    return None
  order = ranking(ranked)[:2]
  figures = {model: summary[model][name] for model in order.index}
  gap = _gap(order.iloc[-1]) if len(order) > 1 else None
  return {
    "statistic": statistic,
    "split": split,
    "methods": [
      {
        "method": model,
        "mean": figure["mean"],
        "interval": _clipped(
          interval(list(figure["by_seed"].values())),
          1.0 if is_share else math.inf,
        ),
      }
      for model, figure in figures.items()
    ],
    "gap": gap,
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
  places = []
  for pattern in DISTANCES:
    names = (pattern.format(split) for split in _FORGET)
    for name in (x for x in names if x in info):
      ranked = losses(summary, name, info[name]["direction"], 0.0)
      if method in ranked.index:
        break
    else:
      continue
    order = ranking(ranked)
    place, gap = order.loc[method], _gap(order.loc[method])
    is_first = bool(place["mean"] == order["mean"].iloc[0])
    places.append(
      {
        "method": method,
        "metric": name,
        "rank": 1 if is_first else 1 + order.index.get_loc(method),
        "num_methods": len(order),
        "first": order.index[0],
        "gap": gap,
        "is_within": is_first or (gap is not None and gap[0] <= 0),
      }
    )
  return places


def _gap(place: pd.Series) -> list[float] | None:
  """The interval of a row of `ranking`; None where there is none."""
  return None if math.isnan(place["low"]) else place[["low", "high"]].tolist()


def _number(value: float) -> float | None:
  return None if math.isnan(value) else float(value)


def _clipped(
  bounds: tuple[float, float] | None, most: float
) -> list[float] | None:
  return None if bounds is None else np.clip(bounds, 0.0, most).tolist()
