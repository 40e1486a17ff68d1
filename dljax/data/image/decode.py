"""From a file to an image: in training, evaluation and prediction alike, and for masks too.

Dimensions: h, w are the sides of an image as it is stored; H, W, C those of the image that the
model sees (`config.image_shape`).
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dljax.data import inputs, sources
from dljax.data.image import augment, png
from dljax.data.pipeline import HostBatch
from dljax.data.splits import find_files, need
from dljax.errors import UserError

# The most pixels of an image; while it is decoded, each takes up to 7 bytes.
MAX_PIXELS = 2**27
PIXELS_AT_ONCE = 2**22
# What to do about an example that cannot be decoded.
MEND_SET = "mend the set, or choose a split without it"
MEND_FILE = "mend the file, remove it, or skip it by --config.data.skip_corrupt=1"
MOST_COLORS = 256  # of a mask
_LOSSY = ("JPEG", "MPO")  # formats that change colours
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap height and width


def validate(config: Any) -> None:
  """Checks the fields of `config.data` that all image sets have; raises `UserError`."""
  shape = tuple(config.image_shape)
  positive = all(isinstance(size, int) and size > 0 for size in shape)
  need(config, "image_shape", len(shape) == 3 and positive and shape[-1] in (1, 3),
       "give (height, width, channels) with 1 or 3 channels")
  need(config, "image_shape", shape[0] * shape[1] <= MAX_PIXELS,
       f"give at most {MAX_PIXELS:,} pixels")
  need(config, "num_classes", config.num_classes > 0, "give a positive number")
  looked_at = not config.get("folder") or config.get("fitted_to")
  for field in ("mean", "std") if looked_at else ():
    need(config, field, len(config[field]) == shape[-1],
         f"give one value for each of {shape[-1]} channels")
  need(config, "mean", all(0 <= m <= 1 for m in config.mean), "give values from 0 to 1")
  need(config, "std", all(0 < s <= 1 for s in config.std), "give values above 0 and up to 1")
  need(config, "train", bool(config.train), "name the split to train on")
  if not config.get("folder"):
    sources.parse_name(config.name)


@contextlib.contextmanager
def naming(where: str, mend: str = MEND_SET) -> Iterator[None]:
  """Turns whatever a damaged example raises into a `UserError` that begins with `where`."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:  # Pillow raises many kinds of errors for a broken file
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise UserError(f"{where} cannot be used ({reason}); {mend}") from e


def decode_image(data: bytes, channels: int, background: int = 0) -> np.ndarray:
  """Decodes an image to uint8[h, w, channels], as every viewer shows it.

  A tag of its orientation (EXIF) turns it upright. It lies on a grey `background` where it is
  transparent.

  Raises:
    ValueError: it is no image, has more than 8 bits per channel, or more than `MAX_PIXELS`.
    OSError and others: it is corrupt.
  """
  image = _open(data)
  return _flatten(_turn(image, _orientation(image)), channels, background)


def decode_images(
    encoded: Sequence[bytes], channels: int, background: int = 0) -> Iterator[np.ndarray]:
  """Each image by `decode_image`; faster if all are simple PNG files of one kind and size."""
  decoded = png.decode(encoded)
  if decoded is None or decoded.shape[-1] != channels:
    return map(functools.partial(decode_image, channels=channels, background=background), encoded)
  return iter(decoded)


