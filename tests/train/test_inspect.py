"""What is read from compiled programs: memory, collectives with their bytes, and the tables."""

import io
import re

import jax
import jax.numpy as jnp
import pytest
import rich.console
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dljax.train import inspect
from dljax.train.flops import Layer
from dljax.train.inspect import Collective


def _f32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _mesh():
  return jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


def _mapped(fn, out_specs):
  return jax.jit(jax.shard_map(fn, mesh=_mesh(), in_specs=P("d"), out_specs=out_specs, check_vma=False))


def _summary(fn, *args):
  return inspect.summarize_compiled(fn.lower(*args).compile())


@pytest.mark.parametrize("kind, fn, out_specs, expected", [
    ("all-reduce", lambda x: jax.lax.psum(x, "d"), P(), 2 * 8 * 4),
    ("all-gather", lambda x: jax.lax.all_gather(x, "d", tiled=True), P(), 8 * 8 * 4),
    ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "d", scatter_dimension=1, tiled=True), P("d"),
     2 * 8 * 4),
    ("all-to-all", lambda x: jax.lax.all_to_all(x, "d", 1, 1, tiled=True), P("d"), 2 * 8 * 4),
    ("collective-permute", lambda x: jax.lax.ppermute(x, "d", [(0, 1), (1, 2), (2, 3), (3, 0)]), P("d"),
     2 * 8 * 4),
])
def test_each_kind_of_collective(kind, fn, out_specs, expected):
  """On 4 devices with f32[2, 8] each: the larger side of what goes in and comes out."""
  assert _summary(_mapped(fn, out_specs), _f32(8, 8)).collectives == (Collective(kind, 1, expected),)


def test_collectives_in_a_loop_count_every_turn():
  def body(x):
    return jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.sin(c), "d"), None), x, None, length=7)[0]

  summary = _summary(_mapped(body, P("d")), _f32(8, 8))
  assert summary.collectives == (Collective("all-reduce", 7, 7 * 2 * 8 * 4),)


def test_a_program_for_one_device_has_none():
  assert _summary(jax.jit(lambda x: x @ x), _f32(64, 64)).collectives == ()


def test_data_parallel_gradient_is_all_reduced_once():
  mesh = _mesh()
  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
  step = jax.jit(lambda w, x: w - jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w),
                 in_shardings=(whole, split), out_shardings=whole, donate_argnums=0)
  summary = _summary(step, _f32(256, 128), _f32(64, 256))
  assert summary.collectives == (Collective("all-reduce", 1, 256 * 128 * 4),)
  memory = summary.memory
  assert memory.arguments == (256 * 128 + 16 * 256) * 4  # the weights, and this device's quarter of the batch
  assert memory.outputs == memory.aliased == 256 * 128 * 4
  assert memory.total == memory.arguments + memory.temporaries + memory.code
  assert memory.temporaries >= 256 * 128 * 4  # the gradient
  assert summary.flops == pytest.approx(2 * 2 * 16 * 256 * 128, rel=0.1)


# Shortened from programs compiled for GPU and TPU, whose text has forms that the CPU's has not.
_ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%async_computation (p: f32[4,8]) -> f32[1,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[1,8]{1,0} reduce-scatter(%p), channel_id=3, dimensions={0}, to_apply=%add
}

%fused (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %neg = f32[8]{0} negate(%q), backend_config={"estimated_cycles":"5"}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %v = f32[8]{0:T(1024)S(1)} get-tuple-element(%state), index=1
  %kernel = f32[8]{0:T(1024)} fusion(%v), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %permute-start = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%kernel)
  %permute-done = f32[8]{0:T(1024)} collective-permute-done(%permute-start)
  ROOT %next = (s32[]{:T(128)}, f32[8]{0:T(1024)}) tuple(%i, %permute-done)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(1024)}) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %count = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

