"""Images of several objects, with a box around each or a class for each pixel: config and
pipelines.

A batch holds image f32[b, H, W, C] (normalised), mask and id (see `data/pipeline.py`), and for
each of the two targets, if it is asked for,

  boxes         boxes f32[b, N, 4]: (x0, y0, x1, y1) in pixels of the image that the model sees,
                x1 and y1 being the first pixels outside; box_label i32[b, N]; box_mask
                f32[b, N], 0 where there is no box, or a box that stands for a crowd; and in
                evaluation "host/box_crowd" f32[b, N], 1 for a crowd
  segmentation  segmentation i32[b, H, W], the class of each pixel, `VOID` outside of the picture

TFDS's own boxes (objects/bbox) are relative to the size of the image as a viewer shows it. An
image may have no objects.

Dimensions: b the host's rows, N boxes, H height, W width, C channels.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import own, sources, splits
from dljax.data.image import augment, decode, folder, geometry, own_scenes, typical
from dljax.data.image.geometry import VOID_BYTE, Placement, Window
from dljax.data.pipeline import (
    PADDING, Examples, HostBatch, IndexedPipeline, InMemory, Pipeline, Plan, Streaming)
from dljax.errors import UserError

VOID = -1  # the class of a pixel that has none
UNKNOWN = VOID_BYTE - 1  # marks a value that is no class
TARGETS = ("boxes", "segmentation")
RESIZE = ("pad", "bilinear")
BAD_BOXES = ("refuse", "drop", "cut")
_COLORS = "give colours such as #ff0000,#00ff00, in lower case"
_COLOR = re.compile("#[0-9a-f]{6}")
_BYTE = re.compile("[0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5]")
MEMORY_LIMIT = 2 * 2**30  # bytes of one split's images and masks; larger splits are streamed
DECODE_AT_ONCE = 256  # number of images, which are decoded before they are made smaller

# The fields of `config.data` for the set `emoji_scenes`; `default_config` is for `digit_scenes`.
EMOJI_SCENES = {"name": "emoji_scenes", "image_shape": (96, 96, 3), "num_classes": 9,
                "mask_classes": 10, "mask_values": tuple(range(10)),
                "mean": (0.5476, 0.5132, 0.4896), "std": (0.2388, 0.2113, 0.2254)}


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "name": Field("digit_scenes", splits.NAME),
      "folder": Field("", "Your own scenes in place of the set: a folder with boxes or masks; see "
                      "dljax/data/README.md."),
      "format": Field("", 'The form of the boxes in your folder, "coco" or "yolo"; found if "".'),
      "classes": Field((), "The names of the objects' classes in your own data."),
      "fitted_to": Field("", "The folder that was looked at when the run started."),
      "num_train_examples": Field(0, "The number of training examples of your own data."),
      "shares": Field(own.SHARES, "The shares of train, validation and test, where your folder names "
                      "no splits."),
      "skip_corrupt": Field(0, "The number of examples that may be left out because they cannot be "
                            "decoded."),
      **splits.fields("train", "validation", "test"),
      "num_classes": Field(10, "The number of the objects' classes."),
      "image_shape": Field((96, 96, 1), "The height, width and channels that the model sees."),
      "mean": Field((0.3126,), "The mean of each channel, where white is 1."),
      "std": Field((0.1563,), "The standard deviation of each channel, where white is 1."),
      "invert": Field(False, decode.INVERT),
      "resize": Field("pad", one_of('How an image reaches image_shape: "pad" centres it on black, '
                                    'and shrinks it if it is too large, "bilinear" ignores its '
                                    'aspect ratio', RESIZE)),
      "max_boxes": Field(8, "The greatest number of boxes in an image."),
      "bad_boxes": Field("refuse", one_of("What is done about boxes without area or outside of "
                                          "the image", BAD_BOXES)),
      "mask_feature": Field("segmentation", "The feature of the set with an image of the pixels' "
                            "classes."),
      "mask_classes": Field(11, "The number of the pixels' classes; the first is the ground."),
      "mask_values": Field(tuple(range(11)), "The value of each class in that image."),
      "mask_colors": Field((), "The colour of each class in that image, such as #ff0000, where its "
                           "values are no numbers."),
      "mask_ignore": Field("", "The value or colour of pixels without a class."),
      "mask_names": Field((), 'The names of the pixels\' classes; by default "ground" and the '
                          "names of the objects."),
      "scale": Field((1.0, 1.0), "The range of the magnification in training, whose logarithm is "
                     "uniform."),
      "shift": Field(0, "The greatest shift of an image in training, in pixels."),
      "flip": Field(False, "Whether images are mirrored at random, left to right, in training."),
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data` against their ranges and each other; raises `UserError`."""
  need = functools.partial(splits.need, config)
  need("resize", config.resize in RESIZE, f"choose one of {', '.join(RESIZE)}")
  need("bad_boxes", config.bad_boxes in BAD_BOXES, f"choose one of {', '.join(BAD_BOXES)}")
  decode.validate(config)
  if config.classes:
    need("num_classes", config.num_classes == len(config.classes),
         f"there are {len(config.classes)} names in --config.data.classes; give that number")
  own.check_shares(config.shares)
  need("skip_corrupt", config.skip_corrupt >= 0, "give a positive number, or 0 to skip none")
  need("max_boxes", config.max_boxes > 0, "give a positive number")
  need("mask_classes", 0 < config.mask_classes < VOID_BYTE,
       f"give a number from 1 to {VOID_BYTE - 1}")
  told = "mask_colors" if config.mask_colors else "mask_values"
  lengths_of = {told: [config.mask_classes], "mask_names": [0, config.mask_classes]}
  # What the user's own folder decides may not be known yet, in a dry run without it.
  for field, lengths in lengths_of.items() if config.fitted_to or not config.folder else ():
    need(field, len(config[field]) in lengths,
         f"give one for each of {config.mask_classes} classes")
  need("mask_values", all(0 <= value <= 255 for value in config.mask_values),
       "give values from 0 to 255")
  need("mask_colors", all(map(_COLOR.fullmatch, config.mask_colors)), _COLORS)
  colored = bool(config.mask_colors)
  need("mask_ignore", not config.mask_ignore or bool(
      (_COLOR if colored else _BYTE).fullmatch(config.mask_ignore)),
       "give a colour such as #ffffff" if colored else "give a value from 0 to 255, such as 255")
  need("mask_ignore", config.mask_ignore not in map(str, config[told]),
       f"is also the value of a class; drop it, or give other --config.data.{told}")
  need("scale", len(config.scale) == 2 and 0 < config.scale[0] <= config.scale[1] < math.inf,
       "give the least and the greatest, such as 0.8,1.25")
  need("shift", 0 <= config.shift < max(config.image_shape[:2]),
       "give 0 or more pixels, but less than the image has")


