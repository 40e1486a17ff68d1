"""Tables of metrics for the terminal."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_METRIC_COLUMNS = 7  # so that a table fits into 120 characters


def metrics(by_split: Mapping[str, Mapping[str, float]]) -> Any:
  """One row for each split, one column for each metric; with many metrics the other way round."""
  from rich.table import Table  # pylint: disable=g-import-not-at-top

  names = list(dict.fromkeys(name for values in by_split.values() for name in values))
  cells = {(split, name): f"{value:.4f}"
           for split, values in by_split.items() for name, value in values.items()}
  if len(names) <= _MAX_METRIC_COLUMNS:
    head, columns = "split", names
    rows = {split: [cells.get((split, name), "") for name in names] for split in by_split}
  else:
    head, columns = "metric", by_split
    rows = {name: [cells.get((split, name), "") for split in by_split] for name in names}
  table = Table(head)
  for column in columns:
    table.add_column(column, justify="right")
  for name, row in rows.items():
    table.add_row(name, *row)
  return table


def corruptions(rows: Sequence[Mapping[str, Any]], clean: Mapping[str, float]) -> Any:
  """One row for each metric under each corruption, one column for each strength."""
  from rich.table import Table  # pylint: disable=g-import-not-at-top

  table = Table("metric", "corruption", "clean")
  for strength in sorted({row["strength"] for row in rows}):
    table.add_column(str(strength), justify="right")
  for metric in list(rows[0])[2:]:
    for name in dict.fromkeys(row["corruption"] for row in rows):
      values = [row[metric] for row in rows if row["corruption"] == name]
      table.add_row(metric, name, f"{clean[metric]:.4f}", *(f"{value:.4f}" for value in values))
  return table


def show(renderable: Any) -> None:
  """Prints a table, or anything that rich can print, as wide as the terminal or 120 characters."""
  from rich.console import Console  # pylint: disable=g-import-not-at-top

  Console(width=None if sys.stdout.isatty() else 120).print(renderable)
