"""The command `psg`, and the files that a release is known by."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

import psg_jax
from experiments import psg
from psg_jax import programs

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def start(*arguments):
  """Runs the installed command `psg` in a process of its own."""
  code = (
    f"import sys; sys.argv = {['/bin/psg', *arguments]}\n"
    "from psg_jax import programs; programs.start()"
  )
  return subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )


def main(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["psg", *arguments])
  programs.run(psg.main)
  return sys.argv


def test_every_command_is_a_script_and_has_a_line(monkeypatch, capsys):
  scripts = set(PROJECT["project"]["scripts"])
  assert scripts == {"psg", *(f"psg-{name}" for name in programs.COMMANDS)}
  with pytest.raises(SystemExit) as caught:
    main(monkeypatch, "--help")
  assert caught.value.code == 0
  lines = re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, re.M)
  assert dict(lines).items() >= programs.COMMANDS.items()


def test_a_command_is_dispatched_with_its_options(monkeypatch):
  rest = ["--recipe=digits", "--help"]
  for name in programs.COMMANDS:
    assert main(monkeypatch, name, *rest) == [f"psg-{name}", *rest]


def test_a_wrong_command_is_one_line_with_the_nearest(monkeypatch, capsys):
  with pytest.raises(SystemExit) as caught:
    main(monkeypatch, "trian", "--recipe=digits")
  assert caught.value.code == 2
  shown = capsys.readouterr()
  assert shown.out == ""
  (line,) = shown.err.splitlines()
  assert line.startswith("error: command must be one of demo, ")
  assert line.endswith("got 'trian', did you mean 'train'?")


def test_no_command_prints_the_help_and_fails(monkeypatch, capsys):
  with pytest.raises(SystemExit) as caught:
    main(monkeypatch)
  assert caught.value.code == 2
  assert capsys.readouterr().out.strip() == psg.usage()


def test_version(monkeypatch, capsys):
  with pytest.raises(SystemExit) as caught:
    main(monkeypatch, "--version")
  assert caught.value.code == 0
  assert capsys.readouterr().out == f"psg_jax {psg_jax.__version__}\n"


@pytest.mark.parametrize(
  ("name", "typed", "option"),
  [
    ("cache", "--data", "--data_dir"),
    pytest.param("train", "--recip", "--recipe", marks=pytest.mark.slow),
  ],
)
def test_a_command_runs_and_its_options_complete_in_bash(name, typed, option):
  done = start(name, "--tyro-print-completion", "bash")
  assert done.returncode == 0, done.stderr
  command = f"psg-{name}"
  assert f" {command}\n" in done.stdout
  if not shutil.which("bash"):
    pytest.skip("bash is not here")
  script = f"""{done.stdout}
    COMP_WORDS=({command} {typed}); COMP_CWORD=1
    COMP_LINE="{command} {typed}"; COMP_POINT=${{#COMP_LINE}}
    $(complete -p {command} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    echo "${{COMPREPLY[@]}}" """
  shown = subprocess.run(
    ["bash", "-c", script], capture_output=True, text=True, check=True
  )
  assert option in shown.stdout.split()


def test_the_citation_is_of_this_version_and_licence():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  # What the format asks for.
  needed = {"cff-version", "message", "title", "authors"}
  assert needed <= set(citation)
  assert citation["cff-version"] == "1.2.0"
  assert PROJECT["tool"]["hatch"]["version"]["path"] == "psg_jax/__init__.py"
  assert citation["version"] == psg_jax.__version__
  assert citation["license"] == PROJECT["project"]["license"]
  assert citation["title"] == PROJECT["project"]["name"]
  (paper,) = citation["references"]
  readme = " ".join((ROOT / "README.md").read_text().split())
  assert paper["title"] in readme
  assert paper["journal"] in readme
  assert f"year={{{paper['year']}}}" in readme
  number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
  assert f"arXiv {number}" in readme


def test_the_changelog_knows_the_version():
  text = (ROOT / "CHANGELOG.md").read_text()
  assert "\n## [Unreleased]\n" in text
  assert re.search(rf"\b{re.escape(psg_jax.__version__)}\b", text)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(name):
  links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
  local = [x for x in links if not x.startswith("https://")]
  assert local
  assert not [x for x in local if not (ROOT / x).is_file()]


def test_types_are_shipped():
  (package, *_) = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"][
    "packages"
  ]
  assert (ROOT / package / "py.typed").is_file()


def test_the_wheel_is_tried_with_every_python_that_is_promised():
  script = (ROOT / ".ci" / "wheel").read_text()
  tried = re.search(r"names=\((python.*)\)", script)[1].split()
  promised = re.findall(r"Python :: (3\.\d+)", str(PROJECT["project"]))
  assert tried == [f"python{version}" for version in promised]
