"""AlexNet: the network of 2012 as torchvision has it ("alexnet") and as the paper has it
("alexnet_2012").

  python -m experiments.alexnet

Test accuracy of the other presets:

  fashion_mnist  92.66 %, one seed, two shared CPU cores with AVX-512, 49 minutes with other load
  cifar10        not run here
  imagenet2012   not run here; published: 56.52 % with one crop (torchvision's weights), 59.3 %
                 with five crops and reflections (Krizhevsky et al. 2012, table 2, "1 CNN")

For ImageNet, prepare the set with TFDS (which asks for image-net.org's files), then run
  python -m experiments.alexnet --preset=imagenet2012 --data_dir=DIR
The paper crops 224 pixels out of 256 and shifts colours along their principal components; here
crops have random sizes and shapes (Szegedy et al. 2015).
"""

from collections.abc import Mapping

import ml_collections

from dljax import errors, launch
from dljax.config import one_of
from dljax.recipes import common, image_classification
from dljax.errors import UserError
from dljax.models import alexnet
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "digits": "AlexNet's small form on the 8x8 digits that ship inside scikit-learn, at 28x28; offline, minutes.",
    "fashion_mnist": "AlexNet's small form on Fashion-MNIST.",
    "cifar10": "AlexNet with a small stem on CIFAR-10.",
    "imagenet2012": "AlexNet on ImageNet, with the recipe of Krizhevsky et al. 2012.",
}


def _config(preset: str) -> ml_collections.ConfigDict:
  """The fields that the presets for small images share."""
  config = image_classification.config(
      "alexnet", preset, data=preset, variant="alexnet", optimizer="adamw")
  config.model.update({
      "stem": (5, 1, 2), "width_factor": 0.5, "pooled_size": 2, "hidden_width": 1024,
      "dropout": 0.5})
  config.optimizer.update({"learning_rate": 1e-3, "weight_decay": 0.05, "warmup_fraction": 0.1})
  return config


def _digits() -> ml_collections.ConfigDict:
  config = _config("digits")
  config.data.update({"image_shape": (28, 28, 1), "resize": "bilinear", "pad_crop": 3})
  config.model.update({"width_factor": 0.25, "hidden_width": 512})
  config.update({
      "total_steps": 400, "log_every": 10, "eval_every": 100, "checkpoint_every": 200})
  return config


def _fashion_mnist() -> ml_collections.ConfigDict:
  config = _config("fashion_mnist")
  config.data.update({
      "pad_crop": 1, "flip": True, "train": "train[:95%]", "validation": "train[95%:]"})
  config.update({
      "total_steps": 10_000, "log_every": 50, "eval_every": 500, "checkpoint_every": 500})
  return config


def _cifar10() -> ml_collections.ConfigDict:
  config = _config("cifar10")
  config.data.update({"pad_crop": 4, "flip": True})
  config.model.update({"width_factor": 1.0, "pooled_size": 3})
  config.update({
      "total_steps": 35_200, "log_every": 100, "eval_every": 1760, "checkpoint_every": 1760})
  return config


def _imagenet2012() -> ml_collections.ConfigDict:
  config = _config("imagenet2012")
  config.model.update({
      "stem": (11, 4, 2), "width_factor": 1.0, "pooled_size": 6, "hidden_width": 4096})
  config.optimizer.update({
      "name": "momentum", "momentum": 0.9, "learning_rate": 0.01, "schedule": "constant",
      "plateau_factor": 0.1, "plateau_patience": 5, "weight_decay": 0.0, "l2": 5e-4,
      "warmup_fraction": 0.0})
  config.update({
      "total_steps": 891_810, "log_every": 100, "eval_every": 9909, "checkpoint_every": 9909})
  return config


_CONFIGS = {
    "digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10,
    "imagenet2012": _imagenet2012}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe({
      "variant": one_of("The network", alexnet.VARIANTS),
      "stem": "The kernel size, stride and padding of the first convolution.",
      "width_factor": "The factor on the channels of all convolutions.",
      "pooled_size": "The height and width that the last map is averaged to.",
      "hidden_width": "The number of units of each hidden fully connected layer.",
      "dropout": "The probability of dropping a hidden unit in training."})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, alexnet.VARIANTS)
  model = config.model
  common.check_model(model)
  if len(model.stem) != 3 or min(model.stem[:2]) < 1 or not 0 <= model.stem[2] < model.stem[0]:
    raise UserError(f"--config.model.stem={model.stem}: give kernel, stride and a padding below the kernel, as 5,1,2")
  network = variant(
      num_classes=config.data.num_classes, stem=model.stem, width_factor=model.width_factor,
      pooled_size=model.pooled_size, hidden_width=model.hidden_width, dropout=model.dropout,
      dtype=common.dtype(config), remat=model.remat)
  return image_classification.build(config, network)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, image_classification.resolve)
