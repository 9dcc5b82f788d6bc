"""A job with the network that users have: other programs' tests have less."""

import json

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments import unlearn
from psg_jax import checkpoints, torch_weights
from tests import programs_test


@pytest.mark.slow
def test_unlearning_and_export_with_all_blocks(tmp_path, monkeypatch):
  monkeypatch.setenv("PSG_JAX_DATA", str(tmp_path / "data"))
  exported = tmp_path / "unlearned.safetensors"
  programs_test.call(
    unlearn,
    *programs_test.SMALL,
    *("--recipe=digits", "--no-retrained", "--name=whole"),
    *(f"--runs_dir={tmp_path}", f"--export={exported}"),
  )
  run = tmp_path / "whole"
  result = json.loads((run / "metrics.json").read_text())
  assert list(result) == ["original", "unlearned"]
  assert (run / "report.html").stat().st_size > 50_000
  assert len(safetensors_numpy.load_file(exported)) == 8 * 6 + 2
  variables = torch_weights.load(exported, model_name="all_cnn")
  stored = checkpoints.restore_run(run, "unlearned")["variables"]
  for name in ("block_0", "block_7"):
    np.testing.assert_array_equal(
      variables["params"][name]["kernel"], stored["params"][name]["kernel"]
    )
