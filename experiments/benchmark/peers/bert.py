"""transformers' BERT with the head for masked words."""

from torch import nn

from experiments.benchmark.peers import import_package


def _bert_small(classes):
  transformers = import_package("transformers")
  config = transformers.BertConfig(
      vocab_size=classes, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
      intermediate_size=2048, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

  class MaskedLanguageModel(nn.Module):
    """Its loss has the logits of the words to be predicted alone, as ours."""

    def __init__(self):
      super().__init__()
      self.bert = transformers.BertForMaskedLM(config)

    def forward(self, tokens):
      return self.bert(input_ids=tokens).logits

    def loss(self, batch):
      hidden = self.bert.bert(input_ids=batch["tokens"]).last_hidden_state
      places = batch["places"][..., None].expand(-1, -1, hidden.shape[-1])
      logits = self.bert.cls(hidden.gather(1, places))
      return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

  return MaskedLanguageModel()


NETWORKS = {"bert_small": _bert_small}  # by the case's name: number of classes -> module
