"""From a config to a segmenter's experiment: what reaches the task, odd sets, and pictures of the user's own images."""

import io
import json
import math

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dljax import report
from dljax.data import sources
from dljax.data.image.scenes import VOID
from dljax.models.layers import BatchNorm
from dljax.recipes import semantic_segmentation
from dljax.train.experiment import Inputs
from dljax.train.state import parameter_count
from experiments import unet
from tests.command import refuse, run

TINY = ["--config.data.image_shape=32,32,1", "--config.data.mask_classes=3", "--config.model.width=4",
        "--config.model.num_pools=1", "--config.total_steps=2", "--config.batch_size=4", "--config.eval_batch_size=4",
        "--config.log_every=1", "--config.eval_every=2", "--mesh=data:1"]
VALUES = (7, 1, 200)  # of the classes in the set's files


class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Images of 20x24 pixels: a grey square on black and a white stripe below it; in each the values of `VALUES`."""

  VERSION = tfds.core.Version("1.0.0")
  name = "squares"
  wrong = None  # what one pixel of the last example is
  cut = 0  # rows that its mask lacks

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(20, 24, 1)), "kinds": tfds.features.Image(shape=(None, 24, 1)),
        "size": np.int64}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(6) for split in ("train", "validation", "test")}

  def _generate_examples(self, count):
    for i in range(count):
      image, kinds = squares(i)
      if i == count - 1:
        kinds = kinds[:len(kinds) - self.cut].copy()
        if self.wrong is not None:
          kinds[3, 5] = self.wrong
      yield i, {"image": Image.fromarray(image), "kinds": Image.fromarray(kinds), "size": i}


def squares(i):
  image, kinds = np.zeros((20, 24), np.uint8), np.full((20, 24), VALUES[0], np.uint8)
  for part, grey, kind in (((slice(1 + i, 8 + i), slice(4, 12)), 120, 1), ((slice(17, 19), slice(0, 24)), 255, 2)):
    image[part], kinds[part] = grey, VALUES[kind]
  return image, kinds


@pytest.fixture
def prepare(tmp_path, monkeypatch):
  """A function that prepares `Squares`, with something wrong or without."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))

  def build(**wrong):
    for name, value in wrong.items():
      monkeypatch.setattr(Squares, name, value)
    sources.build(Squares, tmp_path / "tfds")

  return build


OF_SET = ["--config.data.name=squares", "--config.data.mask_feature=kinds", "--config.data.mask_values=7,1,200",
          "--config.data.mask_names=ground,square,stripe"]


def train(tmp_path, *arguments):
  return run(unet, f"--workdir={tmp_path / 'run'}", *TINY, *OF_SET, *arguments)


def test_the_config_reaches_the_model_and_the_task():
  config = unet.get_config("digit_scenes")
  config.model.update({"dice_weight": 0.25, "cross_entropy_weight": 2.0, "ground": True, "width": 12, "num_pools": 2,
                       "dropout": 0.125, "dtype": "bfloat16", "remat": True})
  task = unet.build(config).task
  assert (task.num_classes, task.dice_weight, task.cross_entropy_weight, task.ground) == (11, 0.25, 2.0, True)
  model = task.model
  assert (model.num_classes, model.width, model.num_pools, model.dropout, model.remat) == (11, 12, 2, 0.125, True)
  assert model.dtype == jax.numpy.bfloat16 and model.padded and model.norm is BatchNorm


def test_the_preset_of_pets_has_the_papers_widths():
  config = unet.get_config("oxford_iiit_pet")
  experiment = unet.build(config)
  shapes = jax.eval_shape(experiment.task.init, jax.random.key(0), experiment.data.batch_spec)
  # unet_padded's count, with two more channels and one more class.
  assert parameter_count(shapes["params"]) == 31_036_546 + 2 * 9 * 64 + 65
  assert (config.data.mask_values, config.data.mask_names) == ((2, 1, 3), ("ground", "pet", "border"))


