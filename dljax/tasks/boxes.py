"""Boxes: anchors, overlap, the code of a box relative to an anchor, matching and non-maximum suppression.

A box is (x0, y0, x1, y1) in pixels, from the upper left corner of the image. Everything has static shapes, so that
it can be compiled: lists of boxes are padded.

Sources: Ren et al. 2015, "Faster R-CNN" (anchors, the code, matching; section 3.1); Lin et al. 2017, "Focal Loss for
Dense Object Detection" (section 4); the conventions where they leave a choice are torchvision's.

Dimensions: `A` anchors per cell, `N` anchors, `M` objects, `K` candidates, `D` detections.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dljax.tasks.base import Array

BACKGROUND, IGNORED = -1, -2  # what `match` gives beside the number of an object
LONGEST_STRETCH = math.log(1000 / 16)  # of the logarithm of a factor, or an exponential overflows


@dataclasses.dataclass(frozen=True)
class Anchors:
  """The boxes that a detector looks through.

  Attributes:
    sizes: of each level, the finest first: the sides of a square of an anchor's area, in pixels.
    ratios: height / width.
  """

  sizes: tuple[tuple[int, ...], ...]
  ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

  @classmethod
  def octaves(cls, smallest: Sequence[int], ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> "Anchors":
    """Three sizes for each level, its smallest times 2^0, 2^(1/3) and 2^(2/3), rounded down."""
    return cls(tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in smallest), tuple(ratios))

  @property
  def per_cell(self) -> int:
    """A."""
    return len(self.sizes[0]) * len(self.ratios)

  def boxes(self, grids: Sequence[tuple[int, int]], height: int, width: int) -> np.ndarray:
    """All anchors of an image.

    The first lies around the image's corner, the others a stride apart, which is the image's size by that of the
    grid, rounded down.

    Args:
      grids: (rows, columns) of each level.
      height, width: of the image.

    Returns:
      f32[N, 4], in the order level, row, column, ratio, size.
    """
    levels = []
    for sizes, (rows, columns) in zip(self.sizes, grids, strict=True):
      root = np.sqrt(np.array(self.ratios, np.float32))[:, None]
      side = np.array(sizes, np.float32)
      half = np.stack([(1 / root * side).ravel(), (root * side).ravel()], axis=-1) / 2  # [A, 2]: x, y
      cell = np.round(np.concatenate([-half, half], axis=-1))  # [A, 4], whole pixels
      y, x = np.meshgrid(np.arange(rows) * (height // rows), np.arange(columns) * (width // columns), indexing="ij")
      centre = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
      levels.append((centre + cell).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def area(boxes: Array) -> Array:
  """[..., 4] -> [...], in square pixels."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Array, b: Array) -> Array:
  """Intersection over union of each of `a` [..., 4] with each of `b` [..., 4], whose shapes are broadcast: [...].

  0 where both have no area.
  """
  low = jnp.maximum(a[..., :2], b[..., :2])
  high = jnp.minimum(a[..., 2:], b[..., 2:])
  side = jnp.maximum(high - low, 0)
  shared = side[..., 0] * side[..., 1]
  union = area(a) + area(b) - shared
  return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def encode(boxes: Array, anchors: Array) -> Array:
  """The code of boxes [..., 4] relative to anchors [..., 4]: shifts in sides, logarithms of factors; [..., 4]."""
  centre, side = _centre(boxes)
  anchor_centre, anchor_side = _centre(anchors)
  return jnp.concatenate([(centre - anchor_centre) / anchor_side, jnp.log(side / anchor_side)], axis=-1)


def decode(code: Array, anchors: Array) -> Array:
  """The inverse of `encode`; factors beyond `LONGEST_STRETCH` are cut."""
  anchor_centre, anchor_side = _centre(anchors)
  centre = anchor_centre + code[..., :2] * anchor_side
  half = jnp.exp(jnp.minimum(code[..., 2:], LONGEST_STRETCH)) * anchor_side / 2
  return jnp.concatenate([centre - half, centre + half], axis=-1)


def _centre(boxes: Array) -> tuple[Array, Array]:
  """[..., 4] -> centre and sides, each [..., 2]."""
  return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def clip(boxes: Array, height: int, width: int) -> Array:
  """What of boxes [..., 4] lies in the image."""
  limit = jnp.array([width, height, width, height], boxes.dtype)
  return jnp.clip(boxes, 0, limit)


def to_original_pixels(boxes: Array, place: Array, size: Array) -> Array:
  """Boxes in an image on which a picture was laid -> what of them lies in the picture, in its own pixels.

  Args:
    boxes: [..., 4].
    place: [4], the box of the image that the picture fills.
    size: [2], width and height of the picture.
  """
  scale = size / jnp.maximum(place[2:] - place[:2], 1)  # padding has no place
  boxes = (boxes - jnp.tile(place[:2], 2)) * jnp.tile(scale, 2)
  return jnp.clip(boxes, 0, jnp.tile(size, 2))


def match(
    anchors: Array, boxes: Array, box_mask: Array, *, foreground: float = 0.5, background: float = 0.4,
) -> Array:
  """Which object each anchor has to find.

  That of the largest IoU if this is at least `foreground`, none below `background`; between the two the anchor has
  nothing to learn. Beside that each object gets the anchors that it overlaps most, whatever the IoU (and each of
  these its own best object), as torchvision does it: or small objects would have none.

  Args:
    anchors: [N, 4].
    boxes: [M, 4].
    box_mask: [M], 0 where a row is padding.
    foreground: see above.
    background: see above.

  Returns:
    i32[N], the row of `boxes`, `BACKGROUND` or `IGNORED`.
  """
  overlap = jnp.where(box_mask[:, None] > 0, iou(boxes[:, None], anchors), -1)  # [M, N]
  best = jnp.argmax(overlap, axis=0)
  value = jnp.max(overlap, axis=0)
  found = jnp.where(value >= foreground, best, jnp.where(value < background, BACKGROUND, IGNORED))
  most = jnp.max(overlap, axis=1, keepdims=True)
  forced = jnp.any((overlap == most) & (box_mask[:, None] > 0) & (most > 0), axis=0)
  return jnp.where(forced, best, found).astype(jnp.int32)


def suppress(
    boxes: Array, scores: Array, labels: Array, *, count: int, threshold: float = 0.5,
) -> tuple[Array, Array]:
  """Greedy non-maximum suppression, each class for itself.

  Takes the best candidate, drops those of its class that overlap it by more than `threshold`, and so on.

  Args:
    boxes: [K, 4].
    scores: [K]; candidates of -inf are none.
    labels: i32[K].
    count: D, how many to keep at most.
    threshold: an IoU.

  Returns:
    i32[D], the rows that are kept, the best first, and bool[D], false where there were no more.
  """

  def keep_best(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
    best = jnp.argmax(left)
    there = left[best] > -jnp.inf
    near = (iou(boxes[best], boxes) > threshold) & (labels == labels[best])
    left = jnp.where(near, -jnp.inf, left).at[best].set(-jnp.inf)  # itself too, if it has no area
    return left, (best.astype(jnp.int32), there)

  _, kept = jax.lax.scan(keep_best, scores, None, length=count)
  return kept
