"""The figures of a run, and the arrays that its report is drawn from."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
  contexts,
  files,
  read_out,
  requests,
  run_folder,
)
from experiments.pages import yardstick as yardstick_page
from psg_jax import (
  boundary,
  inference,
  metrics,
  training,
  types,
  unlearning,
)

_NUM_EXAMPLES = 8
_NUM_FEATURES = 600
_NUM_TWINS = 8
# More of the accuracy on retained images than this is not lost unsaid.
_GREAT_LOSS = 0.05


def evaluate(
  context: contexts.Context, variables: dict[str, types.Variables]
) -> dict[str, Any]:
  """Computes and writes the figures of the models, and the features.

  Args:
    context: What the steps share.
    variables: The models' variables, by name; of further references
      (`references`) the yardstick alone is computed.

  Returns:
    The content of `metrics.json`.
  """
  parts = context.parts
  labels = {name: part.labels for name, part in parts.items()}
  logits = {
    name: {
      part: contexts.predict(context.of(name), tree, dataset.images)
      for part, dataset in parts.items()
    }
    for name, tree in variables.items()
  }
  reference = logits.get("retrained")
  retrained = [x for name, x in logits.items() if name.startswith("retrained")]
  variables = {
    name: variables[name] for name in contexts.MODELS if name in variables
  }
  logits = {name: logits[name] for name in variables}
  values = {
    (name, column): requests.values(part, column)
    for name, part in parts.items()
    for column in context.selection.columns
  }
  records = run_folder.read_json(context.run_dir / "history.json")
  result = {}
  for name in variables:
    compared = reference if name != "retrained" else None
    result[name] = {
      **metrics.evaluate(logits[name], labels, compared),
      "by": _accuracy_by(logits[name], labels, values),
      "seconds": records[f"{name}_seconds"],
    }
  if "unlearned" in result:
    searches = [x for x in records["unlearned"] if "search_seconds" in x]
    result["unlearned"] |= {
      "search_seconds": sum(x["search_seconds"] for x in searches),
      "update_seconds": sum(x["seconds"] for x in records["unlearned"]),
      "num_passes": len(records["unlearned"]),
      "relabelling": _relabelling_record(
        context, None if reference is None else reference["train_forget"]
      ),
    }
  for name, lines in warnings(result, labels).items():
    result[name]["warnings"] = lines
  if "original" in logits:
    _read_out(context, logits, records, result)
  if retrained and {"original", "unlearned"} <= set(logits):
    result["unlearned"]["yardstick"] = read_out.yardstick(
      parts,
      {name: logits[name] for name in ("original", "unlearned")},
      retrained,
      context.selection.request.group,
    )
  _save_features(context, variables)
  run_folder.write_json(context.run_dir / "metrics.json", result)
  return result


def table(result: dict[str, Any]) -> str:
  """Formats the accuracies and times of the models as text."""
  splits = (
    "train_forget",
    "train_retain",
    "test_forget",
    "test_retain",
    "test",
  )

  def cell(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"

  lines = [
    f"{'':12}" + "".join(f"{name:>14}" for name in splits) + f"{'seconds':>10}"
  ]
  for name, figures in result.items():
    cells = [cell(figures["accuracy"][split]) for split in splits]
    lines.append(
      f"{name:12}"
      + "".join(f"{text:>14}" for text in cells)
      + f"{figures['seconds']:>10.1f}"
    )
  for name, figures in result.items():
    for title, of in (
      ("same prediction as the retrained model", "agreement"),
      ("KL(retrained || model), nats", "kl_divergence"),
    ):
      if of in figures:
        lines.append(
          f"{name}: {title}, test forget {cell(figures[of]['test_forget'])},"
          f" test retain {cell(figures[of]['test_retain'])}"
        )
  for name, figures in result.items():
    lines += [f"warning: {name}: {x}" for x in figures.get("warnings", ())]
  measured = result.get("unlearned", {}).get("yardstick")
  if measured is not None:
    lines += yardstick_page.sentences(measured)
  return "\n".join(lines)


def warnings(
  result: dict[str, Any], labels: dict[str, np.ndarray]
) -> dict[str, list[str]]:
  """Says which models are at chance, and whether what is retained was lost.

  Args:
    result: The figures by model.
    labels: By part.
  """
  lines: dict[str, list[str]] = {name: [] for name in result}
  every = np.concatenate([labels["test_forget"], labels["test_retain"]])
  for name, figures in result.items():
    # A model that was made without a class is not asked for it.
    split = "test" if name == "original" else "test_retain"
    truth = every if name == "original" else labels["test_retain"]
    accuracy, shares = figures["accuracy"][split], np.bincount(truth)
    if accuracy is None or np.count_nonzero(shares) < 2:
      continue
    chance = float(shares.max() / len(truth))
    error = np.sqrt(chance * (1 - chance) / len(truth))
    if accuracy <= chance + 2 * error:
      lines[name].append(
        f"right on {accuracy:.3f} of the {split} images, no more than who"
        f" always says the most frequent class ({chance:.3f})"
      )
  for split in ("test_retain", "train_retain"):
    if not {"original", "unlearned"} <= set(result):
      break
    before, after = (
      result[name]["accuracy"][split] for name in ("original", "unlearned")
    )
    if before is not None and before - after > _GREAT_LOSS:
      lines["unlearned"].append(
        f"accuracy on {split} fell from {before:.3f} to {after:.3f}: what was"
        " to be kept was lost too"
      )
      break
  return lines


def data_record(context: contexts.Context, num_read: int) -> dict[str, Any]:
  """Returns what `data.json` says of the images and the request."""
  counts = {name: len(part) for name, part in context.parts.items()}
  num_used = len(context.train) + len(context.test)
  _, held = contexts.validation(context)
  if held is not None:
    counts["validation"] = len(held)
  return {
    "class_names": list(context.train.class_names),
    "source": dict(context.source),
    # All images; those of `validation`, of the test images, say when to stop.
    "counts": counts,
    # Their sum is what was read.
    "images": {
      "read": num_read,
      "forget": counts["train_forget"],
      "retain": counts["train_retain"],
      "test": len(context.test),
      "not used (num_train)": num_read - num_used,
    },
    "images_sha256": requests.images_hash([context.train, context.test]),
    **requests.record(context.selection),
  }


def save_twins(context: contexts.Context) -> None:
  """Keeps a few twins as pictures."""
  twins = context.selection.twins
  pairs = [] if twins is None else twins.pairs[:_NUM_TWINS]
  parts = {
    "forget": context.split.forget,
    "retain": context.split.retain,
    "test": context.test,
  }
  rows = {
    name: {image_id: row for row, image_id in enumerate(np.asarray(part.ids))}
    for name, part in parts.items()
  }

  def image(part: str, image_id: str) -> np.ndarray:
    # A twin that was moved is in the forget set now.
    names = [part, "forget"] if image_id not in rows[part] else [part]
    row = rows[names[-1]][image_id]
    return np.asarray(parts[names[-1]].images[[row]])[0]

  if pairs:
    files.save_arrays(
      context.run_dir / "twins.npz",
      {
        "left": np.stack([image(x.between[0], x.ids[0]) for x in pairs]),
        "right": np.stack([image(x.between[1], x.ids[1]) for x in pairs]),
      },
    )


def _accuracy_by(
  logits: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
  values: dict[tuple[str, str], np.ndarray],
) -> dict[str, Any]:
  """Accuracies by the values of the columns asked for, train and test.

  Args:
    logits: By part.
    labels: By part.
    values: By part and column.
  """
  columns = dict.fromkeys(column for _, column in values)
  result: dict[str, Any] = {}
  for side in ("train", "test"):
    names = (f"{side}_forget", f"{side}_retain")
    joined, truth = (
      np.concatenate([arrays[name] for name in names])
      for arrays in (logits, labels)
    )
    result[side] = {
      column: metrics.accuracy_by(
        joined,
        truth,
        np.concatenate([values[name, column] for name in names]),
      )
      for column in columns
    }
  return result


def save_examples(
  context: contexts.Context, original_variables: types.Variables
) -> None:
  """Searches a few forget images again, to keep their boundary images."""
  options = context.job.unlearning
  forget_set = context.split.forget
  rows = np.linspace(
    0, len(forget_set) - 1, min(_NUM_EXAMPLES, len(forget_set))
  ).astype(int)
  images = training.to_float(jnp.asarray(forget_set.images[rows]))
  search = contexts.search_fn(context)
  if search is None:
    names = inspect.signature(boundary.Search).parameters
    search = boundary.Search(
      **{k: v for k, v in dataclasses.asdict(options).items() if k in names}
    )
  key, _ = jax.random.split(contexts.model_key(context, "unlearned"))
  labels = jnp.asarray(forget_set.labels[rows])
  keys = boundary.sample_keys(jax.random.fold_in(key, 0), jnp.asarray(rows))
  size = options.search_batch_size
  outputs = [
    search(
      context.model.apply,
      original_variables,
      *(x[start : start + size] for x in (images, labels, keys)),
    )
    for start in range(0, len(rows), size)
  ]
  output = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
  files.save_arrays(
    context.run_dir / "examples.npz",
    {
      "images": np.asarray(images),
      "boundary": np.asarray(output.images),
      "old_labels": forget_set.labels[rows],
      "new_labels": np.asarray(output.labels),
      "distance": np.abs(np.asarray(output.images - images)).max((1, 2, 3)),
      "is_crossed": np.asarray(output.is_crossed),
    },
  )


def _relabelling_record(
  context: contexts.Context, reference: np.ndarray | None
) -> dict[str, Any]:
  num_classes = context.train.num_classes

  def count(classes: np.ndarray) -> list[int]:
    return np.bincount(classes, minlength=num_classes).tolist()

  relabelling = _relabelling(context)
  record = {
    "crossed": float(relabelling.is_crossed.mean()),
    "median_distance": float(np.median(relabelling.distance)),
    "label_counts": count(relabelling.labels),
    "agreement_with_retrained": None,
    "retrained_prediction_counts": None,
  }
  if reference is not None:
    predicted = np.argmax(reference, -1)
    record["agreement_with_retrained"] = float(
      np.mean(predicted == relabelling.labels)
    )
    record["retrained_prediction_counts"] = count(predicted)
  return record


def _read_out(
  context: contexts.Context,
  logits: dict[str, dict[str, np.ndarray]],
  records: dict[str, Any],
  result: dict[str, Any],
) -> None:
  """Adds the clinical figures, the attacks and the diagnosis to `result`."""
  clinical = read_out.figures(context.parts, logits, context.selection.columns)
  for name, figures in clinical.items():
    result[name] |= figures
  if "unlearned" not in logits:
    return
  read_out.save_flips(context.run_dir, context.parts, logits)
  retrained_logits = logits.get("retrained", {}).get("train_forget")
  result["unlearned"] |= read_out.judge(
    {name: record["accuracy"] for name, record in result.items()},
    _relabelling(context),
    retrained_logits,
    history=records["unlearned"],
    options=contexts.unlearn_options(context),
    is_class=contexts.is_class_request(context),
    num_classes=context.train.num_classes,
  )


def _relabelling(context: contexts.Context) -> unlearning.Relabelling:
  names = ("labels", "logits", "is_crossed", "distance", "num_steps")
  arrays = files.read_arrays(context.run_dir / "relabelling.npz", *names)
  return unlearning.Relabelling(**{name: arrays[name] for name in names})


def _save_features(
  context: contexts.Context, variables: dict[str, types.Variables]
) -> None:
  """Keeps penultimate features of test images, many of them to forget.

  Where no test image is to be forgotten, training images stand for them.
  """
  rng = np.random.default_rng(context.job.seed)
  parts = context.parts
  forgotten = parts["test_forget"]
  if not len(forgotten):
    forgotten = parts["train_forget"]
  samples = []
  num_test = max(1, len(context.test))
  for part in (forgotten, parts["test_retain"]):
    share = max(_NUM_FEATURES // 4, _NUM_FEATURES * len(part) // num_test)
    samples.append(part.take(np.sort(rng.permutation(len(part))[:share])))
  images = np.concatenate([part.images[:] for part in samples])
  features = {
    name: inference.predict(
      context.of(name).model.features,
      tree,
      images,
      batch_size=context.job.eval_batch_size,
      mesh=context.mesh,
    )
    for name, tree in variables.items()
  }
  arrays: dict[str, Any] = {
    **features,
    "labels": np.concatenate([part.labels for part in samples]),
    "is_forget": np.arange(len(images)) < len(samples[0]),
  }
  files.save_arrays(context.run_dir / "features.npz", arrays)
