"""A task's functions, compiled, with NumPy arrays as results.

Operation by operation they would make dozens of programs; here calls with the same task and shapes share one.
"""

import functools

import jax
import numpy as np


def _numpy(tree):
  return jax.tree.map(np.asarray, tree)


@functools.partial(jax.jit, static_argnames=("task", "train"))
def _loss(task, params, state, batch, denominators, train):
  return task.loss(
      params, state, batch, jax.random.key(0), denominators=denominators or task.denominators(batch), train=train,
      player="all")


@functools.partial(jax.jit, static_argnames="task")
def _loss_and_grad(task, params, batch, denominators):
  def share(params):
    out = task.loss(
        params, {}, batch, jax.random.key(0), denominators=denominators or task.denominators(batch), train=True,
        player="all")
    return out.loss, out.metrics

  (value, metrics), grad = jax.value_and_grad(share, has_aux=True)(params)
  return value, grad, metrics


def loss(task, batch, params=None, *, denominators=None, train=False, state=None):
  """The `LossOutput` of a batch, whose own denominators are used unless some are given."""
  return _numpy(_loss(task, params or {}, state or {}, batch, denominators, train))


def loss_and_grad(task, params, batch, denominators=None):
  """The loss in training, its gradient and the metrics."""
  return _numpy(_loss_and_grad(task, params, batch, denominators))


@functools.partial(jax.jit, static_argnames="task")
def _predict(task, variables, batch, rng):
  return task.predict(variables, batch, rng)


def predict(task, variables, batch, seed=0):
  return _numpy(_predict(task, variables, batch, jax.random.key(seed)))


@functools.partial(jax.jit, static_argnames="task")
def _denominators(task, batch):
  return task.denominators(batch)


def denominators(task, batch):
  return _numpy(_denominators(task, batch))


def variables(task, batch):
  """Normal numbers in the shapes of the task's fresh variables, over the square root of what a number adds up."""
  draw = np.random.default_rng(0)
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  scale = lambda shape: np.sqrt(np.prod(shape[:-1], initial=1))
  return jax.tree.map(lambda x: (draw.normal(size=x.shape) / scale(x.shape)).astype(x.dtype), shapes)
