"""Pictures of a classifier's guesses: which class it took for which, and its confidence."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dljax.report import common
from dljax.report.common import COLORS, INK

MAX_CELL_TEXTS = 20  # a confusion matrix of up to so many classes shows its numbers
MAX_CLASS_TICKS = 50  # a confusion matrix of up to so many classes shows their names


def confusion_matrix(
    matrix: np.ndarray, class_names: Sequence[str], *, per_cent: bool = False,
) -> Any:
  """A confusion matrix, which shows how often each class was taken for each other.

  Args:
    matrix: [C, C], the counts; row: truth, column: guess. A cell's colour shows its share of the
      row.
    class_names: the C names of the classes.
    per_cent: whether cells show their share of the row instead of their count.

  Returns:
    The figure. With up to `MAX_CELL_TEXTS` classes there are numbers in the cells.
  """
  matrix = np.asarray(matrix)
  count = len(matrix)
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  size = min(max(3.6, 1.6 + 0.46 * count), 10.8)
  figure = common.blank(size + 0.9, size)
  axes = figure.add_subplot()
  # The colour is the root of the share, so that few mistakes among many right guesses can be seen.
  image = axes.imshow(shares, cmap="Blues", norm=_power_norm(), interpolation="nearest")
  if count <= MAX_CELL_TEXTS:
    for i, j in np.ndindex(count, count):
      if matrix[i, j]:
        text = f"{100 * shares[i, j]:.1f}" if per_cent else f"{matrix[i, j]:.0f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=9,
                  color="white" if shares[i, j] > 0.3 else INK)
  if count <= MAX_CLASS_TICKS:
    size = 9 if count <= MAX_CELL_TEXTS else 6
    names = [common.plain(name, 16) for name in class_names]
    # This compares the widths of the longest name and of a column, in inches.
    crowded = 0.08 * max(map(len, names)) > max(0.46, 2 / count)
    axes.set_xticks(range(count), names, fontsize=size, rotation=90 if crowded else 0)
    axes.set_yticks(range(count), names, fontsize=size)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xlabel("guess (cells: per cent of the truth)" if per_cent else "guess", fontsize=11)
  axes.set_ylabel("truth", fontsize=11)
  total = matrix.sum()
  right = np.trace(matrix)
  axes.set_title(f"{right:,.0f} of {total:,.0f} right ({right / max(total, 1):.2%})", fontsize=12,
                 color=INK)
  bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1],
                        format=common.percent())
  bar.set_label("share of the true class", fontsize=10)
  bar.ax.tick_params(labelsize=9)
  bar.outline.set_visible(False)
  return figure


def calibration(count: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> Any:
  """A reliability diagram (Guo et al. 2017, figure 1): accuracy against confidence.

  Args:
    count: [M], the number of examples in each of M bins of confidence of equal width.
    confidence: [M], the sum of the guesses' probabilities.
    right: [M], the number of right guesses.

  Returns:
    The figure: accuracy against confidence, and below it the share of the guesses in each bin. The
    area of a dot is in proportion to the number of its guesses, but for a least size.
  """
  count, confidence, right = (np.asarray(x, np.float64) for x in (count, confidence, right))
  total, bins = max(count.sum(), 1), len(count)
  figure = common.blank(4.6, 5.6)
  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  left, there = np.arange(bins) / bins, count > 0
  accuracy, mean = (np.divide(x, count, out=np.zeros(bins), where=there)
                    for x in (right, confidence))
  upper.bar(left[there], accuracy[there], 1 / bins, align="edge", color=COLORS["test"],
            edgecolor="white", label="accuracy")
  upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--",
             label="perfectly calibrated")
  # Dots at the ends of the axes lie over them.
  upper.scatter(mean[there], accuracy[there], np.maximum(150 * count[there] / count.max(), 12),
                color=COLORS["validation"], clip_on=False, zorder=3)
  lower.bar(left, count / total, 1 / bins, align="edge", color=COLORS["train"], edgecolor="white")
  upper.set_ylabel("accuracy", fontsize=10)
  lower.set_ylabel("share of guesses", fontsize=10)
  lower.set_xlabel("confidence", fontsize=10)
  error = np.abs(right - confidence).sum() / total
  upper.set_title(f"{total:,.0f} guesses, calibration error {error:.2%}", fontsize=11, color=INK)
  handles, names = upper.get_legend_handles_labels()
  dot = common.dot(COLORS["validation"])  # of one size, as no bin's own size stands for all
  common.legend(figure, [*handles, dot], [*names, "at the bin's mean confidence, sized by count"],
                loc="outside lower center", fontsize=8, frameon=False)
  for axes in (upper, lower):
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_formatter(common.percent())
    axes.xaxis.set_major_formatter(common.percent())
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
  upper.set_ylim(0, 1)
  return figure


def _power_norm() -> Any:
  from matplotlib.colors import PowerNorm
  return PowerNorm(0.5, vmin=0, vmax=1)
