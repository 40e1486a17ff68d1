"""The glosses of WordNet 3.0, as a TFDS set: short definitions, those of nouns with a class.

WordNet (Miller 1995, "WordNet: a lexical database for English") puts words of one meaning into a
set and explains the set by a gloss, such as "a tangible and visible entity". Each set of nouns is
in one of 26 lexicographer files, such as animal, food or feeling, which are the classes here
(lexnames(5WN)). The files come from Debian 12: from the package wordnet-base 3.0-37 (WordNet 3.0
license). If the same files are installed, they are used; otherwise the package is read.

There are 82,115 glosses of nouns, in the splits train, validation and test, and 35,544 of verbs,
adjectives and adverbs, which have the label -1 and are in the split other. A gloss is the whole
text after the bar in a data file, examples of use included.

Splits. A tenth of the nouns' glosses each is for validation and for the test, chosen by a hash of
the gloss, so that equal glosses are in one split. Of the other glosses, those that are also in
validation or test are left out: who learns from train and other has never seen them.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from dljax.data.datasets.debian import read_package

# The lexicographer files 03 to 28, without "noun.".
CLASSES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event",
    "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon", "plant",
    "possession", "process", "quantity", "relation", "shape", "state", "substance", "time")
_FIRST = 3  # the number of the first of these files
HELD_OUT = 0.1  # share of the nouns' glosses for validation, and of those for the test
FOLDER = "usr/share/wordnet"
SHA256 = {
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
}
PACKAGE = "https://deb.debian.org/debian/pool/main/w/wordnet/wordnet-base_3.0-37_all.deb"
_SIZE = 6467132  # of the package, in bytes
_CHECKSUM = "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"  # its SHA-256
# A line of a data file (wndb(5WN)): offset, lexicographer file, part of speech, ... | gloss.
_LINE = re.compile(r"(\d{8}) (\d\d) ([nvasr]) .*? \| (.*)")


class Gloss(NamedTuple):
  """The gloss of a set of words.

  Attributes:
    key: the set's part of speech and its place in the data file, "n00001740".
    text: the gloss.
    label: the class of nouns, a place in `CLASSES`; -1 for other parts of speech.
  """

  key: str
  text: str
  label: int


def parse(text: str) -> list[Gloss]:
  """The glosses in the text of a data file, whose lines of two spaces are its license.

  Raises:
    ValueError: a line is none of a data file.
  """
  found = []
  for number, line in enumerate(text.splitlines(), 1):
    if line.startswith("  "):
      continue
    match = _LINE.fullmatch(line)
    if not match:
      raise ValueError(f"line {number} is none of a data file of WordNet: {line[:60]!r}")
    offset, file, part, gloss = match.groups()
    label = int(file) - _FIRST if part == "n" else -1
    found.append(Gloss(part + offset, gloss.strip(), label))
  return found


def split(glosses: list[Gloss]) -> dict[str, list[Gloss]]:
  """Split -> its glosses; see this file's docstring."""
  found: dict[str, list[Gloss]] = {"train": [], "validation": [], "test": [], "other": []}
  for gloss in glosses:
    if gloss.label >= 0:
      found[draw_split(gloss.text)].append(gloss)
  held_out = {gloss.text for part in ("validation", "test") for gloss in found[part]}
  found["other"] = [gloss for gloss in glosses
                    if gloss.label < 0 and gloss.text not in held_out]
  return found


def draw_split(text: str) -> str:
  """The split of a noun's gloss, by its SHA-256 as a share of 1."""
  place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
  if place < 2 * HELD_OUT:
    return "test" if place < HELD_OUT else "validation"
  return "train"


def installed(root: Path = Path("/")) -> bool:
  """Whether the very files that this set is made of are installed."""
  paths = {root / FOLDER / name: checksum for name, checksum in SHA256.items()}
  return all(path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == checksum
             for path, checksum in paths.items())


with tfds.core.registered.skip_registration():

  class Wordnet(tfds.core.GeneratorBasedBuilder):
    """See this file's docstring.

    Args:
      folder: the folder of the package; None reads the installed files.
    """

    name = "wordnet"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {PACKAGE: tfds.download.checksums.UrlInfo(
        size=_SIZE, checksum=_CHECKSUM, filename=PACKAGE.rpartition("/")[2])}

    @staticmethod
    def installed() -> bool:
      """Whether `folder` can be None."""
      return installed()

    def __init__(self, *, folder: Path | None, **kwargs: Any):
      self._folder = folder
      super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
          builder=self,
          description=__doc__,
          features=tfds.features.FeaturesDict({
              "text": tfds.features.Text(),
              "label": tfds.features.ClassLabel(names=CLASSES),
          }),
          supervised_keys=("text", "label"),
          homepage="https://wordnet.princeton.edu",
      )

    def _split_generators(self, dl_manager):
      glosses = [gloss for name in SHA256 for gloss in parse(self._read(name))]
      return {name: self._generate_examples(part) for name, part in split(glosses).items()}

    def _generate_examples(
        self, glosses: list[Gloss],
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
      for gloss in glosses:
        yield gloss.key, {"text": gloss.text, "label": gloss.label}

    def _read(self, name: str) -> str:
      if self._folder is None:
        return Path("/", FOLDER, name).read_text(encoding="ascii")
      path = self._folder / PACKAGE.rpartition("/")[2]
      return read_package(path, f"{FOLDER}/{name}").decode("ascii")
