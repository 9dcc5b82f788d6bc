"""Conditions: what SQL may ask of the metadata, and its answer for each image.

A condition is checked as DuckDB parses it, and decided by DuckDB in a database
that sees one table and nothing else, in limited time.
"""

import contextlib
import datetime
import functools
import itertools
import json
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from psg_jax import types
from psg_jax.forget import columns

TIME_LIMIT = 30.0
"""Seconds for one condition."""
GRACE = 1.0
"""Seconds for which one that is interrupted is waited for."""
_MAX_DEPTH = 200
# The table that a condition sees has these besides the metadata.
_OWN_COLUMNS = ("id", "label", "row")
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
  # One thread: what has no order of its own has that of the table.
  "threads": 1,
  "enable_external_access": "false",
  "autoload_known_extensions": "false",
  "autoinstall_known_extensions": "false",
  "python_enable_replacements": "false",
}
# Times with a zone are compared alike on every machine.
_LOCK = "SET TimeZone = 'UTC'; SET lock_configuration = true"
# Beside what DuckDB itself says of its functions.
_UNSTABLE = frozenset(
  {
    *("current_localtime", "current_localtimestamp", "current_time"),
    *("current_timestamp", "localtime", "localtimestamp", "version"),
    *("reservoir_quantile", "json_serialize_plan"),
  }
)
_TABLE_FUNCTIONS = frozenset(
  {"unnest", "range", "generate_series", "repeat", "json_each", "json_tree"}
)
_KEEPING = frozenset(
  {
    *("trim", "ltrim", "rtrim", "lower", "upper", "lcase", "ucase", "concat"),
    *("||", "min", "max", "first", "last", "any_value", "nullif", "ifnull"),
  }
)
_ORDERED = ("LESSTHAN", "GREATERTHAN", "BETWEEN")
# Each digit a 9: dates that letters sort.
_SORTED_DATES = ("9999-99-99", "9999/99/99", "9999.99.99", "99999999")
_DATE_TEXT = re.compile(
  r"\d{1,4}([-/. ])(\d{1,2}|[^\W\d]{3,9})\1\d{1,4}([ T,].*)?|(19|20)\d{6}"
)
_NUMBER_TEXT = re.compile(r"[+-]?\d+([.,]\d+)*")
_DATE_FORMS = tuple(
  f"{day}{time}"
  for day in (
    *("%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d/%m/%y", "%m/%d/%y"),
    *("%d %b %Y", "%d %B %Y", "%b %d %Y", "%B %d %Y"),
  )
  for time in ("", " %H:%M", " %H:%M:%S", " %I:%M %p", "T%H:%M:%S")
)
_UNKNOWN_COLUMN = re.compile(
  'Referenced column "([^"]+)" not found|column named "([^"]+)"'
)
# Line breaks keep a comment in the condition from reaching further.
_QUERY = "SELECT row FROM metadata WHERE (\n{}\n)"
_DECISION = (
  'SELECT * FROM (SELECT row, (\n{}\n) AS "is true" FROM metadata)'
  ' WHERE "is true" IS DISTINCT FROM FALSE'
)


def _table(dataset: types.Dataset) -> pa.Table:
  """The table that a condition sees."""
  if dataset.metadata is None:
    raise ValueError("where needs metadata, and dataset has none")
  table = {
    columns.nfc(name): _normal(column)
    for name, column in zip(
      dataset.metadata.column_names, dataset.metadata.columns, strict=True
    )
    if name.casefold() not in _OWN_COLUMNS
  }
  table["id"] = _normal(pa.array(dataset.ids))
  table["label"] = pa.DictionaryArray.from_arrays(
    dataset.labels,
    pa.array(map(columns.nfc, dataset.class_names), pa.string()),
  )
  table["row"] = pa.array(np.arange(len(dataset)))
  return pa.table(table)


def _normal(column: Any) -> Any:
  """A column in one form of texts that look the same."""
  if columns.is_text(column.type):
    return pc.utf8_normalize(column, form="NFC")
  return column


@contextlib.contextmanager
def _open(table: pa.Table) -> Iterator[duckdb.DuckDBPyConnection]:
  """Opens a database in memory that sees one table and nothing else."""
  connection = duckdb.connect(":memory:", config=_CONFIG)
  try:
    connection.register("metadata", table)
    connection.execute(_LOCK)
    yield connection
  finally:
    connection.close()


