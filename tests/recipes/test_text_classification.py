"""Classifiers of texts by their command line: trained on a table, evaluated, and asked."""

import json
import types

import pytest

from dljax.recipes import text_classification
from dljax.train.experiment import Request
from tests.command import plain_pictures, refuse, run
from tests.tasks import tiny

SMALL = ("--config.data.tokenizer=byte", "--config.data.vocab_size=257", "--config.data.length=24",
         "--config.batch_size=8", "--config.eval_batch_size=4", "--config.total_steps=60",
         "--config.log_every=20", "--config.eval_every=60", "--config.checkpoint_every=60", "--mesh=data:1",
         "--config.optimizer.learning_rate=0.03", "--config.optimizer.schedule=constant", "--config.data.buckets=1",
         "--config.optimizer.warmup_fraction=0")


def _config(preset):
  return text_classification.config("judge", preset, data=preset, variant="judge_tiny", optimizer="adamw")


def _build(config):
  return text_classification.build(config, tiny.TinyEncoder(
      vocab_size=config.data.vocab_size, head="sequence", num_classes=config.data.num_classes))


JUDGE = types.SimpleNamespace(
    __file__="experiments/judge.py", get_config=_config, build=_build,
    PRESETS=dict.fromkeys(text_classification.DATA, "A tiny encoder."), resolve=text_classification.resolve)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  rows = [f"{('fine', 'dull', 'so so')[i % 3]} {i},{('pos', 'neg', 'none')[i % 3]}" for i in range(90)]
  (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
  with plain_pictures():
    outcome = run(JUDGE, f"--workdir={folder / 'run'}", f"--config.data.table={folder / 'reviews.csv'}", *SMALL)
  assert outcome.status == 0, outcome
  assert f"{folder / 'reviews.csv'}: 90 rows, 3 classes (neg, none, pos); train 72, validation 9, test 9" in outcome.out
  return folder / "run"


def _predict(workdir, *arguments):
  return run(JUDGE, f"--workdir={workdir}", "--mode=predict", "--mesh=data:1", *arguments)


def test_a_table_is_learnt(trained):
  result = json.loads((trained / "result.json").read_text())
  assert result["metrics"]["test"]["accuracy"] == 1.0
  assert json.loads((trained / "data" / "classes.json").read_text()) == ["neg", "none", "pos"]
  assert json.loads((trained / "config.json").read_text())["config"]["data"]["num_classes"] == 3


def test_texts_are_classified_from_a_prompt_files_and_tables(trained, tmp_path):
  outcome = _predict(trained, "--prompt=dull 200", f"--output={tmp_path / 'one.jsonl'}")
  assert outcome.status == 0, outcome
  row, = map(json.loads, (tmp_path / "one.jsonl").read_text().splitlines())
  assert row["label"] == "neg" and sum(row["probabilities"].values()) == pytest.approx(1)
  assert outcome.out.splitlines()[0] == f"dull 200  neg  {row['probability']:.4f}"
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.txt").write_text("dull 200")
  (tmp_path / "in" / "b.csv").write_text("id,text\n1,fine 7\n2,so so 8\n")
  (tmp_path / "in" / "c.csv").write_text("id,review\n1,fine 7\n")
  outcome = _predict(trained, f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'all.jsonl'}")
  assert outcome.status == 1 and "c.csv: there is no 'text'" in outcome.err
  rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
  assert [row["label"] for row in rows] == ["neg", "pos", "none"]
  assert [row["input"].rpartition("/")[2] for row in rows] == ["a.txt", "b.csv, line 2", "b.csv, line 3"]
  assert rows[0]["probability"] == pytest.approx(row["probability"], rel=1e-5)


def test_another_table_is_evaluated(trained, tmp_path):
  (tmp_path / "other.csv").write_text("text,label\nfine 100,pos\ndull 101,neg\nfine 102,none\n")
  outcome = run(JUDGE, f"--workdir={trained}", "--mode=eval", "--mesh=data:1",
                f"--config.data.table={tmp_path / 'other.csv'}")
  assert outcome.status == 0, outcome
  found = json.loads((trained / "evaluation.json").read_text())["metrics"]
  assert set(found) == {"test"} and found["test"]["accuracy"] == pytest.approx(2 / 3)
  assert "fine 102" in (trained / "tables" / "mistakes.csv").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["--prompt= "], "--prompt: there is no text; give one"),
    (["--prompt=x", "--count=2"], "--count: judge predicts each input once"),
    (["--input=/no/such.txt"], "--input: there is no /no/such.txt; name a table or a file of text"),
])
def test_prediction_refuses(trained, arguments, words):
  assert words in refuse(JUDGE, f"--workdir={trained}", "--mode=predict", "--mesh=data:1", *arguments)


@pytest.mark.parametrize("arguments, words", [
    (["--config.data.table=/no/such.csv"], "--config.data.table=/no/such.csv cannot be read (No such file"),
    (["--config.data.length=65"], "--config.data.length=65: the model reads at most 64 tokens"),
    (["--config.data.num_classes=1"], "--config.data.num_classes=1: give at least 2"),
])
def test_training_refuses(tmp_path, arguments, words):
  assert words in refuse(JUDGE, f"--workdir={tmp_path / 'run'}", *SMALL, *arguments)
  assert not (tmp_path / "run").exists()


def test_presets_name_a_set_and_its_texts():
  for preset in text_classification.DATA:
    config = _config(preset)
    config.data.length = 64
    spec = _build(config).data.batch_spec
    assert spec["tokens"].shape == (config.batch_size, 64) and spec["label"].shape == (config.batch_size,)
  pairs = {preset for preset in text_classification.DATA if len(_config(preset).data.text_features) == 2}
  assert pairs == {"mrpc", "qqp", "mnli", "qnli", "rte"}


def test_two_texts_of_a_prompt_are_separated_by_a_tab():
  config = _config("mrpc")
  config.data.update({"length": 64, "tokenizer": "byte", "vocab_size": 257})
  experiment = _build(config)
  inputs = experiment.read(Request(texts=["a b\tc"]), {})
  assert inputs.batch["tokens"].tolist() == [[256, 97, 32, 98, 256, 99, 256]]
  assert inputs.batch["token_type"].tolist() == [[0, 0, 0, 0, 0, 1, 1]]
  with pytest.raises(ValueError, match=r"--prompt: the model reads two texts \(sentence1 and sentence2\); give them"):
    experiment.read(Request(texts=["a b"]), {})
