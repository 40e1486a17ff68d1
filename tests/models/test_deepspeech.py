"""Deep Speech 2: parameter counts, lengths, and that padding changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.models import deepspeech
from dljax.train.state import parameter_count
from tests.fixtures import formula
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

# (labels, bands) -> parameters, by hand: kernels and norms, two GRUs in each layer, the head.
GRU = lambda inputs, hidden: 2 * 3 * (inputs * hidden + hidden * hidden + 2 * hidden)
COUNTS = {
    "deepspeech2": ((29, 80), 11 * 41 * 32 + 11 * 21 * 32 * 32 + 2 * 2 * 32
                    + GRU(20 * 32, 800) + 4 * GRU(1600, 800) + 1600 * 29 + 29),
    "deepspeech_small": ((38, 16), 11 * 11 * 16 + 7 * 7 * 16 * 16 + 2 * 2 * 16
                         + GRU(4 * 16, 128) + GRU(256, 128) + 256 * 38 + 38),
}


def _tiny(**kwargs):
  return deepspeech.DeepSpeech(**{
      "vocab_size": 5, "channels": 3, "kernels": ((5, 3), (3, 5)), "hidden_size": 6, "num_layers": 2, **kwargs})


def _features(batch=3, frames=22, bands=8):
  return formula.noise("features", (batch, frames, bands))


@pytest.mark.parametrize("name", deepspeech.VARIANTS)
def test_parameter_counts(name):
  (labels, bands), count = COUNTS[name]
  model = deepspeech.VARIANTS[name](vocab_size=labels)
  shapes = jax.eval_shape(model.init, jax.random.key(0), _features(bands=bands))
  assert parameter_count(shapes["params"]) == count


def test_a_last_odd_frame_is_heard():
  """Of 5 frames a stride of 2 makes 3, of which the last has but one to see; of 3 of these 5 it makes 2."""
  layer, x = deepspeech._Convolution(2, (3, 3), (2, 2), jnp.float32), np.ones((2, 5, 4, 1), np.float32)
  variables = layer.init(jax.random.key(0), x, np.array([5, 3]), False)
  variables["params"]["conv"]["kernel"] = jnp.abs(variables["params"]["conv"]["kernel"])
  y = layer.apply(variables, x, np.array([5, 3]), False)
  np.testing.assert_array_equal((y > 0).all(axis=(2, 3)), [[True, True, True], [True, True, False]])


@pytest.mark.parametrize("name", deepspeech.VARIANTS)
def test_as_many_frames_are_left_as_the_model_says(name):
  model = deepspeech.VARIANTS[name](vocab_size=4)
  for frames in (1, 2, 7, 16, 33):
    features, length = _features(2, frames, 16), np.array([frames, frames // 2], np.int32)
    out = jax.eval_shape(lambda x, n: model.init_with_output(jax.random.key(0), x, n)[0], features, length)
    left = model.output_length(length)
    assert out["logits"].shape == (2, left[0], 4) and out["length"].shape == (2,)
    assert left[1] <= left[0] and (frames > 1) == (left[1] > 0)


@pytest.mark.parametrize("train", [False, True])
def test_padding_changes_nothing(train):
  """Neither how much of it there is, nor what stands in it, nor rows that are nothing else; statistics included."""
  model, features = _tiny(), _features()
  length = np.array([22, 13, 8], np.int32)
  variables = random_variables(model, features)
  run = jax.jit(lambda x, n: model.apply(variables, x, n, train=train, mutable=["batch_stats"] if train else False))
  more = np.pad(features, ((0, 1), (0, 10), (0, 0)), constant_values=7)
  more = np.where(np.arange(32)[:, None] < np.append(length, 0)[:, None, None], more, np.nan)
  out, other = run(features, length), run(more, np.append(length, 0).astype(np.int32))
  if train:
    (out, stats), (other, other_stats) = out, other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stats, other_stats)
  np.testing.assert_array_equal(out["length"], [11, 7, 4])
  np.testing.assert_array_equal(other["length"], [11, 7, 4, 0])
  for i, count in enumerate([11, 7, 4]):
    np.testing.assert_allclose(out["logits"][i, :count], other["logits"][i, :count], rtol=1e-4, atol=1e-5)
  assert np.isfinite(other["logits"]).all()


def test_a_row_alone_gives_what_it_gives_beside_longer_ones():
  model, features = _tiny(), _features()
  variables = random_variables(model, features)
  apply = jax.jit(model.apply)
  together = apply(variables, features, np.array([22, 13, 8], np.int32))["logits"]
  alone = apply(variables, features[1:2, :13])["logits"]
  np.testing.assert_allclose(together[1, :7], alone[0], rtol=1e-4, atol=1e-5)


def test_every_frame_hears_the_whole_recording_and_no_padding():
  model, features = _tiny(), _features(2)
  length = np.array([22, 13], np.int32)
  variables = random_variables(model, features)
  grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(model.apply(variables, x, length)["logits"][:, 3]))))(features)
  assert np.abs(grad[0]).max(axis=1).min() > 0
  assert np.abs(grad[1, :13]).max(axis=1).min() > 0 and not np.asarray(grad[1, 13:]).any()


def test_remat_only_recomputes():
  assert_remat_only_recomputes(functools.partial(_tiny, dropout=0.2), _features(2, 10))


def test_remat_changes_no_gradient():
  features, grads = _features(2, 10), []
  for remat in (False, True):
    model = _tiny(remat=remat)
    variables = random_variables(model, features)
    loss = lambda params: jnp.sum(model.apply(
        {**variables, "params": params}, features, train=True, mutable=["batch_stats"])[0]["logits"]**2)
    assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))) == remat
    grads.append(jax.jit(jax.grad(loss))(variables["params"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters_and_statistics(dtype):
  model, features = _tiny(dtype=dtype, dropout=0.5), _features()
  variables = jax.eval_shape(model.init, jax.random.key(0), features)
  out, state = jax.eval_shape(lambda v: model.apply(
      v, features, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}), variables)
  assert out["logits"].dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, state)))
