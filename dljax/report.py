"""Pictures of a run: learning curves, confusion matrices, grids of images.

Every function gives a `matplotlib.figure.Figure` and never touches pyplot, whose global state no
two threads can share. A notebook shows them after `%matplotlib inline`.
"""

import itertools
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DPI = 150
MAX_CELL_TEXTS = 20  # classes up to which a confusion matrix has its numbers written in
MAX_CLASS_TICKS = 50  # classes up to which it has their names beside it
TITLES = {"ap": "AP", "ap50": "AP50", "bleu": "BLEU", "mean_iou": "mean IoU", "rouge_l": "ROUGE-L",
          "mse": "mean squared error", "mae": "mean absolute error", "top_5_accuracy": "top-5 accuracy"}
SHARES = ("accuracy", "error_rate", "_iou")  # names with one of these are shares, shown in per cent
COLORS = {"train": "#6b7785", "validation": "#d1495b", "test": "#1f6f8b"}
MORE_COLORS = ("#edae49", "#66a182", "#8d6a9f")
INK = "#333333"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, without a last line that a crash cut short.

  Returns:
    One dict for each logged point: {"step": 100, "split": "train", "loss": 0.3, ...}.

  Raises:
    json.JSONDecodeError: a line other than the last is no JSON.
  """
  with open(path, encoding="utf-8") as file:
    lines = file.read().split("\n")
  return [json.loads(line) for line in lines[:-1] if line.strip()]


def learning_curves(rows: Sequence[Mapping[str, Any]]) -> Any:
  """Loss, every metric that was evaluated, and the learning rate, against the step.

  Args:
    rows: as `read_metrics` gives them. Rows of the split "train" are drawn as thin lines with their
      moving average over them, those of other splits with markers. A metric that only "train" has is
      not drawn, except for the loss and the learning rate.

  Returns:
    The figure, one panel for each metric.
  """
  curves = _curves(rows)
  names = ["loss"] + sorted({name for split, name in curves if split != "train"} - {"loss", "learning_rate"})
  names = [name for name in names + ["learning_rate"] if any(name == n for _, n in curves)]
  columns = 2 if len(names) == 4 else min(max(len(names), 1), 3)
  last = max((steps[-1] for steps, _ in curves.values()), default=1)
  figure, panels = _panels(columns, max(1, math.ceil(len(names) / columns)), 4.2, 3.1)
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
        handles[split], = axes.plot(steps, smooth, color=color, linewidth=1.5, label="train (moving average)")
      else:
        handles[split], = axes.plot(
            steps, values, color=color, linewidth=1.5, marker="o", markersize=4, label=split)
    _label_panel(axes, name, [curves[split, name][1] for split in splits])
    axes.set_xlim(-0.02 * last, 1.02 * last)
  for axes in panels[len(names):]:
    axes.set_axis_off()
  if handles:
    figure.legend(handles=[handles[split] for split in sorted(handles, key=_order)],
                  loc="outside upper center", ncols=len(handles), frameon=False, fontsize=10)
  return figure


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], *, per_cent: bool = False) -> Any:
  """Which class was taken for which.

  Args:
    matrix: [C, C], counts; row: truth, column: guess. Cells are coloured by their share of the row.
    class_names: C names.
    per_cent: whether the share of the row stands in a cell, not the count.

  Returns:
    The figure; with up to `MAX_CELL_TEXTS` classes numbers stand in the cells.
  """
  matrix = np.asarray(matrix)
  count = len(matrix)
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  size = min(max(3.6, 1.6 + 0.46 * count), 10.8)
  figure = _figure(size + 0.9, size)
  axes = figure.add_subplot()
  # Few mistakes among many right guesses must still be seen: the colour is the root of the share.
  image = axes.imshow(shares, cmap="Blues", norm=_power_norm(), interpolation="nearest")
  if count <= MAX_CELL_TEXTS:
    for i, j in np.ndindex(count, count):
      if matrix[i, j]:
        text = f"{100 * shares[i, j]:.1f}" if per_cent else f"{matrix[i, j]:.0f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=9,
                  color="white" if shares[i, j] > 0.3 else INK)
  if count <= MAX_CLASS_TICKS:
    size = 9 if count <= MAX_CELL_TEXTS else 6
    names = [_shorten(str(name)) for name in class_names]
    crowded = 0.08 * max(map(len, names)) > max(0.46, 2 / count)  # inches of a name, and of a column
    axes.set_xticks(range(count), names, fontsize=size, rotation=90 if crowded else 0)
    axes.set_yticks(range(count), names, fontsize=size)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xlabel("guess", fontsize=11)
  axes.set_ylabel("truth", fontsize=11)
  total = matrix.sum()
  axes.set_title(f"{np.trace(matrix):,.0f} of {total:,.0f} right ({np.trace(matrix) / max(total, 1):.2%})",
                 fontsize=12, color=INK)
  bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], format=_percent())
  bar.set_label("share of the true class", fontsize=10)
  bar.ax.tick_params(labelsize=9)
  bar.outline.set_visible(False)
  return figure


def calibration(count: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> Any:
  """A reliability diagram (Guo et al. 2017, figure 1): how often guesses of a confidence were right.

  Args:
    count: [M], examples in each of M bins of confidence of equal width.
    confidence: [M], the sum of the probabilities of the guesses.
    right: [M], how many guesses were right.

  Returns:
    The figure: accuracy against confidence, and below it how the guesses spread over the bins.
  """
  count, confidence, right = (np.asarray(x, np.float64) for x in (count, confidence, right))
  total, bins = max(count.sum(), 1), len(count)
  figure = _figure(4.6, 5.6)
  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  left, there = np.arange(bins) / bins, count > 0
  accuracy, mean = (np.divide(x, count, out=np.zeros(bins), where=there) for x in (right, confidence))
  upper.bar(left[there], accuracy[there], 1 / bins, align="edge", color=COLORS["test"], edgecolor="white",
            label="accuracy")
  upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--", label="perfectly calibrated")
  upper.plot(mean[there], accuracy[there], color=COLORS["validation"], marker="o", markersize=4, linewidth=0,
             label="at the bin's mean confidence")
  lower.bar(left, count / total, 1 / bins, align="edge", color=COLORS["train"], edgecolor="white")
  upper.set_ylabel("accuracy", fontsize=10)
  lower.set_ylabel("share of guesses", fontsize=10)
  lower.set_xlabel("confidence", fontsize=10)
  error = np.abs(right - confidence).sum() / total
  upper.set_title(f"{total:,.0f} guesses, calibration error {error:.2%}", fontsize=11, color=INK)
  upper.legend(loc="upper left", fontsize=8, frameon=False)
  for axes in (upper, lower):
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_formatter(_percent())
    axes.xaxis.set_major_formatter(_percent())
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
  upper.set_ylim(0, 1)
  return figure


def strengths(curves: Mapping[str, Mapping[str, Sequence[float]]], clean: Mapping[str, float]) -> Any:
  """Metrics against the strength of disturbances, 1, 2, ..., one curve for each.

  Args:
    curves: metric -> disturbance -> its value at each strength.
    clean: metric -> its value without a disturbance, drawn as a line.

  Returns:
    The figure, one panel for each metric.
  """
  figure, panels = _panels(len(curves), 1, 4.8, 3.8)
  names = list(dict.fromkeys(name for values in curves.values() for name in values))
  colors = dict(zip(names, [COLORS["test"], COLORS["validation"], *MORE_COLORS, COLORS["train"]]))
  lines = {}
  for axes, (metric, values) in zip(panels, curves.items()):
    lines["clean"] = axes.axhline(clean[metric], color=INK, linewidth=1, linestyle="--", label="clean")
    for name, points in values.items():
      lines[name], = axes.plot(range(1, len(points) + 1), points, color=colors.get(name, INK), marker="o", markersize=4,
                               linewidth=1.5, label=name)
    _label_panel(axes, metric, list(values.values()))
    axes.set_xticks(range(1, 1 + max(map(len, values.values()))))
    axes.set_xlabel("strength", fontsize=10)
  figure.legend(handles=list(lines.values()), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
  return figure


def heat_maps(images: Sequence[np.ndarray], maps: Mapping[str, np.ndarray], titles: Sequence[str] = ()) -> Any:
  """Maps of what a network looked at, each laid over its image.

  Args:
    images: each [H, W], [H, W, 1] or [H, W, 3], shown as `image_grid` does.
    maps: name -> [N, H, W], one for each image. Maps that take both signs are coloured blue to red about 0,
      the others by the share of their greatest value.
    titles: one for each image, or none.

  Returns:
    The figure: a row for each image, itself first, then its maps.
  """
  figure, panels = _panels(1 + len(maps), len(images), 1.8, 1.8)
  for axes in panels:
    axes.set_axis_off()
  for i, image in enumerate(images):
    row = panels[i * (1 + len(maps)):]
    image = _stretch(image)
    row[0].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if titles:
      row[0].set_title(_shorten(titles[i], 22), fontsize=9, color=INK, pad=3)
    grey = image.mean(axis=-1) if image.ndim == 3 else image
    for axes, (name, values) in zip(row[1:], maps.items()):
      heat = np.asarray(values[i], np.float32)
      reach, signed = max(float(np.abs(heat).max()), 1e-30), heat.min() < 0
      axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
      axes.imshow(heat, cmap="bwr" if signed else "inferno", vmin=-reach if signed else 0, vmax=reach, alpha=0.65,
                  interpolation="nearest")
      if i == 0:
        axes.set_title(_shorten(name, 22), fontsize=9, color=INK, pad=3)
  return figure


def image_grid(
    images: Sequence[np.ndarray], titles: Sequence[str] = (), *, columns: int = 8, caption: str = "",
) -> Any:
  """Images in rows, each with its title above it.

  Args:
    images: each [H, W], [H, W, 1] (shown in grey) or [H, W, 3]. Each is stretched from its own least
      value to its own greatest, so that normalised images can be seen.
    titles: one for each image, or none.
    columns: images in a row.
    caption: stands above the grid.

  Returns:
    The figure.
  """
  columns = max(1, min(columns, len(images)))
  lines = max((title.count("\n") + 1 for title in titles), default=0)
  figure, panels = _panels(columns, max(1, math.ceil(len(images) / columns)), 1.4, 1.35 + 0.17 * lines)
  for axes in panels:
    axes.set_axis_off()
  for axes, image in zip(panels, images):
    axes.imshow(_stretch(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
  for axes, title in zip(panels, titles):
    axes.set_title("\n".join(_shorten(line, 18) for line in title.split("\n")), fontsize=9, color=INK, pad=3)
  if caption:
    figure.suptitle(caption, fontsize=12, color=INK)
  return figure


def detections(
    images: Sequence[np.ndarray], truths: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]], class_names: Sequence[str], *, columns: int = 4, caption: str = "",
) -> Any:
  """Images with the boxes of the objects that are there, and of those that were found.

  Args:
    images: each [H, W, 1] (shown in grey) or [H, W, 3], shown as `image_grid` does.
    truths: of each, "boxes" [m, 4] as (x0, y0, x1, y1) in pixels.
    found: of each, "boxes" [d, 4], "labels" i[d] and "scores" [d]; label and score stand at the box.
    class_names: of the labels.
    columns: images in a row.
    caption: stands above all.

  Returns:
    The figure.
  """
  from matplotlib.patches import Rectangle

  columns = max(1, min(columns, len(images)))
  figure, panels = _panels(columns, max(1, math.ceil(len(images) / columns)), 2.6, 2.6)
  truth_color, found_color = MORE_COLORS[1], COLORS["validation"]
  for axes in panels:
    axes.set_axis_off()
  for axes, image, truth, detected in zip(panels, images, truths, found):
    axes.imshow(_stretch(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")

    def draw(box: np.ndarray, color: str, axes: Any = axes, **style: Any) -> None:
      x0, y0, x1, y1 = map(float, box)
      axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=color, **style))

    for box in truth["boxes"]:
      draw(box, truth_color, linewidth=2.5)
    for box, label, score in zip(detected["boxes"], detected["labels"], detected["scores"]):
      draw(box, found_color, linewidth=1, linestyle="--")
      axes.text(float(box[0]), float(box[1]), f"{_shorten(str(class_names[label]))} {score:.0%}", fontsize=6,
                color="white", va="bottom", clip_on=True,
                bbox={"facecolor": found_color, "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
  if caption:
    figure.suptitle(caption, fontsize=12, color=INK)
  figure.legend(handles=[_patch(truth_color, "truth"), _patch(found_color, "found")], loc="outside lower center",
                ncols=2, frameon=False, fontsize=9)
  return figure


def segmentations(
    images: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]], class_names: Sequence[str], *,
    caption: str = "",
) -> Any:
  """Images, and the classes of their pixels laid over them in colours.

  Args:
    images: each [H, W], [H, W, 1] or [H, W, 3], shown as `image_grid` does.
    maps: name, such as "truth" -> of each image the classes i[H, W]. The first class, the ground, is left in grey;
      what is negative has no class and is white.
    class_names: of all classes.
    caption: stands above all.

  Returns:
    The figure: a column for each image, itself first, then its maps. The legend has the classes that occur.
  """
  figure, panels = _panels(len(images), 1 + len(maps), 1.8, 1.8)
  colors = class_colors(len(class_names))
  occur = set()
  for axes in panels:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
  for i, image in enumerate(images):
    image = _stretch(image)
    image = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
    panels[i].imshow(image, interpolation="nearest")
    for row, (name, values) in enumerate(maps.items(), 1):
      axes, classes = panels[row * len(images) + i], np.asarray(values[i], int)
      grey = image.mean(axis=-1, keepdims=True)
      tinted = np.where(classes[..., None] > 0, 0.35 * grey + 0.65 * colors[np.maximum(classes, 0)] / 255, grey)
      axes.imshow(np.where(classes[..., None] < 0, 1, tinted), interpolation="nearest")
      if i == 0:
        axes.set_ylabel(name, fontsize=10, color=INK)
      occur |= set(np.unique(classes[classes > 0]).tolist())
  if caption:
    figure.suptitle(caption, fontsize=12, color=INK)
  handles = [_patch(colors[c] / 255, _shorten(str(class_names[c]))) for c in sorted(occur)[:MAX_CELL_TEXTS]]
  if handles:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3 * len(images)), frameon=False,
                  fontsize=9, columnspacing=1, handlelength=1)
  return figure


def alignments(
    features: Sequence[np.ndarray], probabilities: Sequence[np.ndarray], symbols: Sequence[str], titles: Sequence[str],
) -> Any:
  """What a network heard when: the features of recordings, and below the probability of each symbol over time.

  Args:
    features: each [t, F], drawn with the lowest band below.
    probabilities: each [T, V]. Symbol 0, the blank, is a thin line; of the others those are drawn and named that are
      anywhere the most probable.
    symbols: V.
    titles: one for each recording.

  Returns:
    The figure: a pair of panels for each recording.
  """
  figure = _figure(9, 2.6 * len(features) + 0.4)
  panels = figure.subplots(2 * len(features), 1, squeeze=False, height_ratios=[3, 2] * len(features))[:, 0]
  colors = [COLORS["test"], COLORS["validation"], *MORE_COLORS]
  for upper, lower, bands, shares, title in zip(panels[::2], panels[1::2], features, probabilities, titles):
    upper.imshow(np.asarray(bands).T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest")
    upper.set(xticks=[], yticks=[])
    upper.set_title("\n".join(_shorten(line, 110) for line in title.split("\n")), fontsize=8, color=INK, loc="left",
                    family="monospace")
    times = np.arange(len(shares))
    guess = np.argmax(shares, axis=1)
    lower.plot(times, shares[:, 0], color=COLORS["train"], linewidth=0.7, linestyle=":")
    for i, symbol in enumerate(sorted(set(guess.tolist()) - {0})):
      lower.plot(times, shares[:, symbol], color=colors[i % len(colors)], linewidth=1.2)
    start = 0
    for symbol, run in itertools.groupby(guess.tolist()):
      end = start + len(list(run))
      if symbol:
        at = start + int(np.argmax(shares[start:end, symbol]))
        lower.text(at, 1.04, symbols[symbol].replace(" ", "␣"), ha="center", fontsize=8, color=INK)
      start = end
    lower.set_xlim(-0.5, max(len(shares), 1) - 0.5)
    lower.set_ylim(0, 1.25)
    lower.set(xticks=[], yticks=[0, 1])
    lower.tick_params(labelsize=8, colors=INK)
    lower.spines[["top", "right"]].set_visible(False)
  return figure


def surprise(pieces: Sequence[str], bits: Sequence[float], *, columns: int = 92, lines: int = 26) -> Any:
  """A text as its reader took it: the less a token was expected, the darker the ground that it stands on.

  Args:
    pieces: the text of each token; the end of a line is drawn as an arrow.
    bits: -log2 of the probability that each token had.
    columns, lines: how many characters are drawn at most; a longer line goes on in the next.

  Returns:
    The figure.
  """
  ground, texts, line, column = np.full((lines, columns), np.nan), [], 0, 0
  for character, value in ((c, b) for piece, b in zip(pieces, bits) for c in piece):
    if column == columns:
      line, column = line + 1, 0
    if line == lines:
      break
    ground[line, column] = value
    if character == "\n":
      texts.append((column, line, "↵"))
      line, column = line + 1, 0
    else:
      if character.isprintable() and character != " ":
        texts.append((column, line, character))
      column += 1
  ground = ground[:max(line + (column > 0), 1)]
  figure = _figure(10.5, 0.2 * len(ground) + 0.9)
  axes = figure.add_subplot()
  image = axes.imshow(ground, cmap="OrRd", vmin=0, vmax=8, aspect="auto", interpolation="nearest")
  for x, y, character in texts:
    color = "white" if ground[y, x] > 5 else INK
    # Whatever a text holds is no formula.
    axes.text(x, y, character, ha="center", va="center_baseline", fontsize=8, family="monospace", color=color,
              parse_math=False)
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set_visible(False)
  bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.4, aspect=40, pad=0.02, extend="max")
  bar.set_label("bits of a token", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)
  return figure


def class_colors(count: int) -> np.ndarray:
  """u8[count, 3]: a colour for each class of pixels; the first, the ground, is black."""
  import matplotlib

  table = np.concatenate([matplotlib.colormaps[name].colors for name in ("tab10", "tab20b", "tab20c")])
  rest = matplotlib.colormaps["hsv"](np.arange(count) * 0.618 % 1)[:, :3]  # neighbours differ most by the golden ratio
  return np.round(255 * np.concatenate([np.zeros((1, 3)), table, rest])[:count]).astype(np.uint8)


def class_map(classes: np.ndarray) -> Any:
  """A picture whose pixels have the numbers of their classes as values, shown in their colours; 255 is white.

  Args:
    classes: u8[H, W].

  Returns:
    The `PIL.Image.Image`, with a palette.
  """
  from PIL import Image

  picture = Image.fromarray(classes).convert("P")
  picture.putpalette(np.concatenate([class_colors(255), np.full((1, 3), 255)]).astype(np.uint8).tobytes())
  return picture


def forecasts(
    rows: Mapping[str, Mapping[str, np.ndarray]], channels: Sequence[str], *, band: str = "", caption: str = "",
) -> Any:
  """Forecasts of time series, each after the window that it was made from.

  Args:
    rows: title -> "window" [W, C], "forecast" [H, C], and where they are known "truth" [H, C] and the limits "low"
      and "high" [H, C] of a band. What is NaN is left out.
    channels: C names.
    band: what the band is, for the legend.
    caption: stands above all.

  Returns:
    The figure: a row of panels for each title, a column for each channel. No more than twice the horizon is shown
    of the window.
  """
  figure, panels = _panels(len(channels), len(rows), max(2.6, 7.0 / len(channels)), 1.9)
  handles = {}
  for r, (title, fields) in enumerate(rows.items()):
    horizon = len(fields["forecast"])
    shown = min(len(fields["window"]), 2 * horizon)
    before, after = np.arange(1 - shown, 1), np.arange(1, 1 + horizon)
    for c, name in enumerate(channels):
      axes = panels[r * len(channels) + c]
      past = np.asarray(fields["window"])[-shown:, c]
      handles["window"], = axes.plot(before, past, color=COLORS["train"], linewidth=1.2, label="window")
      if "low" in fields:
        handles["band"] = axes.fill_between(after, fields["low"][:, c], fields["high"][:, c], color=COLORS["test"],
                                            alpha=0.25, linewidth=0, label=band)
      if "truth" in fields:
        handles["truth"], = axes.plot(after, fields["truth"][:, c], color=INK, linewidth=1.2, label="truth")
      handles["forecast"], = axes.plot(after, fields["forecast"][:, c], color=COLORS["validation"], linewidth=1.5,
                                       label="forecast")
      axes.axvline(0.5, color=INK, linewidth=0.6, linestyle=":")
      axes.set_title(f"{_shorten(str(name), 24)}\n{title}" if len(channels) > 1 else title, fontsize=9, color=INK)
      axes.tick_params(labelsize=8, colors=INK)
      axes.grid(alpha=0.25, linewidth=0.6)
      axes.spines[["top", "right"]].set_visible(False)
      if r == len(rows) - 1:
        axes.set_xlabel("steps ahead", fontsize=9)
  if caption:
    figure.suptitle(caption, fontsize=12, color=INK)
  figure.legend(handles=[handles[name] for name in ("window", "truth", "forecast", "band") if name in handles],
                loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  return figure


def picture(figure: Any) -> Any:
  """A figure as a `PIL.Image.Image`, of `DPI`."""
  from PIL import Image

  figure.set_dpi(DPI)
  figure.canvas.draw()
  return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def relative_bars(panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], label: str) -> Any:
  """Horizontal bars from 1 on a logarithmic scale, in groups: what is less lies left, what is more right.

  Args:
    panels: title -> group -> name of a bar -> (value, least, most), all above 0; the last two are its whisker. Bars of
      one name have one colour everywhere.
    label: of the value.

  Returns:
    The figure, panels side by side.
  """
  groups = list(dict.fromkeys(group for panel in panels.values() for group in panel))
  names = list(dict.fromkeys(name for panel in panels.values() for bars in panel.values() for name in bars))
  colors = dict(zip(names, [COLORS["test"], COLORS["train"], *MORE_COLORS]))
  figure, axes_row = _panels(len(panels), 1, 4.8, 1.0 + 0.2 * len(groups) * (len(names) + 1))
  values = [v for panel in panels.values() for bars in panel.values() for bar in bars.values() for v in bar]
  for axes, (title, panel) in zip(axes_row, panels.items()):
    for row, group in enumerate(groups):
      bars = panel.get(group, {})
      for i, (name, (value, least, most)) in enumerate(bars.items()):
        y = row + (i - (len(bars) - 1) / 2) / (len(names) + 1)
        axes.barh(y, value - 1, 0.85 / (len(names) + 1), left=1, color=colors[name])
        axes.plot(value, y, marker="o", markersize=5, color=colors[name])  # a bar to 1 has no length
        axes.plot([least, most], [y, y], color=INK, linewidth=1)
        axes.annotate(f"{value:.2f}", (max(most, 1), y), (4, 0), textcoords="offset points", va="center", fontsize=8,
                      color=INK)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.7, *values) / 1.15, max(1, *values) * 1.6)  # room for the numbers
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(range(len(groups)), groups if axes is axes_row[0] else [], fontsize=10)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=9, colors=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
  figure.legend(handles=[_patch(colors[name], name) for name in names], loc="outside upper center",
                ncols=len(names), frameon=False, fontsize=10)
  return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
  """Writes a figure as PNG at `DPI`; whoever reads `path` sees the old file or the whole new one."""
  directory = os.path.dirname(os.path.abspath(path))
  os.makedirs(directory, exist_ok=True)
  temporary = os.path.join(directory, f".{os.path.basename(path)}.{os.getpid()}-{threading.get_ident()}")
  try:
    figure.savefig(temporary, format="png", dpi=DPI, facecolor="white")
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.unlink(temporary)


def _figure(width: float, height: float) -> Any:
  """An empty figure of so many inches, drawn by Agg without pyplot."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and seldom needed
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def _panels(columns: int, rows: int, width: float, height: float) -> tuple[Any, list[Any]]:
  """A figure of rows x columns panels of so many inches each, and the panels in reading order."""
  figure = _figure(max(columns * width, 4), rows * height + 0.4)  # a caption needs its room
  return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
  """(split, metric) -> (steps, values), the finite ones in order of the step."""
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


