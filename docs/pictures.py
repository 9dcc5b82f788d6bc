"""Pictures of docs/method.md, and the figures that pages quote.

    python docs/pictures.py

trains the digits as `make demo` does, with eight retrained models, and writes
docs/images/method_*.png and docs/figures.json: four minutes of a core.
"""

import json
import pathlib

import jax
import numpy as np
from matplotlib import axes as mpl_axes

import psg_jax as psg
from experiments import compilation, recipes
from experiments.pages import figures

DOCS = pathlib.Path(__file__).parent
IMAGES = DOCS / "images"
NUM_RETRAINED = 8
_COLORS = figures.COLORS


def main() -> None:
  """Trains, draws, and writes."""
  compilation.set_up()
  job = recipes.find("digits")
  train, test = psg.data.load(job.dataset)
  model = psg.models.create(
    job.model, like=train, width=job.width, mean=job.mean, std=job.std
  )
  parts = psg.evaluation.parts(train, test, classes=job.forget_classes)
  options = {
    "num_epochs": job.training.num_epochs,
    "batch_size": job.training.batch_size,
    "optimizer": psg.training.sgd(job.training.learning_rate),
  }
  keys = [jax.random.fold_in(jax.random.key(job.seed), i) for i in range(4)]
  original, _ = psg.fit(model, train, keys[0], **options)
  retrained = psg.ensembles.fit_many(
    model, parts.split.retain, keys[1], num_models=NUM_RETRAINED, **options
  )
  references = [
    jax.tree.map(lambda x, i=i: x[i], retrained) for i in range(NUM_RETRAINED)
  ]
  output = psg.unlearn(model, original, parts.split, keys[2])
  draw_search(model, original, parts.split.forget, keys[3])
  draw_targets(model, original, parts.split.forget, output)
  draw_update(output.history)
  models = {
    "original": original,
    "retrained": references[0],
    "unlearned": output.variables,
  }
  draw_classes(model, models, test)
  write_figures(model, models, references, parts)
  for path in IMAGES.glob("method_*.pdf"):
    path.unlink()  # Pages show PNG.


def draw_search(
  model: psg.types.Model,
  variables: psg.types.Variables,
  forget_set: psg.types.Dataset,
  key: jax.Array,
) -> None:
  """Algorithm 1: images, the points that the search comes to, differences."""
  images = forget_set.images[:6].astype(np.float32) / 255
  search = psg.unlearning.search_of({})
  found = search(model.apply, variables, images, forget_set.labels[:6], key)
  moved = np.asarray(found.images)
  figures.save_examples(
    IMAGES / "method_search",
    images,
    moved,
    [
      f"{old} → {new}, {distance:.3f}"
      for old, new, distance in zip(
        forget_set.labels[:6], found.labels, found.distance, strict=True
      )
    ],
    figures.amplification(images, moved),
  )


def draw_targets(
  model: psg.types.Model,
  variables: psg.types.Variables,
  forget_set: psg.types.Dataset,
  output: psg.unlearning.UnlearnOutput,
) -> None:
  """Predictions at an image and at its boundary point, and what is taught."""
  one = forget_set.images[:1].astype(np.float32) / 255
  at_image = jax.nn.softmax(model.apply(variables, one))[0]
  at_boundary = jax.nn.softmax(output.relabelling.logits[:1])[0]
  bars = {
    "at the image": (at_image, "original"),
    "at the boundary": (at_boundary, "forget"),
    "the target": (output.targets[0], "unlearned"),
  }

  def panel(title: str, values: np.ndarray, role: str) -> figures.Panel:
    def draw(axes: mpl_axes.Axes) -> None:
      axes.bar(np.arange(len(values)), np.asarray(values), color=_COLORS[role])
      axes.set(title=title, ylim=(0, 1), xticks=np.arange(len(values)))
      axes.set(xlabel="digit", ylabel="probability")

    return figures.Panel(draw, title, width=3.0, height=2.4)

  panels = [panel(title, *bar) for title, bar in bars.items()]
  figures.save(panels, IMAGES / "method_targets", num_columns=3)


def draw_update(history: psg.engine.History) -> None:
  """Losses of forget and retained images, step by step."""

  def draw(axes: mpl_axes.Axes) -> None:
    for part, label in (("forget", "to forget"), ("retain", "retained")):
      losses = np.concatenate([x[f"{part}_step_losses"] for x in history])
      axes.plot(1 + np.arange(len(losses)), losses, color=_COLORS[part])
      axes.annotate(
        label,
        (len(losses), losses[-1]),
        color=_COLORS[part],
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
      )
    axes.set(title="Loss against the targets", xlabel="step", ylabel="nats")
    axes.margins(x=0.18)

  panel = figures.Panel(draw, "Losses of the update", width=6.0, height=2.6)
  figures.save([panel], IMAGES / "method_update", num_columns=1)


def draw_classes(
  model: psg.types.Model,
  models: dict[str, psg.types.Variables],
  test: psg.types.Dataset,
) -> None:
  """Accuracy of each class, of the three models."""
  names = np.arange(test.num_classes)

  def draw(axes: mpl_axes.Axes) -> None:
    for place, (name, variables) in enumerate(models.items()):
      logits = psg.inference.predict(model.apply, variables, test.images)
      is_right = np.argmax(logits, -1) == test.labels
      accuracy = [is_right[test.labels == i].mean() for i in names]
      axes.bar(
        names + 0.27 * (place - 1),
        accuracy,
        0.25,
        color=_COLORS[name],
        label=name,
      )
    axes.set(title="Accuracy on test images", xlabel="digit", xticks=names)
    axes.set(ylim=(0, 1.02))
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.42))

  panel = figures.Panel(draw, "Accuracy by class", width=7.0, height=2.8)
  figures.save([panel], IMAGES / "method_compare", num_columns=1)


def write_figures(
  model: psg.types.Model,
  models: dict[str, psg.types.Variables],
  references: list[psg.types.Variables],
  parts: psg.evaluation.Parts,
) -> None:
  """Counts how many of the retrained models each check rejects."""
  data = parts.datasets()

  def outputs(variables: psg.types.Variables) -> psg.metrics.Outputs:
    both = {
      part: psg.inference.predict_both(model, variables, x.images)
      for part, x in data.items()
    }
    logits, features = (
      {part: arrays[i] for part, arrays in both.items()} for i in (0, 1)
    )
    return psg.metrics.Outputs(logits, features)

  original = outputs(models["original"])

  def subject(variables: psg.types.Variables) -> psg.model_checks.Subject:
    return psg.model_checks.Subject(outputs(variables), original)

  table = psg.model_checks.assess(
    [subject(variables) for variables in references],
    {"unlearned": [subject(models["unlearned"])]},
    {part: x.labels for part, x in data.items()},
    (*psg.traces.CHECKS, psg.traces.probe()),
  )
  alarms = {
    f"{x['name']}/{x['split']}": sum(x["false_alarms"])
    for x in table["examinations"]
  }
  record = {
    "command": "python docs/pictures.py",
    "num_retrained": table["total"],
    "level": table["level"],
    "rejected_by_any": table["false_alarms"],
    "false_alarms": alarms,
    "against_unlearned": table["against"]["unlearned"],
  }
  path = DOCS / "figures.json"
  path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  main()
