"""torchvision's names."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from dljax.errors import UserError
from dljax.interop.table import CONV, LINEAR, SAME, Layout, Table, batch_norm, flattened, image, patches
from dljax.models import alexnet, efficientnet, resnet, retinanet, vgg, vit

# torchvision/models/resnet.py; of ours, the ImageNet forms. Blocks count from 0 in both.
RESNET = Table(
    rules=[
        ("params/stem_conv/kernel", "conv1.weight", CONV),
        *batch_norm("stem_norm", "bn1"),
        (r"params/stage(\d)_block(\d+)/conv(\d)/kernel", r"layer\1.\2.conv\3.weight", CONV),
        *batch_norm(r"stage(\d)_block(\d+)/norm(\d)", r"layer\1.\2.bn\3"),
        (r"params/stage(\d)_block(\d+)/shortcut_conv/kernel", r"layer\1.\2.downsample.0.weight", CONV),
        *batch_norm(r"stage(\d)_block(\d+)/shortcut_norm", r"layer\1.\2.downsample.1"),
        ("params/head/kernel", "fc.weight", LINEAR),
        ("params/head/bias", "fc.bias", SAME),
    ],
    inputs=image(64, "conv1.weight"),
    no_weight=r".*\.num_batches_tracked",
)


def _layer(path: str, name: str, layout: Layout) -> list[tuple[str, str, Layout]]:
  """The two rules of a convolution or a linear layer."""
  return [(f"params/{path}/kernel", f"{name}.weight", layout), (f"params/{path}/bias", f"{name}.bias", SAME)]


def _alexnet(model: alexnet.AlexNet) -> Table:
  """torchvision/models/alexnet.py: layers in their place in two `Sequential`s, among activations and pooling."""
  if model.response_norm or set(model.groups) != {1}:
    raise UserError("torchvision's AlexNet has neither groups nor response normalisation: use the variant alexnet")
  rules = []
  for layer, place in enumerate((0, 3, 6, 8, 10), start=1):
    rules += _layer(f"conv{layer}", f"features.{place}", CONV)
  rules += _layer("fc6", "classifier.1", flattened(model.width(5), model.pooled_size, model.pooled_size))
  rules += _layer("fc7", "classifier.4", LINEAR) + _layer("head", "classifier.6", LINEAR)
  return Table(rules, inputs=image(model.smallest_image, "features.0.weight"))


def _vgg(model: vgg.VGG) -> Table:
  """torchvision/models/vgg.py, likewise; the places depend on how many layers there are."""
  rules, place = [], 0
  for stage, size in enumerate(model.stage_sizes, start=1):
    for i in range(1, size + 1):
      rules += _layer(f"stage{stage}_conv{i}", f"features.{place}", CONV)
      if model.norm is not None:
        place += 1
        rules += batch_norm(f"stage{stage}_norm{i}", f"features.{place}")
      place += 2  # and an activation
    if stage <= model.num_pools:
      place += 1
  rules += _layer("fc1", "classifier.0", flattened(model.width(stage), model.pooled_size, model.pooled_size))
  rules += _layer("fc2", "classifier.3", LINEAR) + _layer("head", "classifier.6", LINEAR)
  return Table(rules, inputs=image(2**model.num_pools, "features.0.weight"), no_weight=r".*\.num_batches_tracked")


# Squeeze-and-excitation is by 1x1 convolutions there: [out, in, 1, 1] <-> [in, out].
_POINTWISE = Layout(lambda x: x[:, :, 0, 0].transpose(), lambda x: x.transpose()[:, :, None, None])


def _efficientnet(model: efficientnet.EfficientNet) -> Table:
  """torchvision/models/efficientnet.py: stages from 1, and the parts of a block in their place."""
  rules = _normalised("stem", "features.0")
  for i, stage in enumerate(model.stages, start=1):
    ours, theirs = rf"stage{i}_block(\d+)/", rf"features.{i}.\1.block"
    parts = ["expand"] * (stage.expansion > 1) + ["depthwise", "", "project"]
    for place, part in enumerate(parts):
      if part:
        rules += _normalised(ours + part, f"{theirs}.{place}")
      else:
        rules += _layer(ours + "squeeze", f"{theirs}.{place}.fc1", _POINTWISE)
        rules += _layer(ours + "excite", f"{theirs}.{place}.fc2", _POINTWISE)
  rules += _normalised("head", f"features.{len(model.stages) + 1}")
  rules += _layer("head", "classifier.1", LINEAR)
  return Table(rules, inputs=image(32, "features.0.0.weight"), no_weight=r".*\.num_batches_tracked")


def _normalised(path: str, name: str) -> list[tuple[str, str, Layout]]:
  """The rules of a convolution without bias and its BatchNorm."""
  return [(f"params/{path}_conv/kernel", f"{name}.0.weight", CONV), *batch_norm(f"{path}_norm", f"{name}.1")]


def _vit(model: vit.ViT) -> Table:
  """torchvision/models/vision_transformer.py."""
  if model.pool != "token" or model.positions != "learned":
    raise UserError("torchvision's ViT has a class token and learned positions: use pool='token', positions='learned'")
  block, theirs = r"block(\d+)", r"encoder.layers.encoder_layer_\1"
  rules = [
      ("params/class_token", "class_token", SAME),
      ("params/positions", "encoder.pos_embedding", SAME),
      *_layer("patches", "conv_proj", CONV),
      (f"params/{block}/qkv/kernel", f"{theirs}.self_attention.in_proj_weight", LINEAR),
      (f"params/{block}/qkv/bias", f"{theirs}.self_attention.in_proj_bias", SAME),
      *_layer(f"{block}/project", f"{theirs}.self_attention.out_proj", LINEAR),
      *_layer(f"{block}/mlp1", f"{theirs}.mlp.0", LINEAR),
      *_layer(f"{block}/mlp2", f"{theirs}.mlp.3", LINEAR),
      (rf"params/{block}/norm([12])/scale", rf"{theirs}.ln_\2.weight", SAME),
      (rf"params/{block}/norm([12])/bias", rf"{theirs}.ln_\2.bias", SAME),
      ("params/norm/scale", "encoder.ln.weight", SAME),
      ("params/norm/bias", "encoder.ln.bias", SAME),
      *_layer("head", "heads.head", LINEAR),
  ]
  return Table(rules, inputs=patches(model.patch_size, "conv_proj.weight", "encoder.pos_embedding"))


def _retinanet(model: retinanet.RetinaNet) -> Table:
  """torchvision/models/detection/retinanet.py, and its parts in backbone_utils.py and ops/feature_pyramid_network.py.

  A norm has the same four tensors there, be it frozen or not. Earlier versions numbered some layers otherwise.
  """
  rules = [
      (pattern.replace("/", "/backbone/", 1), f"backbone.body.{name}", layout)
      for pattern, name, layout in RESNET.rules]
  rules += _layer(r"fpn/lateral(\d)", r"backbone.fpn.inner_blocks.\1.0", CONV)
  rules += _layer(r"fpn/output(\d)", r"backbone.fpn.layer_blocks.\1.0", CONV)
  for i in range(model.extra_levels):
    rules += _layer(f"fpn/extra{i}", f"backbone.fpn.extra_blocks.p{6 + i}", CONV)
  older = [(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)", r"backbone.fpn.\1_blocks.\2.0.\3")]
  for ours, head, output in ("class", "classification", "cls_logits"), ("box", "regression", "bbox_reg"):
    rules += _layer(rf"{ours}_head/conv(\d)", rf"head.{head}_head.conv.\1.0", CONV)
    rules += _layer(f"{ours}_head/output", f"head.{head}_head.{output}", CONV)
    for i in range(model.head_depth):
      norm = f"head.{head}_head.conv.{i}.1"
      rules += [(f"params/{ours}_head/norm{i}/scale", f"{norm}.weight", SAME),
                (f"params/{ours}_head/norm{i}/bias", f"{norm}.bias", SAME)]
      older.append((rf"head\.{head}_head\.conv\.{2 * i}\.(weight|bias)", rf"head.{head}_head.conv.{i}.0.\1"))
  return Table(rules, image(64, "backbone.body.conv1.weight"), no_weight=RESNET.no_weight, older=older)


TABLES: Mapping[type[nn.Module], Table | Callable[[Any], Table]] = {
    resnet.ResNet: RESNET, alexnet.AlexNet: _alexnet, vgg.VGG: _vgg, efficientnet.EfficientNet: _efficientnet,
    vit.ViT: _vit, retinanet.RetinaNet: _retinanet}
