r"""BERT: pre-trained on masked words, and fine-tuned to classify texts.

  python -m experiments.bert
  python -m experiments.bert --mode=predict --prompt="A dictionary maps keys to values."

The first learns from scratch which of eight topics of Python's documentation a paragraph is from:
of Python 3.13.0's 108 test paragraphs 68.5 % are right after 70 s on two CPU cores. (It has 797
paragraphs to learn from.)

Pre-training, and fine-tuning from the best checkpoint of it, which passes on its tokenizer:
  python -m experiments.bert --preset=pydoc_mlm      # 26.5 % of the hidden tokens right, in 129 s
  python -m experiments.bert --config.init.source=runs/bert-pydoc_mlm --workdir=runs/tuned  # 72.2 %
  python -m experiments.bert --preset=wordnet
  python -m experiments.bert --preset=wordnet_classes --config.init.source=runs/bert-wordnet
A pre-trained model fills in what [MASK] stands for:
  python -m experiments.bert --preset=wordnet --mode=predict --prompt="a [MASK] that barks"

Paragraphs of the test are also in the text of pydoc_mlm, without their topics; wordnet leaves the
glosses of the test out. The presets wordnet and those of GLUE (Wang et al. 2018), one for each of
seven tasks, have not been run here. Published numbers start from published weights:
  python -m experiments.bert --preset=glue_sst2 --config.init.source=bert-base-uncased
"""

from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from dljax import errors, launch
from dljax.config import one_of
from dljax.errors import UserError
from dljax.models import bert
from dljax.recipes import common, masked_language_modeling, text_classification
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "pydoc": "Which topic of Python's documentation a paragraph is from; offline, minutes.",
    "pydoc_mlm": "Pre-training: masked words of Python's documentation; offline, minutes.",
    "wordnet": "Pre-training: masked words of WordNet's glosses, but for those of the test.",
    "wordnet_classes": "Which of 26 classes a noun is of, by its gloss in WordNet.",
    "glue_cola": "Whether a sentence is English (CoLA).",
    "glue_sst2": "Whether a sentence of a film review praises (SST-2).",
    "glue_mrpc": "Whether two sentences of the news say the same (MRPC).",
    "glue_qqp": "Whether two questions ask the same (QQP).",
    "glue_mnli": "Whether a sentence follows from another, contradicts it, or neither (MNLI).",
    "glue_qnli": "Whether a sentence answers a question (QNLI).",
    "glue_rte": "Whether a sentence follows from another (RTE).",
}


def _classifier(preset: str, data: str, variant: str = "bert_nano") -> ml_collections.ConfigDict:
  """The fields that the presets of classifiers share."""
  config = text_classification.config("bert", preset, data=data, variant=variant, optimizer="adamw")
  config.model.update({"dropout": 0.1, "attention_dropout": 0.1})
  config.optimizer.update({
      "learning_rate": 1e-3, "weight_decay": 0.01, "clip_norm": 1.0, "warmup_fraction": 0.1,
      "schedule": "linear"})
  return config


def _pydoc() -> ml_collections.ConfigDict:
  config = _classifier("pydoc", "pydoc")
  config.data.buckets = 2
  config.model.attention_dropout = 0.0  # half of the time to compile
  config.update({
      "total_steps": 500, "batch_size": 32, "eval_batch_size": 32, "log_every": 10,
      "eval_every": 100, "checkpoint_every": 100})
  return config


def _masked(preset: str, data: str) -> ml_collections.ConfigDict:
  """The fields that the presets of pre-training share."""
  config = masked_language_modeling.config(
      "bert", preset, data=data, variant="bert_nano", optimizer="adamw")
  config.model.update({"dropout": 0.1, "attention_dropout": 0.1})
  config.optimizer.update({
      "learning_rate": 1e-3, "weight_decay": 0.01, "clip_norm": 1.0, "warmup_fraction": 0.05,
      "schedule": "linear"})
  return config


def _pydoc_mlm() -> ml_collections.ConfigDict:
  config = _masked("pydoc_mlm", "pydoc")
  # Few texts: each is seen some thirty times, and each time other words are hidden.
  config.model.update({"dropout": 0.0, "attention_dropout": 0.0})
  config.optimizer.learning_rate = 2e-3
  config.update({
      "total_steps": 2000, "batch_size": 32, "eval_batch_size": 32, "log_every": 20,
      "eval_every": 200, "checkpoint_every": 200})
  return config


def _wordnet() -> ml_collections.ConfigDict:
  config = _masked("wordnet", "wordnet")
  config.update({
      "total_steps": 10_000, "batch_size": 32, "eval_batch_size": 32, "log_every": 100,
      "eval_every": 1000, "checkpoint_every": 1000})
  return config


def _wordnet_classes() -> ml_collections.ConfigDict:
  config = _classifier("wordnet_classes", "wordnet")
  config.optimizer.learning_rate = 3e-4
  config.update({
      "total_steps": 6000, "batch_size": 32, "eval_batch_size": 128, "log_every": 100,
      "eval_every": 500, "checkpoint_every": 500})
  return config


def _glue(preset: str) -> ml_collections.ConfigDict:
  """Fine-tuning as in section 4.1 and appendix A.3 of the paper."""
  config = _classifier(preset, preset.removeprefix("glue_"), "bert_base")
  config.data.update({"tokenizer": "wordpiece", "vocab_size": 30_522})
  config.optimizer.learning_rate = 2e-5
  # Three epochs, of as many batches as there are; see the sizes of GLUE's training sets.
  examples = {"cola": 8551, "sst2": 67_349, "mrpc": 3668, "qqp": 363_849, "mnli": 392_702,
              "qnli": 104_743, "rte": 2490}[preset.removeprefix("glue_")]
  steps = 3 * examples // 32
  config.update({
      "total_steps": steps, "batch_size": 32, "eval_batch_size": 128, "log_every": 20,
      "eval_every": max(1, steps // 6), "checkpoint_every": max(1, steps // 6)})
  return config


_CONFIGS = {
    "pydoc": _pydoc, "pydoc_mlm": _pydoc_mlm, "wordnet": _wordnet,
    "wordnet_classes": _wordnet_classes}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]() if preset in _CONFIGS else _glue(preset)
  config.model.describe({
      "variant": one_of("The network", bert.VARIANTS),
      "dropout": "The probability of dropping a value after the embeddings and at the end of a "
                 "branch in training, and before a classifier.",
      "attention_dropout": "The probability of dropping an attention weight in training."})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, bert.VARIANTS)
  model = config.model
  common.check_model(model)
  if not 0 <= model.attention_dropout < 1:
    raise UserError(f"--config.model.attention_dropout={model.attention_dropout}: must be at least "
                    "0 and below 1")
  classifies = config.task == "text_classification"
  head = ({"head": "sequence", "num_classes": config.data.num_classes} if classifies
          else {"head": "mlm"})
  network = variant(
      vocab_size=config.data.vocab_size, dropout=model.dropout,
      attention_dropout=model.attention_dropout, dtype=common.dtype(config), remat=model.remat,
      **head)
  return _recipe(config).build(config, network)


def _recipe(config: ml_collections.ConfigDict) -> Any:
  """The file of the recipe for the preset's task."""
  if config.task == "text_classification":
    return text_classification
  return masked_language_modeling


def _resolve(config: ml_collections.ConfigDict, given: Collection[str]) -> Mapping[str, Any]:
  """What the user's own texts decide."""
  return _recipe(config).resolve(config, given)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, _resolve)
