"""Where predictions are written: a trial leaves nothing, and no name covers another."""

import json

import pytest

from dljax.errors import UserError
from dljax.launch import output


def test_a_place_is_tried_without_leaving_or_changing_anything(tmp_path):
  (tmp_path / "old.csv").write_text("kept\n")
  for name in ("new.jsonl", "old.csv"):
    output.check(tmp_path / name, drawn=False)
  output.check(tmp_path / "folder", drawn=True)
  (tmp_path / "folder.csv").mkdir()
  with pytest.raises(UserError, match="cannot be written"):
    output.check(tmp_path / "folder.csv", drawn=False)
  (tmp_path / "folder.csv").rmdir()
  assert [path.name for path in tmp_path.iterdir()] == ["old.csv"]
  assert (tmp_path / "old.csv").read_text() == "kept\n"


def test_pictures_of_equal_names_are_numbered(tmp_path):
  rows = [{"input": name} for name in ("a/x.png", "b/x.jpg", "c/x.npy[0]", "x.gif", "x-2.png")]
  output.write(tmp_path / "out", rows, lambda: [(".png", b"a picture")] * 5)
  lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
  names = [json.loads(line)["picture"] for line in lines]
  assert names == ["x.png", "x-2.png", "x-0.png", "x-3.png", "x-2-2.png"]
  assert {path.name for path in (tmp_path / "out").glob("*.png")} == set(names)
