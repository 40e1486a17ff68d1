"""Our model against a fixture (`tests/fixtures`) of the same model elsewhere."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import interop, optim
from dljax.tasks.base import ALL, Task
from dljax.tasks.classification import Classification
from dljax.train.state import NOT_FAILED, TrainState
from dljax.train.step import make_train_step
from tests.fixtures import formula
from tests.smallest import native_convolutions


def assert_parity(
    build: Callable[..., nn.Module], source: str, stem: str, tolerance: float = 1e-4,
    read: Callable[[Any], jax.Array] = lambda logits: logits, *,
    blocks: tuple[type[nn.Module], ...] = (), light: bool = False, exact: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Asserts equal outputs in evaluation mode, and weights that come back bit for bit.

  In float32 as users run it, and in float64, where nothing but rounding errors of 1e-16 can differ. The network is one
  program; with `blocks`, each block of another shape is one, as dozens of equal ones would be compiled one by one.

  Args:
    build: makes the model, given a dtype.
    source: whose names the fixture has.
    stem: name of the fixture.
    tolerance: in float32, as a part of the difference between two inputs' logits.
    read: the model's outputs -> what the fixture has as logits.
    blocks: modules of which a deep network has many equal ones.
    light: whether to compare in float32 alone, and with XLA's own convolutions, which compile in half the time; for
      sizes between others of the same layers.
    exact: whether to compare in float64 alone; where a network of the same layers is compared in float32.

  Returns:
    The fixture and the loaded variables.
  """
  fixture, model = formula.load(stem), build(dtype=jnp.float32)
  variables = _load_and_dump(model, formula.tensors(fixture), source)
  image = formula.image(tuple(fixture["image_shape"]))

  def run(model, dtype):
    if blocks:
      with nn.intercept_methods(functools.partial(_compiled_once, blocks)):
        return read(model.apply(*jax.tree.map(lambda x: x.astype(dtype), (variables, image))))
    # The numbers are widened inside of it, which saves a copy of all weights.
    widen = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    return jax.jit(lambda *args: read(model.apply(*widen(args))))(variables, image)

  if not exact:
    with native_convolutions() if light else contextlib.nullcontext():
      assert_equals_peer(run(model, jnp.float32), fixture["logits"], tolerance)
  if not light:
    with jax.enable_x64(True):
      assert_equals_peer(run(build(dtype=jnp.float64), jnp.float64), fixture["logits"], 1e-9)
  return fixture, variables


def assert_same_layers(
    build: functools.partial, source: str, stem: str, others: Sequence[functools.partial],
    read: Callable[[Any], jax.Array] = lambda logits: logits,
) -> None:
  """Asserts that weights fit, and that equal outputs follow from those of networks of other sizes.

  The names and shapes of its weights say how many layers a network has, and how wide each of them is. All else that
  the model's class is given has to be what it is given for one of `others`, whose outputs are compared. Each weight is
  filled with one number, which takes a fraction of the time that a network's own take. With the variable
  DLJAX_ALL_SIZES, as before a release, the outputs are compared all the same.

  Args:
    build: the model's class with its settings, but for the dtype.
    source: whose names the fixture has.
    stem: name of the fixture.
    others: networks of other sizes.
    read: see `assert_parity`.
  """
  if os.environ.get("DLJAX_ALL_SIZES"):
    assert_parity(build, source, stem, 3e-4, read, light=True)
  assert _settings(build) in [_settings(other) for other in others]
  shapes = formula.load(stem)["shapes"]
  tensors = {name: np.broadcast_to(np.float32(i), shape) for i, (name, shape) in enumerate(shapes.items())}
  _load_and_dump(build(dtype=jnp.float32), tensors, source)


# Settings of models that the shapes of weights tell, and one that has no part in evaluation.
_TOLD_BY_SHAPES = {"stage_sizes", "hidden_width", "width", "depth", "patch_size", "embed_dim", "num_layers",
                   "num_heads", "dropout"}


def _settings(build: Any) -> Any:
  """What the shapes of weights do not tell of a network: its class, and what else that is given."""
  if not isinstance(build, functools.partial):
    return build
  given = {name: _settings(value) for name, value in build.keywords.items() if name not in _TOLD_BY_SHAPES}
  if "num_heads" in build.keywords:
    given["head_dim"] = build.keywords["embed_dim"] // build.keywords["num_heads"]
  return build.func, given


