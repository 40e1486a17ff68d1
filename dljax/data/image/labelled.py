"""Labelled images: the config that all experiments in classification share, and its pipelines.

A batch holds image f32[b, H, W, C] (normalised), label i32[b], mask and id (see
`data/pipeline.py`). In evaluation it also holds "host/group/NAME" str[b] for each feature NAME in
`config.data.groups`, and under mixup or CutMix mix_label i32[b], the partner's label, and
mix_weight f32[b], the weight of the row's own label.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import sources, splits
from dljax.data.image import augment, corrupt, decode, typical
from dljax.data.pipeline import (
    Examples, HostBatch, IndexedPipeline, InMemory, Pipeline, Plan, Reprocessed, Streaming, rng)
from dljax.errors import UserError, choose

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded uint8 images of one split; larger splits are streamed
RESIZE = ("pad", "bilinear", "crop")
ASPECT_RATIOS = (3 / 4, 4 / 3)  # the range of random resized crops
GROUP_FEATURES = ("ClassLabel", "Text")  # TFDS's features by whose values examples can be grouped
CROP_ATTEMPTS = 10
DECODE_AT_ONCE = 2048  # number of images


def default_config() -> Group:
  """The fields of `config.data`; 0 and False turn an augmentation off."""
  return Group({
      "name": Field("digits", splits.NAME),
      **splits.fields("train", "validation", "test"),
      "per_class": Field(0, "The number of examples of each class to train on, drawn by the seed; "
                         "0 is all."),
      "num_classes": Field(10, "The number of classes."),
      "image_shape": Field((8, 8, 1), "The height, width and channels that the model sees."),
      "groups": Field((), "Features (classes or texts) of the set; an evaluation also reports by "
                      "their values."),
      "mean": Field((0.3051,), "The mean of each channel, where white is 1."),
      "std": Field((0.3757,), "The standard deviation of each channel, where white is 1."),
      "background": Field(0, "The grey, from 0 (black) to 255, that shows where an image is "
                          "transparent."),
      "invert": Field(False, decode.INVERT),
      "resize": Field("pad", one_of('How an image reaches image_shape: "pad" centres it on black, '
                                    'and shrinks it if it is too large, "bilinear" ignores its '
                                    'aspect ratio, "crop" takes the centre', RESIZE)),
      "crop_fraction": Field(0.875, 'The share of the shorter side that resize "crop" takes.'),
      "random_resized_crop": Field(0.0, "The smallest share of the area that a random crop in "
                                   "training takes, 0.08 in the literature; 0 is off."),
      "pad_crop": Field(0, "The pixels by which an image is padded before it is cropped at random "
                        "in training; 0 is off."),
      "flip": Field(False, "Whether images are mirrored at random in training."),
      "randaugment_layers": Field(0, "The number of RandAugment's operations on each image in "
                                  "training; 0 is off."),
      "randaugment_magnitude": Field(9.0, "The strength of RandAugment's operations, at most 30."),
      "color_jitter": Field(0.0, "Brightness, contrast and saturation change in training by "
                            "factors from 1 - x to 1 + x; 0 is off."),
      "cutout": Field(0, "The side, in pixels, of a square that is blanked in training; 0 is off."),
      "mixup": Field(0.0, "Mixup's alpha; with CutMix on too, a coin decides for each batch; 0 "
                     "is off."),
      "cutmix": Field(0.0, "CutMix's alpha; 0 is off."),
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data` against their ranges and each other; raises `UserError`."""
  decode.validate(config)
  need, side = functools.partial(splits.need, config), max(config.image_shape[:2])
  need("per_class", config.per_class >= 0, "give a positive number, or 0 for all")
  need("background", 0 <= config.background <= 255, "give a value from 0 to 255")
  need("resize", config.resize in RESIZE, f"choose one of {', '.join(RESIZE)}")
  need("crop_fraction", 0 < config.crop_fraction <= 1, "give a value above 0 and up to 1")
  need("random_resized_crop", 0 <= config.random_resized_crop <= 1, "give a value from 0 to 1")
  need("color_jitter", 0 <= config.color_jitter <= 1, "give a value from 0 to 1")
  need("randaugment_magnitude", 0 <= config.randaugment_magnitude <= augment.MAX_MAGNITUDE,
       f"give a value from 0 to {augment.MAX_MAGNITUDE:g}")
  for field in ("pad_crop", "cutout", "randaugment_layers", "mixup", "cutmix"):
    need(field, 0 <= config[field] < math.inf, "give 0 or more")
  for field in ("pad_crop", "cutout"):  # above it, nothing of the image would be left
    need(field, config[field] <= side, f"give at most {side}, the image's side")
  need("randaugment_layers", config.randaugment_layers <= augment.MAX_LAYERS,
       f"give at most {augment.MAX_LAYERS}")


