"""The balanced order: every class equally often, every example of a class equally often, no state."""

from collections import Counter

import numpy as np
import pytest

from dljax.data.balance import Balanced

LABELS = np.array([0] * 12 + [5] * 3 + [2] * 5)


@pytest.mark.parametrize("start, end", [(0, 3), (2, 41), (59, 60), (30, 30 + 180)])
def test_a_part_of_the_stream_is_that_part_whoever_asks(start, end):
  whole = Balanced(LABELS, 7)(0, 300)
  np.testing.assert_array_equal(Balanced(LABELS, 7)(start, end), whole[start:end])


def test_classes_and_the_examples_of_a_class_come_equally_often():
  stream = Balanced(LABELS, 0)(0, 3 * 60)  # 60 is a multiple of every class's size
  assert Counter(LABELS[stream].tolist()) == {0: 60, 5: 60, 2: 60}
  count = np.bincount(stream, minlength=20)
  assert count.tolist() == [5] * 12 + [20] * 3 + [12] * 5
  blocks = LABELS[stream].reshape(-1, 3)
  assert (np.sort(blocks, axis=1) == [0, 2, 5]).all() and len(np.unique(blocks, axis=0)) == 6


def test_examples_of_several_classes_come_in_the_turns_of_each():
  """And those of none in a turn of their own; a class that nobody has takes no turn."""
  labels = np.zeros((20, 4), np.float32)
  labels[:12, 0], labels[10:14, 1], labels[14:15, 3] = 1, 1, 1  # two have both 0 and 1
  stream = Balanced(labels, 3)(0, 4 * 60)  # turns of 0, of 1, of 3 and of none
  blocks = labels[stream].reshape(-1, 4, 4)
  assert (blocks.max(axis=2).sum(axis=1) == 3).all()  # one in four has no class
  count = np.bincount(stream, minlength=20)
  assert count.tolist() == [5] * 10 + [20] * 2 + [15] * 2 + [60] + [12] * 5


def test_the_stream_is_random_and_depends_on_the_seed():
  one, other = Balanced(LABELS, 0)(0, 72), Balanced(LABELS, 1)(0, 72)
  assert (one != other).any()
  first, second = one[LABELS[one] == 0].reshape(2, 12).tolist()
  assert sorted(first) == sorted(second) == list(range(12))
  assert len({tuple(first), tuple(second), tuple(range(12))}) == 3
