"""The worst rows of a set, whatever its batches."""

import numpy as np
import pytest

from dljax.tasks.base import Worst


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_the_first_by_key_are_kept_and_of_equal_ones_the_earlier(size):
  keys = np.random.default_rng(0).integers(0, 9, 40).tolist()
  worst = Worst(6)
  for start in range(0, 40, size):
    worst.add(keys[start:start + size], lambda rows: [start + row for row in rows.tolist()])
  assert worst.rows == np.argsort(keys, kind="stable")[:6].tolist()


def test_only_rows_that_are_kept_are_looked_at():
  looked = []

  def look(rows):
    looked.append(rows.tolist())
    return rows

  worst = Worst(2)
  for keys in [(0, 5), (0, 4), (1, 0)], [(1, 1), (0, 4)], [(2, 0)], []:
    worst.add(keys, look)
  assert looked == [[0, 1], [1]]  # of equal keys the earlier row stays
  assert Worst(3).rows == []
