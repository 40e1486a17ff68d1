"""EfficientNet: b0 to b7 for ImageNet, and a small form.

  python -m experiments.efficientnet

Test accuracy of the other presets:

  fashion_mnist  93.62 %, one seed, two shared CPU cores with AVX-512, 29 minutes with other load
  cifar10        not run here; published for training from scratch on CIFAR-10: none
  imagenet2012   not run here; published: 77.1 % with one crop (Tan and Le 2019, table 2)

For ImageNet, prepare the set with TFDS (which asks for image-net.org's files), then run
  python -m experiments.efficientnet --preset=imagenet2012 --data_dir=DIR
The paper augments with AutoAugment; here only crops and flips are random.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from dljax import errors, launch
from dljax.config import ModelConfig, one_of
from dljax.recipes import common, image_classification
from dljax.errors import UserError
from dljax.models import efficientnet
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "digits": "EfficientNet's small form on the 8x8 digits that ship inside scikit-learn, at 16x16; offline, minutes.",
    "fashion_mnist": "EfficientNet's small form on Fashion-MNIST.",
    "cifar10": "EfficientNet-B0 with fewer strides on CIFAR-10.",
    "imagenet2012": "EfficientNet-B0 on ImageNet, with the recipe of Tan and Le 2019.",
}


def _config(preset: str, variant: str) -> ml_collections.ConfigDict:
  """The fields that the presets for small images share."""
  config = image_classification.config(
      "efficientnet", preset, data=preset, variant=variant, optimizer="nesterov")
  config.model.update({
      "stem_stride": 1, "strides": (1, 2, 2, 1), "dropout": 0.2, "stochastic_depth": 0.1})
  config.optimizer.update({"learning_rate": 0.2, "weight_decay": 5e-4, "warmup_fraction": 0.1})
  return config


def _digits() -> ml_collections.ConfigDict:
  config = _config("digits", "efficientnet_nano")
  config.data.update({"image_shape": (16, 16, 1), "resize": "bilinear", "pad_crop": 2})
  config.update({
      "total_steps": 400, "log_every": 10, "eval_every": 100, "checkpoint_every": 200})
  return config


def _fashion_mnist() -> ml_collections.ConfigDict:
  config = _config("fashion_mnist", "efficientnet_nano")
  config.data.update({
      "pad_crop": 1, "flip": True, "train": "train[:95%]", "validation": "train[95%:]"})
  config.update({
      "total_steps": 5000, "log_every": 50, "eval_every": 500, "checkpoint_every": 500})
  return config


def _cifar10() -> ml_collections.ConfigDict:
  config = _config("cifar10", "efficientnet_b0")
  config.data.update({"pad_crop": 4, "flip": True})
  config.model.update({"strides": (1, 1, 2, 2, 1, 2, 1), "stochastic_depth": 0.2})
  config.update({
      "total_steps": 70_400, "log_every": 100, "eval_every": 1760, "checkpoint_every": 1760})
  return config


def _imagenet2012() -> ml_collections.ConfigDict:
  config = _config("imagenet2012", "efficientnet_b0")
  config.model.update({
      "stem_stride": 2, "strides": (1, 2, 2, 2, 1, 2, 1), "stochastic_depth": 0.2,
      "label_smoothing": 0.1})
  config.optimizer.update({
      "name": "rmsprop", "learning_rate": 0.128, "momentum": 0.9, "b2": 0.9, "eps": 1e-3,
      "schedule": "exponential", "end_factor": 0.97 ** (350 / 2.4), "weight_decay": 0.0,
      "l2": 1e-5, "warmup_fraction": 5 / 350})
  config.update({
      "total_steps": 217_000, "batch_size": 2048, "eval_batch_size": 256, "log_every": 100,
      "eval_every": 6200, "checkpoint_every": 6200})
  return config


_CONFIGS = {
    "digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10,
    "imagenet2012": _imagenet2012}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe({
      "variant": one_of("The network", efficientnet.VARIANTS),
      "stem_stride": "The stride of the first convolution.",
      "strides": "The stride of each stage.",
      "dropout": "The probability of dropping a feature that the head sees, in training.",
      "stochastic_depth": "The last block's rate of stochastic depth; the rates grow from 0."})
  config.model = ModelConfig(
      config.model, {name: _decided(name, config.model) for name in efficientnet.VARIANTS})
  return config


def _decided(variant: str, model: ml_collections.ConfigDict) -> dict[str, Any]:
  """The fields that `variant` decides. A preset's strides stay where the number of stages does."""
  network = efficientnet.VARIANTS[variant](num_classes=1)
  same = len(model.strides) == len(network.stages)
  return {
      "dropout": network.dropout, "stochastic_depth": network.stochastic_depth,
      "stem_stride": model.stem_stride if same else network.stem_stride,
      "strides": model.strides if same else tuple(stage.stride for stage in network.stages)}


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, efficientnet.VARIANTS)
  model = config.model
  common.check_model(model)
  for field, strides in (("stem_stride", (model.stem_stride,)), ("strides", model.strides)):
    if any(stride not in (1, 2) for stride in strides):
      raise UserError(f"--config.model.{field}={model[field]}: a stride must be 1 or 2")
  network = variant(num_classes=config.data.num_classes, stem_stride=model.stem_stride,
                    strides=tuple(model.strides), dropout=model.dropout,
                    stochastic_depth=model.stochastic_depth, dtype=common.dtype(config),
                    remat=model.remat)
  if len(network.strides) != len(network.stages):
    raise UserError(f"--config.model.strides={model.strides}: must be {len(network.stages)} numbers, one for each "
                    f"stage of {model.variant}")
  return image_classification.build(config, network)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, image_classification.resolve)
