"""Finding prepared sets, and the digits."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dljax.data import sources
from dljax.data.image import labelled
from dljax.errors import RunError, UserError


def read(name, split):
  records = sources.open_dataset(name).records(split)
  records = records[range(len(records))]
  examples = [labelled.decode_record(record, 1) for record in records]
  images, labels = (np.array([example[key] for example in examples]) for key in ("image", "label"))
  return images[..., 0], labels, np.array([record["id"][0] for record in records])


@pytest.mark.parametrize("config", ["stratified", "by_writer"])
def test_digits_are_scikit_learns(digits, config):
  from sklearn.datasets import load_digits

  original = load_digits()
  parts = {split: read(f"digits/{config}", split) for split in ("train", "validation", "test")}
  assert [len(parts[split][1]) for split in parts] == [1293, 144, 360]
  ids = np.concatenate([part[2] for part in parts.values()])
  assert sorted(ids) == list(range(1797))  # disjoint, and nothing is missing
  for pixels, labels, ids in parts.values():
    np.testing.assert_array_equal(np.round(pixels.astype(float) * 16 / 255), original.images[ids])
    np.testing.assert_array_equal(labels, original.target[ids])
  if config == "stratified":
    everywhere = np.bincount(original.target) / 1797
    for _, labels, _ in parts.values():
      assert abs(np.bincount(labels) - everywhere * len(labels)).max() <= 1
  else:
    assert sorted(parts["test"][2]) == list(range(1437, 1797))
    assert sorted(parts["validation"][2]) == list(range(1293, 1437))


def test_default_config_of_digits_is_stratified(digits):
  assert sources.open_dataset("digits").builder.info.full_name == "digits/stratified/1.0.0"
  assert sources.open_dataset("digits:1.0.0").builder.info.full_name == "digits/stratified/1.0.0"
  assert sources.open_dataset("digits/by_writer").builder.info.full_name == "digits/by_writer/1.0.0"


def test_two_processes_may_prepare_the_same_set_at_once(tmp_path):
  code = "from dljax.data import sources; print(len(sources.open_dataset('digits').records('test')))"
  environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "new" / "folder")}
  processes = [
      subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
      for _ in range(2)]
  assert [process.communicate()[0].strip() for process in processes] == ["360", "360"]
  assert [process.returncode for process in processes] == [0, 0]
  folder = tmp_path / "new" / "folder" / "digits" / "stratified"
  assert [path.name for path in folder.iterdir()] == ["1.0.0"]  # nothing half-made is left


def test_losing_the_race_is_no_error(digits_dir, tmp_path):
  class Slow:
    """A builder whose directory appears while it works."""

    def __init__(self, data_dir):
      self.data_path = tmp_path / "digits"

    def download_and_prepare(self, file_format):
      if digits_dir is not None:
        shutil.copytree(digits_dir / "digits" / "stratified" / "1.0.0", self.data_path)
      raise OSError("Directory not empty")

  sources.build(Slow, tmp_path)
  shutil.rmtree(tmp_path / "digits")
  digits_dir = None
  with pytest.raises(RunError, match="digits was not written: Directory not empty"):
    sources.build(Slow, tmp_path)


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "1.0.0 was not written: No space left on device"),
    (RuntimeError("Failed to finalize:\n write() failed"), "1.0.0 was not written: Failed to finalize: write() failed")])
def test_a_full_disk_is_one_line_and_what_killed_processes_left_is_removed(tmp_path, error, said):
  class Full:
    """A builder that a full disk stops."""

    def __init__(self, data_dir):
      self.data_path = tmp_path / "digits" / "1.0.0"

    def download_and_prepare(self, file_format):
      assert not list(self.data_path.parent.iterdir())
      raise error

  (tmp_path / "digits" / "incomplete.AB12_1.0.0").mkdir(parents=True)
  with pytest.raises(RunError) as raised:
    sources.build(Full, tmp_path)
  assert str(raised.value).endswith(said) and "\n" not in str(raised.value)


def test_read_only_data_dir_falls_back_to_the_cache(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("in the way")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file" / "tfds"))  # cannot be created, even by root
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  first = sources.open_dataset("digits").builder.data_dir
  assert str(first).startswith(str(tmp_path / "cache"))
  assert sources.open_dataset("digits").builder.data_dir == first


def test_nowhere_to_write_is_one_line_that_says_what_to_name(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("in the way")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file" / "tfds"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
  with pytest.raises(UserError, match="--data_dir.*file/tfds.*file/cache.*TFDS_DATA_DIR") as error:
    sources.open_dataset("digits")
  assert "\n" not in str(error.value)


def copy_as(name, digits_dir, tmp_path, monkeypatch):
  """The prepared digits under another name, as if TFDS had made them."""
  folder = tmp_path / name / "1.0.0"
  shutil.copytree(digits_dir / "digits" / "stratified" / "1.0.0", folder)
  for path in list(folder.iterdir()):
    path.rename(folder / path.name.replace("digits-", f"{name}-"))
  info = json.loads((folder / "dataset_info.json").read_text())
  info.update(name=name, moduleName="__main__")
  info.pop("configName", None)
  (folder / "dataset_info.json").write_text(json.dumps(info))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  return folder


def test_a_prepared_set_needs_no_code(digits_dir, tmp_path, monkeypatch):
  folder = copy_as("somebodys", digits_dir, tmp_path, monkeypatch)
  assert len(sources.open_dataset("somebodys").records("train")) == 1293
  (folder / "label.labels.txt").unlink()  # as in sets that were prepared without names
  assert sources.open_dataset("somebodys").features["label"].names == [str(d) for d in range(10)]
  shutil.copytree(folder, folder.with_name("10.0.0"))
  assert sources.find("somebodys", tmp_path).name == "10.0.0"  # newest by number, not by letter
  assert sources.find("somebodys:1.0.0", tmp_path).name == "1.0.0"


def test_damaged_and_foreign_directories_are_named(digits_dir, tmp_path, monkeypatch):
  folder = copy_as("broken", digits_dir, tmp_path, monkeypatch)
  info = folder / "dataset_info.json"
  good = info.read_text()
  for bad in (good[:100], "", "[]"):
    info.write_text(bad)
    with pytest.raises(UserError, match=f"{folder}: not a readable TFDS directory.*prepare broken"):
      sources.open_dataset("broken")
  info.write_text(good.replace("array_record", "tfrecord"))
  with pytest.raises(UserError, match="only TensorFlow reads"):
    sources.open_dataset("broken").records("train")


def test_configs_have_to_be_chosen(digits_dir, tmp_path, monkeypatch):
  shutil.copytree(digits_dir / "digits", tmp_path / "pair")
  shutil.rmtree(tmp_path / "pair" / ".config")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(UserError, match="choose pair/by_writer or pair/stratified"):
    sources.open_dataset("pair")


def test_the_newest_version_is_the_largest_number(tmp_path):
  for version in ("9.0.0", "10.0.0", "2.11.3"):
    (tmp_path / "set" / version).mkdir(parents=True)
    (tmp_path / "set" / version / "features.json").touch()
  (tmp_path / "set" / "11.0.0").mkdir()  # was not finished
  assert sources.find("set", tmp_path).name == "10.0.0"
  assert sources.find("set:9.0.0", tmp_path).name == "9.0.0"
  assert sources.find("set:1.0.0", tmp_path) is None


EVIL = "evil_module_of_a_data_set"


def _spoil(folder, file, find, put):
  text = (folder / file).read_text()
  assert find in text
  (folder / file).write_text(text.replace(find, put, 1))


@pytest.mark.parametrize("find, put", [
    ("tensorflow_datasets.core.features.features_dict.FeaturesDict", f"{EVIL}.X"),
    ("tensorflow_datasets.core.features.class_label_feature.ClassLabel", f"{EVIL}.X"),
    ("tensorflow_datasets.core.features.class_label_feature.ClassLabel",
     "tensorflow_datasets.scripts.documentation.doc_utils.X"),
    ('"featuresDict"', '"type": "%s.X", "content": {}, "featuresDict"' % EVIL),  # as older versions wrote it
    ('"classLabel": {\n                    "numClasses": "10"\n                }',
     '"jsonFeature": {"json": "{\\"feature\\": {\\"type\\": \\"%s.X\\", \\"content\\": {}}}"}' % EVIL),
])
def test_features_json_imports_no_code(digits_dir, tmp_path, monkeypatch, find, put):
  folder = copy_as("strange", digits_dir, tmp_path, monkeypatch)
  (tmp_path / f"{EVIL}.py").write_text("raise SystemExit('it ran')")
  monkeypatch.syspath_prepend(tmp_path)
  if "jsonFeature" in put:
    _spoil(folder, "features.json", "class_label_feature.ClassLabel", "sequence_feature.Sequence")
  _spoil(folder, "features.json", find, put)
  before = set(sys.modules)
  with pytest.raises(UserError, match="what is no feature of TFDS"):
    sources.open_dataset("strange")
  assert not [name for name in set(sys.modules) - before if EVIL in name or "scripts" in name]


@pytest.mark.parametrize("file, find, put, reason", [
    ("dataset_info.json", "{DATASET}-{SPLIT}", "../{DATASET}-{SPLIT}", "names a file elsewhere"),
    ("dataset_info.json", "{DATASET}-{SPLIT}", "/etc/{DATASET}-{SPLIT}", "names a file elsewhere"),
    ("dataset_info.json", '"144"', '"0"', "counts no records"),
    ("dataset_info.json", '"144"', '"-144"', "counts no records"),
    ("features.json", '"numClasses": "10"', '"numClasses": "1000000000000"', "1,000,000,000,000 classes"),
    ("features.json", "{", "[" * 10_000, "not a readable TFDS directory"),
])
def test_metadata_that_lead_elsewhere_or_fill_the_memory_are_refused(
    digits_dir, tmp_path, monkeypatch, file, find, put, reason):
  folder = copy_as("strange", digits_dir, tmp_path, monkeypatch)
  (folder / "label.labels.txt").unlink()
  _spoil(folder, file, find, put)
  with pytest.raises(UserError, match=f"{folder}: .*{reason}.*prepare strange") as error:
    sources.open_dataset("strange")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"default_config_name": "../../elsewhere"}',
                                  '{"default_config_name": 5}', '{"default_config_name": ".."}'])
def test_a_damaged_note_of_the_default_config_is_named(digits_dir, tmp_path, text):
  (tmp_path / "digits" / ".config").mkdir(parents=True)
  note = tmp_path / "digits" / ".config" / "metadata.json"
  note.write_text(text)
  with pytest.raises(UserError, match=f"{note} names no config"):
    sources.find("digits", tmp_path)


@pytest.mark.parametrize("name", ["digits/..", "digits/.", "../digits", "digits/../..:1.0.0", "digits\n", "/digits"])
def test_a_name_that_leads_elsewhere_is_no_name(tmp_path, name):
  with pytest.raises(UserError, match="is not a TFDS name"):
    sources.find(name, tmp_path)


def _files(folder):
  return sorted(folder.glob("*-train.array_record*"))


@pytest.mark.parametrize("place", [1000, 70_000])
def test_a_flipped_bit_in_a_record_is_one_line_that_names_it(digits_dir, tmp_path, monkeypatch, place):
  folder = copy_as("flipped", digits_dir, tmp_path, monkeypatch)
  file, = _files(folder)
  data = bytearray(file.read_bytes())
  data[place] ^= 1
  file.write_bytes(data)
  with pytest.raises(UserError, match=f"{folder}: not a readable TFDS directory.*prepare flipped") as error:
    records = sources.open_dataset("flipped").records("train")
    records[range(len(records))]
  assert "\n" not in str(error.value)
  if place == 1000:
    assert re.search(r"train: example \d+ is damaged", str(error.value))


def test_files_that_are_cut_missing_or_of_another_length_are_named(digits_dir, tmp_path, monkeypatch):
  folder = copy_as("cut", digits_dir, tmp_path, monkeypatch)
  file, = _files(folder)
  whole = file.read_bytes()
  for data in (whole[:-5000], whole[:100], b""):
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{folder}: not a readable TFDS directory"):
      sources.open_dataset("cut").records("train")
  file.unlink()
  with pytest.raises(UserError, match=f"there is no {file.name}"):
    sources.open_dataset("cut").records("train")
  file.write_bytes(whole)
  assert len(sources.open_dataset("cut").records("train")) == 1293
  _spoil(folder, "dataset_info.json", '"1293"', '"1292"')
  with pytest.raises(UserError, match="holds 1293 records, and dataset_info.json counts 1292"):
    sources.open_dataset("cut").records("train")


def test_a_field_that_a_record_lacks_is_named(digits):
  records = sources.open_dataset("digits").records("train")
  with pytest.raises(UserError, match="example 7 has no field 'sound'"):
    records[[7]][0]["sound"]
