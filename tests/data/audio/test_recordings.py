"""Sound: features against librosa, what bad recordings are told, masks, and the batches."""

import io
import json
import logging
import re
import struct

import numpy as np
import pytest
import scipy.io.wavfile

from dljax.data import sources
from dljax.data.audio import features, recordings
from dljax.data.pipeline import all_rows
from dljax.errors import UserError
from tests.data.hosts import share
from tests.fixtures import formula

RATE = 8000


def wav(samples, rate=RATE) -> bytes:
  file = io.BytesIO()
  scipy.io.wavfile.write(file, rate, np.asarray(samples))
  return file.getvalue()


def tone(seconds=0.3, hertz=440, rate=RATE):
  return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def config(**fields):
  made = recordings.default_config()
  made.update({"num_mels": 8, "max_frames": 64, "max_text": 8, "alphabet": " abc'", "buckets": 2, **fields})
  return made


# --- Features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", formula.LOG_MELS)
def test_log_mel_equals_librosa(name):
  rate, window, fft_length, hop, num_mels, lowest, highest = formula.LOG_MELS[name]
  with np.load(formula.FOLDER / "log_mel.npz") as fixture:
    expected = fixture[name]
  ours = features.log_mel(
      formula.sound(rate), features.mel_filters(rate, fft_length, num_mels, lowest, highest), window, hop)
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  assert np.ptp(expected) > 20  # from the tone to silence


def test_normalised_features_ignore_loudness_and_colour():
  noise = formula.noise("features", (30, 8)) + np.arange(8)
  ours = features.normalise(noise)
  np.testing.assert_allclose(ours.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(ours.std(), 1, rtol=1e-5)
  np.testing.assert_allclose(features.normalise(3 * noise + np.arange(8)), ours, atol=1e-5)
  assert not features.normalise(np.full((5, 3), -23.0)).any()


def test_resampling_keeps_the_sound():
  for rate in (4000, 11025, 44100):
    back = features.resample(tone(rate=rate).astype(np.float32), rate, RATE)
    assert len(back) == np.ceil(len(tone(rate=rate)) * RATE / rate)
    np.testing.assert_allclose(back[200:-200], tone()[200:len(back) - 200], atol=0.02)


# --- Files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, offset, dtype", [
    (127, 128, np.uint8), (2**15 - 1, 0, np.int16), (2**31 - 1, 0, np.int32), (1, 0, np.float32), (1, 0, np.float64)])
def test_every_width_gives_the_same_sound(scale, offset, dtype):
  samples = (tone() * scale + offset).astype(dtype)
  sound, rate = features.read_wav(wav(samples, 11025))
  assert rate == 11025 and sound.dtype == np.float32
  np.testing.assert_allclose(sound, tone(), atol=0.02)


def test_stereo_is_mixed_down():
  both = np.stack([tone(), np.zeros_like(tone())], axis=1)
  np.testing.assert_allclose(features.read_wav(wav((both * 32767).astype(np.int16)))[0], tone() / 2, atol=1e-3)


@pytest.mark.parametrize("data, words", [
    (b"", "cannot be read as a WAV file"),
    (b"ID3 something", "convert it"),
    (wav(np.zeros(50, np.int16))[:40], "cannot be read|no sound"),
    (wav(np.zeros(0, np.int16)), "no sound"),
    (wav(np.array([0, np.nan, 1], np.float32)), "sample 1 is not a finite number"),
])
def test_broken_files_are_told_apart(data, words):
  with pytest.raises(ValueError, match=words) as error:
    features.read_wav(data)
  assert "\n" not in str(error.value)


def header(data, **fields):
  """A WAV file with other values in its header."""
  places = {"riff": (4, "I"), "tag": (20, "H"), "channels": (22, "H"), "rate": (24, "I"), "byte_rate": (28, "I"),
            "align": (32, "H"), "bits": (34, "H"), "size": (40, "I")}
  data = bytearray(data)
  for name, value in fields.items():
    struct.pack_into("<" + places[name][1], data, places[name][0], value)
  return bytes(data)


