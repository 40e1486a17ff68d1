"""The worst rows of a whole set, to be drawn; of all other rows nothing is kept."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Worst:
  """Keeps the rows that come first by a key, while the batches of a set pass.

  Several hosts that add the same keys ask for the same rows, as `Task.evaluate_draws` needs it.

  Args:
    count: the number of rows to keep.
  """

  def __init__(self, count: int):
    self._count = count
    self._seen = 0
    self._kept: list[tuple[Any, int, Any]] = []  # (key, number of the row in the set, value)

  def add(
      self, keys: Sequence[Any], look: Callable[[np.ndarray], Sequence[Any]],
  ) -> None:
    """Takes the rows of a batch.

    Args:
      keys: the key of each row; small ones come first, and of equal ones the earlier row.
      look: (the rows of the batch to keep, i64[k]) -> what to keep of each; it is called if there
        are any.
    """
    here = [(key, self._seen + row, row) for row, key in enumerate(keys)]
    first = sorted([(key, number) for key, number, _ in [*self._kept, *here]])[:self._count]
    numbers = {number for _, number in first}
    new = [(key, number, row) for key, number, row in here if number in numbers]
    self._kept = [entry for entry in self._kept if entry[1] in numbers]
    self._seen += len(keys)
    if new:
      values = look(np.array([row for _, _, row in new]))
      self._kept += [(key, number, value) for (key, number, _), value in zip(new, values)]

  @property
  def rows(self) -> list[Any]:
    """What was kept of each row, the first by its key first."""
    return [value for _, _, value in sorted(self._kept, key=lambda entry: entry[:2])]
