"""The row "sharding": the bytes that devices exchange for one block of a vision transformer.

The numbers are read from programs compiled for TPUs that need not be there, so that they are the
same on every machine. A block's share is (the bytes of a network of 4 blocks - those of one of 2)
/ 2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dljax.train import inspect, parallel, topology
from dljax.train.experiment import Experiment
from dljax.train.program import Program, RunOptions
from experiments import vit
from experiments.benchmark.measurement import Measurement, Settings

MACHINE = "v5e:4x4"
LAYERS = (2, 4)
# A TPU scatters sums by a ring of permutations, which overlaps with the product that it sums.
SCATTERS = ("reduce-scatter", "collective-permute")
_MIB = 2**20


def measure_sharding(
    settings: Settings, variant: str = "vit_l16", machine: str = MACHINE,
    both: str = "fsdp:4,tensor:4", fsdp: str = "fsdp:16", layers: Sequence[int] = LAYERS,
) -> list[Measurement]:
  """The bytes that collectives move for a block of ViT-L/16 on sixteen TPUs, as compiled.

  Args:
    settings: the settings, without effect because nothing is timed.
    variant: a key of `vit.VARIANTS`.
    machine: a key of `topology.TOPOLOGIES`.
    both, fsdp: meshes, with and without devices on `tensor`.
    layers: two numbers of blocks, whose difference is a block's share.
  """
  del settings
  devices = topology.topology_devices(machine)
  experiment = _experiment(variant)
  name = f"{variant}, bfloat16, {machine}, "
  moved, _ = _of_a_block(experiment, machine, devices, both, layers)
  details = {f"{kind}_bytes": size for kind, size in moved.items()}
  found = [Measurement(name + both, "MiB that collectives move for a block",
                       sum(moved.values()) / _MIB, 440, details=details)]
  moved, gradient = _of_a_block(experiment, machine, devices, fsdp, layers)
  scattered = sum(moved.get(kind, 0) for kind in SCATTERS)
  size = parallel.parse_mesh(fsdp)["fsdp"]
  expected = gradient * (size - 1) / size
  details = {f"{kind}_bytes": x for kind, x in moved.items()} | {"gradient_bytes": gradient}
  found.append(Measurement(
      name + fsdp, f"scattered sums, off {size - 1}/{size} of a block's gradient by",
      abs(scattered / expected - 1), 0.15, details=details))
  return found


def _experiment(variant: str) -> Experiment:
  config = vit.get_config("imagenet2012")
  config.model.variant, config.model.dtype = variant, "bfloat16"
  return vit.build(config)


def _of_a_block(
    experiment: Experiment, machine: str, devices: Sequence[Any], mesh: str,
    layers: Sequence[int],
) -> tuple[Mapping[str, float], int]:
  """(kind of collective -> bytes on a device, bytes of the gradient that fsdp splits) of a block.
  """
  sizes, model = [], experiment.task.model
  options = RunOptions(mesh=parallel.parse_mesh(mesh))
  for count in layers:
    task = dataclasses.replace(experiment.task, model=model.clone(num_layers=count))
    program = Program(dataclasses.replace(experiment, task=task), options, devices)
    compiled = topology.compile_lowered(program.lower_train_step(), machine)
    summary = inspect.summarize_compiled(compiled)
    sizes.append({c.kind: c.size for c in summary.collectives})
  (few, many), more = sizes, layers[1] - layers[0]
  moved = {kind: (many.get(kind, 0) - few.get(kind, 0)) / more for kind in few | many}
  block = jax.tree.leaves(program.abstract_state.params["block0"])
  split = sum(x.size for x in block if "fsdp" in x.sharding.spec)
  return moved, split * jnp.dtype(model.dtype).itemsize
