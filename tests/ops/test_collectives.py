"""The collectives on four devices: the same numbers under jit and pmap, the identity elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.ops import collectives
from dljax.train import parallel

MODES = ["jit", "pmap"]
ROWS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def _run(function, mode, role="shared"):
  """`function` of `ROWS`, of which each of four devices holds two; the result has the given role."""
  mesh = parallel.make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, mode)
  step = lambda batch: (function(batch["rows"]),)
  compiled = parallel.compile_step(step, mode, mesh, inputs=("batch",), outputs=(role,))
  out, = compiled(parallel.put_batch({"rows": ROWS}, mode, mesh))
  return parallel.rows_to_host(out, mode) if role == "batch" else jax.tree.map(np.asarray, out)


@pytest.mark.parametrize("mode", MODES)
def test_a_sum_over_rows_is_that_over_all_devices(mode):
  found = _run(lambda x: collectives.psum({"sum": jnp.sum(x, 0), "pair": (jnp.sum(x**2), jnp.float32(len(x)))}), mode)
  np.testing.assert_allclose(found["sum"], ROWS.sum(0), rtol=1e-5)
  np.testing.assert_allclose(found["pair"], (np.sum(ROWS**2), 8), rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_every_device_gets_all_rows_in_order(mode):
  found = _run(lambda x: collectives.all_gather({"rows": x, "first": x[:, 0]}), mode)
  np.testing.assert_array_equal(found["rows"], ROWS)
  np.testing.assert_array_equal(found["first"], ROWS[:, 0])


@pytest.mark.parametrize("mode, expected", [("jit", [0] * 8), ("pmap", [0, 0, 1, 1, 2, 2, 3, 3])])
def test_a_device_knows_its_place_among_the_rows(mode, expected):
  assert _run(lambda x: jnp.full(len(x), collectives.axis_index()), mode, "batch").tolist() == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gather", [False, True])
def test_gradients_of_shares_add_up_to_that_of_the_whole(mode, gather):
  """As of BatchNorm: each share depends on the other devices' rows, here by the mean of w * rows."""
  def share(w, x):
    total = jnp.sum(collectives.all_gather(w * x)) if gather else collectives.psum(jnp.sum(w * x))
    return jnp.sum((w * x - total / ROWS.size)**2)

  found = _run(lambda x: collectives.psum(jax.grad(share)(jnp.float32(1.5), x)), mode)
  np.testing.assert_allclose(found, 2 * 1.5 * np.sum((ROWS - ROWS.mean())**2), rtol=1e-5)


def test_outside_of_a_context_nothing_happens():
  tree = {"a": jnp.ones(3)}
  with pytest.raises(ZeroDivisionError), collectives.axis_context("left by an error"):
    1 / 0
  assert collectives.psum(tree) is tree and collectives.all_gather(tree) is tree
  assert int(collectives.axis_index()) == 0


def test_outside_of_a_target_nothing_is_known_and_the_whole_is_computed():
  with pytest.raises(ZeroDivisionError), collectives.target_context(collectives.Target("abacus")):
    assert collectives.platform() == "abacus"
    1 / 0
  assert collectives.platform() is None
  assert collectives.on_parts(lambda x, y: x.shape, (ROWS, None), (("batch", None),) * 2, ("batch",)) == (8, 3)


@pytest.mark.parametrize("role, part", [("batch", (2, 3)), ("heads", (8, 3)), (None, (8, 3))])
def test_a_dimension_is_cut_by_the_axes_of_its_role(role, part):
  seen = []

  def double(x, none):
    seen.append(x.shape)
    assert none is None
    return 2 * x

  doubled = _run(lambda x: collectives.on_parts(double, (x, None), ((role, None),) * 2, (role, None)), "jit", "batch")
  assert seen == [part]
  np.testing.assert_array_equal(doubled, 2 * ROWS)
  seen.clear()
  _run(lambda x: collectives.on_parts(double, (x[:6], None), ((role, None),) * 2, (role, None)), "jit", "shared")
  assert seen == [(6, 3)], "four devices do not divide six rows"


def test_under_pmap_every_device_has_its_part_already():
  same = lambda x: collectives.on_parts(lambda x: jnp.full(len(x), len(x)), (x,), (("batch", None),), ("batch",))
  assert _run(same, "pmap", "batch").tolist() == [2] * 8


@pytest.mark.parametrize("mode", MODES)
def test_a_step_knows_the_platform_that_it_is_traced_for(mode):
  seen = []
  _run(lambda x: seen.append(collectives.platform()) or x, mode, "batch")
  assert set(seen) == {"cpu"}
