"""VGG for small images."""

from torch import nn


def _vgg11(classes):
  """torchvision's VGG-11 with a head for small images."""
  layers, channels = [], 3
  for stage, size in zip((64, 128, 256, 512, 512), (1, 1, 2, 2, 2)):
    for _ in range(size):
      layers += [nn.Conv2d(channels, stage, 3, padding=1), nn.ReLU(inplace=True)]
      channels = stage
    layers.append(nn.MaxPool2d(2))
  return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(inplace=True),
                       nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, classes))


NETWORKS = {"vgg11": _vgg11}  # by the case's name: number of classes -> module
