"""How fast, and in how much memory, the engine runs on this machine.

  python -m experiments.benchmark --output=benchmark.json

Each row runs in a process of its own, on one device. Where two things are compared they take turns in one
run, so that what else the machine does falls on both; a ratio is that of the medians of all turns, and
beside it stand the smallest and the largest ratio of a turn. Leave the machine alone meanwhile.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import gc
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags, logging

from dljax import errors
from dljax.data.pipeline import HostBatch, Pipeline
from dljax.errors import UserError
from dljax.launch import BAD_INPUT, DONE
from dljax.train import inspect, parallel
from dljax.train.evaluate import prefetch
from dljax.train.experiment import Experiment
from dljax.train.loop import fit
from dljax.train.program import Program, RunOptions
from dljax.train.workdir import write_json
from experiments import lenet, mlp, resnet

_FLAGS = flags.FlagValues()
_ROWS = flags.DEFINE_list("rows", [], "What to measure, with commas between; by default everything.",
                          flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", 200, "Train steps of one turn.", lower_bound=1, flag_values=_FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Turns of each side.", lower_bound=1, flag_values=_FLAGS)
_OUTPUT = flags.DEFINE_string("output", "", "A .json file for the numbers; by default they are only shown.",
                              flag_values=_FLAGS)
_HELP = flags.DEFINE_bool("help", False, "Show this help.", flag_values=_FLAGS)

RUN_IN = 10  # steps after which a loop's prefetching and run-ahead are full, or drained
ONE_DEVICE = RunOptions(mesh={"data": 1, "fsdp": 1, "tensor": 1}, progress=False)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long to measure.

  Attributes:
    steps: train steps of one turn.
    repeats: turns of each side.
  """

  steps: int = 200
  repeats: int = 7


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One line of the table.

  Attributes:
    name: what was measured on.
    what: what was measured.
    value: the number, often a ratio.
    bound: what the value should hold.
    at_least: whether it should be at least the bound; otherwise at most.
    low, high: the smallest and the largest ratio of a turn, or None.
    details: what the value was made from, with units in the names.
  """

  name: str
  what: str
  value: float
  bound: float
  at_least: bool = False
  low: float | None = None
  high: float | None = None
  details: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def holds(self) -> bool:
    return self.value >= self.bound if self.at_least else self.value <= self.bound


def _ratio(name: str, what: str, over: Mapping[str, Sequence[float]], under: Mapping[str, Sequence[float]],
           bound: float, *, at_least: bool = False) -> Measurement:
  """The ratio of two sides that took turns; each is {name of its median in the details: seconds per turn}."""
  (over_name, over_turns), = over.items()
  (under_name, under_turns), = under.items()
  medians = {over_name: statistics.median(over_turns), under_name: statistics.median(under_turns)}
  turns = [a / b for a, b in zip(over_turns, under_turns, strict=True)]
  value = medians[over_name] / medians[under_name]
  return Measurement(name, what, value, bound, at_least, min(turns), max(turns), medians)


class _Tap:
  """A training pipeline that calls `at(step)` before each batch, in the thread that loads them."""

  def __init__(self, pipeline: Pipeline, at: Callable[[int], None]):
    self._pipeline, self._at = pipeline, at

  @property
  def num_examples(self) -> int:
    return self._pipeline.num_examples

  @property
  def num_batches(self) -> int:
    return self._pipeline.num_batches

  def open(self) -> None:
    self._pipeline.open()

  def batch(self, step: int) -> HostBatch:
    self._at(step)
    return self._pipeline.batch(step)

  def close(self) -> None:
    self._pipeline.close()


def _fit(experiment: Experiment, at: Callable[[int], None]) -> None:
  """Trains as `python -m experiments.x` does, without evaluations; `at(step)` is called before each batch."""
  tapped = dataclasses.replace(experiment, train=_Tap(experiment.train, at), evals={}, monitor=None)
  with tempfile.TemporaryDirectory() as folder:
    fit(tapped, Path(folder, "run"), ONE_DEVICE)


class _BareStep:
  """The compiled train step alone, on one batch that lies on the device."""

  def __init__(self, experiment: Experiment):
    experiment.train.open()
    program = Program(experiment, ONE_DEVICE)
    self._step, self._ahead = program.train_step, parallel.steps_in_flight(program.mesh)
    self._state = program.init_state()
    self._batch = parallel.put_batch(experiment.train.batch(0), ONE_DEVICE.parallelism, program.mesh)
    self._lr_scale = parallel.put_shared(np.float32(1), program.mesh)
    self.run(RUN_IN)  # compiles

  def run(self, steps: int) -> float:
    """Seconds per step."""
    running = collections.deque()
    start = time.perf_counter()
    for _ in range(steps):
      self._state, out = self._step(self._state, self._batch, self._lr_scale)
      running.append(out["failed_step"])
      if len(running) == self._ahead:
        running.popleft().block_until_ready()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / steps


def _digits(family: ModuleType, total_steps: int, *, augment: bool) -> ml_collections.ConfigDict:
  config = family.get_config("digits")
  config.update({"total_steps": total_steps, "eval_every": total_steps, "checkpoint_every": total_steps})
  if not augment:
    config.data.pad_crop = 0
  return config


def measure_loop(settings: Settings) -> list[Measurement]:
  """`fit` (prefetching, augmentation, logging) against the bare step."""
  return [
      _loop_overhead(settings, lenet, augment=False, name="lenet digits, not augmented"),
      _loop_overhead(settings, lenet, augment=True, name="lenet digits"),
      _loop_overhead(settings, mlp, augment=True, name="mlp digits"),
  ]


def _loop_overhead(settings: Settings, family: ModuleType, *, augment: bool, name: str) -> Measurement:
  period = RUN_IN + settings.steps
  experiment = family.build(_digits(family, settings.repeats * period + 1, augment=augment))
  bare = _BareStep(experiment)
  loop_turns, bare_turns, start = [], [], 0.0

  def at(step: int) -> None:
    # Loading batch k means that the loop has come to step k - 3: the same lag at both ends of a turn. While
    # this thread runs the bare step no batch is loaded, so that the loop drains and waits.
    nonlocal start
    if step % period == RUN_IN:
      start = time.perf_counter()
    elif step % period == 0 and step:
      loop_turns.append((time.perf_counter() - start) / settings.steps)
      bare.run(RUN_IN)
      bare_turns.append(bare.run(settings.steps))

  _fit(experiment, at)
  what = "step of the loop / bare step"
  return _ratio(name, what, {"loop_seconds": loop_turns}, {"bare_seconds": bare_turns}, 1.05)


def measure_transfers(settings: Settings) -> list[Measurement]:
  """What `fit` moves between host and device in a step, told by JAX's own transfer guard.

  On a CPU the host reads results where they lie, and the guard has nothing to tell of that direction.
  """
  first, last = RUN_IN, RUN_IN + settings.steps
  config = _digits(lenet, last + RUN_IN, augment=True)
  config.log_every = config.total_steps  # a logged step reads its metrics
  experiment = lenet.build(config)
  with contextlib.ExitStack() as window:
    def at(step: int) -> None:
      nonlocal log
      if step == first:
        log = window.enter_context(_logged_transfers())
      elif step == last:
        window.close()

    log = None
    _fit(experiment, at)
  if not log:
    raise UserError("--rows=transfers: JAX's transfer guard wrote nothing; unset TF_CPP_MIN_LOG_LEVEL")
  arrays = sum(not name.startswith(parallel.HOST) for name in experiment.batch_spec)
  to_device = sum("host-to-device" in line for line in log)
  details = {"to_device_per_step": to_device / settings.steps, "arrays_of_a_batch": arrays}
  return [
      Measurement("lenet digits", "transfers to the device in a step / arrays of its batch",
                  details["to_device_per_step"] / arrays, 1, details=details),
      Measurement("lenet digits", f"transfers from the device in {settings.steps} steps", len(log) - to_device, 0),
  ]


@contextlib.contextmanager
def _logged_transfers() -> Iterator[list[str]]:
  """Lists the guard's line for each transfer, either way, of any thread, once the context is left."""
  lines: list[str] = []
  before = jax.config.jax_transfer_guard
  with tempfile.TemporaryFile("w+") as log:
    sys.stderr.flush()
    stderr = os.dup(2)  # the guard writes from C++
    os.dup2(log.fileno(), 2)
    jax.config.update("jax_transfer_guard", "log_explicit")
    try:
      yield lines
    finally:
      jax.config.update("jax_transfer_guard", before)
      sys.stderr.flush()
      os.dup2(stderr, 2)
      os.close(stderr)
      log.seek(0)
      lines += [line for line in log if re.search("(host-to-device|device-to-host) transfer", line)]


