"""The English announcements of a telephone exchange, by one speaker, with transcripts, as a TFDS
set.

The recordings are those of the Asterisk telephone exchange, with 8000 samples a second of 16 bits,
spoken by Allison Smith (Creative Commons BY-SA 3.0). They come from Debian 12: the package
asterisk-core-sounds-en-wav 1.6.1 has 568 WAV files of 25 minutes, and asterisk-core-sounds-en has
the transcripts, core-sounds-en.txt. If the same transcripts are installed, the installed files are
used; otherwise the packages are read.

Of the 568 recordings, 550 are kept (23.0 minutes): those that are speech, and whose text is read
as it is written. Tones and silence are left out, and so is a tour of a minute that is full of
numbers. The transcripts are as published, with their errors of spelling ("exclaimation"), but in
small letters, with digits, * and # as words (seven, star, pound), with spaces for hyphens, and
with no punctuation but the apostrophe.

Splits. Recordings that share a sentence ("Login incorrect." is said alone, and before "Mailbox?")
form a family, which is in one split, so no text and no sentence is in two splits. The families, in
an order drawn by a hash, go to the test until it has 15 % of the recordings, and then to
validation until it has 10 %; those larger than a twentieth of all recordings stay in training.
"""

import collections
import gzip
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from dljax.data.datasets import debian

SHARES = {"test": 0.15, "validation": 0.10}
LARGE = 0.05  # share of all recordings, above which a family stays in training
FOLDER = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
# The checksum of the transcripts.
SHA256 = "4a5c1fea255e06020acd67efe37d162d0f0458f685efe578d224449f8e7f0bb4"
_POOL = "https://deb.debian.org/debian/pool/main/a/asterisk-core-sounds/"
PACKAGES = {
    f"{_POOL}asterisk-core-sounds-en-wav_1.6.1-1_all.deb":
        (18272864, "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"),
    f"{_POOL}asterisk-core-sounds-en_1.6.1-1_all.deb":
        (22844, "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"),
}
NOT_READ_AS_WRITTEN = ("demo-instruct",)
READ = {"0": "zero", "1": "one", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six",
        "7": "seven", "8": "eight", "9": "nine", "*": "star", "#": "pound",
        "www.asterisk.org": "w w w dot asterisk dot org"}


def sentences(text: str) -> list[str]:
  """The spoken sentences of a transcript, in letters, apostrophes and single spaces.

  Notes in brackets are not spoken; the result may be empty.
  """
  text = re.sub(r"\[.*?\]|<.*?>|\(.*?\)", " ", text.lower())
  for written, read in READ.items():
    text = text.replace(written, f" {read} ")
  text = re.sub(r"\b([a-z])\.(?=[a-z]\b|\s|$)", r"\1 ", text)  # the stops in A.M. end no sentence
  found = (" ".join(re.findall(r"[a-z]+(?:'[a-z]+)*", part))
           for part in re.split(r"[.?!;:]", text))
  return [sentence for sentence in found if sentence]


def parse_transcripts(text: str) -> dict[str, list[str]]:
  """Name of a recording ("digits/7") -> its sentences, for all recordings that are speech."""
  found = {}
  for line in text.splitlines():
    name, colon, said = line.partition(":")
    if colon and not line.startswith(";") and name not in NOT_READ_AS_WRITTEN:
      found[name] = sentences(said)
  return {name: said for name, said in found.items() if said}


def split(said: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
  """Split -> names of its recordings; see this file's docstring."""
  parent = {name: name for name in said}

  def root(name: str) -> str:
    while parent[name] != name:
      name = parent[name]
    return name

  first: dict[str, str] = {}
  for name, parts in said.items():
    for sentence in parts:
      other = root(first.setdefault(sentence, name))
      parent[root(name)] = other
  families = collections.defaultdict(list)
  for name in said:
    families[root(name)].append(name)
  found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
  left = {name: share * len(said) for name, share in SHARES.items()}
  for family in sorted(families.values(),
                       key=lambda names: hashlib.sha256(min(names).encode()).hexdigest()):
    part = next((name for name, wanted in left.items() if wanted > 0), "train")
    if len(family) > LARGE * len(said):
      part = "train"
    if part in left:
      left[part] -= len(family)
    found[part] += family
  return {name: sorted(names) for name, names in found.items()}


def installed(root: Path = Path("/")) -> bool:
  """Whether the recordings and transcripts that this set is made of are installed."""
  text = root / TRANSCRIPTS
  return (root / FOLDER).is_dir() and text.is_file() and _sha256(text.read_bytes()) == SHA256


def _sha256(compressed: bytes) -> str:
  return hashlib.sha256(gzip.decompress(compressed)).hexdigest()


with tfds.core.registered.skip_registration():

  class TelephonePrompts(tfds.core.GeneratorBasedBuilder):
    """See this file's docstring.

    Args:
      folder: the folder of the packages; None reads the installed files.
    """

    name = "telephone_prompts"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {
        url: tfds.download.checksums.UrlInfo(
            size=size, checksum=checksum, filename=url.rpartition("/")[2])
        for url, (size, checksum) in PACKAGES.items()}

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
              # TFDS's Audio needs TensorFlow; Text keeps bytes too.
              "audio": tfds.features.Text(doc="A WAV file."),
              "text": tfds.features.Text(),
              "name": tfds.features.Text(),
          }),
          homepage="https://www.asterisk.org",
      )

    def _split_generators(self, dl_manager):
      wav, text = self._read()
      said = {name: parts for name, parts in parse_transcripts(text).items() if name in wav}
      return {
          part: self._generate_examples(
              [(name, wav[name], " ".join(said[name])) for name in names])
          for part, names in split(said).items()}

    def _generate_examples(
        self, examples: Sequence[tuple[str, bytes, str]],
    ) -> Iterator[tuple[str, dict]]:
      for name, wav, text in examples:
        yield name, {"audio": wav, "text": text, "name": name}

    def _read(self) -> tuple[dict[str, bytes], str]:
      """Name -> the bytes of a WAV file; and the text of all transcripts."""
      if self._folder is None:
        root = Path("/", FOLDER)
        wav = {str(path.relative_to(root).with_suffix("")): path.read_bytes()
               for path in root.rglob("*.wav")}
        text = Path("/", TRANSCRIPTS).read_bytes()
      else:
        sounds, texts = (self._folder / url.rpartition("/")[2] for url in PACKAGES)
        wav = {name.removeprefix(f"{FOLDER}/").removesuffix(".wav"): content
               for name, content in debian.files(sounds) if name.endswith(".wav")}
        text = debian.read_package(texts, TRANSCRIPTS)
      return wav, gzip.decompress(text).decode()
