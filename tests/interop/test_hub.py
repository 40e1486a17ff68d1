"""Nothing that the Hub answers leads out of the cache, and nothing damaged is used."""

import hashlib
import json
import urllib.error

import numpy as np
import pytest
import safetensors.numpy

from dljax import interop
from dljax.errors import UserError
from dljax.interop import hub

WEIGHTS = safetensors.numpy.save({"params/a": np.ones(3, np.float32)})
SHA256, COMMIT = hashlib.sha256(WEIGHTS).hexdigest(), "a" * 40
NAME, FILE = "hub:someone/net", "model.safetensors"


class Answers:
  """The Hub as it answers: a listing, or an error; and one file's content."""

  def __init__(self):
    self.listing, self.file, self.asked = None, WEIGHTS, []
    self.list({FILE: {}})

  def list(self, files, commit=COMMIT):
    """`files`: name -> what differs from the entry of a file with `WEIGHTS`."""
    whole = {"size": len(WEIGHTS), "lfs": {"sha256": SHA256}}
    self.listing = json.dumps({"sha": commit, "siblings": [
        {"rfilename": name, **whole, **fields} for name, fields in files.items()]}).encode()

  def get(self, url, limit):
    if isinstance(self.listing, Exception):
      raise self.listing
    return self.listing

  def fetch(self, url, path, size, *, mend):
    self.asked.append(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(self.file)


@pytest.fixture
def answers(tmp_path, monkeypatch):
  answers = Answers()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(hub.downloads, "get", answers.get)
  monkeypatch.setattr(hub.downloads, "fetch", answers.fetch)
  return answers


def _refused(name, words):
  with pytest.raises(UserError, match=words) as error:
    hub.download(name)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("file", [
    "../../../../../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "a//x.safetensors",
    "./x.safetensors", "a\\..\\x.safetensors", "a\0.safetensors", "a\nb.safetensors", "\udc80.safetensors",
    "x" * 300 + ".safetensors", "a/" * 300 + "x.safetensors"])
def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path, answers, file):
  answers.list({file: {}, "b.safetensors": {}})
  _refused(f"{NAME}/b.safetensors", "leads out of its repository")
  assert not list(tmp_path.iterdir()) and not answers.asked


@pytest.mark.parametrize("commit", ["/elsewhere", "..", "", "a/b", "A b", 5, None, ["a"], "a" * 65])
def test_a_commit_that_is_none_is_refused(tmp_path, answers, commit):
  answers.list({FILE: {}}, commit)
  _refused(NAME, "the commit .* is no hexadecimal number")
  assert not list(tmp_path.iterdir()) and not answers.asked


@pytest.mark.parametrize("name", [
    "hub:../..", "hub:../evil", "hub:./net", "hub:someone/..", "hub:.hidden/net", "hub:someone/", "hub:/etc/passwd",
    "hub:someone/" + "n" * 200, "hub:some one/net", "hub:some\none/net", "hub:sömeone/net", "hub:someone/\udc80"])
def test_a_repository_that_is_none_is_refused(tmp_path, answers, name):
  _refused(name, "write hub:OWNER/NAME")
  assert not list(tmp_path.iterdir()) and not answers.asked


def test_a_file_in_a_folder_of_its_repository_lies_in_the_cache(tmp_path, answers):
  answers.list({"a folder/ü.safetensors": {}})
  path, = hub.download(NAME)
  assert path == tmp_path / "cache/dljax/hub/someone/net" / COMMIT / "a folder/ü.safetensors"
  assert answers.asked[0].endswith(f"/someone/net/resolve/{COMMIT}/a%20folder/%C3%BC.safetensors")


@pytest.mark.parametrize("fields", [
    {"size": None}, {"size": "12"}, {"size": 0}, {"size": -1}, {"size": 1.5}, {"size": True}, {"size": 10**999},
    {"lfs": {"sha256": 5}}, {"lfs": {"sha256": "xyz"}}, {"lfs": 5}, {"lfs": [1]}, {"rfilename": 5},
    {"rfilename": ["a"]}, {"rfilename": None}])
def test_a_field_of_another_kind_is_refused_in_one_line(answers, fields):
  answers.list({FILE: fields})
  _refused(NAME, "check HF_ENDPOINT")
  assert not answers.asked


@pytest.mark.parametrize("answer", [
    b"", b"<html>", b"[]", b"{}", b"5", b"null", b"\xff\xfe", b"[" * 10_000, b'{"sha": "a", "siblings": 5}',
    b'{"sha": "a", "siblings": [5]}', b'{"sha": "a", "siblings": {"a": 1}}', b'{"sha": "a", "siblings": [{}]}',
    b'{"sha": "a", "siblings": null}', ValueError("the answer is longer")])
def test_an_answer_of_another_form_is_refused_in_one_line(answers, answer):
  answers.listing = answer
  _refused(NAME, "does not answer as the Hub does.*check HF_ENDPOINT")


def test_fields_of_files_that_are_no_weights_do_not_matter(answers):
  answers.list({FILE: {}, "a\nb.md": {"size": None}, "empty.json": {"size": 0}})
  assert [path.name for path in hub.download(NAME)] == [FILE]


@pytest.mark.parametrize("text", ['{"commit"', "{}", "[]", "", '{"commit": "a", "files": []}',
                                  '{"commit": "../..", "files": {}}', '{"commit": "a", "files": {"a": 5}}',
                                  '{"commit": "a", "files": {"../a.safetensors": {"size": 1, "sha256": null}}}'])
def test_a_damaged_listing_in_the_cache_is_named(tmp_path, answers, text):
  hub.download(NAME)
  listing = tmp_path / "cache/dljax/hub/someone/net/listing.json"
  answers.listing = urllib.error.URLError("offline")
  assert hub.download(NAME)
  listing.write_text(text)
  _refused(NAME, f"{listing}, .*is damaged.*remove it")


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["the Hub's checksum", "our own checksum"])
def test_one_flipped_bit_in_the_cache_is_found(answers, known, online):
  answers.list({FILE: {} if known else {"lfs": None}})
  path, = hub.download(NAME)
  assert interop.read(NAME)["params/a"].tolist() == [1, 1, 1]
  if not online:
    answers.listing = urllib.error.URLError("offline")
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  for damaged in (data, data[:-1], data + b"0", b""):
    path.write_bytes(damaged)
    _refused(NAME, f"{path}, .*is damaged.*remove that file")
  path.unlink()
  assert interop.read(NAME)["params/a"].tolist() == [1, 1, 1]


def test_a_download_with_another_checksum_is_removed(answers):
  answers.file = WEIGHTS[:-1] + b"0"
  _refused(NAME, "does not have the Hub's checksum and was removed")
  answers.file = WEIGHTS
  assert interop.read(NAME)["params/a"].tolist() == [1, 1, 1]


def test_one_shard_alone_is_refused_and_all_hold_each_tensor_once(answers):
  shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
  answers.list(dict.fromkeys(shards, {}))
  _refused(f"{NAME}/{shards[0]}", f"is one of 2 shards of the weights; name {NAME} if")
  with pytest.raises(UserError, match="holds params/a, which another shard holds too"):
    interop.read(NAME)
