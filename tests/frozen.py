"""Compares what two checkouts compute, bit for bit, and what they take for it.

    python tests/frozen.py BEFORE AFTER
    python tests/frozen.py BEFORE AFTER --cases dense/
    python tests/frozen.py BEFORE AFTER --seconds

runs the cases below in both, each with its own package and its own list of
cases, and ends with status 1 where a result differs. Bits differ between
processors: nothing is stored. With `--seconds` it times training, the search
and the released job in turn instead, five times each, compiled.
"""

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_SIZE = 8
# Options of the search, each on its own.
_SEARCHES: dict[str, dict[str, Any]] = {
  "plain": {},
  "noise": {"noise_scale": 0.05},
  "laplace": {"noise_scale": 0.05, "noise": "laplace"},
  "uniform": {"noise_scale": 0.05, "noise": "uniform"},
  "cauchy": {"noise_scale": 0.05, "noise": "cauchy"},
  "penalty": {"distance_weight": 0.5},
  "reward": {"distance_weight": 0.5, "distance_term": "reward"},
  "sqrt": {"step_decay": "sqrt"},
  "ball": {"max_distance": 0.05},
  "l2": {"norm": "l2", "step_size": 0.3},
  "confidence": {"confidence": 0.6},
  "rounded": {"is_rounded": True},
}
_MODES: dict[str, dict[str, Any]] = {
  "hard": {},
  "soft": {"labels": "soft"},
  "soft_other": {"labels": "soft_other"},
  "raw_logits": {"labels": "raw_logits"},
  "top_k": {"labels": "soft", "top_k": 2},
  "mixed": {"labels": "soft", "retain_labels": "hard"},
  "no_retain": {"retain_weight": 0.0, "batch_stats": "frozen"},
  "more_retain": {"retain_weight": 2.5},
  "constant": {"schedule": "constant"},
  "refresh": {"refresh_labels": True, "noise_scale": 0.05},
  "target": {"target_accuracy": 0.5},
  "parts": {"num_parts": 2},
}
_NEEDS: dict[str, dict[str, Any]] = {
  "psg_released": {"model_mean": 0.5, "model_std": 0.25},
  "scrub_r": {"reference_error": 1.0},
  "ssd": {"selection_weight": 1.0},
}


def digest(value: Any) -> str:
  """Returns the SHA-256 of a tree's paths, types and bits, without seconds."""
  import jax
  import numpy as np

  result = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(value):
    name = jax.tree_util.keystr(path)
    if "seconds" in name:
      continue
    array = np.asarray(leaf)
    content = repr(leaf).encode() if array.dtype == object else array.tobytes()
    result.update(f"{name} {array.dtype} {array.shape}".encode() + content)
  return result.hexdigest()


