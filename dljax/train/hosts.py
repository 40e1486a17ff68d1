"""The processes of a run: who has started them, and how they find each other."""

import atexit
import contextlib
import glob
import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax

from dljax.errors import DONE, FAILED, RunError, UserError, end_process, one_line
from dljax.train import progress

if TYPE_CHECKING:
  from dljax.train.watch import Watch

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_MEND = (f"set {', '.join(BY_HAND)} to host:port of process 0, the number of processes, and this "
         "one's, from 0")
PATIENCE = "DLJAX_JOIN_SECONDS"
_HEARTBEAT = 600  # seconds; `Watch` notices sooner that a process is dead, and load is no reason


class Launcher(NamedTuple):
  """A program that starts several processes.

  Attributes:
    name: its name, for messages.
    counts: the variables that may hold the number of processes.
    index: the variable that holds the number of this process, from 0.
    mpi: whether mpi4py, if it is installed, can connect its processes.
  """

  name: str
  counts: tuple[str, ...]
  index: str
  mpi: bool = False

  def several(self, env: Mapping[str, str]) -> bool:
    """Whether it has started more than one process."""
    numbers = [env[name] for name in self.counts if env.get(name)]
    return any(number != "1" for number in numbers) or env.get(self.index, "0") != "0"

  def shown(self, env: Mapping[str, str]) -> str:
    """The variables that say so."""
    return " ".join(f"{name}={env[name]}" for name in (*self.counts, self.index) if env.get(name))


