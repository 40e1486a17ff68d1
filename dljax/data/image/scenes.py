"""Images of several objects, with a box around each or a class for each pixel: config and pipelines.

A batch holds image f32[b, H, W, C] (normalised), mask f32[b] (0 where a row is padding) and "host/id" i64[b], and of
the targets asked for

  boxes         boxes f32[b, N, 4]: (x0, y0, x1, y1), pixels of the image that the model sees, from its upper left
                corner to the first pixels outside; box_label i32[b, N]; box_mask f32[b, N], 0 where there is no box
                or one that stands for a crowd; in evaluation "host/box_crowd" f32[b, N], 1 for those
  segmentation  segmentation i32[b, H, W], the class of each pixel, `VOID` outside of the picture

in place of TFDS's objects/bbox, which are relative. An image without objects is as good as another.

Dimensions: b the host's rows, N boxes, H height, W width, C channels.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from dljax.data import sources, splits
from dljax.data.image import augment, labelled
from dljax.data.pipeline import Examples, HostBatch, IndexedPipeline, InMemory, Plan, Streaming
from dljax.errors import UserError

VOID = -1  # the class of a pixel that has none
TARGETS = ("boxes", "segmentation")
RESIZE = ("pad", "bilinear")
BAD_BOXES = ("refuse", "drop")
LEAST_SEEN = 0.3  # of a box's area; what a random window cuts further is no longer an object
SLACK = 1e-3  # pixels that rounding may put a box outside of its image
DECODE_AT_ONCE = 256  # images, before they are made smaller
_VOID_BYTE = 255  # `VOID` while it is stored

# Field values of `config.data` for the set `emoji_scenes`; what `default_config` has is `digit_scenes`.
EMOJI_SCENES = {
    "name": "emoji_scenes", "image_shape": (96, 96, 3), "num_classes": 9, "mask_classes": 10,
    "mask_values": tuple(range(10)), "mean": (0.5476, 0.5132, 0.4896), "std": (0.2388, 0.2113, 0.2254)}


def default_config() -> ml_collections.ConfigDict:
  """The fields of `config.data`."""
  return ml_collections.ConfigDict({
      "name": "digit_scenes",  # a TFDS name, possibly with config and version
      "train": "train",  # TFDS split expressions that must not overlap, e.g. train[:90%]; "" for none
      "validation": "validation",
      "test": "test",
      "num_classes": 10,  # of objects
      "image_shape": (96, 96, 1),  # height, width, channels that the model sees
      "mean": (0.3126,),  # per channel, in units of 1
      "std": (0.1563,),
      # How an image reaches image_shape: "pad" centres it on black (and shrinks it if it is too large),
      # "bilinear" ignores its aspect ratio.
      "resize": "pad",
      "max_boxes": 8,  # in one image
      "bad_boxes": "refuse",  # what to do with one that has no area or lies outside; or "drop"
      "mask_feature": "segmentation",  # which image of the set holds the classes of pixels
      "mask_classes": 11,  # of pixels; the first is the ground
      "mask_values": tuple(range(11)),  # what stands for each of them in the set
      "mask_names": (),  # by default "ground" and the names of the objects
      # Training sees a random window of the size of the image: magnified, moved, mirrored.
      "scale": (1.0, 1.0),  # range of the magnification, drawn evenly in its logarithm
      "shift": 0,  # pixels
      "flip": False,  # left to right
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data` against each other and their ranges; raises `UserError`."""
  def need(field: str, ok: bool, mend: str) -> None:
    if not ok:
      raise UserError(f"--config.data.{field}={config[field]!r}: {mend}")

  need("resize", config.resize in RESIZE, f"choose one of {', '.join(RESIZE)}")
  need("bad_boxes", config.bad_boxes in BAD_BOXES, f"choose one of {', '.join(BAD_BOXES)}")
  labelled.validate(_image_config(config))
  need("max_boxes", config.max_boxes > 0, "give a positive number")
  need("mask_classes", 0 < config.mask_classes < _VOID_BYTE, f"give a number from 1 to {_VOID_BYTE - 1}")
  for field, lengths in ("mask_values", [config.mask_classes]), ("mask_names", [0, config.mask_classes]):
    need(field, len(config[field]) in lengths, f"give one for each of {config.mask_classes} classes")
  need("mask_values", all(0 <= value <= 255 for value in config.mask_values), "give values from 0 to 255")
  need("scale", len(config.scale) == 2 and 0 < config.scale[0] <= config.scale[1] < math.inf,
       "give the least and the greatest, such as 0.8,1.25")
  need("shift", 0 <= config.shift < max(config.image_shape[:2]), "give 0 or more pixels, but less than the image has")


