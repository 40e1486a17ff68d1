"""torchvision's ResNets."""

from torch import nn

from experiments.benchmark.peers import import_torchvision

torchvision = import_torchvision()


def _resnet18(classes):
  """torchvision's ResNet-18 with the stem for small images."""
  model = torchvision.models.resnet18(num_classes=classes)
  model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
  return model


def _resnet50(classes):
  return torchvision.models.resnet50(num_classes=classes)


# By the case's name: number of classes -> module.
NETWORKS = {"resnet18": _resnet18, "resnet50": _resnet50}
