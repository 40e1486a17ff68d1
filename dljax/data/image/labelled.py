"""Labelled images: the config that all experiments in classification share, and its pipelines.

A batch holds image f32[b, H, W, C] (normalised), label, mask and id (see `data/pipeline.py`). The
label is i32[b]; of several classes an image f32[b, C], 1 where it has the class; of T numbers an
image f32[b, T], with mean 0 and standard deviation 1 over the training images. In evaluation it
also holds "host/group/NAME" str[b] for each feature NAME in `config.data.groups`, and under mixup
or CutMix mix_label, the partner's label, and mix_weight f32[b], the weight of the row's own label.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import own, sources, splits
from dljax.data.image import augment, corrupt, decode, folder, typical
from dljax.data.pipeline import (
    Examples, HostBatch, IndexedPipeline, InMemory, Pipeline, Plan, Reprocessed, Streaming, rng)
from dljax.errors import UserError, choose

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded uint8 images of one split; larger splits are streamed
RESIZE = ("pad", "bilinear", "crop")
SAMPLERS = ("shuffle", "balanced")
ASPECT_RATIOS = (3 / 4, 4 / 3)  # the range of random resized crops
GROUP_FEATURES = ("ClassLabel", "Text")  # TFDS's features by whose values examples can be grouped
CROP_ATTEMPTS = 10
DECODE_AT_ONCE = 2048  # number of images


def default_config() -> Group:
  """The fields of `config.data`; 0 and False turn an augmentation off."""
  return Group({
      "name": Field("digits", splits.NAME),
      "folder": Field("", "Your own images in place of a set: a folder with a folder for each class, "
                      "or a table (.csv); see dljax/data/README.md."),
      "labels": Field("class", one_of("What an image has", ("class", "classes", "number"))),
      "file_column": Field("file", "The table's column of files."),
      "label_columns": Field(("label",), "The table's columns of classes or numbers."),
      "split_column": Field("split", "The table's column that says train, validation or test; the "
                            "table need not have it."),
      "shares": Field(own.SHARES, "The shares of train, validation and test, where your own data have "
                      "no splits."),
      **splits.fields("train", "validation", "test"),
      "per_class": Field(0, "The number of examples of each class to train on, drawn by the seed; "
                         "0 is all."),
      "num_classes": Field(10, "The number of classes, or of numbers that an image has."),
      "image_shape": Field((8, 8, 1), "The height, width and channels that the model sees."),
      "groups": Field((), "Features (classes or texts) of the set; an evaluation also reports the "
                      "accuracy for each of their values."),
      "mean": Field((0.3051,), "The mean of each channel, where white is 1."),
      "std": Field((0.3757,), "The standard deviation of each channel, where white is 1."),
      "fitted_to": Field("", "The folder that was looked at when the run started."),
      "classes": Field((), "The names of the classes or numbers of your own data."),
      "class_counts": Field((), "The number of training examples of each class."),
      "num_train_examples": Field(0, "The number of training examples of your own data."),
      "target_mean": Field((), "The mean of each number over the training images."),
      "target_std": Field((), "The standard deviation of each number over the training images."),
      "class_weights": Field((), 'The weights of the classes in the training loss: "balanced", a '
                             "number for each class, or none."),
      "sampler": Field("shuffle", 'The order of training examples: "shuffle", or "balanced", in which '
                       "every class comes equally often."),
      "skip_corrupt": Field(0, "The number of examples that may be left out because they cannot be "
                            "decoded."),
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
  need("labels", config.labels in folder.KINDS, f"choose one of {', '.join(folder.KINDS)}")
  need("labels", config.labels == folder.CLASS or bool(config.folder),
       "goes with a table of your own; name it by --config.data.folder")
  need("sampler", config.sampler in SAMPLERS, f"choose one of {', '.join(SAMPLERS)}")
  need("skip_corrupt", config.skip_corrupt >= 0, "give a positive number, or 0 to skip none")
  if config.classes:
    need("num_classes", config.num_classes == len(config.classes),
         f"there are {len(config.classes)} names in --config.data.classes; give that number")
  own.check_shares(config.shares)
  if config.labels != folder.CLASS:
    instead = f"has no meaning where an image has a {config.labels}; set it to"
    need("per_class", not config.per_class, f"{instead} 0")
  if config.labels == folder.NUMBER:
    need("sampler", config.sampler == "shuffle", f"{instead} shuffle")
    for field in ("mixup", "cutmix"):
      need(field, not config[field], f"{instead} 0")
    need("class_weights", not config.class_weights, "has no meaning where an image has a number")
    for field in ("target_mean", "target_std") if config.fitted_to else ():
      need(field, len(config[field]) == config.num_classes,
           f"give one value for each of {config.num_classes} numbers")
    need("target_std", all(s > 0 for s in config.target_std), "give values above 0")
  class_weights(config)


def class_weights(config: Any) -> tuple[float, ...]:
  """The weight of each class in the training loss, as `config.class_weights` asks for; () if all
  weigh the same.

  "balanced" lets all classes count the same: n / (C n_c), where n_c of n examples are of class c of
  C. If an image has several classes, the weight is that of its having the class, (n - n_c) / n_c.

  Raises:
    UserError: there are not as many numbers as classes, or one is negative or no number; a class
      has no training example.
  """
  given, classes = tuple(config.class_weights), config.num_classes
  need = functools.partial(splits.need, config)
  if not given:
    return ()
  if given != ("balanced",):
    try:
      weights = tuple(float(weight) for weight in given)
    except ValueError:
      weights = (math.nan,)
    need("class_weights", all(0 <= w < math.inf for w in weights) and sum(weights) > 0,
         "write balanced, or a number of at least 0 for each class")
    need("class_weights", len(weights) == classes,
         f"there are {classes} classes; give a number for each")
    return weights
  try:
    counts = np.array([int(count) for count in config.class_counts] or [1] * classes)
  except ValueError:
    counts = np.zeros(0)
  need("class_counts", len(counts) == classes, f"give a whole number for each of {classes} classes")
  for number in np.flatnonzero(counts < 1)[:1]:
    name = repr(config.classes[number]) if config.classes else number
    need("class_weights", False, f"class {name} has no training example; leave it out, or give "
         "numbers")
  if config.labels == folder.CLASSES:
    total = config.num_train_examples or counts.max()
    return tuple(float(w) for w in np.maximum(total - counts, 1) / counts)
  return tuple(float(w) for w in counts.sum() / (classes * counts))


def look_up(config: Any, seed: int, given: Collection[str]) -> dict[str, Any]:
  """Finds, once, what the data decide: of the user's own data see `folder.look_up`; of others the
  number of examples of each class, if the loss needs it.

  Args:
    config: `config.data`.
    seed: the run's seed.
    given: the names of the fields of `config.data` that the user has given.

  Returns:
    Field of `config.data` -> value; {} if there is a folder that does not exist, but what a dry
    run needs is given.

  Raises:
    UserError: the data are missing or cannot be used.
  """
  need = functools.partial(splits.need, config)
  need("labels", config.labels in folder.KINDS, f"choose one of {', '.join(folder.KINDS)}")
  need("sampler", config.sampler in SAMPLERS, f"choose one of {', '.join(SAMPLERS)}")
  # What has no meaning for the labels of own data is not known yet.
  unlabelled = {"labels": folder.CLASS, "classes": (), "class_weights": (), "mixup": 0.0,
                "cutmix": 0.0, "per_class": 0, "sampler": "shuffle"}
  plain = ml_collections.ConfigDict(config)
  plain.update(unlabelled if config.folder else {})
  validate(plain)
  if config.folder:
    if not folder.exists(config):
      needed = [f"--config.data.{field}" for field in ("num_classes", "image_shape")
                if field not in given]
      if needed:
        raise UserError(f"{folder.FLAG}={config.folder}: there is no such folder or table; name "
                        f"one, or for --dry_run without it give {' and '.join(needed)}")
      return {}
    return folder.look_up(config, seed, given)
  if tuple(config.class_weights) != ("balanced",) or "class_counts" in given:
    return {}
  if config.per_class:
    return {"class_counts": (config.per_class,) * config.num_classes}
  images = ImageSet(config)
  labels = _labels(images.dataset.records(config.train), _class_or_none)
  images.check_labels(labels, "train")
  return {"class_counts": tuple(np.bincount(labels, minlength=config.num_classes).tolist())}


class ImageSet(own.FolderSet):
  """What the pipelines of one config share: the opened set, and how its examples become batches.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    super().__init__(config, folder.FLAG)
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
    config = self.config
    label = ((), np.int32) if config.labels == folder.CLASS else (
        (config.num_classes,), np.float32)
    shapes = {"image": (config.image_shape, np.float32), "label": label}
    if self.mixes:
      shapes |= {"mix_label": label, "mix_weight": ((), np.float32)}
    return shapes

  def assets(self) -> dict[str, Any]:
    """See `FolderSet.assets`; also the names of the classes, and what images look like."""
    return super().assets() | {
        "classes": list(self.dataset.features["label"].names),
        typical.ASSET: typical.measure(self.dataset.records(self.config.train), self.config)}

  def open_folder(
      self, trained: Mapping[str, Any] | None,
  ) -> tuple[own.Dataset, dict[str, Any]]:
    """See `FolderSet.open_folder`."""
    classes = self.config.classes or (self.run or {}).get("classes", ())
    return folder.open_folder(self.looked_at, self.config.labels, self.seed, classes, trained)

  def check(self, dataset: Any) -> None:
    """See `DataSet.check`."""
    config = self.config
    if config.folder:
      self._check_own(dataset)
      return
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
    self._check_groups(dataset)
    super().check(dataset)

  def _check_groups(self, dataset: Any) -> None:
    known = {name: feature for name, feature in dataset.features.items()
             if type(feature).__name__ in GROUP_FEATURES}
    if self.config.labels != folder.CLASS:
      del known["label"]  # an image may have several, or none
    for name in self.config.groups:
      if not known:
        raise UserError(f"--config.data.groups={name}: {dataset.name} has nothing to group by; drop "
                        "it, or write --config.data.groups=")
      choose("--config.data.groups", name, known)

  def _check_own(self, dataset: own.Dataset) -> None:
    config, names = self.config, dataset.features["label"].names
    if len(names) != config.num_classes:
      raise UserError(f"--config.data.num_classes={config.num_classes}: {config.folder} has "
                      f"{len(names)} ({own.some(names)})")
    self._check_groups(dataset)
    if not self.foreign:
      super().check(dataset)

  def open_split(self, split: str, pipeline: IndexedPipeline) -> Examples:
    """Reads a split into memory if it fits; otherwise it is streamed from disk."""
    dataset, config = self.dataset, self.config
    self.check_foreign(split)
    records = dataset.records(config[split])
    numbers = np.arange(len(records))  # of the examples in the split
    if config.skip_corrupt:
      numbers = self.sound(split, records)
      records = sources.Subset(records, numbers)
    if split == "train" and config.per_class:
      names = dataset.features["label"].names
      few = few_of_each(records, names, config.per_class, pipeline.seed)
      numbers, records = numbers[few], sources.Subset(records, few)
    if split == "train" and config.sampler == "balanced":
      from dljax.data import balance  # few runs need it

      labels = _labels(records, _class_or_none if config.labels == folder.CLASS else self.label)
      self.check_labels(labels, split, numbers)
      pipeline.order = balance.Balanced(labels, pipeline.seed)
    crops = split == "train" and config.random_resized_crop > 0
    channels, background = config.image_shape[-1], config.background
    stored = (*dataset.features["image"].shape[:2], channels) if crops else config.image_shape
    static = None not in stored
    groups = self.groups if split != "train" else lambda record: {}
    if static and len(records) * math.prod(stored) <= MEMORY_LIMIT:
      fit = (lambda image: image) if crops else functools.partial(decode.fit, config=config)
      naming = functools.partial(self.naming, split, numbers)
      arrays = _decode_all(
          records, channels, background, fit, stored, groups, naming, self.label)
      self.check_labels(arrays["label"], split, numbers)
      return InMemory(arrays, self.crop if crops else None)

    def load(indices: np.ndarray, plan: Plan, rows: np.ndarray) -> list[HostBatch]:
      examples = []
      for index, record in zip(indices, records[indices]):
        with self.naming(split, numbers, index):
          examples.append(decode_record(record, channels, background, self.label)
                          | groups(record))
      self.check_labels([example["label"] for example in examples], split, numbers[indices])
      if crops:
        return [self.crop(example, plan, row) for example, row in zip(examples, rows)]
      return [{**example, "image": decode.fit(example["image"], config)} for example in examples]

    rows = self.rows if split == "train" else lambda plan: plan.rows
    return Streaming(len(records), load, pipeline.plan, rows)

  def label(self, record: Mapping[str, Any]) -> np.ndarray:
    """A record's label, as a batch has it."""
    config, values = self.config, record["label"]
    if config.labels == folder.CLASS:
      return np.int32(values[0])
    if config.labels == folder.NUMBER:
      centred = np.asarray(values, np.float64) - config.target_mean
      return (centred / config.target_std).astype(np.float32)
    return np.isin(np.arange(config.num_classes), values).astype(np.float32)

  def naming(self, split: str, numbers: Sequence[int], index: int) -> Any:
    """A context in which an error names example `numbers[index]` of the split; see `decode`."""
    name = self.config[split]
    mend = decode.MEND_FILE if self.config.folder else (
        f"{decode.MEND_SET}, or skip it by --config.data.skip_corrupt=1")
    return decode.naming(f"--config.data.{split}={name!r}: "
                         f"{self.dataset.example(name, int(numbers[index]))}", mend)

  def sound(self, split: str, records: sources.Records) -> np.ndarray:
    """The numbers of the examples that can be decoded; every example is decoded for that.

    Raises:
      UserError: there are more others than `config.skip_corrupt` allows, over the splits that are
        open; or others than when the run began.
    """
    config, dataset = self.config, self.dataset
    name = config[split]

    def check(number: int, record: Mapping[str, Any]) -> None:
      with self.naming(split, range(len(records)), number):
        decode_record(record, config.image_shape[-1], config.background, self.label)

    return self.skipped.keep(
        split, name, len(records), own.unsound(records, check),
        functools.partial(dataset.example, name), self.skipped_before(split))

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
    if self.config.labels != folder.CLASS:
      return  # they were checked with their table
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


