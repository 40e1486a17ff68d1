"""Compiling for machines that are not there; each compilation in a process of its own."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys

import pytest

from dljax.errors import UserError
from dljax.train import topology


def test_unknown_name_says_the_nearest():
  with pytest.raises(UserError, match=r"--topology: there is no 'v5e:2x3'; did you mean .*v5e:2x2"):
    topology.topology_devices("v5e:2x3")


@pytest.mark.parametrize("name, package", [
    ("v5e:2x2", r"pip install 'jax\[tpu\]=="), ("h100:4", "jax-cuda13-plugin==")])
def test_missing_compiler_says_what_to_install(name, package, monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
  with pytest.raises(UserError, match=f"--topology={name}: .*{package}"):
    topology.topology_devices(name)


# A train-like step: a matrix sharded over "fsdp" or whole, a batch over all devices, the gradient summed.
_STEP = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from dljax.errors import UserError
from dljax.train import flops, inspect, topology
name, side = sys.argv[1], int(sys.argv[2])
devices = topology.topology_devices(name)
assert jax.default_backend() == "cpu" and len(devices) == topology.TOPOLOGIES[name].devices
mesh = Mesh(np.array(devices).reshape(2, -1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
w, x = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p))
        for s, p in (((side, side), P("fsdp", None)), ((side, side), P(("data", "fsdp"), None))))
step = jax.jit(lambda w, x: w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w),
               out_shardings=w.sharding, donate_argnums=0)
try:
  compiled = topology.compile_lowered(step.lower(w, x), name)
except UserError as error:
  sys.exit(str(error))
summary = inspect.summarize_compiled(compiled)
print(json.dumps({
    "flops": flops.count_flops(step, w, x), "compiler_flops": summary.flops, "cycles": summary.cycles,
    "arguments": summary.memory.arguments, "aliased": summary.memory.aliased, "total": summary.memory.total,
    "collectives": {c.kind: [c.count, c.size] for c in summary.collectives}}))
"""


def _compile(name, side):
  # The environment of a user: neither conftest's nor any that quiets the compilers.
  env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS") and "TPU" not in k}
  return subprocess.run([sys.executable, "-c", _STEP, name, str(side)], capture_output=True, text=True,
                        env=env, check=False, timeout=300)


def _needs(name):
  if missing := topology.missing_compiler(name):
    pytest.skip(missing)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(topology.TOPOLOGIES))
def test_a_sharded_step_compiles(name):
  _needs(name)
  side, machine = 1024, topology.TOPOLOGIES[name]
  result = _compile(name, side)
  assert result.returncode == 0, result.stderr
  assert not re.search("error|warning|traceback", result.stderr, re.I), result.stderr
  report = json.loads(result.stdout)
  products = 2 * 2 * side**3
  assert report["flops"] == pytest.approx(products, rel=0.02)
  assert report["aliased"] == 4 * side**2 // (machine.devices // 2)  # one shard of the matrix
  assert report["arguments"] == report["aliased"] + 4 * side**2 // machine.devices
  assert report["total"] >= report["arguments"]
  width = 2 if machine.platform == "tpu" else 4  # bytes: a TPU multiplies, and so gathers, in bfloat16
  assert report["collectives"]["all-gather"][1] >= width * side**2
  moved = [report["collectives"].get(kind, [0, 0])[1] for kind in ("all-reduce", "reduce-scatter")]
  assert sum(moved) >= width * side**2 // (machine.devices // 2)  # the gradient of one shard
  if machine.platform == "tpu":
    assert report["compiler_flops"] == pytest.approx(products / machine.devices, rel=0.05)
    assert report["cycles"] > 0
  else:
    assert report["compiler_flops"] is None and report["cycles"] is None


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_one_line():
  _needs("v5e:2x2")
  result = _compile("v5e:2x2", 131072)  # 64 GiB for the whole matrix
  assert result.returncode == 1
  line = r"--topology=v5e:2x2: the step does not fit \(.*15\.75G.*\); .*\n"
  assert re.fullmatch(line, result.stderr), result.stderr


@pytest.mark.slow
def test_two_processes_compile_at_once():
  _needs("v5e:2x2")
  with concurrent.futures.ThreadPoolExecutor() as pool:
    results = list(pool.map(lambda _: _compile("v5e:2x2", 1024), range(2)))
  assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
