"""Examples of different lengths in batches of few shapes, with little padding.

Every batch is padded to one of at most `MAX_BUCKETS` lengths, so that a step is compiled at most
that often (a compiled step keeps one program for each shape of its batch). Examples of like length
share a batch: Khomenko et al. 2016, "Accelerating recurrent neural network training using sequence
bucketing". What a batch cannot fill in one bucket goes up into the next, so that all batches are
full but the last of a pass, and a pass takes no more of them than without buckets.

Training cuts the stream of `IndexedPipeline` (one permutation per epoch, end to end) into windows
of whole batches, an epoch or `WINDOW` batches long, and sorts within a window only: every example
is seen once per epoch, and batch s is a pure function of (seed, s).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from dljax.data.pipeline import (
    PADDING, Examples, HostBatch, IndexedPipeline, Plan, host_rows, rng)
from dljax.errors import UserError

MAX_BUCKETS = 8
WINDOW = 1024  # batches
_CANDIDATES = 256  # among which `fitted` chooses


@dataclasses.dataclass(frozen=True)
class RaggedPlan(Plan):
  """Which examples make up a global batch, and how long it is.

  Attributes:
    padded: what its examples are padded to.
  """

  padded: int


class RaggedExamples(Examples, Protocol):
  """An opened split of examples of different lengths.

  Attributes:
    lengths: i64[n], of each example, in the unit that is padded (tokens, frames, samples).
  """

  lengths: np.ndarray


def spaced(longest: int, buckets: int = MAX_BUCKETS, multiple: int = 1) -> tuple[int, ...]:
  """Evenly spaced lengths up to `longest`, ascending; known without data.

  Args:
    longest: the last one; a multiple of `multiple`.
    buckets: how many, at most.
    multiple: of which all are.
  """
  ends = np.arange(1, buckets + 1) * longest / buckets
  return tuple(int(end) for end in np.unique(_round_up(np.ceil(ends).astype(np.int64), multiple)))


def fitted(lengths: np.ndarray, longest: int, buckets: int = MAX_BUCKETS, multiple: int = 1) -> tuple[int, ...]:
  """The lengths to pad `lengths` to that need the least padding, ascending, the last one
  `longest`.

  Exact where there are at most 256 different lengths, rounded up to `multiple`; else among 256
  quantiles of them.

  Args:
    lengths: i64[n], none above `longest`.
    longest: a multiple of `multiple`.
    buckets: how many, at most.
    multiple: of which all are.
  """
  rounded = _round_up(np.maximum(lengths, 1), multiple)
  ends = np.unique(rounded)
  if len(ends) > _CANDIDATES:
    ends = np.unique(np.quantile(rounded, np.linspace(0, 1, _CANDIDATES), method="higher"))
  ends = np.union1d(ends, [longest])
  below = np.searchsorted(np.sort(rounded), ends, side="right")  # how many fit into ends[j]
  # cost[j]: positions that all take which fit into ends[j], with the buckets so far; came[i][j]: the end before it.
  cost, came = (ends * below).astype(float), []
  for _ in range(1, min(buckets, len(ends))):
    after = np.where(np.tri(len(ends), dtype=bool), np.inf, cost[:, None] + ends * (below - below[:, None]))
    came.append(np.argmin(after, axis=0))
    cost = np.min(after, axis=0)
  chosen = [len(ends) - 1]
  for before in reversed(came):
    chosen.append(before[chosen[-1]])
  return tuple(int(ends[j]) for j in reversed(chosen))


def _round_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
  return -(-lengths // multiple) * multiple


def pad(rows: Iterable[np.ndarray], length: int, value: float = 0) -> np.ndarray:
  """[n_i, ...] each -> [B, length, ...], with `value` behind their ends."""
  rows = list(rows)
  padded = np.full((len(rows), length, *rows[0].shape[1:]), value, rows[0].dtype)
  for out, row in zip(padded, rows):
    out[:len(row)] = row
  return padded


class RaggedPipeline(IndexedPipeline):
  """The `Pipeline` of a split whose examples have different lengths.

  Training fits its buckets to the lengths it finds; evaluation spaces them evenly, so that all
  splits have the same. An evaluation reads by length, not in order: the results of each example
  are what they would be in any other batch.

  Args:
    open_examples: reads the split; see `IndexedPipeline`.
    finish: (examples, plan) -> this host's batch, padded to `plan.padded`.
    longest: the length of the longest example there may be.
    flag: the config field that says so, for the message.
    buckets: how many lengths to pad to, at most `MAX_BUCKETS`.
    multiple: of which all of them are; `longest` is rounded up to one.
    batch_size, seed, train, host, hosts: see `IndexedPipeline`.
  """

  def __init__(
      self, open_examples: Callable[["RaggedPipeline"], RaggedExamples],
      finish: Callable[[RaggedExamples, RaggedPlan], HostBatch], *, longest: int, flag: str = "--config.data.max_length",
      buckets: int = MAX_BUCKETS, multiple: int = 1, batch_size: int, seed: int = 0, train: bool = False,
      host: int | None = None, hosts: int | None = None,
  ):
    super().__init__(
        open_examples, finish, batch_size=batch_size, seed=seed, train=train, host=host, hosts=hosts)
    if not 1 <= buckets <= MAX_BUCKETS:
      raise UserError(f"--config.data.buckets={buckets}: must be from 1 to {MAX_BUCKETS}, each of which is compiled")
    if longest < 1:
      raise UserError(f"{flag}={longest}: must be at least 1")
    self._longest, self._flag, self._buckets, self._multiple = longest, flag, buckets, multiple
    self._ends, self._windows = (), None

  def open(self) -> bool:
    with self._lock:
      if not super().open():
        return False
      lengths = np.asarray(self._examples.lengths)
      longest = int(_round_up(np.int64(self._longest), self._multiple))
      if len(lengths) and lengths.max() > self._longest:
        worst = int(np.argmax(lengths))
        super().close()
        raise UserError(f"{self._flag}={self._longest}: example {worst} has length {lengths[worst]}; allow as much, "
                        "or take it out")
      self._ends = (fitted(lengths, longest, self._buckets, self._multiple) if self.train
                    else spaced(longest, self._buckets, self._multiple))
      self._windows = functools.lru_cache(maxsize=2)(self._sort)
      return True

  def close(self) -> None:
    with self._lock:
      super().close()
      self._ends, self._windows = (), None

  @property
  def ends(self) -> tuple[int, ...]:
    """The lengths that batches are padded to, ascending; after `open`."""
    return self._ends

  def plan(self, step: int, num_examples: int) -> RaggedPlan:
    window, place = divmod(step, self._batches_of_window(num_examples))
    if not self.train and not (window == 0 and step >= 0):
      raise IndexError(f"batch {step} of a pass over {num_examples} examples, {self.batch_size} at a time")
    indices, ends = self._windows(window, num_examples)
    rows = host_rows(self.batch_size, self._host, self._hosts)
    return RaggedPlan(self.seed, step, indices[place], rows, int(ends[place]))

  def padding(self, passes: int = 1) -> float:
    """The fraction of positions that is padding, in the first `passes` passes."""
    lengths = np.append(np.asarray(self._opened().lengths), 0)  # of `PADDING` too
    plans = [self.plan(step, self.num_examples) for step in range(passes * self.num_batches)]
    positions = self.batch_size * sum(plan.padded for plan in plans)
    return 1 - sum(int(lengths[plan.indices].sum()) for plan in plans) / positions

  def _batches_of_window(self, num_examples: int) -> int:
    if not self.train:
      return sum(-(-len(part) // self.batch_size) for part in self.parts(num_examples))
    return min(num_examples // self.batch_size, WINDOW)

  def _sort(self, window: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The batches of a window: (i64[k, B] examples, i64[k] what they are padded to)."""
    size, batches = self.batch_size, self._batches_of_window(num_examples)
    if self.train:
      parts = [np.concatenate([super(RaggedPipeline, self).plan(window * batches + i, num_examples).indices
                               for i in range(batches)])]
    else:
      parts = self.parts(num_examples)
    lengths, ends = np.append(np.asarray(self._opened().lengths), 0), np.asarray(self._ends)  # the last of `PADDING`
    made = []
    for indices in parts:
      bucket, rest = np.searchsorted(ends, lengths[indices]), indices[:0]
      for i in range(len(ends)):
        members = np.concatenate([rest, indices[bucket == i]])
        if i == len(ends) - 1:
          members = np.append(members, np.full(-len(members) % size, PADDING))
        full = len(members) // size * size
        made.append(members[:full].reshape(-1, size))
        rest = members[full:]
    made = np.concatenate(made)
    padded = ends[np.searchsorted(ends, lengths[made].max(axis=1))]
    order = rng(self.seed, window, "buckets").permutation(batches) if self.train else np.arange(batches)
    return made[order], padded[order]
