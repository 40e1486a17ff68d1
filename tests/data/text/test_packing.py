"""Packing: every piece has a place of its own, in as few rows as best-fit decreasing finds one by one."""

import numpy as np
import pytest

from dljax.data.pipeline import PADDING, Plan
from dljax.data.text import packing


class _Pieces:
  """Piece i has the tokens 100 i + 1, 100 i + 2, ..."""

  def __init__(self, lengths):
    self.lengths = np.array(lengths, np.int64)

  def read(self, indices):
    return {"tokens": np.concatenate([100 * i + 1 + np.arange(self.lengths[i]) for i in indices] or [[]]).astype(int)}


def _one_by_one(lengths, capacity):
  """The number of rows, as the definition says it."""
  free = []
  for length in sorted(lengths, reverse=True):
    fitting = [room for room in free if room >= length]
    if fitting:
      free.remove(min(fitting))
    free.append((min(fitting) if fitting else capacity) - length)
  return len(free)


@pytest.mark.parametrize("count", [0, 1, 10, 700])
@pytest.mark.parametrize("capacity", [1, 5, 64])
def test_rows_are_those_of_best_fit_decreasing(count, capacity):
  lengths = np.random.default_rng(count).integers(1, capacity + 1, count)
  found = packing.pack(lengths, capacity)
  assert found.num_rows == _one_by_one(lengths.tolist(), capacity)
  taken = np.zeros((found.num_rows, capacity), int)
  for row, offset, length in zip(found.row, found.offset, lengths):
    assert offset + length <= capacity
    taken[row, offset:offset + length] += 1
  assert taken.sum() == lengths.sum() and taken.max(initial=0) <= 1
  filled = taken.sum(axis=1)
  assert all(row[:n].all() for row, n in zip(taken, filled)) and filled.all()  # padding is at the ends alone


def test_millions_of_documents_are_packed_at_once():
  lengths = np.minimum(1 + np.random.default_rng(0).geometric(1 / 27, 300_000), 128)
  found = packing.pack(lengths, 128)
  assert found.num_rows * 128 < 1.001 * lengths.sum()


def test_rows_say_whose_each_place_is():
  packed = packing.Packed(_Pieces([3, 2, 4, 1]), 6)
  assert len(packed) == 2
  batch = packed.gather(Plan(0, 0, np.array([1, PADDING, 0]), np.arange(3)), np.arange(3))
  by_row = {tuple(row[row > 0] // 100) for row in batch["tokens"]}
  assert by_row == {(0, 0, 0, 3), (2, 2, 2, 2, 1, 1), ()}
  for tokens, segment, position, length, mask in zip(*(batch[field] for field in (
      "tokens", "segment", "position", "length", "mask"))):
    assert length == np.sum(tokens > 0) and mask == (length > 0)
    np.testing.assert_array_equal(position, np.where(tokens > 0, tokens % 100 - 1, 0))
    numbers = list(tokens // 100)
    assert segment.tolist() == [len(set(numbers[:i + 1])) if tokens[i] else 0 for i in range(6)]


def test_pieces_have_a_row_each_where_none_has_an_offset():
  batch = packing.lay_out(_Pieces([3, 2]), [np.array([1]), np.array([], int), np.array([0])], 4)
  assert batch["tokens"].tolist() == [[101, 102, 0, 0], [0] * 4, [1, 2, 3, 0]]
  assert batch["length"].tolist() == [2, 0, 3] and batch["mask"].tolist() == [1, 0, 1]
  assert set(batch) == {"tokens", "length", "mask"}
