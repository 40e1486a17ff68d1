"""What `interop` refuses, and what it reads; rules that join, split and tie tensors."""

import json
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util

from dljax import interop
from dljax.errors import RunError, UserError
from dljax.interop import folder, table, variants
from dljax.interop.table import LINEAR, SAME, Layout, Table, concatenate, layer
from dljax.models import deepspeech, efficientnet, lenet, mlp, resnet, retinanet, rnn, unet, vgg, vit
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
  tensors = _tensors()
  tensors["f6.bias"] = tensors["f6.bias"].copy()
  tensors["f6.bias"][:2] = value
  half = {name: np.asarray(jnp.asarray(tensor, jnp.bfloat16)) for name, tensor in tensors.items()}
  for bad in tensors, half:
    with pytest.raises(UserError, match=r"^f6\.bias holds 2 of 84 values that are NaN or infinite; "):
      interop.load(MODEL, bad, "torch")
  folder.write_folder(tmp_path / "ours", {"params/x": np.full(3, value)}, {"model": "lenet5", "settings": {}})
  with pytest.raises(UserError, match="^params/x holds 3 of 3 values"):
    folder.read_folder(tmp_path / "ours")


@pytest.mark.parametrize("wrap", [
    lambda name: f"module.{name}",  # DataParallel
    lambda name: f"_orig_mod.{name}",  # torch.compile
    lambda name: f"module._orig_mod.{name}", lambda name: f"_orig_mod.module.{name}",
    lambda name: name.replace(".", "._orig_mod.", 1),  # a compiled layer
    lambda name: f"_fsdp_wrapped_module.{name}",
])
def test_what_torchs_wrappers_add_to_names_is_taken_away(wrap, tmp_path):
  tensors = _tensors()
  wrapped = {wrap(name): tensor for name, tensor in tensors.items()}
  assert interop.recognise(MODEL, wrapped) == "torch"
  loaded = interop.dump(MODEL, interop.load(MODEL, wrapped, "torch"), "torch")
  jax.tree.map(np.testing.assert_array_equal, loaded, tensors)
  safetensors.numpy.save_file(wrapped, tmp_path / "net.safetensors")
  assert interop.read(tmp_path / "net.safetensors").keys() == tensors.keys()


def test_only_a_prefix_of_all_names_is_taken_for_a_wrapper():
  names = {"module.a": 1, "b": 2}
  assert table.unwrapped(names) == names
  with pytest.raises(UserError, match="two tensors are named a without"):
    table.unwrapped({"a": 1, "_orig_mod.a": 2})


def _specs(model, *size):
  variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))
  return traverse_util.flatten_dict(variables, sep="/")