def check(dataset: types.Dataset, where: str) -> tuple[str, ...]:
  """Checks that `where` is one condition, and can be repeated.

  Around the condition the parsed statement must be what it is around `true`:
  so it cannot have closed the parenthesis to go on with something else. In it,
  only what makes the same of the same table is let in.

  Args:
    dataset: Images with metadata.
    where: The condition, in Unicode's normal form C.

  Returns:
    The metadata columns that it names, sorted.

  Raises:
    ValueError: If it is not.
  """
  start = _start(where)
  condition = _condition(where, start)
  names = [] if dataset.metadata is None else dataset.metadata.column_names
  known: dict[str, list[str]] = {}
  for name in dict.fromkeys((*names, *_OWN_COLUMNS)):
    known.setdefault(columns.nfc(name).casefold(), []).append(name)
  named = {
    name.casefold()
    for node in _nodes(condition)
    for name in node.get("column_names") or ()
  }
  for name in sorted(named):
    if len(known.get(name, [])) > 1:
      raise ValueError(
        f"{start}: the columns {' and '.join(known[name])} differ only in case"
        " or in the form of their accents"
      )
  _check_sources(condition, start)
  _check_functions(condition, named.difference(known), start)
  used = [known[name][0] for name in named if name in known]
  in_metadata = tuple(sorted(name for name in used if name in names))
  _check_texts(dataset, condition, in_metadata, start)
  return in_metadata


def _start(where: str) -> str:
  return f"where must be one SQL condition, got {columns.short(where)!r}"


@functools.lru_cache(maxsize=16)
def _condition(where: str, start: str) -> Any:
  """Returns the parsed condition, if it is one and no more."""
  # The parser's time grows with the square of the depth or worse.
  if _depth(where) > _MAX_DEPTH:
    raise ValueError(f"{start}: its parentheses are deeper than {_MAX_DEPTH}")
  with contextlib.closing(
    duckdb.connect(":memory:", config=_CONFIG)
  ) as connection:
    try:
      parsed = _parse(connection, where)
    except (duckdb.Error, RecursionError, ValueError) as error:
      raise ValueError(f"{start}: {columns.short(str(error))}") from None
    if parsed["error"]:
      raise ValueError(f"{start}: {columns.short(parsed['error_message'])}")
    frame = _parse(connection, "true")
  conditions = [
    statement["node"].pop("where_clause", None)
    for statement in parsed["statements"]
  ]
  frame["statements"][0]["node"].pop("where_clause")
  if parsed != frame or not where.strip():
    raise ValueError(f"{start}: it goes beyond a condition")
  return conditions[0]


def _check_sources(condition: Any, start: str) -> None:
  """Raises ValueError for a random sample, or tables beside the metadata."""
  named = {"metadata"}
  for node in _nodes(condition):
    defined = (node.get("cte_map") or {}).get("map") or []
    named |= {str(item["key"]).casefold() for item in defined}
  for node in _nodes(condition):
    kind = "" if "class" in node else str(node.get("type", ""))
    table = str(node.get("table_name", ""))
    schema = node.get("schema_name") or "main"
    is_known = table.casefold() in named and schema in ("main", "temp")
    function = (node.get("function") or {}) if kind == "TABLE_FUNCTION" else {}
    called = str(function.get("function_name", ""))
    if node.get("sample"):
      raise ValueError(f"{start}: its sample is drawn at random")
    if kind == "BASE_TABLE" and not is_known:
      raise ValueError(
        f"{start}: the table {table} does not exist, metadata alone does"
      )
    if called and called.casefold() not in _TABLE_FUNCTIONS:
      raise ValueError(f"{start}: the table function {called} is disabled")
    if kind in ("SHOW_REF", "PIVOT"):
      raise ValueError(f"{start}: DESCRIBE, SUMMARIZE and PIVOT are disabled")


def _check_functions(condition: Any, others: set[str], start: str) -> None:
  """Raises ValueError for what differs from one time to the next.

  Args:
    condition: Parsed.
    others: Names in it that are no columns, in lower case.
    start: Of the message.
  """
  called = set()
  for node in _nodes(condition):
    name = str(node.get("function_name", "")).casefold()
    arguments = node.get("arguments", node.get("children")) or []
    # The age of one date is that of today.
    called.add("today" if name == "age" and len(arguments) == 1 else name)
  # Some have no parentheses, as columns have none.
  bare = {name for name in others if name.startswith(("curr", "local"))}
  changing = (called | bare) & _changing()
  if changing:
    raise ValueError(
      f"{start}: {columns.few(sorted(changing))} depends on more than the"
      " metadata"
    )


class _Comparison(NamedTuple):
  """What a condition compares.

  Attributes:
    names: Columns, in lower case.
    literals: Texts that stand in the condition.
    is_ordered: Whether it asks which comes first.
  """

  names: frozenset[str]
  literals: list[str]
  is_ordered: bool


