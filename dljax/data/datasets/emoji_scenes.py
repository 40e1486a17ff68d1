"""Scenes of emoji, with a box around each and a class for each pixel, as a TFDS set.

As `digit_scenes`, but in colour: 2 to 6 emoji of the set `emoji` lie on a canvas of 96x96 pixels, each 16 to 44 pixels
high, on a ground of two colours in blots and grain. The classes are the emoji's groups; of each scene's emoji first the
group is drawn and then one of that group, or people, of whom there are most, would fill them.

A split's scenes show none but the emoji of that split of `emoji`, so that what looks alike is in one split.
"""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dljax.data.datasets import digit_scenes, emoji

SCENES = {"train": 2000, "validation": 200, "test": 400}
SIZE = 96  # pixels, of the canvas
COUNT = (2, 6)  # emoji in a scene
HEIGHT = (16, 44)  # pixels
GROUND = (50, 206)  # of each channel, the middle of the ground
SPREAD = 40  # of each channel, the most that the ground is brighter or darker


class Sprites(Sequence):
  """Pictures as sprites, cut to what can be seen of them; decoded when they are asked for.

  Args:
    files: PNG files with transparency.
  """

  def __init__(self, files: Sequence[bytes]):
    self._files = files
    self._decode = functools.lru_cache(maxsize=None)(self._decode_one)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, i: int) -> np.ndarray:
    """uint8[h, w, 4], the last how much of the ground it covers."""
    return self._decode(int(i))

  def _decode_one(self, i: int) -> np.ndarray:
    from PIL import Image

    sprite = np.asarray(Image.open(io.BytesIO(self._files[i])).convert("RGBA"))
    left, top, right, bottom = digit_scenes.tight_box(sprite[..., 3] >= digit_scenes.FAINT)
    return sprite[top:bottom, left:right]


def ground(rng: np.random.RandomState) -> np.ndarray:
  """uint8[SIZE, SIZE, 3]: a texture, whose brightest and darkest places differ in colour."""
  middle = rng.randint(*GROUND, size=3)
  spread = rng.randint(-SPREAD, SPREAD + 1, size=3)
  grey = digit_scenes.texture(rng, SIZE, 0, 255).astype(np.int64)
  return (middle + (2 * grey - 255) * spread // 255).astype(np.uint8)


def emoji_scene(rng: np.random.RandomState, sprites: Sequence[np.ndarray], labels: np.ndarray) -> digit_scenes.Scene:
  """A scene of emoji; what `emoji_scenes` holds.

  Args:
    rng: drawn from.
    sprites: to choose from, each uint8[h, w, 4].
    labels: i64[n], the class of each.
  """
  groups = np.unique(labels)
  pool = [rng.choice(np.flatnonzero(labels == groups[rng.randint(len(groups))])) for _ in range(2 * COUNT[1])]
  drawn = digit_scenes.scene(
      rng, ground(rng), [sprites[i] for i in pool], labels[pool], count=COUNT, height=HEIGHT)
  return digit_scenes.Scene(drawn.image, drawn.segmentation, drawn.boxes, drawn.labels, np.array(pool)[drawn.sources])


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
              "segmentation": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),  # 0 ground, 1 + label
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
        drawn = emoji_scene(np.random.RandomState([list(SCENES).index(split), index]), sprites, labels)
        objects = [
            {"bbox": tfds.features.BBox(ymin=y0 / SIZE, xmin=x0 / SIZE, ymax=y1 / SIZE, xmax=x1 / SIZE),
             "label": int(label), "codepoints": emoji.spell(examples[source][0].codepoints)}
            for (x0, y0, x1, y1), label, source in zip(drawn.boxes, drawn.labels, drawn.sources)]
        yield index, {"image": Image.fromarray(drawn.image), "segmentation": Image.fromarray(drawn.segmentation),
                      "objects": objects}
