"""What a dry run shows: the model's layers, and the compiled step's memory, work and
communication.

Nothing here runs a step. `summarize_compiled` reads a program that was compiled for any machine,
present or not (see `dljax/train/topology.py`); `render_dry_run` makes it readable.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from dljax.train.flops import Layer, fold, totals

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")
MAX_LAYER_ROWS = 40


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device while the program runs, as its compiler planned them.

  Attributes:
    arguments: the arguments, that is the state and the batch.
    outputs: the results.
    aliased: the part of the results that takes over (donated) buffers of arguments.
    temporaries: everything in between.
    code: the program itself, where it lies in the device's memory.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    """The memory that must be free for the program."""
    return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind in one run of the program.

  Attributes:
    kind: one of `COLLECTIVES`.
    count: how often one device takes part; each turn of a loop counts where its length is known.
    size: the bytes that one device puts in or gets out, whichever is more, summed over the
      collectives. How much of it crosses a wire depends on the algorithm: a ring all-reduce sends
      nearly twice as much.
  """

  kind: str
  count: int
  size: int


@dataclasses.dataclass(frozen=True)
class CompiledSummary:
  """What a compiled program says about itself, for one device; None where its compiler says
  nothing.

  Attributes:
    memory: see `Memory`.
    collectives: the collectives by kind, in the order of `COLLECTIVES`; kinds that do not occur
      are left out.
    flops: the compiler's count. The compiler knows no loop lengths, so a loop's body counts once.
    bytes_accessed: the compiler's count of bytes read and written, with the same limit.
    cycles: the TPU compiler's estimate for all kernels, without communication.
  """

  memory: Memory
  collectives: tuple[Collective, ...]
  flops: float | None
  bytes_accessed: float | None
  cycles: int | None


def summarize_compiled(compiled: jax.stages.Compiled) -> CompiledSummary:
  """Reads a program compiled for CPU, GPU or TPU."""
  stats = compiled.memory_analysis()
  memory = Memory(
      arguments=stats.argument_size_in_bytes, outputs=stats.output_size_in_bytes,
      aliased=stats.alias_size_in_bytes, temporaries=stats.temp_size_in_bytes,
      code=stats.generated_code_size_in_bytes)
  cost = compiled.cost_analysis() or {}
  collectives, cycles = _read_hlo(compiled.as_text())
  return CompiledSummary(memory, collectives, cost.get("flops"), cost.get("bytes accessed"),
                         cycles or None)


# An instruction in XLA's text form:
#   ROOT %name = f32[8,128]{1,0:T(8,128)} opcode(%a, %b), attributes
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?)\s([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations|"
                     r"true_computation|false_computation)=\{?(%[\w.-]+(?:, %[\w.-]+)*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_INTEGER = re.compile(r"[su]\d+\[\]")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class _Instruction:
  shape: str
  opcode: str
  rest: str  # operands and attributes
  root: bool  # whether its value is that of its computation

  def operands(self) -> list[str]:
    depth, end = 1, 0
    while depth and end < len(self.rest):
      depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
      end += 1
    return re.findall(r"%([\w.-]+)", self.rest[:end])


def _read_hlo(text: str) -> tuple[tuple[Collective, ...], int]:
  """(collectives, estimated cycles) of one run of an optimised program."""
  computations: dict[str, dict[str, _Instruction]] = {}
  entry = ""
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], {})
      # This is a TPU's name for a sum of which each device keeps its part.
      scatters = match[2].startswith("all-reduce-scatter")
      entry = match[2] if match[1] else entry
    elif match := _INSTRUCTION.match(line):
      opcode = "reduce-scatter" if scatters and match[4] == "all-reduce" else match[4]
      current[match[2]] = _Instruction(match[3], opcode, match[5], bool(match[1]))

  counts, sizes, cycles, chains = collections.Counter(), collections.Counter(), 0, set()
  for instruction, scope, times, fused in _walk(computations, entry, 1, False):
    # The matching "-start" has other buffers in its result too.
    kind = instruction.opcode.removesuffix("-done")
    # A TPU spreads one collective over a chain of kernels, and each of them names it.
    link = _CHAIN.search(instruction.rest) if kind in COLLECTIVES else None
    if kind in COLLECTIVES and not (link and link.groups() in chains):
      if link:
        chains.add(link.groups())
      inputs = [scope[name] for name in instruction.operands() if name in scope]
      if instruction.opcode != kind:
        inputs = [scope[name] for start in inputs for name in start.operands() if name in scope]
      counts[kind] += times
      sizes[kind] += times * max(_bytes(instruction.shape), sum(_bytes(i.shape) for i in inputs))
    if not fused and (match := _CYCLES.search(instruction.rest)):
      cycles += times * int(match[1])
  return tuple(Collective(kind, counts[kind], sizes[kind]) for kind in COLLECTIVES
               if kind in counts), cycles


