"""A finished run as an object."""

from typing import Any

from absl import logging

from dljax.errors import UserError
from dljax.train.checkpoint import Checkpointer
from dljax.train.experiment import Experiment
from dljax.train.program import Program, RunOptions
from dljax.train.workdir import Workdir


def restore(
    experiment: Experiment, folder: Workdir, options: RunOptions, which: str,
) -> tuple[Program, int, Any]:
  """The program, and the step and state that `which` (best, latest or a number) names.

  Raises:
    UserError: there is no such checkpoint, or it does not fit the experiment.
  """
  with Checkpointer(folder.checkpoints, assets=folder.data, read_only=True) as checkpointer:
    host = checkpointer.host()
    if host is None:
      raise UserError(f"--workdir={folder.path} holds no checkpoint; train first")
    steps, best = checkpointer.steps(), host["best_step"]
    if which not in ("best", "latest") and not which.isdecimal():
      raise UserError(f"--step={which}: must be best, latest or a number, one of {steps}")
    if best not in steps:
      if which == "best" and best >= 0:  # there is none where nothing is monitored
        logging.warning(
            "checkpoint %d, the best, is gone; the latest, %d, takes its place", best, steps[-1])
      best = None
    step = int(which) if which.isdecimal() else best if which == "best" else None
    program = Program(experiment, options)
    restored = checkpointer.restore(program.abstract_state, step)
    if restored is None:
      raise UserError(
          f"--workdir={folder.path} holds no intact checkpoint; train again in another --workdir")
    return program, restored.step, restored.state
