"""Pipelines of scenes: image, boxes and classes of pixels stay together, whatever is done to them."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dljax.data import sources
from dljax.data.image import scenes
from dljax.data.image.geometry import Placement, Window
from dljax.data.image.scenes import VOID
from dljax.data.pipeline import all_rows
from dljax.errors import UserError
from tests.data.hosts import share

SIZE = (40, 56)


class Blocks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Two blocks of one grey level each, which tells the class: label 0 is 100 and class 1, label 1 is 200 and class 2."""

  VERSION = tfds.core.Version("1.0.0")
  name = "blocks"

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(*SIZE, 1)), "segmentation": tfds.features.Image(shape=(*SIZE, 1)),
        "objects": tfds.features.Sequence({
            "bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["dim", "bright"])})}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(count) for split, count in (("train", 12), ("validation", 5), ("test", 3))}

  def _generate_examples(self, count):
    for i in range(count):
      pixels, classes, boxes = blocks(i)
      (height, width), objects = SIZE, []
      for label, (x0, y0, x1, y1) in enumerate(boxes):
        objects.append({"bbox": tfds.features.BBox(y0 / height, x0 / width, y1 / height, x1 / width), "label": label})
      yield i, {"image": Image.fromarray(pixels), "segmentation": Image.fromarray(classes), "objects": objects}


def blocks(i):
  draw = np.random.default_rng(i)
  pixels, classes, boxes = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8), []
  for label, left in enumerate((2, 30)):
    x0, y0 = left + draw.integers(8), draw.integers(20)
    box = x0, y0, x0 + draw.integers(8, 16), y0 + draw.integers(8, 18)
    where = slice(box[1], box[3]), slice(box[0], box[2])
    pixels[where], classes[where] = 100 * (label + 1), label + 1
    boxes.append(box)
  return pixels, classes, boxes


@pytest.fixture(scope="module", autouse=True)
def blocks_prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  sources.build(Blocks, root)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(root))
    yield


def make(targets=scenes.TARGETS, batch_size=4, **fields):
  config = scenes.default_config()
  config.update({"name": "blocks", "num_classes": 2, "image_shape": (48, 64, 1), "mean": (0.0,), "std": (1.0,),
                 "max_boxes": 3, "mask_classes": 3, "mask_values": (0, 1, 2), **fields})
  return scenes.SceneSet(config, targets).pipelines(
      batch_size=batch_size, eval_batch_size=4, seed=7)


def opened(pipeline, rows=all_rows):
  pipeline.open(rows)
  return pipeline


def grey(batch):
  return np.round(255 * batch["image"][..., 0]).astype(int)


