"""Segmentation: a class for each pixel.

The loss is a weighted sum of the cross-entropy of every pixel (Long et al. 2015, "Fully
Convolutional Networks for Semantic Segmentation") and of 1 minus the Dice coefficient of every
image and class (Milletari et al. 2016, "V-Net"). The score is the intersection over union (IoU) of
each class over the pixels of the whole set, and its mean over classes (Everingham et al. 2015,
"The Pascal Visual Object Classes Challenge: A Retrospective", section 2.2).

Dimensions: B batch, H height and W width of the image, h height and w width of the logits, K
classes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.errors import UserError
from dljax.ops.crop import crop
from dljax.tasks import scores
from dljax.tasks.base import (
    ALL, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables, Worst,
    at_least_float32, class_names, ratio)

MAX_CLASSES = 255  # a class is a byte, and one value is left for pixels without a class
MAX_CONFUSION_CLASSES = 50
MAX_PICTURED = 6
# In pixels. It gives a class that neither occurs nor was found a Dice coefficient of 1.
SMOOTHING = 1.0
GROUND = 0  # the class of pixels that belong to no object
LEAST_SHARE = 0.001  # classes with at least this share of an image's pixels are listed


@dataclasses.dataclass(frozen=True)
class Segmentation(TaskBase):
  """Gives each pixel one of `num_classes` labels.

  Batches have image [B, H, W, C], segmentation i32[B, H, W], negative where a pixel has no class,
  and mask f32[B]. Pixels without a class do not count, nor do those at the border for which the
  network gives no logits.

  Attributes:
    model: called as `model(image, mask, train=...)`, gives logits [B, H - margin, W - margin, K]
      for the middle of the image; `model.margin` is the number of pixels that this leaves out.
    num_classes: the number of classes, K.
    cross_entropy_weight, dice_weight: the weights of the two parts of the loss.
    ground: whether the first class, the ground, counts in the mean IoU and in Dice.

  Raises:
    UserError: a value is out of range.
  """

  model: nn.Module
  num_classes: int
  cross_entropy_weight: float = 1.0
  dice_weight: float = 0.0
  ground: bool = True

  evaluate_draws = ("image", "segmentation", "classes")

  def __post_init__(self):
    weights = {name: getattr(self, name) for name in ("cross_entropy_weight", "dice_weight")}
    for name, weight in weights.items():
      if not 0 <= weight < math.inf:
        raise UserError(f"--config.model.{name}={weight}: give 0 or more")
    if not any(weights.values()):
      raise UserError("--config.model.cross_entropy_weight and --config.model.dice_weight are "
                      "both 0; give one of them")
    if not 2 <= self.num_classes <= MAX_CLASSES:
      raise UserError(f"{self.num_classes} classes of pixels: give 2 to {MAX_CLASSES}")

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return self.model.init({"params": rng}, batch["image"], train=False)

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of pixels that count, and the number of examples, not counting padding."""
    return {"pixels": jnp.sum(self._target(batch) >= 0, dtype=jnp.float32),
            "examples": jnp.sum(batch["mask"])}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: the loss's parts, pixel_accuracy, iou, confusion_matrix.

    The parts are cross_entropy_loss and dice_loss, those that have a weight. iou [K] holds, for
    each class, the intersection and the union of the pixels where it is and where it was found.
    The confusion matrix [K, K] (row: truth, column: guess) is a metric of evaluation for up to
    `MAX_CONFUSION_CLASSES` classes; its counts are the sums of the rows. All of these are whole
    numbers, so that their sums are exact.
    """
    del player  # one player: all parameters
    logits, model_state = self.apply(
        params, model_state, batch, rng, train, batch["image"], batch["mask"])
    logits = at_least_float32(logits)
    target = self._target(batch)  # [B, h, w]
    known = target >= 0
    classes = jnp.arange(self.num_classes)
    truth = target[..., None] == classes  # [B, h, w, K]; nothing where there is no class

    metrics, loss = {}, 0.0
    log_p = jax.nn.log_softmax(logits, axis=-1)
    if self.cross_entropy_weight:
      total = -jnp.sum(jnp.where(truth, log_p, 0))
      metrics["cross_entropy_loss"] = total, jnp.sum(known, dtype=logits.dtype)
      loss += self.cross_entropy_weight * total / jnp.maximum(denominators["pixels"], 1)
    if self.dice_weight:
      mask = batch["mask"].astype(logits.dtype)
      total = jnp.sum(mask * self._dice_loss(jnp.where(known[..., None], jnp.exp(log_p), 0),
                                             truth))
      metrics["dice_loss"] = total, jnp.sum(mask)
      loss += self.dice_weight * total / jnp.maximum(denominators["examples"], 1)

    guess = jnp.argmax(logits, axis=-1)
    found = (guess[..., None] == classes) & known[..., None]
    metrics["pixel_accuracy"] = _count(guess == target), _count(known)
    metrics["iou"] = _count(truth & found, (0, 1, 2)), _count(truth | found, (0, 1, 2))
    if not train and self.num_classes <= MAX_CONFUSION_CLASSES:
      # An image has fewer than 2^24 pixels, up to which float32 counts.
      matrix = jnp.einsum("bhwi,bhwj->bij", truth.astype(jnp.float32), found.astype(jnp.float32))
      matrix = _count(matrix.astype(jnp.int32), 0)
      supports = jnp.broadcast_to(matrix.sum(axis=1, keepdims=True), matrix.shape)
      metrics["confusion_matrix"] = matrix, supports
    return LossOutput(loss=loss, metrics=metrics, model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """{"classes": u8[B, h, w]}, the most probable class of each pixel.

    Where the batch has the truth, also "wrong" i32[B], the number of pixels with another class.
    """
    del rng, context  # nothing is drawn
    logits = self.model.apply(variables, batch["image"], batch["mask"], train=False)
    guess = jnp.argmax(logits, axis=-1)
    found = {"classes": guess.astype(jnp.uint8)}
    if "segmentation" in batch:
      target = self._target(batch)
      found["wrong"] = _count((guess != target) & (target >= 0), (1, 2))
    return found

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    goals = {"loss": MIN, "pixel_accuracy": MAX, "mean_iou": MAX}
    if self.cross_entropy_weight and self.dice_weight:
      goals |= {"cross_entropy_loss": MIN, "dice_loss": MIN}
    return goals

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The loss, its parts if there are two, pixel_accuracy, mean_iou; NaN where there is no pixel.

    mean_iou is the mean over the classes that occur or were found anywhere.
    """
    weights = {"cross_entropy_loss": self.cross_entropy_weight, "dice_loss": self.dice_weight}
    parts = {name: ratio(*sums[name]) for name, weight in weights.items() if weight}
    loss = sum(weights[name] * value for name, value in parts.items())
    intersection, union = (np.asarray(x, np.float64)[self._first:] for x in sums["iou"])
    there = union > 0
    mean_iou = float(np.mean(intersection[there] / union[there])) if there.any() else math.nan
    return {"loss": loss, **(parts if len(parts) > 1 else {}),
            "pixel_accuracy": ratio(*sums["pixel_accuracy"]), "mean_iou": mean_iou}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """A table of scores by class, and figures.

    Table: classes (iou, precision, recall, f1 and support, in pixels; the F1 of pixels is the Dice
    coefficient).
    Figures: confusion_matrix; segmentations, of up to `MAX_PICTURED` images, those with the most
    wrong pixels first.
    """
    names = class_names(assets, self.num_classes)
    worst = Worst(MAX_PICTURED)
    for predictions, batch in rows:  # first, as `sums` may be filled while they pass
      size = predictions["classes"].shape[1:3]
      worst.add((-predictions["wrong"]).tolist(), lambda kept: list(zip(
          *(np.asarray(crop(batch[name][kept], size)) for name in ("image", "segmentation")),
          predictions["classes"][kept])))
    intersection, union = (np.asarray(x, np.float64) for x in sums["iou"])
    figures, table = {}, [{"class": name, "iou": i / u if u else 0.0}
                          for name, i, u in zip(names, intersection.tolist(), union.tolist())]
    if "confusion_matrix" in sums:
      matrix = np.asarray(sums["confusion_matrix"][0])
      by_class = scores.by_class(matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0))
      for i, row in enumerate(table):
        row |= {"precision": float(by_class.precision[i]), "recall": float(by_class.recall[i]),
                "f1": float(by_class.f1[i]), "support": int(by_class.support[i])}
      figures["confusion_matrix"] = functools.partial(
          report.confusion_matrix, matrix, names, per_cent=True)
    if worst.rows:
      images, truths, found = zip(*worst.rows)
      figures["segmentations"] = functools.partial(
          report.segmentations, images, {"truth": truths, "found": found}, names,
          caption="Images with the most wrong pixels")
    return Findings({}, figures, {"classes": table})

  @property
  def _first(self) -> int:
    """The first class that counts in the mean IoU and in Dice."""
    return GROUND if self.ground else GROUND + 1

  def _target(self, batch: Batch) -> Array:
    """i32[B, h, w], the class of each pixel with logits; negative where it does not count."""
    target = batch["segmentation"]
    target = crop(target, tuple(side - self.model.margin for side in target.shape[1:3]))
    return jnp.where(batch["mask"][:, None, None] > 0, target, -1)

  def _dice_loss(self, p: Array, truth: Array) -> Array:
    """1 - the mean over classes of 2 |p truth| / (|p| + |truth|), [B]; both are [B, h, w, K]."""
    p, truth = p[..., self._first:], truth[..., self._first:].astype(p.dtype)
    both, either = jnp.sum(p * truth, (1, 2)), jnp.sum(p, (1, 2)) + jnp.sum(truth, (1, 2))
    return 1 - jnp.mean((2 * both + SMOOTHING) / (either + SMOOTHING), axis=-1)


