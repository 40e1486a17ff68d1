"""From a step to a batch: a pure function of (seed, step), the same on every host.

Training reads an infinite stream of examples, which is one permutation per epoch, end to end.
Global batch s holds the elements [s B, (s + 1) B) of the stream, so every example is seen once per
epoch whatever the batch size. Evaluation reads the examples in order, and pads and masks the last
batch. A host reads the rows that its devices hold, which it is told by `Pipeline.open`. Whatever
is random in a batch is drawn for the global batch and then sliced (`Plan.rng`). Neither hosts nor
threads can therefore change which examples are in batch s, or how they are augmented.

Every batch holds mask f32[b], which is 0 where a row is padding, and id i32[b], by which the
engine draws what is random in a row. The id is the row of the global batch in training, the
example's position in its split in evaluation, the row that was asked for in prediction, and 0 at
padding.
"""

import contextlib
import dataclasses
import functools
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import jax
import numpy as np

from dljax.errors import UserError

HostBatch = dict[str, np.ndarray]
# (number of rows of a global batch) -> those rows that this process's devices hold, ascending;
# `train.parallel.batch_rows` of a mesh.
Rows = Callable[[int], np.ndarray]
PADDING = -1  # the index of a padding row
CHUNK = 8  # the number of rows that a thread reads at once
ENDLESS = 2**62  # the number of chunks that stands for "no end"


def all_rows(batch_size: int) -> np.ndarray:
  """The `Rows` of a process that is alone: all.

  Raises:
    RuntimeError: several processes take part, so that it depends on the mesh which rows are whose.
  """
  if jax.process_count() > 1:
    raise RuntimeError("several processes take part; open the pipeline with parallel.batch_rows")
  return np.arange(batch_size)


class Pipeline(Protocol):
  """The batches of a split. The attributes can be read after `open`.

  Attributes:
    num_examples: the number of examples in the split, over all hosts.
    num_batches: the number of batches in one pass, rounded down for training and up for
      evaluation.
    num_sample_batches: the number of batches, the first of a pass, that hold the sample; 0 without
      `sample`.
  """

  num_examples: int
  num_batches: int
  num_sample_batches: int

  def sample(self, count: int, seed: int) -> None:
    """Lets a pass start with a random sample of examples, in batches of their own. Call it before
    `open`.

    Args:
      count: the number of examples; 0 leaves the pass as it is, and so does a number larger than
        the split.
      seed: the run's seed.

    Raises:
      UserError: the split has to be read in order.
    """

  def open(self, rows: Rows = all_rows) -> bool:
    """Finds and reads the data if it is not open; returns whether it had to.

    Args:
      rows: the rows of a global batch that this process reads.

    Raises:
      UserError: the data is missing; the message says what to run.
    """

  def batch(self, step: int) -> HostBatch:
    """This host's rows of global batch `step`: a pure function of (seed, step), on any thread."""

  def close(self) -> None:
    """Frees threads and memory."""


@contextlib.contextmanager
def opened(*pipelines: Pipeline, rows: Rows) -> Iterator[None]:
  """Opens the pipelines that are not open, and closes those at the end; the others stay open.

  Args:
    *pipelines: the pipelines.
    rows: see `Pipeline.open`.
  """
  with contextlib.ExitStack() as stack:
    for pipeline in pipelines:
      if pipeline.open(rows):
        stack.callback(pipeline.close)
    yield


