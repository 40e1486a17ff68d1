"""From a config to a detector's experiment: what reaches the task, odd scenes, and boxes for the user's own images."""

import functools
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dljax.data import sources
from dljax.data.image import scenes
from dljax.errors import UserError
from dljax.models import resnet
from dljax.models import retinanet as models
from dljax.tasks import detection
from dljax.train.experiment import Inputs, Request
from dljax.train.state import parameter_count
from experiments import retinanet
from tests.command import plain_pictures, refuse, run

TINY = ["--config.data.image_shape=32,32,1", "--config.total_steps=2", "--config.batch_size=2",
        "--config.eval_batch_size=3", "--config.log_every=1", "--config.eval_every=2", "--mesh=data:1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """In place of the small form one that is compiled in seconds."""
  form = functools.partial(
      models.RetinaNet, block=resnet.BasicBlock, stage_sizes=(1, 1), backbone_width=4, small_stem=True, first_stage=2,
      extra_levels=1, width=8, head_depth=0)
  monkeypatch.setattr(models, "VARIANTS", {**models.VARIANTS, "retinanet_small": form})


class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A white square on black in each image, none in every third; `box` in place of the last one's own."""

  VERSION = tfds.core.Version("1.0.0")
  name = "squares"
  box = None

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(32, 32, 1)),
        "objects": tfds.features.Sequence({
            "bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(num_classes=10)})}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(6) for split in ("train", "validation", "test")}

  def _generate_examples(self, count):
    for i in range(count):
      image, objects = np.zeros((32, 32), np.uint8), []
      if i % 3:
        image[i:i + 12, 8:20] = 255
        corners = [i / 32, 8 / 32, (i + 12) / 32, 20 / 32]
        objects = [{"bbox": tfds.features.BBox(*(self.box if self.box and i == count - 1 else corners)), "label": 7}]
      yield i, {"image": Image.fromarray(image), "objects": objects}


@pytest.fixture
def squares(tmp_path, monkeypatch):
  """A function that prepares `Squares`, with an odd box or without."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))

  def prepare(box=None):
    monkeypatch.setattr(Squares, "box", box)
    if box:  # TFDS itself refuses them, but sets made by others need not have been
      monkeypatch.setattr(tfds.features.BBoxFeature, "encode_example", lambda self, box: np.array(box, np.float32))
    sources.build(Squares, tmp_path / "tfds")

  return prepare


def train(tmp_path, *arguments):
  return run(retinanet, f"--workdir={tmp_path / 'run'}", "--config.data.name=squares", *TINY, *arguments)


def test_the_config_reaches_the_task_and_the_anchors():
  config = retinanet.get_config("digit_scenes")
  config.model.update({"alpha": 0.5, "gamma": 1.0, "smooth_l1_beta": 0.3, "score_threshold": 0.2, "nms_threshold": 0.4,
                       "max_detections": 17, "anchor_scale": 3, "anchor_ratios": (1.0, 2.0)})
  task = retinanet.build(config).task
  assert (task.alpha, task.gamma, task.smooth_l1_beta, task.score_threshold, task.nms_threshold,
          task.max_detections) == (0.5, 1.0, 0.3, 0.2, 0.4, 17)
  assert task.anchors.ratios == (1.0, 2.0)
  assert [sizes[0] for sizes in task.anchors.sizes] == [3 * stride for stride in task.model.strides]
  assert task.model.num_anchors == task.anchors.per_cell == 6


def test_cocos_anchors_network_and_schedule_are_the_papers():
  config = retinanet.get_config("coco")
  experiment = retinanet.build(config)
  assert [sizes[0] for sizes in experiment.task.anchors.sizes] == [32, 64, 128, 256, 512]
  assert experiment.task.anchors.per_cell == 9 and experiment.task.num_classes == 80
  variables = jax.eval_shape(experiment.task.init, jax.random.key(0), experiment.data.batch_spec)
  assert parameter_count(variables["params"]) == 34_068_119 - 9 * 11 * (9 * 256 + 1)  # 80 classes, not 91
  optimizer = config.optimizer
  assert (optimizer.name, optimizer.learning_rate, optimizer.momentum, optimizer.l2) == ("momentum", 0.01, 0.9, 1e-4)
  assert [round(share * config.total_steps) for share in optimizer.decay_boundaries] == [60_000, 80_000]
  assert config.batch_size == 16


@pytest.mark.slow
def test_images_without_objects_are_trained_on_and_evaluated(tmp_path, squares):
  squares()
  outcome = train(tmp_path)
  assert outcome.status == 0, outcome
  metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["test"]
  assert {"loss", "ap", "ap50", "ap75"} <= set(metrics)
  assert all(word in outcome.out for word in ("validation", "test", *metrics)), "the table is cut off"
  assert (tmp_path / "run" / "figures" / "detections.png").exists()


@pytest.mark.parametrize("box, message", [
    ((0.5, 0.2, 0.5, 0.4), "box 0 has no area"), ((0.5, 0.2, 0.7, 1.2), "box 0 lies outside of the image")])
def test_odd_boxes_are_refused_before_anything_is_written_or_left_out(tmp_path, squares, box, message):
  squares(box)
  outcome = train(tmp_path)
  assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome
  assert message in outcome.err and "of squares" in outcome.err and "bad_boxes=drop" in outcome.err
  assert not (tmp_path / "run").exists()
  with plain_pictures():
    assert train(tmp_path, "--config.data.bad_boxes=drop").status == 0


def _drawn(experiment, inputs, boxes):
  """The first row's picture, where one box is found."""
  count = len(inputs.batch["image"])
  predictions = {"boxes": np.tile(np.float32(boxes), (count, 1, 1)), "labels": np.full((count, 1), 7),
                 "scores": np.ones((count, 1), np.float32), "valid": np.ones((count, 1), bool)}
  drawings = list(experiment.draw(inputs, predictions, {"classes": [str(i) for i in range(10)]}))
  assert [suffix for suffix, _ in drawings] == [".png"] * count
  return np.asarray(Image.open(io.BytesIO(drawings[0][1])), int)


def test_the_preview_is_the_validation_splits_beginning_and_can_be_drawn(tmp_path, squares):
  squares()
  config = retinanet.get_config("digit_scenes")
  config.update(batch_size=2, eval_batch_size=3)
  config.data.update({"name": "squares", "image_shape": (32, 32, 1)})
  experiment = retinanet.build(config)
  inputs, again = experiment.preview(), experiment.preview()
  assert len(inputs.names) == len(inputs.batch["image"]) == 4 and inputs.batch["id"].tolist() == [0, 1, 2, 3]
  validation = experiment.data.evals["validation"]
  validation.open()
  expected = validation.batch(0)
  for field in expected:
    np.testing.assert_array_equal(inputs.batch[field][:3], expected[field])
    np.testing.assert_array_equal(inputs.batch[field], again.batch[field])
  one, other = _drawn(experiment, inputs, [[4, 4, 20, 20]]), _drawn(experiment, inputs, [[8, 4, 28, 20]])
  assert min(one.shape[:2]) > 100 and (one != other).any()
  config.data.validation = ""
  assert retinanet.build(config).preview() is None


def test_a_users_box_is_drawn_where_it_lies_in_the_image():
  """The picture of an image that was shrunk onto the canvas is that of one which needed no shrinking."""
  config = retinanet.get_config("digit_scenes")
  config.data.image_shape = (32, 32, 1)
  experiment = retinanet.build(config)
  pixels = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype(np.float32)
  plain = Inputs({"image": pixels[:, 8:24]}, ["a"])
  placed = Inputs({"image": pixels, "place": np.float32([[0, 8, 32, 24]]), "size": np.float32([[64, 32]])}, ["a"])
  np.testing.assert_array_equal(_drawn(experiment, placed, [[8, 4, 40, 20]]), _drawn(experiment, plain, [[4, 2, 20, 10]]))


def test_the_users_boxes_are_in_the_pixels_of_their_own_images(tmp_path, squares, monkeypatch):
  squares()
  assert train(tmp_path).status == 0
  folder, draw = tmp_path / "pictures", np.random.default_rng(0)
  folder.mkdir()
  for name, shape in ("a", (32, 32)), ("b", (40, 80)), ("c", (16, 10)):
    Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(folder / f"{name}.png")
  (folder / "broken.png").write_bytes(b"\x89PNG and no more")
  config = retinanet.get_config("digit_scenes")
  config.data.image_shape = (32, 32, 1)
  inputs = retinanet.build(config).read(Request(paths=[str(folder)]), {})
  batch, skipped = inputs.batch, inputs.skipped
  np.testing.assert_array_equal(batch["place"], [[0, 0, 32, 32], [0, 8, 32, 24], [11, 8, 21, 24]])
  np.testing.assert_array_equal(batch["size"], [[32, 32], [80, 40], [10, 16]])
  assert batch["image"].shape == (3, 32, 32, 1) and len(skipped) == 1

  monkeypatch.setattr(detection, "SHOWN_SCORE", 0)
  outcome = run(retinanet, f"--workdir={tmp_path / 'run'}", "--mode=predict", "--mesh=data:1", f"--input={folder}",
                f"--output={tmp_path / 'out.jsonl'}", "--config.model.score_threshold=0")
  assert outcome.status == 1 and outcome.err.startswith("skipped") and "broken.png" in outcome.err, outcome
  rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [Path(row["input"]).name for row in rows] == ["a.png", "b.png", "c.png"]
  for row, (width, height) in zip(rows, batch["size"]):
    boxes = np.array([found["box"] for found in row["detections"].values()])
    assert len(boxes) == 100 and boxes.min() >= 0
    np.testing.assert_allclose(boxes.max(axis=0)[2:], [width, height], rtol=0.1)  # they are everywhere


def test_a_place_carries_every_box_back():
  config = retinanet.get_config("digit_scenes")
  experiment = retinanet.build(config)
  task = experiment.task
  draw = np.random.default_rng(0)
  batch = {"image": draw.normal(size=(1, 96, 96, 1)).astype(np.float32), "mask": np.ones(1, np.float32)}
  variables = jax.jit(task.init)(jax.random.key(0), batch)
  found = jax.device_get(jax.jit(task.predict)(variables, batch, None))
  wide = {"place": np.array([[0., 24, 96, 72]]), "size": np.array([[192., 96]])}
  own = jax.jit(task.predict)(variables, {**batch, **wide}, None)
  np.testing.assert_array_equal(own["scores"], found["scores"])
  expected = np.clip((found["boxes"] - [0, 24, 0, 24]) * 2, 0, [192, 96, 192, 96])
  np.testing.assert_allclose(own["boxes"], expected, atol=1e-3)


@pytest.mark.parametrize("field, value, message", [
    ("alpha", 2.0, "from 0 to 1"), ("anchor_scale", 0, "positive"), ("anchor_ratios", (), "height / width"),
    ("anchor_ratios", (1.0, -2.0), "height / width"), ("variant", "retinanet_smal", "did you mean retinanet_small")])
def test_bad_fields_are_named(field, value, message):
  config = retinanet.get_config("digit_scenes")
  config.model[field] = value
  with pytest.raises(UserError, match=message) as error:
    retinanet.build(config)
  assert f"--config.model.{field}" in str(error.value)


def test_the_users_images_have_a_place_and_a_size(tmp_path):
  Image.fromarray(np.zeros((100, 192), np.uint8)).save(tmp_path / "wide.png")
  experiment = retinanet.build(retinanet.get_config("digit_scenes"))  # 96 x 96 pixels
  batch = experiment.read(Request(paths=[str(tmp_path / "wide.png")]), {}).batch
  np.testing.assert_array_equal(batch["size"], [[192, 100]])  # width, height
  np.testing.assert_array_equal(batch["place"], [[0, 23, 96, 73]])


def write_squares(root, shown=range(6)):
  """The scenes of `Squares` as COCO's file and images, with three splits."""
  (root / "annotations").mkdir(parents=True)
  for split in ("train", "val", "test"):
    (root / split).mkdir()
    images, boxes = [], []
    for i in shown:
      image = np.zeros((32, 32), np.uint8)
      if i % 3:
        image[i:i + 12, 8:20] = 255
        boxes.append({"id": i, "image_id": i, "category_id": 7, "bbox": [8, i, 12, 12]})
      Image.fromarray(image).save(root / split / f"{i}.png")
      images.append({"id": i, "file_name": f"{i}.png", "width": 32, "height": 32})
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps({
        "images": images, "annotations": boxes, "categories": [{"id": n, "name": f"kind {n}"} for n in range(10)]}))
  return root


def test_a_folder_of_ones_own_is_looked_at_once(tmp_path, monkeypatch, caplog):
  """Trained, continued without a second look, evaluated elsewhere; predictions need no folder."""
  root, workdir = write_squares(tmp_path / "own"), tmp_path / "run"
  looks = []
  monkeypatch.setattr(scenes.own_scenes, "look", lambda *args, look=scenes.own_scenes.look: looks.append(1) or look(*args))
  arguments = [f"--workdir={workdir}", f"--config.data.folder={root}", *TINY, "--config.data.max_boxes=8",
               "--config.model.anchor_ratios=1.25,2.0"]
  with plain_pictures():
    outcome = run(retinanet, *arguments)
  assert outcome.status == 0, outcome
  assert "found 18 images: 6 for training, 6 for validation, 6 for test" in outcome.out
  assert "found 12 boxes of 10 classes, for training" in outcome.out and "'kind 7' 4" in outcome.out
  stored = json.loads((workdir / "config.json").read_text())["config"]
  assert stored["data"]["classes"][7] == "kind 7" and stored["data"]["format"] == "coco"
  assert "data.classes" in stored["found"] and "data.max_boxes" not in stored["found"]
  assert json.loads((workdir / "data" / "classes.json").read_text())[7] == "kind 7"
  assert run(retinanet, *arguments).out.count("found") == 0 and len(looks) == 1
  other = write_squares(tmp_path / "other", range(1, 9))
  outcome = run(retinanet, "--mode=eval", f"--workdir={workdir}", f"--config.data.folder={other}", "--mesh=data:1")
  assert outcome.status == 0 and f"{other}: left out what the run was trained on, 6 of " in caplog.text, outcome
  root.rename(tmp_path / "gone")
  assert run(retinanet, "--mode=predict", f"--workdir={workdir}", f"--input={other / 'test'}", "--mesh=data:1").status == 0
  assert refuse(retinanet, *arguments, "--config.total_steps=3").startswith(f"--config.data.folder={root}: there is no such folder")