def test_the_set_reaches_the_batch_and_what_lies_around_the_picture_has_no_class(prepare):
  prepare()
  config = unet.get_config("digit_scenes")
  config.data.update({"name": "squares", "mask_feature": "kinds", "mask_classes": 3, "mask_values": VALUES,
                      "image_shape": (32, 32, 1), "mean": (0.0,), "std": (1.0,)})
  experiment = unet.build(config)
  assert experiment.data.batch_spec["segmentation"].shape == (config.batch_size, 32, 32)
  validation = experiment.data.evals["validation"]
  validation.open()
  batch = validation.batch(0)
  order = {}
  for row in range(6):
    pixels = np.round(255 * batch["image"][row, 6:26, 4:28, 0]).astype(np.uint8)
    order[row] = next(i for i in range(6) if np.array_equal(pixels, squares(i)[0]))
    classes = batch["segmentation"][row]
    np.testing.assert_array_equal(np.array(VALUES)[classes[6:26, 4:28]], squares(order[row])[1])
    around = np.ones((32, 32), bool)
    around[6:26, 4:28] = False
    assert (classes[around] == VOID).all()
  assert sorted(order.values()) == list(range(6))
  assert (batch["segmentation"][6:] == VOID).all() and not batch["mask"][6:].any()


@pytest.mark.parametrize("variant", [pytest.param("unet_padded", marks=pytest.mark.slow), "unet_2015"])
def test_trains_evaluates_and_predicts(prepare, tmp_path, variant):
  """Without padding, too, where the border has no logits: the picture alone lies within them."""
  prepare()
  shape = [] if variant == "unet_padded" else ["--config.data.image_shape=66,66,1"]
  outcome = train(tmp_path, f"--config.model.variant={variant}", "--config.model.dice_weight=0.5",
                  "--config.data.resize=pad", *shape)
  assert outcome.status == 0, outcome
  workdir = tmp_path / "run"
  result = json.loads((workdir / "result.json").read_text())
  names = {"loss", "cross_entropy_loss", "dice_loss", "pixel_accuracy", "mean_iou"}
  assert result["metrics"].keys() == {"validation", "test"}
  assert all(values.keys() == names and all(map(math.isfinite, values.values()))
             for values in result["metrics"].values())
  assert json.loads((workdir / "data" / "classes.json").read_text()) == ["ground", "square", "stripe"]
  assert {path.name for path in (workdir / "figures").iterdir()} == {
      "learning_curves.png", "confusion_matrix.png", "segmentations.png"}
  assert "square" in (workdir / "tables" / "classes.csv").read_text()

  outcome = run(unet, "--mode=eval", f"--workdir={workdir}")
  assert outcome.status == 0, outcome
  again = json.loads((workdir / "evaluation.json").read_text())["metrics"]["test"]
  assert again == pytest.approx(result["metrics"]["test"], rel=1e-5)

  scans = tmp_path / "scans"
  (scans / "more").mkdir(parents=True)
  Image.fromarray(squares(2)[0]).save(scans / "a.png")
  Image.fromarray(squares(3)[0]).resize((48, 40)).save(scans / "more" / "a.bmp")
  np.save(scans / "stack.npy", np.stack([squares(i)[0] for i in (0, 1)]))
  (scans / "broken.png").write_bytes(b"no picture")
  output = tmp_path / "masks"
  outcome = run(unet, "--mode=predict", f"--workdir={workdir}", f"--input={scans}", f"--output={output}")
  assert outcome.status == 1 and outcome.err.startswith(f"skipped {scans / 'broken.png'}: "), outcome
  rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
  sizes = {"a.png": (20, 24), "a-2.png": (40, 48), "stack-0.png": (20, 24), "stack-1.png": (20, 24)}
  assert [row["picture"] for row in rows] == list(sizes)
  seen = [row["seen"] for row in rows]
  assert seen == [name.replace(".png", "-seen.png") for name in sizes]
  assert {path.name for path in output.iterdir()} == {*sizes, *seen, "predictions.jsonl"}
  for row in rows:
    with Image.open(output / row["picture"]) as picture:
      classes = np.asarray(picture)
      assert picture.mode == "P" and classes.shape == sizes[row["picture"]]
      colours = np.reshape(picture.getpalette(), (-1, 3))
    np.testing.assert_array_equal(colours[:3], report.class_colors(3))
    assert set(np.unique(classes)) <= {0, 1, 2}
    assert sum(row["shares"].values()) == pytest.approx(1, abs=0.01)
  line = refuse(unet, "--mode=predict", f"--workdir={workdir}", f"--input={scans}", f"--output={output}")
  assert line == f"--output={output} is not empty, and nothing is written over; name a new folder"
  line = refuse(unet, "--mode=predict", f"--workdir={workdir}", f"--input={scans}", f"--output={tmp_path}/out.txt")
  assert line == f"--output={tmp_path}/out.txt: must end in .jsonl, .json, .csv, or be a new folder"
  assert run(unet, "--mode=predict", f"--workdir={workdir}", f"--input={scans}/a.png",
             f"--output={tmp_path}/out.csv").status == 0
  assert (tmp_path / "out.csv").read_text().startswith("input,found,shares")


