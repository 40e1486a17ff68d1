"""transformers' GPT-2."""

from torch import nn

from experiments.benchmark.peers import import_package


def gpt2(**sizes):
  """A GPT-2 of these sizes, without dropout; its attention is the package's default, torch's own."""
  transformers = import_package("transformers")
  return transformers.GPT2LMHeadModel(transformers.GPT2Config(
      resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0, **sizes))


def _gpt(classes):
  class LanguageModel(nn.Module):

    def __init__(self):
      super().__init__()
      self.network = gpt2(vocab_size=classes, n_positions=128, n_embd=384, n_layer=6, n_head=6)

    def forward(self, tokens):
      return self.network(tokens, use_cache=False).logits

    def loss(self, batch):
      logits = self(batch["tokens"])
      return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

  return LanguageModel()


NETWORKS = {"gpt": _gpt}  # by the case's name: number of classes -> module
