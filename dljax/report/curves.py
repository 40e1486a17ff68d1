"""Pictures of numbers: learning curves, metrics under corruptions, bars."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from dljax.report import common
from dljax.report.common import COLORS, INK, MORE_COLORS

TITLES = {"ap": "AP", "ap50": "AP50", "bleu": "BLEU", "mean_iou": "mean IoU", "rouge_l": "ROUGE-L",
          "mse": "mean squared error", "mae": "mean absolute error", "r2": "R²",
          "macro_f1": "macro F1", "top_5_accuracy": "top-5 accuracy"}
# A metric whose name has one of these parts is a share, which is shown in per cent.
ALIKE = 5e-3  # the relative difference up to which curves share a panel
SHARES = ("accuracy", "error_rate", "_iou")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`; a last line that a crash cut short is left out.

  Returns:
    One dict for each logged point: {"step": 100, "split": "train", "loss": 0.3, ...}.

  Raises:
    json.JSONDecodeError: a line other than the last is not JSON.
  """
  with open(path, encoding="utf-8") as file:
    lines = file.read().split("\n")
  return [json.loads(line) for line in lines[:-1] if line.strip()]


def learning_curves(
    rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str] = MappingProxyType({}),
) -> Any:
  """Loss, every metric that was evaluated, and the learning rate, against the step.

  Args:
    rows: the rows that `read_metrics` gives. Those of the split "train" are drawn as thin lines,
      with their moving average as a thick line; those of other splits have markers. A metric that
      only "train" has is not drawn, except for the loss and the learning rate.
    titles: metric -> its title, where it is not that of `TITLES`; see `TaskBase.titles`.

  Returns:
    The figure, one panel for each metric. A metric that is the same at every evaluation has no
    panel: a line below the panels gives its value. Metrics with the same curves share a panel.
  """
  curves = _curves(rows)
  names = ["loss"] + sorted({name for split, name in curves
                             if split != "train"} - {"loss", "learning_rate"})
  names = [name for name in names + ["learning_rate"] if any(name == n for _, n in curves)]
  names, same, constant = _distinct(names, curves)
  columns = 2 if len(names) == 4 else min(max(len(names), 1), 3)
  last = max((steps[-1] for steps, _ in curves.values()), default=1)
  figure, panels = common.panels(columns, max(1, math.ceil(len(names) / columns)), 4.2, 3.1)
  handles = {}
  for axes, name in zip(panels, names):
    splits = sorted({s for s, n in curves if n == name}, key=_order)
    for split in splits:
      steps, values = curves[split, name]
      color = _color(split, splits)
      if name == "learning_rate":
        axes.plot(steps, values, color=INK, linewidth=1.5)
      elif split == "train":
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
        smooth = _moving_average(values)
        handles[split], = axes.plot(steps, smooth, color=color, linewidth=1.5,
                                    label="train (moving average)")
      else:
        handles[split], = axes.plot(
            steps, values, color=color, linewidth=1.5, marker="o", markersize=4, label=split)
    _label_panel(axes, name, [curves[split, name][1] for split in splits], same[name], titles)
    axes.set_xlim(-0.02 * last, 1.02 * last)
  for axes in panels[len(names):]:
    axes.set_axis_off()
  if handles:
    splits = sorted(handles, key=_order)
    names = ["train (moving average)" if split == "train" else common.plain(split)
             for split in splits]
    note = ", ".join(f"{_title(name, titles)} {_number(name, value)}"
                     for name, value in constant.items())
    common.legend(figure, [handles[split] for split in splits], names, loc="outside lower center",
                  ncols=len(handles), frameon=False, fontsize=10,
                  title=f"constant: {note}" if note else None, title_fontsize=9)
  return figure


