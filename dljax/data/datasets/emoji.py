"""The emoji of the font Noto Color Emoji, as a TFDS set: pictures with transparency, names and
groups.

The pictures are the font's own, 136 pixels wide and 128 high. There is one for each emoji that
Unicode 15.0 recommends (the "fully-qualified" lines of emoji-test.txt), including skin tones,
professions, families and flags. Both files come from Debian 12: from the packages
fonts-noto-color-emoji 2.042 (SIL Open Font License 1.1) and unicode-data 15.0.0. If the same files
are installed, they are used; otherwise the packages are read.

Splits. Emoji that look alike form a family, which is in one split: those that differ only in skin
tone, in the sex of a person or in the name after a colon ("family: man, woman, boy", but not flags
and keycaps), and those with the same picture (the flags of Norway and Svalbard). From every group,
families in an order drawn by a hash go to the test until it has 15 % of the group's pictures, and
then to validation until it has 10 %.
"""

import collections
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from dljax.data.datasets.debian import read_package

GROUPS = ("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink",
          "Travel & Places", "Activities", "Objects", "Symbols", "Flags")
SHARES = {"test": 0.15, "validation": 0.10}

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "usr/share/unicode/emoji/emoji-test.txt"
SHA256 = {
    FONT: "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec",
    NAMES: "8445f23ac8388e096be19d0262e14fceff856ff52093f2356dc89485f1a853db",
}
PACKAGES = {
    "https://deb.debian.org/debian/pool/main/f/fonts-noto-color-emoji/fonts-noto-color-emoji_2.042-0+deb12u1_all.deb":
        (FONT, 9893872, "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751"),
    "https://deb.debian.org/debian/pool/main/u/unicode-data/unicode-data_15.0.0-1_all.deb":
        (NAMES, 7983784, "5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc"),
}

SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
EMOJI_STYLE, JOINER = 0xFE0F, 0x200D  # variation selector 16, zero width joiner
MAN, WOMAN, PERSON, MALE, FEMALE = 0x1F468, 0x1F469, 0x1F9D1, 0x2642, 0x2640
HEIGHT, WIDTH = 128, 136


@dataclasses.dataclass(frozen=True)
class Emoji:
  """An emoji in emoji-test.txt.

  Attributes:
    codepoints: the emoji's sequence of code points.
    name: the emoji's short name (CLDR).
    group, subgroup: the group and the subgroup that list it.
  """

  codepoints: tuple[int, ...]
  name: str
  group: str
  subgroup: str


def spell(codepoints: Iterable[int]) -> str:
  """Code points as a text like "1F44B 1F3FB"."""
  return " ".join(f"{code:04X}" for code in codepoints)


def parse_names(text: str) -> list[Emoji]:
  """The fully-qualified emoji in the text of an emoji-test.txt (Unicode Technical Standard 51)."""
  found, group, subgroup = [], "", ""
  for line in text.splitlines():
    if line.startswith("# group: "):
      group = line.removeprefix("# group: ").strip()
    elif line.startswith("# subgroup: "):
      subgroup = line.removeprefix("# subgroup: ").strip()
    elif match := re.fullmatch(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)", line):
      found.append(Emoji(tuple(int(code, 16) for code in match[1].split()), match[2], group,
                         subgroup))
  return found


class Font:
  """The bitmaps of a colour font (OpenType's tables CBLC and CBDT), by sequence of code points.

  Args:
    data: the bytes of the font file.
  """

  def __init__(self, data: bytes):
    from fontTools.ttLib import TTFont

    font = TTFont(io.BytesIO(data), lazy=True)
    self._glyphs = font.getBestCmap()
    self._ligatures = {}  # a sequence of glyphs -> the glyph that is drawn for it
    for lookup in font["GSUB"].table.LookupList.Lookup if "GSUB" in font else ():
      for table in lookup.SubTable:
        for first, ligatures in getattr(table, "ligatures", {}).items():
          for ligature in ligatures:
            self._ligatures.setdefault((first, *ligature.Component), ligature.LigGlyph)
    self._bitmaps = font["CBDT"].strikeData[0]

  def bitmap(self, codepoints: Sequence[int]) -> bytes | None:
    """The PNG file for a sequence of code points; None if the font has no picture of the whole."""
    for variant in (tuple(codepoints), tuple(code for code in codepoints if code != EMOJI_STYLE)):
      glyphs = tuple(self._glyphs.get(code) for code in variant)
      glyph = glyphs[0] if len(glyphs) == 1 else self._ligatures.get(glyphs)
      if glyph in self._bitmaps:
        return bytes(self._bitmaps[glyph].imageData)
    return None


