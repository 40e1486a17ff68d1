"""The commands that dljax/data/README.md gives for one's own boxes, masks, texts, series and recordings, run as they
stand there, in a folder that holds what they name, on the smallest networks.

Those for images by class are in test_own_images.py.
"""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dljax
from dljax import report
from dljax.models import deepspeech, resnet, retinanet
from tests import command, smallest
from tests.data.audio import own_recordings
from tests.data.image import own_folders
from tests.families import EXPERIMENTS

# Smaller than the smallest that has all kinds of layers: what surrounds the networks is tested.
NETWORKS = {
    deepspeech: functools.partial(
        deepspeech.DeepSpeech, channels=2, kernels=((5, 5),), strides=((2, 4),), hidden_size=4, num_layers=1),
    retinanet: functools.partial(
        retinanet.RetinaNet, block=resnet.BasicBlock, stage_sizes=(1, 1), backbone_width=4, small_stem=True,
        first_stage=2, extra_levels=0, width=4, head_depth=0),
}
TINY = {
    "retinanet": ("--config.batch_size=2", "--config.eval_batch_size=4", f"--config.model.variant={smallest.NAME}"),
    "unet": ("--config.batch_size=2", "--config.eval_batch_size=4", "--config.model.width=4",
             "--config.model.num_pools=1"),
    "rnn": ("--config.batch_size=2", "--config.eval_batch_size=16", "--config.model.hidden_size=4",
            "--config.model.num_layers=1"),
    "deepspeech": ("--config.batch_size=2", "--config.eval_batch_size=4", "--config.model.beam=1",
                   f"--config.model.variant={smallest.NAME}", "--config.data.buckets=1"),
}
ONE = "--mesh=data:1"
SHORT = ("--config.total_steps=2", "--config.eval_every=2", "--config.checkpoint_every=2", "--config.log_every=1")


def _boxes(number: int) -> None:
  """COCO's form for the first command, YOLO's for the second."""
  shutil.rmtree("traffic", ignore_errors=True)
  if number:
    own_folders.write_yolo(Path("traffic"), {"train": range(8), "val": range(8, 11), "test": range(11, 13)})
  else:
    own_folders.write_coco(Path("traffic"), {"train": range(8), "val": range(8, 11)})
    own_folders.write_yolo(Path("night"), {"test": range(20, 23)})
    own_folders.write_images(Path("photos"), [30, 31])


def _masks(number: int) -> None:
  """Numbers for the first command, colours for the second."""
  shutil.rmtree("fields", ignore_errors=True)
  if not number:
    own_folders.write_masks(Path("fields"), {"train": range(4), "val": range(4, 6), "test": range(6, 8)})
    own_folders.write_images(Path("photos"), [30, 31])
    return
  for place, splits in ("fields", {"train": range(4), "val": range(4, 6)}), ("meadows", {"test": range(8, 10)}):
    own_folders.write_masks(Path(place), splits)
    for path in Path(place, "masks").rglob("*.png"):
      classes = np.asarray(Image.open(path))
      colours = np.where((classes > 0)[..., None], (0, 255, 0), 0).astype(np.uint8)
      colours[0] = 255  # the first row is ignored
      Image.fromarray(colours).save(path)


def _texts(number: int) -> None:
  if number:
    return
  draw = np.random.default_rng(0)
  words = ["once", "upon", "a", "time", "there", "was", "königlich", "nothing"]
  Path("book.txt").write_text(" ".join(draw.choice(words, 400)))
  for place, count in ("books", 12), ("letters", 2):
    Path(place).mkdir()
    for i in range(count):
      Path(place, f"{i}.txt").write_text(f"{place} {i}: " + " ".join(draw.choice(words, 60)))


