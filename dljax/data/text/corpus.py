"""Text for language models: the config that they share, and its pipelines.

A batch holds tokens i32[b, L + 1], of which the first L are read and the last L are to be predicted; mask f32[b], 0
where a row predicts nothing; reset f32[b], 1 where a row begins anew; where rows may be padded length i32[b], how many
tokens of each are to be predicted; and in evaluation characters and bytes f32[b], how many of the text's these are,
and "host/position" i64[b], the place in the split's tokens of the first that is read.

Either the documents of a split are one text in reading order, cut into as many parallel streams as a batch has rows, of
which step s gives the s-th window, so that a state that is carried from batch to batch has read all that came before
(truncated backpropagation through time; Werbos 1990, "Backpropagation through time: what it does and how to do it").
Or each document stands for itself, in batches of documents of like length (`ragged`). Either way an evaluation predicts
every token of its split once: the first of a text from `Tokenizer.end`.
"""

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dljax.data import ragged, sources, splits
from dljax.data.text import tokenize
from dljax.data.pipeline import PADDING, HostBatch, Pipeline, rng
from dljax.errors import UserError, unknown

ASSET = "tokenizer"
_SPLITS = ("train", "validation", "test")
_LEAST_VOCABULARY = 300  # of a sub-word tokenizer: 256 bytes and some words


