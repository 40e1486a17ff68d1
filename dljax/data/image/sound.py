"""Which examples of a split can be decoded, where the others may be skipped."""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from dljax.data import own
from dljax.errors import UserError

_THREADS = 16


def unsound(records: Any, check: Callable[[int, Mapping[str, Any]], None]) -> dict[int, str]:
  """The numbers of the records that cannot be read or decoded, and why.

  Args:
    records: `own.Records` or `sources.Records`.
    check: (number, record) -> nothing; raises `UserError` if the record cannot be decoded.
  """

  def reason(number: int) -> str:
    try:
      check(number, records[[number]][0])
      return ""
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return {number: text for number, text in enumerate(pool.map(reason, range(len(records))))
            if text}


class Skipped:
  """The examples that a run leaves out.

  Attributes:
    names: split expression -> the names of its examples that are left out.
  """

  def __init__(self, most: int):
    """
    Args:
      most: the largest number of examples that may be left out, over all splits.
    """
    self._most = most
    self.names: dict[str, list[str]] = {}

  def keep(
      self, split: str, expression: str, total: int, bad: Mapping[int, str],
      name: Callable[[int], str], before: Sequence[str] | None = None,
  ) -> np.ndarray:
    """The numbers of the examples to keep, i64[n]; says which are left out.

    Args:
      split: "train", "validation" or "test", for messages.
      expression: which examples of the set it is, such as train[:90%].
      total: the number of its examples.
      bad: the numbers of those that cannot be used, and why.
      name: number -> the example's name.
      before: the names that were left out when the run began, or None.

    Raises:
      UserError: there are more than may be left out, or others than when the run began.
    """
    names = [name(number) for number in bad]
    if before is not None and list(before) != names:
      raise UserError(f"--config.data.skip_corrupt: {len(names)} examples of {split} cannot be "
                      f"decoded ({own.some(names)}), and {len(before)} could not when the run "
                      f"began ({own.some(before)}); restore the data, or name another --workdir")
    self.names[expression] = names
    if (count := sum(map(len, self.names.values()))) > self._most:
      raise UserError(f"--config.data.skip_corrupt={self._most}: {count} examples cannot be "
                      f"decoded, such as {next(iter(bad.values())).partition('; ')[0]}; give a "
                      "larger number, or mend them")
    if names and jax.process_index() == 0:
      logging.warning("skipped %d of %d examples of %s that cannot be decoded: %s", len(names),
                      total, split, own.some(names, len(names)))
    return np.setdiff1d(np.arange(total), list(bad))
