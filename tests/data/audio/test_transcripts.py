"""The user's own recordings: tables of several forms, what they decide, splits by seed and speaker, and what is refused."""

import json
import logging

import numpy as np
import pytest

from dljax.data.audio import recordings, transcripts
from dljax.errors import UserError
from tests.data.audio.own_recordings import RATE, common_voice, ljspeech, save, wav

LABELS = " adefghijklnrstuwßöü"


def config(folder, **fields):
  made = recordings.default_config()
  made.update({"folder": str(folder), "num_mels": 8, "buckets": 1, **fields})
  return made


def found_in(folder, seed=0, given=(), **fields):
  """The config with what the folder decides; what was found; and the lines about it."""
  made = config(folder, **fields)
  found, lines = recordings.look_up(made, seed, {*given, *fields})
  made.update(found)
  return made, found, lines


def opened(made, seed=0, assets=None, train=True):
  data = recordings.AudioSet(made).pipelines(batch_size=4, eval_batch_size=4, seed=seed)
  if assets is not None:
    data.restore(assets)
  for pipeline in ([data.train] if train else []) + list(data.evals.values()):
    pipeline.open()
  return data


def split_of(folder, seed=0, **fields):
  """The recordings' names by split."""
  made, _, _ = found_in(folder, seed, **fields)
  dataset, _ = transcripts.open_folder(made, seed)
  return {split: [u.name for u in part] for split, part in dataset.splits.items()}, dataset


# --- Forms of tables --------------------------------------------------------------------------------------


def test_the_form_of_ljspeech(tmp_path):
  save(ljspeech(tmp_path) / "wavs" / "more.wav", wav())
  made, found, lines = found_in(tmp_path)
  assert found == {
      "fitted_to": str(tmp_path), "train": "train", "validation": "validation", "test": "test", "alphabet": LABELS,
      "max_text": 15, "sample_rate": RATE, "lowest": 0.0, "highest": 0.0, "max_frames": 21}
  assert lines == ["left out wavs/more.wav, which the table does not list",
                   f"{tmp_path}: 20 recordings, 0.00 hours; train 16, validation 2, test 2"]
  data = opened(made)
  batch = data.train.batch(0)
  assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
      key: (spec.shape, spec.dtype) for key, spec in data.batch_spec.items()}
  assert data.name == str(tmp_path) and data.fingerprint().startswith("20 files of ")
  said = {"".join(made.alphabet[t - 1] for t in row[:n]) for row, n in zip(batch["tokens"], batch["token_length"])}
  assert said <= {"guten tag", "auf wiedersehen", "na ja", "grüße aus köln"}


@pytest.mark.parametrize("table, text", [
    ("metadata.csv", "a|eins\nb|zwei\n"),  # two columns
    ("metadata.csv", "file_name,transcription\nclips/a.wav,eins\nclips/b.wav,zwei\n"),  # as the Hub's audio folders
    ("metadata.csv", "id|text\na|eins\nb|zwei\n"),
    ("anything.csv", "speaker;wav;transcript\n1;a.wav;eins\n2;b;zwei\n"),
    ("validated.tsv", "client_id\tpath\tsentence\n1\ta.mp3\teins\n2\tb.mp3\tzwei\n"),
    ("clips/x.trans.txt", "a eins\nb zwei\n"),
])
def test_other_forms(tmp_path, table, text):
  for i, name in enumerate("ab"):
    save(tmp_path / "clips" / f"{name}.wav", wav(i))
  save(tmp_path / table, "\ufeff" + text)
  utterances, lines = transcripts.scan(config(tmp_path))
  assert [(u.name, u.text) for u in utterances] == [("clips/a.wav", "eins"), ("clips/b.wav", "zwei")] and not lines
  assert all(u.where.startswith(str(tmp_path / table)) for u in utterances)


def test_endings_may_be_in_upper_case(tmp_path):
  save(tmp_path / "clips" / "a.Wav", wav())
  save(tmp_path / "DATA.TSV", "path\tsentence\na.mp3\teins\n")
  assert [u.name for u in transcripts.scan(config(tmp_path))[0]] == ["clips/a.Wav"]