def families(emoji: Sequence[Emoji], pictures: Sequence[bytes]) -> list[list[int]]:
  """The families of emoji that look alike, and so must be in one split.

  Args:
    emoji: all emoji.
    pictures: the picture of each.

  Returns:
    The positions of each family's members, ascending; the families in order of their first member.
  """
  parent = list(range(len(emoji)))

  def root(i: int) -> int:
    while parent[i] != i:
      i = parent[i]
    return i

  first: dict[Any, int] = {}
  for i, (one, picture) in enumerate(zip(emoji, pictures)):
    for key in ("codes", _plain(one.codepoints)), ("name", _base_name(one)), ("picture", picture):
      other = root(first.setdefault(key, i))
      parent[max(root(i), other)] = min(root(i), other)
  members = collections.defaultdict(list)
  for i in range(len(emoji)):
    members[root(i)].append(i)
  return list(members.values())


def _plain(codepoints: Iterable[int]) -> tuple[int, ...]:
  """The code points without skin tones, and with a person in place of a man or a woman."""
  codes: list[int] = []
  for code in codepoints:
    if code in (MALE, FEMALE) and codes[-1:] == [JOINER]:
      codes.pop()
    elif code not in SKIN_TONES and code != EMOJI_STYLE:
      codes.append(PERSON if code in (MAN, WOMAN) else code)
  return tuple(codes)


def _base_name(emoji: Emoji) -> str:
  """The name up to its colon; the whole name for flags and keycaps, which differ after it."""
  name, _, _ = emoji.name.partition(":")
  return emoji.name if name in ("flag", "keycap") else name


def split(emoji: Sequence[Emoji], pictures: Sequence[bytes]) -> dict[str, list[int]]:
  """Split name -> positions of its emoji; see this file's docstring."""
  def draw(family: list[int]) -> str:
    return hashlib.sha256(emoji[family[0]].name.encode()).hexdigest()

  parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
  by_group = collections.defaultdict(list)
  for family in families(emoji, pictures):
    by_group[emoji[family[0]].group].append(family)
  for of_group in by_group.values():
    total = sum(map(len, of_group))
    left = {name: share * total for name, share in SHARES.items()}
    for family in sorted(of_group, key=draw):
      part = next((name for name, wanted in left.items() if wanted > 0), "train")
      if part in left:
        left[part] -= len(family)
      parts[part] += family
  return {name: sorted(part) for name, part in parts.items()}


def installed(root: Path = Path("/")) -> bool:
  """Whether the very files that this set is made of are installed."""
  return all((root / path).is_file()
             and hashlib.sha256((root / path).read_bytes()).hexdigest() == checksum
             for path, checksum in SHA256.items())


with tfds.core.registered.skip_registration():

  class Emojis(tfds.core.GeneratorBasedBuilder):
    """See this file's docstring.

    Args:
      folder: the folder of the packages; None reads the installed files.
    """

    name = "emoji"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {
        url: tfds.download.checksums.UrlInfo(
            size=size, checksum=checksum, filename=url.rpartition("/")[2])
        for url, (_, size, checksum) in PACKAGES.items()}

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
              "image": tfds.features.Image(shape=(HEIGHT, WIDTH, 4), encoding_format="png"),
              "label": tfds.features.ClassLabel(names=GROUPS),
              "name": tfds.features.Text(),
              "subgroup": tfds.features.Text(),
              "codepoints": tfds.features.Text(),  # "1F44B 1F3FB"
          }),
          supervised_keys=("image", "label"),
          homepage="https://github.com/googlefonts/noto-emoji",
      )

    def _split_generators(self, dl_manager):
      font = Font(self._read(FONT))
      emoji = parse_names(self._read(NAMES).decode())
      pictures = [font.bitmap(one.codepoints) for one in emoji]
      return {name: self._generate_examples(name, [(emoji[i], pictures[i]) for i in part])
              for name, part in split(emoji, pictures).items()}

    def _generate_examples(
        self, split: str, examples: Sequence[tuple[Emoji, bytes]],
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
      from PIL import Image

      del split
      for emoji, picture in examples:
        codepoints = spell(emoji.codepoints)
        yield codepoints, {"image": Image.open(io.BytesIO(picture)).convert("RGBA"),
                           "label": emoji.group, "name": emoji.name, "subgroup": emoji.subgroup,
                           "codepoints": codepoints}

    def _read(self, member: str) -> bytes:
      if self._folder is None:
        return Path("/", member).read_bytes()
      url = next(url for url, (path, _, _) in PACKAGES.items() if path == member)
      return read_package(self._folder / url.rpartition("/")[2], member)
