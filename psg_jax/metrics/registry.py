"""All metrics by name, computed from one bundle of cached arrays.

A metric whose inputs are missing, or that cannot be had from them, has no value
and a reason. It is never 0, and any other error is raised, never swallowed.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from psg_jax import checks
from psg_jax.metrics import (
  adapters,
  clinical,
  common,
  distances,
  evaluation,
  membership,
)
from psg_jax.metrics import inputs as inputs_lib

_SPLIT_TITLES = {
  "train_forget": "forget, training",
  "train_retain": "retain, training",
  "test_forget": "forget, test",
  "test_retain": "retain, test",
}


def find(name: str) -> inputs_lib.Metric:
  """Returns the metric of this name.

  Raises:
    ValueError: If there is none; the message has the nearest name.
  """
  checks.one_of("name", name, METRICS)
  return METRICS[name]


def compute(
  names: Iterable[str] | None, inputs: inputs_lib.Inputs
) -> dict[str, dict[str, Any]]:
  """Computes metrics, each independent of the others.

  Args:
    names: Names in `METRICS`; None for all.
    inputs: The arrays.

  Returns:
    By name, a dictionary for JSON: `value`, a finite number, and further
    entries that depend on the metric; or `value` None and the `reason`.

  Raises:
    ValueError: If a name is unknown, or arrays do not fit together.
  """
  chosen = [find(name) for name in (METRICS if names is None else names)]
  inputs_lib.check(inputs)
  return {metric.name: _result(metric, inputs) for metric in chosen}


def result_of(
  fn: Callable[..., float | dict[str, Any] | None], *args: Any, **kwargs: Any
) -> dict[str, Any]:
  """Calls a metric and says why where it has no value.

  Args:
    fn: A function that returns a number, a dictionary with `"value"`, or None
      where there is nothing to average over, or raises `NotAvailableError`.
    *args: Its arguments.
    **kwargs: Its keyword arguments.

  Returns:
    `{"value": number, ...}`, or `{"value": None, "reason": text}`.
  """
  try:
    value = fn(*args, **kwargs)
  except common.NotAvailableError as error:
    return {"value": None, "reason": error.reason}
  result = value if isinstance(value, dict) else {"value": value}
  if result["value"] is None:
    return {"reason": "there is nothing to average over", **result}
  if not np.isfinite(result["value"]):
    return {"value": None, "reason": f"the result is {result['value']}"}
  return result


def _result(
  metric: inputs_lib.Metric, inputs: inputs_lib.Inputs
) -> dict[str, Any]:
  missing = [
    need for need in metric.needs if inputs_lib.get(inputs, need) is None
  ]
  if missing:
    return {"value": None, "reason": f"needs {', '.join(missing)}"}
  return result_of(metric.fn, inputs)


def _logits(model: str, *splits: str) -> tuple[str, ...]:
  return tuple(f"{model}.logits.{split}" for split in splits)


def _by_split() -> list[inputs_lib.Metric]:
  """Accuracies, and distances to the retrained model."""
  bind = functools.partial
  pairs: list[
    tuple[str, str, inputs_lib.Direction, float, Callable[..., float | None]]
  ]
  pairs = [
    ("agreement", "Same answer as retrained", "up", 1.0, evaluation.agreement),
    ("kl_divergence", "KL(retrained || model)", "down", 0.0, adapters.kl),
    ("js_divergence", "JS to retrained", "down", 0.0, distances.js_divergence),
    (
      "total_variation",
      "Total variation to retrained",
      "down",
      0.0,
      distances.total_variation,
    ),
    (
      "activation_distance",
      "Activation distance to retrained",
      "down",
      0.0,
      distances.activation_distance,
    ),
  ]
  found = []
  for split in inputs_lib.SPLITS:
    where = f"({_SPLIT_TITLES[split]})"
    both = (*_logits("model", split), *_logits("retrained", split))
    is_retain = split.endswith("retain")
    found.append(
      inputs_lib.Metric(
        f"accuracy_{split}",
        f"Accuracy {where}",
        "up" if is_retain else "as_retrained",
        1.0 if is_retain else "retrained",
        _logits("model", split),
        bind(adapters.accuracy, split),
      )
    )
    found += [
      inputs_lib.Metric(
        f"{name}_{split}",
        f"{title} {where}",
        direction,
        ideal,
        both,
        bind(adapters.compared, fn, split),
      )
      for name, title, direction, ideal, fn in pairs
    ]
    found.append(
      inputs_lib.Metric(
        f"linear_cka_{split}",
        f"Linear CKA to retrained {where}",
        "up",
        1.0,
        (f"model.features.{split}", f"retrained.features.{split}"),
        bind(adapters.cka, split),
      )
    )
  return found


def _accuracy_of(attack: membership.Attack) -> float:
  return attack.accuracy


def _auc_of(attack: membership.Attack) -> float:
  return attack.auc


def _tpr_of(rate: str, attack: membership.Attack) -> float | None:
  return attack.tpr[rate] if attack.tpr else None


def _of_attacks() -> list[inputs_lib.Metric]:
  needs = ("model.logits.train_forget",)
  found = []

  def add(
    name: str,
    title: str,
    fn: Callable[..., membership.Attack],
    pick: Callable[[membership.Attack], float | None],
    ideal: float = 0.5,
  ) -> None:
    # One curve a score is enough for a file of all figures.
    bound = functools.partial(
      adapters.attack, fn, pick, has_curve=pick is _auc_of
    )
    found.append(
      inputs_lib.Metric(name, title, "as_retrained", ideal, needs, bound)
    )

  add(
    "mia_logistic",
    "Membership: logistic regression on the loss, accuracy",
    membership.logistic_attack,
    _accuracy_of,
  )
  add(
    "mia_svc",
    "Membership: SVC on the confidence, accuracy",
    membership.svc_attack,
    _accuracy_of,
  )
  for score in membership.SCORES:
    title = f"Membership: threshold on the {score.replace('_', ' ')}"
    fn = functools.partial(membership.threshold_attack, score=score)
    add(f"mia_{score}", f"{title}, accuracy", fn, _accuracy_of)
    add(f"mia_{score}_auc", f"{title}, AUC", fn, _auc_of)
  for rate in ("0.01", "0.001"):
    add(
      f"mia_loss_tpr_at_{rate}_fpr",
      f"Membership: members found by their loss at {float(rate):.1%} FPR",
      membership.threshold_attack,
      functools.partial(_tpr_of, rate),
      float(rate),
    )
  return found


def _of_models() -> list[inputs_lib.Metric]:
  accuracies = ("train_forget", "train_retain", "test_retain")
  original = "original.logits.train_forget"
  return [
    inputs_lib.Metric(
      "zrf",
      "ZRF (forget, training)",
      "as_retrained",
      "retrained",
      (*_logits("model", "train_forget"), *_logits("random", "train_forget")),
      adapters.zrf,
    ),
    inputs_lib.Metric(
      "tug_of_war",
      "ToW",
      "up",
      1.0,
      (*_logits("model", *accuracies), *_logits("retrained", *accuracies)),
      adapters.tug_of_war,
    ),
    inputs_lib.Metric(
      "weight_distance",
      "Weight distance to retrained",
      "down",
      0.0,
      ("model.params", "retrained.params"),
      adapters.weight_distance,
    ),
    inputs_lib.Metric(
      "run_time_efficiency",
      "Times faster than retraining",
      "up",
      float("inf"),
      ("model.seconds", "retrained.seconds"),
      adapters.run_time_efficiency,
    ),
    inputs_lib.Metric(
      "relearn_steps",
      "Steps to relearn",
      "as_retrained",
      "retrained",
      ("model.relearn_accuracy", original),
      adapters.relearn_steps,
    ),
    inputs_lib.Metric(
      "anamnesis_index",
      "AIN",
      "as_retrained",
      1.0,
      ("model.relearn_accuracy", "retrained.relearn_accuracy", original),
      adapters.anamnesis_index,
    ),
    inputs_lib.Metric(
      "linear_probe",
      "Linear probe of the features (forget, test)",
      "as_retrained",
      "retrained",
      ("model.features.test_forget", "model.features.test_retain"),
      adapters.probe,
    ),
  ]


def _of_patients() -> list[inputs_lib.Metric]:
  bind = functools.partial
  test = "test_retain"
  here = _logits("model", test)
  where = f"({_SPLIT_TITLES[test]})"
  found = [
    inputs_lib.Metric(
      "sensitivity",
      f"Sensitivity, mean over classes {where}",
      "up",
      1.0,
      here,
      bind(adapters.mean_of, clinical.sensitivity, test),
    ),
    inputs_lib.Metric(
      "specificity",
      f"Specificity, mean over classes {where}",
      "up",
      1.0,
      here,
      bind(adapters.mean_of, clinical.specificity, test),
    ),
    inputs_lib.Metric(
      "auroc", f"AUROC {where}", "up", 1.0, here, bind(adapters.auroc, test)
    ),
    inputs_lib.Metric(
      "calibration_error",
      f"ECE {where}",
      "down",
      0.0,
      here,
      bind(adapters.calibration_error, test),
    ),
    inputs_lib.Metric(
      "worst_subgroup",
      f"Accuracy of the worst subgroup {where}",
      "up",
      1.0,
      (*here, f"groups.{test}"),
      bind(adapters.worst_subgroup, test),
    ),
    inputs_lib.Metric(
      "false_negatives",
      f"Largest rise of a class's missed images {where}",
      "down",
      0.0,
      (*here, *_logits("original", test)),
      bind(adapters.false_negatives, test),
    ),
  ]
  for split in ("train_retain", "test_retain"):
    found.append(
      inputs_lib.Metric(
        f"harmed_{split}",
        f"Right answers turned wrong ({_SPLIT_TITLES[split]})",
        "down",
        0.0,
        (*_logits("model", split), *_logits("original", split)),
        bind(adapters.flips, split),
      )
    )
  return found


METRICS: dict[str, inputs_lib.Metric] = {
  metric.name: metric
  for metric in (
    *_by_split(),
    *_of_attacks(),
    *_of_models(),
    *_of_patients(),
  )
}
"""Every metric by its name."""
