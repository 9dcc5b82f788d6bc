"""Train the original model and the retrained reference of a recipe.

    python -m experiments.train --recipe digits

writes `runs/digits` with both models, their figures and a report; half a
minute on two cores. `python -m experiments.unlearn --run runs/digits` goes on
from there.
"""

from experiments import cli, jobs, recipes, report, run_figures
from psg_jax import checkpoints


def main() -> None:
  """Trains both models and reports on them."""
  job = cli.parse_job(recipes.Job, "Train the original and retrained models.")
  context = jobs.prepare(job)
  print(jobs.announce(context))
  variables = {"original": jobs.original(context)}
  if job.retrained:
    variables |= jobs.references(context)
  if "unlearned" in checkpoints.run_checkpoints(context.run_dir):
    variables["unlearned"] = jobs.unlearned(context, variables["original"])
  print(run_figures.table(run_figures.evaluate(context, variables)))
  print(report.build(context.run_dir))


if __name__ == "__main__":
  cli.run(main)