def _count(which: Array, axes: int | tuple[int, ...] | None = None) -> Array:
  """The exact sum of whole numbers or truth values over some axes, by default over all."""
  return jnp.sum(which, axes, dtype=jnp.int32)


def decode(
    predictions: PyTree, assets: Mapping[str, Any], ground: bool = False,
) -> Iterator[Mapping[str, Any]]:
  """One row for each image, to print and to write.

  Args:
    predictions: the result of `Segmentation.predict`.
    assets: the run's assets; "classes" are the class names.
    ground: whether "found" also names the first class, which is no ground.

  Yields:
    {"found": "7 (12.1%), 3 (4.0%)", "shares": {"ground": 0.839, "7": 0.121, ...}}. The shares are
    those of classes with at least `LEAST_SHARE` of the picture, the largest first; "found" has the
    same without the ground.
  """
  classes = np.asarray(predictions["classes"])
  names = class_names(assets, int(classes.max(initial=0)) + 1)
  for image in classes:
    shares = np.bincount(image.ravel(), minlength=len(names)) / image.size
    order = [i for i in np.argsort(-shares, kind="stable") if shares[i] >= LEAST_SHARE]
    found = ", ".join(f"{names[i]} ({shares[i]:.1%})" for i in order if ground or i != GROUND)
    yield {"found": found or "none", "shares": {names[i]: float(shares[i]) for i in order}}
