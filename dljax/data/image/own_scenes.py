"""A folder of the user's own scenes, as a data set: images with boxes, or with masks.

Boxes stand in COCO's JSON or in YOLO's text files (see `annotations.py`); a mask is an image whose
values mean classes (see `masks.py`). The folder is laid out in one of these ways, where SPLIT is
train, validation (val, valid) or test, or a name such as train2017:

  COCO   annotations/instances_SPLIT.json, or SPLIT/_annotations.coco.json, or one annotations.json,
         which is split by the seed; the images lie beside, in images/, in SPLIT/ or images/SPLIT/
  YOLO   images/SPLIT/ and labels/SPLIT/, or SPLIT/images/ and SPLIT/labels/, or images/ and
         labels/, which are split by the seed; data.yaml or classes.txt names the classes
  masks  the same with masks/ in place of labels/

An image is turned upright by its EXIF orientation. YOLO's boxes are those of the upright image, as
Ultralytics reads them. COCO's are those of the pixels as they are stored, as torchvision's
CocoDetection reads them, unless the file's width and height of an image are those of
the upright one. A mask counts as upright, see `decode.decode_mask`.
"""

import concurrent.futures
import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dljax.data import own
from dljax.data.image import annotations, decode, geometry
from dljax.data.image.annotations import Annotated, Boxes
from dljax.data.image.folder import FLAG, SUFFIXES
from dljax.data.image.masks import LISTS, TABLES, find_list, find_meaning
from dljax.errors import UserError

FORMATS = {"boxes": ("coco", "yolo"), "segmentation": ("masks",)}
_KEY = 16  # hexadecimal digits of a SHA-256 that tell files apart
UNSPLIT = ""  # the split of examples that are split by the seed
LONGEST_SIDE = 640  # of the canvas that is found; larger images are shrunk onto it
SIDE_STEP = 32  # the sides of the canvas are multiples of it
MOST_RATIO = 8.0  # of the sides of an anchor
ROUNDING = 0.5  # pixels by which a box may reach out of its image; there it is cut
# The fields that a network is built from. A dry run can do without the folder if they are given.
BUILT_FROM = {"boxes": ("num_classes", "image_shape"),
              "segmentation": ("mask_classes", "image_shape")}
_KNOWN = (".txt", ".csv", ".json", ".yaml", ".yml", ".names", ".cache")  # no images, but expected


@dataclasses.dataclass(frozen=True)
class Example:
  """An image, and what is known of it.

  Attributes:
    name: the image's path below the folder.
    image: the image's path.
    boxes: its boxes, or None.
    mask: the path of its mask, or None.
  """

  name: str
  image: Path
  boxes: Boxes | None = None
  mask: Path | None = None


def split_of(name: str) -> str | None:
  """The split that a name means, such as "validation" for instances_val2017; None if none."""
  parts = map(own.split_name, re.split(r"[^a-z]+", name.lower()))
  return next((part for part in parts if part), None)


def _subfolders(folder: Path) -> dict[str, Path]:
  """Split -> the subfolder that is named after it."""
  found: dict[str, Path] = {}
  for path in sorted(folder.iterdir()):
    if path.is_dir() and (split := split_of(path.name)):
      if split in found:
        raise UserError(f"{FLAG}={own.show(folder)}: the folders {own.show(found[split].name)} and "
                        f"{own.show(path.name)} are both for {split}; rename one")
      found[split] = path
  return found


def parallel_folders(folder: Path, second: str) -> dict[str, tuple[Path, Path]]:
  """Split -> its folder of images and its folder `second`; {} if there are none.

  Args:
    folder: the user's folder.
    second: the name of the folder beside "images", such as "labels".

  Raises:
    UserError: a split has only one of the two.
  """
  first, other = folder / "images", folder / second
  if first.is_dir() and other.is_dir():
    ours, theirs = _subfolders(first), _subfolders(other)
    if not ours and not theirs:
      return {UNSPLIT: (first, other)}
    pairs = {split: (ours.get(split, first / split), theirs.get(split, other / split))
             for split in {**ours, **theirs}}
    loose = own.find(first, SUFFIXES, FLAG).files
    inside = {path.name for path in ours.values()}
    for name in [name for name in loose if name.partition("/")[0] not in inside][:1]:
      raise UserError(f"{FLAG}={own.show(folder)}: images/{own.show(name)} lies in no split, but "
                      "others do; move it into one")
  else:
    pairs = {split: (path / "images", path / second) for split, path in _subfolders(folder).items()
             if (path / second).is_dir()}
  for images, others in pairs.values():
    for path in (images, others):
      if not path.is_dir():
        raise UserError(f"{FLAG}={own.show(folder)}: there is no folder "
                        f"{own.show(path.relative_to(folder))}, but "
                        f"{own.show((others if path is images else images).relative_to(folder))}; "
                        "add it, or move that one elsewhere")
  return pairs


