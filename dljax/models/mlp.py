"""Multilayer perceptrons, from Rosenblatt's to the one trained by backpropagation.

Frank Rosenblatt. "The Perceptron: A Probabilistic Model for Information Storage and Organization
in the Brain". Psychological Review 65(6), 1958. https://doi.org/10.1037/h0042519

David Rumelhart, Geoffrey Hinton, Ronald Williams. "Learning representations by back-propagating
errors". Nature 323, 1986. https://doi.org/10.1038/323533a0

Rosenblatt's machine, the perceptron, had one layer of adaptive weights between fixed random
features (the "association units") and threshold units (the "responses"). Its rule changes weights
only after a mistake. For an input x of class y whose largest response is that of class k,

    w_y <- w_y + x,    w_k <- w_k - x.

That is one step of gradient descent, with learning rate 1, on the perceptron criterion max_k z_k -
z_y of the linear responses z = W x + b. So here the perceptron is the linear layer alone, without
hidden layers (`widths=()`). The threshold is the arg max of a prediction, and the rule is a loss,
which belongs to the task. The paper has random features before the weights; ours sees the input
itself, as is usual since Minsky and Papert (1969).

The 1986 paper has logistic units; here `activation` is ReLU, with He's initialisation.

Dimensions: `B` batch, `D` width.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class MLP(nn.Module):
  """Fully connected layers over the flattened input.

  Attributes:
    num_classes: the number of logits.
    widths: the width of each hidden layer; no hidden layers make a linear classifier, the
      perceptron.
    activation: the activation after each hidden layer.
    dropout: the probability of dropping a hidden unit in training (rng stream "dropout").
    dtype: the dtype of the computation and the result; parameters are float32.
    remat: whether to recompute hidden layers in the backward pass instead of storing them.
  """

  num_classes: int
  widths: Sequence[int] = (512, 512)
  activation: Callable[[jax.Array], jax.Array] = nn.relu
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, image: jax.Array, mask: jax.Array | None = None, *, train: bool = False,
  ) -> jax.Array:
    """Classifies inputs.

    Args:
      image: [B, ...], with the same shape in all calls; it is flattened to [B, D] in row-major
        order.
      mask: f32[B], 0 where a row is padding; has no effect, as no layer lets rows see each other.
      train: whether to drop units.

    Returns:
      Logits [B, num_classes] of `dtype`.
    """
    del mask

    def hidden(self, x, layer, width):  # [B, D] -> [B, width]
      x = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.he_normal(),
                   name=f"hidden{layer}")(x)
      drop = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{layer}")
      return drop(self.activation(x))

    if self.remat:
      hidden = nn.remat(hidden, static_argnums=(2, 3))
    x = image.reshape(image.shape[0], -1)
    for layer, width in enumerate(self.widths, start=1):
      x = hidden(self, x, layer, width)
    return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # On MNIST, 784-512-512-10: 669,706 parameters.
    "mlp": functools.partial(MLP, widths=(512, 512)),
    # Rosenblatt 1958; on MNIST, 784-10: 7,850 parameters.
    "perceptron": functools.partial(MLP, widths=()),
}
