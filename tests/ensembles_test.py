"""Several models of the same images, in one program or one by one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import ensembles
from tests import fakes, ulira_test


@pytest.mark.parametrize("mode", ["map", "auto"])
def test_fit_many_is_the_same_in_all_modes(mode):
  dataset = fakes.blobs(60)

  def fit(mode, num_models=2):
    return ensembles.fit_many(
      ulira_test.MODEL,
      dataset,
      ulira_test.KEY,
      num_models=num_models,
      mode=mode,
      **ulira_test.OPTIONS,
    )

  one_by_one = fit("loop")
  # The order of sums differs between the programs.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
    one_by_one,
    fit(mode),
  )
  kernel = one_by_one["params"]["kernel"]
  assert len(kernel) == 2
  assert np.any(kernel[0] != kernel[1])


def test_an_ensemble_goes_on_where_it_was():
  dataset, states = fakes.blobs(60), []
  # Models of 60 and of 13 images, in minibatches of 8.
  membership = np.arange(60) < np.array([[60], [13]])

  def train(**options):
    return ensembles.train(
      ulira_test.MODEL,
      dataset,
      membership,
      ulira_test.KEY,
      **{**ulira_test.OPTIONS, **options},
    )

  whole, _ = train(
    callback=lambda state, _: states.append(jax.tree.map(jnp.copy, state))
  )
  rest, history = train(state=states[0])
  chex.assert_trees_all_equal(rest, whole)
  assert [record["epoch"] for record in history] == [2]
  with pytest.raises(ValueError, match="trainable must be None"):
    train(trainable={"params": True})


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_models": 0}, "num_models .* got 0"),
    ({"num_models": 2, "mode": "maps"}, "mode .* did you mean 'map'"),
  ],
)
def test_bad_input(options, message):
  with pytest.raises(ValueError, match=message):
    ensembles.fit_many(
      ulira_test.MODEL,
      fakes.blobs(10),
      ulira_test.KEY,
      num_epochs=1,
      **options,
    )
