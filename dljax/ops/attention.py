"""Attention that never holds the weights of all queries and keys at once.

Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra, Christopher Ré. "FlashAttention: Fast and
Memory-Efficient Exact Attention with IO-Awareness", 2022. https://arxiv.org/abs/2205.14135

`attention` works on a block of queries and a block of keys at a time, and keeps nothing of them but
the result and the logarithm of each query's sum of exponentials; the backward pass recomputes the
weights from these (section 3.1 and appendix B). So memory grows with the length and not with its
square. A pair of blocks in which no query can see a key is skipped if the positions are the default
ones. `attention_with_weights` is the same function written out, for pictures of the weights, for
dropout on them, and for forward mode.

On a TPU or GPU a kernel of its vendor takes the place of the blocks where one suits (`ops.kernels`).
The choice is made while tracing, for the devices that `collectives.target_context` names, so that it
is the same where the program is compiled for a machine that is not there. The blocks are then what
the second derivative is taken of.

A query sees a key unless something forbids it: padding, another segment, or the positions. Causal
means that a key's position is at most the query's. The positions are arguments, so that decoding
from a cache, a prompt that is read in parts, and attention to another sequence are no special
cases.

Dimensions: `B` batch, `Q` queries, `K` keys, `H` heads of queries, `G` heads of keys and values, of
which each serves H / G heads of queries (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245),
`D` width of a head, `V` width of a value.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dljax.ops import collectives, kernels

Array = jax.Array

_BLOCK = 512  # queries or keys at a time
_OF_QUERIES = ("query_segment", "query_position")


class ForwardModeError(TypeError):
  """Raised where `attention` is differentiated in forward mode (jvp, jacfwd, hessian)."""


@dataclasses.dataclass(frozen=True)
class _Form:
  """The settings of an attention, which are known before any array is.

  Attributes:
    causal: whether keys after a query are hidden from it.
    window: the number of positions that a query sees, its own included, or None.
    scale: the factor of the scores.
    keys: K without the padding to whole blocks.
    blocks: the length of a block of queries, and of keys.
    pairs: (block of queries, block of keys) of all pairs in which something can be seen.
  """

  causal: bool
  window: int | None
  scale: float
  keys: int
  blocks: tuple[int, int]
  pairs: tuple[tuple[int, int], ...]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    mask: Array | None = None,
    bias: Array | None = None,
    segment: Array | tuple[Array, Array] | None = None,
    query_position: Array | None = None,
    key_position: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Array:
  """Means of values, weighted by the softmax over keys of `scale * q k + bias`.

  Scores, sums and gradients are at least float32; the result is rounded once. A query that sees no
  key gets zeros. Reverse mode works to any order; only the first derivative saves memory. Where a
  vendor's kernel takes the place of the blocks, it decides how wide sums are.

  Args:
    q: the queries, [B, Q, H, D]. The heads of one group follow each other.
    k: the keys, [B, K, G, D]; G divides H.
    v: the values, [B, K, G, V].
    causal: whether a query sees only keys whose position is at most its own.
    mask: bool, True where a key may be seen: [B, K], or four dimensions that broadcast to
      [B, H, Q, K].
    bias: what is added to the scores; four dimensions that broadcast to [B, H, Q, K]. It has a
      gradient.
    segment: i32[B, L], the document that each place belongs to; only places of the same document
      see each other. A pair (i32[B, Q], i32[B, K]) if the queries are not the keys' places.
    query_position: i32[Q] or i32[B, Q]; by default 0, 1, 2, ...
    key_position: i32[K] or i32[B, K]; by default 0, 1, 2, ...
    window: the number of positions that a query sees, its own included: those less than `window`
      away. Without `causal`, it also sees `window - 1` positions after its own.
    scale: the factor of the scores; by default D^-1/2.
    dropout: only 0; dropout on the weights needs `attention_with_weights`.

  Returns:
    [B, Q, H, V], of q's dtype.

  Raises:
    ValueError: shapes do not fit each other, or dropout is asked for.
    ForwardModeError: it is differentiated in forward mode.
  """
  if dropout:
    raise ValueError(f"attention has no dropout on its weights (dropout={dropout}), which it never "
                     "holds: use attention_with_weights")
  _check(q, k, v, mask, bias, segment, query_position, key_position, window)
  rules = _rules(q, k, mask, segment, query_position, key_position)
  plain = query_position is None and key_position is None
  scale = q.shape[-1]**-0.5 if scale is None else scale
  form = _form(q.shape[1], k.shape[1], causal, window, scale, plain)
  q, k, v = (_argument.bind(jnp.asarray(x)) for x in (q, k, v))
  if bias is not None:
    bias = _argument.bind(jnp.asarray(bias))
  elif plain and (mask is None or mask.ndim == 2):
    segments = segment if segment is None or isinstance(segment, tuple) else (segment, segment)
    kernel = kernels.choose(collectives.platform(), q, k, v, mask, segments, causal, window)
    if kernel is not None:
      return _by_kernel(kernel, form, q, k, v, mask, segments)
  blocked = functools.partial(_blocked, form)
  if q.shape[1] > 1:
    return blocked(q, k, v, bias, rules)
  return jax.lax.platform_dependent(
      q, k, v, bias, rules, cpu=functools.partial(_one_query, form), default=blocked)


def attention_with_weights(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    mask: Array | None = None,
    bias: Array | None = None,
    segment: Array | tuple[Array, Array] | None = None,
    query_position: Array | None = None,
    key_position: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    rng: Array | None = None,
) -> tuple[Array, Array]:
  """Computes what `attention` does, with the weights of all queries and keys in memory.

  Args:
    q, k, v, causal, mask, bias, segment, query_position, key_position, window, scale: see
      `attention`.
    dropout: the rate at which weights are set to zero; the others grow by 1 / (1 - rate).
    rng: the key of the dropout.

  Returns:
    The result of `attention`; and the weights before dropout, [B, H, Q, K], of q's dtype, whose
    rows sum to one, or to zero where nothing is seen.

  Raises:
    ValueError: shapes do not fit each other, or there is a dropout and no key.
  """
  _check(q, k, v, mask, bias, segment, query_position, key_position, window)
  if dropout and rng is None:
    raise ValueError("dropout on attention weights needs a key: give rng")
  rules = _rules(q, k, mask, segment, query_position, key_position)
  scale = q.shape[-1]**-0.5 if scale is None else scale
  form = _form(q.shape[1], k.shape[1], causal, window, scale, plain=False)
  groups = k.shape[2]
  rules["key"] = jnp.arange(k.shape[1], dtype=jnp.int32)
  if "mask" in rules:
    rules["mask"] = _grouped(rules["mask"], groups)
  visible = _visible(form, rules)
  bias = None if bias is None else _grouped(bias, groups)
  scores = _scores(form, _split(q, groups), k.swapaxes(1, 2), bias, visible)
  top = jax.lax.stop_gradient(_finite(jnp.max(scores, axis=-1, keepdims=True)))
  exponentials = jnp.exp(scores - top)
  total = jnp.sum(exponentials, axis=-1, keepdims=True)
  weights = exponentials / jnp.where(total > 0, total, 1)
  dropped = weights
  if dropout:
    keep = jax.random.bernoulli(rng, 1 - dropout, weights.shape)
    dropped = jnp.where(keep, weights / (1 - dropout), 0)
  y = _product("bgrqk,bgkv->bgrqv", dropped.astype(v.dtype), v.swapaxes(1, 2)).astype(q.dtype)
  return _join(y), weights.astype(q.dtype).reshape(weights.shape[0], -1, *weights.shape[3:])


def _check(q, k, v, mask, bias, segment, query_position, key_position, window):
  """Raises a ValueError that names the argument whose shape does not fit."""
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
    raise ValueError("q, k and v are [batch, places, heads, width], not "
                     f"{q.shape}, {k.shape} and {v.shape}")
  batch, queries, heads, width = q.shape
  keys, groups = k.shape[1:3]
  if (k.shape[0], k.shape[3]) != (batch, width) or v.shape[:3] != k.shape[:3]:
    raise ValueError(f"q of {q.shape}, k of {k.shape} and v of {v.shape} do not fit each other")
  if heads % groups:
    raise ValueError(f"{groups} heads of keys do not divide {heads} heads of queries")
  if window is not None and window < 1:
    raise ValueError(f"window={window}: a query sees at least its own position, which is window=1")
  full = (batch, heads, queries, keys)
  for name, x in ("mask", mask), ("bias", bias):
    if x is None or (name == "mask" and x.shape == (batch, keys)):
      continue
    if x.ndim != 4 or any(n not in (1, m) for n, m in zip(x.shape, full)):
      raise ValueError(f"{name} of {x.shape} does not broadcast to {full}")
  own, other = segment if isinstance(segment, tuple) else (segment, segment)
  for name, x, places in (("segment", own, queries), ("segment", other, keys),
                          ("query_position", query_position, queries),
                          ("key_position", key_position, keys)):
    shapes = ((batch, places),) if name == "segment" else ((batch, places), (places,))
    if x is not None and x.shape not in shapes:
      raise ValueError(f"{name} of {x.shape} is not {' or '.join(map(str, shapes))}")


def _form(
    queries: int, keys: int, causal: bool, window: int | None, scale: float, plain: bool,
) -> _Form:
  """The settings; `plain` says that the positions of queries and keys are 0, 1, 2, ..."""
  # The scores of a single query are no more than a row of keys.
  blocks = min(queries, _BLOCK), keys if queries == 1 else min(keys, _BLOCK)
  counts = [math.ceil(n / max(1, block)) for n, block in zip((queries, keys), blocks)]
  pairs = []
  for i in range(counts[0]):
    first, last = i * blocks[0], (i + 1) * blocks[0] - 1
    for j in range(counts[1]):
      after = j * blocks[1] - last  # positions from the last query to the first key
      before = first - ((j + 1) * blocks[1] - 1)  # and from the last key to the first query
      hidden = (causal and after > 0) or (window and (before >= window or after >= window))
      if not (plain and hidden):
        pairs.append((i, j))
  return _Form(causal, window, scale, keys, blocks, tuple(pairs))


def _rules(q, k, mask, segment, query_position, key_position) -> dict[str, Array]:
  """The arrays that say what is seen, by name; positions with a leading axis for the batch."""
  own, other = segment if isinstance(segment, tuple) else (segment, segment)
  if mask is not None and mask.ndim == 2:
    mask = mask[:, None, None, :]
  positions = [jnp.arange(x.shape[1], dtype=jnp.int32) if given is None else given
               for x, given in ((q, query_position), (k, key_position))]
  rules = {"mask": mask, "query_segment": own, "key_segment": other}
  rules |= zip(("query_position", "key_position"), map(jnp.atleast_2d, positions))
  return {name: x for name, x in rules.items() if x is not None}


def _visible(form: _Form, rules: Mapping[str, Array]) -> Array | None:
  """Which keys the queries of a block see: bool, broadcasts to [B, G, H / G, Q, K]; None: all.

  Args:
    form: the attention.
    rules: a block's part of `_rules`, the mask by groups, and "key": the places of its keys.
  """
  away = (rules["query_position"][:, :, None] - rules["key_position"][:, None, :])[:, None, None]
  parts = []
  if form.keys % form.blocks[1]:
    parts.append((rules["key"] < form.keys)[None, None, None, None, :])
  if form.causal:
    parts.append(away >= 0)
  if form.window:
    parts.append(away < form.window)
    if not form.causal:
      parts.append(away > -form.window)
  if "query_segment" in rules:
    same = rules["query_segment"][:, :, None] == rules["key_segment"][:, None, :]
    parts.append(same[:, None, None])
  if "mask" in rules:
    parts.append(rules["mask"])
  return functools.reduce(jnp.logical_and, parts) if parts else None


def _scores(
    form: _Form, q: Array, k: Array, bias: Array | None, visible: Array | None,
) -> Array:
  """The scores of a block, -inf where a key is not seen: [B, G, H / G, Q, K], float32 or wider.

  Args:
    form: the attention.
    q: [B, G, H / G, Q, D].
    k: [B, G, K, D].
    bias: None, or what broadcasts to the scores.
    visible: see `_visible`.
  """
  scores = _product("bgrqd,bgkd->bgrqk", q, k) * form.scale
  if bias is not None:
    scores = scores + bias.astype(scores.dtype)
  return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def _product(equation: str, a: Array, b: Array) -> Array:
  """A product of two arrays of one dtype, whose sums and result are float32 or wider."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _sum_over_queries(weights: Array, x: Array) -> Array:
  """[B, G, H / G, Q, K] and [B, G, H / G, Q, D] -> [B, G, K, D]."""
  if x.dtype.itemsize < 4:  # jaxlib 0.10 has no program for the other form on a CPU
    return _product("bgrqk,bgrqd->bgkd", weights, x)
  # The result is transposed, and not the weights, which are larger.
  return _product("bgrqd,bgrqk->bgdk", x, weights).swapaxes(2, 3)


