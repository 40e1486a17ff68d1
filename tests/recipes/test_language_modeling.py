"""The experiments of language models by their command line: trained, evaluated, and made to write."""

import csv
import dataclasses
import io
import json
import math
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import dljax
from dljax.data.text import corpus
from dljax.errors import UserError
from dljax.models import gpt
from dljax.recipes import language_modeling
from dljax.tasks import decoding
from dljax.train.experiment import Request
from experiments import rnn
from tests.command import plain_pictures, refuse, run

PLAY = ("Speak the speech, I pray you, as I pronounced it to you, trippingly on the tongue: but if you mouth it, "
        "as many of your players do, I had as lief the town-crier spoke my lines.\n") * 20
SMALL = ("--config.data.tokenizer=character", "--config.data.vocab_size=60", "--config.data.length=8",
         "--config.model.hidden_size=16", "--config.model.num_layers=1", "--config.model.embed_dim=8",
         "--config.batch_size=8", "--config.eval_batch_size=2", "--config.total_steps=30", "--config.log_every=10",
         "--config.eval_every=15", "--config.checkpoint_every=15", "--config.sampling.max_new_tokens=20",
         "--config.optimizer.learning_rate=0.02", "--config.optimizer.schedule=constant",
         "--config.optimizer.warmup_fraction=0", "--mesh=data:1")


@pytest.fixture(scope="module")
def _trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("language")
  (folder / "play.txt").write_text(PLAY)
  outcome = run(rnn, f"--workdir={folder / 'run'}", f"--config.data.file={folder / 'play.txt'}", *SMALL)
  assert outcome.status == 0, outcome
  return folder / "run"


@pytest.fixture
def trained(_trained, tmp_path) -> Path:
  return Path(shutil.copytree(_trained, tmp_path / "run"))


def _write(workdir, *arguments):
  outcome = run(rnn, f"--workdir={workdir}", "--mode=predict", "--mesh=data:1", *arguments)
  assert outcome.status == 0, outcome
  return outcome.out


def _result(workdir):
  return json.loads((workdir / "result.json").read_text())


def test_the_loss_falls_and_every_unit_is_told(trained):
  rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
  losses = [row["loss"] for row in rows if row["split"] == "train"]
  assert max(losses) < 0.85 * math.log(60)  # which a guess without knowledge costs, and the first step did
  for split in ("validation", "test"):
    found = _result(trained)["metrics"][split]
    assert set(found) == {"loss", "perplexity", "accuracy", "bits_per_character", "bits_per_byte"}
    assert found["bits_per_character"] == pytest.approx(found["loss"] / math.log(2), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-6)


def test_evaluation_reads_by_the_tokenizer_of_the_run(trained):
  """A training text with other characters would number them anew."""
  config = json.loads((trained / "config.json").read_text())
  play = trained.parent / "other.txt"
  parts = corpus.split_text(PLAY)
  play.write_text("#" * len(parts["train"]) + parts["validation"] + parts["test"])
  outcome = run(rnn, f"--workdir={trained}", "--mode=eval", f"--config.data.file={play}", "--mesh=data:1")
  assert outcome.status == 0, outcome
  found = json.loads((trained / "evaluation.json").read_text())["metrics"]
  assert found == {split: pytest.approx(values, rel=1e-6) for split, values in _result(trained)["metrics"].items()}
  assert config["config"]["data"]["tokenizer"] == "character"


def test_the_end_of_a_run_shows_what_each_character_took(trained):
  with Image.open(trained / "figures" / "surprise.png") as picture:
    assert min(picture.size) > 150


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_all_devices_evaluate_alike(trained, parallelism):
  outcome = run(rnn, f"--workdir={trained}", "--mode=eval", f"--parallelism={parallelism}", "--mesh=data:2")
  assert outcome.status == 0, outcome
  found = json.loads((trained / "evaluation.json").read_text())["metrics"]
  for split, values in _result(trained)["metrics"].items():
    assert found[split] == pytest.approx(values, rel=1e-4)


