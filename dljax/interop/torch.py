"""Plain PyTorch, for families that no library has: a `torch.nn.Module` with our layers' names.

Each layer is an attribute with the name that it has in our model, a `torch.nn.Linear` or a `torch.nn.Conv2d`:
`hidden1`, `hidden2`, ..., `head` for the MLP, `c1`, `c3`, `c5`, `f6`, `head` for LeNet-5, whose `c5` is a
`Linear(400, 120)` over `torch.flatten(x, 1)`. The MLP's first layer takes the image flattened as it is stored
with us, in the order height, width, channel; with one channel that is PyTorch's order too.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import linen as nn

from dljax.interop.table import CONV, LINEAR, SAME, Table, flattened, image
from dljax.models import lenet, mlp


def _features(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
  """The MLP's input [1, D], with D read off the first layer."""
  shape = np.shape(tensors.get("hidden1.weight", tensors.get("head.weight")))
  return (jax.ShapeDtypeStruct((1, shape[1] if len(shape) == 2 else 1), np.float32),)


MLP = Table(
    rules=[
        (r"params/(\w+)/kernel", r"\1.weight", LINEAR),
        (r"params/(\w+)/bias", r"\1.bias", SAME),
    ],
    inputs=_features,
)

LENET = Table(
    rules=[
        (r"params/(c1|c3)/kernel", r"\1.weight", CONV),
        ("params/c5/kernel", "c5.weight", flattened(16, 5, 5)),
        (r"params/(f6|head)/kernel", r"\1.weight", LINEAR),
        (r"params/(\w+)/bias", r"\1.bias", SAME),
    ],
    inputs=image(32, "c1.weight"),
)

TABLES: Mapping[type[nn.Module], Table] = {mlp.MLP: MLP, lenet.LeNet5: LENET}