def _comparisons(condition: Any) -> Iterator[_Comparison]:
  for node in _nodes(condition):
    operands = _operands(node)
    if operands:
      yield _Comparison(
        names=frozenset(map(_name, operands)),
        literals=[text for operand in operands for text in _literals(operand)],
        is_ordered=any(word in str(node["type"]) for word in _ORDERED),
      )


def _check_texts(
  dataset: types.Dataset, condition: Any, names: Sequence[str], start: str
) -> None:
  """Refuses dates and numbers that would be compared by their letters.

  Raises:
    ValueError: If a column of text is put in an order with dates or numbers,
      unless all are dates in ISO form; or if texts such as 14/02/2018 are held
      against a date in ISO form.
  """
  comparisons = list(_comparisons(condition))
  for name in names:
    key = columns.nfc(name).casefold()
    compared = [x for x in comparisons if key in x.names]
    column = dataset.metadata.column(name)
    if not compared or columns.kind(column.type) != "text":
      continue
    texts = _texts(column)
    is_date = all(map(_DATE_TEXT.fullmatch, texts))
    shapes = {_shape(text) for text in texts}
    is_number = all(map(_NUMBER_TEXT.fullmatch, texts)) and len(shapes) > 1
    is_sorted = shapes.issubset(_SORTED_DATES) and len(shapes) == 1
    for _, literals, is_ordered in compared:
      dates = {_shape(x) for x in literals if _DATE_TEXT.fullmatch(x)}
      is_other = bool(dates) and not (is_sorted and dates == shapes)
      is_read_wrong = is_other or (is_date and not is_sorted)
      if is_ordered:
        is_wrong = is_read_wrong or (is_number and bool(literals))
      else:
        is_wrong = is_date and is_other and bool(dates - shapes)
      if is_wrong:
        hint = f"TRY_CAST({name} AS DATE) < DATE '2016-01-31'"
        if is_number and not is_date:
          hint = f"replace({name}, ',', '.')::DOUBLE > 3"
        elif is_date and not is_sorted:
          form = _date_form(texts)
          hint = f"strptime({name}, '{form}') < TIMESTAMP '2016-01-31'"
        raise ValueError(
          f"{start}: the column {name} is text, such as"
          f" {columns.short(texts[0])!r}, and would be compared by its letters:"
          f" say how to read it, such as {hint}"
        )


def _texts(column: pa.ChunkedArray) -> list[str]:
  """The different texts of a column without outer blanks; one at least."""
  column = pc.utf8_trim_whitespace(columns.plain(column))
  texts = pc.unique(column).drop_null().to_pylist()
  return [text for text in texts if text] or [""]


def _date_form(texts: Sequence[str]) -> str:
  """Returns how dates are written, as `strptime` takes it; a guess."""
  separator = next((x for x in "/-. " if x in texts[0]), "/")
  for form in _DATE_FORMS:
    form = form.replace("/", separator)
    with contextlib.suppress(ValueError):
      for text in texts:
        datetime.datetime.strptime(text, form)
      return form
  return "%d/%m/%Y"


def _shape(text: str) -> str:
  """The form of a date's text."""
  return re.sub(r"\d", "9", text.strip()[:10])


def _operands(node: Mapping[str, Any]) -> list[Any]:
  """What a comparison compares; nothing of another node."""
  if node.get("class") == "COMPARISON":
    return [node["left"], node["right"]]
  if node.get("class") == "BETWEEN":
    return [node["input"], node["lower"], node["upper"]]
  if node.get("type") in ("COMPARE_IN", "COMPARE_NOT_IN"):
    return list(node["children"])
  return []


def _name(operand: Mapping[str, Any]) -> str:
  """The column that an operand is, but for functions that keep its form."""
  while str(operand.get("function_name", "")).casefold() in _KEEPING:
    arguments = operand.get("arguments", operand.get("children")) or [{}]
    operand = arguments[0].get("expression", arguments[0])
  return str((operand.get("column_names") or [""])[-1]).casefold()


def _literals(operand: Mapping[str, Any]) -> list[str]:
  """The text that an operand is, if it is one."""
  literal = operand.get("literal") or operand.get("value") or {}
  text = literal.get("text", literal.get("value"))
  is_number = literal.get("kind", "STRING") != "STRING"
  return [text] if isinstance(text, str) and not is_number else []


def _depth(where: str) -> int:
  """How deep parentheses are at most; those in texts count as well."""
  steps = [1 if c in "([{" else -1 for c in where if c in "([{}])"]
  return max(itertools.accumulate(steps), default=0)


def _parse(connection: duckdb.DuckDBPyConnection, where: str) -> dict[str, Any]:
  query = _QUERY.format(where)
  answer = connection.execute(
    "SELECT json_serialize_sql(?::VARCHAR)", [query]
  ).fetchone()
  return json.loads(answer[0]) if answer else {"error": True}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
  """Yields all objects of a parsed statement, however deep."""
  waiting = [tree]
  while waiting:
    node = waiting.pop()
    if isinstance(node, dict):
      yield node
      waiting += node.values()
    elif isinstance(node, list):
      waiting += node


