"""Hidden tokens: how many, which, and by what, as a function of (seed, step) or of the example."""

import numpy as np
import pytest

from dljax.data.text import corpus, masked, tokenize
from dljax.errors import UserError
from tests.data.hosts import share

LINES = ["Whether 'tis nobler in the mind to suffer the slings and arrows", "To be, or not to be", "die: to sleep", "no"]
MASK, START, SEPARATOR, PAD = 257, 258, 259, 260


class _Roles(tokenize.Bytes):
  """Bytes with the tokens that BERT needs."""

  size = 261
  roles = {"mask": MASK, "class": START, "separator": SEPARATOR, "pad": PAD}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Forty documents."""
  monkeypatch.setattr(tokenize, "make", lambda *args, **kwargs: _Roles())
  for split, count in (("train", 40), ("validation", 12)):
    (tmp_path / "texts" / split).mkdir(parents=True)
    for i in range(count):
      (tmp_path / "texts" / split / f"{i}.txt").write_text(f"{split}{i} " + LINES[i % 4])
  return tmp_path / "texts"


def _data(folder, batch_size=4, eval_batch_size=3, seed=0, **fields):
  config = masked.default_config()
  config.update({"folder": str(folder), "length": 24, "vocab_size": 300, "documents": True, "test": "", **fields})
  return masked.MaskedTextSet(config).pipelines(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)


def _uncovered(batch):
  """The tokens as they were, i32[b, L], and bool[b, L], which are to be predicted."""
  tokens, chosen = batch["tokens"].copy(), np.zeros(batch["tokens"].shape, bool)
  for row in range(len(tokens)):
    real = batch["target_weight"][row] > 0
    places = batch["places"][row][real]
    assert places.tolist() == sorted(set(places.tolist()))
    assert not batch["places"][row][~real].any() and not batch["targets"][row][~real].any()
    tokens[row, places], chosen[row, places] = batch["targets"][row][real], True
  return tokens, chosen


READINGS = [{}, {"packed": True}, {"documents": False}]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_text_is_there_and_its_share_is_to_be_predicted(folder, split, reading):
  data = _data(folder, **reading)
  pipeline = data.train if split == "train" else data.evals[split]
  pipeline.open()
  found = []
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    spec = {k: v for k, v in data.batch_spec.items()}
    assert {k: v.dtype for k, v in batch.items()} == {k: v.dtype for k, v in spec.items()}
    assert all(v.shape[1:] <= spec[k].shape[1:] for k, v in batch.items())
    tokens, chosen = _uncovered(batch)
    segment = batch.get("segment", (np.arange(tokens.shape[1]) < batch["length"][:, None]).astype(int))
    for row, numbers in enumerate(segment):
      for number in range(1, numbers.max() + 1):
        piece, hidden = tokens[row][numbers == number], chosen[row][numbers == number]
        assert piece[0] == START and piece[-1] == SEPARATOR and not hidden[0] and not hidden[-1]
        ordinary = int(np.sum(piece < 256))
        assert hidden.sum() == max(1, int(0.15 * ordinary + 0.5)) and not hidden[piece >= 256].any()
        found.append(piece[1:-1].tolist())
      assert not chosen[row][numbers == 0].any() and not tokens[row][numbers == 0].any()
  texts = {path.name: path.read_bytes() for path in (folder / split).iterdir()}
  names = sorted(texts, key=lambda name: int(name.partition(".")[0]))
  documents = [list(texts[name]) for name in names]
  if reading.get("documents", True):
    pieces = [text[i:i + 22] for text in documents for i in range(0, len(text), 22)]
  else:
    whole = sum(([256, *text] for text in documents), [])[1:]
    pieces = [whole[i:i + 22] for i in range(0, len(whole), 22)]
  if split == "train":  # an epoch's last examples may not fill a batch
    assert len(found) > 0.9 * len(pieces) and all(piece in pieces for piece in found)
  else:
    assert sorted(found) == sorted(pieces)


@pytest.mark.parametrize("reading", READINGS)
def test_training_hides_by_seed_and_step(folder, reading):
  def batches(steps, seed):
    pipeline = _data(folder, seed=seed, **reading).train
    pipeline.open()
    return {step: pipeline.batch(step)["tokens"].tolist() for step in steps}

  assert batches((31, 0, 2), 1) == batches((0, 2, 31), 1)
  assert batches(range(9), 1) != batches(range(9), 2)
  pipeline = _data(folder, batch_size=40, packed=False).train  # all documents in every batch of an epoch
  pipeline.open()
  hidden = set()
  for step in range(10 * pipeline.num_batches):
    tokens, chosen = _uncovered(pipeline.batch(step))
    hidden |= {tuple(c) for t, c in zip(tokens, chosen) if t[1:7].tolist() == list(b"train0")}
  assert len(hidden) > 5  # another place in each epoch


def test_an_evaluation_hides_by_the_example_whatever_the_batches(folder):
  def examples(**options):
    pipeline = _data(folder, **options).evals["validation"]
    pipeline.open()
    found = {}
    for step in range(pipeline.num_batches):
      batch = pipeline.batch(step)
      for i, id_ in enumerate(batch["id"]):
        if batch["mask"][i]:
          found[id_] = batch["tokens"][i, :batch["length"][i]].tolist()
    return found

  assert examples(eval_batch_size=3) == examples(eval_batch_size=7, buckets=1, seed=5, batch_size=2)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_hosts_share_out_the_global_batch(folder, split, reading):
  def get(*rows):
    data = _data(folder, eval_batch_size=4, **reading)
    pipeline = data.train if split == "train" else data.evals[split]
    pipeline.open(*rows)
    return pipeline

  whole = get()
  for rows in share(0, 2), share(1, 2):
    part = get(rows)
    for step in range(whole.num_batches):
      batch, own = whole.batch(step), part.batch(step)
      assert own.keys() == batch.keys()
      for field in batch:
        np.testing.assert_array_equal(own[field], batch[field][rows(4)])


def test_of_ten_tokens_eight_are_hidden_one_is_replaced_and_one_is_kept(folder):
  pipeline = _data(folder, batch_size=16).train
  pipeline.open()
  kept = replaced = hidden = 0
  others = set()
  for step in range(300):
    batch = pipeline.batch(step)
    tokens, chosen = _uncovered(batch)
    np.testing.assert_array_equal(tokens[~chosen], batch["tokens"][~chosen])
    now, before = batch["tokens"][chosen], tokens[chosen]
    hidden += np.sum(now == MASK)
    kept += np.sum(now == before)
    replaced += np.sum((now != MASK) & (now != before))
    others |= set(now[(now != MASK) & (now != before)].tolist())
  count = hidden + kept + replaced
  deviation = lambda p: 4 * (p * (1 - p) / count) ** 0.5
  assert count > 10_000
  assert abs(hidden / count - 0.8) < deviation(0.8)
  assert abs(replaced / count - 0.1 * 255 / 256) < deviation(0.1)  # a token may replace itself
  assert abs(kept / count - 0.1 - 0.1 / 256) < deviation(0.1)
  assert others < set(range(256)) and len(others) > 200  # no special token ever


def test_every_token_is_chosen_as_often():
  candidate = np.ones((1, 20), bool)
  candidate[0, 7] = False
  rng = np.random.default_rng(0)
  times = sum(masked.choose(candidate, candidate, np.ones((1, 20), int), rng.random((1, 20)), 0.15)[0].astype(int)
              for _ in range(4000))
  assert times.sum() == 3 * 4000 and times[7] == 0
  assert np.abs(np.delete(times, 7) - 3 * 4000 / 19).max() < 4 * (4000 * 3 / 19) ** 0.5


def test_words_are_chosen_whole():
  begins = np.array([[1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1]], bool)
  word = np.cumsum(begins[0])
  rng, total, seen = np.random.default_rng(0), 0, set()
  for _ in range(500):
    chosen = masked.choose(np.ones((1, 20), bool), begins, np.ones((1, 20), int), rng.random((1, 20)), 0.3)[0]
    assert all(len(set(chosen[word == w])) == 1 for w in set(word))
    total += chosen.sum()
    seen |= set(word[chosen])
  assert abs(total / 500 - 6) < 0.4 and seen == set(word)


def test_the_longest_word_is_chosen_where_there_is_no_other_and_none_where_nothing_may_be():
  one = np.ones((2, 5), bool)
  first = np.arange(5)[None].repeat(2, 0) == 0
  assert masked.choose(one, first, np.ones((2, 5), int), np.zeros((2, 5)), 0.15).all()
  assert not masked.choose(~one, first, np.ones((2, 5), int), np.zeros((2, 5)), 0.15).any()


@pytest.mark.parametrize("tokens, words", [
    (["The", " un", "know", "able", ",", " it", "'", "s"], ["The", " unknowable", ",", " it", "'", "s"]),
    (["The ", "un", "known ", "x"], ["The ", "unknown ", "x"]),
    (["▁a".replace("▁", ""), " ", "b", "c", " ", " d"], ["a", " ", "bc", " ", " d"]),
    (["日", "本", "語", "は"], ["日", "本", "語", "は"]),
    (["cafe", "\u0301", "s no"], ["cafe\u0301s no"]),
    ([" ", "x"], [" ", "x"]),
])
def test_words_are_those_of_the_text(tokens, words):
  found = masked.word_begins("".join(tokens), np.array([len(token) for token in tokens]))
  made = []
  for token, begins in zip(tokens, found):
    if begins:
      made.append("")
    made[-1] += token
  assert made == words


def test_the_bytes_of_a_character_are_one_word():
  encoded = tokenize.Bytes().encode("é 日本")
  found = masked.word_begins("é 日本", encoded.characters)
  assert found.tolist() == [True, False, True, True, False, False, True, False, False]


def test_whole_words_of_a_text_are_hidden_together(folder):
  pipeline = _data(folder, whole_words=True, mask_rate=0.3, documents=False, length=200).evals["validation"]
  pipeline.open()
  partly = 0
  for step in range(pipeline.num_batches):
    tokens, chosen = _uncovered(pipeline.batch(step))
    for row, hidden in zip(tokens, chosen):
      letters = np.array([t < 256 and chr(t).isalnum() for t in row])
      both = letters[1:] & letters[:-1]
      partly += np.sum(hidden[1:][both] != hidden[:-1][both])
  assert partly == 0 and chosen.any()


@pytest.mark.parametrize("fields, line", [
    ({"mask_rate": 0.0}, "--config.data.mask_rate=0.0: give a number between 0 and 1"),
    ({"mask_rate": 1.0}, "--config.data.mask_rate=1.0: give a number between 0 and 1"),
    ({"length": 2}, "--config.data.length=2: give at least 3 tokens"),
    ({"packed": True, "documents": False}, "--config.data.packed=True: goes with --config.data.documents=true"),
])
def test_bad_configs_are_refused_at_once(folder, fields, line):
  with pytest.raises(UserError, match=line):
    _data(folder, **fields)


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path):
  (tmp_path / "text.txt").write_text("to be or not to be " * 40)
  data = _data("", file=str(tmp_path / "text.txt"))
  with pytest.raises(UserError, match="--config.data.tokenizer=byte: has no token that hides others; choose wordpiece"):
    data.train.open()


def test_the_config_is_that_of_texts_without_what_has_no_meaning():
  ours, texts = masked.default_config(), corpus.default_config()
  assert set(texts) - set(ours) == {"eval_stride"} and set(ours) <= set(ours.sentences)
