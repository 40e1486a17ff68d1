"""Disturbed images, to measure how a classifier's accuracy falls: five kinds, in five strengths
each.

After Dan Hendrycks, Thomas Dietterich. "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", 2019. https://arxiv.org/abs/1903.12261. Their corruptions are fixed
for images of 224 pixels. Here blur and occlusion depend on the size of the image, so images of 8
pixels can be disturbed as well.

What is random in an example depends only on the seed, the example's number and the kind. It does
not depend on the strength: the same noise grows stronger.

Dimension letters: B images, H height, W width, C channels.
"""

from collections.abc import Callable, Mapping

import numpy as np

from dljax.data.pipeline import rng
from dljax.errors import UserError, unknown

STRENGTHS = (1, 2, 3, 4, 5)
NOISE = (0.05, 0.1, 0.17, 0.25, 0.35)  # standard deviation; the range from black to white is 1
# Standard deviation in pixels, over the root of the shorter side.
BLUR = (0.15, 0.2, 0.27, 0.34, 0.42)
# The share left of a pixel's difference from the image's mean.
CONTRAST = (0.75, 0.6, 0.45, 0.3, 0.15)
OCCLUSION = (0.2, 0.32, 0.44, 0.56, 0.7)  # the grey square's side, as a share of the shorter side
ROTATION = (6, 12, 20, 30, 45)  # degrees, in either direction
GREY = 127


def noise(images: np.ndarray, draws: list[np.random.Generator], strength: int) -> np.ndarray:
  """Adds Gaussian noise to each pixel and channel."""
  added = np.stack([draw.standard_normal(images.shape[1:], np.float32) for draw in draws])
  return _to_uint8(images + 255 * NOISE[strength - 1] * added)


def blur(images: np.ndarray, draws: list[np.random.Generator], strength: int) -> np.ndarray:
  """Blurs by a Gaussian; the border's pixels are repeated beyond the border."""
  del draws
  height, width = images.shape[1:3]
  sigma = BLUR[strength - 1] * np.sqrt(min(height, width))
  rows, columns = _gaussian(height, sigma), _gaussian(width, sigma)
  x = np.moveaxis(images.astype(np.float32), -1, 1)  # [B, C, H, W]
  return _to_uint8(np.moveaxis(rows @ x @ columns.T, 1, -1))


def contrast(images: np.ndarray, draws: list[np.random.Generator], strength: int) -> np.ndarray:
  """Reduces the contrast about the image's mean."""
  del draws
  mean = images.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float32)
  return _to_uint8(mean + CONTRAST[strength - 1] * (images - mean))


def occlusion(images: np.ndarray, draws: list[np.random.Generator], strength: int) -> np.ndarray:
  """Hides a part behind a grey square."""
  height, width = images.shape[1:3]
  side = int(np.ceil(OCCLUSION[strength - 1] * min(height, width)))
  out = images.copy()
  for image, draw in zip(out, draws):
    y, x = draw.random(2)
    top, left = int(y * (height - side + 1)), int(x * (width - side + 1))
    image[top:top + side, left:left + side] = GREY
  return out


def rotation(images: np.ndarray, draws: list[np.random.Generator], strength: int) -> np.ndarray:
  """Rotates about the centre; the corners become black."""
  from PIL import Image

  angles = [ROTATION[strength - 1] * draw.choice([-1, 1]) for draw in draws]
  turned = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).rotate(
      float(angle), Image.Resampling.BILINEAR) for image, angle in zip(images, angles)]
  return np.stack([np.asarray(image) for image in turned]).reshape(images.shape)


Corruption = Callable[[np.ndarray, list[np.random.Generator], int], np.ndarray]
CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": noise, "blur": blur, "contrast": contrast, "occlusion": occlusion,
    "rotation": rotation}


def parse(text: str) -> list[str]:
  """The kinds that `config.eval.corruptions` names: none for "", every kind for "all", or a list
  with commas.

  Raises:
    UserError: a name is unknown (the message has the nearest one), or is given twice.
  """
  names = [name.strip() for name in text.split(",") if name.strip()]
  if names == ["all"]:
    return list(CORRUPTIONS)
  for name in names:
    if name not in CORRUPTIONS:
      raise unknown("--config.eval.corruptions", name, ["all", *CORRUPTIONS])
  if len(set(names)) < len(names):
    raise UserError(f"--config.eval.corruptions={text}: name each once")
  return names


def corrupt(
    images: np.ndarray, name: str, strength: int, seed: int, ids: np.ndarray,
) -> np.ndarray:
  """Disturbs images.

  Args:
    images: uint8[B, H, W, C]; C is 1 or 3.
    name: a key of `CORRUPTIONS`.
    strength: one of `STRENGTHS`.
    seed: the seed, which decides together with an example's number what is random.
    ids: i[B], the examples' numbers; negative in padding rows.

  Returns:
    uint8[B, H, W, C].
  """
  draws = [rng(seed, max(int(i), 0), name) for i in ids]
  return CORRUPTIONS[name](images, draws, strength)


def _to_uint8(images: np.ndarray) -> np.ndarray:
  return np.clip(np.round(images), 0, 255).astype(np.uint8)


def _gaussian(size: int, sigma: float) -> np.ndarray:
  """f32[size, size]: the matrix of a one-dimensional blur that repeats the border."""
  reach = int(np.ceil(4 * sigma))
  offsets = np.arange(-reach, reach + 1)
  weights = np.exp(-0.5 * (offsets / sigma)**2)
  matrix = np.zeros((size, size), np.float32)
  rows = np.arange(size)
  for offset, weight in zip(offsets, weights / weights.sum()):
    matrix[rows, np.clip(rows + offset, 0, size - 1)] += weight
  return matrix
