"""The experiment that all language models share, from a config and a model."""

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from dljax import optim, report
from dljax.config import Field, Group, base_config
from dljax.data.text import corpus, tokenize
from dljax.recipes import common
from dljax.recipes import texts as own_texts
from dljax.tasks import language_modeling
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the sets that presets use.
DATA = {
    # The documentation differs from version to version, so the data's name has the full version.
    "pydoc": {"name": f"pydoc/{platform.python_version()}"},
    # The vocabulary is 65 characters and the end of a text.
    "tiny_shakespeare": {"name": "tiny_shakespeare", "tokenizer": "character", "vocab_size": 66},
    "openwebtext": {"name": "openwebtext", "tokenizer": "bpe", "vocab_size": 50_257,
                    "train": "train[:-5000]", "validation": "train[-5000:]", "test": ""},
    "lm1b": {"name": "lm1b", "tokenizer": "bpe", "vocab_size": 32_000, "documents": True,
             "length": 128, "train": "train[:99%]", "validation": "train[99%:]"},
}

_SAMPLING = {
    "max_new_tokens": "The number of tokens to generate.",
    "temperature": "The logits' divisor; 0 always takes the most probable token.",
    "top_k": "The number of most probable tokens that may be drawn; 0 allows all.",
    "top_p": "The probability that the most probable tokens must reach together; only these may be "
             "drawn, and 1 allows all.",
    "seed": "The seed of the draws; another one gives another text for the same prompt and run.",
}


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of a language model's config, for the preset to change.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = corpus.default_config()
  data_config.update(DATA[data])
  return base_config(
      family, preset, task="language_modeling",
      monitor="validation/loss", optimizer=optim.default_config(optimizer),
      model=Group(common.model_fields(variant)), data=data_config,
      sampling=Group({name: Field(value, _SAMPLING[name])
                      for name, value in vars(language_modeling.Sampling()).items()}))


def resolve(
    config: ml_collections.ConfigDict, given: Collection[str],
) -> Mapping[str, Any]:
  """What a text of the user's own decides, and prints what it holds; see `corpus.find`."""
  return own_texts.resolve(config, given)


def build(config: ml_collections.ConfigDict, model: nn.Module, stateful: bool) -> Experiment:
  """The experiment that trains `model` on the text of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: the network, see `LanguageModeling`.
    stateful: whether the model carries its state from window to window of a text; otherwise it
      reads each window on its own.

  Raises:
    UserError: a value is out of range, or a window is longer than the model's context.
  """
  own_texts.check_length(config, model)
  texts = corpus.TextSet(config.data, carried=stateful)
  data = texts.pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = language_modeling.LanguageModeling(
      model=model, stateful=stateful and not config.data.documents,
      sampling=language_modeling.Sampling(**config.sampling.to_dict()),
      spell=lambda tokens: tokenize.pieces(texts.tokenizer(), tokens),
      padded=config.data.documents)

  def prompts(
      found: Sequence[str], names: Sequence[str], count: int = 1,
  ) -> Mapping[str, np.ndarray]:
    """Each prompt `count` times; rows of different ids draw different continuations."""
    batch = corpus.encode_prompts(found, names, texts.tokenizer())
    repeated = {field: np.repeat(value, count, axis=0) for field, value in batch.items()}
    return {**repeated, "id": np.arange(len(repeated["id"]), dtype=np.int32)}

  def read(request: Request, assets: Assets) -> Inputs:
    del assets  # the experiment has restored them
    common.check_request(request, config.family, ["paths", "texts"], ["count"])
    found, names, skipped = list(request.texts), list(request.texts), []
    if request.paths:
      found, names, skipped = own_texts.read(request.paths, texts.tokenizer().encode)
    flags = names if request.paths else ["--prompt"] * len(found)
    count = request.count or 1
    repeated = [name for name in names for _ in range(count)]
    return Inputs(prompts(found, flags, count), repeated, skipped)

  def show(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[Mapping[str, Any]]:
    del inputs, assets
    tokenizer = texts.tokenizer()
    for tokens in np.asarray(predictions["tokens"]):
      ends = np.flatnonzero(tokens == tokenizer.end)
      yield {"text": tokenizer.decode(tokens[:ends[0]] if len(ends) else tokens)}

  def draw(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[tuple[str, bytes]]:
    return (common.png(report.page(row["text"])) for row in show(inputs, predictions, assets))

  def preview() -> Inputs:
    return Inputs(prompts([""], ["the preview"]), ["a text from its beginning"])

  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None, read=read, show=show,
      draw=draw, preview=preview, texts=True)
