"""Text as Morse audio under noise, as a TFDS set that needs no download.

A text is one or two groups: words of the Zen of Python (Tim Peters, PEP 20), which ships as the module `this`, or 3 to
5 letters and digits at random. No text is in two splits. It is keyed at 24 to 45 words a minute (a dot of 50 to 27 ms;
dash, gaps between letters and between words of 3, 3 and 7 dots: ITU-R M.1677-1), at a pitch of 400 to 900 Hz, with
edges of 4 ms, a fading of up to 9 dB that comes and goes in 1 to 10 seconds, and up to half a second of noise before
and after.

The noise is white and fills the band of 0 to 4 kHz. The signal-to-noise ratio is the mean power of the tone while the
key is down, faded as it is, by the whole noise power: in a filter of 100 Hz it would be 16 dB more. It is 10 dB in
validation and test_10db, 0 dB in test_0db, and anything from -2 to 18 dB in training.

Recordings are WAV files of 8000 samples a second and 8 bits, whose rounding is 30 dB below the noise at least. They are
drawn from NumPy's legacy generator, whose stream never changes; the last bit of a sample may depend on the machine's
sine.
"""

import codecs
import contextlib
import io
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

RATE = 8000  # Hz
SPLITS = {  # recordings, and the least and greatest signal-to-noise ratio in dB
    "train": (4000, -2.0, 18.0), "validation": (200, 10.0, 10.0), "test_10db": (300, 10.0, 10.0),
    "test_0db": (300, 0.0, 0.0)}
SPEED = (24.0, 45.0)  # words a minute, of 50 dots each
PITCH = (400.0, 900.0)  # Hz
EDGE = 0.004  # seconds in which the tone rises and falls
FADING = 0.65  # of the amplitude, the most that is lost
FADING_RATE = (0.1, 1.0)  # Hz
MARGIN = (0.1, 0.5)  # seconds
PEAK = (0.3, 1.0)  # of full scale
LONGEST_WORD = 7
CODE: Mapping[str, str] = {
    "A": ".-", "B": "-...", "C": "-.-.", "D": "-..", "E": ".", "F": "..-.", "G": "--.", "H": "....", "I": "..",
    "J": ".---", "K": "-.-", "L": ".-..", "M": "--", "N": "-.", "O": "---", "P": ".--.", "Q": "--.-", "R": ".-.",
    "S": "...", "T": "-", "U": "..-", "V": "...-", "W": ".--", "X": "-..-", "Y": "-.--", "Z": "--..", "0": "-----",
    "1": ".----", "2": "..---", "3": "...--", "4": "....-", "5": ".....", "6": "-....", "7": "--...", "8": "---..",
    "9": "----."}


def zen_words() -> list[str]:
  """The words of PEP 20 of up to `LONGEST_WORD` letters, in capitals, sorted."""
  with contextlib.redirect_stdout(io.StringIO()):  # the module prints them
    import this

  text = codecs.decode(this.s, "rot13")
  words = {word.strip(".,*!-").upper() for word in text.split()}
  return sorted(word for word in words if 0 < len(word) <= LONGEST_WORD and set(word) <= set(CODE))


def draw_text(rng: np.random.RandomState, words: list[str]) -> str:
  """One or two groups."""
  characters = sorted(CODE)
  groups = []
  for _ in range(rng.randint(1, 3)):
    if rng.randint(2):
      groups.append(words[rng.randint(len(words))])
    else:
      groups.append("".join(characters[i] for i in rng.randint(len(characters), size=rng.randint(3, 6))))
  return " ".join(groups)


def texts(words: list[str]) -> dict[str, list[str]]:
  """Split -> its texts, none of which is in two splits."""
  owner, found = {}, {}
  for number, (split, (count, _, _)) in enumerate(SPLITS.items()):
    rng = np.random.RandomState([77, number])
    found[split] = []
    while len(found[split]) < count:
      text = draw_text(rng, words)
      if owner.setdefault(text, split) == split:
        found[split].append(text)
  return found


def key(text: str, dot: float) -> np.ndarray:
  """f64[N]: how far the key is down, 0 to 1, with rounded edges.

  Args:
    text: of characters of `CODE` and single spaces.
    dot: seconds.
  """
  marks = "   ".join(" ".join(CODE[c]) if c != " " else " " for c in text)  # a word's gap: 3 + 1 + 3 dots
  lengths = np.array([3 if mark == "-" else 1 for mark in marks])
  ends = np.round(np.cumsum(lengths) * dot * RATE).astype(int)
  down = np.zeros(ends[-1])
  for mark, start, end in zip(marks, [0, *ends], ends):
    down[start:end] = mark != " "
  edge = np.hanning(round(EDGE * RATE) + 2)
  return np.convolve(down, edge / edge.sum())


def recording(rng: np.random.RandomState, text: str, snr: float) -> np.ndarray:
  """u8[N], a text under noise.

  Args:
    rng: drawn from.
    text: see `key`.
    snr: in dB; see this file's docstring.
  """
  keyed = key(text, 1.2 / rng.uniform(*SPEED))
  before, after = (int(rng.uniform(*MARGIN) * RATE) for _ in range(2))
  keyed = np.pad(keyed, (before, after))
  t = np.arange(len(keyed)) / RATE
  turn = lambda hertz: np.sin(2 * np.pi * (hertz * t + rng.uniform()))
  tone = keyed * turn(rng.uniform(*PITCH)) * (1 - rng.uniform(0, FADING) * (1 + turn(rng.uniform(*FADING_RATE))) / 2)
  power = np.sum(tone**2) / np.sum(keyed**2)  # the square of the edges in both
  sound = tone + rng.standard_normal(len(t)) * np.sqrt(power / 10**(snr / 10))
  sound *= rng.uniform(*PEAK) / np.abs(sound).max()
  return np.clip(np.floor(128 + 128 * sound), 0, 255).astype(np.uint8)


class Morse(tfds.core.GeneratorBasedBuilder):
  """4000 recordings for training, 200 for validation, and two tests of 300."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=__doc__,
        features=tfds.features.FeaturesDict({
            "audio": tfds.features.Text(doc="A WAV file."),  # TFDS' Audio needs TensorFlow; this keeps bytes too
            "text": tfds.features.Text(),
            "snr": np.float32,
        }),
        homepage="https://www.itu.int/rec/R-REC-M.1677/",
    )

  def _split_generators(self, dl_manager):
    found = texts(zen_words())
    return {split: self._generate_examples(number, split, found[split]) for number, split in enumerate(SPLITS)}

  def _generate_examples(self, number: int, split: str, texts: list[str]) -> Iterator[tuple[int, dict]]:
    import scipy.io.wavfile

    _, least, most = SPLITS[split]
    for index, text in enumerate(texts):
      rng = np.random.RandomState([number, index])
      snr = rng.uniform(least, most)
      file = io.BytesIO()
      scipy.io.wavfile.write(file, RATE, recording(rng, text, snr))
      yield index, {"audio": file.getvalue(), "text": text, "snr": snr}