def test_columns_and_tables_can_be_named(tmp_path):
  save(tmp_path / "a.wav", wav())
  save(tmp_path / "one.csv", "clip,words\na.wav,eins\n")
  save(tmp_path / "two.csv", "clip,words\na.wav,zwei\n")
  with pytest.raises(UserError, match="holds 2 tables .one.csv, two.csv.; .* name the table by --config.data.table"):
    transcripts.scan(config(tmp_path))
  with pytest.raises(UserError, match="none of the columns clip, words holds the file of a recording; .*audio_feature"):
    transcripts.scan(config(tmp_path, table="two.csv"))
  utterances, _ = transcripts.scan(config(tmp_path, table="two.csv", audio_feature="clip", text_feature="words"))
  assert [u.text for u in utterances] == ["zwei"]


def test_composed_and_decomposed_letters_are_the_same(tmp_path):
  for i in range(2):
    save(tmp_path / f"{i}.wav", wav(i))
  save(tmp_path / "metadata.csv", "0|sch\u00f6n\n1|scho\u0308n\n")
  utterances, _ = transcripts.scan(config(tmp_path))
  assert [u.text for u in utterances] == ["sch\u00f6n"] * 2


@pytest.mark.parametrize("texts, want", [
    (["AB c"], " abc"), (["AB C"], " ABC"), (["  a\t b\n"], " ab"), (["ẞß", "ß"], "ß"), (["İi"], "iİ"), (["ǅ ǆ"], " ǅǆ"),
    (["1, 2"], " ,12"),
])
def test_the_alphabet_spells_every_text(texts, want):
  found = transcripts.alphabet(texts)
  assert found == want
  for text in texts:
    recordings.tokenize(text, found)


# --- What recordings decide -------------------------------------------------------------------------------


def test_what_is_given_is_not_found(tmp_path):
  _, found, _ = found_in(ljspeech(tmp_path, rate=44100), alphabet=" " + LABELS[1:], max_text=20, validation="")
  assert "alphabet" not in found and "max_text" not in found and found["sample_rate"] == 16000
  assert found["max_frames"] == 21 and "validation" not in found  # 0.2 s
  _, found, _ = found_in(tmp_path, sample_rate=4000, lowest=100.0)
  assert "sample_rate" not in found and "lowest" not in found


def test_frames_of_other_rates_are_those_of_the_features(tmp_path):
  folder = ljspeech(tmp_path, 12)
  save(folder / "wavs" / "L003.wav", wav(3, rate=11025, seconds=0.31))
  made, found, _ = found_in(folder)
  sets = recordings.AudioSet(made)
  sound, rate = sets.sound({made.audio_feature: [(folder / "wavs" / "L003.wav").read_bytes()]})
  assert found["max_frames"] == len(sets.features(sound, rate)) == recordings.frames(made, len(sound), rate)
  assert found["sample_rate"] == RATE


def test_without_the_folder_a_dry_run_asks_for_what_it_decides(tmp_path):
  with pytest.raises(UserError, match="no such folder; .*--dry_run without it give --config.data.alphabet and "
                                      "--config.data.max_text and --config.data.max_frames"):
    found_in(tmp_path / "no")
  assert found_in(tmp_path / "no", alphabet="a", max_text=3, max_frames=9)[1:] == ({}, [])
  assert recordings.look_up(recordings.default_config(), 0, ()) == ({}, [])


# --- Splits -----------------------------------------------------------------------------------------------


def test_the_splits_of_common_voice(tmp_path):
  folder = common_voice(tmp_path, {"train": 6, "dev": 3, "test": 2}, speakers=2)
  found, _ = split_of(folder)
  assert found == {"train": [f"clips/c{i}.wav" for i in range(6)], "validation": [f"clips/c{i}.wav" for i in (6, 7, 8)],
                   "test": ["clips/c9.wav", "clips/c10.wav"]}
  (folder / "dev.tsv").unlink()
  found, _ = split_of(folder)
  assert found["test"] == ["clips/c9.wav", "clips/c10.wav"] and found["validation"]
  assert sorted(found["train"] + found["validation"]) == [f"clips/c{i}.wav" for i in range(6)]