def test_a_prompt_is_written_on_as_it_comes(trained, tmp_path):
  output = tmp_path / "out.jsonl"
  shown = _write(trained, "--prompt=Speak the", f"--output={output}")
  row, = map(json.loads, output.read_text().splitlines())
  assert row["input"] == "Speak the" and len(row["text"]) == 20
  assert shown.startswith(f"Speak the{row['text']}\n")
  assert _write(trained, "--prompt=Speak the") == f"Speak the{row['text']}\n"
  assert _write(trained, "--prompt=") != "\n"  # from the beginning of a text


def test_a_file_is_written_on_as_a_prompt_is(trained, tmp_path):
  texts, output = tmp_path / "texts", tmp_path / "out.json"
  texts.mkdir()
  for name, content in (("in", "Speak the"), ("empty", ""), ("foreign", "ça")):
    (texts / f"{name}.txt").write_text(content)
  outcome = run(rnn, f"--workdir={trained}", "--mode=predict", f"--input={texts}", f"--output={output}",
                "--mesh=data:1")
  assert outcome.status == 1 and f"skipped {texts / 'empty.txt'} is empty" in outcome.err
  assert f"skipped {texts / 'foreign.txt'}: the character 'ç' (U+00E7) at position 0" in outcome.err
  row, = json.loads(output.read_text())
  assert _write(trained, "--prompt=Speak the") == f"Speak the{row['text']}\n"


def test_count_draws_several_continuations_of_each_prompt(trained, tmp_path):
  folder = tmp_path / "texts"
  shown = _write(trained, "--prompt=Speak the", "--count=3", "--config.eval_batch_size=3", f"--output={folder}")
  rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
  assert [row["input"] for row in rows] == ["Speak the"] * 3
  assert len({row["text"] for row in rows}) == 3
  assert shown.startswith(f"Speak the{rows[0]['text']}\n\n--- 2 of 3 ---\nSpeak the{rows[1]['text']}\n")
  assert _write(trained, "--prompt=Speak the") == f"Speak the{rows[0]['text']}\n"  # row 0 is the same alone
  for row in rows:
    with Image.open(folder / row["picture"]) as picture:
      assert min(picture.size) > 20
  (tmp_path / "in.txt").write_text("Speak the")
  _write(trained, f"--input={tmp_path / 'in.txt'}", "--count=3", f"--output={tmp_path / 'out.jsonl'}")
  again = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [row["text"] for row in again] == [row["text"] for row in rows]


def test_the_preview_is_a_text_from_its_beginning_and_can_be_drawn():
  experiment = rnn.build(rnn.get_config("pydoc"))
  inputs = experiment.preview()
  assert inputs.batch["prompt"].tolist() == [[256]] and inputs.batch["id"].tolist() == [0]
  draw = lambda text: next(iter(experiment.draw(inputs, {"tokens": np.array([list(text.encode())])}, {})))
  suffix, content = draw("one\ntwo \0\u4e2d")
  assert suffix == ".png" and content.startswith(b"\x89PNG") and content != draw("one")[1]
  full = np.asarray(Image.open(io.BytesIO(draw("m" * 100)[1])))
  assert full[:, -4:].min() == 255, "a full line is cut off"
  assert full[:24, -24:].min() < 128


def test_sampling_is_chosen_by_the_command_line(trained):
  write = lambda **kwargs: _write(trained, "--prompt=I", *(f"--config.sampling.{k}={v}" for k, v in kwargs.items()))
  assert write(seed=1) != write(seed=2)
  assert write(temperature=0, seed=1) == write(temperature=0, seed=2) == write(top_k=1) == write(top_p=1e-6)
  assert len(write(max_new_tokens=3)) == len("I") + 3 + len("\n")