ENTRY %main (a: f32[4,8], b: bf16[16], c: f32[8]) -> f32[8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %b = bf16[16]{0} parameter(1)
  %c = f32[8]{0} parameter(2)
  %gather-start = (bf16[16]{0}, bf16[64]{0}) all-gather-start(%b), channel_id=1, dimensions={0}
  %gather-done = bf16[64]{0} all-gather-done(%gather-start)
  %reduced = (f32[4,8]{1,0:T(8,128)}, /*index=1*/f32[8]{0}) all-reduce(%a, %c), channel_id=2, to_apply=%add
  %scatter = ((f32[4,8]{1,0}), f32[1,8]{1,0}, u32[]) async-start(%a), calls=%async_computation
  %scattered = f32[1,8]{1,0} async-done(%scatter), calls=%async_computation
  %start = (s32[]{:T(128)}, f32[8]{0:T(1024)}) tuple(%a, %c)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(1024)}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0:T(1024)} get-tuple-element(%loop), index=1, backend_config={"estimated_cycles":"7"}
}
"""


class _Compiled:
  """Stands for a program of a compiler that gives no costs."""

  def __init__(self, text):
    self._text = text

  def as_text(self):
    return self._text

  def cost_analysis(self):
    return None

  def memory_analysis(self):
    return jax.jit(lambda x: x).lower(_f32(2)).compile().memory_analysis()


def test_asynchronous_forms_tuples_and_tiled_layouts():
  summary = inspect.summarize_compiled(_Compiled(_ASYNCHRONOUS))
  assert summary.collectives == (
      Collective("all-reduce", 1, 4 * 8 * 4 + 8 * 4),
      Collective("all-gather", 1, 64 * 2),
      Collective("reduce-scatter", 1, 4 * 8 * 4),
      Collective("collective-permute", 3, 3 * 8 * 4),  # in a loop of three
  )
  assert summary.cycles == 3 * 100 + 7  # what is within a kernel is in the kernel's own number
  assert summary.flops is None and summary.bytes_accessed is None


def test_a_loop_length_that_the_compiler_wrote_wins():
  text = _ASYNCHRONOUS.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
  summary = inspect.summarize_compiled(_Compiled(text))
  assert summary.collectives[-1] == Collective("collective-permute", 5, 5 * 8 * 4)


# Shortened from a step for sixteen TPUs: a sum of parts by a ring, in a loop that does two parts a
# turn, and an all-gather that a chain of two kernels carries.
_WINDOWED = """HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%first (p: bf16[2,8]) -> bf16[32,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%second (q: bf16[2,8]) -> bf16[32,8] {
  %q = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,8]{1,0} all-gather(%q), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.3 (r: bf16[32,8]) -> bf16[2,8] {
  %r = bf16[32,8]{1,0} parameter(0)
  %all-reduce.3 = bf16[32,8]{1,0} all-reduce(%r), channel_id=8, to_apply=%add
  ROOT %own = bf16[2,8]{1,0} slice(%all-reduce.3), slice={[0:2], [0:8]}
}

%body (state: (bf16[2,8], u32[], u32[], u32[])) -> (bf16[2,8], u32[], u32[], u32[]) {
  %state = (bf16[2,8]{1,0}, u32[], /*index=2*/u32[], u32[]) parameter(0)
  %part = bf16[2,8]{1,0} get-tuple-element(%state), index=0
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %two = u32[]{:T(128)} get-tuple-element(%state), index=2
  %end = u32[]{:T(128)} get-tuple-element(%state), index=3
  %permute-start = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%part)
  %permute-done = bf16[2,8]{1,0} collective-permute-done(%permute-start)
  %later = u32[]{:T(128)} add(%i, %two)
  ROOT %next = (bf16[2,8]{1,0}, u32[], u32[], u32[]) tuple(%permute-done, %later, /*index=2*/%two, %end)
}

