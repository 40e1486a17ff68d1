"""The multilayer perceptron."""

from torch import nn


def _mlp(classes):
  return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512),
                       nn.ReLU(), nn.Linear(512, classes))


NETWORKS = {"mlp": _mlp}  # by the case's name: number of classes -> module
