"""RetinaNet: one-stage object detection.

Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He, Piotr Dollár. "Focal Loss for Dense Object
Detection", 2017. https://arxiv.org/abs/1708.02002
The pyramid: Tsung-Yi Lin et al. "Feature Pyramid Networks for Object Detection", 2016.
https://arxiv.org/abs/1612.03144

The network works on a pyramid of grids over the image. Each cell of a grid has A anchors, which
are boxes of fixed sizes. For each anchor the network predicts which object it holds (`logits`) and
how the anchor has to be moved and stretched to fit the object (`boxes`). The anchors, the loss and
the choice among overlapping boxes are in `tasks/boxes.py` and `tasks/detection.py`.

What differs from the paper, as in torchvision:
- The level after the last stage's level, P6, is a convolution of P5, not of the stage C5 itself
  (but see `extra_of_stage`).
- The normalisation can be frozen (`frozen_norm`). Its running statistics, scale and bias are then
  constants from pretraining, as a batch of two images per device gives no useful statistics.

Dimensions: `B` batch, `H`, `W` image, `h`, `w` a level's grid, `D` width of pyramid and heads, `A`
anchors per cell, `N` anchors of all levels, `K` classes.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax.models import resnet
from dljax.models.layers import BatchNorm, Conv

# The initial probability that an anchor holds an object (section 4.1, "Initialization").
PRIOR = 0.01


class FrozenBatchNorm(nn.Module):
  """Normalisation by statistics, scale and bias that never change; all four are in "batch_stats".

  Attributes:
    epsilon: the number added to the variance.
    scale_init: the initialiser of the scale.
    dtype: the dtype of the result.
  """

  epsilon: float = 1e-5
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
    """[B, ..., C] -> [B, ..., C] of `dtype`; called as `layers.BatchNorm` is."""
    del mask, train  # padding and training make no difference
    shape = (x.shape[-1],)
    scale = self.variable("batch_stats", "scale", self.scale_init, None, shape, jnp.float32).value
    bias, mean = (self.variable("batch_stats", name, jnp.zeros, shape, jnp.float32).value
                  for name in ("bias", "mean"))
    var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32).value
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    return (x * factor + (bias - mean * factor)).astype(self.dtype)


class FeaturePyramid(nn.Module):
  """Makes levels of one width from a backbone's stages, each with the coarser levels added.

  Attributes:
    width: D.
    extra_levels: the number of coarser levels that follow the last stage's level.
    extra_of_stage: whether the first extra level is made from the last stage itself instead of its
      level.
    conv: the convolution, with its dtype bound.
  """

  width: int
  extra_levels: int
  extra_of_stage: bool
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, stages: Sequence[jax.Array]) -> list[jax.Array]:
    """[B, h, w, c] of each stage -> [B, h, w, D] of each level, the finest first."""
    init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    conv = functools.partial(self.conv, self.width, kernel_init=init)
    levels, merged = [], None
    for i, stage in reversed(list(enumerate(stages))):
      lateral = conv((1, 1), name=f"lateral{i}")(stage)
      merged = lateral if merged is None else lateral + _upsample(merged, lateral.shape)
      levels.insert(0, conv((3, 3), padding=1, name=f"output{i}")(merged))
    for i in range(self.extra_levels):
      x = nn.relu(levels[-1]) if i else stages[-1] if self.extra_of_stage else levels[-1]
      levels.append(conv((3, 3), strides=2, padding=1, name=f"extra{i}")(x))
    return levels


def _upsample(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B, h, w, D] -> [B, *shape[1:3], D]; each pixel is that of x which it lies in."""
  if shape[1] == 2 * x.shape[1] and shape[2] == 2 * x.shape[2]:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  rows, columns = (jnp.arange(new) * old // new for new, old in zip(shape[1:3], x.shape[1:3]))
  return x[:, rows][:, :, columns]


class Head(nn.Module):
  """Convolutions that all levels share (figure 3).

  Attributes:
    depth: the number of 3x3 convolutions before the last one.
    outputs: the number of outputs per anchor.
    num_anchors: A.
    bias: the initial bias of the outputs.
    norm_groups: the groups of a group normalisation after each convolution but the last; 0 for no
      normalisation.
    conv: the convolution, with its dtype bound.
  """

  depth: int
  outputs: int
  num_anchors: int
  bias: float
  norm_groups: int
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, levels: Sequence[jax.Array]) -> jax.Array:
    """[B, h, w, D] of each level -> [B, N, outputs], in the order level, row, column, anchor."""
    init = nn.initializers.normal(0.01)
    conv = functools.partial(self.conv, kernel_size=(3, 3), padding=1, kernel_init=init)
    width, groups = levels[0].shape[-1], self.norm_groups
    layers = [conv(width, use_bias=not groups, name=f"conv{i}") for i in range(self.depth)]
    group_norm = functools.partial(
        nn.GroupNorm, groups, epsilon=1e-5, dtype=levels[0].dtype, use_fast_variance=False)
    norms = [group_norm(name=f"norm{i}") if groups else lambda x: x for i in range(self.depth)]
    last = conv(self.num_anchors * self.outputs, bias_init=nn.initializers.constant(self.bias),
                name="output")
    outputs = []
    for x in levels:
      for layer, norm in zip(layers, norms):
        x = nn.relu(norm(layer(x)))
      outputs.append(last(x).reshape(len(x), -1, self.outputs))
    return jnp.concatenate(outputs, axis=1)