def default_config() -> ml_collections.ConfigDict:
  """The fields of `config.data`."""
  return ml_collections.ConfigDict({
      "name": "pydoc",  # a TFDS name, possibly with config and version
      "file": "",  # a UTF-8 text of your own in place of it, whose parts are split_text's
      "field": "text",  # the feature of the set that holds the text
      "train": "train",  # TFDS split expressions that must not overlap, e.g. train[:90%]; "" for none
      "validation": "validation",
      "test": "test",
      "tokenizer": "byte",  # one of tokenize.TOKENIZERS
      "tokenizer_file": "",  # for "file": a SentencePiece .model or a tokenizer.json
      "vocab_size": 257,  # of the model; a tokenizer may have fewer tokens
      "byte_fallback": False,  # write characters that training has not seen as bytes, instead of refusing them
      "documents": False,  # each document for itself, instead of one text in reading order
      "length": 64,  # tokens of a window, and of the longest piece that a document is cut into
      "buckets": ragged.MAX_BUCKETS,  # lengths that batches of documents are padded to
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data`; raises `UserError`."""
  def need(field: str, ok: bool, mend: str) -> None:
    if not ok:
      raise UserError(f"--config.data.{field}={config[field]!r}: {mend}")

  if config.tokenizer not in tokenize.TOKENIZERS:
    raise unknown("--config.data.tokenizer", config.tokenizer, tokenize.TOKENIZERS)
  need("length", config.length >= 1, "give at least 1 token")
  need("train", bool(config.train), "name the split to train on")
  need("vocab_size", config.vocab_size >= 2, "give at least 2")
  if config.tokenizer == "byte":
    need("vocab_size", config.vocab_size >= tokenize.Bytes.size, f"bytes need {tokenize.Bytes.size}")
  if config.tokenizer in ("bpe", "wordpiece", "unigram"):
    need("vocab_size", config.vocab_size >= _LEAST_VOCABULARY, f"sub-words need at least {_LEAST_VOCABULARY}")
  need("tokenizer_file", not config.tokenizer_file or config.tokenizer == "file",
       "goes with --config.data.tokenizer=file; add it, or drop this")
  need("tokenizer_file", config.tokenizer != "file" or bool(config.tokenizer_file),
       "name a SentencePiece .model or a tokenizer.json")
  if not config.file:
    sources.parse_name(config.name)
    return
  for split in _SPLITS:
    need(split, config[split] in ("", split), f"of a file there is only the split {split}; write {split}, or nothing")


def split_text(text: str) -> dict[str, str]:
  """The parts of one text, in order: 90 % of its characters for training, then half and half of the rest."""
  rest = int(len(text) * 0.9)
  middle = rest + int((len(text) - rest) * 0.5)
  return {"train": text[:rest], "validation": text[rest:middle], "test": text[middle:]}


def read_file(path: str | Path, flag: str) -> str:
  """The text of a UTF-8 file.

  Raises:
    UserError: it cannot be read, is no UTF-8, or is empty; `flag` says where its name came from.
  """
  try:
    text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
  except OSError as error:
    raise UserError(f"{flag}={path} cannot be read ({error.strerror}); name a file of text") from None
  except UnicodeDecodeError as error:
    raise UserError(f"{flag}={path} is not UTF-8 (byte {error.start}); convert it, e.g. by iconv -t utf-8") from None
  if not text:
    raise UserError(f"{flag}={path} is empty; name a file of text")
  return text


class TextSet:
  """What the pipelines of one config share: the documents, and the tokenizer.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    self._config = ml_collections.FrozenConfigDict(config)  # later changes are not ours
    self._tokenizer: tokenize.Tokenizer | None = None
    self._lock = threading.RLock()

  def pipelines(
      self, *, batch_size: int, eval_batch_size: int, seed: int, host: int | None = None, hosts: int | None = None,
  ) -> splits.Data:
    """The text's pipelines; opens nothing.

    Args:
      batch_size: rows of a global training batch.
      eval_batch_size: rows of a global evaluation batch.
      seed: the run's seed.
      host: this host's number and
      hosts: how many there are; by default what JAX says.

    Raises:
      UserError: a value out of range; when opened, data that is missing or does not fit the config.
    """
    config, common = self._config, {"host": host, "hosts": hosts}

    def pipeline(split: str, size: int) -> Pipeline:
      read, train = functools.partial(self.read, split), split == "train"
      if not config.documents:
        return Streams(read, batch_size=size, length=config.length, seed=seed, train=train, **common)
      return ragged.RaggedPipeline(
          lambda _: Documents(read(), config.length, self.tokenizer().end, counts=not train),
          lambda documents, plan: documents.gather(plan, plan.rows), longest=config.length,
          flag="--config.data.length", buckets=config.buckets, batch_size=size, seed=seed, train=train, **common)

    spec = {"tokens": ((config.length + 1,), np.int32), "mask": ((), np.float32), "reset": ((), np.float32)}
    if config.documents:
      spec["length"] = ((), np.int32)
    return splits.Data(
        name=config.file or config.name, train=pipeline("train", batch_size),
        evals={split: pipeline(split, eval_batch_size) for split in ("validation", "test") if config[split]},
        batch_spec={key: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for key, (shape, dtype) in spec.items()},
        fingerprint=self.fingerprint, assets=lambda: {ASSET: self.tokenizer().to_json()}, restore=self.restore)

  def fingerprint(self) -> str:
    """See `Data`."""
    if self._config.file:
      return splits.file_fingerprint(self._config.file)
    return sources.open_dataset(self._config.name).fingerprint

  def restore(self, assets: Mapping[str, Any]) -> None:
    """Takes the tokenizer that a run has saved; to be called before anything is opened."""
    with self._lock:
      self._tokenizer = tokenize.from_json(assets[ASSET])

  def tokenizer(self) -> tokenize.Tokenizer:
    """What the text is read by: the run's tokenizer after `restore`, else one that is fitted to the training text."""
    config = self._config
    with self._lock:
      if self._tokenizer is None:
        documents = self._documents("train") if config.tokenizer in tokenize.FITTED else ()
        made = tokenize.make(config.tokenizer, documents, vocab_size=config.vocab_size,
                             byte_fallback=config.byte_fallback, file=config.tokenizer_file)
        if made.size > config.vocab_size:
          raise UserError(f"--config.data.vocab_size={config.vocab_size}: the tokenizer has {made.size} tokens; give "
                          "that")
        self._tokenizer = _agreed(made) if config.tokenizer in tokenize.FITTED else made
      return self._tokenizer

  def read(self, split: str) -> tuple[tokenize.Encoded, np.ndarray]:
    """The documents of a split as one text, `end` before each; and i64[n], where each begins."""
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
    config = self._config
    return f"--config.data.file={config.file} ({split})" if config.file else (
        f"--config.data.{split}={config[split]!r}")

  def _documents(self, split: str) -> list[str]:
    config = self._config
    if config.file:
      return [split_text(read_file(config.file, "--config.data.file"))[split]]
    dataset = sources.open_dataset(config.name)
    features = {name for name, feature in dataset.features.items() if type(feature).__name__ == "Text"}
    if config.field not in features:
      if not features:
        raise UserError(f"--config.data.name: {config.name} has no text, but {', '.join(dataset.features)}; choose "
                        "another set")
      raise unknown("--config.data.field", config.field, features)
    splits.check_splits(dataset, config)
    records = dataset.records(config[split])
    return [record[config.field][0].decode() for record in records[range(len(records))]]


class Streams:
  """The `Pipeline` of one text in reading order, in as many streams as a batch has rows.

  Training cuts as many whole windows as there are out of the text, from another place on in each epoch, so that no part
  of it is left out for ever; every epoch begins with `reset`. Evaluation pads and masks the streams' ends.

  Args:
    read: () -> (the text, where its documents begin); called once, by `open`.
    batch_size: B, of the global batch.
    length: L, the tokens of a window.
    seed: of the run.
    train: repeat for ever; otherwise one pass.
    host: this host's number and
    hosts: how many there are; by default what JAX says when the data is opened.
  """

  def __init__(
      self, read: Callable[[], tuple[tokenize.Encoded, np.ndarray]], *, batch_size: int, length: int, seed: int = 0,
      train: bool = False, host: int | None = None, hosts: int | None = None,
  ):
    self._read, self._size, self._length, self._seed, self._train = read, batch_size, length, seed, train
    self._host, self._hosts = host, hosts
    self._text: tokenize.Encoded | None = None
    self._lock = threading.RLock()

  def open(self) -> bool:
    with self._lock:
      if self._text is not None:
        return False
      if self._hosts is None:
        self._host, self._hosts = jax.process_index(), jax.process_count()
      if self._size % self._hosts:
        raise UserError(f"--config.batch_size={self._size} is not a multiple of the {self._hosts} hosts")
      text, _ = self._read()
      targets = len(text.tokens) - 1
      if self._train and targets < self._size * self._length:
        raise UserError(f"--config.data.length={self._length}: the training text has {targets} tokens, too few for "
                        f"one window in each of {self._size} streams; make it or --config.batch_size smaller")
      self._text = text
      return True

  def close(self) -> None:
    with self._lock:
      self._text = None

  @property
  def num_examples(self) -> int:
    """Windows, of all streams."""
    return self.num_batches * self._size

  @property
  def num_batches(self) -> int:
    targets = self._targets()
    return targets // (self._size * self._length) if self._train else -(-self._per_stream(targets) // self._length)

  def batch(self, step: int) -> HostBatch:
    targets, length, windows = self._targets(), self._length, self.num_batches
    rows = np.arange(self._host, self._size, self._hosts)
    epoch, window = divmod(step, windows)
    if self._train:
      spare = targets - windows * length * self._size
      first = int(rng(self._seed, epoch, "first").integers(spare + 1))
      begins = first + (rows * windows + window) * length
      counts = np.full(len(rows), length)
    else:
      if epoch:
        raise IndexError(f"batch {step} of a pass over {windows} windows")
      stream = self._per_stream(targets)
      begins = rows * stream + window * length
      counts = np.clip(np.minimum(stream - window * length, targets - begins), 0, length)
    batch = _windows(self._text, begins, counts, length, padded=not self._train, counts_of_text=not self._train)
    return {**batch, "reset": np.full(len(rows), window == 0, np.float32)}

  def _targets(self) -> int:
    if self._text is None:
      raise RuntimeError("open() the pipeline first")
    return len(self._text.tokens) - 1

  def _per_stream(self, targets: int) -> int:
    return -(-targets // self._size)


class Documents:
  """The `RaggedExamples` of documents, each for itself and closed by `end`; a long one in pieces.

  Args:
    text: (the documents as one text, `end` before each; where each begins).
    length: the longest piece, in tokens to be predicted.
    end: the token.
    counts: whether batches tell of the characters and bytes.
  """

  def __init__(self, text: tuple[tokenize.Encoded, np.ndarray], length: int, end: int, *, counts: bool):
    encoded, begins = text
    self._text = tokenize.Encoded(np.append(encoded.tokens, np.int32(end)), *(np.append(x, 0) for x in encoded[1:]))
    self._longest, self._counts = length, counts
    sizes = np.diff(begins, append=len(encoded.tokens))  # of a document with the `end` behind it, to be predicted
    pieces = -(-sizes // length)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    self._begins = np.repeat(begins, pieces) + piece * length
    self.lengths = np.minimum(np.repeat(sizes, pieces) - piece * length, length)

  def __len__(self) -> int:
    return len(self.lengths)

  def gather(self, plan: ragged.RaggedPlan, rows: np.ndarray) -> HostBatch:
    indices = plan.indices[rows]
    begins, counts = self._begins[indices], np.where(indices == PADDING, 0, self.lengths[indices])
    batch = _windows(self._text, begins, counts, plan.padded, padded=True, counts_of_text=self._counts)
    return {**batch, "reset": np.ones(len(rows), np.float32), "host/id": indices}

  def close(self) -> None:
    pass


def _agreed(tokenizer: tokenize.Tokenizer) -> tokenize.Tokenizer:
  """The first host's tokenizer, on every host: two that were fitted to one text may differ."""
  if jax.process_count() == 1:
    return tokenizer
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(tokenizer.to_json()).encode(), np.uint8)
  padded = np.zeros(int(multihost_utils.broadcast_one_to_all(np.int32(len(data)))), np.uint8)
  padded[:len(data)] = data[:len(padded)]
  return tokenize.from_json(json.loads(bytes(multihost_utils.broadcast_one_to_all(padded))))


def _windows(
    text: tokenize.Encoded, begins: np.ndarray, counts: np.ndarray, length: int, *, padded: bool, counts_of_text: bool,
) -> HostBatch:
  """The windows from `begins` on in which `counts` tokens are to be predicted, padded to `length`."""
  offsets = np.arange(length + 1)
  inside = (offsets <= counts[:, None]) & (counts[:, None] > 0)
  places = np.where(inside, np.minimum(begins[:, None] + offsets, len(text.tokens) - 1), 0)
  batch = {"tokens": np.where(inside, text.tokens[places], 0).astype(np.int32),
           "mask": (counts > 0).astype(np.float32)}
  if padded:
    batch["length"] = counts.astype(np.int32)
  if counts_of_text:
    predicted = inside[:, 1:]
    batch["characters"] = np.sum(text.characters[places[:, 1:]] * predicted, axis=1).astype(np.float32)
    batch["bytes"] = np.sum(text.bytes[places[:, 1:]] * predicted, axis=1).astype(np.float32)
    batch["host/position"] = np.where(counts > 0, begins, PADDING)
  return batch


def encode_prompts(texts: Sequence[str], names: Sequence[str], tokenizer: tokenize.Tokenizer) -> HostBatch:
  """Prompts to be continued.

  Args:
    texts: the prompts; may be empty.
    names: of each, for the message of one that cannot be encoded.
    tokenizer: of the run.

  Returns:
    prompt i32[n, P], `end` before each and padded; length i32[n]; id i32[n], their numbers; mask f32[n].
  """
  rows = [np.append(np.int32(tokenizer.end), tokenizer.encode(text, name).tokens) for text, name in zip(texts, names)]
  length = np.array([len(row) for row in rows], np.int32)
  return {"prompt": ragged.pad(rows, length.max(initial=1)) if rows else np.zeros((0, 1), np.int32), "length": length,
          "id": np.arange(len(rows), dtype=np.int32), "mask": np.ones(len(rows), np.float32)}
