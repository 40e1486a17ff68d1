"""The Gaussian error linear unit and its approximation, in a form that is fast on a CPU.

Dan Hendrycks, Kevin Gimpel. "Gaussian Error Linear Units (GELUs)", 2016.
https://arxiv.org/abs/1606.08415

`jax.nn.gelu(approximate=False)` is written with the complementary error function, for which XLA has
no fast form on a CPU, and its gradient computes that function again. Written with the error
function, the result differs by less than 1e-6 in float32. The approximation by tanh has the same
form: a value and a slope, found together, of which a CPU computes each once.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dljax.ops.barrier import once

Array = jax.Array


@jax.custom_jvp
def gelu(x: Array) -> Array:
  """x times the probability that a standard normal number is below x, [...] -> [...].

  It is computed in float32 or wider, and rounded once to x's dtype.
  """
  return _value_and_slope(x)[0]


@gelu.defjvp
def _derivative(primals, tangents):
  (x,), (dx,) = primals, tangents
  value, slope = once(_value_and_slope(x))
  return value, slope * dx


def _value_and_slope(x: Array) -> tuple[Array, Array]:
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  below = 0.5 * (1 + lax.erf(wide * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
  return (wide * below).astype(x.dtype), (below + wide * density).astype(x.dtype)


@jax.custom_jvp
def gelu_tanh(x: Array) -> Array:
  """The approximation by tanh of GPT-2 (section 2 of the paper), [...] -> [...].

  It is computed in float32 or wider, and rounded once to x's dtype.
  """
  return _tanh_value_and_slope(x)[0]


@gelu_tanh.defjvp
def _tanh_derivative(primals, tangents):
  (x,), (dx,) = primals, tangents
  value, slope = once(_tanh_value_and_slope(x))
  return value, slope * dx


def _tanh_value_and_slope(x: Array) -> tuple[Array, Array]:
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  rate = math.sqrt(2 / math.pi)
  square = wide * wide
  tanh = jnp.tanh(rate * wide * (1 + 0.044715 * square))
  below = 0.5 * (1 + tanh)
  slope = below + 0.5 * wide * (1 - tanh * tanh) * rate * (1 + 3 * 0.044715 * square)
  return (wide * below).astype(x.dtype), slope.astype(x.dtype)
