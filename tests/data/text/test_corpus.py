"""The text pipelines: every token is read in order and predicted once, whatever the streams, hosts and lengths."""

import json
import platform
import shutil
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from dljax.data import prepare, sources
from dljax.data.pipeline import Plan
from dljax.data.text import corpus, tokenize
from dljax.data.text import streams as streams_lib
from dljax.data.datasets import pydoc
from dljax.errors import UserError
from tests.data.hosts import share

PLAY = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 12 + "Ende: 日本é\n"
END = tokenize.Bytes.end
PYDOC = f"pydoc/{platform.python_version()}"
SHARED = Path(__file__).parents[4] / "shared" / "data" / "tfds"


@pytest.fixture
def play(tmp_path):
  path = tmp_path / "play.txt"
  path.write_text(PLAY)
  return path


@pytest.fixture
def documents(prepared, monkeypatch):
  """split -> the texts of its documents, in the order in which they are stored."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared(PYDOC)))

  def read(split):
    records = sources.open_dataset(PYDOC).records(split)
    return [record["text"][0].decode() for record in records[range(len(records))]]

  return read


def _config(play, **fields):
  config = corpus.default_config()
  config.update({"file": str(play), "length": 16, **fields})
  return config


def _data(play, batch_size=4, eval_batch_size=3, seed=0, carried=True, **fields):
  return corpus.TextSet(_config(play, **fields), carried).pipelines(
      batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)


def _folder(folder, count, size=40, start=0):
  """A folder of documents, one of them in a subfolder; name -> text."""
  texts = {}
  for i in range(start, start + count):
    name = f"deep/{i}.txt" if i == 1 else f"{i}.txt"
    texts[name] = f"{i}: " + "abcdefghij"[i % 10] * size
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(texts[name])
  return texts


def _bytes_of(split):
  return list(corpus.split_text(PLAY)[split].encode())


def _predicted(batch):
  """The tokens that each row of a batch predicts."""
  for tokens, targets, weight, n in zip(*(batch[f] for f in ("tokens", "targets", "target_weight", "length"))):
    assert tokens[1:n].tolist() == targets[:max(n - 1, 0)].tolist() and not tokens[n:].any() and not targets[n:].any()
    assert weight.tolist() == [1] * n + [0] * (len(weight) - n)
  return [row[:n].tolist() for row, n in zip(batch["targets"], batch["length"])]


# Streams


@pytest.mark.parametrize("eval_batch_size, length", [(1, 16), (3, 16), (3, 7), (5, 1000), (200, 4)])
def test_an_evaluation_predicts_every_token_once_in_reading_order(play, eval_batch_size, length):
  pipeline = _data(play, eval_batch_size=eval_batch_size, length=length).evals["validation"]
  pipeline.open()
  streams = [[] for _ in range(eval_batch_size)]
  totals = np.zeros(2)
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    assert np.all(batch["reset"] == (step == 0))
    for stream, predicted, row, mask, place, id_ in zip(
        streams, _predicted(batch), batch["tokens"], batch["mask"], batch["host/position"], batch["id"]):
      assert mask == bool(predicted) and (place >= 0) == bool(predicted) and id_ == max(place, 0)
      if stream and predicted:
        assert row[0] == stream[-1]  # what is read goes on where the window before ended
      stream += predicted
    totals += batch["characters"].sum(), batch["bytes"].sum()
  assert sum(streams, []) == _bytes_of("validation")
  expected = corpus.split_text(PLAY)["validation"]
  assert tuple(totals) == (len(expected), len(expected.encode()))
  for step in (-1, pipeline.num_batches):
    with pytest.raises(IndexError):
      pipeline.batch(step)


def test_the_first_token_is_predicted_from_the_end_token(play):
  pipeline = _data(play).evals["test"]
  pipeline.open()
  assert pipeline.batch(0)["tokens"][0, 0] == END


def test_training_reads_parallel_streams_in_order_and_starts_each_epoch_anew(play):
  pipeline = _data(play).train
  pipeline.open()
  windows = pipeline.num_batches
  assert windows == (len(_bytes_of("train")) // 64) and pipeline.num_examples == 4 * windows
  whole = [END, *_bytes_of("train")]
  starts = set()
  for epoch in range(6):
    batches = [pipeline.batch(epoch * windows + i) for i in range(windows)]
    assert [set(batch["reset"]) for batch in batches] == [{1.0}] + [{0.0}] * (windows - 1)
    spec = _data(play).batch_spec
    for batch in batches:
      assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in spec.items()}
      assert batch["mask"].all() and batch["target_weight"].all() and (batch["length"] == 16).all()
      assert batch["id"].tolist() == [0, 1, 2, 3]
    tokens, targets = (np.stack([batch[field] for batch in batches], axis=1) for field in ("tokens", "targets"))
    np.testing.assert_array_equal(tokens[:, 1:, 0], targets[:, :-1, -1])  # [B, windows, L]
    read = np.concatenate([tokens[0, 0, :1], targets.reshape(-1)]).tolist()
    places = [i for i in range(len(whole)) if whole[i:i + len(read)] == read]
    assert places
    starts.add(places[0])
  assert len(starts) > 1  # another end is left out


def test_every_token_is_some_epochs_first_or_last():
  """13 tokens, of which two streams of windows of 5 read 10 and predict as many: an epoch begins at 0, 1 or 2."""
  text = tokenize.Encoded(*np.arange(39).reshape(3, 13).astype(np.int32))
  streams = streams_lib.Streams(lambda: (text, np.zeros(1, int)), batch_size=2, length=5, train=True)
  streams.open()
  assert {int(streams.batch(epoch)["tokens"].min()) for epoch in range(40)} == {0, 1, 2}


def test_documents_take_twelve_bytes_for_each_token():
  text = tokenize.Encoded(*(np.ones(100_000, np.int32) for _ in range(3)))
  tracemalloc.start()
  made = streams_lib.Documents((text, np.array([0])), 1_000, END, counts=True)
  held = tracemalloc.get_traced_memory()[0]
  tracemalloc.stop()
  assert len(made) == 100 and 1_200_000 <= held < 1_300_000


# Streams, windows, documents, and several documents in a row.
READINGS = [{}, {"carried": False}, {"documents": True}, {"carried": False, "documents": True, "packed": True}]


@pytest.mark.parametrize("reading", READINGS)
def test_a_batch_is_a_function_of_seed_and_step(play, reading):
  def batches(steps, seed):
    pipeline = _data(play, seed=seed, **reading).train
    pipeline.open()
    return {step: pipeline.batch(step)["tokens"].tolist() for step in steps}

  assert batches((31, 0, 2), 1) == batches((0, 2, 31), 1)
  assert batches(range(9), 1) != batches(range(9), 2)


def test_training_text_takes_four_bytes_for_each_token(play):
  texts = corpus.TextSet(_config(play))
  held = {split: sum(array.nbytes for array in texts.read(split)[0]) for split in ("train", "validation")}
  assert held["train"] == 4 * (1 + len(_bytes_of("train"))) and held["validation"] == 12 * (1 + len(_bytes_of("validation")))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_hosts_share_out_the_global_batch(play, split, reading):
  def get(*rows):
    data = _data(play, eval_batch_size=4, **reading)
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


def test_documents_of_a_stream_are_told_apart(documents):
  pipeline = _data("", name=PYDOC, eval_batch_size=1, length=1000).evals["test"]
  pipeline.open()
  stream = sum((_predicted(pipeline.batch(step))[0] for step in range(pipeline.num_batches)), [])
  assert [*stream, END] == sum((list(t.encode()) + [END] for t in documents("test")), [])


# Windows


@pytest.mark.parametrize("length, stride", [(16, 0), (16, 8), (7, 3), (7, 1), (1, 1), (1000, 500)])
def test_windows_of_an_evaluation_predict_every_token_once(play, length, stride):
  pipeline = _data(play, length=length, eval_stride=stride, carried=False).evals["validation"]
  pipeline.open()
  text = [END, *_bytes_of("validation")]
  found, totals = [], np.zeros(2)
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    for tokens, targets, weight, n, place, mask in zip(*(batch[field] for field in (
        "tokens", "targets", "target_weight", "length", "host/position", "mask"))):
      assert mask == (n > 0) == (place >= 0)
      if not n:
        continue
      assert tokens[:n].tolist() == text[place:place + n] and targets[:n].tolist() == text[place + 1:place + n + 1]
      assert not tokens[n:].any() and not targets[n:].any()
      counted = np.flatnonzero(weight)
      assert counted.tolist() == list(range(counted[0], n))
      assert counted[0] == (0 if place == 0 or not stride else length - stride)  # what is predicted from more
      found += (place + 1 + counted).tolist()
    totals += batch["characters"].sum(), batch["bytes"].sum()
  assert sorted(found) == list(range(1, len(text)))
  expected = corpus.split_text(PLAY)["validation"]
  assert tuple(totals) == (len(expected), len(expected.encode()))


def test_training_windows_read_every_token_once_an_epoch_from_another_start(play):
  play.write_text("".join(map(chr, range(0x4e00, 0x4e00 + 500))))  # no character twice, so token i is character i
  data = _data(play, batch_size=5, carried=False, tokenizer="character", vocab_size=500)
  pipeline = data.train
  pipeline.open()
  windows = pipeline.num_examples
  assert windows == 27  # of 450 tokens; 28 would always be the same
  read = []
  for step in range(-(-4 * windows // 5)):
    batch = pipeline.batch(step)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == (
        {k: (v.shape, v.dtype) for k, v in data.batch_spec.items()})
    assert batch["target_weight"].all() and batch["mask"].all()  # B L tokens
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    np.testing.assert_array_equal(batch["tokens"], batch["tokens"][:, :1] + np.arange(16))
    read += batch["tokens"][:, 0].tolist()
  starts = set()
  for epoch in range(4):
    begins = read[epoch * windows:(epoch + 1) * windows]
    assert begins != sorted(begins) and np.diff(sorted(begins)).tolist() == [16] * (windows - 1)
    assert 0 <= min(begins) and max(begins) + 16 <= 450
    starts.add(min(begins))
  assert len(starts) > 1


def test_every_epochs_windows_begin_at_one_of_all_places():
  """23 tokens, of which 22 are predicted: three windows of 5 that begin at 0 to 7."""
  text = tokenize.Encoded(*np.arange(69).reshape(3, 23).astype(np.int32))
  windows = streams_lib.Windows(text, 5, stride=5, train=True)
  assert len(windows) == 3
  starts = set()
  for step in range(80):
    rows = np.arange(3)
    batch = windows.gather(Plan(0, step, np.array([2, 0, 1]), rows), rows)
    first = int(batch["tokens"].min())
    assert batch["tokens"][:, 0].tolist() == [first + 10, first, first + 5]
    starts.add(first)
  assert starts == set(range(8))


def test_a_sample_of_windows_is_evaluated_first(play):
  pipeline = _data(play, length=4, carried=False).evals["validation"]
  pipeline.sample(4, seed=1)
  pipeline.open()
  assert pipeline.num_sample_batches == 2 and sum(pipeline.batch(i)["mask"].sum() for i in range(2)) == 4


# Documents


@pytest.mark.parametrize("buckets", [1, 8])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_documents_are_predicted_to_their_ends_once_whatever_the_buckets(documents, buckets, split):
  pipeline = _data("", name=PYDOC, documents=True, buckets=buckets, length=500).evals[split]
  pipeline.open()
  texts = documents(split)
  pieces, totals, shapes = {}, np.zeros(2), set()
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    shapes.add(batch["tokens"].shape)
    pieces |= {i: predicted for i, predicted in zip(batch["id"], _predicted(batch)) if predicted}
    totals += batch["characters"].sum(), batch["bytes"].sum()
    assert batch["reset"].all()
  assert len(shapes) <= buckets
  assert sum((pieces[i] for i in sorted(pieces)), []) == sum((list(t.encode()) + [END] for t in texts), [])
  assert max(map(len, pieces.values())) <= 500
  assert tuple(totals) == (sum(map(len, texts)), sum(len(t.encode()) for t in texts))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_documents_are_those_of_the_split(documents, split):
  data = _data("", name=PYDOC, documents=True, packed=True, carried=False, length=500, batch_size=2)
  pipeline = data.train if split == "train" else data.evals[split]
  pipeline.open()
  found, totals, used = [], np.zeros(2), []
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    if split == "train":
      assert {k: (v.shape, v.dtype) for k, v in batch.items()} == (
          {k: (v.shape, v.dtype) for k, v in data.batch_spec.items()})
    else:
      totals += batch["characters"].sum(), batch["bytes"].sum()
      assert ((batch["host/position"] >= 0) == (batch["segment"] > 0)).all()
    np.testing.assert_array_equal(batch["target_weight"], batch["segment"] > 0)
    np.testing.assert_array_equal(batch["length"], np.sum(batch["segment"] > 0, axis=1))
    used += batch["length"].tolist()
    for tokens, targets, segment, position in zip(*(batch[f] for f in ("tokens", "targets", "segment", "position"))):
      assert not tokens[segment == 0].any() and not targets[segment == 0].any() and not position[segment == 0].any()
      for number in range(1, segment.max() + 1):
        place = np.flatnonzero(segment == number)
        assert place.tolist() == list(range(place[0], place[-1] + 1)) and place[0] == np.sum(
            (segment > 0) & (segment < number))
        assert position[place].tolist() == list(range(len(place)))
        assert tokens[place][1:].tolist() == targets[place][:-1].tolist()
        found.append([*tokens[place].tolist(), targets[place][-1]])
  pieces = []
  for text in documents(split):
    closed = [END, *text.encode(), END]
    pieces += [closed[i:i + 501] for i in range(0, len(closed) - 1, 500)]
  if split == "train":  # the last row may not have filled a batch
    assert len(used) in (pipeline.num_examples, pipeline.num_examples - 1)
    pieces = [piece for piece in pieces if piece in found]
  else:
    assert tuple(totals) == (sum(map(len, documents(split))), sum(len(t.encode()) for t in documents(split)))
    assert pipeline.num_examples == sum(n > 0 for n in used) < len(pieces)
  assert sorted(found) == sorted(pieces)


def test_topics_lie_in_one_split_by_their_text():
  from pydoc_data.topics import topics
  splits = pydoc.split_topics(topics)
  assert sorted(sum(splits.values(), [])) == sorted(topics)
  where = {}
  for split, names in splits.items():
    for name in names:
      where.setdefault(topics[name], set()).add(split)
  assert all(len(found) == 1 for found in where.values())
  sizes = {split: sum(len(topics[name]) for name in names) for split, names in splits.items()}
  assert sizes["train"] > 0.7 * sum(sizes.values()) and min(sizes.values()) > 10_000


def test_pydoc_is_the_documentation_of_this_python_alone(documents):
  from pydoc_data.topics import topics
  for split, names in pydoc.split_topics(topics).items():
    assert sorted(documents(split)) == sorted(topics[name] for name in names)
  with pytest.raises(UserError, match=f"did you mean {PYDOC}"):
    sources.open_dataset("pydoc/3.0.0")


# Tokenizers, fitted and restored


@pytest.mark.parametrize("kind", ["character", "bpe", "wordpiece", "unigram"])
def test_a_tokenizer_is_fitted_to_the_training_text_alone(play, kind):
  fields = {"tokenizer": kind, "vocab_size": 400, "byte_fallback": kind in ("character", "unigram")}
  asset = _data(play, **fields).assets()[corpus.ASSET]
  changed = PLAY[:int(0.9 * len(PLAY))] + "Q" * (len(PLAY) - int(0.9 * len(PLAY)))
  play.write_text(changed)
  again = _data(play, **fields).assets()[corpus.ASSET]
  if kind in ("character", "bpe"):  # the others decide by chance between equally good words
    assert asset == again
  assert "QQ" not in str(again) and "Q" not in again.get("characters", "")
  data = _data(play, **fields)
  data.evals["test"].open()
  assert data.evals["test"].batch(0)["tokens"].max() < 400


def test_a_restored_tokenizer_takes_the_place_of_a_new_one(play):
  asset = tokenize.Characters("".join(sorted(set(PLAY))) + "\U0001F408", False).to_json()
  data = _data(play, tokenizer="character")
  data.restore({corpus.ASSET: asset})
  assert data.assets()[corpus.ASSET] == asset


def test_tiny_shakespeare_as_tfds_splits_it(monkeypatch):
  if not (SHARED / "tiny_shakespeare").is_dir():
    pytest.skip(f"tiny_shakespeare is not prepared in {SHARED}")
  monkeypatch.setenv("TFDS_DATA_DIR", str(SHARED))
  data = _data("", name="tiny_shakespeare", tokenizer="character", vocab_size=66)
  assert tokenize.from_json(data.assets()[corpus.ASSET]).size == 66
  sizes = {"train": 1_003_854, "validation": 55_770, "test": 55_770}
  for split, pipeline in {"train": data.train, **data.evals}.items():
    pipeline.open()
    assert pipeline._targets() == sizes[split]


def test_tiny_shakespeare_is_prepared_from_its_file(tmp_path, monkeypatch):
  import hashlib
  from dljax.data.datasets import stock

  (tmp_path / "input.txt").write_text(PLAY)
  url, info = next(iter(stock.TinyShakespeare.url_infos.items()))
  assert info.checksum.startswith("86c4e6aa9db7c042") and url.endswith("tinyshakespeare/input.txt")
  monkeypatch.setattr(stock.TinyShakespeare, "url_infos", {
      url: type(info)(size=1, checksum=hashlib.sha256(PLAY.encode()).hexdigest(), filename="input.txt")})
  prepare.prepare("tiny_shakespeare", tmp_path / "tfds", tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  dataset = sources.open_dataset("tiny_shakespeare")
  found = {split: dataset.records(split)[[0]][0]["text"][0].decode() for split in ("train", "validation", "test")}
  assert found == corpus.split_text(PLAY) and "".join(found.values()) == PLAY


# Prompts


def test_prompts_begin_with_the_end_token_and_are_padded():
  batch = corpus.encode_prompts(["ab", ""], ["a", "b"], tokenize.Bytes())
  assert batch["prompt"].tolist() == [[END, 97, 98], [END, 0, 0]]
  assert (batch["length"].tolist(), batch["id"].tolist(), batch["mask"].tolist()) == ([3, 1], [0, 1], [1, 1])
  with pytest.raises(UserError, match="--prompt: the character 'z'"):
    corpus.encode_prompts(["z"], ["--prompt"], tokenize.Characters("ab", False))


# Bad input


@pytest.mark.parametrize("content, line", [
    (b"", "--config.data.file=.*play.txt is empty"),
    (b"caf\xe9", "--config.data.file=.*play.txt is not UTF-8 .byte 3.; convert it"),
    (b"short", "--config.data.length=16: the training text has 4 tokens, too few for one window in each of 4 streams"),
    (None, "--config.data.file=.*play.txt cannot be read .No such file"),
])
def test_bad_files_are_named(play, content, line):
  play.unlink()
  if content is not None:
    play.write_bytes(content)
  with pytest.raises(UserError, match=line):
    _data(play).train.open()


def test_a_text_shorter_than_a_window_or_a_batch_of_them_is_refused(play):
  play.write_text("x" * 100)
  with pytest.raises(UserError, match="--config.data.length=91: the training text has 90 tokens, too few for one win"):
    _data(play, length=91, carried=False).train.open()
  with pytest.raises(UserError, match="--config.batch_size=4: there are only 1 training examples; make it smaller"):
    _data(play, length=90, carried=False).train.open()
  assert _data(play, batch_size=1, length=90, carried=False).train.open()


def test_characters_that_training_has_not_seen_are_named(play):
  play.write_text("abc " * 300 + "é" * 30)
  with pytest.raises(UserError, match=r"play.txt \(test\), document 0: the character 'é' \(U\+00E9\) at position"):
    _data(play, tokenizer="character").evals["test"].open()
  fallen_back = _data(play, tokenizer="character", vocab_size=300, byte_fallback=True).evals["test"]
  assert fallen_back.open()


@pytest.mark.parametrize("fields, line", [
    ({"tokenizer": "bytes"}, "--config.data.tokenizer: there is no 'bytes'; did you mean byte"),
    ({"length": 0}, "--config.data.length=0: give at least 1"),
    ({"vocab_size": 200}, "--config.data.vocab_size=200: bytes need 257"),
    ({"tokenizer": "bpe", "vocab_size": 257}, "--config.data.vocab_size=257: sub-words need at least 300"),
    ({"tokenizer": "file"}, "--config.data.tokenizer_file='': name a SentencePiece .model"),
    ({"tokenizer_file": "x.model"}, "--config.data.tokenizer_file='x.model': goes with"),
    ({"train": "train[:50%]"}, "--config.data.train='train\\[:50%\\]': a text of your own has only the split train"),
    ({"train": ""}, "--config.data.train='': name the split"),
    ({"documents": True, "buckets": 9}, "--config.data.buckets=9"),
    ({"eval_stride": 17}, "--config.data.eval_stride=17: give a number from 1 to --config.data.length=16, or 0"),
    ({"eval_stride": 8, "documents": True}, "--config.data.eval_stride=8: documents are not read in windows"),
    ({"packed": True}, "--config.data.packed=True: goes with --config.data.documents=true"),
    ({"packed": True, "documents": True}, "--config.data.packed=True: a model that carries its state would carry it"),
    ({"eval_stride": 8}, "--config.data.eval_stride=8: a model that carries its state has read all that comes"),
    ({"file": "", "name": "../x"}, "is not a TFDS name"),
])
def test_bad_configs_are_refused_at_once(play, fields, line):
  with pytest.raises(UserError, match=line):
    _data(play, **fields)


def test_bad_sets_are_refused_when_opened(play, documents, monkeypatch):
  with pytest.raises(UserError, match="--config.data.vocab_size=9: the tokenizer has 2[0-9] tokens; give that"):
    _data(play, tokenizer="character", vocab_size=9).train.open()
  with pytest.raises(UserError, match="tiny_shakespeare is not prepared in"):
    _data("", name="tiny_shakespeare").train.open()
  with pytest.raises(UserError, match="--config.data.field: there is no 'txt'; did you mean text"):
    _data("", name=PYDOC, field="txt").train.open()
  with pytest.raises(UserError, match="--config.data.train: there is no 'training'; did you mean train"):
    _data("", name=PYDOC, train="training").train.open()
  monkeypatch.setattr(sources, "open_dataset", lambda name: types.SimpleNamespace(features={"image": 0, "label": 0}))
  with pytest.raises(UserError, match="digits has no text, but image, label; choose another set"):
    _data("", name="digits").train.open()


@pytest.mark.parametrize("assets", [
    {}, {corpus.ASSET: None}, {corpus.ASSET: []}, {corpus.ASSET: {"kind": "character"}},
    {corpus.ASSET: {"kind": "subword", "tokenizer": "{}", "end": 0}}])
def test_a_damaged_tokenizer_of_a_run_is_one_line(play, assets):
  with pytest.raises(UserError, match="data/tokenizer.json does not hold a tokenizer"):
    _data(play).restore(assets)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(play):
  asset = tokenize.Characters("".join(map(chr, range(300))), False).to_json()
  with pytest.raises(UserError, match="data/tokenizer.json has 301 tokens, and --config.data.vocab_size is 257"):
    _data(play).restore({corpus.ASSET: asset})


@pytest.mark.parametrize("value", [[b"caf\xe9"], [], [5]])
def test_a_document_that_is_no_text_is_named(documents, monkeypatch, value):
  monkeypatch.setattr(sources.Records, "__getitem__", lambda self, indices: [{"text": value}])
  with pytest.raises(UserError, match="--config.data.train='train', document 0: text holds no text in UTF-8"):
    _data("", name=PYDOC).train.open()


@pytest.mark.parametrize("file, reason", [("a\0b", "null"), ("~no-such-user/x", "home directory")])
def test_paths_that_are_none_are_named(file, reason):
  with pytest.raises(UserError, match=f"--config.data.file=.*cannot be read .*{reason}"):
    corpus.read_file(file, "--config.data.file")


# A folder of the user's own


def _find(given=(), seed=0, **fields):
  config = corpus.default_config()
  config.update({"length": 8, **fields})
  return corpus.find(config, seed, set(given))


def test_many_documents_are_split_whole_by_seed_and_content(tmp_path):
  texts = _folder(tmp_path, 40)
  (tmp_path / "12.txt").write_text(texts["7.txt"])  # a twin
  (tmp_path / "notes.md").write_text("no document")
  (tmp_path / ".hidden.txt").write_text("nor this")
  texts["12.txt"] = texts["7.txt"]
  parts = {seed: corpus.split_documents(tmp_path, seed, "--config.data.folder") for seed in (0, 0, 1)}
  for found in parts.values():
    assert {name: text for part in found.values() for name, text in part.items()} == texts
    assert [len(found[split]) for split in ("train", "validation", "test")] in ([36, 2, 2], [35, 3, 2], [35, 2, 3])
    assert any({"12.txt", "7.txt"} <= part.keys() for part in found.values())
  assert parts[0] != parts[1]
  assert parts[0] == corpus.split_documents(tmp_path, 0, "")  # a function of the seed
  name = sorted(parts[0]["test"])[0]
  (tmp_path / name).rename(tmp_path / "renamed.txt")
  assert "renamed.txt" in corpus.split_documents(tmp_path, 0, "")["test"]
  found, lines = _find(folder=str(tmp_path))
  assert not found and lines[0].startswith(f"{tmp_path}: 1,7") and lines[0].endswith("; left out notes.md")


def test_few_documents_are_each_cut_by_characters(tmp_path):
  texts = _folder(tmp_path, 3)
  found = corpus.split_documents(tmp_path, 0, "")
  assert list(found["train"]) == ["0.txt", "2.txt", "deep/1.txt"]
  for name, text in texts.items():
    assert {split: part[name] for split, part in found.items()} == corpus.split_text(text)


def test_folders_named_like_splits_are_the_splits(tmp_path):
  for i, split in enumerate(("train", "Val", "test")):
    _folder(tmp_path / split, 2, start=2 * i)
  found = corpus.split_documents(tmp_path, 0, "")
  assert {split: list(part) for split, part in found.items()} == {
      "train": ["train/0.txt", "train/deep/1.txt"], "validation": ["Val/2.txt", "Val/3.txt"],
      "test": ["test/4.txt", "test/5.txt"]}


def test_an_evaluation_can_read_all_of_a_text(tmp_path, play):
  texts = _folder(tmp_path / "in", 3)
  whole = corpus.TextSet(_config("", folder=str(tmp_path / "in"), train="", validation=""))
  read, begins = whole.read("test")
  assert bytes(read.tokens[read.tokens != END].tolist()).decode() == texts["0.txt"] + texts["2.txt"] + texts["deep/1.txt"]
  assert len(begins) == 3
  with pytest.raises(UserError, match="--config.data.train='': name the split to train on"):
    whole.read("train")
  data = _data(play, train="", validation="")
  assert list(data.evals) == ["test"]
  data.evals["test"].open()
  with pytest.raises(UserError, match="data.train='': name the split to train on"):
    _data(play, train="")


def test_the_characters_of_a_text_are_counted_once(play, tmp_path):
  count = len(set(corpus.split_text(PLAY)["train"])) + 1
  found, lines = _find(file=str(play), tokenizer="character")
  assert found == {"vocab_size": count} and lines == [
      f"{play}: 1,030 characters (train 927, validation 51, test 52)"]
  assert _find(file=str(play), tokenizer="character", byte_fallback=True)[0] == {"vocab_size": count + 256}
  assert _find(["vocab_size"], file=str(play), tokenizer="character", vocab_size=99)[0] == {}
  assert _find() == _find(file=str(tmp_path / "no.txt")) == ({}, [])
  with pytest.raises(UserError, match="file=.*no.txt: there is no such file; .* dry run .* --config.data.vocab_size"):
    _find(file=str(tmp_path / "no.txt"), tokenizer="character")


def test_a_run_is_not_evaluated_on_documents_that_it_was_trained_on(tmp_path, caplog):
  mine, other = tmp_path / "mine", tmp_path / "other"
  texts = _folder(mine, 12)
  trained = corpus.TextSet(_config("", folder=f"{mine}/"))
  data = trained.pipelines(batch_size=2, eval_batch_size=2, seed=0)
  assets = json.loads(json.dumps(data.assets()))
  parts = {split: list(part) for split, part in trained.own_documents.items()}
  assert {name: split for name, (_, split) in assets["files"]["files"].items()} == {
      name: split for split, names in parts.items() for name in names}

  def evaluated(**fields):
    texts = corpus.TextSet(_config("", **{"train": "", "validation": "", **fields}))
    texts.restore(assets)
    return texts.own_documents["test"]

  shutil.copytree(mine, other)
  assert evaluated(folder=str(other)).keys() == texts.keys() and not caplog.text  # the same text, all of it
  (other / "new.txt").write_text("never seen")
  assert evaluated(folder=str(other)).keys() == {"new.txt", *parts["validation"], *parts["test"]}
  assert f"--config.data.folder={other}: left out what the run was trained on, 10 of 13 documents: " in caplog.text
  assert parts["train"][0] in caplog.text
  with pytest.raises(UserError, match="holds nothing but what the run was trained on; name another"):
    evaluated(folder="", file=str(other / parts["train"][0]))
  (mine / "deep" / "1.txt").write_text("changed")
  with pytest.raises(UserError, match=f"--config.data.folder={mine} has changed since .*changed: deep/1.txt.; restore"):
    evaluated(folder=str(mine))


def test_a_text_that_was_cut_is_known_as_a_whole(play, tmp_path):
  assets = _data(play).assets()
  texts = corpus.TextSet(_config(tmp_path / "other.txt"))
  texts.restore(assets)
  (tmp_path / "other.txt").write_text(PLAY)
  assert texts.own_documents["test"]  # it is the run's own text in another place
  play.write_text(PLAY + "more")
  changed = corpus.TextSet(_config(play))
  changed.restore(assets)
  with pytest.raises(UserError, match="--config.data.file=.*has changed since the run began .changed: play.txt"):
    changed.fingerprint()


def test_a_folder_need_not_have_every_split(tmp_path):
  for name in ("train/a.txt", "val/b.txt"):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(PLAY + name)
  found, lines = _find(folder=str(tmp_path))
  assert found == {"test": ""} and ", test" not in lines[0]
  (tmp_path / "val" / "b.txt").unlink()
  assert _find(folder=str(tmp_path))[0] == {"validation": "", "test": ""}
  (tmp_path / "c.txt").write_text(PLAY)
  found, lines = _find(["test"], folder=str(tmp_path))
  assert found == {"validation": ""} and lines[0].endswith("; left out c.txt")


def test_the_fingerprint_of_a_folder_is_that_of_names_and_contents(tmp_path):
  _folder(tmp_path, 12)
  of = lambda: corpus.TextSet(_config("", folder=str(tmp_path))).fingerprint()
  first = of()
  (tmp_path / "3.txt").write_text("3: dddd")
  second = of()
  (tmp_path / "3.txt").rename(tmp_path / "three.txt")
  assert first.startswith("12 files of ") and len({first, second, of()}) == 3


@pytest.mark.parametrize("fields, message", [
    ({"folder": "no"}, "--config.data.folder=no: there is no such folder"),
    ({"folder": "in", "file": "x.txt"}, "--config.data.folder='in': goes without --config.data.file"),
    ({"file": "in"}, "--config.data.file=in is a folder; .* --config.data.folder"),
    ({"folder": "empty"}, "--config.data.folder=empty: holds no .txt file"),
    ({"folder": "bad"}, "--config.data.folder=bad/b.txt is not UTF-8 .byte 0."),
    ({"folder": "void"}, "--config.data.folder=void/a.txt is empty"),
    ({"file": "/dev/zero"}, "--config.data.file=/dev/zero has more than .* bytes"),
])
def test_folders_that_hold_no_texts_are_refused(tmp_path, monkeypatch, fields, message):
  monkeypatch.chdir(tmp_path)
  _folder(tmp_path / "in", 3)
  for name, content in (("empty/a.md", b"a"), ("bad/b.txt", b"\xff"), ("void/a.txt", b"")):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    corpus.TextSet(_config(fields.get("file", ""), folder=fields.get("folder", ""))).read("train")
