"""From a config to a speech recogniser's experiment: training on Morse, texts for WAV files, and what is refused."""

import functools
import io
import json
import re

import jax
import numpy as np
import pytest
import scipy.io.wavfile

from dljax.data.datasets import morse
from dljax.models import deepspeech as models
from dljax.tasks.transcription import Transcription
from dljax.train.state import parameter_count
from experiments import deepspeech
from tests.command import refuse, run

TINY = ["--config.total_steps=2", "--config.batch_size=4", "--config.eval_batch_size=4", "--config.log_every=1",
        "--config.eval_every=2", "--config.data.buckets=1", "--config.model.beam=2", "--mesh=data:1"]


def test_the_config_reaches_the_model_the_task_and_the_data():
  config = deepspeech.get_config("telephone_prompts")
  config.model.beam = 5
  experiment = deepspeech.build(config)
  assert isinstance(experiment.task, Transcription) and experiment.task.beam == 5
  assert experiment.task.model.vocab_size == 1 + len(config.data.alphabet) == 29
  assert experiment.task.model.dropout == config.model.dropout > 0
  assert experiment.data.batch_spec["features"].shape[2] == config.data.num_mels
  assert experiment.data.assets() == {"alphabet": list(config.data.alphabet)}
  large = deepspeech.build(deepspeech.get_config("librispeech"))
  shapes = jax.eval_shape(lambda batch: large.task.init(jax.random.key(0), batch), dict(large.data.batch_spec))
  assert parameter_count(shapes["params"]) > 30_000_000


def test_the_users_recordings_are_decoded_by_the_beam():
  """Two frames that are blank with 0.6 each: the surest path says nothing, but all that say "A" are surer together."""
  config = deepspeech.get_config("morse")
  log_probs = np.full((1, 2, 1 + len(config.data.alphabet)), -np.inf)
  log_probs[..., 0], log_probs[..., 1 + config.data.alphabet.index("A")] = np.log(0.6), np.log(0.4)
  for beam, text in ((1, ""), (4, "A")):
    config.model.beam = beam
    row, = deepspeech.build(config).show(
        None, {"log_probs": log_probs, "length": np.array([2])}, {"alphabet": list(config.data.alphabet)})
    assert row == {"text": text}


@pytest.mark.parametrize("argument, words", [
    ("--config.model.beam=0", "from 1"), ("--config.model.dropout=1.0", "below 1"),
    ("--config.model.variant=deepspeech3", "did you mean deepspeech2"), ("--config.data.hop=0.0", "one sample"),
    ("--config.data.buckets=9", "from 1 to 8"), ("--config.batch_size=0", "at least 1")])
def test_values_out_of_range_are_refused(argument, words, tmp_path):
  line = refuse(deepspeech, f"--workdir={tmp_path / 'run'}", argument)
  assert argument.partition("=")[0] in line and words in line
  assert not (tmp_path / "run").exists()


