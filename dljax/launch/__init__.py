"""The command line of every experiment: from flags to training, evaluation or prediction."""

import contextlib
import logging as python_logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags as absl_flags
from absl import logging

from dljax import errors
from dljax.errors import DONE, UserError
from dljax.launch import configs, flags, train
from dljax.launch.configs import Build, GetConfig, Resolve
from dljax.train import hosts, parallel
from dljax.train.experiment import Experiment
from dljax.train.program import RunOptions
from dljax.train.workdir import Workdir


def main(
    get_config: GetConfig, build: Build, presets: Mapping[str, str],
    resolve: Resolve | None = None,
) -> None:
  """Runs an experiment's command line, and exits.

  The exit status is 0 when done, 1 after a failure, 2 on bad input, and 75 if the run was
  preempted and its state saved. In prediction, 1 means that some inputs were skipped, and 2 that
  none was usable.

  Args:
    get_config: preset -> config.
    build: config -> experiment.
    presets: preset -> one line that says what it runs; the first is the default.
    resolve: looks up, once and before `build`, what the user's own data decide; see
      `configs.Resolve`.
  """
  absl_flags.FLAGS.mark_as_parsed()  # only absl's logging reads these flags
  logging.use_absl_handler()
  logging.get_absl_handler().setFormatter(_PlainFormatter())
  logging.set_verbosity(logging.WARNING)
  with hosts.together():
    errors.exit_with(
        lambda: _run(sys.argv, get_config, build, presets, resolve),
        "stopped before there was anything to save")


def _run(
    argv: Sequence[str], get_config: GetConfig, build: Build, presets: Mapping[str, str],
    resolve: Resolve | None = None,
) -> int:
  values, overrides = flags.parse(argv)
  preset = values.preset or next(iter(presets))
  errors.choose("--preset", preset, presets)
  config = get_config(preset)
  if values.help:
    print(flags.explain(values, config, presets))
    return DONE
  if values.list_presets:
    print("\n".join(f"{name:16}{text}" for name, text in presets.items()))
    return DONE
  flags.check_together(values, overrides)
  _use_data_dir(values.data_dir)
  options = RunOptions(
      parallelism=values.parallelism, mesh=parallel.parse_mesh(values.mesh), resume=values.resume,
      wandb=values.wandb)
  if not values.dry_run:
    parallel.initialize()  # first, so that what ends this process is known to the others at once
  config, folder = configs.resolve(values, overrides, config, get_config, presets)
  if resolve is not None and values.mode == "train":
    configs.look_up(resolve, config, overrides, folder, values.resume)
  experiment = build(config)
  if config.eval.corruptions and not experiment.data.corruptions:
    raise UserError(f"--config.eval.corruptions={config.eval.corruptions}: there is nothing to "
                    "disturb in this data; drop it")
  if values.dry_run:
    from dljax.launch import dry_run  # pylint: disable=g-import-not-at-top

    with _in_epochs(experiment, build, folder, values.epochs, None) as experiment:
      return dry_run.dry_run(experiment, options, values.topology)
  if values.mode == "train":
    with _in_epochs(experiment, build, folder, values.epochs, options) as experiment:
      return train.train(experiment, folder, options)
  from dljax import runs  # pylint: disable=g-import-not-at-top
  from dljax.launch import evaluate, predict  # pylint: disable=g-import-not-at-top

  run = runs.Run(experiment, folder, options, values.step)
  if values.mode == "eval":
    return evaluate.evaluate(run, options.parallelism)
  return predict.predict(run, values)


def _in_epochs(
    experiment: Experiment, build: Build, folder: Workdir, epochs: float | None,
    options: RunOptions | None,
) -> contextlib.AbstractContextManager[Experiment]:
  """The experiment with as many steps as --epochs asks for, if it is given."""
  if epochs is None:
    return contextlib.nullcontext(experiment)
  from dljax.train.epochs import in_epochs  # pylint: disable=g-import-not-at-top

  return in_epochs(experiment, build, folder, epochs, options)


def _use_data_dir(path: str) -> None:
  """Makes `path` the TFDS directory of this process, unless it is ""."""
  errors.check_local("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", ""))
  if not path:
    return
  if not Path(path).is_dir():
    raise UserError(f"--data_dir={path} is not a folder; name the one that holds the TFDS sets")
  os.environ["TFDS_DATA_DIR"] = path


class _PlainFormatter(python_logging.Formatter):
  """Warnings as a person reads them."""

  def format(self, record):
    return f"{record.levelname.lower()}: {record.getMessage()}"
