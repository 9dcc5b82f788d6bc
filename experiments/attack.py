"""What tells models that unlearned an image from models that never had it.

U-LiRA and KLOM over pairs of models, before unlearning, after it, and among
models never trained on an image, the control; `experiments.audit` trains them.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from psg_jax import ulira

SIDES = ("original", "unlearned", "control")
# Four pairs in each half of those never trained on an image: three to attack
# with, and one to leave out.
MIN_MODELS = 16
_MIN_SIDE = MIN_MODELS // 4
_MIN_HISTOGRAM_MODELS = 100
_MAX_GROUPS = 20
_ARRAYS = ("fpr", "tpr", "positive_scores", "negative_scores")


class Figures(NamedTuple):
  """What the attack and KLOM find, by side; what is not available is left out.

  Attributes:
    attacks: Of `original` and `unlearned` models, each against those never
      trained on an image, and of `control`, half of the latter against the
      other half.
    intervals: 90 % intervals of the AUCs over models.
    klom: `[T]`, of as many models a side each, so that sides are comparable.
    klom_method: `"histogram"` or `"gaussian"`.
    change: 90 % interval of the AUC after unlearning less that before, by the
      same models.
  """

  attacks: dict[str, ulira.AttackResult]
  intervals: dict[str, tuple[float, float]]
  klom: dict[str, np.ndarray]
  klom_method: str
  change: tuple[float, float] | None = None

  def as_dict(self) -> dict[str, Any]:
    """Returns the figures for JSON; None where one is not available."""
    attacks: dict[str, Any] = dict.fromkeys(SIDES)
    divergences: dict[str, Any] = dict.fromkeys(SIDES)
    for side, result in self.attacks.items():
      interval = list(self.intervals[side])
      attacks[side] = {**result.as_dict(), "auc_interval": interval}
    for side, values in self.klom.items():
      divergences[side] = {
        "median": float(np.median(values)),
        "percentile_95": float(np.percentile(values, 95)),
      }
    return {
      "attack": attacks,
      "change": None if self.change is None else list(self.change),
      "klom": {"method": self.klom_method, **divergences},
    }

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns curves, scores and divergences, by side and name."""
    return {
      **{
        f"{side}_{name}": getattr(result, name)
        for side, result in self.attacks.items()
        for name in _ARRAYS
      },
      **{f"{side}_klom": values for side, values in self.klom.items()},
    }


def evaluate(
  original: np.ndarray,
  unlearned: np.ndarray,
  never_trained: np.ndarray,
  never_unlearned: np.ndarray | None = None,
) -> Figures:
  """Attacks the models before and after unlearning, and a control.

  Args:
    original: float `[P, T]`, confidences (`ulira.logit_confidence`) in the
      audited images of the model of each pair that was trained on the image.
    unlearned: float `[P, T]`, of the same models after unlearning. Pairs with
      NaN are left out, and with too few pairs what needs more.
    never_trained: float `[P, T]`, of the other model of each pair.
    never_unlearned: float `[P, T]`, of the other model after unlearning what it
      had; the same as before by default. Models that unlearned exactly have
      seen none of the audited images, and cannot differ from these; from those
      before unlearning they do, which have half of the others of its kind.

  Returns:
    The figures.
  """
  halves = _halves(never_trained)
  if never_unlearned is None:
    never_unlearned = never_trained
  is_done = np.isfinite(unlearned + never_unlearned).all(1)
  unlearned = unlearned[is_done]
  pairs = {
    "original": (original, never_trained),
    "unlearned": (unlearned, never_unlearned[is_done]),
    "control": halves,
  }
  attacks = {
    side: ulira.attack(*pair)
    for side, pair in pairs.items()
    if len(pair[0]) >= _MIN_SIDE
  }
  method, divergences = _klom(original, unlearned, halves)
  change = None
  if "unlearned" in attacks:
    before = (original[is_done], never_trained[is_done])
    change = auc_interval(*pairs["unlearned"], less=before)
  return Figures(
    attacks=attacks,
    intervals={side: auc_interval(*pairs[side]) for side in attacks},
    klom=divergences,
    klom_method=method,
    change=change,
  )


def _halves(never_trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Cuts models never trained on an image in two.

  Both halves have images of each model, as both sides of the attack have.
  """
  shape = (len(never_trained) // 2, 1)
  is_first = np.random.default_rng(0).random(shape) < 0.5
  is_first = is_first ^ (np.arange(never_trained.shape[1]) % 2 == 0)
  even, odd = never_trained[::2], never_trained[1::2]
  return np.where(is_first, even, odd), np.where(~is_first, even, odd)


def _klom(
  original: np.ndarray,
  unlearned: np.ndarray,
  halves: tuple[np.ndarray, np.ndarray],
) -> tuple[str, dict[str, np.ndarray]]:
  """Returns the method and the mean divergence `[T]` of each side.

  With few models KLOM is far above 0, so that all sides have as many models as
  the control: halves.
  """
  is_large = len(halves[0]) >= _MIN_HISTOGRAM_MODELS
  method = "histogram" if is_large else "gaussian"
  sides = {
    side: [(p, q) for p in (models[::2], models[1::2]) for q in halves]
    for side, models in (("original", original), ("unlearned", unlearned))
    if len(models) >= 2 * _MIN_SIDE
  }
  sides["control"] = [halves, halves[::-1]]
  return method, {
    side: np.mean([ulira.klom(*pair, method=method) for pair in pairs], 0)
    for side, pairs in sides.items()
  }


def auc_interval(
  positives: np.ndarray,
  negatives: np.ndarray,
  *,
  less: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, float]:
  """Returns the 90 % interval of the attack's AUC over models (jackknife).

  The images stay, and one pair of models is left out at a time (of many, one of
  20 groups), as all images of a model move together. The attack is made anew
  without it: the distributions that it fits vary as much as what it scores, and
  resampling scores would miss that (intervals of 90 % then covered 60 to 80 %
  of simulated ones).

  Args:
    positives: float `[P, T]`, confidences; `P` 4 or more.
    negatives: float `[P, T]`, likewise.
    less: Positives and negatives of the same models, whose AUC is subtracted.
  """

  def auc(group: np.ndarray) -> float:
    left = [np.delete(x, group, 0) for x in (positives, negatives)]
    value = ulira.attack(*left).auc
    if less is not None:
      value -= ulira.attack(*(np.delete(x, group, 0) for x in less)).auc
    return value

  rows = np.arange(len(positives))
  groups = np.array_split(rows, min(_MAX_GROUPS, len(rows)))
  total = (len(groups) - 1) * float(np.var([auc(group) for group in groups]))
  half = scipy.stats.norm.ppf(0.95) * math.sqrt(total)
  value, lowest = auc(rows[:0]), 0.0 if less is None else -1.0
  return max(lowest, value - half), min(1.0, value + half)
