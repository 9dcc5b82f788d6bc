"""One self-contained page that shows what a run did.

    python -m experiments.report runs/digits

writes `runs/digits/report.html`, its pictures as PNG and PDF into
`runs/digits/figures`, and its tables as CSV, Markdown and LaTeX into
`runs/digits/tables`; five to eight seconds on one core, of which the PDF files
take two or three and the t-SNE maps one or two. The page has 5 MB at most, and
needs no network and nothing but itself.
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