def _image_config(config: Any) -> ml_collections.ConfigDict:
  """The fields that labelled images have too."""
  shared = labelled.default_config()
  shared.update({name: config[name] for name in shared if name in config})
  return shared


def encode(paths: Sequence[str], config: Any) -> tuple[HostBatch, list[str], list[str]]:
  """Reads the user's images as evaluation would; see `labelled.encode`."""
  validate(config)
  return labelled.encode(paths, _image_config(config))


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where an image lies on the canvas that the model sees: pixel (x, y) at (left + x * across, top + y * down)."""

  down: float
  across: float
  top: int
  left: int
  height: int
  width: int

  @classmethod
  def of(cls, size: Sequence[int], canvas: Sequence[int], resize: str) -> "Placement":
    """For an image of (h, w) on a canvas of (H, W), by one of `RESIZE`; as `augment.letterbox` and `resize`."""
    (h, w), (height, width) = size, canvas
    if resize == "bilinear":
      return cls(height / h, width / w, 0, 0, height, width)
    scale = min(1, height / h, width / w)
    high, wide = (max(round(scale * h), 1), max(round(scale * w), 1)) if scale < 1 else (h, w)
    return cls(high / h, wide / w, (height - high) // 2, (width - wide) // 2, high, wide)

  def back(self, classes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Classes on the canvas, u8[H, W] -> those of the image of (h, w), u8[h, w], the nearest pixel's."""
    from PIL import Image

    part = classes[self.top:self.top + self.height, self.left:self.left + self.width]
    return np.asarray(Image.fromarray(part).resize((int(size[1]), int(size[0])), Image.Resampling.NEAREST))


