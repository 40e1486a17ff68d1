"""SentencePiece models (Kudo and Richardson 2018) as tokenizers of Hugging Face's `tokenizers`.

The file is a protocol buffer, the `ModelProto` in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. Only the fields
that decide the tokens are read here. Unigram and BPE models give the same tokens as SentencePiece
itself.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

SPACE = "\u2581"  # stands for a space in a piece
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of models
_LONGEST_PIECE = 1000  # characters; the time to find a piece's merges is quadratic in its length
_NEVER = -1e5  # the score of pieces that a text may spell but never means


class Piece(NamedTuple):
  """An entry of the vocabulary; its score is a log probability, or decides a merge's rank."""

  text: str
  score: float
  kind: int


def read(data: bytes, plain: bool = False, prepend: str = "") -> Any:
  """The `tokenizers.Tokenizer` that equals a SentencePiece model.

  Args:
    data: the bytes of the model's file.
    plain: whether the text stays as it is, whatever the model says of characters and white space.
    prepend: where a space is added before a text: "always", before its "first" piece only, where
      special tokens cut it into pieces, "never", or as the model says ("").

  Raises:
    ValueError: they are no SentencePiece model, or the model is neither Unigram nor BPE.
  """
  import tokenizers

  model = _fields(data)
  pieces = [_piece(piece) for piece in model.get(1, [])]
  if not pieces or not any(piece.kind == _UNKNOWN for piece in pieces):
    raise ValueError("there is no vocabulary in it")
  if not all(piece.text and math.isfinite(piece.score) for piece in pieces):
    raise ValueError("a piece has no text, or no score")
  if len({piece.text for piece in pieces}) < len(pieces):
    raise ValueError("two of its pieces are the same")
  trainer = _fields(model.get(2, [b""])[0])
  normalizer = _fields(model.get(3, [b""])[0])
  dummy_prefix = bool(normalizer.get(3, [True])[0])

  kind = trainer.get(3, [_UNIGRAM])[0]
  unknown = next(i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN)
  byte_fallback = bool(trainer.get(35, [False])[0])
  if kind == _UNIGRAM:
    scores = [(piece.text, _NEVER if piece.kind in (_UNKNOWN, _CONTROL, _BYTE) else piece.score)
              for piece in pieces]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unknown, byte_fallback))
  elif kind == _BPE:
    numbers = {piece.text: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        numbers, _merges(pieces), unk_token=pieces[unknown].text, fuse_unk=True,
        byte_fallback=byte_fallback))
  else:
    raise ValueError("it is neither Unigram nor BPE")
  special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
  tokenizer.add_special_tokens(special)
  if user := [piece.text for piece in pieces if piece.kind == _USER_DEFINED]:
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in user])

  steps = []
  replace, regex = tokenizers.normalizers.Replace, tokenizers.Regex
  if (charsmap := normalizer.get(2, [b""])[0]) and not plain:
    check_charsmap(charsmap)
    steps.append(tokenizers.normalizers.Precompiled(charsmap))
  if normalizer.get(4, [True])[0] and not plain:  # extra spaces are removed
    steps += [replace(regex(r"\A +| +\z"), ""), replace(regex(" {2,}"), " ")]
  if dummy_prefix and not plain:
    # Metaspace adds no space to a text that begins with one. SentencePiece does.
    steps += [replace(" ", SPACE), replace(regex(rf"\A{SPACE}"), 2 * SPACE)]
  if steps:
    tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
  prepend = prepend or ("always" if dummy_prefix else "never")
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      prepend_scheme=prepend, split=False)
  tokenizer.decoder = decoder(prepend != "never")
  return tokenizer


def roles(data: bytes) -> dict[str, str]:
  """Role -> piece, for the roles "unknown", "start" and "end" of a model that `read` can read."""
  trainer = _fields(_fields(data).get(2, [b""])[0])
  names = {"unknown": (40, 45, 0, "<unk>"), "start": (41, 46, 1, "<s>"), "end": (42, 47, 2, "</s>")}
  found = {}
  for role, (number, text, default, piece) in names.items():
    if trainer.get(number, [default])[0] < 2**31:  # a negative number fills 64 bits
      found[role] = trainer.get(text, [piece.encode()])[0].decode()
  return found