def _walk(
    computations: Mapping[str, dict[str, _Instruction]], name: str, times: int, fused: bool,
) -> Iterator[tuple[_Instruction, dict[str, _Instruction], int, bool]]:
  """Each instruction under a computation, with its neighbours.

  Yields:
    (the instruction, its computation, how often it runs, whether it is inside a kernel).
  """
  scope = computations.get(name, {})
  for instruction in scope.values():
    yield instruction, scope, times, fused
    if instruction.opcode.endswith(("-done", "-update")):
      continue  # they name what their "-start" calls once more
    turns = _turns(computations, scope, instruction) if instruction.opcode == "while" else 1
    for called in _CALLED.findall(instruction.rest):
      for callee in re.findall(r"%([\w.-]+)", called):
        yield from _walk(computations, callee, times * turns,
                         fused or instruction.opcode == "fusion")


def _turns(
    computations: Mapping[str, dict[str, _Instruction]], scope: Mapping[str, _Instruction],
    loop: _Instruction,
) -> int:
  """The length of a loop: as the compiler states it, else as the counter implies it, else 1.

  The counter may have any integer type and any start, and may grow by more than 1: the loops that
  overlap a product with the transfer of its parts do two parts in each turn.
  """
  if match := _TRIPS.search(loop.rest):
    return int(match[1])
  condition, body = (computations.get(re.search(rf"{part}=%([\w.-]+)", loop.rest)[1], {})
                     for part in ("condition", "body"))
  compare, following = _root(condition), _tuple(_root(body))
  test = _unwrapped(computations, compare)
  if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
    return 1
  start = _tuple(scope.get(loop.operands()[0]))
  counter, bound = (condition.get(name) for name in compare.operands())
  end, place = _constant(condition, bound, start, scope), _place(counter)
  if end is None or place is None:
    return 1
  first = _constant(scope, scope.get(start[place]), None, {}) if start else None
  grown = body.get(following[place]) if following else None
  add = _unwrapped(computations, grown)
  steps = [_constant(body, body.get(name), start, scope) for name in grown.operands()
           if _place(body.get(name)) != place] if add and add.opcode == "add" else []
  step = steps[0] if len(steps) == 1 and steps[0] else 1
  return max(0, math.ceil((end - (first or 0)) / step))


def _root(computation: Mapping[str, _Instruction]) -> _Instruction | None:
  """The instruction whose value a computation gives."""
  return next((i for i in computation.values() if i.root), None)


def _tuple(instruction: _Instruction | None) -> list[str] | None:
  """The names of a tuple's elements, or None if the instruction makes no tuple."""
  return instruction.operands() if instruction and instruction.opcode == "tuple" else None


def _unwrapped(
    computations: Mapping[str, dict[str, _Instruction]], instruction: _Instruction | None,
) -> _Instruction | None:
  """The instruction itself, or the root of the kernel that it calls."""
  if instruction is not None and instruction.opcode == "fusion":
    return _root(computations.get(re.search(r"calls=%([\w.-]+)", instruction.rest)[1], {}))
  return instruction


def _place(instruction: _Instruction | None) -> int | None:
  """The index of the loop-state element that an instruction reads, or None if it reads none."""
  if instruction is None or instruction.opcode != "get-tuple-element":
    return None
  return int(re.search(r"index=(\d+)", instruction.rest)[1])


def _constant(
    scope: Mapping[str, _Instruction], instruction: _Instruction | None, state: list[str] | None,
    outside: Mapping[str, _Instruction],
) -> int | None:
  """The integer that an instruction of `scope` holds, directly or through a loop's first state."""
  while instruction is not None and instruction.opcode in ("copy", "bitcast"):
    instruction = scope.get(instruction.operands()[0])
  if instruction is None or not _INTEGER.match(instruction.shape):
    return None
  if instruction.opcode == "constant":
    return int(re.match(r"-?\d+", instruction.rest)[0])
  if (place := _place(instruction)) is not None and state:
    return _constant(outside, outside.get(state[place]), None, {})
  return None


