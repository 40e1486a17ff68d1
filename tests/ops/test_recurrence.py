"""The recurrences equal a loop over steps, in every derivative, with padding, under every transformation."""

import functools
import os
import re
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dljax.errors import UserError
from dljax.ops.recurrence import CELLS, Weights, initial_carry, recurrence, valid_steps
from dljax.train import parallel, topology

L, B, D, H = 7, 3, 4, 5
slow = pytest.mark.slow
FORMS = [(cell, reverse, norm) for cell in CELLS for reverse in (False, True) for norm in (False, True)]


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _layer_norm(x, scale):
  if scale is None:
    return x
  return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale


def _definition(cell, x, w, carry, length=None, reverse=False):
  """Row by row and step by step in NumPy, as PyTorch's documentation writes it; padding is cut off."""
  outputs, finals = np.zeros((*x.shape[:2], carry[0].shape[1])), []
  for b in range(x.shape[1]):
    n = len(x) if length is None else int(length[b])
    state = [c[b] for c in carry]
    for t in range(n)[::-1] if reverse else range(n):
      u = _layer_norm(x[t, b] @ w.input, w.input_scale) + w.input_bias
      p = _layer_norm(state[0] @ w.recurrent, w.recurrent_scale) + w.recurrent_bias
      if cell == "lstm":
        i, f, g, o = np.split(u + p, 4)
        c = _sigmoid(f) * state[1] + _sigmoid(i) * np.tanh(g)
        state = [_sigmoid(o) * np.tanh(c), c]
      elif cell == "gru":
        (ur, uz, un), (pr, pz, pn) = np.split(u, 3), np.split(p, 3)
        z = _sigmoid(uz + pz)
        state = [(1 - z) * np.tanh(un + _sigmoid(ur + pr) * pn) + z * state[0]]
      else:
        state = [np.tanh(u + p) if cell == "tanh" else np.maximum(u + p, 0)]
      outputs[t, b] = state[0]
    finals.append(state)
  return outputs, tuple(np.stack(parts) for parts in zip(*finals))


def _inputs(cell, steps=L, batch=B, dims=D, width=H, norm=False, seed=0, dtype=np.float32):
  """(x, weights, carry), random."""
  draw = np.random.default_rng(seed)
  form, n = CELLS[cell], CELLS[cell].gates * width
  normal = lambda *shape, scale=1.0: np.asarray(scale * draw.normal(size=shape), dtype)
  scales = (1 + normal(n, scale=0.2), 1 + normal(n, scale=0.2)) if norm else (None, None)
  weights = Weights(
      normal(dims, n, scale=dims**-0.5), normal(width, n, scale=width**-0.5), normal(n), normal(n), *scales)
  return normal(steps, batch, dims), weights, tuple(normal(batch, width) for _ in range(form.states))


def _run(cell, **options):
  """`recurrence` with lengths in place of `valid`."""

  def run(x, weights, carry, length=None):
    valid = None if length is None else valid_steps(jnp.asarray(length), x.shape[0])
    return recurrence(cell, x, weights, carry, valid, **options)

  return run


def _with_gradients(f, *inputs):
  """Results y and gradients of x, weights and carry, of the sum of sin(3 y) / 3."""
  results, pull = jax.vjp(f, *inputs)
  return results, pull(jax.tree.map(lambda y: jnp.cos(3 * y), results))


@functools.cache
def _compiled(cell, **options):
  return jax.jit(lambda *inputs, length: _with_gradients(lambda *a: _run(cell, **options)(*a, length), *inputs))


