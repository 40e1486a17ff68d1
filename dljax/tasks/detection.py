"""Detection: which objects are in an image, and where, by a network that judges anchors.

The loss is the focal loss of every anchor and class plus a loss of the boxes of the anchors that
hold an object. Both are divided by the number of these anchors (Lin et al. 2017, "Focal Loss for
Dense Object Detection", sections 3 and 4), counted over the whole batch, as in the authors' code.
Average precision is that of the COCO challenge (Lin et al. 2014, "Microsoft COCO: Common Objects
in Context"), computed by its own evaluation.

Dimensions: B batch, N anchors, M objects (padded), K classes, D detections.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.errors import UserError
from dljax.tasks import boxes as box_lib
from dljax.tasks.base import (
    ALL, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables, Worst,
    at_least_float32, class_names)

MAX_PICTURED = 8
SHOWN_SCORE = 0.5  # detections with at least this score are drawn and listed
# The order is that of COCO's evaluation.
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")


@dataclasses.dataclass(frozen=True)
class Detection(TaskBase):
  """Finds objects of `num_classes` kinds.

  Batches have image [B, H, W, C], boxes f32[B, M, 4] as (x0, y0, x1, y1) in pixels, box_label
  i32[B, M], box_mask f32[B, M] (0 is padding) and mask f32[B]. An image without objects is all
  background.

  Attributes:
    model: called as `model(image, mask, train=...)`, gives "logits" [B, N, K] and "boxes"
      [B, N, 4], for the anchors on its `grids(height, width)`.
    num_classes: the number of classes, K.
    anchors: the anchors' sizes and shapes.
    alpha: the weight of objects in the focal loss; the background's is 1 - alpha.
    gamma: how much less easy examples count; 0 gives the cross-entropy.
    smooth_l1_beta: the error of a box's code below which its loss is quadratic; 0 gives L1.
    score_threshold: a detection's score is above it.
    nms_threshold: the IoU above which the lower-scored of two detections of a class is dropped.
    candidates: the largest number of candidates that each level hands to suppression.
    max_detections: the largest number of detections in an image, D.

  Raises:
    UserError: a value is out of range.
  """

  model: nn.Module
  num_classes: int
  anchors: box_lib.Anchors
  alpha: float = 0.25
  gamma: float = 2.0
  smooth_l1_beta: float = 0.0
  score_threshold: float = 0.05
  nms_threshold: float = 0.5
  candidates: int = 1000
  max_detections: int = 100

  evaluate_reads = ("boxes", "box_label", "box_mask", "host/box_crowd")
  evaluate_draws = ("image",)

  def __post_init__(self):
    for name in ("alpha", "score_threshold", "nms_threshold"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f"--config.model.{name}={getattr(self, name)}: give a number from 0 to 1")
    for name in ("gamma", "smooth_l1_beta"):
      if not 0 <= getattr(self, name) < math.inf:
        raise UserError(f"--config.model.{name}={getattr(self, name)}: give 0 or more")
    for name in ("candidates", "max_detections"):
      if getattr(self, name) < 1:
        raise UserError(f"--config.model.{name}={getattr(self, name)}: give a positive number")

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return self.model.init({"params": rng}, batch["image"], train=False)

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of anchors that hold an object."""
    return {"positives": jnp.sum(self._match(batch) >= 0, dtype=jnp.float32)}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, classification_loss, box_loss, per anchor with an object."""
    del player  # one player: all parameters
    output, model_state = self.apply(
        params, model_state, batch, rng, train, batch["image"], batch["mask"])
    logits, code = at_least_float32(output["logits"]), at_least_float32(output["boxes"])

    matches = self._match(batch)  # [B, N]
    row = jnp.maximum(matches, 0)
    label = jnp.where(matches >= 0, jnp.take_along_axis(batch["box_label"], row, axis=1), -1)
    counts = (matches != box_lib.IGNORED) & (batch["mask"][:, None] > 0)
    losses = focal_loss(logits, jax.nn.one_hot(label, self.num_classes, dtype=bool), self.alpha,
                        self.gamma)
    classification = jnp.sum(losses * counts[..., None])

    found = (matches >= 0) & counts
    target = box_lib.encode(jnp.take_along_axis(batch["boxes"], row[..., None], axis=1),
                            self._anchors(batch))
    # The code may be infinite where the anchor holds no object.
    error = jnp.where(found[..., None], code - target, 0)
    box = jnp.sum(smooth_l1(error, self.smooth_l1_beta))

    total, count = classification + box, jnp.sum(found, dtype=logits.dtype)
    metrics = {"loss": (total, count), "classification_loss": (classification, count),
               "box_loss": (box, count)}
    return LossOutput(loss=total / jnp.maximum(denominators["positives"], 1), metrics=metrics,
                      model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """The detections of each image, those with the highest scores first.

    A batch of users' pictures has also place f32[B, 4], the box of the image that the picture
    fills, and size f32[B, 2], the picture's own width and height. The boxes are then in the
    picture's own pixels.

    Returns:
      boxes f32[B, D, 4] (x0, y0, x1, y1) in pixels, scores f32[B, D], labels i32[B, D] and valid
      bool[B, D], false where there were no more detections.
    """
    del rng, context  # nothing is drawn
    output = self.model.apply(variables, batch["image"], batch["mask"], train=False)
    height, width = batch["image"].shape[1:3]
    grids = self.model.grids(height, width)
    sizes = [rows * columns * self.anchors.per_cell for rows, columns in grids]
    found = jax.vmap(functools.partial(self._select, self._anchors(batch), sizes, height, width))(
        *(output[name].astype(jnp.float32) for name in ("logits", "boxes")))
    if "place" in batch:
      found["boxes"] = jax.vmap(box_lib.to_original_pixels)(found["boxes"], batch["place"],
                                                            batch["size"])
    return found

  def _select(
      self, anchors: Array, sizes: Sequence[int], height: int, width: int, logits: Array,
      code: Array,
  ) -> dict[str, Array]:
    """The detections of one image.

    Args:
      anchors: [N, 4].
      sizes: the number of anchors on each level.
      height, width: the image's size in pixels.
      logits: [N, K].
      code: [N, 4].
    """
    best, start = [], 0
    for size in sizes:
      values = logits[start:start + size].reshape(-1)
      values, index = jax.lax.top_k(values, min(self.candidates, values.size))
      best.append((values, start * self.num_classes + index))
      start += size
    values, index = (jnp.concatenate(xs) for xs in zip(*best))
    scores = jax.nn.sigmoid(values)
    labels, anchor = index % self.num_classes, index // self.num_classes
    boxes = box_lib.clip(box_lib.decode(code[anchor], anchors[anchor]), height, width)
    kept, valid = box_lib.suppress(
        boxes, jnp.where(scores > self.score_threshold, scores, -jnp.inf), labels,
        count=self.max_detections, threshold=self.nms_threshold)
    return {"boxes": boxes[kept], "scores": jnp.where(valid, scores[kept], 0),
            "labels": labels[kept], "valid": valid}

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    losses = ("loss", "classification_loss", "box_loss")
    return dict.fromkeys(losses, MIN) | dict.fromkeys(METRICS, MAX)

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The means over anchors with an object; the sums where there were none, as in the loss."""
    return {name: float(total) / max(float(count), 1) for name, (total, count) in sums.items()}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Average precision and recall over all classes, a table by class, and the figure detections.

    ap_small counts objects below 32^2 pixels, ap_large those from 96^2, ap_medium the others;
    areas are those of boxes in the images that the network sees. Metrics without an object are
    left out. Detections in a box that stands for a crowd ("host/box_crowd" f32[B, M], if the batch
    has it) are neither right nor wrong. The figure shows the images with the most mistakes.
    """
    del sums
    names = class_names(assets, self.num_classes)
    worst, images, truths, crowds, found = Worst(MAX_PICTURED), [], [], [], []
    for predictions, batch in rows:
      here, mistakes = [], []  # what is drawn of each image; minus the number of its mistakes
      for i in range(len(batch["boxes"])):
        objects, there = batch["box_mask"][i] > 0, predictions["valid"][i]
        crowd = np.zeros_like(objects)
        if "host/box_crowd" in batch:
          crowd = batch["host/box_crowd"][i] > 0
        truth = {"boxes": batch["boxes"][i][objects], "labels": batch["box_label"][i][objects]}
        detected = {name: predictions[name][i][there] for name in ("boxes", "labels", "scores")}
        images.append(batch["image"].shape[1:3])
        truths.append(truth)
        crowds.append({"boxes": batch["boxes"][i][crowd], "labels": batch["box_label"][i][crowd]})
        found.append(detected)
        sure = {name: values[detected["scores"] >= SHOWN_SCORE]
                for name, values in detected.items()}
        here.append((truth, sure))
        mistakes.append(-count_mistakes(truth, sure))
      worst.add(mistakes, lambda kept: [
          (image, *here[i]) for i, image in zip(kept, batch["image"][kept])])
    metrics, table = average_precision(images, truths, found, names, crowds)
    figures = {}
    if worst.rows:
      pictured, objects, detected = zip(*worst.rows)
      figures["detections"] = functools.partial(
          report.detections, pictured, objects, detected, names,
          caption="Images with the most mistakes")
    return Findings(metrics, figures, {"classes": table})

  def _anchors(self, batch: Batch) -> Array:
    """The anchors of the batch's images, [N, 4]."""
    height, width = batch["image"].shape[1:3]
    return jnp.asarray(self.anchors.boxes(self.model.grids(height, width), height, width))

  def _match(self, batch: Batch) -> Array:
    """i32[B, N]; see `boxes.match`. No anchor holds an object in a row that is padding."""
    mask = batch["box_mask"] * batch["mask"][:, None]
    return jax.vmap(functools.partial(box_lib.match, self._anchors(batch)))(batch["boxes"], mask)


