"""From text to tokens and back: bytes, characters, and sub-words by Hugging Face's `tokenizers`.

Every tokenizer has a token `end`, which comes before each document and stands for no text. Besides
the tokens, a tokenizer gives the number of characters and of UTF-8 bytes that each token stands
for. What a sub-word tokenizer drops (most drop some white space) counts for the token before it.
The numbers therefore add up to those of the text, and a loss per token becomes a loss per
character or byte without error.
"""

import base64
import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dljax.data.text import sentencepiece
from dljax.errors import UserError, one_line, unknown

FITTED = ("character", "bpe", "wordpiece", "unigram")  # the kinds fitted to the training text
TOKENIZERS = ("byte", *FITTED, "file")
END = "<|endoftext|>"
UNKNOWN = "<unk>"
# Names of `end` in other people's files, the best first.
_ENDS = (END, "</s>", "[SEP]", "<eos>", "<s>", "[CLS]")
_BYTES = 256
_FILE = "--config.data.tokenizer_file"
_ASSET = "data/tokenizer.json"  # where a run keeps its tokenizer
_LARGEST_FILE = 2**27  # bytes
_LARGEST_VOCABULARY = 2**22  # tokens; the library lists all numbers that are not in use
_MOST_GROWTH = 1000  # how many characters a file may make of one


class Encoded(NamedTuple):
  """A text as tokens.

  Attributes:
    tokens: i32[n].
    characters: i32[n], the number of the text's characters that each token stands for.
    bytes: i32[n], the number of bytes of those characters in UTF-8.
  """

  tokens: np.ndarray
  characters: np.ndarray
  bytes: np.ndarray


class Tokenizer(Protocol):
  """What the data and the command line need of a tokenizer.

  Attributes:
    size: the number of different tokens.
    end: the token before each document.
  """

  size: int
  end: int

  def encode(self, text: str, where: str) -> Encoded:
    """The tokens of a text, without `end`.

    Raises:
      UserError: the text cannot be encoded; the message names it by `where`.
    """

  def decode(self, tokens: Sequence[int]) -> str:
    """The text that tokens stand for, with U+FFFD for what is no text (half a character)."""

  def to_json(self) -> Mapping[str, Any]:
    """A value for JSON, from which `from_json` makes the same tokenizer."""


class Bytes:
  """The 256 bytes of UTF-8."""

  size, end = _BYTES + 1, _BYTES

  def encode(self, text: str, where: str = "") -> Encoded:
    tokens = np.frombuffer(_utf8(text, where), np.uint8).astype(np.int32)
    return Encoded(tokens, (tokens >> 6 != 0b10).astype(np.int32), np.ones_like(tokens))

  def decode(self, tokens: Sequence[int]) -> str:
    return bytes(t for t in tokens if t < _BYTES).decode(errors="replace")

  def to_json(self) -> Mapping[str, Any]:
    return {"kind": "byte"}


class Characters:
  """The characters of the training text, as the tokens from 1 on; `end` is 0.

  Args:
    characters: the characters, each once, in the order of their code points.
    byte_fallback: whether other characters become their bytes in UTF-8, which are tokens then too,
      or are an error.
  """

  end = 0

  def __init__(self, characters: str, byte_fallback: bool):
    self._characters, self._byte_fallback = characters, byte_fallback
    self._points = _code_points(characters)
    self.size = 1 + len(characters) + (_BYTES if byte_fallback else 0)

  def encode(self, text: str, where: str) -> Encoded:
    _utf8(text, where)
    points = _code_points(text)
    index = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
    tokens, sizes = (1 + index).astype(np.int32), _utf8_sizes(points)
    unseen = np.flatnonzero(self._points[index] != points)
    if not len(unseen):
      return Encoded(tokens, np.ones_like(tokens), sizes)
    if not self._byte_fallback:
      first = text[unseen[0]]
      raise UserError(f"{where}: the character {first!r} (U+{ord(first):04X}) at position "
                      f"{unseen[0]} is not in the training text; train with "
                      "--config.data.byte_fallback=true or --config.data.tokenizer=byte")
    parts = np.split(tokens, unseen)  # each part but the first starts with an unseen character
    parts[1:] = [np.append(1 + len(self._points) + Bytes().encode(text[i]).tokens, part[1:])
                 for i, part in zip(unseen, parts[1:])]
    repeats = np.ones_like(tokens)
    repeats[unseen] = sizes[unseen]
    begins = np.zeros(repeats.sum(), np.int32)
    begins[np.cumsum(repeats) - repeats] = 1
    seen = np.ones(len(points), bool)
    seen[unseen] = False
    return Encoded(np.concatenate(parts).astype(np.int32), begins,
                   np.repeat(np.where(seen, sizes, 1), repeats).astype(np.int32))

  def decode(self, tokens: Sequence[int]) -> str:
    seen = 1 + len(self._characters)
    raw = b"".join(self._characters[t - 1].encode() if t < seen else bytes([t - seen])
                   for t in tokens if 0 < t < self.size)
    return raw.decode(errors="replace")

  def to_json(self) -> Mapping[str, Any]:
    return {"kind": "character", "characters": self._characters,
            "byte_fallback": self._byte_fallback}


