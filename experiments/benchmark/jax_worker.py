"""Our side of the row "models", in a process of its own: `python -m experiments.benchmark.jax_worker JSON`.

The JSON object: "case" (a key of `CASES`), "side" ("dljax", or "flax": without our operators), "turn_seconds".
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dljax import optim
from dljax.config import apply_overrides
from dljax.data.pipeline import HostBatch
from dljax.ops import conv, pool
from dljax.train.experiment import Experiment
from experiments.benchmark import serve
from experiments.benchmark.bare_step import BareStep
from experiments.benchmark.cases import CASES, Case


def use_native_operators() -> None:
  """Makes Flax and JAX do what `dljax.ops` does otherwise; call it before any model is imported."""
  conv.conv_general_dilated = jax.lax.conv_general_dilated
  pool.max_pool = nn.max_pool


def build_experiment(case: Case) -> Experiment:
  """What the case's command line runs, but with plain SGD and momentum, so that the peer has the same to do."""
  experiment = importlib.import_module(case.experiment)
  preset, *overrides = case.arguments
  config = experiment.get_config(preset.removeprefix("--preset="))
  apply_overrides(config, overrides)
  config.optimizer = optim.default_config("momentum")
  config.optimizer.update({"learning_rate": serve.LEARNING_RATE, "momentum": serve.MOMENTUM,
                           "schedule": "constant", "warmup_fraction": 0.0})
  return experiment.build(config)


def random_batch(experiment: Experiment) -> HostBatch:
  """Noise with labels, of images, pixels or boxes, that it has nothing to do with; boxes of 0.1 to 0.4 of its sides."""
  draw = np.random.default_rng(0)
  batch = {k: draw.standard_normal(s.shape, np.float32).astype(s.dtype) for k, s in experiment.batch_spec.items()}
  for name, x in batch.items():
    if np.issubdtype(x.dtype, np.integer):
      batch[name] = draw.integers(0, experiment.task.num_classes, x.shape, x.dtype)
    elif name in ("mask", "box_mask"):
      batch[name] = np.ones_like(x)
    elif name == "boxes":
      side = np.array(batch["image"].shape[2:0:-1], np.float32)
      corner, size = (side * draw.uniform(*range_, (*x.shape[:-1], 2)) for range_ in ((0, 0.6), (0.1, 0.4)))
      batch[name] = np.concatenate([corner, corner + size], axis=-1).astype(x.dtype)
  return batch


def _build(spec: Mapping[str, Any]) -> tuple[serve.Describe, dict[str, serve.Run]]:
  experiment = build_experiment(CASES[spec["case"]])
  bare = BareStep(experiment, random_batch(experiment))

  def train(steps: int) -> float:
    seconds = bare.run(steps)
    if bare.failed:
      raise FloatingPointError("the loss or its gradient is not finite")
    return seconds

  def describe() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "compile_seconds": bare.compile_seconds,
        "parameters": sum(x.size for x in jax.tree.leaves(bare.state.params)),
        "train_flops": bare.program.train_step_flops(),
        "batch": {k: x.shape for k, x in bare.batch.items() if k not in ("mask", "box_mask")},
        "classes": experiment.task.num_classes,
    }

  model, dot = experiment.task.model, jax.jit(jnp.dot)
  apply = jax.jit(lambda variables, image: model.apply(variables, image, train=False))

  def inference(steps: int) -> float:
    variables = {"params": bare.state.params, **bare.state.model_state}
    return _time_each(lambda: apply(variables, bare.batch["image"]), steps)

  def product(steps: int) -> float:
    x = jnp.ones((serve.PRODUCT, serve.PRODUCT), jnp.float32)
    return _time_each(lambda: dot(x, x), steps)

  return describe, {"train": train, "inference": inference, "product": product}


def _time_each(f: Callable[[], Any], steps: int) -> float:
  """Seconds for each call, whose result is waited for."""
  jax.block_until_ready(f())  # what it reads is there, and it is compiled
  start = time.perf_counter()
  for _ in range(steps):
    jax.block_until_ready(f())
  return (time.perf_counter() - start) / steps


def _device_peak() -> int | None:
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
  jax.config.update("jax_enable_compilation_cache", False)  # or what an earlier run compiled would cost nothing
  job = json.loads(sys.argv[1])
  if job["side"] == "flax":
    use_native_operators()
  importlib.import_module(CASES[job["case"]].experiment)  # before the clock starts
  serve.serve(_build, _device_peak)
