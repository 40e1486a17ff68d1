"""One pass over a split: summed metrics, and predictions for the metrics of whole sets."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dljax import report
from dljax.data.pipeline import Pipeline, opened
from dljax.tasks.base import Batch, Findings, Task
from dljax.train import metrics, parallel, step
from dljax.train.experiment import Experiment
from dljax.train.program import Program
from dljax.train.state import TrainState


class Evaluator:
  """Evaluates a task's variables on any split; compiles once for sums, and once with predictions."""

  def __init__(self, task: Task, mode: parallel.Mode, mesh: jax.sharding.Mesh):
    self._task = task
    self._mode = mode
    self._mesh = mesh
    self._steps = {
        predictions: parallel.compile_step(
            step.make_eval_step(task, predictions=predictions), mode, mesh,
            inputs=("state", "shared", "batch"), outputs=("shared", "batch"))
        for predictions in (False, True)
    }

  def sums(self, variables: Mapping[str, Any], rng: jax.Array, pipeline: Pipeline, name: str) -> dict[str, float]:
    """The metrics that `Task.summarize` makes of the split's sums."""
    sums: dict[str, Any] = {}
    with contextlib.closing(self._batches(variables, rng, pipeline, name, sums, predictions=False)) as batches:
      for _ in batches:
        pass
    return dict(self._task.summarize(sums))

  def metric_names(self, variables: Mapping[str, Any], rng: Any, pipeline: Pipeline) -> list[str]:
    """What `sums` would give, found by tracing alone."""
    batch = {k: v for k, v in pipeline.batch(0).items() if not k.startswith(parallel.HOST)}
    sums, _ = jax.eval_shape(step.make_eval_step(self._task, predictions=False), variables, rng, batch)
    return list(self._task.summarize(jax.tree.map(lambda x: np.zeros(x.shape), sums)))

  def full(
      self, variables: Mapping[str, Any], rng: jax.Array, pipeline: Pipeline, name: str, assets: Mapping[str, Any],
  ) -> Findings:
    """What there is to say of the split; all its metrics, summed ones included."""
    sums: dict[str, Any] = {}
    with contextlib.closing(self._batches(variables, rng, pipeline, name, sums, predictions=True)) as rows:
      found = self._task.evaluate(rows, sums, assets)
      for _ in rows:  # a task need not look at every row
        pass
    return dataclasses.replace(found, metrics={**self._task.summarize(sums), **found.metrics})

  def _batches(
      self, variables, rng, pipeline: Pipeline, name: str, sums: dict[str, Any], *, predictions: bool,
  ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Runs the split; adds to `sums`, in float64; yields (predictions, host batch) without padding."""
    load = lambda i: (batch := pipeline.batch(i), parallel.put_batch(batch, self._mode, self._mesh))
    with contextlib.closing(prefetch(load, range(pipeline.num_batches))) as batches:
      for batch, on_device in metrics.progress(batches, f"evaluate {name}", pipeline.num_batches):
        new, predicted = self._steps[predictions](variables, rng, on_device)
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), new)
        for key, pair in new.items():
          sums[key] = tuple(map(np.add, sums[key], pair)) if key in sums else pair
        if predictions:
          rows, host = parallel.rows_to_host(predicted, self._mode), parallel.gather_hosts(batch)
          real = np.asarray(host["mask"]) > 0
          yield jax.tree.map(lambda x: x[real], (rows, host))


def evaluate(
    experiment: Experiment, evaluator: Evaluator, variables: Mapping[str, Any], rng: jax.Array,
    assets: Mapping[str, Any],
) -> tuple[dict[str, Mapping[str, float]], Findings]:
  """All metrics of every split, by its name, and all findings of the last, the one that counts.

  Where the experiment has corruptions, their table and figure are among the findings. Opens the data where it is
  not open.
  """
  metrics_of, findings = {}, Findings()
  passes = [pipeline for passes in experiment.corruptions.values() for pipeline in passes.values()]
  with opened(*experiment.evals.values(), *passes):
    for split, pipeline in experiment.evals.items():
      findings = evaluator.full(variables, rng, pipeline, split, assets)
      metrics_of[split] = findings.metrics
    table = [
        {"corruption": name, "strength": strength, **evaluator.sums(variables, rng, pipeline, f"{name} {strength}")}
        for name, passes in experiment.corruptions.items() for strength, pipeline in sorted(passes.items())]
  if table:
    curves = {metric: {name: [row[metric] for row in table if row["corruption"] == name]
                       for name in experiment.corruptions} for metric in list(table[0])[2:]}
    findings = dataclasses.replace(
        findings, tables={**findings.tables, "corruptions": table},
        figures={**findings.figures, "corruptions": report.strengths(curves, metrics_of["test"])})
  return metrics_of, findings


def predict(experiment: Experiment, program: Program, mode: parallel.Mode, state: TrainState, batch: Batch) -> Any:
  """Predictions for any number of rows, as NumPy arrays.

  Args:
    experiment: gives the task and the batch size.
    program: gives the devices.
    mode: "jit" or "pmap".
    state: gives the variables.
    batch: rows as `Experiment.encode` makes them; fields "host/..." are left out.
  """
  size = experiment.config.eval_batch_size
  run = parallel.compile_step(
      step.make_predict_step(experiment.task), mode, program.mesh,
      inputs=("state", "shared", "batch"), outputs=("batch",))
  fields = {k: np.asarray(v) for k, v in batch.items() if not k.startswith(parallel.HOST)}
  count = len(next(iter(fields.values())))
  hosts, host = jax.process_count(), jax.process_index()
  parts = []
  for start in metrics.progress(range(0, count, size), "predict"):
    rows = {k: v[start:start + size] for k, v in fields.items()}
    padded = {k: np.concatenate([v, np.zeros((size - len(v), *v.shape[1:]), v.dtype)]) for k, v in rows.items()}
    mine = {k: np.split(v, hosts)[host] for k, v in padded.items()}
    out, = run(state.variables, state.rng, parallel.put_batch(mine, mode, program.mesh))
    parts.append(jax.tree.map(lambda x: x[:min(size, count - start)], parallel.rows_to_host(out, mode)))
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def prefetch(load: Callable[[int], Any], steps: Iterable[int], ahead: int = 2) -> Iterator[Any]:
  """Yields `load(step)` for each step, computed in a thread up to `ahead` steps in advance.

  Whoever may not take them all has to close it: a traceback keeps it alive, and Python waits for its thread.
  """
  # Not an executor: its futures would cost a step of 2 ms another percent.
  wanted, loaded = queue.SimpleQueue(), queue.SimpleQueue()

  def work() -> None:
    for step in iter(wanted.get, None):
      try:
        loaded.put((load(step), None))
      except BaseException as error:  # raised where its batch is taken
        loaded.put((None, error))

  def take() -> Any:
    batch, error = loaded.get()
    if error is not None:
      raise error
    return batch

  thread = threading.Thread(target=work, name="prefetch")
  thread.start()
  pending = 0
  try:
    for step in steps:
      wanted.put(step)
      pending += 1
      if pending > ahead:
        pending -= 1
        yield take()
    for _ in range(pending):
      yield take()
  finally:
    with contextlib.suppress(queue.Empty):
      while True:
        wanted.get_nowait()
    wanted.put(None)
    thread.join()
