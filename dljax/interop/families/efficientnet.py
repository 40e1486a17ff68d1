"""EfficientNet's names.

torchvision: torchvision/models/efficientnet.py; stages from 1, and the parts of a block in their
place.
"""

from dljax.interop.table import CONV, LINEAR, Layout, Rule, Table, batch_norm, image, layer
from dljax.models import efficientnet

# Squeeze-and-excitation is by 1x1 convolutions there: [out, in, 1, 1] <-> [in, out].
_POINTWISE = Layout(lambda x: x[:, :, 0, 0].transpose(), lambda x: x.transpose()[:, :, None, None])


def _torchvision(model: efficientnet.EfficientNet) -> Table:
  rules = _normalised("stem", "features.0")
  for i, stage in enumerate(model.stages, start=1):
    ours, theirs = rf"stage{i}_block(\d+)/", rf"features.{i}.\1.block"
    parts = ["expand"] * (stage.expansion > 1) + ["depthwise", "", "project"]
    for place, part in enumerate(parts):
      if part:
        rules += _normalised(ours + part, f"{theirs}.{place}")
      else:
        rules += layer(ours + "squeeze", f"{theirs}.{place}.fc1", _POINTWISE)
        rules += layer(ours + "excite", f"{theirs}.{place}.fc2", _POINTWISE)
  rules += _normalised("head", f"features.{len(model.stages) + 1}")
  rules += layer("head", "classifier.1", LINEAR)
  return Table(rules, inputs=image(32, "features.0.0.weight"),
               no_weight=r".*\.num_batches_tracked")


def _normalised(path: str, name: str) -> list[Rule]:
  """The rules of a convolution without bias and its BatchNorm."""
  return [(f"params/{path}_conv/kernel", f"{name}.0.weight", CONV),
          *batch_norm(f"{path}_norm", f"{name}.1")]


TABLES = {"torchvision": {efficientnet.EfficientNet: _torchvision}}
