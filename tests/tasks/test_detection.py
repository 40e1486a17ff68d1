"""Detection: loss and gradient by their definitions, predictions, and average precision."""

import itertools
import json

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from dljax import report
from dljax.errors import UserError
from dljax.tasks import boxes as box_lib
from dljax.tasks import detection
from dljax.tasks.detection import Detection
from tests.tasks import compiled

K, SIZE, GRIDS = 3, 32, [(4, 4), (2, 2)]
ANCHORS = box_lib.Anchors(sizes=((8,), (16,)), ratios=(1.0, 2.0))
ALL_ANCHORS = ANCHORS.boxes(GRIDS, SIZE, SIZE)  # [40, 4]
N = len(ALL_ANCHORS)


class Linear(nn.Module):
  """Outputs that depend linearly on the image's means by row."""

  def grids(self, height, width):
    return [(height // 8, width // 8), (height // 16, width // 16)]

  @nn.compact
  def __call__(self, image, mask=None, *, train):
    x = image.mean(axis=(2, 3))
    logits, code = nn.Dense(N * K, name="logits")(x), nn.Dense(N * 4, name="boxes")(x)
    return {"logits": logits.reshape(-1, N, K), "boxes": code.reshape(-1, N, 4)}


class Fixed(Linear):
  """Says what stands in the image's own batch: the outputs are variables of the "params"."""

  @nn.compact
  def __call__(self, image, mask=None, *, train):
    shape = (len(image), N)
    return {"logits": self.param("logits", nn.initializers.zeros, (*shape, K)),
            "boxes": self.param("boxes", nn.initializers.zeros, (*shape, 4))}


def make_batch(size=3, seed=0, objects=4, **more):
  draw = np.random.default_rng(seed)
  corner = draw.uniform(0, 18, (size, objects, 2))
  boxes = np.concatenate([corner, corner + draw.uniform(6, 14, (size, objects, 2))], axis=-1)
  batch = {
      "image": draw.normal(size=(size, SIZE, SIZE, 1)), "boxes": boxes,
      "box_mask": (np.arange(objects) < np.arange(1, size + 1)[:, None]).astype(np.float32), "mask": np.ones(size),
      "id": np.arange(size, dtype=np.int32)}
  batch = {name: x.astype(np.float32) for name, x in batch.items()}
  return {**batch, "box_label": draw.integers(K, size=(size, objects)).astype(np.int32), **more}


TASK = Detection(Linear(), K, ANCHORS)
focal_loss = jax.jit(detection.focal_loss)
smooth_l1 = jax.jit(detection.smooth_l1, static_argnums=1)
box_iou = jax.jit(box_lib.iou)
encode = jax.jit(box_lib.encode)


def linear_params(batch):
  return compiled.variables(TASK, batch)["params"]


def test_focal_loss_is_its_closed_form():
  logits = np.linspace(-6, 6, 25)
  for target, alpha in ((True, 0.25), (False, 0.75)):
    p = 1 / (1 + np.exp(-logits))
    p_t = p if target else 1 - p
    np.testing.assert_allclose(
        focal_loss(logits, np.full(25, target)), -alpha * (1 - p_t)**2 * np.log(p_t), rtol=2e-5)


def test_without_focus_the_focal_loss_is_half_of_the_cross_entropy():
  logits = np.random.default_rng(0).normal(size=100).astype(np.float32) * 4
  target = np.arange(100) % 2 == 0
  np.testing.assert_allclose(
      focal_loss(logits, target, alpha=0.5, gamma=0.0),
      0.5 * np.asarray(jax.jit(optax.sigmoid_binary_cross_entropy)(logits, target)), rtol=1e-5)


@jax.jit
@jax.grad
def _focal_gradient(logits, target, gamma):
  return detection.focal_loss(logits, target, gamma=gamma).sum()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_focal_loss_has_a_gradient_however_sure_the_logits(gamma):
  logits = np.array([-200, -90, 0, 90, 200], np.float32)
  for target in (True, False):
    grad = np.asarray(_focal_gradient(logits, np.full(5, target), gamma))
    assert np.isfinite(grad).all()
    assert (grad[0 if target else -1] != 0) and (target == (grad[0] < 0))  # wrong and sure: it still learns


def test_smooth_l1():
  error = np.array([-3, -0.5, 0, 0.25, 1, 2], np.float32)
  np.testing.assert_array_equal(smooth_l1(error, 0.0), np.abs(error))
  np.testing.assert_allclose(smooth_l1(error, 1.0), jax.jit(optax.huber_loss)(error, delta=1.0), rtol=1e-6)


def test_loss_by_hand():
  """One object that is just an anchor, and an ignored one; by the sums of the definition."""
  batch = make_batch(1, objects=1)
  anchor = 21
  truth = ALL_ANCHORS[anchor] + np.array([1, -1, 2, 0], np.float32)
  batch |= {"boxes": truth[None, None], "box_label": np.array([[2]], np.int32), "box_mask": np.ones((1, 1), np.float32)}
  matches = np.asarray(jax.jit(box_lib.match)(ALL_ANCHORS, truth[None], np.ones(1, np.float32)))
  positive = np.flatnonzero(matches == 0)
  assert anchor in positive
  draw = np.random.default_rng(1)
  params = {"logits": draw.normal(size=(1, N, K)).astype(np.float32),
            "boxes": draw.normal(size=(1, N, 4)).astype(np.float32)}
  task = Detection(Fixed(), K, ANCHORS, smooth_l1_beta=0.0)
  assert compiled.denominators(task, batch)["positives"] == len(positive)
  out = compiled.loss(task, batch, params, train=True)
  p = 1 / (1 + np.exp(-params["logits"][0]))
  expected = 0.0
  for n in range(N):
    for k in range(K):
      if matches[n] == -2:
        continue
      if matches[n] == 0 and k == 2:
        expected -= 0.25 * (1 - p[n, k])**2 * np.log(p[n, k])
      else:
        expected -= 0.75 * p[n, k]**2 * np.log(1 - p[n, k])
  code = np.asarray(encode(truth, ALL_ANCHORS[positive]))
  box = np.abs(params["boxes"][0, positive] - code).sum()
  np.testing.assert_allclose(out.metrics["classification_loss"][0], expected, rtol=1e-5)
  np.testing.assert_allclose(out.metrics["box_loss"][0], box, rtol=1e-5)
  np.testing.assert_allclose(out.loss, (expected + box) / len(positive), rtol=1e-5)
  np.testing.assert_allclose(task.summarize(out.metrics)["loss"], out.loss, rtol=1e-6)


def test_shares_of_uneven_parts_add_up_to_the_whole():
  batch = make_batch(4, mask=np.array([1, 1, 0, 1], np.float32))
  params = linear_params(batch)
  denominators = compiled.denominators(TASK, batch)
  share = lambda rows: compiled.loss_and_grad(TASK, params, {k: v[rows] for k, v in batch.items()}, denominators)
  whole = share(slice(None))
  parts = [share(slice(i, i + 2)) for i in (0, 2)]
  jax.tree.map(lambda a, *xs: np.testing.assert_allclose(sum(xs), a, rtol=1e-4, atol=1e-5), whole, *parts)


def test_padding_changes_nothing_neither_rows_nor_objects():
  batch = make_batch(2)
  params = linear_params(batch)
  more = {name: np.concatenate([x, x[:1]]) for name, x in batch.items()}
  more["mask"][2] = 0
  behind = {"boxes": np.full((3, 2, 4), np.nan, np.float32), "box_label": np.full((3, 2), -1, np.int32),
            "box_mask": np.zeros((3, 2), np.float32)}
  more |= {name: np.concatenate([more[name], x], axis=1) for name, x in behind.items()}
  results = [compiled.loss_and_grad(TASK, params, b) for b in (batch, more)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_an_image_without_objects_trains_as_background():
  batch = make_batch(2, box_mask=np.zeros((2, 4), np.float32))
  params = linear_params(batch)
  denominators = compiled.denominators(TASK, batch)
  assert denominators["positives"] == 0
  loss, grad, metrics = compiled.loss_and_grad(TASK, params, batch, denominators)
  assert loss > 0 and metrics["box_loss"][0] == 0
  assert not np.any(grad["boxes"]["bias"]) and (grad["logits"]["bias"] > 0).all()  # all learn to say no
  np.testing.assert_allclose(TASK.summarize(metrics)["loss"], loss, rtol=1e-6)


def perfect_outputs(batch):
  """Logits and codes of a detector that is never wrong, one anchor for each object."""
  logits, code = np.full((len(batch["boxes"]), N, K), -9.0), np.zeros((len(batch["boxes"]), N, 4))
  taken = set()
  for i, m in itertools.product(*map(range, batch["box_mask"].shape)):
    if batch["box_mask"][i, m]:
      overlap = np.array(box_iou(batch["boxes"][i, m], ALL_ANCHORS))
      n = next(n for n in np.argsort(-overlap) if (i, n) not in taken)
      taken.add((i, n))
      logits[i, n, batch["box_label"][i, m]] = 4 - 0.1 * m
      code[i, n] = encode(batch["boxes"][i, m], ALL_ANCHORS[n])
  return {"logits": logits.astype(np.float32), "boxes": code.astype(np.float32)}


def apart(batch):
  """The batch with boxes that do not overlap, so that none is suppressed."""
  corner = np.array([[0, 0], [16, 0], [0, 16], [16, 16]], np.float32)
  boxes = np.concatenate([corner, corner + [9, 13]], axis=-1)
  return {**batch, "boxes": np.broadcast_to(boxes, batch["boxes"].shape).astype(np.float32)}


def evaluate(task, batch, variables):
  predictions = compiled.predict(task, variables, batch)
  return predictions, task.evaluate(iter([(predictions, batch)]), {}, {"classes": "abc"})


def test_a_perfect_detector_is_found_to_be_perfect():
  batch = apart(make_batch(3))
  task = Detection(Fixed(), K, ANCHORS, max_detections=7)
  predictions, found = evaluate(task, batch, {"params": perfect_outputs(batch)})
  assert predictions["boxes"].shape == (3, 7, 4)
  np.testing.assert_array_equal(predictions["valid"].sum(axis=1), [1, 2, 3])
  assert (np.diff(predictions["scores"]) <= 0).all()
  for i in range(3):
    np.testing.assert_allclose(predictions["boxes"][i, :i + 1], batch["boxes"][i, :i + 1], atol=1e-4)
    np.testing.assert_array_equal(predictions["labels"][i, :i + 1], batch["box_label"][i, :i + 1])
  assert found.metrics["ap"] == found.metrics["ap50"] == found.metrics["ap75"] == found.metrics["ar100"] == 1
  assert "ap_large" not in found.metrics and found.metrics["ap_small"] == 1
  assert sum(row["objects"] for row in found.tables["classes"]) == 6
  assert all(row["ap"] == 1 for row in found.tables["classes"])
  assert set(found.figures) == {"detections"}


def test_predictions_are_suppressed_within_a_class_and_cut_by_score():
  batch = apart(make_batch(1, objects=4))
  outputs = {"logits": np.full((1, N, K), -9.0, np.float32), "boxes": np.zeros((1, N, 4), np.float32)}
  box = np.array([4., 4, 14, 14])
  for n, k, score in ((3, 0, 2.0), (4, 0, 3.0), (5, 1, 1.0), (6, 0, -4.0)):
    outputs["logits"][0, n, k], outputs["boxes"][0, n] = score, encode(box, ALL_ANCHORS[n])
  task = Detection(Fixed(), K, ANCHORS, max_detections=5)
  out = compiled.predict(task, {"params": outputs}, batch)
  np.testing.assert_array_equal(out["valid"][0], [True, True, False, False, False])
  np.testing.assert_array_equal(out["labels"][0, :2], [0, 1])
  np.testing.assert_allclose(out["scores"][0], [1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1)), 0, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(out["boxes"][0, :2], [box, box], atol=1e-4)


def test_a_score_of_just_the_threshold_is_no_detection():
  batch = apart(make_batch(1))
  logits = np.full((1, N, K), -9.0, np.float32)
  logits[0, 3, 0], logits[0, 30, 0] = 0, 1e-3  # scores of 1/2 exactly, and just above
  outputs = {"logits": logits, "boxes": np.zeros((1, N, 4), np.float32)}
  task = Detection(Fixed(), K, ANCHORS, score_threshold=0.5, max_detections=2)
  out = compiled.predict(task, {"params": outputs}, batch)
  np.testing.assert_array_equal(out["valid"][0], [True, False])
  assert out["scores"][0, 0] > 0.5


def test_candidates_of_every_level_come_before_suppression():
  batch = apart(make_batch(1))
  logits = np.tile(np.linspace(0, 2, N)[:, None], (1, 1, K)).astype(np.float32)
  outputs = {"logits": logits, "boxes": np.zeros((1, N, 4), np.float32)}
  out = compiled.predict(Detection(Fixed(), K, ANCHORS, candidates=1, max_detections=9), {"params": outputs}, batch)
  assert out["valid"].sum() == 2  # one of each level


def test_average_precision_by_hand():
  """Two objects; detections right, wrong, right: precision 1 up to recall 1/2, then 2/3.

  COCO reads it at 101 recalls: 51 of them up to 1/2, so that AP50 = (51 + 50 * 2/3) / 101.
  """
  objects = {"boxes": np.array([[0., 0, 10, 10], [20, 20, 40, 40]]), "labels": np.array([0, 0])}
  found = {"boxes": np.array([[0., 0, 10, 10], [50, 50, 60, 60], [20, 20, 40, 40]]), "labels": np.zeros(3, int),
           "scores": np.array([0.9, 0.8, 0.7])}
  metrics, table = detection.average_precision([(64, 64)], [objects], [found], ["thing", "other"])
  np.testing.assert_allclose(metrics["ap50"], (51 + 50 * 2 / 3) / 101, rtol=1e-6)
  assert [row["class"] for row in table] == ["thing"] and table[0]["objects"] == 2
  np.testing.assert_allclose(table[0]["ap50"], metrics["ap50"], rtol=1e-6)
  found["boxes"][0] = [0, 0, 10, 6]  # an IoU of 0.6: right at 0.5, 0.55 and 0.6 alone
  worse, _ = detection.average_precision([(64, 64)], [objects], [found], ["thing", "other"])
  np.testing.assert_allclose(worse["ap50"], metrics["ap50"], rtol=1e-6)
  assert worse["ap75"] < metrics["ap75"]


def test_average_precision_equals_the_tools_own_evaluation_of_files(tmp_path):
  """Annotations and results as COCO's files have them, given to the tool as its users do."""
  from faster_coco_eval import COCO, COCOeval_faster

  draw = np.random.default_rng(0)
  images, truths, found, annotations, results = [], [], [], [], []
  for i in range(12):
    corner = draw.uniform(0, 200, (5, 2))
    boxes = np.concatenate([corner, corner + draw.uniform(10, 150, (5, 2))], axis=-1)
    labels = draw.integers(0, K, 5)
    noisy = np.concatenate([boxes + draw.normal(size=boxes.shape) * 6, boxes[:2] + 40])
    guess = np.concatenate([np.where(draw.random(5) < 0.8, labels, draw.integers(0, K, 5)), labels[:2]])
    scores = draw.random(7)
    images.append((300, 400))
    truths.append({"boxes": boxes, "labels": labels})
    found.append({"boxes": noisy, "labels": guess, "scores": scores})
    for box, label in zip(boxes, labels):
      x0, y0, x1, y1 = box
      annotations.append({"id": len(annotations) + 1, "image_id": 100 + i, "category_id": int(label) + 1, "iscrowd": 0,
                          "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    for (x0, y0, x1, y1), label, score in zip(noisy, guess, scores):
      results.append({"image_id": 100 + i, "category_id": int(label) + 1, "score": score,
                      "bbox": [x0, y0, x1 - x0, y1 - y0]})
  (tmp_path / "truth.json").write_text(json.dumps({
      "images": [{"id": 100 + i, "width": 400, "height": 300} for i in range(12)], "annotations": annotations,
      "categories": [{"id": k + 1, "name": f"{k}"} for k in range(K)]}))
  (tmp_path / "results.json").write_text(json.dumps(results))
  truth = COCO(str(tmp_path / "truth.json"))
  tool = COCOeval_faster(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
  tool.evaluate()
  tool.accumulate()
  tool.summarize()
  metrics, table = detection.average_precision(images, truths, found, "abc")
  assert 0.1 < metrics["ap"] < 0.9
  np.testing.assert_allclose(list(metrics.values()), tool.stats[:9], rtol=1e-9)
  np.testing.assert_allclose(np.mean([row["ap"] for row in table]), metrics["ap"], rtol=1e-9)


def test_detections_of_a_crowd_are_neither_right_nor_wrong():
  """Three in the crowd's box, surer than the object's: without the crowd they are three false alarms before it."""
  one = {"boxes": np.array([[50., 50, 60, 60]]), "labels": np.array([0])}
  crowd = {"boxes": np.array([[0., 0, 30, 30]]), "labels": np.array([0])}
  found = {"boxes": np.array([[0., 0, 10, 10], [10, 10, 20, 20], [20, 0, 30, 10], [50, 50, 60, 60]]),
           "labels": np.zeros(4, int), "scores": np.array([0.9, 0.8, 0.7, 0.6])}
  with_crowd, table = detection.average_precision([(64, 64)], [one], [found], ["thing"], [crowd])
  assert with_crowd["ap"] == 1 and table[0]["objects"] == 1
  without, _ = detection.average_precision([(64, 64)], [one], [found], ["thing"])
  np.testing.assert_allclose(without["ap"], 0.25, rtol=1e-6)


def test_an_evaluation_knows_crowds():
  batch = apart(make_batch(1, objects=4, box_mask=np.array([[1., 0, 0, 0]])))
  batch["box_label"] = np.ones_like(batch["box_label"])
  predictions = {"boxes": batch["boxes"][:, 1::-1], "labels": batch["box_label"][:, :2],
                 "scores": np.array([[0.9, 0.8]]), "valid": np.ones((1, 2), bool)}
  task = Detection(Fixed(), K, ANCHORS)
  wrong = task.evaluate(iter([(predictions, batch)]), {}, {})
  np.testing.assert_allclose(wrong.metrics["ap"], 0.5, rtol=1e-6)
  right = task.evaluate(iter([(predictions, {**batch, "host/box_crowd": np.array([[0., 1, 0, 0]])})]), {}, {})
  assert right.metrics["ap"] == 1


def test_without_detections_or_objects_there_is_an_evaluation_all_the_same():
  none = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
  one = {"boxes": np.array([[0., 0, 5, 5]]), "labels": np.array([1]), "scores": np.array([0.9])}
  metrics, table = detection.average_precision([(9, 9)], [one], [none], "abc")
  assert metrics["ap"] == 0 and table == [{"class": "b", "objects": 1, "ap": 0.0, "ap50": 0.0}]
  assert detection.average_precision([(9, 9)], [none], [one], "abc") == ({}, [])
  task = Detection(Fixed(), K, ANCHORS)
  found = task.evaluate(iter([]), {}, {})
  assert not found.metrics and not found.figures


def test_mistakes_are_misses_and_false_alarms():
  truth = {"boxes": np.array([[0., 0, 10, 10], [20, 20, 30, 30]]), "labels": np.array([0, 1])}
  count = lambda boxes, labels: detection.count_mistakes(
      truth, {"boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels)})
  assert count(truth["boxes"], [0, 1]) == 0
  assert count([], []) == 2
  assert count(truth["boxes"], [0, 0]) == 2  # one missed, one of the wrong class
  assert count([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]], [0, 0, 1]) == 1  # found twice
  assert count([[0, 0, 10, 5], [20, 20, 30, 30]], [0, 1]) == 0  # an IoU of 1/2 is enough


def test_the_images_with_the_most_mistakes_are_pictured(monkeypatch):
  drawn = {}
  monkeypatch.setattr(report, "detections", lambda *args, **kwargs: drawn.update(truths=args[1], found=args[2]))
  monkeypatch.setattr(detection, "MAX_PICTURED", 2)
  batch = apart(make_batch(4))
  empty = {"boxes": np.zeros((4, 1, 4)), "labels": np.zeros((4, 1), int), "scores": np.ones((4, 1)),
           "valid": np.zeros((4, 1), bool)}
  task = Detection(Fixed(), K, ANCHORS)
  task.evaluate(iter([(empty, batch)]), {}, {}).figures["detections"]()
  assert [len(truth["boxes"]) for truth in drawn["truths"]] == [4, 3]
  assert not any(len(found["boxes"]) for found in drawn["found"])
  just = {**empty, "scores": np.full((4, 1), detection.SHOWN_SCORE), "valid": np.ones((4, 1), bool)}
  task.evaluate(iter([(just, batch)]), {}, {}).figures["detections"]()
  assert [len(found["boxes"]) for found in drawn["found"]] == [1, 1]


def test_the_picture_has_a_box_for_each_object_and_each_detection():
  truth = {"boxes": np.array([[1., 2, 8, 9]])}
  found = {"boxes": np.array([[1., 2, 8, 9], [3, 3, 5, 5]]), "labels": np.array([1, 0]), "scores": np.array([0.9, 0.6])}
  figure = report.detections([np.zeros((10, 10, 1)), np.zeros((10, 10, 3))], [truth, truth], [found, found], "ab")
  panel = figure.axes[0]
  assert len(panel.patches) == 3
  assert panel.patches[0].get_bbox().extents.tolist() == [0.5, 1.5, 7.5, 8.5]  # pixel 0 is drawn from -0.5 to 0.5
  assert [text.get_text() for text in panel.texts] == ["b 90%", "a 60%"]


def test_decode_lists_what_is_sure():
  predictions = {"boxes": np.arange(12.).reshape(1, 3, 4), "labels": np.array([[1, 0, 1]]),
                 "scores": np.array([[0.9, 0.6, 0.2]]), "valid": np.array([[True, True, True]])}
  row, = detection.decode(predictions, {"classes": ["cat", "dog"]})
  assert row["objects"] == "dog (90%), cat (60%)"
  assert row["detections"]["2"] == {"label": "cat", "score": 0.6, "box": [4.0, 5.0, 6.0, 7.0]}
  json.dumps(row)
  predictions["scores"][:] = detection.SHOWN_SCORE  # is enough
  assert len(next(detection.decode(predictions, {}))["detections"]) == 3
  predictions["valid"][:] = False
  assert next(detection.decode(predictions, {}))["objects"] == "none"


@pytest.mark.parametrize("field, value, message", [
    ("alpha", 1.5, "from 0 to 1"), ("gamma", -1.0, "0 or more"), ("smooth_l1_beta", float("inf"), "0 or more"),
    ("score_threshold", -0.1, "from 0 to 1"), ("candidates", 0, "positive"), ("max_detections", 0, "positive")])
def test_bad_settings_are_named(field, value, message):
  with pytest.raises(UserError, match=message) as error:
    Detection(Linear(), K, ANCHORS, **{field: value})
  assert f"--config.model.{field}={value}" in str(error.value)