def decode_mask(data: bytes, image: bytes, form: str = "grey") -> np.ndarray:
  """Decodes the mask of an image, whose values say which class a pixel has.

  A mask counts as upright, as `decode_image` gives the image. But if only the image has a tag of
  its orientation, and the sides of the mask are those of the image before it is turned, it is
  turned alike. A value that the file calls transparent (PNG's tRNS) is a value like any other.

  Args:
    data: the mask's file.
    image: the image's file.
    form: what a value is. "grey": the grey that a viewer shows; "values": the number in the file,
      which for a palette is that of the colour; "colors": the colour.

  Returns:
    uint8[h, w], or uint8[h, w, 3] for "colors".

  Raises:
    ValueError, OSError and others: see `decode_image`; or the form is "values", and a pixel has a
      colour.
  """
  mask = _open(data)
  if "A" not in mask.mode.upper():
    mask.info.pop("transparency", None)
  mask = _turn(mask, stored_mask(data, image).orientation)
  if form == "grey":
    return _flatten(mask, 1, 0)[..., 0]
  if form == "values" and mask.mode == "P":
    return np.asarray(mask)
  colors = _flatten(mask, 3, 0)
  if form == "colors":
    return colors
  if (coloured := np.argwhere((colors[..., :1] != colors).any(axis=-1))).size:
    y, x = coloured[0]
    raise ValueError(f"pixel ({x}, {y}) has the colour {hex_color(*colors[y, x])}, and no number")
  return colors[..., 0]


@dataclasses.dataclass(frozen=True)
class MaskColors:
  """What occurs in a mask.

  Attributes:
    colors: the colours, as (red, green, blue).
    indices: for a palette, the number of each of them there; otherwise None.
  """

  colors: tuple[tuple[int, int, int], ...]
  indices: tuple[int, ...] | None


def mask_colors(data: bytes) -> MaskColors:
  """The colours of a mask's file.

  Raises:
    ValueError: the format is lossy, or there are more than `MOST_COLORS`.
    ValueError, OSError and others: see `decode_image`.
  """
  mask = _open(data)
  if mask.format in _LOSSY:
    raise ValueError("is a JPEG file, which blurs the values of a mask; save masks as PNG")
  if "A" not in mask.mode.upper():
    mask.info.pop("transparency", None)
  palette = mask.mode == "P"
  if not palette and mask.mode not in ("L", "RGB"):
    from PIL import Image

    mask = Image.fromarray(_flatten(mask, 3, 0))
  counted = mask.getcolors(MOST_COLORS)
  if counted is None:
    raise ValueError(f"has more than {MOST_COLORS} colours, which no mask has; save masks as PNG, "
                     "without smoothing")
  found = [value for _, value in counted]
  if palette:
    table = np.zeros((256, 3), np.uint8)
    stored = np.asarray(mask.getpalette("RGB"), np.uint8).reshape(-1, 3)[:256]
    table[:len(stored)] = stored
    found.sort()
    return MaskColors(tuple(tuple(table[i].tolist()) for i in found), tuple(found))
  return MaskColors(tuple(sorted(v if isinstance(v, tuple) else (v,) * 3 for v in found)), None)


def hex_color(red: int, green: int, blue: int) -> str:
  """A colour as it is written on the web, such as #ff8000."""
  return f"#{int(red):02x}{int(green):02x}{int(blue):02x}"


@dataclasses.dataclass(frozen=True)
class Stored:
  """An image's file before its pixels are decoded.

  Attributes:
    size: width and height as they are stored.
    orientation: the number from 1 (upright) to 8 that its EXIF data give.
  """

  size: tuple[int, int]
  orientation: int

  @property
  def upright(self) -> tuple[int, int]:
    """Width and height as `decode_image` gives the image."""
    return self.size[::-1] if self.orientation in _SIDEWAYS else self.size

  def turned(self, boxes: np.ndarray) -> np.ndarray:
    """Boxes f64[N, 4] (x0, y0, x1, y1), in shares of the sides as stored -> those as upright."""
    x0, y0, x1, y1 = boxes.T
    if self.orientation in _SIDEWAYS:
      x0, y0, x1, y1 = y0, x0, y1, x1
    if self.orientation in (2, 3, 6, 7):  # what was left or up is right
      x0, x1 = 1 - x1, 1 - x0
    if self.orientation in (3, 4, 7, 8):  # what was up or right is below
      y0, y1 = 1 - y1, 1 - y0
    return np.stack([x0, y0, x1, y1], axis=1)


def stored(data: bytes) -> Stored:
  """Reads the head of an image's file; raises what `decode_image` raises."""
  image = _header(data)
  return Stored(image.size, _orientation(image))


