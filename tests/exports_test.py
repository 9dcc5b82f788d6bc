"""Tables and figures as files, and pages that are not too large."""

import base64
import io
import os
import pathlib
import re
import subprocess
import sys

import markupsafe
import numpy as np
import pytest
from PIL import Image

from experiments import files, report
from experiments.pages import exports, figures, tables
from tests import report_test

ROOT = pathlib.Path(__file__).parents[1]
_BOLD = tables.Cell("-0.3 ± 0.1", style="psg best")
TABLE = tables.table(
  ("A|b_1", "↑ µ & λ", tables.Cell("→ 0", style="dot")),
  {
    ("Acc", "≈ 100%"): [
      tables.Row(tables.Cell("=SUM(1)"), [_BOLD, tables.Cell("2")], "ours"),
      ("[x]", tables.NOT_AVAILABLE, "10 of 12"),
    ],
    "~": [(markupsafe.Markup("<b>a</b> &lt; c"), "−1", "3*")],
  },
)


def test_csv_says_what_the_page_does_and_has_no_formula(tmp_path):
  assert exports.csv(TABLE).splitlines() == [
    "Section,A|b_1,↑ µ & λ,→ 0",
    "Acc (≈ 100%),'=SUM(1),'-0.3 ± 0.1,2",
    "Acc (≈ 100%),[x],not available,10 of 12",
    "~,a < c,−1,3*",
  ]
  # Without names of groups there is no column of them.
  plain = tables.table((), [("a, b", '"')])
  assert exports.csv(plain) == '"a, b",""""\n'
  exports.write_tables(tmp_path, {"x": TABLE})
  _, rows = files.read_csv(tmp_path / "x.csv")
  assert rows[0]["A|b_1"] == "=SUM(1)"


def test_markdown():
  assert exports.markdown(TABLE).splitlines() == [
    r"| A\|b_1 | ↑ µ & λ | → 0 |",
    "|---|---|---|",
    "| **Acc (≈ 100%)** |  |  |",
    "| **=SUM(1)** | **-0.3 ± 0.1** | 2 |",
    "| [x] | not available | 10 of 12 |",
    "| **~** |  |  |",
    r"| a \< c | −1 | 3\* |",
  ]
  assert exports.markdown(tables.table((), [("a\nb", "`")])).splitlines() == [
    *("|  |  |", "|---|---|", r"| a b | \` |")
  ]


def test_latex():
  assert exports.latex(TABLE).splitlines() == [
    r"\providecommand{\toprule}{\hline}",
    r"\providecommand{\midrule}{\hline}",
    r"\providecommand{\bottomrule}{\hline}",
    r"\begin{tabular}{lrr}",
    r"\toprule",
    r"A\textbar{}b\_1 & $\uparrow$ $\mu$ \& $\lambda$ & $\rightarrow$ 0 \\",
    r"\midrule",
    r"\multicolumn{3}{l}{\textit{Acc ($\approx$ 100\%)}} \\",
    r"\textbf{=SUM(1)} & \textbf{-0.3 $\pm$ 0.1} & 2 \\",
    # `\\[` would be a distance between lines.
    r"{}[x] & not available & 10 of 12 \\",
    r"\midrule",
    r"\multicolumn{3}{l}{\textit{\textasciitilde{}}} \\",
    r"a \textless{} c & $-$1 & 3* \\",
    r"\bottomrule",
    r"\end{tabular}",
  ]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (r"\{$#^`\"'}", r"\textbackslash{}\{\$\#\textasciicircum{}"
     r"\textasciigrave{}\textbackslash{}'''\}"),
    ("↓×·∞", r"$\downarrow$$\times$$\cdot$$\infty$"),
    ("αβγδεθκλμπσςτφχψωΔΘΛΣΩ", "".join(
      rf"$\{name}$" for name in
      ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "kappa",
       "lambda", "mu", "pi", "sigma", "varsigma", "tau", "phi", "chi", "psi",
       "omega", "Delta", "Theta", "Lambda", "Sigma", "Omega"))),
    # These have no command of their own.
    ("ΑΒοΧ", "ABoX"),
    ("--no_x --- – “a” it’s …", r"-{}-no\_x -{}-{}- \textendash{}"
     r" \textquotedblleft{}a\textquotedblright{} it\textquoteright{}s"
     r" \ldots{}"),
    ("éïçÅñšß", r"\'{e}" r"\"{\i}" r"\c{c}" r"\r{A}\~{n}\v{s}\ss{}"),
    ("10⁸ x₂ 5\u00a0µm", r"10\textsuperscript{8} x\textsubscript{2} 5 $\mu$m"),
    ("胸 ắ", r"\texttt{U+80F8} \texttt{U+1EAF}"),
  ],
)  # fmt: skip
def test_latex_of_characters(text, expected):
  code = exports.latex(tables.table(("x",), [(text,)]))
  assert code.splitlines()[7] == f"{expected} \\\\"


