"""The experiment that every family of language models shares: from a config and a model."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from dljax import optim
from dljax.config import base_config
from dljax.data.text import corpus, tokenize
from dljax.errors import UserError
from dljax.tasks import language_modeling
from dljax.train.experiment import Experiment

# Field values of `config.data` for the sets that presets use.
DATA = {
    # The documentation differs from version to version: the full version's stands beside the number.
    "pydoc": {"name": f"pydoc/{platform.python_version()}"},
    "tiny_shakespeare": {"name": "tiny_shakespeare", "tokenizer": "character", "vocab_size": 66},  # 65, and the end
    "lm1b": {"name": "lm1b", "tokenizer": "bpe", "vocab_size": 32_000, "documents": True, "length": 128,
             "train": "train[:99%]", "validation": "train[99%:]"},
}


def config(family: str, preset: str, data: str, optimizer: str) -> ml_collections.ConfigDict:
  """The shared fields of a language model's config, for the preset to change; `model` has dtype and remat.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = corpus.default_config()
  data_config.update(DATA[data])
  return base_config(
      family, preset, monitor="validation/loss", optimizer=optim.default_config(optimizer),
      model=ml_collections.ConfigDict({"dtype": "float32", "remat": False}), data=data_config,
      sampling=ml_collections.ConfigDict(vars(language_modeling.Sampling())))


def build(config: ml_collections.ConfigDict, model: nn.Module, stateful: bool) -> Experiment:
  """The experiment that trains `model` on the text of `config.data`. Opens no data.

  Args:
    config: with the fields of the function above.
    model: see `LanguageModeling`.
    stateful: whether the model carries its state from window to window of a text.
  """
  texts = corpus.TextSet(config.data)
  data = texts.pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = language_modeling.LanguageModeling(
      model=model, stateful=stateful and not config.data.documents,
      sampling=language_modeling.Sampling(**config.sampling.to_dict()),
      spell=lambda tokens: tokenize.pieces(texts.tokenizer(), tokens))

  def prompt(prompts: Sequence[str], names: Sequence[str]) -> Mapping[str, np.ndarray]:
    return corpus.encode_prompts(prompts, names, texts.tokenizer())

  def encode(paths: Sequence[str], assets: Mapping[str, Any]) -> tuple[Mapping[str, np.ndarray], list[str], list[str]]:
    del assets  # the experiment has restored them
    found, names, skipped = _read(paths, lambda content, name: texts.tokenizer().encode(content, name))
    return prompt(found, names), names, skipped

  def decode(predictions: Mapping[str, Any], assets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    del assets
    tokenizer = texts.tokenizer()
    for tokens in np.asarray(predictions["tokens"]):
      ends = np.flatnonzero(tokens == tokenizer.end)
      yield {"text": tokenizer.decode(tokens[:ends[0]] if len(ends) else tokens)}

  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None, encode=encode, decode=decode,
      prompt=prompt)


def _read(paths: Sequence[str], check: Callable[[str, str], Any]) -> tuple[list[str], list[str], list[str]]:
  """Reads files, and the .txt files in folders.

  Args:
    paths: of both.
    check: (text, name) -> nothing; raises `UserError` where the text cannot be used.

  Returns:
    The texts, their names, and one line for each file that cannot be used.
  """
  files = []
  for path in map(Path, paths):
    if not path.exists():
      raise UserError(f"--input: there is no {path}; name a file of text, or a folder of .txt files")
    files += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
  texts, names, skipped = [], [], []
  for path in files:
    try:
      content = corpus.read_file(path, "--input")
      check(content, os.fspath(path))
      texts.append(content)
      names.append(os.fspath(path))
    except UserError as error:
      skipped.append(str(error).removeprefix("--input="))
  return texts, names, skipped
