"""Deep Speech 2: from sound to characters, by convolutions and a bidirectional recurrent stack.

Dario Amodei et al. "Deep Speech 2: End-to-End Speech Recognition in English and Mandarin", 2016.
https://arxiv.org/abs/1512.02595

The network has two convolutions over time and frequency, each with batch normalisation and a ReLU
clipped at 20, then GRUs in both directions, then one linear layer that gives each frame a
distribution over the characters and the blank (section 3). It is trained by CTC
(`tasks/transcription.py`). What differs from the paper:
- The inputs are log-mel bands; the paper has 161 linear frequencies.
- Both directions of a layer are concatenated, as in torch.nn.GRU; the paper adds them.
- Batch normalisation is in the convolutions only; the paper has it between recurrent layers too
  (section 3.2).
- Frames beyond a recording's end are zeros in every layer and do not count in the statistics, so
  that a result does not depend on the length that the recording is padded to.
- The paper's best network has three convolutions and 100 million parameters. `deepspeech2` has the
  two convolutions of the paper's section 3.5 and five layers of 800 units, as the reimplementation
  deepspeech.pytorch.

Dimensions: `B` batch, `T` frames, `F` bands, `C` channels, `V` vocabulary with the blank.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax.models import rnn
from dljax.models.layers import BatchNorm, Conv

CUT = 20.0  # the ReLU's largest value


class DeepSpeech(nn.Module):
  """The network of figure 1.

  Attributes:
    vocab_size: V.
    channels: C of both convolutions.
    kernels: the kernel size (frames, bands) of each convolution; odd.
    strides: the strides (frames, bands) of each convolution.
    hidden_size: the width of a GRU's state, in each direction.
    num_layers: the number of recurrent layers.
    dropout: the probability of dropping a value, in training, before each recurrent layer but the
      first and before the linear layer.
    dtype: the dtype of the computation and the logits; parameters and statistics are float32.
    remat: whether to recompute the convolutions in the backward pass instead of storing their
      activations.
  """

  vocab_size: int
  channels: int = 32
  kernels: tuple[tuple[int, int], ...] = ((11, 41), (11, 21))
  strides: tuple[tuple[int, int], ...] = ((2, 2), (1, 2))
  hidden_size: int = 800
  num_layers: int = 5
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  def output_length(self, length: jax.Array) -> jax.Array:
    """Returns how many frames of the result belong to `length` frames of the input."""
    for stride, _ in self.strides:
      length = -(-length // stride)
    return length

  @nn.compact
  def __call__(
      self, features: jax.Array, length: jax.Array | None = None, *, train: bool = False,
  ) -> Mapping[str, jax.Array]:
    """Transcribes recordings.

    Args:
      features: [B, T, F].
      length: i32[B], the number of frames of each row that are no padding, 0 for a row of padding;
        None for T.
      train: whether to drop values, and to normalise by the batch's statistics.

    Returns:
      "logits" [B, T', V] of `dtype`, and "length" i32[B], the number of frames of T' that count;
      the logits of other frames have no meaning.
    """
    if length is None:
      length = jnp.full(features.shape[:1], features.shape[1], jnp.int32)
    convolve = nn.remat(_Convolution, static_argnums=(3,)) if self.remat else _Convolution
    x = _zero_beyond(features[..., None], length)
    for i, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True), 1):
      x = convolve(self.channels, kernel, stride, self.dtype, name=f"conv{i}")(x, length, train)
      length = -(-length // stride[0])
    x = x.reshape(*x.shape[:2], -1)  # [B, T', F' C]
    stack = rnn.Stack(
        cell="gru", hidden_size=self.hidden_size, num_layers=self.num_layers, bidirectional=True,
        dropout=self.dropout, dtype=self.dtype, name="gru")
    x, _ = stack(x, length=length, train=train)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    logits = nn.Dense(self.vocab_size, dtype=self.dtype, name="head")(x)
    return {"logits": logits, "length": length}


class _Convolution(nn.Module):
  """A convolution, the norm and the ReLU, with zeros beyond the end of each recording.

  Attributes:
    channels: the channels of the result.
    kernel, stride: the convolution's (frames, bands).
    dtype: the dtype of the computation and the result.
  """

  channels: int
  kernel: tuple[int, int]
  stride: tuple[int, int]
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, length: jax.Array, train: bool) -> jax.Array:
    """[B, T, F, C'] -> [B, ceil(T / stride), ceil(F / stride), C]; `length` i32[B] of T count."""
    padding = [(size // 2, size // 2) for size in self.kernel]
    init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    x = Conv(self.channels, self.kernel, self.stride, padding=padding, use_bias=False,
             kernel_init=init, dtype=self.dtype, name="conv")(x)
    length = -(-length // self.stride[0])
    counts = jnp.arange(x.shape[1]) < length[:, None]
    x = BatchNorm(dtype=self.dtype, name="norm")(x, counts, train=train)
    return _zero_beyond(jnp.clip(x, 0, CUT), length)


def _zero_beyond(x: jax.Array, length: jax.Array) -> jax.Array:
  """Sets the frames of [B, T, ...] from `length` i32[B] on to zero."""
  counts = jnp.arange(x.shape[1]) < length[:, None]
  return jnp.where(counts.reshape(*counts.shape, *[1] * (x.ndim - 2)), x, 0)


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # The numbers of parameters, with 29 labels and 80 bands; of the small form with 38 and 16.
    "deepspeech2": functools.partial(DeepSpeech),  # 53,337,533
    "deepspeech_small": functools.partial(  # 469,750
        DeepSpeech, channels=16, kernels=((11, 11), (7, 7)), strides=((2, 2), (2, 2)),
        hidden_size=128, num_layers=2),
}