def _by_stem(names: Iterable[str], folder: Path) -> dict[str, str]:
  """The name without its ending -> the name; refuses two of one stem."""
  found: dict[str, str] = {}
  for name in names:
    stem = os.path.splitext(name)[0]
    if stem in found:
      raise UserError(f"{FLAG}: {own.show(folder / found[stem])} and {own.show(name)} have the "
                      "same name but for the ending; rename one")
    found[stem] = name
  return found


def _pairs(
    folder: Path, images: Path, others: Path, suffixes: Collection[str], what: str, needed: bool,
) -> list[tuple[str, Path, Path]]:
  """(name, image, the file of the same stem in the other folder) for each image of a split.

  Args:
    folder: the user's folder.
    images, others: the two folders.
    suffixes: the endings of the other files.
    what: what the other files are called in messages.
    needed: whether each image must have one; otherwise its path may lead nowhere.
  """
  found = _by_stem(own.find(images, SUFFIXES, FLAG).files, images)
  if not found:
    raise UserError(f"{FLAG}: {own.show(images)} holds no image; add some")
  there = _by_stem((name for name in own.find(others, suffixes, FLAG).files
                    if os.path.basename(name) not in LISTS), others)
  for stem in [stem for stem in there if stem not in found][:1]:
    raise UserError(f"{FLAG}: {own.show(others / there[stem])} is {what} of no image in "
                    f"{own.show(images)}; add the image, or remove it")
  rows = []
  for stem, name in found.items():
    if needed and stem not in there:
      raise UserError(f"{FLAG}: {own.show(images / name)} has no mask {own.show(others / stem)}"
                      ".png; add it, or remove the image")
    below = (images / name).relative_to(folder).as_posix()
    rows.append((below, images / name, others / there.get(stem, f"{stem}.txt")))
  return rows


def _coco_files(folder: Path) -> dict[str, tuple[Path, Any]]:
  """Split -> the file of COCO's form, and the value in it."""
  places = [folder, folder / "annotations", *_subfolders(folder).values()]
  files = [path for place in places if place.is_dir() for path in sorted(place.glob("*.json"))]
  for start in ("instances", "_annotations.coco"):
    files = [path for path in files if path.name.startswith(start)] or files
  found: dict[str, tuple[Path, Any]] = {}
  for path in files:
    value = annotations.read_json(path)
    if not annotations.is_coco(value):
      continue
    split = split_of(path.stem) or (split_of(path.parent.name) if path.parent != folder else None)
    split = split or UNSPLIT
    if split in found:
      named = f"both for {split}" if split else "not named after a split"
      raise UserError(f"{FLAG}={own.show(folder)}: {own.show(found[split][0].name)} and "
                      f"{own.show(path.name)} are {named}; move one elsewhere, or rename it")
    found[split] = path, value
  if UNSPLIT in found and len(found) > 1:
    raise UserError(f"{FLAG}={own.show(folder)}: {own.show(found[UNSPLIT][0].name)} is not named "
                    "after a split, but other files are; rename it, or move it elsewhere")
  return found


def _coco_images(folder: Path, split: str, file: Path, annotated: Annotated) -> list[Example]:
  """Finds the images that a file of COCO's form names."""
  # CVAT calls the images of instances_default.json images/default/.
  own_name = file.stem.removeprefix("instances_")
  places = [file.parent, folder, folder / "images", folder / own_name, folder / "images" / own_name]
  for place in (folder, folder / "images"):
    if split and place.is_dir():
      places += [path for path in sorted(place.iterdir())
                 if path.is_dir() and split_of(path.name) == split]
  examples = []
  for file_name, boxes in annotated.images.items():
    name = annotations.safe_name(file_name, file)
    place = next((place for place in places if os.path.isfile(place / name)), None)
    if place is None:
      shown = ", ".join(dict.fromkeys(map(own.show, places)))
      raise UserError(f"{FLAG}: {own.show(file)} names the image {file_name!r:.80}, which is not "
                      f"in {shown}; add it, or remove it from the file")
    places = [place, *places]  # the next one is likely there, too
    places = list(dict.fromkeys(places))
    examples.append(Example((place / name).relative_to(folder).as_posix(), place / name, boxes))
  if not examples:
    raise UserError(f"{FLAG}: {own.show(file)} names no image; add some")
  return examples


