"""--mode=eval: shows all metrics of every split, and writes them to evaluation.json."""

import jax
from absl import logging

from dljax.config import title
from dljax.errors import DONE, RunError
from dljax.launch import tables
from dljax.runs import Run
from dljax.train.evaluate import Evaluator, evaluate as evaluate_splits
from dljax.train.metrics import say
from dljax.train.parallel import Mode
from dljax.train.progress import Compilations
from dljax.train.workdir import write_json


def evaluate(run: Run, parallelism: Mode) -> int:
  """Evaluates the run's checkpoint on all splits; returns the exit status."""
  experiment, folder = run.experiment, run.folder
  program, step, state = run.restore()
  evaluator = Evaluator(experiment.task, parallelism, program.mesh, experiment.data.context,
                        Compilations(say))
  found, findings = evaluate_splits(
      experiment, evaluator, state.variables, state.rng, run.assets)
  if jax.process_index() == 0:
    entries = {"checkpoint": step, "metrics": found}
    if experiment.data.corruptions:
      entries["corruptions"] = findings.tables["corruptions"]
    place = folder.path / "evaluation.json"
    # The file comes first: whoever reads what is printed may stop.
    written = ""
    try:
      write_json(place, entries)
      written = f"written to {place}"
      folder.write_findings(findings, title(run.config))
    except RunError as error:  # a read-only run can be evaluated too
      logging.warning("%s", error)
    print(f"{title(run.config)}: checkpoint {step}")
    tables.show(tables.metrics(found))
    if experiment.data.corruptions:
      tables.show(tables.corruptions(entries["corruptions"], found["test"]))
    if written:
      print(written)
  return DONE
