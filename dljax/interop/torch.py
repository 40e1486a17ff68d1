"""Plain PyTorch, for families that no library has: a `torch.nn.Module` with our layers' names.

Each layer is an attribute with the name that it has in our model, a `torch.nn.Linear` or a `torch.nn.Conv2d`:
`hidden1`, `hidden2`, ..., `head` for the MLP, `c1`, `c3`, `c5`, `f6`, `head` for LeNet-5, whose `c5` is a
`Linear(400, 120)` over `torch.flatten(x, 1)`; for U-Net `down1.conv1`, `down1.norm1`, ..., `bottom`, `upconv4` (a
`torch.nn.ConvTranspose2d`), `up4`, ..., `head`; for DLinear those of its authors' code, `Linear_Seasonal` and
`Linear_Trend`, whose third, `Linear_Decoder`, is not used there. The MLP's first layer takes the image flattened as it is
stored with us, in the order height, width, channel; with one channel that is PyTorch's order too.

`rnn.Stack` is a `torch.nn.RNN`, `LSTM` or `GRU`: `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0`,
`weight_ih_l0_reverse`, ... The language model is an `Embedding` `embed`, such a network `rnn` and a `Linear` `head`,
whose weight is left out where it is the embedding; the forecaster is two networks, `encoder` and `decoder`, and `head`.

Deep Speech is `conv1` and `conv2`, each of a `Conv2d` `conv` without bias over (time, bands) and a `BatchNorm2d`
`norm`, a `GRU` `gru` over channels by bands, and a `Linear` `head`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dljax.interop.table import CONV, LINEAR, SAME, Layout, Table, batch_norm, flattened, image
from dljax.models import baselines, deepspeech, lenet, mlp, rnn, unet


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

UPCONV = Layout(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))  # IOHW <-> HWIO


def _unet(model: unet.UNet) -> Table:
  return Table(
      rules=[
          (r"params/(upconv\d)/kernel", r"\1.weight", UPCONV),
          (r"params/(upconv\d|head)/bias", r"\1.bias", SAME),
          ("params/head/kernel", "head.weight", CONV),
          (r"params/(\w+)/(conv\d)/kernel", r"\1.\2.weight", CONV),
          (r"params/(\w+)/(conv\d)/bias", r"\1.\2.bias", SAME),
          *batch_norm(r"(\w+)/(norm\d)", r"\1.\2"),
      ],
      inputs=image(model.smallest, "down1.conv1.weight"),
      no_weight=r".*\.num_batches_tracked",
  )


def _cells(path: str, name: str) -> list[tuple[str, str, Layout]]:
  """The rules of a `Stack` at our `path` and the source's `name`, which end in their separators."""
  return [
      (rf"params/{path}(l\d+(?:_reverse)?)/weight_(ih|hh)", rf"{name}weight_\2_\1", LINEAR),
      (rf"params/{path}(l\d+(?:_reverse)?)/bias_(ih|hh)", rf"{name}bias_\2_\1", SAME),
  ]


def _width(tensors: Mapping[str, np.ndarray], name: str) -> int:
  """How many columns the matrix `name` has, 1 where it is missing."""
  shape = np.shape(tensors.get(name))
  return shape[1] if len(shape) == 2 else 1


STACK = Table(
    rules=_cells("", ""),
    inputs=lambda tensors: (jax.ShapeDtypeStruct((1, 1, _width(tensors, "weight_ih_l0")), np.float32),),
)


def _language_model(model: rnn.LanguageModel) -> Table:
  return Table(
      rules=[
          *_cells("rnn/", "rnn."),
          ("params/embed/embedding", "embed.weight", SAME),
          ("params/head/kernel", "head.weight", LINEAR),
          ("params/head[/_]bias", "head.bias", SAME),
      ],
      inputs=lambda tensors: (jax.ShapeDtypeStruct((1, 1), np.int32),),
      no_weight=r"head\.weight" if model.tied else r"(?!)",
  )


def _forecaster(model: rnn.Forecaster) -> Table:

  def inputs(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A window [1, 1, C] and covariates [1, 1 + T, K]."""
    channels = max(1, len(tensors.get("head.bias", ())) // (model.num_quantiles or 1))
    covariates = max(0, _width(tensors, "encoder.weight_ih_l0") - channels)
    return (jax.ShapeDtypeStruct((1, 1, channels), np.float32),
            jax.ShapeDtypeStruct((1, 1 + model.horizon, covariates), np.float32))

  return Table(
      rules=[
          *_cells("encoder/", "encoder."),
          *_cells("decoder/", "decoder."),
          ("params/head/kernel", "head.weight", LINEAR),
          ("params/head/bias", "head.bias", SAME),
      ],
      inputs=inputs,
  )


def _window(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
  """DLinear's input [1, W, 1], with W read off a map; any number of channels is as good."""
  shape = np.shape(tensors.get("Linear_Seasonal.weight"))
  return (jax.ShapeDtypeStruct((1, shape[1] if len(shape) == 2 else 1, 1), np.float32),)


DLINEAR = Table(
    rules=[(rf"params/{ours}/{kind}", f"{theirs}.{name}", layout)
           for ours, theirs in (("seasonal", "Linear_Seasonal"), ("trend", "Linear_Trend"))
           for kind, name, layout in (("kernel", "weight", LINEAR), ("bias", "bias", SAME))],
    inputs=_window,
    no_weight=r"Linear_Decoder\..*",
)


def _deepspeech(model: deepspeech.DeepSpeech) -> Table:
  channels, step = model.channels, math.prod(stride for _, stride in model.strides)
  # What the GRU reads of a frame: channels by bands in the source, bands by channels with us.
  first = Layout(
      lambda x: x.reshape(len(x), channels, -1).transpose(2, 1, 0).reshape(-1, len(x)),
      lambda x: x.reshape(-1, channels, x.shape[1]).transpose(2, 1, 0).reshape(x.shape[1], -1))
  return Table(
      rules=[
          (r"params/gru/l0((?:_reverse)?)/weight_ih", r"gru.weight_ih_l0\1", first),
          *_cells("gru/", "gru."),
          (r"params/(conv\d)/conv/kernel", r"\1.conv.weight", CONV),
          *batch_norm(r"(conv\d)/norm", r"\1.norm"),
          ("params/head/kernel", "head.weight", LINEAR),
          ("params/head/bias", "head.bias", SAME),
      ],
      inputs=lambda tensors: (jax.ShapeDtypeStruct(
          (1, 1, step * max(1, _width(tensors, "gru.weight_ih_l0") // channels)), np.float32),),
      no_weight=r".*\.num_batches_tracked",
  )


TABLES: Mapping[type[nn.Module], Table | Callable[[Any], Table]] = {
    mlp.MLP: MLP, lenet.LeNet5: LENET, unet.UNet: _unet, rnn.Stack: STACK, rnn.LanguageModel: _language_model,
    rnn.Forecaster: _forecaster, baselines.DLinear: DLINEAR, deepspeech.DeepSpeech: _deepspeech}
