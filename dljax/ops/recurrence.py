"""Recurrences over time: Elman's network, the LSTM and the GRU, with a small loop.

Jeffrey Elman. "Finding Structure in Time", 1990. https://doi.org/10.1207/s15516709cog1402_1
Sepp Hochreiter, Jürgen Schmidhuber. "Long Short-Term Memory", 1997.
https://doi.org/10.1162/neco.1997.9.8.1735, with the forget gate of Felix Gers et al., 2000.
Kyunghyun Cho et al. "Learning Phrase Representations using RNN Encoder-Decoder", 2014.
https://arxiv.org/abs/1406.1078
Layer norm. Jimmy Lei Ba, Jamie Kiros, Geoffrey Hinton, 2016. https://arxiv.org/abs/1607.06450

The formulas, the order of the gates and the two biases of a cell are those of `torch.nn.RNN`,
`LSTM` and `GRU`. With the inputs' part u = x W + b and the previous state's part p = h V + a they
are:

  tanh, relu   h' = f(u + p)
  lstm         i, f, o = sigmoid(u + p), g = tanh(u + p);  c' = f c + i g,  h' = o tanh(c')
  gru          r, z = sigmoid(u + p), n = tanh(u + r p);  h' = (1 - z) n + z h

What is special here, compared with differentiating a loop over these formulas:
- u is one product for all steps.
- The gradient keeps the gates and states of the forward pass. Its loop computes only the gradients
  of u and p, and passes them back through V. The gradients of V and a are one product and one sum
  over all steps after the loop, where the derivative of a loop would add to an array of V's size
  in every step.
- The sigmoids and the tanh of a step are one tanh over all gates, as
  sigmoid(x) = (1 + tanh(x / 2)) / 2.
- A long loop is unrolled by four steps, which saves an eighth of the time on a CPU.

A step of padding leaves the state as it is, whatever values the padding has. So both directions
work without moving a row: the reversed loop goes through the padding first and leaves it with the
initial state.

Dimensions: `L` length, `B` batch, `D` width of the inputs, `H` width of the state, `G` number of
gates of a cell (1, 4 or 3).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dljax import errors
from dljax.ops.barrier import once
from dljax.ops.dense import dense

Array = jax.Array
State = tuple[Array, ...]  # h [B, H]; an LSTM also has c [B, H]

_EPSILON = 1e-5  # added to layer norm's variance, as in PyTorch
_LONG = 32  # steps; shorter loops are not unrolled, which halves their compilation time


class Weights(NamedTuple):
  """One cell's parameters.

  Attributes:
    input: W [D, G H]; PyTorch's weight_ih, transposed.
    recurrent: V [H, G H]; PyTorch's weight_hh, transposed.
    input_bias: b [G H].
    recurrent_bias: a [G H].
    input_scale: the scale [G H] of layer norm, which brings the rows of x W to mean 0 and variance
      1 before they are scaled and b is added (Ba et al., equation 20, without the normalisation of
      c); None for no layer norm.
    recurrent_scale: the same for h V.
  """

  input: Array
  recurrent: Array
  input_bias: Array
  recurrent_bias: Array
  input_scale: Array | None = None
  recurrent_scale: Array | None = None


def recurrence(
    cell: str, x: Array, weights: Weights, carry: State | None = None, valid: Array | None = None,
    *, reverse: bool = False, forward_mode: bool = False,
) -> tuple[Array, State]:
  """Runs a cell over time.

  Args:
    cell: a key of `CELLS`.
    x: the inputs [L, B, D], time first. The products take factors of its dtype; sums and all else
      are float32 or better.
    weights: the cell's parameters, which are cast to x's dtype.
    carry: the initial state; zeros by default. See `initial_carry`.
    valid: bool[L, B], False at padding, which may be anywhere (see `valid_steps`); None for no
      padding.
    reverse: whether to start at each row's last step.
    forward_mode: whether to differentiate the plain loop, which forward mode (`jax.jvp`,
      `jax.hessian`) needs, and which adds to the gradient of V in every step. Reverse mode of any
      order works without it.

  Returns:
    The outputs h' [L, B, H] of x's dtype, zero at padding; and the state after the last step of
    each row, in float32 or better.

  Raises:
    UserError: the cell is unknown.
  """
  form = errors.choose("cell", cell, CELLS)
  dtype = x.dtype
  width = jnp.promote_types(dtype, jnp.float32)
  if carry is None:
    carry = initial_carry(cell, x.shape[1], weights.recurrent.shape[0], width)
  if valid is not None:
    # Padding may hold NaN or infinity, and 0 times these is NaN.
    x = jnp.where(valid[..., None], x, 0)
  product = _product if forward_mode else dense
  u = product(x, weights.input.astype(dtype)).astype(dtype)
  if weights.input_scale is not None:
    u = (normalise(u.astype(width))[0] * weights.input_scale).astype(dtype)
  run = _plain if forward_mode else _recur
  biases = weights.input_bias.astype(width), weights.recurrent_bias.astype(width)
  states, final = run(form, reverse, u, weights.recurrent.astype(dtype), weights.recurrent_scale,
                      biases, tuple(c.astype(width) for c in carry), valid)
  return states if valid is None else jnp.where(valid[..., None], states, 0), final


def initial_carry(cell: str, batch: int, hidden_size: int, dtype: Any = jnp.float32) -> State:
  """Returns zeros: (h,), or (h, c) of an LSTM, each [B, H]."""
  return (jnp.zeros((batch, hidden_size), dtype),) * errors.choose("cell", cell, CELLS).states


def valid_steps(length: Array, steps: int) -> Array:
  """Returns bool[L, B] for L = `steps`: whether a step is within its row's `length` i32[B]."""
  return jnp.arange(steps)[:, None] < length


