"""RetinaNet's names.

torchvision: torchvision/models/detection/retinanet.py, and its parts in backbone_utils.py and
ops/feature_pyramid_network.py. A norm has the same four tensors there, be it frozen or not.
Earlier versions numbered some layers otherwise.
"""

from dljax.interop.families import resnet
from dljax.interop.table import CONV, SAME, Table, image, layer
from dljax.models import retinanet


def _torchvision(model: retinanet.RetinaNet) -> Table:
  stages = resnet.TORCHVISION
  rules = [
      (pattern.replace("/", "/backbone/", 1), f"backbone.body.{name}", layout)
      for pattern, name, layout in stages.rules]
  rules += layer(r"fpn/lateral(\d)", r"backbone.fpn.inner_blocks.\1.0", CONV)
  rules += layer(r"fpn/output(\d)", r"backbone.fpn.layer_blocks.\1.0", CONV)
  for i in range(model.extra_levels):
    rules += layer(f"fpn/extra{i}", f"backbone.fpn.extra_blocks.p{6 + i}", CONV)
  older = [(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)",
            r"backbone.fpn.\1_blocks.\2.0.\3")]
  for ours, head, output in ("class", "classification", "cls_logits"), ("box", "regression",
                                                                        "bbox_reg"):
    rules += layer(rf"{ours}_head/conv(\d)", rf"head.{head}_head.conv.\1.0", CONV)
    rules += layer(f"{ours}_head/output", f"head.{head}_head.{output}", CONV)
    for i in range(model.head_depth):
      norm = f"head.{head}_head.conv.{i}.1"
      rules += [(f"params/{ours}_head/norm{i}/scale", f"{norm}.weight", SAME),
                (f"params/{ours}_head/norm{i}/bias", f"{norm}.bias", SAME)]
      older.append((rf"head\.{head}_head\.conv\.{2 * i}\.(weight|bias)",
                    rf"head.{head}_head.conv.{i}.0.\1"))
  return Table(rules, image(64, "backbone.body.conv1.weight"), no_weight=stages.no_weight,
               older=older)


TABLES = {"torchvision": {retinanet.RetinaNet: _torchvision}}