def _finite(x: Array) -> Array:
  """Zero in place of -inf, which the maximum of a row is where nothing is seen."""
  return jnp.where(x == -jnp.inf, 0, x)


def _one_query(form: _Form, q: Array, k: Array, v: Array, bias: Array | None,
               rules: Mapping[str, Array]) -> Array:
  """The attention of one query, which reads keys and values as they lie.

  A CPU's product would first move the heads of all keys to the front, for every token that is
  decoded.
  """
  groups, wide = k.shape[2], jnp.promote_types(q.dtype, jnp.float32)
  rules = {**rules, "key": jnp.arange(k.shape[1], dtype=jnp.int32)}
  if "mask" in rules:
    rules["mask"] = _grouped(rules["mask"], groups)
  q = _split(q, groups)[:, None, :, :, 0]  # [B, 1, G, H / G, D]
  scores = jnp.sum(k[:, :, :, None].astype(wide) * q.astype(wide), axis=-1)  # [B, K, G, H / G]
  scores = scores.transpose(0, 2, 3, 1)[:, :, :, None] * form.scale
  if bias is not None:
    scores = scores + _grouped(bias, groups).astype(wide)
  visible = _visible(form, rules)
  scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
  top = jax.lax.stop_gradient(_finite(jnp.max(scores, axis=-1, keepdims=True)))
  exponentials = jnp.exp(scores - top)
  total = jnp.sum(exponentials, axis=-1, keepdims=True)
  weights = (exponentials / jnp.where(total > 0, total, 1))[:, :, :, 0].transpose(0, 3, 1, 2)
  y = jnp.sum(weights[..., None] * v[:, :, :, None].astype(wide), axis=1)  # [B, G, H / G, V]
  return y.reshape(len(y), 1, -1, y.shape[-1]).astype(q.dtype)


