"""Scenes of scikit-learn's handwritten digits, with a box around each and a class for each pixel,
as a TFDS set.

3 to 8 digits, each 10 to 40 pixels high, lie on a canvas of 96x96 pixels. Two boxes overlap by an
intersection over union of at most 0.3. Every box is tight around the drawn pixels of its digit,
and stays tight if the pixels under other digits are left out. The ground is a texture whose grey
levels span a third of the way from its middle to the ink.

The digits come from `digits/stratified`, and the scenes of a split show only digits from the same
split there. Random numbers come from NumPy's legacy generator, whose stream never changes, and all
arithmetic rounds in the same way everywhere. The pixels are therefore the same on every machine;
the bytes of the PNG files depend on the zlib that compressed them.

Dimensions: H height, W width, C channels, N sprites in a scene.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from dljax.data.datasets.digits import split_indices

SCENES = {"train": 2000, "validation": 200, "test": 400}
SIZE = 96  # the canvas's side in pixels
COUNT = (3, 8)  # number of sprites in a scene
HEIGHT = (10, 40)  # a box's height in pixels
MAX_IOU = 0.3
CONTRAST = (90, 150)  # grey levels from the middle of the ground to the ink
GROUND = (40, 90)  # range of the ground's middle grey level
FAINT = 115  # pixels that cover the ground by less than this, of 255, are not drawn
# The greatest share of a sprite's pixels that may lie on other sprites, from which they cannot be
# distinguished if the ink is equal.
MAX_HIDING = 0.25
PLACES = 100  # the number of places tried for a sprite before the scene is started again
CELLS = (3, 6, 12, 24, 96)  # the number of cells along each side, for each octave of the texture


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture and what is in it.

  Attributes:
    image: uint8[H, W, C].
    segmentation: uint8[H, W], 0 for the ground, else 1 + the label of the uppermost sprite.
    boxes: i64[N, 4], (x0, y0, x1, y1) in pixels; x1 and y1 are the first pixels outside. Later
      sprites lie above earlier ones.
    labels: i64[N], the class of each.
    sources: i64[N], the number of each sprite in the list that it was drawn from.
  """

  image: np.ndarray
  segmentation: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  sources: np.ndarray


def scene(
    rng: np.random.RandomState, ground: np.ndarray, sprites: Sequence[np.ndarray],
    labels: Sequence[int], *, count: tuple[int, int] = COUNT, height: tuple[int, int] = HEIGHT,
    max_iou: float = MAX_IOU,
) -> Scene:
  """Draws sprites on a ground, large ones before small ones. A pure function of its arguments.

  Args:
    rng: the generator of all random numbers.
    ground: uint8[H, W, C], the ground's pixels.
    sprites: the sprites to choose from, each uint8[h, w, C + 1] of any size: colour, and how much
      of the ground is covered.
    labels: the class of each sprite.
    count: the least and the greatest number of sprites in the scene.
    height: the least and the greatest height of a box in pixels.
    max_iou: the greatest intersection over union of two boxes.
  """
  while True:
    sources = rng.randint(len(sprites), size=rng.randint(count[0], count[1] + 1))
    heights = np.sort(rng.randint(height[0], height[1] + 1, size=len(sources)))[::-1]
    placed = _place(rng, ground, [_resize(sprites[s], h) for s, h in zip(sources, heights)],
                    height, max_iou)
    if placed is not None:
      break
  image, owner, boxes = placed
  labels = np.asarray(labels)[sources]
  segmentation = np.concatenate([[0], labels + 1]).astype(np.uint8)[owner]
  return Scene(image, segmentation, boxes, labels, sources)


