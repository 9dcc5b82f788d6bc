"""Traces: what a model shows of the forget set that retrained ones do not.

Each function makes one check for `model_checks`. `CHECKS` need logits alone:
where forget images go, whose side the model is on, and what it keeps of
memorised images. `probe` and `relearning` need features and training, which the
caller provides in `metrics.Outputs`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psg_jax import checks, metrics, model_checks
from psg_jax.metrics import common

RESOLUTION = 0.01
"""Least deviation of references that is believed, in confidence or in place.

Counts have that of one image. References that are sure to nine digits differ
by less, and so any other model would be rejected.
"""
_MIN_IMAGES = 20
_FORGET = ("train_forget", "test_forget")


def _logits(
  split: str, outputs: metrics.Outputs, labels: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Logits of a split and its labels, checked."""
  if split not in outputs.logits:
    raise metrics.NotAvailableError(f"needs logits of {split}")
  logits = np.asarray(outputs.logits[split])
  common.check_logits(logits, labels[split])
  return logits, labels[split]


def destination(split: str) -> model_checks.Check:
  """Makes a check of where the images of a split go.

  The statistic is the total variation `Σ |n - m| / (2 N)` between the model's
  counts `n` of predictions, by true class and predicted class, and the mean
  counts `m` of the references: the share of images that would have to go
  elsewhere. Range: [0, 1].

  Args:
    split: Of the forget set.

  References:
    Levin and Peres, Markov Chains and Mixing Times, 2017, chapter 4.
  """

  def read(
    outputs: metrics.Outputs, labels: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    logits, truth = _logits(split, outputs, labels)
    counts = np.zeros((logits.shape[1],) * 2)
    np.add.at(counts, (truth, logits.argmax(-1)), 1)
    return counts

  def statistic(model: Any, references: Sequence[Any], original: Any) -> float:
    del original
    difference = np.abs(model - np.mean(references, 0)).sum()
    return float(difference / (2 * model.sum()))

  def resolution(references: Sequence[Any], original: Any) -> float:
    del original
    return float(1 / references[0].sum())

  title = "Predictions go elsewhere"
  return model_checks.Check(
    *("destination", split, title, read, statistic, resolution),
    source="Levin and Peres, 2017",
  )


def nearness(split: str) -> model_checks.Check:
  """Makes a check of whose side a model is on.

  The statistic is its place between both kinds,

      KL(references ‖ model) / (KL(references ‖ model) + KL(original ‖ model))

  with the mean divergence from the references, in nats. 0: a retrained model;
  1: the original; above 1/2 it is nearer to the original. On retain images the
  original may be as near to a retrained model as another one is; a model that
  is nearer to it there has come from it, which is no trace of forget images.
  The place has a long tail: of simulated retrained models up to twice `LEVEL`
  are rejected. Range: [0, 1].

  Args:
    split: Of the forget or the retain set.

  References:
    Kullback and Leibler, On Information and Sufficiency, 1951.
  """

  def read(
    outputs: metrics.Outputs, labels: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    return common.log_probabilities(_logits(split, outputs, labels)[0])

  def statistic(model: Any, references: Sequence[Any], original: Any) -> float:
    near = float(np.mean([_divergence(x, model) for x in references]))
    far = _divergence(original, model)
    if near + far <= 0:
      raise metrics.NotAvailableError(
        "the original model does not differ from the retrained ones"
      )
    return near / (near + far)

  return model_checks.Check(
    *("nearness", split, "Between retrained (0) and original (1)"),
    *(read, statistic, _resolution),
    is_position=True,
    needs_original=True,
    source="Kullback and Leibler, 1951",
  )


def _resolution(references: Sequence[Any], original: Any) -> float:
  del references, original
  return RESOLUTION


def _divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
  """Mean `KL(p ‖ q)` in nats, at least 0."""
  return max(0.0, float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))))


