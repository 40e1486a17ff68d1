"""RetinaNet: one-stage object detection.

Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He, Piotr Dollár. "Focal Loss for Dense Object Detection", 2017.
https://arxiv.org/abs/1708.02002
The pyramid: Tsung-Yi Lin et al. "Feature Pyramid Networks for Object Detection", 2016. https://arxiv.org/abs/1612.03144

Everywhere on a grid over the image, and on a pyramid of such grids, the network says of each of A anchors, boxes of
fixed sizes, which object it holds (`logits`) and how it has to be moved and stretched to fit it (`boxes`). What an
anchor is, the loss and the choice among overlapping answers are in `tasks/boxes.py` and `tasks/detection.py`.

What differs from the paper, as torchvision has it:
- The level after the last stage's, P6, is a convolution of P5, not of the stage itself, C5 (but see `extra_of_stage`).
- The normalisation can be frozen (`frozen_norm`): running statistics, scale and bias then are constants, as one has
  them from pretraining; with two images per device a batch has no statistics to speak of.

Dimensions: `B` batch, `H`, `W` image, `h`, `w` a level's grid, `D` width of pyramid and heads, `A` anchors per cell,
`N` anchors of all levels, `K` classes.
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

PRIOR = 0.01  # probability that an anchor holds an object at the start (section 4.1, "Initialization")


class FrozenBatchNorm(nn.Module):
  """Normalisation by statistics, scale and bias that never change; all four are in "batch_stats".

  Attributes:
    epsilon: added to the variance.
    scale_init: initialiser of the scale.
    dtype: of the result.
  """

  epsilon: float = 1e-5
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
    """[B, ..., C] -> [B, ..., C] of `dtype`; called as `layers.BatchNorm` is."""
    del mask, train  # every row is normalised alike, always
    shape = (x.shape[-1],)
    scale = self.variable("batch_stats", "scale", self.scale_init, None, shape, jnp.float32).value
    bias, mean = (self.variable("batch_stats", name, jnp.zeros, shape, jnp.float32).value for name in ("bias", "mean"))
    var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32).value
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    return (x * factor + (bias - mean * factor)).astype(self.dtype)


class FeaturePyramid(nn.Module):
  """Levels of one width from a backbone's stages, each with what the coarser ones know.

  Attributes:
    width: D.
    extra_levels: how many coarser ones follow the last stage's.
    extra_of_stage: whether the first of them is made of the stage, or of its level.
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
    levels = []
    for i, stage in reversed(list(enumerate(stages))):
      lateral = conv((1, 1), name=f"lateral{i}")(stage)
      merged = lateral if i + 1 == len(stages) else lateral + _upsample(merged, lateral.shape)
      levels.insert(0, conv((3, 3), padding=1, name=f"output{i}")(merged))
    for i in range(self.extra_levels):
      x = nn.relu(levels[-1]) if i else stages[-1] if self.extra_of_stage else levels[-1]
      levels.append(conv((3, 3), strides=2, padding=1, name=f"extra{i}")(x))
    return levels


def _upsample(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B, h, w, D] -> [B, *shape[1:3], D], each pixel from the one that it lies in."""
  if shape[1] == 2 * x.shape[1] and shape[2] == 2 * x.shape[2]:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  rows, columns = (jnp.arange(new) * old // new for new, old in zip(shape[1:3], x.shape[1:3]))
  return x[:, rows][:, :, columns]


class Head(nn.Module):
  """Convolutions that are the same for all levels (figure 3).

  Attributes:
    depth: number of 3x3 convolutions before the last.
    outputs: of each anchor.
    num_anchors: A.
    bias: that the outputs start with.
    norm_groups: of a group normalisation after each convolution but the last; 0 for none.
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
    """[B, h, w, D] of each level -> [B, N, outputs]: level, row, column, anchor, in this order."""
    conv = functools.partial(self.conv, kernel_size=(3, 3), padding=1, kernel_init=nn.initializers.normal(0.01))
    width, groups = levels[0].shape[-1], self.norm_groups
    layers = [conv(width, use_bias=not groups, name=f"conv{i}") for i in range(self.depth)]
    norms = [nn.GroupNorm(groups, epsilon=1e-5, dtype=levels[0].dtype, use_fast_variance=False, name=f"norm{i}")
             if groups else lambda x: x for i in range(self.depth)]
    last = conv(self.num_anchors * self.outputs, bias_init=nn.initializers.constant(self.bias), name="output")
    outputs = []
    for x in levels:
      for layer, norm in zip(layers, norms):
        x = nn.relu(norm(layer(x)))
      outputs.append(last(x).reshape(len(x), -1, self.outputs))
    return jnp.concatenate(outputs, axis=1)


