"""U-Net: a class for each pixel.

Olaf Ronneberger, Philipp Fischer, Thomas Brox. "U-Net: Convolutional Networks for Biomedical Image
Segmentation", 2015. https://arxiv.org/abs/1505.04597

A contracting path sees more and more of the image at fewer and fewer places; an expanding path
goes back to every pixel. At each size the expanding path also gets the output of the contracting
path (the skip connection): it knows what is in the image, and the skip connection where exactly.

`unet_2015` is the network of figure 1. What differs from the paper:
- Section 3's pixel-wise weights, which separate cells that touch, belong to a loss for cells;
  `tasks/segmentation.py` has the plain cross-entropy and Dice.
- Layers that no ReLU follows (the up-convolutions and the last layer) start with half the variance
  of He's initialisation, which the other layers have.
- `padded` convolutions keep the image's size, so that nothing has to be cropped and every pixel
  gets a class. Without padding, as in the paper, an image loses 4 (3 * 2^d - 2) pixels in d
  poolings, half of them at each side: 184 of 572. To segment an image up to its border, extend it
  by mirroring first (section 2, "overlap-tile strategy").
- `norm` normalises each convolution's result (Ioffe and Szegedy 2015); the convolutions then have
  no bias.

Dimensions: `B` batch, `H` height, `W` width, `C` channels, `K` classes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax import errors
from dljax.models.layers import BatchNorm, Conv
from dljax.ops.crop import crop
from dljax.ops.pool import max_pool


class DoubleConv(nn.Module):
  """Two 3x3 convolutions, each followed by the norm, if there is one, and a ReLU.

  Attributes:
    width: the channels of both convolutions.
    padding: the pixels of zeros at each side, 0 or 1.
    norm: the normalisation, called as `layers.BatchNorm` is, with its dtype bound; or None.
    conv: the convolution, with its dtype bound.
  """

  width: int
  padding: int
  norm: Any
  conv: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H', W', width], where H' is H or, without padding, H - 4."""
    kernel_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # section 3
    for i in (1, 2):
      x = self.conv(self.width, (3, 3), padding=self.padding, use_bias=self.norm is None,
                    kernel_init=kernel_init, name=f"conv{i}")(x)
      if self.norm is not None:
        x = self.norm(name=f"norm{i}")(x, mask, train=train)
      x = nn.relu(x)
    return x


