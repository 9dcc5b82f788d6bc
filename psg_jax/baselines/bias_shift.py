"""A negative control, no method: an audit that passes it sees too little."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from psg_jax import checks, engine, inference, last_layers, types
from psg_jax.baselines import common


def bias_shift(
  model: types.Model,
  variables: types.Variables,
  split: types.Split,
  key: jax.Array,
  *,
  margin: float = 1.0,
  layers: Sequence[str] | None = None,
  batch_size: int = 256,
  callback: engine.Callback | None = None,
  mesh: jax.sharding.Mesh | None = None,
  show_progress: bool = True,
) -> common.Output:
  """Lowers the bias of the forgotten classes in the last layer, and no more.

      b_c ← b_c - δ   for each class c that occurs in the forget set

  with the least `δ` by which each forget image's best other class leads by the
  margin; the authors set `δ` by hand. Accuracy on the forget set is then 0, and
  other images are predicted as before but for those that were taken for one of
  the classes. All that the network knows of them is still there. A request that
  has images of all classes changes no prediction.

  Args:
    model: The network.
    variables: The original model's, left as they are.
    split: The forget set, whose classes are shut off, and the retain set, which
      is not used.
    key: One typed key; nothing is drawn.
    margin: Lead of the best other class, in logits, positive.
    layers: One prefix of the path of the bias, such as `("head/bias",)`; None
      for the last layer of the networks of `models.create`.
    batch_size: Images read at a time, positive.
    callback: Called once, with a state and the record.
    mesh: Devices to work on; None for one.
    show_progress: Taken as by all methods; there is nothing to show.

  Returns:
    The variables, and one record: `epoch` 1, `shift` (`δ`) and `seconds`.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range, or the
      layer has no bias of one entry for each class.

  References:
    Chen et al., Classification-Head Bias in Class-Level Machine Unlearning:
    Diagnosis, Mitigation, and Evaluation, 2026.
  """
  del show_progress
  checks.number("margin", margin, above=0)
  checks.integer("batch_size", batch_size, at_least=1)
  common.check(model, variables, split, key, needs_retain=False)
  start = time.perf_counter()
  logits = inference.predict(
    model.apply,
    variables,
    split.forget.images,
    batch_size=batch_size,
    mesh=mesh,
  )
  classes = np.unique(split.forget.labels)
  is_forgotten = np.isin(np.arange(logits.shape[1]), classes)
  shift = margin
  if not is_forgotten.all():
    lead = logits[:, is_forgotten].max(1) - logits[:, ~is_forgotten].max(1)
    shift += max(0.0, float(lead.max()))
  is_bias = last_layers.bias(variables, layers, len(is_forgotten))
  params = jax.tree.map(
    lambda x, is_shifted: x - shift * is_forgotten if is_shifted else x,
    *(variables["params"], is_bias),
  )
  seconds = time.perf_counter() - start
  record = {"epoch": 1, "shift": shift, "seconds": seconds}
  return common.finish(variables, params, key, record, callback)
