"""Every experiment's default and largest preset compiles for TPUs and GPUs that are not there."""

import os
import subprocess
import sys

import pytest

from dljax.train import topology
from dljax.train.program import Program, RunOptions
from dljax.train.state import parameter_count
from tests.families import EXPERIMENTS


def _presets(family):
  """The default and the one with the most parameters."""
  def size(preset):
    return parameter_count(Program(family.build(family.get_config(preset)), RunOptions(mesh={
        "data": 1, "fsdp": 1, "tensor": 1})).abstract_state.params)

  presets = list(family.PRESETS)
  return list(dict.fromkeys([presets[0], max(presets, key=size)]))


@pytest.mark.slow
@pytest.mark.parametrize("machine", sorted(topology.TOPOLOGIES))
@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_train_step_compiles(name, machine):
  if missing := topology.missing_compiler(machine):
    pytest.skip(missing)
  for preset in _presets(EXPERIMENTS[name]):
    # The lowest effort compiles the same collectives in a fraction of the time.
    env = {**os.environ, "JAX_OPTIMIZATION_LEVEL": "O0", "TFDS_DATA_DIR": os.devnull}
    result = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", f"--preset={preset}", "--dry_run", f"--topology={machine}"],
        capture_output=True, text=True, env=env, check=False, timeout=900)
    assert result.returncode == 0, result.stderr
    assert machine in result.stdout and "all-reduce" in result.stdout, result.stdout
