"""An order of training examples in which every class comes equally often.

It is class-aware sampling (Li Shen, Zhouchen Lin, Qingming Huang 2016, "Relay Backpropagation for
Effective Learning of Deep Convolutional Neural Networks"): the classes take turns, and each draws
one of the examples that have it. Tong Wu et al. 2020, "Distribution-Balanced Loss for Multi-Label
Classification in Long-Tailed Datasets", use it where an example has several classes; there a class
is also shown in the turns of the classes that occur together with it.
"""

import functools
from collections.abc import Sequence

import numpy as np

from dljax.data.pipeline import rng


class Balanced:
  """An endless stream of examples: a function of the seed and the place in the stream alone.

  The stream consists of blocks that hold one example of each class, in random order. The examples
  of a class come in one random order after the other, each once in an order.

  Args:
    labels: i[n], the class of each example; or f[n, C], 1 where an example has a class. Examples
      without any class count as a further class; classes without an example are left out.
    seed: the run's seed.
  """

  def __init__(self, labels: Sequence[int] | np.ndarray, seed: int):
    labels = np.asarray(labels)
    if labels.ndim == 1:
      self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    else:
      has = np.column_stack([labels > 0, ~(labels > 0).any(axis=1)])
      self._members = [np.flatnonzero(column) for column in has.T if column.any()]
    self._seed = seed
    # A batch may end in the middle of every class's order.
    self._order = functools.lru_cache(maxsize=2 * len(self._members))(self._permute)

  def __call__(self, start: int, end: int) -> np.ndarray:
    """The examples at the places from `start` to before `end`, i64[end - start]."""
    classes = len(self._members)
    blocks = np.arange(start // classes, -(-end // classes))
    order = np.stack([rng(self._seed, int(block), "classes").permutation(classes)
                      for block in blocks])
    found = np.empty(order.shape, np.int64)
    for label, members in enumerate(self._members):
      epochs, places = np.divmod(blocks, len(members))
      found[order == label] = [
          members[self._order(label, int(epoch))[place]] for epoch, place in zip(epochs, places)]
    return found.ravel()[start - blocks[0] * classes:][:end - start]

  def _permute(self, label: int, epoch: int) -> np.ndarray:
    return rng(self._seed, epoch, f"class {label}").permutation(len(self._members[label]))
