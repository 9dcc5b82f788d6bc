"""What went wrong in an unlearning run, and which setting to move.

`diagnose` reads accuracies, relabelling and history, and answers with findings:
what is seen, on which evidence, and the setting to move. It knows nothing that
is not in its arguments: rules whose figures are missing stay silent.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from psg_jax import checks, unlearning
from psg_jax.metrics import common

FINE = "fine"
NOTHING = "nothing was forgotten"
PARTLY = "partly forgotten"
TOO_MUCH = "more was forgotten than should be"
DESTROYED = "everything was destroyed"
DAMAGED = "retain damaged"
CANNOT_TELL = "accuracy cannot tell"
SCOPES = ("class", "samples")

_SPLITS = ("train_forget", "train_retain", "test_forget", "test_retain")
# Accuracies this near to their target have reached it.
_TOLERANCE = 0.05
# Less than this share of the way to the target is nothing.
_NOTHING_SHARE = 0.2
# A model that keeps less than this share of its lead over chance is destroyed.
_DESTROYED_SHARE = 0.5
_CROSSED_SHARE = 0.9
_ONE_CLASS_SHARE = 0.6
_GOOD_AGREEMENT = 0.5
_LEARNED_SHARE = 0.9
# A loss that has lost less than this share is not falling.
_FALLING_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class RelabellingStatistics:
  """What the search did to the labels of the forget set.

  Attributes:
    num_images: Images of the forget set.
    crossed_share: Share that crossed the boundary, in [0, 1], ideally 1.
    label_counts: Images of each new label, `K`.
    largest_share: Share of the most frequent new label, in [0, 1].
    agreement: Share of new labels that the retrained model predicts, in [0, 1],
      ideally what another retrained model has; None without one.
  """

  num_images: int
  crossed_share: float
  label_counts: tuple[int, ...]
  largest_share: float
  agreement: float | None = None

  def as_dict(self) -> dict[str, Any]:
    """Returns a dictionary for JSON."""
    return {
      **dataclasses.asdict(self),
      "label_counts": list(self.label_counts),
    }


def summarise_relabelling(
  relabelling: unlearning.Relabelling,
  retrained_logits: np.ndarray | None = None,
) -> RelabellingStatistics:
  """Counts what the search found.

  Args:
    relabelling: Of `unlearning.relabel`, or `UnlearnOutput.relabelling`.
    retrained_logits: float `[N, K]`, a retrained model's on the forget set, or
      None.

  Returns:
    The statistics.

  Raises:
    ValueError: If there are no images or the shapes differ.
  """
  labels = np.asarray(relabelling.labels)
  if not len(labels):
    raise ValueError("relabelling must not be empty, got 0 images")
  shape = np.shape(relabelling.logits)
  counts = np.bincount(labels, minlength=shape[-1])
  agreement = None
  if retrained_logits is not None:
    if np.shape(retrained_logits) != shape:
      raise ValueError(
        f"retrained_logits must be {list(shape)}, got"
        f" {list(np.shape(retrained_logits))}"
      )
    agreement = float(np.mean(common.is_right(retrained_logits, labels)))
  return RelabellingStatistics(
    num_images=len(labels),
    crossed_share=float(np.mean(relabelling.is_crossed)),
    label_counts=tuple(int(count) for count in counts),
    largest_share=float(counts.max() / len(labels)),
    agreement=agreement,
  )


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that is seen, and what to do about it.

  Attributes:
    verdict: What is seen, one of this module's verdicts.
    rule: The rule's name.
    evidence: The figures behind it.
    setting: The option of `unlearning.unlearn` to move; None where there is
      nothing to move.
    advice: How to move it.
  """

  verdict: str
  rule: str
  evidence: str
  setting: str | None
  advice: str

  def __str__(self) -> str:
    return f"{self.verdict}: {self.evidence}; {self.advice}"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """The findings, the most serious verdict first and, of one, the best advice.

  Attributes:
    findings: One or more.
  """

  findings: tuple[Finding, ...]

  @property
  def verdict(self) -> str:
    """The first finding's."""
    return self.findings[0].verdict

  @property
  def setting(self) -> str | None:
    """The setting to move first."""
    return self.findings[0].setting

  def as_dict(self) -> dict[str, Any]:
    """Returns a dictionary for JSON."""
    return {
      "verdict": self.verdict,
      "findings": [dataclasses.asdict(finding) for finding in self.findings],
    }

  def __str__(self) -> str:
    return "\n".join(str(finding) for finding in self.findings)


class _Side(NamedTuple):
  """Accuracies on forget or on retained images."""

  split: str
  before: float
  now: float
  target: float


