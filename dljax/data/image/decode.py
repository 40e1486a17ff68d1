"""From a file to an image: in training, evaluation and prediction alike, and for masks too.

Dimensions: h, w are the sides of an image as it is stored; H, W, C those of the image that the
model sees (`config.image_shape`).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dljax.data import inputs, sources
from dljax.data.image import augment, png
from dljax.data.pipeline import HostBatch
from dljax.data.splits import find_files, need


def validate(config: Any) -> None:
  """Checks the fields of `config.data` that all image sets have; raises `UserError`."""
  shape = tuple(config.image_shape)
  positive = all(isinstance(size, int) and size > 0 for size in shape)
  need(config, "image_shape", len(shape) == 3 and positive and shape[-1] in (1, 3),
       "give (height, width, channels) with 1 or 3 channels")
  need(config, "num_classes", config.num_classes > 0, "give a positive number")
  for field in ("mean", "std"):
    need(config, field, len(config[field]) == shape[-1],
         f"give one value for each of {shape[-1]} channels")
  need(config, "mean", all(0 <= m <= 1 for m in config.mean), "give values from 0 to 1")
  need(config, "std", all(0 < s <= 1 for s in config.std), "give values above 0 and up to 1")
  need(config, "train", bool(config.train), "name the split to train on")
  sources.parse_name(config.name)


def decode_image(data: bytes, channels: int, background: int = 0) -> np.ndarray:
  """Decodes an image to uint8[h, w, channels], on a grey `background` where it is transparent.

  Raises:
    ValueError: it is no image, or has more than 8 bits per channel.
    OSError and others: it is corrupt.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    image = Image.open(io.BytesIO(data))
  except UnidentifiedImageError:  # its message names only the buffer
    raise ValueError("is no image that Pillow can read") from None
  if image.mode.startswith(("I", "F")):
    raise ValueError(f"more than 8 bits per channel (Pillow mode {image.mode}); save it with 8")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (background,) * 3 + (255,))
    image = Image.alpha_composite(ground, image)
  mode = "L" if channels == 1 else "RGB"
  array = np.asarray(image if image.mode == mode else image.convert(mode))
  return array if channels == 3 else array[..., None]


def decode_images(
    encoded: Sequence[bytes], channels: int, background: int = 0) -> Sequence[np.ndarray]:
  """Each image by `decode_image`; faster if all are PNG files of one kind and size."""
  decoded = png.decode(encoded)
  if decoded is None or decoded.shape[-1] != channels:
    return [decode_image(data, channels, background) for data in encoded]
  return decoded


def fit(image: np.ndarray, config: Any) -> np.ndarray:
  """uint8[h, w, C] -> uint8[H, W, C], in the way that `resize` of `config.data` says."""
  height, width, _ = config.image_shape
  if config.resize == "crop":
    return augment.centre_crop(image, height, width, config.crop_fraction)
  if image.shape[:2] == (height, width):
    return image
  if config.resize == "pad":
    return augment.letterbox(image, height, width)
  return augment.resize(image, height, width)


def encode(
    paths: Sequence[str | np.ndarray], config: Any, background: int = 0,
) -> tuple[HostBatch, list[str], list[str]]:
  """Reads images as an evaluation reads them.

  Args:
    paths: the paths of image files, .npy files or folders, or arrays. A folder is searched with
      its subfolders, "2.png" before "10.png". An array, or a .npy file, holds an image [h, w] or
      [h, w, C], or a stack [n, h, w, C] or [n, h, w]; a last axis of 1, 3 or 4 counts as channels.
      Its values are uint8, or floats in [0, 1].
    config: `config.data`.
    background: the grey, from 0 to 255, that shows where an image is transparent.

  Returns:
    A batch of image, mask, id and "host/size" (height and width of the image itself), which has no
    rows if nothing was usable; the name of each row; and a line for each file that could not be
    used.

  Raises:
    UserError: a path does not exist.
  """
  images, sizes, names, skipped = [], [], [], []
  mend = "an image file, a folder or a .npy file"
  for name, source in inputs.each(paths, lambda path: find_files([path], mend)):
    try:
      stack = _read_stack(source, config.image_shape[-1], background)
      fitted = [fit(image, config) for image in stack]
    except Exception as e:  # Pillow raises many kinds of errors for a broken file
      skipped.append(f"{name}: {(str(e) or type(e).__name__).splitlines()[0]}")
      continue
    images += fitted
    sizes += [image.shape[:2] for image in stack]
    names += [name] if len(fitted) == 1 else [f"{name}[{i}]" for i in range(len(fitted))]
  stacked = np.stack(images) if images else np.empty((0, *config.image_shape), np.uint8)
  batch = {"image": augment.normalise(stacked, config.mean, config.std),
           "mask": np.ones(len(names), np.float32), "id": np.arange(len(names), dtype=np.int32),
           "host/size": np.array(sizes, np.int64).reshape(-1, 2)}
  return batch, names, skipped


def _read_stack(
    source: Path | np.ndarray, channels: int, background: int,
) -> list[np.ndarray]:
  """The images, each uint8[h, w, channels], in a file or an array; see `encode`.

  Raises:
    ValueError: it holds no image.
    OSError and others: it cannot be read.
  """
  if isinstance(source, np.ndarray):
    return _check_stack(source, channels)
  if source.suffix == ".npy":
    return _check_stack(np.load(source, allow_pickle=False), channels)
  return [decode_image(source.read_bytes(), channels, background)]


def _check_stack(array: np.ndarray, channels: int) -> list[np.ndarray]:
  if array.ndim == 2:
    array = array[None, ..., None]
  elif array.ndim == 3:
    array = array[None] if array.shape[-1] in (1, 3, 4) else array[..., None]
  if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
    raise ValueError(f"an array of shape {array.shape} is no image; give [h, w], [h, w, C] or "
                     "[n, h, w, C]")
  if np.issubdtype(array.dtype, np.floating):
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
      raise ValueError("values outside [0, 1]; scale them, or give uint8")
    array = np.round(array * 255).astype(np.uint8)
  if array.dtype != np.uint8:
    raise ValueError(f"{array.dtype} is neither uint8 nor float in [0, 1]")
  if channels == 1 and array.shape[-1] > 1:
    return list(np.round(augment.grey(array[..., :3])).astype(np.uint8))
  return list(np.repeat(array, 3, axis=-1) if array.shape[-1] < channels
              else array[..., :channels])
