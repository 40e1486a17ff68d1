"""Text for masked language models: rows in which some tokens are hidden.

Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova. "BERT: Pre-training of Deep
Bidirectional Transformers for Language Understanding", 2019. https://arxiv.org/abs/1810.04805

As in section 3.1 (task 1), 15 % of a document's tokens are to be predicted. Of these, 80 % are
replaced by the mask token, 10 % by another token, and 10 % stay as they are, so that a model
cannot know which tokens it is asked for. With whole words (a later form by the same authors), the
tokens of a word are chosen together. What is drawn depends on (seed, step) in training, so that
each epoch hides other tokens, and on the row's id in evaluation.

A batch holds

  tokens         i32[b, L], each document in its frame, see `frames.py`
  places         i32[b, M], where in its row a token is to be predicted, in order; 0 at padding
  targets        i32[b, M], the token that was there
  target_weight  f32[b, M], 0 at padding
  length         i32[b], the number of tokens in a row that are no padding
  segment, position  i32[b, L], of packed documents; see `corpus`
  mask, id       see `data/pipeline.py`
"""

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from dljax.config import Group
from dljax.data import ragged, splits
from dljax.data.pipeline import PADDING, HostBatch, IndexedPipeline, Pipeline, Plan, rng
from dljax.data.text import corpus, frames, packing, tokenize
from dljax.errors import UserError

MASK = "[MASK]"  # how a user's text spells the mask token, whatever the tokenizer
MASKED, REPLACED = 0.8, 0.1  # of the tokens to be predicted
ROOM = 1.5  # M over the share of L, where the numbers of chosen tokens vary
_IDEOGRAPHS = (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)
_SPACE, _PART, _ALONE = range(3)  # kinds of characters; words are runs of the second


def default_config() -> Group:
  """The fields of `config.data`."""
  config = corpus.default_config()
  del config["eval_stride"]
  config.update({"mask_rate": 0.15, "whole_words": False})
  config.describe({
      "mask_rate": "The share of a document's tokens that are to be predicted.",
      "whole_words": "Whether the tokens of a word are hidden together.",
      "documents": "Whether each document is read on its own; otherwise all are read as one text, "
                   "which is cut into pieces.",
      "length": "The number of tokens in the longest piece that a text is cut into, with one token "
                "before and one after it."})
  return config