class Subwords:
  """A tokenizer made by Hugging Face's `tokenizers`.

  Args:
    tokenizer: the `tokenizers.Tokenizer`.
    end: the token before each document.
  """

  def __init__(self, tokenizer: Any, end: int):
    self._tokenizer, self.end = tokenizer, end
    tokenizer.encode_special_tokens = True  # special tokens that a text spells are text
    # What a file says of the length of its texts and of chance is not meant for ours.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
      tokenizer.model.dropout = None
    numbers = tokenizer.get_vocab(with_added_tokens=True).values()
    self.size = max(numbers) + 1
    if len(set(numbers)) < len(numbers):
      raise ValueError("two tokens have the same number")
    if self.size > _LARGEST_VOCABULARY:
      raise ValueError(f"it numbers a token {self.size - 1:,}")

  def encode(self, text: str, where: str = "") -> Encoded:
    raw = _utf8(text, where)
    with _failing("{where}: the tokenizer cannot encode this text ({reason}); get the tokenizer "
                  "again, or choose another by --config.data.tokenizer", where=where):
      encoding = self._tokenizer.encode(text, add_special_tokens=False)
      starts = np.array([start for start, _ in encoding.offsets], np.int64)
      starts[:1] = 0
      sizes = np.ones(len(text), np.int32) if len(raw) == len(text) else (
          _utf8_sizes(_code_points(text)))
      bytes_before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
      ends = np.append(starts[1:], len(text)) if len(starts) else starts
      return Encoded(np.array(encoding.ids, np.int32), (ends - starts).astype(np.int32),
                     (bytes_before[ends] - bytes_before[starts]).astype(np.int32))

  def decode(self, tokens: Sequence[int]) -> str:
    with _failing("the tokenizer cannot decode its tokens ({reason}); get the tokenizer again"):
      return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)

  def to_json(self) -> Mapping[str, Any]:
    return {"kind": "subword", "end": self.end, "tokenizer": self._tokenizer.to_str()}


@contextlib.contextmanager
def _failing(message: str, **fields: Any) -> Iterator[None]:
  """Turns any error of the library into a `UserError`, whose text has the error as {reason}.

  The library raises plain Exception, and where its Rust code panics, an error that is none.
  """
  try:
    yield
  except UserError:
    raise
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise UserError(message.format(reason=one_line(error, 100), **fields)) from error


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
  """The text that each token adds to the tokens before it; "¶" and a new line for `end`.

  If a character takes several tokens, their texts are U+FFFD or empty.
  """
  texts, begin, before = [], 0, ""
  for i, token in enumerate(tokens):
    if token == tokenizer.end:
      texts.append("¶\n")
      begin, before = i + 1, ""
    else:
      # The text that a token adds may depend on all tokens before it: it can be half a character,
      # or start with a space that the first word lacks.
      text = tokenizer.decode(tokens[begin:i + 1])
      texts.append(text[len(before):])
      before = text
  return texts


def from_json(value: Any) -> Tokenizer:
  """The tokenizer whose `to_json` gave `value`.

  Raises:
    UserError: `value` is damaged.
  """
  with _failing("{asset} does not hold a tokenizer ({reason}); take that file from a copy of the "
                "run, or train again", asset=_ASSET):
    kind = value["kind"]
    if kind == "byte":
      return Bytes()
    if kind == "character":
      characters, byte_fallback = value["characters"], value["byte_fallback"]
      if not isinstance(byte_fallback, bool) or list(characters) != sorted(set(characters)):
        raise ValueError("its characters are not in order")
      return Characters(characters, byte_fallback)
    if kind != "subword":
      raise ValueError(f"there is no kind {kind!r:.40}")
    tokenizer, end = _parse(value["tokenizer"]), value["end"]
    if type(end) is not int or end < 0 or tokenizer.id_to_token(end) is None:
      raise ValueError(f"there is no token {end!r:.40}")
    return Subwords(tokenizer, end)


