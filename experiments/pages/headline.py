"""A run in a few sentences: what was forgotten from what, and the outcome."""

from collections.abc import Mapping
from typing import Any

from experiments.pages import figures, tables, yardstick
from psg_jax import checks, forget, judgement

_FAILED = "is still mostly in"
_VERDICTS = {
  judgement.AS_RETRAINED: "as near as another retraining",
  judgement.NOT_RETRAINED: "not as a retrained model",
  judgement.CANNOT_TELL: "it cannot be told from the references there are",
}


def headline(
  job: Mapping[str, Any], data: Mapping[str, Any], models: tables.Models
) -> tuple[str, str]:
  """Says in plain words what was forgotten from what, and the outcome.

  The verb follows the forget images' test accuracy: of what the original has
  above the retrained model, what remains decides between "was taken out of"
  (up to a tenth), "was partly taken out of" (up to a half) and "is still
  mostly in". Without a retrained model, or where it is as good as the
  original on these images, accuracy proves nothing and the verb claims
  nothing.

  Where several references are there, the yardstick leads: the verdict stands in
  the headline, and its figures, the references' spread and the false alarms in
  the first sentences.

  Args:
    job: The options of the run.
    data: The content of its `data.json`.
    models: That of its `metrics.json`.

  Returns:
    The headline and the sentences under it.
  """
  subject, outcome = _subject(data), verdict(models)
  trained = (
    f"{job.get('model', 'a model')} trained on {job.get('dataset', 'its data')}"
  )
  if "unlearned" not in models.figures:
    title = f"{_upper(trained)}: {subject} has not been taken out yet"
  elif outcome is not None:
    title = f"{_upper(subject)} unlearned from {trained}: {outcome}"
  else:
    title = f"{_upper(subject)} {_verb(models)} {trained}{_pace(models)}"
  split = forget_split(models)
  where = "test" if split == "test_forget" else "training"
  start = f"On the {where} images to forget, accuracy"
  sentences = [
    _sentence(models, split, start, "a model retrained without them"),
    _sentence(
      models, split.replace("forget", "retain"), "On all others it", "retrained"
    ),
  ]
  measured = models.get("unlearned", "yardstick")
  if measured is not None:
    sentences = [*yardstick.sentences(measured), *sentences]
  return title, " ".join(filter(None, sentences))


def verdict(models: tables.Models) -> str | None:
  """The verdict of the yardstick; None with fewer than two references."""
  record = models.get("unlearned", "yardstick", "models", "unlearned")
  if record is None or record["num_references"] < 2:
    return None
  if record["verdict"] == judgement.LEVEL_ONLY:
    level = "not that" if record["is_rejected"] else "that"
    return f"only its level can be judged, and is {level} of retraining"
  return _VERDICTS[record["verdict"]]


def distance(data: Mapping[str, Any], models: tables.Models) -> str:
  """Says how far the unlearned model is from the right answer."""
  _, reference, after = _accuracies(models, forget_split(models))
  if reference is None or after is None:
    return ""
  text = (
    "The right answer on the forget images is the retrained model’s accuracy,"
    f" {tables.percent(reference)}"
  )
  # Runs of earlier versions do not say it.
  if not data.get("is_class_request", forget_classes(data)):
    text += (
      ", and not zero: a model that never saw them still knows others of their"
      " kind"
    )
  points = 100 * (after - reference)
  text += f". The unlearned model is {points:+.1f} points from it."
  if models.get("unlearned", "num_passes") == 0:
    text += (
      " Nothing was changed: the original was right no more often on the forget"
      " images than on unseen ones of their kind."
    )
  return text


def forget_split(models: tables.Models) -> str:
  """Returns the split to judge by: a request may match no test image."""
  is_known = models.known("accuracy", "test_forget")
  return "test_forget" if is_known else "train_forget"


def forget_classes(data: Mapping[str, Any]) -> list[int]:
  """Returns the classes of the request, which may give names, as numbers."""
  classes = data.get("request", {}).get("classes") or []
  return forget.class_indices(data["class_names"], classes)


def class_name(data: Mapping[str, Any], label: int) -> str:
  """Returns the name of a class, which a network may have beyond the data's."""
  names = data["class_names"]
  return str(names[label]) if 0 <= label < len(names) else f"class {label}"


def _upper(text: str) -> str:
  """Capitalises a sentence, but no identifier such as `all_cnn`."""
  first = text.split(" ", 1)[0]
  return text if "_" in first else text[:1].upper() + text[1:]


def _subject(data: Mapping[str, Any]) -> str:
  """Describes the forget request, to begin or continue a sentence."""
  request = data.get("request", {})
  names = [f"“{class_name(data, label)}”" for label in forget_classes(data)]
  where = request.get("where")
  if names:
    text = "class " if len(names) == 1 else "classes "
    if len(names) > 4:
      text += checks.few(names)
    else:
      text += " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    text += f" where {where}" if where else ""
  elif where:
    text = f"the part where {where}"
  else:
    text = f"a set of {data['counts'].get('train_forget')} images"
  if request.get("fraction", 1.0) not in (None, 1.0):
    text = f"{100 * request['fraction']:g}% of {text}"
  return text


def _accuracies(models: tables.Models, split: str) -> list[float | None]:
  return [models.get(model, "accuracy", split) for model in figures.MODELS]


def _verb(models: tables.Models) -> str:
  before, reference, after = _accuracies(models, forget_split(models))
  if before is None or reference is None or after is None:
    return "was unlearned from"
  if before - reference < 0.05:
    return "was unlearned from"
  remains = (after - reference) / (before - reference)
  if remains > 0.5:
    return _FAILED
  return "was partly taken out of" if remains > 0.1 else "was taken out of"


def _pace(models: tables.Models) -> str:
  taken = models.get("unlearned", "seconds")
  if taken is None:
    return ""
  if _verb(models) == _FAILED:
    return f" after {tables.seconds(taken)} of unlearning"
  text = f" in {tables.seconds(taken)}"
  retraining = models.get("retrained", "seconds")
  if not taken or not retraining:
    return text
  speed = retraining / taken
  if speed >= 1.05:
    return f"{text}, {tables.ratio(speed)} faster than retraining"
  if speed <= 1 / 1.05:
    return f"{text}, {tables.ratio(1 / speed)} slower than retraining"
  return f"{text}, as long as retraining"


def _sentence(models: tables.Models, split: str, start: str, rival: str) -> str:
  """Says how an accuracy moved, and what the retrained model has."""
  before, reference, after = _accuracies(models, split)
  if before is None or (after is None and "unlearned" in models.figures):
    return ""
  text = f"{start} is {tables.percent(before)}"
  if after is not None:
    text = f"{start} went from {tables.percent(before)}"
    text += f" to {tables.percent(after)}"
  if reference is not None:
    text += f" ({rival}: {tables.percent(reference)})"
  return text + "."