def test_a_stop_text_ends_what_is_shown_and_written(trained, tmp_path):
  whole = _write(trained, "--prompt=Speak")[len("Speak"):-1]
  stop = whole[7:10]  # the parts of a text have 8 tokens, so that this stop text lies in two
  place, output = whole.find(stop), tmp_path / "out.jsonl"
  flags = f"--config.sampling.stop_texts={json.dumps(['town-crier', stop])}",
  assert _write(trained, "--prompt=Speak", *flags) == f"Speak{whole[:place]}\n"
  (tmp_path / "in.txt").write_text("Speak")
  shown = _write(trained, f"--input={tmp_path / 'in.txt'}", f"--output={output}", *flags)
  assert json.loads(output.read_text())["text"] == whole[:place] and whole[:place] in shown
  least = _write(trained, "--prompt=Speak", *flags, f"--config.sampling.min_new_tokens={place + 4}")
  assert len(least) > len(f"Speak{whole[:place + 4]}")


def test_generation_ends_once_all_texts_have_their_stop_text(trained, monkeypatch):
  loaded = dljax.load(trained)
  text = loaded.predict("Speak")[0]["text"]
  config = loaded.config.copy_and_resolve_references()
  config.sampling.stop_texts, config.eval_batch_size = (text[2:4],), 1
  monkeypatch.setattr(loaded, "experiment", rnn.build(config))
  loaded.experiment.data.restore(loaded.assets)
  parts = list(loaded.generate(loaded.read(Request(texts=["Speak"]))))
  assert [part["tokens"].shape for part in parts] == [(1, 8)]  # of 20 tokens
  # Each batch of several ends on its own.
  several = loaded.raw(loaded.read(Request(texts=["Speak", "I"])))["tokens"]
  np.testing.assert_array_equal(several[0], [*parts[0]["tokens"][0], *[decoding.NOTHING] * (several.shape[1] - 8)])
  assert several.shape[1] > 8 and (several[1] >= 0).all()
  first, second = loaded.predict(["Speak", "I"])
  assert first["text"] == text[:2] and text[2:4] not in second["text"]


def test_a_stop_text_between_two_parts_ends_generation():
  config = rnn.get_config("pydoc")
  config.sampling.stop_texts = ("78",)
  task = rnn.build(config).task
  text = np.frombuffer(b"0123456789abcdef", np.uint8).astype(np.int32)[None]
  assert [task.has_ended({"tokens": text[:, :n]}) for n in (7, 8, 9, 16)] == [False, False, True, True]
  assert not task.has_ended({"tokens": np.concatenate([text, 0 * text])})  # another row has none


def test_each_tokens_probability_is_in_the_rows(trained, tmp_path):
  flags = "--config.sampling.scores=true", "--config.sampling.max_new_tokens=9"
  for name in ("out.jsonl", "out.csv"):
    shown = _write(trained, "--prompt=Speak", f"--output={tmp_path / name}", *flags)
  row = json.loads((tmp_path / "out.jsonl").read_text())
  assert "".join(row["tokens"]) == row["text"] and len(row["tokens"]) == len(row["log_probabilities"]) == 9
  assert all(value < 0 for value in row["log_probabilities"])
  assert row["log_probability"] == pytest.approx(sum(row["log_probabilities"]))
  assert f"\nlog_probability: {row['log_probability']:.4f}\n" in shown
  with open(tmp_path / "out.csv", newline="") as file:
    line, = csv.DictReader(file)
  assert json.loads(line["log_probabilities"]) == row["log_probabilities"]
  assert json.loads(line["tokens"]) == row["tokens"]
  # The model itself gives such probabilities, one after the other.
  loaded = dljax.load(trained)
  batch = loaded.read(Request(texts=["Speak" + row["text"]])).batch
  tokens = batch["prompt"][:, :batch["length"][0]]
  logits = loaded.model.apply(loaded.variables, tokens)["logits"][0]
  log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:-1])), tokens[0, 1:, None], 1)[:, 0]
  np.testing.assert_allclose(row["log_probabilities"], log_p[-9:], atol=1e-4)


