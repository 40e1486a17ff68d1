"""Variables for tests, without the time that `model.init` takes."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np


def random_variables(model: nn.Module, *inputs: np.ndarray, dtype: Any = np.float32) -> dict[str, Any]:
  """Small random numbers in the shapes of `model.init(key, *inputs)`; those of one axis are positive."""
  rng = np.random.RandomState(0)

  def draw(spec):
    low, high = (-0.3, 0.3) if len(spec.shape) > 1 else (0.1, 0.6)
    return rng.uniform(low, high, spec.shape).astype(dtype)

  return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), *inputs))
