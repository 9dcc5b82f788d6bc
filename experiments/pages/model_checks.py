"""The checks of models in tables and words; see `psg_jax.model_checks`.

All take what `model_checks.assess` gives.
"""

from collections.abc import Mapping
from typing import Any

from experiments.pages import tables
from psg_jax import model_checks

_NEARER = {
  model_checks.NEAR_RETRAINED: "retrained",
  model_checks.NEAR_ORIGINAL: "original",
}


def table(
  record: Mapping[str, Any], heads: Mapping[str, tables.Cell]
) -> tables.Table:
  """Returns checks as rows and models as columns.

  Args:
    record: Of `model_checks.assess`.
    heads: Of the columns, by model; what is not checked is left out.
  """
  heads = {
    name: head
    for name, head in heads.items()
    if name in record["against"] or name == "retrained"
  }
  rows = []
  for row in record["examinations"]:
    title = f"{row['title']}, {tables.PARTS[row['split']]}"
    num_alarms, total = sum(row["false_alarms"]), len(row["false_alarms"])
    if total:
      title += f" (rejects {num_alarms} of {total} retrained)"
    cells = [
      _range(row) if model == "retrained" else _cell(row["models"][model])
      for model in heads
    ]
    note = "false alarms unknown: fewer than three retrained models"
    head = tables.Cell(title, None if total else note)
    rows.append(tables.Row(head, cells))
  return tables.table(("Check", *heads.values()), rows)


def statement(record: Mapping[str, Any]) -> str:
  """Says how often the checks are wrong, one at a time and together."""
  if not record["total"]:
    return "Nothing can be told with fewer than three retrained models."
  return (
    f"Each check is made to reject {100 * record['level']:.0f} % of true"
    f" retrained models; {record['false_alarms']} of {record['total']} of them"
    " are rejected by one check or more."
  )


def _range(row: Mapping[str, Any]) -> tables.Cell:
  """The values of the references, each beside the others."""
  values = row["references"]
  text = None
  if values:
    text = f"{_number(min(values))} to {_number(max(values))}"
  notes = [row["reason"]] if row["reason"] else []
  if row["limits"] is not None:
    low, high = row["limits"]
    notes.append(
      f"up to {_number(high)}"
      if low is None
      else f"{_number(low)} to {_number(high)}"
    )
    notes[-1] += " is not rejected"
  answers = row["references_nearer"]
  notes += [f"{answers.count(x)} {x}" for x in dict.fromkeys(answers)]
  return tables.cell(text, note="; ".join(notes))


def _cell(finding: Mapping[str, Any]) -> tables.Cell:
  """The mean value of a method's models, and how many are rejected."""
  num, total = sum(finding["is_rejected"]), len(finding["is_rejected"])
  text = None
  if finding["value"] is not None:
    text = _number(finding["value"]) + "*" * bool(num)
    if num and total > 1:
      text += f" {num} of {total}"
    text += _side(finding["nearer"])
  notes = [finding["verdict"], finding["nearer"], finding["reason"]]
  return tables.cell(text, note="; ".join(dict.fromkeys(filter(None, notes))))


def _number(value: float) -> str:
  # Without the sign of what rounds to 0.
  return f"{round(value, 2) + 0.0:.2f}"


def _side(nearer: str | None) -> str:
  return f" {_NEARER[nearer]}" if nearer in _NEARER else ""
