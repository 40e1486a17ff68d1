"""The experiment that all masked language models share, from a config and a model."""

import platform
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from dljax import optim
from dljax.config import Group, base_config
from dljax.data.text import masked
from dljax.recipes import common, texts
from dljax.tasks import masked_language_modeling
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the sets that presets use.
DATA = {
    "pydoc": {"name": f"pydoc/{platform.python_version()}", "tokenizer": "wordpiece",
              "vocab_size": 2000, "length": 64},
    # The nouns' glosses that no classifier is evaluated on, and those of all other words.
    "wordnet": {"name": "wordnet", "train": "train+other", "tokenizer": "wordpiece",
                "vocab_size": 8000, "documents": True, "packed": True, "length": 128},
}


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of a masked language model's config, for the preset to change.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = masked.default_config()
  data_config.update(DATA[data])
  return base_config(
      family, preset, task="masked_language_modeling", monitor="validation/loss",
      optimizer=optim.default_config(optimizer), model=Group(common.model_fields(variant)),
      data=data_config)


def resolve(
    config: ml_collections.ConfigDict, given: Collection[str],
) -> Mapping[str, Any]:
  """What a text of the user's own decides, and prints what it holds; see `corpus.find`."""
  return texts.resolve(config, given)


def build(config: ml_collections.ConfigDict, model: nn.Module) -> Experiment:
  """The experiment that trains `model` on the text of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: the network, see `MaskedLanguageModeling`.

  Raises:
    UserError: a value is out of range, or a row is longer than what the model can read.
  """
  texts.check_length(config, model)
  text_set = masked.MaskedTextSet(config.data)
  data = text_set.pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)

  def read(request: Request, assets: Assets) -> Inputs:
    """Texts in which "[MASK]" stands for what is to be predicted."""
    del assets  # the experiment has restored them
    common.check_request(request, config.family, ["paths", "texts"])
    encode = lambda found, names: masked.encode_texts(
        found, names, text_set.tokenizer(), config.data.length)
    found, names, skipped = list(request.texts), list(request.texts), []
    if request.paths:
      found, names, skipped = texts.read(
          request.paths, lambda text, name: encode([text], [name]))
    if not found:
      return Inputs({}, [], skipped)
    return Inputs(encode(found, names if request.paths else ["--prompt"] * len(found)), names,
                  skipped)

  def show(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[Mapping[str, Any]]:
    del assets
    tokenizer = text_set.tokenizer()
    rows = zip(inputs.batch["tokens"], inputs.batch["length"], inputs.batch["places"],
               inputs.batch["number"], np.asarray(predictions["tokens"]),
               np.asarray(predictions["probabilities"]))
    for tokens, length, places, number, guesses, probabilities in rows:
      filled = tokens.copy()
      filled[places[:number]] = guesses[:number, 0]
      yield {
          "text": tokenizer.decode(filled[:length]),
          "probability": float(np.prod(probabilities[:number, 0])),
          "guesses": {str(i + 1): {tokenizer.decode([token]): float(p) for token, p in zip(*best)}
                      for i, best in enumerate(zip(guesses[:number], probabilities[:number]))}}

  return Experiment(
      task=masked_language_modeling.MaskedLanguageModeling(model), data=data, config=config,
      monitor=config.monitor or None, read=read, show=show, texts=True)
