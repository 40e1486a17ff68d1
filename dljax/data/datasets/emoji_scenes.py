"""Scenes of emoji, with a box around each and a class for each pixel, as a TFDS set.

They are like `digit_scenes`, but in colour: 2 to 6 emoji from the set `emoji`, each 16 to 44
pixels high, lie on a canvas of 96x96 pixels, on a ground of two colours in blots and grain. The
classes are the emoji's groups. For each emoji of a scene a group is drawn first, and then an emoji
from it; otherwise most would be people, the largest group.

The scenes of a split show only emoji from the same split of `emoji`, so emoji that look alike are
in one split.
"""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dljax.data.datasets import digit_scenes, emoji

SCENES = {"train": 2000, "validation": 200, "test": 400}
SIZE = 96  # the canvas's side in pixels
COUNT = (2, 6)  # number of emoji in a scene
HEIGHT = (16, 44)  # an emoji's height in pixels
GROUND = (50, 206)  # range of the ground's middle, in each channel
SPREAD = 40  # the most that the ground is brighter or darker than its middle, in each channel


class Sprites(Sequence):
  """Pictures as sprites, cropped to their visible part and decoded when they are used.

  Args:
    files: the bytes of PNG files with transparency.
  """

  def __init__(self, files: Sequence[bytes]):
    self._files = files
    self._decode = functools.lru_cache(maxsize=None)(self._decode_one)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, i: int) -> np.ndarray:
    """uint8[h, w, 4]: colour, and how much of the ground is covered."""
    return self._decode(int(i))

  def _decode_one(self, i: int) -> np.ndarray:
    from PIL import Image

    sprite = np.asarray(Image.open(io.BytesIO(self._files[i])).convert("RGBA"))
    left, top, right, bottom = digit_scenes.tight_box(sprite[..., 3] >= digit_scenes.FAINT)
    return sprite[top:bottom, left:right]


def ground(rng: np.random.RandomState) -> np.ndarray:
  """uint8[SIZE, SIZE, 3]: a texture whose brightest and darkest places differ in colour."""
  middle = rng.randint(*GROUND, size=3)
  spread = rng.randint(-SPREAD, SPREAD + 1, size=3)
  grey = digit_scenes.texture(rng, SIZE, 0, 255).astype(np.int64)
  return (middle + (2 * grey - 255) * spread // 255).astype(np.uint8)


def emoji_scene(
    rng: np.random.RandomState, sprites: Sequence[np.ndarray], labels: np.ndarray,
) -> digit_scenes.Scene:
  """Draws a scene of the set `emoji_scenes`.

  Args:
    rng: the generator of all random numbers.
    sprites: the sprites to choose from, each uint8[h, w, 4].
    labels: i64[n], the class of each sprite.
  """
  groups = np.unique(labels)
  pool = [rng.choice(np.flatnonzero(labels == groups[rng.randint(len(groups))]))
          for _ in range(2 * COUNT[1])]
  drawn = digit_scenes.scene(
      rng, ground(rng), [sprites[i] for i in pool], labels[pool], count=COUNT, height=HEIGHT)
  return digit_scenes.Scene(drawn.image, drawn.segmentation, drawn.boxes, drawn.labels,
                            np.array(pool)[drawn.sources])


with tfds.core.registered.skip_registration():

  class EmojiScenes(emoji.Emojis):
    """2000 scenes of emoji for training, 200 for validation and 400 for the test."""

    name = "emoji_scenes"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self,
          description=__doc__,
          features=tfds.features.FeaturesDict({
              "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
              # 0 is the ground, 1 + label an object.
              "segmentation": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
              "objects": tfds.features.Sequence({
                  "bbox": tfds.features.BBoxFeature(),
                  "label": tfds.features.ClassLabel(names=emoji.GROUPS),
                  "codepoints": tfds.features.Text(),
              }),
          }),
          homepage="https://github.com/googlefonts/noto-emoji",
      )

    def _generate_examples(
        self, split: str, examples: Sequence[tuple[emoji.Emoji, bytes]],
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
      from PIL import Image

      sprites = Sprites([picture for _, picture in examples])
      labels = np.array([emoji.GROUPS.index(one.group) for one, _ in examples])
      for index in range(SCENES[split]):
        drawn = emoji_scene(np.random.RandomState([list(SCENES).index(split), index]), sprites,
                            labels)
        objects = []
        for box, label, source in zip(drawn.boxes / SIZE, drawn.labels, drawn.sources):
          x0, y0, x1, y1 = box
          objects.append({
              "bbox": tfds.features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1),
              "label": int(label), "codepoints": emoji.spell(examples[source][0].codepoints)})
        yield index, {"image": Image.fromarray(drawn.image),
                      "segmentation": Image.fromarray(drawn.segmentation), "objects": objects}
