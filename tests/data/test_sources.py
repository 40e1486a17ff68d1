"""Finding prepared sets, and the digits."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dljax.data import sources
from dljax.data.image import labelled
from dljax.errors import UserError


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
  with pytest.raises(OSError):
    sources.build(Slow, tmp_path)


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
