"""The whole job in one go: train, retrain, unlearn, compare, report.

    python -m experiments.demo

forgets the digit 0 of scikit-learn's embedded digits in about a minute on two
cores. The same on real images, with Debian's dataset-fashion-mnist, or after
`python -m data_prep.prepare fashion_mnist`:

    python -m experiments.demo --recipe fashion_mnist

See the table in the README for what each recipe measures.
"""

from experiments import cli, jobs, recipes, report, run_figures


def main() -> None:
  """Runs all steps of a job; a resumed one goes on where it was."""
  job = cli.parse_job(recipes.Job, "Train, retrain, unlearn and compare.")
  context = jobs.prepare(job)
  print(jobs.announce(context))
  variables = {"original": jobs.original(context)}
  if job.retrained:
    variables |= jobs.references(context)
  variables["unlearned"] = jobs.unlearned(context, variables["original"])
  print(run_figures.table(run_figures.evaluate(context, variables)))
  print(report.build(context.run_dir))


if __name__ == "__main__":
  cli.run(main)
