"""Maps of what a network looked at: against finite differences, closed forms and the papers' axioms."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.errors import UserError
from dljax.models import lenet, resnet, vit
from dljax.tasks import explain
from dljax.tasks.classification import Classification
from tests import smallest
from tests.models.variables import random_variables


def _task(model, shape, classes=10):
  """A task, its variables, and a batch of random images."""
  task = Classification(model, classes)
  image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  return task, random_variables(model, image), {"image": image, "mask": np.ones(shape[0], np.float32)}


@pytest.fixture(scope="module")
def net():
  return _task(lenet.VARIANTS["lenet5"](num_classes=10), (3, 28, 28, 1))


def _logits(net, image, target=None):
  task, variables, batch = net
  logits, target = _target_logits(task, variables, batch, image, target)
  return np.asarray(logits), np.asarray(target)


_target_logits = jax.jit(explain.target_logits, static_argnums=0)
_saliency = jax.jit(explain.saliency, static_argnums=0)
_integrated_gradients = jax.jit(explain.integrated_gradients, static_argnums=0, static_argnames="steps")
_grad_cam = jax.jit(explain.grad_cam, static_argnums=(0, 3))
_rollout = jax.jit(explain.rollout)
_resize = jax.jit(jax.image.resize, static_argnums=(1, 2))
_attention_rollout = jax.jit(explain.attention_rollout, static_argnums=0)


def test_saliency_is_the_slope_of_the_logit(net):
  task, variables, batch = net
  found = np.asarray(_saliency(task, variables, batch))
  assert found.shape == (3, 28, 28) and (found >= 0).all()
  _, target = _logits(net, batch["image"])
  slope = lambda image: _logits(net, image, target)[0]
  for y, x in ((14, 14), (5, 20), (0, 0)):
    step = np.zeros((1, 28, 28, 1), np.float32)
    step[0, y, x, 0] = 0.05
    expected = (slope(batch["image"] + step) - slope(batch["image"] - step)) / 0.1
    np.testing.assert_allclose(found[:, y, x], np.abs(expected), rtol=2e-2, atol=1e-4)


def test_the_target_is_the_guess_unless_it_is_given(net):
  task, variables, batch = net
  maps = lambda *given: np.asarray(_saliency(task, *given))
  _, guess = _logits(net, batch["image"])
  np.testing.assert_allclose(maps(variables, batch, guess), maps(variables, batch), rtol=1e-5)
  assert np.abs(maps(variables, batch, (guess + 1) % 10) - maps(variables, batch)).max() > 1e-3


@pytest.mark.parametrize("baseline", [0.0, -0.4242])
def test_integrated_gradients_add_up_to_the_difference_of_the_logits(net, baseline):
  task, variables, batch = net
  found = np.asarray(_integrated_gradients(task, variables, batch, baseline=baseline))
  high, target = _logits(net, batch["image"])
  low, _ = _logits(net, np.full_like(batch["image"], baseline), target)
  np.testing.assert_allclose(found.sum(axis=(1, 2)), high - low, rtol=0.01)


class Linear(nn.Module):
  """One logit per class, linear in the pixels."""

  @nn.compact
  def __call__(self, image, mask=None, *, train=False):
    return nn.Dense(4, name="head")(image.reshape(len(image), -1))


def test_integrated_gradients_of_a_linear_model_are_weight_times_pixel():
  task, variables, batch = _task(Linear(), (2, 3, 5, 2), classes=4)
  target = np.array([1, 3])
  found = _integrated_gradients(task, variables, batch, target, steps=3)
  weight = variables["params"]["head"]["kernel"].T[target].reshape(2, 3, 5, 2)
  np.testing.assert_allclose(found, np.sum(weight * batch["image"], axis=-1), rtol=1e-4, atol=1e-6)
  with pytest.raises(UserError, match="multiple of 16"):
    explain.integrated_gradients(task, variables, batch, steps=40)


class Pooled(nn.Module):
  """A feature map, its mean and a linear layer: Grad-CAM is then the class activation map (section 3.1)."""

  @nn.compact
  def __call__(self, image, mask=None, *, train=False):
    x = nn.Conv(5, (3, 3), name="features")(image)
    return nn.Dense(4, use_bias=False, name="head")(x.mean(axis=(1, 2)))


def test_grad_cam_of_pooled_features_is_the_class_activation_map():
  task, variables, batch = _task(Pooled(), (2, 6, 6, 3), classes=4)
  target = np.array([2, 0])
  found = _grad_cam(task, variables, batch, "features", target)
  features = jax.jit(nn.Conv(5, (3, 3)).apply)({"params": variables["params"]["features"]}, batch["image"])
  weights = variables["params"]["head"]["kernel"].T[target] / 36
  expected = np.maximum(np.einsum("bhwk,bk->bhw", features, weights), 0)
  assert expected.max() > 0
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  with pytest.raises(UserError, match="Grad-CAM's layer: there is no 'feature'; did you mean features"):
    explain.grad_cam(task, variables, batch, "feature")


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
@smallest.native_convolutions()
def test_grad_cam_of_a_resnet(remat):
  model = resnet.ResNet(num_classes=10, block=resnet.BasicBlock, stage_sizes=(1, 1), width=4, small_stem=True,
                        remat=remat)
  task, variables, batch = _task(model, (2, 12, 12, 3))
  found = np.asarray(_grad_cam(task, variables, batch, "stage2_block0"))
  assert found.shape == (2, 12, 12) and (found >= 0).all() and found.max() > 0
  # The last block's result is pooled and goes through the head: the class activation map, resized.
  _, seen = jax.jit(lambda v, x: model.apply(
      v, x, train=False, capture_intermediates=lambda m, _: m.name == "stage2_block0"))(variables, batch["image"])
  features = np.asarray(seen["intermediates"]["stage2_block0"]["__call__"][0])
  _, target = _logits((task, variables, batch), batch["image"])
  weights = variables["params"]["head"]["kernel"].T[target] / features[0, ..., 0].size
  small = np.maximum(np.einsum("bhwk,bk->bhw", features, weights), 0)
  np.testing.assert_allclose(found, _resize(small, (2, 12, 12), "bilinear"), rtol=1e-3, atol=1e-6)


def _stochastic(draw, *shape):
  weights = draw.random(shape)
  return weights / weights.sum(axis=-1, keepdims=True)


def test_rollout_by_closed_form():
  draw = np.random.default_rng(0)
  one, two = _stochastic(draw, 2, 3, 5, 5), _stochastic(draw, 2, 3, 5, 5)
  found = np.asarray(_rollout([one, two]))
  half = lambda a: (a.mean(axis=1) + np.eye(5)) / 2
  np.testing.assert_allclose(found, half(two) @ half(one), rtol=1e-5)
  np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
  still = np.broadcast_to(np.eye(5), (2, 3, 5, 5))  # each token looks at itself alone
  np.testing.assert_allclose(_rollout([still] * 4), np.broadcast_to(np.eye(5), (2, 5, 5)), atol=1e-6)


class Block(nn.Module):
  number: int

  @nn.compact
  def __call__(self, tokens):
    draw = np.random.default_rng(self.number)
    self.sow("intermediates", "attention", jnp.asarray(_stochastic(draw, len(tokens), 2, tokens.shape[1], tokens.shape[1])))
    return tokens


class Sower(nn.Module):
  """Eleven blocks (so that names do not sort as numbers do) over the tokens."""

  tokens: int

  @nn.compact
  def __call__(self, image, mask=None, *, train=False):
    x = jnp.zeros((len(image), self.tokens, 1))
    for i in range(11):
      x = Block(i, name=f"block{i}")(x)
    return x[:, 0]


@pytest.mark.parametrize("tokens", [4, 5])
def test_attention_rollout_of_what_was_sown(tokens):
  task, _, batch = _task(Sower(tokens), (3, 2, 2, 1))  # 2x2 patches and perhaps a class token
  found = _attention_rollout(task, {}, batch)
  layers = [_stochastic(np.random.default_rng(i), 3, 2, tokens, tokens) for i in range(11)]
  flow = np.asarray(_rollout(layers))
  expected = flow[:, 0, 1:] if tokens == 5 else flow.mean(axis=1)
  np.testing.assert_allclose(found, expected.reshape(3, 2, 2), rtol=1e-5)


def test_attention_maps_come_in_the_layers_order():
  maps = explain.attention_maps(Sower(4), {}, np.zeros((3, 2, 2, 1)))
  assert list(maps) == [f"block{i}/attention" for i in range(11)]
  for i, weights in enumerate(maps.values()):
    np.testing.assert_allclose(weights, _stochastic(np.random.default_rng(i), 3, 2, 4, 4), rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 6, 7])
def test_tokens_that_are_no_square_patches_have_no_rollout(tokens):
  task, _, batch = _task(Sower(tokens), (3, 2, 6, 1))
  with pytest.raises(UserError, match=f"rollout of {tokens} tokens: images of 2x6 pixels"):
    jax.eval_shape(functools.partial(explain.attention_rollout, task), {}, batch)


@pytest.fixture(scope="module", params=vit.POOLS)
def transformer(request):
  """A ViT of three blocks with random variables (a new head is zero), for images of 3x5 patches."""
  model = vit.ViT(num_classes=4, patch_size=2, embed_dim=8, num_layers=3, num_heads=2, pool=request.param)
  image = np.random.default_rng(0).normal(size=(2, 6, 10, 3)).astype(np.float32)
  return Classification(model, 4), random_variables(model, image), {"image": image, "mask": np.ones(2, np.float32)}


def _map(flow, pool):
  """The rollout of 3x5 patches and perhaps a class token, as large as the image."""
  patches = flow[:, 0, 1:] if pool == "token" else flow.mean(axis=1)
  return _resize(patches.reshape(2, 3, 5), (2, 6, 10), "bilinear")


def test_rollout_of_a_vit_multiplies_its_blocks_attention(transformer):
  task, variables, batch = transformer
  found = _attention_rollout(task, variables, batch)
  _, sown = jax.jit(lambda v, x: task.model.apply(v, x, mutable=["intermediates"]))(variables, batch["image"])
  layers = [np.asarray(sown["intermediates"][f"block{i}"]["attention"][0]) for i in range(3)]
  flow = np.asarray(_rollout(layers))
  np.testing.assert_allclose(flow.sum(axis=-1), 1, rtol=1e-5)
  one, two, three = ((np.mean(a, axis=1) + np.eye(a.shape[-1])) / 2 for a in layers)
  np.testing.assert_allclose(flow, three @ two @ one, rtol=1e-4)
  assert np.abs(flow - one @ two @ three).max() > 1e-3  # the order of the blocks shows
  np.testing.assert_allclose(found, _map(three @ two @ one, task.model.pool), rtol=1e-4)


def test_rollout_of_a_vit_of_one_block_by_the_papers_equations(transformer):
  task, variables, batch = transformer
  params, task = variables["params"], dataclasses.replace(task, model=task.model.clone(num_layers=1))
  x = batch["image"].reshape(2, 3, 2, 5, 2, 3).swapaxes(2, 3).reshape(2, 15, 12)
  x = x @ params["patches"]["kernel"].reshape(12, 8) + params["patches"]["bias"]
  if task.model.pool == "token":
    x = np.concatenate([np.broadcast_to(params["class_token"], (2, 1, 8)), x], axis=1)
  x = x + params["positions"]
  block = params["block0"]
  x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * block["norm1"]["scale"] + block["norm1"]["bias"]
  qkv = np.einsum("bnw,whpd->bnhpd", x, block["qkv"]["kernel"]) + block["qkv"]["bias"]
  scores = np.exp(np.einsum("bqhd,bkhd->bhqk", qkv[..., 0, :], qkv[..., 1, :]) / np.sqrt(4))
  attention = scores / scores.sum(-1, keepdims=True)
  flow = (attention.mean(axis=1) + np.eye(x.shape[1])) / 2
  found = _attention_rollout(task, variables, batch)
  np.testing.assert_allclose(found, _map(flow, task.model.pool), rtol=1e-4)


@pytest.mark.parametrize("transformer", ["token"], indirect=True)
def test_integrated_gradients_of_a_vit_add_up_to_the_difference_of_the_logits(transformer):
  task, variables, batch = transformer
  found = np.asarray(_integrated_gradients(task, variables, batch))
  high, target = _logits(transformer, batch["image"])
  low, _ = _logits(transformer, np.zeros_like(batch["image"]), target)
  assert np.abs(high - low).min() > 1e-3
  np.testing.assert_allclose(found.sum(axis=(1, 2)), high - low, rtol=0.01)


def test_a_network_without_attention_has_no_rollout(net):
  with pytest.raises(UserError, match="LeNet5 keeps no attention weights"):
    jax.eval_shape(functools.partial(explain.attention_rollout, net[0]), *net[1:])
