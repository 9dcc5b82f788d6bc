"""What the benchmark of a grid measures, on a job of seconds."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments import grid_benchmark, recipes
from psg_jax import grids
from tests import fakes


def test_all_ways_make_the_same_models(tmp_path, monkeypatch):
  monkeypatch.setattr(grid_benchmark, "WEIGHTS", (0.0, 0.1))
  monkeypatch.setattr(grid_benchmark, "NOISES", (0.0, 0.1))
  job = dataclasses.replace(
    recipes.JOBS["digits"],
    name="grid",
    resume=True,
    runs_dir=str(tmp_path / "runs"),
    num_train=200,
    width=0.05,
    training=recipes.Training(num_epochs=1),
    unlearning=recipes.Unlearning(num_epochs=1),
  )
  values = {x.name: getattr(job, x.name) for x in dataclasses.fields(job)}
  ways = ("grid", "grid again", "loop")
  options = grid_benchmark.Options(**values, repeats=1, singles=3, ways=ways)
  unlearn_grid, numbers = grids.unlearn_grid, itertools.count()

  def turned(*args, cells, **options):
    """Every second grid has its cells in the wrong order."""
    order = -1 if next(numbers) % 2 else 1
    return unlearn_grid(*args, cells=cells[::order], **options)

  with fakes.quick_programs(tmp_path / "data"):
    rows, difference = grid_benchmark.measure(options)
    monkeypatch.setattr(grids, "unlearn_grid", turned)
    options = dataclasses.replace(options, ways=ways[:2])
    _, wrong = grid_benchmark.measure(options)
    with pytest.raises(ValueError, match="did you mean 'loop'"):
      grid_benchmark.measure(dataclasses.replace(options, ways=("loops",)))
  assert tuple(rows) == ways
  assert np.shape(list(rows.values())) == (3, 1, 2)
  # The second time nothing is compiled.
  assert np.all(np.less(rows["grid again"], rows["grid"]))
  # float32, of variables of about 1 in a few steps.
  assert difference < 1e-5 < wrong
