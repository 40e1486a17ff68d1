"""Moves an image, its boxes and its masks: onto the model's canvas, and into a random window."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dljax.errors import UserError

VOID_BYTE = 255  # the class of a pixel that has none, while it is stored
LEAST_SEEN = 0.3  # the share of a box's area that a window must show; below, the object is dropped


SLACK = 1e-3  # pixels by which rounding may put a box outside of its image


def faults(boxes: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """What is wrong with boxes f64[N, 4] (x0, y0, x1, y1), in pixels of an image of size (h, w).

  Returns:
    bool[N], whether a box has no area or no place, and bool[N], whether it reaches out of the
    image.
  """
  flat = ~np.all(boxes[:, 2:] > boxes[:, :2], axis=1)  # also for a box with NaN
  limit = np.array([size[1], size[0]] * 2)
  return flat, np.any((boxes < -SLACK) | (boxes > limit + SLACK), axis=1)


def good(boxes: np.ndarray, size: Sequence[int], cut: bool) -> np.ndarray:
  """Which boxes can be used: bool[N], see `faults`.

  Args:
    boxes: f64[N, 4].
    size: the image's height and width.
    cut: whether a box that reaches out of the image will be cut at its border.
  """
  if cut:
    boxes = np.clip(boxes, 0, [size[1], size[0]] * 2)
  flat, outside = faults(boxes, size)
  return ~(flat | outside)


def refuse_box(where: str, name: str, box: np.ndarray, size: Sequence[int]) -> UserError:
  """The error for a box that has a fault.

  Args:
    where: the flag and the image, for the message.
    name: the box's name there, such as "box 3".
    box: f64[4].
    size: the image's height and width.
  """
  flat, _ = faults(box[None], size)
  fault = "has no area" if flat[0] else "lies outside of the image"
  return UserError(f"{where}: {name} {fault} ({', '.join(f'{v:.4g}' for v in box)} of "
                   f"{size[1]}x{size[0]} pixels); mend the set, or --config.data.bad_boxes=drop "
                   "(or cut, at the image's border)")


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where an image lies on the model's canvas.

  Its pixel (x, y) lies at (left + x * across, top + y * down).
  """

  down: float
  across: float
  top: int
  left: int
  height: int
  width: int

  @classmethod
  def of(cls, size: Sequence[int], canvas: Sequence[int], resize: str) -> "Placement":
    """Where `augment.letterbox` or `resize` places an image of size (h, w) on a canvas (H, W)."""
    (h, w), (height, width) = size, canvas
    if resize == "bilinear":
      return cls(height / h, width / w, 0, 0, height, width)
    scale = min(1, height / h, width / w)
    high, wide = (max(round(scale * h), 1), max(round(scale * w), 1)) if scale < 1 else (h, w)
    return cls(high / h, wide / w, (height - high) // 2, (width - wide) // 2, high, wide)

  def back(self, classes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Classes on the canvas, u8[H, W] -> those of the image's pixels, u8[h, w], by the nearest."""
    from PIL import Image

    part = classes[self.top:self.top + self.height, self.left:self.left + self.width]
    width_and_height = int(size[1]), int(size[0])
    return np.asarray(Image.fromarray(part).resize(width_and_height, Image.Resampling.NEAREST))


@dataclasses.dataclass(frozen=True)
class Window:
  """A window on an image: as large as the image, magnified and moved, possibly beyond the border.

  Attributes:
    scale: the magnification about the middle.
    right, down: how far the window then moves, in pixels of the original.
    flip: whether the result is mirrored.
  """

  scale: float
  right: int
  down: int
  flip: bool

  def _line(self, size: int, shift: int) -> tuple[float, float]:
    """(a, b): coordinate X of the window shows coordinate a X + b of the original."""
    a = 1 / self.scale
    return a, size / 2 * (1 - a) + shift

  def of_image(self, pixels: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """uint8[H, W, C] -> uint8[H, W, C], bilinear; outside of the image there is `fill`, [C]."""
    from PIL import Image

    return self._transform(pixels, Image.Resampling.BILINEAR, tuple(map(int, fill)))

  def of_mask(self, classes: np.ndarray) -> np.ndarray:
    """uint8[H, W] -> uint8[H, W], each the class of the nearest pixel."""
    from PIL import Image

    return self._transform(classes[..., None], Image.Resampling.NEAREST, (VOID_BYTE,))[..., 0]

  def _transform(self, pixels: np.ndarray, resample: int, fill: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    height, width, channels = pixels.shape
    (a, b), (c, d) = self._line(width, self.right), self._line(height, self.down)
    pil = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    out = pil.transform((width, height), Image.Transform.AFFINE, (a, 0, b, 0, c, d), resample,
                        fillcolor=fill[0] if channels == 1 else fill)
    out = np.asarray(out).reshape(pixels.shape)
    return out[:, ::-1] if self.flip else out

  def of_boxes(self, boxes: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes f32[N, 4] of an image of size (H, W), cut at the border; and f32[N], 1 if seen."""
    height, width = size
    (a, b), (c, d) = self._line(width, self.right), self._line(height, self.down)
    whole = (boxes - [b, d, b, d]) / [a, c, a, c]
    if self.flip:
      x0, y0, x1, y1 = whole.T
      whole = np.stack([width - x1, y0, width - x0, y1], axis=1)
    cut = np.clip(whole, 0, [width, height] * 2)
    area = lambda x: np.prod(x[:, 2:] - x[:, :2], axis=1)
    seen = area(cut) > LEAST_SEEN * np.maximum(area(whole), 1e-12)
    return cut.astype(np.float32), seen.astype(np.float32)
