"""Colours, empty figures and panels for all pictures, and figures and pictures as files."""

import io
import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

DPI = 150  # pixels an inch, in a file
SHOWN_DPI = 100  # and in a notebook
COLORS = {"train": "#6b7785", "validation": "#d1495b", "test": "#1f6f8b"}
MORE_COLORS = ("#edae49", "#66a182", "#8d6a9f")
INK = "#333333"
MARGIN = 8  # pixels of white around a text, and between pictures side by side


def picture(figure: Any) -> Any:
  """Draws a figure at `DPI` as a `PIL.Image.Image`."""
  from PIL import Image

  figure.set_dpi(DPI)
  figure.canvas.draw()
  return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def side_by_side(pictures: Sequence[bytes]) -> bytes:
  """Puts pictures into one, in rows and columns on white.

  The grid is about as wide as it is high. Its cells are as large as the largest picture, and each
  picture lies in the upper left corner of its cell.

  Args:
    pictures: one or more PNG files of any sizes, in reading order.

  Returns:
    A PNG file.
  """
  from PIL import Image

  images = [Image.open(io.BytesIO(content)).convert("RGBA") for content in pictures]
  width, height = (max(sides) + MARGIN for sides in zip(*(image.size for image in images)))

  def unevenness(columns: int) -> float:
    sides = columns * width, math.ceil(len(images) / columns) * height
    return max(sides) / min(sides)

  columns = min(range(len(images), 0, -1), key=unevenness)
  rows = math.ceil(len(images) / columns)
  grid = Image.new("RGB", (columns * width - MARGIN, rows * height - MARGIN), "white")
  for i, image in enumerate(images):
    row, column = divmod(i, columns)
    grid.paste(image, (column * width, row * height), image)  # what is transparent stays white
  content = io.BytesIO()
  grid.save(content, "PNG")
  return content.getvalue()


def save(figure: Any, path: str | os.PathLike[str], title: str = "") -> None:
  """Writes a figure as PNG at `DPI`; a reader of `path` sees the old file or the whole new one.

  Args:
    figure: the figure.
    path: the file to write.
    title: what stands above the figure, before its own caption if it has one.
  """
  if title:
    caption = figure.get_suptitle()
    figure.suptitle(plain(title) + (f": {caption}" if caption else ""), fontsize=12, color=INK)
  directory = os.path.dirname(os.path.abspath(path))
  os.makedirs(directory, exist_ok=True)
  temporary = os.path.join(directory,
                           f".{os.path.basename(path)}.{os.getpid()}-{threading.get_ident()}")
  try:
    figure.savefig(temporary, format="png", dpi=DPI, facecolor="white")
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.unlink(temporary)


def blank(width: float, height: float) -> Any:
  """An empty figure, with its size in inches, that Agg draws without pyplot.

  A notebook shows it at 100 pixels an inch, whatever its own settings.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and rarely needed
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=SHOWN_DPI, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def panels(columns: int, rows: int, width: float, height: float) -> tuple[Any, list[Any]]:
  """A figure of rows x columns panels, and the panels in reading order.

  Args:
    columns, rows: the numbers of columns and rows.
    width, height: a panel's size in inches.
  """
  figure = blank(max(columns * width, 4), rows * height + 0.4)  # room for a caption
  return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def stretch(image: np.ndarray) -> np.ndarray:
  """Scales an image [H, W], [H, W, 1] or [H, W, 3] to the range 0 to 1, [H, W] or [H, W, 3]."""
  image = np.asarray(image, np.float32)
  low, high = image.min(), image.max()
  image = (image - low) / (high - low) if high > low else np.zeros_like(image)
  return image.squeeze(-1) if image.shape[2:] == (1,) else image


def plain(text: Any, limit: int | None = None) -> str:
  """A text from the user (a class, a file, a transcript) as Matplotlib draws it unchanged.

  Matplotlib would take what stands between two "$" for a formula. Characters that cannot be
  printed become the replacement character.

  Args:
    text: any text, possibly of several lines.
    limit: the number of characters to shorten each line to.
  """
  lines = []
  for line in str(text).split("\n"):
    if limit is not None and len(line) > limit:
      line = line[:limit - 1] + "…"
    lines.append("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))
  return "\n".join(lines).replace("$", r"\$")


def legend(owner: Any, handles: Sequence[Any], names: Sequence[Any], **options: Any) -> None:
  """Draws a legend with names from the user.

  Matplotlib itself leaves out every name that begins with "_".

  Args:
    owner: the figure or the axes that the legend is for.
    handles: what to draw beside each name.
    names: the names, as `plain` gives them.
    **options: see Matplotlib.
  """
  drawn = owner.legend(handles=list(handles), labels=["name"] * len(names), **options)
  for text, name in zip(drawn.get_texts(), names):
    text.set_text(name)


def patch(color: str, label: str = "") -> Any:
  from matplotlib.patches import Patch

  return Patch(color=color, label=label)


def dot(color: str) -> Any:
  """A dot for a legend."""
  from matplotlib.lines import Line2D

  return Line2D([], [], color=color, marker="o", markersize=5, linewidth=0)


def seconds(axes: Any, duration: float) -> None:
  """Numbers the horizontal axis, whose limits lie at the two ends of a recording, in seconds.

  Args:
    axes: the panel; its limits are set already.
    duration: the recording's length in seconds; with 0 there are no numbers.
  """
  from matplotlib.ticker import MaxNLocator

  if duration <= 0:
    axes.set_xticks([])
    return
  left, right = axes.get_xlim()
  ticks = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(0, duration)
  times = [time for time in ticks if 0 <= time <= duration + 1e-9]
  axes.set_xticks([left + (right - left) * time / duration for time in times],
                  [f"{time:g}" for time in times])
  axes.set_xlabel("seconds", fontsize=8, color=INK)


def percent() -> Any:
  from matplotlib.ticker import PercentFormatter

  return PercentFormatter(xmax=1)
