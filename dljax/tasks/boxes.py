"""Boxes: anchors, overlap, the code of a box relative to an anchor, matching, suppression.

A box is (x0, y0, x1, y1) in pixels, from the upper left corner of the image. Lists of boxes are
padded, so that all shapes are static and everything can be compiled.

Sources: Ren et al. 2015, "Faster R-CNN" (anchors, the code, matching; section 3.1); Lin et al.
2017, "Focal Loss for Dense Object Detection" (section 4). Where they leave a choice, the
conventions are torchvision's.

Dimensions: `A` anchors per cell, `N` anchors, `M` objects, `K` candidates, `D` detections.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dljax.tasks.base import Array

BACKGROUND, IGNORED = -1, -2  # the results of `match` for anchors without an object
LONGEST_STRETCH = math.log(1000 / 16)  # a greater logarithm of a factor could overflow in exp


@dataclasses.dataclass(frozen=True)
class Anchors:
  """The boxes that a detector judges.

  Attributes:
    sizes: for each level, the finest first, the sizes of its anchors: the side, in pixels, of a
      square with an anchor's area.
    ratios: the anchors' shapes, height / width.
  """

  sizes: tuple[tuple[int, ...], ...]
  ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

  @classmethod
  def octaves(
      cls, smallest: Sequence[int], ratios: Sequence[float] = (0.5, 1.0, 2.0),
  ) -> "Anchors":
    """Anchors of three sizes a level: its smallest times 2^0, 2^(1/3), 2^(2/3), rounded down."""
    return cls(tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in smallest),
               tuple(ratios))

  @property
  def per_cell(self) -> int:
    """The number of anchors in a cell, A."""
    return len(self.sizes[0]) * len(self.ratios)

  def boxes(self, grids: Sequence[tuple[int, int]], height: int, width: int) -> np.ndarray:
    """All anchors of an image.

    The first is centred on the image's upper left corner, and the others follow a stride apart.
    The stride is the image's size divided by the grid's, rounded down.

    Args:
      grids: the (rows, columns) of each level.
      height, width: the image's size in pixels.

    Returns:
      f32[N, 4], in the order level, row, column, ratio, size.
    """
    levels = []
    for sizes, (rows, columns) in zip(self.sizes, grids, strict=True):
      root = np.sqrt(np.array(self.ratios, np.float32))[:, None]
      side = np.array(sizes, np.float32)
      half = np.stack([(1 / root * side).ravel(), (root * side).ravel()], axis=-1) / 2
      cell = np.round(np.concatenate([-half, half], axis=-1))  # [A, 4], whole pixels
      y, x = np.meshgrid(np.arange(rows) * (height // rows),
                         np.arange(columns) * (width // columns), indexing="ij")
      centre = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
      levels.append((centre + cell).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def area(boxes: Array) -> Array:
  """The areas of boxes, [..., 4] -> [...], in square pixels."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Array, b: Array) -> Array:
  """Intersection over union of boxes `a` and `b`, [..., 4] each -> [...]; their shapes broadcast.

  It is 0 where neither box has an area.
  """
  low = jnp.maximum(a[..., :2], b[..., :2])
  high = jnp.minimum(a[..., 2:], b[..., 2:])
  side = jnp.maximum(high - low, 0)
  shared = side[..., 0] * side[..., 1]
  union = area(a) + area(b) - shared
  return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def encode(boxes: Array, anchors: Array) -> Array:
  """The code [..., 4] of boxes relative to anchors, both [..., 4].

  It is the shift of the centre in units of the anchor's sides, and the logarithm of box side /
  anchor side.
  """
  centre, side = _centre(boxes)
  anchor_centre, anchor_side = _centre(anchors)
  return jnp.concatenate([(centre - anchor_centre) / anchor_side, jnp.log(side / anchor_side)],
                         axis=-1)


def decode(code: Array, anchors: Array) -> Array:
  """The inverse of `encode`; logarithms above `LONGEST_STRETCH` are cut to it."""
  anchor_centre, anchor_side = _centre(anchors)
  centre = anchor_centre + code[..., :2] * anchor_side
  half = jnp.exp(jnp.minimum(code[..., 2:], LONGEST_STRETCH)) * anchor_side / 2
  return jnp.concatenate([centre - half, centre + half], axis=-1)


def _centre(boxes: Array) -> tuple[Array, Array]:
  """[..., 4] -> centre and sides, each [..., 2]."""
  return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def clip(boxes: Array, height: int, width: int) -> Array:
  """The parts of boxes [..., 4] that lie in the image."""
  limit = jnp.array([width, height, width, height], boxes.dtype)
  return jnp.clip(boxes, 0, limit)


def to_original_pixels(boxes: Array, place: Array, size: Array) -> Array:
  """Converts boxes in an image that shows a picture into the picture's own pixels, and clips them.

  Args:
    boxes: [..., 4], in the image.
    place: [4], the box of the image that the picture fills.
    size: [2], the picture's own width and height.
  """
  scale = size / jnp.maximum(place[2:] - place[:2], 1)  # padding has no place
  boxes = (boxes - jnp.tile(place[:2], 2)) * jnp.tile(scale, 2)
  return jnp.clip(boxes, 0, jnp.tile(size, 2))


def match(
    anchors: Array, boxes: Array, box_mask: Array, *, foreground: float = 0.5,
    background: float = 0.4,
) -> Array:
  """Chooses the object that each anchor has to find.

  An anchor finds the object with which its IoU is largest, if that IoU is at least `foreground`.
  It is background below `background`, and ignored by the loss between the two. As in torchvision,
  the anchors that overlap an object most also find their own best object, whatever the IoU;
  otherwise small objects would have no anchor.

  Args:
    anchors: [N, 4].
    boxes: [M, 4], the objects.
    box_mask: [M], 0 where a row is padding.
    foreground: the least IoU of an anchor with its object.
    background: the IoU below which an anchor is background.

  Returns:
    i32[N]: a row of `boxes`, `BACKGROUND` or `IGNORED`.
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
  """Greedy non-maximum suppression within each class.

  It keeps the best candidate, drops those of its class that overlap it by more than `threshold`,
  and repeats this with the candidates that are left.

  Args:
    boxes: [K, 4].
    scores: [K]; a row with -inf is no candidate.
    labels: i32[K].
    count: D, the largest number of boxes to keep.
    threshold: an IoU.

  Returns:
    i32[D], the rows that are kept, the best first; and bool[D], false where no candidate was left.
  """

  def keep_best(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
    best = jnp.argmax(left)
    there = left[best] > -jnp.inf
    near = (iou(boxes[best], boxes) > threshold) & (labels == labels[best])
    left = jnp.where(near, -jnp.inf, left).at[best].set(-jnp.inf)  # itself too, if it has no area
    return left, (best.astype(jnp.int32), there)

  _, kept = jax.lax.scan(keep_best, scores, None, length=count)
  return kept
