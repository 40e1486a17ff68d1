"""The rows on the engine: the costs of the loop, the transfers, the memory and the pipeline.

Where two things are compared they take turns in one process, on one device.
"""

import contextlib
import ctypes
import dataclasses
import gc
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from dljax.data.pipeline import HostBatch, Pipeline, Rows, all_rows
from dljax.errors import UserError
from dljax.train import inspect, parallel
from dljax.train.evaluate import prefetch
from dljax.train.experiment import Experiment
from dljax.train.loop import fit
from dljax.train.program import Program
from experiments import lenet, mlp, resnet
from experiments.benchmark.bare_step import ONE_DEVICE, BareStep
from experiments.benchmark.measurement import Measurement, Settings, ratio
from experiments.benchmark.sharding import measure_sharding

RUN_IN = 10  # the steps that fill or drain a loop's prefetching and run-ahead


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

  def open(self, rows: Rows = all_rows) -> None:
    self._pipeline.open(rows)

  def batch(self, step: int) -> HostBatch:
    self._at(step)
    return self._pipeline.batch(step)

  def close(self) -> None:
    self._pipeline.close()


def _fit(experiment: Experiment, at: Callable[[int], None]) -> None:
  """Trains as `python -m experiments.x` does, without evaluations; `at(step)` is called before
  each batch.
  """
  data = dataclasses.replace(experiment.data, train=_Tap(experiment.data.train, at), evals={})
  tapped = dataclasses.replace(experiment, data=data, monitor=None)
  with tempfile.TemporaryDirectory() as folder:
    fit(tapped, Path(folder, "run"), ONE_DEVICE)


def _bare_step(experiment: Experiment) -> BareStep:
  experiment.data.train.open()
  bare = BareStep(experiment, experiment.data.train.batch(0))
  bare.run(RUN_IN)  # drained and filled as the loop is
  return bare


def _digits(family: ModuleType, total_steps: int, *, augment: bool) -> ml_collections.ConfigDict:
  config = family.get_config("digits")
  config.update({"total_steps": total_steps, "eval_every": total_steps,
                 "checkpoint_every": total_steps})
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


def _loop_overhead(
    settings: Settings, family: ModuleType, *, augment: bool, name: str,
) -> Measurement:
  period = RUN_IN + settings.steps
  experiment = family.build(_digits(family, settings.repeats * period + 1, augment=augment))
  bare = _bare_step(experiment)
  loop_turns, bare_turns, start = [], [], 0.0

  def at(step: int) -> None:
    # Loading batch k means that the loop has come to step k - 3: the same lag at both ends of a
    # turn. While this thread runs the bare step no batch is loaded, so that the loop drains and
    # waits.
    nonlocal start
    if step % period == RUN_IN:
      start = time.perf_counter()
    elif step % period == 0 and step:
      loop_turns.append((time.perf_counter() - start) / settings.steps)
      bare.run(RUN_IN)
      bare_turns.append(bare.run(settings.steps))

  _fit(experiment, at)
  what = "step of the loop / bare step"
  return ratio(name, what, {"loop_seconds": loop_turns}, {"bare_seconds": bare_turns}, 1.05)


def measure_transfers(settings: Settings) -> list[Measurement]:
  """The transfers of `fit` between host and device in a step, as JAX's transfer guard reports
  them.

  On a CPU the host reads results in place, so the guard reports none in that direction.
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
  arrays = sum(not name.startswith(parallel.HOST) for name in experiment.data.batch_spec)
  to_device = sum("host-to-device" in line for line in log)
  details = {"to_device_per_step": to_device / settings.steps, "arrays_of_a_batch": arrays}
  return [Measurement("lenet digits", "transfers to the device in a step / arrays of its batch",
                      details["to_device_per_step"] / arrays, 1, details=details),
          Measurement("lenet digits", f"transfers from the device in {settings.steps} steps",
                      len(log) - to_device, 0),]


@contextlib.contextmanager
def _logged_transfers() -> Iterator[list[str]]:
  """Lists the guard's line for each transfer, in either direction, when the context ends."""
  lines: list[str] = []
  before = jax.config.jax_transfer_guard
  with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
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
      lines += [line for line in log
                if re.search("(host-to-device|device-to-host) transfer", line)]