class ImageSet(splits.DataSet):
  """What the pipelines of one config share: the opened set, and how its examples become batches.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    super().__init__(config)
    self.mixes = config.mixup > 0 or config.cutmix > 0
    # A streamed step asks once for each row.
    self._crops = functools.lru_cache(maxsize=4)(self._draw_crops)

  def pipelines(self, *, corruptions: Sequence[str] = (), **options: Any) -> splits.Data:
    """See `DataSet.pipelines`.

    Args:
      corruptions: the names in `corrupt.CORRUPTIONS` of those to disturb the test split with.
      **options: the arguments of `DataSet.pipelines`.
    """
    if corruptions and not self.config["test"]:
      raise UserError(
          "--config.eval.corruptions disturbs the test split; name one by --config.data.test")
    data = super().pipelines(**options)

    def disturb(*corruption: Any) -> Reprocessed:
      finish = functools.partial(self.eval_batch, corruption=corruption)
      return Reprocessed(data.evals["test"], finish)

    return dataclasses.replace(data, corruptions={
        name: {strength: disturb(name, strength) for strength in corrupt.STRENGTHS}
        for name in corruptions})

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    return IndexedPipeline(
        functools.partial(self.open_split, split),
        self.train_batch if options["train"] else self.eval_batch, **options)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    shapes = {"image": (self.config.image_shape, np.float32), "label": ((), np.int32)}
    if self.mixes:
      shapes |= {"mix_label": ((), np.int32), "mix_weight": ((), np.float32)}
    return shapes

  def fields(self) -> Mapping[str, Any]:
    """See `DataSet.fields`."""
    return {"assets": lambda: {
        "classes": list(self.dataset.features["label"].names),
        typical.ASSET: typical.measure(self.dataset.records(self.config.train), self.config)}}

  def check(self, dataset: sources.Dataset) -> None:
    """See `DataSet.check`."""
    config = self.config
    classes = getattr(dataset.features.get("label"), "num_classes", None)
    if classes is None or len(getattr(dataset.features.get("image"), "shape", ())) != 3:
      raise UserError(f"--config.data.name: {config.name} does not have an image and a class as "
                      f"its label, but {', '.join(dataset.features)}; choose another set")
    if classes != config.num_classes:
      raise UserError(f"--config.data.num_classes={config.num_classes}: {config.name} has "
                      f"{classes} classes")
    channels, wanted = dataset.features["image"].shape[-1], config.image_shape[-1]
    if channels not in (None, wanted) and (channels, wanted) != (4, 3):
      raise UserError(f"--config.data.image_shape={tuple(config.image_shape)}: {config.name} has "
                      f"{channels} channel{'s' * (channels > 1)}")
    for name in config.groups:
      choose("--config.data.groups", name,
             {name: feature for name, feature in dataset.features.items()
              if type(feature).__name__ in GROUP_FEATURES})
    super().check(dataset)

  def open_split(self, split: str, pipeline: IndexedPipeline) -> Examples:
    """Reads a split into memory if it fits; otherwise it is streamed from disk."""
    dataset, config = self.dataset, self.config
    records = dataset.records(config[split])
    numbers = np.arange(len(records))  # of the examples in the split
    if split == "train" and config.per_class:
      names = dataset.features["label"].names
      numbers = few_of_each(records, names, config.per_class, pipeline.seed)
      records = sources.Subset(records, numbers)
    crops = split == "train" and config.random_resized_crop > 0
    channels, background = config.image_shape[-1], config.background
    stored = (*dataset.features["image"].shape[:2], channels) if crops else config.image_shape
    static = None not in stored
    groups = self.groups if split != "train" else lambda record: {}
    if static and len(records) * math.prod(stored) <= MEMORY_LIMIT:
      fit = (lambda image: image) if crops else functools.partial(decode.fit, config=config)
      naming = functools.partial(self.naming, split, numbers)
      arrays = _decode_all(records, channels, background, fit, stored, groups, naming)
      self.check_labels(arrays["label"], split, numbers)
      return InMemory(arrays, self.crop if crops else None)

    def load(indices: np.ndarray, plan: Plan, rows: np.ndarray) -> list[HostBatch]:
      examples = []
      for index, record in zip(indices, records[indices]):
        with self.naming(split, numbers, index):
          examples.append(decode_record(record, channels, background) | groups(record))
      self.check_labels([example["label"] for example in examples], split, numbers[indices])
      if crops:
        return [self.crop(example, plan, row) for example, row in zip(examples, rows)]
      return [{**example, "image": decode.fit(example["image"], config)} for example in examples]

    rows = self.rows if split == "train" else lambda plan: plan.rows
    return Streaming(len(records), load, pipeline.plan, rows)

  def naming(self, split: str, numbers: Sequence[int], index: int) -> Any:
    """A context in which an error names example `numbers[index]` of the split; see `decode`."""
    return decode.naming(f"--config.data.{split}={self.config[split]!r}: example {numbers[index]} "
                         f"of {self.config.name}")

  def check_labels(
      self, labels: Sequence[int], split: str, indices: Sequence[int] | None = None,
  ) -> None:
    """Raises `UserError` for a label that is no class, such as -1, TFDS's label for "none".

    Args:
      labels: the labels to check.
      split: the split that they come from, for the message.
      indices: the numbers of their examples; by default 0, 1, ...
    """
    classes = self.config.num_classes
    for i in np.flatnonzero((np.asarray(labels) < 0) | (np.asarray(labels) >= classes))[:1]:
      example = i if indices is None else indices[i]
      raise UserError(f"--config.data.{split}={self.config[split]!r}: example {example} has the "
                      f"label {labels[i]}, outside of 0 to {classes - 1}; choose a split with "
                      "labels")

  def groups(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """"host/group/NAME" -> str[], the record's value, for each of `config.data.groups`."""
    found = {}
    for name in self.config.groups:
      value, feature = record[name][0], self.dataset.features[name]
      text = value.decode() if isinstance(value, bytes) else feature.int2str(value)
      found[f"host/group/{name}"] = np.asarray(text)
    return found

  def crop(self, example: HostBatch, plan: Plan, row: int) -> HostBatch:
    """The example with a random resized crop of its image."""
    image = decode.tone(example["image"], self.config)
    area, log_ratio, position = self._crops(plan.seed, plan.step, len(plan.indices))
    box = augment.random_crop_box(*image.shape[:2], area[row], log_ratio[row], position[row])
    return {**example, "image": augment.resize(image, *self.config.image_shape[:2], box)}

  def _draw_crops(
      self, seed: int, step: int, batch_size: int,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = rng(seed, step, "random_resized_crop")
    area = draw.uniform(self.config.random_resized_crop, 1, (batch_size, CROP_ATTEMPTS))
    log_ratio = draw.uniform(*np.log(ASPECT_RATIOS), (batch_size, CROP_ATTEMPTS))
    return area, log_ratio, draw.uniform(size=(batch_size, 2))

  def rows(self, plan: Plan) -> np.ndarray:
    """The rows of the global batch that a host reads: its own and, for mixing, their partners."""
    return np.union1d(plan.rows, _partners(plan)) if self.mixes else plan.rows

  def eval_batch(
      self, examples: Examples, plan: Plan, corruption: tuple[str, int] | None = None,
  ) -> HostBatch:
    """The host's rows, disturbed if `corruption`, a name and a strength, is given."""
    read = examples.gather(plan, plan.rows)
    if corruption:
      read["image"] = corrupt.corrupt(read["image"], *corruption, plan.seed,
                                      plan.indices[plan.rows])
    return read | {"image": augment.normalise(read["image"], self.config.mean, self.config.std)}

  def train_batch(self, examples: Examples, plan: Plan) -> HostBatch:
    rows = self.rows(plan)
    read = examples.gather(plan, rows)
    image, label = self.augment(read["image"], plan, rows), read["label"]
    batch = {}
    if self.mixes:
      own, partner = np.searchsorted(rows, plan.rows), np.searchsorted(rows, _partners(plan))
      image, weight = self.mix(image[own], image[partner], plan)
      batch["mix_label"] = label[partner]
      batch["mix_weight"] = np.full(len(own), weight, np.float32)
      label = label[own]
    return batch | {"image": augment.normalise(image, self.config.mean, self.config.std),
                    "label": label}

  def augment(self, image: np.ndarray, plan: Plan, rows: np.ndarray) -> np.ndarray:
    """Augments some rows of the global batch; random numbers are drawn for the whole batch."""
    config, size = self.config, len(plan.indices)
    if config.pad_crop:
      draw = plan.rng("pad_crop")
      shift = draw.integers(-config.pad_crop, config.pad_crop + 1, (2, size))
      image = augment.pad_and_crop(image, config.pad_crop, *shift[:, rows])
    if config.flip:
      image = augment.flip(image, plan.rng("flip").random(size)[rows] < 0.5)
    if config.randaugment_layers:
      draw, shape = plan.rng("randaugment"), (size, config.randaugment_layers)
      ops = draw.integers(len(augment.RANDAUGMENT_OPS), size=shape)[rows]
      signs = draw.choice([-1, 1], shape)[rows]
      image = np.stack([augment.rand_augment(*row, config.randaugment_magnitude)
                        for row in zip(image, ops, signs)])
    if config.color_jitter:
      draw = plan.rng("color_jitter")
      factors = draw.uniform(1 - config.color_jitter, 1 + config.color_jitter, (3, size))
      image = augment.color_jitter(image, *factors[:, rows])
    if config.cutout:
      sides = np.array(image.shape[1:3])[:, None]
      centres = plan.rng("cutout").integers(sides, size=(2, size))
      fill = 255 * np.asarray(config.mean)
      image = augment.cutout(image, *centres[:, rows], config.cutout, fill)
    return image

  def mix(self, image: np.ndarray, partner: np.ndarray, plan: Plan) -> tuple[np.ndarray, float]:
    """Mixup or CutMix with one weight (and box) for the whole batch, as in the papers' code."""
    config, draw = self.config, plan.rng("mix")
    cut = config.cutmix and (not config.mixup or draw.random() < 0.5)
    weight = draw.beta(*2 * [config.cutmix if cut else config.mixup])
    if not cut:
      return augment.mixup(image, partner, weight), weight
    return augment.cutmix(image, partner,
                          augment.cutmix_box(*image.shape[1:3], weight, *draw.random(2)))


def _partners(plan: Plan) -> np.ndarray:
  """The rows that the host's rows are mixed with; the order of examples is random.

  Rows 0 and 1 are each other's partners, as are 2 and 3, and so on: a host whose devices hold even
  numbers of rows needs no other row. In a batch with an odd number of rows the last row takes the
  one before it, or itself if there is no other.
  """
  partners = plan.rows ^ 1
  return np.where(partners < len(plan.indices), partners, np.maximum(plan.rows - 1, 0))


def few_of_each(
    records: sources.Records, names: Sequence[str], count: int, seed: int,
) -> np.ndarray:
  """The ascending positions of `count` records of each class: the first ones in a random order.

  Args:
    records: the records of the split; no more are read than necessary.
    names: the names of the classes.
    count: the number of records of each class.
    seed: the run's seed, which draws the order.

  Raises:
    UserError: a class has fewer records, or a label is no class.
  """
  order = rng(seed, 0, "per_class").permutation(len(records))
  chosen = [[] for _ in names]
  for start in range(0, len(order), DECODE_AT_ONCE):
    block = order[start:start + DECODE_AT_ONCE]
    for index, record in zip(block, records[block]):
      label = record["label"][0] if len(record["label"]) else -1
      if not 0 <= label < len(names):
        raise UserError(f"--config.data.train: example {index} has the label {label}, outside of "
                        f"0 to {len(names) - 1}; choose a split with labels")
      if len(of_class := chosen[label]) < count:
        of_class.append(index)
    if all(len(of_class) == count for of_class in chosen):
      return np.sort(np.concatenate(chosen))
  name, least = min(zip(names, map(len, chosen)), key=lambda pair: pair[1])
  raise UserError(f"--config.data.per_class={count}: of {name!r} there are only {least} training "
                  "examples; make it smaller, or 0 to take all")


def decode_record(record: Mapping[str, Any], channels: int, background: int = 0) -> HostBatch:
  """The fields image uint8[h, w, channels] and label i32[] of a record of `sources.Records`."""
  return {"image": decode.decode_image(record["image"][0], channels, background),
          "label": np.int32(record["label"][0])}


def _decode_all(
    records: sources.Records, channels: int, background: int,
    fit: Callable[[np.ndarray], np.ndarray], shape: Sequence[int],
    groups: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]],
    naming: Callable[[int], Any],
) -> dict[str, np.ndarray]:
  images, labels = np.empty((len(records), *shape), np.uint8), np.empty(len(records), np.int32)
  grouped = []
  for start in range(0, len(records), DECODE_AT_ONCE):
    rows = range(start, min(start + DECODE_AT_ONCE, len(records)))
    block = records[rows]
    encoded = []
    for row, record in zip(rows, block):
      with naming(row):
        labels[row] = record["label"][0]
        grouped.append(groups(record))
        encoded.append(record["image"][0])
    decoded = decode.decode_images(encoded, channels, background)
    for row in rows:
      with naming(row):
        images[row] = fit(next(decoded))
  return {"image": images, "label": labels,
          **{name: np.stack([g[name] for g in grouped]) for name in grouped[0]}}
