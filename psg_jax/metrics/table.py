"""The metrics as a table: what each is, what it takes, where it comes from."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from psg_jax.metrics import (
  clinical,
  common,
  distances,
  evaluation,
  inputs,
  membership,
)

_MAX_ROWS_LISTED = 1000


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float | None:
  common.check_logits(logits, labels)
  return evaluation.accuracy(logits, labels)


def _compared(
  fn: Callable[[np.ndarray, np.ndarray], float | None], *logits: np.ndarray
) -> float | None:
  common.check_pair(*logits)
  return fn(*logits)


def _linear_cka(*features: np.ndarray, seed: int) -> float:
  return distances.linear_cka(*features, seed=seed)


def _tug_of_war(*arrays: Any) -> float:
  """Takes labels, logits and the retrained model's, of each of `SPLITS`."""
  forget, retain, *tests = (arrays[i : i + 3] for i in range(0, 12, 3))
  # Only what both models have: else the difference is that of the images.
  test = zip(*(x for x in tests if all(y is not None for y in x)), strict=True)
  parts = [forget, retain, [np.concatenate(x) for x in test]]
  ours, theirs = (
    tuple(_accuracy(part[i], part[0]) for part in parts) for i in (1, 2)
  )
  return distances.tug_of_war(ours, theirs)  # type: ignore[arg-type]


def _relearned(
  fn: Callable[..., float],
  logits: np.ndarray,
  labels: np.ndarray,
  *curves: np.ndarray,
) -> float:
  """Takes the original model's logits, and the curves of the others."""
  accuracy = _accuracy(logits, labels)
  if not accuracy:
    raise common.NotAvailableError(
      "the original model has no forget image right, so nothing can come back"
    )
  return fn(*curves, accuracy)


def _linear_probe(
  forget: np.ndarray,
  retain: np.ndarray,
  forget_labels: np.ndarray,
  retain_labels: np.ndarray,
  *,
  seed: int,
) -> dict[str, Any]:
  """Reads the classes of the forget set's test images from the features."""
  labels = np.concatenate([forget_labels, retain_labels])
  features = np.concatenate([forget, retain])
  probe = distances.linear_probe(features, labels, seed=seed)
  is_forget = probe.rows < len(forget)
  if not is_forget.any():
    raise common.NotAvailableError("no forget image could be probed")
  is_right = probe.predictions == labels[probe.rows]
  return {
    "value": float(is_right[is_forget].mean()),
    "count": int(is_forget.sum()),
    "accuracy": probe.accuracy,
  }


def _attack(
  fn: Callable[..., membership.Attack], figure: str, *arrays: Any, seed: int
) -> dict[str, Any]:
  """A membership attack, with one of its figures as the value.

  A request that matches no test image (single ids, a random part) leaves the
  test images of the same classes, which are all in `test_retain`. Where the
  request chose a device or a patient, these differ from it in more than
  membership, so the result names the split.
  """
  members, forget, retain = (arrays[i : i + 2] for i in (0, 2, 4))
  has_test = forget[0] is not None and len(forget[0])
  split, others = (
    ("test_forget", forget) if has_test else ("test_retain", retain)
  )
  if others[0] is None:
    raise common.NotAvailableError("needs model.logits.test_forget")
  attack = fn(*members, *others, seed=seed)
  result: dict[str, Any] = {
    "value": {**attack._asdict(), **(attack.tpr or {})}[figure],
    "accuracy": attack.accuracy,
    "auc": attack.auc,
    "num_samples": attack.num_samples,
    "non_members": split,
  }
  if result["value"] is None:
    result["reason"] = (
      f"{attack.num_samples} non-members are too few for this false positive"
      " rate"
    )
  if attack.tpr is not None:
    result["tpr"] = attack.tpr
  # One curve a score is enough for a file of all figures.
  if figure == "auc" and attack.roc is not None:
    fpr, tpr = attack.roc
    result["roc"] = {"fpr": fpr.tolist(), "tpr": tpr.tolist()}
  return result


def _mean_over_classes(
  fn: Callable[..., list[float | None]], *arrays: np.ndarray
) -> dict[str, Any]:
  """A figure of each class, and its mean over those that have one."""
  per_class = fn(*arrays)
  known = [value for value in per_class if value is not None]
  return {"value": common.mean(known), "per_class": per_class}


def _areas(*arrays: np.ndarray) -> list[float | None]:
  return clinical.auroc(*arrays).per_class


def _worst_subgroup(*arrays: np.ndarray) -> dict[str, Any]:
  worst = clinical.worst_subgroup(*arrays)
  return {"value": worst.accuracy, **worst._asdict()}


def _harmed(*arrays: np.ndarray) -> dict[str, Any]:
  """Share of the right answers that turned wrong, and which."""
  flips = clinical.flips(*arrays)
  if not flips.num_right:
    raise common.NotAvailableError("no image was right before")
  return {
    "value": len(flips.harmed_rows) / flips.num_right,
    "num_right": flips.num_right,
    "num_harmed": len(flips.harmed_rows),
    "num_helped": len(flips.helped_rows),
    # The first of them: a destroyed model would list the whole data set.
    **{
      name: getattr(flips, name)[:_MAX_ROWS_LISTED].tolist()
      for name in flips._fields
      if name.startswith(("harmed_", "helped_"))
    },
  }


