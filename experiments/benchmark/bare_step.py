"""The compiled train step alone, as `fit` calls it, without pipeline, logging and checkpoints."""

import collections
import time

import jax
import numpy as np

from dljax.data.pipeline import HostBatch
from dljax.train import parallel
from dljax.train.experiment import Experiment
from dljax.train.program import Program, RunOptions
from dljax.train.state import NOT_FAILED

ONE_DEVICE = RunOptions(mesh={"data": 1, "fsdp": 1, "tensor": 1}, progress=False)


class BareStep:
  """The train step on one batch on the device; the constructor compiles it.

  Attributes:
    program: the compiled experiment.
    compile_seconds: the time to trace, lower and compile the train step.
    state: the state after the steps so far.
    batch: the batch, on the device.
  """

  def __init__(self, experiment: Experiment, batch: HostBatch):
    self.program = program = Program(experiment, ONE_DEVICE)
    start = time.perf_counter()
    program.lower_train_step().compile()  # `train_step` finds it
    self.compile_seconds = time.perf_counter() - start
    self.state = program.init_state()
    self.batch = parallel.put_batch(batch, ONE_DEVICE.parallelism, program.mesh)
    self._ahead = parallel.steps_in_flight(program.mesh)
    self._lr_scale = parallel.put_shared(np.float32(1), program.mesh)

  @property
  def failed(self) -> bool:
    """Whether a loss or gradient was not finite, after which the steps change nothing."""
    return int(self.state.failed_step) != NOT_FAILED

  def run(self, steps: int) -> float:
    """Seconds per step."""
    running = collections.deque()
    start = time.perf_counter()
    for _ in range(steps):
      self.state, out = self.program.train_step(self.state, self.batch, self._lr_scale)
      running.append(out["failed_step"])
      if len(running) == self._ahead:
        running.popleft().block_until_ready()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / steps