def inside(values):
  """Where all pixels around have the same value: borders are mixed."""
  around = [np.roll(values, (down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
  return np.all([other == values for other in around], axis=0)


def assert_together(batch, slack=0):
  """Every block is where its box is and has the class of its grey level, but for pixels at borders."""
  for pixels, classes, boxes, labels, mask in zip(
      grey(batch), *(batch[name] for name in ("segmentation", "boxes", "box_label", "box_mask"))):
    known, sure = classes != VOID, inside(pixels)
    assert (classes[known & sure] == pixels[known & sure] // 100).all()
    assert not pixels[~known & sure & inside(classes)].any()
    for box, label in zip(boxes[mask > 0], labels[mask > 0]):
      rows, columns = np.nonzero(classes == label + 1)
      tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
      np.testing.assert_allclose(box, tight, atol=0.5 + slack)


def test_evaluation_reads_the_whole_set_in_order_on_a_canvas():
  data = make()
  pipeline = opened(data.evals["validation"])
  batches = [pipeline.batch(i) for i in range(pipeline.num_batches)]
  assert [batch["mask"].sum() for batch in batches] == [4, 1]
  for batch in batches:
    real = {name: value[batch["mask"] > 0] for name, value in batch.items()}
    assert_together(real)
    top, left = (48 - 40) // 2, (64 - 56) // 2
    void = np.ones((48, 64), bool)
    void[top:top + 40, left:left + 56] = False
    assert ((real["segmentation"] == VOID) == void).all()
    assert real["box_mask"].sum(axis=1).tolist() == [2] * len(real["mask"])
    assert (batch["segmentation"][batch["mask"] == 0] == VOID).all() and not batch["box_mask"][batch["mask"] == 0].any()
  found = sorted(grey(batch)[i, 4:44, 4:60].tobytes() for batch in batches for i in range(4) if batch["mask"][i])
  assert found == sorted(blocks(i)[0].astype(int).tobytes() for i in range(5))
  for target, names in ("segmentation", ["ground", "dim", "bright"]), ("boxes", ["dim", "bright"]):
    assert make([target]).assets()["classes"] == names
  assert {k: (v.shape, v.dtype) for k, v in data.batch_spec.items()} == {
      k: (v.shape, v.dtype) for k, v in batches[0].items() if not k.startswith("host/")}


def test_batches_hold_the_targets_that_were_asked_for():
  fields = lambda *targets: {k for k in opened(make(targets).train).batch(0) if not k.startswith("host/")}
  assert fields("segmentation") == {"image", "mask", "id", "segmentation"}
  assert fields("boxes") == {"image", "mask", "id", "boxes", "box_label", "box_mask"}


@pytest.mark.parametrize("fields", [
    {"shift": 20}, {"flip": True}, {"scale": (2.0, 2.0)}, {"scale": (0.5, 0.9)},
    {"shift": 9, "flip": True, "scale": (0.7, 1.5)}])
def test_augmentation_moves_all_alike(fields):
  train = opened(make(**fields).train)
  plain = opened(make().train)
  changed = 0
  for step in range(6):
    batch = train.batch(step)
    assert_together(batch, slack=0.5)
    changed += (grey(batch) != grey(plain.batch(step))).any(axis=(1, 2)).sum()
    again = train.batch(step)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
  assert changed > 6


def test_every_shift_is_drawn():
  train = opened(make(shift=1, batch_size=4).train)
  where = {tuple(batch["boxes"][0, 0, :2] - plain["boxes"][0, 0, :2])
           for batch, plain in ((train.batch(i), opened(make(batch_size=4).train).batch(i)) for i in range(60))}
  assert where == {(right, down) for right in (-1, 0, 1) for down in (-1, 0, 1)}


def test_a_window_is_bilinear():
  """At twice the size of two levels no value lies beyond them, and those in between lie on a line."""
  pixels = np.full((8, 8, 1), 40, np.uint8)
  pixels[:, 4:] = 200
  shown = Window(2.0, 0, 0, False).of_image(pixels, np.zeros(1))
  np.testing.assert_array_equal(shown[2, :, 0], [40, 40, 40, 80, 160, 200, 200, 200])


def test_what_a_window_leaves_too_little_of_is_no_object():
  boxes = np.array([[0, 0, 20, 10], [30, 10, 50, 30], [0, 0, 0, 0]], np.float32)
  cut, seen = Window(1.0, 15, 0, False).of_boxes(boxes, SIZE)
  np.testing.assert_array_equal(seen, [0, 1, 0])  # a quarter of the first is left; the last is padding
  np.testing.assert_allclose(cut[1], [15, 10, 35, 30])
  flipped, _ = Window(1.0, 15, 0, True).of_boxes(boxes, SIZE)
  np.testing.assert_allclose(flipped[1], [56 - 35, 10, 56 - 15, 30])


def test_hosts_share_a_batch_that_does_not_depend_on_their_number():
  fields = {"shift": 9, "flip": True, "scale": (0.7, 1.5)}
  whole = opened(make(**fields).train).batch(2)
  for rows in share(0, 2), share(1, 2):
    part = opened(make(**fields).train, rows).batch(2)
    for name, value in part.items():
      np.testing.assert_array_equal(value, whole[name][rows(4)], err_msg=name)


def test_a_streamed_split_gives_the_same_batches(monkeypatch):
  fields = {"shift": 9, "scale": (0.7, 1.5)}
  batches = [opened(make(**fields).train).batch(step) for step in range(4)]
  monkeypatch.setattr(scenes, "MEMORY_LIMIT", 0)
  train = opened(make(**fields).train)
  for step, batch in enumerate(batches):
    streamed = train.batch(step)
    assert streamed.keys() == batch.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(streamed[name], value, err_msg=name)
  train.close()


@pytest.mark.parametrize("resize", scenes.RESIZE)
def test_classes_on_the_canvas_go_back_to_the_picture(resize):
  size, canvas = (30, 50), (48, 64)
  classes = np.random.default_rng(0).integers(0, 4, (5, 5)).astype(np.uint8).repeat(6, 0).repeat(10, 1)
  place = Placement.of(size, canvas, resize)
  seen = np.full(canvas, 255, np.uint8)
  shown = np.asarray(Image.fromarray(classes).resize((place.width, place.height), Image.Resampling.NEAREST))
  seen[place.top:place.top + place.height, place.left:place.left + place.width] = shown
  assert np.mean(place.back(seen, size) == classes) == 1
  large = Placement.of((90, 150), canvas, resize)  # shrunk onto the canvas
  assert large.back(np.zeros(canvas, np.uint8), (90, 150)).shape == (90, 150)


@pytest.mark.parametrize("fields, words", [
    ({"num_classes": 3}, ["--config.data.num_classes=3", "blocks has 2 classes of objects"]),
    ({"mask_feature": "mask"}, ["--config.data.mask_feature=mask", "is no image of blocks"]),
    ({"mask_classes": 2, "mask_values": (0, 1)}, ["pixel (", "of segmentation is 2, the value of no class"]),
    ({"max_boxes": 1}, ["there are 2 boxes; raise --config.data.max_boxes=1"]),
    ({"image_shape": (48, 64, 3), "mean": (0.0,) * 3, "std": (1.0,) * 3}, ["blocks has 1 channel"]),
    ({"validation": "train[:50%]"}, ["overlaps"]),
    ({"scale": (2.0, 1.0)}, ["--config.data.scale", "give the least and the greatest"]),
    ({"shift": 64}, ["--config.data.shift=64"]),
    ({"mask_values": (0, 1, 300)}, ["--config.data.mask_values", "from 0 to 255"]),
    ({"mask_classes": 0}, ["--config.data.mask_classes=0"]),
    ({"resize": "crop"}, ["--config.data.resize='crop'", "pad, bilinear"]),
])
def test_what_does_not_fit_is_told_in_a_line(fields, words):
  with pytest.raises(UserError) as error:
    opened(make(**fields).train)
  assert "\n" not in str(error.value)
  assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.parametrize("field, words", [("image", "example 2 of blocks cannot"), ("segmentation", "blocks: segmentation cannot")])
def test_a_damaged_example_is_named(monkeypatch, field, words):
  getitem = sources.Records.__getitem__
  monkeypatch.setattr(sources.Records, "__getitem__", lambda records, indices: [
      {**record, **({field: [record[field][0][:60]]} if i == 2 else {})} for i, record in zip(indices, getitem(records, indices))])
  with pytest.raises(UserError, match=f"^--config.data.train='train': .*{words} be used"):
    opened(make().train)


def test_a_damaged_example_of_a_prepared_set_may_be_skipped(monkeypatch, caplog):
  getitem = sources.Records.__getitem__
  monkeypatch.setattr(sources.Records, "__getitem__", lambda records, indices: [
      {**record, **({"image": [b"no"]} if i == 2 else {})} for i, record in zip(indices, getitem(records, indices))])
  with pytest.raises(UserError, match="example 2 of blocks cannot be used .*, or skip it by --config.data.skip_corrupt=1"):
    opened(make().train)
  data = make(skip_corrupt=1)
  assert opened(data.train).num_examples == 11 and "example 2 of blocks" in caplog.text
  assert data.assets()["skipped"]["examples"] == {"train": ["example 2 of blocks"]}
  with pytest.raises(UserError, match="--config.data.skip_corrupt=1: 2 examples cannot be decoded"):
    opened(data.evals["validation"])
