"""Each metric as a function of the one bundle of inputs, for the registry.

The registry has checked that what a function uses is there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from psg_jax.metrics import (
  clinical,
  common,
  distances,
  evaluation,
  membership,
)
from psg_jax.metrics import inputs as inputs_lib

_MAX_ROWS_LISTED = 1000


def accuracy(split: str, inputs: inputs_lib.Inputs) -> float:
  """Accuracy on one split."""
  return _accuracy(inputs.model.logits, inputs.labels, split)


def compared(
  fn: Callable[[np.ndarray, np.ndarray], float | None],
  split: str,
  inputs: inputs_lib.Inputs,
) -> float | None:
  """A distance to the retrained model on one split."""
  assert inputs.retrained is not None
  logits, other = inputs.model.logits[split], inputs.retrained.logits[split]
  common.check_pair(logits, other)
  return fn(logits, other)


def kl(logits: np.ndarray, retrained: np.ndarray) -> float | None:
  """`KL(retrained ‖ model)`, in the argument order of the other distances."""
  return evaluation.kl_divergence(retrained, logits)


def cka(split: str, inputs: inputs_lib.Inputs) -> float:
  """Alignment with the retrained model's features on one split."""
  return distances.linear_cka(
    inputs_lib.get(inputs, f"model.features.{split}"),
    inputs_lib.get(inputs, f"retrained.features.{split}"),
    seed=inputs.seed,
  )


def zrf(inputs: inputs_lib.Inputs) -> float:
  """Likeness to the random model on the forget set."""
  assert inputs.random is not None
  return distances.zrf(
    inputs.model.logits["train_forget"], inputs.random.logits["train_forget"]
  )


def tug_of_war(inputs: inputs_lib.Inputs) -> float:
  """On the forget, the retain and all test images."""
  assert inputs.retrained is not None
  models = inputs.model.logits, inputs.retrained.logits
  # Only what both models have: else the difference is that of the images.
  test = [
    name
    for name in inputs_lib.SPLITS[2:]
    if all(name in logits for logits in models)
  ]
  figures = [
    (
      _accuracy(logits, inputs.labels, "train_forget"),
      _accuracy(logits, inputs.labels, "train_retain"),
      _accuracy(logits, inputs.labels, *test),
    )
    for logits in models
  ]
  return distances.tug_of_war(*figures)


def _accuracy(
  logits: Mapping[str, np.ndarray],
  labels: Mapping[str, np.ndarray],
  *splits: str,
) -> float:
  values = np.concatenate([logits[name] for name in splits])
  right = np.concatenate([labels[name] for name in splits])
  common.check_logits(values, right)
  return float(np.mean(np.argmax(values, -1) == right))


def weight_distance(inputs: inputs_lib.Inputs) -> float:
  """Distance to the retrained parameters."""
  return distances.weight_distance(
    inputs_lib.get(inputs, "model.params"),
    inputs_lib.get(inputs, "retrained.params"),
  )


def run_time_efficiency(inputs: inputs_lib.Inputs) -> float:
  """Time of retraining over time of unlearning."""
  return distances.run_time_efficiency(
    inputs_lib.get(inputs, "model.seconds"),
    inputs_lib.get(inputs, "retrained.seconds"),
  )


def _original_accuracy(inputs: inputs_lib.Inputs) -> float:
  assert inputs.original is not None
  value = _accuracy(inputs.original.logits, inputs.labels, "train_forget")
  if value == 0:
    raise common.NotAvailableError(
      "the original model has no forget image right, so nothing can come back"
    )
  return value


def relearn_steps(inputs: inputs_lib.Inputs) -> float:
  """Steps to the original accuracy on the forget set."""
  return distances.relearn_steps(
    inputs_lib.get(inputs, "model.relearn_accuracy"), _original_accuracy(inputs)
  )


def anamnesis_index(inputs: inputs_lib.Inputs) -> float:
  """Steps to relearn over those of the retrained model."""
  return distances.anamnesis_index(
    inputs_lib.get(inputs, "model.relearn_accuracy"),
    inputs_lib.get(inputs, "retrained.relearn_accuracy"),
    _original_accuracy(inputs),
  )


def probe(inputs: inputs_lib.Inputs) -> dict[str, Any]:
  """Reads the classes of the forget set's test images from the features."""
  features = inputs.model.features
  assert features is not None
  parts = inputs_lib.SPLITS[2:]
  labels = np.concatenate([inputs.labels[name] for name in parts])
  found = distances.linear_probe(
    np.concatenate([features[name] for name in parts]), labels, seed=inputs.seed
  )
  is_forget = found.rows < len(inputs.labels["test_forget"])
  if not is_forget.any():
    raise common.NotAvailableError("no forget image could be probed")
  is_right = found.predictions == labels[found.rows]
  return {
    "value": float(is_right[is_forget].mean()),
    "count": int(is_forget.sum()),
    "accuracy": found.accuracy,
  }


