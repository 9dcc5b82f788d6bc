"""Take the forget set out of a trained model.

    python -m experiments.unlearn --run runs/digits

works in the run folder that `experiments.train` wrote, `--name other` in a
copy of it, where another request can be made of the same original model. A
PyTorch model comes in with `--weights`, and `--export` writes
the unlearned one back:

    python -m experiments.unlearn --recipe reference --no-retrained \
        --weights original.safetensors --export unlearned.safetensors

`--method released` and `--method no_retain_data` choose other recipes of
unlearning. Seconds for the digits, about a minute for a class of Fashion-MNIST
on two cores.
"""

import dataclasses
import pathlib

from experiments import cli, jobs, recipes, report, run_figures, run_folder
from psg_jax import checkpoints, torch_weights


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, and where the models come from and go to."""

  run: str | None = None
  """Run folder that has the original model."""
  method: str = "default"
  """Unlearning recipe: default, paper, released or no_retain_data."""
  export: str | None = None
  """Also write the unlearned model as a PyTorch state dict (.safetensors)."""


def main() -> None:
  """Unlearns, compares and reports."""
  options = cli.parse_job(Options, "Take the forget set out of a model.")
  _check_export(options.export)
  source = None if options.run is None else pathlib.Path(options.run)
  target = run_folder.run_dir(options)
  is_copy = source is not None and target.resolve() != source.resolve()
  if source is not None:
    _check_source(source, options, is_copy=is_copy)
  is_finished = target.is_dir() and (
    "unlearned" in checkpoints.run_checkpoints(target)
  )
  context = jobs.prepare(
    options,
    is_known_run=source is not None and not is_copy,
    may_change=_may_change(is_copy=is_copy, is_finished=is_finished),
    source=source if is_copy else None,
  )
  print(jobs.announce(context))
  is_new = source is None or not run_folder.has_same_request(source, options)
  variables = {"original": jobs.original(context)}
  if "retrained" in checkpoints.run_checkpoints(context.run_dir) or (
    is_new and options.retrained
  ):
    variables |= jobs.references(context)
  variables["unlearned"] = jobs.unlearned(context, variables["original"])
  print(run_figures.table(run_figures.evaluate(context, variables)))
  if options.export:
    torch_weights.save(
      options.export,
      variables["unlearned"],
      model_name=options.model,
      like=options.weights,
    )
    print(options.export)
  print(report.build(context.run_dir))


def _may_change(*, is_copy: bool, is_finished: bool) -> tuple[str, ...]:
  """Options that may differ from those of the run to start from."""
  if is_copy:
    return ("retrained", "unlearning", *run_folder.REQUEST_FIELDS)
  # What was unlearned stays as its options say.
  return ("retrained",) if is_finished else ("retrained", "unlearning")


def _check_export(path: str | None) -> None:
  if path is None:
    return
  if not path.endswith(".safetensors"):
    raise ValueError(f"export must end in .safetensors, got {path}")
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise ValueError(f"export must be in a folder that exists, got {path}")


def _check_source(
  source: pathlib.Path, options: Options, *, is_copy: bool
) -> None:
  """Checks the run to start from.

  Raises:
    ValueError: If the run has no original model, or has been unlearned.
  """
  if options.overwrite:
    raise ValueError("overwrite must be off with run, got both")
  names = checkpoints.run_checkpoints(source)
  if "original" not in names:
    raise ValueError(
      f"run must have an original model, got {source} with"
      f" {', '.join(names) or 'none'}"
    )
  if "unlearned" in names and not is_copy and not options.resume:
    raise ValueError(
      f"run must not have been unlearned, got {source}: give the new result"
      " a --name of its own"
    )


if __name__ == "__main__":
  cli.run(main)
