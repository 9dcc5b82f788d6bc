"""Pages, and what they show as files for papers.

Beside a page lie `figures/NAME.png` and `.pdf` of each picture, and
`tables/NAME.csv`, `.md` and `.tex` of each table. The text of a cell is that of
the page. LaTeX needs pdflatex alone, and draws finer rules with booktabs.
"""

import base64
import functools
import io
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from experiments import files
from experiments.pages import figures, tables

MAX_BYTES = 5_000_000
"""No page is larger."""
MAX_ROWS = 1000
"""More rows of a group are in the files of a table alone."""
_MIN_SIDE = 16
_EMBEDDED = re.compile(r"(?<=data:image/png;base64,)[A-Za-z0-9+/=\s]+")
# Text of more characters than this goes over several lines.
_WIDE = 50
_FIGURE = re.compile(r"[-+−<>≈↑↓→]? ?\d")
_SECTION = "Section"

_MATH = {
  **{"±": "pm", "×": "times", "·": "cdot", "÷": "div"},
  **{"↑": "uparrow", "↓": "downarrow", "→": "rightarrow", "←": "leftarrow"},
  **{"≈": "approx", "≠": "neq", "≤": "leq", "≥": "geq", "∝": "propto"},
  **{"∞": "infty", "√": "surd", "∇": "nabla", "∑": "sum", "‖": "|"},
  **{"∪": "cup", "∩": "cap", "∈": "in", "ς": "varsigma"},
  **{
    x: name.lower() if x.islower() else name.capitalize()
    for x in "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ"
    for name in [unicodedata.name(x).split()[-1].replace("LAMDA", "LAMBDA")]
  },
}
_LATEX = {
  **{x: f"\\{x}" for x in "&%$#_{}"},
  **{x: f"$\\{name}$" for x, name in _MATH.items()},
  # Greek letters that look like others have no command.
  **dict(zip("οΑΒΕΖΗΙΚΜΝΟΡΤΧ", "oABEZHIKMNOPTX", strict=True)),
  **{"−": "$-$", "°": r"$^\circ$", '"': "''", "…": r"\ldots{}"},
  **{
    x: f"\\text{name}{{}}"
    for x, name in (
      *(("\\", "backslash"), ("~", "asciitilde"), ("^", "asciicircum")),
      *(("`", "asciigrave"), ("<", "less"), (">", "greater"), ("|", "bar")),
      *(("–", "endash"), ("—", "emdash"), ("‘", "quoteleft")),
      *(("’", "quoteright"), ("“", "quotedblleft"), ("”", "quotedblright")),
    )
  },
  **{"ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}", "Ø": r"\O{}"},
  **{"œ": r"\oe{}", "Œ": r"\OE{}", "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}"},
}
# Combining marks, and the command that sets each over or under a letter.
_ACCENTS = dict(
  zip(
    "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327",
    "`'^~=u.\"rHvc",
    strict=True,
  )
)
_SCRIPTS = {"<super>": "textsuperscript", "<sub>": "textsubscript"}
# Without booktabs its rules are LaTeX's own.
_RULES = [
  f"\\providecommand{{\\{name}rule}}{{\\hline}}"
  for name in ("top", "mid", "bottom")
]


