"""Parity with plain PyTorch layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax import interop
from dljax.errors import UserError
from dljax.models import baselines, deepspeech, lenet, mlp, rnn, unet
from dljax.models.layers import BatchNorm
from dljax.tasks.segmentation import Segmentation
from dljax.tasks.transcription import Transcription
from tests.fixtures import formula
from tests.interop.parity import assert_parity, assert_sgd_step
from tests.models.variables import random_variables

SMALL_UNET = functools.partial(unet.UNet, num_classes=3, width=8, num_pools=2)
UNETS = {"unet_unpadded": SMALL_UNET, "unet_padded": functools.partial(SMALL_UNET, padded=True, norm=BatchNorm)}


def test_mlp_gives_torchs_logits():
  assert_parity(functools.partial(mlp.VARIANTS["mlp"], num_classes=10), "torch", "mlp")


def test_lenet5_gives_torchs_logits():
  assert_parity(functools.partial(lenet.VARIANTS["lenet5"], num_classes=10), "torch", "lenet5")


@pytest.mark.parametrize("name", UNETS)
def test_unet_gives_torchs_logits(name):
  assert_parity(UNETS[name], "torch", name)


@pytest.mark.slow
def test_the_unet_of_2015_gives_torchs_logits():
  assert_parity(functools.partial(unet.VARIANTS["unet_2015"], num_classes=2), "torch", "unet_2015", light=True)


def test_dlinear_gives_its_authors_forecasts():
  assert_parity(functools.partial(baselines.VARIANTS["dlinear"], horizon=12), "torch", "dlinear",
                read=lambda out: out["logits"])


def _segment(model, image, fixture):
  """The classes of the pixels that there are logits of; the border has any, which must not matter."""
  batch, height, width, classes = fixture["logits"].shape
  top, left = ((have - want) // 2 for have, want in zip(image.shape[1:3], (height, width)))
  truth = np.zeros(image.shape[:3], np.int32)
  truth[:, top:top + height, left:left + width] = formula.pixel_classes((batch, height, width), classes)
  return Segmentation(model, classes), {"image": image, "segmentation": truth, "mask": np.ones(batch)}


@pytest.mark.parametrize("name", UNETS)
def test_a_step_of_sgd_gives_torchs_parameters(name):
  assert_sgd_step(UNETS[name], "torch", name, _segment)


# As tests/fixtures/make_torch.py has them, which needs PyTorch.
ROWS, STEPS, FEATURES, WIDTH = 3, 7, 5, 6
FORMS = {"1": (1, False, None), "2": (2, False, (4, 7, 1)), "2_bidirectional": (2, True, (4, 7, 1))}


CELLS = ["tanh", "relu", "lstm", "gru"]


def _recurrent(cell, form):
  layers, bidirectional, _ = FORMS[form]
  fixture = formula.load(f"rnn_{cell}_{form}")
  stack = rnn.Stack(cell, WIDTH, layers, bidirectional)
  return stack, fixture, {name: formula.fill(name, fixture["shapes"]) for name in fixture["shapes"]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_recurrent_networks_weights_come_back_bit_for_bit(cell, form):
  stack, _, tensors = _recurrent(cell, form)
  variables = interop.load(stack, tensors, "torch")
  back = interop.dump(stack, variables, "torch")
  assert back.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_recurrent_network_gives_torchs_outputs_states_and_gradients(cell, form):
  length = FORMS[form][2]
  stack, fixture, tensors = _recurrent(cell, form)
  variables = interop.load(stack, tensors, "torch")
  parts, *shape = fixture["dcarry"].shape
  carry = [formula.noise(f"carry{i}", tuple(shape)) for i in range(parts)]
  inputs = variables, formula.noise("x", (ROWS, STEPS, FEATURES)), tuple(zip(*carry))

  def loss(variables, x, carry):
    y, end = stack.apply(variables, x, None if length is None else jnp.array(length), carry)
    return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves((y, end))), (y, end)

  def assert_close(inputs, tolerance):
    (d, dx, dcarry), (y, end) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    gradients = interop.dump(stack, d, "torch")
    pairs = [(y, fixture["outputs"]), (np.stack(list(zip(*end)), 0), fixture["end"]), (dx, fixture["dx"]),
             (np.stack(list(zip(*dcarry)), 0), fixture["dcarry"]),
             (formula.sample(gradients[name] for name in fixture["shapes"]), fixture["gradients"])]
    for ours, theirs in pairs:
      scale = max(1, np.abs(theirs).max())  # what a ReLU hands on has no bound
      np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=tolerance, atol=tolerance * scale)

  assert_close(inputs, 1e-5)
  with jax.enable_x64(True):
    assert_close(jax.tree.map(np.float64, inputs), 1e-12)


@pytest.mark.parametrize("model, inputs, count", [
    (rnn.LanguageModel(11, 4, "gru", 5, 2), (np.zeros((1, 3), np.int32),), 8 + 3),
    (rnn.LanguageModel(11, 4, "lstm", 5, 2, tied=True), (np.zeros((1, 3), np.int32),), 8 + 3),
    (rnn.Forecaster(3, "lstm", 4, num_quantiles=3), (np.zeros((1, 6, 2)), np.zeros((1, 9, 5))), 4 + 4 + 2),
    (rnn.Forecaster(3, "gru", 4, relative="season", season=5), (np.zeros((1, 6, 2)),), 4 + 4 + 2),
])
def test_models_of_recurrent_networks_come_back_bit_for_bit(model, inputs, count):
  variables = random_variables(model, *inputs)
  tensors = interop.dump(model, variables, "torch")
  assert len(tensors) == count
  assert {"embedding.weight", "rnn.weight_ih_l1", "decoder.bias"} <= set(tensors) or "head.bias" in tensors
  jax.tree.map(np.testing.assert_array_equal, interop.load(model, tensors, "torch"), variables)
  if getattr(model, "tied", False):  # PyTorch has the matrix under two names
    np.testing.assert_array_equal(tensors["decoder.weight"], tensors["embedding.weight"])


def test_layer_norm_has_no_counterpart_in_torch():
  stack = rnn.Stack("lstm", 4, layer_norm=True)
  with pytest.raises(UserError, match="no counterpart of params/l0/scale_"):
    interop.dump(stack, random_variables(stack, np.zeros((1, 2, 3))), "torch")


DEEPSPEECH = functools.partial(
    deepspeech.DeepSpeech, vocab_size=5, channels=3, kernels=((5, 3), (3, 5)), hidden_size=6, num_layers=2)


def test_deepspeech_gives_torchs_logits():
  assert_parity(DEEPSPEECH, "torch", "deepspeech", read=lambda out: out["logits"])


def _transcribe(model, features, fixture):
  """Two recordings and what is said in them."""
  del fixture
  tokens = np.zeros((2, 6), np.int32)
  for row, text in zip(tokens, formula.TEXTS):
    row[:len(text)] = text
  return Transcription(model, "abcd"), {
      "features": features, "length": np.full(2, features.shape[1], np.int32), "tokens": tokens,
      "token_length": np.array([len(text) for text in formula.TEXTS], np.int32), "mask": np.ones(2)}


def test_a_step_of_sgd_on_ctc_gives_torchs_parameters():
  assert_sgd_step(DEEPSPEECH, "torch", "deepspeech", _transcribe)
