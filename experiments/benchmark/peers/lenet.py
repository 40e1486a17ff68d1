"""LeNet-5, with either kind of pooling."""

from torch import nn


def _lenet(classes, pool="AvgPool2d"):
  pool = getattr(nn, pool)
  return nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), pool(2), nn.Conv2d(6, 16, 5),
                       nn.Tanh(), pool(2), nn.Flatten(), nn.Linear(400, 120), nn.Tanh(),
                       nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, classes))


def _lenet_max(classes):
  return _lenet(classes, "MaxPool2d")


# By the case's name: number of classes -> module.
NETWORKS = {"lenet": _lenet, "lenet_max": _lenet_max}