def _series(number: int) -> None:
  if number:
    return
  days = np.arange("2021-06-01", "2024-06-01", dtype="datetime64[D]")
  rows = [(day, f"{100 + i % 7 + 10 * np.sin(i / 50):.2f}") for i, day in enumerate(days)]
  Path("sales.csv").write_text("date,sales\n" + "".join(f"{day},{value}\n" for day, value in rows))
  for name, tens in ("absatz.csv", ""), ("umsatz.csv", "1"):
    cells = [f"{day.item():%d.%m.%Y};{tens}{value.replace('.', ',')}\r\n" for day, value in rows]
    Path(name).write_text("date;menge\r\n" + "".join(cells), encoding="utf-8-sig")


def _recordings(number: int) -> None:
  own_recordings.ljspeech(Path("LJSpeech-1.1"), 12, seconds=0.4)
  own_recordings.common_voice(Path("other"), {"train": 2, "test": 3}, seconds=0.35)
  for name in "ab":
    own_recordings.save(Path("recordings", f"{name}.WAV"), own_recordings.wav(seconds=0.3))


# Section -> the commands' kinds, what makes their data, and what the run as an object is asked for.
SECTIONS: Mapping[str, tuple[list[str], Callable[[int], None], str]] = {
    "Your own boxes": (["train", "train", "eval", "predict"], _boxes, "photos/030.png"),
    "Your own masks": (["train", "train", "eval", "predict"], _masks, "photos/030.png"),
    "Your own text": (["train", "train", "eval", "predict"], _texts, "letters/0.txt"),
    "Your own series": (["train", "train", "eval", "predict"], _series, "umsatz.csv"),
    "Your own recordings": (["train", "eval", "predict"], _recordings, "recordings/a.WAV"),
}


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_the_documented_commands_run(section, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for module, network in NETWORKS.items():
    monkeypatch.setitem(module.VARIANTS, smallest.NAME, network)
  kinds, prepare, some = SECTIONS[section]
  run, found = Path("none"), []
  with smallest.native_convolutions():
    for number, (family, arguments) in enumerate(command.documented(section)):
      mode = next((a.removeprefix("--mode=") for a in arguments if a.startswith("--mode=")), "train")
      found.append(mode)
      if mode == "train":
        prepare(number)
        run = Path(f"run {number}")
        arguments = [*arguments, f"--workdir={run}", *TINY[family], *SHORT]
      arguments = [ONE, *(argument.replace("=RUN", f"={run}") for argument in arguments)]
      done = command.run(EXPERIMENTS[family], *arguments)
      assert done.status == 0, (arguments, done)
      if mode == "train":
        assert json.loads((run / "result.json").read_text())["metrics"].keys() >= {"validation"}
        assert list((run / "figures").glob("*.png"))
        monkeypatch.setattr(report, "save", _touch)  # rendering once is enough
      elif mode == "eval":
        _check_evaluation(run, family, done.out)
        before = {path.name for path in run.iterdir()}
      else:
        output, = (a.removeprefix("--output=") for a in arguments if a.startswith("--output="))
        assert {path.name for path in run.iterdir()} <= before
        rows = Path(output, "predictions.jsonl") if Path(output).is_dir() else Path(output)
        assert rows.read_text().strip() and (rows == Path(output) or list(Path(output).glob("*.png")))
    assert found == kinds
    row, *_ = dljax.load(run).predict(some)
    assert row


def _touch(figure: Any, path: Path, title: str) -> None:
  del figure, title
  path.touch()


def _check_evaluation(run: Path, family: str, printed: str) -> None:
  """Another folder is measured, and after it the run's own again, as when it was trained."""
  stored = json.loads((run / "evaluation.json").read_text())["metrics"]
  assert "test" in stored and "evaluation.json" in printed
  result = json.loads((run / "result.json").read_text())["metrics"]
  assert stored["test"] != result.get("test")
  assert command.run(EXPERIMENTS[family], ONE, "--mode=eval", f"--workdir={run}").status == 0
  again = json.loads((run / "evaluation.json").read_text())["metrics"]
  assert again.keys() == result.keys()
  for split, metrics in result.items():
    assert again[split] == pytest.approx(metrics, nan_ok=True)
