"""Text as Morse audio under noise, as a TFDS set that needs no download.

A text is one or two groups. A group is a word of the Zen of Python (Tim Peters, PEP 20), which
ships as the module `this`, or 3 to 5 random letters and digits. No text is in two splits.

A text is keyed at 24 to 45 words a minute, so a dot takes 50 to 27 ms. A dash takes 3 dots, the
gap between letters 3 dots and the gap between words 7 dots (ITU-R M.1677-1). The tone has a pitch
of 400 to 900 Hz, edges of 4 ms, and a fading of up to 9 dB that comes and goes in 1 to 10 seconds.
There is up to half a second of noise before and after it.

The noise is white and fills the band from 0 to 4 kHz. The signal-to-noise ratio is the mean power
of the faded tone while the key is down, over the power of the whole noise; in a filter of 100 Hz
it would be 16 dB higher. It is 10 dB in validation and test_10db, 0 dB in test_0db, and between -2
and 18 dB in training.

Recordings are WAV files with 8000 samples a second of 8 bits each, whose rounding is at least 30
dB below the noise. They are drawn from NumPy's legacy generator, whose stream never changes; the
last bit of a sample may depend on the machine's sine.
"""

import codecs
import contextlib
import io
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

RATE = 8000  # Hz
SPLITS = {  # number of recordings, least and greatest signal-to-noise ratio in dB
    "train": (4000, -2.0, 18.0), "validation": (200, 10.0, 10.0), "test_10db": (300, 10.0, 10.0),
    "test_0db": (300, 0.0, 0.0)}
SPEED = (24.0, 45.0)  # words a minute; a word takes 50 dots
PITCH = (400.0, 900.0)  # Hz
EDGE = 0.004  # seconds in which the tone rises and falls
FADING = 0.65  # the greatest share of the amplitude that is lost
FADING_RATE = (0.1, 1.0)  # Hz
MARGIN = (0.1, 0.5)  # seconds
PEAK = (0.3, 1.0)  # as a share of full scale
LONGEST_WORD = 7
CODE: Mapping[str, str] = {"A": ".-", "B": "-...", "C": "-.-.", "D": "-..", "E": ".", "F": "..-.",
                           "G": "--.", "H": "....", "I": "..", "J": ".---", "K": "-.-",
                           "L": ".-..", "M": "--", "N": "-.", "O": "---", "P": ".--.", "Q": "--.-",
                           "R": ".-.", "S": "...", "T": "-", "U": "..-", "V": "...-", "W": ".--",
                           "X": "-..-", "Y": "-.--", "Z": "--..", "0": "-----", "1": ".----",
                           "2": "..---", "3": "...--", "4": "....-", "5": ".....", "6": "-....",
                           "7": "--...", "8": "---..", "9": "----."}


def zen_words() -> list[str]:
  """The words of PEP 20 that have up to `LONGEST_WORD` letters, in capitals, sorted."""
  with contextlib.redirect_stdout(io.StringIO()):  # the module prints them
    import this

  text = codecs.decode(this.s, "rot13")
  words = {word.strip(".,*!-").upper() for word in text.split()}
  return sorted(word for word in words if 0 < len(word) <= LONGEST_WORD and set(word) <= set(CODE))


def draw_text(rng: np.random.RandomState, words: list[str]) -> str:
  """Draws a text of one or two groups."""
  characters = sorted(CODE)
  groups = []
  for _ in range(rng.randint(1, 3)):
    if rng.randint(2):
      groups.append(words[rng.randint(len(words))])
    else:
      groups.append("".join(characters[i]
                            for i in rng.randint(len(characters), size=rng.randint(3, 6))))
  return " ".join(groups)


def texts(words: list[str]) -> dict[str, list[str]]:
  """Split -> its texts. No text is in two splits."""
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
  """f64[N]: how far the key is down at each sample, from 0 to 1, with smooth edges.

  Args:
    text: a text of characters in `CODE` and single spaces.
    dot: the length of a dot in seconds.
  """
  # The gap between words is 3 + 1 + 3 dots.
  marks = "   ".join(" ".join(CODE[c]) if c != " " else " " for c in text)
  lengths = np.array([3 if mark == "-" else 1 for mark in marks])
  ends = np.round(np.cumsum(lengths) * dot * RATE).astype(int)
  down = np.zeros(ends[-1])
  for mark, start, end in zip(marks, [0, *ends], ends):
    down[start:end] = mark != " "
  edge = np.hanning(round(EDGE * RATE) + 2)
  return np.convolve(down, edge / edge.sum())


def recording(rng: np.random.RandomState, text: str, snr: float) -> np.ndarray:
  """u8[N]: the samples of a text under noise.

  Args:
    rng: the generator of all random numbers.
    text: see `key`.
    snr: the signal-to-noise ratio in dB; see this file's docstring.
  """
  keyed = key(text, 1.2 / rng.uniform(*SPEED))
  before, after = (int(rng.uniform(*MARGIN) * RATE) for _ in range(2))
  keyed = np.pad(keyed, (before, after))
  t = np.arange(len(keyed)) / RATE
  turn = lambda hertz: np.sin(2 * np.pi * (hertz * t + rng.uniform()))
  tone = keyed * turn(rng.uniform(*PITCH))
  tone *= 1 - rng.uniform(0, FADING) * (1 + turn(rng.uniform(*FADING_RATE))) / 2
  power = np.sum(tone**2) / np.sum(keyed**2)  # both sums weigh the edges by their squares
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
            # TFDS's Audio needs TensorFlow; Text keeps bytes too.
            "audio": tfds.features.Text(doc="A WAV file."),
            "text": tfds.features.Text(),
            "snr": np.float32,
        }),
        homepage="https://www.itu.int/rec/R-REC-M.1677/",
    )

  def _split_generators(self, dl_manager):
    found = texts(zen_words())
    return {split: self._generate_examples(number, split, found[split])
            for number, split in enumerate(SPLITS)}

  def _generate_examples(
      self, number: int, split: str, texts: list[str],
  ) -> Iterator[tuple[int, dict]]:
    import scipy.io.wavfile

    _, least, most = SPLITS[split]
    for index, text in enumerate(texts):
      rng = np.random.RandomState([number, index])
      snr = rng.uniform(least, most)
      file = io.BytesIO()
      scipy.io.wavfile.write(file, RATE, recording(rng, text, snr))
      yield index, {"audio": file.getvalue(), "text": text, "snr": snr}