class RetinaNet(nn.Module):
  """A ResNet, a feature pyramid on it, and two heads.

  Attributes:
    num_classes: K; includes the background if the labels count it as a class, as torchvision's do.
    block, stage_sizes, backbone_width, small_stem: the options of the `ResNet`.
    first_stage: the stage, counted from 1, whose output makes the finest level.
    extra_levels: the number of coarser levels beyond the stages.
    extra_of_stage: whether the first extra level is made from the last stage, as in the paper,
      instead of its level.
    width: D.
    head_depth: the number of a head's convolutions before its last.
    head_norm_groups: the groups of a group normalisation (Wu and He 2018) after each of these; 0
      for no normalisation, as in the paper.
    num_anchors: A.
    frozen_norm: whether the normalisation is frozen; see the top of this file.
    norm_epsilon: the normalisation's epsilon (torchvision's weights for COCO were trained with 0).
    dtype: the dtype of the computation and the result; parameters and statistics are float32.
    remat: whether to recompute each block of the backbone in the backward pass instead of storing
      its activations.
  """

  num_classes: int
  block: type[resnet.BasicBlock]
  stage_sizes: Sequence[int]
  backbone_width: int = 64
  small_stem: bool = False
  first_stage: int = 2
  extra_levels: int = 2
  extra_of_stage: bool = False
  width: int = 256
  head_depth: int = 4
  head_norm_groups: int = 0
  num_anchors: int = 9
  frozen_norm: bool = False
  norm_epsilon: float = 1e-5
  dtype: Any = jnp.float32
  remat: bool = False

  @property
  def strides(self) -> tuple[int, ...]:
    """The image's pixels between the cells of each level, the finest level first."""
    first = self.first_stage - 1 + (0 if self.small_stem else 2)
    levels = len(self.stage_sizes) - self.first_stage + 1 + self.extra_levels
    return tuple(2 ** (first + i) for i in range(levels))

  @property
  def backbone(self) -> resnet.ResNet:
    """The network whose stages carry the pyramid; its variables lie under "backbone"."""
    norm = functools.partial(FrozenBatchNorm if self.frozen_norm else BatchNorm,
                             epsilon=self.norm_epsilon)
    return resnet.ResNet(num_classes=None, block=self.block, stage_sizes=self.stage_sizes,
                         width=self.backbone_width, small_stem=self.small_stem, norm=norm,
                         dtype=self.dtype, remat=self.remat, parent=None)

  def grids(self, height: int, width: int) -> list[tuple[int, int]]:
    """Returns (h, w) of each level for an image of this size; each stride of two rounds up."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in self.strides]

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> dict[str, jax.Array]:
    """Detects objects.

    Args:
      image: [B, H, W, C], of any size.
      mask: f32[B], 0 where a row is padding; such rows do not count in the batch's statistics.
      train: whether to normalise by the batch's statistics, unless the norm is frozen.

    Returns:
      "logits" [B, N, K], whose sigmoid is the probability of each class, independent of the
      others; and "boxes" [B, N, 4], the shifts (x, y) and the logarithms of the factors (width,
      height) from anchor to box. Both have `dtype`. The anchors are in the order level (the finest
      first), row, column, anchor of the cell.
    """
    conv = functools.partial(Conv, dtype=self.dtype)
    stages = self.backbone.clone(parent=self, name="backbone")(image, mask, train=train)
    pyramid = FeaturePyramid(self.width, self.extra_levels, self.extra_of_stage, conv, name="fpn")
    levels = pyramid(stages[self.first_stage - 1:])
    head = functools.partial(Head, self.head_depth, num_anchors=self.num_anchors,
                             norm_groups=self.head_norm_groups, conv=conv)
    class_bias = -math.log((1 - PRIOR) / PRIOR)
    return {
        "logits": head(self.num_classes, bias=class_bias, name="class_head")(levels),
        "boxes": head(4, bias=0.0, name="box_head")(levels),
    }


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Section 4, "RetinaNet", with the numbers of parameters with 91 classes.
    "retinanet_resnet50_fpn": functools.partial(  # 34,068,119; with a frozen norm 34,014,999
        RetinaNet, block=resnet.Bottleneck, stage_sizes=(3, 4, 6, 3)),
    # Torchvision's second form (Zhang et al. 2019): 38,198,935.
    "retinanet_resnet50_fpn_v2": functools.partial(
        RetinaNet, block=resnet.Bottleneck, stage_sizes=(3, 4, 6, 3), extra_of_stage=True,
        head_norm_groups=32),
    "retinanet_resnet101_fpn": functools.partial(  # 53,060,247
        RetinaNet, block=resnet.Bottleneck, stage_sizes=(3, 4, 23, 3)),
    # For images of about 100 pixels: with basic blocks, and levels of 4, 8 and 16 pixels.
    "retinanet_small": functools.partial(
        RetinaNet, block=resnet.BasicBlock, stage_sizes=(1, 1, 1, 1, 1), backbone_width=16,
        small_stem=True, first_stage=3, extra_levels=0, width=64, head_depth=2),
}