def write_page(
  path: pathlib.Path,
  template: str,
  *,
  pictures: Mapping[str, Sequence[figures.Panel]] | None = None,
  columns: Mapping[int, int] | None = None,
  **values: Any,
) -> None:
  """Writes a page, and beside it what it shows: the one way to a page.

  Every table among the values is also written as files, named after its value:
  a table, and those of a mapping (`clinical_missed` is `clinical["missed"]`).
  Each file, the page last, appears as a whole or not at all.

  Args:
    path: The page.
    template: Its file name, in the folder of the programs.
    pictures: Panels by name; the template is given each as a
      `figures.Picture`. Files of pictures that it does not show are written.
    columns: How many columns a number of panels has; see `figures.write`.
    **values: What else the template names; all of it must be given. They are
      escaped.

  Raises:
    ValueError: If the page has more than `MAX_BYTES`, even with its images at
      a few pixels.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parents[1]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.globals["max_rows"] = MAX_ROWS
  drawn = figures.write(
    pictures or {}, path.parent / "figures", columns=columns or {}
  )
  page = environment.get_template(template).render(pictures=drawn, **values)
  text = _fitted(page, path)
  write_tables(path.parent / "tables", dict(_tables(values)))
  files.write_text(path, text)


def write_tables(
  folder: pathlib.Path, shown: Mapping[str, tables.Table]
) -> None:
  """Writes tables as CSV, Markdown and LaTeX; what is there is replaced.

  Args:
    folder: Where they go, which is made.
    shown: Tables by the name of their files; those without rows are left out.
  """
  formats = {"csv": csv, "md": markdown, "tex": latex}
  for name, table in shown.items():
    if any(group.rows for group in table.groups):
      folder.mkdir(exist_ok=True)
      for ending, text_fn in formats.items():
        files.write_text(folder / f"{name}.{ending}", text_fn(table))


def csv(table: tables.Table) -> str:
  """Returns a table as CSV, in which nothing is a formula.

  Where groups have names, these are the first column.
  """
  is_grouped = any(group.name for group in table.groups)
  rows = [_texts(table.heads)] if table.heads else []
  sections = [_SECTION] if rows else []
  for group in table.groups:
    rows += [_texts((row.head, *row.cells)) for row in group.rows]
    sections += [_title(group)] * len(group.rows)
  if is_grouped:
    rows = [[x, *row] for x, row in zip(sections, rows, strict=True)]
  return files.to_csv(rows)


def markdown(table: tables.Table) -> str:
  """Returns a table in Markdown; what is bold on the page is bold."""
  width = _width(table)
  heads = _texts(table.heads) or [""] * width
  rows = []
  for group in table.groups:
    if group.name:
      title = f"**{_in_markdown(_title(group))}**"
      rows.append([title, *[""] * (width - 1)])
    rows += [_marked(row, _in_markdown, "**{}**") for row in group.rows]
  cells = [list(map(_in_markdown, heads)), *rows]
  head, *lines = [f"| {' | '.join(row)} |" for row in cells]
  return "\n".join([head, f"|{'---|' * width}", *lines, ""])


def latex(table: tables.Table) -> str:
  """Returns a table in LaTeX, a `tabular` to be put into a document."""
  width = _width(table)
  blocks = []
  if table.heads:
    blocks.append([_row(map(_in_latex, _texts(table.heads)))])
  for group in table.groups:
    block = [_row(_marked(x, _in_latex, r"\textbf{{{}}}")) for x in group.rows]
    if group.name:
      title = rf"\textit{{{_in_latex(_title(group))}}}"
      block.insert(0, _row([rf"\multicolumn{{{width}}}{{l}}{{{title}}}"]))
    blocks.append(block)
  body = "\n\\midrule\n".join("\n".join(block) for block in blocks if block)
  lines = [
    *_RULES,
    rf"\begin{{tabular}}{{{_alignments(table, width)}}}",
    *("\\toprule", body, "\\bottomrule", "\\end{tabular}", ""),
  ]
  return "\n".join(lines)


def _tables(
  values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tables.Table]]:
  """Yields the tables among values, those of mappings named after both."""
  for name, value in values.items():
    if isinstance(value, tables.Table):
      yield f"{prefix}{name}", value
    elif isinstance(value, Mapping):
      yield from _tables(value, f"{prefix}{name}_")


def _fitted(text: str, path: pathlib.Path) -> str:
  """Makes the images of a page smaller until it is not too large."""
  while len(text.encode(errors="backslashreplace")) > MAX_BYTES:
    thinner = _EMBEDDED.sub(lambda x: _halved(x.group()), text)
    if thinner == text:
      raise ValueError(
        f"{path} must have at most {MAX_BYTES:,} bytes, got more than"
        f" {len(text):,} with its images at a few pixels"
      )
    text = thinner
  return text


def _halved(encoded: str) -> str:
  """Returns an encoded PNG with half as many pixels a side."""
  picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
  size = [max(1, side // 2) for side in picture.size]
  if max(size) < _MIN_SIDE:
    return encoded
  buffer = io.BytesIO()
  smaller = picture.resize((size[0], size[1]), Image.Resampling.BOX)
  smaller.save(buffer, "PNG", optimize=True)
  return base64.b64encode(buffer.getvalue()).decode("ascii")


def _texts(cells: Sequence[tables.Cell]) -> list[str]:
  """Returns what cells say, in one line each and without markup."""
  return [
    " ".join((x.striptags() if isinstance(x, markupsafe.Markup) else x).split())
    for x in (cell.text for cell in cells)
  ]


def _title(group: tables.Group) -> str:
  return f"{group.name} ({group.note})" if group.note else group.name


def _width(table: tables.Table) -> int:
  rows = (row for group in table.groups for row in group.rows)
  return max([len(table.heads), *(1 + len(row.cells) for row in rows)])


def _marked(
  row: tables.Row, text_fn: Callable[[str], str], bold: str
) -> list[str]:
  """Returns the text of a row's cells, bold where the page has it so."""
  is_bold = [row.style == "ours"]
  is_bold += ["best" in cell.style.split() for cell in row.cells]
  texts = map(text_fn, _texts((row.head, *row.cells)))
  marks = ((bold if x else "{}") for x in is_bold)
  return [mark.format(x) for mark, x in zip(marks, texts, strict=True)]


