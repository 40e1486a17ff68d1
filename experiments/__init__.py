"""The experiments: one file per family, run as `python -m experiments.x`."""

# The first line that runs: as it imports dljax, Ctrl-C and SIGTERM end the program in one line.
from dljax import errors

import os
import signal
import sys
from pathlib import Path


def _use_huge_pages() -> None:
  """Restarts the program with the C library's memory in huge pages, if Linux gives them on
  request.

  On a CPU the compiled step allocates its memory again in each step, and with pages of 4 kB half
  of a step can go into that. The C library reads its settings once, when a program starts, so this
  runs before anything that takes time. An environment that sets `glibc.malloc.hugetlb` is left as
  it is.
  """
  name, tunables = "glibc.malloc.hugetlb", os.environ.get("GLIBC_TUNABLES", "")
  try:
    library, version = os.confstr("CS_GNU_LIBC_VERSION").split()
    knows = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    on_request = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text("ascii")
  except (AttributeError, OSError, ValueError):  # another library, or another system
    return
  # A restart would take the program away from a debugger.
  if knows and on_request and name not in tunables and sys.gettrace() is None:
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{name}=1"]))
    # A signal that comes before the program has started again waits until it has a handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, errors.STOPS)
    try:
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    finally:
      signal.pthread_sigmask(signal.SIG_UNBLOCK, errors.STOPS)


if sys.argv[0] == "-m":  # `python -m` is still looking for the experiment
  _use_huge_pages()
