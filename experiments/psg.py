"""All programs by one command: `psg NAME …` is `psg-NAME …`.

psg --help
psg train --recipe digits
"""

import sys

import psg_jax
from psg_jax import checks, programs

_HELP = ("-h", "--help")


def main() -> None:
  """Names the program to run, or prints what there is.

  Raises:
    SystemExit: With 0 after `--help` and `--version`, with 2 after the help
      that stands for no command.
    ValueError: If there is no such command, with the nearest name.
  """
  command, *options = sys.argv[1:] or [""]
  if command in ("", *_HELP):
    print(usage())
    raise SystemExit(0 if command else 2)
  if command == "--version":
    print(f"psg_jax {psg_jax.__version__}")
    raise SystemExit(0)
  checks.one_of("command", command, programs.COMMANDS)
  sys.argv = [f"psg-{command}", *options]


def usage() -> str:
  """Returns what `psg --help` prints: all programs with a line each."""
  width = max(map(len, programs.COMMANDS))
  lines = [f"  {x:{width}}  {text}" for x, text in programs.COMMANDS.items()]
  return "\n".join(
    [
      "usage: psg COMMAND [OPTIONS]",
      "",
      *lines,
      "",
      "psg COMMAND --help shows its options, psg --version the version.",
      "Each is also psg-COMMAND, whose options complete in bash (or zsh) after",
      "  source <(psg-COMMAND --tyro-print-completion bash)",
    ]
  )


if __name__ == "__main__":
  programs.run(main)
  programs.start()