# Forward mode


def _refuse(*_: Any, **__: Any) -> None:
  raise ForwardModeError(
      "attention cannot be differentiated in forward mode (jvp, jacfwd, hessian): use "
      "attention_with_weights, or reverse mode")


# Two identities, one for an argument of an attention and one for its tangent. Reverse mode transposes
# the second and never runs it. Forward mode runs it, be it at once, when a program is compiled, or
# under vmap, as jacfwd does. JAX has the same check in every `custom_vjp`, but with a message that
# names neither this function nor the remedy.
_argument, _tangent = Primitive("attention_argument"), Primitive("attention_tangent")
_argument.def_abstract_eval(lambda x: x)
_argument.def_impl(lambda x: x)
ad.defjvp(_argument, lambda dx, x: _tangent.bind(dx))
batching.defvectorized(_argument)
mlir.register_lowering(_argument, lambda context, x: [x])
_tangent.def_abstract_eval(lambda dx: dx)
_tangent.def_impl(_refuse)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)


# A vendor's kernel


def _by_kernel(
    kernel: kernels.Kernel, form: _Form, q: Array, k: Array, v: Array, mask: Array | None,
    segments: kernels.Segments | None,
) -> Array:
  """The result by a kernel, of which every device computes that of its own rows and heads."""
  # Without a mask, a query sees its own place.
  all_see = mask is None and (segments is None or segments[0] is segments[1])

  def part(q, k, v, mask, *segments):
    segments = None if segments[0] is None else segments
    y = _fused(kernel, form, q, k, v, mask, segments)
    if all_see:
      return y
    rules = _rules(q, k, mask, segments, None, None)
    rules["key"] = jnp.arange(k.shape[1], dtype=jnp.int32)
    if mask is not None:
      rules["mask"] = _grouped(rules["mask"], k.shape[2])
    seen = jnp.any(_visible(form, rules), axis=-1)[:, 0, 0, :, None, None]
    return jnp.where(seen, y, 0)

  # One head of keys serves all heads of queries, wherever they are.
  heads = "batch", None, "heads", None
  of_keys = heads if k.shape[2] > 1 else ("batch", None, None, None)
  places = "batch", None
  return collectives.on_parts(
      part, (q, k, v, mask, *(segments or (None, None))),
      (heads, of_keys, of_keys, places, places, places), heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(kernel, form, q, k, v, mask, segments):
  """The kernel, with derivatives of any order: the first is its own, the others are the blocks'."""
  return kernel(q, k, v, mask, segments, form.causal, form.window, form.scale)


def _fused_forward(kernel, form, q, k, v, mask, segments):
  y, pull = _kernel_forward(kernel, form, q, k, v, mask, segments)
  return y, (q, k, v, mask, segments, pull)


def _fused_backward(kernel, form, kept, dy):
  del kernel
  return *_kernel_backward(form, *kept, dy), None, None


_fused.defvjp(_fused_forward, _fused_backward)


def _blocked_of(form, mask, segments):
  """The blocked form as a function of q, k and v."""
  return lambda q, k, v: _blocked(form, q, k, v, None, _rules(q, k, mask, segments, None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel_forward(kernel, form, q, k, v, mask, segments):
  """The kernel's result and its gradient's function, with what that keeps."""
  run = functools.partial(kernel, mask=mask, segments=segments, causal=form.causal,
                          window=form.window, scale=form.scale)
  return jax.vjp(run, q, k, v)


def _forward_of_forward(kernel, form, *arguments):
  return _kernel_forward(kernel, form, *arguments), arguments


def _backward_of_forward(kernel, form, arguments, cotangents):
  del kernel
  # The second result has no cotangent: `_kernel_backward` gives the whole derivative to q, k, v.
  return *jax.vjp(_blocked_of(form, *arguments[3:]), *arguments[:3])[1](cotangents[0]), None, None


_kernel_forward.defvjp(_forward_of_forward, _backward_of_forward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_backward(form, q, k, v, mask, segments, pull, dy):
  """The kernel's gradients of q, k and v."""
  del form, q, k, v, mask, segments
  return pull(dy)


def _forward_of_backward(form, q, k, v, mask, segments, pull, dy):
  y = _kernel_backward(form, q, k, v, mask, segments, pull, dy)
  return y, (q, k, v, mask, segments, dy)


def _backward_of_backward(form, kept, cotangents):
  q, k, v, mask, segments, dy = kept
  blocked = _blocked_of(form, mask, segments)
  _, pull = jax.vjp(lambda q, k, v, dy: jax.vjp(blocked, q, k, v)[1](dy), q, k, v, dy)
  dq, dk, dv, ddy = pull(cotangents)
  return dq, dk, dv, None, None, None, ddy


_kernel_backward.defvjp(_forward_of_backward, _backward_of_backward)


# The blocked form


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(form: _Form, q: Array, k: Array, v: Array, bias: Array | None,
             rules: Mapping[str, Array]) -> Array:
  return _forward(form, q, k, v, bias, rules)[0]


def _forward(form, q, k, v, bias, rules):
  """Algorithm 1 of the paper, with a scan over the pairs of blocks.

  Returns:
    The result, and what the gradient needs: the arguments, the result, and the logarithms of the
    sums of exponentials, [B, G, H / G, Q'], where Q' is a whole number of blocks.
  """
  blocks = _Blocks(form, q, k, v, bias, rules)
  shape = blocks.q.shape[:-1]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  start = (jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide),
           jnp.zeros((*shape, v.shape[-1]), wide))

  def step(state, i, j):
    old_top, old_total, old_y = (blocks.cut_queries(x, i) for x in state)
    scores = blocks.scores(i, j)
    top = jax.lax.stop_gradient(jnp.maximum(old_top, jnp.max(scores, axis=-1)))
    exponentials = jnp.exp(scores - _finite(top)[..., None])
    total = jnp.sum(exponentials, axis=-1)
    y = _product("bgrqk,bgkv->bgrqv", exponentials.astype(v.dtype), blocks.cut_keys(blocks.v, j))
    if len(form.pairs) > 1:
      shrink = jnp.exp(old_top - _finite(top))  # from the old maximum to the new one
      total, y = total + old_total * shrink, y + old_y * shrink[..., None]
    return tuple(blocks.put_queries(x, new, i) for x, new in zip(state, (top, total, y)))

  top, total, y = _over_pairs(form, step, start)
  total = jnp.where(total > 0, total, 1)
  y = _join(y / total[..., None])[:, :q.shape[1]].astype(q.dtype)
  return y, (q, k, v, bias, rules, y, _finite(top) + jnp.log(total))


def _backward(form, kept, dy):
  """Algorithm 4 of the paper (appendix B.4): the weights are recomputed, block by block."""
  q, k, v, bias, rules, y, log_total = kept
  blocks = _Blocks(form, q, k, v, bias, rules)
  wide = log_total.dtype
  # The sum over keys of weight times the weight's gradient, which the softmax's gradient subtracts.
  mean = jnp.sum(dy.astype(wide) * y.astype(wide), axis=-1, keepdims=True)
  mean = blocks.queries(mean)[..., 0]
  dy = blocks.queries(dy)
  start = [jnp.zeros(x.shape, wide) for x in (blocks.q, blocks.k, blocks.v)]
  start.append(None if bias is None else jnp.zeros(blocks.bias.shape, wide))

  def step(state, i, j):
    dq, dk, dv, dbias = state
    own, dy_block = (blocks.cut_queries(x, i) for x in (blocks.q, dy))
    keys, values = (blocks.cut_keys(x, j) for x in (blocks.k, blocks.v))
    weights = jnp.exp(blocks.scores(i, j) - blocks.cut_queries(log_total, i)[..., None])
    dweights = _product("bgrqv,bgkv->bgrqk", dy_block, values)
    dscores = weights * (dweights - blocks.cut_queries(mean, i)[..., None])
    if bias is not None:
      dbias = blocks.add_bias(dbias, dscores, i, j)
    dv = blocks.add_keys(dv, _sum_over_queries(weights.astype(v.dtype), dy_block), j)
    dscores = (dscores * form.scale).astype(q.dtype)
    dk = blocks.add_keys(dk, _sum_over_queries(dscores, own), j)
    new = _product("bgrqk,bgkd->bgrqd", dscores, keys)
    dq = blocks.put_queries(dq, blocks.cut_queries(dq, i) + new, i)
    return dq, dk, dv, dbias

  dq, dk, dv, dbias = _over_pairs(form, step, tuple(start))
  dq = _join(dq)[:, :q.shape[1]].astype(q.dtype)
  dk, dv = (x.swapaxes(1, 2)[:, :k.shape[1]].astype(k.dtype) for x in (dk, dv))
  if bias is not None:
    dbias = dbias.reshape(*bias.shape[:2], *dbias.shape[3:])
    dbias = dbias[:, :, :bias.shape[2], :bias.shape[3]].astype(bias.dtype)
  return dq, dk, dv, dbias, None


_blocked.defvjp(_forward, _backward)


def _over_pairs(form: _Form, step: Any, state: Any) -> Any:
  """Calls `state = step(state, i, j)` for each pair of blocks."""
  if len(form.pairs) <= 1:
    return step(state, *form.pairs[0]) if form.pairs else state
  return jax.lax.scan(lambda state, pair: (step(state, pair[0], pair[1]), None), state,
                      np.array(form.pairs, np.int32))[0]


class _Blocks:
  """The arrays of an attention, padded to whole blocks, and their blocks.

  Attributes:
    q: [B, G, H / G, Q', D].
    k: [B, G, K', D].
    v: [B, G, K', V].
    bias: None or [B or 1, G or 1, H / G or 1, Q' or 1, K' or 1].
  """

  def __init__(self, form, q, k, v, bias, rules):
    self._form = form
    self._groups = groups = k.shape[2]
    rows, columns = form.blocks
    self.q = self.queries(q)
    self.k, self.v = (_pad(x.swapaxes(1, 2), 2, columns) for x in (k, v))

    def both(x):  # what broadcasts to [B, H, Q, K]
      return _pad(_pad(_grouped(x, groups), 3, rows), 4, columns)

    self.bias = None if bias is None else both(bias)
    self._rules = {
        name: both(x) if name == "mask" else _pad(x, 1, rows if name in _OF_QUERIES else columns)
        for name, x in rules.items()}
    self._rules["key"] = jnp.arange(self.k.shape[2], dtype=jnp.int32)

  def queries(self, x: Array) -> Array:
    """[B, Q, H, D] -> [B, G, H / G, Q', D]."""
    return _pad(_split(x, self._groups), 3, self._form.blocks[0])

  def cut_queries(self, x: Array, i: Any) -> Array:
    """Block `i` of [B, G, H / G, Q', ...]."""
    return _cut(x, 3, i, self._form.blocks[0])

  def put_queries(self, x: Array, block: Array, i: Any) -> Array:
    """[B, G, H / G, Q', ...] with another block `i`."""
    if block.shape == x.shape:
      return block
    return jax.lax.dynamic_update_slice_in_dim(x, block, i * self._form.blocks[0], 3)

  def cut_keys(self, x: Array, j: Any) -> Array:
    """Block `j` of [B, G, K', ...]."""
    return _cut(x, 2, j, self._form.blocks[1])

  def add_keys(self, x: Array, block: Array, j: Any) -> Array:
    """[B, G, K', ...] with something added to block `j`."""
    if block.shape == x.shape:
      return x + block
    block = self.cut_keys(x, j) + block
    return jax.lax.dynamic_update_slice_in_dim(x, block, j * self._form.blocks[1], 2)

  def add_bias(self, x: Array, block: Array, i: Any, j: Any) -> Array:
    """The gradient of the bias with that of a block of scores added, summed where it broadcasts."""
    axes = tuple(d for d in range(5) if x.shape[d] == 1 and block.shape[d] > 1)
    block = jnp.sum(block, axes, keepdims=True)
    place = [n * size if whole > 1 else 0
             for n, size, whole in zip((i, j), block.shape[3:], x.shape[3:])]
    place = [jnp.asarray(n, jnp.int32) for n in (0, 0, 0, *place)]
    old = jax.lax.dynamic_slice(x, place, block.shape)
    return jax.lax.dynamic_update_slice(x, old + block, place)

  def scores(self, i: Any, j: Any) -> Array:
    """The scores of block `i` of the queries and block `j` of the keys; see `_scores`."""
    rows, columns = self._form.blocks

    def both(x):
      return _cut(_cut(x, 3, i, rows), 4, j, columns)

    def place(name, x):
      if name == "mask":
        return both(x)
      return _cut(x, x.ndim - 1, *((i, rows) if name in _OF_QUERIES else (j, columns)))

    rules = {name: place(name, x) for name, x in self._rules.items()}
    return _scores(self._form, self.cut_queries(self.q, i), self.cut_keys(self.k, j),
                   None if self.bias is None else both(self.bias), _visible(self._form, rules))


# Layouts


def _split(x: Array, groups: int) -> Array:
  """[B, Q, H, D] -> [B, G, H / G, Q, D]."""
  batch, places, heads, width = x.shape
  return x.reshape(batch, places, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)


def _join(x: Array) -> Array:
  """[B, G, H / G, Q, D] -> [B, Q, H, D]."""
  batch, groups, each, places, width = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(batch, places, groups * each, width)


def _grouped(x: Array, groups: int) -> Array:
  """[B or 1, H or 1, ...] -> [B or 1, G or 1, H / G or 1, ...]."""
  heads = (1, 1) if x.shape[1] == 1 else (groups, x.shape[1] // groups)
  return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _pad(x: Array, axis: int, block: int) -> Array:
  """Pads an axis with zeros to whole blocks; an axis of one entry, which broadcasts, stays."""
  rest = 0 if x.shape[axis] == 1 else -x.shape[axis] % max(1, block)
  return jnp.pad(x, [(0, rest if d == axis else 0) for d in range(x.ndim)]) if rest else x


def _cut(x: Array, axis: int, i: Any, block: int) -> Array:
  """Block `i` of an axis; all of it, if there is only one or the axis broadcasts."""
  if x.shape[axis] in (1, block):
    return x
  return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)
