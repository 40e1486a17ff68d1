"""Residual networks.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun. "Deep Residual Learning for Image Recognition",
2015. https://arxiv.org/abs/1512.03385

What differs from the paper:
- The bottleneck's stride is in its 3x3 convolution, not in the first 1x1 convolution, as in
  torchvision ("v1.5").
- `small_stem` puts the stem of the paper's CIFAR networks, a 3x3 convolution without stride and
  pooling, before any stages, so that ImageNet's networks run on images of 28 to 64 pixels too.
- `zero_init_residual` (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1) makes
  each block start as the identity. It is off by default, as in the paper and torchvision; turn it
  on to train with large batches.

Strided convolutions pad symmetrically, as the paper's own code and PyTorch do. "SAME" pads even
sizes on one side only, and weights trained with one padding lose accuracy with the other.

Dimensions: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax.models.layers import BatchNorm, Conv
from dljax.ops.pool import max_pool

ModuleDef = Any


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut (figure 5, left).

  Attributes:
    width: the channels of the first convolution.
    stride: the stride of the block.
    conv, norm: the layers, with their dtype and initialisers bound.
    last_scale_init: the initialiser of the scale in the residual branch's last norm.
    pad_shortcut: whether shortcuts that change the shape are section 3.3's option A instead of B.
  """

  width: int
  stride: int
  conv: ModuleDef
  norm: ModuleDef
  last_scale_init: nn.initializers.Initializer
  pad_shortcut: bool

  expansion = 1

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, width]."""
    y = self.conv(self.width, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
    y = nn.relu(self.norm(name="norm1")(y, mask, train=train))
    y = self.conv(self.width, (3, 3), padding=1, name="conv2")(y)
    y = self.norm(scale_init=self.last_scale_init, name="norm2")(y, mask, train=train)
    return nn.relu(y + _shortcut(self, x, y.shape[-1], mask, train))


class Bottleneck(BasicBlock):
  """1x1, 3x3 and (four times as wide) 1x1 convolutions and a shortcut (figure 5, right)."""

  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, 4 width]."""
    y = self.conv(self.width, (1, 1), name="conv1")(x)
    y = nn.relu(self.norm(name="norm1")(y, mask, train=train))
    y = self.conv(self.width, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
    y = nn.relu(self.norm(name="norm2")(y, mask, train=train))
    y = self.conv(self.width * self.expansion, (1, 1), name="conv3")(y)
    y = self.norm(scale_init=self.last_scale_init, name="norm3")(y, mask, train=train)
    return nn.relu(y + _shortcut(self, x, y.shape[-1], mask, train))


def _shortcut(
    block: BasicBlock, x: jax.Array, features: int, mask: jax.Array | None, train: bool,
) -> jax.Array:
  """The identity; if the shape changes, option A (new channels are zeros) or B (a projection)."""
  if block.stride == 1 and x.shape[-1] == features:
    return x
  if block.pad_shortcut:
    x = x[:, ::block.stride, ::block.stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
  x = block.conv(features, (1, 1), strides=block.stride, name="shortcut_conv")(x)
  return block.norm(name="shortcut_norm")(x, mask, train=train)


class ResNet(nn.Module):
  """A stem, stages of residual blocks, global average pooling and a linear head.

  Attributes:
    num_classes: the number of logits; None for a backbone, which returns the outputs of its
      stages.
    block: `BasicBlock` or `Bottleneck`.
    stage_sizes: the number of blocks in each stage. All stages but the first halve the image and
      double the channels.
    width: the channels of the stem, and the width of the first stage's blocks.
    small_stem: whether the stem is a 3x3 convolution without stride and pooling, for small images,
      instead of a 7x7 one.
    pad_shortcut: whether shortcuts have no parameters (option A of section 3.3).
    zero_init_residual: whether the scale of each block's last norm starts at zero.
    conv: the convolution, called as `flax.linen.Conv` is.
    norm: the normalisation, called as `layers.BatchNorm` is.
    dtype: the dtype of the computation and the result; parameters and statistics are float32.
    remat: whether to recompute each block in the backward pass instead of storing its activations.
  """

  num_classes: int | None
  block: type[BasicBlock]
  stage_sizes: Sequence[int]
  width: int = 64
  small_stem: bool = False
  pad_shortcut: bool = False
  zero_init_residual: bool = False
  conv: ModuleDef = Conv
  norm: ModuleDef = BatchNorm
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array | tuple[jax.Array, ...]:
    """Classifies images.

    Args:
      image: [B, H, W, C], of any size; the strides divide it by 32 (ImageNet's form) or 4
        (CIFAR's).
      mask: f32[B], 0 where a row is padding; such rows do not count in the batch's statistics.
      train: whether to normalise by the batch's statistics.

    Returns:
      Logits [B, num_classes] of `dtype`; for a backbone, the output [B, h, w, c] of each stage.
    """
    # He's initialisation (2015), in the form that keeps the gradient's variance.
    kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = functools.partial(self.conv, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)
    norm = functools.partial(self.norm, dtype=self.dtype)
    block = nn.remat(self.block, static_argnums=(3,)) if self.remat else self.block
    last_scale_init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones

    if self.small_stem:
      x = conv(self.width, (3, 3), padding=1, name="stem_conv")(image)
    else:
      x = conv(self.width, (7, 7), strides=2, padding=3, name="stem_conv")(image)
    x = nn.relu(norm(name="stem_norm")(x, mask, train=train))
    if not self.small_stem:
      x = max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    stages = []
    for i, size in enumerate(self.stage_sizes):
      for j in range(size):
        x = block(
            width=self.width * 2**i, stride=2 if i > 0 and j == 0 else 1, conv=conv, norm=norm,
            last_scale_init=last_scale_init, pad_shortcut=self.pad_shortcut,
            name=f"stage{i + 1}_block{j}",
        )(x, mask, train)
      stages.append(x)
    if self.num_classes is None:
      return tuple(stages)
    x = jnp.mean(x, axis=(1, 2))  # [B, C]
    return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def _imagenet(block: type[BasicBlock], *stage_sizes: int) -> Callable[..., nn.Module]:
  return functools.partial(ResNet, block=block, stage_sizes=stage_sizes)


def _cifar(blocks: int) -> Callable[..., nn.Module]:
  return functools.partial(
      ResNet, block=BasicBlock, stage_sizes=(blocks,) * 3, width=16, small_stem=True,
      pad_shortcut=True)


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Table 1, with the numbers of parameters with 1000 classes.
    "resnet18": _imagenet(BasicBlock, 2, 2, 2, 2),  # 11,689,512
    "resnet34": _imagenet(BasicBlock, 3, 4, 6, 3),  # 21,797,672
    "resnet50": _imagenet(Bottleneck, 3, 4, 6, 3),  # 25,557,032
    "resnet101": _imagenet(Bottleneck, 3, 4, 23, 3),  # 44,549,160
    "resnet152": _imagenet(Bottleneck, 3, 8, 36, 3),  # 60,192,808
    # Section 4.2 and table 6 (0.27, 0.46 and 0.85 million parameters); with 10 classes:
    "resnet20": _cifar(3),  # 269,722
    "resnet32": _cifar(5),  # 464,154
    "resnet56": _cifar(9),  # 853,018
}
