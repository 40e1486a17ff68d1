"""A stack of layers shaped as EfficientNet-B0, to measure depthwise convolution and squeeze-and-excitation with.

Mingxing Tan, Quoc V. Le. "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019.
https://arxiv.org/abs/1905.11946, table 1. Without dropout and stochastic depth.

Dimensions: `B` batch, `H` height, `W` width, `C` channels.
"""


import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from dljax import image_classification
from dljax.models.layers import BatchNorm, Conv
from dljax.train.experiment import Experiment

PRESETS = {"b0": "16 images of 128x128 pixels, ten classes."}

STAGES = (  # expansion, kernel, stride of the first block, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class Stack(nn.Module):
  """4,020,358 parameters at ten classes."""

  num_classes: int

  @nn.compact
  def __call__(self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
    """[B, H, W, C] -> logits [B, num_classes]; `mask` f32[B] is 0 where a row is padding."""

    def convolve(x, features, kernel=1, stride=1, groups=1, act=nn.silu):
      x = Conv(features, (kernel, kernel), strides=stride, padding=kernel // 2, feature_group_count=groups,
               use_bias=False)(x)
      return act(BatchNorm()(x, mask, train=train))

    def squeeze_and_excite(x, features):
      s = jnp.mean(x, axis=(1, 2))  # [B, C]
      s = nn.silu(nn.Dense(features)(s))
      return x * nn.sigmoid(nn.Dense(x.shape[-1])(s))[:, None, None]

    def block(x, expansion, kernel, stride, features):
      y, width = x, x.shape[-1] * expansion
      if expansion > 1:
        y = convolve(y, width)
      y = convolve(y, width, kernel, stride, groups=width)
      y = squeeze_and_excite(y, x.shape[-1] // 4)
      y = convolve(y, features, act=lambda x: x)
      return x + y if x.shape == y.shape else y

    x = convolve(image, 32, 3, 2)
    for expansion, kernel, stride, features, blocks in STAGES:
      for i in range(blocks):
        x = block(x, expansion, kernel, stride if i == 0 else 1, features)
    x = convolve(x, 1280)
    return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = image_classification.config("efficientnet", preset, "cifar10", variant="b0", optimizer="momentum")
  config.update({"batch_size": 16})
  config.data.image_shape = (128, 128, 3)
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  return image_classification.build(config, Stack(config.data.num_classes))
