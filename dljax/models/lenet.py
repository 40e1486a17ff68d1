"""LeNet-5.

Yann LeCun, Léon Bottou, Yoshua Bengio, Patrick Haffner. "Gradient-Based Learning Applied to
Document Recognition". Proceedings of the IEEE 86(11), 1998. https://doi.org/10.1109/5.726791

This is the modern reading, as in most implementations. What differs from the paper (section II.B):
- C3 sees all six maps of S2; the paper connects each of its maps to three, four or all of them
  (table I). That makes 2,416 parameters instead of the paper's 1,516.
- S2 and S4 only average (or take the maximum); the paper's layers have a trainable coefficient and
  bias per map, and a squashing function.
- The output layer is linear with a softmax in the loss; the paper's has Gaussian connections to
  fixed bitmaps of the characters.
- The activation is tanh instead of the paper's 1.7159 tanh(2x/3), and weights start from a normal
  distribution with variance 1 / fan-in instead of a uniform one within 2.4 / fan-in.

So there are 61,706 parameters with ten classes, where the paper has 60,000.

Dimensions: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax import errors
from dljax.models.layers import Conv
from dljax.ops.pool import max_pool


def _avg_pool(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, H / 2, W / 2, C]; on a CPU several times faster than `nn.avg_pool`."""
  return jnp.mean(x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1), (2, 4))


POOLS = {"avg": _avg_pool, "max": functools.partial(max_pool, window_shape=(2, 2), strides=(2, 2))}


class LeNet5(nn.Module):
  """LeNet-5 of figure 2 of the paper.

  Attributes:
    num_classes: the number of logits.
    activation: the activation after C1, C3, C5 and F6.
    pool: what S2 and S4 take from each 2x2 square: "avg" (as in the paper) or "max".
    dtype: the dtype of the computation and the result; parameters are float32.
    remat: whether to recompute C1-S2 and C3-S4 in the backward pass instead of storing them.
  """

  num_classes: int
  activation: Callable[[jax.Array], jax.Array] = jnp.tanh
  pool: str = "avg"
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array:
    """Classifies images.

    Args:
      image: [B, 32, 32, C], or [B, 28, 28, C], which is padded with zeros to 32 pixels as in
        section III.A.
      mask: f32[B], 0 where a row is padding; has no effect, as no layer lets rows see each other.
      train: has no effect.

    Returns:
      Logits [B, num_classes] of `dtype`.

    Raises:
      UserError: the images have another size, or `pool` is unknown.
    """
    del mask, train
    if image.ndim != 4 or image.shape[1:3] not in ((28, 28), (32, 32)):
      raise errors.UserError(
          f"LeNet-5 takes images of 28x28 or 32x32 pixels, not of shape {image.shape[1:]}: "
          "resize them")
    if self.pool not in POOLS:
      raise errors.unknown("LeNet-5's pool", self.pool, POOLS)
    margin = (32 - image.shape[1]) // 2
    x = jnp.pad(image, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    convolve = _convolve_and_pool
    if self.remat:
      convolve = nn.remat(convolve, static_argnums=(2, 3))
    x = convolve(self, x, "c1", 6)  # [B, 28, 28, 6] -> S2 [B, 14, 14, 6]
    x = convolve(self, x, "c3", 16)  # [B, 10, 10, 16] -> S4 [B, 5, 5, 16]
    # C5's 5x5 kernel sees all of S4, so this convolution is a matrix product.
    x = x.reshape(x.shape[0], -1)
    x = self.activation(nn.Dense(120, dtype=self.dtype, name="c5")(x))
    x = self.activation(nn.Dense(84, dtype=self.dtype, name="f6")(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def _convolve_and_pool(model: LeNet5, x: jax.Array, name: str, features: int) -> jax.Array:
  """[B, H, W, C] -> [B, (H - 4) / 2, (W - 4) / 2, features]."""
  x = Conv(features, (5, 5), padding="VALID", dtype=model.dtype, name=name)(x)
  return POOLS[model.pool](model.activation(x))


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    "lenet5": functools.partial(LeNet5),  # 61,706 parameters with one channel and ten classes
}
