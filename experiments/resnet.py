"""Residual networks: 18 to 152 layers for ImageNet, 20, 32 and 56 for small images.

  python -m experiments.resnet

Test accuracy of the other presets:

  fashion_mnist  93.70 %, one seed, two shared CPU cores with AVX-512, 33 minutes with other load
  cifar10        not run here; published: 91.25 % (He et al. 2016, table 6)
  imagenet2012   not run here; published: 76.40 % with one crop (Goyal et al. 2017, table 1)

For the emoji, first run `python -m dljax.data.prepare emoji`. For ImageNet, prepare the set with
TFDS (which asks for image-net.org's files), then run
  python -m experiments.resnet --preset=imagenet2012 --data_dir=DIR
"""

from collections.abc import Mapping

import ml_collections

from dljax import errors, launch
from dljax.config import one_of
from dljax.recipes import common, image_classification
from dljax.models import resnet
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "digits": "ResNet-20 on the 8x8 digits that ship inside scikit-learn, at 16x16; offline, minutes.",
    "fashion_mnist": "ResNet-20 on Fashion-MNIST.",
    "cifar10": "ResNet-20 on CIFAR-10, as in He et al. 2016, section 4.2.",
    "emoji": "ResNet-20 on the pictures of a colour font, by their group; a package of Debian or a download.",
    "imagenet2012": "ResNet-50 on ImageNet, with the recipe of Goyal et al. 2017.",
}


def _config(preset: str, variant: str = "resnet20") -> ml_collections.ConfigDict:
  """The fields that all presets share, with the stem for small images."""
  config = image_classification.config(
      "resnet", preset, data=preset, variant=variant, optimizer="nesterov")
  config.model.update({"small_stem": True, "zero_init_residual": False})
  config.optimizer.update({"weight_decay": 5e-4, "warmup_fraction": 0.05})
  return config


def _digits() -> ml_collections.ConfigDict:
  config = _config("digits")
  config.data.update({"image_shape": (16, 16, 1), "resize": "bilinear", "pad_crop": 2})
  config.update({
      "total_steps": 400, "log_every": 10, "eval_every": 100, "checkpoint_every": 200})
  return config


def _fashion_mnist() -> ml_collections.ConfigDict:
  config = _config("fashion_mnist")
  config.data.update({
      "pad_crop": 1, "flip": True, "train": "train[:95%]", "validation": "train[95%:]"})
  config.optimizer.update({"learning_rate": 0.2, "schedule": "linear", "warmup_fraction": 0.2})
  config.update({
      "total_steps": 5000, "log_every": 50, "eval_every": 500, "checkpoint_every": 500})
  return config


def _cifar10() -> ml_collections.ConfigDict:
  config = _config("cifar10")
  config.data.update({"pad_crop": 4, "flip": True})
  config.optimizer.update({
      "name": "momentum", "schedule": "step", "decay_boundaries": (0.5, 0.75),
      "weight_decay": 0.0, "l2": 1e-4, "warmup_fraction": 0.0})
  config.update({
      "total_steps": 64_000, "log_every": 100, "eval_every": 2000, "checkpoint_every": 2000})
  return config


def _emoji() -> ml_collections.ConfigDict:
  config = _config("emoji")
  config.data.image_shape = (32, 32, 3)
  config.optimizer.learning_rate = 0.1
  config.update({
      "total_steps": 1500, "log_every": 25, "eval_every": 150, "checkpoint_every": 150})
  return config


def _imagenet2012() -> ml_collections.ConfigDict:
  config = _config("imagenet2012", "resnet50")
  config.model.update({"small_stem": False, "zero_init_residual": True})
  config.optimizer.update({
      "schedule": "step", "decay_boundaries": (1 / 3, 2 / 3, 8 / 9), "weight_decay": 0.0,
      "l2": 1e-4, "warmup_fraction": 5 / 90})
  config.update({
      "total_steps": 450_360, "batch_size": 256, "eval_batch_size": 256, "log_every": 100,
      "eval_every": 5004, "checkpoint_every": 5004})
  return config


_CONFIGS = {
    "digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10, "emoji": _emoji,
    "imagenet2012": _imagenet2012}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe({
      "variant": one_of("The network", resnet.VARIANTS),
      "small_stem": "Whether the stem suits small images: 3x3, without stride and pooling.",
      "zero_init_residual": "Whether the scale of each block's last norm starts at zero."})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, resnet.VARIANTS)
  model = variant(
      num_classes=config.data.num_classes, small_stem=config.model.small_stem,
      zero_init_residual=config.model.zero_init_residual, dtype=common.dtype(config),
      remat=config.model.remat)
  return image_classification.build(config, model)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, image_classification.resolve)
