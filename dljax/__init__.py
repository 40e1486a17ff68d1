"""Reference implementations of deep-learning architecture families in JAX and Flax."""

import sys

# `python -m` is still looking for the program, and it is one of ours.
if sys.argv[:1] == ["-m"] and any(
    part.removeprefix("-m").partition(".")[0] in ("dljax", "experiments")
    for part in sys.orig_argv[1:]):
  import signal

  # Until there is a handler, signals wait.
  signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
  from dljax import errors

  errors.stop_early()


def __getattr__(name: str) -> object:
  """Imports `dljax.load` when it is first used, so that `import dljax` alone imports nothing."""
  if name == "load":
    from dljax.runs import load

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
