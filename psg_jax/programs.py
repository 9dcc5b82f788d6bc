"""Where a program meets its user: one line and a status for what ends it."""

# Nothing heavy is imported: it is to be there before signals come.
import contextlib
import csv
import errno
import io
import multiprocessing
import os
import pathlib
import runpy
import signal
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# Raised by others' code for what is wrong with files, memory or devices.
_FOREIGN = (
  *(RuntimeError, MemoryError, EOFError, ImportError, csv.Error, struct.error),
  *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
)
_FOREIGN_PACKAGES = ("duckdb", "_duckdb", "pyarrow", "tensorflow_datasets")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_OUTPUT = (errno.EPIPE, errno.EIO, errno.EBADF)
_OUT_OF_MEMORY = (
  *("RESOURCE_EXHAUSTED", "out of memory", "Cannot allocate memory"),
  *("bad_alloc", "Unable to allocate"),
)
_TRACEBACK = "PSG_JAX_TRACEBACK"

# Each is `psg NAME`, `psg-NAME` and `python -m experiments.NAME`.
COMMANDS = {
  "demo": "train, retrain, unlearn, compare and report in one go",
  "prepare": "prepare a data set, or images of your own",
  "cache": "list the prepared sets, and remove them",
  "train": "train the original model and the retrained one",
  "unlearn": "take images out of a trained model",
  "report": "write the page that shows what a run did",
  "compare": "compare unlearning methods over training seeds",
  "audit": "attack unlearned models: U-LiRA and KLOM",
  "reproduce": "rerun the paper's experiments, and check their figures",
  "tune": "choose settings on validation images",
  "benchmark": "time the library against eager PyTorch",
}
_BUILDERS = ("prepare", "cache")


class _Terminated(BaseException):
  """SIGTERM came."""


def start() -> None:
  """Runs the program that a command such as `psg-train` is named after.

  `psg` itself is `experiments.psg`.
  """
  quit_on_signals()
  name = pathlib.Path(sys.argv[0]).stem.removeprefix("psg-").replace("-", "_")
  package = "data_prep" if name in _BUILDERS else "experiments"
  runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)


def command() -> str | None:
  """Returns the installed command that runs this program; None without one."""
  name = pathlib.Path(sys.argv[0]).stem
  return f"psg-{name}" if name in COMMANDS else None


def expect_signals() -> None:
  """Ends `python -m` in one line if a signal comes while it is imported."""
  if sys.argv[:1] == ["-m"]:
    quit_on_signals()


def arguments() -> list[str]:
  """Returns the program's arguments; shells leave the `~` of `--name=~/x`."""
  return [_expanded(argument) for argument in sys.argv[1:]]


def run(
  main: Callable[[], None],
  *,
  memory_hint: Callable[[], str] = str,
  at_end: Callable[[bool], list[str]] = lambda is_done: [],
) -> None:
  """Runs a program; what the user can mend is one line, not a traceback.

  Args:
    main: The program, which parses its own options.
    memory_hint: Says which of the program's options take less memory.
    at_end: Called with whether the program was done, in any case; what it
      returns is added to the line that ends it, or printed where it was done.

  Raises:
    SystemExit: With 2 where the input, a disk or the machine is wrong, with 1
      where training or unlearning diverged, with 130 on Ctrl-C, 143 on SIGTERM
      and 141 where nobody reads the output any more. Others' errors are shown
      in full where the environment variable PSG_JAX_TRACEBACK is set.
  """
  _prepare_streams()
  is_done, notes = False, list[str]()
  try:
    with _signals():
      try:
        main()
        is_done = True
      finally:
        notes = at_end(is_done)
    if notes:
      print("\n".join(notes))
    sys.stdout.flush()
  except KeyboardInterrupt:
    _leave(130, "; ".join(["interrupted", *notes]))
  except _Terminated:
    _leave(143, "; ".join(["terminated", *notes]))
  except SystemExit as stop:
    if fault := _output_fault(stop):
      _drop_output()
      _leave(*fault)
    raise
  except FloatingPointError as error:
    _leave(1, f"error: {error}")
  except Exception as error:
    if fault := _output_fault(error):
      _drop_output()
      _leave(*fault)
    if os.environ.get(_TRACEBACK):
      raise
    text = _explain(error, memory_hint)
    if text is None:
      raise
    _leave(
      2, "; ".join([f"error: {text}", *(notes if _is_full(error) else [])])
    )


