"""Tokenizers: text comes back, and every character and byte of it is counted once."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from dljax.data.text import sentencepiece, tokenize
from dljax.errors import UserError
from tests.data.text import scripts

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


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_same_text_makes_the_same_tokenizer(kind):
  """Unigram's differ from training to training, by the order in which the library adds its numbers."""
  text = "The quick brown fox's jumps: over_the lazy dogs, naïve Ωμέγα 12345 – und so weiter. " * 3
  first, *others = (tokenize.make(kind, [text, text[::-1]], vocab_size=400).to_json() for _ in range(4))
  assert all(other == first for other in others)


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


def test_a_text_that_spells_a_piece_without_text_is_text():
  tokenizer = tokenize.load(str(FIXTURES / "unigram.model"))
  for text in ("<unk>", "a <unk> b", "<s>", "</s>x", "<0x41>"):
    tokens = tokenizer.encode(text).tokens
    assert not set(tokens) & {0, 1, 2} and tokenizer.decode(tokens) == text


def test_a_model_that_keeps_white_space_counts_a_space_at_the_beginning():
  """As SentencePiece does: it adds its own space to every text, and takes none away."""
  model = scripts.sentencepiece_model(False)
  tokenizer = tokenize.Subwords(sentencepiece.read(model), 2)
  for spaces in range(4):
    text = " " * spaces + "born" + " " * spaces
    encoded = tokenizer.encode(text)
    assert "".join(map(tokenizer.name, encoded.tokens)) == f"▁{text}".replace(" ", "▁")
    assert encoded.characters.sum() == len(text) and tokenizer.decode(encoded.tokens) == text
  tidy = tokenize.Subwords(sentencepiece.read(scripts.sentencepiece_model(True)), 2)
  assert tidy.decode(tidy.encode("  free\nand   equal ").tokens) == "free\nand equal"


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


def _write(path, content):
  path.write_text(json.dumps(content))
  return str(path)


def _content(kind):
  return json.loads(_make(kind).to_json()["tokenizer"])


def test_what_a_file_says_of_length_and_chance_is_not_meant_for_our_texts(tmp_path):
  text, content = "The cat sat on the mat. " * 200, _content("bpe")
  plain = tokenize.load(_write(tmp_path / "plain.json", content)).encode(text)
  cuts = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
  fills = {"strategy": {"Fixed": 9000}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1,
           "pad_type_id": 0, "pad_token": "<pad>"}
  changed = {
      "cut": content | {"truncation": cuts}, "filled": content | {"padding": fills},
      "drawn": content | {"model": content["model"] | {"dropout": 0.5}}}
  for name, other in changed.items():
    other = json.loads(json.dumps(other))
    loaded = tokenize.load(_write(tmp_path / f"{name}.json", other))
    restored = tokenize.from_json({"kind": "subword", "end": loaded.end, "tokenizer": json.dumps(other)})
    for tokenizer in (loaded, restored):
      for one, another in zip(plain, tokenizer.encode(text)):
        np.testing.assert_array_equal(one, another)
    assert loaded.decode(plain.tokens) == text and json.dumps(cuts) not in loaded.to_json()["tokenizer"]


def _piece(text, score=0.0, kind=1):
  text = text.encode() if isinstance(text, str) else text
  body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(score).tobytes() + b"\x18" + bytes([kind])
  return b"\x0a" + bytes([len(body)]) + body


def _model(*pieces, charsmap=b""):
  """A SentencePiece model of Unigram with these pieces besides the unknown one."""
  normalizer = b"\x12" + bytes([len(charsmap)]) + charsmap if charsmap else b""
  return b"".join([_piece("<unk>", kind=2), *pieces]) + b"\x1a" + bytes([len(normalizer)]) + normalizer


def _charsmap(units, texts=b"ok\0", size=None):
  units = np.array(units, "<u4").tobytes()
  return (len(units) if size is None else size).to_bytes(4, "little") + units + texts


@pytest.mark.parametrize("model, reason", [
    (_model(_piece("a", np.nan)), "no score"),
    (_model(_piece("a", np.inf)), "no score"),
    (_model(_piece("")), "no text"),
    (_model(_piece("a"), _piece("a")), "two of its pieces are the same"),
    (_model(_piece(b"\xff")), "utf-8"),
    (_model(_piece("a"), charsmap=b"\1"), "is cut"),
    (_model(_piece("a"), charsmap=_charsmap([])), "is cut"),
    (_model(_piece("a"), charsmap=_charsmap([0], size=2**32 - 4)), "is cut"),
    (_model(_piece("a"), charsmap=_charsmap([0])), "leads out of itself"),
    (_model(_piece("a"), charsmap=_charsmap([2**31])), "leads out of itself"),
    (_model(_piece("a"), charsmap=_charsmap([0], b"\xff\0")), "utf-8"),
])
def test_a_model_that_would_fail_later_is_refused_at_once(tmp_path, model, reason):
  (tmp_path / "some.model").write_bytes(model)
  with pytest.raises(UserError, match=f"--config.data.tokenizer_file={tmp_path}/some.model .*{reason}.*get it again"):
    tokenize.load(str(tmp_path / "some.model"))


@pytest.mark.parametrize("leaf", [3, 1000, 2**31 - 1])
def test_a_table_of_characters_leads_to_its_texts_alone(leaf):
  units = np.zeros(512, np.uint32)
  units[0], units[256] = 1 << 8 | 1 << 10, 0  # its children begin at 1, which is a leaf
  units[1] = 1 << 31
  sentencepiece.check_charsmap(_charsmap(units))
  units[1] = 1 << 31 | leaf
  with pytest.raises(ValueError, match="leads to no text"):
    sentencepiece.check_charsmap(_charsmap(units))


