"""The experiment that all image classifiers share, from a config and a model.

Its images have a class each. With a table of the user's own they may also have several classes, or
numbers; see `config.data.labels`.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import ml_collections

from dljax import optim
from dljax.config import Field, Group, base_config, one_of
from dljax.data.image import corrupt, decode, folder, labelled, typical
from dljax.errors import UserError
from dljax.recipes import common
from dljax.tasks import classification
from dljax.tasks.base import Task
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the sets that presets use. Mean and std are those of
# the training split.
DATA = {
    "digits": {"name": "digits", "image_shape": (8, 8, 1), "mean": (0.3051,), "std": (0.3757,)},
    "mnist": {"name": "mnist", "image_shape": (28, 28, 1), "mean": (0.1307,), "std": (0.3081,),
              "train": "train[:90%]", "validation": "train[90%:]"},
    "fashion_mnist": {"name": "fashion_mnist", "image_shape": (28, 28, 1), "mean": (0.2860,),
                      "std": (0.3530,), "train": "train[:90%]", "validation": "train[90%:]"},
    "cifar10": {"name": "cifar10", "image_shape": (32, 32, 3), "mean": (0.4914, 0.4822, 0.4465),
                "std": (0.2470, 0.2435, 0.2616), "train": "train[:90%]",
                "validation": "train[90%:]"},
    "emoji": {"name": "emoji", "image_shape": (64, 64, 3), "num_classes": 9,
              "mean": (0.8148, 0.7660, 0.7229), "std": (0.2925, 0.2980, 0.3324),
              "background": 255, "resize": "bilinear", "random_resized_crop": 0.5, "flip": True,
              "color_jitter": 0.2},
    "imagenet2012": {"name": "imagenet2012", "image_shape": (224, 224, 3), "num_classes": 1000,
                     "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
                     "resize": "crop", "train": "train[:99%]", "validation": "train[99%:]",
                     "test": "validation", "random_resized_crop": 0.08, "flip": True},
}


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of an image classifier's config, for the preset to change.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = labelled.default_config()
  data_config.update(DATA[data])
  config = base_config(
      family, preset, task="image_classification",
      monitor="validation/accuracy", optimizer=optim.default_config(optimizer),
      model=Group({
          **common.model_fields(variant),
          "label_smoothing": Field(0.0, "The share of the target that all classes get alike.")}),
      data=data_config)
  config.eval.describe({"corruptions": one_of(
      'The corruptions of the test images in a final evaluation, "" for none, or names separated '
      "by commas", ["all", *corrupt.CORRUPTIONS])})
  return config


def build(
    config: ml_collections.ConfigDict, model: nn.Module, criterion: str = "softmax",
) -> Experiment:
  """The experiment that trains `model` on the images of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: called as `model(image, mask, train=...)`, gives logits [B, num_classes].
    criterion: the loss, see `Classification`.
  """
  data = labelled.ImageSet(config.data).pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed,
      corruptions=corrupt.parse(config.eval.corruptions))
  return Experiment(
      task=_task(config, model, criterion), data=data, config=config,
      monitor=config.monitor or None, read=functools.partial(_read, config),
      show=functools.partial(_show, config.data.labels), saw=functools.partial(
          common.saw_images, functools.partial(typical.pixels, config=config.data)))


def resolve(config: ml_collections.ConfigDict, given: Collection[str]) -> dict[str, Any]:
  """Looks up what the user's own images decide; see `launch.main`.

  Args:
    config: the config, with the user's overrides.
    given: the names of the fields that the user has given.

  Returns:
    Field -> value.

  Raises:
    UserError: the data are missing or cannot be used.
  """
  if "folder" not in config.data:  # points have no files
    return {}
  own = {name.removeprefix("data.") for name in given if name.startswith("data.")}
  found = {f"data.{field}": value
           for field, value in labelled.look_up(config.data, config.seed, own).items()}
  kind = found.get("data.labels", config.data.labels)
  if kind != folder.CLASS:  # what presets say of classes has no meaning
    found |= {"monitor": f"validation/{_MONITOR[kind]}"}
    if kind == folder.NUMBER:
      found |= {field: 0.0 for field in ("data.mixup", "data.cutmix", "model.label_smoothing")
                if config[field.partition(".")[0]][field.partition(".")[2]]}
  if config.data.folder and not found.get("data.validation", config.data.validation):
    found["monitor"] = ""
  return {field: value for field, value in found.items() if field not in given}


_MONITOR = {folder.CLASSES: "mean_average_precision", folder.NUMBER: "mae"}


def _task(config: ml_collections.ConfigDict, model: nn.Module, criterion: str) -> Task:
  """The task that fits the labels of the images."""
  data, smoothing = config.data, config.model.label_smoothing
  if data.labels == folder.CLASS:
    return classification.Classification(
        model=model, num_classes=data.num_classes, groups=tuple(data.groups),
        label_smoothing=smoothing, criterion=criterion,
        class_weights=labelled.class_weights(data))
  if criterion != "softmax":
    raise UserError(f"--config.model.criterion={criterion}: has no meaning for "
                    f"--config.data.labels={data.labels}; write softmax")
  if data.labels == folder.CLASSES:
    from dljax.tasks import multilabel  # of labels from a table alone, as regression is

    return multilabel.MultiLabel(
        model=model, num_classes=data.num_classes, label_smoothing=smoothing,
        groups=tuple(data.groups), class_weights=labelled.class_weights(data))
  if data.groups:
    raise UserError("--config.data.groups: numbers have no accuracy to report by group; drop it")
  if smoothing:
    raise UserError(f"--config.model.label_smoothing={smoothing}: has no meaning for numbers; set "
                    "it to 0")
  from dljax.tasks import regression

  count = data.num_classes
  return regression.Regression(
      model=model, mean=tuple(data.target_mean) or (0.0,) * count,
      std=tuple(data.target_std) or (1.0,) * count)


def _read(config: ml_collections.ConfigDict, request: Request, assets: Assets) -> Inputs:
  """Reads the user's images; see `decode.encode`."""
  common.check_request(request, config.family, ["paths"])
  batch, names, skipped = decode.encode(request.paths, config.data, config.data.background)
  return Inputs(batch, names, skipped,
                typical.warnings(batch["image"], names, config.data, assets))


def _show(
    kind: str, inputs: Inputs, predictions: Any, assets: Assets,
) -> Iterator[Mapping[str, Any]]:
  """The rows of predictions for images that have labels of this kind."""
  del inputs
  if kind == folder.CLASS:
    return classification.decode(predictions, assets)
  from dljax.tasks import multilabel, regression

  return (multilabel if kind == folder.CLASSES else regression).decode(predictions, assets)