def _labels(records: sources.Records, label: Callable[[Mapping[str, Any]], Any]) -> np.ndarray:
  """The label of each record."""
  found = []
  for start in range(0, len(records), DECODE_AT_ONCE):
    found += map(label, records[range(start, min(start + DECODE_AT_ONCE, len(records)))])
  return np.array(found)


def _class_or_none(record: Mapping[str, Any]) -> int:
  """The class of a record; -1 where it has none."""
  return record["label"][0] if len(record["label"]) else -1


def _class_of(record: Mapping[str, Any]) -> np.ndarray:
  return np.int32(record["label"][0])


def decode_record(
    record: Mapping[str, Any], channels: int, background: int = 0,
    label: Callable[[Mapping[str, Any]], np.ndarray] = _class_of,
) -> HostBatch:
  """The fields image uint8[h, w, channels] and label of a record of `sources.Records`.

  Args:
    record: the record.
    channels: C, 1 or 3.
    background: the grey, from 0 to 255, that shows where the image is transparent.
    label: record -> label; by default the class, i32[].
  """
  return {"image": decode.decode_image(record["image"][0], channels, background),
          "label": label(record)}


def _decode_all(
    records: sources.Records, channels: int, background: int,
    fit: Callable[[np.ndarray], np.ndarray], shape: Sequence[int],
    groups: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]],
    naming: Callable[[int], Any], label: Callable[[Mapping[str, Any]], np.ndarray],
) -> dict[str, np.ndarray]:
  images, labels, grouped = np.empty((len(records), *shape), np.uint8), [], []
  for start in range(0, len(records), DECODE_AT_ONCE):
    rows = range(start, min(start + DECODE_AT_ONCE, len(records)))
    block = records[rows]
    encoded = []
    for row, record in zip(rows, block):
      with naming(row):
        labels.append(label(record))
        grouped.append(groups(record))
        encoded.append(record["image"][0])
    decoded = decode.decode_images(encoded, channels, background)
    for row in rows:
      with naming(row):
        images[row] = fit(next(decoded))
  return {"image": images, "label": np.stack(labels),
          **{name: np.stack([g[name] for g in grouped]) for name in grouped[0]}}
