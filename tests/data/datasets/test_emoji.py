"""The emoji set: what is read from font, names and packages, and that nothing leaks between splits.

The font here is made by fontTools; where Debian's packages are installed, the real one is prepared too.
"""

import collections
import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dljax.data import prepare, sources
from dljax.data.image import decode, labelled
from dljax.data.datasets import emoji, emoji_scenes
from dljax.errors import UserError

NAMES = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                                  ; fully-qualified     # \U0001F600 E1.0 grinning face
263A FE0F                                              ; fully-qualified     # \u263a\ufe0f E0.6 smiling face
263A                                                   ; unqualified         # \u263a E0.6 smiling face

# group: People & Body
# subgroup: person-activity
1F3C3                                                  ; fully-qualified     # \U0001F3C3 E0.6 person running
1F3C3 1F3FB                                            ; fully-qualified     # x E1.0 person running: light skin tone
1F3C3 1F3FB 200D 2640 FE0F                             ; fully-qualified     # x E4.0 woman running: light skin tone
1F3C3 1F3FB 200D 2640                                  ; minimally-qualified # x E4.0 woman running: light skin tone
1F468 200D 2695 FE0F                                   ; fully-qualified     # x E4.0 man health worker
1F9D1 200D 2695 FE0F                                   ; fully-qualified     # x E12.1 health worker

# group: Component
# subgroup: skin-tone
1F3FB                                                  ; component           # x E1.0 light skin tone

# group: Symbols
# subgroup: keycap
0031 FE0F 20E3                                         ; fully-qualified     # 1 E0.6 keycap: 1
0032 FE0F 20E3                                         ; fully-qualified     # 2 E0.6 keycap: 2
2640 FE0F                                              ; fully-qualified     # x E4.0 female sign
2642 FE0F                                              ; fully-qualified     # x E4.0 male sign

# group: Flags
# subgroup: country-flag
1F1F3 1F1F4                                            ; fully-qualified     # x E2.0 flag: Norway
1F1F8 1F1EF                                            ; fully-qualified     # x E2.0 flag: Svalbard & Jan Mayen
1F1E8 1F1ED                                            ; fully-qualified     # x E2.0 flag: Switzerland

