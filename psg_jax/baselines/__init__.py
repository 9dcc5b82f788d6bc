"""Unlearning methods to compare with, one file each, all called alike.

    output = baselines.find("scrub").fn(model, variables, split, key)

Each takes, by keyword, its own hyper-parameters and, so far as they make sense
for it, `num_epochs`, `batch_size`, `optimizer`, `callback`, `mesh` and
`show_progress`; the original variables are never changed. A new method is one
file and one line here.
"""

import types as python_types
from collections.abc import Callable, Mapping
from typing import NamedTuple

from psg_jax import checks
from psg_jax.baselines import (
  bad_teacher,
  boundary_expanding,
  boundary_shrink,
  cf_k,
  eu_k,
  finetune,
  fisher,
  gradient_ascent,
  l1_sparse,
  neggrad,
  psg,
  random_labels,
  retrain,
  salun,
  scrub,
  ssd,
  unsir,
)
from psg_jax.baselines._engine import Output

__all__ = ["METHODS", "Method", "Output", "find"]


class Method(NamedTuple):
  """An unlearning method.

  Attributes:
    name: Its name in `METHODS`.
    title: Its name in tables.
    fn: `(model, variables, split, key, *, ...) -> Output`.
    paper: Where it comes from.
    needs: Keyword arguments of `fn` without a default, of which, for
      `scrub_r`, one is enough.
  """

  name: str
  title: str
  fn: Callable[..., Output]
  paper: str
  needs: tuple[str, ...] = ()


_NAHASS = "Nahass et al., TMLR 2025"
_GOLATKAR = "Golatkar et al., CVPR 2020"
_GOEL = "Goel et al., 2022"
_KURMANJI = "Kurmanji et al., NeurIPS 2023"
_CHEN = "Chen et al., CVPR 2023"

_ALL = (
  Method("psg", "PSG", psg.psg, _NAHASS),
  Method("psg_soft", "PSG, soft labels", psg.psg_soft, _NAHASS),
  Method(
    "psg_released",
    "PSG, released code",
    psg.psg_released,
    _NAHASS,
    ("model_mean", "model_std"),
  ),
  Method("retrain", "Retrain", retrain.retrain, "(exact unlearning)"),
  Method("finetune", "Finetune", finetune.finetune, _GOLATKAR),
  Method(
    "gradient_ascent",
    "Gradient ascent",
    gradient_ascent.gradient_ascent,
    "Thudi et al., EuroS&P 2022",
  ),
  Method("neggrad", "NegGrad", neggrad.neggrad, _GOLATKAR),
  Method("neggrad_plus", "NegGrad+", neggrad.neggrad_plus, _KURMANJI),
  Method(
    "random_labels", "Random labels", random_labels.random_labels, _GOLATKAR
  ),
  Method(
    "l1_sparse", "l1-sparse", l1_sparse.l1_sparse, "Jia et al., NeurIPS 2023"
  ),
  Method("cf_k", "CF-k", cf_k.cf_k, _GOEL),
  Method("eu_k", "EU-k", eu_k.eu_k, _GOEL),
  Method("scrub", "SCRUB", scrub.scrub, _KURMANJI),
  Method(
    "scrub_r",
    "SCRUB+R",
    scrub.scrub_r,
    _KURMANJI,
    ("validation", "reference_error"),
  ),
  Method(
    "bad_teacher",
    "Bad Teacher",
    bad_teacher.bad_teacher,
    "Chundawat et al., AAAI 2023",
  ),
  Method("salun", "SalUn", salun.salun, "Fan et al., ICLR 2024"),
  Method("ssd", "SSD", ssd.ssd, "Foster et al., AAAI 2024"),
  Method("unsir", "UNSIR", unsir.unsir, "Tarun et al., TNNLS 2023"),
  Method("fisher", "Fisher forgetting", fisher.fisher, _GOLATKAR),
  Method(
    "boundary_shrink",
    "Boundary shrink",
    boundary_shrink.boundary_shrink,
    _CHEN,
  ),
  Method(
    "boundary_expanding",
    "Boundary expanding",
    boundary_expanding.boundary_expanding,
    _CHEN,
  ),
)

METHODS: Mapping[str, Method] = python_types.MappingProxyType(
  {method.name: method for method in _ALL}
)
"""All methods, by name, in the order of tables."""


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
