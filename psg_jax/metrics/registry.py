"""All metrics by name, computed from one bundle of cached arrays.

A metric whose inputs are missing, or that cannot be had from them, has no value
and a reason. It is never 0, and any other error is raised, never swallowed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from psg_jax import checks
from psg_jax.metrics import common, table
from psg_jax.metrics import inputs as inputs_lib

METRICS: dict[str, inputs_lib.Metric] = {
  metric.name: metric for metric in table.rows()
}
"""Every metric by its name."""


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
  metrics = [find(name) for name in (METRICS if names is None else names)]
  inputs_lib.check(inputs)
  return {metric.name: _result(metric, inputs) for metric in metrics}


def _result(
  metric: inputs_lib.Metric, inputs: inputs_lib.Inputs
) -> dict[str, Any]:
  missing = [
    need for need in metric.needs if inputs_lib.get(inputs, need) is None
  ]
  if missing:
    return {"value": None, "reason": f"needs {', '.join(missing)}"}
  return result_of(metric.fn, inputs)


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
