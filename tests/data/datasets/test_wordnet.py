"""WordNet's glosses: how a data file is read, that nothing leaks between splits, and a package that is missing.

The files here are made by hand; where Debian's are installed, the real ones are prepared too.
"""

import hashlib
import io
import tarfile

import pytest

from dljax.data import prepare, sources
from dljax.data.datasets import wordnet
from dljax.data.text import labelled
from dljax.errors import UserError

LICENSE = "  1 This software and database is being provided to you, the LICENSEE, by  \n  2 Princeton University | x\n"
NOUN = ("00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which is perceived  \n"
        "02084071 05 n 02 dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a domestic animal; \"the dog | barked\"  \n"
        "15297472 28 n 01 sleep 3 000 | a period of time spent sleeping  \n")
VERB = "00001740 29 v 01 breathe 0 001 * 00005041 v 0000 02 + 02 00 + 08 00 | draw air into, and expel out of, the lungs  \n"


def test_lines_are_glosses_with_their_class():
  found = wordnet.parse(LICENSE + NOUN)
  assert found == [("n00001740", "that which is perceived", 0),
                   ("n02084071", "a domestic animal; \"the dog | barked\"", 2),
                   ("n15297472", "a period of time spent sleeping", 25)]
  assert [wordnet.CLASSES[gloss.label] for gloss in found] == ["Tops", "animal", "time"]
  assert wordnet.parse(VERB) == [("v00001740", "draw air into, and expel out of, the lungs", -1)]
  assert len(wordnet.CLASSES) == 26


@pytest.mark.parametrize("line", ["00001740 03 x 01 entity 0 000 | text", "a line", "00001740 03 n 01 entity 0 000"])
def test_a_file_that_is_no_data_file_is_named_by_its_line(line):
  with pytest.raises(ValueError, match="line 3 is none of a data file of WordNet"):
    wordnet.parse(LICENSE + line)


def test_equal_glosses_are_in_one_split_and_those_held_out_are_in_no_other():
  texts = [f"gloss {i}" for i in range(2000)]
  glosses = [wordnet.Gloss(f"n{i}", text, i % 26) for i, text in enumerate(texts)]
  glosses += [wordnet.Gloss(f"n{i}b", text, 0) for i, text in enumerate(texts[:300])]
  glosses += [wordnet.Gloss(f"v{i}", text, -1) for i, text in enumerate([*texts, "only of a verb"])]
  found = wordnet.split(glosses)
  text_of = {name: {gloss.text for gloss in part} for name, part in found.items()}
  for one in ("train", "validation", "test"):
    assert not any(text_of[one] & text_of[other] for other in {"train", "validation", "test"} - {one})
    assert {gloss.label for gloss in found[one]} == set(range(26))
  assert not text_of["other"] & (text_of["validation"] | text_of["test"])
  assert text_of["other"] == text_of["train"] | {"only of a verb"}
  assert {gloss.label for gloss in found["other"]} == {-1}
  for name in ("validation", "test"):
    assert 0.08 < len(text_of[name]) / len(texts) < 0.12
  assert sum(len(found[name]) for name in ("train", "validation", "test")) == 2300


def _package(path, files):
  """A Debian package: an `ar` archive that holds data.tar.xz."""
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode="w:xz") as archive:
    for name, text in files.items():
      entry = tarfile.TarInfo(f"./{wordnet.FOLDER}/{name}")
      entry.size = len(text)
      archive.addfile(entry, io.BytesIO(text.encode()))
  data = content.getvalue()
  header = f"{'data.tar.xz':16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
  path.write_bytes(b"!<arch>\n" + header.encode() + data + b"\n" * (len(data) % 2))


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A folder with a package of a few hundred glosses, whose checksum is the expected one."""
  files = dict.fromkeys(wordnet.SHA256, LICENSE)
  files["data.noun"] += "".join(f"{i:08} {3 + i % 26:02} n 01 word 0 000 | noun gloss {i}  \n" for i in range(400))
  files["data.verb"] += VERB
  (tmp_path / "files").mkdir()
  path = tmp_path / "files" / wordnet.PACKAGE.rpartition("/")[2]
  _package(path, files)
  infos = {wordnet.PACKAGE: type(wordnet.Wordnet.url_infos[wordnet.PACKAGE])(
      size=path.stat().st_size, checksum=hashlib.sha256(path.read_bytes()).hexdigest(), filename=path.name)}
  monkeypatch.setattr(wordnet.Wordnet, "url_infos", infos)
  return path


def test_a_package_at_hand_is_prepared_and_read(package, tmp_path, monkeypatch):
  root = tmp_path / "tfds"
  prepare.prepare("wordnet", root, package.parent)
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  dataset = sources.open_dataset("wordnet")
  assert len(dataset.records("other")) == 1
  config = labelled.default_config()
  config.update({"name": "wordnet", "num_classes": 26, "length": 32})
  data = labelled.LabelledTexts(config).pipelines(batch_size=4, eval_batch_size=8, seed=0)
  pipeline = data.evals["test"]
  pipeline.open()
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    for tokens, n, label, mask in zip(batch["tokens"], batch["length"], batch["label"], batch["mask"]):
      if mask:
        text = bytes(tokens[1:n - 1].tolist()).decode()
        assert text.startswith("noun gloss ") and int(text.split()[-1]) % 26 == label
        assert wordnet.draw_split(text) == "test"
  assert data.assets()["classes"] == list(wordnet.CLASSES)
  config.train = "train+other"
  with pytest.raises(UserError, match="has the label -1, outside of 0 to 25; choose a split with labels"):
    labelled.LabelledTexts(config).pipelines(batch_size=4, eval_batch_size=8, seed=0).train.open()


def test_other_files_are_not_taken_for_the_installed_ones(tmp_path):
  (tmp_path / wordnet.FOLDER).mkdir(parents=True)
  for name in wordnet.SHA256:
    (tmp_path / wordnet.FOLDER / name).write_text(LICENSE)
  assert not wordnet.installed(tmp_path)


def test_a_package_that_is_missing_is_named(tmp_path):
  with pytest.raises(UserError, match=(r"--manual_dir: .* lacks wordnet-base_3.0-37_all.deb; get it from .*; on Debian 12 "
                                       "`apt-get install wordnet-base` provides them too")):
    prepare.prepare("wordnet", tmp_path / "tfds", tmp_path)


@pytest.mark.skipif(not wordnet.installed(), reason="the package wordnet-base is not installed")
def test_the_installed_files_are_what_the_docstring_says():
  glosses = [gloss for name in wordnet.SHA256
             for gloss in wordnet.parse((wordnet.Path("/") / wordnet.FOLDER / name).read_text(encoding="ascii"))]
  found = wordnet.split(glosses)
  assert sum(len(found[name]) for name in ("train", "validation", "test")) == 82_115
  assert sum(gloss.label < 0 for gloss in glosses) == 35_544
