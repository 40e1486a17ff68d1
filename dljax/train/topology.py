"""Compilation of a step for TPUs and GPUs on a computer that has none.

The compilers come as pip packages: libtpu for TPUs; jax-cuda13-plugin and jax-cuda13-pjrt, without
the CUDA libraries that they ask for, for GPUs. Each turns a description of a machine into devices
that a mesh and a compilation accept, though nothing can run on them. `dljax/train/inspect.py`
reads the compiled program.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib
from jax.experimental import topologies

from dljax.errors import UserError, unknown

# libtpu looks for its machine when it is loaded. These variables say that there is none, that
# several processes may compile at the same time (otherwise the second fails at a lock file), and
# that no logs are wanted.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# The H100 (SXM, 80 GB) as CUDA's device query describes it, in the fields of XLA's
# GpuTargetConfigProto.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """A machine to compile for.

  Attributes:
    platform: "tpu" or "cuda".
    devices: the number of devices.
    memory: the memory of one device in bytes.
    description: the arguments of `jax.experimental.topologies.get_topology_desc`.
    compiler_options: the options for a compiler that has no device to query.
  """

  platform: str
  devices: int
  memory: int
  description: Mapping[str, Any]
  compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# A v5e has 16 GB; its compiler counts 15.75 GiB and refuses a program that needs more.
TOPOLOGIES: Mapping[str,
                    Topology] = {"v5e:2x2": Topology("tpu", 4, 63 * 2**28,
                                                     {"topology_name": "v5e:2x2"}),
                                 "v5e:4x4": Topology("tpu", 16, 63 * 2**28,
                                                     {"topology_name": "v5e:4x4"}),
                                 "h100:4": Topology("cuda", 4, 84929347584,
                                                    {"topology_name": "h100", "topology": "1x1x4",
                                                     "target_config": _H100},
                                                    {"xla_gpu_autotune_level": 0}),}


def topology_devices(name: str) -> list[Any]:
  """The devices of `TOPOLOGIES[name]`, to build a mesh from and compile for.

  Call it before anything asks JAX for its devices. It restricts this process to the CPU, because
  otherwise the compilers' packages would look for their machines.

  Raises:
    UserError: there is no such topology, or its compiler is not installed or cannot be used.
  """
  if name not in TOPOLOGIES:
    raise unknown("--topology", name, TOPOLOGIES)
  topology = TOPOLOGIES[name]
  if reason := missing_compiler(name):
    raise UserError(f"--topology={name}: {reason}")
  jax.config.update("jax_platforms", "cpu")
  if topology.platform == "tpu":
    for key, value in _TPU_ENVIRONMENT.items():
      os.environ.setdefault(key, value)
  try:
    return list(topologies.get_topology_desc(platform=topology.platform,
                                             **topology.description).devices)
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"--topology={name}: its compiler does not work here ({reason}); set JAX_PLATFORMS=cpu, "
                    f"and install it as: {_install(topology.platform)}") from error


def missing_compiler(name: str) -> str | None:
  """One line that says what to install for `TOPOLOGIES[name]`; None if it is installed."""
  platform = TOPOLOGIES[name].platform
  module = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}[platform]
  if importlib.util.find_spec(module):
    return None
  return f"the compiler for {platform} is not installed; run: {_install(platform)}"


def compile_lowered(lowered: jax.stages.Lowered, name: str) -> jax.stages.Compiled:
  """Compiles a program that was lowered for the devices of `topology_devices(name)`.

  Raises:
    UserError: the program needs more memory than a device has, as far as its compiler can tell.
  """
  topology = TOPOLOGIES[name]
  try:
    return lowered.compile(compiler_options=dict(topology.compiler_options))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
    raise UserError(f"--topology={name}: the step does not fit ({reason}); lower --config.batch_size, or "
                    "give --mesh more devices") from error


def _install(platform: str) -> str:
  if platform == "tpu":
    return f"pip install 'jax[tpu]=={jaxlib.__version__}'"
  version = jaxlib.__version__
  return f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
