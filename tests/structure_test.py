"""The shape of the source: imports go one way, and parts stay small."""

import ast
import graphlib
import pathlib

import pytest

from psg_jax import baselines, unlearning

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("psg_jax", "experiments", "data_prep")
MOST_LINES = 600
# Sets that are embedded are prepared when they are first read; PyTorch, which
# the other imports, is an extra.
LATE = {"data_prep.base", "experiments.torch_loop"}
# What data_prep may know of the library.
SHARED = ("catalog", "checks", "files", "progress", "programs", "types")
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


def graph(*, has_late):
  """What each module imports, with what is imported in functions or without."""
  return {
    name: set(imports(ast.walk(TREES[path]) if has_late else TREES[path].body))
    - {name}
    for name, path in MODULES.items()
  }


@pytest.mark.parametrize("has_late", [False, True])
def test_imports_go_one_way(has_late):
  order = graphlib.TopologicalSorter(graph(has_late=has_late))
  order.prepare()  # Raises CycleError.


def test_imports_in_functions_are_of_what_need_not_be_there():
  functions = [
    (name, node)
    for name, path in MODULES.items()
    for node in ast.walk(TREES[path])
    if isinstance(node, ast.FunctionDef)
  ]
  late = {
    (name, imported)
    for name, function in functions
    for imported in imports(ast.walk(function))
  }
  assert {imported for _, imported in late} == LATE
  assert [x for x in late if x[0].startswith("psg_jax")] == [
    ("psg_jax.data", "data_prep.base")
  ]


def test_builders_know_little_of_the_library():
  allowed = {f"psg_jax.{name}" for name in SHARED}
  for name, imported in graph(has_late=True).items():
    if name.split(".")[0] == "data_prep":
      others = {x for x in imported if x.split(".")[0] != "data_prep"}
      assert others <= allowed, name


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


def test_variables_are_called_by_nouns():
  """Names that say what was done to a value, and not what it is."""
  vague = {
    "found",
    "each",
    "own",
    "here",
    "asked",
    "stated",
    "further",
    "chosen",
  }
  bindings = [
    f"{module_name(path)}:{node.lineno}"
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if (
      isinstance(node, ast.Name)
      and isinstance(node.ctx, ast.Store)
      and node.id in vague
    )
    or (isinstance(node, ast.arg) and node.arg in vague)
  ]
  assert not bindings


def test_tests_read_no_private_name():
  private = []
  for path in sorted((ROOT / "tests").glob("*.py")):
    tree = ast.parse(path.read_text())
    modules = {
      alias.asname or alias.name
      for node in ast.walk(tree)
      if isinstance(node, ast.ImportFrom)
      and (node.module or "").split(".")[0] in PACKAGES
      for alias in node.names
    }
    private += [
      f"{path.name}:{node.lineno} {node.attr}"
      for node in ast.walk(tree)
      if isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and node.value.id in modules
      and node.attr.startswith("_")
      and not node.attr.startswith("__")
    ]
  assert not private
