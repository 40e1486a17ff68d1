"""Small images of one's own, in folders and tables, for the tests of folders, recipes and command lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dljax.data.image import labelled

MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK")


def image(colour: int, seed: int, sides: tuple[int, int] | None = None) -> Image.Image:
  """An image whose channel `colour` is bright, of some size between 5 and 20 pixels."""
  draw = np.random.default_rng([colour, seed])
  height, width = sides or draw.integers(5, 20, 2)
  pixels = draw.integers(0, 100, (height, width, 3)).astype(np.uint8)
  pixels[..., colour] += 120
  return Image.fromarray(pixels)


def folders(root: Path, classes: Mapping[str, int], first: int = 0) -> Path:
  """A folder for each class, with so many images of different sizes."""
  for colour, (name, count) in enumerate(classes.items()):
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      image(colour % 3, first + i).save(root / name / f"{i}.png")
  return root


def table(root: Path, header: str, rows: Sequence[str], count: int = 30, name: str = "labels.csv") -> Path:
  """A table of `count` images 0.png, 1.png, ..., whose i-th has the cells rows[i mod len(rows)]."""
  root.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    image(i % 3, i, (6, 6)).save(root / f"{i}.png")
  lines = [header, *(f"{i}.png,{rows[i % len(rows)]}" for i in range(count))]
  (root / name).write_text("\n".join(lines) + "\n")
  return root


def config(folder: Path, **fields):
  """`config.data` for a folder."""
  found = labelled.default_config()
  found.update(folder=str(folder), **fields)
  return found


def looked_up(folder: Path, seed: int = 0, **fields):
  """`config.data` for a folder, with what the data decide."""
  found = config(folder, **fields)
  found.update(labelled.look_up(found, seed, tuple(fields)))
  return found
