"""Detection: which objects are in an image, and where; by a network that judges anchors.

The loss is the focal loss of every anchor and class, plus a loss of the boxes of those that hold an object, both
divided by how many these are (Lin et al. 2017, "Focal Loss for Dense Object Detection", sections 3 and 4; as in the
authors' code, they are counted over the whole batch). Average precision is that of the COCO challenge (Lin et al.
2014, "Microsoft COCO: Common Objects in Context"), computed by its own evaluation.

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
    ALL, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables,
    at_least_float32)
from dljax.tasks.classification import class_names

MAX_PICTURED = 8
SHOWN_SCORE = 0.5  # from which on a detection is drawn and listed
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")  # in the tool's order


@dataclasses.dataclass(frozen=True)
class Detection(TaskBase):
  """Finds objects of `num_classes` kinds.

  Batches have image [B, H, W, C], boxes f32[B, M, 4] as (x0, y0, x1, y1) in pixels, box_label i32[B, M], box_mask
  f32[B, M] (0 is padding) and mask f32[B]. An image without objects is all background.

  Attributes:
    model: called as `model(image, mask, train=...)`, gives "logits" [B, N, K] and "boxes" [B, N, 4], for the anchors
      on its `grids(height, width)`.
    num_classes: K.
    anchors: their shapes.
    alpha: weight of the objects in the focal loss, the background's being 1 - alpha.
    gamma: how much easy examples are played down; 0 gives the cross-entropy.
    smooth_l1_beta: error of a box's code below which its loss is quadratic; 0 gives L1.
    score_threshold: least score of a detection.
    nms_threshold: IoU above which of two detections of a class the lesser is dropped.
    candidates: most of a level that come before suppression.
    max_detections: D.

  Raises:
    UserError: values out of range.
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

  evaluate_reads = ("image", "boxes", "box_label", "box_mask")

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
    """See `Task.loss`. Metrics, each per anchor that holds an object: loss, classification_loss, box_loss."""
    del player  # one player: all parameters
    output, model_state = self.apply(
        params, model_state, batch, rng, train, batch["image"], batch["mask"])
    logits, code = at_least_float32(output["logits"]), at_least_float32(output["boxes"])

    matches = self._match(batch)  # [B, N]
    row = jnp.maximum(matches, 0)
    label = jnp.where(matches >= 0, jnp.take_along_axis(batch["box_label"], row, axis=1), -1)
    counts = (matches != box_lib.IGNORED) & (batch["mask"][:, None] > 0)
    losses = focal_loss(logits, jax.nn.one_hot(label, self.num_classes, dtype=bool), self.alpha, self.gamma)
    classification = jnp.sum(losses * counts[..., None])

    found = (matches >= 0) & counts
    target = box_lib.encode(jnp.take_along_axis(batch["boxes"], row[..., None], axis=1), self._anchors(batch))
    error = jnp.where(found[..., None], code - target, 0)  # where there is none, the code may be infinite
    box = jnp.sum(smooth_l1(error, self.smooth_l1_beta))

    total, count = classification + box, jnp.sum(found, dtype=logits.dtype)
    metrics = {"loss": (total, count), "classification_loss": (classification, count), "box_loss": (box, count)}
    return LossOutput(loss=total / jnp.maximum(denominators["positives"], 1), metrics=metrics, model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """The detections of each image, the surest first.

    Where the batch says by place f32[B, 4], a box, where in the image a picture lies, and by size f32[B, 2] how wide
    and high it was itself, the boxes are in the picture's own pixels.

    Returns:
      boxes f32[B, D, 4] (x0, y0, x1, y1) in pixels, scores f32[B, D], labels i32[B, D] and valid bool[B, D], false
      where there were no more.
    """
    del rng, context  # nothing is drawn
    output = self.model.apply(variables, batch["image"], batch["mask"], train=False)
    height, width = batch["image"].shape[1:3]
    grids = self.model.grids(height, width)
    sizes = [rows * columns * self.anchors.per_cell for rows, columns in grids]
    found = jax.vmap(functools.partial(self._select, self._anchors(batch), sizes, height, width))(
        *(output[name].astype(jnp.float32) for name in ("logits", "boxes")))
    if "place" in batch:
      found["boxes"] = jax.vmap(box_lib.to_original_pixels)(found["boxes"], batch["place"], batch["size"])
    return found

  def _select(
      self, anchors: Array, sizes: Sequence[int], height: int, width: int, logits: Array, code: Array,
  ) -> dict[str, Array]:
    """The detections of one image: logits [N, K], code [N, 4]; `sizes` of the levels, in anchors."""
    best, start = [], 0
    for size in sizes:
      values = logits[start:start + size].reshape(-1)
      values, index = jax.lax.top_k(values, min(self.candidates, values.size))
      best.append((values, start * self.num_classes + index))
      start += size
    values, index = (jnp.concatenate(xs) for xs in zip(*best))
    scores, labels, anchor = jax.nn.sigmoid(values), index % self.num_classes, index // self.num_classes
    boxes = box_lib.clip(box_lib.decode(code[anchor], anchors[anchor]), height, width)
    kept, valid = box_lib.suppress(
        boxes, jnp.where(scores > self.score_threshold, scores, -jnp.inf), labels,
        count=self.max_detections, threshold=self.nms_threshold)
    return {"boxes": boxes[kept], "scores": jnp.where(valid, scores[kept], 0), "labels": labels[kept], "valid": valid}

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    losses = ("loss", "classification_loss", "box_loss")
    return dict.fromkeys(losses, MIN) | dict.fromkeys(METRICS, MAX)

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The means, as the loss has them: the whole where no anchor held an object."""
    return {name: float(total) / max(float(count), 1) for name, (total, count) in sums.items()}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums, assets: Mapping[str, Any],
  ) -> Findings:
    """Average precision and recall, over all classes and of each; the picture detections.

    Areas, by which ap_small (below 32^2 pixels), ap_medium and ap_large (from 96^2) are told apart, are those of the
    boxes in the images that the network sees. What has no object is left out. Detections in a box that stands for a
    crowd ("host/box_crowd" f32[B, M], where a batch has it) are neither right nor wrong. Pictured are the images with
    the most mistakes.
    """
    del sums
    names = class_names(assets, self.num_classes)
    worst, images, truths, crowds, found = [], [], [], [], []
    for predictions, batch in rows:
      for i in range(len(batch["boxes"])):
        objects, there = batch["box_mask"][i] > 0, predictions["valid"][i]
        crowd = batch["host/box_crowd"][i] > 0 if "host/box_crowd" in batch else np.zeros_like(objects)
        truth = {"boxes": batch["boxes"][i][objects], "labels": batch["box_label"][i][objects]}
        detected = {name: predictions[name][i][there] for name in ("boxes", "labels", "scores")}
        images.append(batch["image"][i].shape[:2])
        truths.append(truth)
        crowds.append({"boxes": batch["boxes"][i][crowd], "labels": batch["box_label"][i][crowd]})
        found.append(detected)
        sure = {name: values[detected["scores"] >= SHOWN_SCORE] for name, values in detected.items()}
        worst.append((count_mistakes(truth, sure), -len(worst), batch["image"][i].copy(), truth, sure))
      worst = sorted(worst, key=lambda row: row[:2], reverse=True)[:MAX_PICTURED]
    metrics, table = average_precision(images, truths, found, names, crowds)
    figure = functools.partial(
        report.detections, [row[2] for row in worst], [row[3] for row in worst], [row[4] for row in worst], names,
        caption="Images with the most mistakes") if worst else None
    return Findings(metrics, {"detections": figure} if worst else {}, {"classes": table})

  def _anchors(self, batch: Batch) -> Array:
    """[N, 4] of the batch's images."""
    height, width = batch["image"].shape[1:3]
    return jnp.asarray(self.anchors.boxes(self.model.grids(height, width), height, width))

  def _match(self, batch: Batch) -> Array:
    """i32[B, N]; see `boxes.match`. Nothing holds an object in a row that is padding."""
    mask = batch["box_mask"] * batch["mask"][:, None]
    return jax.vmap(functools.partial(box_lib.match, self._anchors(batch)))(batch["boxes"], mask)


def focal_loss(logits: Array, target: Array, alpha: float = 0.25, gamma: float = 2.0) -> Array:
  """-alpha_t (1 - p_t)^gamma log(p_t), elementwise (equation 5).

  Args:
    logits: [...].
    target: bool[...].
    alpha: weight of the true, 1 - alpha of the false.
    gamma: focus on what is not sure yet.
  """
  z = jnp.where(target, logits, -logits)  # p_t = sigmoid(z)
  weight = jnp.where(target, alpha, 1 - alpha) * jnp.exp(-gamma * jax.nn.softplus(z))
  return weight * jax.nn.softplus(-z)


def smooth_l1(error: Array, beta: float) -> Array:
  """|error| - beta / 2, and error^2 / (2 beta) where |error| < beta; elementwise (Girshick 2015, "Fast R-CNN")."""
  size = jnp.abs(error)
  return size if beta == 0 else jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def average_precision(
    images: Sequence[tuple[int, int]], truths: Sequence[Mapping[str, np.ndarray]],
    detections: Sequence[Mapping[str, np.ndarray]], names: Sequence[str],
    crowds: Sequence[Mapping[str, np.ndarray]] = (),
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """COCO's average precision and recall, by its own evaluation.

  Args:
    images: (height, width) of each.
    truths: of each, "boxes" [m, 4] and "labels" [m].
    detections: of each, "boxes", "labels" and "scores" [d].
    names: of the classes.
    crowds: of each, or of none, "boxes" and "labels" of those boxes that stand for many objects, not told apart.

  Returns:
    Those of `METRICS` that there are objects for, and for each class its number of objects, ap and ap50.
  """
  from faster_coco_eval import COCO, COCOeval_faster  # pylint: disable=g-import-not-at-top

  if not images:
    return {}, []
  annotations = [
      {"image_id": i, "category_id": int(label), "bbox": _corner_and_sides(box), "area": float(box_lib.area(box)),
       "iscrowd": is_crowd}
      for is_crowd, images_boxes in enumerate((truths, crowds))
      for i, truth in enumerate(images_boxes) for box, label in zip(truth["boxes"], truth["labels"])]
  truth = COCO({
      "images": [{"id": i, "height": int(height), "width": int(width)} for i, (height, width) in enumerate(images)],
      "categories": [{"id": i, "name": str(name)} for i, name in enumerate(names)],
      "annotations": [{"id": i + 1, **annotation} for i, annotation in enumerate(annotations)]})  # 0 would be no id
  results = truth.loadRes([
      {"image_id": i, "category_id": int(label), "bbox": _corner_and_sides(box), "score": float(score)}
      for i, found in enumerate(detections)
      for box, label, score in zip(found["boxes"], found["labels"], found["scores"])])
  evaluation = COCOeval_faster(truth, results, "bbox")
  evaluation.run()
  metrics = {name: float(value) for name, value in zip(METRICS, evaluation.stats) if value >= 0}
  precision = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, class], of all areas, at most 100 detections
  counts = np.bincount([a["category_id"] for a in annotations if not a["iscrowd"]], minlength=len(names))
  table = [{"class": str(name), "objects": int(counts[i]), "ap": float(precision[..., i].mean()),
            "ap50": float(precision[0, :, i].mean())} for i, name in enumerate(names) if counts[i]]
  return metrics, table


def _corner_and_sides(box: np.ndarray) -> list[float]:
  x0, y0, x1, y1 = map(float, box)
  return [x0, y0, x1 - x0, y1 - y0]


def count_mistakes(truth: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], threshold: float = 0.5) -> int:
  """Objects that were not found, and detections of none: of the same class, with an IoU of at least `threshold`.

  Args:
    truth: "boxes" [m, 4] and "labels" [m].
    found: "boxes" [d, 4] and "labels" [d], the surest first, which choose in this order.
    threshold: see above.
  """
  free = np.ones(len(truth["boxes"]), bool)
  for box, label in zip(found["boxes"], found["labels"]):
    overlap = np.where(free & (truth["labels"] == label), _iou(box, truth["boxes"]), -1)
    if len(overlap) and overlap.max() >= threshold:
      free[overlap.argmax()] = False
  hits = np.sum(~free)
  return int(len(free) - hits + len(found["boxes"]) - hits)


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """`boxes.iou` of one with many, [m], by NumPy: their number changes from image to image."""
  side = np.maximum(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0)
  shared = side[:, 0] * side[:, 1]
  return shared / np.maximum(box_lib.area(box) + box_lib.area(boxes) - shared, 1e-9)


def decode(predictions: PyTree, assets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """One row for each image, to print and to write.

  Args:
    predictions: what `Detection.predict` gave.
    assets: the run's assets; "classes" are the class names.

  Yields:
    {"objects": "7 (99%), 3 (87%)", "detections": {"1": {"label": name, "score": p, "box": [x0, y0, x1, y1]}, ...}},
    those of at least `SHOWN_SCORE`, the surest first.
  """
  fields = {name: np.asarray(predictions[name]) for name in ("boxes", "labels", "scores", "valid")}
  names = class_names(assets, int(fields["labels"].max(initial=-1)) + 1)
  for boxes, labels, scores, valid in zip(*fields.values()):
    found = [(names[label], float(score), [round(float(x), 2) for x in box])
             for box, label, score, there in zip(boxes, labels, scores, valid) if there and score >= SHOWN_SCORE]
    yield {
        "objects": ", ".join(f"{name} ({score:.0%})" for name, score, _ in found) or "none",
        "detections": {str(i + 1): {"label": name, "score": score, "box": box}
                       for i, (name, score, box) in enumerate(found)},
    }
