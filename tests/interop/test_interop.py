"""What `interop` refuses, and what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dljax import interop
from dljax.errors import UserError
from dljax.interop import table
from dljax.models import lenet, mlp, resnet, vit
from tests.models.variables import random_variables

MODEL = lenet.LeNet5(num_classes=10)
VIT = vit.ViT(num_classes=3, patch_size=2, embed_dim=6, num_layers=2, num_heads=3)


def _tensors():
  return interop.dump(MODEL, random_variables(MODEL, np.zeros((1, 28, 28, 1))), "torch")


def test_a_missing_tensor_is_named():
  tensors = _tensors()
  del tensors["c3.weight"]
  with pytest.raises(UserError, match=r"torch LeNet5: c3\.weight is missing"):
    interop.load(MODEL, tensors, "torch")
  with pytest.raises(UserError, match=r"c1\.bias, c1\.weight, c3\.bias and 7 more are missing"):
    interop.load(MODEL, {}, "torch")


def test_a_tensor_left_over_is_named():
  with pytest.raises(UserError, match=r"c7\.weight is left over"):
    interop.load(MODEL, {**_tensors(), "c7.weight": np.zeros(3, np.float32)}, "torch")
  with pytest.raises(UserError, match=r"c1\.num_batches_tracked is left over"):  # no BatchNorm here
    interop.load(MODEL, {**_tensors(), "c1.num_batches_tracked": np.zeros((), np.int64)}, "torch")


@pytest.mark.parametrize("name, shape", [
    ("head.weight", (11, 84)), ("c3.weight", (16, 6, 5)), ("f6.bias", ()),
])
def test_a_tensor_of_another_shape_is_named_with_both(name, shape):
  tensors = _tensors()
  want = tensors[name].shape
  tensors[name] = np.zeros(shape, np.float32)
  with pytest.raises(UserError) as e:
    interop.load(MODEL, tensors, "torch")
  assert all(str(s) in str(e.value) for s in (name, shape, want)) and "\n" not in str(e.value)


def test_integers_are_refused_and_half_precision_is_widened():
  tensors = _tensors()
  with pytest.raises(UserError, match=r"f6\.bias is int8"):
    interop.load(MODEL, {**tensors, "f6.bias": np.zeros(84, np.int8)}, "torch")
  half = {name: np.asarray(jnp.asarray(tensor, jnp.bfloat16)) for name, tensor in tensors.items()}
  variables = interop.load(MODEL, half, "torch")
  for name, tensor in interop.dump(MODEL, variables, "torch").items():
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, half[name].astype(np.float32))


def test_unknown_sources_and_models_are_named():
  with pytest.raises(UserError, match="did you mean torchvision"):
    interop.load(MODEL, {}, "torchvison")
  with pytest.raises(UserError, match="torchvision has no counterpart of LeNet5, but of: .*ResNet"):
    interop.load(MODEL, {}, "torchvision")


@pytest.mark.parametrize("model, image, source", [
    (mlp.VARIANTS["perceptron"](num_classes=3), (1, 4, 4, 3), "torch"),
    (mlp.VARIANTS["mlp"](num_classes=3, widths=(5, 6, 7)), (1, 9), "torch"),
    (lenet.VARIANTS["lenet5"](num_classes=3), (1, 32, 32, 3), "torch"),
    (resnet.VARIANTS["resnet18"](num_classes=3, small_stem=True, width=8), (1, 28, 28, 1), "torchvision"),
    (VIT, (1, 8, 8, 1), "torchvision"),
    (VIT, (1, 8, 8, 1), "timm"),
], ids=["perceptron", "mlp", "lenet5", "resnet18", "vit-torchvision", "vit-timm"])
def test_load_is_the_inverse_of_dump_for_other_sizes_and_channels(model, image, source):
  variables = random_variables(model, np.zeros(image))
  tensors = interop.dump(model, variables, source)
  back = interop.load(model, tensors, source)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_every_tensor_has_one_name():
  model = resnet.VARIANTS["resnet50"](num_classes=10)
  variables = random_variables(model, np.zeros((1, 32, 32, 3)))
  assert len(interop.dump(model, variables, "torchvision")) == len(jax.tree.leaves(variables))


def test_flattened_follows_pytorchs_order_of_pixels():
  c, h, w, out = 3, 4, 5, 2
  rng = np.random.RandomState(0)
  x, weight = rng.normal(size=(c, h, w)), rng.normal(size=(out, c * h * w))
  layout = table.flattened(c, h, w)
  ours = x.transpose(1, 2, 0).reshape(-1) @ layout.to_ours(weight)
  np.testing.assert_allclose(ours, weight @ x.reshape(-1))
  np.testing.assert_array_equal(layout.to_source(layout.to_ours(weight)), weight)


def test_read_gives_the_tensors_of_a_safetensors_file(tmp_path):
  tensors = _tensors()
  safetensors.numpy.save_file(tensors, tmp_path / "lenet.safetensors")
  read = interop.read(tmp_path / "lenet.safetensors")
  assert read.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize("name", ["resnet50.pth", "resnet50.pt", "pytorch_model.bin"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, name):
  (tmp_path / name).write_bytes(b"")
  with pytest.raises(UserError, match="is a pickle.*safetensors.torch.save_file"):
    interop.read(tmp_path / name)


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(UserError, match="a.safetensors: there is no such file"):
    interop.read(tmp_path / "a.safetensors")
  safetensors.numpy.save_file(_tensors(), tmp_path / "a.safetensors")
  whole = (tmp_path / "a.safetensors").read_bytes()
  (tmp_path / "a.safetensors").write_bytes(whole[:-100])
  with pytest.raises(UserError, match="a.safetensors is no safetensors file"):
    interop.read(tmp_path / "a.safetensors")
