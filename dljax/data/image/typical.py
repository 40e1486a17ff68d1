"""How bright the training images are, and which images are unlike them.

A network that has learnt white ink on black paper is sure of any digit on white paper, and wrong.
Two numbers of an image tell: the mean brightness of all its pixels, and that of the pixels at its
border. An image is unlike the training images if one of them is more than `LIMIT` standard
deviations from their mean. With that limit no image in the test sets of digits (360) and mnist
(10,000) is unlike, and two of the 10,000 of fashion_mnist; all are once they are inverted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dljax.data import sources
from dljax.data.image import decode
from dljax.data.pipeline import rng

ASSET = "brightness"  # the stem of the file that holds them
EXAMPLES = 256  # the number of training images that are measured
LIMIT = 5.0
LEAST = np.array([[0.02], [0.05]])  # standard deviations; those of one font on white paper are 0


def measure(records: sources.Records, config: Any) -> dict[str, Any]:
  """The brightness of training images as the network sees them, to be saved with a run.

  Args:
    records: the records of the training split; a few, drawn at random, are read.
    config: `config.data`.

  Returns:
    "mean" and "std" [2, C] over the images: of all pixels, and of those at the border, from 0 to 1.
  """
  order = np.sort(rng(0, 0, "brightness").permutation(len(records))[:EXAMPLES])
  found = []
  for record in records[order]:
    try:
      image = decode.decode_image(
          record["image"][0], config.image_shape[-1], config.get("background", 0))
    except Exception:  # a damaged example is reported, or skipped, where it is trained on
      continue
    found.append(_numbers(decode.fit(image, config) / 255.0))
  if not found:
    return {}
  return {"mean": np.round(np.mean(found, 0), 6).tolist(),
          "std": np.round(np.std(found, 0), 6).tolist()}


def warnings(
    images: np.ndarray, names: Sequence[str], config: Any, assets: Mapping[str, Any],
) -> list[str]:
  """A line for images that are unlike the training images, or none.

  Args:
    images: f32[B, H, W, C], normalised.
    names: the images' names.
    config: `config.data`.
    assets: the run's assets; without what `measure` gives nothing is said.
  """
  if not (known := assets.get(ASSET)) or not len(names):
    return []
  mean, std = (np.reshape(known[name], (2, -1)) for name in ("mean", "std"))
  std = np.maximum(std, LEAST)
  seen = pixels(images, config)
  unlike = lambda values: np.array(
      [np.max(np.abs(_numbers(image) - mean) / std) > LIMIT for image in values])
  wrong = np.flatnonzero(unlike(seen))
  if not len(wrong):
    return []
  first = ", ".join(names[i] for i in wrong[:3]) + ", ..." * (len(wrong) > 3)
  if len(names) == 1:
    they_are, they, their = f"{first} is", "it", "its prediction"
  else:
    they_are = f"{len(wrong)} of {len(names)} images ({first}) are"
    they, their = "they", "their predictions"
  line = (f"{they_are} much darker or brighter than the images of the training, as a whole or at "
          f"the border, so that {their} may be wrong")
  swapped = (~unlike(1 - seen[wrong])).mean()
  if swapped > 0.5:
    other = str(not config.invert).lower()
    line += (f"; with black and white swapped {they} would be like those: try "
             f"--config.data.invert={other}")
  return [line]


def pixels(images: np.ndarray, config: Any) -> np.ndarray:
  """Normalised images [B, H, W, C] as they were before, from 0 to 1."""
  return np.clip(images * np.float32(config.std) + np.float32(config.mean), 0, 1)


def _numbers(image: np.ndarray) -> np.ndarray:
  """The means [2, C] of an image [H, W, C]: of all pixels, and of those at the border."""
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
  return np.stack([image.mean((0, 1)), border.mean(0)])
