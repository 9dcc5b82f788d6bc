"""CF-k: finetuning of the last layers alone."""

from collections.abc import Sequence

import jax
import optax

from psg_jax import training, types
from psg_jax.baselines import _engine, _layers, finetune


def cf_k(
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
  """Finetunes the last `k` layers on the retain set: catastrophic forgetting-k.

  All other parameters, and the statistics of their normalisation, stay exactly
  as they were. BatchNorm is in training mode. The defaults are those of the
  experiments of Nahass et al. (2025): the last block and the head.

  Args:
    model: As for `finetune.finetune`, and so are those not named here.
    variables: The original model's, left as they are.
    split: The forget set, which is not used, and the retain set.
    key: One typed key, for the order.
    num_layers: `k`, positive: convolution or residual blocks, the stem and the
      linear head count as a layer each, from the head backwards. For networks
      whose layers are not named as those of `models.create` see `layers`.
    layers: Prefixes of the paths of the parameters to train, such as
      `("layer4", "head")`, instead of `num_layers`.
    num_epochs: Passes over the retain set, positive.
    batch_size: Images a step, positive.
    optimizer: Any Optax optimiser, which is given these layers alone, as a
      mapping from paths to arrays; None for SGD with a learning rate of 0.01,
      without momentum and weight decay.
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
  return finetune.on_retain_set(
    model,
    variables,
    split,
    key,
    num_epochs=num_epochs,
    batch_size=batch_size,
    optimizer=optimizer or training.sgd(0.01, momentum=0.0, weight_decay=0.0),
    layers=chosen,
    callback=callback,
    mesh=mesh,
    description="CF-k",
    show_progress=show_progress,
  )