def networks() -> dict[str, Any]:
  """Returns a tiny All-CNN and a dense network without BatchNorm."""
  import jax
  import jax.numpy as jnp

  from psg_jax import models, types

  def init(key: jax.Array, images: jax.Array) -> types.Variables:
    del images
    first, second = jax.random.split(key)
    hidden = 0.1 * jax.random.normal(first, (_SIZE * _SIZE, 12))
    return {
      "params": {
        "hidden": {"kernel": hidden, "bias": jnp.zeros(12)},
        "head": {
          "kernel": 0.1 * jax.random.normal(second, (12, 3)),
          "bias": jnp.zeros(3),
        },
      }
    }

  def features(variables: types.Variables, images: jax.Array) -> jax.Array:
    layer = variables["params"]["hidden"]
    flat = images.reshape(len(images), -1)
    return jax.nn.relu(flat @ layer["kernel"] + layer["bias"])

  def apply(variables: types.Variables, images: jax.Array) -> jax.Array:
    head = variables["params"]["head"]
    return features(variables, images) @ head["kernel"] + head["bias"]

  def apply_train(
    variables: types.Variables, images: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, types.Variables]:
    del key
    return apply(variables, images), variables

  return {
    "dense": types.Model(init, apply, apply_train, features),
    "all_cnn": models.create(
      "all_cnn", num_classes=3, num_channels=1, width=0.03, mean=0.5, std=0.25
    ),
  }


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
  """Yields each case by name, and what computes its result."""
  import jax
  import jax.numpy as jnp

  from psg_jax import (
    augment,
    baselines,
    boundary,
    ensembles,
    metrics,
    training,
    unlearning,
  )
  from tests import fakes, metrics_registry_test

  key = jax.random.key(0)
  dataset = fakes.blobs(50, size=_SIZE)
  split = fakes.split_class(dataset)
  quiet = {"show_progress": False, "batch_size": 16}
  yield (
    "metrics",
    lambda: metrics.compute(None, metrics_registry_test.full_inputs()),
  )
  for name, model in networks().items():
    start = model.init(key, jnp.zeros((1, _SIZE, _SIZE, 1)))
    steps = {"num_epochs": 3, "optimizer": training.sgd(0.05), **quiet}
    for mode, options in {
      "plain": {},
      "constant": {"schedule": "constant"},
      "flip": {"augment_fn": augment.flip()},
      "parts": {"num_parts": 2},
    }.items():
      yield (
        f"{name}/fit/{mode}",
        lambda model=model, start=start, options=options, steps=steps: (
          training.fit(model, start, dataset, key, **steps, **options)
        ),
      )
    trained, _ = training.fit(model, start, dataset, key, **steps)
    images = training.to_float(jnp.asarray(split.forget.images))
    for mode, options in _SEARCHES.items():
      search = {"num_steps": 12, "step_size": 0.02, **options}
      yield (
        f"{name}/search/{mode}",
        lambda model=model, trained=trained, images=images, search=search: (
          boundary.search(
            model.apply, trained, images, split.forget.labels, key, **search
          )
        ),
      )
    yield (
      f"{name}/search/released",
      lambda model=model, trained=trained, images=images: (
        boundary.released_code_search(
          model.apply,
          trained,
          images,
          split.forget.labels,
          key,
          model_mean=0.5,
          model_std=0.25,
        )
      ),
    )
    for mode, options in _MODES.items():
      found = {"num_steps": 12, "step_size": 0.02, "num_epochs": 2, **quiet}
      yield (
        f"{name}/unlearn/{mode}",
        lambda model=model, trained=trained, options={**found, **options}: (
          unlearning.unlearn(model, trained, split, key, **options)
        ),
      )
    for method in baselines.METHODS.values():
      needs = dict(_NEEDS.get(method.name, {}))
      if method.name in ("cf_k", "eu_k", "msg", "bias_shift"):
        needs["layers"] = ("head",)
      if "held_out" in method.needs:
        needs["held_out"] = dataset
      yield (
        f"{name}/baseline/{method.name}",
        lambda method=method, model=model, trained=trained, needs=needs: (
          _rounded(method.fn(model, trained, split, key, **quiet, **needs))
        ),
      )
    yield (
      f"{name}/ensemble",
      lambda model=model: ensembles.fit_many(
        model, dataset, key, num_models=2, num_epochs=2, **quiet
      ),
    )


def _rounded(output: Any) -> dict[str, Any]:
  """Keeps all bits of the weights, and five digits of the figures."""
  import jax

  history = jax.tree.map(
    lambda x: float(f"{x:.5g}") if isinstance(x, float) else x, output.history
  )
  return {"variables": output.variables, "history": history}


