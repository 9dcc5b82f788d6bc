"""What is asked of a revised clinical model beside its accuracy.

Sensitivity, specificity, AUROC and calibration on the retained test images, the
worst subgroup of each metadata column, images missed before and after, the
retained images whose right answer turned wrong (`flips.csv`, all of them, and
pictures of a few), membership attacks, a diagnosis, and what can be claimed.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special

from experiments import files, requests
from psg_jax import (
  diagnosis,
  judgement,
  metrics,
  types,
  unlearning,
  verification,
)
from psg_jax import yardstick as yardstick_lib

FIGURES = (
  "sensitivity",
  "specificity",
  "auroc",
  "calibration_error",
  "false_negatives",
  "harmed_train_retain",
  "harmed_test_retain",
)
ATTACKS = (
  "mia_loss_auc",
  "mia_confidence_auc",
  "mia_entropy_auc",
  "mia_modified_entropy_auc",
  "mia_correctness_auc",
  "mia_logistic",
  "mia_svc",
)
# A retrained model has seen the fourth part.
_JUDGED = ("train_forget", "test_forget", "test_retain")
_NUM_PICTURES = 12
_KEPT = (
  *("value", "reason", "per_class", "num_right", "num_harmed"),
  *("non_members", "num_samples"),
)
_CSV_FIELDS = (
  *("part", "id", "label", "original_prediction", "unlearned_prediction"),
  "unlearned_probability",
)

Logits = Mapping[str, np.ndarray]
Parts = Mapping[str, types.Dataset]


def figures(
  parts: Parts, logits: Mapping[str, Logits], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Computes the figures of each model.

  Args:
    parts: The four parts of the data.
    logits: By model, of `original`, `retrained` and `unlearned`, and part.
    columns: Metadata columns whose worst subgroup is looked for.

  Returns:
    By model: `clinical`, of `FIGURES` and `worst_subgroup`, which is by column,
    on retained test images; and `membership`, of `ATTACKS`. Each has a `value`,
    or None and the `reason`.
  """
  labels = {name: part.labels for name, part in parts.items()}
  original = metrics.Outputs(logits["original"])
  result = {}
  for model, outputs in logits.items():
    inputs = metrics.Inputs(
      labels=labels, model=metrics.Outputs(outputs), original=original
    )
    # The original has nothing to be compared with.
    names = [x for x in FIGURES if model != "original" or not _is_change(x)]
    clinical: dict[str, Any] = _kept(metrics.compute(names, inputs))
    clinical["worst_subgroup"] = {
      column: metrics.compute(
        ["worst_subgroup"],
        inputs._replace(groups={"test_retain": values}),
      )["worst_subgroup"]
      for column in columns
      for values in [requests.values(parts["test_retain"], column)]
    }
    result[model] = {
      "clinical": clinical,
      "membership": _kept(metrics.compute(ATTACKS, inputs)),
    }
  return result


def yardstick(
  parts: Parts,
  logits: Mapping[str, Logits],
  retrained: Sequence[Logits],
  group: str | None,
) -> dict[str, Any]:
  """Measures models by what retrained ones are to one another.

  Args:
    parts: The four parts of the data.
    logits: Of `original` and `unlearned`, by part.
    retrained: Of the references, by part.
    group: Column of what is drawn as a whole, such as patients; None for none.

  Returns:
    As `judgement.assess`.
  """
  truth = {name: part.labels for name, part in parts.items()}
  sides = {"retrained": list(retrained), **{k: [v] for k, v in logits.items()}}
  computed = {
    name: [
      metrics.compute(
        [x for x in ATTACKS if x.endswith("_auc")],
        metrics.Inputs(labels=truth, model=metrics.Outputs(outputs)),
      )
      for outputs in models
    ]
    for name, models in sides.items()
  }
  known = [
    name
    for name in computed["original"][0]
    if all(x[name]["value"] is not None for y in computed.values() for x in y)
  ]
  return judgement.assess(
    {part: np.stack([x[part] for x in retrained]) for part in _JUDGED},
    {
      name: {part: outputs[part][None, None] for part in _JUDGED}
      for name, outputs in logits.items()
    },
    {part: truth[part] for part in _JUDGED},
    attacks={
      name: {
        attack: yardstick_lib.Attack(
          [x[attack]["value"] for x in figures],
          [x[attack]["value"] for x in computed["retrained"]],
          figures[0][attack]["num_samples"],
        )
        for attack in known
      }
      for name, figures in computed.items()
    },
    groups=None
    if group is None
    else {part: group_names(parts[part], group) for part in _JUDGED},
  )


