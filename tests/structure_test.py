"""The shape of the source: imports go one way, and parts stay small."""

import ast
import graphlib
import pathlib

import pytest

from psg_jax import baselines, unlearning

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("psg_jax", "experiments", "data_prep")
MOST_LINES = 1400
FILES = sorted(
  path for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(nodes):
  """The project's modules that import statements among these nodes name."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (x.name for x in node.names if x.name in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
      for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        if inner in MODULES:
          yield inner
        elif node.module in MODULES:
          yield node.module


def body_length(function):
  """Lines of a function without its docstring."""
  first, *rest = function.body
  is_docstring = isinstance(first, ast.Expr) and isinstance(
    first.value, ast.Constant
  )
  body = rest if is_docstring and rest else function.body
  return body[-1].end_lineno - body[0].lineno + 1


def test_imports_go_one_way():
  graph = {
    name: set(imports(TREES[path].body)) - {name}
    for name, path in MODULES.items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.


def test_the_library_knows_no_program():
  for name, path in MODULES.items():
    if name.split(".")[0] == "psg_jax":
      used = set(imports(ast.walk(TREES[path])))
      assert not [x for x in used if x.startswith("experiments")], name


def test_functions_and_files_are_small():
  functions = [
    (body_length(node), f"{module_name(path)}.{node.name}")
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
  ]
  long = [x for x in functions if x[0] > 60]
  assert len(long) <= 8, sorted(long)
  assert max(functions)[0] <= 90, max(functions)
  lines = {path: len(path.read_text().splitlines()) for path in FILES}
  assert not [path for path, count in lines.items() if count > MOST_LINES]


@pytest.mark.parametrize("name", baselines.METHODS)
def test_a_method_has_few_arguments_of_its_own(name):
  code = unlearning.unlearn.__code__
  assert code.co_argcount + code.co_kwonlyargcount <= 14
  code = baselines.find(name).fn.__code__
  assert code.co_argcount + code.co_kwonlyargcount <= 14