def stored_mask(data: bytes, image: bytes) -> Stored:
  """Reads the head of a mask's file, and finds how it is turned with its image; see `decode_mask`.
  """
  mask = stored(data)
  if mask.orientation == 1 and mask.size != mask.size[::-1]:
    whole = stored(image)
    if mask.size == whole.size and whole.orientation in _SIDEWAYS:
      return Stored(mask.size, whole.orientation)
  return mask


def _header(data: bytes) -> Any:
  """A `PIL.Image.Image` whose pixels are not decoded yet."""
  from PIL import Image, UnidentifiedImageError

  try:
    image = Image.open(io.BytesIO(data))
  except UnidentifiedImageError:  # its message names only the buffer
    raise ValueError("is no image that Pillow can read") from None
  except Image.DecompressionBombError:  # Pillow's own bound, which is higher
    raise ValueError(f"has more than {MAX_PIXELS:,} pixels; make it smaller") from None
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise ValueError(f"has {width}x{height} pixels, more than {MAX_PIXELS:,}; make it smaller")
  return image


def _open(data: bytes) -> Any:
  """A decoded `PIL.Image.Image` of at most 8 bits per channel."""
  image = _header(data)
  if image.mode.startswith(("I", "F")):
    raise ValueError(f"more than 8 bits per channel (Pillow mode {image.mode}); save it with 8")
  image.load()
  return image


def _orientation(image: Any) -> int:
  """The number from 1 (upright) to 8 in the image's EXIF data; 1 if it has none that is valid."""
  try:
    number = image.getexif().get(_ORIENTATION_TAG, 1)
  except Exception:  # damaged EXIF data raise many kinds of errors, and the pixels may be sound
    return 1
  return number if number in range(1, 9) else 1


def _turn(image: Any, orientation: int) -> Any:
  from PIL import Image

  if orientation == 1:
    return image
  upright = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
             Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
             Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
  return image.transpose(upright[orientation - 2])


def _flatten(image: Any, channels: int, background: int) -> np.ndarray:
  """A `PIL.Image.Image` -> uint8[h, w, channels], on a grey background where it is transparent.

  A large image is converted a few rows at a time, as every step would take a copy of it.
  """
  from PIL import Image

  mode, (width, height) = "L" if channels == 1 else "RGB", image.size
  rows = max(PIXELS_AT_ONCE // width, 1)
  out = np.empty((height, width, channels), np.uint8)
  for top in range(0, height, rows):
    bottom = min(top + rows, height)
    part = image if rows >= height else image.crop((0, top, width, bottom))
    if part.has_transparency_data:
      part = part.convert("RGBA")
      part = Image.alpha_composite(Image.new("RGBA", part.size, (background,) * 3 + (255,)), part)
    part = np.asarray(part if part.mode == mode else part.convert(mode))
    out[top:bottom] = part.reshape(bottom - top, width, channels)
  return out


INVERT = ("Whether black and white are swapped on reading, so that black ink on white paper looks "
          "like white ink on black; mean and std are those of the swapped images.")


def tone(image: np.ndarray, config: Any) -> np.ndarray:
  """uint8[...] -> uint8[...], inverted if `config.data` says so."""
  return 255 - image if config.invert else image


def fit(image: np.ndarray, config: Any) -> np.ndarray:
  """uint8[h, w, C] -> uint8[H, W, C], in the way that `resize` of `config.data` says.

  It is inverted before, if `invert` is set, so that what pads it stays black.
  """
  image = tone(image, config)
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
      reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
      skipped.append(f"{name}: {reason.splitlines()[0]}")
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
    return _check_stack(source, channels, background)
  if source.suffix == ".npy":
    # The file is mapped, not read, so that a header which promises more than the file holds is an
    # error before any memory is taken.
    array = np.load(source, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
      raise ValueError("is no .npy file but an archive of several; save one array by np.save")
    return _check_stack(array, channels, background)
  return [decode_image(source.read_bytes(), channels, background)]


def _check_stack(array: np.ndarray, channels: int, background: int) -> list[np.ndarray]:
  from PIL import Image

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
  # The pixels of a file and of an array become those of the model in one way.
  return [_flatten(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), channels,
                   background) for image in np.ascontiguousarray(array)]
