"""Vendors' kernels give the numbers of the written-out form, and are chosen only where they can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.models import gpt
from dljax.ops import collectives, kernels
from dljax.ops.attention import attention, attention_with_weights
from dljax.train import flops, parallel, topology

TPU_CALL, GPU_CALL = "tpu_custom_call", "__cudnn$fmha"
BATCH, LENGTH, HEADS, GROUPS, WIDTH = 2, 128, 2, 1, 64


def _qkv(queries=LENGTH, keys=LENGTH, heads=HEADS, groups=GROUPS, width=WIDTH, value=WIDTH, dtype=np.float32):
  draw = np.random.default_rng(0)
  shapes = (queries, heads, width), (keys, groups, width), (keys, groups, value)
  return [jnp.asarray(draw.normal(size=(BATCH, *shape)), dtype) for shape in shapes]


def _on(platform, function):
  """`function`, traced for a platform's devices."""
  def traced(*arguments):
    with collectives.target_context(collectives.Target(platform)):
      return function(*arguments)

  return traced


def _lowered(function, *arguments, platform="tpu"):
  """The text of the program for a platform, which need not be here."""
  traced = jax.jit(_on(platform, function)).trace(*arguments)
  return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()


# (arguments' sizes, options of `attention`, whether the kernel for TPUs takes them)
CASES = {
    "plain": ({}, {}, True),
    "bfloat16": ({"dtype": jnp.bfloat16}, {"causal": True}, True),
    "window": ({}, {"window": 5}, True),
    "mask": ({}, {"mask": np.ones((BATCH, LENGTH), bool)}, True),
    "segments": ({}, {"segment": np.ones((BATCH, LENGTH), np.int32)}, True),
    "wide": ({"width": 256, "value": 128, "keys": 384}, {"scale": 0.5}, True),
    "float16": ({"dtype": np.float16}, {}, False),
    "narrow": ({"width": 32}, {}, False),
    "narrow_values": ({"value": 32}, {}, False),
    "too_wide": ({"width": 320}, {}, False),
    "odd_queries": ({"queries": 96}, {}, False),
    "odd_keys": ({"keys": 200}, {}, False),
    "short_window": ({"queries": 256}, {"window": 5}, False),
    "bias": ({}, {"bias": np.zeros((1, 1, LENGTH, LENGTH), np.float32)}, False),
    "full_mask": ({}, {"mask": np.ones((1, 1, LENGTH, LENGTH), bool)}, False),
    "query_position": ({}, {"query_position": np.arange(LENGTH)}, False),
    "key_position": ({}, {"key_position": np.arange(LENGTH)}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_lowered_for_tpus(name):
  sizes, options, suits = CASES[name]
  q, k, v = _qkv(**sizes)
  text = _lowered(lambda q, k, v: attention(q, k, v, **options), q, k, v)
  assert text.count(TPU_CALL) == suits


def test_one_call_forward_and_two_backward():
  loss = lambda *a: jnp.sum(attention(*a, causal=True))
  text = _lowered(jax.grad(loss, argnums=(0, 1, 2)), *_qkv())
  # The first of them writes the logarithms of the sums too, which nothing needs without a gradient.
  assert text.count(TPU_CALL) == 3 and "fwd_residuals" in text
  assert "fwd_no_residuals" in _lowered(loss, *_qkv())


def test_numbers_of_64_bits_and_other_devices_take_the_blocks():
  q, k, v = _qkv()
  assert TPU_CALL not in jax.jit(attention).trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
  choose = functools.partial(kernels.choose, q=q, k=k, v=v, mask=None, segments=None, causal=True, window=None)
  assert choose("tpu") is not None
  assert choose(None) is None and choose("cpu") is None and choose("rocm") is None
  with jax.enable_x64(True):
    assert choose("tpu") is None
    assert TPU_CALL not in _lowered(attention, *_qkv(dtype=np.float64))


def test_a_jax_without_the_kernel_takes_the_blocks(monkeypatch):
  monkeypatch.setattr(kernels, "_splash_modules", lambda: None)
  assert TPU_CALL not in _lowered(attention, *_qkv())


@pytest.fixture
def interpreted(monkeypatch):
  """The kernel for TPUs, step by step on a CPU."""
  run = functools.partial(kernels._splash, interpret=True)
  monkeypatch.setattr(kernels, "_KERNELS", (("cpu", kernels._splash_suits, run),))


_SEGMENT = np.sort(np.random.default_rng(1).integers(0, 3, (BATCH, LENGTH))).astype(np.int32)
_MASK = np.arange(LENGTH) < np.array([[100], [0]])  # the second row has no key at all
NUMBERS = {
    "causal": ({"groups": 2}, {"causal": True, "scale": 0.3}),
    "mask": ({}, {"mask": _MASK}),
    "documents": ({}, {"causal": True, "mask": _MASK, "segment": _SEGMENT}),
    "other_documents": ({}, {"segment": (_SEGMENT, _SEGMENT[::-1] + 1)}),
    "window": ({"groups": 2}, {"causal": True, "window": 9}),
    "both_sides": ({"keys": 256, "value": 128}, {"window": 9}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.usefixtures("interpreted")
def test_the_kernel_for_tpus_is_the_written_out_form(name):
  sizes, options = NUMBERS[name]
  arguments = _qkv(**sizes)
  dy = np.random.default_rng(2).normal(size=(*arguments[0].shape[:3], arguments[2].shape[3])).astype(np.float32)

  def with_gradients(function, *a):
    y, pull = jax.vjp(functools.partial(function, **options), *a)
    return y, *pull(dy)

  ours = jax.jit(_on("cpu", functools.partial(with_gradients, attention)))
  assert str(ours.trace(*arguments).jaxpr).count("pallas_call") == 3
  written_out = jax.jit(functools.partial(with_gradients, lambda *a, **o: attention_with_weights(*a, **o)[0]))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
               ours(*arguments), written_out(*arguments))


@pytest.mark.usefixtures("interpreted")
def test_rows_that_see_nothing_get_zeros():
  options = {"causal": True, "mask": _MASK & (np.arange(LENGTH) > 3)}
  y = np.asarray(jax.jit(_on("cpu", lambda *a: attention(*a, **options)))(*_qkv()))
  assert np.all(y[1] == 0) and np.all(y[0, :4] == 0) and np.abs(y[0, 4:]).min(-1).max() > 0
  np.testing.assert_allclose(y, attention_with_weights(*_qkv(), **options)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.usefixtures("interpreted")
def test_later_derivatives_are_those_of_the_blocks(order):
  q = _qkv(heads=1)[0][:1] / 2

  def derivative(function):
    loss = lambda q: jnp.sum(jnp.sin(function(q, q, q, causal=True)))
    for _ in range(order - 1):
      loss = lambda q, last=loss: jnp.sum(jax.grad(last)(q)**2)
    return jax.grad(loss)

  ours = jax.jit(_on("cpu", derivative(attention)))
  assert "pallas_call" in str(ours.trace(q).jaxpr)
  expected = jax.jit(derivative(lambda *a, **o: attention_with_weights(*a, **o)[0]))(q)
  np.testing.assert_allclose(ours(q), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_a_scan_over_layers_that_are_recomputed():
  q, k, v = _qkv(heads=1)

  def gradient(function):
    layer = jax.checkpoint(lambda x, _: (function(x, k, v), None))
    return jax.grad(lambda q: jnp.sum(jax.lax.scan(layer, q, length=2)[0]))

  expected = jax.jit(gradient(lambda *a: attention_with_weights(*a)[0]))(q)
  np.testing.assert_allclose(jax.jit(_on("cpu", gradient(attention)))(q), expected, atol=1e-5)


def test_the_work_of_a_kernel_counts():
  q, k, v = _qkv(queries=256, keys=512)
  products = 2 * 2 * BATCH * HEADS * 256 * 512 * WIDTH
  assert flops.count_flops(_on("tpu", attention), q, k, v) == pytest.approx(products, rel=0.1)


# A mesh


@pytest.fixture
def seen(monkeypatch):
  """A kernel for CPUs, which every attention takes; the shapes of the queries and keys that it gets."""
  shapes = []

  def kernel(q, k, v, mask, segments, causal, window, scale):
    shapes.append((q.shape, k.shape))
    return attention_with_weights(q, k, v, mask=mask, segment=segments, causal=causal, window=window, scale=scale)[0]

  monkeypatch.setattr(kernels, "_KERNELS", (("cpu", lambda *_: True, kernel),))
  return shapes


def _step(batch):
  options = {name: batch.get(name) for name in ("mask", "segment")}
  y, pull = jax.vjp(lambda *a: attention(*a, causal=True, **options), batch["q"], batch["k"], batch["v"])
  return (y, *pull(jnp.cos(y))),


def _batch(heads, groups, rows=4, length=6):
  draw = np.random.default_rng(0)
  batch = {name: draw.normal(size=(rows, length, n, 4)) for name, n in (("q", heads), ("k", groups), ("v", groups))}
  return {**batch, "mask": draw.random((rows, length)) < 0.7,
          "segment": np.sort(draw.integers(0, 2, (rows, length)), axis=1).astype(np.int32)}


@pytest.mark.parametrize("mode, sizes, heads, groups, part", [
    ("jit", (2, 1, 2), 4, 2, (2, 2, 1)),
    ("jit", (1, 2, 2), 6, 2, (2, 3, 1)),
    ("jit", (2, 1, 2), 4, 1, (2, 2, 1)),  # the head of keys is whole
    ("jit", (2, 1, 2), 6, 3, (2, 6, 3)),  # heads that the axis does not divide are whole
    ("jit", (2, 2, 1), 4, 2, (1, 4, 2)),
    ("pmap", (4, 1, 1), 4, 2, (1, 4, 2)),
])
def test_devices_work_on_their_own_rows_and_heads(mode, sizes, heads, groups, part, seen):
  batch = _batch(heads, groups)
  with jax.enable_x64(True):
    expected = jax.jit(_step)(batch)[0]
    assert not seen, "outside of compile_step the target is not known"
    mesh = parallel.make_mesh(dict(zip(parallel.AXES, sizes)), mode)
    step = parallel.compile_step(_step, mode, mesh, inputs=("batch",), outputs=("batch",))
    found, = step(parallel.put_batch(batch, mode, mesh))
    found = parallel.rows_to_host(found, mode)
  rows, own, shared = part
  assert set(seen) == {((rows, 6, own, 4), (rows, 6, shared, 4))}
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), tuple(found), expected)


def test_a_second_derivative_is_that_of_the_blocks_whatever_the_kernel(seen):
  q, k, v, mask, segment = _batch(4, 2, rows=2).values()
  visible = {"causal": True, "mask": mask, "segment": segment}

  def second(function):
    first = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a, **visible))), argnums=(0, 1, 2))
    return jax.grad(lambda *a: sum(jnp.sum(g**2 * jnp.cos(g)) for g in first(*a)), argnums=(0, 1, 2))

  with jax.enable_x64(True):
    found = jax.jit(_on("cpu", second(attention)))(q, k, v)
    expected = jax.jit(second(lambda *a, **o: attention_with_weights(*a, **o)[0]))(q, k, v)
  assert seen
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11), found, expected)