def _explain(error: Exception, memory_hint: Callable[[], str]) -> str | None:
  """Says an error in a line; None for those of our own making."""
  text = " ".join(str(error).split())
  is_memory = any(x in text for x in _OUT_OF_MEMORY) and not _is_full(error)
  if isinstance(error, MemoryError) or is_memory:
    return "; ".join(
      x for x in (f"memory is used up: {text[:200]}", memory_hint()) if x
    )
  if isinstance(error, RuntimeError | AssertionError) and _has_no_device():
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (
      f"JAX_PLATFORMS must name devices that this machine has, got"
      f" {platforms!r}: unset it, or set it to cpu; {text[:200]}"
    ).rstrip("; ")
  if isinstance(error, RuntimeError) and "home directory" in text:
    return (
      "there is no home folder: set HOME, or name a folder for prepared sets by"
      " PSG_JAX_DATA or --data_dir"
    )
  if isinstance(error, OSError | ValueError):
    return text or type(error).__name__
  if isinstance(error, _FOREIGN) or (
    type(error).__module__.partition(".")[0] in _FOREIGN_PACKAGES
  ):
    return f"{type(error).__name__}: {text[:300]} ({_TRACEBACK}=1 shows where)"
  return None


def _is_full(error: Exception) -> bool:
  # Others' libraries give a disk's errors other types and codes.
  return getattr(error, "errno", None) in _FULL or any(
    os.strerror(number) in str(error) for number in _FULL
  )


def _has_no_device() -> bool:
  jax: Any = sys.modules.get("jax")
  if jax is None:
    return False
  try:
    jax.devices()
  # JAX asserts where a platform that was asked for is not there.
  except (RuntimeError, AssertionError):
    return True
  return False


def _prepare_streams() -> None:
  """Lets any text be printed, in any locale."""
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:  # It was closed by the shell.
      setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    elif hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")


def _output_fault(error: BaseException) -> tuple[int, str] | None:
  """Status and line where standard output cannot be written, else None."""
  if isinstance(error, OSError) and (
    error.filename is not None or error.errno not in (*_FULL, *_NO_OUTPUT)
  ):
    return None
  try:
    sys.stdout.flush()
    if isinstance(error, OSError):
      # What could not be written is gone; the error says not where it was.
      os.write(sys.stdout.fileno(), b"\n")
  except io.UnsupportedOperation:
    return None
  except BrokenPipeError:
    return 141, ""
  except OSError as fault:
    return 2, f"error: standard output cannot be written: {fault.strerror}"
  return None


def _drop_output() -> None:
  """Sends what Python writes at its end nowhere, or it would complain."""
  with contextlib.suppress(OSError, ValueError):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _leave(status: int, message: str) -> NoReturn:
  if message:
    with contextlib.suppress(OSError):
      print(" ".join(message.split()), file=sys.stderr, flush=True)
  if status > 128 and _is_own_process():
    # Python's way out would free what computations in other threads still use.
    for child in multiprocessing.active_children():
      child.terminate()
    os._exit(status)
  raise SystemExit(status) from None


def _is_own_process() -> bool:
  """Whether the process was started for the program, and has no other use."""
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  return getattr(spec, "name", "").startswith(("experiments.", "data_prep."))


@contextlib.contextmanager
def _signals() -> Iterator[None]:
  """Turns SIGTERM into an exception, as Python does SIGINT."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number: int, frame: Any) -> None:
    del number, frame
    # A second one ends the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise _Terminated

  before = signal.getsignal(signal.SIGTERM)
  if before is not signal.SIG_IGN:
    signal.signal(signal.SIGTERM, stop)
  if signal.getsignal(signal.SIGINT) is _quit:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    if before is not signal.SIG_IGN:
      signal.signal(signal.SIGTERM, before)


def _quit(number: int, frame: Any) -> NoReturn:
  """Ends the process before there is anything to clear away."""
  del frame
  word = "interrupted" if number == signal.SIGINT else "terminated"
  os.write(2, f"{word}: nothing was begun\n".encode())
  os._exit(128 + number)


def quit_on_signals() -> None:
  """Lets signals end the process in one line before there is work to lose."""
  for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _quit)


def _expanded(argument: str) -> str:
  option, equals, value = argument.partition("=")
  if option.startswith("-") and equals:
    return f"{option}={os.path.expanduser(value)}"
  return os.path.expanduser(argument)
