"""AlexNet.

Alex Krizhevsky, Ilya Sutskever, Geoffrey Hinton. "ImageNet Classification with Deep Convolutional
Neural Networks", 2012.
https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks

Alex Krizhevsky. "One weird trick for parallelizing convolutional neural networks", 2014.
https://arxiv.org/abs/1404.5997

"alexnet_2012" is the network of the first paper. "alexnet" is the single column of the second,
with other widths and without response normalisation, as in torchvision. What differs from them:
- The fourth convolution of "alexnet" has 256 channels as in torchvision, not 384 (footnote 1).
- Images are padded by 2, so that 224 pixels give the 55 positions that the first paper's figure 2
  counts.
- Before the fully connected layers the map is averaged to 6x6, as in torchvision. At 224 pixels it
  already has that size; the average makes other sizes work too.
- "alexnet" starts from He's initialisation. Torchvision has PyTorch's default, which shrinks the
  signal to less than half at each layer. "alexnet_2012" starts as the paper says (section 5): the
  weights come from a normal distribution with a standard deviation of 0.01, and the biases of
  layers 2, 4, 5, 6 and 7 are 1.
- Dropout comes before layers 6 and 7 in torchvision, and before layers 7 and 8 in the first paper.

`stem`, `pooled_size` and the widths adapt the network to images of 28 to 64 pixels.

Dimensions: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax import errors
from dljax.models.layers import Conv
from dljax.ops.pool import adaptive_avg_pool, max_pool

POOLED = (1, 2, 5)  # layers that end with pooling
POOL_WINDOW, POOL_STRIDE = 3, 2  # overlapping (section 3.4)


def local_response_norm(
    x: jax.Array, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75,
) -> jax.Array:
  """Normalises by the responses of neighbouring channels (section 3.3).

  Divides by (k + alpha * the sum of squares of `size` neighbouring channels) ** beta.

  `torch.nn.LocalResponseNorm` divides alpha by `size`, and has k = 1 by default. It equals this
  function with alpha = 5e-4, k = 2.

  Args:
    x: [..., C].
    size: the paper's n. The neighbours are the channels up to n // 2 away on either side, as far
      as they exist.
    k, alpha, beta: the paper's constants.

  Returns:
    [..., C], computed in at least float32.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  margin = [(0, 0)] * (x.ndim - 1) + [(size // 2, size // 2)]
  squares, channels = jnp.pad(jnp.square(wide), margin), x.shape[-1]
  total = sum(squares[..., i:i + channels] for i in range(size))
  return (wide * (k + alpha * total)**-beta).astype(x.dtype)


class AlexNet(nn.Module):
  """Five convolutions, three of them with pooling, and three fully connected layers.

  Attributes:
    num_classes: the number of logits.
    widths: the channels of the five convolutions.
    groups: the groups of each convolution. With two, half of the channels see half of the channels
      before (the paper's two GPUs).
    response_norm: whether to normalise the outputs of the first two convolutions.
    stem: the kernel size, stride and padding of the first convolution.
    width_factor: the factor on `widths`; the products are rounded to multiples of 8.
    pooled_size: the height and width that the last map is averaged to.
    hidden_width: the number of units of each hidden fully connected layer.
    dropout: the probability of dropping an input of the layers in `dropped`, in training (rng
      stream "dropout").
    dropped: the layers with dropout, out of "fc6", "fc7" and "head".
    kernel_init: the initialiser of all kernels.
    hidden_bias: the initial biases of layers 2, 4, 5, 6 and 7.
    conv: the convolution, called as `flax.linen.Conv` is.
    dtype: the dtype of the computation and the result; parameters are float32.
    remat: whether to recompute each convolution and what follows it in the backward pass instead
      of storing it.
  """

  num_classes: int
  widths: Sequence[int] = (64, 192, 384, 256, 256)
  groups: Sequence[int] = (1, 1, 1, 1, 1)
  response_norm: bool = False
  stem: tuple[int, int, int] = (11, 4, 2)
  width_factor: float = 1.0
  pooled_size: int = 6
  hidden_width: int = 4096
  dropout: float = 0.5
  dropped: Sequence[str] = ("fc6", "fc7")
  kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
  hidden_bias: float = 0.0
  conv: Any = Conv
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array:
    """Classifies images.

    Args:
      image: [B, H, W, C], H and W at least `smallest_image`.
      mask: f32[B], 0 where a row is padding; has no effect, as no layer lets rows see each other.
      train: whether to drop units.

    Returns:
      Logits [B, num_classes] of `dtype`.

    Raises:
      UserError: the images are too small.
    """
    del mask
    if image.ndim != 4 or min(image.shape[1:3]) < self.smallest_image:
      raise errors.UserError(
          f"AlexNet with the stem {self.stem} takes images of at least {self.smallest_image}x"
          f"{self.smallest_image} pixels, not of shape {image.shape[1:]}: resize them, or use a "
          "smaller stem")
    convolve = nn.remat(_convolve, static_argnums=(2,)) if self.remat else _convolve
    x = image
    for layer in range(1, 6):  # 224 pixels give 55, pooled to 27, 13 and, after the last layer, 6
      x = convolve(self, x, layer)
    x = adaptive_avg_pool(x, (self.pooled_size, self.pooled_size))
    x = x.reshape(x.shape[0], -1)

    dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    hidden = functools.partial(
        dense, self.hidden_width, bias_init=nn.initializers.constant(self.hidden_bias))
    head = functools.partial(dense, self.num_classes)
    for name, layer in (("fc6", hidden), ("fc7", hidden), ("head", head)):
      if name in self.dropped:
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
      x = layer(name=name)(x)
      x = x if name == "head" else nn.relu(x)
    return x

  def width(self, layer: int) -> int:
    """The number of channels of convolution `layer`, 1 to 5."""
    return 8 * max(1, round(self.width_factor * self.widths[layer - 1] / 8))

  @property
  def smallest_image(self) -> int:
    """The height and width that leave one position after the last pooling."""
    size = 1
    for _ in POOLED:
      size = (size - 1) * POOL_STRIDE + POOL_WINDOW
    kernel, stride, padding = self.stem
    return (size - 1) * stride + kernel - 2 * padding


def _convolve(model: AlexNet, x: jax.Array, layer: int) -> jax.Array:
  """Applies convolution `layer`, 1 to 5, and what follows it: [B, H, W, C] -> [B, H', W', C']."""
  kernel, stride, padding = {1: model.stem, 2: (5, 1, 2)}.get(layer, (3, 1, 1))
  bias = model.hidden_bias if layer in (2, 4, 5) else 0.0
  x = model.conv(
      model.width(layer), (kernel, kernel), strides=stride, padding=padding,
      feature_group_count=model.groups[layer - 1], kernel_init=model.kernel_init,
      bias_init=nn.initializers.constant(bias), dtype=model.dtype, name=f"conv{layer}")(x)
  x = nn.relu(x)
  if model.response_norm and layer in (1, 2):
    x = local_response_norm(x)
  if layer in POOLED:
    x = max_pool(x, (POOL_WINDOW, POOL_WINDOW), strides=(POOL_STRIDE, POOL_STRIDE))
  return x


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {  # parameters at 1000 classes
    "alexnet": functools.partial(AlexNet),  # 61,100,840
    "alexnet_2012": functools.partial(  # 60,965,224
        AlexNet, widths=(96, 256, 384, 384, 256), groups=(1, 2, 1, 2, 2), response_norm=True,
        dropped=("fc7", "head"), kernel_init=nn.initializers.normal(0.01), hidden_bias=1.0),
}
