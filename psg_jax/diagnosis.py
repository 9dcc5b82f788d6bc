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
    agreement = float(np.mean(np.argmax(retrained_logits, -1) == labels))
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
      "findings": [dataclasses.asdict(each) for each in self.findings],
    }

  def __str__(self) -> str:
    return "\n".join(str(each) for each in self.findings)


@dataclasses.dataclass(frozen=True)
class _Case:
  """All that the rules look at."""

  original: Mapping[str, float | None]
  unlearned: Mapping[str, float | None]
  forget_split: str
  forget_target: float
  retain_split: str
  retain_target: float
  chance: float
  relabelling: RelabellingStatistics | None
  history: Sequence[Mapping[str, Any]]
  options: Mapping[str, Any]

  def option(self, name: str) -> Any:
    return self.options.get(name)

  def last_label_accuracy(self) -> float | None:
    """Share of new labels learned; `forget_accuracy` in older histories."""
    last = self.history[-1] if self.history else {}
    found: float | None = last.get(
      "label_accuracy", last.get("forget_accuracy")
    )
    return found

  def has_loss_fallen(self, name: str) -> bool | None:
    """Whether a loss went down over the passes; None where unknown."""
    if not self.history or name not in self.history[0]:
      return None
    steps = self.history[0].get(f"{name.removesuffix('_loss')}_step_losses")
    first = steps[0] if steps else self.history[0][name]
    return bool(self.history[-1][name] < (1 - _FALLING_SHARE) * first)

  @property
  def forget_accuracy(self) -> float:
    return _known(self.unlearned, self.forget_split)

  @property
  def retain_accuracy(self) -> float:
    return _known(self.unlearned, self.retain_split)


def _known(figures: Mapping[str, float | None], split: str) -> float:
  value = figures.get(split)
  assert value is not None  # `diagnose` chooses splits that all have.
  return value


class _Rule(NamedTuple):
  """A cause of some verdicts.

  Attributes:
    name: What the cause is.
    verdicts: Those it can explain.
    evidence: Gives the figures, or None where the rule does not hold.
    setting: The option to move.
    advice: How.
  """

  name: str
  verdicts: tuple[str, ...]
  evidence: Callable[[_Case], str | None]
  setting: str
  advice: str


def _few_crossed(case: _Case) -> str | None:
  found = case.relabelling
  if found is None or found.crossed_share >= _CROSSED_SHARE:
    return None
  return f"{found.crossed_share:.0%} of the forget images crossed the boundary"


def _few_crossed_in_ball(case: _Case) -> str | None:
  radius = case.option("max_distance")
  evidence = _few_crossed(case)
  if evidence is None or radius is None:
    return None
  return f"{evidence} within max_distance={radius:g}"


def _few_crossed_anywhere(case: _Case) -> str | None:
  if case.option("max_distance") is not None:
    return None
  evidence, steps = _few_crossed(case), case.option("num_steps")
  if evidence is None or steps is None:
    return evidence
  return f"{evidence} in num_steps={steps}"


def _one_class(case: _Case) -> str | None:
  found = case.relabelling
  if found is None or len(found.label_counts) < 3:
    return None
  is_right = found.agreement is not None and found.agreement >= _GOOD_AGREEMENT
  if found.largest_share < _ONE_CLASS_SHARE or is_right:
    return None
  largest = int(np.argmax(found.label_counts))
  return f"{found.largest_share:.0%} of the new labels are class {largest}"


def _wrong_labels(case: _Case) -> str | None:
  found = case.relabelling
  if found is None or found.agreement is None:
    return None
  if found.agreement >= _GOOD_AGREEMENT:
    return None
  return (
    f"{found.agreement:.0%} of the new labels are what the retrained model"
    " predicts"
  )


def _raw_logits(case: _Case) -> str | None:
  used = case.option("labels") == "raw_logits"
  return "labels='raw_logits' are no probabilities" if used else None


def _old_class_taught(case: _Case) -> str | None:
  if case.option("labels") != "soft":
    return None
  return "labels='soft' leave probability on the old class"