def look_up(
    config: ml_collections.ConfigDict, given: Collection[str], target: str,
) -> tuple[dict[str, Any], tuple[float, ...]]:
  """Looks up what a folder of the user's own decides, and prints what it found.

  Args:
    config: the whole config, with the user's overrides.
    given: the names of the fields that the user has given.
    target: "boxes" or "segmentation".

  Returns:
    Field -> value, {} without a folder; nothing is monitored if there is no validation split. And
    typical ratios of height to width of the boxes.

  Raises:
    UserError: a field has a value out of range; or the folder is missing, or cannot be used.
  """
  data = config.data
  if not data.folder:
    return {}, ()
  need = functools.partial(splits.need, data)
  if "data.format" in given:
    forms = own_scenes.FORMATS[target]
    need("format", data.format in forms, f"choose one of {', '.join(forms)}")
  need("skip_corrupt", data.skip_corrupt >= 0, "give a positive number, or 0 to skip none")
  need("bad_boxes", data.bad_boxes in BAD_BOXES, f"choose one of {', '.join(BAD_BOXES)}")
  need("mask_colors", all(map(_COLOR.fullmatch, data.mask_colors)), _COLORS)
  found = own_scenes.look(
      data, target, config.seed,
      {name.removeprefix("data.") for name in given if name.startswith("data.")})
  for line in found.lines:
    print(line)
  fields = {f"data.{field}": value for field, value in found.fields.items()}
  if not fields.get("data.validation", data.validation) and "monitor" not in given:
    fields["monitor"] = ""
  return fields, found.ratios


