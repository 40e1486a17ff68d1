"""The user's own data: files in natural order, splits by the seed, tables, and their faults."""

import os
from collections import Counter
from pathlib import Path

import pytest

from dljax.data import own
from dljax.errors import UserError

PNG = (".png",)


def _write(path: Path, content: bytes | str = b"x") -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return path


def test_files_are_found_in_natural_order_without_hidden_ones(tmp_path):
  for name in ("b/10.png", "b/2.PNG", "a/x.png", "a/notes.txt", ".git/y.png", "a/.z.png"):
    _write(tmp_path / name)
  (tmp_path / "c").symlink_to(tmp_path / "b")
  (tmp_path / "b" / "loop").symlink_to(tmp_path)  # is not followed for ever
  found = own.find(tmp_path, PNG, "--config.data.folder")
  assert [f for f in found.files if f[0] in "ab"] == ["a/x.png", "b/2.PNG", "b/10.png"]
  assert found.others == ("a/notes.txt",)
  with pytest.raises(UserError, match="--config.data.folder=.*no: there is no such folder"):
    own.find(tmp_path / "no", PNG, "--config.data.folder")


def test_a_name_that_is_no_utf8_can_be_shown():
  assert own.show(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
  assert own.some([os.fsdecode(b"\xe9"), "b", "c", "d", "e"]) == r"\xe9, b, c and 2 more"


def test_folders_and_cells_name_splits(tmp_path):
  for name in ("Train", "val", "other"):
    (tmp_path / name).mkdir()
  assert own.split_folders(tmp_path) == {"train": "Train", "validation": "val"}
  assert own.split_name(" Testing ") == "test" and own.split_name("cats") is None
  (tmp_path / "dev").mkdir()
  with pytest.raises(UserError, match="the folders dev and val are both for validation"):
    own.split_folders(tmp_path)
  (tmp_path / "Train").rmdir()
  (tmp_path / "dev").rmdir()
  assert own.split_folders(tmp_path) == {}  # val is a class like any other


def test_a_split_has_its_share_of_every_stratum_and_depends_on_the_seed_alone():
  keys = [f"image {i}" for i in range(120)]
  strata = ["rare"] * 20 + ["common"] * 100
  parts = own.split(keys, (0.7, 0.2, 0.1), 3, strata)
  assert Counter(zip(strata, parts)) == {
      ("rare", "train"): 14, ("rare", "validation"): 4, ("rare", "test"): 2,
      ("common", "train"): 70, ("common", "validation"): 20, ("common", "test"): 10}
  backwards = own.split(keys[::-1], (0.7, 0.2, 0.1), 3, strata[::-1])
  assert backwards == parts[::-1]
  assert own.split(keys, (0.7, 0.2, 0.1), 4, strata) != parts
  assert set(own.split(keys, (0.5, 0, 0.5), 3)) == {"train", "test"}


def test_every_split_gets_an_example_of_a_small_stratum_and_twins_stay_together():
  assert sorted(own.split(["a", "b", "c"], own.SHARES, 0)) == ["test", "train", "validation"]
  twins = own.split(["a", "b", "c", "a", "b", "a"], own.SHARES, 0)
  assert twins[0] == twins[3] == twins[5] and twins[1] == twins[4] and len(set(twins)) == 3
  with pytest.raises(UserError, match="there are only 2 cats, too few for train and validation "
                                      "and test; add more, or give other --config.data.shares"):
    own.split(["a", "b", "a"], own.SHARES, 0, ["cat"] * 3, lambda stratum: f"{stratum}s")


@pytest.mark.parametrize("shares", [
    (0.5, 0.5), (0.5, 0.2, 0.2), (0, 0.5, 0.5), (1.5, -0.5, 0), (float("nan"), 0, 0)])
def test_shares_are_three_parts_of_one(shares):
  with pytest.raises(UserError, match="--config.data.shares=.*add up to 1"):
    own.check_shares(shares)


def test_a_fingerprint_holds_names_lengths_contents_and_labels(tmp_path):
  a, b = _write(tmp_path / "a.png", b"1"), _write(tmp_path / "b.png", b"23")
  digests = own.digests([a, b])
  assert digests[0] == own.Digest(  # as sha256sum gives it
      1, "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b")
  first = own.fingerprint(["a.png", "b.png"], digests)
  assert first.startswith("2 files of 3 bytes, SHA-256 ")
  assert own.fingerprint(["b.png", "a.png"], digests[::-1]) == first
  other = [own.fingerprint(["a.png", "c.png"], digests), own.fingerprint(["a.png"], digests[:1]),
           own.fingerprint(["a.png", "b.png"], digests, "cat,dog"),
           own.fingerprint(["a.png", "b.png"], digests[::-1])]
  assert len({first, *other}) == 5
  with pytest.raises(UserError, match="no.png cannot be read"):
    own.digests([tmp_path / "no.png"])


def test_names_that_look_alike_are_found():
  assert own.clash(["cat", "dog"]) is None
  assert own.clash(["cat", "Cat"]) == ("cat", "Cat", "case")
  assert own.clash(["e\u0301", "x", "\u00e9"]) == ("e\u0301", "\u00e9", "Unicode normalisation")


def test_a_table_has_named_columns_and_numbered_lines(tmp_path):
  path = _write(tmp_path / "t.csv", "\ufefffile; label\n\n1.png;\"a;b\"\n 2.png ; c \n")
  table = own.read_table(path, "--f")
  assert table.columns == ("file", "label")
  assert table.column("label", "--c") == ["a;b", "c"]
  assert table.where(1) == f"{path}, line 4"
  with pytest.raises(UserError, match="--c=lable: .*did you mean label"):
    table.column("lable", "--c")
  path = _write(tmp_path / "metadata.csv", 'LJ1|He said "so|he said\nLJ2|b|b\n')
  table = own.read_table(path, "--f", columns=("file", "raw", "text"), quotes=False)
  assert table.rows[0] == ("LJ1", 'He said "so', "he said") and table.lines == (1, 2)


@pytest.mark.parametrize("content, message", [
    (b"a,b\n1\n", "line 2: has 1 cells, but there are 2 columns"),
    (b"a,a\n1,2\n", "2 columns are called 'a'"), (b"a,b\n", "holds no rows"), (b"", "holds no rows"),
    (b"a,b\n\xff,1\n", r"is not UTF-8 \(byte 4\)"), (b'a,b\n"1,2\n', "is no row of a table"),
    (b"a,b\n" + b"x" * 200_000 + b",1\n", "is no row of a table")])
def test_a_table_of_another_form_is_refused_by_line(tmp_path, content, message):
  with pytest.raises(UserError, match=message):
    own.read_table(_write(tmp_path / "t.csv", content), "--config.data.folder")


def test_a_large_or_missing_table_is_refused(tmp_path, monkeypatch):
  path = _write(tmp_path / "t.csv", "a,b\n1,2\n")
  monkeypatch.setattr(own, "MAX_TABLE", 7)
  with pytest.raises(UserError, match="t.csv has 8 bytes; give at most 7"):
    own.read_table(path, "--f")
  for missing in (tmp_path / "no.csv", tmp_path, "a\0b"):
    with pytest.raises(UserError, match="--f=.*(cannot be read|is no file)"):
      own.read_table(missing, "--f")


def test_a_dataset_reads_its_examples_by_number(tmp_path):
  files = [_write(tmp_path / f"{i}.png", str(i)) for i in range(3)]
  dataset = own.Dataset(
      "photos", {"image": own.Image((None, None, 3))}, "", {"train": files, "test": []},
      lambda file: {"image": [file.read_bytes()]}, str)
  assert dataset.ranges("train", "train") == [("train", 0, 3)]
  assert dataset.records("train")[[2, 0]] == [{"image": [b"2"]}, {"image": [b"0"]}]
  assert dataset.example("train", 1) == str(files[1])
  with pytest.raises(UserError, match="--config.data.test='test': photos has no example"):
    dataset.ranges("test", "test")
  with pytest.raises(UserError, match="--config.data.train: there is no 'trian'; did you mean"):
    dataset.ranges("trian", "train")
  files[1].unlink()
  with pytest.raises(UserError, match="1.png cannot be read"):
    dataset.records("train")[[1]]
