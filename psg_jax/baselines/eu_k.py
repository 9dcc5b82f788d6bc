"""EU-k: the last layers are drawn anew and trained."""

from collections.abc import Sequence

import jax
import optax

from psg_jax import training, types
from psg_jax.baselines import _engine, _layers, finetune


def eu_k(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  num_layers: int = 2,
  layers: Sequence[str] | None = None,
  num_epochs: int = 10,
  batch_size: int = 64,
  optimizer: optax.GradientTransformation | None = None,
  callback: _engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> _engine.Output:
  """Initialises the last `k` layers anew and trains them on the retain set.

  Exact unlearning of the last `k` layers: their parameters and the statistics
  of their normalisation start as those of a new network (released codes exist
  that copy the trained layer onto itself instead). All others stay exactly as
  they were.

  Args:
    model: As for `cf_k.cf_k`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the initialisation and the order.
    num_layers: `k`, positive.
    layers: Prefixes of paths, instead of `num_layers`.
    num_epochs: Passes over the retain set, positive.
    batch_size: Images a step, positive.
    optimizer: As for `cf_k.cf_k`.
    callback: Called after each pass with the state and the pass's record.
    mesh: Devices to work on; None for one.
    show_progress: Whether to show a progress bar.

  Returns:
    As `finetune.finetune`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range.
    FloatingPointError: If the loss is NaN or infinite.

  References:
    Goel et al., Towards Adversarial Evaluations for Inexact Machine Unlearning,
    2022.
  """
  chosen = _layers.choose(variables, num_layers, layers)
  _engine.check(
    model, variables, split, key, batch_size=batch_size, num_epochs=num_epochs
  )
  init_key, train_key = jax.random.split(key)
  fresh = _engine.fresh_variables(model, split, init_key)
  return finetune.on_retain_set(
    model,
    variables,
    split,
    train_key,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer or training.sgd(0.01, momentum=0.0, weight_decay=0.0),
    start={
      name: _layers.take(fresh[name], tree, chosen)
      for name, tree in variables.items()
    },
    layers=chosen,
    callback=callback,
    mesh=mesh,
    description="EU-k",
    show_progress=show_progress,
  )