def normalise(x: Array) -> tuple[Array, Array]:
  """Brings the rows [..., N] to mean 0 and variance 1.

  Returns:
    The rows, and the factor of each, [..., 1].
  """
  x = x - jnp.mean(x, -1, keepdims=True)
  factor = lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + _EPSILON)
  return x * factor, factor


class Cell(NamedTuple):
  """The elementwise part of a cell.

  Attributes:
    gates: G.
    states: the number of arrays that a state consists of.
    forward: the function (u, p, state) -> (new state, what `backward` needs besides the states).
    backward: the function (what `forward` kept, state, new state, gradient of the new state) ->
      gradients of u, of p and of the state, the last without what it gets through p.
  """

  gates: int
  states: int
  forward: Callable[[Array, Array, State], tuple[State, tuple[Array, ...]]]
  backward: Callable[[tuple[Array, ...], State, State, State], tuple[Array, Array, State]]


def _tanh(u: Array, p: Array, _: State) -> tuple[State, tuple[()]]:
  return (jnp.tanh(u + p),), ()


def _tanh_back(_: tuple[()], __: State, new: State, grad: State) -> tuple[Array, Array, State]:
  da = grad[0] * (1 - new[0] * new[0])
  return da, da, (jnp.zeros_like(da),)


def _relu(u: Array, p: Array, _: State) -> tuple[State, tuple[()]]:
  return (jax.nn.relu(u + p),), ()


def _relu_back(_: tuple[()], __: State, new: State, grad: State) -> tuple[Array, Array, State]:
  da = jnp.where(new[0] > 0, grad[0], 0)
  return da, da, (jnp.zeros_like(da),)


def _lstm(u: Array, p: Array, state: State) -> tuple[State, tuple[Array]]:
  _, c = state
  gates = _squash(u + p, "ssts")
  i, f, g, o = jnp.split(gates, 4, -1)
  c = once(f * c + i * g)
  return (o * jnp.tanh(c), c), (gates,)


