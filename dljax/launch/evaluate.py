"""--mode=eval: all metrics of every split, shown and written to evaluation.json."""

import jax
from absl import logging

from dljax import runs
from dljax.errors import DONE, RunError
from dljax.launch import tables
from dljax.train.evaluate import Evaluator, evaluate as evaluate_splits
from dljax.train.experiment import Experiment
from dljax.train.program import RunOptions
from dljax.train.workdir import Workdir, write_json


def evaluate(experiment: Experiment, folder: Workdir, options: RunOptions, which: str) -> int:
  """Evaluates a checkpoint of the run: best, latest or a number; gives the exit status."""
  program, step, state = runs.restore(experiment, folder, options, which)
  evaluator = Evaluator(experiment.task, options.parallelism, program.mesh)
  if assets := folder.read_assets():
    experiment.data.restore(assets)
  found, findings = evaluate_splits(experiment, evaluator, state.variables, state.rng, assets)
  if jax.process_index() == 0:
    print(f"{experiment.config.family} {experiment.config.preset}: checkpoint {step}")
    tables.show(tables.metrics(found))
    entries = {"checkpoint": step, "metrics": found}
    if experiment.data.corruptions:
      entries["corruptions"] = findings.tables["corruptions"]
      tables.show(tables.corruptions(entries["corruptions"], found["test"]))
    try:
      folder.write_findings(findings)
      write_json(folder.path / "evaluation.json", entries)
      print(f"written to {folder.path / 'evaluation.json'}")
    except RunError as error:  # a run that one may only read can be evaluated too
      logging.warning("%s", error)
  return DONE
