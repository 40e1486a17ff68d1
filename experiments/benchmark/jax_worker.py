"""Our side of the row "models", a process: `python -m experiments.benchmark.jax_worker JSON`.

The JSON object: "case" (a key of `CASES`), "side" ("dljax", or "flax": without our operators),
"turn_seconds".
"""

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dljax import optim
from dljax.config import apply_overrides
from dljax.data.pipeline import HostBatch
from dljax.ops import attention, barrier, conv, ctc, dense, gelu, norm, pool, recurrence
from dljax.train.experiment import Experiment
from dljax.train.state import split_carry
from experiments.benchmark import serve
from experiments.benchmark.bare_step import BareStep
from experiments.benchmark.cases import CASES, Case

# The fields of a batch that the peer does not have.
NO_INPUTS = ("mask", "id", "box_mask", "target_weight", "reset")


def use_native_operators() -> None:
  """Replaces `dljax.ops` by plain Flax and JAX; call it before any model is imported."""
  conv.conv_general_dilated = jax.lax.conv_general_dilated
  pool.max_pool = nn.max_pool
  dense.dense, dense.dot_general = jnp.dot, jax.lax.dot_general
  dense.dense_transposed = _native_dense_transposed
  recurrence.recurrence = _native_recurrence
  ctc.ctc_loss = _native_ctc_loss
  attention.attention = _native_attention
  gelu.gelu, gelu.gelu_tanh = (functools.partial(nn.gelu, approximate=x) for x in (False, True))
  norm.layer_norm = _native_layer_norm
  barrier.once = _same


def _same(x: Any) -> Any:
  return x


def _native_dense_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jnp.dot(x, kernel.T)


def _native_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False,
    mask: jax.Array | None = None, segment: jax.Array | None = None, window: int | None = None,
) -> jax.Array:
  """Flax's attention, for as many heads of keys as of queries."""
  masks = []
  if causal:
    masks.append(nn.make_causal_mask(q[..., 0, 0]))
  if mask is not None:
    masks.append(mask if mask.ndim == 4 else mask[:, None, None, :])
  if segment is not None:
    masks.append(nn.make_attention_mask(segment, segment, jnp.equal))
  if window is not None:
    raise ValueError("plain Flax has no window")
  return nn.dot_product_attention(q, k, v, mask=nn.combine_masks(*masks))