def _not_learned(case: _Case, *, has_fallen: bool) -> str | None:
  share = case.last_label_accuracy()
  if share is None or share >= _LEARNED_SHARE:
    return None
  if case.has_loss_fallen("forget_loss") is not has_fallen:
    return None
  how = "was still falling" if has_fallen else "did not fall"
  return (
    f"in the last pass {share:.0%} of the forget images had their new label,"
    f" and the loss {how}"
  )


def _statistics_moved(case: _Case) -> str | None:
  share = case.last_label_accuracy()
  if share is None or share < _LEARNED_SHARE:
    return None
  if case.option("batch_stats") != "update":
    return None
  return (
    f"in training {share:.0%} of the forget images had their new label, with"
    " BatchNorm on minibatches, and in inference they have not"
  )


def _retain_outweighs(case: _Case) -> str | None:
  weight = case.option("retain_weight")
  return f"retain_weight={weight:g}" if weight and weight > 1 else None


def _forget_only_statistics(case: _Case) -> str | None:
  if case.option("retain_weight") != 0:
    return None
  if case.option("batch_stats") != "update":
    return None
  return "BatchNorm adapted to minibatches of forget images (retain_weight=0)"


def _retain_unused(case: _Case) -> str | None:
  weight = case.option("retain_weight")
  if weight is None or weight >= 1:
    return None
  return f"retained images have weight {weight:g} beside the forget images' 1"


def _retain_loss_rises(case: _Case) -> str | None:
  if len(case.history) < 2 or "retain_loss" not in case.history[0]:
    return None
  first, last = (case.history[i]["retain_loss"] for i in (0, -1))
  return (
    f"the loss on retained images rose from {first:.2f} to {last:.2f}"
    if last > (1 + _FALLING_SHARE) * first
    else None
  )


def _always(case: _Case) -> str:
  return (
    f"{case.forget_split} accuracy {case.forget_accuracy:.3f} (target"
    f" {case.forget_target:.3f}), {case.retain_split} accuracy"
    f" {case.retain_accuracy:.3f} (target {case.retain_target:.3f})"
  )


_TOO_LITTLE = (NOTHING, PARTLY)
_HARM = (DESTROYED, DAMAGED)

