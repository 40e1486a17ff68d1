"""Rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.ops import rotary

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def _turned(x, position, turns):
  return rotary.rotate(x, rotary.angles(position, turns, x.dtype))


def test_products_depend_on_the_distance_alone():
  with jax.enable_x64(True):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 8), jnp.float64)
    turns = rotary.frequencies(8, 100.0)

    def products(i, j):
      a, b = (_turned(x, jnp.full((1, 1), n), turns) for x, n in ((q, i), (k, j)))
      return jnp.sum(a * b, -1)

    np.testing.assert_allclose(products(5, 2), products(1005, 1002), rtol=1e-9)
    assert np.abs(products(5, 2) - products(5, 3)).max() > 1e-2
    np.testing.assert_allclose(products(7, 7), jnp.sum(q * k, -1), rtol=1e-12)


def test_a_pair_is_one_value_of_each_half():
  """Place 1 turns the pair (value i, value D / 2 + i) by the i-th frequency."""
  turns = rotary.frequencies(6, 10.0)
  np.testing.assert_allclose(turns, [1, 10**(-1 / 3), 10**(-2 / 3)])
  for i in range(3):
    x = np.zeros((1, 1, 1, 6), np.float32)
    x[..., i] = 1
    wanted = np.zeros(6)
    wanted[i], wanted[3 + i] = np.cos(turns[i]), np.sin(turns[i])
    np.testing.assert_allclose(_turned(jnp.asarray(x), jnp.ones((1, 1)), turns)[0, 0, 0], wanted, atol=1e-6)


def test_llama3_slows_long_waves_and_keeps_short_ones():
  plain, scaled = rotary.frequencies(32, 500.0), rotary.frequencies(32, 500.0, LLAMA3)
  waves, ratio = 2 * np.pi / plain, scaled / plain
  np.testing.assert_allclose(ratio[waves < 64 / 4], 1)
  np.testing.assert_allclose(ratio[waves > 64 / 1], 1 / 8)
  middle = ratio[(waves > 64 / 4) & (waves < 64)]
  assert len(middle) and np.all((middle > 1 / 8) & (middle < 1)) and np.all(np.diff(ratio) <= 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_angles_are_at_least_float32(dtype):
  """In bfloat16 places above 256 could not be told apart."""
  angles = rotary.angles(jnp.array([[1000, 1001]]), rotary.frequencies(2), dtype)
  assert angles.dtype == jnp.float32 and angles[0, 1, 0] - angles[0, 0, 0] == 1
  x = jnp.ones((1, 2, 1, 2), dtype)
  assert rotary.rotate(x, angles).dtype == dtype