def _lstm_back(
    saved: tuple[Array], old: State, new: State, grad: State,
) -> tuple[Array, Array, State]:
  (gates,), (_, c), (_, new_c), (dh, dc) = saved, old, new, grad
  i, f, g, o = jnp.split(gates, 4, -1)
  t = once(jnp.tanh(new_c))
  dc = once(dc + dh * o * (1 - t * t))
  parts = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o))
  da = jnp.concatenate(once(parts), -1)
  return da, da, (jnp.zeros_like(dh), dc * f)


def _gru(u: Array, p: Array, state: State) -> tuple[State, tuple[Array, Array, Array]]:
  (h,) = state
  width = h.shape[-1]
  rz = _squash(u[..., :2 * width] + p[..., :2 * width], "ss")
  r, z = jnp.split(rz, 2, -1)
  pn = p[..., 2 * width:]
  n = jnp.tanh(u[..., 2 * width:] + r * pn)
  return (n + z * (h - n),), (rz, n, pn)


def _gru_back(
    saved: tuple[Array, Array, Array], old: State, _: State, grad: State,
) -> tuple[Array, Array, State]:
  (rz, n, pn), (h,), (dh,) = saved, old, grad
  r, z = jnp.split(rz, 2, -1)
  dn = dh * (1 - z) * (1 - n * n)
  dr, dz = dn * pn * r * (1 - r), dh * (h - n) * z * (1 - z)
  return jnp.concatenate([dr, dz, dn], -1), jnp.concatenate([dr, dz, dn * r], -1), (dh * z,)