def _assert_close(found, expected, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.shape == b.shape
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def _assert_is_the_definition(cell, reverse, inputs, length):
  """In float64: results to the last digits, and gradients along a random direction of each input."""
  definition = lambda *a: _definition(cell, *a, length, reverse)
  results, grads = _compiled(cell, reverse=reverse)(*inputs, length=length)
  _assert_close(results, definition(*inputs), 1e-13)
  leaves, tree = jax.tree.flatten(inputs)
  total = lambda leaves: sum(np.sum(np.sin(3 * y) / 3) for y in jax.tree.leaves(definition(*tree.unflatten(leaves))))
  draw, step = np.random.default_rng(1), 1e-6  # short, and of fourth order: layer norm of nearly equal values is steep
  for i, grad in enumerate(jax.tree.leaves(grads)):
    direction = draw.normal(size=leaves[i].shape)
    moved = lambda s, i=i, d=direction: total([*leaves[:i], leaves[i] + s * step * d, *leaves[i + 1:]])
    slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    np.testing.assert_allclose(np.sum(grad * direction), slope, rtol=1e-6, atol=1e-7)


@functools.cache
def _forward(cell, **options):
  return jax.jit(_run(cell, **options))


@pytest.mark.parametrize("cell, reverse, norm", FORMS)
def test_equals_the_definition_and_its_gradients(cell, reverse, norm):
  with jax.enable_x64(True):
    inputs = _inputs(cell, norm=norm, dtype=np.float64)
    length = np.array([L, 3, 1])
    for some in (length,) if norm else (None, length):  # what has lengths knows nothing of layer norm
      _assert_is_the_definition(cell, reverse, inputs, some)
    exact = _compiled(cell, reverse=reverse)(*inputs, length=length)
  single = jax.tree.map(np.float32, inputs)
  _assert_close(_compiled(cell, reverse=reverse)(*single, length=length), exact, 1e-5)


@st.composite
def recurrences(draw):
  cell, norm, reverse = draw(st.sampled_from(sorted(CELLS))), draw(st.booleans()), draw(st.booleans())
  steps, batch = draw(st.integers(1, 6)), draw(st.integers(1, 3))
  length = draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
  inputs = _inputs(cell, steps, batch, draw(st.integers(1, 4)), draw(st.integers(1, 4)), norm, draw(st.integers(0, 9)),
                   np.float64)
  return cell, reverse, inputs, None if length is None else np.array(length)


def _sweep(case):
  with jax.enable_x64(True):
    _assert_is_the_definition(*case)


test_any_recurrence_equals_the_definition = hypothesis.settings(
    max_examples=8, deadline=None, derandomize=True)(hypothesis.given(recurrences())(_sweep))
test_many_more_recurrences_equal_the_definition = pytest.mark.slow(hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True)(hypothesis.given(recurrences())(_sweep)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_nothing_whatever_stands_in_it(cell, reverse):
  length = np.array([5, 0, 2])
  x, weights, carry = _inputs(cell)
  padding = ~np.asarray(valid_steps(length, L))
  run = lambda x: _compiled(cell, reverse=reverse)(x, weights, carry, length=length)
  plain = run(x)
  for rubbish in (np.nan, np.inf, -1e30):
    filled = run(np.where(padding[..., None], np.float32(rubbish), x))
    jax.tree.map(np.testing.assert_array_equal, filled, plain)
  (outputs, final), (dx, _, _) = plain
  assert not np.any(np.asarray(outputs)[padding]) and not np.any(np.asarray(dx)[padding])
  for end, start in zip(final, carry):
    np.testing.assert_array_equal(end[1], start[1])  # the row without a step
  # Longer padding does not change it either, nor do the other rows.
  forward = _forward(cell, reverse=reverse)
  longer = np.concatenate([x, np.ones((3, B, D), np.float32)])
  y, state = forward(longer, weights, carry, length)
  _assert_close((y[:L], state), (outputs, final), 1e-6)
  alone, state = forward(x[:5, :1], weights, tuple(c[:1] for c in carry))
  _assert_close((outputs[:5, :1], [c[:1] for c in final]), (alone, state), 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_passes_through_padding(reverse):
  """Behind its end, or before it, a row has the state that it had; so it has its gradient."""
  x, weights, carry = _inputs("tanh")

  def end(carry, steps):
    valid = valid_steps(jnp.array([0, 2, 2]), steps)
    _, (h,) = recurrence("tanh", x[:steps, :3], weights, carry, valid, reverse=reverse)
    return jnp.sum(h * jnp.arange(1.0, 4)[:, None])

  carry = tuple(c[:3] for c in carry)
  (long,), (short,) = (jax.grad(end)(carry, steps) for steps in (4, 2))
  np.testing.assert_array_equal(long[0], 1)
  assert np.abs(short[1:]).min() > 0
  _assert_close(long, short, 1e-6)


def test_a_sequence_in_two_parts_is_the_sequence():
  for cell in CELLS:
    x, weights, carry = _inputs(cell)
    run = _forward(cell, reverse=False)
    whole, final = run(x, weights, carry)
    first, between = run(x[:3], weights, carry)
    second, end = run(x[3:], weights, between)
    _assert_close((np.concatenate([first, second]), end), (whole, final), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, run(x, weights, None), run(x, weights, initial_carry(cell, B, H)))


@pytest.mark.parametrize("steps, reverse", [(35, False), (36, True), (38, False), (36, False)])
def test_rounds_of_several_steps_are_the_definitions(steps, reverse):
  """Of long sequences, whatever divides their length."""
  with jax.enable_x64(True):
    inputs = _inputs("tanh", steps, dims=2, width=3, dtype=np.float64)
    _assert_is_the_definition("tanh", reverse, inputs, np.array([steps, 20, 3]))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [35, 36, 38])
def test_rounds_of_several_steps_are_those_steps(steps, reverse):
  """Of long sequences, whatever divides their length; their parts are short."""
  x, weights, carry = _inputs("gru", steps=steps, norm=True)
  length = np.array([steps, 20, 3])

  def in_parts(x, weights, carry):
    cut, valid = 18, valid_steps(jnp.asarray(length), steps)
    parts = [slice(0, cut), slice(cut, steps)]
    outputs = {}
    for part in parts[::-1] if reverse else parts:
      outputs[part.start], carry = recurrence("gru", x[part], weights, carry, valid[part], reverse=reverse)
    return jnp.concatenate([outputs[0], outputs[cut]]), carry

  _assert_close(jax.jit(functools.partial(_with_gradients, in_parts))(x, weights, carry),
                _compiled("gru", reverse=reverse)(x, weights, carry, length=length), 1e-5)


@pytest.mark.parametrize("cell, norm", [
    ("tanh", True), ("lstm", False), ("lstm", True), *(
        pytest.param(cell, True, marks=slow) for cell in CELLS if cell not in ("tanh", "lstm"))])
def test_second_derivatives_and_forward_mode(cell, norm):
  with jax.enable_x64(True):
    inputs, length = _inputs(cell, steps=4, norm=norm, dtype=np.float64), np.array([4, 2, 3])
    found = []
    for options in ({}, {"forward_mode": True}):
      f = lambda *a, o=options: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(_run(cell, **o)(*a, length)))
      penalty = lambda *a, f=f: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(f, (0, 1, 2))(*a)))
      found.append(jax.jit(jax.grad(penalty, (0, 1, 2)))(*inputs))
    _assert_close(*found, 1e-10)
    forward = lambda *a: _run(cell, forward_mode=True)(*a, length)
    _, tangents = jax.jit(lambda *a: jax.jvp(forward, a, a))(*inputs)
    step = 1e-6
    shifted = [_definition(cell, *jax.tree.map(lambda x, s=s: x * (1 + s), inputs), length) for s in (step, -step)]
    _assert_close(tangents, jax.tree.map(lambda a, b: (a - b) / (2 * step), *shifted), 1e-7)
  with pytest.raises(TypeError, match="custom_vjp|forward-mode"):
    jax.jvp(lambda x: recurrence(cell, x, *inputs[1:]), (inputs[0],), (inputs[0],))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("transform", ["vmap", "remat"])
