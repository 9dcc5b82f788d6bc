"""What a comparison says of each method, all seeds together."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import cells, contexts, read_out
from experiments.comparison import references, runs, summary
from psg_jax import (
  judgement,
  metrics,
  model_checks,
  traces,
  verification,
  yardstick,
)

_NUM_RESAMPLES = 1000


class Logits(NamedTuple):
  """What verdicts are made of, on the parts `summary.SPLITS`.

  Attributes:
    retrained: `[S, N, K]` of all retrained models by part; None without one.
    models: `[U, N, K]` by model, part and training seed; what has not diverged.
    labels: int `[N]` by part.
    groups: `[N]` by part: what is drawn as a whole, such as patients; or None.
  """

  retrained: dict[str, np.ndarray] | None
  models: dict[str, dict[str, dict[int, np.ndarray]]]
  labels: dict[str, np.ndarray]
  groups: dict[str, np.ndarray] | None


def gather(
  context: contexts.Context,
  results: Sequence[Mapping[str, Any]],
  models: Mapping[int, references.Reference],
) -> Logits:
  """Reads the logits of all cells.

  Args:
    context: The job.
    results: The records of the cells.
    models: The original and retrained models by seed.
  """
  by_model: dict[str, dict[int, list[dict[str, np.ndarray]]]] = {
    "original": {
      seed: [x.logits["original"]]
      for seed, x in models.items()
      if "original" in x.logits
    }
  }
  for result in results:
    if result["status"] == cells.DONE:
      cell = runs.Cell.of(result)
      logits = cell.store(context.run_dir).read_logits()
      by_seed = by_model.setdefault(cell.method, {})
      by_seed.setdefault(cell.seed, []).append(logits)
  retrained = [
    x.logits["retrained"] for x in models.values() if "retrained" in x.logits
  ]
  column = context.selection.request.group
  parts = {x: context.parts[x] for x in summary.SPLITS}
  return Logits(
    {x: np.stack([y[x] for y in retrained]) for x in parts}
    if retrained
    else None,
    {
      model: {
        part: {s: np.stack([y[part] for y in x]) for s, x in by_seed.items()}
        for part in parts
      }
      for model, by_seed in by_model.items()
      if by_seed
    },
    {name: part.labels for name, part in parts.items()},
    {name: read_out.group_names(part, column) for name, part in parts.items()}
    if column is not None
    else None,
  )


def measure(
  logits: Logits, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
  """Measures the original and all methods, as `judgement.assess`.

  Args:
    logits: Of `gather`.
    rows: The figures of the references and of the cells.

  Returns:
    None without a retrained model.
  """
  if logits.retrained is None:
    return None
  return judgement.assess(
    logits.retrained,
    logits.models,
    logits.labels,
    attacks={x: _attacks(rows, x) for x in ("retrained", *logits.models)},
    groups=logits.groups,
    confidence=summary.CONFIDENCE,
    num_resamples=_NUM_RESAMPLES,
  )


def examine(logits: Logits) -> dict[str, Any] | None:
  """Checks the original and all methods, as `model_checks.assess`.

  A model has the original of its training seed beside it; further references
  have one of these, as in `references.rows`.

  Args:
    logits: Of `gather`.

  Returns:
    None without a retrained model.
  """
  if logits.retrained is None:
    return None
  outputs = {
    model: _outputs(by_part) for model, by_part in logits.models.items()
  }
  originals = {seed: runs[0] for seed, runs in outputs["original"].items()}
  retrained = [
    metrics.Outputs({part: x[place] for part, x in logits.retrained.items()})
    for place in range(len(next(iter(logits.retrained.values()))))
  ]
  pairs = zip(retrained, itertools.cycle(originals.values()), strict=False)
  return model_checks.assess(
    [model_checks.Subject(*pair) for pair in pairs],
    {
      model: [
        model_checks.Subject(run, originals[seed])
        for seed, runs in by_seed.items()
        for run in runs
      ]
      for model, by_seed in outputs.items()
    },
    logits.labels,
    traces.CHECKS,
  )


def _outputs(
  by_part: Mapping[str, Mapping[int, np.ndarray]],
) -> dict[int, list[metrics.Outputs]]:
  """The outputs of the runs of a model, by training seed."""
  seeds = next(iter(by_part.values()))
  return {
    seed: [
      metrics.Outputs({part: x[seed][run] for part, x in by_part.items()})
      for run in range(len(seeds[seed]))
    ]
    for seed in seeds
  }


def check_rows(
  record: Mapping[str, Any] | None,
) -> Iterator[tuple[str, None, None, str, float | None, str | None]]:
  """Gives the figures of the checks, with the columns `summary.COLUMNS`.

  Args:
    record: Of `examine`.

  Yields:
    `check_<name>_<split>`, the mean over models, and with `_rejected` the share
    of models that are rejected; of the retrained ones, by all others.
  """
  for row in (record or {"examinations": []})["examinations"]:
    name = f"check_{row['name']}_{row['split']}"
    alarms = {"is_rejected": row["false_alarms"], "reason": row["reason"]}
    retrained = {"values": row["references"], **alarms}
    for model, finding in {"retrained": retrained, **row["models"]}.items():
      columns = {"": "values", "_rejected": "is_rejected"}
      for end, key in columns.items():
        values = finding[key]
        value = float(np.mean(values)) if values else None
        reason = None if values else finding["reason"]
        yield model, None, None, name + end, value, reason


def csv_rows(
  record: Mapping[str, Any] | None,
) -> Iterator[tuple[str, None, None, str, float | None, str | None]]:
  """Gives the figures of the yardstick, with the columns `summary.COLUMNS`.

  Args:
    record: Of `measure`.

  Yields:
    `normalised_<distance>` with its `_low` and `_high`, and
    `standardised_<level>` with its `_p`.
  """
  for model, measured in (record or {"models": {}})["models"].items():
    figures = []
    for row in measured["distances"]:
      low, high = row["interval"] or (None, None)
      values = {"": row["value"], "_low": low, "_high": high}
      figures.append(("normalised", row, values))
    for row in (*measured["levels"], *measured["attacks"]):
      values = {"": row["difference"], "_p": row["p"]}
      figures.append(("standardised", row, values))
    for kind, row, values in figures:
      name = "_".join(filter(None, [kind, row["name"], row["split"]]))
      for end, value in values.items():
        reason = None if value is not None else "; ".join(row["reasons"])
        yield model, None, None, name + end, value, reason


def _attacks(
  rows: Sequence[Mapping[str, Any]], model: str
) -> dict[str, yardstick.Attack]:
  """The attacks that all runs of a model and all references have."""
  ours, theirs = (
    # What diverged has no time either.
    [
      row["metrics"]
      for row in rows
      if row["model"] == name and row["metrics"]["seconds"]["value"] is not None
    ]
    for name in (model, "retrained")
  )
  return {
    name: yardstick.Attack(
      [x[name]["value"] for x in ours],
      [x[name]["value"] for x in theirs],
      figure["num_samples"],
    )
    for name, figure in theirs[0].items()
    if name.startswith("mia_")
    and name.endswith("_auc")
    and all(x[name]["value"] is not None for x in (*ours, *theirs))
  }


def verify(
  logits: Logits, method: str, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """Compares a method with the retrained models; see `verification.compare`.

  Args:
    logits: Of `gather`.
    method: The method.
    records: Of its cells.

  Returns:
    `verdict`, `reasons`, the statistics that are `against` it, and the whole
    of it as `comparisons` and so on.
  """
  num_diverged = sum(x["status"] == cells.DIVERGED for x in records)
  lost = f"{num_diverged} of {len(records)} runs diverged"
  if num_diverged == len(records):
    return {"verdict": "diverged", "reasons": [lost], "against": []}
  report = verification.compare(
    logits.retrained,
    logits.models[method],
    logits.labels,
    groups=logits.groups,
    confidence=summary.CONFIDENCE,
    num_resamples=_NUM_RESAMPLES,
  )
  verdict = report.verdict
  reasons = []
  if num_diverged:
    reasons.append(f"{lost}, and are left out")
    if verdict == verification.EQUIVALENT:
      verdict = verification.CANNOT_TELL
  against = [
    comparison
    for comparison in report.comparisons
    if comparison.num_images
    and comparison.verdict == verdict != verification.EQUIVALENT
  ]
  reasons += dict.fromkeys(
    reason for comparison in against for reason in comparison.reasons
  )
  return {
    **report.as_dict(),
    "verdict": verdict,
    "reasons": reasons,
    "against": [_against(comparison) for comparison in against],
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
