"""What a network saw of an input, beside what it made of it."""

import os
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from dljax.report import common
from dljax.report.common import COLORS, INK

MOST_BARS = 5
_WIDTH = 34  # characters in a line of text
_LINES = 12


def seen(
    image: np.ndarray, row: Mapping[str, Any], *, cmap: str = "gray", duration: float = 0.0,
) -> Any:
  """An input as the network saw it, and its prediction.

  Args:
    image: [H, W], [H, W, 1] or [H, W, 3] with values from 0 to 1, which are shown as they are.
    row: the prediction, as `Experiment.show` gives it, with "input", the input's name. A dict of
      shares, such as the probabilities of classes, is drawn as bars; other values are written.
    cmap: the colours of an image without colours.
    duration: the length in seconds of a recording whose bands over time are the image.

  Returns:
    The figure.
  """
  image = np.asarray(image, np.float32)
  image = image.squeeze(-1) if image.shape[2:] == (1,) else image
  wide = duration > 0 or image.shape[1] > 2 * image.shape[0]
  figure = common.blank(7.2, 3.6 if wide else 2.9)
  left, right = figure.subplots(2, 1, height_ratios=(3, 1)) if wide else figure.subplots(
      1, 2, width_ratios=(1, 1.3))
  left.imshow(image, cmap=cmap, vmin=0, vmax=1, interpolation="nearest",
              aspect="auto" if wide else "equal")
  left.set(xticks=[], yticks=[])
  if duration:
    left.tick_params(labelsize=8, colors=INK)
    left.set_ylabel("band", fontsize=8, color=INK)
    common.seconds(left, duration)
  name = os.path.basename(row["input"])
  left.set_title(common.plain(name, 60 if wide else 30), fontsize=9, color=INK)
  shares = next((value for value in row.values() if _are_shares(value)), {})
  words = [value if isinstance(value, str) else f"{name} {value:.4g}" for name, value in row.items()
           if name != "input" and value != "" and isinstance(value, (str, float))]
  if shares:
    names = list(shares)[:MOST_BARS]
    right.barh(range(len(names)), [shares[name] for name in names], color=COLORS["test"])
    right.set_yticks(range(len(names)), [common.plain(name, 18) for name in names], fontsize=9)
    right.set_xlim(0, 1)
    right.set_ylim(len(names) - 0.5, -0.5)
    right.xaxis.set_major_formatter(common.percent())
    right.tick_params(labelsize=9, colors=INK)
    right.spines[["top", "right"]].set_visible(False)
    right.set_title(common.plain(", ".join(words), 40), fontsize=9, color=INK)
  else:
    lines = textwrap.wrap(", ".join(words) or "nothing", 2 * _WIDTH if wide else _WIDTH)[:_LINES]
    right.text(0.02, 0.98, common.plain("\n".join(lines)), va="top", fontsize=10, color=INK,
               transform=right.transAxes)
    right.set_axis_off()
  return figure


def _are_shares(value: Any) -> bool:
  return isinstance(value, Mapping) and len(value) > 0 and all(
      isinstance(share, float) and 0 <= share <= 1 for share in value.values())
