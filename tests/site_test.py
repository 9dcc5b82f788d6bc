"""The site: it is built without a warning, and its pages say what is there."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import psg_jax as psg
from psg_jax import metrics

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Their Python goes on from that of the first.
SNIPPETS = ("index", "method", "choosing", "metrics", "methods", "own_data")


def load_generator():
  spec = importlib.util.spec_from_file_location(
    "generate", DOCS / "generate.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


GENERATE = load_generator()


@pytest.mark.parametrize(
  "path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem
)
def test_generated_tables_are_those_of_the_code(path):
  page = path.read_text()
  assert GENERATE.renewed(page) == page, "python docs/generate.py renews it"


def test_every_table_stands_on_a_page():
  text = "".join(path.read_text() for path in (*PAGES, ROOT / "README.md"))
  marks = re.findall("<!-- generated: (.*) -->", text)
  assert sorted(marks) == sorted(GENERATE.BLOCKS)


def test_a_table_follows_its_registry(monkeypatch):
  metric = metrics.find("zrf")._replace(name="new", title="A | B")
  monkeypatch.setitem(metrics.METRICS, "new", metric)
  page = (DOCS / "metrics.md").read_text()
  renewed = GENERATE.renewed(page)
  (line,) = set(renewed.splitlines()) - set(page.splitlines())
  assert line.startswith(r"| `new` | A \| B; Chundawat et al., 2023")


def test_links_between_pages_lead_somewhere():
  for path in (*PAGES, ROOT / "README.md"):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)]+)\)", text):
      if link.startswith("https://"):
        continue
      name, _, anchor = link.partition("#")
      target = path.parent / name if name else path
      assert target.is_file(), f"{path.name}: {link}"
      if anchor:
        titles = re.findall("^#+ (.*)$", target.read_text(), flags=re.M)
        slugs = {GENERATE.slug(title) for title in titles}
        assert anchor in slugs, f"{path.name}: {link}"


@pytest.mark.slow
def test_python_of_the_pages_runs(monkeypatch, capsys):
  """One after the other, as a reader would, on few images."""
  sets = {
    name: [part.take(np.arange(120)) for part in psg.data.load(name)]
    for name in ("digits", "phantom_digits")
  }
  monkeypatch.setattr(psg.data, "load", sets.get)
  names = {}
  for page in SNIPPETS:
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks, page
    for block in blocks:
      exec(compile(block, page, "exec"), names)
  rows = {row.model for row in names["table"]}
  assert rows == {"original", "unlearned"}
  accuracy = names["table"].value("unlearned", "accuracy", "train_forget")
  assert accuracy == pytest.approx(0, abs=0.1)
  assert names["found"].is_crossed.mean() > 0.5
  assert "eu_k" in capsys.readouterr().out


def test_snippets_of_all_pages_are_run():
  with_python = {
    path.stem for path in PAGES if "\n```python\n" in path.read_text()
  }
  # Those have a test of their own.
  assert with_python - {"own_networks"} == set(SNIPPETS)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The folder of the site, built as `make docs` does."""
  for name in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(name, reason="the extra docs is not installed")
  folder = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
    cwd=ROOT,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return folder


def test_site_has_all_pages(site):
  names = {path.stem for path in PAGES}
  names |= {f"notebooks/{path.stem}" for path in NOTEBOOKS}
  names |= {"api/index", "api/psg_jax.boundary", "api/psg_jax.metrics.table"}
  assert not [x for x in names if not (site / f"{x}.html").is_file()]
  boundary = (site / "api" / "psg_jax.boundary.html").read_text()
  assert 'id="psg_jax.boundary.search"' in boundary
  assert "_jitted_search_batch" not in boundary


def test_site_needs_no_network(site):
  fetched = re.compile(
    r"""<(?:script|img|iframe)[^>]*?\ssrc=["']?(?:https?:)?//"""
    r"""|<link[^>]*?rel=["']?stylesheet[^>]*?href=["']?(?:https?:)?//"""
    r"""|@import\s+(?:url\()?["']?https?:"""
  )
  pages = [*site.rglob("*.html"), *site.rglob("*.css")]
  assert len(pages) > 50
  assert not [x for x in pages if fetched.search(x.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
  nbclient = pytest.importorskip(
    "nbclient", reason="nbclient is a development extra"
  )
  nbformat = pytest.importorskip("nbformat")
  monkeypatch.setenv("PSG_JAX_SMOKE", "1")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  # One device, as readers have: on a busy machine eight wait for one another.
  flags = os.environ.get("XLA_FLAGS", "").split()
  kept = [x for x in flags if "device_count" not in x]
  monkeypatch.setenv("XLA_FLAGS", " ".join(kept))
  book = nbformat.read(path, as_version=4)
  # A cell that fails raises; the last one asserts a figure.
  nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
  assert "assert " in book.cells[-1].source
  assert re.search(r"0\.\d{3}", book.cells[-1].outputs[0].text)


def test_a_notebook_becomes_a_page():
  content = {
    "cells": [
      {"cell_type": "markdown", "source": ["# A", "\n", "b"]},
      {
        "cell_type": "code",
        "source": ["print(1)"],
        "outputs": [
          {"output_type": "stream", "text": ["1\n"]},
          {"data": {"image/png": "iVBO\nRw==", "text/plain": ["<Figure>"]}},
        ],
      },
    ]
  }
  page = GENERATE.notebook(content)
  assert page.startswith("# A\nb\n\n```python\nprint(1)\n```\n\n```text\n1\n")
  assert page.endswith('src="data:image/png;base64,iVBORw==">\n')


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small(path):
  assert path.stat().st_size < 300_000


def test_pictures_are_small():
  assert not [x for x in DOCS.rglob("*.png") if x.stat().st_size > 150_000]
