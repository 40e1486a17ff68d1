"""Vision transformers: Ti, S, B and L for ImageNet, and a small form.

  python -m experiments.vit

Test accuracy of the other presets:

  fashion_mnist  91.14 %, one seed, two shared CPU cores with AVX-512, 49 minutes with other load,
                 before attention and GELU were those of dljax/ops
  cifar10        not run here
  imagenet2012   not run here; published: 76.5 % (ViT-S/16, 90 epochs, Beyer et al. 2022)

For ImageNet, prepare the set with TFDS (which asks for image-net.org's files), then run
  python -m experiments.vit --preset=imagenet2012 --data_dir=DIR
The recipe is that of Beyer et al. 2022 (https://arxiv.org/abs/2205.01580, "Better plain ViT
baselines for ImageNet-1k") for 90 epochs. Its authors wrote the first paper too, which trains on
more images before ImageNet.
"""

from collections.abc import Mapping

import ml_collections

from dljax import errors, launch
from dljax.config import ModelConfig, one_of
from dljax.recipes import common, image_classification
from dljax.errors import UserError
from dljax.models import vit
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "digits": "ViT's small form on the 8x8 digits that ship inside scikit-learn, at 16x16; offline, minutes.",
    "fashion_mnist": "ViT's small form on Fashion-MNIST.",
    "cifar10": "ViT's small form on CIFAR-10.",
    "imagenet2012": "ViT-S/16 on ImageNet, after Beyer et al. 2022.",
}


def _config(
    preset: str, variant: str = "vit_nano", patch_size: int = 4,
) -> ml_collections.ConfigDict:
  """The fields that all presets share."""
  config = image_classification.config(
      "vit", preset, data=preset, variant=variant, optimizer="adamw")
  config.model.update({
      "patch_size": patch_size, "pool": "token", "positions": "learned", "dropout": 0.0,
      "stochastic_depth": 0.0})
  config.optimizer.update({
      "learning_rate": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0, "warmup_fraction": 0.1})
  return config


def _digits() -> ml_collections.ConfigDict:
  config = _config("digits")
  config.data.update({"image_shape": (16, 16, 1), "resize": "bilinear"})
  config.optimizer.learning_rate = 2e-3
  config.update({
      "total_steps": 600, "log_every": 10, "eval_every": 100, "checkpoint_every": 200})
  return config


def _fashion_mnist() -> ml_collections.ConfigDict:
  config = _config("fashion_mnist")
  config.data.update({
      "pad_crop": 1, "flip": True, "train": "train[:95%]", "validation": "train[95%:]"})
  config.model.update({"pool": "mean", "positions": "sincos"})
  # Batches are small because in so short a training the number of steps counts.
  config.update({
      "total_steps": 15_000, "batch_size": 64, "log_every": 100, "eval_every": 1000,
      "checkpoint_every": 1000})
  return config


def _cifar10() -> ml_collections.ConfigDict:
  config = _config("cifar10")
  config.data.update({"pad_crop": 4, "flip": True})
  config.model.stochastic_depth = 0.1
  config.update({
      "total_steps": 70_400, "log_every": 100, "eval_every": 1760, "checkpoint_every": 1760})
  return config


def _imagenet2012() -> ml_collections.ConfigDict:
  config = _config("imagenet2012", "vit_s16", 16)
  config.data.update({
      "random_resized_crop": 0.05, "randaugment_layers": 2, "randaugment_magnitude": 10.0,
      "mixup": 0.2})
  config.model.update({"pool": "mean", "positions": "sincos"})
  config.optimizer.update({"weight_decay": 0.1, "warmup_fraction": 10_000 / 112_590})
  config.update({
      "total_steps": 112_590, "batch_size": 1024, "eval_batch_size": 256, "log_every": 100,
      "eval_every": 1251, "checkpoint_every": 1251})
  return config


_CONFIGS = {
    "digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10,
    "imagenet2012": _imagenet2012}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe({
      "variant": one_of("The network", vit.VARIANTS),
      "patch_size": "The side of a patch, in pixels.",
      "pool": one_of("What the head sees", vit.POOLS),
      "positions": one_of("The kind of position embeddings", vit.POSITIONS),
      "dropout": "The probability of dropping a value after the positions and each layer in training.",
      "stochastic_depth": "The last block's rate of stochastic depth; the rates grow from 0."})
  config.model = ModelConfig(config.model, {
      name: {"patch_size": variant(num_classes=1).patch_size}
      for name, variant in vit.VARIANTS.items()})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, vit.VARIANTS)
  model = config.model
  for field, known in (("pool", vit.POOLS), ("positions", vit.POSITIONS)):
    if model[field] not in known:
      raise errors.unknown(f"--config.model.{field}", model[field], known)
  common.check_model(model)
  sides = config.data.image_shape[:2]
  if model.patch_size < 1 or any(side % model.patch_size for side in sides):
    raise UserError(f"--config.model.patch_size={model.patch_size}: must divide the images' sides, "
                    f"{sides[0]}x{sides[1]} pixels")
  network = variant(num_classes=config.data.num_classes, patch_size=model.patch_size,
                    pool=model.pool, positions=model.positions, dropout=model.dropout,
                    stochastic_depth=model.stochastic_depth, dtype=common.dtype(config),
                    remat=model.remat)
  return image_classification.build(config, network)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, image_classification.resolve)
