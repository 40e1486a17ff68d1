"""VGG's names.

torchvision: torchvision/models/vgg.py; layers in their place in two `Sequential`s, which depends
on how many layers there are.
"""

from dljax.interop.table import CONV, LINEAR, Table, batch_norm, flattened, image, layer
from dljax.models import vgg


def _torchvision(model: vgg.VGG) -> Table:
  rules, place = [], 0
  for stage, size in enumerate(model.stage_sizes, start=1):
    for i in range(1, size + 1):
      rules += layer(f"stage{stage}_conv{i}", f"features.{place}", CONV)
      if model.norm is not None:
        place += 1
        rules += batch_norm(f"stage{stage}_norm{i}", f"features.{place}")
      place += 2  # and an activation
    if stage <= model.num_pools:
      place += 1
  rules += layer("fc1", "classifier.0",
                 flattened(model.width(stage), model.pooled_size, model.pooled_size))
  rules += layer("fc2", "classifier.3", LINEAR) + layer("head", "classifier.6", LINEAR)
  return Table(rules, inputs=image(2**model.num_pools, "features.0.weight"),
               no_weight=r".*\.num_batches_tracked")


TABLES = {"torchvision": {vgg.VGG: _torchvision}}