def _false_negatives(*arrays: np.ndarray) -> dict[str, Any]:
  """The class whose rate of missed images grew most."""
  counts = clinical.false_negatives(*arrays)
  growth = [(x.after - x.before) / x.num_images for x in counts if x.num_images]
  return {"value": max(growth), "per_class": [x._asdict() for x in counts]}


class _Aim(NamedTuple):
  direction: inputs.Direction
  ideal: float | Literal["retrained"]


class _Row(NamedTuple):
  """A metric, or one for each of some parts of the data.

  Attributes:
    name: With `{part}` for the part.
    title: With `{words}` for the part in words.
    aim: What is best.
    unit: As in `Metric`.
    source: As in `Metric`.
    takes: Paths into `Inputs` of what `fn` is given, with `{part}` for the
      part. One with `?` may be missing, and is None then.
    fn: The metric as a function of these; of `seed` too, where that is named.
    parts: Of `SPLITS`, for a name with `{part}`.
  """

  name: str
  title: str
  aim: _Aim
  unit: str
  source: str
  takes: str
  fn: Callable[..., float | dict[str, Any] | None]
  parts: tuple[str, ...] = inputs.SPLITS


_ONE, _ZERO = _Aim("up", 1.0), _Aim("down", 0.0)
_ENDLESS = _Aim("up", float("inf"))
_RETRAINED = _Aim("as_retrained", "retrained")
_CHANCE, _SAME = _Aim("as_retrained", 0.5), _Aim("as_retrained", 1.0)

_FORGET = ("train_forget", "test_forget")
_RETAIN = ("train_retain", "test_retain")
_WORDS = {
  "train_forget": "forget, training",
  "train_retain": "retain, training",
  "test_forget": "forget, test",
  "test_retain": "retain, test",
}
_PAIR = "model.logits.{part} retrained.logits.{part}"
_OWN = "model.logits.{part} labels.{part}"
_BEFORE = "model.logits.{part} original.logits.{part} labels.{part}"
_TEST = _OWN.format(part="test_retain")
_ORIGINAL = "original.logits.train_forget labels.train_forget"
_ATTACKED = (
  "model.logits.train_forget labels.train_forget"
  " model.logits.test_forget? labels.test_forget?"
  " model.logits.test_retain? labels.test_retain? seed"
)
_ALL = " ".join(
  f"labels.{part} model.logits.{part} retrained.logits.{part}"
  for part in inputs.SPLITS
).replace(".test_forget", ".test_forget?")
_AGREEMENT = functools.partial(_compared, evaluation.agreement)
_KL = functools.partial(_compared, evaluation.kl_divergence)