@dataclasses.dataclass(frozen=True)
class Scenes:
  """What was found in a folder.

  Attributes:
    form: the form that it has, among `FORMATS`.
    splits: split -> its examples; all are in `UNSPLIT` if the folder names no splits.
    classes: the names of the objects' classes; none for masks.
    files: the paths of further files that decide the examples.
  """

  form: str
  splits: Mapping[str, Sequence[Example]]
  classes: Sequence[str] = ()
  files: Sequence[Path] = ()


def find_masks(folder: Path) -> Scenes:
  """Finds images and their masks.

  Raises:
    UserError: there are none, or an image or a mask lacks the other.
  """
  own.find(folder, (), FLAG)  # refuses what is no folder
  pairs = parallel_folders(folder, "masks")
  if not pairs:
    raise UserError(f"{FLAG}={own.show(folder)}: there is no folder images/ beside a folder masks/"
                    ", nor SPLIT/images/ and SPLIT/masks/; name a folder that holds them")
  splits = {split: [Example(name, image, mask=mask) for name, image, mask in
                    _pairs(folder, images, masks, SUFFIXES, "the mask", True)]
            for split, (images, masks) in pairs.items()}
  return Scenes("masks", splits, files=[folder / name for name in (*TABLES, *LISTS)
                                        if (folder / name).is_file()])


def find_boxes(folder: Path, form: str, classes: Sequence[str]) -> Scenes:
  """Finds images and the boxes in them.

  Args:
    folder: the user's folder.
    form: "coco" or "yolo", or "" to look which it is.
    classes: the names of the classes, or () for those that the folder names.

  Raises:
    UserError: the folder has neither form or both, or a file cannot be used.
  """
  own.find(folder, (), FLAG)  # refuses what is no folder
  files = _coco_files(folder) if form in ("", "coco") else {}
  pairs = parallel_folders(folder, "labels") if form in ("", "yolo") else {}
  if files and pairs:
    raise UserError(f"{FLAG}={own.show(folder)}: holds boxes both in COCO's form and in YOLO's; "
                    "choose by --config.data.format=coco or yolo")
  if files:
    return _read_coco(folder, files, classes)
  if pairs:
    return _read_yolo(folder, pairs, classes)
  lacks = {"coco": "no JSON file of COCO's form", "yolo": "no folder images/ beside labels/",
           "": "neither a JSON file of COCO's form nor the folders images/ and labels/"}[form]
  raise UserError(f"{FLAG}={own.show(folder)}: there is {lacks}; name a folder that holds boxes")


def _read_coco(
    folder: Path, files: Mapping[str, tuple[Path, Any]], classes: Sequence[str],
) -> Scenes:
  parsed = {split: annotations.parse_coco(*found) for split, found in files.items()}
  first = parsed.get("train") or next(iter(parsed.values()))
  classes = classes or first.classes
  splits = {split: _coco_images(folder, split, files[split][0], annotated.relabelled(classes))
            for split, annotated in parsed.items()}
  return Scenes("coco", splits, classes, [file for file, _ in files.values()])


def _read_yolo(
    folder: Path, pairs: Mapping[str, tuple[Path, Path]], classes: Sequence[str],
) -> Scenes:
  found = {split: _pairs(folder, images, labels, (".txt",), "the label file", False)
           for split, (images, labels) in pairs.items()}
  file, names = _yolo_names(folder, pairs)
  count = len(names or classes) or None
  splits, files = {}, [file] if file else []
  for split, rows in found.items():
    boxes = {name: annotations.parse_yolo(labels, count) for name, _, labels in rows}
    known = Annotated(names or classes, boxes)
    boxes = (known.relabelled(classes) if names and classes else known).images
    splits[split] = [Example(name, image, boxes[name]) for name, image, _ in rows]
    there = [labels for _, _, labels in rows if labels.exists()]
    if not there:
      raise UserError(f"{FLAG}: {own.show(pairs[split][1])} holds no label file; add a text file "
                      "of the same name for each image with objects")
    files += there
  if not (classes or names):
    most = max((int(example.boxes.labels.max(initial=-1)) for examples in splits.values()
                for example in examples), default=-1)
    names = [str(i) for i in range(most + 1)]
  return Scenes("yolo", splits, classes or names, files)


