"""A task that draws by row, and what it gives under every mode, mesh, accumulation and evaluation batch size.

Run by test_rows.py as `python -m tests.train.rows` in two processes; each prints one JSON object.
"""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax.tasks.base import MIN, Findings, LossOutput, TaskBase, named_key, row_keys
from dljax.train import parallel
from dljax.train.evaluate import Evaluator
from dljax.train.program import Program, RunOptions
from tests.train import toys

WIDTH, LATENT, EXAMPLES = 6, 3, 70  # of 70 examples no batch size divides the number


class Duel(nn.Module):
  """A generator and a critic, smooth, so that float64 shows every difference.

  Here and below draws are uniform: normal ones take much longer to compile.
  """

  @nn.compact
  def __call__(self, x, z):
    dense = functools.partial(nn.Dense, kernel_init=nn.initializers.lecun_uniform(), param_dtype=z.dtype)
    generated = dense(WIDTH, name="generator")(z)
    critic = dense(5, name="critic")
    return generated, jnp.tanh(critic(x)), jnp.tanh(critic(generated))


@dataclasses.dataclass(frozen=True)
class Noisy(TaskBase):
  """Two players, whose losses draw a latent and a noise for each row and one number for the batch.

  Batches have x [B, WIDTH], mask [B] and id i32[B].
  """

  model: nn.Module = Duel()
  players = ("critic", "critic", "generator")
  own_rows = 2
  goals = {"critic_loss": MIN, "generator_loss": MIN, "spread": MIN}
  evaluate_reads = ("x", "id")

  def init(self, rng, batch):
    return self.model.init(rng, batch["x"], jnp.zeros((len(batch["x"]), LATENT), batch["x"].dtype))

  def denominators(self, batch):
    return {"rows": jnp.sum(batch["mask"])}

  def _draw(self, rng, batch, count):
    keys = row_keys(rng, batch)
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), batch["x"].dtype, -1, 1))(keys)

  def loss(self, params, model_state, batch, rng, *, denominators, train, player):
    noise = self._draw(named_key(rng, "noise"), batch, WIDTH)
    shift = jax.random.uniform(named_key(rng, "shift"), (), batch["x"].dtype)
    _, real, fake = self.model.apply(
        {"params": params}, batch["x"] + noise + shift, self._draw(rng, batch, LATENT))
    rows = jnp.sum(fake**2, -1) if player == "generator" else jnp.sum((real - 1)**2 + fake, -1)
    total, count = jnp.sum(rows * batch["mask"]), jnp.sum(batch["mask"])
    return LossOutput(
        loss=total / denominators["rows"], metrics={f"{player}_loss": (total, count)},
        model_state=model_state)

  def context(self, variables, rng, inputs):
    key = named_key(rng, "context")
    return {"scale": jnp.sum(variables["params"]["critic"]["bias"]) + jax.random.uniform(key)}

  def predict(self, variables, batch, rng, context=None):
    generated, real, _ = self.model.apply(variables, batch["x"], self._draw(rng, batch, LATENT))
    return {"generated": jnp.concatenate([generated, real], -1) + context["scale"]}

  def evaluate(self, rows, sums, assets):
    found = [(predicted["generated"], batch["id"]) for predicted, batch in rows]
    values, ids = (np.concatenate(part) for part in zip(*found))
    order = np.argsort(ids)
    return Findings(
        metrics={"spread": float(values.std())}, tables={"rows": [{"values": row} for row in values[order]]})


def _examples(dtype) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(EXAMPLES, WIDTH)).astype(dtype)


def _own(batch):
  """This process's rows of a global batch, as a pipeline gives them on a mesh of `data` alone."""
  rows = np.split(np.arange(len(batch["mask"])), jax.process_count())[jax.process_index()]
  return {name: x[rows] for name, x in batch.items()}


def training_batch(step, dtype=np.float32):
  """Rows of which some are padding, in another place in every step."""
  count = toys.BATCH_SIZE
  ids = np.arange(count, dtype=np.int32)
  x = _examples(dtype)[(step * count + ids) % EXAMPLES]
  mask = np.roll(toys.uneven_mask(step), step).astype(dtype)
  return _own({"x": x, "mask": mask, "id": ids})


def evaluation_pipeline(batch_size, dtype=np.float32):
  """One pass over the examples in order, the last batch padded."""
  def batch(step):
    ids = np.arange(step * batch_size, (step + 1) * batch_size)
    real = ids < EXAMPLES
    ids = np.where(real, ids, 0).astype(np.int32)
    return _own({"x": _examples(dtype)[ids], "mask": real.astype(dtype), "id": ids})

  return toys.Scripted(batch, num_batches=-(-EXAMPLES // batch_size), num_examples=EXAMPLES)


def experiment(dtype=np.float32, batch_size=8, **fields):
  made = toys.formula_experiment(
      Noisy(), toys.Scripted(lambda step: training_batch(step, dtype)),
      {"validation": evaluation_pipeline(batch_size, dtype)},
      optimizers={player: {"name": "momentum", "learning_rate": rate, "momentum": 0.5}
                  for player, rate in (("critic", 0.1), ("generator", 0.05))},
      ema_decay=0.9, **fields)
  made.config.eval_batch_size = batch_size
  return made


def trained(mode, mesh, accumulation=1, steps=2, dtype=np.float64):
  """(the state, what each step returned), as NumPy arrays."""
  made = experiment(dtype, accumulation=accumulation)
  outcome = toys.train(made, steps, dtype=dtype, parallelism=mode, mesh=mesh)
  return outcome.state, outcome.outs


def evaluated(mode, mesh, batch_size):
  """(the metrics of a pass, the predictions in the examples' order)."""
  made = experiment(batch_size=batch_size)
  program = Program(made, RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  state = parallel.step_state(program.init_state(), mode, program.mesh)
  evaluator = Evaluator(made.task, mode, program.mesh, made.data.context)
  found = evaluator.full(state.variables, state.rng, made.data.evals["validation"], "validation", {})
  return dict(found.metrics), np.stack([row["values"] for row in found.tables["rows"]])


def main():
  parallel.initialize()
  metrics, predictions = evaluated("jit", "data:4", 8)
  i = jax.process_index()
  places = [["a", "Łódź"], ["", "a longer one"]][i]
  mesh = parallel.make_mesh(toys.MESHES["data:4"])
  gathered = parallel.gather_hosts(
      {"x": 2**40 + np.arange(2) + 2 * i, "host/group/place": np.array(places)}, "jit", mesh)
  doubled = parallel.compile_step(lambda batch: (2 * batch["n"],), "pmap", mesh, inputs=("batch",), outputs=("batch",))
  doubled, = doubled(parallel.put_batch({"n": np.arange(8)[parallel.batch_rows(mesh, 8)]}, "pmap", mesh))
  drawn = parallel.some_rows_to_host(doubled, np.array([6, 1, 3]), "pmap", mesh)
  found = {"gathered": {name: value.tolist() for name, value in gathered.items()}, "drawn": drawn.tolist()}
  jax.config.update("jax_enable_x64", True)
  state, outs = trained("jit", "data:4")
  if i == 0:
    found.update({
        "metrics": metrics, "predictions": predictions.tolist(),
        "losses": [[float(out["critic_loss"]), float(out["generator_loss"])] for out in outs],
        "parameters": [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(state.params)]})
  print(json.dumps(found))


if __name__ == "__main__":
  main()
