"""The yardstick in words and tables, for pages and printed tables.

All take what `judgement.record` gives, by model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
_SPLITS = {
  "train_forget": "forget, training",
  "test_forget": "forget, test",
  "train_retain": "retain, training",
  "test_retain": "retain, test",
}
_MISSING = "not available"
_NONE = "–"


class Column(NamedTuple):
  """A column of a short table.

  Attributes:
    key: `"distances"`, `"levels"` or `"verdict"`.
    name: Of the distance or level.
    split: Of the images.
    title: Its title.
  """

  key: str
  name: str
  split: str | None
  title: str

  @property
  def header(self) -> dict[str, str]:
    """What the table says above it."""
    arrow = "→ 1" if self.key == "distances" else "→ 0"
    arrow = "" if self.key == "verdict" else arrow
    return {"title": self.title, "plain": self.title.lower(), "arrow": arrow}


def columns(models: Mapping[str, Mapping[str, Any]]) -> list[Column]:
  """Returns the columns that lead a short table; none without a reference."""
  split = next((x["forget_split"] for x in models.values()), None)
  if split is None:
    return []
  part = ", training" if split == "train_forget" else ""
  return [
    Column("verdict", "", None, "Yardstick"),
    Column("distances", "kl_divergence", split, f"Normalised KL, forget{part}"),
    Column(
      "distances", "kl_divergence", "test_retain", "Normalised KL, retain"
    ),
    Column("levels", "accuracy", split, f"Level, forget{part}"),
  ]


def cells(
  found: Mapping[str, Any] | None, of: Sequence[Column]
) -> list[dict[str, Any]]:
  """Returns a cell for each column, of a model that may have none."""
  result = []
  for column in of:
    if found is None:
      result.append(_cell(None, "no run of it has finished"))
    elif column.key == "verdict":
      cell = _cell(found.get("verdict", _NONE), found.get("sentence"))
      result.append({**cell, "is_words": True})
    else:
      result.append(_figure(found, column.key, column.name, column.split))
  return result


def table(
  found: Mapping[str, Any], titles: Mapping[str, str]
) -> dict[str, Any]:
  """Returns measures as rows and models as columns.

  Args:
    found: `models` and `false_alarms`.
    titles: Of the models, by name, in the order of the columns.

  Returns:
    `models`, `groups` of `rows`, and `verdicts`.
  """
  models = found["models"]
  named = {name: title for name, title in titles.items() if name in models}
  first = next(x for name, x in models.items() if name != "retrained")
  number = first["num_references"]
  flags = found["false_alarms"]["attacks"]

  def rows(key: str, words: Mapping[str, str]) -> list[dict[str, Any]]:
    result = []
    for each in first[key]:
      title = _title(each, words)
      if key == "attacks":
        title += f" (flags {flags[each['name']]} of {number} retrained)"
      row = [
        _figure(models[name], key, each["name"], each["split"])
        for name in named
      ]
      if any(not x["is_missing"] and x["text"] != _NONE for x in row):
        result.append({"title": title, "cells": row})
    return result

  groups = [
    ("Normalised distance: 1 is another retraining", "distances", _DISTANCES),
    ("Level: standard deviations from the references’ mean", "levels", _LEVELS),
    (
      "Attacks: AUC, * outside what "
      + ("other references have" if number > 1 else "chance makes"),
      "attacks",
      {},
    ),
  ]
  filled = [(name, rows(key, words)) for name, key, words in groups]
  return {
    "models": list(named.values()),
    "groups": [{"name": name, "rows": x} for name, x in filled if x],
    "verdicts": [
      {"title": title, **models[name]}
      for name, title in named.items()
      if "verdict" in models[name]
    ],
  }


def sentences(found: Mapping[str, Any]) -> list[str]:
  """Says what one unlearned model is, and what its references are."""
  said = [found["models"]["unlearned"]["sentence"], around(found)]
  return [each for each in said if each]


def around(found: Mapping[str, Any]) -> str:
  """Says how far references are apart, and how often checks are wrong.

  Nothing, of one reference: the verdict says it all.
  """
  first = next(x for n, x in found["models"].items() if n != "retrained")
  spread = next(
    (x for x in first["spreads"] if x["split"] == first["forget_split"]), None
  )
  number = first["num_references"]
  if spread is None or spread["agreement"] is None:
    return ""
  attacks = found["false_alarms"]["attacks"].values()
  text = (
    f"{number} retrained models: two of them predict the same for"
    f" {100 * spread['agreement']:.0f} % of the forget images"
    f" ({_SPLITS[spread['split']].split(', ')[1]}) and are"
    f" {spread['kl_divergence']:.3g} nats apart; {found['statement']}"
  )
  if attacks:
    text += f", attacks flag at most {max(attacks)}"
  others = found["false_alarms"]["num_others"]
  if others < 3:
    text += f" (each has {others} to be compared with: levels alone can tell)"
  return text + "."


def _title(each: Mapping[str, Any], words: Mapping[str, str]) -> str:
  name = each["name"]
  attack = name.removeprefix("mia_").removesuffix("_auc").replace("_", " ")
  text = words.get(name, f"{attack.capitalize()} attack")
  if each["split"] is not None:
    text += f", {_SPLITS[each['split']]}"
  return text


def _figure(
  found: Mapping[str, Any], key: str, name: str, split: str | None
) -> dict[str, Any]:
  each = next(
    (x for x in found[key] if (x["name"], x["split"]) == (name, split)), None
  )
  if each is None:
    return _cell(_NONE, "the references are what others are measured by")
  note = "; ".join(each["reasons"])
  if key == "distances":
    if each["value"] is None:
      return _cell(None, note)
    text = _short(each["value"])
    if each["interval"] is not None:
      text += f" [{_short(each['interval'][0])}, {_short(each['interval'][1])}]"
    return _cell(text, note)
  if key == "attacks":
    text = f"{each['unlearned']:.3f}" + "*" * each["is_flagged"]
    if each["interval"] is not None:
      low, high = each["interval"]
      note = f"{note}; {low:.3f} to {high:.3f}".removeprefix("; ")
    return _cell(text, note)
  if each["difference"] is None:
    return _cell(None, note)
  mean = f"{each['unlearned']:.3f}, references {each['retrained']:.3f}"
  p = f"p = {each['p']:.2g}"
  text = f"{each['difference']:+.1f} sd"
  return _cell(text, "; ".join(filter(None, [mean, p, note])))


def _short(value: float) -> str:
  if value >= 1000:
    return "> 1000"
  return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _cell(text: str | None, note: str | None) -> dict[str, Any]:
  return {
    "text": _MISSING if text is None else text,
    "note": note or None,
    "is_missing": text is None,
    "is_best": False,
  }
