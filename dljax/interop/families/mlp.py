"""The MLP's names.

torch: a `torch.nn.Module` with an attribute `hidden1`, `hidden2`, ..., `head` for each `Linear`.
The first takes the image flattened as it is stored with us, in the order height, width, channel;
with one channel that is PyTorch's order too.
"""

from collections.abc import Mapping

import jax
import numpy as np

from dljax.interop.table import LINEAR, SAME, Table, columns
from dljax.models import mlp


def _features(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
  """The input [1, D], with D read off the first layer."""
  first = "hidden1.weight" if "hidden1.weight" in tensors else "head.weight"
  return (jax.ShapeDtypeStruct((1, columns(tensors, first)), np.float32),)


TORCH = Table(
    rules=[
        (r"params/(\w+)/kernel", r"\1.weight", LINEAR),
        (r"params/(\w+)/bias", r"\1.bias", SAME),
    ],
    inputs=_features,
)

TABLES = {"torch": {mlp.MLP: TORCH}}
