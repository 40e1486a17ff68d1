"""A language model of stacked LSTMs or GRUs."""

from torch import nn


def _language_model(classes, cell, width=256):
  """Two layers, with time first, which torch prefers; each step continues from the last state."""

  class LanguageModel(nn.Module):

    def __init__(self):
      super().__init__()
      self.embedding = nn.Embedding(classes, width)
      self.rnn = getattr(nn, cell)(width, width, num_layers=2)
      self.decoder = nn.Linear(width, classes)
      self.carry = None

    def forward(self, tokens):
      return self.decoder(self.rnn(self.embedding(tokens.T))[0])

    def loss(self, batch):
      x, carry = self.rnn(self.embedding(batch["tokens"].T), self.carry)
      self.carry = carry.detach() if cell == "GRU" else tuple(state.detach() for state in carry)
      return nn.functional.cross_entropy(self.decoder(x).flatten(0, 1),
                                         batch["targets"].T.flatten())

  return LanguageModel()


def _lstm(classes):
  return _language_model(classes, "LSTM")


def _gru(classes):
  return _language_model(classes, "GRU")


NETWORKS = {"lstm": _lstm, "gru": _gru}  # by the case's name: number of classes -> module
