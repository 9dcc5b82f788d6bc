"""Progress bars for long work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import tqdm


class Bar:
  """A progress bar that shows the latest figures beside the time left."""

  def __init__(self, bar: tqdm.tqdm) -> None:
    self._bar = bar

  def advance(self, amount: int, **figures: float) -> None:
    """Moves the bar and shows the figures with three digits."""
    if figures:
      self._bar.set_postfix(
        {name: f"{value:.3f}" for name, value in figures.items()},
        refresh=False,
      )
    self._bar.update(amount)


@contextmanager
def bar(
  description: str, total: int, *, unit: str, is_shown: bool
) -> Iterator[Bar]:
  """Opens a bar on standard error; in a log file it moves twice a minute."""
  interval = 0.2 if sys.stderr.isatty() else 30.0
  with tqdm.tqdm(
    desc=description,
    total=total,
    unit=unit,
    mininterval=interval,
    maxinterval=max(interval, 10.0),
    disable=not is_shown,
    dynamic_ncols=True,
  ) as opened:
    yield Bar(opened)
