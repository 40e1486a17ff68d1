"""Attention by blocks equals the masked softmax written out, in value and gradient, whatever hides a key."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.ops import attention as module
from dljax.ops.attention import ForwardModeError, attention, attention_with_weights

BATCH, HEADS, WIDTH, VALUE = 2, 4, 3, 6
# What may differ, pairwise over all cases: every two values of two fields meet in one of them.
FIELDS = {
    "causal": (False, True),
    "mask": (None, "keys", "all"),
    "segment": (None, "same", "pair"),
    "window": (None, 4),
    "bias": (None, (1, 4, 13, 1), (2, 1, 13, 17)),
    "positions": (False, True),
    "groups": (1, 2, 4),
    "lengths": ((13, 17), (17, 17), (5, 4)),
}


def _pairwise(fields):
  """Cases, chosen greedily, in which every pair of values of two fields occurs."""
  names = list(fields)
  every = [dict(zip(names, values)) for values in itertools.product(*fields.values())]
  pairs = lambda case: {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}
  missing, chosen = set().union(*map(pairs, every)), []
  draw = np.random.default_rng(0)
  while missing:
    sample = [every[i] for i in draw.integers(0, len(every), 60)]
    best = max(sample, key=lambda case: len(pairs(case) & missing))
    missing -= pairs(best)
    chosen.append(best)
  return chosen


CASES = _pairwise(FIELDS)


def _case(case, dtype=np.float64):
  """(q, k, v, bias, the other arguments of `attention`, what may be seen by the definition)."""
  draw = np.random.default_rng(1)
  (queries, keys), groups = case["lengths"], case["groups"]
  if case["segment"] == "same":
    queries = keys
  normal = lambda *shape: draw.normal(size=shape).astype(dtype)
  q, k, v = normal(BATCH, queries, HEADS, WIDTH), normal(BATCH, keys, groups, WIDTH), normal(BATCH, keys, groups, VALUE)
  full = (BATCH, HEADS, queries, keys)
  bias = case["bias"] and normal(*(n if given > 1 else 1 for n, given in zip(full, case["bias"])))
  options = {"causal": case["causal"], "window": case["window"]}
  own, other = np.arange(queries), np.arange(keys)
  if case["positions"]:
    own, other = draw.integers(0, 30, (BATCH, queries)), draw.integers(0, 30, keys)
    options |= {"query_position": own, "key_position": other}
  away = np.atleast_2d(own)[:, None, :, None] - np.atleast_2d(other)[:, None, None, :]
  visible = np.ones(full, bool)
  if case["causal"]:
    visible &= away >= 0
  if case["window"]:
    visible &= (away < case["window"]) & (case["causal"] | (away > -case["window"]))
  if case["mask"]:
    options["mask"] = draw.random((BATCH, keys) if case["mask"] == "keys" else full) < 0.7
    visible &= options["mask"][:, None, None] if case["mask"] == "keys" else options["mask"]
  if case["segment"]:
    a = draw.integers(0, 2, (BATCH, queries))
    b = a if case["segment"] == "same" else draw.integers(0, 2, (BATCH, keys))
    options["segment"] = a if case["segment"] == "same" else (a, b)
    visible &= (a[:, :, None] == b[:, None, :])[:, None]
  return (q, k, v, bias), options, visible


def _definition(visible, q, k, v, bias):
  k, v = (jnp.repeat(x, HEADS // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * WIDTH**-0.5 + (0 if bias is None else bias)
  weights = jax.nn.softmax(jnp.where(visible, scores, -1e30)) * visible
  return jnp.einsum("bhqk,bkhv->bqhv", weights, v)


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(functions, arguments, dy):
  found = []
  for f in functions:
    y, pull = jax.vjp(f, *arguments)
    found.append((y, *pull(dy.astype(y.dtype))))
  return found


def _all_forms(case, dtype):
  arguments, options, visible = _case(case, dtype)
  forms = (lambda q, k, v, bias: attention(q, k, v, bias=bias, **options),
           lambda q, k, v, bias: attention_with_weights(q, k, v, bias=bias, **options)[0],
           functools.partial(_definition, visible))
  dy = np.random.default_rng(2).normal(size=(*arguments[0].shape[:3], VALUE))
  return _with_gradients(forms, arguments, dy), visible


# The first cases have most of the pairs.
@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.slow] if n >= 5 else []) for n in range(len(CASES))])
def test_value_and_gradients_are_those_of_the_masked_softmax(number, monkeypatch):
  monkeypatch.setattr(module, "_BLOCK", 5)
  with jax.enable_x64(True):
    (ours, written_out, definition), visible = _all_forms(CASES[number], np.float64)
  for found in ours, written_out:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), found, definition)
  nothing = ~visible.any(-1).swapaxes(1, 2)  # [B, Q, H]
  assert np.all(np.asarray(ours[0])[nothing] == 0)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_narrow_dtypes(dtype, tolerance, monkeypatch):
  monkeypatch.setattr(module, "_BLOCK", 5)
  case = {**CASES[0], "causal": True, "mask": "keys", "bias": (1, 4, 13, 1), "lengths": (13, 17), "groups": 2}
  (ours, written_out, _), _ = _all_forms(case, dtype)
  arguments, options, visible = _case(case, dtype)
  exact = [np.asarray(a, np.float32) for a in arguments]
  dy = np.random.default_rng(2).normal(size=(*exact[0].shape[:3], VALUE)).astype(np.float32)
  [definition] = _with_gradients((functools.partial(_definition, visible),), exact, dy)
  for found in ours, written_out:
    for x, y in zip(found, definition, strict=True):
      assert x.dtype == dtype
      np.testing.assert_allclose(np.float32(x), y, rtol=tolerance, atol=tolerance)


def _qkv(queries=13, keys=13, groups=2, dtype=np.float64):
  return _case({**CASES[0], "lengths": (queries, keys), "groups": groups, "segment": None}, dtype)[0][:3]


def test_second_derivatives_by_reverse_over_reverse(monkeypatch):
  monkeypatch.setattr(module, "_BLOCK", 5)
  visible = np.tril(np.ones((13, 13), bool))
  found = []
  with jax.enable_x64(True):
    for f in (functools.partial(attention, causal=True), lambda *a: _definition(visible, *a, None)):
      first = jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2))
      penalty = lambda *a, first=first: sum(jnp.sum(g**2) for g in first(*a))
      found.append(jax.jit(jax.grad(penalty, argnums=(0, 1, 2)))(*_qkv()))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11), *found)


FORWARD_MODE = {
    "jvp": lambda f, a: jax.jvp(f, a, a),
    "of_jit": lambda f, a: jax.jvp(jax.jit(f), a, a),
    "in_jit": jax.jit(lambda f, a: jax.jvp(f, a, a), static_argnums=0),
    "jacfwd": lambda f, a: jax.jit(jax.jacfwd(f))(*a),
    "jacfwd_of_jit": lambda f, a: jax.jacfwd(jax.jit(f))(*a),
    "hessian": lambda f, a: jax.hessian(lambda q: jnp.sum(f(q, *a[1:])))(a[0]),
    "linear": lambda f, a: jax.linearize(f, *a)[1](*a),
    "scan": lambda f, a: jax.jvp(lambda q: jax.lax.scan(lambda x, _: (x, f(x, *a[1:])), q, length=2), a[:1], a[:1]),
}


@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode_is_refused_by_name(way):
  with pytest.raises(ForwardModeError, match="use attention_with_weights, or reverse mode"):
    FORWARD_MODE[way](attention, _qkv(3, 3, dtype=np.float32))


def test_forward_mode_of_a_bias_is_refused_and_works_written_out():
  (q, k, v), bias = _qkv(3, 3, dtype=np.float32), np.ones((1, 1, 3, 3), np.float32)
  of_bias = lambda f: jax.jit(lambda b: jax.jvp(lambda b: f(q, k, v, bias=b), (b,), (b,)))
  with pytest.raises(ForwardModeError):
    of_bias(attention)(bias)
  of_bias(lambda *a, **o: attention_with_weights(*a, **o)[0])(bias)


def test_every_way_of_reverse_mode_still_works():
  q, k, v = _qkv(3, 3, dtype=np.float32)
  loss = lambda f: lambda q: jnp.sum(jnp.sin(f(q, k, v)))
  ours = loss(attention)
  gradients = (
      jax.grad(loss(lambda *a: attention_with_weights(*a)[0])), jax.grad(ours), jax.grad(jax.checkpoint(ours)),
      jax.grad(loss(jax.jit(attention))), jax.jacrev(ours), lambda q: jax.vmap(jax.grad(ours))(q[None])[0],
      jax.grad(lambda q: jnp.sum(jax.vmap(ours)(q[None]))))
  expected, *found = jax.jit(lambda q: [gradient(q) for gradient in gradients])(q)
  for gradient in found:
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal, window, plain, pairs", [
    (False, None, True, 16), (True, None, True, 10), (True, None, False, 16), (True, 5, True, 7), (True, 6, True, 7),
    (True, 7, True, 9), (False, 5, True, 10), (True, 1, True, 4)])
def test_pairs_of_blocks_that_see_nothing_are_left_out(causal, window, plain, pairs, monkeypatch):
  monkeypatch.setattr(module, "_BLOCK", 5)
  form = module._form(20, 20, causal, window, 1.0, plain)
  away = np.subtract.outer(np.arange(20), np.arange(20))
  visible = np.ones_like(away, bool) if not plain else (
      ((away >= 0) | (not causal)) & (np.abs(away) < (window or 20)))
  needed = {(i, j) for i in range(4) for j in range(4) if visible[5 * i:5 * i + 5, 5 * j:5 * j + 5].any()}
  assert set(form.pairs) == needed and len(form.pairs) == pairs


def test_what_is_kept_for_the_gradient_grows_with_the_length_alone():
  def kept(length):
    q = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
    _, pull = jax.eval_shape(functools.partial(jax.vjp, functools.partial(attention, causal=True)), q, q, q)
    return sum(x.size for x in jax.tree.leaves(pull))

  assert kept(4096) == 2 * kept(2048)


def test_a_prompt_read_in_parts_and_a_query_alone_see_what_the_whole_does():
  causal = functools.partial(attention, causal=True)

  @jax.jit
  def run(q, k, v):
    part = causal(q[:, 8:], k, v, query_position=jnp.arange(8, 13))
    # A cache: the places after the query hold something else, and positions are by row.
    last = causal(q[:, 7:8], k, v, query_position=jnp.array([[7], [7]]))
    return causal(q, k, v), part, last

  whole, part, last = run(*_qkv(dtype=np.float32))
  np.testing.assert_allclose(part, whole[:, 8:], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(last, whole[:, 7:8], rtol=1e-5, atol=1e-6)


def test_slots_of_a_cache_that_hold_nothing_are_hidden_by_their_position():
  """As in the cache of a decoder: prompts of 3 and 5 tokens, padded to 5; then two tokens of each row, of 9 slots."""
  q, k, v = _qkv(queries=2, keys=9, dtype=np.float32)
  nowhere = 2**30
  rows = np.array([[0, 1, 2, nowhere, nowhere, 3, 4, nowhere, nowhere],
                   [0, 1, 2, 3, 4, 5, 6, nowhere, nowhere]], np.int32)
  places = {"query_position": np.array([[3, 4], [5, 6]], np.int32), "key_position": rows}

  @jax.jit
  def run(q, k, v):
    cached = lambda k, v, **changes: attention(q, k, v, causal=True, **places | changes)
    alone = []
    for i, count in enumerate((5, 7)):
      own = [x[i:i + 1, np.flatnonzero(rows[i] < nowhere)] for x in (k, v)]
      alone.append(attention(q[i:i + 1], *own, causal=True, query_position=np.arange(count - 2, count)))
    gradients = jax.grad(lambda k, v: jnp.sum(cached(k, v)**2), argnums=(0, 1))(k, v)
    return cached(k, v), jnp.concatenate(alone), gradients, cached(k, v, key_position=np.full(9, nowhere))

  y, alone, gradients, empty = run(q, k, v)
  np.testing.assert_allclose(y, alone, rtol=1e-5, atol=1e-6)
  for dx in gradients:
    assert np.all(np.asarray(dx)[rows == nowhere] == 0) and np.all(np.abs(dx).max((2, 3))[rows < nowhere] > 0)
  assert np.all(np.asarray(empty) == 0), "nothing was written to the cache"


def test_dropout_keeps_the_mean_and_is_refused_by_blocks():
  q, k, v = _qkv(dtype=np.float32)
  with pytest.raises(ValueError, match="attention has no dropout .*: use attention_with_weights"):
    attention(q, k, v, dropout=0.1)
  with pytest.raises(ValueError, match="needs a key: give rng"):
    attention_with_weights(q, k, v, dropout=0.1)
  drop = jax.jit(jax.vmap(lambda rng: attention_with_weights(q, k, v, dropout=0.25, rng=rng)[0]))
  drawn = drop(jax.random.split(jax.random.key(0), 4000))
  assert np.abs(np.std(drawn, axis=0)).min() > 0
  np.testing.assert_allclose(np.mean(drawn, axis=0), attention(q, k, v), atol=6 * np.std(drawn, axis=0).max() / 4000**0.5)


def test_weights_are_those_that_the_values_are_summed_with():
  q, k, v = _qkv(dtype=np.float32)
  y, weights = attention_with_weights(q, k, v, mask=np.arange(13) < np.array([[13], [0]]))
  np.testing.assert_allclose(weights.sum(-1), np.broadcast_to(np.array([1, 0])[:, None, None], (2, 4, 13)), atol=1e-6)
  np.testing.assert_allclose(y, jnp.einsum("bhqk,bkhv->bqhv", weights, jnp.repeat(v, 2, axis=2)), atol=1e-6)


@pytest.mark.parametrize("change, words", [
    ({"k": (2, 13, 3, 3)}, "3 heads of keys do not divide 4 heads of queries"),
    ({"k": (2, 12, 2, 3)}, "do not fit each other"),
    ({"q": (2, 13, 3)}, r"are \[batch, places, heads, width\], not \(2, 13, 3\)"),
    ({"mask": (2, 12)}, r"mask of \(2, 12\) does not broadcast to \(2, 4, 13, 13\)"),
    ({"bias": (13, 13)}, r"bias of \(13, 13\) does not broadcast to \(2, 4, 13, 13\)"),
    ({"segment": (2, 14)}, r"segment of \(2, 14\) is not \(2, 13\)"),
    ({"query_position": (14,)}, r"query_position of \(14,\) is not \(2, 13\) or \(13,\)"),
    ({"window": 0}, "window=0: a query sees at least its own position"),
])
def test_shapes_that_do_not_fit_are_refused_by_name(change, words):
  shapes = {"q": (2, 13, 4, 3), "k": (2, 13, 2, 3), "v": (2, 13, 2, 3)} | change
  if "heads of keys" in words:
    shapes["v"] = shapes["k"]
  arguments = {name: x if name == "window" else np.zeros(x, np.float32) for name, x in shapes.items()}
  for function in attention, attention_with_weights:
    with pytest.raises(ValueError, match=words):
      function(**arguments)


def _first_query(arguments, options, visible):
  """A case of `_case` with its first query alone."""
  (q, k, v, bias), options = arguments, dict(options)
  for name in "query_position", "mask":
    x = options.get(name)
    if x is not None and (name == "query_position" or x.ndim == 4):
      options[name] = x[:, :1] if name == "query_position" else x[:, :, :1]
  if "query_position" not in options:
    options["query_position"] = np.zeros(1, np.int32)
  if "segment" in options:
    own, other = options["segment"] if isinstance(options["segment"], tuple) else 2 * (options["segment"],)
    options["segment"] = own[:, :1], other
  bias = None if bias is None else bias[:, :, :1]
  return (q[:, :1], k, v, bias), options, visible[:, :, :1]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_one_query_gets_what_the_definition_gives_it(number):
  with jax.enable_x64(True):
    arguments, options, visible = _first_query(*_case(CASES[number]))
    *qkv, bias = arguments
    dy = np.random.default_rng(2).normal(size=(BATCH, 1, HEADS, VALUE))
    given = [x for x in arguments if x is not None]

    def ours(q, k, v, bias=None):
      return attention(q, k, v, bias=bias, **options)

    def definition(q, k, v, bias=None):
      return _definition(visible, q, k, v, bias)

    found = []
    for f in ours, definition:
      y, pull = jax.vjp(f, *given)
      found.append((y, *pull(dy)))
    for a, b in zip(*found):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_one_query_on_a_cpu_moves_no_keys():
  q, k = jax.ShapeDtypeStruct((2, 1, 4, 8), np.float32), jax.ShapeDtypeStruct((2, 600, 2, 8), np.float32)
  traced = jax.jit(functools.partial(attention, causal=True)).trace(
      q, k, k, query_position=np.full(1, 599, np.int32), key_position=np.arange(600, dtype=np.int32))
  texts = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")]
  moved = [text.count("tensor<2x2x600x8xf32>") for text in texts]
  assert moved[0] == 0 < moved[1]
  assert not any("while" in text for text in texts), "all keys at once"
