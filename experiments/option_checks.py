"""What can be seen wrong in the options of a job before any work."""

from experiments import recipes, requests, sets
from psg_jax import checks, models, unlearning

_OF_MULTI_STEP = (
  *("step_decay", "max_distance", "norm", "distance_decay", "distance_term"),
  *("noise", "confidence", "is_rounded"),
)


def check(job: recipes.Job) -> None:
  """Raises ValueError for what can be seen wrong before any work."""
  checks.one_of("model", job.model, models.names())
  checks.number("width", job.width, above=0)
  checks.integer("seed", job.seed, at_least=0)
  for name in ("num_train", "num_devices", "references", "eval_batch_size"):
    if getattr(job, name) is not None:
      checks.integer(name, getattr(job, name), at_least=1)
  for part in ("training", "unlearning"):
    options = getattr(job, part)
    checks.number(f"{part}.learning_rate", options.learning_rate, above=0)
    checks.number(f"{part}.momentum", options.momentum, at_least=0, below=1)
    checks.number(f"{part}.weight_decay", options.weight_decay, at_least=0)
    for name in ("num_epochs", "batch_size"):
      if getattr(options, name) is not None:
        checks.integer(f"{part}.{name}", getattr(options, name), at_least=1)
    checks.integer(f"{part}.num_parts", options.num_parts, at_least=1)
  _check_unlearning(job.unlearning)
  sets.check(job)
  requests.build(job)


def _check_unlearning(options: recipes.Unlearning) -> None:
  for name in ("num_steps", "search_batch_size"):
    checks.integer(f"unlearning.{name}", getattr(options, name), at_least=1)
  checks.number("unlearning.step_size", options.step_size, above=0)
  checks.number("unlearning.step_growth", options.step_growth, at_least=1)
  checks.integer(
    "unlearning.num_bisections", options.num_bisections, at_least=0
  )
  checks.integer("unlearning.num_proxies", options.num_proxies, at_least=2)
  checks.number(
    "unlearning.proxy_fraction", options.proxy_fraction, above=0, below=1
  )
  checks.integer("unlearning.max_cycles", options.max_cycles, at_least=1)
  if options.retain_batch_size is not None:
    checks.integer(
      "unlearning.retain_batch_size", options.retain_batch_size, at_least=1
    )
  for name in ("num_refits", "num_layers"):
    if getattr(options, name) is not None:
      checks.integer(f"unlearning.{name}", getattr(options, name), at_least=0)
  if options.layers and options.num_layers:
    raise ValueError(
      "unlearning.num_layers must be 0 where unlearning.layers are given, got"
      f" {options.num_layers}"
    )
  for name in ("distance_weight", "noise_scale", "retain_weight"):
    value = getattr(options, name)
    checks.number(f"unlearning.{name}", value, at_least=0)
  if options.max_distance is not None:
    checks.number("unlearning.max_distance", options.max_distance, above=0)
  if options.confidence is not None:
    confidence = options.confidence
    checks.number("unlearning.confidence", confidence, at_least=0, below=1)
  plain = recipes.Unlearning()
  for name in _OF_MULTI_STEP if options.search == "released" else ():
    value, default = getattr(options, name), getattr(plain, name)
    if value != default:
      raise ValueError(
        f"unlearning.{name} must be {default} with the released search, which"
        f" has no other, got {value}"
      )
  try:
    unlearning.Targets(
      labels=options.labels,
      image_weight=options.image_weight,
      retain_labels=options.retain_labels,
      top_k=options.top_k,
    )
  except ValueError as error:
    raise ValueError(f"unlearning.{error}") from None
