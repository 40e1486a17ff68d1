"""VGG: eleven to nineteen layers, with and without batch normalisation.

  python -m experiments.vgg

Test accuracy of the other presets:

  fashion_mnist  93.82 %, one seed, two shared CPU cores with AVX-512, 29 minutes with other load,
                 when the narrow linear layers still started with a deviation of 0.01
  cifar10        not run here; published: 93.25 % (VGG-16 with batch normalisation, Li et al. 2017,
                 table 1)
  imagenet2012   not run here; published: 71.59 % with one crop (torchvision's weights), 73.0 % of
                 whole images at one scale, as trained (Simonyan and Zisserman 2014, table 3, D,
                 256)

For ImageNet, prepare the set with TFDS (which asks for image-net.org's files), then run
  python -m experiments.vgg --preset=imagenet2012 --data_dir=DIR
The paper scales images and crops 224 pixels; here crops have random sizes and shapes (Szegedy et
al. 2015). The paper starts from a trained vgg11; here all layers start at random.
"""

from collections.abc import Mapping

import ml_collections

from dljax import errors, launch
from dljax.config import one_of
from dljax.recipes import common, image_classification
from dljax.errors import UserError
from dljax.models import vgg
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "digits": "VGG-11's small form on the 8x8 digits that ship inside scikit-learn, at 16x16; offline, minutes.",
    "fashion_mnist": "VGG-13's small form with batch normalisation on Fashion-MNIST.",
    "cifar10": "VGG-16 with batch normalisation on CIFAR-10.",
    "imagenet2012": "VGG-16 on ImageNet, with the recipe of Simonyan and Zisserman 2014.",
}


def _config(preset: str, variant: str) -> ml_collections.ConfigDict:
  """The fields that the presets for small images share."""
  config = image_classification.config(
      "vgg", preset, data=preset, variant=variant, optimizer="nesterov")
  config.model.update({
      "num_pools": 3, "width_factor": 0.5, "pooled_size": 1, "hidden_width": 256,
      "dropout": 0.5})
  config.optimizer.update({"learning_rate": 0.1, "weight_decay": 5e-3, "warmup_fraction": 0.1})
  return config


def _digits() -> ml_collections.ConfigDict:
  config = _config("digits", "vgg11_bn")
  config.data.update({"image_shape": (16, 16, 1), "resize": "bilinear", "pad_crop": 2})
  config.model.width_factor = 0.25
  config.update({
      "total_steps": 800, "log_every": 20, "eval_every": 200, "checkpoint_every": 400})
  return config


def _fashion_mnist() -> ml_collections.ConfigDict:
  config = _config("fashion_mnist", "vgg13_bn")
  config.data.update({
      "pad_crop": 1, "flip": True, "train": "train[:95%]", "validation": "train[95%:]"})
  config.update({
      "total_steps": 5000, "log_every": 50, "eval_every": 500, "checkpoint_every": 500})
  return config


def _cifar10() -> ml_collections.ConfigDict:
  config = _config("cifar10", "vgg16_bn")
  config.data.update({"pad_crop": 4, "flip": True})
  config.model.update({"num_pools": 5, "width_factor": 1.0, "hidden_width": 512})
  config.update({
      "total_steps": 70_400, "log_every": 100, "eval_every": 1760, "checkpoint_every": 1760})
  return config


def _imagenet2012() -> ml_collections.ConfigDict:
  config = _config("imagenet2012", "vgg16")
  config.model.update({
      "num_pools": 5, "width_factor": 1.0, "pooled_size": 7, "hidden_width": 4096})
  config.optimizer.update({
      "name": "momentum", "learning_rate": 0.01, "schedule": "constant", "plateau_factor": 0.1,
      "plateau_patience": 5, "weight_decay": 0.0, "l2": 5e-4, "warmup_fraction": 0.0})
  config.update({
      "total_steps": 370_000, "batch_size": 256, "eval_batch_size": 256, "log_every": 100,
      "eval_every": 4954, "checkpoint_every": 4954})
  return config


_CONFIGS = {
    "digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10,
    "imagenet2012": _imagenet2012}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe({
      "variant": one_of("The network", vgg.VARIANTS),
      "num_pools": "The number of stages, from the first on, that end with pooling.",
      "width_factor": "The factor on the channels of all stages.",
      "pooled_size": "The height and width that the last map is averaged to.",
      "hidden_width": "The number of units of each hidden fully connected layer.",
      "dropout": "The probability of dropping a hidden unit in training."})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, vgg.VARIANTS)
  model = config.model
  common.check_model(model)
  if not 0 <= model.num_pools <= len(vgg.WIDTHS):
    raise UserError(f"--config.model.num_pools={model.num_pools}: must be from 0 to {len(vgg.WIDTHS)}")
  network = variant(num_classes=config.data.num_classes, num_pools=model.num_pools,
                    width_factor=model.width_factor, pooled_size=model.pooled_size,
                    hidden_width=model.hidden_width, dropout=model.dropout,
                    dtype=common.dtype(config), remat=model.remat)
  return image_classification.build(config, network)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, image_classification.resolve)