def rng(seed: int, step: int, name: str) -> np.random.Generator:
  """The generator for everything that is drawn under `name` in `step`."""
  return np.random.default_rng([seed, step, zlib.crc32(name.encode())])


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which examples make up a global batch.

  Attributes:
    seed: the run's seed.
    step: the number of the global batch.
    indices: i64[B], the examples of the global batch; `PADDING` in padding rows.
    rows: i64[b], the rows that this host's devices hold, ascending.
  """

  seed: int
  step: int
  indices: np.ndarray
  rows: np.ndarray

  def rng(self, name: str) -> np.random.Generator:
    """The generator for everything that is drawn under `name` for the global batch."""
    return rng(self.seed, self.step, name)


class Examples(Protocol):
  """An opened split; `gather` reads examples, from memory or from disk."""

  def __len__(self) -> int:
    ...

  def gather(self, plan: Plan, rows: np.ndarray) -> HostBatch:
    """The examples in the given rows of the global batch; example 0 in padding rows."""

  def close(self) -> None:
    ...


class IndexedPipeline:
  """The `Pipeline` of a split whose examples can be read in any order.

  Args:
    open_examples: (this pipeline) -> the opened split; called by `open`. By the pipeline's `plan`
      a reader can read ahead.
    finish: (examples, plan) -> this host's batch without mask and id.
    batch_size: B, the number of rows of the global batch.
    seed: the run's seed.
    train: whether to shuffle and repeat for ever; otherwise there is one pass in order.
  """

  def __init__(
      self, open_examples: Callable[["IndexedPipeline"], Examples],
      finish: Callable[[Examples, Plan], HostBatch], *, batch_size: int, seed: int = 0,
      train: bool = False,
  ):
    self._open_examples, self._finish = open_examples, finish
    self.batch_size, self.seed, self.train = batch_size, seed, train
    self.rows = np.arange(0)  # those of this host in every global batch; after `open`
    self._examples: Examples | None = None
    self._lock = threading.RLock()
    self._permutation = functools.lru_cache(maxsize=2)(self._permute)
    self._sample, self._sample_seed = 0, 0
    # (first place, end) -> the examples of the training stream there, if it has another order.
    self.order: Callable[[int, int], np.ndarray] | None = None

  def sample(self, count: int, seed: int) -> None:
    self._sample, self._sample_seed = count, seed

  def open(self, rows: Rows = all_rows) -> bool:
    with self._lock:
      if self._examples is not None:
        return False
      self.rows = rows(self.batch_size)
      examples = self._open_examples(self)
      if self.train and len(examples) < self.batch_size:
        examples.close()
        raise UserError(f"--config.batch_size={self.batch_size}: there are only {len(examples)} "
                        "training examples; make it smaller")
      self._examples = examples
      return True

  def close(self) -> None:
    with self._lock:
      if self._examples is not None:
        self._examples.close()
        self._examples = None

  @property
  def num_examples(self) -> int:
    return len(self._opened())

  @property
  def num_batches(self) -> int:
    n = self.num_examples
    if self.train:
      return n // self.batch_size
    return sum(-(-len(part) // self.batch_size) for part in self.parts(n))

  @property
  def num_sample_batches(self) -> int:
    parts = self.parts(self.num_examples)
    return -(-len(parts[0]) // self.batch_size) if len(parts) > 1 else 0

  def parts(self, num_examples: int) -> list[np.ndarray]:
    """The examples of an evaluation: all, i64[n], or the sample and the rest; each ascending."""
    if not 0 < self._sample < num_examples:
      return [np.arange(num_examples)]
    order = rng(self._sample_seed, 0, "sample").permutation(num_examples)
    return [np.sort(order[:self._sample]), np.sort(order[self._sample:])]

  def batch(
      self, step: int, finish: Callable[[Examples, Plan], HostBatch] | None = None,
  ) -> HostBatch:
    """See `Pipeline.batch`; `finish` replaces the pipeline's own."""
    examples = self._opened()
    plan = self.plan(step, len(examples))
    indices = plan.indices[plan.rows]
    real = indices != PADDING
    ids = plan.rows if self.train else np.where(real, indices, 0)
    own = {"mask": real.astype(np.float32), "id": ids.astype(np.int32)}
    return own | (finish or self._finish)(examples, plan)

  def plan(self, step: int, num_examples: int) -> Plan:
    """The plan of global batch `step` of a split that has `num_examples`."""
    start, end = step * self.batch_size, (step + 1) * self.batch_size
    if self.order is not None:
      indices = self.order(start, end)
    elif self.train:
      epochs = range(start // num_examples, (end - 1) // num_examples + 1)
      indices = np.concatenate([
          self._permutation(epoch, num_examples)[max(start - first, 0):end - first]
          for epoch, first in ((epoch, epoch * num_examples) for epoch in epochs)])
    else:
      size = self.batch_size
      order = np.concatenate([np.append(part, np.full(-len(part) % size, PADDING))
                              for part in self.parts(num_examples)])
      if not 0 <= start < len(order):
        raise IndexError(f"batch {step} of a pass over {num_examples} examples, {size} at a time")
      indices = order[start:end]
    return Plan(self.seed, step, indices, self.rows)

  def _permute(self, epoch: int, num_examples: int) -> np.ndarray:
    return rng(self.seed, epoch, "order").permutation(num_examples)

  def _opened(self) -> Examples:
    if self._examples is None:
      raise RuntimeError("open() the pipeline first")
    return self._examples


class Reprocessed:
  """The batches of another pipeline, finished in another way; no example is read twice.

  Args:
    pipeline: the other pipeline, which is opened and closed with this one.
    finish: (examples, plan) -> this host's batch.
  """

  def __init__(self, pipeline: IndexedPipeline, finish: Callable[[Examples, Plan], HostBatch]):
    self._pipeline, self._finish = pipeline, finish
    self.open, self.close, self.sample = pipeline.open, pipeline.close, pipeline.sample

  @property
  def num_examples(self) -> int:
    return self._pipeline.num_examples

  @property
  def num_batches(self) -> int:
    return self._pipeline.num_batches

  @property
  def num_sample_batches(self) -> int:
    return self._pipeline.num_sample_batches

  def batch(self, step: int) -> HostBatch:
    return self._pipeline.batch(step, self._finish)


class InMemory:
  """Examples that are decoded once and gathered by NumPy.

  Args:
    arrays: field -> the array [n, ...] of all examples.
    each: (example, plan, row) -> the example, processed; for what cannot be done to all rows at
      once.
  """

  def __init__(
      self, arrays: Mapping[str, np.ndarray],
      each: Callable[[HostBatch, Plan, int], HostBatch] | None = None,
  ):
    self._arrays, self._each = arrays, each

  def __len__(self) -> int:
    return len(next(iter(self._arrays.values())))

  def gather(self, plan: Plan, rows: np.ndarray) -> HostBatch:
    indices = np.maximum(plan.indices[rows], 0)
    read = {key: array.take(indices, axis=0) for key, array in self._arrays.items()}
    if self._each is None:
      return read
    examples = ({key: array[i] for key, array in read.items()} for i in range(len(rows)))
    return _stack([self._each(example, plan, row) for example, row in zip(examples, rows)])

  def close(self) -> None:
    pass


class Streaming:
  """Examples that stay on disk; Grain reads them ahead, in threads.

  `plan_of` decides the order, so a split gives the same batches from memory and from disk. Steps
  in sequence are read ahead; after a jump, reading ahead starts again at the new step.

  Args:
    num_examples: the number of examples in the split.
    load: (indices, plan, rows) -> one example for each index; all have the same shapes.
    plan_of: (step, num_examples) -> the step's `Plan`; raises `IndexError` after the last step.
    rows: (plan) -> the rows of the global batch to read; their number is the same for every plan.
    threads: the number of threads that read and decode.
  """

  def __init__(
      self, num_examples: int, load: Callable[[np.ndarray, Plan, np.ndarray], list[HostBatch]],
      plan_of: Callable[[int, int], Plan], rows: Callable[[Plan], np.ndarray], threads: int = 16,
  ):
    self._num_examples, self._load, self._threads = num_examples, load, threads

    @functools.lru_cache(maxsize=8)
    def plan_and_rows(step: int) -> tuple[Plan, np.ndarray]:
      plan = plan_of(step, num_examples)
      return plan, rows(plan)

    self._plan_and_rows = plan_and_rows
    self._ahead, self._next_step = None, None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._num_examples

  def gather(self, plan: Plan, rows: np.ndarray) -> HostBatch:
    chunks = -(-len(rows) // CHUNK)
    with self._lock:
      if plan.step != self._next_step:
        self._stop()
        self._ahead = self._read_from(plan.step, chunks)
      self._next_step = None  # stays so if a read below fails
      examples = [example for _ in range(chunks) for example in next(self._ahead)]
      self._next_step = plan.step + 1
    return _stack(examples)

  def _read_from(self, step: int, chunks: int):
    import grain

    def load(position: int) -> list[HostBatch]:
      try:
        plan, rows = self._plan_and_rows(step + position // chunks)
      except IndexError:
        return []  # this was read ahead, beyond the last step
      rows = rows[position % chunks * CHUNK:][:CHUNK]
      return self._load(np.maximum(plan.indices[rows], 0), plan, rows)

    return iter(grain.MapDataset.range(ENDLESS).map(load).to_iter_dataset(
        grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * chunks)))

  def _stop(self) -> None:
    if self._ahead is not None:
      self._ahead.close()
    self._ahead = self._next_step = None

  def close(self) -> None:
    with self._lock:
      self._stop()


def _stack(examples: list[HostBatch]) -> HostBatch:
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
