"""Rotary positions: queries and keys turned by angles that grow with their place.

Jianlin Su et al. "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
https://arxiv.org/abs/2104.09864

The product of a turned query and a turned key depends on the distance between them alone. The
paper turns neighbouring pairs of a head's values; here, as in all decoders since GPT-NeoX, value i
of the first half and value i of the second half make a pair.

Dimensions: `B` batch, `L` places, `H` heads, `D` width of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def frequencies(
    width: int, theta: float = 10_000.0, scaling: Mapping[str, float] | None = None,
) -> np.ndarray:
  """The angle by which each pair turns from one place to the next, in radians: f64[D / 2].

  Args:
    width: D, an even number.
    theta: the base; pair i turns by theta^(-2 i / D) (equation 15).
    scaling: None; or how Llama 3.1 stretches its context (Dubey et al. 2024,
      https://arxiv.org/abs/2407.21783): pairs whose wavelength is above
      original_max_position_embeddings / low_freq_factor turn `factor` times slower, those below
      original_max_position_embeddings / high_freq_factor as before, and between them it is mixed.
  """
  turns = theta**(-np.arange(0, width, 2, dtype=np.float64) / width)
  if scaling is None:
    return turns
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  rounds = scaling["original_max_position_embeddings"] * turns / (2 * math.pi)
  kept = np.clip((rounds - low) / (high - low), 0, 1)
  return turns * (kept + (1 - kept) / scaling["factor"])


def angles(position: Array, turns: np.ndarray, dtype: Any) -> Array:
  """The angles [..., D / 2], float32 or wider, of positions i32[...]; `turns` are `frequencies`."""
  return position[..., None] * jnp.asarray(turns, jnp.promote_types(dtype, jnp.float32))


def rotate(x: Array, angles: Array) -> Array:
  """Turns each pair of values by its place's angle, in float32 or wider.

  Args:
    x: [B, L, H, D].
    angles: [B or 1, L, D / 2], in radians.

  Returns:
    [B, L, H, D], of x's dtype.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  first, second = jnp.split(wide, 2, axis=-1)
  cos, sin = (f(angles)[:, :, None, :].astype(wide.dtype) for f in (jnp.cos, jnp.sin))
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
