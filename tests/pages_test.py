"""What pages are made of: cells, rows, tables, and pictures."""

import markupsafe
import pytest

from experiments import cells
from experiments.pages import figures, panels, request, tables


def test_a_missing_figure_says_so_and_why():
  cell = tables.cell(None, tables.percent, "too few images", "retrained")
  assert cell == ("not available", "too few images", "retrained none")
  # A figure may be there whose text is not.
  assert tables.cell({}, lambda _: None).text == "not available"
  assert tables.cell(0.0, tables.percent) == ("0.0%", None, "")
  assert tables.percent(float("inf")) == "not finite"


def test_rows_of_models_find_figures_by_their_way():
  models = tables.Models(
    {"original": {"per_class": [0.5, None]}, "retrained": {}}
  )
  row = models.row("a", "per_class", 0)
  assert [cell.text for cell in row.cells] == ["50.0%", "not available"]
  assert [cell.style for cell in row.cells] == ["original", "retrained none"]
  for label in (1, 2):
    assert models.get("original", "per_class", label) is None
  assert models.known("per_class", 0) == {"original": 0.5}
  words = {"retrained": tables.REFERENCE}
  row = models.row("a", "per_class", 0, instead=words).led_by(12)
  assert [cell.text for cell in row.cells] == ["12", "50.0%", "reference"]


def test_tables_have_groups_with_notes():
  row = tables.Row(tables.Cell("c"), [tables.Cell("3")])
  rows = {("a", "note"): [("b", 1)], "d": [row]}
  table = tables.table(("x", tables.Cell("y", style="dot")), rows)
  assert [head.style for head in table.heads] == ["", "dot"]
  assert [group[1:] for group in table.groups] == [("a", "note"), ("d", "")]
  assert table.groups[0].rows[0].cells[0].text == "1"
  assert table.groups[1].rows == [row]
  markup = markupsafe.Markup("<code>a</code>")
  text = tables.table((), [(markup,)]).groups[0].rows[0].head.text
  assert isinstance(text, markupsafe.Markup)


def test_tables_as_text():
  rows = [["", "long head", "last"], ["name", "1", "x"]]
  assert tables.aligned(rows) == "      long head  last\nname          1  x"


@pytest.mark.parametrize(("count", "last"), [(15, "14"), (17, "and 2 more")])
def test_few_rows_of_a_preview_are_shown(count, last):
  values = {str(i): {"forget": count - i, "retain": 0} for i in range(count)}
  data = {
    "class_names": [],
    "request": {"where": "a < b"},
    "request_sha256": "",
    "forget_ids_sha256": "",
    "preview": {"num_forget": 1, "num_retain": 2},
  }
  data["preview"] |= {"classes": values, "columns": {"class": {}}}
  page = request.overview(data)
  names = [group.name for group in page["preview"].groups]
  assert names == ["Images", "By class", "By class"]
  assert page["preview"].groups[1].rows[-1].head.text == last
  # What users wrote is text.
  assert page["criteria"] == [("where", "<code>a &lt; b</code>")]


def test_pictures_have_columns_and_names_of_their_own(tmp_path):
  tile = panels.Tile.of("A <b>", "", {"original": 0.5}, is_time=False)
  one = [panels.summary(tile)]
  pictures = figures.write(
    {"none": [], "a": one, "b": 3 * one}, tmp_path / "files", columns={3: 3}
  )
  assert [x.columns for x in pictures.values()] == [2, 2, 3]
  assert {x.name for x in (tmp_path / "files").iterdir()} == {
    *("a.png", "a.pdf", "b.png", "b.pdf")
  }
  assert 'aria-label="A &lt;b&gt;: original 50.0%"' in pictures["a"].svgs[0]
  assert pictures["a"].svgs[0] != pictures["b"].svgs[1]


def test_changed_arguments_are_named():
  assert cells.change(None, {"a": 1}) is None
  # As JSON has it: a tuple comes back as a list.
  assert cells.change({"a": [1]}, {"a": (1,)}) is None
  assert cells.change({"a": 1, "b": 2}, {"a": 1}) == ("b", 2, None)


def test_a_run_is_finished_when_its_record_is_there(tmp_path):
  store = cells.Store(tmp_path / "x" / "a.json", tmp_path / "x" / "a.npz")
  assert not store.is_done()
  assert store.read() == {}
  store.write({"status": cells.DIVERGED}, {})
  assert store.is_done()
  assert not store.logits.exists()
