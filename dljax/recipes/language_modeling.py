"""The experiment that all language models share, from a config and a model."""

import math
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from dljax import optim, report
from dljax.config import Field, Group, base_config
from dljax.data.text import corpus, tokenize
from dljax.errors import UserError
from dljax.recipes import common
from dljax.recipes import texts as own_texts
from dljax.tasks import decoding, language_modeling
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

_NEIGHBOURS = 1000  # tokens that may stand beside a stop text

_SAMPLING = {
    "max_new_tokens": "The number of tokens to generate, at most.",
    "min_new_tokens": "The number of tokens before which nothing ends a text.",
    "temperature": "The logits' divisor; 0 always takes the most probable token.",
    "top_k": "The number of most probable tokens that may be drawn; 0 allows all.",
    "top_p": "The probability that the most probable tokens must reach together; only these may be "
             "drawn, and 1 allows all.",
    "min_p": "The part of the greatest probability that a token needs to be drawn; 0 allows all.",
    "repetition_penalty": "What divides the positive logits, and multiplies the negative ones, of "
                          "tokens that have occurred in the prompt or since; 1 is off.",
    "no_repeat_ngram": "The length of the n-grams of tokens that may occur only once in prompt and "
                       "text; 0 is off.",
    "stop_tokens": "Numbers of tokens that end a text, as the end of a document always does.",
    "stop_texts": "Texts that end a text, which then has what comes before them; with commas, line "
                  'breaks or outer spaces as JSON: \'["\\n\\n", "A, B"]\'.',
    "slide": "Whether of a prompt that is longer than the model's context the last tokens are read; "
             "otherwise it is refused. A text that grows beyond the context always goes on from "
             "its last tokens.",
    "scores": "Whether predictions have the logarithm of each token's probability under the model, "
              "and their sum.",
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
                      for name, value in vars(decoding.Sampling()).items()}))


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
  sampling = decoding.Sampling(**config.sampling.to_dict())
  sampling.check_vocabulary(config.data.vocab_size)
  task = language_modeling.LanguageModeling(
      model=model, stateful=stateful and not config.data.documents, sampling=sampling,
      spell=lambda tokens: tokenize.pieces(texts.tokenizer(), tokens),
      decode=lambda tokens: texts.tokenizer().decode(tokens[tokens >= 0]),
      padded=config.data.documents)

  def prompts(
      found: Sequence[str], names: Sequence[str], count: int = 1,
  ) -> Mapping[str, np.ndarray]:
    """Each prompt `count` times; rows of different ids draw different continuations."""
    tokenizer = texts.tokenizer()
    batch = corpus.encode_prompts(found, names, tokenizer)
    width = decoding.bucket(batch["prompt"].shape[1]) - batch["prompt"].shape[1]
    batch = {**batch, "prompt": np.pad(batch["prompt"], ((0, 0), (0, width)))}
    repeated = {field: np.repeat(value, count, axis=0) for field, value in batch.items()}
    rows = len(repeated["id"])
    return {**repeated, "id": np.arange(rows, dtype=np.int32),
            "stop": np.full((rows, 1), tokenizer.end, np.int32)}

  def check(text: str, name: str) -> None:
    """Raises `UserError` if a prompt cannot be used."""
    tokens, = corpus.encode_prompts([text], [name], texts.tokenizer())["prompt"]
    decoding.check_prompt(name, tokens, model, sampling)

  def read(request: Request, assets: Assets) -> Inputs:
    del assets  # the experiment has restored them
    common.check_request(request, config.family, ["paths", "texts"], ["count"])
    for stop in sampling.stop_texts:
      _check_stop(stop, texts.tokenizer())
    found, names, skipped = list(request.texts), list(request.texts), []
    if request.paths:
      found, names, skipped = own_texts.read(request.paths, check)
    else:
      for text in found:
        check(text, "--prompt")
    flags = names if request.paths else ["--prompt"] * len(found)
    count = request.count or 1
    repeated = [name for name in names for _ in range(count)]
    batch = prompts(found, flags, count)
    context = getattr(model, "max_length", None)
    cut = [f"{name} has {length} tokens; the model reads the last {context}"
           for name, length in zip(flags, batch["length"][::count])
           if context is not None and length > context]
    return Inputs(batch, repeated, skipped, cut)

  def show(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[Mapping[str, Any]]:
    del inputs, assets
    ends = [decoding.NOTHING, texts.tokenizer().end, *sampling.stop_tokens]
    for i, tokens in enumerate(np.asarray(predictions["tokens"])):
      tokens = tokens[:np.argmax(np.append(np.isin(tokens, ends), True))]
      text = task.before_stop(tokens)
      yield {"text": text, **(_scores(tokens, text, predictions["log_p"][i], task.spell)
                              if "log_p" in predictions else {})}

  def draw(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[tuple[str, bytes]]:
    return (common.png(report.page(row["text"])) for row in show(inputs, predictions, assets))

  def preview() -> Inputs:
    return Inputs(prompts([""], ["the preview"]), ["a text from its beginning"])

  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None, read=read, show=show,
      draw=draw, preview=preview, texts=True)


def _scores(
    tokens: np.ndarray, text: str, log_p: np.ndarray, spell: Callable[[np.ndarray], Sequence[str]],
) -> Mapping[str, Any]:
  """What a row says of the probabilities of its tokens.

  Args:
    tokens: i32[n], the tokens up to the end.
    text: what of their text comes before a stop text; the tokens after it are left out.
    log_p: f32[N], the logarithms of the probabilities.
    spell: a function from tokens to their texts.
  """
  pieces = spell(tokens)
  before = np.cumsum([0, *map(len, pieces)])[:-1]  # characters before each token
  count = int(np.sum(before < len(text)))
  values = [float(value) for value in log_p[:count]]
  return {"log_probability": math.fsum(values), "tokens": list(pieces[:count]),
          "log_probabilities": values}


def _check_stop(stop: str, tokenizer: tokenize.Tokenizer) -> None:
  """Raises `UserError` if no tokens stand for a text that holds `stop`."""
  flag = f"--config.sampling.stop_texts={stop!r}"
  found = tokenizer.encode(stop, f"{flag} cannot occur").tokens
  # Its first and last characters may need others around them, as an outer space does.
  others = ([], *([token] for token in range(min(tokenizer.size, _NEIGHBOURS))))
  around = (tokenizer.decode([*first, *second, *first])
            for other in others for first, second in ((found, other), (other, found)))
  if not any(stop in text for text in around):
    raise UserError(f"{flag} cannot occur: the tokenizer makes {tokenizer.decode(found)!r} of it; "
                    "give a text that it can write")
