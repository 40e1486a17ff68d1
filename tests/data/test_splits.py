"""What all modalities share: fingerprints, the set that is opened once, and the user's files."""

import os
import threading
import time

import numpy as np
import pytest

from dljax.data import sources, splits
from dljax.data.image import labelled
from dljax.data.pipeline import IndexedPipeline, InMemory
from dljax.data.series import windows
from dljax.data.text import corpus
from dljax.errors import UserError

SIZES = {"batch_size": 2, "eval_batch_size": 2, "seed": 0}


def test_a_files_fingerprint_is_its_length_and_content(tmp_path):
  path = tmp_path / "play.txt"
  for module, field in (corpus, "file"), (windows, "name"):
    config = module.default_config()
    config[field] = str(path.with_suffix(".csv") if module is windows else path)
    make = corpus.TextSet if module is corpus else windows.SeriesSet
    seen = []
    for content in (b"Speak", b"speak", b"Speak "):
      (path.with_suffix(".csv") if module is windows else path).write_bytes(content)
      data = make(config).pipelines(**SIZES)
      assert data.name == config[field]
      seen.append(data.fingerprint())
    assert len(set(seen)) == 3
    assert seen[0] == (  # as sha256sum gives it
        "5 bytes, SHA-256 cb09d412cce28fbba90874502fea7b38c3f87a944b5626c6e1217b157fba1652")


@pytest.mark.parametrize("kind", ["text", "texts", "series"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, kind):
  if kind != "series":
    path, config = tmp_path / "play.txt", corpus.default_config()
    path.write_text("Speak the speech, I pray you\n" * 20)
    if kind == "text":
      config.file = str(path)
    else:
      config.folder = str(tmp_path)
    data = corpus.TextSet(config).pipelines(**SIZES)
    data.train.open()
    with path.open("a") as play:
      play.write("trippingly on the tongue\n")
    data.evals["validation"].open()  # of the text as it was read first
    name = path if kind == "text" else tmp_path
    with pytest.raises(UserError, match=f"{name} was changed while the run read it") as error:
      data.fingerprint()
  else:
    path, config = tmp_path / "series.csv", windows.default_config()
    path.write_text("date,OT\n2016-07-01 00:00,1\n2016-07-01 01:00,2\n")
    config.name, config.channels = str(path), ("OT",)
    read = windows.table.read_csv

    def grown(*arguments):
      with path.open("a") as series:
        series.write("2016-07-01 02:00,3\n")
      return read(*arguments)

    monkeypatch.setattr(windows.table, "read_csv", grown)
    data = windows.SeriesSet(config).pipelines(**SIZES)
    with pytest.raises(UserError, match="series.csv was changed while the run read it") as error:
      data.train.open()
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="was changed"):
    data.fingerprint()


def test_a_sets_fingerprint_is_its_name_version_and_split_sizes(digits):
  data = labelled.ImageSet(digits).pipelines(**SIZES)
  assert data.name == "digits"
  name, _, sizes = data.fingerprint().partition(": ")
  assert name == sources.open_dataset("digits").builder.info.full_name and name.startswith("digits/")
  assert sizes == "test 360, train 1293, validation 144"


class _Set(splits.DataSet):

  def pipeline(self, split, **options):
    return IndexedPipeline(
        lambda _: InMemory({"x": np.zeros(8, np.float32)}),
        lambda examples, plan: examples.gather(plan, plan.rows), **options)

  def shapes(self):
    return {"x": ((), np.float32)}


def test_a_set_is_opened_and_checked_once_by_many_threads(digits, monkeypatch):
  opened, checked = [], []

  class Checked(_Set):
    def check(self, dataset):
      checked.append(dataset)

  def open_dataset(name):
    opened.append(name)
    time.sleep(0.05)  # long enough for all to arrive
    return name

  monkeypatch.setattr(sources, "open_dataset", open_dataset)
  images, found = Checked(digits), []
  threads = [threading.Thread(target=lambda: found.append(images.dataset)) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert opened == checked == ["digits"] and found == ["digits"] * 8


def test_data_has_the_splits_that_the_config_names_and_the_engines_own_fields(digits):
  data = _Set(digits).pipelines(**SIZES)
  assert list(data.evals) == ["validation", "test"] and data.assets() == {} == data.context()
  data.train.open()
  batch = data.train.batch(0)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in data.batch_spec.items()}
  digits.test = ""
  assert list(_Set(digits).pipelines(**SIZES).evals) == ["validation"]
  for sizes, field in ((0, 2), "batch_size"), ((2, -1), "eval_batch_size"):
    with pytest.raises(UserError, match=f"^--config.{field}={min(sizes)}: give a positive"):
      _Set(digits).pipelines(batch_size=sizes[0], eval_batch_size=sizes[1], seed=0)


def test_files_are_found_in_natural_order_without_hidden_ones(tmp_path):
  for name in ("10.txt", "2.TXT", "sub/1.txt", ".hidden.txt", "3.csv"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  found = splits.find_files([str(tmp_path), str(tmp_path / "3.csv")], "a file", ".txt")
  assert [str(path.relative_to(tmp_path)) for path in found] == ["2.TXT", "10.txt", "sub/1.txt", "3.csv"]
  with pytest.raises(UserError, match="^--input: there is no .*missing; name a file of text"):
    splits.find_files([str(tmp_path / "missing")], "a file of text")


def test_links_are_followed_once_and_those_that_lead_nowhere_are_found(tmp_path):
  (tmp_path / "far").mkdir()
  (tmp_path / "far" / "b.txt").touch()
  near = tmp_path / "near"
  (near / ".git").mkdir(parents=True)
  (near / ".git" / "c.txt").touch()
  for name, place in {"more": tmp_path / "far", "loop": near, "dead.txt": tmp_path / "none"}.items():
    (near / name).symlink_to(place)
  os.mkfifo(near / "pipe.txt")
  found = splits.find_files([str(near)], "a file", ".txt")
  assert [str(path.relative_to(near)) for path in found] == ["dead.txt", "more/b.txt"]