def test_a_stop_text_takes_the_tokens_after_it_along(trained):
  config = dljax.load(trained).config.copy_and_resolve_references()
  config.sampling.update({"stop_texts": ("th",), "scores": True})
  experiment = rnn.build(config)
  experiment.data.restore(dljax.load(trained).assets)
  tokens = experiment.read(Request(texts=["as the a"]), {}).batch["prompt"][0, 1:9]
  row, = experiment.show(None, {"tokens": tokens[None], "log_p": -np.arange(8.0)[None]}, {})
  assert row == {"text": "as ", "log_probability": -3.0, "tokens": ["a", "s", " "],
                 "log_probabilities": [0.0, -1.0, -2.0]}


def test_prompts_of_many_lengths_are_padded_to_few():
  experiment = rnn.build(rnn.get_config("pydoc"))
  read = lambda *texts: experiment.read(Request(texts=texts), {}).batch
  assert {read("x" * n)["prompt"].shape[1] for n in range(1, 100)} == {17, 33, 65, 129}
  batch = read("abc", "x" * 30)
  assert batch["length"].tolist() == [4, 31] and batch["stop"].tolist() == [[256], [256]]
  assert not batch["prompt"][0, 4:].any()


# A model with a context


def _decoder():
  """An experiment of a decoder that reads 16 tokens."""
  def get_config(preset):
    config = language_modeling.config("decoder", preset, data="pydoc", variant="gpt_nano", optimizer="adamw")
    config.data.length = 16
    return config

  def build(config):
    network = gpt.GPT(vocab_size=config.data.vocab_size, max_length=16, embed_dim=16, num_layers=1, num_heads=2)
    return language_modeling.build(config, network, stateful=False)

  return types.SimpleNamespace(
      __file__="experiments/decoder.py", PRESETS={"pydoc": ""}, get_config=get_config, build=build,
      resolve=language_modeling.resolve)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  """The folder of a run of the decoder on characters."""
  folder = tmp_path_factory.mktemp("decoder")
  (folder / "play.txt").write_text(PLAY)
  flags = [flag for flag in SMALL if not flag.startswith(("--config.model", "--config.data.length"))]
  outcome = run(_decoder(), f"--workdir={folder / 'run'}", f"--config.data.file={folder / 'play.txt'}", *flags,
                "--config.total_steps=15")
  assert outcome.status == 0, outcome
  return folder / "run"


LONG = "Speak the speech, I pray"
TOO_LONG = ("has 25 tokens with the one that begins a text, 9 more than the model's context of 16; shorten it, or let "
            "--config.sampling.slide=true read its last 16")


def test_a_prompt_beyond_the_context_is_refused_or_its_end_is_read(tmp_path):
  decoder = _decoder()
  config = decoder.get_config("pydoc")
  with pytest.raises(UserError) as error:
    decoder.build(config).read(Request(texts=[LONG]), {})
  assert str(error.value) == f"--prompt {TOO_LONG}"
  (tmp_path / "long.txt").write_text(LONG)
  (tmp_path / "short.txt").write_text(LONG[:15])
  inputs = decoder.build(config).read(Request(paths=[str(tmp_path)]), {})
  assert inputs.names == [str(tmp_path / "short.txt")] and inputs.skipped == [f"{tmp_path / 'long.txt'} {TOO_LONG}"]
  config.sampling.slide = True
  inputs = decoder.build(config).read(Request(paths=[str(tmp_path)], count=2), {})
  assert not inputs.skipped and inputs.batch["length"].tolist() == [25, 25, 16, 16]
  assert inputs.warnings == [f"{tmp_path / 'long.txt'} has 25 tokens; the model reads the last 16"]


