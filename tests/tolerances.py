"""How far float32 may be from the exact value, instead of numbers typed in."""

import numpy as np

_EPS = float(np.finfo(np.float32).eps)


def float32(num_roundings: float, magnitude: float = 1.0) -> float:
  """Bounds the error of a float32 result.

  A sum of `n` products is off by at most `n ε Σ|a_i b_i|` in any order, with or
  without fused operations (Higham, Accuracy and Stability of Numerical
  Algorithms, 2002, section 3.1): each of its terms meets at most one product
  and `n - 1` sums, each off by ε / 2. In a chain of such sums, `n` add up.

  Args:
    num_roundings: Products and sums that an input goes through on its longest
      way to the result.
    magnitude: Of what is added up: the sum of absolute values, or more. A small
      difference of large values has the magnitude of these values.

  Returns:
    An absolute tolerance.
  """
  return num_roundings * _EPS * magnitude
