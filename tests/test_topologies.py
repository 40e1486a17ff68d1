"""Every experiment compiles for TPUs and GPUs that are not there.

The default preset for four GPUs and for sixteen TPUs, and that of one family for four TPUs, of deep networks with
fewer layers of all kinds; of two families, for sixteen TPUs, the largest preset. All but one compile in this process:
starting one and loading a compiler takes as long as a small network.
"""

import functools
import os
import subprocess
import sys

import jax
import pytest

from dljax.models import resnet
from dljax.train import topology
from tests import smallest
from tests.command import run
from tests.families import EXPERIMENTS

GPUS, FEW_TPUS, MANY_TPUS = "h100:4", "v5e:2x2", "v5e:4x4"
ON_FEW_TPUS = "mlp"
# One with a large classifier, and one with batch normalisation, of which one block of each stage is enough: the
# compiler takes most of a minute for all 16.
LARGEST = {"alexnet": ("imagenet2012", None), "resnet": (
    "imagenet2012", functools.partial(resnet.ResNet, block=resnet.Bottleneck, stage_sizes=(1, 1, 1, 1)))}
# With images of 96 pixels the compiler for TPUs takes several times as long.
SMALLER = {"retinanet": ["--config.data.image_shape=16,16,1"]}
CASES = [(name, machine) for name in EXPERIMENTS for machine in (GPUS, MANY_TPUS)]
CASES.append((ON_FEW_TPUS, FEW_TPUS))


@pytest.fixture(autouse=True)
def low_effort():
  """Compiles the same collectives in a fraction of the time."""
  efforts = {"jax_optimization_level": "O0", "jax_memory_fitting_level": "O0"}
  before = {name: getattr(jax.config, name) for name in efforts}
  for name, effort in efforts.items():
    jax.config.update(name, effort)
  yield
  for name, effort in before.items():
    jax.config.update(name, effort)


@pytest.mark.slow
@pytest.mark.parametrize("name, machine", CASES)
def test_train_step_compiles(name, machine, monkeypatch):
  if missing := topology.missing_compiler(machine):
    pytest.skip(missing)
  monkeypatch.setenv("TFDS_DATA_DIR", os.devnull)
  if machine == MANY_TPUS and name in LARGEST:
    preset, network = LARGEST[name]
    arguments = [f"--preset={preset}"]
    if network:
      monkeypatch.setitem(resnet.VARIANTS, "one_block_each", network)
      arguments.append("--config.model.variant=one_block_each")
  else:
    arguments = smallest.arguments(name, monkeypatch) + SMALLER.get(name, [])
  outcome = run(EXPERIMENTS[name], *arguments, "--dry_run", f"--topology={machine}")
  assert outcome.status == 0, outcome
  assert machine in outcome.out and "all-reduce" in outcome.out, outcome


@pytest.mark.slow
def test_a_process_of_its_own_compiles():
  if missing := topology.missing_compiler(FEW_TPUS):
    pytest.skip(missing)
  # The environment of a user, who need not set any of these.
  env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS") and "TPU" not in k}
  result = subprocess.run(
      [sys.executable, "-m", "experiments.lenet", "--dry_run", f"--topology={FEW_TPUS}"],
      capture_output=True, text=True, env=env, check=False, timeout=300)
  assert result.returncode == 0, result.stderr
  assert FEW_TPUS in result.stdout and "all-reduce" in result.stdout, result.stdout


def test_no_machine_is_left_out():
  assert {machine for _, machine in CASES} == set(topology.TOPOLOGIES)