@functools.cache
def _changing() -> frozenset[str]:
  """Functions, like random and today, that no split can be repeated with."""
  with contextlib.closing(
    duckdb.connect(":memory:", config=_CONFIG)
  ) as connection:
    rows = connection.execute(
      "SELECT function_name, function_type, stability, macro_definition"
      " FROM duckdb_functions()"
    ).fetchall()
  names = _UNSTABLE | {
    name
    for name, kind, stability, _ in rows
    if kind == "scalar" and stability != "CONSISTENT"
  }
  words = {
    name: set(re.findall(r"\w+", definition.casefold())) - {name}
    for name, kind, _, definition in rows
    if kind == "macro" and definition
  }
  names |= {name for name, used in words.items() if "from" in used}
  size = 0
  while size < len(names):
    size = len(names)
    names |= {name for name, used in words.items() if used & names}
  return names


_Answer: TypeAlias = tuple[np.ndarray, int]
_decided: weakref.WeakKeyDictionary[
  types.Dataset, dict[str, _Answer | ValueError]
] = weakref.WeakKeyDictionary()


def decide(dataset: types.Dataset, where: str) -> tuple[np.ndarray, int]:
  """Decides a checked condition for each image, once, in the time limit.

  Args:
    dataset: Images with metadata.
    where: What `check` let pass.

  Returns:
    Whether it is true, bool `[N]`, and for how many images it is undecided.

  Raises:
    ValueError: If DuckDB refuses it, or it takes too long.
  """
  answers = _decided.setdefault(dataset, {})
  if where not in answers:
    try:
      answers[where] = _decide_in_time(dataset, where)
    except ValueError as error:
      answers[where] = error
  answer = answers[where]
  if isinstance(answer, ValueError):
    raise answer.with_traceback(None)
  return answer


def _decide_in_time(
  dataset: types.Dataset, where: str
) -> tuple[np.ndarray, int]:
  results: list[Any] = []
  connections: list[duckdb.DuckDBPyConnection] = []
  tables = _table(dataset)

  def work() -> None:
    try:
      with _open(tables) as connection:
        connections.append(connection)
        results.append(run(connection, tables, where))
    except Exception as error:
      results.append(error)

  # What does not heed the interrupt is left behind, and ends with the program.
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(TIME_LIMIT)
  end = time.monotonic() + GRACE
  is_late = thread.is_alive()
  while thread.is_alive() and time.monotonic() < end:
    # It may have ended meanwhile.
    with contextlib.suppress(duckdb.Error):
      for connection in connections:
        connection.interrupt()
    thread.join(0.05)
  if is_late:
    raise ValueError(
      f"where must be decided within {TIME_LIMIT:g} s, got"
      f" {columns.short(where)!r}"
    )
  if isinstance(results[0], Exception):
    raise results[0]
  rows, num_undecided = results[0]
  is_true = np.zeros(len(dataset), bool)
  is_true[rows] = True
  return is_true, num_undecided


def run(
  connection: duckdb.DuckDBPyConnection, table: pa.Table, where: str
) -> tuple[np.ndarray, int]:
  """Asks the database.

  Returns:
    The rows for which a condition is true, and for how many it is undecided.
  """
  start = _start(where)
  try:
    # What must not stand in a condition, such as sums, is refused here.
    connection.execute(f"DESCRIBE {_QUERY.format(where)}")
    described = connection.execute(
      f"DESCRIBE SELECT (\n{where}\n) FROM metadata"
    ).fetchone()
    kind = described[1] if described else ""
    if kind not in ("BOOLEAN", '"NULL"'):
      raise ValueError(f"{start}: it is of type {kind}, not true or false")
    answer = connection.execute(_DECISION.format(where)).fetchnumpy()
  except duckdb.Error as error:
    raise ValueError(
      f"{start}: {_explain(error, table.column_names)}"
    ) from None
  rows = np.asarray(answer["row"], np.int64)
  is_true = np.ma.filled(answer["is true"], False).astype(bool)
  return rows[is_true], len(rows) - int(is_true.sum())


def _explain(error: Exception, names: Sequence[str]) -> str:
  """Shortens DuckDB's message; for an unknown column, suggests a name."""
  line = str(error).split("\n")[0]
  unknown = _UNKNOWN_COLUMN.search(line)
  if unknown:
    name = unknown[1] or unknown[2]
    return (
      f"there is no column {name}{columns.hint(name, names)} (text stands in"
      " single quotes)"
    )
  return columns.short(line)
