"""Texts with a class each: framed and cut as BERT reads them, from a set or from the user's own table."""

import platform

import numpy as np
import pytest
from pydoc_data.topics import topics

from dljax.data.datasets import pydoc
from dljax.data.text import labelled, tokenize
from dljax.errors import UserError
from tests.data.hosts import share

END = tokenize.Bytes.end
PARAGRAPHS = f"pydoc_paragraphs/{platform.python_version()}"


class _Roles(tokenize.Bytes):
  size = 261
  roles = {"mask": 257, "class": 258, "separator": 259, "pad": 260}


@pytest.fixture
def reviews(tmp_path):
  """A table with 30 reviews of each of two kinds."""
  path = tmp_path / "reviews.csv"
  rows = [f"{'good' if i % 2 else 'bad'} film {i},{'pos' if i % 2 else 'neg'}" for i in range(60)]
  path.write_text("\n".join(["text,label", *rows]))
  return path


def _set(path, **fields):
  config = labelled.default_config()
  config.update({"table": str(path), "fitted_to": str(path), "length": 24, "vocab_size": 261, **fields})
  return labelled.LabelledTexts(config)


def _data(path, seed=0, batch_size=4, eval_batch_size=3, **fields):
  return _set(path, **fields).pipelines(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)


def _examples(pipeline):
  """The (text, label) of each row of a pass."""
  pipeline.open()
  found = []
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    for tokens, n, label, mask in zip(*(batch[field] for field in ("tokens", "length", "label", "mask"))):
      assert bool(mask) == (n > 0) and not tokens[n:].any()
      if n:
        assert tokens[0] == END and tokens[n - 1] == END
        found.append((bytes(tokens[1:n - 1].tolist()).decode(), int(label)))
  return found


def _look_up(path, *given, **fields):
  config = labelled.default_config()
  config.update({"table": str(path), **fields})
  return labelled.look_up(config, 0, given)


# Frames


@pytest.mark.parametrize("texts, length, tokens, types", [
    (["abc"], 9, [258, 97, 98, 99, 259], [0] * 5),
    (["abcdef"], 5, [258, 97, 98, 99, 259], [0] * 5),
    (["ab", "cd"], 9, [258, 97, 98, 259, 99, 100, 259], [0] * 4 + [1] * 3),
    (["ab", "cdefgh"], 9, [258, 97, 98, 259, 99, 100, 101, 102, 259], [0] * 4 + [1] * 5),
    (["abcdef", "g"], 7, [258, 97, 98, 99, 259, 103, 259], [0] * 5 + [1] * 2),
    (["abcdef", "ghijkl"], 7, [258, 97, 98, 259, 103, 104, 259], [0] * 4 + [1] * 3),
    (["", "a"], 7, [258, 259, 97, 259], [0, 0, 1, 1]),
])
def test_texts_are_framed_and_the_longer_one_is_cut(texts, length, tokens, types):
  found = labelled.encode(texts, _Roles(), length, "x")
  assert [part.tolist() for part in found] == [tokens, types]
  assert [part.dtype for part in found] == [np.int32, np.int32]


def test_a_tokenizer_without_roles_frames_by_its_end():
  tokens, _ = labelled.encode(["a", "b"], tokenize.Bytes(), 9, "x")
  assert tokens.tolist() == [END, 97, END, 98, END]


# A set


def test_paragraphs_of_a_topic_are_in_one_split_by_their_text():
  found = pydoc.paragraphs(topics)
  assert set(found.values()) == set(pydoc.PARAGRAPHS_OF) and min(map(len, found)) >= pydoc.SHORTEST
  whole = {topic: " ".join(topics[topic].split()) for topic in pydoc.PARAGRAPHS_OF}
  assert all(text in whole[topic] for text, topic in found.items())
  shares = np.array([sum(pydoc.draw_split(text) == split for text in found)
                     for split in ("train", "validation", "test")]) / len(found)
  assert 0.7 < shares[0] < 0.82 and shares[1:].min() > 0.08