SOUND = wav((tone(0.1) * 32767).astype(np.int16))


@pytest.mark.parametrize("data, words", [
    (header(SOUND, rate=7_999_993, byte_rate=15_999_986), "has 7999993 samples a second, which must be from 100 to 768000"),
    (header(SOUND, rate=0, byte_rate=0), "has 0 samples a second"),
    (header(SOUND, rate=1, byte_rate=2), "has 1 samples a second"),
    (SOUND[:844], "was cut: it should hold 1,600 bytes of sound, but holds only 800; get it again"),
    (header(SOUND, size=2**31), "was cut"),
    (header(SOUND, riff=900)[:44], "was cut"),
    (SOUND + SOUND[36:], "no error"),  # the first chunk says that it has ended
    (header(SOUND + SOUND[36:], riff=2 * len(SOUND)), "has 2 parts of sound, of which one would be read"),
    (header(SOUND[:36] + SOUND[12:], riff=2 * len(SOUND)), "has 2 formats"),
    (header(SOUND, bits=8), "has samples of 8 bits in 2 bytes"),
    (header(SOUND, bits=32), "has samples of 32 bits in 2 bytes"),
    (header(SOUND, channels=0), "cannot be read"),
    (header(SOUND, channels=65535), "cannot be read|bits in 0 bytes"),
    (header(SOUND, size=0xFFFFFFFF, riff=0xFFFFFFFF), "no error"),  # as programs write into a pipe
])
def test_no_header_hides_what_a_file_holds(data, words, tmp_path):
  (tmp_path / "a.wav").write_bytes(data)
  batch, names, skipped = recordings.encode([str(tmp_path)], config())
  if words == "no error":
    whole = recordings.encode([features.read_wav(SOUND)[0]], config())[0]["features"]
    np.testing.assert_array_equal(batch["features"], whole)
  else:
    assert not names and len(skipped) == 1 and re.search(words, skipped[0]) and "\n" not in skipped[0]


def test_a_recording_is_measured_before_it_is_resampled(tmp_path, monkeypatch):
  monkeypatch.setattr(recordings, "MAX_SECONDS", 2)
  monkeypatch.setattr(features, "resample", None)
  (tmp_path / "a.wav").write_bytes(wav(np.zeros(300, np.int16), 100))
  _, names, skipped = recordings.encode([str(tmp_path)], config())
  assert not names and skipped[0].endswith("a.wav: is 3 s long, more than 2; cut it into shorter recordings")


