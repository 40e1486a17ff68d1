"""A picture of numbers that a network guesses, against the truth."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dljax.report import common
from dljax.report.common import COLORS, INK

MAX_PANELS = 16


def numbers(truths: np.ndarray, guesses: np.ndarray, names: Sequence[str]) -> Any:
  """Guesses against the truth, a panel for each number.

  Args:
    truths: f[N, T], the true values of T numbers.
    guesses: f[N, T], the guessed values.
    names: the names of the T numbers; up to `MAX_PANELS` are drawn.

  Returns:
    The figure. A guess that is right lies on the dashed line.
  """
  truths, guesses = np.asarray(truths, np.float64), np.asarray(guesses, np.float64)
  count = min(len(names), MAX_PANELS)
  columns = math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  figure, panels = common.panels(columns, rows, 4.0, 3.8)
  for i, axes in enumerate(panels):
    if i >= count:
      axes.set_visible(False)
      continue
    both = np.concatenate([truths[:, i], guesses[:, i]])
    low, high = float(both.min()), float(both.max())
    margin = 0.05 * (high - low) or 1.0
    ends = low - margin, high + margin
    axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--")
    axes.scatter(truths[:, i], guesses[:, i], s=10, alpha=0.5, linewidths=0,
                 color=COLORS["test"])
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set_title(common.plain(names[i], 30), fontsize=11, color=INK)
    axes.set_xlabel("truth", fontsize=10)
    axes.set_ylabel("guess", fontsize=10)
    axes.locator_params(nbins=5)  # large numbers would run into each other
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
  return figure