#EOF
"""
SAME_PICTURE = {"flag: Svalbard & Jan Mayen": "flag: Norway"}


def picture(name: str) -> bytes:
  """A PNG file of 136x128 pixels, transparent on the left, with a palette as in the real font."""
  colour = hashlib.sha256(SAME_PICTURE.get(name, name).encode()).digest()[:3]
  pixels = np.zeros((emoji.HEIGHT, emoji.WIDTH, 4), np.uint8)
  pixels[:, 68:] = (*colour, 255)
  out = io.BytesIO()
  Image.fromarray(pixels).quantize(4).save(out, "png")
  return out.getvalue()


@pytest.fixture(scope="module")
def font() -> bytes:
  """A colour font with the emoji of NAMES: a glyph for each code point, ligatures for sequences."""
  from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
  from fontTools.fontBuilder import FontBuilder
  from fontTools.ttLib import newTable
  from fontTools.ttLib.tables import BitmapGlyphMetrics, C_B_D_T_, E_B_L_C_

  names = emoji.parse_names(NAMES)
  codes = sorted({code for one in names for code in one.codepoints} - {emoji.EMOJI_STYLE})
  cmap = {code: f"u{code:04X}" for code in codes}
  drawn = {}
  ligatures = []
  for number, one in enumerate(names):
    glyphs = [cmap[code] for code in one.codepoints if code != emoji.EMOJI_STYLE]
    drawn[glyphs[0] if len(glyphs) == 1 else f"ligature{number}"] = picture(one.name)
    if len(glyphs) > 1:
      ligatures.append(f"sub {' '.join(glyphs)} by ligature{number};")
  rest = [name for name in (".notdef", *cmap.values()) if name not in drawn]
  builder = FontBuilder(2048)
  builder.setupGlyphOrder([*rest, *drawn])
  builder.setupCharacterMap(cmap)
  builder.setupHorizontalMetrics(dict.fromkeys([*rest, *drawn], (2048, 0)))
  builder.setupHorizontalHeader()
  builder.setupPost()
  addOpenTypeFeaturesFromString(builder.font, f"feature ccmp {{ {' '.join(ligatures)} }} ccmp;")

  def metrics():
    small = BitmapGlyphMetrics.SmallGlyphMetrics()
    small.height, small.width, small.BearingX, small.BearingY, small.Advance = emoji.HEIGHT, emoji.WIDTH, 0, 101, 136
    return small

  def line():
    made = E_B_L_C_.SbitLineMetrics()
    for field in ("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset",
                  "minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2"):
      setattr(made, field, 0)
    return made

  bitmaps, locations = newTable("CBDT"), newTable("CBLC")
  bitmaps.version = locations.version = 3.0
  strike, subtable = E_B_L_C_.Strike(), E_B_L_C_.eblc_index_sub_table_1(b"", builder.font)
  strike.bitmapSizeTable.hori, strike.bitmapSizeTable.vert = line(), line()
  for field, value in (("colorRef", 0), ("startGlyphIndex", len(rest)), ("endGlyphIndex", len(rest) + len(drawn) - 1),
                       ("ppemX", 109), ("ppemY", 109), ("bitDepth", 32), ("flags", 1)):
    setattr(strike.bitmapSizeTable, field, value)
  subtable.indexFormat, subtable.imageFormat, subtable.imageDataOffset = 1, 17, 0
  subtable.firstGlyphIndex, subtable.lastGlyphIndex = len(rest), len(rest) + len(drawn) - 1
  subtable.names = list(drawn)
  strike.indexSubTables = [subtable]
  locations.strikes = [strike]
  data = {}
  for name, png in drawn.items():
    glyph = C_B_D_T_.cbdt_bitmap_format_17(b"", builder.font)
    glyph.metrics, glyph.imageData = metrics(), png
    data[name] = glyph
  bitmaps.strikeData = [data]
  builder.font["CBDT"], builder.font["CBLC"] = bitmaps, locations
  out = io.BytesIO()
  builder.save(out)
  return out.getvalue()


def package(member: str, content: bytes, compression: str) -> bytes:
  """A Debian package that holds one file."""
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode=f"w:{compression}") as archive:
    entry = tarfile.TarInfo(f"./{member}")
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
  parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": tar.getvalue()}
  entries = (f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
             for name, part in parts.items())
  return b"!<arch>\n" + b"".join(entries)


@pytest.fixture
def packages(font, tmp_path, monkeypatch):
  """A folder with packages of the made font and names, registered in place of the real ones."""
  folder = tmp_path / "packages"
  folder.mkdir()
  infos = {}
  contents = {emoji.FONT: (font, "xz"), emoji.NAMES: (NAMES.encode(), "gz")}
  for url, (member, _, _) in emoji.PACKAGES.items():
    data = package(member, *contents[member])
    path = folder / url.rpartition("/")[2]
    path.write_bytes(data)
    infos[url] = emoji.Emojis.url_infos[url].__class__(
        size=len(data), checksum=hashlib.sha256(data).hexdigest(), filename=path.name)
  monkeypatch.setattr(emoji.Emojis, "url_infos", infos)
  monkeypatch.setattr(emoji, "installed", lambda: False)
  return folder


def test_names_groups_and_code_points():
  found = emoji.parse_names(NAMES)
  assert len(found) == 14  # what is not fully-qualified is left out
  assert found[1] == emoji.Emoji((0x263A, 0xFE0F), "smiling face", "Smileys & Emotion", "face-smiling")
  assert found[4].codepoints == (0x1F3C3, 0x1F3FB, 0x200D, 0x2640, 0xFE0F)
  assert {one.group for one in found} < set(emoji.GROUPS)


def test_pictures_of_code_points_and_of_sequences(font):
  drawn = emoji.Font(font)
  for one in emoji.parse_names(NAMES):
    assert drawn.bitmap(one.codepoints) == picture(one.name), one.name
  assert drawn.bitmap((0x200D,)) is None  # in the font, without a picture
  assert drawn.bitmap((0x1F600, 0x1F600)) is None and drawn.bitmap((0x41,)) is None


def test_what_looks_alike_is_one_family():
  found = emoji.parse_names(NAMES)
  names = [[found[i].name for i in family] for family in emoji.families(found, [picture(one.name) for one in found])]
  assert names == [
      ["grinning face"], ["smiling face"],
      ["person running", "person running: light skin tone", "woman running: light skin tone"],
      ["man health worker", "health worker"], ["keycap: 1"], ["keycap: 2"], ["female sign"], ["male sign"],
      ["flag: Norway", "flag: Svalbard & Jan Mayen"], ["flag: Switzerland"]]


def test_splits_have_their_shares_and_keep_families_together():
  tones = [(), *((tone,) for tone in emoji.SKIN_TONES)]
  many = [emoji.Emoji((0x1F400 + n, *tone), f"thing {n}", "Objects", "") for n in range(100) for tone in tones]
  pictures = [str(i).encode() for i in range(len(many))]
  parts = emoji.split(many, pictures)
  assert sorted(i for part in parts.values() for i in part) == list(range(600))
  assert {name: len(part) for name, part in parts.items()} == {"train": 450, "validation": 60, "test": 90}
  for part in parts.values():
    assert set(collections.Counter(many[i].codepoints[0] for i in part).values()) == {6}
  assert parts == emoji.split(many, pictures)


def test_prepared_from_packages_at_hand(packages, tmp_path, monkeypatch):
  path = prepare.prepare("emoji", tmp_path / "tfds", packages)
  assert path == tmp_path / "tfds" / "emoji" / "1.0.0"
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  dataset = sources.open_dataset("emoji")
  assert tuple(dataset.features["label"].names) == emoji.GROUPS
  records = {}
  for split in ("train", "validation", "test"):
    of_split = dataset.records(split)
    records |= {record["name"][0].decode(): record for record in of_split[range(len(of_split))]}
  assert records.keys() == {one.name for one in emoji.parse_names(NAMES)}
  record = records["woman running: light skin tone"]
  assert record["codepoints"][0] == b"1F3C3 1F3FB 200D 2640 FE0F"
  assert emoji.GROUPS[record["label"][0]] == "People & Body"
  stored = np.asarray(Image.open(io.BytesIO(record["image"][0])))
  np.testing.assert_array_equal(
      stored, np.asarray(Image.open(io.BytesIO(picture("woman running: light skin tone"))).convert("RGBA")))

  config = labelled.default_config()
  config.update(name="emoji", image_shape=(32, 34, 3), num_classes=9, mean=(0.0,) * 3, std=(1.0,) * 3, background=255,
                resize="bilinear")
  for crop in (0.0, 0.9):
    config.random_resized_crop = crop
    data = labelled.ImageSet(config).pipelines(batch_size=2, eval_batch_size=2, seed=0)
    data.train.open()
    batch = data.train.batch(0)["image"]
    assert batch.shape == (2, 32, 34, 3)
    np.testing.assert_allclose(batch[:, :, :10], 1)  # white shows through on the left
    assert (batch[:, :, -5:] < 1).any(axis=(1, 2, 3)).all()


def test_scenes_prepared_from_the_same_packages(packages, tmp_path, monkeypatch):
  monkeypatch.setattr(emoji_scenes, "SCENES", {"train": 12, "validation": 3, "test": 4})
  path = prepare.prepare("emoji_scenes", tmp_path / "tfds", packages)
  assert path == tmp_path / "tfds" / "emoji_scenes" / "1.0.0"
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  dataset = sources.open_dataset("emoji_scenes")
  found = emoji.parse_names(NAMES)
  parts = emoji.split(found, [picture(one.name) for one in found])
  group = {emoji.spell(one.codepoints): emoji.GROUPS.index(one.group) for one in found}
  for split, indices in parts.items():
    records = dataset.records(split)
    assert len(records) == emoji_scenes.SCENES[split]
    allowed = {emoji.spell(found[i].codepoints) for i in indices}
    for record in records[range(len(records))]:
      pixels, classes = (decode.decode_image(record[name][0], channels) for name, channels in
                         (("image", 3), ("segmentation", 1)))
      assert pixels.shape == (96, 96, 3) and classes.shape == (96, 96, 1)
      codes = [codes.decode() for codes in record["objects/codepoints"]]
      assert 2 <= len(codes) <= 6 and set(codes) <= allowed
      assert [group[code] for code in codes] == list(record["objects/label"])
      assert set(np.unique(classes)) == {0, *(label + 1 for label in record["objects/label"])}
      boxes = np.round(96 * np.reshape(record["objects/bbox"], (-1, 4))).astype(int)  # y0, x0, y1, x1
      assert set(boxes[:, 2] - boxes[:, 0]) <= set(range(16, 45))
      inside = np.zeros((96, 96), bool)
      for (y0, x0, y1, x1), label in zip(boxes, record["objects/label"]):
        inside[y0:y1, x0:x1] = True
        own = classes[y0:y1, x0:x1, 0] == label + 1  # of pictures that fill a rectangle
        assert own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any()
      assert not classes[~inside].any()


def test_missing_packages_give_the_line_to_run(packages, tmp_path):
  next(packages.iterdir()).unlink()
  with pytest.raises(UserError) as error:
    prepare.prepare("emoji", tmp_path / "tfds", packages)
  assert "lacks" in str(error.value) and "apt-get install fonts-noto-color-emoji unicode-data" in str(error.value)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="its version is 1.0.0"):
    prepare.prepare("emoji:2.0.0", tmp_path / "tfds", packages)
  path = next(packages.iterdir())
  with pytest.raises(ValueError, match="no Debian package that holds"):
    emoji.read_package(path, "usr/share/other")
  path.write_bytes(b"no archive")
  with pytest.raises(ValueError, match="no Debian package"):
    emoji.read_package(path, emoji.FONT)


def test_other_files_than_debians_count_as_not_installed(tmp_path):
  for path in emoji.SHA256:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"another version")
  assert not emoji.installed(tmp_path)
  assert not emoji.installed(tmp_path / "nothing")


@pytest.mark.skipif(not emoji.installed(), reason="needs Debian 12's fonts-noto-color-emoji and unicode-data")
def test_the_real_font_has_all_emoji():
  font = emoji.Font(open(f"/{emoji.FONT}", "rb").read())
  found = emoji.parse_names(open(f"/{emoji.NAMES}", encoding="utf-8").read())
  pictures = [font.bitmap(one.codepoints) for one in found]
  assert len(found) == 3655 and None not in pictures
  parts = emoji.split(found, pictures)
  assert {name: len(part) for name, part in parts.items()} == {"train": 2702, "validation": 384, "test": 569}
  assert {one.group for one in found} == set(emoji.GROUPS)
