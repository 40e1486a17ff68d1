"""The Gaussian error linear unit, in a form that is fast on a CPU.

Dan Hendrycks, Kevin Gimpel. "Gaussian Error Linear Units (GELUs)", 2016.
https://arxiv.org/abs/1606.08415

`jax.nn.gelu(approximate=False)` is written with the complementary error function, for which XLA has
no fast form on a CPU, and its gradient computes that function again. Written with the error
function, the result differs by less than 1e-6 in float32.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@jax.custom_jvp
def gelu(x: Array) -> Array:
  """x times the probability that a standard normal number is below x, [...] -> [...].

  It is computed in float32 or wider, and rounded once to x's dtype.
  """
  return _value_and_slope(x)[0].astype(x.dtype)


@gelu.defjvp
def _derivative(primals, tangents):
  (x,), (dx,) = primals, tangents
  value, slope = _value_and_slope(x)
  return value.astype(x.dtype), (slope * dx).astype(x.dtype)


def _value_and_slope(x: Array) -> tuple[Array, Array]:
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  below = 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
  return x * below, below + x * density


def gelu_tanh(x: Array) -> Array:
  """The approximation by tanh of GPT-2 (section 2 of the paper), [...] -> [...]."""
  return jax.nn.gelu(x, approximate=True)