def measure_memory(settings: Settings, variant: str = "resnet50", pixels: int = 64, batch_size: int = 32,
                   ) -> list[Measurement]:
  """Growth of memory by a few steps, against what the compiler says and the batches read ahead."""
  config = resnet.get_config("imagenet2012")
  config.model.variant, config.data.image_shape, config.batch_size = variant, (pixels, pixels, 3), batch_size
  experiment = resnet.build(config)
  program = Program(experiment, ONE_DEVICE)
  compiled = program.lower_train_step().compile()
  reported = inspect.summarize_compiled(compiled).memory.total
  ahead = 2

  def load(step: int) -> tuple[HostBatch, Any]:
    draw = np.random.default_rng(step)
    batch = {k: draw.random(s.shape, np.float32).astype(s.dtype) for k, s in experiment.batch_spec.items()}
    return batch, parallel.put_batch(batch, ONE_DEVICE.parallelism, program.mesh)

  lr_scale = parallel.put_shared(np.float32(1), program.mesh)
  # The state, which the report counts, lies there before, so that compiling its creation does not count.
  state = jax.block_until_ready(program.init_state())
  meter = _memory_meter(program.mesh.devices.flat[0])
  before = meter() - sum(x.nbytes for x in jax.tree.leaves(state))
  grown = []
  with contextlib.closing(prefetch(load, range(min(settings.steps, 5)), ahead)) as batches:
    for host, batch in batches:
      state, _ = compiled(state, batch, lr_scale)
      jax.block_until_ready(state)
      grown.append(meter() - before)
  data = sum(x.nbytes for x in host.values()) * (ahead + 1)
  details = {"first_step_growth_bytes": grown[0], "growth_bytes": grown[-1], "reported_bytes": reported,
             "data_bytes": data}
  return [Measurement(f"{variant} {pixels}x{pixels}, batch {batch_size}",
                      "growth of memory / reported by the compiled step, plus data",
                      grown[-1] / (reported + data), 1.2, details=details)]