def _yolo_names(
    folder: Path, pairs: Mapping[str, tuple[Path, Path]],
) -> tuple[Path | None, list[str] | None]:
  """The file that names the classes, and the names; None if there is none."""
  yamls = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".yaml", ".yml")]
  if folder / "data.yaml" in yamls:
    yamls = [folder / "data.yaml"]
  named = [(path, names) for path in yamls if (names := annotations.yolo_classes(path)) is not None]
  if len(named) > 1:
    raise UserError(f"{FLAG}: {own.show(named[0][0])} and {own.show(named[1][0])} both name "
                    "classes; call the right one data.yaml")
  if named:
    return named[0]
  places = [folder, folder / "labels", *(labels for _, labels in pairs.values())]
  for path in (place / name for place in places for name in LISTS):
    if path.is_file():
      return path, annotations.yolo_classes(path)
  return None, None


def divide(
    splits: Mapping[str, Sequence[Example]], config: Any, seed: int,
    keys: Mapping[str, own.Digest],
) -> dict[str, list[Example]]:
  """The examples of each split; those that the folder names, or those that the seed draws.

  If the folder has a test split but none for validation, its share is drawn from the training
  images. The same share of the images of each class is drawn. An image of several classes counts
  for the rarest of them.

  Args:
    splits: the examples as they were found.
    config: `config.data`.
    seed: the run's seed.
    keys: the digest of each image, by name; equal images are not torn apart.

  Raises:
    UserError: there are too few images, or too few of a class.
  """
  own.check_shares(config.shares)
  train, *others = [share if split == "train" or config[split] else 0
                    for split, share in zip(own.SPLITS, config.shares)]
  train = 1 - sum(others)  # the images of a split that is left out are for training
  kept = {split: list(examples) for split, examples in splits.items()}
  if UNSPLIT in splits:
    examples, shares = kept.pop(UNSPLIT), [train, *others]
  elif "train" in kept and "validation" not in kept and others[0]:
    examples, shares = kept.pop("train"), [train / (train + others[0]),
                                           others[0] / (train + others[0]), 0]
  else:
    return {split: kept[split] for split in own.SPLITS if split in kept}
  digests = [keys[example.name].sha256 for example in examples]
  strata = _strata(examples, digests, sum(share > 0 for share in shares))
  what = f"images that differ in {config.folder}"
  drawn = own.split(digests, shares, seed, strata, lambda _: what)
  parts = {split: [e for e, chosen in zip(examples, drawn) if chosen == split]
           for split, share in zip(own.SPLITS, shares) if share > 0}
  return {split: (parts | kept)[split] for split in own.SPLITS if split in parts | kept}


def _strata(examples: Sequence[Example], keys: Sequence[str], parts: int) -> list[int]:
  """Each image's rarest class; -1 for images without objects, and for strata that are too small."""
  of_image = [set(e.boxes.labels.tolist()) if e.boxes is not None else set() for e in examples]
  images = Counter(label for labels in of_image for label in labels)
  strata = [min(labels, key=lambda label: (images[label], label), default=-1)
            for labels in of_image]
  sizes = Counter(stratum for stratum, _ in set(zip(strata, keys)))
  # Ten images of a stratum are spread over all splits by the usual shares.
  strata = [stratum if sizes[stratum] >= max(10, parts) else -1 for stratum in strata]
  if 0 < len({key for key, stratum in zip(keys, strata) if stratum == -1}) < parts:
    largest = sizes.most_common(1)[0][0]
    strata = [largest if stratum == -1 else stratum for stratum in strata]
  return strata


@dataclasses.dataclass(frozen=True)
class Objects:
  """The feature of objects with boxes; `feature` is as TFDS's sequence of a dictionary has it."""

  feature: Mapping[str, Any]


