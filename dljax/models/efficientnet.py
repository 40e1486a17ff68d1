"""EfficientNet: networks whose width, depth and resolution grow together.

Mingxing Tan, Quoc V. Le. "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks", 2019. https://arxiv.org/abs/1905.11946

The block is MobileNetV2's (Sandler et al. 2018, https://arxiv.org/abs/1801.04381) with
squeeze-and-excitation (Hu et al. 2018, https://arxiv.org/abs/1709.01507). What differs from the
paper:
- Strided convolutions pad symmetrically, and up to b4 BatchNorm's epsilon and momentum are 1e-5
  and 0.1, as in torchvision. The paper's code pads as "SAME" does, and has 1e-3 and 0.01
  everywhere.
- `strides` and `stem_stride` adapt the networks to small images. `efficientnet_nano` is not in
  the paper; it is made of the same blocks, for images of 16 to 32 pixels.

Dimensions: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax.errors import UserError
from dljax.models.layers import BatchNorm, Conv, StochasticDepth

ModuleDef = Any


class Stage(NamedTuple):
  """A row of table 1; the stride is the first block's."""

  expansion: int
  kernel: int
  stride: int
  width: int
  depth: int


B0 = (  # table 1
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
NANO = (Stage(1, 3, 1, 16, 1), Stage(4, 3, 2, 32, 2), Stage(4, 5, 2, 64, 2), Stage(4, 3, 1, 96, 1))


def round_width(width: float) -> int:
  """Returns the nearest multiple of 8 that is at most a tenth below `width`."""
  rounded = max(8, int(width + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * width else rounded


class MBConv(nn.Module):
  """An inverted bottleneck: expand, filter each channel, reweight the channels, project.

  Attributes:
    expansion: the factor on the input's channels inside the block.
    kernel, stride: the kernel size and stride of the depthwise convolution.
    width: the channels of the result.
    drop_rate: the rate of stochastic depth, if the block has a shortcut.
    conv, norm: the layers, with their dtype and initialisers bound.
    kernel_init: the initialiser of squeeze-and-excitation's kernels.
    dtype: the dtype of the computation.
  """

  expansion: int
  kernel: int
  stride: int
  width: int
  drop_rate: float
  conv: ModuleDef
  norm: ModuleDef
  kernel_init: nn.initializers.Initializer
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, width]."""
    y, inner = x, x.shape[-1] * self.expansion
    if self.expansion > 1:
      y = self.conv(inner, (1, 1), name="expand_conv")(y)
      y = nn.silu(self.norm(name="expand_norm")(y, mask, train=train))
    y = self.conv(inner, (self.kernel, self.kernel), strides=self.stride, padding=self.kernel // 2,
                  feature_group_count=inner, name="depthwise_conv")(y)
    y = nn.silu(self.norm(name="depthwise_norm")(y, mask, train=train))

    dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    s = jnp.mean(y, axis=(1, 2))  # [B, inner]
    # A quarter of the block's input channels, not of `inner`.
    s = nn.silu(dense(max(1, x.shape[-1] // 4), name="squeeze")(s))
    gate = nn.sigmoid(dense(inner, name="excite")(s))
    self.sow("intermediates", "gate", gate)
    y = y * gate[:, None, None]

    y = self.conv(self.width, (1, 1), name="project_conv")(y)
    y = self.norm(name="project_norm")(y, mask, train=train)
    if self.stride > 1 or x.shape[-1] != self.width:
      return y
    return x + StochasticDepth(self.drop_rate)(y, train)


class EfficientNet(nn.Module):
  """A stem, stages of MBConv blocks, a 1x1 convolution, global average pooling and a linear head.

  Attributes:
    num_classes: the number of logits.
    width, depth: the factors on each stage's channels and number of blocks, equation 3's beta^phi
      and alpha^phi.
    dropout: the probability of dropping a feature that the head sees.
    stochastic_depth: the rate that the blocks' rates grow to, from 0, in proportion to their
      depth.
    stages: the network's stages if both factors are 1.
    stem_width, stem_stride: the channels, before scaling, and the stride of the first convolution.
    strides: the stages' strides, in place of those in `stages`; for small images.
    conv: the convolution, called as `flax.linen.Conv` is.
    norm: the normalisation, called as `layers.BatchNorm` is.
    dtype: the dtype of the computation and the result; parameters and statistics are float32.
    remat: whether to recompute each block in the backward pass instead of storing its activations.
  """

  num_classes: int
  width: float = 1.0
  depth: float = 1.0
  dropout: float = 0.2
  stochastic_depth: float = 0.2
  stages: Sequence[Stage] = B0
  stem_width: int = 32
  stem_stride: int = 2
  strides: Sequence[int] | None = None
  conv: ModuleDef = Conv
  norm: ModuleDef = BatchNorm
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array:
    """Classifies images.

    Args:
      image: [B, H, W, C], of any size.
      mask: f32[B], 0 where a row is padding; such rows do not count in the batch's statistics.
      train: whether to drop units and blocks, and to normalise by the batch's statistics.

    Returns:
      Logits [B, num_classes] of `dtype`. The gates of squeeze-and-excitation are the intermediates
      "gate".

    Raises:
      UserError: the number of strides is not that of the stages.
    """
    strides = [stage.stride for stage in self.stages] if self.strides is None else self.strides
    if len(strides) != len(self.stages):
      raise UserError(f"this EfficientNet has {len(self.stages)} stages, so "
                      f"strides={tuple(strides)} has to have {len(self.stages)} numbers, not "
                      f"{len(strides)}")
    kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = functools.partial(self.conv, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)
    norm = functools.partial(self.norm, dtype=self.dtype)
    block = nn.remat(MBConv, static_argnums=(3,)) if self.remat else MBConv

    width = round_width(self.stem_width * self.width)
    x = conv(width, (3, 3), strides=self.stem_stride, padding=1, name="stem_conv")(image)
    x = nn.silu(norm(name="stem_norm")(x, mask, train=train))

    depths = [math.ceil(stage.depth * self.depth) for stage in self.stages]
    index = 0
    for i, (stage, stride, depth) in enumerate(zip(self.stages, strides, depths), start=1):
      for j in range(depth):
        x = block(
            expansion=stage.expansion, kernel=stage.kernel, stride=stride if j == 0 else 1,
            width=round_width(stage.width * self.width),
            drop_rate=self.stochastic_depth * index / sum(depths), conv=conv, norm=norm,
            kernel_init=kernel_init, dtype=self.dtype, name=f"stage{i}_block{j}",
        )(x, mask, train)
        index += 1

    x = conv(4 * x.shape[-1], (1, 1), name="head_conv")(x)
    x = nn.silu(norm(name="head_norm")(x, mask, train=train))
    x = jnp.mean(x, axis=(1, 2))  # [B, C]
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    head_init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
    return nn.Dense(self.num_classes, kernel_init=head_init, dtype=self.dtype, name="head")(x)


class Scaling(NamedTuple):
  """Section 3.3: the factors on B0's width and depth, the images' side, and the dropout."""

  width: float
  depth: float
  resolution: int
  dropout: float


# As in the paper's code. Behind each stands the number of parameters with 1000 classes.
SCALING: Mapping[str, Scaling] = {
    "efficientnet_b0": Scaling(1.0, 1.0, 224, 0.2),  # 5,288,548
    "efficientnet_b1": Scaling(1.0, 1.1, 240, 0.2),  # 7,794,184
    "efficientnet_b2": Scaling(1.1, 1.2, 260, 0.3),  # 9,109,994
    "efficientnet_b3": Scaling(1.2, 1.4, 300, 0.3),  # 12,233,232
    "efficientnet_b4": Scaling(1.4, 1.8, 380, 0.4),  # 19,341,616
    "efficientnet_b5": Scaling(1.6, 2.2, 456, 0.4),  # 30,389,784
    "efficientnet_b6": Scaling(1.8, 2.6, 528, 0.5),  # 43,040,704
    "efficientnet_b7": Scaling(2.0, 3.1, 600, 0.5),  # 66,347,960
}


def _scaled(name: str) -> Callable[..., nn.Module]:
  scaling = SCALING[name]
  norm = BatchNorm
  # Torchvision's weights of these are the paper's own.
  if name in ("efficientnet_b5", "efficientnet_b6", "efficientnet_b7"):
    norm = functools.partial(BatchNorm, epsilon=1e-3, momentum=0.01)
  return functools.partial(
      EfficientNet, width=scaling.width, depth=scaling.depth, dropout=scaling.dropout, norm=norm)


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    **{name: _scaled(name) for name in SCALING},
    "efficientnet_nano": functools.partial(
        EfficientNet, stages=NANO, stem_width=16, stem_stride=1, stochastic_depth=0.1),
}