def test_a_piece_of_a_megabyte_is_not_cut_in_all_ways():
  with pytest.raises(ValueError, match="more than 1000 characters"):
    sentencepiece._merges([sentencepiece.Piece("a" * 10**6, 0.0, 1)])


def _change_model(**fields):
  return lambda content: content["model"].update(fields)


def _change(**fields):
  return lambda content: content.update(fields)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
MAP = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}


@pytest.mark.parametrize("change, reason", [
    (lambda content: content["model"]["vocab"].update(new=2**31), "it numbers a token 2,147,483,648"),
    (lambda content: content["model"]["vocab"].update(new=2**32), "expected u32"),
    (lambda content: content["model"]["vocab"].update(new=5), "two tokens have the same number"),
    (_change(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 40}), "makes up to 1,099,511,627,776 char"),
    (_change(normalizer=REPLACE | {"content": "a" * 5000}), "makes up to 5,000 characters of one"),
    (_change(decoder={"type": "Sequence", "decoders": [REPLACE] * 40}), "makes up to"),
    (_change(normalizer={"type": "Sequence", "normalizers": [MAP]}), "is cut"),
    (_change(normalizer=MAP | {"precompiled_charsmap": "%"}), "neither"),
    (_change(normalizer=5), "neither"),
    (_change_model(type="Unheard"), "neither"),
])
def test_a_tokenizer_json_that_would_fail_later_is_refused_at_once(tmp_path, change, reason):
  content = _content("bpe")
  change(content)
  path = _write(tmp_path / "tokenizer.json", content)
  with pytest.raises(UserError, match=f"--config.data.tokenizer_file={path} .*{reason}.*get it again") as error:
    tokenize.load(path)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="data/tokenizer.json does not hold a tokenizer"):
    tokenize.from_json({"kind": "subword", "end": 0, "tokenizer": json.dumps(content)})


def test_a_text_that_a_tokenizer_cannot_encode_is_named(tmp_path):
  content = _content("wordpiece")
  content["model"]["unk_token"] = "[UNK]"  # which it does not have
  tokenizer = tokenize.load(_write(tmp_path / "tokenizer.json", content))
  with pytest.raises(UserError, match=r"--prompt: the tokenizer cannot encode this text .*UNK.*get the tokenizer again"):
    tokenizer.encode("日本", "--prompt")


class PanicException(BaseException):
  """As the library raises where its Rust code panics."""


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_a_panic_is_one_line_and_ctrl_c_is_ctrl_c(name):
  class Library:
    model, error = None, PanicException("index out of bounds:\nthe len is 0")

    def get_vocab(self, with_added_tokens):
      return {"a": 0}

    def no_truncation(self):
      pass

    no_padding = no_truncation

    def encode(self, *_, **__):
      raise self.error

    decode = encode

  tokenizer, argument = tokenize.Subwords(Library(), 0), "a" if name == "encode" else [0]
  with pytest.raises(UserError, match="index out of bounds: the len is 0.*get the tokenizer again"):
    getattr(tokenizer, name)(argument)
  Library.error = KeyboardInterrupt()
  with pytest.raises(KeyboardInterrupt):
    getattr(tokenizer, name)(argument)


def test_bytes_that_are_not_utf_8_are_named(tokenizer):
  _, tokenizer = tokenizer
  with pytest.raises(UserError, match=r"--prompt: position 3 holds no character but U\+DCE9"):
    tokenizer.encode("caf\udce9", "--prompt")


@pytest.mark.parametrize("value", [
    None, [], 5, "text", {}, {"kind": "other"}, {"kind": ["byte"]}, {"kind": "character"},
    {"kind": "character", "characters": "ba", "byte_fallback": False},
    {"kind": "character", "characters": "aa", "byte_fallback": False},
    {"kind": "character", "characters": 5, "byte_fallback": False},
    {"kind": "character", "characters": "\udce9", "byte_fallback": False},
    {"kind": "character", "characters": "ab", "byte_fallback": "no"},
    {"kind": "subword"}, {"kind": "subword", "tokenizer": "{}", "end": 0},
    {"kind": "subword", "tokenizer": "[" * 10_000, "end": 0}, {"kind": "subword", "tokenizer": {}, "end": 0},
    *({"kind": "subword", "end": end} for end in (-1, 10**6, 10**30, "0", None, True, 1.0))])
def test_a_damaged_tokenizer_of_a_run_is_one_line(value):
  if isinstance(value, dict) and value.keys() == {"kind", "end"}:
    value["tokenizer"] = _make("bpe").to_json()["tokenizer"]
  with pytest.raises(UserError, match="data/tokenizer.json does not hold a tokenizer .*train again") as error:
    tokenize.from_json(value)
  assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_files_that_are_none_are_not_read(tmp_path):
  (tmp_path / "large.json").write_bytes(b"")
  os.truncate(tmp_path / "large.json", 2**40)
  for path, reason in ((tmp_path / "large.json", "has more than"), ("/dev/zero", "it is no file"),
                       ("a\0.json", "null"), (tmp_path, "it is no file"), ("~no-such-user/x.json", "home")):
    with pytest.raises(UserError, match=f"tokenizer_file=.*cannot be read .*{reason}"):
      tokenize.load(str(path))
