import os
import pathlib
import subprocess
import sys

import jax
import jaxlib
import pytest

from experiments import compilation

# A program that compiles in more than the threshold, and its result's bits.
_PROGRAM = """
import jax
import jax.numpy as jnp
from experiments import cli

def main():
  counts = dict.fromkeys(("hits", "misses"), 0)
  def count(event, **_):
    for name in counts:
      counts[name] += event == f"/jax/compilation_cache/cache_{name}"
  jax.monitoring.register_event_listener(count)
  x = jnp.linspace(-1, 1, 400).reshape(20, 20)
  value, vectors = jax.jit(
    lambda x: jnp.linalg.eigh(jnp.sort(x @ x.T, axis=0) + jnp.tanh(x))
  )(x)
  result = (value.sum() + vectors).tobytes().hex()
  print(counts["hits"], counts["misses"], result)

cli.run(main)
"""


_CACHE_OPTIONS = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")


def test_programs_are_forgotten_where_they_are_many(tmp_path, monkeypatch):
  double = jax.jit(lambda x: 2 * x)
  mappings, most = tmp_path / "maps", tmp_path / "max_map_count"
  monkeypatch.setattr(compilation, "_MAPPINGS", mappings)
  monkeypatch.setattr(compilation, "_MOST_MAPPINGS", most)
  double(1.0)
  # Another system than Linux.
  assert not compilation.make_room()
  most.write_text("8\n")
  mappings.write_text("a line\n" * 4)
  assert not compilation.make_room()
  assert double._cache_size() == 1
  mappings.write_text("a line\n" * 5)
  assert compilation.make_room()
  assert double._cache_size() == 0
  assert double(1.0) == 2


def _run(**variables: str | None) -> tuple[int, int, str]:
  """Runs the program; its hits, misses and result. It must print no warning."""
  # The tests have a cache of their own.
  outer = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(_CACHE_OPTIONS)
  }
  environment = {
    name: value
    for name, value in (outer | variables).items()
    if value is not None and name != "JAX_ENABLE_COMPILATION_CACHE"
  }
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  hits, misses, result = done.stdout.split()
  return int(hits), int(misses), result


@pytest.mark.slow
def test_second_run_compiles_nothing(tmp_path):
  (tmp_path / "file").touch()
  cache = {
    "XDG_CACHE_HOME": str(tmp_path),
    # Whatever the time that it takes to compile here.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  hits, misses, result = _run(**cache)
  assert hits == 0 < misses
  entries = sorted((tmp_path / "psg_jax" / "xla").iterdir())
  assert entries
  assert _run(**cache) == (misses, 0, result)
  assert sorted((tmp_path / "psg_jax" / "xla").iterdir()) == entries
  # A folder that cannot be made: under a file.
  nowhere = {"XDG_CACHE_HOME": str(tmp_path / "file")}
  assert _run(**nowhere) == (0, 0, result)


@pytest.mark.parametrize("base", ["XDG_CACHE_HOME", "HOME"])
def test_cache_dir(base, tmp_path, monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv(base, str(tmp_path))
  parent = tmp_path if base == "XDG_CACHE_HOME" else tmp_path / ".cache"
  assert compilation.cache_dir() == parent / "psg_jax" / "xla"
  assert compilation.cache_dir().is_dir()


def test_no_home_keeps_nothing(monkeypatch):
  def fail(self):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(pathlib.Path, "expanduser", fail)
  assert compilation.cache_dir() is None


def test_users_folder_stays(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", "/elsewhere")
  try:
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("version", "flags", "expected"),
  [
    ((0, 10, 1), None, None),
    ((0, 10, 2), None, "--xla_cpu_experimental_ynn_fusion_type="),
    ((0, 11, 1), "--a=1", "--a=1 --xla_cpu_experimental_ynn_fusion_type="),
    (
      (0, 10, 2),
      "--xla_cpu_experimental_ynn_fusion_type=dot",
      "--xla_cpu_experimental_ynn_fusion_type=dot",
    ),
    ((0, 12, 0, 1), "--a=1", "--a=1"),
  ],
)
def test_avoid_faults(version, flags, expected, monkeypatch):
  monkeypatch.setattr(jaxlib.version, "__version_info__", version)
  # Set first, so that what is set below is taken back.
  monkeypatch.setenv("XLA_FLAGS", flags or "")
  if flags is None:
    monkeypatch.delenv("XLA_FLAGS")
  compilation.avoid_faults()
  assert os.environ.get("XLA_FLAGS") == expected
