"""Targeted machine unlearning by perturbed sign gradients, in JAX.

    import jax
    import psg_jax as psg

    train, test = psg.data.load("digits")
    model = psg.models.create("all_cnn", like=train, width=0.125)
    original, _ = psg.fit(model, train, jax.random.key(0), num_epochs=5)
    parts = psg.evaluation.parts(train, test, classes=0)
    output = psg.unlearn(model, original, parts.split, jax.random.key(1))

Modules are imported when they are asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from psg_jax.boundary import search
  from psg_jax.evaluation import evaluate
  from psg_jax.forget import split
  from psg_jax.grids import unlearn_grid
  from psg_jax.training import train as fit
  from psg_jax.unlearning import unlearn

__version__ = "0.1.0"

_FUNCTIONS = {
  "evaluate": ("evaluation", "evaluate"),
  "fit": ("training", "train"),
  "search": ("boundary", "search"),
  "split": ("forget", "split"),
  "unlearn": ("unlearning", "unlearn"),
  "unlearn_grid": ("grids", "unlearn_grid"),
}
_MODULES = (
  *("augment", "baselines", "batches", "boundary", "catalog", "checkpoints"),
  *("data", "diagnosis", "engine", "ensembles", "evaluation", "forget"),
  *("grids", "inference", "last_layers", "levels", "metrics", "model_checks"),
  *("models", "optimizers", "parallel", "proxies", "refits", "relabelling"),
  *("relearning", "steps", "streaming", "torch_weights", "traces"),
  *("training", "twins", "types"),
  *("ulira", "unlearning", "verification", "yardstick"),
)

__all__ = ["evaluate", "fit", "search", "split", "unlearn", "unlearn_grid"]


def __getattr__(name: str) -> Any:
  if name in _FUNCTIONS:
    module, function = _FUNCTIONS[name]
    return getattr(importlib.import_module(f"psg_jax.{module}"), function)
  if name in _MODULES:
    return importlib.import_module(f"psg_jax.{name}")
  raise AttributeError(f"module 'psg_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *_FUNCTIONS, *_MODULES})
