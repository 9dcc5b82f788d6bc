"""Compiles little and once, on eight fake devices, so that any machine does."""

import os
import pathlib

# What the environment says comes last, and wins.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the time, and nothing here runs for long.
if "optimization_level" not in os.environ["XLA_FLAGS"]:
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

from experiments import compilation

compilation.avoid_faults()

REFERENCE = pathlib.Path(__file__).parents[2] / "shared" / "reference"


def pytest_configure(config: pytest.Config) -> None:
  """Lets the test processes, and the next run, share compiled programs.

  JAX's key of a program has its operations, the flags, jaxlib's version and
  what the processor can do; one that cannot be read is compiled again.
  """
  cache = getattr(config, "cache", None)
  if cache is None:
    return
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("xla")))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
  """Drops compiled programs after each file.

  Each holds a few memory maps, of which Linux gives a process 65,530: the
  thousands of a whole run come near to it, and XLA crashes on the next.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def reference_dir() -> pathlib.Path:
  """Outputs of the paper's released code, where they are at hand."""
  if not (REFERENCE / "fgsm.npz").is_file():
    pytest.skip("the released code's outputs are not on this machine")
  return REFERENCE