class _Case(NamedTuple):
  """All that the rules look at.

  What is unknown is NaN, which meets no comparison: its rules stay silent.

  Attributes:
    forget: On the forget set.
    retain: On retained images.
    chance: The accuracy of chance.
    options: Those of `unlearning.unlearn`, with the defaults.
    weight: Of the retained images, beside the forget images' 1.
    in_steps: How many steps the search took, in words.
    crossed: Share of the forget images that crossed the boundary.
    num_labels: Classes.
    largest: Share of the most frequent new label.
    largest_class: That label.
    agreement: Share of new labels that the retrained model predicts.
    learned: Share of the forget images that had their new label in training.
    losses: The first and the last on forget images.
    retain_losses: The first and the last on retained images.
  """

  forget: _Side
  retain: _Side
  chance: float
  options: Mapping[str, Any]
  weight: float
  in_steps: str
  crossed: float = math.nan
  num_labels: int = 0
  largest: float = math.nan
  largest_class: int = 0
  agreement: float = math.nan
  learned: float = math.nan
  losses: tuple[float, float] = (math.nan, math.nan)
  retain_losses: tuple[float, float] = (math.nan, math.nan)


class Rule(NamedTuple):
  """A cause of some verdicts.

  Attributes:
    name: What the cause is.
    verdicts: Those it can explain.
    is_met: Whether it holds.
    evidence: The figures behind it, with fields of the case.
    setting: The option to move.
    advice: How.
  """

  name: str
  verdicts: tuple[str, ...]
  is_met: Callable[[_Case], bool]
  evidence: str
  setting: str
  advice: str


def _always(case: _Case) -> bool:
  del case
  return True


_TOO_LITTLE = (NOTHING, PARTLY)
_HARM = (DESTROYED, DAMAGED)
_TARGETS = (
  "{0.forget.split} accuracy {0.forget.now:.3f} (target"
  " {0.forget.target:.3f}), {0.retain.split} accuracy {0.retain.now:.3f}"
  " (target {0.retain.target:.3f})"
)
_CROSSED = "{0.crossed:.0%} of the forget images crossed the boundary"
_LEARNED = "{0.learned:.0%} of the forget images had their new label"

RULES: tuple[Rule, ...] = (
  Rule(
    "raw logits as targets",
    (*_TOO_LITTLE, *_HARM),
    lambda case: case.options.get("labels") == "raw_logits",
    "labels='raw_logits' are no probabilities",
    *("labels", "use labels='hard' or 'soft_other'"),
  ),
  Rule(
    "few crossed within the ball",
    _TOO_LITTLE,
    lambda case: (
      case.crossed < _CROSSED_SHARE
      and case.options.get("max_distance") is not None
    ),
    _CROSSED + " within max_distance={0.options[max_distance]:g}",
    *("max_distance", "raise max_distance, or set it to None"),
  ),
  Rule(
    "few crossed",
    _TOO_LITTLE,
    lambda case: (
      case.crossed < _CROSSED_SHARE and case.options.get("max_distance") is None
    ),
    _CROSSED + "{0.in_steps}",
    *("num_steps", "raise num_steps, or max_distance where there is one"),
  ),
  Rule(
    "targets not learned, still learning",
    _TOO_LITTLE,
    lambda case: (
      case.learned < _LEARNED_SHARE
      and case.losses[1] < (1 - _FALLING_SHARE) * case.losses[0]
    ),
    f"in the last pass {_LEARNED}, and the loss was still falling",
    *("num_epochs", "raise num_epochs"),
  ),
  Rule(
    "targets not learned",
    _TOO_LITTLE,
    lambda case: (
      case.learned < _LEARNED_SHARE
      and case.losses[1] >= (1 - _FALLING_SHARE) * case.losses[0]
    ),
    f"in the last pass {_LEARNED}, and the loss did not fall",
    *("optimizer", "raise the learning rate, tenfold to begin with"),
  ),
  Rule(
    "retained images outweigh",
    _TOO_LITTLE,
    lambda case: case.weight > 1,
    "retain_weight={0.weight:g}",
    *("retain_weight", "lower retain_weight to 1"),
  ),
  Rule(
    "old class in the targets",
    _TOO_LITTLE,
    lambda case: case.options.get("labels") == "soft",
    "labels='soft' leave probability on the old class",
    *("labels", "use labels='soft_other' or 'hard'"),
  ),
  Rule(
    "statistics of the minibatch",
    _TOO_LITTLE,
    lambda case: (
      case.learned >= _LEARNED_SHARE
      and case.options.get("batch_stats") == "update"
    ),
    f"in training {_LEARNED}, with BatchNorm on minibatches, and in inference"
    " they have not",
    "batch_stats",
    "use batch_stats='frozen', so that training sees what inference sees",
  ),
  Rule(
    "statistics of forget images",
    (*_TOO_LITTLE, *_HARM),
    lambda case: (
      case.weight == 0 and case.options.get("batch_stats") == "update"
    ),
    "BatchNorm adapted to minibatches of forget images (retain_weight=0)",
    *("batch_stats", "use batch_stats='frozen', or retain_weight=1"),
  ),
  Rule(
    "retained images hardly used",
    _HARM,
    lambda case: case.weight < 1,
    "retained images have weight {0.weight:g} beside the forget images' 1",
    *("retain_weight", "raise retain_weight to 1"),
  ),
  Rule(
    "one class takes all",
    (*_HARM, TOO_MUCH),
    # Unless the retrained model would give most images to this class.
    lambda case: (
      case.num_labels > 2
      and case.largest >= _ONE_CLASS_SHARE
      and not case.agreement >= _GOOD_AGREEMENT
    ),
    "{0.largest:.0%} of the new labels are class {0.largest_class}",
    "step_size",
    "lower step_size, so that the search stops at a nearer class",
  ),
  Rule(
    "labels unlike the retrained model's",
    (*_HARM, TOO_MUCH),
    lambda case: case.agreement < _GOOD_AGREEMENT,
    "{0.agreement:.0%} of the new labels are what the retrained model predicts",
    *("step_size", "lower step_size and raise num_steps"),
  ),
  Rule(
    "unstable",
    _HARM,
    lambda case: (
      case.retain_losses[1] > (1 + _FALLING_SHARE) * case.retain_losses[0]
    ),
    "the loss on retained images rose from {0.retain_losses[0]:.2f} to"
    " {0.retain_losses[1]:.2f}",
    *("optimizer", "lower the learning rate, tenfold to begin with"),
  ),
  Rule(
    *("too little training", _TOO_LITTLE, _always, _TARGETS, "num_epochs"),
    "raise num_epochs or the learning rate",
  ),
  Rule(
    *("too much training", _HARM, _always, _TARGETS, "optimizer"),
    "lower the learning rate, or num_epochs",
  ),
  Rule(
    *("pushed too far", (TOO_MUCH,), _always, _TARGETS, "num_epochs"),
    "lower num_epochs, or use labels='soft_other'",
  ),
)
"""In the order of how sure and how cheap the remedy is.

The last of each verdict always holds, and speaks where no other does.
"""


