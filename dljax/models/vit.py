"""The vision transformer: an image as a sequence of patches.

Alexey Dosovitskiy et al. "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale", 2021. https://arxiv.org/abs/2010.11929

The sizes Ti and S come from Touvron et al. 2021 (https://arxiv.org/abs/2012.12877). What differs
from the paper:
- The head is one linear layer, as in the paper's fine-tuning; for training from scratch the paper
  has a hidden layer with tanh before it. The head starts at zero, as in the paper's fine-tuning
  and in torchvision.
- `pool="mean"` takes the mean over patches instead of a class token (appendix D.3).
  `positions="sincos"` takes fixed sines and cosines of the two coordinates (Chen et al. 2021,
  https://arxiv.org/abs/2104.02057, appendix).
- Learned positions start with a standard deviation of 1 / sqrt(D), as in the authors' later code,
  not of 0.02: small networks learn faster.
- `vit_nano` is not in the paper; it is made of the same blocks, for images of 16 to 32 pixels.

Queries, keys and values come from one projection, whose kernel is [D, heads, 3, D / heads]. So
devices that share a layer hold whole heads, and attention moves nothing between them.

Dimensions: `B` batch, `H` height, `W` width, `P` patch side, `N` tokens, `D` embedding.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dljax import errors
from dljax.models.layers import Conv, StochasticDepth
from dljax.ops.attention import attention, attention_with_weights
from dljax.ops.gelu import gelu

POOLS = ("token", "mean")
POSITIONS = ("learned", "sincos")


class Block(nn.Module):
  """Attention and a perceptron, each on normalised tokens, with shortcuts (equations 2 and 3).

  Attributes:
    num_heads: the number of attention heads.
    mlp_dim: the width of the perceptron's hidden layer.
    dropout: the dropout after the attention and each layer of the perceptron.
    drop_rate: the rate of stochastic depth.
    dtype: the dtype of the computation.
  """

  num_heads: int
  mlp_dim: int
  dropout: float
  drop_rate: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, N, D] -> [B, N, D]."""
    width = x.shape[-1]
    # DenseGeneral initialises a kernel as a matrix [inputs, outputs], whose fans count.
    init = nn.initializers.xavier_uniform()
    dense = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=init)
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
    drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)

    heads = (self.num_heads, 3, width // self.num_heads)
    qkv = dense(heads, name="qkv")(norm(name="norm1")(x))
    query, key, value = jnp.moveaxis(qkv, 3, 0)  # each [B, N, heads, D / heads]
    if self.is_mutable_collection("intermediates"):
      y, weights = attention_with_weights(query, key, value)
      self.sow("intermediates", "attention", weights)  # [B, heads, N, N]; rows sum to 1
    else:
      y = attention(query, key, value)
    y = drop()(dense(width, axis=(-2, -1), name="project")(y))
    x = x + StochasticDepth(self.drop_rate)(y, train)

    y = gelu(dense(self.mlp_dim, name="mlp1")(norm(name="norm2")(x)))
    y = drop()(dense(width, name="mlp2")(drop()(y)))
    return x + StochasticDepth(self.drop_rate)(y, train)


class ViT(nn.Module):
  """Patches, positions, an encoder and a linear head (figure 1).

  Attributes:
    num_classes: the number of logits.
    patch_size: the side of a patch, in pixels.
    embed_dim, num_layers, num_heads: the encoder's sizes; its perceptrons are four times as wide.
    pool: what the head sees: "token" or "mean".
    positions: the kind of position embeddings, "learned" or "sincos".
    dropout: the dropout after the positions, the attention and each layer of the perceptrons.
    stochastic_depth: the last block's rate; the rates grow from 0 in proportion to depth.
    dtype: the dtype of the computation and the result; parameters are float32.
    remat: whether to recompute each block in the backward pass instead of storing its activations.
  """

  num_classes: int
  patch_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  pool: str = "token"
  positions: str = "learned"
  dropout: float = 0.0
  stochastic_depth: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array:
    """Classifies images.

    Args:
      image: [B, H, W, C], H and W multiples of the patch size. Learned positions fit one size.
      mask: f32[B], 0 where a row is padding; has no effect, as no layer lets rows see each other.
      train: whether to drop units and blocks.

    Returns:
      Logits [B, num_classes] of `dtype`. The intermediates "attention" are the blocks' weights.

    Raises:
      UserError: the images' size does not fit, or `pool` or `positions` is unknown.
    """
    del mask
    grid = self._grid(image)
    fan_in = self.patch_size**2 * image.shape[-1]
    init = nn.initializers.truncated_normal(fan_in**-0.5)
    x = Conv(self.embed_dim, (self.patch_size,) * 2, strides=self.patch_size, padding="VALID",
             kernel_init=init, dtype=self.dtype, name="patches")(image)
    x = x.reshape(x.shape[0], -1, self.embed_dim)  # [B, N, D]
    tokens = int(self.pool == "token")
    if tokens:
      token = self.param("class_token", nn.initializers.zeros, (1, 1, self.embed_dim), jnp.float32)
      token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.embed_dim))
      x = jnp.concatenate([token, x], axis=1)
    x = x + self._positions(grid, tokens).astype(x.dtype)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)

    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    for i in range(self.num_layers):
      x = block(
          num_heads=self.num_heads, mlp_dim=4 * self.embed_dim, dropout=self.dropout,
          drop_rate=self.stochastic_depth * i / max(1, self.num_layers - 1), dtype=self.dtype,
          name=f"block{i}",
      )(x, train)
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
    x = x[:, 0] if tokens else jnp.mean(x, axis=1)  # [B, D]
    init = nn.initializers.zeros
    return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(x)

  def _grid(self, image: jax.Array) -> tuple[int, int]:
    """Returns the numbers of rows and columns of patches."""
    if self.pool not in POOLS:
      raise errors.unknown("ViT's pool", self.pool, POOLS)
    if self.positions not in POSITIONS:
      raise errors.unknown("ViT's positions", self.positions, POSITIONS)
    height, width, side = *image.shape[1:3], self.patch_size
    if height % side or width % side or not height or not width:
      fit = "x".join(str(max(side, n // side * side)) for n in (height, width))
      raise errors.UserError(
          f"images of {height}x{width} pixels are no whole number of patches of {side}x{side}: "
          f"resize them to {fit}, or take another patch size")
    return height // side, width // side

  def _positions(self, grid: tuple[int, int], tokens: int) -> jax.Array:
    """[1, tokens + N, D]."""
    if self.positions == "sincos":
      table = sincos_positions(grid, self.embed_dim)
      return jnp.pad(table, ((0, 0), (tokens, 0), (0, 0)))
    shape = (1, tokens + grid[0] * grid[1], self.embed_dim)
    if self.has_variable("params", "positions"):
      stored = self.get_variable("params", "positions").shape
      if stored != shape:
        raise errors.UserError(
            f"the positions were learned for {stored[1] - tokens} patches, but these images have "
            f"{grid[0]}x{grid[1]}: resize the images, or interpolate the positions first "
            "(vit.interpolate_positions)")
    return self.param("positions", nn.initializers.normal(self.embed_dim**-0.5), shape)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
  """Sine and cosine of column, then row, at width / 4 frequencies: f32[1, grid's size, width]."""
  if width % 4:
    raise errors.UserError(f"sincos positions need a width that 4 divides, not {width}")
  frequencies = 10_000.0**(-np.arange(width // 4) / (width // 4))
  row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
  angles = [n.reshape(-1, 1) * frequencies for n in (column, row)]
  table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
  return table[None].astype(np.float32)


def interpolate_positions(
    table: jax.Array, grid_from: tuple[int, int], grid_to: tuple[int, int],
) -> jax.Array:
  """Resizes learned positions (section 3.2), by bicubic, antialiased interpolation as in timm.

  Args:
    table: the parameter "positions", [1, tokens + N, D]; the class token's row stays as it is.
    grid_from, grid_to: the numbers of rows and columns of patches.

  Returns:
    [1, tokens + N', D].

  Raises:
    UserError: the table's size is not that of `grid_from`.
  """
  tokens = table.shape[1] - grid_from[0] * grid_from[1]
  if tokens not in (0, 1):
    raise errors.UserError(f"a table of {table.shape[1]} positions is not for "
                           f"{grid_from[0]}x{grid_from[1]} patches: name the grid of its training")
  patches = table[0, tokens:].reshape(*grid_from, -1)
  patches = jax.image.resize(patches, (*grid_to, patches.shape[-1]), "cubic", antialias=True)
  return jnp.concatenate([table[:, :tokens], patches.reshape(1, -1, patches.shape[-1])], axis=1)


def _vit(patch: int, embed_dim: int, num_layers: int, num_heads: int) -> Callable[..., nn.Module]:
  return functools.partial(
      ViT, patch_size=patch, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads)


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Table 1 of Touvron et al. 2021 and of Dosovitskiy et al. 2021, with the numbers of parameters
    # with 1000 classes and images of 224 pixels.
    "vit_ti16": _vit(16, 192, 12, 3),  # 5,717,416
    "vit_s16": _vit(16, 384, 12, 6),  # 22,050,664
    "vit_b16": _vit(16, 768, 12, 12),  # 86,567,656
    "vit_b32": _vit(32, 768, 12, 12),  # 88,224,232
    "vit_l16": _vit(16, 1024, 24, 16),  # 304,326,632
    "vit_nano": _vit(4, 96, 6, 4),
}

# See `dljax.tasks.base.TaskBase.sharding`. `tensor` splits heads and hidden units: the first product
# of a pair by columns and the second by rows, so that each pair ends with one sum over the devices
# (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).
SHARDING: Sequence[tuple[str, tuple[str | None, ...]]] = (
    ("*/qkv/kernel", ("fsdp", "tensor", None, None)),
    ("*/qkv/bias", ("tensor", None, None)),
    ("*/project/kernel", ("tensor", None, "fsdp")),
    ("*/mlp1/kernel", ("fsdp", "tensor")),
    ("*/mlp1/bias", ("tensor",)),
    ("*/mlp2/kernel", ("tensor", "fsdp")),
)
# See `no_decay` (the same as in timm) and `input_dimensions` of `dljax.tasks.base.TaskBase`.
NO_DECAY: Sequence[str] = ("class_token", "positions", "*/class_token", "*/positions")
INPUT_DIMENSIONS: Sequence[tuple[str, int]] = (("*/qkv/kernel", 1),)