def test_transformations(cell, transform):
  x, weights, carry = _inputs(cell)
  length = np.array([L, 3, 1])
  if transform == "remat":
    run = jax.checkpoint(lambda *a: _run(cell)(*a, length))
    _assert_close(jax.jit(functools.partial(_with_gradients, run))(x, weights, carry),
                  _compiled(cell, reverse=False)(x, weights, carry, length=length), 1e-6)
    return
  both = jax.tree.map(lambda a: np.stack([a, a / 2]), (x, weights, carry))
  lengths = np.stack([length, length[::-1]])
  run = _compiled(cell, reverse=False)
  rows = [run(*jax.tree.map(lambda a, i=i: a[i], both), length=n) for i, n in enumerate(lengths)]
  together = jax.jit(jax.vmap(lambda inputs, n: run(*inputs, length=n)))(both, lengths)
  _assert_close(together, jax.tree.map(lambda *a: np.stack(a), *rows), 1e-6)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_keeps_the_state_in_float32(cell, norm):
  x, weights, carry = _inputs(cell, norm=norm)
  run = functools.partial(_compiled(cell, reverse=False), length=np.array([L, 3, 1]))
  exact = run(x, weights, carry)
  results, grads = run(x.astype(jnp.bfloat16), weights, carry)
  assert results[0].dtype == jnp.bfloat16 and {c.dtype for c in results[1]} == {jnp.dtype(jnp.float32)}
  assert grads[0].dtype == jnp.bfloat16
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads[1:]))
  for a, b in zip(jax.tree.leaves((results, grads)), jax.tree.leaves(exact)):
    assert np.abs(np.asarray(a, np.float32) - b).max() < 0.06 * max(1, np.abs(b).max())