@pytest.mark.slow
def test_texts_and_prompts_beyond_the_context_by_the_command_line(decoder):
  flags = (f"--workdir={decoder}", "--mode=predict", "--mesh=data:1", "--config.sampling.temperature=1",
           "--config.sampling.max_new_tokens=40")
  outcome = run(_decoder(), *flags, "--prompt=Speak")
  assert outcome.status == 0 and len(outcome.out) == len("Speak") + 40 + len("\n"), outcome
  assert refuse(_decoder(), *flags, f"--prompt={LONG}") == f"--prompt {TOO_LONG}"
  outcome = run(_decoder(), *flags, f"--prompt={LONG}", "--config.sampling.slide=true")
  assert outcome.status == 0
  assert outcome.err.startswith("warning: --prompt has 25 tokens; the model reads the last 16\n")
  other = run(_decoder(), *flags, f"--prompt=aaaaa{LONG[5:]}", "--config.sampling.slide=true")
  assert outcome.out[len(LONG):] == other.out[len(LONG):] != "\n"


def test_a_run_goes_on_to_the_same_bits(trained, tmp_path):
  play = trained.parent / "play.txt"
  play.write_text(PLAY)
  arguments = [f"--workdir={tmp_path / 'parts'}", *SMALL, f"--config.data.file={play}"]
  with plain_pictures():
    assert run(rnn, *arguments, "--config.total_steps=15").status == 0
    assert run(rnn, *arguments).status == 0
  assert _result(trained)["state_sha256"] == _result(tmp_path / "parts")["state_sha256"]


def test_documents_train_and_tell_their_padding(tmp_path):
  play = tmp_path / "play.txt"
  play.write_text(PLAY)
  outcome = run(rnn, f"--workdir={tmp_path / 'run'}", f"--config.data.file={play}", *SMALL,
                "--config.data.documents=true", "--config.total_steps=4")
  assert outcome.status == 0, outcome
  assert 0 <= _result(tmp_path / "run")["metrics"]["test"]["padding"] < 0.5


@pytest.mark.parametrize("arguments, words", [
    ([], ["--mode=predict needs --input=FILE_OR_FOLDER or --prompt=TEXT"]),
    (["--prompt=x", "--input=y.txt"], ["--prompt and --input do not go together"]),
    (["--input=/no/such.txt"], ["--input: there is no /no/such.txt"]),
    (["--prompt=caf\u00e9"], ["--prompt: the character '\u00e9' (U+00E9) at position 3 is not in the training text"]),
    (["--prompt=I", "--output=x.png"], ["--output=x.png"]),
    (["--prompt=I", "--config.sampling.top_p=2"], ["--config.sampling.top_p=2.0: must be above 0"]),
    (["--prompt=I", "--config.sampling.top_k=61"], ["--config.sampling.top_k=61: the model has 60 tokens; give at most"]),
    (["--prompt=I", "--config.sampling.min_p=2"], ["--config.sampling.min_p=2.0: must be from 0 to 1"]),
    (["--prompt=I", "--config.sampling.repetition_penalty=0"], ["--config.sampling.repetition_penalty=0.0: must be above 0"]),
    (["--prompt=I", "--config.sampling.no_repeat_ngram=-1"], ["--config.sampling.no_repeat_ngram=-1: must be from 0"]),
    (["--prompt=I", "--config.sampling.min_new_tokens=21"], ["min_new_tokens=21: must be from 0 to max_new_tokens, 20"]),
    (["--prompt=I", "--config.sampling.stop_tokens=60"], ["--config.sampling.stop_tokens=60: the model's tokens are 0 to 59"]),
    (["--prompt=I", "--config.sampling.stop_tokens=I"], ["--config.sampling.stop_tokens=I: must be the number of a token"]),
    (["--prompt=I", "--config.sampling.stop_texts=\u00e7a"],
     ["--config.sampling.stop_texts='\u00e7a' cannot occur: the character '\u00e7'"]),
    (["--prompt=I", '--config.sampling.stop_texts=[""]'], ["--config.sampling.stop_texts: a stop text is empty"]),
])
def test_prediction_refuses(trained, arguments, words):
  line = refuse(rnn, f"--workdir={trained}", "--mode=predict", "--mesh=data:1", *arguments)
  assert all(word in line for word in words), line