def _parse(text: str) -> Any:
  """The library's tokenizer that a tokenizer.json describes.

  Raises:
    ValueError: it would fail or fill the memory when it is used. (The library raises its own
      errors for what it cannot read.)
  """
  content, growth = json.loads(text), 1
  left = [content["normalizer"], content["pre_tokenizer"], content["decoder"]]
  while left:
    part = left.pop()
    if isinstance(part, list):
      left += part
    elif isinstance(part, dict):
      left += part.values()
      if part.get("type") == "Replace":
        growth *= max(1, len(part["content"]))
      elif part.get("type") == "Precompiled" and part["precompiled_charsmap"]:
        sentencepiece.check_charsmap(base64.b64decode(part["precompiled_charsmap"], validate=True))
  if growth > _MOST_GROWTH:
    raise ValueError(f"it makes up to {growth:,} characters of one")
  return _library().Tokenizer.from_str(text)


def make(
    kind: str, documents: Iterable[str], *, vocab_size: int, byte_fallback: bool = False,
    file: str = "",
) -> Tokenizer:
  """A tokenizer; those in `FITTED` are fitted to the training text.

  Args:
    kind: one of `TOKENIZERS`.
    documents: the training text, which is read only for a kind in `FITTED`.
    vocab_size: the greatest number of tokens in a sub-word tokenizer, with `end`.
    byte_fallback: whether characters that are not in the training text become bytes. With BPE they
      always do.
    file: for the kind "file", the path of a SentencePiece model or of a Hugging Face
      tokenizer.json.

  Raises:
    UserError: the kind is unknown, or the file cannot be read.
  """
  if kind == "byte":
    return Bytes()
  if kind == "character":
    return Characters("".join(sorted(set().union(*documents))), byte_fallback)
  if kind == "file":
    return load(file)
  if kind not in FITTED:
    raise unknown("--config.data.tokenizer", kind, TOKENIZERS)
  return _train(kind, documents, vocab_size, byte_fallback)


def _train(kind: str, documents: Iterable[str], vocab_size: int, byte_fallback: bool) -> Tokenizer:
  """Trains a sub-word tokenizer.

  It is BPE on bytes (Sennrich et al. 2016; Radford et al. 2019), WordPiece (Schuster and Nakajima
  2012, in BERT's form) or Unigram (Kudo 2018).
  """
  lib = _library()
  common = {"vocab_size": vocab_size, "show_progress": False}
  if kind == "bpe":
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        **common, special_tokens=[END], initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet())
  elif kind == "wordpiece":
    tokenizer = lib.Tokenizer(lib.models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = lib.decoders.WordPiece(cleanup=False)
    trainer = lib.trainers.WordPieceTrainer(**common, special_tokens=[END, UNKNOWN])
  else:
    tokenizer = lib.Tokenizer(lib.models.Unigram())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = sentencepiece.decoder(dummy_prefix=False)
    special = [END, UNKNOWN,
               *(sentencepiece.byte_piece(byte) for byte in range(_BYTES if byte_fallback else 0))]
    trainer = lib.trainers.UnigramTrainer(**common, special_tokens=special, unk_token=UNKNOWN)
  tokenizer.train_from_iterator(documents, trainer)
  if kind == "unigram":
    tokenizer = sentencepiece.finished_unigram(tokenizer, [END, UNKNOWN], byte_fallback)
  return Subwords(tokenizer, tokenizer.token_to_id(END))


def load(file: str) -> Tokenizer:
  """Reads a SentencePiece model (.model) or a tokenizer.json; `UserError` if it cannot."""
  if not file:
    raise UserError(f"{_FILE}: --config.data.tokenizer=file needs one; name a SentencePiece "
                    ".model or a tokenizer.json")
  path = Path(file)
  try:
    path = path.expanduser()
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode) or state.st_size > _LARGEST_FILE:
      raise ValueError(f"it is no file, or has more than {_LARGEST_FILE:,} bytes")
    data = path.read_bytes()
  except (OSError, ValueError, RuntimeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{_FILE}={file} cannot be read ({reason}); name a SentencePiece .model or a "
                    "tokenizer.json") from None
  with _failing("{file} is neither a SentencePiece model nor a tokenizer.json ({reason}); get it "
                "again", file=f"{_FILE}={file}"):
    if path.suffix == ".json":
      tokenizer = _parse(data.decode())
    else:
      tokenizer = sentencepiece.read(data)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    end = next((name for name in _ENDS if name in vocabulary), END)
    tokenizer.add_special_tokens([end])
    return Subwords(tokenizer, tokenizer.token_to_id(end))


def _utf8(text: str, where: str) -> bytes:
  """The text's bytes; `UserError` if it holds what stands for a byte that is not UTF-8."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f"{where}: position {error.start} holds no character but "
                    f"U+{ord(text[error.start]):04X}, as a byte does that is not UTF-8; write it "
                    "in UTF-8") from None


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _utf8_sizes(points: np.ndarray) -> np.ndarray:
  """i32[n]: the number of bytes that each code point takes in UTF-8."""
  return (1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)).astype(np.int32)


def _library() -> Any:
  import tokenizers

  return tokenizers