def test_a_set_gives_every_text_with_its_class(prepared, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared(PARAGRAPHS)))
  data = _data("", name=PARAGRAPHS, num_classes=8, length=10_000)
  found = _examples(data.evals["test"])
  expected = {text: topic for text, topic in pydoc.paragraphs(topics).items() if pydoc.draw_split(text) == "test"}
  assert {text: pydoc.PARAGRAPHS_OF[label] for text, label in found} == expected and len(found) == len(expected)
  assert data.assets()["classes"] == list(pydoc.PARAGRAPHS_OF)


@pytest.mark.parametrize("fields, line", [
    ({"num_classes": 3}, "--config.data.num_classes=3: pydoc_paragraphs.* has 8 classes; give that number"),
    ({"text_features": ("txt",)}, "--config.data.text_features: there is no 'txt'; did you mean text"),
    ({"label_feature": "text", "text_features": ("label",)}, "--config.data.text_features: there is no 'label'"),
    ({"name": f"pydoc/{platform.python_version()}"}, "--config.data.name: pydoc.* has no ClassLabel among its features"),
])
def test_sets_that_do_not_fit_are_refused(prepared, monkeypatch, fields, line):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared(PARAGRAPHS, f"pydoc/{platform.python_version()}")))
  with pytest.raises(UserError, match=line):
    _data("", **{"name": PARAGRAPHS, "num_classes": 8, **fields}).train.open()


# A table


def test_a_table_is_split_by_class_and_text(reviews):
  data = _data(reviews)
  parts = {split: _examples(pipeline) for split, pipeline in data.evals.items()}
  assert all(label == text.startswith("good") for part in parts.values() for text, label in part)
  assert {split: len(part) for split, part in parts.items()} == {"validation": 6, "test": 6}
  assert all(sum(label for _, label in part) == 3 for part in parts.values())
  assert not set(parts["validation"]) & set(parts["test"])
  train = set(_examples(data.train))
  assert len(train) == 48 and not train & set(parts["validation"]) | train & set(parts["test"])
  assert data.assets()["classes"] == ["neg", "pos"]
  lines = reviews.read_text().splitlines()
  reviews.write_text("\n".join([lines[0], *lines[:0:-1]]))  # the order of the rows does not matter
  assert set(_examples(_data(reviews).evals["test"])) == set(parts["test"])
  assert set(_examples(_data(reviews, seed=1).evals["test"])) != set(parts["test"])


def test_rows_of_one_text_come_into_one_split(tmp_path):
  path = tmp_path / "twins.csv"
  path.write_text("text,label\n" + "".join(f"text {i // 3},{'ab'[i // 3 % 2]}\n" for i in range(90)))
  parts = [{text for text, _ in _examples(pipeline)} for pipeline in _data(path).evals.values()]
  assert not parts[0] & parts[1] and all(parts)


def test_a_table_may_name_splits_and_two_texts(tmp_path):
  path = tmp_path / "pairs.tsv"
  path.write_text("premise\thypothesis\tlabel\tsplit\n" + "".join(
      f"p{i}\th{i}\t{'yes' if i % 2 else 'no'}\t{('train', 'dev', 'test')[i // 6 % 3]}\n" for i in range(36)))
  found, lines = _look_up(path, text_features=("premise", "hypothesis"))
  assert found == {"fitted_to": str(path), "validation": "validation", "test": "test", "num_classes": 2}
  assert lines == [f"{path}: 36 rows, 2 classes (no, yes); train 12, validation 12, test 12"]
  pipeline = _data(path, text_features=("premise", "hypothesis")).evals["validation"]
  pipeline.open()
  batch = pipeline.batch(0)
  assert batch["tokens"][0, :8].tolist() == [END, *b"p6", END, *b"h6", END, 0]
  assert batch["token_type"][0, :8].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_hosts_share_out_the_global_batch(reviews, split):
  def get(*rows):
    data = _data(reviews, eval_batch_size=4)
    pipeline = data.train if split == "train" else data.evals[split]
    pipeline.open(*rows)
    return pipeline, data.batch_spec

  whole, spec = get()
  for rows in share(0, 2), share(1, 2):
    part, _ = get(rows)
    for step in range(whole.num_batches):
      batch, own = whole.batch(step), part.batch(step)
      assert own.keys() == batch.keys() == spec.keys()
      for field in batch:
        assert batch[field].dtype == spec[field].dtype
        np.testing.assert_array_equal(own[field], batch[field][rows(4)])