def _memory_meter(device: Any) -> Callable[[], int]:
  """Gives a function: the most bytes that the device, or for a CPU this process, held since now."""
  if "peak_bytes_in_use" in (device.memory_stats() or {}):
    held = device.memory_stats()["bytes_in_use"]
    return lambda: max(held, device.memory_stats()["peak_bytes_in_use"])
  if not os.access("/proc/self/clear_refs", os.W_OK):
    raise UserError("--rows=memory: this system tells neither the device's memory nor (in /proc) that of the "
                    "process; leave the row out")
  # What the compiler freed must go back to the system, or the steps would fill it unseen.
  gc.collect()
  with contextlib.suppress(AttributeError):  # not every C library has it
    ctypes.CDLL(None).malloc_trim(0)
  Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held

  def peak() -> int:
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    return int(kilobytes) * 1024

  return peak


def measure_pipeline(settings: Settings) -> list[Measurement]:
  """How much faster batches are made from memory than LeNet consumes them."""
  kinds = {"not augmented": (20, {"pad_crop": 0}), "pad, crop, flip": (4, {"pad_crop": 3, "flip": True})}
  experiments, batch_turns, step_turns = {}, {kind: [] for kind in kinds}, []
  for kind, (_, augmentation) in kinds.items():
    config = _digits(lenet, settings.steps, augment=True)
    config.data.update(augmentation)
    experiments[kind] = lenet.build(config)
    experiments[kind].train.open()
  bare = _BareStep(experiments["not augmented"])
  for turn in range(settings.repeats):
    step_turns.append(bare.run(settings.steps))
    for kind, experiment in experiments.items():
      start = time.perf_counter()
      for step in range(turn * settings.steps, (turn + 1) * settings.steps):
        experiment.train.batch(step)
      batch_turns[kind].append((time.perf_counter() - start) / settings.steps)
  return [
      _ratio(f"lenet digits, {kind}", "bare step / its batch made in memory", {"step_seconds": step_turns},
             {"batch_seconds": batch_turns[kind]}, bound, at_least=True)
      for kind, (bound, _) in kinds.items()]


