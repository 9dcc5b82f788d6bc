"""One self-contained page that shows what a run did.

    python -m experiments.report runs/digits

writes `runs/digits/report.html`, and its pictures as PNG files into
`runs/digits/figures`; about five seconds on two cores, of which the t-SNE maps
take one or two. The page needs no network and nothing but itself.
"""

import dataclasses
import pathlib

import tyro

from experiments import cli
from experiments.pages import run as run_page

# What other programs end with.
build = run_page.build
read = run_page.read


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Options of the program."""

  run: tyro.conf.Positional[pathlib.Path]
  """The run folder."""


def main() -> None:
  """Writes the page of a run folder and prints its path."""
  options = cli.parse(
    ReportOptions, description="Write the page that shows what a run did."
  )
  print(build(options.run))


if __name__ == "__main__":
  cli.run(main)
