"""Image transforms in NumPy, on the host. Every function is pure: its random numbers are
arguments.

Dimension letters: N images, H height, W width, C channels (1 or 3). Images are uint8 from 0 to
255. Where a function says f32, they are on the same scale, not yet normalised.
"""

import functools

import numpy as np


def normalise(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
  """`(images / 255 - mean) / std`, per channel.

  Args:
    images: uint8 or f32 [N, H, W, C].
    mean: the mean of each channel, where white is 1.
    std: the standard deviation of each channel, where white is 1.

  Returns:
    f32[N, H, W, C].
  """
  _, _, w, c = images.shape
  # There is a factor for each value in a row of pixels: with one for each channel, NumPy's inner
  # loop would have 3 elements only.
  shift, scale = _factors(tuple(mean), tuple(std), w if c > 1 else 1)
  out = images.reshape(-1, w * c).astype(np.float32)
  out -= shift
  out *= scale
  return out.reshape(images.shape)


@functools.lru_cache(maxsize=16)
def _factors(
    mean: tuple[float, ...], std: tuple[float, ...], repeats: int,
) -> tuple[np.ndarray, np.ndarray]:
  shift, spread = (
      255 * np.tile(np.asarray(values, np.float32), repeats) for values in (mean, std))
  return shift, 1 / spread


def pad_to(images: np.ndarray, height: int, width: int) -> np.ndarray:
  """[N, H, W, C] -> [N, height, width, C]: the images, centred on a larger black canvas."""
  n, h, w, c = images.shape
  out = np.zeros((n, height, width, c), images.dtype)
  top, left = (height - h) // 2, (width - w) // 2
  out[:, top:top + h, left:left + w] = images
  return out


def resize(
    image: np.ndarray, height: int, width: int, box: tuple[float, ...] | None = None,
) -> np.ndarray:
  """Resizes bilinearly, with antialiasing where it shrinks (as Pillow and torchvision do it).

  Args:
    image: uint8[H, W, C].
    height: the height of the result.
    width: the width of the result.
    box: the part to take, (left, top, right, bottom); by default the whole image.

  Returns:
    uint8[height, width, C].
  """
  from PIL import Image

  return _from_pil(_to_pil(image).resize((width, height), Image.Resampling.BILINEAR, box=box))


def centre_crop(image: np.ndarray, height: int, width: int, fraction: float) -> np.ndarray:
  """Cuts out the centre of an image, in the aspect ratio of the result, and resizes it.

  This equals resizing the shorter side to `height / fraction` and cropping the centre (Krizhevsky
  et al., 2012; 256 and 224 pixels are a fraction of 0.875), without the rounding in between.

  Args:
    image: uint8[H, W, C].
    height: the height of the result.
    width: the width of the result.
    fraction: the share to take of the sides of the largest possible crop, in (0, 1].

  Returns:
    uint8[height, width, C].
  """
  h, w, _ = image.shape
  unit = fraction * min(h / height, w / width)
  crop_h, crop_w = unit * height, unit * width
  left, top = (w - crop_w) / 2, (h - crop_h) / 2
  return resize(image, height, width, (left, top, left + crop_w, top + crop_h))


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Centres an image on black; one that is too large is shrunk first, in its aspect ratio.

  Args:
    image: uint8[H, W, C].
    height: the height of the result.
    width: the width of the result.

  Returns:
    uint8[height, width, C].
  """
  h, w, _ = image.shape
  scale = min(height / h, width / w)
  if scale < 1:
    image = resize(image, max(round(scale * h), 1), max(round(scale * w), 1))
  return pad_to(image[None], height, width)[0]


def random_crop_box(
    height: int, width: int, area: np.ndarray, log_ratio: np.ndarray, position: np.ndarray,
) -> tuple[int, int, int, int]:
  """Where a random resized crop lies (Szegedy et al., 2015, "Going Deeper with Convolutions").

  Args:
    height: the height of the image.
    width: the width of the image.
    area: f[K], candidates for the crop's share of the image's area; the first that fits is taken.
    log_ratio: f[K], candidates for the logarithm of the crop's width over its height.
    position: f[2] in [0, 1), where the crop lies between top and bottom, and left and right.

  Returns:
    (left, top, right, bottom), in pixels; the whole image if no candidate fits.
  """
  widths = np.round(np.sqrt(area * height * width * np.exp(log_ratio))).astype(int)
  heights = np.round(np.sqrt(area * height * width / np.exp(log_ratio))).astype(int)
  fits = (1 <= widths) & (widths <= width) & (1 <= heights) & (heights <= height)
  if not fits.any():
    return 0, 0, width, height
  k = fits.argmax()
  top = int(position[0] * (height - heights[k] + 1))
  left = int(position[1] * (width - widths[k] + 1))
  return left, top, left + int(widths[k]), top + int(heights[k])


def pad_and_crop(
    images: np.ndarray, padding: int, down: np.ndarray, right: np.ndarray,
) -> np.ndarray:
  """Pads with black and crops to the old size (He et al., 2015, section 4.2; 4 pixels for CIFAR).

  Args:
    images: [N, H, W, C].
    padding: the number of pixels on each side.
    down: i[N] in [-padding, padding], how far the window moves down.
    right: i[N] in [-padding, padding], how far the window moves to the right.

  Returns:
    [N, H, W, C].
  """
  n, h, w, c = images.shape
  padded = pad_to(images, h + 2 * padding, w + 2 * padding)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (h, w, c), axis=(1, 2, 3))[:, :, :, 0]
  return windows[np.arange(n), padding + down, padding + right]


def flip(images: np.ndarray, which: np.ndarray) -> np.ndarray:
  """Mirrors left to right where `which` (bool[N]) says so."""
  out = images.copy()
  pixels = out.view(f"V{out.itemsize * out.shape[-1]}")  # moves whole pixels
  pixels[which] = pixels[which, :, ::-1]
  return out


def color_jitter(
    images: np.ndarray, brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray,
) -> np.ndarray:
  """Blends with black, then with the mean grey, then with the grey picture (Howard, 2013,
  arXiv:1312.5402).

  Args:
    images: [N, H, W, C]; with one channel there is no saturation.
    brightness: f[N]; 1 leaves the image as it is, 0 gives black.
    contrast: f[N]; 1 leaves the image as it is, 0 gives the mean grey.
    saturation: f[N]; 1 leaves the image as it is, 0 gives the grey picture.

  Returns:
    f32[N, H, W, C] in [0, 255].
  """
  factor = lambda f: f.astype(np.float32)[:, None, None, None]
  out = np.clip(images * factor(brightness), 0, 255)
  mean = grey(out).mean(axis=(1, 2, 3), keepdims=True)
  out = np.clip(mean + factor(contrast) * (out - mean), 0, 255)
  if images.shape[-1] == 3:
    base = grey(out)
    out = np.clip(base + factor(saturation) * (out - base), 0, 255)
  return out


def grey(images: np.ndarray) -> np.ndarray:
  """Luma (ITU-R 601), f32[N, H, W, 1]."""
  if images.shape[-1] == 1:
    return images.astype(np.float32)
  return images.astype(np.float32) @ np.array([[0.299], [0.587], [0.114]], np.float32)


def cutout(
    images: np.ndarray, y: np.ndarray, x: np.ndarray, size: int, fill: np.ndarray,
) -> np.ndarray:
  """Covers a square that is clipped at the borders (DeVries and Taylor, 2017, arXiv:1708.04552).

  Args:
    images: [N, H, W, C].
    y: i[N] in [0, H), the row of the square's centre.
    x: i[N] in [0, W), the column of the square's centre.
    size: the side of the square in pixels.
    fill: f[C], the square's colour; the paper takes the mean, which is 0 after normalisation.

  Returns:
    f32[N, H, W, C].
  """
  out = images.astype(np.float32)
  for image, top, left in zip(out, y - size // 2, x - size // 2):
    image[max(top, 0):max(top + size, 0), max(left, 0):max(left + size, 0)] = fill
  return out


def mixup(images: np.ndarray, partners: np.ndarray, weight: float) -> np.ndarray:
  """`weight * images + (1 - weight) * partners`, f32 (Zhang et al., 2018, arXiv:1710.09412)."""
  weight = np.float32(weight)
  return weight * images + (1 - weight) * partners


def cutmix_box(
    height: int, width: int, weight: float, y: float, x: float,
) -> tuple[int, int, int, int]:
  """The box that CutMix pastes (Yun et al., 2019, arXiv:1905.04899, equation 2).

  Args:
    height: the height of the image.
    width: the width of the image.
    weight: lambda, the share of the image that should stay.
    y: the vertical place of the box's centre, in [0, 1).
    x: the horizontal place of the box's centre, in [0, 1).

  Returns:
    (top, bottom, left, right), clipped at the borders.
  """
  side = np.sqrt(1 - weight)
  half_h, half_w = int(height * side) // 2, int(width * side) // 2
  centre_y, centre_x = int(y * height), int(x * width)
  return (max(centre_y - half_h, 0), min(centre_y + half_h, height),
          max(centre_x - half_w, 0), min(centre_x + half_w, width))


def cutmix(
    images: np.ndarray, partners: np.ndarray, box: tuple[int, int, int, int],
) -> tuple[np.ndarray, float]:
  """Pastes a box of the partners into the images.

  Args:
    images: [N, H, W, C].
    partners: [N, H, W, C].
    box: (top, bottom, left, right).

  Returns:
    The mixed images, and the share of each image that stayed: the weight of its own label.
  """
  top, bottom, left, right = box
  out = images.copy()
  out[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
  return out, 1 - (bottom - top) * (right - left) / (images.shape[1] * images.shape[2])


# RandAugment (Cubuk et al., 2020, arXiv:1909.13719) has the paper's 14 operations, with the ranges
# and the scale of torchvision.transforms.RandAugment, where magnitude 30 is the strongest.
RANDAUGMENT_OPS = (
    "identity", "autocontrast", "equalize", "rotate", "solarize", "posterize", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y")
MAX_MAGNITUDE = 30.0
MAX_LAYERS = 10  # the paper uses up to 3


def rand_augment(
    image: np.ndarray, ops: np.ndarray, signs: np.ndarray, magnitude: float,
) -> np.ndarray:
  """Applies operations one after another.

  Args:
    image: uint8[H, W, C].
    ops: i[layers], indices into `RANDAUGMENT_OPS`.
    signs: i[layers], 1 or -1: the direction of operations that have one.
    magnitude: the strength in [0, 30]; at 0 only autocontrast and equalize change the image.

  Returns:
    uint8[H, W, C].
  """
  pil = _to_pil(image)
  for op, sign in zip(ops, signs):
    pil = _apply(pil, RANDAUGMENT_OPS[op], int(sign), magnitude / MAX_MAGNITUDE)
  return _from_pil(pil)


def _apply(pil, op: str, sign: int, strength: float):
  from PIL import Image, ImageEnhance, ImageOps

  enhancers = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
               "brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness}
  shift = 150 / 331 * strength * sign  # a share of the image's size
  shear = 0.3 * strength * sign
  if op in enhancers:
    return enhancers[op](pil).enhance(1 + 0.9 * strength * sign)
  if op == "autocontrast":
    return ImageOps.autocontrast(pil)
  if op == "equalize":
    return ImageOps.equalize(pil)
  if op == "solarize":
    return ImageOps.solarize(pil, round(256 * (1 - strength)))
  if op == "posterize":
    return ImageOps.posterize(pil, 8 - round(4 * strength))
  if op == "rotate":
    return pil.rotate(30 * strength * sign)
  affine = {"shear_x": (1, shear, 0, 0, 1, 0), "shear_y": (1, 0, 0, shear, 1, 0),
            "translate_x": (1, 0, int(shift * pil.width), 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, int(shift * pil.height))}
  return pil.transform(pil.size, Image.Transform.AFFINE, affine[op]) if op in affine else pil


def _to_pil(image: np.ndarray):
  from PIL import Image

  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _from_pil(pil) -> np.ndarray:
  array = np.array(pil)  # a copy, which may be written to
  return array if array.ndim == 3 else array[..., None]
