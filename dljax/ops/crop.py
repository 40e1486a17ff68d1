"""The middle of an image, or of a map of features."""

import jax
import numpy as np


def crop(x: jax.Array | np.ndarray, size: tuple[int, int]) -> jax.Array | np.ndarray:
  """Cuts the middle out of x [B, H, W, ...]; where an odd pixel is left over, it is cut behind.

  Args:
    x: an array of either kind; the result is of the same kind.
    size: the height h and the width w of the result, at most H and W.

  Returns:
    [B, h, w, ...].
  """
  top, left = ((have - want) // 2 for have, want in zip(x.shape[1:3], size))
  return x[:, top:top + size[0], left:left + size[1]]