def _folder(config: Any) -> Path:
  return own.expand(config.folder, FLAG)


def _find(config: Any, target: str) -> Scenes:
  folder = _folder(config)
  if target == "boxes":
    scenes = find_boxes(folder, config.format, tuple(config.classes))
  else:
    scenes = find_masks(folder)
  if set(scenes.splits) == {"train"}:  # what is named alone is no split
    scenes = dataclasses.replace(scenes, splits={UNSPLIT: scenes.splits["train"]})
  return scenes


def open_scenes(
    config: Any, target: str, seed: int, trained: Mapping[str, Any] | None = None,
) -> tuple[own.Dataset, dict[str, Any]]:
  """Opens the user's folder as a data set.

  Args:
    config: `config.data`, with what `look` found.
    target: "boxes" or "segmentation".
    seed: the run's seed, which draws the splits that the folder does not name.
    trained: the record of a run, {} if it has none, to evaluate it on another folder: the split
      test holds the images that are named so, else all, but none that the run was trained on.

  Returns:
    The set, and the record to keep with a run: the fingerprint, and the hash and split of each
    file.

  Raises:
    UserError: the folder is missing, or cannot be used.
  """
  return _open(config, target, seed, _find(config, target), trained)


def _open(
    config: Any, target: str, seed: int, scenes: Scenes,
    trained: Mapping[str, Any] | None = None,
) -> tuple[own.Dataset, dict[str, Any]]:
  folder = _folder(config)
  examples = [example for part in scenes.splits.values() for example in part]
  files = list(dict.fromkeys([
      *(example.image for example in examples), *scenes.files,
      *(example.mask for example in examples if example.mask is not None)]))
  names = [os.path.relpath(file, folder) for file in files]
  found = own.digests(files)
  keys = dict(zip(names, found))
  more = repr((sorted(scenes.splits), list(scenes.classes),
               [(split, [example.name for example in part])
                for split, part in scenes.splits.items() if split != UNSPLIT]))
  fingerprint = own.fingerprint(names, found, more)
  if trained is None or trained.get("fingerprint") == fingerprint:
    splits = divide(scenes.splits, config, seed, keys)
  else:
    splits = _all_to_test(scenes.splits, keys, trained, config.folder)
    if target == "segmentation":
      _check_names(config, folder)
  features = {"image": own.Image((None, None, None))}
  if target == "boxes":
    labels = own.ClassLabel(tuple(scenes.classes))
    features["objects"] = Objects({"bbox": own.Image((None, None, 1)), "label": labels})
  else:
    features[config.mask_feature] = own.Image((None, None, 1))
  split_of_file = {example.name: split for split, part in splits.items() for example in part}
  record = {"fingerprint": fingerprint, "files": {
      own.show(name): [digest.sha256[:_KEY], split_of_file.get(name)]
      for name, digest in zip(names, found)}}
  dataset = own.Dataset(
      config.folder, features, fingerprint, splits,
      functools.partial(_read, mask_feature=config.mask_feature),
      lambda example: own.show(example.image))
  return dataset, record


def _all_to_test(
    splits: Mapping[str, Sequence[Example]], keys: Mapping[str, own.Digest],
    trained: Mapping[str, Any], folder: str,
) -> dict[str, list[Example]]:
  """All images in the split test, or those that the folder has there, but none of the run's."""
  examples = splits.get("test") or [example for part in splits.values() for example in part]
  names = [example.name for example in examples]
  known = own.left_out(names, [keys[name].sha256[:_KEY] for name in names], trained,
                       f"{FLAG}={folder}", "images")
  return {"test": [example for example in examples if example.name not in known]}


def _check_names(config: Any, folder: Path) -> None:
  """Raises `UserError` if a folder's file gives a value another name than the run has for it."""
  listed = find_list(folder, by_color=False)
  if listed is None or bool(listed.colors) != bool(config.mask_colors):
    return
  ours = dict(zip(config.mask_colors or config.mask_values, config.mask_names))
  values = listed.colors or listed.values or range(len(listed.names))
  for value, name in zip(values, listed.names):
    if (mine := ours.get(value)) not in (None, str(value), name):
      raise UserError(f"{FLAG}={own.show(folder)}: the value {value} is {name!r} there, and "
                      f"{mine!r} in the run; write masks with the run's values")


