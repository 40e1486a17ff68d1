"""U-Net: parameter counts, sizes, what is cropped, and what the skips carry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dljax.errors import UserError
from dljax.models import unet
from dljax.models.layers import BatchNorm
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

# With one channel and two classes. The first by hand, from figure 1: two convolutions at each width and place, four
# up-convolutions, and the last.
CONVS = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 1024),
         (1024, 1024), (1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)]
UPCONVS = [(1024, 512), (512, 256), (256, 128), (128, 64)]
COUNTS = {"unet_2015": 31_030_658, "unet_padded": 31_036_546, "unet_small": 482_466}


def _images(height, width=None, batch=2, dtype=np.float32):
  return np.random.RandomState(0).normal(size=(batch, height, width or height, 1)).astype(dtype)


def _tiny(**kwargs):
  return unet.UNet(num_classes=3, **{"width": 4, "num_pools": 2, **kwargs})


@pytest.mark.parametrize("name", unet.VARIANTS)
def test_parameter_counts(name):
  model = unet.VARIANTS[name](num_classes=2)
  shapes = jax.eval_shape(model.init, jax.random.key(0), _images(max(model.smallest, 16)))
  assert parameter_count(shapes["params"]) == COUNTS[name]


def test_the_count_is_that_of_figure_1():
  count = sum(9 * c * o + o for c, o in CONVS) + sum(4 * c * o + o for c, o in UPCONVS) + 64 * 2 + 2
  assert count == COUNTS["unet_2015"]
  norms, biases = sum(2 * o for _, o in CONVS), sum(o for _, o in CONVS)
  assert count + norms - biases == COUNTS["unet_padded"]


def _sizes(model, size):
  """Of each named layer's result: side and channels."""
  logits, state = jax.eval_shape(
      lambda x: model.init_with_output(
          jax.random.key(0), x, capture_intermediates=lambda module, _: isinstance(
              module, (unet.DoubleConv, unet.UpConv)), mutable=["params", "batch_stats", "intermediates"]),
      _images(size, batch=1))
  shapes = {name: value["__call__"][0].shape[2:] for name, value in state["intermediates"].items()}
  return logits.shape, shapes


def test_sizes_are_those_of_figure_1():
  logits, shapes = _sizes(unet.VARIANTS["unet_2015"](num_classes=2), 572)
  assert logits == (1, 388, 388, 2)
  assert shapes == {
      "down1": (568, 64), "down2": (280, 128), "down3": (136, 256), "down4": (64, 512), "bottom": (28, 1024),
      "upconv4": (56, 512), "up4": (52, 512), "upconv3": (104, 256), "up3": (100, 256), "upconv2": (200, 128),
      "up2": (196, 128), "upconv1": (392, 64), "up1": (388, 64)}


def test_padding_keeps_the_size():
  logits, shapes = _sizes(unet.VARIANTS["unet_small"](num_classes=11), 96)
  assert logits == (1, 96, 96, 11)
  assert shapes["down3"] == (24, 64) and shapes["bottom"] == (12, 128) and shapes["up1"] == (96, 16)


def _side_after(side, num_pools):
  """What unpadded convolutions and poolings leave, layer by layer; None where a pooling sees an odd size."""
  for _ in range(num_pools):
    side -= 4
    if side < 2 or side % 2:
      return None
    side //= 2
  side -= 4
  for _ in range(num_pools):
    side = 2 * side - 4
  return side if side > 0 else None


@pytest.mark.parametrize("num_pools", range(5))
def test_the_sides_that_fit_and_the_margin(num_pools):
  model = _tiny(num_pools=num_pools)
  left = {side: _side_after(side, num_pools) for side in range(1, 600)}
  assert [side for side in left if model.fits(side)] == [side for side in left if left[side]]
  assert {side - rest for side, rest in left.items() if rest} == {model.margin}
  assert (model.margin == 184) == (num_pools == 4)
  padded = _tiny(num_pools=num_pools, padded=True)
  assert [side for side in range(1, 70) if padded.fits(side)] == list(range(2**num_pools, 70, 2**num_pools))


@pytest.mark.parametrize("kwargs, shape, words", [
    ({"num_pools": 4}, (2, 96, 96, 1), ["unpadded", "188, 204, 220, ...", "resize or pad them to 188x188"]),
    ({"num_pools": 4}, (2, 204, 190, 1), ["(204, 190, 1)", "resize or pad them to 204x204"]),
    ({"padded": True, "num_pools": 3}, (2, 7, 90, 1), ["8, 16, 24", "3 poolings", "(7, 90, 1)", "to 8x96"]),
    ({"padded": True}, (2, 96, 96), ["4, 8, 12"]),
])
def test_other_sizes_are_refused_with_those_that_work(kwargs, shape, words):
  with pytest.raises(UserError) as error:
    jax.eval_shape(_tiny(**kwargs).init, jax.random.key(0), np.zeros(shape, np.float32))
  assert "\n" not in str(error.value)
  assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_up_convolution_is_flaxs_transposed_convolution(dtype):
  x = jnp.asarray(np.random.RandomState(0).normal(size=(2, 3, 4, 5)), dtype)
  up = unet.UpConv(6, dtype=dtype)
  params = random_variables(up, x)["params"]
  flax = nn.ConvTranspose(6, (2, 2), strides=(2, 2), padding="VALID", transpose_kernel=False, dtype=dtype)
  flipped = {**params, "kernel": params["kernel"][::-1, ::-1]}  # Flax's slides over the spread image
  y = jax.jit(up.apply)({"params": params}, x)
  assert y.dtype == dtype and y.shape == (2, 6, 8, 6)
  tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
  expected = jax.jit(flax.apply)({"params": flipped}, x)
  np.testing.assert_allclose(np.float32(y), np.float32(expected), tolerance, tolerance)


