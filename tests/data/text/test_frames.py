"""Special tokens: those of a fitted tokenizer, which no text can spell, and the frames that they make."""

import json

import numpy as np
import pytest

from dljax.data.text import frames, labelled, masked, tokenize

TEXT = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind to suffer", "[MASK] [CLS] <unk>"]


def _made(kind, framed=True):
  return tokenize.make(kind, TEXT * 3, vocab_size=300, framed=framed)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_fitted_tokenizer_has_special_tokens_that_no_text_spells(kind):
  made = _made(kind)
  known = frames.roles(made)
  assert set(known) - {"unknown"} == {"end", "pad", "class", "separator", "mask"}
  assert ("unknown" in known) == (kind != "bpe")  # whose bytes make every text
  special = frames.special_tokens(made)
  assert len(special) == len(known) and frames.frame(made) == (known["class"], known["separator"])
  for text in (*TEXT, "[MASK]", "a [SEP] b", "<|endoftext|>"):
    tokens = made.encode(text, "x").tokens
    assert not set(tokens.tolist()) & set(special.tolist()) - {known.get("unknown")}
  again = tokenize.from_json(json.loads(json.dumps(made.to_json())))
  assert frames.roles(again) == known and again.encode(TEXT[0]).tokens.tolist() == made.encode(TEXT[0]).tokens.tolist()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_pairs_are_framed_as_our_own_frames_are(kind):
  made = _made(kind)
  parts = [made.encode(text).tokens.tolist() for text in TEXT[:2]]
  first, last = frames.frame(made)
  tokens, types = labelled.encode(TEXT[:2], made, 1000, "x")
  assert tokens.tolist() == [first, *parts[0], last, *parts[1], last]
  assert types.tolist() == [0] * (len(parts[0]) + 2) + [1] * (len(parts[1]) + 1)
  assert len(labelled.encode(TEXT[:2], made, 12, "x")[0]) == 12


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_others_have_the_tokens_that_they_had(kind):
  made = _made(kind, framed=False)
  assert frames.roles(made) == {} and frames.frame(made) == (made.end, made.end)
  assert made.encode(TEXT[0]).tokens.max() < made.size


def test_a_run_can_take_the_tokenizer_of_another_run(tmp_path):
  made = _made("wordpiece")
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(made.to_json()))
  taken = tokenize.load(str(path))
  assert frames.roles(taken) == frames.roles(made)
  assert taken.encode(TEXT[1]).tokens.tolist() == made.encode(TEXT[1]).tokens.tolist()


def test_a_prompt_spells_the_mask_whatever_the_tokenizer_calls_it():
  for kind in ("bpe", "wordpiece", "unigram"):
    made = _made(kind)
    batch = masked.encode_texts(["to be, or [MASK] to be", "[MASK]"], ["a", "b"], made, 40)
    assert batch["number"].tolist() == [1, 1]
    for row, n in zip(range(2), batch["length"]):
      assert batch["tokens"][row, batch["places"][row, 0]] == frames.roles(made)["mask"]
      assert batch["tokens"][row, [0, n - 1]].tolist() == list(frames.frame(made))
    before = made.encode("to be, or", "a").tokens.tolist()
    assert batch["tokens"][0, 1:1 + len(before)].tolist() == before


def test_whole_words_of_sub_words_begin_where_the_text_does():
  for kind in ("bpe", "wordpiece", "unigram"):
    made = _made(kind)
    text = "Whether 'tis nobler, or not to be"
    encoded = made.encode(text, "x")
    begins = masked.word_begins(text, encoded.characters)
    words = np.split(encoded.tokens, np.flatnonzero(begins)[1:])
    found = [made.decode(word).strip() for word in words]
    assert [word for word in found if word] == ["Whether", "'", "tis", "nobler", ",", "or", "not", "to", "be"], kind
