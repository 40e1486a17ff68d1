"""From text to tokens and back: bytes, characters, and sub-words by Hugging Face's `tokenizers`.

Every tokenizer has a token `end`, which comes before each document and stands for no text. Besides
the tokens, a tokenizer gives the number of characters and of UTF-8 bytes that each token stands
for. What a sub-word tokenizer drops (most drop some white space) counts for the token before it.
The numbers therefore add up to those of the text, and a loss per token becomes a loss per
character or byte without error.

A sub-word tokenizer may also know its roles: which token begins a text, ends it, separates two,
hides a word. Those that come with a model's weights do; `data/text/pretrained.py` reads them.
"""

import base64
import collections
import contextlib
import functools
import itertools
import json
import os
import re
import stat
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dljax.data.text import chat as chats
from dljax.data.text import sentencepiece
from dljax.errors import UserError, one_line, unknown

FITTED = ("character", "bpe", "wordpiece", "unigram")  # the kinds fitted to the training text
TOKENIZERS = ("byte", *FITTED, "file")
# What a token may be for. A class token begins BERT's texts, a separator ends each of its texts.
ROLES = ("start", "end", "unknown", "separator", "pad", "class", "mask")
END = "<|endoftext|>"
UNKNOWN = "<unk>"
_FRAME = {"pad": "[PAD]", "class": "[CLS]", "separator": "[SEP]", "mask": "[MASK]"}  # role -> name
# Names of `end` in other people's files, the best first.
ENDS = (END, "</s>", "[SEP]", "<eos>", "<s>", "[CLS]")
_BYTES = 256
FLAG = "--config.data.tokenizer_file"
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


class Framed(NamedTuple):
  """A text, or a pair of texts, with the special tokens around it.

  Attributes:
    tokens: i32[n].
    token_type: i32[n], 1 for the tokens of the second text, otherwise 0.
  """

  tokens: np.ndarray
  token_type: np.ndarray


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
    roles: role -> token, for some of `ROLES`.
    chat: the templates that make a text of a conversation.

  Raises:
    ValueError: its tokens cannot be counted.
  """

  def __init__(
      self, tokenizer: Any, end: int, roles: Mapping[str, int] | None = None,
      chat: chats.Chat | None = None,
  ):
    self._tokenizer, self.end = tokenizer, end
    self.roles, self.chat = dict(roles or {}), chat
    tokenizer.encode_special_tokens = True  # special tokens that a text spells are text
    # What a file says of the length of its texts and of chance is not meant for ours.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
      tokenizer.model.dropout = None
    self._numbers = tokenizer.get_vocab(with_added_tokens=True)
    numbers = self._numbers.values()
    self.size = max(numbers) + 1
    if len(set(numbers)) < len(numbers):
      raise ValueError("two tokens have the same number")
    if self.size > _LARGEST_VOCABULARY:
      raise ValueError(f"it numbers a token {self.size - 1:,}")

  def number(self, token: str) -> int | None:
    """The number of a token, given its name in the vocabulary; None if there is no such token."""
    return self._numbers.get(token)

  def name(self, token: int) -> str | None:
    """The name of a token in the vocabulary; None if there is no such token."""
    return self._tokenizer.id_to_token(int(token))

  def encode(self, text: str, where: str = "") -> Encoded:
    raw = _utf8(text, where)
    with _encoding(where):
      encoding = self._tokenizer.encode(text, add_special_tokens=False)
      starts = np.array([start for start, _ in encoding.offsets], np.int64)
      starts[:1] = 0
      sizes = np.ones(len(text), np.int32) if len(raw) == len(text) else (
          _utf8_sizes(_code_points(text)))
      bytes_before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
      ends = np.append(starts[1:], len(text)) if len(starts) else starts
      return Encoded(np.array(encoding.ids, np.int32), (ends - starts).astype(np.int32),
                     (bytes_before[ends] - bytes_before[starts]).astype(np.int32))

  def frame(
      self, text: str, pair: str | None = None, *, longest: int | None = None,
      spelled: bool = False, where: str = "",
  ) -> Framed:
    """A text, or two, with the special tokens that the model was trained to see around them.

    BERT's are [CLS] text [SEP] pair [SEP]. Most decoders have none, or one at the start.

    Args:
      text: the text.
      pair: a second text.
      longest: the most tokens, special ones included. The longer of two texts is cut at its end
        until both fit.
      spelled: whether a special token that a text spells is that token, or text like any other.
      where: the name of the texts for messages.

    Raises:
      UserError: a text cannot be encoded, or `longest` leaves no room for a text.
    """
    tokenizer = self._spelling if spelled else self._tokenizer
    texts = [text] if pair is None else [text, pair]
    for part in texts:
      _utf8(part, where)
    with _encoding(where):
      parts = [tokenizer.encode(part, add_special_tokens=False) for part in texts]
      if longest is not None:
        room = longest - tokenizer.num_special_tokens_to_add(pair is not None)
        if room < len(parts):
          raise UserError(f"{where}: {longest} tokens have no room for a text and the special "
                          "tokens around it; give more")
        for part, size in zip(parts, _shares([len(part.ids) for part in parts], room)):
          part.truncate(size)
      framed = tokenizer.post_process(*parts, add_special_tokens=True)
    return Framed(np.array(framed.ids, np.int32), np.array(framed.type_ids, np.int32))

  def encode_chat(self, messages: Sequence[Mapping[str, Any]], **values: Any) -> np.ndarray:
    """i32[n]: the tokens of a conversation, laid out by the chat template.

    Special tokens are recognised in the whole text, also where a message spells one.

    Args:
      messages: the messages, each with a role and a content.
      **values: see `Chat.render`.

    Raises:
      UserError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if self.chat is None:
      raise UserError("the tokenizer has no chat template; take a folder with a "
                      "chat_template.jinja, or give the text itself")
    text = self.chat.render(messages, **values)
    _utf8(text, "the chat")
    with _encoding("the chat"):
      return np.array(self._spelling.encode(text, add_special_tokens=False).ids, np.int32)

  @functools.cached_property
  def _spelling(self) -> Any:
    """A copy of the library's tokenizer that recognises special tokens in a text.

    It is a copy because the one tokenizer may encode in several threads at once.
    """
    copy = _library().Tokenizer.from_str(self._tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy

  def decode(self, tokens: Sequence[int]) -> str:
    with failing("the tokenizer cannot decode its tokens ({reason}); get the tokenizer again"):
      return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)

  def to_json(self) -> Mapping[str, Any]:
    value = {"kind": "subword", "end": self.end, "tokenizer": self._tokenizer.to_str()}
    if self.roles:
      value["roles"] = self.roles
    if self.chat:
      value["chat"] = {"templates": dict(self.chat.templates), "tokens": dict(self.chat.tokens)}
    return value


