"""VGG: deep networks of nothing but 3x3 convolutions.

Karen Simonyan, Andrew Zisserman. "Very Deep Convolutional Networks for Large-Scale Image
Recognition", 2014. https://arxiv.org/abs/1409.1556

Table 1's columns A, B, D and E are vgg11, vgg13, vgg16 and vgg19. What differs from the paper:
- The "_bn" forms normalise each convolution's result over the batch (Ioffe and Szegedy 2015), a
  method published after VGG. The convolutions keep their biases, as in torchvision.
- Before the fully connected layers the map is averaged to 7x7, as in torchvision. At 224 pixels it
  already has that size; the average makes other sizes work too.
- Weights start as in torchvision: those of convolutions from He's normal distribution over the
  fan-out, those of fully connected layers from a normal distribution with a standard deviation of
  0.01 (larger for narrower layers, by the root of their width), and biases at zero. The paper had
  to train vgg11 first and start the deeper networks from its layers (section 3.1).

`num_pools`, `pooled_size` and the widths adapt the network to images of 28 to 64 pixels.

Dimensions: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax import errors
from dljax.models.layers import BatchNorm, Conv
from dljax.ops.pool import adaptive_avg_pool, max_pool

WIDTHS = (64, 128, 256, 512, 512)  # the stages' channels


class VGG(nn.Module):
  """Stages of 3x3 convolutions, each ending with pooling, and three fully connected layers.

  Attributes:
    num_classes: the number of logits.
    stage_sizes: the number of convolutions in each stage.
    norm: the normalisation after each convolution, called as `layers.BatchNorm` is; or None.
    num_pools: the number of stages, from the first on, that end with pooling.
    width_factor: the factor on the channels of all stages; the products are rounded to multiples
      of 8.
    pooled_size: the height and width that the last map is averaged to.
    hidden_width: the number of units of each hidden fully connected layer.
    dropout: the probability of dropping a hidden unit in training (rng stream "dropout").
    conv: the convolution, called as `flax.linen.Conv` is.
    dtype: the dtype of the computation and the result; parameters and statistics are float32.
    remat: whether to recompute each stage in the backward pass instead of storing its activations.
  """

  num_classes: int
  stage_sizes: Sequence[int]
  norm: Any = None
  num_pools: int = 5
  width_factor: float = 1.0
  pooled_size: int = 7
  hidden_width: int = 4096
  dropout: float = 0.5
  conv: Any = Conv
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array:
    """Classifies images.

    Args:
      image: [B, H, W, C], H and W at least 2 ** num_pools.
      mask: f32[B], 0 where a row is padding; such rows do not count in the batch's statistics.
      train: whether to drop units, and to normalise by the batch's statistics.

    Returns:
      Logits [B, num_classes] of `dtype`.

    Raises:
      UserError: the images are too small.
    """
    smallest = 2**self.num_pools
    if image.ndim != 4 or min(image.shape[1:3]) < smallest:
      raise errors.UserError(
          f"VGG with {self.num_pools} poolings takes images of at least {smallest}x{smallest} "
          f"pixels, not of shape {image.shape[1:]}: resize them, or pool less often")
    convolve = nn.remat(_stage, static_argnums=(3, 4)) if self.remat else _stage
    x = image
    for stage in range(1, len(self.stage_sizes) + 1):
      x = convolve(self, x, mask, stage, train)
    x = adaptive_avg_pool(x, (self.pooled_size, self.pooled_size))
    x = x.reshape(x.shape[0], -1)

    # The deviation is 0.01 at the paper's width. In layers of a few hundred units 0.01 would leave
    # nothing of the signal.
    kernel_init = nn.initializers.normal(0.01 * (4096 / self.hidden_width)**0.5)
    dense = functools.partial(nn.Dense, kernel_init=kernel_init, dtype=self.dtype)
    for name in ("fc1", "fc2"):
      x = nn.relu(dense(self.hidden_width, name=name)(x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return dense(self.num_classes, name="head")(x)

  def width(self, stage: int) -> int:
    """The number of channels of `stage`, counted from 1."""
    return 8 * max(1, round(self.width_factor * WIDTHS[stage - 1] / 8))


def _stage(model: VGG, x: jax.Array, mask: jax.Array | None, stage: int, train: bool) -> jax.Array:
  """Applies stage number `stage`, counted from 1: [B, H, W, C] -> [B, H / 2, W / 2, C']."""
  # He's initialisation (2015), in the form that keeps the gradient's variance.
  kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
  for i in range(1, model.stage_sizes[stage - 1] + 1):
    x = model.conv(
        model.width(stage), (3, 3), padding=1, kernel_init=kernel_init, dtype=model.dtype,
        name=f"stage{stage}_conv{i}")(x)
    if model.norm is not None:
      x = model.norm(dtype=model.dtype, name=f"stage{stage}_norm{i}")(x, mask, train=train)
    x = nn.relu(x)
  return max_pool(x, (2, 2), strides=(2, 2)) if stage <= model.num_pools else x


# Table 1, with the numbers of parameters with 1000 classes.
STAGE_SIZES = {
    "vgg11": (1, 1, 2, 2, 2),  # A: 132,863,336; with batch normalisation 132,868,840
    "vgg13": (2, 2, 2, 2, 2),  # B: 133,047,848; 133,053,736
    "vgg16": (2, 2, 3, 3, 3),  # D: 138,357,544; 138,365,992
    "vgg19": (2, 2, 4, 4, 4),  # E: 143,667,240; 143,678,248
}
VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    name + suffix: functools.partial(VGG, stage_sizes=sizes, norm=norm)
    for suffix, norm in (("", None), ("_bn", BatchNorm)) for name, sizes in STAGE_SIZES.items()
}