def group_names(part: types.Dataset, column: str) -> np.ndarray:
  """The groups of images; one without a group stands alone."""
  assert part.metadata is not None
  ids = np.asarray(part.ids)
  return np.array(
    [
      f"image {image_id}" if value in (None, "") else f"group {value}"
      for image_id, value in zip(
        ids, part.metadata.column(column).to_pylist(), strict=True
      )
    ]
  )


def judge(
  accuracies: Mapping[str, Mapping[str, float | None]],
  relabelling: unlearning.Relabelling,
  retrained_logits: np.ndarray | None,
  *,
  history: Sequence[Mapping[str, Any]],
  options: Mapping[str, Any],
  is_class: bool,
  num_classes: int,
) -> dict[str, Any]:
  """Says what went wrong, if anything, and what the models allow to claim.

  Args:
    accuracies: By model and part.
    relabelling: What the search found.
    retrained_logits: float `[N, K]`, the retrained model's on the forget set.
    history: One record a pass.
    options: Of `unlearning.unlearn`.
    is_class: Whether whole classes are forgotten, and no more.
    num_classes: `K`.

  Returns:
    `diagnosis` and `claims`, for JSON.
  """
  retrained = accuracies.get("retrained")
  splits = metrics.SPLITS
  return {
    "diagnosis": diagnosis.diagnose(
      {x: accuracies["original"][x] for x in splits},
      {x: accuracies["unlearned"][x] for x in splits},
      retrained=None
      if retrained is None
      else {x: retrained[x] for x in splits},
      relabelling=diagnosis.summarise_relabelling(
        relabelling, retrained_logits
      ),
      history=history,
      options=options,
      scope="class" if is_class else "samples",
      num_classes=num_classes,
    ).as_dict(),
    "claims": verification.claims(int(retrained is not None)).as_dict(),
  }


def save_flips(
  folder: pathlib.Path, parts: Parts, logits: Mapping[str, Logits]
) -> None:
  """Lists the retained images whose right answer turned wrong.

  Writes `flips.csv`, test images first and in each part the surest wrong
  answers first, and `flips.npz`, pictures of the first of them.

  Args:
    folder: The run folder.
    parts: The four parts of the data.
    logits: Of `original` and `unlearned`, by part.
  """
  rows = []
  pictures: list[np.ndarray] = []
  for name in ("test_retain", "train_retain"):
    part = parts[name]
    if not len(part):
      continue
    unlearned = logits["unlearned"][name]
    try:
      flips = metrics.flips(unlearned, logits["original"][name], part.labels)
    except metrics.NotAvailableError:
      continue  # The figures of this part say why.
    probabilities = scipy.special.softmax(unlearned[flips.harmed_rows], -1)
    sureness = probabilities.max(-1)
    classes, ids = part.class_names, np.asarray(part.ids)
    for i in np.argsort(-sureness, kind="stable"):
      row = int(flips.harmed_rows[i])
      shown = (part.labels[row], flips.harmed_before[i], flips.harmed_after[i])
      rows.append(
        (
          *(name, str(ids[row])),
          *(classes[int(label)] for label in shown),
          round(float(sureness[i]), 4),
        )
      )
      if len(pictures) < _NUM_PICTURES:
        pictures.append(np.asarray(part.images[[row]])[0])
  files.write_text(folder / "flips.csv", files.to_csv([_CSV_FIELDS, *rows]))
  shape = parts["train_retain"].images.shape[1:]
  files.save_arrays(
    folder / "flips.npz",
    {
      "images": np.stack(pictures)
      if pictures
      else np.zeros((0, *shape), np.uint8),
    },
  )


def read_flips(folder: pathlib.Path) -> list[dict[str, str]] | None:
  """Reads the rows of `flips.csv`; None where a run has none."""
  path = folder / "flips.csv"
  return files.read_csv(path)[1] if path.is_file() else None


def _is_change(name: str) -> bool:
  return name.startswith(("harmed_", "false_negatives"))


def _kept(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Leaves out curves and lists of rows."""
  return {
    name: {key: figure[key] for key in _KEPT if key in figure}
    for name, figure in figures.items()
  }
