"""The examples of docs/own_networks.md as a reader would run them; pictures."""

import ast
import pathlib
import re

import numpy as np
import pytest

import psg_jax as psg
from experiments import compilation, recipes
from experiments.pages import figures

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "own_networks.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
TITLES = [section.splitlines()[0] for section in SECTIONS[1:]]


def code(section):
  return "".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))


@pytest.fixture
def namespace(monkeypatch):
  """What the page's first block defines, with few images."""
  load = psg.data.load

  sets = [part.take(np.arange(60)) for part in load("digits")]
  monkeypatch.setattr(psg.data, "load", lambda name: sets)
  names = {}
  exec(code(SECTIONS[0]), names)
  return names


@pytest.mark.parametrize(
  "title",
  [
    pytest.param(x, marks=() if "function" in x else pytest.mark.slow)
    for x in TITLES
  ],
)
def test_own_network(title, namespace):
  if title == "Equinox":
    pytest.importorskip("equinox", reason="Equinox is a development extra")
  if title == "A vision transformer":
    exec("from flax import linen as nn", namespace)
  section = SECTIONS[1 + TITLES.index(title)]
  exec(code(section), namespace)
  if "states" in namespace:
    assert np.asarray(namespace["states"].step).tolist() == [2, 2]
    assert np.isfinite(namespace["reported"].loss).all()
    return
  assert len(code(section).splitlines()) <= 24
  output = namespace["output"]
  losses = [record["forget_loss"] for record in output.history]
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]


def test_the_program_that_draws_pictures_uses_what_there_is():
  tree = ast.parse(PAGE.with_name("pictures.py").read_text())
  modules = {"figures": figures, "recipes": recipes, "compilation": compilation}
  names = {
    (node.value.id, node.attr)
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
  }
  used = [(modules[x], y) for x, y in names if x in modules]
  assert len(used) > 5
  assert not [y for x, y in used if not hasattr(x, y)]