class RetinaNet(nn.Module):
  """A ResNet, a feature pyramid on it, and two heads.

  Attributes:
    num_classes: K. Who counts the background as a class, as torchvision does, counts it here too.
    block, stage_sizes, backbone_width, small_stem: of the `ResNet`.
    first_stage: counted from 1, of whose output the finest level is made.
    extra_levels: coarser ones beyond the stages.
    extra_of_stage: whether the first of these is made of the last stage, as in the paper, or of its level.
    width: D.
    head_depth: convolutions of a head before its last.
    head_norm_groups: of a group normalisation (Wu and He 2018) after each of these; 0 for none, as in the paper.
    num_anchors: A.
    frozen_norm: see above.
    norm_epsilon: of the normalisation (torchvision's weights trained on COCO were trained with 0).
    dtype: of the computation and the result; parameters and statistics are float32.
    remat: recompute each block of the backbone in the backward pass instead of storing its inside.
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
    """Pixels of the image between the cells of each level, the finest first."""
    first = self.first_stage - 1 + (0 if self.small_stem else 2)
    levels = len(self.stage_sizes) - self.first_stage + 1 + self.extra_levels
    return tuple(2 ** (first + i) for i in range(levels))

  @property
  def backbone(self) -> resnet.ResNet:
    """The network whose stages carry the pyramid; its variables lie under "backbone"."""
    norm = functools.partial(FrozenBatchNorm if self.frozen_norm else BatchNorm, epsilon=self.norm_epsilon)
    return resnet.ResNet(
        num_classes=None, block=self.block, stage_sizes=self.stage_sizes, width=self.backbone_width,
        small_stem=self.small_stem, norm=norm, dtype=self.dtype, remat=self.remat, parent=None)

  def grids(self, height: int, width: int) -> list[tuple[int, int]]:
    """(h, w) of each level for an image of so many pixels: each stride of two rounds up."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in self.strides]

  @nn.compact
  def __call__(self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> dict[str, jax.Array]:
    """Looks for objects.

    Args:
      image: [B, H, W, C], of any size.
      mask: f32[B], 0 where a row is padding: those do not count in the batch's statistics.
      train: whether to normalise by the batch's statistics, where the norm is not frozen.

    Returns:
      "logits" [B, N, K], of which the sigmoid is a probability, each class for itself, and "boxes" [B, N, 4], the
      shifts (x, y) and the logarithms of the factors (width, height) from anchor to box; of `dtype`. Anchors in the
      order level (the finest first), row, column, anchor of the cell.
    """
    conv = functools.partial(Conv, dtype=self.dtype)
    stages = self.backbone.clone(parent=self, name="backbone")(image, mask, train=train)
    levels = FeaturePyramid(
        self.width, self.extra_levels, self.extra_of_stage, conv, name="fpn")(stages[self.first_stage - 1:])
    head = functools.partial(
        Head, self.head_depth, num_anchors=self.num_anchors, norm_groups=self.head_norm_groups, conv=conv)
    return {
        "logits": head(self.num_classes, bias=-math.log((1 - PRIOR) / PRIOR), name="class_head")(levels),
        "boxes": head(4, bias=0.0, name="box_head")(levels),
    }


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Section 4, "RetinaNet"; parameters at 91 classes.
    "retinanet_resnet50_fpn": functools.partial(
        RetinaNet, block=resnet.Bottleneck, stage_sizes=(3, 4, 6, 3)),  # 34,068,119; frozen norm 34,014,999
    "retinanet_resnet50_fpn_v2": functools.partial(  # torchvision's second (Zhang et al. 2019): 38,198,935
        RetinaNet, block=resnet.Bottleneck, stage_sizes=(3, 4, 6, 3), extra_of_stage=True, head_norm_groups=32),
    "retinanet_resnet101_fpn": functools.partial(  # 53,060,247
        RetinaNet, block=resnet.Bottleneck, stage_sizes=(3, 4, 23, 3)),
    # For images of about 100 pixels: the same with basic blocks, on levels of 4, 8 and 16 pixels; at 10 classes.
    "retinanet_small": functools.partial(
        RetinaNet, block=resnet.BasicBlock, stage_sizes=(1, 1, 1, 1, 1), backbone_width=16, small_stem=True,
        first_stage=3, extra_levels=0, width=64, head_depth=2),
}
