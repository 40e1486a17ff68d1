"""Morse audio: the code, the noise, and the splits."""

import itertools

import numpy as np
import pytest

from dljax.data import sources
from dljax.data.audio import features, recordings
from dljax.data.datasets import morse


def test_the_code_is_the_alphabet_of_the_config_and_no_two_are_alike():
  assert len(set(morse.CODE.values())) == len(morse.CODE) == 36
  assert {" ", *morse.CODE} == set(recordings.default_config().alphabet)
  assert {morse.CODE[c] for c in "SOS5"} == {"...", "---", "....."}


def test_keying_has_the_lengths_of_the_standard():
  dot = 0.05
  samples = round(dot * morse.RATE)
  down = morse.key("PARIS ET", dot) > 0.5
  runs = [(on, round(len(list(run)) / samples)) for on, run in itertools.groupby(down.tolist())]
  runs = [run for run in runs if run[1]]  # half an edge at both ends
  marks = "".join({(True, 1): ".", (True, 3): "-", (False, 1): "", (False, 3): " ", (False, 7): "/"}[r] for r in runs)
  assert marks == ".--. .- .-. .. .../. -"
  assert sum(count for _, count in runs) == 50 + 1 + 3 + 3  # PARIS and its gap make 50 dots: the definition of a word
  keyed = morse.key("E", dot)
  assert keyed.min() >= 0 and keyed.max() == pytest.approx(1) and 0 < keyed[1] < keyed[10] < 0.9  # rounded edges


@pytest.mark.parametrize("snr", [10.0, 0.0])
def test_the_noise_is_as_loud_as_it_says(snr, monkeypatch):
  """Measured in the recording: noise before the text and the tone where the key is down, over the full band."""
  monkeypatch.setattr(morse, "MARGIN", (3.0, 3.0))
  measured = []
  for seed in range(4):
    sound = morse.recording(np.random.RandomState(seed), "TTTTTTTT", snr).astype(float) - 127.5
    speed = 1.2 / np.random.RandomState(seed).uniform(*morse.SPEED)
    keyed = np.pad(morse.key("TTTTTTTT", speed), 3 * morse.RATE)
    noise = np.var(sound[:3 * morse.RATE - 50])
    both = np.mean(sound[keyed > 0.99]**2)
    measured.append((both - noise) / noise)
  assert 10 * np.log10(np.mean(measured)) == pytest.approx(snr, abs=0.4)


def test_no_text_is_in_two_splits_and_all_are_spelt_by_the_code():
  found = morse.texts(morse.zen_words())
  assert {split: len(texts) for split, texts in found.items()} == {
      "train": 4000, "validation": 200, "test_10db": 300, "test_0db": 300}
  for one, other in itertools.combinations(found.values(), 2):
    assert not set(one) & set(other)
  every = [text for texts in found.values() for text in texts]
  assert set("".join(every)) == {" ", *morse.CODE}
  assert max(map(len, every)) <= 16 and min(map(len, every)) >= 1
  assert found == morse.texts(morse.zen_words())
  assert {"EXPLICIT", "NAMESPACES"} & set(morse.zen_words()) == set() and "BEAUTIFUL" not in morse.zen_words()
  assert {"BETTER", "THAN", "UGLY"} <= set(morse.zen_words())


def test_the_set_prepares_itself(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setattr(morse, "SPLITS", {"train": (6, -2.0, 18.0), "test_0db": (2, 0.0, 0.0)})
  dataset = sources.open_dataset("morse")
  records = dataset.records("train")
  texts = morse.texts(morse.zen_words())["train"]
  read = {record["text"][0].decode(): record for record in records[range(len(records))]}
  assert sorted(read) == sorted(texts)
  for index, text in enumerate(texts):
    sound, rate = features.read_wav(read[text]["audio"][0])
    assert rate == 8000 and -2 <= read[text]["snr"][0] <= 18
    rng = np.random.RandomState([0, index])
    drawn = morse.recording(rng, text, rng.uniform(-2, 18))
    np.testing.assert_array_equal(sound, (drawn.astype(np.float32) - 128) / 128)
