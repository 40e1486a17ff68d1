"""torchvision's EfficientNet."""

from experiments.benchmark.peers import import_torchvision

torchvision = import_torchvision()


def _efficientnet_b0(classes):
  return torchvision.models.efficientnet_b0(num_classes=classes, stochastic_depth_prob=0.0,
                                            dropout=0.0)


NETWORKS = {"efficientnet_b0": _efficientnet_b0}  # by the case's name: number of classes -> module
