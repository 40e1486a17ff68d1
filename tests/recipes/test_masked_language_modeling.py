"""Masked language models by their command line: trained, evaluated, and made to fill in words."""

import json
import math
import types

import pytest

from dljax.data.text import tokenize
from dljax.recipes import masked_language_modeling
from tests.command import refuse, run
from tests.tasks import tiny

SENTENCE = "to be or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"
SMALL = ("--config.data.length=32", "--config.batch_size=8", "--config.eval_batch_size=4", "--config.total_steps=60",
         "--config.log_every=20", "--config.eval_every=60", "--config.checkpoint_every=60", "--mesh=data:1",
         "--config.optimizer.learning_rate=0.03", "--config.optimizer.schedule=constant", "--config.data.tokenizer=byte",
         "--config.optimizer.warmup_fraction=0", "--config.data.vocab_size=261", "--config.data.mask_rate=0.3")


class _Roles(tokenize.Bytes):
  """Bytes with the tokens that BERT needs."""

  size = 261
  roles = {"mask": 257, "class": 258, "separator": 259, "pad": 260}


def _config(preset):
  return masked_language_modeling.config("filler", preset, data="pydoc", variant="filler_tiny", optimizer="adamw")


def _build(config):
  return masked_language_modeling.build(config, tiny.TinyEncoder(vocab_size=config.data.vocab_size))


FILLER = types.SimpleNamespace(
    __file__="experiments/filler.py", get_config=_config, build=_build, PRESETS={"pydoc": "A tiny encoder."},
    resolve=masked_language_modeling.resolve)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("masked")
  (folder / "play.txt").write_text(SENTENCE * 60)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenize, "Bytes", _Roles)
    outcome = run(FILLER, f"--workdir={folder / 'run'}", f"--config.data.file={folder / 'play.txt'}", *SMALL)
    assert outcome.status == 0, outcome
    yield folder / "run"


def test_the_loss_falls_and_is_told(trained):
  found = json.loads((trained / "result.json").read_text())["metrics"]["test"]
  assert found["loss"] < 0.75 * math.log(261)
  assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-6)
  assert set(found) == {"loss", "accuracy", "perplexity", "padding"}


def test_hidden_tokens_are_filled_in(trained, tmp_path):
  arguments = [f"--workdir={trained}", "--mode=predict", "--mesh=data:1"]
  outcome = run(FILLER, *arguments, "--prompt=to be [MASK]r not[MASK]to", f"--output={tmp_path / 'out.jsonl'}")
  assert outcome.status == 0, outcome
  row, = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
  assert row["input"] == "to be [MASK]r not[MASK]to" and set(row["guesses"]) == {"1", "2"}
  first, second = row["guesses"].values()
  best = [next(iter(guesses)) for guesses in (first, second)]
  assert row["text"] == f"to be{best[0]}r not{best[1]}to" and len(first) == 5
  assert row["probability"] == pytest.approx(first[best[0]] * second[best[1]], rel=1e-5)
  assert list(first.values()) == sorted(first.values(), reverse=True)
  assert outcome.out.splitlines()[0] == f"{row['input']}  {row['text']}  {row['probability']:.4f}"

  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "a.txt").write_text("to be [MASK]r not[MASK]to")
  (tmp_path / "texts" / "b.txt").write_text("no mask")
  outcome = run(FILLER, *arguments, f"--input={tmp_path / 'texts'}", f"--output={tmp_path / 'files.jsonl'}")
  assert outcome.status == 1 and "b.txt: the text has no [MASK]" in outcome.err
  assert json.loads((tmp_path / "files.jsonl").read_text())["text"] == row["text"]
  (tmp_path / "texts" / "a.txt").unlink()
  assert "the text has no [MASK]" in refuse(FILLER, *arguments, f"--input={tmp_path / 'texts'}")


@pytest.mark.parametrize("arguments, words", [
    (["--prompt=to be"], "--prompt: the text has no [MASK]; write it where a word is to be predicted"),
    (["--prompt=[MASK]" + "x" * 40], "--prompt: the text has 43 tokens, and the model reads 32; shorten it"),
    (["--prompt=[MASK]", "--count=2"], "--count: filler predicts each input once"),
])
def test_prediction_refuses(trained, arguments, words):
  assert words in refuse(FILLER, f"--workdir={trained}", "--mode=predict", "--mesh=data:1", *arguments)


def test_training_refuses(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenize, "Bytes", _Roles.__base__)
  (tmp_path / "play.txt").write_text(SENTENCE * 60)
  arguments = [f"--workdir={tmp_path / 'run'}", f"--config.data.file={tmp_path / 'play.txt'}", *SMALL]
  assert "--config.data.tokenizer=byte: has no token that hides others" in refuse(FILLER, *arguments)
  assert "--config.data.length=65: the model reads at most 64" in refuse(FILLER, *arguments, "--config.data.length=65")
  assert not (tmp_path / "run").exists()
