"""The experiment that all object detectors share, from a config, a model and its anchors."""

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from dljax import optim, report
from dljax.config import Field, Group, base_config
from dljax.data.image import scenes, typical
from dljax.data.image.geometry import Placement
from dljax.errors import UserError
from dljax.recipes import common
from dljax.tasks import boxes, detection
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the sets that presets use.
DATA = {
    "digit_scenes": {"name": "digit_scenes"},
    "emoji_scenes": scenes.EMOJI_SCENES,
    # No image of COCO has a longer side than 640 pixels: all are laid on black in their own size.
    # Mean and std are those of ImageNet, on which the backbone was trained. A few boxes of the set
    # have no area.
    "coco": {"name": "coco/2017", "image_shape": (640, 640, 3), "num_classes": 80,
             "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
             "train": "train[:99%]", "validation": "train[99%:]", "test": "validation",
             "max_boxes": 100, "bad_boxes": "drop", "flip": True},
}
PREVIEWED = 4  # the number of images whose detections are drawn as the network learns
_OF_TASK = {
    "alpha": "The weight of objects in the focal loss; the background's is 1 - alpha.",
    "gamma": "How much less easy examples count in the focal loss; 0 gives the cross-entropy.",
    "smooth_l1_beta": "The error of a box's code below which its loss is quadratic; 0 gives L1.",
    "score_threshold": "The score that a detection must exceed.",
    "nms_threshold": "The IoU above which the lower-scored of two detections of a class is dropped.",
    "max_detections": "The greatest number of detections in an image.",
}


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of a detector's config, for the preset to change.

  Besides the variant, `config.model` has dtype and remat, the fields of `Detection`, and two that
  describe the anchors. Each level has anchors of three sizes, from `anchor_scale` times its stride
  to below twice that, each with every height / width of `anchor_ratios`.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = scenes.default_config()
  data_config.update(DATA[data])
  defaults = {field: Field(getattr(detection.Detection, field), sentence)
              for field, sentence in _OF_TASK.items()}
  return base_config(
      family, preset, task="object_detection",
      optimizer=optim.default_config(optimizer), data=data_config,
      model=Group({
          **common.model_fields(variant), **defaults,
          "anchor_scale": Field(4, "The smallest size of a level's anchors, in its strides; each "
                                "level has three sizes, up to below twice that."),
          "anchor_ratios": Field((0.5, 1.0, 2.0), "The anchors' height / width.")}))


def anchors(config: ml_collections.ConfigDict, strides: Sequence[int]) -> boxes.Anchors:
  """The anchors that `config.model` describes.

  Args:
    config: a config with the fields that `config()` gives.
    strides: the number of pixels between neighbouring cells, for each level.

  Raises:
    UserError: the anchors have no size or no shape.
  """
  scale, ratios = config.model.anchor_scale, tuple(config.model.anchor_ratios)
  if scale < 1:
    raise UserError(f"--config.model.anchor_scale={scale}: give a positive number of strides")
  if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
    raise UserError(f"--config.model.anchor_ratios={ratios}: give one or more of height / width, "
                    "such as 0.5,1,2")
  return boxes.Anchors.octaves([scale * stride for stride in strides], ratios)


def build(
    config: ml_collections.ConfigDict, model: nn.Module, anchors: boxes.Anchors,
) -> Experiment:
  """The experiment that trains `model` on the scenes of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: the network, see `Detection`.
    anchors: the anchors that the model has outputs for.
  """
  images = scenes.SceneSet(config.data, ["boxes"])
  data = images.pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = detection.Detection(
      model=model, num_classes=config.data.num_classes, anchors=anchors,
      **{field: config.model[field] for field in _OF_TASK})

  def preview() -> Inputs | None:
    if "validation" not in data.evals:
      return None
    batch = images.first("validation", PREVIEWED)
    return Inputs(batch, [f"validation {row}" for row in batch["id"]])

  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None,
      read=functools.partial(_read, config), show=_show, draw=_draw, preview=preview,
      saw=functools.partial(
          common.saw_images, functools.partial(typical.pixels, config=config.data)))


def resolve(config: ml_collections.ConfigDict, given: Collection[str]) -> dict[str, Any]:
  """Looks up what the user's own images and boxes decide; see `launch.main`.

  Args:
    config: the config, with the user's overrides.
    given: the names of the fields that the user has given.

  Returns:
    Field -> value. The anchors get the boxes' shapes.

  Raises:
    UserError: the data are missing or cannot be used.
  """
  found, ratios = scenes.look_up(config, given, "boxes")
  if ratios and "model.anchor_ratios" not in given:
    found["model.anchor_ratios"] = ratios
  return found


def _read(config: ml_collections.ConfigDict, request: Request, assets: Assets) -> Inputs:
  """Reads the user's images; see `scenes.encode`.

  `Detection.predict` needs place and size to give boxes in an image's own pixels.
  """
  common.check_request(request, config.family, ["paths"])
  batch, names, skipped = scenes.encode(request.paths, config.data)
  size = batch["host/size"]  # height, width
  places = [Placement.of(s, config.data.image_shape[:2], config.data.resize) for s in size]
  batch["place"] = np.array([(p.left, p.top, p.left + p.width, p.top + p.height) for p in places],
                            np.float32).reshape(-1, 4)
  batch["size"] = size[:, ::-1].astype(np.float32)
  return Inputs(batch, names, skipped,
                typical.warnings(batch["image"], names, config.data, assets))


def _show(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[Mapping[str, Any]]:
  del inputs
  return detection.decode(predictions, assets)


def _draw(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[tuple[str, bytes]]:
  """Draws each image as the network sees it, with the boxes found and the true ones, if known."""
  batch = inputs.batch
  names = assets.get("classes", range(int(np.max(predictions["labels"], initial=-1)) + 1))
  for i, image in enumerate(batch["image"]):
    sure = predictions["valid"][i] & (predictions["scores"][i] >= detection.SHOWN_SCORE)
    found = {name: predictions[name][i][sure] for name in ("boxes", "labels", "scores")}
    if "place" in batch:  # the boxes are in the user's pixels
      left, top, right, bottom = batch["place"][i]
      image = image[int(top):int(bottom), int(left):int(right)]
      found["boxes"] = found["boxes"] * np.tile([right - left, bottom - top] / batch["size"][i], 2)
    there = batch["boxes"][i][batch["box_mask"][i] > 0] if "boxes" in batch else ()
    yield common.png(report.picture(report.detections([image], [{"boxes": there}], [found],
                                                      names)))
