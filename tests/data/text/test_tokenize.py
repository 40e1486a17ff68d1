"""Tokenizers: text comes back, and every character and byte of it is counted once."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dljax.data.text import sentencepiece, tokenize
from dljax.errors import UserError

FIXTURES = Path(__file__).parents[2] / "fixtures"
TRAINING = ["The cat sat on the mat.\n", "the dog, the cat and the mat", "def cat(mat):\n  return mat + 1\n"] * 20
ODD = "naïve café — 日本 🐈\tend\n"
VOCABULARY = 320


def _make(kind, **kwargs):
  return tokenize.make(kind, TRAINING, vocab_size=VOCABULARY, **kwargs)


ALL = {
    "byte": lambda: _make("byte"),
    "character": lambda: _make("character", byte_fallback=True),
    "bpe": lambda: _make("bpe"),
    "wordpiece": lambda: _make("wordpiece"),
    "unigram": lambda: _make("unigram", byte_fallback=True),
    "sentencepiece unigram": lambda: tokenize.load(str(FIXTURES / "unigram.model")),
    "sentencepiece bpe": lambda: tokenize.load(str(FIXTURES / "bpe.model")),
}
LOSSLESS = ["byte", "character", "bpe", "unigram"]


@pytest.fixture(scope="module", params=ALL)
def tokenizer(request):
  return request.param, ALL[request.param]()


@pytest.mark.parametrize("text", [*TRAINING[:3], ODD, "  two  spaces ", "<|endoftext|></s>[SEP]", "x"])
def test_every_character_and_byte_is_some_tokens(tokenizer, text):
  name, tokenizer = tokenizer
  encoded = tokenizer.encode(text, "here")
  assert {len(part) for part in encoded} == {len(encoded.tokens)} and len(encoded.tokens)
  assert encoded.characters.sum() == len(text) and encoded.bytes.sum() == len(text.encode())
  assert encoded.characters.min() >= 0 and encoded.bytes.min() >= 0
  assert all(part.dtype == np.int32 for part in encoded)
  assert 0 <= encoded.tokens.min() and encoded.tokens.max() < tokenizer.size
  assert tokenizer.end not in encoded.tokens  # whatever a text spells
  if name in LOSSLESS:
    assert tokenizer.decode(encoded.tokens) == text


@pytest.mark.parametrize("text", [*TRAINING[:3], "  two  spaces ", ODD])
def test_the_pieces_of_a_text_are_the_text(tokenizer, text):
  _, tokenizer = tokenizer
  tokens = tokenizer.encode(text, "here").tokens
  pieces = tokenize.pieces(tokenizer, [*tokens, tokenizer.end, *tokens])
  assert len(pieces) == 2 * len(tokens) + 1 and pieces[len(tokens)] == "¶\n"
  ascii_of = lambda text: "".join(c for c in text if c.isascii())  # another character's tokens may be marks
  assert ascii_of("".join(pieces[:len(tokens)])) == ascii_of(tokenizer.decode(tokens))


def test_no_text_is_no_tokens(tokenizer):
  _, tokenizer = tokenizer
  assert [len(part) for part in tokenizer.encode("", "here")] == [0, 0, 0]
  assert tokenizer.decode([]) == ""
  assert tokenizer.decode([tokenizer.end]) == ""


def test_what_was_saved_is_the_same(tokenizer):
  _, tokenizer = tokenizer
  again = tokenize.from_json(json.loads(json.dumps(tokenizer.to_json())))
  assert (again.size, again.end) == (tokenizer.size, tokenizer.end)
  for text in (*TRAINING[:3], ODD):
    for one, other in zip(tokenizer.encode(text, ""), again.encode(text, "")):
      np.testing.assert_array_equal(one, other)
    assert again.decode(again.encode(text, "").tokens) == tokenizer.decode(tokenizer.encode(text, "").tokens)


def test_bytes_are_bytes():
  tokens, characters, sizes = tokenize.Bytes().encode("aé")
  assert (tokens.tolist(), characters.tolist(), sizes.tolist()) == ([97, 0xC3, 0xA9], [1, 1, 0], [1, 1, 1])
  assert tokenize.Bytes().decode([0xC3, 97]) == "\N{REPLACEMENT CHARACTER}a"


def test_characters_are_those_of_the_training_text_in_order():
  tokenizer = tokenize.make("character", ["ba", "cé"], vocab_size=0)
  assert tokenizer.size == 5 and tokenizer.end == 0
  tokens, characters, sizes = tokenizer.encode("abcé", "")
  assert (tokens.tolist(), characters.tolist(), sizes.tolist()) == ([1, 2, 3, 4], [1] * 4, [1, 1, 1, 2])


def test_an_unseen_character_is_named():
  tokenizer = tokenize.make("character", ["abc"], vocab_size=0)
  with pytest.raises(UserError, match=r"--prompt: the character 'é' \(U\+00E9\) at position 2 is not in the training"):
    tokenizer.encode("abé", "--prompt")
  with pytest.raises(UserError, match="at position 0"):
    tokenizer.encode("Zab", "--prompt")


def test_an_unseen_character_is_bytes_where_asked():
  tokenizer = tokenize.make("character", ["abc"], vocab_size=0, byte_fallback=True)
  tokens, characters, sizes = tokenizer.encode("éa日b", "")
  assert tokens.tolist() == [4 + 0xC3, 4 + 0xA9, 1, 4 + 0xE6, 4 + 0x97, 4 + 0xA5, 2]
  assert characters.tolist() == [1, 0, 1, 1, 0, 0, 1] and sizes.tolist() == [1] * 7
  draw = random.Random(0)
  for _ in range(200):
    text = "".join(draw.choice("abcé日🐈") for _ in range(draw.randint(1, 9)))
    encoded = tokenizer.encode(text, "")
    assert tokenizer.decode(encoded.tokens) == text
    assert (encoded.characters.sum(), encoded.bytes.sum()) == (len(text), len(text.encode()))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_sub_words_are_learned_from_the_training_text(kind):
  tokenizer = _make(kind)
  assert tokenizer.size <= VOCABULARY
  assert len(tokenizer.encode("the cat and the mat", "").tokens) < 19
  assert len(tokenizer.encode("xylophone quartz", "").tokens) >= 2
  other = tokenize.make(kind, ["zebra zebras zebra"] * 20, vocab_size=VOCABULARY)
  assert len(other.encode("zebra", "").tokens) < len(tokenizer.encode("zebra", "").tokens) or kind == "wordpiece"


@pytest.mark.parametrize("name", ["unigram", "bpe"])
def test_sentencepiece_models_give_sentencepieces_tokens(name):
  """fixtures/sentencepiece.json holds what sentencepiece 0.2.3 gives (see make_sentencepiece.py)."""
  tokenizer = tokenize.load(str(FIXTURES / f"{name}.model"))
  rows = json.loads((FIXTURES / "sentencepiece.json").read_text())[name]
  assert len(rows) > 50
  for text, tokens, decoded in rows:
    assert tokenizer.encode(text).tokens.tolist() == tokens, text
    assert tokenizer.decode(tokens) == decoded


def test_a_tokenizer_json_loads(tmp_path):
  made = _make("bpe")
  path = tmp_path / "tokenizer.json"
  path.write_text(made.to_json()["tokenizer"])
  loaded = tokenize.load(str(path))
  assert (loaded.size, loaded.end) == (made.size, made.end)
  np.testing.assert_array_equal(loaded.encode(ODD).tokens, made.encode(ODD, "").tokens)


@pytest.mark.parametrize("data, reason", [
    (b"", "there is no vocabulary in it"),
    (b"no protocol buffer at all", "neither a SentencePiece model nor a tokenizer.json"),
    ((FIXTURES / "bpe.model").read_bytes()[:3000], "ends too early|no protocol buffer|no vocabulary"),
])
def test_an_unreadable_model_is_named(tmp_path, data, reason):
  path = tmp_path / "spoilt.model"
  path.write_bytes(data)
  with pytest.raises(UserError, match=f"--config.data.tokenizer_file={path}.*({reason})"):
    tokenize.load(str(path))


def test_other_bad_tokenizers(tmp_path):
  with pytest.raises(UserError, match="--config.data.tokenizer_file=.*missing.model cannot be read"):
    tokenize.load(str(tmp_path / "missing.model"))
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer.json is neither"):
    tokenize.load(str(tmp_path / "tokenizer.json"))
  with pytest.raises(UserError, match="--config.data.tokenizer: there is no 'bytes'; did you mean byte"):
    _make("bytes")
  words = b"".join([b"\x0a\x09\x0a\x05<unk>\x18\x02", b"\x12\x02\x18\x03"])  # of whole words
  with pytest.raises(ValueError, match="neither Unigram nor BPE"):
    sentencepiece.read(words)