class MaskedTextSet(corpus.TextSet):
  """What the pipelines of one config share: the documents, and the tokenizer.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    super().__init__(config, carried=False, framed=True)
    splits.need(config, "mask_rate", 0 < config.mask_rate < 1, "give a number between 0 and 1")
    splits.need(config, "length", config.length >= 3,
                "give at least 3 tokens, one between the start and the end")

  def tokenizer(self) -> tokenize.Tokenizer:
    """See `TextSet.tokenizer`; raises `UserError` if it has no mask token."""
    made = super().tokenizer()
    if "mask" not in frames.roles(made):
      raise UserError(f"--config.data.tokenizer={self.config.tokenizer}: has no token that hides "
                      "others; choose wordpiece, or a folder of weights whose tokenizer has one")
    return made

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    config = self.config

    def finish(rows: Any, plan: Plan) -> HostBatch:
      return self._hide(rows.gather(plan, plan.rows), plan, options["train"])

    def framed() -> Framed:
      text, begins = self.read(split)
      if not config.documents:
        begins = begins[:1]
      words = self._word_begins(split) if config.whole_words else None
      return Framed(text.tokens, begins, config.length, self.tokenizer(), words)

    if config.packed:
      return IndexedPipeline(
          lambda _: packing.Packed(framed(), config.length), finish, **options)
    return ragged.RaggedPipeline(
        lambda _: framed(), finish, longest=config.length, flag="--config.data.length",
        buckets=config.buckets, **options)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    shapes = {field: shape for field, shape in super().shapes().items() if field != "reset"}
    row = (self._most(self.config.length),)
    return shapes | {"places": (row, np.int32), "targets": (row, np.int32),
                     "target_weight": (row, np.float32)}

  def _most(self, length: int) -> int:
    """M, the number of tokens that can be predicted in a row of `length`.

    A row that holds one document has room for its share. Where words are taken whole, or short
    documents share rows and each has a token to be predicted, numbers vary. In the rare row where
    more than M tokens are chosen, those after the first M are left as they are.
    """
    share = self.config.mask_rate * length
    if self.config.packed or self.config.whole_words:
      share = min(ROOM * share + 1, length)
    return max(1, math.floor(share + 0.5))

  def _word_begins(self, split: str) -> np.ndarray:
    """bool, for each token of `read` whether it begins a word."""
    parts = []
    for text, encoded in self.encoded(split):
      parts += [[True], word_begins(text, encoded.characters)]
    return np.concatenate(parts)

  def _hide(self, batch: HostBatch, plan: Plan, train: bool) -> HostBatch:
    """The batch with tokens hidden; its fields "candidate" and "begins_word" are taken out."""
    tokenizer, config = self.tokenizer(), self.config
    length = batch["tokens"].shape[1]
    if train:  # drawn for the global batch, as every host must draw alike
      draws = plan.rng("hidden").random((len(plan.indices), length, 3))[plan.rows]
    else:
      draws = np.stack([rng(0, max(int(index), 0), "hidden").random((length, 3))
                        for index in plan.indices[plan.rows]])
    candidate, begins = batch.pop("candidate"), batch.pop("begins_word")
    document = batch.get("segment", np.ones_like(batch["tokens"]))
    chosen = choose(candidate, begins, document, draws[..., 0], config.mask_rate)
    others = np.setdiff1d(np.arange(tokenizer.size), frames.special_tokens(tokenizer))
    another = others[(draws[..., 2] * len(others)).astype(np.int64)]
    most = self._most(length)
    chosen &= np.cumsum(chosen, axis=1) <= most
    kind = np.where(chosen, draws[..., 1], 1)
    tokens = np.where(kind < MASKED, frames.roles(tokenizer)["mask"],
                      np.where(kind < MASKED + REPLACED, another, batch["tokens"]))
    # The chosen places come first, in order.
    places = np.argsort(~chosen, axis=1, kind="stable")[:, :most]
    real = np.take_along_axis(chosen, places, axis=1)
    targets = np.take_along_axis(batch["tokens"], places, axis=1)
    return {**batch, "tokens": tokens.astype(np.int32),
            "places": np.where(real, places, 0).astype(np.int32),
            "targets": np.where(real, targets, 0).astype(np.int32),
            "target_weight": real.astype(np.float32)}


class Framed:
  """Documents, each in its frame; long ones are cut into pieces.

  These are `packing.Pieces` and `ragged.RaggedExamples`.

  Args:
    tokens: i32[n], the documents as one text, with `end` before each.
    begins: where each document, with that `end`, begins.
    length: the greatest number of tokens in a piece, with its frame.
    tokenizer: the tokenizer.
    word_begins: bool[n], whether a token begins a word; None if each token counts as a word.
  """

  def __init__(
      self, tokens: np.ndarray, begins: np.ndarray, length: int, tokenizer: tokenize.Tokenizer,
      word_begins: np.ndarray | None = None,
  ):
    self._tokens, self._words = tokens, word_begins
    self._frame = frames.frame(tokenizer)
    self._special = frames.special_tokens(tokenizer)
    self._begins, sizes = packing.cut(begins + 1, np.append(begins[1:], len(tokens)), length - 2)
    self.lengths = sizes + 2

  def __len__(self) -> int:
    return len(self.lengths)

  def gather(self, plan: ragged.RaggedPlan, rows: np.ndarray) -> HostBatch:
    return packing.lay_out(
        self, [np.full(int(index != PADDING), index) for index in plan.indices[rows]], plan.padded)

  def read(self, indices: np.ndarray) -> HostBatch:
    """See `packing.Pieces`: tokens, candidate (whether a token may be hidden), begins_word."""
    before, after = self._frame
    tokens, candidate, begins = [], [], []
    for i in indices:
      part = slice(self._begins[i], self._begins[i] + self.lengths[i] - 2)
      content = self._tokens[part]
      words = np.ones(len(content), bool) if self._words is None else self._words[part]
      tokens += [[before], content, [after]]
      candidate += [[False], ~np.isin(content, self._special), [False]]
      begins += [[True], words, [True]]
    join = lambda parts, dtype: np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
    return {"tokens": join(tokens, np.int32), "candidate": join(candidate, bool),
            "begins_word": join(begins, bool)}

  def close(self) -> None:
    pass


def choose(
    candidate: np.ndarray, begins_word: np.ndarray, document: np.ndarray, draws: np.ndarray,
    rate: float,
) -> np.ndarray:
  """Chooses tokens to be predicted: of each document its share, rounded, and at least one.

  Words are taken in a drawn order until the share is reached as nearly as their lengths allow.

  Args:
    candidate: bool[b, L], which tokens may be chosen.
    begins_word: bool[b, L], which tokens begin a word.
    document: i32[b, L], the document in its row that a token belongs to.
    draws: f64[b, L], uniform numbers from 0 to 1.
    rate: the share.

  Returns:
    bool[b, L].
  """
  places = np.flatnonzero(candidate)
  if not len(places):
    return np.zeros_like(candidate)
  row = places // candidate.shape[1]
  changes = np.diff(row, prepend=-1) + np.abs(np.diff(document.ravel()[places], prepend=-1)) > 0
  # A token that may not be chosen also ends a word.
  first = changes | begins_word.ravel()[places] | (np.diff(places, prepend=-2) > 1)
  word = np.cumsum(first) - 1
  size = np.bincount(word)
  text = np.cumsum(changes)[first] - 1  # the document of each word
  wanted = np.maximum(1, np.floor(rate * np.bincount(text, size) + 0.5))
  order = np.lexsort((draws.ravel()[places[first]], text))
  size, text = size[order], text[order]
  before = np.cumsum(size) - size
  before -= before[np.searchsorted(text, text)]
  taken = np.zeros(len(order), bool)
  taken[order] = (before + (size - 1) / 2 < wanted[text]) | (before == 0)
  chosen = np.zeros(candidate.size, bool)
  chosen[places] = taken[word]
  return chosen.reshape(candidate.shape)


def word_begins(text: str, characters: np.ndarray) -> np.ndarray:
  """Whether each token of a text begins a word.

  A word is a run of letters, marks and digits; a punctuation mark, a symbol and an ideograph are
  each a word of their own. Spaces belong to no word, and a token of several words to its first.

  Args:
    text: the text.
    characters: i32[n], the number of its characters that each token stands for.

  Returns:
    bool[n].
  """
  points, places = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32),
                             return_inverse=True)
  kinds = np.array([_kind(chr(point)) for point in points], np.int8)[places]
  begin = (kinds == _ALONE) | (kinds == _PART) & (np.roll(kinds, 1) != _PART)
  begin[:1] = True
  word = np.append(np.cumsum(begin), -1)
  ink = np.where(kinds == _SPACE, len(text), np.arange(len(text)))
  ink = np.append(np.minimum.accumulate(ink[::-1])[::-1], len(text))  # the next that is no space
  starts = np.cumsum(characters) - characters
  # Tokens of spaces alone are no part of a word: each has a negative number of its own.
  of_token = np.where(ink[starts] < starts + characters, word[ink[starts]], -2 - starts)
  real = characters > 0  # other tokens continue a character
  found = np.zeros(len(characters), bool)
  found[real] = np.diff(of_token[real], prepend=0) != 0
  found[:1] = True
  return found


def encode_texts(
    texts: Sequence[str], names: Sequence[str], tokenizer: tokenize.Tokenizer, length: int,
) -> HostBatch:
  """Encodes texts in which `MASK` stands for what is to be predicted.

  Args:
    texts: the texts.
    names: their names, for messages.
    tokenizer: the run's tokenizer.
    length: the greatest number of tokens of a text, with its frame.

  Returns:
    A batch of tokens i32[n, P], places i32[n, M] and length i32[n], padded; number i32[n], how many
    places of a row are real; id i32[n], the texts' numbers; and mask f32[n].

  Raises:
    UserError: a text has no `MASK`, is too long or cannot be encoded.
  """
  (before, after), mask = frames.frame(tokenizer), frames.roles(tokenizer)["mask"]
  rows, places = [], []
  for text, name in zip(texts, names):
    row = [before]
    # Of a space before the mask some tokenizers would make a token of its own.
    parts = [part.rstrip() for part in text.split(MASK)[:-1]] + text.split(MASK)[-1:]
    found = []
    for i, part in enumerate(parts):
      if i:
        found.append(len(row))
        row.append(mask)
      row += tokenizer.encode(part, name).tokens.tolist() if part else []
    row.append(after)
    if not found:
      raise UserError(f"{name}: the text has no {MASK}; write it where a word is to be predicted")
    if len(row) > length:
      raise UserError(f"{name}: the text has {len(row)} tokens, and the model reads {length}; "
                      "shorten it")
    rows.append(np.array(row, np.int32))
    places.append(np.array(found, np.int32))
  count = lambda parts: np.array([len(part) for part in parts], np.int32)
  return {"tokens": ragged.pad(rows, max(map(len, rows))),
          "places": ragged.pad(places, max(map(len, places))), "number": count(places),
          "length": count(rows), "id": np.arange(len(rows), dtype=np.int32),
          "mask": np.ones(len(rows), np.float32)}


@functools.cache
def _kind(character: str) -> int:
  if any(first <= ord(character) <= last for first, last in _IDEOGRAPHS):
    return _ALONE
  category = unicodedata.category(character)
  if category[0] == "Z" or category == "Cc":
    return _SPACE
  return _ALONE if category[0] in "PS" else _PART
