"""Examples of different lengths in batches of few shapes, with little padding.

Every batch is padded to one of at most `MAX_BUCKETS` lengths. A step is compiled once for each
shape of its batch, so this bounds the number of compilations. Examples of similar length share a
batch: Khomenko et al. 2016, "Accelerating recurrent neural network training using sequence
bucketing". Examples that do not fill a batch of their bucket move up into the next bucket. All
batches of a pass but the last are therefore full, and a pass has no more batches than without
buckets.

Training cuts the stream of `IndexedPipeline` (one permutation per epoch, end to end) into windows
of whole batches. A window is an epoch or `WINDOW` batches long, and examples are sorted within a
window only. So every example is seen once per epoch, and batch s is a pure function of (seed, s).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from dljax.data.pipeline import (
    PADDING, Examples, HostBatch, IndexedPipeline, Plan, Rows, all_rows, rng)
from dljax.errors import UserError

MAX_BUCKETS = 8
WINDOW = 1024  # number of batches
_CANDIDATES = 256  # number of lengths among which `fitted` chooses


@dataclasses.dataclass(frozen=True)
class RaggedPlan(Plan):
  """Which examples make up a global batch, and how long it is.

  Attributes:
    padded: the length that its examples are padded to.
  """

  padded: int


class RaggedExamples(Examples, Protocol):
  """An opened split of examples of different lengths.

  Attributes:
    lengths: i64[n], the length of each example in the unit that is padded (tokens, frames,
      samples).
  """

  lengths: np.ndarray


def spaced(longest: int, buckets: int = MAX_BUCKETS, multiple: int = 1) -> tuple[int, ...]:
  """Evenly spaced lengths up to `longest`, ascending; known without data.

  Args:
    longest: the last length, a multiple of `multiple`.
    buckets: the greatest number of lengths.
    multiple: a number that divides all lengths.
  """
  ends = np.arange(1, buckets + 1) * longest / buckets
  return tuple(int(end) for end in np.unique(_round_up(np.ceil(ends).astype(np.int64), multiple)))


def fitted(
    lengths: np.ndarray, longest: int, buckets: int = MAX_BUCKETS, multiple: int = 1,
) -> tuple[int, ...]:
  """The ascending bucket lengths with which `lengths` need the least padding; the last is
  `longest`.

  The result is exact if there are at most 256 different lengths after rounding up to `multiple`.
  Otherwise 256 quantiles of them are the candidates.

  Args:
    lengths: i64[n], the examples' lengths, none above `longest`.
    longest: the last bucket length, a multiple of `multiple`.
    buckets: the greatest number of bucket lengths.
    multiple: a number that divides all bucket lengths.
  """
  rounded = _round_up(np.maximum(lengths, 1), multiple)
  ends = np.unique(rounded)
  if len(ends) > _CANDIDATES:
    ends = np.unique(np.quantile(rounded, np.linspace(0, 1, _CANDIDATES), method="higher"))
  ends = np.union1d(ends, [longest])
  # below[j] is the number of lengths that fit into ends[j].
  below = np.searchsorted(np.sort(rounded), ends, side="right")
  # cost[j] is the number of positions that all examples up to ends[j] take, with ends[j] and the
  # buckets chosen so far; came[i][j] is the end before ends[j].
  cost, came = (ends * below).astype(float), []
  for _ in range(1, min(buckets, len(ends))):
    after = np.where(np.tri(len(ends), dtype=bool), np.inf,
                     cost[:, None] + ends * (below - below[:, None]))
    came.append(np.argmin(after, axis=0))
    cost = np.min(after, axis=0)
  chosen = [len(ends) - 1]
  for before in reversed(came):
    chosen.append(before[chosen[-1]])
  return tuple(int(ends[j]) for j in reversed(chosen))


def _round_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
  return -(-lengths // multiple) * multiple


def pad(rows: Iterable[np.ndarray], length: int, value: float = 0) -> np.ndarray:
  """B arrays [n_i, ...] -> [B, length, ...], with `value` behind the end of each."""
  rows = list(rows)
  padded = np.full((len(rows), length, *rows[0].shape[1:]), value, rows[0].dtype)
  for out, row in zip(padded, rows):
    out[:len(row)] = row
  return padded


class RaggedPipeline(IndexedPipeline):
  """The `Pipeline` of a split whose examples have different lengths.

  Training fits its bucket lengths to the data. Evaluation spaces them evenly, so they are the same
  for all splits. An evaluation reads the examples by length, not in order; an example's results do
  not depend on the batch that it is in.

  Args:
    open_examples: reads the split; see `IndexedPipeline`.
    finish: (examples, plan) -> this host's batch, padded to `plan.padded`.
    longest: the greatest length that an example may have.
    flag: the config field that holds it, for the message.
    buckets: the number of bucket lengths, at most `MAX_BUCKETS`.
    multiple: a number that divides all bucket lengths; `longest` is rounded up to a multiple.
    batch_size, seed, train: see `IndexedPipeline`.
  """

  def __init__(
      self, open_examples: Callable[["RaggedPipeline"], RaggedExamples],
      finish: Callable[[RaggedExamples, RaggedPlan], HostBatch], *, longest: int,
      flag: str = "--config.data.max_length", buckets: int = MAX_BUCKETS, multiple: int = 1,
      batch_size: int, seed: int = 0, train: bool = False,
  ):
    super().__init__(open_examples, finish, batch_size=batch_size, seed=seed, train=train)
    if not 1 <= buckets <= MAX_BUCKETS:
      raise UserError(f"--config.data.buckets={buckets}: must be from 1 to {MAX_BUCKETS}, as a "
                      "program is compiled for each")
    if longest < 1:
      raise UserError(f"{flag}={longest}: must be at least 1")
    self._longest, self._flag, self._buckets, self._multiple = longest, flag, buckets, multiple
    self._ends, self._windows = (), None

  def open(self, rows: Rows = all_rows) -> bool:
    with self._lock:
      if not super().open(rows):
        return False
      lengths = np.asarray(self._examples.lengths)
      longest = int(_round_up(np.int64(self._longest), self._multiple))
      if len(lengths) and lengths.max() > self._longest:
        worst = int(np.argmax(lengths))
        super().close()
        raise UserError(f"{self._flag}={self._longest}: example {worst} has length "
                        f"{lengths[worst]}; allow as much, or take it out")
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
      raise IndexError(f"batch {step} of a pass over {num_examples} examples, {self.batch_size} "
                       "at a time")
    indices, ends = self._windows(window, num_examples)
    return RaggedPlan(self.seed, step, indices[place], self.rows, int(ends[place]))

  def padding(self, passes: int = 1) -> float:
    """The fraction of positions that are padding, in the first `passes` passes."""
    lengths = np.append(np.asarray(self._opened().lengths), 0)  # the last one is that of `PADDING`
    plans = [self.plan(step, self.num_examples) for step in range(passes * self.num_batches)]
    positions = self.batch_size * sum(plan.padded for plan in plans)
    return 1 - sum(int(lengths[plan.indices].sum()) for plan in plans) / positions

  def _batches_of_window(self, num_examples: int) -> int:
    if not self.train:
      return sum(-(-len(part) // self.batch_size) for part in self.parts(num_examples))
    return min(num_examples // self.batch_size, WINDOW)

  def _sort(self, window: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The batches of a window: their examples, i64[k, B], and their padded lengths, i64[k]."""
    size, batches = self.batch_size, self._batches_of_window(num_examples)
    if self.train:
      steps = range(window * batches, (window + 1) * batches)
      parts = [np.concatenate([
          super(RaggedPipeline, self).plan(step, num_examples).indices for step in steps])]
    else:
      parts = self.parts(num_examples)
    # The last length is that of `PADDING`.
    lengths, ends = np.append(np.asarray(self._opened().lengths), 0), np.asarray(self._ends)
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
    order = np.arange(batches)
    if self.train:
      order = rng(self.seed, window, "buckets").permutation(batches)
    return made[order], padded[order]