def _squash(a: Array, kinds: str) -> Array:
  """Applies a sigmoid ("s") or a tanh ("t") to each block of [B, G H], by one tanh of them all."""
  scales = [0.5 if kind == "s" else 1.0 for kind in kinds]
  scale = np.repeat(scales, a.shape[-1] // len(kinds)).astype(a.dtype)
  return once(jnp.tanh(a * scale) * scale + (1 - scale))


CELLS: Mapping[str, Cell] = {
    "tanh": Cell(1, 1, _tanh, _tanh_back),
    "relu": Cell(1, 1, _relu, _relu_back),
    "lstm": Cell(4, 2, _lstm, _lstm_back),
    "gru": Cell(3, 1, _gru, _gru_back),
}


def _loop(
    cell: Cell, reverse: bool, u: Array, v: Array, scale: Array | None,
    biases: tuple[Array, Array], carry: State, valid: Array | None,
) -> tuple[State, State, tuple[Array, ...], tuple[Array, ...]]:
  """Runs the cell over all steps.

  The biases (b, a) are added here, where that costs nothing.

  Returns:
    The states of all steps; the last state; and what the gradient needs of each step, the cell's
    part and layer norm's part. Kept arrays have u's dtype, except c.
  """
  b, a = biases

  def step(state: State, inputs: tuple[Array, Array | None]) -> tuple[State, Any]:
    u, valid = inputs
    p, normal = _product(state[0].astype(v.dtype), v), ()
    if scale is not None:
      normal = normalise(p)
      p = normal[0] * scale
    new, saved = cell.forward(u + b, p + a, state)
    if valid is not None:
      new = _select(valid, new, state)
    kept = jax.tree.map(lambda x: x.astype(u.dtype), (saved, normal))
    return new, ((new[0].astype(u.dtype), *new[1:]), *kept)

  final, (states, saved, normal) = _scan(step, carry, (u, valid), reverse)
  return states, final, saved, normal


def _plain(cell: Cell, reverse: bool, *args: Any) -> tuple[Array, State]:
  states, final, _, _ = _loop(cell, reverse, *args)
  return states[0], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recur(
    cell: Cell, reverse: bool, u: Array, v: Array, scale: Array | None,
    biases: tuple[Array, Array], carry: State, valid: Array | None,
) -> tuple[Array, State]:
  """Computes the outputs [L, B, H] and the last state from u = x W [L, B, G H] and the rest."""
  return _plain(cell, reverse, u, v, scale, biases, carry, valid)


def _recur_forward(
    cell: Cell, reverse: bool, u: Array, v: Array, scale: Array | None,
    biases: tuple[Array, Array], carry: State, valid: Array | None,
) -> tuple[tuple[Array, State], Any]:
  states, final, saved, normal = _loop(cell, reverse, u, v, scale, biases, carry, valid)
  return (states[0], final), (v, scale, carry, valid, states, saved, normal)


def _recur_backward(
    cell: Cell, reverse: bool, residuals: Any, grads: tuple[Array, State],
) -> tuple[Any, ...]:
  v, scale, carry, valid, states, saved, normal = residuals
  dtype, width = v.dtype, carry[0].dtype
  back = v.T  # transposed once, which makes the product of every step faster
  before = jax.tree.map(
      lambda first, rest: _shift(first.astype(rest.dtype), rest, reverse), carry, states)

  def step(grad: State, inputs: Any) -> tuple[State, tuple[Array, ...]]:
    dy, old, new, saved, normal, valid = jax.tree.map(
        lambda x: x if x.dtype == bool else x.astype(width), inputs)
    dnew = (grad[0] + dy, *grad[1:])
    if valid is not None:
      dnew, held = _select(valid, dnew, jax.tree.map(jnp.zeros_like, grad)), grad
    du, dp, dold = cell.backward(saved, old, new, dnew)
    if scale is not None:
      z, factor = normal
      dz = dp * scale
      mean, slope = jnp.mean(dz, -1, keepdims=True), jnp.mean(dz * z, -1, keepdims=True)
      dq = factor * (dz - mean - z * slope)
    found = (du,) if dp is du else (du, dp)
    if scale is not None:
      found += (dq,)
    found = tuple(x.astype(dtype) for x in found)
    dold = (dold[0] + _product(found[-1], back).astype(width), *dold[1:])
    if valid is not None:
      dold = _select(valid, dold, held)
    return dold, found

  inputs = (grads[0], before, states, saved, normal, valid)
  dcarry, found = _scan(step, grads[1], inputs, not reverse)
  du, dp, dq = found[0], found[-1 if scale is None else -2], found[-1]
  # This is one product over all steps and rows, so devices need only one sum, at its end.
  dv = lax.dot_general(before[0], dq, (((0, 1), (0, 1)), ((), ())),
                       preferred_element_type=width).astype(dtype)
  dscale = None
  if scale is not None:
    dscale = jnp.sum(dp.astype(width) * normal[0], (0, 1)).astype(scale.dtype)
  dbiases = tuple(jnp.sum(d, (0, 1), dtype=width) for d in (du, dp))
  return du, dv, dscale, dbiases, dcarry, None


_recur.defvjp(_recur_forward, _recur_backward)


def _scan(
    step: Callable[[State, Any], tuple[State, Any]], carry: State, inputs: Any, reverse: bool,
) -> tuple[State, Any]:
  """Is `lax.scan`, unrolled where that pays, by a divisor of the length: others need slices."""
  length = len(jax.tree.leaves(inputs)[0])
  unroll = next(n for n in (4, 2, 1) if length % n == 0) if length >= _LONG else 1
  return lax.scan(step, carry, inputs, reverse=reverse, unroll=unroll)


def _product(x: Array, w: Array) -> Array:
  """Multiplies [..., K] by [K, N] and sums in float32 or better."""
  width = jnp.promote_types(x.dtype, jnp.float32)
  return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=width)


def _select(valid: Array, x: State, y: State) -> State:
  return jax.tree.map(lambda a, b: jnp.where(valid[:, None], a, b), x, y)


def _shift(first: Array, rest: Array, reverse: bool) -> Array:
  """Returns the state before each step, given the initial state and the states after each step."""
  parts = (rest[1:], first[None]) if reverse else (first[None], rest[:-1])
  return jnp.concatenate(parts, 0)