def _stretch(image: np.ndarray) -> np.ndarray:
  """[H, W], [H, W, 1] or [H, W, 3] from its least value to its greatest as [H, W] or [H, W, 3] of 0 to 1."""
  image = np.asarray(image, np.float32)
  low, high = image.min(), image.max()
  image = (image - low) / (high - low) if high > low else np.zeros_like(image)
  return image.squeeze(-1) if image.shape[2:] == (1,) else image


def _moving_average(values: np.ndarray) -> np.ndarray:
  """The mean over a centred window of a twentieth of the points, [N] -> [N]."""
  width = max(1, len(values) // 20) // 2
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def _label_panel(axes: Any, name: str, curves: Sequence[np.ndarray]) -> None:
  """Title and scale of a panel of learning curves."""
  title = TITLES.get(name, name.replace("_", " "))
  if any(part in name for part in SHARES):
    axes.yaxis.set_major_formatter(_percent())
  elif name == "loss":
    values = np.concatenate(curves)
    if values.min() > 0 and values.max() > 20 * values.min():
      axes.set_yscale("log")
  axes.set_title(title, fontsize=11, color=INK)
  axes.set_xlabel("step", fontsize=10)
  axes.tick_params(labelsize=9, colors=INK)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)


def _order(split: str) -> tuple[int, str]:
  """Sorts the known splits first."""
  return (list(COLORS).index(split) if split in COLORS else len(COLORS)), split


def _color(split: str, splits: Sequence[str]) -> str:
  others = [s for s in splits if s not in COLORS]
  return COLORS[split] if split in COLORS else MORE_COLORS[others.index(split) % len(MORE_COLORS)]


def _shorten(name: str, limit: int = 16) -> str:
  return name if len(name) <= limit else name[:limit - 1] + "…"


def _patch(color: str, label: str) -> Any:
  from matplotlib.patches import Patch
  return Patch(color=color, label=label)


def _percent() -> Any:
  from matplotlib.ticker import PercentFormatter
  return PercentFormatter(xmax=1)


def _power_norm() -> Any:
  from matplotlib.colors import PowerNorm
  return PowerNorm(0.5, vmin=0, vmax=1)
