"""Layers that several families share.

BatchNorm. Sergey Ioffe, Christian Szegedy. "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift", 2015. https://arxiv.org/abs/1502.03167

Stochastic depth. Gao Huang, Yu Sun, Zhuang Liu, Daniel Sedra, Kilian Weinberger. "Deep Networks
with Stochastic Depth", 2016. https://arxiv.org/abs/1603.09382

RMSNorm. Biao Zhang, Rico Sennrich. "Root Mean Square Layer Normalization", 2019.
https://arxiv.org/abs/1910.07467

Dimensions: `B` batch, `C` channels, `D` width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax.ops import collectives
from dljax.ops.conv import conv_general_dilated

# The convolution of every family: `flax.linen.Conv` in a form that is fast on a CPU too.
Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, for the whole batch over all devices.

  Unlike `flax.linen.BatchNorm` it ignores padding rows and needs no axis name (sums over devices
  go through `ops.collectives`, so jit and pmap give the same numbers). It keeps its running
  statistics as PyTorch does: the running variance is the unbiased one, and `momentum` is the
  weight of the *new* value.

  The variance is the mean of (x - mean)^2, computed in a second pass. E[x^2] - E[x]^2 would need
  one pass and one sum over devices instead of two, but in float32 it loses every digit once the
  mean is some thousand standard deviations from zero, and it can be negative.

  Statistics, parameters and the normalisation itself are at least float32; only the result has
  `dtype`.

  Attributes:
    momentum: the weight of the new batch in the running statistics.
    epsilon: the number added to the variance.
    scale_init: the initialiser of the scale; zeros make a residual block start as the identity.
    dtype: the dtype of the result.
  """

  momentum: float = 0.1
  epsilon: float = 1e-5
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
    """Normalises `x` by the batch's statistics (`train`) or by the running ones.

    Args:
      x: [B, ..., C].
      mask: f32[B], 0 where a row is padding, or [B, L], 0 where a step is padding. Padding is
        normalised, but does not count. If all devices hold nothing but padding, the running
        statistics stay as they are.
      train: whether to use the batch's statistics and, if the collection "batch_stats" is mutable,
        to update the running ones.

    Returns:
      [B, ..., C] of `dtype`.
    """
    channels = x.shape[-1]
    scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if train:
      mean, var, count = _moments(x, mask)
      if self.is_mutable_collection("batch_stats") and not self.is_initializing():
        momentum = jnp.where(count > 0, self.momentum, 0.0)
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
          old = running.value
          running.value = (old + momentum * (new - old)).astype(old.dtype)
    else:
      mean, var = running_mean.value, running_var.value
    y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
    return y.astype(self.dtype)


def _moments(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns mean [C], biased variance [C] and number per channel [] of the values that count."""
  axes = tuple(range(x.ndim - 1))
  if mask is None:
    where, count = None, jnp.asarray(math.prod(x.shape[:-1]), x.dtype)
  else:
    where = (mask > 0).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    count = jnp.sum(where, dtype=x.dtype) * math.prod(x.shape[mask.ndim:-1])
  total, count = collectives.psum((jnp.sum(x, axes, where=where), count))
  mean = total / jnp.maximum(count, 1)
  var = collectives.psum(jnp.sum(jnp.square(x - mean), axes, where=where)) / jnp.maximum(count, 1)
  return mean, var, count


class StochasticDepth(nn.Module):
  """Leaves out a residual branch for random rows.

  The branch of the other rows is scaled, so that the mean stays the same.

  Attributes:
    rate: the probability of leaving out a row's branch, drawn from the rng stream "dropout".
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, ...] -> [B, ...]; the identity unless `train`."""
    if not train or self.rate == 0:
      return x
    keep = 1 - self.rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
    return jnp.where(kept, x / keep, 0).astype(x.dtype)


class RMSNorm(nn.Module):
  """Divides each vector by its root mean square, and scales it.

  The division is computed in float32 or wider, and rounded to `dtype` before the scale, as in the
  decoders of Touvron et al. 2023 (https://arxiv.org/abs/2302.13971).

  Attributes:
    epsilon: the number added to the mean square.
    dtype: the dtype of the result.
  """

  epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    return x.astype(self.dtype) * scale.astype(self.dtype)