def test_pictures_are_the_users_again(monkeypatch):
  """What the network says of the canvas comes back to the place and the size of the file, by the nearest pixel."""
  config = unet.get_config("digit_scenes")
  config.data.image_shape = (32, 32, 1)
  experiment = unet.build(config)
  classes = np.zeros((1, 32, 32), np.uint8)
  classes[0, 8:24] = np.arange(32) // 8  # of 128x64 pixels, shrunk to 32x16 and put in the middle

  def draw(size, classes):
    (suffix, content), = experiment.draw(Inputs({"host/size": np.array([size])}, ["a"]), {"classes": classes}, {})
    assert suffix == ".png"
    return Image.open(io.BytesIO(content))

  picture = draw([64, 128], classes)
  np.testing.assert_array_equal(picture, np.broadcast_to(np.arange(128) // 32, (64, 128)))
  inner = draw([32, 32], classes[:, 2:-2, 4:-4])
  inner = np.asarray(inner)
  np.testing.assert_array_equal(inner[2:-2, 4:-4], classes[0, 2:-2, 4:-4])
  assert (inner[:2] == 255).all() and (inner[:, -4:] == 255).all()  # what it says nothing of


@pytest.mark.parametrize("wrong, words", [
    ({"wrong": 9}, ["--config.data.train='train'", "example", "pixel (5, 3) of kinds is 9, the value of no class"]),
    ({"cut": 2}, ["kinds has 18x24 pixels and the image 20x24", "mend the set"]),
])
def test_masks_that_are_wrong_are_told(prepare, tmp_path, wrong, words):
  prepare(**wrong)
  outcome = train(tmp_path)
  assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome
  assert not [word for word in words if word not in outcome.err], outcome.err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--config.data.image_shape=32,30,1", "--config.model.num_pools=3"],
     ["--config.data.image_shape=32,30,1", "sides of 8, 16, 24", "to 32x32"]),
    (["--config.model.variant=unet_2015", "--config.data.image_shape=33,33,1"],
     ["--config.data.image_shape=33,33,1", "unpadded", "sides of 18, 20, 22", "1 poolings"]),
    (["--config.model.variant=unet_2015", "--config.model.num_pools=4"], ["188, 204, 220", "to 188x188"]),
    (["--config.model.variant=unet_smal"], ["--config.model.variant", "did you mean unet_small"]),
    (["--config.model.width=0"], ["--config.model.width=0: must be at least 1"]),
    (["--config.model.num_pools=-1"], ["--config.model.num_pools=-1: must be at least 0"]),
    (["--config.model.dropout=1"], ["--config.model.dropout=1.0: must be at least 0 and below 1"]),
    (["--config.model.dice_weight=-1"], ["--config.model.dice_weight=-1.0: give 0 or more"]),
    (["--config.data.mask_feature=size"], ["--config.data.mask_feature=size", "is no image of squares"]),
    (["--config.data.mask_values=7,1"], ["--config.data.mask_values", "give one for each of 3 classes"]),
    (["--config.data.image_shape=32,32,3", "--config.data.mean=0,0,0", "--config.data.std=1,1,1"],
     ["--config.data.image_shape=(32, 32, 3)", "squares has 1 channel"]),
    (["--config.eval.corruptions=noise"], ["--config.eval.corruptions=noise: there is nothing to disturb"]),
])
def test_bad_input_is_refused_in_a_line(prepare, tmp_path, arguments, words):
  prepare()
  line = refuse(unet, f"--workdir={tmp_path / 'run'}", *TINY, *OF_SET, *arguments)
  assert not [word for word in words if word not in line], line
  assert not (tmp_path / "run").exists()