def test_a_speaker_is_in_one_split(tmp_path):
  folder = common_voice(tmp_path, {"validated": 30}, speakers=10)
  seen = set()
  for seed in range(3):
    found, dataset = split_of(folder, seed)
    speakers = {split: {u.speaker for u in part} for split, part in dataset.splits.items()}
    assert [len(speakers[split]) for split in ("train", "validation", "test")] == [8, 1, 1]
    assert not speakers["train"] & speakers["test"] and not speakers["train"] & speakers["validation"]
    seen.add(json.dumps(found))
    assert split_of(folder, seed)[0] == found
  assert len(seen) > 1
  few = common_voice(tmp_path / "few", {"validated": 30}, speakers=2)  # too few speakers to be apart
  assert [len(part) for part in split_of(few)[0].values()] == [24, 3, 3]


def test_splits_of_librispeech_are_its_folders(tmp_path):
  for i, part in enumerate(("train-clean-100", "train-other-500", "dev-clean", "test-clean")):
    save(tmp_path / part / "19" / "198" / f"19-198-{i}.wav", wav(i))
    save(tmp_path / part / "19" / "198" / "19-198.trans.txt", f"19-198-{i} EINS\n")
  found, dataset = split_of(tmp_path)
  assert [len(part) for part in found.values()] == [2, 1, 1]
  assert {u.speaker for u in dataset.splits["train"]} == {"19"}


def test_a_split_that_is_left_out_goes_to_training(tmp_path):
  found, _ = split_of(ljspeech(tmp_path), test="")
  assert [len(part) for part in found.values()] == [18, 2, 0]
  found, _ = split_of(tmp_path, shares=(0.5, 0.25, 0.25))
  assert [len(part) for part in found.values()] == [10, 5, 5]


# --- Refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table, message", [
    ("L000|eins\nL000|zwei\n", r"metadata.csv, line 2: wavs/L000.wav is also in .*metadata.csv, line 1; take one"),
    ("L000|eins\nL009|zwei\n", "metadata.csv, line 2: there is no L009.wav in .*; add it, or take the line out"),
    ("L000|eins\nL001| \n", "metadata.csv, line 2: wavs/L001.wav has no text; add it"),
    ("L000|eins|1|2\n", "has 4 columns without names; give 2 or 3"),
    ("L000|eins\nL001\n", "metadata.csv, line 2: has 1 cells, but there are 2 columns"),
    ("/etc/L000.wav|eins\n", "line 1: /etc/L000.wav lies outside of the folder"),
    ("file|text|split\nL000|eins|tuesday\n", "line 2: 'tuesday' is no split; write train, validation or test"),
    ("file|text|split\nL000|eins|test\nL001|zwei|test\n", "names no recording for the split train"),
    ("", "metadata.csv: holds no rows"),
    ("L000|eins\nL001|zwei\n", "only 2 different recordings in .*, too few for train and validation and test"),
])
def test_tables_that_do_not_fit_are_refused_by_their_line(tmp_path, table, message):
  save(ljspeech(tmp_path, 2) / "metadata.csv", table)
  with pytest.raises(UserError, match=message) as caught:
    found_in(tmp_path)
  assert "\n" not in str(caught.value)


def test_other_kinds_of_sound_are_to_be_converted(tmp_path):
  folder = common_voice(tmp_path, {"train": 4, "dev": 1, "test": 1}, end=".mp3")
  with pytest.raises(UserError, match=r'train.tsv, line 2: clips/c0.mp3 is no WAV file; convert all, as by `for f in .*/'
                                      r'clips/\*.mp3; do ffmpeg -i "\$f" "\$\{f%.mp3\}.wav"; done`'):
    found_in(folder)


def test_folders_without_a_table(tmp_path):
  with pytest.raises(UserError, match="--config.data.folder=.*no: there is no such folder"):
    found_in(tmp_path / "no")
  save(tmp_path / "in" / "a.wav", wav())
  with pytest.raises(UserError, match="holds no table of transcripts; put a metadata.csv there, or name"):
    found_in(tmp_path / "in")
  with pytest.raises(UserError, match="--config.data.table=.*gone.csv cannot be read"):
    found_in(tmp_path / "in", table="gone.csv")
  with pytest.raises(UserError, match="--config.data.train='train.:9.': own data have the split train; write train"):
    found_in(ljspeech(tmp_path / "lj"), train="train[:9]")


