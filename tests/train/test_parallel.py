"""The same numbers under jit, pmap and every mesh; who holds what; what is moved and what is refused."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dljax.errors import UserError
from dljax.models import gpt, vit
from dljax.ops import collectives
from dljax.tasks.base import LossOutput, dropout_key
from dljax.train import inspect, parallel
from dljax.train.checkpoint import Checkpointer
from dljax.train.loop import fit
from dljax.train.program import Program, RunOptions
from dljax.train.state import TrainState, state_sha256
from tests.train import float64, toys

ROOT = Path(__file__).parents[2]
MODES = [("jit", "data:4"), ("pmap", "data:4")]
MORE_MODES = [*MODES, ("jit", "data:1"), ("pmap", "data:1"), ("jit", "data:2,fsdp:2")]
ONES = toys.Scripted(lambda step: {"mask": np.ones(toys.BATCH_SIZE, np.float32)})


# The same numbers


@pytest.fixture(scope="module")
def float64_differences():
  """What `float64.main` prints, from a process of its own."""
  run = subprocess.run(
      [sys.executable, "-m", "tests.train.float64"], cwd=ROOT, capture_output=True, text=True, timeout=900,
      env={**os.environ, "JAX_ENABLE_X64": "1"})
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "comparison",
    [float64.name(one, other) for one, others in float64.COMPARISONS.items() for other in others])
def test_five_steps_are_the_same_in_float64(float64_differences, comparison):
  assert float64_differences[comparison] < 1e-9


@functools.cache
def _gradient(mode, mesh, model=toys.ConvNet, accumulation=1):
  """What momentum remembers in float32 after one step; after two of a transformer, whose head starts at zero."""
  experiment = toys.digits_experiment(model(), accumulation=accumulation)
  steps = 2 if model is toys.tiny_vit else 1
  return toys.train(experiment, steps, parallelism=mode, mesh=mesh).state.opt_state["all"][0].trace


@pytest.mark.parametrize("model, accumulation, mode, mesh", [
    *((model, accumulation, *how) for how in (*MODES, ("jit", "data:2,fsdp:2"))
      for model, accumulation in ((toys.ConvNet, 1), (toys.tiny_mlp, 4))),  # BatchNorm has its own batch
    (toys.tiny_vit, 1, "jit", "fsdp:2,tensor:2"),
])
def test_a_gradient_is_the_same_in_float32(mode, mesh, model, accumulation):
  one, other = _gradient("jit", "data:1", model), _gradient(mode, mesh, model, accumulation)
  scale = max(np.max(np.abs(g)) for g in jax.tree.leaves(one))
  assert scale > 0.01
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), one, other)


class _Draws(toys.Formula):
  """Reports the dropout mask that each device draws: metrics {"drawn": [4, rows of the device, 32]}."""

  def loss(self, params, model_state, batch, rng, *, denominators, train, player):
    ones = jnp.ones((len(batch["mask"]), 32))
    kept = nn.Dropout(0.5, deterministic=False).apply({}, ones, rngs={"dropout": dropout_key(rng, batch)}) > 0
    drawn = jnp.zeros((4, *kept.shape)).at[collectives.axis_index()].set(kept)
    return LossOutput(loss=params["w"], metrics={"drawn": (drawn, jnp.ones(()))}, model_state=model_state)


@pytest.mark.parametrize("mode, mesh", MODES)
def test_no_two_rows_devices_or_steps_draw_the_same(mode, mesh):
  task = _Draws(params={"w": 0.0}, rows=None)
  experiment = toys.formula_experiment(task, ONES)
  _, outs, _ = toys.train(experiment, 3, parallelism=mode, mesh=mesh)
  drawn = np.stack([out["sums"]["drawn"][0] for out in outs])  # [steps, devices, rows, 32]
  drawn = drawn[:, :1 if mode == "jit" else 4].reshape(-1, 32)  # the one jit program has no device index
  assert len(drawn) == 3 * toys.BATCH_SIZE
  assert len(np.unique(drawn, axis=0)) == len(drawn)
  assert 0.4 < drawn.mean() < 0.6


def test_no_two_micro_batches_draw_the_same():
  task = _Draws(params={"w": 0.0}, rows=None)
  experiment = toys.formula_experiment(task, ONES, accumulation=2)
  _, (out,), _ = toys.train(experiment, 1)
  assert set(np.unique(out["sums"]["drawn"][0][0])) == {0, 1, 2}  # twice the same would be 0 and 2


def _collectives(accumulation):
  program = Program(toys.digits_experiment(toys.tiny_mlp(), accumulation=accumulation),
                    RunOptions(mesh=toys.MESHES["data:4"]))
  summary = inspect.summarize_compiled(program.lower_train_step().compile())
  return {c.kind: c for c in summary.collectives}


def test_accumulation_moves_no_rows_between_devices():
  plain, accumulated = _collectives(1), _collectives(4)
  assert set(plain) == set(accumulated) == {"all-reduce"}
  # Sums of gradients and metrics alone, once for each micro-batch at most.
  assert accumulated["all-reduce"].size <= 4 * plain["all-reduce"].size


# Who holds what


BOTH = toys.MESHES["fsdp:2,tensor:2"]
RULES = (("*/qkv/kernel", ("fsdp", "tensor", None)), ("*/qkv/*", (None, None)), ("*/bias", ("tensor",)))


def _spec(path, *shape, rules=RULES, above=0, mesh=BOTH):
  array = jax.ShapeDtypeStruct(shape, jnp.float32)
  return parallel.Sharding(rules, above).spec(path, array, parallel.make_mesh(mesh))


def test_the_first_rule_that_matches_a_path_places_its_axes_whatever_the_size():
  assert _spec("block0/qkv/kernel", 8, 4, 3, above=10**9) == P("fsdp", "tensor", None)
  assert _spec("backbone/block0/qkv/kernel", 8, 4, 3) == P("fsdp", "tensor", None)
  assert _spec("block0/qkv/bias", 4, 4) == P(None, None)
  assert _spec("block0/bias", 6) == P("tensor")
  assert _spec("block0/qkv/kernel", 8, 4, 3, mesh=toys.MESHES["data:4"]) == P(None, None, None)
  assert _spec("block0/qkv/kernel", 7, 4, 3, mesh=toys.MESHES["data:2,tensor:2"]) == P(None, "tensor", None)


def test_without_a_rule_fsdp_splits_the_largest_dimension_that_it_divides():
  assert _spec("kernel", 6, 8) == P(None, "fsdp")
  assert _spec("kernel", 6, 9) == P("fsdp", None)
  assert _spec("kernel", 6, 6, 4) == P("fsdp", None, None)
  assert _spec("scale", 10) == P("fsdp")
  for shape in ((7,), (7, 9), (0,), ()):
    assert _spec("scale", *shape) == P()
  assert _spec("conv/kernel", 3, 3, 64, 16) == P(None, None, None, "fsdp"), "output channels"
  assert _spec("conv/kernel", 3, 3, 64, 15) == P()
  assert _spec("kernel", 6, 8, mesh=toys.MESHES["data:2,tensor:2"]) == P(), "tensor needs a rule"


def test_without_a_rule_only_large_arrays_are_split():
  assert _spec("kernel", 8, 8, above=4 * 64) == P("fsdp", None)
  assert _spec("kernel", 8, 8, above=4 * 64 + 1) == P()


def test_what_is_kept_of_a_parameter_lies_as_it_does_and_all_else_is_whole():
  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  params = {"block": {"qkv": {"kernel": like(8, 4, 3)}}, "kernel": like(4, 6), "qkv": {"kernel": like(8, 4, 3)}}
  kept = {"mu": params, "row": {"kernel": like(4), "qkv": {"kernel": like(8)}}, "count": like()}
  other = {"a": {"kernel": like(4, 6)}, "b": {"kernel": like(6, 4)}}
  state = TrainState(
      step=like(), params=params | other, model_state={"batch_stats": {"kernel": like(4, 6)}, "carry": like(8, 4)},
      opt_state={"all": {"inner": (kept,)}, "b": {"nu": other["b"]}}, rng=like(2), ema=params, failed_step=like())
  mesh = parallel.make_mesh(BOTH)
  found = jax.tree.map(lambda s: s.spec, parallel.state_shardings(state, mesh, parallel.Sharding(RULES, 0)))
  cut = {"block": {"qkv": {"kernel": P("fsdp", "tensor", None)}}, "kernel": P(None, "fsdp"),
         "qkv": {"kernel": P("fsdp", None, None)}}  # "*/qkv" is below something
  assert found.params == cut | {"a": {"kernel": P(None, "fsdp")}, "b": {"kernel": P("fsdp", None)}}
  assert found.ema == cut
  assert found.opt_state["all"]["inner"] == (
      {"mu": cut, "row": {"kernel": P(), "qkv": {"kernel": P()}}, "count": P()},)
  assert found.opt_state["b"] == {"nu": {"kernel": P("fsdp", None)}}, "a player's paths begin inside it"
  assert found.model_state == {"batch_stats": {"kernel": P()}, "carry": P("fsdp")}
  assert {found.step, found.rng, found.failed_step} == {P()}


def test_the_rules_of_a_models_file_hold_in_the_state():
  experiment = toys.digits_experiment(toys.tiny_vit(), optimizer={"name": "adamw"}, ema_decay=0.9)
  state = Program(experiment, RunOptions(mesh=BOTH)).abstract_state
  adam = state.opt_state["all"][0]
  for tree in (state.params, state.ema["params"], adam.mu, adam.nu):
    block = tree["block0"]
    assert block["qkv"]["kernel"].sharding.spec == P("fsdp", "tensor", None, None)
    assert block["qkv"]["bias"].sharding.spec == P("tensor", None, None)
    assert block["project"]["kernel"].sharding.spec == P("tensor", None, "fsdp")
    assert block["mlp1"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert block["mlp1"]["bias"].sharding.spec == P("tensor")
    assert block["mlp2"]["kernel"].sharding.spec == P("tensor", "fsdp")
    assert block["mlp2"]["bias"].sharding.spec == P("fsdp")
  assert adam.count.sharding.spec == P()


@pytest.mark.parametrize("mesh, above, idle", [
    ("data:4", 0, ""), ("data:2,fsdp:2", 0, ""), ("data:2,fsdp:2", 10**9, "fsdp:2"),
    ("data:2,tensor:2", 0, "tensor:2")])
def test_an_axis_that_places_nothing_is_a_warning_in_one_line(mesh, above, idle, capsys):
  experiment = toys.digits_experiment(toys.tiny_mlp(), shard_above=above)
  Program(experiment, RunOptions(mesh=toys.MESHES[mesh]))
  err = capsys.readouterr().err
  assert err.count("\n") == bool(idle)
  assert not idle or f"warning: --mesh={idle} splits no parameter of toy" in err


@pytest.mark.parametrize("fields, mesh, text", [
    ({"embed_dim": 12, "num_heads": 3}, "data:2,tensor:2",
     "--mesh=tensor:2 does not divide dimension 0 of block0/project/kernel, which has 3 entries; choose tensor:1, or"),
    ({"embed_dim": 6}, "fsdp:4", "--mesh=fsdp:4 does not divide dimension 0 of block0/.*, which has 6 entries; "
     "choose fsdp:3, or"),
])
def test_a_rule_that_does_not_divide_is_refused_before_anything_is_written(fields, mesh, text, tmp_path):
  experiment = toys.digits_experiment(toys.tiny_vit().clone(**fields))
  with pytest.raises(UserError, match=text) as error:
    fit(experiment, tmp_path / "run", RunOptions(mesh=toys.MESHES[mesh]))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_tensor_must_divide_the_groups_of_a_decoders_joint_projection():
  model = gpt.GPT(vocab_size=5, max_length=4, embed_dim=12, num_layers=1, num_heads=6, num_kv_heads=3, use_bias=False)
  params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
  place = lambda mesh: parallel.abstract_state(
      lambda: TrainState(step=0, params=jax.tree.map(lambda x: jnp.zeros(x.shape), params), model_state={},
                         opt_state={}, rng=0, ema=None, failed_step=0),
      parallel.make_mesh(toys.MESHES[mesh]), parallel.Sharding(tuple(gpt.SHARDING)))
  with pytest.raises(UserError, match=r"--mesh=tensor:2 does not divide dimension 1 of block0/qkv/kernel, which has 3 "
                                      r"entries; choose tensor:1, or another divisor") as error:
    place("data:2,tensor:2")
  assert "\n" not in str(error.value)
  assert place("data:4").params["block0"]["qkv"]["kernel"].shape == (12, 3, 4, 2)


def test_a_rule_for_another_rank_is_refused():
  with pytest.raises(UserError, match="rule '\\*/bias' has 1 dimensions and block0/bias has 2"):
    _spec("block0/bias", 4, 4)


def test_a_task_may_have_rules_of_its_own():
  task = dataclasses.replace(toys.digits_experiment(toys.tiny_vit()).task)
  assert task.sharding == tuple(vit.SHARDING)
  assert task.input_dimensions == tuple(vit.INPUT_DIMENSIONS)
  params = {"w": np.zeros((4, 4))}
  plain = toys.Formula(params=params, rows=None)
  assert plain.sharding == plain.input_dimensions == plain.no_decay == ()

  class Own(toys.Formula):
    sharding = [("w", (None, "fsdp"))]

  program = Program(toys.formula_experiment(Own(params=params, rows=None), ONES),
                    RunOptions(mesh=toys.MESHES["fsdp:4"]))
  assert program.abstract_state.params["w"].sharding.spec == P(None, "fsdp")


def test_muon_reads_a_joint_kernel_as_the_matrix_that_its_model_says():
  """In the second step, as the head starts at zero and hides the blocks from the first."""
  experiment = toys.digits_experiment(
      toys.tiny_vit(), optimizer={"name": "muon", "momentum": 0.9, "learning_rate": 1.0, "schedule": "constant"})
  program = toys.make_program(experiment, "jit", "data:1")
  before, after = (  # [8, 2, 3, 4]
      toys.train(experiment, steps, program=program).state.params["block0"]["qkv"]["kernel"] for steps in (0, 2))
  values = np.linalg.svd((after - before).reshape(8, 24), compute_uv=False) / np.sqrt(24 / 8)
  assert 0.6 < values.max() < 1.2


def test_sharded_state_takes_its_share_of_memory_and_stays_sharded():
  experiment = toys.digits_experiment(toys.tiny_mlp(), mask=None)
  program = Program(experiment, RunOptions(mesh={"data": 1, "fsdp": 4, "tensor": 1}))
  state = program.init_state()
  scale = parallel.put_shared(np.float32(1), program.mesh)
  for step in range(2):
    kernel, trace = state.params["hidden1"]["kernel"], state.opt_state["all"][0].trace["hidden1"]["kernel"]
    for array in (kernel, trace):
      assert {s.data.shape for s in array.addressable_shards} == {(16, 16)}  # of [64, 16]
    batch = parallel.put_batch(experiment.data.train.batch(step), "jit", program.mesh)
    state, _ = jax.block_until_ready(program.train_step(state, batch, scale))
  for array, planned in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
    assert array.sharding.is_equivalent_to(planned.sharding, array.ndim)


@pytest.mark.parametrize("mode, mesh", [*MORE_MODES, ("jit", "fsdp:2,tensor:2")])
def test_a_step_is_compiled_once_moves_nothing_but_the_batch_and_donates_the_state(mode, mesh, caplog):
  model = toys.tiny_vit() if "tensor" in mesh else toys.tiny_mlp()
  experiment = toys.digits_experiment(model, mask=None, ema_decay=0.9)
  program = Program(experiment, RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  state = parallel.step_state(program.init_state(), mode, program.mesh)
  scale = parallel.put_shared(np.float32(1), program.mesh)
  batches = [parallel.put_batch(experiment.data.train.batch(step), mode, program.mesh) for step in range(4)]
  with jax.log_compiles():
    state, _ = jax.block_until_ready(program.train_step(state, batches[0], scale))
  assert "Compiling" in caplog.text
  caplog.clear()
  for batch in batches[1:]:
    old = jax.tree.leaves(state)
    with jax.transfer_guard("disallow"), jax.log_compiles():
      state, out = jax.block_until_ready(program.train_step(state, batch, scale))
    assert all(x.is_deleted() for x in old)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, out, batch, scale)))
  assert "Compiling" not in caplog.text
  assert int(state.step) == 4


def test_the_state_has_no_device_axis_and_float32_parameters():
  program = Program(toys.digits_experiment(toys.ConvNet(dtype=jnp.bfloat16)), RunOptions(parallelism="pmap"))
  state = program.init_state()
  assert state.params["head"]["kernel"].shape == (8, 10)
  assert state.step.shape == ()
  floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert set(floats) == {jnp.dtype("float32")}


# A checkpoint is of no mode and no mesh


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """Step 2 of a run as jit on four devices: the folder, and the digest of its state."""
  folder = tmp_path_factory.mktemp("run") / "checkpoints"
  experiment = toys.digits_experiment(toys.ConvNet(dropout=0.5), ema_decay=0.9)
  state, _, program = toys.train(experiment, 2)
  digest = state_sha256(state)
  with Checkpointer(folder) as checkpointer:
    placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, program.abstract_state)
    checkpointer.save(2, placed, {"best_step": None})
  return experiment, folder, digest


@pytest.mark.parametrize("mode, mesh", [("pmap", "data:4"), ("jit", "data:2,fsdp:2"), ("jit", "data:1")])
def test_a_checkpoint_restores_under_another_mode_or_mesh_and_trains_on(checkpoint, mode, mesh):
  experiment, folder, digest = checkpoint
  program = Program(experiment, RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  with Checkpointer(folder) as checkpointer:
    state = checkpointer.restore(program.abstract_state).state
  assert state_sha256(parallel.state_to_host(state)) == digest
  shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  assert shardings(state) == shardings(program.abstract_state)
  batch = parallel.put_batch(experiment.data.train.batch(2), mode, program.mesh)
  state, out = jax.block_until_ready(
      program.train_step(state, batch, parallel.put_shared(np.float32(1), program.mesh)))
  assert int(state.step) == 3
  assert np.isfinite(out["loss"])


def test_of_a_hosts_array_each_device_gets_its_part():
  mesh = parallel.make_mesh(toys.MESHES["fsdp:2,tensor:2"])
  value = np.arange(8.0, dtype=np.float32).reshape(4, 2)
  array = parallel.put_array(value, NamedSharding(mesh, P("tensor", "fsdp")))
  assert {shard.data.shape for shard in array.addressable_shards} == {(2, 1)}
  np.testing.assert_array_equal(array, value)
  scalar = parallel.put_array(np.array(3, np.int32), NamedSharding(mesh, P()))
  assert (scalar.shape, scalar.dtype, int(scalar)) == ((), np.int32, 3)


# The digest of the whole state


def _gpt2_xl(width=1600, layers=48, heads=25):
  """path -> shape of each parameter; joint projections lie heads first."""
  shapes = {"wte": (50257, width), "wpe": (1024, width), "ln_f/scale": (width,), "ln_f/bias": (width,)}
  for i in range(layers):
    shapes |= {f"h{i}/{name}": shape for name, shape in {
        "ln_1/scale": (width,), "ln_1/bias": (width,), "ln_2/scale": (width,), "ln_2/bias": (width,),
        "qkv/kernel": (width, heads, 3, width // heads), "qkv/bias": (heads, 3, width // heads),
        "project/kernel": (width, width), "project/bias": (width,),
        "mlp1/kernel": (width, 4 * width), "mlp1/bias": (4 * width,),
        "mlp2/kernel": (4 * width, width), "mlp2/bias": (width,)}.items()}
  return shapes


def test_the_digest_of_gpt2_xl_with_adam_takes_two_pieces_of_memory():
  """Its parameters and moments take 18.7 GB, and one chip of a v5e has 15.75 GiB."""
  mesh = parallel.make_mesh(toys.MESHES["fsdp:4"])
  sharding = parallel.Sharding(above=4 * 2**20)
  states = {}  # (shape, how it lies) -> its parts' bytes on a device, and what the gathering needs there
  whole = own = 0
  for path, shape in _gpt2_xl().items():
    spec = sharding.spec(path, jax.ShapeDtypeStruct(shape, jnp.float32), mesh)
    if (shape, spec) not in states:
      array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
      states[shape, spec] = 4 * math.prod(array.sharding.shard_shape(shape)), 0
      if not array.sharding.is_fully_replicated:
        axis, size = parallel.piece_of(array, parallel.PIECE)
        memory = parallel.cut_piece(array.sharding, axis, size).lower(array, jnp.int32(0)).compile().memory_analysis()
        states[shape, spec] = (memory.argument_size_in_bytes, memory.output_size_in_bytes + memory.temp_size_in_bytes)
    whole += 3 * 4 * math.prod(shape)
    own += 3 * states[shape, spec][0]
  assert whole == 3 * 4 * 1_557_611_200  # more than a chip has
  assert own < whole / 4 + 50e6
  gathered = max(size for _, size in states.values())
  # A piece, once where it ends up and once on its way; the largest array has 322 MB.
  assert parallel.PIECE / 2 < gathered < 2.3 * parallel.PIECE < 50257 * 1600 * 4 / 2
  assert own + gathered < 5e9


@pytest.mark.parametrize("shape, axes", [
    ((12, 10), ("fsdp", None)), ((6, 10), (None, "fsdp")), ((4, 14), ("tensor", "fsdp")), ((16,), (("fsdp", "tensor"),)),
    ((2, 3, 22), ("fsdp", None, "tensor"))])
def test_an_array_is_whole_after_its_pieces(shape, axes):
  mesh = parallel.make_mesh(toys.MESHES["fsdp:2,tensor:2"])
  value = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
  array = parallel.put_array(value, NamedSharding(mesh, P(*axes)))
  most = value.nbytes // 3 + 1
  assert value.nbytes > most >= math.prod(shape) * 4 // max(array.sharding.shard_shape(shape)) * parallel.piece_of(
      array, most)[1]
  np.testing.assert_array_equal(parallel.read_pieces(array, here=True, most=most), value)
  assert parallel.read_pieces(array, here=False, most=most) is None


def test_arrays_are_read_one_at_a_time_for_the_digest():
  state = toys.make_program(toys.digits_experiment(toys.tiny_mlp()), mesh="data:2,fsdp:2").init_state()
  last = []

  def fetch(x):
    assert not last or last.pop()() is None, "the array before is still there"
    array = np.array(parallel.array_to_first_host(x))
    last.append(weakref.ref(array))
    return array

  digest = state_sha256(state, fetch)
  assert digest == state_sha256(jax.tree.map(np.asarray, state)) and last
  asked = []
  assert state_sha256(state, asked.append) is None  # as on the other hosts, which take part all the same
  assert len(asked) == len(jax.tree.leaves(state))


# Batches there and back


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_rows_come_back_in_order_and_host_fields_stay(mode):
  mesh = parallel.make_mesh(toys.MESHES["data:4"], mode)
  rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
  batch = parallel.put_batch({"x": rows, "host/id": np.array(["a"] * 8)}, mode, mesh)
  assert set(batch) == {"x"}
  assert {s.data.size for s in batch["x"].addressable_shards} == {6}
  double = parallel.compile_step(
      lambda batch: (2 * batch["x"],), mode, mesh, inputs=("batch",), outputs=("batch",))
  out, = double(batch)
  np.testing.assert_array_equal(parallel.rows_to_host(out, mode), 2 * rows)


@pytest.mark.parametrize("mode, mesh", [("jit", "data:4"), ("jit", "data:2,fsdp:2"), ("pmap", "data:4")])
def test_of_rows_that_are_drawn_nothing_else_moves(mode, mesh):
  mesh = parallel.make_mesh(toys.MESHES[mesh], mode)
  images = np.arange(64 * 300, dtype=np.float32).reshape(64, 10, 30)
  batch = parallel.put_batch({"image": images}, mode, mesh)
  rows = np.array([63, 0, 17, 16, 40])
  np.testing.assert_array_equal(parallel.some_rows_to_host(batch["image"], rows, mode, mesh), images[rows])
  program = parallel.take_rows(mesh, mode).lower(batch["image"], np.zeros(8, np.int32)).compile()
  moved = inspect.summarize_compiled(program).collectives
  assert {c.kind for c in moved} == {"all-reduce"} and sum(c.size for c in moved) == 8 * 300 * 4


@pytest.mark.parametrize("sizes, processes, rows", [
    ((2, 1, 1), [0, 1], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ((1, 2, 1), [0, 1], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ((1, 1, 2), [0, 1], [range(8), range(8)]),  # both need all
    ((2, 1, 2), [0, 0, 1, 1], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ((2, 1, 2), [0, 1, 0, 1], [range(8), range(8)]),
    ((2, 2, 1), [0, 1, 1, 0], [[0, 1, 6, 7], [2, 3, 4, 5]]),  # devices that stand by their wires
    ((1, 4, 1), [1, 0, 1, 0], [[2, 3, 6, 7], [0, 1, 4, 5]]),
    ((4, 1, 2), [0, 0, 0, 1, 1, 1, 2, 2], [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7]]),
])
def test_a_process_reads_the_rows_of_its_devices(sizes, processes, rows):
  devices = np.array([types.SimpleNamespace(process_index=i) for i in processes], object).reshape(sizes)
  mesh = types.SimpleNamespace(devices=devices, shape=dict(zip(parallel.AXES, sizes)))
  for process, expected in enumerate(rows):
    found = parallel.batch_rows(mesh, 8, process)
    assert found.tolist() == list(expected)
    with mock.patch.object(jax, "process_index", lambda: process):
      assert parallel.batch_rows(mesh, 8).tolist() == list(expected)
      assert parallel.global_rows(mesh, len(found)) == 8


def test_virtual_devices_take_one_step_at_a_time():
  assert parallel.steps_in_flight(parallel.make_mesh(toys.MESHES["data:4"])) == 1
  assert parallel.steps_in_flight(parallel.make_mesh(toys.MESHES["data:1"])) == 2


# Bad input


def test_a_mesh_is_read():
  assert parallel.parse_mesh("") == {}
  assert parallel.parse_mesh("fsdp:2,data:4") == {"data": 4, "fsdp": 2, "tensor": 1}
  assert parallel.make_mesh({}).shape == {"data": 4, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("text", [
    "data", "data:0", "data:-1", "rows:2", "data:2;fsdp:2", "data:two", "data:²", "data:" + 5000 * "1"])
def test_a_mesh_that_is_none_is_refused(text):
  with pytest.raises(UserError, match="--mesh.*data:4,fsdp:2,tensor:1"):
    parallel.parse_mesh(text)


def _hops(mesh, sides):
  """The mean number of wires between neighbours on each axis of several devices; rows of chips are rings."""
  places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
  found = {}
  for axis, name in enumerate(mesh.axis_names):
    if mesh.shape[name] > 1:
      steps = np.abs(places - np.roll(places, -1, axis))
      found[name] = float(np.minimum(steps, np.array(sides) - steps).sum(-1).mean())
  return found


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_neighbours_on_a_mesh_are_neighbours_on_a_tpu(monkeypatch):
  for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled",
                      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
    monkeypatch.setenv(name, value)
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
  assert {tuple(device.coords) for device in devices} == {(x, y, 0) for x in range(16) for y in range(16)}

  def hops(mode="jit", **sizes):
    return _hops(parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, **sizes}, mode, devices), (16, 16, 1))

  assert hops(data=16, fsdp=16) == {"data": 1, "fsdp": 1}
  assert hops(data=16, tensor=16) == {"data": 1, "tensor": 1}
  assert hops(data=256)["data"] < 1.1
  split = hops(data=32, tensor=8)  # an axis of 16 chips has to be split
  assert split["data"] <= 1.5 and split["tensor"] < 2
  in_order = Mesh(np.array(devices).reshape(16, 16, 1), parallel.AXES)
  assert _hops(in_order, (16, 16, 1))["data"] == 9
  # A part of a machine and a machine of which a chip is missing still make a mesh.
  for some in devices[:2], devices[:3]:
    sizes = {"data": len(some), "fsdp": 1, "tensor": 1}
    assert set(parallel.make_mesh(sizes, devices=some).devices.flat) == set(some)
  assert parallel.make_mesh({"data": 256, "fsdp": 1, "tensor": 1}, "pmap", devices).devices.flat[1] == devices[1]


@pytest.mark.parametrize("refused, taken", [((), False), ((False,), True), ((False, True), None)])
@pytest.mark.parametrize("error", [AssertionError, NotImplementedError, ValueError])
def test_a_mesh_that_the_wires_do_not_allow_is_made_all_the_same(monkeypatch, refused, taken, error):
  asked = []

  def place(shape, devices, *, allow_split_physical_axes):
    asked.append(allow_split_physical_axes)
    if allow_split_physical_axes in refused:
      raise error("no")
    return np.array(devices[::-1]).reshape(shape)

  monkeypatch.setattr(mesh_utils, "create_device_mesh", place)
  mesh = parallel.make_mesh({"data": 2, "fsdp": 1, "tensor": 2})
  devices = jax.devices()
  assert mesh.devices.ravel().tolist() == (devices if taken is None else devices[::-1])
  assert mesh.devices.shape == (2, 1, 2)
  assert asked == [False, True][:1 + len(refused)]


def test_what_does_not_fit_the_devices_is_refused():
  with pytest.raises(UserError, match="--mesh=data:4,fsdp:2,tensor:1 needs 8 devices and there are 4"):
    parallel.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  with pytest.raises(UserError, match="--parallelism=pmap is data parallel only"):
    parallel.make_mesh(toys.MESHES["data:2,fsdp:2"], "pmap")
  mesh = parallel.make_mesh(toys.MESHES["data:2,tensor:2"])
  parallel.check_batch_size("--config.batch_size", 6, mesh)  # tensor does not split the batch
  with pytest.raises(UserError, match="--config.batch_size=7 .*choose a multiple of 2"):
    parallel.check_batch_size("--config.batch_size", 7, mesh)
  with pytest.raises(UserError, match="--config.batch_size=6 .*choose a multiple of 4"):
    parallel.check_batch_size("--config.batch_size", 6, mesh, accumulation=2)
