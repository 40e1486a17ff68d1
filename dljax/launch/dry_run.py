"""--dry_run: shows the model, the batch and the compiled step's memory, from shapes alone."""

import jax

from dljax.errors import DONE
from dljax.launch import tables
from dljax.train import flops, inspect, topology
from dljax.train.experiment import Experiment
from dljax.train.program import Program, RunOptions


def dry_run(experiment: Experiment, options: RunOptions, machine: str) -> int:
  """Shows the memory and work of a training step on `machine`; returns the exit status.

  Args:
    experiment: the experiment that would be trained.
    options: the mesh and the parallelism.
    machine: a name of `topology.TOPOLOGIES`, or "" for this machine.
  """
  program = Program(experiment, options, topology.topology_devices(machine) if machine else None)
  lowered = program.lower_train_step()
  compiled = topology.compile_lowered(lowered, machine) if machine else lowered.compile()
  tables.show(inspect.render_dry_run(
      experiment.data.batch_spec, flops.task_layers(experiment.task, experiment.data.batch_spec),
      program.train_step_flops(), inspect.summarize_compiled(compiled),
      devices=program.mesh.devices.size,
      machine=machine or jax.devices()[0].device_kind,
      device_memory=topology.TOPOLOGIES[machine].memory if machine else None))
  return DONE