def _sides(inputs: inputs_lib.Inputs) -> tuple[tuple[np.ndarray, ...], str]:
  """Members and non-members, and the split that the latter are from.

  A request that matches no test image (single ids, a random part) leaves the
  test images of the same classes, which are all in `test_retain`. Where the
  request chose a device or a patient, these differ from it in more than
  membership, so the result names the split.
  """
  logits, labels = inputs.model.logits, inputs.labels
  has_test = len(labels.get("test_forget", ())) and "test_forget" in logits
  split = "test_forget" if has_test else "test_retain"
  if split not in logits:
    raise common.NotAvailableError("needs model.logits.test_forget")
  return (
    logits["train_forget"],
    labels["train_forget"],
    logits[split],
    labels[split],
  ), split


def attack(
  fn: Callable[..., membership.Attack],
  pick: Callable[[membership.Attack], float | None],
  inputs: inputs_lib.Inputs,
  *,
  has_curve: bool = False,
) -> dict[str, Any]:
  """A membership attack, with one of its figures as the value."""
  arrays, split = _sides(inputs)
  found = fn(*arrays, seed=inputs.seed)
  result: dict[str, Any] = {
    "value": pick(found),
    "accuracy": found.accuracy,
    "auc": found.auc,
    "num_samples": found.num_samples,
    "non_members": split,
  }
  if result["value"] is None:
    result["reason"] = (
      f"{found.num_samples} non-members are too few for this false positive"
      " rate"
    )
  if found.tpr is not None:
    result["tpr"] = found.tpr
  if has_curve and found.roc is not None:
    result["roc"] = {
      "fpr": found.roc[0].tolist(),
      "tpr": found.roc[1].tolist(),
    }
  return result


def mean_of(
  fn: Callable[[np.ndarray, np.ndarray], list[float | None]],
  split: str,
  inputs: inputs_lib.Inputs,
) -> dict[str, Any]:
  """A figure of each class, and its mean over those that have one."""
  per_class = fn(inputs.model.logits[split], inputs.labels[split])
  known = [value for value in per_class if value is not None]
  mean = float(np.mean(known)) if known else None
  return {"value": mean, "per_class": per_class}


def auroc(split: str, inputs: inputs_lib.Inputs) -> dict[str, Any]:
  """The mean area, and that of each class."""
  area = clinical.auroc(inputs.model.logits[split], inputs.labels[split])
  return {"value": area.macro, "per_class": area.per_class}


def calibration_error(split: str, inputs: inputs_lib.Inputs) -> float:
  """ECE on one split."""
  return clinical.calibration_error(
    inputs.model.logits[split], inputs.labels[split]
  )


def worst_subgroup(split: str, inputs: inputs_lib.Inputs) -> dict[str, Any]:
  """The group with the lowest accuracy on one split."""
  assert inputs.groups is not None
  worst = clinical.worst_subgroup(
    inputs.model.logits[split], inputs.labels[split], inputs.groups[split]
  )
  return {"value": worst.accuracy, **worst._asdict()}


def flips(split: str, inputs: inputs_lib.Inputs) -> dict[str, Any]:
  """Share of the right answers that turned wrong, and which."""
  assert inputs.original is not None
  found = clinical.flips(
    inputs.model.logits[split],
    inputs.original.logits[split],
    inputs.labels[split],
  )
  if not found.num_right:
    raise common.NotAvailableError("no image was right before")
  return {
    "value": len(found.harmed_rows) / found.num_right,
    "num_right": found.num_right,
    "num_harmed": len(found.harmed_rows),
    "num_helped": len(found.helped_rows),
    # The first of them: a destroyed model would list the whole data set.
    **{
      name: getattr(found, name)[:_MAX_ROWS_LISTED].tolist()
      for name in found._fields
      if name.startswith(("harmed_", "helped_"))
    },
  }


def false_negatives(split: str, inputs: inputs_lib.Inputs) -> dict[str, Any]:
  """The class whose rate of missed images grew most."""
  assert inputs.original is not None
  counts = clinical.false_negatives(
    inputs.model.logits[split],
    inputs.original.logits[split],
    inputs.labels[split],
  )
  growth = [
    (each.after - each.before) / each.num_images
    for each in counts
    if each.num_images
  ]
  return {"value": max(growth), "per_class": [x._asdict() for x in counts]}
