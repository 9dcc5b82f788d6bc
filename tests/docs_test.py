"""The examples of docs/own_networks.md, as a reader would run them."""

import pathlib
import re

import numpy as np
import pytest

import psg_jax as psg

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
