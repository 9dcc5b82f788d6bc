"""What the README says to type exists: commands are parsed, Python is run.

And the commands of the site's pages are; tests/site_test.py runs their Python.
"""

import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import tyro

from experiments import recipes

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Words of the README that stand for the reader's own.
FOLDERS = re.compile(r"runs/[\w-]+")


class ParsedError(Exception):
  """Raised in place of the work of a program, with its options."""


def fenced(language, text=README):
  blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
  return [code for name, code in blocks if name == language]


def lines_of(text):
  """The lines of all blocks of commands, without comments."""
  blocks = "\n".join(fenced("", text) + fenced("bash", text))
  lines = blocks.replace("\\\n", " ").splitlines()
  return [line.split("  #")[0].strip() for line in lines]


def page_commands():
  """Those of the site's pages, but for usage lines; `psg` is a program."""
  lines = [line for page in PAGES for line in lines_of(page.read_text())]
  starts = ("python -m ", "make ", "psg ")
  chosen = [x for x in lines if x.startswith(starts) and "…" not in x]
  return list(dict.fromkeys(map(full, chosen)))


def full(command):
  """Writes `psg NAME` as the module that it runs."""
  match = re.match(r"psg (\w+)", command)
  if match is None:
    return command
  is_builder = match[1] in ("prepare", "cache")
  package = "data_prep" if is_builder else "experiments"
  return f"python -m {package}.{match[1]}{command[match.end() :]}"


def commands():
  """All commands, without comments, placeholders for values replaced."""
  lines = lines_of(README)
  prose = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
  # Code in a sentence may go over the end of a line.
  inline = [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", prose)]
  last = None
  for code in inline:
    if code.startswith("…") and last:
      # `… --option` goes on with the program of the command before.
      lines.append(last + code.removeprefix("…"))
    elif code.startswith(("python -m ", "make ")):
      last = " ".join(code.split()[:3])
      lines.append(code)
  chosen = [x for x in lines if x.startswith(("python -m ", "make "))]
  return list(dict.fromkeys(chosen))


def expand(command):
  """Makes a command of a usage line: optional parts are taken."""
  words = shlex.split(command.replace("[", " ").replace("]", " "))
  return [x.lower() if re.fullmatch("[A-Z_]{3,}", x) else x for x in words]


def targets():
  makefile = (ROOT / "Makefile").read_text()
  return set(re.findall(r"^([\w-]+):", makefile, re.M))


@pytest.fixture
def parse(monkeypatch, tmp_path):
  """Parses a command line with the program's own parser, and stops there."""
  (tmp_path / "runs").mkdir()
  monkeypatch.chdir(tmp_path)
  parse_fn = tyro.cli

  def stop(*args, **kwargs):
    raise ParsedError(parse_fn(*args, **kwargs))

  monkeypatch.setattr(tyro, "cli", stop)

  def run(module, *arguments):
    for argument in arguments:
      for name in FOLDERS.findall(argument):
        # A run of the recipe that the folder is named after.
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        job = recipes.JOBS.get(folder.name, recipes.JOBS["digits"])
        stored = json.dumps({"job": dataclasses.asdict(job)})
        (folder / "config.json").write_text(stored)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    program = importlib.import_module(module)
    with pytest.raises(ParsedError) as caught:
      program.main()
    return caught.value.args[0]

  return run


def test_there_are_commands_of_every_kind():
  words = {expand(command)[2] for command in commands() if "-m" in command}
  programs = {"data_prep.prepare"} | {
    f"experiments.{name}"
    for name in ("demo", "train", "unlearn", "report", "compare", "audit")
  }
  assert programs <= words
  assert any(command.startswith("make test") for command in commands())


def test_pages_have_commands_of_their_programs():
  words = {tuple(command.split()[:3]) for command in page_commands()}
  for name in ("demo", "unlearn", "tune", "compare", "audit"):
    assert ("python", "-m", f"experiments.{name}") in words
  assert ("python", "-m", "data_prep.prepare") in words


@pytest.mark.parametrize(
  "command", dict.fromkeys((*commands(), *page_commands()))
)
def test_command_is_parsed(command, parse):
  words = expand(command)
  if words == ["psg", "--help"]:
    return
  if words[0] == "make":
    names = [x for x in words[1:] if "=" not in x and not x.startswith("-")]
    assert set(names) <= targets()
    return
  options = parse(*words[2:])
  # The parser must have taken what was said, and not a default.
  for name, value in itertools.pairwise(words[3:]):
    if not name.startswith("--") or value.startswith("--"):
      continue
    held = options
    for part in name[2:].split("."):
      field = {"data": "dataset", "method": "method_name"}.get(part, part)
      held = getattr(held, part if hasattr(held, part) else field)
    held = held if isinstance(held, tuple) else (held,)
    texts = [f"{x:g}" if isinstance(x, float) else str(x) for x in held]
    assert value in (*texts, *map(str, held))


def test_an_option_that_does_not_exist_is_found_out(parse):
  with pytest.raises(ValueError, match="no_such_option"):
    parse("experiments.demo", "--no_such_option", "1")


_CHECK = """
models = {"original": original, "unlearned": output.variables}
table = psg.evaluate(model, parts, **models)
for name, low, high in (("original", 0.9, 1.0), ("unlearned", 0.0, 0.1)):
  accuracy = table.value(name, "accuracy", "train_forget")
  assert low <= accuracy <= high, accuracy
"""


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path):
  # As users run it: a process of its own, with the optimising compiler.
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
  } | {"PSG_JAX_DATA": str(tmp_path), "PYTHONPATH": str(ROOT)}
  blocks = fenced("python")
  assert blocks
  for block in blocks:
    # Other sets are not on every machine.
    assert set(re.findall(r'data\.load\("(\w+)"', block)) == {"digits"}
    command = [sys.executable, "-c", block + _CHECK]
    done = subprocess.run(
      command, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
