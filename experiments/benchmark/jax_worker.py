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


def label_field(batch: Mapping[str, Any]) -> str:
  """Where a batch has what is to be learnt."""
  return "segmentation" if "segmentation" in batch else "label"


def random_batch(experiment: Experiment) -> HostBatch:
  """Noise with labels, of images or of pixels, that it has nothing to do with."""
  draw = np.random.default_rng(0)
  batch = {k: draw.standard_normal(s.shape, np.float32).astype(s.dtype) for k, s in experiment.batch_spec.items()}
  label = batch[label_field(batch)]
  batch[label_field(batch)] = draw.integers(0, experiment.task.num_classes, label.shape, label.dtype)
  return {**batch, "mask": np.ones_like(batch["mask"])}


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
        "batch": {"image": bare.batch["image"].shape, "label": bare.batch[label_field(bare.batch)].shape},
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


def _time_each(f: Callable[[], jax.Array], steps: int) -> float:
  """Seconds for each call, whose result is waited for."""
  f().block_until_ready()  # what it reads is there, and it is compiled
  start = time.perf_counter()
  for _ in range(steps):
    f().block_until_ready()
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