def _hand_on(params, name, channels):
  """Makes a convolution hand on one channel of its input, whose values are positive, as its first."""
  kernel = np.zeros_like(params[name]["kernel"])
  middle = tuple(side // 2 for side in kernel.shape[:2])
  kernel[middle][channels] = 1
  params[name] = {"kernel": kernel, "bias": np.zeros_like(params[name]["bias"])}


@pytest.mark.parametrize("padded", [False, True])
def test_the_skip_brings_every_pixel_to_its_own_place(padded):
  """With convolutions that hand the first channel on, the logits are the image, of which the middle is left."""
  model = _tiny(padded=padded)
  x = np.abs(_images(60, 52))
  params = random_variables(model, x)["params"]
  for block in ("down1", "up1"):
    for conv in ("conv1", "conv2"):
      _hand_on(params[block], conv, (0, 0))  # of up1's inputs the skip comes first
  _hand_on(params, "head", (0, 0))
  logits = jax.jit(model.apply)({"params": params}, x)
  cut = model.margin // 2
  assert cut == (0 if padded else 20)
  np.testing.assert_allclose(logits[..., 0], x[:, cut:60 - cut, cut:52 - cut, 0], rtol=1e-6)
  without = model.clone(skip=False)
  shapes = jax.eval_shape(without.init, jax.random.key(0), x)["params"]
  assert shapes["up1"]["conv1"]["kernel"].shape == (3, 3, 4, 4)
  assert shapes["down1"]["conv1"]["kernel"].shape == params["down1"]["conv1"]["kernel"].shape


def test_a_pixel_moves_with_the_image():
  """Shifting the image by the network's step shifts the logits; so a large image can be done in tiles."""
  model = _tiny()
  x = _images(64)
  variables = random_variables(model, x)
  apply = jax.jit(model.apply)
  whole = apply(variables, x)  # [24, 24]
  np.testing.assert_allclose(apply(variables, x[:, 4:64, 8:60]), whole[:, 4:, 8:20], rtol=1e-4, atol=1e-5)


def test_he_initialisation():
  model = unet.UNet(num_classes=2, width=32, num_pools=1, padded=True)
  params = jax.jit(model.init)(jax.random.key(0), _images(8))["params"]
  for path, fan_in, gain in ((("up1", "conv1"), 9 * 64, 2), (("bottom", "conv2"), 9 * 64, 2), (("upconv1",), 64, 1)):
    layer = params
    for name in path:
      layer = layer[name]
    np.testing.assert_allclose(np.std(layer["kernel"]), np.sqrt(gain / fan_in), rtol=0.05)
    assert not np.any(layer["bias"])


def test_dropout_is_at_the_end_of_the_contracting_path():
  model = _tiny(padded=True, dropout=0.5, width=8)
  x = _images(16)
  variables = random_variables(model, x)

  run = jax.jit(lambda v: [model.apply(
      v, x, train=train, rngs={"dropout": jax.random.key(1)}, mutable=["intermediates"],
      capture_intermediates=lambda module, _: isinstance(module, (nn.Dropout, unet.DoubleConv)))[1]["intermediates"]
                           for train in (False, True)])
  plain, dropped = run(variables)
  np.testing.assert_array_equal(dropped["down1"]["__call__"][0], plain["down1"]["__call__"][0])
  calls = [value["__call__"] for name, value in dropped.items() if name.startswith("Dropout")]
  assert [y.shape[-1] for call in calls for y in call] == [16, 32]  # of down2 and of the bottom
  for y in (y for call in calls for y in call):
    assert 0.4 < np.mean(np.asarray(y) == 0) < 0.95


@pytest.mark.parametrize("norm", [None, BatchNorm])
def test_remat_only_recomputes(norm):
  assert_remat_only_recomputes(functools.partial(_tiny, num_pools=1, padded=True, norm=norm, dropout=0.2), _images(8))


@pytest.mark.parametrize("norm", [None, BatchNorm])
def test_remat_changes_no_gradient(norm):
  with jax.enable_x64(True):
    x, results = _images(8, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(remat=remat, norm=norm, num_pools=1, padded=True, dtype=jnp.float64)
      variables = random_variables(model, x, dtype=np.float64)
      loss = lambda params: jnp.sum(
          model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]**2)
      grad = jax.jit(jax.grad(loss))
      assert ("remat" in str(jax.make_jaxpr(grad)(variables["params"]))) == remat
      results.append(grad(variables["params"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), *results)


def test_padding_rows_do_not_reach_the_others():
  x, model = _images(8, batch=4), _tiny(padded=True, norm=BatchNorm)
  variables = random_variables(model, x)
  run = jax.jit(lambda x, mask: model.apply(variables, x, mask, train=True, mutable=["batch_stats"])[0])
  mask = np.array([1, 0, 1, 0], np.float32)
  padded = run(x, mask)[mask > 0]
  np.testing.assert_allclose(padded, run(x[[0, 2, 0, 2]], np.ones(4, np.float32))[:2], rtol=1e-3, atol=1e-4)
  assert np.abs(padded - run(x, np.ones(4, np.float32))[mask > 0]).max() > 1e-2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters_and_statistics(dtype):
  model, x = _tiny(dtype=dtype, padded=True, norm=BatchNorm), _images(8)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  logits, state = jax.eval_shape(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]), variables)
  assert logits.dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, state)))
