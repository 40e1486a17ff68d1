"""U-Net."""

import torch
from torch import nn


def _unet(classes, width=16, pools=3):
  """A U-Net with padding and batch normalisation, for images of one channel."""

  def block(channels, width):
    layers = []
    for channels in (channels, width):
      layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                 nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)

  class UNet(nn.Module):

    def __init__(self):
      super().__init__()
      widths = [width * 2**i for i in range(pools + 1)]
      self.down = nn.ModuleList(map(block, [1, *widths], widths))
      self.up_convs = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
      self.up = nn.ModuleList(block(2 * w, w) for w in widths[:-1])
      self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, classes, 1)

    def forward(self, x):
      skips = []
      for down in self.down[:-1]:
        skips.append(down(x))
        x = self.pool(skips[-1])
      x = self.down[-1](x)
      for skip, up_conv, up in reversed(list(zip(skips, self.up_convs, self.up))):
        x = up(torch.cat([skip, up_conv(x)], dim=1))
      return self.head(x)

  return UNet()


NETWORKS = {"unet": _unet}  # by the case's name: number of classes -> module