def _in_markdown(text: str) -> str:
  return re.sub(r"([\\|<*`])", r"\\\1", text)


def _row(cells: Iterable[str]) -> str:
  line = " & ".join(cells)
  # The end of the line before would take these for its own.
  return ("{}" if line[:1] in ("[", "*") else "") + line + r" \\"


def _alignments(table: tables.Table, width: int) -> str:
  """Says which columns of a table in LaTeX are to the right, or are wide."""
  rows = [
    _texts((row.head, *row.cells))
    for group in table.groups
    for row in group.rows
  ]
  letters = ""
  for i in range(width):
    column = [row[i] for row in rows if i < len(row)]
    words = ("", "–", tables.NOT_AVAILABLE, tables.REFERENCE)
    has_figures = all(_FIGURE.match(x) for x in column if x not in words)
    if max(map(len, column), default=0) > _WIDE:
      letters += r"p{.4\linewidth}"
    else:
      letters += "r" if i and has_figures else "l"
  return letters


def _in_latex(text: str) -> str:
  text = "".join(map(_in_latex_alone, unicodedata.normalize("NFC", text)))
  # Two hyphens would be a dash.
  return re.sub(r"-(?=-)", "-{}", text)


@functools.cache
def _in_latex_alone(character: str) -> str:
  """Returns one character; one that pdflatex cannot set is its number."""
  if character in _LATEX:
    return _LATEX[character]
  if character.isascii():
    return character if character.isprintable() else " "
  parts = unicodedata.normalize("NFD", character)
  base, marks = parts[0], parts[1:]
  if marks in _ACCENTS and base.isascii():
    letter = f"\\{base}" if base in "ij" else base
    return f"\\{_ACCENTS[marks]}{{{letter}}}"
  kind, *_ = unicodedata.decomposition(character).split() or [""]
  alike = unicodedata.normalize("NFKC", character)
  if alike == character or not all(x.isascii() or x in _LATEX for x in alike):
    return rf"\texttt{{U+{ord(character):04X}}}"
  alike = _in_latex(alike)
  return f"\\{_SCRIPTS[kind]}{{{alike}}}" if kind in _SCRIPTS else alike