def _read(example: Example, mask_feature: str) -> dict[str, Any]:
  """The features of an example, as `sources.Records` gives them."""
  data = example.image.read_bytes()
  record: dict[str, Any] = {"image": [data]}
  if example.mask is not None:
    record[mask_feature] = [example.mask.read_bytes()]
    record["file/mask"] = own.show(example.mask)
  if example.boxes is not None:
    with decode.naming(own.show(example.image), decode.MEND_FILE):
      relative = _relative(example, decode.stored(data))
    record |= {"objects/bbox": relative[:, [1, 0, 3, 2]], "objects/label": example.boxes.labels,
               "objects/is_crowd": example.boxes.crowd,
               "objects/place": [f"{place} of {own.show(example.boxes.file)}"
                                 for place in example.boxes.places]}
  return record


def _relative(example: Example, stored: decode.Stored) -> np.ndarray:
  """An example's boxes f64[N, 4], (x0, y0, x1, y1) in shares of the upright image's sides."""
  boxes = example.boxes
  found = boxes.corners
  if not boxes.relative:
    if boxes.size in (None, stored.size):
      found = stored.turned(found / np.tile(stored.size, 2))
    elif boxes.size == stored.upright:
      found = found / np.tile(stored.upright, 2)
    else:
      width, height = stored.size
      raise UserError(f"{FLAG}: {own.show(boxes.file)} says that {own.show(example.image)} has "
                      f"{boxes.size[0]}x{boxes.size[1]} pixels, but it has {width}x{height}, so "
                      "that its boxes lie elsewhere; mend the file")
  slack = ROUNDING / np.tile(stored.upright, 2)
  found = np.where((found < 0) & (found >= -slack), 0, found)
  return np.where((found > 1) & (found <= 1 + slack), 1, found)


@dataclasses.dataclass(frozen=True)
class Found:
  """What a look at the user's folder found.

  Attributes:
    fields: field of `config.data` -> its value.
    lines: what the user is shown.
    ratios: typical ratios of height to width of the boxes.
  """

  fields: Mapping[str, Any]
  lines: Sequence[str] = ()
  ratios: tuple[float, ...] = ()


def look(config: Any, target: str, seed: int, given: Collection[str]) -> Found:
  """Looks at the user's folder: classes, sizes, mean and standard deviation. It reads every file.

  Args:
    config: `config.data`.
    target: "boxes" or "segmentation".
    seed: the run's seed.
    given: the fields of `config.data` that the user has given; they are not looked up.

  Raises:
    UserError: the folder is missing, or a file cannot be used.
  """
  folder = _folder(config)
  if not folder.exists():
    lacking = [f"--config.data.{field}" for field in BUILT_FROM[target] if field not in given]
    if lacking:
      raise UserError(f"{FLAG}={own.show(folder)}: there is no such folder; name one, or for "
                      f"--dry_run without it give {' and '.join(lacking)}")
    return Found({})
  for split in own.SPLITS:
    if split in given and config[split] not in ("", split):
      raise UserError(f"--config.data.{split}={config[split]!r}: own data have the split {split}; "
                      f"write {split}, or nothing to leave it out")
  scenes = _find(config, target)
  config = config.copy_and_resolve_references()
  config.update({split: split for split in own.SPLITS if split not in given})
  dataset, _ = _open(config, target, seed, scenes)
  if not dataset.splits.get("train"):
    raise UserError(f"{FLAG}={own.show(folder)}: there are no training images, but "
                    f"{', '.join(dataset.splits)}; add some in a folder or a file named train")
  dataset = _without_damaged(dataset, config.skip_corrupt)
  fields: dict[str, Any] = {
      "fitted_to": config.folder, "format": scenes.form,
      "num_train_examples": len(dataset.splits["train"]),
      **{split: split if dataset.splits.get(split) else "" for split in own.SPLITS}}
  channels = config.image_shape[-1] if "image_shape" in given else 0
  stats = _look_at_images(dataset, channels)
  fields |= {"image_shape": canvas(stats.sizes, stats.channels), "mean": stats.mean,
             "std": stats.std}
  numbers = ", ".join(f"{len(examples)} for {'training' if split == 'train' else split}"
                      for split, examples in dataset.splits.items())
  ratios: tuple[float, ...] = ()
  others = own.find(folder, (*SUFFIXES, *_KNOWN), FLAG).others
  lines = [f"found {sum(map(len, dataset.splits.values()))} images: {numbers}"]
  if target == "boxes":
    more, line, ratios = _look_at_boxes(
        config, dataset, scenes.classes, seed, UNSPLIT in scenes.splits)
    fields |= more
    lines.append(line)
  else:
    fields |= (more := _look_at_masks(config, dataset, given))
    pairs = zip(more["mask_colors"] or more["mask_values"], more["mask_names"])
    line = f"found {more['mask_classes']} classes of pixels: " + ", ".join(
        f"{value} is {name!r}" for value, name in pairs)
    lines.append(line + (f"; {more['mask_ignore']} is ignored" if more["mask_ignore"] else ""))
  fields = {name: value for name, value in fields.items() if name not in given}
  if others:
    lines.append(f"left out {len(others)} file{'s' * (len(others) > 1)} of other kinds: "
                 f"{own.some(others)}")
  return Found(fields, lines, ratios)


