"""Our convolution equals the native one, in every derivative, under every transformation, on one device and on four."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dljax.ops import conv
from dljax.ops.conv import conv_general_dilated
from dljax.train import parallel

LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}
# What each form is for: image, kernel, channels, features, groups, strides, padding.
FORMS = {
    "matmul": ((6, 5), (1, 1), 8, 12, 1, (1, 1), "VALID"),
    "matmul_strided": ((7, 6), (1, 1), 8, 12, 1, (2, 2), "VALID"),
    "depthwise": ((7, 6), (3, 3), 8, 8, 8, (1, 1), "SAME"),
    "depthwise_strided": ((8, 7), (5, 5), 8, 8, 8, (2, 2), ((2, 2), (2, 2))),
    "winograd": ((7, 6), (3, 3), 64, 72, 1, (1, 1), "SAME"),
    "winograd_valid": ((8, 9), (3, 3), 64, 64, 1, (1, 1), "VALID"),
    "band": ((12, 12), (5, 5), 1, 6, 1, (1, 1), "VALID"),
    "band_strided": ((9, 10), (3, 3), 3, 4, 1, (2, 2), "SAME"),
    "band_channels": ((12, 12), (5, 5), 6, 8, 1, (1, 1), "VALID"),
    "patches": ((4, 5), (5, 5), 32, 48, 1, (1, 1), "SAME"),
    "patches_backward": ((16, 24), (3, 3), 12, 24, 1, (2, 1), "SAME"),
    "native": ((8, 8), (3, 3), 8, 16, 4, (1, 1), "SAME"),
}
# Where the three functions do not take forms of one kind, which of them do.
MIXED = {
    "band_channels": {"band_forward", "band_input_gradient", "native_kernel_gradient"},
    "patches": {"patches_forward", "patches_input_gradient", "native_kernel_gradient"},
    "patches_backward": {"native_forward", "patches_input_gradient", "native_kernel_gradient"},
}
# One of each kind in the quick tests; the others take the same paths with other numbers.
SAMPLED = [pytest.param(name, marks=[pytest.mark.slow] if "_" in name else []) for name in FORMS]


def _inputs(image, kernel, channels, features, groups, batch=4, dtype=np.float32, seed=0):
  draw = np.random.default_rng(seed)
  x = draw.normal(size=(batch, *image, channels))
  w = draw.normal(size=(*kernel, channels // groups, features)) / np.sqrt(np.prod(kernel) * channels / groups)
  return x.astype(dtype), w.astype(dtype)


def _both(strides, padding, groups=1, rank=2, **options):
  """(ours, native), as functions of (x, w)."""
  options |= {"window_strides": strides, "padding": padding, "dimension_numbers": LAYOUTS[rank],
              "feature_group_count": groups}
  return functools.partial(conv_general_dilated, **options), functools.partial(lax.conv_general_dilated, **options)


def _form(name, **options):
  image, kernel, channels, features, groups, strides, padding = FORMS[name]
  return _inputs(image, kernel, channels, features, groups, **options), _both(strides, padding, groups)


def _with_gradients(f):
  """The result and both gradients, for a cotangent that depends on the result."""
  def all_three(x, w):
    y, pull = jax.vjp(f, x, w)
    return (y, *pull(jnp.cos(y)))
  return jax.jit(all_three)


def _assert_close(found, expected, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(b)), 1e-6)


@st.composite
def convolutions(draw):
  """Any convolution of rank 1 or 2: (inputs, options)."""
  rank = draw(st.sampled_from([1, 2, 2]))
  each = lambda values: tuple(draw(values) for _ in range(rank))
  kind = draw(st.sampled_from(["dense", "dense", "depthwise", "multiplied", "grouped"]))
  channels = draw(st.sampled_from([1, 3, 6, 64, 68]))
  groups = {"dense": 1, "grouped": 2}.get(kind, channels)
  channels *= 2 if kind == "grouped" else 1
  features = {"depthwise": channels, "multiplied": 2 * channels}.get(kind) or draw(st.sampled_from([2, 6, 66]))
  kernel = draw(st.sampled_from([(1,) * rank, (3,) * rank, (3,) * rank, None])) or each(st.integers(1, 5))
  dilation = draw(st.sampled_from([(1,) * rank, None])) or each(st.integers(1, 2))
  strides = draw(st.sampled_from([(1,) * rank, None])) or each(st.integers(1, 3))
  padding = draw(st.sampled_from(["SAME", "VALID", None])) or each(st.tuples(st.integers(0, 3), st.integers(0, 3)))
  input_dilation = (1,) * rank
  if not isinstance(padding, str):
    input_dilation = draw(st.sampled_from([(1,) * rank] * 3 + [(2,) * rank]))
  image = tuple((k - 1) * d + draw(st.integers(1, 12)) for k, d in zip(kernel, dilation))
  batch = draw(st.sampled_from([1, 2, 3, 8, 64] if max(channels, features) < 8 else [1, 2, 3, 8]))
  inputs = _inputs(image, kernel, channels, features, groups, batch, seed=draw(st.integers(0, 9)))
  return inputs, dict(strides=strides, padding=padding, groups=groups, rank=rank, rhs_dilation=dilation,
                      lhs_dilation=input_dilation)


def _sweep(case):
  inputs, options = case
  ours, native = _both(**options)
  _assert_close(_with_gradients(ours)(*inputs), _with_gradients(native)(*inputs))


test_any_convolution_equals_the_native_one = hypothesis.settings(
    max_examples=30, deadline=None, derandomize=True)(hypothesis.given(convolutions())(_sweep))
test_many_more_convolutions_equal_the_native_one = pytest.mark.slow(hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True)(hypothesis.given(convolutions())(_sweep)))


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_the_one_that_is_tested(name, monkeypatch):
  """A shape whose form was never chosen would test nothing."""
  chosen = []
  monkeypatch.setattr(conv, "_by_platform", lambda form, native, *a: chosen.append(form.__name__) or native(*a))
  inputs, (ours, _) = _form(name)
  jax.vjp(ours, *inputs)[1](ours(*inputs))
  kind = name.partition("_")[0]
  expected = MIXED.get(name, {f"{kind}_{what}" for what in ("forward", "input_gradient", "kernel_gradient")})
  assert set(chosen) == {f"_{form}" for form in expected}


@pytest.mark.parametrize("name", SAMPLED)
def test_second_derivatives_by_reverse_over_reverse(name):
  inputs, functions = _form(name, batch=2)
  found = []
  for f in functions:
    first = jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))
    penalty = lambda x, w, first=first: sum(jnp.sum(g**2) for g in first(x, w))
    found.append(jax.jit(jax.grad(penalty, argnums=(0, 1)))(*inputs))
  _assert_close(*found)


@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
@pytest.mark.parametrize("name", FORMS)
def test_transformations(transform, name):
  (x, w), functions = _form(name)
  found = []
  for f in functions:
    if transform == "vmap":
      g = lambda x, w, f=f: jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), w)
    elif transform == "scan":
      g = lambda x, w, f=f: lax.scan(lambda carry, x: (carry, f(x, carry)), w, jnp.stack([x, 2 * x]))[1]
    else:
      g = jax.checkpoint(f)
    found.append(_with_gradients(g)(x, w))
  _assert_close(*found)


@pytest.mark.parametrize("name", FORMS)
def test_bfloat16_is_rounded_once(name):
  inputs, (ours, _) = _form(name, dtype=jnp.bfloat16)
  exact = jax.jit(_form(name)[1][1])(*(a.astype(jnp.float32) for a in inputs))
  y = jax.jit(ours)(*inputs)
  assert {a.dtype for a in jax.eval_shape(_with_gradients(ours), *inputs)} == {jnp.dtype(jnp.bfloat16)}
  assert np.max(np.abs(np.float32(y) - exact)) <= 2**-8 * np.max(np.abs(exact))


@pytest.mark.parametrize("name", SAMPLED)
def test_a_batch_over_four_devices_needs_no_collective_that_the_native_form_does_not(name, monkeypatch):
  # Small enough that the batch goes through in several chunks.
  monkeypatch.setattr(conv, "_WINOGRAD_FLOATS", 2**10)
  monkeypatch.setattr(conv, "_PATCH_FLOATS", 2**10)
  (x, w), functions = _form(name, batch=16)
  mesh = parallel.make_mesh({"data": 4, "fsdp": 1, "tensor": 1})
  rows, shared = parallel.batch_sharding(mesh), NamedSharding(mesh, P())
  found, collectives = [], []
  for f in functions:
    step = jax.jit(_with_gradients(f), in_shardings=(rows, shared), out_shardings=(rows, rows, shared))
    compiled = step.lower(x, w).compile()
    found.append(compiled(jax.device_put(x, rows), jax.device_put(w, shared)))
    collectives.append(sorted(set(re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()))))
  assert collectives[0] == collectives[1]
  _assert_close(*found)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", FORMS)
def test_elsewhere_the_program_is_the_native_one(name, platform):
  inputs, functions = _form(name)
  programs = [
      _with_gradients(f).trace(*inputs).lower(lowering_platforms=(platform,)).as_text() for f in functions]
  convolutions_of = [sorted(line[line.index("dim_numbers"):] for line in text.splitlines()
                            if "stablehlo.convolution" in line) for text in programs]
  assert convolutions_of[0] == convolutions_of[1] and len(convolutions_of[0]) == 3
  for operation in ("dot_general", "while", "concatenate", "optimization_barrier"):
    assert f"stablehlo.{operation}" not in programs[0]


def test_forward_mode_takes_the_native_form():
  inputs, (ours, native) = _form("winograd")
  forward = functools.partial(ours, forward_mode=True)
  _assert_close(jax.jvp(forward, inputs, inputs), jax.jvp(native, inputs, inputs))
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(ours, inputs, inputs)


def test_what_is_not_covered_is_native_to_the_letter():
  (x, w), (ours, native) = _form("winograd")
  program = lambda f, *a, **k: str(jax.make_jaxpr(functools.partial(f, **k))(*a))
  channels_first = {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}
  for args, options in [
      ((x.transpose(0, 3, 1, 2), w), channels_first),
      ((x, w), {"precision": lax.Precision.HIGHEST}),
      ((x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)), {"preferred_element_type": jnp.float32}),
      ((x, w), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}),
      ((x.astype(jnp.float16), w.astype(jnp.float16)), {}),
  ]:
    assert program(ours, *args, **options) == program(native, *args, **options)


def test_bad_shapes_are_refused_as_by_the_native_form():
  (x, w), functions = _form("winograd")
  for f in functions:
    with pytest.raises((TypeError, ValueError), match="feature"):
      f(x[..., :5], w)


def test_a_form_takes_no_more_padding_than_its_gradient_can_take_away():
  form = lambda padding, groups, features: conv._Conv(
      image=(9, 9), kernel=(3, 3), strides=(1, 1), dilation=(1, 1), padding=((0, padding), (0, 0)), groups=groups,
      features=(features, features))
  assert form(2, 1, 64).is_winograd and not form(3, 1, 64).is_winograd and not form(2, 1, 63).is_winograd
  assert form(2, 4, 4).is_depthwise and not form(3, 4, 4).is_depthwise and not form(-1, 4, 4).is_depthwise


@pytest.mark.parametrize("batch, floats, limit, chunk", [
    (64, 2**15, 2**18, 8),
    (64, 2**20, 2**18, 1),
    (48, 2**15, 2**18, 8),
    (37, 2**15, 2**18, 37),  # a prime: all at once rather than one by one
    (64, 1, 2**18, 64),
])
def test_a_chunk_divides_the_batch_and_takes_rows_of_every_device(batch, floats, limit, chunk, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert conv._chunk(batch, floats, limit) == chunk
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  assert batch % 4 or conv._chunk(batch, floats, limit) % 4 == 0
