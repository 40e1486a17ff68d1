"""Text for language models: the config that they share, and its pipelines.

A batch holds

  tokens           i32[b, L]
  targets          i32[b, L], the token after each token
  target_weight    f32[b, L], 0 where no token is to be predicted
  length           i32[b], the number of tokens in a row that are no padding
  reset            f32[b], 1 where a row does not continue the row of the batch before
  mask, id         see `data/pipeline.py`; in evaluation, the id of a stream's window is the place
                   of its first token in the split
  characters       f32[b], in evaluation: the number of characters that the targets stand for
  bytes            f32[b], in evaluation: the number of bytes that the targets stand for
  "host/position"  i64[b], in evaluation: the place of the row's first token in the split

The documents of a split are read as one text, or each on its own; see `data/text/streams.py`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import ragged, sources, splits
from dljax.data.pipeline import HostBatch, Pipeline
from dljax.data.text import streams, tokenize
from dljax.errors import UserError, unknown

ASSET = "tokenizer"
_SPLITS = ("train", "validation", "test")
_LEAST_VOCABULARY = 300  # for a sub-word tokenizer: 256 bytes and some words


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "name": Field("pydoc", splits.NAME),
      "file": Field("", "A UTF-8 text of your own in place of a set: the first 90 % are for "
                    "training, half of the rest for validation, and half for the test."),
      "field": Field("text", "The feature of the set that holds the text."),
      **splits.fields("train", "validation", "test"),
      "tokenizer": Field("byte", one_of("How text becomes tokens", tokenize.TOKENIZERS)),
      "tokenizer_file": Field("", 'The file of the tokenizer "file": a SentencePiece .model or a '
                              "tokenizer.json."),
      "vocab_size": Field(257, "The number of tokens of the model; a tokenizer may have fewer."),
      "byte_fallback": Field(False, "Whether characters that are not in the training text become "
                             "bytes; otherwise they are refused."),
      "documents": Field(False, "Whether each document is read on its own; otherwise all are read "
                         "as one text."),
      "length": Field(64, "The number of tokens in a window, and in the longest piece that a "
                      "document is cut into."),
      "buckets": Field(ragged.MAX_BUCKETS, "The number of lengths that batches of documents are "
                       "padded to."),
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data`; raises `UserError`."""
  need = functools.partial(splits.need, config)
  if config.tokenizer not in tokenize.TOKENIZERS:
    raise unknown("--config.data.tokenizer", config.tokenizer, tokenize.TOKENIZERS)
  need("length", config.length >= 1, "give at least 1 token")
  need("train", bool(config.train), "name the split to train on")
  need("vocab_size", config.vocab_size >= 2, "give at least 2")
  if config.tokenizer == "byte":
    need("vocab_size", config.vocab_size >= tokenize.Bytes.size,
         f"bytes need {tokenize.Bytes.size}")
  if config.tokenizer in ("bpe", "wordpiece", "unigram"):
    need("vocab_size", config.vocab_size >= _LEAST_VOCABULARY,
         f"sub-words need at least {_LEAST_VOCABULARY}")
  need("tokenizer_file", not config.tokenizer_file or config.tokenizer == "file",
       "goes with --config.data.tokenizer=file; add it, or drop this")
  need("tokenizer_file", config.tokenizer != "file" or bool(config.tokenizer_file),
       "name a SentencePiece .model or a tokenizer.json")
  if not config.file:
    sources.parse_name(config.name)
    return
  for split in _SPLITS:
    need(split, config[split] in ("", split),
         f"a file has only the split {split}; write {split}, or nothing")


def split_text(text: str) -> dict[str, str]:
  """The splits of one text, in order: 90 % of its characters, and two halves of the rest."""
  rest = int(len(text) * 0.9)
  middle = rest + int((len(text) - rest) * 0.5)
  return {"train": text[:rest], "validation": text[rest:middle], "test": text[middle:]}


def read_file(path: str | Path, flag: str) -> str:
  """The text in a UTF-8 file.

  Raises:
    UserError: the file cannot be read, is no UTF-8, or is empty; the message starts with `flag`,
      from which the path came.
  """
  try:
    text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{flag}={path} is not UTF-8 (byte {error.start}); convert it, e.g. by iconv "
                    "-t utf-8") from None
  except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte in the path
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{flag}={path} cannot be read ({reason}); name a file of text") from None
  if not text:
    raise UserError(f"{flag}={path} is empty; name a file of text")
  return text