# --- Recordings that cannot be read -----------------------------------------------------------------------


def test_corrupt_recordings_are_refused_or_skipped_up_to_a_number(tmp_path, caplog):
  folder = ljspeech(tmp_path)
  for name in ("L003", "L004"):
    save(folder / "wavs" / f"{name}.wav", wav()[:600])
  with pytest.raises(UserError, match="L003.wav: was cut: .*, or skip it by --config.data.skip_corrupt=2"):
    found_in(folder)
  with pytest.raises(UserError, match="skip_corrupt=1: 2 recordings cannot be read, such as .*L003.wav: was cut: .*give a"):
    found_in(folder, skip_corrupt=1)
  made, _, _ = found_in(folder, skip_corrupt=2)
  with caplog.at_level(logging.WARNING):
    data = opened(made)
  assets = json.loads(json.dumps(data.assets()))
  assert sum(len(names) for names in assets["skipped"].values()) == 2
  assert all(name in caplog.text for names in assets["skipped"].values() for name in names)
  pipelines = [data.train, *data.evals.values()]
  assert sum(pipeline.num_examples for pipeline in pipelines) == 18
  for step in range(12):
    assert np.isfinite(data.train.batch(step)["features"]).all()
  opened(made, assets=assets)
  assets["skipped"]["train"] = ["other.wav"]
  with pytest.raises(UserError, match="recordings of train cannot be read .*, and 1 could not when the run began .other"):
    opened(made, assets=assets)


def test_recordings_that_do_not_fit_into_memory_are_read_by_their_numbers(tmp_path, monkeypatch):
  folder = ljspeech(tmp_path)
  save(folder / "wavs" / "L003.wav", b"RIFF")
  made, _, _ = found_in(folder, skip_corrupt=1)
  kept = opened(made).train.batch(0)
  monkeypatch.setattr(recordings, "MEMORY_LIMIT", -1)
  for key, value in opened(made).train.batch(0).items():
    np.testing.assert_array_equal(value, kept[key])


# --- Other folders ----------------------------------------------------------------------------------------


def test_a_folder_that_changed_is_named_when_a_run_continues(tmp_path):
  made, _, _ = found_in(ljspeech(tmp_path))
  assets = json.loads(json.dumps(opened(made).assets()))
  assert assets["alphabet"] == list(LABELS)
  opened(made, assets=assets)
  save(tmp_path / "wavs" / "L003.wav", wav(99))
  with pytest.raises(UserError, match="has changed since the run began .changed: wavs/L003.wav.; restore it"):
    opened(made, assets=assets)
  save(tmp_path / "wavs" / "L003.wav", wav(3))
  save(tmp_path / "metadata.csv", (tmp_path / "metadata.csv").read_text().replace("na ja", "naja"))
  with pytest.raises(UserError, match="has changed since the run began .other labels, texts or splits.; restore it"):
    opened(made, assets=assets)


def test_another_folder_is_evaluated_whole_without_what_was_trained_on(tmp_path, caplog):
  made, _, _ = found_in(ljspeech(tmp_path / "lj"))
  data = opened(made)
  assets = json.loads(json.dumps(data.assets()))
  made.folder = str(common_voice(tmp_path / "cv", {"validated": 22}))  # of which 20 are the same
  with caplog.at_level(logging.WARNING):
    other = opened(made, assets=assets, train=False)
  assert list(other.evals) == ["test"] and other.evals["test"].num_examples == 22 - data.train.num_examples
  assert "left out what the run was trained on, 16 of 22 recordings" in caplog.text
  with pytest.raises(UserError, match="this is not what the run was trained on; another folder can be evaluated by"):
    opened(made, assets=assets)
  save(tmp_path / "cv" / "validated.tsv", "path\tsentence\nc21\tça\n")
  with pytest.raises(UserError, match="clips/c21.wav: the character 'ç' of 'ça' is not in the alphabet of the run; write it"):
    opened(made, assets=assets, train=False)
