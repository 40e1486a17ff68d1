"""torchvision's RetinaNet."""

from torch import nn

from experiments.benchmark.peers import import_torchvision

torchvision = import_torchvision()

# Pylint: disable=g-import-not-at-top,wrong-import-position.
from torchvision.models.detection import retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import BasicBlock


def _retinanet(classes):
  """torchvision's RetinaNet on a small ResNet of its blocks, with a pyramid and heads of its own.
  """

  def stage(inside, outside, stride):
    if stride == 1:
      return BasicBlock(inside, outside)
    shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False),
                             nn.BatchNorm2d(outside))
    return BasicBlock(inside, outside, stride, shortcut)

  class Backbone(nn.Module):
    out_channels = 64

    def __init__(self):
      super().__init__()
      self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
                                nn.ReLU(inplace=True), stage(16, 16, 1), stage(16, 32, 2))
      self.stages = nn.ModuleList([stage(32, 64, 2), stage(64, 128, 2), stage(128, 256, 2)])
      self.pyramid = torchvision.ops.FeaturePyramidNetwork([64, 128, 256], self.out_channels)

    def forward(self, image):
      levels, x = {}, self.stem(image)
      for i, layer in enumerate(self.stages):
        levels[str(i)] = x = layer(x)
      return self.pyramid(levels)

  class Detector(nn.Module):

    def __init__(self):
      super().__init__()
      sizes = tuple((s, int(s * 2**(1 / 3)), int(s * 2**(2 / 3))) for s in (8, 16, 32))
      anchors = AnchorGenerator(sizes, ((1.25, 2.0),) * 3)
      self.net = retinanet.RetinaNet(Backbone(), classes, anchor_generator=anchors)
      for head in (self.net.head.classification_head, self.net.head.regression_head):
        head.conv = head.conv[:2]

    def forward(self, image):
      return self.net.head(list(self.net.backbone(image).values()))

    def loss(self, batch):
      image = batch["image"]
      levels = list(self.net.backbone(image).values())
      anchors = self.net.anchor_generator(ImageList(image, [image.shape[-2:]] * len(image)),
                                          levels)
      targets = [{"boxes": boxes, "labels": labels}
                 for boxes, labels in zip(batch["boxes"], batch["box_label"])]
      return sum(self.net.compute_loss(targets, self.net.head(levels), anchors).values())

  return Detector()


NETWORKS = {"retinanet": _retinanet}  # by the case's name: number of classes -> module