@pytest.mark.parametrize("source", ["timm", "torchvision", "dljax"])
@pytest.mark.parametrize("size", [(12, 12), (4, 4), (16, 4)])  # of the last, as many patches as before
def test_positions_are_interpolated_to_the_images_size(source, size):
  small, notes = random_variables(VIT, np.zeros((1, 8, 8, 3), np.float32)), []
  theirs = interop.dump(VIT, small, source)
  variables = interop.load(VIT, theirs, source, specs=_specs(VIT, *size), image=size, note=notes.append)
  found = variables["params"].pop("positions")
  before = small["params"].pop("positions")
  grid = (size[0] // 2, size[1] // 2)
  if (source, size) == ("dljax", (16, 4)):  # the run's own images may have been as wide
    np.testing.assert_array_equal(found, before)
    assert not notes
  else:
    np.testing.assert_array_equal(found, vit.interpolate_positions(before, (4, 4), grid))
    assert notes == [f"the positions of 4x4 patches are interpolated to {grid[0]}x{grid[1]}"]
  jax.tree.map(np.testing.assert_array_equal, variables["params"], dict(small["params"]))


def test_positions_of_wide_images_go_to_images_of_the_same_proportions():
  wide = random_variables(VIT, np.zeros((1, 8, 4, 3), np.float32))
  tensors = interop.dump(VIT, wide, "dljax")
  found = interop.load(VIT, tensors, "dljax", specs=_specs(VIT, 16, 8), image=(16, 8))
  np.testing.assert_array_equal(
      found["params"]["positions"], vit.interpolate_positions(wide["params"]["positions"], (4, 2), (8, 4)))
  with pytest.raises(UserError, match="params/positions has shape"):  # on a grid that nobody knows
    interop.load(VIT, tensors, "dljax", specs=_specs(VIT, 12, 12), image=(12, 12))


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


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_weights_are_recognised_by_their_names(source):
  tensors = interop.dump(VIT, random_variables(VIT, np.zeros((1, 4, 4, 3))), source)
  assert interop.recognise(VIT, tensors) == source
  assert interop.recognise(VIT, {"params/head/bias": np.zeros(3)}) == interop.OURS
  with pytest.raises(UserError, match="the first names are: other"):
    interop.recognise(VIT, {"other": np.zeros(3)})


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


@pytest.mark.parametrize("start", [b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"])
def test_pickles_are_known_by_their_first_bytes(tmp_path, start):
  (tmp_path / "net.safetensors").write_bytes(start + bytes(20))
  with pytest.raises(UserError, match="is a pickle"):
    interop.read(tmp_path / "net.safetensors")


@pytest.mark.parametrize("write", [
    lambda path: folder.write_folder(path, {}, {}), lambda path: folder.write_file(path, {})])
def test_nothing_is_left_of_what_could_not_be_written(tmp_path, monkeypatch, write):
  def fail(tensors, path, **_):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  with pytest.raises(RunError, match="No space left on device"):
    write(tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(UserError, match="a.safetensors: there is no such file"):
    interop.read(tmp_path / "a.safetensors")
  safetensors.numpy.save_file(_tensors(), tmp_path / "a.safetensors")
  whole = (tmp_path / "a.safetensors").read_bytes()
  (tmp_path / "a.safetensors").write_bytes(whole[:-100])
  with pytest.raises(UserError, match="a.safetensors is no safetensors file"):
    interop.read(tmp_path / "a.safetensors")


# --- Several tensors for one array, and the reverse ---------------------------------------------------------

GROUPS, PER_GROUP, HEAD_DIM, WIDTH, VOCAB = 2, 3, 4, 5, 7  # grouped queries: PER_GROUP share one key and value


class Toy(nn.Module):
  """Joint grouped queries, separate projections, and one embedding for what the source has under three names."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
    for i in range(2):
      self.param(f"joint{i}", nn.initializers.normal(), (WIDTH, GROUPS, PER_GROUP + 2, HEAD_DIM))
      for part in "qkv":
        nn.Dense(3, name=f"{part}{i}")(x)
    return self.param("bias", nn.initializers.normal(), (VOCAB,))


Toy.__module__ = "dljax.models.toy"  # by which its table is found


def _join(q, k, v):
  """[heads D', D], [groups D', D] twice -> [D, groups, heads / groups + 2, D']."""
  parts = [x.reshape(GROUPS, -1, HEAD_DIM, WIDTH).transpose(3, 0, 1, 2) for x in (q, k, v)]
  return concatenate(parts, axis=2)


def _part(x):
  return x.transpose(1, 2, 3, 0).reshape(-1, WIDTH)


JOIN = Layout(_join, lambda x: (_part(x[:, :, :-2]), _part(x[:, :, -2:-1]), _part(x[:, :, -1:])))
# As GPT-2's Conv1D has it, [in, out], and [out].
SPLIT = Layout(lambda x: (x[..., :3], x[..., 3:6], x[..., 6:]), lambda *parts: concatenate(parts, axis=-1))
TOY = Table(
    rules=[
        (r"params/joint(\d)", tuple(rf"h.\1.{part}.weight" for part in "qkv"), JOIN),
        *((tuple(rf"params/{part}{i}/{kind}" for part, i in zip("qkv", (r"(\d)", r"\1", r"\1"))),
           rf"h.\1.c_attn.{name}", SPLIT) for kind, name in (("kernel", "weight"), ("bias", "bias"))),
        ("params/embed/embedding", "shared.weight", SAME),
        ("params/bias", "predictions.bias", SAME),
    ],
    inputs=lambda tensors: (jax.ShapeDtypeStruct((1, 1), np.int32),),
    tied={"encoder.weight": "shared.weight", "lm_head.weight": "shared.weight",
          "predictions.decoder.bias": "predictions.bias"},
)


@pytest.fixture
def toy(monkeypatch):
  """The model, and the tensors of a source as that writes them."""
  names = types.SimpleNamespace(TABLES={"elsewhere": {Toy: TOY}})
  monkeypatch.setitem(sys.modules, "dljax.interop.families.toy", names)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tensors = {"shared.weight": draw(VOCAB, WIDTH), "predictions.bias": draw(VOCAB)}
  for i in range(2):
    for part, heads in ("q", GROUPS * PER_GROUP), ("k", GROUPS), ("v", GROUPS):
      tensors[f"h.{i}.{part}.weight"] = draw(heads * HEAD_DIM, WIDTH)
    tensors |= {f"h.{i}.c_attn.weight": draw(WIDTH, 9), f"h.{i}.c_attn.bias": draw(9)}
  return Toy(), tensors | {second: tensors[first] for second, first in TOY.tied.items()}


def test_joined_split_and_tied_tensors_come_back_bit_for_bit(toy):
  model, tensors = toy
  variables = interop.load(model, tensors, "elsewhere")
  back = interop.dump(model, variables, "elsewhere")
  assert back.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert back[name].dtype == tensor.dtype and back[name].flags.c_contiguous
    np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)
  params = variables["params"]
  # Query 2 of group 1 of layer 0, then its key and value: what the source has as heads 5, 1 and 1.
  for place, part, head in (2, "q", 5), (3, "k", 1), (4, "v", 1):
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    np.testing.assert_array_equal(params["joint0"][:, 1, place], tensors[f"h.0.{part}.weight"][rows].T)
  np.testing.assert_array_equal(params["k1"]["kernel"], tensors["h.1.c_attn.weight"][:, 3:6])
  np.testing.assert_array_equal(params["v1"]["bias"], tensors["h.1.c_attn.bias"][6:])


@pytest.mark.parametrize("left", [["shared.weight"], ["encoder.weight"], ["lm_head.weight", "encoder.weight"]])
def test_any_name_of_a_tied_tensor_will_do(toy, left):
  model, tensors = toy
  some = {name: tensor for name, tensor in tensors.items() if name in left or "shared.weight" not in (
      name, TOY.tied.get(name))}
  jax.tree.map(np.testing.assert_array_equal, interop.load(model, some, "elsewhere"),
               interop.load(model, tensors, "elsewhere"))
  assert interop.recognise(model, some) == "elsewhere"


def test_tied_names_with_other_values_are_refused(toy):
  model, tensors = toy
  for second, first in TOY.tied.items():
    with pytest.raises(UserError, match=f"{second} and {first} differ"):
      interop.load(model, {**tensors, second: tensors[second] + 1}, "elsewhere")


def test_one_part_of_several_is_named(toy):
  model, tensors = toy
  lacks = {name: tensor for name, tensor in tensors.items() if name != "h.1.k.weight"}
  with pytest.raises(UserError, match=r"Toy: h\.1\.k\.weight is missing"):
    interop.load(model, lacks, "elsewhere")
  with pytest.raises(UserError, match=r"h\.0\.v\.weight has shape \(9, 5\).*has \(8, 5\)"):
    interop.load(model, {**tensors, "h.0.v.weight": np.zeros((9, 5), np.float32)}, "elsewhere")
  with pytest.raises(UserError, match=r"h\.0\.c_attn\.bias is int8"):
    interop.load(model, {**tensors, "h.0.c_attn.bias": np.zeros(9, np.int8)}, "elsewhere")
  whole = interop.load(model, tensors, "elsewhere")
  del whole["params"]["v0"]["bias"]
  with pytest.raises(UserError, match="params/q0/bias and params/v0/bias in one"):
    interop.dump(model, whole, "elsewhere")


def test_rules_are_tried_in_order_and_a_followers_path_is_taken_once():
  split = Layout(lambda x: (x[:1], x[1:]), lambda *parts: concatenate(parts, axis=0))
  rules = [(("params/a/kernel", "params/b/kernel"), "ab", split), *layer("(.*)", r"\1", LINEAR)]
  found = Table(rules, inputs=lambda tensors: ()).entries(["params/c/kernel", "params/b/kernel", "params/a/kernel"])
  assert [(entry.paths, entry.names) for entry in found] == [
      (("params/c/kernel",), ("c.weight",)), (("params/a/kernel", "params/b/kernel"), ("ab",))]


# --- Folders ------------------------------------------------------------------------------------------------

TIMM_CONFIG = {
    "architecture": "vit_tiny_patch16_224", "num_classes": 3,
    "model_args": {"img_size": 8, "patch_size": 2, "embed_dim": 6, "depth": 2, "num_heads": 3}}


@pytest.fixture
def timm_folder(tmp_path):
  """A folder as timm's are on the Hub, and its tensors; the weights lie in two files."""
  tensors = interop.dump(VIT, random_variables(VIT, np.zeros((1, 8, 8, 1))), "timm")
  (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
  names, places = sorted(tensors), {}
  for i, part in enumerate((names[:9], names[9:]), 1):
    file = f"model-0000{i}-of-00002.safetensors"
    safetensors.numpy.save_file({name: tensors[name] for name in part}, tmp_path / file)
    places |= dict.fromkeys(part, file)
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return tmp_path, tensors


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_gives_the_model_of_its_sizes_and_its_weights(timm_folder, whole):
  path, tensors = timm_folder
  if whole:
    for file in path.glob("model*"):
      file.unlink()
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
  model, variables = interop.from_folder(path, "timm")
  assert model == VIT
  back = interop.dump(model, variables, "timm")
  assert back.keys() == tensors.keys() == interop.read(path).keys()
  jax.tree.map(np.testing.assert_array_equal, back, tensors)


def test_an_index_is_read_by_its_name_and_a_shard_alone_is_refused(timm_folder):
  path, tensors = timm_folder
  index, shard = path / "model.safetensors.index.json", path / "model-00001-of-00002.safetensors"
  assert interop.read(index).keys() == tensors.keys()
  with pytest.raises(UserError, match=f"{shard} is one of 2 shards of the weights; name {index}$"):
    interop.read(shard)
  other = path / "other.safetensors.index.json"
  index.rename(other)
  assert interop.read(other).keys() == tensors.keys()
  with pytest.raises(UserError, match=f"name {index}, which belongs beside it"):
    interop.read(shard)
  with pytest.raises(UserError, match="name the .safetensors file, or the .*index.json of its shards"):
    interop.read(path)
  only = shard.rename(path / "model-00001-of-00001.safetensors")
  assert len(interop.read(only)) == 9
  for text in ("", "[", "[" * 10_000, "[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', "\udcff"):
    other.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"{other} is no index of weights") as error:
      interop.read(other)
    assert "\n" not in str(error.value)


def test_timms_names_of_sizes_are_its_networks():
  sizes = {"tiny": "vit_ti16", "small": "vit_s16", "base": "vit_b16", "large": "vit_l16"}
  from dljax.interop.families.vit import CONFIGS
  for theirs, ours in sizes.items():
    config = {"architecture": f"vit_{theirs}_patch16_224", "num_classes": 5}
    assert CONFIGS["timm"](config) == vit.VARIANTS[ours](num_classes=5)
  assert CONFIGS["timm"]({"architecture": "vit_base_patch32_224"}) == vit.VARIANTS["vit_b32"](num_classes=1000)


def test_our_folder_gives_its_model_too(tmp_path):
  variables = random_variables(MODEL, np.zeros((1, 28, 28, 1)))
  folder.write_folder(tmp_path / "ours", interop.dump(MODEL, variables, interop.OURS), variants.describe(MODEL))
  model, found = interop.from_folder(tmp_path / "ours", interop.OURS)
  assert model == MODEL
  jax.tree.map(np.testing.assert_array_equal, found, variables)


@pytest.mark.parametrize("change, message", [
    ({"architecture": "resnet50"}, "no family here has this model of timm: {'architecture': 'resnet50'}"),
    ({"model_args": {"reg_tokens": 4}}, "does not know model_args 'reg_tokens'"),
    ({"num_classes": "3"}, "num_classes is '3'; it must be a whole number above 0"),
    ({"model_args": {"depth": 0}}, "num_layers is 0"),
    ({"num_classes": 4}, "head.bias has shape (3,), but timm ViT of these sizes has (4,)"),
    ({"architecture": 5}, "config.json describes a model of timm in another form"),
    ({"model_args": [1]}, "config.json describes a model of timm in another form"),
])
def test_what_a_config_json_says_wrongly_is_named(timm_folder, change, message):
  path, _ = timm_folder
  (path / "config.json").write_text(json.dumps({**TIMM_CONFIG, **change}))
  with pytest.raises(UserError, match=re.escape(message)):
    interop.from_folder(path, "timm")


def test_bad_folders_are_named(timm_folder):
  path, tensors = timm_folder

  def refused(message, source="timm"):
    with pytest.raises(UserError, match=message) as error:
      interop.from_folder(path, source)
    assert "\n" not in str(error.value)

  refused("torchvision writes no config.json that is known here", "torchvision")
  refused("did you mean timm", "tim")
  index = path / "model.safetensors.index.json"
  written = json.loads(index.read_text())
  for places, message in (
      ({**written["weight_map"], "extra": "model-00001-of-00002.safetensors"}, "00001-of-00002.safetensors holds extra"),
      ({name: place for name, place in written["weight_map"].items() if name != "cls_token"},
       "holds cls_token, but .* does not say so"),
      ({"cls_token": "../model.safetensors"}, "names no .safetensors files of this folder"),
      ({"cls_token": "pytorch_model.bin"}, "names no .safetensors files of this folder"),
      ({"cls_token": "absent.safetensors"}, "absent.safetensors: there is no such file"),
      ([], "is no index of weights"),
      ({}, "is no index of weights"),
  ):
    index.write_text(json.dumps({"weight_map": places}))
    refused(message)
  index.unlink()
  refused("holds neither model.safetensors nor model.safetensors.index.json")
  (path / "config.json").write_text("[1]")
  refused("config.json is no JSON object")
  (path / "config.json").unlink()
  refused("config.json: there is no such file")


# --- Which model it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, name, settings", [
    (mlp.VARIANTS["mlp"](num_classes=3, widths=(4, 5), activation=jnp.tanh), "mlp",
     {"num_classes": 3, "widths": [4, 5], "activation": {"callable": "flax.linen.tanh"}}),
    (mlp.VARIANTS["perceptron"](num_classes=3), "perceptron", {"num_classes": 3}),
    (rnn.Stack("gru", 3), "rnn.Stack", {"cell": "gru", "hidden_size": 3}),
    (rnn.VARIANTS["rnn_awd_lstm"](vocab_size=9), "rnn_awd_lstm", {"vocab_size": 9}),
    (rnn.VARIANTS["rnn_forecaster"](horizon=4, num_quantiles=3), "rnn_forecaster",
     {"horizon": 4, "num_quantiles": 3}),
    (deepspeech.VARIANTS["deepspeech_small"](vocab_size=3, kernels=((3, 3), (3, 5))), "deepspeech_small",
     {"vocab_size": 3, "kernels": [[3, 3], [3, 5]]}),
    (unet.UNet(num_classes=2, norm=nn.GroupNorm), "unet_2015",
     {"num_classes": 2, "norm": {"callable": "flax.linen.GroupNorm"}}),
    (vgg.VARIANTS["vgg13_bn"](num_classes=2, pooled_size=1), "vgg13_bn", {"num_classes": 2, "pooled_size": 1}),
    (retinanet.VARIANTS["retinanet_small"](num_classes=4).backbone, "resnet20", {
        "num_classes": None, "stage_sizes": [1, 1, 1, 1, 1], "pad_shortcut": False,
        "norm": {"partial": "dljax.models.layers.BatchNorm", "settings": {"epsilon": 1e-05}}}),
    (efficientnet.EfficientNet(num_classes=3, stages=(efficientnet.Stage(1, 3, 1, 8, 1),)), "efficientnet_b0", {
        "num_classes": 3, "stages": [{"tuple": "dljax.models.efficientnet.Stage", "settings": {
            "expansion": 1, "kernel": 3, "stride": 1, "width": 8, "depth": 1}}]}),
])
def test_a_description_makes_the_very_module_again(model, name, settings):
  described = variants.describe(model)
  assert described == {"model": name, "settings": settings}
  again = variants.build(**json.loads(json.dumps(described)))
  assert type(again) is type(model) and variants.describe(again) == described
  if name != "resnet20":  # whose partial function equals itself alone
    assert again == model


class Nested(nn.Module):
  """A module with a module as an attribute."""

  inner: nn.Module
  depth: int = 1
  dtype: type = jnp.float32


def test_a_module_in_a_module_is_described_and_dtype_and_remat_are_not(monkeypatch):
  toy = types.SimpleNamespace(Nested=Nested)
  monkeypatch.setattr(Nested, "__module__", "dljax.models.mlp")
  monkeypatch.setattr(mlp, "Nested", toy.Nested, raising=False)
  model = Nested(mlp.MLP(3, (4,), dtype=jnp.bfloat16, remat=True), dtype=jnp.bfloat16)
  described = variants.describe(model)
  assert described == {"model": "mlp.Nested", "settings": {
      "inner": {"model": "mlp", "settings": {"num_classes": 3, "widths": [4]}}}}
  assert variants.build(**described) == Nested(mlp.MLP(3, (4,)))


def test_what_cannot_be_said_is_not_said():
  assert variants.describe(None) is None
  assert variants.describe(nn.Dense(3)) is None  # no model of ours
  assert variants.describe(mlp.MLP(3, activation=lambda x: x)) is None
  assert variants.describe(mlp.MLP(3, activation=json.dumps)) is None


@pytest.mark.parametrize("callable_", ["os.system", "json.dumps", "dljax.interop.files.read", "flax.linen.absent", ""])
def test_a_description_runs_nothing_but_modules_and_activations(callable_):
  with pytest.raises(UserError, match=f"there is no {callable_!r}"):
    variants.build("mlp", {"activation": {"callable": callable_}})


def test_only_the_models_own_family_is_imported():
  """Its name is found by the beginning of a variant's, its tensors' names by the module of its class."""
  code = """
import sys
from dljax import interop
from dljax.interop import variants
model = variants.build("retinanet_small", {"num_classes": 3})
variants.describe(model)
interop.find_table(model, "torchvision")
print(*sorted(name for name in sys.modules if name.startswith(("dljax.models.", "dljax.interop.families."))))
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
  assert done.stdout.split() == [
      "dljax.interop.families.resnet", "dljax.interop.families.retinanet", "dljax.models.layers",
      "dljax.models.resnet", "dljax.models.retinanet"]