# In the order of how sure and how cheap the remedy is; the last of each verdict
# always holds.
_RULES: tuple[_Rule, ...] = (
  _Rule(
    "raw logits as targets",
    (*_TOO_LITTLE, *_HARM),
    _raw_logits,
    "labels",
    "use labels='hard' or 'soft_other'",
  ),
  _Rule(
    "few crossed within the ball",
    _TOO_LITTLE,
    _few_crossed_in_ball,
    "max_distance",
    "raise max_distance, or set it to None",
  ),
  _Rule(
    "few crossed",
    _TOO_LITTLE,
    _few_crossed_anywhere,
    "num_steps",
    "raise num_steps, or max_distance where there is one",
  ),
  _Rule(
    "targets not learned, still learning",
    _TOO_LITTLE,
    lambda case: _not_learned(case, has_fallen=True),
    "num_epochs",
    "raise num_epochs",
  ),
  _Rule(
    "targets not learned",
    _TOO_LITTLE,
    lambda case: _not_learned(case, has_fallen=False),
    "optimizer",
    "raise the learning rate, tenfold to begin with",
  ),
  _Rule(
    "retained images outweigh",
    _TOO_LITTLE,
    _retain_outweighs,
    "retain_weight",
    "lower retain_weight to 1",
  ),
  _Rule(
    "old class in the targets",
    _TOO_LITTLE,
    _old_class_taught,
    "labels",
    "use labels='soft_other' or 'hard'",
  ),
  _Rule(
    "statistics of the minibatch",
    _TOO_LITTLE,
    _statistics_moved,
    "batch_stats",
    "use batch_stats='frozen', so that training sees what inference sees",
  ),
  _Rule(
    "statistics of forget images",
    (*_TOO_LITTLE, *_HARM),
    _forget_only_statistics,
    "batch_stats",
    "use batch_stats='frozen', or retain_weight=1",
  ),
  _Rule(
    "retained images hardly used",
    _HARM,
    _retain_unused,
    "retain_weight",
    "raise retain_weight to 1",
  ),
  _Rule(
    "one class takes all",
    (*_HARM, TOO_MUCH),
    _one_class,
    "step_size",
    "lower step_size, so that the search stops at a nearer class",
  ),
  _Rule(
    "labels unlike the retrained model's",
    (*_HARM, TOO_MUCH),
    _wrong_labels,
    "step_size",
    "lower step_size and raise num_steps",
  ),
  _Rule(
    "unstable",
    _HARM,
    _retain_loss_rises,
    "optimizer",
    "lower the learning rate, tenfold to begin with",
  ),
  _Rule(
    "too little training",
    _TOO_LITTLE,
    _always,
    "num_epochs",
    "raise num_epochs or the learning rate",
  ),
  _Rule(
    "too much training",
    _HARM,
    _always,
    "optimizer",
    "lower the learning rate, or num_epochs",
  ),
  _Rule(
    "pushed too far",
    (TOO_MUCH,),
    _always,
    "num_epochs",
    "lower num_epochs, or use labels='soft_other'",
  ),
)


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
  forget_split = _first_known(sides, ("train_forget", "test_forget"))
  retain_split = _first_known(sides, ("test_retain", "train_retain"))
  known = {} if options is None else _with_defaults(options)
  reference = original if retrained is None else retrained
  if retrained is not None:
    forget_target = _known(retrained, forget_split)
  elif scope == "class":
    forget_target = 0.0
  elif original.get("test_forget") is not None:
    forget_target = _known(original, "test_forget")
  else:
    forget_target = _known(original, retain_split)
  case = _Case(
    original=original,
    unlearned=unlearned,
    forget_split=forget_split,
    forget_target=forget_target,
    retain_split=retain_split,
    retain_target=_known(reference, retain_split),
    chance=1 / num_classes,
    relabelling=relabelling,
    history=history,
    options=known,
  )
  findings = []
  for verdict in _verdicts(case):
    if verdict in (FINE, CANNOT_TELL):
      findings.append(_plain(verdict, case))
      continue
    for rule in _RULES:
      evidence = rule.evidence(case) if verdict in rule.verdicts else None
      is_last = rule.evidence is _always
      if evidence is None or (is_last and _has(findings, verdict)):
        continue
      if not is_last and not _has(findings, verdict):
        evidence = f"{_always(case)}; {evidence}"
      findings.append(
        Finding(verdict, rule.name, evidence, rule.setting, rule.advice)
      )
  return Diagnosis(tuple(findings))


def _verdicts(case: _Case) -> list[str]:
  """Reads the accuracies alone; the worst first."""
  verdicts = []
  start = _known(case.original, case.retain_split)
  lead = start - case.chance
  kept = case.retain_accuracy - case.chance
  if lead > 0 and kept < _DESTROYED_SHARE * lead:
    # What a destroyed model does on the forget set says nothing.
    return [DESTROYED]
  before = _known(case.original, case.forget_split)
  way = before - case.forget_target
  gone = before - case.forget_accuracy
  missing = case.forget_accuracy - case.forget_target
  if missing > _TOLERANCE:
    verdicts.append(NOTHING if gone < _NOTHING_SHARE * way else PARTLY)
  elif missing < -_TOLERANCE:
    verdicts.append(TOO_MUCH)
  elif way <= _TOLERANCE:
    verdicts.append(CANNOT_TELL)
  if case.retain_target - case.retain_accuracy > _TOLERANCE:
    verdicts.append(DAMAGED)
  if verdicts[:1] == [CANNOT_TELL]:
    verdicts.reverse()
  return verdicts or [FINE]


def _plain(verdict: str, case: _Case) -> Finding:
  if verdict == FINE:
    return Finding(
      *(FINE, "targets reached", _always(case), None, "nothing to move")
    )
  before = _known(case.original, case.forget_split)
  return Finding(
    verdict,
    "the original is near the target",
    f"{case.forget_split} accuracy was {before:.3f} before unlearning, and a"
    f" model that never saw these images has {case.forget_target:.3f}",
    None,
    "judge by agreement, divergence and membership inference",
  )


def _has(findings: Sequence[Finding], verdict: str) -> bool:
  return any(each.verdict == verdict for each in findings)


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