ROWS: Mapping[str, Callable[[Settings], list[Measurement]]] = {
    "loop": measure_loop,
    "transfers": measure_transfers,
    "memory": measure_memory,
    "pipeline": measure_pipeline,
}


def _in_child(row: str, settings: Settings) -> tuple[str, list[Measurement]]:
  logging.set_verbosity(logging.WARNING)
  return jax.devices()[0].device_kind, ROWS[row](settings)


def measure(rows: Sequence[str], settings: Settings) -> dict[str, Any]:
  """Measures the rows, each in a process of its own.

  Args:
    rows: keys of `ROWS`.
    settings: how long.

  Returns:
    JSON-able: "machine" (device, cores, load averages before and after, versions), "settings", and "rows":
    one dict for each `Measurement`, with its "row" and whether it "holds".
  """
  machine = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "jax": jax.__version__,
             "python": ".".join(map(str, sys.version_info[:3]))}
  found = []
  for row in rows:
    print(f"{row}: {ROWS[row].__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
      machine["device"], measurements = pool.submit(_in_child, row, settings).result()
    found += [{"row": row, **dataclasses.asdict(m), "holds": m.holds} for m in measurements]
  machine["load_after"] = os.getloadavg()[0]
  return {"machine": machine, "settings": dataclasses.asdict(settings), "rows": found}


def render(report: Mapping[str, Any]) -> Any:
  """The table of what `measure` gives, for a `rich` console."""
  from rich.table import Table  # pylint: disable=g-import-not-at-top

  machine = report["machine"]
  table = Table(
      title=f"{machine['device']}, {machine['cores']} cores, jax {machine['jax']}; load average "
            f"{machine['load_before']:.1f} before, {machine['load_after']:.1f} after", title_justify="left")
  table.add_column("row")
  table.add_column("on")
  table.add_column("what")
  for column in ("value", "bound", "min..max"):
    table.add_column(column, justify="right", no_wrap=True)
  table.add_column("verdict")
  for m in report["rows"]:
    spread = "" if m["low"] is None else f"{m['low']:.3g}..{m['high']:.3g}"
    bound = f"{'>=' if m['at_least'] else '<='} {m['bound']:g}"
    table.add_row(m["row"], m["name"], m["what"], f"{m['value']:.3f}", bound, spread,
                  "holds" if m["holds"] else "missed")
  return table


def _run(argv: Sequence[str]) -> int:
  try:
    rest = _FLAGS(argv)
  except flags.Error as error:
    raise UserError(str(error).replace("\n", " ")) from None
  if rest[1:]:
    raise UserError(f"{rest[1]!r} is not a flag; write --FLAG=VALUE, and see --help")
  if _HELP.value:
    print(_help())
    return DONE
  rows = _ROWS.value or list(ROWS)
  for row in rows:
    errors.choose("--rows", row, ROWS)
  output = Path(_OUTPUT.value) if _OUTPUT.value else None
  if output and output.suffix != ".json":
    raise UserError(f"--output={output}: must end in .json")
  if output and not output.absolute().parent.is_dir():
    raise UserError(f"--output={output}: there is no folder {output.absolute().parent}; make it first")
  report = measure(rows, Settings(_STEPS.value, _REPEATS.value))
  from rich.console import Console  # pylint: disable=g-import-not-at-top

  Console(width=None if sys.stdout.isatty() else 140).print(render(report))
  if output:
    write_json(output, report)
    print(f"written to {output}")
  return DONE


def _help() -> str:
  lines = ["usage: python -m experiments.benchmark [--FLAG=VALUE ...]", "", "rows:"]
  lines += [f"  {name:12}{row.__doc__.splitlines()[0]}" for name, row in ROWS.items()]
  lines += ["", "flags:"]
  for name in _FLAGS:
    flag = _FLAGS[name]
    lines += [f"  --{name}" + (f"={flag.default}" if flag.default else ""), f"      {flag.help}"]
  return "\n".join(lines)


def main() -> None:
  """Runs the command line, and exits: 0 when everything asked for was measured, 2 on bad input."""
  try:
    status = _run(sys.argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    status = BAD_INPUT
  sys.stdout.flush()
  sys.exit(status)


if __name__ == "__main__":
  main()