@pytest.mark.slow
def test_a_decoder_compiles_for_tpus_that_share_its_heads():
  machine = "v5e:2x2"
  if missing := topology.missing_compiler(machine):
    pytest.skip(missing)
  mesh = parallel.make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, devices=topology.topology_devices(machine))
  model = gpt.GPT(vocab_size=11, max_length=128, embed_dim=128, num_layers=2, num_heads=2, layer_scan=True, remat=True)
  tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)
  params = parallel.abstract(params, jax.tree.map(lambda _: parallel.abstract_shared(np.float32(0), mesh).sharding, params))

  def step(params, batch):
    return jax.grad(lambda p: jnp.sum(model.apply(p, batch["tokens"])["logits"]))(params),

  step = parallel.compile_step(step, "jit", mesh, inputs=("shared", "batch"), outputs=("shared",))
  lowered = step.lower(params, parallel.abstract_batch({"tokens": tokens}, "jit", mesh))
  # Forward, once more in the backward pass, and twice for the gradients.
  assert topology.compile_lowered(lowered, machine).as_text().count(f'custom_call_target="{TPU_CALL}"') == 4


# GPU


def _wide(**sizes):
  return _qkv(**{"dtype": jnp.bfloat16, **sizes})


def test_without_cudnn_or_where_it_does_not_suit_gpus_take_the_blocks(monkeypatch):
  assert kernels.choose("gpu", *_qkv(), None, None, False, None) is None, "no cuDNN, or float32"
  native = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **o: native(*a, **o))
  q, k, v = _wide()
  choose = functools.partial(kernels.choose, "gpu", q, k, v)
  mask, segments = np.ones((BATCH, LENGTH), bool), (np.ones((BATCH, LENGTH), np.int32),) * 2
  assert choose(None, None, True, 5) is not None and choose(None, None, False, None) is not None
  assert choose(mask, None, True, None) is None and choose(None, segments, True, None) is None
  assert choose(None, None, False, 5) is None
  assert kernels.choose("gpu", q[:, 1:], k, v, None, None, True, None) is None

  def missing(*_, **__):
    raise RuntimeError("cuDNN is not detected.")

  monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
  assert choose(None, None, False, None) is None


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 3, "scale": 0.3}])
def test_cudnn_is_asked_for_the_same_attention(options, monkeypatch):
  native, asked = jax.nn.dot_product_attention, []

  def written_out(*arguments, implementation, **named):
    asked.append(implementation)
    return native(*arguments, implementation="xla", **named)

  monkeypatch.setattr(jax.nn, "dot_product_attention", written_out)
  q, k, v = _qkv(queries=9, keys=9, heads=4, groups=2, width=8, value=8)
  y = jax.jit(_on("gpu", lambda *a: attention(*a, **options)))(q, k, v)
  assert set(asked) == {"cudnn"}
  np.testing.assert_allclose(y, attention_with_weights(q, k, v, **options)[0], rtol=1e-5, atol=1e-5)


def test_what_is_lowered_for_gpus():
  q, k, v = _wide()
  if kernels.choose("gpu", q, k, v, None, None, True, None) is None:
    pytest.skip("cuDNN is not installed")
  assert GPU_CALL in _lowered(lambda *a: attention(*a, causal=True), q, k, v, platform="gpu")
  text = _lowered(lambda *a: attention(*a, bias=np.zeros((1, 1, 1, 1))), q, k, v, platform="gpu")
  assert GPU_CALL not in text
