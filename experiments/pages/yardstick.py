"""The yardstick in words and tables, for pages and printed tables.

All take what `judgement.record` gives, by model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.pages import tables

_DISTANCES = {
  "kl_divergence": "KL divergence",
  "disagreement": "Other prediction",
  "kl_to_mean": "KL from the references’ mean",
  "class_accuracy": "Accuracy by class",
}
_LEVELS = {
  "accuracy": "Accuracy",
  "true_class_probability": "Probability of the true class",
}
_NONE = "–"


class Column(NamedTuple):
  """A column of a short table.

  Attributes:
    title: Its title.
    arrow: What is ideal.
    figure: The kind, the name and the part of what it shows; None for the
      verdict.
  """

  title: str
  arrow: str = ""
  figure: tuple[str, str, str] | None = None

  def cell(self, record: Mapping[str, Any] | None) -> tables.Cell:
    """Returns the cell of a model that may have nothing measured."""
    if record is None:
      return tables.cell(None, note="no run of it has finished")
    if self.figure is None:
      text, note = record.get("verdict", _NONE), record.get("sentence")
      return tables.Cell(text, note, "words")
    return _figure(record, *self.figure)


def columns(models: Mapping[str, Mapping[str, Any]]) -> list[Column]:
  """Returns the columns that lead a short table; none without a reference."""
  split = next((x["forget_split"] for x in models.values()), None)
  if split is None:
    return []
  part = ", training" if split == "train_forget" else ""
  forget = ("distances", "kl_divergence", split)
  retain = ("distances", "kl_divergence", "test_retain")
  return [
    Column("Yardstick"),
    Column(f"Normalised KL, forget{part}", "→ 1", forget),
    Column("Normalised KL, retain", "→ 1", retain),
    Column(f"Level, forget{part}", "→ 0", ("levels", "accuracy", split)),
  ]


def table(
  record: Mapping[str, Any], heads: Mapping[str, tables.Cell]
) -> tables.Table:
  """Returns measures as rows and models as columns.

  Args:
    record: `models` and `false_alarms`.
    heads: Of the columns, by model; what is not measured is left out.
  """
  models = record["models"]
  heads = {name: head for name, head in heads.items() if name in models}
  first = next(x for name, x in models.items() if name != "retrained")
  number = first["num_references"]
  flags = record["false_alarms"]["attacks"]

  def rows(key: str) -> list[tables.Row]:
    lines = []
    for figure in first[key]:
      name = figure["name"]
      title = _title(name, figure["split"])
      if key == "attacks":
        title += f" (flags {flags[name]} of {number} retrained)"
      cells = [
        _figure(models[model], key, name, figure["split"], head.style)
        for model, head in heads.items()
      ]
      if any(x.text not in (tables.NOT_AVAILABLE, _NONE) for x in cells):
        lines.append(tables.Row(tables.Cell(title), cells))
    return lines

  known = "other references have" if number > 1 else "chance makes"
  names = {
    "distances": "Normalised distance: 1 is another retraining",
    "levels": "Level: standard deviations from the references’ mean",
    "attacks": f"Attacks: AUC, * outside what {known}",
  }
  groups = {name: rows(key) for key, name in names.items()}
  filled = {name: lines for name, lines in groups.items() if lines}
  return tables.table(("Measure", *heads.values()), filled)


def sentences(record: Mapping[str, Any]) -> list[str]:
  """Says what one unlearned model is, and what its references are."""
  lines = (record["models"]["unlearned"]["sentence"], around(record))
  return [line for line in lines if line]


def around(record: Mapping[str, Any]) -> str:
  """Says how far references are apart, and how often checks are wrong.

  Nothing, of one reference: the verdict says it all.
  """
  first = next(x for n, x in record["models"].items() if n != "retrained")
  spread = next(
    (x for x in first["spreads"] if x["split"] == first["forget_split"]), None
  )
  if spread is None or spread["agreement"] is None:
    return ""
  alarms = record["false_alarms"]
  part = tables.PARTS[spread["split"]].split(", ")[1]
  text = (
    f"{first['num_references']} retrained models: two of them predict the same"
    f" for {100 * spread['agreement']:.0f} % of the forget images ({part}) and"
    f" are {spread['kl_divergence']:.3g} nats apart; {record['statement']}"
  )
  if alarms["attacks"]:
    text += f", attacks flag at most {max(alarms['attacks'].values())}"
  others = alarms["num_others"]
  if others < 3:
    text += f" (each has {others} to be compared with: levels alone can tell)"
  return text + "."


def _title(name: str, split: str | None) -> str:
  attack = name.removeprefix("mia_").removesuffix("_auc").replace("_", " ")
  words = {**_DISTANCES, **_LEVELS}
  text = words.get(name, f"{attack.capitalize()} attack")
  return text if split is None else f"{text}, {tables.PARTS[split]}"


def _figure(
  record: Mapping[str, Any],
  key: str,
  name: str,
  split: str | None,
  style: str = "",
) -> tables.Cell:
  """The cell of a distance, a level or an attack."""
  figure = next(
    (x for x in record[key] if (x["name"], x["split"]) == (name, split)), None
  )
  if figure is None:
    note = "the references are what others are measured by"
    return tables.Cell(_NONE, note, style)
  notes, bounds, text = list(figure["reasons"]), figure["interval"], None
  if key == "distances":
    if figure["value"] is not None:
      text = _short(figure["value"])
      if bounds is not None:
        text += f" [{', '.join(map(_short, bounds))}]"
  elif key == "attacks":
    text = f"{figure['unlearned']:.3f}" + "*" * figure["is_flagged"]
    if bounds is not None:
      notes.append("{:.3f} to {:.3f}".format(*bounds))
  elif figure["difference"] is not None:
    text = f"{figure['difference']:+.1f} sd"
    means = f"{figure['unlearned']:.3f}, references {figure['retrained']:.3f}"
    notes = [means, f"p = {figure['p']:.2g}", *notes]
  return tables.cell(text, note="; ".join(notes), style=style)


def _short(value: float) -> str:
  if value >= 1000:
    return "> 1000"
  return f"{value:.0f}" if value >= 10 else f"{value:.2f}"