def timed() -> dict[str, Callable[[], Any]]:
  """Returns what is timed: training, the search, and the released job."""
  import jax
  import jax.numpy as jnp

  from psg_jax import baselines, boundary, models, training
  from tests import fakes

  key = jax.random.key(0)
  dataset = fakes.blobs(512, size=32)
  split = fakes.split_class(dataset)
  model = models.create(
    "all_cnn", num_classes=3, num_channels=1, width=0.125, mean=0.5, std=0.25
  )
  start = model.init(key, jnp.zeros((1, 32, 32, 1)))
  images = training.to_float(jnp.asarray(split.forget.images))
  return {
    "fit": lambda: training.fit(
      model, start, dataset, key, num_epochs=2, show_progress=False
    )[0],
    "search": lambda: boundary.search(
      model.apply,
      start,
      images,
      split.forget.labels,
      key,
      num_steps=10,
      step_size=1e-6,
    ),
    "released job": lambda: (
      baselines.find("psg_released")
      .fn(
        model,
        start,
        split,
        key,
        model_mean=0.5,
        model_std=0.25,
        show_progress=False,
      )
      .variables
    ),
  }


def _serve() -> None:
  """Answers with digests, or with the seconds of each case named on stdin."""
  import jax

  if sys.argv[2] == "digests":
    for name, compute in cases():
      if sys.argv[3] not in name:
        continue
      try:
        result = digest(compute())
      except Exception as error:  # An error is a result, too.
        result = f"{type(error).__name__}: {error}"
      print(json.dumps([name, result]), flush=True)
    return
  functions = timed()
  for function in functions.values():
    jax.block_until_ready(function())
  print(json.dumps(list(functions)), flush=True)
  for line in sys.stdin:
    begin = time.perf_counter()
    jax.block_until_ready(functions[line.strip()]())
    print(json.dumps(time.perf_counter() - begin), flush=True)


def _start(
  checkout: pathlib.Path, what: str, part: str = ""
) -> subprocess.Popen[str]:
  """Starts the cases of a checkout, or these where it has none of its own."""
  script = checkout / "tests" / "frozen.py"
  script = script if script.is_file() else pathlib.Path(__file__)
  return subprocess.Popen(
    [sys.executable, script.resolve(), "--serve", what, part],
    cwd=checkout,
    env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _answer(process: subprocess.Popen[str], line: str | None = None) -> Any:
  """Reads what a process says, to a line where there is one."""
  assert process.stdin is not None
  assert process.stdout is not None
  if line is not None:
    print(line, file=process.stdin, flush=True)
  return json.loads(process.stdout.readline())


def compare(before: pathlib.Path, after: pathlib.Path, part: str = "") -> int:
  """Prints the cases that differ, and returns how many."""
  processes = [
    _start(checkout, "digests", part) for checkout in (before, after)
  ]
  outputs = [process.communicate()[0] for process in processes]
  if any(process.returncode for process in processes):
    raise SystemExit("error: the cases did not run to their end")
  ours, theirs = (
    dict(map(json.loads, output.splitlines())) for output in outputs
  )
  names = list(dict.fromkeys([*ours, *theirs]))
  different = [name for name in names if ours.get(name) != theirs.get(name)]
  for name in different:
    print(f"{name}: {ours.get(name)} before, {theirs.get(name)} after")
  failed = [name for name in names if ":" in ours.get(name, "")]
  print(f"{len(names)} cases, {len(different)} differ; errors: {failed}")
  return len(different)


def clock(before: pathlib.Path, after: pathlib.Path, repeats: int = 5) -> None:
  """Prints medians of seconds, and of the ratios of pairs run in turn."""
  processes = [_start(checkout, "seconds") for checkout in (before, after)]
  names, _ = (_answer(process) for process in processes)
  for name in names:
    pairs = [
      [_answer(process, name) for process in processes] for _ in range(repeats)
    ]
    old, new = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"{name:14} {old:8.3f} s {new:8.3f} s  after / before {ratio:.3f}")
  for process in processes:
    process.communicate()


def main() -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("before", type=pathlib.Path)
  parser.add_argument("after", type=pathlib.Path)
  parser.add_argument("--seconds", action="store_true")
  parser.add_argument("--cases", default="", help="part of the cases' names")
  options = parser.parse_args()
  if options.seconds:
    clock(options.before, options.after)
  else:
    sys.exit(compare(options.before, options.after, options.cases) > 0)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--serve"]:
    _serve()
  else:
    main()