def _place(
    rng: np.random.RandomState, ground: np.ndarray, sprites: Sequence[np.ndarray],
    height: tuple[int, int], max_iou: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
  """The image, the sprite that owns each pixel (from 1; 0 for none), and the boxes.

  The result is None if a sprite finds no place.
  """
  image, owner = ground.copy(), np.zeros(ground.shape[:2], np.int64)
  boxes = np.zeros((0, 4), np.int64)
  for number, sprite in enumerate(sprites, 1):
    cover = np.where(sprite[..., -1] < FAINT, 0, sprite[..., -1])
    left, top, right, bottom = tight_box(cover > 0)
    sprite = sprite[top:bottom, left:right, :-1].astype(np.int64)
    cover = cover[top:bottom, left:right].astype(np.int64)
    h, w = cover.shape
    if not height[0] <= h <= height[1] or h > len(image) or w > image.shape[1]:
      return None
    for _ in range(PLACES):
      y, x = rng.randint(len(image) - h + 1), rng.randint(image.shape[1] - w + 1)
      box = np.array([x, y, x + w, y + h])
      there = owner[y:y + h, x:x + w]
      below = there[cover > 0]
      if len(boxes) and iou(boxes, box).max() > max_iou or np.mean(below > 0) > MAX_HIDING:
        continue
      trial = owner.copy()
      trial[y:y + h, x:x + w][cover > 0] = number
      if all(np.array_equal(tight_box(trial == other), boxes[other - 1])
             for other in set(below.tolist()) - {0}):
        break
    else:
      return None
    owner, boxes = trial, np.concatenate([boxes, box[None]])
    part, alpha = image[y:y + h, x:x + w], cover[..., None]
    part[...] = (part * (255 - alpha) + sprite * alpha + 127) // 255
  return image, owner, boxes


def _resize(sprite: np.ndarray, height: int) -> np.ndarray:
  """Resizes a sprite uint8[h, w, C + 1] bilinearly to a height, in its aspect ratio."""
  from PIL import Image

  h, w, _ = sprite.shape
  size = max(1, round(w * height / h)), height
  return np.asarray(Image.fromarray(sprite).resize(size, Image.Resampling.BILINEAR))


def tight_box(mask: np.ndarray) -> np.ndarray:
  """(x0, y0, x1, y1) around the pixels that are true in bool[H, W]; zeros if none is."""
  rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
  if not len(rows):
    return np.zeros(4, np.int64)
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
  """The intersection over union [N] of boxes [N, 4] with a box [4]."""
  low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
  both = np.prod(np.maximum(high - low, 0), axis=1)
  area = lambda b: np.prod(b[..., 2:] - b[..., :2], axis=-1)
  return both / (area(boxes) + area(box) - both)


def texture(rng: np.random.RandomState, size: int, low: int, high: int) -> np.ndarray:
  """A ground of smooth blots and grain, as octaves of value noise (Perlin 1985, "An Image
  Synthesizer").

  Args:
    rng: the generator of all random numbers.
    size: the number of pixels on each side.
    low: the least grey level, which occurs.
    high: the greatest grey level, which occurs too.

  Returns:
    uint8[size, size, 1].
  """
  total = np.zeros((size, size))
  for octave, cells in enumerate(CELLS):
    values = rng.random_sample((cells + 2, cells + 2))
    at = (np.arange(size) + 0.5) * cells / size
    whole = at.astype(np.int64)
    part = at - whole
    rows = values[whole] * (1 - part)[:, None] + values[whole + 1] * part[:, None]
    total += (rows[:, whole] * (1 - part) + rows[:, whole + 1] * part) / 2**octave
  share = (total - total.min()) / (total.max() - total.min())
  return np.floor(low + share * (high - low) + 0.5).astype(np.uint8)[..., None]


class Inked(Sequence):
  """Digits as sprites of one grey level.

  Args:
    covers: how much of the ground each digit covers, uint8[h, w]; see the function `covers`.
    ink: the grey level.
  """

  def __init__(self, covers: Sequence[np.ndarray], ink: int):
    self._covers, self._ink = covers, ink

  def __len__(self) -> int:
    return len(self._covers)

  def __getitem__(self, i: int) -> np.ndarray:
    cover = self._covers[i]
    return np.stack([np.full_like(cover, self._ink), cover], axis=-1)


def covers(digits: np.ndarray) -> list[np.ndarray]:
  """How much of the ground each digit covers, uint8[h, w], cropped to its ink.

  Args:
    digits: [n, 8, 8], from 0 to 16 as scikit-learn has them; values of 12 and more cover the
      ground completely.
  """
  found = []
  for digit in digits:
    cover = np.minimum(np.floor(digit * (255 / 12)), 255).astype(np.uint8)
    left, top, right, bottom = tight_box(cover >= FAINT)
    found.append(cover[top:bottom, left:right])
  return found


def digit_scene(
    rng: np.random.RandomState, covers: Sequence[np.ndarray], labels: Sequence[int],
) -> Scene:
  """Draws a scene of the set `digit_scenes`.

  Args:
    rng: the generator of all random numbers.
    covers: the digits to choose from; see the function `covers`.
    labels: the class of each digit.
  """
  middle, contrast = rng.randint(*GROUND), rng.randint(CONTRAST[0] // 6, CONTRAST[1] // 6 + 1) * 6
  ground = texture(rng, SIZE, middle - contrast // 6, middle + contrast // 6)
  return scene(rng, ground, Inked(covers, middle + contrast), labels)


class DigitScenes(tfds.core.GeneratorBasedBuilder):
  """2000 scenes of handwritten digits for training, 200 for validation and 400 for the test."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=__doc__,
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
            # 0 is the ground, 1 + digit an object.
            "segmentation": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
            "objects": tfds.features.Sequence({
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                "id": np.int64,  # position in scikit-learn's file
            }),
        }),
        homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
    )

  def _split_generators(self, dl_manager):
    from sklearn.datasets import load_digits

    data = load_digits()
    parts = split_indices(data.target, "stratified")
    return {name: self._generate_examples(number, SCENES[name], data.images[indices],
                                          data.target[indices], indices)
            for number, (name, indices) in enumerate(parts.items())}

  def _generate_examples(
      self, split: int, count: int, digits: np.ndarray, labels: np.ndarray, ids: np.ndarray,
  ) -> Iterator[tuple[int, dict]]:
    from PIL import Image

    shapes = covers(digits)
    for index in range(count):
      drawn = digit_scene(np.random.RandomState([split, index]), shapes, labels)
      objects = []
      for box, label, source in zip(drawn.boxes / SIZE, drawn.labels, drawn.sources):
        x0, y0, x1, y1 = box
        objects.append({
            "bbox": tfds.features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1),
            "label": int(label), "id": int(ids[source])})
      yield index, {"image": Image.fromarray(drawn.image[..., 0]),
                    "segmentation": Image.fromarray(drawn.segmentation), "objects": objects}
