"""Four virtual CPU devices, so that every test can ask what changes with the device count.

Most of a test's time is compilation. XLA at its lowest effort takes a third of it, and the processes of one run share
what they have compiled. A flag that stands in XLA_FLAGS already is left alone: with
`XLA_FLAGS=--xla_cpu_use_fusion_emitters=true` the tests compile as users' programs do.
"""

import collections
import fcntl
import gc
import importlib.util
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import cost

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tracing allocates much, and jax clears caches of its own at every collection.
gc.set_threshold(50_000, 50, 100)

XLA_FLAGS = {
    "xla_force_host_platform_device_count": "4",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    # The emitters build a compiler for every fusion: without them a small program takes half the time.
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def _set_xla_flags() -> None:
  """Sets those flags that jaxlib knows: an unknown one would end the process."""
  given = os.environ.get("XLA_FLAGS", "")
  missing = {name: value for name, value in XLA_FLAGS.items() if name not in given}
  if not missing:  # a worker has them from its parent
    return
  library = Path(importlib.util.find_spec("jaxlib").origin).with_name("libjax_common.so")
  with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
    # Names of flags that are gone stay in a table, without the zero that ends a text of the program.
    known = [f"--{name}={value}" for name, value in missing.items() if code.find(name.encode() + b"\0") >= 0]
  os.environ["XLA_FLAGS"] = " ".join([given, *known]).strip()


_set_xla_flags()


# What Python and the libraries decide: compilation, saving, reading data, weights of others, the command line.
VERSIONS = (
    "data/test_pipeline.py", "data/test_prepare.py", "data/test_sources.py", "interop", "ops",
    "test_architecture.py", "test_colabs.py", "test_config.py", "test_launch.py", "test_report.py",
    "test_topologies.py", "train/test_checkpoint.py", "train/test_parallel.py", "train/test_processes.py",
    "train/test_step.py", "train/test_topology.py", "train/test_workdir.py")


def pytest_configure(config: pytest.Config) -> None:
  """Makes the folder of compiled programs; workers and the programs that tests start find it in the environment."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="dljax-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
  config.pluginmanager.register(cost.Plugin())


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Callable[..., Path]:
  """Prepares embedded sets, each once for all workers of a run; returns their data directory.

  The sets that take seconds are worth the lock. No test may change the directory.
  """
  from dljax.data import sources

  base = tmp_path_factory.getbasetemp()
  base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker has its own below
  root = base / "tfds"

  def prepare(*names: str) -> Path:
    root.mkdir(exist_ok=True)
    for name in names:
      with (base / f"tfds-{name.replace('/', '-')}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if sources.find(name, root) is None:
          sources.prepare_embedded(name, root)
    return root

  return prepare


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks what depends on versions; the files with the most slow tests come first.

  At the end one worker would be left alone with them.
  """
  here = Path(__file__).parent
  places = {here / place for place in VERSIONS}
  for item in items:
    if places & {item.path, *item.path.parents}:
      item.add_marker("versions")
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])
