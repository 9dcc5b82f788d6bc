"""Unlearning methods to compare with, one file each, all called alike.

    output = baselines.find("scrub").fn(model, variables, split, key)

Each takes, by keyword, its own hyper-parameters and, so far as they make sense
for it, `num_epochs`, `batch_size`, `optimizer`, `callback`, `mesh` and
`show_progress`; the original variables are never changed. A new method is one
file and one line here.
"""

import inspect
import types as python_types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from psg_jax import checks, engine, unlearning
from psg_jax.baselines import (
  amun,
  bad_teacher,
  bias_shift,
  boundary_expanding,
  boundary_shrink,
  cf_k,
  delete,
  eu_k,
  finetune,
  fisher,
  gradient_ascent,
  l1_sparse,
  msg,
  neggrad,
  psg,
  random_labels,
  regun,
  retrain,
  salun,
  scrub,
  ssd,
  trew,
  unsir,
)
from psg_jax.baselines.common import Output

__all__ = ["METHODS", "Method", "Output", "find", "parameters"]


class Method(NamedTuple):
  """An unlearning method.

  Attributes:
    name: Its name in `METHODS`.
    title: Its name in tables.
    fn: `(model, variables, split, key, *, ...) -> Output`.
    paper: Where it comes from.
    needs: Keyword arguments of `fn` without a default, of which, for
      `scrub_r`, one is enough.
    defaults: What `fn` has other values for than `engine.Passes`.
  """

  name: str
  title: str
  fn: Callable[..., Output]
  paper: str
  needs: tuple[str, ...] = ()
  defaults: Mapping[str, Any] = python_types.MappingProxyType({})


_NAHASS = "Nahass et al., TMLR 2025"
_GOLATKAR = "Golatkar et al., CVPR 2020"
_GOEL = "Goel et al., 2022"
_KURMANJI = "Kurmanji et al., NeurIPS 2023"
_CHEN = "Chen et al., CVPR 2023"
_EBRAHIMPOUR = "Ebrahimpour-Boroojeny et al."

_OURS = ("psg", "psg_hard", "psg_soft", "psg_released", "boundary_shrink")


def _method(
  title: str,
  fn: Callable[..., Output],
  paper: str,
  defaults: Mapping[str, Any],
  *needs: str,
) -> Method:
  return Method(fn.__name__, title, fn, paper, needs, defaults)


_ALL = (
  Method("psg", "PSG", psg.psg, _NAHASS),
  _method("PSG, hard labels", psg.psg_hard, _NAHASS, psg.HARD_DEFAULTS),
  _method("PSG, boundary labels", psg.psg_soft, _NAHASS, psg.SOFT_DEFAULTS),
  _method(
    "PSG, released code",
    psg.psg_released,
    _NAHASS,
    psg.RELEASED_DEFAULTS,
    *("model_mean", "model_std"),
  ),
  _method("Retrain", retrain.retrain, "(exact unlearning)", retrain.DEFAULTS),
  _method("Finetune", finetune.finetune, _GOLATKAR, finetune.DEFAULTS),
  _method(
    "Gradient ascent",
    gradient_ascent.gradient_ascent,
    "Thudi et al., EuroS&P 2022",
    gradient_ascent.DEFAULTS,
  ),
  _method("NegGrad", neggrad.neggrad, _GOLATKAR, neggrad.DEFAULTS),
  _method("NegGrad+", neggrad.neggrad_plus, _KURMANJI, neggrad.PLUS_DEFAULTS),
  _method(
    "Random labels",
    random_labels.random_labels,
    _GOLATKAR,
    random_labels.DEFAULTS,
  ),
  _method(
    "l1-sparse",
    l1_sparse.l1_sparse,
    "Jia et al., NeurIPS 2023",
    l1_sparse.DEFAULTS,
  ),
  _method("CF-k", cf_k.cf_k, _GOEL, cf_k.DEFAULTS),
  _method("EU-k", eu_k.eu_k, _GOEL, eu_k.DEFAULTS),
  _method("SCRUB", scrub.scrub, _KURMANJI, scrub.DEFAULTS),
  _method(
    "SCRUB+R",
    scrub.scrub_r,
    _KURMANJI,
    scrub.DEFAULTS,
    *("validation", "reference_error"),
  ),
  _method(
    "Bad Teacher",
    bad_teacher.bad_teacher,
    "Chundawat et al., AAAI 2023",
    bad_teacher.DEFAULTS,
  ),
  _method("SalUn", salun.salun, "Fan et al., ICLR 2024", salun.DEFAULTS),
  _method("SSD", ssd.ssd, "Foster et al., AAAI 2024", {}),
  _method("UNSIR", unsir.unsir, "Tarun et al., TNNLS 2023", unsir.DEFAULTS),
  _method("Fisher forgetting", fisher.fisher, _GOLATKAR, {}),
  _method(
    "Boundary shrink",
    boundary_shrink.boundary_shrink,
    _CHEN,
    boundary_shrink.DEFAULTS,
  ),
  _method(
    "Boundary expanding",
    boundary_expanding.boundary_expanding,
    _CHEN,
    boundary_expanding.DEFAULTS,
  ),
  _method("AMUN", amun.amun, f"{_EBRAHIMPOUR}, ICML 2025", amun.DEFAULTS),
  _method("DELETE", delete.delete, "Zhou et al., CVPR 2025", delete.DEFAULTS),
  _method("TREW", trew.trew, f"{_EBRAHIMPOUR}, ICML 2026", trew.DEFAULTS),
  _method("MSG", msg.msg, "Cadet et al., 2024", msg.DEFAULTS),
  _method(
    "ReGUn", regun.regun, "Mirlach et al., 2026", regun.DEFAULTS, "held_out"
  ),
  _method(
    "Bias shift (control)", bias_shift.bias_shift, "Chen et al., 2026", {}
  ),
)

METHODS: Mapping[str, Method] = python_types.MappingProxyType(
  {method.name: method for method in _ALL}
)
"""All methods, by name, in the order of tables."""


def parameters(name: str) -> dict[str, Any]:
  """Returns all keyword arguments of a method, with their defaults.

  Args:
    name: A key of `METHODS`.

  Returns:
    Defaults by name; `inspect.Parameter.empty` of those that must be given, and
    None of those that depend on the data or on others.

  Raises:
    ValueError: If there is no such method.
  """
  method = find(name)
  functions: tuple[Callable[..., Any], ...] = (method.fn,)
  if name == "scrub_r":
    functions = (scrub.scrub, method.fn)
  arguments = [
    x for fn in functions for x in inspect.signature(fn).parameters.values()
  ]
  has_more = any(x.kind is x.VAR_KEYWORD for x in arguments)
  if name in _OURS:
    shared = unlearning.defaults()
  else:
    shared = engine.field_defaults(engine.Passes) if has_more else {}
  return {
    **shared,
    **method.defaults,
    **{x.name: x.default for x in arguments if x.kind is x.KEYWORD_ONLY},
  }


def find(name: str) -> Method:
  """Finds a method by its name.

  Args:
    name: A key of `METHODS`.

  Returns:
    The method.

  Raises:
    ValueError: If there is none, with the nearest name.
  """
  checks.one_of("method", name, METHODS)
  return METHODS[name]
