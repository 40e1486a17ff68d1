"""timm's ViT."""

from experiments.benchmark.peers import import_package


def _vit_ti16(classes):
  return import_package("timm").create_model("vit_tiny_patch16_224", pretrained=False,
                                             num_classes=classes)


NETWORKS = {"vit_ti16": _vit_ti16}  # by the case's name: number of classes -> module