def _load_and_dump(model: nn.Module, tensors: dict[str, np.ndarray], source: str) -> dict[str, Any]:
  """Loads weights, and asserts that they come back bit for bit; returns the variables."""
  with native_convolutions():  # their shapes are all that is asked for
    variables = interop.load(model, tensors, source)
  back = interop.dump(model, variables, source)
  assert back.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert back[name].dtype == tensor.dtype
    assert np.array_equal(back[name].view(np.uint32), tensor.view(np.uint32)), name
  return variables


def _compiled_once(blocks: tuple[type[nn.Module], ...], call: Callable[..., Any], args, kwargs, context) -> Any:
  """Calls a module of `blocks` as a program that all of its kind, sizes and shapes share; an interceptor of Flax."""
  module = context.module
  if not isinstance(module, blocks) or context.method_name != "__call__" or module.name is None:
    return call(*args, **kwargs)
  settings = module.clone(parent=None, name=None)
  return _apply(settings, module.variables, args[0], (*args[1:], *kwargs.items()))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(module: nn.Module, variables: Any, x: jax.Array, rest: tuple) -> jax.Array:
  options = dict(value for value in rest if isinstance(value, tuple))
  return module.apply(variables, x, *(value for value in rest if not isinstance(value, tuple)), **options)


def _classify(model: nn.Module, image: np.ndarray, fixture: dict[str, Any]) -> tuple[Task, dict[str, np.ndarray]]:
  task = Classification(model, num_classes=fixture["logits"].shape[-1])
  return task, {"image": image, "label": np.array(formula.LABELS, np.int32), "mask": np.ones(len(image))}


def assert_sgd_step(
    build: Callable[..., nn.Module], source: str, stem: str,
    make_task: Callable[..., tuple[Task, dict[str, np.ndarray]]] = _classify,
) -> None:
  """Asserts that one step of SGD in training mode changes every tensor as it does in the fixture, in float64.

  Args:
    build: makes the model, without dropout, given a dtype.
    source: whose names the fixture has.
    stem: name of the fixture.
    make_task: (model, image, fixture) -> the task and the batch; by default, to classify.
  """
  fixture = formula.load(stem)
  image = formula.image(tuple(fixture["image_shape"])).astype(np.float64)
  with jax.enable_x64(True):
    model = build(dtype=jnp.float64)
    with native_convolutions():
      variables = jax.tree.map(np.float64, interop.load(model, formula.tensors(fixture), source))
    task, batch = make_task(model, image, fixture)
    batch = {"id": np.arange(len(batch["mask"]), dtype=np.int32), **batch}
    config = optim.default_config("sgd")
    config.update({"learning_rate": formula.LEARNING_RATE, "schedule": "constant", "warmup_fraction": 0.0})
    tx, schedule = optim.make_optimizer(config, total_steps=1)
    params, model_state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    state = TrainState(
        step=np.int32(0), params=params, model_state=model_state, opt_state={ALL: tx.init(params)},
        rng=np.zeros(2, np.uint32), ema={}, failed_step=np.int32(NOT_FAILED))
    step = jax.jit(make_train_step(task, {ALL: tx}, {ALL: schedule}), donate_argnums=0)
    new, _ = step(state, batch, np.float64(1))
    changes = jax.tree.map(lambda new, old: np.asarray(new) - old, {"params": new.params, **new.model_state}, variables)
    changes = interop.dump(model, changes, source)
  ours = formula.sample(changes[name] for name in fixture["shapes"])
  theirs = fixture["sgd"]
  size = theirs[:, -1]
  # A bias in front of BatchNorm has no gradient but rounding errors, which need not be equal.
  error = np.abs(ours - theirs).max(1) / np.maximum(size, 1e-9 * size.max())
  assert error.max() < 1e-4, f"{list(fixture['shapes'])[error.argmax()]} is off by {error.max():.1e}"


def assert_equals_peer(ours: jax.Array, theirs: np.ndarray, tolerance: float) -> None:
  """Asserts that two inputs' logits agree within `tolerance` of the difference between the two.

  Measured against the size of the logits, a network that ignores its input would pass.
  """
  difference = np.abs(theirs[0] - theirs[1]).max()
  assert difference > 0.05 * np.abs(theirs).max()
  error = np.abs(np.asarray(ours, np.float64) - theirs).max() / difference
  assert error < tolerance, f"off by {error:.1e}"
