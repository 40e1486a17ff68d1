"""Programs of models, compared without being compiled."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

_CHECKPOINT = ("checkpoint", "remat", "remat2")  # JAX has renamed it


def assert_remat_only_recomputes(build: Callable[..., nn.Module], *inputs: Any) -> None:
  """Asserts that remat leaves a model's training program as it is, but for the marks of what to recompute.

  The same operations on the same numbers, those of dropout and of running statistics too, have the same gradients.

  Args:
    build: makes the model, given `remat`.
    *inputs: what the model is called with.
  """
  programs = []
  for remat in (False, True):
    model = build(remat=remat)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)

    def train(variables, model=model):
      return model.apply(variables, *inputs, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)})

    closed = jax.make_jaxpr(train)(variables)
    assert any(eqn.primitive.name in _CHECKPOINT for eqn in closed.eqns) == remat
    jaxpr, lines = closed.jaxpr, []
    numbers = {id(var): i for i, var in enumerate([*jaxpr.constvars, *jaxpr.invars])}
    results = _write(jaxpr, numbers, lines)
    programs.append([*map(str, closed.consts), *lines, str(results)])
  assert len(programs[0]) > 5 and programs[0] == programs[1]


def _write(jaxpr: Any, numbers: dict[int, Any], lines: list[str]) -> list[Any]:
  """Writes a program's operations, and those within a checkpoint in its place; returns what its results are called."""
  name = lambda atom: atom.val if hasattr(atom, "val") else numbers[id(atom)]
  for eqn in jaxpr.eqns:
    inputs = [name(atom) for atom in eqn.invars]
    if eqn.primitive.name in _CHECKPOINT:
      inner = eqn.params["jaxpr"]
      numbers.update(zip(map(id, inner.invars), inputs, strict=True))
      results = _write(inner, numbers, lines)
      numbers.update(zip(map(id, eqn.outvars), results, strict=True))
      continue
    # A function is told by its name; its address differs.
    params = {key: getattr(value, "__name__", str(value)) for key, value in eqn.params.items()}
    numbers.update((id(var), f"{len(lines)}.{i}") for i, var in enumerate(eqn.outvars))
    lines.append(f"{[numbers[id(v)] for v in eqn.outvars]} {[v.aval for v in eqn.outvars]} = "
                 f"{eqn.primitive.name} {inputs} {params}")
  return [name(atom) for atom in jaxpr.outvars]