def diagnose(
  original: Mapping[str, float | None],
  unlearned: Mapping[str, float | None],
  *,
  retrained: Mapping[str, float | None] | None = None,
  relabelling: RelabellingStatistics | None = None,
  history: Sequence[Mapping[str, Any]] = (),
  options: Mapping[str, Any] | None = None,
  scope: str = "class",
  num_classes: int = 10,
) -> Diagnosis:
  """Says what an unlearning run did wrong, and which setting to move.

  With `a` the accuracy on the forget set (`train_forget`, or `test_forget`) and
  `a*` its target, the retrained model's, the way that was gone is

      share = (a_original - a_unlearned) / (a_original - a*)

  ideally 1: nothing was forgotten below 0.2, the target is reached within 0.05.
  Without a retrained model `a*` is 0 where whole classes are forgotten, and
  else the original's accuracy on images it never saw, of those to forget
  (`test_forget`) if there are any. Retained images
  (`test_retain`, or `train_retain`) may lose 0.05 against the retrained or else
  the original model; where less than half of the lead over chance is left,
  everything was destroyed. These limits are rules of thumb: for a verdict with
  uncertainty see `verification.compare`.

  Args:
    original: Accuracy in [0, 1] by split (`train_forget`, `train_retain`,
      `test_forget`, `test_retain`); None or left out where unknown.
    unlearned: Likewise.
    retrained: Likewise, or None.
    relabelling: Of `summarise_relabelling`, or None.
    history: `UnlearnOutput.history`, one record a pass.
    options: The options of `unlearning.unlearn`, those left out counting as its
      defaults; None for another method, of which nothing is known.
    scope: `"class"`: all images of some classes are forgotten; `"samples"`:
      only some images of a class, such as a device's or a patient's.
    num_classes: `K`, 2 or more, for the accuracy of chance, `1 / K`.

  Returns:
    The findings, the worst verdict first; `"fine"` if there is none.

  Raises:
    ValueError: If accuracies are missing or out of range, or an option is
      unknown.
  """
  checks.one_of("scope", scope, SCOPES)
  checks.integer("num_classes", num_classes, at_least=2)
  sides = {"original": original, "unlearned": unlearned}
  if retrained is not None:
    sides["retrained"] = retrained
  for name, figures in sides.items():
    _check_figures(name, figures)
  forget = _first_known(sides, ("train_forget", "test_forget"))
  retain = _first_known(sides, ("test_retain", "train_retain"))
  target: float | None = 0.0
  if retrained is not None:
    target = retrained[forget]
  elif scope == "samples":
    target = original.get("test_forget")
    target = original[retain] if target is None else target
  kept = (original if retrained is None else retrained)[retain]
  known = {} if options is None else _with_defaults(options)
  weight, steps = known.get("retain_weight"), known.get("num_steps")
  case = _Case(
    _Side(forget, *_known(original[forget], unlearned[forget], target)),
    _Side(retain, *_known(original[retain], unlearned[retain], kept)),
    1 / num_classes,
    known,
    math.nan if weight is None else weight,
    "" if steps is None else f" in num_steps={steps}",
    **_read_relabelling(relabelling),
    **_read_history(history),
  )
  verdicts = _verdicts(case)
  return Diagnosis(tuple(x for y in verdicts for x in _findings(y, case)))


