"""The splits of a data set, held against each other."""

import itertools
from typing import Any

from dljax.data import sources
from dljax.errors import UserError


def check_splits(dataset: sources.Dataset, config: Any) -> None:
  """Raises `UserError` where a split of `config.data` does not exist, is empty or overlaps another."""
  splits = {field: config[field] for field in ("train", "validation", "test") if config[field]}
  ranges = {field: dataset.ranges(split, field) for field, split in splits.items()}
  for one, other in itertools.combinations(splits, 2):
    if any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in ranges[one] for b in ranges[other]):
      raise UserError(f"--config.data.{other}={splits[other]!r} overlaps "
                      f"--config.data.{one}={splits[one]!r}; choose ranges without a common example")
