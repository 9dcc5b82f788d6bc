"""Runs the work on many images in threads.

Pillow lets go of Python's lock while it decodes, resizes and encodes.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

MAX_WORKERS = 16
LOOK_AHEAD = 4
"""Items a worker that are begun before they are asked for."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ordered_map(
  function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[tuple[_Item, _Result]]:
  """Runs a function on items in threads, a few of them ahead.

  Args:
    function: Safe to run in several threads at once.
    items: What to run it on.

  Yields:
    Item and result, in the order of the items.
  """
  num_workers = min(_num_cores(), MAX_WORKERS)
  waiting: collections.deque[
    tuple[_Item, concurrent.futures.Future[_Result]]
  ] = collections.deque()
  iterator = iter(items)
  with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
    try:
      for item in itertools.islice(iterator, num_workers * LOOK_AHEAD):
        waiting.append((item, pool.submit(function, item)))
      while waiting:
        item, future = waiting.popleft()
        result = future.result()
        for later in itertools.islice(iterator, 1):
          waiting.append((later, pool.submit(function, later)))
        yield item, result
    finally:
      # On Ctrl-C nobody waits for what is no longer wanted.
      pool.shutdown(wait=False, cancel_futures=True)


def _num_cores() -> int:
  """Returns how many cores this process may use, where the system tells."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
