"""BERT's names.

transformers: src/transformers/models/bert/modeling_bert.py. Which of its classes wrote a file
decides the head: BertModel ("none"), BertForMaskedLM ("mlm"), BertForPreTraining ("pretraining"),
BertForSequenceClassification ("sequence"), BertForTokenClassification ("token") and
BertForQuestionAnswering ("span"). BertModel's names lack the prefix "bert." that the others have;
files of either kind are read. Older files call the parameters of a layer norm gamma and beta, and
hold the positions' numbers.

Files of published weights often hold more heads than their config.json says. The heads that a model
does not have are left out, as transformers does.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dljax.errors import UserError
from dljax.interop.table import (
    LINEAR, SAME, Array, Layout, Table, concatenate, layer, merged_heads)
from dljax.models import bert

_HEADS = {
    "BertModel": "none", "BertForMaskedLM": "mlm", "BertForPreTraining": "pretraining",
    "BertForSequenceClassification": "sequence", "BertForTokenClassification": "token",
    "BertForQuestionAnswering": "span",
}
_CLASSIFIES = ("sequence", "token")  # the heads with as many classes as one likes
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}
_WORDS = "cls.predictions"
# The tensors of all heads, and buffers.
_NO_WEIGHT = (r"(bert\.)?embeddings\.(position_ids|token_type_ids)|(bert\.)?pooler\..*|"
              r"(cls|classifier|qa_outputs)\..*")


class _Untied(Table):
  """A model whose head for words has a kernel of its own.

  transformers 5 then holds two biases, of which it reads the decoder's; earlier versions wrote the
  other name alone.
  """

  def rename(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Does what `Table` does, with the decoder's bias where there are two."""
    if any(name.endswith(f"{_WORDS}.decoder.bias") for name in tensors):
      tensors = {name: x for name, x in tensors.items() if not name.endswith(f"{_WORDS}.bias")}
    return super().rename(tensors)


def _transformers(model: bert.BERT) -> Table:
  # BertModel alone has no prefix.
  prefix = "" if model.head == "none" else "bert."
  block, theirs = r"params/block(\d+)", rf"{prefix}encoder.layer.\1"
  joint_kernel, joint_bias = _separate_heads(model.num_heads)
  parts = tuple(f"{theirs}.attention.self.{name}" for name in ("query", "key", "value"))
  out = f"{theirs}.attention.output"
  rules = [
      ("params/embed/embedding", f"{prefix}embeddings.word_embeddings.weight", SAME),
      ("params/positions/embedding", f"{prefix}embeddings.position_embeddings.weight", SAME),
      ("params/types/embedding", f"{prefix}embeddings.token_type_embeddings.weight", SAME),
      *_norm("params/embed_norm", f"{prefix}embeddings.LayerNorm"),
      (f"{block}/qkv/kernel", tuple(f"{part}.weight" for part in parts), joint_kernel),
      (f"{block}/qkv/bias", tuple(f"{part}.bias" for part in parts), joint_bias),
      (f"{block}/project/kernel", f"{out}.dense.weight", merged_heads(model.num_heads)),
      (f"{block}/project/bias", f"{out}.dense.bias", SAME),
      *_norm(f"{block}/norm1", f"{out}.LayerNorm"),
      *layer(r"block(\d+)/mlp1", f"{theirs}.intermediate.dense", LINEAR),
      *layer(r"block(\d+)/mlp2", f"{theirs}.output.dense", LINEAR),
      *_norm(f"{block}/norm2", f"{theirs}.output.LayerNorm"),
      *layer("pooler", f"{prefix}pooler.dense", LINEAR),
      *layer("transform", f"{_WORDS}.transform.dense", LINEAR),
      *_norm("params/transform_norm", f"{_WORDS}.transform.LayerNorm"),
      ("params/decoder/kernel", f"{_WORDS}.decoder.weight", LINEAR),
      ("params/decoder_bias", f"{_WORDS}.decoder.bias", SAME),
      *layer("next_sentence", "cls.seq_relationship", LINEAR),
      *layer("head", "qa_outputs" if model.head == "span" else "classifier", LINEAR),
  ]
  encoder = r"(?:bert\.)?((?:embeddings|encoder)\..*LayerNorm)"
  older = [
      (rf"{encoder}\.gamma", rf"{prefix}\1.weight"), (rf"{encoder}\.beta", rf"{prefix}\1.bias"),
      (r"(cls\..*LayerNorm)\.gamma", r"\1.weight"), (r"(cls\..*LayerNorm)\.beta", r"\1.bias"),
      (r"(?:bert\.)?((?:embeddings|encoder|pooler)\..*)", rf"{prefix}\1"),
  ]
  tied = {}
  if model.head in ("mlm", "pretraining"):
    tied[f"{_WORDS}.bias"] = f"{_WORDS}.decoder.bias"
    if model.tied:
      tied[f"{_WORDS}.decoder.weight"] = f"{prefix}embeddings.word_embeddings.weight"
  table = Table if model.tied else _Untied
  return table(rules, inputs=lambda tensors: (jax.ShapeDtypeStruct((1, 1), np.int32),),
               no_weight=_NO_WEIGHT, older=older, tied=tied)


def _norm(path: str, name: str) -> list[tuple[str, str, Layout]]:
  return [(f"{path}/scale", f"{name}.weight", SAME), (f"{path}/bias", f"{name}.bias", SAME)]


