"""From epochs to steps, by the number of training examples."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import ml_collections

from dljax import config as config_lib
from dljax.data.pipeline import all_rows, opened
from dljax.errors import UserError
from dljax.train import parallel
from dljax.train.experiment import Experiment
from dljax.train.program import RunOptions
from dljax.train.workdir import Workdir


@contextlib.contextmanager
def in_epochs(
    experiment: Experiment, build: Callable[[ml_collections.ConfigDict], Experiment],
    folder: Workdir, epochs: float, options: RunOptions | None,
) -> Iterator[Experiment]:
  """Gives the experiment with as many steps as --epochs asks for.

  The number of training examples is known once the data is open. It stays open for the training,
  because reading a large text takes minutes.

  Args:
    experiment: the experiment, whose `config.total_steps` is set.
    build: config -> experiment; built again, with the data kept, as a task may read the steps.
    folder: the run's folder; a run that continues brings what was fitted to the data.
    epochs: the value of --epochs.
    options: the devices that the data is then read for; None only counts the examples.

  Raises:
    UserError: the data is missing, or there are too many steps.
  """
  config, data = experiment.config, experiment.data
  if assets := folder.read_assets():
    data.restore(assets)
  with contextlib.ExitStack() as stack:
    try:
      rows = all_rows
      if options is not None:
        mesh = parallel.make_mesh(options.mesh, options.parallelism)
        rows = functools.partial(parallel.batch_rows, mesh)
      stack.enter_context(opened(data.train, rows=rows))
    except UserError as error:
      raise UserError(f"--epochs needs the number of training examples; {error} (or say "
                      "--config.total_steps=N in place of --epochs)") from None
    steps = epochs * data.train.num_examples / config.batch_size
    if steps >= 2**31:
      raise UserError(f"--epochs={epochs:g}: gives {steps:.3g} steps; ask for fewer")
    # Rounded first, because 1.1 epochs of 1000 examples are 1100.0000000000002.
    config.total_steps = max(1, math.ceil(round(steps, 6)))
    config_lib.validate(config)
    yield dataclasses.replace(build(config), data=data)
