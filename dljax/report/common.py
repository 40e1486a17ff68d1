"""What all pictures share: colours, empty figures and panels, and how a figure becomes a file."""

import os
import threading
from typing import Any

import numpy as np

DPI = 150
COLORS = {"train": "#6b7785", "validation": "#d1495b", "test": "#1f6f8b"}
MORE_COLORS = ("#edae49", "#66a182", "#8d6a9f")
INK = "#333333"


def picture(figure: Any) -> Any:
  """A figure as a `PIL.Image.Image`, of `DPI`."""
  from PIL import Image

  figure.set_dpi(DPI)
  figure.canvas.draw()
  return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def save(figure: Any, path: str | os.PathLike[str]) -> None:
  """Writes a figure as PNG at `DPI`; a reader of `path` sees the old file or the whole new one."""
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
  """An empty figure of so many inches, drawn by Agg without pyplot."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and seldom needed
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def panels(columns: int, rows: int, width: float, height: float) -> tuple[Any, list[Any]]:
  """A figure of rows x columns panels of so many inches each, and the panels in reading order."""
  figure = blank(max(columns * width, 4), rows * height + 0.4)  # a caption needs its room
  return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def stretch(image: np.ndarray) -> np.ndarray:
  """An image [H, W], [H, W, 1] or [H, W, 3] scaled to 0 to 1, as [H, W] or [H, W, 3]."""
  image = np.asarray(image, np.float32)
  low, high = image.min(), image.max()
  image = (image - low) / (high - low) if high > low else np.zeros_like(image)
  return image.squeeze(-1) if image.shape[2:] == (1,) else image


def shorten(name: str, limit: int = 16) -> str:
  return name if len(name) <= limit else name[:limit - 1] + "…"


def patch(color: str, label: str) -> Any:
  from matplotlib.patches import Patch

  return Patch(color=color, label=label)


def percent() -> Any:
  from matplotlib.ticker import PercentFormatter

  return PercentFormatter(xmax=1)