class UpConv(nn.Module):
  """The up-convolution: a transposed convolution with 2x2 kernels and a stride of 2.

  The kernels do not overlap, so it is a matrix product whose results are put side by side.

  Attributes:
    features: the channels of the result.
    dtype: the dtype of the computation and the result.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2 H, 2 W, features]."""
    b, h, w, c = x.shape
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0, 1))
    kernel = self.param("kernel", init, (2, 2, c, self.features), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = x @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
    y = y.reshape(b, h, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(b, 2 * h, 2 * w, self.features) + bias


class UNet(nn.Module):
  """The network of figure 1.

  Attributes:
    num_classes: K.
    width: the channels at the image's own size; each pooling doubles them.
    num_pools: the number of times that the contracting path halves the image.
    padded: whether convolutions keep the size.
    norm: the normalisation after each convolution, called as `layers.BatchNorm` is; or None.
    dropout: the probability of dropping a value, in training, after each of the contracting path's
      last two pairs of convolutions (section 3.1; rng stream "dropout"). The paper does not give
      it; its code has 0.5.
    skip: whether there are skip connections from the contracting to the expanding path.
    conv: the convolution, called as `flax.linen.Conv` is.
    dtype: the dtype of the computation and the result; parameters and statistics are float32.
    remat: whether to recompute each pair of convolutions in the backward pass instead of storing
      its activations.
  """

  num_classes: int
  width: int = 64
  num_pools: int = 4
  padded: bool = False
  norm: Any = None
  dropout: float = 0.0
  skip: bool = True
  conv: Any = Conv
  dtype: Any = jnp.float32
  remat: bool = False

  @property
  def margin(self) -> int:
    """The number of pixels by which the result is smaller than the image, in each direction."""
    return 0 if self.padded else 4 * (3 * 2**self.num_pools - 2)

  @property
  def step(self) -> int:
    """The number whose multiples the sides of images that fit differ by."""
    return 2**self.num_pools

  @property
  def smallest(self) -> int:
    """The smallest side of an image that fits."""
    if self.padded:
      return self.step
    # All poolings see even sizes if the side plus 4 is a multiple of the step.
    return self.margin + 1 + (-4 - self.margin - 1) % self.step

  def fits(self, side: int) -> bool:
    """Says whether all poolings see even sizes, and pixels remain, for an image of this side."""
    return side >= self.smallest and (side - self.smallest) % self.step == 0

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array:
    """Classifies pixels.

    Args:
      image: [B, H, W, C], with sides that fit; see `fits`.
      mask: f32[B], 0 where a row is padding; such rows do not count in the batch's statistics.
      train: whether to drop values, and to normalise by the batch's statistics.

    Returns:
      Logits [B, H - margin, W - margin, K] of `dtype`, for the pixels in the middle.

    Raises:
      UserError: the images' sides do not fit.
    """
    if image.ndim != 4 or not all(map(self.fits, image.shape[1:3])):
      raise errors.UserError(self.misfit(image.shape[1:]))
    block = nn.remat(DoubleConv, static_argnums=(3,)) if self.remat else DoubleConv
    block = functools.partial(
        block, padding=int(self.padded), conv=functools.partial(self.conv, dtype=self.dtype),
        norm=self.norm and functools.partial(self.norm, dtype=self.dtype))
    drop = nn.Dropout(self.dropout, deterministic=not train)

    x, skips = image, []
    for i in range(self.num_pools):
      x = block(self.width * 2**i, name=f"down{i + 1}")(x, mask, train)
      if i == self.num_pools - 1:
        x = drop(x)
      skips.append(x)
      x = max_pool(x, (2, 2), strides=(2, 2))
    x = drop(block(self.width * 2**self.num_pools, name="bottom")(x, mask, train))
    for i in reversed(range(self.num_pools)):
      x = UpConv(self.width * 2**i, dtype=self.dtype, name=f"upconv{i + 1}")(x)
      if self.skip:
        x = jnp.concatenate([crop(skips[i], x.shape[1:3]), x], axis=-1)  # the order of figure 1
      x = block(self.width * 2**i, name=f"up{i + 1}")(x, mask, train)
    kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return self.conv(
        self.num_classes, (1, 1), kernel_init=kernel_init, dtype=self.dtype, name="head")(x)

  def misfit(self, shape: Sequence[int]) -> str:
    """Returns the message for a `shape` [H, W, C] that does not fit; it names sides that do."""
    sides = [f"{self.smallest + i * self.step}" for i in range(3)]
    near = [self.smallest + max(0, -(-(side - self.smallest) // self.step)) * self.step
            for side in shape[:2]]
    mend = f"; resize or pad them to {'x'.join(map(str, near))}" if len(shape) == 3 else ""
    kind = "padded" if self.padded else "unpadded"
    return (f"U-Net with {self.num_pools} poolings and {kind} convolutions takes images with "
            f"sides of {', '.join(sides)}, ... pixels, not of shape {tuple(shape)}{mend}")


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Figure 1, with the number of parameters with one channel and two classes.
    "unet_2015": functools.partial(UNet),  # 31,030,658
    # The same with padding and batch normalisation; and a light form for images of about 100
    # pixels.
    "unet_padded": functools.partial(UNet, padded=True, norm=BatchNorm),  # 31,036,546
    "unet_small": functools.partial(  # 482,466
        UNet, width=16, num_pools=3, padded=True, norm=BatchNorm),
}