def write_squares(root):
  """The scenes of `Squares` as images and masks with a palette, in two splits, with the names of the classes."""
  for split in ("train", "val"):
    for folder in ("images", "masks"):
      (root / folder / split).mkdir(parents=True)
    for i in range(6):
      image, kinds = squares(i)
      Image.fromarray(image).save(root / "images" / split / f"{i}.png")
      mask = Image.fromarray(np.select([kinds == VALUES[k] for k in range(3)], range(3)).astype(np.uint8))
      mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
      mask.save(root / "masks" / split / f"{i}.png")
  (root / "classes.txt").write_text("sky\nsquare\nstripe\n")
  return root


def test_what_a_folder_decides_is_looked_up(tmp_path, capsys):
  config = unet.get_config("digit_scenes")
  assert semantic_segmentation.resolve(config, []) == {}
  config.data.folder = str(write_squares(tmp_path))
  found = semantic_segmentation.resolve(config, ["data.folder", "data.mean"])
  assert found["data.mask_names"] == ("sky", "square", "stripe") and found["data.num_train_examples"] == 6
  assert found["model.ground"] is True and found["data.test"] == "" and "data.mean" not in found
  assert "model.ground" not in semantic_segmentation.resolve(config, ["data.folder", "model.ground"])
  assert "found 3 classes of pixels: 0 is 'sky', 1 is 'square', 2 is 'stripe'" in capsys.readouterr().out
  config.update_from_flattened_dict(found)
  experiment = unet.build(config)
  assert experiment.task.num_classes == 3 and experiment.data.name == str(tmp_path)
  rows = list(experiment.show(Inputs({}, ["a"]), {"classes": np.zeros((1, 4, 4), np.uint8)}, {"classes": ["sky"]}))
  assert rows == [{"found": "sky (100.0%)", "shares": {"sky": 1.0}}]  # the first class need not be the ground


@pytest.mark.slow
def test_a_folder_of_images_and_masks_takes_the_place_of_a_set(tmp_path):
  root, workdir = write_squares(tmp_path / "own"), tmp_path / "run"
  arguments = [f"--workdir={workdir}", f"--config.data.folder={root}",
               *(flag for flag in TINY if "mask_classes" not in flag)]
  outcome = run(unet, *arguments)
  assert outcome.status == 0, outcome
  stored = json.loads((workdir / "config.json").read_text())["config"]
  assert stored["model"]["ground"] is True and stored["data"]["mask_classes"] == 3
  assert "sky" in (workdir / "tables" / "classes.csv").read_text()
  root.rename(tmp_path / "gone")
  outcome = run(unet, "--mode=predict", f"--workdir={workdir}", f"--input={tmp_path / 'gone' / 'images' / 'val'}", "--mesh=data:1")
  assert outcome.status == 0 and "%)" in outcome.out, outcome