_OPEN_MPI = Launcher("Open MPI", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK", mpi=True)
# SLURM_NTASKS is the number that a job asked for. Only srun starts the tasks, and it states their
# number for the step that it starts.
_SLURM = Launcher("SLURM", ("SLURM_STEP_NUM_TASKS",), "SLURM_PROCID")
# Kubernetes states the index alone. These names are those that people give to the number.
_KUBERNETES = Launcher(
    "a Kubernetes job", ("JOB_COMPLETION_COUNT", "JOB_COMPLETIONS", "JOB_PARALLELISM", "COMPLETIONS",
                         "PARALLELISM"), "JOB_COMPLETION_INDEX")
_MPICH = Launcher("MPICH or Intel MPI", ("PMI_SIZE",), "PMI_RANK", mpi=True)
_OTHERS = (
    _OPEN_MPI, _MPICH,
    Launcher("MVAPICH", ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_RANK", mpi=True),
    Launcher("PMIx", ("PMIX_SIZE",), "PMIX_RANK", mpi=True),
    Launcher("jsrun", ("JSM_NAMESPACE_SIZE",), "JSM_NAMESPACE_RANK", mpi=True),
    Launcher("Flux", ("FLUX_JOB_SIZE",), "FLUX_TASK_RANK", mpi=True),
    Launcher("AWS Batch", ("AWS_BATCH_JOB_NUM_NODES",), "AWS_BATCH_JOB_NODE_INDEX"),
)
_TORCHRUN = Launcher("torchrun", ("WORLD_SIZE",), "RANK")


class Found(NamedTuple):
  """What starts this process and others.

  Attributes:
    name: what to call it in messages.
    method: how JAX finds the others: None (by its own rules), "slurm", "mpi4py", or `BY_HAND`.
  """

  name: str
  method: Any


def find(
    env: Mapping[str, str], on_tpu: bool = False,
    installed: Callable[[str], Any] = importlib.util.find_spec,
) -> Found | None:
  """Reads who has started this process and others from the environment; None if it runs alone.

  Args:
    env: the environment's variables.
    on_tpu: whether this machine has TPUs.
    installed: the name of a package -> whether it is installed.

  Raises:
    UserError: somebody has started several processes, and JAX cannot connect them.
  """
  if any(env.get(name) for name in BY_HAND):
    return Found(" ".join(f"{name}={env[name]}" for name in BY_HAND if env.get(name)), BY_HAND)
  if _OPEN_MPI.several(env) and "OMPI_MCA_orte_hnp_uri" in env:  # version 4
    return Found(_OPEN_MPI.name, None)
  # Where mpirun has started the processes by means of srun, srun's variables are those of mpirun's
  # own helpers.
  by_srun = all(not env.get(name) or env[name] == env.get("SLURM_STEP_NUM_TASKS")
                for launcher in (_OPEN_MPI, _MPICH) for name in launcher.counts)
  if _SLURM.several(env) and by_srun:
    return Found(_SLURM.name, "slurm")
  if on_tpu:
    return Found("a TPU pod", None)
  for launcher in _OTHERS:
    if launcher.several(env):
      if launcher.mpi and installed("mpi4py"):
        return Found(launcher.name, "mpi4py")
      raise _unknown(launcher, env)
  if _KUBERNETES.index in env:
    if "KUBERNETES_SERVICE_HOST" in env and installed("kubernetes"):
      return Found(_KUBERNETES.name, None)
    if _KUBERNETES.several(env):
      raise _unknown(_KUBERNETES, env)
  if env.get("WORLD_SIZE") and _TORCHRUN.several(env):
    raise _unknown(_TORCHRUN, env)
  return None


def _unknown(launcher: Launcher, env: Mapping[str, str]) -> UserError:
  """The error for processes that would all do the same work, each alone."""
  also = " (mpi4py connects them too)" if launcher.mpi else ""
  return UserError(f"{launcher.name} has started several processes ({launcher.shown(env)}), which JAX "
                   f"cannot connect by itself; {_MEND}{also}, or unset the former to run alone")


_watch: "Watch | None" = None


def watch() -> "Watch | None":
  """The connections to the other processes; None if this process runs alone."""
  return _watch


def join() -> None:
  """Joins the other processes, if the environment says that there are some.

  Raises:
    UserError: the environment says too little, or what it says is impossible.
    RunError: other processes have not connected in time; see `patience`.
  """
  on_tpu = bool((glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))
                and importlib.util.find_spec("libtpu")
                and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"))
  found = find(os.environ, on_tpu)
  if found is None:
    return
  term = signal.getsignal(signal.SIGTERM)
  try:
    if found.method == BY_HAND:
      address, count, index = (os.environ[name] for name in BY_HAND if os.environ.get(name))
      _initialize(address, int(count), int(index))
    elif found.name != _KUBERNETES.name or _pods() > 1:
      _initialize(*_ask_jax(found.method))
  except (RunError, UserError):
    raise
  except (LookupError, RuntimeError, ValueError) as error:
    raise UserError(f"{found.name}: the other processes cannot be joined "
                    f"({one_line(error, 1000)}); {_MEND}") from None
  finally:
    if term is not None:
      signal.signal(signal.SIGTERM, term)  # JAX has put its own handler in the place of Python's


def patience() -> float:
  """The seconds in which all processes have to connect: $DLJAX_JOIN_SECONDS, by default 300.

  Raises:
    UserError: the variable holds no such number.
  """
  text = os.environ.get(PATIENCE, "") or "300"
  try:
    seconds = float(text)
  except ValueError:
    seconds = 0.0
  if not 0 < seconds < 1e6:
    raise UserError(f"{PATIENCE}={text}: give the seconds within which all start, such as 300")
  return seconds


def _pods() -> int:
  """The number of pods of this Kubernetes job, as far as one can know it."""
  from jax._src import clusters  # pylint: disable=g-import-not-at-top

  try:
    clusters.K8sCluster.is_env_present()
    return clusters.K8sCluster.get_process_count()
  except Exception as error:  # the job may not ask, and there are many ways to say so
    if _KUBERNETES.several(os.environ):
      raise RuntimeError(str(error)) from error
    return 1


def _ask_jax(method: str | None) -> tuple[str, int, int, Any]:
  """The coordinator's address, the number of processes, this one's, and its devices."""
  # JAX has no public way to learn the address that it finds.
  from jax._src import clusters  # pylint: disable=g-import-not-at-top

  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, method, 300)
  if None in found[:3]:
    raise ValueError("JAX does not recognise them")
  return found


def _initialize(address: str, count: int, index: int, devices: Any = None) -> None:
  global _watch
  if count == 1:
    jax.distributed.initialize(address, count, index, devices)
    return
  from dljax.train.watch import Watch  # a process that is alone needs none

  _watch = Watch(address, count, index, patience=patience())
  atexit.register(_leave)
  _watch.wait_for_all()
  if any("_proxy" in name.lower() for name in os.environ):
    # JAX connects to an address of this machine, which no proxy can reach.
    os.environ.setdefault("no_grpc_proxy", f"127.0.0.1,{os.environ.get('no_proxy', '')}")
  jax.distributed.initialize(
      _watch.address, count, index, devices, coordinator_bind_address=_watch.address,
      heartbeat_timeout_seconds=_HEARTBEAT)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Runs a command, and says to the other processes how it ends.

  A process that ends before its time does not wait for the others, as JAX would.
  """
  try:
    yield
    status = DONE
  except SystemExit as end:
    status = end.code or DONE
  except BaseException:
    if _watch is None:
      raise
    # Where another process has died, a collective fails here, and the watch says why.
    time.sleep(3)
    traceback.print_exc()
    status = FAILED
  if _watch is not None and status != DONE:
    _watch.leave(status)
  if status != DONE and (_watch is not None or progress.still_compiling()):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def give_up(line: str) -> NoReturn:
  """Ends this process with an error, from any thread; the other processes end too."""
  _watch.leave(FAILED)
  end_process(f"error: {line}", FAILED)


def _leave() -> None:
  """Says to the other processes that this one ends; Python calls it, before JAX waits for them."""
  _watch.leave(FAILED if hasattr(sys, "last_value") else DONE)
