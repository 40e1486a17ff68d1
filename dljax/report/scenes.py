"""Pictures of images and what was found in them: boxes of objects, classes of pixels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dljax.report import common
from dljax.report.common import COLORS, INK, MORE_COLORS

MAX_LEGEND = 20  # the largest number of classes that a legend names


def detections(
    images: Sequence[np.ndarray], truths: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]], class_names: Sequence[str], *, columns: int = 4,
    caption: str = "",
) -> Any:
  """Images with the boxes of their objects, and of the objects that were found.

  Args:
    images: images [H, W, 1] (shown in grey) or [H, W, 3], shown as in `image_grid`.
    truths: for each image, "boxes" [m, 4] as (x0, y0, x1, y1) in pixels.
    found: for each image, "boxes" [d, 4], "labels" i[d] and "scores" [d]; label and score are
      written at the box.
    class_names: the labels' names.
    columns: the number of images in a row.
    caption: a title above all images.

  Returns:
    The figure.
  """
  from matplotlib.patches import Rectangle

  columns = max(1, min(columns, len(images)))
  figure, panels = common.panels(columns, max(1, math.ceil(len(images) / columns)), 2.6, 2.6)
  truth_color, found_color = MORE_COLORS[1], COLORS["validation"]
  for axes in panels:
    axes.set_axis_off()
  for axes, image, truth, detected in zip(panels, images, truths, found):
    axes.imshow(common.stretch(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")

    def draw(box: np.ndarray, color: str, axes: Any = axes, **style: Any) -> None:
      x0, y0, x1, y1 = map(float, box)
      axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=color,
                               **style))

    for box in truth["boxes"]:
      draw(box, truth_color, linewidth=2.5)
    for box, label, score in zip(detected["boxes"], detected["labels"], detected["scores"]):
      draw(box, found_color, linewidth=1, linestyle="--")
      # A label above the image, or beyond its right side, would be cut.
      x0, y0, x1, _ = map(float, box)
      high, right = y0 < 0.06 * image.shape[0], x0 > 0.5 * image.shape[1]
      axes.text(min(x1, image.shape[1]) - 0.5 if right else max(x0, 0), max(y0, 0),
                f"{common.plain(class_names[label], 16)} {score:.0%}", fontsize=6,
                color="white", va="top" if high else "bottom", ha="right" if right else "left",
                clip_on=True,
                bbox={"facecolor": found_color, "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
  if caption:
    figure.suptitle(common.plain(caption), fontsize=12, color=INK)
  figure.legend(handles=[common.patch(truth_color, "truth"), common.patch(found_color, "found")],
                loc="outside lower center", ncols=2, frameon=False, fontsize=9)
  return figure


def segmentations(
    images: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]],
    class_names: Sequence[str], *, caption: str = "",
) -> Any:
  """Images, with the classes of their pixels laid over them in colours.

  Args:
    images: images [H, W], [H, W, 1] or [H, W, 3], shown as in `image_grid`.
    maps: name, such as "truth" -> the classes i[H, W] of each image. The first class, the ground,
      is left in grey; a negative pixel has no class and is white.
    class_names: the names of all classes.
    caption: a title above all images.

  Returns:
    The figure, with a column for each image: the image, then its maps. The legend has the classes
    that occur.
  """
  figure, panels = common.panels(len(images), 1 + len(maps), 1.8, 1.8)
  colors = class_colors(len(class_names))
  occur = set()
  for axes in panels:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
  for i, image in enumerate(images):
    image = common.stretch(image)
    image = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
    panels[i].imshow(image, interpolation="nearest")
    for row, (name, values) in enumerate(maps.items(), 1):
      axes, classes = panels[row * len(images) + i], np.asarray(values[i], int)
      grey = image.mean(axis=-1, keepdims=True)
      tinted = np.where(classes[..., None] > 0,
                        0.35 * grey + 0.65 * colors[np.maximum(classes, 0)] / 255, grey)
      axes.imshow(np.where(classes[..., None] < 0, 1, tinted), interpolation="nearest")
      if i == 0:
        axes.set_ylabel(common.plain(name), fontsize=10, color=INK)
      occur |= set(np.unique(classes[classes > 0]).tolist())
  if caption:
    figure.suptitle(common.plain(caption), fontsize=12, color=INK)
  named = sorted(occur)[:MAX_LEGEND]
  if named:
    common.legend(figure, [common.patch(colors[c] / 255) for c in named],
                  [common.plain(class_names[c], 16) for c in named], loc="outside lower center",
                  ncols=min(len(named), 3 * len(images)), frameon=False, fontsize=9,
                  columnspacing=1, handlelength=1)
  return figure


def class_colors(count: int) -> np.ndarray:
  """u8[count, 3]: a colour for each class of pixels; the first, the ground, is black."""
  import matplotlib

  table = np.concatenate([matplotlib.colormaps[name].colors
                          for name in ("tab10", "tab20b", "tab20c")])
  # Steps of the golden ratio make neighbouring colours differ most.
  rest = matplotlib.colormaps["hsv"](np.arange(count) * 0.618 % 1)[:, :3]
  return np.round(255 * np.concatenate([np.zeros((1, 3)), table, rest])[:count]).astype(np.uint8)


def class_map(classes: np.ndarray) -> Any:
  """A picture whose pixels hold their classes' numbers and show their colours; 255 is white.

  Args:
    classes: u8[H, W].

  Returns:
    The `PIL.Image.Image`, with a palette.
  """
  from PIL import Image

  picture = Image.fromarray(classes).convert("P")
  picture.putpalette(np.concatenate([class_colors(255),
                                     np.full((1, 3), 255)]).astype(np.uint8).tobytes())
  return picture