@pytest.mark.parametrize("arguments, words", [
    (["--config.model.cell=lstn"], ["--config.model.cell", "did you mean lstm"]),
    (["--config.model.hidden_size=0"], ["--config.model.hidden_size=0: must be at least 1"]),
    (["--config.model.dropout=1"], ["--config.model.dropout=1.0: must be at least 0 and below 1"]),
    (["--config.data.tokenizer=wordpice"], ["--config.data.tokenizer", "did you mean wordpiece"]),
    (["--config.data.file=/no/such.txt"], ["--config.data.file=/no/such.txt cannot be read"]),
    (["--config.data.file={play}", "--config.data.length=100000"], ["--config.data.length=100000", "too few for"]),
    (["--config.data.file={empty}"], ["--config.data.file={empty} is empty"]),
    (["--config.data.tokenizer=file", "--config.data.tokenizer_file={play}"],
     ["--config.data.tokenizer_file={play}", "neither a SentencePiece model nor a tokenizer.json"]),
])
def test_training_refuses_and_touches_nothing(tmp_path, monkeypatch, arguments, words):
  monkeypatch.chdir(tmp_path)
  names = {"play": "play.txt", "empty": "empty.txt"}
  (tmp_path / "play.txt").write_text(PLAY)
  (tmp_path / "empty.txt").write_text("")
  fill = lambda texts: [part.format(**names) for part in texts]
  line = refuse(rnn, "--workdir=run", *fill(arguments))
  assert all(word in line for word in fill(words)), line
  assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "play.txt"]


@pytest.mark.parametrize("kind, can, cannot", [
    ("byte", ["\n\n", "\u2603", " "], []),
    ("bpe", ["\n\n", "\u2603", "the ", " the"], []),
    ("wordpiece", [" the", "the ", " ", "speech"], ["\n\n", "speech, I", "\u2603"]),
    ("unigram", [" the", "\n", "speech, I"], ["\u2603"]),
])
def test_stop_texts_that_no_tokens_make_are_refused(tmp_path, kind, can, cannot):
  (tmp_path / "play.txt").write_text(PLAY)
  config = rnn.get_config("pydoc")
  config.data.update({"file": str(tmp_path / "play.txt"), "tokenizer": kind, "vocab_size": 400})
  config.sampling.stop_texts = tuple(can)
  assert rnn.build(config).read(Request(texts=["Speak"]), {}).names == ["Speak"]
  for stop in cannot:
    config.sampling.stop_texts = (stop,)
    with pytest.raises(UserError, match="^--config.sampling.stop_texts='.*' cannot occur: the tokenizer makes '"):
      rnn.build(config).read(Request(texts=["Speak"]), {})


def test_presets_are_what_they_say():
  config = rnn.get_config("tiny_shakespeare")
  spec = rnn.build(config).data.batch_spec
  assert spec["tokens"].shape == (config.batch_size, config.data.length) and spec["tokens"].dtype == np.int32
  assert rnn.build(config).task.stateful and not rnn.build(rnn.get_config("lm1b")).task.stateful


@dataclasses.dataclass
class _Network:
  """What the recipe asks a network of 64 positions before it is built."""

  max_length: int | None = 64


def test_a_model_without_a_carry_reads_windows_no_longer_than_its_context():
  config = rnn.get_config("pydoc")
  build = lambda **options: language_modeling.build(config, _Network(**options), stateful=False)
  experiment = build()
  assert "reset" not in experiment.data.batch_spec and not experiment.task.stateful
  assert "padding" not in experiment.task.goals
  config.data.documents = True
  assert "padding" in build().task.goals
  config.data.length = 65
  with pytest.raises(UserError, match="--config.data.length=65: the model reads at most 64 tokens; make it smaller"):
    build()
  assert build(max_length=None)


def test_a_text_ends_at_its_first_end():
  experiment = rnn.build(rnn.get_config("pydoc"))  # bytes, and 256 the end
  texts = [[104, 105, 256, 106, 256], [104, 105, 106, 107, 108]]
  assert [row["text"] for row in experiment.show(None, {"tokens": np.array(texts)}, {})] == ["hi", "hijkl"]