def _shares(sizes: Sequence[int], room: int) -> list[int]:
  """The sizes of one or two texts after the longer one has been cut until both fit.

  If both are cut to the same size and one token is left over, the second text gets it, or the
  first if it was longer.
  """
  if sum(sizes) <= room or len(sizes) == 1:
    return [min(size, room) for size in sizes]
  short, long = sorted(sizes)
  short, long = (short, room - short) if 2 * short <= room else (room // 2, room - room // 2)
  return [short, long] if sizes[0] <= sizes[1] else [long, short]


def _encoding(where: str) -> contextlib.AbstractContextManager[None]:
  return failing("{where}: the tokenizer cannot encode this text ({reason}); get the tokenizer "
                 "again, or choose another by --config.data.tokenizer", where=where)


@contextlib.contextmanager
def failing(message: str, **fields: Any) -> Iterator[None]:
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
  with failing("{asset} does not hold a tokenizer ({reason}); take that file from a copy of the "
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
    tokenizer, roles, chat = parse(value["tokenizer"]), value.get("roles", {}), value.get("chat")
    for token in (value["end"], *roles.values()):
      if type(token) is not int or token < 0 or tokenizer.id_to_token(token) is None:
        raise ValueError(f"there is no token {token!r:.40}")
    if not roles.keys() <= set(ROLES):
      raise ValueError("a token has an unknown role")
    if chat is not None:
      chat = chats.Chat(chat["templates"], chat["tokens"])
      for texts in (chat.templates, chat.tokens):
        if not all(isinstance(text, str) for text in texts.values()):
          raise ValueError("its chat template is no text")
    return Subwords(tokenizer, value["end"], roles, chat)


def parse(text: str) -> Any:
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


_ALPHABET = 1000  # characters that WordPiece keeps, the trainer's default
_WITHIN = "##"  # what WordPiece writes before a piece that does not begin a word


def make(
    kind: str, documents: Iterable[str], *, vocab_size: int, byte_fallback: bool = False,
    framed: bool = False,
) -> Tokenizer:
  """A tokenizer; those in `FITTED` are fitted to the training text.

  Args:
    kind: one of `TOKENIZERS`, except "file", which `pretrained.load` reads.
    documents: the training text, which is read only for a kind in `FITTED`.
    vocab_size: the greatest number of tokens in a sub-word tokenizer, with `end`.
    byte_fallback: whether characters that are not in the training text become bytes. With BPE they
      always do.
    framed: whether a sub-word tokenizer also has BERT's special tokens, and frames texts by them.

  Raises:
    UserError: the kind is unknown.
  """
  if kind == "byte":
    return Bytes()
  if kind == "character":
    return Characters("".join(sorted(set().union(*documents))), byte_fallback)
  if kind not in FITTED:
    raise unknown("--config.data.tokenizer", kind, TOKENIZERS)
  return _train(kind, documents, vocab_size, byte_fallback, framed)


def _train(
    kind: str, documents: Iterable[str], vocab_size: int, byte_fallback: bool, framed: bool,
) -> Tokenizer:
  """Trains a sub-word tokenizer.

  It is BPE on bytes (Sennrich et al. 2016; Radford et al. 2019), WordPiece (Schuster and Nakajima
  2012, in BERT's form) or Unigram (Kudo 2018).
  """
  lib = _library()
  common = {"vocab_size": vocab_size, "show_progress": False}
  names = {"end": END, **({} if kind == "bpe" else {"unknown": UNKNOWN}),
           **(_FRAME if framed else {})}
  special = list(names.values())
  if kind == "bpe":
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        **common, special_tokens=special, initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet())
  elif kind == "wordpiece":
    tokenizer = lib.Tokenizer(lib.models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = lib.decoders.WordPiece(cleanup=False)
    # The trainer numbers the characters within words in an order that differs from one training to
    # the next, and with it what it takes first of two equally frequent pairs. Named as special
    # tokens, they have the numbers of this order.
    documents = list(documents)
    within = [f"{_WITHIN}{character}" for character in _within_words(documents)]
    trainer = lib.trainers.WordPieceTrainer(**common, special_tokens=special + within)
  else:
    tokenizer = lib.Tokenizer(lib.models.Unigram())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = sentencepiece.decoder(dummy_prefix=False)
    pieces = [sentencepiece.byte_piece(byte) for byte in range(_BYTES if byte_fallback else 0)]
    trainer = lib.trainers.UnigramTrainer(
        **common, special_tokens=special + pieces, unk_token=UNKNOWN)
  tokenizer.train_from_iterator(documents, trainer)
  if kind == "wordpiece":
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"]
                               if token["content"] in special]
    tokenizer = lib.Tokenizer.from_str(json.dumps(trained))
  if kind == "unigram":
    tokenizer = sentencepiece.finished_unigram(tokenizer, special, byte_fallback)
  end = tokenizer.token_to_id(END)
  if not framed:
    return Subwords(tokenizer, end)
  roles = {role: tokenizer.token_to_id(name) for role, name in names.items()}
  before, after = _FRAME["class"], _FRAME["separator"]
  tokenizer.post_processor = lib.processors.TemplateProcessing(
      single=[before, "$A", after], pair=[before, "$A", after, "$B:1", f"{after}:1"],
      special_tokens=[(before, roles["class"]), (after, roles["separator"])])
  return Subwords(tokenizer, end, roles)


def _within_words(documents: Sequence[str]) -> list[str]:
  """The characters that follow another in a word of BERT's, of the most frequent that are kept."""
  counts = collections.Counter()
  for document in documents:
    counts.update(document)
  frequent = sorted(counts, key=lambda character: (-counts[character], character))[:_ALPHABET]
  kept = "".join(map(re.escape, itertools.filterfalse(_ends_word, frequent)))
  inner = re.compile(f"(?<=[{kept}])[{kept}]") if kept else re.compile("(?!)")
  return sorted(set().union(*(inner.findall(document) for document in documents)))


def _ends_word(character: str) -> bool:
  """Whether a word of BERT's ends at a character: white space, punctuation, a symbol of ASCII."""
  return (character.isspace() or character in string.punctuation
          or unicodedata.category(character).startswith("P"))


def read_bytes(path: Path, start: str, mend: str) -> bytes:
  """The content of a file of a tokenizer.

  Args:
    path: the file.
    start: the beginning of the message about a file that cannot be read.
    mend: the end of the message, which says what to do.

  Raises:
    UserError: there is no such file, it is none, or too large.
  """
  try:
    path = path.expanduser()
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode) or state.st_size > _LARGEST_FILE:
      raise ValueError(f"it is no file, or has more than {_LARGEST_FILE:,} bytes")
    return path.read_bytes()
  except (OSError, ValueError, RuntimeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{start} cannot be read ({reason}); {mend}") from None


def load(file: str) -> Tokenizer:
  """Reads a SentencePiece model (.model), a tokenizer.json, or the tokenizer of another run
  (data/tokenizer.json in its folder); `UserError` if it cannot."""
  data = read_bytes(Path(file), f"{FLAG}={file}", "name a SentencePiece .model, a tokenizer.json, "
                    "or a folder that has one of them beside a model's weights")
  with failing("{file} is neither a SentencePiece model nor a tokenizer.json ({reason}); get it "
               "again", file=f"{FLAG}={file}"):
    if Path(file).suffix == ".json":
      value = json.loads(data)
      if isinstance(value, dict) and "kind" in value:
        return from_json(value)
      tokenizer = parse(data.decode())
    else:
      tokenizer = sentencepiece.read(data)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    end = next((name for name in ENDS if name in vocabulary), END)
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
