"""What may be taught, beside what a retrained model says."""

from typing import Any

import numpy as np
from scipy import special

from experiments import contexts
from experiments.reproduction import measures
from experiments.reproduction.bench import Bench
from psg_jax import levels, metrics, proxies, refits, relabelling, unlearning


def targets(bench: Bench) -> measures.Records:
  """Compares what may be taught with what a retrained model says.

  Args:
    bench: The job, whose unlearning has proxies.

  Returns:
    A record a source of targets, named `model`: `kl_divergence` (nats) of them
    from the retrained model's predictions at the forget images,
    `level_error`, between its accuracy there and what stands for it, and of
    proxies `cost`, as a part of a retraining. Proxies are corrected by none of
    their gap to the original, by half of it, by all, and by what `proxies.fit`
    takes. Of whole classes models with new last layers as well, alone and as
    half of the targets.
  """
  context = bench.context
  forget = context.split.forget
  labels = np.asarray(forget.labels)
  logits = {
    name: bench.outputs(name).logits["train_forget"]
    for name in ("original", "retrained", "retrained-1")
  }
  aim = contexts.aim(context, bench.trained("original"), show_progress=False)
  assert aim.proxies is not None  # The job has them.
  sure = special.softmax(logits["original"], -1)
  whole = unlearning.gone_classes(context.split)
  others = relabelling.soft_targets(
    logits["original"], labels="soft_other", old_labels=labels, gone=whole
  )
  taught = {
    "retrained again": special.softmax(logits["retrained-1"], -1),
    "original": sure,
    "its class left out": others,
    "proxies": special.softmax(aim.proxies.logits, -1).mean(0),
  }
  shares = {}
  parts = {
    "proxies, no part of the gap": 0.0,
    "proxies, half the gap": 0.5,
    "proxies, all the gap": 1.0,
    "proxies, by likeness": None,
  }
  for name, part in parts.items():
    expected, confidence = (
      level.value if part is None else level.corrected(part)
      for level in (aim.proxies.accuracy, aim.proxies.confidence)
    )
    shares[name] = expected
    taught[name] = proxies.blend(
      logits["original"] + levels.prior_shift(context.split),
      aim.proxies.logits,
      labels,
      confidence,
    )
  taught |= _with_refits(bench, logits["original"])
  accuracy = measures.share_right(logits["retrained"], labels)
  records: measures.Records = []
  for name, predicted in taught.items():
    level = shares.get(name, measures.share_right(predicted, labels))
    record = {
      "model": name,
      "kl_divergence": metrics.kl_divergence(
        logits["retrained"], np.log(np.maximum(predicted, 1e-9))
      ),
      "level_error": abs(level - accuracy),
    }
    if name.startswith("proxies"):
      record["cost"] = aim.proxies.cost
    records.append(record)
  return records


REFITS: dict[str, dict[str, Any]] = {
  "": {},
  ", two models": {"num_models": 2},
  ", three layers": {"num_layers": 3},
  ", rate 0.02": {"learning_rate": 0.02},
}
"""Options of `refits.predict` that were tried, by what a table calls them."""


def _with_refits(bench: Bench, logits: np.ndarray) -> dict[str, np.ndarray]:
  """Targets of whole classes with and without new last layers."""
  context, original = bench.context, bench.trained("original")
  if not contexts.is_class_request(context):
    return {}
  augment_fn = contexts.unlearn_options(context)["augment_fn"]
  teacher = relabelling.Teacher(
    *(context.model, original, context.split),
    contexts.model_key(context, "unlearned"),
    relabelling.Targets(),
    unlearning.search_of({}),
    show_progress=False,
  )
  outcome, between = teacher.teach()
  taught = {"between image and boundary": between}
  labels = np.asarray(context.split.forget.labels)
  gone = unlearning.gone_classes(context.split)

  def other_classes(values: np.ndarray) -> np.ndarray:
    return relabelling.soft_targets(
      values, labels="soft_other", old_labels=labels, gone=gone
    )

  for name, options in REFITS.items():
    said = refits.predict(
      *(context.model, original, context.split, teacher.key),
      augment_fn=augment_fn,
      show_progress=False,
      **options,
    )
    taught[f"half new last layers{name}"] = teacher.taught.of_forget(
      outcome, logits, labels, gone, said
    )
    if not name:
      taught["new last layers"] = np.mean([other_classes(x) for x in said], 0)
  return taught