%condition (state.1: (bf16[2,8], u32[], u32[], u32[])) -> pred[] {
  %state.1 = (bf16[2,8]{1,0}, u32[], u32[], u32[]) parameter(0)
  %count = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  %bound = u32[]{:T(128)} get-tuple-element(%state.1), index=3
  ROOT %lt = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

ENTRY %main (a: bf16[2,8]) -> bf16[2,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %copied = u32[]{:T(128)} copy(%one)
  %stride = u32[]{:T(128)} constant(2)
  %eight = u32[]{:T(128)} constant(8)
  %fusion.1 = bf16[32,8]{1,0} fusion(%a), kind=kCustom, calls=%first
  %fusion.2 = bf16[32,8]{1,0} fusion(%a), kind=kCustom, calls=%second
  %fusion.3 = bf16[2,8]{1,0} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.3
  %start = (bf16[2,8]{1,0}, u32[], u32[], u32[]) tuple(%a, %copied, %stride, %eight)
  %loop = (bf16[2,8]{1,0}, u32[], u32[], u32[]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[2,8]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_a_ring_in_a_loop_a_chain_of_kernels_and_a_scattered_sum():
  part = 2 * 8 * 2
  assert inspect.summarize_compiled(_Compiled(_WINDOWED)).collectives == (
      Collective("all-gather", 1, 16 * part),  # both kernels are one transfer
      Collective("reduce-scatter", 1, 16 * part),
      Collective("collective-permute", 4, 4 * part))  # 1, 3, 5, 7


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32, jnp.int8])
@pytest.mark.parametrize("first, end, step, turns", [(0, 8, 2, 4), (2, 12, 3, 4), (5, 20, 7, 3)])
def test_a_compiled_loop_counts_by_its_stride(dtype, first, end, step, turns):
  def body(x):
    return jax.lax.while_loop(
        lambda s: s[0] < dtype(end), lambda s: (s[0] + dtype(step), jax.lax.psum(jnp.sin(s[1]), "d")),
        (dtype(first), x))[1]

  compiled = _mapped(body, P("d")).lower(_f32(8, 8)).compile()
  text = re.sub('"known_trip_count":{"n":"[0-9]+"}', "", compiled.as_text())  # which not every compiler writes
  assert "while(" in text
  assert inspect.summarize_compiled(_Compiled(text)).collectives == (
      Collective("all-reduce", turns, turns * 2 * 8 * 4),)


def test_units():
  assert inspect.format_bytes(0) == "0 B"
  assert inspect.format_bytes(1536) == "1.50 KiB"
  assert inspect.format_bytes(80 * 2**30) == "80.00 GiB"
  assert inspect.format_flops(999) == "999 FLOP"
  assert inspect.format_flops(8_178_368_512) == "8.18 GFLOP"


def test_rendered_tables_hold_the_numbers():
  rows = [Layer("", "Net", (1, 10), 0, 640), Layer("c1", "Conv", (1, 28, 28, 6), 156, 239904)]
  summary = inspect.CompiledSummary(
      inspect.Memory(3 * 2**20, 2**20, 2**20, 5 * 2**20, 0), (Collective("all-reduce", 12, 1536),),
      flops=1e9, bytes_accessed=None, cycles=123456)
  group = inspect.render_dry_run(
      {"image": _f32(32, 28, 28, 1)}, rows, 7_000_000_000, summary, devices=4, machine="v5e:2x2",
      device_memory=2**30)
  file = io.StringIO()
  rich.console.Console(file=file, width=120).print(group)
  text = file.getvalue()
  for line in (
      r"image .* 32 x 28 x 28 x 1 .* float32", r"\(top\) .* Net .* 1 x 10 ",
      r"c1 .* Conv .* 156 .* 239.90 kFLOP", r"total .* 156 .* 240.54 kFLOP", r"v5e:2x2, 4 devices",
      r"all devices .* 7.00 GFLOP", r"one device .* 1.75 GFLOP",
      r"compiler's count.* 1.00 GFLOP", r"123,456 cycles", r"temporaries .* 5.00 MiB", r"total .* 8.00 MiB",
      r"the device has .* 1.00 GiB", r"all-reduce .* 12 .* 1.50 KiB"):
    assert re.search(line, text), f"{line} is not in\n{text}"
  assert "read and written" not in text  # the compiler was silent about it
  assert "does not fit" not in text
