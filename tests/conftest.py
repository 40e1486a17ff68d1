"""Four virtual CPU devices, so that every test can ask what changes with the device count.

Most of a test's time is compilation. XLA at its lowest effort halves it, and the processes of one run share what
they have compiled.
"""

import collections
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import cost

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
for _flag, _value in (("--xla_force_host_platform_device_count", 4), ("--xla_backend_optimization_level", 0)):
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()


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
