"""Every experiment's default and largest preset compiles for TPUs and GPUs that are not there.

The default for four of each, the largest, which takes the compilers up to a minute, for the largest machine.
"""

import os
import subprocess
import sys

import pytest

from dljax.train import topology
from dljax.train.program import Program, RunOptions
from dljax.train.state import parameter_count
from tests.families import EXPERIMENTS


SMALL_MACHINES, LARGEST_MACHINE = ("v5e:2x2", "h100:4"), "v5e:4x4"


def _largest(family):
  """The preset with the most parameters."""
  def size(preset):
    return parameter_count(Program(family.build(family.get_config(preset)), RunOptions(mesh={
        "data": 1, "fsdp": 1, "tensor": 1})).abstract_state.params)

  return max(family.PRESETS, key=size)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [*SMALL_MACHINES, LARGEST_MACHINE])
@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_train_step_compiles(name, machine):
  if missing := topology.missing_compiler(machine):
    pytest.skip(missing)
  preset = next(iter(EXPERIMENTS[name].PRESETS)) if machine in SMALL_MACHINES else _largest(EXPERIMENTS[name])
  # The lowest effort compiles the same collectives in a fraction of the time.
  env = {**os.environ, "JAX_OPTIMIZATION_LEVEL": "O0", "TFDS_DATA_DIR": os.devnull}
  result = subprocess.run(
      [sys.executable, "-m", f"experiments.{name}", f"--preset={preset}", "--dry_run", f"--topology={machine}"],
      capture_output=True, text=True, env=env, check=False, timeout=900)
  assert result.returncode == 0, result.stderr
  assert machine in result.stdout and "all-reduce" in result.stdout, result.stdout


def test_no_machine_is_left_out():
  assert {*SMALL_MACHINES, LARGEST_MACHINE} == set(topology.TOPOLOGIES)