def check_charsmap(data: bytes) -> None:
  """Checks a table of characters and what they become, which ends the process where it is damaged.

  It holds the size of a trie, the trie, and the texts, each with a zero byte behind it. The trie
  is a double array of darts-clone, whose units have 32 bits. A unit holds the label that leads to
  it (bits 0 to 7), whether its first child is a leaf (bit 8) and the offset to its children (bits
  9 to 30). Bit 31 marks a leaf, whose other bits are the place of a text.

  Raises:
    ValueError: the trie leads out of itself, or to no text.
  """
  size = int.from_bytes(data[:4], "little")
  if not 4 <= size <= len(data) - 4 or size % 4:
    raise ValueError("its table of characters is cut")
  units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
  data[4 + size:].decode()  # the texts, in UTF-8
  texts = np.frombuffer(data, np.uint8, offset=4 + size)
  inner = units >> 31 == 0
  inner[0] = True
  places = np.flatnonzero(inner)
  inner = units[places]
  children = places ^ (inner >> 10 << ((inner & 1 << 9) >> 6))
  if (children | 0xFF).max() >= len(units):
    raise ValueError("its table of characters leads out of itself")
  leaves = units[children[inner >> 8 & 1 == 1]] & 0x7FFFFFFF
  if len(leaves) and (leaves.max() >= len(texts) or (texts[leaves] >> 6 == 0b10).any()):
    raise ValueError("its table of characters leads to no text")


def decoder(dummy_prefix: bool) -> Any:
  """The decoder from pieces to text; `dummy_prefix` drops the space before the first word."""
  from tokenizers import decoders

  parts = [decoders.ByteFallback(), decoders.Replace(SPACE, " "), decoders.Fuse()]
  return decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * dummy_prefix)


def byte_piece(byte: int) -> str:
  """The piece that stands for a byte."""
  return f"<0x{byte:02X}>"


def finished_unigram(tokenizer: Any, keep: Sequence[str], byte_fallback: bool) -> Any:
  """The same Unigram tokenizer, except that no text can spell its special tokens.

  Args:
    tokenizer: the tokenizer, with the special tokens that it was trained with.
    keep: the special tokens that stay special.
    byte_fallback: whether the others are the pieces of the 256 bytes, into which unknown
      characters are split.
  """
  from tokenizers import Regex, Tokenizer, pre_tokenizers

  content = json.loads(tokenizer.to_str())
  spelled = [token["content"] for token in content["added_tokens"]]
  content["model"]["byte_fallback"] = byte_fallback
  content["added_tokens"] = [token for token in content["added_tokens"]
                             if token["content"] in keep]
  finished = Tokenizer.from_str(json.dumps(content))
  # The special tokens have better scores than any word, so a text that spells one is cut after its
  # first character.
  begins = Regex("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in spelled))
  finished.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(begins, "isolated"), finished.pre_tokenizer])
  return finished


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
  """All pairs of pieces that make a third piece, by the third piece's score."""
  known = {piece.text for piece in pieces}
  if max(len(piece.text) for piece in pieces) > _LONGEST_PIECE:
    raise ValueError(f"a piece has more than {_LONGEST_PIECE} characters")
  ranked = sorted((p for p in pieces if p.kind == _NORMAL and len(p.text) > 1),
                  key=lambda p: -p.score)
  return [(text[:i], text[i:]) for text, *_ in ranked for i in range(1, len(text))
          if text[:i] in known and text[i:] in known]


def _piece(data: bytes) -> Piece:
  fields = _fields(data)
  score = struct.unpack("<f", fields[2][0])[0] if 2 in fields else 0.0
  return Piece(fields.get(1, [b""])[0].decode(), score, fields.get(3, [_NORMAL])[0])


def _fields(data: bytes) -> dict[int, list[Any]]:
  """Field number -> its values in a protocol buffer: integers, or bytes.

  Raises:
    ValueError: the bytes are no protocol buffer.
  """
  fields: dict[int, list[Any]] = {}
  for number, value in _wire(data):
    fields.setdefault(number, []).append(value)
  return fields


def _wire(data: bytes) -> Iterator[tuple[int, Any]]:
  position = 0

  def varint() -> int:
    nonlocal position
    value = shift = 0
    while True:
      if position >= len(data) or shift > 63:
        raise ValueError("it ends too early")
      byte = data[position]
      value, position, shift = value | (byte & 0x7F) << shift, position + 1, shift + 7
      if byte < 0x80:
        return value

  while position < len(data):
    number, wire_type = divmod(varint(), 8)
    if wire_type == 0:
      yield number, varint()
      continue
    size = {1: 8, 5: 4}.get(wire_type)
    if wire_type == 2:
      size = varint()
    if size is None or number == 0 or position + size > len(data):
      raise ValueError("it is no protocol buffer")
    yield number, data[position:position + size]
    position += size
