"""Deep Speech 2 in a small form."""

import torch
from torch import nn


def _deepspeech(classes, channels=16, bands=16, width=128):
  """The small form: two convolutions, two bidirectional GRUs, CTC."""

  class DeepSpeech(nn.Module):

    def __init__(self):
      super().__init__()
      layers = []
      for inside, kernel in ((1, 11), (channels, 7)):
        layers += [nn.Conv2d(inside, channels, kernel, stride=2, padding=kernel // 2, bias=False),
                   nn.BatchNorm2d(channels), nn.Hardtanh(0, 20, inplace=True)]
      self.convs = nn.Sequential(*layers)
      self.rnn = nn.GRU(channels * bands // 4, width, num_layers=2, bidirectional=True)
      self.head = nn.Linear(2 * width, classes)

    def forward(self, features):
      x = self.convs(features[:, None])  # [B, C, T, F]
      return self.head(self.rnn(x.permute(2, 0, 3, 1).flatten(2))[0])

    def loss(self, batch):
      log_probs = self(batch["features"]).log_softmax(-1)
      frames = torch.full(batch["length"].shape, len(log_probs))
      return nn.functional.ctc_loss(
          log_probs, batch["tokens"], frames, batch["token_length"], reduction="sum") / len(frames)

  return DeepSpeech()


NETWORKS = {"deepspeech": _deepspeech}  # by the case's name: number of classes -> module
