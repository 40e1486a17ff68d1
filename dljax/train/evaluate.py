"""A pass over a split: its summed metrics, and predictions for the metrics of whole sets."""

import collections
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dljax import report
from dljax.data.pipeline import Pipeline, opened
from dljax.tasks.base import CARRY, Batch, Findings, Task
from dljax.train import metrics, parallel, step
from dljax.train.experiment import Experiment
from dljax.train.program import Program
from dljax.train.progress import Compilations
from dljax.train.state import TrainState, join_carry, split_carry

CHUNK = 8  # tokens that `generate` yields at once
_PATIENCE = 1.0  # seconds that a prediction may compile before a line says so


class Evaluator:
  """Evaluates a task's variables on any split; compiles once for sums, and once with predictions.

  Args:
    task: gives the loss and the predictions.
    mode: "jit" or "pmap".
    mesh: the devices.
    context: () -> the host arrays of `Data.context`, for `Task.context`.
    compilations: says what is compiled; by default nothing is said, and no bar is shown.
    check: called before each batch; what it raises ends the pass.
  """

  def __init__(
      self, task: Task, mode: parallel.Mode, mesh: jax.sharding.Mesh,
      context: Callable[[], Mapping[str, Any]] = dict,
      compilations: Compilations = Compilations(), check: Callable[[], None] = lambda: None,
  ):
    self._task = task
    self._check = check
    self._show = not compilations.quiet
    self._mode = mode
    self._mesh = mesh
    # The `data.pipeline.Rows` of this process, to open pipelines with.
    self.rows = functools.partial(parallel.batch_rows, mesh)
    self._context = Context(task, mode, mesh, context)
    names = {False: "evaluation step", True: "evaluation step with predictions"}
    self._steps = {
        predictions: compilations.of(parallel.compile_step(
            step.make_eval_step(task, predictions=predictions), mode, mesh,
            inputs=("state", "shared", "batch", "shared"),
            outputs=("shared", "batch", "state")), name, batch=2, aside=True)
        for predictions, name in names.items()
    }

  def sums(
      self, variables: Mapping[str, Any], rng: jax.Array, pipeline: Pipeline, name: str,
  ) -> dict[str, float]:
    """Returns the metrics that `Task.summarize` computes from the split's sums."""
    sums: dict[str, Any] = {}
    with contextlib.closing(self._batches(variables, rng, pipeline, name, sums,
                                          predictions=False)) as batches:
      for _ in batches:
        pass
    return dict(self._task.summarize(sums))

  def metric_names(self, variables: Mapping[str, Any], rng: Any, pipeline: Pipeline) -> list[str]:
    """Returns the names of the metrics that `sums` would give, by tracing alone."""
    batch = self._global_batch(pipeline.batch(0))
    variables = join_carry(variables, self._carry(variables, batch))
    sums, *_ = jax.eval_shape(step.make_eval_step(self._task, predictions=False), variables, rng,
                              batch, {})
    return list(self._task.summarize(jax.tree.map(lambda x: np.zeros(x.shape), sums)))

  def full(
      self, variables: Mapping[str, Any], rng: jax.Array, pipeline: Pipeline, name: str,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Returns the findings about the split, with all its metrics, the summed ones included.

    If the pipeline has a sample, the findings are about the sample; the summed metrics are always
    about all examples.
    """
    sums: dict[str, Any] = {}
    whole, sampled = range(pipeline.num_batches), pipeline.num_sample_batches
    first = whole[:sampled] if sampled else whole
    batches = self._batches(variables, rng, pipeline, name, sums, predictions=True, steps=first)
    with contextlib.closing(batches) as rows:
      found = self._task.evaluate(rows, sums, assets)
      for _ in rows:  # a task may have ignored the last rows
        pass
    if sampled:
      rest = self._batches(variables, rng, pipeline, name, sums, predictions=False,
                           steps=whole[sampled:])
      collections.deque(rest, maxlen=0)
    return dataclasses.replace(found, metrics={**self._task.summarize(sums), **found.metrics})

  def _batches(
      self, variables, rng, pipeline: Pipeline, name: str, sums: dict[str, Any], *,
      predictions: bool, steps: range | None = None,
  ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Runs the split, or its batches `steps`, and yields (predictions, host batch) without padding.

    It adds to `sums`, in float64. A recurrent carry starts as zeros, whatever training has left in
    it, and is passed from batch to batch.
    """
    carry = None
    context = self._context(variables, rng) if predictions else {}
    load = lambda i: (batch := pipeline.batch(i),
                      parallel.put_batch(batch, self._mode, self._mesh))
    steps = range(pipeline.num_batches) if steps is None else steps
    with contextlib.closing(prefetch(load, steps)) as batches:
      for batch, on_device in metrics.progress(
          batches, f"evaluate {name}", len(steps), self._show):
        self._check()
        if carry is None:
          carry = parallel.zero_rows(self._carry(variables, self._global_batch(batch)), self._mesh)
        new, predicted, carry = self._steps[predictions](
            join_carry(variables, carry), rng, on_device, context)
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), new)
        for key, pair in new.items():
          sums[key] = tuple(map(np.add, sums[key], pair)) if key in sums else pair
        if predictions:
          drawn = set(self._task.evaluate_draws)
          rows = parallel.rows_to_host(
              {k: v for k, v in predicted.items() if k not in drawn}, self._mode)
          host = parallel.gather_hosts(
              {k: v for k, v in batch.items() if k == "mask" or self._reads(k)},
              self._mode, self._mesh)
          real = np.flatnonzero(host["mask"] > 0)
          rows, host = jax.tree.map(lambda x: x[real], (rows, host))
          field = functools.partial(DrawnField, real, self._mode, self._mesh)
          yield (rows | {k: field(predicted[k]) for k in drawn & predicted.keys()},
                 host | {k: field(on_device[k], batch[k]) for k in drawn & batch.keys()})

  def _reads(self, field: str) -> bool:
    return any(field == name or name.endswith("/") and field.startswith(name)
               for name in self._task.evaluate_reads)

  def _global_batch(self, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the specification of the global batch of which `batch` are this process's rows."""
    return {k: jax.ShapeDtypeStruct((parallel.global_rows(self._mesh, len(v)), *v.shape[1:]),
                                    v.dtype)
            for k, v in batch.items() if not k.startswith(parallel.HOST)}

  def _carry(self, variables, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Returns the specification of the carry for a global batch, {"carry": ...}, or {} if the task
    has none.
    """
    if CARRY not in variables:
      return {}
    return split_carry(dict(jax.eval_shape(self._task.init, jax.random.key(0), batch)))[1]


class DrawnField:
  """A field of `Task.evaluate_draws`: the rows that are asked for are gathered over hosts.

  Args:
    real: the rows of the global batch that are no padding, by which it is indexed.
    mode: "jit" or "pmap".
    mesh: the devices.
    on_device: the global batch, or a prediction for it.
    own: this process's rows of the batch, if it has them.

  Attributes:
    shape: the shape [rows, ...].
  """

  def __init__(
      self, real: np.ndarray, mode: parallel.Mode, mesh: jax.sharding.Mesh, on_device: jax.Array,
      own: np.ndarray | None = None,
  ):
    self._real, self._mode, self._mesh, self._on_device, self._own = (
        real, mode, mesh, on_device, own)
    self.shape = (len(real), *on_device.shape[2 if mode == "pmap" else 1:])

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    """Returns the rows, [k, ...]; every host has to ask for the same."""
    rows = self._real[rows]
    if jax.process_count() == 1:
      whole = parallel.rows_to_host(self._on_device, self._mode) if self._own is None else self._own
      return whole[rows]
    found = parallel.some_rows_to_host(self._on_device, rows, self._mode, self._mesh)
    return found if self._own is None else found.astype(self._own.dtype)


class Context:
  """Computes what `Task.context` gives, once for each pass over the rows.

  Args:
    task: gives the context.
    mode: "jit" or "pmap".
    mesh: the devices.
    inputs: () -> the host arrays of `Data.context`.
  """

  def __init__(
      self, task: Task, mode: parallel.Mode, mesh: jax.sharding.Mesh,
      inputs: Callable[[], Mapping[str, Any]],
  ):
    self._inputs = inputs
    self._step = step.make_context_step(task)
    self._compiled = parallel.compile_step(
        self._step, mode, mesh, inputs=("state", "shared", "shared"), outputs=("shared",))

  def __call__(self, variables: Mapping[str, Any], rng: jax.Array) -> Any:
    """Returns the context, the same on every device; {} if the task has none."""
    variables, _ = split_carry(variables)
    inputs = {name: np.asarray(x) for name, x in self._inputs().items()}
    context, = jax.eval_shape(self._step, variables, rng, inputs)
    if not jax.tree.leaves(context):
      return context
    return self._compiled(variables, rng, inputs)[0]


def draw_samples(experiment: Experiment) -> None:
  """Draws the sample of `config.eval.examples` for every evaluation, before the data is opened."""
  config = experiment.config
  for pipeline in experiment.data.evals.values():
    pipeline.sample(config.eval.examples, config.seed)


def evaluate(
    experiment: Experiment, evaluator: Evaluator, variables: Mapping[str, Any], rng: jax.Array,
    assets: Mapping[str, Any],
) -> tuple[dict[str, Mapping[str, float]], Findings]:
  """Returns the metrics of every split by its name, and the findings of the last split.

  If the experiment has corruptions, their table and figure are among the findings. The data is
  opened if it is not open.
  """
  metrics_of, findings = {}, Findings()
  draw_samples(experiment)
  passes = [pipeline for passes in experiment.data.corruptions.values()
            for pipeline in passes.values()]
  with opened(*experiment.data.evals.values(), *passes, rows=evaluator.rows):
    for split, pipeline in experiment.data.evals.items():
      findings = evaluator.full(variables, rng, pipeline, split, assets)
      metrics_of[split] = findings.metrics
    table = [{"corruption": name, "strength": strength,
              **evaluator.sums(variables, rng, pipeline, f"{name} {strength}")}
             for name, passes in experiment.data.corruptions.items()
             for strength, pipeline in sorted(passes.items())]
  if table:
    curves = {metric: {name: [row[metric] for row in table if row["corruption"] == name]
                       for name in experiment.data.corruptions} for metric in list(table[0])[2:]}
    draw = functools.partial(report.strengths, curves, metrics_of["test"])
    findings = dataclasses.replace(
        findings, tables={**findings.tables, "corruptions": table},
        figures={**findings.figures, "corruptions": draw})
  return metrics_of, findings


class Predictor:
  """Predicts for any number of rows, as NumPy arrays; compiles once for each shape of a row.

  Args:
    experiment: gives the task and the batch size.
    program: gives the devices.
    mode: "jit" or "pmap".
    compilations: says what is compiled; by default nothing is said, and no bar is shown.
  """

  def __init__(
      self, experiment: Experiment, program: Program, mode: parallel.Mode,
      compilations: Compilations = Compilations(),
  ):
    self._size, self._mode, self._mesh = experiment.config.eval_batch_size, mode, program.mesh
    self._show = not compilations.quiet
    self._context = Context(experiment.task, mode, program.mesh, experiment.data.context)
    self._step = compilations.of(parallel.compile_step(
        step.make_predict_step(experiment.task), mode, program.mesh,
        inputs=("state", "shared", "batch", "shared"), outputs=("batch",)), "prediction", batch=2,
        patience=_PATIENCE, aside=True)

  def __call__(self, state: TrainState, batch: Batch) -> Any:
    """What `Task.predict` gives for the rows of `batch`.

    Args:
      state: gives the variables.
      batch: rows as `Experiment.read` makes them; fields "host/..." are left out.
    """
    # The text that training has left in the carry does not precede these rows.
    variables, _ = split_carry(state.variables)
    context = self._context(variables, state.rng)
    fields = _on_device(batch)
    count, shards = len(fields["mask"]), parallel.count_shards(self._mesh)
    size = min(self._size, -(-count // shards) * shards)
    parts = []
    for start in metrics.progress(range(0, count, size), "predict", show=self._show):
      rows = _put_padded(
          {k: v[start:start + size] for k, v in fields.items()}, size, self._mode, self._mesh)
      out, = self._step(variables, state.rng, rows, context)
      real = min(size, count - start)
      parts.append(jax.tree.map(lambda x: x[:real], parallel.rows_to_host(out, self._mode)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _put_padded(
    rows: Batch, size: int, mode: parallel.Mode, mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
  """Puts rows that every host has, and rows of zeros up to `size`, on the devices."""
  padded = {k: np.concatenate([v, np.zeros((size - len(v), *v.shape[1:]), v.dtype)])
            for k, v in rows.items()}
  own = parallel.batch_rows(mesh, size)
  return parallel.put_batch({k: v[own] for k, v in padded.items()}, mode, mesh)


class Generator:
  """Continues prompts as `Predictor` does, but part by part; compiles once for each shape of a row.

  Args:
    experiment: gives a task that has `start`, `advance`, `has_ended` and `max_new_tokens`.
    program: gives the devices.
    mode: "jit" or "pmap".
    compilations: says what is compiled; by default nothing is said, and no bar is shown.
  """

  def __init__(
      self, experiment: Experiment, program: Program, mode: parallel.Mode,
      compilations: Compilations = Compilations(),
  ):
    self._size, self._show = experiment.config.eval_batch_size, not compilations.quiet
    self._task, self._mode, self._mesh = experiment.task, mode, program.mesh
    start, advance = step.make_generate_steps(experiment.task, CHUNK)
    self._start = compilations.of(parallel.compile_step(
        start, mode, program.mesh, inputs=("state", "batch"), outputs=("batch",)),
        "reading of the prompt", batch=1, patience=_PATIENCE)
    self._advance = compilations.of(parallel.compile_step(
        advance, mode, program.mesh, inputs=("state", "shared", "batch"),
        outputs=("batch", "batch"), donate=(2,)), "generation", batch=2, patience=_PATIENCE)

  def __call__(self, state: TrainState, batch: Batch) -> Iterator[Any]:
    """Yields what `Task.predict` gives for the rows, as far as it is generated.

    It ends as soon as all rows have ended; the last part then may have fewer tokens than
    `Task.predict` gives.

    Args:
      state: gives the variables.
      batch: rows of prompts as `Experiment.read` makes them, no more than `config.eval_batch_size`.
    """
    fields = _on_device(batch)
    return self._parts(state, fields, self._padded(len(fields["mask"])))

  def whole(self, state: TrainState, batch: Batch) -> Any:
    """What `Task.predict` gives for any number of rows; each batch of them ends with its last row.

    There are as many tokens as the longest text has.
    """
    fields, parts = _on_device(batch), []
    count = len(fields["mask"])
    size = min(self._size, self._padded(count))
    for start in metrics.progress(range(0, count, size), "predict", show=self._show):
      *_, last = self._parts(state, {k: v[start:start + size] for k, v in fields.items()}, size)
      parts.append(last)
    longest = max(part["tokens"].shape[1] for part in parts)
    # No token is negative; the probabilities of none are not read.
    pad = lambda x: np.pad(x, ((0, 0), (0, longest - x.shape[1])), constant_values=-1)
    return jax.tree.map(lambda *xs: np.concatenate([pad(x) for x in xs]), *parts)

  def _padded(self, count: int) -> int:
    shards = parallel.count_shards(self._mesh)
    return -(-count // shards) * shards

  def _parts(self, state: TrainState, fields: Batch, size: int) -> Iterator[Any]:
    variables, _ = split_carry(state.variables)
    count, most, parts = len(fields["mask"]), self._task.max_new_tokens, []
    text, = self._start(variables, _put_padded(fields, size, self._mode, self._mesh))
    for written in range(0, most, CHUNK):
      part, text = self._advance(variables, state.rng, text)
      parts.append(jax.tree.map(lambda x: x[:count, :most - written],  # pylint: disable=cell-var-from-loop
                                parallel.rows_to_host(part, self._mode)))
      predictions = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)
      yield predictions
      if self._task.has_ended(predictions):
        return


def _on_device(batch: Batch) -> dict[str, np.ndarray]:
  """The fields of a batch that go to devices."""
  return {k: np.asarray(v) for k, v in batch.items() if not k.startswith(parallel.HOST)}


def prefetch(load: Callable[[int], Any], steps: Iterable[int], ahead: int = 2) -> Iterator[Any]:
  """Yields `load(step)` for each step, computed in a thread up to `ahead` steps in advance.

  A caller that may not take all of them has to close the iterator: a traceback keeps it alive, and
  Python waits for its thread.
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
