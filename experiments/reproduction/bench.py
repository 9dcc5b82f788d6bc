"""The models that cells of experiments share, each trained once and kept.

    <folder>/original-<digest>/     checkpoints and history of one original
    <folder>/retrained-<digest>/    and of one retrained model

A digest is of all that a model depends on: its images, its network, its
training, and, for a retrained model, the images it does not see.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import (
  cells,
  contexts,
  jobs,
  recipes,
  requests,
  run_folder,
  sets,
)
from experiments.comparison import recipes as method_recipes
from psg_jax import data, forget, metrics, types
from psg_jax import files as psg_files

# What a model depends on, beside its images.
_MODEL_OPTIONS = (
  *("dataset", "model", "width", "dropout", "precision", "pretrained"),
  *("mean", "std", "seed", "training"),
)
_LOADED_OPTIONS = ("dataset", "data_dir", "streaming")


class Bench(NamedTuple):
  """A job and where its models are kept.

  Attributes:
    context: What the steps of the job share.
    folder: Of the models of all jobs.
  """

  context: contexts.Context
  folder: pathlib.Path

  @property
  def parts(self) -> dict[str, types.Dataset]:
    """The four parts, the same for all methods.

    Images that would tell any of them when to stop are left out.
    """
    parts = self.context.parts
    if contexts.is_class_request(self.context):
      return parts
    for target in ("unseen", "proxy"):
      options = dataclasses.replace(self.context.job.unlearning, target=target)
      job = dataclasses.replace(self.context.job, unlearning=options)
      others = self.context._replace(job=job).parts
      for name in ("test_forget", "test_retain"):
        shown = np.asarray(others[name].ids)
        is_shown = np.isin(np.asarray(parts[name].ids), shown)
        parts[name] = parts[name].take(is_shown)
    return parts

  def trained(self, name: str) -> types.Variables:
    """Returns a model, trained or restored.

    Args:
      name: `original`, `retrained`, which never saw the forget set, or
        `retrained-1`, which is so with the next seed.
    """
    if name == "original":
      return jobs.original(self._at(name))
    return jobs.retrained(self._at(name), name)

  def seconds(self, model: str) -> float:
    """Returns how long a model was trained, compiling included."""
    records = run_folder.read_json(self._at(model).run_dir / "history.json")
    return float(records[f"{model}_seconds"])

  def unlearn(
    self, variables: types.Variables | None = None
  ) -> cells.Unlearned:
    """Unlearns by the job's options, from the original or another model.

    Raises:
      FloatingPointError: If it diverges.
    """
    return cells.unlearn(
      self.context,
      method_recipes.resolve("psg", self.context),
      self.trained("original") if variables is None else variables,
      contexts.model_key(self.context, "unlearned"),
      show_progress=False,
    )

  def outputs(self, name: str) -> metrics.Outputs:
    """Returns the logits of a model of `trained` on all parts.

    They are predicted once, for all requests that share the model.
    """
    context = self.context
    path = self._at(name).run_dir / "logits.npz"
    whole = {"train": context.train, "test": context.test}
    if not path.is_file():
      variables = self.trained(name)
      logits = {
        split: contexts.predict(context.of(name), variables, part.images)
        for split, part in whole.items()
      }
      psg_files.save_arrays(path, logits)
    logits = psg_files.read_arrays(path)
    rows = {
      split: {id_: row for row, id_ in enumerate(np.asarray(part.ids))}
      for split, part in whole.items()
    }
    outputs = {}
    for name, part in self.parts.items():
      split = name.partition("_")[0]
      places = [rows[split][id_] for id_ in np.asarray(part.ids)]
      outputs[name] = logits[split][np.array(places, int)]
    return metrics.Outputs(outputs)

  def outputs_of(self, variables: types.Variables) -> metrics.Outputs:
    """Returns the logits of another model on all parts that there are."""
    return metrics.Outputs(
      {
        name: contexts.predict(self.context, variables, part.images)
        for name, part in self.parts.items()
        if len(part)
      }
    )

  def figures(
    self,
    name: str,
    variables: types.Variables,
    names: Sequence[str],
  ) -> dict[str, float | None]:
    """Computes metrics of a model beside the original and the retrained one.

    Args:
      name: `unlearned`, or one of `trained`.
      variables: The model's.
      names: Metrics, of `psg_jax.metrics`.
    """
    others = {x: self.outputs(x) for x in ("original", "retrained")}
    if name in others:
      model = others[name]
    elif name == "unlearned":
      model = self.outputs_of(variables)
    else:
      model = self.outputs(name)
    if name == "retrained":
      # It is what others are compared with.
      del others["retrained"]
    inputs = metrics.Inputs(
      labels={name: part.labels for name, part in self.parts.items()},
      model=model,
      retrained=others.get("retrained"),
      original=others.get("original"),
    )
    figures = metrics.compute(names, inputs)
    return {metric: figure["value"] for metric, figure in figures.items()}

  def asking(self, **request: Any) -> "Bench":
    """Returns the bench of another request for the same original model."""
    job = dataclasses.replace(self.context.job, **request)
    return open_bench(job, self.folder)

  def without(self, dropped: types.Dataset) -> "Bench":
    """Returns the bench whose training images are without some of them."""
    keep = ~np.isin(np.asarray(self.context.train.ids), np.asarray(dropped.ids))
    train = self.context.train.take(keep)
    loaded = sets.Loaded(train, self.context.test, dict(self.context.source))
    job = dataclasses.replace(self.context.job, num_train=None)
    context = jobs.assemble(job, self.folder, loaded)
    # Still the network of the original, whose standardisation is its own.
    return self._replace(context=context._replace(model=self.context.model))

  def validated(self, fraction: float = 0.2) -> "Bench":
    """Returns the bench with a part of the training images in place of tests.

    What is chosen there has not seen a test image; the models are trained on
    what is left.
    """
    context = self.context
    rest, held = data.hold_out(context.train, fraction, context.job.seed)
    loaded = sets.Loaded(rest, held, dict(context.source))
    job = dataclasses.replace(context.job, num_train=None)
    return self._replace(context=jobs.assemble(job, self.folder, loaded))

  def _at(self, model: str) -> contexts.Context:
    """Returns the job with the folder of one of its models."""
    context = self.context
    images = context.train
    parts: dict[str, Any] = {
      name: value
      for name, value in dataclasses.asdict(context.job).items()
      if name in _MODEL_OPTIONS
    }
    parts["images"] = requests.images_hash([images, context.test])
    if model != "original":
      ids = np.asarray(context.split.forget.ids)
      parts["forgotten"] = forget.ids_hash(ids)
    digest = psg_files.digest(parts, sort_keys=True)[:16]
    folder = self.folder / f"{model}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    # One retrained model serves all requests that forget the same images.
    job = dataclasses.replace(context.job, references=1)
    return context._replace(job=job, run_dir=folder)


def open_bench(job: recipes.Job, folder: pathlib.Path) -> Bench:
  """Loads a job's images and splits them; nothing is trained yet.

  Args:
    job: The options.
    folder: Where models are kept.

  Raises:
    ValueError: As `jobs.prepare`, for its options and its data.
  """
  jobs.check(job)
  options = tuple(getattr(job, name) for name in _LOADED_OPTIONS)
  return Bench(jobs.assemble(job, folder, _load(*options)), folder)


def data_digest(job: recipes.Job) -> str:
  """Returns a digest of the images of a job and their labels.

  Of images that are read from disk, it is of their ids and labels alone.
  """
  loaded = _load(*(getattr(job, name) for name in _LOADED_OPTIONS))
  parts: list[str] = []
  for part in loaded[:2]:
    parts.append(requests.images_hash([part]))
    if isinstance(part.images, np.ndarray):
      parts.append(psg_files.digest(part.images.tobytes()))
  return psg_files.digest(parts)[:16]


@functools.lru_cache(maxsize=2)
def _load(dataset: str, data_dir: str | None, streaming: bool) -> sets.Loaded:
  """Loads images once for the cells that follow one another."""
  job = recipes.Job(dataset=dataset, data_dir=data_dir, streaming=streaming)
  return sets.load(job)
