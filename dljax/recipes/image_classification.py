"""The experiment that all image classifiers share, from a config and a model."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import ml_collections

from dljax import optim
from dljax.config import Field, Group, base_config, one_of
from dljax.data.image import corrupt, decode, labelled, typical
from dljax.recipes import common
from dljax.tasks import classification
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
  task = classification.Classification(
      model=model, num_classes=config.data.num_classes,
      label_smoothing=config.model.label_smoothing, criterion=criterion,
      groups=tuple(config.data.groups))
  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None,
      read=functools.partial(_read, config), show=_show,
      saw=functools.partial(
          common.saw_images, functools.partial(typical.pixels, config=config.data)))


def _read(config: ml_collections.ConfigDict, request: Request, assets: Assets) -> Inputs:
  """Reads the user's images; see `decode.encode`."""
  common.check_request(request, config.family, ["paths"])
  batch, names, skipped = decode.encode(request.paths, config.data, config.data.background)
  return Inputs(batch, names, skipped,
                typical.warnings(batch["image"], names, config.data, assets))


def _show(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[Mapping[str, Any]]:
  del inputs
  return classification.decode(predictions, assets)
