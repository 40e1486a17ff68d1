"""The announcements: what is said, that nothing leaks between splits, and packages that are missing.

The packages here are made by hand; where Debian's are installed, the real ones are prepared too.
"""

import gzip
import hashlib
import io
import itertools
import tarfile

import numpy as np
import pytest
import scipy.io.wavfile

from dljax.data import prepare, sources
from dljax.data.datasets import debian, telephone_prompts
from dljax.errors import UserError

TEXT = """\
; Core Asterisk Sounds in English

vm-login: Comedian Mail.  Mailbox?
vm-incorrect-mailbox: Login incorrect.  Mailbox?
vm-incorrect: Login incorrect.
auth-incorrect: Password incorrect.  Please enter your password followed by the pound key.
digits/a-m: A.M.
digits/oclock: o'clock
spy-h323: H.323
dictate/both_help: press * to toggle pause, press # to enter a new dictation filename
letters/at: at [@]
spy-iax2: IAX (note: does not say "2")
confbridge-leave-in: To leave the conference...
confbridge-leave-out: ...to leave the conference.
beep: [this is a simple beep tone]
silence/1: (1 second of silence)
confbridge-join: <beep ascending>
demo-instruct: To execute an echo test dial 600.
demo-moreinfo: Visit www.asterisk.org.
de-activated: De-activated.
vm-Urgent: urgent
"""


@pytest.mark.parametrize("name, said", [
    ("vm-login", ["comedian mail", "mailbox"]), ("digits/a-m", ["a m"]), ("digits/oclock", ["o'clock"]),
    ("spy-h323", ["h three two three"]), ("letters/at", ["at"]), ("spy-iax2", ["iax"]),
    ("de-activated", ["de activated"]),
    ("dictate/both_help", ["press star to toggle pause press pound to enter a new dictation filename"]),
    ("demo-moreinfo", ["visit w w w dot asterisk dot org"]), ("confbridge-leave-in", ["to leave the conference"])])
def test_transcripts_are_what_is_said(name, said):
  assert telephone_prompts.parse_transcripts(TEXT)[name] == said


def test_what_is_no_speech_is_left_out():
  found = telephone_prompts.parse_transcripts(TEXT)
  assert len(found) == 15
  assert not {"beep", "silence/1", "confbridge-join", "demo-instruct"} & set(found)


def test_no_sentence_is_in_two_splits():
  said = {f"r{i}": [f"sentence {i // 2}", f"other {i // 5}"] for i in range(400)}
  parts = telephone_prompts.split(said)
  assert sorted(itertools.chain(*parts.values())) == sorted(said)
  of = {part: {sentence for name in names for sentence in said[name]} for part, names in parts.items()}
  assert not any(one & other for one, other in itertools.combinations(of.values(), 2))
  assert 60 <= len(parts["test"]) <= 70 and 40 <= len(parts["validation"]) <= 50
  assert parts == telephone_prompts.split(dict(reversed(said.items())))
  huge = {name: ["the same", *sentences] if int(name[1:]) < 50 else sentences for name, sentences in said.items()}
  assert "r0" in telephone_prompts.split(huge)["train"]


def package(files) -> bytes:
  """A Debian package of files."""
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode="w:xz") as tar:
    for name, content in files.items():
      entry = tarfile.TarInfo(f"./{name}")
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))
  out = b"!<arch>\n"
  for name, content in (("debian-binary", b"2.0\n"), ("data.tar.xz", archive.getvalue())):
    out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (
        len(content) % 2)
  return out


def wav(number) -> bytes:
  file = io.BytesIO()
  scipy.io.wavfile.write(file, 8000, np.full(80, number, np.int16))
  return file.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
  """A folder with the packages that hold TEXT and a recording for each line, and their checksums in place."""
  names = [line.partition(":")[0] for line in TEXT.splitlines()[2:]]
  contents = [{f"{telephone_prompts.FOLDER}/{name}.wav": wav(i) for i, name in enumerate(names)},
              {telephone_prompts.TRANSCRIPTS: gzip.compress(TEXT.encode())}]
  infos = dict(telephone_prompts.TelephonePrompts.url_infos)
  folder = tmp_path / "packages"
  folder.mkdir()
  for url, files in zip(telephone_prompts.PACKAGES, contents):
    data = package(files)
    (folder / url.rpartition("/")[2]).write_bytes(data)
    infos[url] = type(infos[url])(
        size=len(data), checksum=hashlib.sha256(data).hexdigest(), filename=infos[url].filename)
  monkeypatch.setattr(telephone_prompts.TelephonePrompts, "url_infos", infos)
  monkeypatch.setattr(telephone_prompts, "installed", lambda: False)
  monkeypatch.setattr(telephone_prompts, "SHARES", {"test": 0.3, "validation": 0.3})
  monkeypatch.setattr(telephone_prompts, "LARGE", 1)
  return folder


def test_prepared_from_packages(packages, tmp_path, monkeypatch):
  prepare.prepare("telephone_prompts", tmp_path / "tfds", packages)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  dataset = sources.open_dataset("telephone_prompts")
  names = [line.partition(":")[0] for line in TEXT.splitlines()[2:]]
  said = telephone_prompts.parse_transcripts(TEXT)
  found = {}
  for split in ("train", "validation", "test"):
    records = dataset.records(split)
    found |= {record["name"][0].decode(): record for record in records[range(len(records))]}
  assert found.keys() == said.keys()
  for name, record in found.items():
    assert record["text"][0].decode() == " ".join(said[name])
    assert record["audio"][0] == wav(names.index(name))


def test_missing_packages_give_the_line_to_run(packages, tmp_path, monkeypatch):
  next(packages.glob("*wav*")).unlink()
  with pytest.raises(UserError) as error:
    prepare.prepare("telephone_prompts", tmp_path / "tfds", packages)
  assert "lacks asterisk-core-sounds-en-wav" in str(error.value)
  assert "apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en" in str(error.value)
  assert "\n" not in str(error.value)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  with pytest.raises(UserError, match="python -m dljax.data.prepare telephone_prompts"):
    sources.open_dataset("telephone_prompts")


def test_files_of_a_package(tmp_path):
  path = tmp_path / "a.deb"
  path.write_bytes(package({"usr/a": b"1", "usr/b": b"22"}))
  assert dict(debian.files(path)) == {"usr/a": b"1", "usr/b": b"22"}
  assert debian.read_package(path, "usr/b") == b"22"
  path.write_bytes(b"no archive")
  with pytest.raises(ValueError, match="no Debian package"):
    list(debian.files(path))


def test_other_transcripts_than_debians_count_as_not_installed(tmp_path):
  (tmp_path / telephone_prompts.FOLDER).mkdir(parents=True)
  assert not telephone_prompts.installed(tmp_path)
  text = tmp_path / telephone_prompts.TRANSCRIPTS
  text.parent.mkdir(parents=True)
  text.write_bytes(gzip.compress(b"another version"))
  assert not telephone_prompts.installed(tmp_path)


@pytest.mark.skipif(not telephone_prompts.installed(),
                    reason="needs Debian 12's asterisk-core-sounds-en-wav and asterisk-core-sounds-en")
def test_the_real_packages(tmp_path):
  path = prepare.prepare("telephone_prompts", tmp_path)
  import tensorflow_datasets as tfds

  splits = tfds.builder_from_directory(path).info.splits
  assert {name: split.num_examples for name, split in splits.items()} == {"train": 410, "validation": 56, "test": 84}
