"""AlexNet's names.

torchvision: torchvision/models/alexnet.py; layers in their place in two `Sequential`s, among
activations and pooling.
"""

from dljax.errors import UserError
from dljax.interop.table import CONV, LINEAR, Table, flattened, image, layer
from dljax.models import alexnet


def _torchvision(model: alexnet.AlexNet) -> Table:
  if model.response_norm or set(model.groups) != {1}:
    raise UserError("torchvision's AlexNet has neither groups nor response normalisation: use the variant alexnet")
  rules = []
  for number, place in enumerate((0, 3, 6, 8, 10), start=1):
    rules += layer(f"conv{number}", f"features.{place}", CONV)
  rules += layer("fc6", "classifier.1",
                 flattened(model.width(5), model.pooled_size, model.pooled_size))
  rules += layer("fc7", "classifier.4", LINEAR) + layer("head", "classifier.6", LINEAR)
  return Table(rules, inputs=image(model.smallest_image, "features.0.weight"))


TABLES = {"torchvision": {alexnet.AlexNet: _torchvision}}
