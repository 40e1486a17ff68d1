"""Every experiment compiles for TPUs and GPUs that are not there.

The default preset for four GPUs, and of a few families for four TPUs; the largest preset, which takes the compiler up
to a minute, for sixteen TPUs.
"""

import os
import subprocess
import sys

import pytest

from dljax.train import topology
from dljax.train.program import Program, RunOptions
from dljax.train.state import parameter_count
from tests.families import EXPERIMENTS


GPUS, FEW_TPUS, MANY_TPUS = "h100:4", "v5e:2x2", "v5e:4x4"
FAMILIES_ON_FEW_TPUS = ("lenet", "resnet", "rnn")
CASES = [(name, machine) for name in EXPERIMENTS for machine in (GPUS, MANY_TPUS)]
CASES += [(name, FEW_TPUS) for name in FAMILIES_ON_FEW_TPUS]


def _largest(family):
  """The preset with the most parameters."""
  def size(preset):
    return parameter_count(Program(family.build(family.get_config(preset)), RunOptions(mesh={
        "data": 1, "fsdp": 1, "tensor": 1})).abstract_state.params)

  return max(family.PRESETS, key=size)


@pytest.mark.slow
@pytest.mark.parametrize("name, machine", CASES)
def test_train_step_compiles(name, machine):
  if missing := topology.missing_compiler(machine):
    pytest.skip(missing)
  preset = _largest(EXPERIMENTS[name]) if machine == MANY_TPUS else next(iter(EXPERIMENTS[name].PRESETS))
  # The lowest effort compiles the same collectives in a fraction of the time.
  env = {**os.environ, "JAX_OPTIMIZATION_LEVEL": "O0", "TFDS_DATA_DIR": os.devnull}
  result = subprocess.run(
      [sys.executable, "-m", f"experiments.{name}", f"--preset={preset}", "--dry_run", f"--topology={machine}"],
      capture_output=True, text=True, env=env, check=False, timeout=900)
  assert result.returncode == 0, result.stderr
  assert machine in result.stdout and "all-reduce" in result.stdout, result.stdout


def test_no_machine_is_left_out():
  assert {machine for _, machine in CASES} == set(topology.TOPOLOGIES)