@pytest.mark.parametrize("cell", CELLS)  # the GRU alone sums apart for both biases; the LSTM has two states
def test_a_batch_over_four_devices_needs_one_sum_over_them(cell):
  """Those of the weights' gradients, after the loops, and nothing within them."""
  x, weights, carry = _inputs(cell, batch=8)
  mesh = parallel.make_mesh({"data": 4, "fsdp": 1, "tensor": 1})
  shared, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
  steps = NamedSharding(mesh, P(None, "data"))
  length = jnp.array([7, 3, 1, 0, 5, 6, 2, 7])
  f = lambda x, w, c, n: _compiled(cell, reverse=False)(x, w, c, length=n)
  step = jax.jit(f, in_shardings=(steps, shared, rows, rows), out_shardings=((steps, rows), (steps, shared, rows)))
  compiled = step.lower(x, weights, carry, length).compile()
  text = compiled.as_text()
  assert set(re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
             ) == {"all-reduce"}
  for body in re.findall(r"body=%?([\w.\-]+)", text):
    assert not re.search(r"all-reduce", _computation(text, body))
  placed = jax.device_put((x, weights, carry, length), (steps, shared, rows, rows))
  _assert_close(compiled(*placed), f(x, weights, carry, length))


def _computation(text, name):
  """The lines of one computation of a compiled program."""
  return re.search(rf"^%?{re.escape(name)} [^\n]*{{\n(.*?)^}}", text, re.M | re.S).group(1)


def _assert_no_weight_gradient_in_loops(text, width, gates):
  """No loop of the program adds to, or even holds, a second array of V's size."""
  size = width * width * gates
  holds = lambda shape: np.prod([int(n) for n in shape.split(",")]) == size
  bodies = sorted(set(re.findall(r"body=%?([\w.\-]+)", text)))
  assert len(bodies) >= 2, "the loops of both passes"
  for body in bodies:
    lines = _computation(text, body)
    carried = re.search(r"(\(.*\)) parameter\(0\)", lines).group(1)
    large = [shape for shape in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", carried) if holds(shape)]
    assert len(large) <= 1, f"{body} carries {large}"
    made = re.findall(r"= (?:f32|bf16)\[([\d,]+)\]\S* (?!get-tuple-element|parameter|copy|bitcast)[\w\-]+\(", lines)
    assert not [shape for shape in made if holds(shape)]


_COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from dljax.ops.recurrence import CELLS, Weights, recurrence
from dljax.train import topology
machine, cell, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
mesh = Mesh(np.array(topology.topology_devices(machine)), ("data",), axis_types=(AxisType.Auto,))
spec = lambda p, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, p))
n = CELLS[cell].gates * width
weights = Weights(spec(P(), 96, n), spec(P(), width, n), spec(P(), n), spec(P(), n))
loss = lambda w, x: jnp.sum(recurrence(cell, x, w)[0] ** 2)
step = jax.jit(jax.value_and_grad(loss))
print(topology.compile_lowered(step.lower(weights, spec(P(None, "data"), 40, 32, 96)), machine).as_text())
"""


@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
def test_the_weight_gradient_is_one_product_after_the_loop(cell):
  width = 32
  x, weights, _ = _inputs(cell, steps=38, batch=6, dims=48, width=width)  # long enough for rounds of several steps
  loss = lambda w, x, **o: jnp.sum(recurrence(cell, x, w, **o)[0]**2)
  compile_ = lambda **o: jax.jit(jax.value_and_grad(functools.partial(loss, **o))).lower(weights, x).compile().as_text()
  _assert_no_weight_gradient_in_loops(compile_(), width, CELLS[cell].gates)
  if cell != "lstm":
    with pytest.raises(AssertionError):  # the loop's own derivative does hold one: the test can fail
      _assert_no_weight_gradient_in_loops(compile_(forward_mode=True), width, CELLS[cell].gates)


@slow
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
@pytest.mark.parametrize("machine", ["v5e:2x2", "h100:4"])
def test_the_weight_gradient_is_one_product_on_other_machines(machine, cell):
  if missing := topology.missing_compiler(machine):
    pytest.skip(missing)
  env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS") and "TPU" not in k}
  done = subprocess.run([sys.executable, "-c", _COMPILE, machine, cell, "160"], capture_output=True, text=True, env=env,
                        check=False, timeout=300)
  assert done.returncode == 0, done.stderr
  _assert_no_weight_gradient_in_loops(done.stdout, 160, CELLS[cell].gates)


def test_an_unknown_cell_is_one_line():
  with pytest.raises(UserError, match="cell.*'lstn'.*lstm"):
    recurrence("lstn", *_inputs("lstm"))
