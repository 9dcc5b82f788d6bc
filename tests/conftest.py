"""Eight fake devices, so that sharding is tested on any machine."""

import os
import pathlib

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  # Compiling is most of the time, and nothing here runs for long.
  + " --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs that are tested in this process leave the user's cache alone.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import pytest

from experiments import compilation

compilation.avoid_faults()

REFERENCE = pathlib.Path(__file__).parents[2] / "shared" / "reference"


@pytest.fixture(scope="session")
def reference_dir() -> pathlib.Path:
  """Outputs of the paper's released code, where they are at hand."""
  if not (REFERENCE / "fgsm.npz").is_file():
    pytest.skip("the released code's outputs are not on this machine")
  return REFERENCE
