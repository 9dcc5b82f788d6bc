"""Algorithm 1: a near class across the decision boundary, per image.

`search` is the method; `released_code_search` is the single-step form of the
paper's released code, with its quirks, to reproduce its numbers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from psg_jax import checks, released_code, search_inputs, types

SearchOutput = search_inputs.SearchOutput
sample_keys = search_inputs.sample_keys
released_code_search = released_code.search

NOISES: dict[str, Callable[..., jax.Array]] = {
  "normal": jax.random.normal,
  "cauchy": jax.random.cauchy,
  "laplace": jax.random.laplace,
  "uniform": functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0),
}
NORMS = ("linf", "l2")
STEP_DECAYS = ("constant", "sqrt")
DISTANCE_DECAYS = ("constant", "inverse", "exponential", "linear")
DISTANCE_TERMS = ("penalty", "reward")

# The exponential schedule of the distance weight falls to 1/e in these steps.
_EXPONENTIAL_STEPS = 10.0

# δ, logits at the point, steps taken, and δ before the last of them.
_Carry: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """The options of Algorithm 1: a value that checks itself, and searches.

  `Search(...)(apply_fn, variables, images, labels, key)` is what `search` says.
  Its numbers are the leaves of a tree, names and flags belong to a program:
  `jit` takes a search as an argument and compiles once for all numbers, and
  `vmap` maps over those of `stack`, a grid in one program.

  Attributes:
    num_steps: `T`, positive.
    step_size: `ε`, the length of a step in pixel units of `norm`, positive: by
      so much each pixel moves in `"linf"`; in `"l2"` it is the length of the
      step, which moves a pixel by `ε / √(HWC)` on average, so that `"l2"` needs
      a larger one.
    max_distance: Radius of the ball around the image, in pixel units of
      `norm`, positive; None for no ball.
    distance_weight: `λ`, 0 or more.
    noise_scale: `γ`, 0 or more, relative to the gradient of this image's own
      loss.
    confidence: `κ` in [0, 1), or None. It can only end a search earlier, short
      of the boundary, since crossing always ends it: a small one changes
      nothing, and any below `1 / K` is never met before the boundary.
    step_decay: `"constant"`, or `"sqrt"`: `ε_t = ε / √t`.
    step_growth: 1 or more: each step is so many times as long as the one
      before, so that far boundaries take few gradients.
    num_bisections: 0 or more: so often the last step of a search that ended
      across the boundary is halved, towards the near side, by predictions
      alone. `n` of them bring the point within `ε_t / 2ⁿ` of the boundary.
    norm: `"linf"` or `"l2"`, of the steps, the ball and the distance reported.
    distance_decay: `λ_t`: `"constant"`, `"inverse"` (`λ / t`),
      `"exponential"` (`λ exp(-(t - 1) / 10)`) or `"linear"`
      (`λ (1 - (t - 1) / T)`).
    distance_term: `"penalty"` (`- λ δ`) or `"reward"` (`+ λ δ`).
    noise: Distribution of `z_t`: `"normal"`, `"cauchy"`, `"laplace"`, all
      standard, or `"uniform"` in [-1, 1].
    bounds: Lowest and highest pixel value.
    is_rounded: Whether the points visited lie on the grid of 1/255 (they may
      then leave the ball by half a grey level).
    is_plain: Whether λ and γ are known to be 0, which saves their part of the
      program; not to be given.

  Raises:
    ValueError: If an option is of the wrong type or range. Values that are
      traced are not checked.
  """

  num_steps: int | jax.Array
  step_size: float | jax.Array
  max_distance: float | jax.Array | None = None
  distance_weight: float | jax.Array = 0.0
  noise_scale: float | jax.Array = 0.0
  confidence: float | jax.Array | None = None
  step_growth: float | jax.Array = 1.0
  num_bisections: int = 0
  step_decay: str = "constant"
  norm: str = "linf"
  distance_decay: str = "constant"
  distance_term: str = "penalty"
  noise: str = "normal"
  bounds: tuple[float, float] = (0.0, 1.0)
  is_rounded: bool = False
  is_plain: bool = dataclasses.field(init=False, repr=False)

  def __post_init__(self) -> None:
    checks.one_of("step_decay", self.step_decay, STEP_DECAYS)
    checks.one_of("norm", self.norm, NORMS)
    checks.one_of("distance_decay", self.distance_decay, DISTANCE_DECAYS)
    checks.one_of("distance_term", self.distance_term, DISTANCE_TERMS)
    checks.one_of("noise", self.noise, NOISES)
    for name in NUMBERS:
      if getattr(self, name) is not None:
        checks.one_value(name, getattr(self, name))
    checks.integer("num_steps", self.num_steps, at_least=1)
    checks.number("step_size", self.step_size, above=0)
    checks.number("step_growth", self.step_growth, at_least=1)
    checks.integer("num_bisections", self.num_bisections, at_least=0)
    checks.number("distance_weight", self.distance_weight, at_least=0)
    checks.number("noise_scale", self.noise_scale, at_least=0)
    if self.max_distance is not None:
      checks.number("max_distance", self.max_distance, above=0)
    if self.confidence is not None:
      checks.number("confidence", self.confidence, at_least=0, below=1)
    search_inputs.check_bounds(self.bounds)
    low, high = self.bounds
    is_plain = search_inputs.is_zero(
      self.distance_weight
    ) and search_inputs.is_zero(self.noise_scale)
    object.__setattr__(self, "bounds", (float(low), float(high)))
    object.__setattr__(self, "is_plain", is_plain)

  def __call__(
    self,
    apply_fn: types.ApplyFn,
    variables: types.Variables,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
  ) -> SearchOutput:
    """Searches; arguments, result and errors are those of `search`."""
    prepared = self.prepare(apply_fn, variables, images, labels, key)
    return _jitted_search_batch(apply_fn, variables, *prepared)

  def prepare(
    self,
    apply_fn: types.ApplyFn,
    variables: types.Variables,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
  ) -> "Prepared":
    """Checks the arguments of a search, for `search_batch` in a program.

    Raises:
      ValueError: If an argument is of the wrong shape, type or range.
    """
    images, labels = search_inputs.checked(
      apply_fn, variables, images, labels, self.bounds
    )
    dtype = search_inputs.working_type(images)
    typed = {
      name: search_inputs.to_type(
        value, jnp.int32 if name == "num_steps" else dtype
      )
      for name in NUMBERS
      if (value := getattr(self, name)) is not None
    }
    return Prepared(
      images,
      labels,
      search_inputs.keys_of(key, len(images)),
      _with(self, typed),
    )


NUMBERS = (
  *("num_steps", "step_size", "max_distance", "distance_weight"),
  *("noise_scale", "confidence", "step_growth"),
)
_NAMES = tuple(
  field.name
  for field in dataclasses.fields(Search)
  if field.name not in NUMBERS
)


def _made(values: Mapping[str, Any]) -> Search:
  """Makes a search unchecked: what JAX puts into a tree need be no number."""
  search = object.__new__(Search)
  for name, value in values.items():
    object.__setattr__(search, name, value)
  return search


def _with(search: Search, values: dict[str, Any]) -> Search:
  return _made(vars(search) | values)


def _flatten(
  search: Search,
) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
  leaves = tuple(
    (jax.tree_util.GetAttrKey(name), getattr(search, name)) for name in NUMBERS
  )
  return leaves, tuple(getattr(search, name) for name in _NAMES)


def _unflatten(names: tuple[Any, ...], leaves: Iterable[Any]) -> Search:
  return _made(dict(zip((*_NAMES, *NUMBERS), (*names, *leaves), strict=True)))


jax.tree_util.register_pytree_with_keys(Search, _flatten, _unflatten)


def alike(searches: Sequence[Search]) -> list[Search]:
  """Returns searches as members of one program, which differ in numbers alone.

  Args:
    searches: One or more.

  Raises:
    ValueError: If there is none, or they differ in anything but numbers.
  """
  if not searches:
    raise ValueError("searches must not be empty, got none")
  is_plain = all(search.is_plain for search in searches)
  members = [_with(search, {"is_plain": is_plain}) for search in searches]
  for name in _NAMES:
    if len({getattr(search, name) for search in members}) > 1:
      raise ValueError(
        f"searches must have one {name}, got"
        f" {', '.join(repr(getattr(search, name)) for search in members)}"
      )
  for name in ("max_distance", "confidence"):
    if len({getattr(search, name) is None for search in members}) > 1:
      raise ValueError(f"searches must all have {name} or none, got both")
  return members


def cut(search: Search, num_steps: int) -> Search:
  """Returns a search of fewer steps, which the same program makes."""
  return _with(search, {"num_steps": num_steps})


def stack(searches: Sequence[Search]) -> Search:
  """Returns searches as one whose numbers have an axis in front, for `vmap`.

      grid = stack([Search(num_steps=50, step_size=s) for s in sizes])
      jax.vmap(lambda s: s(apply_fn, variables, images, labels, key))(grid)

  Args:
    searches: One or more; they differ in their numbers alone.

  Raises:
    ValueError: If there is none, or they differ in anything else.
  """
  return jax.tree.map(lambda *values: jnp.stack(values), *alike(searches))


def search(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
  **options: Any,
) -> SearchOutput:
  """Finds for each image a near class across the decision boundary.

  From `δ = 0`, for `t = 1..num_steps`, each image on its own:

      δ ← Π(δ + ε_t sign(∇_δ CE(f(x + δ), y) - λ_t δ + γ z_t))

  until `argmax f(x + δ) ≠ y`, or `p_y(x + δ) ≤ κ` where `confidence` is given.
  Images that are done stay as they are; the loop ends when all are. In the
  norm `"l2"` the direction is divided by its length in place of the sign.

  The class reached is a near one, and often the nearest, but the gradient
  follows all other classes at once and need not lead to the nearest: on random
  linear networks, where the nearest is known in closed form, 9 in 10 are it
  (`test_a_near_class_is_found` in tests/boundary_test.py).

  The paper's and the released code's `+ λ δ` rewards distance, against the
  stated aim; here the distance is penalised unless `distance_term` says
  otherwise. Without λ and γ the sign is taken of the gradient of the log-odds,
  which is the same sign and does not vanish where the model is certain.

  Args:
    apply_fn: The network in inference mode.
    variables: Its variables, frozen.
    images: float `[B, H, W, C]`, within `bounds`.
    labels: int `[B]`, the classes `y` to leave.
    key: One typed key, from which image `i` draws with `fold_in(key, i)`, or
      a typed key an image `[B]`.
    **options: Those of `Search`; `num_steps` and `step_size` must be given.

  The search computes in the images' type, in float32 for those of half
  precision, which the network alone is given as they are.

  Returns:
    The points reached and their classes.

  Raises:
    ValueError: If an argument is of the wrong shape, type or range, or the
      network does not return logits `[B, K]` of two classes or more. Values
      that are traced are not checked.

  References:
    Nahass et al., Targeted Unlearning Using Perturbed Sign Gradient Methods
    With Applications On Medical Images, 2025, Algorithm 1.
  """
  return Search(**options)(apply_fn, variables, images, labels, key)


class Prepared(NamedTuple):
  """Checked arguments of a search, in the form that `search_batch` takes.

  Attributes:
    images: float `[B, H, W, C]`.
    labels: int `[B]`.
    keys: One typed key an image `[B]`.
    search: Its numbers of the type that the search computes in.
  """

  images: jax.Array
  labels: jax.Array
  keys: jax.Array
  search: Search


def search_batch(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  images: jax.Array,
  labels: jax.Array,
  keys: jax.Array,
  search: Search,
) -> SearchOutput:
  """Maps the search of one image over the batch; arguments of `Prepared`."""

  def search_all(
    variables: types.Variables,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    search: Search,
  ) -> SearchOutput:
    def search_one(
      image: jax.Array, label: jax.Array, key: jax.Array
    ) -> SearchOutput:
      return _search_one(apply_fn, variables, image, label, key, search)

    return jax.vmap(search_one)(images, labels, keys)

  return search_inputs.on_automatic_axes(
    search_all, variables, images, labels, keys, search
  )


_jitted_search_batch = jax.jit(search_batch, static_argnums=0)


def num_programs() -> int:
  """Returns how many programs of searches were compiled in this process."""
  compiled: Any = _jitted_search_batch
  return int(compiled._cache_size())


def _search_one(
  apply_fn: types.ApplyFn,
  variables: types.Variables,
  image: jax.Array,
  label: jax.Array,
  key: jax.Array,
  search: Search,
) -> SearchOutput:
  """Searches from one image `[H, W, C]`."""
  given_type = image.dtype
  image = image.astype(search_inputs.working_type(image))

  def point(delta: jax.Array) -> jax.Array:
    moved = image + delta
    if search.is_rounded:
      moved = search_inputs.round_to_grey_levels(moved)
      moved = jnp.clip(moved, *search.bounds)
    return moved

  def log_odds(at: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = apply_fn(variables, at.astype(given_type)[None])[0]
    logits = logits.astype(jnp.promote_types(logits.dtype, image.dtype))
    return _log_odds_against(logits, label).astype(image.dtype), logits

  def predict(delta: jax.Array) -> jax.Array:
    return log_odds(point(delta))[1]

  def is_running(carry: _Carry) -> jax.Array:
    _, logits, step, _ = carry
    return ~_is_done(search, logits, label) & (step < search.num_steps)

  def advance(carry: _Carry) -> _Carry:
    before, _, step, _ = carry
    # Taken where a step is to be made alone: none at the point reached. The
    # gradient with respect to δ is the one at the point; rounding passes it on
    # unchanged.
    (odds, logits), gradient = jax.value_and_grad(log_odds, has_aux=True)(
      point(before)
    )
    direction = _direction(search, key, before, gradient, odds, step + 1)
    delta = _moved(search, image, before, direction, step + 1)
    # An image that is across from the start makes no step.
    is_done = (step == 0) & _is_done(search, logits, label)
    return jax.tree.map(
      functools.partial(jnp.where, is_done),
      (before, logits, step, before),
      (delta, predict(delta), step + 1, before),
    )

  start = jnp.zeros_like(image)
  # Of the image itself nothing is predicted but with its gradient: it stands
  # for sure of its class until then.
  known = jax.eval_shape(predict, start)
  is_label = jnp.arange(len(known)) == label
  sure = jnp.where(is_label, 0, -jnp.inf).astype(known.dtype)
  delta, logits, step, before = jax.lax.while_loop(
    is_running, advance, (start, sure, jnp.int32(0), start)
  )
  delta, logits = _bisected(search, label, before, delta, logits, predict)
  others = jnp.where(is_label, -jnp.inf, logits)
  reached = point(delta).astype(given_type)
  return SearchOutput(
    images=reached,
    # Where another class leads, the best of the others is the one predicted.
    labels=jnp.argmax(others).astype(jnp.int32),
    logits=logits,
    # Logits that are NaN say nothing of a class; a class may be ruled out.
    is_crossed=(jnp.argmax(logits) != label)
    & ~jnp.isnan(logits).any()
    & jnp.isfinite(logits.max()),
    distance=_length(reached.astype(image.dtype) - image, search.norm),
    num_steps=step,
  )


def _bisected(
  search: Search,
  label: jax.Array,
  near: jax.Array,
  far: jax.Array,
  logits: jax.Array,
  predict: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Halves the last step, whose far end stays where a search would end."""

  def halve(
    _: int, ends: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    near, far, logits = ends
    middle = (near + far) / 2
    middle_logits = predict(middle)
    is_end = _is_done(search, middle_logits, label)
    return (
      jnp.where(is_end, near, middle),
      jnp.where(is_end, middle, far),
      jnp.where(is_end, middle_logits, logits),
    )

  if search.num_bisections == 0:
    return far, logits
  # A search that found nothing keeps the point where it gave up.
  near = jnp.where(_is_done(search, logits, label), near, far)
  _, far, logits = jax.lax.fori_loop(
    0, search.num_bisections, halve, (near, far, logits)
  )
  return far, logits


def _is_done(search: Search, logits: jax.Array, label: jax.Array) -> jax.Array:
  """Whether the image is across, or no longer sure of its class."""
  is_done = jnp.argmax(logits) != label
  if search.confidence is not None:
    is_done |= jax.nn.softmax(logits)[label] <= search.confidence
  return is_done


def _direction(
  search: Search,
  key: jax.Array,
  delta: jax.Array,
  gradient: jax.Array,
  odds: jax.Array,
  step: jax.Array,
) -> jax.Array:
  """The direction of a step, which has the sign of `∇CE - λ_t δ + γ z_t`."""
  if search.is_plain:
    return gradient
  weight = search.distance_weight * _distance_decay(
    search.distance_decay,
    step.astype(delta.dtype),
    jnp.asarray(search.num_steps),
  )
  sign = -1.0 if search.distance_term == "penalty" else 1.0
  draw = NOISES[search.noise](
    jax.random.fold_in(key, step), delta.shape, delta.dtype
  )
  others = sign * weight * delta + search.noise_scale * draw
  # ∇CE = (1 - p_y) ∇(log-odds), and 1 - p_y is the sigmoid of the log-odds.
  # Dividing by it keeps the sign where it vanishes.
  share = jnp.maximum(jax.nn.sigmoid(odds), jnp.finfo(odds.dtype).tiny)
  return gradient + others / share


def _moved(
  search: Search,
  image: jax.Array,
  delta: jax.Array,
  direction: jax.Array,
  step: jax.Array,
) -> jax.Array:
  """Takes a step, back into the ball and into the bounds of pixels."""
  size = search.step_size * search.step_growth ** (step - 1).astype(delta.dtype)
  # No further than from one end of the range to the other, lest it overflow.
  across = search.bounds[1] - search.bounds[0]
  if search.norm == "l2":
    across *= delta.size**0.5
  size = jnp.minimum(size, jnp.maximum(search.step_size, across))
  if search.step_decay == "sqrt":
    size = size / jnp.sqrt(step.astype(delta.dtype))
  delta = delta + size * _unit(direction, search.norm)
  if search.max_distance is not None:
    delta = _project(delta, search.max_distance, search.norm)
  # Clipping moves each pixel towards the image: it stays in the ball.
  return jnp.clip(image + delta, *search.bounds) - image


def _log_odds_against(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Returns `log((1 - p_y) / p_y)`, which grows with the loss."""
  is_label = jnp.arange(len(logits)) == label
  return jax.nn.logsumexp(logits, where=~is_label) - search_inputs.at(
    logits, label
  )


def _distance_decay(
  name: str, step: jax.Array, num_steps: jax.Array
) -> jax.Array:
  if name == "inverse":
    return 1.0 / step
  if name == "exponential":
    return jnp.exp(-(step - 1) / _EXPONENTIAL_STEPS)
  if name == "linear":
    return 1.0 - (step - 1) / num_steps.astype(step.dtype)
  return jnp.ones_like(step)


def _unit(direction: jax.Array, norm: str) -> jax.Array:
  """Returns the direction as a step of length 1; 0 where there is none."""
  if norm == "linf":
    return jnp.sign(direction)
  limits = jnp.finfo(direction.dtype)
  # Scaled first: squares of small gradients vanish, of large ones overflow.
  direction = jnp.clip(direction, limits.min, limits.max)
  largest = jnp.abs(direction).max()
  scaled = direction / jnp.where(largest > 0, largest, 1)
  return scaled / jnp.maximum(_length(scaled, norm), limits.tiny)


def _length(delta: jax.Array, norm: str) -> jax.Array:
  if norm == "linf":
    return jnp.abs(delta).max()
  return jnp.sqrt(jnp.square(delta).sum())


def _project(
  delta: jax.Array, radius: float | jax.Array, norm: str
) -> jax.Array:
  if norm == "linf":
    return jnp.clip(delta, -radius, radius)
  # The guard keeps 0 / 0 out; a zero vector is in every ball.
  length = jnp.maximum(_length(delta, norm), jnp.finfo(delta.dtype).tiny)
  return delta * jnp.minimum(1.0, radius / length)