def _known(*values: float | None) -> tuple[float, ...]:
  # `_first_known` chooses splits that all have.
  return tuple(value for value in values if value is not None)


def _read_relabelling(counts: RelabellingStatistics | None) -> dict[str, Any]:
  if counts is None:
    return {}
  return {
    "crossed": counts.crossed_share,
    "num_labels": len(counts.label_counts),
    "largest": counts.largest_share,
    "largest_class": int(np.argmax(counts.label_counts)),
    "agreement": math.nan if counts.agreement is None else counts.agreement,
  }


def _read_history(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Older histories have the share learned as `forget_accuracy`."""
  figures: dict[str, Any] = {}
  if not history:
    return figures
  first, last = history[0], history[-1]
  learned = last.get("label_accuracy", last.get("forget_accuracy"))
  if learned is not None:
    figures["learned"] = learned
  if "forget_loss" in first:
    start = (first.get("forget_step_losses") or [first["forget_loss"]])[0]
    figures["losses"] = start, last["forget_loss"]
  if "retain_loss" in first and len(history) > 1:
    figures["retain_losses"] = first["retain_loss"], last["retain_loss"]
  return figures


def _verdicts(case: _Case) -> list[str]:
  """Reads the accuracies alone; the worst first."""
  forget, retain = case.forget, case.retain
  lead, kept = retain.before - case.chance, retain.now - case.chance
  if lead > 0 and kept < _DESTROYED_SHARE * lead:
    # What a destroyed model does on the forget set says nothing.
    return [DESTROYED]
  verdicts = []
  way = forget.before - forget.target
  missing = forget.now - forget.target
  if missing > _TOLERANCE:
    has_moved = forget.before - forget.now >= _NOTHING_SHARE * way
    verdicts.append(PARTLY if has_moved else NOTHING)
  elif missing < -_TOLERANCE:
    verdicts.append(TOO_MUCH)
  elif way <= _TOLERANCE:
    verdicts.append(CANNOT_TELL)
  if retain.target - retain.now > _TOLERANCE:
    verdicts.append(DAMAGED)
  if verdicts[:1] == [CANNOT_TELL]:
    verdicts.reverse()
  return verdicts or [FINE]


def _findings(verdict: str, case: _Case) -> list[Finding]:
  """What explains a verdict, the best advice first, with the targets."""
  targets = _TARGETS.format(case)
  if verdict == FINE:
    return [Finding(FINE, "targets reached", targets, None, "nothing to move")]
  if verdict == CANNOT_TELL:
    evidence = (
      f"{case.forget.split} accuracy was {case.forget.before:.3f} before"
      " unlearning, and a model that never saw these images has"
      f" {case.forget.target:.3f}"
    )
    advice = "judge by agreement, divergence and membership inference"
    cause = "the original is near the target"
    return [Finding(verdict, cause, evidence, None, advice)]
  rules = [x for x in RULES if verdict in x.verdicts and x.is_met(case)]
  *causes, last = rules
  findings: list[Finding] = []
  for rule in causes or [last]:
    evidence = rule.evidence.format(case)
    if causes and not findings:
      evidence = f"{targets}; {evidence}"
    findings.append(
      Finding(verdict, rule.name, evidence, rule.setting, rule.advice)
    )
  return findings


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
  """Fills the options up with the defaults of `unlearning.unlearn`."""
  defaults = unlearning.defaults()
  for name in options:
    checks.one_of("the name in options", name, defaults)
  return {**defaults, **options}


def _first_known(
  sides: Mapping[str, Mapping[str, float | None]], splits: tuple[str, ...]
) -> str:
  for split in splits:
    if all(figures.get(split) is not None for figures in sides.values()):
      return split
  raise ValueError(
    f"{' and '.join(sides)} must all have the accuracy of {' or '.join(splits)}"
  )


def _check_figures(name: str, figures: Mapping[str, float | None]) -> None:
  for split, value in figures.items():
    checks.one_of(f"the split in {name}", split, (*_SPLITS, "test"))
    if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
      raise ValueError(f"{name}[{split!r}] must be in [0, 1], got {value}")
