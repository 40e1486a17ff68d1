"""Cropping: the middle, of either kind of array."""

import jax.numpy as jnp
import numpy as np
import pytest

from dljax.ops.crop import crop


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_crop_takes_the_middle(array):
  x = array(np.arange(2 * 9 * 7).reshape(2, 9, 7, 1))
  np.testing.assert_array_equal(crop(x, (5, 3)), x[:, 2:7, 2:5])
  np.testing.assert_array_equal(crop(x[..., 0], (9, 7)), x[..., 0])
  np.testing.assert_array_equal(crop(x, (8, 4)), x[:, :8, 1:5])  # the odd pixel is cut behind
  assert type(crop(x, (5, 3))) is type(x)
