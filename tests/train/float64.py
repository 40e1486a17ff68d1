"""The same training under every mode and mesh, in float64.

Run by test_parallel.py as `python -m tests.train.float64` with JAX_ENABLE_X64=1, which is a switch of the
whole process. Prints one JSON object: comparison -> the largest relative difference, after `STEPS` steps, of
any array of the state and of any step's metrics.
"""

import json

import jax
import jax.numpy as jnp

from tests.train import toys

STEPS = 5
ONE = ("jit", "data:1")
EXPERIMENTS = {
    "batch norm": lambda: toys.digits_experiment(toys.tiny_resnet(dtype=jnp.float64), ema_decay=0.9),
    "dropout": lambda: toys.digits_experiment(toys.ConvNet(dropout=0.5, dtype=jnp.float64), ema_decay=0.9),
    "attention": lambda: toys.digits_experiment(toys.tiny_vit(dtype=jnp.float64), ema_decay=0.9),
    "dense": lambda: toys.digits_experiment(toys.tiny_mlp(dtype=jnp.float64)),
    "dense accumulated": lambda: toys.digits_experiment(toys.tiny_mlp(dtype=jnp.float64), accumulation=4),
}
# What must equal what.
COMPARISONS = {
    ("batch norm", ONE): [("batch norm", ("jit", "data:4")), ("batch norm", ("pmap", "data:4"))],
    ("dropout", ONE): [
        ("dropout", ("jit", mesh)) for mesh in ("data:4", "data:2,fsdp:2", "data:2,tensor:2")],
    ("attention", ("jit", "data:4")): [
        ("attention", ("jit", mesh)) for mesh in ("fsdp:4", "data:2,tensor:2", "fsdp:2,tensor:2")],
    ("dense", ONE): [("dense accumulated", how) for how in (("jit", "data:4"), ("pmap", "data:4"))],
}


def name(one, other) -> str:
  """How a comparison is called in the JSON."""
  return " = ".join(f"{experiment} {mode} {mesh}" for experiment, (mode, mesh) in (one, other))


def _outcome(experiment, how):
  mode, mesh = how
  state, outs, _ = toys.train(
      EXPERIMENTS[experiment](), STEPS, dtype=jnp.float64, parallelism=mode, mesh=mesh)
  assert all(x.dtype == jnp.float64 for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim)
  assert [out["sums"]["loss"][1] for out in outs] == STEPS * [8]
  return state, outs


def main():
  found = {}
  for one, others in COMPARISONS.items():
    expected = _outcome(*one)
    for other in others:
      found[name(one, other)] = toys.difference(expected, _outcome(*other))
  print(json.dumps(found))


if __name__ == "__main__":
  main()