class SceneSet:
  """What the pipelines of one config share: the opened set, and how its examples become batches.

  Args:
    config: see `default_config`.
    targets: which of `TARGETS` the batches hold; the class names in `Data.assets` are those of the first.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any, targets: Sequence[str]):
    validate(config)
    self._targets = tuple(targets)
    self.config = ml_collections.FrozenConfigDict(config)  # later changes are not ours
    self.boxes, self.segmentation = (target in targets for target in TARGETS)
    self._fit = labelled.ImageSet(_image_config(config)).fit
    self._classes = np.full(256, _VOID_BYTE, np.uint8)  # value in the file -> class
    self._classes[list(config.mask_values)] = np.arange(config.mask_classes)
    self._dataset: sources.Dataset | None = None
    self._lock = threading.Lock()

  @property
  def dataset(self) -> sources.Dataset:
    """The set, opened and held against the config."""
    with self._lock:
      if self._dataset is None:
        dataset = sources.open_dataset(self.config.name)
        self._check(dataset)
        self._dataset = dataset
      return self._dataset

  def pipelines(
      self, *, batch_size: int, eval_batch_size: int, seed: int, host: int | None = None, hosts: int | None = None,
  ) -> splits.Data:
    """The set's pipelines; opens nothing.

    Args:
      batch_size: rows of a global training batch.
      eval_batch_size: rows of a global evaluation batch.
      seed: the run's seed.
      host: this host's number and
      hosts: how many there are; by default what JAX says.

    Raises:
      UserError: a value out of range; when opened, data that is missing or does not fit the config.
    """
    config = self.config
    for field, size in ("batch_size", batch_size), ("eval_batch_size", eval_batch_size):
      if size < 1:
        raise UserError(f"--config.{field}={size}: give a positive number")
    evals = {
        split: IndexedPipeline(
            functools.partial(self.open_split, split), self.eval_batch, batch_size=eval_batch_size,
            host=host, hosts=hosts)
        for split in ("validation", "test") if config[split]}
    train = IndexedPipeline(
        functools.partial(self.open_split, "train"), self.train_batch, batch_size=batch_size, seed=seed,
        train=True, host=host, hosts=hosts)
    shapes = {"image": (config.image_shape, np.float32), "mask": ((), np.float32)}
    if self.boxes:
      shapes |= {"boxes": ((config.max_boxes, 4), np.float32), "box_label": ((config.max_boxes,), np.int32),
                 "box_mask": ((config.max_boxes,), np.float32)}
    if self.segmentation:
      shapes["segmentation"] = (config.image_shape[:2], np.int32)
    return splits.Data(
        name=config.name, train=train, evals=evals,
        batch_spec={key: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for key, (shape, dtype) in shapes.items()},
        fingerprint=lambda: self.dataset.fingerprint,
        assets=lambda: {"classes": self.class_names(self._targets[0])})

  def _check(self, dataset: sources.Dataset) -> None:
    config, features = self.config, dataset.features
    is_image = lambda name: len(getattr(features.get(name), "shape", None) or ()) == 3
    has = lambda what: UserError(f"--config.data.name: {config.name} does not have {what}, but "
                                 f"{', '.join(features)}; choose another set")
    if not is_image("image"):
      raise has("an image")
    if self.boxes:
      labels = _object_labels(features)
      if labels is None:
        raise has("objects with bbox and label")
      if labels.num_classes != config.num_classes:
        raise UserError(f"--config.data.num_classes={config.num_classes}: {config.name} has {labels.num_classes} "
                        "classes of objects")
    if self.segmentation and not is_image(config.mask_feature):
      raise UserError(f"--config.data.mask_feature={config.mask_feature}: is no image of {config.name}, which has "
                      f"{', '.join(features)}")
    channels = features["image"].shape[-1]
    if channels not in (None, config.image_shape[-1]):
      raise UserError(f"--config.data.image_shape={tuple(config.image_shape)}: {config.name} has {channels} "
                      f"channel{'s' * (channels > 1)}")
    splits.check_splits(dataset, config)

  def class_names(self, target: str) -> list[str]:
    """The name of each class of a target; opens the set if need be."""
    labels, config = _object_labels(self.dataset.features), self.config
    names = [] if labels is None else list(labels.names)
    if target == "boxes":
      return names
    names = ["ground", *names]
    if config.mask_names or len(names) != config.mask_classes:
      return list(config.mask_names or map(str, range(config.mask_classes)))
    return names

  def open_split(self, split: str, pipeline: IndexedPipeline) -> Examples:
    """Reads a split into memory if it fits, else reads it as it is needed."""
    records = self.dataset.records(self.config[split])
    height, width, channels = self.config.image_shape
    if len(records) * height * width * (channels + self.segmentation) <= labelled.MEMORY_LIMIT:
      blocks = [range(start, min(start + DECODE_AT_ONCE, len(records)))
                for start in range(0, len(records), DECODE_AT_ONCE)]
      read = [example for block in blocks for example in self.read(records[block], split, block)]
      return InMemory({key: np.stack([example[key] for example in read]) for key in read[0]})
    load = lambda indices, plan, rows: self.read(records[indices], split, indices)
    return Streaming(len(records), load, pipeline.plan, lambda plan: plan.rows)

  def read(self, records: Sequence[Mapping[str, Any]], split: str, indices: Sequence[int]) -> list[HostBatch]:
    """Examples on the canvas, decoded and checked; `indices` are their numbers, for messages."""
    config, canvas = self.config, self.config.image_shape[:2]
    images = [labelled.decode_image(record["image"][0], config.image_shape[-1]) for record in records]
    masks = [None] * len(records)
    if self.segmentation:
      masks = [labelled.decode_image(record[config.mask_feature][0], 1) for record in records]
    examples = []
    for index, record, pixels, mask in zip(indices, records, images, masks):
      where = f"--config.data.{split}={config[split]!r}: example {index} of {config.name}"
      place = Placement.of(pixels.shape[:2], canvas, config.resize)
      example = {"image": self._fit(pixels)}
      if self.boxes:
        example |= self._read_boxes(record, pixels.shape[:2], place, where)
      if self.segmentation:
        if mask.shape[:2] != pixels.shape[:2]:
          raise UserError(f"{where}: {config.mask_feature} has {mask.shape[0]}x{mask.shape[1]} pixels and the image "
                          f"{pixels.shape[0]}x{pixels.shape[1]}; mend the set")
        example["segmentation"] = self._fit_mask(mask[..., 0], place, where)
      examples.append(example)
    return examples

  def _read_boxes(
      self, record: Mapping[str, Any], size: Sequence[int], place: Placement, where: str) -> dict[str, np.ndarray]:
    config, (h, w) = self.config, size
    relative = np.asarray(record.get("objects/bbox", ()), np.float64).reshape(-1, 4)  # y0, x0, y1, x1
    boxes = relative[:, [1, 0, 3, 2]] * (w, h, w, h)
    labels = np.asarray(record.get("objects/label", ()), np.int64)
    crowd = np.asarray(record.get("objects/is_crowd", np.zeros(len(labels))), np.float32)
    if len(labels) != len(boxes):
      raise UserError(f"{where}: {len(boxes)} boxes have {len(labels)} labels; mend the set")
    for i in np.flatnonzero((labels < 0) | (labels >= config.num_classes))[:1]:
      raise UserError(f"{where}: box {i} has the label {labels[i]}, outside of 0 to {config.num_classes - 1}; "
                      "mend the set, or choose a split with labels")
    flat = ~np.all(boxes[:, 2:] > boxes[:, :2], axis=1)  # also where a number is none
    outside = np.any((boxes < -SLACK) | (boxes > np.array([w, h, w, h]) + SLACK), axis=1)
    if config.bad_boxes == "refuse":
      for i in np.flatnonzero(flat | outside)[:1]:
        fault = "has no area" if flat[i] else "lies outside of the image"
        raise UserError(f"{where}: box {i} {fault} ({', '.join(f'{v:.4g}' for v in boxes[i])} of {w}x{h} pixels); "
                        "mend the set, or --config.data.bad_boxes=drop")
    good = ~(flat | outside)
    if good.sum() > config.max_boxes:
      raise UserError(f"{where}: there are {good.sum()} boxes; raise --config.data.max_boxes={config.max_boxes}")
    boxes = np.clip(boxes[good], 0, (w, h, w, h))
    boxes = boxes * ([place.across, place.down] * 2) + [place.left, place.top] * 2
    count, pad = len(boxes), config.max_boxes - good.sum()
    fill = lambda values, dtype: np.concatenate([values, np.zeros((pad, *np.shape(values)[1:]))]).astype(dtype)
    return {"boxes": fill(boxes, np.float32), "box_label": fill(labels[good], np.int32),
            "box_mask": fill((crowd[good] == 0) * np.ones(count), np.float32),
            "host/box_crowd": fill(crowd[good], np.float32)}

  def _fit_mask(self, mask: np.ndarray, place: Placement, where: str) -> np.ndarray:
    """u8[h, w] as in the file -> classes on the canvas, u8[H, W]."""
    from PIL import Image

    classes = self._classes[mask]
    if (wrong := classes == _VOID_BYTE).any():
      y, x = np.argwhere(wrong)[0]
      raise UserError(f"{where}: pixel ({x}, {y}) of {self.config.mask_feature} is {mask[y, x]}, the value of no class; "
                      f"see --config.data.mask_classes={self.config.mask_classes} and --config.data.mask_values")
    if classes.shape != (place.height, place.width):
      classes = np.asarray(Image.fromarray(classes).resize((place.width, place.height), Image.Resampling.NEAREST))
    if classes.shape == self.config.image_shape[:2]:
      return classes
    out = np.full(self.config.image_shape[:2], _VOID_BYTE, np.uint8)
    out[place.top:place.top + place.height, place.left:place.left + place.width] = classes
    return out

  def eval_batch(self, examples: Examples, plan: Plan) -> HostBatch:
    return self._finish(examples.gather(plan, plan.rows), plan)

  def train_batch(self, examples: Examples, plan: Plan) -> HostBatch:
    read = self.augment(examples.gather(plan, plan.rows), plan)
    read.pop("host/box_crowd", None)
    return self._finish(read, plan)

  def _finish(self, read: HostBatch, plan: Plan) -> HostBatch:
    ids = plan.indices[plan.rows]
    real = ids >= 0
    batch = {**read, "image": augment.normalise(read["image"], self.config.mean, self.config.std),
             "mask": real.astype(np.float32), "host/id": ids}
    if self.boxes:
      batch["box_mask"] = read["box_mask"] * batch["mask"][:, None]
    if self.segmentation:
      stored = read["segmentation"]
      batch["segmentation"] = np.where((stored == _VOID_BYTE) | ~real[:, None, None], VOID, stored.astype(np.int32))
    return batch

  def augment(self, read: HostBatch, plan: Plan) -> HostBatch:
    """Gives each of the host's rows its window; everything is drawn for the global batch."""
    config, size = self.config, len(plan.indices)
    draw = plan.rng("window")
    scale = np.exp(draw.uniform(*np.log(config.scale), size))[plan.rows]
    shift = draw.integers(-config.shift, config.shift + 1, (size, 2))[plan.rows]
    flips = ((draw.random(size) < 0.5) & config.flip)[plan.rows]
    if config.shift == 0 and tuple(config.scale) == (1, 1) and not config.flip:
      return read
    windows = [Window(s, *map(int, move), bool(flip)) for s, move, flip in zip(scale, shift, flips)]
    fill = np.round(255 * np.asarray(config.mean)).astype(int)  # 0 once it is normalised
    read = {**read, "image": np.stack([w.of_image(x, fill) for w, x in zip(windows, read["image"])])}
    if self.segmentation:
      read["segmentation"] = np.stack([w.of_mask(x) for w, x in zip(windows, read["segmentation"])])
    if self.boxes:
      moved = [w.of_boxes(x, config.image_shape[:2]) for w, x in zip(windows, read["boxes"])]
      seen = np.stack([seen for _, seen in moved])
      read["boxes"] = np.stack([boxes for boxes, _ in moved]) * seen[..., None]
      read["box_mask"] = read["box_mask"] * seen
    return read