def test_a_set_that_is_missing_gives_the_line_to_run(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  line = refuse(deepspeech, "--preset=telephone_prompts", f"--workdir={tmp_path / 'run'}")
  assert "python -m dljax.data.prepare telephone_prompts" in line


@pytest.fixture
def smaller(monkeypatch):
  """In place of the small form a smaller one, as most of a short run's time is the tracing of layers."""
  form = functools.partial(
      models.DeepSpeech, channels=4, kernels=((5, 5),), strides=((4, 4),), hidden_size=8, num_layers=1)
  monkeypatch.setattr(models, "VARIANTS", {**models.VARIANTS, "deepspeech_small": form})


def test_trains_on_morse_and_gives_texts_for_wav_files(tmp_path, monkeypatch, smaller):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  monkeypatch.setattr(morse, "SPLITS", {
      "train": (8, 0.0, 18.0), "validation": (4, 10.0, 10.0), "test_10db": (4, 10.0, 10.0), "test_0db": (3, 0.0, 0.0)})
  workdir = f"--workdir={tmp_path / 'run'}"
  outcome = run(deepspeech, workdir, *TINY)
  assert outcome.status == 0, outcome
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  for split in ("validation", "test"):
    assert set(result["metrics"][split]) == {"loss", "too_short", "word_error_rate", "character_error_rate"}
    assert result["metrics"][split]["too_short"] == 0
  assert (tmp_path / "run" / "figures" / "alignments.png").is_file()
  assert (tmp_path / "run" / "tables" / "transcripts.csv").is_file()
  outcome = run(deepspeech, workdir, "--mode=eval", "--config.data.test=test_0db", "--mesh=data:1")
  assert outcome.status == 0 and "character_error_rate" in outcome.out, outcome

  sound = morse.recording(np.random.RandomState(0), "SOS", 10.0)
  for name, rate in (("a.wav", 8000), ("b.wav", 16000)):
    file = io.BytesIO()
    scipy.io.wavfile.write(file, rate, sound)
    (tmp_path / name).write_bytes(file.getvalue())
  (tmp_path / "c.wav").write_bytes(b"no sound")
  output = tmp_path / "out.jsonl"
  files = ",".join(str(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav"))
  outcome = run(deepspeech, workdir, "--mode=predict", f"--input={files}", f"--output={output}", "--mesh=data:1")
  assert outcome.status == 1 and "skipped" in outcome.err and "cannot be read as a WAV file" in outcome.err, outcome
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row["input"].rpartition("/")[2] for row in rows] == ["a.wav", "b.wav"]
  assert all(set(row) == {"input", "text"} and set(row["text"]) <= {" ", *morse.CODE} for row in rows)


def test_a_folder_of_recordings_is_enough_to_train_evaluate_and_predict(tmp_path, smaller, caplog):
  folder, workdir = tmp_path / "mine", tmp_path / "run"
  (folder / "wavs").mkdir(parents=True)
  for i in range(16):
    scipy.io.wavfile.write(folder / "wavs" / f"{i}.wav", 8000, np.random.default_rng(i).integers(-9, 9, 4000, np.int16))
  (folder / "wavs" / "7.wav").write_bytes(b"RIFF")
  (folder / "metadata.csv").write_text("".join(f"{i}|{'ab'[i % 2]}{'a' * 60 * (i == 0)}\n" for i in range(16)))
  mine = [f"--workdir={workdir}", "--preset=telephone_prompts", f"--config.data.folder={folder}",
          "--config.data.skip_corrupt=1", "--config.data.validation=", *TINY]
  assert "7.wav: cannot be read as a WAV file" in refuse(deepspeech, *mine, "--config.data.skip_corrupt=0")
  outcome = run(deepspeech, *mine)
  assert outcome.status == 0, outcome
  assert f"{folder}: 16 recordings, 0.00 hours; train 14, test 2\nfound data.fitted_to={folder}\n" in outcome.out
  assert "found data.alphabet=ab\nfound data.max_text=61\nfound data.sample_rate=8000\n" in outcome.out
  result = json.loads((workdir / "result.json").read_text())
  assert result["data"] == str(folder) and list(result["metrics"]) == ["test"]
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert sum("too_short" in row for row in rows) > 1
  found, = re.findall("'train': 1 of 13 texts need more frames than .*, and are left out of the loss: (.*)", caplog.text)
  assert found == str(folder / "wavs" / "0.wav")

  (folder / "metadata.csv").write_text("".join(f"{i}|{'ab' * 30}\n" for i in range(16)))
  line = refuse(deepspeech, *mine, f"--workdir={tmp_path / 'no'}")
  assert re.search(r"'train': 13 of 13 texts need more frames than .*, such as .*wav \(60 and 13\), so .*hop=0.01", line)
  (folder / "metadata.csv").write_text("".join(f"{i}|ab\n" for i in range(16)))

  other = folder.rename(tmp_path / "other")
  line = refuse(deepspeech, *mine, "--config.total_steps=3")
  assert line.startswith(f"--config.data.folder={folder}: there is no such folder")
  where = [f"--workdir={workdir}", "--mesh=data:1", "--config.eval_batch_size=4"]
  assert "needs" in refuse(deepspeech, *where, "--mode=predict")
  outcome = run(deepspeech, *where, "--mode=predict", f"--input={other / 'wavs' / '3.wav'}")
  assert outcome.status == 0, outcome
  line = refuse(deepspeech, *mine, f"--workdir={tmp_path / 'no'}", "--dry_run")
  assert "for --dry_run without it give --config.data.alphabet and --config.data.max_text" in line
  scipy.io.wavfile.write(other / "wavs" / "16.wav", 8000, np.arange(4000, dtype=np.int16))
  (other / "metadata.csv").write_text("16|c\n")
  line = refuse(deepspeech, *where, "--mode=eval", f"--config.data.folder={other}")
  assert f"{other / 'wavs' / '16.wav'}: the character 'c' of 'c' is not in the alphabet of the run; write it" in line
