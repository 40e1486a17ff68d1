"""The vision transformer: an image as a sequence of patches.

Alexey Dosovitskiy et al. "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", 2021.
https://arxiv.org/abs/2010.11929

The sizes Ti and S are of Touvron et al. 2021 (https://arxiv.org/abs/2012.12877). What differs from the paper:
- The head is one linear layer, as in the paper's fine-tuning; for training from scratch the paper has a hidden
  layer with tanh before it. It starts at zero, as in the paper's fine-tuning and in torchvision.
- `pool="mean"` takes the mean over patches instead of a class token (appendix D.3), and `positions="sincos"`
  fixed sines and cosines of the two coordinates (Chen et al. 2021, https://arxiv.org/abs/2104.02057, appendix).
- Learned positions start with a standard deviation of 1 / sqrt(D), as in the authors' later code, not of 0.02:
  small networks learn faster.
- `vit_nano` is no network of the paper's, but its blocks in a size for images of 16 to 32 pixels.

The projection to queries, keys and values is one, whose kernel is [D, heads, 3, D / heads], heads
first: devices that share a layer then hold whole heads, and attention moves nothing between them.

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

POOLS = ("token", "mean")
POSITIONS = ("learned", "sincos")


class Block(nn.Module):
  """Attention and a multilayer perceptron, each on normalised tokens and with a shortcut (equations 2 and 3).

  Attributes:
    num_heads: of the attention.
    mlp_dim: width of the perceptron's hidden layer.
    dropout: after the attention and each layer of the perceptron.
    drop_rate: of stochastic depth.
    dtype: of the computation.
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
    # DenseGeneral draws the kernel as one matrix [inputs, outputs], so that the fans are those of
    # the matrix.
    dense = functools.partial(
        nn.DenseGeneral, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
    drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)

    heads = (self.num_heads, 3, width // self.num_heads)
    qkv = dense(heads, name="qkv")(norm(name="norm1")(x))
    query, key, value = jnp.moveaxis(qkv, 3, 0)  # each [B, N, heads, D / heads]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1]**-0.5, key)
    attention = nn.softmax(scores.astype(jnp.promote_types(self.dtype, jnp.float32))).astype(self.dtype)
    self.sow("intermediates", "attention", attention)  # [B, heads, N, N]; rows sum to 1
    y = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
    y = drop()(dense(width, axis=(-2, -1), name="project")(y))
    x = x + StochasticDepth(self.drop_rate)(y, train)

    y = nn.gelu(dense(self.mlp_dim, name="mlp1")(norm(name="norm2")(x)), approximate=False)
    y = drop()(dense(width, name="mlp2")(drop()(y)))
    return x + StochasticDepth(self.drop_rate)(y, train)


class ViT(nn.Module):
  """Patches, positions, an encoder and a linear head (figure 1).

  Attributes:
    num_classes: number of logits.
    patch_size: side of a patch, in pixels.
    embed_dim, num_layers, num_heads: sizes of the encoder; the perceptrons are four times as wide.
    pool: what the head sees: "token" or "mean".
    positions: "learned" or "sincos".
    dropout: after the positions, the attention and each layer of the perceptrons.
    stochastic_depth: rate that the blocks' rates grow to, from 0, in proportion to their depth.
    dtype: of the computation and the result; parameters are float32.
    remat: recompute each block in the backward pass instead of storing its inside.
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
  def __call__(self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
    """Classifies.

    Args:
      image: [B, H, W, C], with H and W multiples of the patch size. Learned positions are for one size.
      mask: f32[B], 0 where a row is padding; without effect, as no layer lets rows see each other.
      train: whether to drop units and blocks.

    Returns:
      Logits [B, num_classes] of `dtype`. Each block's weights are its intermediate "attention".

    Raises:
      UserError: on images that patches do not tile, on positions learned for another size, and on an unknown
        `pool` or `positions`.
    """
    del mask
    grid = self._grid(image)
    fan_in = self.patch_size**2 * image.shape[-1]
    x = Conv(
        self.embed_dim, (self.patch_size,) * 2, strides=self.patch_size, padding="VALID", dtype=self.dtype,
        kernel_init=nn.initializers.truncated_normal(fan_in**-0.5), name="patches")(image)
    x = x.reshape(x.shape[0], -1, self.embed_dim)  # [B, N, D]
    tokens = int(self.pool == "token")
    if tokens:
      token = self.param("class_token", nn.initializers.zeros, (1, 1, self.embed_dim), jnp.float32)
      x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.embed_dim)), x], axis=1)
    x = x + self._positions(grid, tokens).astype(x.dtype)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)

    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    for i in range(self.num_layers):
      x = block(
          num_heads=self.num_heads, mlp_dim=4 * self.embed_dim, dropout=self.dropout,
          drop_rate=self.stochastic_depth * i / max(1, self.num_layers - 1), dtype=self.dtype, name=f"block{i}",
      )(x, train)
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
    x = x[:, 0] if tokens else jnp.mean(x, axis=1)  # [B, D]
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="head")(x)

  def _grid(self, image: jax.Array) -> tuple[int, int]:
    """Rows and columns of patches."""
    if self.pool not in POOLS:
      raise errors.unknown("ViT's pool", self.pool, POOLS)
    if self.positions not in POSITIONS:
      raise errors.unknown("ViT's positions", self.positions, POSITIONS)
    height, width = image.shape[1:3]
    side = self.patch_size
    if height % side or width % side or not height or not width:
      fit = "x".join(str(max(side, n // side * side)) for n in (height, width))
      raise errors.UserError(f"images of {height}x{width} pixels are no whole number of patches of {side}x{side}: "
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
        raise errors.UserError(f"the positions were learned for {stored[1] - tokens} patches, but these images have "
                               f"{grid[0]}x{grid[1]}: resize the images, or interpolate the positions first "
                               "(vit.interpolate_positions)")
    return self.param("positions", nn.initializers.normal(self.embed_dim**-0.5), shape, jnp.float32)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
  """f32[1, rows * columns, width]: sine and cosine of the column, then of the row, at width / 4 frequencies."""
  if width % 4:
    raise errors.UserError(f"sincos positions need a width that 4 divides, not {width}")
  frequencies = 10_000.0**(-np.arange(width // 4) / (width // 4))
  row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
  angles = [n.reshape(-1, 1) * frequencies for n in (column, row)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)[None].astype(np.float32)


def interpolate_positions(
    table: jax.Array, grid_from: tuple[int, int], grid_to: tuple[int, int],
) -> jax.Array:
  """Learned positions for another number of patches (section 3.2), bicubic and antialiased as timm's.

  Args:
    table: [1, tokens + N, D], the parameter "positions"; rows before the patches' (the class token's) stay.
    grid_from, grid_to: rows and columns of patches.

  Returns:
    [1, tokens + N', D].

  Raises:
    UserError: on a table with fewer positions than `grid_from` has.
  """
  tokens = table.shape[1] - grid_from[0] * grid_from[1]
  if tokens not in (0, 1):
    raise errors.UserError(f"a table of {table.shape[1]} positions is not for {grid_from[0]}x{grid_from[1]} patches")
  patches = table[0, tokens:].reshape(*grid_from, -1)
  patches = jax.image.resize(patches, (*grid_to, patches.shape[-1]), "cubic", antialias=True)
  return jnp.concatenate([table[:, :tokens], patches.reshape(1, -1, patches.shape[-1])], axis=1)


def _vit(patch_size: int, embed_dim: int, num_layers: int, num_heads: int) -> Callable[..., nn.Module]:
  return functools.partial(
      ViT, patch_size=patch_size, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads)


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Touvron et al. 2021, table 1, and Dosovitskiy et al. 2021, table 1; parameters at 1000 classes, 224 pixels.
    "vit_ti16": _vit(16, 192, 12, 3),  # 5,717,416
    "vit_s16": _vit(16, 384, 12, 6),  # 22,050,664
    "vit_b16": _vit(16, 768, 12, 12),  # 86,567,656
    "vit_b32": _vit(32, 768, 12, 12),  # 88,224,232
    "vit_l16": _vit(16, 1024, 24, 16),  # 304,326,632
    "vit_nano": _vit(4, 96, 6, 4),
}

# See `dljax.tasks.base.sharding_rules`. `tensor` cuts heads and hidden units: the first product of
# a pair by columns, the second by rows, so that one sum over its devices ends each of them
# (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).
SHARDING: Sequence[tuple[str, tuple[str | None, ...]]] = (
    ("*/qkv/kernel", ("fsdp", "tensor", None, None)),
    ("*/qkv/bias", ("tensor", None, None)),
    ("*/project/kernel", ("tensor", None, "fsdp")),
    ("*/mlp1/kernel", ("fsdp", "tensor")),
    ("*/mlp1/bias", ("tensor",)),
    ("*/mlp2/kernel", ("tensor", "fsdp")),
)
# See `dljax.tasks.base.input_dimensions`.
INPUT_DIMENSIONS: Sequence[tuple[str, int]] = (("*/qkv/kernel", 1),)
