"""Folders of scenes in the forms that other tools write, made from tiny scenes of digits."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dljax.data.datasets import digit_scenes

NAMES = [str(digit) for digit in range(10)]


@functools.cache
def _covers() -> tuple[list[np.ndarray], np.ndarray]:
  draw = np.random.default_rng(0)
  digits = draw.integers(0, 17, (20, 8, 8))
  return digit_scenes.covers(digits), np.arange(20) % 10


@functools.cache
def scene(number: int) -> digit_scenes.Scene:
  """Scene `number` of patches of noise in place of digits, 96x96 pixels."""
  shapes, labels = _covers()
  return digit_scenes.digit_scene(np.random.RandomState([7, number]), shapes, labels)


def write_images(folder: Path, numbers: Sequence[int]) -> list[str]:
  """Writes scenes as 000.png, ...; returns their names."""
  folder.mkdir(parents=True, exist_ok=True)
  names = [f"{number:03}.png" for number in numbers]
  for number, name in zip(numbers, names):
    Image.fromarray(scene(number).image[..., 0]).save(folder / name)
  return names


def coco(names: Sequence[str], numbers: Sequence[int], ids: Mapping[int, int] | None = None) -> dict:
  """COCO's object for scenes; `ids` gives the id of each class, by default 1 + 3 times the class."""
  ids = ids or {label: 1 + 3 * label for label in range(10)}
  images = [{"id": 100 + n, "file_name": name, "width": 96, "height": 96} for n, name in zip(numbers, names)]
  annotations = []
  for n in numbers:
    for (x0, y0, x1, y1), label in zip(scene(n).boxes.tolist(), scene(n).labels.tolist()):
      annotations.append({"id": len(annotations) + 1, "image_id": 100 + n, "category_id": ids[label],
                          "bbox": [x0, y0, x1 - x0, y1 - y0], "area": 1, "iscrowd": 0})
  return {"images": images, "annotations": annotations,
          "categories": [{"id": key, "name": NAMES[label]} for label, key in ids.items()]}


def write_coco(root: Path, splits: Mapping[str, Sequence[int]]) -> Path:
  """annotations/instances_SPLIT.json and images in SPLIT/."""
  (root / "annotations").mkdir(parents=True)
  for split, numbers in splits.items():
    names = write_images(root / split, numbers)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco(names, numbers)))
  return root


def yolo_lines(number: int) -> str:
  """The lines of a scene's label file."""
  lines = []
  for (x0, y0, x1, y1), label in zip(scene(number).boxes / 96, scene(number).labels):
    lines.append(f"{label} {(x0 + x1) / 2:.6f} {(y0 + y1) / 2:.6f} {x1 - x0:.6f} {y1 - y0:.6f}\n")
  return "".join(lines)


def write_yolo(root: Path, splits: Mapping[str, Sequence[int]]) -> Path:
  """images/SPLIT, labels/SPLIT and data.yaml."""
  for split, numbers in splits.items():
    names = write_images(root / "images" / split, numbers)
    (root / "labels" / split).mkdir(parents=True)
    for name, number in zip(names, numbers):
      (root / "labels" / split / name).with_suffix(".txt").write_text(yolo_lines(number))
  (root / "data.yaml").write_text(json.dumps({"train": "images/train", "names": dict(enumerate(NAMES))}))
  return root


def write_masks(root: Path, splits: Mapping[str, Sequence[int]], form: str = "L") -> Path:
  """images/SPLIT and masks/SPLIT, as greyscale (L), with a palette (P) or as colours (RGB)."""
  for split, numbers in splits.items():
    names = write_images(root / "images" / split, numbers)
    (root / "masks" / split).mkdir(parents=True)
    for name, number in zip(names, numbers):
      mask = Image.fromarray(scene(number).segmentation)
      if form != "L":
        mask.putpalette(PALETTE.ravel().tolist())
        mask = mask.convert(form)
      mask.save(root / "masks" / split / name)
  return root


# The ground is black; the red of the classes rises.
PALETTE = np.array([[0, 0, 0]] + [[20 * i, 250 - 20 * i, 7 * i] for i in range(1, 11)], np.uint8)
