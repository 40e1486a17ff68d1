"""The experiments: one file per family, run as `python -m experiments.x`."""

import os
import sys
from pathlib import Path


def _use_huge_pages() -> None:
  """Starts the program again, with the memory of the C library in huge pages, where Linux gives them on request.

  On a CPU the compiled step asks for its memory anew each time, and in pages of 4 kB half of a step can go into
  getting them. The C library reads its settings once, when a program starts, so this comes before all that takes
  time; an environment that sets `glibc.malloc.hugetlb` itself is left alone.
  """
  name, tunables = "glibc.malloc.hugetlb", os.environ.get("GLIBC_TUNABLES", "")
  try:
    library, version = os.confstr("CS_GNU_LIBC_VERSION").split()
    knows = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    on_request = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
  except (AttributeError, OSError, ValueError):  # another library, or another system
    return
  if knows and on_request and name not in tunables and sys.gettrace() is None:  # a debugger would lose the program
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{name}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if sys.argv[0] == "-m":  # `python -m` is looking for the experiment, and has run nothing yet
  _use_huge_pages()
