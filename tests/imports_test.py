"""Which module imports which: one way, and nothing by a side door."""

import ast
import functools
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("psg_jax", "data_prep", "experiments")
# Sets that are embedded are prepared when they are first read; PyTorch, which
# the other imports, is an extra.
LATE = {
  ("psg_jax.data", "data_prep.base"),
  ("experiments.benchmark", "experiments.torch_loop"),
}
# What data_prep may know of the library.
SHARED = {"catalog", "checks", "files", "progress", "programs", "types"}


def _modules():
  modules = {}
  for package in PACKAGES:
    for path in sorted((ROOT / package).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      is_package = parts[-1] == "__init__"
      modules[".".join(parts[:-1] if is_package else parts)] = path
  return modules


MODULES = _modules()


def _imported(node, name):
  """The modules of ours that an import statement names."""
  if isinstance(node, ast.Import):
    names = [alias.name for alias in node.names]
  else:
    start = node.module or ""
    if node.level:
      package = name.split(".")[: -node.level]
      start = ".".join([*package, *([start] if start else [])])
    names = [f"{start}.{alias.name}" for alias in node.names]
    names = [x if x in MODULES else start for x in names]
  return {x for x in names if x in MODULES}


@functools.cache
def _edges(*, inside):
  """Pairs of importer and imported, inside functions or outside of them."""
  edges = set()
  for name, path in MODULES.items():
    tree = ast.parse(path.read_text("utf-8"))
    functions = [
      node
      for node in ast.walk(tree)
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    late = {id(x) for node in functions for x in ast.walk(node)}
    for node in ast.walk(tree):
      is_import = isinstance(node, ast.Import | ast.ImportFrom)
      if is_import and (id(node) in late) == inside:
        edges |= {(name, x) for x in _imported(node, name)}
  return {(a, b) for a, b in edges if a != b}


def _circle(edges):
  graph = {}
  for importer, imported in edges:
    graph.setdefault(importer, set()).add(imported)
  try:
    list(graphlib.TopologicalSorter(graph).static_order())
  except graphlib.CycleError as error:
    return error.args[1]
  return None


def test_a_circle_is_noticed():
  assert _circle({("a", "b"), ("b", "c")}) is None
  assert set(_circle({("a", "b"), ("b", "c"), ("c", "a")})) == {"a", "b", "c"}


def test_no_module_imports_what_imports_it():
  assert _circle(_edges(inside=False) | _edges(inside=True)) is None


def test_imports_in_functions_are_of_what_need_not_be_there():
  assert _edges(inside=True) == LATE


def test_packages_import_one_way():
  allowed = {
    "psg_jax": {"psg_jax"},
    "data_prep": {"data_prep", *(f"psg_jax.{name}" for name in SHARED)},
    "experiments": set(PACKAGES),
  }
  for importer, imported in _edges(inside=False):
    names = allowed[importer.partition(".")[0]]
    assert {imported, imported.partition(".")[0]} & names, (importer, imported)