def strengths(
    curves: Mapping[str, Mapping[str, Sequence[float]]], clean: Mapping[str, float],
) -> Any:
  """Metrics against the strength of corruptions, 1, 2, ..., with one curve for each corruption.

  Args:
    curves: metric -> corruption -> the metric's value at each strength.
    clean: metric -> the metric's value without a corruption, drawn as a line.

  Returns:
    The figure, one panel for each metric.
  """
  figure, panels = common.panels(len(curves), 1, 4.8, 3.8)
  names = list(dict.fromkeys(name for values in curves.values() for name in values))
  colors = dict(zip(names, [COLORS["test"], COLORS["validation"], *MORE_COLORS, COLORS["train"]]))
  lines = {}
  for axes, (metric, values) in zip(panels, curves.items()):
    lines["clean"] = axes.axhline(clean[metric], color=INK, linewidth=1, linestyle="--",
                                  label="clean")
    for name, points in values.items():
      lines[name], = axes.plot(range(1, len(points) + 1), points, color=colors.get(name, INK),
                               marker="o", markersize=4, linewidth=1.5, label=name)
    _label_panel(axes, metric, list(values.values()))
    axes.set_xticks(range(1, 1 + max(map(len, values.values()))))
    axes.set_xlabel("strength", fontsize=10)
  common.legend(figure, lines.values(), [common.plain(name) for name in lines],
                loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  return figure


def relative_bars(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], label: str,
) -> Any:
  """Horizontal bars that start at 1 on a logarithmic scale, in groups.

  Args:
    panels: title -> group -> name of a bar -> (value, least, most), all above 0. A thin line goes
      from the least to the most. Bars of one name have one colour everywhere.
    label: the value's name.

  Returns:
    The figure, with its panels side by side.
  """
  groups = list(dict.fromkeys(group for panel in panels.values() for group in panel))
  names = list(dict.fromkeys(name for panel in panels.values() for bars in panel.values()
                             for name in bars))
  colors = dict(zip(names, [COLORS["test"], COLORS["train"], *MORE_COLORS]))
  figure, axes_row = common.panels(len(panels), 1, 4.8, 1.0 + 0.2 * len(groups) * (len(names) + 1))
  values = [v for panel in panels.values() for bars in panel.values() for bar in bars.values()
            for v in bar]
  for axes, (title, panel) in zip(axes_row, panels.items()):
    for row, group in enumerate(groups):
      bars = panel.get(group, {})
      for i, (name, (value, least, most)) in enumerate(bars.items()):
        y = row + (i - (len(bars) - 1) / 2) / (len(names) + 1)
        axes.barh(y, value - 1, 0.85 / (len(names) + 1), left=1, color=colors[name])
        # The marker shows a bar that ends at 1 and so has no length.
        axes.plot(value, y, marker="o", markersize=5, color=colors[name])
        axes.plot([least, most], [y, y], color=INK, linewidth=1)
        axes.annotate(f"{value:.2f}", (max(most, 1), y), (4, 0), textcoords="offset points",
                      va="center", fontsize=8, color=INK)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.7, *values) / 1.15, max(1, *values) * 1.6)  # room for the numbers
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(range(len(groups)),
                    [common.plain(group) for group in groups] if axes is axes_row[0] else [],
                    fontsize=10)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_title(common.plain(title), fontsize=11, color=INK)
    axes.set_xlabel(common.plain(label), fontsize=9)
    axes.tick_params(labelsize=9, colors=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
  common.legend(figure, [common.patch(colors[name]) for name in names],
                [common.plain(name) for name in names], loc="outside upper center",
                ncols=len(names), frameon=False, fontsize=10)
  return figure


def _curves(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
  """(split, metric) -> (steps, values), with the finite values only, sorted by step."""
  points: dict[tuple[str, str], dict[int, float]] = {}
  for row in rows:
    for name, value in row.items():
      if name in ("step", "split") or isinstance(value, (bool, str)) or value is None:
        continue
      if "second" not in name and math.isfinite(value):
        points.setdefault((row["split"], name), {})[row["step"]] = value
  return {
      key: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
      for key, values in points.items()
  }


def _distinct(
    names: Sequence[str], curves: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]],
) -> tuple[list[str], dict[str, list[str]], dict[str, float]]:
  """Which metrics have a panel: name -> the metrics with the same curves; and the constant ones."""
  drawn: list[str] = []
  same: dict[str, list[str]] = {}
  constant = {}
  for name in names:
    own = {split: curve for (split, n), curve in curves.items() if n == name}
    seen = np.concatenate([values for split, (_, values) in own.items() if split != "train"]
                          or [values for _, values in own.values()])
    twin = next((other for other in drawn if _equal(own, {
        split: curve for (split, n), curve in curves.items() if n == other})), None)
    if name != "loss" and np.ptp(seen) == 0 and (len(seen) > 1 or seen[0] == 0):
      constant[name] = float(seen[0])
    elif twin is not None:
      same[twin].append(name)
    else:
      drawn.append(name)
      same[name] = []
  return drawn, same, constant


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """Whether the curves of two metrics cannot be told apart, such as bits per byte and character."""
  return one.keys() == other.keys() and all(
      np.array_equal(one[split][0], other[split][0])
      and np.allclose(one[split][1], other[split][1], rtol=ALIKE, atol=0) for split in one)


def _moving_average(values: np.ndarray) -> np.ndarray:
  """The mean over a centred window of a twentieth of the points, [N] -> [N]."""
  width = max(1, len(values) // 20) // 2
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def _title(name: str, titles: Mapping[str, str]) -> str:
  return common.plain(titles.get(name) or TITLES.get(name, name.replace("_", " ")))


def _is_share(name: str) -> bool:
  return any(part in name for part in SHARES)


def _number(name: str, value: float) -> str:
  return f"{100 * value:.4g} %" if _is_share(name) else f"{value:.4g}"


def _label_panel(
    axes: Any, name: str, curves: Sequence[np.ndarray], same: Sequence[str] = (),
    titles: Mapping[str, str] = MappingProxyType({}),
) -> None:
  """Sets the title and the scale of a panel of learning curves, which `same` metrics share."""
  if _is_share(name):
    axes.yaxis.set_major_formatter(common.percent())
  elif name == "loss":
    values = np.concatenate(curves)
    if values.min() > 0 and values.max() > 20 * values.min():
      axes.set_yscale("log")
  names = [_title(each, titles) for each in (name, *same)]
  axes.set_title(", ".join(names), fontsize=11, color=INK)
  axes.set_xlabel("step", fontsize=10)
  axes.tick_params(labelsize=9, colors=INK)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)


def _order(split: str) -> tuple[int, str]:
  """A sort key that puts the known splits first."""
  return (list(COLORS).index(split) if split in COLORS else len(COLORS)), split


def _color(split: str, splits: Sequence[str]) -> str:
  others = [s for s in splits if s not in COLORS]
  return COLORS[split] if split in COLORS else MORE_COLORS[others.index(split) % len(MORE_COLORS)]