def _separate_heads(heads: int) -> tuple[Layout, Layout]:
  """The layouts of kernel and bias of queries, keys and values, which are three layers there.

  A kernel is [heads D', D] in the source, and all three are [D, heads, 3, D'] with us. The biases
  have the same layouts without D.
  """

  def join_kernels(*kernels: Array) -> Array:
    return concatenate([x.reshape(heads, 1, -1, x.shape[1]).transpose(3, 0, 1, 2)
                        for x in kernels], 2)

  def split_kernel(kernel: Array) -> tuple[Array, ...]:
    return tuple(kernel[:, :, i].transpose(1, 2, 0).reshape(-1, kernel.shape[0])
                 for i in range(kernel.shape[2]))

  def join_biases(*biases: Array) -> Array:
    return concatenate([x.reshape(heads, 1, -1) for x in biases], 1)

  def split_bias(bias: Array) -> tuple[Array, ...]:
    return tuple(bias[:, i].reshape(-1) for i in range(bias.shape[1]))

  return Layout(join_kernels, split_kernel), Layout(join_biases, split_bias)


# transformers' sizes -> ours, and what they are where a config.json is silent.
_SIZES = {
    "vocab_size": ("vocab_size", 30_522), "hidden_size": ("embed_dim", 768),
    "num_hidden_layers": ("num_layers", 12), "num_attention_heads": ("num_heads", 12),
    "intermediate_size": ("mlp_dim", 3072), "max_position_embeddings": ("max_length", 512),
    "type_vocab_size": ("num_types", 2),
}
_RATES = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"}
# What changes the network, and the only values for which ours is the same.
_ONLY = {"is_decoder": (False,), "add_cross_attention": (False,),
         "position_embedding_type": ("absolute", None), "pruned_heads": ({}, None),
         "quantization_config": (None,)}


def _transformers_model(config: Mapping[str, Any]) -> bert.BERT | None:
  """The model of transformers' config.json, if its model_type is "bert"."""
  if config.get("model_type") != "bert":
    return None
  names = config.get("architectures") or ["BertModel"]
  if len(names) != 1 or names[0] not in _HEADS:
    raise UserError(f"config.json: the architectures {names} have no counterpart here; those that "
                    f"have one are {', '.join(_HEADS)}")
  for key, values in _ONLY.items():
    if key in config and config[key] not in values:
      raise UserError(f"config.json: {key} is {config[key]!r}, which cannot be had here; only "
                      f"{values[0]!r}")
  activation = config.get("hidden_act", "gelu")
  if activation not in _ACTIVATIONS:
    raise UserError(f"config.json: hidden_act is {activation!r}, which is not known here; only "
                    f"{', '.join(_ACTIVATIONS)}")
  settings = {ours: _whole(theirs, config.get(theirs, default))
              for theirs, (ours, default) in _SIZES.items()}
  if settings["embed_dim"] % settings["num_heads"]:
    raise UserError(f"config.json: {settings['num_heads']} heads do not divide a width of "
                    f"{settings['embed_dim']}")
  if settings["mlp_dim"] == 4 * settings["embed_dim"]:
    settings["mlp_dim"] = None  # as in our variants
  settings |= {ours: _rate(theirs, config.get(theirs, 0.1)) for theirs, ours in _RATES.items()}
  if config.get("classifier_dropout") is not None:
    settings["head_dropout"] = _rate("classifier_dropout", config["classifier_dropout"])
  head, labels = _HEADS[names[0]], config.get("id2label")
  # Two classes are the default, and not written.
  classes = len(labels) if labels else _whole("num_labels", config.get("num_labels", 2))
  if head in _CLASSIFIES:
    settings["num_classes"] = classes
  elif head == "span" and classes != 2:
    raise UserError(f"config.json: {names[0]} has {classes} labels; a span has two, its start and "
                    "its end")
  tied, epsilon = config.get("tie_word_embeddings", True), config.get("layer_norm_eps", 1e-12)
  if type(tied) is not bool:
    raise UserError(f"config.json: tie_word_embeddings is {tied!r}; it must be true or false")
  if type(epsilon) not in (int, float) or not epsilon > 0:
    raise UserError(f"config.json: layer_norm_eps is {epsilon!r}; it must be a number above 0")
  return bert.BERT(head=head, activation=_ACTIVATIONS[activation], epsilon=float(epsilon),
                   tied=tied, **settings)


def _transformers_config(model: bert.BERT) -> dict[str, Any]:
  """The reverse of `_transformers_model`."""
  kinds, activations = ({ours: theirs for theirs, ours in reversed(table.items())}
                        for table in (_HEADS, _ACTIVATIONS))
  config = {
      "model_type": "bert", "architectures": [kinds[model.head]],
      **{theirs: getattr(model, ours) for theirs, (ours, _) in _SIZES.items()},
      **{theirs: getattr(model, ours) for theirs, ours in _RATES.items()},
      "intermediate_size": model.mlp_dim or 4 * model.embed_dim,
      "classifier_dropout": model.head_dropout, "hidden_act": activations[model.activation],
      "layer_norm_eps": model.epsilon, "tie_word_embeddings": model.tied}
  if model.head in _CLASSIFIES and model.num_classes != 2:
    names = [f"LABEL_{i}" for i in range(model.num_classes)]
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
  return config


def _whole(field: str, value: Any) -> int:
  if type(value) is not int or value < 1:
    raise UserError(f"config.json: {field} is {value!r}; it must be a whole number above 0")
  return value


def _rate(field: str, value: Any) -> float:
  if type(value) not in (int, float) or not 0 <= value < 1:
    raise UserError(f"config.json: {field} is {value!r}; it must be a number from 0 to below 1")
  return float(value)


TABLES = {"transformers": {bert.BERT: _transformers}}
# Class -> the pattern of our paths that only some heads have.
HEADS = {bert.BERT: "params/(pooler|transform|transform_norm|decoder|decoder_bias|next_sentence|"
                    "head)(/.*)?"}
CONFIGS = {"transformers": _transformers_model}
WRITERS = {"transformers": {bert.BERT: _transformers_config}}