def _bytes(shape: str) -> int:
  """Bytes of all arrays in a shape of XLA's text form, e.g. "(f32[8,128]{1,0}, bf16[64])"."""
  total = 0
  for dtype, dims in _ARRAY.findall(shape):
    # S32, bf16, f8e4m3fn; c64 is 64 in all.
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    total += math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d) * bits
  return math.ceil(total / 8)


def format_bytes(count: float) -> str:
  """1536 -> "1.50 KiB"."""
  return _format(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_flops(count: float) -> str:
  """8_178_368_512 -> "8.18 GFLOP"."""
  return _format(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _format(count: float, base: int, units: Sequence[str]) -> str:
  power = 0
  while abs(count) >= base and power < len(units) - 1:
    count, power = count / base, power + 1
  return f"{count:.2f} {units[power]}" if power else f"{count:.0f} {units[0]}"


def render_dry_run(
    batch: Mapping[str, jax.ShapeDtypeStruct], rows: Sequence[Layer], step_flops: int,
    summary: CompiledSummary, *, devices: int, machine: str, device_memory: int | None = None,
) -> Any:
  """A dry run as tables, for `rich.print`.

  Args:
    batch: field -> shape and dtype of the global batch.
    rows: the model's layers, from `flops.task_layers`.
    step_flops: the operations of one train step, from `flops.count_flops`.
    summary: the summary of the compiled step.
    devices: the number of devices that it was compiled for.
    machine: the name of the machine, e.g. "v5e:4x4" or "cpu".
    device_memory: the memory of one device in bytes, where known.

  Returns:
    A `rich.console.Group`.
  """
  from rich import console, table  # pylint: disable=g-import-not-at-top

  def make(title: str, *columns: str, right: int = 1) -> table.Table:
    result = table.Table(title=title, title_justify="left", min_width=len(title))
    for i, column in enumerate(columns):
      result.add_column(column, justify="right" if i >= right else "left", overflow="fold")
    return result

  fields = make("Batch, over all devices", "field", "shape", "type", right=3)
  for name, spec in batch.items():
    fields.add_row(name, _shape(spec.shape), str(spec.dtype))

  model = make("Model: the forward pass of one training example",
               "layer", "type", "output", "parameters", "FLOPs", right=3)
  for row in fold(rows, MAX_LAYER_ROWS):
    model.add_row(row.path or "(top)", row.kind, "" if row.shape is None else _shape(row.shape),
                  f"{row.parameters:,}", format_flops(row.flops))
  parameters, flops = totals(rows)
  model.add_section()
  model.add_row("total", "", "", f"{parameters:,}", format_flops(flops))

  memory = summary.memory
  step = make(f"Train step compiled for {machine}, {devices} device{'s' if devices > 1 else ''}",
              "", "")
  step.add_row("FLOPs of one step, all devices", format_flops(step_flops))
  step.add_row("FLOPs of one step, one device", format_flops(step_flops / devices))
  if summary.flops is not None:
    step.add_row("the compiler's count, one device", format_flops(summary.flops))
  if summary.bytes_accessed is not None:
    step.add_row("bytes read and written, one device", format_bytes(summary.bytes_accessed))
  if summary.cycles is not None:
    step.add_row("the compiler's estimate, without communication", f"{summary.cycles:,} cycles")
  step.add_section()
  step.add_row("memory of one device: arguments", format_bytes(memory.arguments))
  step.add_row("results", format_bytes(memory.outputs))
  step.add_row("of these in the arguments' place", format_bytes(memory.aliased))
  step.add_row("temporaries", format_bytes(memory.temporaries))
  step.add_row("program", format_bytes(memory.code))
  step.add_row("total", format_bytes(memory.total))
  if device_memory is not None:
    fits = memory.total <= device_memory
    step.add_row("the device has" if fits else "does not fit: the device has",
                 format_bytes(device_memory))

  moved = make("Collectives of one step, one device", "kind", "count", "bytes")
  for collective in summary.collectives:
    moved.add_row(collective.kind, str(collective.count), format_bytes(collective.size))
  if not summary.collectives:
    moved.add_row("none", "0", format_bytes(0))
  return console.Group(fields, model, step, moved)


def _shape(shape: Sequence[int]) -> str:
  return " x ".join(map(str, shape)) or "scalar"
