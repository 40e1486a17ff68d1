"""Deep Speech's names.

torch: `conv1` and `conv2`, each of a `Conv2d` `conv` without bias over (time, bands) and a
`BatchNorm2d` `norm`, a `GRU` `gru` over channels by bands, and a `Linear` `head`.
"""

import math

import jax
import numpy as np

from dljax.interop.families.rnn import cells
from dljax.interop.table import CONV, LINEAR, Layout, Table, batch_norm, columns, layer
from dljax.models import deepspeech


def _torch(model: deepspeech.DeepSpeech) -> Table:
  channels, step = model.channels, math.prod(stride for _, stride in model.strides)
  # What the GRU reads of a frame: channels by bands in the source, bands by channels with us.
  first = Layout(
      lambda x: x.reshape(len(x), channels, -1).transpose(2, 1, 0).reshape(-1, len(x)),
      lambda x: x.reshape(-1, channels, x.shape[1]).transpose(2, 1, 0).reshape(x.shape[1], -1))
  return Table(
      rules=[
          (r"params/gru/l0((?:_reverse)?)/weight_ih", r"gru.weight_ih_l0\1", first),
          *cells("gru/", "gru."),
          (r"params/(conv\d)/conv/kernel", r"\1.conv.weight", CONV),
          *batch_norm(r"(conv\d)/norm", r"\1.norm"),
          *layer("head", "head", LINEAR),
      ],
      inputs=lambda tensors: (jax.ShapeDtypeStruct(
          (1, 1, step * max(1, columns(tensors, "gru.weight_ih_l0") // channels)), np.float32),),
      no_weight=r".*\.num_batches_tracked",
  )


TABLES = {"torch": {deepspeech.DeepSpeech: _torch}}
