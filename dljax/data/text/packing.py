"""Several short documents to a row, with little padding.

Mario Michael Krell, Matej Kosec, Sergio P. Perez, Andrew Fitzgibbon. "Efficient Sequence Packing
without Cross-contamination: Accelerating Large Language Models without Impacting Performance",
2021. https://arxiv.org/abs/2107.02027

Each row names the document of every place (`segment`) and the place in that document (`position`),
so that a model can keep the documents apart: its loss is then that of the documents one by one.
Documents are packed once, by their lengths alone; `IndexedPipeline` shuffles the rows.
"""

import dataclasses
from typing import Protocol

import numpy as np

from dljax.data.pipeline import PADDING, HostBatch, Plan


class Pieces(Protocol):
  """Documents, or parts of long ones, to be laid out in rows.

  Attributes:
    lengths: i64[n], the number of tokens of each.
  """

  lengths: np.ndarray

  def read(self, indices: np.ndarray) -> HostBatch:
    """Field -> the values of all tokens of the pieces `indices`, one piece after the other."""


@dataclasses.dataclass(frozen=True)
class Packing:
  """Where each piece lies.

  Attributes:
    row: i64[n], the row of each piece.
    offset: i64[n], the place of its first token in the row.
    num_rows: the number of rows.
  """

  row: np.ndarray
  offset: np.ndarray
  num_rows: int


def pack(lengths: np.ndarray, capacity: int) -> Packing:
  """Best-fit decreasing: each piece, the longest first, goes to the fullest row that has room.

  Pieces of one length are interchangeable, so the rows are found for numbers of pieces, in a time
  that depends on the capacity and hardly on the number of pieces (section 3.2.2).

  Args:
    lengths: i64[n], from 1 to the capacity.
    capacity: the length of a row.
  """
  counts = np.bincount(lengths, minlength=capacity + 1)
  # Free places of a row -> groups of equal rows: their number, and what lies in each, as pairs
  # (length, number of pieces of that length).
  groups: list[list[tuple[int, tuple[tuple[int, int], ...]]]] = [[] for _ in range(capacity + 1)]
  groups[capacity].append((len(lengths), ()))  # more empty rows than are needed
  for length in range(capacity, 0, -1):
    left = int(counts[length])
    while left:
      free = next(free for free in range(length, capacity + 1) if groups[free])
      rows, content = groups[free].pop()
      each = min(free // length, left)
      filled = min(rows, left // each)
      if filled < rows:
        groups[free].append((rows - filled, content))
      groups[free - each * length].append((filled, (*content, (length, each))))
      left -= filled * each
  order = np.argsort(lengths, kind="stable")
  next_of = np.cumsum(counts) - counts  # length -> where its unplaced pieces begin in `order`
  (row, offset), num_rows = np.zeros((2, len(lengths)), np.int64), 0
  for group in groups:
    for rows, content in group:
      if not content:
        continue
      begin = 0
      for length, each in content:
        pieces = order[next_of[length]:next_of[length] + rows * each]
        next_of[length] += rows * each
        row[pieces] = num_rows + np.repeat(np.arange(rows), each)
        offset[pieces] = begin + np.tile(np.arange(each), rows) * length
        begin += each * length
      num_rows += rows
  return Packing(row, offset, num_rows)


class Packed:
  """The `Examples` whose rows are several pieces each.

  Args:
    pieces: the pieces, none longer than a row.
    length: L, the length of a row.
  """

  def __init__(self, pieces: Pieces, length: int):
    self._pieces, self._length = pieces, length
    packing = pack(np.asarray(pieces.lengths), length)
    # The pieces of row r are members[first[r]:first[r + 1]], in the order in which they lie there.
    self._members = np.lexsort((packing.offset, packing.row))
    self._first = np.searchsorted(packing.row[self._members], np.arange(packing.num_rows + 1))
    self._offset = packing.offset

  def __len__(self) -> int:
    return len(self._first) - 1

  def gather(self, plan: Plan, rows: np.ndarray) -> HostBatch:
    """The rows, with segment i32[b, L] (from 1 on, 0 is padding), position i32[b, L], and length
    i32[b], the number of places that are no padding."""
    indices = plan.indices[rows]
    parts = [self._members[:0] if index == PADDING else
             self._members[self._first[index]:self._first[index + 1]] for index in indices]
    return lay_out(self._pieces, parts, self._length, self._offset)

  def close(self) -> None:
    pass


def cut(
    begins: np.ndarray, ends: np.ndarray, longest: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts each stretch from `begins` to `ends` into pieces of at most `longest` places.

  Returns:
    Where each piece begins, and its length, i64[n]; in order. An empty stretch has no piece.
  """
  sizes = ends - begins
  pieces = -(-sizes // longest)
  piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
  return (np.repeat(begins, pieces) + piece * longest,
          np.minimum(np.repeat(sizes, pieces) - piece * longest, longest))


def lay_out(
    pieces: Pieces, rows: list[np.ndarray], length: int, offset: np.ndarray | None = None,
) -> HostBatch:
  """Rows of pieces as a batch.

  Args:
    pieces: the pieces.
    rows: the numbers of the pieces in each row, i64[k].
    length: L, the length of a row.
    offset: i64[n], the place of each piece in its row; None if no row has more than one.

  Returns:
    What `pieces.read` gives, [b, L, ...] with 0 at padding; length i32[b], mask f32[b]; and with
    an offset segment i32[b, L] and position i32[b, L].
  """
  members = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
  sizes = np.asarray(pieces.lengths)[members]
  row = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
  within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  begins = np.zeros(len(members), np.int64) if offset is None else offset[members]
  places = np.repeat(row, sizes), np.repeat(begins, sizes) + within

  def put(values: np.ndarray) -> np.ndarray:
    full = np.zeros((len(rows), length, *values.shape[1:]), values.dtype)
    full[places] = values
    return full

  batch = {field: put(values) for field, values in pieces.read(members).items()}
  used = np.bincount(row, sizes, len(rows)) if len(rows) else np.zeros(0)
  batch |= {"length": used.astype(np.int32), "mask": (used > 0).astype(np.float32)}
  if offset is None:
    return batch
  number = 1 + np.arange(len(members)) - np.repeat(
      np.cumsum([0, *map(len, rows)])[:-1], [len(part) for part in rows])
  return batch | {"segment": put(np.repeat(number, sizes).astype(np.int32)),
                  "position": put(within.astype(np.int32))}
