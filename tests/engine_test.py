"""The loop that everything trains on: resuming, records, checks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psg_jax import (
  baselines,
  batches,
  engine,
  steps,
  training,
  unlearning,
)
from tests import fakes

KEY = jax.random.key(0)
MODEL = fakes.linear_model(16, 3)
SPLIT = fakes.split_class(fakes.blobs(60))


def variables():
  return fakes.linear_variables(np.zeros((16, 3)))


@pytest.mark.parametrize("name", ["psg", "scrub", "unsir", "neggrad", "salun"])
def test_passes_go_on_from_any_step(name, monkeypatch):
  # Calls of two steps: most states are within a pass, and for SCRUB and UNSIR
  # within each of their phases.
  monkeypatch.setattr(batches, "MAX_STEPS_PER_CALL", 2)
  states = []
  options = {
    "batch_size": 4,
    "num_epochs": 2,
    "optimizer": optax.sgd(0.05, momentum=0.9),
    "show_progress": False,
  }
  if name == "unsir":
    options["retain_fraction"] = 1.0

  def run(**more):
    fn = baselines.find(name).fn
    return fn(MODEL, variables(), SPLIT, KEY, **options, **more)

  whole = run(step_callback=lambda x: states.append(jax.tree.map(jnp.copy, x)))
  assert len(states) > 3
  for state in states[1:-1:2]:
    resumed = run(state=state)
    chex.assert_trees_all_equal(resumed.variables, whole.variables)
    # Passes that were made before are not told again.
    assert resumed.history[-1]["epoch"] == whole.history[-1]["epoch"]
    assert len(resumed.history) <= len(whole.history)
  done = run(state=states[-1])
  chex.assert_trees_all_equal(done.variables, whole.variables)
  assert done.history == []


def test_a_record_joins_its_phases():
  rows = np.arange(6).reshape(3, 2)
  plan = batches.Plan(rows, np.full((3, 2), 0.5, np.float32), rows < 3)
  phase = engine.Phase(steps.mean_cross_entropy, plan)
  records = []
  state, history = engine.run(
    MODEL,
    variables(),
    SPLIT.retain.images,
    SPLIT.retain.labels,
    [[phase, phase], [phase]],
    KEY,
    engine.Passes(
      num_epochs=2,
      optimizer=optax.sgd(0.1),
      callback=lambda _, record: records.append(record),
      show_progress=False,
    ),
  )
  assert int(state.step) == 9
  assert records == history
  assert [len(record["step_losses"]) for record in history] == [6, 3]
  assert {"forget_loss", "retain_loss"} < history[0].keys()
  # From equal logits of three classes.
  assert history[0]["step_losses"][0] == pytest.approx(np.log(3), abs=1e-5)


def test_passes_end_where_they_are_told_to():
  for refresh in (False, True):
    seen = []

    def stop_fn(current, seen=seen):
      seen.append(current)
      return len(seen) == 2

    output = unlearning.unlearn(
      MODEL,
      variables(),
      SPLIT,
      KEY,
      num_epochs=5,
      noise_scale=0.1,
      refresh_labels=refresh,
      stop_fn=stop_fn,
      show_progress=False,
    )
    assert len(output.history) == len(seen) == 2


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_epochs": 0}, "num_epochs .* got 0"),
    ({"num_epochs": 1, "batch_size": 1.5}, "batch_size .* got 1.5"),
    ({"num_epochs": 1, "num_parts": 0}, "num_parts .* got 0"),
    ({"num_epochs": 1, "batch_stats": "froze"}, "did you mean 'frozen'"),
    ({"num_epochs": 1, "schedule": "cycle"}, "did you mean 'one_cycle'"),
  ],
)
def test_options_check_themselves(options, message):
  with pytest.raises(ValueError, match=message):
    engine.Passes(**options)


def test_a_loss_that_is_not_finite_is_named():
  losses = np.array([1.0, np.nan, 2.0])
  with pytest.raises(FloatingPointError, match="loss is not finite at step 8"):
    engine.check_finite(losses, 9)
  of_models = np.array([[1.0, 1.0], [1.0, np.inf]])
  with pytest.raises(FloatingPointError, match=r"of model 1 is not .* step 4"):
    engine.check_finite(of_models, 4)


def test_misspelt_arguments_are_named():
  def call(fn, **options):
    return fn(MODEL, variables(), SPLIT, KEY, **options)

  with pytest.raises(TypeError, match="'noise_scal', did you mean 'noise_sca"):
    call(unlearning.unlearn, noise_scal=0.1)
  with pytest.raises(TypeError, match="'batchsize', did you mean 'batch_size"):
    call(baselines.find("scrub").fn, batchsize=4)
  with pytest.raises(TypeError, match=r"no argument 'learning_rate'$"):
    training.fit(
      MODEL, variables(), SPLIT.retain, KEY, num_epochs=1, learning_rate=0.1
    )
  with pytest.raises(TypeError, match="num_epochs"):
    training.fit(MODEL, variables(), SPLIT.retain, KEY)
