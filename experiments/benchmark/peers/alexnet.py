"""AlexNet for small images."""

from torch import nn


def _alexnet(classes):
  """torchvision's AlexNet with a stem and a head for small images."""
  layers, channels = [], 3
  for width, kernel, pool in ((64, 5, True), (192, 5, True), (384, 3, False), (256, 3, False),
                              (256, 3, True)):
    layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, 2)] if pool else []
    channels = width
  return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 3 * 256, 1024), nn.ReLU(inplace=True),
                       nn.Linear(1024, 1024), nn.ReLU(inplace=True), nn.Linear(1024, classes))


NETWORKS = {"alexnet": _alexnet}  # by the case's name: number of classes -> module