def test_another_table_is_evaluated_without_what_the_run_was_trained_on(reviews, tmp_path, caplog):
  data = _data(reviews)
  assets = data.assets()
  trained = [text for text, _ in _examples(data.train)]
  other = tmp_path / "other.csv"
  other.write_text(f"text,label\nnew film,pos\n{trained[0]},neg\n")
  texts = _set(other, fitted_to=str(reviews))
  ours = texts.pipelines(batch_size=4, eval_batch_size=3, seed=0)
  ours.restore(assets)
  assert _examples(ours.evals["test"]) == [("new film", 1)]
  assert "left out what the run was trained on, 1 of 2 rows" in caplog.text
  with pytest.raises(UserError, match="this is not what the run was trained on; others can"):
    ours.train.open()
  other.write_text("text,label\nnew film,great\n")
  texts = _set(other, fitted_to=str(reviews)).pipelines(batch_size=4, eval_batch_size=3, seed=0)
  texts.restore(assets)
  with pytest.raises(UserError, match=r"other.csv, line 2: 'great' is none of the 2 classes \(neg, pos\)"):
    texts.evals["test"].open()


def test_a_table_that_has_changed_is_named(reviews):
  assets = _data(reviews).assets()
  reviews.write_text(reviews.read_text() + "\nnew,pos")
  data = _data(reviews)
  data.restore(assets)
  with pytest.raises(UserError, match=r"reviews.csv has changed since the run began \(added: line 62\)"):
    data.train.open()


@pytest.mark.parametrize("text, fields, line", [
    ("text,label\na,x\nb,\n", {}, "t.csv, line 3: the column label holds nothing; fill it in, or take the line out"),
    ("text,label\n,x\nb,y\n", {}, "t.csv, line 2: the column text holds nothing"),
    ("text,label\na,x\nb,x\n", {}, "t.csv: there is only one class, x; add rows of another"),
    ("text,label\na,x\nb,y\n", {}, "only 1 different rows of 'x' in .*t.csv, too few for train and validation and"),
    ("text,label,split\na,x,train\nc,x,train\nb,y,test\n", {}, "t.csv, line 4: the class 'y' is in test, but no training row has it"),
    ("text,label,split\na,x,tset\nb,y,\n", {}, "t.csv, line 2: 'tset' is no split; write train, validation or test"),
    ("text,label,split\na,x,test\nb,y,test\n", {}, "t.csv: names no row for the split train; add some"),
    ("text,kind\na,x\n", {}, "--config.data.label_feature=label: .*t.csv: there is no 'label'; .*kind"),
    ("review,label\na,x\n", {}, "--config.data.text_features=text: .*t.csv: there is no 'text'; .*review"),
    ("text,label\na,x\nb,X\n", {}, "t.csv: the classes 'X' and 'x' differ only by case; give them one name"),
    ("text,label\na,x\nb,y\n", {"length": 2}, "--config.data.length=2: give at least 3 tokens"),
    ("text,label\na,x\nb,y\n", {"text_features": ("a", "b", "c")}, "--config.data.text_features=a,b,c: name one"),
    ("text,label\na,x\nb,y\n", {"label_feature": "text"}, "--config.data.label_feature='text': it is also a text"),
    ("text,label\na,x\nb,y\n", {"tokenizer": "bytes"}, "--config.data.tokenizer: there is no 'bytes'"),
    ("text,label\na,x\nb,y\n", {"validation": "train[:9%]"}, "a table of your own has only the split validation"),
    ("text,label\na,x\nb,y\n", {"shares": (1.0, 1.0, 1.0)}, "--config.data.shares=1.0,1.0,1.0: give the shares"),
])
def test_bad_tables_are_refused(tmp_path, text, fields, line):
  path = tmp_path / "t.csv"
  path.write_text(text)
  with pytest.raises(UserError, match=line):
    _look_up(path, **fields)