_TABLE = (
  _Row(
    *("accuracy_{part}", "Accuracy ({words})", _RETRAINED, "share", ""),
    *(_OWN, _accuracy, _FORGET),
  ),
  _Row(
    *("accuracy_{part}", "Accuracy ({words})", _ONE, "share", ""),
    *(_OWN, _accuracy, _RETAIN),
  ),
  _Row(
    *("agreement_{part}", "Same answer as retrained ({words})", _ONE, "share"),
    *("", _PAIR, _AGREEMENT),
  ),
  _Row(
    *("kl_divergence_{part}", "KL(retrained || model) ({words})", _ZERO),
    "nats",
    "",
    "retrained.logits.{part} model.logits.{part}",
    _KL,
  ),
  _Row(
    *("js_divergence_{part}", "JS to retrained ({words})", _ZERO, "nats"),
    *("Lin, 1991", _PAIR, distances.js_divergence),
  ),
  _Row(
    *("total_variation_{part}", "Total variation to retrained ({words})"),
    _ZERO,
    "share",
    "Levin and Peres, 2017",
    _PAIR,
    distances.total_variation,
  ),
  _Row(
    "activation_distance_{part}",
    *("Activation distance to retrained ({words})", _ZERO, ""),
    *("Golatkar et al., 2021", _PAIR, distances.activation_distance),
  ),
  _Row(
    *("linear_cka_{part}", "Linear CKA to retrained ({words})", _ONE, "share"),
    "Kornblith et al., 2019",
    "model.features.{part} retrained.features.{part} seed",
    _linear_cka,
  ),
  _Row(
    *("zrf", "ZRF (forget, training)", _RETRAINED, "share"),
    "Chundawat et al., 2023 (bad teaching)",
    "model.logits.train_forget random.logits.train_forget",
    distances.zrf,
  ),
  _Row(
    *("tug_of_war", "ToW", _ONE, "share", "Zhao et al., 2024"),
    *(_ALL, _tug_of_war),
  ),
  _Row(
    *("weight_distance", "Weight distance to retrained", _ZERO, ""),
    *("Wu et al., 2020", "model.params retrained.params"),
    distances.weight_distance,
  ),
  _Row(
    *("run_time_efficiency", "Times faster than retraining", _ENDLESS),
    *("ratio", "Jia et al., 2023", "model.seconds retrained.seconds"),
    distances.run_time_efficiency,
  ),
  _Row(
    *("relearn_steps", "Steps to relearn", _RETRAINED, "steps"),
    *("Tarun et al., 2023", f"{_ORIGINAL} model.relearn_accuracy"),
    functools.partial(_relearned, distances.relearn_steps),
  ),
  _Row(
    *("anamnesis_index", "AIN", _SAME, "ratio"),
    "Chundawat et al., 2023 (zero-shot)",
    f"{_ORIGINAL} model.relearn_accuracy retrained.relearn_accuracy",
    functools.partial(_relearned, distances.anamnesis_index),
  ),
  _Row(
    *("linear_probe", "Linear probe of the features (forget, test)"),
    _RETRAINED,
    "share",
    "Alain and Bengio, 2016",
    "model.features.test_forget model.features.test_retain"
    " labels.test_forget labels.test_retain seed",
    _linear_probe,
  ),
  _Row(
    *("sensitivity", "Sensitivity, mean over classes (retain, test)", _ONE),
    *("share", "Altman and Bland, 1994", _TEST),
    functools.partial(_mean_over_classes, clinical.sensitivity),
  ),
  _Row(
    *("specificity", "Specificity, mean over classes (retain, test)", _ONE),
    *("share", "Altman and Bland, 1994", _TEST),
    functools.partial(_mean_over_classes, clinical.specificity),
  ),
  _Row(
    *("auroc", "AUROC (retain, test)", _ONE, "share"),
    *("Hanley and McNeil, 1982", _TEST),
    functools.partial(_mean_over_classes, _areas),
  ),
  _Row(
    *("calibration_error", "ECE (retain, test)", _ZERO, "share"),
    *("Guo et al., 2017", _TEST, clinical.calibration_error),
  ),
  _Row(
    *("worst_subgroup", "Accuracy of the worst subgroup (retain, test)", _ONE),
    *("share", "Oakden-Rayner et al., 2020", f"{_TEST} groups.test_retain"),
    _worst_subgroup,
  ),
  _Row(
    "false_negatives",
    *("Largest rise of a class's missed images (retain, test)", _ZERO),
    *("share", "Altman and Bland, 1994", _BEFORE.format(part="test_retain")),
    _false_negatives,
  ),
  _Row(
    *("harmed_{part}", "Right answers turned wrong ({words})", _ZERO),
    "share",
    "Yan et al., 2021",
    *(_BEFORE, _harmed, _RETAIN),
  ),
)


def _attacks() -> list[_Row]:
  """A row for each attack and figure of it."""

  def row(
    name: str, title: str, source: str, fn: Any, figure: str = "accuracy"
  ) -> _Row:
    # A rate is its own ideal: as many members are found as non-members are.
    aim = _CHANCE if figure.isalpha() else _CHANCE._replace(ideal=float(figure))
    return _Row(
      *(f"mia_{name}", f"Membership: {title}", aim, "share", source),
      *(_ATTACKED, functools.partial(_attack, fn, figure)),
    )

  rows = [
    row(
      *("logistic", "logistic regression on the loss, accuracy"),
      *("Kurmanji et al., 2023", membership.logistic_attack),
    ),
    row(
      *("svc", "SVC on the confidence, accuracy"),
      *("Jia et al., 2023", membership.svc_attack),
    ),
  ]
  for score in membership.SCORES:
    fn = functools.partial(membership.threshold_attack, score=score)
    title = f"threshold on the {score.replace('_', ' ')}"
    is_first = score in ("loss", "correctness")
    source = "Yeom et al., 2018" if is_first else "Song and Mittal, 2021"
    rows.append(row(score, f"{title}, accuracy", source, fn))
    rows.append(row(f"{score}_auc", f"{title}, AUC", source, fn, "auc"))
  for rate in ("0.01", "0.001"):
    title = f"members found by their loss at {float(rate):.1%} FPR"
    rows.append(
      row(
        *(f"loss_tpr_at_{rate}_fpr", title, "Carlini et al., 2022"),
        *(membership.threshold_attack, rate),
      )
    )
  return rows


def rows() -> list[inputs.Metric]:
  """Returns the metrics, those of each part of the data in a row."""
  return [
    _metric(row, part) for row in (*_TABLE, *_attacks()) for part in row.parts
  ]


def _metric(row: _Row, part: str) -> inputs.Metric:
  paths = row.takes.format(part=part).split()
  # Labels are there wherever logits are, which `inputs.check` sees to.
  needs = [
    path
    for path in paths
    if not (path.startswith(("labels.", "seed")) or path.endswith("?"))
  ]
  return inputs.Metric(
    row.name.format(part=part),
    row.title.format(words=_WORDS.get(part)),
    *(*row.aim, row.unit, row.source, tuple(needs)),
    functools.partial(_call, row.fn, tuple(paths)),
  )


def _call(
  fn: Callable[..., Any], paths: tuple[str, ...], given: inputs.Inputs
) -> Any:
  options = {"seed": given.seed} if "seed" in paths else {}
  values = (
    inputs.get(given, path.rstrip("?")) for path in paths if path != "seed"
  )
  return fn(*values, **options)
