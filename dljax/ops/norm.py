"""Layer normalisation, whose gradient is written out.

Jimmy Lei Ba, Jamie Ryan Kiros, Geoffrey E. Hinton. "Layer Normalization", 2016.
https://arxiv.org/abs/1607.06450

The gradient that JAX derives follows each operation of the forward pass. Written out (equation 4
derived by hand), it reads the input and the result's gradient twice, and keeps nothing but the
input, the mean and the standard deviation of each vector. On a CPU the result is computed once:
XLA would compute it again, transposed, for the gradient of the kernel that it is multiplied by.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dljax.ops.barrier import once

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
  """Moves each vector to mean 0 and scales it to variance 1; then scales and moves it as told.

  It is computed in float32 or wider, the variance in a second pass, and rounded once. It cannot be
  differentiated in forward mode.

  Args:
    x: [..., D].
    scale: [D].
    bias: [D], or None.
    epsilon: the number added to the variance.

  Returns:
    [..., D], of x's dtype.
  """
  return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean = jnp.mean(wide, axis=-1, keepdims=True)
  rate = lax.rsqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True) + epsilon)
  y = (wide - mean) * rate * scale
  y = (y if bias is None else y + bias).astype(x.dtype)
  y = once(y)
  return y, (x, scale, bias, mean, rate)


def _backward(epsilon, kept, dy):
  del epsilon  # it is in the rate
  x, scale, bias, mean, rate = kept
  rows = tuple(range(x.ndim - 1))
  dy = dy.astype(mean.dtype)
  unit = (x.astype(mean.dtype) - mean) * rate
  dunit = dy * scale
  along = jnp.mean(dunit * unit, axis=-1, keepdims=True)
  dx = rate * (dunit - jnp.mean(dunit, axis=-1, keepdims=True) - unit * along)
  dscale = jnp.sum(dy * unit, axis=rows).astype(scale.dtype)
  dbias = None if bias is None else jnp.sum(dy, axis=rows).astype(bias.dtype)
  return dx.astype(x.dtype), dscale, dbias


layer_norm.defvjp(_forward, _backward)
