"""Our model against a fixture (`tests/fixtures`) of the same model elsewhere."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import interop
from tests.fixtures import formula


def assert_parity(
    build: Callable[..., nn.Module], source: str, stem: str, tolerance: float = 1e-4,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Asserts equal outputs in evaluation mode, and weights that come back bit for bit.

  In float32 as users run it, and in float64, where nothing but rounding errors of 1e-16 can differ.

  Args:
    build: makes the model, given a dtype.
    source: whose names the fixture has.
    stem: name of the fixture.
    tolerance: in float32, as a part of the difference between two inputs' logits.

  Returns:
    The fixture and the loaded variables.
  """
  fixture = formula.load(stem)
  tensors = formula.tensors(fixture)
  image = formula.image(tuple(fixture["image_shape"]))
  model = build(dtype=jnp.float32)
  variables = interop.load(model, tensors, source)
  assert_equals_peer(jax.jit(model.apply)(variables, image), fixture["logits"], tolerance)
  with jax.enable_x64(True):
    logits = jax.jit(build(dtype=jnp.float64).apply)(*jax.tree.map(np.float64, (variables, image)))
    assert_equals_peer(logits, fixture["logits"], 1e-9)

  back = interop.dump(model, variables, source)
  assert back.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert back[name].dtype == tensor.dtype
    np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)
  return fixture, variables


def assert_equals_peer(ours: jax.Array, theirs: np.ndarray, tolerance: float) -> None:
  """Asserts that two inputs' logits agree within `tolerance` of the difference between the two.

  Measured against the size of the logits, a network that ignores its input would pass.
  """
  difference = np.abs(theirs[0] - theirs[1]).max()
  assert difference > 0.1 * np.abs(theirs).max()
  error = np.abs(np.asarray(ours, np.float64) - theirs).max() / difference
  assert error < tolerance, f"off by {error:.1e}"