class TextSet(splits.DataSet):
  """What the pipelines of one config share: the documents, and the tokenizer.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    super().__init__(config)
    self._tokenizer: tokenize.Tokenizer | None = None

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    config, read = self.config, functools.partial(self.read, split)
    if not config.documents:
      return streams.Streams(read, length=config.length, **options)
    counts = not options["train"]
    return ragged.RaggedPipeline(
        lambda _: streams.Documents(read(), config.length, self.tokenizer().end, counts=counts),
        lambda documents, plan: documents.gather(plan, plan.rows), longest=config.length,
        flag="--config.data.length", buckets=config.buckets, **options)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    row = (self.config.length,)
    return {"tokens": (row, np.int32), "targets": (row, np.int32),
            "target_weight": (row, np.float32), "length": ((), np.int32),
            "reset": ((), np.float32)}

  def fields(self) -> Mapping[str, Any]:
    """See `DataSet.fields`."""
    fields = {"restore": self.restore, "assets": lambda: {ASSET: self.tokenizer().to_json()}}
    if file := self.config.file:
      fields |= {"name": file, "fingerprint": lambda: self.fingerprint_of(file)}
    return fields

  def restore(self, assets: Mapping[str, Any]) -> None:
    """Takes the tokenizer that a run has saved; call it before anything is opened.

    Raises:
      UserError: the tokenizer is damaged, or another run's.
    """
    tokenizer = tokenize.from_json(assets.get(ASSET))
    if tokenizer.size > self.config.vocab_size:
      raise UserError(f"data/{ASSET}.json has {tokenizer.size} tokens, and "
                      f"--config.data.vocab_size is {self.config.vocab_size}; take that file from "
                      "a copy of the run, or train again")
    with self.lock:
      self._tokenizer = tokenizer

  def tokenizer(self) -> tokenize.Tokenizer:
    """The run's tokenizer after `restore`, otherwise a new one, fitted to the training text."""
    config = self.config
    with self.lock:
      if self._tokenizer is None:
        documents = self._documents("train") if config.tokenizer in tokenize.FITTED else ()
        made = tokenize.make(config.tokenizer, documents, vocab_size=config.vocab_size,
                             byte_fallback=config.byte_fallback, file=config.tokenizer_file)
        if made.size > config.vocab_size:
          raise UserError(f"--config.data.vocab_size={config.vocab_size}: the tokenizer has "
                          f"{made.size} tokens; give that number")
        self._tokenizer = _agreed(made) if config.tokenizer in tokenize.FITTED else made
      return self._tokenizer

  def read(self, split: str) -> tuple[tokenize.Encoded, np.ndarray]:
    """A split's documents as one text, with `end` before each; and i64[n], where each starts."""
    tokenizer = self.tokenizer()
    before = tokenize.Encoded(np.array([tokenizer.end], np.int32), *np.zeros((2, 1), np.int32))
    parts, begins, size = [], [], 0
    for i, document in enumerate(self._documents(split)):
      encoded = tokenizer.encode(document, f"{self._flag(split)}, document {i}")
      parts += [before, encoded]
      begins.append(size)
      size += 1 + len(encoded.tokens)
    if size <= len(begins):
      raise UserError(f"{self._flag(split)} has no text; name another")
    return tokenize.Encoded(*map(np.concatenate, zip(*parts))), np.array(begins)

  def _flag(self, split: str) -> str:
    config = self.config
    return f"--config.data.file={config.file} ({split})" if config.file else (
        f"--config.data.{split}={config[split]!r}")

  def _documents(self, split: str) -> list[str]:
    config = self.config
    if config.file:
      read = functools.partial(read_file, config.file, "--config.data.file")
      return [split_text(self.read_own(config.file, read))[split]]
    records = self.dataset.records(config[split])
    return [self._text(split, i, record[config.field])
            for i, record in enumerate(records[range(len(records))])]

  def _text(self, split: str, number: int, values: Sequence[bytes]) -> str:
    """The text of a record's field."""
    try:
      return values[0].decode()
    except (IndexError, AttributeError, UnicodeDecodeError) as error:
      raise UserError(f"{self._flag(split)}, document {number}: {self.config.field} holds no "
                      f"text in UTF-8 ({error}); prepare the set again") from error

  def check(self, dataset: sources.Dataset) -> None:
    """See `DataSet.check`."""
    config = self.config
    features = {name for name, feature in dataset.features.items()
                if type(feature).__name__ == "Text"}
    if config.field not in features:
      if not features:
        raise UserError(f"--config.data.name: {config.name} has no text, but "
                        f"{', '.join(dataset.features)}; choose another set")
      raise unknown("--config.data.field", config.field, features)
    super().check(dataset)


def _agreed(tokenizer: tokenize.Tokenizer) -> tokenize.Tokenizer:
  """The first host's tokenizer, for every host: two tokenizers fitted to one text may differ."""
  if jax.process_count() == 1:
    return tokenizer
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(tokenizer.to_json()).encode(), np.uint8)
  padded = np.zeros(int(multihost_utils.broadcast_one_to_all(np.int32(len(data)))), np.uint8)
  padded[:len(data)] = data[:len(padded)]
  return tokenize.from_json(json.loads(bytes(multihost_utils.broadcast_one_to_all(padded))))


def encode_prompts(
    texts: Sequence[str], names: Sequence[str], tokenizer: tokenize.Tokenizer,
) -> HostBatch:
  """Encodes prompts for the model to continue.

  Args:
    texts: the prompts, which may be empty.
    names: their names, for the message about a prompt that cannot be encoded.
    tokenizer: the run's tokenizer.

  Returns:
    A batch of prompt i32[n, P], each with `end` before it and padded; length i32[n]; id i32[n],
    the prompts' numbers; and mask f32[n].
  """
  rows = [np.append(np.int32(tokenizer.end), tokenizer.encode(text, name).tokens)
          for text, name in zip(texts, names)]
  length = np.array([len(row) for row in rows], np.int32)
  none = np.zeros((0, 1), np.int32)
  return {"prompt": ragged.pad(rows, length.max(initial=1)) if rows else none, "length": length,
          "id": np.arange(len(rows), dtype=np.int32), "mask": np.ones(len(rows), np.float32)}