def test_all_characters_are_ascii_and_braces_balance():
  text = "".join(chr(x) for x in (*range(1, 0x2700), 0xDC80, 0x1F600))
  code = exports.latex(tables.table(("x", "y"), {text: [(text, text[::-1])]}))
  assert code.isascii()
  assert code.replace("\n", "").isprintable()
  bare = re.sub(r"\\[\\{}%&$#_]", "", code)
  depth = np.cumsum([(x == "{") - (x == "}") for x in bare])
  assert depth.min() == 0
  assert depth[-1] == 0
  assert bare.count("$") % 2 == 0
  # What is left of these is the table's own.
  assert "#" not in bare
  assert "%" not in bare
  assert bare.count("&") == 2


def test_columns_are_to_the_right_where_they_are_figures():
  rows = [
    ("1", "1.5 s", "words " * 12, "reference", "2"),
    ("1", "–", "", "–0.1", "yes"),
  ]
  code = exports.latex(tables.table((), rows))
  assert r"\begin{tabular}{lrp{.4\linewidth}ll}" in code


def test_tables_without_rows_and_figures_without_panels_leave_no_file(tmp_path):
  empty = tables.table(("a", "b"), [])
  exports.write_tables(tmp_path / "tables", {"empty": empty})
  figures.write({"none": []}, tmp_path / "figures", columns={})
  assert not list(tmp_path.iterdir())
  assert exports.markdown(empty) == "| a | b |\n|---|---|\n"


_DRAW = """
from experiments.pages import figures, panels
tile = panels.Tile.of("A", "", {"original": 0.5}, is_time=False)
figures.save([panels.summary(tile)] * 2, path, num_columns=2)
"""


def test_pictures_are_the_same_bytes_in_every_process(tmp_path):
  exec(_DRAW, {"path": tmp_path / "here"})
  place = f"import pathlib\npath = pathlib.Path({str(tmp_path / 'there')!r})"
  command = [sys.executable, "-c", place + _DRAW]
  # Sets have another order in the other process.
  environment = os.environ | {"PYTHONHASHSEED": "1"}
  subprocess.run(command, env=environment, check=True, cwd=ROOT)
  for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
    content = (tmp_path / f"here.{kind}").read_bytes()
    assert content.startswith(start)
    assert content == (tmp_path / f"there.{kind}").read_bytes()
  # The font is in the file, as TrueType, and no date is.
  assert b"/FontFile2" in content
  assert b"/Type3" not in content
  assert b"Date" not in content


def test_a_picture_that_cannot_be_drawn_leaves_no_file(tmp_path):
  def draw(axes):
    raise ValueError("no")

  with pytest.raises(ValueError, match="no"):
    figures.save([figures.Panel(draw, "")], tmp_path / "a", num_columns=1)
  assert not list(tmp_path.iterdir())


def test_a_run_leaves_all_that_its_page_shows(tmp_path):
  folder = report_test.make_run(tmp_path / "run")
  page = report.build(folder)
  shown = ("comparison", "classes", "options")
  pictures = ("summary", "examples", "classes", "features", "curves")
  kinds = {
    "tables": (shown, ("csv", "md", "tex")),
    "figures": ((*pictures, "confusion"), ("png", "pdf")),
  }
  for name, (names, endings) in kinds.items():
    paths = list((folder / name).iterdir())
    assert {x.name for x in paths} == {
      f"{x}.{ending}" for x in names for ending in endings
    }
    assert all(0 < x.stat().st_size < exports.MAX_BYTES for x in paths)
  _, rows = files.read_csv(folder / "tables" / "comparison.csv")
  section = "Accuracy (ideal: as retrained)"
  assert {"Section": section, "Measure": "Forget, test"}.items() <= (
    rows[1].items()
  )
  assert rows[1]["Unlearned"] == "2.8%"
  assert page.stat().st_size < 1_000_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A run, of whose page no pictures are kept, to be quick."""
  monkeypatch.setattr(figures, "save", lambda *_, **__: None)
  monkeypatch.setattr(figures, "save_examples", lambda *_: None)
  return report_test.make_run(tmp_path / "run")


def test_images_of_a_page_that_is_too_large_are_made_smaller(
  folder, monkeypatch
):
  image = re.compile(r"(?<=image/png;base64,)[\w+/=]+")
  whole = report.build(folder).read_text()
  most = len(whole.encode()) - 2_000
  monkeypatch.setattr(exports, "MAX_BYTES", most)
  text = report.build(folder).read_text()
  assert len(text.encode()) <= most
  assert image.sub("", text) == image.sub("", whole)
  sides = [
    Image.open(io.BytesIO(base64.b64decode(x))).size
    for x in image.findall(text)
  ]
  assert sides == [(16, 16)] * 24


def test_a_page_that_stays_too_large_is_not_written(folder, monkeypatch):
  monkeypatch.setattr(exports, "MAX_BYTES", 50_000)
  with pytest.raises(ValueError, match=r"report.html must have at most 50,000"):
    report.build(folder)
  names = {x.name for x in folder.iterdir()}
  assert not names & {"report.html", "tables"}
  assert not list(folder.rglob("*.partial*"))


def test_of_a_long_table_the_page_has_the_beginning(folder, monkeypatch):
  monkeypatch.setattr(exports, "MAX_ROWS", 7)
  page = report.build(folder).read_text()
  assert "and 3 more, in <code>tables</code>" in page
  text = (folder / "tables" / "classes.csv").read_text()
  assert len(text.splitlines()) == 11