def _native_layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float,
) -> jax.Array:
  params = {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
  layer = nn.LayerNorm(epsilon, use_bias=bias is not None, dtype=x.dtype)
  return layer.apply({"params": params}, x)


def _native_recurrence(
    cell: str, x: jax.Array, weights: recurrence.Weights, carry: recurrence.State,
    valid: jax.Array | None = None, *, reverse: bool = False,
) -> tuple[jax.Array, recurrence.State]:
  """The cell's formula in a loop, as `nn.RNN` has it; without layer norm."""
  form = recurrence.CELLS[cell]

  def step(
      state: recurrence.State, inputs: tuple[jax.Array, jax.Array | None],
  ) -> tuple[recurrence.State, jax.Array]:
    x, valid = inputs
    u, p = x @ weights.input + weights.input_bias, state[0] @ weights.recurrent + weights.recurrent_bias
    new, _ = form.forward(u, p, state)
    if valid is None:
      return new, new[0]
    new = jax.tree.map(lambda a, b: jnp.where(valid[:, None], a, b), new, state)
    return new, jnp.where(valid[:, None], new[0], 0)

  carry, outputs = jax.lax.scan(step, carry, (x, valid), reverse=reverse)
  return outputs, carry


def _native_ctc_loss(
    logits: jax.Array, length: jax.Array, labels: jax.Array, label_length: jax.Array, *,
    blank: int = 0,
) -> jax.Array:
  beyond = lambda x, length: (jnp.arange(x.shape[1]) >= length[:, None]).astype(jnp.float32)
  return optax.ctc_loss(logits, beyond(logits, length), labels, beyond(labels, label_length),
                        blank_id=blank)


def build_experiment(case: Case) -> Experiment:
  """The case's experiment with plain SGD and momentum, so that the peer does the same work."""
  experiment = importlib.import_module(case.experiment)
  preset, *overrides = case.arguments
  config = experiment.get_config(preset.removeprefix("--preset="))
  apply_overrides(config, overrides)
  config.optimizer = optim.default_config("momentum")
  config.optimizer.update({"learning_rate": serve.LEARNING_RATE, "momentum": serve.MOMENTUM,
                           "schedule": "constant", "warmup_fraction": 0.0})
  return experiment.build(config)


def random_batch(experiment: Experiment) -> HostBatch:
  """Noise with random labels (of images, pixels or boxes) or random texts.

  Boxes have 0.1 to 0.4 of the image's sides. Sounds and texts have their full length, without
  padding.
  """
  draw, classes = np.random.default_rng(0), num_classes(experiment)
  batch = {k: draw.standard_normal(s.shape, np.float32).astype(s.dtype)
           for k, s in experiment.data.batch_spec.items()}
  for name, x in batch.items():
    if name == "id":
      batch[name] = np.arange(len(x), dtype=x.dtype)
    elif name in ("length", "token_length"):
      field = "features" if name == "length" and "features" in batch else "tokens"
      batch[name] = np.full_like(x, batch[field].shape[1])
    elif name == "places":  # of the tokens to be predicted
      batch[name] = draw.integers(batch["tokens"].shape[1], size=x.shape, dtype=x.dtype)
    elif np.issubdtype(x.dtype, np.integer):
      # Token 0 is the blank of speech.
      batch[name] = draw.integers(name == "tokens", classes, x.shape, x.dtype)
    elif name in NO_INPUTS:
      batch[name] = np.full_like(x, name != "reset")
    elif name == "boxes":
      side = np.array(batch["image"].shape[2:0:-1], np.float32)
      corner, size = (side * draw.uniform(*range_, (*x.shape[:-1], 2))
                      for range_ in ((0, 0.6), (0.1, 0.4)))
      batch[name] = np.concatenate([corner, corner + size], axis=-1).astype(x.dtype)
  return batch


def num_classes(experiment: Experiment) -> int:
  """The number of labels or tokens."""
  task = experiment.task
  return task.num_classes if hasattr(task, "num_classes") else task.model.vocab_size


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
        "batch": {k: x.shape for k, x in bare.batch.items() if k not in NO_INPUTS},
        "classes": num_classes(experiment),
    }

  model, dot = experiment.task.model, jax.jit(jnp.dot)
  apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
  x = bare.batch[serve.input_field(bare.batch)]

  def inference(steps: int) -> float:
    variables, _ = split_carry(bare.state.variables)
    return _time_each(lambda: apply(variables, x), steps)

  def product(steps: int) -> float:
    x = jnp.ones((serve.PRODUCT, serve.PRODUCT), jnp.float32)
    return _time_each(lambda: dot(x, x), steps)

  return describe, {"train": train, "inference": inference, "product": product}


def _time_each(f: Callable[[], Any], steps: int) -> float:
  """Seconds for each call, whose result is waited for."""
  jax.block_until_ready(f())  # afterwards its inputs are ready, and it is compiled
  start = time.perf_counter()
  for _ in range(steps):
    jax.block_until_ready(f())
  return (time.perf_counter() - start) / steps


def _device_peak() -> int | None:
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
  # Otherwise a program that an earlier run compiled would cost nothing.
  jax.config.update("jax_enable_compilation_cache", False)
  job = json.loads(sys.argv[1])
  if job["side"] == "flax":
    use_native_operators()
  importlib.import_module(CASES[job["case"]].experiment)  # before the clock starts
  serve.serve(_build, _device_peak)
