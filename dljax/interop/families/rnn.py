"""The names of recurrent networks.

torch: `rnn.Stack` is a `torch.nn.RNN`, `LSTM` or `GRU`: weight_ih_l0, weight_hh_l0, bias_ih_l0,
bias_hh_l0, weight_ih_l0_reverse, ... The language model is a module of an `Embedding` `embedding`,
such a network `rnn` and a `Linear` `decoder`: embedding.weight, rnn.weight_ih_l0, ...,
decoder.weight, decoder.bias; where the model is tied, decoder.weight is embedding.weight. The
forecaster is two networks, `encoder` and `decoder`, and a `Linear` `head`.
"""

from collections.abc import Mapping

import jax
import numpy as np

from dljax.interop.table import LINEAR, SAME, Rule, Table, columns
from dljax.models import rnn


def cells(path: str, name: str) -> list[Rule]:
  """The rules of a `Stack` at our `path` and the source's `name`, which end in their separators.
  """
  return [
      (rf"params/{path}(l\d+(?:_reverse)?)/weight_(ih|hh)", rf"{name}weight_\2_\1", LINEAR),
      (rf"params/{path}(l\d+(?:_reverse)?)/bias_(ih|hh)", rf"{name}bias_\2_\1", SAME),
  ]


STACK = Table(rules=cells("", ""),
              inputs=lambda tensors: (jax.ShapeDtypeStruct((1, 1,
                                                            columns(tensors, "weight_ih_l0")),
                                                           np.float32),),)


def _language_model(model: rnn.LanguageModel) -> Table:
  return Table(
      rules=[
          *cells("rnn/", "rnn."),
          ("params/embed/embedding", "embedding.weight", SAME),
          ("params/head/kernel", "decoder.weight", LINEAR),
          ("params/head[/_]bias", "decoder.bias", SAME),
      ],
      inputs=lambda tensors: (jax.ShapeDtypeStruct((1, 1), np.int32),),
      tied={"decoder.weight": "embedding.weight"} if model.tied else {},
  )


def _forecaster(model: rnn.Forecaster) -> Table:

  def inputs(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A window [1, 1, C] and covariates [1, 1 + T, K]."""
    channels = max(1, len(tensors.get("head.bias", ())) // (model.num_quantiles or 1))
    covariates = max(0, columns(tensors, "encoder.weight_ih_l0") - channels)
    # Differences from the last season need a window of at least one.
    steps = model.season if model.relative == "season" else 1
    return (jax.ShapeDtypeStruct((1, steps, channels), np.float32),
            jax.ShapeDtypeStruct((1, steps + model.horizon, covariates), np.float32))

  return Table(
      rules=[
          *cells("encoder/", "encoder."),
          *cells("decoder/", "decoder."),
          ("params/head/kernel", "head.weight", LINEAR),
          ("params/head/bias", "head.bias", SAME),
      ],
      inputs=inputs,
  )


TABLES = {"torch": {rnn.Stack: STACK, rnn.LanguageModel: _language_model,
                    rnn.Forecaster: _forecaster}}