def focal_loss(logits: Array, target: Array, alpha: float = 0.25, gamma: float = 2.0) -> Array:
  """-alpha_t (1 - p_t)^gamma log(p_t), elementwise (equation 5).

  Args:
    logits: [...].
    target: bool[...], the truth.
    alpha: the weight where the target is true; it is 1 - alpha where it is false.
    gamma: the focus on examples that are still uncertain.
  """
  z = jnp.where(target, logits, -logits)  # p_t = sigmoid(z)
  weight = jnp.where(target, alpha, 1 - alpha) * jnp.exp(-gamma * jax.nn.softplus(z))
  return weight * jax.nn.softplus(-z)


def smooth_l1(error: Array, beta: float) -> Array:
  """|error| - beta / 2, but error^2 / (2 beta) where |error| < beta; elementwise.

  Girshick 2015, "Fast R-CNN", section 2.3, where beta is 1.
  """
  size = jnp.abs(error)
  return size if beta == 0 else jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def average_precision(
    images: Sequence[tuple[int, int]], truths: Sequence[Mapping[str, np.ndarray]],
    detections: Sequence[Mapping[str, np.ndarray]], names: Sequence[str],
    crowds: Sequence[Mapping[str, np.ndarray]] = (),
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """COCO's average precision and recall, by its own evaluation.

  Args:
    images: (height, width) of each image.
    truths: "boxes" [m, 4] and "labels" [m] of each image's objects.
    detections: "boxes" [d, 4], "labels" [d] and "scores" [d] of each image's detections.
    names: the classes' names.
    crowds: "boxes" and "labels" of each image's crowds, boxes that each stand for many objects;
      or ().

  Returns:
    Those of `METRICS` that there are objects for; and for each class with objects their number, ap
    and ap50.
  """
  from faster_coco_eval import COCO, COCOeval_faster  # pylint: disable=g-import-not-at-top

  if not images:
    return {}, []
  annotations = [
      {"image_id": i, "category_id": int(label), "bbox": _corner_and_sides(box),
       "area": float(box_lib.area(box)), "iscrowd": is_crowd}
      for is_crowd, images_boxes in enumerate((truths, crowds))
      for i, truth in enumerate(images_boxes)
      for box, label in zip(truth["boxes"], truth["labels"])]
  truth = COCO({
      "images": [{"id": i, "height": int(height), "width": int(width)}
                 for i, (height, width) in enumerate(images)],
      "categories": [{"id": i, "name": str(name)} for i, name in enumerate(names)],
      # The evaluation takes an id of 0 for a missing one.
      "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)]})
  results = truth.loadRes([
      {"image_id": i, "category_id": int(label), "bbox": _corner_and_sides(box),
       "score": float(score)}
      for i, found in enumerate(detections)
      for box, label, score in zip(found["boxes"], found["labels"], found["scores"])])
  evaluation = COCOeval_faster(truth, results, "bbox")
  evaluation.run()
  metrics = {name: float(value) for name, value in zip(METRICS, evaluation.stats) if value >= 0}
  # Axes IoU, recall, class; for objects of all areas, with at most 100 detections in an image.
  precision = evaluation.eval["precision"][..., 0, -1]
  counts = np.bincount([a["category_id"] for a in annotations if not a["iscrowd"]],
                       minlength=len(names))
  table = [{"class": str(name), "objects": int(counts[i]), "ap": float(precision[..., i].mean()),
            "ap50": float(precision[0, :, i].mean())} for i, name in enumerate(names) if counts[i]]
  return metrics, table


def _corner_and_sides(box: np.ndarray) -> list[float]:
  x0, y0, x1, y1 = map(float, box)
  return [x0, y0, x1 - x0, y1 - y0]


def count_mistakes(
    truth: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], threshold: float = 0.5,
) -> int:
  """The number of objects that were not found plus that of detections without an object.

  A detection finds an object of its class that no detection before it has found.

  Args:
    truth: "boxes" [m, 4] and "labels" [m].
    found: "boxes" [d, 4] and "labels" [d], the highest scores first.
    threshold: the least IoU of a detection with its object.
  """
  free = np.ones(len(truth["boxes"]), bool)
  for box, label in zip(found["boxes"], found["labels"]):
    overlap = np.where(free & (truth["labels"] == label), _iou(box, truth["boxes"]), -1)
    if len(overlap) and overlap.max() >= threshold:
      free[overlap.argmax()] = False
  hits = np.sum(~free)
  return int(len(free) - hits + len(found["boxes"]) - hits)


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """`boxes.iou` of one box with [m] others, in NumPy, as m changes from image to image."""
  side = np.maximum(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0)
  shared = side[:, 0] * side[:, 1]
  return shared / np.maximum(box_lib.area(box) + box_lib.area(boxes) - shared, 1e-9)


def decode(predictions: PyTree, assets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """One row for each image, to print and to write.

  Args:
    predictions: the result of `Detection.predict`.
    assets: the run's assets; "classes" are the class names.

  Yields:
    {"objects": "7 (99%), 3 (87%)", "detections": {"1": {"label": name, "score": p, "box":
    [x0, y0, x1, y1]}, ...}}, with scores of at least `SHOWN_SCORE`, the highest first.
  """
  fields = {name: np.asarray(predictions[name]) for name in ("boxes", "labels", "scores", "valid")}
  names = class_names(assets, int(fields["labels"].max(initial=-1)) + 1)
  for boxes, labels, scores, valid in zip(*fields.values()):
    found = [(names[label], float(score), [round(float(x), 2) for x in box])
             for box, label, score, there in zip(boxes, labels, scores, valid) if there
             and score >= SHOWN_SCORE]
    yield {
        "objects": ", ".join(f"{name} ({score:.0%})" for name, score, _ in found) or "none",
        "detections": {str(i + 1): {"label": name, "score": score, "box": box}
                       for i, (name, score, box) in enumerate(found)},
    }