@dataclasses.dataclass(frozen=True)
class Window:
  """A part of an image, as large as that, possibly beyond its border.

  Attributes:
    scale: magnification, about the middle.
    right, down: how far the window then moves, in pixels of the original.
    flip: whether it is mirrored at last.
  """

  scale: float
  right: int
  down: int
  flip: bool

  def _line(self, size: int, shift: int) -> tuple[float, float]:
    """(a, b): the window's coordinate X shows the original's a X + b."""
    a = 1 / self.scale
    return a, size / 2 * (1 - a) + shift

  def of_image(self, pixels: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """uint8[H, W, C] -> uint8[H, W, C], bilinear; `fill` [C] lies outside."""
    from PIL import Image

    return self._transform(pixels, Image.Resampling.BILINEAR, tuple(map(int, fill)))

  def of_mask(self, classes: np.ndarray) -> np.ndarray:
    """uint8[H, W] -> uint8[H, W], the nearest pixel."""
    from PIL import Image

    return self._transform(classes[..., None], Image.Resampling.NEAREST, (_VOID_BYTE,))[..., 0]

  def _transform(self, pixels: np.ndarray, resample: int, fill: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    height, width, channels = pixels.shape
    (a, b), (c, d) = self._line(width, self.right), self._line(height, self.down)
    pil = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    out = pil.transform((width, height), Image.Transform.AFFINE, (a, 0, b, 0, c, d), resample,
                        fillcolor=fill[0] if channels == 1 else fill)
    out = np.asarray(out).reshape(pixels.shape)
    return out[:, ::-1] if self.flip else out

  def of_boxes(self, boxes: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes f32[N, 4] in an image of (H, W), cut at the window's border, and which of them are still seen, f32[N]."""
    height, width = size
    (a, b), (c, d) = self._line(width, self.right), self._line(height, self.down)
    whole = (boxes - [b, d, b, d]) / [a, c, a, c]
    if self.flip:
      whole = np.stack([width - whole[:, 2], whole[:, 1], width - whole[:, 0], whole[:, 3]], axis=1)
    cut = np.clip(whole, 0, [width, height] * 2)
    area = lambda x: np.prod(x[:, 2:] - x[:, :2], axis=1)
    seen = area(cut) > LEAST_SEEN * np.maximum(area(whole), 1e-12)
    return cut.astype(np.float32), seen.astype(np.float32)


def _object_labels(features: Mapping[str, Any]) -> Any:
  """TFDS's feature of the labels of objects with boxes; None where there is none."""
  objects = dict(getattr(features.get("objects"), "feature", {}).items())
  return objects["label"] if "bbox" in objects and hasattr(objects.get("label"), "names") else None