def test_odd_rates_take_small_filters_and_keep_the_length(monkeypatch):
  sound = tone(0.2, rate=16001).astype(np.float32)
  exact = features.resample(sound, 16001, RATE)
  monkeypatch.setattr(features, "MAX_FACTOR", 100)
  np.testing.assert_allclose(features.resample(sound, 16001, RATE), exact, atol=0.03)
  back = features.resample(tone().astype(np.float32), RATE, 16001)
  assert len(back) == -(-len(tone()) * 16001 // RATE)


def test_long_recordings_are_transformed_a_few_frames_at_a_time(monkeypatch):
  filters = features.mel_filters(RATE, 256, 8)
  whole = features.log_mel(tone(), filters, 256, 80)
  monkeypatch.setattr(features, "FRAMES_AT_ONCE", 7)
  np.testing.assert_allclose(features.log_mel(tone(), filters, 256, 80), whole, rtol=1e-6)


def test_encode_says_what_it_skipped_and_resampled(tmp_path, caplog):
  (tmp_path / "sub").mkdir()
  files = {"a.wav": wav((tone() * 32767).astype(np.int16)), "sub/b.WAV": wav(tone(0.5, rate=16000), 16000),
           "broken.wav": b"RIFF", "empty.wav": wav(np.zeros(0, np.int16)), "notes.txt": b"no sound"}
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  with caplog.at_level(logging.WARNING):
    batch, names, skipped = recordings.encode([str(tmp_path)], config())
  assert [name.rpartition("/")[2] for name in names] == ["a.wav", "b.WAV"]
  assert [line.partition(": ")[0].rpartition("/")[2] for line in skipped] == ["broken.wav", "empty.wav"]
  assert len(caplog.messages) == 1 and "16000" in caplog.text and "resampled to 8000" in caplog.text
  np.testing.assert_array_equal(batch["length"], [31, 51])
  assert batch["features"].shape == (2, 56, 8)
  np.testing.assert_array_equal(batch["features"][0, 31:], 0)
  with pytest.raises(UserError, match="there is no"):
    recordings.encode([str(tmp_path / "missing.wav")], config())
  batch, names, skipped = recordings.encode([str(tmp_path / "notes.txt")], config())
  assert not names and len(skipped) == 1 and batch["features"].shape[0] == 0


def test_an_array_of_samples_stands_in_place_of_a_file(tmp_path):
  samples = (tone() * 32767).astype(np.int16)
  (tmp_path / "a.wav").write_bytes(wav(samples))
  expected = recordings.encode([str(tmp_path / "a.wav")], config())[0]["features"][0]
  given = [samples, samples / 32768, np.stack([samples, samples], axis=-1)]
  batch, names, skipped = recordings.encode(given, config())
  assert names == ["array 0", "array 1", "array 2"] and not skipped
  for found in batch["features"]:
    np.testing.assert_array_equal(found, expected)
  wrong = [np.zeros((2, 2, 2)), np.zeros(3, bool), np.array([np.nan]), np.zeros(0)]
  _, names, skipped = recordings.encode(wrong, config())
  assert not names and [line.partition(": ")[2][:12] for line in skipped] == [
      "an array of ", "bool is no t", "sample 0 is ", "holds no sou"]


# --- Text and config --------------------------------------------------------------------------------------


def test_tokens_fold_case_and_spaces():
  np.testing.assert_array_equal(recordings.tokenize(" Ab\n  c' ", " abc'"), [2, 3, 1, 4, 5])
  np.testing.assert_array_equal(recordings.tokenize("a", "A"), [1])
  assert recordings.tokenize("", "A").dtype == np.int32
  with pytest.raises(ValueError, match="'é' of 'cafe é' is not in the alphabet"):
    recordings.tokenize("cafe é", " acef")


@pytest.mark.parametrize("field, value, words", [
    ("alphabet", "aa", "each character once"), ("highest", 5000.0, "at most 4000 Hz"), ("num_mels", 200, "fewer bands"),
    ("hop", 0.0, "at least one sample"), ("window", float("nan"), "at least one sample"), ("train", "", "train on"),
    ("sample_rate", 10**9, "100 to 768000 Hz"), ("window", 1e4, "at most"), ("num_mels", 10**9, "at most 512"),
    ("lowest", 4000.0, "less than the highest"), ("frequency_mask", 9, "at most 8"),
    ("time_mask_share", 2.0, "0 to 1")])
def test_values_out_of_range_are_refused(field, value, words):
  with pytest.raises(UserError, match=words) as error:
    recordings.validate(config(**{field: value}))
  assert f"--config.data.{field}" in str(error.value)


# --- SpecAugment ------------------------------------------------------------------------------------------


def test_masks_are_as_wide_as_they_may_be():
  ones, length = np.ones((50, 40, 12), np.float32), np.r_[np.full(25, 40), np.full(25, 10)]
  draws = np.random.default_rng(0).random((50, 3, 2))
  masked = features.spec_augment(
      ones, length, draws, time_masks=2, time_mask=8, time_mask_share=0.3, frequency_mask=4) == 0
  bands, frames = masked.all(axis=1), masked.all(axis=2)
  np.testing.assert_array_equal(masked, bands[:, None, :] | frames[:, :, None])
  assert set(bands.sum(axis=1)) == {0, 1, 2, 3, 4}
  assert frames[:25].sum(axis=1).max() > 8 and frames[25:].sum(axis=1).max() == 6  # two of 3, of 10 frames
  assert not frames[25:, 10:].any()
  assert (np.diff(bands.astype(int), axis=1) == 1).sum(axis=1).max() == 1  # in one piece


# --- Batches ----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """Prepares a set; the texts of its recordings, 0.1 to 0.5 s long, tell how long they are."""
  import tensorflow_datasets as tfds

  def prepare(examples, name="speech", audio_as=None):
    set_name = name

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      name = set_name
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        feature = audio_as() if audio_as else tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "audio": feature, "text": tfds.features.Text()}))

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in examples}

      def _generate_examples(self, split):
        for i, (data, text) in enumerate(examples[split]):
          yield i, {"audio": data, "text": text}

    sources.build(Set, tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

  return prepare


def sounds(count, seed, rate=RATE):
  draw = np.random.default_rng(seed)
  made = []
  for _ in range(count):
    tenths = int(draw.integers(1, 6))
    made.append((wav((tone(tenths / 10, 300 + 200 * tenths, rate) * 32767).astype(np.int16), rate), "a" * tenths))
  return made


def open_pipelines(made, rows=all_rows, **kwargs):
  data = recordings.AudioSet(made).pipelines(
      **{"batch_size": 4, "eval_batch_size": 4, "seed": 0, **kwargs})
  for pipeline in (data.train, *data.evals.values()):
    pipeline.open(rows)
  return data


def test_batches_hold_features_and_text_of_every_recording(prepared):
  prepared({"train": sounds(16, 0), "test": sounds(7, 1)})
  made = config(name="speech", validation="")
  data = open_pipelines(made)
  spec = data.batch_spec
  assert spec["features"].shape == (4, 64, 8) and spec["tokens"].shape == (4, 8)
  for pipeline, count in ((data.train, 4), (data.evals["test"], 2)):
    assert pipeline.num_batches == count
    for step in range(count):
      batch = pipeline.batch(step)
      assert set(spec) == set(batch)
      for name, value in spec.items():
        assert batch[name].dtype == value.dtype and batch[name].shape[2:] == value.shape[2:]
      assert batch["features"].shape[1] in pipeline.ends
      for row, length, tokens, count_, mask in zip(*(batch[f] for f in (
          "features", "length", "tokens", "token_length", "mask"))):
        assert length == (10 * count_ + 1) * mask and (tokens == 2 * (np.arange(8) < count_)).all()
        assert not row[length:].any() and (not mask or row[:length].any())
  test = [data.evals["test"].batch(i) for i in range(2)]
  assert sorted(np.concatenate([b["id"][b["mask"] > 0] for b in test])) == [*range(7)]


def test_a_split_too_large_for_memory_gives_the_same_batches(prepared, monkeypatch):
  prepared({"train": sounds(16, 0), "test": sounds(7, 1)})
  made = config(name="speech", validation="", time_masks=1, frequency_masks=1)
  kept = open_pipelines(made)
  monkeypatch.setattr(recordings, "MEMORY_LIMIT", 1000)
  streamed = open_pipelines(made)
  for one, other in ((kept.train, streamed.train), (kept.evals["test"], streamed.evals["test"])):
    for step in range(one.num_batches):
      for name, value in one.batch(step).items():
        np.testing.assert_array_equal(value, other.batch(step)[name], err_msg=name)


def test_masks_depend_on_seed_and_step_and_not_on_hosts(prepared):
  prepared({"train": sounds(16, 0)})
  made = config(name="speech", validation="", test="", time_masks=2, frequency_masks=2)
  whole, again = (open_pipelines(made).train for _ in range(2))
  np.testing.assert_array_equal(whole.batch(5)["features"], again.batch(5)["features"])
  for rows in share(0, 2), share(1, 2):
    half = open_pipelines(made, rows).train
    np.testing.assert_array_equal(half.batch(5)["features"], whole.batch(5)["features"][rows(4)])
  plain = open_pipelines(config(name="speech", validation="", test="")).train
  hidden = lambda step: (whole.batch(step)["features"] == 0) & (plain.batch(step)["features"] != 0)
  assert hidden(0).any() and any(not np.array_equal(hidden(0)[:, :8], hidden(s)[:, :8]) for s in (4, 8))


def test_samples_of_another_rate_are_read_without_tensorflow_and_resampled(prepared, tmp_path, caplog):
  """As TFDS' librispeech has them."""
  import tensorflow_datasets as tfds

  samples = [((tone(0.1 * i, rate=16000) * 32767).astype(np.int16), "a" * i) for i in (1, 2, 3, 4)]
  prepared({"train": samples}, audio_as=lambda: tfds.features.Tensor(shape=(None,), dtype=np.int16))
  # Only TensorFlow can write the description of such a feature; the records are the same.
  path = tmp_path / "speech" / "1.0.0" / "features.json"
  saved = json.loads(path.read_text())
  saved["featuresDict"]["features"]["audio"] = {
      "pythonClassName": "tensorflow_datasets.core.features.audio_feature.Audio",
      "audio": {"shape": {"dimensions": ["-1"]}, "dtype": "int16", "fileFormat": "flac",
                "sampleRate": "16000", "encoding": "NONE"}}
  path.write_text(json.dumps(saved))
  with caplog.at_level(logging.WARNING):
    batch = open_pipelines(config(name="speech", validation="", test="")).train.batch(0)
  assert "recordings of 16000 samples a second were resampled to 8000" in caplog.text
  assert sorted(batch["length"]) == [11, 21, 31, 41]
  first = batch["features"][np.argmax(batch["length"])][:41]
  sound = features.resample((samples[3][0] / 32768).astype(np.float32), 16000, RATE)
  filters = features.mel_filters(RATE, 256, 8)
  np.testing.assert_allclose(first, features.normalise(features.log_mel(sound, filters, 256, 80)), atol=1e-5)


@pytest.mark.parametrize("example, fields, words", [
    ((wav(np.zeros(0, np.int16)), "a"), {}, ["train", "example 1 of speech", "no sound"]),
    ((b"nothing", "a"), {}, ["example 1 of speech", "cannot be read"]),
    ((wav(np.zeros(800, np.int16)), "axe"), {}, ["'x'", "--config.data.alphabet"]),
    ((wav(np.zeros(800, np.int16)), "abcabcabc"), {}, ["--config.data.max_text=8", "example 1", "9 characters"]),
    ((SOUND[:-100], "a"), {}, ["example 1 of speech", "was cut"]),
    ((header(SOUND, rate=0, byte_rate=0), "a"), {}, ["example 1 of speech", "has 0 samples a second"]),
    ((wav(np.zeros(8000, np.int16)), "a"), {}, ["--config.data.max_frames=64", "example 1", "101"]),
    ((wav(np.zeros(800, np.int16)), "a"), {"text_feature": "words"},
     ["--config.data.text_feature=words", "no such feature, but"]),
])
def test_bad_examples_are_named(prepared, example, fields, words):
  prepared({"train": [sounds(1, 0)[0], example]})
  with pytest.raises(UserError) as error:
    open_pipelines(config(name="speech", validation="", test="", **fields), batch_size=1)
  assert not [word for word in words if word not in str(error.value)], error.value
  assert "\n" not in str(error.value)


def test_samples_of_more_than_16_bits_are_refused_and_floats_are_kept(prepared):
  import tensorflow_datasets as tfds

  feature = lambda dtype: lambda: tfds.features.Tensor(shape=(None,), dtype=dtype)
  prepared({"train": [(np.array([0, 40_000] * 400, np.int64), "a")]}, "wide", feature(np.int64))
  with pytest.raises(UserError, match="example 0 of wide: holds samples of more than 16 bits"):
    open_pipelines(config(name="wide", validation="", test=""), batch_size=1)
  prepared({"train": [(tone(0.1).astype(np.float32), "a")]}, "floats", feature(np.float32))
  heard = open_pipelines(config(name="floats", validation="", test=""), batch_size=1).train.batch(0)["features"]
  np.testing.assert_allclose(heard[0, :11], recordings.AudioSet(config()).features(tone(0.1), RATE), atol=1e-4)
