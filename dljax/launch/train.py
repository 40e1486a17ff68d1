"""--mode=train: trains, then shows the result."""

import jax

from dljax.config import title
from dljax.errors import DONE
from dljax.launch import tables
from dljax.train.experiment import Experiment
from dljax.train.loop import fit
from dljax.train.program import RunOptions
from dljax.train.workdir import Workdir


def train(experiment: Experiment, folder: Workdir, options: RunOptions) -> int:
  """Trains the run of `folder` to its end, unless it is finished; returns the exit status."""
  folder.check(experiment.config, options.resume)
  if folder.is_finished(experiment.config.total_steps):
    print("this run has finished; its result:")
    if options.wandb:
      print(f"warning: --wandb={options.wandb}: nothing is sent, as nothing is trained; the project "
            "has what was logged while the run trained with this flag")
  else:
    fit(experiment, folder.path, options)
  if jax.process_index() == 0:
    _print_result(folder)
  return DONE


def _print_result(folder: Workdir) -> None:
  """Prints a short table of results, and the places of the files."""
  result = folder.result()
  print(f"\n{title(folder.read_config())}: {result['steps']} steps, "
        f"{result['params']:,} parameters, {result['seconds']:.1f} s on {result['devices']}")
  tables.show(tables.metrics(result["metrics"]))
  places = {"checkpoint": folder.checkpoints / str(result["checkpoint"]),
            "result": folder.result_file, "metrics": folder.metrics_file,
            "pictures": folder.figures}
  print("\n".join(f"{name:12}{path}" for name, path in places.items()))