def _without_damaged(dataset: own.Dataset, most: int) -> own.Dataset:
  """The set without the examples whose files cannot be decoded, if up to `most` may be skipped."""
  if not most:
    return dataset
  skipped, kept = own.Skipped(most), {}
  for split in dataset.splits:
    examples = dataset.splits[split]

    def check(number: int, record: Mapping[str, Any], split: str = split) -> None:
      with decode.naming(dataset.example(split, number), decode.MEND_FILE):
        decode.decode_image(record["image"][0], 3)
        if (mask := examples[number].mask) is not None:
          decode.decode_mask(mask.read_bytes(), record["image"][0])

    bad = own.unsound(dataset.records(split), check)
    name = functools.partial(dataset.example, split)
    numbers = skipped.keep(split, split, len(examples), bad, name, warn=False)  # the run will
    kept[split] = [examples[i] for i in numbers]
  return dataclasses.replace(dataset, splits=kept)


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What images have in common.

  Attributes:
    sizes: height and width of each training image, upright.
    channels: 1 if all training images are grey, else 3.
    mean, std: of each channel over all pixels of the training images, where white is 1.
  """

  sizes: Sequence[tuple[int, int]]
  channels: int
  mean: tuple[float, ...]
  std: tuple[float, ...]


def _look_at_images(dataset: own.Dataset, channels: int) -> Statistics:
  """Decodes every image; `channels` is the number that the model sees, or 0 to look."""

  def count(example: Example) -> tuple[tuple[int, int], bool, np.ndarray]:
    """Size, whether it is grey, and the count, sum and sum of squares of its pixels."""
    with decode.naming(dataset.describe(example), decode.MEND_FILE):
      pixels = decode.decode_image(example.image.read_bytes(), channels or 3)
    flat = pixels.reshape(-1, pixels.shape[-1]).astype(np.int64)
    grey = bool((flat == flat[:, :1]).all())
    number = np.full(flat.shape[1], len(flat))
    return pixels.shape[:2], grey, np.stack([number, flat.sum(axis=0), (flat**2).sum(axis=0)])

  rows = {}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for split, examples in dataset.splits.items():
      rows[split] = list(pool.map(count, examples))
  sizes, greys, totals = zip(*rows["train"])
  channels = channels or (1 if all(greys) else 3)
  sums = np.sum(totals, axis=0)[:, :channels] / np.array([[1], [255], [255**2]])
  number, total, squares = sums
  mean = total / number
  std = np.sqrt(np.maximum(squares / number - mean**2, 0))
  rounded = [round(float(value), 4) for value in std]
  return Statistics(sizes, channels, tuple(round(float(value), 4) for value in mean),
                    tuple(value or 1.0 for value in rounded))


def canvas(sizes: Sequence[tuple[int, int]], channels: int) -> tuple[int, int, int]:
  """The shape of images that holds all sizes (h, w), as far as `LONGEST_SIDE` allows."""
  height, width = np.max(sizes, axis=0)
  scale = min(1, LONGEST_SIDE / max(height, width))
  sides = [max(-(-round(side * scale) // SIDE_STEP), 1) * SIDE_STEP for side in (height, width)]
  return *sides, channels


def _look_at_boxes(
    config: Any, dataset: own.Dataset, classes: Sequence[str], seed: int, drawn: bool,
) -> tuple[dict[str, Any], str, tuple[float, ...]]:
  """The fields that the boxes decide, a line about them, and their typical ratios."""
  numbers = {split: np.zeros(len(classes), np.int64) for split in dataset.splits}
  most, left_out, total, sides = 1, 0, 0, []
  for split, examples in dataset.splits.items():
    for example in examples:
      record = dataset.records(split).read(example)
      width, height = decode.stored(record["image"][0]).upright
      boxes = record["objects/bbox"][:, [1, 0, 3, 2]] * np.tile([width, height], 2)
      usable = geometry.good(boxes, (height, width), cut=config.bad_boxes == "cut")
      for i in np.flatnonzero(~usable)[:1] if config.bad_boxes == "refuse" else ():
        where, place = f"{FLAG}: {dataset.describe(example)}", record["objects/place"][i]
        raise geometry.refuse_box(where, place, boxes[i], (height, width))
      most, total = max(most, int(usable.sum())), total + len(boxes)
      left_out += int((~usable).sum())
      np.add.at(numbers[split], record["objects/label"][usable], 1)
      if split == "train":
        sides.append((boxes[:, 2:] - boxes[:, :2])[usable])
  if total == left_out:
    raise UserError(f"{FLAG}={own.show(config.folder)}: there is no box that can be used; name a "
                    "folder with some")
  for i in np.flatnonzero((sum(numbers.values()) > 0) & (numbers["train"] == 0))[:1]:
    mend = f"draw other splits by --seed (now {seed})" if drawn else "remove its boxes"
    raise UserError(f"{FLAG}={own.show(config.folder)}: no training image shows the class "
                    f"{classes[i]!r}, but others do; add some, or {mend}")
  shown = [f"{name!r} {count}" for name, count in zip(classes, numbers["train"].tolist())]
  line = (f"found {total} boxes of {len(classes)} classes, for training "
          + annotations.few(shown))
  if left_out:
    line += f"; {left_out} without area or outside of their image are left out"
  return {"classes": tuple(classes), "num_classes": len(classes),
          "max_boxes": most}, line, (
      typical_ratios(np.concatenate(sides)))


def typical_ratios(sides: np.ndarray) -> tuple[float, ...]:
  """The ratios of height to width that stand for the thirds of boxes f64[N, 2] (width, height)."""
  ratios = np.clip(sides[:, 1] / sides[:, 0], 1 / MOST_RATIO, MOST_RATIO)
  return tuple(sorted({round(float(r), 1) for r in np.quantile(ratios, (1 / 6, 1 / 2, 5 / 6))}))


def _look_at_masks(config: Any, dataset: own.Dataset, given: Collection[str]) -> dict[str, Any]:
  """The fields that the masks decide; it reads the colours of all."""
  folder = _folder(config)
  examples = [example for part in dataset.splits.values() for example in part]

  def colors_of(example: Example) -> decode.MaskColors:
    with decode.naming(own.show(example.mask), decode.MEND_FILE):
      data, image = example.mask.read_bytes(), example.image.read_bytes()
      check_size(example, decode.stored_mask(data, image), decode.stored(image))
      return decode.mask_colors(data)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = dict(zip([own.show(example.mask) for example in examples],
                     pool.map(colors_of, examples)))
  meaning = find_meaning(config, folder, found, given)
  if "mask_ignore" in given:
    meaning = dataclasses.replace(meaning, ignore=config.mask_ignore)
  if len(meaning.names) < 2:
    raise UserError(f"{FLAG}={own.show(folder)}: the masks hold only one class, "
                    f"{', '.join(meaning.names)}; there must be two to tell apart")
  return {"mask_names": tuple(meaning.names), "mask_classes": len(meaning.names),
          "mask_values": tuple(meaning.values), "mask_colors": tuple(meaning.colors),
          "mask_ignore": meaning.ignore}


def check_size(example: Example, mask: decode.Stored, image: decode.Stored) -> None:
  """Raises `UserError` unless a mask has the size of its image."""
  if mask.upright != image.upright:
    raise UserError(f"{FLAG}: {own.show(example.mask)} has {mask.upright[0]}x{mask.upright[1]} "
                    f"pixels, and its image {own.show(example.image)} has {image.upright[0]}x"
                    f"{image.upright[1]}; mend one of them")
