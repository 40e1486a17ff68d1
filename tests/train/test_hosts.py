"""Who has started several processes is read from the environment; they join, or are refused by name."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dljax.errors import UserError
from dljax.train import hosts, parallel

ROOT = Path(__file__).parents[2]


def srun(index, count):
  return {"SLURM_JOB_ID": "1", "SLURM_NTASKS": f"{count}", "SLURM_STEP_NUM_TASKS": f"{count}",
          "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": f"{index}", "SLURM_LOCALID": f"{index}"}


def mpirun(index, count):
  return {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": f"{count}",
          "OMPI_COMM_WORLD_RANK": f"{index}", "OMPI_COMM_WORLD_LOCAL_RANK": f"{index}"}


def open_mpi_5(index, count):
  return {"OMPI_COMM_WORLD_SIZE": f"{count}", "OMPI_COMM_WORLD_RANK": f"{index}", "PMIX_RANK": f"{index}",
          "PMIX_NAMESPACE": "prterun-a-1@1"}


def hydra(index, count):
  return {"PMI_SIZE": f"{count}", "PMI_RANK": f"{index}", "PMI_FD": "5", "MPI_LOCALNRANKS": f"{count}"}


def torchrun(index, count):
  return {"WORLD_SIZE": f"{count}", "RANK": f"{index}", "LOCAL_RANK": f"{index}", "MASTER_ADDR": "a",
          "MASTER_PORT": "29500"}


def pod(index, **more):
  return {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": f"{index}", **more}


def by_hand(*values):
  return dict(zip(hosts.BY_HAND, values, strict=True))


ALONE = [
    {},
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},  # a job that runs the command without srun
    {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"},  # runs of their own
    srun(0, 1), mpirun(0, 1), open_mpi_5(0, 1), hydra(0, 1), torchrun(0, 1),
    {"WORLD_SIZE": ""}, {"RANK": "3"}, {"PMIX_RANK": "0"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, pod(0), pod(0, JOB_COMPLETIONS="1"),
]
JOINED = [
    (srun(1, 2), "SLURM", "slurm"), (mpirun(1, 2), "Open MPI", None),
    ({**srun(0, 2), **mpirun(3, 4)}, "Open MPI", None),  # which starts its helpers by srun
    ({**srun(1, 2), "PMI_SIZE": "2", "PMI_RANK": "1"}, "SLURM", "slurm"),  # srun --mpi=pmi2
    ({**srun(1, 2), "WORLD_SIZE": "2", "RANK": "1"}, "SLURM", "slurm"),  # for torch's sake
    (by_hand("a:1", "2", "1"), "JAX_COORDINATOR_ADDRESS=a:1 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1", hosts.BY_HAND),
    ({**torchrun(0, 2), **by_hand("a:1", "2", "0")}, "JAX_COORDINATOR_ADDRESS=a:1 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0",
     hosts.BY_HAND),
]
REFUSED = [
    (open_mpi_5(0, 2), "Open MPI", "OMPI_COMM_WORLD_SIZE=2"), (hydra(0, 4), "MPICH or Intel MPI", "PMI_SIZE=4"),
    ({"PMI_RANK": "1"}, "MPICH or Intel MPI", "PMI_RANK=1"), ({"PMIX_RANK": "1"}, "PMIx", "PMIX_RANK=1"),
    ({**srun(0, 2), **hydra(3, 4)}, "MPICH or Intel MPI", "PMI_RANK=3"),
    (torchrun(0, 2), "torchrun", "WORLD_SIZE=2 RANK=0"), ({"WORLD_SIZE": "8"}, "torchrun", "WORLD_SIZE=8"),
    (pod(1), "a Kubernetes job", "JOB_COMPLETION_INDEX=1"),
    (pod(0, JOB_COMPLETIONS="3"), "a Kubernetes job", "JOB_COMPLETIONS=3"),
    ({"JOB_COMPLETION_INDEX": "2"}, "a Kubernetes job", "JOB_COMPLETION_INDEX=2"),
    ({"MV2_COMM_WORLD_SIZE": "2"}, "MVAPICH", "MV2_COMM_WORLD_SIZE=2"),
    ({"FLUX_JOB_SIZE": "2"}, "Flux", "FLUX_JOB_SIZE=2"), ({"JSM_NAMESPACE_SIZE": "2"}, "jsrun", "JSM_NAMESPACE_SIZE=2"),
    ({"AWS_BATCH_JOB_NUM_NODES": "2"}, "AWS Batch", "AWS_BATCH_JOB_NUM_NODES=2"),
]


def _find(env, *packages, on_tpu=False):
  return hosts.find(env, on_tpu, lambda name: name in packages)


@pytest.mark.parametrize("env", ALONE)
def test_a_process_that_is_alone_runs(env):
  assert _find(env) is None


@pytest.mark.parametrize("env, name, method", JOINED)
def test_processes_that_jax_recognises_join(env, name, method):
  assert _find(env) == (name, method)


@pytest.mark.parametrize("env, name, shown", REFUSED)
def test_processes_that_jax_cannot_connect_are_refused_by_name(env, name, shown):
  with pytest.raises(UserError) as error:
    _find(env)
  line = str(error.value)
  assert line.startswith(f"{name} has started several processes (") and shown in line
  assert all(variable in line for variable in hosts.BY_HAND) and "\n" not in line


@pytest.mark.parametrize("env, name", [(open_mpi_5(0, 2), "Open MPI"), (hydra(1, 4), "MPICH or Intel MPI")])
def test_mpi4py_connects_the_processes_of_any_mpi(env, name):
  assert _find(env, "mpi4py") == (name, "mpi4py")


def test_jax_asks_kubernetes_where_its_package_is_installed():
  assert _find(pod(0), "kubernetes") == ("a Kubernetes job", None)


def test_a_tpu_pod_is_recognised_whatever_else_is_set():
  assert _find(pod(1), on_tpu=True) == ("a TPU pod", None)


@pytest.fixture
def unjoined(monkeypatch):
  """Lets JAX look at an environment that says nothing of other hosts yet; it refuses once there are devices."""
  monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
  monkeypatch.setattr(jax._src.distributed, "global_state", jax._src.distributed.State())
  for name in os.environ:
    if name.startswith(("SLURM_", "OMPI_", "PMI", "KUBERNETES_")) or name in hosts.BY_HAND:
      monkeypatch.delenv(name)
  return monkeypatch


@pytest.mark.parametrize("values", [
    ("127.0.0.1:1", "two", "0"), ("127.0.0.1:1", "2", "5"), ("127.0.0.1:1", "2", "-1"), ("127.0.0.1", "2", "0"),
    ("127.0.0.1:1", "2", ""), ("", "2", "0"),
])
def test_a_half_set_or_impossible_environment_of_several_hosts_is_refused(unjoined, values):
  for name, value in by_hand(*values).items():
    unjoined.setenv(name, value)
  with pytest.raises(UserError, match="cannot be joined.*set JAX_COORDINATOR_ADDRESS.*host:port") as error:
    parallel.initialize()
  for name, value in zip(hosts.BY_HAND, values):
    assert not value or f"{name}={value}" in str(error.value)
  assert "\n" not in str(error.value)


def test_a_launcher_that_does_not_say_enough_is_refused(unjoined):
  for name, value in srun(0, 2).items():
    if name != "SLURM_STEP_NODELIST":
      unjoined.setenv(name, value)
  with pytest.raises(UserError, match="SLURM.*cannot be joined.*set JAX_COORDINATOR_ADDRESS") as error:
    parallel.initialize()
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "five", "1e9"])
def test_a_time_to_wait_that_is_none_is_refused(monkeypatch, text):
  assert hosts.patience() == 300
  monkeypatch.setenv(hosts.PATIENCE, "2.5")
  assert hosts.patience() == 2.5
  monkeypatch.setenv(hosts.PATIENCE, text)
  with pytest.raises(UserError, match=f"DLJAX_JOIN_SECONDS={text}: give the seconds"):
    hosts.patience()


@pytest.mark.parametrize("launcher", [srun, mpirun])
def test_what_the_launchers_set_is_enough_to_join(launcher):
  code = ("import jax; from dljax.train import parallel; parallel.initialize(); "
          "print(jax.process_index(), jax.device_count())")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {**os.environ, "JAX_COORDINATOR_PORT": str(port), "XLA_FLAGS": ""}
  processes = [
      subprocess.Popen(
          [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
          env=environment | launcher(index, 2))
      for index in range(2)]
  outcomes = [process.communicate(timeout=120) for process in processes]
  assert [out.strip() for out, _ in outcomes] == ["0 2", "1 2"], outcomes
  assert [process.returncode for process in processes] == [0, 0]