def encode(paths: Sequence[str], config: Any) -> tuple[HostBatch, list[str], list[str]]:
  """Reads the user's images as an evaluation reads them; see `decode.encode`."""
  validate(config)
  return decode.encode(paths, config)


class SceneSet(own.FolderSet):
  """What the pipelines of one config share: the opened set, and how its examples become batches.

  Args:
    config: see `default_config`.
    targets: the targets, among `TARGETS`, that the batches hold; the class names in `Data.assets`
      are those of the first.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any, targets: Sequence[str]):
    validate(config)
    super().__init__(config, folder.FLAG)
    self._targets = tuple(targets)
    self.boxes, self.segmentation = (target in targets for target in TARGETS)
    if config.folder and len(self._targets) > 1:
      raise UserError(f"--config.data.folder={config.folder}: holds either boxes or masks; drop it")
    self._sound: dict[str, np.ndarray] = {}  # split -> the numbers of the examples that are kept

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    return IndexedPipeline(
        functools.partial(self.open_split, split),
        self.train_batch if options["train"] else self.eval_batch, **options)

  def open_folder(
      self, trained: Mapping[str, Any] | None,
  ) -> tuple[own.Dataset, dict[str, Any]]:
    """See `FolderSet.open_folder`."""
    return own_scenes.open_scenes(self.looked_at, self._targets[0], self.seed, trained)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    shape, boxes = self.config.image_shape, self.config.max_boxes
    shapes = {"image": (shape, np.float32)}
    if self.boxes:
      shapes |= {"boxes": ((boxes, 4), np.float32), "box_label": ((boxes,), np.int32),
                 "box_mask": ((boxes,), np.float32)}
    if self.segmentation:
      shapes["segmentation"] = (shape[:2], np.int32)
    return shapes

  def assets(self) -> dict[str, Any]:
    """See `FolderSet.assets`; also the names of the classes, and what images look like."""
    return super().assets() | {
        "classes": self.class_names(self._targets[0]),
        typical.ASSET: typical.measure(self.dataset.records(self.config.train), self.config)}

  def check(self, dataset: sources.Dataset) -> None:
    """See `DataSet.check`."""
    config, features = self.config, dataset.features
    if config.folder:
      self._check_own(dataset)
      return

    def is_image(name: str) -> bool:
      return len(getattr(features.get(name), "shape", None) or ()) == 3

    def lacks(what: str) -> UserError:
      return UserError(f"--config.data.name: {config.name} does not have {what}, but "
                       f"{', '.join(features)}; choose another set")

    if not is_image("image"):
      raise lacks("an image")
    if self.boxes:
      labels = _object_labels(features)
      if labels is None:
        raise lacks("objects with bbox and label")
      if labels.num_classes != config.num_classes:
        raise UserError(f"--config.data.num_classes={config.num_classes}: {config.name} has "
                        f"{labels.num_classes} classes of objects")
    if self.segmentation and not is_image(config.mask_feature):
      raise UserError(f"--config.data.mask_feature={config.mask_feature}: is no image of "
                      f"{config.name}, which has {', '.join(features)}")
    channels = features["image"].shape[-1]
    if channels not in (None, config.image_shape[-1]):
      raise UserError(f"--config.data.image_shape={tuple(config.image_shape)}: {config.name} has "
                      f"{channels} channel{'s' * (channels > 1)}")
    super().check(dataset)

  def _check_own(self, dataset: own.Dataset) -> None:
    config, labels = self.config, _object_labels(dataset.features)
    if self.boxes and labels.num_classes != config.num_classes:
      raise UserError(f"--config.data.num_classes={config.num_classes}: {config.folder} has "
                      f"{labels.num_classes} classes of objects ({own.some(labels.names)})")
    if not self.foreign:
      splits.check_splits(dataset, config)

  def class_names(self, target: str) -> list[str]:
    """The names of a target's classes; opens the set if need be."""
    labels, config = _object_labels(self.dataset.features), self.config
    names = [] if labels is None else list(labels.names)
    if target == "boxes":
      return names
    names = ["ground", *names]
    if config.mask_names or len(names) != config.mask_classes:
      return list(config.mask_names or map(str, range(config.mask_classes)))
    return names

  def open_split(self, split: str, pipeline: IndexedPipeline) -> Examples:
    """Reads a split into memory if it fits; otherwise it is streamed from disk."""
    self.check_foreign(split)
    height, width, channels = self.config.image_shape
    numbers, records = self._records(split)
    if len(records) * height * width * (channels + self.segmentation) <= MEMORY_LIMIT:
      blocks = [range(start, min(start + DECODE_AT_ONCE, len(records)))
                for start in range(0, len(records), DECODE_AT_ONCE)]
      read = [example for block in blocks
              for example in self.read(records[block], split, numbers[block])]
      return InMemory({key: np.stack([example[key] for example in read]) for key in read[0]})

    def load(indices: np.ndarray, plan: Plan, rows: np.ndarray) -> list[HostBatch]:
      del plan, rows
      return self.read(records[indices], split, numbers[indices])

    return Streaming(len(records), load, pipeline.plan, lambda plan: plan.rows)

  def _records(self, split: str) -> tuple[np.ndarray, Any]:
    """The examples of a split that can be used: their numbers in the split, and the records.

    Raises:
      UserError: there is none; or more are damaged than may be skipped.
    """
    config, dataset = self.config, self.dataset
    if self.foreign:  # its splits were not checked
      dataset.ranges(split, split)
    records = dataset.records(config[split])
    numbers = np.arange(len(records))
    if not config.skip_corrupt:
      return numbers, records

    def name(number: int) -> str:
      return dataset.example(config[split], number)

    def check(number: int, record: Mapping[str, Any]) -> None:
      self._decode(record, f"--config.data.{split}={config[split]!r}: {name(number)}")

    with self.lock:
      if split not in self._sound:
        self._sound[split] = self.skipped.keep(
            split, config[split], len(records), own.unsound(records, check), name,
            self.skipped_before(split))
      numbers = self._sound[split]
    return numbers, sources.Subset(records, numbers)

  def _decode(
      self, record: Mapping[str, Any], where: str,
  ) -> tuple[np.ndarray, np.ndarray | None, str]:
    """An example's image u8[h, w, C]; its mask, see `decode.decode_mask`, and the mask's name."""
    config, mask = self.config, None
    named = record["file/mask"] if "file/mask" in record else config.mask_feature
    with self._naming(where):
      pixels = decode.decode_image(record["image"][0], config.image_shape[-1])
    if self.segmentation:
      with self._naming(f"{where}: {named}"):
        mask = decode.decode_mask(record[config.mask_feature][0], record["image"][0],
                                  self._mask_form)
    return pixels, mask, named

  def _naming(self, where: str) -> Any:
    """A context in which errors begin with `where`; see `decode.naming`."""
    return decode.naming(where, decode.MEND_FILE if self.config.folder else (
        f"{decode.MEND_SET}, or skip it by --config.data.skip_corrupt=1"))

  def first(self, split: str, count: int) -> HostBatch:
    """A split's first examples as evaluation reads them, on every host; may open the set."""
    numbers, records = self._records(split)
    indices = np.arange(min(count, len(records)))
    read = self.read(records[indices], split, numbers[indices])
    batch = {key: np.stack([example[key] for example in read]) for key in read[0]}
    return {"mask": np.ones(len(indices), np.float32), "id": indices.astype(np.int32),
            **self._finish(batch, indices)}

  def read(
      self, records: Sequence[Mapping[str, Any]], split: str, numbers: Sequence[int],
  ) -> list[HostBatch]:
    """Decodes, checks and places examples; `numbers` are their numbers, for messages."""
    config, canvas = self.config, self.config.image_shape[:2]
    examples = []
    for number, record in zip(numbers, records):
      where = (f"--config.data.{split}={config[split]!r}: "
               f"{self.dataset.example(config[split], int(number))}")
      pixels, mask, named = self._decode(record, where)
      place = Placement.of(pixels.shape[:2], canvas, config.resize)
      example = {"image": decode.fit(pixels, config)}
      if self.boxes:
        example |= self._read_boxes(record, pixels.shape[:2], place, where)
      if self.segmentation:
        if mask.shape[:2] != pixels.shape[:2]:
          raise UserError(f"{where}: {named} has {mask.shape[0]}x{mask.shape[1]} pixels and the "
                          f"image {pixels.shape[0]}x{pixels.shape[1]}; mend the set")
        example["segmentation"] = self._fit_mask(mask, place, where, named)
      examples.append(example)
    return examples

  def _read_boxes(
      self, record: Mapping[str, Any], size: Sequence[int], place: Placement, where: str,
  ) -> dict[str, np.ndarray]:
    config, (h, w) = self.config, size
    # TFDS has (y0, x0, y1, x1).
    relative = np.asarray(record.get("objects/bbox", ()), np.float64).reshape(-1, 4)
    boxes = relative[:, [1, 0, 3, 2]] * (w, h, w, h)
    labels = np.asarray(record.get("objects/label", ()), np.int64)
    crowd = np.asarray(record.get("objects/is_crowd", np.zeros(len(labels))), np.float32)
    if len(labels) != len(boxes):
      raise UserError(f"{where}: {len(boxes)} boxes have {len(labels)} labels; mend the set")
    for i in np.flatnonzero((labels < 0) | (labels >= config.num_classes))[:1]:
      raise UserError(f"{where}: box {i} has the label {labels[i]}, outside of 0 to "
                      f"{config.num_classes - 1}; mend the set, or choose a split with labels")
    flat, outside = geometry.faults(boxes, size)
    if config.bad_boxes == "refuse":
      for i in np.flatnonzero(flat | outside)[:1]:
        name = record["objects/place"][i] if "objects/place" in record else f"box {i}"
        raise geometry.refuse_box(where, name, boxes[i], size)
    good = geometry.good(boxes, size, cut=config.bad_boxes == "cut")
    if good.sum() > config.max_boxes:
      raise UserError(f"{where}: there are {good.sum()} boxes; raise "
                      f"--config.data.max_boxes={config.max_boxes}")
    boxes = np.clip(boxes[good], 0, (w, h, w, h))
    boxes = boxes * ([place.across, place.down] * 2) + [place.left, place.top] * 2
    count, pad = len(boxes), config.max_boxes - good.sum()

    def fill(values: np.ndarray, dtype: Any) -> np.ndarray:
      return np.concatenate([values, np.zeros((pad, *np.shape(values)[1:]))]).astype(dtype)

    return {"boxes": fill(boxes, np.float32), "box_label": fill(labels[good], np.int32),
            "box_mask": fill((crowd[good] == 0) * np.ones(count), np.float32),
            "host/box_crowd": fill(crowd[good], np.float32)}

  @property
  def _mask_form(self) -> str:
    """What the values of masks are, see `decode.decode_mask`."""
    if self.config.mask_colors:
      return "colors"
    return "values" if self.config.folder else "grey"

  @functools.cached_property
  def _table(self) -> np.ndarray:
    """The class of each value of a mask, or of each colour (as 0xRRGGBB): u8[256] or u8[2^24]."""
    config = self.config
    table = np.full(2**24 if config.mask_colors else 256, UNKNOWN, np.uint8)

    def number(value: str) -> int:
      return int(value[1:], 16) if config.mask_colors else int(value)

    table[list(map(number, config.mask_colors)) or list(config.mask_values)] = np.arange(
        config.mask_classes)
    if config.mask_ignore:
      table[number(config.mask_ignore)] = VOID_BYTE
    return table

  def _classes_of(self, mask: np.ndarray, where: str, named: str) -> np.ndarray:
    """The class of each pixel, u8[h, w], `VOID_BYTE` where it is ignored."""
    config, values = self.config, mask
    if config.mask_colors:
      red, green, blue = np.moveaxis(mask.astype(np.int32), -1, 0)
      values = red << 16 | green << 8 | blue
    classes = self._table[values]
    if (wrong := classes == UNKNOWN).any():
      y, x = np.argwhere(wrong)[0]
      field, value = "mask_values", mask[y, x]
      if config.mask_colors:
        field, value = "mask_colors", decode.hex_color(*value)
      raise UserError(f"{where}: pixel ({x}, {y}) of {named} is {value}, the value of no class; "
                      f"see --config.data.mask_classes={config.mask_classes} and "
                      f"--config.data.{field}")
    return classes

  def _fit_mask(
      self, mask: np.ndarray, place: Placement, where: str, named: str,
  ) -> np.ndarray:
    """The mask as it is in the file -> the classes on the canvas, u8[H, W]."""
    from PIL import Image

    classes = self._classes_of(mask, where, named)
    if classes.shape != (place.height, place.width):
      size = place.width, place.height
      classes = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
    if classes.shape == self.config.image_shape[:2]:
      return classes
    out = np.full(self.config.image_shape[:2], VOID_BYTE, np.uint8)
    out[place.top:place.top + place.height, place.left:place.left + place.width] = classes
    return out

  def eval_batch(self, examples: Examples, plan: Plan) -> HostBatch:
    return self._finish(examples.gather(plan, plan.rows), plan.indices[plan.rows])

  def train_batch(self, examples: Examples, plan: Plan) -> HostBatch:
    read = self.augment(examples.gather(plan, plan.rows), plan)
    read.pop("host/box_crowd", None)
    return self._finish(read, plan.indices[plan.rows])

  def _finish(self, read: HostBatch, indices: np.ndarray) -> HostBatch:
    real = indices != PADDING
    batch = {**read, "image": augment.normalise(read["image"], self.config.mean, self.config.std)}
    if self.boxes:
      batch["box_mask"] = read["box_mask"] * real[:, None].astype(np.float32)
    if self.segmentation:
      stored = read["segmentation"]
      batch["segmentation"] = np.where((stored == VOID_BYTE) | ~real[:, None, None], VOID,
                                       stored.astype(np.int32))
    return batch

  def augment(self, read: HostBatch, plan: Plan) -> HostBatch:
    """Gives each of the host's rows its window; random numbers are drawn for the global batch."""
    config, size = self.config, len(plan.indices)
    draw = plan.rng("window")
    scale = np.exp(draw.uniform(*np.log(config.scale), size))[plan.rows]
    shift = draw.integers(-config.shift, config.shift + 1, (size, 2))[plan.rows]
    flips = ((draw.random(size) < 0.5) & config.flip)[plan.rows]
    if config.shift == 0 and tuple(config.scale) == (1, 1) and not config.flip:
      return read
    windows = [Window(s, *map(int, move), bool(flip))
               for s, move, flip in zip(scale, shift, flips)]
    fill = np.round(255 * np.asarray(config.mean)).astype(int)  # is 0 after normalisation
    read = {**read,
            "image": np.stack([w.of_image(x, fill) for w, x in zip(windows, read["image"])])}
    if self.segmentation:
      read["segmentation"] = np.stack([w.of_mask(x)
                                       for w, x in zip(windows, read["segmentation"])])
    if self.boxes:
      moved = [w.of_boxes(x, config.image_shape[:2]) for w, x in zip(windows, read["boxes"])]
      seen = np.stack([seen for _, seen in moved])
      read["boxes"] = np.stack([boxes for boxes, _ in moved]) * seen[..., None]
      read["box_mask"] = read["box_mask"] * seen
    return read


def _object_labels(features: Mapping[str, Any]) -> Any:
  """TFDS's feature for the labels of objects with boxes; None if the set has none."""
  objects = dict(getattr(features.get("objects"), "feature", {}).items())
  return objects["label"] if "bbox" in objects and hasattr(objects.get("label"), "names") else None
