"""Each part of a request against each kind of experiment: used, or refused by its flag."""

import csv
import datetime
import wave

import ml_collections
import numpy as np
import pytest
from PIL import Image

from dljax.data.series import windows
from dljax.data.series.times import SECOND, Step
from dljax.errors import UserError
from dljax.train.experiment import Request
from experiments import deepspeech, lenet, mlp, retinanet, rnn, unet


def _picture(folder):
  Image.fromarray(np.full((8, 8), 100, np.uint8)).save(folder / "input.png")
  return folder / "input.png"


def _sound(folder):
  with wave.open(str(folder / "input.wav"), "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(8000)
    file.writeframes(np.arange(4000, dtype=np.int16).tobytes())
  return folder / "input.wav"


def _series(folder):
  with open(folder / "input.csv", "w", newline="") as file:
    out = csv.writer(file)
    out.writerow(["date", "seattle", "san_francisco"])
    hours = (datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=i) for i in range(200))
    out.writerows([when, 1.5, 2.5] for when in hours)
  return folder / "input.csv"


def _points(folder):
  np.save(folder / "input.npy", np.ones(2, np.float32))
  return folder / "input.npy"


def _text(folder):
  (folder / "input.txt").write_text("Speak the speech")
  return folder / "input.txt"


NORMALISER = windows.Normaliser(("seattle", "san_francisco"), np.zeros(2), np.ones(2), Step(3600 * SECOND))
# Kind of experiment -> family, preset, what makes an input, assets of the run, what else than paths it takes.
KINDS = {
    "image_classification": (lenet, "digits", _picture, {}, ()),
    "object_detection": (retinanet, "digit_scenes", _picture, {}, ()),
    "semantic_segmentation": (unet, "digit_scenes", _picture, {}, ()),
    "speech": (deepspeech, "morse", _sound, {}, ()),
    "forecasting": (rnn, "temperatures", _series, {windows.ASSET: NORMALISER.asset()}, ()),
    "language_modeling": (rnn, "pydoc", _text, {}, ("texts", "count")),
    "points": (mlp, "xor", _points, {}, ()),
}
PARTS = {"texts": (["Once"], "--prompt"), "count": (2, "--count"), "labels": (["3"], "--label")}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
  """(what reads a request, a path that it can read, what else it takes, the family's name)."""
  family, preset, make, assets, takes = KINDS[request.param]
  config = family.get_config(preset)
  assert isinstance(config, ml_collections.ConfigDict)
  read = family.build(config).read
  return lambda **parts: read(Request(**parts), assets), str(make(tmp_path)), takes, config.family


def test_paths_are_read_into_numbered_rows(kind, tmp_path):
  read, path, _, _ = kind
  broken = tmp_path / f"broken{path[path.rindex('.'):]}"
  broken.write_bytes(b"")
  inputs = read(paths=[path, str(broken), path])
  assert len(inputs.names) == 2 and all(name.startswith(path) for name in inputs.names)
  line, = inputs.skipped
  assert str(broken) in line
  assert inputs.batch["id"].dtype == np.int32 and inputs.batch["id"].tolist() == [0, 1]
  assert inputs.batch["mask"].tolist() == [1, 1]
  assert all(len(value) == 2 for value in inputs.batch.values())
  with pytest.raises(UserError, match="^--input: there is no .*missing"):
    read(paths=[str(tmp_path / "missing")])


def test_nothing_to_predict_for_is_refused(kind):
  read, _, takes, _ = kind
  needed = "--input=FILE_OR_FOLDER" + " or --prompt=TEXT" * ("texts" in takes)
  with pytest.raises(UserError, match=f"^--mode=predict needs {needed}$"):
    read()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_meaning_is_refused_by_its_flag(kind, part):
  read, path, takes, family = kind
  value, flag = PARTS[part]
  if part in takes:
    read(**{"paths": [path]} if part == "count" else {}, **{part: value})
    return
  with pytest.raises(UserError, match=f"^{flag}: {family} .*; use --input=FILE_OR_FOLDER"):
    read(paths=[path], **{part: value})
  with pytest.raises(UserError, match=f"^{flag}: {family} "):
    read(**{part: value})


def test_a_text_is_continued_as_often_as_asked():
  family, preset, *_ = KINDS["language_modeling"]
  read = family.build(family.get_config(preset)).read
  inputs = read(Request(texts=["a", "bc"], count=2), {})
  prompts = inputs.batch["prompt"]  # padded, so that prompts of other lengths need no other program
  assert prompts[:, :3].tolist() == [[256, 97, 0], [256, 97, 0], [256, 98, 99], [256, 98, 99]]
  assert not prompts[:, 3:].any()
  assert inputs.batch["length"].tolist() == [2, 2, 3, 3]
  assert inputs.batch["id"].tolist() == [0, 1, 2, 3] and list(inputs.names) == ["a", "a", "bc", "bc"]
  one = read(Request(texts=["a", "bc"]), {})
  assert one.batch["id"].tolist() == [0, 1] and list(one.names) == ["a", "bc"]
  with pytest.raises(UserError, match="^--count=0: give a positive number"):
    read(Request(texts=["a"], count=0), {})
  with pytest.raises(UserError, match="^--prompt and --input do not go together; drop one of them"):
    read(Request(texts=["a"], paths=["b"]), {})
