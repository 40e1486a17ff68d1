"""AlexNet, in the form of 2012 too."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.errors import UserError
from dljax.models import alexnet
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

COUNTS = {"alexnet": 61_100_840, "alexnet_2012": 60_965_224}


def _images(size, batch=2, channels=3, dtype=np.float32):
  return np.random.RandomState(0).normal(size=(batch, size, size, channels)).astype(dtype)


def _tiny(name="alexnet", **kwargs):
  sizes = {"num_classes": 5, "width_factor": 0.04, "hidden_width": 12, "stem": (5, 1, 2), "pooled_size": 2}
  return alexnet.VARIANTS[name](**{**sizes, **kwargs})


def _shapes(model, size, keep):
  """Shapes of what the modules give that `keep` says, in order of their names."""
  _, state = jax.eval_shape(
      lambda x: model.init_with_output(
          {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, train=True,
          capture_intermediates=lambda m, _: keep(m), mutable=["params", "intermediates"]), _images(size, batch=1))
  return [v["__call__"][0].shape for _, v in sorted(state["intermediates"].items())]


@pytest.mark.parametrize("name", alexnet.VARIANTS)
def test_parameter_counts_at_1000_classes(name):
  model = alexnet.VARIANTS[name](num_classes=1000)
  params = jax.eval_shape(model.init, jax.random.key(0), _images(224, 1))["params"]
  assert parameter_count(params) == COUNTS[name]


@pytest.mark.parametrize("name", alexnet.VARIANTS)
def test_feature_maps_have_the_papers_sizes(name):
  convolutions = lambda size, **kwargs: [
      shape[1] for shape in _shapes(alexnet.VARIANTS[name](num_classes=10, **kwargs), size,
                                    lambda m: (m.name or "").startswith("conv"))]
  assert convolutions(224) == [55, 27, 13, 13, 13]  # figure 2
  assert convolutions(28, stem=(5, 1, 2)) == [28, 13, 6, 6, 6]


def test_dropout_is_where_torchvision_and_the_paper_have_it():
  dropped = {
      name: [shape[-1] for shape in _shapes(_tiny(name), 28, lambda m: isinstance(m, nn.Dropout))]
      for name in alexnet.VARIANTS}
  assert dropped == {"alexnet": [2 * 2 * 8, 12], "alexnet_2012": [12, 12]}


def _convolve(x, layer, sizes):
  """A convolution by its definition: each group of maps sees its own group of channels."""
  stride, padding, groups = sizes
  w, b = layer["kernel"], layer["bias"]
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  size = (x.shape[1] - len(w)) // stride + 1
  inside, out = w.shape[2], w.shape[3] // groups
  y = np.zeros((len(x), size, size, w.shape[3]))
  for row in range(size):
    for column in range(size):
      patch = x[:, row * stride:row * stride + len(w), column * stride:column * stride + len(w)]
      for g in range(groups):
        maps = slice(g * out, (g + 1) * out)
        y[:, row, column, maps] = np.tensordot(patch[..., g * inside:(g + 1) * inside], w[..., maps], 3)
  return np.maximum(y + b, 0)


def _normalise(a):
  """Section 3.3, as it stands there; k = 2, n = 5, alpha = 1e-4, beta = 0.75."""
  b, channels = np.zeros_like(a), a.shape[-1]
  for i in range(channels):
    total = sum(a[..., j]**2 for j in range(max(0, i - 5 // 2), min(channels - 1, i + 5 // 2) + 1))
    b[..., i] = a[..., i] / (2 + 1e-4 * total)**0.75
  return b


def _pool(x):
  """The maximum of 3x3 squares, two apart."""
  size = (x.shape[1] - 3) // 2 + 1
  return np.array([[x[:, 2 * i:2 * i + 3, 2 * j:2 * j + 3].max((1, 2)) for j in range(size)]
                   for i in range(size)]).transpose(2, 0, 1, 3)


def test_the_network_of_2012_is_the_papers_written_in_numpy():
  model = alexnet.VARIANTS["alexnet_2012"](num_classes=5, width_factor=0.04, hidden_width=12, pooled_size=1)
  x = 30 * _images(63)
  variables = random_variables(model, x)
  p = jax.tree.map(np.float64, variables["params"])
  y = _pool(_normalise(_convolve(x, p["conv1"], (4, 2, 1))))
  assert np.abs(y).max() > 20  # or the normalisation would do next to nothing
  y = _pool(_normalise(_convolve(y, p["conv2"], (1, 2, 2))))
  y = _convolve(y, p["conv3"], (1, 1, 1))
  y = _convolve(y, p["conv4"], (1, 1, 2))
  y = _pool(_convolve(y, p["conv5"], (1, 1, 2)))
  y = y.reshape(len(y), -1)
  for name in ("fc6", "fc7"):
    y = np.maximum(y @ p[name]["kernel"] + p[name]["bias"], 0)
  y = y @ p["head"]["kernel"] + p["head"]["bias"]
  logits = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(logits, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
  assert np.abs(y[0] - y[1]).max() > 0.1 * np.abs(y).max()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 9])
def test_response_normalisation_is_the_papers_formula(channels):
  a = 100 * _images(3, channels=channels)
  np.testing.assert_allclose(jax.jit(alexnet.local_response_norm)(a), _normalise(a.astype(np.float64)), rtol=1e-5)


def test_initialisation():
  x = _images(28)
  p = jax.jit(_tiny("alexnet", width_factor=0.5).init)(jax.random.key(0), x)["params"]
  for layer in p.values():
    np.testing.assert_array_equal(layer["bias"], 0)
  np.testing.assert_allclose(np.std(p["conv3"]["kernel"]), np.sqrt(2 / (9 * 96)), rtol=0.02)  # He et al. 2015
  p = jax.jit(_tiny("alexnet_2012", width_factor=0.5).init)(jax.random.key(0), x)["params"]
  for name, layer in p.items():  # section 5
    np.testing.assert_array_equal(layer["bias"], 1 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0)
  np.testing.assert_allclose(np.std(p["conv3"]["kernel"]), 0.01, rtol=0.02)


@pytest.mark.parametrize("stem, smallest", [((11, 4, 2), 63), ((5, 1, 2), 15)])
def test_images_that_are_too_small_are_refused_with_the_smallest_size(stem, smallest):
  model = _tiny(stem=stem)
  run = lambda height, width: jax.eval_shape(
      model.init_with_output, jax.random.key(0), np.zeros((1, height, width, 3)))[0]
  assert run(smallest, smallest + 20).shape == (1, 5)
  for size in ((smallest - 1, 99), (99, smallest - 1)):
    with pytest.raises(UserError, match=f"at least {smallest}x{smallest} pixels"):
      run(*size)


@pytest.mark.parametrize("name", alexnet.VARIANTS)
def test_remat_only_recomputes(name):
  assert_remat_only_recomputes(functools.partial(_tiny, name), _images(28))


@pytest.mark.parametrize("name", alexnet.VARIANTS)
def test_remat_changes_no_gradient(name):
  with jax.enable_x64(True):
    x, grads = _images(28, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(name, remat=remat, dtype=jnp.float64)
      params = random_variables(model, x, dtype=np.float64)["params"]
      loss = lambda p, model=model: jnp.sum(
          model.apply({"params": p}, x, train=True, rngs={"dropout": jax.random.key(1)})**2)
      grad = jax.jit(jax.grad(loss))
      assert ("remat" in str(jax.make_jaxpr(grad)(params))) == remat
      grads.append(grad(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *grads)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_units_are_dropped_in_training_only():
  model, x = _tiny(), _images(28)
  variables = random_variables(model, x)
  off = _tiny(dropout=0.0)
  run = jax.jit(lambda key: (model.apply(variables, x, train=True, rngs={"dropout": key}), model.apply(variables, x),
                             off.apply(variables, x, train=True)))
  (one, evaluated, off), (other, _, _) = run(jax.random.key(0)), run(jax.random.key(1))
  assert np.abs(one - other).max() > 0
  np.testing.assert_allclose(evaluated, off, rtol=1e-5)


@pytest.mark.parametrize("name", alexnet.VARIANTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters(name, dtype):
  model, x = _tiny(name, dtype=dtype), _images(28)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert logits.dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
