"""Pictures of images: in a grid, or with maps of what a network looked at."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dljax.report import common
from dljax.report.common import INK


def image_grid(
    images: Sequence[np.ndarray], titles: Sequence[str] = (), *, columns: int = 8,
    caption: str = "",
) -> Any:
  """Images in rows, each with its title above it.

  Args:
    images: images [H, W], [H, W, 1] (shown in grey) or [H, W, 3]. Each is scaled by its own least
      and greatest value, so that normalised images can be seen.
    titles: a title for each image, or ().
    columns: the number of images in a row.
    caption: a title above the grid.

  Returns:
    The figure.
  """
  columns = max(1, min(columns, len(images)))
  lines = max((title.count("\n") + 1 for title in titles), default=0)
  figure, panels = common.panels(columns, max(1, math.ceil(len(images) / columns)), 1.4,
                                 1.35 + 0.17 * lines)
  for axes in panels:
    axes.set_axis_off()
  for axes, image in zip(panels, images):
    axes.imshow(common.stretch(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
  for axes, title in zip(panels, titles):
    axes.set_title(common.plain(title, 18), fontsize=9, color=INK, pad=3)
  if caption:
    figure.suptitle(common.plain(caption), fontsize=12, color=INK)
  return figure


def heat_maps(
    images: Sequence[np.ndarray], maps: Mapping[str, np.ndarray], titles: Sequence[str] = (),
) -> Any:
  """Maps of what a network looked at, each laid over its image.

  Args:
    images: N images [H, W], [H, W, 1] or [H, W, 3], shown as in `image_grid`.
    maps: name -> [N, H, W], a map for each image. A map with negative values is coloured from blue
      to red, with white for 0; another by its share of its greatest value.
    titles: a title for each image, or ().

  Returns:
    The figure, with a row for each image: the image, then its maps.
  """
  figure, panels = common.panels(1 + len(maps), len(images), 1.8, 1.8)
  for axes in panels:
    axes.set_axis_off()
  for i, image in enumerate(images):
    row = panels[i * (1 + len(maps)):]
    image = common.stretch(image)
    row[0].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if titles:
      row[0].set_title(common.plain(titles[i], 22), fontsize=9, color=INK, pad=3)
    grey = image.mean(axis=-1) if image.ndim == 3 else image
    for axes, (name, values) in zip(row[1:], maps.items()):
      heat = np.asarray(values[i], np.float32)
      reach, signed = max(float(np.abs(heat).max()), 1e-30), heat.min() < 0
      axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
      axes.imshow(heat, cmap="bwr" if signed else "inferno", vmin=-reach if signed else 0,
                  vmax=reach, alpha=0.65, interpolation="nearest")
      if i == 0:
        axes.set_title(common.plain(name, 22), fontsize=9, color=INK, pad=3)
  return figure