def memorised(*, is_control: bool = False) -> model_checks.Check:
  """Makes a check of the training images that the original memorised most.

  The memorisation of an image is the original's confidence in its true class
  less the references' mean. The statistic is how much more confident in it the
  model is than the references, on average over the quarter of the forget images
  with the most memorisation; for the control, with the least. A model that is
  rejected there too differs in level, not by what was memorised.
  Range: [-1, 1].

  Args:
    is_control: Whether to take the quarter with the least.

  References:
    Feldman and Zhang, What Neural Networks Memorize and Why: Discovering the
    Long Tail via Influence Estimation, 2020 (memorisation).
    Yeom et al., Privacy Risk in Machine Learning, 2018 (attack by the loss).
  """
  split = "train_forget"

  def read(
    outputs: metrics.Outputs, labels: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    logits, truth = _logits(split, outputs, labels)
    if len(truth) < _MIN_IMAGES:
      raise metrics.NotAvailableError(
        f"{len(truth)} images, and {_MIN_IMAGES} are needed"
      )
    return np.exp(-metrics.label_losses(logits, truth))

  def statistic(model: Any, references: Sequence[Any], original: Any) -> float:
    expected = np.mean(references, 0)
    order = np.argsort(original - expected, kind="stable")
    num = len(order) // 4
    rows = order[:num] if is_control else order[-num:]
    return float(np.mean((model - expected)[rows]))

  name = "least_memorised" if is_control else "most_memorised"
  words = "least memorised (control)" if is_control else "most memorised"
  return model_checks.Check(
    *(name, split, f"Excess confidence, {words}"),
    *(read, statistic, _resolution),
    direction="both",
    needs_original=True,
    source="Feldman and Zhang, 2020",
  )


def probe(*, seed: int = 0) -> model_checks.Check:
  """Makes a check of whether features tell the forget set from the rest.

  The statistic is how much better a linear probe of the model's features tells
  test images of the forget set from other test images than one of the
  references' does on average: the difference of balanced accuracies, see
  `metrics.linear_probe`. Range: [-1, 1]. `Outputs.features` must have
  `test_forget` and `test_retain`.

  Args:
    seed: Of the probe.

  References:
    Alain and Bengio, Understanding Intermediate Layers Using Linear Classifier
    Probes, 2016.
  """
  splits = ("test_forget", "test_retain")

  def read(
    outputs: metrics.Outputs, labels: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    features = outputs.features or {}
    for split in splits:
      if not len(features.get(split, ())):
        raise metrics.NotAvailableError(f"needs features of {split}")
    parts = [features[split] for split in splits]
    is_forget = np.repeat([1, 0], [len(part) for part in parts])
    probe = metrics.linear_probe(np.concatenate(parts), is_forget, seed=seed)
    truth = is_forget[probe.rows]
    recalls = [(probe.predictions == i)[truth == i].mean() for i in (0, 1)]
    return np.array([np.mean(recalls), truth.sum()])

  return model_checks.Check(
    *("probe", "test_forget", "Linear probe of the features", read),
    *(_excess, lambda references, original: float(1 / references[0][1])),
    direction="both",
    source="Alain and Bengio, 2016",
  )


def _excess(model: Any, references: Sequence[Any], original: Any) -> float:
  """A figure less the mean of the references'."""
  del original
  return float(model[0] - np.mean([x[0] for x in references]))


def relearning(target_accuracy: float) -> model_checks.Check:
  """Makes a check of how soon the forget set is learnt again.

  With the steps `t` of `metrics.relearn_steps`, the statistic is the place

      (t_retrained - t_model) / (t_retrained - t_original)

  with the mean over references: 0 as soon as a model that never saw the forget
  set, 1 as soon as the original, below 0 later than either. All models, the
  original too, must have `Outputs.relearn_accuracy` from the same training.

  Args:
    target_accuracy: On the forget set, at which it is known again, in (0, 1]:
      that of `relearning.relearn`, mostly the original's less a margin, which
      the original has before the first step.

  Raises:
    ValueError: If the accuracy is out of its range.

  References:
    Tarun et al., Fast Yet Effective Machine Unlearning, 2023 (relearn time).
    Chundawat et al., Zero-Shot Machine Unlearning, 2023 (anamnesis index).
  """
  checks.number("target_accuracy", target_accuracy, above=0, at_most=1)

  def read(outputs: metrics.Outputs, labels: Mapping[str, np.ndarray]) -> float:
    del labels
    if outputs.relearn_accuracy is None:
      raise metrics.NotAvailableError("needs relearn_accuracy")
    return float(
      metrics.relearn_steps(outputs.relearn_accuracy, target_accuracy, margin=0)
    )

  def distance(references: Sequence[Any], original: Any) -> float:
    between = float(np.mean(references)) - original
    if between <= 0:
      raise metrics.NotAvailableError(
        "the original model does not learn the forget set sooner than the"
        " retrained ones"
      )
    return between

  def statistic(model: Any, references: Sequence[Any], original: Any) -> float:
    between = distance(references, original)
    return (float(np.mean(references)) - model) / between

  return model_checks.Check(
    *("relearning", "train_forget", "Relearned: retrained (0), original (1)"),
    *(read, statistic, lambda *readings: 1 / distance(*readings)),
    direction="both",
    is_position=True,
    needs_original=True,
    source="Tarun et al., 2023",
  )


CHECKS = (
  *map(destination, _FORGET),
  *map(nearness, (*_FORGET, "test_retain")),
  memorised(),
  memorised(is_control=True),
)
"""The checks that need logits alone."""
