"""Take the forget set out of a trained model.

    python -m experiments.unlearn --run runs/digits

works in the run folder that `experiments.train` wrote, `--name other` in a
copy of it. A PyTorch model comes in with `--weights`, and `--export` writes
the unlearned one back:

    python -m experiments.unlearn --recipe reference --no-retrained \
        --weights original.safetensors --export unlearned.safetensors

`--method released` and `--method no_retain_data` choose other recipes of
unlearning. Seconds for the digits, about a minute for a class of Fashion-MNIST
on two cores.
"""

import dataclasses
import pathlib
import shutil

from experiments import cli, jobs, recipes, report
from psg_jax import checkpoints, torch_weights


@dataclasses.dataclass(frozen=True)
class Options(recipes.Job):
  """Options of a job, and where the models come from and go to."""

  run: str | None = None
  """Run folder that has the original model."""
  method: str = "default"
  """Unlearning recipe: default, released or no_retain_data."""
  export: str | None = None
  """Also write the unlearned model as a PyTorch state dict (.safetensors)."""


def main() -> None:
  """Unlearns, compares and reports."""
  options = cli.parse_job(Options, "Take the forget set out of a model.")
  if options.overwrite and options.run is not None:
    raise ValueError("overwrite must be off with run, got both")
  if options.export and not options.export.endswith(".safetensors"):
    raise ValueError(f"export must end in .safetensors, got {options.export}")
  is_new_run = options.run is None
  if options.run is not None:
    is_new_run = _start_from(pathlib.Path(options.run), options)
  context = jobs.prepare(
    options,
    is_known_run=not is_new_run,
    may_change=("unlearning", "retrained"),
  )
  variables = {"original": jobs.original(context)}
  if "retrained" in checkpoints.run_checkpoints(context.run_dir) or (
    options.run is None and options.retrained
  ):
    variables["retrained"] = jobs.retrained(context)
  variables["unlearned"] = jobs.unlearned(context, variables["original"])
  print(jobs.table(jobs.evaluate(context, variables)))
  if options.export:
    torch_weights.save(
      options.export, variables["unlearned"], model_name=options.model
    )
    print(options.export)
  print(report.build(context.run_dir))


def _start_from(source: pathlib.Path, options: Options) -> bool:
  """Checks the run to start from, and copies it where a new name is given.

  Returns:
    False: the run folder exists.

  Raises:
    ValueError: If the run has no original model, or has been unlearned.
  """
  found = checkpoints.run_checkpoints(source)
  if "original" not in found:
    raise ValueError(
      f"run must have an original model, got {source} with"
      f" {', '.join(found) or 'none'}"
    )
  target = jobs.run_dir(options)
  if target.resolve() == source.resolve():
    if "unlearned" in found and not options.resume:
      raise ValueError(
        f"run must not have been unlearned, got {source}: give the new result"
        " a --name of its own"
      )
    return False
  if target.exists() and not options.resume:
    raise ValueError(
      f"name must be that of a new run, got {target}, which exists"
    )
  if not target.exists():
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("original", "retrained"):
      if name in found:
        shutil.copytree(found[name], partial / "checkpoints" / name)
    history = jobs.read_json(source / "history.json")
    jobs.write_json(
      partial / "history.json",
      {
        name: value
        for name, value in history.items()
        if not name.startswith("unlearned")
      },
    )
    shutil.copyfile(source / "config.json", partial / "config.json")
    partial.rename(target)
  return False


if __name__ == "__main__":
  cli.run(main)