def measure_memory(
    settings: Settings, variant: str = "resnet50", pixels: int = 64, batch_size: int = 32,
) -> list[Measurement]:
  """The growth of memory in a few steps, against the compiler's plan and the batches read ahead.
  """
  config = resnet.get_config("imagenet2012")
  config.model.variant, config.data.image_shape, config.batch_size = variant, (pixels, pixels,
                                                                               3), batch_size
  experiment = resnet.build(config)
  program = Program(experiment, ONE_DEVICE)
  compiled = program.lower_train_step().compile()
  reported = inspect.summarize_compiled(compiled).memory.total
  ahead = 2

  def load(step: int) -> tuple[HostBatch, Any]:
    draw = np.random.default_rng(step)
    batch = {k: draw.random(s.shape, np.float32).astype(s.dtype)
             for k, s in experiment.data.batch_spec.items()}
    return batch, parallel.put_batch(batch, ONE_DEVICE.parallelism, program.mesh)

  lr_scale = parallel.put_shared(np.float32(1), program.mesh)
  # The state, which the report counts, lies there before, so that compiling its creation does not
  # count.
  state = jax.block_until_ready(program.init_state())
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  growth = _memory_meter(program.mesh.devices.flat[0])
  grown = []
  with contextlib.closing(prefetch(load, range(min(settings.steps, 5)), ahead)) as batches:
    for host, batch in batches:
      state, _ = compiled(state, batch, lr_scale)
      jax.block_until_ready(state)
      grown.append(growth() + state_bytes)
  data = sum(x.nbytes for x in host.values()) * (ahead + 1)
  details = {"first_step_growth_bytes": grown[0], "growth_bytes": grown[-1],
             "reported_bytes": reported, "data_bytes": data}
  return [Measurement(f"{variant} {pixels}x{pixels}, batch {batch_size}",
                      "growth of memory / reported by the compiled step, plus data",
                      grown[-1] / (reported + data), 1.2, details=details)]


def _memory_meter(device: Any) -> Callable[[], int]:
  """A function that gives the growth of the peak memory from now on, in bytes.

  The memory is that of the device, or for a CPU that of this process. An accelerator's peak counts
  from the program's start.
  """
  if "peak_bytes_in_use" in (device.memory_stats() or {}):
    held = device.memory_stats()["bytes_in_use"]
    return lambda: device.memory_stats()["peak_bytes_in_use"] - held
  if not os.access("/proc/self/clear_refs", os.W_OK):
    raise UserError("--rows=memory: this system tells neither the device's memory nor (in /proc) that of the "
                    "process; leave the row out")
  # Memory that the compiler freed must go back to the system. Otherwise the steps would reuse it
  # without a trace in the peak.
  gc.collect()
  with contextlib.suppress(AttributeError):  # not every C library has it
    ctypes.CDLL(None).malloc_trim(0)
  Path("/proc/self/clear_refs").write_text("5", "ascii")  # sets the peak to the memory held now

  def peak() -> int:
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))[1]
    return int(kilobytes) * 1024

  held = peak()
  return lambda: peak() - held


def measure_pipeline(settings: Settings) -> list[Measurement]:
  """How much faster batches are made from memory than LeNet consumes them."""
  kinds = {"not augmented": (20, {"pad_crop": 0}),
           "pad, crop, flip": (4, {"pad_crop": 3, "flip": True})}
  experiments, batch_turns, step_turns = {}, {kind: [] for kind in kinds}, []
  for kind, (_, augmentation) in kinds.items():
    config = _digits(lenet, settings.steps, augment=True)
    config.data.update(augmentation)
    experiments[kind] = lenet.build(config)
    experiments[kind].data.train.open()
  bare = _bare_step(experiments["not augmented"])
  for turn in range(settings.repeats):
    step_turns.append(bare.run(settings.steps))
    for kind, experiment in experiments.items():
      start = time.perf_counter()
      for step in range(turn * settings.steps, (turn + 1) * settings.steps):
        experiment.data.train.batch(step)
      batch_turns[kind].append((time.perf_counter() - start) / settings.steps)
  return [ratio(f"lenet digits, {kind}", "bare step / its batch made in memory",
                {"step_seconds": step_turns}, {"batch_seconds": batch_turns[kind]}, bound,
                at_least=True) for kind, (bound, _) in kinds.items()]


ROWS: Mapping[str, Callable[[Settings], list[Measurement]]] = {
    "loop": measure_loop,
    "transfers": measure_transfers,
    "memory": measure_memory,
    "pipeline": measure_pipeline,
    "sharding": measure_sharding,
}


def measure_row(row: str, settings: Settings) -> tuple[str, list[Measurement]]:
  """The device's kind and the row's measurements, for a process of their own."""
  logging.set_verbosity(logging.WARNING)
  found = ROWS[row](settings)  # it may restrict JAX to the CPU before that looks for devices
  return jax.devices()[0].device_kind, found
