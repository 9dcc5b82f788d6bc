"""Measure how fast images stream from disk, and how much memory that takes.

    python -m experiments.streaming_benchmark --dataset brain_tumor_mri

reads the training images of a prepared set in a shuffled order, once, twice
and four times over as if they were a larger set, each time in a process of its
own. Memory is the peak of the process and its workers together, without what
they share (Linux). A minute or two on two cores.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import cli
from psg_jax import batches, checks, streaming

_SAMPLE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Options:
  """What is read."""

  dataset: str = "brain_tumor_mri"
  data_dir: str | None = None
  """Folder of the prepared data sets."""
  copies: tuple[int, ...] = (1, 2, 4)
  """How many times the set is taken, as one larger set."""
  batch_size: int = 64
  num_workers: int | None = None
  """Reading processes; as many as there are cores by default."""
  seed: int = 2022


def main() -> None:
  """Prints a row for each size of the set."""
  options = cli.parse(Options, description="Measure streaming from disk.")
  for copies in options.copies:
    checks.integer("copies", copies, at_least=1)
  checks.integer("batch_size", options.batch_size, at_least=1)
  print(f"{'images':>8}{'seconds':>10}{'images/s':>10}{'peak MB':>10}")
  for copies in options.copies:
    with concurrent.futures.ProcessPoolExecutor(
      1, multiprocessing.get_context("spawn")
    ) as pool:
      row = pool.submit(measure, options, copies).result()
    print(
      f"{row['num_images']:>8}{row['seconds']:>10.1f}"
      f"{row['num_images'] / row['seconds']:>10.0f}{row['peak_mb']:>10.0f}",
      flush=True,
    )


def measure(options: Options, copies: int) -> dict[str, Any]:
  """Streams the set onto the device.

  Args:
    options: The options.
    copies: How many times to take the set.

  Returns:
    `num_images`, `seconds` from the first request on, the start of the worker
    processes included, and `peak_mb`.
  """
  dataset = streaming.load(
    options.dataset,
    "train",
    data_dir=options.data_dir,
    num_workers=options.num_workers,
  )
  images = streaming.concatenate([dataset.images] * copies)
  rows, is_real = batches.shuffled_rows(
    jax.random.key(options.seed), len(images), options.batch_size
  )
  plan = [places[real] for places, real in zip(rows, is_real, strict=True)]
  peak = [0.0]
  is_done = threading.Event()

  def watch() -> None:
    while not is_done.wait(_SAMPLE_SECONDS):
      peak[0] = max(peak[0], _memory_mb())

  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  start = time.perf_counter()
  num_images = 0
  for batch in streaming.batches(images, plan):
    jax.block_until_ready(jnp.asarray(batch))
    num_images += len(batch)
  seconds = time.perf_counter() - start
  is_done.set()
  watcher.join()
  return {
    "num_images": num_images,
    "seconds": seconds,
    "peak_mb": max(peak[0], _memory_mb()),
  }


def _memory_mb() -> float:
  """Returns the memory of this process and all below it, shares divided."""
  waiting, total = [pathlib.Path("/proc/self")], 0
  while waiting:
    process = waiting.pop()
    try:
      rollup = (process / "smaps_rollup").read_text()
      children = [path.read_text() for path in process.glob("task/*/children")]
    except OSError:
      continue  # It has ended.
    for line in rollup.splitlines():
      if line.startswith("Pss:"):
        total += int(line.split()[1])
    waiting += [
      pathlib.Path("/proc") / pid for text in children for pid in text.split()
    ]
  return total / 1024


if __name__ == "__main__":
  cli.run(main)
